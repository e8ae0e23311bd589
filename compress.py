"""
compress.py - pruning, quantisation, slimming, smaller caches: a big checkpoint in, a small one out.

    python compress.py                                   # NoWag-P 2:4 of a small base, made first
    python compress.py --config armor                    # 2:4 between two fitted wrappers
    python compress.py --config gptq --init Qwen2.5-0.5B --data stdlib --group 128 --out out/small
    python compress.py --config awq                      # first an equal model that rounds better
    python compress.py --config slimmoe                  # a small mixture of experts, made first
    python compress.py --config rtn --cache kivi         # and 2 bits for the keys and values
    python model.py out/small --prompt "def "            # what it writes opens like any checkpoint
    python compress.py --claim pruning --seeds 5         # the race of the masks, with a verdict

The spine reads on a text what every layer is given (calibrate), makes each layer small by itself,
block by block, and evaluates what it saves. A chapter adds a mask, a code, a preparation, a method
that cuts the whole model and distils it, or a cache for the evaluation.
Letters  W [m, n] = [out, in] of a linear layer y = W x; N tokens of calibration; h [n], H [n, n]:
         2 mean x² of every input, 2 mean x xᵀ; B rows, T tokens, D width, V vocabulary, L layers
Watch    loss_increase on held-out text, at equal bits: bits counts every stored byte of the layers.
         kl, to the original, is less noisy. proxy is the h-weighted error of the normalised weight:
         it ranks NoWag-P against ARMOR, not families (SparseGPT has twice the proxy and half the
         loss). Before distillation ways to cut differ by tenths of a nat, after it by hundredths.
"""
import copy
import itertools
import math
import time
import weakref
from dataclasses import dataclass, replace
from functools import partial
from types import SimpleNamespace
from typing import Literal

import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

import kernels
import sft
from data import text
from data.run import (Common, Count, MeanOf, Positive, Range, Run, Share, UserError, checkpoint,
                      cli, hyper, launch, needs, peak_bytes)
from kernels import (PackedLinear, bitmap_state, column_scale, columns_state, linear_distill,
                     linear_logprob, mixed_state, mxfp4_state, nm24_state, order_dtype, pack_armor,
                     pack_int, pack_nm24, pack_vq, packed, quantize, wide)
from model import (THEIRS, Cache, Transformer, generate, load, only_ours, own_fields, plain_linear,
                   rope_table, save, tensors, token_logprobs, use)

# --- config ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Config(Common):
    """What belongs to a method is an argument of its function."""
    init: str = "base:pretrain"  # the checkpoint to compress
    data: str = "stdlib"         # text of calibration (train) and of evaluation (val)
    domain: str = ""             # another text, for a method that reads its gradients
    method: str = "nowag_p"      # which row of METHODS
    smooth: str = "none"         # which row of SMOOTH goes before a method that rounds
    cache: str = "full"          # which row of CACHES holds keys and values in the evaluation
    kd_steps: int = 300          # of distillation, over all stages of a method that cuts the model
    kd_batch: Count = 16         # its windows a step
    kd_lr: Positive = 1e-3       # its peak learning rate
    kd_loss: str = "kd_topk"     # its loss: which row of LOSSES
    samples: Count = 64          # calibration windows
    context: Range("[2, inf)") = 128  # their tokens, and those of an evaluation window
    windows: Count = 256         # evaluation windows: consecutive, none overlaps, BOS at documents
    sequential: bool = False     # statistics of a block from the compressed blocks before it
    format: Literal["auto", "ours", "compressed-tensors", "dense"] = "auto"  # of what is saved
    outliers: float = 0.0        # two channels of every norm times this, what reads them over it
    seed: int = 0                # of calibration windows, a method's draws, and a base:… model
    resume: bool = False         # a finished run is not made again


PRESETS = dict(
    # seconds on any CPU, its base model included
    tiny=dict(samples=4, context=64, windows=8, iterations=20, kd_steps=4, kd_batch=4, head_steps=5,
              local_steps=2, budget=8),
    # what only the arms of claims need: about so many bits a weight, scales and codebooks included
    bits4=dict(bits=4, group=64, dim=1),
    bits3=dict(bits=3, group=64, dim=2),       # three of them
    bits2=dict(bits=2, group=64, dim=2),
    # a distillation of 300 steps at its best rate, and a cut that is not distilled
    tuned=dict(context=64, kd_lr=2e-3, kd_loss="forward_kl"),
    cut=dict(kd_steps=0, share=0.5, init="base:pretrain"),
)
CURVES = {"proxy loss": ["proxy"], "seconds": ["seconds"],
          "held-out nats": ["cut_nats", "distilled_nats"]}

# --- masks ----------------------------------------------------------------------------------------
# A method's positional arguments name what it reads of a layer: W, a row of STATISTICS, of FACTS or
# of MEMORIES, or the run's generator. It returns the new weight, or the packed layer.


def kept(score, pattern, scope="matrix"):
    """The 1.0s of a mask: "2:4" keeps the 2 largest of every 4 neighbours in a row, "50%" half of
    all. scope of a share: the whole matrix, or each row.

    Exactly that many stay, ties by index. Raises UserError for another pattern.
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
        raise UserError(f"--pattern {pattern}: write n:m, like 2:4, or the share that stays, like "
                        "50%")
    flat = score.flatten()[None] if scope == "matrix" else score
    count = flat.size(1) - int(round(flat.size(1) * (100 - float(n[:-1])) / 100, 6))
    top = flat.argsort(dim=1, descending=True, stable=True)[:, :count]
    return torch.zeros_like(flat).scatter(1, top, 1.0).view_as(score)


def pruned(W, pattern):
    """A masked weight as it is stored: 2:4 in its own format, another mask as a bitmap (both 9 bits
    at half), dense if nothing went."""
    if pattern == "2:4":
        return pack_nm24(W)
    return W if (W != 0).all() else stored(W, bitmap_state(W))


def stored(W, state, **options):
    """The packed layer of W's shape with a format's (options, buffers)."""
    return packed(W.shape, None, state[0] | options, state[1])


def normalise(W, eps=1e-5):
    """NoWag's (2504.14569): W = diag(r2) Wb diag(r1), columns first, then rows.
    -> Wb, r1 [n], r2 [m]"""
    r1 = W.norm(dim=0) + eps
    r2 = (W / r1).norm(dim=1) + eps
    return W / r1 / r2[:, None], r1, r2


def mend(h):
    """h with what is not finite replaced by the mean of the finite ones that are positive. 0 stays
    0: an input that never fires is worth nothing."""
    sound = h.isfinite() & (h > 0)
    return torch.where(h.isfinite(), h, h[sound].mean() if sound.any() else torch.ones_like(h))


def proxy(W, new, h):
    """NoWag's relative error  Σ h (Wb - Wb')² / Σ h Wb²,  both normalised as W is; 1 for zeros, 0
    where no input fires."""
    Wb, r1, r2 = normalise(W)
    h = mend(h)
    total = (Wb ** 2 * h).sum().clamp(min=1e-30)
    return (((Wb - new / r1 / r2[:, None]) ** 2 * h).sum() / total).item()


def nowag_p(W, h, *, pattern="2:4"):
    """NoWag-P (2504.14569):  the largest h_j Wb_ij² stay, unchanged; one threshold a matrix."""
    return pruned(W * kept(normalise(W)[0] ** 2 * mend(h), pattern), pattern)


def dense():
    """Nothing is done: the baseline."""


# --- calibrate ------------------------------------------------------------------------------------


def calibration(c, tok, data):
    """--samples windows of --context tokens at random places of shuffled training text.
    [samples, T]"""
    g = torch.Generator().manual_seed(c.seed)
    ids = text.stream(text.shuffled(data, g), tok, 4 * c.samples * c.context)
    if len(ids) <= c.context:
        raise UserError(f"--data {data}: {len(ids)} tokens to calibrate on: fewer than --context")
    at = torch.randint(len(ids) - c.context, (c.samples,), generator=g)
    return torch.stack([ids[i:i + c.context] for i in at.tolist()])


def linears(block):
    """{name: layer} of a block's linear layers, in order."""
    return {name: m for name, m in block.named_modules() if name.endswith("_proj")}


class Mean:
    """The mean over tokens of a function of a layer's inputs x [N, n], which it gives summed."""

    def __init__(self, of):
        self.of, self.total, self.count = of, 0.0, 0

    def note(self, x):
        """Add the inputs of some tokens."""
        self.total = self.total + self.of(x)
        self.count += len(x)

    def value(self):
        """What a method is handed."""
        return self.total / self.count


def energy(x):
    """Σ 2 x² of every input.   [N, n] -> [n]"""
    return 2 * (x ** 2).sum(0)


STATISTICS = dict(h=partial(Mean, energy))


@torch.no_grad()
def watch(block, inputs, where, names=(), **more):
    """One pass of a block over its inputs, a list of [b, T, D].
    -> its outputs, {layer: {name: value}} of h, of the named rows of STATISTICS, and of more"""
    asked, sums = {k: x for k, x in STATISTICS.items() if k == "h" or k in names} | more, {}

    def note(name):
        sums[name] = {k: make() for k, make in asked.items()}

        def hook(layer, args):
            x = args[0].flatten(0, -2).float()                                           # [N, n]
            for statistic in sums[name].values():
                statistic.note(x)
        return hook
    hooks = [m.register_forward_pre_hook(note(name)) for name, m in linears(block).items()]
    outputs = [block(x, *where) for x in inputs]
    for hook in hooks:
        hook.remove()
    for name in sums:
        sums[name] = {k: statistic.value() for k, statistic in sums[name].items()}
    return outputs, sums


def untouched(model, inputs, where, f):
    """Nothing."""


# --- evaluate -------------------------------------------------------------------------------------


def full():
    """All keys and values, as they are."""
    return Cache


@torch.no_grad()
def evaluate(model, windows, batch=16):
    """Mean nats per token of windows [N, T], the first token of each unscored."""
    nats = [-token_logprobs(model, part).sum(1).double().cpu() for part in windows.split(batch)]
    return MeanOf(torch.cat(nats) / (windows.size(1) - 1))


@torch.no_grad()
def likeliest(hidden, head, k=1, rows=1024):
    """The k likeliest words of every state and their probabilities, so many rows of logits at a
    time.   hidden [N, D], head [V, D] -> [N, k], [N, k]"""
    k = min(k, len(head))
    found = [wide(F.linear(x, head)).softmax(-1).topk(k, -1) for x in hidden.split(rows)]
    return torch.cat([x.indices for x in found]), torch.cat([x.values for x in found])


@torch.no_grad()
def compare(model, reference, windows, batch=8):
    """Mean KL(reference || model) in nats a token, and how often both have the same likeliest
    token."""
    kl, same, count = 0.0, 0, 0
    for part in windows.split(batch):
        theirs, ours = (m(part)[:, :-1].flatten(0, 1) for m in (reference, model))      # [N, D]
        kl += linear_distill(ours, model.head, theirs, reference.head).sum().item()
        best = likeliest(theirs, reference.head)[0]                                     # [N, 1]
        same += (likeliest(ours, model.head)[0] == best).sum().item()
        count += len(ours)
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


def as_found(model, folder):
    """The model with everything that is not packed in the dtype in which the folder stores it."""
    file = next(iter(tensors(checkpoint(folder)).values()))
    return model.to(file.get_tensor(next(iter(file.keys()))).dtype)


# --- compress -------------------------------------------------------------------------------------


def compress_layer(layer, known, method, where):
    """(new layer, proxy loss) of one linear layer, from what is known of its inputs."""
    known = dict(known, W=layer.weight.detach().float())
    try:
        new = method(**{k: known[k] for k in needs(method)})
    except (UserError, ValueError) as e:
        raise UserError(f"{where}: {e}") from None
    if isinstance(new, PackedLinear):
        new.register_parameter("bias", layer.bias)
        return new, proxy(known["W"], new.dequantize(), known["h"])
    return plain_linear(layer, new.to(layer.weight.dtype)), proxy(known["W"], new, known["h"])


def layer_by_layer(model, tok, tokens, held, c, f, run):
    """Compress block by block, in place: calibrate one, replace its layers, hand its outputs on.
    -> the model, what the table says of its layers: bits a weight, mean proxy"""
    names, clock = needs(f.method), time.perf_counter()
    generator = torch.Generator().manual_seed(c.seed)
    with torch.no_grad():
        tables = {local: rope_table(model.config, c.device, local, c.context > model.switch)
                  for local in set(model.local)}
        inputs = [model.embed(part) for part in tokens.split(8)]                    # [8, T, D] each
    angles = lambda i: [x[:c.context] for x in tables[model.local[i]]]                   # [T, hd/2]
    where = lambda i: (*angles(i), None, i, None, None)
    f.smooth(model, inputs, where, f)
    facts = {k: FACTS[k](model, tok, c) for k in names if k in FACTS}
    memories = {k: MEMORIES[k]() for k in names if k in MEMORIES}
    losses, size, count = [], 0, 0
    for i, block in enumerate(tqdm(model.layers, desc=c.method, disable=None, leave=False)):
        outputs, statistics = watch(block, inputs, where(i), names)
        for name, layer in linears(block).items():
            known = statistics[name] | {k: x[f"layers.{i}.{name}"] for k, x in facts.items()}
            known |= {k: memory.tell() for k, memory in memories.items()}
            known["generator"] = generator
            new, loss = compress_layer(layer, known, f.method, f"layer {i}, {name}")
            for memory in memories.values():
                memory.note(f"layer {i}, {name}", loss)
            losses.append(loss)
            count += layer.weight.numel()                        # a dense layer counts as bfloat16
            size += new.nbytes() if isinstance(new, PackedLinear) else 2 * new.weight.numel()
            parent, _, leaf = name.rpartition(".")
            setattr(block.get_submodule(parent), leaf, new)
        run.log(i + 1, proxy=sum(losses) / len(losses), bits=8 * size / count,
                seconds=time.perf_counter() - clock)
        if c.sequential:
            with torch.no_grad():
                outputs = [block(x, *where(i)) for x in inputs]
        inputs = outputs
    metrics = dict(bits=8 * size / count, proxy=sum(losses) / len(losses))
    for memory in memories.values():
        metrics |= memory.metrics()
    return model, metrics


def leave(model, *_):
    """The model as it is, 16 bits a weight."""
    return model, dict(bits=16.0, proxy=0.0)


def form_of(c, model, run):
    """The format of the folder: what other engines open where it can say what the layers are."""
    why = only_ours(model)
    if c.format == THEIRS and why:
        raise UserError(f"--format {THEIRS}: {why}")
    form = c.format if c.format != "auto" else "ours" if why else THEIRS
    if any(isinstance(m, PackedLinear) for m in model.modules()):
        run.say(f"  format {form}" + f", as no other program opens: {why}" * (form == "ours" and
                                                                            bool(why)))
    return form


def open_model(c, f, folder):
    """The model and tokenizer to compress, checked. Raises UserError for what cannot be."""
    model, tok = load(folder, c.device)
    if not isinstance(model, Transformer):
        raise UserError(f"--init {c.init} is a reward model; compress.py takes a language model")
    if model.config.moe and ("batches" not in needs(f.method) or c.outliers):
        raise UserError(f"--init {c.init} has experts: only methods that cut structure take it, "
                        "without --outliers")
    if any(isinstance(m, PackedLinear) for m in model.modules()) or own_fields(model.config):
        raise UserError(f"--init {c.init} is compressed already: start from what it was made of")
    model.requires_grad_(False)
    for field in PREPARE:
        if getattr(c, field):
            PREPARE[field](model, getattr(c, field))
    return model, tok


def train(c, f):
    """One run: calibrate and compress, save, evaluate. -> the numbers of the table."""
    check(c, f)
    folder = sft.find(c.init, c.config, device=c.device, seed=c.seed)
    use(c)
    with Run(c, f, "compress", CURVES) as run:
        if "result" in run.info:
            run.say(f"  finished already: {run.last}")
            return run.info["result"]

        # 1. text to calibrate and to evaluate on ----------------------------------------------
        model, tok = open_model(c, f, folder)
        held = text.stream(text.documents(c.data, "val"), tok, c.windows * c.context)
        if len(held) < c.context:
            raise UserError(f"--data {c.data}: {len(held)} tokens to evaluate on: more text, or a "
                            f"--context below {c.context}")
        held = held[:len(held) // c.context * c.context].view(-1, c.context)[:c.windows]
        held = held.to(c.device)                                                # [windows, T]
        tokens = calibration(c, tok, c.data).to(c.device)                       # [samples, T]
        before, fast = evaluate(model, held), speed(model, held[0])
        whole = sum(p.numel() for p in model.parameters())
        run.say(f"{run.folder}: {whole / 1e6:.2f} M parameters; calibration: {c.samples} x "
                f"{c.context} tokens of {c.data}; evaluation: {c.data} val, {len(held)} windows of "
                f"{c.context}, stride {c.context}, BOS at documents: {before:.4f} nats, perplexity "
                f"{math.exp(before):.3f}")

        # 2. compress and save -----------------------------------------------------------------
        clock = time.perf_counter()
        walk = next((WALKS[x] for x in needs(f.method) if x in WALKS), leave)
        model, metrics = walk(model, tok, tokens, held, c, f, run)
        seconds, model = time.perf_counter() - clock, as_found(model, folder)
        form = form_of(c, model, run)
        run.save(len(model.layers), lambda path: save(model, tok, path, form=form))

        # 3. evaluate --------------------------------------------------------------------------
        after, rate = evaluate(model.float(), held), speed(model, held[0])
        size = sum(p.stat().st_size for p in run.last.glob("*.safetensors"))
        kl, same = compare(model, open_model(c, f, folder)[0], held[:128])
        if c.cache in MEASURES:
            metrics |= MEASURES[c.cache](model, tokens, held, c, f, run)
        peak, now = peak_bytes(c.device), sum(p.numel() for p in model.parameters())
        about = f"{whole / 1e6:.2f} to {now / 1e6:.2f} M parameters"
        if "proxy" in metrics:
            about = (f"{metrics['bits']:.3f} bits a weight of the blocks, proxy "
                     f"{metrics['proxy']:.4f}")
        run.say(f"  {c.method}: {after:.4f} nats ({after - before:+.4f}), perplexity "
                f"{math.exp(after):.3f}; KL to the original {kl:.4f}, same top token {same:.1%}\n"
                f"  {about}; {size / 1e6:.2f} MB on disk in all\n"
                f"  {seconds:.1f} s to compress, {rate:.3g} tokens/s (dense {fast:.3g}), peak "
                f"memory {peak / 1e9:.2f} GB\n  {run.last}")
        increase = MeanOf(torch.tensor(after.values) - torch.tensor(before.values))
        return run.finish(loss=after, loss_increase=increase, dense_loss=before, kl=kl,
                          same_top=same, perplexity=math.exp(after), disk_bytes=size,
                          seconds=seconds, peak_bytes=peak, tokens_per_second=rate,
                          dense_tokens_per_second=fast, **metrics)


# --- tables and main ------------------------------------------------------------------------------

METHODS = dict(nowag_p=nowag_p, dense=dense)
SMOOTH = dict(none=untouched)
CACHES = dict(full=full)
LOSSES = dict()          # of distillation
AXES = dict(method=METHODS, smooth=SMOOTH, cache=CACHES, kd_loss=LOSSES, kernels=kernels.MODES)
FACTS = dict()           # {what a method asks for: f(model, tok, c) -> {layer's name: it}}
MEMORIES = dict()        # {what a method asks for: a class that hands it out and notes the outcome}
WALKS = dict()           # {what a method asks for, W or batches: what goes through the model}
CHECKS = dict()          # {row, or what a method asks for: check(c, f)} of what cannot be
MEASURES = dict()        # {cache: what it adds to the evaluation}
PREPARE = dict()         # {field: what it first does to the model, if it is set}
WALKS["W"] = layer_by_layer


def main(argv=None):
    """python compress.py …: see the docstring above, or --help."""
    return launch("compress", Config, PRESETS, AXES, __doc__, train, argv, readers)


# === refused: what a run reads, and what cannot be, told before anything is made ==================


def readers(c, f):
    """{field: (whether this run reads it, what does)} of the fields that not every run reads."""
    asked = needs(f.method)
    whole = "batches" in asked
    return dict.fromkeys(("kd_batch", "kd_lr", "kd_loss"),
                         (whole and c.kd_steps > 0, "methods that distil, for --kd_steps")) | dict(
        kd_steps=(whole, "methods that distil"),
        sequential=("W" in asked, "methods that go a layer at a time"),
        domain=(any(k in FACTS for k in asked), "methods that read gradients"),
        keep=(False, "scripts that save more than once"))


def check(c, f):
    """UserError for all that can be known before anything is made: options, files and folders."""
    for row in (*needs(f.method), c.method, c.smooth, c.cache):
        if row in CHECKS:
            CHECKS[row](c, f)
    for name in filter(None, (c.data, c.domain)):
        if name != "stdlib":
            text.documents(name)
    most = sft.find(c.init, c.config, make=False)
    if c.context > most:
        raise UserError(f"--context {c.context}: {c.init} takes {most} tokens at most; lower it")


def check_pattern(c, f):
    """UserError for a --pattern that kept() does not know."""
    if pattern := f.method.keywords.get("pattern"):
        m = pattern.partition(":")[2]
        kept(torch.zeros(1, max(1, int(m)) if m.isdigit() else 8), pattern)


CHECKS["W"] = check_pattern


# === outliers: ours, an equivalent model with what real models have and small ones do not =========


def spread_outliers(model, factor, channels=2):
    """An exactly equivalent model with outliers: the first channels of every norm times factor, the
    columns that read them divided by it. In place."""
    check_norms(model, "--outliers")
    for block in model.layers:
        attention, mlp = block.self_attn, block.mlp
        for norm, layers in (
                (block.input_layernorm, (attention.q_proj, attention.k_proj, attention.v_proj)),
                (block.post_attention_layernorm, (mlp.gate_proj, mlp.up_proj))):
            with torch.no_grad():
                norm.weight[:channels] *= factor
                for layer in layers:
                    layer.weight[:, :channels] /= factor


PREPARE["outliers"] = spread_outliers


# === magnitude, wanda: 1506.02626, 2306.11695, the largest weights, or times their inputs' norms ==


def magnitude(W, *, pattern="2:4", scope: Literal["matrix", "row"] = "matrix"):
    """|W|: no data."""
    return pruned(W * kept(W.abs(), pattern, scope), pattern)


def wanda(W, h, *, pattern="2:4"):
    """Wanda (2306.11695):  |W_ij| ‖x_j‖, compared within each output row."""
    return pruned(W * kept(W.abs() * h.sqrt(), pattern, "row"), pattern)


METHODS["magnitude"], METHODS["wanda"] = magnitude, wanda
PRESETS["wanda"] = dict(method="wanda", sequential=True)


# === sparsegpt: 2301.00774, column by column, the rest corrected for what was cut =================


def second_moment(x):
    """Σ 2 x xᵀ.   [N, n] -> [n, n]"""
    return 2 * x.T @ x


def inverse_factor(H, damp=0.01):
    """U upper, Uᵀ U = (H + damp mean(diag H) I)⁻¹; ten times the damping while there is no such
    factor."""
    if not H.isfinite().all():
        raise UserError("the second moment of a layer's inputs is not finite: the model overflows "
                        "on --data")
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
    kept(W.abs(), pattern)                             # an error names the whole matrix, not a part
    block -= block % int(m) if m else 0
    for start in range(0, W.size(1), block):
        end = min(start + block, W.size(1))
        w, u = W[:, start:end].clone(), U[start:end, start:end]
        errors = torch.zeros_like(w)
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


STATISTICS["H"], METHODS["sparsegpt"] = partial(Mean, second_moment), sparsegpt
PRESETS["sparsegpt"] = dict(method="sparsegpt", sequential=True)


# === dprune: 2405.06275, what a domain needs and what the general model needs, in one score =======


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


def domain_gradients(model, tok, c):
    """gradients of --domain's text, or of --data's."""
    return gradients(model, calibration(c, tok, c.domain or c.data).to(c.device))


def dprune(W, H, domain_gradients, *, pattern="50%", lam=0.1, lr: Positive = 1e-4):
    """D-Pruner (2405.06275): what a domain needs and what the general model needs, in one score.

    G = W² / [H⁻¹]_mm of general text;  g' = g + 2 λ lr² G g F,  F the mean g²;  I = |g' W + (g' W)²
    / 2| of the domain's gradients g [m, n] (mean). ours: the form of g' and the sign of the second
    term, which the paper's text leaves open.
    """
    grad, fisher = domain_gradients
    G = W ** 2 / (inverse_factor(H) ** 2).sum(0)                 # diag(H⁻¹) = column sums of U²
    first = (grad + 2 * lam * lr ** 2 * G * grad * fisher) * W
    return pruned(W * kept((first + first ** 2 / 2).abs(), pattern), pattern)


METHODS["dprune"], FACTS["domain_gradients"] = dprune, domain_gradients


# === lowrank24: 2:4 and a low-rank correction of ARMOR's size, the control ========================


def block_of(size, block):
    """The largest block up to `block` that tiles `size` and is a multiple of 4."""
    fits = [b for b in range(4, min(block, size) + 1, 4) if size % b == 0]
    if not fits:
        raise UserError(f"no block of 4 to {block} (--block) tiles a side of {size}, which must be "
                        "a multiple of 4")
    return fits[-1]


def lowrank24(W, h, *, block: Count = 8):
    """2:4 by NoWag-P, and the best B A of the rest weighted by √h, of as many numbers as ARMOR's
    wrappers.   ours: the control that ARMOR's paper lacks."""
    core = W * kept(normalise(W)[0] ** 2 * mend(h), "2:4")
    root, (m, n) = mend(h).sqrt(), W.shape
    U, values, V = torch.linalg.svd((W - core) * root, full_matrices=False)
    rank = min(len(values), max(1, (m * block_of(m, block) + n * block_of(n, block)) // (m + n)))
    right = torch.where(root > 0, V[:rank] / root, 0.0)          # a dead input needs no correction
    buffers = dict(left=(U[:, :rank] * values[:rank]).bfloat16(), right=right.bfloat16())
    return stored(W, (dict(kind="nm24_lowrank", rank=rank), nm24_state(core) | buffers))


METHODS["lowrank24"] = lowrank24


# === wrapped: ours, blocks on a diagonal times a matrix, and one exact step of ARMOR's core =======
# A [P, a, a] are the blocks of bd(A) [m, m], B [Q, b, b] those of bd(B) [n, n]; S, its 0/1 mask M,
# Wb [m, n]; h [n]. A tile is where a block of rows and one of columns cross: given A and B tiles
# are independent of each other, and so of each one group of four may change.

PAIRS = torch.tensor([(0, 1), (0, 2), (0, 3), (1, 2), (1, 3), (2, 3)])


def left(A, X):
    """bd(A) X.   [P, a, a], [m, n] -> [m, n]"""
    return (A @ X.view(len(A), -1, X.size(1))).view(X.shape)


def right(X, B):
    """X bd(B).   [m, n], [Q, b, b] -> [m, n]"""
    return torch.einsum("mqb,qbc->mqc", X.view(len(X), len(B), -1), B).reshape(X.shape)


def armor_error(A, S, B, Wb):
    """bd(A) S bd(B) - Wb."""
    return right(left(A, S), B) - Wb


def armor_loss(error, h):
    """Σ h_j error²: the proxy loss, not normalised."""
    return (error.square() @ h).sum()


def core_step(A, S, M, B, error, h, group):
    """The exact best 2 of 4 in one group a tile, with their values; group [P, Q] counts a tile's
    rows x fours. -> S, M, the error with them, and by how much the loss falls

    With the group zeroed, B̃ its rows of B times √h and R the error so:  v = B̃ Rᵀ a,  G = B̃ B̃ᵀ;
    of the 6 pairs the one with the largest vᵀ G⁻¹ v, at the values -G⁻¹ v / ‖a‖².
    """
    (P, a, _), (Q, b, _) = A.shape, B.shape
    p, q = torch.arange(P, device=S.device)[:, None], torch.arange(Q, device=S.device)
    i, four, S, M = group // (b // 4), group % (b // 4), S.clone(), M.clone()
    place = p * a + i, q * (b // 4) + four                        # of S [m, n/4, 4]: [P, Q] each
    old = S.view(len(S), -1, 4)[place]                                                # [P, Q, 4]
    at, fours = A.mT[p, i], B.view(Q, -1, 4, b)                            # [P, Q, a], [Q, ·, 4, b]
    G = (fours * h.view(Q, 1, 1, b)) @ fours.mT                                    # [Q, b/4, 4, 4]
    Bt, G = fours[q, four], G[q, four]                                          # [P, Q, 4, b or 4]
    size = (at ** 2).sum(-1, keepdim=True)                                            # [P, Q, 1]
    at = at.transpose(1, 2)[..., None]                                             # [P, a, Q, 1]
    back = (error.view(P, a, Q, b) * at).sum(1) * h.view(Q, b)              # R̃ᵀ a, [P, Q, b]
    v = (Bt * back[:, :, None]).sum(-1) - size * (G * old[:, :, None]).sum(-1)        # [P, Q, 4]
    new, pair = best_pair(v, G + 1e-9 * torch.eye(4).to(S), size + 1e-8)
    S.view(len(S), -1, 4)[place], M.view(len(S), -1, 4)[place] = new, pair.to(M)
    change = (Bt * (new - old)[..., None]).sum(2)                                     # [P, Q, b]
    fall = -(2 * (back * change).sum() + (size * change ** 2 * h.view(Q, b)).sum())
    return S, M, (error.view(P, a, Q, b) + at * change[:, None]).view(error.shape), fall


def best_pair(v, G, size):
    """The pair of 4 with the largest vᵀ G⁻¹ v at its values -G⁻¹ v / size, and where it is: 0, 1.
    v [P, Q, 4], G [P, Q, 4, 4], size [P, Q, 1]"""
    i, j = PAIRS.to(v.device).T
    vi, vj, gii, gjj, gij = v[..., i], v[..., j], G[..., i, i], G[..., j, j], G[..., i, j]  # [·, 6]
    det = (gii * gjj - gij ** 2).clamp(min=1e-30)
    si, sj = (gjj * vi - gij * vj) / det, (gii * vj - gij * vi) / det
    best = (vi * si + vj * sj).argmax(-1, keepdim=True)                               # [P, Q, 1]
    pair = torch.stack([i[best], j[best]], -1).squeeze(-2)                            # [P, Q, 2]
    values = torch.cat([si.gather(-1, best), sj.gather(-1, best)], -1) / -size
    return torch.zeros_like(v).scatter(-1, pair, values), torch.zeros_like(v).scatter(-1, pair, 1.)


# === armor: 2510.05528, W = bd(A) S bd(B), S 2:4 between two block-diagonal wrappers, fitted ======


def wrapper_step(x, M, error, h, total, moments, t, lr):
    """Adam's t-th step on A, B and, within the mask, S: a trial {A, B, S}. moments: in place."""
    A, B, S = x["A"], x["B"], x["S"]
    E, (P, a, _), (Q, b, _) = error * (2 * h / total), A.shape, B.shape                  # [m, n]
    grad = dict(A=E.view(P, a, -1) @ right(S, B).view(P, a, -1).mT,
                B=torch.einsum("mqb,mqc->qbc", left(A, S).view(-1, Q, b), E.view(-1, Q, b)),
                S=left(A.mT, right(E, B.mT)).mul_(M))
    (first, second), trial = moments, {}
    for k, g in grad.items():
        first[k].lerp_(g, 0.1)
        second[k].mul_(0.999).addcmul_(g, g, value=0.001)
        scale = (second[k] / (1 - 0.999 ** t)).sqrt_().add_(1e-8)
        trial[k] = torch.addcdiv(x[k], first[k], scale, value=-lr / (1 - 0.9 ** t))
    trial["S"].mul_(M)
    return trial


def drawn_group(x, error, h, total, generator):
    """One group of four a tile, by the gradient's size over all its entries.   [P, Q]"""
    A, B = x["A"], x["B"]
    size = left(A.mT, right(error * (2 * h / total), B.mT)).abs().view(-1, 4).sum(1)
    tiles = size.view(len(A), -1, len(B), B.size(1) // 4).transpose(1, 2)       # [P, Q, a, b / 4]
    mass = (tiles.flatten(2) + 1e-30).cumsum(-1)                                # [P, Q, groups]
    u = torch.rand(len(A), len(B), 1, generator=generator).to(mass)
    drawn = torch.searchsorted(mass, u * mass[..., -1:], right=True).squeeze(-1)
    return drawn.clamp(max=mass.size(-1) - 1)


def folded(x, r1, r2):
    """The packed layer of {A, B, S}, norms of columns (r1) and rows (r2) folded into the core: then
    wrappers that do nothing are stored without rounding."""
    rows, columns = r2.view(len(x["A"]), -1), r1.view(len(x["B"]), -1)
    return pack_armor(x["A"] * rows[:, :, None] / rows[:, None], x["S"] * r2[:, None] * r1,
                      x["B"] / columns[:, :, None] * columns[:, None])


def armor(W, h, generator, trace, *, block: Count = 8, iterations: Count = 300,
          lr: Positive = 1e-3):
    """ARMOR, 2510.05528: Adam on A, B, S, then core_step on one group a tile, drawn by the
    gradient's size.

    Starts at NoWag-P and never gets worse: an Adam step that raises the loss is taken back and lr
    halved (ours; the released code does not), and of the end and the start the one stays that loses
    less as it is stored, in half precision. trace gets the relative loss after every iteration.
    Defaults are ours, for small layers; the paper's are block 128, 20,000 iterations, lr 1e-4.
    """
    Wb, r1, r2 = normalise(W)
    (m, n), h = W.shape, mend(h)
    a, b = block_of(m, block), block_of(n, block)
    M, total = kept(Wb ** 2 * h, "2:4"), armor_loss(Wb, h).clamp(min=1e-30)
    x = dict(A=torch.eye(a).to(W).repeat(m // a, 1, 1), B=torch.eye(b).to(W).repeat(n // b, 1, 1),
             S=Wb * M)
    start, first = x, {k: torch.zeros_like(v) for k, v in x.items()}
    moments = first, copy.deepcopy(first)
    error = armor_error(**x, Wb=Wb)
    loss = armor_loss(error, h)
    trace.append((loss / total).item())                          # NoWag-P's
    for t in range(1, iterations + 1):
        trial = wrapper_step(x, M, error, h, total, moments, t, lr)
        miss = armor_error(**trial, Wb=Wb)
        after = armor_loss(miss, h)
        if after < loss:
            x, error, loss = trial, miss, after
        else:
            lr /= 2
        # the sparse core is exact, so it never raises the loss
        group = drawn_group(x, error, h, total, generator)
        S, flipped, miss, fall = core_step(**x, M=M, error=error, h=h, group=group)
        if fall >= 0:
            for moment in moments:               # stale for an entry that comes back
                moment["S"].mul_(flipped).mul_(M)
            x, M, error, loss = x | dict(S=S), flipped, miss, loss - fall
        trace.append((loss / total).item())
    ends = [folded(x, r1, r2), folded(start, r1, r2)]
    return min(ends, key=lambda layer: proxy(W, layer.dequantize(), h))


class Promise:
    """ARMOR's promise, asserted: no iteration raises a layer's proxy loss. It hands out the list
    that collects a layer's losses."""

    def __init__(self):
        self.trace, self.rise, self.end = [], 0.0, 0.0

    def tell(self):
        """An empty list for the next layer."""
        self.trace = []
        return self.trace

    def note(self, where, loss):
        """What became of it, and the proxy loss of the layer as it is stored."""
        steps = [after - before for before, after in itertools.pairwise(self.trace)]
        self.rise = max([self.rise, *steps])
        assert self.rise <= 1e-6, f"{where}: ARMOR's proxy loss rose"
        self.end = max(self.end, loss / max(self.trace[0], 1e-9))        # against NoWag-P's

    def metrics(self):
        """The largest rise of any step, and the worst layer's loss over NoWag-P's."""
        return dict(rise=self.rise, worst_layer=self.end)


METHODS["armor"], MEMORIES["trace"] = armor, Promise


# === rtn: round to nearest, a scale and a zero a group ============================================


def rtn(W, *, bits: Literal[2, 3, 4, 8] = 4, group=32, symmetric=False):
    """Round to nearest, a scale and a zero for every `group` inputs of a row (0: all of them)."""
    group = group or W.size(1)
    codes, scale, zero = quantize(W, bits, group, symmetric)
    return pack_int(codes, scale, zero, bits=bits, group=group)


METHODS["rtn"] = rtn


# === gptq: 2210.17323, column by column, the rest corrected for the rounding ======================


def reading(layer, order=None, **options):
    """The packed layer with PackedLinear's options, its columns said to be the inputs `order`."""
    spec, state = layer.spec() | options, dict(layer.named_buffers())
    if order is not None:
        spec, state = spec | dict(order=True), state | dict(order=order.to(order_dtype(len(order))))
    return packed((layer.out_features, layer.in_features), None, spec, state)


def gptq(W, H, *, bits: Literal[2, 3, 4, 8] = 4, group=32, damp: Positive = 0.01, act_order=False,
         scales: Literal["current", "block", "static"] = "static"):
    """GPTQ (2210.17323): columns in order; each one's rounding error goes to the columns behind it.

    scales: a group's scale and zero are of its weights as they are when it begins (current); as
    they were when the block of 128 columns began, which corrects only itself until it ends (block,
    as released); or as they were given (static). A diagonal H gives RTN. act_order: the inputs of
    most energy first; stored in that order, so that groups stay neighbours, but static groups are
    of the order given, and stay in it."""
    order = torch.arange(len(H), device=H.device)
    if act_order:
        order = H.diagonal().argsort(descending=True, stable=True)
    W, U = alive(W, H), inverse_factor(H[order][:, order], damp)
    n, size, static = W.size(1), group or W.size(1), scales == "static"
    _, scale, zero = quantize(W, bits, size)                                        # [m, groups]
    owner, W = (order if static else torch.arange(n)) // size, W[:, order]               # [n]
    codes, step = torch.zeros_like(W, dtype=torch.int), size if scales == "current" else 128
    for start in range(0, n, step):
        end = min(start + step, n)
        w, errors = W[:, start:end].clone(), torch.zeros_like(W[:, start:end])
        for j, g in zip(range(start, end), owner[start:end].tolist()):
            if j % size == 0 and not static:
                _, scale[:, g:g + 1], zero[:, g:g + 1] = quantize(W[:, j:j + size], bits, -1)
            at = j - start
            q = ((w[:, at] / scale[:, g]).round() + zero[:, g]).clamp(0, 2 ** bits - 1)    # [m]
            codes[:, j] = q.int()
            errors[:, at] = (w[:, at] - (q - zero[:, g]) * scale[:, g]) / U[j, j]
            w[:, at:] -= errors[:, at, None] * U[j, j:end]
        W[:, end:] -= errors @ U[start:end, end:]
    if act_order and not static:
        return reading(pack_int(codes, scale, zero, bits=bits, group=size), order)
    return pack_int(codes[:, order.argsort()], scale, zero, bits=bits, group=size)


METHODS["gptq"] = gptq
PRESETS["gptq"] = dict(method="gptq", sequential=True)


# === baq: 2506.05664, columns get bits until all of them lose alike ===============================


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
    lo, hi = -64.0, 64.0                         # a shift, so that the clamped ones sum to n R
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
    codes, lo, hi, losses = columns(W, U, width)
    if allocate:
        width = widths_of(losses, bits)
        codes, lo, hi, _ = columns(W, U, width)
    return stored(W, columns_state(codes, width, lo, hi))


METHODS["baq"] = baq
PRESETS["baq"] = dict(method="baq", sequential=True)


# === mixed: 2311.16442, 2 bits, and 4 for the groups of columns that need them ====================


def mixed(W, h, generator, *, share: Share = 0.25, group: Count = 16,
          by: Literal["sensitivity", "range", "random"] = "sensitivity"):
    """2-bit groups, and 4 bits for the `share` of column groups that need them (after 2311.16442).

    sensitivity: mean h of the group times the mean squared range of its rows;  range: the latter
    alone; random. Scales are 4-bit codes themselves. ours: the layout, of which the paper's
    abstract says only that it is aligned, and a group's width for all rows.
    """
    if W.size(1) % group:
        raise UserError(f"--group {group}: a group that divides {W.size(1)} inputs, like "
                        f"{math.gcd(max(group, 4), W.size(1))}")
    w = W.unflatten(1, (-1, group))                                                 # [m, groups, g]
    score = ((w.amax(-1) - w.amin(-1)) ** 2).mean(0)                                     # [groups]
    if by == "sensitivity":
        score = score * mend(h).view(-1, group).mean(1)
    elif by == "random":
        score = torch.rand(len(score), generator=generator).to(W.device)
    four = torch.zeros_like(score, dtype=torch.bool)
    four[score.argsort(descending=True)[:round(share * len(score))]] = True
    return stored(W, mixed_state(W, four, group))


METHODS["mixed"] = mixed


# === smoothing: exactly equivalent models whose weights round better =============================
# A scale s on the inputs of some layers, their columns times s, the norm or the rows before them
# over s: the model is exactly equivalent, and its weights round better.


def check_rounds(c, f):
    """UserError if nothing rounds what was smoothed."""
    if c.method not in ("rtn", "gptq"):
        raise UserError(f"--smooth {c.smooth} goes before --method rtn or gptq, not {c.method}")


def rounded(f, W):
    """W as the run's rounding would leave it, without data: to nearest at its --bits and
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


def check_norms(model, option):
    """UserError for norms whose weight is not simply a factor of what it makes."""
    if model.config.family.norm != "rms":
        raise UserError(f"{option} scales the weights of RMSNorms, and {model.config.model_type} "
                        "has other norms: leave it out")


def fold(block, names, maker, scale):
    """Scale the inputs of the layers by 1/scale and their columns by scale, in place."""
    for name in names:
        block.get_submodule(name).weight.mul_(scale)
    maker.weight.div_(scale[:, None] if maker.weight.dim() == 2 else scale)
    if getattr(maker, "bias", None) is not None:
        maker.bias.div_(scale)


# === smoothquant: 2312.03788, inputs scaled by sizes, theirs and the weights', one exponent for all


class Largest:
    """The largest absolute value of every input."""

    def __init__(self):
        self.most = 0.0

    def note(self, x):
        """Add the inputs [N, n] of some tokens."""
        self.most = x.abs().amax(0).clamp(min=self.most)

    def value(self):
        """[n]"""
        return self.most


def smooth_block(block, config, statistics, k, points):
    """SmoothQuant+'s scales at α = k / points on one block, in place; nothing for None."""
    for names, maker, _ in sharing(block, config) if k is not None else []:
        weight = torch.stack([block.get_submodule(n).weight.abs().amax(0) for n in names]).amax(0)
        alpha, x = k / points, statistics[names[0]]["absmax"].clamp(min=1e-5)
        fold(block, names, maker, x ** alpha / weight.clamp(min=1e-5) ** (1 - alpha))


@torch.no_grad()
def smoothquant(model, inputs, where, f, *, points: Count = 20):
    """SmoothQuant+ (2312.03788):  s = max|x|^α / max|W|^(1-α),  one α for the whole model.

    α of 0, 1/20 … 1, or no smoothing, by the summed squared error of the blocks' outputs when the
    blocks before are rounded too, on the first calibration batch. ours: the grid and the candidate
    "none".
    """
    check_norms(model, "--smooth smoothquant")
    whole, statistics, x = [], [], inputs
    for i, block in enumerate(model.layers):
        x, found = watch(block, x, where(i), absmax=Largest)
        whole.append(x[0])
        statistics.append(found)
    best = (math.inf, None)
    for k in tqdm([None, *range(points + 1)], desc="smoothquant", disable=None, leave=False):
        x, error = inputs[0], 0.0
        for i, block in enumerate(model.layers):
            trial = copy.deepcopy(block)
            smooth_block(trial, model.config, statistics[i], k, points)
            for layer in linears(trial).values():
                layer.weight.copy_(rounded(f, layer.weight))
            x = trial(x, *where(i))
            error += ((x - whole[i]) ** 2).mean().item()
        best = min(best, (error, k), key=lambda x: x[0])
    for i, block in enumerate(model.layers):
        smooth_block(block, model.config, statistics[i], best[1], points)


STATISTICS["absmax"], SMOOTH["smoothquant"], CHECKS["smoothquant"] = (
    Largest, smoothquant, check_rounds)
PRESETS["smoothquant"] = dict(method="rtn", smooth="smoothquant")


# === awq: 2306.00978, inputs scaled by their mean sizes, layer by layer, then ranges clipped ======


def absolute(x):
    """Σ |x| of every input.   [N, n] -> [n]"""
    return x.abs().sum(0)


def clip_groups(W, H, f):
    """Clamp each group of a row to the largest of 1, .95 … .55 of its range that errs least, in
    place."""
    group = f.method.keywords["group"]
    size = W.size(1) if not group or W.size(1) % group else group
    w = W.unflatten(1, (-1, size))                                                       # [m, G, g]
    span = torch.arange(H.size(0), device=H.device).view(-1, size)                       # [G, g]
    blocks, clipped = H[span[:, :, None], span[:, None]], w                              # [G, g, g]
    best = torch.full(w.shape[:2], math.inf, device=W.device)                            # [m, G]
    for i in range(10):
        edge = w.abs().amax(-1, keepdim=True) * (1 - i / 20)
        clamped = w.clamp(-edge, edge)
        d = rounded(f, clamped.flatten(1)).view_as(w) - w
        error = torch.einsum("mGi,Gij,mGj->mG", d, blocks, d)
        better = error < best
        best = torch.where(better, error, best)
        clipped = torch.where(better[..., None], clamped, clipped)
    W.copy_(clipped.flatten(1))


def awq_scale(run, layers, inputs, mean, points, f):
    """The scale of some layers' inputs whose rounded part `run` errs least on `inputs`.   [n]"""
    whole, old = run(*inputs), [layer.weight.clone() for layer in layers]
    best = (math.inf, None)
    for k in range(points):
        scale = (mean ** (k / points)).clamp(min=1e-4)
        scale = scale / (scale.max() * scale.min()).sqrt()
        for layer, W in zip(layers, old):
            layer.weight.copy_(rounded(f, W * scale) / scale)
        error = ((run(*inputs) - whole) ** 2).mean().item()
        best = min(best, (error, scale), key=lambda x: x[0])
    for layer, W in zip(layers, old):
        layer.weight.copy_(W)
    return best[1]


@torch.no_grad()
def awq(model, inputs, where, f, *, points: Count = 20, clip=True):
    """AWQ (2306.00978):  s = mean|x|^r / √(max min), the r of 0, 1/20 … whose rounded part errs
    least.

    The part is attention, the MLP or the layer itself, on the first calibration batch. Then (clip)
    each group's range shrinks to what leaves its own output closest, q and k excepted, here by the
    exact error d H dᵀ of the group (ours: the authors use 512 tokens).
    """
    check_norms(model, "--smooth awq")
    for i, block in enumerate(tqdm(model.layers, desc="awq", disable=None, leave=False)):
        at = where(i)
        for names, maker, part in sharing(block, model.config):
            _, statistics = watch(block, inputs, at, H=partial(Mean, second_moment),
                                  absmean=partial(Mean, absolute))
            run, seen = block.get_submodule(part), []
            hook = run.register_forward_pre_hook(lambda m, args: seen.append(args))
            block(inputs[0], *at)
            hook.remove()
            layers, mean = [block.get_submodule(n) for n in names], statistics[names[0]]["absmean"]
            scale = awq_scale(run, layers, seen[0], mean, points, f)
            fold(block, names, maker, scale)
            for name, layer in zip(names, layers):
                if clip and not name.endswith(("q_proj", "k_proj")):
                    clip_groups(layer.weight, statistics[name]["H"] / scale / scale[:, None], f)
        inputs = [block(x, *at) for x in inputs]


SMOOTH["awq"], CHECKS["awq"] = awq, check_rounds
PRESETS["awq"] = dict(method="rtn", smooth="awq")


# === w4a4, comet, halo: 2410.12168, 2501.02625, weights and activations in few bits ===============


def largest_power(n, most):
    """The largest power of two that divides n and is at most `most`."""
    return min(n & -n, 1 << most.bit_length() - 1)


def w4a4(W, absmax, *, bits: Literal[2, 3, 4, 8] = 4, act: Range("[2, 8]") = 4, group=32, block=0,
         wide=False, order=False, tau=5.0, rotate=0):
    """Weights and activations in few bits, both rounded; activations a token at a time (simulated).

    block: activations have a scale for every so many inputs, not for all. wide, COMET (2410.12168):
    blocks with an input that rises above tau times the median keep 8 bits (ours: tau);  order:
    inputs by their largest activation, so that such blocks are few. rotate, as HALO (2501.02625): W
    H and x H by a Hadamard matrix of that size, which spreads outliers.
    """
    if wide and not block or order and rotate:
        raise UserError(f"--block {block} --rotate {rotate}: wide blocks need a --block; inputs "
                        "are either ordered or rotated")
    n = len(absmax)
    block, rotate = (largest_power(n, x) if x else 0 for x in (block, rotate))
    at = absmax.argsort(descending=True, stable=True) if order else torch.arange(n).to(W.device)
    big = (absmax > tau * absmax.median())[at].view(-1, block or n).any(1)               # [blocks]
    mask = sum(1 << b for b in big.nonzero().flatten().tolist()) if wide else 0
    options, W = dict(rotate=rotate, act=[act, block, mask]), W[:, at]
    layer = rtn(kernels.rotate(W, rotate) if rotate else W, bits=bits, group=group)
    return reading(layer, at if order else None, **options)


METHODS["w4a4"] = w4a4
PRESETS["comet"] = dict(method="w4a4", block=16, wide=True, order=True)
PRESETS["halo"] = dict(method="w4a4", rotate=32)


# === mxfp4: 2505.14669, rotated, in 4-bit floats, a power of two for every 32 =====================


def mxfp4(W, *, rotate=0):
    """MXFP4, Quartet's format (2505.14669): E2M1 codes, a power of two for every 32 inputs of a
    row.   rotate: by a Hadamard matrix of that size first, which makes them Gaussian."""
    if not rotate:
        return stored(W, mxfp4_state(W))
    rotate = largest_power(W.size(1), rotate)
    return stored(W, mxfp4_state(kernels.rotate(W, rotate)), rotate=rotate)


METHODS["mxfp4"] = mxfp4
PRESETS["mxfp4"] = dict(method="mxfp4", rotate=32)


# === nearest: weighted distances of vectors to centres, and the least of them, in pieces ==========


def distances(X, w, C):
    """Σ_t w_t (x_t - c_kt)² of vectors and centres, less what is alike for all centres, in one
    product and in pieces that a cache holds.   X, w [N, d], C [K, d] -> [n, K], …"""
    vectors, centres = torch.cat([w, w * X], 1), torch.cat([C * C, -2 * C], 1).T.contiguous()
    most = 1 << (26 if X.is_cuda else 20)                        # numbers of a piece
    return (part @ centres for part in vectors.split(max(most // len(C), 16)))


def nearest_code(X, w, C):
    """The centre of least distance for every vector.   [N]"""
    return torch.cat([smallest(x) for x in distances(X, w, C)])


def smallest(x, block=64):
    """x.argmin(1) of x [n, K]. On a CPU amin is twenty times as fast: first a block, then in it."""
    if x.is_cuda or x.size(1) % block or x.size(1) == block:
        return x.argmin(1)
    blocks, row = x.view(len(x), -1, block), torch.arange(len(x))
    first = blocks.amin(2).argmin(1)                                                      # [n]
    return block * first + blocks[row, first].argmin(1)


# === kmeans: vectors of weights as they are, each one of a few, the control =======================

MANY = 1 << 24           # distances a round, above which rounds are of some vectors


def seeds(X, w, K, generator):
    """k-means++ on a subsample: each next centre is one of K random points (of 256 at most, and of
    each 256 as many as there are 256 centres: ours), by its distance to the nearest centre so far,
    clipped at 1.   -> [K, d]"""
    pick = lambda n: torch.randint(len(X), (n,), generator=generator).to(X.device)
    C = X[pick(1)]
    while len(C) < K:
        at, count = pick(min(K, 256)), min(max(1, K // 256), K - len(C))
        x, weight = X[at], w[at]
        near = torch.cat([part.amin(1) for part in distances(x, weight, C)])
        p = (near + (weight * x * x).sum(1)).clamp(1e-12, 1).cpu()                        # [256]
        C = torch.cat([C, x[torch.multinomial(p, count, generator=generator).to(X.device)]])
    return C


def kmeans(X, w, K, generator, rounds=100, whole=5):
    """Weighted k-means: (codebook [K, d], codes [N]); an empty cluster restarts at the worst-served
    point.

    If a round took MANY distances, all but the `whole` last are mini-batches (Sculley, 2010) of 4 K
    random vectors; centres are then means in which what is a round older counts 0.9 of the new.
    """
    C, old, mass = seeds(X, w, K, generator), None, torch.zeros(K, X.size(1)).to(X)
    for i in range(rounds):
        some = len(X) * K > MANY and i < rounds - whole
        at = torch.randint(len(X), (4 * K,), generator=generator).to(X.device) if some else ...
        x, u = X[at], w[at]
        code = nearest_code(x, u, C)
        if old is not None and torch.equal(code, old):
            break
        weight = torch.zeros_like(C).index_add(0, code, u)                               # [K, d]
        mean = torch.zeros_like(C).index_add(0, code, x * u) / (weight + 1e-8)
        if some:
            mass = 0.9 * mass + weight
            C = C + weight / (mass + 1e-8) * (mean - C)
            continue
        C, old = mean, code
        empty = (weight.sum(1) == 0).nonzero().flatten()[:len(X)]
        if len(empty):
            far = ((X - C[code]) ** 2 * w).sum(1)
            C[empty] = X[far.topk(len(empty)).indices]
    return C, nearest_code(X, w, C)


def vectors(X, dim):
    """Rows cut into vectors of `dim` neighbours, padded by their mean.
    [m, n] -> [m ceil(n/d), d]"""
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


PRESETS["kmeans"] = dict(method="nowag_vq", norms=False, weights=False)


# === nowag_vq: 2504.14569, k-means of normalised vectors, weighted by activations =================


def nowag_vq(W, h, generator, *, bits: Range("[1, 16]") = 2, dim=0, rounds: Count = 100, norms=True,
             weights=True):
    """NoWag-VQ (2504.14569): `dim` neighbours of the normalised weight as one of 2^(bits dim),
    weighted by h.

    norms False: of the weight itself;  weights False: unweighted;  both: plain k-means.
    """
    dim = code_size(W, bits, dim)
    Wb, r1, r2 = normalise(W) if norms else (W, None, None)
    h = mend(h) / mend(h).mean().clamp(min=1e-30) if weights else torch.ones_like(h)
    w = F.pad(h.clamp(min=1e-6), (0, -W.size(1) % dim)).expand(len(W), -1).reshape(-1, dim)
    C, code = kmeans(vectors(Wb, dim), w, 2 ** (bits * dim), generator, rounds)
    return pack_vq(code.view(len(W), -1), C, r1, r2, inputs=W.size(1))


METHODS["nowag_vq"] = nowag_vq


# === gptvq: 2402.15319, k-means, some columns at a time, the rest corrected =======================


def gptvq(W, H, generator, *, bits: Range("[1, 16]") = 2, dim=0, rounds: Count = 100,
          damp: Positive = 0.01):
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


METHODS["gptvq"] = gptvq
PRESETS["gptvq"] = dict(method="gptvq", sequential=True)


# === distilled, forward_kl, ce: cut the whole model, then distil it from what it was ==============
# A loss is one number a token [N]. Its positional arguments name what it reads: states() of the
# student and the teacher, and the next ids, targets [N].


def forward_kl(student, teacher):
    """KL(p ‖ q), p the teacher's distribution.   [N]"""
    return linear_distill(student.hidden, student.head, teacher.hidden, teacher.head)


def ce(student, targets):
    """-log q of the next token: no teacher.   [N]"""
    return -linear_logprob(student.hidden, student.head, targets)


def states(model, tokens):
    """Of a model at all but the last token: final states `hidden` [N, D], its `head` [V, D], and
    what its last block read, `before` [N, D]."""
    seen = []
    hook = model.layers[-1].register_forward_pre_hook(lambda layer, args: seen.append(args[0]))
    hidden = model(tokens)
    hook.remove()
    hidden, before = (x[:, :-1].flatten(0, 1) for x in (hidden, seen[0]))
    return SimpleNamespace(hidden=hidden, head=model.head, before=before)


def token_losses(loss, student, teacher, tokens):
    """One of LOSSES on tokens [B, T]   -> [B (T-1)]"""
    known = dict(student=states(student, tokens), targets=tokens[:, 1:].flatten())
    if "teacher" in needs(loss):
        with torch.no_grad():
            known["teacher"] = states(teacher, tokens)
    return loss(*(known[k] for k in needs(loss)))


@torch.no_grad()
def divergence(student, teacher, batches):
    """Mean KL(teacher ‖ student) over batches [b, T] of tokens, in nats."""
    values = [token_losses(forward_kl, student, teacher, x) for x in batches]
    return torch.cat(values).double().mean().item()


def forget(model):
    """Drop what the last forward kept for balance losses: it holds the graph, and cannot be
    copied."""
    for m in model.modules():
        for key in ("router_logits", "routing"):
            if hasattr(m, key):
                setattr(m, key, None)


def fit(groups, loss_of, steps, name, *, lr, rate, betas=(0.9, 0.95), clip=math.inf,
        clip_value=math.inf):
    """AdamW on parameter groups, in place: on loss_of(step), a scalar, at lr * rate(step).

    clip: of the gradients' norm; clip_value: of each of their numbers. Raises UserError, with the
    run's name, for a loss or a gradient that is not finite.
    """
    opt = torch.optim.AdamW(groups, lr, betas=betas)
    parameters = [p for group in opt.param_groups for p in group["params"]]
    bar = tqdm(range(steps), desc=name, disable=None, leave=False)
    for step in bar:
        for group in opt.param_groups:
            group["lr"] = lr * rate(step)
        loss = loss_of(step)
        loss.backward()
        if clip_value < math.inf:
            nn.utils.clip_grad_value_(parameters, clip_value)
        norm = nn.utils.clip_grad_norm_(parameters, clip).item()
        if not math.isfinite(loss.item() + norm):
            raise UserError(f"the loss of {name} became {loss.item()}, its gradient {norm} at step "
                            f"{step}: a learning rate below {lr}")
        opt.step()
        opt.zero_grad()
        if step % 10 == 0:
            bar.set_postfix_str(f"loss {loss.item():.4f}")


LOSSES["forward_kl"], LOSSES["ce"] = forward_kl, ce


# === distillation: a student brought back to its teacher, after every cut =========================


def student_loss(student, teacher, loss, penalty, batch_of, history, step):
    """The mean loss of a step's batch, noted in history, and the student's penalty if it has
    one."""
    value = token_losses(loss, student, teacher, batch_of(step)).mean()
    history.append(value.item())
    return value if penalty is None else value + penalty(student)


def distil(student, teacher, batch_of, steps, *, lr=1e-3, floor=0.1, warmup=0.05, decay=0.1,
           clip=1.0, loss=forward_kl, penalty=None, name="distil"):
    """Train what requires a gradient, in place, on batch_of(step) -> tokens [b, T]. -> losses of
    all steps, without the penalty(student) that is added to them

    The optimiser's state and schedule are new in every call: linear warm-up over a share of the
    steps, then a cosine to floor * lr; decay on matrices. lr, warmup and the betas are ours.
    """
    parameters = [p for p in student.parameters() if p.requires_grad]
    if not parameters:
        raise UserError(f"{name}: no parameter of this student is trained")
    matrices, rest = [p for p in parameters if p.dim() > 1], [p for p in parameters if p.dim() <= 1]
    groups = [dict(params=x, weight_decay=y) for x, y in ((matrices, decay), (rest, 0.0)) if x]
    warm, history = max(1, round(warmup * steps)), []

    def rate(step):
        turn = math.pi * max(0, step + 1 - warm) / max(1, steps - warm)
        return min((step + 1) / warm, floor + (1 - floor) * (1 + math.cos(turn)) / 2)
    loss_of = partial(student_loss, student, teacher, loss, penalty, batch_of, history)
    fit(groups, loss_of, steps, name, lr=lr, rate=rate, clip=clip)
    forget(student)
    return history


def cut_and_distil(model, tok, tokens, held, c, f, run):
    """Cut and distil, stage by stage. -> the small model, what the table says of it

    A method is a generator of students: it cuts, we distil what it hands over, it goes on from
    there."""
    teacher, g = copy.deepcopy(model), torch.Generator().manual_seed(c.seed)
    ids = text.stream(text.shuffled(c.data, g), tok, max(1, c.kd_steps * c.kd_batch) * c.context)
    ids = ids[:len(ids) // c.context * c.context].view(-1, c.context)                 # [windows, T]
    order, cut, done = torch.randperm(len(ids), generator=g), [], 0
    stages = f.method.keywords.get("stages", 1)

    def batch_of(first, step):
        at = [(first + step) * c.kd_batch + i for i in range(c.kd_batch)]
        return ids[order[[i % len(order) for i in at]]].to(c.device)
    for i, model in enumerate(f.method(model.requires_grad_(), teacher, [*tokens.split(8)], g)):
        cut.append(evaluate(model, held))
        steps = c.kd_steps * (i + 1) // stages - c.kd_steps * i // stages
        if steps:
            losses = distil(model, teacher, partial(batch_of, done), steps, lr=c.kd_lr,
                            loss=f.kd_loss, penalty=PENALTIES.get(c.method), name=c.method)
            run.log(i + 1, cut_nats=cut[-1], distilled_nats=evaluate(model, held),
                    train=losses[-1])
        done += steps
    model.requires_grad_(False)
    size = sum(p.numel() for p in model.parameters())
    return model, dict(bits=16.0, parameters=size, cut_loss=cut[-1], first_cut_loss=cut[0],
                       share=size / sum(p.numel() for p in teacher.parameters()))


PENALTIES = dict()       # {method: what is added to the loss of its student}
WALKS["batches"] = cut_and_distil


# === slicing: some neurons of every MLP, some groups of heads =====================================
# Models come in as they are: `config`, `layers` with `self_attn` and `mlp` (or None), Hugging
# Face's names.


def build(model, state, **changes):
    """A model of the same class with some config fields changed, holding the tensors of `state`."""
    with torch.device("meta"):
        new = type(model)(replace(model.config, **changes))
    new.load_state_dict({k: v.detach().clone() for k, v in state.items()}, assign=True)
    return new.requires_grad_()


def mlps(model):
    """{name: MLP} of every MLP, of every expert where there are experts:
    "layers.0.mlp.experts.3"."""
    return {name: m for name, m in model.named_modules() if hasattr(m, "gate_proj")}


def top(score, count):
    """The `count` largest, ties by index, in their old order.   [n] -> [count]"""
    return score.argsort(descending=True, stable=True)[:count].sort().values


def whole_multiple(width, multiple, most):
    """The multiple nearest to a width, at least one multiple, at most `most`."""
    return min(most, max(multiple, round(width / multiple) * multiple))


def stage_sizes(size, share, stages, multiple):
    """Sizes on the way to share * size, by equal ratios, in multiples:
    stage_sizes(64, .125, 2, 8) -> [24, 8]"""
    return [whole_multiple(size * share ** (i / stages), multiple, size)
            for i in range(1, stages + 1)]


def slice_neurons(model, kept):
    """Keep some neurons of every MLP, as many in each: kept {name: indices}. -> a new model

    A neuron is a row of gate, one of up and a column of down, so the cut is exact."""
    state = dict(model.state_dict())
    for name, at in kept.items():
        for part in ("gate_proj", "up_proj"):
            for kind in ("weight", "bias"):
                key = f"{name}.{part}.{kind}"
                state |= {key: state[key][at]} if key in state else {}
        state[f"{name}.down_proj.weight"] = state[f"{name}.down_proj.weight"][:, at]
    return build(model, state, intermediate_size=len(next(iter(kept.values()))))


def slice_groups(model, kept):
    """Keep some groups of heads, a key head and the queries that share it: kept [L] indices.
    -> a new model"""
    c, state = model.config, dict(model.state_dict())
    share = c.num_attention_heads // c.num_key_value_heads
    for i, at in enumerate(kept):
        rows = (at[:, None] * c.head_dim + torch.arange(c.head_dim).to(at)).flatten()      # of k, v
        span = share * c.head_dim
        queries = (at[:, None] * span + torch.arange(span).to(at)).flatten()               # of q, o
        for part, index in (("q_proj", queries), ("k_proj", rows), ("v_proj", rows)):
            for kind in ("weight", "bias"):
                key = f"layers.{i}.self_attn.{part}.{kind}"
                state |= {key: state[key][index]} if key in state else {}
        key = f"layers.{i}.self_attn.o_proj.weight"
        state[key] = state[key][:, queries]
    return build(model, state, num_key_value_heads=len(kept[0]),
                 num_attention_heads=share * len(kept[0]))


# === slimmoe, kd_topk: 2506.18349, neurons of every expert, cut in stages, then distilled =========


def kd_topk(student, teacher, *, k: Count = 8):
    """SlimMoE (2506.18349):  -Σ_{i in T} p_i log q_i,  T the teacher's k likeliest, q over all V.
    [N]

    p is not renormalised over T (ours: the paper's choice is not known; it is a factor a token).
    The optimum has no mass outside T: where k tokens are not nearly all of p, forward_kl distils
    better. log q of T is that of its first, plus differences of logits: no [N, V].
    """
    at, p = likeliest(teacher.hidden, teacher.head, k)                                   # [N, k]
    first = linear_logprob(student.hidden, student.head, at[:, 0])                       # [N]
    z = wide(torch.einsum("nd,nkd->nk", student.hidden, student.head[at]))               # [N, k]
    return -(p * (first[:, None] + z - z[:, :1])).sum(-1)


def taylor(mlp):
    """What deleting a neuron would change, to first order, from the gradients at hand, signed.
    [f]

    <∂ℓ/∂W1_j, W1_j> + <∂ℓ/∂W3_j, W3_j> + <∂ℓ/∂W2_:j, W2_:j>;  W1, W3, W2 are gate, up, down."""
    w1, w3, w2 = (layer.weight for layer in (mlp.gate_proj, mlp.up_proj, mlp.down_proj))
    return (w1 * w1.grad).sum(1) + (w3 * w3.grad).sum(1) + (w2 * w2.grad).sum(0)


def taylor_groups(attention, groups):
    """The same for groups of heads: rows of q, k, v and columns of o.   [G]"""
    parts = [(layer.weight * layer.weight.grad).sum(1).view(groups, -1).sum(1)
             for layer in (attention.q_proj, attention.k_proj, attention.v_proj)]
    out = attention.o_proj.weight
    return sum(parts) + (out * out.grad).sum(0).view(groups, -1).sum(1)


def sensitivity(model, teacher, batches, loss, power=1):
    """Σ over batches |Taylor term|^power of every neuron and group of heads.
    -> {name: [f]}, [L] of [G]

    Raises UserError where the gradient is rounding noise: at student = teacher the exact KL has
    none."""
    groups = model.config.num_key_value_heads
    neurons, heads = {name: 0.0 for name in mlps(model)}, [0.0] * len(model.layers)
    for tokens in tqdm(batches, desc="importance", disable=None, leave=False):
        model.zero_grad()
        token_losses(loss, model, teacher, tokens).mean().backward()
        with torch.no_grad():
            for name, m in mlps(model).items():
                neurons[name] = neurons[name] + taylor(m).abs() ** power
            for i, block in enumerate(model.layers):
                heads[i] = heads[i] + taylor_groups(block.self_attn, groups).abs() ** power
    model.zero_grad()
    forget(model)
    W = wide(next(iter(mlps(model).values())).down_proj.weight.detach())
    largest = (max(x.max().item() for x in neurons.values()) / len(batches)) ** (1 / power)
    if largest <= 1e3 * torch.finfo(W.dtype).eps * W.abs().mean().item():
        raise UserError(f"the largest importance is {largest:.2g}, rounding noise: at student = "
                        "teacher this loss has no gradient; take kd_topk, ce or fisher")
    return neurons, heads


def random_scores(model, generator):
    """Uniform numbers instead: the baseline. -> {name: [f]}, [L] of [G]"""
    draw = lambda n, like: torch.rand(n, generator=generator).to(like.device)
    neurons = {name: draw(len(m.gate_proj.weight), m.gate_proj.weight)
               for name, m in mlps(model).items()}
    return neurons, [draw(model.config.num_key_value_heads, block.self_attn.o_proj.weight)
                     for block in model.layers]


def mend_scores(model, neurons):
    """An expert that no token reached has scores 0: there the norm of a neuron's weights
    decides."""
    for name, m in mlps(model).items():
        if not neurons[name].any():
            w1, w3, w2 = (layer.weight.detach() for layer in (m.gate_proj, m.up_proj, m.down_proj))
            neurons[name] = (w1.square().sum(1) + w3.square().sum(1) + w2.square().sum(0)).sqrt()
    return neurons


# the loss whose gradient a score is of, and the power of a batch's score; fisher: Σ_b <g, θ>² of
# the likelihood's gradient (ours: the loss is not named)
IMPORTANCE = dict(kd_topk=(kd_topk, 1), ce=(ce, 1), fisher=(ce, 2))


def importance_of(kind, model, teacher, batches, generator):
    """Scores of neurons and groups: a row of IMPORTANCE, or random."""
    if kind == "random":
        return random_scores(model, generator)
    neurons, heads = sensitivity(model, teacher, batches, *IMPORTANCE[kind])
    return mend_scores(model, neurons), heads


def slimmoe(model, teacher, batches, generator, *, share: Range("(0, 1]") = 0.125,
            stages: Count = 2, importance: Literal["random", *IMPORTANCE] = "kd_topk",
            share_groups: Range("(0, 1]") = 1.0, multiple: Count = 8, at_once=False):
    """SlimMoE (2506.18349): all experts and the router stay, each expert keeps its most important
    neurons.

    Stages s = 1…S score the current student, cut to share^(s/S) of the width (and
    share_groups^(s/S) of the groups of heads), and are distilled from the first model. A dense MLP
    is one expert. ours: the geometric path, and scores summed over batches in absolute value;
    multiple is 64 at full size. at_once: the control that cuts everything in the first stage, so
    that the others only restart the distillation.
    """
    widths = stage_sizes(model.config.intermediate_size, share, stages, multiple)
    groups = stage_sizes(model.config.num_key_value_heads, share_groups, stages, 1)
    if at_once:
        widths, groups = widths[-1:] * stages, groups[-1:] * stages
    for width, count in zip(widths, groups):
        neurons, heads = importance_of(importance, model, teacher, batches, generator)
        model = slice_neurons(model, {name: top(x, width) for name, x in neurons.items()})
        model = slice_groups(model, [top(x, count) for x in heads])
        yield model


def check_stages(c, f):
    """UserError where at_once would change nothing."""
    if f.method.keywords["at_once"] and f.method.keywords["stages"] == 1:
        raise UserError("--at_once true: a single stage cuts at once anyway; raise --stages")


LOSSES["kd_topk"], METHODS["slimmoe"] = kd_topk, slimmoe
CHECKS["slimmoe"] = check_stages
PRESETS["slimmoe"] = dict(method="slimmoe", init="base:pretrain_moe")


# === fresh, dense_active: slimmoe's sizes with new weights, and a dense model of its active size ==


@torch.no_grad()
def renewed(model, generator):
    """The model with new weights, in place: std 0.02, on outputs 1/√(2L) of it (GPT-2)."""
    for name, p in model.named_parameters():
        out = name.endswith(("o_proj.weight", "down_proj.weight"))
        std = 0.02 / math.sqrt(2 * len(model.layers) if out else 1)
        if p.dim() == 1:
            one = model.config.family.norm != "rms_plus_one"
            p.fill_(0.0 if name.endswith("bias") else float(one))
        else:
            p.copy_(torch.randn(p.shape, generator=generator) * std)
    return model


def fresh(model, teacher, batches, generator, *, share: Range("(0, 1]") = 0.125,
          share_groups: Range("(0, 1]") = 1.0, multiple: Count = 8):
    """The baseline of slimmoe's last sizes and new weights."""
    width = stage_sizes(model.config.intermediate_size, share, 1, multiple)[0]
    count = stage_sizes(model.config.num_key_value_heads, share_groups, 1, 1)[0]
    model = slice_neurons(model, {name: torch.arange(width) for name in mlps(model)})
    model = slice_groups(model, [torch.arange(count)] * len(model.layers))
    yield renewed(model, generator)


def dense_active(model, teacher, batches, generator, *, share: Range("(0, 1]") = 0.125,
                 multiple: Count = 8):
    """A dense model with new weights, as wide as the experts that a token of slimmoe's model
    passes."""
    c = model.config
    if not c.moe:
        raise UserError("dense_active needs a model with experts")
    width = stage_sizes(c.intermediate_size, share, 1, multiple)[0] * c.num_experts_per_tok
    state = {k: v for k, v in model.state_dict().items() if ".mlp." not in k}
    D = c.hidden_size
    sizes = dict(gate=(width, D), up=(width, D), down=(D, width))
    for i in range(len(model.layers)):
        state |= {f"layers.{i}.mlp.{part}_proj.weight": model.head.new_zeros(size)
                  for part, size in sizes.items()}
    if c.family.norm != "rms":
        raise UserError(f"dense_active: no family without experts has the norms of {c.model_type}")
    kind = dict(qwen3_moe="qwen3", mixtral="mistral" if c.layer_types else "llama")[c.model_type]
    yield renewed(build(model, state, model_type=kind, num_experts=0, intermediate_size=width),
                  generator)


METHODS["fresh"] = fresh
METHODS["dense_active"] = dense_active
PRESETS["fresh"] = dict(method="fresh", init="base:pretrain_moe")
PRESETS["dense_active"] = dict(method="dense_active", init="base:pretrain_moe")


# === drop_experts: 2404.05089, whole experts go, the least used of every layer ====================


@torch.no_grad()
def usage(model, batches):
    """How many tokens choose every expert of every layer.   [L, E]"""
    c, counts = model.config, 0
    for tokens in batches:
        model(tokens)
        logits = torch.stack([b.mlp.router_logits for b in model.layers])
        chosen = logits.topk(c.num_experts_per_tok).indices
        counts = counts + F.one_hot(chosen, c.num_experts).sum((1, 2))
    forget(model)
    return counts


def drop_experts(model, teacher, batches, generator, *, share: Range("(0, 1]") = 0.125):
    """Expert dropping, as in SEER-MoE (2404.05089) but by layer (ours): the most used experts stay,
    and their router rows. Fewer experts than a token's choices: it gets all of them."""
    c = model.config
    if not c.moe:
        raise UserError("drop_experts needs a model with experts")
    count = stage_sizes(c.num_experts, share, 1, 1)[0]
    state = dict(model.state_dict())
    for i, score in enumerate(usage(model, batches)):
        stay, where = top(score, count), f"layers.{i}.mlp"
        old = {k: state.pop(k) for k in list(state) if k.startswith(f"{where}.experts.")}
        for new, e in enumerate(stay.tolist()):
            start = f"{where}.experts.{e}."
            state |= {f"{where}.experts.{new}.{k.removeprefix(start)}": v
                      for k, v in old.items() if k.startswith(start)}
        state[f"{where}.gate.weight"] = state[f"{where}.gate.weight"][stay]
    yield build(model, state, num_experts=count,
                num_experts_per_tok=min(count, c.num_experts_per_tok))


METHODS["drop_experts"] = drop_experts
PRESETS["drop_experts"] = dict(method="drop_experts", init="base:pretrain_moe")


# === shortgpt: 2403.03853, whole layers go, those that turn a token's state the least =============


@torch.no_grad()
def influence(model, batches):
    """Block influence (ShortGPT, 2403.03853 eq. 1): 1 less the cosine of a token's states before
    and behind a layer, its mean over all tokens.   [L], float64"""
    total, count, hooks = [0.0] * len(model.layers), 0, []

    def note(i):
        def hook(block, args, out):
            cosine = F.cosine_similarity(args[0].double(), out.double(), dim=-1)         # [B, T]
            total[i] += (1 - cosine).sum()
        return hook
    hooks = [block.register_forward_hook(note(i)) for i, block in enumerate(model.layers)]
    for tokens in batches:
        model(tokens)
        count += tokens.numel()
    for hook in hooks:
        hook.remove()
    forget(model)
    return torch.stack(total) / count


def shortgpt(model, teacher, batches, generator, *, share: Range("(0, 1]") = 0.75):
    """ShortGPT (2403.03853): a share of the layers stays, those of the largest influence; the rest
    goes at once. The paper does not distil: --kd_steps is 0."""
    c, state = model.config, dict(model.state_dict())
    stay = top(influence(model, batches), stage_sizes(len(model.layers), share, 1, 1)[0]).tolist()
    old = {k: state.pop(k) for k in list(state) if k.startswith("layers.")}
    for new, i in enumerate(stay):
        start = f"layers.{i}."
        state |= {f"layers.{new}.{k.removeprefix(start)}": v for k, v in old.items()
                  if k.startswith(start)}
    types = tuple(c.layer_types[i] for i in stay) if c.layer_types else ()
    yield build(model, state, num_hidden_layers=len(stay), layer_types=types)


METHODS["shortgpt"] = shortgpt
PRESETS["shortgpt"] = dict(method="shortgpt", kd_steps=0)


# === minitron: 2407.14679, neurons of small activation, then distilled ============================


@torch.no_grad()
def activity(model, batches):
    """Minitron's score (2407.14679):  sqrt Σ_samples (mean over tokens of |a_j|)²,  a what
    down_proj reads. -> {name: [f]}

    An expert's tokens of one batch are one sample (ours: rows are no longer apart there)."""
    scores = {name: torch.zeros(m.down_proj.in_features, device=model.head.device)
              for name, m in mlps(model).items()}            # an expert may see no token

    def note(name):
        def hook(layer, args):
            mean = args[0].float().abs().mean(-2).nan_to_num()                       # [B, f] or [f]
            scores[name] = scores[name] + mean.view(-1, mean.size(-1)).square().sum(0)
        return hook
    hooks = [m.down_proj.register_forward_pre_hook(note(name)) for name, m in mlps(model).items()]
    for tokens in batches:
        model(tokens)
    for hook in hooks:
        hook.remove()
    return mend_scores(model, {name: x.sqrt() for name, x in scores.items()})


def minitron(model, teacher, batches, generator, *, share: Range("(0, 1]") = 0.5,
             multiple: Count = 8):
    """Minitron (2407.14679), its width part for MLPs: one cut by activity, then forward_kl
    alone."""
    width = stage_sizes(model.config.intermediate_size, share, 1, multiple)[0]
    yield slice_neurons(model,
                        {name: top(x, width) for name, x in activity(model, batches).items()})


METHODS["minitron"] = minitron
PRESETS["minitron"] = dict(method="minitron", kd_loss="forward_kl")


# === prunenet: 2501.15296, neurons that a policy chooses, which reads weights alone ===============


def ks_distance(a, b):
    """Kolmogorov-Smirnov: the largest distance between the distribution functions of two lists of
    numbers."""
    x = torch.cat([a, b])
    below = [torch.searchsorted(values.sort().values, x, right=True) / len(values)
             for values in (a, b)]
    return (below[0] - below[1]).abs().max().item()


def spectrum_reward(weight, kept):
    """PruneNet's reward:  1 / KS(singular values of W, of its kept rows), 99999 if equal."""
    distance = ks_distance(*(torch.linalg.svdvals(x.float()) for x in (weight, weight[kept])))
    return 1 / distance if distance else 99999.0


def relaxed(alpha, generator, eps=1e-6):
    """Relaxed Bernoulli:  σ(logit(e) + logit(α)),  e ~ U(0, 1), both held off 0 and 1.   [f]"""
    e = torch.rand(alpha.shape, generator=generator).to(alpha).clamp(eps, 1 - eps)
    return (e.logit() + alpha.clamp(eps, 1 - eps).logit()).sigmoid()


def learn_policy(weights, width, generator, *, episodes=20, lr=1e-3, discount=0.99):
    """PruneNet's policy (2501.15296), shared by all layers:  α = σ((W1 Aᵀ + c) v).
    -> function W1 -> α [f]

    weights: [f, D] of every layer. An episode samples `width` rows of each in proportion to
    relaxed(α), and steps AdamW on -γ^i r_i Σ_kept log relaxed(α), noise drawn anew. The policy of
    the largest Σ r stays.
    """
    f, D = weights[0].shape
    bound = 1 / math.sqrt(D)                     # torch's own start of a linear layer
    draw = lambda *shape: torch.rand(shape, generator=generator).to(weights[0])
    A, c, v = (2 * draw(f, D) - 1) * bound, (2 * draw(f) - 1) * bound, draw(f)
    x = [p.requires_grad_() for p in (A, c, v)]
    alpha = lambda W, A, c, v: ((W @ A.T + c) @ v).sigmoid()                             # [f]
    opt, best, most = torch.optim.AdamW(x, lr), None, -math.inf
    for _ in tqdm(range(episodes), desc="policy", disable=None, leave=False):
        total, loss, now = 0.0, 0.0, [p.detach().clone() for p in x]
        for i, W in enumerate(weights):
            a = alpha(W, *x)
            chance = relaxed(a.detach(), generator).cpu()
            rows = torch.multinomial(chance, width, generator=generator).to(W.device)
            reward = discount ** i * spectrum_reward(W, rows)
            total += reward
            loss = loss - reward * relaxed(a, generator)[rows].clamp(min=1e-6).log().sum()
        if total > most:
            best, most = now, total
        opt.zero_grad()
        loss.backward()
        opt.step()
    return lambda W: alpha(W, *best)


def prunenet(model, teacher, batches, generator, *, share: Range("(0, 1]") = 0.7,
             multiple: Count = 8, episodes: Count = 20, sampled=True):
    """PruneNet (2501.15296), without data: the policy samples rows once, as released, or takes its
    top α."""
    width = stage_sizes(model.config.intermediate_size, share, 1, multiple)[0]
    weights = {name: m.gate_proj.weight.detach() for name, m in mlps(model).items()}
    policy, rows = learn_policy(list(weights.values()), width, generator, episodes=episodes), {}
    for name, W in weights.items():
        rows[name] = top(policy(W), width)
        if sampled:
            chance = relaxed(policy(W), generator).cpu()
            drawn = torch.multinomial(chance, width, generator=generator)
            rows[name] = drawn.sort().values.to(W.device)
    yield slice_neurons(model, rows)


METHODS["prunenet"] = prunenet
PRESETS["prunenet"] = dict(method="prunenet", kd_loss="forward_kl")


# === puzzle_blocks: a library of narrower MLPs, each distilled and scored alone in its place ======


def normalised_mse(out, wanted):
    """MSE(out, wanted) / MSE(wanted, 0): 1 for an output of zeros."""
    return (out - wanted).square().mean() / wanted.square().mean()


def block_library(model, batches, shares, multiple):
    """A model for every share of the width, each MLP cut by activity; None for width 0.
    -> {width: model}"""
    most, scores, library = model.config.intermediate_size, activity(model, batches), {}
    widths = {whole_multiple(share * most, multiple, most) if share else 0 for share in shares}
    for width in sorted(widths, reverse=True):
        rows = {name: top(x, width) for name, x in scores.items()}
        library[width] = slice_neurons(model, rows) if width else None
    return library


def blocks_loss(teacher, narrow, batches, seen, last, step):
    """The summed errors of all narrower MLPs on what the teacher's saw, which `last` then holds."""
    with torch.no_grad():
        teacher(batches[step % len(batches)])
    losses = [normalised_mse(block.mlp(seen[i][0]), seen[i][1])
              for m in narrow for i, block in enumerate(m.layers)]
    last[:] = [x.item() for x in losses]
    return sum(losses)


def distil_blocks(teacher, library, batches, steps, lr):
    """Train every MLP of the library alone, on the teacher's input and output of its place. In
    place. -> losses of the last step [widths L]

    Losses are independent and Adam shares no state, so one optimiser serves all."""
    most, seen, last = teacher.config.intermediate_size, {}, []

    def note(i):
        def hook(layer, args, out):
            seen[i] = args[0], out
        return hook
    narrow = [m for w, m in library.items() if m is not None and w < most]
    parameters = [p for m in narrow for block in m.layers for p in block.mlp.parameters()]
    if not parameters:
        return last
    loss_of = partial(blocks_loss, teacher, narrow, batches, seen, last)
    hooks = [block.mlp.register_forward_hook(note(i)) for i, block in enumerate(teacher.layers)]
    fit([dict(params=parameters, weight_decay=0.0)], loss_of, steps, "blocks", lr=lr,
        betas=(0.9, 0.999), rate=lambda step: (1 + math.cos(math.pi * step / steps)) / 2)
    for hook in hooks:
        hook.remove()
    return last


def replace_one(teacher, library, batches):
    """KL(teacher ‖ teacher with one MLP replaced) of every layer and width; the library's order.
    [L, J]"""
    scores = torch.zeros(len(teacher.layers), len(library), dtype=torch.float64)
    most = teacher.config.intermediate_size
    work = build(teacher, teacher.state_dict())
    for (i, block), (j, (w, m)) in itertools.product(enumerate(work.layers),
                                                     enumerate(library.items())):
        if w < most:
            own, block.mlp = block.mlp, m and m.layers[i].mlp
            scores[i, j] = divergence(work, teacher, batches)
            block.mlp = own
    return scores


# === choices: a width for every layer, exact, equal or by chance, under one budget ================


CHOICES = {}             # of what fits a budget


def choose_dp(scores, costs, budget, generator):
    """min Σ score[i, j_i]  s.t.  Σ cost[j_i] <= budget,  exact: dynamic programming over costs.
    -> [L]"""
    best = {0: (0.0, [])}                        # cost so far: (score, choices)
    for row in scores.tolist():
        now = {}
        for (spent, (value, picks)), (j, cost) in itertools.product(best.items(), enumerate(costs)):
            if spent + cost <= budget and value + row[j] < now.get(spent + cost, (math.inf,))[0]:
                now[spent + cost] = value + row[j], [*picks, j]
        best = now
    if not best:
        raise UserError(f"no choice of blocks costs {budget} or less: a larger --share")
    return min(best.values(), key=lambda x: x[0])[1]


def choose_uniform(scores, costs, budget, generator):
    """The widest block that fits, in every layer. -> [L]"""
    fit = [j for j, cost in enumerate(costs) if cost * len(scores) <= budget]
    if not fit:
        raise UserError(f"no equal choice of blocks costs {budget} or less: a larger --share")
    return [max(fit, key=lambda j: costs[j])] * len(scores)


def choose_random(scores, costs, budget, generator):
    """A random order of layers, each the random block that leaves room for the cheapest behind it.
    -> [L]

    Drawn again while the budget still has room for a step (ours), so that it spends about what dp
    may."""
    low, L = min(costs), len(scores)
    step = min((abs(a - b) for a, b in itertools.combinations(costs, 2) if a != b), default=1)
    for _ in range(1000):
        picks, left = [0] * L, budget
        for n, i in enumerate(torch.randperm(L, generator=generator).tolist()):
            fit = [j for j, cost in enumerate(costs) if cost + low * (L - n - 1) <= left]
            if not fit:
                raise UserError(f"no choice of blocks costs {budget} or less: a larger --share")
            picks[i] = fit[torch.randint(len(fit), (1,), generator=generator).item()]
            left -= costs[picks[i]]
        if left < step:
            break
    return picks


CHOICES["dp"], CHOICES["uniform"], CHOICES["random"] = choose_dp, choose_uniform, choose_random


# === puzzle, cosine_kl: 2411.19146, a width a layer, chosen exactly from distilled blocks =========


def cosine_kl(student, teacher):
    """Puzzle's global distillation (2411.19146):  1 - cos(h_s, h_t) + KL.  ours: of the final
    state.   [N]"""
    cosine = F.cosine_similarity(student.hidden, teacher.hidden, dim=-1)
    return 1 - cosine + forward_kl(student, teacher)


def percentages(shares):
    """"100,50,0" as shares.   UserError for what is no list of numbers"""
    try:
        return [float(x) / 100 for x in shares.split(",")]
    except ValueError:
        raise UserError(f"--shares {shares}: numbers with commas between, like 100,50,0") from None


def assemble(model, library, widths):
    """A model whose layer i has the MLP of width widths[i] of the library; a plain one if all are
    alike."""
    state = {k: v for k, v in model.state_dict().items() if ".mlp." not in k}
    for i, w in enumerate(widths):
        start = f"layers.{i}.mlp."
        if w:
            state |= {k: v for k, v in library[w].state_dict().items() if k.startswith(start)}
        else:
            norms = f"layers.{i}.post_attention_layernorm.", f"layers.{i}.behind_mlp."
            state = {k: v for k, v in state.items() if not k.startswith(norms)}
    if len(set(widths)) == 1 and widths[0] > 0:
        return build(model, state, intermediate_size=widths[0])
    return build(model, state, layer_widths=tuple(widths))


def puzzle(model, teacher, batches, generator, *, share: Range("(0, 1]") = 0.5,
           shares="100,75,50,25,0", choice: Literal[*CHOICES] = "dp", local_steps=100,
           local_lr: Positive = 1e-3, multiple: Count = 8):
    """Puzzle (2411.19146), its FFN half: a library of widths a layer, each distilled alone, then
    scored alone in the teacher; the best choice whose widths sum to share * L * f at most. Then
    cosine_kl.

    choice dp, uniform or random; local_steps and local_lr are ours. Attention stays as it is.
    """
    library = block_library(model, batches, percentages(shares), multiple)
    distil_blocks(teacher, library, batches, local_steps, local_lr)
    scores, widths = replace_one(teacher, library, batches), list(library)
    budget = int(share * len(model.layers) * model.config.intermediate_size)
    picks = CHOICES[choice](scores, widths, budget, generator)
    yield assemble(model, library, [widths[j] for j in picks])


LOSSES["cosine_kl"], METHODS["puzzle"] = cosine_kl, puzzle
CHECKS["puzzle"] = lambda c, f: percentages(f.method.keywords["shares"])
PRESETS["puzzle"] = dict(method="puzzle", kd_loss="cosine_kl")


# === swiftkv, swift_kl: 2410.03960, late layers read keys and values from one early state =========


def swift_kl(student, teacher, *, temperature: Positive = 2.0):
    """SwiftKV (2410.03960):  τ² KL(p_τ ‖ q_τ) + MSE of the states that the last block reads.
    [N]"""
    kl = linear_distill(student.hidden, student.head, teacher.hidden, teacher.head,
                        temperature=temperature)
    apart = (wide(student.before) - wide(teacher.before)).square().mean(-1)
    return temperature ** 2 * kl + apart


def swiftkv(model, teacher, batches, generator, *, layer=0):
    """SwiftKV (2410.03960), SingleInputKV: from `layer` on, all layers' keys and values are made of
    the state that enters it, through norm_swiftkv (a copy of that layer's own). 0: half of the
    layers.

    Only norm_swiftkv and those layers' q, k, v are trained. Then swift_kl. No AcrossKV; no layer is
    skipped.
    """
    L = model.config.num_hidden_layers
    layer = layer or L // 2
    if not 0 < layer <= L:
        raise UserError(f"--layer {layer}: a layer from 1 to {L}")
    state = model.state_dict()
    source = f"layers.{min(layer, L - 1)}.input_layernorm."
    norm = {k.replace(source, "norm_swiftkv."): x for k, x in state.items() if k.startswith(source)}
    student = build(model, state | norm, swift_layer=layer).requires_grad_(False)
    student.norm_swiftkv.requires_grad_(layer < L)
    for block in student.layers[layer:]:
        for part in (block.self_attn.q_proj, block.self_attn.k_proj, block.self_attn.v_proj):
            part.requires_grad_()
    yield student


LOSSES["swift_kl"], METHODS["swiftkv"] = swift_kl, swiftkv
PRESETS["swiftkv"] = dict(method="swiftkv", kd_loss="swift_kl")


# === moh: 2410.11842, a router chooses a token's heads ============================================


def head_balance(model, *, weight=0.01):
    """MoH's loss of the last forward (2410.11842):  R² mean_e(mean_t p_e · mean_t 1[e chosen]),
    mean over layers, times a weight: K when all of the R routed heads are used alike."""
    total, found = 0.0, [m.routing for m in model.modules() if hasattr(m, "routing")]
    for p, chosen in found:
        p, chosen = p.flatten(0, 1).mean(0), chosen.flatten(0, 1).mean(0)                # [R]
        total = total + len(p) * (p * chosen).sum()
    return weight * (total / len(found))


def moh(model, teacher, batches, generator, *, shared: Share = 0.5, active: Range("(0, 1]") = 0.75,
        router: Literal["norm", "learned"] = "norm"):
    """MoH (2410.11842): of H heads the first `shared` H always count, of the others a token's
    likeliest, `active` H in all.

    router norm: by the queries' norms, no parameter, for a trained model (one with a norm on every
    query head has none to tell them apart: there take learned); learned: new ones (std 0.02).
    """
    H = model.config.num_attention_heads
    S, K = round(shared * H), round(active * H) - round(shared * H)
    if not (S >= 1 and H - S >= 2 and 1 <= K <= H - S):
        raise UserError(f"--shared {shared} --active {active}: of {H} heads at least 1 shared, 2 "
                        "routed and 1 of those active")
    state, D = dict(model.state_dict()), model.config.hidden_size
    for i in range(len(model.layers) if router == "learned" else 0):
        for part, rows in (("shared", S), ("groups", 2), ("routed", H - S)):
            weight = 0.02 * torch.randn(rows, D, generator=generator)
            state[f"layers.{i}.self_attn.heads.{part}.weight"] = weight.to(model.head)
    yield build(model, state, shared_heads=S, routed_heads=K, head_router=router)


METHODS["moh"], PENALTIES["moh"] = moh, head_balance
PRESETS["moh"] = dict(method="moh", kd_loss="forward_kl", router="learned")


# === decoded: text read token by token through a cache, and what the cache then holds =============


def read_whole(model, tokens, cache):
    """Read a prompt [B, P] at once.   -> hidden [B, P, D]"""
    return model(tokens, cache)


@torch.no_grad()
def cached_logp(model, windows, prefix, make, *, read=read_whole, batch=32):
    """Log-probs of every token behind a prefix, each decoded through the cache.

    windows [N, T]; the first `prefix` tokens are read, the others fed one by one as they stand in
    the text. make: as generate's cache.   -> [N, T - prefix] float32, stored bytes a token
    """
    N, T = windows.shape
    rows, size = [], 0
    for tokens in tqdm(windows.split(batch), desc="decoding", disable=None, leave=False):
        tokens, out = tokens.to(model.head.device), []
        cache = make(model.config, len(tokens), prefix, model.head.device, model.head.dtype)
        hidden = read(model, tokens[:, :prefix], cache)[:, -1]                           # [B, D]
        cache.spread(torch.arange(len(tokens), device=tokens.device), T - 1 - prefix)
        for t in range(prefix, T):
            out.append(linear_logprob(hidden, model.head, tokens[:, t]))                 # [B]
            if t < T - 1:
                hidden = model(tokens[:, t:t + 1], cache)[:, -1]
        rows.append(torch.stack(out, 1))
        size += cache.nbytes() if hasattr(cache, "nbytes") else cache.k.nbytes + cache.v.nbytes
    return torch.cat(rows).cpu(), size / (N * (T - 1))


def cached_nll(model, windows, prefix, make, *, read=read_whole):
    """Mean nats a token behind the prefix, and stored bytes a token: see cached_logp."""
    logp, size = cached_logp(model, windows, prefix, make, read=read)
    return -logp.double().mean().item(), size


def through_cache(model, tokens, held, c, f, run, read=read_whole):
    """The second half of every window decoded token by token through --cache, and through the full
    one."""
    make = f.cache(**{k: dict(model=model, tokens=tokens)[k] for k in needs(f.cache)})
    whole, bytes_whole = cached_nll(model, held, c.context // 2, Cache)
    small, size = cached_nll(model, held, c.context // 2, make, read=read)
    run.say(f"  cache {c.cache}: {small:.4f} nats on the second half of each window, {whole:.4f} "
            f"through the full one; {size:.0f} bytes a token, {bytes_whole:.0f}")
    return dict(cache_loss=small, cache_increase=small - whole, cache_bytes=size,
                cache_share=size / bytes_whole)


PRESETS["decoded"] = dict(context=256, windows=64)         # long enough for a cache to matter


# === kivi_codes: 2402.02750, groups of a channel or of a token, a scale and a low for each ========


def encode(x, bits):
    """x [..., g] -> codes, uint8 [..., g bits / 8], first in the lowest bits; scale, low [...] in
    x's dtype.

    low = min, scale = (max - min) / (2^bits - 1), q = round((x - low) / scale): KIVI, 2402.02750.
    A constant group has scale 1 and codes 0, so it comes back exact.
    """
    most, (low, high) = 2 ** bits - 1, x.aminmax(dim=-1)
    scale = ((wide(high) - wide(low)) / most).to(x.dtype)
    scale = torch.where(scale > 0, scale, 1)
    q = (wide(x) - wide(low[..., None])) / wide(scale[..., None])
    q = q.round().clamp(0, most).to(torch.uint8)
    q = q.unflatten(-1, (-1, 8 // bits))                                       # [..., bytes, codes]
    place = torch.arange(0, 8, bits, device=x.device, dtype=torch.uint8)
    return (q << place).sum(-1, dtype=torch.uint8), scale, low


def decode(codes, scale, low, bits):
    """encode's inverse, up to half a scale:  q scale + low.   -> [..., g] in scale's dtype"""
    place = torch.arange(0, 8, bits, device=codes.device, dtype=torch.uint8)
    q = (codes[..., None] >> place & 2 ** bits - 1).flatten(-2)                          # [..., g]
    low, scale_of = wide(low[..., None]), wide(scale[..., None])
    return torch.addcmul(low, q.to(low.dtype), scale_of).to(scale.dtype)


def by_channel(x, g):
    """x [B, T, K, hd] -> [B, T/g, K, hd, g]: g consecutive tokens of a channel are a group."""
    return x.unflatten(1, (-1, g)).movedim(2, -1)


def by_token(x, g):
    """x [B, T, K, hd] -> [B, T, K, hd/g, g]: g consecutive channels of a token are a group."""
    return x.unflatten(-1, (-1, g))


GROUPS = dict(channel=(by_channel, lambda x: x.movedim(-1, 2).flatten(1, 2)),     # and the way back
              token=(by_token, lambda x: x.flatten(-2)))


# === kivi_part: 2402.02750, codes of a row's older tokens, and its newest as they are =============


class CodedPart:
    """The keys or the values of one layer: codes of a row's older tokens, then its tail in full
    precision.

    A channel's group needs g tokens, so "channel" codes the whole tail when it is R long (g if R is
    0); "token" codes the oldest tokens of a tail longer than R. Each row does so by its own length.
    Sizes are those of the longest row, no slot more.
    """

    def __init__(self, axis, bits, group, window, shape, device, dtype):
        B, K, hd = shape
        self.axis, self.bits, self.window = axis, bits, window
        self.group = group if axis == "channel" else min(group, hd)
        if axis == "token" and (hd % self.group or self.group * bits % 8):
            raise UserError(f"a head of {hd} channels cannot be cut into groups of {self.group} "
                            f"whose {bits}-bit codes fill whole bytes: choose another group")
        self.unit = group if axis == "channel" else 1               # tokens that are coded together
        n = hd if axis == "channel" else hd // self.group            # groups of a unit and head
        zeros = partial(torch.zeros, B, 0, K, device=device)
        self.codes = zeros(n, self.group * bits // 8, dtype=torch.uint8)
        self.scale, self.low = zeros(n, dtype=dtype), zeros(n, dtype=dtype)
        self.tail = zeros(hd, dtype=dtype)
        self.held = torch.zeros(B, dtype=torch.long, device=device)  # [B] units coded

    def due(self, length):
        """Units that are codes in a row of so many tokens.   [B] -> [B]"""
        if self.axis == "token":
            return (length - self.window).clamp(min=0)
        block = max(self.window, self.group)
        return length // block * block // self.group

    def settle(self, length):
        """Code what is due, now that rows are `length` [B] long; the tail keeps the rest."""
        due = self.due(length)
        more = due - self.held                                                           # [B]
        rest = length - due * self.unit                                                  # [B]
        n, size, most = torch.stack([more.max(), due.max(), rest.max()]).tolist()
        if n:
            split = GROUPS[self.axis][0](self.tail[:, :n * self.unit], self.group)
            row, i = (torch.arange(n, device=more.device) < more[:, None]).nonzero(as_tuple=True)
            for name, new in zip(("codes", "scale", "low"), encode(split, self.bits)):
                old = getattr(self, name)
                slots = max(size - old.size(1), 0)
                old = F.pad(old, [0, 0] * (old.dim() - 2) + [0, slots])
                old[row, self.held[row] + i] = new[row, i]
                setattr(self, name, old)
        if n or most < self.tail.size(1):                    # or padding behind a short prompt
            at = (more * self.unit)[:, None] + torch.arange(most, device=more.device)    # [B, W]
            at = at.clamp(max=max(self.tail.size(1) - 1, 0))
            self.tail = self.tail[torch.arange(len(at), device=at.device)[:, None], at]
        self.held = due

    def append(self, new, length):
        """Put new [B, T, K, hd] behind the tails of rows that were `length` [B] long."""
        at = torch.arange(new.size(1), device=new.device)
        at = (length - self.held * self.unit)[:, None] + at
        self.tail = F.pad(self.tail, (0, 0, 0, 0, 0, new.size(1)))
        self.tail[torch.arange(len(at), device=at.device)[:, None], at] = new.to(self.tail.dtype)

    def whole(self, size):
        """The first `size` tokens of all rows, dequantised where they are codes.
        [B, K, size, hd]"""
        slot = torch.arange(size, device=self.held.device)
        at = slot - (self.held * self.unit)[:, None]                            # [B, S] in the tail
        row = torch.arange(len(at), device=at.device)[:, None]
        tail = self.tail if self.tail.size(1) else F.pad(self.tail, (0, 0, 0, 0, 0, 1))
        out = tail[row, at.clamp(0, tail.size(1) - 1)]                               # [B, S, K, hd]
        if self.codes.size(1):
            old = GROUPS[self.axis][1](decode(self.codes, self.scale, self.low, self.bits))
            end = min(old.size(1), size)
            coded = (at[:, :end] < 0)[..., None, None]
            out[:, :end] = torch.where(coded, old[:, :end], out[:, :end])
        return out.transpose(1, 2)


# === kivi: 2402.02750, the cache in 2 bits, keys by channel, values by token ======================

PARTS = ("codes", "scale", "low", "tail")


class Kivi:
    """model.Cache's methods over packed codes: what attention reads is made when it asks.

    A forward's own tokens, a prompt's too, are seen in full precision; they are coded when the next
    forward (or spread) begins, which knows the rows' true lengths. That is KIVI's order: attend,
    then code.
    """

    def __init__(self, keys, values, numbers, config, rows, slots, device, dtype):
        shape = rows, config.num_key_value_heads, config.head_dim
        part = lambda axis: CodedPart(axis, *numbers, shape, device, dtype)
        self.parts = [(part(keys), part(values)) for _ in range(config.num_hidden_layers)]
        self.length = torch.zeros(rows, dtype=torch.long, device=device)           # [B] tokens held
        self.used, self.static = 0, False

    def at(self, T):
        """Where each row's next T tokens stand.   -> [B, T], and nothing more is needed by put."""
        return self.length[:, None] + torch.arange(T, device=self.length.device), None

    sees = Cache.sees

    def put(self, layer, k, v, at):
        """Store k, v [B, K, T, hd]; -> all keys and values of the layer so far, in full size."""
        out = []
        for part, new in zip(self.parts[layer], (k, v)):
            part.settle(self.length)
            part.append(new.transpose(1, 2), self.length)
            out.append(part.whole(self.used + new.size(2)))
        return out                                                              # [B, K, S, hd] each

    def settle(self):
        """Code all that is due."""
        for part in itertools.chain(*self.parts):
            part.settle(self.length)

    def spread(self, rows, slots):
        """Row i becomes a copy of old row rows[i]; slots are made as they are needed."""
        self.settle()                                    # before the rows are copied
        self.keep(rows)

    def keep(self, rows):
        """Row i becomes old row rows[i], and the others go."""
        for part in itertools.chain(*self.parts):
            for name in (*PARTS, "held"):
                setattr(part, name, getattr(part, name)[rows])
        self.length = self.length[rows]

    def nbytes(self):
        """Stored bytes of all layers, after the last token was coded if it is due."""
        self.settle()
        return sum(getattr(part, name).nbytes
                   for part in itertools.chain(*self.parts) for name in PARTS)


def kivi(*, cache_bits: Literal[1, 2, 4, 8] = 2, cache_group: Count = 16, cache_window=16,
         keys: Literal[*GROUPS] = "channel", values: Literal[*GROUPS] = "token"):
    """KIVI (2402.02750): codes of cache_bits, a scale and a low per group, the newest cache_window
    tokens left alone. -> what makes the cache, for generate(cache=…).

    cache_group: tokens of a channel, or channels of a token (all of a smaller head); the window is
    a multiple of it. keys, values: the groups' axis. Groups and windows of 16 are ours, for
    contexts of a few hundred; the authors' are 32, and 32 or 128 (unverified).
    """
    bits, group, window = cache_bits, cache_group, cache_window
    if window % group or group * bits % 8:
        raise UserError(f"--cache_window {window} --cache_group {group}: the window must be a "
                        f"multiple of the group, and a group of {bits}-bit codes fill whole bytes")
    return partial(Kivi, keys, values, (bits, group, window))


CACHES["kivi"], MEASURES["kivi"] = kivi, through_cache
CHECKS["kivi"] = lambda c, f: f.cache()
PRESETS["kivi"] = dict(method="dense", cache="kivi")


# === watched: ours, what every block's attention is given, for whoever scores tokens by it ========


def watch_attention(model, see):
    """Call see(layer, self_attn, seen, where) after every block's attention; -> handles to remove.

    seen: its projections q, k, v [B, T, …], before norms and RoPE; where: what attention was called
    with, (x, cos, sin, cache, layer, at, visible).
    """
    handles = []
    for block in model.layers:
        seen = {}
        for name in "qkv":
            def note(module, args, out, seen=seen, name=name):
                seen[name] = out
            handles.append(getattr(block.self_attn, f"{name}_proj").register_forward_hook(note))

        def after(module, args, out, seen=seen):
            see(args[4], module, seen, args)
            seen.clear()
        handles.append(block.self_attn.register_forward_hook(after))
    return handles


def check_scored(model):
    """UserError for attention whose slots cannot be scored: a window counts those that went."""
    c = model.config
    if c.layer_types or c.query_pre_attn_scalar or c.partial_rotary_factor != 1:
        raise UserError("evicting tokens from the cache needs layers that see them all, with "
                        f"whole heads turned: this {c.model_type} has others")


def rotated(self_attn, x, norm, cos, sin):
    """A projection [B, T, H hd] as attention uses it: by heads, normed where the model does, turned
    by RoPE. -> [B, H, T, hd]"""
    x = x.unflatten(-1, (-1, self_attn.hd))                                          # [B, T, H, hd]
    x = (getattr(self_attn, norm)(x) if self_attn.qk_norm else x).transpose(1, 2)
    a, b = wide(x).chunk(2, -1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)


def joined(seen):
    """watch_attention's q, k, v -> a retaining head's input c, in float32.   [B, T, (H + 2K) hd]"""
    return torch.cat([seen[name].float() for name in "qkv"], -1)


# === scores: 2410.01805, 2306.14048, what a token is worth to each key head =======================

SCORES, LATER = {}, {}   # score: [B, K, T] of new tokens, the largest stay; what it adds afterwards


def by_head(cache, layer, self_attn, seen, where):
    """Locret, 2410.01805: the retaining head's prediction."""
    return cache.heads[layer](joined(seen)).mT


def by_recency(cache, layer, self_attn, seen, where):
    """The position: a sliding window without sinks."""
    at = (cache.base + cache.gone)[:, None] + torch.arange(seen["k"].size(1)).to(cache.base)
    return at.float()[:, None].expand(-1, cache.k.size(2), -1)


def by_chance(cache, layer, self_attn, seen, where):
    """A random number, kept: what stays is a uniform sample."""
    B, T = seen["k"].shape[:2]
    return torch.rand(B, cache.k.size(2), T, generator=cache.generator).to(cache.k.device)


def by_attention(cache, layer, self_attn, seen, where):
    """After H2O (2306.14048): all attention received so far. The sum waits for the rows' lengths:
    add_attention."""
    cache.pending[layer] = rotated(self_attn, seen["q"], "q_norm", *where[1:3])
    return torch.zeros(len(cache.base), cache.k.size(2), seen["k"].size(1), device=cache.k.device)


def attention_paid(q, k, base, length):
    """The attention that the queries of rows that were `base` [B] long, and are `length`, paid to
    every slot; a row's padding pays none.   q [B, H, T, hd], k [B, K, S, hd] -> [B, K, S]"""
    B, H, T, hd = q.shape
    slot, own = (torch.arange(n, device=q.device) for n in (k.size(2), T))
    own = base[:, None] + own                                                   # [B, T] their slots
    logit = (q.reshape(B, k.size(1), -1, hd) @ k.mT / hd ** 0.5).unflatten(2, (-1, T))
    logit = logit.masked_fill(slot > own[:, None, None, :, None], -math.inf)       # [B, K, G, T, S]
    paid = logit.softmax(-1) * (own < length[:, None])[:, None, None, :, None]
    return paid.sum((2, 3))


def add_attention(cache):
    """Add the attention that the last forward's queries paid."""
    for layer, q in cache.pending.items():
        k = cache.k[layer, :, :, :cache.used].float()                                # [B, K, S, hd]
        cache.score[layer, :, :, :cache.used] += attention_paid(q, k, cache.base, cache.length)
    cache.pending = {}


SCORES["locret"], SCORES["recency"], SCORES["random"] = by_head, by_recency, by_chance
SCORES["attention"], LATER["attention"] = by_attention, add_attention


# === slots: what stays of a prompt, and the attention that is paid to it ==========================


def retained(score, length, budget, protect):
    """Which slots stay: the `budget` best of every row and head, in the order of their positions.

    score [L, B, K, S], length [B] -> slots [L, B, K, m], and how many of them are a row's own [B].
    The last `protect` slots of a row always stay.
    """
    slot, n = torch.arange(score.size(-1), device=score.device), length[:, None, None]
    score = score.masked_fill(slot >= n - protect, math.inf).masked_fill(slot >= n, -math.inf)
    count = length.clamp(max=budget)
    rank = score.argsort(dim=-1, descending=True, stable=True).argsort(-1)
    order = torch.where(rank < count[:, None, None], slot, len(slot) + slot)          # [L, B, K, S]
    return order.argsort(-1)[..., :int(count.max())], count


def listen(model, cache):
    """Let a cache score what the model reads, by hooks that go when the cache does, whatever
    happens. -> a function that removes them"""
    me = weakref.ref(cache)

    def see(layer, self_attn, seen, where):
        if (cache := me()) is not None and where[3] is cache:
            new = SCORES[cache.rule](cache, layer, self_attn, seen, where).float()       # [B, K, T]
            cache.score[layer].view(-1).index_copy_(0, where[5], new.flatten())
            cache.blind = False

    def remove(handles):
        for handle in handles:
            handle.remove()
    return weakref.finalize(cache, remove, watch_attention(model, see))


# === slots_that_stay: 2410.01805, a cache of fewer tokens, each key head with its own =============


class Evicting:
    """model.Cache's methods over the slots that stay; a row's heads have equally many.

    length counts slots, positions run on: keys keep the RoPE phase of where they stood. Tokens are
    scored while the prompt is read, and evicted by evict() and spread(); what is decoded afterwards
    stays.
    """

    def __init__(self, model, heads, score, budget, local, config, rows, slots, device, dtype):
        self.heads, self.rule, self.budget, self.local = heads, score, budget, local
        self.generator = torch.Generator().manual_seed(0)
        self.limit = config.max_position_embeddings
        shape = config.num_hidden_layers, rows, config.num_key_value_heads, 0
        self.k, self.v = (torch.zeros(*shape, config.head_dim, device=device, dtype=dtype)
                          for _ in range(2))
        self.score = torch.zeros(shape, device=device)                                # [L, B, K, S]
        self.length, self.gone = (torch.zeros(rows, dtype=torch.long, device=device)
                                  for _ in range(2))
        self.used, self.most, self.static = 0, 0, False       # most: gone's largest, on the host
        self.base, self.pending, self.blind = self.length, {}, True
        self.release = listen(model, self)

    def at(self, T):
        """Positions [B, T] of each row's next T tokens, and rows [B K T] of a layer's
        [B K S, hd]."""
        if self.used + self.most + T > self.limit:
            raise UserError(f"{self.used + self.most + T} tokens exceed the model's context of "
                            f"{self.limit}: evicted tokens keep their positions; shorten the text")
        self.absorb()
        more = max(self.used + T - self.k.size(3), 0)
        self.k, self.v = (F.pad(x, (0, 0, 0, more)) for x in (self.k, self.v))
        self.score = F.pad(self.score, (0, more))
        (B, K, S), device, self.base = self.k.shape[1:4], self.k.device, self.length.clone()
        slots = self.length[:, None] + torch.arange(T, device=device)                    # [B, T]
        first = torch.arange(0, B * K * S, S, device=device).view(B, K, 1)
        return slots + self.gone[:, None], (first + slots[:, None]).flatten()

    put, sees = Cache.put, Cache.sees

    def absorb(self):
        """Add to the scores what waited for the rows' lengths."""
        if self.rule in LATER:
            LATER[self.rule](self)

    def evict(self, budget, protect=0):
        """Keep each row's and head's `budget` best slots, its last `protect` among them."""
        self.absorb()
        if self.used > budget:
            if self.blind:
                raise UserError("no token of this cache was scored: it is another model's")
            slots, count = retained(self.score[..., :self.used], self.length, budget, protect)
            index = slots[..., None].expand(-1, -1, -1, -1, self.k.size(-1))
            self.k, self.v = self.k.gather(3, index), self.v.gather(3, index)
            self.score = self.score.gather(3, slots)
            self.gone = self.gone + self.length - count
            self.length, self.used, self.most = count, slots.size(-1), int(self.gone.max())

    def spread(self, rows, slots):
        """The prompts are read: evict, then row i becomes a copy of old row rows[i], with more
        slots."""
        self.evict(self.budget + self.local, self.local)
        self.release()
        self.keep(rows)
        self.score = self.score[..., :0].clone()         # nothing is evicted any more
        self.k, self.v = (F.pad(x[:, :, :, :self.used], (0, 0, 0, slots)) for x in (self.k, self.v))

    def keep(self, rows):
        """Row i becomes old row rows[i], and the others go."""
        self.k, self.v, self.score = self.k[:, rows], self.v[:, rows], self.score[:, rows]
        self.length, self.gone = self.length[rows], self.gone[rows]

    def nbytes(self):
        """Stored bytes: keys, values, and the scores as long as they are needed."""
        return self.k.nbytes + self.v.nbytes + self.score.nbytes


# === retaining_heads: 2410.01805, a small head a layer learns which keys a text will ask for ======


class RetainingHead(nn.Module):
    """One layer's:  W2 silu(W1 [q; k; v])  of the projections before norms and RoPE: a score a key
    head."""

    def __init__(self, config, width, generator):
        super().__init__()
        H, K = config.num_attention_heads, config.num_key_value_heads
        self.w1 = nn.Linear((H + 2 * K) * config.head_dim, width, bias=False)
        self.w2 = nn.Linear(width, K, bias=False)
        for w in (self.w1.weight, self.w2.weight):
            nn.init.normal_(w, std=w.size(1) ** -0.5, generator=generator)

    def forward(self, c):
        """c [B, T, (H + 2K) hd] -> [B, T, K]"""
        return self.w2(F.silu(self.w1(c)))


def retaining_labels(q, k, answer):
    """Locret's labels: the largest pre-softmax logit that any query of the answer, of any query
    head of the group, has for a token of the prompt:  y = max_j max_g  q_jg . k_p / sqrt(hd).

    q [B, H, T, hd], k [B, K, T, hd], the last `answer` tokens the answer's -> [B, K, T - answer].
    """
    q = q[:, :, -answer:].reshape(len(q), k.size(1), -1, q.size(-1))                # [B, K, Ga, hd]
    return (k[:, :, :-answer] @ q.mT).amax(-1) / q.size(-1) ** 0.5


def retaining_loss(score, label, *, smooth=0.0025):
    """Locret's loss:  SmoothL1(score, label) + smooth mean (score_t - score_t+1)².
    Both [B, K, P]."""
    return F.smooth_l1_loss(score, label) + smooth * (score.diff(dim=-1) ** 2).mean()


@torch.no_grad()
def retaining_data(model, tokens, answer):
    """What the heads of all layers learn from: [(c [B, P, …], label [B, K, P])] of tokens
    [B, P + answer]."""
    out = []

    def see(layer, self_attn, seen, where):
        q, k = (rotated(self_attn, seen[n], f"{n}_norm", *where[1:3]) for n in "qk")
        out.append((joined(seen)[:, :-answer], retaining_labels(q, k, answer)))
    hooks = watch_attention(model, see)
    try:
        model(tokens)
    finally:
        for hook in hooks:
            hook.remove()
    return out


def heads_loss(heads, model, windows, answer, batch, generator, step):
    """The mean loss of all layers' heads on a batch of windows."""
    rows = torch.randint(len(windows), (batch,), generator=generator)
    data = retaining_data(model, windows[rows].to(model.head.device), answer)
    losses = [retaining_loss(head(x).mT, label) for head, (x, label) in zip(heads, data)]
    return sum(losses) / len(losses)


def train_heads(model, windows, *, steps=300, lr=5e-4, width=256, answer=32, batch=8, warmup=0.1):
    """Train Locret's heads (2410.01805) on windows [N, T] of text, whose last `answer` tokens ask
    about the rest; the model is frozen.   -> nn.ModuleList, a RetainingHead a layer

    AdamW (0.9, 0.95), gradients clipped by value at 0.5, as in the paper; there lr 5e-4, width
    1,024, 3,000 sequences of up to 10,240, 2,000 steps of warm-up. warmup, batch, width are ours.
    """
    check_scored(model)
    if not answer < windows.size(1) - 1:
        raise UserError(f"--context {windows.size(1)}: retaining heads learn from the last "
                        f"{answer} tokens about the rest, so more than that")
    g = torch.Generator().manual_seed(0)
    heads = nn.ModuleList(RetainingHead(model.config, width, g) for _ in model.layers)
    heads = heads.to(model.head.device)
    loss_of = partial(heads_loss, heads, model, windows, answer, batch, g)
    fit([dict(params=heads.parameters())], loss_of, steps, "retaining heads", lr=lr, clip_value=0.5,
        rate=lambda step: min(1.0, (step + 1) / max(1, warmup * steps)))
    return heads.requires_grad_(False)


# === evicting: 2410.01805, of a prompt stays what trained heads rate highest ======================


def locret(model, heads=None, *, score="locret", budget=64, local=8):
    """Of a prompt but for its last `local` tokens, a key head keeps the `budget` best by a row of
    SCORES. -> what makes the cache, for generate(cache=…): there the prompt is seen whole, then
    evicted.   heads: of train_heads, for score "locret"."""
    check_scored(model)
    if score == "locret" and (heads is None or len(heads) != model.config.num_hidden_layers):
        raise UserError("score locret needs a retaining head for every layer: see train_heads")
    return partial(Evicting, model, heads, score, budget, local)


def read_in_chunks(model, tokens, cache, *, chunk=0, stabilizers=0):
    """Read a prompt [B, P] in chunks (0: one), evicting after each.
    -> hidden [B, n, D] of the last ones

    Locret's inference: all but the last `local` tokens in chunks, after each the best `budget`
    stay, among them the newest `stabilizers` but for the final chunk; then the local ones. At most
    budget + chunk slots.
    """
    P = tokens.size(1)
    body = max(P - cache.local, 0)
    parts = list(tokens[:, :body].split(chunk or max(body, 1), 1)) if body else []
    for i, part in enumerate(parts):
        hidden = model(part, cache)                                                  # [B, chunk, D]
        cache.evict(cache.budget, 0 if i == len(parts) - 1 else stabilizers)
    return hidden if body == P else model(tokens[:, body:], cache)


def evicting(model, tokens, *, score: Literal[*SCORES] = "locret", budget: Count = 24, local=8,
             chunk=0, stabilizers=0, head_steps: Count = 300):
    """Locret (2410.01805): of a prompt the `budget` tokens stay that small heads, trained here on
    the calibration windows, rate highest; or by score recency, random, attention. All keep budget +
    local.

    chunk: so many tokens of the prompt are read at a time (0: all), then the best stay, the newest
    `stabilizers` among them. Defaults are ours, for contexts of a few hundred; the paper's budget,
    stabilizers and local: 6,000, 2,500 and 100, in chunks of 3,072.
    """
    heads = train_heads(model, tokens, steps=head_steps) if score == "locret" else None
    return locret(model, heads, score=score, budget=budget, local=local)


def through_evicting(model, tokens, held, c, f, run):
    """through_cache, the prompt read in chunks."""
    read = partial(read_in_chunks, **{k: f.cache.keywords[k] for k in ("chunk", "stabilizers")})
    return through_cache(model, tokens, held, c, f, run, read)


def check_evicting(c, f):
    """UserError for stabilizers that no budget holds, or that nothing reads."""
    budget, chunk, stabilizers = (f.cache.keywords[k] for k in ("budget", "chunk", "stabilizers"))
    if stabilizers > budget:
        raise UserError(f"--budget {budget} --stabilizers {stabilizers}: the budget must hold them")
    if stabilizers and not chunk:
        raise UserError(f"--stabilizers {stabilizers}: they stay between two chunks: give a "
                        "--chunk")


CACHES["evicting"], CHECKS["evicting"], MEASURES["evicting"] = (
    evicting, check_evicting, through_evicting)
PRESETS["evicting"] = dict(method="dense", cache="evicting")


if __name__ == "__main__":
    cli(main)
