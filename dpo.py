"""
dpo.py - preference optimisation: from pairs, lists, binary labels, and the policy's own samples.

    python dpo.py                                  # DPO on the world Ring: a minute, base included
    python dpo.py --config simpo,tiny              # any method, small: everything turns
    python dpo.py --init Qwen2.5-0.5B --data pairs.jsonl --lr 1e-6 --micro 4
    python dpo.py --config online --judge out/reward/default  # own pairs, judged by a reward model
    python dpo.py --claim noise --seeds 5          # a paper's claim against its baselines
    python dpo.py --config inpo --eject mine.py    # one method, in a script of its own

Data     a world (ring, the default; toyif), or a JSONL of {"prompt", "chosen", "rejected"}, or for
         kto and bco of {"prompt", "completion", "label"}; one prompt in sixteen is held out.
Letters  B rows, S sides of a row, N = B S, T tokens, K responses of a list, M objectives
Watch    accuracy leaves 0.5 and margin rises. chosen_ratio may FALL: only the difference is
         trained. It frightens without reason while the win rate rises; with a long run, a small
         beta or far-off data it is the way to collapse: then kl runs away too (flex, --sft 0.1 and
         a larger beta hold it: --claim overopt). val_win is against the start's samples, by gold,
         ties half; val_kl is estimated from samples, so near 0 it can be negative.
"""
import contextlib
import hashlib
import math
import time
from collections import Counter
from dataclasses import dataclass
from functools import partial
from itertools import permutations
from typing import Literal

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from tqdm import trange

import kernels
import optim
import sft
from data import prefs, tasks
from data.run import (Count, Fraction, MeanOf, Positive, Range, Run, Share, Training, UserError,
                      batch_indices, cli, in_passes, launch, needs, rank, read_log, refuse_alone,
                      report, share, start_ranks)
from data.stats import auroc
from data.text import CACHE
from model import (PEFT, Work, adapter_readers, adapter_state, all_parts, autocast, check_adapters,
                   clip_gradients, collate, foresee, gathered, generate, load_frozen, open_trained,
                   own_part, passes, peek, reference, save_trained, sequence_score, shard, snapshot,
                   summed, token_logprobs, use)
from optim import cosine, optimiser, set_lr, shares

# --- config ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Config(Training):
    """What every run has; what belongs to a loss or a source is an argument of its function."""
    data: str = "ring"           # a world (ring, toyif), or a JSONL of pairs or labelled responses
    init: str = "base:ring"      # the SFT model: where the policy starts, and the reference
    rows: int = 0                # training pairs (0: 4000 of a world, or the whole file)
    noise: Share = 0.0           # share of a world's training labels that is flipped
    length_bias: float = 0.0     # what a token is worth to a world's annotators
    context: int = 0             # longest pair in tokens (0: the model's)
    loss: str = "dpo"            # which row of LOSSES
    statistic: str = "none"      # which row of STATISTICS: what a loss wants to know of the batch
    source: str = "pairs"        # which row of SOURCES: where the rows come from
    judge: str = "gold"          # which row of JUDGES, or the folder of a reward model
    anchor: str = "start"        # which row of ANCHORS: the model that log-ratios are against
    combine: str = "weighted"    # which row of optim.COMBINE: the gradients of several objectives
    sft: float = 0.0             # weight of the chosen response's mean NLL, beside any loss
    refresh: Count = 1           # steps between fresh rows of a source that samples
    steps: int = 200             # optimizer steps
    batch: Count = 64            # rows per optimizer step
    optimiser: Literal["adamw", "sgd"] = "adamw"  # sgd: where the size of a gradient is the point
    lr: Positive = 5e-5          # peak learning rate, falling by a cosine
    warmup: int = 10             # steps of linear warm-up
    clip: Positive = 1.0         # largest gradient norm
    max_new: int = 0             # longest sample in tokens (0: the task says)
    kl: bool = False             # measure the KL to the start even if the loss reads no reference
    eval_every: Count = 50       # steps between evaluations on held-out prompts
    eval_prompts: Count = 512    # how many of each held-out split
    save_every: Count = 100      # steps between checkpoints


PRESETS = dict(  # sizes and worlds, then arms of claims; learning rates and steps are ours
    tiny=dict(rows=64, steps=4, batch=8, micro=8, lr=3e-4, eval_every=2, eval_prompts=16,
              save_every=2, refresh=2, max_new=12),
    toyif=dict(data="toyif", init="base:toyif"),
    few=dict(rows=300, steps=500, eval_every=25),                # few pairs, looked at often
    short=dict(steps=120, eval_every=120),                       # of forgetting
    plain_sgd=dict(optimiser="sgd", lr=3e-3, clip=1e9, warmup=0),              # ... without Adam
)
CURVES = {"loss": ["loss"],
          "log-ratios to the reference": ["chosen_ratio", "rejected_ratio", "margin"],
          "log-probs": ["chosen_logp", "rejected_logp"], "accuracy": ["accuracy", "val_accuracy"],
          "gold win rate over the start": ["val_win", "ood_win"],
          "KL, nats per response": ["val_kl", "ood_kl"],
          "length, tokens": ["val_length", "ood_length"]}

# --- the loss: one number a row, [B]; the loop takes the step's mean ------------------------------
# What it reads are its positional arguments, by name: chosen_, rejected_, other_ (a side of a row)
# or list_ (all of them, [B, S]), no prefix for the only side, and a row of READS or PASS; any other
# name is a field of the row. EOS is a token of a response like others.

logs = F.logsigmoid


def dpo(chosen_ratio, rejected_ratio, *, beta: Positive = 0.1):
    """DPO, 2305.18290 eq. 7:  -log σ(β h),  h = chosen_ratio - rejected_ratio.   [B], [B] -> [B]"""
    return -logs(beta * (chosen_ratio - rejected_ratio))


def at_start(start):
    """Log-ratios against the model that training starts from."""
    return start


def previous(policy):
    """Log-ratios against the policy as it is when it makes the rows: the last iterate."""
    return policy


# --- facts: what losses, sources and judges ask for by name, made of other facts ------------------


def ref_logps(rows, anchor, logprobs):
    """log π_ref of every token of the rows.   -> [n] a row"""
    return logprobs(rows, anchor)


def gold_score(problems, groups, world):
    """A world's gold reward of every response."""
    return [world.reward(p, y["text"], y["finished"]) for p, ys in zip(problems, groups)
            for y in ys]


SIDES = dict(chosen=0, rejected=1, other=2, list=slice(None))
PASS = ("logps", "mask")                 # of every token of a forward pass, [N, T]
READS = dict(                            # of each side, from a forward pass: [N, T] -> [N]
    logp=lambda logps: logps.sum(-1),                                # Σ log π
    len=lambda mask: mask.sum(-1),                                   # tokens, EOS included
    mean=lambda logps, mask: logps.sum(-1) / mask.sum(-1),           # mean log π of a token
    ratio=lambda logps, ref_logps: (logps - ref_logps).sum(-1))      # Σ log π - log π_ref
FACTS = dict(ref_logps=ref_logps, score=gold_score,                  # what else functions ask for
             anchor=lambda f, known: ask(f.anchor, known))


def part_of(name):
    """"chosen_ratio" or, of the only side, "ratio" -> (0, "ratio"); "good" -> (None, "good")"""
    head, _, tail = name.partition("_")
    if head in SIDES and (tail in READS or tail in PASS):
        return SIDES[head], tail
    return (0 if name in READS or name in PASS else None), name


def fact(name, known):
    """known[name]; what is not known yet is made by READS or FACTS, of what these ask for."""
    if name not in known:
        known[name] = ask((READS if name in READS else FACTS)[name], known)
    return known[name]


def ask(function, known):
    """What a function says of the facts that its positional arguments name."""
    return function(*(fact(name, known) for name in needs(function)))


def asked(f, *functions):
    """All that functions ask for, what these facts are made of, and so on -> {names}"""
    makers = READS | FACTS | dict(compare=f.judge, anchor=f.anchor)
    names = {part_of(name)[1] for function in functions for name in needs(function)}
    more = [makers[name] for name in sorted(names & makers.keys())]
    return names | asked(f, *more) if more else names


def asked_by(c, f):
    """All that a run asks for."""
    more = [EVALUATIONS[x] for x in (c.source, c.judge) if x in EVALUATIONS]
    return asked(f, f.loss, f.statistic, f.source, *more)


# --- judges, sources, and the tables --------------------------------------------------------------
# A problem is {"prompt": text, "ids"}, a response {"ids", "text", "finished"}; its ids end in EOS
# where it ended by itself. A row is {"prompt": ids, "sides": [ids], …what a loss reads}.


def gold(score, *, sharp: Positive = 1.0):
    """Bradley-Terry on a world's gold reward:  P = σ(sharp (s_i - s_j)).   [K] -> [K, K]"""
    return torch.sigmoid(sharp * (score[:, None] - score[None]))


def row(problem, sides, **fields):
    """One row of a problem and some of its responses."""
    return dict(prompt=problem["ids"], sides=[y["ids"] for y in sides], **fields)


def pairs(data):
    """The data's own pairs."""
    return [dict(prompt=r["prompt"], sides=[r["chosen"], r["rejected"]]) for r in data]


def coin(P, generator):
    """The first two responses, the winner drawn with the judge's probability."""
    first = torch.rand((), generator=generator).item() < P[0, 1]
    return (0, 1) if first else (1, 0)


def online(problems, sample, compare, generator):
    """Online DPO (2402.04792): two samples a prompt, the label drawn from the judge's
    probability."""
    return judged(problems, sample(problems, 2), compare, lambda P: (coin(P, generator), {}))


def static(f):
    """Whether a source asks nothing of the policy: then its rows are made once."""
    return not {"sample", "extend"} & set(needs(f.source))


def initial(c, f, make=True):
    """The folder of --init, made if need be; without make the longest context that it has."""
    return sft.find(c.init, c.config, make, seed=c.seed, device=c.device)


# the tables: chapters add their rows
LOSSES = dict(dpo=dpo)
STATISTICS = dict(none=lambda: {})        # a loss reads its own row only
SOURCES = dict(pairs=pairs, online=online)
JUDGES = dict(gold=gold)
ANCHORS = dict(start=at_start, previous=previous)
# What else a chapter brings, by the name that a function asks for: a model, as the function that
# finds it, and a memory between steps, saved with the run (a class with state() and load(state));
MODELS, MEMORIES = dict(start=initial), {}
# by its row: how a source's rows are made, --data opened, the statistic given to a batch, gradients
# other than a mean loss's, what is evaluated beside the win rate; what must be so before a run, and
# the names that a source or statistic gives to a loss.
ROWS, OPEN, WHOLE, BACKWARD, EVALUATIONS = {}, {}, {}, {}, {}
CHECKS, ALONE = {}, {}           # what is asked for and torchrun cannot spread: why
GIVES = dict(none=(), pairs=("chosen", "rejected"), online=("chosen", "rejected"))


# --- rows, one step, evaluation -------------------------------------------------------------------


def make_rows(c, f, known):
    """Rows of the source, with what is frozen about them, such as reference log-probs."""
    rows, logprobs = ROWS[c.source](c, f, known)
    some = met(c, f, rows)
    here = known | dict(rows=some, logprobs=logprobs)
    for name in sorted(asked_by(c, f) & FACTS.keys()):
        if "rows" in needs(FACTS[name]):
            for r, x in zip(some, ask(FACTS[name], here)):
                r[name] = x
    return rows


def measure(c, known, rows):
    """Every side of the rows in one batched forward pass -> known; tokens, mask and logps [N, T];
    the rows' fields: [N, T] of those with a number of each token, else [B] or [B, …]."""
    sides = [(r["prompt"], y) for r in rows for y in r["sides"]]
    tokens, mask = collate(sides, known["tok"].pad or 0, c.device)
    out = known | dict(tokens=tokens, mask=mask, S=len(rows[0]["sides"]),
                       logps=token_logprobs(known["policy"], tokens, mask))
    for key in rows[0].keys() - {"prompt", "sides", "text"}:
        values = [r[key] for r in rows]
        if isinstance(values[0], torch.Tensor):
            out[key] = torch.zeros_like(mask).masked_scatter(mask > 0, torch.cat(values).to(mask))
        else:
            out[key] = torch.tensor(values).to(mask)
    return out


def inputs(names, here):
    """What a loss names of measured rows: facts of a side, or a row's field -> {name: [B, …]}"""
    out = {}
    for name in names:
        side, what = part_of(name)
        out[name] = value = fact(what, here)
        if side is not None:
            out[name] = value.view(-1, here["S"], *value.shape[1:])[:, side]
    return out


def backward(c, f, known, batch, metrics):
    """Gradients of the mean over the step's rows, so that --micro changes nothing -> its value;
    adds what happened to metrics."""
    totals = Counter(loss=0.0)
    for part, weight in passes(torch.arange(len(batch)), c.micro):
        with autocast(c.device, c.dtype):
            here = measure(c, known, [batch[i] for i in part.tolist()])
            loss = f.loss(**inputs(needs(f.loss), here))                                 # [b]
        if c.sft:
            loss = loss - c.sft * inputs(["chosen_mean"], here)["chosen_mean"]
        (loss.sum() * weight / len(batch)).backward()
        if weight:
            totals.update(sums(here) | dict(loss=loss.sum().item() / len(batch)))
    metrics.update(summed(totals))
    return metrics.pop("loss")


@torch.no_grad()
def evaluate(c, f, known, sets, before):
    """Held-out prompts and pairs with the same draws -> {split_key: float}, {split: gold}, samples.

    win: how often the policy's sample has more gold than the start's (before), same prompt and
    draws, ties half; kl: k1 to the start, nats per response."""
    out, golds, samples, world = {}, {}, [], known["world"]
    for split, problems in sets.items():
        draw = partial(known["sample"], generator=torch.Generator().manual_seed(c.seed + 1),
                       counts=Counter())
        ys = [y for y, in draw(problems)]
        rows, n = [row(p, [y]) for p, y in zip(problems, ys)], len(ys)
        if "start" in known:
            mine, ref = (known["logprobs"](rows, known[x]) for x in ("policy", "start"))
            out[f"{split}_kl"] = MeanOf([(a - b).sum().item() for a, b in zip(mine, ref)])
        out[f"{split}_length"] = MeanOf([len(y["ids"]) for y in ys])
        out[f"{split}_truncated"] = 1 - sum(y["finished"] for y in ys) / n
        if world:
            golds[split] = now = gold_score(problems, [[y] for y in ys], world)
            duels = zip(now, before.get(split, now))
            out[f"{split}_gold"] = MeanOf(now)
            out[f"{split}_win"] = MeanOf([(a > b) + 0.5 * (a == b) for a, b in duels])
        here = known | dict(split=split, problems=problems, responses=ys, sample=draw,
                            options=f.source.keywords)
        for name in (c.source, c.judge):
            if name in EVALUATIONS:
                out |= {f"{split}_{k}": x for k, x in ask(EVALUATIONS[name], here).items()}
        samples += [(known["tok"].shown(p, c.chat), y["text"], world.demo(p) if world else "")
                    for p, y in zip(problems[:2], ys)]
    totals, held = Counter(), own_part(known["held"])
    with autocast(c.device, c.dtype), gathered(known["policy"]):
        for i in range(0, len(held), c.micro):
            totals.update(sums(measure(c, known, held[i:i + c.micro])))
    totals = summed(totals)
    if "accuracy" in totals:
        out["val_accuracy"] = totals["accuracy"] / len(known["held"])
    return out, golds, samples


# --- train ----------------------------------------------------------------------------------------


def train(c, f):
    """One run: load, make rows, score, update, log. -> the last evaluation and the start's."""
    start_ranks(c.device)                              # alone without torchrun
    check_files(c, f)
    world = tasks.task(c.data) if c.data in prefs.WORLDS else None
    origin = initial(c, f)                             # made before this run's clock starts
    use(c)
    with Run(c, f, "dpo", CURVES) as run:
        policy, tok, models = open_models(c, f, origin, run)
        whole = shard(policy, c.dtype)                 # over torchrun's ranks
        for model in models.values():
            shard(model, c.dtype)
        longest = policy.config.max_position_embeddings
        context = min(c.context or longest, longest)
        data, held, prompts = OPEN.get(c.source, open_pairs)(c, tok, world, context)
        problems, sets, room = open_problems(c, tok, world, context, longest, data, prompts)
        generator, counts = torch.Generator().manual_seed(c.seed), Counter()
        known = models | dict(
            c=c, f=f, world=world, policy=policy, tok=tok, data=data, held=held, problems=problems,
            context=context, room=room, generator=generator, counts=counts, step=0, stage=0,
            sample=partial(sample, policy, tok, c, room, generator=generator, counts=counts),
            logprobs=partial(response_logprobs, tok, c))
        known["known"] = known                         # for a fact that asks on, as `anchor`
        memories = sorted(MEMORIES.keys() & asked_by(c, f))
        known |= {x: ask(MEMORIES[x], known) for x in memories}
        opt = (optimiser(policy, lr=c.lr) if c.optimiser == "adamw" else torch.optim.SGD(
            [p for p in policy.parameters() if p.requires_grad], c.lr))
        if "start" in models:
            for r, x in zip(held, known["logprobs"](held, models["start"])):
                r["ref_logps"] = x
        rows, fresh = make_rows(c, f, known) if static(f) else None, 0
        c = known["c"] = in_passes(c, len(rows or data), c.batch)
        size = sum(p.numel() for p in policy.parameters()) / 1e6
        run.say(f"{run.folder}: {size:.2f} M parameters, {len(data)} rows of {c.data}, "
                f"{c.computes}, {'with' if 'start' in models else 'without'} a reference")
        outlook(run, known, rows, sets, opt)
        if run.state:
            opt.load_state_dict(run.state.pop("opt"))
            generator.set_state(run.state["rng"])
            counts.update(run.state["counts"])
            for x in memories:
                known[x].load(run.state["memories"][x])
            rows, fresh = rows or run.state["rows"], run.state["fresh"]
            known["stage"], before = run.state["stage"], run.state["before"]
            first = scores = run.state["first"]
        else:
            first, before, samples = evaluate(c, f, known, sets, {})
            run.log(0, **first, show=True)
            scores = first

        for step in run.steps(c.steps):
            # 1. rows ------------------------------------------------------------------------------
            run.phase("rows")
            known["step"] = step
            if rows is None or not static(f) and step - fresh >= c.refresh:
                rows, fresh = make_rows(c, f, known), step
                known["stage"] += 1
            order = batch_indices(len(rows), c.batch, step - fresh, c.seed + known["stage"])
            batch = [rows[i] for i in order.tolist()]
            # 2. score and update ------------------------------------------------------------------
            run.phase("update")
            metrics = Counter()
            if c.statistic in WHOLE:
                batch = WHOLE[c.statistic](c, f, known, batch)
            loss = BACKWARD.get(c.loss, backward)(c, f, known, batch, metrics)
            norm = clip_gradients(policy, c.clip)
            set_lr(opt, c.lr * cosine(step, c.steps, c.warmup))
            opt.step()
            opt.zero_grad()
            # 3. log -------------------------------------------------------------------------------
            run.log(step + 1, loss=loss, **means(metrics, len(batch)), norm=norm,
                    **{k: n for k, n in counts.items() if n})
            if (step + 1) % c.eval_every == 0 or step + 1 == c.steps:
                run.check(step + 1, policy)
                scores, _, samples = evaluate(c, f, known, sets, before)
                run.log(step + 1, **scores, show=True)
            if (step + 1) % c.save_every == 0 or step + 1 in (c.steps, c.stop):
                net, state = whole(), opt.state_dict()           # every rank takes part
                run.save(step + 1, lambda path: save_trained(net, tok, path, c, origin), opt=state,
                         adapter=adapter_state(net), rng=generator.get_state(),
                         counts=dict(counts), stage=known["stage"],
                         memories={x: known[x].state() for x in memories},
                         rows=None if static(f) else rows, fresh=fresh, first=first, before=before)
        if c.stop and c.stop < c.steps:
            run.say(f"  paused at step {c.stop}: the same command with --resume, without --stop, "
                    "goes on")
            return scores
        if run.state and run.start >= c.steps:                         # resumed after its last step
            scores, _, samples = evaluate(c, f, known, sets, before)
        if counts:
            run.say("  samples: " + ", ".join(f"{n} {what}" for what, n in counts.items() if n))
        report(run, first, scores, samples)
        peak = max((r["val_gold"] for r in read_log(run.folder) if "val_gold" in r), default=0.0)
        return run.finish(**scores, **{f"start_{k}": x for k, x in first.items()}, val_peak=peak)


AXES = dict(loss=LOSSES, statistic=STATISTICS, source=SOURCES, judge=JUDGES, anchor=ANCHORS,
            combine=optim.COMBINE, peft=PEFT, kernels=kernels.MODES)


def main(argv=None):
    """python dpo.py …: see the docstring above, or --help."""
    return launch("dpo", Config, PRESETS, AXES, __doc__, checked, argv, readers, ranks=True)


# === lora: 2106.09685, adapters in the place of all weights; their base is the reference ==========

PRESETS["lora"] = dict(peft="lora", lr=2e-4)                 # ours: four times full training's

# === checks: what can be told before a run ========================================================


def readers(c, f):
    """{field: (whether this run reads it, what does)} of the fields that not every run reads."""
    found, world = asked_by(c, f), c.data in prefs.WORLDS
    return dict(
        statistic=(set(GIVES[c.statistic]) & set(needs(f.loss)),
                   "losses that read it: beta_dpo, bco, kto"),
        noise=(world, "a world's labels: --data ring or toyif"),
        length_bias=(world, "a world's labels: --data ring or toyif"),
        judge=("compare" in found, "sources that have responses judged"),
        combine=(c.loss in BACKWARD, "--loss objectives"),
        refresh=(not static(f), "sources that sample"), **adapter_readers(c),
        anchor=("anchor" in found, "losses that read a reference"),
        compile=(False, "sft.py, ppo.py and grpo.py"),
        **tasks.file_readers(c, pairs=True))


def checked(c, f):
    """train(), after check(): a script of one method has nothing that does not go together."""
    start_ranks(c.device)
    check(c, f)
    return train(c, f)


def check_files(c, f):
    """UserError for data, folders and sizes that are not as they must be, before anything is
    made."""
    if c.data not in prefs.WORLDS and c.source not in OPEN:
        prefs.check_pairs(c.data, val=c.val)
    for name in sorted(MODELS.keys() & asked_by(c, f)):
        MODELS[name](c, f, make=False)
    if c.max_new >= (most := initial(c, f, make=False)):
        raise UserError(f"--max_new {c.max_new} does not fit the {most} tokens of {c.init}")


def check(c, f):
    """UserError for rows of the config that do not go together."""
    world = c.data in prefs.WORLDS
    check_names(c, f)
    refuse_alone(c, asked_by(c, f), ALONE)
    check_adapters(c, c.init)
    for name in (c.loss, c.statistic, c.source, c.judge, c.anchor):
        if name in CHECKS:
            CHECKS[name](c, f)
    if not world and (c.noise or c.length_bias):
        raise UserError("--noise and --length_bias are of a world's labels: a file has its own")
    found = asked_by(c, f)
    if not world and "compare" in found and "world" in asked(f, f.judge):
        raise UserError(f"--judge {c.judge}: {c.data} has no gold reward; name a reward model's "
                        "folder, or take --judge cdr")
    if not world and "world" in asked(f, f.source):
        raise UserError(f"--source {c.source} reads demonstrations or gold: take a world, --data "
                        "ring or toyif")
    frozen = [FACTS[x] for x in found & FACTS.keys() if "rows" in needs(FACTS[x])]
    if static(f) and "policy" in asked(f, *frozen):
        raise UserError(f"--source {c.source}: its rows are made once, so there is no previous "
                        "policy; use --anchor start, and a loss without one")
    if c.sft and not any(name.startswith("chosen") for name in needs(f.loss)):
        raise UserError(f"--sft {c.sft}: --loss {c.loss} has no chosen response; leave it at 0")


def check_names(c, f):
    """UserError if the loss or the statistic reads what neither source nor statistic gives."""
    fields = {name for given in GIVES.values() for name in given}
    here = {*GIVES[c.source], *GIVES[c.statistic]}
    for axis, function in (("loss", f.loss), ("statistic", f.statistic)):
        sides = {name.partition("_")[0] for name in needs(function) if part_of(name)[0] is not None}
        wanted = sides & (SIDES.keys() - {"list"}) | asked(f, function) & fields
        for name in sorted(wanted - here):
            givers = [row for row, names in GIVES.items() if name in names]
            usual = [p for p, keys in PRESETS.items() if keys.get(axis) == getattr(c, axis)]
            raise UserError(f"--{axis} {getattr(c, axis)} reads {name}: neither --source "
                            f"{c.source} nor --statistic {c.statistic} gives it, but "
                            f"{' or '.join(givers)}"
                            + "".join(f"; try --config {x}" for x in usual[:1]))


# === opening: models, pairs and prompts ===========================================================


def open_models(c, f, origin, run):
    """(policy, tokenizer, {name: each other model that the run asks for})."""
    policy, tok = open_trained(c, f.peft, origin, run.last, (run.state or {}).get("adapter", ()))
    models, found = {}, asked_by(c, f)
    if c.kl or "anchor" in found:                      # then the KL is measured to the start, too
        found |= {"start"}
    for name in sorted(MODELS.keys() & found):
        path = MODELS[name](c, f)
        if path == origin:
            models[name] = reference(policy, c, origin)
            continue
        models[name], other = load_frozen(path, c)
        if other.tokens != tok.tokens:
            raise UserError(f"{path} and --init {c.init} have different tokenizers: both must read "
                            "the same ids")
    return policy, tok, models


def open_pairs(c, tok, world, context):
    """(pairs as ids, held-out rows, a file's held-out prompts) of --data."""
    if world:
        train = world.pairs(c.rows or 4000, 1000 + c.seed, noise=c.noise, length_bias=c.length_bias)
        val = world.pairs(min(600, 2 * c.eval_prompts), c.seed, "val")
    else:
        train, sets = prefs.pair_sets(c.data, c.rows, **tasks.reading(c))
        val = sets["val"]
    train = prefs.encode_pairs(train, tok, context, "training pairs", c.chat)
    val = prefs.encode_pairs(val, tok, context, "val pairs", c.chat)
    return train, pairs(val), [r["text"] for r in val]


def open_problems(c, tok, world, context, longest, data, prompts):
    """(training problems, {split: held-out problems}, the longest sample that fits them) of a
    world, or of a file's pairs."""
    if world:
        problems = world.problems("train", 4096, 1000 + c.seed)
        sets = {x: world.problems(x, c.eval_prompts, c.seed) for x in tasks.held_out(c.data)}
    else:
        problems = prefs.prompts_of([r["text"] for r in data if "chosen" in r])
        sets = dict(val=prefs.prompts_of(prompts)[:c.eval_prompts])
    wish, most = world.max_new if world else 128, longest if c.max_new else context
    room, problems, sets = tasks.fitting(c, tok, problems, sets, wish, most)
    for problem in [*problems, *(problem for held in sets.values() for problem in held)]:
        problem["ids"] = tok.prompt(problem, c.chat)
    return problems, sets, room


# === models: what they sample, log-probs without gradient, and what the log says of them ==========


@torch.no_grad()
def sample(policy, tok, c, room, problems, k=1, model=None, *, generator, counts, **how):
    """k responses a problem of the policy, or of another model -> [[response]]; counts them, and
    those that were cut off. At most 4,096 at a time."""
    prompts, size, out = [p["ids"] for p in problems], max(1, 4096 // k), []
    for i in range(0, len(prompts), size):
        with autocast(c.device, c.dtype):
            roll = generate(model or policy, prompts[i:i + size], room, samples=k, slots=c.slots,
                            generator=generator, **how)
        out += [dict(ids=t[m > 0].tolist(), text=tok.decode(text), finished=done)
                for t, m, text, done
                in zip(roll.tokens, roll.mask, roll.completions(), roll.finished.tolist())]
    counts["sampled"] += len(out)
    counts["truncated"] += sum(not y["finished"] for y in out)
    return [out[i:i + k] for i in range(0, len(out), k)]


def outlook(run, known, rows, sets, opt):
    """Say what the run will hold: a micro-batch of all sides of the longest rows, and samples."""
    c, policy = known["c"], known["policy"]
    others = {id(x): x for x in known.values() if isinstance(x, torch.nn.Module)}
    others.pop(id(policy))
    longest = max((len(r["prompt"]) + len(y) for r in rows or () for y in r["sides"]), default=0)
    held = max(map(len, sets.values()))
    prompts = [p["ids"] for some in (known["problems"], *sets.values()) for p in some]
    work = Work(c.micro, longest or known["context"], c.batch,
                sides=len(rows[0]["sides"]) if rows else 2, knob="--eval_prompts",
                sampled=min(4096, held if rows else max(held, 2 * c.batch * c.refresh),
                            c.slots or 4096),
                slots=max(map(len, prompts)) + known["room"], recompute=c.recompute)
    foresee(run, c, work, [policy], list(others.values()), optim.state_bytes(opt))


@torch.no_grad()
def response_logprobs(tok, c, rows, model):
    """A model's log-probs of a row's response tokens, side after side -> [n] a row, on the CPU"""
    out, mine = [], own_part(rows)
    bar = dict(desc="log-probs of pairs", delay=5, disable=rank() > 0 or None, leave=False)
    with autocast(c.device, c.dtype), gathered(model):
        for i in trange(0, len(mine), c.micro, **bar):
            part = mine[i:i + c.micro]
            here = measure(c, dict(policy=model, tok=tok), part)
            flat = here["logps"][here["mask"] > 0].cpu()
            out += flat.split([sum(map(len, r["sides"])) for r in part])
    return all_parts([x.clone() for x in out])


@torch.no_grad()
def sums(here):
    """Sums over rows for the log: log-probs and log-ratios of both sides apart (of rows with one
    side: of the good and of the others), pairs in the right order."""
    S, names = here["S"], ["logp", "len", *["ratio"] * ("ref_logps" in here)]
    score = {name: fact(name, here).view(-1, S) for name in names}                       # [B, S]
    good = here["good"] if "good" in here else torch.ones_like(score["logp"][:, 0])      # [B]
    out = {}
    for side, i, weight in (("chosen", 0, good),
                            ("rejected", min(S, 2) - 1, 1 - good if S == 1 else good)):
        out |= {f"{side}_{k}": (x[:, i] * weight).sum().item() for k, x in score.items()}
        out[f"{side}_n"] = weight.sum().item()
    if S > 1:
        by = score["ratio"] if "ratio" in score else score["logp"] / score["len"]
        out["accuracy"] = ((by[:, 0] > by[:, 1]) + 0.5 * (by[:, 0] == by[:, 1])).sum().item()
    return out


def means(totals, B):
    """A step's metrics, of the sums over its B rows; it may have no binary label of a kind."""
    out = {}
    for key, x in totals.items():
        n = totals.get(f"{key.partition('_')[0]}_n", B)
        if n and not key.endswith("_n"):
            out[key] = x / n
    if "accuracy" in out and "chosen_ratio" in out:
        out["margin"] = out["chosen_ratio"] - out["rejected_ratio"]
    return out


# === once: rows of the data, and their reference log-probs, which are kept on disk ================


def once(c, f, known):
    """Rows that are made once, and log-probs of models that do not move, kept on disk."""
    return ask(f.source, dict(known)), partial(cached_logprobs, known["tok"], c)


def met(c, f, rows):
    """The rows that a run of less than a pass comes to; all of a longer one, or where rows are made
    again."""
    steps = in_passes(c, len(rows), c.batch).steps
    if not static(f) or steps * c.batch >= len(rows):
        return rows
    picked = {i for step in range(steps)
              for i in batch_indices(len(rows), c.batch, step, c.seed).tolist()}
    return [rows[i] for i in sorted(picked)]


def cached_logprobs(tok, c, rows, model):
    """response_logprobs, kept under data/cache by a hash of all that they depend on: the same rows,
    weights and precision are scored once, ever."""
    if not rows:                                                             # of a run of 0 steps
        return []
    mark = hashlib.sha256((repr([(r["prompt"], r["sides"]) for r in rows]) + c.dtype).encode())
    for name, p in model.state_dict().items():
        p = p.full_tensor() if hasattr(p, "full_tensor") else p              # spread over ranks
        mark.update(name.encode() + p.cpu().contiguous().view(torch.uint8).numpy().tobytes())
    path, found = CACHE / f"reference-{mark.hexdigest()[:16]}.safetensors", None
    with contextlib.suppress(OSError, SafetensorError):                      # absent, or broken
        found = load_file(path)["logp"] if rank() == 0 else None
    if (found := share(found)) is not None:
        return list(found.split([sum(map(len, r["sides"])) for r in rows]))
    out = response_logprobs(tok, c, rows, model)
    if rank():
        return out
    with contextlib.suppress(OSError, SafetensorError):                      # it costs only time
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_suffix(f".{time.monotonic_ns()}.tmp")
        save_file(dict(logp=torch.cat(out)), part)
        part.replace(path)
    return out


ROWS["pairs"] = once


# === samples: fresh rows of the policy's own responses, which a judge compares ====================


def fresh_rows(c, f, known, many=1):
    """Rows of fresh problems, those that can be trained on; many come of a problem."""
    wanted = min(4000, math.ceil(c.batch * c.refresh / many))
    picked = batch_indices(len(known["problems"]), wanted, known["stage"], c.seed).tolist()
    problems = [known["problems"][i] for i in picked]
    rows = ask(f.source, known | dict(problems=problems))
    return usable(rows, c, known["context"], known["counts"]), known["logprobs"]


def usable(rows, c, context, counts):
    """Rows without those whose pair (of a ranking: all) is of equal sides, with an empty one, or
    longer than the context; these are counted. UserError if none is left."""
    kept = []
    for r in rows:
        sides = [tuple(y) for y in r["sides"]]
        first = sides if "rates" in r else sides[:2]
        why = ("empty" if not all(sides) else
               "identical" if len(sides) > 1 and len(set(first)) == 1 else
               "long" if len(r["prompt"]) + max(map(len, sides)) > context else "")
        if why:
            counts[why] += 1
        else:
            kept.append(r)
    if not kept:
        raise UserError(f"--source {c.source}: no row is left to train on ({dict(counts)}); if "
                        "samples are identical the policy has collapsed: lower --lr")
    return kept


@torch.no_grad()
def compare(f, known, problems, groups):
    """The judge's P for each problem's responses -> [[K, K]] in float64: P[i, j], the probability
    that i is preferred to j."""
    here, sizes = known | dict(problems=problems, groups=groups), [len(ys) for ys in groups]
    scores = {name: torch.tensor(ask(FACTS[name], here), dtype=torch.float64).split(sizes)
              for name in needs(f.judge) if name in FACTS}
    out = []
    for i, (problem, ys) in enumerate(zip(problems, groups)):
        own = {name: score[i] for name, score in scores.items()}
        out.append(ask(f.judge, dict(world=known["world"], problem=problem, group=ys) | own))
    return out


def texts_of(pair):
    """An encoded pair as a problem and its two responses."""
    problem = dict(prompt=pair["text"]["prompt"], ids=pair["prompt"])
    return problem, [dict(ids=pair[side], text=pair["text"][side],
                          finished=pair["text"].get(f"{side}_finished", True))
                     for side in ("chosen", "rejected")]


def judged(problems, groups, compare, choose):
    """Rows of what choose(P) picks from each problem's responses: (indices of the sides, fields),
    or None."""
    out = []
    for problem, ys, pick in zip(problems, groups, map(choose, compare(problems, groups))):
        if pick:
            sides, fields = pick
            out.append(row(problem, [ys[i] for i in sides], **fields))
    return out


def extremes(P, least=0.0):
    """The best and the worst by mean win rate, against all with themselves at a half; None if the
    rates differ by less than `least` (SPPO, DNO)."""
    win = P.mean(1)
    a, b = win.argmax().item(), win.argmin().item()
    if win[a] - win[b] >= least:
        return (a, b), dict(chosen_win=win[a].item(), rejected_win=win[b].item())


FACTS["compare"] = lambda f, known: partial(compare, f, known)
ROWS["online"] = fresh_rows


# === statistics: of a whole batch, before its step ================================================


@torch.no_grad()
def with_statistic(c, f, known, batch):
    """The batch's rows with what the statistic says of all of them, without gradient."""
    names = [x for x in needs(f.statistic) if part_of(x)[0] is not None or x in batch[0]]
    parts, mine = [], own_part(batch) if names else []
    with autocast(c.device, c.dtype), gathered(known["policy"]):
        for i in range(0, len(mine), c.micro):
            part = inputs(names, measure(c, known, mine[i:i + c.micro]))
            parts.append({name: x.cpu() for name, x in part.items()})
    here, parts = known | dict(batch=batch), all_parts(parts)
    for name in names:
        here[name] = torch.cat([part[name] for part in parts]).to(c.device)              # [B]
    fields = ask(f.statistic, here)                                                      # {: [B]}
    values = zip(*(x.tolist() for x in fields.values()))
    return [r | dict(zip(fields, own)) for r, own in zip(batch, values)]


# === cdpo, rdpo: Mitchell's note, 2403.00409, labels that are wrong with probability e ============


def cdpo(chosen_ratio, rejected_ratio, *, beta: Positive = 0.1, flip: Range("[0, 0.5)") = 0.1):
    """Conservative DPO:  -(1-e) log σ(βh) - e log σ(-βh);  stationary at βh = log((1-e)/e)."""
    z = beta * (chosen_ratio - rejected_ratio)
    return -(1 - flip) * logs(z) - flip * logs(-z)


def rdpo(chosen_ratio, rejected_ratio, *, beta: Positive = 0.1, flip: Range("[0, 0.5)") = 0.1):
    """Robust DPO, 2403.00409:  [-(1-e) log σ(βh) + e log σ(-βh)] / (1-2e), DPO in expectation.

    Unbounded below: it never stops pushing, and its own value means nothing.
    """
    z = beta * (chosen_ratio - rejected_ratio)
    return (-(1 - flip) * logs(z) + flip * logs(-z)) / (1 - 2 * flip)


LOSSES["cdpo"], LOSSES["rdpo"] = cdpo, rdpo
PRESETS["flips20"] = dict(noise=0.2, flip=0.2)         # arms of the claim `noise`: told the rate
PRESETS["flips40"] = dict(noise=0.4, flip=0.4)


# === ipo, ipo_norm: 2310.12036, squared distance of the margin to 1/(2 tau); of means =============


def ipo(chosen_ratio, rejected_ratio, *, tau: Positive = 0.1):
    """IPO, 2310.12036 eq. 17:  (h - 1/(2τ))²  of sums over tokens."""
    return (chosen_ratio - rejected_ratio - 1 / (2 * tau)) ** 2


def ipo_norm(chosen_ratio, rejected_ratio, chosen_len, rejected_len, *, tau: Positive = 0.1):
    """IPO on log-ratios per token: what its authors confirm that they ran."""
    return ipo(chosen_ratio / chosen_len, rejected_ratio / rejected_len, tau=tau)


LOSSES["ipo"], LOSSES["ipo_norm"] = ipo, ipo_norm


# === dpo_norm: 2411.15124, DPO of log-ratios per token (Tülu 3) ===================================


def dpo_norm(chosen_ratio, rejected_ratio, chosen_len, rejected_len, *, beta: Positive = 1.0):
    """Length-normalised DPO:  -log σ(β (d_w/n_w - d_l/n_l));  β some ten times DPO's."""
    return dpo(chosen_ratio / chosen_len, rejected_ratio / rejected_len, beta=beta)


LOSSES["dpo_norm"] = dpo_norm


# === hinge, rso: 2309.06657, pairs from the estimated optimum, by rejection sampling; a hinge =====


def hinge(chosen_ratio, rejected_ratio, *, gamma=0.05):
    """RSO's hinge-norm:  max(0, 1 - γ h)."""
    return F.relu(1 - gamma * (chosen_ratio - rejected_ratio))


def rewards_of(P):
    """Scores behind P: mean log-odds over the others; exact up to a constant for Bradley-Terry.
    -> [K]"""
    return torch.logit(P, eps=1e-9).mean(1)


def accepted(reward, k, beta, generator, passes=0):
    """RSO's rejection sampling, alg. 1: indices of k of the candidates.   reward [N]

    Passes over the rest: each is accepted with probability exp((r - max of the rest)/β), and
    leaves; the maximum is taken anew before every pass. β -> 0 takes the best in order, β -> ∞
    takes the first ones. passes: stop after so many (0: when there are k); in the first the rest is
    all, so that it is exact.
    """
    rest, out, done = list(range(len(reward))), [], 0
    while rest and len(out) < k and (done < passes or not passes):
        done += 1
        top = max(reward[i] for i in rest)
        u = torch.rand(len(rest), generator=generator).tolist()
        hit = [i for i, x in zip(rest, u) if x < math.exp((reward[i] - top) / beta)]
        out, rest = out + hit, [i for i in rest if i not in hit]
    return out[:k]


def rso(problems, sample, compare, start, generator, *, n: Range("[2, inf)") = 16,
        k: Range("[2, inf)") = 4, beta_rso: Positive = 0.5):
    """RSO: k of the start's n samples accepted in proportion to e^(r/β), paired at random, then
    judged."""
    groups, out = sample(problems, n, model=start), []
    for p, ys, P in zip(problems, groups, compare(problems, groups)):
        kept = accepted(rewards_of(P).tolist(), k, beta_rso, generator)
        kept = [kept[i] for i in torch.randperm(len(kept), generator=generator)]
        out += [row(p, [ys[a], ys[b]] if P[a, b] > 0.5 else [ys[b], ys[a]])
                for a, b in zip(kept[::2], kept[1::2])]
    return out


def rso_rows(c, f, known):
    """RSO makes one pair of every two accepted samples of a prompt."""
    return fresh_rows(c, f, known, max(1, f.source.keywords["k"] // 2))


LOSSES["hinge"], SOURCES["rso"], ROWS["rso"] = hinge, rso, rso_rows
GIVES["rso"] = "chosen", "rejected"
PRESETS["rso"] = dict(loss="hinge", source="rso", refresh=200)


# === exo: 2402.00856, KL between the pair's softmax and smoothed labels ===========================


def exo(chosen_ratio, rejected_ratio, *, beta: Positive = 0.1, flip: Range("(0, 0.5)") = 1e-3):
    """EXO:  KL((q, 1-q) || (1-e, e)),  q = σ(βh)."""
    z = beta * (chosen_ratio - rejected_ratio)
    q = torch.sigmoid(z)
    return q * (logs(z) - math.log(1 - flip)) + (1 - q) * (logs(-z) - math.log(flip))


LOSSES["exo"] = exo


# === flex: 2406.07327, a smaller weight on the rejected side against the drastic drop =============


def flex(chosen_ratio, rejected_ratio, *, beta: Positive = 0.1, beta_minus=0.02):
    """Flex-DPO (3D-properties):  -log σ(β⁺ d_w - β⁻ d_l)."""
    return -logs(beta * chosen_ratio - beta_minus * rejected_ratio)


LOSSES["flex"] = flex


# === fdpo: 2309.16240, another f-divergence's derivative in the log-ratio's place =================


def forward_kl(d, a):
    """-1/u, its exponent stopped at 80."""
    return -torch.exp((-d).clamp(max=80))


def js(d, a):
    """log u/(1+u)."""
    return logs(d)


def alpha_divergence(d, a):
    """(1 - u^-α)/α, its exponent stopped at 80."""
    return -torch.expm1((-a * d).clamp(max=80)) / a


def reverse_kl(d, a):
    """log u: DPO."""
    return d


F_PRIME = dict(forward_kl=forward_kl, js=js, alpha=alpha_divergence, reverse_kl=reverse_kl)


def fdpo(chosen_ratio, rejected_ratio, *, beta: Positive = 0.1,
         divergence: Literal[*F_PRIME] = "js", alpha: Range("(0, 1)") = 0.5):
    """f-DPO:  -log σ(β [f'(u_w) - f'(u_l)]),  u = e^d.

    f': reverse_kl d;  forward_kl -e^-d;  js log σ(d);  alpha (1 - e^-αd)/α, 0 < α < 1.
    """
    prime = F_PRIME[divergence]
    return -logs(beta * (prime(chosen_ratio, alpha) - prime(rejected_ratio, alpha)))


LOSSES["fdpo"] = fdpo


# === rpo: 2405.16436, DPO and a little SFT on the chosen response =================================

PRESETS["rpo"] = dict(loss="dpo", sft=0.005)           # eta 0.005 (there with beta 0.01)


# === madpo: 2510.05342, weights by a judge's margin: hard pairs more, contradicted ones less ======


def margin_weight(margin, strongest=2.0, tau=2.0, sharpness=1.0):
    """MADPO's (c, w):  c = c_min + (c_max - c_min) / (1 + k e^(λ(|m|-τ))),  w = σ(c m)/σ(m), 1 for
    m <= -τ.

    c_min = 1/c_max, k = (c_max - 1)/(1 - c_min), so that c(τ) = 1; above 1 for |m| < τ. 1 for
    c_max = 1.
    """
    if strongest == 1:
        return torch.ones_like(margin), torch.ones_like(margin)
    low = 1 / strongest
    k = (strongest - 1) / (1 - low)
    c = low + (strongest - low) / (1 + k * torch.exp(sharpness * (margin.abs() - tau)))
    return c, torch.where(margin > -tau, torch.exp(logs(c * margin) - logs(margin)), 1.0)


def madpo(chosen_ratio, rejected_ratio, margin, *, beta: Positive = 0.1, strongest=2.0,
          tau: Positive = 6.906755, sharpness=1.0):
    """MADPO:  -w(m) log σ(βh): margin m = r_w - r_l of a judge; its target βh is c(m) m."""
    weight = margin_weight(margin, strongest, tau, sharpness)[1]
    return weight * dpo(chosen_ratio, rejected_ratio, beta=beta)


def preference_odds(P):
    """The judge's log-odds that the first response is the better one."""
    return torch.logit(P[0, 1], eps=1e-9).item()


def margins(data, compare, generator, *, shuffled=False):
    """The data's pairs with the judge's log-odds as `margin`; shuffled, a control: another
    pair's."""
    margin = [preference_odds(P) for P in compare(*zip(*map(texts_of, data)))]
    if shuffled:                                       # is it the information that helps?
        margin = [margin[i] for i in torch.randperm(len(data), generator=generator).tolist()]
    return [r | dict(margin=m) for r, m in zip(pairs(data), margin)]


LOSSES["madpo"], SOURCES["margins"], ROWS["margins"] = madpo, margins, once
GIVES["margins"] = "chosen", "rejected", "margin"
PRESETS["madpo"] = dict(loss="madpo", source="margins")


# === beta_dpo: 2407.08639, beta by the batch's gap; unlikely gaps are dropped =====================


class Gaps:
    """The running mean and std of the batches' gaps, [] before the first one."""

    def __init__(self):
        self.now = []

    def note(self, mean, std, momentum):
        """Count a batch's; ours: the first one's are the beginning (public code: 0). -> both"""
        old = self.now or (mean, std)
        self.now = [momentum * x + (1 - momentum) * y for x, y in zip(old, (mean, std))]
        return self.now

    def state(self):
        return self.now

    def load(self, state):
        self.now = state


def beta_dpo(chosen_ratio, rejected_ratio, beta_now, kept):
    """β-DPO:  -log σ(β_batch h) on the kept pairs; `pace` sets both."""
    return -logs(beta_now * (chosen_ratio - rejected_ratio)) * kept


def pace(chosen_ratio, rejected_ratio, gaps, generator, *, beta: Positive = 0.1, a=0.6,
         drop: Fraction = 0.2, momentum: Fraction = 0.9):
    """β-DPO's β_batch and the pairs kept.   gap = h, not times β -> beta_now [B], kept [B]

    β_batch = max(1e-3, β (1 + a (mean kept gap - M0))); (1 - drop) B pairs are kept, drawn with
    weights exp(-½ ((gap - M0)/s0)²). M0, s0: running mean and std, this batch included. kept is
    scaled: the step's mean is over kept pairs.
    """
    gap = chosen_ratio - rejected_ratio                                                  # [B]
    mean, std = gaps.note(gap.mean().item(), gap.std().item() if len(gap) > 1 else 0.0, momentum)
    n = max(1, int((1 - drop) * len(gap) + 1e-9))
    weight = torch.exp(-0.5 * ((gap - mean) / max(std, 1e-6)) ** 2).clamp(min=1e-30).cpu()     # [B]
    drawn = torch.multinomial(weight, n, generator=generator)
    pick = torch.zeros_like(weight).scatter(0, drawn, 1.0).to(gap.device)
    beta_now = max(1e-3, beta * (1 + a * ((gap * pick).sum().item() / n - mean)))
    return dict(beta_now=torch.full_like(gap, beta_now), kept=pick * len(gap) / n)


LOSSES["beta_dpo"], STATISTICS["pace"], MEMORIES["gaps"] = beta_dpo, pace, Gaps
WHOLE["pace"], GIVES["pace"] = with_statistic, ("beta_now", "kept")
PRESETS["beta_dpo"] = dict(loss="beta_dpo", statistic="pace")


# === ld_dpo: 2409.06411, tokens beyond the shorter response's length count less ===================


def token_ratio(logps, ref_logps):
    """log π - log π_ref of every token.   [N, T]"""
    return logps - ref_logps


def ends(tokens, mask, tok):
    """1 on a response's EOS.   [N, T]"""
    return mask * torch.isin(tokens, torch.tensor(tok.stops, device=tokens.device))


def ld_dpo(chosen_delta, rejected_delta, chosen_mask, rejected_mask, chosen_eos, rejected_eos, *,
           beta: Positive = 0.1, alpha: Share = 0.5, with_eos=True):
    """LD-DPO: DPO with weight α on the tokens beyond the shorter response's length.   [B, T]

    with_eos False leaves EOS out of both (ours): else the shorter side's EOS counts, the longer
    one's hardly.
    """
    short = torch.minimum(chosen_mask.sum(1), rejected_mask.sum(1))[:, None]             # [B, 1]

    def total(delta, mask, eos):
        weight = torch.where(mask.cumsum(1) <= short, 1.0, alpha) * mask                 # [B, T]
        return (delta * weight * (1 if with_eos else 1 - eos)).sum(1)
    return dpo(total(chosen_delta, chosen_mask, chosen_eos),
               total(rejected_delta, rejected_mask, rejected_eos), beta=beta)


LOSSES["ld_dpo"], READS["delta"], READS["eos"] = ld_dpo, token_ratio, ends
PRESETS["no_eos"] = dict(alpha=0.0, with_eos=False)    # an arm of the claim `length`


# === treg: 2412.02685, token credits regularise where the margin is small =========================


def credit(credits):
    """The rows' own token credits.   [N, T]"""
    return credits


def treg(chosen_ratio, rejected_ratio, chosen_logps, rejected_logps, chosen_credit,
         rejected_credit, *, beta: Positive = 0.1, alpha=0.25):
    """T-REG:  DPO + α ω Σ_sides Σ_t -β r_t log π_t,  ω = σ(-βh) detached,  r_t in (-½, ½).

    credit [B, T]: r_t = σ(log π_ref(y_t|better prompt) - log π_ref(y_t|worse prompt)) - ½ (see
    prompted)."""
    z = beta * (chosen_ratio - rejected_ratio)
    push = (chosen_credit * chosen_logps).sum(1) + (rejected_credit * rejected_logps).sum(1)   # [B]
    return -logs(z) - alpha * torch.sigmoid(-z).detach() * beta * push


def credited(data, world, tok, *, scale=1.0):
    """The data's pairs with an oracle's credits: σ(scale · what the token adds to gold) - ½."""
    rows = pairs(data)
    for r, pair in zip(rows, data):
        problem, out = dict(prompt=pair["text"]["prompt"]), []
        for ids in r["sides"]:
            texts = [tok.decode(ids[:i]) for i in range(len(ids) + 1)]
            texts[-1] = tok.decode(ids[:-1] if ids[-1] in tok.stops else ids)
            worth = torch.tensor([world.reward(problem, text, True) for text in texts])
            out.append(torch.sigmoid(scale * worth.diff()) - 0.5)
        r["credits"] = torch.cat(out).float()
    return rows


def prompted(data, start, tok, c, *, better="A good answer.\n", worse="A bad answer.\n"):
    """T-REG's own: σ(log π_ref(y_t|better, x) - log π_ref(y_t|worse, x)) - ½, texts put before the
    prompt."""
    rows = pairs(data)
    for r, pair in zip(rows, data):
        prompts = [tok.prompt(prefs.after(x, pair["text"]), c.chat) for x in (better, worse)]
        out = []
        for ids in r["sides"]:
            tokens, mask = collate([(prompt, ids) for prompt in prompts], tok.pad or 0, c.device)
            with torch.no_grad(), autocast(c.device, c.dtype):
                a, b = (x[m > 0] for x, m in zip(token_logprobs(start, tokens, mask), mask))
            out.append(torch.sigmoid(a - b).cpu() - 0.5)
        r["credits"] = torch.cat(out).float()
    return rows


LOSSES["treg"], READS["credit"] = treg, credit
SOURCES["credited"], SOURCES["prompted"] = credited, prompted
ROWS["credited"] = ROWS["prompted"] = once
GIVES["credited"] = GIVES["prompted"] = "chosen", "rejected", "credits"
PRESETS["treg"] = dict(loss="treg", source="credited")


# === sparsepo: 2410.05102, token weights on rewards and KL ========================================


def ref_hidden(anchor, tokens):
    """The reference's last hidden states, at each token's own prediction.   [N, T-1, D]"""
    with torch.no_grad():
        return anchor(tokens)[:, :-1]


def mapo_mask(ref_hidden, mask):
    """MaPO's mask: the mean of the reference's hidden state over features, stretched to [0, 1]
    within the response (§3; its final layer, ours).   [N, T]"""
    a = F.pad(ref_hidden.float().mean(-1), (1, 0))                                       # [N, T]
    low = a.masked_fill(mask == 0, torch.inf).amin(1, keepdim=True)
    high = a.masked_fill(mask == 0, -torch.inf).amax(1, keepdim=True)
    return (a - low) / (high - low).clamp(min=1e-6) * mask


def token_kl(policy, anchor, ref_hidden, tokens, mask):
    """KL(π_ref||π) of each token's distribution, over the whole vocabulary.   [N, T]"""
    h, where = policy(tokens)[:, :-1], mask[:, 1:] > 0
    found = kernels.linear_distill(h[where], policy.head, ref_hidden[where], anchor.head,
                                   "forward_kl")                                         # [n]
    spread = torch.zeros_like(mask[:, 1:]).masked_scatter(where, found.float())
    return F.pad(spread, (1, 0))


MASKS = ("map", "ones", "zeros")


def masked(weight, mask, which):
    """A side's weights: MaPO's (map), 1 (ones) or 0 (zeros).   [B, T]"""
    return dict(map=weight, ones=mask, zeros=0 * mask)[which]


def sparsepo(chosen_delta, rejected_delta, chosen_kl, rejected_kl, chosen_weight, rejected_weight,
             chosen_mask, rejected_mask, *, beta: Positive = 0.1, l1=0.0,
             reward_mask: Literal[*MASKS] = "map", kl_mask: Literal[*MASKS] = "map"):
    """SparsePO:  -log σ(β [u_w - u_l + k_w - k_l]),  u = Σ m_u delta,  k = Σ m_d KL(π_ref||π)_t.

    Masks ones and zeros are DPO, ones twice TDPO. l1: the penalty on the masks, a constant as ours
    are not learned."""
    out, size = 0.0, 0.0
    for sign, delta, kl, w, m in (
            (1, chosen_delta, chosen_kl, chosen_weight, chosen_mask),
            (-1, rejected_delta, rejected_kl, rejected_weight, rejected_mask)):
        m_u, m_d = masked(w, m, reward_mask), masked(w, m, kl_mask)                      # [B, T]
        out = out + sign * (m_u * delta + m_d * kl).sum(1)
        size = size + (m_u.abs() + m_d.abs()).sum(1)
    return -logs(beta * out) + l1 * size


def check_every_step(c, f):
    """UserError if what is read of the reference at every step is of one that moves."""
    if c.anchor != "start":
        raise UserError(f"--anchor {c.anchor}: --loss {c.loss} reads the reference at every step: "
                        "use --anchor start")


LOSSES["sparsepo"], CHECKS["sparsepo"] = sparsepo, check_every_step
FACTS["ref_hidden"], READS["weight"], READS["kl"] = ref_hidden, mapo_mask, token_kl


# === nca: 2402.05369, noise contrastive alignment: the chosen response must not fall ==============


def nca(chosen_ratio, rejected_ratio, *, beta: Positive = 0.1):
    """NCA:  -log σ(β d_w) - ½ log σ(-β d_w) - ½ log σ(-β d_l)."""
    return (-logs(beta * chosen_ratio) - 0.5 * logs(-beta * chosen_ratio)
            - 0.5 * logs(-beta * rejected_ratio))


LOSSES["nca"] = nca


# === apo_zero, apo_down: 2408.06266, anchored: raise the chosen, lower the rejected; lower both ===


def apo_zero(chosen_ratio, rejected_ratio, *, beta: Positive = 0.1):
    """APO-zero:  1 - σ(β d_w) + σ(β d_l): for chosen responses better than the model."""
    return 1 - torch.sigmoid(beta * chosen_ratio) + torch.sigmoid(beta * rejected_ratio)


def apo_down(chosen_ratio, rejected_ratio, *, beta: Positive = 0.1):
    """APO-down:  σ(β d_w) + 1 - σ(β h): for chosen responses worse than the model."""
    h = chosen_ratio - rejected_ratio
    return torch.sigmoid(beta * chosen_ratio) + 1 - torch.sigmoid(beta * h)


LOSSES["apo_zero"], LOSSES["apo_down"] = apo_zero, apo_down


# === simpo: 2405.14734, mean log-probs and a target margin, no reference ==========================


def simpo(chosen_mean, rejected_mean, *, beta: Positive = 2.0, gamma=1.0):
    """SimPO eq. 6:  -log σ(β (a_w - a_l) - γ),  a = mean log-prob."""
    return -logs(beta * (chosen_mean - rejected_mean) - gamma)


LOSSES["simpo"] = simpo


# === orpo: 2403.07691, SFT and the odds ratio, no reference =======================================


def log_odds(a):
    """log p/(1-p) of p = e^a, a < 0, without cancellation on either end."""
    return a - torch.where(a > -0.693, torch.log(-torch.expm1(a)), torch.log1p(-torch.exp(a)))


def orpo(chosen_mean, rejected_mean, *, lam=0.1):
    """ORPO:  -a_w - λ log σ(log odds a_w - log odds a_l)."""
    top = -1e-6                                            # a certain response has infinite odds
    o = log_odds(chosen_mean.clamp(max=top)) - log_odds(rejected_mean.clamp(max=top))
    return -chosen_mean - lam * logs(o)


LOSSES["orpo"] = orpo


# === slic_hf: 2305.10425, a hinge on log-probs and SFT, no reference ==============================


def slic_hf(chosen_logp, rejected_logp, *, delta=1.0, lam=0.5):
    """SLiC-HF:  max(0, δ - log π_w + log π_l) - λ log π_w; the SFT target is the chosen one."""
    return F.relu(delta - chosen_logp + rejected_logp) - lam * chosen_logp


LOSSES["slic_hf"] = slic_hf


# === kto: 2402.01306, binary labels, value around a reference point ===============================


def open_labels(c, tok, world, context):
    """A file's labelled responses, where --data holds such; else as open_pairs."""
    of = partial(prefs.load_labels, c.data, **tasks.reading(c))
    if world or not (found := of("train")):
        return open_pairs(c, tok, world, context)
    train, val = (prefs.encode_labels(rows, tok, context, what, c.chat) for rows, what in (
        (found[:c.rows or None], "train labels"), (of("val"), "val labels")))
    mixed = len({r["good"] for r in val}) > 1
    if len({r["good"] for r in train}) < 2:
        raise UserError(f"{c.data}: all labels to train on are alike; {c.loss} needs good and bad "
                        "ones")
    if not mixed:
        print("  all held-out labels are alike: there is no val_accuracy", flush=True)
    return train, val if mixed else [], [r["text"] for r in val]


def binary_labels(data):
    """Binary feedback: a file's labelled responses, or both sides of the pairs, each for itself."""
    if "good" in data[0]:
        return data
    return [dict(prompt=r["prompt"], sides=[r[side]], good=float(side == "chosen"))
            for r in data for side in ("chosen", "rejected")]


def ranking(split, held, policy, logprobs):
    """Of held-out labels the area under the ROC curve of the log-ratios, without a reference of
    the mean log-probs; pairs have an accuracy."""
    if split != "val" or not held or "good" not in held[0]:
        return {}
    score = [(x - r["ref_logps"]).sum() if "ref_logps" in r else x.mean()
             for r, x in zip(held, logprobs(held, policy))]
    return dict(accuracy=auroc(torch.stack(score), torch.tensor([r["good"] > 0 for r in held])))


def kto(ratio, good, z0, *, beta: Positive = 0.1, desirable=1.0, undesirable=1.0):
    """KTO:  λ_D (1 - σ(β(d - z0))) if good, else λ_U (1 - σ(β(z0 - d))).   [B]

    z0: the batch's KL on mismatched pairs, see `mismatch`."""
    return torch.where(good > 0, desirable * (1 - torch.sigmoid(beta * (ratio - z0))),
                       undesirable * (1 - torch.sigmoid(beta * (z0 - ratio))))


def mismatched(batch, context, policy, anchor, logprobs, c):
    """The mean log-ratio of prompts with another row's response, for each row.   [B]"""
    mixed = [dict(prompt=r["prompt"], sides=batch[i - 1]["sides"]) for i, r in enumerate(batch)]
    fits = [r for r in mixed if len(r["prompt"]) + len(r["sides"][0]) <= context]
    mine, ref = (logprobs(fits, model) for model in (policy, anchor))
    ratios = [(a - b).sum() for a, b in zip(mine, ref)]
    mean = torch.stack(ratios).mean() if fits else torch.zeros(())
    return mean.expand(len(batch)).to(c.device)


def mismatch(mismatched):
    """KTO's z0 = max(0, mean log-ratio of prompts with another row's response), a KL.   [B] ->
    [B]"""
    return dict(z0=mismatched.mean().clamp(min=0).expand(len(mismatched)))


def check_labels(c, f):
    """UserError unless --data has labels, or pairs."""
    if c.data not in prefs.WORLDS and not prefs.load_labels(c.data, **tasks.reading(c)):
        prefs.check_pairs(c.data, val=c.val)


def check_mismatch(c, f):
    """UserError unless there is another row, and a reference that stays."""
    check_every_step(c, f)
    if c.batch < 2:
        raise UserError("--batch 1: KTO reads each prompt with another row's response; raise "
                        "--batch")


LOSSES["kto"], STATISTICS["mismatch"], SOURCES["labels"] = kto, mismatch, binary_labels
WHOLE["mismatch"], ROWS["labels"], EVALUATIONS["labels"] = with_statistic, once, ranking
OPEN["labels"], CHECKS["labels"], CHECKS["mismatch"] = open_labels, check_labels, check_mismatch
FACTS["mismatched"], GIVES["mismatch"], GIVES["labels"] = mismatched, ("z0",), ("good",)
PRESETS["kto"] = dict(loss="kto", statistic="mismatch", source="labels", batch=128, micro=128)


# === bco, bco_pair: 2404.04656, binary labels, a classifier with a moving shift; of pairs =========


class Shift:
    """A moving average of the reward's shift, from the first batch on."""

    def __init__(self):
        self.now = []

    def note(self, now, decay):
        """Count a batch's -> the average."""
        self.now = [decay * (self.now or [now])[0] + (1 - decay) * now]
        return self.now[0]

    def state(self):
        return self.now

    def load(self, state):
        self.now = state


def bco(ratio, good, reward_shift, *, beta: Positive = 0.1):
    """BCO:  -log σ(βd - δ) if good, else -log σ(δ - βd);  δ from `shift`."""
    z = beta * ratio - reward_shift
    return -logs(torch.where(good > 0, z, -z))


def bco_pair(chosen_ratio, rejected_ratio, *, beta: Positive = 0.1):
    """BCO without its shift:  -log σ(β d_w) - log σ(-β d_l) >= DPO."""
    return -logs(beta * chosen_ratio) - logs(-beta * rejected_ratio)


def shift(ratio, good, shifts, *, beta: Positive = 0.1, decay: Fraction = 0.99):
    """BCO's δ = ½ (mean β d of the good + of the others), a moving average."""
    sides = [beta * ratio[which].mean().item() for which in (good > 0, good <= 0) if which.any()]
    now = shifts.note(sum(sides) / len(sides), decay)
    return dict(reward_shift=torch.full_like(ratio, now))


LOSSES["bco"], LOSSES["bco_pair"], STATISTICS["shift"] = bco, bco_pair, shift
MEMORIES["shifts"], WHOLE["shift"], GIVES["shift"] = Shift, with_statistic, ("reward_shift",)
PRESETS["bco"] = dict(loss="bco", statistic="shift", source="labels", batch=128, micro=128)


# === npo, ga: 2404.05868, forget: the rejected half of DPO; gradient ascent =======================


def demo(world, tok):
    """A function that gives a problem's demonstration as a response."""
    def of(problem):
        text = world.demo(problem)
        return dict(ids=[*tok.encode(text), tok.eos], text=text, finished=True)
    return of


def npo(ratio, good, mean, *, beta: Positive = 0.1, retain=1.0):
    """NPO:  (2/β) softplus(β d) on what to forget (not good), -retain mean log π on the rest."""
    return torch.where(good > 0, -retain * mean, 2 / beta * F.softplus(beta * ratio))


def ga(logp, good, mean, *, retain=1.0):
    """Gradient ascent, NPO's limit β -> 0:  log π on what to forget, -retain mean log π on the
    rest."""
    return torch.where(good > 0, -retain * mean, logp)


def forget(problems, demo, *, key="a"):
    """Demonstrations, to be forgotten (good 0) where the prompt holds `key`, else retained (good
    1)."""
    rows = [row(p, [demo(p)], good=float(key not in p["prompt"])) for p in problems]
    if len({r["good"] for r in rows}) < 2:
        raise UserError(f"--key {key}: it is in all prompts or in none: nothing to forget or to "
                        "keep")
    return rows


def forget_rows(c, f, known):
    """Rows that are made once, without those that do not fit the context."""
    rows, logprobs = once(c, f, known)
    return usable(rows, c, known["context"], known["counts"]), logprobs


def forgotten(split, problems, demo, options, logprobs, policy):
    """Mean NLL of a token of held-out demonstrations: prompts to forget, and the rest; ood has
    keywords of its own."""
    if split != "val":
        return {}
    rows = forget(problems, demo, **options)
    logps, out = logprobs(rows, policy), {}
    for name, good in (("forget", 0), ("retain", 1)):
        mine = torch.cat([x for r, x in zip(rows, logps) if r["good"] == good])
        out[f"{name}_nll"] = -mine.mean().item()
    return out


LOSSES["npo"], LOSSES["ga"], SOURCES["forget"], FACTS["demo"] = npo, ga, forget, demo
ROWS["forget"], GIVES["forget"], EVALUATIONS["forget"] = forget_rows, ("good",), forgotten
PRESETS["npo"], PRESETS["ga"] = dict(loss="npo", source="forget"), dict(loss="ga", source="forget")


# === lipo, list_mle: 2402.01878, LambdaLoss over a list; Plackett-Luce: the likelihood of a ranking


def lists(problems, sample, compare, *, k: Range("[2, inf)") = 4):
    """k samples a prompt, best first, with their mean win rates: for the losses over
    lists."""
    def choose(P):
        order = P.mean(1).argsort(descending=True, stable=True)
        return order.tolist(), dict(rates=P.mean(1)[order].tolist())
    return judged(problems, sample(problems, k), compare, choose)


def lipo(list_ratio, rates, *, beta: Positive = 0.1):
    """LiPO-λ:  Σ_{ψ_i > ψ_j} Δ_ij softplus(-(s_i - s_j)),  s = β d.   [B, K], [B, K] -> [B]

    Δ_ij = |2^ψ_i - 2^ψ_j| |1/log(1+τ_i) - 1/log(1+τ_j)|, τ the rank by s now, from 1; no gradient
    through Δ.
    """
    s = beta * list_ratio
    rank = s.detach().argsort(1, descending=True).argsort(1) + 1                         # [B, K]
    gain, discount = 2 ** rates, 1 / torch.log1p(rank)                                  # [B, K]
    gains = (gain[:, :, None] - gain[:, None]).abs()                                     # [B, K, K]
    delta = gains * (discount[:, :, None] - discount[:, None]).abs()
    wins = (rates[:, :, None] > rates[:, None]).float()                                # [B, K, K]
    return (wins * delta * F.softplus(-(s[:, :, None] - s[:, None]))).sum((1, 2))


def list_mle(list_ratio, rates, *, beta: Positive = 0.1):
    """Plackett-Luce on the ranking by win rate:  Σ_k [logsumexp(s_k:) - s_k],  s = β d.   [B, K] ->
    [B]"""
    s = (beta * list_ratio).gather(1, rates.argsort(1, descending=True))       # [B, K], best first
    return (s.flip(1).logcumsumexp(1).flip(1) - s).sum(1)


LOSSES["lipo"], LOSSES["list_mle"], SOURCES["lists"] = lipo, list_mle, lists
ROWS["lists"], GIVES["lists"] = fresh_rows, ("chosen", "rejected", "rates")
PRESETS["lipo"] = dict(loss="lipo", source="lists", refresh=200, beta=0.05)   # §5: beta 0.05
PRESETS["list_mle"] = dict(loss="list_mle", source="lists", refresh=200)


# === pro: 2306.17492, one against the rest, down the ranking, and SFT on the best =================


def pro(list_mean, list_logp, rates, *, weight=0.05):
    """PRO: down the ranking, the best left against the rest; + w (n-1)² NLL of the best.   [B]

    Σ_k logsumexp(a_k T_k, a_i (r_k - r_i)) - a_k T_k over the i behind k,  T_k = max_i (r_k - r_i).
    """
    order = rates.argsort(1, descending=True)
    a, r, logp = (x.gather(1, order) for x in (list_mean, rates, list_logp))           # best first
    n, out = a.size(1), 0.0
    for k in range(n - 1):
        gap = r[:, k:k + 1] - r[:, k + 1:]                                              # [B, n-k-1]
        own = a[:, k:k + 1] * gap.max(1, keepdim=True).values                            # [B, 1]
        out = out + torch.logsumexp(torch.cat([own, a[:, k + 1:] * gap], 1), 1) - own[:, 0]
    return out - weight * (n - 1) ** 2 * logp[:, 0]


LOSSES["pro"] = pro
PRESETS["pro"] = dict(loss="pro", source="lists", refresh=200)


# === logo: 2410.18533, SimPO against several rejected responses ===================================


def logo(list_mean, *, beta: Positive = 2.5, gamma=0.25, lam=0.1):
    """LOGO:  -log σ(β (a_w - mean_j a_j) - γ) - λ a_w; the first of the list is the winner."""
    a = list_mean[:, 0]
    return -logs(beta * (a - list_mean[:, 1:].mean(1)) - gamma) - lam * a


LOSSES["logo"] = logo
PRESETS["logo"] = dict(loss="logo", source="lists", refresh=200)


# === raco: 2602.02495, several objectives: conflict-averse gradients, clipped by their weights ====


def objectives(chosen_ratio, rejected_ratio, signs, *, beta: Positive = 0.1):
    """One DPO loss an objective: -log σ(β s h), 0 where it has no opinion.   signs [B, M] -> [B, M]

    s = 1: it prefers the chosen response, -1: the rejected one."""
    return -logs(beta * signs * (chosen_ratio - rejected_ratio)[:, None]) * (signs != 0)


def signs_of_groups(data, world, *, groups: Literal["A", "B", "AB", "BA"] = "AB"):
    """Ring's pairs with what each group of annotators prefers: 1 the chosen, -1 the rejected one,
    0 none."""
    out = []
    for problem, sides in map(texts_of, data):
        golds = [gold_of_groups(world, problem, y, groups) for y in sides]               # [2][M]
        out.append(row(problem, sides, signs=[float((a > b) - (a < b)) for a, b in zip(*golds)]))
    return out


def gold_of_groups(world, problem, y, groups):
    """What a response is worth to each group of annotators."""
    return [world.judge(problem["prompt"], y["text"], y["finished"], g)["gold"] for g in groups]


def worth_to_groups(problems, responses, world, options):
    """The mean gold reward of each group of annotators."""
    golds = [gold_of_groups(world, p, y, options["groups"]) for p, y in zip(problems, responses)]
    return {f"gold_{g}": sum(x) / len(x) for g, x in zip(options["groups"], zip(*golds))}


def flattened(grads):
    """The gradients of all parameters as one vector.   [D]"""
    return torch.cat([g.reshape(-1) for g in grads])


def backward_each(c, f, known, batch, metrics):
    """A gradient an objective, of the mean over the rows on which it has an opinion; then --combine
    -> the sum of the objectives' losses."""
    params = [p for p in known["policy"].parameters() if p.requires_grad]
    count = torch.tensor([r["signs"] for r in batch]).abs().sum(0).clamp(min=1)          # [M]
    G, total, value = 0, 0.0, 0.0
    for i in range(0, len(batch), c.micro):
        with autocast(c.device, c.dtype):
            here = measure(c, known, batch[i:i + c.micro])
            loss = f.loss(**inputs(needs(f.loss), here))                                 # [b, M]
        metrics.update(sums(here))
        each = loss.sum(0) / count.to(loss.device)                                       # [M]
        grads = [torch.autograd.grad(one, params, retain_graph=True) for one in each]
        G = torch.stack([flattened(own) for own in grads]) + G                           # [M, D]
        total = total + each.detach()
        value += each.sum().item()
    flat = ask(f.combine, dict(G=G, losses=total))                                       # [D]
    for p, g in zip(params, flat.split([p.numel() for p in params])):
        p.grad = g.view_as(p)
    return value


def check_signs(c, f):
    """UserError unless there are groups of annotators, and a weight for each."""
    if c.data != "ring":
        raise UserError("--source signs: only Ring has groups of annotators; take --data ring")
    shares(f.combine.keywords.get("weights", ""), len(f.source.keywords["groups"]))


def check_objectives(c, f):
    """UserError for an SFT term: every objective has another chosen response."""
    if c.sft:
        raise UserError(f"--sft {c.sft}: --loss objectives has no chosen response; leave it at 0")


LOSSES["objectives"], SOURCES["signs"] = objectives, signs_of_groups
ROWS["signs"], BACKWARD["objectives"] = once, backward_each
ALONE["objectives"] = "a gradient an objective is not summed over ranks"
CHECKS["objectives"], CHECKS["signs"] = check_objectives, check_signs
GIVES["signs"], EVALUATIONS["signs"] = ("chosen", "rejected", "signs"), worth_to_groups
PRESETS["raco"] = dict(loss="objectives", source="signs", combine="cagrad",
                       beta=0.2)                                              # §5: beta 0.2


# === spin: 2401.01335, demonstrations against the last iterate's samples ==========================


def spin(problems, sample, demo):
    """SPIN: the demonstration is chosen, the last iterate's sample rejected: no judge.

    ours: samples of the iterate before are not mixed in."""
    return [row(p, [demo(p), y]) for p, (y,) in zip(problems, sample(problems))]


SOURCES["spin"], ROWS["spin"], GIVES["spin"] = spin, fresh_rows, ("chosen", "rejected")
PRESETS["spin"] = dict(source="spin", anchor="previous", refresh=50)


# === sppo, sppo_hard: 2405.00675, regress log-ratios on win rates: self-play, Nash ================


def sppo(chosen_ratio, rejected_ratio, chosen_win, rejected_win, *, beta: Positive = 0.1):
    """SPPO:  ½ Σ_sides (d - (P(y > π_t) - ½)/β)²;  d is relative to π_t.   [B]

    β: ours; the paper's 0.001 asks for log-ratios of hundreds of nats."""
    return 0.5 * ((chosen_ratio - (chosen_win - 0.5) / beta) ** 2
                  + (rejected_ratio - (rejected_win - 0.5) / beta) ** 2)


def sppo_hard(chosen_ratio, rejected_ratio, *, beta: Positive = 0.1):
    """SPPO with P = 1 and 0."""
    return sppo(chosen_ratio, rejected_ratio, 1.0, 0.0, beta=beta)


def ranked(problems, sample, compare, *, k: Range("[2, inf)") = 5):
    """SPPO: the best and the worst of k samples, with their win rates."""
    return judged(problems, sample(problems, k), compare, extremes)


LOSSES["sppo"], LOSSES["sppo_hard"], SOURCES["ranked"] = sppo, sppo_hard, ranked
ROWS["ranked"], GIVES["ranked"] = fresh_rows, ("chosen", "rejected", "chosen_win", "rejected_win")
PRESETS["sppo"] = dict(loss="sppo", source="ranked", anchor="previous", refresh=50)
PRESETS["sppo_hard"] = PRESETS["sppo"] | dict(loss="sppo_hard")


# === dno: 2404.03715, direct Nash optimisation: large-margin pairs of iterate and demonstrations ==


def dno(chosen_ratio, rejected_ratio, chosen_win, rejected_win, *, beta: Positive = 0.1):
    """DNO's exact step:  DPO with the soft label σ(r_w - r_l),  r = win rate against π_t."""
    q, z = torch.sigmoid(chosen_win - rejected_win), beta * (chosen_ratio - rejected_ratio)
    return -q * logs(z) - (1 - q) * logs(-z)


def dno_pairs(problems, sample, compare, demo, counts, *, k: Range("[2, inf)") = 5, least=0.2):
    """DNO-Prct: best against worst of k samples and the demonstration, if win rates differ by
    `least`.

    ours: the threshold, and that earlier iterations' pairs are not mixed in."""
    groups = [[*ys, demo(p)] for p, ys in zip(problems, sample(problems, k))]
    rows = judged(problems, groups, compare, partial(extremes, least=least))
    counts["close"] += len(problems) - len(rows)
    return rows


LOSSES["dno"], SOURCES["dno"] = dno, dno_pairs
ROWS["dno"], GIVES["dno"] = fresh_rows, ("chosen", "rejected", "chosen_win", "rejected_win")
PRESETS["dno"] = dict(source="dno", anchor="previous", refresh=50)


# === inpo: 2407.00617, iterative Nash: mirror descent on the regularised game, from hard labels ===


def prev_logps(rows, policy, logprobs):
    """Log-probs of the rows' tokens under the policy that has made them.   -> [n] a row"""
    return logprobs(rows, policy)


def prev_ratio(logps, prev_logps):
    """Σ log π - log π_t, against the policy that has made the rows.   [N]"""
    return (logps - prev_logps).sum(-1)


def inpo(chosen_ratio, rejected_ratio, chosen_prev_ratio, rejected_prev_ratio, *,
         eta: Positive = 0.3, tau: Positive = 0.1):
    """INPO:  (h_t - 1/(2η))²,  h_t = (τ/η) h + (1 - τ/η) h against π_t.   0 < τ <= η

    That is log π_w/π_l - (τ/η) log π_ref - ((η-τ)/η) log π_t: both references at once. η and τ are
    ours in size (0.0075 and 0.0025 in the paper), its ratio."""
    h, before = chosen_ratio - rejected_ratio, chosen_prev_ratio - rejected_prev_ratio
    return (tau / eta * h + (1 - tau / eta) * before - 1 / (2 * eta)) ** 2


def check_inpo(c, f):
    """UserError unless τ <= η."""
    if not f.loss.keywords["tau"] <= f.loss.keywords["eta"]:
        raise UserError("--loss inpo: --tau is at most --eta")


LOSSES["inpo"], CHECKS["inpo"] = inpo, check_inpo
FACTS["prev_logps"], READS["prev_ratio"] = prev_logps, prev_ratio
PRESETS["inpo"] = dict(loss="inpo", source="online", refresh=50)


# === nash_md: 2312.00886, Nash by policy gradient against a mixture with the reference ============


def nash_md(logp, ratio, win, *, tau: Positive = 0.1):
    """Nash-MD-PG:  -[P(y > y') - ½ - τ d] log π(y), bracket detached; sums over tokens.   [B]"""
    return -(win - 0.5 - tau * ratio).detach() * logp


def beating(problems, ours, theirs, compare):
    """Single rows of our samples with their probability of beating theirs."""
    groups = [[a, b] for (a,), (b,) in zip(ours, theirs)]
    return judged(problems, groups, compare, lambda P: ((0,), dict(win=P[0, 1].item())))


def mixture(problems, sample, compare, start, *, kappa: Share = 0.5):
    """Nash-MD: y of the policy against y' of its token-wise mixture π^(1-κ) π_ref^κ; κ = 0 is
    self-play."""
    theirs = sample(problems, contrast=(start, -kappa))
    return beating(problems, sample(problems), theirs, compare)


LOSSES["nash_md"], SOURCES["mixture"] = nash_md, mixture
ROWS["mixture"], GIVES["mixture"] = fresh_rows, ("win",)
PRESETS["nash_md"] = dict(loss="nash_md", source="mixture")


# === nash_mp: 2505.19731, Nash by Mirror Prox: two half-steps, near the last iterate ==============


class Copies:
    """Copies of the policy that nothing trains, by name."""

    def __init__(self, policy):
        self.policy, self.models = policy, {}

    def take(self, name):
        """Copy the policy as it is now."""
        self.models[name] = snapshot(self.policy)

    def state(self):
        trained = [name for name, p in self.policy.named_parameters() if p.requires_grad]
        return {name: dict(zip(trained, map(model.get_parameter, trained)))
                for name, model in self.models.items()}

    def load(self, state):
        for name, weights in state.items():
            self.take(name)
            self.models[name].load_state_dict(weights, strict=False)


def iterate_logps(rows, opponents, logprobs):
    """Log-probs of the rows' tokens under the last iterate.   -> [n] a row"""
    return logprobs(rows, opponents.models["iterate"])


def iterate_ratio(logps, iterate_logps):
    """Σ log π - log π_k, against the last iterate.   [N]"""
    return (logps - iterate_logps).sum(-1)


def nash_mp(logp, ratio, iterate_ratio, win, *, tau: Positive = 0.1, eta: Positive = 0.2):
    """Nash-MP: policy gradient of the proximal step.   [B]

    -[(P(y > opponent) - ½)/τ - d - d_k/η] log π(y), bracket detached, times τ to keep nash_md's
    scale; d against the reference, d_k against π_k."""
    return -(win - 0.5 - tau * (ratio + iterate_ratio / eta)).detach() * logp


def prox(problems, sample, compare, opponents, stage, *, inner: Count = 4):
    """Nash-MP: `inner` policy-gradient steps against π_k, then as many against π_(k+½), both near
    π_k."""
    phase = stage % (2 * inner)
    if phase == 0:
        opponents.take("iterate")
    if phase in (0, inner):
        opponents.take("opponent")
    ours, theirs = sample(problems), sample(problems, model=opponents.models["opponent"])
    return beating(problems, ours, theirs, compare)


def check_nash_mp(c, f):
    """UserError without its source, which knows the last iterate."""
    if c.source != "prox":
        raise UserError(f"--loss nash_mp reads the last iterate, which --source {c.source} does "
                        "not keep: take --source prox")


LOSSES["nash_mp"], SOURCES["prox"] = nash_mp, prox
ROWS["prox"], GIVES["prox"] = fresh_rows, ("win",)
FACTS["iterate_logps"], READS["iterate_ratio"] = iterate_logps, iterate_ratio
MEMORIES["opponents"], CHECKS["nash_mp"] = Copies, check_nash_mp
ALONE["opponents"] = "copies of sharded weights cannot be made"
PRESETS["nash_mp"] = dict(loss="nash_mp", source="prox")


# === duel: 2312.00886, intransitive annotators, and how exploitable a policy is among them ========


def duel(world, problem, group, *, cycle=2.0):
    """Ring's intransitive annotators: Bradley-Terry plus a cycle of dominant classes.   -> [K,
    K]"""
    texts = [(y["text"], y["finished"]) for y in group]
    P = torch.full((len(group), len(group)), 0.5, dtype=torch.float64)
    for i, j in permutations(range(len(group)), 2):
        (a, whole_a), (b, whole_b) = texts[i], texts[j]
        P[i, j] = world.duel(problem["prompt"], a, b, cycle, whole_a, whole_b)
    return P


def exploitability(problems, sample, compare, start, *, k=16, most=48):
    """max_y P(y > π) - ½, averaged over prompts: what the best of 2 k responses wins against the
    policy.

    Candidates: k samples of the start and k of the policy; P(y > π) by k other samples of the
    policy. A maximum over samples: it is above 0 for the best of policies too, so compare arms, not
    with 0."""
    problems = problems[:most]
    groups = [a + b + c for a, b, c in zip(sample(problems, k, model=start),
                                           sample(problems, k), sample(problems, k))]
    best = [P[:2 * k, 2 * k:].mean(1).max().item() for P in compare(problems, groups)]
    return dict(exploitability=sum(best) / len(best) - 0.5)


def check_duel(c, f):
    """UserError unless there are intransitive annotators."""
    if c.data != "ring":
        raise UserError("--judge duel: only Ring has intransitive annotators; take --data ring")


JUDGES["duel"], EVALUATIONS["duel"], CHECKS["duel"] = duel, exploitability, check_duel


# === learned: a reward model's folder as --judge ==================================================


def scorer(c, f, make=True):
    """The reward model that --judge names."""
    if not make:
        peek(c.judge, scalar=True, option="--judge")
    return c.judge


def batches(problems, groups, tok, c):
    """All problems and their responses -> [(tokens, mask)] of --micro rows each, [n, T]."""
    rows = [(p["ids"], y["ids"]) for p, ys in zip(problems, groups) for y in ys]
    tokens, mask = collate(rows, tok.pad or 0, c.device)
    return list(zip(tokens.split(c.micro), mask.split(c.micro)))


def rated(problems, groups, scorer, tok, c):
    """A reward model's score of every response, read at its last token."""
    with autocast(c.device, c.dtype):
        score = [sequence_score(scorer, t, m.size(1) - m.flip(1).argmax(1))
                 for t, m in batches(problems, groups, tok, c)]
    return torch.cat(score).tolist()


def learned(rated, *, sharp: Positive = 1.0):
    """A reward model's scores as Bradley-Terry.   [K] -> [K, K]"""
    return gold(rated, sharp=sharp)


JUDGES["PATH"], FACTS["rated"], MODELS["scorer"] = learned, rated, scorer


# === cdr: 2411.02481, two language models as a judge: nothing is trained ==========================


def strong(c, f, make=True):
    """The checkpoint of --strong."""
    return one_of_two(c, f, "strong", make)


def weak(c, f, make=True):
    """The checkpoint of --weak; UserError if it is that of --strong."""
    path = one_of_two(c, f, "weak", make)
    if make and path == one_of_two(c, f, "strong", make):
        raise UserError("--judge cdr: --strong and --weak are the same model, so every pair is a "
                        "tie")
    return path


def one_of_two(c, f, name, make):
    """sft.find of one of the two, by default of --init."""
    path = f.judge.keywords[name] or c.init
    return sft.find(path, c.config, make, f"--{name}", device=c.device)


def density(problems, groups, strong, weak, tok, c):
    """Mean log π_strong/π_weak of every response's tokens."""
    with autocast(c.device, c.dtype):
        score = [(token_logprobs(strong, t, m) - token_logprobs(weak, t, m)).sum(1) / m.sum(1)
                 for t, m in batches(problems, groups, tok, c)]
    return torch.cat(score).tolist()


def cdr(density, *, strong="", weak="", sharp: Positive = 1.0):
    """CDR: scores are mean log π_strong/π_weak. Both are checkpoints."""
    return gold(density, sharp=sharp)


JUDGES["cdr"], FACTS["density"], MODELS["strong"], MODELS["weak"] = cdr, density, strong, weak


# === xpo: 2405.21046, online and optimistic: what the reference samples becomes less likely =======


def xpo(chosen_ratio, rejected_ratio, other_logp, *, beta: Positive = 0.1, alpha=1e-5):
    """XPO:  DPO + α log π(ỹ),  ỹ ~ π_ref: optimism lowers what is covered already."""
    return dpo(chosen_ratio, rejected_ratio, beta=beta) + alpha * other_logp


def explore(problems, sample, compare, start, generator):
    """XPO: a sample of the policy against one of the reference, ỹ, which is the row's third side
    too."""
    both = [[a, b] for (a,), (b,) in zip(sample(problems), sample(problems, model=start))]
    return judged(problems, both, compare, lambda P: ((*coin(P, generator), 1), {}))


LOSSES["xpo"], SOURCES["explore"] = xpo, explore
ROWS["explore"], GIVES["explore"] = fresh_rows, ("chosen", "rejected", "other")
PRESETS["xpo"] = dict(loss="xpo", source="explore")


# === selm: 2405.19332, the policy's own greedy response becomes more likely =======================


def next_pairs(data, problems, stage, c):
    """As many encoded pairs of the data, in an order of their own."""
    picked = batch_indices(len(data), len(problems), stage, c.seed + 7).tolist()
    return [data[i] for i in picked]


def selm(chosen_ratio, rejected_ratio, other_ratio, *, beta: Positive = 0.1, alpha=0.001):
    """SELM:  DPO + α β d(ỹ),  ỹ the last iterate's greedy response."""
    return dpo(chosen_ratio, rejected_ratio, beta=beta) + alpha * beta * other_ratio


def selm_pairs(drawn, sample, compare):
    """SELM: best and worst of the data's pair and the last iterate's greedy response, the third
    side too."""
    where, groups = zip(*map(texts_of, drawn))
    groups = [[*ys, y] for ys, (y,) in zip(groups, sample(where, temperature=0.0))]
    return judged(where, groups, compare, lambda P: ((*extremes(P)[0], 2), {}))


LOSSES["selm"], SOURCES["selm"], FACTS["drawn"] = selm, selm_pairs, next_pairs
ROWS["selm"], GIVES["selm"] = fresh_rows, ("chosen", "rejected", "other")
PRESETS["selm"] = dict(loss="selm", source="selm", anchor="previous", refresh=50)


# === hypo: 2406.01462, offline DPO and an online KL ===============================================


def hypo(chosen_ratio, rejected_ratio, list_ratio, list_logp, *, beta: Positive = 0.1, lam=1e-3):
    """HyPO:  DPO + λ Σ_i c_i log π(y_i) / k: KL(π||π_ref) on the policy's own samples.   [B]

    The list's first two sides are the pair; c_i = d_i - mean of the others (RLOO), detached."""
    d, logp = list_ratio[:, 2:].detach(), list_logp[:, 2:]                               # [B, k]
    k = d.size(1)
    c = (d - d.mean(1, keepdim=True)) * k / (k - 1)
    return dpo(chosen_ratio, rejected_ratio, beta=beta) + lam * (c * logp).mean(1)


def hybrid(drawn, sample, *, k: Range("[2, inf)") = 2):
    """HyPO: the data's pairs, and k samples of the policy for the online KL."""
    where, groups = zip(*map(texts_of, drawn))
    return [row(p, [*ys, *more]) for p, ys, more in zip(where, groups, sample(where, k))]


def check_hypo(c, f):
    """UserError without its source, whose rows hold the policy's samples."""
    if c.source != "hybrid":
        raise UserError(f"--loss hypo reads samples beside the pair, which --source {c.source} "
                        "does not give: take --source hybrid")


LOSSES["hypo"], SOURCES["hybrid"], CHECKS["hypo"] = hypo, hybrid, check_hypo
ROWS["hybrid"], GIVES["hybrid"] = fresh_rows, ("chosen", "rejected")
PRESETS["hypo"] = dict(loss="hypo", source="hybrid")


# === mpo: 2403.19443, easy pairs by DPO, then policy gradients on the hard prompts ================


def at_handover(start, handover):
    """Log-ratios against the start, and on the hard prompts against the model that DPO has made."""
    return handover.models.get("policy", start)


def mpo(chosen_ratio, rejected_ratio, chosen_logp, rejected_logp, gain, hard, *,
        beta: Positive = 0.1, tau: Positive = 0.1):
    """MPO: DPO on easy rows; on hard ones the policy gradient of two samples.   [B]

    With k = 2 RLOO's advantages are ±A, A = gain - τ (d_1 - d_2): -½ A (log π_1 - log π_2). ours:
    the paper runs PPO there; ratios are to the DPO model by then."""
    advantage = (gain - tau * (chosen_ratio - rejected_ratio)).detach()
    return torch.where(hard > 0, -0.5 * advantage * (chosen_logp - rejected_logp),
                       dpo(chosen_ratio, rejected_ratio, beta=beta))


def mpo_rows(problems, data, sample, compare, handover, step, stage, c, *, easy: Share = 0.5):
    """MPO: half of the run, the share `easy` of the pairs, those of the largest margin (0: policy
    gradients alone, 1: DPO alone); then two samples each of the other pairs' prompts and the
    judge's log-odds, near the model that DPO has made."""
    if "gap" not in data[0]:
        for r, P in zip(data, compare(*zip(*map(texts_of, data)))):
            r["gap"] = abs(preference_odds(P))
    order, cut = sorted(data, key=lambda r: -r["gap"]), round(easy * len(data))
    hard = cut == 0 or cut < len(data) and step >= c.steps // 2
    rest = order[cut:] if hard else order[:cut]
    picked = [rest[i] for i in batch_indices(len(rest), len(problems), stage, c.seed).tolist()]
    where, groups = zip(*map(texts_of, picked))
    if hard:
        if not handover.models:
            handover.take("policy")
        groups = sample(where, 2)
    return judged(where, groups, compare,
                  lambda P: ((0, 1), dict(hard=float(hard), gain=preference_odds(P))))


def check_mpo(c, f):
    """UserError without what belongs to it, and for an SFT term: the samples of the hard prompts
    are not chosen ones."""
    if (c.loss == "mpo") != (c.anchor == "handover"):
        raise UserError(f"--loss {c.loss} --anchor {c.anchor}: --anchor handover is of --loss mpo, "
                        "and the other way round; take --config mpo")
    if c.sft:
        raise UserError(f"--sft {c.sft}: --loss mpo has no chosen response; leave it at 0")


LOSSES["mpo"], SOURCES["mpo"], ANCHORS["handover"] = mpo, mpo_rows, at_handover
MEMORIES["handover"], CHECKS["mpo"], CHECKS["handover"] = Copies, check_mpo, check_mpo
ALONE["handover"] = "copies of sharded weights cannot be made"
ROWS["mpo"], GIVES["mpo"] = fresh_rows, ("chosen", "rejected", "gain", "hard")
PRESETS["mpo"] = dict(loss="mpo", source="mpo", anchor="handover")


# === search: 2405.00451, a tree of steps a prompt: which continuation is worth more? ==============


class Node:
    """One step: ids since the parent, its prior, v the worth of a response that goes on from it.

    N visits;  r = v - v(parent);  V the children's mean Q by visits;  Q = r + V."""

    def __init__(self, ids=(), prior=1.0, finished=False, parent=None):
        self.ids, self.prior, self.finished, self.parent = list(ids), prior, finished, parent
        self.v, self.V, self.N, self.children = 0.0, 0.0, 0, []

    @property
    def Q(self):
        """r + V: what the step adds to its parent's worth, and its continuations to its own."""
        return self.v - (self.parent.v if self.parent else 0.0) + self.V

    def path(self):
        """All ids from the root to here."""
        return (self.parent.path() if self.parent else []) + self.ids


def descend(node, w=1.0):
    """PUCT down to a leaf: the child with the largest Q + w p √N / (1 + N_child)."""
    while node.children:
        root = math.sqrt(node.N)
        node = max(node.children, key=lambda x: x.Q + w * x.prior * root / (1 + x.N))
    return node


def back_up(node):
    """N + 1 on the way up;  V(parent) = Σ max(1, N_c) Q_c / Σ max(1, N_c)."""
    while node:
        node.N += 1
        if node.children:
            weights = [max(1, x.N) for x in node.children]
            node.V = sum(n * x.Q for n, x in zip(weights, node.children)) / sum(weights)
        node = node.parent


def grow_trees(prompts, extend, value, room, *, iterations=8, children=3, chunk=4, depth=4):
    """One tree a prompt -> their roots, after `iterations` leaves each, grown side by side.

    extend([ids], new, k) -> for every start k tuples (ids of at most `new` tokens, prior,
    finished); value(i, ids, finished) -> the worth of a whole response to prompt i. A leaf within
    `depth` steps gets `children` steps of `chunk` tokens; each is worth what one completion from it
    is (2405.00451 adds the model's own confidence: ours is the verifier alone)."""
    roots = [Node() for _ in prompts]
    for _ in range(iterations):
        leaves = [descend(root) for root in roots]
        grow = [i for i, x in enumerate(leaves)
                if not x.finished and len(x.path()) + chunk <= min(chunk * depth, room)]
        starts, fresh = [prompts[i] + leaves[i].path() for i in grow], []
        for i, steps in zip(grow, extend(starts, chunk, children) if grow else []):
            leaves[i].children = [Node(ids, prior, done, leaves[i]) for ids, prior, done in steps]
            fresh += [(i, x) for x in leaves[i].children]
        for (_, x), v in zip(fresh, worths(prompts, fresh, extend, value, room)):
            x.v = v
        for leaf in leaves:
            back_up(leaf)
    return roots


def worths(prompts, fresh, extend, value, room):
    """What one completion from each new step is worth; fresh: [(prompt's index, Node)]."""
    rest, whole = {}, [(x.path(), x.finished) for _, x in fresh]
    for k, (path, finished) in enumerate(whole):
        if not finished and len(path) < room:
            rest.setdefault(room - len(path), []).append(k)
    for left, same in rest.items():                    # one call a length: all end at room
        starts = [prompts[fresh[k][0]] + whole[k][0] for k in same]
        for k, ((ids, _, done),) in zip(same, extend(starts, left, 1)):
            whole[k] = whole[k][0] + ids, done
    return [value(i, *end) for (i, _), end in zip(fresh, whole)]


# === mcts: 2405.00451, pairs of steps from a search tree ==========================================


def step_pairs(root):
    """(prefix, better ids, worse ids) at every node down the most valuable path; none where Q is
    equal."""
    out, node = [], root
    while node.children:
        best, worst = (choose(node.children, key=lambda x: x.Q) for choose in (max, min))
        if best.Q > worst.Q and best.ids != worst.ids:
            out.append((node.path(), best.ids, worst.ids))
        node = best
    return out


def extend(policy, c, generator):
    """A function that samples k continuations of each start, of at most `new` tokens -> [(ids,
    e^(Σ log π / n^1.25), finished)]."""
    def of(starts, new, k):
        with autocast(c.device, c.dtype):
            roll = generate(policy, starts, new, samples=k, generator=generator)
        out = [(t[m > 0].tolist(), (x.sum() / m.sum() ** 1.25).exp().item(), done)
               for t, m, x, done
               in zip(roll.tokens, roll.mask, roll.logp, roll.finished.tolist())]
        return [out[i:i + k] for i in range(0, len(out), k)]
    return of


def tree(problems, world, tok, extend, room, *, iterations: Count = 8,
         children: Range("[2, inf)") = 3, chunk: Count = 4, depth: Count = 4):
    """MCTS-DPO: pairs of steps from a search tree a prompt; a shared prefix cancels in h."""
    def value(i, ids, done):
        return world.reward(problems[i], tok.decode(ids[:-1] if done else ids), done)
    prompts = [p["ids"] for p in problems]
    trees = grow_trees(prompts, extend, value, room, iterations=iterations, children=children,
                       chunk=chunk, depth=depth)
    return [dict(prompt=prompt + prefix, sides=[a, b]) for prompt, root in zip(prompts, trees)
            for prefix, a, b in step_pairs(root)]


SOURCES["mcts"], FACTS["extend"] = tree, extend
ROWS["mcts"], GIVES["mcts"] = fresh_rows, ("chosen", "rejected")


if __name__ == "__main__":
    cli(main)
