"""
sft.py - supervised learning: pre-training a small base model, and fine-tuning on demonstrations.

    python sft.py                                  # docstrings from signatures, its own base first
    python sft.py --config pretrain                # only the base model, on the Python standard library
    python sft.py --config arithmetic              # addition with a chain of thought, from scratch
    python sft.py --init Qwen2.5-0.5B --data demos.jsonl --config lora
    python sft.py --config pretrain,normuon        # any rule of optim.py; --suggest: Step Law's settings
    torchrun --standalone --nproc_per_node 2 sft.py --config pretrain,normuon      # FSDP2
    python sft.py --claim normuon --seeds 5        # the race of the optimisers, with a verdict

Map      1 config   2 losses   3 claims   4 data, feedback   5 LoRAM, linear layers   6 start
         7 evaluate   8 train
         B rows, T tokens, N scored tokens, V vocabulary
preset      data                                       idea
pretrain    stdlib: sources and prose, packed          next-token loss on every token
pretrain_moe  stdlib, bytes                            ... of a small mixture of experts
target      stdlib, bytes                              ... of eight narrow layers: a target of specdec.py
draft64     stdlib, bytes                              ... of one layer of width 64
draft32     stdlib, bytes                              ... of width 32
target_docs  signatures, bytes                         target, fine-tuned: the target of one task
sft         signatures: (signature, docstring) pairs   loss on the completion only, its EOS included
arithmetic  column-wise addition, bytes                a verifiable task, from scratch
toyif_base  the three behaviours of the world ToyIF    the base of the claims about rewards
toyif_checks  which criteria do two responses meet?    verdicts, no winners
toyif_judge  the same, most on principles alone        the base of the claim about rubrics
chain_right  chains of digits, step by step            right ones only
chain       chains of mixed quality, from chain_right  right a third of the time: where grpo.py starts
chain_sort  chains and sorting, of mixed quality       two tasks: what does RL on one make forget?
arena_right  five tasks of data/chains.py              right ones only
arena       the five, of mixed quality                 for grpo.py --data sort, graph, add or countdown
toyif       its good demonstrations only               few rows: what Self-Rewarding PPO starts from
ring        demonstrations of the world Ring           traps for reward models: where reward.py starts
adamw …     any                                        optim.py's rules, their papers' settings: adamw
            signsgd lion lionk muon normuon shampoo soap adam_mini dion galore qgalore apollo apollo_mini
            frugal frugal_columns fira gradnormlorp eco eco_sgd classp
lora        any                                        adapters on every linear layer, merged when saved
bone        any                                        one block a layer, added to all columns (2409.15371)
bat         any                                        one block a row of blocks, guided by the weights
loram       any                                        LoRA trained on a pruned model, used on the whole one
mle         a world: scored demonstrations             likelihood of all, the baseline of the next four
filtered    a world                                    of the better half only (2302.08582)
conditional a world                                    of all, a tag before each says which half (2302.08582)
unlikely    a world                                    less likelihood of the worse half's tokens (2302.08582)
rwr         a world                                    reward-weighted regression (2302.08582)
hindsight   a world's or a file's pairs                both answers, told which is better (2302.02676)
implicit    any                                        f-divergence SFT, log-ratio to the start (2507.00018)
glow        any                                        rows that a pass taught least count more (2601.04992)
reweighted  any                                        a batch's rows by their loss (2502.06733)
dckd        pairs, --teacher                           SFT + the teacher's distribution on both (2502.17927)
adpa        pairs, --teacher, --other                  SFT + a teacher's advantage, own samples (2502.17927)
aligndistil pairs, --teacher, --other                  a teacher beyond DPO and its reverse (2503.02832)
hft         any                                        half fine-tuning: half of each layer is frozen
qat         any                                        weights rounded in the last steps (2509.22935)
halo        any                                        products in INT8, operands rotated (2501.02625)
quartet     any                                        products in MXFP4, unbiased gradients (2505.14669)
lost        any                                        low rank and a few dense columns (2508.02668)
journey     any                                        pruned gradually while training (2501.12486)
tiny        any                                        30 s on any CPU: shows that everything turns
Watch    val_loss is nats per scored token and is the number to believe; a falling train loss with a rising
         val_loss is memorising. bpb (bits per byte) is the one to compare between tokenizers. With loram
         it is the pruned model's; the completions shown at the end are the whole one's. saved_loss is that of
         the checkpoint, where --linear says how layers train: rounded (qat), or in float32 (halo, quartet).
"""
import hashlib
import json
import math
import time
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Literal

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.utils import clip_grad_norm_

import kernels
from data import chains, numerics, prefs, tasks, text, tokenizer
from data.run import (Claim, Count, Fraction, Positive, Range, Run, Share, UserError, batch_indices,
                      checkpoint, cli, configure, launch, lock, needs, rank, read_json, read_log,
                      result, settings, share, start_ranks)
from kernels import PackedLinear
from model import (ARCHITECTURES, PEFT, LoRA, Transformer, adapter_state, autocast,
                   collate, generate, init, load, load_balance_loss, lora, merge, peek, preset,
                   replace_linears, save, shard, token_logprobs)
from optim import RULES, SCHEDULES, STORES, memory_report, name_of, optimiser, set_lr

# --- config ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Config:
    """What every run has; what belongs to a loss, schedule or optimiser is an argument of its
    function."""
    config: str = ""             # presets and TOML files, left to right
    data: str = "signatures"  # stdlib or another text (packed); a task, a JSONL of demonstrations
    rows: int = 0                # use only so many demonstrations (0: all)
    init: str = "base:pretrain"  # checkpoint to start from; base:PRESETS makes it first; empty: a new model
    model: str = "4x128"         # layers x width of a new model
    family: Literal[*ARCHITECTURES] = "qwen3"  # its architecture: llama, qwen2, qwen3, mixtral, qwen3_moe
    tokenizer: str = "bpe"       # of a new model: bpe (trained here), bytes, toyif, chain, a folder, gpt2 …
    vocab: Range("[261, 1000000]") = 2048  # size of a trained bpe
    context: Range("[2, inf)") = 256  # longest row in tokens; a new model's context is twice that
    chat: bool = False           # wrap prompts in the checkpoint's chat template
    loss: str = "nll"            # which row of LOSSES
    feedback: str = "none"       # which row of FEEDBACK: how scores, tags and pairs become rows
    teacher: str = ""            # checkpoint that a distilling loss reads (a DPO-trained one)
    other: str = ""  # a second: the teacher's start (adpa), or dpo.py --noise 1's (aligndistil)
    optimiser: str = "adamw"     # which row of optim.RULES updates the matrices of the blocks
    schedule: str = "cosine"     # which row of SCHEDULES
    steps: int = 0               # optimizer steps (0: epochs decides)
    epochs: Positive = 3.0       # passes over the data, where steps is 0
    batch: Count = 32            # rows per optimizer step
    micro: Count = 32  # rows per forward pass: lower it when memory runs out, results do not change
    lr: Positive = 1e-3          # peak learning rate
    warmup: int = 20             # steps of linear warm-up
    weight_decay: float = 0.1    # on matrices, not on norms and biases
    clip: Positive = 1.0         # largest gradient norm
    peft: str = "full"           # what is trained: a row of PEFT
    linear: str = "plain"        # how the blocks' linear layers compute: a row of LINEARS
    prune: str = "none"          # which row of numerics.PRUNING cuts their weights while training
    store: str = "float32"       # how the matrices of the blocks are kept: a row of optim.STORES
    eval_every: Count = 100      # steps between evaluations
    watch: str = ""  # a further data set to evaluate on, e.g. what the checkpoint knew before
    target: float = 0.0          # validation loss to reach: the result says after how many steps and seconds
    suggest: bool = False        # print Step Law's learning rate and batch for this model and data, and stop
    save_every: Count = 200      # steps between checkpoints
    keep: Count = 2              # checkpoints to keep
    stop: int = 0                # pause after this step (0: no); --resume goes on
    out: str = ""                # run folder (default out/sft/<presets>)
    seed: int = 0                # of initialisation, data order and sampling
    device: str = "auto"         # cpu or cuda
    dtype: str = "auto"  # of the matmuls: float32, or bfloat16 under autocast (default on CUDA)
    compile: bool = False        # torch.compile the model
    kernels: str = "auto"        # auto, or torch: the plain definition of every kernel
    resume: bool = False         # go on from the newest checkpoint of the run folder


TUNED = dict(lr=3e-4, warmup=0, weight_decay=0.0)
SCORED = dict(data="toyif_base", init="base:toyif_base", context=32, rows=4000, steps=375)
PAIRED = dict(data="toyif", init="base:toyif_base", context=64, rows=4000)
TARGET = dict(data="stdlib", init="", tokenizer="bytes", model="8x128", context=160, steps=500,
              batch=16,
              micro=16, lr=3e-3, warmup=60, eval_every=250)
PRESETS = dict(
    pretrain=dict(data="stdlib", init="", steps=800, batch=16, micro=16, lr=3e-3, warmup=60,
                  eval_every=200),
    pretrain_moe=dict(data="stdlib", init="", family="qwen3_moe", model="2x64", tokenizer="bytes",
                      context=64,
                      steps=900, batch=16, micro=16, lr=2e-3, warmup=60, eval_every=300),
    target=TARGET, draft64=TARGET | dict(model="1x64"), draft32=TARGET | dict(model="1x32"),
    target_docs=dict(init="base:target", data="signatures", context=320, epochs=0.5, batch=16,
                     micro=16),
    sft=dict(),                                                                  # the defaults
    arithmetic=dict(data="arithmetic", init="", tokenizer="bytes", model="2x128", context=128,
                    rows=20000,
                    steps=1500, batch=64, micro=64, lr=2e-3, eval_every=250),
    toyif_base=dict(data="toyif_base", init="", tokenizer="toyif", model="2x64", context=32,
                    rows=30000,
                    steps=3500, batch=64, micro=64, lr=2e-3, eval_every=500, save_every=1000,
                    keep=1),
    toyif_checks=dict(data="toyif_checks", init="base:toyif_base", context=64, rows=60000,
                      steps=5000,
                      batch=64, micro=64, optimiser="muon", lr=3.5e-3, aux_lr=2e-3, warmup=50,
                      schedule="linear", eval_every=1000, save_every=1000, keep=1),
    toyif_judge=dict(data="toyif_principles", init="base:toyif_checks", context=64, rows=60000,
                     steps=3000,
                     batch=64, micro=64, optimiser="muon", lr=3.5e-3, aux_lr=2e-3, warmup=50,
                     schedule="linear", eval_every=1000, save_every=1000, keep=1),
    toyif=dict(data="toyif", init="base:toyif_base", context=32, epochs=4.0, rows=512, lr=3e-4,
               warmup=0,
               weight_decay=0.0, save_every=1000, eval_every=1000, keep=1),
    chain_right=dict(data="chain_wordy", init="", tokenizer="chain", model="2x128", context=96,
                     rows=20000,
                     steps=600, batch=64, micro=64, lr=3e-3, warmup=50, eval_every=200,
                     save_every=1000,
                     keep=1),
    chain=dict(data="chain", init="base:chain_right", context=96, rows=20000, steps=140, batch=64,
               micro=64,
               lr=1e-3, warmup=10, eval_every=70, save_every=1000, keep=1),
    chain_sort=dict(data="chain+sort", init="base:chain_right", context=96, rows=20000, steps=400,
                    batch=64,
                    micro=64, lr=1e-3, warmup=10, eval_every=200, save_every=1000, keep=1),
    arena_right=dict(data="chain_wordy+sort_wordy+graph_wordy+add_wordy+countdown_wordy", init="",
                     tokenizer="chain", model="2x128", context=128, rows=40000, steps=1500,
                     batch=64,
                     micro=64, lr=3e-3, warmup=50, eval_every=500, save_every=1000, keep=1),
    arena=dict(data="chain+sort+graph+add+countdown", init="base:arena_right", context=128,
               rows=40000,
               steps=300, batch=64, micro=64, lr=1e-3, warmup=10, eval_every=150, save_every=1000,
               keep=1),
    ring=dict(data="ring", init="", tokenizer="ring", model="2x64", context=64, rows=20000,
              steps=500,
              batch=96, micro=96, lr=2e-3, warmup=0, schedule="linear", eval_every=250,
              save_every=1000,
              keep=1),
    # optim.py's rules: lr where the paper's scale differs from AdamW's. Ours, tried on small models
    # only: every aux_lr, the lr of signsgd, lion(k), eco_sgd, classp and of the adapters below
    adamw=dict(optimiser="adamw"),
    muon=dict(optimiser="muon"),  # scale rms: AdamW's lr and decay (2502.16982)
    normuon=dict(optimiser="normuon"),                     # the same (2510.05491)
    lion=dict(optimiser="lion", lr=5e-4, weight_decay=0.6),            # lr 3-10x below, decay above
    lionk=dict(optimiser="lionk", lr=5e-4, weight_decay=0.6),
    signsgd=dict(optimiser="signsgd", lr=1e-3, weight_decay=0.0),
    shampoo=dict(optimiser="shampoo"),
    soap=dict(optimiser="soap", weight_decay=0.01),        # lr 3e-3
    adam_mini=dict(optimiser="adam_mini"),
    dion=dict(optimiser="dion", lr=0.01, weight_decay=0.01, aux_lr=3e-3),
    galore=dict(optimiser="galore", lr=0.01, weight_decay=0.0,
                aux_lr=3e-3),                                          # rank: a quarter of the side
    qgalore=dict(optimiser="qgalore", lr=0.015, weight_decay=0.0, aux_lr=3e-3, store="int8"),
    apollo=dict(optimiser="apollo", lr=0.01, weight_decay=0.0, aux_lr=3e-3),
    apollo_mini=dict(optimiser="apollo_mini", lr=0.01, weight_decay=0.0, aux_lr=3e-3),
    frugal=dict(optimiser="frugal", lr=1e-3, weight_decay=0.0, aux_lr=3e-3),
    frugal_columns=dict(optimiser="frugal_columns", lr=1e-3, weight_decay=0.0, aux_lr=3e-3),
    fira=dict(optimiser="fira", lr=0.01, weight_decay=0.0, aux_lr=3e-3),
    gradnormlorp=dict(optimiser="gradnormlorp", lr=0.01, weight_decay=0.0, aux_lr=3e-3),
    eco=dict(optimiser="eco", store="int8", b2=0.95),      # b2 ours: as adamw's
    eco_sgd=dict(optimiser="eco_sgd", store="int8", lr=0.1, aux_lr=3e-3),
    # the author's threshold 0.5 and p 1 are for far larger gradients than a clipped language
    # model's
    classp=dict(optimiser="classp", threshold=0.0, p=2.0, lr=0.01, weight_decay=0.0, aux_lr=3e-3),
    lora=dict(peft="lora", lr=2e-3),
    bone=dict(peft="bone", lr=1e-3),
    bat=dict(peft="bat", lr=1e-3),
    loram=dict(peft="loram", lr=2e-3),
    hft=dict(peft="hft"),
    qat=dict(linear="qat", schedule="wsd"), halo=dict(linear="halo"),
    quartet=dict(linear="quartet"),
    lost=dict(linear="lost"), journey=dict(prune="journey"),
    # objectives beside likelihood, on ToyIF's good, random and copied responses or its pairs; lr
    # ours
    **{name: TUNED | SCORED | dict(feedback=feedback, loss=loss) for name, feedback, loss in (
        ("mle", "scored", "nll"), ("filtered", "filtered", "nll"),
        ("conditional", "conditional", "nll"),
        ("unlikely", "scored", "unlikelihood"), ("rwr", "scored", "rwr"))},
    **{name: TUNED | PAIRED | dict(feedback=feedback, loss=loss) for name, feedback, loss in (
        ("hindsight", "hindsight", "nll"), ("dckd", "both", "dckd"), ("adpa", "sampled", "adpa"),
        ("aligndistil", "chosen", "aligndistil"))},
    implicit=dict(loss="implicit", **TUNED), glow=dict(loss="glow"),
    reweighted=dict(loss="reweighted"),
    tiny=dict(model="2x64", steps=100, batch=8, micro=8, context=192, vocab=512, warmup=10,
              eval_every=50),
)
ARMS = dict(  # settings that only the arms of claims need, ppo.py's and those below
    n64=dict(rows=64),
    more=dict(steps=304),  # toyif's 64 steps, plus the 240 of ppo.py's toyif
    more64=dict(steps=248),                                # 8 plus 240
    # the claims on optimisers: a small model of bytes, the same AdamW for all that is no block
    # matrix
    race=dict(tokenizer="bytes", model="2x64", context=64, batch=32, micro=32, steps=120, warmup=12,
              schedule="wsd", cooldown=0.3, eval_every=15, save_every=1000, keep=1, aux_lr=3e-3,
              aux_decay=0.1, target=2.30),               # target: the tuned AdamW's at about 90 %
    one_lr=dict(aux_lr=0.0),
    no_ns=dict(ns_steps=0),                                # Muon without Newton-Schulz: the control
    every40=dict(every=40),                                # a basis lasts a third of the race
    random_basis=dict(basis="random"),
    int4=dict(store="int4"),
    nearest=dict(rounding="nearest"),
    decay3=dict(weight_decay=3.0), decay10=dict(weight_decay=10.0), decay30=dict(weight_decay=30.0),
    forget=dict(data="arithmetic", init="base:pretrain,race", watch="stdlib", context=64, rows=4000,
                steps=150, warmup=10, schedule="linear", eval_every=150, weight_decay=0.0,
                save_every=1000),
    lr3e4=dict(lr=3e-4), lr1e3=dict(lr=1e-3), lr3e3=dict(lr=3e-3), lr12e3=dict(lr=0.012),
    # on numbers and sparsity: the race at a calmer rate, so that rounding shows and not where a run
    # drifts to
    calm=dict(lr=1e-3, aux_lr=0.0, steps=240, eval_every=240, target=0.0),
    long=dict(steps=400, eval_every=400),
    bits2=dict(bits=2), never=dict(fraction=-1.0), apart=dict(fuse=False),
    light=dict(batch=16, steps=200),
    **{f"last{x}": dict(fraction=x / 100) for x in (5, 10, 20, 40, 70, 100)},
    **{f"level{i}": dict(level=i) for i in range(3)}, fp6=dict(format="fp6"),
    mxfp4=dict(format="mxfp4"),
    floored=dict(exponent="quest_floor"), backward_nearest=dict(backward="nearest"),
    deep=dict(model="3x64"), shallow=dict(model="1x64"), sparsity80=dict(sparsity=0.8),
    **{f"prune{a}_{b}": dict(begin=a/100, end=b/100)
       for a, b in ((0, 50), (50, 100), (100, 100), (0, 0))},
    **{f"steps{n}": dict(steps=n, eval_every=n) for n in (316, 164, 78, 389)},
    from_random=dict(start="random"), no_columns=dict(columns=0.0), no_phi=dict(phi="identity"),
)
PRESETS |= ARMS
SIZES = ("tiny",)                # presets that a run hands on to the base that it makes

CURVES = {"nats per token": ["loss", "val_loss", "ood_loss"],
          "bits per byte": ["val_bpb", "ood_bpb"], "learning rate": ["lr"]}

# --- losses: a number a scored token, [B, T], or a row, [B]; the loop divides by the whole step's -
# Positional arguments name what a loss reads, and only that is computed: logp, mask, ref_logp (of
# the start), kl (of the teacher's distribution) [B, T]; logits, teacher, other [N, V] of scored
# tokens; a row's fields.


def nll(logp):
    """Cross-entropy: the negative log-probability of every scored token.   [B, T] -> [B, T]"""
    return -logp


PHI = dict(tv=lambda z: z, chi2=lambda z: z - z * z / 4, hellinger=lambda z: (z / (1 + z)),
           js=lambda z: torch.log(2 - torch.exp(-z)))
FLOOR = dict(tv=-math.inf, chi2=-math.inf, hellinger=-0.9, js=-0.69)


def implicit(logp, ref_logp, *, phi: Literal[*PHI] = "chi2", beta: Positive = 0.1):
    """SFT as implicit reward (2507.00018), a concave φ of inverse-Q learning:  -φ(ζ),  ζ = β Σ log
    π/π_ref.

    φ: tv ζ (SFT, rows weighing alike);  chi2 ζ - ζ²/4 (stops at ζ = 2);  hellinger ζ/(1+ζ), ζ >
    -.9; js log(2 - e^-ζ), ζ > -.69. All have slope 1 at 0. ours: the family and β, the paper's own
    form could not be checked; its practical finding is a smaller learning rate. -> [B]
    """
    if phi not in PHI:
        raise UserError(f"--phi {phi}: choose from {', '.join(PHI)}")
    return -PHI[phi]((beta * (logp - ref_logp).sum(1)).clamp(min=FLOOR[phi]))


def unlikelihood(logp, good, *, alpha=1.0):
    """2302.08582: -log p on tokens of good rows, -α log(1 - p) on the others.   [B, T], good [B] ->
    [B, T]"""
    return torch.where(good[:, None] > 0, -logp,
                       -alpha * torch.log((-torch.expm1(logp)).clamp(min=1e-20)))


def rwr(logp, score, *, temperature: Positive = 0.5):
    """Reward-weighted regression (2302.08582):  -e^(R/β) log p.   score [B], standardised over the
    data

    ours: the standardised score, and β (10 in the paper, which on [0, 1] is nearly likelihood)."""
    return -logp * (score / temperature).exp()[:, None]


def glow(logp, mask, before, *, alpha: Positive = 2.0, beta=10.0):
    """GLOW (2601.04992): weight clamp(α (1 - σ(β Δ)), .5, 5),  Δ = a row's mean loss at its last
    visit - now.

    before [B]: that loss, NaN at the first visit (weight 1). α = 2: Δ = 0 has weight 1. No gradient
    to it.
    """
    now = -(logp * mask).sum(1).detach() / mask.sum(1)                                   # [B]
    w = (alpha * torch.sigmoid(-beta * (before - now))).clamp(0.5, 5.0)
    return -logp * torch.where(before.isnan(), 1.0, w)[:, None]


def reweighted(logp, mask, weight, *,
               rule: Literal["linupper", "quadratic", "extremes"] = "linupper",
               spread: Positive = 1.0):
    """2502.06733:  Σ_i w_i ℓ_i,  ℓ mean loss of a row, w of batch_weights(rule, spread), mean
    1.   -> [B]

    ours: no burn-in (1,000 unweighted steps in the paper)."""
    return -weight * (logp * mask).sum(1) / mask.sum(1)


def batch_weights(losses, *, rule="linupper", spread=1.0):
    """softmax(s/r) over the batch's rows, r the spread, times their number.   losses [B] -> [B]

    l = losses scaled to [-1, 1];  s: linupper min(l + 1, 1) (drop the easy, cap the
    hard);  quadratic 1 - l²; extremes |l|.
    """
    l = 2 * (losses - losses.min()) / (losses.max() - losses.min()).clamp(min=1e-6) - 1
    rules = dict(linupper=lambda: (l + 1).clamp(max=1), quadratic=lambda: 1 - l
                 * l, extremes=lambda: l.abs())
    if rule not in rules:
        raise UserError(f"--rule {rule}: choose from {', '.join(rules)}")
    return torch.softmax(rules[rule]() / spread, 0) * len(losses)


def dckd(logp, kl, good, *, lam=1.0):
    """DCKD (2502.17927):  NLL of the chosen + λ KL(π_teacher||π) on both sides' tokens.   [B, T]

    ours: all terms are divided by the step's tokens together, here and in adpa."""
    return -logp * (good[:, None] > 0) + lam * kl


def adpa(logp, mask, good, logits, teacher, other, *, gamma=1.0):
    """ADPA (2502.17927): NLL of the chosen - γ Σ_a π(a) [log π_dpo(a) - log π_start(a)] on own
    samples.

    logits [N, V] of the policy, teacher the DPO-trained model, other its own start, at the N scored
    tokens -> [B, T]"""
    gain = torch.log_softmax(teacher, -1) - torch.log_softmax(other, -1)                 # [N, V]
    value = (torch.softmax(logits, -1) * gain).sum(-1)                                   # [N]
    value = torch.zeros_like(logp).masked_scatter(mask > 0, value)                       # [B, T]
    return torch.where(good[:, None] > 0, -logp, -gamma * value)


def aligndistil(mask, logits, teacher, other, *, beta: Positive = 0.1, beta2=10.0):
    """AlignDistil (2503.02832):  (β/w) KL(π||softmax(z_dpo + w (z_dpo - z_rev))).

    w = β₂ ‖p_dpo - p_rev‖₁ + .001;  other: a model trained by DPO on the reversed pairs. Both are
    frozen; mean over a row's tokens -> [B]"""
    w = beta2 * (torch.softmax(teacher, -1) - torch.softmax(other, -1)).abs().sum(-1) + 1e-3   # [N]
    target = torch.log_softmax(teacher + w[:, None] * (teacher - other), -1)             # [N, V]
    log_p = torch.log_softmax(logits, -1)
    loss = beta / w * (log_p.exp() * (log_p - target)).sum(-1)                           # [N]
    return torch.zeros_like(mask).masked_scatter(mask > 0, loss).sum(1) / mask.sum(1)    # [B]


LOSSES = dict(nll=nll, implicit=implicit, unlikelihood=unlikelihood, rwr=rwr, glow=glow,
              reweighted=reweighted, dckd=dckd, adpa=adpa, aligndistil=aligndistil)

# --- claims ---------------------------------------------------------------------------------------


def versus(*pairs):
    """Tests 'a < b' of arms: {label: contrast}."""
    return {f"{a} < {b}": {a: 1, b: -1} for a, b in pairs}


COST = ("val_loss", "reached", "seconds_to", "state_bytes", "opt_share", "ns_share")
SHARES = dict(never=",never", formula="", all=",last100") | {
    f"last {x} %": f",last{x}" for x in (5, 10, 20, 40, 70)}
OTHER_TIMES = {  # and the steps that cost as much as 240 of 25 to 75 %, from prune_at
    "0 to 50 %": ("prune0_50", 316), "50 to 100 %": ("prune50_100", 164),
    "at the end": ("prune100_100", 78), "from the start": ("prune0_0", 389)}
TUNE = ("lr", 2.0, "tune_loss")          # validation rows that no other number comes from
CLAIMS = dict(
    normuon=Claim(
        "NorMuon needs fewer steps than Muon, and Muon fewer than AdamW, to the same validation loss",
        "2510.05491: 21.74 % more efficient than Adam and 11.31 % than Muon at 1.1 B parameters",
        {"AdamW, one lr": "pretrain,adamw,race,one_lr", "AdamW": "pretrain,adamw,race",
         "NorMuon": "pretrain,normuon,race,lr12e3", "Muon": "pretrain,muon,race,lr12e3",
         "Muon, no NS": "pretrain,muon,race,no_ns,lr12e3",
         "SOAP": "pretrain,soap,race", "Shampoo": "pretrain,shampoo,race",
         "Dion": "pretrain,dion,race",
         "Lion": "pretrain,lion,race", "sign-SGD": "pretrain,signsgd,race",
         "Adam-mini": "pretrain,adam_mini,race"},
        "steps_to", versus(("NorMuon", "Muon"), ("Muon", "AdamW"), ("NorMuon", "AdamW"),
                           ("NorMuon", "Muon, no NS")),
        better="lower", also=COST, tune=TUNE, curve="val_loss"),
    lowrank=Claim(
        "Fira, APOLLO and FRUGAL reach a lower loss than GaLore with no more state; "
        "APOLLO-Mini beats sign-SGD",
        "2410.01623, 2412.05270, 2411.07837: each reports lower perplexity than GaLore in pre-training",
        {"AdamW": "pretrain,adamw,race", "GaLore": "pretrain,galore,race,every40",
         "GaLore, random": "pretrain,galore,race,every40,random_basis",
         "Fira": "pretrain,fira,race,every40",
         "APOLLO": "pretrain,apollo,race,every40",
         "APOLLO-Mini": "pretrain,apollo_mini,race,every40",
         "FRUGAL, columns": "pretrain,frugal_columns,race,every40",
         "FRUGAL, blocks": "pretrain,frugal,race,every40",
         "GradNormLoRP": "pretrain,gradnormlorp,race,every40",
         "Q-GaLore, int8": "pretrain,qgalore,race,every40",
         "sign-SGD": "pretrain,signsgd,race"},
        "val_loss", versus(("Fira", "GaLore"), ("APOLLO", "GaLore"), ("FRUGAL, columns", "GaLore"),
                           ("APOLLO-Mini", "sign-SGD"), ("GaLore", "GaLore, random"))
        | {"Q-GaLore < 1.02 GaLore": {"Q-GaLore, int8": 1, "GaLore": -1.02}},
        better="lower", also=("steps_to", *COST[1:]), tune=TUNE, curve="val_loss"),
    lion=Claim(
        "Lion with decay λ keeps every weight of the matrices within 1/λ, "
        "and fills that box when it is small",
        "2310.05898: Lion minimises the loss subject to |W|_inf <= 1/λ",
        {f"{name}, λ {x}": f"pretrain,{name.lower()},race,decay{x},lr1e3" for name, x in (
            ("Lion", 3), ("Lion", 10), ("Lion", 30), ("AdamW", 30), ("Muon", 30))},
        "box", {f"Lion, λ {x}: inside": {f"Lion, λ {x}": 1, "": -1.001} for x in (3, 10, 30)}
        | {"Lion, λ 30: the wall is reached": {"Lion, λ 30": -1, "": 0.95}},
        better="lower", also=("at_wall", "val_loss")),
    eco=Claim(
        "ECO trains weights that exist only in 4 bits to within 1 % of float32, "
        "where plain rounding is worse",
        "2601.22101: matches training with master weights from 30 M to 2.1 B parameters (second-hand)",
        {"AdamW, float32": "pretrain,adamw,race", "ECO, int4": "pretrain,eco,race,int4",
         "AdamW, int4, stochastic": "pretrain,adamw,race,int4",
         "AdamW, int4, nearest": "pretrain,adamw,race,int4,nearest",
         "ECO, int4, nearest": "pretrain,eco,race,int4,nearest"},
        "val_loss", {"ECO < 1.01 float32": {"ECO, int4": 1, "AdamW, float32": -1.01}}
        | versus(("ECO, int4", "AdamW, int4, stochastic"),
                 ("AdamW, int4, stochastic", "AdamW, int4, nearest")),
        better="lower", also=("steps_to", *COST[1:]), tune=TUNE),
    hft=Claim(
        "Half fine-tuning forgets less than full fine-tuning at the same learning rate",
        "2404.18466: less forgetting, and no worse on the new task (second-hand)",
        {f"{name}, lr {lr}": f"{preset},forget,{key}"
         for lr, key in (("3e-4", "lr3e4"), ("1e-3", "lr1e3"), ("3e-3", "lr3e3"))
         for name, preset in (("full", "adamw"), ("HFT", "hft"))},
        "watch_loss", versus(*((f"HFT, lr {lr}", f"full, lr {lr}")
                               for lr in ("3e-4", "1e-3", "3e-3"))),
        better="lower", also=("val_loss",)),
    qat=Claim(
        "At 2 bits rounding weights in the last steps of training beats rounding them at the end, "
        "and the paper's share of the steps is as good as any",
        "2509.22935: the optimal share follows from tokens per byte of weights, exp(-6.73 / ln S)",
        {f"{name}, 2 bits": f"pretrain,adamw,race,qat,calm,long,bits2{preset}"
         for name, preset in SHARES.items()}
        | {f"{name}, 4 bits": f"pretrain,adamw,race,qat,calm,long{SHARES[name]}"
           for name in ("never", "formula", "last 20 %", "all")}
        | {f"last {x} %, cooldown 30 %, 2 bits": f"pretrain,adamw,race,qat,calm,long,bits2,last{x},apart"
           for x in (20, 40)},
        "saved_loss", versus(("last 20 %, 2 bits", "never, 2 bits"),
                             ("last 20 %, 2 bits", "all, 2 bits"),
                             *(("formula, 2 bits", f"{x}, 2 bits") for x in (
                                 "last 5 %", "last 10 %", "last 20 %", "last 40 %", "last 70 %",
                                 "all")),
                             ("last 20 %, 4 bits", "never, 4 bits"),
                             ("last 20 %, 4 bits", "all, 4 bits")),
        better="lower", also=("val_loss", "quantised")),
    lowbit=Claim(
        "Training with all products in INT8 costs nothing, in MXFP4 less with Quartet than without",
        "2501.02625, 2505.14669: INT8 and MXFP4 training near full precision from 30 M parameters up",
        {"float32": "pretrain,adamw,race,calm,light",
         **{f"HALO {level}, {name}": f"pretrain,adamw,race,halo,calm,light,level{level}{preset}"
            for name, preset in (("INT8", ""), ("FP6", ",fp6")) for level in (0, 1, 2)},
         "MXFP4": "pretrain,adamw,race,halo,calm,light,level0,mxfp4",
         "Quartet": "pretrain,adamw,race,quartet,calm,light",
         "Quartet, nearest backward": "pretrain,adamw,race,quartet,calm,light,backward_nearest",
         "Quartet, floored scale": "pretrain,adamw,race,quartet,calm,light,floored"},
        "val_loss", {"HALO 2, INT8 < 1.005 float32": {"HALO 2, INT8": 1, "float32": -1.005}}
        | versus(("HALO 1, FP6", "HALO 0, FP6"), ("Quartet", "MXFP4"),
                 ("Quartet", "Quartet, floored scale"), ("Quartet", "Quartet, nearest backward")),
        better="lower", also=("saved_loss",)),
    lost=Claim(
        "LOST's initialisation, its dense columns and φ each help at equal parameters",
        "2508.02668: better than low-rank pre-training at equal memory, close to full rank (second-hand)",
        {"dense": "pretrain,adamw,race,calm"}
        | {f"{a}, {b}, {c}": f"pretrain,adamw,race,lost,calm{x}{y}{z}"
           for a, x in (("SVD", ""), ("random", ",from_random"))
           for b, y in (("columns", ""), ("no columns", ",no_columns"))
           for c, z in (("φ", ""), ("no φ", ",no_phi"))},
        "val_loss", versus(*(("SVD, columns, φ", x)
                             for x in ("random, columns, φ", "SVD, no columns, φ",
                             "SVD, columns, no φ", "random, no columns, no φ"))),
        better="lower"),
    sparse=Claim(
        "Pruning between 25 and 75 % of the compute beats other times at equal compute, "
        "and costs what a dense model of the average size does at equal tokens, too",
        "2501.12486: 25 to 75 % is near the best; one scaling law with the average size (abstract)",
        {"25 to 75 %": "pretrain,adamw,race,journey,calm,deep,sparsity80",
         "dense, average size": "pretrain,adamw,race,calm,shallow",
         "dense": "pretrain,adamw,race,calm,deep"}
        | {name + said: f"pretrain,adamw,race,journey,calm,deep,sparsity80,{preset}{length}"
           for name, (preset, steps) in OTHER_TIMES.items() for said, length in (
               ("", f",steps{steps}"), (", equal tokens", ""))},
        "val_loss", versus(*(("25 to 75 %", name + said) for name in OTHER_TIMES for said in (
            "", ", equal tokens")))
        | {"25 to 75 % < 1.01 dense, average size": {"25 to 75 %": 1,
                                                     "dense, average size": -1.01}},
        better="lower"))

# --- data -----------------------------------------------------------------------------------------


def held(c, tok, split):
    """rows() of a held-out split; of a file of pairs, the chosen sides of its own held-out
    pairs."""
    if c.feedback not in PAIRS or c.data in ("toyif", "ring"):
        return tasks.rows(c, tok, split)
    found = prefs.encode_pairs(prefs.pair_sets(c.data)[1][split], tok, c.context, f"{split} pairs",
                               c.chat)
    return [(r["prompt"], r["chosen"]) for r in found]


# feedback: (c, tok, model, generator) -> rows as above, and of each what a loss or the loop reads
# of it


def demos(c, tok, model, generator):
    """Demonstrations, or windows of a corpus, as they are."""
    data = tasks.rows(c, tok, "train")
    return data, [{} for _ in data]


def scored(c, tok, model, generator, *, share: Range("(0, 1]") = 0.5):
    """Demonstrations with the task's reward of each: score, standardised; good 1.0 for the best
    `share`, of equal ones the first."""
    if text.is_corpus(c.data):
        raise UserError(f"--feedback {c.feedback}: {c.data} is a text without scores; take a task, such as "
                        f"--data toyif_base")
    task = tasks.task(c.data)
    problems = task.problems("train", c.rows, c.seed)
    made = [(tok.prompt(p, c.chat), [*tok.encode(task.demo(p)), tok.eos]) for p in problems]
    value = torch.tensor([float(task.reward(p, task.demo(p), True)) for p in problems])  # [rows]
    if value.max() == value.min():
        raise UserError(f"--feedback {c.feedback}: all demonstrations of {c.data} have the reward "
                        f"{value[0]:g}: there is no better half; take a task of mixed quality, such as "
                        f"--data toyif_base")
    good = torch.zeros(len(value))
    good[value.argsort(descending=True, stable=True)[:int(share * len(value))]] = 1.0
    score = (value - value.mean()) / value.std()
    fields = (dict(score=x, good=g) for x, g in zip(score.tolist(), good.tolist()))
    return fitting([(*row, field) for row, field in zip(made, fields)], c)


def fitting(found, c):
    """[(prompt, completion, fields)] -> rows and fields of those that fit the context; tells the
    others."""
    kept = [((p, y), fields) for p, y, fields in found if len(p) + len(y) <= c.context]
    if len(kept) < len(found):
        print(f"{c.data}: {len(found) - len(kept)} of {len(found)} rows are longer than --context "
              f"{c.context} and left out", flush=True)
    if not kept:
        raise UserError(f"--feedback {c.feedback}: no row fits --context {c.context}; raise it")
    return [row for row, _ in kept], [fields for _, fields in kept]


def filtered(c, tok, model, generator, *, share: Range("(0, 1]") = 0.5):
    """Only the best `share` of the demonstrations."""
    kept = [(row, info) for row, info in zip(*scored(c, tok, model, generator, share=share))
            if info["good"]]
    if not kept:
        raise UserError(f"--share {share}: that is no demonstration at all; raise it")
    return [row for row, _ in kept], [info for _, info in kept]


def conditional(c, tok, model, generator, *,
                share: Range("(0, 1]") = 0.5, good_tag=".", bad_tag=",", untagged: Share = 0.01):
    """All demonstrations, a tag behind the prompt: of the best `share` or not; a few have none. The
    tags are for ToyIF's alphabet: give others elsewhere. ours: a tag a row, not a segment; sampling
    bans none."""
    data, infos = scored(c, tok, model, generator, share=share)
    u = torch.rand(len(data), generator=generator).tolist()
    tags = {1.0: tok.encode(good_tag), 0.0: tok.encode(bad_tag)}
    return fitting([(p + (tags[info["good"]] if x >= untagged else []), y, info)
                    for (p, y), info, x in zip(data, infos, u)], c)


def pair_ids(c, tok):
    """The training pairs of a world or a file as ids, both sides with their EOS."""
    found = prefs.pair_sets(c.data, c.rows, seed=c.seed)[0]
    return prefs.encode_pairs(found, tok, c.context, "training pairs", c.chat)


def modes_of(mix):
    """"p,pn" -> ["p", "pn"]; UserError for others than p, n, pn, np."""
    modes = mix.split(",")
    if not set(modes) <= {"p", "n", "pn", "np"}:
        raise UserError(f"--mix {mix}: give some of p, n, pn, np, with commas")
    return modes


def hindsight(c, tok, model, generator, *, good_tag=".", bad_tag=",", mix="p,n,pn,np"):
    """Chain of Hindsight (2302.02676): p good tag and better answer, n bad tag and worse one, pn,
    np both.

    Both answers are scored, their EOS too; tags are not: hole is where the second one stands. ours:
    one mode a pair, tags of one symbol (ToyIF's), and no pre-training loss beside it (0.01 in the
    paper)."""
    tags, out = dict(p=tok.encode(good_tag), n=tok.encode(bad_tag)), []
    modes = modes_of(mix)
    for r in pair_ids(c, tok):
        first, *second = modes[torch.randint(len(modes), (1,), generator=generator).item()]
        side = dict(p=r["chosen"], n=r["rejected"])
        prompt, answer, hole = r["prompt"] + tags[first], list(side[first]), (0, 0)
        if second:
            hole = len(answer), len(answer) + len(tags[second[0]])
            answer += tags[second[0]] + side[second[0]]
        out.append((prompt, answer, dict(hole=hole)))
    return fitting(out, c)


def both(c, tok, model, generator):
    """Both sides of the pairs, good 1.0 and 0.0."""
    found = pair_ids(c, tok)
    return ([(r["prompt"], r[side]) for r in found for side in ("chosen", "rejected")],
            [dict(good=float(side == "chosen")) for r in found for side in ("chosen", "rejected")])


def chosen(c, tok, model, generator):
    """The pairs' chosen sides."""
    found = pair_ids(c, tok)
    return [(r["prompt"], r["chosen"]) for r in found], [dict(good=1.0) for _ in found]


def sampled(c, tok, model, generator):
    """The chosen sides, and for each of their prompts a sample of the model as it starts (good
    0.0)."""
    data, infos = chosen(c, tok, model, generator)
    new = min(tasks.task(c.data).max_new, c.context - max(len(p) for p, _ in data))
    for i in range(0, len(data), 512):
        part = [p for p, _ in data[i:i + 512]]
        roll = generate(model, part, new, generator=generator)
        ids = [t[m > 0].tolist() for t, m in zip(roll.tokens, roll.mask)]
        infos += [dict(good=0.0) for _ in part]
        data = data + list(zip(part, ids))
    return data, infos


FEEDBACK = dict(none=demos, scored=scored, filtered=filtered, conditional=conditional,
                hindsight=hindsight,
                both=both, chosen=chosen, sampled=sampled)


def new_tokenizer(c):
    """The tokenizer of a new model; a BPE is trained once on the training documents, in
    data/cache/."""
    if c.tokenizer != "bpe":
        worlds = dict(toyif=prefs.tokenizer, ring=prefs.ring_tokenizer,
                      chain=chains.chain_tokenizer)
        return worlds[c.tokenizer]() if c.tokenizer in worlds else tokenizer.get(c.tokenizer)
    if text.is_corpus(c.data):
        documents = text.documents(c.data, "train")
    else:
        task = tasks.task(c.data)
        documents = [p["prompt"] + task.demo(p) for p in task.problems("train", c.rows, c.seed)]
    name = hashlib.sha256("\0".join(documents).encode(errors="replace")).hexdigest()[:12]
    folder = text.CACHE / f"bpe-{c.vocab}-{name}"
    with lock(folder):
        if not folder.exists():
            sample = documents[:: max(1, sum(map(len, documents)) // 4_000_000)]
            made = Path(f"{folder}.tmp")
            tokenizer.train_bpe(sample, c.vocab).save(made)
            made.rename(folder)
    return tokenizer.Tokenizer.load(folder)


# --- LoRAM: LoRA trained on a pruned model --------------------------------------------------------


def loram(model, generator, *, rank: Count = 8, alpha=0.0, ratio: Fraction = 0.5, first=0, last=0):
    """LoRAM (2502.13533): LoRA trained on a model pruned by `ratio` (neurons of the MLP, groups of
    heads that share keys; by their weights' norm), then used on the whole one. first, last: layers
    left whole (4 and 2 for the paper's 70B). recover() brings the adapters back."""
    if not 0 <= ratio < 1:
        raise UserError(f"--ratio {ratio}: expected a share from 0 up to 1")
    if model.config.moe or any(isinstance(m, PackedLinear) for m in model.modules()):
        raise UserError("--peft loram prunes dense float layers: this checkpoint has experts or packed ones")
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
        weight = att.v_proj.weight.view(c.num_key_value_heads, -1).norm(dim=1)
        heads = weight.topk(max(1, round(len(weight) * (1 - ratio)))).indices.sort()[0]
        keys = (heads[:, None] * hd + torch.arange(hd, device=heads.device)).flatten()
        queries = (heads[:, None] * group * hd
                   + torch.arange(group * hd, device=heads.device)).flatten()
        rows = dict(q_proj=(queries, None), k_proj=(keys, None), v_proj=(keys, None),
                    o_proj=(None, queries))
        out |= {f"layers.{i}.self_attn.{k}": v for k, v in rows.items()}
        rows = dict(gate_proj=(neurons, None), up_proj=(neurons, None), down_proj=(None, neurons))
        out |= {f"layers.{i}.mlp.{k}": v for k, v in rows.items()}
    return out


def pruned(linear, rows, cols):
    """The layer without the outputs and inputs that are not kept."""
    W, b = linear.weight.detach(), linear.bias
    W, b = (W, b) if rows is None else (W[rows], None if b is None
                                        else nn.Parameter(b.detach()[rows]))
    W = W if cols is None else W[:, cols]
    out = nn.Linear(W.size(1), W.size(0), b is not None, device="meta")
    out.weight, out.bias = nn.Parameter(W.clone()), b
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


PEFT = PEFT | dict(loram=loram)

# --- linear layers: how they compute (data/numerics.py) -------------------------------------------


def in_blocks(model, make):
    """make(layer) in the place of every linear layer of the blocks; UserError for packed ones."""
    if any(isinstance(m, PackedLinear) for m in model.modules()):
        raise UserError("packed layers are frozen: start from the checkpoint that was compressed")
    return replace_linears(model, lambda name, layer: make(layer))


def as_they_are(model, generator):
    """Float weights, the device's matmul."""
    return model


def qat(model, generator, *, bits: Range("[1, 8]") = 4,
        fraction: Range("[-1, 1]") = 0.0, fuse=True):
    """Quantisation-aware training (2509.22935): weights rounded to `bits` (1-8), a scale an output,
    in the last `fraction` of the steps (0: the paper's optimum for these tokens; -1: never); saved
    rounded.

    fuse: the cooldown of --schedule wsd lasts as long."""
    if fraction != -1:
        numerics.within("fraction", fraction, 0, 1)
    return in_blocks(model, lambda layer: numerics.QATLinear(layer, bits))


def halo(model, generator, *, level: Literal[0, 1, 2] = 2,
         format: Literal[*numerics.FORMATS] = "int8"):
    """HALO (2501.02625): the three products in int8, fp8 or fp6 (or plain mxfp4, float32), rotated:
    level 0 not, 1 forward, 2 the input's gradient, too. Saved: the float32 weights."""
    return in_blocks(model, lambda layer: numerics.HaloLinear(layer, level, format))


def quartet(model, generator, *, exponent: Literal[*numerics.EXPONENTS] = "quest",
            backward: Literal["stochastic", "nearest"] = "stochastic"):
    """Quartet (2505.14669): the three products in MXFP4. exponent: of a group, a row of
    numerics.EXPONENTS; backward: stochastic, or nearest. Saved: the float32 weights."""
    return in_blocks(model, lambda layer: numerics.QuartetLinear(
        layer, torch.randint(2 ** 31, (), generator=generator).item(), exponent, backward))


def lost(model, generator, *, size: Range("(0, 1]") = 0.55, columns: Share = 0.05,
         gamma: Share = 0.7, phi: Literal[*numerics.PHI] = "silu",
         start: Literal["svd", "random"] = "svd"):
    """LOST (2508.02668): `size` of the parameters, a share `columns` of inputs dense, the rest low
    rank.

    ours: size, at which a square layer has the rank n/4 and 5 % of the columns. With --phi identity
    a plain checkpoint is saved; with silu, folders that only this run's --resume reads."""
    def make(layer):
        rank, k = numerics.lost_sizes(layer.in_features, layer.out_features, size, columns)
        return numerics.LostLinear(layer, rank, k, generator, gamma, phi, start)
    return in_blocks(model, make)


LINEARS = dict(plain=as_they_are, qat=qat, halo=halo, quartet=quartet, lost=lost)
AXES = dict(loss=LOSSES, feedback=FEEDBACK, optimiser=RULES, update=dict(optimiser=optimiser),
            schedule=SCHEDULES, peft=PEFT, linear=LINEARS, prune=numerics.PRUNING, store=STORES,
            kernels=kernels.MODES)

# --- start ----------------------------------------------------------------------------------------


def configured(presets, like="", **changes):
    """What base() asks for: the presets' names, the command line, (c, f)."""
    if not presets.strip(","):
        raise UserError("base: names no preset: write base:PRESETS, for example base:pretrain")
    names = [*presets.split(","), *(s for s in SIZES if s in like.split(","))]
    argv = ["--config", ",".join(names), *(f"--{k}={v}" for k, v in changes.items())]
    return names, argv, configure(Config, PRESETS, AXES, __doc__, argv)


def fingerprint(c, f):
    """Eight digits of a run's settings and of the base it starts from."""
    said = repr(sorted(settings(replace(c, device=""), f).items()))
    if c.init.startswith("base:"):
        said += fingerprint(*configured(c.init.removeprefix("base:"), c.config)[2])
    return hashlib.sha256(said.encode()).hexdigest()[:8]


def base(presets, like="", **changes):
    """The checkpoint folder that `sft.py --config presets` leaves, made now if it is not under
    out/sft/.

    like: the asking run's own --config, whose size preset (tiny) is handed on. changes: further
    keys, e.g. seed=1. The folder's name carries a hash of all settings, its own base's too, so that
    different ones never share a checkpoint (delete it by hand after changing the code). On several
    ranks all make it together.
    """
    names, argv, (c, f) = configured(presets, like, **changes)
    folder = Path("out/sft") / f"base-{'-'.join(names)}-{fingerprint(c, f)}"
    first = rank() == 0
    with lock(folder) if first else nullcontext():
        if share(result(folder) is None):
            if first:
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
        return base(presets, like,
                    **changes) if make else longest(configured(presets, like, **changes)[2][0])
    return path if make else peek(path, option=option).max_position_embeddings


def longest(c):
    """The context of the model that a run of these settings leaves: twice --context, or its own
    base's."""
    return find(c.init, c.config, make=False) if c.init else 2 * c.context


def start(c, origin):
    """The model and tokenizer that training starts from: the folder `origin`'s, or new ones if it
    is ''."""
    if not origin:
        tok = new_tokenizer(c)
        return init(preset(c.model, tok, 2 * c.context, c.family), c.seed).to(c.device), tok
    model, tok = load(origin, c.device)
    if not isinstance(model, Transformer):
        raise UserError(f"--init {c.init} is a reward model; sft.py needs a language model")
    return model, tok


def open_frozen(c, f, origin, tok):
    """What a loss reads besides the policy: {"start", "teacher", "other"}, frozen, those that it
    names."""
    names, out = needs(f.loss), {}
    if "ref_logp" in names:
        out["start"] = start(c, origin)[0]
    for key in ("teacher", "other"):
        if key in names or key == "teacher" and "kl" in names:
            path = getattr(c, key)
            out[key], words = load(checkpoint(find(path, c.config, device=c.device)), c.device)
            if words.tokens != tok.tokens or not isinstance(out[key], Transformer):
                raise UserError(f"--{key} {path}: need a language model with the tokenizer of {c.init}")
    sizes = {key: model.config.vocab_size for key, model in out.items()}
    if len(set(sizes.values())) > 1:
        raise UserError(f"their vocabularies are padded to different sizes, {sizes}: distil from one family")
    return {key: model.requires_grad_(False) for key, model in out.items()}


def provide(f, model, frozen, tokens, mask, fields):
    """What the loss names, of these rows; fields: a row's own numbers by name.   -> {name:
    tensor}"""
    names, have = needs(f.loss), dict(mask=mask)
    where = mask[:, 1:] > 0
    if {"kl", "logits"} & set(names):
        hidden = model(tokens)[:, :-1][where]                                            # [N, D]
    if "logp" in names:
        have["logp"] = token_logprobs(model, tokens, mask)                               # [B, T]
    with torch.no_grad():
        if "ref_logp" in names:
            have["ref_logp"] = token_logprobs(frozen["start"], tokens, mask)             # [B, T]
        theirs = {key: frozen[key](tokens)[:, :-1][where] for key in ("teacher", "other")
                  if key in frozen}
    if "logits" in names:
        have["logits"] = model.logits(hidden).float()                                    # [N, V]
        have |= {key: frozen[key].logits(h).float() for key, h in theirs.items()}
    if "kl" in names:
        kl = kernels.linear_distill(hidden, model.head, theirs["teacher"], frozen["teacher"].head)
        kl = torch.zeros_like(mask[:, 1:]).masked_scatter(where, kl.float())
        have["kl"] = nn.functional.pad(kl, (1, 0))                                       # [B, T]
    for name in names:
        if name not in have and name not in fields:
            raise UserError(f"--loss {f.loss.func.__name__} reads {name}: this --feedback does not give it")
    return {name: have[name] if name in have else torch.tensor(fields[name]).to(mask)
            for name in names}


def scored_tokens(data, infos, ids, tok, c):
    """tokens, mask [b, T] of these rows; the tag between a row's two answers is not scored."""
    tokens, mask = collate([data[j] for j in ids], tok.pad or 0, c.device)
    for k, j in enumerate(ids):
        if "hole" in infos[j]:
            a, b = (len(data[j][0]) + x for x in infos[j]["hole"])
            mask[k, a:b] = 0.0
    return tokens, mask


def row_losses(model, data, infos, ids, tok, c):
    """Mean loss of each row's scored tokens, without gradient.   -> [rows]"""
    out = []
    with torch.no_grad(), autocast(c.device, c.dtype):
        for i in range(0, len(ids), c.micro):
            tokens, mask = scored_tokens(data, infos, ids[i:i + c.micro], tok, c)
            out.append(-token_logprobs(model, tokens, mask).sum(1) / mask.sum(1))
    return torch.cat(out)


# --- evaluate -------------------------------------------------------------------------------------


@torch.no_grad()
def evaluate(model, tok, data, c, limit=256):
    """Mean nats per scored token, and bits per byte of scored text, over the first `limit` rows."""
    data, nats, count, size = data[:limit], 0.0, 0.0, 0
    for i in range(0, len(data), c.micro):
        tokens, mask = collate(data[i:i + c.micro], tok.pad or 0, c.device)
        with autocast(c.device, c.dtype):
            nats -= token_logprobs(model, tokens, mask).sum().item()
        count += mask.sum().item()
        size += sum(len(tok.tokens[t]) for t in tokens[mask > 0].tolist() if t not in tok.hidden)
    return dict(loss=nats / max(count, 1), bpb=nats / math.log(2) / max(size, 1))


def show(model, tok, task, problems, c, run, tag=()):
    """Print three completions of held-out prompts (and a tag); -> the task's metric over all, at
    T=1."""
    g = torch.Generator().manual_seed(c.seed)
    prompts = [[*tok.prompt(p, c.chat), *tag] for p in problems]
    room = model.config.max_position_embeddings - max(map(len, prompts))
    roll = generate(model, prompts, min(task.max_new, room), generator=g)
    answers = [tok.decode(ids) for ids in roll.completions()]
    for p, a in list(zip(problems, answers))[:3]:
        run.say(f"  prompt     {p['prompt']!r}\n  model      {a!r}\n  reference  {task.demo(p)!r}")
    scores = [task.reward(p, a, f) for p, a, f in zip(problems, answers, roll.finished.tolist())]
    return {task.metric: sum(scores) / len(scores)}


# --- train ----------------------------------------------------------------------------------------


def step_law(N, D):
    """Step Law, 2503.04715: AdamW's learning rate and batch in tokens for pre-training N
    non-embedding parameters on D tokens:  1.79 N^-0.713 D^0.307,  0.58 D^0.571. Fitted on far
    larger models."""
    return 1.79 * N ** -0.713 * D ** 0.307, 0.58 * D ** 0.571


def suggest(model, data, c):
    """Step Law's learning rate and batch for pre-training this model on the tokens that this run
    will see."""
    N = sum(p.numel() for n, p in model.named_parameters() if "embed" not in n
            and "lm_head" not in n)
    mean = sum(len(p) + len(r) for p, r in data) / len(data)                          # tokens a row
    D = mean * (c.steps * c.batch or c.epochs * len(data))
    lr, batch = step_law(N, D)
    print(f"Step Law (2503.04715) for AdamW, {N:,} parameters without embeddings, {D:,.0f} tokens: "
          f"lr {lr:.2e}, batch {batch:,.0f} tokens (--lr {lr:.1e} --batch {max(1, round(batch / mean))}; "
          f"this run has {c.lr:g} and {c.batch}). It was fitted on far larger models.",
          flush=True)
    return dict(lr=lr, batch_tokens=batch)


def box(model, decay):
    """The matrices' largest |W| times λ, and the share of weights within 5 % of the wall at 1/λ."""
    W = torch.cat([p.detach().flatten() for n, p in model.named_parameters()
                   if "layers." in n and p.dim() == 2])
    return dict(box=W.abs().max().item() * decay,
                at_wall=(W.abs() * decay > 0.95).float().mean().item())


def reached(rows, target):
    """When val_loss fell to the target, on a straight line between evaluations: steps, seconds of
    training; a run that never got there has its whole length, and reached 0."""
    seen = [r for r in rows if "val_loss" in r]
    for before, r in zip([None, *seen], seen):
        if r["val_loss"] <= target:
            share = 1.0 if before is None else ((before["val_loss"] - target)
                                                / (before["val_loss"] - r["val_loss"]))
            at = [(0.0 if before is None else before[k]) * (1 - share) + r[k] * share
                  for k in ("step", "seconds")]
            return dict(steps_to=at[0], seconds_to=at[1], reached=1.0)
    return dict(steps_to=seen[-1]["step"], seconds_to=seen[-1]["seconds"], reached=0.0)


def check_layers(c, ranks):
    """UserError for what --linear and --prune do not go with."""
    asked = [f"--linear {c.linear}"] * (c.linear != "plain") + [f"--prune {c.prune}"] * (c.prune
                                                                                         != "none")
    for said in asked:
        if ranks > 1:
            raise UserError(f"{said} runs on one rank: start it without torchrun")
        for key, usual in (("peft", "full"), ("store", "float32"), ("compile", False)):
            if getattr(c, key) != usual:
                raise UserError(f"{said} and --{key} {getattr(c, key)} do not go together: leave one out")
    if c.linear == "lost" and c.prune != "none":
        raise UserError(f"--prune {c.prune} cuts matrices, which --linear lost does not have: choose one")


def readers(c, f):
    """{field: (whether this run reads it, what does)} of the fields that not every run reads."""
    names, new, corpus = needs(f.loss), not c.init, text.is_corpus(c.data)
    fields = dict(
        model=(new, "a new model (--init '')"), family=(new, "a new model (--init '')"),
        tokenizer=(new, "a new model (--init '')"),
        vocab=(new and c.tokenizer == "bpe", "a new tokenizer (--init '' --tokenizer bpe)"),
        rows=(not corpus, "demonstrations, and --data is a text"),
        chat=(not corpus or c.watch, "demonstrations, and --data is a text"),
        epochs=(not c.steps, "runs without --steps"),
        warmup=("warmup" in needs(f.schedule), "other schedules"),
        teacher=({"teacher", "kl"} & {*names}, "--loss dckd, adpa or aligndistil"),
        other=("other" in names, "--loss adpa or aligndistil"))
    return fields


PAIRS = ("hindsight", "both", "chosen", "sampled")     # feedback that is made of pairs


def check(c, f, ranks):
    """UserError for all that can be known before anything is made: files, folders, what does not
    combine."""
    names = needs(f.loss)
    for wrong, words in (
            (c.batch % ranks, f"--batch {c.batch} is not a multiple of the {ranks} ranks"),
            (c.store != "float32" and c.peft in ("lora", "bone", "bat", "loram"),
             f"--store {c.store} trains the layers that --peft {c.peft} freezes: choose one"),
            (ranks > 1 and (names != ["logp"] or c.feedback != "none"),
             f"--loss {c.loss} --feedback {c.feedback} run on one rank: start without torchrun"),
            (ranks > 1 and c.store != "float32",
             f"--store {c.store} runs on one rank: start it without torchrun"),
            (c.suggest and c.init.startswith("base:"),
             "--suggest is about pre-training: add --config pretrain")):
        if wrong:
            raise UserError(words)
    check_layers(c, ranks)
    f.prune(0, 1)
    if c.feedback in PAIRS:
        prefs.check_pairs(c.data)
    else:
        tasks.check_data(c.data, is_text=c.feedback == "none")
    if c.feedback == "hindsight":
        modes_of(f.feedback.keywords["mix"])
    if c.watch:
        tasks.check_data(c.watch)
    for key in ("teacher", "other"):
        if key in names or key == "teacher" and "kl" in names:
            if not getattr(c, key):
                raise UserError(f"--loss {c.loss} needs --{key} CHECKPOINT (dpo.py makes such ones)")
            find(getattr(c, key), c.config, make=False, option=f"--{key}")
    if c.init:
        most = find(c.init, c.config, make=False)
        if c.context > most:
            raise UserError(f"--context {c.context} exceeds the {most} tokens of {c.init}: lower it")
    else:                                                        # is --model well written?
        tok = tokenizer.bytes_tokenizer() if c.tokenizer == "bpe" else new_tokenizer(c)
        preset(c.model, tok, 2 * c.context, c.family)


def write(net, tok, folder):
    """save(); a folder of LOST layers with φ gets a model_type that nothing opens: they are no
    matrices."""
    save(net, tok, folder)
    if any(isinstance(m, numerics.LostLinear) for m in net.modules()):
        path = Path(folder, "config.json")
        said = read_json(path)
        path.write_text(json.dumps(said | dict(model_type=f"lost-{said['model_type']}"), indent=2))


def train(c, f):
    """One run: load, loop, log, save. Returns the last evaluation's numbers."""
    me, ranks = start_ranks(c.device)                            # (0, 1) without torchrun
    names = needs(f.loss)
    check(c, f, ranks)
    origin = find(c.init, c.config, device=c.device)  # made before this run's clock starts
    kernels.use(c.kernels)
    if c.suggest:
        model, tok = start(c, origin)
        return suggest(model, tasks.rows(c, tok, "train"), c)
    with Run(c, f, "sft", CURVES) as run:
        whole_in_checkpoint = (c.peft in ("full", "hft") and c.store == "float32"
                               and c.linear == "plain")
        resumed = run.last if run.last and whole_in_checkpoint else None
        model, tok = load(resumed, c.device) if resumed else start(c, origin)
        frozen = open_frozen(c, f, origin, tok)
        sampler = start(c, origin)[0] if resumed and c.feedback == "sampled" else model
        data, infos = f.feedback(c, tok, sampler, torch.Generator().manual_seed(c.seed))
        model = f.peft(f.store(model), torch.Generator().manual_seed(c.seed))
        model = f.linear(model, torch.Generator().manual_seed(c.seed))
        tag = tok.encode(f.feedback.keywords["good_tag"]) if "good_tag" in f.feedback.keywords else []
        held_out = {s: [([*p, *tag], y) for p, y in held(c, tok, s)]
                    for s in tasks.held_out(c.data)}
        visits = (run.state or {}).get("visits", {})  # GLOW: a row's loss when it was last seen
        if c.watch:
            held_out["watch"] = tasks.rows(replace(c, data=c.watch), tok, "val")
        total = c.steps or max(1, math.ceil(len(data) * c.epochs / c.batch))
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        size = sum(p.numel() for p in model.parameters())
        if run.state:
            model.load_state_dict(run.state["adapter"], strict=False)
        whole = shard(model, c.dtype) if ranks > 1 else lambda: model
        opt = f.update(model, f.optimiser, c.lr, c.weight_decay, c.seed)
        if run.state:
            opt.load_state_dict(run.state["opt"])
        forward = torch.compile(model) if c.compile else model
        run.say(f"{run.folder}: {size / 1e6:.2f} M parameters ({trained / 1e6:.2f} M trained), {len(data)} "
                f"rows, {total} steps of {c.batch}, {c.device} {c.dtype}" + f" x {ranks} ranks"
                * (ranks > 1)
                + "; packed layers will be saved dense"
                * (PackedLinear in map(type, model.modules())))
        if c.optimiser in ("eco", "eco_sgd") and c.store == "float32":
            run.say("  eco without --store bfloat16, int8 or int4: nothing is rounded, it is its host")
        for group in opt.param_groups:
            run.say(f"  {name_of(group['rule']):<14} {len(group['params'])} tensors, lr {group['lr']:.3g}, "
                    + (f"decay time {1 / (group['lr'] * group['weight_decay']):.0f} steps"
                       if group["weight_decay"] else "no decay"))
        if data:
            prompt, completion = (tok.decode(ids, False) for ids in data[0])
            run.say(f"  not scored {prompt[-160:]!r}\n  scored     {completion[:160]!r}")

        def plain(net):                                          # what a checkpoint holds
            net = recover(net, start(c, origin)[0]) if hasattr(net, "kept") else net
            return net if whole_in_checkpoint else merge(net)

        def measure():
            rows = {s: evaluate(model, tok, d, c) for s, d in held_out.items() if d}
            return {f"{split}_{k}": v for split, row in rows.items() for k, v in row.items()}

        scores, clock, clipped = {}, (run.state or {}).get("clock", dict(all=0.0, update=0.0)), 0
        now = time.process_time if c.device == "cpu" else time.perf_counter
        seen = dict(steps=total, warmup=c.warmup, lr=c.lr, batch=c.batch,
                    tokens=c.batch * sum(len(r) for _, r in data) / max(1, len(data)))
        # --linear qat: from which step on weights are rounded
        how, schedule = f.linear.keywords, f.schedule
        quantised = numerics.qat_share(model, how.get("fraction", 0.0), total * seen["tokens"])
        rounds_from = total - max(1, round(quantised * total)) if quantised else total + 1
        numerics.begin(model, run.start, run.start >= rounds_from)
        if quantised:
            run.say(f"  weights of {how['bits']} bits from step {rounds_from + 1} on ({quantised:.1%})")
            if how["fuse"] and c.schedule == "wsd":
                schedule = partial(schedule, cooldown=quantised)
        # --prune: the weights that are left
        matrices = {n: p for n, p in model.named_parameters() if n.endswith("_proj.weight")}
        masks = (run.state or {}).get("masks", {})

        def cut(step):
            sparsity = f.prune(step, total)
            masks.update(numerics.prune(matrices, masks, sparsity) if sparsity else {})
            numerics.apply_masks(matrices, masks, opt.stacks)
            return dict(sparsity=sparsity) if c.prune != "none" else {}

        cut(run.start)
        for step in run.steps(total):
            # 1. get data
            began = now()
            numerics.begin(model, step, step >= rounds_from)
            picked = batch_indices(len(data), c.batch, step, c.seed).tolist()
            n = sum(len(data[i][1]) for i in picked)                     # scored tokens of the step
            n -= sum(b - a for i in picked for a, b in [infos[i].get("hole", (0, 0))])
            picked = picked[me::ranks]                                           # this rank's rows
            # 2. score
            loss, aux = 0.0, 0.0
            weight, before = {}, {j: visits.get(j, math.nan) for j in picked}
            if "weight" in names:  # of the whole batch, before any micro-batch
                w = batch_weights(row_losses(forward, data, infos, picked, tok, c),
                                  **f.loss.keywords)
                weight = dict(zip(picked, w.tolist()))
            for i in range(0, len(picked), c.micro):
                ids = picked[i:i + c.micro]
                part = [data[j] for j in ids]
                tokens, mask = scored_tokens(data, infos, ids, tok, c)              # [b, T], [b, T]
                fields = {key: [infos[j][key] for j in ids] for key in infos[ids[0]]} | dict(
                    weight=[weight.get(j, 1.0) for j in ids], before=[before[j] for j in ids])
                if ranks > 1:  # gradients meet after the last micro-batch
                    model.set_requires_gradient_sync(i + c.micro >= len(picked))
                with autocast(c.device, c.dtype):
                    have = provide(f, forward, frozen, tokens, mask, fields)
                    part_loss = f.loss(**have)
                    part_loss = ((part_loss * mask).sum() / n
                                 if part_loss.dim() == 2                            # [b, T], or [b]
                                 else part_loss.sum() / c.batch)
                    ends = torch.tensor([len(p) + len(r) for p, r in part], device=tokens.device)
                    real = torch.arange(tokens.size(1), device=tokens.device) < ends[:,
                                                                                     None]  # [b, T]
                    balance = load_balance_loss(model, real) * len(part) / c.batch
                if "before" in names:
                    visits |= zip(ids, (-have["logp"].detach().sum(1) / mask.sum(1)).tolist())
                total_loss = part_loss + model.config.router_aux_loss_coef * balance
                (total_loss * ranks).backward()                          # FSDP2 averages over ranks
                loss, aux = loss + part_loss.item(), aux + balance.item()
            # 3. update
            numerics.mask_gradients(matrices, masks)
            norm = clip_grad_norm_([p for p in model.parameters() if p.requires_grad], c.clip)
            if ranks > 1:
                norm, both = norm.full_tensor(), torch.tensor([loss, aux], device=c.device)
                dist.all_reduce(both)
                loss, aux = both.tolist()
            set_lr(opt, c.lr * schedule(**{k: (seen | dict(step=step))[k]
                                           for k in needs(schedule)}))
            updating = now()
            opt.step()
            pruned_to = cut(step + 1)
            clock["update"] += now() - updating
            opt.zero_grad()
            clock["all"] += now() - began
            clipped += float(norm) > c.clip
            # 4. tell
            row = dict(loss=loss, norm=norm, lr=opt.param_groups[0]["lr"], tokens=n,
                       seconds=clock["all"])
            row |= (dict(aux=aux) if aux else {}) | pruned_to
            if (step + 1) % c.eval_every == 0 or step + 1 == total:
                run.check(step + 1, model)
                scores = measure()
                row |= scores
            run.log(step + 1, **row)
            if (step + 1) % c.save_every == 0 or step + 1 == total or step + 1 == c.stop:
                net, state = whole(), opt.state_dict()           # collective: every rank takes part
                adapter = adapter_state(net) if net is not None else {}
                adapter |= dict(net.named_buffers()) if c.linear != "plain" else {}
                run.save(step + 1, lambda folder: write(plain(net), tok,
                                                        folder), opt=state, adapter=adapter,
                         clock=clock, visits=visits, masks=masks)
        if c.stop and c.stop < total:
            run.say(f"  paused at step {c.stop}: the same command with --resume, without --stop, goes on")
            return scores
        if run.start >= total:                                   # resumed after its last step
            scores = measure()
        report = memory_report(opt)
        cost = dict(opt_share=clock["update"] / max(clock["all"], 1e-9), ns_share=sum(
            s.ranks.seconds for s in opt.stacks) / max(clock["all"], 1e-9))
        run.say("  state: " + ", ".join(f"{k} {x['bytes'] / x['parameters']:.2f} bytes a parameter"
                                        for k, x in report.items())
                + f";  of a step's time: optimiser {cost['opt_share']:.1%}"
                + f", Newton-Schulz in it {cost['ns_share']:.1%}" * (cost["ns_share"] > 0)
                + f";  clipped steps: {clipped / max(1, total - run.start):.0%}")
        if c.target:                                             # a race: see CLAIMS
            mine = report[c.optimiser]
            scores |= cost | reached(read_log(run.folder), c.target) | dict(
                state_bytes=mine["bytes"] / mine["parameters"], **box(model, c.weight_decay))
            if held_out["val"][256:]:                            # rows that val_loss does not see
                scores |= dict(tune_loss=evaluate(model, tok, held_out["val"][256:], c)["loss"])
        net = whole()
        if c.linear != "plain":
            scores |= dict(saved_loss=evaluate(plain(net), tok, held_out["val"], c)["loss"],
                           quantised=quantised)
        if c.prune != "none":
            zeros = sum((p == 0).sum().item() for p in matrices.values())
            scores |= dict(sparsity=zeros / sum(p.numel() for p in matrices.values()),
                           mean_density=1 - sum(f.prune(s, total) for s in range(total)) / total)
        if not text.is_corpus(c.data) and net is not None:
            task = tasks.task(c.data)
            quality = show(plain(net), tok, task, task.problems("val", 64, c.seed), c, run, tag)
            run.say("  held out: " + "  ".join(f"{k} {v:.3f}"
                                               for k, v in (scores | quality).items()))
            scores |= {f"val_{k}": v for k, v in quality.items()}
        return share(run.finish(**scores))


# --- main -----------------------------------------------------------------------------------------


def main(argv=None):
    """python sft.py …: see the docstring above, or --help."""
    return launch("sft", Config, PRESETS, AXES, CLAIMS, __doc__, train, argv, readers, ranks=True)


if __name__ == "__main__":
    cli(main)
