"""
kernels.py - the operations that decide speed and memory, each beside its plain-PyTorch definition.

Letters  N tokens, D width, V vocabulary, B rows, H heads (K for keys and values), S cache slots
"""
from __future__ import annotations

import math

import torch
import torch.nn.functional as F

try:
    import triton
    import triton.language as tl
    jit = triton.jit
except ImportError:                      # macOS, Windows: the CPU paths and the twins need no Triton
    triton, jit = None, lambda f: f

# --- which path ---------------------------------------------------------------------------------------


def auto(x):
    """Triton for CUDA tensors, the tuned PyTorch path for the CPU."""
    return "triton" if x.is_cuda and triton is not None else "cpu"


def plain(x):
    """The plain twin everywhere: what the kernels must agree with."""
    return "torch"


def forced(x):
    """Triton everywhere: for tests, on a CPU in its interpreter (TRITON_INTERPRET=1)."""
    return "triton"


MODES = dict(auto=auto, torch=plain)     # what --kernels offers
route = auto


def use(mode):
    """Set the path of every kernel from here on: a row of MODES by name, or "triton" (see forced)."""
    global route
    route = dict(MODES, triton=forced)[mode]


# --- the head: log-probabilities ----------------------------------------------------------------------

CHUNK = 1 << 22          # logits held at a time on a CPU (16 MB of float32); on CUDA 16 times as many
ROWS = 256               # but at least so many rows: every chunk reads the whole head


def statistics(x):
    """The dtype of log-sum-exps and losses: float32, or float64 for float64."""
    return torch.promote_types(x.dtype, torch.float32)


def row_chunks(N, V, cuda=False):
    """Slices of rows whose logits over V words fill a chunk, and the rows of the largest."""
    rows = max(ROWS, CHUNK * (16 if cuda else 1) // V)
    return [slice(i, min(i + rows, N)) for i in range(0, N, rows)], min(rows, N)


def logits_buffers(h, rows, V, widen=True):
    """Where chunks of logits are made and widened; reused: fresh pages cost a CPU as much as the product."""
    z = h.new_empty(rows, V)
    return z, z if not widen or statistics(h) == h.dtype else z.new_empty(rows, V, dtype=statistics(h))


def chunk_logits(h, W, temperature, buffers):
    """z = h Wᵀ / temperature of one chunk, in the statistics' dtype.   h [n, D], W [V, D] -> [n, V]"""
    z, wide = (b[:len(h)] for b in buffers)
    torch.mm(h, W.T, out=z)
    if wide.dtype != z.dtype:
        wide.copy_(z)
    return wide.div_(temperature) if temperature != 1 else wide


def push_back(dz, z, h, W, dh, dW):
    """A chunk's gradient of its logits, dz [n, V], on to dh [n, D] (set) and dW [V, D] or None (added to)."""
    dz = dz if dz.dtype == h.dtype else z[:len(h)].copy_(dz)     # z: the chunk's buffer in h's dtype
    torch.mm(dz, W, out=dh)
    if dW is not None:
        dW.addmm_(dz.T, h) if dW.dtype == h.dtype else dW.add_(dz.T @ h)


def linear_logprob_ref(h, W, targets, temperature=1.0):
    """log p(targets) and the entropy of p = softmax(h Wᵀ / temperature).   h [N, D], W [V, D] -> [N], [N]"""
    logp = torch.log_softmax((h @ W.to(h.dtype).T).to(statistics(h)) / temperature, -1)  # [N, V]
    return logp.gather(1, targets[:, None]).squeeze(1), -(logp.exp() * logp).sum(-1)     # [N], [N]


@jit
def logits_tile(h, W, i, j, N, V, D, tau, BN: tl.constexpr, BV: tl.constexpr, BD: tl.constexpr):
    """Rows i·BN… and words j·BV… of h Wᵀ / τ: a [BN, BV] tile of float32, 0 outside."""
    n = i * BN + tl.arange(0, BN)
    v = j * BV + tl.arange(0, BV)
    z = tl.zeros((BN, BV), tl.float32)
    for at in range(0, D, BD):
        d = at + tl.arange(0, BD)
        a = tl.load(h + n[:, None].to(tl.int64) * D + d, mask=(n < N)[:, None] & (d < D), other=0.0)
        b = tl.load(W + v[:, None].to(tl.int64) * D + d, mask=(v < V)[:, None] & (d < D), other=0.0)
        z = tl.dot(a, b.T, z, input_precision="ieee")
    return z / tau


@jit
def logprob_kernel(h, W, targets, top, total, slope, hit, N, V, D, tau,
                   BN: tl.constexpr, BV: tl.constexpr, BD: tl.constexpr):
    """One tile's share of its rows' softmax: max, Σ e^(z-max), Σ e^(z-max) (z-max); and z of the target."""
    i, j = tl.program_id(0), tl.program_id(1)
    n, v = i * BN + tl.arange(0, BN), j * BV + tl.arange(0, BV)
    z = logits_tile(h, W, i, j, N, V, D, tau, BN, BV, BD)                                # [BN, BV]
    top_n = tl.max(tl.where((v < V)[None], z, float("-inf")), 1)                         # [BN]
    y = tl.load(targets + n, mask=n < N, other=-1)
    mine = (y >= j * BV) & (y < (j + 1) * BV) & (n < N)
    tl.store(hit + n, tl.sum(tl.where(v[None] == y[:, None], z, 0.0), 1), mask=mine)
    z = tl.where((v < V)[None], z - top_n[:, None], 0.0)
    e = tl.where((v < V)[None], tl.exp(z), 0.0)
    at = j.to(tl.int64) * N + n
    tl.store(top + at, top_n, mask=n < N)
    tl.store(total + at, tl.sum(e, 1), mask=n < N)
    tl.store(slope + at, tl.sum(e * z, 1), mask=n < N)


@jit
def logprob_grad_kernel(h, W, targets, lse, entropy, up, up_entropy, dz, N, V, D, tau,
                        BN: tl.constexpr, BV: tl.constexpr, BD: tl.constexpr):
    """One tile of dz = up (onehot - p) - up_entropy p (log p + H), its logits made again from h and W."""
    i, j = tl.program_id(0), tl.program_id(1)
    n, v = i * BN + tl.arange(0, BN), j * BV + tl.arange(0, BV)
    z = logits_tile(h, W, i, j, N, V, D, tau, BN, BV, BD)
    z -= tl.load(lse + n, mask=n < N, other=0.0)[:, None]                                # log p
    H = tl.load(entropy + n, mask=n < N, other=0.0)[:, None]
    g = tl.load(up + n, mask=n < N, other=0.0)[:, None]
    gH = tl.load(up_entropy + n, mask=n < N, other=0.0)[:, None]
    y = tl.load(targets + n, mask=n < N, other=-1)[:, None]
    out = tl.where(v[None] == y, g, 0.0) - tl.exp(z) * (g + gH * (z + H))
    tl.store(dz + n[:, None].to(tl.int64) * V + v[None], out.to(dz.dtype.element_ty),
             mask=(n < N)[:, None] & (v < V)[None])


def tiles(h, N, V):
    """The grid over [N, V] and the block sizes: tensor-core tiles for bfloat16, small ones for float32."""
    BN, BV, BD, warps = (128, 128, 64, 8) if h.element_size() == 2 else (64, 64, 32, 4)
    return (triton.cdiv(N, BN), triton.cdiv(V, BV)), dict(BN=BN, BV=BV, BD=BD, num_warps=warps)


def softmax_statistics(h, W, targets, temperature):
    """Log-sum-exp, entropy and the target's logit of every row, from the tiles' shares.   three of [N]"""
    (N, D), V = h.shape, len(W)
    grid, blocks = tiles(h, N, V)
    top, total, slope = (h.new_empty(grid[1], N, dtype=torch.float32) for _ in range(3))
    hit = h.new_zeros(N, dtype=torch.float32)
    logprob_kernel[grid](h, W, targets, top, total, slope, hit, N, V, D, temperature, **blocks)
    lse = torch.logsumexp(top + total.log(), 0)                                          # [N]
    entropy = ((top - lse).exp() * (total * (lse - top) - slope)).sum(0)                 # no cancellation
    return lse, entropy, hit


class LinearLogprob(torch.autograd.Function):
    """linear_logprob's two fast paths; the backward makes the logits of each chunk again."""

    @staticmethod
    def forward(ctx, h, W, targets, temperature, want_entropy, path):
        h, cast, y = h.contiguous(), W.to(h.dtype).contiguous(), targets[:, None]
        if path == "triton":
            lse, entropy, hit = softmax_statistics(h, cast, targets, temperature)
            logp = hit - lse
        else:
            logp, lse, entropy = (h.new_zeros(len(h), dtype=statistics(h)) for _ in range(3))
            chunks, rows = row_chunks(len(h), len(W))
            buffers = logits_buffers(h, rows, len(W))
            for s in chunks:
                z = chunk_logits(h[s], cast, temperature, buffers)                       # [n, V]
                lse[s] = z.gather(1, y[s]).squeeze(1)
                torch.log_softmax(z, -1, out=z)
                logp[s] = z.gather(1, y[s]).squeeze(1)
                lse[s] -= logp[s]
                if want_entropy:
                    entropy[s] = -(z.exp().mul_(z)).sum(-1)
        ctx.save_for_backward(h, W, targets, lse, entropy)
        ctx.temperature, ctx.path = temperature, path
        ctx.set_materialize_grads(False)
        return logp, entropy if want_entropy else None

    @staticmethod
    def backward(ctx, up, up_entropy):
        h, W, targets, lse, entropy = ctx.saved_tensors
        cast, dh = W.to(h.dtype).contiguous(), torch.empty_like(h)
        dW = torch.zeros_like(W) if ctx.needs_input_grad[1] else None
        g, gH = (torch.zeros_like(lse) if x is None else x / ctx.temperature for x in (up, up_entropy))
        chunks, rows = row_chunks(len(h), len(W), ctx.path == "triton")
        z, wide = logits_buffers(h, rows, len(W), ctx.path != "triton")
        for s in chunks:
            if ctx.path == "triton":
                dz, (grid, blocks) = z[:len(h[s])], tiles(h, len(h[s]), len(W))
                logprob_grad_kernel[grid](h[s], cast, targets[s], lse[s], entropy[s], g[s], gH[s], dz,
                                          *dz.shape, h.size(1), ctx.temperature, **blocks)
            else:
                dz = chunk_logits(h[s], cast, ctx.temperature, (z, wide))                # [n, V]
                if up_entropy is None:
                    torch.softmax(dz, -1, out=dz).mul_(-g[s, None])
                else:
                    dz -= lse[s, None]                                                   # log p
                    pull = (dz + entropy[s, None]).mul_(gH[s, None]).add_(g[s, None])
                    dz.exp_().mul_(pull).neg_()
                dz.scatter_add_(1, targets[s, None], g[s, None])
            push_back(dz, z, h[s], cast, dh[s], dW)
        return dh, dW, None, None, None, None


def linear_logprob(h, W, targets, temperature=1.0, entropy=False):
    """log p(targets) [N] under softmax(h Wᵀ / temperature), with entropy=True also its entropy [N]; float32.

    h [N, D], W [V, D], targets [N]; differentiable in h and W. [N, V] is never held: Triton keeps a tile
    of it at a time (its backward a chunk), a CPU a chunk. With z the logits and H the entropy,
        d logp/dz = onehot - p,   dH/dz = -p (log p + H).
    FLOPs: 2NDV forward, 6NDV backward, 2NDV of them to make the logits again. Bytes beyond the products':
    Triton 12·NV/128 forward, 6·NV backward (dz written once, read twice): compute-bound on an H100.
    Under autocast the products run in its dtype, as for a Linear layer; the statistics stay float32.
    """
    if torch.is_autocast_enabled(h.device.type):
        h = h.to(torch.get_autocast_dtype(h.device.type))
    path = route(h) if len(h) else "torch"
    logp, H = (linear_logprob_ref(h, W, targets, temperature) if path == "torch"
               else LinearLogprob.apply(h, W, targets, temperature, entropy, path))
    return (logp, H) if entropy else logp


def linear_cross_entropy_ref(h, W, targets, ignore=-100):
    """The mean cross-entropy of softmax(h Wᵀ) over the targets that are not `ignore`: F.cross_entropy."""
    return F.cross_entropy((h @ W.to(h.dtype).T).to(statistics(h)), targets, ignore_index=ignore)


def linear_cross_entropy(h, W, targets, ignore=-100):
    """linear_cross_entropy_ref through linear_logprob: rows to ignore cost nothing, [N, V] is never held."""
    keep = targets != ignore                                                             # [N]
    return -linear_logprob(h[keep], W, targets[keep]).mean()

# --- the head: distillation ---------------------------------------------------------------------------


def forward_kl(logq, logp):
    """KL(p‖q) of teacher p, student q, covers the modes.   [n, V] twice -> divergence [n], pull [n, V]

    pull is q ∂D/∂q: through the softmax every divergence's gradient is  dz = pull - q Σ pull.
    """
    p = logp.exp()
    return (p * (logp - logq)).sum(-1), -p


def reverse_kl(logq, logp):
    """KL(q‖p): seeks a mode of the teacher. Its pull sums to the divergence itself."""
    pull = logq.exp() * (logq - logp)                                                    # [n, V]
    return pull.sum(-1), pull


def jsd(logq, logp, *, beta=0.5):
    """Generalised Jensen-Shannon, β KL(p‖m) + (1-β) KL(q‖m), m = β p + (1-β) q (GKD, 2306.13649).

    Small by construction: near p = q it is β (1-β) times the forward KL.
    """
    logm = torch.logaddexp(logp + math.log(beta), logq + math.log1p(-beta))              # [n, V]
    pull = (1 - beta) * logq.exp() * (logq - logm)
    return (beta * logp.exp() * (logp - logm)).sum(-1) + pull.sum(-1), pull


DIVERGENCES = dict(forward_kl=forward_kl, reverse_kl=reverse_kl, jsd=jsd)


def linear_distill_ref(h, W, teacher_h, teacher_W, divergence="forward_kl", temperature=1.0, **options):
    """The divergence between softmax(h Wᵀ / τ) and the teacher's, per token, from full logits.   -> [N]"""
    logq, logp = (torch.log_softmax((x @ w.to(x.dtype).T).to(statistics(x)) / temperature, -1)
                  for x, w in ((h, W), (teacher_h, teacher_W)))                          # [N, V] each
    return DIVERGENCES[divergence](logq, logp.detach(), **options)[0]


@jit
def distill_tile(h, W, t, U, lse, teacher_lse, i, j, N, V, D, E, tau, beta, KIND: tl.constexpr,
                 BN: tl.constexpr, BV: tl.constexpr, BD: tl.constexpr):
    """A tile's student probabilities q, its terms of the divergence, and the pull q ∂D/∂q, [BN, BV] each"""
    n, v = i * BN + tl.arange(0, BN), j * BV + tl.arange(0, BV)
    inside = (n < N)[:, None] & (v < V)[None]
    logq = logits_tile(h, W, i, j, N, V, D, tau, BN, BV, BD)
    logq -= tl.load(lse + n, mask=n < N, other=0.0)[:, None]
    logp = logits_tile(t, U, i, j, N, V, E, tau, BN, BV, BD)
    logp -= tl.load(teacher_lse + n, mask=n < N, other=0.0)[:, None]
    p, q = tl.where(inside, tl.exp(logp), 0.0), tl.where(inside, tl.exp(logq), 0.0)
    if KIND == "forward_kl":
        pull, term = -p, p * (logp - logq)
    elif KIND == "reverse_kl":
        pull = q * (logq - logp)
        term = pull
    else:
        a, b = logp + tl.log(beta), logq + tl.log(1 - beta)
        logm = tl.maximum(a, b) + tl.log(1 + tl.exp(-tl.abs(a - b)))
        pull = (1 - beta) * q * (logq - logm)
        term = beta * p * (logp - logm) + pull
    return q, term, pull


@jit
def distill_kernel(h, W, t, U, lse, teacher_lse, terms, pulls, N, V, D, E, tau, beta, KIND: tl.constexpr,
                   BN: tl.constexpr, BV: tl.constexpr, BD: tl.constexpr):
    """One tile's share of the divergence and of Σ pull, [tiles, N] each."""
    i, j = tl.program_id(0), tl.program_id(1)
    q, term, pull = distill_tile(h, W, t, U, lse, teacher_lse, i, j, N, V, D, E, tau, beta, KIND,
                                 BN, BV, BD)                                             # [BN, BV] each
    n = i * BN + tl.arange(0, BN)
    tl.store(terms + j.to(tl.int64) * N + n, tl.sum(term, 1), mask=n < N)
    tl.store(pulls + j.to(tl.int64) * N + n, tl.sum(pull, 1), mask=n < N)


@jit
def distill_grad_kernel(h, W, t, U, lse, teacher_lse, pulls, up, dz, N, V, D, E, tau, beta,
                        KIND: tl.constexpr, BN: tl.constexpr, BV: tl.constexpr, BD: tl.constexpr):
    """One tile of dz = up (pull - q Σ pull)."""
    i, j = tl.program_id(0), tl.program_id(1)
    q, term, pull = distill_tile(h, W, t, U, lse, teacher_lse, i, j, N, V, D, E, tau, beta, KIND,
                                 BN, BV, BD)                                             # [BN, BV] each
    n, v = i * BN + tl.arange(0, BN), j * BV + tl.arange(0, BV)
    total = tl.load(pulls + n, mask=n < N, other=0.0)[:, None]
    g = tl.load(up + n, mask=n < N, other=0.0)[:, None]
    tl.store(dz + n[:, None].to(tl.int64) * V + v[None], (g * (pull - q * total)).to(dz.dtype.element_ty),
             mask=(n < N)[:, None] & (v < V)[None])


class LinearDistill(torch.autograd.Function):
    """linear_distill's two fast paths; the backward makes both logits of each chunk again."""

    @staticmethod
    def forward(ctx, h, W, t, U, divergence, temperature, options, path):
        h, t, cast, U = (x.contiguous() for x in (h, t, W.to(h.dtype), U.to(t.dtype)))
        N, V = len(h), len(W)
        lse, teacher_lse, out, pulls = h.new_zeros(4, N, dtype=statistics(h)).unbind(0)
        if path == "triton":
            nothing = torch.full((N,), -1, device=h.device)
            lse, teacher_lse = (softmax_statistics(x, w, nothing, temperature)[0]
                                for x, w in ((h, cast), (t, U)))
            grid, blocks = tiles(h, N, V)
            terms, shares = (h.new_empty(grid[1], N, dtype=torch.float32) for _ in range(2))
            distill_kernel[grid](h, cast, t, U, lse, teacher_lse, terms, shares, N, V, h.size(1),
                                 t.size(1), temperature, options.get("beta", 0.5), divergence, **blocks)
            out, pulls = terms.sum(0), shares.sum(0)                                     # [N]
        else:
            chunks, rows = row_chunks(N, V)
            student, teacher = logits_buffers(h, rows, V), logits_buffers(t, rows, V)
            for s in chunks:
                logq, logp = (torch.log_softmax(x, -1, out=x) for x in (
                    chunk_logits(h[s], cast, temperature, student),
                    chunk_logits(t[s], U, temperature, teacher)))                        # [n, V]
                out[s] = DIVERGENCES[divergence](logq, logp, **options)[0]
        ctx.save_for_backward(h, W, t, U, lse, teacher_lse, pulls)
        ctx.settings = divergence, temperature, options, path
        return out

    @staticmethod
    def backward(ctx, up):
        h, W, t, U, lse, teacher_lse, pulls = ctx.saved_tensors
        divergence, temperature, options, path = ctx.settings
        cast, dh, g = W.to(h.dtype).contiguous(), torch.empty_like(h), up / temperature
        dW, V = torch.zeros_like(W) if ctx.needs_input_grad[1] else None, len(W)
        chunks, rows = row_chunks(len(h), V, path == "triton")
        z, wide = logits_buffers(h, rows, V, path != "triton")
        teacher = logits_buffers(t, rows, V) if path != "triton" else ()
        for s in chunks:
            if path == "triton":
                dz, (grid, blocks) = z[:len(h[s])], tiles(h, len(h[s]), V)
                distill_grad_kernel[grid](h[s], cast, t[s], U, lse[s], teacher_lse[s], pulls[s], g[s], dz,
                                          *dz.shape, h.size(1), t.size(1), temperature,
                                          options.get("beta", 0.5), divergence, **blocks)
            else:
                logq, logp = (torch.log_softmax(x, -1, out=x) for x in (
                    chunk_logits(h[s], cast, temperature, (z, wide)),
                    chunk_logits(t[s], U, temperature, teacher)))                        # [n, V]
                dz = DIVERGENCES[divergence](logq, logp, **options)[1]                   # [n, V]
                dz.sub_(logq.exp_().mul_(dz.sum(-1, keepdim=True))).mul_(g[s, None])
            push_back(dz, z, h[s], cast, dh[s], dW)
        return dh, dW, None, None, None, None, None, None


def linear_distill(h, W, teacher_h, teacher_W, divergence="forward_kl", temperature=1.0, **options):
    """A row of DIVERGENCES between softmax(h Wᵀ / τ) and softmax(teacher_h teacher_Wᵀ / τ): [N], nats.

    h [N, D], W [V, D], teacher_h [N, E], teacher_W [V, E]; options: jsd's beta. Differentiable in h and W.
    No factor τ². [N, V] is never held (see linear_logprob). FLOPs: forward 2N(D+E)V, which Triton does twice
    (log-sum-exps first), backward 2N(D+E)V + 4NDV.   Raises ValueError if the vocabularies differ.
    """
    if len(W) != len(teacher_W):
        raise ValueError(f"the student's head has {len(W)} words, the teacher's {len(teacher_W)}: "
                         "cut the longer one (padding rows) to the shorter")
    if torch.is_autocast_enabled(h.device.type):
        h, teacher_h = (x.to(torch.get_autocast_dtype(h.device.type)) for x in (h, teacher_h))
    path = route(h) if len(h) else "torch"
    if path == "torch":
        return linear_distill_ref(h, W, teacher_h, teacher_W, divergence, temperature, **options)
    return LinearDistill.apply(h, W, teacher_h.detach(), teacher_W.detach(), divergence, temperature, options,
                               path)
