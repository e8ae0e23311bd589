"""
specdec.py - speculative decoding: train a draft, verify, measure; and other ways to decode.

    python specdec.py                                   # a draft for a small base model, made first
    python specdec.py --config adaspec,docs             # of a task: docstrings from signatures
    python specdec.py --init path/to/7B --draft path/to/0.5B --data gsm8k.jsonl --steps 0 --context 512
    python specdec.py --claim adaspec --seeds 5         # the paper's claim, and at equal data

Map      1 config   2 the rule   3 draft lengths   4 drafters   5 the loop   6 training a draft   7 measure
         8 decode   9 other decoders (data/decoding.py)   10 train   11 claims
Letters  p the target's distribution, q the draft's; G drafted tokens a round; B rows, V vocabulary;
         c = a draft step / a target step, v = a target step over G + 1 tokens / over one
preset      paper          idea
speculative 2211.17192     draft, verify in one pass, keep what the target would have said (the default)
lookup      -              no model: what followed the last words when they stood there before
omnidraft   2507.02659     a draft of another vocabulary, translated by a cache
distillspec 2310.08461     the draft distilled from the target on all tokens
on_policy   2310.08461     ... on its own samples
adaspec     2510.19779     ... on the tokens where a reference draft shows most left to learn
ead         2502.06833     the large model writes only while predictions are uncertain
deal        2402.06147     beams scored by where a greedy look ahead leads
genarm      2410.08193     a reward model that scores every next token
equilibrium 2310.09139     generator and discriminator agree on an answer
self_eval   2410.02725     the policy says whether another try would be better
docs        task           before or after the first six: a target that writes docstrings
tiny        size           half a minute on any CPU; draft and target are then alike: it shows nothing
Watch    E, tokens a target pass (block efficiency), and the measured speedup beside the predicted one,
         E / (G c + v): a gap between them is overhead (on CUDA also that only plain decoding replays graphs).
         acceptance: of the tokens tested, up to the first refused; kept/drafted: of all; E, i.i.d.: if each
         were kept with the mean acceptance; drafts: mean G. Other decoders read no option from draft to
         length, temperature to top_p, prompt to source: a task gives their prompts and lengths.
"""
import copy
import math
import random
import re
from dataclasses import dataclass
from functools import partial
from statistics import fmean
from types import SimpleNamespace

import numpy as np
from typing import Literal

import torch
import torch.nn.functional as F
from torch.nn.utils import clip_grad_norm_
from tqdm import tqdm

import kernels
import sft
from data import decoding, prefs, tasks
from data.crossvocab import NgramCache, Translated
from data.decoding import at_cost, numbers, tabled, voted
from data.drafting import COLUMNS, Lookup, Tally, first_difference, line
from data.text import is_corpus
from data.run import (Count, Positive, Range, Run, Share, UserError, batch_indices,
                      checkpoint, cli, clock, launch, needs)
from data.stats import accuracy, auroc, best_of_n, bon_kl
from model import (Cache, Transformer, collate, collect, generate, init, load, prefill, preset,
                   save, tempered, token_logprobs)
from optim import linear, optimiser, set_lr

# --- 1 config -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Config:
    """What every run has; what belongs to a method is an argument of its function."""
    config: str = ""             # presets and TOML files, left to right
    init: str = "base:target"    # the target
    draft: str = "base:draft64"  # a checkpoint, or a new draft of LAYERSxWIDTH
    data: str = "stdlib"         # what a draft learns from and prompts come from: a text, or a task or file
    rows: int = 0                # learn from only so many demonstrations or windows (0: all)
    chat: bool = False           # wrap prompts in the target's chat template
    decode: str = "speculative"  # which row of DECODERS
    drafter: str = "small"       # which row of DRAFTERS
    length: str = "optimal"      # which row of LENGTHS says when a draft is long enough
    temperature: float = 0.0     # of the decoding that is measured; 0 is greedy
    top_k: int = 0               # keep only the k likeliest tokens (0: all), of target and draft
    top_p: Range("(0, 1]") = 1.0 # keep the likeliest tokens of this total mass, of target and draft
    prompts: Count = 64          # held-out prompts to decode
    split: Literal["val", "ood"] = "val"  # split of the prompts: val, or ood where the data has one
    samples: Count = 8           # samples a prompt, of decoders that draw several
    prompt: Count = 32           # tokens of a prompt where --data is a text, at most --context
    max_new: Count = 64          # new tokens a prompt
    together: Count = 1          # rows decoded at once
    loss: str = "forward_kl"     # which row of LOSSES draws the draft to the target
    select: str = "every"        # which row of SELECT says which tokens of a batch count
    source: str = "data"         # which row of SOURCES: whose completions the draft learns on
    steps: int = 300             # of the draft's training; 0: it is used as it is
    batch: Count = 16            # rows a step
    micro: Count = 64            # rows per forward pass; select compares tokens within one
    context: Range("[2, inf)") = 96  # tokens of a training row
    lr: Positive = 3e-3          # peak learning rate, of the draft or of what a decoder trains
    warmup: int = 30             # steps of linear warm-up
    clip: Positive = 1.0         # largest gradient norm
    ref_batch: Count = 16        # rows a step of the reference draft, where --select reads one
    refresh: Count = 50          # steps between new samples, where --source samples
    eval_rows: Count = 64        # held-out rows on which agreement is measured
    eval_every: Count = 100      # steps between such measurements
    save_every: Count = 200      # steps between checkpoints
    keep: Count = 1              # checkpoints to keep
    stop: int = 0                # pause after this step (0: no); --resume goes on
    out: str = ""                # run folder (default out/specdec/<presets>)
    seed: int = 0                # of a new draft, the data order, sampling, and of a base:… model
    device: str = "auto"         # cpu or cuda
    dtype: str = "auto"  # of the weights that decode: float32, or bfloat16 (default on CUDA)
    kernels: str = "auto"        # auto, or torch: the plain definition of every kernel
    resume: bool = False         # go on from the newest checkpoint of the run folder


CHAIN = dict(data="chain", init="base:chain", prompts=256, steps=200, batch=64, lr=2e-3)
PRESETS = dict(
    speculative=dict(), lookup=dict(drafter="lookup", length="fixed", gamma=8, steps=0),
    omnidraft=dict(drafter="omnidraft", init="base:pretrain", length="fixed", gamma=3, steps=0),
    distillspec=dict(), on_policy=dict(source="draft"),
    adaspec=dict(select="adaspec", batch=40, ref_batch=16),
    docs=dict(init="base:target_docs", data="signatures", context=320, micro=20),
    # learning rates ours, not tuned; of genarm's two were tried
    ead=dict(decode="ead", data="chain", init="base:chain_right", prompts=200),
    deal=dict(decode="deal", data="toyif", init="base:toyif", prompts=256),
    genarm=dict(decode="genarm", data="toyif", init="base:toyif_base", prompts=512, steps=200,
                batch=64,
                lr=3e-4),
    equilibrium=dict(decode="equilibrium", **CHAIN), self_eval=dict(decode="self_eval", **CHAIN),
    # what only the arms of claims need
    at_once=dict(window=1, stay=1),
    arena=dict(rows=1000, batch=8, ref_batch=8, prompts=16, temperature=1.0, length="fixed",
               gamma=4),
    wide=dict(batch=20), by_chance=dict(select="at_random"), smallest_gap=dict(select="smallest"),
    draft64=dict(draft="base:draft64"), draft32=dict(draft="base:draft32"),
    tiny=dict(steps=4, batch=4, ref_batch=4, context=48, prompts=4, max_new=12, prompt=8,
              eval_rows=4,
              refresh=2, samples=4, train_prompts=8, pairs=64, small_model="1x32",
              middle_model="1x64", rounds=50),
)
CURVES = {"loss": ["loss", "kl", "asked"], "acceptance Σ min(p, q)": ["overlap"]}

# --- 2 the rule: 2211.17192, 2302.01318 -----------------------------------------------------------


def draw(p, u):
    """Sample by inverting the distribution function.   p [..., V] of any sum, u [...] in [0, 1) ->
    [...]"""
    cdf = p.double().cumsum(-1)
    return torch.searchsorted(cdf, u[..., None].double() * cdf[..., -1:], right=True).squeeze(-1)


def law(logits, temperature=1.0, top_k=0, top_p=1.0):
    """The distribution that is sampled from [..., V]; greedy (temperature 0): all mass on the
    argmax."""
    if temperature == 0:
        return F.one_hot(logits.argmax(-1), logits.size(-1)).to(logits.dtype)
    return tempered(logits, temperature, top_k, top_p).softmax(-1)


def verify(p, q, drafted, count, u, *, lenience=1.0):
    """Which drafted tokens stay, and the one after them: together distributed as p, whatever q is.

    Token x is kept with probability min(1, p(x) / q(x)); after the first that is not, one of max(p
    - q, 0), normalised, and after a block kept whole one of p (Leviathan et al., 2211.17192,
    Algorithm 1). Greedy is the same with one-hot p. lenience l < 1 is their lossy variant: l q for
    q, so that no token gets more than p / l. p [B, G+1, V];  q [B, G, V], what the tokens were
    drawn from, or None where nothing was drawn (point masses);  drafted [B, G], of which count [B]
    are real;  u [B, G+1, 2], uniform: of the tests, of the drawn
    tokens.   -> kept [B], next token [B]
    """
    G, row = drafted.size(1), torch.arange(len(drafted), device=p.device)
    px = p[:, :G].gather(-1, drafted[..., None]).squeeze(-1)                             # [B, G]
    qx = 1.0 if q is None else q.gather(-1, drafted[..., None]).squeeze(-1)
    keep = (u[:, :G, 0] * lenience * qx < px) & (torch.arange(G, device=p.device) < count[:, None])
    kept = keep.long().cumprod(1).sum(1)                                                 # [B]
    p, lost = p[row, kept], (kept < count)[:, None]                                 # [B, V], [B, 1]
    if q is None:
        x = F.pad(drafted, (0, 1)).gather(1, kept[:, None])                              # [B, 1]
        rest = p.scatter_add(1, x, -lenience * lost.to(p)).clamp(min=0)
    else:
        rest = (p - lenience * F.pad(q, (0, 0, 0, 1))[row, kept] * lost).clamp(min=0)
    rest = torch.where(rest.sum(-1, keepdim=True) > 0, rest,
                       p)  # p = q: then rejection was rounding
    return kept, draw(rest, u[row, kept, 1])


# --- 3 draft lengths: is one more token, the (k+1)-th, worth drafting? -> bool or bool [B] --------
# They see the draft and what is committed, never the verdict on the draft at hand: the rule stays
# lossless.


def fixed(k, *, gamma: Count = 4):
    """As many every time."""
    return k < gamma


def heuristic(k, reach, *, gamma: Count = 16):
    """Two more after a block kept whole, else one fewer (Hugging Face's assisted generation);
    starts at 5."""
    return (k < reach) & (k < gamma)


def confident(k, sure, *, gamma: Count = 8, least: Share = 0.4):
    """While the draft's own probability of its last token is at least `least` (0.4 unverified)."""
    return sure[:, -1] >= least if 0 < k < gamma else k < gamma


def optimal(k, chance, cost, turn, *, gamma: Count = 8, explore=16):
    """While it raises  E_k / (k c + v_k),  E_k = 1 + Σ_{i≤k} Π_{j≤i} a_j,  a the chances to be
    kept.

    chance [B, k+1]: of the k tokens, from how often tokens of that confidence were kept, and for
    the next the mean. For constant a it stops at the best fixed length. ours: the calibration
    (Tally.chance), and that every 16th round drafts one token at least, or a bad beginning would
    never be corrected.
    """
    if k == 0 and turn % explore == 0 or k >= gamma:
        return k < gamma
    stays = chance.cumprod(1)                                                            # [B, k+1]
    now, more = 1 + stays[:, :k].sum(1), 1 + stays.sum(1)                                # [B]
    return more * (k * cost.c + cost.v[k]) > now * ((k + 1) * cost.c + cost.v[k + 1])


LENGTHS = dict(optimal=optimal, fixed=fixed, heuristic=heuristic, confident=confident)

# --- 4 drafters: propose(text, length, u, more) drafts after text[b, :length[b]] ------------------
# -> drafted [B, G], q [B, G, V] (None: nothing was drawn), count [B] (row b's real drafts), sure
# [B, G] (the draft's own probability of each). more(k, sure [B, k]) -> bool [B]: which rows want a
# (k+1)-th. start and keep follow the loop's batch.


class Small:
    """A smaller language model of the target's vocabulary; padding rows of either head are never
    drafted."""

    def __init__(self, model, vocab, words, sampling):
        self.model, self.vocab, self.sampling = model, vocab, sampling
        self.words, self.context = min(words,
                                       model.config.vocab_size), model.config.max_position_embeddings

    def start(self, prompts, length, rows, new):
        self.cache, self.lacks = prefill(self.model, prompts, length, rows, new)[1], 2

    def keep(self, order):
        self.cache.keep(order)

    def propose(self, text, length, u, more):
        """Feeds first what the cache lacks: two tokens, as a block kept whole leaves the last
        drafted one unread, and one more after every round without a draft."""
        begin = length - self.lacks
        self.cache.length, self.cache.used = begin, int(begin.max())
        feed = text.gather(1, begin[:, None] + torch.arange(self.lacks, device=text.device))
        count, drafted, qs, sure = torch.zeros_like(length), text[:, :0], [], u[:, :0, 0]
        alive = more(0, sure)                                                            # [B]
        while alive.any():
            logits = self.model.logits(self.model(feed, self.cache)[:, -1])[:, :self.words]
            if self.sampling[0]:
                q = law(logits, *self.sampling)                                         # [B, words]
                qs.append(F.pad(q, (0, self.vocab - self.words)))
                feed = draw(q, u[:, len(qs) - 1, 0])[:, None]                            # [B, 1]
            else:
                feed = logits.argmax(-1, keepdim=True)
            drafted = torch.cat([drafted, feed], 1)                                      # [B, k]
            sure = torch.cat([sure, logits.softmax(-1).gather(1, feed)], 1)              # [B, k]
            count += alive
            alive = alive & more(drafted.size(1), sure)
        self.lacks = 2 if drafted.size(1) else self.lacks + 1
        return drafted, torch.stack(qs, 1) if qs else None, count, sure


# --- 5 the loop -----------------------------------------------------------------------------------


def fits(target, drafter, prompts, max_new, most):
    """The context that target and draft share; UserError where prompt, new tokens and draft do not
    fit it."""
    whole, longest = target.config.max_position_embeddings, max((len(p) for p in prompts),
                                                                default=0)
    if longest == 0 or min(map(len, prompts)) == 0 or max_new < 1 or most < 0:
        raise UserError(f"speculative decoding needs at least one prompt and a token in each, --max_new "
                        f"{max_new} of at least 1 and --gamma {most} of at least 0")
    if most >= whole:
        raise UserError(f"--gamma {most}: a draft longer than the target's context of {whole} tokens; lower "
                        "it")
    context = min(whole, drafter.context)
    if longest + max_new > context:
        raise UserError(f"a prompt of {longest} tokens and {max_new} new ones exceed the context of "
                        f"{context} of target and draft: shorten the prompt or lower --max_new")
    return context


@torch.no_grad()
def speculate(target, drafter, prompts, max_new, length_rule, *, cost=None, temperature=0.0,
              top_k=0,
              top_p=1.0, stop=None, generator=None, lenience=1.0, tally=None):
    """model.generate, one sample a prompt, by drafting and verifying -> (Rollout, Tally).

    Rounds: draft after the committed tokens, one target pass over the last of them and the draft,
    verify, commit. The target's cache holds all committed tokens but the last, the draft's all but
    two; rolling back is setting their length. Rows commit different numbers; finished ones leave
    the batch. Row b's i-th new token has three uniform numbers fixed beforehand (draft, test,
    draw), so that the other rows change nothing (but through optimal's counts, which all share).
    length_rule: a row of LENGTHS with its arguments bound; cost: of measure_costs, if it reads one.
    Raises UserError where they do not fit the context.
    """
    device, config = target.head.device, target.config
    most, reads = length_rule.keywords["gamma"], needs(length_rule)
    context = fits(target, drafter, prompts, max_new, most)
    stop = torch.tensor(config.eos_token_id if stop is None else stop, device=device,
                        dtype=torch.long)
    index = {p: i for i, p in enumerate(dict.fromkeys(map(tuple, prompts)))}
    rows = torch.tensor([index[tuple(p)] for p in prompts], device=device)               # [B]
    distinct, _ = collate([(p, ()) for p in index], max(config.pad_token_id, 0), device)
    length = torch.tensor([len(p) for p in index], device=device)                        # [U]
    tally = tally or Tally()
    before = tally.rounds

    B, start = len(rows), length[rows]
    u = torch.rand(B, max_new + most + 1, 3, generator=generator).to(device)
    text = F.pad(distinct[rows], (0, max_new + most + 1))                                # [B, W]
    logp = torch.zeros_like(text, dtype=torch.float32)
    hidden, cache = prefill(target, distinct, length, rows, max_new + most)
    drafter.start(distinct, length, rows, max_new + most)
    row, end = torch.arange(B, device=device), start + max_new
    length = start.clone()                             # [B] committed tokens: prompt and completion
    reach = torch.full_like(length, 5)

    def score(logits):
        """log-probs as generate() reports them, and the law that is sampled from."""
        logp = torch.log_softmax(tempered(logits, temperature, top_k, top_p) if temperature
                                 else logits, -1)
        return logp, logp.exp() if temperature else law(logits, 0)

    logps, p = score(target.logits(hidden))                                              # [B, V]
    token = draw(p, u[:, 0, 2])
    text[row, length], logp[row, length] = token, logps.gather(1, token[:, None]).squeeze(1)
    length += 1
    done = torch.isin(token, stop) | (length == end)
    while True:
        if done.any():                                       # the last rows alive fill the gaps
            n = int((~done).sum())
            if n == 0:
                break
            order = torch.arange(len(row), device=device)
            order[:n][done[:n]] = order[n:][~done[n:]]
            order = order[:n]
            cache.keep(order)
            drafter.keep(order)
            row, length, reach = row[order], length[order], reach[order]
        # 1. draft: never past the end, nor past the context
        room = torch.minimum(end[row] - length - 1, context - length.max())
        here = (length - start[row])[:, None] + torch.arange(most + 1, device=device)  # [n, most+1]
        mine = u[row[:, None], here]                                                # [n, most+1, 3]

        def more(k, sure):
            have = dict(k=k, reach=reach, sure=sure, cost=cost, turn=tally.passes.total())
            if "chance" in reads:
                have["chance"] = tally.chance(sure)
            return (k < room) & length_rule(**{x: have[x] for x in reads})
        drafted, q, count, sure = drafter.propose(text[row], length, mine, more)
        # 2. verify
        last = text[row].gather(1, length[:, None] - 1)                                  # [n, 1]
        cache.length, cache.used = length - 1, int(length.max()) - 1
        logps, p = score(target.logits(target(torch.cat([last, drafted], 1), cache)))  # [n, G+1, V]
        kept, token = verify(p, q, drafted, count, mine[:, :drafted.size(1) + 1, 1:],
                             lenience=lenience)
        # 3. commit: the kept tokens and one more; what stands behind them is overwritten later
        block = torch.cat([drafted, last], 1).scatter(1, kept[:, None], token[:, None])  # [n, G+1]
        at = torch.arange(block.size(1), device=device)
        text[row[:, None], length[:, None] + at] = block
        logp[row[:, None], length[:, None] + at] = logps.gather(-1, block[..., None]).squeeze(-1)
        ends = torch.isin(block, stop) & (at <= kept[:, None])                           # [n, G+1]
        fresh = torch.where(ends.any(1), ends.long().argmax(1), kept) + 1         # [n] up to a stop
        length = length + fresh
        done = ends.any(1) | (length == end[row])
        reach = torch.where(kept == count, reach + 2, (reach - 1).clamp(min=1))
        early = ends.any(1) & (fresh <= kept)  # what is drafted behind a stop does not count
        tally.note(*(torch.where(early, fresh, x) for x in (kept, count)), sure)
        tally.tokens += int(fresh.sum())
    place = start[:, None] + torch.arange(max_new, device=device)                        # [B, new]
    roll = collect(distinct[rows], start, text.gather(1, place), logp.gather(1, place), stop,
                   max(config.pad_token_id, 0), tally.rounds - before)
    return roll, tally


# --- 6 training a draft ---------------------------------------------------------------------------
# h [N, D] and W [V, D] of the draft, t and U of the target -> nats a token [N]; target, draft: p, q


def forward_kl(h, W, t, U):
    """Σ p log(p / q):  DistillSpec's and AdaSPEC's."""
    return kernels.linear_distill(h, W, t, U, "forward_kl")


def reverse_kl(h, W, t, U):
    """Σ q log(q / p)."""
    return kernels.linear_distill(h, W, t, U, "reverse_kl")


def jsd(h, W, t, U, *, beta: Range("(0, 1)") = 0.5):
    """β KL(p‖m) + (1-β) KL(q‖m),  m = β p + (1-β) q."""
    return kernels.linear_distill(h, W, t, U, "jsd", beta=beta)


def tvd(h, W, t, U):
    """½ Σ |p - q|: what acceptance loses itself."""
    q, p = (kernels.wide(x @ w.to(x.dtype).T).softmax(-1)
            for x, w in ((h, W), (t, U)))                                              # [N, V] each
    return (q - p.detach()).abs().sum(-1) / 2


LOSSES = dict(forward_kl=forward_kl, reverse_kl=reverse_kl, jsd=jsd, tvd=tvd)

# which tokens of a micro-batch count: loss [N] of the draft, ref [N] of the reference draft -> bool
# [N]


def every(loss):
    """All: DistillSpec (2310.08461)."""
    return torch.ones_like(loss, dtype=torch.bool)


def top(x, k):
    """The share k of largest values: those not below the (1-k) quantile, so equal ones may be
    more."""
    if not 0 < k <= 1:
        raise UserError(f"--k {k}: a share of the tokens, above 0 and at most 1")
    return x >= torch.quantile(x, 1 - k) if x.numel() else x > 0


def adaspec(loss, ref, *, k: Range("(0, 1]") = 0.4):
    """AdaSPEC (2510.19779): the largest  Δ = loss - ref,  what a draft of this size can still
    learn."""
    return top(loss - ref, k)


def smallest(loss, ref, *, k: Range("(0, 1]") = 0.4):
    """A control: the smallest Δ."""
    return top(ref - loss, k)


def easiest(loss, ref, *, k: Range("(0, 1]") = 0.4):
    """A control: the tokens on which the reference is nearest to the target."""
    return top(-ref, k)


def at_random(loss, generator, *, k: Range("(0, 1]") = 0.4):
    """A control: as many at random."""
    return top(torch.rand(len(loss), generator=generator).to(loss), k)


SELECT = dict(every=every, adaspec=adaspec, smallest=smallest, easiest=easiest, at_random=at_random)

# whose completions: rows, [(prompt ids, completion ids)], -> such rows


def head(row, c, corpus):
    """A row's prompt; of a window of text the first --prompt tokens."""
    return [*row[0], *row[1][:c.prompt - len(row[0])]] if corpus else list(row[0])


def sampled(model, rows, c, generator):
    """The rows with completions that the model samples, as long as --context allows. ours: at
    temperature 1, not at that of the decoding."""
    if not rows:
        return []
    out, prompts = [], [head(row, c, is_corpus(c.data)) for row in rows]
    new = min(c.context, model.config.max_position_embeddings) - max(map(len, prompts))
    if new < 1:
        raise UserError(f"--context {c.context}: a prompt of {max(map(len, prompts))} tokens leaves no room "
                        "for a completion; raise it")
    for i in range(0, len(prompts), 64):
        roll = generate(model, prompts[i:i + 64], new, generator=generator)
        out += [(p, t[m > 0].tolist())
                for p, t, m in zip(prompts[i:i + 64], roll.tokens, roll.mask)]
    return out


def given(rows, draft, target, c, generator):
    """The data's own."""
    return rows


def own(rows, draft, target, c, generator):
    """The draft's samples as it is now: on-policy."""
    return sampled(draft, rows, c, generator)


def teacher(rows, draft, target, c, generator):
    """The target's samples."""
    return sampled(target, rows, c, generator)


def mixed(rows, draft, target, c, generator):
    """Every other row the draft's sample."""
    return [x for pair in zip(rows[::2], sampled(draft, rows[1::2], c, generator))
            for x in pair] + (
        rows[-1:] if len(rows) % 2 else [])


SOURCES = dict(data=given, draft=own, target=teacher, mixed=mixed)


def states(model, tokens, mask):
    """The hidden states that predict the scored tokens [N, D]."""
    return model(tokens)[:, :-1][mask[:, 1:] > 0]


@torch.no_grad()
def remember(target, rows, visits, c):
    """The target's states [n, D] of each row, made once, if rows come twice and 2 GB hold them;
    else None."""
    size = sum(len(y) for _, y in rows) * target.config.hidden_size * 4
    if visits < 2 * len(rows) or size > 2e9:
        return None
    out = []
    for i in tqdm(range(0, len(rows), c.micro), desc="target", disable=None, leave=False):
        tokens, mask = collate(rows[i:i + c.micro], target.config.pad_token_id, c.device)
        out += states(target, tokens, mask).split(mask[:, 1:].sum(1).long().tolist())
    return out


def learn(draft, target, reference, rows, known, c, f, generator, words):
    """Accumulate the gradient of one step over its rows. -> loss of the selected tokens, share
    selected

    With a selection the losses of all tokens are made without a graph first; head and backward then
    see the selected ones alone. ours: the mean over these, the authors' code divides by all; a
    micro-batch weighs by its tokens, and a selection compares those of one micro-batch, as theirs
    does.
    """
    U, W, told, names = target.head[:words], draft.head[:words], [0.0, 0.0], needs(f.select)
    for i in range(0, len(rows), c.micro):
        part = rows[i:i + c.micro]
        tokens, mask = collate(part, target.config.pad_token_id, c.device)             # [b, T] each
        with torch.no_grad():                                                            # [N, D]
            t = torch.cat(known[i:i + c.micro]) if known else states(target, tokens, mask)
        h = states(draft, tokens, mask)
        chosen = slice(None)
        if names != ["loss"]:
            with torch.no_grad():
                have = dict(loss=f.loss(h, W, t, U), generator=generator)
                if "ref" in names:
                    have["ref"] = f.loss(states(reference, tokens, mask), reference.head[:words],
                                         t, U)
                chosen = f.select(**{x: have[x] for x in names})                         # [N]
        loss = f.loss(h[chosen], W, t[chosen], U)
        weight = len(h) / sum(len(y) for _, y in rows)
        (loss.mean() * weight).backward()
        told[0] += loss.mean().item() * weight
        told[1] += len(loss) / len(h) * weight
    return told


def teach(draft, target, reference, rows, known, c, f, run, steps, batch, ticks, words,
          save_at=None):
    """Train the draft in place on `rows` for the steps that `ticks` yields, `batch` rows each;
    known: of remember(), or None."""
    opt, g, pool = optimiser(draft, lr=c.lr), torch.Generator().manual_seed(c.seed), []
    if run.state and save_at:
        opt.load_state_dict(run.state["opt"])
        g.set_state(run.state["rng"])
        pool = run.state["pool"]
    sampling = f.source.func is not given
    for step in ticks:
        at = batch_indices(len(rows), batch, step, c.seed).tolist()
        if sampling:
            if not pool or step % c.refresh == 0:
                ahead = [i for s in range(step, min(step + c.refresh - step % c.refresh, steps))
                         for i in batch_indices(len(rows), batch, s, c.seed).tolist()]
                pool = f.source([(list(p), list(y)) for p, y in map(rows.__getitem__, ahead)],
                                draft, target, c, g)
            picked, pool = pool[:batch], pool[batch:]
        else:
            picked = [rows[i] for i in at]
        ready = known and [known[i] for i in at]
        loss, share = learn(draft, target, reference, picked, ready, c, f, g, words)
        norm = clip_grad_norm_(draft.parameters(), c.clip)
        set_lr(opt, c.lr * max(0.1, linear(step, steps, c.warmup)))
        opt.step()
        opt.zero_grad()
        if save_at:
            save_at(step + 1, opt, g, pool, dict(loss=loss, share=share, norm=norm))


# --- 7 measure ------------------------------------------------------------------------------------


@torch.no_grad()
def agreement(target, draft, rows, c, words):
    """On rows [(prompt, completion)]: overlap = Σ min(p, q), the chance that a sample is kept at
    temperature 1; kl = KL(p‖q) in nats; same_top; means over the completions' tokens."""
    told, count = torch.zeros(3, dtype=torch.double), 0
    for i in range(0, len(rows), c.micro):
        tokens, mask = collate(rows[i:i + c.micro], target.config.pad_token_id, c.device)
        p, q = (torch.log_softmax(m.logits(states(m, tokens, mask))[:, :words], -1)
                for m in (target, draft))                                              # [N, V] each
        told += torch.stack([torch.minimum(p.exp(), q.exp()).sum(), (p.exp() * (p - q)).sum(),
                             (p.argmax(-1) == q.argmax(-1)).sum()]).double().cpu()
        count += len(p)
    return dict(zip(("overlap", "kl", "same_top"), (told / max(1, count)).tolist()))


@torch.no_grad()
def measure_costs(target, draft, rows, held, most, repeats=30):
    """What passes cost beside a target pass over one token: c, the draft's step (0 without a
    draft), and v[G] of a target pass over G + 1; rows sequences of `held` tokens. The least of
    interleaved repetitions."""
    device, best = target.head.device, {}
    widths = sorted({1, 2, 3, 5, 9, most + 1} & {*range(1, most + 2)})
    jobs = [(target, w) for w in widths] + ([(draft, 1)] if draft else [])
    caches = {}
    for model in dict.fromkeys(m for m, _ in jobs):
        caches[model] = Cache(model.config, rows, held + most + 1, device, model.head.dtype)
        model(torch.zeros(rows, held, dtype=torch.long, device=device), caches[model])
    for _ in range(repeats):
        for model, w in jobs:
            cache, tokens = caches[model], torch.zeros(rows, w, dtype=torch.long, device=device)
            began = clock(device)
            model.logits(model(tokens, cache)).argmax(-1)
            best[model, w] = min(best.get((model, w), math.inf), clock(device) - began)
            cache.length -= w
            cache.used -= w
    one = best[target, 1]
    v = np.interp(range(1, most + 2), widths, [best[target, w] / one for w in widths])
    return SimpleNamespace(c=best[draft, 1] / one if draft else 0.0, v=v.tolist())


def race(target, drafters, prompts, c, f, run, lenience):
    """Decode the prompts plainly and with each drafter, in turns, so that a busy machine slows all
    alike.

    -> numbers of the table, drafter x's as "x_speedup", …; greedy outputs are compared token by
    token.
    """
    device, most = target.head.device, f.length.keywords["gamma"]
    sampling = dict(temperature=c.temperature, top_k=c.top_k, top_p=c.top_p)
    room = min(fits(target, d, prompts, c.max_new, most) for d in drafters.values())
    room = min([room, *(d.model.config.max_position_embeddings for d in drafters.values()
                        if d.model)])
    held = max(1, min(max(map(len, prompts)) + c.max_new // 2, room - most - 1))
    costs = {x: measure_costs(target, d.model, c.together, held, most) for x, d in drafters.items()}
    tallies, spent, plain = {x: Tally() for x in drafters}, dict.fromkeys(drafters, 0.0), [0.0, 0]
    same, gaps = dict.fromkeys(drafters, 0), []
    parts = [prompts[i:i + c.together] for i in range(0, len(prompts), c.together)]
    for i, part in enumerate(tqdm([parts[0], *parts], desc="race", disable=None, leave=False)):
        seed = torch.Generator().manual_seed(c.seed * 100_003 + i)
        began = clock(device)
        whole = generate(target, part, c.max_new, generator=seed, **sampling)
        took = clock(device) - began
        for x, drafter in drafters.items():
            began = clock(device)
            roll, _ = speculate(target, drafter, part, c.max_new, f.length, cost=costs[x],
                                generator=seed,
                                lenience=lenience, tally=tallies[x], **sampling)
            spent[x] += clock(device) - began
            if i:
                pairs = list(zip(whole.completions(), roll.completions(), part))
                same[x] += sum(a == b for a, b, _ in pairs)
                gaps += [first_difference(target, *pair) for pair in pairs if pair[0] != pair[1]
                         and c.temperature == 0]
            else:  # the first part warms everything up and is not counted
                tallies[x], spent[x] = Tally(), 0.0
        plain = [plain[0] + took, plain[1] + whole.mask.sum().item()] if i else plain
    rate = plain[1] / plain[0]
    run.say(f"{COLUMNS}\n  {'plain':<12}{rate:>9.1f}{1:>9.2f}")
    told = dict(plain_tokens_per_second=rate)
    for x, t in tallies.items():
        costs[x].c *= getattr(drafters[x], "per_token",
                              1.0)  # a translated token is several draft steps
        row = t.numbers(costs[x], spent[x], len(prompts), rate)
        told |= {f"{x}_{k}": v for k, v in row.items()}
        run.say(line(x, row))
        if hasattr(drafters[x], "passes"):
            told |= {f"{x}_per_token": drafters[x].per_token}
            run.say(f"  {'':<12}{drafters[x].per_token:.2f} draft steps a token; the cache knew "
                    f"{drafters[x].cache.hits / max(1, drafters[x].cache.read):.1%} of the tokens read")
        kept = [f"{t.kept[j] / t.tested[j]:.2f}" for j in range(len(t.tested))]
        run.say(f"  {'':<12}of the tokens tested at place 1, 2, … were kept: {' '.join(kept)}")
    if c.temperature:
        return told
    close = max(gaps, default=0.0) < (1e-3 if target.head.dtype == torch.float32 else 0.1)
    run.say("  greedy outputs equal to plain decoding's: "
            + ", ".join(f"{x} {n} of {len(prompts)}" for x, n in same.items())
            + (f"; where they part the target's two likeliest tokens are at most {max(gaps):.1e} nats apart: "
               + ("rounding" if close else "WRONG, the outputs differ") if gaps else ""))
    return told | dict(widest_gap=max(gaps, default=0.0)) | {f"{x}_same": n / len(prompts)
                                                             for x, n in same.items()}


# --- 8 decode -------------------------------------------------------------------------------------


def small(draft, tok, c, target):
    """A smaller language model of the target's vocabulary."""
    return Small(draft, target.config.vocab_size, tok.vocab_size, (c.temperature, c.top_k, c.top_p))


def lookup(*, n: Count = 3):
    """No model: what followed the last n tokens, or fewer, where they stood last."""
    if n < 1:
        raise UserError(f"--n {n}: at least one token to look up")
    return Lookup(n)


def omnidraft(draft, tok, own, c, target, *,
              mode: Literal["point", "ngram"] = "point", longest: Count = 32):
    """OmniDraft (2507.02659): a model of another tokenizer, `own`, behind a cache. point: its
    likeliest tokens, as point masses, exact;  ngram: samples and the paper's q', approximate where
    strings nest."""
    sampling = (0, 0, 1.0) if mode == "point" else (c.temperature, c.top_k, c.top_p)
    return Translated(draft, NgramCache(tok, own), target.config.vocab_size, sampling,
                      prefill=prefill,
                      law=law, draw=draw, mode=mode, longest=longest)


DRAFTERS = dict(small=small, lookup=lookup, omnidraft=omnidraft)


def open_draft(target, tok, c, f, run):
    """--draft, a new model of that size or a checkpoint, and its tokenizer. UserError for another
    vocabulary unless the drafter translates."""
    if re.fullmatch(r"\d+x\d+", c.draft):
        family = "qwen3" if target.config.moe else target.config.model_type
        shape = preset(c.draft, tok, target.config.max_position_embeddings, family)
        draft, own = init(shape, c.seed).to(c.device), tok
    else:
        folder = checkpoint(sft.find(c.draft, c.config, device=c.device, seed=c.seed))
        draft, own = load(folder, c.device, torch.float32 if c.steps else getattr(torch, c.dtype))
    if not isinstance(draft, Transformer):
        raise UserError(f"--draft {c.draft} is a reward model; a draft is a language model")
    if "own" not in needs(f.drafter) and own.tokens != tok.tokens:
        raise UserError(f"--draft {c.draft} has another vocabulary than --init {c.init}: take a draft with "
                        "the target's tokenizer, a new one (--draft 1x64), or --drafter omnidraft")
    if "own" in needs(f.drafter) and c.steps:
        run.say(f"  --drafter {c.drafter} uses the draft as it is: nothing here distils across vocabularies")
    sizes = [sum(p.numel() for p in m.parameters()) for m in (draft, target)]
    if sizes[0] >= sizes[1]:
        run.say(f"warning: the draft has {sizes[0] / 1e6:.2f} M parameters, the target "
                f"{sizes[1] / 1e6:.2f} M: drafting with it cannot pay")
    return draft, own


def speculative(target, tok, c, f, run, *, lenience: Range("(0, 1]") = 1.0):
    """Train a draft, then decode held-out prompts with it, by prompt lookup, and plainly."""
    corpus, told, drafters = is_corpus(c.data), {}, dict(lookup=Lookup())
    if not 0 < lenience <= 1 or lenience < 1 and not c.temperature:
        raise UserError(f"--lenience {lenience}: above 0, at most 1 (exact), below 1 with --temperature")
    held = tasks.rows(c, tok, c.split)
    held = held[:-1] if corpus and len(held) > 1 else held       # a text's last window may be short
    prompts = [head(row, c, corpus) for row in held][:c.prompts]
    if not prompts:
        raise UserError(f"no row of the split {c.split} fits --context {c.context}, prompt and completion "
                        "together: raise it")
    if len(prompts) < c.prompts:
        run.say(f"  {len(prompts)} held-out prompts, fewer than --prompts {c.prompts}")
    have = dict(target=target, tok=tok, c=c)
    if "draft" in needs(f.drafter):
        have["draft"], have["own"] = open_draft(target, tok, c, f, run)
        if "own" not in needs(f.drafter):
            said = sampled(target, held[:c.eval_rows], c, torch.Generator().manual_seed(c.seed))
            told = train_draft(have["draft"], target, tok, said, tok.vocab_size, c, f, run)
        have["draft"].to(target.head.dtype)
    drafters["draft" if "draft" in have
             else "lookup"] = f.drafter(**{x: have[x] for x in needs(f.drafter)})
    if c.temperature and (lenience < 1 or getattr(drafters.get("draft"), "mode", "") == "ngram"):
        run.say("  lossy: these samples do not have the target's law")
    return told | race(target, drafters, prompts, c, f, run, lenience)


def train_draft(draft, target, tok, said, words, c, f, run):
    """--steps of learning, after a reference draft where --select reads one. -> agreement before
    and after"""
    rows = tasks.rows(c, tok, "train") if c.steps else []
    if c.rows and c.rows < len(rows):            # of a text: windows at random
        at = torch.randperm(len(rows), generator=torch.Generator().manual_seed(c.seed))[:c.rows]
        rows = [rows[i] for i in at.tolist()]
    known = remember(target, rows, c.steps * c.batch, c) if c.source == "data" else None
    before, reference = agreement(target, draft, said, c, words), None
    if c.steps and "ref" in needs(f.select):
        plain = SimpleNamespace(**vars(f) | dict(select=every))

        def write(path):
            ref = copy.deepcopy(draft)
            ticks = tqdm(range(c.steps), desc="reference", disable=None, leave=False)
            teach(ref, target, None, rows, known, c, plain, run, c.steps, c.ref_batch, ticks, words)
            save(ref, tok, path)
        reference = load(run.stage("reference", write), c.device)[0].requires_grad_(False)
        run.at = run.start
        run.cut()  # what a resumed run had logged beyond its checkpoint
        told = agreement(target, reference, said, c, words)
        run.say(f"  reference: overlap {told['overlap']:.3f}, kl {told['kl']:.3f}")
    if run.last:
        draft.load_state_dict(load(run.last, c.device)[0].state_dict())

    def after(step, opt, g, pool, told):
        last = step in (c.steps, c.stop)
        if step % c.eval_every == 0 or last:
            run.check(step, draft)
        if step % c.eval_every == 0 or last:
            told |= agreement(target, draft, said, c, words)
        run.log(step, **told, show=last)
        if step % c.save_every == 0 or last:
            run.save(step, lambda path: save(draft, tok,
                                             path), opt=opt.state_dict(), rng=g.get_state(),
                     pool=pool)
    if c.steps:
        ticks = run.steps(c.steps)
        teach(draft, target, reference, rows, known, c, f, run, c.steps, c.batch, ticks, words,
              after)
    told = agreement(target, draft, said, c, words)
    run.say(f"  agreement on the target's samples: overlap {before['overlap']:.3f} -> {told['overlap']:.3f}, "
            f"kl {before['kl']:.3f} -> {told['kl']:.3f}, same top token {before['same_top']:.1%} -> "
            f"{told['same_top']:.1%}")
    return told | {f"start_{k}": v for k, v in before.items()}


# --- 9 other decoders, each against honest controls; their algorithms are in data/decoding.py -----


def rng(c, salt):
    """A generator of the run's seed for one purpose."""
    return torch.Generator().manual_seed(1000 * c.seed + salt)


def drawn(model, tok, world, problems, c, salt, samples=1, **kw):
    """Samples of every problem -> (rollout, texts [P][N], ids with the stop token [P N], score [P,
    N])."""
    roll = generate(model, [tok.prompt(p) for p in problems], world.max_new, samples=samples,
                    generator=rng(c, salt), **kw)
    ids, done = roll.completions(), roll.finished.tolist()
    texts = [tok.decode(y) for y in ids]
    score = torch.tensor([world.reward(problems[i // samples], t, d)
                          for i, (t, d) in enumerate(zip(texts, done))]).view(len(problems),
                                                                              samples)
    whole = [[*y, *[tok.eos] * d] for y, d in zip(ids, done)]
    return roll, [texts[i:i + samples] for i in range(0, len(texts), samples)], whole, score


def fit(model, c, run, loss_of, n):
    """The training loop: loss_of(rows of the step, step) -> (loss, numbers for the log). ->
    frozen"""
    opt = optimiser(model.requires_grad_(), lr=c.lr)
    for step in tqdm(range(c.steps), leave=False, disable=None):
        loss, numbers = loss_of(batch_indices(n, c.batch, step, c.seed).tolist(), step)
        loss.backward()
        norm = clip_grad_norm_(model.parameters(), c.clip)
        set_lr(opt, c.lr * linear(step, c.steps, c.warmup))
        opt.step()
        opt.zero_grad()
        run.log(step + 1, loss=loss.item(), norm=norm.item(), **numbers)
    run.at += c.steps
    return model.requires_grad_(False)


@torch.no_grad()
def scored(model, rows, c, pad, score):
    """score(model, tokens, mask) of (prompt, completion) rows, 256 at a time, on the CPU.   -> [..,
    B]"""
    parts = (rows[i:i + 256] for i in range(0, len(rows), 256))
    return torch.cat([score(model, *collate(part, pad, c.device)).cpu() for part in parts], -1)


def logp_sum(model, tokens, mask):
    """log π of each row's completion.   -> [B]"""
    return token_logprobs(model, tokens, mask).sum(1)


def ead(target, tok, c, run, *, recipe="chain_right", small_model="2x64", middle_model="2x96",
        thresholds="0.2,0.4,0.6,0.8,1.0", window: Count = 5, stay: Count = 5):
    """EAD, 2502.06833, greedy: accuracy against cost, beside a coin of the same share and three
    models alone, of which the presets `recipe` of sft.py make two.

    cost: weights read for a token, 1 for the large model alone (what was missed rides along in one
    pass); work: products, the reading of the prompt and of what was missed included; over coin:
    EAD's accuracy less the coin's, the mean over thresholds."""
    world, stop = tasks.task(c.data), {tok.eos}
    problems = world.problems(c.split, c.prompts, c.seed)
    (small, words), (middle, _) = (load(sft.base(recipe, c.config, model=m, device=c.device,
                                                 seed=c.seed),
                                        c.device) for m in (small_model, middle_model))
    size = {m: sum(p.numel() for p in m.parameters() if p.dim() > 1)
            for m in (small, middle, target)}
    if words.tokens != tok.tokens:
        raise UserError(f"--init {c.init} has another vocabulary than what --recipe {recipe} makes: EAD "
                        "switches between models of one tokenizer")

    def empty(m):
        return Cache(m.config, 1, m.config.max_position_embeddings, c.device, m.head.dtype)

    def decoded(choose, models=(small, target)):
        outs = [decoding.switching(models, tok.prompt(p), world.max_new, choose,
                                   lambda z: z.argmax(-1), empty, stop) for p in problems]
        right = [world.reward(p, tok.decode(o.ids), o.ids[-1] in stop)
                 for p, o in zip(problems, outs)]
        q = sum(sum(o.large) for o in outs) / sum(len(o.ids) for o in outs)
        a, b = (size[m] / size[target] for m in models)
        return dict(accuracy=fmean(right), share=q, cost=q * b + (1 - q) * a,
                    work=sum(o.read[0] * a + o.read[1] * b for o in outs))
    rows = dict(large=decoded(lambda *_: True), small=decoded(lambda *_: False),
                middle=decoded(lambda *_: False, (middle, target)))
    for t in numbers(thresholds, "thresholds"):
        rows[f"EAD@{t}"] = decoded(partial(decoding.ead, threshold=float(t), window=window,
                                           stay=stay))
        rows[f"coin@{t}"] = decoded(partial(decoding.coin, share=rows[f"EAD@{t}"]["share"],
                                            stay=stay,
                                            rng=random.Random(c.seed)))
    whole = rows["large"]["work"]
    for row in rows.values():
        row["work"] /= whole
    return tabled(run, rows,
                  f"{len(problems)} {c.split} problems, greedy; weights of small, middle, large"
                f": {', '.join(f'{n:,}' for n in size.values())}") | dict(over_coin=fmean(
                    rows[f"EAD@{t}"]["accuracy"] - rows[f"coin@{t}"]["accuracy"]
                    for t in numbers(thresholds, "thresholds")))


def deal(target, tok, c, run, *, weight=4.0, look: Count = 10, beams: Count = 3,
         expansions: Count = 5):
    """DeAL, 2402.06147: h is the share of hard rules obeyed, read off the prompt; gold also has a
    principle.

    tokens: computed in all, a prompt; best of n by h (ties by log π) for n that compute as many."""
    world = tasks.task(c.data)
    if not hasattr(world, "judge"):
        raise UserError(f"--decode deal --data {c.data}: its constraints must be read off the prompt; "
                        "take toyif")
    problems = world.problems(c.split, c.prompts, c.seed)
    prompts, spent = [tok.prompt(p) for p in problems], 0

    @torch.no_grad()
    def expand(texts):
        nonlocal spent
        spent += len(texts)
        tokens, _ = collate([(t, ()) for t in texts], tok.pad or 0, c.device)
        last = torch.tensor([len(t) for t in texts], device=c.device) - 1
        return target.logits(target(tokens)[torch.arange(len(texts)), last]).log_softmax(-1)

    def complete(texts, new):
        nonlocal spent
        if not (new and texts):
            return [((), False)] * len(texts)
        roll = generate(target, texts, new, temperature=0)
        spent += int(roll.mask.sum())
        return list(zip(roll.completions(), roll.finished.tolist()))

    def hard(i, ids, finished=True):
        return world.judge(problems[i]["prompt"], tok.decode(ids))["hard"]

    def row(ids, done, tokens):
        judged = [world.judge(p["prompt"], tok.decode(y), d)
                  for p, y, d in zip(problems, ids, done)]
        return {k: fmean(x[k] for x in judged) for k in ("gold", "hard")} | dict(
            tokens=tokens / len(problems))

    def search(weight, look):
        nonlocal spent
        spent = 0
        got = decoding.deal(prompts, expand, partial(complete, new=look), hard, {tok.eos},
                            new=world.max_new,
                            weight=weight, beams=beams, expansions=expansions)
        return row([b.ids for b in got], [b.finished for b in got], spent)

    def best_of(n, **kw):
        roll = generate(target, prompts, world.max_new, samples=n, generator=rng(c, 1), **kw)
        ids, done = roll.completions(), roll.finished.tolist()
        h = torch.tensor([hard(i // n, y) if d else -1.0
                          for i, (y, d) in enumerate(zip(ids, done))])
        best = (1e3 * h
                + roll.logp.sum(1).cpu()).view(-1, n).argmax(1) + n * torch.arange(len(problems))
        return row([ids[i] for i in best], [done[i] for i in best], roll.mask.sum().item())
    rows = {"greedy": best_of(1, temperature=0), "sample": best_of(1),
            "beam search": search(0.0, 0),
            "prefix": search(weight, 0), "DeAL": search(weight, look)}
    for name in ("prefix", "DeAL"):
        n = max(1, round(rows[name]["tokens"] / rows["sample"]["tokens"]))
        rows[f"best of n as {name}"] = best_of(n) | dict(n=n)
    return tabled(run, rows,
                  f"{len(problems)} {c.split} prompts; λ {weight:g}, look ahead {look}, prefix 0")


def genarm(target, tok, c, run, *, beta_r: Positive = 0.05, pairs: Count = 4000,
           alphas="0.125,0.25,0.5,1,2"):
    """GenARM, 2410.08193: gold against KL to the base, nats a response, as α grows.

    Controls: the base cooled to temperature 1/(1+α), which is GenARM with an untrained reward
    model, and the best of n samples by the trained one, log π_r, whose KL is at most log n -
    (n-1)/n. cost: forward passes of a model for a token of the answer, scoring included."""
    world, pad = tasks.task(c.data), tok.pad or 0
    if not hasattr(world, "pairs"):
        raise UserError(f"--decode genarm --data {c.data}: it needs preferences; take toyif or ring")

    def encoded(n, seed, split):
        return prefs.encode_pairs(world.pairs(n, seed, split), tok,
                                  target.config.max_position_embeddings)

    def sides(rows):
        return [(r["prompt"], r[side]) for side in ("chosen", "rejected") for r in rows]

    def train(folder):
        rows, arm = encoded(pairs, c.seed, "train"), copy.deepcopy(target).float()

        def loss_of(ids, step):
            logp = logp_sum(arm, *collate(sides([rows[i] for i in ids]), pad, c.device)).chunk(2)
            return decoding.autoregressive(*logp,
                                           beta_r=beta_r).mean(), dict(accuracy=accuracy(*logp))
        save(fit(arm, c, run, loss_of, len(rows)), tok, folder)
    arm = load(run.stage("arm", train), c.device)[0].requires_grad_(False)
    held = encoded(min(pairs, 1000), c.seed + 1, "val")
    right = accuracy(*scored(arm, sides(held), c, pad, logp_sum).chunk(2))
    problems = world.problems(c.split, c.prompts, c.seed)

    def guided(alpha, other, cost):
        T, a = decoding.guidance(alpha)
        roll, *_, score = drawn(target, tok, world, problems, c, 1, temperature=T,
                                contrast=(other, a))
        with torch.no_grad():
            base = token_logprobs(target, roll.tokens, roll.mask)
        return dict(gold=score.mean().item(),
                    kl=((roll.logp - base) * roll.mask).sum(1).mean().item(),
                    cost=cost)
    rows = {"base": guided(0.0, arm, 1)}
    for x in numbers(alphas, "alphas"):
        rows |= {f"GenARM@{x}": guided(float(x), arm, 2),
                 f"cooled@{x}": guided(float(x), target, 1)}
    roll, *_, score = drawn(target, tok, world, problems, c, 2, c.samples)
    with torch.no_grad():
        proxy = token_logprobs(arm, roll.tokens, roll.mask).sum(1).cpu().view(score.shape)
    rows |= {f"best of@{n}": dict(gold=best_of_n(proxy, score, n).mean().item(), kl=bon_kl(n),
                                  cost=2 * n)
             for n in (2, 4, 8, 16, 32) if n <= c.samples}
    return tabled(run, rows,
                  f"{len(problems)} {c.split} prompts; the ARM is right on {right:.3f} of "
                f"{len(held)} held-out pairs") | dict(pair_accuracy=right)


def asked(model, rows, ids, c, pad):
    """P(NO: no restart is better) and P(correct) after every (prompt, part of a response).   -> [2,
    B]"""
    return scored(model, [(p, [*y, ids.ask, ids.check]) for p, y in rows], c, pad,
                  lambda *have: decoding.answered(ids, *have).softmax(-1)[..., 0])


def taught(target, tok, world, c, run, train_prompts):
    """The policy, once it has learned three things from its own samples; frozen, control tokens
    muted.

    x y.. ASK CHECK: what it says anyhow, then the chance that no other try is better and that the
    whole is correct, after a part of it (half the time: all);  x RIGHT y or x WRONG y: the same
    under its verdict. -> it, the same with its control tokens muted, their ids"""
    ids, pad = decoding.controls(target, tok), tok.pad or 0

    def train(folder):
        model, problems = copy.deepcopy(target).float(), world.problems("train", train_prompts,
                                                                        c.seed)
        *_, said, score = drawn(target, tok, world, problems, c, 3, c.samples)
        rival, score = (x.flatten().to(c.device)
                        for x in (decoding.rival_label(score), score))                       # [P N]
        prompts = [tok.prompt(p) for p in problems for _ in range(c.samples)]
        u = torch.rand(2, c.steps, c.batch, generator=rng(c, 4))

        def loss_of(at, step):
            length = torch.tensor([len(said[i]) for i in at])
            cut = torch.where(u[0, step] < 0.5, decoding.cut_points(length, u[1, step]),
                              length).tolist()
            parts = [(prompts[i], [*said[i][:k], ids.ask, ids.check]) for i, k in zip(at, cut)]
            given = [([*prompts[i], ids.right if score[i] > 0 else ids.wrong], said[i]) for i in at]
            tokens, mask = collate(parts, pad, c.device)
            logits = decoding.answered(ids, model, tokens, mask)
            ask, check = (decoding.self_eval_loss(z, x[at]).mean()
                          for z, x in zip(logits, (rival, score)))
            mask = mask * (tokens < ids.right)                                   # asked is not said
            logp = token_logprobs(model, tokens,
                                  mask), token_logprobs(model, *collate(given, pad, c.device))
            nats = -sum(x.sum() for x in logp) / (mask.sum() + length.sum())
            return nats + ask + check, dict(nats=nats.item(), asked=ask.item(),
                                            checked=check.item())
        save(fit(model, c, run, loss_of, len(said)), tok, folder)
    model = load(run.stage("policy", train), c.device)[0].requires_grad_(False)
    return model, decoding.muted(model, list(vars(ids).values())), ids


def tried(model, quiet, ids, tok, world, c, split, salt):
    """N samples of each problem of a split, and what the model says of them: problems, rows
    [(prompt, response)], stated [P][N];  score, length, logp, no, right [P, N]."""
    problems = world.problems(split, c.prompts, c.seed + salt)
    roll, texts, said, score = drawn(quiet, tok, world, problems, c, salt, c.samples)
    rows = [(tok.prompt(problems[i // c.samples]), y) for i, y in enumerate(said)]
    no, right = asked(model, rows, ids, c, tok.pad or 0).view(2, *score.shape)
    stated = [[tasks.stated(world, t) if d else "" for t, d in zip(*row)]
              for row in zip(texts, roll.finished.view(score.shape).tolist())]
    return SimpleNamespace(problems=problems, rows=rows, stated=stated, score=score, no=no,
                           right=right,
                           length=roll.mask.sum(1).long().cpu().view(score.shape),
                           logp=roll.logp.sum(1).cpu().view(score.shape))


def self_eval(target, tok, c, run, *, train_prompts: Count = 1024, cut: Share = 0.5,
              share: Share = 0.5,
              gain=0.9):
    """Self-evaluation, 2410.02725: does P(NO) know, when may sampling stop, and which half may be
    dropped?

    A threshold is the lowest that reaches `gain` of best-of-N's gain on fresh problems of train;
    the cut is at that share of their mean length. Pruning is played on finished samples, which it
    does not change. fixed and vote: the best of n by P(NO), and the majority, for as many samples
    (pruning: tokens)."""
    world, pad, N = tasks.task(c.data), tok.pad or 0, c.samples
    has = model, quiet, ids = taught(target, tok, world, c, run, train_prompts)
    tune, s = tried(*has, tok, world, c, "train", 5), tried(*has, tok, world, c, c.split, 6)
    place, mean = max(1, round(cut
                               * tune.length.float().mean().item())), s.length.float().mean().item()
    half = asked(model, [(p, y[:place]) for p, y in s.rows], ids, c, pad)[0].view(s.score.shape)
    good, going, counts = s.score > 0, s.length > place, list(range(1, N + 1))
    fixed = [best_of_n(s.no, s.score, n).mean().item() for n in counts]
    votes = [voted(s.stated, s.score, n) for n in counts]

    def by(x):
        return dict(accuracy=best_of_n(x, s.score, N).mean().item(),
                    auroc=auroc(x.flatten(), good.flatten()))
    before = drawn(target, tok, world, s.problems, c, 7, N)[-1].mean().item()
    out = tabled(run, {
        "one sample": dict(accuracy=fixed[0]), "before training": dict(accuracy=before),
        "P(NO)": by(s.no), "P(correct)": by(s.right), "mean log-prob": by(s.logp / s.length),
        "P(NO) at the cut": by(half),
        "... if unfinished": dict(auroc=auroc(half[going], good[going])),
        "vote": dict(accuracy=votes[-1]),
        "weighted vote": dict(accuracy=voted(s.stated, s.score, N, s.right)),
        "some right": dict(accuracy=good.any(1).float().mean().item())},
        f"{len(s.problems)} {c.split} problems, {N} samples of {mean:.1f} tokens; the cut is after {place}")
    # adaptive best of N, by P(NO) and by what sampling tells for nothing
    def lowest(p):
        one, top = tune.score.mean().item(), best_of_n(p, tune.score, N).mean().item()
        grid = p.flatten().quantile(torch.linspace(0, 1, 51)).tolist()
        return next((t for t in grid if decoding.adaptive_value(p, tune.score, threshold=t)[0]
                     >= one + gain * (top - one)), grid[-1])

    def adaptive(p, t):
        right, used = decoding.adaptive_value(p, s.score, threshold=t)
        top = best_of_n(p, s.score, N).mean().item()
        return dict(accuracy=right, samples=used, gain_kept=kept(right, top),
                    fixed=at_cost(counts, fixed, used), vote=at_cost(counts, votes, used))

    def kept(right, top):  # of best of N's gain over one sample, if any
        return (right - fixed[0]) / (top - fixed[0]) if top > fixed[0] else 0.0
    chosen, rival = lowest(tune.no), lowest(tune.logp / tune.length)
    rows = {f"adaptive@{t:g}": adaptive(s.no, t) for t in (0.3, 0.4, 0.5, 0.6, 0.7)} | {
        "P(NO), chosen": adaptive(s.no, chosen),
        "log-prob, chosen": adaptive(s.logp / s.length, rival)}
    out |= tabled(run, rows,
                  f"adaptive best of {N}, threshold of P(NO) chosen on train: {chosen:.2f}, and "
                f"{rival:.2f} for mean log-prob")

    # pruning, by P(NO) and by lot
    def pruned(p):
        alive = decoding.survivors(p, keep=share)
        pick = s.no.masked_fill(~alive, -1.0).argmax(1, keepdim=True)
        cost = decoding.pruned_tokens(s.length, place, alive).float().mean().item()
        right = s.score.gather(1, pick).mean().item()
        return dict(accuracy=right, tokens=cost / (N * mean), gain_kept=kept(right, fixed[-1]),
                    fixed=at_cost([n * mean for n in counts], fixed, cost),
                    vote=at_cost([n * mean for n in counts], votes, cost))
    lots = [pruned(torch.rand(half.shape, generator=rng(c, 10 + i))) for i in range(20)]
    by_lot = {k: fmean(x[k] for x in lots) for k in lots[0]}
    out |= tabled(run, {"pruned": pruned(half), "pruned by lot": by_lot},
                f"after {place} tokens {share:g} of {N} go on; tokens: 1 is all {N} whole")
    # annealing
    tries = [drawn(quiet, tok, world, s.problems, c, 40 + k, temperature=decoding.annealed(k))
             for k in counts]
    no = torch.stack([asked(model, [(p, y) for (p, _), y in zip(s.rows[::N], said)], ids, c, pad)[0]
                      for *_, said, _ in tries], 1)                                      # [P, N]
    score = torch.cat([x[-1] for x in tries], 1)                                         # [P, N]
    return out | dict(threshold=chosen) | tabled(run, {f"annealed@{n}": dict(
        accuracy=score[:, :n].gather(1, no[:, :n].argmax(1, keepdim=True)).mean().item(),
        fixed=fixed[n - 1])
        for n in counts}, "best of n by P(NO), the k-th at temperature 1 - 2^(1-k); fixed: at 1")


def equilibrium(target, tok, c, run, *, train_prompts: Count = 1024, rounds: Count = 5000,
                eta: Positive = 0.1, lam=0.1):
    """Equilibrium-ranking, 2310.09139, of the distinct answers of N samples: accuracy by who ranks
    them."""
    world, pad, N = tasks.task(c.data), tok.pad or 0, c.samples
    model, quiet, ids = taught(target, tok, world, c, run, train_prompts)
    s = tried(model, quiet, ids, tok, world, c, c.split, 6)
    P, sampler = len(s.problems), s.logp.double()
    given = torch.stack([scored(model, [([*p, v], y) for p, y in s.rows], c, pad, logp_sum)
                         for v in (ids.right, ids.wrong)]).view(2, P, N).double()
    names, gen, dis = [], torch.zeros(P, 2, N).double(), torch.full((P, 2, N), 0.5).double()
    for i in range(P):
        found, g, d = decoding.answer_views(s.stated[i], sampler[i], given[:, i],
                                            s.right[i].double())
        keep = [j for j, a in enumerate(found) if a] or [0]              # no answer is no candidate
        names.append([found[j] for j in keep])
        gen[i, :, :len(keep)], dis[i, :, :len(keep)] = g[:, keep], d[:, keep]
    first_g, first_d = decoding.equilibrium(gen, dis, rounds=0)
    last_g, last_d = decoding.equilibrium(gen, dis, rounds=rounds, eta=eta, lam=lam)
    truth = [dict(zip(a, r)) for a, r in zip(s.stated, s.score.tolist())]

    def ranked(by):
        best = by[:, 0].masked_fill(gen.sum(1) == 0, -1.0).argmax(1).tolist()
        return fmean(t[a[j]] for t, a, j in zip(truth, names, best))
    return tabled(run, {k: dict(accuracy=v) for k, v in {
        "one sample": s.score.mean().item(), "vote": voted(s.stated, s.score, N),
        "weighted vote": voted(s.stated, s.score, N, s.right),
        "best sample by P(correct)": best_of_n(s.right, s.score, N).mean().item(),
        "best sample by mean log-prob": best_of_n(s.logp / s.length, s.score, N).mean().item(),
        "generator P(a|correct)": ranked(gen), "generator, first": ranked(first_g),
        "discriminator P(correct|a)": ranked(dis), "discriminator, first": ranked(first_d),
        "equilibrium": ranked(last_d), "equilibrium, generator": ranked(last_g),
        "some right": (s.score > 0).any(1).float().mean().item()}.items()},
        f"{P} {c.split} problems, {fmean(map(len, names)):.1f} distinct answers of {N} samples")


DECODERS = dict(speculative=speculative, ead=ead, deal=deal, genarm=genarm, equilibrium=equilibrium,
                self_eval=self_eval)
AXES = dict(decode=DECODERS, drafter=DRAFTERS, length=LENGTHS, loss=LOSSES, select=SELECT,
            source=SOURCES,
            kernels=kernels.MODES)

# --- 10 train -------------------------------------------------------------------------------------


def readers(c, f):
    """{field: (whether this run reads it, what does)} of the fields that not every run reads."""
    drafts, corpus = f.decode.func is speculative, is_corpus(c.data)
    names = ("draft", "drafter", "length", "temperature", "top_k", "top_p", "max_new", "together",
             "loss",
             "select", "source", "ref_batch", "refresh", "eval_rows", "chat", "rows", "prompt",
             "stop")
    fields = dict.fromkeys(names, (drafts, "--decode speculative"))
    fields |= dict(samples=(not drafts, "decoders that draw several samples a prompt"))
    if drafts and not (c.steps and "draft" in needs(f.drafter)):
        trains = ("loss", "select", "source", "batch", "lr", "warmup", "clip", "ref_batch",
                  "refresh")
        fields |= dict.fromkeys(trains, (False, "runs that train a draft"))
    elif drafts:
        fields |= dict(ref_batch=("ref" in needs(f.select), "--select that reads a reference"),
                       refresh=(c.source != "data", "--source that samples"))
    if drafts:
        sampled = bool(c.temperature)
        fields |= dict(top_k=(sampled, "--temperature above 0"),
                       top_p=(sampled, "--temperature above 0"),
                       draft=("draft" in needs(f.drafter), "drafters that are models"),
                       prompt=(corpus, "a text as --data"),
                       chat=(not corpus, "demonstrations, not a text"))
    return fields


def check(c, f):
    """UserError for all that can be known before anything is made: files, folders, what does not
    combine."""
    if f.decode.func is not speculative and is_corpus(c.data):
        raise UserError(f"--decode {c.decode} needs answers to score, not the text {c.data}: take --config "
                        f"{c.decode}, or a task as --data")
    tasks.check_data(c.data)
    if c.split not in tasks.held_out(c.data):
        raise UserError(f"--split {c.split}: {c.data} has {', '.join(tasks.held_out(c.data))}")
    most = sft.find(c.init, c.config, make=False)
    if f.decode.func is speculative and c.context > most:
        raise UserError(f"--context {c.context} exceeds the {most} tokens of {c.init}: lower it")
    if f.decode.keywords.get("lenience", 1) < 1 and not c.temperature:
        raise UserError("--lenience below 1 is for sampling: give a --temperature")
    if c.decode in ("equilibrium", "self_eval") and c.samples < 2:
        raise UserError(f"--samples {c.samples}: --decode {c.decode} compares samples: at least 2")
    if f.decode.func is speculative and f.length.keywords.get("gamma", 0) >= most:
        raise UserError(f"--gamma {f.length.keywords['gamma']}: a draft longer than the target's context of "
                        f"{most}")
    if f.decode.func is speculative and is_corpus(c.data) and c.prompt + c.max_new > most:
        raise UserError(f"--prompt {c.prompt} and --max_new {c.max_new} exceed the {most} tokens of {c.init}")
    if f.decode.func is speculative and "draft" in needs(f.drafter):
        if re.fullmatch(r"\d+x\d+", c.draft):
            preset(c.draft, prefs.tokenizer())
        else:
            sft.find(c.draft, c.config, make=False, option="--draft")
    for key in {"thresholds", "alphas"} & f.decode.keywords.keys():
        numbers(f.decode.keywords[key], key)
    for key in {"small_model", "middle_model"} & f.decode.keywords.keys():
        preset(f.decode.keywords[key], prefs.tokenizer())
    if "recipe" in f.decode.keywords:
        sft.find(f"base:{f.decode.keywords['recipe']}", c.config, make=False)


def train(c, f):
    """One run: load the target, train what helps it, decode, measure. -> the numbers of the
    table."""
    check(c, f)
    folder = sft.find(c.init, c.config, device=c.device, seed=c.seed)
    kernels.use(c.kernels)
    with Run(c, f, "specdec", CURVES) as run:
        if "result" in run.info:
            run.say(f"  finished already: {run.last or run.folder}")
            return run.info["result"]
        target, tok = load(folder, c.device, getattr(torch, c.dtype))
        if not isinstance(target, Transformer):
            raise UserError(f"--init {c.init} is a reward model; specdec.py decodes with a language model")
        target.requires_grad_(False)
        run.say(f"{run.folder}: target {sum(p.numel() for p in target.parameters()) / 1e6:.2f} M parameters, "
                f"{c.device}")
        have = dict(target=target, tok=tok, c=c, f=f, run=run)
        told = f.decode(**{x: have[x] for x in needs(f.decode)})
        if c.stop and c.stop < c.steps and f.decode.func is speculative:
            run.say(f"  paused at step {c.stop}: the same command with --resume, without --stop, goes on")
            return told
        return run.finish(**told)


# --- main -----------------------------------------------------------------------------------------


def main(argv=None):
    """python specdec.py …: see the docstring above, or --help."""
    return launch("specdec", Config, PRESETS, AXES, __doc__, train, argv, readers)


if __name__ == "__main__":
    cli(main)
