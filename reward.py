"""
reward.py - reward models and judges: train, evaluate, attack, route.

    python reward.py                               # a reward model on the world Ring: table, curves
    python reward.py --data pairs.jsonl --init Qwen2.5-0.5B --context 512
    python reward.py --config margin               # another loss on the same pairs
    python reward.py --config ensemble,uwo         # another system, from data to numbers
    python reward.py --eval out/reward/default --data pairs.jsonl       # any reward model
    python ppo.py --config ring,ppo --reward out/reward/default         # use it
    python reward.py --claim advrm --seeds 5       # a paper's claim against its baselines

The spine is Bradley-Terry: pairs become a score, and the score is held to pairs that it has not
seen and to the gold reward of samples. A chapter adds a loss, or a system with its own recipe.
Letters  B rows, T tokens, D width, V vocabulary, K members or attributes, P prompts
Watch    accuracy of held-out pairs, not the loss: reward models overfit in a few passes. ECE says
         whether the scores' gap is a probability. A high length Spearman, or a null model that
         wins, is a hack waiting. Under RL, gold rises and then falls while the proxy rises on:
         only the worlds here can show it.
"""
import copy
import json
import math
import random
import statistics
from dataclasses import dataclass
from functools import cache, cached_property, partial
from itertools import accumulate
from pathlib import Path
from types import SimpleNamespace
from typing import Literal

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn.utils import clip_grad_norm_
from tqdm import trange

import kernels
import sft
from data import prefs, tasks
from data.run import (Count, Positive, Range, Run, Share, Training, UserError, batch_indices,
                      checkpoint, cli, launch, needs, pyplot, ranks, start_ranks)
from data.stats import accuracy, auroc, best_of_n, bon_kl, spearman
from model import (ADAPTERS, PEFT, ScalarModel, Work, adapter_readers, adapter_state, autocast,
                   check_adapters, clip_gradients, collate, foresee, generate, init,
                   last_hidden, load, load_frozen, lora, merge, passes, peek, preset, recomputing,
                   save, save_trained, sequence_score, shard, spread, summed, token_logprobs, use,
                   with_peft)
from optim import RULES, cosine, linear, optimiser, set_lr, state_bytes

# --- config ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Config(Training):
    """What belongs to a loss or a recipe is an argument of its function."""
    data: str = "ring"           # a world (ring, toyif), or a JSONL of prompt, chosen, rejected
    rows: int = 0                # training pairs (0: the recipe's number, or the whole file)
    noise: Share = 0.0           # share of a world's training labels that is flipped
    init: str = "base:ring"      # language model to start from; base:PRESETS makes it first
    eval: str = ""               # evaluate this reward model instead of training one
    context: int = 0             # longest pair in tokens (0: the model's)
    recipe: str = "bt"           # which row of RECIPES: a system, from data to numbers
    loss: str = "bt"             # which row of LOSSES: on a pair's two scores
    aggregate: str = "mean"      # which row of AGGREGATES: of an ensemble
    steps: int = 0               # optimizer steps of each model (0: epochs decides)
    epochs: Positive = 3.0       # passes over the pairs
    batch: Count = 64            # pairs per optimizer step
    optimiser: str = "adamw"     # which row of optim.RULES updates the matrices of the blocks
    aux_lr: float = 0.0          # of AdamW for what is no block matrix (0: lr)
    weight_decay: float = 0.0    # on matrices
    clip: Positive = 1.0         # largest gradient norm


WORLDS = prefs.WORLDS            # preference data with a known gold reward
TOYIF = dict(data="toyif", init="base:toyif_base")
PRESETS = dict(
    bt=dict(recipe="bt", loss="bt"),                             # the defaults
    ring=dict(data="ring", init="base:ring"),                    # the worlds
    toyif=TOYIF,
    tiny=dict(rows=256, steps=6, batch=16, save_every=3, lr=1e-3),       # shows that all turns
)
CURVES = {"loss": ["loss"], "accuracy of the batch": ["accuracy"], "scores": ["gap", "score_std"]}


# --- the loss: one number a row, [B]; the loop divides by the whole step's rows -------------------


def bt(chosen, rejected, *, center=0.0):
    """Bradley-Terry:  -log σ(d),  d = r_chosen - r_rejected.   [B], [B] -> [B]

    center: + c (r_chosen + r_rejected)² keeps scores near 0 (2312.09244 eq. 2; TRL uses 0.01)."""
    return -F.logsigmoid(chosen - rejected) + center * (chosen + rejected) ** 2


LOSSES = dict(bt=bt)


# --- rewards: functions of (tokens [B, T], start [B], end [B]) -> [B] -----------------------------
# A response is tokens[start:end]; a reward model's score is read at its last token.


def chunked(fn, c, *models):
    """fn in micro-batches, without gradient, at the run's precision, cut to the rows' length;
    models: those that it asks, if they may be spread over ranks."""
    def says(tokens, start, end):
        return fn(tokens[:, :int(end.max())], start, end).float()
    return lambda tokens, start, end: spread(says, c, tokens, start, end, models=models)


def scalar_reward(model, c):
    """A reward model's score at the last token."""
    return chunked(lambda tokens, start, end: sequence_score(model, tokens, end, start), c, model)


def score_rows(reward, rows, side, c, pad):
    """[N] scores of one side of encoded pairs, on the CPU."""
    tokens, mask = collate([(r["prompt"], r[side]) for r in rows], pad, c.device)
    start = torch.tensor([len(r["prompt"]) for r in rows], device=c.device)
    return reward(tokens, start, start + mask.sum(1).long()).cpu()


# --- the one training loop ------------------------------------------------------------------------
# A loss's positional arguments name what it reads, and only that is computed: rows of FACTS, or
# numbers that the data's rows hold.


class Batch:
    """Encoded rows, and what the model makes of them: computed once, when first asked for."""

    def __init__(self, model, rows, c, pad, generator):
        self.model, self.rows, self.c, self.pad, self.generator = model, rows, c, pad, generator

    def of(self, *sides):
        """Prompts with these sides, one after the other: tokens, mask [B, T], start, length [B]."""
        parts = [(r["prompt"], r[side]) for side in sides for r in self.rows]
        tokens, mask = collate(parts, self.pad, self.c.device)
        start, length = mask.argmax(1), mask.sum(1).long()
        return SimpleNamespace(tokens=tokens, mask=mask, start=start, length=length,
                               ends=(tokens, start + length, start))

    @cached_property
    def pairs(self):
        """All chosen responses, then all rejected ones: one forward pass."""
        return self.of("chosen", "rejected")


def scores(batch):
    """A reward model's scores of both sides, at the last token, in float32.   [B] each"""
    score = sequence_score(batch.model, *batch.pairs.ends)                               # [2B]
    return dict(zip(("chosen", "rejected"), score.chunk(2)))


FACTS = dict(chosen=scores)      # a loss's argument: batch -> {name: tensor} of it and its like
UNITS = dict(chosen=len)         # … : rows -> what the step's summed loss is divided by


def provide(model, rows, names, c, pad, generator):
    """What a loss names among its positional arguments, for these rows: {name: tensor}."""
    batch, known = Batch(model, rows, c, pad, generator), {}
    for name in names:
        if name in known:
            continue
        if name in FACTS:
            known |= FACTS[name](batch)
        else:
            numbers = [r[name] for r in rows]
            known[name] = torch.tensor(numbers, dtype=torch.float32, device=c.device)
    return {k: known[k] for k in names}


def units(names, rows):
    """What the step's summed loss is divided by: the last argument that has a unit says."""
    return next((UNITS[k] for k in reversed(names) if k in UNITS), len)(rows)


def pair_metrics(known):
    """How far the two scores of a pair are apart, in the micro-batch at hand."""
    if "rejected" not in known:
        return {}
    win, lose = known["chosen"].detach(), known["rejected"].detach()
    return dict(gap=(win - lose).mean(), accuracy=accuracy(win, lose),
                score_std=win.std(correction=0))


def fit(model, rows, loss, c, run, tok, *, seed=0, steps=0, name="", write=None, apart=()):
    """The training loop of everything here: shuffle, score, step, tell -> whether it has ended.

    steps 0: c.steps, or c.epochs passes. write(model, folder): saves the checkpoints of a run with
    a single stage, which then resumes exactly (apart: prefixes of the weights that are not in that
    folder); a run of several stages resumes after the last finished one (Run.stage)."""
    names = needs(loss)
    if write and run.state:
        model.load_state_dict(run.state["apart"], strict=False)
    whole = shard(recomputing(model, c.recompute), c.dtype)              # over torchrun's ranks
    total = steps or c.steps or max(1, math.ceil(len(rows) * c.epochs / c.batch))
    opt = optimiser(model, RULES[c.optimiser], c.lr, c.weight_decay, seed, aux_lr=c.aux_lr)
    g = torch.Generator().manual_seed(seed)
    if write:
        outlook(c, run, model, rows, opt)
    if write and run.state:
        opt.load_state_dict(run.state.pop("opt"))
        g.set_state(run.state["rng"])
    for step in run.steps(total) if write else trange(total, desc=name, leave=False, disable=None):
        # 1. get data
        picked = [rows[i] for i in batch_indices(len(rows), c.batch, step, seed).tolist()]
        count, value = units(names, picked), 0.0
        # 2. score
        for where, weight in passes(torch.arange(len(picked)), c.micro):
            with autocast(c.device, c.dtype):
                some = [picked[i] for i in where.tolist()]
                known = provide(model, some, names, c, tok.pad or 0, g)
                part = loss(**known).sum() / count
            (part * weight).backward()
            value += part.item() * (weight > 0)
        # 3. update
        norm = clip_gradients(model, c.clip).item()
        set_lr(opt, c.lr * linear(step, total, c.warmup))
        opt.step()
        opt.zero_grad()
        # 4. tell
        metrics = summed(dict(loss=value)) | dict(norm=norm) | pair_metrics(known)
        run.log(run.at + step + 1, **{f"{name} {k}".strip(): v for k, v in metrics.items()})
        if write and ((step + 1) % c.save_every == 0 or step + 1 in (total, c.stop)):
            net, state = whole(), opt.state_dict()               # every rank takes part
            named = net.state_dict() if net else {}
            other = {k: x for k, x in named.items() if k.startswith(apart)}
            run.save(step + 1, partial(write, net), opt=state, rng=g.get_state(),
                     apart=other | adapter_state(net))
    run.at += total
    return not (write and c.stop and c.stop < total)


# --- evaluate: labelled pairs, and samples of the policy that a reward will steer -----------------
# score([(prompt ids, response ids)]) -> [N];  sample(problems, n, seed) -> (n responses each, as
# ids, whether each has ended)


def ece(conf, correct, bins=5):
    """Expected calibration error, equal bins on (0.5, 1]:  Σ n_b/n |mean conf - share right|."""
    which = ((conf - 0.5) * 2 * bins).ceil().clamp(1, bins)
    gaps = [(conf[which == b].mean() - correct[which == b].mean()).abs()
            * (which == b).float().mean() for b in range(1, bins + 1) if (which == b).any()]
    return float(sum(gaps))


def grade(win, lose):
    """Accuracy, ECE, Brier score of pairs, p = σ(r_c - r_r) -> (dict, conf [N], right [N])."""
    p = torch.sigmoid(win - lose)
    conf, right = torch.maximum(p, 1 - p), (p > 0.5).float()
    return dict(n=len(p), accuracy=accuracy(win, lose), ece=ece(conf, right),
                brier=((1 - p) ** 2).mean().item()), conf, right


def grade_sets(score, sets, say):
    """Held-out sets and their subsets, a line said of each -> ([row], conf [N], right [N])."""
    say(f"\n  {'pairs':<26}{'n':>6}{'accuracy':>10}{'ECE':>8}{'Brier':>8}   "
        "(chance: accuracy 0.5)")
    table, points = [], []
    for name, rows in sets.items():
        win = score([(row["prompt"], row["chosen"]) for row in rows])
        lose = score([(row["prompt"], row["rejected"]) for row in rows])
        where = {id(row): i for i, row in enumerate(rows)}
        for part, members in prefs.subsets(name, rows).items():
            at = [where[id(row)] for row in members]
            row, *point = grade(win[at], lose[at])
            table.append(dict(subset=part) | row)
            points += [point] if part == name else []
            say(f"  {part:<26}{row['n']:>6}{row['accuracy']:>10.3f}{row['ece']:>8.3f}"
                f"{row['brier']:>8.3f}")
    return table, *map(torch.cat, zip(*points))


def study(score, sample, world, tok, split, seed, prompts=48, n=64):
    """What a reward makes of samples of the policy that it will steer -> (numbers, curve).

    Spearman with gold within a prompt, and with length over all; best of n, with its KL bound."""
    problems = world.problems(split, prompts, seed)
    ys, done = sample(problems, n, seed + 1)
    ends = [[*y, tok.eos] if d else y for y, d in zip(ys, done)]
    proxy = score([(tok.prompt(problems[i // n]), y) for i, y in enumerate(ends)]).view(prompts, n)
    gold = torch.tensor([world.reward(problems[i // n], tok.decode(y), d)
                         for i, (y, d) in enumerate(zip(ys, done))]).view(prompts, n)
    proxy = (proxy - proxy.mean()) / proxy.std().clamp(min=1e-8)
    curve = [dict(n=k, kl=bon_kl(k), proxy=best_of_n(proxy, proxy, k).mean().item(),
                  gold=best_of_n(proxy, gold, k).mean().item()) for k in (1, 2, 4, 8, 16, 32)]
    length = torch.tensor([float(len(y)) for y in ends])
    return dict(spearman=statistics.fmean(map(spearman, proxy, gold)),
                length_spearman=spearman(proxy.flatten(), length), sft_gold=gold.mean().item(),
                bon8_gold=curve[3]["gold"], bon32_gold=curve[5]["gold"]), curve


def examine(score, sample, world, tok, sets, seed, say, path):
    """The evaluation of a reward, said and drawn -> dict of floats.

    sets {name: encoded pairs}; world None: pairs alone, else also best of n and chapter null."""
    table, conf, right = grade_sets(score, sets, say)
    out, curves = {row["subset"]: row["accuracy"] for row in table if row["subset"] in sets}, {}
    out["accuracy"] = statistics.fmean(out.values())
    for row in table:
        out |= {f"{row['subset'].replace(' ', '_')}_{k}": row[k] for k in ("accuracy", "ece")}
    if world:
        for split in ("val", "ood"):
            numbers, curves[split] = study(score, sample, world, tok, split, seed)
            out |= {f"{split}_{k}": v for k, v in numbers.items()}
        hacks, text = attacks(score, sample, world, tok, seed)
        out |= hacks
        say(f"\n  samples of the SFT model: Spearman with gold within a prompt "
            f"{out['val_spearman']:.2f} (ood {out['ood_spearman']:.2f}), with length "
            f"{out['val_length_spearman']:.2f}\n  null model: the constant {text!r} beats "
            f"{hacks['null_wins']:.0%} of SFT samples by this reward, "
            f"{hacks['null_wins_gold']:.0%} by gold\n  padding raises this reward in "
            f"{hacks['padding_wins']:.0%} of samples, gold in {hacks['padding_wins_gold']:.0%}\n\n"
            "  best of n " + "".join(f"{p['n']:>8}" for p in curves["val"]))
        for split, curve in curves.items():
            for what in ("proxy", "gold"):
                say(f"  {split + ' ' + what:<10}" + "".join(f"{p[what]:>8.2f}" for p in curve))
    draw_evaluation(path, conf, right, [(row["subset"], row["accuracy"]) for row in table], curves)
    return out


def samples_of(policy, tok, world, problems, c, seed, samples=2, temperature=1.0):
    """`samples` responses of a policy to each of a world's problems -> Rollout."""
    with autocast(c.device, c.dtype):
        return generate(policy, [tok.prompt(p) for p in problems], world.max_new, samples=samples,
                        temperature=temperature, generator=torch.Generator().manual_seed(seed))


def evaluate(reward, policy, sets, tok, c, run):
    """examine() of a reward on held-out pairs, and in a world on the policy's samples."""
    world = tasks.task(c.data) if c.data in WORLDS else None

    def score(rows):
        rows = [dict(prompt=x, chosen=y) for x, y in rows]
        return score_rows(reward, rows, "chosen", c, tok.pad or 0)

    def sample(problems, n, seed):
        roll = samples_of(policy, tok, world, problems, c, seed, n)
        return roll.completions(), roll.finished.tolist()
    return examine(score, sample, world, tok, sets, c.seed, run.say, run.folder / "eval.png")


# --- recipes: a system each, from data to numbers -------------------------------------------------
# What a recipe names among its positional arguments is made for it: see `arguments`.


def start(c):
    """The base that a recipe starts from: policy (frozen), tok, pad, context, world (None for a
    file)."""
    folder = sft.find(c.init, c.config, device=c.device)
    policy, tok = (load_frozen(folder, c) if c.peft in ADAPTERS else
                   load(folder, c.device, chat=c.chat))
    return SimpleNamespace(policy=policy.requires_grad_(False), folder=folder, tok=tok,
                           pad=tok.pad or 0,
                           context=c.context or policy.config.max_position_embeddings,
                           world=tasks.task(c.data) if c.data in WORLDS else None)


def pair_sets(c, tok, context, ties=False):
    """(training rows, {name: held-out rows}) of --data as ids; with --eval no training rows."""
    rows, held = prefs.pair_sets(c.data, c.rows, c.noise, c.seed, ties, bool(c.eval),
                                 **tasks.reading(c))
    encoded = partial(prefs.encode_pairs, tok=tok, context=context, chat=c.chat)
    return [] if c.eval else encoded(rows, what="train"), {
        k: encoded(some, what=k) for k, some in held.items() if some}


def new_scalar(body, seed, share=False):
    """A reward model with the language model's body and a small random head; share: see from_lm."""
    model, g = ScalarModel.from_lm(body, share=share), torch.Generator().manual_seed(seed)
    model.score.weight.data.copy_(torch.randn(model.score.weight.shape, generator=g)
                                  / math.sqrt(body.config.hidden_size + 1))
    return model


def introduce(c, run, tok, model, rows):
    """Say what is trained, and show a pair."""
    size = sum(p.numel() for p in model.parameters()) / 1e6
    run.say(f"{run.folder}: {size:.2f} M parameters, {len(rows)} pairs, {c.computes}")
    for side in ("chosen", "rejected"):
        ids = rows[0]["prompt"] + rows[0][side]
        run.say(f"  {side:<9}{tok.decode(ids, skip_specials=False)[-300:]!r}")


def outlook(c, run, model, rows, opt):
    """Say what the run will hold: a micro-batch of the longest rows, which are pairs or answers."""
    sides = sorted(rows[0].keys() & {"chosen", "rejected", "answer"})
    width = max(len(r["prompt"]) + len(r[side]) for r in rows for side in sides)
    work = Work(c.micro, width, c.batch, sides=len(sides), recompute=c.recompute)
    foresee(run, c, work, [model], (), state_bytes(opt))


def scalar(c, run, base, pairs, loss, last, peft):
    """One reward model on pairs: a …ForSequenceClassification folder.

    last: the newest checkpoint of a resumed run; peft: see model.PEFT."""
    rows, sets = pairs
    whole = last and c.peft not in ADAPTERS                      # else fit() reads what was trained
    model = with_peft(load(last, c.device)[0] if whole else
                      new_scalar(base.policy, c.seed, c.peft in ADAPTERS), c, peft)
    introduce(c, run, base.tok, model, rows)
    if not fit(model, rows, loss, c, run, base.tok, seed=c.seed,
               write=lambda net, folder: save_trained(net, base.tok, folder, c, base.folder)):
        return {}
    return evaluate(scalar_reward(model, c), base.policy, sets, base.tok, c, run)


def mean(scores):
    """The mean of an ensemble's members.   [K, B] -> [B]"""
    return scores.mean(0)


RECIPES = dict(bt=scalar)
AGGREGATES = dict(mean=mean)
AXES = dict(recipe=RECIPES, loss=LOSSES, aggregate=AGGREGATES, optimiser=RULES,
            peft=PEFT, kernels=kernels.MODES)
WORLDS_OF = {}                   # recipe: the worlds whose gold reward it reads (else any data)
CHECKS = {}                      # recipe: (c, f) -> None, UserError before anything is made
SPREAD = ["bt"]                  # recipes that torchrun may spread over ranks
INSTEAD = {}                     # an option: (c, run) -> numbers, in the place of a recipe
EXAMINE = {}                     # a file beside weights: (model, tensors, tok, c, run) -> numbers
OF_PAIRS = {}                    # … of a model that scores pairs: the world that they are of


def arguments(c, f, run):
    """What the recipe names, and only that: {name: value}."""
    names = needs(f.recipe)
    known = dict(c=c, run=run, loss=f.loss, aggregate=f.aggregate, rows=c.rows, noise=c.noise,
                 last=run.last, peft=f.peft)
    if "base" in names:
        base = known["base"] = start(c)
        known["encoded"] = partial(prefs.encode_pairs, tok=base.tok, context=base.context)
    if "pairs" in names:
        known["pairs"] = pair_sets(c, base.tok, base.context, ties="tie" in needs(f.loss))
    return {k: known[k] for k in names}


# --- train ----------------------------------------------------------------------------------------


def train(c, f):
    """One run of a recipe, or with --eval only the table of a reward model -> the numbers."""
    start_ranks(c.device)                                      # alone without torchrun
    use(c)
    check(c, f)
    if starts_from_base(c, f):
        sft.find(c.init, c.config, device=c.device)            # made before this run's clock starts
    with Run(c, f, "reward", CURVES) as run:
        out = INSTEAD["eval"](c, run) if c.eval else f.recipe(**arguments(c, f, run))
        if not out:                                            # --stop came first
            return run.say(f"  paused at step {c.stop}: the same command with --resume and no "
                           "--stop goes on")
        run.say(f"\n  {run.folder}: log.jsonl, pictures" + f"; checkpoint {run.last}"
                * bool(run.last))
        return run.finish(**out)


def main(argv=None):
    """python reward.py …: see the docstring above, or --help."""
    return launch("reward", Config, PRESETS, AXES, __doc__, train, argv, readers, ranks=True)


# === lora: 2106.09685, adapters in the place of all weights; their base is the reference ==========

PRESETS["lora"] = dict(peft="lora", lr=4e-3)                 # ours: four times full training's

# === checks: what a run does not read, and what does not combine, told before anything is made ====


def beside(folder):
    """The file that a checkpoint has beside its weights and EXAMINE reads; without one no name."""
    paths = (checkpoint(folder) / name for name in EXAMINE)
    return next((path for path in paths if path.exists()), Path())


def starts_from_base(c, f):
    """Whether a run reads --init: it trains from there, or scores samples of it."""
    if c.eval:
        return c.data in WORLDS and beside(c.eval).name not in OF_PAIRS
    return "base" in needs(f.recipe)


def readers(c, f):
    """{field: (whether this run reads it, what does)} of the fields that not every run reads."""
    names, world = set(needs(f.recipe)), c.data in WORLDS
    fields = dict(
        data=("base" in names, "recipes that start from --init"),
        init=("base" in names, "other recipes"),
        context=(bool(names & {"pairs", "encoded"}), "recipes that train on pairs"),
        chat=("pairs" in names, "recipes that train on the pairs of --data"),
        rows=(bool(names & {"pairs", "rows"}), "recipes that train on pairs"),
        noise=(bool(names & {"pairs", "noise"}) and world, "a world's training labels"),
        loss=("loss" in names, "recipes that leave the loss open"),
        aggregate=("aggregate" in names, "--recipe ensemble"),
        epochs=(not c.steps, "runs without --steps"),
        peft=("peft" in names, "--recipe bt"), **adapter_readers(c),
        eval_every=(False, "scripts that evaluate while they train"),
        compile=(False, "sft.py, ppo.py and grpo.py"),
        slots=(False, "grpo.py, ppo.py and dpo.py"))
    fields |= {key: (read and "pairs" in names, words)
               for key, (read, words) in tasks.file_readers(c, pairs=True).items()}
    single = "last" in names, "recipes of one stage: others save and resume by stages"
    fields |= dict.fromkeys(("stop", "save_every", "keep"), single)
    if c.eval:
        trains = ("recipe", "loss", "aggregate", "noise", "steps", "epochs", "batch", "optimiser",
                  "lr", "aux_lr", "warmup", "weight_decay", "clip", "save_every", "keep", "stop")
        fields |= dict.fromkeys(trains, (False, "training, without --eval"))
        alone = beside(c.eval).name not in OF_PAIRS
        fields |= dict(data=(True, "")) | dict.fromkeys(("context", "chat"), (
            alone, "models of single responses"))
        fields |= dict(init=(starts_from_base(c, f), "worlds, where it gives the samples"),
                       rows=(not world, "files"))
    return fields


def check(c, f):
    """UserError for all that can be known before anything is made."""
    if c.eval and not INSTEAD:
        raise UserError("--eval: this script trains only; reward.py evaluates checkpoints")
    if ranks() > 1 and (c.eval or c.recipe not in SPREAD or c.loss == "goal"):
        raise UserError(f"--eval, --loss goal and --recipe {c.recipe} run on one rank: start them "
                        "without torchrun")
    check_adapters(c, c.init)
    if not c.eval and not starts_from_base(c, f):
        return
    prefs.check_pairs(c.data, whole=bool(c.eval), val=c.val)
    if c.eval:
        peek(c.eval, scalar=True, option="--eval")
        world = OF_PAIRS.get(beside(c.eval).name, c.data)
        if c.data != world:
            raise UserError(f"--eval {c.eval} is a model of {world}'s pairs: give --config {world}")
    worlds = WORLDS_OF.get(c.recipe)
    if worlds and not c.eval and c.data not in worlds:
        raise UserError(f"--recipe {c.recipe} needs --data {' or '.join(worlds)}, whose gold "
                        f"reward it uses; not {c.data}")
    if not starts_from_base(c, f):
        return
    if not c.init.startswith("base:") and beside(c.init).name:
        raise UserError(f"--init {c.init} is a reward model already: --eval {c.init} evaluates it")
    most = sft.find(c.init, c.config, make=False)
    if c.context > most:
        raise UserError(f"--context {c.context} exceeds the {most} tokens of {c.init}: lower it")
    if c.recipe in CHECKS and not c.eval:
        CHECKS[c.recipe](c, f)


# === eval: the table of any reward model's checkpoint, nothing trained ============================


def judge_pairs(reward, model, tok, c, run):
    """A reward's table: held-out pairs, and in a world samples of --init."""
    sets = pair_sets(c, tok, c.context or model.config.max_position_embeddings)[1]
    policy = start(c).policy if c.data in WORLDS else None
    return evaluate(reward, policy, sets, tok, c, run)


def judge_checkpoint(c, run):
    """--eval: the table of a reward model, of all that its folder holds."""
    run.begin()                                  # pictures are made before there is a result
    model, tok = load(c.eval, c.device, chat=c.chat)
    if (path := beside(c.eval)).name:
        return EXAMINE[path.name](model, load_file(path, str(c.device)), tok, c, run)
    return judge_pairs(scalar_reward(model, c), model, tok, c, run)


INSTEAD["eval"] = judge_checkpoint


# === picture: a reward model's reliability, accuracy by subset, best of n =========================

def draw_evaluation(path, conf, correct, table, curves):
    """A reward model's picture: reliability, accuracy by subset [(name, accuracy)], and best-of-n
    curves {split: [dict(kl, proxy, gold)]}, where there are any."""
    plt = pyplot()
    fig, axes = plt.subplots(1, 3 if curves else 2, figsize=(14 if curves else 9.4, 3.8))
    edges = torch.linspace(0.5, 1, 11)
    inside = [(conf > a) & (conf <= b) for a, b in zip(edges, edges[1:])]
    axes[0].plot([0.5, 1], [0.5, 1], color="gray", lw=1, ls=":")
    axes[0].plot(*zip(*[(conf[k].mean(), correct[k].mean()) for k in inside if k.any()]),
                 marker="o", ms=3)
    axes[0].set(xlabel="confidence", ylabel="share correct", title="reliability, held-out pairs")
    axes[1].barh(*zip(*table))
    axes[1].axvline(0.5, color="gray", lw=1, ls=":")
    axes[1].set(xlabel="accuracy (chance 0.5)", xlim=(0, 1))
    axes[1].invert_yaxis()
    for i, (split, curve) in enumerate(curves.items()):
        for what, style in (("proxy", "--"), ("gold", "-")):
            axes[2].plot([p["kl"] ** 0.5 for p in curve], [p[what] for p in curve], style,
                         color=f"C{i}", label=f"{split} {what}", marker="o", ms=3)
    if curves:
        axes[2].set(xlabel="sqrt KL of best of n, nats", title="best of n by this reward")
        axes[2].legend()
    fig.tight_layout()
    fig.savefig(path)
    plt.close(fig)


# === null: 2410.07137, two cheap attacks: a constant response, and padding ========================

def null_attack(score, ids, seed=0, iterations=300, longest=16):
    """The constant response that a reward likes best (2410.07137): random edits, kept while
    score(ids) rises.

    score: list of ids -> float, its mean over the search prompts; ids: the alphabet."""
    g = random.Random(seed)
    best = [g.choice(ids) for _ in range(4)]
    top = score(best)
    for _ in range(iterations):
        new, at, edit = list(best), g.randrange(len(best)), g.choice(("swap", "add", "cut"))
        if edit == "cut" and len(best) > 1:
            del new[at]
        elif edit == "add" and len(best) < longest:
            new.insert(at, g.choice(ids))
        else:
            new[at] = g.choice(ids)
        if (now := score(new)) > top:
            best, top = new, now
    return best


def attacks(score, sample, world, tok, seed, search=64, test=128, extra=4):
    """Two cheap attacks -> (numbers, the null model's text).

    null_wins: how often the constant response that null_attack found on 64 prompts beats samples of
    others; padding_wins: how often saying a sample's last token `extra` more times raises its
    score; also by gold."""
    problems = world.problems("val", search + test, seed + 7)
    prompts, held = [tok.prompt(p) for p in problems], problems[search:]

    def of_a_constant(y):
        return score([(x, [*y, tok.eos]) for x in prompts[:search]]).mean().item()

    def of(responses):
        return score(list(zip(prompts[search:], responses)))

    def gold(responses, finished):
        return torch.tensor([world.reward(p, tok.decode(y), d)
                             for p, y, d in zip(held, responses, finished)])
    null = null_attack(of_a_constant, [i for i in range(tok.vocab_size) if i not in tok.hidden],
                       seed)
    ys, done = sample(held, 1, seed + 8)
    ends = [[*y, tok.eos] if d else y for y, d in zip(ys, done)]
    long = [[*y, *y[-1:] * extra] for y in ys]
    keep = torch.tensor([bool(y) and d for y, d in zip(ys, done)])       # those that have an end
    return dict(
        null_wins=accuracy(of([[*null, tok.eos]] * test), of(ends)),
        null_wins_gold=accuracy(gold([null] * test, [True] * test), gold(ys, done)),
        padding_wins=accuracy(of([[*y, tok.eos] for y in long])[keep], of(ends)[keep]),
        padding_wins_gold=accuracy(gold(long, done)[keep], gold(ys, done)[keep])), tok.decode(null)


# === margin: 2307.09288, Llama 2: stronger preferences must be further apart ======================

def bt_margin(chosen, rejected, strength, *, unit: Positive = 1.0):
    """-log σ(d - m): stronger preferences must be further apart (Llama 2, 2307.09288).

    m = unit strength"""
    return -F.logsigmoid(chosen - rejected - unit * strength)


LOSSES["margin"] = bt_margin


# === smooth: label smoothing, labels believed wrong with probability e ============================

def bt_smooth(chosen, rejected, *, flip: Range("[0, 0.5)") = 0.1):
    """-(1-e) log σ(d) - e log σ(-d), e the share of labels believed wrong: d* = log((1-e)/e)."""
    d = chosen - rejected
    return -(1 - flip) * F.logsigmoid(d) - flip * F.logsigmoid(-d)


LOSSES["smooth"] = bt_smooth


# === win_tie: 2512.22170, SoliReward: ties pull two scores together ===============================

def win_tie(chosen, rejected, tie, *, margin=3.0, tie_coef=1.0):
    """SoliReward, 2512.22170:  a win -log σ(d - m);  a tie -log σ(d - m) - log σ(-d - m), least at
    d = 0.

    Without ties and with margin 0 it is bt. tie [B] is 1.0 where neither response is better."""
    d = chosen - rejected
    win = -F.logsigmoid(d - margin)
    return (1 - tie) * win + tie * tie_coef * (win - F.logsigmoid(-d - margin))


LOSSES["win_tie"] = win_tie


# === goal: 2407.13887, early states of a response point to where the chosen one ends ==============

def goal(early, late, wrong, chosen, rejected, *, weight=0.5):
    """Goal-conditioned contrastive term (2407.13887) on top of bt:  w (-log p+ - log(1 - p-)).

    early, late [B, S, D]: hidden states of the chosen response, wrong [B, S, D] of the rejected
    one; p+ is the mean of σ(cos(early, late)), p- with wrong, over the pass: --micro matters."""
    early, late, wrong = (F.normalize(h, dim=-1) for h in (early, late, wrong))
    plus, minus = (torch.sigmoid(early @ x.transpose(1, 2)).mean() for x in (late, wrong))
    return bt(chosen, rejected) + weight * (-plus.log() - (1 - minus).log())


def goal_states(hidden, start, n, generator, draws=16):
    """`goal`'s states: positions a <= b of the chosen response, any of the rejected.

    hidden [2B, T, D], start and n [2B] of the responses -> early, late, wrong [B, S, D]"""
    B = len(n) // 2
    u = torch.rand(3, B, draws, generator=generator).to(hidden.device)
    ab = (u[:2] * n[:B, None]).long().sort(0).values                                     # [2, B, S]

    def at(offset, which):
        where = (start[which, None] + offset)[..., None].expand(-1, -1, hidden.size(2))
        return hidden[which].gather(1, where)
    return dict(early=at(ab[0], slice(0, B)), late=at(ab[1], slice(0, B)),
                wrong=at((u[2] * n[B:, None]).long(), slice(B, None)))


def states_of(batch):
    """goal_states of a batch, and its scores, of one forward pass."""
    part, model = batch.pairs, batch.model
    hidden = model(part.tokens, states=True)                                         # [2B, T, D]
    last = hidden[torch.arange(len(hidden)), part.start + part.length - 1]               # [2B, D]
    return goal_states(hidden.float(), part.start, part.length, batch.generator) | dict(
        zip(("chosen", "rejected"), model.read(last).chunk(2)))


LOSSES["goal"], FACTS["early"] = goal, states_of


# === stages: what systems of several models share, each trained once and kept in the run's folder =

def trained(run, name, model, rows, loss, c, tok, finish=None, **options):
    """A stage's model, frozen: fitted now and saved as the run's folder `name`, or loaded where a
    resumed run has it. finish(model): what is saved."""
    teach = partial(fit, model, rows, loss, c, run, tok, name=name, **dict(seed=c.seed) | options)

    def write(folder):
        teach()
        save(finish(model) if finish else model, tok, folder)
    model.to(c.device).requires_grad_()
    return load(run.stage(name, write), c.device)[0].requires_grad_(False)


def ending(ids, pad, c):
    """Sequences of ids without a response -> tokens [N, T] and their lengths [N]."""
    tokens, mask = collate([((), x) for x in ids], pad, c.device)
    return tokens, mask.sum(1).long()


def pair_accuracy(reward, rows, c, pad):
    """Share of encoded pairs whose chosen response scores higher (equal: half)."""
    return accuracy(*(score_rows(reward, rows, side, c, pad) for side in ("chosen", "rejected")))


def score_roll(reward, roll):
    """[B] scores of a rollout's completions, on the CPU."""
    return reward(roll.tokens, roll.prompt_len, roll.prompt_len + roll.mask.sum(1).long()).cpu()


def gold_of(world, problems, roll, tok):
    """The world's gold reward of every completion, on the CPU.   [B]"""
    per = len(roll.tokens) // len(problems)
    return torch.tensor([world.reward(problems[i // per], tok.decode(ids), done) for i, (ids, done)
                         in enumerate(zip(roll.completions(), roll.finished.tolist()))])


def listed(run, out):
    """A result, said a line a number where it has no other table (curves are left out)."""
    run.say("  " + "\n  ".join(f"{k:<40} {v:.3f}" for k, v in out.items() if "@" not in k))
    return out


# === regression: 2406.08673, HelpSteer2: five attributes, combined with fixed weights =============

RATING_WEIGHTS = (0.65, 0.8, 0.45, 0.55, -0.4)   # the paper's appendix H; the last is verbosity


def regression(predicted, ratings):
    """HelpSteer2 (2406.08673): squared error on every attribute that has a label (NaN: none).

    [B, K] -> [B]; the loop divides by the labels of the step, not by its rows."""
    known = ratings.isfinite()
    return ((predicted - ratings.nan_to_num()) ** 2 * known).sum(1)


def predictions(batch):
    """A rater's ratings of the answers, in float32.   [B, K]"""
    part = batch.of("answer")
    h = last_hidden(batch.model, *part.ends)                                             # [B, D]
    return dict(predicted=(h[:, None] * batch.model.ratings.weight).sum(-1))


def known_labels(rows):
    """How many ratings the rows have."""
    return sum(math.isfinite(x) for r in rows for x in r["ratings"])


def rated(rows, ratings):
    """Pairs -> single responses, all chosen ones first, with ratings(prompt, response), 0 to 4
    each, for `regression`."""
    return [dict(prompt=r["prompt"], answer=r[side],
                 ratings=ratings(r["text"]["prompt"], r["text"][side]))
            for side in ("chosen", "rejected") for r in rows]


def new_rater(body, seed, attributes=len(RATING_WEIGHTS)):
    """A reward model with a head for each attribute besides its score."""
    model = new_scalar(body, seed)
    model.ratings = nn.Linear(body.config.hidden_size, attributes, bias=False)
    model.ratings.to(body.head.device)
    nn.init.zeros_(model.ratings.weight)
    return model


def folded(model, weights=RATING_WEIGHTS):
    """A rater as a plain reward model: its score is the fixed combination of the ratings."""
    plain = copy.deepcopy(model)
    heads = model.ratings.weight.detach()                                                # [K, D]
    plain.score.weight.data = torch.tensor([weights]).to(heads) @ heads
    del plain.ratings
    return plain


def rater(c, run, base, pairs, last):
    """One rater, saved as the reward model that its ratings come to."""
    rows, sets = pairs
    model = load(last, c.device)[0] if last else new_scalar(base.policy, c.seed)
    model.ratings = new_rater(base.policy, c.seed).ratings
    introduce(c, run, base.tok, model, rows)
    if not fit(model, rated(rows, base.world.ratings), regression, c, run, base.tok, seed=c.seed,
               write=lambda net, folder: save(folded(net), base.tok, folder), apart=("ratings",)):
        return {}
    return evaluate(scalar_reward(folded(model), c), base.policy, sets, base.tok, c, run)


FACTS["predicted"], UNITS["ratings"] = predictions, known_labels
RECIPES["regression"], WORLDS_OF["regression"] = rater, ("ring",)


# === scaled, hs2pref: 2410.01257, HelpSteer2-Preference: a rater, then BT by strength, extrapolated

def bt_scaled(chosen, rejected, strength):
    """-m log σ(d), m in {1, 2, 3}: stronger preferences count more (2410.01257)."""
    return -strength * F.logsigmoid(chosen - rejected)


def hs2pref(c, run, base, pairs, *, expo=1.52):
    """HelpSteer2-Preference (2410.01257): regression on helpfulness alone, scaled BT from there,
    body and head, then ExPO: θ1 + a (θ2 - θ1). Helpfulness, a response's overall quality, is here
    the fifth of the gold reward (ours)."""
    rows, sets = pairs
    one = trained(run, "regression", new_rater(base.policy, c.seed, 1),
                  rated(rows, base.world.helpfulness), regression, c, base.tok,
                  partial(folded, weights=(1.0,)))
    two = trained(run, "scaled", copy.deepcopy(one), rows, bt_scaled, c, base.tok)
    far = copy.deepcopy(two)
    for p, a, b in zip(far.parameters(), one.parameters(), two.parameters()):
        p.copy_(a + expo * (b - a))
    run.stage("final", lambda folder: save(far, base.tok, folder))
    return evaluate(scalar_reward(far, c), base.policy, sets, base.tok, c, run)


LOSSES["scaled"] = bt_scaled
RECIPES["hs2pref"], WORLDS_OF["hs2pref"] = hs2pref, ("ring",)


# === ridge: heads for ratings on frozen features, and how much verbosity to take out of them ======

PENALTIES = (0, .01, .025, .05, .075, .1, .125, *(i / 20 for i in range(3, 20)))


def ridge_weights(X, Y, alpha):
    """argmin_W Σ (X W - Y)² + α|W|² over the labelled rows of each column.

    X [N, D], Y [N, K], NaN where there is no label -> [K, D]"""
    rows = [(X[k], y[k]) for y in Y.T for k in [y.isfinite()]]
    eye = torch.eye(X.size(1), dtype=X.dtype)
    return torch.stack([torch.linalg.solve(x.T @ x + alpha * eye, x.T @ y) for x, y in rows])


def best_ridge(X, Y):
    """ridge_weights() with the α that a fifth of the rows likes best -> (W [K, D], α)"""
    held = torch.arange(len(X)) % 5 == 0

    def error(alpha):
        W = ridge_weights(X[~held], Y[~held], alpha)
        return (X[held] @ W.T - Y[held]).square().mean()
    alpha = min((10.0 ** e for e in range(-4, 5)), key=error)
    return ridge_weights(X, Y, alpha).float(), alpha


def verbosity_penalties(R, v, threshold=0.03):
    """The smallest λ_k of PENALTIES with Spearman(r_k - λ_k r_v, r_v) <= threshold (2406.12845).

    R [N, K] ratings, v the verbosity column -> [K]; 1 where none passes, and for v."""
    def smallest(k):
        passing = (x for x in PENALTIES
                   if spearman(R[:, k] - x * R[:, v], R[:, v]) <= threshold)
        return next(passing, 1.0) if k != v else 1.0
    return torch.tensor([smallest(k) for k in range(R.size(1))])


# === armo: 2406.12845, ArmoRM: ridge heads, verbosity taken out, and a gate that reads the prompt =

class Gate(nn.Module):
    """ArmoRM's gate (2406.12845):  softmax(MLP(h)/10) c, sums to c.   h [B, D] -> [B, K]"""

    def __init__(self, width, outputs, hidden=1024):
        super().__init__()
        sizes = [width, hidden, hidden, hidden, outputs]
        layers = [m for i, o in zip(sizes, sizes[1:]) for m in (nn.Linear(i, o), nn.ReLU())]
        self.mlp = nn.Sequential(*layers[:-1])
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, h):
        return torch.softmax(self.mlp(h) / 10, -1) * self.scale


def train_gate(gate, at_prompt, gap, c, steps, lr):
    """Bradley-Terry on the gated sum of the ratings' gaps.   at_prompt [N, D], gap [N, K]"""
    opt = torch.optim.AdamW(gate.parameters(), lr=lr, weight_decay=0.0)
    for step in range(steps):
        k = batch_indices(len(gap), 256, step, c.seed)
        opt.param_groups[0]["lr"] = lr * cosine(step, steps)
        opt.zero_grad()
        bt((gate(at_prompt[k]) * gap[k]).sum(1), torch.zeros(len(k))).mean().backward()
        opt.step()


def armo(c, run, base, pairs, *, gate_steps=500, gate_lr: Positive = 1e-3, hidden: Count = 256,
         train_raw=False):
    """ArmoRM (2406.12845): ridge heads on frozen features, less verbosity; a prompt-only gate.

    train_raw: the gate trains on ratings with verbosity in them, as in the released script."""
    rows, sets = pairs
    both = rated(rows, base.world.ratings)
    body = trained(run, "body", new_rater(base.policy, c.seed), both, regression, c, base.tok,
                   folded)

    def states(ids):
        tokens, end = ending(ids, base.pad, c)
        return chunked(lambda t, _, end: last_hidden(body, t, end), c)(tokens, end, end).cpu()
    X = states([r["prompt"] + r["answer"] for r in both]).double()                       # [N, D]
    W, alpha = best_ridge(X, torch.tensor([r["ratings"] for r in both]).double() / 4)    # [K, D]
    v = len(prefs.ATTRIBUTES) - 1
    penalty = verbosity_penalties(X[::max(1, len(X) // 2000)].float() @ W.T, v)          # [K]
    clean = W - penalty[:, None] * W[v]
    run.say(f"  ridge alpha {alpha:g}; verbosity penalties "
            + ", ".join(f"{a} {p:.3g}" for a, p in zip(prefs.ATTRIBUTES, penalty)))
    torch.manual_seed(c.seed)
    gate = Gate(W.size(1), len(W), hidden)
    gap = (X[:len(rows)] - X[len(rows):]).float() @ (W if train_raw else clean).T        # [N, K]
    train_gate(gate, states([r["prompt"] for r in rows]), gap, c, gate_steps, gate_lr)
    save_file({f"gate.{k}": x for k, x in gate.state_dict().items()}
              | dict(ratings=clean.contiguous()), run.folder / "body" / "armo.safetensors")
    return evaluate(gated(body, gate, clean, c), base.policy, sets, base.tok, c, run)


def gated(body, gate, ratings, c):
    """ArmoRM's reward: ratings of the last token, weighed by what the gate reads of the prompt."""
    def reward(tokens, start, end):
        h, at_start = (last_hidden(body, tokens, t).cpu() for t in (end, start))
        return (gate(at_start) * (h @ ratings.T)).sum(1)
    return chunked(reward, c)


def examine_armo(body, own, tok, c, run):
    """--eval of what armo() has left: the gate and the ratings beside the body."""
    own = {k.removeprefix("gate."): x.cpu() for k, x in own.items()}
    ratings = own.pop("ratings")                                                         # [K, D]
    gate = Gate(ratings.size(1), len(ratings), len(own["mlp.0.bias"]))
    gate.load_state_dict(own)
    return judge_pairs(gated(body, gate, ratings, c), body, tok, c, run)


RECIPES["armo"], WORLDS_OF["armo"] = armo, ("ring",)
EXAMINE["armo.safetensors"] = examine_armo


# === cdr: 2411.02481, the log-ratio of a strong and a weak model as a reward, nothing trained =====

def density_ratio(strong_logp, weak_logp, mask):
    """CDR (2411.02481):  Σ log π_strong(y|c,x) - log π_weak(y|x).   [B, T] each -> [B]

    Criteria and examples c belong into the strong model's prompt. With the SFT model over its base
    it is Self-Rewarding PPO's reward (2510.21090)."""
    return ((strong_logp - weak_logp) * mask).sum(1)


def likelihood_reward(strong, c, weak=None):
    """GenARM's reward, log π_r(y|x); with a weak model density_ratio, CDR's."""
    def fn(tokens, start, end):
        t = torch.arange(tokens.size(1), device=tokens.device)
        mask = ((t >= start[:, None]) & (t < end[:, None])).float()                      # [B, T]
        logp = token_logprobs(strong, tokens, mask)
        return density_ratio(logp, token_logprobs(weak, tokens, mask) if weak else 0 * logp, mask)
    return chunked(fn, c)


def cdr(c, run, base, pairs, *, strong="", weak=""):
    """CDR (2411.02481): log π_strong - log π_weak of two checkpoints as a reward, nothing trained.
    By default the SFT model is the weak one and GenARM's π_r over it the strong one."""
    rows, sets = pairs
    better = load(strong, c.device)[0] if strong else trained(
        run, "strong", copy.deepcopy(base.policy), rows, autoregressive, c, base.tok)
    worse = load(weak, c.device)[0] if weak else base.policy
    return evaluate(likelihood_reward(better, c, worse), base.policy, sets, base.tok, c, run)


def check_cdr(c, f):
    """Both checkpoints, where they are given, are language models."""
    for path in filter(None, (f.recipe.keywords[k] for k in ("strong", "weak"))):
        peek(path, option="--strong or --weak")


RECIPES["cdr"], CHECKS["cdr"] = cdr, check_cdr


# === arm: 2410.08193, GenARM: a language model whose log-probs are rewards of tokens ==============

def autoregressive(chosen_logp, rejected_logp, *, beta_r: Positive = 0.05):
    """GenARM, 2410.08193:  -log σ(β_r (log π_r(y+) - log π_r(y-))), sums, no reference.

    [B], [B] -> [B]"""
    return -F.logsigmoid(beta_r * (chosen_logp - rejected_logp))


def pair_logp(batch):
    """log π of both responses, summed over their tokens.   [B] each"""
    logp = token_logprobs(batch.model, batch.pairs.tokens, batch.pairs.mask).sum(1)      # [2B]
    return dict(zip(("chosen_logp", "rejected_logp"), logp.chunk(2)))


def arm(c, run, base, pairs, last, *, beta_r: Positive = 0.05):
    """GenARM (2410.08193): one language model on pairs; it scores, and in a world it guides the
    SFT model's decoding: π π_r as generate's contrast, alpha 1."""
    rows, sets = pairs
    model = load(last, c.device)[0] if last else copy.deepcopy(base.policy).requires_grad_()
    introduce(c, run, base.tok, model, rows)
    loss = partial(autoregressive, beta_r=beta_r)
    if not fit(model, rows, loss, c, run, base.tok, seed=c.seed,
               write=lambda net, folder: save(net, base.tok, folder)):
        return {}
    out = evaluate(likelihood_reward(model, c), base.policy, sets, base.tok, c, run)
    if base.world:
        problems = base.world.problems("val", 256, c.seed)
        roll = generate(base.policy, [base.tok.prompt(p) for p in problems], base.world.max_new,
                        temperature=0.5, generator=torch.Generator().manual_seed(c.seed),
                        contrast=(model, -0.5))
        out["guided_gold"] = gold_of(base.world, problems, roll, base.tok).mean().item()
        run.say(f"  decoding guided by it: gold {out['guided_gold']:.2f}, unguided "
                f"{out['val_sft_gold']:.2f}")
    return out


RECIPES["arm"], FACTS["chosen_logp"] = arm, pair_logp


# === polar: 2507.05197, POLAR: pre-trained to tell policies apart, then few labels ================

def policy_pairs(pool, base, c, rng, n):
    """Rows that tell policies apart: two samples of one against a sample of another.

    pool [(model, temperature)]; a row is prompt, reference, EOS, prompt, candidate, EOS."""
    rows, tok = [], base.tok
    for i, mine in enumerate(pool):
        other = pool[rng.choice([k for k in range(len(pool)) if k != i])]
        problems = base.world.problems("train", n, c.seed)[i::len(pool)]
        same, rival = (samples_of(model, tok, base.world, problems, c, 10 * c.seed + i + samples,
                                  samples, temperature).completions()
                       for samples, (model, temperature) in ((2, mine), (1, other)))
        for k, x in enumerate(map(tok.prompt, problems)):
            rows.append(dict(prompt=[*x, *same[2 * k], tok.eos],
                             chosen=[*x, *same[2 * k + 1], tok.eos],
                             rejected=[*x, *rival[k], tok.eos]))
    return rows


def referred(rows, base):
    """Labelled pairs as such rows: the reference is the world's demonstration."""
    out = []
    for i, r in enumerate(rows):
        best = base.tok.encode(base.world.demo(r["text"] | dict(seed=i)))
        out.append(r | dict(prompt=[*r["prompt"], *best, base.tok.eos],
                            chosen=[*r["prompt"], *r["chosen"]],
                            rejected=[*r["prompt"], *r["rejected"]]))
    return out


def polar(c, run, base, encoded, loss, noise, *, pretrain: Count = 4000, labels: Count = 200,
          pretrain_epochs: Positive = 2.0):
    """POLAR (2507.05197): first learn, without labels, which policy wrote a response; then few
    labels. scratch_accuracy: plain BT, the same labels."""
    early = [load(sft.base(c.init.removeprefix("base:"), c.config, steps=n, device=c.device),
                  c.device)[0] for n in (50, 150)]
    pool = [(model, t) for model in (*early, base.policy) for t in (0.7, 1.0, 1.3)][:-1]
    rows = policy_pairs(pool, base, c, random.Random(f"polar/{c.seed}"), pretrain)
    few = encoded(base.world.pairs(labels, 1000 + c.seed, "train", noise))
    test = encoded(base.world.pairs(600, c.seed, "val", 0.0))
    first = trained(run, "pretrained", new_scalar(base.policy, c.seed), rows, loss, c, base.tok,
                    steps=c.steps or math.ceil(len(rows) * pretrain_epochs / c.batch))
    tuned = trained(run, "final", copy.deepcopy(first), referred(few, base), loss, c, base.tok)
    plain = trained(run, "scratch", new_scalar(base.policy, c.seed), few, loss, c, base.tok)
    seen = referred(test, base)
    models = dict(pretrained=(first, seen), val=(tuned, seen), scratch=(plain, test))
    return listed(run, {f"{name}_accuracy": pair_accuracy(scalar_reward(model, c), some, c,
                                                          base.pad)
                        for name, (model, some) in models.items()})


def check_polar(c, f):
    """Its early policies are trained anew."""
    if not c.init.startswith("base:"):
        raise UserError("--recipe polar trains its early policies anew: give --init base:PRESETS")


RECIPES["polar"], WORLDS_OF["polar"], CHECKS["polar"] = polar, WORLDS, check_polar


# === ensemble, wco, uwo, lcb: 2310.02743, several reward models, and what their scores come to ====

def wco(scores):
    """Worst case (2310.02743): the lowest member.   [K, B] -> [B]"""
    return scores.amin(0)


def uwo(scores, *, lam=0.5):
    """Uncertainty-weighted (2310.02743): mean - λ variance (unbiased; 0 for one member).

    [K, B] -> [B]"""
    return scores.mean(0) - lam * (scores.var(0) if len(scores) > 1 else 0.0)


def lcb(scores):
    """Lower confidence bound: mean - standard deviation (unbiased; 0 for one member).

    [K, B] -> [B]"""
    return scores.mean(0) - (scores.std(0) if len(scores) > 1 else 0.0)


def standardised(reward, roll):
    """A reward less its mean, over its std, on samples of the SFT model: members compare."""
    raw = score_roll(reward, roll)
    mu, sd = raw.mean().item(), raw.std().item()
    return lambda *where: (reward(*where) - mu) / sd


def combined(rewards, aggregate):
    """Standardised members as one reward."""
    return lambda *where: aggregate(torch.stack([r(*where) for r in rewards]))


def ensemble(c, run, base, pairs, loss, aggregate, *, members: Count = 5):
    """Reward models of other heads and data orders, standardised on SFT samples, aggregated."""
    rows, sets = pairs
    problems = base.world.problems("train", 64, c.seed)
    roll = samples_of(base.policy, base.tok, base.world, problems, c, c.seed, samples=8)
    rewards = []
    for i in range(members):
        seed = 100 * c.seed + i
        model = trained(run, f"member-{i}", new_scalar(base.policy, seed), rows, loss, c, base.tok,
                        seed=seed)
        rewards.append(standardised(scalar_reward(model, c), roll))
    return evaluate(combined(rewards, aggregate), base.policy, sets, base.tok, c, run)


AGGREGATES["wco"], AGGREGATES["uwo"], AGGREGATES["lcb"] = wco, uwo, lcb
RECIPES["ensemble"], WORLDS_OF["ensemble"] = ensemble, WORLDS


# === maxmin: 2402.08925, MaxMin-RLHF: a model for each hidden group of annotators, by EM ==========

def assign(margins, annotator):
    """E-step (2402.08925): each annotator goes to the model that likes their pairs best.

    margins [U, N] of each model on the labelled pairs, annotator [N] ids -> [A] in 0..U-1"""
    total = torch.zeros(int(annotator.max()) + 1, len(margins))                          # [A, U]
    return total.index_add(0, annotator, F.logsigmoid(margins).T).argmax(1)


def margins_of(model, rows, c, pad):
    """r_chosen - r_rejected of encoded pairs.   [N]"""
    chosen, rejected = (score_rows(scalar_reward(model, c), rows, side, c, pad)
                        for side in ("chosen", "rejected"))
    return chosen - rejected


def maxmin(c, run, base, encoded, loss, rows, noise, *, groups: Count = 2, rounds: Count = 4,
           minority: Share = 0.3):
    """MaxMin-RLHF's mixture (2402.08925): reward models for groups of annotators that nobody has
    named, by hard EM. min_accuracy: of the worse-served group; pooled_…: of a single model."""
    train = partial(trained, run, loss=loss, c=c, tok=base.tok)
    rows = encoded(base.world.pairs(rows or 4000, seed=1000 + c.seed, noise=noise,
                                    minority=minority))
    who = torch.tensor([r["annotator"] for r in rows])                                   # [N]
    truth = {r["annotator"]: r["group"] == "B" for r in rows}
    pooled = train("pooled", new_scalar(base.policy, c.seed), rows)
    g = torch.Generator().manual_seed(c.seed)
    group = torch.randint(groups, (int(who.max()) + 1,), generator=g)                    # [A]
    for k in range(rounds):
        models = []
        for u in range(groups):
            own = [r for r in rows if group[r["annotator"]] == u] or rows
            models.append(train(f"round-{k}-group-{u}", new_scalar(base.policy, c.seed), own))
        group = assign(torch.stack([margins_of(m, rows, c, base.pad) for m in models]), who)
        agree = statistics.fmean((group[a] == 1) == b for a, b in truth.items())
        run.say(f"  round {k}: groups of {torch.bincount(group, minlength=groups).tolist()} "
                f"annotators, {max(agree, 1 - agree):.0%} with their like")
    mine, single = [], []
    for is_b in (False, True):                   # a group's model: where most of it was put
        test = encoded(base.world.pairs(600, seed=c.seed, split="val", minority=float(is_b)))
        own = models[statistics.mode(int(group[a]) for a, b in truth.items() if b == is_b)]
        mine.append(pair_accuracy(scalar_reward(own, c), test, c, base.pad))
        single.append(pair_accuracy(scalar_reward(pooled, c), test, c, base.pad))
    return listed(run, dict(assignment=max(agree, 1 - agree), min_accuracy=min(mine),
                            pooled_min_accuracy=min(single)))


RECIPES["maxmin"], WORLDS_OF["maxmin"] = maxmin, ("ring",)


# === love: 2505.14946, RLUF's P[Love]: how likely a response is to get a rare reaction ============

def bce_love(reaction, love, kept):
    """-log σ(±z), z = logit - log(kept) (2505.14946): binary cross-entropy of a reaction, with a
    share `kept` of those without one in the data, so that the logit alone is of all.   [B]"""
    z = reaction - kept.log()
    return F.binary_cross_entropy_with_logits(z, love, reduction="none")


def reactions(batch):
    """The score of single responses, the logit of P[Love], at their last token.   [B]"""
    part = batch.of("answer")
    return dict(reaction=sequence_score(batch.model, *part.ends))


def loved(world, n, seed, split, tok, kept=1.0, slope=1.5, shift=-2.5):
    """n demonstrations with the reactions of Ring's group C, P[Love] = σ(slope z + shift) of its
    standardised gold z; only a share `kept` of those without a reaction is among the rows."""
    rng = random.Random(f"love/{split}/{seed}")
    texts = [(x["prompt"], world.draw(x["prompt"], rng)) for x in world.problems(split, n, seed)]
    gold = torch.tensor([world.judge(*text, group="C")["gold"] for text in texts])       # [n]
    usual = torch.tensor([world.judge(p, y, group="C")["gold"]
                          for p, *pair in prefs.reference(world) for y in pair])
    chance = torch.sigmoid(slope * (gold - usual.mean()) / usual.std() + shift).tolist()
    rows = []
    for (prompt, y), p in zip(texts, chance):
        love, lucky = rng.random() < p, rng.random() < kept
        if love or lucky:
            rows.append(dict(prompt=tok.prompt(dict(prompt=prompt)), love=float(love), kept=kept,
                             answer=[*tok.encode(y), tok.eos], chance=p))
    return rows


def love(c, run, base, rows, last, *, kept: Range("(0, 1]") = 0.25):
    """RLUF's reward of users' reactions (2505.14946): rare ones all, others in part, corrected.

    Held out are all, at their natural rate: auroc, ece, the mean probability and the true rate. The
    score of the checkpoint is the logit of P[Love]."""
    model = load(last, c.device)[0] if last else new_scalar(base.policy, c.seed)
    train = loved(base.world, rows or 12000, 1000 + c.seed, "train", base.tok, kept)
    if not fit(model, train, bce_love, c, run, base.tok, seed=c.seed,
               write=lambda net, folder: save(net, base.tok, folder)):
        return {}
    test = loved(base.world, 2000, c.seed, "val", base.tok)
    p = torch.sigmoid(score_rows(scalar_reward(model, c), test, "answer", c, base.pad))  # [N]
    hit = torch.tensor([r["love"] for r in test])
    fine = torch.tensor([r["chance"] for r in test])
    bins = torch.chunk(p.argsort(), 10)              # of equal size: P[Love] is small nearly always
    error = [(p[b].mean() - hit[b].mean()).abs().item() for b in bins]
    return listed(run, dict(auroc=auroc(p, hit > 0.5), ece=statistics.fmean(error),
                            predicted=p.mean().item(), rate=hit.mean().item(),
                            spearman=spearman(p, fine), rows=len(train)))


FACTS["reaction"] = reactions
RECIPES["love"], WORLDS_OF["love"] = love, ("ring",)


# === rl: the smallest loop that attacks, steers and teaches (ppo.py has the whole of it) ==========

def rloo(r):
    """RLOO (2402.14740):  A_i = (G r_i - Σ r) / (G - 1).   [P, G] -> [P, G]"""
    return (r.size(1) * r - r.sum(1, keepdim=True)) / max(1, r.size(1) - 1)


def group_norm(r, *, eps=1e-6):
    """GRPO (2402.03300):  A = (r - mean) / (std + eps), unbiased std.   [P, G] -> [P, G]"""
    return (r - r.mean(1, keepdim=True)) / (r.std(1, keepdim=True) + eps)


def rl(policy, ref, tok, problems, reward, c, run, *, name, steps, max_new, groups=32, samples=4,
       lr=3e-4, beta=0.0, kl_loss=0.0, advantages=rloo):
    """Policy gradient, one step a rollout, so that the ratio is 1.   -> the log's rows

    reward(roll, problems of the step) -> ([B], {name: float}); beta: KL in the reward, nats a
    response; kl_loss: k3 in the loss; advantages: [P, G] -> [P, G], the same for all tokens."""
    run.cut()
    opt, out, g = optimiser(policy, lr=lr), [], torch.Generator().manual_seed(c.seed)
    for step in trange(steps, desc=name, leave=False, disable=None):
        # 1. roll out
        picked = [problems[i] for i in batch_indices(len(problems), groups, step, c.seed).tolist()]
        with autocast(c.device, c.dtype):
            roll = generate(policy, [tok.prompt(p) for p in picked], max_new, samples=samples,
                            generator=g)
        mask = roll.mask                                                                 # [B, T]
        # 2. score
        score, metrics = reward(roll, picked)                                            # [B]
        with torch.no_grad(), autocast(c.device, c.dtype):
            parts = zip(roll.tokens.split(c.micro), mask.split(c.micro))
            ref_logp = torch.cat([token_logprobs(ref, t, m) for t, m in parts])          # [B, T]
        kl = ((roll.logp - ref_logp) * mask).sum(1)                                      # [B]
        adv = advantages((score.to(kl) - beta * kl).view(-1, samples)).view(-1, 1)       # [B, 1]
        # 3. update
        for k in torch.arange(len(mask), device=mask.device).split(c.micro):
            with autocast(c.device, c.dtype):
                logp = token_logprobs(policy, roll.tokens[k], mask[k])                   # [b, T]
            d = ref_logp[k] - logp
            per_token = -adv[k] * logp + kl_loss * (d.exp() - 1 - d)
            ((per_token * mask[k]).sum() / mask.sum()).backward()
        set_lr(opt, lr * linear(step, steps))
        norm = clip_grad_norm_(policy.parameters(), c.clip)
        opt.step()
        opt.zero_grad()
        # 4. tell
        out.append(metrics | dict(reward=score.mean().item(), kl=kl.mean().item(),
                                  norm=norm.item(), length=mask.sum(1).mean().item()))
        run.log(run.at + step + 1, **{f"{name} {k}": v for k, v in out[-1].items()})
    run.at += steps
    return out


# === steer: what becomes of a policy that is pushed along a reward, gold watched ==================

def steer(base, problems, reward, c, run, *, no_eos=1.0, **options):
    """RLHF of the base on reward(roll, problems) [B], less no_eos without EOS, gold watched.

    -> (policy, rl()'s rows)"""
    def scored(roll, picked):
        gold = gold_of(base.world, picked, roll, base.tok)
        unfinished = (~roll.finished).float().cpu()
        return reward(roll, picked) - no_eos * unfinished, dict(gold=gold.mean().item())
    net = copy.deepcopy(base.policy).requires_grad_()
    return net, rl(net, base.policy, base.tok, problems, scored, c, run,
                   max_new=base.world.max_new, **options)


def pushed(rows, window=5):
    """How a policy fared under a reward, from rl()'s rows, smoothed over `window` steps -> dict.

    peak and final gold; collapse: steps until gold is 10 % below its running maximum (all of them
    if never); gold@k: gold when the KL first reaches k nats a response (if never, the last)."""
    def smooth(key):
        x = [r[key] for r in rows]
        return [statistics.fmean(x[max(0, i - window + 1):i + 1]) for i in range(len(x))]
    gold, kl = smooth("gold"), smooth("kl")
    top = list(accumulate(gold, max))
    fell = [i for i, (g, m) in enumerate(zip(gold, top)) if g < m - 0.1 * abs(m)]
    out = dict(peak=top[-1], final=gold[-1], collapse=fell[0] if fell else len(rows),
               kl_end=kl[-1])
    for k in (0.5, 1, 2, 4, 8):
        out[f"gold@{k}"] = next((g for g, x in zip(gold, kl) if x >= k), gold[-1])
    return out


def rlhf(base, total, c, run, **options):
    """How gold fares while a policy is pushed against the reward `total`: pushed()'s numbers."""
    problems = base.world.problems("train", 4096, c.seed)
    return pushed(steer(base, problems, lambda roll, picked: score_roll(total, roll), c, run,
                        **options)[1])


def sampled_pairs(base, n, c, seed, split="train", **label):
    """Labelled pairs of two samples of the base, for n prompts, less duplicates and ties."""
    problems = base.world.problems(split, n, seed)
    roll = samples_of(base.policy, base.tok, base.world, problems, c, seed)
    texts, done = [base.tok.decode(ids) for ids in roll.completions()], roll.finished.tolist()
    triples = [(p["prompt"], *texts[2 * i:2 * i + 2], *done[2 * i:2 * i + 2])
               for i, p in enumerate(problems)]
    return prefs.label_pairs(base.world, triples, seed, **label)


# === overopt: 2210.10760, 2310.02743, gold under best-of-n and RL against a proxy and its ensembles

HOW = dict(single=mean, mean=mean, wco=wco, uwo=partial(uwo, lam=0.5))           # the paper's λ


def small_members(base, rows, loss, c, run, members, body):
    """Rewards of small models from random weights, so that their bodies differ."""
    out = []
    for k in range(100 * c.seed, 100 * c.seed + members):
        fresh = new_scalar(init(preset(body, base.tok, 64), k), k)
        model = trained(run, f"member-{k}", fresh, rows, loss, c, base.tok, seed=k)
        out.append(scalar_reward(model, c))
    return out


def scored_samples(rewards, base, problems, c, samples):
    """(each reward's scores [K, P, N], gold [P, N]) of the base's samples, the same for all."""
    scored, gold = [], []
    for i in range(0, len(problems), 8):
        part = problems[i:i + 8]
        roll = samples_of(base.policy, base.tok, base.world, part, c, c.seed + i, samples=samples)
        gold.append(gold_of(base.world, part, roll, base.tok).view(-1, samples))
        scored.append(torch.stack([score_roll(r, roll) for r in rewards]))
    shape = len(rewards), len(problems), samples
    return torch.cat(scored, 1).view(shape), torch.cat(gold)


def overopt(c, run, base, encoded, loss, rows, noise, *, members: Count = 5, rl_steps=100,
            rl_beta=0.0, samples: Range("[2, inf)") = 512, prompts: Count = 48, body="1x32"):
    """Over-optimisation (2210.10760) and ensembles against it (2310.02743): gold under best-of-n
    and RL.

    Gold is standardised on SFT samples; --noise flips labels. single: under best-of-n the average
    over the members, under RL member 0."""
    tail = f", {noise:.0%} noise" if noise else ""
    train = encoded(sampled_pairs(base, rows or 3000, c, 1000 + c.seed, "train", noise=noise))
    test = encoded(sampled_pairs(base, 600, c, 2000 + c.seed, "val", noise=0))
    rewards = small_members(base, train, loss, c, run, members, body)
    problems = base.world.problems("train", 256, c.seed + 7)
    roll = samples_of(base.policy, base.tok, base.world, problems, c, c.seed + 7, samples=4)
    gold = gold_of(base.world, problems, roll, base.tok)
    mu, sd, z = gold.mean().item(), gold.std().item(), [standardised(r, roll) for r in rewards]
    out = dict(clean_accuracy=statistics.fmean(pair_accuracy(r, test, c, base.pad)
                                               for r in rewards))
    held = base.world.problems("val", prompts, c.seed)
    scored, gold = scored_samples(z, base, held, c, samples)                 # [K, P, N], [P, N]
    gold = (gold - mu) / sd
    for name, how in HOW.items():
        proxies = scored if name == "single" else [how(scored)]
        for n in (2 ** k for k in range(9) if 2 ** k <= samples // 2):
            out[f"{name}{tail}|best-of-n gold@{n}"] = statistics.fmean(
                best_of_n(p, gold, n).mean().item() for p in proxies)
    for name, how in (HOW | dict(uwo=partial(uwo, lam=0.1))).items() if rl_steps else ():
        total = combined(z[:1] if name == "single" else z, how)
        fared = rlhf(base, total, c, run, name=name, steps=rl_steps, beta=rl_beta)
        out |= {f"{name}{tail}|RL {x}": (v - mu) / sd if x not in ("collapse", "kl_end") else v
                for x, v in fared.items()}
    return listed(run, out)


def check_overopt(c, f):
    """The members' size is one that exists."""
    preset(f.recipe.keywords["body"], prefs.tokenizer())


RECIPES["overopt"], WORLDS_OF["overopt"], CHECKS["overopt"] = overopt, ("ring",), check_overopt
PRESETS["overopt"] = dict(recipe="overopt", steps=250, lr=2e-3)      # both ours, for these sizes


# === gp: 2006.10108, random features of a Gaussian kernel, and how far from its data an input is ==

def random_features(h, W, b):
    """φ(h) = sqrt(2/R) cos(W h + b), W ~ N(0, σ²):  φ(h)·φ(h') -> exp(-σ² |h - h'|² / 2).

    h [N, D], W [R, D], b [R] -> [N, R]"""
    return math.sqrt(2 / len(W)) * torch.cos(h @ W.T + b)


def spectrally_bounded(W, u, steps=0, bound=1.0):
    """W min(1, c / σ(W)): a bound, no division. σ by power iteration, `steps` of it kept in u."""
    with torch.no_grad():
        for _ in range(steps):
            u.copy_(F.normalize(W @ F.normalize(W.T @ u, dim=0), dim=0))
        v = F.normalize(W.T @ u, dim=0)
    return W * (bound / (u @ W @ v)).clamp(max=1.0)


def gp_variance(phi, P, ridge):
    """ridge φᵀ (sym(P) + ridge I)⁻¹ φ, in (0, |φ|²]: large where training saw nothing; solved in
    float64.

    phi [N, R], P [R, R] -> [N]."""
    L = torch.linalg.cholesky((P + P.T).double() / 2 + ridge
                              * torch.eye(len(P), device=P.device).double())
    phi = phi.double()
    return (ridge * (phi * torch.cholesky_solve(phi.T, L).T).sum(1)).float()


# === sngp: 2510.20369, a classifier of pairs that knows what it has not seen ======================

class PairModel(nn.Module):
    """Pairwise preference classifier with a Gaussian process as last layer (SNGP, as in
    2510.20369).

    tokens of "prompt, first, second" [B, T], end [B] -> logit [B], > 0 if the first is better.
        h' = W_sn h + b, h the last hidden state;  φ = random_features(h');  g = wᵀ φ
    W, b of φ are drawn once, never trained. P = Σ φ φᵀ of the training set (add() after the last
    step) tells how far an input is from it. features 0: a plain linear head; sn False: h' = h, as
    in the released code.
    """

    def __init__(self, body, features=1024, sigma=0.05, sn=True, generator=None):
        super().__init__()
        D = body.head.size(1)
        self.body, self.features, self.config = body, features, body.config
        self.pool = nn.Linear(D, D) if sn and features else nn.Identity()
        self.w = nn.Parameter(0.05 * torch.randn(features or D, generator=generator))
        for name, x in dict(W=torch.randn(features, D, generator=generator) * sigma,
                            b=torch.rand(features, generator=generator) * 2 * math.pi,
                            u=F.normalize(torch.randn(D, generator=generator), dim=0),
                            P=torch.zeros(features, features)).items():
            self.register_buffer(name, x)
        if sn and features:
            nn.init.orthogonal_(self.pool.weight, generator=generator)
            nn.init.zeros_(self.pool.bias)

    def phi(self, tokens, end):
        """The features that the last layer reads [B, R], in float32."""
        h = last_hidden(self.body, tokens, end)                                          # [B, D]
        if not self.features:
            return h
        with torch.autocast(h.device.type, enabled=False):       # the kernel needs every bit
            if isinstance(self.pool, nn.Linear):  # one power iteration a training forward
                W = spectrally_bounded(self.pool.weight, self.u, int(torch.is_grad_enabled()))
                h = h @ W.T + self.pool.bias
            return random_features(h, self.W, self.b)

    def forward(self, tokens, end):
        return (self.phi(tokens, end) * self.w).sum(-1)                        # sum: never bfloat16

    @torch.no_grad()
    def add(self, tokens, end):
        """Count training rows in P: all of them, in both orders, after the last step."""
        phi = self.phi(tokens, end)
        with torch.autocast(phi.device.type, enabled=False):
            self.P += phi.T @ phi

    @torch.no_grad()
    def calibrated(self, tokens, end, ridge=30.0, lam=10.0):
        """(mean-field calibrated logit g / u, uncertainty u >= 1), both [B]."""
        phi = self.phi(tokens, end)
        u = (1 + lam * gp_variance(phi, self.P,
                                   ridge)).sqrt() if self.features else phi.new_ones(len(phi))
        return (phi * self.w).sum(-1) / u, u


def preference(logit, label, strength):
    """Pairwise classifier (2510.20369):  s (-l log σ(g) - (1-l) log σ(-g)),  l 1: first better."""
    return strength * (-label * F.logsigmoid(logit) - (1 - label) * F.logsigmoid(-logit))


def pair_logit(batch):
    """A PairModel's logit of rows that hold a pair's ids.   [B]"""
    ids = [r["pair"] for r in batch.rows]
    return dict(logit=batch.model(*ending(ids, batch.pad, batch.c)))


FACTS["logit"] = pair_logit


# === routing: 2510.20369, whom to ask about pairs, and what asking is worth =======================

def by_uncertainty(score, u, wrong):
    """Ask about the pairs of highest uncertainty.   -> priority [N], higher is asked first"""
    return u


def by_margin(score, u, wrong):
    """Ask where the logit is smallest: the cheap control that needs no Gaussian process."""
    return -score.abs()


def by_both(score, u, wrong):
    """Ask where the calibrated logit |s u| is smallest (the released evaluation's "min")."""
    return -(score * u).abs()


def by_oracle(score, u, wrong):
    """Ask about the errors: the ceiling of every router."""
    return wrong.float()


ROUTERS = dict(uncertainty=by_uncertainty, margin=by_margin, both=by_both, oracle=by_oracle)


def routing_curve(priority, right, judged, shares=(0, 0.1, 0.25, 0.4, 0.6, 0.8, 1)):
    """Accuracy once the judge has answered the share of highest priority.

    right, judged [N]: credit of model and judge, 1, 0 or 0.5 -> {"accuracy@0.1": …, "area"};
    area: the mean over 0.1, 0.25, 0.4."""
    order, out = priority.argsort(descending=True), {}
    for q in shares:
        asked = order[:round(q * len(order))]
        out[f"accuracy@{q}"] = ((right.sum() - right[asked].sum() + judged[asked].sum())
                                / len(order)).item()
    return out | dict(area=sum(out[f"accuracy@{q}"] for q in (0.1, 0.25, 0.4)) / 3)


def routing_table(curves):
    """{name: routing_curve's result} as lines to read."""
    shares = [k for k in next(iter(curves.values())) if k.startswith("accuracy@")]
    lines = ["\n  accuracy of the stream after the judge has answered a share of it",
             " " * 14 + "".join(f"{k.partition('@')[2]:>8}" for k in shares)]
    for name, row in curves.items():
        lines.append(f"{name:<14}" + "".join(f"{row[k]:>8.3f}" for k in shares))
    return "\n  ".join(lines)


def curves_of(priorities, right, judged, ood, g):
    """routing_curve of each priority, over all pairs and those of another kind; at random, too."""
    out = {}
    for name, x in priorities.items():
        other = routing_curve(x[ood], right[ood], judged[ood])
        out[name] = routing_curve(x, right, judged) | {f"ood_{k}": v for k, v in other.items()}
    draws = [routing_curve(torch.rand(len(right), generator=g), right, judged) for _ in range(20)]
    out["random"] = {}
    for k in draws[0]:
        out["random"][k] = statistics.fmean(d[k] for d in draws)
    return out


# === route, router, big_router: 2510.20369, ask a dear judge where the cheap one is uncertain =====

def pair_ids(tok, prompt, a, b):
    """A pair as the classifier reads it."""
    return [*tok.prompt(f"{prompt}A{a}B{b}"), tok.eos]


def both_orders(pm, tok, triples, c, **options):
    """Scores s > 0 if a is better, and uncertainties u, of [(prompt, a, b)].   [N], [N]"""
    rows, out = [], []
    for x, a, b in triples:
        rows += [pair_ids(tok, x, a, b), pair_ids(tok, x, b, a)]
    for i in range(0, len(rows), c.micro):
        tokens, end = ending(rows[i:i + c.micro], tok.pad or 0, c)
        with autocast(c.device, c.dtype):
            out.append(torch.stack(pm.calibrated(tokens, end, **options)).cpu())
    g, u = torch.cat(out, 1).view(2, -1, 2)                                              # [N, 2]
    return (g[:, 0] - g[:, 1]) / 2, u.mean(1)


def kernel_width(policy, rows, pad, c):
    """The kernel's σ, by which σ² median |h - h'|² / 2 = 1 over the first training pairs."""
    with torch.no_grad():
        h = last_hidden(policy, *ending([r["pair"] for r in rows[:256]], pad, c)).cpu()
    return math.sqrt(2 / torch.pdist(h).square().median().item())


def classifier(width, seed, name, *, sigma, sn, base, rows, c, run):
    """A PairModel of `width` random features, trained on the rows and then told of them."""
    g = torch.Generator().manual_seed(seed)
    pm = PairModel(copy.deepcopy(base.policy).requires_grad_(), width, sigma, sn, g)
    fit(pm.to(c.device), rows, preference, c, run, base.tok, seed=seed, name=name)
    for i in range(0, len(rows), c.micro) if width else ():      # the covariance pass: no step
        tokens, end = ending([r["pair"] for r in rows[i:i + c.micro]], base.pad, c)
        with autocast(c.device, c.dtype):
            pm.add(tokens, end)
    return pm


def save_classifier(folder, pm, tok, settings):
    """The body as a reward model with a head of zeros, since it scores no response alone; beside
    it what the classifier adds, its settings, and the ids that part a pair."""
    save(ScalarModel.from_lm(pm.body), tok, folder)
    own = {k: x.contiguous() for k, x in pm.state_dict().items() if not k.startswith("body.")}
    marks = torch.tensor([*tok.encode("AB"), tok.eos])
    save_file(own | dict(settings=torch.tensor(settings, dtype=torch.float64), marks=marks),
              folder / "pair.safetensors")


def routed(pm, tok, c, run, settings, rivals=()):
    """What asking a strong judge is worth on pairs of rules seen (id), unseen (ood), both (mix).

    settings: ridge, lam, the judge's error; rivals: classifiers whose spread is an uncertainty."""
    world, (ridge, lam, error) = prefs.ToyIF(), settings
    pairs = partial(world.pairs, mixture=prefs.ROUTING, min_gap=0.05)
    tests = dict(id=pairs(600, seed=c.seed, split="val", heads="FLH"),
                 ood=pairs(600, seed=c.seed, split="base", heads="N#", rules=(1,)),
                 mix=pairs(600, seed=c.seed, split="val", rules=(2,)))
    triples = [(r["prompt"], r["chosen"], r["rejected"]) for some in tests.values() for r in some]
    where = torch.tensor([i for i, some in enumerate(tests.values()) for _ in some])
    score, u = both_orders(pm, tok, triples, c, ridge=ridge, lam=lam)
    right, judge = (score > 0).float(), prefs.StrongJudge(world, error)
    judged = torch.tensor([{1: 1.0, 2: 0.0, 0: 0.5}[judge.judge(*t)] for t in triples])
    g = torch.Generator().manual_seed(c.seed)
    priorities = {name: fn(score, u, right < 1) for name, fn in ROUTERS.items()}
    priorities["shuffled"] = u[torch.randperm(len(u), generator=g)]
    if rivals:
        spread = [both_orders(m, tok, triples, c)[0] for m in rivals]
        priorities["ensemble"] = torch.stack(spread).std(0)
    curves = curves_of(priorities, right, judged, where == 1, g)
    run.say(routing_table(curves))
    out = {f"{name}|{k}": x for name, row in curves.items() for k, x in row.items()}
    out |= {f"{name}_accuracy": right[where == i].mean().item() for i, name in enumerate(tests)}
    return listed(run, out | dict(
        u_auroc=auroc(u, right < 1), margin_auroc=auroc(-score.abs(), right < 1),
        u_mean=u.mean().item(), u_shift=(u[where == 1].mean() - u[where == 0].mean()).item(),
        judge_calls=judge.calls))


def examine_pairs(model, own, tok, c, run):
    """--eval of what router() has left: its numbers, but for those of the rivals."""
    settings, _ = own.pop("settings").tolist(), own.pop("marks")
    pm = PairModel(model.model, len(own["W"]), sn="pool.weight" in own)
    pm.load_state_dict(own | {f"body.{k}": x for k, x in model.model.state_dict().items()})
    return routed(pm.to(c.device).requires_grad_(False), tok, c, run, settings)


def router(c, run, base, rows, *, features: Count = 1024, ridge: Positive = 30.0,
           lam: Positive = 10.0, sn=True, judge_error: Share = 0.1, rivals=3):
    """Ask a strong judge where the reward model is uncertain (2510.20369), on pairs seen and unseen
    in kind.

    Trained on rules F, L, H; tested on those (id), on N and # alone (ood), on two of all five
    (mix). rivals: plain classifiers whose spread is another uncertainty. ridge, the kernel's width:
    ours, for this size."""
    train = []
    for r in base.world.pairs(rows or 8000, seed=1000 + c.seed, noise=0.05, heads="FLH",
                              mixture=prefs.ROUTING, min_gap=0.05):
        for a, b in (("chosen", "rejected"), ("rejected", "chosen")):
            train.append(dict(pair=pair_ids(base.tok, r["prompt"], r[a], r[b]),
                              label=float(a == "chosen"), strength=float(r["strength"])))
    make = partial(classifier, sigma=kernel_width(base.policy, train, base.pad, c), sn=sn,
                   base=base, rows=train, c=c, run=run)
    pm, settings = make(features, c.seed, "pm"), (ridge, lam, judge_error)
    run.put("pm", partial(save_classifier, pm=pm, tok=base.tok, settings=settings))
    others = [make(0, 10 * c.seed + i + 1, f"rival {i}") for i in range(rivals)]
    return routed(pm, base.tok, c, run, settings, others)


def check_router(c, f):
    """One rival has no spread."""
    if f.recipe.keywords["rivals"] == 1:
        raise UserError("--rivals 1: a spread needs two of them; give 0 for none")


RECIPES["router"], WORLDS_OF["router"], CHECKS["router"] = router, ("toyif",), check_router
EXAMINE["pair.safetensors"], OF_PAIRS["pair.safetensors"] = examine_pairs, "toyif"
PRESETS["router"] = dict(recipe="router", **TOYIF, epochs=4.0)
PRESETS["big_router"] = dict(rows=16000, epochs=3.0, warmup=100, rivals=0)       # the claim's


# === written: judges that write, their texts and their votes ======================================

def nll(logp):
    """Cross-entropy of a judge's text, reasoning and verdict together.   [B, T] -> [B]"""
    return -logp.sum(1)


def answer_logp(batch):
    """log π of the answers' tokens, 0 elsewhere.   [B, T]"""
    part = batch.of("answer")
    return dict(logp=token_logprobs(batch.model, part.tokens, part.mask))


def answer_tokens(rows):
    """How many tokens the answers have."""
    return sum(len(r["answer"]) for r in rows)


def written(model, tok, prompts, c, *, max_new, temperature=0.0, samples=1):
    """A judge's texts, [prompts][samples]; '' where one did not end."""
    out, g = [], torch.Generator().manual_seed(c.seed)
    for i in range(0, len(prompts), 4 * c.micro):
        with autocast(c.device, c.dtype):
            roll = generate(model, prompts[i:i + 4 * c.micro], max_new, samples=samples,
                            temperature=temperature, generator=g)
        out += [tok.decode(y) if done else ""
                for y, done in zip(roll.completions(), roll.finished.tolist())]
    return [out[i:i + samples] for i in range(0, len(out), samples)]


def majority(votes):
    """The sign of the sum of ±1 votes as 1.0, 0.0, or 0.5 for a tie; None casts no vote."""
    total = sum(1 if v > 0 else -1 for v in votes if v)
    return 0.5 if total == 0 else float(total > 0)


FACTS["logp"], UNITS["logp"] = answer_logp, answer_tokens


# === judge_lora: 2506.05748, a frozen model and rank-16 adapters as a pointwise judge =============

def expected_score(logits, values):
    """A judge's score as E[digit] under its verdict token (2506.05748).

    [B, K] logits, [K] values -> [B]"""
    return torch.softmax(logits.float(), -1) @ values


def json_rubric(criteria, weights):
    """The one-line rubric of 2506.05748: criteria, their weights, and a score from 1 to 10."""
    return json.dumps(dict(criteria=criteria, weights=weights, output=dict(score="1-10")))


def question_of(r, side, tok):
    """What the judge reads of one side of a pair, as ids."""
    return [*r["prompt"], *tok.encode(r["text"][side] + prefs.JUDGE["ANS"])]


def pointwise_accuracy(model, sets, ids, base, c):
    """The share of each set's pairs whose chosen response has the higher expected level.

    ids [levels]: the tokens of the levels, lowest first"""
    out, levels = {}, torch.arange(float(len(ids)))
    for name, rows in sets.items():
        expected = []
        for side in ("chosen", "rejected"):
            tokens, end = ending([question_of(r, side, base.tok) for r in rows], base.pad, c)
            with torch.no_grad():
                logits = model.logits(last_hidden(model, tokens, end))[:, ids]           # [N, K]
            expected.append(expected_score(logits.cpu(), levels))
        out[name] = accuracy(*expected)
    return out


def judge_lora(c, run, base, pairs, *, rank: Count = 16, levels: Range("[2, 7]") = 7):
    """A frozen model with a rank-16 adapter as a pointwise judge (2506.05748): cross-entropy on the
    verdict token, score = E[digit]. _off: the model without the adapter."""
    rows, sets = pairs
    letters, examples = list(prefs.SCORES.values())[:levels], []
    ids = torch.tensor([base.tok.encode(x)[0] for x in letters])
    for r in rows:
        for side in ("chosen", "rejected"):                      # gold in levels
            gold = base.world.reward(r["text"], r["text"][side])
            answer = base.tok.encode(letters[round(gold / 1.5 * (levels - 1))])
            examples.append(dict(prompt=question_of(r, side, base.tok), answer=answer))
    model = lora(copy.deepcopy(base.policy).requires_grad_(),
                 torch.Generator().manual_seed(c.seed), rank=rank)
    off = pointwise_accuracy(model, sets, ids, base, c)
    fit(model, examples, nll, c, run, base.tok, seed=c.seed, name="judge")
    run.put("judge", lambda folder: save(merge(model), base.tok, folder))
    on = pointwise_accuracy(model, sets, ids, base, c)
    return listed(run, {f"{k}_accuracy": v for k, v in on.items()}
                  | {f"{k}_off": v for k, v in off.items()})


RECIPES["judge_lora"], WORLDS_OF["judge_lora"] = judge_lora, ("toyif",)
PRESETS["judge_lora"] = dict(recipe="judge_lora", **TOYIF, lr=2e-3)  # lr: ours


# === first: 2406.15657, FIRST: a listwise judge read off the first token's logits =================

def ranknet(score, ranks):
    """mean over pairs with rank_i < rank_j of log(1 + exp(s_j - s_i)) / (rank_i + rank_j).

    [B, K], [B, K] -> [B]"""
    above = (ranks[:, :, None] < ranks[:, None, :]).float()                    # [B, K, K] i above j
    loss = (F.softplus(score[:, None, :] - score[:, :, None])
            / (ranks[:, :, None] + ranks[:, None, :]))
    return (above * loss).sum((1, 2)) / above.sum((1, 2)).clamp(min=1)


def listwise(logp, identifiers, ranks, *, weight=10.0):
    """FIRST (2406.15657): cross-entropy a token of the ranking + w RankNet on the first token's
    logits.

    identifiers [B, K]: the candidates' logits there; ranks [B, K] from 1, best first."""
    return nll(logp) / (ranks.size(1) + 1) + weight * ranknet(identifiers, ranks)


def identifier_logits(batch):
    """The candidates' logits where the judge begins to speak.   [B, K]"""
    part = batch.of("answer")
    z = batch.model.logits(last_hidden(batch.model, part.tokens, part.start))
    return dict(identifiers=z[:, batch.rows[0]["identifier_ids"]])


def lists(n, split, seed, base, digits):
    """n prompts with as many responses as digits, to be ranked by gold."""
    rng, out, tok = random.Random(f"first/{split}/{seed}"), [], base.tok
    for p in base.world.problems(split, n, seed):
        ys = [base.world.draw(p["prompt"], rng, prefs.ROUTING) for _ in digits]
        gold = [base.world.reward(p, y) + 1e-6 * rng.random() for y in ys]       # ties by a coin
        order = sorted(range(len(digits)), key=lambda k: -gold[k])
        text = "".join(d + y for d, y in zip(digits, ys)) + prefs.JUDGE["ANS"]
        answer = tok.encode("".join(digits[k] for k in order))
        out.append(dict(prompt=[*tok.prompt(p), *tok.encode(text)], answer=[*answer, tok.eos],
                        identifier_ids=[tok.encode(d)[0] for d in digits], gold=gold,
                        ranks=[float(order.index(k) + 1) for k in range(len(digits))]))
    return out


def first(c, run, base, rows, *, candidates: Range("[2, 9]") = 4, weight=10.0):
    """FIRST (2406.15657): a listwise judge that learns to write the ranking, read off its first
    logits. weight: of RankNet in `listwise`."""
    digits = "1234567890"[:candidates]
    train = lists(rows or 4000, "train", 1000 + c.seed, base, digits)
    model = trained(run, "judge", copy.deepcopy(base.policy), train,
                    partial(listwise, weight=weight), c, base.tok)
    test = lists(600, "val", c.seed, base, digits)
    prompts, ids = [r["prompt"] for r in test], test[0]["identifier_ids"]
    with torch.no_grad():
        h = last_hidden(model, *ending(prompts, base.pad, c))
        z = model.logits(h)[:, ids].cpu()                                                # [N, K]
    texts = written(model, base.tok, prompts, c, max_new=candidates + 1)
    spoken = []
    for (text,) in texts:                                        # an identifier's place in it
        spoken.append([-(text + digits).index(d) for d in digits])
    spoken, gold = torch.tensor(spoken), torch.tensor([r["gold"] for r in test])
    return listed(run, dict(first_spearman=statistics.fmean(map(spearman, z, gold)),
                            generated_spearman=statistics.fmean(map(spearman, spoken, gold))))


FACTS["identifiers"], UNITS["ranks"] = identifier_logits, len
RECIPES["first"], WORLDS_OF["first"] = first, ("toyif",)
PRESETS["first"] = dict(recipe="first", **TOYIF)


# === openrubrics, rubrics, bt_rubrics: 2510.07743, rubrics by contrast, kept if they are consistent

def student(name, examples, base, c, run):
    """The base, taught to continue prompts [(prompt, answer)].   -> a frozen language model"""
    tok = base.tok
    rows = [dict(prompt=tok.prompt(x), answer=[*tok.encode(y), tok.eos]) for x, y in examples]
    return trained(run, name, copy.deepcopy(base.policy), rows, nll, c, tok)


def write_rubrics(writer, prompts, tok, c):
    """{prompt: rubric} of distinct prompts, greedy; and how they compare with the true ones."""
    texts = written(writer, tok, list(map(tok.prompt, prompts)), c, max_new=13)
    rubric = {x: y for x, (y,) in zip(prompts, texts)}
    grades = zip(*(prefs.rubric_recall(x, y) for x, y in rubric.items()))
    named = zip(("recall", "precision", "principle"), grades)
    return rubric, {k: statistics.fmean(x) for k, x in named}


def rubric_votes(reader, rows, rubric, name, tok, c, votes):
    """A judge's votes on pairs, [rows][votes]: 1 for the chosen response, -1 for the other, None
    for no verdict. The order of display is by a coin."""
    order = random.Random(f"{name}/{c.seed}").choices("AB", k=len(rows))       # where chosen is
    prompts = [tok.prompt(prefs.question(r, rubric[r["prompt"]], at))
               for r, at in zip(rows, order)]
    texts, out = written(reader, tok, prompts, c, max_new=24, temperature=0.7, samples=votes), []
    for some, at in zip(texts, order):
        winners = [prefs.parse_winner(text) for text in some]
        out.append([w and (1 if w == at else -1) for w in winners])
    return out


def openrubrics(c, run, base, rows, *, judge: Literal["rubric", "direct"] = "rubric",
                contrast=True, consistent=True, verbose: Share = 0.2, votes: Count = 5,
                most: Count = 5600):
    """OpenRubrics (2510.07743): rubrics by contrasting two responses, kept if they reproduce the
    label, then distilled into a generator (prompt -> rubric) and a judge (prompt, rubric, A, B ->
    criteria, winner).

    judge "direct": the same model, the winner at once; a scalar model: --data rubrics. most: any
    judge's examples, of 8000 pairs before the filter. verbose: the share of training labels that
    prefer the longer response, whatever gold says; tests are gold's."""
    pairs = prefs.rubric_pairs(rows or 8000, 1000 + c.seed, verbose)
    tests, out = prefs.rubric_tests(c.seed), {}
    examples = prefs.judge_examples(pairs, c.seed, judge == "rubric", contrast, consistent)
    texts, rubrics = (x[:most] for x in examples)
    reader = student("judge", texts, base, c, run)
    writer = student("rubrics", rubrics, base, c, run) if rubrics else None
    for source in ("", "oracle|") if rubrics else ("",):  # oracle: the judge reads the true rubric
        for name, some in tests.items():
            prompts = list(dict.fromkeys(r["prompt"] for r in some))
            rubric = {x: prefs.true_rubric(x) if source else "" for x in prompts}
            if rubrics and not source:
                rubric, grades = write_rubrics(writer, prompts, base.tok, c)
                out |= {f"{name}_{k}": x for k, x in grades.items()}
            cast = rubric_votes(reader, some, rubric, name, base.tok, c, votes)
            out |= {f"{source}{name}": statistics.fmean(majority(v[:1]) for v in cast),
                    f"{source}{name}_vote": statistics.fmean(map(majority, cast))}
        for x in ("", "_vote"):
            out[f"{source}accuracy{x}"] = statistics.fmean(out[f"{source}{name}{x}"]
                                                           for name in tests)
    return listed(run, out | dict(kept=len(examples[0]) / len(pairs)))


RECIPES["rubrics"], WORLDS_OF["rubrics"] = openrubrics, ("toyif",)
PRESETS["rubrics"] = dict(recipe="rubrics", data="toyif", init="base:toyif_judge", steps=600,
                          lr=2e-3)                               # steps and lr: ours
PRESETS["bt_rubrics"] = dict(recipe="bt", data="rubrics", lr=1e-3)   # the claim's scalar model


# === thinkrm, filler_style, direct_style, bt_style: 2505.16265, Think-RM: reasons, then its verdict

def graded(score, label):
    """Think-RM's multiclass rule reward: 1 for the very score, 0.5 for its sign, else 0."""
    return 0.0 if score is None else 1.0 if score == label else 0.5 if score * label > 0 else 0.0


def right_sign(score, label):
    """Think-RM's binary rule reward: 1 if the preferred response is right, else 0."""
    return float(score is not None and score * label > 0)


RULE_REWARDS = dict(graded=graded, sign=right_sign)            # of a judge's score, given gold's


def verdict_rates(samples, greedy, labels):
    """Means over pairs: of one sample's verdict, of a _vote of all, _greedy, and _graded (see
    graded).

    samples [P][votes] and greedy [P]: scores, or None for no verdict, which counts ½ among samples
    and 0 where greedy or graded;  labels [P]: gold's, never 0."""
    signs = []
    for some, label in zip(samples, labels):
        signs.append([x and (1 if x * label > 0 else -1) for x in some])
    each = {"": [majority(v[:1]) for v in signs], "_vote": map(majority, signs),
            "_greedy": map(right_sign, greedy, labels),
            "_graded": map(graded, [v[0] for v in samples], labels)}
    return {k: statistics.fmean(v) for k, v in each.items()}


def verdicts(judge, task, tok, sets, c, votes):
    """How often a judge is right on sets of problems, and how much it writes -> dict."""
    out = {}
    for name, some in sets.items():
        prompts = list(map(tok.prompt, some))
        texts = written(judge, tok, prompts, c, max_new=task.max_new, temperature=0.6,
                        samples=votes)
        greedy = written(judge, tok, prompts, c, max_new=task.max_new)
        samples = [list(map(task.parse, x)) for x in texts]
        each = verdict_rates(samples, [task.parse(x) for (x,) in greedy],
                             [p["label"] for p in some])
        each |= dict(_length=statistics.fmean(len(x[0]) for x in texts))
        out |= {f"{name}{k}": v for k, v in each.items()}
    for k in each:
        out[f"accuracy{k}"] = statistics.fmean(out[f"{name}{k}"] for name in sets)
    return out


def rule_reward(roll, picked, *, task, tok, rule):
    """The rule reward of eight judgements a problem, and how many problems' are all alike."""
    ended = zip(roll.completions(), roll.finished.tolist())
    scores = [task.parse(tok.decode(ids)) if done else None for ids, done in ended]
    r = torch.tensor([RULE_REWARDS[rule](x, picked[i // 8]["label"])
                      for i, x in enumerate(scores)])
    return r, dict(flat=(r.view(-1, 8).std(1) == 0).float().mean().item())


def scalar_judge(fresh, task, sets, shown, tok, c, run):
    """The baseline: Bradley-Terry on the same pairs, no reasoning -> its accuracies."""
    texts = {k: list(map(task.pair, x)) for k, x in (sets | dict(train=shown[::2])).items()}
    pairs = {k: prefs.encode_pairs(x, tok, 64) for k, x in texts.items()}
    model = trained(run, "bt", new_scalar(fresh, c.seed), pairs["train"], bt, c, tok)
    out = {k: pair_accuracy(scalar_reward(model, c), pairs[k], c, tok.pad) for k in sets}
    return out | dict(accuracy=statistics.fmean(out.values()))


def thinkrm(c, run, rows, *,
            style: Literal["long", "short", "random", "last", "direct", "filler", "bt"] = "long",
            error: Range("[0, 0.5]") = 0.05, bits: Range("[2, 10]") = 7, rl_steps=60,
            rl_pairs: Count = 2000, rl_lr: Positive = 3e-5,
            rule: Literal[*RULE_REWARDS] = "graded", votes: Count = 16):
    """Think-RM (2505.16265): a judge that reasons before its verdict, taught by the longest correct
    traces, then by RL with a rule reward (RULE_REWARDS; sign is RM-R1's, 2505.02387, up to its
    scale) on ParityJudge.

    style: long, short, random, last, direct, filler (as long as long, but empty), or bt, a scalar
    model. hard: pairs that differ in one place. One sample at temperature 0.6; _vote: the majority
    of `votes`; "long+RL|…": the judge that learned by long traces, after RL."""
    tok = prefs.tokenizer()
    task = tasks.task(f"parity_{'direct' if style == 'bt' else style}", error=error, bits=bits)
    fresh = init(preset("2x64", tok, 6 * bits + 24, "llama"), c.seed)
    sets = dict(id=task.problems("val", 400, c.seed), hard=task.problems("hard", 300, c.seed))
    shown = task.demonstrations(rows or 4000, seed=1000 + c.seed)      # in both orders, in turn
    if style == "bt":
        return listed(run, scalar_judge(fresh, task, sets, shown, tok, c, run))
    examples = [dict(prompt=tok.prompt(r["prompt"]),
                     answer=[*tok.encode(r["completion"]), tok.eos]) for r in shown]
    judge = trained(run, "sft", fresh, examples, nll, c, tok)
    out = verdicts(judge, task, tok, sets, c, votes)
    if rl_steps:
        judge, ref = copy.deepcopy(judge).requires_grad_(), judge
        log = rl(judge, ref, tok, task.problems("train", rl_pairs, 5000 + c.seed),
                 partial(rule_reward, task=task, tok=tok, rule=rule), c, run, name="rl",
                 steps=rl_steps, max_new=task.max_new, samples=8, lr=rl_lr, kl_loss=1e-3,
                 advantages=group_norm)
        run.put("rl", lambda folder: save(judge, tok, folder))
        after = verdicts(judge, task, tok, sets, c, votes) | dict(flat_end=log[-1]["flat"])
        out |= {f"{style}+RL|{k}": v for k, v in after.items()}
    return listed(run, out)


RECIPES["thinkrm"] = thinkrm
MUON = dict(optimiser="muon", lr=0.02, aux_lr=5e-3, warmup=50)         # ours, for these sizes
PRESETS["thinkrm"] = dict(recipe="thinkrm", steps=1500, **MUON)
PRESETS["filler_style"] = dict(style="filler", rl_steps=0)             # the claim's arms
PRESETS["direct_style"] = dict(style="direct", rl_steps=0)
PRESETS["bt_style"] = dict(style="bt", optimiser="adamw", lr=5e-4, aux_lr=0.0, warmup=0)


# === rmr1: 2505.02387, RM-R1: Think-RM with a binary reward, from traces of any length ============

def tagged(text, label, window=80):
    """RM-R1's rule reward (2505.02387): +1 if the last 80 characters hold [[A]] or [[B]] as
    labelled and not the other tag, else -1. label "A" or "B"."""
    right, wrong = ("[[A]]", "[[B]]") if label == "A" else ("[[B]]", "[[A]]")
    return 1.0 if right in text[-window:] and wrong not in text[-window:] else -1.0


PRESETS["rmr1"] = dict(recipe="thinkrm", steps=1500, **MUON, style="random", rule="sign")


# === attack: 2504.06141, the adversarial policy's reward, where it is aimed, and what is kept of it

def disagreement(r1, r2, bar=0.0, *, lam=1.5, C: Positive = 3.0):
    """R1 - λ R2 where R1 > T(x), else R1 - C: please the target, displease its twin.   [B] -> [B]

    Here on standardised rewards (ours), z = (R - its prompt's SFT mean) / std over all, so T = 0
    and neither shift nor scale of R matters. A public implementation on raw R has C 25."""
    return torch.where(r1 > bar, r1 - lam * r2, r1 - C)


def overoptimise(r1, r2):
    """The weaker attack: the target's reward alone.   [B] -> [B]"""
    return r1


def adversarial(z1, disagreement, mean, std, *, z_min=1.96):
    """Adv-RM's filter: R1 above the SFT mean, U = z1 - λ z2 an outlier, Z(U) > 1.96.   [B] bool"""
    return (z1 > 0) & ((disagreement - mean) / std > z_min)


def strict_success(z1, zgold):
    """The proxy likes it (Z > 0), gold finds it far below SFT (Z < -1.96).   [B] bool"""
    return (z1 > 0) & (zgold < -1.96)


class Field:
    """Prompts with samples of the SFT model and their gold: attacks are aimed and measured here."""

    def __init__(self, base, problems, c, samples=16):
        self.problems, self.samples = problems, samples
        self.at = {p["seed"]: i for i, p in enumerate(problems)}
        self.roll = samples_of(base.policy, base.tok, base.world, problems, c, c.seed + 11,
                               samples)
        self.texts = [base.tok.decode(ids) for ids in self.roll.completions()]
        self.gold = gold_of(base.world, problems, self.roll, base.tok).view(-1, samples)  # [P, 16]

    @cache
    def standard(self, reward):
        """A reward as z(roll, problems): less its prompt's SFT mean, over the std of all."""
        all_ = score_roll(reward, self.roll).view(self.gold.shape)                       # [P, 16]

        def z(roll, problems):
            p = torch.tensor([self.at[x["seed"]] for x in problems])
            mu = all_.mean(1)[p].repeat_interleave(len(roll.tokens) // len(problems))    # [B]
            return (score_roll(reward, roll) - mu) / all_.std()
        return z


def pairs_against(base, field, roll, rows, rng, each=4):
    """SFT samples preferred to the responses `rows` of a rollout, `each` for every distinct one."""
    texts, done = [base.tok.decode(y) for y in roll.completions()], roll.finished.tolist()
    gold = gold_of(base.world, field.problems, roll, base.tok)
    per, out, seen = len(texts) // len(field.problems), [], set()
    for i in rows:
        p, x = i // per, field.problems[i // per]["prompt"]
        own = range(field.samples * p, field.samples * (p + 1))
        for j in [] if (x, texts[i]) in seen else rng.sample(own, each):
            out.append(dict(prompt=x, chosen=field.texts[j],
                            chosen_finished=bool(field.roll.finished[j]),
                            rejected=texts[i], rejected_finished=done[i],
                            margin=(field.gold.view(-1)[j] - gold[i]).item()))
        seen.add((x, texts[i]))
    return [r for r in out if r["rejected"].strip() and r["chosen"].strip()
            and r["rejected"] != r["chosen"]]


# === advrm: 2504.06141, Adv-RM: reward models trained on what an adversarial policy finds =========

def twins(name, rows, members=(1, 2), *, base, loss, c, run):
    """Reward models with different heads and data orders, trained on the same rows."""
    out = []
    for i in members:
        seed = 10 * c.seed + i
        model = trained(run, f"{name}-{i}", new_scalar(base.policy, seed), rows, loss, c, base.tok,
                        seed=seed)
        out.append(scalar_reward(model, c))
    return out


def attacker(rewards, objective, name, *, field, base, c, run, **options):
    """A policy trained on a field's prompts to raise objective(z1, z2) of the twins' rewards."""
    z = [field.standard(r) for r in rewards]

    def reward(roll, picked):
        return objective(*(x(roll, picked) for x in z))
    return steer(base, field.problems, reward, c, run, name=name, no_eos=3.0, **options)[0]


def struck(net, rewards, field, base, c):
    """An attacker's samples on a field: (roll, z1, z2, rate of strict success)."""
    roll = samples_of(net, base.tok, base.world, field.problems, c, c.seed + 13, samples=8)
    z1, z2 = (field.standard(r)(roll, field.problems) for r in rewards)
    gold = gold_of(base.world, field.problems, roll, base.tok)
    mu, sd = field.gold.mean(1), field.gold.std(1).clamp(min=1e-3)                       # [P]
    below = (gold - mu.repeat_interleave(8)) / sd.repeat_interleave(8)                   # [B]
    return roll, z1, z2, strict_success(z1, below).float().mean().item()


def findings(net, rewards, field, base, c, rng, lam):
    """Pairs against what an attacker found on its own prompts and the filter kept."""
    roll, z1, z2, _ = struck(net, rewards, field, base, c)
    own1, own2 = (field.standard(r)(field.roll, field.problems) for r in rewards)
    own = own1 - lam * own2                                      # the SFT samples' disagreement
    kept = torch.where(adversarial(z1, z1 - lam * z2, own.mean(), own.std()))[0].tolist()
    return pairs_against(base, field, roll, kept, rng)


def advrm(c, run, base, encoded, loss, rows, *, rounds=2, attack_steps: Count = 160,
          attack_lr: Positive = 1e-3, attack_beta=0.05, lam=1.5, C: Positive = 3.0, rl_steps=120,
          rl_beta=0.0, most: Count = 1500, prompts: Range("[8, inf)") = 1536):
    """Adv-RM (2504.06141): a policy learns to please the reward model while its twin objects; what
    it finds joins the data as rejected, the models are trained anew; then: how far can RLHF push
    before gold falls?

    Against it: plain, the twins' mean and lcb, and as many pairs more of another kind (see arms).
    strict: the share of attacks that the model likes and gold finds far below the SFT samples, on
    prompts the attacker has not seen; strict_overopt: of an attack that over-optimises only."""
    rng, pairs = random.Random(f"advrm/{c.seed}"), partial(sampled_pairs, base, c=c, min_gap=0.02)
    train = encoded(pairs(rows or 4000, seed=1000 + c.seed))
    test = encoded(pairs(800, seed=2000 + c.seed, split="val"))
    seen = Field(base, base.world.problems("train", prompts, c.seed), c)
    unseen = Field(base, base.world.problems("val", prompts // 8, c.seed), c)
    models = partial(twins, base=base, loss=loss, c=c, run=run)
    attack = partial(attacker, field=seen, base=base, c=c, run=run, steps=attack_steps,
                     lr=attack_lr, beta=attack_beta)
    objective, extra = partial(disagreement, lam=lam, C=C), []
    R = R0 = models("round-0", train)
    weak = attack(R, overoptimise, "overopt")
    out = dict(plain_accuracy=pair_accuracy(R[0], test, c, base.pad),
               strict_overopt=struck(weak, R, unseen, base, c)[-1])
    for k in range(rounds):
        net = attack(R, objective, f"attack {k}")
        found = findings(net, R, seen, base, c, rng, lam)[:most]
        confirmed = statistics.fmean(r["margin"] > 0 for r in found) if found else 0.0
        out |= {f"strict_{k}": struck(net, R, unseen, base, c)[-1], f"pairs_{k}": len(found),
                f"confirmed_{k}": confirmed}
        run.say("  " + "  ".join(f"{x} {v:.3g}" for x, v in out.items()))
        extra += encoded(found) if found else []
        R = models(f"round-{k + 1}", [*train, *extra])
    last = attack(R, objective, "last attack")
    out |= dict(strict_last=struck(last, R, unseen, base, c)[-1],
                adv_accuracy=pair_accuracy(R[0], test, c, base.pad))
    roll = struck(weak, R0, seen, base, c)[0]
    order = rng.sample(range(8 * prompts), 8 * prompts)
    more = dict(more_random=pairs_against(base, seen, roll, order, rng)[:len(extra)],
                more_gold=pairs(2 * len(extra) + 64, seed=3000 + c.seed)[:len(extra)])
    more = {name: encoded(found) if found else [] for name, found in more.items()}
    others = {name: models(name, [*train, *found], (1,)) for name, found in more.items()}
    for name, (some, how) in arms(R0, R, others).items():
        total = combined([standardised(r, seen.roll) for r in some], how)
        fared = rlhf(base, total, c, run, name=name, steps=rl_steps, beta=rl_beta)
        out |= {f"{name}|{k}": v for k, v in fared.items()}
    return listed(run, out)


def arms(before, after, others):
    """What RLHF is pushed along: {name: (rewards, aggregate)}. plain, mean and lcb of the twins
    before any attack; adv, retrained; more_random: on as many samples of a policy that only
    over-optimises; more_gold: on as many pairs labelled by gold."""
    return dict(plain=(before[:1], mean), mean=(before, mean), lcb=(before, lcb),
                adv=(after[:1], mean)) | {name: (some, mean) for name, some in others.items()}


RECIPES["advrm"], WORLDS_OF["advrm"] = advrm, ("toyif",)
PRESETS["advrm"] = dict(recipe="advrm", **TOYIF, epochs=4.0)         # epochs: ours


if __name__ == "__main__":
    cli(main)
