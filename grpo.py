"""
grpo.py - group-relative policy optimisation with verifiable rewards: sample a group, compare, reinforce.

    python grpo.py                                 # a tiny model learns to reason by trial and error: minutes
    python grpo.py --config tiny                   # the same in seconds: shows that everything turns
    python grpo.py --config dapo --seed 1
    python grpo.py --init Qwen2.5-0.5B --data gsm8k.jsonl --config dr_grpo
    python grpo.py --reward mine.py:score          # a reward of your own: score(problem, text, finished)

Map      1 config   2 shapers   3 advantages   4 credit   5 surrogates   6 penalties   7 weights   8 filters
         9 roll out   10 evaluate   11 train
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
easy           2505.18086     GRPO-λ: a length penalty in the easiest groups only
hapo           2505.11225     beat the shortest correct response that the prompt has ever had
arlcp          2602.12113     reflection and length penalised, by how much a response reflects
drpo           2510.04474     correct responses by length, wrong ones by a soft maximum: no shared baseline
clip_cov       2505.22617     no gradient from a few tokens of high covariance of log-prob and advantage
kl_cov         2505.22617     ... a KL penalty on those of the highest
ace            2602.21420     wrong responses that became likelier pay more
apo            2506.21655     wrong and too long pays more; KL is loosened on hard prompts
rapo           2510.03865     forward KL to a reference that is flattened where the answer was wrong
rlvr           2411.15124     Tülu 3: 10 if verified, -10 without EOS, KL in the reward
aipo           2505.24034     stale rollouts: importance weights with a cap and no clip
rlad           2602.22495     the teacher in the trust region: a mixed anchor
kdrl           2506.02208     reverse KL to a teacher beside the reward
opd            2602.12125     on-policy distillation: the teacher's log-ratio as a token reward
exopd          2602.12125     ... extrapolated past the teacher
Watch    correct (of training samples, before shaping) should rise. flat is the share of groups without a
         signal: near 1 the prompts are too easy or too hard. Entropy that drops to 0 early ends exploration;
         clipped says how many ratios left the trust region. length beside guessing: shorter is worthless
         if the model stops reasoning. kl is k1 to the start, nats per response.
"""
import copy
import importlib.util
import re
import time
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.nn.utils import clip_grad_norm_

import kernels
import sft
from data import tasks
from data.run import Run, UserError, batch_indices, check_first_ratio, cli, launch, needs
from model import Rollout, Transformer, autocast, generate, load, save, token_logprobs
from optim import optimiser, set_lr

# --- config -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Config:
    """What every run has; what belongs to a shaper, an advantage or a loss is an argument of its function."""
    config: str = ""             # presets and TOML files, left to right
    data: str = "chain"          # a task, or a JSONL of prompts and answers
    init: str = "base:chain"     # the SFT model: where the policy starts, and the reference
    teacher: str = ""            # a better model with the same tokenizer, for the methods that learn from one
    chat: bool = False           # wrap prompts in the checkpoint's chat template
    reward: str = "task"         # the task's own, or PATH.py:FUNCTION (problem, text, finished) -> float
    shaper: str = "plain"        # which row of SHAPERS
    advantage: str = "group"     # which row of ADVANTAGES
    credit: str = "same"         # which row of CREDIT
    surrogate: str = "clip"      # which row of SURROGATES
    chooser: str = "nothing"     # which row of CHOOSERS
    penalty: str = "none"        # which row of PENALTIES
    weight: str = "sequence_mean"  # which row of WEIGHTS
    filter: str = "every"        # which row of FILTERS
    steps: int = 60              # rollout-and-update iterations
    prompts: int = 16            # groups per iteration
    samples: int = 8             # responses per group
    minibatches: int = 4         # optimizer steps per rollout, of whole groups
    micro: int = 64              # responses per forward pass, at least a group: lower it if memory runs out
    rounds: int = 4              # how often a filter may ask for more groups
    pool: int = 400              # training prompts, visited again and again
    lr: float = 1e-4             # AdamW's, constant after the warm-up
    warmup: int = 0              # iterations of linear warm-up
    entropy: float = 0.0         # coefficient of an entropy bonus
    kl_reward: float = 0.0       # KL in the reward: β k1 to the reference, nats per response
    lag: int = 0                 # rollouts come from the policy of so many iterations ago
    temperature: float = 1.0     # of sampling and, the same, of every log-prob
    max_new: int = 0             # longest response in tokens (0: the task says)
    eval_every: int = 20         # iterations between evaluations on held-out prompts
    eval_prompts: int = 256      # how many of each held-out split
    save_every: int = 20         # iterations between checkpoints
    keep: int = 2                # checkpoints to keep
    stop: int = 0                # pause after this iteration (0: no); --resume goes on
    out: str = ""                # run folder (default out/grpo/<presets>)
    seed: int = 0                # of SFT, prompts and sampling
    device: str = "auto"         # cpu or cuda
    dtype: str = "auto"          # of the matmuls: float32, or bfloat16 under autocast (default on CUDA)
    compile: bool = False        # torch.compile the policy's training pass
    kernels: str = "auto"        # auto, or torch: the plain definition of every kernel
    resume: bool = False         # go on from the newest checkpoint of the run folder


PRESETS = dict(                  # the papers' settings, but for lr, sizes and what is marked ours
    grpo=dict(),
    dr_grpo=dict(advantage="centred", weight="constant"),
    rloo=dict(advantage="rloo", surrogate="reinforce", weight="sequence_sum", minibatches=1, kl_reward=0.05),
    reinforce_pp=dict(advantage="returns", weight="token_mean"),
    rpp_baseline=dict(advantage="whitened", weight="token_mean"),
    dapo=dict(shaper="overlong", filter="mixed", eps_high=0.28, weight="token_mean"),
    linear=dict(shaper="linear"),
    dler=dict(shaper="truncate", filter="mixed_shaped", advantage="whitened", eps_high=0.28,
              weight="token_mean", penalty="k3", beta=5e-4),
    easy=dict(shaper="easiest"),
    hapo=dict(shaper="history", pool=60),
    arlcp=dict(shaper="reflective", advantage="rloo", weight="token_mean", kl_reward=1e-3),
    drpo=dict(surrogate="drpo", chooser="hinge"),
    clip_cov=dict(surrogate="clip_cov", chooser="band", filter="mixed", weight="token_mean"),
    kl_cov=dict(surrogate="kl_cov", chooser="top", filter="mixed", weight="token_mean"),
    ace=dict(credit="overconfident", weight="token_mean"),
    apo=dict(credit="too_long", penalty="by_difficulty"),
    rapo=dict(penalty="flattened", entropy=1e-3),
    rlvr=dict(shaper="verified", advantage="rloo", weight="token_mean", kl_reward=0.05),
    aipo=dict(advantage="centred", surrogate="stale", weight="token_mean", lag=4),
    rlad=dict(surrogate="anchored", weight="token_mean"),
    kdrl=dict(penalty="to_teacher", weight="token_mean"),
    opd=dict(advantage="distilled", weight="token_mean", samples=1, prompts=128),
    exopd=dict(advantage="distilled", weight="token_mean", samples=1, prompts=128, lam=1.25),
    tiny=dict(steps=4, prompts=4, samples=4, minibatches=2, eval_every=2, eval_prompts=16, save_every=2,
              max_new=24, pool=32),
)
CURVES = {"correct": ["correct", "val_accuracy", "val_greedy", "ood_accuracy", "val_rouge_l", "val_gold"],
          "length, tokens": ["length"], "entropy, nats": ["entropy"], "flat groups": ["flat"],
          "KL to the start, nats per response": ["kl"], "clipped": ["clipped"]}

# --- shapers: what a response is worth to training, [P, G] each; metrics read `correct`, never this --------


def plain(score):
    """The reward as it is."""
    return score


def overlong(score, length, cap, *, buffer=16):
    """DAPO (2503.14476 eq. 13): ±1, and minus up to 1 within the last `buffer` tokens before the cap."""
    return 2 * score - 1 + ((cap - buffer - length) / buffer).clamp(-1, 0)


def truncate(score, length, *, target=22):
    """DLER (2510.15110): nothing for a response longer than the target."""
    return score * (length <= target)


def linear_length(score, length, cap, *, price=0.1, correct_only=False):
    """R - a L/C for every response, or for what earned something (correct_only): a control, no paper."""
    return score - price * length / cap * (score if correct_only else 1)


def among_correct(x, correct, unbiased=False):
    """Mean and std of x over each group's correct responses, [P, 1] each; std 1 where fewer than two."""
    n = correct.sum(1, keepdim=True)                                                     # [P, 1]
    mean = (x * correct).sum(1, keepdim=True) / n.clamp(min=1)
    var = ((x - mean) ** 2 * correct).sum(1, keepdim=True) / (n - int(unbiased)).clamp(min=1)
    return mean, torch.where(n > 1, var.sqrt(), torch.ones_like(var))


def easiest(correct, length, *, share=0.2, alpha=0.6):
    """GRPO-λ (2505.18086): in the ⌈λP⌉ groups with most correct responses, c (1 - α σ((L - μ) / s)).

    μ, s: mean and population std of the correct responses' lengths. Ties: the earlier prompt first.
    """
    mean, std = among_correct(length, correct)
    penalised = correct * (1 - alpha * torch.sigmoid((length - mean) / std.clamp(min=1e-4)))         # [P, G]
    k = min(len(correct), -int(-share * len(correct) // 1))                              # the ceiling
    picked = correct.mean(1).argsort(descending=True, stable=True)[:k]                   # [k]
    chosen = torch.zeros(len(correct), 1, dtype=torch.bool, device=correct.device).index_fill(0, picked, True)
    return torch.where(chosen, penalised, correct)


def history(correct, length, best, *, weight=1.0, floor=-0.7, wrong_penalty=True):
    """HAPO (2505.11225): c + w f, f = cos(π/2 L/h) up to twice the prompt's record h, else -1; 0 without one.

    best [P, 1]: h, inf for none. Correct: max(f, floor); wrong: min(f, 0), or 0 (wrong_penalty False).
    """
    f = torch.where(length < 2 * best, torch.cos(torch.pi / 2 * length / best), -torch.ones_like(length))
    wrong = f.clamp(max=0) if wrong_penalty else torch.zeros_like(f)
    f = torch.where(correct > 0, f.clamp(min=floor), wrong)
    return correct + weight * torch.where(torch.isfinite(best), f, torch.zeros_like(f))


def reflective(correct, length, reflections, *, low=1, high=3):
    """ARLCP (2602.12113): c (1 - λ1 σ(z_K) - λ2 σ(z_L)), λ1 = .05, .10, .15 by the reflections K, λ1+λ2 = .2.

    z: against the group's correct responses. The paper's steps are 40 and 80 of its much longer responses.
    """
    def z(x):
        mean, std = among_correct(x, correct, unbiased=True)
        return torch.sigmoid((x - mean) / (std + 1e-6))
    first = 0.05 + 0.05 * (reflections > low) + 0.05 * (reflections > high)              # [P, G]
    return correct * (1 - first * z(reflections) - (0.2 - first) * z(length))


def verified(correct, truncated, *, scale=10.0):
    """Tülu 3's RLVR (2411.15124): scale if correct, 0 if not, -scale without EOS."""
    return torch.where(truncated, -scale * torch.ones_like(correct), scale * correct)


def consistent(score, answer_prob, *, bonus=0.5, margin=0.01, cap=0.95):
    """GRPO-CARE (2506.16141): a bonus for what makes the answer as likely as the group's good ones do.

    answer_prob [P, G]: exp of the answer tokens' mean log-prob under a slow copy of the policy.
    """
    q = answer_prob.clamp(max=cap)
    good = ((score > 0.1) & (score >= score.mean(1, keepdim=True))).to(q)                # [P, G]
    usual = (q * good).sum(1, keepdim=True) / good.sum(1, keepdim=True).clamp(min=1)     # [P, 1]
    return score + bonus * score * good * (q >= usual - margin)


# `consistent` waits for who computes its answer_prob
SHAPERS = dict(plain=plain, overlong=overlong, truncate=truncate, linear=linear_length, easiest=easiest,
               history=history, reflective=reflective, verified=verified)

# --- advantages: rewards [P, G] -> [N, T], 0 off the mask ----------------------------------------------


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
    """x less its group's mean, exactly 0 in a group of equals: 0.7 summed eight times is not 5.6.   [P, G]"""
    x = x - x[:, :1]
    return x - x.mean(1, keepdim=True)


def group_norm(shaped, mask, *, eps=1e-6):
    """GRPO (2402.03300 §4.1.2):  A = (R - mean) / (std + eps), the group's; std unbiased."""
    A = deviations(shaped)                                                               # [P, G]
    return tokens_of(A / (A.std(1, keepdim=True) + eps), mask)


def centred(shaped, mask):
    """Dr. GRPO (2503.20783):  A = R - mean."""
    return tokens_of(deviations(shaped), mask)


def leave_one_out(shaped, mask):
    """RLOO (2402.14740):  A = R - mean of the others = (R - mean) G / (G - 1)."""
    G = shaped.size(1)
    return tokens_of(deviations(shaped) * G / (G - 1), mask)


def returns(shaped, mask, old_logp, ref_logp, *, beta=0.0):
    """REINFORCE++ (2501.03262): R at the last token less β k1 of each from t on, whitened over the batch."""
    k1 = (old_logp - ref_logp) * mask                                                    # [N, T]
    ahead = k1.flip(1).cumsum(1).flip(1)
    return whiten(tokens_of(shaped, mask) - beta * ahead * mask, mask)


def whitened(shaped, mask):
    """REINFORCE++-baseline (2501.03262), DLER (2510.15110): less the group's mean, whitened over the batch.

    Over tokens, so that long responses count for more, and a group without a signal is not quite at 0.
    """
    return whiten(centred(shaped, mask), mask)


def distilled(old_logp, teach_logp, base_logp, mask, *, lam=1.0, most=10.0):
    """G-OPD (2602.12125): the token reward λ log π_T/π_base with a KL of weight 1; λ 1: log π_T/π_old."""
    return (lam * (teach_logp - base_logp).clamp(-most, most) - (old_logp - base_logp)) * mask


ADVANTAGES = dict(group=group_norm, centred=centred, rloo=leave_one_out, returns=returns, whitened=whitened,
                  distilled=distilled)

# --- credit: advantages [N, T] once more, by what else is known of a response ---------------------------


def same(adv):
    """The advantages as they are."""
    return adv


def overconfident(adv, old_logp, ref_logp, mask, *, alpha=1.0):
    """ACE (2602.21420): where A < 0, A (1 + α softplus(mean of log π/π_ref)); α ours (unknown)."""
    shift = ((old_logp - ref_logp) * mask).sum(1) / mask.sum(1).clamp(min=1)             # [N]
    return torch.where(adv < 0, adv * (1 + alpha * F.softplus(shift)[:, None]), adv)


def too_long(adv, correct, length, *, base=1.1):
    """APO's STCR (2506.21655): A (2 - b^-(L - μ)) for wrong responses longer than the correct mean μ."""
    mean, _ = among_correct(length, correct)                                             # [P, 1]
    over = (length - mean).clamp(min=0) * (1 - correct) * (correct.sum(1, keepdim=True) > 0)
    return adv * (2 - base ** -over).reshape(-1, 1)


CREDIT = dict(same=same, overconfident=overconfident, too_long=too_long)

# --- surrogates: a loss per token [n, T], or per group [p] ----------------------------------------------


def ratio_of(logp, old_logp, most=20.0):
    """π/π_old, its logarithm capped against overflow."""
    return (logp - old_logp).clamp(-most, most).exp()


def clip(logp, old_logp, adv, *, eps=0.2, eps_high=0.0, dual=0.0):
    """PPO's (1707.06347 eq. 7): max(-A ρ, -A clip(ρ, 1-ε, 1+ε)); eps_high: an upper ε of its own (DAPO).

    dual > 1: where A < 0 the loss is at most -A dual (dual clip, 1912.09729).
    """
    ratio = ratio_of(logp, old_logp)                                                     # [n, T]
    loss = torch.maximum(-adv * ratio, -adv * ratio.clamp(1 - eps, 1 + (eps_high or eps)))
    return torch.where(adv < 0, torch.minimum(loss, -adv * dual), loss) if dual else loss


def reinforce(logp, adv):
    """-A log π: one step a rollout, no ratio."""
    return -adv * logp


def stale(logp, behaviour_logp, adv, *, most=4.0):
    """AIPO (2505.24034): -sg(min(π/μ, ρ̄)) A log π, for tokens of a policy μ some updates old."""
    return -ratio_of(logp, behaviour_logp).detach().clamp(max=most) * adv * logp


def anchored(logp, old_logp, teach_logp, adv, *, alpha=0.5, eps=0.2):
    """RLAD (2602.22495): PPO's clip around π_old^α π_T^(1-α).   log r = α log π/π_old + (1-α) log π/π_T"""
    return clip(logp, alpha * old_logp + (1 - alpha) * teach_logp, adv, eps=eps)


def clip_cov(logp, old_logp, adv, chosen, *, eps=1.0):
    """Clip-Cov (2505.22617): no gradient from the chosen tokens (see band); the ratio's clip nearly off."""
    return clip(logp, old_logp, adv, eps=eps) * (1 - chosen)


def kl_cov(logp, old_logp, adv, chosen, *, coef=1.0):
    """KL-Cov (2505.22617): -A ρ, and coef |log π/π_old| on the chosen tokens (see top): no clip.

    A token that has not moved has no sign: what rounding leaves of its ratio 1 earns no gradient.
    """
    moved = logp - old_logp
    size = torch.where(moved.abs() > 1e-5, moved.abs(), torch.zeros_like(moved))
    return -adv * ratio_of(logp, old_logp) + coef * chosen * size


def drpo(logp, old_logp, mask, correct, length, cap, chosen, *, lam=0.1, tau=10.0):
    """DRPO (2510.04474): -J = -(Σ w s - τ log mean exp(s/τ)) of a group, s a response's mean log-prob.

    w over the correct ones ∝ exp((1 - L/C) / λ), the soft maximum over the wrong; 0 without either. chosen:
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


SURROGATES = dict(clip=clip, reinforce=reinforce, stale=stale, anchored=anchored, clip_cov=clip_cov,
                  kl_cov=kl_cov, drpo=drpo)

# Which tokens a surrogate treats apart: of the whole minibatch, before its gradient.   -> [N, T]


def covariance(now, adv, mask):
    """(A - mean A) (log π - mean log π) of each token: what lowers the entropy (2505.22617 eq. 11)."""
    def off(x):
        return x - (x * mask).sum() / mask.sum()
    return off(adv) * off(now)


def nothing(mask):
    """No token."""
    return torch.zeros_like(mask)


def band(now, old_logp, adv, mask, generator, *, ratio=2e-3, low=0.5, high=5.0, eps=1.0):
    """Clip-Cov's: max(1, ratio n) random tokens with a covariance in (low, high) that PPO does not clip."""
    rho, cov = ratio_of(now, old_logp), covariance(now, adv, mask)
    clipped = -adv * rho.clamp(1 - eps, 1 + eps) > -adv * rho
    where = ((cov > low) & (cov < high) & ~clipped & (mask > 0)).flatten().nonzero().flatten()       # [k]
    n = min(len(where), max(1, int(ratio * mask.sum())))
    picked = where[torch.randperm(len(where), generator=generator)[:n].to(where.device)]
    return torch.zeros_like(mask).flatten().index_fill(0, picked, 1.0).view_as(mask)


def top(now, adv, mask, *, ratio=2e-3):
    """KL-Cov's: the max(1, ratio n) tokens of the highest covariance."""
    cov = covariance(now, adv, mask).masked_fill(mask < 1, -torch.inf).flatten()
    picked = cov.topk(max(1, int(ratio * mask.sum()))).indices
    return torch.zeros_like(mask).flatten().index_fill(0, picked, 1.0).view_as(mask)


def hinge(now, old_logp, mask, groups, *, beta=10.0, delta=1e-4):
    """DRPO's trust region: max(β (KL - δ), 0) KL, KL the tokens' mean of log π_old/π; the factor without
    gradient, spread so that the sum over tokens, divided by the groups, is the penalty."""
    n = mask.sum()
    kl = ((old_logp - now) * mask).sum() / n
    return torch.full_like(mask, (beta * (kl - delta)).clamp(min=0).item() * groups / n.item())


CHOOSERS = dict(nothing=nothing, band=band, top=top, hinge=hinge)

# --- penalties: added to the loss of a token, [n, T] ----------------------------------------------------


def none(logp):
    """No penalty."""
    return torch.zeros_like(logp)


def k2(logp, ref_logp, *, beta=0.04):
    """β d²/2, d = log π/π_ref: on-policy its gradient is that of KL(π||π_ref)."""
    return beta * 0.5 * (logp - ref_logp) ** 2


def k3(logp, ref_logp, *, beta=0.04):
    """β (exp(-d) - 1 + d), d = log π/π_ref: unbiased, never below 0; its gradient is that of KL(π_ref||π)."""
    d = (logp - ref_logp).clamp(-20, 20)
    return beta * (torch.expm1(-d) + d).clamp(max=10)


def k3_straight(logp, ref_logp, *, beta=0.04):
    """k3's value with k2's gradient."""
    square = k2(logp, ref_logp, beta=beta)
    return square - square.detach() + k3(logp, ref_logp, beta=beta).detach()


def by_difficulty(logp, ref_logp, adv, correct, *, beta=1e-3):
    """APO's DADS (2506.21655): k3 where A > 0 times 1 - exp(-e (1 - d)), d = 1 - mean(c); 1 for d 0 or 1."""
    d = 1 - correct.mean(1, keepdim=True)                                                # [p, 1]
    w = torch.where((d > 0) & (d < 1), 1 - torch.exp(-torch.e * (1 - d)), torch.ones_like(d))
    w = w.expand_as(correct).reshape(-1, 1)                                              # [n, 1]
    return k3(logp, ref_logp, beta=beta) * torch.where(adv > 0, w, torch.ones_like(w))


def flattened(logp, flat_logp, *, beta=0.01, most=5.0):
    """RAPO (2510.03865): forward KL to π_ref^φ, w log w - w + 1, w = π_ref^φ/π.   β ours (unknown)

    flat_logp [n, T]: log-probs under the reference at temperature 1/φ, φ = (1 + R) / 2 of the response.
    """
    log_w = (flat_logp - logp).clamp(-20, most)
    return beta * (log_w.exp() * (log_w - 1) + 1)


def to_teacher(logp, teach_logp, correct, *, beta=2e-3, wrong_only=False):
    """KDRL (2506.02208): β k2 to the teacher, or only on wrong responses."""
    rows = (1 - correct).reshape(-1, 1) if wrong_only else 1.0
    return k2(logp, teach_logp, beta=beta) * rows


PENALTIES = dict(none=none, k2=k2, k3=k3, k3_straight=k3_straight, by_difficulty=by_difficulty,
                 flattened=flattened, to_teacher=to_teacher)

# --- weights: the loss of a minibatch is Σ loss · weight over its tokens.   mask -> [N, T] ---------------


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

# --- filters: which groups train.   -> [P] bool ---------------------------------------------------------


def every(shaped):
    """All of them."""
    return torch.ones(len(shaped), dtype=torch.bool, device=shaped.device)


def mixed(score):
    """Groups whose rewards differ (DAPO's dynamic sampling), before a shaper's length terms."""
    return score.std(1) > 1e-6


def mixed_shaped(shaped):
    """... after them: DLER's, whose only shaping is truncation."""
    return shaped.std(1) > 1e-6


FILTERS = dict(every=every, mixed=mixed, mixed_shaped=mixed_shaped)
AXES = dict(shaper=SHAPERS, advantage=ADVANTAGES, credit=CREDIT, surrogate=SURROGATES, chooser=CHOOSERS,
            penalty=PENALTIES, weight=WEIGHTS, filter=FILTERS, kernels=kernels.MODES)

# --- roll out -------------------------------------------------------------------------------------------


def joined(rolls, pad):
    """Rollouts one below the other, padded to the widest -> Rollout."""
    width = max(r.tokens.size(1) for r in rolls)

    def stack(name, fill):
        return torch.cat([F.pad(getattr(r, name), (0, width - r.tokens.size(1)), value=fill) for r in rolls])
    return Rollout(stack("tokens", pad), stack("mask", 0), stack("logp", 0),
                   torch.cat([r.prompt_len for r in rolls]), torch.cat([r.finished for r in rolls]),
                   sum(r.row_steps for r in rolls))


def rows_of(roll, keep):
    """The rows of a rollout where keep [N] is true."""
    return Rollout(*(x[keep] for x in roll[:-1]), roll.row_steps)


@torch.no_grad()
def logprobs(model, tokens, mask, c, temperature=0.0):
    """token_logprobs in micro-batches, without gradient, at the run's temperature and precision.   [N, T]"""
    with autocast(c.device, c.dtype):
        return torch.cat([token_logprobs(model, t, m, temperature=temperature or c.temperature)
                          for t, m in zip(tokens.split(c.micro), mask.split(c.micro))])


def scorer(spec, task):
    """The reward as a function (problem, text, finished) -> float: the task's, or PATH.py:FUNCTION.

    UserError if the file or the function is not there.
    """
    if spec == "task":
        return task.reward
    path, _, name = spec.rpartition(":")
    if not path or not Path(path).is_file():
        raise UserError(f"--reward {spec}: give task, or PATH.py:FUNCTION of a file that exists")
    found = importlib.util.spec_from_file_location("reward_of_the_user", path)
    module = importlib.util.module_from_spec(found)
    found.loader.exec_module(module)
    if not callable(getattr(module, name, None)):
        raise UserError(f"--reward {spec}: {path} has no function {name!r}")
    return getattr(module, name)


def graded(score, problems, roll, tok, samples):
    """A reward of every response.   -> [P, G], the texts"""
    texts = [tok.decode(ids) for ids in roll.completions()]
    got = [float(score(problems[i // samples], x, done))
           for i, (x, done) in enumerate(zip(texts, roll.finished.tolist()))]
    return torch.tensor(got, device=roll.tokens.device).view(-1, samples), texts


REFLECTS = re.compile(r"\b(?:wait|alternatively|hold on|another thought|verify|think again|but|however|"
                      r"alternative|double-check|check|oh|hmm)\b", re.I)                 # ARLCP's words


def described(score, texts, roll, best, where, task):
    """What is known of each group, as a shaper or a filter may name it: [P, G], and best and where [P, 1]."""
    shape, habits = score.shape, getattr(task, "habits", None)
    seconds = [float(habits(x)["waits"] if habits else len(REFLECTS.findall(x))) for x in texts]     # looks
    return dict(score=score, correct=(score > 0.5).to(score), length=roll.mask.sum(1).view(shape),
                truncated=~roll.finished.view(shape), best=best.to(score)[:, None],
                reflections=torch.tensor(seconds).to(score).view(shape),
                where=torch.tensor(where, device=score.device)[:, None])


# --- evaluate -------------------------------------------------------------------------------------------


def pass_at_k(n, correct, k):
    """1 - C(n-c, k) / C(n, k): the chance that one of k samples is right, from c of n (2107.03374 eq. 1)."""
    out = 1.0
    for i in range(n - correct + 1, n + 1):
        out *= 1 - k / i
    return 1 - out


def evaluate(policy, sets, task, tok, c, max_new, samples=4):
    """Held-out prompts, always the same and with the same draws: accuracy, pass@k, length, truncated share.

    Sampled at the run's temperature; _greedy: the accuracy at temperature 0.
    -> {split_key: mean}, [(prompt, text, reference)]
    """
    out, look = {}, []
    for split, problems in sets.items():
        prompts, g = [tok.prompt(p, c.chat) for p in problems], torch.Generator().manual_seed(c.seed + 1)
        with autocast(c.device, c.dtype):
            roll = generate(policy, prompts, max_new, samples=samples, temperature=c.temperature, generator=g)
            best = generate(policy, prompts, max_new, temperature=0.0)
        score, texts = graded(task.reward, problems, roll, tok, samples)                 # [P, G]
        out[f"{split}_greedy"] = graded(task.reward, problems, best, tok, 1)[0].mean().item()
        right = (score > 0.5).sum(1).tolist() if task.metric == "accuracy" else []
        out |= {f"{split}_{task.metric}": score.mean().item(),
                f"{split}_length": roll.mask.sum(1).mean().item(),
                f"{split}_truncated": 1 - roll.finished.float().mean().item()}
        if right:
            out[f"{split}_pass@{samples}"] = sum(pass_at_k(samples, r, samples) for r in right) / len(right)
        if hasattr(task, "habits"):
            found = [task.habits(x) for x in texts]
            out |= {f"{split}_{k}": sum(x[k] for x in found) / len(found) for k in found[0]}
        look += [(p["prompt"], text, task.demo(p)) for p, text in zip(problems[:2], texts[::samples])]
    return out, look


# --- train ----------------------------------------------------------------------------------------------


def backward(policy, batch, groups, c, f, g):
    """Gradients of one minibatch of whole groups, over its micro-batches -> what happened, a dict of floats.

    batch: [N, T] tensors, and what belongs to a group as [P, G]. The weights are those of the whole
    minibatch, so --micro changes nothing.
    """
    G = batch["length"].size(1)
    rows = (groups[:, None] * G + torch.arange(G, device=groups.device)).flatten()       # [n]
    whole = {k: x[groups] if x.size(0) * G == len(batch["mask"]) else x[rows] for k, x in batch.items()}
    width = int(whole["ends"].max())
    whole = {k: x[:, :width] if x.shape == batch["mask"][rows].shape else x for k, x in whole.items()}
    extra = dict(cap=c.max_new, generator=g, groups=len(groups))
    if "now" in needs(f.chooser):
        whole["now"] = logprobs(policy, whole["tokens"], whole["mask"], c)
    whole["chosen"] = f.chooser(**{k: (whole | extra)[k] for k in needs(f.chooser)})     # [n, T]
    whole["weight"] = f.weight(**{k: (whole | extra)[k] for k in needs(f.weight)})       # [n, T]
    told = dict(loss=0.0, clipped=0.0, entropy=0.0, worst=0.0, off=0.0)
    n, low = whole["mask"].sum().clamp(min=1), f.surrogate.keywords.get("eps", 0.0)
    high = f.surrogate.keywords.get("eps_high", 0.0) or low
    for part in torch.arange(len(groups), device=groups.device).split(max(1, c.micro // G)):
        pick = (part[:, None] * G + torch.arange(G, device=part.device)).flatten()
        b = {k: x[part] if x.size(0) == len(groups) and G > 1 else x[pick] for k, x in whole.items()}
        with autocast(c.device, c.dtype):
            logp, entropy = token_logprobs(policy, b["tokens"], b["mask"], temperature=c.temperature,
                                           entropy=True)
        have = b | extra | dict(logp=logp)
        loss = f.surrogate(**{k: have[k] for k in needs(f.surrogate)})                   # [n, T] or [p]
        more = f.penalty(**{k: have[k] for k in needs(f.penalty)})                       # [n, T]
        more = more - c.entropy * entropy if c.entropy else more
        loss = (loss.sum() / len(groups) if loss.dim() == 1 else (loss * b["weight"]).sum()) + (
            more * b["weight"]).sum()
        loss.backward()
        ratio = ratio_of(logp.detach(), b["old_logp"])                                   # [n, T]
        off = (ratio - 1).abs() * b["mask"]
        told["loss"] += loss.item()
        told["worst"] = max(told["worst"], off.max().item())
        clipped = (ratio < 1 - low) | (ratio > 1 + high) if low else torch.zeros_like(off)
        for key, x in dict(off=off, clipped=clipped, entropy=entropy.detach()).items():
            told[key] += ((x * b["mask"]).sum() / n).item()
    return told


def check(c, f):
    """UserError where the parts of a run do not fit together."""
    asked = {name for axis in (f.advantage, f.credit, f.surrogate, f.penalty) for name in needs(axis)}
    if "teach_logp" in asked and not c.teacher:
        raise UserError("this method learns from a teacher: give --teacher CHECKPOINT")
    if c.temperature <= 0:
        raise UserError(f"--temperature {c.temperature}: the policy samples, so it must be positive")
    if min(c.prompts, c.minibatches) < 1 or c.lag < 0:
        raise UserError("--prompts and --minibatches must be at least 1, --lag at least 0")
    if c.samples < 2 and (c.advantage in ("group", "centred", "rloo", "whitened") or c.filter != "every"):
        raise UserError(f"--samples {c.samples}: a group needs two responses to compare")
    if c.prompts % c.minibatches:
        raise UserError(f"--prompts {c.prompts} does not part into --minibatches {c.minibatches} of whole "
                        f"groups")
    return asked


def train(c, f):
    """One run: load, roll out, score, update, tell. -> the last evaluation and the SFT model's (sft_…)."""
    asked = check(c, f)
    init = sft.find(c.init, c.config, seed=c.seed, device=c.device)      # made before this run's clock starts
    teacher = sft.find(c.teacher, c.config, device=c.device) if c.teacher else ""
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
        task = tasks.task(c.data)
        score_of, G, pad = scorer(c.reward, task), c.samples, max(policy.config.pad_token_id, 0)
        problems = task.problems("train", c.pool, 1000 + c.seed)
        sets = {s: task.problems(s, c.eval_prompts, c.seed) for s in tasks.held_out(c.data)}
        max_new = tasks.room(c, tok, [p for s in (problems, *sets.values()) for p in s], task,
                       policy.config.max_position_embeddings)
        opt, g = optimiser(policy, lr=c.lr), torch.Generator().manual_seed(c.seed)
        best, cursor, past = [float("inf")] * len(problems), 0, []       # HAPO's records; the data's place
        run.say(f"{run.folder}: {sum(p.numel() for p in policy.parameters()) / 1e6:.2f} M parameters, "
                f"{len(problems)} prompts, {c.steps} steps of {c.prompts} x {G} responses, "
                f"{c.device} {c.dtype}")
        if run.state:
            opt.load_state_dict(run.state["opt"])
            g.set_state(run.state["rng"])
            best, cursor, before = run.state["best"], run.state["cursor"], run.state["before"]
            past = run.state["past"]
        else:
            before, look = evaluate(policy, sets, task, tok, c, max_new)
            run.log(0, **before, show=True)
        scores, actor = before, copy.deepcopy(policy).requires_grad_(False) if c.lag else policy
        train_policy = torch.compile(policy) if c.compile else policy

        for step in run.steps(c.steps):
            # 1. roll out: groups until enough of them pass the filter ------------------------------------
            clock, kept, seen = time.perf_counter(), [], []
            if c.lag:
                past = [*past, copy.deepcopy(policy.state_dict())][-c.lag - 1:]
                actor.load_state_dict(past[0])
            for _ in range(c.rounds):
                where = batch_indices(len(problems), c.prompts, cursor, c.seed).tolist()
                cursor, picked = cursor + 1, [problems[i] for i in where]
                with autocast(c.device, c.dtype):
                    roll = generate(actor, [tok.prompt(p, c.chat) for p in picked], max_new, samples=G,
                                    temperature=c.temperature, generator=g)
                score, texts = graded(score_of, picked, roll, tok, G)                    # [P, G]
                group = described(score, texts, roll, torch.tensor([best[i] for i in where]), where, task)
                group["shaped"] = f.shaper(**{k: (group | dict(cap=max_new))[k] for k in needs(f.shaper)})
                seen.append(group)
                keep = f.filter(**{k: group[k] for k in needs(f.filter)})                # [P]
                kept.append((rows_of(roll, keep.repeat_interleave(G)),
                             {k: x[keep] for k, x in group.items()}))
                if sum(len(x["score"]) for _, x in kept) >= c.prompts or c.filter == "every":
                    break
            passed = sum(len(x["score"]) for _, x in kept)
            if not passed:                                       # flat groups: only a penalty can teach
                kept = [(roll, group)]
            roll = rows_of(joined([x for x, _ in kept], pad), slice(c.prompts * G))
            have = {k: torch.cat([x[k] for _, x in kept])[:c.prompts] for k in group}    # [P, G] each
            mask, t_gen = roll.mask, time.perf_counter() - clock                         # [N, T]
            # 2. score ------------------------------------------------------------------------------------
            clock = time.perf_counter()
            compute = dict(
                old_logp=lambda: logprobs(policy, roll.tokens, mask, c) if c.lag else roll.logp,
                ref_logp=lambda: logprobs(ref, roll.tokens, mask, c), base_logp=lambda: have["ref_logp"],
                teach_logp=lambda: logprobs(teach, roll.tokens, mask, c), behaviour_logp=lambda: roll.logp,
                flat_logp=lambda: torch.where(have["correct"].view(-1, 1) > 0, have["ref_logp"],
                                              logprobs(ref, roll.tokens, mask, c, 2 * c.temperature)))
            have |= dict(mask=mask, cap=max_new)
            for name in ["old_logp", "ref_logp", *sorted(asked & set(compute) - {"old_logp", "ref_logp"})]:
                have[name] = compute[name]()
            kl = ((have["old_logp"] - have["ref_logp"]) * mask).sum(1)                   # [N]
            have["shaped"] = have["shaped"] - c.kl_reward * kl.view(-1, G)               # [P, G]
            have["adv"] = f.advantage(**{k: have[k] for k in needs(f.advantage)})        # [N, T]
            have["adv"] = f.credit(**{k: have[k] for k in needs(f.credit)})
            batch = {k: x for k, x in have.items() if torch.is_tensor(x)} | dict(
                tokens=roll.tokens, ends=(roll.prompt_len + mask.sum(1).long())[:, None])
            for i, lengths, right in zip(have["where"].flatten().tolist(), have["length"], have["correct"]):
                best[i] = min([best[i], *lengths[right > 0].tolist()])                   # HAPO's records
            t_score = time.perf_counter() - clock
            # 3. update -----------------------------------------------------------------------------------
            clock, told, norm = time.perf_counter(), [], 0.0
            set_lr(opt, c.lr * min(1.0, (step + 1) / max(1, c.warmup)))
            size = c.prompts // c.minibatches
            for groups in torch.randperm(len(have["score"]), generator=g).to(mask.device).split(size):
                told.append(backward(train_policy, batch, groups, replace(c, max_new=max_new), f, g))
                if len(told) == 1 and not c.lag:
                    check_first_ratio(told[0], c.dtype)
                norm = clip_grad_norm_(policy.parameters(), 1.0)
                opt.step()
                opt.zero_grad()
            # 4. tell -------------------------------------------------------------------------------------
            made = {k: torch.cat([x[k] for x in seen]) for k in ("score", "length", "truncated")}
            flat = made["score"].std(1, correction=0) < 1e-6                             # before the filter
            row = dict(correct=made["score"].mean(), flat=flat.float().mean(), length=made["length"].mean(),
                       truncated=made["truncated"].float().mean(), kl=kl.mean(), entropy=told[0]["entropy"],
                       norm=norm, groups=min(passed, c.prompts), generated=made["length"].sum())
            row |= {k: sum(t[k] for t in told) / len(told) for k in ("loss", "clipped")}
            run.log(step + 1, **row, t_gen=t_gen, t_score=t_score, t_update=time.perf_counter() - clock)
            if (step + 1) % c.eval_every == 0 or step + 1 == c.steps:
                scores, look = evaluate(policy, sets, task, tok, c, max_new)
                run.log(step + 1, **scores, show=True)
            if (step + 1) % c.save_every == 0 or step + 1 in (c.steps, c.stop):
                run.save(step + 1, lambda folder: save(policy, tok, folder), opt=opt.state_dict(),
                         rng=g.get_state(), best=best, cursor=cursor, before=before, past=past)
        if c.stop and c.stop < c.steps:
            return scores
        if run.state and run.start >= c.steps:                                   # resumed after its last step
            scores, look = evaluate(policy, sets, task, tok, c, max_new)
        report(run, before, scores, look)
        return run.finish(**scores, **{f"sft_{k}": v for k, v in before.items()})


def report(run, before, after, look):
    """The last words of a run: two samples a split, then SFT beside the policy on held-out prompts."""
    for prompt, text, reference in look:
        run.say(f"  prompt     {prompt!r}\n  policy     {text!r}\n  reference  {reference!r}")
    run.say(f"\n  held-out prompts    {'SFT':>10} {'now':>10}")
    for key in before:
        run.say(f"  {key:<18} {before[key]:>11.3f} {after[key]:>10.3f}")
    run.say(f"\n  {run.folder}: curve.png, log.jsonl; checkpoint {run.last or '(none: no step was made)'}")


CLAIMS = {}

# --- main -----------------------------------------------------------------------------------------------


def main(argv=None):
    """python grpo.py …: see the docstring above, or --help."""
    return launch("grpo", Config, PRESETS, AXES, CLAIMS, __doc__, train, argv)


if __name__ == "__main__":
    cli(main)
