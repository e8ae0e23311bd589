"""
kernels.py - the operations that decide speed and memory, each beside its plain-PyTorch definition.

    python tests/bench.py linear rms int4   # speed and memory against plain PyTorch, in one run
    python tests/compile_kernels.py         # every Triton launch compiled for an H100, anywhere

A kernel is three things side by side: `name_ref`, the definition; the Triton kernel; `name`, which
picks a path by the device and carries the backward. A packed format is its buffers, the weight that
they stand for, and a product that reads the stored bytes alone where there is one. A rounding gives
floats back, exactly those of its format.

Letters  N tokens, D width, V vocabulary, B rows, H heads (K for keys and values), S cache slots
         W [out, in] of y = W x; b bits a code; g neighbouring inputs of a row share a scale
Watch    --kernels torch is slower and larger and must train to the same numbers; where it does not,
         a kernel is wrong. A bfloat16 product differs by rounding: compare in float32.
"""
from __future__ import annotations

import math
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import once_differentiable

from data.run import UserError

try:
    import triton
    import triton.language as tl
    jit = triton.jit
except ImportError:  # macOS, Windows: the CPU paths and the definitions need no Triton
    triton, jit = None, lambda f: f

# --- which path -----------------------------------------------------------------------------------


def auto(x):
    """Triton for CUDA tensors, a tuned PyTorch path for the CPU."""
    return "triton" if x.is_cuda and triton is not None and x.dtype != torch.float64 else "cpu"


def plain(x):
    """The plain definition everywhere: what the kernels must agree with."""
    return "torch"


MODES = dict(auto=auto, torch=plain)     # what --kernels offers
route = auto
PROGRAMS = 264                           # two for each of an H100's 132 multiprocessors


def use(mode):
    """Set the path of every kernel: a row of MODES, or "triton", which a CPU interprets."""
    global route
    route = dict(MODES, triton=lambda x: "triton")[mode]


def fused(x):
    """route(x), but the definition for what is empty and for inference on a CPU, where each call
    counts."""
    path = route(x)
    if not x.numel() or path == "cpu" and not torch.is_grad_enabled():
        return "torch"
    return path


def statistics(x):
    """The dtype of log-sum-exps and losses: float32, or float64 for float64."""
    return torch.promote_types(x.dtype, torch.float32)


def wide(x):
    """x in the dtype of its statistics."""
    return x.to(statistics(x))


# --- logits a chunk at a time ---------------------------------------------------------------------

CHUNK = 1 << 22          # logits held at a time on a CPU: 16 MB of float32
ROWS = 256               # at least so many rows, as every chunk reads the head; Triton: 8 of both


def slices(N, V, path):
    """Slices of N rows whose logits over V words fill a chunk."""
    rows = max(ROWS, CHUNK // V) * (8 if path == "triton" else 1)
    return [slice(i, min(i + rows, N)) for i in range(0, N, rows)]


def chunks(h, V, path):
    """Yield those slices, each with buffers [n, V] for its logits, in h's dtype and in the
    statistics'. All share the buffers' memory: fresh pages cost a CPU as much as the product."""
    for s in slices(len(h), V, path):
        if s.start == 0:
            z = h.new_empty(s.stop, V)
            out = z if path == "triton" or statistics(h) == h.dtype else z.to(statistics(h))
        yield s, z[:s.stop - s.start], out[:s.stop - s.start]


def chunk_logits(h, W, temperature, z, out):
    """h Wᵀ / temperature of one chunk, made in z, given in out.   h [n, D], W [V, D] -> [n, V]"""
    torch.mm(h, W.T, out=z)
    if out.dtype != z.dtype:
        out.copy_(z)
    return out.div_(temperature) if temperature != 1 else out


def head_gradients(h, W, cast, logit_gradients, want_dW):
    """dh = dz W [N, D] and dW = dzᵀ h [V, D] (or None), summed over logit_gradients, which yields
    every chunk's slice and dz [n, V] in h's dtype. cast: W in that dtype."""
    dh = torch.empty_like(h)
    dW = torch.zeros_like(W, dtype=statistics(W)) if want_dW else None
    for s, dz in logit_gradients:
        torch.mm(dz, cast, out=dh[s])
        if want_dW and dW.dtype == h.dtype:
            dW.addmm_(dz.T, h[s])
        elif want_dW:
            dW.add_(dz.T @ h[s])
    return dh, dW.to(W.dtype) if want_dW else None


# --- the head's log-probabilities: definition, Triton, host --------------------------------------


def linear_logprob_ref(h, W, targets, temperature=1.0, entropy=False):
    """log p(targets) for p = softmax(h Wᵀ / temperature), and with entropy=True p's entropy.

    h [N, D], W [V, D], targets [N] -> [N] each"""
    logp = torch.log_softmax(wide(h @ W.to(h.dtype).T) / temperature, -1)                # [N, V]
    hit = logp.gather(1, targets[:, None]).squeeze(1)                                    # [N]
    return (hit, -(logp.exp() * logp).sum(-1)) if entropy else hit


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
    return z.to(h.dtype.element_ty).to(tl.float32) / tau     # rounded as the sampler's logits are


@jit
def logprob_kernel(h, W, targets, top, total, slope, hit, N, V, D, tau,
                   BN: tl.constexpr, BV: tl.constexpr, BD: tl.constexpr):
    """One tile's share of its rows' softmax: max, Σ e^(z-max), Σ e^(z-max) (z-max); and z of the
    target."""
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
    """One tile of dz = up (onehot - p) - up_entropy p (log p + H), its logits made again."""
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


def tiles(N, V, *operands):
    """The grid over [N, V] and the blocks: tensor-core tiles in bfloat16, half as high for two
    products."""
    if all(x.element_size() == 2 for x in operands):
        BN, BV, BD, warps = 128, 128, 64, 8
    else:
        BN, BV, BD, warps = 64, 64, 32, 4
    BN //= len(operands)
    return (triton.cdiv(N, BN), triton.cdiv(V, BV)), dict(BN=BN, BV=BV, BD=BD, num_warps=warps)


def softmax_statistics(h, W, targets, temperature):
    """Log-sum-exp, entropy and the target's logit, from the tiles' shares.   [N] each"""
    lse, entropy, hit = h.new_zeros(3, len(h), dtype=torch.float32).unbind(0)
    for s in slices(len(h), len(W), "triton"):
        grid, blocks = tiles(len(h[s]), len(W), h)
        top, total, slope = h.new_empty(3, grid[1], len(h[s]), dtype=torch.float32).unbind(0)
        logprob_kernel[grid](h[s], W, targets[s], top, total, slope, hit[s], len(h[s]), *W.shape,
                             temperature, **blocks)
        lse[s] = torch.logsumexp(top + total.log(), 0)                                   # [n]
        share = (top - lse[s]).exp()                                                # [tiles, n]
        entropy[s] = (share * (total * (lse[s] - top) - slope)).sum(0)             # no cancellation
    return lse, entropy, hit


def logprob_gradients(h, W, targets, lse, entropy, g, gH, temperature, path):
    """Yield every chunk's slice and dz = g (onehot - p) - gH p (log p + H).

    g [N]; gH [N], or None where nothing comes through the entropy; W in h's dtype."""
    zero = torch.zeros_like(lse)
    for s, z, out in chunks(h, len(W), path):
        if path == "triton":
            grid, blocks = tiles(*z.shape, h)
            logprob_grad_kernel[grid](h[s], W, targets[s], lse[s], entropy[s], g[s],
                                      (zero if gH is None else gH)[s], z, *z.shape, h.size(1),
                                      temperature, **blocks)
            yield s, z
            continue
        p = chunk_logits(h[s], W, temperature, z, out)                                   # [n, V]
        if gH is None:
            torch.softmax(p, -1, out=p).mul_(-g[s, None])
        else:
            p -= lse[s, None]                                                            # log p
            pull = (p + entropy[s, None]).mul_(gH[s, None]).add_(g[s, None])
            p.exp_().mul_(pull).neg_()
        p.scatter_add_(1, targets[s, None], g[s, None])
        yield s, p if p.dtype == z.dtype else z.copy_(p)


def gradients_by_words(h, W, cast, targets, lse, entropy, g, gH, temperature):
    """dh [N, D], dW [V, D] as of logprob_gradients, some words and all rows at a time: no word's
    gradient is added up in parts, which cost more than they hold where there are more words than
    rows."""
    N, words = len(h), max(ROWS, CHUNK // len(h) // 4)
    z = h.new_empty(N * min(words, len(cast)))
    out = z if z.dtype == statistics(h) else z.to(statistics(h))
    dh, dW = torch.zeros_like(h, dtype=statistics(h)), torch.empty_like(W)
    for i in range(0, len(cast), words):
        w = cast[i:i + words]
        part, whole = (x[:N * len(w)].view(N, -1) for x in (z, out))
        p = chunk_logits(h, w, temperature, part, whole).sub_(lse[:, None])          # log p [N, v]
        pull = g[:, None] if gH is None else torch.addcmul(
            (g + entropy * gH)[:, None], p, gH[:, None])
        p = p.exp_().mul_(pull).neg_()
        here = ((targets >= i) & (targets < i + len(w))).nonzero().squeeze(1)
        p[here, targets[here] - i] += g[here]
        dz = p if p.dtype == h.dtype else part.copy_(p)
        torch.mm(dz.T, h, out=dW[i:i + words]) if W.dtype == h.dtype else dW[i:i + words].copy_(
            dz.T @ h)
        dh += dz @ w
    return dh.to(h.dtype), dW


class LinearLogprob(torch.autograd.Function):
    """linear_logprob's two fast paths; the backward makes the logits of each chunk again."""

    @staticmethod
    def forward(ctx, h, W, targets, temperature, want_entropy, path):
        h, cast, targets = h.contiguous(), W.to(h.dtype).contiguous(), targets.contiguous()
        if path == "triton":
            lse, entropy, hit = softmax_statistics(h, cast, targets, temperature)
            logp = hit - lse
        else:
            logp, lse, entropy = (h.new_zeros(len(h), dtype=statistics(h)) for _ in range(3))
            for s, z, out in chunks(h, len(W), path):
                z = chunk_logits(h[s], cast, temperature, z, out)                        # [n, V]
                lse[s] = z.gather(1, targets[s, None]).squeeze(1)
                torch.log_softmax(z, -1, out=z)
                logp[s] = z.gather(1, targets[s, None]).squeeze(1)
                lse[s] -= logp[s]
                if want_entropy:
                    entropy[s] = -(z.exp().mul_(z)).sum(-1)
        ctx.save_for_backward(h, W, targets, lse, entropy)
        ctx.temperature, ctx.path = temperature, path
        ctx.set_materialize_grads(False)
        return logp, entropy if want_entropy else None

    @staticmethod
    @once_differentiable
    def backward(ctx, up, up_entropy):
        h, W, targets, lse, entropy = ctx.saved_tensors
        cast = W.to(h.dtype).contiguous()
        g = torch.zeros_like(lse) if up is None else up / ctx.temperature
        gH = None if up_entropy is None else up_entropy / ctx.temperature
        if ctx.path == "cpu" and ctx.needs_input_grad[1] and len(h) < len(W):
            return *gradients_by_words(h, W, cast, targets, lse, entropy, g, gH,
                                       ctx.temperature), *4 * [None]
        dz = logprob_gradients(h, cast, targets, lse, entropy, g, gH, ctx.temperature, ctx.path)
        return *head_gradients(h, W, cast, dz, ctx.needs_input_grad[1]), *4 * [None]


def linear_logprob(h, W, targets, temperature=1.0, entropy=False):
    """log p(targets) [N] under softmax(h Wᵀ / temperature), with entropy=True also its entropy [N];
    float32.

    h [N, D], W [V, D], targets [N]; differentiable in h and W. [N, V] is never held: Triton keeps a
    tile of it at a time (its backward a chunk), a CPU a chunk. With z the logits and H the entropy,
        d logp/dz = onehot - p,   dH/dz = -p (log p + H).
    FLOPs: 2NDV forward, 6NDV backward, 2NDV of them to make the logits again. Triton's bytes:
    24·NV/128 forward; backward 6·NV (dz written once, read twice) and 12·NVD / rows of a chunk to
    add up dW. Under autocast the products run in its dtype, as for a Linear layer; the statistics
    stay float32.
    """
    if torch.is_autocast_enabled(h.device.type):
        h = h.to(torch.get_autocast_dtype(h.device.type))
    path = route(h) if len(h) else "torch"
    if path == "torch":
        return linear_logprob_ref(h, W, targets, temperature, entropy)
    logp, H = LinearLogprob.apply(h, W, targets, temperature, entropy, path)
    return (logp, H) if entropy else logp


# === divergences: 2306.13649, how far a student's distribution is from its teacher's ==============


def forward_kl(logq, logp, beta=None):
    """KL(p‖q) of teacher p and student q: covers the teacher's modes.   [n, V] twice -> [n]"""
    finite = logp.clamp(min=-1e30)                                     # 0, not 0 · inf, where p = 0
    return torch.linalg.vecdot(logp.exp(), finite - logq)


def reverse_kl(logq, logp, beta=None):
    """KL(q‖p): settles on one of the teacher's modes."""
    return torch.linalg.vecdot(logq.exp(), logq - logp)


def mixture(logq, logp, beta):
    """log m, m = β p + (1-β) q."""
    return torch.logaddexp(logp + math.log(beta), logq + math.log1p(-beta))              # [n, V]


def jsd(logq, logp, beta=0.5):
    """Jensen-Shannon, β KL(p‖m) + (1-β) KL(q‖m) (GKD, 2306.13649); near p = q, β (1-β) forward
    KLs."""
    logm = mixture(logq, logp, beta)
    return beta * forward_kl(logm, logp) + (1 - beta) * forward_kl(logm, logq)


def forward_kl_pull(logq, logp, beta):
    """q ∂D/∂q up to multiples of q, in place of logp; so are the other pulls.

    Through the softmax, dz = pull - q Σ pull in every case."""
    return logp.exp_().neg_()


def reverse_kl_pull(logq, logp, beta):
    """... = q (log q - log p)."""
    return logp.neg_().add_(logq).mul_(logq.exp())


def jsd_pull(logq, logp, beta):
    """... = (1-β) q (log q - log m)."""
    return (1 - beta) * logq.exp() * (logq - mixture(logq, logp, beta))


DIVERGENCES = dict(forward_kl=forward_kl, reverse_kl=reverse_kl, jsd=jsd)
PULLS = dict(forward_kl=forward_kl_pull, reverse_kl=reverse_kl_pull, jsd=jsd_pull)


def linear_distill_ref(h, W, teacher_h, teacher_W, divergence="forward_kl", temperature=1.0,
                       beta=0.5):
    """The divergence between softmax(h Wᵀ / τ) and the teacher's, per token.   -> [N]"""
    logq, logp = (torch.log_softmax(wide(x @ w.to(x.dtype).T) / temperature, -1)
                  for x, w in ((h, W), (teacher_h, teacher_W)))                     # [N, V] each
    return DIVERGENCES[divergence](logq, logp.detach(), beta)


# === distill_kernels: Triton, the logits of student and teacher a tile at a time ==================


@jit
def distill_tile(h, W, t, U, lse, teacher_lse, i, j, N, V, D, E, tau, beta, KIND: tl.constexpr,
                 BN: tl.constexpr, BV: tl.constexpr, BD: tl.constexpr):
    """A tile's student probabilities q, its terms of the divergence, and the pull q ∂D/∂q, [BN, BV]
    each."""
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
def distill_kernel(h, W, t, U, lse, teacher_lse, terms, pulls, N, V, D, E, tau, beta,
                   KIND: tl.constexpr, BN: tl.constexpr, BV: tl.constexpr, BD: tl.constexpr):
    """One tile's share of the divergence and of Σ pull, [tiles, N] each."""
    i, j = tl.program_id(0), tl.program_id(1)
    q, term, pull = distill_tile(h, W, t, U, lse, teacher_lse, i, j, N, V, D, E, tau, beta, KIND,
                                 BN, BV, BD)                                         # [BN, BV] each
    n = i * BN + tl.arange(0, BN)
    tl.store(terms + j.to(tl.int64) * N + n, tl.sum(term, 1), mask=n < N)
    tl.store(pulls + j.to(tl.int64) * N + n, tl.sum(pull, 1), mask=n < N)


@jit
def distill_grad_kernel(h, W, t, U, lse, teacher_lse, pulls, up, dz, N, V, D, E, tau, beta,
                        KIND: tl.constexpr, BN: tl.constexpr, BV: tl.constexpr, BD: tl.constexpr):
    """One tile of dz = up (pull - q Σ pull)."""
    i, j = tl.program_id(0), tl.program_id(1)
    q, term, pull = distill_tile(h, W, t, U, lse, teacher_lse, i, j, N, V, D, E, tau, beta, KIND,
                                 BN, BV, BD)                                         # [BN, BV] each
    n, v = i * BN + tl.arange(0, BN), j * BV + tl.arange(0, BV)
    total = tl.load(pulls + n, mask=n < N, other=0.0)[:, None]
    g = tl.load(up + n, mask=n < N, other=0.0)[:, None]
    out = g * (pull - q * total)
    tl.store(dz + n[:, None].to(tl.int64) * V + v[None], out.to(dz.dtype.element_ty),
             mask=(n < N)[:, None] & (v < V)[None])


def distill_shares(h, W, t, U, divergence, temperature, beta):
    """The host of the forward: both log-sum-exps, the divergence and Σ pull.   [N] each"""
    nothing = torch.full((len(h),), -1, device=h.device)
    lse = softmax_statistics(h, W, nothing, temperature)[0]
    teacher_lse = softmax_statistics(t, U, nothing, temperature)[0]
    grid, blocks = tiles(len(h), len(W), h, t)
    terms, pulls = (h.new_empty(grid[1], len(h), dtype=torch.float32) for _ in range(2))
    distill_kernel[grid](h, W, t, U, lse, teacher_lse, terms, pulls, len(h), len(W), h.size(1),
                         t.size(1), temperature, beta, divergence, **blocks)
    return lse, teacher_lse, terms.sum(0), pulls.sum(0)


# === linear_distill: 2306.13649, a divergence of two heads without the logits of either ===========


def distill_chunks(h, W, t, U, temperature, path):
    """Yield every chunk's slice, a buffer in h's dtype, and log q and log p, [n, V] each."""
    for (s, *student), (_, *teacher) in zip(chunks(h, len(W), path), chunks(t, len(W), path)):
        logq = torch.log_softmax(chunk_logits(h[s], W, temperature, *student), -1, out=student[1])
        logp = torch.log_softmax(chunk_logits(t[s], U, temperature, *teacher), -1, out=teacher[1])
        yield s, student[0], logq, logp


def distill_gradients(h, W, t, U, lse, teacher_lse, pulls, g, divergence, temperature, beta, path):
    """Yield every chunk's slice and dz = g (pull - q Σ pull); W in h's dtype."""
    if path == "triton":
        for s, z, _ in chunks(h, len(W), path):
            grid, blocks = tiles(*z.shape, h, t)
            distill_grad_kernel[grid](h[s], W, t[s], U, lse[s], teacher_lse[s], pulls[s], g[s], z,
                                      *z.shape, h.size(1), t.size(1), temperature, beta, divergence,
                                      **blocks)
            yield s, z
        return
    for s, z, logq, logp in distill_chunks(h, W, t, U, temperature, path):
        pull = PULLS[divergence](logq, logp, beta)                                       # [n, V]
        dz = pull.sub_(logq.exp_().mul_(pull.sum(-1, keepdim=True))).mul_(g[s, None])
        yield s, dz if dz.dtype == z.dtype else z.copy_(dz)


class LinearDistill(torch.autograd.Function):
    """linear_distill's two fast paths; the backward makes both logits of each chunk again."""

    @staticmethod
    def forward(ctx, h, W, t, U, divergence, temperature, beta, path):
        h, t, cast, U = (x.contiguous() for x in (h, t, W.to(h.dtype), U.to(t.dtype)))
        if path == "triton":
            lse, teacher_lse, out, pulls = distill_shares(h, cast, t, U, divergence, temperature,
                                                          beta)
        else:
            lse, teacher_lse, out, pulls = h.new_zeros(4, len(h), dtype=statistics(h)).unbind(0)
            for s, _, logq, logp in distill_chunks(h, cast, t, U, temperature, path):
                out[s] = DIVERGENCES[divergence](logq, logp, beta)
        ctx.save_for_backward(h, W, t, U, lse, teacher_lse, pulls)
        ctx.settings = divergence, temperature, beta, path
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, up):
        h, W, t, U, lse, teacher_lse, pulls = ctx.saved_tensors
        cast, g = W.to(h.dtype).contiguous(), up / ctx.settings[1]
        dz = distill_gradients(h, cast, t, U, lse, teacher_lse, pulls, g, *ctx.settings)
        return *head_gradients(h, W, cast, dz, ctx.needs_input_grad[1]), *6 * [None]


def linear_distill(h, W, teacher_h, teacher_W, divergence="forward_kl", temperature=1.0, beta=0.5):
    """A row of DIVERGENCES between softmax(h Wᵀ / τ) and softmax(teacher_h teacher_Wᵀ / τ): [N],
    nats.

    h [N, D], W [V, D], teacher_h [N, E], teacher_W [V, E]; beta in (0, 1): jsd's. Differentiable in
    h and W. No factor τ². [N, V] is never held (see linear_logprob). FLOPs: forward 2N(D+E)V, which
    Triton does twice (log-sum-exps first), backward 2N(D+E)V + 4NDV.   Raises ValueError if the
    vocabularies differ.
    """
    if divergence not in DIVERGENCES or not 0 < beta < 1:
        raise ValueError(f"divergence {divergence!r}, beta {beta}: choose one of "
                         f"{', '.join(DIVERGENCES)}, and a beta between 0 and 1")
    if len(W) != len(teacher_W):
        raise ValueError(f"the student's head has {len(W)} words, the teacher's {len(teacher_W)}: "
                         "cut the longer one (padding rows) to the shorter")
    if torch.is_autocast_enabled(h.device.type):
        h, teacher_h = (x.to(torch.get_autocast_dtype(h.device.type)) for x in (h, teacher_h))
    path = route(h) if len(h) else "torch"
    if path == "torch":
        return linear_distill_ref(h, W, teacher_h, teacher_W, divergence, temperature, beta)
    t, U = teacher_h.detach(), teacher_W.detach()
    return LinearDistill.apply(h, W, t, U, divergence, temperature, beta, path)


# === rms_norm_kernels: Triton, whole rows at a time, and the weight's gradient without atomics ====


@jit
def rms_norm_forward(X, W, Y, RSTD, N, D, eps, ROWS: tl.constexpr, COLS: tl.constexpr):
    """Y = X rstd W of ROWS rows, and their rstd."""
    row, col = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS), tl.arange(0, COLS)
    at, keep = row[:, None] * D + col, (row < N)[:, None] & (col < D)
    x = tl.load(X + at, keep, 0.0).to(tl.float32)                                     # [ROWS, COLS]
    w = tl.load(W + col, col < D, 0.0).to(tl.float32)
    rstd = 1 / tl.sqrt(tl.sum(x * x, 1) / D + eps)                                       # [ROWS]
    tl.store(RSTD + row, rstd, row < N)
    tl.store(Y + at, x * rstd[:, None] * w, keep)


@jit
def rms_norm_backward(G, X, W, RSTD, DX, DW, N, D, ROWS: tl.constexpr, COLS: tl.constexpr):
    """DX of every so many blocks of rows, and one row of DW: the program's share of its sum."""
    col = tl.arange(0, COLS)
    w = tl.load(W + col, col < D, 0.0).to(tl.float32)
    dw = tl.zeros((ROWS, COLS), tl.float32)
    for block in range(tl.program_id(0), tl.cdiv(N, ROWS), tl.num_programs(0)):
        row = block * ROWS + tl.arange(0, ROWS).to(tl.int64)
        at, keep = row[:, None] * D + col, (row < N)[:, None] & (col < D)
        g = tl.load(G + at, keep, 0.0).to(tl.float32)
        rstd = tl.load(RSTD + row, row < N, 0.0)[:, None]
        unit = tl.load(X + at, keep, 0.0).to(tl.float32) * rstd                # x before the weight
        dw += g * unit
        g *= w
        tl.store(DX + at, rstd * (g - unit * (tl.sum(g * unit, 1) / D)[:, None]), keep)
    tl.store(DW + tl.program_id(0) * D + col, tl.sum(dw, 0), col < D)


def norm_tile(D):
    """Rows, columns and warps of a program that holds whole rows of width D: 4,096 numbers or one
    row."""
    cols = triton.next_power_of_2(D)
    return dict(ROWS=max(1, 4096 // cols), COLS=cols, num_warps=min(16, max(8, cols // 512)))


# === rms_norm: 1910.07467, every row over its root mean square ====================================


def rms_norm_ref(x, weight, eps):
    """x / sqrt(mean(x^2) + eps) * weight.   x [..., D], weight [D] -> [..., D]; rounded once, to
    x.dtype."""
    return F.rms_norm(wide(x), weight.shape, wide(weight), eps).to(x.dtype)


class RMSNorm(torch.autograd.Function):
    """rms_norm of rows x [N, D]; keeps x and rstd [N].

    With u = x rstd and a row's mean:
        dx = rstd (g w - u mean(g w u)),   dw = sum over rows of g u.
    """

    @staticmethod
    def forward(ctx, x, weight, eps, path):
        N, D = x.shape
        if path == "cpu":
            u = wide(x)                                                                  # [N, D]
            rstd = torch.linalg.vector_norm(u, dim=1).square_().div_(D).add_(eps).rsqrt_()     # [N]
            y = (u * rstd[:, None]).mul_(weight).to(x.dtype)
        else:
            y, rstd, t = torch.empty_like(x), torch.empty(N, device=x.device), norm_tile(D)
            rms_norm_forward[triton.cdiv(N, t["ROWS"]),](x, weight, y, rstd, N, D, eps, **t)
        ctx.save_for_backward(x, weight, rstd)
        ctx.path = path
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        x, weight, rstd = ctx.saved_tensors
        N, D = x.shape
        if ctx.path == "cpu":                    # both sums are matrix-vector products with g x
            dtype, x, g, w = x.dtype, wide(x), wide(g), weight.to(rstd.dtype)
            gx = g * x                                                                   # [N, D]
            dw, mean = torch.mv(gx.T, rstd), torch.mv(gx, w).div_(D)                     # [D], [N]
            dx = torch.mul(g, rstd[:, None], out=gx).mul_(w)
            dx.addcmul_(x, (mean * rstd ** 3)[:, None], value=-1)
            return dx.to(dtype), dw.to(weight.dtype), None, None
        dx, t = torch.empty_like(x), norm_tile(D)
        programs = min(PROGRAMS, triton.cdiv(N, t["ROWS"]))
        partial = torch.empty(programs, D, device=x.device)  # no atomics: the same sum in every run
        rms_norm_backward[programs,](g.contiguous(), x, weight, rstd, dx, partial, N, D, **t)
        return dx, partial.sum(0).to(weight.dtype), None, None


def rms_norm(x, weight, eps):
    """RMSNorm (1910.07467): y = x / sqrt(mean(x^2) + eps) * weight over the last axis, fused both
    ways.

    x [..., D], weight [D] of any float dtype -> [..., D] in x.dtype; statistics in float32. Rows
    are read as they lie in memory, so norm the heads of [B, T, H, hd] before the transpose, not
    after. Bytes (s a number): 2NDs + 4N forward, 3NDs + 4N backward. Some 10 FLOPs a number: bound
    by memory.
    """
    path = fused(x)
    if path == "torch":
        return rms_norm_ref(x, weight, eps)
    rows = x.reshape(-1, x.size(-1)).contiguous()                                        # [N, D]
    return RMSNorm.apply(rows, weight.contiguous(), eps, path).view(x.shape)


# === rope: 2104.09864, pairs of a head's numbers turned by angles that grow with the position =====


def rope_ref(x, cos, sin):
    """Rotate the pairs (x_i, x_{i + hd/2}) by their angle, Hugging Face checkpoints' layout;
    rounded once."""
    a, b = wide(x).chunk(2, -1)                                                    # [B, H, T, hd/2]
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1).to(x.dtype)         # [B, H, T, hd]


@jit
def rope_kernel(X, COS, SIN, Y, H, T, half, xb, xh, xt, yb, yh, yt, angles, turn,
                ROWS: tl.constexpr, COLS: tl.constexpr):
    """ROWS rows (a position and head each) of one sequence; strides xb … yt; turn -1: back."""
    blocks = tl.cdiv(T * H, ROWS)
    b, row = tl.program_id(0) // blocks, tl.program_id(0) % blocks * ROWS + tl.arange(0, ROWS)
    col = tl.arange(0, COLS)
    # heads innermost: a projection leaves them so, and they share their angles
    b, t, h = b.to(tl.int64), (row // H).to(tl.int64), (row % H).to(tl.int64)
    keep = (row < T * H)[:, None] & (col < half)
    at = (b * angles + t * half)[:, None] + col
    cos, sin = tl.load(COS + at, keep, 0.0), tl.load(SIN + at, keep, 0.0) * turn      # [ROWS, hd/2]
    at = (b * xb + h * xh + t * xt)[:, None] + col
    x1 = tl.load(X + at, keep, 0.0).to(tl.float32)
    x2 = tl.load(X + at + half, keep, 0.0).to(tl.float32)
    at = (b * yb + h * yh + t * yt)[:, None] + col
    tl.store(Y + at, x1 * cos - x2 * sin, keep)
    tl.store(Y + at + half, x2 * cos + x1 * sin, keep)


def turned(x, cos, sin, turn, path):
    """x rotated by turn (1, or -1: back) times the angles."""
    if path == "cpu":                            # whole rows: halves would be strided, and slower
        a, b = x.chunk(2, -1)
        y = wide(torch.cat([b, a], -1)).mul_(torch.cat([-turn * sin, turn * sin], -1))
        return y.addcmul_(wide(x), torch.cat([cos, cos], -1).to(y.dtype)).to(x.dtype)
    x = x if x.stride(-1) == 1 else x.contiguous()
    (B, H, T, hd), y = x.shape, torch.empty_like(x)
    cols = triton.next_power_of_2(hd // 2)
    rows, own = max(1, 2048 // cols), cos.dim() == 4 and cos.size(0) > 1
    rope_kernel[triton.cdiv(T * H, rows) * B,](
        x, cos, sin, y, H, T, hd // 2, *x.stride()[:3], *y.stride()[:3], own * T * (hd // 2), turn,
        ROWS=rows, COLS=cols)
    return y


class RoPE(torch.autograd.Function):
    """A rotation's gradient is the rotation back."""

    @staticmethod
    def forward(ctx, x, cos, sin, path):
        ctx.save_for_backward(cos, sin)
        ctx.path = path
        return turned(x, cos, sin, 1.0, path)

    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        return turned(g, *ctx.saved_tensors, -1.0, ctx.path), None, None, None


def rope(x, cos, sin):
    """Rotary position embedding (RoFormer, 2104.09864), half-split: see rope_ref. No gradient to
    the angles.

    x [B, H, T, hd] with any strides, which the result shares; cos, sin float32 [T, hd/2] or, where
    rows stand at positions of their own, [B, 1, T, hd/2]. Bytes: 2 BHT hd s and the angles (once a
    position), 3 FLOPs a number: memory. Backward the same.
    """
    path = fused(x)
    if path == "torch":
        return rope_ref(x, cos, sin)
    return RoPE.apply(x, cos.contiguous(), sin.contiguous(), path)


# === swiglu: 2002.05202, the gate of an MLP in one pass over memory ===============================


def swiglu_ref(gate, up):
    """silu(gate) * up,   silu(z) = z / (1 + exp(-z)).   Same shapes; rounded once."""
    return (F.silu(wide(gate)) * wide(up)).to(gate.dtype)


@jit
def swiglu_forward(GATE, UP, Y, N, BLOCK: tl.constexpr):
    """y = silu(gate) up, BLOCK of the N numbers a program."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    z = tl.load(GATE + at, at < N, 0.0).to(tl.float32)
    tl.store(Y + at, z * tl.sigmoid(z) * tl.load(UP + at, at < N, 0.0).to(tl.float32), at < N)


@jit
def swiglu_backward(G, GATE, UP, DGATE, DUP, N, BLOCK: tl.constexpr):
    """d gate = g up s (1 + gate (1 - s)), d up = g gate s;  s = sigmoid(gate)."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    g = tl.load(G + at, at < N, 0.0).to(tl.float32)
    z = tl.load(GATE + at, at < N, 0.0).to(tl.float32)
    s = tl.sigmoid(z)
    tl.store(DUP + at, g * z * s, at < N)
    g *= tl.load(UP + at, at < N, 0.0).to(tl.float32)
    tl.store(DGATE + at, g * s * (1 + z * (1 - s)), at < N)


class SwiGLU(torch.autograd.Function):
    """Keeps gate and up only: silu(gate) is cheaper to compute again than to store."""

    @staticmethod
    def forward(ctx, gate, up, path):
        ctx.save_for_backward(gate, up)
        ctx.path = path
        if path == "cpu":
            return F.silu(wide(gate)).mul_(up).to(gate.dtype)
        y, n = torch.empty_like(gate), gate.numel()
        swiglu_forward[triton.cdiv(n, 1024),](gate, up, y, n, BLOCK=1024)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        gate, up = ctx.saved_tensors
        if ctx.path == "cpu":
            z, g = wide(gate), wide(g)
            dgate = torch.ops.aten.silu_backward(g * up, z).to(gate.dtype)
            return dgate, F.silu(z).mul_(g).to(up.dtype), None
        dgate, dup, n = torch.empty_like(gate), torch.empty_like(up), gate.numel()
        swiglu_backward[triton.cdiv(n, 1024),](g.contiguous(), gate, up, dgate, dup, n, BLOCK=1024)
        return dgate, dup, None


def swiglu(gate, up):
    """SwiGLU's gate (2002.05202): silu(gate) * up, any equal shapes, one pass over memory each way.

    Bytes for n numbers of s bytes: 3ns forward, 5ns backward, 2ns held between (autograd: 3ns):
    memory.
    """
    path = fused(gate)
    if path == "torch":
        return swiglu_ref(gate, up)
    return SwiGLU.apply(gate.contiguous(), up.contiguous(), path)


# === decode_kernels: 2112.05682 section 2, attention by shares of the slots, and their merge ======


@jit
def decode_attention_kernel(q, k, v, length, out, top, mass, kb, kh, ks, K, scale, HD, window,
                            G: tl.constexpr, GP: tl.constexpr, D: tl.constexpr,
                            BLOCK: tl.constexpr, SPLITS: tl.constexpr):
    """One share of the slots of one row's key head, for its group of G queries: their softmax so
    far.

    Shares are cut from the slots that the row sees, so that all SPLITS programs of a short row have
    work.
    """
    head, split = tl.program_id(0).to(tl.int64), tl.program_id(1)                   # row x key head
    g, d, s = tl.arange(0, GP), tl.arange(0, D), tl.arange(0, BLOCK)
    mine = (g < G)[:, None] & (d < HD)[None]
    n = tl.load(length + head // K).to(tl.int32)
    first = tl.maximum(n - window, 0)
    share = tl.cdiv(tl.cdiv(n - first, BLOCK), SPLITS) * BLOCK
    start = first + split * share
    end = tl.minimum(n, start + share)
    query = tl.load(q + (head * G + g[:, None]) * HD + d[None], mask=mine, other=0.0)    # [GP, D]
    base = head // K * kb + head % K * kh
    m = tl.full([GP], -1e30, tl.float32)                                             # not inf - inf
    total, acc = tl.zeros([GP], tl.float32), tl.zeros([GP, D], tl.float32)
    for i in range(start, end, BLOCK):
        at = base + (i + s)[:, None].to(tl.int64) * ks + d[None]
        here = (i + s < end)[:, None] & (d < HD)[None]
        key = tl.load(k + at, mask=here, other=0.0)                                     # [BLOCK, D]
        value = tl.load(v + at, mask=here, other=0.0)
        z = tl.dot(query, tl.trans(key), input_precision="ieee") * scale       # [GP, BLOCK], base 2
        z = tl.where((i + s < end)[None], z, float("-inf"))
        new = tl.maximum(m, tl.max(z, 1))
        p, shrink = tl.exp2(z - new[:, None]), tl.exp2(m - new)
        total = total * shrink + tl.sum(p, 1)
        acc = acc * shrink[:, None] + tl.dot(p.to(value.dtype), value, input_precision="ieee")
        m = new
    at = (head * SPLITS + split) * G + g
    if SPLITS == 1:
        acc = acc / total[:, None]
    else:
        tl.store(top + at, m, mask=g < G)
        tl.store(mass + at, total, mask=g < G)
    tl.store(out + at[:, None] * HD + d[None], acc, mask=mine)


@jit
def decode_merge_kernel(part, top, mass, out, HD, G: tl.constexpr, D: tl.constexpr,
                        SPLITS: tl.constexpr):
    """out = sum_s 2^(m_s - m) acc_s / sum_s 2^(m_s - m) total_s:  the splits of one query head."""
    query = tl.program_id(0).to(tl.int64)
    d = tl.arange(0, D)
    at = (query // G * SPLITS + tl.arange(0, SPLITS)) * G + query % G                    # [SPLITS]
    m = tl.load(top + at)
    weight = tl.exp2(m - tl.max(m, 0))                                              # empty share: 0
    acc = tl.load(part + at[:, None] * HD + d[None], mask=(d < HD)[None], other=0.0)   # [SPLITS, D]
    total = tl.sum(weight * tl.load(mass + at), 0)
    tl.store(out + query * HD + d, tl.sum(weight[:, None] * acc, 0) / total, mask=d < HD)


# === decode_attention: 2112.05682, one new token against a cache, whose bytes are the cost ========


def slots_seen(slots, length, window):
    """Which slots each row sees: its first length[b], of them the last `window` (0: all).
    [B, 1, 1, S]"""
    at, end = torch.arange(slots, device=length.device), length[:, None, None, None]
    return (at < end) & (at >= end - window) if window else at < end


def decode_attention_ref(q, k, v, length, window=0):
    """softmax(q kᵀ / sqrt(hd)) v over row b's first length[b] slots, or the last `window` of them.
    q [B, H, hd], k, v [B, K, S, hd]."""
    (B, H, hd), (K, S) = q.shape, k.shape[1:3]
    scores = wide(q).reshape(B, K, H // K, hd) @ wide(k).mT / hd ** 0.5               # [B, K, G, S]
    seen = slots_seen(S, length, window)                                              # [B, 1, 1, S]
    weights = scores.masked_fill(~seen, -torch.inf).softmax(-1)
    return (weights @ wide(v)).reshape(q.shape).to(q.dtype)


def decode_attention_cpu(q, k, v, length, window=0):
    """Two batched products over the slots that some row sees: a mask only where lengths differ."""
    (B, H, hd), K, (low, S) = q.shape, k.size(1), (int(n) for n in length.aminmax())
    first = max(low - window, 0) if window else 0                    # slots that no row sees go
    seen = None if low == S else slots_seen(S - first, length - first, window)
    return over_slots(q, k[:, :, first:S], v[:, :, first:S], seen)


def over_slots(q, k, v, seen=None):
    """softmax(q kᵀ / sqrt(hd)) v over the slots of k, v that are seen [B, 1, 1, S], or all."""
    (B, H, hd), K = q.shape, k.size(1)
    q = q.reshape(B, K, H // K, hd)
    if q.element_size() == 2:            # scores must not be rounded, nor overflow float16
        return F.scaled_dot_product_attention(q, k, v, seen).reshape(B, H, hd)
    scores = (q * hd ** -0.5) @ k.mT                                                  # [B, K, G, S]
    if seen is not None:
        scores.masked_fill_(~seen, -torch.inf)
    return (scores.softmax(-1) @ v).reshape(B, H, hd)


def decode_attention_triton(q, k, v, length, window=0):
    """The slots of each row's key head split until PROGRAMS programs run, then merged."""
    (B, H, hd), (K, S) = q.shape, k.shape[1:3]
    q, out = q.contiguous(), torch.empty_like(q, memory_format=torch.contiguous_format)
    if k.stride() != v.stride() or k.stride(3) != 1:
        k, v = k.contiguous(), v.contiguous()
    G, D = H // K, max(16, triton.next_power_of_2(hd))
    most = (8192 if G > 16 else 16384) // (D * q.element_size())                  # slots of a tile
    BLOCK = max(16, min(64, most))
    splits = triton.next_power_of_2(min(triton.cdiv(PROGRAMS, B * K),
                                        triton.cdiv(min(S, window or S), BLOCK)))
    part = out if splits == 1 else q.new_empty(B * K * splits * G, hd, dtype=torch.float32)
    top, mass = torch.empty(2, B * K * splits * G, device=q.device).unbind(0)
    decode_attention_kernel[(B * K, splits)](
        q, k, v, length.contiguous(), part, top, mass, *k.stride()[:3], K,
        math.log2(math.e) / hd ** 0.5, hd, window or 1 << 30,
        G=G, GP=max(16, triton.next_power_of_2(G)), D=D, BLOCK=BLOCK, SPLITS=splits, num_warps=4)
    if splits > 1:
        decode_merge_kernel[(B * H,)](part, top, mass, out, hd, G=G, D=D, SPLITS=splits,
                                      num_warps=4)
    return out


@torch.no_grad()
def decode_attention(q, k, v, length, window=0):
    """One new token's attention to a cache: decode_attention_ref. Not differentiable.

    q [B, H, hd] -> [B, H, hd]; k, v [B, K, S, hd] views of a cache, finite beyond length, too;
    length [B] of valid slots, at least 1, is read on the device: no wait; window: only the last so
    many of them are seen (0: all).   G = H / K queries share a key head. Bytes: 2 K hd sum(length)
    itemsize;  FLOPs: 4 H hd sum(length), G a byte in bfloat16: memory is the floor.
    """
    path = route(q)
    if len(q) == 0:
        return torch.empty_like(q, memory_format=torch.contiguous_format)
    if path == "triton":
        return decode_attention_triton(q, k, v, length, window)
    with torch.autocast(q.device.type, enabled=False):
        attention = decode_attention_cpu if path == "cpu" else decode_attention_ref
        return attention(q, k, v, length, window)


# === xxt: a symmetric product, one triangle of it computed and mirrored ===========================


def xxt_ref(X, alpha=1.0, C=None, beta=0.0):
    """alpha X Xᵀ + beta C.   X [L, m, n], C [L, m, m] or None -> [L, m, m]."""
    return alpha * (X @ X.mT) if C is None else torch.baddbmm(C, X, X.mT, beta=beta, alpha=alpha)


@jit
def xxt_kernel(X, C, Y, m, n, alpha, beta, BLOCK: tl.constexpr, DEPTH: tl.constexpr):
    """Tile (i, j), j <= i, of one matrix, written to its place and, mirrored, to (j, i)."""
    i, j, batch = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    if j > i:                                    # tile (j, i) writes this one, too
        return
    row, col = i * BLOCK + tl.arange(0, BLOCK), j * BLOCK + tl.arange(0, BLOCK)
    k = tl.arange(0, DEPTH)
    left, right = X + batch * m * n + row[:, None] * n + k, X + batch * m * n + col[:, None] * n + k
    acc = tl.zeros((BLOCK, BLOCK), tl.float32)
    for start in range(0, n, DEPTH):
        inside = (k < n - start)[None, :]
        a = tl.load(left + start, (row < m)[:, None] & inside, 0.0)                 # [BLOCK, DEPTH]
        b = tl.load(right + start, (col < m)[:, None] & inside, 0.0)
        acc = tl.dot(a, tl.trans(b), acc, input_precision="ieee")
    # a tile on the diagonal is mirrored into itself
    keep = (row < m)[:, None] & (row[:, None] >= col)
    Y, lower, upper = Y + batch * m * m, row[:, None] * m + col, row[:, None] + col * m
    acc *= alpha
    if C is not None:
        acc += beta * tl.load(C + batch * m * m + lower, keep, 0.0).to(tl.float32)
    tl.store(Y + lower, acc, keep)
    tl.store(Y + upper, acc, keep)


@torch.no_grad()
def xxt(X, alpha=1.0, C=None, beta=0.0):
    """alpha X Xᵀ + beta C: one triangle computed, the other its mirror image. No gradient.

    X [L, m, n], C symmetric [L, m, m] or None -> [L, m, m] in X.dtype, accumulated in float32.
    FLOPs: L m²n, a half of the plain product's.   Bytes: L (mn + m²) s, and L m² s for C. On an
    H100 in bfloat16 bound by arithmetic from m = n of some 1,200 on.
    """
    path, (L, m, n) = route(X), X.shape
    if path == "torch" or not L * m or path == "cpu" and (m < 512 or m * n < 1 << 20):
        return xxt_ref(X, alpha, C, beta)        # on a CPU small triangles gain nothing
    Y = X.new_empty(L, m, m)
    if path == "cpu":                            # four rows of blocks
        for start in range(0, m, -(-m // 4)):
            end = start - (-m // 4)
            low = torch.bmm(X[:, start:end], X[:, :end].mT).mul_(alpha)              # [L, m/4, end]
            if C is not None:
                low.add_(C[:, start:end, :end], alpha=beta)
            Y[:, start:end, :end], Y[:, :start, start:end] = low, low[:, :, :start].mT
        return Y
    shape = dict(BLOCK=64, DEPTH=32, num_warps=4)
    if X.dtype.itemsize == 2:
        shape = dict(BLOCK=128, DEPTH=64, num_warps=8)
    side = triton.cdiv(m, shape["BLOCK"])
    C = C if C is None else C.contiguous()
    xxt_kernel[side, side, L](X.contiguous(), C, Y, m, n, alpha, beta, **shape)
    return Y


# === newton_schulz: 2502.16982, every singular value sent to about 1 by products alone ============


def newton_schulz_ref(X, steps=5, coefficients=(3.4445, -4.7750, 2.0315)):
    """Muon's orthogonalisation (Jordan et al., 2024; 2502.16982) of X [..., m, n], in the dtype it
    comes in.

    X / |X|_F, then `steps` times  A = X Xᵀ,  X <- a X + (b A + c A²) X:  the polynomial
    a s + b s³ + c s⁵ of every singular value s; all of [0.01, 1] end in [0.68, 1.14], singular
    vectors stay. The short side first.
    """
    a, b, c = coefficients
    Y = X / (torch.linalg.matrix_norm(X, keepdim=True) + 1e-7)
    Y = Y.mT if X.size(-2) > X.size(-1) else Y
    for _ in range(steps):
        A = Y @ Y.mT
        Y = a * Y + (b * A + c * A @ A) @ Y
    return Y.mT if X.size(-2) > X.size(-1) else Y


@torch.no_grad()
def newton_schulz(X, steps=5, coefficients=(3.4445, -4.7750, 2.0315)):
    """newton_schulz_ref for a whole batch X [..., m, n] of equal shapes, in X.dtype. No gradient.

    Computes in bfloat16 on CUDA, in float32 on a CPU (float64 if X is). A and b A + c A² are
    symmetric: xxt. FLOPs per step and matrix, m <= n:  3m²n + m³ instead of 4m²n + 2m³.
    """
    if route(X) == "torch" or not X.numel():
        return newton_schulz_ref(X, steps, coefficients)
    a, b, c = coefficients
    tall, Y = X.size(-2) > X.size(-1), wide(X).reshape(-1, *X.shape[-2:])                # [L, m, n]
    Y = Y / (torch.linalg.matrix_norm(Y, keepdim=True) + 1e-7)
    Y = (Y.mT if tall else Y).to(torch.bfloat16 if X.is_cuda else Y.dtype).contiguous()
    for _ in range(steps):
        A = xxt(Y)                                                                       # [L, m, m]
        Y = torch.baddbmm(Y, xxt(A, c, A, b), Y, beta=a)
    return (Y.mT if tall else Y).to(X.dtype).reshape(X.shape)


# === bit_streams: codes of any width, one after the other in bytes ================================


def pack_bits(codes, bits):
    """Codes [..., n] below 2^bits <= 2^16 -> little-endian bit stream, uint8 [..., ceil(n bits/8)].

    ValueError for a code that does not fit."""
    if codes.numel() and (codes.min() < 0 or codes.max() >= 1 << bits):
        raise ValueError(f"codes from {codes.min()} to {codes.max()} do not fit in {bits} bits")
    place = torch.arange(16, device=codes.device)
    flat = codes.to(torch.int16)[..., None] >> place[:bits].to(torch.int16) & 1    # [..., n, bits]
    flat = flat.to(torch.uint8).flatten(-2)                                        # [..., n bits]
    flat = F.pad(flat, (0, -flat.size(-1) % 8)).unflatten(-1, (-1, 8))             # [..., bytes, 8]
    return (flat << place[:8].to(torch.uint8)).sum(-1, dtype=torch.uint8)


def unpack_bits(stream, bits, count):
    """The first `count` codes of a stream of pack_bits, int32 [..., count]."""
    if 8 % bits == 0:                                # a byte holds whole codes: stay in uint8
        place = torch.arange(0, 8, bits, device=stream.device, dtype=torch.uint8)
        return (stream[..., None] >> place & (1 << bits) - 1).flatten(-2)[..., :count].int()
    at = torch.arange(count, device=stream.device) * bits
    padded = F.pad(stream, (0, 2)).int()  # 16 bits after a shift of up to 7 lie in three bytes
    three = sum(padded[..., at // 8 + i] << 8 * i for i in range(3))
    return three >> at.int() % 8 & (1 << bits) - 1


def ragged(widths):
    """Of every bit of a row: its column, and its place in the column's code."""
    column = torch.arange(len(widths), device=widths.device).repeat_interleave(widths.long())
    first = widths.long().cumsum(0) - widths.long()
    return column, (torch.arange(len(column), device=widths.device) - first[column]).int()


def pack_ragged(codes, widths):
    """Codes [rows, n], column j of widths[j] bits -> a bit stream a row, uint8 [rows, ceil(Σ widths
    / 8)]."""
    column, place = ragged(widths)
    return pack_bits(codes[:, column] >> place & 1, 1)


def unpack_ragged(stream, widths):
    """The codes of pack_ragged, int32 [rows, n]; 0 for a column of no bits."""
    column, place = ragged(widths)
    bits = unpack_bits(stream, 1, len(column)) << place                           # [rows, Σ widths]
    return bits.new_zeros(len(stream), len(widths)).index_add_(1, column, bits)


def to_half(x, name):
    """x in float16, refusing what would become infinite."""
    if not x.half().isfinite().all():
        raise ValueError(f"{name} exceeds float16 (65504): scale the layer down before it is "
                         "packed")
    return x.half()


# === rotations: block-diagonal Hadamard matrices, which spread what is large over its neighbours ==


@lru_cache(32)
def hadamard(n, dtype=torch.float32, device="cpu"):
    """Sylvester's Hadamard matrix over √n [n, n]: orthonormal and symmetric. n a power of two."""
    if n < 1 or n & (n - 1):
        raise UserError(f"a Hadamard matrix of {n} rows: take a power of two")
    H = torch.ones(1, 1, dtype=torch.float64)
    while len(H) < n:
        H = torch.cat([torch.cat([H, H], 1), torch.cat([H, -H], 1)])
    return (H / math.sqrt(n)).to(device, dtype)


def rotate(x, n):
    """x [..., d] times a block-diagonal Hadamard matrix, its blocks the largest power of two up to
    n that divides d. Its own inverse; two operands rotated alike have the same product."""
    d = x.size(-1)
    block = min(d & -d, 1 << (n.bit_length() - 1))
    return (x.unflatten(-1, (-1, block)) @ hadamard(block, x.dtype, x.device)).flatten(-2)


# === roundings: int8, fp8, fp6 and activations, x -> x rounded, exactly as the format would =======


def floor_log2(x):
    """floor(log2 |x|) of float32 or float64, exactly, from their bits; at most -127 for 0 and
    subnormals."""
    if x.dtype == torch.float64:
        return ((x.view(torch.int64) >> 52 & 2047) - 1023).int()
    return (x.view(torch.int32) >> 23 & 255) - 127


def power_of_two(e, dtype=torch.float32):
    """2^e, exactly, e whole within float32's -126 to 127: what floor_log2 says of 0 becomes
    2^-126."""
    return (e.int().clamp(-126, 127) + 127 << 23).view(torch.float32).to(dtype)


def minifloat(x, mantissa, low, top):
    """x rounded to floats of `mantissa` bits, exponents from `low` (subnormals below), largest
    value `top`, to the nearest, ties to even."""
    step = power_of_two(floor_log2(x).clamp(min=low) - mantissa, x.dtype)
    return ((x / step).round() * step).clamp(-top, top)


def scaled(x, top):
    """(x/s, s), s = max|x| / top of the whole tensor; s = 1 for zeros."""
    s = x.abs().amax() / top
    s = torch.where(s > 0, s, torch.ones_like(s))
    return x / s, s


def int8(x):
    """INT8, one scale a tensor:  s = max|x|/127."""
    y, s = scaled(x, 127)
    return y.round() * s


def fp8(x):
    """FP8 E4M3, one scale a tensor:  s = max|x|/448."""
    y, s = scaled(x, 448)
    return minifloat(y, 3, -6, 448) * s


def fp6(x):
    """FP6 E3M2, one scale a tensor:  s = max|x|/28."""
    y, s = scaled(x, 28)
    return minifloat(y, 2, -2, 28) * s


def float32(x):
    """Not rounded."""
    return x


ROUNDINGS = dict(float32=float32, int8=int8, fp8=fp8, fp6=fp6)


def quantize_activations(x, bits, block=0):
    """x [..., n] rounded to `bits` (2 or more) symmetrically, a scale a token and block of channels
    (0: all).

    s = max|x| / (2^(bits-1) - 1). bits: a number, or a tensor [blocks] of each block's own.
    """
    block = block or x.size(-1)
    if x.size(-1) % block:
        raise UserError(f"blocks of {block} channels do not divide {x.size(-1)}")
    y = wide(x).unflatten(-1, (-1, block))                                   # [..., n/block, block]
    if torch.is_tensor(bits):
        bits = bits.to(y)[:, None]                                                     # [blocks, 1]
    top = 2 ** (bits - 1) - 1
    s = y.abs().amax(-1, keepdim=True) / top
    s = torch.where(s > 0, s, torch.ones_like(s))
    return ((y / s).round() * s).flatten(-2).to(x.dtype)


# === mx_scales: E2M1 values, and the power of two that scales 32 of them ==========================

E2M1 = 0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0    # thresholds .25 .75 1.25 1.75 2.5 3.5 5
QUEST = 2.92247856 / 6               # QuEST's clipping point of a Gaussian, over the largest value


def e2m1(x, noise=None):
    """x rounded to E2M1's values up to 6, as minifloat does (and faster); with noise, uniform in
    [0, 1), up or down so that the mean is x."""
    size = x.abs()
    step = torch.where(size < 2, 0.5, torch.where(size < 4, 1.0, 2.0)).to(x.dtype)
    y = x / step
    return ((y.round() if noise is None else (y + noise).floor()) * step).clamp(-6, 6)


def absmax(x):
    """floor(log2 max|x|) - 2, the OCP standard's: what is above 6 of the scale (up to 8) clips."""
    return floor_log2(x.abs().amax(-1)) - 2


def covering(x):
    """The smallest exponent at which nothing clips."""
    top = x.abs().amax(-1)
    return absmax(x) + (top > 6 * power_of_two(absmax(x), x.dtype)).int()


def quest(x):
    """QuEST's (Quartet, 2505.14669):  log2(.48708 σ), rounded to the nearest; σ a group's root mean
    square.

    ours: both. A single large channel, the first of its 32, is a constant once rotated: without
    deviation."""
    return floor_log2(math.sqrt(2) * (QUEST * x.square().mean(-1).sqrt() + 1e-8))


def quest_floor(x):
    """... of the deviation and rounded down, as Quartet's released kernel does: twice the error at
    some σ."""
    return floor_log2(QUEST * x.std(-1, correction=0) + 1e-8)


EXPONENTS = dict(absmax=absmax, covering=covering, quest=quest, quest_floor=quest_floor)


# === mxfp4: OCP's 4-bit floats, E2M1 with a power of two for every 32 neighbours ==================

MX_GROUP = 32


def grouped(x):
    """x [..., n] -> [..., n/32, 32]; UserError if 32 does not divide n."""
    if x.size(-1) % MX_GROUP:
        raise UserError(f"MXFP4 has groups of {MX_GROUP}: {x.size(-1)} inputs are no multiple of "
                        "it")
    return wide(x).unflatten(-1, (-1, MX_GROUP))


def mx4(x, rule="absmax"):
    """MXFP4's codes uint8 [..., n] (bit 3 the sign, bits 0-2 the index in E2M1) and exponents int8
    [..., n/32]: 4.25 bits a value. rule: a row of EXPONENTS."""
    y = grouped(x)
    exponent = EXPONENTS[rule](y).clamp(-126, 127)                                     # [..., n/32]
    y = e2m1(y / power_of_two(exponent, y.dtype)[..., None])
    values = torch.tensor(E2M1, dtype=y.dtype, device=y.device)
    index = torch.bucketize(y.abs().contiguous(), values)
    return (index + 8 * (y < 0)).to(torch.uint8).flatten(-2), exponent.to(torch.int8)


def mx4_dense(codes, exponent, dtype=torch.float32):
    """mx4's inverse: the values [..., n]."""
    values = torch.tensor(E2M1 + tuple(-v for v in E2M1), dtype=dtype, device=codes.device)
    y = values[codes.long()].unflatten(-1, (-1, MX_GROUP))                       # [..., n/32, 32]
    return (y * power_of_two(exponent, dtype)[..., None]).flatten(-2)


def mxfp4(x, rule="absmax"):
    """x rounded to MXFP4 along its last dimension, filled up with zeros to whole groups."""
    y = grouped(F.pad(x, (0, -x.size(-1) % MX_GROUP)))
    s = power_of_two(EXPONENTS[rule](y), y.dtype)[..., None]
    return (e2m1(y / s) * s).flatten(-2)[..., :x.size(-1)]


ROUNDINGS["mxfp4"] = mxfp4


# === packed_products: a few rows times a weight that is read as it is stored ======================


@jit
def load_code(stream, at, keep, BITS: tl.constexpr):
    """The code that starts at bit `at` of a stream: from two bytes, three where it can straddle
    them."""
    stream, shift = stream + (at >> 3), at & 7
    word = tl.load(stream, mask=keep, other=0).to(tl.int32)
    if 8 % BITS != 0:
        word |= tl.load(stream + 1, mask=keep & (shift + BITS > 8), other=0).to(tl.int32) << 8
    if BITS - (BITS & -BITS) > 8:
        word |= tl.load(stream + 2, mask=keep & (shift + BITS > 16), other=0).to(tl.int32) << 16
    return word >> shift & (1 << BITS) - 1


@jit
def plane_dot(acc, x, w, j, rows, u, M, wide):
    """acc [BM, BN] + x_j w_jᵀ over the columns that are j-th of their unit: x [P, M, wide], w [BN,
    BU]."""
    xj = tl.load(x + (j * M + rows) * wide + u, mask=rows < M, other=0.0)                # [BM, BU]
    return tl.dot(xj, tl.trans(w.to(xj.dtype)), acc, input_precision="ieee")


@jit
def weight_tile(U, BM: tl.constexpr, BN: tl.constexpr, BU: tl.constexpr):
    """This program's rows [BM, 1] of x and [BN, 1] of the weight, zeros to add to, padded number of
    units."""
    rows = tl.program_id(0) * BM + tl.arange(0, BM)[:, None]
    cols = tl.program_id(1).to(tl.int64) * BN + tl.arange(0, BN)[:, None]
    return rows, cols, tl.zeros((BM, BN), tl.float32), tl.cdiv(U, BU) * BU


@jit
def store_tile(y, acc, rows, cols, M, N):
    """Partial sums of split program_id(2) into y [splits, M, N]."""
    cols = tl.trans(cols)                                                                # [1, BN]
    tl.store(y + (tl.program_id(2) * M + rows) * N + cols, acc, mask=(rows < M) & (cols < N))


def skinny(kernel, x, out, unit, *weight, most=64, **constants):
    """x [M, in] times a packed weight [out, in], float32 [M, out], by the kernel of its format.

    A unit is P neighbouring columns that share stored bits, so x is regrouped once to [P, M, units]
    and every stored byte is read once. most: units that a tile may span, at least 16.
    Bytes: the packed weight + 2M(in + out).   FLOPs: 2 M in out. With one row on an H100 the
    weight's bytes are the floor: 2.6 us for 4096 x 4096 at 4 bits, where bfloat16 takes 10 us.
    """
    M, U = len(x), -(-x.size(1) // unit)
    BM, BN, BU = (64, 64, 32) if M > 16 and unit <= 8 else (16, 32, 32 if unit > 4 else 64)
    if x.dtype == torch.float32:  # no tensor cores: as much as the registers hold
        BM, BN, BU = 16, 32, 16
    largest = 1 << max(1, most).bit_length() - 1       # an int tile within a group: one scale a row
    BU = max(16, min(BU, largest))
    padded = triton.cdiv(U, BU) * BU
    planes = F.pad(x, (0, padded * unit - x.size(1))).view(M, padded, unit)
    planes = planes.permute(2, 0, 1).contiguous()                                   # [P, M, padded]
    grid = triton.cdiv(M, BM), triton.cdiv(out, BN)
    split = max(1, min(PROGRAMS // (grid[0] * grid[1]), U // (4 * BU)))
    y = torch.empty(split, M, out, device=x.device)
    kernel[(*grid, split)](planes, y, *weight, M=M, N=out, U=U, P=unit, BM=BM, BN=BN, BU=BU,
                           **constants)
    return y.sum(0)


# === packed: what a packed layer stores, and its product ==========================================

# kind: (buffers(in, out, **options) -> {name: (shape, dtype)}, raising ValueError for options that
# make no layer; dense(layer) -> W [out, in] float32). `in` is padded to whole pack units (8 codes
# of 3 bits, 8 columns of 2:4, d of vq), and the padding counted.
FORMATS = {}
PRODUCTS = {}            # kind: product(layer, x [M, in]) -> [M, out], where there is a kernel
SKINNY = 128             # rows up to which reading the weight is the cost; above, the matmul is


class PackedProduct(torch.autograd.Function):
    """x Ŵᵀ with Ŵ frozen: dx = g Ŵ, with Ŵ unpacked again in the backward instead of kept."""

    @staticmethod
    def forward(ctx, x, layer):
        ctx.layer, rows = layer, x.reshape(-1, layer.in_features)                        # [M, in]
        if route(x) == "triton" and layer.kind in PRODUCTS and 0 < len(rows) <= SKINNY:
            y = PRODUCTS[layer.kind](layer, rows).to(x.dtype)                            # [M, out]
            return y.view(*x.shape[:-1], layer.out_features)
        return F.linear(x, layer.stored().to(x.dtype))

    @staticmethod
    def backward(ctx, g):
        return g @ ctx.layer.stored().to(g.dtype), None


def order_dtype(inputs):
    """The smallest that counts so many inputs."""
    return torch.int16 if inputs <= 32767 else torch.int32


def check_inputs(inputs, rotate, act):
    """ValueError for what a PackedLinear cannot do with its inputs first."""
    bad_turn = rotate and (rotate & (rotate - 1) or inputs % rotate)
    bad_rounding = act and (len(act) != 3 or act[0] < 2 or act[1] and inputs % act[1])
    if bad_turn or bad_rounding:
        raise ValueError(f"rotate {rotate} must be a power of two that divides {inputs} inputs, "
                         f"and act {list(act)} three numbers: at least 2 bits, a block that "
                         "divides them")


def packed(shape, bias, spec, state):
    """PackedLinear of weight `shape`, its buffers those of `state`."""
    with torch.device("meta"):
        layer = PackedLinear(shape[1], shape[0], bias is not None, **spec)
    if bias is not None:
        state = state | dict(bias=bias.detach().clone())
    layer.load_state_dict(state, assign=True)
    return layer


# === packed_layer: the linear layer of a compressed checkpoint ====================================


class PackedLinear(nn.Module):
    """y = x Ŵᵀ + bias, the weight packed in buffers as a row of FORMATS says. Ŵ is frozen, x has
    gradients.

    Up to SKINNY rows on CUDA the kernel of the format reads the packed weight alone; more rows are
    bound by compute, so there, and on a CPU, Ŵ is unpacked into a scratch and the dense matmul is
    called. Three options work on x first:  order, a buffer of 2 in bytes: x[..., order];  rotate: a
    Hadamard matrix on every so many inputs;  act = (bits, block, wide): x rounded to so many bits a
    token and block of inputs (0: all), to 8 the blocks whose bit is set in `wide`. This rounding is
    simulated: the product itself is of floats.
    """

    def __init__(self, in_features, out_features, bias=False, *, kind, order=False, rotate=0,
                 act=(), **options):
        super().__init__()
        if kind not in FORMATS:
            raise ValueError(f"packed kind {kind!r} is unknown; choose from {', '.join(FORMATS)}")
        check_inputs(in_features, rotate, act)
        self.in_features, self.out_features = in_features, out_features
        self.kind, self.rotate, self.act = kind, rotate, tuple(act)
        of_inputs = dict(order=order, rotate=rotate, act=list(act))
        self.options = options | {k: v for k, v in of_inputs.items() if v}
        first = torch.arange(in_features, dtype=order_dtype(in_features)) if order else None
        self.register_buffer("order", first)
        for name, (shape, dtype) in FORMATS[kind][0](in_features, out_features, **options).items():
            self.register_buffer(name, torch.zeros(shape, dtype=dtype))
        for name, value in options.items():
            setattr(self, name, value)
        self.register_parameter("bias", nn.Parameter(torch.zeros(out_features)) if bias else None)

    def spec(self):
        """What rebuilds the empty layer, as JSON: PackedLinear(in, out, bias, **spec)."""
        return dict(kind=self.kind, **self.options)

    def nbytes(self):
        """Bytes of the packed weight: every buffer, without the bias."""
        return sum(b.numel() * b.element_size() for b in self.buffers())

    def stored(self):
        """The weight [out, in] in float32 as the buffers hold it, of inputs ordered and rotated."""
        return FORMATS[self.kind][1](self)

    def dequantize(self):
        """Ŵ [out, in] in float32 of the inputs as they come: the definition."""
        W = rotate(self.stored(), self.rotate) if self.rotate else self.stored()
        return W if self.order is None else torch.empty_like(W).index_copy_(1, self.order.long(), W)

    def before(self, x):
        """Inputs ordered, rotated and rounded, with the gradient of the rounding left out."""
        x = x if self.order is None else x[..., self.order.long()]
        x = rotate(x, self.rotate) if self.rotate else x
        if not self.act:
            return x
        bits, block, wide = self.act
        if wide:
            blocks = self.in_features // (block or self.in_features)
            bits = [8 if wide >> b & 1 else bits for b in range(blocks)]
            bits = torch.tensor(bits, device=x.device)
        return x + (quantize_activations(x, bits, block) - x).detach()

    def forward(self, x):
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        y = PackedProduct.apply(self.before(x), self)
        return y if self.bias is None else y + self.bias.to(y.dtype)

    def _apply(self, fn, recurse=True):
        """.to(dtype), .float() and their like recast the bias alone: a buffer's dtype is its
        format."""
        held = {k: b for k, b in self._buffers.items() if b is not None}
        super()._apply(fn, recurse)
        self._buffers |= {k: held[k].to(self._buffers[k].device) for k in held
                          if self._buffers[k].dtype != held[k].dtype}
        return self


# === int_codes: whole numbers of 2, 3, 4 or 8 bits, rounded to nearest in groups ==================

INT_UNIT = {2: 4, 3: 8, 4: 2, 8: 1}                  # bits: codes that fill whole bytes


def quantize(W, bits, group, symmetric=False):
    """Round to nearest: W [out, in] -> codes [out, in], scale, zero [out, groups]; symmetric: zero
    is None.

    W ≈ (codes - zero) scale;  scale = (max(w, 0) - min(w, 0)) / (2^b - 1),  zero = round(-min(w, 0)
    / scale); symmetric: scale = max|w| / (2^(b-1) - 1), zero = 2^(b-1), lowest code unused. Scales
    are float16's. group -1: the row."""
    size = W.size(1) if group < 0 else group
    w = F.pad(W.float(), (0, -W.size(1) % size)).unflatten(1, (-1, size))         # [out, groups, g]
    lo, hi, top = w.amin(-1, True).clamp(max=0), w.amax(-1, True).clamp(min=0), 2 ** bits - 1
    if symmetric:
        lo, hi, top = -torch.maximum(-lo, hi), torch.maximum(-lo, hi), 2 ** bits - 2
    scale = torch.where(hi == lo, 2.0, hi - lo) / top
    scale = to_half(scale, "a scale").float().clamp(min=2 ** -24)                 # [out, groups, 1]
    if symmetric:
        zero = torch.full_like(scale, 2 ** (bits - 1))
    else:
        zero = (-lo / scale).round().clamp(0, 2 ** bits - 1)
    codes = ((w / scale).round() + zero).clamp(1 if symmetric else 0, 2 ** bits - 1).int()
    codes, zero = codes.flatten(1)[:, :W.size(1)], None if symmetric else zero.squeeze(-1).int()
    return codes, scale.squeeze(-1), zero


def int_buffers(inputs, out, *, bits, group, symmetric):
    """b-bit codes, a float16 scale and a b-bit zero a group:  out (in b/8 + 2 in/g + in/g b/8)
    bytes."""
    if bits not in INT_UNIT or group < 1 or group < inputs and group % INT_UNIT[bits]:
        raise ValueError(f"int needs bits of 2, 3, 4 or 8 and groups of whole pack units "
                         f"({INT_UNIT.get(bits, 8)} columns), not bits {bits!r}, group {group}")
    groups, unit = -(-inputs // group), INT_UNIT[bits]
    buffers = dict(codes=((out, -(-inputs // unit) * unit * bits // 8), torch.uint8),
                   scale=((out, groups), torch.float16))
    if not symmetric:
        buffers["zero"] = (out, -(-groups * bits // 8)), torch.uint8
    return buffers


def int_dense(m):
    """(codes - zero) scale."""
    codes = unpack_bits(m.codes, m.bits, m.in_features).float()                          # [out, in]
    scale = m.scale.float().repeat_interleave(m.group, 1)[:, :m.in_features]
    if m.symmetric:
        return (codes - 2 ** (m.bits - 1)) * scale
    zero = unpack_bits(m.zero, m.bits, m.scale.size(1)).float()                      # [out, groups]
    return (codes - zero.repeat_interleave(m.group, 1)[:, :m.in_features]) * scale


# === int: the product of those codes, a scale a group applied on the way ==========================


@jit
def int_kernel(x, y, codes, scale, zero, M, N, U, groups, zero_bytes, P: tl.constexpr,
               BITS: tl.constexpr, GROUP: tl.constexpr, SYMMETRIC: tl.constexpr,
               BM: tl.constexpr, BN: tl.constexpr, BU: tl.constexpr):
    """x times codes of a unit (P codes of BITS bits: one to three bytes), a tile of units at a
    time."""
    rows, cols, acc, wide = weight_tile(U, BM, BN, BU)
    for u0 in range(tl.program_id(2) * BU, U, tl.num_programs(2) * BU):
        u = u0 + tl.arange(0, BU)[None, :]
        at, keep = codes + (cols * U + u) * (P * BITS // 8), (cols < N) & (u < U)
        word = tl.load(at, mask=keep, other=0).to(tl.int32)                         # a unit's codes
        if BITS == 3:
            word |= tl.load(at + 1, mask=keep, other=0).to(tl.int32) << 8
            word |= tl.load(at + 2, mask=keep, other=0).to(tl.int32) << 16
        if GROUP % (BU * P) == 0:  # the tile lies in one group: a scale for each row
            g = tl.zeros((1, 1), tl.int32) + u0 * P // GROUP
        else:
            g = u * P // GROUP
        keep = (cols < N) & (g < groups)
        s = tl.load(scale + cols * groups + g, mask=keep, other=0.0).to(tl.float32)
        if SYMMETRIC:
            z = 1 << BITS - 1
        else:
            z = load_code(zero + cols * zero_bytes, g * BITS, keep, BITS)
        for j in tl.static_range(P):
            w = ((word >> j * BITS & (1 << BITS) - 1) - z).to(tl.float32) * s            # [BN, BU]
            acc = plane_dot(acc, x, w, j, rows, u, M, wide)
    store_tile(y, acc, rows, cols, M, N)


def int_product(m, x):
    """x [M, in] times the codes, float32 [M, out]."""
    zero, unit = m.codes if m.symmetric else m.zero, INT_UNIT[m.bits]
    return skinny(int_kernel, x, m.out_features, unit, m.codes, m.scale, zero,
                  groups=m.scale.size(1), zero_bytes=zero.size(1), most=m.group // unit,
                  BITS=m.bits, GROUP=m.group, SYMMETRIC=m.symmetric)


def pack_int(codes, scale, zero=None, *, bits, group, bias=None):
    """Codes [out, in], scale and zero [out, groups] (no zero: symmetric around 2^(b-1)) ->
    PackedLinear."""
    options = dict(kind="int", bits=bits, group=codes.size(1) if group < 0 else group,
                   symmetric=zero is None)
    whole = F.pad(codes, (0, -codes.size(1) % INT_UNIT.get(bits, 1)))
    state = dict(codes=pack_bits(whole, bits), scale=to_half(scale, "a scale"))
    if zero is not None:
        state["zero"] = pack_bits(zero, bits)
    return packed(codes.shape, bias, options, state)


FORMATS["int"], PRODUCTS["int"] = (int_buffers, int_dense), int_product


# === columns: 2506.05664, each input column its own number of bits, one range a row ===============


def columns_buffers(inputs, out, *, total):
    """`total` bits a row in all, widths, float16 ranges:  out Σb/8 + in + 4 out bytes."""
    if not 0 <= total <= 8 * inputs:
        raise ValueError(f"columns of 0 to 8 bits cannot have {total} together")
    return dict(codes=((out, -(-total // 8)), torch.uint8), width=((inputs,), torch.uint8),
                lo=((out,), torch.float16), hi=((out,), torch.float16))


def column_scale(lo, hi, levels):
    """Scale and zero [out, in] of columns with so many levels: (q - zero) scale, zero =
    round(-lo/scale)."""
    scale = (hi - lo).clamp(min=2 ** -24)[:, None] / (levels - 1).clamp(min=1)
    return scale, (-lo[:, None] / scale).round()


def columns_dense(m):
    """(codes - zero) scale, 0 where a column has no bits."""
    levels = 2.0 ** m.width.float()
    scale, zero = column_scale(m.lo.float(), m.hi.float(), levels)
    return (unpack_ragged(m.codes, m.width).float() - zero) * scale * (m.width > 0)


def columns_state(codes, width, lo, hi):
    """Codes [out, in] of width[j] bits in column j, a row's range lo, hi [out] -> (options,
    buffers)."""
    buffers = dict(codes=pack_ragged(codes, width), width=width.to(torch.uint8),
                   lo=to_half(lo, "a weight"), hi=to_half(hi, "a weight"))
    return dict(kind="columns", total=int(width.sum())), buffers


FORMATS["columns"] = columns_buffers, columns_dense


# === mixed: 2311.16442, groups of 2 or 4 bits, whose scales are 4-bit codes themselves ============


def mixed_buffers(inputs, out, *, group, wide):
    """`wide` groups of 4 bits, the others of 2: out (Σb/8 + Σb/8g + in/2g + in/4g) + in/g bytes."""
    groups = inputs // group if group > 0 and inputs % group == 0 else 0
    if not 0 <= wide <= groups or groups == 0:
        raise ValueError(f"{inputs} inputs are no whole groups of {group}, or {wide} of them "
                         "cannot be wide")
    total = 2 * groups + 2 * wide                                # bits of one code of every group
    return dict(codes=((out, -(-total * group // 8)), torch.uint8),
                zero=((out, -(-total // 8)), torch.uint8),
                width=((groups,), torch.uint8), scale=((out, -(-groups // 2)), torch.uint8),
                second=((out, -(-groups // 16), 2), torch.float16))


def mixed_dense(m):
    """(codes - zero) scale, the scale of its own code, minimum and step."""
    groups = len(m.width)
    step = m.second.float().repeat_interleave(16, 1)[:, :groups]                  # [out, groups, 2]
    scale = step[..., 0] + unpack_bits(m.scale, 4, groups).float() * step[..., 1]    # [out, groups]
    zero = unpack_ragged(m.zero, m.width).float()
    codes = unpack_ragged(m.codes, m.width.repeat_interleave(m.group)).float()
    scale, zero = (x.repeat_interleave(m.group, 1) for x in (scale, zero))
    return (codes - zero) * scale


def second_order(scale):
    """Scales [out, groups] as 4-bit codes, and a float16 minimum and step for 16 groups.

    -> codes [out, groups], [out, groups/16, 2]"""
    part = F.pad(scale, (0, -scale.size(1) % 16), mode="replicate").unflatten(1, (-1, 16))
    lo = to_half(part.amin(-1), "a scale")
    step = to_half((part.amax(-1) - lo.float()) / 15, "a scale").float().clamp(min=2 ** -24)
    codes = ((part - lo.float()[..., None]) / step[..., None]).round().clamp(0, 15).int()
    return codes.flatten(1)[:, :scale.size(1)], torch.stack([lo, step.half()], -1)


def mixed_state(W, wide, group):
    """W [out, in] rounded to nearest; wide [groups]: those of 4 bits -> (options, buffers)."""
    width = 2 + 2 * wide.to(torch.uint8)                                                 # [groups]
    w, top = W.unflatten(1, (-1, group)), (2.0 ** width.float() - 1)              # [out, groups, g]
    lo, hi = w.amin(-1).clamp(max=0), w.amax(-1).clamp(min=0)
    real = torch.where(hi == lo, math.inf, hi - lo) / top  # a group of zeros takes what others have
    real = torch.minimum(real, real.nan_to_num(posinf=0).amax(1, keepdim=True).clamp(min=1e-6))
    scale, second = second_order(real)
    step = second.float().repeat_interleave(16, 1)[:, :len(width)]
    real = (step[..., 0] + scale.float() * step[..., 1]).clamp(min=2 ** -24)         # [out, groups]
    zero = torch.minimum((-lo / real).round().clamp(min=0), top)
    codes = (w / real[..., None]).round() + zero[..., None]
    codes = torch.minimum(codes.clamp(min=0), top[:, None]).flatten(1).int()
    buffers = dict(codes=pack_ragged(codes, width.repeat_interleave(group)),
                   zero=pack_ragged(zero.int(), width), width=width, scale=pack_bits(scale, 4),
                   second=second)
    return dict(kind="mixed", group=group, wide=int(wide.sum())), buffers


FORMATS["mixed"] = mixed_buffers, mixed_dense


# === packed_mxfp4: 2505.14669, MXFP4's codes and exponents as the buffers of a layer ==============


def mxfp4_buffers(inputs, out):
    """E2M1 codes and a power of two for every 32 inputs, padded:  17/32 out in bytes."""
    groups = -(-inputs // 32)
    return dict(codes=((out, groups * 16), torch.uint8), exponent=((out, groups), torch.uint8))


def mxfp4_dense(m):
    """The values of the codes."""
    codes = unpack_bits(m.codes, 4, m.codes.size(1) * 2)
    return mx4_dense(codes, m.exponent.int() - 127)[:, :m.in_features]


def mxfp4_state(W):
    """W [out, in] rounded to nearest in MXFP4 -> (options, buffers)."""
    codes, exponent = mx4(F.pad(W, (0, -W.size(1) % 32)))
    exponent = (exponent.int() + 127).to(torch.uint8)
    return dict(kind="mxfp4"), dict(codes=pack_bits(codes, 4), exponent=exponent)


FORMATS["mxfp4"] = mxfp4_buffers, mxfp4_dense


# === nm24: 2 of every 4 neighbouring weights, and their places ====================================


def nm24_buffers(inputs, out):
    """Two bfloat16 of every four, 2-bit positions:  1.125 out in bytes."""
    groups = -(-inputs // 8) * 2
    return dict(values=((out, groups * 2), torch.bfloat16), index=((out, groups // 2), torch.uint8))


def nm24_dense(m):
    """The values at their places, zeros elsewhere."""
    where = unpack_bits(m.index, 2, m.values.size(1)).view(m.out_features, -1, 2).long()
    W = torch.zeros(*where.shape[:2], 4, device=where.device)                     # [out, groups, 4]
    return W.scatter_(2, where, m.values.float().view(where.shape)).flatten(1)[:, :m.in_features]


def nm24_state(W):
    """Dense 2:4 weight [out, in] -> values, index: of every 4 columns the 2 non-zero ones, in
    order."""
    groups = F.pad(W, (0, -W.size(1) % 8)).unflatten(1, (-1, 4))                  # [out, groups, 4]
    bad = ((groups != 0).sum(-1) > 2).nonzero()
    if len(bad):
        row, column = bad[0, 0].item(), 4 * bad[0, 1].item()
        raise ValueError(f"row {row}, columns {column} to {column + 3} hold more than two non-zero "
                         "weights: prune the layer to 2:4 before it is packed")
    order = (groups == 0).byte().argsort(stable=True, dim=-1)
    where = order[..., :2].sort(-1).values                                        # [out, groups, 2]
    return dict(values=groups.gather(2, where).flatten(1).bfloat16(),
                index=pack_bits(where.flatten(1), 2))


@jit
def nm24_kernel(x, y, fours, index, M, N, U, P: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
                BU: tl.constexpr):
    """x times 2:4 values, a tile of units of 8 columns at a time."""
    rows, cols, acc, wide = weight_tile(U, BM, BN, BU)
    for u0 in range(tl.program_id(2) * BU, U, tl.num_programs(2) * BU):
        u = u0 + tl.arange(0, BU)[None, :]
        keep = (cols < N) & (u < U)
        four = tl.load(fours + cols * U + u, mask=keep, other=0)  # int64: the bfloat16 of 8 columns
        where = tl.load(index + cols * U + u, mask=keep, other=0).to(tl.int32)
        for j in tl.static_range(P):
            w = tl.zeros((BN, BU), tl.float32)
            for k in tl.static_range(j // 4 * 2, j // 4 * 2 + 2):
                # a bfloat16 is a float32's upper half
                value = ((four >> 16 * k).to(tl.int32) << 16).to(tl.float32, bitcast=True)
                w = tl.where((where >> 2 * k & 3) == j % 4, value, w)
            acc = plane_dot(acc, x, w, j, rows, u, M, wide)
    store_tile(y, acc, rows, cols, M, N)


def nm24_product(m, x):
    """x [M, in] times the 2:4 weight, float32 [M, out]."""
    return skinny(nm24_kernel, x, m.out_features, 8, m.values.view(torch.int64), m.index)


def pack_nm24(W, *, bias=None):
    """Dense weight [out, in] with at most 2 non-zeros in every 4 columns -> PackedLinear."""
    return packed(W.shape, bias, dict(kind="nm24"), nm24_state(W))


FORMATS["nm24"], PRODUCTS["nm24"] = (nm24_buffers, nm24_dense), nm24_product


# === bitmap: any mask, a bit a weight, and the weights that stay ==================================


def bitmap_buffers(inputs, out, *, kept):
    """A bit a weight, bfloat16 of those that stay:  out in/8 + 2 kept bytes."""
    if not 0 <= kept <= inputs * out:
        raise ValueError(f"a weight of {out} x {inputs} cannot keep {kept}")
    return dict(mask=((out, -(-inputs // 8)), torch.uint8), values=((kept,), torch.bfloat16))


def bitmap_dense(m):
    """The values where the mask is set, in order."""
    mask = unpack_bits(m.mask, 1, m.in_features).bool()                                  # [out, in]
    return torch.zeros(mask.shape, device=mask.device).masked_scatter_(mask, m.values.float())


def bitmap_state(W):
    """W [out, in] with zeros -> (options, buffers)."""
    values, mask = W[W != 0].bfloat16(), pack_bits((W != 0).int(), 1)
    return dict(kind="bitmap", kept=len(values)), dict(mask=mask, values=values)


FORMATS["bitmap"] = bitmap_buffers, bitmap_dense


# === armor: 2510.05528, a 2:4 core between two block-diagonal matrices ============================


def armor_buffers(inputs, out, *, block_out, block_in):
    """bd(A) S bd(B), S being nm24:  1.125 out in + 2 (bA out + bB in) bytes."""
    if min(block_out, block_in) < 1 or out % block_out or inputs % block_in:
        raise ValueError(f"blocks of {block_out} x {block_in} do not tile a weight of {out} x "
                         f"{inputs}")
    return dict(A=((out // block_out, block_out, block_out), torch.bfloat16),
                B=((inputs // block_in, block_in, block_in), torch.bfloat16),
                **nm24_buffers(inputs, out))


def armor_dense(m):
    """bd(A) S bd(B)."""
    S = nm24_dense(m).view(len(m.A), m.block_out, len(m.B), m.block_in)
    W = torch.einsum("pij,pjqk,qkl->piql", m.A.float(), S, m.B.float())
    return W.reshape(m.out_features, -1)


def block_diagonal(A, x):
    """bd(A) x for A [blocks, b, b] and rows x [M, blocks b]: one batched matmul."""
    return torch.einsum("pij,mpj->mpi", A.to(x.dtype), x.unflatten(1, (len(A), -1))).flatten(1)


def armor_product(m, x):
    """x [M, in] through B, the 2:4 core and A, [M, out]."""
    return block_diagonal(m.A, nm24_product(m, block_diagonal(m.B, x)).to(x.dtype))


def pack_armor(A, S, B, *, bias=None):
    """A [out/bA, bA, bA], dense 2:4 core S [out, in], B [in/bB, bB, bB] -> PackedLinear of bd(A) S
    bd(B)."""
    options = dict(kind="armor", block_out=A.size(1), block_in=B.size(1))
    return packed(S.shape, bias, options, dict(A=A.bfloat16(), B=B.bfloat16(), **nm24_state(S)))


FORMATS["armor"], PRODUCTS["armor"] = (armor_buffers, armor_dense), armor_product


# === nm24_lowrank: a 2:4 weight and a correction of low rank ======================================


def nm24_lowrank_buffers(inputs, out, *, rank):
    """nm24 + B A of rank r:  1.125 out in + 2 r (out + in) bytes."""
    if rank < 1:
        raise ValueError(f"a correction of rank {rank}: at least 1")
    return nm24_buffers(inputs, out) | dict(left=((out, rank), torch.bfloat16),
                                            right=((rank, inputs), torch.bfloat16))


def nm24_lowrank_dense(m):
    """The 2:4 weight plus left times right."""
    return nm24_dense(m) + m.left.float() @ m.right.float()


FORMATS["nm24_lowrank"] = nm24_lowrank_buffers, nm24_lowrank_dense


# === vq: 2504.14569, d neighbouring weights as one of 2ᵇ vectors, between norms ===================


def vq_buffers(inputs, out, *, bits, dim, norms=True):
    """One of 2ᵇ d-vectors, norms r1, r2 (NoWag):  out in/d b/8 + 2 (2ᵇ d + out + in) bytes."""
    if not 1 <= bits <= 16 or dim < 1:
        raise ValueError(f"vq needs 1 to 16 bits and a dim of at least 1, not bits {bits}, dim "
                         f"{dim}")
    count = out * -(-inputs // dim)                      # the index stream runs on across rows
    buffers = dict(codebook=((2 ** bits, dim), torch.bfloat16),
                   index=((-(-count * bits // 8),), torch.uint8))
    if norms:
        buffers |= dict(r1=((inputs,), torch.float16), r2=((out,), torch.float16))
    return buffers


def vq_dense(m):
    """diag(r2) C[index] diag(r1)."""
    units = -(-m.in_features // m.dim)
    index = unpack_bits(m.index, m.bits, m.out_features * units).view(m.out_features, units)
    W = m.codebook.float()[index].flatten(1)[:, :m.in_features]                          # [out, in]
    return m.r2.float()[:, None] * W * m.r1.float() if hasattr(m, "r1") else W


@jit
def vq_kernel(x, y, codebook, index, M, N, U, P: tl.constexpr, BITS: tl.constexpr, BM: tl.constexpr,
              BN: tl.constexpr, BU: tl.constexpr):
    """x times vectors of the codebook, a tile of codes at a time."""
    rows, cols, acc, wide = weight_tile(U, BM, BN, BU)
    start = cols * U * BITS  # bit of a row's first code: rows follow without a gap
    for u0 in range(tl.program_id(2) * BU, U, tl.num_programs(2) * BU):
        u = u0 + tl.arange(0, BU)[None, :]
        keep = (cols < N) & (u < U)
        code = load_code(index + (start >> 3), (start & 7).to(tl.int32) + u * BITS, keep, BITS)
        for j in tl.static_range(P):
            w = tl.load(codebook + code * P + j, mask=keep, other=0.0)                   # [BN, BU]
            acc = plane_dot(acc, x, w, j, rows, u, M, wide)
    store_tile(y, acc, rows, cols, M, N)


def vq_product(m, x):
    """x [M, in] times the vectors, float32 [M, out]: the norms are applied outside."""
    if not hasattr(m, "r1"):
        return skinny(vq_kernel, x, m.out_features, m.dim, m.codebook, m.index, BITS=m.bits)
    x = (x * m.r1.float()).to(x.dtype)
    y = skinny(vq_kernel, x, m.out_features, m.dim, m.codebook, m.index, BITS=m.bits)
    return y * m.r2.float()


def pack_vq(indices, codebook, r1=None, r2=None, *, inputs=0, bias=None):
    """Indices [out, ceil(in/d)] into codebook [2^b, d], norms r1 [in] and r2 [out] -> PackedLinear.

    Without norms `inputs` says how many of the last codes' columns are real."""
    bits = len(codebook).bit_length() - 1
    if len(codebook) != 1 << bits:
        raise ValueError(f"a codebook of {len(codebook)} vectors: pad it to a power of two")
    options = dict(kind="vq", bits=bits, dim=codebook.size(1))
    state = dict(codebook=codebook.bfloat16(), index=pack_bits(indices.flatten(), bits))
    if r1 is None:
        return packed((len(indices), inputs), bias, options | dict(norms=False), state)
    state |= dict(r1=to_half(r1, "a column norm"), r2=to_half(r2, "a row norm"))
    return packed((len(r2), len(r1)), bias, options, state)


FORMATS["vq"], PRODUCTS["vq"] = (vq_buffers, vq_dense), vq_product
