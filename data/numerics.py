"""
numerics.py - training in low precision and in few weights, simulated exactly in float32.

    linear = QuartetLinear(nn.Linear(64, 64))    # the layer that trains in MXFP4

Map      1 HALO   2 Quartet   3 QAT   4 LOST   5 pruning while training
Letters  X [N, n] inputs of N tokens, W [m, n] = [out, in], Y = X W^T [N, m], E = dL/dY, H Hadamard,
         s a scale
A layer has merged(): the plain linear layer that a checkpoint holds. Formats: kernels.ROUNDINGS.
"""
import math
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import nn

from data.run import Fraction, Share, UserError
from kernels import EXPONENTS, MX_GROUP, absmax, e2m1, grouped, hadamard, power_of_two
from kernels import ROUNDINGS as FORMATS
from kernels import quantize_activations, rotate, wide


def within(key, value, low, high):
    """UserError if the number is not between the two."""
    if not low <= value <= high:
        raise UserError(f"--{key} {value}: expected {low} to {high}")


def product(a, b, q):
    """q(a) q(b)^T: both are rounded along the dimension that is summed.   a [M, K], b [N, K] -> [M,
    N]"""
    return q(a) @ q(b).mT


# --- 1 HALO: all three products of a linear layer in a format, its operands rotated ---------------

TOKENS = 128                                       # of a block of rotated tokens: ours


def turn_tokens(x, n):
    """x [N, m] with its tokens rotated in blocks of n, after zeros up to whole blocks; its own
    inverse."""
    return rotate(F.pad(x, (0, 0, 0, -len(x) % n)).mT, n).mT


class Halo(torch.autograd.Function):
    """halo() and its backward. level 1 rotates the forward, 2 the tokens of the input's gradient,
    too."""

    @staticmethod
    def forward(ctx, X, W, level, q):
        ctx.save_for_backward(X, W)
        ctx.how = level, q
        if level:
            X, W = rotate(X, X.size(1)), rotate(W, W.size(1))
        return product(X, W, q)                                                          # [N, m]

    @staticmethod
    def backward(ctx, E):
        (X, W), (level, q) = ctx.saved_tensors, ctx.how
        if level < 2:
            dX = product(E, W.mT, q)
        else:
            n = min(TOKENS, 1 << (len(E) - 1).bit_length())
            dX = turn_tokens(product(turn_tokens(E, n), W.mT, q), n)[:len(E)]
        return dX, product(E.mT, X.mT, q), None, None


def halo(X, W, *, level=2, format="int8"):
    """HALO (2501.02625), Q a row of FORMATS, by level:   X [N, n], W [m, n] -> [N, m]

    forward 0 Q(X) Q(W)^T;  1, 2 Q(XH) Q(WH)^T.   dX 0, 1 Q(E) Q(W);  2 H^T [Q(HE) Q(W)].   dW
    Q(E)^T Q(X). The paper's choice: 0 or 1 with fp8, 2 with int8. mxfp4 at level 0: MXFP4 with
    nothing done about it.
    """
    return Halo.apply(X, W, level, FORMATS[format])


# --- 2 Quartet: all three in MXFP4 ----------------------------------------------------------------


def clipped_mx4(x, rule):
    """Quartet's forward quantiser of x, in the basis rotated by 32s: (MXFP4, where it did not clip:
    < 6 s)"""
    y = grouped(rotate(x, MX_GROUP))
    s = power_of_two(EXPONENTS[rule](y), y.dtype)[..., None]
    return (e2m1(y / s) * s).flatten(-2), (y.abs() < 6 * s).flatten(-2)


def unbiased_mx4(x, generator, nearest=False):
    """Stochastic MXFP4: E[result] = x.   s = 4/3 2^(floor(log2 max|x|) - 2) puts all of a group
    below 6 s.

    nearest: rounded to the nearest instead, at the same scale. The 4/3 belongs to the whole
    product.
    """
    y = grouped(x)
    s = 4 / 3 * power_of_two(absmax(y), y.dtype)[..., None]
    noise = None if nearest else torch.rand(y.shape, generator=generator, dtype=y.dtype,
                                            device=y.device)
    return (e2m1(y / s, noise) * s).flatten(-2)


class Quartet(torch.autograd.Function):
    """quartet() and its backward."""

    @staticmethod
    def forward(ctx, X, W, rule, nearest, seed):
        (x, x_in), (w, w_in) = clipped_mx4(X, rule), clipped_mx4(W, rule)
        ctx.save_for_backward(x, w, x_in, w_in)
        ctx.how = nearest, seed
        return x @ w.mT                                                                  # [N, m]

    @staticmethod
    def backward(ctx, E):
        (x, w, x_in, w_in), (nearest, seed) = ctx.saved_tensors, ctx.how
        g = torch.Generator(E.device).manual_seed(seed)
        signs = 2.0 * torch.randint(2, (MX_GROUP, 1), generator=g, device=E.device) - 1
        # signs first: after H they change nothing
        R = signs.to(E) * hadamard(MX_GROUP, E.dtype, E.device)

        def q(a):
            a = F.pad(a, (0, -a.size(1) % MX_GROUP))                                  # whole groups
            return unbiased_mx4((a.unflatten(1, (-1, MX_GROUP)) @ R).flatten(1), g, nearest)
        dX, dW = product(E, w.mT, q), product(E.mT, x.mT, q)
        return rotate(dX * x_in, MX_GROUP), rotate(dW * w_in, MX_GROUP), None, None, None


def quartet(X, W, seed=0, *, exponent="quest", backward="stochastic"):
    """Quartet (2505.14669): MXFP4, rotated by H32; QuEST's scale forward, unbiased gradients.

    forward X_q W_q^T, of X H and W H;  M: where they did not clip;  with R = D H, D random signs of
    the seed: dX = (M_X . SR(E R) SR(W_q^T R)^T) H,  dW = (M_W . SR(E^T R) SR(X_q^T R)^T) H.
    exponent quest_floor: the released kernel's. backward nearest: what SR is compared with. ours:
    quest, and the order D H (released: H D, which cannot change a quantiser that is symmetric).
    """
    return Quartet.apply(X, W, exponent, backward == "nearest", seed)


def flat_product(fn, x, W, bias):
    """fn(X, W) of x [..., n] as rows, in float32 also under autocast, and the bias.   -> [...,
    m]"""
    with torch.autocast(x.device.type, enabled=False):
        y = fn(wide(x).flatten(0, -2), wide(W)).view(*x.shape[:-1], -1)
        return (y if bias is None else y + bias).to(x.dtype)


def plain(W, bias):
    """An nn.Linear of this weight and bias."""
    out = nn.Linear(W.size(1), W.size(0), bias is not None, device="meta")
    out.weight, out.bias = nn.Parameter(W.detach().clone()), bias
    return out


class HaloLinear(nn.Module):
    """A linear layer computed by halo(); its weight stays float32. Scales are those of the rows at
    hand, so --micro changes them a little."""

    def __init__(self, linear, level=2, format="int8"):
        super().__init__()
        self.weight, self.bias, self.how = linear.weight, linear.bias, dict(level=level,
                                                                            format=format)

    def forward(self, x):
        return flat_product(lambda X, W: halo(X, W, **self.how), x, self.weight, self.bias)

    def merged(self):
        """The plain linear layer with the master weight."""
        return plain(self.weight, self.bias)


class QuartetLinear(nn.Module):
    """A linear layer computed by quartet(); its weight stays float32. Each step and each forward in
    it draws anew from the seed (begin), so that a resumed run draws what an uninterrupted one
    does."""

    def __init__(self, linear, seed=0, exponent="quest", backward="stochastic"):
        super().__init__()
        grouped(linear.weight)                           # a multiple of 32 inputs
        self.weight, self.bias, self.seed, self.draw = linear.weight, linear.bias, seed, 0
        self.how = dict(exponent=exponent, backward=backward)

    def begin(self, step, rounding):
        """Step `step` starts; rounding does not matter here."""
        self.draw = (self.seed * 1_000_003 + step) * 1009

    def forward(self, x):
        self.draw += torch.is_grad_enabled()
        return flat_product(lambda X, W: quartet(X, W, self.draw,
                                                 **self.how), x, self.weight, self.bias)

    def merged(self):
        """The plain linear layer with the master weight."""
        return plain(self.weight, self.bias)


def begin(model, step, rounding):
    """Tell the layers which step begins, and whether QAT's round their weights in it."""
    for m in model.modules():
        if hasattr(m, "begin"):
            m.begin(step, rounding)


# --- 3 QAT: weights rounded in the forward, as if they were not in the backward -------------------


def fake_quant(W, bits):
    """W [m, n] rounded to `bits` symmetrically, a scale s = max|row| / (2^(bits-1) - 1) an output
    channel.

    1 bit: ± the row's mean |w| (1603.05279; ours for QAT). The gradient passes as if nothing was
    rounded.
    """
    w = W.detach()
    if bits == 1:
        q = torch.where(w < 0, -1.0, 1.0) * w.abs().mean(1, keepdim=True)
    else:
        q = quantize_activations(w, bits)
    return q + (W - w)                                   # the difference is 0, its gradient 1


class QATLinear(nn.Module):
    """A linear layer that rounds its weight to `bits` in the steps that say so (begin); saved
    rounded."""

    def __init__(self, linear, bits=4):
        super().__init__()
        self.weight, self.bias, self.bits, self.rounding = linear.weight, linear.bias, bits, False

    def begin(self, step, rounding):
        """Round the weight from now on, or do not."""
        self.rounding = rounding

    def forward(self, x):
        return F.linear(x, fake_quant(self.weight, self.bits) if self.rounding else self.weight,
                        self.bias)

    def merged(self):
        """The plain linear layer with the rounded weight."""
        return plain(fake_quant(self.weight.detach(), self.bits), self.bias)


def qat_fraction(N, D, bits, a=6.7297):
    """Compute-optimal QAT (2509.22935): the best share of D training tokens to round N weights in.

    f = exp(-a / ln S),  S = D / (N bits/8) tokens a byte of weights; at least .02, and that for S
    <= 1, where it was not fitted. 10 -> .054, 100 -> .232, 2000 -> .413.
    """
    S = D / (N * bits / 8)
    return max(0.02, math.exp(-a / math.log(S))) if S > 1 else 0.02


def qat_share(model, fraction, tokens):
    """The share of the steps in which QAT rounds: fraction, or for 0 the formula's, for -1 none.

    N: the weights that are rounded (ours: the paper counts the model's).
    """
    layers = [m for m in model.modules() if isinstance(m, QATLinear)]
    if fraction or not layers:
        return max(0.0, fraction)
    return qat_fraction(sum(m.weight.numel() for m in layers), tokens, layers[0].bits)


# --- 4 LOST: low rank and a few dense columns -----------------------------------------------------

PHI = dict(silu=F.silu, identity=lambda x: x)


def lost_sizes(n, m, size, columns):
    """LOST's rank and number of dense columns for a layer of n inputs and m outputs, of `size` n m
    parameters

    in all, to the nearest whole rank: rank (n + m) + columns m. `columns` is their share of the
    inputs.
    """
    k = round(columns * n)
    return max(1, round((size * n * m - k * m) / (n + m))), k


def lost_start(W, rank, k, generator, start="svd"):
    """LOST's start of a layer drawn as W [m, n]: A [r, n], B [m, r], dense columns [m, k], their
    places [k]

    svd: B A is W's best approximation of that rank, √S on each side, and the columns those that it
    misses by most, as they are in W. random: normal factors whose product has W's deviation, any
    columns (ours).
    """
    m, n = W.shape
    if start == "svd":
        U, S, V = torch.linalg.svd(wide(W), full_matrices=False)
        B, A = U[:, :rank] * S[:rank].sqrt(), S[:rank, None].sqrt() * V[:rank]
        where = (W - B @ A).norm(dim=0).argsort(descending=True, stable=True)[:k].sort()[0]
    else:
        std = (W.std().item() / math.sqrt(rank)) ** 0.5
        A, B = (std * torch.randn(x, generator=generator).to(W) for x in ((rank, n), (m, rank)))
        where = torch.randperm(n, generator=generator)[:k].sort()[0].to(W.device)
    return A.to(W.dtype).contiguous(), B.to(W.dtype).contiguous(), W[:, where].clone(), where


def lost(x, A, B, columns, where, *, gamma=0.7, phi="silu"):
    """LOST (2508.02668):  y = γ B φ(A x) + (1-γ) W_s x_I,  I fixed.   x [..., n] -> [..., m]

    φ, γ second-hand (reviews of the paper); φ identity: one matrix, which merges."""
    low = F.linear(PHI[phi](F.linear(x, A)), B)
    return gamma * low + (1 - gamma) * F.linear(x[..., where], columns)


class LostLinear(nn.Module):
    """A layer of lost_start's parameters. With φ a checkpoint cannot hold it as one matrix:
    merged() is then the layer itself."""

    def __init__(self, linear, rank, k, generator, gamma=0.7, phi="silu", start="svd"):
        super().__init__()
        A, B, columns, where = lost_start(linear.weight.detach(), rank, k, generator, start)
        self.A, self.B, self.columns = (nn.Parameter(x) for x in (A, B, columns))
        self.register_buffer("where", where)
        self.bias, self.how = linear.bias, dict(gamma=gamma, phi=phi)

    def forward(self, x):
        y = lost(x, self.A, self.B, self.columns, self.where, **self.how)
        return y if self.bias is None else y + self.bias

    def merged(self):
        """The plain linear layer that computes the same; itself if there is none."""
        if self.how["phi"] != "identity":
            return self
        gamma = self.how["gamma"]
        W = (gamma * self.B @ self.A).index_add(1, self.where, (1 - gamma) * self.columns)
        return plain(W, self.bias)


# --- 5 pruning while training ---------------------------------------------------------------------


def prune_schedule(progress, sparsity, begin=0.25, end=0.75):
    """The Journey Matters (2501.12486): s (1 - (1-u)³) after this share of the run's compute, u its
    share from begin to end; all at once where the two are equal. The cube is unverified."""
    if progress < begin or begin == end:
        return sparsity * (progress >= begin)
    u = min(1.0, (progress - begin) / (end - begin))
    return sparsity * (1 - (1 - u) ** 3)


@lru_cache(8)
def compute_clock(sparsity, begin, end, points=20000):
    """The share of the steps that are over at shares 0 … 1 of the compute; a step costs in
    proportion to its
    density.   -> float64 [points + 1]"""
    middle = (torch.arange(points, dtype=torch.float64) + 0.5) / points
    cost = torch.tensor([1 - prune_schedule(p, sparsity, begin, end) for p in middle.tolist()],
                        dtype=torch.float64)
    steps = F.pad((1 / cost).cumsum(0), (1, 0))
    return steps / steps[-1]


def prune_at(step, steps, sparsity, begin=0.25, end=0.75):
    """The sparsity after `step` of `steps`, with begin and end in compute; it moves every 1 % of
    the steps (unverified) and is exact at the end."""
    every = max(1, round(steps / 100))
    if step < steps:
        step = step // every * every
    clock = compute_clock(sparsity, begin, end)
    i = int(torch.searchsorted(clock, step / steps, right=True)) - 1
    return prune_schedule(min(1.0, i / (len(clock) - 1)), sparsity, begin, end)


def none(step, steps):
    """No pruning."""
    return 0.0


def journey(step, steps, *, sparsity: Fraction = 0.5, begin: Share = 0.25, end: Share = 0.75):
    """The Journey Matters (2501.12486): the smallest weights of each matrix go, between these
    shares of the run's compute, a step costing in proportion to its density; then the mask stays.
    0, 0: from the first step; 1, 1: after the last. ours: one sparsity for every matrix; only
    linear layers count as compute."""
    within("sparsity", sparsity, 0, 0.999)
    within("end", end, 0, 1)
    within("begin", begin, 0, end)
    return prune_at(step, steps, sparsity, begin, end)


PRUNING = dict(none=none, journey=journey)         # (step, steps) -> the sparsity after that step


def prune(weights, masks, sparsity):
    """Masks of the largest weights of each matrix: {name: bool}, round(s n) zeros. What is cut
    stays cut.

    weights {name: [m, n]}; masks: those of before, {} at first."""
    out = {}
    for name, W in weights.items():
        mask = masks.get(name, torch.ones(W.shape, dtype=torch.bool, device=W.device)).flatten()
        count, gone = round(sparsity * len(mask)), len(mask) - int(mask.sum())
        if count > gone:
            size = torch.where(mask, W.detach().abs().flatten(), -1.0)
            mask = torch.ones_like(mask).index_fill(0, size.argsort(stable=True)[:count], False)
        out[name] = mask.view(W.shape)
    return out


def mask_gradients(weights, masks):
    """Zero the gradients of pruned weights: they are no parameters any more."""
    for name, mask in masks.items():
        if weights[name].grad is not None:
            weights[name].grad.mul_(mask)


@torch.no_grad()
def apply_masks(weights, masks, stacks=()):
    """Zero the pruned weights, and what has their shape in the optimiser's state: its moments.

    stacks: an optim.Optimiser's: of units with a name, and a state of stacked tensors."""
    for name, mask in masks.items():
        weights[name].mul_(mask)
    for stack in stacks if masks else ():
        found = [masks.get(u.name) for u in stack.units]
        for x in stack.state.values():
            if all(m is not None for m in found) and torch.is_tensor(x) and x.is_floating_point():
                if x.shape == (len(found), *found[0].shape):
                    x.mul_(torch.stack(found))
