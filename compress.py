"""
compress.py - pruning and quantisation: a big checkpoint in, a small one out.

    python compress.py                                   # ARMOR 2:4 on a small base model: a minute or two
    python compress.py --config gptq --init Qwen2.5-0.5B --data stdlib --group 128 --out out/small
    python model.py out/small --prompt "def "            # what it writes opens like any checkpoint

Map      1 config   2 masks   3 ARMOR   4 codes   5 calibrate   6 evaluate   7 compress
Letters  W [m, n] = [out, in] of a linear layer y = W x; N tokens of calibration; h [n], H [n, n] below
preset      paper          idea                                                       reads
magnitude   1506.02626     the largest weights stay                                   nothing
wanda       2306.11695     ... times the norm of their input, compared within a row   h
sparsegpt   2301.00774     column by column, the rest corrected for what was cut      H
nowag_p     2504.14569     ... of the weight normalised by columns, then rows         h
armor       2510.05528     2:4 between two block-diagonal wrappers, fitted            h
rtn         -              round to nearest, a scale a group                          nothing
gptq        2210.17323     ... column by column, the rest corrected                   H
nowag_vq    2504.14569     k-means of normalised vectors, weighted by activations     h
dense       -              nothing is done: the baseline                              nothing
tiny        size           seconds on any CPU, its base model included
Watch    loss_increase on held-out text, at equal bits: bits counts every stored byte of the layers. proxy is
         the h-weighted error of the normalised weight: it ranks NoWag-P against ARMOR, not families
         (SparseGPT has twice the proxy and half the loss). An unstructured mask saves no byte here.
"""
import math
import time
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from tqdm import tqdm

import kernels
import sft
from data import text
from data.run import Run, UserError, cli, launch, needs
from kernels import PackedLinear, pack_armor, pack_int, pack_nm24, pack_vq, quantize
from model import Transformer, load, plain_linear, rope_table, save, token_logprobs

# --- 1 config -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Config:
    """What every run has; what belongs to a method is an argument of its function."""
    config: str = ""             # presets and TOML files, left to right
    init: str = "base:pretrain"  # the checkpoint to compress
    data: str = "stdlib"         # text of calibration (train) and of evaluation (val)
    method: str = "armor"        # which row of METHODS
    samples: int = 64            # calibration windows
    context: int = 128           # their tokens, and those of an evaluation window
    windows: int = 256           # evaluation windows: consecutive, none overlaps, BOS at each document
    sequential: bool = False     # statistics of a block from the compressed blocks before it
    outliers: float = 0.0        # first scale two channels of every norm up by this, the next layers down
    out: str = ""                # run folder (default out/compress/<presets>)
    keep: int = 1                # checkpoints to keep
    seed: int = 0                # of the calibration windows and of a method's draws
    device: str = "auto"         # cpu or cuda
    kernels: str = "auto"        # auto, or torch: the plain definition of every kernel
    resume: bool = False         # a finished run is not made again


PRESETS = dict(
    magnitude=dict(method="magnitude"), wanda=dict(method="wanda", sequential=True),
    sparsegpt=dict(method="sparsegpt", sequential=True), nowag_p=dict(method="nowag_p"),
    armor=dict(method="armor"), rtn=dict(method="rtn"), gptq=dict(method="gptq", sequential=True),
    nowag_vq=dict(method="nowag_vq"), dense=dict(method="dense"),
    tiny=dict(samples=4, context=64, windows=8, iterations=20),
)
CURVES = {"proxy loss": ["proxy"], "seconds": ["seconds"]}

# --- 2 masks ------------------------------------------------------------------------------------------
# h = 2 mean x² of every input, H = 2 mean x xᵀ over the calibration tokens. A method's positional arguments
# name what it reads; it returns the new weight, or the packed layer.


def kept(score, pattern, scope="matrix"):
    """The 1.0s of a mask: "2:4" keeps the 2 largest of every 4 neighbours in a row, "50%" half of all.

    scope of a share: the whole matrix, or each row. Exactly that many, ties by index. UserError for others.
    """
    n, _, m = pattern.partition(":")
    if m.isdigit() and n.isdigit() and 0 < int(n) <= int(m):
        if score.size(1) % int(m):
            raise UserError(f"--pattern {pattern}: {score.size(1)} inputs are no multiple of {m}; "
                            f"take a share, like 50%")
        groups = score.unflatten(1, (-1, int(m)))                                        # [m, groups, M]
        rank = groups.argsort(dim=-1, descending=True, stable=True).argsort(-1)
        return (rank < int(n)).flatten(1).float()
    if not (pattern.endswith("%") and n[:-1].replace(".", "").isdigit() and 0 < float(n[:-1]) <= 100):
        raise UserError(f"--pattern {pattern}: write n:m, like 2:4, or the share that stays, like 50%")
    flat = score.flatten()[None] if scope == "matrix" else score
    count = flat.size(1) - int(flat.size(1) * (1 - float(n[:-1]) / 100))
    top = flat.argsort(dim=1, descending=True, stable=True)[:, :count]
    return torch.zeros_like(flat).scatter(1, top, 1.0).view_as(score)


def pruned(W, pattern):
    """A masked weight as it is stored: 2:4 packed (9 bits a weight), else dense."""
    return pack_nm24(W) if pattern == "2:4" else W


def dense(W):
    """Nothing."""
    return W


def magnitude(W, *, pattern="2:4", scope="matrix"):
    """|W|: no data."""
    return pruned(W * kept(W.abs(), pattern, scope), pattern)


def wanda(W, h, *, pattern="2:4"):
    """Wanda (2306.11695):  |W_ij| ‖x_j‖, compared within each output row."""
    return pruned(W * kept(W.abs() * h.sqrt(), pattern, "row"), pattern)


def normalise(W, eps=1e-5):
    """NoWag's (2504.14569): W = diag(r2) Wb diag(r1), columns first, then rows.   -> Wb, r1 [n], r2 [m]"""
    r1 = W.norm(dim=0) + eps
    r2 = (W / r1).norm(dim=1) + eps
    return W / r1 / r2[:, None], r1, r2


def mend(h):
    """h with what is not finite or not positive replaced by the mean of the rest (dead inputs)."""
    sound = h.isfinite() & (h > 0)
    return torch.where(sound, h, h[sound].mean() if sound.any() else torch.ones_like(h))


def proxy(W, new, h):
    """NoWag's relative error  Σ h_j (Wb - Wb')² / Σ h_j Wb²,  both normalised as W is; 1 for all zeros."""
    Wb, r1, r2 = normalise(W)
    h = mend(h)
    return (((Wb - new / r1 / r2[:, None]) ** 2 * h).sum() / (Wb ** 2 * h).sum()).item()


def nowag_p(W, h, *, pattern="2:4"):
    """NoWag-P (2504.14569):  keep the largest h_j Wb_ij², survivors unchanged; one threshold a matrix."""
    return pruned(W * kept(normalise(W)[0] ** 2 * mend(h), pattern), pattern)


def inverse_factor(H, damp=0.01):
    """U upper, Uᵀ U = (H + damp mean(diag H) I)⁻¹; ten times the damping while there is no such factor."""
    H = H + torch.diag((H.diagonal() == 0).to(H.dtype))                                  # dead inputs
    for _ in range(6):
        L, bad = torch.linalg.cholesky_ex(H + damp * H.diagonal().mean() * torch.eye(len(H)).to(H))
        if not bad:
            return torch.linalg.cholesky(torch.cholesky_inverse(L), upper=True)
        damp *= 10
    raise UserError("the second moment of a layer's inputs has no Cholesky factor: more --samples")


def sparsegpt(W, H, *, pattern="2:4", block=128, damp=0.01):
    """SparseGPT (2301.00774): columns in order; e = w_j/U_jj of what is cut goes to the columns behind.

    The mask is chosen by w²/U_jj², of updated weights: at every group of n:m, or once a block."""
    W, U, out = W.clone(), inverse_factor(H, damp), torch.zeros_like(W)
    n, _, m = pattern.partition(":")
    for start in range(0, W.size(1), block):
        end = min(start + block, W.size(1))
        w, u, errors = W[:, start:end].clone(), U[start:end, start:end], torch.zeros_like(W[:, start:end])
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


# --- 3 ARMOR (2510.05528): W = bd(A) S bd(B), S 2:4, A and B block-diagonal ---------------------------------
# Tiles: A [P, a, a], B [Q, b, b], S, M, Wb [P, Q, a, b], h [Q, b]; given A and B they are independent.

PAIRS = torch.tensor([(0, 1), (0, 2), (0, 3), (1, 2), (1, 3), (2, 3)])


def armor_error(A, S, B, Wb):
    """bd(A) S bd(B) - Wb, by tiles.   [P, Q, a, b]"""
    return A[:, None] @ S @ B - Wb


def armor_loss(A, S, B, Wb, h):
    """Σ h_j error²: the proxy loss, not normalised."""
    return (armor_error(A, S, B, Wb) ** 2 * h[:, None]).sum()


def core_step(A, S, M, B, Wb, h, group):
    """The exact best 2 of 4 in one group a tile, with their values; group [P, Q] counts rows x fours. -> S, M

    With the group zeroed and R = (ASB - Wb) √h:  v = B̃ Rᵀ a,  G = B̃ B̃ᵀ;  of the 6 pairs the one with the
    largest vᵀ G⁻¹ v, at the values -G⁻¹ v / ‖a‖².
    """
    P, Q, a, b = S.shape
    tile = torch.arange(P * Q, device=S.device)
    flat, mask = S.reshape(P * Q, -1, 4).clone(), M.reshape(P * Q, -1, 4).clone()        # [PQ, groups, 4]
    group = group.flatten()
    flat[tile, group] = 0.0
    S = flat.view_as(S)
    row, four = group // (b // 4), group % (b // 4)
    at = A.repeat_interleave(Q, 0)[tile, :, row]                                         # [PQ, a]
    Bt = (B * h.sqrt()[:, None]).repeat(P, 1, 1).unflatten(1, (-1, 4))[tile, four]       # [PQ, 4, b]
    R = (armor_error(A, S, B, Wb) * h.sqrt()[:, None]).flatten(0, 1)                     # [PQ, a, b]
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
    fits = [b for b in range(4, block + 1, 4) if size % b == 0]
    if not fits:
        raise UserError(f"ARMOR: no block of 4 to {block} tiles a side of {size}; raise --block")
    return fits[-1]


def armor(W, h, generator, trace, *, block=8, iterations=300, lr=1e-3):
    """ARMOR, 2510.05528: Adam on A, B, S, then core_step on one group a tile, drawn by the gradient's size.

    Starts at NoWag-P and never gets worse: an Adam step that raises the loss is taken back and lr halved
    (ours; the released code does not). trace gets the relative loss after every iteration.
    Defaults are ours, for small layers; the paper's are block 128, 20,000 iterations, lr 1e-4.
    """
    Wb, r1, r2 = normalise(W)
    (m, n), h = W.shape, mend(h)
    a, b = block_of(m, block), block_of(n, block)
    M = kept(Wb ** 2 * h, "2:4")
    tiles = lambda X: X.view(m // a, a, n // b, b).transpose(1, 2).contiguous()          # [P, Q, a, b]
    Wb, M, h, total = tiles(Wb), tiles(M), h.view(-1, b), (Wb ** 2 * h).sum()
    x = dict(A=torch.eye(a).to(W).repeat(m // a, 1, 1), B=torch.eye(b).to(W).repeat(n // b, 1, 1), S=Wb * M)
    first, second = ({k: torch.zeros_like(v) for k, v in x.items()} for _ in "mv")
    loss, t = armor_loss(x["A"], x["S"], x["B"], Wb, h), 0
    for _ in range(iterations):
        # the continuous step: Adam on all three, within the mask, taken back if it does not help
        A, B, S = x["A"], x["B"], x["S"]
        E = 2 * armor_error(A, S, B, Wb) * h[:, None] / total                            # [P, Q, a, b]
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
        # the sparse core: one group a tile, by |gradient| of all four entries; exact, so it never raises
        E = 2 * armor_error(x["A"], x["S"], x["B"], Wb) * h[:, None] / total
        size = (x["A"].mT[:, None] @ E @ x["B"].mT).abs().unflatten(-1, (-1, 4)).sum(-1)
        chance = size.flatten(0, 1).flatten(1).cpu() + 1e-30                             # [PQ, groups]
        group = torch.multinomial(chance, 1, generator=generator).view(size.shape[:2]).to(W.device)
        S, flipped = core_step(x["A"], x["S"], M, x["B"], Wb, h, group)
        after = armor_loss(x["A"], S, x["B"], Wb, h)
        if after <= loss:
            for state in (first, second):
                state["S"] = state["S"] * (flipped * M)          # stale for an entry that comes back
            x, M, loss = x | dict(S=S), flipped, after
        trace.append((loss / total).item())
    A = x["A"] * r2.view(-1, a)[:, :, None]                                              # fold the norms
    B = x["B"] * r1.view(-1, b)[:, None]
    return pack_armor(A, x["S"].transpose(1, 2).reshape(m, n), B)


# --- 4 codes ------------------------------------------------------------------------------------------


def rtn(W, *, bits=4, group=32, symmetric=False):
    """Round to nearest, a scale and a zero for every `group` inputs of a row (kernels.quantize)."""
    codes, scale, zero = quantize(W, bits, group, symmetric)
    return pack_int(codes, scale, zero, bits=bits, group=group)


def gptq(W, H, *, bits=4, group=32, damp=0.01):
    """GPTQ (2210.17323): columns in order; each one's rounding error goes to the columns behind it.

    Scale and zero of a group are of the weights as they are when it begins. A diagonal H gives RTN."""
    W, U = W.clone(), inverse_factor(H, damp)
    size = W.size(1) if group < 0 else group
    codes, scales, zeros = torch.zeros_like(W, dtype=torch.int), [], []
    for start in range(0, W.size(1), size):
        end = min(start + size, W.size(1))
        _, scale, zero = quantize(W[:, start:end], bits, -1)                             # [m, 1] each
        errors = torch.zeros_like(W[:, start:end])
        for j in range(start, end):
            q = ((W[:, j:j + 1] / scale).round() + zero).clamp(0, 2 ** bits - 1)         # [m, 1]
            codes[:, j] = q[:, 0].int()
            errors[:, j - start] = (W[:, j] - ((q - zero) * scale)[:, 0]) / U[j, j]
            W[:, j:end] -= errors[:, j - start, None] * U[j, j:end]
        W[:, end:] -= errors @ U[start:end, end:]
        scales.append(scale)
        zeros.append(zero)
    return pack_int(codes, torch.cat(scales, 1), torch.cat(zeros, 1), bits=bits, group=size)


def nearest_code(X, w, C, rows=16384):
    """argmin_k Σ_t w_t (x_t - c_kt)² of every vector, a piece at a time.   X, w [N, d], C [K, d] -> [N]"""
    return torch.cat([(b @ (C * C).T - 2 * (a * b) @ C.T).argmin(1)
                      for a, b in zip(X.split(rows), w.split(rows))])


def seeds(X, w, K, generator):
    """k-means++ on a subsample: each next centre is one of K random points (of 256 at most: ours), by its
    distance to the nearest centre so far, clipped at 1.   -> [K, d]"""
    pick = lambda n: torch.randint(len(X), (n,), generator=generator).to(X.device)
    C = X[pick(1)]
    while len(C) < K:
        at = pick(min(K, 256))
        x, weight = X[at], w[at]
        far = (weight @ (C * C).T - 2 * (x * weight) @ C.T).amin(1) + (weight * x * x).sum(1)        # [K]
        p = far.clamp(1e-12, 1).cpu()
        C = torch.cat([C, x[torch.multinomial(p, 1, generator=generator).to(X.device)]])
    return C


def kmeans(X, w, K, generator, rounds=100):
    """Weighted k-means: (codebook [K, d], codes [N]); an empty cluster restarts at the worst-served point."""
    C, old = seeds(X, w, K, generator), None
    for _ in range(rounds):
        code = nearest_code(X, w, C)
        if old is not None and torch.equal(code, old):
            break
        weight = torch.zeros_like(C).index_add(0, code, w)                               # [K, d]
        C = torch.zeros_like(C).index_add(0, code, X * w) / (weight + 1e-8)
        empty = (weight.sum(1) == 0).nonzero().flatten()
        if len(empty):
            far = ((X - C[code]) ** 2 * w).sum(1)
            C[empty] = X[far.topk(min(len(empty), len(X))).indices][:len(empty)]
        old = code
    return C, nearest_code(X, w, C)


def nowag_vq(W, h, generator, *, bits=2, dim=0, rounds=100):
    """NoWag-VQ (2504.14569): `dim` neighbours of the normalised weight as one of 2^(bits dim), weighted by h.

    dim 0: 6 // bits, so that a codebook has 64 vectors (ours: layers here are small; the paper's dim is 6).
    """
    dim = dim or max(1, 6 // bits)
    if not 1 <= bits * dim <= 16:
        raise UserError(f"--bits {bits} --dim {dim}: a code has 1 to 16 bits, bits times dim")
    Wb, r1, r2 = normalise(W)
    h = mend(h) / mend(h).mean()
    extra = -W.size(1) % dim
    X = torch.cat([Wb, Wb.mean().expand(len(W), extra)], 1).view(-1, dim)                # [N, d]
    w = F.pad(h.clamp(min=1e-6), (0, extra)).expand(len(W), -1).reshape(-1, dim)
    C, code = kmeans(X, w, 2 ** (bits * dim), generator, rounds)
    return pack_vq(code.view(len(W), -1), C, r1, r2)


METHODS = dict(dense=dense, magnitude=magnitude, wanda=wanda, sparsegpt=sparsegpt, nowag_p=nowag_p,
               armor=armor, rtn=rtn, gptq=gptq, nowag_vq=nowag_vq)
AXES = dict(method=METHODS, kernels=kernels.MODES)

# --- 5 calibrate --------------------------------------------------------------------------------------


def stream(documents, tok, wanted):
    """At least `wanted` ids of documents, if they have as many: BOS document EOS BOS document …"""
    ids = []
    for document in documents:
        ids += [*tok.prompt(""), *tok.encode(document), tok.eos]
        if len(ids) > wanted:
            break
    return torch.tensor(ids)


def calibration(c, tok):
    """--samples windows of --context tokens at random places of shuffled training text.   [samples, T]"""
    g, documents = torch.Generator().manual_seed(c.seed), text.documents(c.data, "train")
    order = torch.randperm(len(documents), generator=g).tolist()
    ids = stream((documents[i] for i in order), tok, 4 * c.samples * c.context)
    if len(ids) <= c.context:
        raise UserError(f"--data {c.data}: {len(ids)} tokens to calibrate on: fewer than --context")
    at = torch.randint(len(ids) - c.context, (c.samples,), generator=g)
    return torch.stack([ids[i:i + c.context] for i in at.tolist()])


def linears(block):
    """{name: layer} of a block's linear layers, in order."""
    return {name: m for name, m in block.named_modules() if name.endswith("_proj")}


@torch.no_grad()
def watch(block, inputs, where, full):
    """One pass of a block over its inputs -> (its outputs, {name: (h, H or None)}); full: H, not only h."""
    sums = {}

    def note(name):
        def hook(layer, args):
            x = args[0].flatten(0, -2).float()                                           # [N, n]
            s = sums.setdefault(name, [0, 0.0, 0.0])
            s[0], s[1] = s[0] + len(x), s[1] + (x ** 2).sum(0)
            s[2] = s[2] + x.T @ x if full else None
        return hook
    hooks = [m.register_forward_pre_hook(note(name)) for name, m in linears(block).items()]
    outputs = [block(x, *where) for x in inputs]
    for hook in hooks:
        hook.remove()
    return outputs, {name: (2 * h / n, 2 * H / n if full else None) for name, (n, h, H) in sums.items()}


def spread_outliers(model, factor, channels=2):
    """An exactly equivalent model with outliers: the first channels of every norm times factor, the columns
    that read them divided by it. In place."""
    for block in model.layers:
        for norm, readers in ((block.input_layernorm, (block.self_attn.q_proj, block.self_attn.k_proj,
                                                       block.self_attn.v_proj)),
                              (block.post_attention_layernorm, (block.mlp.gate_proj, block.mlp.up_proj))):
            with torch.no_grad():
                norm.weight[:channels] *= factor
                for layer in readers:
                    layer.weight[:, :channels] /= factor


# --- 6 evaluate ---------------------------------------------------------------------------------------


@torch.no_grad()
def evaluate(model, ids, c, batch=16):
    """Mean nats per token over consecutive windows that do not overlap, the first token of each unscored."""
    windows = ids[:len(ids) // c.context * c.context].view(-1, c.context)[:c.windows].to(c.device)
    total = sum(-token_logprobs(model, part).sum().item() for part in windows.split(batch))
    return total / (windows.numel() - len(windows))


def layer_bytes(layer):
    """Stored bytes of a layer's weight: packed buffers, or bfloat16 where it is dense."""
    return layer.nbytes() if isinstance(layer, PackedLinear) else 2 * layer.weight.numel()


# --- 7 compress ---------------------------------------------------------------------------------------


def compress_layer(layer, h, H, f, generator, where):
    """(new layer, proxy loss, ARMOR's trace) of one linear layer by the run's method."""
    trace = []
    have = dict(W=layer.weight.detach().float(), h=h, H=H, generator=generator, trace=trace)
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
    return made, proxy(have["W"], weight, h), trace


def train(c, f):
    """One run: load, calibrate and compress block by block, evaluate, save. -> the numbers of the table."""
    if min(c.samples, c.context, c.windows) < 1:
        raise UserError("--samples, --context and --windows must be positive")
    folder = sft.find(c.init, c.config, device=c.device)
    kernels.use(c.kernels)
    with Run(c, f, "compress", CURVES) as run:
        if "result" in run.info:
            run.say(f"  finished already: {run.last}")
            return run.info["result"]
        model, tok = load(folder, c.device)
        if not isinstance(model, Transformer) or model.config.moe:
            raise UserError(f"--init {c.init}: compress.py takes a language model without experts")
        if any(isinstance(m, PackedLinear) for m in model.modules()):
            raise UserError(f"--init {c.init} is compressed already: start from what it was made of")
        if c.context > model.config.max_position_embeddings:
            raise UserError(f"--context {c.context}: {c.init} takes "
                            f"{model.config.max_position_embeddings} tokens at most; lower it")
        model.requires_grad_(False)
        if c.outliers:
            spread_outliers(model, c.outliers)
        held = stream(text.documents(c.data, "val"), tok, c.windows * c.context)
        tokens = calibration(c, tok).to(c.device)
        before = evaluate(model, held, c)
        size, count = sum(p.numel() for p in model.parameters()) / 1e6, min(c.windows, len(held) // c.context)
        run.say(f"{run.folder}: {size:.2f} M parameters; calibration: {c.samples} x {c.context} tokens of "
                f"{c.data}; evaluation: {c.data} val, {count} windows of {c.context}, stride {c.context}, "
                f"BOS at documents: {before:.4f} nats, perplexity {math.exp(before):.3f}")
        g, clock = torch.Generator().manual_seed(c.seed), time.perf_counter()
        with torch.no_grad():
            cos, sin = (x[:c.context] for x in rope_table(model.config, c.device))
            x = [model.embed_tokens(part) for part in tokens.split(8)]                   # [8, T, D] each
        full, worst, losses, size, count = "H" in needs(f.method), 0.0, [], 0, 0
        for i, block in enumerate(tqdm(model.layers, desc=c.method, disable=None, leave=False)):
            where = (cos, sin, None, i, None, None)
            out, stats = watch(block, x, where, full)
            for name, layer in linears(block).items():
                new, loss, trace = compress_layer(layer, *stats[name], f, g, f"layer {i}, {name}")
                rise = max((b - a for a, b in zip(trace, trace[1:])), default=0.0)
                worst = max(worst, rise)
                losses.append(loss)
                count, size = count + layer.weight.numel(), size + layer_bytes(new)
                parent, _, leaf = name.rpartition(".")
                setattr(block.get_submodule(parent), leaf, new)
            run.log(i + 1, proxy=sum(losses) / len(losses), bits=8 * size / count,
                    seconds=time.perf_counter() - clock)
            if c.sequential:
                with torch.no_grad():
                    out = [block(part, *where) for part in x]
            x = out
        seconds, after = time.perf_counter() - clock, evaluate(model, held, c)
        run.save(len(model.layers), lambda path: save(model, tok, path))
        weights = sum(p.stat().st_size for p in run.last.glob("*.safetensors"))
        run.say(f"  {c.method}: {after:.4f} nats ({after - before:+.4f}), perplexity {math.exp(after):.3f}; "
                f"{8 * size / count:.3f} bits a weight of the blocks, {weights / 1e6:.2f} MB on disk; proxy "
                f"{sum(losses) / len(losses):.4f}; {seconds:.1f} s\n  {run.last}")
        return run.finish(loss=after, loss_increase=after - before, dense_loss=before, bits=8 * size / count,
                          perplexity=math.exp(after), proxy=sum(losses) / len(losses), rise=worst,
                          disk_bytes=weights, seconds=seconds)


# --- main ---------------------------------------------------------------------------------------------


def main(argv=None):
    """python compress.py …: see the docstring above, or --help."""
    return launch("compress", Config, PRESETS, AXES, {}, __doc__, train, argv)


if __name__ == "__main__":
    cli(main)
