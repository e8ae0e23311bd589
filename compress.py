"""
compress.py - pruning, quantisation, slimming of experts: a big checkpoint in, a small one out.

    python compress.py                                   # ARMOR 2:4 on a small base model, made first
    python compress.py --config gptq --init Qwen2.5-0.5B --data stdlib --group 128 --out out/small
    python model.py out/small --prompt "def "            # what it writes opens like any checkpoint

Map      1 config   2 masks   3 ARMOR   4 codes   5 calibrate   6 smooth   7 caches   8 evaluate   9 compress
         10 claims.   What cuts structure and distils is in data/structure.py, caches in data/kv.py
Letters  W [m, n] = [out, in] of a linear layer y = W x; N tokens of calibration; h [n], H [n, n] below
preset      paper          idea                                                       reads
magnitude   1506.02626     the largest weights stay                                   nothing
wanda       2306.11695     ... times the norm of their input, compared within a row   h
sparsegpt   2301.00774     column by column, the rest corrected for what was cut      H
nowag_p     2504.14569     ... of the weight normalised by columns, then rows         h
lowrank24   -              2:4 and a low-rank correction of ARMOR's size: a control   h
dprune      2405.06275     what a domain needs and what general text needs            H, gradients
armor       2510.05528     2:4 between two block-diagonal wrappers, fitted            h
rtn         -              round to nearest, a scale a group                          nothing
gptq        2210.17323     ... column by column, the rest corrected                   H
awq         2306.00978     rtn of inputs scaled by their mean size, then clipped      outputs
smoothquant 2312.03788     rtn of inputs scaled by sizes, one exponent for all        outputs
baq         2506.05664     gptq whose columns get bits until all lose alike           H
mixed       2311.16442     2 bits, and 4 for the groups that need them                h
nowag_vq    2504.14569     k-means of normalised vectors, weighted by activations     h
kmeans      -              ... of the weights as they are: the control                nothing
gptvq       2402.15319     k-means, some columns at a time, the rest corrected        H
w4a4        -              weights and activations in 4 bits, a scale a token         sizes
comet       2410.12168     ... blocks of inputs; those with outliers in 8 bits        sizes
halo        2501.02625     ... of rotated inputs and weights                          sizes
mxfp4       2505.14669     rotated, 4-bit floats, a power of two for every 32         nothing
dense       -              nothing is done: the baseline                              nothing
kivi        2402.02750     the cache in 2 bits, keys by channel, values by token      the cache
evicting    2410.01805     Locret: trained heads say which tokens of a prompt stay    the cache
slimmoe     2506.18349     neurons of experts, cut in stages, then distilled          gradients
drop_experts  2404.05089   whole experts, then distilled: a baseline of slimmoe       routing
fresh       -              slimmoe's sizes with new weights, distilled: another       nothing
dense_active  -            a dense model of its active size, distilled: another       nothing
minitron    2407.14679     neurons of small activation, then distilled                activations
prunenet    2501.15296     neurons that a policy chooses, then distilled              weights
puzzle      2411.19146     a width a layer, chosen exactly from distilled blocks      outputs
swiftkv     2410.03960     late layers read keys and values from one early state      a teacher
moh         2410.11842     a router chooses a token's heads                           a teacher
tiny        size           seconds on any CPU, its base model included
Watch    loss_increase on held-out text, at equal bits: bits counts every stored byte of the layers. kl, to
         the original, is less noisy. proxy is the h-weighted error of the normalised weight: it ranks NoWag-P
         against ARMOR, not families (SparseGPT has twice the proxy and half the loss).
"""
import copy
import math
import time
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from tqdm import tqdm

import kernels
import sft
from data import kv, structure, text
from data.run import (Count, Positive, Range, Run, Share, UserError, checkpoint, cli, hyper,
                      launch, nearest, needs, peak_bytes)
from kernels import (PackedLinear, bitmap_state, check_bits, column_scale, columns_state,
                     mixed_state, mxfp4_state, nm24_state, order_dtype, pack_armor, pack_int,
                     pack_nm24, pack_vq, packed, quantize)
from model import (Cache, Transformer, generate, load, plain_linear, rope_table, save, tensors,
                   token_logprobs)

# --- 1 config -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Config:
    """What every run has; what belongs to a method is an argument of its function."""
    config: str = ""             # presets and TOML files, left to right
    init: str = "base:pretrain"  # the checkpoint to compress
    data: str = "stdlib"         # text of calibration (train) and of evaluation (val)
    domain: str = ""             # the text whose gradients dprune reads (default: --data)
    method: str = "armor"        # which row of METHODS
    smooth: str = "none"         # which row of SMOOTH goes before rtn or gptq
    cache: str = "full"  # which row of CACHES holds keys and values while the result is evaluated
    kd_steps: int = 300          # of distillation, over all stages of a method that cuts structure
    kd_batch: Count = 16         # its windows a step
    kd_lr: Positive = 1e-3       # its peak learning rate
    kd_loss: Literal[*structure.LOSSES] = "kd_topk"  # its loss: a row of structure.LOSSES
    samples: Count = 64          # calibration windows
    context: Range("[2, inf)") = 128  # their tokens, and those of an evaluation window
    windows: Count = 256  # evaluation windows: consecutive, none overlaps, BOS at each document
    sequential: bool = False     # statistics of a block from the compressed blocks before it
    outliers: float = 0.0  # first scale two channels of every norm up by this, the next layers down
    out: str = ""                # run folder (default out/compress/<presets>)
    keep: Count = 1              # checkpoints to keep
    seed: int = 0  # of the calibration windows, a method's draws, and of a base:… model
    device: str = "auto"         # cpu or cuda
    kernels: str = "auto"        # auto, or torch: the plain definition of every kernel
    resume: bool = False         # a finished run is not made again


PRESETS = dict(
    magnitude=dict(method="magnitude"), wanda=dict(method="wanda", sequential=True),
    sparsegpt=dict(method="sparsegpt", sequential=True), nowag_p=dict(method="nowag_p"),
    lowrank24=dict(method="lowrank24"), dprune=dict(method="dprune"), armor=dict(method="armor"),
    rtn=dict(method="rtn"), gptq=dict(method="gptq", sequential=True),
    awq=dict(method="rtn", smooth="awq"),
    smoothquant=dict(method="rtn", smooth="smoothquant"), baq=dict(method="baq", sequential=True),
    mixed=dict(method="mixed"), nowag_vq=dict(method="nowag_vq"),
    kmeans=dict(method="nowag_vq", norms=False, weights=False),
    gptvq=dict(method="gptvq", sequential=True),
    w4a4=dict(method="w4a4"), comet=dict(method="w4a4", block=16, wide=True, order=True),
    halo=dict(method="w4a4", rotate=32), mxfp4=dict(method="mxfp4", rotate=32),
    dense=dict(method="dense"),
    kivi=dict(method="dense", cache="kivi"), evicting=dict(method="dense", cache="evicting"),
    slimmoe=dict(method="slimmoe", init="base:pretrain_moe"),
    drop_experts=dict(method="drop_experts", init="base:pretrain_moe"),
    fresh=dict(method="fresh", init="base:pretrain_moe"),
    dense_active=dict(method="dense_active", init="base:pretrain_moe"),
    minitron=dict(method="minitron", kd_loss="forward_kl"),
    prunenet=dict(method="prunenet", kd_loss="forward_kl"),
    puzzle=dict(method="puzzle", kd_loss="cosine_kl"),
    swiftkv=dict(method="swiftkv", kd_loss="swift_kl"),
    moh=dict(method="moh", kd_loss="forward_kl", router="learned"),
    tiny=dict(samples=4, context=64, windows=8, iterations=20, kd_steps=4, kd_batch=4, head_steps=5,
              local_steps=2, budget=8, stabilizers=2),
    # what only the arms of claims need
    half=dict(pattern="50%"), block4=dict(block=4), spiky=dict(outliers=20.0),
    act_order=dict(act_order=True),
    bits4=dict(bits=4, group=64, dim=1), bits3=dict(bits=3, group=64, dim=2),
    bits2=dict(bits=2, group=64, dim=2), triples=dict(dim=3), norms=dict(norms=True, weights=False),
    weighted=dict(norms=False, weights=True),
    uniform=dict(allocate=False), by_range=dict(by="range"), by_chance=dict(by="random"),
    blocks16=dict(block=16), by_blocks=dict(wide=True), rows=dict(scope="row"),
    decoded=dict(context=256, windows=64),
    keys_token={"keys": "token"}, values_channel={"values": "channel"},
    windowless=dict(cache_window=0),
    keep32=dict(budget=32), keep16=dict(budget=16),
    tuned=dict(context=64, kd_lr=2e-3, kd_loss="forward_kl"),
    **{f"by_{score}": dict(score=score) for score in ("locret", "recency", "random", "attention")},
    top8=dict(kd_loss="kd_topk"), once=dict(stages=1), restarted=dict(at_once=True),
    by_luck=dict(importance="random"), longer=dict(kd_steps=1200), most=dict(share=0.7),
    cut=dict(kd_steps=0, share=0.5, init="base:pretrain"),
    same=dict(choice="uniform"), lottery=dict(choice="random"), largest=dict(sampled=False),
)
CURVES = {"proxy loss": ["proxy"], "seconds": ["seconds"],
          "held-out nats": ["cut_nats", "distilled_nats"]}

# --- 2 masks --------------------------------------------------------------------------------------
# h = 2 mean x² of every input, H = 2 mean x xᵀ over the calibration tokens. A method's positional
# arguments name what it reads; it returns the new weight, or the packed layer.


def kept(score, pattern, scope="matrix"):
    """The 1.0s of a mask: "2:4" keeps the 2 largest of every 4 neighbours in a row, "50%" half of
    all.

    scope of a share: the whole matrix, or each row. Exactly that many, ties by index. UserError for
    others.
    """
    n, _, m = pattern.partition(":")
    if m.isdigit() and n.isdigit() and 0 < int(n) <= int(m):
        if score.size(1) % int(m):
            raise UserError(f"--pattern {pattern}: {score.size(1)} inputs are no multiple of {m}; "
                            f"take a share, like 50%")
        groups = score.unflatten(1, (-1, int(m)))                                   # [m, groups, M]
        rank = groups.argsort(dim=-1, descending=True, stable=True).argsort(-1)
        return (rank < int(n)).flatten(1).float()
    if not (pattern.endswith("%") and n[:-1].replace(".", "").isdigit()
            and 0 < float(n[:-1]) <= 100):
        raise UserError(f"--pattern {pattern}: write n:m, like 2:4, or the share that stays, like 50%")
    flat = score.flatten()[None] if scope == "matrix" else score
    count = flat.size(1) - int(round(flat.size(1) * (100 - float(n[:-1])) / 100, 6))
    top = flat.argsort(dim=1, descending=True, stable=True)[:, :count]
    return torch.zeros_like(flat).scatter(1, top, 1.0).view_as(score)


def pruned(W, pattern):
    """A masked weight as it is stored: 2:4 in its own format, another mask as a bitmap (both 9 bits
    at half), dense if nothing went."""
    return pack_nm24(W) if pattern == "2:4" else W if (W != 0).all() else stored(W, bitmap_state(W))


def stored(W, state, **options):
    """The packed layer of W's shape with a format's (options, buffers)."""
    return packed(W.shape, None, state[0] | options, state[1])


def dense(W):
    """Nothing."""
    return W


def magnitude(W, *, pattern="2:4", scope: Literal["matrix", "row"] = "matrix"):
    """|W|: no data."""
    return pruned(W * kept(W.abs(), pattern, scope), pattern)


def wanda(W, h, *, pattern="2:4"):
    """Wanda (2306.11695):  |W_ij| ‖x_j‖, compared within each output row."""
    return pruned(W * kept(W.abs() * h.sqrt(), pattern, "row"), pattern)


def normalise(W, eps=1e-5):
    """NoWag's (2504.14569): W = diag(r2) Wb diag(r1), columns first, then rows.   -> Wb, r1 [n], r2
    [m]"""
    r1 = W.norm(dim=0) + eps
    r2 = (W / r1).norm(dim=1) + eps
    return W / r1 / r2[:, None], r1, r2


def mend(h):
    """h with what is not finite or not positive replaced by the mean of the rest (dead inputs)."""
    sound = h.isfinite() & (h > 0)
    return torch.where(sound, h, h[sound].mean() if sound.any() else torch.ones_like(h))


def proxy(W, new, h):
    """NoWag's relative error  Σ h_j (Wb - Wb')² / Σ h_j Wb²,  both normalised as W is; 1 for all
    zeros."""
    Wb, r1, r2 = normalise(W)
    h = mend(h)
    return (((Wb - new / r1 / r2[:, None]) ** 2 * h).sum() / (Wb ** 2 * h).sum()).item()


def nowag_p(W, h, *, pattern="2:4"):
    """NoWag-P (2504.14569):  keep the largest h_j Wb_ij², survivors unchanged; one threshold a
    matrix."""
    return pruned(W * kept(normalise(W)[0] ** 2 * mend(h), pattern), pattern)


def lowrank24(W, h, *, block: Count = 8):
    """2:4 by NoWag-P, and the best B A of the rest weighted by √h, of as many numbers as ARMOR's
    wrappers.

    ours: the control that ARMOR's paper lacks."""
    core = W * kept(normalise(W)[0] ** 2 * mend(h), "2:4")
    root, (m, n) = mend(h).sqrt(), W.shape
    U, s, V = torch.linalg.svd((W - core) * root, full_matrices=False)
    rank = min(len(s), max(1, (m * block_of(m, block) + n * block_of(n, block)) // (m + n)))
    options, buffers = dict(kind="nm24_lowrank", rank=rank), nm24_state(core) | dict(
        left=(U[:, :rank] * s[:rank]).bfloat16(), right=(V[:rank] / root).bfloat16())
    return stored(W, (options, buffers))


def dprune(W, H, grad, fisher, *, pattern="50%", lam=0.1, lr: Positive = 1e-4):
    """D-Pruner (2405.06275): what a domain needs and what the general model needs, in one score.

    G = W² / [H⁻¹]_mm of general text;  g' = g + 2 λ lr² G g F,  F the mean g²;  I = |g' W + (g' W)²
    / 2| of the domain's gradients g [m, n] (mean). ours: the form of g' and the sign of the second
    term, which the paper's text leaves open.
    """
    G = W ** 2 / (inverse_factor(H) ** 2).sum(0)                 # diag(H⁻¹) = column sums of U²
    first = (grad + 2 * lam * lr ** 2 * G * grad * fisher) * W
    return pruned(W * kept((first + first ** 2 / 2).abs(), pattern), pattern)


def inverse_factor(H, damp=0.01):
    """U upper, Uᵀ U = (H + damp mean(diag H) I)⁻¹; ten times the damping while there is no such
    factor."""
    if damp < 0:
        raise UserError(f"--damp {damp}: nothing below 0")
    if not H.isfinite().all():
        raise UserError("the second moment of a layer's inputs is not finite: the model overflows on --data")
    H = H + torch.diag((H.diagonal() == 0).to(H.dtype))                                # dead inputs
    for _ in range(6):
        L, bad = torch.linalg.cholesky_ex(H + damp * H.diagonal().mean() * torch.eye(len(H)).to(H))
        if not bad:
            return torch.linalg.cholesky(torch.cholesky_inverse(L), upper=True)
        damp *= 10
    raise UserError("the second moment of a layer's inputs has no Cholesky factor: more --samples")


def alive(W, H):
    """W without the weights of inputs that never fire: nothing is lost, they spoil no range and no
    mask."""
    return W * (H.diagonal() != 0)


def sparsegpt(W, H, *, pattern="2:4", block: Count = 128, damp: Positive = 0.01):
    """SparseGPT (2301.00774): columns in order; e = w_j/U_jj of what is cut goes to the columns
    behind.

    The mask is chosen by w²/U_jj², of updated weights: at every group of n:m, or once a block."""
    W, U, out = alive(W, H), inverse_factor(H, damp), torch.zeros_like(W)
    n, _, m = pattern.partition(":")
    kept(W.abs(), pattern)  # told of the whole matrix if it cannot be
    block -= block % int(m) if m else 0
    for start in range(0, W.size(1), block):
        end = min(start + block, W.size(1))
        w, u, errors = W[:, start:end].clone(), U[start:end,
                                                  start:end], torch.zeros_like(W[:, start:end])
        mask = None if m else kept(w ** 2 / u.diagonal() ** 2, pattern)
        for j in range(end - start):
            if m and j % int(m) == 0:
                part = slice(j, j + int(m))
                mask = F.pad(kept(w[:, part] ** 2 / u.diagonal()[part] ** 2, pattern), (j, 0))
            errors[:, j] = w[:, j] * (1 - mask[:, j]) / u[j, j]
            out[:, start + j] = w[:, j] * mask[:, j]
            w[:, j:] -= errors[:, j:j + 1] * u[j, j:]
        W[:, end:] -= errors @ U[start:end, end:]
    return pruned(out, pattern)


# --- 3 ARMOR (2510.05528): W = bd(A) S bd(B), S 2:4, A and B block-diagonal -----------------------
# Tiles: A [P, a, a], B [Q, b, b], S, M, Wb [P, Q, a, b], h [Q, b]; given A and B they are
# independent.

PAIRS = torch.tensor([(0, 1), (0, 2), (0, 3), (1, 2), (1, 3), (2, 3)])


def armor_error(A, S, B, Wb):
    """bd(A) S bd(B) - Wb, by tiles.   [P, Q, a, b]"""
    return A[:, None] @ S @ B - Wb


def armor_loss(A, S, B, Wb, h):
    """Σ h_j error²: the proxy loss, not normalised."""
    return (armor_error(A, S, B, Wb) ** 2 * h[:, None]).sum()


def core_step(A, S, M, B, Wb, h, group):
    """The exact best 2 of 4 in one group a tile, with their values; group [P, Q] counts rows x
    fours. -> S, M

    With the group zeroed and R = (ASB - Wb) √h:  v = B̃ Rᵀ a,  G = B̃ B̃ᵀ;  of the 6 pairs the one
    with the largest vᵀ G⁻¹ v, at the values -G⁻¹ v / ‖a‖².
    """
    P, Q, a, b = S.shape
    tile = torch.arange(P * Q, device=S.device)
    flat, mask = S.reshape(P * Q, -1, 4).clone(), M.reshape(P * Q, -1, 4).clone()  # [PQ, groups, 4]
    group = group.flatten()
    flat[tile, group] = 0.0
    S = flat.view_as(S)
    row, four = group // (b // 4), group % (b // 4)
    at = A.repeat_interleave(Q, 0)[tile, :, row]                                         # [PQ, a]
    Bt = (B * h.sqrt()[:, None]).repeat(P, 1, 1).unflatten(1, (-1, 4))[tile, four]      # [PQ, 4, b]
    R = (armor_error(A, S, B, Wb) * h.sqrt()[:, None]).flatten(0, 1)                    # [PQ, a, b]
    v = torch.einsum("tkb,tab,ta->tk", Bt, R, at)                                        # [PQ, 4]
    G = Bt @ Bt.mT + 1e-9 * torch.eye(4).to(S)
    i, j = PAIRS.to(S.device).T
    vi, vj, gii, gjj, gij = v[:, i], v[:, j], G[:, i, i], G[:, j, j], G[:, i, j]         # [PQ, 6]
    det = (gii * gjj - gij ** 2).clamp(min=1e-30)
    si, sj = (gjj * vi - gij * vj) / det, (gii * vj - gij * vi) / det
    best = (vi * si + vj * sj).argmax(1)                                                 # [PQ]
    size = (at ** 2).sum(1) + 1e-8
    mask[tile, group] = 0.0
    for pick, value in ((i[best], si[tile, best]), (j[best], sj[tile, best])):
        flat[tile, group, pick] = -value / size
        mask[tile, group, pick] = 1.0
    return flat.view_as(M), mask.view_as(M)


def block_of(size, block):
    """The largest block up to `block` that tiles `size` and is a multiple of 4."""
    fits = [b for b in range(4, min(block, size) + 1, 4) if size % b == 0]
    if not fits:
        raise UserError(f"no block of 4 to {block} (--block) tiles a side of {size}, which must be a "
                        "multiple of 4")
    return fits[-1]


def armor(W, h, generator, trace, *, block: Count = 8, iterations: Count = 300,
          lr: Positive = 1e-3):
    """ARMOR, 2510.05528: Adam on A, B, S, then core_step on one group a tile, drawn by the
    gradient's size.

    Starts at NoWag-P and never gets worse: an Adam step that raises the loss is taken back and lr
    halved (ours; the released code does not). trace gets the relative loss after every iteration.
    Defaults are ours, for small layers; the paper's are block 128, 20,000 iterations, lr 1e-4.
    """
    Wb, r1, r2 = normalise(W)
    (m, n), h = W.shape, mend(h)
    a, b = block_of(m, block), block_of(n, block)
    M = kept(Wb ** 2 * h, "2:4")
    tiles = lambda X: X.view(m // a, a, n // b, b).transpose(1, 2).contiguous()       # [P, Q, a, b]
    Wb, M, h, total = tiles(Wb), tiles(M), h.view(-1, b), (Wb ** 2 * h).sum().clamp(min=1e-30)
    x = dict(A=torch.eye(a).to(W).repeat(m // a, 1, 1), B=torch.eye(b).to(W).repeat(n // b, 1, 1),
             S=Wb * M)
    first, second = ({k: torch.zeros_like(v) for k, v in x.items()} for _ in "mv")
    loss, t = armor_loss(x["A"], x["S"], x["B"], Wb, h), 0
    trace.append((loss / total).item())                          # NoWag-P's
    for _ in range(iterations):
        # the continuous step: Adam on all three, within the mask, taken back if it does not help
        A, B, S = x["A"], x["B"], x["S"]
        E = 2 * armor_error(A, S, B, Wb) * h[:, None] / total                         # [P, Q, a, b]
        grad = dict(A=(E @ (S @ B).mT).sum(1), B=((A[:, None] @ S).mT @ E).sum(0),
                    S=(A.mT[:, None] @ E @ B.mT) * M)
        t += 1
        trial = {}
        for k, g in grad.items():
            first[k].mul_(0.9).add_(g, alpha=0.1)
            second[k].mul_(0.999).addcmul_(g, g, value=0.001)
            step = first[k] / (1 - 0.9 ** t) / ((second[k] / (1 - 0.999 ** t)).sqrt() + 1e-8)
            trial[k] = x[k] - lr * (step * M if k == "S" else step)
        after = armor_loss(trial["A"], trial["S"], trial["B"], Wb, h)
        if after < loss:
            x, loss = trial, after
        else:
            lr /= 2
        # the sparse core: one group a tile, by |gradient| of all four entries; exact, so it never
        # raises
        E = 2 * armor_error(x["A"], x["S"], x["B"], Wb) * h[:, None] / total
        size = (x["A"].mT[:, None] @ E @ x["B"].mT).abs().unflatten(-1, (-1, 4)).sum(-1)
        chance = size.flatten(0, 1).flatten(1).cpu() + 1e-30                          # [PQ, groups]
        group = torch.multinomial(chance, 1, generator=generator).view(size.shape[:2]).to(W.device)
        S, flipped = core_step(x["A"], x["S"], M, x["B"], Wb, h, group)
        after = armor_loss(x["A"], S, x["B"], Wb, h)
        if after <= loss:
            for state in (first, second):
                state["S"] = state["S"] * (flipped * M)  # stale for an entry that comes back
            x, M, loss = x | dict(S=S), flipped, after
        trace.append((loss / total).item())
    A = x["A"] * r2.view(-1, a)[:, :, None]                                         # fold the norms
    B = x["B"] * r1.view(-1, b)[:, None]
    return pack_armor(A, x["S"].transpose(1, 2).reshape(m, n), B)


# --- 4 codes --------------------------------------------------------------------------------------


def rtn(W, *, bits: Literal[2, 3, 4, 8] = 4, group: Range("[-1, inf)") = 32, symmetric=False):
    """Round to nearest, a scale and a zero for every `group` inputs of a row (kernels.quantize)."""
    check_bits(bits, group)
    codes, scale, zero = quantize(W, bits, group, symmetric)
    return pack_int(codes, scale, zero, bits=bits, group=group)


def gptq(W, H, *, bits: Literal[2, 3, 4, 8] = 4,
         group: Range("[-1, inf)") = 32, damp: Positive = 0.01, act_order=False):
    """GPTQ (2210.17323): columns in order; each one's rounding error goes to the columns behind it.

    Scale and zero of a group are of the weights as they are when it begins. A diagonal H gives RTN.
    act_order: the inputs of most energy first (stored in that order, so that groups stay
    neighbours)."""
    check_bits(bits, group)
    order = (H.diagonal().argsort(descending=True, stable=True) if act_order
             else torch.arange(len(H), device=H.device))
    W, U = alive(W, H)[:, order], inverse_factor(H[order][:, order], damp)
    size = W.size(1) if group < 0 else group
    codes, scales, zeros = torch.zeros_like(W, dtype=torch.int), [], []
    for start in range(0, W.size(1), size):
        end = min(start + size, W.size(1))
        _, scale, zero = quantize(W[:, start:end], bits, -1)                           # [m, 1] each
        errors = torch.zeros_like(W[:, start:end])
        for j in range(start, end):
            q = ((W[:, j:j + 1] / scale).round() + zero).clamp(0, 2 ** bits - 1)         # [m, 1]
            codes[:, j] = q[:, 0].int()
            errors[:, j - start] = (W[:, j] - ((q - zero) * scale)[:, 0]) / U[j, j]
            W[:, j:end] -= errors[:, j - start, None] * U[j, j:end]
        W[:, end:] -= errors @ U[start:end, end:]
        scales.append(scale)
        zeros.append(zero)
    layer = pack_int(codes, torch.cat(scales, 1), torch.cat(zeros, 1), bits=bits, group=size)
    return reading(layer, order) if act_order else layer


def reading(layer, order=None, **options):
    """The packed layer with PackedLinear's options, its columns said to be the inputs `order`."""
    spec, state = layer.spec() | options, dict(layer.named_buffers())
    if order is not None:
        spec, state = spec | dict(order=True), state | dict(order=order.to(order_dtype(len(order))))
    return packed((layer.out_features, layer.in_features), None, spec, state)


def columns(W, U, width):
    """GPTQ with a width for every column and one range a row. -> codes [m, n], lo, hi [m], losses
    [n]

    The loss of a column is Σ_i ((w - q)/U_jj)² / 2."""
    W, levels = W.clone(), 2.0 ** width.float()
    lo, hi = (x.half().float() for x in (W.amin(1).clamp(max=0), W.amax(1).clamp(min=0)))
    codes, losses = torch.zeros_like(W, dtype=torch.int), W.new_zeros(W.size(1))
    scale, zero = column_scale(lo, hi, levels)                                           # [m, n]
    for j in range(W.size(1)):
        q = ((W[:, j] / scale[:, j]).round() + zero[:, j]).clamp(min=0).minimum(levels[j] - 1)
        codes[:, j] = q.int()
        value = (q - zero[:, j]) * scale[:, j] * (width[j] > 0)
        error = (W[:, j] - value) / U[j, j]
        losses[j] = (error ** 2).sum() / 2
        W[:, j:] -= error[:, None] * U[j, j:]
    return codes, lo, hi, losses


def widths_of(losses, bits, most=8):
    """BAQ's optimum, in whole bits:  R_j = R + ½ log2(c_j / GM(c)),  repaired to Σ R_j = n R
    exactly.

    The repair rounds down, then gives the bits left to the largest remainders; 0 to `most` bits a
    column.
    """
    real = bits + (losses.clamp(min=1e-30).log2() - losses.clamp(min=1e-30).log2().mean()) / 2
    lo, hi = -64.0, 64.0  # a shift, so that the clamped ones sum to n R
    for _ in range(60):
        mid = (lo + hi) / 2
        lo, hi = (mid, hi) if (real + mid).clamp(0, most).mean() < bits else (lo, mid)
    real = (real + hi).clamp(0, most)
    width = real.floor()
    extra = round(bits * len(real) - width.sum().item())
    width[(real - width).argsort(descending=True, stable=True)[:max(0, extra)]] += 1
    return width.clamp(max=most).int()


def baq(W, H, *, bits: Range("[1, 8]") = 3, allocate=True, damp: Positive = 0.01):
    """BAQ (2506.05664): bits for each input column, so that all lose alike; one range a row, no
    groups.

    The losses are those of GPTQ at `bits` for all, whose widths become R_j. ours: whole bits (the
    paper counts levels that are no powers of two), and both passes on one layer. allocate False:
    every column has `bits`.
    """
    W, U = alive(W, H), inverse_factor(H, damp)
    width = torch.full((W.size(1),), bits, device=W.device)
    if not 1 <= bits <= 8:
        raise UserError(f"--bits {bits}: 1 to 8")
    codes, lo, hi, losses = columns(W, U, width)
    if allocate:
        width = widths_of(losses, bits)
        codes, lo, hi, _ = columns(W, U, width)
    return stored(W, columns_state(codes, width, lo, hi))


def mixed(W, h, generator, *, share: Share = 0.25, group: Count = 16,
          by: Literal["sensitivity", "range", "random"] = "sensitivity"):
    """2-bit groups, and 4 bits for the `share` of column groups that need them (after 2311.16442).

    sensitivity: mean h of the group times the mean squared range of its rows;  range: the latter
    alone; random. Scales are 4-bit codes themselves. ours: the layout, of which the paper's
    abstract says only that it is aligned, and a group's width for all rows.
    """
    if not 0 <= share <= 1 or group < 1 or W.size(1) % group:
        raise UserError(f"--share {share} --group {group}: a share of 0 to 1, and a group that divides "
                        f"{W.size(1)} inputs, like {math.gcd(max(group, 4), W.size(1))}")
    w = W.unflatten(1, (-1, group))                                                 # [m, groups, g]
    spread = ((w.amax(-1) - w.amin(-1)) ** 2).mean(0)                                    # [groups]
    scores = dict(sensitivity=lambda: spread
                  * mend(h).view(-1, group).mean(1), range=lambda: spread,
                  random=lambda: torch.rand(len(spread), generator=generator).to(W.device))
    if by not in scores:
        raise UserError(f"--by {by}{nearest(by, scores)}")
    wide = torch.zeros_like(spread, dtype=torch.bool)
    wide[scores[by]().argsort(descending=True)[:round(share * len(spread))]] = True
    return stored(W, mixed_state(W, wide, group))


def largest_power(n, most):
    """The largest power of two that divides n and is at most `most`."""
    return min(n & -n, 1 << most.bit_length() - 1)


def w4a4(W, absmax, *, bits: Literal[2, 3, 4, 8] = 4, act: Range("[2, 8]") = 4,
         group: Range("[-1, inf)") = 32, block=0, wide=False, order=False, tau=5.0, rotate=0):
    """Weights and activations in few bits, both rounded; activations a token at a time (simulated).

    block: activations have a scale for every so many inputs, not for all. wide, COMET (2410.12168):
    blocks with an input that rises above tau times the median keep 8 bits (ours: tau);  order:
    inputs by their largest activation, so that such blocks are few. rotate, as HALO (2501.02625): W
    H and x H by a Hadamard matrix of that size, which spreads outliers.
    """
    if not 2 <= act <= 8 or wide and not block or order and rotate:
        raise UserError(f"--act {act} --block {block} --rotate {rotate}: activations of 2 to 8 bits; wide "
                        "blocks need a --block; inputs are either ordered or rotated")
    block, rotate = (largest_power(len(absmax), x) if x else 0 for x in (block, rotate))
    at = absmax.argsort(descending=True,
                        stable=True) if order else torch.arange(len(absmax)).to(W.device)
    big = (absmax > tau * absmax.median())[at].view(-1, block or len(absmax)).any(1)     # [blocks]
    mask = sum(1 << b for b in big.nonzero().flatten().tolist()) if wide else 0
    options, W = dict(rotate=rotate, act=[act, block, mask]), W[:, at]
    layer = rtn(kernels.rotate(W, rotate) if rotate else W, bits=bits, group=group)
    return reading(layer, at if order else None, **options)


def mxfp4(W, *, rotate=0):
    """MXFP4, Quartet's format (2505.14669): E2M1 codes, a power of two for every 32 inputs of a
    row.

    rotate: by a Hadamard matrix of that size first, which makes them Gaussian."""
    rotate = largest_power(W.size(1), rotate) if rotate else 0
    x = kernels.rotate(W, rotate) if rotate else W
    return stored(W, mxfp4_state(x), **(dict(rotate=rotate) if rotate else {}))


def nearest_code(X, w, C, rows=16384):
    """argmin_k Σ_t w_t (x_t - c_kt)² of every vector, a piece at a time.   X, w [N, d], C [K, d] ->
    [N]"""
    return torch.cat([(b @ (C * C).T - 2 * (a * b) @ C.T).argmin(1)
                      for a, b in zip(X.split(rows), w.split(rows))])


def seeds(X, w, K, generator):
    """k-means++ on a subsample: each next centre is one of K random points (of 256 at most: ours),
    by its
    distance to the nearest centre so far, clipped at 1.   -> [K, d]"""
    pick = lambda n: torch.randint(len(X), (n,), generator=generator).to(X.device)
    C = X[pick(1)]
    while len(C) < K:
        at = pick(min(K, 256))
        x, weight = X[at], w[at]
        far = (weight @ (C * C).T - 2 * (x * weight) @ C.T).amin(1) + (weight * x * x).sum(1)  # [K]
        p = far.clamp(1e-12, 1).cpu()
        C = torch.cat([C, x[torch.multinomial(p, 1, generator=generator).to(X.device)]])
    return C


def kmeans(X, w, K, generator, rounds=100):
    """Weighted k-means: (codebook [K, d], codes [N]); an empty cluster restarts at the worst-served
    point."""
    C, old = seeds(X, w, K, generator), None
    for _ in range(rounds):
        code = nearest_code(X, w, C)
        if old is not None and torch.equal(code, old):
            break
        weight = torch.zeros_like(C).index_add(0, code, w)                               # [K, d]
        C = torch.zeros_like(C).index_add(0, code, X * w) / (weight + 1e-8)
        empty = (weight.sum(1) == 0).nonzero().flatten()[:len(X)]
        if len(empty):
            far = ((X - C[code]) ** 2 * w).sum(1)
            C[empty] = X[far.topk(len(empty)).indices]
        old = code
    return C, nearest_code(X, w, C)


def vectors(X, dim):
    """Rows cut into vectors of `dim` neighbours, padded by their mean.   [m, n] -> [m ceil(n/d),
    d]"""
    extra = -X.size(1) % dim
    return torch.cat([X, X.mean().expand(len(X), extra)], 1).view(-1, dim)


def code_size(W, bits, dim):
    """dim, or for 0 what makes a codebook of 64 vectors (ours: layers here are small; NoWag's is
    6)."""
    dim = dim or max(1, 6 // max(1, bits))
    if not 1 <= bits * dim <= 16:
        raise UserError(f"--bits {bits} --dim {dim}: a code has 1 to 16 bits, bits times dim")
    if 2 ** (bits * dim) * dim > W.numel():
        raise UserError(f"--bits {bits} --dim {dim}: a codebook larger than the layer; lower --dim")
    return dim


def nowag_vq(W, h, generator, *,
             bits: Range("[1, 16]") = 2, dim=0, rounds: Count = 100, norms=True, weights=True):
    """NoWag-VQ (2504.14569): `dim` neighbours of the normalised weight as one of 2^(bits dim),
    weighted by h.

    norms False: of the weight itself;  weights False: unweighted;  both: plain k-means.
    """
    dim = code_size(W, bits, dim)
    Wb, r1, r2 = normalise(W) if norms else (W, None, None)
    h = mend(h) / mend(h).mean() if weights else torch.ones_like(h)
    w = F.pad(h.clamp(min=1e-6), (0, -W.size(1) % dim)).expand(len(W), -1).reshape(-1, dim)
    C, code = kmeans(vectors(Wb, dim), w, 2 ** (bits * dim), generator, rounds)
    return pack_vq(code.view(len(W), -1), C, r1, r2, inputs=W.size(1))


def gptvq(W, H, generator, *,
          bits: Range("[1, 16]") = 2, dim=0, rounds: Count = 100, damp: Positive = 0.01):
    """GPTVQ (2402.15319), one codebook a matrix: `dim` columns at a time, their error to the
    columns behind.

    k-means and assignment weigh an entry by 1/U_jj²; error E = (w - q) U_BB⁻¹. ours: no codebook
    update afterwards, no compression of the codebook.
    """
    dim = code_size(W, bits, dim)
    extra, n = -W.size(1) % dim, W.size(1)
    W, U = alive(W, H), inverse_factor(H, damp)
    weight = 1 / U.diagonal() ** 2
    weight = F.pad(weight / weight.mean(), (0, extra), value=1e-6)
    C, _ = kmeans(vectors(W, dim), weight.expand(len(W), -1).reshape(-1, dim), 2 ** (bits * dim),
                  generator, rounds)
    W, C, codes = F.pad(W, (0, extra)), C.bfloat16().float(), []
    for j in range(0, n, dim):
        end = min(j + dim, n)
        code = nearest_code(W[:, j:j + dim], weight[j:j + dim].expand(len(W), -1), C)    # [m]
        error = W[:, j:end] - C[code][:, :end - j]
        error = torch.linalg.solve_triangular(U[j:end, j:end], error, upper=True, left=False)
        W[:, end:n] -= error @ U[j:end, end:]
        codes.append(code)
    return pack_vq(torch.stack(codes, 1), C, inputs=n)


METHODS = dict(dense=dense, magnitude=magnitude, wanda=wanda, sparsegpt=sparsegpt, nowag_p=nowag_p,
               lowrank24=lowrank24, dprune=dprune, armor=armor, rtn=rtn, gptq=gptq, baq=baq,
               mixed=mixed,
               nowag_vq=nowag_vq, gptvq=gptvq, w4a4=w4a4, mxfp4=mxfp4) | structure.STRUCTURES

# --- 5 calibrate ----------------------------------------------------------------------------------


def calibration(c, tok, data):
    """--samples windows of --context tokens at random places of shuffled training text.   [samples,
    T]"""
    g = torch.Generator().manual_seed(c.seed)
    ids = text.stream(text.shuffled(data, g), tok, 4 * c.samples * c.context)
    if len(ids) <= c.context:
        raise UserError(f"--data {data}: {len(ids)} tokens to calibrate on: fewer than --context")
    at = torch.randint(len(ids) - c.context, (c.samples,), generator=g)
    return torch.stack([ids[i:i + c.context] for i in at.tolist()])


def linears(block):
    """{name: layer} of a block's linear layers, in order."""
    return {name: m for name, m in block.named_modules() if name.endswith("_proj")}


@torch.no_grad()
def watch(block, inputs, where, full):
    """One pass of a block over its inputs -> (its outputs, {name: statistics of the layer's
    inputs}).

    h = 2 mean x²; H = 2 mean x xᵀ where it is asked for (full); absmax and absmean of every
    input."""
    sums = {}

    def note(name):
        def hook(layer, args):
            x = args[0].flatten(0, -2).float()                                           # [N, n]
            s = sums.setdefault(name,
                                dict(n=0, h=0.0, H=0.0, absmean=0.0, absmax=x.new_zeros(x.size(1))))
            s["n"] += len(x)
            s["h"] = s["h"] + 2 * (x ** 2).sum(0)
            s["absmean"] = s["absmean"] + x.abs().sum(0)
            s["absmax"] = torch.maximum(s["absmax"], x.abs().amax(0))
            if full:
                s["H"] = s["H"] + 2 * x.T @ x
        return hook
    hooks = [m.register_forward_pre_hook(note(name)) for name, m in linears(block).items()]
    outputs = [block(x, *where) for x in inputs]
    for hook in hooks:
        hook.remove()
    for s in sums.values():
        n = s.pop("n")
        s |= {k: s[k] / n for k in ("h", "H", "absmean")}
    return outputs, sums


def gradients(model, tokens, micro=8):
    """{name: (mean g, mean g²)} of every linear layer's weight over micro-batches of next-token
    loss."""
    weights = {name: m.weight for name, m in model.named_modules() if name.endswith("_proj")}
    sums = {name: [torch.zeros_like(w), torch.zeros_like(w)] for name, w in weights.items()}
    parts = tokens.split(micro)
    for w in weights.values():
        w.requires_grad_(True)
    for part in tqdm(parts, desc="gradients", disable=None, leave=False):
        loss = -token_logprobs(model, part).sum() / (part.numel() - len(part))
        for (g1, g2), g in zip(sums.values(), torch.autograd.grad(loss, list(weights.values()))):
            g1.add_(g, alpha=1 / len(parts))
            g2.addcmul_(g, g, value=1 / len(parts))
    model.requires_grad_(False)
    return sums


# --- 6 smooth: exactly equivalent models whose weights round better -------------------------------
# A scale s on the inputs of some layers: their columns times s, the norm or the rows before them
# over s.


def rounded(f, W):
    """W as the run's rounding would leave it, without data: round to nearest at its --bits and
    --group."""
    return rtn(W, **{k: v for k, v in f.method.keywords.items() if k in hyper(rtn)}).dequantize()


def sharing(block, config):
    """[(names of layers with one input, what makes it, name of the part whose output counts)] of a
    block.

    What makes it is a norm's weight, or the rows of the layer before; with grouped queries a value
    feeds several heads, so there o_proj has nobody to fold into and is left out."""
    attention, mlp = block.self_attn, block.mlp
    out = [(["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"], block.input_layernorm,
            "self_attn"),
           (["mlp.gate_proj", "mlp.up_proj"], block.post_attention_layernorm, "mlp"),
           (["mlp.down_proj"], mlp.up_proj, "mlp.down_proj")]
    if config.num_attention_heads == config.num_key_value_heads:
        out.insert(1, (["self_attn.o_proj"], attention.v_proj, "self_attn.o_proj"))
    return out


def fold(block, names, maker, s):
    """Scale the inputs of the layers by 1/s and their columns by s, in place."""
    for name in names:
        block.get_submodule(name).weight.mul_(s)
    maker.weight.div_(s[:, None] if maker.weight.dim() == 2 else s)
    if getattr(maker, "bias", None) is not None:
        maker.bias.div_(s)


def smooth_none(model, inputs, where, f):
    """Nothing."""


@torch.no_grad()
def awq(model, inputs, where, f, *, points: Count = 20, clip=True):
    """AWQ (2306.00978):  s = mean|x|^r / √(max min), the r of 0, 1/20 … whose rounded part errs
    least.

    The part is attention, the MLP or the layer itself, on the first calibration batch. Then (clip)
    each group's range shrinks to what leaves its own output closest, q and k excepted, here by the
    exact error d H dᵀ of the group (ours: the authors use 512 tokens).
    """
    if points < 1:
        raise UserError(f"--points {points}: at least 1")
    for i, block in enumerate(tqdm(model.layers, desc="awq", disable=None, leave=False)):
        at = where(i)
        for names, maker, part in sharing(block, model.config):
            _, stats = watch(block, inputs, at, True)
            seen = []
            hook = block.get_submodule(part).register_forward_pre_hook(lambda m, args: seen.append(args))
            block(inputs[0], *at)
            hook.remove()
            run, layers = block.get_submodule(part), [block.get_submodule(n) for n in names]
            whole, old = run(*seen[0]), [layer.weight.clone() for layer in layers]
            mean, best = stats[names[0]]["absmean"], (math.inf, None)
            for k in range(points):
                s = (mean ** (k / points)).clamp(min=1e-4)
                s = s / (s.max() * s.min()).sqrt()
                for layer, W in zip(layers, old):
                    layer.weight.copy_(rounded(f, W * s) / s)
                error = ((run(*seen[0]) - whole) ** 2).mean().item()
                best = min(best, (error, s), key=lambda x: x[0])
            s = best[1]
            for layer, W in zip(layers, old):
                layer.weight.copy_(W)
            fold(block, names, maker, s)
            if clip:
                for name, layer in zip(names, layers):
                    if not name.endswith(("q_proj", "k_proj")):
                        clip_groups(layer.weight, stats[name]["H"] / s / s[:, None], f)
        inputs = [block(x, *at) for x in inputs]


def clip_groups(W, H, f):
    """Clamp each group of a row to the largest of 1, .95 … .55 of its range that errs least, in
    place."""
    group = f.method.keywords["group"]
    size = W.size(1) if group < 0 or W.size(1) % group else group
    w = W.unflatten(1, (-1, size))                                                       # [m, G, g]
    span = torch.arange(H.size(0), device=H.device).view(-1, size)                       # [G, g]
    blocks, best, kept_at = H[span[:, :, None], span[:, None]], None, None               # [G, g, g]
    for i in range(10):
        edge = w.abs().amax(-1, keepdim=True) * (1 - i / 20)
        clamped = w.clamp(-edge, edge)
        d = rounded(f, clamped.flatten(1)).view_as(w) - w
        error = torch.einsum("mGi,Gij,mGj->mG", d, blocks, d)
        better = torch.ones_like(error, dtype=torch.bool) if best is None else error < best
        best = error if best is None else torch.where(better, error, best)
        kept_at = clamped if kept_at is None else torch.where(better[..., None], clamped, kept_at)
    W.copy_(kept_at.flatten(1))


@torch.no_grad()
def smoothquant(model, inputs, where, f, *, points: Count = 20):
    """SmoothQuant+ (2312.03788):  s = max|x|^α / max|W|^(1-α),  one α for the whole model.

    α of 0, 1/20 … 1, or no smoothing, by the summed squared error of the blocks' outputs when the
    blocks before are rounded too, on the first calibration batch. ours: the grid and the candidate
    "none".
    """
    whole, stats, x = [], [], inputs
    for i, block in enumerate(model.layers):
        x, s = watch(block, x, where(i), False)
        whole.append(x[0])
        stats.append(s)
    best = (math.inf, None)
    for k in tqdm([None, *range(points + 1)], desc="smoothquant", disable=None, leave=False):
        x, error = inputs[0], 0.0
        for i, block in enumerate(model.layers):
            trial = copy.deepcopy(block)
            smooth_block(trial, model.config, stats[i], k, points)
            for layer in linears(trial).values():
                layer.weight.copy_(rounded(f, layer.weight))
            x = trial(x, *where(i))
            error += ((x - whole[i]) ** 2).mean().item()
        best = min(best, (error, k), key=lambda x: x[0])
    for i, block in enumerate(model.layers):
        smooth_block(block, model.config, stats[i], best[1], points)


def smooth_block(block, config, stats, k, points):
    """SmoothQuant+'s scales at α = k / points on one block, in place; nothing for None."""
    for names, maker, _ in sharing(block, config) if k is not None else []:
        weight = torch.stack([block.get_submodule(n).weight.abs().amax(0) for n in names]).amax(0)
        alpha, x = k / points, stats[names[0]]["absmax"].clamp(min=1e-5)
        fold(block, names, maker, x ** alpha / weight.clamp(min=1e-5) ** (1 - alpha))


SMOOTH = dict(none=smooth_none, awq=awq, smoothquant=smoothquant)


# --- 7 caches of keys and values: how the result is evaluated (data/kv.py) ------------------------


def full():
    """All keys and values, as they are."""
    return Cache


CACHES = dict(full=full, kivi=kv.coded, evicting=kv.evicting)
AXES = dict(method=METHODS, smooth=SMOOTH, cache=CACHES, kernels=kernels.MODES)

# --- 8 evaluate -----------------------------------------------------------------------------------


@torch.no_grad()
def evaluate(model, windows, batch=16):
    """Mean nats per token of windows [N, T], the first token of each unscored."""
    total = sum(-token_logprobs(model, part).sum().item() for part in windows.split(batch))
    return total / (windows.numel() - len(windows))


@torch.no_grad()
def compare(model, reference, windows, batch=8):
    """Mean KL(reference || model) in nats a token, and how often both have the same likeliest
    token."""
    kl, same, count = 0.0, 0, 0
    for part in windows.split(batch):
        p, q = (torch.log_softmax(m.logits(m(part)[:, :-1]), -1) for m in (reference, model))
        kl += F.kl_div(q, p, log_target=True, reduction="sum").item()
        same += (p.argmax(-1) == q.argmax(-1)).sum().item()
        count += p[..., 0].numel()
    return kl / count, same / count


def speed(model, prompt, seconds=0.5):
    """Tokens a second of one row, decoded greedily after a prompt of 4; more until that takes a
    while."""
    tokens, took = 2, 0.0
    while took < seconds and tokens < min(64, model.config.max_position_embeddings // 4):
        tokens, began = 2 * tokens, time.perf_counter()
        generate(model, [prompt[:4].tolist()], tokens, temperature=0, stop=())
        took = time.perf_counter() - began
    return tokens / took


def through_cache(model, tokens, held, c, f, run):
    """The second half of every window decoded token by token through --cache, and through the full
    one."""
    make = f.cache(**{k: dict(model=model, tokens=tokens)[k] for k in needs(f.cache)})
    whole, bytes_whole = kv.cached_nll(model, held, c.context // 2, Cache)
    small, size = kv.cached_nll(model, held, c.context // 2, make)
    run.say(f"  cache {c.cache}: {small:.4f} nats on the second half of each window, {whole:.4f} through the "
            f"full one; {size:.0f} bytes a token, {bytes_whole:.0f}")
    return dict(cache_loss=small, cache_increase=small - whole, cache_bytes=size,
                cache_share=size / bytes_whole)


def as_found(model, folder):
    """The model with everything that is not packed in the dtype in which the folder stores it."""
    file = next(iter(tensors(checkpoint(folder)).values()))
    return model.to(file.get_tensor(next(iter(file.keys()))).dtype)


# --- 9 compress -----------------------------------------------------------------------------------


def compress_layer(layer, have, f, where):
    """(new layer, proxy loss) of one linear layer by the run's method, from what is known of its
    inputs."""
    have = dict(have, W=layer.weight.detach().float())
    try:
        made = f.method(**{k: have[k] for k in needs(f.method)})
    except (UserError, ValueError) as e:
        raise UserError(f"{where}: {e}") from None
    if isinstance(made, PackedLinear):
        made.register_parameter("bias", layer.bias)
        weight = made.dequantize()
    else:
        weight = made
        made = plain_linear(layer, made.to(layer.weight.dtype))
    return made, proxy(have["W"], weight, have["h"])


def blocks(model, tokens, tok, c, f, run):
    """Compress block by block, in place: calibrate one, replace its layers, hand its outputs on.

    -> what the table says of the layers: bits a weight, mean proxy, ARMOR's largest rise and worst
    end."""
    names, g, clock = needs(f.method), torch.Generator().manual_seed(c.seed), time.perf_counter()
    with torch.no_grad():
        cos, sin = (x[:c.context] for x in rope_table(model.config, c.device))
        x = [model.embed_tokens(part) for part in tokens.split(8)]                  # [8, T, D] each
    where = lambda i: (cos, sin, None, i, None, None)
    f.smooth(model, x, where, f)
    grads = gradients(model, calibration(c, tok, c.domain
                                         or c.data).to(c.device)) if "grad" in names else {}
    losses, size, count, rise, end = [], 0, 0, 0.0, 0.0
    for i, block in enumerate(tqdm(model.layers, desc=c.method, disable=None, leave=False)):
        out, stats = watch(block, x, where(i), "H" in names)
        for name, layer in linears(block).items():
            trace, (grad, fisher) = [], grads.get(f"layers.{i}.{name}", (None, None))
            have = stats[name] | dict(generator=g, trace=trace, grad=grad, fisher=fisher)
            new, loss = compress_layer(layer, have, f, f"layer {i}, {name}")
            if trace:  # ARMOR's promise: never worse, step by step
                rise = max([rise, *(b - a for a, b in zip(trace, trace[1:]))])
                assert rise <= 1e-6, f"layer {i}, {name}: ARMOR's proxy loss rose"
                end = max(end, loss / max(trace[0], 1e-9))       # as stored, against NoWag-P's
            losses.append(loss)
            count += layer.weight.numel()                        # a dense layer counts as bfloat16
            size += new.nbytes() if isinstance(new, PackedLinear) else 2 * new.weight.numel()
            parent, _, leaf = name.rpartition(".")
            setattr(block.get_submodule(parent), leaf, new)
        run.log(i + 1, proxy=sum(losses) / len(losses), bits=8 * size / count,
                seconds=time.perf_counter() - clock)
        if c.sequential:
            with torch.no_grad():
                out = [block(part, *where(i)) for part in x]
        x = out
    return dict(bits=8 * size / count, proxy=sum(losses) / len(losses), rise=rise, worst_layer=end)


def restructure(model, teacher, tokens, tok, held, c, f, run):
    """Cut and distil, stage by stage: (the small model, what the table says of it).

    A method of structure.py is a generator: it cuts, we distil what it hands over, it goes on from
    there."""
    g = torch.Generator().manual_seed(c.seed)
    ids = text.stream(text.shuffled(c.data, g), tok, max(1, c.kd_steps * c.kd_batch) * c.context)
    ids = ids[:len(ids) // c.context * c.context].view(-1, c.context)                 # [windows, T]
    order, cut, told, done = torch.randperm(len(ids), generator=g), [], [], 0
    stages = f.method.keywords.get("stages", 1)

    def batch_of(step):
        at = [(done + step) * c.kd_batch + i for i in range(c.kd_batch)]
        return ids[order[[i % len(order) for i in at]]].to(c.device)
    for i, model in enumerate(f.method(model.requires_grad_(), teacher, [*tokens.split(8)], g)):
        cut.append(evaluate(model, held))
        steps = c.kd_steps * (i + 1) // stages - c.kd_steps * i // stages
        if steps:
            losses = structure.distil(model, teacher, batch_of, steps, lr=c.kd_lr, loss=c.kd_loss,
                                      name=c.method)
            told.append(evaluate(model, held))
            run.log(i + 1, cut_nats=cut[-1], distilled_nats=told[-1], train=losses[-1])
        done += steps
    model.requires_grad_(False)
    size = sum(p.numel() for p in model.parameters())
    return model, dict(bits=16.0, parameters=size,
                       share=size / sum(p.numel() for p in teacher.parameters()),
                       cut_loss=cut[-1], first_cut_loss=cut[0])


def open_model(c, f, folder):
    """The model and tokenizer to compress, checked. Raises UserError for what cannot be."""
    model, tok = load(folder, c.device)
    if not isinstance(model, Transformer):
        raise UserError(f"--init {c.init} is a reward model; compress.py takes a language model")
    if model.config.moe and ("teacher" not in needs(f.method) or c.outliers):
        raise UserError(f"--init {c.init} has experts: only methods that cut structure take it, without "
                        "--outliers")
    if any(isinstance(m, PackedLinear) for m in model.modules()) or model.config.shaped:
        raise UserError(f"--init {c.init} is compressed already: start from what it was made of")
    model.requires_grad_(False)
    if c.outliers:
        structure.spread_outliers(model, c.outliers)
    return model, tok


def readers(c, f):
    """{field: (whether this run reads it, what does)} of the fields that not every run reads."""
    structural = "teacher" in needs(f.method)
    fields = dict.fromkeys(("kd_steps", "kd_batch", "kd_lr", "kd_loss"),
                           (structural, "methods that distil"))
    return fields


def check_used(c, f):
    """UserError for an option that this run would not read, and for all else that can be known
    before anything is made: files and folders."""
    structural, pattern = "teacher" in needs(f.method), f.method.keywords.get("pattern", "2:4")
    m = pattern.partition(":")[2]
    kept(torch.zeros(1, max(1, int(m)) if m.isdigit() else 8), pattern)           # written rightly?
    if not needs(f.cache):
        f.cache()
    if c.smooth != "none" and not structural and f.method.func not in (rtn, gptq):
        raise UserError(f"--smooth {c.smooth} goes before --method rtn or gptq, not {c.method}")
    if c.outliers < 0:
        raise UserError(f"--outliers {c.outliers}: a factor above 0, or 0 for none")
    for key, idle in (("smooth", structural and c.smooth != "none"),
                      ("sequential", structural and c.sequential),
                      ("domain", c.domain and "grad" not in needs(f.method))):
        if idle:
            raise UserError(f"--{key} {getattr(c, key)}: --method {c.method} does not read it; leave it out")
    for name in filter(None, (c.data, c.domain)):
        if name != "stdlib":
            text.documents(name)
    most = sft.find(c.init, c.config, make=False)
    if c.context > most:
        raise UserError(f"--context {c.context}: {c.init} takes {most} tokens at most; lower it")


def train(c, f):
    """One run: load, calibrate and compress block by block, evaluate, save. -> the numbers of the
    table."""
    check_used(c, f)
    folder = sft.find(c.init, c.config, device=c.device, seed=c.seed)
    kernels.use(c.kernels)
    with Run(c, f, "compress", CURVES) as run:
        if "result" in run.info:
            run.say(f"  finished already: {run.last}")
            return run.info["result"]
        model, tok = open_model(c, f, folder)
        held = text.stream(text.documents(c.data, "val"), tok, c.windows * c.context)
        if len(held) < c.context:
            raise UserError(f"--data {c.data}: {len(held)} tokens to evaluate on: more text, or a --context "
                            f"below {c.context}")
        held = held[:len(held) // c.context * c.context].view(-1,
                                                              c.context)[:c.windows].to(c.device)
        tokens = calibration(c, tok, c.data).to(c.device)
        before, fast = evaluate(model, held), speed(model, held[0])
        whole = sum(p.numel() for p in model.parameters())
        run.say(f"{run.folder}: {whole / 1e6:.2f} M parameters; calibration: {c.samples} x {c.context} "
                f"tokens of {c.data}; evaluation: {c.data} val, {len(held)} windows of {c.context}, stride "
                f"{c.context}, BOS at documents: {before:.4f} nats, perplexity {math.exp(before):.3f}")
        clock = time.perf_counter()
        if "teacher" in needs(f.method):
            model, told = restructure(model, open_model(c, f, folder)[0], tokens, tok, held, c, f,
                                      run)
        else:
            told = blocks(model, tokens, tok, c, f, run)
        seconds, model = time.perf_counter() - clock, as_found(model, folder)
        run.save(len(model.layers), lambda path: save(model, tok, path))
        after, rate = evaluate(model.float(), held), speed(model, held[0])
        size = sum(p.stat().st_size for p in run.last.glob("*.safetensors"))
        kl, same = compare(model, open_model(c, f, folder)[0], held[:128])
        if c.cache != "full":
            told |= through_cache(model, tokens, held, c, f, run)
        peak, new = peak_bytes(c.device), sum(p.numel() for p in model.parameters())
        what = (f"{whole / 1e6:.2f} to {new / 1e6:.2f} M parameters"
                if "teacher" in needs(f.method) else
                f"{told['bits']:.3f} bits a weight of the blocks, proxy {told['proxy']:.4f}")
        run.say(f"  {c.method}: {after:.4f} nats ({after - before:+.4f}), perplexity {math.exp(after):.3f}; "
                f"KL to the original {kl:.4f}, same top token {same:.1%}\n  {what}; {size / 1e6:.2f} MB on "
                f"disk in all\n  {seconds:.1f} s to compress, {rate:.3g} tokens/s (dense {fast:.3g}), peak "
                f"memory {peak / 1e9:.2f} GB\n  {run.last}")
        return run.finish(loss=after, loss_increase=after - before, dense_loss=before, kl=kl,
                          same_top=same,
                          perplexity=math.exp(after), disk_bytes=size, seconds=seconds,
                          peak_bytes=peak,
                          tokens_per_second=rate, dense_tokens_per_second=fast, **told)


# --- main -----------------------------------------------------------------------------------------


def main(argv=None):
    """python compress.py …: see the docstring above, or --help."""
    return launch("compress", Config, PRESETS, AXES, __doc__, train, argv, readers)


if __name__ == "__main__":
    cli(main)
