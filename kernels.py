"""
kernels.py - the operations that decide speed and memory, each beside its plain-PyTorch definition.

Every kernel is `name_ref` (the definition, in plain PyTorch) and `name` (what the scripts call: picks the
path, carries the backward). Letters: N tokens, D width, V vocabulary.
"""
import torch


def linear_logprob_ref(h, W, targets, temperature=1.0):
    """log p(targets | h) and entropy of p = softmax(h Wᵀ / temperature).   h [N, D], W [V, D] -> [N], [N]."""
    logp = torch.log_softmax((h @ W.T).float() / temperature, -1)                        # [N, V]
    return logp.gather(1, targets[:, None]).squeeze(1), -(logp.exp() * logp).sum(-1)     # [N], [N]


CHUNK = 1 << 20          # logits at a time: 4 MB of float32, as fits a CPU's L2 cache; on CUDA 64 times more


class LinearLogprob(torch.autograd.Function):
    """linear_logprob_ref without ever holding [N, V]: chunks of rows, logits recomputed in the backward.

    FLOPs: 2NDV forward, 6NDV backward (2NDV of it recomputation).   Memory: CHUNK logits, [N] statistics.
    With p = softmax(z), H its entropy:  d logp/dz = onehot - p,   dH/dz = -p (log p + H).
    """

    @staticmethod
    def forward(ctx, h, W, targets, temperature):
        # at least 64 rows, because every chunk re-reads W
        cast, rows = W.to(h.dtype), max(64, CHUNK * (64 if h.is_cuda else 1) // W.size(0))
        stats = torch.float64 if h.dtype == torch.float64 else torch.float32
        logp, lse, entropy = (torch.empty(h.size(0), dtype=stats, device=h.device) for _ in range(3))
        for i in range(0, h.size(0), rows):
            z = (h[i:i + rows] @ cast.T).to(stats).div_(temperature)                     # [n, V]
            lse[i:i + rows] = torch.logsumexp(z, -1)
            logp[i:i + rows] = z.gather(1, targets[i:i + rows, None]).squeeze(1) - lse[i:i + rows]
            z -= lse[i:i + rows, None]                                                   # log p
            entropy[i:i + rows] = -(z.exp() * z).sum(-1)
        ctx.save_for_backward(h, W, targets, lse, entropy)
        ctx.temperature, ctx.rows = temperature, rows
        ctx.set_materialize_grads(False)
        return logp, entropy

    @staticmethod
    def backward(ctx, g_logp, g_entropy):
        h, W, targets, lse, entropy = ctx.saved_tensors
        cast, dh = W.to(h.dtype), torch.empty_like(h)
        dW = torch.zeros_like(W) if ctx.needs_input_grad[1] else None
        for i in range(0, h.size(0), ctx.rows):
            s = slice(i, i + ctx.rows)
            z = (h[s] @ cast.T).to(lse.dtype).div_(ctx.temperature) - lse[s, None]       # [n, V]  log p
            p = z.exp()
            dz = torch.zeros_like(z) if g_logp is None else p * -g_logp[s, None]
            if g_logp is not None:
                dz.scatter_add_(1, targets[s, None], g_logp[s, None].to(dz.dtype))
            if g_entropy is not None:
                dz -= p * (z + entropy[s, None]) * g_entropy[s, None]
            dz = dz.div_(ctx.temperature).to(h.dtype)
            dh[s] = dz @ cast
            if dW is not None:
                dW += dz.T @ h[s]
        return dh, dW, None, None


def linear_logprob(h, W, targets, temperature=1.0):
    """linear_logprob_ref, chunked: (log p(targets) [N], entropy [N]) in float32, differentiable in h and W.

    Under autocast the matmuls run in its dtype, as for a Linear layer; the statistics stay float32.
    """
    if torch.is_autocast_enabled(h.device.type):
        h = h.to(torch.get_autocast_dtype(h.device.type))
    return LinearLogprob.apply(h, W, targets, temperature)
