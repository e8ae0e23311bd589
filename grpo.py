"""
grpo.py - group-relative policy optimisation with verifiable rewards: sample, compare, reinforce.

    python grpo.py                                 # a tiny model learns to reason: minutes
    python grpo.py --config tiny                   # the same, small: it shows that all turns
    python grpo.py --config dapo --seed 1          # a method of a chapter; --help lists them
    python grpo.py --config dapo --eject mine.py   # the script of one method alone
    python grpo.py --init Qwen2.5-0.5B --data gsm8k.jsonl --config dr_grpo
    python grpo.py --reward mine.py:score          # your own score(problem, text, finished)

The spine is GRPO (2402.03300), whole; its KL penalty is --penalty k3. A chapter is what another
paper changes: rows of axes, and what they ask for by the names of their positional arguments:
facts of responses, of the batch or of a minibatch, and memories of earlier steps.

Letters  P prompts, G samples each, N = P G rows, T tokens; [N, T] is aligned: index t belongs to
         tokens[:, t]
Watch    correct (of training samples, before shaping) should rise. flat is the share of groups
         without a signal: near 1 the prompts are too easy or too hard. Entropy that drops to 0
         early ends exploration; clipped says how many ratios left the trust region. Shorter is
         worthless if the model stops reasoning. kl is k1 to the start, nats per response.
"""
import itertools
import random
import statistics
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Literal

import torch
import torch.nn.functional as F

import kernels
import sft
from data import tasks
from data.run import (Count, MeanOf, Positive, Run, Share, Training, UserError, ask, asked_by,
                      batch_indices, call, check_first_ratio, cli, in_passes, launch, needs, rank,
                      read_log, refuse_alone, report, rows_used, share, start_ranks)
from data.stats import of_samples
from data.tasks import MARK
from model import (PEFT, Transformer, Work, adapter_readers, adapter_state, autocast,
                   check_adapters, clip_gradients, collate, foresee, generate, joined, load,
                   logprobs, open_trained, passes, reference, rows_of, save_trained, shard,
                   snapshot, summed, token_logprobs, use)
from optim import optimiser, set_lr, state_bytes


@dataclass(frozen=True)
class Config(Training):
    """A run's settings; what belongs to a row of an axis is an argument of its function."""
    data: str = "chain"          # a task, several ("chain+sort"), or a JSONL of pairs
    watch: str = ""              # tasks that are evaluated too: what is forgotten?
    init: str = "base:chain"     # the SFT model: where the policy starts, and the reference
    teacher: str = ""            # a better model with the same tokenizer, for what learns from one
    prepare: str = "nothing"     # which row of PREPARATIONS: once, before step 0
    draw: str = "in_turn"        # which row of DRAWS: the prompts of an iteration
    actor: str = "current"       # which row of ACTORS: the model that samples
    reward: str = "task"         # which row of REWARDS, or PATH.py:FUNCTION
    noise: str = "clean"         # which row of NOISES: what becomes of the reward
    trim: str = "whole"          # which row of TRIMS: how many tokens of a response train
    shaper: str = "plain"        # which row of SHAPERS: what a response is worth to training
    advantage: str = "group"     # which row of ADVANTAGES
    credit: str = "same"         # which row of CREDITS: advantages once more
    surrogate: str = "clip"      # which row of SURROGATES
    penalty: str = "none"        # which row of PENALTIES
    weight: str = "sequence_mean"  # which row of WEIGHTS: of a token in the loss
    filter: str = "every"        # which row of FILTERS: the groups that train
    steps: int = 60              # rollout-and-update iterations
    prompts: Count = 16          # groups per iteration
    samples: Count = 8           # responses per group
    minibatches: Count = 4       # optimizer steps per rollout, of whole groups
    pool: Count = 400            # training prompts, visited again and again
    temperature: Positive = 1.0  # of sampling and, the same, of every log-prob
    max_new: int = 0             # longest response in tokens (0: the task says)
    entropy: float = 0.0         # coefficient of an entropy bonus
    kl_reward: float = 0.0       # KL in the reward: β k1 to the reference, nats per response
    eval_prompts: Count = 256    # how many of each held-out split
    eval_samples: Count = 4      # samples of each: pass@k and maj@k
    lr: Positive = 1e-4          # AdamW's, constant after the warm-up
    micro: Count = 64            # responses a forward pass, at least a group: lower it for memory
    save_every: Count = 20       # iterations between checkpoints


# a method's settings are its paper's, or say "ours"; how many prompts, samples, updates and tokens,
# and the lr, are this file's own everywhere, for small models
PRESETS = dict(
    grpo=dict(),                               # the spine's own: no KL, --penalty k3 is the paper's
    tiny=dict(steps=4, prompts=4, samples=4, minibatches=2, eval_every=2,
              eval_prompts=16, save_every=2, max_new=24, pool=32),       # goes with every method
)
CURVES = {"correct": ["correct", "val_accuracy", "val_greedy", "ood_accuracy", "val_rouge_l",
                      "val_gold", "chain_val_accuracy", "sort_val_accuracy"],
          "length, tokens": ["length"], "entropy, nats": ["entropy"], "flat groups": ["flat"],
          "KL to the start, nats per response": ["kl"], "clipped": ["clipped"]}

# --- GRPO: the plain row of every axis ------------------------------------------------------------


def nothing(pool, c):
    """Training begins at once.   -> the prompts, the temperature, what was measured"""
    return pool, c.temperature, {}


def in_turn(pool, cursor, c):
    """The next prompts, shuffled anew every epoch.   -> their places in the pool, the problems"""
    where = batch_indices(len(pool), c.prompts, cursor, c.seed).tolist()
    return where, [pool[i] for i in where]


def current(policy):
    """The policy itself, as it is now."""
    return policy


def plain(score):
    """The reward as it is: no noise, and what a response is worth to training.   [P, G]"""
    return score


def whole(length):
    """All tokens of a response train.   [P, G]"""
    return length


def tokens_of(x, mask):
    """A number of each response on each of its tokens.   [P, G], [N, T] -> [N, T]"""
    return x.reshape(-1, 1) * mask


def deviations(x):
    """x less its group's mean, exactly 0 in a group of equals, whatever rounding does.   [P, G]"""
    x = x - x[:, :1]
    return x - x.mean(1, keepdim=True)


def group_norm(shaped, mask, *, group_eps=1e-6):
    """GRPO (2402.03300 §4.1.2):  A = (R - mean) / (std + eps), the group's; std unbiased."""
    A = deviations(shaped)                                                               # [P, G]
    return tokens_of(A / (A.std(1, keepdim=True) + group_eps), mask)


def same(adv):
    """The advantages as they are.   [N, T]"""
    return adv


def ratio_of(logp, old_logp, most=20.0):
    """π/π_old, its logarithm capped against overflow."""
    return (logp - old_logp).clamp(-most, most).exp()


def clip(logp, old_logp, adv, *, eps: Positive = 0.2):
    """PPO's (1707.06347 eq. 7):  max(-A ρ, -A clip(ρ, 1-ε, 1+ε)), a loss a token.   [n, T]

    Of every surrogate with an eps the second argument is what its ratio is around.
    """
    ratio = ratio_of(logp, old_logp)                                                     # [n, T]
    return torch.maximum(-adv * ratio, -adv * ratio.clamp(1 - eps, 1 + eps))


def none(logp):
    """No penalty.   [n, T]"""
    return torch.zeros_like(logp)


def k3(logp, ref_logp, *, beta=0.04):
    """GRPO's KL (2402.03300 eq. 4):  β (exp(-d) - 1 + d), d = log π/π_ref.   [n, T]

    Unbiased and never below 0; its gradient is that of KL(π_ref||π).
    """
    d = (logp - ref_logp).clamp(-20, 20)
    return beta * (torch.expm1(-d) + d).clamp(max=10)


def sequence_mean(mask):
    """Every response alike, a token 1/L of it: the loss is Σ loss · weight.   [N, T]"""
    return mask / mask.sum(1, keepdim=True).clamp(min=1) / len(mask)


def every(fresh):
    """All groups of one round.   fresh: rounds, made as they are asked for -> batch, all seen"""
    groups = next(fresh)
    return dict(groups), groups


PREPARATIONS = dict(nothing=nothing)
DRAWS = dict(in_turn=in_turn)
ACTORS = dict(current=current)
REWARDS = dict(task=tasks.REWARDS["task"], PATH=tasks.scorer)
NOISES = dict(clean=plain)
TRIMS = dict(whole=whole)
SHAPERS = dict(plain=plain)
ADVANTAGES = dict(group=group_norm)
CREDITS = dict(same=same)
SURROGATES = dict(clip=clip)
PENALTIES = dict(none=none, k3=k3)
WEIGHTS = dict(sequence_mean=sequence_mean)
FILTERS = dict(every=every)
AXES = dict(prepare=PREPARATIONS, draw=DRAWS, actor=ACTORS, reward=REWARDS, noise=NOISES,
            trim=TRIMS, shaper=SHAPERS, advantage=ADVANTAGES, credit=CREDITS, surrogate=SURROGATES,
            penalty=PENALTIES, weight=WEIGHTS, filter=FILTERS, peft=PEFT, kernels=kernels.MODES)

# --- what functions ask for -----------------------------------------------------------------------


FACTS = {}                       # of responses, before the filter: P or N numbers
BATCH = {}                       # of the batch that trains
MINIBATCH = {}                   # of a minibatch, before its gradient
MEMORIES = {}                    # classes: tell() before a step, note(…) after, state(), load()
KL_EVERY = 5                     # iterations between the log's KLs where nothing else reads them

# --- roll out, evaluate ---------------------------------------------------------------------------


def rollouts(model, problems, tok, c, samples, generator):
    """Samples of many problems, as many rows at once as a step has; yields (problems, Rollout)."""
    size = max(1, c.prompts * c.samples // samples)
    for i in range(0, len(problems), size):
        some = problems[i:i + size]
        with autocast(c.device, c.dtype):
            yield some, generate(model, [tok.prompt(p, c.chat) for p in some], c.max_new,
                                 samples=samples, temperature=c.temperature,
                                 generator=generator, slots=c.slots)


def graded(score, problems, roll, tok, samples):
    """A reward of every response.   -> [P, G], the texts"""
    texts, finished = [tok.decode(ids) for ids in roll.completions()], roll.finished.tolist()
    rewards = share(rank() or [float(score(problems[i // samples], text, done))  # the first rank's
                               for i, (text, done) in enumerate(zip(texts, finished))])
    return torch.tensor(rewards, device=roll.tokens.device).view(-1, samples), texts


def respond(known, f, asked, cursor):
    """One round: prompts, responses, and by name what is known of them, [P, G] tensors mostly."""
    c, task, tok = known["c"], known["task"], known["tok"]
    where, problems = call(f.draw, known | dict(cursor=cursor))
    _, roll = next(rollouts(known["actor"], problems, tok, c, c.samples, known["generator"]))
    score, texts = graded(known["score_of"], problems, roll, tok, c.samples)             # [P, G]
    right = score
    if c.reward != "task" and task.metric == "accuracy":       # the score does not say it
        right, _ = graded(task.reward, problems, roll, tok, c.samples)
    groups = known | dict(
        problems=problems, posed=[p for p in problems for _ in range(c.samples)], roll=roll,
        texts=texts, where=torch.tensor(where, device=c.device)[:, None], score=score,
        correct=(right > 0.5).to(score), length=roll.mask.sum(1).view(score.shape),
        truncated=~roll.finished.view(score.shape), cap=c.max_new, passed=len(problems))
    for name in sorted(asked & FACTS.keys()):
        fact = torch.as_tensor(call(FACTS[name], groups), dtype=torch.float32, device=c.device)
        groups[name] = fact.view(len(problems), -1)                            # [P, G] or [P, 1]
    groups["score"] = call(f.noise, groups)
    groups["trained"] = call(f.trim, groups)
    groups["shaped"] = call(f.shaper, groups)
    return groups


def evaluate(policy, sets, tok, c):
    """Held-out prompts, always the same and with the same draws, sampled as in training.

    sets: {split: (task, problems)}. greedy: the accuracy at temperature 0; length_right and
    _wrong: of right and of wrong responses, 0 for none. -> {split_key: mean}, some samples
    """
    out, samples, G = {}, [], c.eval_samples
    for split, (task, problems) in sets.items():
        scores, greedy, lengths, texts, finished = [], [], [], [], []
        g = torch.Generator().manual_seed(c.seed + 1)
        for some, roll in rollouts(policy, problems, tok, c, G, g):
            cold = replace(c, temperature=0.0, prompts=len(some))
            _, greedily = next(rollouts(policy, some, tok, cold, 1, g))
            score, written = graded(task.reward, some, roll, tok, G)                     # [p, G]
            scores.append(score)
            greedy.append(graded(task.reward, some, greedily, tok, 1)[0])
            lengths.append(roll.mask.sum(1).view(-1, G))
            texts += written
            finished.append(roll.finished)
        posed = [p for p in problems for _ in range(G)]
        means = measured(task, posed, texts, torch.cat(scores), torch.cat(lengths),
                         torch.cat(finished)) | dict(greedy=MeanOf(torch.cat(greedy)))
        out |= {f"{split}_{k}": x for k, x in means.items()}
        samples += [(tok.shown(p, c.chat), text, task.demo(p))
                    for p, text in zip(problems[:2], texts[::G])]
    return out, samples


# --- train ----------------------------------------------------------------------------------------


def of_groups(batch, groups):
    """A batch's tensors of some groups: the rows of a [P, …], the responses' of a [N, …]."""
    P, G = batch["length"].shape
    rows = (groups[:, None] * G + torch.arange(G, device=groups.device)).flatten()       # [n]
    return {k: x[groups if len(x) == P else rows] for k, x in batch.items()}


def backward(policy, batch, groups, c, f, g, progress=0.0):
    """Gradients of one minibatch of whole groups -> what happened, a dict of floats.

    batch: tensors [N, T], [P, G] or [P, 1]. The weights are those of the whole minibatch, so
    --micro changes nothing. progress: how much of the run is over, for what is annealed.
    """
    mini = of_groups(batch, groups)
    width, aligned = int(mini["ends"].max()), mini["mask"].shape
    mini = {k: x[:, :width] if x.shape == aligned else x for k, x in mini.items()}
    numbers = dict(cap=c.max_new, groups=len(groups), progress=progress)
    known = f.surrogate.keywords | mini | numbers | dict(policy=policy, c=c, generator=g)
    ask(set(needs(f.surrogate)), MINIBATCH, known)
    mini |= {k: known[k] for k in needs(f.surrogate) if k in MINIBATCH}                  # [n, T]
    mini["weight"] = call(f.weight, known)                                               # [n, T]
    metrics = dict(loss=0.0, clipped=0.0, entropy=0.0, worst=0.0, off=0.0)
    n, low = mini["mask"].sum().clamp(min=1), f.surrogate.keywords.get("eps", 0.0)
    high = f.surrogate.keywords.get("eps_high", 0.0) or low           # some clip apart, above
    order = torch.arange(len(groups), device=groups.device)
    for part, weight in passes(order, max(1, c.micro // c.samples)):
        b = of_groups(mini, part)
        with autocast(c.device, c.dtype):
            logp, entropy = token_logprobs(policy, b["tokens"], b["mask"], entropy=True,
                                           temperature=c.temperature)
        known = numbers | b | dict(logp=logp)
        loss = call(f.surrogate, known)                                      # [n, T] or [p]
        loss = loss.sum() / len(groups) if loss.dim() == 1 else (loss * b["weight"]).sum()
        more = call(f.penalty, known)                                                    # [n, T]
        more = more - c.entropy * entropy if c.entropy else more
        loss = loss + (more * b["weight"]).sum()
        (loss * weight).backward()
        if not weight:
            continue
        off = (ratio_of(logp.detach(), b["old_logp"]) - 1).abs() * b["mask"]             # [n, T]
        ratio = ratio_of(logp.detach(), known[needs(f.surrogate)[1]] if low else logp.detach())
        clipped = (ratio < 1 - low) | (ratio > 1 + high)
        metrics["loss"] += loss.item()
        metrics["worst"] = max(metrics["worst"], off.max().item())
        for key, x in dict(off=off, clipped=clipped, entropy=entropy.detach()).items():
            metrics[key] += ((x * b["mask"]).sum() / n).item()
    return summed(metrics, largest=["worst"])


def train(c, f):
    """One run: load, roll out, score, update, tell. -> the last evaluation, and the first (sft_)"""
    start_ranks(c.device)                        # alone without torchrun
    ours = c.reward in tasks.REWARDS
    tasks.check_data(c.data, is_text=False, needs="answers" if ours else "", **tasks.reading(c))
    task = tasks.of_run(c)
    asked = check(c, f, task)
    score_of = partial(f.reward, task=task) if ours else f.reward(c.reward, task)
    if task.metric == "reward":                  # a file of prompts: the user's is all there is
        task.reward = score_of
    init = sft.find(c.init, c.config, seed=c.seed, device=c.device)     # before the run's clock
    use(c)
    with Run(c, f, "grpo", CURVES) as run:
        saved = run.state or {}
        policy, tok = open_trained(c, f.peft, init, run.last, saved.get("adapter", ()))
        ref = reference(policy, c, init)
        whole, _ = shard(policy, c.dtype), shard(ref, c.dtype)             # over torchrun's ranks
        pool, sets = task.problems("train", c.pool, 1000 + c.seed), held_out(c, task)
        context = policy.config.max_position_embeddings
        posed = {split: some for split, (_, some) in sets.items()}
        room, pool, posed = tasks.fitting(c, tok, pool, posed, task.max_new, context)
        sets = {split: (sets[split][0], some) for split, some in posed.items()}
        c = in_passes(replace(c, max_new=room), len(pool), c.prompts)
        opt, g = optimiser(policy, lr=c.lr), torch.Generator().manual_seed(c.seed)
        known = dict(c=c, task=task, tok=tok, policy=policy, ref=ref, pool=pool, score_of=score_of,
                     generator=torch.Generator().manual_seed(c.seed + 2))
        pool, heat, found = prepared = saved.get("prepared") or call(f.prepare, known)
        c = replace(c, temperature=heat)
        known |= dict(c=c, pool=pool, generator=g)
        memories = {k: call(MEMORIES[k], known) for k in sorted(asked & MEMORIES.keys())}
        size = sum(p.numel() for p in policy.parameters()) / 1e6
        run.say(f"{run.folder}: {size:.2f} M parameters, {tasks.out_of(pool, task)}, {c.steps} "
                f"steps of {c.prompts} x {c.samples} responses, temperature {heat:.3g}, "
                + c.computes + "".join(f", {k} {x:.3f}" for k, x in found.items()))
        outlook(run, c, policy, [ref], opt, [*pool, *sum(posed.values(), [])], tok)
        if saved:
            opt.load_state_dict(saved.pop("opt"))
            g.set_state(saved["rng"])
            cursor, before = saved["cursor"], saved["before"]
            for name, memory in memories.items():
                memory.load(saved["memories"][name])
        else:
            cursor, (before, samples) = 0, evaluate(policy, sets, tok, c)
            run.log(0, **before, show=True)
        scores, trained = before, torch.compile(policy) if c.compile else policy

        for step in run.steps(c.steps):
            # 1. roll out: rounds of groups, as many as the filter asks for
            run.phase("gen")
            known |= {name: memory.tell() for name, memory in memories.items()}
            actor = known["actor"] = call(f.actor, known)
            fresh = (respond(known, f, asked, i) for i in itertools.count(cursor))
            batch, seen = call(f.filter, known | dict(fresh=fresh, prompts=c.prompts))
            cursor += len(seen["score"]) // c.prompts
            if step == 0 and (silence := tasks.no_signal(task, batch["texts"], seen)):
                run.say(silence)
            # 2. score: [N, T], but [P, G] where it belongs to a response
            run.phase("score")
            roll = batch["roll"]
            mask = roll.mask * (roll.mask.cumsum(1) <= batch["trained"].view(-1, 1))
            old_logp = roll.logp if actor is policy else logprobs(policy, roll.tokens, mask, c)
            batch |= f.weight.keywords | dict(mask=mask, old_logp=old_logp)
            away = {}
            logged = step % KL_EVERY == 0 or step + 1 == c.steps
            if logged or c.kl_reward or "ref_logp" in asked:
                batch["ref_logp"] = logprobs(ref, roll.tokens, mask, c)
                kl = ((old_logp - batch["ref_logp"]) * mask).sum(1)                      # [N]
                batch["shaped"] = batch["shaped"] - c.kl_reward * kl.view(-1, c.samples)
                away = dict(kl=kl.mean())
            ask(asked, BATCH, batch)
            batch["adv"] = call(f.advantage, batch)
            batch["adv"] = call(f.credit, batch) * (batch["passed"] > 0)
            ends = (roll.prompt_len + roll.mask.sum(1).long())[:, None]                  # [N, 1]
            tensors = {k: x for k, x in batch.items() if torch.is_tensor(x)}
            tensors |= dict(tokens=roll.tokens, ends=ends)
            # 3. update: minibatches of whole groups
            run.phase("update")
            updates = []
            set_lr(opt, c.lr * min(1.0, (step + 1) / max(1, c.warmup)))
            order = torch.randperm(len(batch["score"]), generator=g).to(mask.device)
            for groups in order.split(c.prompts // c.minibatches):
                updates.append(backward(trained, tensors, groups, c, f, g,
                                        step / max(1, c.steps - 1)))
                if len(updates) == 1 and actor is policy:
                    check_first_ratio(updates[0], c.dtype)
                norm = clip_gradients(policy, 1.0)
                opt.step()
                opt.zero_grad()
            # 4. tell
            flat = seen["shaped"].std(1, correction=0) < 1e-6                            # [P]
            row = dict(correct=seen["correct"].mean(), reward=seen["shaped"].mean(),
                       flat=flat.float().mean(), length=seen["length"].mean(),
                       truncated=seen["truncated"].float().mean(), **away, norm=norm,
                       entropy=updates[0]["entropy"], groups=min(batch["passed"], c.prompts),
                       generated=seen["length"].sum())
            for key in ("loss", "clipped"):
                row[key] = sum(x[key] for x in updates) / len(updates)
            for memory in memories.values():
                row |= call(memory.note, batch | seen | dict(done=step + 1)) or {}
            run.log(step + 1, **row)
            if (step + 1) % c.eval_every == 0 or step + 1 == c.steps:
                run.check(step + 1, policy)
                scores, samples = evaluate(policy, sets, tok, c)
                run.log(step + 1, **scores, show=True)
            if (step + 1) % c.save_every == 0 or step + 1 in (c.steps, c.stop):
                net, state = whole(), opt.state_dict()       # every rank takes part
                run.save(step + 1, lambda folder: save_trained(net, tok, folder, c, init),
                         opt=state, adapter=adapter_state(net), rng=g.get_state(), cursor=cursor,
                         before=before, prepared=prepared,
                         memories={name: memory.state() for name, memory in memories.items()})
        if c.stop and c.stop < c.steps:
            return scores
        if saved and run.start >= c.steps:                       # resumed after its last step
            scores, samples = evaluate(policy, sets, tok, c)
        report(run, before, scores, samples)
        rows = [row for row in read_log(run.folder) if "entropy" in row][-10:]
        for key in ("correct", "entropy", "length", "flat", "kl", "generated") if rows else ():
            found[f"train_{key}"] = statistics.fmean(row[key] for row in rows if key in row)
        return run.finish(**scores, **found, **{f"sft_{k}": x for k, x in before.items()})


def main(argv=None):
    """python grpo.py …: see the docstring above, or --help."""
    return launch("grpo", Config, PRESETS, AXES, __doc__, train, argv, readers, ranks=True)


# === lora: 2106.09685, adapters in the place of all weights; their base is the reference ==========

PRESETS["lora"] = dict(peft="lora", lr=4e-4)                 # ours: four times full training's


# === refused: what does not go together, told before anything is made =============================


def asked_for(f):
    """The names that a run's functions ask for, and those that what answers them asks for."""
    functions = [getattr(f, axis) for axis in AXES if axis != "kernels"]
    return asked_by(functions, [FACTS, BATCH, MINIBATCH, MEMORIES])


def readers(c, f):
    """{field: (whether this run reads it, what does)} of the fields that not every run reads."""
    adv = "adv" in {*needs(f.surrogate), *needs(f.penalty)}
    shaped = adv and "shaped" in needs(f.advantage)
    score = "score" in needs(f.shaper) and shaped or c.filter != "every"
    learner = "a --surrogate or --penalty of advantages"
    return dict(advantage=(adv, learner), credit=(adv, learner),
                shaper=(shaped or c.filter != "every", "an --advantage of rewards"),
                kl_reward=(shaped, "an --advantage of rewards"),
                reward=(score, "a --shaper of scores"), noise=(score, "a --shaper of scores"),
                teacher=("teacher" in asked_for(f), "what learns from one: kdrl, rlad, opd"),
                **tasks.file_readers(c), **adapter_readers(c))


def compares(c):
    """Words against groups in which nothing can be compared."""
    return f"--samples {c.samples}: a group needs two responses to compare" * (c.samples < 2)


CHECKS = dict(group=compares)    # of rows of the axes: what is wrong, in words, or ""
ALONE = {}                       # what is asked for and torchrun cannot spread: why


def check(c, f, task):
    """The names that a run asks for; UserError where its parts do not fit together, and for all
    that can be known before anything is made: files, folders, a reward of your own."""
    asked, known = asked_for(f), dict(c=c, f=f, task=task)
    rows = dict.fromkeys(rows_used(c, AXES).values())
    words = [call(CHECKS[row], known) for row in rows if row in CHECKS]
    words += [f"--prompts {c.prompts} does not part into --minibatches {c.minibatches} of whole "
              "groups; --minibatches 1 does"] * (c.prompts % c.minibatches > 0)
    for wrong in filter(None, words):
        raise UserError(wrong)
    for name in filter(None, c.watch.split(",")):
        tasks.check_data(name, is_text=False, needs="answers")
    most = sft.find(c.init, c.config, make=False)
    if c.max_new >= most:
        raise UserError(f"--max_new {c.max_new} does not fit the {most} tokens of {c.init}")
    refuse_alone(c, asked, ALONE)
    check_adapters(c, c.init)
    return asked


def lacks(task, skill):
    """Words against a task that cannot do what a method needs."""
    able = all(hasattr(x, skill) for x in getattr(task, "parts", [task]))
    return (f"this method needs a task with {skill!r}, see data/tasks.py; {task.name} has "
            "none") * (not able)


def unanswered(task):
    """Words against a task that is not solved by an answer."""
    return f"this method asks for answers: {task.name} has none" * (task.metric != "accuracy")

# === measured: 2107.03374, 2203.11171, what samples of held-out prompts come to: pass@k, maj@k ====


def held_out(c, task):
    """{split: (task, problems)} of what is evaluated: the task's own, and that of --watch."""
    watched = {"": task} | {f"{x}_": tasks.task(x) for x in c.watch.split(",") if x}
    return {f"{tag}{split}": (one, one.problems(split, c.eval_prompts, c.seed))
            for tag, one in watched.items() for split in ("val", "ood") if split in one.splits}


def outlook(run, c, policy, frozen, opt, problems, tok):
    """Say what the run will hold: a micro-batch of the longest responses, and a rollout."""
    width = max(len(tok.prompt(p, c.chat)) for p in problems) + c.max_new
    work = Work(c.micro, width, c.prompts // c.minibatches * c.samples, group=c.samples,
                sampled=min(c.prompts * c.samples, c.slots or c.prompts * c.samples),
                slots=width, knob="--prompts", recompute=c.recompute)
    foresee(run, c, work, [policy], frozen, state_bytes(opt))


def measured(task, posed, texts, score, length, finished):
    """What a split's samples come to, by name.   score, length [P, G]; posed, texts of N"""
    out = {"length": MeanOf(length), "truncated": 1 - finished.float().mean().item(),
           task.metric: MeanOf(score)}
    homes = [tasks.part(task, p) for p in posed]
    if task.metric == "accuracy":
        answers = [tasks.stated(x, text) if done else ""
                   for x, text, done in zip(homes, texts, finished.tolist())]
        out |= of_samples(score > 0.5, answers)
        for kind, rows in dict(right=score > 0.5, wrong=score < 0.5).items():
            out[f"length_{kind}"] = length[rows].mean().item() if rows.any() else 0.0
    habits = [x.habits(text) for x, text in zip(homes, texts) if hasattr(x, "habits")]
    for key in habits[0] if habits else ():
        out[key] = statistics.fmean(x[key] for x in habits)
    return out


# of the claims that judge by pass@8
PRESETS["wide"] = dict(eval_samples=8, eval_every=60, save_every=60, keep=1)

# === dr_grpo: 2503.20783, no std, and a constant in the place of each response's length ===========


def centred(shaped, mask):
    """Dr. GRPO (2503.20783):  A = R - mean: no prompt counts more for being easy or hard."""
    return tokens_of(deviations(shaped), mask)


def constant(mask, cap):
    """Every token alike and by a constant, the longest response allowed.   [N, T]"""
    return mask / (len(mask) * cap)


ADVANTAGES["centred"], WEIGHTS["constant"] = centred, constant
CHECKS["centred"] = compares
PRESETS["dr_grpo"] = dict(advantage="centred", weight="constant")

# === rloo: 2402.14740, the other samples' mean as baseline, no clip, KL in the reward =============


def leave_one_out(shaped, mask):
    """RLOO (2402.14740):  A = R - mean of the others = (R - mean) G / (G - 1)."""
    G = shaped.size(1)
    return tokens_of(deviations(shaped) * G / (G - 1), mask)


def reinforce(logp, adv):
    """-A log π: one step a rollout, no ratio.   [n, T]"""
    return -adv * logp


def sequence_sum(mask):
    """Every response's sum, averaged.   [N, T]"""
    return mask / len(mask)


ADVANTAGES["rloo"], SURROGATES["reinforce"] = leave_one_out, reinforce
WEIGHTS["sequence_sum"] = sequence_sum
CHECKS["rloo"] = compares
# kl_reward is ours: the paper's best is unknown to us
PRESETS["rloo"] = dict(advantage="rloo", surrogate="reinforce", weight="sequence_sum",
                       minibatches=1, kl_reward=0.05)

# === dapo: 2503.14476, clip-higher, only mixed groups, token-level mean, overlong ones pay ========


def overlong(score, length, cap, *, buffer=16):
    """DAPO (2503.14476 eq. 13): ±1, and minus up to 1 in the last `buffer` tokens to the cap.

    buffer is ours, about a fifth of a short cap, as the paper's 4096 of 20480.   [P, G]
    """
    return 2 * score - 1 + ((cap - buffer - length) / buffer).clamp(-1, 0)


def clip_higher(logp, old_logp, adv, *, eps: Positive = 0.2, eps_high=0.28, dual=0.0):
    """DAPO (2503.14476):  max(-A ρ, -A clip(ρ, 1-ε, 1+ε_high)): room for what was unlikely.

    dual > 1: where A < 0 the loss is at most -A dual (dual clip, 1912.09729).   [n, T]
    """
    ratio = ratio_of(logp, old_logp)                                                     # [n, T]
    loss = torch.maximum(-adv * ratio, -adv * ratio.clamp(1 - eps, 1 + eps_high))
    return torch.where(adv < 0, torch.minimum(loss, -adv * dual), loss) if dual else loss


def token_mean(mask):
    """Every token alike.   [N, T]"""
    return mask / mask.sum().clamp(min=1)


def chosen(groups, keep):
    """What is known of the groups where keep [P] is true."""
    rows = keep.repeat_interleave(len(groups["posed"]) // len(keep))                     # [N]
    out = {k: x[keep] if torch.is_tensor(x) else x for k, x in groups.items()}
    for name, where in dict(problems=keep, posed=rows, texts=rows).items():
        out[name] = list(itertools.compress(groups[name], where.tolist()))
    return out | dict(roll=rows_of(groups["roll"], rows))


def together(rounds):
    """Rounds of groups as one, their rollouts padded to the widest."""
    out = dict(rounds[0])
    for name, x in rounds[0].items():
        out[name] = torch.cat([x[name] for x in rounds]) if torch.is_tensor(x) else x
    for name in ("problems", "posed", "texts"):
        out[name] = [x for one in rounds for x in one[name]]
    pad = max(out["ref"].config.pad_token_id, 0)
    return out | dict(roll=joined([x["roll"] for x in rounds], pad))


def gathered(fresh, prompts, rounds, keep):
    """Rounds until so many groups are kept.   keep: groups -> [P] bool.   -> batch, all seen"""
    seen, kept, passed = [], [], 0
    for groups in itertools.islice(fresh, rounds):
        good = keep(groups)                                                              # [P]
        seen.append(groups)
        kept.append(chosen(groups, good))
        passed += int(good.sum())
        if passed >= prompts:
            break
    batch = together(kept if passed else seen[-1:])              # all are flat: a penalty can teach
    first = torch.arange(len(batch["score"]), device=batch["score"].device) < prompts
    return chosen(batch, first) | dict(passed=passed), together(seen)


def mixed(fresh, prompts, *, rounds: Count = 10):
    """Groups whose rewards differ, before a shaper's length terms; up to so many rounds."""
    return gathered(fresh, prompts, rounds, lambda groups: groups["score"].std(1) > 1e-6)


SHAPERS["overlong"], SURROGATES["clip_higher"] = overlong, clip_higher
WEIGHTS["token_mean"], FILTERS["mixed"] = token_mean, mixed
CHECKS["mixed"] = compares
PRESETS["dapo"] = dict(shaper="overlong", filter="mixed", surrogate="clip_higher",
                       weight="token_mean")

# === reinforce_pp, rpp_baseline: 2501.03262, no group: whitened over the batch's tokens ===========


def whiten(x, mask, eps=1e-8):
    """(x - mean) / std over all valid tokens, unbiased.   [N, T]"""
    n = mask.sum()
    mean = (x * mask).sum() / n
    var = ((x - mean) ** 2 * mask).sum() / (n - 1).clamp(min=1)
    return (x - mean) * torch.rsqrt(var + eps) * mask


def returns(shaped, mask, old_logp, ref_logp, *, beta=0.0):
    """REINFORCE++ (2501.03262): R at the last token less β k1 of each from t on, whitened.

    β 0 is ours: without KL, as the spine.   [N, T]
    """
    k1 = (old_logp - ref_logp) * mask                                                    # [N, T]
    ahead = k1.flip(1).cumsum(1).flip(1)
    return whiten(tokens_of(shaped, mask) - beta * ahead * mask, mask)


def whitened(shaped, mask):
    """REINFORCE++-baseline (2501.03262): less the group's mean, whitened over the batch.

    Over tokens, so that long responses count for more, and a group without a signal is not quite
    at 0. Without KL in the preset: ours, --penalty k2 adds it.
    """
    return whiten(centred(shaped, mask), mask)


ADVANTAGES["returns"], ADVANTAGES["whitened"] = returns, whitened
CHECKS["whitened"] = compares
PRESETS["reinforce_pp"] = dict(advantage="returns", weight="token_mean")
PRESETS["rpp_baseline"] = dict(advantage="whitened", weight="token_mean")

# === dler, da_dler: 2510.15110, truncation as the only penalty, whitened over the batch ===========


def targets(correct, length, target, easy):
    """The longest response; `easy` (if not 0): of prompts half solved within the target.  [P, 1]"""
    solved = (correct * (length <= target)).mean(1, keepdim=True) >= 0.5                 # [P, 1]
    return torch.where(solved, float(easy or target), float(target))


def to_target(correct, length, *, target: Count = 22, easy=0):
    """DLER (2510.15110): as if generation had stopped at the target.   [P, G]

    target is ours (the paper's 4000): a chain without a wasted token has 18.
    """
    return torch.minimum(length, targets(correct, length, target, easy))


def truncate(score, correct, length, *, target: Count = 22, easy=0):
    """DLER (2510.15110): nothing for a response longer than the target.   [P, G]"""
    return score * (length <= targets(correct, length, target, easy))


def mixed_shaped(fresh, prompts, *, rounds: Count = 10):
    """Groups whose shaped rewards differ, where truncation is the only shaping."""
    return gathered(fresh, prompts, rounds, lambda groups: groups["shaped"].std(1) > 1e-6)


TRIMS["to_target"], SHAPERS["truncate"], FILTERS["mixed_shaped"] = to_target, truncate, mixed_shaped
CHECKS["mixed_shaped"] = compares
PRESETS["dler"] = dict(trim="to_target", shaper="truncate", filter="mixed_shaped",
                       advantage="whitened", surrogate="clip_higher", dual=10.0,
                       weight="token_mean", penalty="k3", beta=5e-4)
# DA-DLER: prompts that are mostly solved get a shorter target; both ours (the paper's 4000, 2000)
PRESETS["da_dler"] = PRESETS["dler"] | dict(target=26, easy=18)

# === dot: 2601.03969, in groups all correct the longest outliers are cut off, and so fail =========


def outliers(correct, length, *, spread: Positive = 1.5, least=2):
    """DOT (2601.03969): in a group all correct, ⌊mean + α std⌋ of what is `least` tokens longer.

    The paper's α = 3 can never be reached in a group of ten or fewer: z <= (G - 1) / √G. spread and
    least (the paper's 32 of 8192 tokens) are ours.   [P, G]
    """
    limit = length.mean(1, keepdim=True) + spread * length.std(1, keepdim=True)          # [P, 1]
    limit = limit.floor()
    cut = (correct.min(1, keepdim=True).values > 0) & (length - limit >= least)
    return torch.where(cut, limit, length)


def regraded(score, length, trained):
    """DOT (2601.03969): what was cut has no end, and so no reward.   [P, G]"""
    return score * (trained >= length)


TRIMS["outliers"], SHAPERS["regraded"] = outliers, regraded
CHECKS["regraded"] = lambda c: ("--shaper regraded does nothing with --trim whole, which cuts "
                                "nothing: try --trim outliers") * (c.trim == "whole")
# ours: rounds until enough groups differ, where the paper predicts how many prompts it needs
PRESETS["dot"] = dict(trim="outliers", shaper="regraded", filter="mixed_shaped",
                      surrogate="kl_cov", samples=16, prompts=8)

# === linear: control, every response pays for its length ==========================================


def linear_length(score, length, cap, *, price=0.1, correct_only=False):
    """R - a L/C for every response, or for what earned something (correct_only).   [P, G]"""
    return score - price * length / cap * (score if correct_only else 1)


SHAPERS["linear"] = linear_length

# === easy: 2505.18086, GRPO-λ, a length penalty in the easiest groups only ========================


def among_correct(x, correct, unbiased=False):
    """Mean and std of x over each group's correct responses, [P, 1] each; std 1 for fewer than
    two."""
    n = correct.sum(1, keepdim=True)                                                     # [P, 1]
    mean = (x * correct).sum(1, keepdim=True) / n.clamp(min=1)
    var = ((x - mean) ** 2 * correct).sum(1, keepdim=True) / (n - int(unbiased)).clamp(min=1)
    return mean, torch.where(n > 1, var.sqrt(), torch.ones_like(var))


def easiest(correct, length, *, share: Share = 0.2, alpha=0.6):
    """GRPO-λ (2505.18086): in the ⌈λP⌉ groups with most correct ones, c (1 - α σ((L - μ) / s)).

    μ, s: mean and population std of the correct responses' lengths. Ties: the earlier prompt. α is
    ours: the paper's is unknown to us, 0.6 is that of others who rebuilt it.
    """
    mean, std = among_correct(length, correct)
    z = (length - mean) / std.clamp(min=1e-4)                                            # [P, G]
    penalised = correct * (1 - alpha * torch.sigmoid(z))
    k = min(len(correct), -int(-share * len(correct) // 1))                            # the ceiling
    picked = correct.mean(1).argsort(descending=True, stable=True)[:k]                   # [k]
    among = torch.zeros(len(correct), 1, dtype=torch.bool, device=correct.device)
    return torch.where(among.index_fill(0, picked, True), penalised, correct)


SHAPERS["easy"] = easiest

# === hapo: 2505.11225, beat the shortest correct response that the prompt has ever had ============


class Records:
    """The length of each prompt's shortest correct response yet, inf for none."""

    def __init__(self, pool):
        self.best = [float("inf")] * len(pool)

    def tell(self):
        """A list of the pool's length."""
        return self.best

    def note(self, where, length, correct):
        """The responses of a step: where [P, 1], length and correct [P, G]."""
        for i, lengths, right in zip(where.flatten().tolist(), length, correct):
            self.best[i] = min([self.best[i], *lengths[right > 0].tolist()])

    def state(self):
        """What a checkpoint keeps."""
        return self.best

    def load(self, state):
        """Go on from what a checkpoint kept."""
        self.best = state


def record_of(records, where):
    """The record of each prompt.   [P, 1]"""
    return [records[i] for i in where.flatten().tolist()]


def history(correct, length, best, *, weight=1.0, floor=-0.7, wrong_penalty=True):
    """HAPO (2505.11225): c + w f, f = cos(π/2 L/h) up to twice the record h, else -1; 0 without h.

    best [P, 1]: h, inf for none. Correct: max(f, floor); wrong: min(f, 0), or 0 without
    wrong_penalty.
    """
    f = torch.where(length < 2 * best, torch.cos(torch.pi / 2 * length / best),
                    -torch.ones_like(length))
    wrong = f.clamp(max=0) if wrong_penalty else torch.zeros_like(f)
    f = torch.where(correct > 0, f.clamp(min=floor), wrong)
    return correct + weight * torch.where(torch.isfinite(best), f, torch.zeros_like(f))


MEMORIES["records"], FACTS["best"], SHAPERS["history"] = Records, record_of, history
PRESETS["hapo"] = dict(shaper="history", pool=60)              # ours: so few come back in 60 steps

# === arlcp: 2602.12113, reflection and length penalised, by how much a response reflects ==========


def reflections(texts, posed, task):
    """How often each response looks again: wait, but, …   of N"""
    return [tasks.second_looks(tasks.part(task, p), text) for p, text in zip(posed, texts)]


def share_of_correct(x, correct):
    """σ of x's z-score against the group's correct responses.   [P, G]"""
    mean, std = among_correct(x, correct, unbiased=True)
    return torch.sigmoid((x - mean) / (std + 1e-6))


def reflective(correct, length, reflections, *, low=1, high=3):
    """ARLCP (2602.12113): c (1 - λ1 σ(z_K) - λ2 σ(z_L)), λ1 = .05, .10, .15 by the reflections K.

    λ1 + λ2 = .2. The paper's steps are 40 and 80 of its much longer responses.   [P, G]
    """
    first = 0.05 + 0.05 * (reflections > low) + 0.05 * (reflections > high)              # [P, G]
    return correct * (1 - first * share_of_correct(reflections, correct)
                      - (0.2 - first) * share_of_correct(length, correct))


FACTS["reflections"], SHAPERS["reflective"] = reflections, reflective
# the weight is ours: the paper's is unknown to us
PRESETS["arlcp"] = dict(shaper="reflective", advantage="rloo", weight="token_mean", kl_reward=1e-3)

# === rlvr: 2411.15124, Tülu 3, 10 if verified, -10 without EOS, KL in the reward ==================


def verified(correct, truncated, *, scale=10.0):
    """Tülu 3's RLVR (2411.15124): scale if correct, 0 if not, -scale without EOS.   [P, G]"""
    return torch.where(truncated, -scale * torch.ones_like(correct), scale * correct)


SHAPERS["verified"] = verified
# ours: the others' mean as baseline, where the paper has PPO's critic
PRESETS["rlvr"] = dict(shaper="verified", advantage="rloo", weight="token_mean", kl_reward=0.05)

# === drpo: 2510.04474, correct ones by length, wrong ones by a soft maximum, no shared baseline ===


def drpo(logp, old_logp, mask, correct, length, cap, price, *, lam=0.1, tau: Positive = 10.0,
         beta: Positive = 10.0, delta: Positive = 1e-4):
    """DRPO (2510.04474): -J = -(Σ w s - τ log mean exp(s/τ)) of a group, s a mean log-prob.

    w over the correct ones ∝ exp((1 - L/C) / λ), the soft maximum over the wrong; 0 without
    either. price: the trust region's, of a token (see hinge; beta and delta are its).   -> [p]
    """
    G = correct.size(1)
    s = ((logp * mask).sum(1) / mask.sum(1).clamp(min=1)).view(-1, G)                    # [p, G]
    w = torch.softmax(((1 - length / cap) / lam).masked_fill(correct < 1, -torch.inf), 1)
    wrong = (s / tau).masked_fill(correct > 0, -torch.inf)
    k = (correct < 1).sum(1)                                                             # [p]
    both = (k > 0) & (k < G)
    w, wrong = w.nan_to_num(), torch.where(both[:, None], wrong, torch.zeros_like(wrong))
    J = (w * s).sum(1) - tau * (torch.logsumexp(wrong, 1) - k.clamp(min=1).log())
    paid = (price * (old_logp - logp) * mask).sum(1).view(-1, G).sum(1)                  # [p]
    return paid - torch.where(both, J, torch.zeros_like(J))


def now(policy, tokens, mask, c):
    """The policy's log-probs over the whole minibatch, before its gradient.   [n, T]"""
    return logprobs(policy, tokens, mask, c)


def hinge(now, old_logp, mask, groups, beta, delta):
    """DRPO's trust region: max(β (KL - δ), 0) KL, KL the tokens' mean of log π_old/π.   [n, T]

    The factor, without gradient, spread so that the sum over tokens of it and of log π_old/π,
    divided by the groups, is the penalty. β 10 is ours: the paper's 1e3 belongs to its lr 2e-6,
    which is fifty times smaller than ours.
    """
    n = mask.sum()
    kl = ((old_logp - now) * mask).sum() / n
    return torch.full_like(mask, (beta * (kl - delta)).clamp(min=0).item() * groups / n.item())


def weighs_nothing(c):
    """Words against weights of tokens, where only groups have a loss."""
    idle = c.weight != "sequence_mean" and c.penalty == "none" and not c.entropy
    return (f"--weight {c.weight} does nothing with --surrogate drpo, whose loss is of groups: "
            "leave it out") * idle


MINIBATCH["now"], MINIBATCH["price"], SURROGATES["drpo"] = now, hinge, drpo
CHECKS["drpo"] = weighs_nothing

# === clip_cov, kl_cov: 2505.22617, no gradient, or a KL, on the tokens that lower the entropy =====


def covariance(now, adv, mask):
    """(A - mean A) (log π - mean log π) of each token: what lowers the entropy (eq. 11).  [n, T]"""
    off = [x - (x * mask).sum() / mask.sum() for x in (adv, now)]
    return off[0] * off[1]


def band(now, old_logp, adv, mask, generator, ratio, low, high, eps):
    """max(1, ratio n) random tokens with a covariance in (low, high) that PPO does not clip.

    ratio and low are ours (the paper's 2e-4 and 1): of a minibatch of a thousand tokens 2e-4 is
    none, and a small model's covariances are smaller.   [n, T], 1 or 0
    """
    rho, cov = ratio_of(now, old_logp), covariance(now, adv, mask)
    clipped = -adv * rho.clamp(1 - eps, 1 + eps) > -adv * rho
    inside = (cov > low) & (cov < high) & ~clipped & (mask > 0)
    where = inside.flatten().nonzero().flatten()                                         # [k]
    n = min(len(where), max(1, int(ratio * mask.sum())))
    picked = where[torch.randperm(len(where), generator=generator)[:n].to(where.device)]
    return torch.zeros_like(mask).flatten().index_fill(0, picked, 1.0).view_as(mask)


def steepest(now, adv, mask, ratio):
    """The max(1, ratio n) tokens of the highest covariance.   [n, T], 1 or 0

    ratio is ours, and DOT's (2601.03969); the paper's 2e-4 is none of a thousand tokens.
    """
    cov = covariance(now, adv, mask).masked_fill(mask < 1, -torch.inf).flatten()
    picked = cov.topk(max(1, int(ratio * mask.sum()))).indices
    return torch.zeros_like(mask).flatten().index_fill(0, picked, 1.0).view_as(mask)


def clip_cov(logp, old_logp, adv, dropped, *, eps=1.0, ratio: Share = 2e-3, low=0.5, high=5.0):
    """Clip-Cov (2505.22617): no gradient from a few tokens; the ratio's clip nearly off.   [n, T]

    dropped: 1 where it is one of them; ratio, low and high say which (see band).
    """
    return clip(logp, old_logp, adv, eps=eps) * (1 - dropped)


def kl_cov(logp, old_logp, adv, steep, *, coef=1.0, ratio: Share = 2e-3):
    """KL-Cov (2505.22617): -A ρ, and coef |log π/π_old| on a share of the tokens: no clip.  [n, T]

    steep: 1 where it is one of them (see steepest). A token that has not moved has no sign: what
    rounding leaves of its ratio 1 earns no gradient.
    """
    moved = logp - old_logp
    size = torch.where(moved.abs() > 1e-5, moved.abs(), torch.zeros_like(moved))
    return -adv * ratio_of(logp, old_logp) + coef * steep * size


MINIBATCH["dropped"], SURROGATES["clip_cov"] = band, clip_cov
MINIBATCH["steep"], SURROGATES["kl_cov"] = steepest, kl_cov
PRESETS["clip_cov"] = dict(surrogate="clip_cov", filter="mixed", weight="token_mean")
PRESETS["kl_cov"] = dict(surrogate="kl_cov", filter="mixed", weight="token_mean")
# what the arms of the claim `exploration` share
PRESETS["tokens"] = dict(filter="every", weight="token_mean")

# === ace: 2602.21420, wrong responses that became likelier pay more ===============================


def overconfident(adv, old_logp, ref_logp, mask, *, alpha=1.0):
    """ACE (2602.21420): where A < 0, A (1 + α softplus(mean of log π/π_ref)); α ours (unknown)."""
    shift = ((old_logp - ref_logp) * mask).sum(1) / mask.sum(1).clamp(min=1)             # [N]
    return torch.where(adv < 0, adv * (1 + alpha * F.softplus(shift)[:, None]), adv)


def harsher(adv, *, factor=1.693147):
    """A control: every negative advantage times 1 + log 2, whatever the confidence."""
    return torch.where(adv < 0, factor * adv, adv)


CREDITS["overconfident"], CREDITS["harsher"] = overconfident, harsher
PRESETS["ace"] = dict(credit="overconfident", weight="token_mean")

# === apo: 2506.21655, wrong and too long pays more; KL is loosened on hard prompts ================


def too_long(adv, correct, length, *, base: Positive = 1.1):
    """APO's STCR (2506.21655): A (2 - b^-(L - μ)) of wrong ones longer than the correct mean μ.

    b is ours: the paper's 1.00001 is for thousands of tokens and does nothing to tens.   [N, T]
    """
    mean, _ = among_correct(length, correct)                                             # [P, 1]
    over = (length - mean).clamp(min=0) * (1 - correct) * (correct.sum(1, keepdim=True) > 0)
    return adv * (2 - base ** -over).reshape(-1, 1)


def by_difficulty(logp, ref_logp, adv, correct, *, beta=1e-3):
    """APO's DADS (2506.21655): k3, where A > 0 times 1 - exp(-e (1 - d)), d = 1 - mean(c).

    No factor where d is 0 or 1.   [n, T]
    """
    d = 1 - correct.mean(1, keepdim=True)                                                # [p, 1]
    w = torch.where((d > 0) & (d < 1), 1 - torch.exp(-torch.e * (1 - d)), torch.ones_like(d))
    w = w.expand_as(correct).reshape(-1, 1)                                              # [n, 1]
    return k3(logp, ref_logp, beta=beta) * torch.where(adv > 0, w, torch.ones_like(w))


CREDITS["too_long"], PENALTIES["by_difficulty"] = too_long, by_difficulty
PRESETS["apo"] = dict(credit="too_long", penalty="by_difficulty")

# === k2, k3_straight: Schulman's note, KL penalties whose gradient is that of KL(π||π_ref) ========


def k2(logp, ref_logp, *, beta=0.04):
    """β d²/2, d = log π/π_ref: on-policy its gradient is that of KL(π||π_ref).   [n, T]"""
    return beta * 0.5 * (logp - ref_logp) ** 2


def k3_straight(logp, ref_logp, *, beta=0.04):
    """k3's value with k2's gradient.   [n, T]"""
    square = k2(logp, ref_logp, beta=beta)
    return square - square.detach() + k3(logp, ref_logp, beta=beta).detach()


PENALTIES["k2"], PENALTIES["k3_straight"] = k2, k3_straight

# === rapo: 2510.03865, forward KL to a reference that is flattened where the answer was wrong =====


def flat_logp(ref, ref_logp, correct, roll, mask, c):
    """Log-probs under the reference at temperature 1/φ, φ = (1 + R) / 2 of the response.  [N, T]"""
    hot = logprobs(ref, roll.tokens, mask, c, 2 * c.temperature)
    return torch.where(correct.view(-1, 1) > 0, ref_logp, hot)


def flattened(logp, flat_logp, *, beta=0.01, most: Positive = 5.0):
    """RAPO (2510.03865): forward KL to π_ref^φ, w log w - w + 1, w = π_ref^φ/π.   [n, T]

    flat_logp is log π_ref^φ. beta is ours: the paper's is unknown to us.
    """
    log_w = (flat_logp - logp).clamp(-20, most)
    return beta * (log_w.exp() * (log_w - 1) + 1)


BATCH["flat_logp"], PENALTIES["flattened"] = flat_logp, flattened
# entropy is ours, too
PRESETS["rapo"] = dict(penalty="flattened", entropy=1e-3)
# RAPO's control: the reverse KL, at the same strength
PRESETS["reverse"] = dict(penalty="k2", beta=0.01, entropy=1e-3)

# === clip_delta: 2410.15115, process rewards, bounded so that more steps earn no more =============


def step_ends(roll, texts, posed, task, tok):
    """After how many tokens each step of each response ends.   N lists"""
    out = []
    for ids, text, problem in zip(roll.completions(), texts, posed):
        found = tasks.step_ends(tasks.part(task, problem), text)
        out.append([tok.spelled(ids, end) for end in found])
    return out


def probed(cuts, mask):
    """Which of K steps a response has.   [N, K]"""
    counts = torch.tensor([len(row) for row in cuts], device=mask.device)
    return torch.arange(max(1, int(counts.max())), device=mask.device) < counts[:, None]


def step_of(cuts, roll):
    """The step of every token, the last goes on to the end; -1 where there is none.  [N, T]"""
    step = torch.full(roll.mask.shape, -1)
    for i, row in enumerate(cuts):
        start = int(roll.prompt_len[i])
        for k, (a, b) in enumerate(itertools.pairwise([0, *row])):
            step[i, start + a:start + b if k + 1 < len(row) else None] = k
    return step.to(roll.mask.device)


def process(cuts, texts, posed, probed, task):
    """The task's score of every step.   [N, K]"""
    value = torch.zeros(probed.shape, device=probed.device)
    for i, row in enumerate(cuts):
        if row:
            scores = tasks.part(task, posed[i]).process(posed[i], texts[i])
            value[i, :len(row)] = torch.tensor(scores)
    return value


def at_step(x, step, otherwise=0.0):
    """What belongs to a step, on its tokens.   [N, K], step [N, T] (-1: of none) -> [N, T]"""
    return torch.where(step >= 0, x.gather(1, step.clamp(min=0)),
                       torch.full_like(x[:, :1], otherwise))


def step_returns(p, probed, rule="clip_delta", eta=0.9):
    """The return from each step on, of scores p [N, K] (2410.15115), by a rule.

    clip: min(p - η, 0). delta: p_k - p_k+1, but the last but one keeps its own and the last earns
    0: the return is p_k. sum: p.
    """
    r = (p - eta).clamp(max=0) if "clip" in rule else p
    r = r * probed
    if "delta" in rule:
        one, two = (F.pad(probed, (0, n))[:, n:] for n in (1, 2))               # do so many follow?
        r = torch.where(two > 0, r - F.pad(r, (0, 1))[:, 1:], r) * one
    return r.flip(1).cumsum(1).flip(1) * probed


def process_returns(shaped, mask, step, process, probed, *,
                    rule: Literal["sum", "clip", "delta", "clip_delta"] = "clip_delta", eta=0.9,
                    scale=1.0, bug=0.0):
    """Process rewards (2410.15115): the outcome and the return of the token's step, whitened.

    process [N, K]: a score of each step; bug: what a faulty scorer adds to each, which a plain sum
    invites to farm. eta and scale are ours: the paper's are unknown to us, its KL too.
    """
    ahead = scale * step_returns(process + bug, probed.to(process), rule, eta)           # [N, K]
    return whiten(tokens_of(shaped, mask) + at_step(ahead, step) * mask, mask)


BATCH["cuts"], BATCH["step"], BATCH["probed"] = step_ends, step_of, probed
BATCH["process"], ADVANTAGES["process"] = process, process_returns
CHECKS["process"] = lambda task: lacks(task, "process")
PRESETS["clip_delta"] = dict(advantage="process", weight="token_mean", kl_reward=1e-3)

# === spae: 2601.03823, steps after which the true answer is likelier earn more ====================


@torch.no_grad()
def forced(model, rows, c):
    """Of rows (context ids, ids forced after it): mean probability, log-prob, entropy.   3 x [R]

    A row longer than the model's context loses its beginning.
    """
    most = model.config.max_position_embeddings
    rows = [(a[-(most - len(b)):], b) for a, b in rows]
    tokens, mask = collate(rows, max(model.config.pad_token_id, 0), c.device)
    with autocast(c.device, c.dtype):
        pairs = [token_logprobs(model, t, m, temperature=1.0, entropy=True)
                 for t, m in zip(tokens.split(c.micro), mask.split(c.micro))]
    logp, entropy = (torch.cat(x) for x in zip(*pairs))                                  # [R, T]
    return [(x * mask).sum(1) / mask.sum(1).clamp(min=1) for x in (logp.exp(), logp, entropy)]


def truth(problem, task, tok):
    """The ids of what follows #### in a good response."""
    return tok.encode(task.demo(problem, "good").partition(MARK)[2])


def belief(policy, roll, cuts, probed, posed, task, tok, c):
    """What the policy believes if it is asked for the answer after each step.   2 x [N, K]

    The true answer's mean probability, exp(-its entropy): what the paper's short samples estimate.
    """
    rows, value = [], torch.zeros(2, *probed.shape, device=c.device)
    for i, row in enumerate(cuts):
        start, answer = int(roll.prompt_len[i]), truth(posed[i], task, tok)
        rows += [(roll.tokens[i, :start + end].tolist() + tok.encode(MARK), answer) for end in row]
    if rows:
        acc, _, entropy = forced(policy, rows, c)
        value[:, probed] = torch.stack([acc, torch.exp(-entropy)])
    return value[0], value[1]


def potential(acc, conf):
    """SPAE's Φ in [-1, 1]: -1 is confidently wrong, 1 confidently right."""
    return 1.5 * acc * conf + 0.5 * acc - conf


def stepwise(shaped, mask, step, belief, probed, *, alpha=0.5, xi=0.5, full: Share = 0.9,
             white=True):
    """SPAE (2601.03823):  A = (R - mean) f + ξ g of a token's step k, whitened over the batch.

    f = 1 - α (1 - exp(-S)), S the earlier steps with Φ > full; g = exp(Φ_k - Φ_k-1, to [0, 1] over
    the batch: ours, the paper does not say over what) less its mean. belief, 2 x [N, K]:
    probability of the truth, confidence.
    """
    phi = potential(*belief)                                                             # [N, K]
    sure = ((phi > full) & probed).to(phi)
    f = 1 - alpha * (1 - torch.exp(sure - sure.cumsum(1)))
    change = F.pad(phi[:, 1:] - phi[:, :-1], (1, 0))
    low, high = (change[probed] if probed.any() else phi).aminmax()
    g = ((change - low) / (high - low).clamp(min=1e-8)).exp()
    g = (g - (g * probed).sum() / probed.sum().clamp(min=1)) * probed
    A = (centred(shaped, mask) * at_step(f, step, 1.0) + xi * at_step(g, step)) * mask
    return whiten(A, mask) if white else A


BATCH["belief"], ADVANTAGES["stepwise"] = belief, stepwise
CHECKS["stepwise"] = unanswered
PRESETS["spae"] = dict(advantage="stepwise", filter="mixed", surrogate="clip_higher",
                       weight="token_mean")

# === care: 2506.16141, a bonus for reasoning that makes the answer likely under a slow copy =======


class Slow:
    """A copy of the policy that follows it slowly: in a short run it stays near the reference."""

    def __init__(self, policy):
        self.model = snapshot(policy)
        self.trained = [name for name, p in policy.named_parameters() if p.requires_grad]

    def tell(self):
        """The copy."""
        return self.model

    @torch.no_grad()
    def note(self, done, policy):
        """Half a per cent of the way, every ten steps."""
        if done % 10 == 0:
            for name in self.trained:
                self.model.get_parameter(name).lerp_(policy.get_parameter(name), 0.005)

    def state(self):
        """What a checkpoint keeps."""
        return {name: self.model.get_parameter(name).data for name in self.trained}

    def load(self, state):
        """Go on from what a checkpoint kept."""
        self.model.load_state_dict(state, strict=False)


def after_mark(model, roll, texts, truths, tok, c):
    """(mean probability, exp of the mean log-prob) of answers after each response's ####.  [2, N]

    truths: the ids to force there, of N, or None for the response's own. 0 where nothing can be
    asked.
    """
    rows, where = [], []
    for i, (ids, text) in enumerate(zip(roll.completions(), texts)):
        k, start = tok.spelled(ids, text.find(MARK) + len(MARK)), int(roll.prompt_len[i])
        answer = ids[k:] if truths is None else truths[i]
        if MARK in text and answer:
            rows.append((roll.tokens[i, :start + k].tolist(), answer))
            where.append(i)
    out = torch.zeros(2, len(texts), device=c.device)
    if rows:
        p, logp, _ = forced(model, rows, c)
        out[:, where] = torch.stack([p, logp.exp()])
    return out


def answer_prob(slow, roll, texts, tok, c):
    """How likely a response's own answer is under the slow copy.   of N"""
    return after_mark(slow, roll, texts, None, tok, c)[1]


def consistent(score, answer_prob, *, bonus=0.5, margin=0.01, cap: Share = 0.95):
    """GRPO-CARE (2506.16141): a bonus where the answer is as likely as after the group's good ones.

    answer_prob [P, G]: exp of the answer tokens' mean log-prob under a slow copy of the policy.
    """
    q = answer_prob.clamp(max=cap)
    good = ((score > 0.1) & (score >= score.mean(1, keepdim=True))).to(q)                # [P, G]
    usual = (q * good).sum(1, keepdim=True) / good.sum(1, keepdim=True).clamp(min=1)     # [P, 1]
    return score + bonus * score * good * (q >= usual - margin)


MEMORIES["slow"], FACTS["answer_prob"], SHAPERS["consistent"] = Slow, answer_prob, consistent
ALONE["slow"] = "a copy of sharded weights cannot be made"
CHECKS["consistent"] = unanswered
PRESETS["care"] = dict(shaper="consistent", group_eps=1e-4)

# === rlpr: 2506.18254, no verifier: the reward is the probability of the true answer ==============


class Usual:
    """A moving average of the groups' spread, 0 until it has been seen ten times."""

    def __init__(self):
        self.spreads = []

    def tell(self):
        """The usual standard deviation of a group."""
        return self.spreads[-1] if len(self.spreads) > 9 else 0.0

    def note(self, shaped):
        """The shaped rewards of a step [P, G]; the first six stand for themselves."""
        spread = shaped.std(1).mean().item() if shaped.size(1) > 1 else 0.0
        if len(self.spreads) > 5:
            spread = 0.99 * self.spreads[-1] + 0.01 * spread
        self.spreads = [*self.spreads, spread][-12:]

    def state(self):
        """What a checkpoint keeps."""
        return self.spreads

    def load(self, state):
        """Go on from what a checkpoint kept."""
        self.spreads = state


def statements(texts, posed, roll, task):
    """The answers that finished responses state, "" for none.   of N"""
    return [tasks.stated(tasks.part(task, p), text) if done else ""
            for p, text, done in zip(posed, texts, roll.finished.tolist())]


def stated(texts, posed, roll, task):
    """Whether a response ended with an answer.   of N"""
    return [bool(x) for x in statements(texts, posed, roll, task)]


def truth_prob(policy, roll, texts, posed, task, tok, c):
    """The mean probability of the true answer's tokens after the response's reasoning.   of N"""
    truths = [truth(p, task, tok) for p in posed]
    return after_mark(policy, roll, texts, truths, tok, c)[0]


def base_prob(ref, problems, task, tok, c):
    """The same of the first model without any reasoning.   of P"""
    return forced(ref, [([*tok.prompt(p, c.chat), *tok.encode(MARK)], truth(p, task, tok))
                        for p in problems], c)[0]


def probable(truth_prob, base_prob, stated, *, share: Share = 0.9):
    """RLPR (2506.18254):  share max(0, PR - PR_base) + (1 - share) [answered].   [P, G]"""
    return (share * (truth_prob - base_prob).clamp(min=0) + (1 - share) * stated).clamp(0, 1)


def spread_enough(shaped, usual, ratio):
    """Which groups' std is at least ratio times the usual one; never none.   [P]"""
    std = shaped.std(1)
    return (std >= ratio * usual) | (std == std.max())


def steady(fresh, prompts, usual, *, ratio: Share = 0.5, rounds: Count = 1):
    """RLPR's filter (2506.18254): groups whose rewards differ as much as is usual."""
    return gathered(fresh, prompts, rounds,
                    lambda groups: spread_enough(groups["shaped"], usual, ratio))


FACTS["stated"], FACTS["truth_prob"], FACTS["base_prob"] = stated, truth_prob, base_prob
MEMORIES["usual"], SHAPERS["probable"], FILTERS["steady"] = Usual, probable, steady
CHECKS["probable"], CHECKS["steady"] = unanswered, compares
PRESETS["rlpr"] = dict(shaper="probable", filter="steady", surrogate="clip_higher", eps_high=0.27,
                       weight="token_mean")

# === co_reward: 2508.00410, no label: agreement with the majority on a paraphrase =================


def twins(pool, cursor, c, task):
    """Half as many prompts, and the same questions in other words.   -> places, problems"""
    where, problems = in_turn(pool, cursor, replace(c, prompts=c.prompts // 2))
    rng = random.Random(f"{c.seed}/{cursor + 1}")
    other = [tasks.part(task, p).paraphrase(p, rng) for p in problems]
    return where + where, problems + other


def numbered(texts, posed, roll, task):
    """A number for each different answer of the round, -1 for none.   of N"""
    answers = statements(texts, posed, roll, task)
    number = {x: i for i, x in enumerate(dict.fromkeys(filter(None, answers)))}
    return [number.get(x, -1) for x in answers]


def agreed(answer, *, cross=True):
    """Co-Reward (2508.00410): 1 for the majority's answer to the same question in other words.

    Group i + P/2 is the paraphrase of i. Ties: the first seen. cross False: the own group's.
    """
    top = []
    for row in answer.tolist():
        votes = [x for x in row if x >= 0]
        top.append(max(votes, key=votes.count) if votes else -2)
    top = torch.tensor(top).to(answer)                                                   # [P]
    return (answer == (top.roll(len(top) // 2) if cross else top)[:, None]).float()


def no_twins(c, f, task):
    """Words against a majority on another question."""
    alone = f.shaper.keywords["cross"] and c.draw != "twins"
    return unanswered(task) or ("--shaper agreed compares a question with its paraphrase: give "
                                "--draw twins, or --cross false") * alone


def no_pairs(c, task):
    """Words against prompts that cannot be drawn in pairs."""
    odd = c.prompts % 2 or c.filter != "every"
    return lacks(task, "paraphrase") or "--draw twins: even --prompts, --filter every" * bool(odd)


DRAWS["twins"], FACTS["answer"], SHAPERS["agreed"] = twins, numbered, agreed
CHECKS["agreed"], CHECKS["twins"] = no_twins, no_pairs
PRESETS["co_reward"] = dict(shaper="agreed", draw="twins", penalty="k3", beta=0.005)

# === noisy, rpr, rpr_noisy: 2505.22653, flipped rewards, and a reward for forms of reasoning ======


def flipped(score, stated, generator, *, rate: Share = 0.4,
            level: Literal["group", "response"] = "group"):
    """Noise (2505.22653): 1 - r with probability `rate`, drawn once a group, or a response.

    What states no answer keeps its reward.   [P, G]
    """
    draw = torch.rand(len(score), 1 if level == "group" else score.size(1), generator=generator)
    return torch.where((draw.to(score.device) < rate) & (stated > 0), 1 - score, score)


def pattern(texts, posed, task):
    """How much a response has the forms of reasoning, [0, 1].   of N"""
    return [tasks.pattern(p, text, True, tasks.part(task, p)) for p, text in zip(posed, texts)]


def calibrated(score, pattern, *, price=0.1, sure=0.5):
    """RPR calibration (2505.22653): min(1, r + price RPR) where the reward r is below `sure`."""
    return torch.where(score < sure, (score + price * pattern).clamp(max=1), score)


NOISES["noisy"], REWARDS["rpr"] = flipped, tasks.pattern
FACTS["pattern"], SHAPERS["calibrated"] = pattern, calibrated
CHECKS["noisy"] = unanswered
PRESETS["rpr_noisy"] = dict(noise="noisy", shaper="calibrated")

# === swe_rl: 2502.18449, similarity to a reference response =======================================

REWARDS["swe_rl"] = tasks.similarity

# === acereason: 2506.13284, the temperature of entropy 0.3; unfinished responses do not train =====


def crossing(rising, target, low=0.05, high=20.0):
    """x in [low, high] where an increasing function is the target; None if it never is."""
    if rising(low) > target or rising(high) < target:
        return None
    while high / low > 1 + 1e-5:
        middle = (low * high) ** 0.5
        low, high = (middle, high) if rising(middle) < target else (low, middle)
    return low


@torch.no_grad()
def entropy_of(model, roll, c, temperature):
    """The mean entropy of a rollout's tokens at a temperature, nats."""
    with autocast(c.device, c.dtype):
        H = token_logprobs(model, roll.tokens, roll.mask, temperature=temperature, entropy=True)[1]
    return ((H * roll.mask).sum() / roll.mask.sum()).item()


def temperature_at(ref, pool, tok, c, generator, *, at_entropy: Positive = 0.3):
    """AceReason (2506.13284): the temperature at which its own samples have so many nats.

    Samples and bisection in turn, three times. UserError if no temperature from 0.05 to 20 has it.
    """
    for _ in range(3):
        _, roll = next(rollouts(ref, pool, tok, c, c.samples, generator))
        heat = crossing(partial(entropy_of, ref, roll, c), at_entropy)
        if heat is None:
            low, high = (entropy_of(ref, roll, c, x) for x in (0.05, 20.0))
            raise UserError(f"--at_entropy {at_entropy}: temperatures from 0.05 to 20 have from "
                            f"{low:.3g} to {high:.3g} nats")
        c = replace(c, temperature=heat)
    return pool, heat, {}


def ended(length, truncated):
    """Overlong filtering (2503.14476): none of a response that ran out of room.   [P, G]"""
    return length * ~truncated


PREPARATIONS["at_entropy"], TRIMS["ended"] = temperature_at, ended
PRESETS["acereason"] = dict(prepare="at_entropy", trim="ended", filter="mixed")

# === knowrl: 2604.12627, the fewest hints that suffice, in training only ==========================


def sufficient(m, accuracy, margin=0.0):
    """KnowRL's constrained subset search (2604.12627): of hints 0 … m-1 those that reach most.

    accuracy(frozenset of hints) -> float. H: those whose removal does not hurt; N, of H: those
    whose removal is best, removed outright; of the others in H every subset is tried. Of all within
    the margin of the best, a standard error of accuracy, the fewest hints.
    """
    full = frozenset(range(m))
    without = {i: accuracy(full - {i}) for i in full}
    most = max(accuracy(full), accuracy(frozenset()))
    H = {i for i in full if without[i] >= most - margin}
    N = {i for i in H if without[i] >= max(without.values())}
    C = sorted(H - N)
    tried = [full - N - set(x) for n in range(len(C) + 1) for x in itertools.combinations(C, n)]
    tried = [frozenset(), full, *tried]
    top = max(map(accuracy, tried))
    return min((x for x in tried if accuracy(x) >= top - margin),
               key=lambda x: (len(x), -accuracy(x)))


def shown(problem, hints, kept):
    """A problem with some of its hints after the prompt, in order."""
    return problem | dict(hint="".join(hints[i] for i in sorted(kept)))


def share_solved(ref, task, tok, c, generator, samples, problem):
    """The share of a model's samples that solve a problem."""
    some, roll = next(rollouts(ref, [problem], tok, c, samples, generator))
    return graded(task.reward, some, roll, tok, samples)[0].mean().item()


def hinted(ref, pool, task, tok, c, generator, *, hints: Count = 8):
    """The prompts with their sufficient hints; so many samples measure a set of them.

    8 of them, and a margin of a standard error at most, are ours; the paper has 256.
    """
    out, share = [], partial(share_solved, ref, task, tok, c, generator, hints)
    for p in pool:
        facts = tasks.part(task, p).hints(p)[:-1]              # the last step is the answer itself
        accuracy = cache(lambda kept, p=p, facts=facts: share(shown(p, facts, kept)))
        kept = sufficient(len(facts), accuracy, margin=0.5 / hints ** 0.5)
        out.append(shown(p, facts, kept))
    return out, c.temperature, {}


PREPARATIONS["hinted"] = hinted
CHECKS["hinted"] = lambda task: lacks(task, "hints")
# pool is ours: every prompt costs dozens of rollouts
PRESETS["knowrl"] = dict(prepare="hinted", pool=60, surrogate="clip_higher", weight="token_mean")

# === rif: 2507.05386, without the prompts that the first model never solves =======================


def solvable(ref, pool, task, tok, c, generator, *, screen: Count = 8):
    """RIF (2507.05386): the prompts with a correct response among so many samples.

    Those with nothing else stay, too: ours, of the paper we know the abstract. UserError if there
    is none.
    """
    kept = []
    for some, roll in rollouts(ref, pool, tok, c, screen, generator):
        right = (graded(task.reward, some, roll, tok, screen)[0] > 0.5).any(1).tolist()
        kept += itertools.compress(some, right)
    if not kept:
        raise UserError(f"--screen {screen}: no prompt is ever solved: easier data, or a better "
                        "--init")
    return kept, c.temperature, {}


PREPARATIONS["rif"] = solvable

# === recap: 2510.21978, an old task replayed, objectives weighted by how they converge ============


class Losses:
    """1 - the mean score of each task of a mixture, step by step."""

    def __init__(self, task):
        self.histories = [[] for _ in getattr(task, "parts", [task])]

    def tell(self):
        """A list for each task."""
        return self.histories

    def note(self, priority, score, objective):
        """A step's scores [P, G] and tasks [P, 1]; -> the tasks' weights, for the log."""
        for i, losses in enumerate(self.histories):
            mine = score[objective.flatten() == i]
            losses += [1 - mine.mean().item()] if len(mine) else []
        return {f"lam_{i}": x for i, x in enumerate(priority)}

    def state(self):
        """What a checkpoint keeps."""
        return self.histories

    def load(self, state):
        """Go on from what a checkpoint kept."""
        self.histories = state


def reweighted(losses, reweigh, *, window=10):
    """RECAP (2510.21978): the weights of K objectives, K softmax((c + i) / T), T = reweigh.

    c = mean(last W) / mean(the W before): stalled is near 1, improving below; i = std(last W) / the
    sum of the two means: unstable. 1 each until all have 2 W values. They sum to K. W is ours.
    """
    if min(map(len, losses)) < 2 * window:
        return [1.0] * len(losses)
    needs_work = []
    for x in losses:
        last, before = statistics.fmean(x[-window:]), statistics.fmean(x[-2 * window:-window])
        unstable = statistics.pstdev(x[-window:]) / max(last + before, 0.01)
        needs_work.append(last / max(before, 0.01) + unstable)
    z = torch.tensor(needs_work, dtype=torch.float64) / reweigh
    return (len(needs_work) * torch.softmax(z, 0)).tolist()


def objective(problems):
    """The task of each problem, a number.   of P"""
    return [p.get("task", 0) for p in problems]


def weight_of_group(priority, objective, mask):
    """Each group's weight: its task's, by that task's share of the batch.   [P, 1]"""
    each, K = objective.long(), len(priority)                                            # [P, 1]
    share = torch.bincount(each.flatten(), minlength=K) / len(each) * K                  # [K]
    return (torch.tensor(priority).to(mask) / share.clamp(min=1e-8))[each]


def converging(mask, lam, *, reweigh: Positive = 5.0):
    """RECAP (2510.21978): sequence_mean times the group's weight λ.   [n, T]

    lam [p, 1]; reweigh is the temperature of the weights (see reweighted): high makes them alike.
    """
    return sequence_mean(mask) * lam.repeat_interleave(len(mask) // len(lam), 0)


def one_task(c, task):
    """Words against weights of one objective, and of tokens where only groups have a loss."""
    if not hasattr(task, "parts"):
        return "--weight recap weighs tasks: give several, like --data sort+chain"
    return "--weight recap weighs tokens, --surrogate drpo has groups" * (c.surrogate == "drpo")


MEMORIES["losses"], FACTS["objective"], WEIGHTS["recap"] = Losses, objective, converging
BATCH["priority"], BATCH["lam"], CHECKS["recap"] = reweighted, weight_of_group, one_task
PRESETS["recap"] = dict(data="sort+chain", watch="chain,sort", init="base:chain_sort",
                        weight="recap")
# of the claim `forgetting`: the old task replayed without weights, and left out
PRESETS["replay"] = dict(data="sort+chain", watch="chain,sort", init="base:chain_sort")
PRESETS["on_sort"] = dict(data="sort", watch="chain,sort", init="base:chain_sort")

# === aipo: 2505.24034, stale rollouts, importance weights with a cap and no clip ==================


class Past:
    """The policy's weights after its last steps, and a model to load them into."""

    def __init__(self, policy):
        self.actor, self.weights = snapshot(policy), []
        self.note(policy)

    def tell(self):
        """Itself."""
        return self

    def note(self, policy):
        """The policy as it now is."""
        trained = {k: p for k, p in policy.named_parameters() if p.requires_grad}
        self.weights.append({k: p.detach().cpu().clone() for k, p in trained.items()})

    def state(self):
        """What a checkpoint keeps."""
        return self.weights

    def load(self, state):
        """Go on from what a checkpoint kept."""
        self.weights = state


def lagged(past, *, lag: Count = 4):
    """The policy of so many iterations ago, as an asynchronous system has it; 4 is ours."""
    del past.weights[:-lag - 1]                                # no older one is asked for again
    past.actor.load_state_dict(past.weights[0], strict=False)
    return past.actor


def behaviour_logp(roll):
    """Log-probs of whoever sampled.   [N, T]"""
    return roll.logp


def stale(logp, behaviour_logp, adv, *, most: Positive = 4.0):
    """AIPO (2505.24034): -sg(min(π/μ, ρ̄)) A log π, for tokens of a policy μ some updates old.

    ρ̄ is `most`, 2 to 10 in the paper.   [n, T]
    """
    return -ratio_of(logp, behaviour_logp).detach().clamp(max=most) * adv * logp


def clip_stale(logp, behaviour_logp, adv, *, eps: Positive = 0.2):
    """A control: PPO's clip around the policy μ that generated, however old.   [n, T]"""
    return clip(logp, behaviour_logp, adv, eps=eps)


MEMORIES["past"], ACTORS["lagged"], BATCH["behaviour_logp"] = Past, lagged, behaviour_logp
ALONE["past"] = "a copy of sharded weights cannot be made"
SURROGATES["stale"], SURROGATES["clip_stale"] = stale, clip_stale
PRESETS["aipo"] = dict(advantage="centred", surrogate="stale", weight="token_mean", actor="lagged")

# === rlad, kdrl, opd, exopd: 2602.22495, 2506.02208, 2602.12125, with a better model, --teacher ===


class Teacher:
    """The better model; UserError unless it speaks the policy's tokens."""

    def __init__(self, c, tok):
        path = sft.find(c.teacher, c.config, device=c.device)
        self.model, other = load(path, c.device)
        if other.tokens != tok.tokens or not isinstance(self.model, Transformer):
            raise UserError(f"--teacher {c.teacher}: need a language model with the tokenizer of "
                            f"--init {c.init}")

    def tell(self):
        """The model."""
        return self.model

    def note(self):
        """Nothing: it does not learn."""

    def state(self):
        """Nothing."""

    def load(self, state):
        """Nothing."""


def untaught(c):
    """Words against a run without a teacher."""
    if not c.teacher:
        return "it learns from a teacher: give --teacher CHECKPOINT"
    sft.find(c.teacher, c.config, make=False, option="--teacher")      # UserError if it has none


def teach_logp(teacher, roll, mask, c):
    """Log-probs under the teacher.   [N, T]"""
    return logprobs(teacher, roll.tokens, mask, c)


def anchor(old_logp, teach_logp, alpha):
    """RLAD's middle between the old policy and the teacher.   [n, T]"""
    return alpha * old_logp + (1 - alpha) * teach_logp


def anchored(logp, anchor, adv, *, alpha: Share = 0.5, eps: Positive = 0.2):
    """RLAD (2602.22495): PPO's clip around π_old^α π_T^(1-α), the teacher in the trust region.

    log r = α log π/π_old + (1-α) log π/π_T   [n, T]
    """
    return clip(logp, anchor, adv, eps=eps)


def to_teacher(logp, teach_logp, correct, progress, *, beta=2e-3, beta_start=0.0, wrong_only=False):
    """KDRL (2506.02208): β k2 to the teacher beside the reward, or only on wrong responses.

    beta_start: anneal from it to beta, linearly (ours) over progress 0 to 1; 0: constant.   [n, T]
    """
    rows = (1 - correct).reshape(-1, 1) if wrong_only else 1.0
    beta = beta_start + (beta - beta_start) * progress if beta_start else beta
    return k2(logp, teach_logp, beta=beta) * rows


def distilled(old_logp, teach_logp, ref_logp, mask, *, lam=1.0, most: Positive = 10.0):
    """G-OPD (2602.12125): a token's reward λ log π_T/π_ref with a KL of weight 1.   [N, T]

    λ 1 is on-policy distillation, log π_T/π_old; above it the teacher is extrapolated (ExOPD), a
    token by (λ - 1) `most` nats, which is ours.
    """
    return (teach_logp - old_logp + (lam - 1) * (teach_logp - ref_logp).clamp(-most, most)) * mask


MEMORIES["teacher"], BATCH["teach_logp"], MINIBATCH["anchor"] = Teacher, teach_logp, anchor
SURROGATES["anchored"], CHECKS["anchored"] = anchored, untaught
PENALTIES["to_teacher"], CHECKS["to_teacher"] = to_teacher, untaught
ADVANTAGES["distilled"], CHECKS["distilled"] = distilled, untaught
PRESETS["rlad"] = dict(surrogate="anchored", weight="token_mean")
PRESETS["kdrl"] = dict(penalty="to_teacher", weight="token_mean")
PRESETS["opd"] = dict(advantage="distilled", weight="token_mean", samples=1, prompts=128)
PRESETS["exopd"] = dict(advantage="distilled", weight="token_mean", samples=1, prompts=128,
                        lam=1.25)

# === latentseek: 2505.13308, no training: one answer's hidden states, rewarded by itself ==========


def go_on(model, prompt, start, tok, c):
    """The greedy response that begins with the ids `start`.   -> ids, text, whether it ended"""
    if stops := [i for i, x in enumerate(start) if x in tok.stops]:
        ids = start[:stops[0]]
        return ids, tok.decode(ids), True
    roll = generate(model, [prompt + start], c.max_new - len(start), temperature=0.0)
    ids = [*start, *roll.completions()[0]]
    return ids, tok.decode(ids), roll.finished.item()


def reward_of(how, problem, text, done, task):
    """R <= 0: the verifier's less 1 (oracle), or the share of the task's own checks that hold."""
    if how == "oracle":
        return task.reward(problem, text, done) - 1
    checks = tasks.part(task, problem).checks(problem, text) | dict(ended=done)
    return statistics.fmean(checks.values()) - 1


def sought(model, problem, states, first, how, known, rounds=10, lr=0.03, enough=-0.2):
    """The response after REINFORCE on its first hidden states [m, D], from the greedy `first`.

    Each round writes argmax(head z), goes on greedily and takes a step on -R Σ log softmax(head
    z), or of the same length in a random direction; it stops above `enough`.  -> text, whether it
    ended
    """
    c, tok, (text, done) = known["c"], known["tok"], first
    z, g = states.clone().requires_grad_(), torch.Generator().manual_seed(c.seed)
    opt = torch.optim.Adam([z], lr=lr)
    for _ in range(rounds):
        R = reward_of(how, problem, text, done, known["task"])
        if R > enough + 1e-6:                                  # 4 / 5 - 1 is a little more than -.2
            break
        logp = torch.log_softmax(model.logits(z), -1)                                    # [m, V]
        y = logp.argmax(-1)
        z.grad = torch.randn(z.shape, generator=g).to(z) if how == "random" else (
            torch.autograd.grad(-R * logp.gather(1, y[:, None]).sum(), z)[0])
        opt.step()
        start = model.logits(z.detach()).argmax(-1).tolist()
        text, done = go_on(model, tok.prompt(problem, c.chat), start, tok, c)[1:]
    return text, done


def seek(ref, pool, task, tok, c, *, seek: Count = 64):
    """LatentSeek (2505.13308) on so many held-out problems; the weights stay as they are.

    -> {"seek_HOW": accuracy after, "seek_start": accuracy before}. self: rewarded by the task's
    own checks, without the answer; oracle: by the verifier; random directions are the control.
    """
    problems = task.problems("val", seek, c.seed)
    out = dict(seek_start=0.0, seek_self=0.0, seek_oracle=0.0, seek_random=0.0)
    for p in problems:
        prompt = tok.prompt(p, c.chat)
        ids, text, done = go_on(ref, prompt, [], tok, c)
        out["seek_start"] += task.reward(p, text, done) / len(problems)
        m = max(1, int(0.2 * len(ids)))                  # the first share: the authors' example's
        with torch.no_grad():
            states = ref(torch.tensor([[*prompt, *ids]], device=c.device))[0, len(prompt) - 1:][:m]
        for how in ("self", "oracle", "random"):
            end = sought(ref, p, states, (text, done), how, dict(c=c, tok=tok, task=task))
            out[f"seek_{how}"] += task.reward(p, *end) / len(problems)
    return pool, c.temperature, out


PREPARATIONS["latentseek"] = seek
CHECKS["latentseek"] = lambda task: lacks(task, "checks")
ALONE["latentseek"] = "it trains no weights"
PRESETS["latentseek"] = dict(steps=0, prepare="latentseek")


if __name__ == "__main__":
    cli(main)
