"""
dpo.py - preference optimisation: from pairs, lists, binary labels, and from the policy's own samples.

    python dpo.py                                  # DPO on the world Ring: a minute, its base included
    python dpo.py --config simpo,tiny              # any method in seconds: shows that everything turns
    python dpo.py --init Qwen2.5-0.5B --data pairs.jsonl --lr 1e-6 --micro 4
    python dpo.py --config online --judge out/reward/default       # its own pairs, judged by a reward model
    python dpo.py --claim noise --seeds 5          # a paper's claim against its baselines, with a verdict

Map      1 config   2 losses   3 statistics of a batch   4 samples and verdicts   5 log-probs   6 evaluate
         7 train   8 claims; where rows come from: data/sources.py       B rows, S sides, T tokens, K list
preset      paper             idea                                                              reference?
dpo         2305.18290        logistic loss on the margin of log-ratios (the default)                  yes
cdpo        Mitchell's note   ... labels believed wrong with probability e: the margin stays finite    yes
rdpo        2403.00409        ... unbiased under that many flips                                       yes
ipo         2310.12036        squared distance of the margin to 1/(2 tau); ipo_norm: of means          yes
dpo_norm    2411.15124        ... of log-ratios per token                                              yes
hinge       2309.06657        max(0, 1 - gamma h)                                                      yes
exo         2402.00856        KL between the pair's softmax and smoothed labels                        yes
flex        2406.07327        a smaller weight on the rejected side against the drastic drop           yes
fdpo        2309.16240        another f-divergence's derivative in the log-ratio's place               yes
rpo         2405.16436        DPO + a little SFT on the chosen response                                yes
madpo       2510.05342        weighted by a margin: hard pairs more, easy and contradicted ones less   yes
beta_dpo    2407.08639        beta by the batch's gap; unlikely gaps are dropped                       yes
ld_dpo      2409.06411        tokens beyond the shorter response's length count less                   yes
treg        2412.02685        ... and token credits regularise where the margin is small               yes
sparsepo    2410.05102        token weights on rewards and KL                                          yes
bco_pair    2404.04656        a binary classifier on either side; nca 2402.05369                       yes
apo_zero    2408.06266        anchored: raise the chosen, lower the rejected; apo_down lowers both     yes
simpo       2405.14734        mean log-probs and a target margin                                       no
orpo        2403.07691        SFT + the odds ratio                                                     no
slic_hf     2305.10425        hinge on log-probs + SFT                                                 no
kto         2402.01306        binary labels, value around a reference point                            yes
bco         2404.04656        binary labels, a classifier with a moving shift                          yes
npo         2404.05868        forget: the rejected half of DPO; ga: gradient ascent                    yes, no
lipo        2402.01878        LambdaLoss over a list                                                   yes
list_mle    Plackett-Luce     the likelihood of a ranking                                              yes
pro         2306.17492        one against the rest, down the ranking, + SFT on the best                no
logo        2410.18533        SimPO against several rejected responses                                 no
raco        2602.02495        several objectives: conflict-averse gradients, clipped by their weights  yes
online      2402.04792        fresh pairs of the policy's own samples                                  yes
rso         2309.06657        pairs from the estimated optimum, by rejection sampling                  yes
spin        2401.01335        demonstrations against the last iterate's samples                        last
sppo        2405.00675        regress log-ratios on win rates                                          last
inpo        2407.00617        mirror descent on the regularised game, from hard labels                 both
dno         2404.03715        large-margin pairs of the last iterate and demonstrations                last
nash_md     2312.00886        policy gradient against a mixture with the reference                     yes
nash_mp     2505.19731        two half-steps, near the last iterate: Mirror Prox                       both
xpo         2405.21046        online DPO, optimistic: what the reference samples becomes less likely   yes
selm        2405.19332        ... its own greedy response becomes more likely                          last
hypo        2406.01462        offline DPO + an online KL                                               yes
mpo         2403.19443        easy pairs by DPO, then policy gradients on the hard prompts             twice
mcts        2405.00451        pairs of steps from a search tree                                        yes
toyif, ring worlds            synthetic worlds of data/prefs.py, gold reward known (ring: the default)
tiny        size              seconds on any CPU, its base model included
Watch    accuracy leaves 0.5 and margin rises. chosen_ratio may FALL: only the difference is trained, and
         what both responses share is the cheapest thing to change. It frightens without reason while
         the win rate rises; with a long run, a small beta or far-off data it is the way to collapse: then kl
         runs away too (flex, --sft 0.1 and a larger beta hold it: --claim overopt). val_win is against the
         start's samples, by gold, ties half; val_kl is estimated from samples, so near 0 it can be negative;
         val_accuracy of labels is the area under the ROC curve. t_rows, t_update: a step's seconds for making
         rows and for training on them.
Data     a world, or a JSONL of {"prompt", "chosen", "rejected"}, or for kto, bco of {"prompt", "completion",
         "label"}; one prompt in sixteen is held out. --init: a checkpoint's folder, or base:PRESET of sft.py
"""
import contextlib
import copy
import hashlib
import math
import time
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace
from typing import Literal

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch.nn.utils import clip_grad_norm_

import kernels
import sft
from data import prefs, tasks
from data.judging import JUDGES
from data.run import (Count, Fraction, Positive, Range, Run, Share, UserError,
                      batch_indices, cli, launch, needs, read_log, report)
from data.sources import SHOWN, SOURCES, STATIC, demo, forget, per_prompt, row
from data.stats import auroc
from data.text import CACHE
from model import (ScalarModel, Transformer, autocast, collate, generate, load, peek, save,
                   sequence_score, token_logprobs)
from optim import COMBINE, cosine, optimiser, set_lr, shares

# --- 1 config -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Config:
    """What every run has; what belongs to a loss, a source or a judge is an argument of its
    function."""
    config: str = ""             # presets and TOML files, left to right
    data: str = "ring"  # a world (ring, toyif), or a JSONL of pairs or labelled completions
    rows: int = 0                # training pairs (0: 4000 of a world, or the whole file)
    noise: Share = 0.0           # share of a world's training labels that is flipped
    length_bias: float = 0.0     # what a token is worth to a world's annotators
    init: str = "base:ring"      # the SFT model: where the policy starts, and the reference
    context: int = 0             # longest pair in tokens (0: the model's)
    chat: bool = False           # wrap prompts in the checkpoint's chat template
    loss: str = "dpo"            # which row of LOSSES
    statistic: str = "none"  # which row of STATISTICS: what a loss wants to know of the whole batch
    source: str = "pairs"        # which row of SOURCES: where the rows come from
    judge: str = "gold"          # which row of JUDGES, or the folder of a reward model
    combine: str = "weighted"    # which row of COMBINE: the gradients of several objectives
    credit: str = "gold"         # which row of CREDITS: T-REG's token rewards
    anchor: Literal["start",
                    "previous"] = "start"  # the reference: previous, the policy that made the rows
    sft: float = 0.0  # weight of the chosen response's mean negative log-prob, beside any loss
    refresh: Count = 1  # steps between fresh rows of the sources that sample (4000 prompts at most)
    steps: int = 200             # optimizer steps
    batch: Count = 64            # rows per optimizer step
    micro: Count = 64  # rows per forward pass: lower it if memory runs out, results do not change
    optimiser: Literal["adamw",
                       "sgd"] = "adamw"  # adamw, or sgd where the size of a gradient is the point
    lr: Positive = 5e-5          # peak learning rate, falling by a cosine
    warmup: int = 10             # steps of linear warm-up
    clip: Positive = 1.0         # largest gradient norm
    max_new: int = 0             # longest sample in tokens (0: the task says)
    kl: bool = False             # measure the KL to the start even if the loss reads no reference
    eval_every: Count = 50       # steps between evaluations on held-out prompts
    eval_prompts: Count = 512    # how many of each held-out split
    save_every: Count = 100      # steps between checkpoints
    keep: Count = 2              # checkpoints to keep
    stop: int = 0                # pause after this step (0: no); --resume goes on
    out: str = ""                # run folder (default out/dpo/<presets>)
    seed: int = 0                # of data, order and sampling
    device: str = "auto"         # cpu or cuda
    dtype: str = "auto"  # of the matmuls: float32, or bfloat16 under autocast (default on CUDA)
    kernels: str = "auto"        # auto, or torch: the plain definition of every kernel
    resume: bool = False         # go on from the newest checkpoint of the run folder


LABELS, PREVIOUS = dict(source="labels", batch=128, micro=128), dict(anchor="previous", refresh=50)
PRESETS = dict(  # learning rates and steps: ours, the papers' are for billions of weights
    dpo=dict(), cdpo=dict(loss="cdpo"), rdpo=dict(loss="rdpo"), ipo=dict(loss="ipo"),
    ipo_norm=dict(loss="ipo_norm"), dpo_norm=dict(loss="dpo_norm", beta=1.0),
    hinge=dict(loss="hinge"), exo=dict(loss="exo"), flex=dict(loss="flex"), fdpo=dict(loss="fdpo"),
    rpo=dict(loss="dpo", sft=0.005),  # 2405.16436: eta 0.005 (there with beta 0.01)
    madpo=dict(loss="madpo"), beta_dpo=dict(loss="beta_dpo", statistic="pace"),
    ld_dpo=dict(loss="ld_dpo"),
    treg=dict(loss="treg"), sparsepo=dict(loss="sparsepo"), bco_pair=dict(loss="bco_pair"),
    nca=dict(loss="nca"), apo_zero=dict(loss="apo_zero"), apo_down=dict(loss="apo_down"),
    simpo=dict(loss="simpo"), orpo=dict(loss="orpo"), slic_hf=dict(loss="slic_hf"),
    kto=dict(loss="kto", statistic="mismatch", **LABELS),
    bco=dict(loss="bco", statistic="shift", **LABELS),
    npo=dict(loss="npo", source="forget"), ga=dict(loss="ga", source="forget"),
    lipo=dict(loss="lipo", source="lists", refresh=200, beta=0.05),          # 2402.01878: beta 0.05
    list_mle=dict(loss="list_mle", source="lists", refresh=200),
    pro=dict(loss="pro", source="lists", refresh=200),
    logo=dict(loss="logo", source="lists", refresh=200),
    raco=dict(loss="objectives", source="signs", combine="cagrad",
              beta=0.2),                                                      # 2602.02495: beta 0.2
    online=dict(source="duels"), rso=dict(loss="hinge", source="rso", refresh=200),
    spin=dict(source="spin", **PREVIOUS), sppo=dict(loss="sppo", source="ranked", **PREVIOUS),
    inpo=dict(loss="inpo", source="duels", refresh=50), dno=dict(source="dno", **PREVIOUS),
    nash_md=dict(loss="nash_md", source="mixture"), nash_mp=dict(loss="nash_mp", source="prox"),
    xpo=dict(loss="xpo", source="explore"), selm=dict(loss="selm", source="selm", **PREVIOUS),
    hypo=dict(loss="hypo", source="hybrid"), mpo=dict(loss="mpo", source="mpo"),
    mcts=dict(source="tree"),
    ring=dict(), toyif=dict(data="toyif", init="base:toyif"),
    tiny=dict(rows=64, steps=4, batch=8, micro=8, lr=3e-4, eval_every=2, eval_prompts=16,
              save_every=2,
              refresh=2, max_new=12),
    # the claims' own
    clean=dict(kl=True), flips20=dict(noise=0.2, flip=0.2), flips40=dict(noise=0.4, flip=0.4),
    **{f"beta{int(100 * b):02}": dict(beta=b) for b in (0.02, 0.06, 0.17, 0.5, 1.0)},
    biased=dict(length_bias=0.15), no_eos=dict(alpha=0.0, with_eos=False),
    strong=dict(strongest=4.0), shuffled=dict(shuffled=True),
    few=dict(rows=300, steps=500, eval_every=25), sft10=dict(sft=0.1),
    plain_sgd=dict(optimiser="sgd", lr=3e-3, clip=1e9, warmup=0),
    short=dict(steps=120, eval_every=120),
    adam=dict(lr=3e-4), alone=dict(retain=0.0), npo1=dict(loss="npo", source="forget", beta=1.0),
    cyclic=dict(judge="duel"), bold=dict(alpha=0.01),
    linear=dict(combine="weighted"), unclipped=dict(clipped=False), w82=dict(weights="0.8,0.2"),
    w28=dict(weights="0.2,0.8"), w55=dict(weights="0.5,0.5"),
)
CURVES = {"loss": ["loss"],
          "log-ratios to the reference": ["chosen_ratio", "rejected_ratio", "margin"],
          "log-probs": ["chosen_logp", "rejected_logp"], "accuracy": ["accuracy", "val_accuracy"],
          "gold win rate over the start": ["val_win", "ood_win"],
          "KL, nats per response": ["val_kl", "ood_kl"],
          "length, tokens": ["val_length", "ood_length"]}

# --- 2 losses: one number a row, [B] (several objectives: [B, M]); the loop takes the step's mean -
# Positional arguments name what a loss reads, and only that is computed: chosen_, rejected_, other_
# one side of a row, list_ all of them [B, S], no prefix the only one; then   ratio  Σ log π - log
# π_ref   logp  Σ log π   len  tokens   mean  logp / len   tok  log π, [B, T]   delta  log π - log
# π_ref, [B, T]   mask, eos  [B, T]   prev_ratio  Σ log π - log π_prev EOS is a token of a response
# like any other. Everything else is a field of the row, or a batch's statistic.

logs = F.logsigmoid

def dpo(chosen_ratio, rejected_ratio, *, beta: Positive = 0.1):
    """DPO, 2305.18290 eq. 7:  -log σ(β h),  h = chosen_ratio - rejected_ratio.   [B], [B] -> [B]"""
    return -logs(beta * (chosen_ratio - rejected_ratio))

def cdpo(chosen_ratio, rejected_ratio, *, beta: Positive = 0.1, flip: Range("[0, 0.5)") = 0.1):
    """Conservative DPO:  -(1-e) log σ(βh) - e log σ(-βh);  stationary at βh = log((1-e)/e)."""
    z = beta * (chosen_ratio - rejected_ratio)
    return -(1 - flip) * logs(z) - flip * logs(-z)

def rdpo(chosen_ratio, rejected_ratio, *, beta: Positive = 0.1, flip: Range("[0, 0.5)") = 0.1):
    """Robust DPO, 2403.00409:  [-(1-e) log σ(βh) + e log σ(-βh)] / (1-2e): DPO in expectation over
    flips.

    Unbounded below: it never stops pushing, and its own value means nothing. UserError unless e <
    1/2."""
    if flip >= 0.5:
        raise UserError(f"--flip {flip}: labels wrong half of the time teach nothing; choose below 0.5")
    z = beta * (chosen_ratio - rejected_ratio)
    return (-(1 - flip) * logs(z) + flip * logs(-z)) / (1 - 2 * flip)

def ipo(chosen_ratio, rejected_ratio, *, tau: Positive = 0.1):
    """IPO, 2310.12036 eq. 17:  (h - 1/(2τ))²  of sums over tokens."""
    return (chosen_ratio - rejected_ratio - 1 / (2 * tau)) ** 2

def ipo_norm(chosen_ratio, rejected_ratio, chosen_len, rejected_len, *, tau: Positive = 0.1):
    """IPO on log-ratios per token: what its authors confirm that they ran."""
    return ipo(chosen_ratio / chosen_len, rejected_ratio / rejected_len, tau=tau)

def dpo_norm(chosen_ratio, rejected_ratio, chosen_len, rejected_len, *, beta: Positive = 1.0):
    """Length-normalised DPO (Tülu 3, 2411.15124):  -log σ(β (d_w/n_w - d_l/n_l));  β some ten times
    DPO's."""
    return dpo(chosen_ratio / chosen_len, rejected_ratio / rejected_len, beta=beta)

def hinge(chosen_ratio, rejected_ratio, *, gamma=0.05):
    """RSO's hinge-norm, 2309.06657:  max(0, 1 - γ h)."""
    return F.relu(1 - gamma * (chosen_ratio - rejected_ratio))

def exo(chosen_ratio, rejected_ratio, *, beta: Positive = 0.1, flip: Range("(0, 0.5)") = 1e-3):
    """EXO, 2402.00856:  KL((q, 1-q) || (1-e, e)),  q = σ(βh)."""
    z = beta * (chosen_ratio - rejected_ratio)
    q = torch.sigmoid(z)
    return q * (logs(z) - math.log(1 - flip)) + (1 - q) * (logs(-z) - math.log(flip))

def flex(chosen_ratio, rejected_ratio, *, beta: Positive = 0.1, beta_minus=0.02):
    """Flex-DPO (3D-properties, 2406.07327):  -log σ(β⁺ d_w - β⁻ d_l)."""
    return -logs(beta * chosen_ratio - beta_minus * rejected_ratio)

F_PRIME = dict(forward_kl=lambda d, a: -torch.exp((-d).clamp(max=80)), js=lambda d, a: logs(d),
               alpha=lambda d, a: -torch.expm1((-a * d).clamp(max=80))
               / a, reverse_kl=lambda d, a: d)

def fdpo(chosen_ratio, rejected_ratio, *, beta: Positive = 0.1,
         divergence: Literal[*F_PRIME] = "js", alpha: Range("(0, 1)") = 0.5):
    """f-DPO, 2309.16240:  -log σ(β [f'(u_w) - f'(u_l)]),  u = e^d.

    f': reverse_kl d;  forward_kl -e^-d;  js log σ(d);  alpha (1 - e^-αd)/α, 0 < α < 1. Exponents
    stop at 80.
    """
    if divergence not in F_PRIME:
        raise UserError(f"--divergence {divergence}: choose from {', '.join(F_PRIME)}")
    prime = F_PRIME[divergence]
    return -logs(beta * (prime(chosen_ratio, alpha) - prime(rejected_ratio, alpha)))

def margin_weight(margin, strongest=2.0, tau=2.0, sharpness=1.0):
    """MADPO's (c, w):  c = c_min + (c_max - c_min) / (1 + k e^(λ(|m|-τ))),  w = σ(c m)/σ(m), 1 for
    m <= -τ.

    c_min = 1/c_max, k = (c_max - 1)/(1 - c_min), so that c(τ) = 1; above 1 for |m| < τ. 1 for c_max
    = 1.
    """
    if strongest == 1:
        return torch.ones_like(margin), torch.ones_like(margin)
    low = 1 / strongest
    k = (strongest - 1) / (1 - low)
    c = low + (strongest - low) / (1 + k * torch.exp(sharpness * (margin.abs() - tau)))
    return c, torch.where(margin > -tau, torch.exp(logs(c * margin) - logs(margin)), 1.0)

def madpo(chosen_ratio, rejected_ratio, margin, *, beta: Positive = 0.1, strongest=2.0,
          tau: Positive = 6.906755, sharpness=1.0):
    """MADPO, 2510.05342:  -w(m) log σ(βh): margin m = r_w - r_l of a judge; its target βh is c(m)
    m."""
    return margin_weight(margin, strongest, tau, sharpness)[1] * dpo(chosen_ratio, rejected_ratio,
                                                                     beta=beta)

def beta_dpo(chosen_ratio, rejected_ratio, beta_now, kept):
    """β-DPO, 2407.08639:  -log σ(β_batch h) on the kept pairs; `pace` sets both."""
    return -logs(beta_now * (chosen_ratio - rejected_ratio)) * kept

def ld_dpo(chosen_delta, rejected_delta, chosen_mask, rejected_mask, chosen_eos, rejected_eos, *,
           beta: Positive = 0.1, alpha: Share = 0.5, with_eos=True):
    """LD-DPO, 2409.06411: DPO with weight α on the tokens beyond the shorter response's
    length.   [B, T]

    with_eos False leaves EOS out of both (ours): else the shorter side's EOS counts, the longer
    one's hardly.
    """
    short = torch.minimum(chosen_mask.sum(1), rejected_mask.sum(1))[:, None]             # [B, 1]

    def total(delta, mask, eos):
        weight = torch.where(mask.cumsum(1) <= short, 1.0, alpha) * mask                 # [B, T]
        return (delta * weight * (1 if with_eos else 1 - eos)).sum(1)
    return dpo(total(chosen_delta, chosen_mask, chosen_eos),
               total(rejected_delta, rejected_mask, rejected_eos), beta=beta)

def treg(chosen_ratio, rejected_ratio, chosen_tok, rejected_tok, chosen_credit, rejected_credit, *,
         beta: Positive = 0.1, alpha=0.25):
    """T-REG, 2412.02685:  DPO + α ω Σ_sides Σ_t -β r_t log π_t,  ω = σ(-βh) detached,  r_t in (-½,
    ½).

    credit [B, T]: r_t = σ(log π_ref(y_t|better prompt) - log π_ref(y_t|worse prompt)) - ½ (see
    `credits`)."""
    z = beta * (chosen_ratio - rejected_ratio)
    push = (chosen_credit * chosen_tok).sum(1) + (rejected_credit * rejected_tok).sum(1)       # [B]
    return -logs(z) - alpha * torch.sigmoid(-z).detach() * beta * push

def sparsepo(chosen_delta, rejected_delta, chosen_kl, rejected_kl, chosen_weight, rejected_weight,
             chosen_mask, rejected_mask, *, beta: Positive = 0.1, l1=0.0,
             reward_mask: Literal["map", "ones", "zeros"] = "map",
             kl_mask: Literal["map", "ones", "zeros"] = "map"):
    """SparsePO, 2410.05102:  -log σ(β [u_w - u_l + k_w - k_l]),  u = Σ m_u delta,  k = Σ m_d
    KL(π_ref||π)_t.

    Weights are `weight` (map: MaPO's, from the reference's activations), 1 (ones) or 0 (zeros):
    ones and zeros is DPO, ones twice TDPO. l1: the penalty on the masks, a constant as ours are not
    learned."""
    masks = dict(map=lambda w, m: w, ones=lambda w, m: m, zeros=lambda w, m: 0 * m)
    for name in (reward_mask, kl_mask):
        if name not in masks:
            raise UserError(f"--reward_mask, --kl_mask {name}: choose from {', '.join(masks)}")
    out, size = 0.0, 0.0
    for sign, delta, kl, w, m in ((1, chosen_delta, chosen_kl, chosen_weight, chosen_mask),
                                  (-1, rejected_delta, rejected_kl, rejected_weight,
                                   rejected_mask)):
        m_u, m_d = masks[reward_mask](w, m), masks[kl_mask](w, m)                        # [B, T]
        out = out + sign * (m_u * delta + m_d * kl).sum(1)
        size = size + (m_u.abs() + m_d.abs()).sum(1)
    return -logs(beta * out) + l1 * size

def bco_pair(chosen_ratio, rejected_ratio, *, beta: Positive = 0.1):
    """BCO without its shift, 2404.04656:  -log σ(β d_w) - log σ(-β d_l) >= DPO."""
    return -logs(beta * chosen_ratio) - logs(-beta * rejected_ratio)

def nca(chosen_ratio, rejected_ratio, *, beta: Positive = 0.1):
    """NCA, 2402.05369:  -log σ(β d_w) - ½ log σ(-β d_w) - ½ log σ(-β d_l)."""
    return (-logs(beta * chosen_ratio) - 0.5 * logs(-beta * chosen_ratio)
            - 0.5 * logs(-beta * rejected_ratio))

def apo_zero(chosen_ratio, rejected_ratio, *, beta: Positive = 0.1):
    """APO-zero, 2408.06266:  1 - σ(β d_w) + σ(β d_l): for chosen responses better than the
    model."""
    return 1 - torch.sigmoid(beta * chosen_ratio) + torch.sigmoid(beta * rejected_ratio)

def apo_down(chosen_ratio, rejected_ratio, *, beta: Positive = 0.1):
    """APO-down, 2408.06266:  σ(β d_w) + 1 - σ(β h): for chosen responses worse than the model."""
    return torch.sigmoid(beta * chosen_ratio) + 1 - torch.sigmoid(beta
                                                                  * (chosen_ratio - rejected_ratio))

def simpo(chosen_mean, rejected_mean, *, beta: Positive = 2.0, gamma=1.0):
    """SimPO, 2405.14734 eq. 6:  -log σ(β (a_w - a_l) - γ),  a = mean log-prob."""
    return -logs(beta * (chosen_mean - rejected_mean) - gamma)

def log_odds(a):
    """log p/(1-p) of p = e^a, a < 0, without cancellation on either end."""
    return a - torch.where(a > -0.693, torch.log(-torch.expm1(a)), torch.log1p(-torch.exp(a)))

def orpo(chosen_mean, rejected_mean, *, lam=0.1):
    """ORPO, 2403.07691:  -a_w - λ log σ(log odds a_w - log odds a_l)."""
    top = -1e-6                                            # a certain response has infinite odds
    o = log_odds(chosen_mean.clamp(max=top)) - log_odds(rejected_mean.clamp(max=top))
    return -chosen_mean - lam * logs(o)

def slic_hf(chosen_logp, rejected_logp, *, delta=1.0, lam=0.5):
    """SLiC-HF, 2305.10425:  max(0, δ - log π_w + log π_l) - λ log π_w; the SFT target is the chosen
    one."""
    return F.relu(delta - chosen_logp + rejected_logp) - lam * chosen_logp

def kto(ratio, good, z0, *, beta: Positive = 0.1, desirable=1.0, undesirable=1.0):
    """KTO, 2402.01306:  λ_D (1 - σ(β(d - z0))) if good, else λ_U (1 - σ(β(z0 - d))).   [B]

    z0: the batch's KL on mismatched pairs, see `mismatch`."""
    return torch.where(good > 0, desirable * (1 - torch.sigmoid(beta * (ratio - z0))),
                       undesirable * (1 - torch.sigmoid(beta * (z0 - ratio))))

def bco(ratio, good, reward_shift, *, beta: Positive = 0.1):
    """BCO, 2404.04656:  -log σ(βd - δ) if good, else -log σ(δ - βd);  δ from `shift`."""
    z = beta * ratio - reward_shift
    return -logs(torch.where(good > 0, z, -z))

def npo(ratio, good, mean, *, beta: Positive = 0.1, retain=1.0):
    """NPO, 2404.05868:  (2/β) softplus(β d) on what to forget (not good), -retain mean log π on the
    rest."""
    return torch.where(good > 0, -retain * mean, 2 / beta * F.softplus(beta * ratio))

def ga(logp, good, mean, *, retain=1.0):
    """Gradient ascent, NPO's limit β -> 0:  log π on what to forget, -retain mean log π on the
    rest."""
    return torch.where(good > 0, -retain * mean, logp)

def lipo(list_ratio, labels, *, beta: Positive = 0.1):
    """LiPO-λ, 2402.01878:  Σ_{ψ_i > ψ_j} Δ_ij softplus(-(s_i - s_j)),  s = β d.   [B, K], [B, K] ->
    [B]

    Δ_ij = |2^ψ_i - 2^ψ_j| |1/log(1+τ_i) - 1/log(1+τ_j)|, τ the rank by s now, from 1; no gradient
    through Δ.
    """
    s = beta * list_ratio
    rank = s.detach().argsort(1, descending=True).argsort(1) + 1                         # [B, K]
    gain, discount = 2 ** labels, 1 / torch.log1p(rank)                                  # [B, K]
    delta = (gain[:, :, None] - gain[:, None]).abs() * (discount[:, :, None]
                                                        - discount[:, None]).abs()
    wins = (labels[:, :, None] > labels[:, None]).float()                                # [B, K, K]
    return (wins * delta * F.softplus(-(s[:, :, None] - s[:, None]))).sum((1, 2))

def list_mle(list_ratio, labels, *, beta: Positive = 0.1):
    """Plackett-Luce on the ranking by label:  Σ_k [logsumexp(s_k:) - s_k],  s = β d.   [B, K] ->
    [B]"""
    s = (beta * list_ratio).gather(1, labels.argsort(1, descending=True))       # [B, K], best first
    return (s.flip(1).logcumsumexp(1).flip(1) - s).sum(1)

def pro(list_mean, list_logp, labels, *, weight=0.05):
    """PRO, 2306.17492: down the ranking, the best left against the rest; + w (n-1)² NLL of the
    best.   [B]

    Σ_k logsumexp(a_k T_k, a_i (r_k - r_i)) - a_k T_k over the i behind k,  T_k = max_i (r_k - r_i).
    """
    order = labels.argsort(1, descending=True)
    a, r, logp = (x.gather(1, order) for x in (list_mean, labels, list_logp))           # best first
    n, out = a.size(1), 0.0
    for k in range(n - 1):
        gap = r[:, k:k + 1] - r[:, k + 1:]                                              # [B, n-k-1]
        own = a[:, k:k + 1] * gap.max(1, keepdim=True).values                            # [B, 1]
        out = out + torch.logsumexp(torch.cat([own, a[:, k + 1:] * gap], 1), 1) - own[:, 0]
    return out - weight * (n - 1) ** 2 * logp[:, 0]

def logo(list_mean, *, beta: Positive = 2.5, gamma=0.25, lam=0.1):
    """LOGO, 2410.18533:  -log σ(β (a_w - mean_j a_j) - γ) - λ a_w; the first of the list is the
    winner."""
    a = list_mean[:, 0]
    return -logs(beta * (a - list_mean[:, 1:].mean(1)) - gamma) - lam * a

def objectives(chosen_ratio, rejected_ratio, signs, *, beta: Positive = 0.1):
    """One DPO loss an objective: -log σ(β s h), 0 where it has no opinion.   signs [B, M] -> [B, M]

    s = 1: it prefers the chosen response, -1: the rejected one (RACO, 2602.02495)."""
    return -logs(beta * signs * (chosen_ratio - rejected_ratio)[:, None]) * (signs != 0)

def sppo(chosen_ratio, rejected_ratio, chosen_win, rejected_win, *, beta: Positive = 0.1):
    """SPPO, 2405.00675:  ½ Σ_sides (d - (P(y > π_t) - ½)/β)²;  d is relative to π_t.   [B]

    β: ours; the paper's 0.001 asks for log-ratios of hundreds of nats."""
    return 0.5 * ((chosen_ratio - (chosen_win - 0.5) / beta) ** 2
                  + (rejected_ratio - (rejected_win - 0.5) / beta) ** 2)

def sppo_hard(chosen_ratio, rejected_ratio, *, beta: Positive = 0.1):
    """SPPO with P = 1 and 0."""
    return sppo(chosen_ratio, rejected_ratio, 1.0, 0.0, beta=beta)

def inpo(chosen_ratio, rejected_ratio, chosen_prev_ratio, rejected_prev_ratio, *,
         eta: Positive = 0.3, tau: Positive = 0.1):
    """INPO, 2407.00617:  (h_t - 1/(2η))²,  h_t = (τ/η) h + (1 - τ/η) h against π_t.   0 < τ <= η

    That is log π_w/π_l - (τ/η) log π_ref - ((η-τ)/η) log π_t: both references at once. η and τ are
    ours in size (0.0075 and 0.0025 in the paper), its ratio."""
    if not 0 < tau <= eta:
        raise UserError(f"--tau {tau} --eta {eta}: INPO needs 0 < tau <= eta")
    h, before = chosen_ratio - rejected_ratio, chosen_prev_ratio - rejected_prev_ratio
    return (tau / eta * h + (1 - tau / eta) * before - 1 / (2 * eta)) ** 2

def dno(chosen_ratio, rejected_ratio, chosen_win, rejected_win, *, beta: Positive = 0.1):
    """DNO's exact step, 2404.03715:  DPO with the soft label σ(r_w - r_l),  r = win rate against
    π_t."""
    q, z = torch.sigmoid(chosen_win - rejected_win), beta * (chosen_ratio - rejected_ratio)
    return -q * logs(z) - (1 - q) * logs(-z)

def nash_md(logp, ratio, win, *, tau: Positive = 0.1):
    """Nash-MD-PG, 2312.00886:  -[P(y > y') - ½ - τ d] log π(y), bracket detached; sums over
    tokens.   [B]"""
    return -(win - 0.5 - tau * ratio).detach() * logp

def nash_mp(logp, ratio, prev_ratio, win, *, tau: Positive = 0.1, eta: Positive = 0.2):
    """Nash-MP, 2505.19731: policy gradient of the proximal step.   [B]

    -[(P(y > opponent) - ½)/τ - d - d_prev/η] log π(y), bracket detached, times τ to keep nash_md's
    scale; d against the reference, d_prev against π_k."""
    return -(win - 0.5 - tau * (ratio + prev_ratio / eta)).detach() * logp

def xpo(chosen_ratio, rejected_ratio, other_logp, *, beta: Positive = 0.1, alpha=1e-5):
    """XPO, 2405.21046:  DPO + α log π(ỹ),  ỹ ~ π_ref: optimism lowers what is covered already."""
    return dpo(chosen_ratio, rejected_ratio, beta=beta) + alpha * other_logp

def selm(chosen_ratio, rejected_ratio, other_ratio, *, beta: Positive = 0.1, alpha=0.001):
    """SELM, 2405.19332:  DPO + α β d(ỹ),  ỹ the last iterate's greedy response."""
    return dpo(chosen_ratio, rejected_ratio, beta=beta) + alpha * beta * other_ratio

def hypo(chosen_ratio, rejected_ratio, list_ratio, list_logp, *, beta: Positive = 0.1, lam=1e-3):
    """HyPO, 2406.01462:  DPO + λ Σ_i c_i log π(y_i) / k: KL(π||π_ref) on the policy's own
    samples.   [B]

    The list's first two sides are the pair; c_i = d_i - mean of the others (RLOO), detached."""
    d, logp = list_ratio[:, 2:].detach(), list_logp[:, 2:]                               # [B, k]
    k = d.size(1)
    c = (d - d.mean(1, keepdim=True)) * k / (k - 1)
    return dpo(chosen_ratio, rejected_ratio, beta=beta) + lam * (c * logp).mean(1)

def mpo(chosen_ratio, rejected_ratio, chosen_logp, rejected_logp, gain, hard, *,
        beta: Positive = 0.1, tau: Positive = 0.1):
    """MPO, 2403.19443: DPO on easy rows; on hard ones the policy gradient of two samples.   [B]

    With k = 2 RLOO's advantages are ±A, A = gain - τ (d_1 - d_2): -½ A (log π_1 - log π_2). ours:
    the paper runs PPO there; ratios are to the DPO model by then."""
    advantage = (gain - tau * (chosen_ratio - rejected_ratio)).detach()
    return torch.where(hard > 0, -0.5 * advantage * (chosen_logp - rejected_logp),
                       dpo(chosen_ratio, rejected_ratio, beta=beta))

LOSSES = dict(dpo=dpo, cdpo=cdpo, rdpo=rdpo, ipo=ipo, ipo_norm=ipo_norm, dpo_norm=dpo_norm,
              hinge=hinge,
              exo=exo, flex=flex, fdpo=fdpo, madpo=madpo, beta_dpo=beta_dpo, ld_dpo=ld_dpo,
              treg=treg,
              sparsepo=sparsepo, bco_pair=bco_pair, nca=nca, apo_zero=apo_zero, apo_down=apo_down,
              simpo=simpo, orpo=orpo, slic_hf=slic_hf, kto=kto, bco=bco, npo=npo, ga=ga, lipo=lipo,
              list_mle=list_mle, pro=pro, logo=logo, objectives=objectives, sppo=sppo,
              sppo_hard=sppo_hard,
              inpo=inpo, dno=dno, nash_md=nash_md, nash_mp=nash_mp, xpo=xpo, selm=selm, hypo=hypo,
              mpo=mpo)

# --- 3 statistics of the whole batch, before the step, without gradient ---------------------------

def none():
    """Nothing: the loss reads its own row only."""
    return {}

def pace(gap, memory, generator, *, beta: Positive = 0.1, a=0.6, drop: Fraction = 0.2,
         momentum: Fraction = 0.9):
    """β-DPO's β_batch and the pairs kept, 2407.08639.   gap [B] = h, not times β -> beta_now [B],
    kept [B]

    β_batch = max(1e-3, β (1 + a (mean kept gap - M0))); (1 - drop) B pairs are kept, drawn with
    weights exp(-½ ((gap - M0)/s0)²). M0, s0: running mean and std, momentum 0.9, this batch
    included; ours: they start from the first batch (public code from 0). kept is scaled: the step's
    mean is over kept pairs.
    """
    now = gap.mean().item(), gap.std().item() if len(gap) > 1 else 0.0
    old = memory.get("gap", now)
    mean, std = memory["gap"] = [momentum * x + (1 - momentum) * y for x, y in zip(old, now)]
    n = max(1, int((1 - drop) * len(gap) + 1e-9))
    weight = torch.exp(-0.5 * ((gap - mean) / max(std, 1e-6)) ** 2).clamp(min=1e-30).cpu()     # [B]
    kept = torch.zeros_like(weight).scatter(0, torch.multinomial(weight, n, generator=generator),
                                            1.0)
    pick = kept.to(gap.device)
    beta_now = max(1e-3, beta * (1 + a * ((gap * pick).sum().item() / n - mean)))
    return dict(beta_now=torch.full_like(gap, beta_now), kept=pick * len(gap) / n)

def shift(ratio, good, memory, *, beta: Positive = 0.1, decay: Fraction = 0.99):
    """BCO's δ = ½ (mean β d of the good + of the others), a moving average from the first batch
    on."""
    sides = [beta * ratio[which].mean().item() for which in (good > 0, good <= 0) if which.any()]
    now = sum(sides) / len(sides)
    memory["shift"] = decay * memory.get("shift", now) + (1 - decay) * now
    return dict(reward_shift=torch.full_like(ratio, memory["shift"]))

def mismatch(mismatched):
    """KTO's z0 = max(0, mean log-ratio of prompts with another row's response), a KL.   [B] ->
    [B]"""
    if len(mismatched) < 2:
        raise UserError("--batch 1: KTO reads each prompt with another row's response; raise --batch")
    return dict(z0=mismatched.mean().clamp(min=0).expand(len(mismatched)))

STATISTICS = dict(none=none, pace=pace, shift=shift, mismatch=mismatch)
GIVES = dict(none=(), pace=("beta_now", "kept"), shift=("reward_shift",), mismatch=("z0",))

# --- 4 samples and verdicts; s is the run's state -------------------------------------------------

def sequences(s, problems, groups):
    """Problems and their responses -> tokens, mask [N, T] of all of them."""
    rows = [(s.tok.prompt(p["prompt"], s.c.chat), y["ids"]) for p, ys in zip(problems, groups)
            for y in ys]
    return collate(rows, s.tok.pad or 0, s.c.device)

@torch.no_grad()
def compare(s, problems, groups):
    """The judge's P for each problem's responses: [[{"ids", "text", "finished"}]] -> [[K, K]] in
    float64."""
    names, flat = needs(s.f.judge), None
    if "score" in names:
        flat = [s.world.reward(p, y["text"], y["finished"]) for p, ys in zip(problems, groups)
                for y in ys]
    if "judged" in names or "density" in names:
        tokens, mask = sequences(s, problems, groups)
        parts = list(zip(tokens.split(s.c.micro), mask.split(s.c.micro)))
        with autocast(s.c.device, s.c.dtype):
            if "judged" in names:
                score = [sequence_score(s.models["judge"], t, m.size(1) - m.flip(1).argmax(1))
                         for t, m in parts]                                      # at the last token
            else:
                score = [(token_logprobs(s.models["strong"], t, m)
                          - token_logprobs(s.models["weak"], t, m)
                          ).sum(1) / m.sum(1) for t, m in parts]
        flat = torch.cat(score).tolist()
    out, at = [], 0
    for p, ys in zip(problems, groups):
        have = dict(world=s.world, prompt=p["prompt"],
                    texts=[(y["text"], y["finished"]) for y in ys])
        if flat is not None:
            have |= dict.fromkeys(("score", "judged", "density"),
                                  torch.tensor(flat[at:at + len(ys)], dtype=torch.float64))
            at += len(ys)
        out.append(s.f.judge(**{k: have[k] for k in names}))
    return out

def sample(s, problems, k=1, model=None, **how):
    """k responses a problem of the policy, or of another model -> [[{"ids", "text", "finished"}]].

    ids end in EOS where the response did; one that was cut off has none. At most 4,096 at a
    time."""
    prompts, out = [s.tok.prompt(p["prompt"], s.c.chat) for p in problems], []
    for i in range(0, len(prompts), max(1, 4096 // k)):
        with autocast(s.c.device, s.c.dtype):
            roll = generate(model or s.policy, prompts[i:i + max(1, 4096 // k)], s.max_new,
                            samples=k,
                            generator=s.g, **how)
        out += [dict(ids=t[m > 0].tolist(), text=s.tok.decode(text), finished=done)
                for t, m, text, done
                in zip(roll.tokens, roll.mask, roll.completions(), roll.finished.tolist())]
    s.seen["sampled"] += len(out)
    s.seen["truncated"] += sum(not y["finished"] for y in out)
    return [out[i:i + k] for i in range(0, len(out), k)]

def extend(s, starts, new, k):
    """k continuations of each start, at most `new` tokens -> [(ids, e^(Σ log π / n^1.25),
    finished)]."""
    with autocast(s.c.device, s.c.dtype):
        roll = generate(s.policy, starts, new, samples=k, generator=s.g)
    made = [(t[m > 0].tolist(), (x.sum() / m.sum() ** 1.25).exp().item(), done) for t, m, x, done
            in zip(roll.tokens, roll.mask, roll.logp, roll.finished.tolist())]
    return [made[i:i + k] for i in range(0, len(made), k)]

# --- 5 log-probs ----------------------------------------------------------------------------------

COPIES = ("prev", "opponent",
          "after_dpo")  # of the policy, made by a source on its way: saved with it

def frozen(model):
    """A copy that nothing trains."""
    return copy.deepcopy(model).requires_grad_(False)

def gold_credit(s, r, side, *, scale=1.0):
    """An oracle's token credits for T-REG: σ(scale · what the token adds to gold) - ½.   -> [n]"""
    ids = r["sides"][side]
    problem = dict(prompt=r["text"]["prompt"])
    gold = [s.world.reward(problem, s.tok.decode([t for t in ids[:i] if t != s.tok.eos]), True)
            for i in range(len(ids) + 1)]
    return torch.sigmoid(scale * torch.tensor(gold).diff()) - 0.5

def prompted_credit(s, r, side, *, better="A good answer.\n", worse="A bad answer.\n"):
    """T-REG's own: σ(log π_ref(y_t|better, x) - log π_ref(y_t|worse, x)) - ½, texts put before the
    prompt."""
    ids = r["sides"][side]
    prompts = [s.tok.prompt(text + r["text"]["prompt"], s.c.chat) for text in (better, worse)]
    tokens, mask = collate([(prompt, ids) for prompt in prompts], s.tok.pad or 0, s.c.device)
    with torch.no_grad(), autocast(s.c.device, s.c.dtype):
        a, b = (x[m > 0] for x, m in zip(token_logprobs(s.models["start"], tokens, mask), mask))
    return torch.sigmoid(a - b).cpu() - 0.5

CREDITS = dict(gold=gold_credit, prompts=prompted_credit)

SIDES = dict(chosen=0, rejected=1, other=2, list=slice(None))
READS = dict(                    # of x: logp, mask, ref, … [B, S, T]
    logp=lambda x: x["logp"].sum(-1), len=lambda x: x["mask"].sum(-1), tok=lambda x: x["logp"],
    mean=lambda x: x["logp"].sum(-1)
    / x["mask"].sum(-1), ratio=lambda x: (x["logp"] - x["ref"]).sum(-1),
    delta=lambda x: x["logp"] - x["ref"], prev_ratio=lambda x: (x["logp"] - x["prev"]).sum(-1),
    **{key: lambda x, key=key: x[key] for key in ("mask", "eos", "credit", "kl", "weight")})

def part_of(name):
    """"chosen_ratio" -> (0, "ratio"); "ratio" -> (0, "ratio"), of rows with one side; "margin" ->
    None."""
    head, _, tail = name.partition("_")
    if head in SIDES and tail in READS:
        return SIDES[head], tail
    return (0, name) if name in READS else None

def reads(f):
    """All that a run's loss and statistic read of log-probs: {"ratio", "len", …}."""
    names = needs(f.loss) + needs(f.statistic)
    names += {"gap": ["chosen_ratio"],
              "mismatched": ["ratio"]}.get(next(iter(needs(f.statistic)), ""), [])
    return {part_of(name)[1] for name in names if part_of(name)}

def needs_reference(c, f):
    """Whether the run reads a reference at all: in its loss, in its source, or to measure the
    KL."""
    return (c.kl or bool(reads(f) & {"ratio", "delta", "kl", "weight"})
            or c.source in ("mixture", "explore")
            or "credit" in reads(f) and c.credit == "prompts" or c.judge == "duel")

def judges(c, f):
    """The folders of the models that this run's judge reads, {"judge"} or {"strong", "weak"}; {}
    for one that needs none, or that no row of this run is shown to."""
    names = needs(f.judge)
    if "judged" in names:
        return dict(judge=c.judge)
    shown = c.source not in STATIC or "margin" in needs(f.loss)
    pair = ("strong", "weak") if "density" in names and shown else ()
    return {key: f.judge.keywords[key] or c.init for key in pair}

def readers(c, f):
    """{field: (whether this run reads it, what does)} of the fields that not every run reads."""
    names, static = needs(f.loss), c.source in STATIC
    fields = dict(
        statistic=(set(GIVES[c.statistic]) & set(names), "losses that read it: beta_dpo, bco, kto"),
        noise=(c.data in prefs.WORLDS, "a world's labels: --data ring or toyif"),
        length_bias=(c.data in prefs.WORLDS, "a world's labels: --data ring or toyif"),
        judge=(not static or "margin" in names or c.judge == "duel",
               "sources that sample, and losses that read a margin"),
        combine=("signs" in names, "--loss objectives"),
        credit=("credit" in reads(f), "--loss treg"),
        refresh=(not static, "sources that sample"),
        anchor=(needs_reference(c, f), "losses that read a reference"))
    return fields

def check(c, f, world):
    """UserError for rows of the config that do not go together, and for all else that can be known
    before anything is made: files and folders."""
    names, static = needs(f.loss), c.source in STATIC
    given = {name for some in GIVES.values() for name in some}
    for name in sorted(given & set(names) - set(GIVES[c.statistic])):
        raise UserError(f"--loss {c.loss} reads {name}: --statistic {c.statistic} does not give it; see the "
                        "presets (--help)")
    if c.loss == "inpo" and not f.loss.keywords["tau"] <= f.loss.keywords["eta"]:
        raise UserError("--loss inpo: --tau is at most --eta")
    if c.source in SHOWN and world is None:
        raise UserError(f"--source {c.source} reads demonstrations: take a world, --data ring or toyif")
    if (c.source == "signs" or c.judge == "duel") and c.data != "ring":
        raise UserError(f"--source {c.source} --judge {c.judge}: only Ring has groups of annotators, and "
                        "intransitive ones; take --data ring")
    if "mismatched" in needs(f.statistic) and c.batch < 2:
        raise UserError("--batch 1: KTO reads each prompt with another row's response; raise --batch")
    if "good" in needs(f.statistic) and c.source not in ("labels", "forget"):
        raise UserError(f"--statistic {c.statistic} reads labels, which --source {c.source} does not give")
    if "gap" in needs(f.statistic) and c.source in ("labels", "forget"):
        raise UserError(f"--statistic {c.statistic} reads pairs, which --source {c.source} does not give")
    if world is None and not (c.source == "labels" and prefs.load_labels(c.data)):
        prefs.check_pairs(c.data)
    most = sft.find(c.init, c.config, make=False)
    if c.max_new >= most:
        raise UserError(f"--max_new {c.max_new} does not fit the {most} tokens of {c.init}")
    for key, path in judges(c, f).items():
        if key == "judge":
            peek(path, scalar=True, option="--judge")
        else:
            sft.find(path, c.config, make=False, option=f"--{key}")
    if static and (c.anchor == "previous" or "prev_ratio" in reads(f)):
        raise UserError(f"--source {c.source}: its rows are made once, so there is no previous policy; "
                        f"use --anchor start, and a loss without one")
    if c.anchor == "previous" and (reads(f) & {"kl"} or c.statistic == "mismatch"):
        raise UserError(f"--anchor previous: --loss {c.loss} reads the reference at every step: "
                        f"use --anchor start")
    if "score" in needs(f.judge) and world is None and (not static or "margin" in names):
        raise UserError(f"--judge gold: {c.data} has no gold reward; name a reward model's folder, or take "
                        f"--judge cdr")
    if c.source == "signs":
        shares(f.combine.keywords.get("weights", ""), len(f.source.keywords["groups"]))
    if c.sft and ({"signs", "hard", "good"} & set(names)
                  or not any(x.startswith("chosen") for x in names)):
        raise UserError(f"--sft {c.sft}: --loss {c.loss} has no chosen response; leave it at 0")
    if "credit" in reads(f) and (c.source != "pairs" or c.credit == "gold" and world is None):
        raise UserError(f"--loss {c.loss}: token credits are of --source pairs; without a world, of "
                        f"--credit prompts")

def measure(s, rows, model):
    """Every side of the rows in one batched forward pass -> logp, mask, eos and, where the rows
    have it, ref, prev, credit, and where the loss reads them kl, weight: [B, S, T] each."""
    S, wanted = len(rows[0]["sides"]), reads(s.f)
    tokens, mask = collate([(r["prompt"], y) for r in rows for y in r["sides"]], s.tok.pad or 0,
                           s.c.device)
    x = dict(logp=token_logprobs(model, tokens, mask), mask=mask,                    # [B S, T] each
             eos=mask * (tokens == s.tok.eos))
    for key in ("ref", "prev", "credit"):
        if key in rows[0]:
            flat = torch.cat([r[key] for r in rows]).to(mask)
            x[key] = torch.zeros_like(mask).masked_scatter(mask > 0, flat)
    if wanted & {"kl", "weight"}:
        x |= token_divergence(model, reference(s), tokens, mask)
    return {key: v.view(-1, S, v.size(-1)) for key, v in x.items()}

def token_divergence(model, ref, tokens, mask):
    """SparsePO's kl, KL(π_ref||π) of each token's distribution, whole vocabulary, and weight,
    MaPO's mask.

    weight: mean of the reference's hidden state over features at the token's own prediction,
    z-scored, then
    stretched to [0, 1] within the response (2410.05102 §3; its final layer, ours).   -> [N, T] each
    """
    with torch.no_grad():
        h_ref = ref(tokens)[:, :-1]                                                    # [N, T-1, D]
        a = F.pad(h_ref.float().mean(-1), (1, 0))                                        # [N, T]
        low = a.masked_fill(mask == 0, torch.inf).amin(1, keepdim=True)
        high = a.masked_fill(mask == 0, -torch.inf).amax(1, keepdim=True)
        weight = (a - low) / (high - low).clamp(min=1e-6) * mask
    h, where = model(tokens)[:, :-1], mask[:, 1:] > 0
    kl = kernels.linear_distill(h[where], model.head, h_ref[where], ref.head, "forward_kl")    # [n]
    kl = torch.zeros_like(mask[:, 1:]).masked_scatter(where, kl.float())
    return dict(kl=F.pad(kl, (1, 0)), weight=weight)

def provide(names, x, rows, extra=None):
    """What a loss names, for these rows: log-probs of a side, a statistic of the batch, or a row's
    field."""
    out, like = {}, x["logp"]
    for name in names:
        if part := part_of(name):
            which, what = part
            out[name] = READS[what](x)[:, which]
        elif extra and name in extra:
            out[name] = extra[name]
        else:
            out[name] = torch.tensor([r[name] for r in rows], dtype=like.dtype, device=like.device)
    return out

@torch.no_grad()
def response_logprobs(s, rows, model):
    """Response tokens' log-probs under a model, a row's sides one after the other -> [n] per row,
    CPU."""
    out = []
    for i in range(0, len(rows), s.c.micro):
        part = rows[i:i + s.c.micro]
        sides = [(r["prompt"], y) for r in part for y in r["sides"]]
        tokens, mask = collate(sides, s.tok.pad or 0, s.c.device)
        with autocast(s.c.device, s.c.dtype):
            flat = token_logprobs(model, tokens, mask)[mask > 0].cpu()
        out += flat.split([sum(map(len, r["sides"])) for r in part])
    return [x.clone() for x in out]

def fingerprint(rows, model, dtype):
    """A hash of the rows' ids, the model's weights and the precision: what reference log-probs
    depend on."""
    h = hashlib.sha256(repr([(r["prompt"], r["sides"]) for r in rows]).encode()
                       + str(dtype).encode())
    for name, p in model.state_dict().items():
        h.update(name.encode() + p.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return h.hexdigest()[:16]

def cached_logprobs(s, rows, model):
    """response_logprobs, kept on disk under data/cache: the same rows and weights are scored once,
    ever."""
    path = CACHE / f"reference-{fingerprint(rows, model, s.c.dtype)}.safetensors"
    with contextlib.suppress(OSError, SafetensorError, KeyError, RuntimeError):  # absent, or broken
        out = list(load_file(path)["logp"].split([sum(map(len, r["sides"])) for r in rows]))
        s.say(f"  reference log-probs: {path}")
        return out
    out = response_logprobs(s, rows, model)
    with contextlib.suppress(OSError, SafetensorError):                         # it costs only time
        path.parent.mkdir(parents=True, exist_ok=True)
        tmp = path.with_suffix(f".{time.monotonic_ns()}.tmp")
        save_file(dict(logp=torch.cat(out)), tmp)
        tmp.replace(path)
    return out

def reference(s):
    """The model that log-ratios are against: MPO's switch, else the policy as it is, or the
    start."""
    return s.models.get("after_dpo") or (s.policy if s.c.anchor == "previous"
                                         else s.models["start"])

def prepare(s, rows):
    """Rows with what is frozen about them: reference log-probs, the last iterate's, token credits.

    Rows whose pair is of equal sides (of a list: all), or with an empty one, or longer than the
    context, are dropped and counted. UserError if the loss reads what the source does not give."""
    kept, wanted = [], reads(s.f)
    for name in needs(s.f.loss) if rows else []:
        side = part_of(name)
        short = side and side[0] in (1, 2) and len(rows[0]["sides"]) <= side[0]
        if short or not (side or name in rows[0] or name in GIVES[s.c.statistic]):
            raise UserError(f"--loss {s.c.loss} reads {name}: neither --source {s.c.source} nor --statistic "
                            f"{s.c.statistic} gives it; see the presets (--help)")
    for r in rows:
        sides = [tuple(y) for y in r["sides"]]
        pair = sides if s.c.source == "lists" else sides[:2]
        why = ("empty" if not all(sides) else "identical" if len(sides) > 1 and len(set(pair)) == 1
               else "long" if len(r["prompt"]) + max(map(len, sides)) > s.context else "")
        if why:
            s.seen[why] += 1
        else:
            kept.append(r)
    if not kept:
        raise UserError(f"--source {s.c.source}: no row is left to train on "
                        f"({', '.join(f'{n} {k}' for k, n in s.seen.items() if n) or 'it gave none'}); "
                        f"if samples are identical the policy has collapsed: lower --lr")
    if wanted & {"ratio", "delta"}:
        model = reference(s)
        once = s.c.source in STATIC and model is s.models["start"]
        for r, x in zip(kept, (cached_logprobs if once else response_logprobs)(s, kept, model)):
            r["ref"] = x
    if "prev_ratio" in wanted:
        for r, x in zip(kept, response_logprobs(s, kept, s.models.get("prev") or s.policy)):
            r["prev"] = x
    if "credit" in wanted:
        for r in kept:
            r["credit"] = torch.cat([s.f.credit(s, r, i) for i in range(len(r["sides"]))]).float()
    for r in kept:
        r.pop("text", None)
    return kept

# --- 6 evaluate -----------------------------------------------------------------------------------

def evaluate(s, sets, held):
    """Held-out prompts and pairs, always the same, with the same draws -> {split_key: float},
    samples.

    win: how often the policy's sample has more gold than the start's, same prompt and draws (ties
    half); kl: k1 to the start, nats per response; accuracy: pairs with a larger log-ratio (without
    a reference: mean log-prob) of the chosen side, or of binary labels the area under the ROC
    curve.
    """
    c, out, look = s.c, {}, []
    g, seen = s.g, dict(s.seen)
    for split, problems in sets.items():
        s.g = torch.Generator().manual_seed(c.seed + 1)
        ys = [y for y, in sample(s, problems)]
        rows = [row(s, p, [y]) for p, y in zip(problems, ys)]
        if "start" in s.models:
            mine, ref = (response_logprobs(s, rows, m) for m in (s.policy, s.models["start"]))
            out[f"{split}_kl"] = sum((a - b).sum().item() for a, b in zip(mine, ref)) / len(rows)
        out |= {f"{split}_length": sum(len(y["ids"]) for y in ys) / len(ys),
                f"{split}_truncated": 1 - sum(y["finished"] for y in ys) / len(ys)}
        if s.world:
            gold = [s.world.reward(p, y["text"], y["finished"]) for p, y in zip(problems, ys)]
            before = s.before.setdefault(split, gold)
            out |= {f"{split}_gold": sum(gold) / len(gold),
                    f"{split}_win": sum((a > b) + 0.5 * (a == b) for a, b in zip(gold, before))
                    / len(gold)}
            if c.source == "signs":
                for group in s.f.source.keywords["groups"]:
                    out[f"{split}_gold_{group}"] = sum(
                        s.world.judge(p["prompt"], y["text"], y["finished"], group)["gold"]
                        for p, y in zip(problems, ys)) / len(ys)
            if c.source == "forget" and split == "val":          # ood has keywords of its own
                out |= forgotten(s, split, problems)
            if c.judge == "duel":
                out[f"{split}_exploitability"] = exploitability(s, problems[:48])
        look += [(p["prompt"], y["text"], demo(s, p)["text"] if s.world else "")
                 for p, y in zip(problems[:2], ys)]
    s.g, s.seen = g, seen
    return out | pair_accuracy(s, held), look

def pair_accuracy(s, held):
    """{"val_accuracy", …}: see evaluate; held: {name: rows}, with reference log-probs if there are
    any."""
    out = {}
    for name, rows in held.items():
        score = [[y.sum().item() if "ref" in rows[0] else y.mean().item()
                  for y in (x - r["ref"] if "ref" in r else x).split([len(y) for y in r["sides"]])]
                 for r, x in zip(rows, response_logprobs(s, rows, s.policy))]
        if len(rows[0]["sides"]) == 1:
            out[f"{name}_accuracy"] = auroc(torch.tensor([a for a, in score]),
                                            torch.tensor([r["good"] > 0 for r in rows]))
        else:
            out[f"{name}_accuracy"] = sum((a > b) + 0.5 * (a == b)
                                          for a, b, *_ in score) / len(score)
    return {k: float(v) for k, v in out.items()}

def forgotten(s, split, problems):
    """Mean NLL of a token of held-out demonstrations: prompts to forget, and the rest."""
    rows = forget(s, problems, **s.f.source.keywords)
    logp = response_logprobs(s, rows, s.policy)
    out = {}
    for name, good in (("forget", 0), ("retain", 1)):
        mine = torch.cat([x for r, x in zip(rows, logp) if r["good"] == good])
        out[f"{split}_{name}_nll"] = -mine.mean().item()
    return out

def exploitability(s, problems, k=16):
    """max_y P(y > π) - ½, averaged over prompts: what the best of 2 k responses wins against the
    policy.

    Candidates: k samples of the start and k of the policy; P(y > π) by k other samples of the
    policy. A maximum over samples: it is above 0 for the best of policies too, so compare arms, not
    with 0."""
    groups = [a + b + c for a, b, c in zip(sample(s, problems, k, model=s.models["start"]),
                                           sample(s, problems, k), sample(s, problems, k))]
    best = [P[:2 * k, 2 * k:].mean(1).max().item() for P in compare(s, problems, groups)]
    return sum(best) / len(best) - 0.5

# --- 7 train --------------------------------------------------------------------------------------


def open_data(s, c):
    """(training pairs as ids, or labelled rows, {name: held-out rows}, a file's held-out
    prompts)."""
    def ids(rows, what):
        return prefs.encode_pairs(rows, s.tok, s.context, what, c.chat)
    if s.world:
        train = s.world.pairs(c.rows or 4000, 1000 + c.seed, noise=c.noise,
                              length_bias=c.length_bias)
        held = {"val": s.world.pairs(min(600, 2 * c.eval_prompts), c.seed, "val")}
    elif c.noise or c.length_bias:
        raise UserError("--noise and --length_bias are of a world's labels: a file has its own")
    elif c.source == "labels" and (found := prefs.load_labels(c.data)):
        both = dict(train=found[:c.rows or None], val=prefs.load_labels(c.data, "val"))
        both = {k: prefs.encode_labels(x, s.tok, s.context, f"{k} labels", c.chat)
                for k, x in both.items()}
        mixed = {k: len({r["good"] for r in rows}) > 1 for k, rows in both.items()}
        if not mixed["train"]:
            raise UserError(f"{c.data}: all labels to train on are alike; {c.loss} needs good and bad ones")
        if not mixed["val"]:
            s.say("  all held-out labels are alike: there is no val_accuracy")
        held = {"val": both["val"]} if mixed["val"] else {}
        return [], both["train"], held, [r["text"]["prompt"] for r in both["val"]]
    else:
        train, sets = prefs.pair_sets(c.data, c.rows)
        held = {"val": sets["val"]}
    train, held = ids(train, "training pairs"), {k: ids(rows, f"{k} pairs")
                                                 for k, rows in held.items()}
    return train, [], {k: [dict(prompt=r["prompt"], sides=[r["chosen"], r["rejected"]])
                           for r in rows]
                       for k, rows in held.items()}, [r["text"]["prompt"] for r in held["val"]]


def open_models(c, f, folder, last):
    """(policy, tokenizer, {"start": the reference, if the run reads one, and what the judge
    reads})."""
    policy, tok = load(last or folder, c.device)
    if not isinstance(policy, Transformer):
        raise UserError(f"--init {c.init} is a reward model; dpo.py trains a language model")
    models = {"start": load(folder,
                            c.device)[0].requires_grad_(False)} if needs_reference(c, f) else {}
    paths = {k: path if k == "judge" else sft.find(path, c.config, device=c.device)
             for k, path in judges(c, f).items()}
    if paths and paths.get("strong") == paths.get("weak") and "judge" not in paths:
        raise UserError("--judge cdr: --strong and --weak are the same model, so every pair is a tie")
    for name, path in paths.items():
        models[name], other = load(path, c.device)
        models[name].requires_grad_(False)
        if isinstance(models[name], ScalarModel) != (name == "judge"):
            raise UserError(f"--judge {path}: a folder must be a reward model, cdr's two are language models")
        if other.tokens != tok.tokens:
            raise UserError(f"--judge {path} and --init {c.init} have different tokenizers: both must read "
                            f"the same ids")
    return policy, tok, models


def look_first(s, rows):
    """The batch's statistics, without gradient -> {name: [B]}."""
    names = needs(s.f.statistic)
    if not names:
        return {}
    have = dict(memory=s.memory, generator=s.g)
    if "mismatched" in names:
        mixed = [dict(prompt=r["prompt"], sides=rows[i - 1]["sides"]) for i, r in enumerate(rows)]
        fits = [r for r in mixed if len(r["prompt"]) + len(r["sides"][0]) <= s.context]
        mine, ref = (response_logprobs(s, fits, m) for m in (s.policy, reference(s)))
        mean = torch.stack([(a - b).sum()
                            for a, b in zip(mine, ref)]).mean() if fits else torch.zeros(())
        have["mismatched"] = mean.expand(len(rows)).to(s.c.device)
    else:
        wanted = ["chosen_ratio", "rejected_ratio"] if "gap" in names else ["ratio", "good"]
        with torch.no_grad(), autocast(s.c.device, s.c.dtype):
            parts = [provide(wanted, measure(s, rows[i:i + s.c.micro], s.policy),
                             rows[i:i + s.c.micro])
                     for i in range(0, len(rows), s.c.micro)]
        have |= {k: torch.cat([p[k] for p in parts]) for k in wanted}
        if "gap" in names:
            have["gap"] = have["chosen_ratio"] - have["rejected_ratio"]
    return s.f.statistic(**{k: have[k] for k in names})


def backward(s, rows, extra):
    """Gradients of one step, accumulated over micro-batches -> what happened, as a dict of floats.

    The sum over rows is divided by the step's rows (an objective's by those on which it has an
    opinion), so --micro changes nothing. Several objectives: one backward pass each, then
    --combine.
    """
    names, B, told = needs(s.f.loss), len(rows), dict(loss=0.0)
    params = [p for p in s.policy.parameters() if p.requires_grad]
    G, total, count = None, 0.0, B
    if "signs" in names:
        count = torch.tensor([r["signs"]
                              for r in rows]).abs().sum(0).clamp(min=1).to(s.c.device)         # [M]
    for i in range(0, B, s.c.micro):
        part = rows[i:i + s.c.micro]
        with autocast(s.c.device, s.c.dtype):
            x = measure(s, part, s.policy)
        loss = s.f.loss(**provide(names, x, part,
                                  {k: v[i:i + s.c.micro] for k, v in extra.items()}))
        if s.c.sft:
            loss = loss - s.c.sft * READS["mean"](x)[:, 0]                      # side 0: the chosen
        if loss.dim() == 2:
            losses = loss.sum(0) / count                                                 # [M]
            grads = [torch.cat([g.reshape(-1)
                                for g in torch.autograd.grad(one, params, retain_graph=True)])
                     for one in losses]
            G, total = torch.stack(grads) + (0 if G is None else G), total + losses.detach()
            told["loss"] += losses.sum().item()
        else:
            (loss.sum() / B).backward()
            told["loss"] += loss.sum().item() / B
        for key, v in tell(x, part).items():
            told[key] = told.get(key, 0.0) + v
    if G is not None:
        have = dict(G=G, losses=total)
        flat = s.f.combine(**{k: have[k] for k in needs(s.f.combine)})
        for p, g in zip(params, flat.split([p.numel() for p in params])):
            p.grad = g.view_as(p)
    for side in ("chosen", "rejected"):
        n = told.pop(f"{side}_n")
        told |= {k: v / max(1.0, n) for k, v in told.items() if k.startswith(side)}
        if n == 0:  # binary labels: none of this kind in the step
            told = {k: v for k, v in told.items() if not k.startswith(side)}
    if "hits" in told:
        told["accuracy"] = told.pop("hits") / B
        if "chosen_ratio" in told:
            told["margin"] = told["chosen_ratio"] - told["rejected_ratio"]
    return told


@torch.no_grad()
def tell(x, rows):
    """Sums over rows for the log: log-probs and log-ratios of both sides apart, pairs in the right
    order."""
    score = {k: READS[k](x) for k in ("logp", "len", *(["ratio"] if "ref" in x else []))}   # [B, S]
    out = {}
    if len(rows[0]["sides"]) == 1:
        good = torch.tensor([r.get("good", 1.0) for r in rows]).to(x["mask"])
        where = dict(chosen=(0, good), rejected=(0, 1 - good))
    else:
        where = dict(chosen=(0, torch.ones(len(rows)).to(x["mask"])),
                     rejected=(1, torch.ones(len(rows)).to(x["mask"])))
        by = score["ratio"] if "ratio" in score else score["logp"] / score["len"]
        out["hits"] = ((by[:, 0] > by[:, 1]) + 0.5 * (by[:, 0] == by[:, 1])).sum().item()
    for side, (i, weight) in where.items():
        out[f"{side}_n"] = weight.sum().item()
        out |= {f"{side}_{k}": (v[:, i] * weight).sum().item() for k, v in score.items()}
    return out


def train(c, f):
    """One run: load, make rows, score, update, tell. -> the last evaluation and the start's
    (start_…)."""
    world = tasks.task(c.data) if c.data in prefs.WORLDS else None
    check(c, f, world)
    folder = sft.find(c.init, c.config, seed=c.seed,
                      device=c.device)                         # made before this run's clock starts
    kernels.use(c.kernels)
    with Run(c, f, "dpo", CURVES) as run:
        policy, tok, models = open_models(c, f, folder, run.last)
        longest = policy.config.max_position_embeddings
        context = min(c.context or longest, longest)
        seen = dict.fromkeys(("sampled", "truncated", "identical", "empty", "long", "close"), 0)
        s = SimpleNamespace(c=c, f=f, policy=policy, tok=tok, models=models, memory={}, before={},
                            margins=[],
                            g=torch.Generator().manual_seed(c.seed), context=context, say=run.say,
                            step=0,
                            stage=0, taken=0, seen=seen)
        s.sample, s.compare, s.extend = (partial(fn, s) for fn in (sample, compare, extend))
        s.copy = partial(frozen, policy)
        s.world = world
        s.data, s.labels, held, prompts = open_data(s, c)
        if s.world:
            problems = s.world.problems("train", 4096, 1000 + c.seed)
            sets = {x: s.world.problems(x, c.eval_prompts, c.seed) for x in tasks.held_out(c.data)}
        else:
            problems = [dict(prompt=x) for x in dict.fromkeys(r["text"]["prompt"] for r in s.data)]
            sets = {"val": [dict(prompt=x) for x in dict.fromkeys(prompts)][:c.eval_prompts]}
        width = max(len(tok.prompt(p["prompt"], c.chat)) for x in (problems, *sets.values())
                    for p in x)
        s.max_new = c.max_new or min(s.world.max_new if s.world else 128, context - width)
        if s.max_new < 1:
            raise UserError(f"the longest prompt has {width} tokens: no room for a response in the context "
                            f"of {context}; shorten it, or raise --context")
        opt = (optimiser(policy, lr=c.lr) if c.optimiser == "adamw"
               else torch.optim.SGD(policy.parameters(), c.lr))
        if "start" in models:
            for rows in held.values():
                for r, x in zip(rows, response_logprobs(s, rows, models["start"])):
                    r["ref"] = x
        size, static = sum(p.numel() for p in policy.parameters()) / 1e6, c.source in STATIC
        rows = prepare(s, f.source(s, problems if c.source == "forget" else [])) if static else None
        run.say(f"{run.folder}: {size:.2f} M parameters, {len(s.data or s.labels)} "
                f"{'pairs' if s.data else 'labelled responses'}, {c.steps} steps of {c.batch}, {c.device} "
                f"{c.dtype}, {'with' if 'start' in models else 'without'} a reference")
        if run.state:
            opt.load_state_dict(run.state["opt"])
            s.g.set_state(run.state["rng"])
            for key in ("memory", "before", "stage", "taken", "seen"):
                setattr(s, key, run.state[key])
            rows, made, scores = rows or run.state["rows"], run.state["made"], run.state["first"]
            for name, weights in run.state["copies"].items():
                s.models[name] = frozen(policy)
                s.models[name].load_state_dict(weights)
            first = scores
        else:
            first, look = evaluate(s, sets, held)
            run.log(0, **first, show=True)
            scores, made = first, 0

        for step in run.steps(c.steps):
            # 1. rows
            # ------------------------------------------------------------------------------------
            clock, s.step = time.perf_counter(), step
            if rows is None or not static and step - made >= c.refresh:
                wanted = min(4000, math.ceil(c.batch * c.refresh / per_prompt(f.source)))
                picked = batch_indices(len(problems), wanted, s.stage, c.seed).tolist()
                rows, made = prepare(s, f.source(s, [problems[i] for i in picked])), step
                s.stage += 1
            order = batch_indices(len(rows), c.batch, step - made, c.seed + s.stage).tolist()
            batch = [rows[i] for i in order]
            t_rows = time.perf_counter() - clock
            # 2. look at the whole batch, 3. update
            # -------------------------------------------------------
            clock = time.perf_counter()
            told = backward(s, batch, look_first(s, batch))
            norm = clip_grad_norm_(policy.parameters(), c.clip)
            set_lr(opt, c.lr * cosine(step, c.steps, c.warmup))
            opt.step()
            opt.zero_grad()
            # 4. tell
            # --------------------------------------------------------------------------------------
            run.log(step + 1, **told, norm=norm, **{k: v for k, v in s.seen.items() if v},
                    t_rows=t_rows, t_update=time.perf_counter() - clock)
            if (step + 1) % c.eval_every == 0 or step + 1 == c.steps:
                run.check(step + 1, policy)
                scores, look = evaluate(s, sets, held)
                run.log(step + 1, **scores, show=True)
            if (step + 1) % c.save_every == 0 or step + 1 in (c.steps, c.stop):
                copies = {k: m.state_dict() for k, m in s.models.items() if k in COPIES}
                run.save(step + 1, lambda path: save(policy, tok, path), opt=opt.state_dict(),
                         rng=s.g.get_state(), memory=s.memory, before=s.before, stage=s.stage,
                         taken=s.taken,
                         seen=s.seen, made=made, rows=None if static else rows, copies=copies,
                         first=first)
        if c.stop and c.stop < c.steps:
            run.say(f"  paused at step {c.stop}: the same command with --resume, without --stop, goes on")
            return scores
        if run.state and run.start >= c.steps:                         # resumed after its last step
            scores, look = evaluate(s, sets, held)
        dropped = ", ".join(f"{n} {k}" for k, n in s.seen.items() if n
                            and k not in ("sampled", "truncated"))
        cut = f"; of {s.seen['sampled']} samples {s.seen['truncated']} were truncated (no EOS is scored)"
        run.say(f"  rows dropped: {dropped or 'none'}" + cut * (s.seen["sampled"] > 0))
        report(run, first, scores, look)
        peak = max((r["val_gold"] for r in read_log(run.folder) if "val_gold" in r), default=0.0)
        return run.finish(**scores, **{f"start_{k}": v for k, v in first.items()}, val_peak=peak)


AXES = dict(loss=LOSSES, statistic=STATISTICS, source=SOURCES, judge=JUDGES, combine=COMBINE,
            credit=CREDITS,
            kernels=kernels.MODES)

# --- main -----------------------------------------------------------------------------------------


def main(argv=None):
    """python dpo.py …: see the docstring above, or --help."""
    return launch("dpo", Config, PRESETS, AXES, __doc__, train, argv, readers)


if __name__ == "__main__":
    cli(main)
