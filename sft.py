"""
sft.py - supervised learning: pre-training a small base model, and fine-tuning on demonstrations.

    python sft.py                                  # docstrings from signatures, its own base first
    python sft.py --config pretrain                # only the base model, on the Python library
    python sft.py --config arithmetic              # addition with a chain of thought, from scratch
    python sft.py --init Qwen2.5-0.5B --data demos.jsonl --config lora
    python sft.py --config pretrain,normuon        # any rule of optim.py; --suggest: Step Law's lr
    torchrun --standalone --nproc_per_node 2 sft.py --config pretrain,normuon      # FSDP2
    python sft.py --claim normuon --seeds 5        # the race of the optimisers, with a verdict

The spine trains on every token of a text (pretrain) or on completions only, their EOS included
(sft), with AdamW; a chapter adds a base model, an objective, an adapter, a kind of linear layer.
Letters  B rows, T tokens, N scored tokens, V vocabulary; W [m, n] = [out, in], X [N, n] inputs
Watch    val_loss is nats per scored token and is the number to believe; a falling train loss with
         a rising val_loss is memorising. bpb (bits per byte) is the one to compare between
         tokenizers. With loram it is the pruned model's; the completions shown at the end are the
         whole one's. saved_loss is that of the checkpoint, where --linear says how layers train:
         rounded (qat), or in float32 (halo, quartet).
"""
import hashlib
import json
import math
import re
import time
from collections import Counter
from contextlib import nullcontext
from dataclasses import dataclass, fields, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Literal

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

import kernels
from data import prefs, tasks, text, tokenizer
from data.run import (Count, Fraction, Positive, Range, Run, Share, Training, UserError, alone,
                      batch_indices, changed, checkpoint, cli, code_of, configure, launch, lock,
                      needs, rank, read_json, read_log, result, rows_used, share, start_ranks)
from kernels import (EXPONENTS, MX_GROUP, ROUNDINGS, PackedLinear, absmax, e2m1, grouped, hadamard,
                     linear_distill, power_of_two, quantize_activations, rotate, wide)
from model import (ADAPTERS, FAMILIES, PEFT, LoRA, Transformer, Work, adapter_readers,
                   adapter_state, adapters_of, autocast, check_adapters, clip_gradients, collate,
                   foresee, gathered, generate, init, load, load_balance_loss, load_frozen, lora,
                   merge, own_part, peek, preset, recomputing, reference, replace_linears, save,
                   save_trained, shard, summed, token_logprobs, use, with_ends)
from optim import (RULES, SCHEDULES, STORES, memory_report, name_of, optimiser, set_lr,
                   state_bytes)

# --- config ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Config(Training):
    """What belongs to a loss, schedule or optimiser is an argument of its function."""
    data: str = "signatures"     # stdlib or another text (packed); a task, a JSONL of demos
    rows: int = 0                # use only so many demonstrations (0: all)
    init: str = "base:pretrain"  # a checkpoint; base:PRESETS makes it first; empty: a new model
    model: str = "4x128"         # layers x width of a new model
    family: Literal[*FAMILIES] = "qwen3"  # its architecture: a row of model.FAMILIES
    tokenizer: str = "bpe"       # of a new model: bpe (trained here), bytes, toyif, gpt2, a folder
    vocab: Range("[261, 1000000]") = 2048  # size of a trained bpe
    turns: Literal["all", "last"] = "all"  # of the assistant's in a conversation, what is trained
    context: Range("[2, inf)") = 256  # longest row in tokens; a new model's context is twice that
    loss: str = "nll"            # which row of LOSSES
    feedback: str = "none"       # which row of FEEDBACK: how scores, tags and pairs become rows
    teacher: str = ""            # checkpoint that a distilling loss reads (a DPO-trained one)
    other: str = ""              # a second: the teacher's start, or dpo.py --noise 1's
    optimiser: str = "adamw"     # which row of optim.RULES updates the matrices of the blocks
    schedule: str = "cosine"     # which row of SCHEDULES
    steps: int = 0               # optimizer steps (0: epochs decides)
    epochs: Positive = 3.0       # passes over the data, where steps is 0
    batch: Count = 32            # rows per optimizer step
    micro: Count = 32            # rows a forward pass: lower it if memory runs out, results stay
    warmup: int = 20             # steps of linear warm-up
    weight_decay: float = 0.1    # on matrices, not on norms and biases
    clip: Positive = 1.0         # largest gradient norm
    eval_prompts: int = 64       # held-out prompts that are answered at the end (0: none)
    linear: str = "plain"        # how the blocks' linear layers compute: a row of LINEARS
    prune: str = "none"          # which row of PRUNING cuts their weights while training
    store: str = "float32"       # how the matrices of the blocks are kept: a row of optim.STORES
    eval_every: Count = 100      # steps between evaluations
    watch: str = ""              # a further data set to evaluate on, e.g. what was known before
    target: float = 0.0          # validation loss to reach: the result says when it was
    suggest: bool = False        # print Step Law's lr and batch for this model and data, and stop


PRESETS = dict(
    pretrain=dict(data="stdlib", init="", steps=800, batch=16, micro=16, lr=3e-3, warmup=60,
                  eval_every=200),
    sft=dict(),                                                                  # the defaults
    tiny=dict(model="2x64", steps=100, batch=8, micro=8, context=192, vocab=512,
              warmup=10, eval_every=50),                 # 30 s on any CPU: shows that all turns
)
SIZES = ("tiny",)                # presets that a run hands on to the base that it makes

CURVES = {"nats per token": ["loss", "val_loss", "ood_loss"],
          "bits per byte": ["val_bpb", "ood_bpb"], "learning rate": ["lr"]}

# --- losses: a number a scored token, [B, T], or a row, [B]; the loop divides by the whole step's -
# A loss's positional arguments name what it reads, and only that is computed: rows of FACTS, what a
# memory tells of each row, or what the feedback gave with it.


def nll(logp):
    """Cross-entropy: the negative log-probability of every scored token.   [B, T] -> [B, T]"""
    return -logp


def logp_of(model, tokens, mask, frozen):
    """log π of every scored token, 0 elsewhere.   [B, T]"""
    return token_logprobs(model, tokens, mask)


def mask_of(model, tokens, mask, frozen):
    """1 where a token is scored.   [B, T]"""
    return mask


LOSSES = dict(nll=nll)
FACTS = dict(logp=logp_of, mask=mask_of)  # a loss's argument: (model, tokens, mask, frozen) -> it
FROZEN = {}                      # such an argument: (c, origin, model, tok) -> its frozen model


def provide(loss, model, frozen, tokens, mask, own):
    """What the loss names, of these rows, {name: tensor}; own: each row's own numbers."""
    out = {}
    for name in needs(loss):
        if name in FACTS:
            out[name] = FACTS[name](model, tokens, mask, frozen.get(name))
        elif name in own[0]:
            out[name] = torch.tensor([x[name] for x in own]).to(mask)                    # [B]
        else:
            raise UserError(f"--loss {loss.func.__name__} reads {name}: this --feedback does not "
                            "give it")
    return out


# --- data -----------------------------------------------------------------------------------------


def demos(c, tok, first, generator):
    """Demonstrations, or windows of a corpus, as they are.

    A row of FEEDBACK: -> [(prompt, completion)], ~id what a completion only reads, and of each
    {name: number} that a loss may read. first() -> the model and tokenizer as training starts.
    """
    data = tasks.rows(c, tok, "train", c.turns)
    return data, [{} for _ in data]


FEEDBACK = dict(none=demos)
HELD = {}                        # feedback made of pairs: (c, tok, split) -> held-out rows


def held(c, f, tok):
    """{split: rows} of what is evaluated on; prompts carry the tag of a good answer if there are
    tags."""
    tag = tag_of(f, tok)
    out = {}
    for split in tasks.held_out(c.data):
        rows = HELD.get(c.feedback, partial(tasks.rows, turns=c.turns))(c, tok, split)
        out[split] = [([*prompt, *tag], completion) for prompt, completion in rows]
    if c.watch:
        out["watch"] = tasks.rows(replace(c, data=c.watch), tok, "val")
    return out


def tag_of(f, tok):
    """The ids of the tag that a feedback puts behind the prompts of good answers, [] if it has
    none."""
    return tok.encode(f.feedback.keywords.get("good_tag", ""))


def count_scored(data, rows):
    """How many tokens of these rows are scored."""
    return sum(i >= 0 for j in rows for i in data[j][1])


def micro_batches(data, tok, c, rows):
    """These rows in forward passes: (rows, tokens, mask, real) each; real: neither mask nor pad
    counts, [b, T]."""
    for i in range(0, len(rows), c.micro):
        some = rows[i:i + c.micro]
        tokens, mask = collate([data[j] for j in some], tok.pad or 0, c.device)          # [b, T]
        ends = torch.tensor([len(data[j][0]) + len(data[j][1]) for j in some], device=c.device)
        yield some, tokens, mask, torch.arange(tokens.size(1), device=c.device) < ends[:, None]


# --- tables that chapters fill --------------------------------------------------------------------


class Memory:
    """What a row of an axis or an argument of a loss does beside the loop: its chapter says which
    of these. known: {steps, tokens of a step, …}, what schedules may read."""

    def __init__(self, c, f, model, opt, known): ...
    def schedule(self, schedule): return schedule        # of the learning rate, changed or not
    def begin(self, step): ...                           # it begins
    def tell(self, rows, batches): return {}             # {row: number}, the loss's argument
    def note(self, rows, facts): ...                     # their forward gave the loss these facts
    def backward(self): ...                              # gradients are there, and not clipped
    def end(self, step): return {}                       # so many are made: what the log says of it
    def state(self): return {}                           # what a checkpoint keeps, for load()
    def load(self, state): ...
    def report(self): return {}                          # what the result says of it


def plain(model, generator):
    """Float weights, the device's matmul."""
    return model


def none(step, steps):
    """No pruning."""
    return 0.0


LINEARS = dict(plain=plain)      # (model, generator) -> the model with its blocks' linear layers
PRUNING = dict(none=none)        # (step, steps) -> the share of the weights that is 0 after it
# Rows of these are used where asked() has their name:
MEMORIES = {}                    # a Memory, of what goes on beside the loop
CHECKS = {}                      # (c, f, ranks): UserError for what does not combine
REPORTS = {}                     # what the result says beyond the losses
INSTEAD = {}                     # (c, model, tok) -> the result of a run that trains nothing
# ... and of these, where the axis of the comment has it:
WHOLE = {}                       # peft: (trained model, model as it starts) -> the whole one
WRITERS = {}                     # linear: (model, tok, folder), in the place of model.save
AXES = dict(loss=LOSSES, feedback=FEEDBACK, optimiser=RULES, update=dict(optimiser=optimiser),
            schedule=SCHEDULES, peft=PEFT, linear=LINEARS, prune=PRUNING, store=STORES,
            kernels=kernels.MODES)


def asked(c, f):
    """What a run uses, by name: the rows of its axes, its loss's arguments, fields that are
    set."""
    rows = rows_used(c, AXES).values()
    given = [x.name for x in fields(c) if getattr(c, x.name)]
    return [*dict.fromkeys([*rows, *needs(f.loss), *given])]


# --- start ----------------------------------------------------------------------------------------


def start(c, origin):
    """The model and tokenizer that training starts from: the folder `origin`'s, or new ones if it
    is ''."""
    if not origin:
        tok = new_tokenizer(c)
        if c.chat:
            tok.use_chat()
        config = with_ends(preset(c.model, tok, 2 * c.context, c.family), tok)
        return init(config, c.seed).to(c.device), tok
    model, tok = (load_frozen(origin, c) if c.peft in ADAPTERS else
                  load(origin, c.device, chat=c.chat))
    if not isinstance(model, Transformer):
        raise UserError(f"--init {c.init} is a reward model; sft.py needs a language model")
    return model, tok


def as_saved(c, net, first):
    """The model that a checkpoint holds: whole, its layers plain."""
    net = WHOLE[c.peft](net, first()[0]) if c.peft in WHOLE else net
    return merge(net) if any(hasattr(m, "merged") for m in net.modules()) else net


def write_checkpoint(c, net, first, tok, origin, folder):
    """Save an adapter, merged or alone, or what as_saved() makes of another model."""
    if c.peft in ADAPTERS and c.linear not in WRITERS:
        return save_trained(net, tok, folder, c, origin)
    WRITERS.get(c.linear, save)(as_saved(c, net, first), tok, folder)


# --- evaluate -------------------------------------------------------------------------------------


@torch.no_grad()
def evaluate(model, tok, data, c, limit=256):
    """Mean nats per scored token, and bits per byte of scored text, over the first `limit` rows."""
    data, of = own_part(data[:limit]), Counter(nats=0.0, count=0.0, size=0)
    with autocast(c.device, c.dtype), gathered(model):
        for i in range(0, len(data), c.micro):
            tokens, mask = collate(data[i:i + c.micro], tok.pad or 0, c.device)
            of["nats"] -= token_logprobs(model, tokens, mask).sum().item()
            of["count"] += mask.sum().item()
            scored = [t for t in tokens[mask > 0].tolist() if t not in tok.hidden]
            of["size"] += sum(len(tok.tokens[t]) for t in scored)
    nats = (of := summed(of))["nats"]
    return dict(loss=nats / max(of["count"], 1), bpb=nats / math.log(2) / max(of["size"], 1))


def measure(model, tok, held_out, c):
    """evaluate() of every split, as val_loss and so on."""
    out = {}
    for split, rows in held_out.items():
        metrics = evaluate(model, tok, rows, c) if rows else {}
        out |= {f"{split}_{key}": value for key, value in metrics.items()}
    return out


def show(model, tok, problems, c, run, tag=()):
    """Print three completions of held-out prompts (and a tag); -> the task's metric over all, at
    T=1."""
    g, task = torch.Generator().manual_seed(c.seed), tasks.of_run(c)
    context = model.config.max_position_embeddings - len(tag)
    new, problems, _ = tasks.fitting(c, tok, problems, {}, task.max_new, context)
    prompts = [[*tok.prompt(p, c.chat), *tag] for p in problems]
    roll = generate(model, prompts, new, generator=g)
    answers = [tok.decode(ids) for ids in roll.completions()]
    for p, ids, a in list(zip(problems, prompts, answers))[:3]:
        run.say(f"  prompt     {tok.decode(ids, skip_specials=False)!r}\n  model      {a!r}\n"
                f"  reference  {task.demo(p)!r}")
    scores = [task.reward(p, a, ended)
              for p, a, ended in zip(problems, answers, roll.finished.tolist())]
    return {task.metric: sum(scores) / len(scores)}


# --- train ----------------------------------------------------------------------------------------


def conclude(c, f, scores, memories, known):
    """What the result says beyond the last losses, with some samples; known: what REPORTS may
    read."""
    for memory in memories.values():
        scores |= memory.report()
    for name in asked(c, f):
        if name in REPORTS:
            scores |= REPORTS[name](**{key: known[key] for key in needs(REPORTS[name])})
    run, net, tok = known["run"], known["net"], known["tok"]
    if not text.is_corpus(c.data) and c.eval_prompts and net is not None:  # of ranks the first
        problems = tasks.of_run(c).problems("val", c.eval_prompts, c.seed)
        with alone():
            quality = show(net, tok, problems, c, run, tag_of(f, tok)) if problems else {}
        run.say("  held out: " + "  ".join(f"{k} {v:.3f}" for k, v in (scores | quality).items()))
        scores |= {f"val_{key}": value for key, value in quality.items()}
    return scores


def seeded(c):
    """A generator at the run's seed."""
    return torch.Generator().manual_seed(c.seed)


def train(c, f):
    """One run: load, loop, log, save. Returns the last evaluation's numbers."""
    me, ranks = start_ranks(c.device)                            # (0, 1) without torchrun
    check(c, f, ranks)
    origin = find(c.init, c.config, device=c.device)     # made before this run's clock starts
    use(c)
    for name in asked(c, f):
        if name in INSTEAD:
            return INSTEAD[name](c, *start(c, origin))
    with Run(c, f, "sft", CURVES) as run:
        first, saved = partial(start, c, origin), run.state or {}
        whole_in_checkpoint = saved and not saved["adapter"]
        model, tok = load(run.last, c.device, chat=c.chat) if whole_in_checkpoint else first()
        data, infos = f.feedback(c, tok, first, seeded(c))
        batches = partial(micro_batches, data, tok, c)
        held_out = held(c, f, tok)
        model = f.linear(f.peft(f.store(model), seeded(c)), seeded(c))
        model.load_state_dict(saved.get("adapter", {}), strict=False)
        frozen = {name: FROZEN[name](c, origin, model, tok)
                  for name in needs(f.loss) if name in FROZEN}
        unsharded = shard(recomputing(model, c.recompute), c.dtype)      # over torchrun's ranks
        opt = f.update(model, f.optimiser, c.lr, c.weight_decay, c.seed)
        if saved:
            opt.load_state_dict(saved.pop("opt"))
        forward = torch.compile(model) if c.compile else model
        total = c.steps or max(1, math.ceil(len(data) * c.epochs / c.batch))
        introduce(run, c, model, opt, total, data, tok, frozen.values())

        known = dict(steps=total, warmup=c.warmup, lr=c.lr, batch=c.batch,
                     tokens=c.batch * sum(len(y) for _, y in data) / max(1, len(data)))
        memories, schedule = {}, f.schedule
        for name in asked(c, f):
            if name in MEMORIES:
                memories[name] = memory = MEMORIES[name](c, f, forward, opt, known)
                if saved:
                    memory.load(saved["memories"][name])
                memory.begin(run.start)
                memory.end(run.start)
                schedule = memory.schedule(schedule)
        scores, clock, clipped = {}, saved.get("clock", dict(all=0.0, update=0.0)), 0
        now = time.process_time if c.device == "cpu" else time.perf_counter
        if origin and not run.start:                             # what it could before
            run.log(0, **measure(model, tok, held_out, c), tokens=0, seconds=0.0)
        for step in run.steps(total):
            # 1. get data
            began = now()
            picked = batch_indices(len(data), c.batch, step, c.seed).tolist()
            count = count_scored(data, picked)            # of the step, on all ranks
            picked = picked[me::ranks]                           # this rank's rows
            own = {j: dict(infos[j]) for j in picked}
            for name, memory in memories.items():
                memory.begin(step)
                for j, number in memory.tell(picked, batches).items():
                    own[j][name] = number
            # 2. score
            loss, aux, done = 0.0, 0.0, 0
            for rows, tokens, mask, real in batches(picked):
                done += len(rows)
                if ranks > 1:                  # gradients meet after the last micro-batch
                    model.set_requires_gradient_sync(done == len(picked))
                with autocast(c.device, c.dtype):
                    facts = provide(f.loss, forward, frozen, tokens, mask, [own[j] for j in rows])
                    part = f.loss(**facts)                                         # [b, T] or [b]
                    part = (part * mask).sum() / count if part.dim() == 2 else part.sum() / c.batch
                    balance = load_balance_loss(model, real) * len(rows) / c.batch
                for memory in memories.values():
                    memory.note(rows, facts)
                whole = part + model.config.router_aux_loss_coef * balance
                (whole * ranks).backward()                       # FSDP2 averages over ranks
                loss, aux = loss + part.item(), aux + balance.item()
            # 3. update
            for memory in memories.values():
                memory.backward()
            norm = clip_gradients(model, c.clip)
            loss, aux = summed(dict(loss=loss, aux=aux)).values()
            known["step"] = step
            set_lr(opt, c.lr * schedule(**{key: known[key] for key in needs(schedule)}))
            updating = now()
            opt.step()
            metrics = {}
            for memory in memories.values():
                metrics |= memory.end(step + 1)
            clock["update"] += now() - updating
            opt.zero_grad()
            clock["all"] += now() - began
            clipped += float(norm) > c.clip
            # 4. tell
            metrics |= dict(loss=loss, norm=norm, lr=opt.param_groups[0]["lr"], tokens=count,
                            seconds=clock["all"]) | (dict(aux=aux) if aux else {})
            if (step + 1) % c.eval_every == 0 or step + 1 == total:
                run.check(step + 1, model)
                scores = measure(model, tok, held_out, c)
                metrics |= scores
            run.log(step + 1, **metrics)
            if (step + 1) % c.save_every == 0 or step + 1 in (total, c.stop):
                net, state = unsharded(), opt.state_dict()       # collective: every rank takes part
                adapter = adapter_state(net) if net is not None else {}
                adapter |= dict(net.named_buffers()) if c.linear != "plain" else {}
                write = partial(write_checkpoint, c, net, first, tok, origin)
                run.save(step + 1, write, opt=state, adapter=adapter, clock=clock,
                         memories={name: memory.state() for name, memory in memories.items()})
        if c.stop and c.stop < total:
            run.say(f"  paused at step {c.stop}: the same command with --resume, without --stop, "
                    "goes on")
            return scores
        if run.start >= total:                                   # resumed after its last step
            scores = measure(model, tok, held_out, c)
        sum_up(run, opt, clock, clipped / max(1, total - run.start))
        net = unsharded()
        net = as_saved(c, net, first) if net is not None else None
        known |= dict(c=c, run=run, model=model, net=net, tok=tok, opt=opt, clock=clock,
                      held_out=held_out)
        scores |= conclude(c, f, scores, memories, known)
        return share(run.finish(**scores))


# --- main -----------------------------------------------------------------------------------------


def main(argv=None):
    """python sft.py …: see the docstring above, or --help."""
    return launch("sft", Config, PRESETS, AXES, __doc__, train, argv, readers, ranks=True)


# === base: checkpoints that others start from, made when they are asked for =======================


def configured(presets, like="", **changes):
    """What base() asks for: the presets' names, the command line, (c, f)."""
    names = [name for name in re.split("[,+]", presets) if name]
    if not names:
        raise UserError("base: names no preset: write base:PRESETS, for example base:pretrain")
    names += [size for size in SIZES if size in like.split(",")]
    argv = ["--config", ",".join(names), *(f"--{k}={v}" for k, v in changes.items())]
    return names, argv, configure(Config, PRESETS, AXES, __doc__, argv)


def fingerprint(c, f):
    """Eight digits of what makes a base: the settings that differ from their defaults and change a
    result, the code that trains it, the base that it starts from."""
    mark = repr(sorted(changed(c, f).items())) + code_of("sft", c, AXES)
    if c.init.startswith("base:"):
        mark += fingerprint(*configured(c.init.removeprefix("base:"), c.config)[2])
    return hashlib.sha256(mark.encode()).hexdigest()[:8]


def base(presets, like="", **changes):
    """The checkpoint folder that `sft.py --config presets` leaves, made now if it is not under
    out/sft/.

    like: the asking run's own --config, whose size preset (tiny) is handed on. changes: further
    keys, e.g. seed=1. The folder's name carries a hash of the settings and of the code, its own
    base's too, so that different ones never share a checkpoint. On several ranks all make it
    together.
    """
    names, argv, (c, f) = configured(presets, like, **changes)
    folder = Path("out/sft") / f"base-{'-'.join(names)}-{fingerprint(c, f)}"
    leads = rank() == 0
    with lock(folder) if leads else nullcontext():
        if share(result(folder) is None):
            if leads:
                print(f"making {folder}  (python sft.py {' '.join(argv)})", flush=True)
            train(replace(c, out=str(folder), resume=(folder / "run.json").exists()), f)
    return checkpoint(folder)


def find(path, like, make=True, option="--init", **changes):
    """--init's value as a folder: base:PRESETS is made if need be, anything else stands for itself.

    make False: only look, so that what is missing is told before anything is made; -> the longest
    context that it will have. Raises UserError, which names `option`, for an unknown preset, and
    for a folder that is no language model.
    """
    if path.startswith("base:"):
        presets = path.removeprefix("base:")
        if make:
            return base(presets, like, **changes)
        return longest(configured(presets, like, **changes)[2][0])
    return path if make else peek(path, option=option).max_position_embeddings


def longest(c):
    """The context of the model that a run of these settings leaves: twice --context, or its own
    base's."""
    return find(c.init, c.config, make=False) if c.init else 2 * c.context


# === tokenizer: of a new model ====================================================================


def new_tokenizer(c):
    """The tokenizer of a new model; a BPE is trained once on the training documents, in
    data/cache/."""
    if c.tokenizer != "bpe":
        worlds = dict(toyif=prefs.tokenizer, ring=prefs.ring_tokenizer,
                      chain=tasks.chain_tokenizer)
        return worlds[c.tokenizer]() if c.tokenizer in worlds else tokenizer.get(c.tokenizer)
    if text.is_corpus(c.data):
        documents = text.documents(c.data, "train", c.val)
    else:
        task = tasks.of_run(c)
        documents = [p["prompt"] + task.demo(p) for p in task.problems("train", c.rows, c.seed)]
    name = hashlib.sha256("\0".join(documents).encode(errors="replace")).hexdigest()[:12]
    folder = text.CACHE / f"bpe-{c.vocab}-{name}"
    with lock(folder):
        if not folder.exists():
            sample = documents[:: max(1, sum(map(len, documents)) // 4_000_000)]
            unfinished = Path(f"{folder}.tmp")
            tokenizer.train_bpe(sample, c.vocab).save(unfinished)
            unfinished.rename(folder)
    return tokenizer.Tokenizer.load(folder)


# === check: what does not combine, told before anything is made ===================================


def readers(c, f):
    """{field: (whether this run reads it, what does)} of the fields that not every run reads."""
    new, corpus = (not c.init, "a new model (--init '')"), text.is_corpus(c.data)
    demonstrated = "demonstrations, and --data is a text"

    def by_loss(key):
        known = [name for name, loss in LOSSES.items() if key in needs(loss)]
        return key in needs(f.loss), f"--loss {' or '.join(known)}"
    return dict(
        model=new, family=new, tokenizer=new,
        vocab=(new[0] and c.tokenizer == "bpe", "a new tokenizer (--init '' --tokenizer bpe)"),
        rows=(not corpus, demonstrated), chat=(not corpus or c.watch, demonstrated),
        turns=(c.chat and c.feedback not in HELD, "runs with --chat, but for pairs"),
        **tasks.file_readers(c, c.feedback in HELD),
        epochs=(not c.steps, "runs without --steps"), **adapter_readers(c),
        eval_prompts=(not corpus, demonstrated),
        slots=(False, "grpo.py, ppo.py and dpo.py"),
        warmup=("warmup" in needs(f.schedule), "other schedules"),
        teacher=by_loss("teacher"), other=by_loss("other"),
        target=("target" in REPORTS, "sft.py"), suggest=("suggest" in INSTEAD, "sft.py"))


def check(c, f, ranks):
    """UserError for all that can be known before anything is made: files, folders, what does not
    combine."""
    for wrong, words in (
            (c.batch % ranks, f"--batch {c.batch} is not a multiple of the {ranks} ranks"),
            (ranks > 1 and (needs(f.loss) != ["logp"] or c.feedback != "none"),
             f"--loss {c.loss} --feedback {c.feedback} run on one rank: start without torchrun"),
            (ranks > 1 and c.store != "float32",
             f"--store {c.store} runs on one rank: start it without torchrun")):
        if wrong:
            raise UserError(words)
    for name in asked(c, f):
        if name in CHECKS:
            CHECKS[name](c, f, ranks)
    if c.feedback not in HELD:
        tasks.check_data(c.data, is_text=c.feedback == "none", **tasks.reading(c))
    if c.watch:
        tasks.check_data(c.watch)
    if c.init:
        most = find(c.init, c.config, make=False)
        if c.context > most:
            raise UserError(f"--context {c.context} exceeds the {most} tokens of {c.init}: lower "
                            "it")
    else:                                                        # is --model well written?
        tok = tokenizer.bytes_tokenizer() if c.tokenizer == "bpe" else new_tokenizer(c)
        preset(c.model, tok, 2 * c.context, c.family)


# === summary: what a run prints of itself =========================================================


def introduce(run, c, model, opt, total, data, tok, frozen):
    """Print what will be trained on what: sizes, learning rates, one row with what is scored of
    it; and what the run will hold."""
    size = sum(p.numel() for p in model.parameters())
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    ranks = dist.get_world_size() if dist.is_initialized() else 1
    run.say(f"{run.folder}: {size / 1e6:.2f} M parameters ({trained / 1e6:.2f} M trained), "
            f"{len(data)} rows, {total} steps of {c.batch}, {c.computes}"
            + f" x {ranks} ranks" * (ranks > 1)
            + "; packed layers will be saved dense"
            * any(isinstance(m, PackedLinear) for m in model.modules()))
    for group in opt.param_groups:
        decay = group["lr"] * group["weight_decay"]
        run.say(f"  {name_of(group['rule']):<14} {len(group['params'])} tensors, "
                f"lr {group['lr']:.3g}, "
                + (f"decay time {1 / decay:.0f} steps" if decay else "no decay"))
    if data:
        prompt, completion = (tok.decode(ids, False) for ids in data[0])
        run.say(f"  not scored {prompt[-160:]!r}\n  scored     {completion[:160]!r}")
        width = max(len(x) + len(y) for x, y in data)
        work = Work(c.micro, width, c.batch, recompute=c.recompute)
        foresee(run, c, work, [model], frozen, state_bytes(opt))


def costs(opt, clock):
    """The optimiser's share of a step's time, and Newton-Schulz's in it."""
    whole = max(clock["all"], 1e-9)
    return dict(opt_share=clock["update"] / whole,
                ns_share=sum(x.ranks.seconds for x in opt.stacks) / whole)


def sum_up(run, opt, clock, clipped):
    """Print what the steps cost; clipped: the share of them whose gradient was clipped."""
    sizes = ", ".join(f"{rule} {x['bytes'] / x['parameters']:.2f} bytes a parameter"
                      for rule, x in memory_report(opt).items())
    shares = costs(opt, clock)
    run.say(f"  state: {sizes};  of a step's time: optimiser {shares['opt_share']:.1%}"
            + f", Newton-Schulz in it {shares['ns_share']:.1%}" * (shares["ns_share"] > 0)
            + f";  clipped steps: {clipped:.0%}")


# === arithmetic, pretrain_moe: more small bases ===================================================

PRESETS["arithmetic"] = dict(                            # a verifiable task, from scratch
    data="arithmetic", init="", tokenizer="bytes", model="2x128", context=128, rows=20000,
    steps=1500, batch=64, micro=64, lr=2e-3, eval_every=250)
PRESETS["pretrain_moe"] = dict(                          # a small mixture of experts
    data="stdlib", init="", family="qwen3_moe", model="2x64", tokenizer="bytes", context=64,
    steps=900, batch=16, micro=16, lr=2e-3, warmup=60, eval_every=300)

# === target, draft64, draft32, target_docs: what specdec.py decodes and drafts with ===============

TARGET = dict(data="stdlib", init="", tokenizer="bytes", model="8x128", context=160, steps=500,
              batch=16, micro=16, lr=3e-3, warmup=60, eval_every=250)
PRESETS["target"] = TARGET                               # eight narrow layers
PRESETS["draft64"] = TARGET | dict(model="1x64")         # one layer of width 64
PRESETS["draft32"] = TARGET | dict(model="1x32")
PRESETS["target_docs"] = dict(                           # the target of one task
    init="base:target", data="signatures", context=320, epochs=0.5, batch=16, micro=16)

# === toyif_base, toyif_checks, toyif_judge, toyif_obeys, toyif: the world ToyIF ===================

MUON = dict(optimiser="muon", lr=3.5e-3, aux_lr=2e-3, warmup=50, schedule="linear",
            context=64, rows=60000, batch=64, micro=64, eval_every=1000, save_every=1000, keep=1)
PRESETS["toyif_base"] = dict(                            # its three behaviours: good, random, copy
    data="toyif_base", init="", tokenizer="toyif", model="2x64", context=32, rows=30000,
    steps=3500, batch=64, micro=64, lr=2e-3, eval_every=500, save_every=1000, keep=1)
PRESETS["toyif_checks"] = MUON | dict(                   # which criteria do two responses meet?
    data="toyif_checks", init="base:toyif_base", steps=5000)
PRESETS["toyif_judge"] = MUON | dict(                    # the same, most on principles alone
    data="toyif_principles", init="base:toyif_checks", steps=3000)
PRESETS["toyif_obeys"] = dict(                           # two classes, for ppo.py
    data="toyif_obeys", init="base:toyif_base", context=32, rows=4096, epochs=3.0, lr=1e-3,
    save_every=1000, eval_every=1000, keep=1)
PRESETS["toyif"] = dict(                                 # few good ones: where ppo.py starts
    data="toyif", init="base:toyif_base", context=32, epochs=4.0, rows=512, lr=3e-4, warmup=0,
    weight_decay=0.0, save_every=1000, eval_every=1000, keep=1)

# === parity: running parities of mixed quality, where ppo.py starts under a reasoning judge =======

PRESETS["parity"] = dict(
    data="parity", init="", tokenizer="toyif", model="2x64", context=32, rows=20000, steps=1500,
    batch=64, micro=64, optimiser="muon", lr=0.02, aux_lr=5e-3, warmup=50, schedule="linear",
    eval_every=500, save_every=1500, keep=1)

# === chain_right, chain, chain_sort, arena_right, arena: chains of digits, where grpo.py starts ===

CHAIN = dict(init="base:chain_right", context=96, rows=20000, batch=64, micro=64, lr=1e-3,
             warmup=10, save_every=1000, keep=1)
RIGHT = dict(init="", tokenizer="chain", model="2x128", batch=64, micro=64, lr=3e-3, warmup=50,
             save_every=1000, keep=1)
PRESETS["chain_right"] = RIGHT | dict(                   # right ones only
    data="chain_wordy", context=96, rows=20000, steps=600, eval_every=200)
PRESETS["chain"] = CHAIN | dict(data="chain", steps=140, eval_every=70)      # a third is right
PRESETS["chain_sort"] = CHAIN | dict(                    # two tasks: what does RL on one forget?
    data="chain+sort", steps=400, eval_every=200)
PRESETS["arena_right"] = RIGHT | dict(                   # five tasks, right ones only
    data="chain_wordy+sort_wordy+graph_wordy+add_wordy+countdown_wordy", context=128, rows=40000,
    steps=1500, eval_every=500)
PRESETS["arena"] = CHAIN | dict(                         # the five, of mixed quality
    data="chain+sort+graph+add+countdown", init="base:arena_right", context=128, rows=40000,
    steps=300, eval_every=150)

# === ring: demonstrations of the world Ring, where reward.py starts ===============================

PRESETS["ring"] = dict(
    data="ring", init="", tokenizer="ring", model="2x64", context=64, rows=20000, steps=500,
    batch=96, micro=96, lr=2e-3, warmup=0, schedule="linear", eval_every=250, save_every=1000,
    keep=1)

# === lion, lionk, signsgd, soap, dion, classp: rules of optim.py whose scale is not AdamW's =======
# muon, normuon (2502.16982, 2510.05491: AdamW's lr and decay), shampoo, adam_mini need no preset.
# Ours, tried on small models only: every aux_lr, the lr of signsgd, lion(k), eco_sgd and classp.

PRESETS["lion"] = dict(optimiser="lion", lr=5e-4, weight_decay=0.6)    # lr 3-10x below, decay above
PRESETS["lionk"] = dict(optimiser="lionk", lr=5e-4, weight_decay=0.6)
PRESETS["signsgd"] = dict(optimiser="signsgd", lr=1e-3, weight_decay=0.0)
PRESETS["soap"] = dict(optimiser="soap", weight_decay=0.01)            # lr 3e-3
PRESETS["dion"] = dict(optimiser="dion", lr=0.01, weight_decay=0.01, aux_lr=3e-3)
# the author's threshold 0.5 and p 1 are for far larger gradients than a clipped language model's
PRESETS["classp"] = dict(optimiser="classp", threshold=0.0, p=2.0, lr=0.01, weight_decay=0.0,
                         aux_lr=3e-3)

# === galore, qgalore, apollo, apollo_mini, frugal, frugal_columns, fira, gradnormlorp: small states

LOW = dict(lr=0.01, weight_decay=0.0, aux_lr=3e-3)       # rank: a quarter of the side
PRESETS["galore"] = LOW | dict(optimiser="galore")
PRESETS["qgalore"] = LOW | dict(optimiser="qgalore", lr=0.015, store="int8")
PRESETS["apollo"] = LOW | dict(optimiser="apollo")
PRESETS["apollo_mini"] = LOW | dict(optimiser="apollo_mini")
PRESETS["frugal"] = LOW | dict(optimiser="frugal", lr=1e-3)
PRESETS["frugal_columns"] = LOW | dict(optimiser="frugal_columns", lr=1e-3)
PRESETS["fira"] = LOW | dict(optimiser="fira")
PRESETS["gradnormlorp"] = LOW | dict(optimiser="gradnormlorp")

# === eco, eco_sgd: 2601.22101, rounding errors fed back, where no float weights exist =============


def needs_store(c, f, ranks):
    """UserError where nothing is rounded, and eco is its host."""
    if c.store == "float32":
        raise UserError(f"--optimiser {c.optimiser} with --store float32 rounds nothing: add "
                        "--store bfloat16, int8 or int4")


CHECKS["eco"] = CHECKS["eco_sgd"] = needs_store
PRESETS["eco"] = dict(optimiser="eco", store="int8", b2=0.95)          # b2 ours: as adamw's
PRESETS["eco_sgd"] = dict(optimiser="eco_sgd", store="int8", lr=0.1, aux_lr=3e-3)

# === step_law: 2503.04715, --suggest: AdamW's learning rate and batch from model and data =========


def step_law(N, D):
    """Step Law: AdamW's learning rate and batch in tokens for pre-training N non-embedding
    parameters on D tokens:  1.79 N^-0.713 D^0.307,  0.58 D^0.571. Fitted on far larger models."""
    return 1.79 * N ** -0.713 * D ** 0.307, 0.58 * D ** 0.571


def suggest(c, model, tok):
    """Step Law's learning rate and batch for pre-training this model on the tokens that this run
    will see."""
    data = tasks.rows(c, tok, "train")
    N = sum(p.numel() for n, p in model.named_parameters() if "embed" not in n
            and "lm_head" not in n)
    mean = sum(len(p) + len(r) for p, r in data) / len(data)                          # tokens a row
    D = mean * (c.steps * c.batch or c.epochs * len(data))
    lr, batch = step_law(N, D)
    print(f"Step Law (2503.04715) for AdamW, {N:,} parameters without embeddings, {D:,.0f} tokens: "
          f"lr {lr:.2e}, batch {batch:,.0f} tokens "
          f"(--lr {lr:.1e} --batch {max(1, round(batch / mean))}; "
          f"this run has {c.lr:g} and {c.batch}). It was fitted on far larger models.", flush=True)
    return dict(lr=lr, batch_tokens=batch)


def from_scratch(c, f, ranks):
    """UserError for a run that starts from a base."""
    if c.init.startswith("base:"):
        raise UserError("--suggest is about pre-training: add --config pretrain")


INSTEAD["suggest"], CHECKS["suggest"] = suggest, from_scratch

# === race, calm, forget: what the claims on optimisers and on numbers measure, --target ===========


def box(model, decay):
    """The matrices' largest |W| times λ, and the share of weights within 5 % of the wall at 1/λ."""
    W = torch.cat([p.detach().flatten() for n, p in model.named_parameters()
                   if "layers." in n and p.dim() == 2])
    return dict(box=W.abs().max().item() * decay,
                at_wall=(W.abs() * decay > 0.95).float().mean().item())


def reached(rows, goal):
    """When val_loss fell to the goal, on a straight line between evaluations: steps, seconds of
    training; a run that never got there has its whole length, and reached 0."""
    seen = [r for r in rows if "val_loss" in r]
    for last, r in zip([None, *seen], seen):
        if r["val_loss"] <= goal:
            share = 1.0
            if last is not None:
                share = (last["val_loss"] - goal) / (last["val_loss"] - r["val_loss"])
            steps, seconds = ((0.0 if last is None else last[k]) * (1 - share) + r[k] * share
                              for k in ("step", "seconds"))
            return dict(steps_to=steps, seconds_to=seconds, reached=1.0)
    return dict(steps_to=seen[-1]["step"], seconds_to=seen[-1]["seconds"], reached=0.0)


def race(c, run, model, tok, opt, clock, held_out):
    """When the target was reached, and what it cost: the optimiser's share of the time, bytes of
    its state for a parameter, how the weights fill their box; tune_loss of rows that val_loss does
    not see."""
    mine = memory_report(opt)[c.optimiser]
    out = costs(opt, clock) | reached(read_log(run.folder), c.target)
    out |= dict(state_bytes=mine["bytes"] / mine["parameters"]) | box(model, c.weight_decay)
    if rest := held_out["val"][256:]:
        out |= dict(tune_loss=evaluate(model, tok, rest, c)["loss"])
    return out


REPORTS["target"] = race
# a small model of bytes, the same AdamW for all that is no block matrix
PRESETS["race"] = dict(
    tokenizer="bytes", model="2x64", context=64, batch=32, micro=32, steps=120, warmup=12,
    schedule="wsd", cooldown=0.3, eval_every=15, save_every=1000, keep=1, aux_lr=3e-3,
    aux_decay=0.1, target=2.30)                          # the tuned AdamW's at about 90 %
# the race at a calmer rate, so that rounding shows and not where a run drifts to
PRESETS["calm"] = dict(lr=1e-3, aux_lr=0.0, steps=240, eval_every=240, target=0.0)
PRESETS["forget"] = dict(                                # a new task; what is left of the old one?
    data="arithmetic", init="base:pretrain+race", watch="stdlib", context=64, rows=4000, steps=150,
    warmup=10, schedule="linear", eval_every=150, weight_decay=0.0, save_every=1000)

# === mle, filtered, unlikely, rwr: 2302.08582, learning from scored demonstrations ================
# On ToyIF's good, random and copied responses; the learning rates are ours.

TUNED = dict(lr=3e-4, warmup=0, weight_decay=0.0)
SCORED = TUNED | dict(data="toyif_base", init="base:toyif_base", context=32, rows=4000, steps=375)


def unlikelihood(logp, good, *, alpha=1.0):
    """-log p on tokens of good rows, -α log(1 - p) on the others.   [B, T], good [B] -> [B, T]"""
    return torch.where(good[:, None] > 0, -logp,
                       -alpha * torch.log((-torch.expm1(logp)).clamp(min=1e-20)))


def rwr(logp, score, *, temperature: Positive = 0.5):
    """Reward-weighted regression:  -e^(R/β) log p.   score [B], standardised over the data

    ours: the standardised score, and β (10 in the paper, which on [0, 1] is nearly likelihood)."""
    return -logp * (score / temperature).exp()[:, None]


def scored(c, tok, first, generator, *, share: Range("(0, 1]") = 0.5):
    """Demonstrations with the task's reward of each: score, standardised; good 1.0 for the best
    `share`, of equal ones the first."""
    task = tasks.of_run(c)
    problems = task.problems("train", c.rows, c.seed)
    rows = [tasks.demonstration(task, p, tok, c.chat, c.turns) for p in problems]
    value = torch.tensor([float(task.reward(p, task.demo(p), True)) for p in problems])  # [rows]
    if value.max() == value.min():
        raise UserError(f"--feedback {c.feedback}: all demonstrations of {c.data} have the reward "
                        f"{value[0]:g}: there is no better half; take a task of mixed quality, "
                        "such as --data toyif_base")
    good = torch.zeros(len(value))
    good[value.argsort(descending=True, stable=True)[:int(share * len(value))]] = 1.0
    score = (value - value.mean()) / value.std()
    numbers = (dict(score=x, good=g) for x, g in zip(score.tolist(), good.tolist()))
    return fitting([(*row, x) for row, x in zip(rows, numbers)], c)


def fitting(found, c):
    """[(prompt, completion, numbers)] -> rows and numbers of those that fit the context; tells the
    others."""
    kept = [((p, y), numbers) for p, y, numbers in found if len(p) + len(y) <= c.context]
    if len(kept) < len(found):
        print(f"{c.data}: {len(found) - len(kept)} of {len(found)} rows are longer than --context "
              f"{c.context} and left out", flush=True)
    if not kept:
        raise UserError(f"--feedback {c.feedback}: no row fits --context {c.context}; raise it")
    return [row for row, _ in kept], [numbers for _, numbers in kept]


def filtered(c, tok, first, generator, *, share: Range("(0, 1]") = 0.5):
    """Only the best `share` of the demonstrations."""
    kept = [(row, info) for row, info in zip(*scored(c, tok, first, generator, share=share))
            if info["good"]]
    if not kept:
        raise UserError(f"--share {share}: that is no demonstration at all; raise it")
    return [row for row, _ in kept], [info for _, info in kept]


FEEDBACK["scored"], FEEDBACK["filtered"] = scored, filtered
LOSSES["unlikelihood"], LOSSES["rwr"] = unlikelihood, rwr
PRESETS["mle"] = SCORED | dict(feedback="scored")        # likelihood of all: the baseline
PRESETS["filtered"] = SCORED | dict(feedback="filtered")
PRESETS["unlikely"] = SCORED | dict(feedback="scored", loss="unlikelihood")
PRESETS["rwr"] = SCORED | dict(feedback="scored", loss="rwr")

# === conditional: 2302.08582, a tag before each demonstration says which half it is of ============


def conditional(c, tok, first, generator, *, share: Range("(0, 1]") = 0.5, good_tag=".",
                bad_tag=",", untagged: Share = 0.01):
    """All demonstrations, a tag behind the prompt: of the best `share` or not; a few have none. The
    tags are for ToyIF's alphabet: give others elsewhere. ours: a tag a row, not a segment; sampling
    bans none."""
    data, infos = scored(c, tok, first, generator, share=share)
    u = torch.rand(len(data), generator=generator).tolist()
    tags = {1.0: tok.encode(good_tag), 0.0: tok.encode(bad_tag)}
    return fitting([(p + (tags[info["good"]] if x >= untagged else []), y, info)
                    for (p, y), info, x in zip(data, infos, u)], c)


FEEDBACK["conditional"] = conditional
PRESETS["conditional"] = SCORED | dict(feedback="conditional")

# === hindsight: 2302.02676, both answers of a pair, and which is better ===========================

PAIRED = TUNED | dict(data="toyif", init="base:toyif_base", context=64, rows=4000)


def pair_ids(c, tok):
    """The training pairs of a world or a file as ids, both sides with their EOS."""
    found = prefs.pair_sets(c.data, c.rows, seed=c.seed, **tasks.reading(c))[0]
    return prefs.encode_pairs(found, tok, c.context, "training pairs", c.chat)


def held_pairs(c, tok, split):
    """The chosen sides of a file's own held-out pairs; of a world, its demonstrations."""
    if c.data in ("toyif", "ring"):
        return tasks.rows(c, tok, split)
    rows = prefs.pair_sets(c.data, **tasks.reading(c))[1][split]
    found = prefs.encode_pairs(rows, tok, c.context, f"{split} pairs", c.chat)
    return [(r["prompt"], r["chosen"]) for r in found]


def pairs_are_there(c, f, ranks):
    """UserError if --data holds no pairs, or hindsight's --mix is not well written."""
    prefs.check_pairs(c.data)
    modes_of(f.feedback.keywords.get("mix", "p"))


def modes_of(mix):
    """"p,pn" -> ["p", "pn"]; UserError for others than p, n, pn, np."""
    modes = mix.split(",")
    if not set(modes) <= {"p", "n", "pn", "np"}:
        raise UserError(f"--mix {mix}: give some of p, n, pn, np, with commas")
    return modes


def hindsight(c, tok, first, generator, *, good_tag=".", bad_tag=",", mix="p,n,pn,np"):
    """Chain of Hindsight: p good tag and better answer, n bad tag and worse one, pn, np both.

    Both answers are scored, their EOS too; the tag between them is not. ours: one mode a pair, tags
    of one symbol (ToyIF's), and no pre-training loss beside it (0.01 in the paper)."""
    tags, out = dict(p=tok.encode(good_tag), n=tok.encode(bad_tag)), []
    modes = modes_of(mix)
    for r in pair_ids(c, tok):
        side = dict(p=r["chosen"], n=r["rejected"])
        one, *two = modes[torch.randint(len(modes), (1,), generator=generator).item()]
        answer = list(side[one])
        if two:
            answer += [*(~i for i in tags[two[0]]), *side[two[0]]]
        out.append((r["prompt"] + tags[one], answer, {}))
    return fitting(out, c)


FEEDBACK["hindsight"], HELD["hindsight"] = hindsight, held_pairs
CHECKS["hindsight"] = pairs_are_there
PRESETS["hindsight"] = PAIRED | dict(feedback="hindsight")

# === implicit: 2507.00018, SFT as an implicit reward, a concave φ of the log-ratio to the start ===

PHI = dict(tv=lambda z: z, chi2=lambda z: z - z * z / 4, hellinger=lambda z: (z / (1 + z)),
           js=lambda z: torch.log(2 - torch.exp(-z)))
FLOOR = dict(tv=-math.inf, chi2=-math.inf, hellinger=-0.9, js=-0.69)


def implicit(logp, ref_logp, *, phi: Literal[*PHI] = "chi2", beta: Positive = 0.1):
    """A concave φ of inverse-Q learning:  -φ(ζ),  ζ = β Σ log π/π_ref, π_ref the start.   -> [B]

    φ: tv ζ (SFT, rows weighing alike);  chi2 ζ - ζ²/4 (stops at ζ = 2);  hellinger ζ/(1+ζ), ζ >
    -.9; js log(2 - e^-ζ), ζ > -.69. All have slope 1 at 0. ours: the family and β, the paper's own
    form could not be checked; its practical finding is a smaller learning rate.
    """
    if phi not in PHI:
        raise UserError(f"--phi {phi}: choose from {', '.join(PHI)}")
    return -PHI[phi]((beta * (logp - ref_logp).sum(1)).clamp(min=FLOOR[phi]))


def as_it_starts(c, origin, model, tok):
    """The model before training, frozen."""
    if adapters_of(model):
        return reference(model, c, origin)
    return start(c, origin)[0].requires_grad_(False)


@torch.no_grad()
def frozen_logp(model, tokens, mask, frozen):
    """log π_ref of every scored token.   [B, T]"""
    return token_logprobs(frozen, tokens, mask)


LOSSES["implicit"] = implicit
FACTS["ref_logp"], FROZEN["ref_logp"] = frozen_logp, as_it_starts
PRESETS["implicit"] = TUNED | dict(loss="implicit")

# === glow: 2601.04992, rows that a pass over the data taught least count more =====================


class Visits(Memory):
    """Each row's mean loss when it was last seen, NaN before: glow's argument `before`."""

    def __init__(self, c, f, model, opt, known):
        self.seen = {}

    def tell(self, rows, batches):
        return {j: self.seen.get(j, math.nan) for j in rows}

    def note(self, rows, facts):
        losses = -facts["logp"].detach().sum(1) / facts["mask"].sum(1)                   # [b]
        self.seen |= zip(rows, losses.tolist())

    def state(self):
        return dict(self.seen)

    def load(self, state):
        self.seen = dict(state)


def glow(logp, mask, before, *, alpha: Positive = 2.0, beta=10.0):
    """GLOW: weight clamp(α (1 - σ(β Δ)), .5, 5),  Δ = a row's mean loss at its last visit - now.

    before [B]: that loss, NaN at the first visit (weight 1). α = 2: Δ = 0 has weight 1. No gradient
    to it.
    """
    now = -(logp * mask).sum(1).detach() / mask.sum(1)                                   # [B]
    w = (alpha * torch.sigmoid(-beta * (before - now))).clamp(0.5, 5.0)
    return -logp * torch.where(before.isnan(), 1.0, w)[:, None]


LOSSES["glow"], MEMORIES["before"] = glow, Visits

# === reweighted: 2502.06733, a batch's rows by their loss =========================================


class Weights(Memory):
    """batch_weights of a step's rows, from their losses before it: reweighted's `weight`."""

    def __init__(self, c, f, model, opt, known):
        self.c, self.how, self.model = c, f.loss.keywords, model

    @torch.no_grad()
    def tell(self, rows, batches):
        losses = []
        for _, tokens, mask, _ in batches(rows):
            with autocast(self.c.device, self.c.dtype):
                losses.append(-token_logprobs(self.model, tokens, mask).sum(1) / mask.sum(1))
        return dict(zip(rows, batch_weights(torch.cat(losses), **self.how).tolist()))


def reweighted(logp, mask, weight, *,
               rule: Literal["linupper", "quadratic", "extremes"] = "linupper",
               spread: Positive = 1.0):
    """Σ_i w_i ℓ_i,  ℓ mean loss of a row, w of batch_weights(rule, spread), mean 1.   -> [B]

    ours: no burn-in (1,000 unweighted steps in the paper)."""
    return -weight * (logp * mask).sum(1) / mask.sum(1)


def batch_weights(losses, *, rule="linupper", spread=1.0):
    """softmax(s/r) over the batch's rows, r the spread, times their number.   losses [B] -> [B]

    l = losses scaled to [-1, 1];  s: linupper min(l + 1, 1) (drop the easy, cap the
    hard);  quadratic 1 - l²; extremes |l|.
    """
    l = 2 * (losses - losses.min()) / (losses.max() - losses.min()).clamp(min=1e-6) - 1
    rules = dict(linupper=(l + 1).clamp(max=1), quadratic=1 - l * l, extremes=l.abs())
    if rule not in rules:
        raise UserError(f"--rule {rule}: choose from {', '.join(rules)}")
    return torch.softmax(rules[rule] / spread, 0) * len(losses)


LOSSES["reweighted"], MEMORIES["weight"] = reweighted, Weights

# === dckd, adpa: 2502.17927, SFT beside the distribution, or the advantage, of a DPO-trained model


def needs_teacher(c, f, ranks):
    """UserError for a checkpoint that the loss reads and that is not named or not there."""
    for key in ("teacher", "other"):
        if key in needs(f.loss):
            path = getattr(c, key)
            if not path:
                raise UserError(f"--loss {c.loss} needs --{key} CHECKPOINT (dpo.py makes such "
                                "ones)")
            find(path, c.config, make=False, option=f"--{key}")


def open_frozen(key, c, origin, model, tok):
    """The checkpoint that --teacher or --other names, with the policy's tokens."""
    path = getattr(c, key)
    net, words = load(checkpoint(find(path, c.config, device=c.device)), c.device)
    if words.tokens != tok.tokens or not isinstance(net, Transformer):
        raise UserError(f"--{key} {path}: need a language model with the tokenizer of {c.init}")
    sizes = net.config.vocab_size, model.config.vocab_size
    if sizes[0] != sizes[1]:
        raise UserError(f"--{key} {path} has a vocabulary padded to {sizes[0]}, {c.init} one to "
                        f"{sizes[1]}: distil from one family")
    return net.requires_grad_(False)


def head_of(net, tokens, mask):
    """What predicts the scored tokens: (hidden [N, D], head [V, D])."""
    return net(tokens)[:, :-1][mask[:, 1:] > 0], net.head


def student_of(model, tokens, mask, frozen):
    """head_of the policy."""
    return head_of(model, tokens, mask)


@torch.no_grad()
def teacher_of(model, tokens, mask, frozen):
    """head_of the frozen model."""
    return head_of(frozen, tokens, mask)


def in_place(x, mask):
    """x [N] of the scored tokens, 0 elsewhere.   [B, T]"""
    zeros = torch.zeros_like(mask[:, 1:])
    return F.pad(zeros.masked_scatter(mask[:, 1:] > 0, x.to(mask)), (1, 0))


def dckd(student, teacher, logp, mask, good, *, lam=1.0):
    """DCKD: NLL of the chosen + λ KL(π_teacher||π) on both sides' tokens.   [B, T]

    ours: all terms are divided by the step's tokens together, here and in adpa."""
    kl = in_place(linear_distill(*student, *teacher), mask)
    return -logp * (good[:, None] > 0) + lam * kl


def adpa(student, teacher, other, logp, mask, good, *, gamma=1.0):
    """ADPA: NLL of the chosen - γ Σ_a π(a) [log π_dpo(a) - log π_start(a)] on own samples: KL(π||
    π_start) - KL(π||π_dpo).   [B, T]

    teacher: the DPO-trained model, other: its own start."""
    gain = (linear_distill(*student, *other, "reverse_kl")
            - linear_distill(*student, *teacher, "reverse_kl"))                          # [N]
    return torch.where(good[:, None] > 0, -logp, -gamma * in_place(gain, mask))


LOSSES["dckd"], LOSSES["adpa"] = dckd, adpa
FACTS["student"] = student_of
FACTS["teacher"], FROZEN["teacher"] = teacher_of, partial(open_frozen, "teacher")
FACTS["other"], FROZEN["other"] = teacher_of, partial(open_frozen, "other")
CHECKS["teacher"] = needs_teacher
PRESETS["dckd"] = PAIRED | dict(feedback="both", loss="dckd")
PRESETS["adpa"] = PAIRED | dict(feedback="sampled", loss="adpa")

# === both, chosen, sampled: 2502.17927, the rows of pairs that are distilled on ===================


def both(c, tok, first, generator):
    """Both sides of the pairs, good 1.0 and 0.0."""
    rows, numbers = [], []
    for r in pair_ids(c, tok):
        rows += [(r["prompt"], r["chosen"]), (r["prompt"], r["rejected"])]
        numbers += [dict(good=1.0), dict(good=0.0)]
    return rows, numbers


def chosen(c, tok, first, generator):
    """The pairs' chosen sides."""
    found = pair_ids(c, tok)
    return [(r["prompt"], r["chosen"]) for r in found], [dict(good=1.0) for _ in found]


def sampled(c, tok, first, generator):
    """The chosen sides, and for each of their prompts a sample of the model as it starts (good
    0.0)."""
    data, infos = chosen(c, tok, first, generator)
    model, _ = first()
    new = tasks.room([len(p) for p, _ in data], tasks.of_run(c).max_new, c.context)
    data = [(p, y) for p, y in data if len(p) + new <= c.context]        # few prompts are too long
    infos = infos[:len(data)]
    for i in range(0, len(data), 512):
        part = [p for p, _ in data[i:i + 512]]
        roll = generate(model, part, new, generator=generator)
        ids = [t[m > 0].tolist() for t, m in zip(roll.tokens, roll.mask)]
        infos += [dict(good=0.0) for _ in part]
        data = data + list(zip(part, ids))
    return data, infos


FEEDBACK["both"], FEEDBACK["chosen"], FEEDBACK["sampled"] = both, chosen, sampled
HELD["both"] = HELD["chosen"] = HELD["sampled"] = held_pairs
CHECKS["both"] = CHECKS["chosen"] = CHECKS["sampled"] = pairs_are_there

# === aligndistil: 2503.02832, a teacher beyond DPO and its reverse, by as much as they differ =====


@torch.no_grad()
def distance(teacher, other, rows=256):
    """‖p - q‖₁ of two heads' distributions, some rows at a time.   -> [N]"""
    (h, W), (t, U) = teacher, other
    out = [wide(h[:0, 0])]
    for i in range(0, len(h), rows):
        p, q = (torch.softmax(wide(x[i:i + rows] @ head.to(x.dtype).T), -1)
                for x, head in ((h, W), (t, U)))                                         # [n, V]
        out.append((p - q).abs().sum(-1))
    return torch.cat(out)


def aligndistil(student, teacher, other, mask, *, beta: Positive = 0.1, beta2=10.0):
    """AlignDistil:  (β/w) KL(π||softmax(z_dpo + w (z_dpo - z_rev))).

    w = β₂ ‖p_dpo - p_rev‖₁ + .001;  other: a model trained by DPO on the reversed pairs. Both are
    frozen: their mixture is one head of both their widths. Mean over a row's tokens -> [B]"""
    w = beta2 * distance(teacher, other) + 1e-3                                          # [N]
    (h, W), (t, U) = teacher, other
    beyond = torch.cat([(1 + w)[:, None] * h, -w[:, None] * t], 1)                       # [N, D+E]
    kl = linear_distill(*student, beyond.to(h.dtype), torch.cat([W, U], 1), "reverse_kl")
    return in_place(beta / w * kl, mask).sum(1) / mask.sum(1)


LOSSES["aligndistil"] = aligndistil
PRESETS["aligndistil"] = PAIRED | dict(feedback="chosen", loss="aligndistil")

# === lora, bone, bat: 2106.09685, 2409.15371, adapters of model.py, merged when saved =============
# bone: one block a layer, added to all columns; bat: one a row of blocks, guided by the weights.


def frozen_layers(c, f, ranks):
    """UserError if adapters freeze the layers that --store trains."""
    if c.store != "float32":
        raise UserError(f"--store {c.store} trains the layers that --peft {c.peft} freezes: choose "
                        "one")
    check_adapters(c, c.init)


CHECKS["lora"] = CHECKS["bone"] = CHECKS["bat"] = frozen_layers
PRESETS["lora"] = dict(peft="lora", lr=2e-3)
PRESETS["bone"] = dict(peft="bone", lr=1e-3)             # lr ours, as bat's
PRESETS["bat"] = dict(peft="bat", lr=1e-3)

# === loram: 2502.13533, LoRA trained on a pruned model, used on the whole one =====================


def loram(model, generator, *, rank: Count = 8, alpha=0.0, ratio: Fraction = 0.5, first=0, last=0):
    """LoRAM: LoRA trained on a model pruned by `ratio` (neurons of the MLP, groups of heads that
    share keys; by their weights' norm), then used on the whole one. first, last: layers left whole
    (4 and 2 for the paper's 70B). recover() brings the adapters back."""
    if not 0 <= ratio < 1:
        raise UserError(f"--ratio {ratio}: expected a share from 0 up to 1")
    if model.config.moe or any(isinstance(m, PackedLinear) for m in model.modules()):
        raise UserError("--peft loram prunes dense float layers: this checkpoint has experts or "
                        "packed ones")
    model.kept = kept_units(model, ratio, first, last)
    replace_linears(model, lambda name, layer: pruned(layer, *model.kept.get(name, (None, None))))
    return lora(model, generator, rank=rank, alpha=alpha)


def kept_units(model, ratio, first=0, last=0):
    """{layer's name: (rows kept, columns kept)}, None for all: what structured pruning by norm
    leaves.

    A neuron is a row of gate and up and a column of down; a group, the rows of one key head in k
    and v, of the query heads that share it in q, and their columns in o.
    """
    c, out = model.config, {}
    group, hd = c.num_attention_heads // c.num_key_value_heads, c.head_dim
    for i, layer in list(enumerate(model.layers))[first:max(0, len(model.layers) - last)]:
        att, mlp = layer.self_attn, layer.mlp
        gate, up, down = (x.weight for x in (mlp.gate_proj, mlp.up_proj, mlp.down_proj))
        size = gate.norm(dim=1) * up.norm(dim=1) * down.norm(dim=0)
        neurons = size.topk(max(1, round(len(size) * (1 - ratio)))).indices.sort()[0]
        norms = att.v_proj.weight.view(c.num_key_value_heads, -1).norm(dim=1)
        heads = norms.topk(max(1, round(len(norms) * (1 - ratio)))).indices.sort()[0]
        keys = (heads[:, None] * hd + torch.arange(hd, device=heads.device)).flatten()
        queries = heads[:, None] * group * hd + torch.arange(group * hd, device=heads.device)
        queries = queries.flatten()
        rows = dict(q_proj=(queries, None), k_proj=(keys, None), v_proj=(keys, None),
                    o_proj=(None, queries))
        out |= {f"layers.{i}.self_attn.{k}": v for k, v in rows.items()}
        rows = dict(gate_proj=(neurons, None), up_proj=(neurons, None), down_proj=(None, neurons))
        out |= {f"layers.{i}.mlp.{k}": v for k, v in rows.items()}
    return out


def pruned(linear, rows, cols):
    """The layer without the outputs and inputs that are not kept."""
    W, b = linear.weight.detach(), linear.bias
    if rows is not None:
        W, b = W[rows], None if b is None else nn.Parameter(b.detach()[rows])
    return linear_of(W if cols is None else W[:, cols], b)


def linear_of(W, bias):
    """An nn.Linear of a copy of this weight, and this bias."""
    out = nn.Linear(W.size(1), W.size(0), bias is not None, device="meta")
    out.weight, out.bias = nn.Parameter(W.detach().clone()), bias
    return out


def recover(small, whole):
    """LoRAM's recovery: the adapters of a pruned model on the whole one, 0 where rows or columns
    were cut."""
    adapters = {n: m for n, m in small.named_modules() if isinstance(m, LoRA)}

    def put(name, layer):
        trained = adapters[name]
        rows, cols = (slice(None) if x is None else x for x in small.kept.get(name, (None, None)))
        out = LoRA(layer, len(trained.A), trained.scale * len(trained.A), torch.Generator())
        with torch.no_grad():
            out.A.zero_()[:, cols] = trained.A
            out.B[rows] = trained.B
        return out
    return replace_linears(whole.requires_grad_(False), put)


PEFT["loram"], WHOLE["loram"], CHECKS["loram"] = loram, recover, frozen_layers
PRESETS["loram"] = dict(peft="loram", lr=2e-3)

# === qat: 2509.22935, weights rounded in the last steps of training ===============================


def layers_alone(c, f, ranks):
    """UserError for what --linear and --prune do not go with."""
    rows = [f"--linear {c.linear}"] * (c.linear != "plain")
    for row in [*rows, *[f"--prune {c.prune}"] * (c.prune != "none")]:
        if ranks > 1:
            raise UserError(f"{row} runs on one rank: start it without torchrun")
        for key, usual in (("peft", "full"), ("store", "float32"), ("compile", False)):
            if getattr(c, key) != usual:
                raise UserError(f"{row} and --{key} {getattr(c, key)} do not go together: leave "
                                "one out")


def in_blocks(model, make):
    """make(layer) in the place of every linear layer of the blocks; UserError for packed ones."""
    if any(isinstance(m, PackedLinear) for m in model.modules()):
        raise UserError("packed layers are frozen: start from the checkpoint that was compressed")
    return replace_linears(model, lambda name, layer: make(layer))


def saved_loss(c, net, tok, held_out):
    """The loss of what the checkpoint holds: rounded weights, or the float32 ones."""
    return dict(saved_loss=evaluate(net, tok, held_out["val"], c)["loss"])


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
    """A linear layer that rounds its weight to `bits` while `rounding` is true; saved rounded."""

    def __init__(self, linear, bits=4):
        super().__init__()
        self.weight, self.bias, self.bits, self.rounding = linear.weight, linear.bias, bits, False

    def forward(self, x):
        W = fake_quant(self.weight, self.bits) if self.rounding else self.weight
        return F.linear(x, W, self.bias)

    def merged(self):
        """The plain linear layer with the rounded weight."""
        return linear_of(fake_quant(self.weight.detach(), self.bits), self.bias)


def qat(model, generator, *, bits: Range("[1, 8]") = 4, fraction: Range("[-1, 1]") = 0.0,
        fuse=True):
    """Quantisation-aware training: weights rounded to `bits` (1-8), a scale an output, in the last
    `fraction` of the steps (0: the paper's optimum for these tokens; -1: never); saved rounded.

    fuse: the cooldown of --schedule wsd lasts as long."""
    if -1 < fraction < 0:
        raise UserError(f"--fraction {fraction}: expected 0 to 1, or -1 for never")
    return in_blocks(model, lambda layer: QATLinear(layer, bits))


LINEARS["qat"], CHECKS["qat"], REPORTS["qat"] = qat, layers_alone, saved_loss
PRESETS["qat"] = dict(linear="qat", schedule="wsd")

# === qat_share: 2509.22935, how many of the steps to round in =====================================


def qat_fraction(N, D, bits, a=6.7297):
    """Compute-optimal QAT: the best share of D training tokens to round N weights in.

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


class Rounding(Memory):
    """Which steps round the weights: the last share of them; the cooldown may last as long."""

    def __init__(self, c, f, model, opt, known):
        how, steps = f.linear.keywords, known["steps"]
        self.layers = [m for m in model.modules() if isinstance(m, QATLinear)]
        self.share = qat_share(model, how["fraction"], steps * known["tokens"])
        self.first = steps - max(1, round(self.share * steps)) if self.share else steps + 1
        self.fused = self.share and how["fuse"] and c.schedule == "wsd"
        if self.share:
            print(f"  weights of {how['bits']} bits from step {self.first + 1} on "
                  f"({self.share:.1%})", flush=True)

    def schedule(self, schedule):
        return partial(schedule, cooldown=self.share) if self.fused else schedule

    def begin(self, step):
        for layer in self.layers:
            layer.rounding = step >= self.first

    def report(self):
        return dict(quantised=self.share)


MEMORIES["qat"] = Rounding

# === halo: 2501.02625, all three products of a linear layer in a format, its operands rotated =====

TOKENS = 128                                       # of a block of rotated tokens: ours


def product(a, b, q):
    """q(a) q(b)^T: both are rounded along the dimension that is summed.   a [M, K], b [N, K] -> [M,
    N]"""
    return q(a) @ q(b).mT


def turn_tokens(x, n):
    """x [N, m] with its tokens rotated in blocks of n, after zeros up to whole blocks; its own
    inverse."""
    return rotate(F.pad(x, (0, 0, 0, -len(x) % n)).mT, n).mT


class Halo(torch.autograd.Function):
    """halo_product() and its backward."""

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


def halo_product(X, W, *, level=2, format="int8"):
    """HALO, Q a row of ROUNDINGS, by level:   X [N, n], W [m, n] -> [N, m]

    forward 0 Q(X) Q(W)^T;  1, 2 Q(XH) Q(WH)^T.   dX 0, 1 Q(E) Q(W);  2 H^T [Q(HE) Q(W)].   dW
    Q(E)^T Q(X). The paper's choice: 0 or 1 with fp8, 2 with int8. mxfp4 at level 0: MXFP4 with
    nothing done about it.
    """
    return Halo.apply(X, W, level, ROUNDINGS[format])


def flat_product(fn, x, W, bias):
    """fn(X, W) of x [..., n] as rows, in float32 also under autocast, and the bias. -> [..., m]"""
    with torch.autocast(x.device.type, enabled=False):
        y = fn(wide(x).flatten(0, -2), wide(W)).view(*x.shape[:-1], -1)
        return (y if bias is None else y + bias).to(x.dtype)


class HaloLinear(nn.Module):
    """A linear layer by halo_product(), its weight float32; scales are the micro-batch's."""
    of_all_tokens = True                                 # see model.states()

    def __init__(self, linear, level=2, format="int8"):
        super().__init__()
        self.weight, self.bias = linear.weight, linear.bias
        self.product = partial(halo_product, level=level, format=format)

    def forward(self, x):
        return flat_product(self.product, x, self.weight, self.bias)

    def merged(self):
        """The plain linear layer with the master weight."""
        return linear_of(self.weight, self.bias)


def halo(model, generator, *, level: Literal[0, 1, 2] = 2, format: Literal[*ROUNDINGS] = "int8"):
    """HALO: the three products in int8, fp8 or fp6 (or plain mxfp4, float32), rotated: level 0 not,
    1 forward, 2 the input's gradient, too. Saved: the float32 weights."""
    return in_blocks(model, lambda layer: HaloLinear(layer, level, format))


LINEARS["halo"], CHECKS["halo"], REPORTS["halo"] = halo, layers_alone, saved_loss

# === quartet_product: 2505.14669, all three products in MXFP4, with gradients that are unbiased ===


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
    """quartet_product() and its backward."""

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
        H = hadamard(MX_GROUP, E.dtype, E.device)
        R = signs.to(E) * H                      # signs first: after H they change nothing

        def q(a):
            a = F.pad(a, (0, -a.size(1) % MX_GROUP))                                  # whole groups
            return unbiased_mx4((a.unflatten(1, (-1, MX_GROUP)) @ R).flatten(1), g, nearest)
        dX, dW = product(E, w.mT, q), product(E.mT, x.mT, q)
        return rotate(dX * x_in, MX_GROUP), rotate(dW * w_in, MX_GROUP), None, None, None


def quartet_product(X, W, seed=0, *, exponent="quest", backward="stochastic"):
    """Quartet: MXFP4, rotated by H32; QuEST's scale forward, unbiased gradients.

    forward X_q W_q^T, of X H and W H;  M: where they did not clip;  with R = D H, D random signs of
    the seed: dX = (M_X . SR(E R) SR(W_q^T R)^T) H,  dW = (M_W . SR(E^T R) SR(X_q^T R)^T) H.
    exponent quest_floor: the released kernel's. backward nearest: what SR is compared with. ours:
    quest, and the order D H (released: H D, which cannot change a quantiser that is symmetric).
    """
    return Quartet.apply(X, W, exponent, backward == "nearest", seed)


# === quartet: 2505.14669, the layer that trains in MXFP4 ==========================================


class QuartetLinear(nn.Module):
    """A linear layer computed by quartet_product(); its weight stays float32. Each step and each
    forward in it draws anew from the seed (begin), so that a resumed run draws what an
    uninterrupted one does."""
    of_all_tokens = True                                 # see model.states()

    def __init__(self, linear, seed=0, exponent="quest", backward="stochastic"):
        super().__init__()
        grouped(linear.weight)                           # a multiple of 32 inputs
        self.weight, self.bias, self.seed, self.draw = linear.weight, linear.bias, seed, 0
        self.how = dict(exponent=exponent, backward=backward)

    def begin(self, step):
        """Step `step` starts."""
        self.draw = (self.seed * 1_000_003 + step) * 1009

    def forward(self, x):
        self.draw += torch.is_grad_enabled()
        product = partial(quartet_product, seed=self.draw, **self.how)
        return flat_product(product, x, self.weight, self.bias)

    def merged(self):
        """The plain linear layer with the master weight."""
        return linear_of(self.weight, self.bias)


class Draws(Memory):
    """Tells the layers which step begins."""

    def __init__(self, c, f, model, opt, known):
        self.layers = [m for m in model.modules() if isinstance(m, QuartetLinear)]

    def begin(self, step):
        for layer in self.layers:
            layer.begin(step)


def quartet(model, generator, *, exponent: Literal[*EXPONENTS] = "quest",
            backward: Literal["stochastic", "nearest"] = "stochastic"):
    """Quartet: the three products in MXFP4. exponent: of a group, a row of EXPONENTS; backward:
    stochastic, or nearest. Saved: the float32 weights."""
    def make(layer):
        seed = torch.randint(2 ** 31, (), generator=generator).item()
        return QuartetLinear(layer, seed, exponent, backward)
    return in_blocks(model, make)


LINEARS["quartet"], MEMORIES["quartet"] = quartet, Draws
CHECKS["quartet"], REPORTS["quartet"] = layers_alone, saved_loss

# === lost: 2508.02668, layers of low rank and a few dense columns =================================

ACTIVATIONS = dict(silu=F.silu, identity=lambda x: x)


def lost_sizes(n, m, size, columns):
    """LOST's rank and number of dense columns for a layer of n inputs and m outputs, of `size` n m
    parameters in all, to the nearest whole rank: rank (n + m) + columns m. `columns` is their share
    of the inputs."""
    k = round(columns * n)
    return max(1, round((size * n * m - k * m) / (n + m))), k


def lost_start(W, rank, k, generator, start="svd"):
    """LOST's start of a layer drawn as W [m, n]: A [r, n], B [m, r], dense columns [m, k], their
    places [k].

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


def lost_product(x, A, B, columns, where, *, gamma=0.7, phi="silu"):
    """LOST:  y = γ B φ(A x) + (1-γ) W_s x_I,  I fixed.   x [..., n] -> [..., m]

    φ, γ second-hand (reviews of the paper); φ identity: one matrix, which merges."""
    low = F.linear(ACTIVATIONS[phi](F.linear(x, A)), B)
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
        y = lost_product(x, self.A, self.B, self.columns, self.where, **self.how)
        return y if self.bias is None else y + self.bias

    def merged(self):
        """The plain linear layer that computes the same; itself if there is none."""
        if self.how["phi"] != "identity":
            return self
        gamma = self.how["gamma"]
        W = (gamma * self.B @ self.A).index_add(1, self.where, (1 - gamma) * self.columns)
        return linear_of(W, self.bias)


# === lost_model: 2508.02668, a model of such layers, and its checkpoint ===========================


def lost(model, generator, *, size: Range("(0, 1]") = 0.55, columns: Share = 0.05,
         gamma: Share = 0.7, phi: Literal[*ACTIVATIONS] = "silu",
         start: Literal["svd", "random"] = "svd"):
    """LOST: `size` of the parameters, a share `columns` of inputs dense, the rest low rank.

    ours: size, at which a square layer has the rank n/4 and 5 % of the columns. With --phi identity
    a plain checkpoint is saved; with silu, folders that only this run's --resume reads."""
    how = dict(gamma=gamma, phi=phi, start=start)

    def make(layer):
        rank, k = lost_sizes(layer.in_features, layer.out_features, size, columns)
        return LostLinear(layer, rank, k, generator, **how)
    return in_blocks(model, make)


def write_lost(net, tok, folder):
    """save(); layers with φ get a model_type that nothing opens: they are no matrices."""
    save(net, tok, folder)
    if any(isinstance(m, LostLinear) for m in net.modules()):
        path = Path(folder, "config.json")
        config = read_json(path)
        path.write_text(json.dumps(config | dict(model_type=f"lost-{config['model_type']}"),
                                   indent=2))


def nothing_to_cut(c, f, ranks):
    """layers_alone, and UserError with --prune."""
    layers_alone(c, f, ranks)
    if c.prune != "none":
        raise UserError(f"--prune {c.prune} cuts matrices, which --linear lost does not have: "
                        "choose one")


LINEARS["lost"], WRITERS["lost"] = lost, write_lost
CHECKS["lost"], REPORTS["lost"] = nothing_to_cut, saved_loss

# === journey: 2501.12486, when to prune while training: between a quarter and three of the compute


def prune_schedule(progress, sparsity, begin=0.25, end=0.75):
    """s (1 - (1-u)³) after this share of the run's compute, u its share from begin to end; all at
    once where the two are equal. The cube is unverified."""
    if progress < begin or begin == end:
        return sparsity * (progress >= begin)
    u = min(1.0, (progress - begin) / (end - begin))
    return sparsity * (1 - (1 - u) ** 3)


@lru_cache(8)
def compute_clock(sparsity, begin, end, points=20000):
    """The share of the steps that are over at shares 0 … 1 of the compute; a step costs in
    proportion to its density.   -> float64 [points + 1]"""
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


def journey(step, steps, *, sparsity: Fraction = 0.5, begin: Share = 0.25, end: Share = 0.75):
    """The Journey Matters: the smallest weights of each matrix go, between these shares of the
    run's compute, a step costing in proportion to its density; then the mask stays. 0, 0: from the
    first step; 1, 1: after the last. ours: one sparsity for every matrix; only linear layers count
    as compute."""
    if sparsity > 0.999:
        raise UserError(f"--sparsity {sparsity}: expected 0 to 0.999")
    if begin > end:
        raise UserError(f"--begin {begin}: expected 0 to {end}")
    return prune_at(step, steps, sparsity, begin, end)


def arguments_fit(c, f, ranks):
    """layers_alone, and UserError for journey's arguments."""
    layers_alone(c, f, ranks)
    f.prune(0, 1)


PRUNING["journey"], CHECKS["journey"] = journey, arguments_fit

# === masks: 2501.12486, the weights that are left, and their gradients and moments ================


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


@torch.no_grad()
def apply_masks(weights, masks, stacks=()):
    """Zero the pruned weights, and what has their shape in the optimiser's state: its moments.

    stacks: an optim.Optimiser's: of units with a name, and a state of stacked tensors."""
    for name, mask in masks.items():
        weights[name].mul_(mask)
    for stack in stacks if masks else ():
        cut = [masks.get(unit.name) for unit in stack.units]
        if any(mask is None for mask in cut):
            continue
        for x in stack.state.values():
            if torch.is_tensor(x) and x.is_floating_point():
                if x.shape == (len(cut), *cut[0].shape):
                    x.mul_(torch.stack(cut))


class Masks(Memory):
    """The masks of a run's matrices: cut further after each step, and kept."""

    def __init__(self, c, f, model, opt, known):
        self.sparsity, self.steps, self.opt, self.masks = f.prune, known["steps"], opt, {}
        self.matrices = {n: p for n, p in model.named_parameters() if n.endswith("_proj.weight")}

    def backward(self):
        for name, mask in self.masks.items():            # what is pruned is no parameter any more
            if self.matrices[name].grad is not None:
                self.matrices[name].grad.mul_(mask)

    def end(self, step):
        sparsity = self.sparsity(step, self.steps)
        if sparsity:
            self.masks = prune(self.matrices, self.masks, sparsity)
        apply_masks(self.matrices, self.masks, self.opt.stacks)
        return dict(sparsity=sparsity)

    def state(self):
        return dict(self.masks)

    def load(self, state):
        self.masks = {name: mask.to(self.matrices[name].device) for name, mask in state.items()}

    def report(self):
        zeros = sum((p == 0).sum().item() for p in self.matrices.values())
        cuts = sum(self.sparsity(step, self.steps) for step in range(self.steps))
        return dict(sparsity=zeros / sum(p.numel() for p in self.matrices.values()),
                    mean_density=1 - cuts / self.steps)


MEMORIES["journey"] = Masks


if __name__ == "__main__":
    cli(main)
