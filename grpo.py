"""
grpo.py - group-relative policy optimisation with verifiable rewards: sample a group, compare, reinforce.

    python grpo.py                                 # a tiny model learns to reason by trial and error: minutes
    python grpo.py --config tiny                   # the same in seconds: shows that everything turns
    python grpo.py --config dapo --seed 1
    python grpo.py --init Qwen2.5-0.5B --data gsm8k.jsonl --config dr_grpo
    python grpo.py --reward mine.py:score          # a reward of your own: score(problem, text, finished)

Map      1 config   2 advantages   3 credit   4 surrogates   5 penalties   6 weights   7 filters   8 roll out
         9 before training   10 evaluate   11 train   12 LatentSeek   13 claims; rewards: data/shaping.py
Letters  P prompts, G samples each, N = P G rows, T tokens; [N, T] is aligned: index t belongs to tokens[:, t]

preset         paper          idea: what differs from GRPO
grpo           2402.03300     the group's mean as baseline, its std as unit, PPO's clip; KL: --penalty k3
dr_grpo        2503.20783     no std, and a constant in the place of each response's length
rloo           2402.14740     the other samples' mean as baseline, no clip, KL in the reward
reinforce_pp   2501.03262     no group: advantages whitened over the batch's tokens
rpp_baseline   2501.03262     ... of rewards less the group's mean
dapo           2503.14476     clip-higher, only mixed groups, token-level mean, soft penalty of overlong ones
linear         control        every response pays for its length
dler           2510.15110     truncation as the only penalty, whitened over the batch, clip-higher
da_dler        2510.15110     ... with a shorter one for prompts that are mostly solved
dot            2601.03969     in groups all correct, the longest outliers are cut off, and so fail
easy           2505.18086     GRPO-λ: a length penalty in the easiest groups only
hapo           2505.11225     beat the shortest correct response that the prompt has ever had
arlcp          2602.12113     reflection and length penalised, by how much a response reflects
drpo           2510.04474     correct responses by length, wrong ones by a soft maximum: no shared baseline
clip_cov       2505.22617     no gradient from a few tokens of high covariance of log-prob and advantage
kl_cov         2505.22617     ... a KL penalty on those of the highest
acereason      2506.13284     the temperature of entropy 0.3; unfinished responses do not train
ace            2602.21420     wrong responses that became likelier pay more
apo            2506.21655     wrong and too long pays more; KL is loosened on hard prompts
rapo           2510.03865     forward KL to a reference that is flattened where the answer was wrong
spae           2601.03823     a probe after each step: those that raise the truth's probability earn more
care           2506.16141     a bonus for reasoning that makes the answer likely under a slow copy
rlpr           2506.18254     no verifier: the reward is the probability of the true answer
co_reward      2508.00410     no label: agreement with the majority on the same question in other words
swe_rl         2502.18449     similarity to a reference response
noisy          2505.22653     rewards flipped for 40 % of the prompts
rpr            2505.22653     no outcome: a reward for the forms of reasoning
rpr_noisy      2505.22653     ... added to a noisy reward where that is low
clip_delta     2410.15115     process rewards of each step, bounded so that more steps earn no more
knowrl         2604.12627     the fewest hints that suffice, in training only
recap          2510.21978     an old task replayed, objectives weighted by how they converge
rif            2507.05386     without the prompts that the first model never solves
rlvr           2411.15124     Tülu 3: 10 if verified, -10 without EOS, KL in the reward
aipo           2505.24034     stale rollouts: importance weights with a cap and no clip
rlad           2602.22495     the teacher in the trust region: a mixed anchor
kdrl           2506.02208     reverse KL to a teacher beside the reward
opd            2602.12125     on-policy distillation: the teacher's log-ratio as a token reward
exopd          2602.12125     ... extrapolated past the teacher
latentseek     2505.13308     no training: REINFORCE on the hidden states of one answer, rewarded by itself
Watch    correct (of training samples, before shaping) should rise. flat is the share of groups without a
         signal: near 1 the prompts are too easy or too hard. Entropy that drops to 0 early ends exploration;
         clipped says how many ratios left the trust region. length beside guessing: shorter is worthless
         if the model stops reasoning. kl is k1 to the start, nats per response.
"""
import copy
import itertools
import random
import statistics
import time
from dataclasses import dataclass, replace
from typing import Literal

import torch
import torch.nn.functional as F
from torch.nn.utils import clip_grad_norm_

import kernels
import sft
from data import curricula, tasks
from data.run import (Count, Positive, Run, Share, UserError, batch_indices,
                      check_first_ratio, cli, launch, needs, read_log, report)
from data.shaping import SHAPERS, TRIMS, among_correct, flipped
from model import Rollout, Transformer, autocast, collate, generate, load, save, token_logprobs
from optim import optimiser, set_lr

# --- config ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Config:
    """What every run has; what belongs to a shaper, an advantage or a loss is an argument of its
    function."""
    config: str = ""             # presets and TOML files, left to right
    data: str = "chain"          # a task, several ("chain+sort"), or a JSONL of prompts and answers
    watch: str = ""              # tasks that are evaluated too ("chain,sort"): what is forgotten?
    init: str = "base:chain"     # the SFT model: where the policy starts, and the reference
    teacher: str = ""  # a better model with the same tokenizer, for the methods that learn from one
    chat: bool = False           # wrap prompts in the checkpoint's chat template
    reward: str = "task"  # task, similarity, pattern, or PATH.py:FUNCTION (problem, text, finished)
    noise: Share = 0.0           # rewards flipped with this probability …
    noise_level: Literal["group", "response"] = "group"  # … drawn once per group, or per response
    twins: bool = False          # the second half of a batch is the first in other words
    trim: str = "whole"          # which row of TRIMS
    shaper: str = "plain"        # which row of SHAPERS
    advantage: str = "group"     # which row of ADVANTAGES
    credit: str = "same"         # which row of CREDIT
    surrogate: str = "clip"      # which row of SURROGATES
    chooser: str = "nothing"     # which row of CHOOSERS
    penalty: str = "none"        # which row of PENALTIES
    weight: str = "sequence_mean"  # which row of WEIGHTS
    filter: str = "every"        # which row of FILTERS
    steps: int = 60              # rollout-and-update iterations
    prompts: Count = 16          # groups per iteration
    samples: Count = 8           # responses per group
    minibatches: Count = 4       # optimizer steps per rollout, of whole groups
    micro: Count = 64  # responses per forward pass, at least a group: lower it if memory runs out
    rounds: Count = 10           # how often a filter may ask for more groups
    pool: Count = 400            # training prompts, visited again and again
    screen: int = 0              # drop prompts that so many first samples never solve (0: keep all)
    hints: int = 0               # samples to measure each set of hints with (0: no hints)
    reweigh: float = 0.0  # RECAP's temperature for the weights of a mixture's tasks (0: all alike)
    seek: int = 0                # LatentSeek on so many held-out prompts after training
    lr: Positive = 1e-4          # AdamW's, constant after the warm-up
    warmup: int = 0              # iterations of linear warm-up
    entropy: float = 0.0         # coefficient of an entropy bonus
    kl_reward: float = 0.0       # KL in the reward: β k1 to the reference, nats per response
    lag: int = 0                 # rollouts come from the policy of so many iterations ago
    temperature: Positive = 1.0  # of sampling and, the same, of every log-prob
    at_entropy: float = 0.0      # choose the temperature at which the first entropy is this (0: as given)
    max_new: int = 0             # longest response in tokens (0: the task says)
    eval_every: Count = 20       # iterations between evaluations on held-out prompts
    eval_prompts: Count = 256    # how many of each held-out split
    eval_samples: Count = 4      # samples of each: pass@k and maj@k
    save_every: Count = 20       # iterations between checkpoints
    keep: Count = 2              # checkpoints to keep
    stop: int = 0                # pause after this iteration (0: no); --resume goes on
    out: str = ""                # run folder (default out/grpo/<presets>)
    seed: int = 0                # of SFT, prompts and sampling
    device: str = "auto"         # cpu or cuda
    dtype: str = "auto"  # of the matmuls: float32, or bfloat16 under autocast (default on CUDA)
    compile: bool = False        # torch.compile the policy's training pass
    kernels: str = "auto"        # auto, or torch: the plain definition of every kernel
    resume: bool = False         # go on from the newest checkpoint of the run folder


PRESETS = dict(                  # the papers' settings, but for lr, sizes and what is marked ours
    grpo=dict(),
    dr_grpo=dict(advantage="centred", weight="constant"),
    rloo=dict(advantage="rloo", surrogate="reinforce", weight="sequence_sum", minibatches=1,
              kl_reward=0.05),
    reinforce_pp=dict(advantage="returns", weight="token_mean"),
    rpp_baseline=dict(advantage="whitened", weight="token_mean"),
    dapo=dict(shaper="overlong", filter="mixed", eps_high=0.28, weight="token_mean"),
    linear=dict(shaper="linear"),
    dler=dict(trim="to_target", shaper="truncate", filter="mixed_shaped", advantage="whitened",
              eps_high=0.28,
              dual=10.0, weight="token_mean", penalty="k3", beta=5e-4),
    da_dler=dict(trim="to_target", shaper="truncate", filter="mixed_shaped", advantage="whitened",
                 eps_high=0.28, dual=10.0, weight="token_mean", penalty="k3", beta=5e-4, target=26,
                 easy=18),
    dot=dict(trim="outliers", shaper="regraded", filter="mixed_shaped", surrogate="kl_cov",
             chooser="top",
             samples=16, prompts=8),
    easy=dict(shaper="easiest"),
    hapo=dict(shaper="history", pool=60),
    arlcp=dict(shaper="reflective", advantage="rloo", weight="token_mean", kl_reward=1e-3),
    drpo=dict(surrogate="drpo", chooser="hinge"),
    clip_cov=dict(surrogate="clip_cov", chooser="band", filter="mixed", weight="token_mean"),
    kl_cov=dict(surrogate="kl_cov", chooser="top", filter="mixed", weight="token_mean"),
    acereason=dict(at_entropy=0.3, trim="ended", filter="mixed"),
    ace=dict(credit="overconfident", weight="token_mean"),
    apo=dict(credit="too_long", penalty="by_difficulty"),
    rapo=dict(penalty="flattened", entropy=1e-3),
    spae=dict(advantage="stepwise", filter="mixed", eps_high=0.28, weight="token_mean"),
    care=dict(shaper="consistent", group_eps=1e-4),
    rlpr=dict(shaper="probable", filter="steady", rounds=1, eps_high=0.27, weight="token_mean"),
    co_reward=dict(shaper="agreed", twins=True, penalty="k3", beta=0.005),
    swe_rl=dict(reward="similarity"),
    noisy=dict(noise=0.4),
    rpr=dict(reward="pattern"),
    rpr_noisy=dict(noise=0.4, shaper="calibrated"),
    clip_delta=dict(advantage="process", weight="token_mean", kl_reward=1e-3),
    knowrl=dict(hints=8, pool=60, eps_high=0.28, weight="token_mean"),
    recap=dict(data="sort+chain", watch="chain,sort", init="base:chain_sort", reweigh=5.0),
    rif=dict(screen=8),
    rlvr=dict(shaper="verified", advantage="rloo", weight="token_mean", kl_reward=0.05),
    aipo=dict(advantage="centred", surrogate="stale", weight="token_mean", lag=4),
    rlad=dict(surrogate="anchored", weight="token_mean"),
    kdrl=dict(penalty="to_teacher", weight="token_mean"),
    opd=dict(advantage="distilled", weight="token_mean", samples=1, prompts=128),
    exopd=dict(advantage="distilled", weight="token_mean", samples=1, prompts=128, lam=1.25),
    latentseek=dict(steps=0, seek=64),
    tiny=dict(steps=4, prompts=4, samples=4, minibatches=2, eval_every=2, eval_prompts=16,
              save_every=2,
              max_new=24, pool=32),
    # parts and controls of the claims
    wide=dict(eval_samples=8, eval_every=60, save_every=60, keep=1),
    tokens=dict(filter="every", weight="token_mean"),  # what else the arms of `exploration` share
    harsher=dict(credit="harsher"), no_penalty=dict(coef=0.0), brief=dict(steps=15),
    reverse=dict(penalty="k2", beta=0.01, entropy=1e-3),
    lag1=dict(lag=1), lag0=dict(lag=0), each=dict(noise_level="response"), sharp=dict(reweigh=0.5),
    behind=dict(surrogate="clip_stale"), blind=dict(surrogate="reinforce"),
    taught=dict(teacher="base:chain_right"),
    on_sort=dict(data="sort", watch="chain,sort", init="base:chain_sort"),
    replay=dict(data="sort+chain", watch="chain,sort", init="base:chain_sort"),
)
CURVES = {"correct": ["correct", "val_accuracy", "val_greedy", "ood_accuracy", "val_rouge_l",
                      "val_gold", "chain_val_accuracy", "sort_val_accuracy"],
          "length, tokens": ["length"], "entropy, nats": ["entropy"], "flat groups": ["flat"],
          "KL to the start, nats per response": ["kl"], "clipped": ["clipped"]}

# --- advantages: rewards [P, G] -> [N, T], 0 off the mask -----------------------------------------


def tokens_of(x, mask):
    """A number of each response on each of its tokens.   [P, G], [N, T] -> [N, T]"""
    return x.reshape(-1, 1) * mask


def whiten(x, mask, eps=1e-8):
    """(x - mean) / std over all valid tokens, unbiased.   [N, T]"""
    n = mask.sum()
    mean = (x * mask).sum() / n
    var = ((x - mean) ** 2 * mask).sum() / (n - 1).clamp(min=1)
    return (x - mean) * torch.rsqrt(var + eps) * mask


def deviations(x):
    """x less its group's mean, exactly 0 in a group of equals: 0.7 summed eight times is not
    5.6.   [P, G]"""
    x = x - x[:, :1]
    return x - x.mean(1, keepdim=True)


def group_norm(shaped, mask, *, group_eps=1e-6):
    """GRPO (2402.03300 §4.1.2):  A = (R - mean) / (std + eps), the group's; std unbiased."""
    A = deviations(shaped)                                                               # [P, G]
    return tokens_of(A / (A.std(1, keepdim=True) + group_eps), mask)


def centred(shaped, mask):
    """Dr. GRPO (2503.20783):  A = R - mean."""
    return tokens_of(deviations(shaped), mask)


def leave_one_out(shaped, mask):
    """RLOO (2402.14740):  A = R - mean of the others = (R - mean) G / (G - 1)."""
    G = shaped.size(1)
    return tokens_of(deviations(shaped) * G / (G - 1), mask)


def returns(shaped, mask, old_logp, ref_logp, *, beta=0.0):
    """REINFORCE++ (2501.03262): R at the last token less β k1 of each from t on, whitened over the
    batch."""
    k1 = (old_logp - ref_logp) * mask                                                    # [N, T]
    ahead = k1.flip(1).cumsum(1).flip(1)
    return whiten(tokens_of(shaped, mask) - beta * ahead * mask, mask)


def whitened(shaped, mask):
    """REINFORCE++-baseline (2501.03262), DLER (2510.15110): less the group's mean, whitened over
    the batch.

    Over tokens, so that long responses count for more, and a group without a signal is not quite at
    0.
    """
    return whiten(centred(shaped, mask), mask)


def distilled(old_logp, teach_logp, base_logp, mask, *, lam=1.0, most: Positive = 10.0):
    """G-OPD (2602.12125): the token reward λ log π_T/π_base with a KL of weight 1; λ 1: log
    π_T/π_old."""
    return (lam * (teach_logp - base_logp).clamp(-most, most) - (old_logp - base_logp)) * mask


def at_step(x, step, otherwise=0.0):
    """What belongs to a step, on its tokens.   [N, K], step [N, T] (-1: of none) -> [N, T]"""
    return torch.where(step >= 0, x.gather(1, step.clamp(min=0)),
                       torch.full_like(x[:, :1], otherwise))


def potential(acc, conf):
    """SPAE's Φ in [-1, 1]: -1 is confidently wrong, 1 confidently right."""
    return 1.5 * acc * conf + 0.5 * acc - conf


def stepwise(shaped, mask, step, acc, conf, probed, *, alpha=0.5, xi=0.5, full: Share = 0.9,
             white=True):
    """SPAE (2601.03823):  A = (R - mean) f + ξ g of a token's step k, whitened over the batch's
    tokens.

    f = 1 - α (1 - exp(-S)), S the earlier steps with Φ > full; g = exp(Φ_k - Φ_k-1, to [0, 1] over
    the batch) less its mean. acc, conf [N, K]: probability of the truth and confidence if asked
    after a step, where probed is true.
    """
    phi = potential(acc, conf)                                                           # [N, K]
    sure = ((phi > full) & probed).to(phi)
    f = 1 - alpha * (1 - torch.exp(sure - sure.cumsum(1)))
    change = F.pad(phi[:, 1:] - phi[:, :-1], (1, 0))
    low, high = (change[probed].min(), change[probed].max()) if probed.any() else (phi.min(),
                                                                                   phi.max())
    g = ((change - low) / (high - low).clamp(min=1e-8)).exp()
    g = (g - (g * probed).sum() / probed.sum().clamp(min=1)) * probed
    A = (centred(shaped, mask) * at_step(f, step, 1.0) + xi * at_step(g, step)) * mask
    return whiten(A, mask) if white else A


def step_returns(p, probed, rule="clip_delta", eta=0.9):
    """The return from each step on, of scores p [N, K] (2410.15115): plain sum, clip, delta or
    clip_delta.

    clip: min(p - η, 0). delta: p_k - p_k+1, but the last but one keeps its own and the last earns
    0: the return is p_k.
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
    """Process rewards (2410.15115): the outcome and the return of the token's step, whitened over
    the batch.

    process [N, K]: a score of each step; bug: what a faulty scorer adds to each, which a plain sum
    invites to farm. rule: sum, clip, delta or clip_delta.
    """
    ahead = scale * step_returns(process + bug, probed.to(process), rule, eta)           # [N, K]
    return whiten(tokens_of(shaped, mask) + at_step(ahead, step) * mask, mask)


ADVANTAGES = dict(group=group_norm, centred=centred, rloo=leave_one_out, returns=returns,
                  whitened=whitened,
                  distilled=distilled, stepwise=stepwise, process=process_returns)

# --- credit: advantages [N, T] once more, by what else is known of a response ---------------------


def same(adv):
    """The advantages as they are."""
    return adv


def overconfident(adv, old_logp, ref_logp, mask, *, alpha=1.0):
    """ACE (2602.21420): where A < 0, A (1 + α softplus(mean of log π/π_ref)); α ours (unknown)."""
    shift = ((old_logp - ref_logp) * mask).sum(1) / mask.sum(1).clamp(min=1)             # [N]
    return torch.where(adv < 0, adv * (1 + alpha * F.softplus(shift)[:, None]), adv)


def too_long(adv, correct, length, *, base: Positive = 1.1):
    """APO's STCR (2506.21655): A (2 - b^-(L - μ)) for wrong responses longer than the correct mean
    μ."""
    mean, _ = among_correct(length, correct)                                             # [P, 1]
    over = (length - mean).clamp(min=0) * (1 - correct) * (correct.sum(1, keepdim=True) > 0)
    return adv * (2 - base ** -over).reshape(-1, 1)


def harsher(adv, *, factor=1.693147):
    """A control for ACE: every negative advantage times 1 + log 2, whatever the confidence."""
    return torch.where(adv < 0, factor * adv, adv)


CREDIT = dict(same=same, overconfident=overconfident, too_long=too_long, harsher=harsher)

# --- surrogates: a loss per token [n, T], or per group [p] ----------------------------------------


def ratio_of(logp, old_logp, most=20.0):
    """π/π_old, its logarithm capped against overflow."""
    return (logp - old_logp).clamp(-most, most).exp()


def clip(logp, old_logp, adv, *, eps: Positive = 0.2, eps_high=0.0, dual=0.0):
    """PPO's (1707.06347 eq. 7): max(-A ρ, -A clip(ρ, 1-ε, 1+ε)); eps_high: an upper ε of its own
    (DAPO).

    dual > 1: where A < 0 the loss is at most -A dual (dual clip, 1912.09729).
    """
    ratio = ratio_of(logp, old_logp)                                                     # [n, T]
    loss = torch.maximum(-adv * ratio, -adv * ratio.clamp(1 - eps, 1 + (eps_high or eps)))
    return torch.where(adv < 0, torch.minimum(loss, -adv * dual), loss) if dual else loss


def reinforce(logp, adv):
    """-A log π: one step a rollout, no ratio."""
    return -adv * logp


def stale(logp, behaviour_logp, adv, *, most: Positive = 4.0):
    """AIPO (2505.24034): -sg(min(π/μ, ρ̄)) A log π, for tokens of a policy μ some updates old."""
    return -ratio_of(logp, behaviour_logp).detach().clamp(max=most) * adv * logp


def clip_stale(logp, behaviour_logp, adv, *, eps: Positive = 0.2, eps_high=0.0):
    """PPO's clip around the policy μ that generated, however old: a control for AIPO."""
    return clip(logp, behaviour_logp, adv, eps=eps, eps_high=eps_high)


def anchored(logp, old_logp, teach_logp, adv, *, alpha: Share = 0.5, eps: Positive = 0.2):
    """RLAD (2602.22495): PPO's clip around π_old^α π_T^(1-α).   log r = α log π/π_old + (1-α) log
    π/π_T"""
    return clip(logp, alpha * old_logp + (1 - alpha) * teach_logp, adv, eps=eps)


def clip_cov(logp, old_logp, adv, chosen, *, eps=1.0):
    """Clip-Cov (2505.22617): no gradient from the chosen tokens (see band); the ratio's clip nearly
    off."""
    return clip(logp, old_logp, adv, eps=eps) * (1 - chosen)


def kl_cov(logp, old_logp, adv, chosen, *, coef=1.0):
    """KL-Cov (2505.22617): -A ρ, and coef |log π/π_old| on the chosen tokens (see top): no clip.

    A token that has not moved has no sign: what rounding leaves of its ratio 1 earns no gradient.
    """
    moved = logp - old_logp
    size = torch.where(moved.abs() > 1e-5, moved.abs(), torch.zeros_like(moved))
    return -adv * ratio_of(logp, old_logp) + coef * chosen * size


def drpo(logp, old_logp, mask, correct, length, cap, chosen, *, lam=0.1, tau: Positive = 10.0):
    """DRPO (2510.04474): -J = -(Σ w s - τ log mean exp(s/τ)) of a group, s a response's mean
    log-prob.

    w over the correct ones ∝ exp((1 - L/C) / λ), the soft maximum over the wrong; 0 without either.
    chosen:
    the trust region's price of a token (see hinge).   -> [p], one loss a group
    """
    G = correct.size(1)
    s = ((logp * mask).sum(1) / mask.sum(1).clamp(min=1)).view(-1, G)                    # [p, G]
    w = torch.softmax(((1 - length / cap) / lam).masked_fill(correct < 1, -torch.inf), 1)
    wrong = (s / tau).masked_fill(correct > 0, -torch.inf)
    k = (correct < 1).sum(1)                                                             # [p]
    mixed = (k > 0) & (k < G)
    w, wrong = w.nan_to_num(), torch.where(mixed[:, None], wrong, torch.zeros_like(wrong))
    J = (w * s).sum(1) - tau * (torch.logsumexp(wrong, 1) - k.clamp(min=1).log())
    price = (chosen * (old_logp - logp) * mask).sum(1).view(-1, G).sum(1)                # [p]
    return price - torch.where(mixed, J, torch.zeros_like(J))


def anchor_of(surrogate, b):
    """The log-probs that a surrogate's clip is around."""
    if surrogate.func is anchored:
        return torch.lerp(b["teach_logp"], b["old_logp"], surrogate.keywords["alpha"])
    return b["behaviour_logp" if surrogate.func is clip_stale else "old_logp"]


SURROGATES = dict(clip=clip, reinforce=reinforce, stale=stale, clip_stale=clip_stale,
                  anchored=anchored,
                  clip_cov=clip_cov, kl_cov=kl_cov, drpo=drpo)

# Which tokens a surrogate treats apart: of the whole minibatch, before its gradient.   -> [N, T]


def covariance(now, adv, mask):
    """(A - mean A) (log π - mean log π) of each token: what lowers the entropy (2505.22617 eq.
    11)."""
    def off(x):
        return x - (x * mask).sum() / mask.sum()
    return off(adv) * off(now)


def nothing(mask):
    """No token."""
    return torch.zeros_like(mask)


def band(now, old_logp, adv, mask, generator, *, ratio: Share = 2e-3, low=0.5, high=5.0, eps=1.0):
    """Clip-Cov's: max(1, ratio n) random tokens with a covariance in (low, high) that PPO does not
    clip."""
    rho, cov = ratio_of(now, old_logp), covariance(now, adv, mask)
    clipped = -adv * rho.clamp(1 - eps, 1 + eps) > -adv * rho
    where = ((cov > low) & (cov < high) & ~clipped
             & (mask > 0)).flatten().nonzero().flatten()                                       # [k]
    n = min(len(where), max(1, int(ratio * mask.sum())))
    picked = where[torch.randperm(len(where), generator=generator)[:n].to(where.device)]
    return torch.zeros_like(mask).flatten().index_fill(0, picked, 1.0).view_as(mask)


def top(now, adv, mask, *, ratio: Share = 2e-3):
    """KL-Cov's: the max(1, ratio n) tokens of the highest covariance."""
    cov = covariance(now, adv, mask).masked_fill(mask < 1, -torch.inf).flatten()
    picked = cov.topk(max(1, int(ratio * mask.sum()))).indices
    return torch.zeros_like(mask).flatten().index_fill(0, picked, 1.0).view_as(mask)


def hinge(now, old_logp, mask, groups, *, beta: Positive = 10.0, delta: Positive = 1e-4):
    """DRPO's trust region: max(β (KL - δ), 0) KL, KL the tokens' mean of log π_old/π; the factor
    without gradient, spread so that the sum over tokens, divided by the groups, is the penalty."""
    n = mask.sum()
    kl = ((old_logp - now) * mask).sum() / n
    return torch.full_like(mask, (beta * (kl - delta)).clamp(min=0).item() * groups / n.item())


CHOOSERS = dict(nothing=nothing, band=band, top=top, hinge=hinge)

# --- penalties: added to the loss of a token, [n, T] ----------------------------------------------


def none(logp):
    """No penalty."""
    return torch.zeros_like(logp)


def k2(logp, ref_logp, *, beta=0.04):
    """β d²/2, d = log π/π_ref: on-policy its gradient is that of KL(π||π_ref)."""
    return beta * 0.5 * (logp - ref_logp) ** 2


def k3(logp, ref_logp, *, beta=0.04):
    """β (exp(-d) - 1 + d), d = log π/π_ref: unbiased, never below 0; its gradient is that of
    KL(π_ref||π)."""
    d = (logp - ref_logp).clamp(-20, 20)
    return beta * (torch.expm1(-d) + d).clamp(max=10)


def k3_straight(logp, ref_logp, *, beta=0.04):
    """k3's value with k2's gradient."""
    square = k2(logp, ref_logp, beta=beta)
    return square - square.detach() + k3(logp, ref_logp, beta=beta).detach()


def by_difficulty(logp, ref_logp, adv, correct, *, beta=1e-3):
    """APO's DADS (2506.21655): k3 where A > 0 times 1 - exp(-e (1 - d)), d = 1 - mean(c); 1 for d 0
    or 1."""
    d = 1 - correct.mean(1, keepdim=True)                                                # [p, 1]
    w = torch.where((d > 0) & (d < 1), 1 - torch.exp(-torch.e * (1 - d)), torch.ones_like(d))
    w = w.expand_as(correct).reshape(-1, 1)                                              # [n, 1]
    return k3(logp, ref_logp, beta=beta) * torch.where(adv > 0, w, torch.ones_like(w))


def flattened(logp, flat_logp, *, beta=0.01, most: Positive = 5.0):
    """RAPO (2510.03865): forward KL to π_ref^φ, w log w - w + 1, w = π_ref^φ/π.   β ours (unknown)

    flat_logp [n, T]: log-probs under the reference at temperature 1/φ, φ = (1 + R) / 2 of the
    response.
    """
    log_w = (flat_logp - logp).clamp(-20, most)
    return beta * (log_w.exp() * (log_w - 1) + 1)


def to_teacher(logp, teach_logp, correct, progress, *, beta=2e-3, beta_start=0.0, wrong_only=False):
    """KDRL (2506.02208): β k2 to the teacher, or only on wrong responses.

    beta_start: anneal from it to beta, linearly over the run (progress, from 0 to 1); 0: β is
    constant.
    """
    rows = (1 - correct).reshape(-1, 1) if wrong_only else 1.0
    beta = beta_start + (beta - beta_start) * progress if beta_start else beta
    return k2(logp, teach_logp, beta=beta) * rows


PENALTIES = dict(none=none, k2=k2, k3=k3, k3_straight=k3_straight, by_difficulty=by_difficulty,
                 flattened=flattened, to_teacher=to_teacher)

# --- weights: the loss of a minibatch is Σ loss · weight over its tokens.   mask -> [N, T] --------


def token_mean(mask):
    """Every token alike (DAPO)."""
    return mask / mask.sum().clamp(min=1)


def sequence_mean(mask):
    """Every response alike, a token 1/L of it (GRPO)."""
    return mask / mask.sum(1, keepdim=True).clamp(min=1) / len(mask)


def constant(mask, cap):
    """Every token alike and by a constant, the longest response allowed (Dr. GRPO)."""
    return mask / (len(mask) * cap)


def sequence_sum(mask):
    """Every response's sum, averaged (RLOO)."""
    return mask / len(mask)


WEIGHTS = dict(token_mean=token_mean, sequence_mean=sequence_mean, constant=constant,
               sequence_sum=sequence_sum)

# --- filters: which groups train.   -> [P] bool ---------------------------------------------------


def every(shaped):
    """All of them."""
    return torch.ones(len(shaped), dtype=torch.bool, device=shaped.device)


def mixed(score):
    """Groups whose rewards differ (DAPO's dynamic sampling), before a shaper's length terms."""
    return score.std(1) > 1e-6


def mixed_shaped(shaped):
    """... after them: DLER's, whose only shaping is truncation."""
    return shaped.std(1) > 1e-6


def steady(shaped, usual, *, ratio: Share = 0.5):
    """RLPR's (2506.18254): groups whose std is at least ratio times the usual one; never none."""
    std = shaped.std(1)
    return (std >= ratio * usual) | (std == std.max())


FILTERS = dict(every=every, mixed=mixed, mixed_shaped=mixed_shaped, steady=steady)
AXES = dict(trim=TRIMS, shaper=SHAPERS, advantage=ADVANTAGES, credit=CREDIT, surrogate=SURROGATES,
            chooser=CHOOSERS, penalty=PENALTIES, weight=WEIGHTS, filter=FILTERS,
            kernels=kernels.MODES)

# --- roll out -------------------------------------------------------------------------------------


def joined(rolls, pad):
    """Rollouts one below the other, padded to the widest -> Rollout."""
    width = max(r.tokens.size(1) for r in rolls)

    def stack(name, fill):
        return torch.cat([F.pad(getattr(r, name), (0, width - r.tokens.size(1)), value=fill)
                          for r in rolls])
    return Rollout(stack("tokens", pad), stack("mask", 0), stack("logp", 0),
                   torch.cat([r.prompt_len for r in rolls]), torch.cat([r.finished for r in rolls]),
                   sum(r.row_steps for r in rolls))


def rows_of(roll, keep):
    """The rows of a rollout where keep [N] is true."""
    return Rollout(*(x[keep] for x in roll[:-1]), roll.row_steps)


@torch.no_grad()
def logprobs(model, tokens, mask, c, temperature=0.0):
    """token_logprobs in micro-batches, without gradient, at the run's temperature and
    precision.   [N, T]"""
    with autocast(c.device, c.dtype):
        return torch.cat([token_logprobs(model, t, m, temperature=temperature or c.temperature)
                          for t, m in zip(tokens.split(c.micro), mask.split(c.micro))])


def graded(score, problems, roll, tok, samples):
    """A reward of every response.   -> [P, G], the texts"""
    texts = [tok.decode(ids) for ids in roll.completions()]
    got = [float(score(problems[i // samples], x, done))
           for i, (x, done) in enumerate(zip(texts, roll.finished.tolist()))]
    return torch.tensor(got, device=roll.tokens.device).view(-1, samples), texts


MARK = "####"                    # an answer follows: see data/tasks.py


@torch.no_grad()
def forced(model, rows, c):
    """Of rows (context ids, ids forced after it): their mean probability, log-prob and entropy.   3
    x [R]

    A row longer than the model's context loses its beginning.
    """
    most = model.config.max_position_embeddings
    rows = [(a[-(most - len(b)):], b) for a, b in rows]
    tokens, mask = collate(rows, max(model.config.pad_token_id, 0), c.device)
    with autocast(c.device, c.dtype):
        made = [token_logprobs(model, t, m, entropy=True)
                for t, m in zip(tokens.split(c.micro), mask.split(c.micro))]
    logp, entropy = (torch.cat(x) for x in zip(*made))                                   # [R, T]
    return [(x * mask).sum(1) / mask.sum(1).clamp(min=1) for x in (logp.exp(), logp, entropy)]


def after_mark(model, roll, texts, truths, tok, c):
    """(mean probability, exp of the mean log-prob) [N] of answers after each response's first ####.

    truths: the ids to force there, or None for the response's own. 0 where nothing can be asked.
    """
    rows, where = [], []
    for i, (ids, text) in enumerate(zip(roll.completions(), texts)):
        k, start = curricula.spelled(ids, tok, text.find(MARK) + len(MARK)), int(roll.prompt_len[i])
        answer = ids[k:] if truths is None else truths[i // c.samples]
        if MARK in text and answer:
            rows.append((roll.tokens[i, :start + k].tolist(), answer))
            where.append(i)
    out = torch.zeros(2, len(texts), device=c.device)
    if rows:
        p, logp, _ = forced(model, rows, c)
        out[:, where] = torch.stack([p, logp.exp()])
    return out


def truth(problem, task, tok):
    """The ids of what follows #### in a good response."""
    return tok.encode(task.demo(problem, "good").partition(MARK)[2])


def facts(wanted, models, roll, texts, problems, task, tok, c):
    """What was asked of the responses beyond their score, {name: [P, G], or [P, 1] of a prompt}.

    models: policy, ref, and slow, the policy's trailing copy (GRPO-CARE).
    """
    mine = [p for p in problems for _ in range(c.samples)]
    said = [tasks.stated(tasks.part(task, p), x) if done else "" for p, x, done in zip(
        mine, texts, roll.finished.tolist())] if wanted & {"stated", "answer"} else []
    number = {x: i for i, x in enumerate(dict.fromkeys(x for x in said if x))}
    ask = [[*tok.prompt(p, c.chat), *tok.encode(MARK)]
           for p in problems] if "base_prob" in wanted else []
    truths = [truth(p, task, tok) for p in problems] if wanted & {"truth_prob", "base_prob"} else []
    make = dict(
        reflections=lambda: [tasks.second_looks(tasks.part(task, p), x)
                             for p, x in zip(mine, texts)],
        stated=lambda: [bool(x) for x in said], answer=lambda: [number.get(x, -1) for x in said],
        objective=lambda: [p.get("task", 0) for p in problems],
        pattern=lambda: [tasks.pattern(p, x, True, tasks.part(task, p))
                         for p, x in zip(mine, texts)],
        truth_prob=lambda: after_mark(models["policy"], roll, texts, truths, tok, c)[0],
        base_prob=lambda: forced(models["ref"], list(zip(ask, truths)), c)[0],
        answer_prob=lambda: after_mark(models["slow"], roll, texts, None, tok, c)[1])
    return {k: torch.as_tensor(make[k](), dtype=torch.float32, device=c.device).view(len(problems),
                                                                                     -1)
            for k in sorted(wanted & set(make))}


def probes(policy, roll, problems, task, tok, c, scores=False):
    """The steps of responses: {step [N, T], probed, acc, conf [N, K]} (SPAE), or with process
    scores [N, K].

    After each step the policy is asked for the answer: acc is the mean probability of the true
    one's tokens, conf exp(-their mean entropy), for an answer of one token what the paper's short
    samples estimate. The last step goes on to the end of the response; a response without steps is
    of step -1.
    """
    mask, ends, texts = roll.mask, [], [tok.decode(ids) for ids in roll.completions()]
    for i, ids in enumerate(roll.completions()):
        found = tasks.step_ends(tasks.part(task, problems[i // c.samples]), texts[i])
        ends.append([curricula.spelled(ids, tok, e) for e in found])
    K = max(1, max(map(len, ends)))
    step, probed = torch.full(mask.shape, -1), torch.zeros(len(ends), K, dtype=torch.bool)
    rows, value = [], torch.zeros(2, len(ends), K, device=c.device)
    truths = [] if scores else [truth(p, task, tok) for p in problems]
    for i, row in enumerate(ends):
        start, problem = int(roll.prompt_len[i]), problems[i // c.samples]
        probed[i, :len(row)] = True
        for k, (a, b) in enumerate(itertools.pairwise([0, *row])):
            step[i, start + a:start + b if k + 1 < len(row) else None] = k
            asked = roll.tokens[i, :start + b].tolist() + tok.encode(MARK)
            rows += [] if scores else [(asked, truths[i // c.samples])]
        if scores and row:
            value[0, i, :len(row)] = torch.tensor(tasks.part(task, problem).process(problem,
                                                                                    texts[i]))
    step, probed = step.to(mask.device), probed.to(mask.device)
    if rows:
        acc, _, entropy = forced(policy, rows, c)
        value[:, probed] = torch.stack([acc, torch.exp(-entropy)])
    return dict(step=step, probed=probed, acc=value[0], conf=value[1], process=value[0])


# --- before training ------------------------------------------------------------------------------


def rollouts(policy, problems, tok, c, max_new, samples, g):
    """Samples for many problems, as many rows at once as a rollout has.   yields (problems,
    Rollout)"""
    size = max(1, c.prompts * c.samples // samples)
    for i in range(0, len(problems), size):
        some = problems[i:i + size]
        with autocast(c.device, c.dtype):
            yield some, generate(policy, [tok.prompt(p, c.chat) for p in some], max_new,
                                 samples=samples,
                                 temperature=c.temperature, generator=g)


def screened(policy, problems, task, tok, c, max_new, g):
    """The problems that the first policy solves at least once in --screen samples; UserError if
    none."""
    kept = []
    for some, roll in rollouts(policy, problems, tok, c, max_new, c.screen, g):
        right = (graded(task.reward, some, roll, tok, c.screen)[0] > 0.5).sum(1).tolist()
        kept += [p for p, keep in zip(some, curricula.solvable(right)) if keep]
    if not kept:
        raise UserError(f"--screen {c.screen}: no prompt is ever solved: easier data, or a better --init")
    return kept


def hinted(policy, problems, task, tok, c, max_new, g):
    """The problems with their sufficient hints after the prompt, in order; --hints samples measure
    a set."""
    out = []
    for p in problems:
        facts, seen = tasks.part(task, p).hints(p)[:-1], {}  # the last step is the answer itself

        def shown(kept):
            return p | dict(hint="".join(facts[i] for i in sorted(kept)))

        def accuracy(kept):
            if kept not in seen:
                some, roll = next(rollouts(policy, [shown(kept)], tok, c, max_new, c.hints, g))
                seen[kept] = graded(task.reward, [p], roll, tok, c.hints)[0].mean().item()
            return seen[kept]
        out.append(shown(curricula.sufficient(len(facts), accuracy, margin=0.5 / c.hints ** 0.5)))
    return out


@torch.no_grad()
def temperature_at(policy, problems, tok, c, max_new, g):
    """AceReason (2506.13284): the temperature at which the entropy of its own samples is
    --at_entropy nats.

    Samples and bisection in turn, three times. UserError if no temperature from 0.05 to 20 has it.
    """
    for _ in range(3):
        _, roll = next(rollouts(policy, problems, tok, c, max_new, c.samples, g))

        def entropy(t):
            with autocast(c.device, c.dtype):
                H = token_logprobs(policy, roll.tokens, roll.mask, temperature=t, entropy=True)[1]
            return ((H * roll.mask).sum() / roll.mask.sum()).item()
        found = curricula.crossing(entropy, c.at_entropy)
        if found is None:
            raise UserError(f"--at_entropy {c.at_entropy}: temperatures from 0.05 to 20 have from "
                            f"{entropy(0.05):.3g} to {entropy(20.0):.3g} nats")
        c = replace(c, temperature=found)
    return found


# --- evaluate -------------------------------------------------------------------------------------


def evaluate(policy, sets, tok, c, max_new):
    """Held-out prompts, always the same and with the same draws: accuracy, pass@k, maj@k, length,
    truncated.

    sets: {split: (task, problems)}. Sampled at the run's temperature; _greedy: the accuracy at
    temperature 0; _length_right, _length_wrong: the mean length of right and of wrong responses, 0
    where there is none. -> {split_key: mean}, [(prompt, text, reference)]
    """
    out, look, G = {}, [], c.eval_samples
    for split, (task, problems) in sets.items():
        scores, greedy, lengths, texts, done = [], [], [], [], []
        g = torch.Generator().manual_seed(c.seed + 1)
        for some, roll in rollouts(policy, problems, tok, c, max_new, G, g):
            cold = replace(c, temperature=0.0, prompts=len(some))
            _, best = next(rollouts(policy, some, tok, cold, max_new, 1, g))
            score, said = graded(task.reward, some, roll, tok, G)                        # [p, G]
            scores.append(score)
            texts += said
            lengths.append(roll.mask.sum(1).view(-1, G))
            greedy.append(graded(task.reward, some, best, tok, 1)[0])
            done.append(roll.finished)
        score, length = torch.cat(scores), torch.cat(lengths)                            # [P, G]
        told = dict(greedy=torch.cat(greedy).mean(), length=length.mean(),
                    truncated=1 - torch.cat(done).float().mean())
        told[task.metric] = score.mean()
        if task.metric == "accuracy":
            ended = torch.cat(done).tolist()
            told |= curricula.of_samples(score > 0.5, [
                tasks.stated(tasks.part(task, problems[i // G]), x) if ended[i] else ""
                for i, x in enumerate(texts)])
            kinds = dict(right=score > 0.5, wrong=score < 0.5)
            told |= {f"length_{k}": length[x].mean() if x.any() else 0.0 for k, x in kinds.items()}
        habits = [tasks.part(task, problems[i // G]).habits(x) for i, x in enumerate(texts)
                  if hasattr(tasks.part(task, problems[i // G]), "habits")]
        told |= {k: statistics.fmean(x[k] for x in habits) for k in (habits[0] if habits else ())}
        out |= {f"{split}_{k}": float(x) for k, x in told.items()}
        look += [(p["prompt"], text, task.demo(p)) for p, text in zip(problems[:2], texts[::G])]
    return out, look


# --- train ----------------------------------------------------------------------------------------


def backward(policy, batch, groups, c, f, g, progress=0.0):
    """Gradients of one minibatch of whole groups, over its micro-batches -> what happened, a dict
    of floats.

    batch: [N, T] tensors, and what belongs to a group as [P, G]. The weights are those of the whole
    minibatch, so --micro changes nothing. progress: how much of the run is over, for what is
    annealed.
    """
    G = batch["length"].size(1)
    rows = (groups[:, None] * G + torch.arange(G, device=groups.device)).flatten()       # [n]
    whole = {k: x[groups] if x.size(0) * G == len(batch["mask"]) else x[rows]
             for k, x in batch.items()}
    width, aligned = int(whole["ends"].max()), whole["mask"].shape
    whole = {k: x[:, :width] if x.shape == aligned else x for k, x in whole.items()}
    extra = dict(cap=c.max_new, generator=g, groups=len(groups), progress=progress)
    if "now" in needs(f.chooser):
        whole["now"] = logprobs(policy, whole["tokens"], whole["mask"], c)
    whole["chosen"] = f.chooser(**{k: (whole | extra)[k] for k in needs(f.chooser)})     # [n, T]
    whole["weight"] = f.weight(**{k: (whole | extra)[k] for k in needs(f.weight)})       # [n, T]
    if "lam" in whole:                                                             # RECAP's, [p, 1]
        whole["weight"] = whole["weight"] * whole["lam"].repeat_interleave(G, 0)
    told = dict(loss=0.0, clipped=0.0, entropy=0.0, worst=0.0, off=0.0)
    n, low = whole["mask"].sum().clamp(min=1), f.surrogate.keywords.get("eps", 0.0)
    high = f.surrogate.keywords.get("eps_high", 0.0) or low
    for part in torch.arange(len(groups), device=groups.device).split(max(1, c.micro // G)):
        pick = (part[:, None] * G + torch.arange(G, device=part.device)).flatten()
        b = {k: x[part] if x.size(0) == len(groups) and G > 1 else x[pick]
             for k, x in whole.items()}
        with autocast(c.device, c.dtype):
            logp, entropy = token_logprobs(policy, b["tokens"], b["mask"],
                                           temperature=c.temperature,
                                           entropy=True)
        have = b | extra | dict(logp=logp)
        loss = f.surrogate(**{k: have[k] for k in needs(f.surrogate)})               # [n, T] or [p]
        more = f.penalty(**{k: have[k] for k in needs(f.penalty)})                       # [n, T]
        more = more - c.entropy * entropy if c.entropy else more
        loss = (loss.sum() / len(groups) if loss.dim() == 1 else (loss * b["weight"]).sum()) + (
            more * b["weight"]).sum()
        loss.backward()
        off = (ratio_of(logp.detach(), b["old_logp"]) - 1).abs() * b["mask"]             # [n, T]
        ratio = ratio_of(logp.detach(), anchor_of(f.surrogate, b))
        told["loss"] += loss.item()
        told["worst"] = max(told["worst"], off.max().item())
        clipped = (ratio < 1 - low) | (ratio > 1 + high) if low else torch.zeros_like(off)
        for key, x in dict(off=off, clipped=clipped, entropy=entropy.detach()).items():
            told[key] += ((x * b["mask"]).sum() / n).item()
    return told


def readers(c, f):
    """{field: (whether this run reads it, what does)} of the fields that not every run reads."""
    asked = {name for axis in AXES if axis != "kernels" for name in needs(getattr(f, axis))}
    fields = dict(teacher=("teach_logp" in asked, "methods that learn from one: kdrl, rlad, opd"),
                  noise_level=(c.noise, "--noise above 0"),
                  rounds=(c.filter != "every", "a --filter"),
                  chooser=("chosen" in asked, "--surrogate clip_cov, kl_cov or drpo"))
    return fields


def check(c, f, task):
    """The names of everything that the functions ask for; UserError where parts do not fit
    together, and for all else that can be known before anything is made: files, folders, the user's
    reward."""
    asked = {name for axis in AXES if axis != "kernels" for name in needs(getattr(f, axis))}
    asked |= {name for name, want in dict(stated=c.noise, objective=c.reweigh).items() if want}
    parts = getattr(task, "parts", [task])
    wanted = dict(paraphrase=c.twins, hints=c.hints, process="process" in asked, checks=c.seek)
    lacks = [name for name, want in wanted.items() if want
             and not all(hasattr(x, name) for x in parts)]
    answers = asked & {"truth_prob", "acc", "answer", "answer_prob"} or c.noise
    compares = c.advantage in ("group", "centred", "rloo", "whitened") or c.filter != "every"
    for wrong, words in (
            ("teach_logp" in asked and not c.teacher,
             "it learns from a teacher: give --teacher CHECKPOINT"),
            (c.samples < 2 and compares,
             f"--samples {c.samples}: a group needs two responses to compare"),
            (c.prompts % max(1, c.minibatches),
             f"--prompts {c.prompts} does not part into --minibatches {c.minibatches} of whole groups"),
            (c.twins and (c.prompts % 2 or c.filter != "every"),
             "--twins: even --prompts, --filter every"),
            (c.reweigh and c.surrogate == "drpo",
             "--reweigh weighs tokens, and --surrogate drpo has groups"),
            (lacks,
             f"this method needs a task with {lacks}, see data/chains.py; {task.name} has none"),
            (answers and task.metric != "accuracy",
             f"this method asks for answers: {task.name} has none")):
        if wrong:
            raise UserError(words)
    tasks.scorer(c.reward, task)
    for name in filter(None, c.watch.split(",")):
        tasks.check_data(name, is_text=False)
    most = sft.find(c.init, c.config, make=False)
    if c.max_new >= most:
        raise UserError(f"--max_new {c.max_new} does not fit the {most} tokens of {c.init}")
    if "teach_logp" in asked:
        sft.find(c.teacher, c.config, make=False, option="--teacher")
    return asked


def train(c, f):
    """One run: load, roll out, score, update, tell. -> the last evaluation and the SFT model's
    (sft_…)."""
    tasks.check_data(c.data, is_text=False)
    task = tasks.task(c.data)
    asked = check(c, f, task)
    init = sft.find(c.init, c.config, seed=c.seed,
                    device=c.device)                           # made before this run's clock starts
    teacher = sft.find(c.teacher, c.config, device=c.device) if "teach_logp" in asked else ""
    kernels.use(c.kernels)
    with Run(c, f, "grpo", CURVES) as run:
        ref, tok = load(init, c.device)
        if not isinstance(ref, Transformer):
            raise UserError(f"--init {init}: need a language model, found a {type(ref).__name__}")
        ref.requires_grad_(False)
        teach, other = load(teacher, c.device) if "teach_logp" in asked else (None, tok)
        if other.tokens != tok.tokens or not isinstance(teach or ref, Transformer):
            raise UserError(f"--teacher {teacher}: need a language model with the tokenizer of --init {init}")
        policy = load(run.last, c.device)[0] if run.last else copy.deepcopy(ref).requires_grad_()
        score_of, G, pad = tasks.scorer(c.reward, task), c.samples, max(policy.config.pad_token_id,
                                                                        0)
        verified = c.reward == "task" or task.metric != "accuracy"  # the score says what is correct
        problems = task.problems("train", c.pool, 1000 + c.seed)
        watched = {f"{name}_": tasks.task(name) for name in c.watch.split(",") if name}
        sets = {f"{tag}{split}": (one, one.problems(split, c.eval_prompts, c.seed))
                for tag, one in ({"": task} | watched).items() for split in ("val", "ood")
                if split in one.splits}
        max_new = tasks.room(c, tok, [p for s in (problems, *(x for _, x in sets.values()))
                                      for p in s], task,
                             policy.config.max_position_embeddings)
        opt, g = optimiser(policy, lr=c.lr), torch.Generator().manual_seed(c.seed)
        first = torch.Generator().manual_seed(c.seed + 2)             # what happens before training
        if run.state:
            c, problems = replace(c, temperature=run.state["temperature"]), run.state["problems"]
        else:
            found = temperature_at(ref, problems, tok, c, max_new,
                                   first) if c.at_entropy else c.temperature
            c = replace(c, temperature=found)
            problems = screened(ref, problems, task, tok, c, max_new,
                                first) if c.screen else problems
            problems = hinted(ref, problems, task, tok, c, max_new, first) if c.hints else problems
        best, cursor, past, usual = [float("inf")] * len(problems), 0, [], []    # HAPO's, the data's place …
        losses = [[] for _ in getattr(task, "parts", [task])]
        run.say(f"{run.folder}: {sum(p.numel() for p in policy.parameters()) / 1e6:.2f} M parameters, "
                f"{len(problems)} prompts, {c.steps} steps of {c.prompts} x {G} responses, "
                f"{c.device} {c.dtype}" + f", temperature {c.temperature:.3f}" * bool(c.at_entropy))
        slow = copy.deepcopy(ref) if "answer_prob" in asked else ref              # GRPO-CARE's copy
        models = dict(policy=policy, ref=ref, slow=slow)
        if run.state:
            opt.load_state_dict(run.state["opt"])
            g.set_state(run.state["rng"])
            best, cursor, before, past, usual, losses = (
                run.state[k] for k in ("best", "cursor", "before", "past", "usual", "losses"))
            slow.load_state_dict(run.state["slow"] or ref.state_dict())
        else:
            before, look = evaluate(policy, sets, tok, c, max_new)
            run.log(0, **before, show=True)
        scores, actor = before, copy.deepcopy(policy).requires_grad_(False) if c.lag else policy
        train_policy = torch.compile(policy) if c.compile else policy

        for step in run.steps(c.steps):
            # 1. roll out: groups until enough of them pass the filter
            # ------------------------------------
            clock, kept, seen = time.perf_counter(), [], []
            if c.lag:
                past = [*past, {k: v.cpu().clone() for k, v in policy.state_dict().items()}][-c.lag
                                                                                             - 1:]
                actor.load_state_dict(past[0])
            for _ in range(c.rounds):
                n = c.prompts // 2 if c.twins else c.prompts
                where = batch_indices(len(problems), n, cursor, c.seed).tolist()
                cursor, picked = cursor + 1, [problems[i] for i in where]
                if c.twins:
                    rng = random.Random(f"{c.seed}/{cursor}")
                    picked += [tasks.part(task, p).paraphrase(p, rng) for p in picked]
                    where = where + where
                with autocast(c.device, c.dtype):
                    roll = generate(actor, [tok.prompt(p, c.chat) for p in picked], max_new,
                                    samples=G,
                                    temperature=c.temperature, generator=g)
                score, texts = graded(score_of, picked, roll, tok, G)                    # [P, G]
                right = score if verified else graded(task.reward, picked, roll, tok, G)[0]
                group = dict(score=score, correct=(right > 0.5).to(score),
                             length=roll.mask.sum(1).view(score.shape),
                             truncated=~roll.finished.view(score.shape),
                             best=torch.tensor([[best[i]] for i in where]).to(score),
                             where=torch.tensor(where, device=score.device)[:, None])
                group |= facts(asked, models, roll, texts, picked, task, tok, c)
                if c.noise:
                    group["score"] = flipped(score, group["stated"], g, c.noise, c.noise_level)
                have = group | dict(cap=max_new, usual=usual[-1] if len(usual) > 9 else 0.0)
                have["trained"] = group["trained"] = f.trim(**{k: have[k] for k in needs(f.trim)})
                group["shaped"] = have["shaped"] = f.shaper(**{k: have[k] for k in needs(f.shaper)})
                keep = f.filter(**{k: have[k] for k in needs(f.filter)})                 # [P]
                seen.append(group)
                kept.append((rows_of(roll, keep.repeat_interleave(G)),
                             {k: x[keep] for k, x in group.items()},
                             list(itertools.compress(picked, keep.tolist()))))
                if sum(len(x["score"]) for _, x, _ in kept) >= c.prompts:
                    break
            passed = sum(len(x["score"]) for _, x, _ in kept)
            if not passed:  # flat groups: only a penalty can teach
                kept = [(roll, group, picked)]
            roll = rows_of(joined([x for x, *_ in kept], pad), slice(c.prompts * G))
            have = {k: torch.cat([x[k] for _, x, _ in kept])[:c.prompts]
                    for k in group}                                                    # [P, G] each
            used = [p for *_, some in kept for p in some][:c.prompts]
            mask = roll.mask * (roll.mask.cumsum(1) <= have["trained"].view(-1, 1))      # [N, T]
            t_gen = time.perf_counter() - clock
            # 2. score
            # ------------------------------------------------------------------------------------
            clock = time.perf_counter()
            compute = dict(
                old_logp=lambda: logprobs(policy, roll.tokens, mask, c) if c.lag else roll.logp,
                ref_logp=lambda: logprobs(ref, roll.tokens, mask,
                                          c), base_logp=lambda: have["ref_logp"],
                teach_logp=lambda: logprobs(teach, roll.tokens, mask,
                                            c), behaviour_logp=lambda: roll.logp,
                flat_logp=lambda: torch.where(have["correct"].view(-1, 1) > 0, have["ref_logp"],
                                              logprobs(ref, roll.tokens, mask, c,
                                                       2 * c.temperature)))
            have |= dict(mask=mask, cap=max_new)
            for name in ["old_logp", "ref_logp",
                         *sorted(asked & set(compute) - {"old_logp", "ref_logp"})]:
                have[name] = compute[name]()
            if "step" in asked:
                have |= probes(policy, roll, used, task, tok, c, scores="process" in asked)
            kl = ((have["old_logp"] - have["ref_logp"]) * mask).sum(1)                   # [N]
            have["shaped"] = have["shaped"] - c.kl_reward * kl.view(-1, G)               # [P, G]
            have["adv"] = f.advantage(**{k: have[k] for k in needs(f.advantage)})        # [N, T]
            have["adv"] = f.credit(**{k: have[k] for k in needs(f.credit)}) * (passed > 0)
            lam = curricula.reweighted(losses, temperature=c.reweigh) if c.reweigh else []
            if c.reweigh:
                each = have["objective"].long()                                          # [P, 1]
                share = torch.bincount(each.flatten(), minlength=len(lam)) / len(each) * len(lam)
                have["lam"] = (torch.tensor(lam).to(mask) / share.clamp(min=1e-8))[each]
            batch = {k: x for k, x in have.items() if torch.is_tensor(x)} | dict(
                tokens=roll.tokens, ends=(roll.prompt_len + roll.mask.sum(1).long())[:, None])
            made = {k: torch.cat([x[k] for x in seen]) for k in group}           # before the filter
            for i, lengths, right in zip(made["where"].flatten().tolist(), made["length"],
                                         made["correct"]):
                best[i] = min([best[i], *lengths[right > 0].tolist()])              # HAPO's records
            spread = made["shaped"].std(1).mean().item() if G > 1 else 0.0
            usual = [*usual, 0.99 * usual[-1] + 0.01 * spread if len(usual) > 5
                     else spread][-12:]                                                     # RLPR's
            t_score = time.perf_counter() - clock
            # 3. update
            # -----------------------------------------------------------------------------------
            clock, told, norm = time.perf_counter(), [], 0.0
            set_lr(opt, c.lr * min(1.0, (step + 1) / max(1, c.warmup)))
            size = c.prompts // c.minibatches
            for groups in torch.randperm(len(have["score"]),
                                         generator=g).to(mask.device).split(size):
                told.append(backward(train_policy, batch, groups, replace(c, max_new=max_new), f, g,
                                     step / max(1, c.steps - 1)))
                if len(told) == 1 and not c.lag:
                    check_first_ratio(told[0], c.dtype)
                norm = clip_grad_norm_(policy.parameters(), 1.0)
                opt.step()
                opt.zero_grad()
            if "answer_prob" in asked and (step + 1) % 10 == 0:
                with torch.no_grad():  # in a short run it stays near the reference
                    for a, b in zip(slow.parameters(), policy.parameters()):
                        a.lerp_(b, 0.005)
            # 4. tell
            # -------------------------------------------------------------------------------------
            flat = made["shaped"].std(1, correction=0) < 1e-6
            row = dict(correct=made["correct"].mean(), reward=made["shaped"].mean(),
                       flat=flat.float().mean(),
                       length=made["length"].mean(), truncated=made["truncated"].float().mean(),
                       kl=kl.mean(),
                       entropy=told[0]["entropy"], norm=norm, groups=min(passed, c.prompts),
                       generated=made["length"].sum())
            row |= {k: sum(t[k] for t in told) / len(told) for k in ("loss", "clipped")}
            row |= {f"lam_{i}": x for i, x in enumerate(lam)}
            for i, history in enumerate(losses if c.reweigh else ()):
                mine = made["score"][made["objective"].flatten() == i]
                history += [1 - mine.mean().item()] if len(mine) else []
            run.log(step + 1, **row, t_gen=t_gen, t_score=t_score,
                    t_update=time.perf_counter() - clock)
            if (step + 1) % c.eval_every == 0 or step + 1 == c.steps:
                run.check(step + 1, policy)
                scores, look = evaluate(policy, sets, tok, c, max_new)
                run.log(step + 1, **scores, show=True)
            if (step + 1) % c.save_every == 0 or step + 1 in (c.steps, c.stop):
                run.save(step + 1, lambda folder: save(policy, tok, folder), opt=opt.state_dict(),
                         rng=g.get_state(), best=best, cursor=cursor, before=before, past=past,
                         usual=usual,
                         losses=losses, slow=slow.state_dict() if "answer_prob" in asked else None,
                         temperature=c.temperature, problems=problems)
        if c.stop and c.stop < c.steps:
            return scores
        if run.state and run.start >= c.steps:                   # resumed after its last step
            scores, look = evaluate(policy, sets, tok, c, max_new)
        report(run, before, scores, look)
        rows = [row for row in read_log(run.folder) if "entropy" in row]
        mean = {f"train_{k}": statistics.fmean(row[k] for row in rows[-10:])
                for k in ("correct", "entropy", "length", "flat", "kl", "generated") if rows}
        sought = seek(policy, task, tok, c, max_new, run) if c.seek else {}
        return run.finish(**scores, **mean, **sought, **{f"sft_{k}": v for k, v in before.items()})


# --- LatentSeek -----------------------------------------------------------------------------------


def seek(policy, task, tok, c, max_new, run, share=0.2, rounds=10, lr=0.03, enough=-0.2):
    """LatentSeek (2505.13308) on held-out problems: REINFORCE on first hidden states, the weights
    untouched.

    z, the states of the first share of the greedy answer's tokens, are the parameters; each round
    writes argmax(head z), goes on greedily and takes a step on -R Σ log softmax(head z): R <= 0, so
    what failed gets less likely. It stops above `enough`. Rewards: the task's own checks, without
    the answer; the verifier less 1 (oracle); steps of the same length in random directions are the
    control. -> {"seek_HOW": accuracy after, "seek_start": accuracy before}
    """
    def answer(p, start):
        if tok.eos in start:
            return (ids := start[:start.index(tok.eos)]), tok.decode(ids), True
        roll = generate(policy, [tok.prompt(p, c.chat) + start], max_new - len(start),
                        temperature=0.0)
        ids = [*start, *roll.completions()[0]]
        return ids, tok.decode(ids), roll.finished.item()
    problems = task.problems("val", c.seek, c.seed)
    out = dict(seek_start=0.0, seek_self=0.0, seek_oracle=0.0, seek_random=0.0)
    for p in problems:
        ids, text, done = answer(p, [])
        out["seek_start"] += task.reward(p, text, done) / len(problems)
        m, prompt = max(1, int(share * len(ids))), tok.prompt(p, c.chat)
        with torch.no_grad():
            states = policy(torch.tensor([[*prompt, *ids]], device=c.device))[0,
                                                                              len(prompt) - 1:][:m]
        for how in ("self", "oracle", "random"):
            z, said, g = states.clone().requires_grad_(), (text,
                                                           done), torch.Generator().manual_seed(c.seed)
            opt = torch.optim.Adam([z], lr=lr)
            for _ in range(rounds):
                checks = tasks.part(task, p).checks(p,
                                                    said[0]) | dict(ended=said[1])    # - what fails
                R = (task.reward(p, *said) if how == "oracle"
                     else statistics.fmean(checks.values())) - 1
                if R > enough + 1e-6:  # 4 / 5 - 1 is a little more than -.2
                    break
                logp = torch.log_softmax(policy.logits(z), -1)                           # [m, V]
                y = logp.argmax(-1)
                z.grad = torch.randn(z.shape, generator=g).to(z) if how == "random" else (
                    torch.autograd.grad(-R * logp.gather(1, y[:, None]).sum(), z)[0])
                opt.step()
                said = answer(p, policy.logits(z.detach()).argmax(-1).tolist())[1:]
            out[f"seek_{how}"] += task.reward(p, *said) / len(problems)
    run.say(f"\n  LatentSeek on {len(problems)} held-out prompts, greedy: "
            + "  ".join(f"{k[5:]} {x:.3f}" for k, x in out.items()))
    return out


# --- main -----------------------------------------------------------------------------------------


def main(argv=None):
    """python grpo.py …: see the docstring above, or --help."""
    return launch("grpo", Config, PRESETS, AXES, __doc__, train, argv, readers)


if __name__ == "__main__":
    cli(main)
