"""
reward.py - reward models and judges: train, evaluate, attack, route.

    python reward.py                               # a reward model on the world Ring, its table and curves
    python reward.py --data pairs.jsonl --init Qwen2.5-0.5B --context 512
    python reward.py --eval out/reward/default --data pairs.jsonl       # any reward-model checkpoint
    python ppo.py --config ring,ppo --reward out/reward/default         # use it
    python reward.py --claim advrm --seeds 5       # a paper's claim against its baselines, with a verdict

Map      1 config   2 losses   3 many models   4 attacks   5 data   6 rewards   7 the loop   8 RL   9 evaluate
         10 recipes   11 claims          B rows, T tokens, D width, K members or attributes, P prompts
preset      paper               idea
bt          2203.02155          Bradley-Terry: the chosen response scores higher (the default)
margin      2307.09288          ... by a margin that grows with the preference's strength
scaled      2410.01257          ... weighted by the strength
smooth      label smoothing     ... labels believed wrong with probability e
win_tie     2512.22170          ... ties pull two scores together
goal        2407.13887          ... and early states point to the chosen response's end
regression  2406.08673          five attributes, combined with fixed weights (HelpSteer2)
hs2pref     2410.01257          regression, then scaled BT, then extrapolation
armo        2406.12845          ridge heads on frozen features, verbosity taken out, a prompt-only gate
polar       2507.05197          pre-trained to tell policies apart, then few labels
arm         2410.08193          GenARM: a language model whose log-probs are token rewards
cdr         2411.02481          log-ratio of a strong and a weak model, nothing trained
ensemble    2310.02743          several, by --aggregate mean, wco (worst case), uwo (less variance), lcb
maxmin      2402.08925          one model for each hidden group of annotators, by EM
overopt     2210.10760          gold under best-of-n and RL against a proxy and its ensembles
router      2510.20369          a Gaussian-process head says when to ask a dear judge
rubrics     2510.07743          OpenRubrics: generator and judge from contrastive, consistent rubrics
thinkrm     2505.16265          a judge that reasons at length, by SFT and rule-based RL
rmr1        2505.02387          the same, binary reward, from traces of any length
judge_lora  2506.05748          a frozen model and rank-16 adapters as a pointwise judge
first       2406.15657          a listwise judge read off the first token's logits
advrm       2504.06141          trained on what an adversarial policy finds
Watch    accuracy of held-out pairs, not the loss: reward models overfit in a few passes. ECE says whether the
         scores' gap is a probability. A high length Spearman, or a null model that wins, is a hack waiting.
         Under RL, gold rises and then falls while the proxy rises on: only the worlds here can show it.
"""
import copy
import math
import random
import statistics
from dataclasses import dataclass
from functools import cache, partial
from types import SimpleNamespace
from typing import Literal

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import nn
from torch.nn.utils import clip_grad_norm_
from tqdm import trange

import kernels
import sft
from data import judging, prefs, tasks
from data.judging import (ROUTERS, RULE_REWARDS, PairModel, accuracy, assign, auroc, best_of_n,
                          expected_score, group_norm, majority, pushed, ranknet, ridge, rloo,
                          routing_curve,
                          routing_table, spearman, verbosity_penalties, verdict_rates)
from data.prefs import StrongJudge
from data.run import (Count, Positive, Range, Run, Share, UserError, batch_indices, cli,
                      launch, needs)
from model import (ScalarModel, Transformer, autocast, collate, generate, init, load, lora, merge,
                   peek, preset, save, sequence_score, token_logprobs)
from optim import RULES, cosine, linear, optimiser, set_lr


# --- config ---------------------------------------------------------------------------------------

@dataclass(frozen=True)
class Config:
    """What every run has; what belongs to a loss or a recipe is an argument of its function."""
    config: str = ""             # presets and TOML files, left to right
    data: str = "ring"  # a world (ring, toyif), or a JSONL of {"prompt", "chosen", "rejected"}
    rows: int = 0                # training pairs (0: the recipe's number, or the whole file)
    noise: Share = 0.0           # share of a world's training labels that is flipped
    init: str = "base:ring"      # language model to start from; base:PRESETS makes it first
    eval: str = ""               # evaluate this reward model instead of training one
    context: int = 0             # longest pair in tokens (0: the model's)
    chat: bool = False           # wrap prompts in the checkpoint's chat template
    recipe: str = "scalar"       # which row of RECIPES
    loss: str = "bt"             # which row of LOSSES
    aggregate: str = "mean"      # which row of AGGREGATES
    attack: str = "disagreement"  # which row of ATTACKS: Adv-RM's reward
    steps: int = 0               # optimizer steps of each model (0: epochs decides)
    epochs: Positive = 3.0       # passes over the pairs
    batch: Count = 64            # pairs per optimizer step
    micro: Count = 64            # pairs per forward pass: lower it when memory runs out
    optimiser: str = "adamw"     # which row of optim.RULES updates the matrices of the blocks
    lr: Positive = 1e-3          # peak learning rate, falling linearly to 0
    aux_lr: float = 0.0  # of AdamW for what is no block matrix, beside another optimiser (0: lr)
    warmup: int = 0              # steps of linear warm-up
    weight_decay: float = 0.0    # on matrices
    clip: Positive = 1.0         # largest gradient norm
    save_every: Count = 200      # steps between checkpoints
    keep: Count = 2              # checkpoints to keep
    stop: int = 0                # pause after this step (0: no); --resume goes on
    out: str = ""                # run folder (default out/reward/<presets>)
    seed: int = 0                # of data, heads and sampling
    device: str = "auto"         # cpu or cuda
    dtype: str = "auto"  # of the matmuls: float32, or bfloat16 under autocast (default on CUDA)
    kernels: str = "auto"        # auto, or torch: the plain definition of every kernel
    resume: bool = False  # go on: from the newest checkpoint, or after the last finished stage


WORLDS = prefs.WORLDS
TOYIF, CHECKS = (dict(data="toyif", init=f"base:toyif_{x}") for x in ("base", "judge"))
MUON = dict(optimiser="muon", lr=0.02, aux_lr=5e-3, warmup=50)
PRESETS = dict(  # learning rates and sizes: ours, the papers' are for billions of weights
    bt=dict(), margin=dict(loss="margin"), scaled=dict(loss="scaled"), smooth=dict(loss="smooth"),
    win_tie=dict(loss="win_tie"), goal=dict(loss="goal"), regression=dict(loss="regression"),
    arm=dict(loss="arm"), hs2pref=dict(recipe="hs2pref"), armo=dict(recipe="armo"),
    cdr=dict(recipe="cdr"),
    polar=dict(recipe="polar"), ensemble=dict(recipe="ensemble"), maxmin=dict(recipe="maxmin"),
    overopt=dict(recipe="overopt", steps=250, lr=2e-3),
    router=dict(recipe="router", **TOYIF, epochs=4.0),
    rubrics=dict(recipe="openrubrics", **CHECKS, steps=600, lr=2e-3),
    thinkrm=dict(recipe="thinkrm", steps=1500, **MUON),
    rmr1=dict(recipe="thinkrm", steps=1500, **MUON, style="random", rule="sign"),
    judge_lora=dict(recipe="judge_lora", **TOYIF, lr=2e-3),
    first=dict(recipe="first", **TOYIF, loss="listwise"),
    advrm=dict(recipe="advrm", **TOYIF, epochs=4.0),
    ring=dict(), toyif=TOYIF,
    noisy=dict(noise=0.25), big_router=dict(rows=16000, epochs=3.0, warmup=100, rivals=0),
    direct=dict(judge="direct"), nocontrast=dict(contrast=False), nofilter=dict(consistent=False),
    bt_rubrics=dict(recipe="scalar", data="rubrics", lr=1e-3),
    short_style=dict(style="short"), filler_style=dict(style="filler", rl_steps=0),
    direct_style=dict(style="direct", rl_steps=0),
    bt_style=dict(style="bt", optimiser="adamw", lr=5e-4, aux_lr=0.0, warmup=0),
    tiny=dict(rows=256, steps=6, batch=16, save_every=3, lr=1e-3),
)
CURVES = {"loss": ["loss"], "accuracy of the batch": ["accuracy"], "scores": ["gap", "score_std"]}


# --- losses: one number a row, [B]; the loop divides by the whole step's rows, tokens or labels ---
# A loss's positional arguments name what it reads, and only that is computed (see `provide`).

def bt(chosen, rejected, *, center=0.0):
    """Bradley-Terry:  -log σ(d),  d = r_chosen - r_rejected.   [B], [B] -> [B]

    center: + c (r_chosen + r_rejected)² keeps scores near 0 (2312.09244 eq. 2; TRL uses 0.01)."""
    return -F.logsigmoid(chosen - rejected) + center * (chosen + rejected) ** 2

def bt_margin(chosen, rejected, strength, *, unit: Positive = 1.0):
    """-log σ(d - m): stronger preferences must be further apart (Llama 2, 2307.09288).   m = unit
    strength"""
    return -F.logsigmoid(chosen - rejected - unit * strength)

def bt_scaled(chosen, rejected, strength):
    """-m log σ(d), m in {1, 2, 3}: stronger preferences count more (HelpSteer2-Preference,
    2410.01257)."""
    return -strength * F.logsigmoid(chosen - rejected)

def bt_smooth(chosen, rejected, *, flip: Range("[0, 0.5)") = 0.1):
    """-(1-e) log σ(d) - e log σ(-d): e is the share of labels believed wrong; d* = log((1-e)/e) is
    finite."""
    d = chosen - rejected
    return -(1 - flip) * F.logsigmoid(d) - flip * F.logsigmoid(-d)

def win_tie(chosen, rejected, tie, *, margin=3.0, tie_coef=1.0):
    """SoliReward, 2512.22170:  a win -log σ(d - m);  a tie -log σ(d - m) - log σ(-d - m), least at
    d = 0.

    Without ties and with margin 0 it is bt. tie [B] is 1.0 where neither response is better."""
    d = chosen - rejected
    win = -F.logsigmoid(d - margin)
    return (1 - tie) * win + tie * tie_coef * (win - F.logsigmoid(-d - margin))

def regression(predicted, ratings):
    """HelpSteer2 (2406.08673): squared error on every attribute that has a label (NaN: none).   [B,
    K] -> [B]

    The loop divides by the labels of the step, not by its rows."""
    known = ratings.isfinite()
    return ((predicted - ratings.nan_to_num()) ** 2 * known).sum(1)

def goal(chosen, rejected, early, late, wrong, *, weight=0.5):
    """Goal-conditioned contrastive term (2407.13887) on top of bt:  w (-log p+ - log(1 - p-)).

    early, late [B, S, D]: hidden states of the chosen response, wrong [B, S, D] of the rejected
    one; p+ is the mean of σ(cos(early, late)) over the pass, p- with wrong: logs of means, so it
    depends on --micro."""
    early, late, wrong = (F.normalize(h, dim=-1) for h in (early, late, wrong))
    plus, minus = (torch.sigmoid(early @ x.transpose(1, 2)).mean() for x in (late, wrong))
    return bt(chosen, rejected) + weight * (-plus.log() - (1 - minus).log())

def preference(logit, label, strength):
    """Pairwise classifier (2510.20369):  s (-l log σ(g) - (1-l) log σ(-g)),  l = 1: the first is
    better."""
    return strength * (-label * F.logsigmoid(logit) - (1 - label) * F.logsigmoid(-logit))

def nll(logp):
    """Cross-entropy of a judge's text, reasoning and verdict together.   [B, T] -> [B]"""
    return -logp.sum(1)

def listwise(logp, identifiers, ranks, *, weight=10.0):
    """FIRST (2406.15657): cross-entropy a token of the ranking + w RankNet on the first token's
    logits.

    identifiers [B, K]: the candidates' logits there; ranks [B, K] from 1, best first."""
    return nll(logp) / (ranks.size(1) + 1) + weight * ranknet(identifiers, ranks)

def autoregressive(chosen_logp, rejected_logp, *, beta_r: Positive = 0.05):
    """GenARM, 2410.08193:  -log σ(β_r (log π_r(y+) - log π_r(y-))), sums, no reference.   [B] ->
    [B]"""
    return -F.logsigmoid(beta_r * (chosen_logp - rejected_logp))

LOSSES = dict(bt=bt, margin=bt_margin, scaled=bt_scaled, smooth=bt_smooth, win_tie=win_tie,
              goal=goal,
              regression=regression, arm=autoregressive, preference=preference, nll=nll,
              listwise=listwise)


# --- many models, one reward ----------------------------------------------------------------------

def mean(scores):
    """The members' mean.   [K, B] -> [B]"""
    return scores.mean(0)

def wco(scores):
    """Worst case (2310.02743): the lowest member.   [K, B] -> [B]"""
    return scores.amin(0)

def uwo(scores, *, lam=0.5):
    """Uncertainty-weighted (2310.02743): mean - λ variance (unbiased; 0 for one member).   [K, B]
    -> [B]"""
    return scores.mean(0) - lam * (scores.var(0) if len(scores) > 1 else 0.0)

def lcb(scores):
    """Lower confidence bound: mean - standard deviation (unbiased; 0 for one member).   [K, B] ->
    [B]"""
    return scores.mean(0) - (scores.std(0) if len(scores) > 1 else 0.0)

AGGREGATES = dict(mean=mean, wco=wco, uwo=uwo, lcb=lcb)

class Gate(nn.Module):
    """ArmoRM's gate (2406.12845):  softmax(MLP(h)/10) c, sums to c.   prompt feature [B, D] -> [B,
    K]"""

    def __init__(self, width, outputs, hidden=1024):
        super().__init__()
        sizes = [width, hidden, hidden, hidden, outputs]
        self.mlp = nn.Sequential(*(m for i, o in zip(sizes, sizes[1:])
                                   for m in (nn.Linear(i, o), nn.ReLU())))
        self.mlp = self.mlp[:-1]
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, h):
        return torch.softmax(self.mlp(h) / 10, -1) * self.scale

def density_ratio(strong_logp, weak_logp, mask):
    """CDR (2411.02481):  Σ log π_strong(y|c,x) - log π_weak(y|x).   [B, T] each -> [B]

    Criteria and examples c belong into the strong model's prompt. With the SFT model over its base
    it is Self-Rewarding PPO's reward (2510.21090)."""
    return ((strong_logp - weak_logp) * mask).sum(1)


# --- Adv-RM (2504.06141) --------------------------------------------------------------------------

def disagreement(r1, r2, bar=0.0, *, lam=1.5, C: Positive = 3.0):
    """R1 - λ R2 where R1 > T(x), else R1 - C: please the target, displease its twin.   [B] -> [B]

    Here on standardised rewards (ours), z = (R - its prompt's SFT mean) / std over all, so T = 0
    and neither shift nor scale of R matters. For raw rewards: bar T(x), and C 25 in a public
    implementation."""
    return torch.where(r1 > bar, r1 - lam * r2, r1 - C)

def overoptimise(r1, r2):
    """The weaker attack: the target's reward alone.   [B] -> [B]"""
    return r1

ATTACKS = dict(disagreement=disagreement, overopt=overoptimise)

def adversarial(z1, disagreement, mean, std, *, z_min=1.96):
    """Adv-RM's filter: R1 above the SFT mean and U = z1 - λ z2 an outlier, Z(U) > 1.96.   [B] ->
    [B] bool"""
    return (z1 > 0) & ((disagreement - mean) / std > z_min)

def strict_success(z1, zgold):
    """The proxy likes it (Z > 0), gold finds it far below the SFT samples (Z < -1.96).   [B] -> [B]
    bool"""
    return (z1 > 0) & (zgold < -1.96)


# --- rewards: functions of (tokens [B, T], start [B], end [B]) -> [B]; a response is tokens[start:e

def chunked(fn, c):
    """fn in micro-batches, without gradient, at the run's precision, cut to the rows' own
    length."""
    @torch.no_grad()
    def reward(tokens, start, end):
        parts = zip(tokens.split(c.micro), start.split(c.micro), end.split(c.micro))
        with autocast(c.device, c.dtype):
            return torch.cat([fn(t[:, :int(e.max())], s, e).float() for t, s, e in parts])
    return reward

def scalar_reward(model, c):
    """A reward model's score at the last token."""
    return chunked(lambda tokens, start, end: sequence_score(model, tokens, end), c)

def likelihood_reward(strong, c, weak=None):
    """GenARM's reward, log π_r(y|x); with a weak model density_ratio, CDR's."""
    def fn(tokens, start, end):
        t = torch.arange(tokens.size(1), device=tokens.device)
        mask = ((t >= start[:, None]) & (t < end[:, None])).float()                      # [B, T]
        logp = token_logprobs(strong, tokens, mask)
        return density_ratio(logp, token_logprobs(weak, tokens, mask) if weak else 0 * logp, mask)
    return chunked(fn, c)

def standardised(reward, roll):
    """A reward less its mean, over its std, on samples of the SFT model: comparable with its
    like."""
    s = score_roll(reward, roll)
    mu, sd = s.mean().item(), s.std().item()
    return lambda *where: (reward(*where) - mu) / sd

def combined(rewards, aggregate):
    """Standardised members as one reward."""
    return lambda *where: aggregate(torch.stack([r(*where) for r in rewards]))

def score_rows(reward, rows, side, c, pad):
    """[N] scores of one side of encoded pairs, on the CPU."""
    tokens, mask = collate([(r["prompt"], r[side]) for r in rows], pad, c.device)
    start = torch.tensor([len(r["prompt"]) for r in rows], device=c.device)
    return reward(tokens, start, start + mask.sum(1).long()).cpu()

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


# --- the one training loop ------------------------------------------------------------------------

def last_hidden(model, tokens, end):
    """The body's hidden state at the last token, in float32.   [B, T], [B] -> [B, D]"""
    body = model.model if isinstance(model, ScalarModel) else model
    return body(tokens)[torch.arange(len(tokens), device=tokens.device), end - 1].float()

def provide(model, rows, names, c, pad, generator):
    """What a loss names among its positional arguments, for these rows: both sides in one forward
    pass."""
    have = {k: torch.tensor([r[k] for r in rows], dtype=torch.float32, device=c.device)
            for k in names if k in ("strength", "tie", "label", "ratings", "ranks")}
    if "label" in names:
        tokens, mask = collate([((), r["pair"]) for r in rows], pad, c.device)
        return have | dict(logit=model(tokens, mask.sum(1).long()))
    sides = ("chosen", "rejected") if {"chosen", "chosen_logp"} & set(names) else ("answer",)
    tokens, mask = collate([(r["prompt"], r[side]) for side in sides for r in rows], pad,
                           c.device)                                                       # [2B, T]
    start, n = mask.argmax(1), mask.sum(1).long()                                        # [2B]
    if "chosen_logp" in names:
        logp = token_logprobs(model, tokens, mask).sum(1)                                # [2B]
        have |= dict(zip(("chosen_logp", "rejected_logp"), logp.chunk(2)))
    elif "chosen" in names:
        hidden = model.model(tokens)                                                    # [2B, T, D]
        last = hidden[torch.arange(len(n)), start + n - 1].float()                       # [2B, D]
        score = (last * model.score.weight[0].float()).sum(-1)                           # [2B]
        have |= dict(zip(sides, score.chunk(2)))
        have |= goal_states(hidden.float(), start, n, generator) if "early" in names else {}
    elif "predicted" in names:
        h = last_hidden(model, tokens, start + n)                                        # [B, D]
        have |= dict(predicted=(h[:, None] * model.ratings.weight).sum(-1))        # [B, K], float32
    else:
        have |= dict(logp=token_logprobs(model, tokens, mask))
    if "identifiers" in names:
        z = model.logits(last_hidden(model, tokens, start))                              # [B, V]
        have |= dict(identifiers=z[:, rows[0]["identifier_ids"]])
    return have

def goal_states(hidden, start, n, generator, draws=16):
    """`goal`'s states: positions a <= b of the chosen response, any of the rejected.   [2B, T,
    D]"""
    B = len(n) // 2
    u = torch.rand(3, B, draws, generator=generator).to(hidden.device)
    ab = (u[:2] * n[:B, None]).long().sort(0).values                                     # [2, B, S]

    def at(offset, which):
        where = (start[which, None] + offset)[..., None].expand(-1, -1, hidden.size(2))
        return hidden[which].gather(1, where)
    return dict(early=at(ab[0], slice(0, B)), late=at(ab[1], slice(0, B)),
                wrong=at((u[2] * n[B:, None]).long(), slice(B, None)))

def units(names, rows):
    """What the step's summed loss is divided by: scored tokens, known labels, or rows."""
    if "logp" in names and "ranks" not in names:
        return sum(len(r["answer"]) for r in rows)
    return sum(math.isfinite(x) for r in rows
               for x in r["ratings"]) if "ratings" in names else len(rows)

def fit(model, rows, loss, c, run, tok, *, seed=0, steps=0, name="", write=None):
    """The training loop of everything here: shuffle, score, step, tell.   -> whether it came to its
    end

    steps 0: c.steps, or c.epochs passes. write(folder): saves the checkpoints of a run with a
    single stage, which then resumes exactly; a run of several stages resumes after the last
    finished one (Run.stage)."""
    names, total = needs(loss), steps or c.steps or max(1,
                                                        math.ceil(len(rows) * c.epochs / c.batch))
    opt = optimiser(model, RULES[c.optimiser], c.lr, c.weight_decay, seed, aux_lr=c.aux_lr)
    g = torch.Generator().manual_seed(seed)
    if write and run.state:
        opt.load_state_dict(run.state["opt"])
        g.set_state(run.state["rng"])
        model.load_state_dict(run.state["heads"], strict=False)
    for step in run.steps(total) if write else trange(total, desc=name, leave=False, disable=None):
        # 1. get data
        picked = batch_indices(len(rows), c.batch, step, seed).tolist()
        n, value = units(names, [rows[i] for i in picked]), 0.0
        # 2. score
        for i in range(0, len(picked), c.micro):
            with autocast(c.device, c.dtype):
                have = provide(model, [rows[j] for j in picked[i:i + c.micro]], names, c, tok.pad
                               or 0, g)
                part = loss(**{k: have[k] for k in names}).sum() / n
            part.backward()
            value += part.item()
        # 3. update
        norm = clip_grad_norm_([p for p in model.parameters() if p.requires_grad], c.clip).item()
        set_lr(opt, c.lr * linear(step, total, c.warmup))
        opt.step()
        opt.zero_grad()
        # 4. tell
        told = dict(loss=value, norm=norm)
        if "rejected" in names:                                  # of the last micro-batch
            win, lose = have["chosen"].detach(), have["rejected"].detach()
            told |= dict(gap=(win - lose).mean(), accuracy=accuracy(win, lose),
                         score_std=win.std(correction=0))
        run.log(run.at + step + 1, **{f"{name} {k}".strip(): v for k, v in told.items()})
        if write and ((step + 1) % c.save_every == 0 or step + 1 in (total, c.stop)):
            heads = {k: x for k, x in model.state_dict().items() if k.startswith("ratings")}
            run.save(step + 1, write, opt=opt.state_dict(), rng=g.get_state(), heads=heads)
    run.at += total
    return not (write and c.stop and c.stop < total)

def trained(run, name, model, rows, loss, c, tok, finish=None, **options):
    """A stage's model, frozen: fitted now and saved as the run's folder `name`, or loaded where a
    resumed run has it. finish(model): what is saved."""
    def write(folder):
        model.to(c.device).requires_grad_()
        fit(model, rows, loss, c, run, tok, name=name, **dict(seed=c.seed) | options)
        save(finish(model) if finish else model, tok, folder)
    return load(run.stage(name, write), c.device)[0].requires_grad_(False)


# --- RL: the smallest loop that attacks, steers and teaches (ppo.py has the whole of it) ----------

def samples_of(policy, tok, world, problems, c, seed, samples=2, temperature=1.0):
    """`samples` responses of a policy to each of a world's problems -> Rollout."""
    with autocast(c.device, c.dtype):
        return generate(policy, [tok.prompt(p) for p in problems], world.max_new, samples=samples,
                        temperature=temperature, generator=torch.Generator().manual_seed(seed))

def sampled_pairs(policy, tok, world, n, c, seed, split="train", **label):
    """Labelled pairs of two samples of the policy, for n prompts (fewer: duplicates and ties are
    dropped)."""
    problems = world.problems(split, n, seed)
    roll = samples_of(policy, tok, world, problems, c, seed)
    texts, done = [tok.decode(ids) for ids in roll.completions()], roll.finished.tolist()
    return prefs.label_pairs(world, [(p["prompt"], *texts[2 * i:2 * i + 2], *done[2 * i:2 * i + 2])
                                     for i, p in enumerate(problems)], seed, **label)

def rl(policy, ref, tok, problems, reward, c, run, *, name, steps, max_new, groups=32, samples=4,
       lr=3e-4,
       beta=0.0, kl_loss=0.0, advantages=rloo):
    """Policy gradient, one step a rollout, so that the ratio is 1.   -> the log's rows

    reward(roll, problems of the step) -> ([B], {name: float}); beta: KL in the reward, nats a
    response; kl_loss: k3 in the loss; advantages: [P, G] -> [P, G], constant over a response's
    tokens."""
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
        score, told = reward(roll, picked)                                               # [B]
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
        out.append(told | dict(reward=score.mean().item(), kl=kl.mean().item(), norm=norm.item(),
                               length=mask.sum(1).mean().item()))
        run.log(run.at + step + 1, **{f"{name} {k}": v for k, v in out[-1].items()})
    run.at += steps
    return out

def steer(policy, tok, world, problems, reward, c, run, *, no_eos=1.0, **options):
    """RLHF on reward(roll, problems) [B], less no_eos without EOS; gold watched -> (policy, rl()'s
    rows)."""
    def scored(roll, picked):
        gold = gold_of(world, picked, roll, tok)
        return reward(roll,
                      picked) - no_eos * (~roll.finished).float().cpu(), dict(gold=gold.mean().item())
    net = copy.deepcopy(policy).requires_grad_()
    return net, rl(net, policy, tok, problems, scored, c, run, max_new=world.max_new, **options)

def rlhf(s, total, c, run, **options):
    """How gold fares while a policy is pushed against the reward `total`: pushed()'s numbers."""
    return pushed(steer(s.policy, s.tok, s.world, s.world.problems("train", 4096, c.seed),
                        lambda roll, picked: score_roll(total, roll), c, run, **options)[1])


# --- evaluate -------------------------------------------------------------------------------------

def evaluate(reward, policy, sets, tok, c, run):
    """judging.evaluate of a reward on held-out pairs, and in a world on the policy's samples ->
    dict."""
    def score(rows):
        return score_rows(reward, [dict(prompt=x, chosen=y) for x, y in rows], "chosen", c, tok.pad
                          or 0)

    def sample(problems, n, seed):
        roll = samples_of(policy, tok, world, problems, c, seed, n)
        return roll.completions(), roll.finished.tolist()
    world = tasks.task(c.data) if c.data in WORLDS else None
    return judging.evaluate(score, sample, world, tok, sets, c.seed, run.say,
                            run.folder / "eval.png")


# --- recipes: one system each, from data to numbers -----------------------------------------------

def start(c):
    """What a recipe starts from: policy (frozen), tok, pad, context, world (None for a file).

    Raises UserError where --init is no language model."""
    policy, tok = load(sft.find(c.init, c.config, device=c.device), c.device)
    if not isinstance(policy, Transformer):
        raise UserError(f"--init {c.init} is a reward model already: give a language model, or use --eval")
    return SimpleNamespace(policy=policy.requires_grad_(False), tok=tok, pad=tok.pad or 0,
                           context=c.context or policy.config.max_position_embeddings,
                           world=tasks.task(c.data) if c.data in WORLDS else None)

def pair_sets(c, tok, context):
    """(training rows, {name: held-out rows}) of --data as ids; with --eval no training rows."""
    rows, held = prefs.pair_sets(c.data, c.rows, c.noise, c.seed, c.loss == "win_tie", bool(c.eval))
    encoded = partial(prefs.encode_pairs, tok=tok, context=context, chat=c.chat)
    return [] if c.eval else encoded(rows, what="train"), {
        k: encoded(some, what=k) for k, some in held.items() if some}

def new_scalar(body, seed):
    """A reward model with the language model's body and a small random head."""
    model, g = ScalarModel.from_lm(body), torch.Generator().manual_seed(seed)
    model.score.weight.data.copy_(torch.randn(model.score.weight.shape, generator=g)
                                  / math.sqrt(body.config.hidden_size + 1))
    return model

RATING_WEIGHTS = (0.65, 0.8, 0.45, 0.55,
                  -0.4)  # HelpSteer2's five (unverified); the last is verbosity

def rated(rows, world):
    """Pairs -> single responses with the ratings of their attributes (0 to 4), for `regression`."""
    return [dict(prompt=r["prompt"], answer=r[side],
                 ratings=world.ratings(r["text"]["prompt"], r["text"][side]))
            for side in ("chosen", "rejected") for r in rows]

def new_rater(body, seed):
    """A reward model with a head for each attribute besides its score."""
    model = new_scalar(body, seed)
    model.ratings = nn.Linear(body.config.hidden_size, len(RATING_WEIGHTS),
                              bias=False).to(body.head.device)
    nn.init.zeros_(model.ratings.weight)
    return model

def folded(model):
    """A rater as a plain reward model: its score is the fixed combination of the ratings."""
    plain = copy.deepcopy(model)
    heads = model.ratings.weight.detach()                                                # [K, D]
    plain.score.weight.data = torch.tensor([RATING_WEIGHTS]).to(heads) @ heads
    del plain.ratings
    return plain

def scalar(c, f, run):
    """One reward model on pairs by --loss: a …ForSequenceClassification folder (arm: a language
    model)."""
    s = start(c)
    rows, sets = pair_sets(c, s.tok, s.context)
    if run.last:
        model = load(run.last, c.device)[0]
    else:
        model = copy.deepcopy(s.policy).requires_grad_() if c.loss == "arm" else new_scalar(s.policy, c.seed)
    if c.loss == "regression":
        model.ratings = new_rater(s.policy, c.seed).ratings
    size = sum(p.numel() for p in model.parameters()) / 1e6
    run.say(f"{run.folder}: {size:.2f} M parameters, {len(rows)} pairs, {c.device} {c.dtype}\n"
            + "\n".join(
        f"  {x:<9}{s.tok.decode(rows[0]['prompt'] + rows[0][x])[-300:]!r}"
        for x in ("chosen", "rejected")))

    def plain():
        return folded(model) if c.loss == "regression" else model
    data = rated(rows, s.world) if c.loss == "regression" else rows
    if not fit(model, data, f.loss, c, run, s.tok, seed=c.seed,
               write=lambda folder: save(plain(), s.tok, folder)):
        return {}
    if c.loss != "arm":
        return evaluate(scalar_reward(plain(), c), s.policy, sets, s.tok, c, run)
    out = evaluate(likelihood_reward(model, c), s.policy, sets, s.tok, c, run)
    if s.world:  # π π_r as generate's contrast: alpha 1
        problems, g = s.world.problems("val", 256, c.seed), torch.Generator().manual_seed(c.seed)
        roll = generate(s.policy, [s.tok.prompt(p) for p in problems], s.world.max_new,
                        temperature=0.5,
                        generator=g, contrast=(model, -0.5))
        out["guided_gold"] = gold_of(s.world, problems, roll, s.tok).mean().item()
        run.say(f"  decoding guided by it: gold {out['guided_gold']:.2f}, unguided {out['val_sft_gold']:.2f}")
    return out

def ensemble(c, f, run, *, members: Count = 5):
    """Reward models of different heads and data orders, standardised on SFT samples, then
    --aggregate."""
    s = start(c)
    rows, sets = pair_sets(c, s.tok, s.context)
    rewards = [scalar_reward(trained(run, f"member-{i}", new_scalar(s.policy, k), rows, f.loss, c,
                                     s.tok,
                                     seed=k), c) for i in range(members)
               for k in [100 * c.seed + i]]
    roll = samples_of(s.policy, s.tok, s.world, s.world.problems("train", 64, c.seed), c, c.seed,
                      samples=8)
    total = combined([standardised(r, roll) for r in rewards], f.aggregate)
    return evaluate(total, s.policy, sets, s.tok, c, run)

def hs2pref(c, f, run, *, expo=1.52):
    """HelpSteer2-Preference (2410.01257): regression, scaled BT from it, then θ1 + a (θ2 - θ1)
    (ExPO)."""
    s = start(c)
    rows, sets = pair_sets(c, s.tok, s.context)
    one = trained(run, "regression", new_rater(s.policy, c.seed), rated(rows, s.world), regression,
                  c, s.tok, folded)
    two = trained(run, "scaled", copy.deepcopy(one), rows, bt_scaled, c, s.tok)
    far = copy.deepcopy(two)
    for p, a, b in zip(far.parameters(), one.parameters(), two.parameters()):
        p.copy_(a + expo * (b - a))
    run.stage("final", lambda folder: save(far, s.tok, folder))
    return evaluate(scalar_reward(far, c), s.policy, sets, s.tok, c, run)

def armo(c, f, run, *, gate_steps=500, gate_lr: Positive = 1e-3, hidden: Count = 256,
         train_raw=False):
    """ArmoRM (2406.12845): ridge heads for ratings on frozen features, less verbosity; a
    prompt-only gate.

    train_raw: the gate is trained on ratings with verbosity still in them, as in the released
    script."""
    s = start(c)
    rows, sets = pair_sets(c, s.tok, s.context)
    both = rated(rows, s.world)
    body = trained(run, "body", new_rater(s.policy, c.seed), both, regression, c, s.tok, folded)

    def hidden_of(some):
        tokens, mask = collate([((), ids) for ids in some], s.pad, c.device)
        return chunked(lambda t, _, end: last_hidden(body, t, end), c)(
            tokens, mask.sum(1).long(), mask.sum(1).long()).cpu()                        # [N, D]
    X = hidden_of([r["prompt"] + r["answer"] for r in both]).double()
    Y, held = torch.tensor([r["ratings"] for r in both]).double() / 4, torch.arange(len(X)) % 5 == 0
    alpha = min((10.0 ** e for e in range(-4, 5)),               # 20 % of the rows choose it
                key=lambda a: (X[held] @ ridge(X[~held], Y[~held], a).T - Y[held]).square().mean())
    W, v = ridge(X, Y, alpha).float(), len(prefs.ATTRIBUTES) - 1                         # [K, D]
    penalty = verbosity_penalties(X[::max(1, len(X) // 2000)].float() @ W.T, v)          # [K]
    clean = W - penalty[:, None] * W[v]
    run.say(f"  ridge alpha {alpha:g}; verbosity penalties "
            + ", ".join(f"{a} {p:.3g}" for a, p in zip(prefs.ATTRIBUTES, penalty)))
    torch.manual_seed(c.seed)
    gate, at_prompt = Gate(W.size(1), len(W), hidden), hidden_of([r["prompt"] for r in rows])
    gap = (X[:len(rows)] - X[len(rows):]).float() @ (W if train_raw else clean).T        # [N, K]
    opt = torch.optim.AdamW(gate.parameters(), lr=gate_lr, weight_decay=0.0)
    for step in range(gate_steps):
        k = batch_indices(len(rows), 256, step, c.seed)
        opt.param_groups[0]["lr"] = gate_lr * cosine(step, gate_steps)
        opt.zero_grad()
        bt((gate(at_prompt[k]) * gap[k]).sum(1), torch.zeros(len(k))).mean().backward()
        opt.step()
    save_file({f"gate.{k}": x for k, x in gate.state_dict().items()}
              | dict(ratings=clean.contiguous()), run.folder / "body" / "armo.safetensors")

    def reward(tokens, start, end):
        h, at_start = (last_hidden(body, tokens, t).cpu() for t in (end, start))
        return (gate(at_start) * (h @ clean.T)).sum(1)
    return evaluate(chunked(reward, c), s.policy, sets, s.tok, c, run)

def maxmin(c, f, run, *, groups: Count = 2, rounds: Count = 4, minority: Share = 0.3):
    """MaxMin-RLHF's mixture (2402.08925): reward models for groups of annotators that nobody has
    named, by hard EM. min_accuracy is that of the worse-served group; pooled_min_accuracy a single
    model's."""
    s = start(c)
    encoded = partial(prefs.encode_pairs, tok=s.tok, context=s.context)
    rows = encoded(s.world.pairs(c.rows or 4000, seed=1000 + c.seed, noise=c.noise,
                                 minority=minority))
    who = torch.tensor([r["annotator"] for r in rows])                                   # [N]
    truth = {r["annotator"]: r["group"] == "B" for r in rows}

    def margins(model, some):
        return (score_rows(scalar_reward(model, c), some, "chosen", c, s.pad)
                - score_rows(scalar_reward(model, c), some, "rejected", c, s.pad))
    pooled = trained(run, "pooled", new_scalar(s.policy, c.seed), rows, f.loss, c, s.tok)
    g = torch.Generator().manual_seed(c.seed)
    group = torch.randint(groups, (int(who.max()) + 1,), generator=g)                    # [A]
    for k in range(rounds):
        models = [trained(run, f"round-{k}-group-{u}", new_scalar(s.policy, c.seed), [
            r for r in rows if group[r["annotator"]] == u] or rows, f.loss, c, s.tok)
                  for u in range(groups)]
        group = assign(torch.stack([margins(m, rows) for m in models]), who)
        agree = statistics.fmean((group[a] == 1) == b for a, b in truth.items())
        run.say(f"  round {k}: groups of {torch.bincount(group, minlength=groups).tolist()} annotators, "
                f"{max(agree, 1 - agree):.0%} with their like")
    mine, single = [], []
    for is_b in (False, True):  # a group's model: where most of it was put
        test = encoded(s.world.pairs(600, seed=c.seed, split="val", minority=float(is_b)))
        own = models[statistics.mode(int(group[a]) for a, b in truth.items() if b == is_b)]
        mine.append(pair_accuracy(scalar_reward(own, c), test, c, s.pad))
        single.append(pair_accuracy(scalar_reward(pooled, c), test, c, s.pad))
    return dict(assignment=max(agree, 1 - agree), min_accuracy=min(mine),
                pooled_min_accuracy=min(single))

def polar(c, f, run, *, pretrain: Count = 4000, labels: Count = 200,
          pretrain_epochs: Positive = 2.0):
    """POLAR (2507.05197): first learn, without labels, which policy wrote a response; then few
    labels.

    A row is prompt, reference, EOS, prompt, candidate, EOS; scratch_accuracy: plain BT, the same
    labels."""
    s, rng = start(c), random.Random(f"polar/{c.seed}")
    early = [load(sft.base(c.init.removeprefix("base:"), c.config, steps=n, device=c.device),
                  c.device)[0]
             for n in (50, 150)]
    pool, rows = [(m, t) for m in (*early, s.policy)
                  for t in (0.7, 1.0, 1.3)][:-1], []                                # eight policies
    for i, a in enumerate(pool):
        b = pool[rng.choice([k for k in range(len(pool)) if k != i])]
        problems = s.world.problems("train", pretrain, c.seed)[i::len(pool)]
        same, other = (samples_of(m, s.tok, s.world, problems, c, 10 * c.seed + i + n, n,
                                  t).completions()
                       for n, (m, t) in ((2, a), (1, b)))
        for k, x in enumerate(map(s.tok.prompt, problems)):
            rows.append(dict(prompt=[*x, *same[2 * k], s.tok.eos],
                             chosen=[*x, *same[2 * k + 1], s.tok.eos],
                             rejected=[*x, *other[k], s.tok.eos]))

    def referred(some):
        best = [s.tok.encode(s.world.demo(r["text"] | dict(seed=i))) for i, r in enumerate(some)]
        return [r | {side: [*r["prompt"], *r[side]] for side in ("chosen", "rejected")}
                | dict(prompt=[*r["prompt"], *y, s.tok.eos]) for r, y in zip(some, best)]
    few, test = (prefs.encode_pairs(s.world.pairs(n, k + c.seed, split, q), s.tok, s.context)
                 for n, k, split, q in ((labels, 1000, "train", c.noise), (600, 0, "val", 0.0)))
    first = trained(run, "pretrained", new_scalar(s.policy, c.seed), rows, f.loss, c, s.tok,
                    steps=c.steps or math.ceil(len(rows) * pretrain_epochs / c.batch))
    tuned = trained(run, "final", copy.deepcopy(first), referred(few), f.loss, c, s.tok)
    plain = trained(run, "scratch", new_scalar(s.policy, c.seed), few, f.loss, c, s.tok)
    return {f"{name}_accuracy": pair_accuracy(scalar_reward(m, c), some, c, s.pad)
            for name, m, some in (
        ("pretrained", first, referred(test)), ("val", tuned, referred(test)),
        ("scratch", plain, test))}

def cdr(c, f, run, *, strong="", weak=""):
    """CDR (2411.02481): log π_strong - log π_weak of two checkpoints as a reward, nothing trained.
    By default the SFT model is the weak one and GenARM's π_r over it the strong one."""
    s = start(c)
    rows, sets = pair_sets(c, s.tok, s.context)
    better = load(strong, c.device)[0] if strong else trained(
        run, "strong", copy.deepcopy(s.policy), rows, autoregressive, c, s.tok)
    worse = load(weak, c.device)[0] if weak else s.policy
    return evaluate(likelihood_reward(better, c, worse), s.policy, sets, s.tok, c, run)

def overopt(c, f, run, *, members: Count = 5, rl_steps=100, rl_beta=0.0,
            samples: Range("[2, inf)") = 512, prompts: Count = 48, body="1x32"):
    """Over-optimisation (2210.10760) and ensembles against it (2310.02743): gold under best-of-n
    and RL.

    Gold is standardised on SFT samples. Members are small models from random weights, so that their
    bodies differ; --noise flips labels. single: under best-of-n the average over the members, under
    RL member 0."""
    s, tail = start(c), f", {c.noise:.0%} noise" if c.noise else ""
    rows, test = (prefs.encode_pairs(sampled_pairs(s.policy, s.tok, s.world, n, c, seed + c.seed,
                                                   split,
                                                   noise=q), s.tok, s.context)
                  for n, seed, split, q in ((c.rows or 3000, 1000, "train", c.noise),
                                            (600, 2000, "val", 0)))
    small = partial(init, preset(body, s.tok, 64))
    rewards = [scalar_reward(trained(run, f"member-{k}", new_scalar(small(k), k), rows, f.loss, c,
                                     s.tok,
                                     seed=k), c) for k in range(100 * c.seed,
                                                                100 * c.seed + members)]
    problems = s.world.problems("train", 256, c.seed + 7)
    roll = samples_of(s.policy, s.tok, s.world, problems, c, c.seed + 7, samples=4)
    gold = gold_of(s.world, problems, roll, s.tok)
    mu, sd, z = gold.mean().item(), gold.std().item(), [standardised(r, roll) for r in rewards]
    out = dict(clean_accuracy=statistics.fmean(pair_accuracy(r, test, c, s.pad) for r in rewards))
    S, gold = [], []
    held = s.world.problems("val", prompts, c.seed)  # best of n: the same samples for every arm
    for i in range(0, prompts, 8):
        roll = samples_of(s.policy, s.tok, s.world, held[i:i + 8], c, c.seed + i, samples=samples)
        gold.append((gold_of(s.world, held[i:i + 8], roll, s.tok).view(-1, samples) - mu) / sd)
        S.append(torch.stack([score_roll(r, roll) for r in z]))
    S, gold = torch.cat(S, 1).view(members, prompts, samples), torch.cat(gold)   # [K, P, N], [P, N]
    how = dict(single=mean, mean=mean, wco=wco, uwo=partial(uwo, lam=0.5))           # the paper's λ
    for name, fn in how.items():
        for n in (2 ** k for k in range(9) if 2 ** k <= samples // 2):
            out[f"{name}{tail}|best-of-n gold@{n}"] = statistics.fmean(
                best_of_n(p, gold, n).mean().item() for p in (S if name == "single" else [fn(S)]))
    for name, fn in (how | dict(uwo=partial(uwo, lam=0.1))).items() if rl_steps else ():
        total = combined(z[:1] if name == "single" else z, fn)
        told = rlhf(s, total, c, run, name=name, steps=rl_steps, beta=rl_beta)
        out |= {f"{name}{tail}|RL {x}": (v - mu) / sd if x not in ("collapse", "kl_end") else v
                for x, v in told.items()}
    return out

def both_orders(pm, tok, triples, c, **options):
    """Scores s > 0 if a is better, and uncertainties u, of [(prompt, a, b)] in both orders.   [N],
    [N]"""
    rows, out = [((), [*tok.prompt(f"{x}A{y}B{z}"), tok.eos]) for x, a, b in triples
                 for y, z in ((a, b), (b, a))], []
    for i in range(0, len(rows), c.micro):
        tokens, mask = collate(rows[i:i + c.micro], tok.pad or 0, c.device)
        with autocast(c.device, c.dtype):
            out.append(torch.stack(pm.calibrated(tokens, mask.sum(1).long(), **options)).cpu())
    g, u = torch.cat(out, 1).view(2, -1, 2)                                              # [N, 2]
    return (g[:, 0] - g[:, 1]) / 2, u.mean(1)

def router(c, f, run, *, features: Count = 1024, ridge: Positive = 30.0, lam: Positive = 10.0,
           sn=True, judge_error: Share = 0.1, rivals=3):
    """Ask a strong judge where the reward model is uncertain (2510.20369), on pairs seen and unseen
    in kind.

    Trained on rules F, L, H; tested on those (id), on N and # alone (ood), on two of all five
    (mix). rivals: plain classifiers whose spread is another uncertainty. ridge, the kernel's width:
    ours, for this size."""
    s, kind = start(c), dict(mixture=prefs.ROUTING, min_gap=0.05)
    raw = s.world.pairs(c.rows or 8000, seed=1000 + c.seed, noise=0.05, heads="FLH", **kind)
    tests = dict(id=s.world.pairs(600, seed=c.seed, split="val", heads="FLH", **kind),
                 ood=s.world.pairs(600, seed=c.seed, split="base", heads="N#", rules=(1,), **kind),
                 mix=s.world.pairs(600, seed=c.seed, split="val", rules=(2,), **kind))
    rows = [dict(pair=[*s.tok.prompt(f"{r['prompt']}A{r[a]}B{r[b]}"), s.tok.eos],
                 label=float(a == "chosen"),
                 strength=float(r["strength"])) for r in raw
            for a, b in (("chosen", "rejected"), ("rejected", "chosen"))]

    with torch.no_grad():                                        # σ² median |h - h'|² / 2 = 1
        tokens, mask = collate([((), r["pair"]) for r in rows[:256]], s.pad, c.device)
        h = last_hidden(s.policy, tokens, mask.sum(1).long()).cpu()
    sigma = math.sqrt(2 / torch.pdist(h).square().median().item())

    def classifier(width, seed, name):
        g = torch.Generator().manual_seed(seed)
        pm = PairModel(copy.deepcopy(s.policy).requires_grad_(), width, sigma, sn, g)
        fit(pm.to(c.device), rows, preference, c, run, s.tok, seed=seed, name=name)
        for i in range(0, len(rows), c.micro) if width else ():  # the covariance pass: no step
            tokens, mask = collate([((), r["pair"]) for r in rows[i:i + c.micro]], s.pad, c.device)
            with autocast(c.device, c.dtype):
                pm.add(tokens, mask.sum(1).long())
        return pm
    pm = classifier(features, c.seed, "pm")

    def write(folder):
        save(pm.body, s.tok, folder)
        save_file({k: x.contiguous() for k, x in pm.state_dict().items()
                   if not k.startswith("body.")},
                  folder / "pair.safetensors")
    run.put("pm", write)
    triples = [(r["prompt"], r["chosen"], r["rejected"]) for some in tests.values() for r in some]
    where = torch.tensor([i for i, some in enumerate(tests.values()) for _ in some])
    score, u = both_orders(pm, s.tok, triples, c, ridge=ridge, lam=lam)
    right, judge = (score > 0).float(), StrongJudge(s.world, judge_error)
    g = torch.Generator().manual_seed(c.seed)
    judged = torch.tensor([{1: 1.0, 2: 0.0, 0: 0.5}[judge.judge(*t)] for t in triples])
    first = {name: fn(score, u, right < 1) for name, fn in ROUTERS.items()}
    first["shuffled"] = u[torch.randperm(len(u), generator=g)]
    if rivals > 1:
        others = [classifier(0, 10 * c.seed + i + 1, f"rival {i}") for i in range(rivals)]
        first["ensemble"] = torch.stack([both_orders(m, s.tok, triples, c)[0]
                                         for m in others]).std(0)
    got = {name: routing_curve(x, right, judged) | {f"ood_{k}": v for k, v in routing_curve(
        x[where == 1], right[where == 1], judged[where == 1]).items()} for name, x in first.items()}
    draws = [routing_curve(torch.rand(len(u), generator=g), right, judged) for _ in range(20)]
    got["random"] = {k: statistics.fmean(d[k] for d in draws) for k in draws[0]}
    run.say(routing_table(got))
    return {f"{name}|{k}": x for name, row in got.items() for k, x in row.items()} | {
        f"{name}_accuracy": right[where == i].mean().item() for i, name in enumerate(tests)} | dict(
        u_auroc=auroc(u, right < 1), margin_auroc=auroc(-score.abs(), right < 1),
        u_mean=u.mean().item(),
        u_shift=(u[where == 1].mean() - u[where == 0].mean()).item(), judge_calls=judge.calls)

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

def openrubrics(c, f, run, *, judge: Literal["rubric", "direct"] = "rubric", contrast=True,
                consistent=True, verbose: Share = 0.2, votes: Count = 5, most: Count = 5600):
    """OpenRubrics (2510.07743): rubrics by contrasting two responses, kept if they reproduce the
    label, then distilled into a generator (prompt -> rubric) and a judge (prompt, rubric, A, B ->
    criteria, winner).

    judge "direct": the same model, the winner at once; a scalar model: --data rubrics. most: any
    judge's examples, of 8000 pairs before the filter. verbose: the share of training labels that
    prefer the longer response, whatever gold says; tests are gold's."""
    prefs.one_of(judge, ("rubric", "direct"), "--judge")
    s, pairs = start(c), prefs.rubric_pairs(c.rows or 8000, 1000 + c.seed, verbose)
    tests, out = prefs.rubric_tests(c.seed), {}
    made = prefs.judge_examples(pairs, c.seed, judge == "rubric", contrast, consistent)
    texts, rubrics = (x[:most] for x in made)

    def student(name, examples):
        rows = [dict(prompt=s.tok.prompt(x), answer=[*s.tok.encode(y), s.tok.eos])
                for x, y in examples]
        return trained(run, name, copy.deepcopy(s.policy), rows, nll, c, s.tok)
    reader, writer = student("judge", texts), student("rubrics", rubrics) if rubrics else None
    for source in ("", "oracle|") if rubrics else ("",):  # oracle: the judge reads the true rubric
        for name, some in tests.items():
            asked = list(dict.fromkeys(r["prompt"] for r in some))
            rubric = {x: prefs.true_rubric(x) if source else "" for x in asked}
            if rubrics and not source:                           # greedy, once a prompt
                told = written(writer, s.tok, list(map(s.tok.prompt, asked)), c, max_new=13)
                rubric = {x: y for x, (y,) in zip(asked, told)}
                grades = zip(*(prefs.rubric_recall(x, y) for x, y in rubric.items()))
                out |= {f"{name}_{k}": statistics.fmean(x) for k, x in zip(
                    ("recall", "precision", "principle"), grades)}
            first = random.Random(f"{name}/{c.seed}").choices("AB", k=len(some))   # where chosen is
            prompts = [s.tok.prompt(prefs.question(r, rubric[r["prompt"]], at))
                       for r, at in zip(some, first)]
            says = written(reader, s.tok, prompts, c, max_new=24, temperature=0.7, samples=votes)
            cast = [[w and (1 if w == at else -1) for w in map(prefs.parse_winner, told)]
                    for told, at in zip(says, first)]
            out |= {f"{source}{name}": statistics.fmean(majority(v[:1]) for v in cast),
                    f"{source}{name}_vote": statistics.fmean(map(majority, cast))}
        out |= {f"{source}accuracy{x}": statistics.fmean(out[f"{source}{name}{x}"]
                                                         for name in tests)
                for x in ("", "_vote")}
    return out | dict(kept=len(made[0]) / len(pairs))

def thinkrm(c, f, run, *,
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
    prefs.one_of(rule, RULE_REWARDS, "--rule")
    tok, name = prefs.tokenizer(), f"parity_{'direct' if style == 'bt' else style}"
    task, n = tasks.task(name, error=error, bits=bits), c.rows or 4000
    fresh = init(preset("2x64", tok, 6 * bits + 24, "llama"), c.seed)
    sets = dict(id=task.problems("val", 400, c.seed), hard=task.problems("hard", 300, c.seed))

    shown = task.demonstrations(n, seed=1000 + c.seed)  # in both orders, one after the other
    if style == "bt":
        pairs = {k: prefs.encode_pairs(list(map(task.pair, x)), tok, 64)
                 for k, x in (sets | dict(train=shown[::2])).items()}
        model = scalar_reward(trained(run, "bt", new_scalar(fresh, c.seed), pairs["train"], bt, c,
                                      tok), c)
        out = {k: pair_accuracy(model, pairs[k], c, tok.pad) for k in sets}
        return out | dict(accuracy=statistics.fmean(out.values()))
    rows = [dict(prompt=tok.prompt(r["prompt"]), answer=[*tok.encode(r["completion"]), tok.eos])
            for r in shown]
    judge = trained(run, "sft", fresh, rows, nll, c, tok)

    def measured(judge):
        out = {}
        for name, some in sets.items():
            ask = partial(written, judge, tok, list(map(tok.prompt, some)), c, max_new=task.max_new)
            says, greedy = ask(temperature=0.6, samples=votes), [task.parse(x) for x, in ask()]
            each = verdict_rates([list(map(task.parse, x)) for x in says], greedy,
                                 [p["label"] for p in some])
            each |= dict(_length=statistics.fmean(len(x[0]) for x in says))
            out |= {f"{name}{k}": v for k, v in each.items()}
        return out | {f"accuracy{k}": statistics.fmean(out[f"{name}{k}"] for name in sets)
                      for k in each}

    def reward(roll, picked):
        said = [task.parse(tok.decode(ids)) if done else None
                for ids, done in zip(roll.completions(), roll.finished.tolist())]
        r = torch.tensor([RULE_REWARDS[rule](x, picked[i // 8]["label"])
                          for i, x in enumerate(said)])
        return r, dict(flat=(r.view(-1, 8).std(1) == 0).float().mean().item())
    out = measured(judge)
    if rl_steps:
        judge, ref = copy.deepcopy(judge).requires_grad_(), judge
        told = rl(judge, ref, tok, task.problems("train", rl_pairs, 5000 + c.seed), reward, c, run,
                  name="rl",
                  steps=rl_steps, max_new=task.max_new, samples=8, lr=rl_lr, kl_loss=1e-3,
                  advantages=group_norm)
        run.put("rl", lambda folder: save(judge, tok, folder))
        out |= {f"{style}+RL|{k}": v
                for k, v in (measured(judge) | dict(flat_end=told[-1]["flat"])).items()}
    return out

def judge_lora(c, f, run, *, rank: Count = 16, levels: Range("[2, 7]") = 7):
    """A frozen model with a rank-16 adapter as a pointwise judge (2506.05748): cross-entropy on the
    verdict token, score = E[digit]. _off: the model without the adapter."""
    prefs.within(levels, 2, 7, "--levels")
    s = start(c)
    rows, sets = pair_sets(c, s.tok, s.context)
    letters = list(prefs.SCORES.values())[:levels]
    ids = torch.tensor([s.tok.encode(x)[0] for x in letters])

    def question(r, side):
        return [*r["prompt"], *s.tok.encode(r["text"][side] + prefs.JUDGE["ANS"])]

    def verdict(r, side):                                        # gold in levels
        return s.tok.encode(letters[round(s.world.reward(r["text"], r["text"][side]) / 1.5
                                          * (levels - 1))])

    def measure(model):
        def score(some, side):
            tokens, mask = collate([((), question(r, side)) for r in some], s.pad, c.device)
            with torch.no_grad():
                logits = model.logits(last_hidden(model, tokens, mask.sum(1).long()))[:, ids]
            return expected_score(logits.cpu(), torch.arange(float(levels)))
        return {k: accuracy(score(some, "chosen"), score(some, "rejected"))
                for k, some in sets.items()}
    model = lora(copy.deepcopy(s.policy).requires_grad_(), torch.Generator().manual_seed(c.seed),
                 rank=rank)
    off = measure(model)
    fit(model, [dict(prompt=question(r, side), answer=verdict(r, side)) for r in rows
                for side in ("chosen", "rejected")], nll, c, run, s.tok, seed=c.seed, name="judge")
    run.put("judge", lambda folder: save(merge(model), s.tok, folder))
    return {f"{k}_accuracy": v for k, v in measure(model).items()} | {f"{k}_off": v
                                                                      for k, v in off.items()}

def first(c, f, run, *, candidates: Range("[2, 9]") = 4):
    """FIRST (2406.15657): a listwise judge that learns to write the ranking, read off its first
    logits."""
    prefs.within(candidates, 2, 9, "--candidates")
    s, digits = start(c), "1234567890"[:candidates]
    ids = [s.tok.encode(d)[0] for d in digits]

    def lists(n, split, seed):
        rng, out = random.Random(f"first/{split}/{seed}"), []
        for p in s.world.problems(split, n, seed):
            ys = [s.world.draw(p["prompt"], rng, prefs.ROUTING) for _ in digits]
            g = [s.world.reward(p, y) + 1e-6 * rng.random() for y in ys]            # ties by a coin
            order = sorted(range(candidates), key=lambda k: -g[k])
            text = "".join(d + y for d, y in zip(digits, ys)) + prefs.JUDGE["ANS"]
            out.append(dict(prompt=[*s.tok.prompt(p), *s.tok.encode(text)], identifier_ids=ids,
                            gold=g,
                            answer=[*s.tok.encode("".join(digits[k] for k in order)), s.tok.eos],
                            ranks=[float(order.index(k) + 1) for k in range(candidates)]))
        return out
    rows = lists(c.rows or 4000, "train", 1000 + c.seed)
    model = trained(run, "judge", copy.deepcopy(s.policy), rows, f.loss, c, s.tok)
    test = lists(600, "val", c.seed)
    tokens, mask = collate([((), r["prompt"]) for r in test], s.pad, c.device)
    with torch.no_grad():
        z = model.logits(last_hidden(model, tokens, mask.sum(1).long()))[:, ids].cpu()   # [N, K]
    told = written(model, s.tok, [r["prompt"] for r in test], c, max_new=candidates + 1)
    spoken = torch.tensor([[-(x + digits).index(d) for d in digits] for (x,) in told])
    gold = torch.tensor([r["gold"] for r in test])
    return dict(first_spearman=statistics.fmean(map(spearman, z, gold)),
                generated_spearman=statistics.fmean(map(spearman, spoken, gold)))

class Field:
    """Prompts with samples of the SFT model and their gold: attacks are aimed and measured here."""

    def __init__(self, s, problems, c, samples=16):
        self.problems, self.samples = problems, samples
        self.at = {p["seed"]: i for i, p in enumerate(problems)}
        self.roll = samples_of(s.policy, s.tok, s.world, problems, c, c.seed + 11, samples)
        self.texts = [s.tok.decode(ids) for ids in self.roll.completions()]
        self.gold = gold_of(s.world, problems, self.roll, s.tok).view(-1, samples)       # [P, 16]

    @cache
    def standard(self, reward):
        """A reward as z(roll, problems): less its prompt's mean over SFT samples, over the std of
        all."""
        all_ = score_roll(reward, self.roll).view(self.gold.shape)                       # [P, 16]

        def z(roll, problems):
            p = torch.tensor([self.at[x["seed"]] for x in problems])
            mu = all_.mean(1)[p].repeat_interleave(len(roll.tokens) // len(problems))    # [B]
            return (score_roll(reward, roll) - mu) / all_.std()
        return z

def pairs_against(s, field, roll, rows, rng, each=4):
    """SFT samples preferred to the responses `rows` of a rollout: `each` for every distinct
    response."""
    texts, done, out, seen = [s.tok.decode(y)
                              for y in roll.completions()], roll.finished.tolist(), [], set()
    per, gold = len(texts) // len(field.problems), gold_of(s.world, field.problems, roll, s.tok)
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

def advrm(c, f, run, *, rounds=2, attack_steps: Count = 160, attack_lr: Positive = 1e-3,
          attack_beta=0.05, lam=1.5, rl_steps=120, rl_beta=0.0, most: Count = 1500,
          prompts: Range("[8, inf)") = 1536):
    """Adv-RM (2504.06141): a policy learns to please the reward model while its twin objects; what
    it finds joins the data as rejected, the models are trained anew; then: how far can RLHF push
    before gold falls?

    Against it: plain, the twins' mean and lcb, and as many pairs more of another kind (more_random:
    samples of a policy that only over-optimises; more_gold: pairs labelled by gold). strict: the
    share of attacks that the model likes and gold finds far below the SFT samples, on prompts the
    attacker has not seen."""
    s, rng = start(c), random.Random(f"advrm/{c.seed}")
    encoded = partial(prefs.encode_pairs, tok=s.tok, context=s.context)
    sampled = partial(sampled_pairs, s.policy, s.tok, s.world, c=c, min_gap=0.02)
    rows, test = (encoded(sampled(n, seed=k + c.seed, split=split))
                  for n, k, split in ((c.rows or 4000, 1000, "train"), (800, 2000, "val")))
    seen, unseen = (Field(s, s.world.problems(split, n, c.seed), c) for split, n in (
        ("train", prompts), ("val", prompts // 8)))

    def models(name, extra=(), members=(1, 2)):
        return [scalar_reward(trained(run, f"{name}-{i}", new_scalar(s.policy, k), [*rows, *extra],
                                      f.loss, c,
                                      s.tok, seed=k), c) for i in members
                for k in [10 * c.seed + i]]

    def attacker(R, fn, name):
        """A policy trained from the SFT model, on `seen`, to raise fn of the standardised
        rewards."""
        z = [seen.standard(r) for r in R]
        return steer(s.policy, s.tok, s.world, seen.problems, lambda roll, picked: fn(
            *(x(roll, picked) for x in z)), c, run, name=name, steps=attack_steps, lr=attack_lr,
            beta=attack_beta, no_eos=3.0)[0]

    def struck(net, R, field):
        """The attacker's samples on a field: (roll, z1, z2, rate of strict success)."""
        roll = samples_of(net, s.tok, s.world, field.problems, c, c.seed + 13, samples=8)
        z1, z2 = (field.standard(r)(roll, field.problems) for r in R)
        below = (gold_of(s.world, field.problems, roll, s.tok)
                 - field.gold.mean(1).repeat_interleave(8)
                 ) / field.gold.std(1).clamp(min=1e-3).repeat_interleave(8)
        return roll, z1, z2, strict_success(z1, below).float().mean().item()
    R = R0 = models("round-0")
    weak, extra = attacker(R, overoptimise, "overopt"), []
    out = dict(plain_accuracy=pair_accuracy(R[0], test, c, s.pad),
               strict_overopt=struck(weak, R, unseen)[-1])
    for k in range(rounds):
        net = attacker(R, f.attack, f"attack {k}")
        roll, z1, z2, _ = struck(net, R, seen)
        U = [x(seen.roll, seen.problems) for x in map(seen.standard, R)]
        U = U[0] - lam * U[1]                                    # the SFT samples' own disagreement
        kept = torch.where(adversarial(z1, z1 - lam * z2, U.mean(), U.std()))[0].tolist()
        made = pairs_against(s, seen, roll, kept, rng)[:most]
        out |= {f"strict_{k}": struck(net, R, unseen)[-1], f"pairs_{k}": len(made),
                f"confirmed_{k}": statistics.fmean(r["margin"] > 0 for r in made) if made else 0.0}
        run.say("  " + "  ".join(f"{x} {v:.3g}" for x, v in out.items()))
        extra += encoded(made) if made else []
        R = models(f"round-{k + 1}", extra)
    out |= dict(strict_last=struck(attacker(R, f.attack, "last attack"), R, unseen)[-1],
                adv_accuracy=pair_accuracy(R[0], test, c, s.pad))
    roll = struck(weak, R0, seen)[0]
    more_random = pairs_against(s, seen, roll, rng.sample(range(8 * prompts), 8 * prompts),
                                rng)[:len(extra)]
    more_gold = sampled(2 * len(extra) + 64, seed=3000 + c.seed)[:len(extra)]
    arms = dict(plain=(R0[:1], mean), mean=(R0, mean), lcb=(R0, lcb), adv=(R[:1], mean))
    for name, made in (("more_random", more_random), ("more_gold", more_gold)):
        arms[name] = (models(name, encoded(made) if made else [], (1,)), mean)
    for name, (some, how) in arms.items():
        total = combined([standardised(r, seen.roll) for r in some], how)
        told = rlhf(s, total, c, run, name=name, steps=rl_steps, beta=rl_beta)
        out |= {f"{name}|{k}": v for k, v in told.items()}
    return out

RECIPES = dict(scalar=scalar, ensemble=ensemble, hs2pref=hs2pref, armo=armo, maxmin=maxmin,
               polar=polar,
               cdr=cdr, overopt=overopt, router=router, openrubrics=openrubrics, thinkrm=thinkrm,
               judge_lora=judge_lora, first=first, advrm=advrm)
PAIR_LOSSES = ("bt", "margin", "scaled", "smooth", "win_tie", "goal")
LOSSES_OF = dict(scalar=(*PAIR_LOSSES, "regression", "arm"), first=("listwise",)) | dict.fromkeys(
    ("ensemble", "maxmin", "polar", "overopt", "advrm"), PAIR_LOSSES)            # others: their own
AXES = dict(recipe=RECIPES, loss=LOSSES, aggregate=AGGREGATES, attack=ATTACKS, optimiser=RULES,
            kernels=kernels.MODES)


# --- train ----------------------------------------------------------------------------------------

WORLD_OF = dict.fromkeys(("hs2pref", "armo", "maxmin", "overopt"), ("ring",)) | dict.fromkeys(
    ("router", "openrubrics", "judge_lora", "first", "advrm"), ("toyif",)) | dict.fromkeys(
    ("ensemble", "polar"), WORLDS)               # the worlds whose gold reward a recipe reads

def readers(c, f):
    """{field: (whether this run reads it, what does)} of the fields that not every run reads."""
    fixed = c.recipe in ("router", "openrubrics", "thinkrm", "first", "advrm")    # they make labels
    fields = dict(noise=(c.data in WORLDS and not fixed and not c.eval,
                         "a world's training labels"),
                  init=(c.recipe != "thinkrm" and (not c.eval or c.data in WORLDS),
                        "other recipes"),
                  attack=(c.recipe == "advrm", "--recipe advrm"),
                  aggregate=(c.recipe == "ensemble", "--recipe ensemble"),
                  stop=(c.recipe == "scalar" and not c.eval,
                        "--recipe scalar: others resume by stages"),
                  epochs=(not c.steps, "runs without --steps"))
    if c.eval:
        trains = ("recipe", "loss", "steps", "epochs", "batch", "optimiser", "lr", "aux_lr",
                  "warmup", "weight_decay", "clip", "save_every", "keep")
        fields |= dict.fromkeys(trains, (False, "training, without --eval"))
    return fields

def check(c, f):
    """UserError for all that can be known before anything is made: files, folders, what does not
    combine."""
    prefs.one_of(c.loss, LOSSES_OF.get(c.recipe, ("bt",)), f"--recipe {c.recipe}: loss")
    if c.recipe == "thinkrm" and not c.eval:
        return
    prefs.check_pairs(c.data, whole=bool(c.eval))
    if c.eval:
        peek(c.eval, scalar=True, option="--eval")
    worlds = ("ring",) if c.loss == "regression" else WORLD_OF.get(c.recipe)
    if worlds and not c.eval and c.data not in worlds:
        raise UserError(f"--recipe {c.recipe} needs --data {' or '.join(worlds)}, whose gold reward it uses; "
                        f"not {c.data}")
    if c.eval and c.data not in WORLDS:
        return
    most = sft.find(c.init, c.config, make=False)
    if c.context > most:
        raise UserError(f"--context {c.context} exceeds the {most} tokens of {c.init}: lower it")
    if c.recipe == "polar" and not c.init.startswith("base:"):
        raise UserError("--recipe polar trains its early policies anew: give --init base:PRESETS")
    for path in filter(None, (f.recipe.keywords.get(k) for k in ("strong", "weak"))):
        peek(path, option="--strong or --weak")
    if c.recipe == "overopt":
        preset(f.recipe.keywords["body"], prefs.tokenizer())

def train(c, f):
    """One run of a recipe, or with --eval only the table of a reward model.   -> the result's
    numbers"""
    kernels.use(c.kernels)
    check(c, f)
    if c.recipe != "thinkrm" and (c.data in WORLDS or not c.eval):
        sft.find(c.init, c.config, device=c.device)  # made before this run's clock starts
    with Run(c, f, "reward", CURVES) as run:
        if c.eval:
            run.begin()  # pictures are made before there is a result
            model, tok = load(c.eval, c.device)
            context = c.context or model.config.max_position_embeddings
            sets = pair_sets(c, tok, context)[1]
            policy = start(c).policy if c.data in WORLDS else None               # gives the samples
            out = evaluate(scalar_reward(model, c), policy, sets, tok, c, run)
        else:
            out = f.recipe(c, f, run)
            if c.recipe not in ("scalar", "ensemble", "hs2pref", "armo",
                                "cdr"):                                        # those print a table
                run.say("  " + "\n  ".join(f"{k:<40} {v:.3f}" for k, v in out.items()
                                           if "@" not in k))
        if not out:                                              # --stop came first
            return run.say(f"  paused at step {c.stop}: the same command with --resume and no --stop goes on")
        run.say(f"\n  {run.folder}: log.jsonl, pictures" + f"; checkpoint {run.last}"
                * bool(run.last))
        return run.finish(**out)


# --- main -----------------------------------------------------------------------------------------

def main(argv=None):
    """python reward.py …: see the docstring above, or --help."""
    return launch("reward", Config, PRESETS, AXES, __doc__, train, argv, readers)


if __name__ == "__main__":
    cli(main)
