"""
specdec.py - speculative decoding: train a draft, verify, measure; and other ways to decode.

    python specdec.py                                   # a draft for a small base model, made first
    python specdec.py --config adaspec,docs             # of a task: docstrings from signatures
    python specdec.py --init path/to/7B --draft path/to/0.5B --data gsm8k.jsonl --steps 0
    python specdec.py --claim adaspec --seeds 5         # the paper's claim, and at equal data

Letters  p the target's distribution, q the draft's; G drafted tokens a round; B rows, V vocabulary;
         c = a draft step / a target step, v = a target step over G + 1 tokens / over one
Watch    efficiency E, tokens a target pass, and the measured speedup beside the predicted one,
         E / (G c + v): a gap between them is overhead (on CUDA also that only plain decoding
         replays graphs). acceptance: of the tokens tested, up to the first refused;
         kept_of_drafted: of all; independent: E if each were kept with the mean acceptance;
         drafts: mean G. Other decoders stand beside their controls; a task gives their prompts.
"""
import copy
import math
import random
import re
from collections import Counter
from dataclasses import dataclass, replace
from functools import partial
from itertools import accumulate, groupby, pairwise
from statistics import fmean
from types import SimpleNamespace
from typing import Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch.nn.utils import clip_grad_norm_
from tqdm import tqdm

import kernels
import sft
from data import prefs, tasks
from data.run import (Count, Positive, Range, Run, Share, Training, UserError, alone, batch_indices,
                      checkpoint, cli, clock, launch, needs, rank, ranks, share, start_ranks)
from data.stats import accuracy, auroc, best_of_n, bon_kl
from data.text import is_corpus
from model import (ADAPTERS, PEFT, Cache, Work, adapter_readers, adapter_state, check_adapters,
                   check_request, clip_gradients, collate, collect, foresee, generate, init, load,
                   passes, plain_model, precision, prefill, preset, save, save_trained, shard,
                   summed, tempered, token_logprobs, use, with_peft)
from optim import linear, optimiser, set_lr, state_bytes

# --- config ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Config(Training):
    """What every run has; what belongs to a method is an argument of its function."""
    data: str = "stdlib"         # a text, or a task or file: what a draft learns, and the prompts
    init: str = "base:target"    # the target
    draft: str = "base:draft64"  # a checkpoint, or a new draft of LAYERSxWIDTH
    rows: int = 0                # learn from only so many demonstrations or windows (0: all)
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
    select: str = "every"        # which row of SELECT says which tokens of a micro-batch count
    source: str = "data"         # which row of SOURCES: whose completions the draft learns on
    steps: int = 300             # of the draft's training; 0: it is used as it is
    batch: Count = 16            # rows a step
    context: Range("[2, inf)") = 96  # tokens of a training row
    lr: Positive = 3e-3          # peak learning rate, of the draft or of what a decoder trains
    warmup: int = 30             # steps of linear warm-up
    clip: Positive = 1.0         # largest gradient norm
    ref_batch: Count = 16        # rows a step of the reference draft, where --select reads one
    refresh: Count = 50          # steps between new samples, where --source samples
    eval_rows: Count = 64        # held-out rows on which agreement is measured
    eval_every: Count = 100      # steps between such measurements
    keep: Count = 1              # checkpoints to keep
    dtype: str = "auto"          # of the weights that decode: float32, or bfloat16 (CUDA's default)


PRESETS = dict(
    docs=dict(init="base:target_docs", data="signatures", context=320, micro=20),  # docstrings
    # half a minute on any CPU; draft and target are then alike: it shows nothing
    tiny=dict(steps=4, batch=4, ref_batch=4, context=48, prompts=4, max_new=12, prompt=8,
              eval_rows=4, refresh=2, samples=4, train_prompts=8, pairs=64, small_model="1x32",
              middle_model="1x64", rounds=50))
CURVES = {"loss": ["loss", "kl", "asked"], "acceptance Σ min(p, q)": ["overlap"]}

# --- the rule: 2211.17192, 2302.01318 -------------------------------------------------------------


def draw(p, u):
    """Sample by inverting the distribution function.

    p [..., V] of any sum, u [...] in [0, 1) -> [...]
    """
    cdf = p.double().cumsum(-1)
    return torch.searchsorted(cdf, u[..., None].double() * cdf[..., -1:], right=True).squeeze(-1)


def law(logits, temperature=1.0, top_k=0, top_p=1.0):
    """The distribution that is sampled from [..., V]; greedy: a one on the argmax."""
    if temperature == 0:
        return F.one_hot(logits.argmax(-1), logits.size(-1)).to(logits.dtype)
    return tempered(logits, temperature, top_k, top_p).softmax(-1)


def verify(p, q, drafted, count, u, *, lenience=1.0):
    """Which drafted tokens stay, and the one after them: together distributed as p, whatever q is.

    Token x is kept with probability min(1, p(x) / q(x)); after the first that is not, one of
    max(p - q, 0), normalised, and after a block kept whole one of p (Leviathan et al., 2211.17192,
    Algorithm 1). Greedy is the same with one-hot p. lenience l < 1 is their lossy variant: l q for
    q, so that no token gets more than p / l. p [B, G+1, V];  q [B, G, V], what the tokens were
    drawn from, or None where nothing was drawn (point masses);  drafted [B, G], of which count [B]
    are real;  u [B, G+1, 2], uniform: of the tests, of the drawn tokens.
    -> kept [B], next token [B]
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
    rest = torch.where(rest.sum(-1, keepdim=True) > 0, rest, p)  # p = q: rejection was rounding
    return kept, draw(rest, u[row, kept, 1])


# --- the length of a draft: is a (k+1)-th token worth drafting? -> bool or bool [B] ---------------
# A rule names what it reads: k; sure [B, k], the draft's own probabilities; tally, what was counted
# so far; rows of FACTS and MEMORIES. It never sees the verdict on the draft at hand: lossless.


def fixed(k, *, gamma: Count = 4):
    """As many every time."""
    return k < gamma


LENGTHS = dict(fixed=fixed)
FACTS = {}       # of a drafter, measured beforehand: (target, drafter, prompts, c, f) -> fact
MEMORIES = {}    # of each row: a class with keep(order), note(kept, count)


def worth(rule, reads, known, room, k, sure):
    """Which rows want a (k+1)-th token: those with room for it, if the rule says so.   -> [B]"""
    known = known | dict(k=k, sure=sure)
    return (k < room) & rule(**{x: known[x] for x in reads})


# --- a drafter: propose(text, length, u, more) drafts after text[b, :length[b]] -------------------
# -> drafted [B, G], q [B, G, V] (None: nothing was drawn), count [B] (row b's real drafts), sure
# [B, G] (the draft's own probability of each). more(k, sure [B, k]) -> bool [B]: which rows want a
# (k+1)-th. start and keep follow the loop's batch.


class Small:
    """A smaller language model of the target's vocabulary; no padding row of a head is drafted."""
    per_token = 1.0                        # draft steps for a drafted token

    def __init__(self, model, vocab, words, sampling):
        self.model, self.vocab, self.sampling = model, vocab, sampling
        self.words = min(words, model.config.vocab_size)
        self.context = model.config.max_position_embeddings

    def start(self, prompts, length, rows, new):
        self.cache, self.lacks = prefill(self.model, prompts, length, rows, new)[1], 2

    def keep(self, order):
        self.cache.keep(order)

    def propose(self, text, length, u, more):
        """Feeds first what the cache lacks: two tokens, as a block kept whole leaves the last
        drafted one unread, and one more after every round without a draft.
        """
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


def small(draft, tok, c, target):
    """A smaller language model of the target's vocabulary."""
    return Small(draft, target.config.vocab_size, tok.vocab_size, (c.temperature, c.top_k, c.top_p))


DRAFTERS = dict(small=small)
BESIDE = {}      # drafters that need nothing: each races beside the chosen one
PREPARE = {}     # what a drafter asks for, by name: (target, tok, held, c, f, run) -> it, numbers

# --- the loop -------------------------------------------------------------------------------------


def reported(logits, temperature, top_k, top_p):
    """log-probs as generate() reports them, and the law that is sampled from.   both [..., V]"""
    kept = tempered(logits, temperature, top_k, top_p) if temperature else logits
    logp = torch.log_softmax(kept, -1)
    return logp, logp.exp() if temperature else law(logits, 0)


class Flight:
    """The rows in flight: what of them is committed, prompt and completion.

    text, logp [B, W], u [B, W', 3] and start, end [B] (of completions), of all rows; of the n that
    are not done: row, their places there; length, committed tokens.
    """

    def __init__(self, prompts, start, max_new, most, stop, u):
        self.text, self.stop = F.pad(prompts, (0, max_new + most + 1)), stop             # [B, W]
        self.logp = torch.zeros_like(self.text, dtype=torch.float32)
        self.row = torch.arange(len(start), device=start.device)                         # [n]
        self.length, self.start, self.end = start.clone(), start, start + max_new        # [n]
        self.u, self.ahead = u, torch.arange(most + 1, device=start.device)

    def commit(self, block, logps, kept):
        """Write the kept tokens of block [n, G+1] and one more; the rest is overwritten later.

        -> fresh [n], committed tokens up to a stop, and whether it came before that one more [n]
        """
        at = torch.arange(block.size(1), device=block.device)
        place = self.row[:, None], self.length[:, None] + at
        self.text[place] = block
        self.logp[place] = logps.gather(-1, block[..., None]).squeeze(-1)
        ends = torch.isin(block, self.stop) & (at <= kept[:, None])                      # [n, G+1]
        fresh = torch.where(ends.any(1), ends.long().argmax(1), kept) + 1                # [n]
        self.length = self.length + fresh
        self.done = ends.any(1) | (self.length >= self.end[self.row])
        return fresh, ends.any(1) & (fresh <= kept)

    def leave(self, followers):
        """Finished rows leave, the last rows alive fill the gaps.   -> whether any is left"""
        n = int((~self.done).sum())
        if n and n < len(self.row):
            order, done = torch.arange(len(self.row), device=self.row.device), self.done
            order[:n][done[:n]] = order[n:][~done[n:]]
            order = order[:n]
            for x in followers:
                x.keep(order)
            self.row, self.length = self.row[order], self.length[order]
        return n > 0


def one_round(target, drafter, flight, cache, want, tally, context, sampling, lenience):
    """Draft, verify, commit, of every row in flight.   -> kept, count [n], as verify() has them"""
    # 1. draft: never past the end, nor past the context
    text, length = flight.text[flight.row], flight.length                                # [n, W]
    room = torch.minimum(flight.end[flight.row] - length - 1, context - length.max())    # [n]
    row, begun = flight.row[:, None], length - flight.start[flight.row]                  # [n]
    u = flight.u[row, begun[:, None] + flight.ahead]                                # [n, most+1, 3]
    drafted, q, count, sure = drafter.propose(text, length, u, partial(want, room))
    # 2. verify
    last = text.gather(1, length[:, None] - 1)                                           # [n, 1]
    cache.length, cache.used = length - 1, int(length.max()) - 1
    logits = target.logits(target(torch.cat([last, drafted], 1), cache))            # [n, G+1, V]
    logps, p = reported(logits, *sampling)
    kept, token = verify(p, q, drafted, count, u[:, :drafted.size(1) + 1, 1:], lenience=lenience)
    # 3. commit; what is drafted behind a stop does not count
    block = torch.cat([drafted, last], 1).scatter(1, kept[:, None], token[:, None])      # [n, G+1]
    fresh, early = flight.commit(block, logps, kept)
    tally.note(*(torch.where(early, fresh, x) for x in (kept, count)), sure)
    tally.tokens += int(fresh.sum())
    return kept, count


@torch.no_grad()
def speculate(target, drafter, prompts, max_new, length_rule, *, temperature=0.0, top_k=0,
              top_p=1.0, stop=None, generator=None, lenience=1.0, tally=None, **facts):
    """model.generate, one sample a prompt, by drafting and verifying -> (Rollout, Tally).

    Rounds: draft after the committed tokens, one target pass over the last of them and the draft,
    verify, commit. The target's cache holds all committed tokens but the last, the draft's all but
    two; rolling back is setting their length. Rows commit different numbers; finished ones leave
    the batch. Row b's i-th new token has three uniform numbers fixed beforehand (draft, test,
    draw), so that the other rows change nothing (but through optimal's counts, which all share).
    length_rule: a row of LENGTHS with its arguments bound; facts: what it reads of FACTS.
    Raises UserError where they do not fit the context.
    """
    sampling, reads = (temperature, top_k, top_p), needs(length_rule)
    device, most = target.head.device, length_rule.keywords["gamma"]
    context = min(target.config.max_position_embeddings, drafter.context)
    check_request(replace(target.config, max_position_embeddings=context), prompts, 1, max_new,
                  temperature, top_k)
    stop = target.config.eos_token_id if stop is None else stop
    stop = torch.tensor(stop, device=device, dtype=torch.long)
    tally, pad = tally or Tally(), max(target.config.pad_token_id, 0)
    before, index = tally.rounds, {p: i for i, p in enumerate(dict.fromkeys(map(tuple, prompts)))}
    rows = torch.tensor([index[tuple(p)] for p in prompts], device=device)               # [B]
    distinct, _ = collate([(p, ()) for p in index], pad, device)
    size = torch.tensor([len(p) for p in index], device=device)                          # [U]
    u = torch.rand(len(rows), max_new + most + 1, 3, generator=generator).to(device)
    hidden, cache = prefill(target, distinct, size, rows, max_new + most)
    drafter.start(distinct, size, rows, max_new + most)
    start = size[rows]                                                                   # [B]
    flight = Flight(distinct[rows], start, max_new, most, stop, u)
    memories = {x: MEMORIES[x](start) for x in reads if x in MEMORIES}
    want = partial(worth, length_rule, reads, dict(tally=tally, **facts, **memories))
    logps, p = reported(target.logits(hidden), *sampling)                                # [B, V]
    flight.commit(draw(p, u[:, 0, 2])[:, None], logps[:, None], torch.zeros_like(start))
    while flight.leave([cache, drafter, *memories.values()]):
        verdict = one_round(target, drafter, flight, cache, want, tally, context, sampling,
                            lenience)
        for memory in memories.values():
            memory.note(*verdict)
    place = start[:, None] + torch.arange(max_new, device=device)                        # [B, new]
    logp = flight.logp.gather(1, place)
    return collect(distinct[rows], start, flight.text.gather(1, place), logp, stop, pad,
                   tally.rounds - before), tally


# --- distillation: 2310.08461, a loss a token, which tokens count, on whose completions -----------


def forward_kl(h, W, t, U):
    """Σ p log(p / q), of the draft's h [N, D], W [V, D] and the target's t, U.   -> nats [N]"""
    return kernels.linear_distill(h, W, t, U, "forward_kl")


def every():
    """All tokens of a micro-batch."""
    return slice(None)


def given(student, rows, known, step, batch):
    """The data's own completions.   -> the rows of a step, and the target's states of them"""
    at = batch_indices(len(rows), batch, step, student.c.seed).tolist()
    return [rows[i] for i in at], known and [known[i] for i in at]


LOSSES = dict(forward_kl=forward_kl)
SELECT = dict(every=every)
SOURCES = dict(data=given)
ASKED = {}     # what a selection asks for, by name: (student, tokens, mask, h, t) -> it
BEFORE = {}    # … and makes before step 0: (student, tok, rows, known, held, run)


def states(model, tokens, mask):
    """The hidden states that predict the scored tokens [N, D]."""
    return model(tokens)[:, :-1][mask[:, 1:] > 0]


class Student:
    """A draft that learns from a target, and what it keeps between steps.

    words: the tokenizer's tokens, maybe fewer than rows of a head;  pool: samples that are left;
    reference: another draft, where --select compares with one."""

    def __init__(self, draft, target, words, c, f):
        self.draft, self.target, self.words, self.c, self.f = draft, target, words, c, f
        self.opt, self.pool, self.reference = optimiser(draft, lr=c.lr), [], None
        self.generator = torch.Generator().manual_seed(c.seed)

    def loss(self, draft, h, t):
        """Of a draft's states h [N, D] at the target's t [N, D].   -> nats [N]"""
        return self.f.loss(h, draft.head[:self.words], t, self.target.head[:self.words])

    def learn(self, rows, known):
        """Accumulate the gradient of a step's rows. -> loss of the tokens that count, their share

        With a selection, head and backward see the selected tokens alone. ours: the mean over
        these, the authors' code divides by all; a micro-batch weighs by its tokens, and a selection
        compares those of one micro-batch, as theirs does."""
        target, totals = self.target, Counter(mean=0.0, share=0.0)
        for part, real in passes(torch.arange(len(rows)), self.c.micro):
            tokens, mask = collate([rows[i] for i in part], target.config.pad_token_id,
                                   self.c.device)
            with torch.no_grad():                                                        # [N, D]
                t = torch.cat([known[i] for i in part]) if known else states(target, tokens, mask)
            h = states(self.draft, tokens, mask)
            with torch.no_grad():
                facts = {x: ASKED[x](self, tokens, mask, h, t) for x in needs(self.f.select)}
                chosen = self.f.select(**facts)                                          # [N]
            loss = self.loss(self.draft, h[chosen], t[chosen])
            weight = len(h) / sum(len(y) for _, y in rows)
            (loss.mean() * weight * real).backward()
            if real:
                totals.update(mean=loss.mean().item() * weight, share=len(loss) / len(h) * weight)
        return tuple(summed(totals).values())

    def step(self, step, rows, known, batch):
        """One step on `batch` rows; known: of remember(), or None.   -> numbers of the log"""
        loss, share = self.learn(*self.f.source(self, rows, known, step, batch))
        norm = clip_gradients(self.draft, self.c.clip)
        set_lr(self.opt, self.c.lr * max(0.1, linear(step, self.c.steps, self.c.warmup)))
        self.opt.step()
        self.opt.zero_grad()
        return dict(loss=loss, share=share, norm=norm)

# --- train ----------------------------------------------------------------------------------------


def speculative(target, tok, c, f, run, *, lenience: Range("(0, 1]") = 1.0):
    """Train a draft, then decode held-out prompts with it, by what races beside it, and plainly."""
    corpus, known, metrics, name = is_corpus(c.data), dict(target=target, tok=tok, c=c), {}, ""
    held = tasks.rows(c, tok, c.split)
    held = held[:-1] if corpus and len(held) > 1 else held       # a text's last window may be short
    prompts = [head(row, c, corpus) for row in held][:c.prompts]
    if not prompts:
        raise UserError(f"no row of the split {c.split} fits --context {c.context}, prompt and "
                        "completion together: raise it")
    if len(prompts) < c.prompts:
        run.say(f"  {len(prompts)} held-out prompts, fewer than --prompts {c.prompts}")
    drafters = {x: make() for x, make in BESIDE.items()}
    asks = needs(f.drafter)
    for x in [x for x in asks if x in PREPARE]:
        known[x], metrics = PREPARE[x](target, tok, held[:c.eval_rows], c, f, run)
        name = "draft"
    drafters[name or c.drafter] = f.drafter(**{x: known[x] for x in asks})
    with alone():                                               # of several ranks the first
        return share(rank() or metrics | race(target, drafters, prompts, c, f, run, lenience))


DECODERS = dict(speculative=speculative)
AXES = dict(decode=DECODERS, drafter=DRAFTERS, length=LENGTHS, loss=LOSSES, select=SELECT,
            source=SOURCES, peft=PEFT, kernels=kernels.MODES)


def train(c, f):
    """One run: load the target, train what helps it, decode, measure. -> the table's numbers."""
    check(c, f)
    folder = sft.find(c.init, c.config, device=c.device, seed=c.seed)
    use(c)
    with Run(c, f, "specdec", CURVES) as run:
        if "result" in run.info:
            run.say(f"  finished already: {run.last or run.folder}")
            return run.info["result"]
        target, tok = load(folder, c.device, getattr(torch, c.dtype), chat=c.chat)
        run.say(f"{run.folder}: target {parameters(target) / 1e6:.2f} M parameters, {c.device}")
        known = dict(target=target.requires_grad_(False), tok=tok, c=c, f=f, run=run)
        metrics = f.decode(**{x: known[x] for x in needs(f.decode)})
        if c.stop and c.stop < c.steps:
            run.say(f"  paused at step {c.stop}: the same command with --resume, without --stop, "
                    "goes on")
            return metrics
        return run.finish(**metrics)


def main(argv=None):
    """python specdec.py …: see the docstring above, or --help."""
    return launch("specdec", Config, PRESETS, AXES, __doc__, train, argv, readers, ranks=True)


# === lora: 2106.09685, adapters in the place of all weights; their base is the reference ==========

PRESETS["lora"] = dict(peft="lora", lr=1.2e-2)                 # ours: four times full training's

# === check: what a run reads, and what does not combine, told before anything is made =============

CHECKS, READERS = {}, {}     # of a decoder: check(c, f), and readers(c, f) of the fields below
OWN = ("samples", "steps", "batch", "lr", "warmup", "clip")
DRAFTS = ("draft", "drafter", "length", "temperature", "top_k", "top_p", "max_new", "together",
          "loss", "select", "source", "ref_batch", "refresh", "eval_rows", "eval_every",
          "save_every", "keep", "micro", "context", "chat", "rows", "prompt", "stop", "peft",
          "recompute", "merge")


def readers(c, f):
    """{field: (whether this run reads it, what does)} of the fields that not every run reads."""
    fields = dict.fromkeys(DRAFTS, (False, "--decode speculative"))
    fields |= dict.fromkeys(OWN, (False, "decoders that train or draw several samples a prompt"))
    fields |= dict(compile=(False, "sft.py, ppo.py and grpo.py"),
                   slots=(False, "grpo.py, ppo.py and dpo.py")) | tasks.file_readers(c)
    fields |= dict(epochs=(False, "sft.py, reward.py, grpo.py and dpo.py"))
    return fields | (READERS[c.decode](c, f) if c.decode in READERS else {})


def check(c, f):
    """UserError for what does not combine, and for files and folders that are not there."""
    start_ranks(c.device)                                       # alone without torchrun
    tasks.check_data(c.data, **tasks.reading(c))
    if c.split not in tasks.held_out(c.data):
        raise UserError(f"--split {c.split}: {c.data} has {', '.join(tasks.held_out(c.data))}")
    sft.find(c.init, c.config, make=False)
    spread = (c.decode, c.drafter, c.select, c.source) == ("speculative", "small", "every", "data")
    if ranks() > 1 and not (spread and c.steps):
        raise UserError("--decode speculative --drafter small --select every --source data with "
                        "--steps runs on several ranks: start others without torchrun")
    CHECKS[c.decode](c, f)


def draft_readers(c, f):
    """readers() of speculative decoding."""
    fields = dict.fromkeys((*DRAFTS, *OWN), (True, ""))
    corpus, asks = is_corpus(c.data), needs(f.drafter)
    trains = ("loss", "select", "source", "batch", "lr", "warmup", "clip", "ref_batch", "refresh",
              "rows", "eval_every", "save_every", "keep", "stop", "peft", "recompute", "merge")
    if not (c.steps and "draft" in asks):
        fields |= dict.fromkeys(trains, (False, "runs that train a draft"))
    else:
        fields |= adapter_readers(c)
        fields |= dict(ref_batch=("ref" in needs(f.select), "--select that reads a reference"),
                       refresh=(c.source != "data", "--source that samples"))
    sampling = c.temperature, "--temperature above 0"
    return fields | dict(
        top_k=sampling, top_p=sampling, samples=(False, "decoders that draw several samples"),
        draft=(bool({"draft", "foreign"} & {*asks}), "drafters that are models"),
        prompt=(corpus, "a text as --data"), chat=(not corpus, "demonstrations, not a text"))


def check_draft(c, f):
    """What speculative decoding does not combine."""
    most, gamma = sft.find(c.init, c.config, make=False), f.length.keywords["gamma"]
    if c.context > most:
        raise UserError(f"--context {c.context} exceeds the {most} tokens of {c.init}: lower it")
    if f.decode.keywords["lenience"] < 1 and not c.temperature:
        raise UserError("--lenience below 1 is for sampling: give a --temperature")
    if gamma >= most:
        raise UserError(f"--gamma {gamma}: a draft longer than the target's context of {most}")
    if is_corpus(c.data) and c.prompt + c.max_new > most:
        raise UserError(f"--prompt {c.prompt} and --max_new {c.max_new} exceed the {most} tokens "
                        f"of {c.init}")
    for x in [x for x in needs(f.drafter) if x in PREPARE]:
        if re.fullmatch(r"\d+x\d+", c.draft):
            preset(c.draft, prefs.tokenizer())
            if c.peft != "full":
                raise UserError(f"--peft {c.peft} --draft {c.draft}: a new draft has nothing that "
                                "an adapter could keep; give a checkpoint")
        else:
            check_adapters(c, c.draft)
            sft.find(c.draft, c.config, make=False, option="--draft")


CHECKS["speculative"], READERS["speculative"] = check_draft, draft_readers


# === race: plain decoding and each drafter in turns, and whether greedy outputs are equal =========


@torch.no_grad()
def gap(target, a, b, prompt):
    """Between the target's two likeliest tokens, in nats, where completions part; None: nowhere."""
    if a == b:
        return None
    i = next(i for i, (x, y) in enumerate(zip([*a, -1], [*b, -1])) if x != y)
    text = torch.tensor([[*prompt, *a[:i]]], device=target.head.device)
    best = target.logits(target(text)[:, -1])[0].topk(2).values
    return (best[0] - best[1]).item()


def race(target, drafters, prompts, c, f, run, lenience):
    """Decode the prompts plainly and with each drafter, in turns: a busy machine slows all alike.

    -> numbers of the table, drafter x's as "x_speedup", …; greedy outputs are compared token by
    token.
    """
    if c.temperature and lenience < 1:
        run.say("  lossy: these samples do not have the target's law")
    device, facts = target.head.device, {}
    for x, drafter in drafters.items():
        facts[x] = {k: fact(target, drafter, prompts, c, f) for k, fact in FACTS.items()}
    sampling = dict(temperature=c.temperature, top_k=c.top_k, top_p=c.top_p)
    parts = [prompts[i:i + c.together] for i in range(0, len(prompts), c.together)]
    for i, part in enumerate(tqdm([parts[0], *parts], desc="race", disable=None, leave=False)):
        if i < 2:              # the first part warms everything up and is not counted
            plain, tokens, lanes = 0.0, 0, {}
            for x in drafters:
                lanes[x] = SimpleNamespace(tally=Tally(), seconds=0.0, gaps=[])
        draws = partial(torch.Generator().manual_seed, c.seed * 100_003 + i)     # alike for all
        began = clock(device)
        whole = generate(target, part, c.max_new, generator=draws(), **sampling)
        plain, tokens = plain + clock(device) - began, tokens + whole.mask.sum().item()
        for x, drafter in drafters.items():
            began = clock(device)
            roll, _ = speculate(target, drafter, part, c.max_new, f.length, generator=draws(),
                                lenience=lenience, tally=lanes[x].tally, **facts[x], **sampling)
            lanes[x].seconds += clock(device) - began
            if not c.temperature:
                pairs = zip(whole.completions(), roll.completions(), part)
                lanes[x].gaps += [gap(target, a, b, prompt) for a, b, prompt in pairs]
    out = table(run, drafters, lanes, facts, len(prompts), tokens / plain)
    return out if c.temperature else out | equality(run, lanes, target)


def equality(run, lanes, target):
    """Say how many greedy outputs are plain decoding's own.   -> numbers of the table"""
    same = {x: lane.gaps.count(None) for x, lane in lanes.items()}
    apart = [x for lane in lanes.values() for x in lane.gaps if x is not None]
    close = max(apart, default=0.0) < (1e-3 if target.head.dtype == torch.float32 else 0.1)
    run.say("  greedy outputs equal to plain decoding's: "
            + ", ".join(f"{x} {n} of {len(lanes[x].gaps)}" for x, n in same.items()))
    if apart:
        run.say(f"  where they part the target's two likeliest tokens are at most {max(apart):.1e} "
                "nats apart: " + ("rounding" if close else "WRONG, the outputs differ"))
    return dict(widest_gap=max(apart, default=0.0)) | {
        f"{x}_same": n / len(lanes[x].gaps) for x, n in same.items()}


# === table: the numbers of a race: what is counted, and what is told of it ========================

BINS = 10    # of the draft's confidence, in a tally's tries and hits


class Tally:
    """What was counted: the numbers of a speculative run, and what draft lengths are chosen by.

    rounds: target passes, summed over rows; tokens that they gave, stop tokens included; proposed:
    drafted ones; passes {G: target passes of the whole batch}; tested, kept: by place in the draft;
    tries, hits: by the draft's confidence.
    """

    def __init__(self):
        self.rounds = self.tokens = self.proposed = 0
        self.passes, self.tested, self.kept = Counter(), Counter(), Counter()
        self.tries, self.hits = [0] * BINS, [0] * BINS

    def note(self, kept, count, sure):
        """One round: kept, count [B], sure [B, G]. Tokens behind the first refused do not count."""
        self.passes[sure.size(1)] += 1
        for k, n, row in zip(kept.tolist(), count.tolist(), sure.tolist()):
            self.rounds, self.proposed = self.rounds + 1, self.proposed + n
            for j in range(min(k + 1, n)):
                place = min(BINS - 1, int(row[j] * BINS))
                self.tested[j] += 1
                self.kept[j] += j < k
                self.tries[place] += 1
                self.hits[place] += j < k

    @property
    def acceptance(self):
        """Kept of tested tokens."""
        return self.kept.total() / max(1, self.tested.total())

    @property
    def efficiency(self):
        """E, tokens a target pass and row."""
        return self.tokens / max(1, self.rounds)


MORE = {}    # further numbers, by what they stand on: (tally, facts, drafter) -> {name: number}


def numbers_of(lane, rows, plain):
    """A drafter's numbers for `rows` prompts; plain: tokens a second without drafts."""
    tally = lane.tally
    rate = (tally.tokens + rows) / lane.seconds   # the prefill gives each row its first token
    return dict(tokens_per_second=rate, speedup=rate / plain, acceptance=tally.acceptance,
                kept_of_drafted=tally.kept.total() / max(1, tally.proposed),
                efficiency=tally.efficiency,
                drafts=sum(G * n for G, n in tally.passes.items()) / max(1, tally.passes.total()))


def table(run, drafters, lanes, facts, rows, plain):
    """Say what each drafter came to beside plain decoding's rate, and return it."""
    found = dict(plain=dict(tokens_per_second=plain))
    for x, lane in lanes.items():
        found[x] = numbers_of(lane, rows, plain)
        for more in MORE.values():
            found[x] |= more(lane.tally, facts[x], drafters[x])
    run.say(f"\n  {'':<18}" + "".join(f"{x:>10}" for x in found))
    for k in dict.fromkeys(k for row in found.values() for k in row):
        cells = (f"{row[k]:>10.3f}" if k in row else f"{'':>10}" for row in found.values())
        run.say(f"  {k:<18}" + "".join(cells))
    for x, lane in lanes.items():
        kept = [f"{lane.tally.kept[j] / n:.2f}" for j, n in sorted(lane.tally.tested.items())]
        run.say(f"  {x}: of the tokens tested at place 1, 2, … were kept: {' '.join(kept)}")
    return {f"{x}_{k}": v for x, row in found.items() for k, v in row.items()}


# === independent: 2211.17192, what a round would give if every place were kept as often ===========


def block_efficiency(alpha, gamma):
    """Tokens a round where each of γ drafts is kept with chance α:  (1 - α^(γ+1)) / (1 - α)."""
    return gamma + 1.0 if alpha == 1 else (1 - alpha ** (gamma + 1)) / (1 - alpha)


def independent(tally, facts, drafter):
    """E if every drafted token were kept with the mean probability, whatever came before it."""
    tokens = sum(n * block_efficiency(tally.acceptance, G) for G, n in tally.passes.items())
    return dict(independent=tokens / max(1, tally.passes.total()))


MORE["independent"] = independent


# === costs: 2211.17192, what passes cost, and the speedup that they predict =======================


@torch.no_grad()
def measure_costs(target, model, rows, held, most, repeats=30):
    """What passes cost beside a target pass over one token, the least of interleaved repetitions.

    -> c, a step of the draft `model` (0 without one), and v[G] of a target pass over G + 1; rows
    sequences of `held` tokens.
    """
    device, best, caches = target.head.device, {}, {}
    widths = sorted({w for w in (1, 2, 3, 5, 9, most + 1) if w <= most + 1})
    jobs = [(target, w) for w in widths] + ([(model, 1)] if model else [])
    for m in dict.fromkeys(m for m, _ in jobs):
        caches[m] = Cache(m.config, rows, held + most + 1, device, precision(m))
        m(torch.zeros(rows, held, dtype=torch.long, device=device), caches[m])
    for _ in range(repeats):
        for m, w in jobs:
            cache, tokens = caches[m], torch.zeros(rows, w, dtype=torch.long, device=device)
            began = clock(device)
            m.logits(m(tokens, cache)).argmax(-1)
            best[m, w] = min(best.get((m, w), math.inf), clock(device) - began)
            cache.length -= w
            cache.used -= w
    one = best[target, 1]
    v = np.interp(range(1, most + 2), widths, [best[target, w] / one for w in widths])
    return SimpleNamespace(c=best[model, 1] / one if model else 0.0, v=v.tolist())


def costs_of(target, drafter, prompts, c, f):
    """A drafter's costs half-way through a completion."""
    most = f.length.keywords["gamma"]
    room = min(m.config.max_position_embeddings for m in (target, drafter.model) if m) - most - 1
    held = max(1, min(max(map(len, prompts)) + c.max_new // 2, room))
    return measure_costs(target, drafter.model, c.together, held, most)


def predicted(tally, facts, drafter):
    """The speedup that E and the measured costs of single passes give, and these."""
    cost, total = facts["cost"], tally.passes.total()
    step = cost.c * drafter.per_token
    spent = sum(n * (G * step + cost.v[G]) for G, n in tally.passes.items())
    drafts = sum(G * n for G, n in tally.passes.items()) / max(1, total)
    return dict(predicted=tally.efficiency * total / max(spent, 1e-9), cost=step,
                verify_cost=float(np.interp(drafts, range(len(cost.v)), cost.v)))


FACTS["cost"], MORE["cost"] = costs_of, predicted


# === lookup: prompt lookup, no model: what followed the last words where they stood before ========


class Lookup:
    """Prompt lookup: what followed the row's last n = 3, 2, 1 tokens where they stood last.

    A point mass, so sampling keeps x with probability p(x). ours: the latest place, not the first.
    """
    model, context, per_token = None, math.inf, 1.0

    def __init__(self, n=3):
        self.n = n

    def start(self, prompts, length, rows, new):
        self.seen = [[] for _ in rows]           # the tokens that `last` knows of, of each row
        self.last = [{} for _ in rows]           # (n tokens) -> where what followed them stands

    def keep(self, order):
        self.seen = [self.seen[i] for i in order.tolist()]
        self.last = [self.last[i] for i in order.tolist()]

    def read(self, seen, last, tokens):
        """Note where each n-gram was last followed by something."""
        for token in tokens:
            for n in range(1, min(self.n, len(seen)) + 1):
                last[tuple(seen[-n:])] = len(seen)
            seen.append(token)

    def propose(self, text, length, u, more):
        found = []
        for b, (seen, last) in enumerate(zip(self.seen, self.last)):
            self.read(seen, last, text[b, len(seen):length[b]].tolist())
            at = next((last[k] for n in range(self.n, 0, -1) if (k := tuple(seen[-n:])) in last),
                      len(seen))
            found.append(seen[at:])
        k, want = 0, torch.tensor([len(x) for x in found], device=text.device)           # [B]
        count, sure = torch.zeros_like(want), torch.ones_like(u[:, :, 0])
        while (alive := (want > k) & more(k, sure[:, :k])).any():
            k, count = k + 1, count + alive
        drafted = torch.zeros(len(text), k, dtype=torch.long, device=text.device)        # [B, G]
        for b, x in enumerate(found):
            drafted[b, :min(k, len(x))] = torch.tensor(x[:k], device=text.device)
        return drafted, None, count, sure[:, :k]


def lookup(*, n: Count = 3):
    """No model: what followed the last n tokens, or fewer, where they stood last."""
    return Lookup(n)


DRAFTERS["lookup"], BESIDE["lookup"] = lookup, Lookup
PRESETS["lookup"] = dict(drafter="lookup", length="fixed", gamma=8, steps=0)


# === optimal: a draft grows while one token more should pay, by measured costs and counts =========


def pays(chance, cost):
    """Whether one token more raises  E_k / (k c + v_k),  E_k = 1 + Σ_{i≤k} Π_{j≤i} a_j.

    chance a [B, k+1]: to be kept, of the k tokens and of the next. For constant a it stops at the
    best fixed length.
    """
    stays, k = chance.cumprod(1), chance.size(1) - 1                                     # [B, k+1]
    now, more = 1 + stays[:, :k].sum(1), 1 + stays.sum(1)                                # [B]
    return more * (k * cost.c + cost.v[k]) > now * ((k + 1) * cost.c + cost.v[k + 1])


def optimal(k, sure, tally, cost, *, gamma: Count = 8, explore=16):
    """While one token more pays, by how often tokens of such confidence were kept.

    ours: this calibration, and that every 16th round drafts one token at least, or a bad beginning
    would never be corrected.
    """
    if k == 0 and tally.passes.total() % explore == 0 or k >= gamma:
        return k < gamma
    return pays(chance(tally, sure), cost)


def chance(tally, sure):
    """How often tokens of this confidence [B, k] were kept, and at the end the mean.   -> [B, k+1]

    Counts start as if two tokens of each confidence had been tested, and kept as often as it says.
    """
    rates = [(h + (2 * i + 1) / BINS) / (t + 2)
             for i, (h, t) in enumerate(zip(tally.hits, tally.tries))]
    mean = (sum(tally.hits) + 1.4) / (sum(tally.tries) + 2)
    rows = []
    for row in sure.tolist():
        rows.append([*(rates[min(BINS - 1, int(x * BINS))] for x in row), mean])
    return torch.tensor(rows, device=sure.device)


LENGTHS["optimal"] = optimal


# === heuristic, confident: draft lengths by the last verdict, and by the draft's confidence =======


class Reach:
    """How far each row may draft: it starts at 5, and follows whether its last block was kept."""

    def __init__(self, rows):
        self.value = torch.full_like(rows, 5)                                            # [n]

    def keep(self, order):
        self.value = self.value[order]

    def note(self, kept, count):
        self.value = torch.where(kept == count, self.value + 2, (self.value - 1).clamp(min=1))


def heuristic(k, reach, *, gamma: Count = 16):
    """Two more after a block kept whole, else one fewer (Hugging Face's assisted generation)."""
    return (k < reach.value) & (k < gamma)


def confident(k, sure, *, gamma: Count = 8, least: Share = 0.4):
    """While the draft's own probability of its last token is at least `least` (0.4 unverified)."""
    return sure[:, -1] >= least if 0 < k < gamma else k < gamma


LENGTHS["heuristic"], LENGTHS["confident"], MEMORIES["reach"] = heuristic, confident, Reach


# === held: ours, what a draft's training holds at its peak, said before step 0 ====================


def outlook(run, student, rows):
    """Say what the run will hold: a micro-batch of the longest rows."""
    width = max(len(x) + len(y) for x, y in rows)
    work = Work(student.c.micro, width, student.c.batch, recompute=student.c.recompute)
    foresee(run, student.c, work, [student.draft], [student.target], state_bytes(student.opt))


# === distillspec: 2310.08461, the draft of a run: opened or made, trained, saved, compared ========


def parameters(model, dims=0):
    """How many parameters a model has, or only its matrices (dims 2)."""
    return sum(p.numel() for p in model.parameters() if p.dim() >= dims)


def opened(target, tok, c, run):
    """--draft, a new model of that size or a checkpoint.   -> it, its tokenizer, its folder"""
    folder = ""
    if re.fullmatch(r"\d+x\d+", c.draft):
        family = "qwen3" if target.config.moe else target.config.model_type
        shape = preset(c.draft, tok, target.config.max_position_embeddings, family)
        draft, own = init(shape, c.seed).to(c.device), tok
    else:
        folder = checkpoint(sft.find(c.draft, c.config, device=c.device, seed=c.seed))
        draft, own = load(folder, c.device, torch.float32 if c.steps else getattr(torch, c.dtype))
    mine, theirs = (parameters(m) / 1e6 for m in (draft, target))
    if mine >= theirs:
        run.say(f"warning: the draft has {mine:.2f} M parameters, the target {theirs:.2f} M: "
                "drafting with it cannot pay")
    return draft, own, folder


def prepared(target, tok, held, c, f, run):
    """--draft after --steps of learning.   -> it; agreement before (start_…) and after, on the
    target's completions of the prompts of the rows `held`."""
    draft, own, folder = opened(target, tok, c, run)
    if own.tokens != tok.tokens:
        raise UserError(f"--draft {c.draft} has another vocabulary than --init {c.init}: take a "
                        "draft with the target's tokenizer, a new one (--draft 1x64), or --drafter "
                        "omnidraft")
    held = sampled(target, held, c, torch.Generator().manual_seed(c.seed))
    before = agreement(target, draft, held, c, tok.vocab_size)
    if c.steps:
        draft = distil(draft, folder, target, tok, held, c, f, run)
    after = agreement(target, draft, held, c, tok.vocab_size)
    run.say("  agreement on the target's samples: overlap "
            f"{before['overlap']:.3f} -> {after['overlap']:.3f}, "
            f"kl {before['kl']:.3f} -> {after['kl']:.3f}, "
            f"same top token {before['same_top']:.1%} -> {after['same_top']:.1%}")
    draft = draft.to(target.head.dtype)
    return draft, after | {f"start_{k}": v for k, v in before.items()}


def distil(draft, folder, target, tok, held, c, f, run):
    """Train the draft, log it, measure agreement and save where it is time.   -> it, whole"""
    rows, adapter = tasks.rows(c, tok, "train"), (run.state or {}).get("adapter", {})
    if run.last and c.peft not in ADAPTERS:
        draft.load_state_dict(load(run.last, c.device)[0].state_dict())
    whole = shard(with_peft(draft, c, f.peft, adapter))                  # over torchrun's ranks
    student = Student(draft, target, tok.vocab_size, c, f)
    if c.rows and c.rows < len(rows):                            # of a text, windows at random
        at = torch.randperm(len(rows), generator=torch.Generator().manual_seed(c.seed))[:c.rows]
        rows = [rows[i] for i in at.tolist()]
    known = remember(target, rows, c.steps * c.batch, c) if c.source == "data" else None
    for x in [x for x in needs(f.select) if x in BEFORE]:
        BEFORE[x](student, tok, rows, known, held, run)
    outlook(run, student, rows)
    if run.last:
        student.opt.load_state_dict(run.state.pop("opt"))
        student.generator.set_state(run.state["rng"])
        student.pool = run.state["pool"]
    for step in run.steps(c.steps):
        metrics, last = student.step(step, rows, known, c.batch), step + 1 in (c.steps, c.stop)
        if (step + 1) % c.eval_every == 0 or last:
            run.check(step + 1, draft)
            metrics |= agreement(target, draft, held, c, tok.vocab_size)
        run.log(step + 1, **metrics, show=last)
        if (step + 1) % c.save_every == 0 or last:
            net, state = whole(), student.opt.state_dict()               # every rank takes part
            run.save(step + 1, lambda path: save_trained(net, tok, path, c, folder), opt=state,
                     rng=student.generator.get_state(), pool=student.pool,
                     adapter=adapter_state(net))
    return plain_model(share(whole())).to(c.device)


PREPARE["draft"] = prepared


# === agreement, remembered: how near the draft is, and the target's states made only once =========


@torch.no_grad()
def agreement(target, draft, rows, c, words):
    """On rows [(prompt, completion)], means over the completions' tokens.

    overlap = Σ min(p, q), the chance that a sample is kept at temperature 1; kl = KL(p‖q) in nats;
    same_top: how often the likeliest token is the same.
    """
    total, count = torch.zeros(3, dtype=torch.double), 0
    for i in range(0, len(rows), c.micro):                       # on every rank alike
        tokens, mask = collate(rows[i:i + c.micro], target.config.pad_token_id, c.device)
        p, q = (torch.log_softmax(m.logits(states(m, tokens, mask))[:, :words], -1)
                for m in (target, draft))                                              # [N, V] each
        total += torch.stack([torch.minimum(p.exp(), q.exp()).sum(), (p.exp() * (p - q)).sum(),
                              (p.argmax(-1) == q.argmax(-1)).sum()]).double().cpu()
        count += len(p)
    return dict(zip(("overlap", "kl", "same_top"), (total / max(1, count)).tolist()))


@torch.no_grad()
def remember(target, rows, visits, c):
    """The target's states [n, D] of each row, if rows come twice and 2 GB hold them; else None."""
    size = sum(len(y) for _, y in rows) * target.config.hidden_size * 4
    if visits < 2 * len(rows) or size > 2e9:
        return None
    out = []
    for i in tqdm(range(0, len(rows), c.micro), desc="target", disable=None, leave=False):
        tokens, mask = collate(rows[i:i + c.micro], target.config.pad_token_id, c.device)
        out += states(target, tokens, mask).split(mask[:, 1:].sum(1).long().tolist())
    return out


def head(row, c, corpus):
    """A row's prompt; of a window of text the first --prompt tokens."""
    return [*row[0], *row[1][:c.prompt - len(row[0])]] if corpus else list(row[0])


def sampled(model, rows, c, g):
    """The rows with completions that the model samples, as long as --context allows.

    ours: at temperature 1, not at that of the decoding.
    """
    out, prompts = [], [head(row, c, is_corpus(c.data)) for row in rows]
    new = min(c.context, model.config.max_position_embeddings) - max(map(len, prompts))
    if new < 1:
        raise UserError(f"--context {c.context}: a prompt of {max(map(len, prompts))} tokens "
                        "leaves no room for a completion; raise it")
    for i in range(0, len(prompts), 64):
        roll = generate(model, prompts[i:i + 64], new, generator=g)
        out += [(p, t[m > 0].tolist())
                for p, t, m in zip(prompts[i:i + 64], roll.tokens, roll.mask)]
    return out


# === reverse_kl, jsd, tvd: 2310.08461, other divergences of the draft from the target =============

# h [N, D] and W [V, D] of the draft, t and U of the target -> nats a token [N]; target, draft: p, q


def reverse_kl(h, W, t, U):
    """Σ q log(q / p)."""
    return kernels.linear_distill(h, W, t, U, "reverse_kl")


def jsd(h, W, t, U, *, beta: Range("(0, 1)") = 0.5):
    """β KL(p‖m) + (1-β) KL(q‖m),  m = β p + (1-β) q."""
    return kernels.linear_distill(h, W, t, U, "jsd", beta=beta)


def tvd(h, W, t, U):
    """½ Σ |p - q|: what acceptance loses itself."""
    q, p = (kernels.wide(x @ w.to(x.dtype).T).softmax(-1) for x, w in ((h, W), (t, U)))   # [N, V]
    return (q - p.detach()).abs().sum(-1) / 2


LOSSES["reverse_kl"], LOSSES["jsd"], LOSSES["tvd"] = reverse_kl, jsd, tvd


# === on_policy, target, mixed: 2310.08461, the draft learns on samples: its own, the target's =====


def pooled(student, rows, step, batch, sample):
    """A step's rows of the pool; where a refresh is due it is filled up to the next one.

    sample: rows, [(prompt ids, completion ids)], -> such rows
    """
    c = student.c
    if not student.pool or step % c.refresh == 0:
        steps = range(step, min(step + c.refresh - step % c.refresh, c.steps))
        ahead = [i for x in steps for i in batch_indices(len(rows), batch, x, c.seed).tolist()]
        pairs = [(list(p), list(y)) for p, y in map(rows.__getitem__, ahead)]
        student.pool = sample(pairs, c, student.generator)
    picked, student.pool = student.pool[:batch], student.pool[batch:]
    return picked, None


def on_policy(student, rows, known, step, batch):
    """The draft's samples as it is now: on-policy."""
    return pooled(student, rows, step, batch, partial(sampled, student.draft))


def teacher(student, rows, known, step, batch):
    """The target's samples."""
    return pooled(student, rows, step, batch, partial(sampled, student.target))


def mixed(student, rows, known, step, batch):
    """Every other row the draft's sample."""
    return pooled(student, rows, step, batch, partial(alternate, student.draft))


def alternate(draft, rows, c, g):
    """Every other row with the draft's sample."""
    own = sampled(draft, rows[1::2], c, g) if len(rows) > 1 else []
    pairs = zip(rows[::2], own)
    return [x for pair in pairs for x in pair] + (rows[-1:] if len(rows) % 2 else [])


SOURCES["on_policy"], SOURCES["target"], SOURCES["mixed"] = on_policy, teacher, mixed


# === adaspec: 2510.19779, only tokens where a reference draft shows most left to learn ============


def reference_of(student, tok, rows, known, held, run):
    """The reference: the draft as it is, trained on all tokens; made once a run, frozen."""
    c, target = student.c, student.target
    write = partial(write_reference, student, tok, rows, known)
    reference = load(run.stage("reference", write), c.device)[0].requires_grad_(False)
    run.at = run.start
    run.cut()  # what a resumed run had logged beyond its checkpoint
    near = agreement(target, reference, held, c, tok.vocab_size)
    run.say(f"  reference: overlap {near['overlap']:.3f}, kl {near['kl']:.3f}")
    student.reference = reference


def write_reference(student, tok, rows, known, path):
    """Train the reference draft on every token and save it."""
    c, plain = student.c, SimpleNamespace(**vars(student.f) | dict(select=every))
    ref = Student(copy.deepcopy(student.draft), student.target, student.words, c, plain)
    for step in tqdm(range(c.steps), desc="reference", disable=None, leave=False):
        ref.step(step, rows, known, c.ref_batch)
    save(plain_model(ref.draft), tok, path)


def own_loss(student, tokens, mask, h, t):
    """The draft's loss of every token of a micro-batch.   [N]"""
    return student.loss(student.draft, h, t)


def reference_loss(student, tokens, mask, h, t):
    """The reference's.   [N]"""
    return student.loss(student.reference, states(student.reference, tokens, mask), t)


def largest(x, k):
    """The share k of largest values: those not below the (1-k) quantile; equal ones may be more."""
    return x >= torch.quantile(x, 1 - k) if x.numel() else x > 0


def adaspec(loss, ref, *, k: Range("(0, 1]") = 0.4):
    """AdaSPEC (2510.19779): the largest  Δ = loss - ref,  what such a draft can still learn."""
    return largest(loss - ref, k)


SELECT["adaspec"], ASKED["loss"], ASKED["ref"] = adaspec, own_loss, reference_loss
BEFORE["ref"] = reference_of
PRESETS["adaspec"] = dict(select="adaspec", batch=40, ref_batch=16)    # 2.5 times the data
# every arm of the claim: one size of data, sampling at temperature 1, four tokens a draft
PRESETS["arena"] = dict(rows=1000, batch=8, ref_batch=8, prompts=16, temperature=1.0,
                        length="fixed", gamma=4)


# === smallest, easiest, at_random: 2510.19779, controls of the choice of tokens ===================


def smallest(loss, ref, *, k: Range("(0, 1]") = 0.4):
    """The smallest Δ."""
    return largest(ref - loss, k)


def easiest(loss, ref, *, k: Range("(0, 1]") = 0.4):
    """The tokens on which the reference is nearest to the target."""
    return largest(-ref, k)


def at_random(lot, *, k: Range("(0, 1]") = 0.4):
    """As many at random."""
    return largest(lot, k)


def uniform(student, tokens, mask, h, t):
    """A uniform number of each token.   [N]"""
    return torch.rand(len(h), generator=student.generator).to(h)


SELECT["smallest"], SELECT["easiest"], SELECT["at_random"] = smallest, easiest, at_random
ASKED["lot"] = uniform


# === omnidraft: 2507.02659, a draft of another vocabulary, translated by a cache ==================

# t a target token, d a draft token; V, W the rows of their vocabularies


def words_of(tok):
    """{id: bytes} of a tokenizer's tokens of text: no specials, no holes."""
    special = {*tok.specials.values(), tok.bos, tok.eos, tok.pad}
    return {i: word for i, word in enumerate(tok.tokens) if word and i not in special}


def matches(target_tok, draft_tok):
    """The direct maps {target id: draft id}: equal bytes, one to one, the lowest of equal ids."""
    target = {word: i for i, word in reversed(words_of(target_tok).items())}
    draft = {word: i for i, word in reversed(words_of(draft_tok).items())}
    return {t: draft[word] for word, t in reversed(target.items()) if word in draft}


def spell(data, tok):
    """Bytes -> ids; a piece of a UTF-8 character by bytes, a byte without a token is left out."""
    ranks = []
    for part in re.split("([\udc80-\udcff])", data.decode("utf-8", "surrogateescape")):
        stray = len(part) == 1 and "\udc80" <= part <= "\udcff"
        ranks += [ord(part) - 0xdc00] if stray else tok.engine.encode_ordinary(part)
    return [tok.order[rank] for rank in ranks if tok.order[rank] >= 0]


def omnidraft(foreign, tok, c, target, *,
              mode: Literal["point", "ngram"] = "point", longest: Count = 32):
    """OmniDraft (2507.02659): a model of another tokenizer (foreign: both) behind a cache.

    point: its likeliest tokens, as point masses, exact;  ngram: samples and the paper's q',
    approximate where strings nest.
    """
    draft, own = foreign
    sampling = (0, 0, 1.0) if mode == "point" else (c.temperature, c.top_k, c.top_p)
    return Translated(draft, NgramCache(tok, own), target.config.vocab_size, sampling, mode=mode,
                      longest=longest)


def foreign(target, tok, held, c, f, run):
    """--draft as it is, and its tokenizer; no numbers."""
    if c.steps:
        run.say(f"  --drafter {c.drafter} uses the draft as it is: nothing here distils across "
                "vocabularies")
    if c.temperature and f.drafter.keywords["mode"] == "ngram":
        run.say("  lossy: these samples do not have the target's law")
    draft, own, _ = opened(target, tok, c, run)
    return (draft.to(target.head.dtype), own), {}


def translation(tally, facts, drafter):
    """What a translated draft costs and may hope for: hits / read bounds what can be kept."""
    if not isinstance(drafter, Translated):
        return {}
    return dict(per_token=drafter.per_token,
                cache_knew=drafter.cache.hits / max(1, drafter.cache.read))


DRAFTERS["omnidraft"], PREPARE["foreign"], MORE["omnidraft"] = omnidraft, foreign, translation
PRESETS["omnidraft"] = dict(drafter="omnidraft", init="base:pretrain", length="fixed", gamma=3,
                            steps=0)


# === ngram_cache: 2507.02659, strings of draft tokens that are learned while text is read =========


class NgramCache:
    """Target token <-> the strings of draft tokens that have its bytes.

    Strings of one token come from the vocabularies; a longer one is added where, in text that is
    read, both ends of a target token are ends of draft tokens (ours: each round's commit is spelled
    by itself). A draft without merges spells a token in one way: all are there at once. The rows
    share it: what one has read may change what another drafts, not the law of what it says.
    strings {(d, …): t};  starts: what longer strings begin with;  known: the t of strings;
    direct {t: d};  usable [W]: the d of strings;  read, hits: target tokens read, known by then.
    """

    def __init__(self, target_tok, draft_tok):
        self.words, self.draft = words_of(target_tok), draft_tok
        self.direct, self.read, self.hits = matches(target_tok, draft_tok), 0, 0
        self.strings, self.starts, self.known = {}, set(), set()
        self.usable = torch.zeros(draft_tok.vocab_size, dtype=torch.bool)
        for t, d in self.direct.items():
            self.add(t, (d,))
        if len(draft_tok.order) == 256:                    # no merges
            for t, word in self.words.items():
                self.add(t, tuple(spell(word, draft_tok)))
        if not self.strings:
            raise UserError("the vocabularies of target and draft share no token: take a draft "
                            "whose tokenizer has bytes, or words of the target's")
        self.specials = {target_tok.bos: draft_tok.bos, target_tok.eos: draft_tok.eos}
        for x, t in target_tok.specials.items():
            if x in draft_tok.specials:
                self.specials[t] = draft_tok.specials[x]

    def add(self, t, string):
        """An entry, if the bytes are the same."""
        if string and b"".join(self.draft.tokens[d] for d in string) == self.words[t]:
            self.strings.setdefault(string, t)
            self.known.add(t)
            self.starts.update(string[:n] for n in range(1, len(string)))
            self.usable[list(string)] = True

    def follow(self, tokens):
        """Committed target ids -> the draft's ids of the same text; learns strings that line up.

        A special becomes the draft's of the same text, BOS and EOS its own; others are not seen.
        """
        ids = []
        for text, run in groupby(tokens, lambda t: t in self.words):
            if text:
                ids += self.learn(list(run))
            else:
                ids += [d for t in run if (d := self.specials.get(t)) is not None]
        return ids

    def learn(self, run):
        """Target tokens of text -> the draft's."""
        self.read, self.hits = self.read + len(run), self.hits + sum(t in self.known for t in run)
        part = spell(b"".join(self.words[t] for t in run), self.draft)
        places = accumulate((len(self.draft.tokens[d]) for d in part), initial=0)
        at = {n: i for i, n in enumerate(places)}                            # bytes: draft tokens
        ends = accumulate((len(self.words[t]) for t in run), initial=0)
        for t, (a, b) in zip(run, pairwise(ends)):
            if a in at and b in at:
                self.add(t, tuple(part[at[a]:at[b]]))
        return part


# === translate: 2507.02659, draft tokens to target tokens, and the law that they have =============


def translate(drafted, cache, over=True):
    """Draft ids -> [(target id, how many draft ids it is)], and whether more could follow there.

    From left to right the longest string of the cache (a direct map is a string of one); where none
    begins the block ends. over: nothing follows; else what may yet become a longer string is left.
    """
    found, i = [], 0
    while i < len(drafted):
        longest, grows = 0, True
        for n in range(1, len(drafted) - i + 1):
            part = tuple(drafted[i:i + n])
            longest, grows = n if part in cache.strings else longest, part in cache.starts
            if not grows:
                break
        if not longest or grows and not over:
            return found, grows and not over
        found.append((cache.strings[tuple(drafted[i:i + longest])], longest))
        i += longest
    return found, True


def carried(law, pairs, vocab, t, merged, first):
    """q' [V] where the draft's law [W] began target token t.

    q'(t) = q(d) of the direct maps, pairs [2, M] = (t, d).  merged (0: t is one draft token) is
    Π_j q(d_j): t gets it, its first part's own token (`first`, or None) loses it,
    q'(d_1) = q(d_1) - Π_j q(d_j).
    """
    q = law.new_zeros(vocab).index_copy(0, pairs[0], law[pairs[1]])
    if merged:
        q[t] += merged
        if first is not None:
            q[first] = max(q[first] - merged, 0)
    return q


def surety(found, k, u):
    """The draft's own probability of each row's first k tokens [B, k]; 1 where it has fewer."""
    out = torch.ones(len(found), k, device=u.device, dtype=u.dtype)
    for b, row in enumerate(found):
        if row[:k]:
            out[b, :len(row[:k])] = torch.tensor([x[3] for x in row[:k]], dtype=u.dtype)
    return out


def settle(cache, drawn, found, wants, more, u):
    """Translate what is complete, token by token; ask `more` after each.

    drawn [B] lists of (d, its probability); found [B], which it extends, of (t, its first place in
    drawn, its length, its probability); wants [B], which it updates: which rows draft on.
    """
    alive = [b for b, want in enumerate(wants) if want]
    while alive:
        new = []
        for b in alive:
            done = sum(n for _, _, n, _ in found[b])
            ids, chances = zip(*drawn[b][done:]) if drawn[b][done:] else ((), ())
            tokens, wants[b] = translate(ids, cache, over=False)
            found[b] += [(t, done, n, math.prod(chances[:n])) for t, n in tokens[:1]]
            new += [b] * bool(tokens)
        answers = {}
        for k in {len(found[b]) for b in new}:
            answers[k] = more(k, surety(found, k, u)).tolist()
        for b in new:
            wants[b] = answers[len(found[b])][b]
        alive = [b for b in new if wants[b]]


# === spelled: 2507.02659, the rows in the draft's own tokens, and the draft's cache of them =======


class Spelled:
    """What a draft of another vocabulary has read of each row.

    seen: target tokens that are spelled; ids: in draft tokens; held: those that kv holds.
    """

    def __init__(self, model, words, spare):
        self.model, self.words, self.spare = model, words, spare
        self.limit = model.config.max_position_embeddings

    def start(self, prompts, length, rows, new):
        ends = [x for x in (self.words.draft.bos, self.words.draft.eos, 0) if x is not None]
        texts = [self.words.follow(p[:n].tolist()) or ends[:1]
                 for p, n in zip(prompts, length.tolist())]
        most = max(map(len, texts))
        if most > self.limit:
            raise UserError(f"a prompt of {most} of the draft's tokens exceeds its context of "
                            f"{self.limit}: shorten the prompt or take a draft with a longer one")
        size = torch.tensor([len(x) for x in texts], device=prompts.device)              # [U]
        tokens = torch.tensor([x + [0] * (most - len(x)) for x in texts], device=prompts.device)
        self.kv = prefill(self.model, tokens, size, rows, new)[1]
        self.seen = length[rows].tolist()  # target tokens that are spelled, of each row
        self.ids = [[*texts[i]] for i in rows.tolist()]    # … in draft tokens
        self.held = [*map(len, self.ids)]                  # … that kv holds

    def keep(self, order):
        self.kv.keep(order)
        rows = order.tolist()
        self.seen, self.ids = [self.seen[i] for i in rows], [self.ids[i] for i in rows]
        self.held = [self.held[i] for i in rows]

    def read(self, device):
        """Feed what the draft lacks, every row to its end.   -> the hidden states there [B, D]

        A row that lacks less reads some again; one shorter than the largest gap is padded on the
        right, and what that leaves behind its length is overwritten before it is seen.
        """
        sizes = [*map(len, self.ids)]
        gap = max(1, *(n - held for n, held in zip(sizes, self.held)))
        begin = [max(0, n - gap) for n in sizes]
        feed = torch.tensor([(x[i:] + [0] * gap)[:gap] for x, i in zip(self.ids, begin)],
                            device=device)
        slots = self.kv.k.size(3)
        if max(begin) + gap + self.spare > slots:
            self.kv.spread(torch.arange(len(feed), device=device), slots + gap + self.spare)
        self.kv.length, self.kv.used = torch.tensor(begin, device=device), max(begin)
        hidden = self.model(feed, self.kv)                                             # [B, gap, D]
        size, self.held = torch.tensor(sizes, device=device), sizes                      # [B]
        last = size - 1 - (self.kv.length - gap)
        self.kv.length, self.kv.used = size, max(sizes)
        return hidden[torch.arange(len(feed), device=device), last]

    def room(self):
        """Draft tokens that the longest row has room for."""
        return self.limit + 1 - max(map(len, self.ids))

    def follow(self, text, length):
        """Spell what has been committed since."""
        for b, n in enumerate(length.tolist()):
            self.ids[b] += self.words.follow(text[b, self.seen[b]:n].tolist())
            self.seen[b] = n


# === translated: 2507.02659, the drafter: it drafts in its own tokens, the cache translates =======


class Translated:
    """A language model of another vocabulary: it drafts in its own tokens, the cache translates.

    point: a translated token is a point mass, kept with probability p(t). Exact: so is any
    translation that sees committed text and draft alone. sampling is the draft's; (0, 0, 1.0)
    drafts its likeliest.
    ngram: the tests see q' (carried). Approximate, the law of samples changes: t is not proposed
    with q'(t) where longer strings compete, of which a path of the draft shows one only. Exact
    where all strings are single tokens, and greedily, in both modes.
    ours: the draft draws among usable tokens alone, q being its law on them; a block has at most
    `longest` draft tokens, and what could still grow at its end is dropped; the draws come from a
    generator seeded with u[b, 0, 0], for verify's own numbers must not be seen; while the longest
    row fills the draft's context nothing is drafted.
    """
    context = math.inf                                     # in target tokens, for the loop

    def __init__(self, model, cache, vocab, sampling, *, mode="point", longest=32):
        self.model, self.cache, self.vocab, self.sampling = model, cache, vocab, sampling
        self.lossy, self.longest, self.passes, self.places = mode == "ngram", longest, 0, 0
        self.rows = Spelled(model, cache, longest)
        self.start, self.keep = self.rows.start, self.rows.keep

    @property
    def per_token(self):
        """The draft's passes for a drafted token."""
        return self.passes / max(1, self.places)

    def propose(self, text, length, u, more):
        """Draft, translate what is complete, ask `more` after every target token."""
        self.rows.follow(text, length)
        steps = max(0, min(self.longest, self.rows.room()))
        drawn, found, laws = [[] for _ in text], [[] for _ in text], []
        usable, v, d = self.cache.usable.to(text.device), self.uniforms(u, steps).to(u), None
        wants = more(0, u[:, :0, 0]).tolist()
        while any(wants) and len(laws) < steps:
            hidden = (self.model(d[:, None], self.rows.kv)[:, -1] if laws
                      else self.rows.read(text.device))                                  # [B, D]
            logits = self.model.logits(hidden)[:, :len(usable)]
            logits = logits.masked_fill(~usable, -math.inf)                              # [B, W]
            laws.append(law(logits, *self.sampling))
            d = draw(laws[-1], v[:, len(laws) - 1])                                      # [B]
            own = logits.softmax(-1).gather(1, d[:, None]).squeeze(1)                    # [B]
            for b, x in enumerate(zip(d.tolist(), own.tolist())):
                drawn[b].append(x)
            settle(self.cache, drawn, found, wants, more, u)
        G = max(map(len, found))
        self.passes, self.places = self.passes + len(laws), self.places + G
        drafted = torch.zeros(len(text), G, dtype=torch.long, device=text.device)        # [B, G]
        for b, row in enumerate(found):
            drafted[b, :len(row)] = torch.tensor([x[0] for x in row], dtype=torch.long)
        q = self.laws_of(drawn, found, laws, G) if G and self.lossy and self.sampling[0] else None
        return drafted, q, torch.tensor([*map(len, found)], device=text.device), surety(found, G, u)

    def uniforms(self, u, steps):
        """What the draft draws by [B, steps], of 24 bits."""
        seeds = [torch.Generator().manual_seed(int(x * 2 ** 24)) for x in u[:, 0, 0].tolist()]
        return torch.stack([torch.rand(self.longest, generator=g)[:steps] for g in seeds])

    def laws_of(self, drawn, found, laws, G):
        """q' of every drafted token.   [B, G, V]"""
        q = laws[0].new_zeros(len(found), G, self.vocab)
        pairs = torch.tensor([*self.cache.direct.items()], dtype=torch.long,
                             device=q.device).view(-1, 2).T
        for b, row in enumerate(found):
            for j, (t, i, n, _) in enumerate(row):
                string = [d for d, _ in drawn[b][i:i + n]]
                parts = [laws[i + m][b, d].item() for m, d in enumerate(string)]
                first = self.cache.strings.get((string[0],))
                merged = math.prod(parts) if n > 1 else 0
                q[b, j] = carried(laws[i][b], pairs, self.vocab, t, merged, first)
        return q


# === decoders: what the other decoders share: checks, samples, a training loop ==================


def check_task(c, f):
    """Answers are scored."""
    if is_corpus(c.data):
        raise UserError(f"--decode {c.decode} needs answers to score, not the text {c.data}: take "
                        f"--config {c.decode}, or a task as --data")


def own_readers(c, f):
    """readers() of a decoder that trains a model and draws samples."""
    return dict.fromkeys(OWN, (True, ""))


def rng(c, salt):
    """A generator of the run's seed for one purpose."""
    return torch.Generator().manual_seed(1000 * c.seed + salt)


def responses(model, tok, world, problems, c, salt, samples=1, **kw):
    """Samples of every problem.

    -> rollout, texts [P][N], ids with the stop token [P N], score [P, N]
    """
    roll = generate(model, [tok.prompt(p) for p in problems], world.max_new, samples=samples,
                    generator=rng(c, salt), **kw)
    ids, done = roll.completions(), roll.finished.tolist()
    texts = [tok.decode(y) for y in ids]
    score = torch.tensor([world.reward(problems[i // samples], t, d)
                          for i, (t, d) in enumerate(zip(texts, done))])
    score = score.view(len(problems), samples)
    whole = [[*y, *[tok.eos] * d] for y, d in zip(ids, done)]
    return roll, [texts[i:i + samples] for i in range(0, len(texts), samples)], whole, score


def fit(model, c, run, loss_of, n):
    """The training loop: loss_of(rows of the step, step) -> (loss, metrics).   -> frozen"""
    opt = optimiser(model.requires_grad_(), lr=c.lr)
    for step in tqdm(range(c.steps), leave=False, disable=None):
        loss, metrics = loss_of(batch_indices(n, c.batch, step, c.seed).tolist(), step)
        loss.backward()
        norm = clip_grad_norm_(model.parameters(), c.clip)
        set_lr(opt, c.lr * linear(step, c.steps, c.warmup))
        opt.step()
        opt.zero_grad()
        run.log(step + 1, loss=loss.item(), norm=norm.item(), **metrics)
    run.at += c.steps
    return model.requires_grad_(False)


@torch.no_grad()
def scored(model, rows, c, pad, score):
    """score(model, tokens, mask) of (prompt, completion) rows, 256 at a time.   -> [.., B], CPU"""
    parts = (rows[i:i + 256] for i in range(0, len(rows), 256))
    return torch.cat([score(model, *collate(part, pad, c.device)).cpu() for part in parts], -1)


def logp_sum(model, tokens, mask):
    """log π of each row's completion.   -> [B]"""
    return token_logprobs(model, tokens, mask).sum(1)


# === tables: ours, numbers of an option, and the table of a decoder's arms ========================


def numbers(text, key):
    """"0.2,0.4" -> ["0.2", "0.4"], as they will be written; UserError naming the option."""
    found = text.split(",")
    try:
        [float(x) for x in found]
    except ValueError:
        raise UserError(f"--{key} {text}: numbers with commas between them, like 0.2,0.4") from None
    return found


def tabled(run, rows, note):
    """Say a table {arm or "arm@x": {column: number}}, and return it as {"arm|column@x": number}."""
    columns = {k: max(9, len(k) + 2) for row in rows.values() for k in row}
    wide, out = max(map(len, rows)) + 2, {}
    run.say(f"\n  {note}\n  {'':<{wide}}" + "".join(f"{k:>{n}}" for k, n in columns.items()))
    for name, row in rows.items():
        cells = {k: f"{round(v, 3) + 0.0:.3f}" for k, v in row.items()}
        run.say(f"  {name.replace('@', ' '):<{wide}}"
                + "".join(f"{cells.get(k, ''):>{n}}" for k, n in columns.items()))
        arm, at, x = name.partition("@")
        out |= {f"{arm}|{k}{at}{x}": v for k, v in row.items()}
    return out


# === entropy: 2502.06833, the uncertain words to the large model: two models in turn ==============


def entropy_bits(logits):
    """H = -Σ p log2 p of a prediction, untempered.   [..., V] -> [...]"""
    return torch.special.entr(logits.softmax(-1)).sum(-1) / math.log(2)


def uncertain(seen, large, stayed, *, threshold=1.0, window=5, stay=5):
    """EAD, 2502.06833: whether the large model writes: if the mean H of the last 5 is above τ.

    seen: bits of every token so far, by the model that wrote it; large: who wrote the last; stayed:
    tokens since the last switch. Ours: nothing seen counts as 0 bits, so the small model begins; at
    least 5 tokens pass between two switches; τ 1 bit (to be swept).
    """
    if stayed < stay:
        return large
    recent = seen[-window:]
    return sum(recent) / max(1, len(recent)) > threshold


def coin(seen, large, stayed, *, share=0.5, stay=5, rng=None):
    """The control of EAD: every 5 tokens a coin falls on the large model with chance `share`."""
    return large if len(seen) % stay else rng.random() < share


class Switched(NamedTuple):
    """One text by two models: its ids with the stop token, who wrote each (1: large), the bits of
    each, and how many tokens each model has read, the prompt and what it had missed included.
    """
    ids: list
    large: list
    bits: list
    read: list


@torch.no_grad()
def switching(models, prompt, new, choose, pick, make, stop):
    """Two models in turn write up to `new` tokens after the prompt (ids). Nothing is verified.

    models: (small, large); choose(seen, large, stayed) -> who is next; pick(logits [1, V]) -> id;
    make(model): an empty cache of one row. The idle model's cache lags behind: on its next turn it
    reads all that it has missed in one pass, the prompt too if it has never been asked.
    """
    text, caches, bits, wrote, read = list(prompt), [make(m) for m in models], [], [], [0, 0]
    large, stayed = False, math.inf
    while len(wrote) < new and not (wrote and text[-1] in stop):
        turn = bool(choose(bits, large, stayed))
        large, stayed = turn, stayed + 1 if turn == large else 1
        model, cache = models[turn], caches[turn]
        missed = text[cache.used:]
        hidden = model(torch.tensor([missed], device=model.head.device), cache)[:, -1]   # [1, D]
        logits = model.logits(hidden)                                                    # [1, V]
        read[turn] += len(missed)
        bits.append(entropy_bits(logits).item())
        wrote.append(int(turn))
        text.append(int(pick(logits)))
    return Switched(text[len(prompt):], wrote, bits, read)


# === ead, at_once: 2502.06833, accuracy against cost, beside a coin and three models alone ========


def empty(model):
    """A cache of one row of the model's whole context."""
    return Cache(model.config, 1, model.config.max_position_embeddings, model.head.device,
                 precision(model))


def by_turns(choose, models, size, problems, world, tok):
    """Accuracy and cost of texts by two models of `size` {model: share of the large one's weights}.

    cost: weights read for a token, 1 for the large model alone (what was missed rides along in one
    pass); work: products, the reading of the prompt and of what was missed included.
    """
    stop = {tok.eos}
    outs = [switching(models, tok.prompt(p), world.max_new, choose, lambda z: z.argmax(-1), empty,
                      stop) for p in problems]
    right = [world.reward(p, tok.decode(x.ids), x.ids[-1] in stop) for p, x in zip(problems, outs)]
    q = sum(sum(x.large) for x in outs) / sum(len(x.ids) for x in outs)
    a, b = (size[m] for m in models)
    return dict(accuracy=fmean(right), share=q, cost=q * b + (1 - q) * a,
                work=sum(x.read[0] * a + x.read[1] * b for x in outs))


def ead(target, tok, c, run, *, recipe="chain_right", small_model="2x64", middle_model="2x96",
        thresholds="0.2,0.4,0.6,0.8,1.0", window: Count = 5, stay: Count = 5):
    """EAD, 2502.06833, greedy: accuracy against cost, beside a coin and three models alone.

    The preset `recipe` of sft.py makes two of them. over coin: EAD's accuracy less that of a coin
    with the same share, the mean over thresholds.
    """
    world, values = tasks.task(c.data), numbers(thresholds, "thresholds")
    problems = world.problems(c.split, c.prompts, c.seed)
    (low, words), (middle, _) = (
        load(sft.base(recipe, c.config, model=m, device=c.device, seed=c.seed), c.device)
        for m in (small_model, middle_model))
    weights = {m: parameters(m, dims=2) for m in (low, middle, target)}
    if words.tokens != tok.tokens:
        raise UserError(f"--init {c.init} has another vocabulary than what --recipe {recipe} "
                        "makes: EAD switches between models of one tokenizer")
    size = {m: n / weights[target] for m, n in weights.items()}
    known = dict(size=size, problems=problems, world=world, tok=tok)
    rows = dict(large=by_turns(lambda *_: True, (low, target), **known),
                small=by_turns(lambda *_: False, (low, target), **known),
                middle=by_turns(lambda *_: False, (middle, target), **known))
    for t in values:
        rule = partial(uncertain, threshold=float(t), window=window, stay=stay)
        rows[f"EAD@{t}"] = by_turns(rule, (low, target), **known)
        rule = partial(coin, share=rows[f"EAD@{t}"]["share"], stay=stay, rng=random.Random(c.seed))
        rows[f"coin@{t}"] = by_turns(rule, (low, target), **known)
    whole = rows["large"]["work"]
    for row in rows.values():
        row["work"] /= whole
    gained = [rows[f"EAD@{t}"]["accuracy"] - rows[f"coin@{t}"]["accuracy"] for t in values]
    note = (f"{len(problems)} {c.split} problems, greedy; weights of small, middle, large: "
            + ", ".join(f"{n:,}" for n in weights.values()))
    return tabled(run, rows, note) | dict(over_coin=fmean(gained))


def check_ead(c, f):
    """The thresholds are numbers, and what the two other models are made of is there."""
    check_task(c, f)
    numbers(f.decode.keywords["thresholds"], "thresholds")
    for key in ("small_model", "middle_model"):
        preset(f.decode.keywords[key], prefs.tokenizer())
    sft.find(f"base:{f.decode.keywords['recipe']}", c.config, make=False)


DECODERS["ead"], CHECKS["ead"] = ead, check_ead
PRESETS["ead"] = dict(decode="ead", data="chain", init="base:chain_right", prompts=200)
PRESETS["at_once"] = dict(window=1, stay=1)    # an arm: who writes is asked anew for every token


# === beams: 2402.06147, beam search whose beams are scored by where a look ahead leads ============


class Beam(NamedTuple):
    """A prefix: ids without the stop token, Σ log π with it, whether it has stopped, its score."""
    ids: tuple = ()
    logp: float = 0.0
    finished: bool = False
    score: float = 0.0


def search(prompts, expand, complete, score, stop, *, new=12, weight=1.0, beams=3, expansions=5):
    """DeAL, 2402.06147: heuristic search for  log π(y_1..t | x) + λ h(x, y_1..t and a look ahead).

    expand([ids]) -> log π of the next token [n, V]; complete([ids]) -> [(further ids, finished)],
    the greedy look ahead; score(i, ids, finished) -> h of a text after prompt i, -inf where it is
    forbidden. 3 beams of 5 expansions as in a public toolkit; ours: as many rounds as tokens, sums
    without a length norm. λ 0 is beam search; a `complete` that adds nothing, a beam search with a
    reward. -> the best Beam a prompt
    """
    front = [[Beam()] for _ in prompts]
    for _ in range(new):
        live = [(i, b) for i, row in enumerate(front) for b in row if not b.finished]
        if not live:
            break
        logp = expand([[*prompts[i], *b.ids] for i, b in live])                          # [n, V]
        grown = expanded(live, *logp.topk(min(expansions, logp.size(-1)), -1), stop)
        if weight:  # λ 0 never looks: 0 times -inf is no number
            ahead = iter(complete([[*prompts[i], *b.ids] for i, b in grown if not b.finished]))
            ends = [((), True) if b.finished else next(ahead) for _, b in grown]
            grown = [(i, b._replace(score=b.logp + weight * score(i, (*b.ids, *more), done)))
                     for (i, b), (more, done) in zip(grown, ends)]
        pool = []
        for row in front:
            pool.append([b for b in row if b.finished])
        for i, b in grown:
            pool[i].append(b)
        front = [sorted(row, key=lambda b: -b.score)[:beams] for row in pool]
    return [row[0] for row in front]


def expanded(live, logp, token, stop):
    """Every live (prompt, beam) with each of its likeliest next tokens.   both [n, expansions]"""
    out = []
    for (i, b), xs, ids in zip(live, logp.tolist(), token.tolist()):
        for x, t in zip(xs, ids):
            if x > -math.inf:
                longer = b.ids if t in stop else (*b.ids, t)
                out.append((i, Beam(longer, b.logp + x, t in stop, b.logp + x)))
    return out


def obeyed(world, problems, tok, i, ids, finished=True):
    """h: the share of hard rules of problem i that the text obeys."""
    return world.judge(problems[i]["prompt"], tok.decode(ids))["hard"]


def judged_rows(world, problems, tok, ids, done, tokens):
    """A row of the table: gold and hard rules, tokens computed a prompt."""
    found = [world.judge(p["prompt"], tok.decode(y), d) for p, y, d in zip(problems, ids, done)]
    return dict(gold=fmean(x["gold"] for x in found), hard=fmean(x["hard"] for x in found),
                tokens=tokens / len(problems))


# === deal: 2402.06147, the share of hard rules that are obeyed, beside best of n at its cost ======


class Reader:
    """The target as search() asks it. spent: tokens that it has computed."""

    def __init__(self, target, pad, ahead):
        self.target, self.pad, self.ahead, self.spent = target, pad, ahead, 0

    @torch.no_grad()
    def expand(self, texts):
        """log π of what follows each text.   -> [n, V]"""
        self.spent += len(texts)
        device = self.target.head.device
        tokens, _ = collate([(t, ()) for t in texts], self.pad, device)
        last = torch.tensor([len(t) for t in texts], device=device) - 1
        hidden = self.target(tokens)[torch.arange(len(texts)), last]                     # [n, D]
        return self.target.logits(hidden).log_softmax(-1)

    def complete(self, texts):
        """What greedy decoding adds to each text in `ahead` tokens, and whether it ends."""
        if not (self.ahead and texts):
            return [((), False)] * len(texts)
        roll = generate(self.target, texts, self.ahead, temperature=0)
        self.spent += int(roll.mask.sum())
        return list(zip(roll.completions(), roll.finished.tolist()))


def searched(target, tok, world, problems, ahead, **kw):
    """The row of a search that looks so many tokens ahead."""
    reader = Reader(target, tok.pad or 0, ahead)
    found = search([tok.prompt(p) for p in problems], reader.expand, reader.complete,
                   partial(obeyed, world, problems, tok), {tok.eos}, new=world.max_new, **kw)
    return judged_rows(world, problems, tok, [b.ids for b in found], [b.finished for b in found],
                       reader.spent)


def best_by_rules(target, tok, world, problems, n, c, **kw):
    """The row of the best of n samples by h, ties by log π."""
    roll = generate(target, [tok.prompt(p) for p in problems], world.max_new, samples=n,
                    generator=rng(c, 1), **kw)
    ids, done = roll.completions(), roll.finished.tolist()
    h = torch.tensor([obeyed(world, problems, tok, i // n, y) if d else -1.0
                      for i, (y, d) in enumerate(zip(ids, done))])
    best = (1e3 * h + roll.logp.sum(1).cpu()).view(-1, n).argmax(1)                      # [P]
    best = best + n * torch.arange(len(problems))
    return judged_rows(world, problems, tok, [ids[i] for i in best], [done[i] for i in best],
                       roll.mask.sum().item())


def deal(target, tok, c, run, *, weight=4.0, ahead: Count = 10, beams: Count = 3,
         expansions: Count = 5):
    """DeAL, 2402.06147: h is the share of hard rules obeyed, read off the prompt.

    gold also has a principle. tokens: computed in all, a prompt; best of n by h for n that compute
    as many.
    """
    world = tasks.task(c.data)
    if not hasattr(world, "judge"):
        raise UserError(f"--decode deal --data {c.data}: its constraints must be read off the "
                        "prompt; take toyif")
    known = target, tok, world, world.problems(c.split, c.prompts, c.seed)
    size = dict(beams=beams, expansions=expansions)
    rows = {"greedy": best_by_rules(*known, 1, c, temperature=0),
            "sample": best_by_rules(*known, 1, c),
            "beam search": searched(*known, 0, weight=0.0, **size),
            "prefix": searched(*known, 0, weight=weight, **size),
            "DeAL": searched(*known, ahead, weight=weight, **size)}
    for name in ("prefix", "DeAL"):
        n = max(1, round(rows[name]["tokens"] / rows["sample"]["tokens"]))
        rows[f"best of n as {name}"] = best_by_rules(*known, n, c) | dict(n=n)
    return tabled(run, rows, f"{len(known[-1])} {c.split} prompts; λ {weight:g}, look ahead "
                  f"{ahead}, prefix 0")


DECODERS["deal"], CHECKS["deal"] = deal, check_task
PRESETS["deal"] = dict(decode="deal", data="toyif", init="base:toyif", prompts=256)


# === genarm: 2410.08193, a reward model that scores every next token ==============================


def autoregressive(chosen_logp, rejected_logp, *, beta_r: Positive = 0.05):
    """GenARM, 2410.08193:  -log σ(β_r (log π_r(y+) - log π_r(y-))), sums, no reference.   [B] ->
    [B]"""
    return -F.logsigmoid(beta_r * (chosen_logp - rejected_logp))


def guidance(alpha):
    """(temperature, a) with which model.generate(contrast=(arm, a)) samples from π_base π_arm^α.

    generate's logits ((1 + a) l - a l_arm) / T  are  l + α l_arm  for  T = 1/(1 + α), a = -α T.
    """
    if alpha < 0:
        raise UserError(f"alpha {alpha}: the weight of a reward is not negative")
    return 1 / (1 + alpha), -alpha / (1 + alpha)


def encoded(world, n, seed, split, tok, target):
    """So many pairs of the world, as ids."""
    most = target.config.max_position_embeddings
    return prefs.encode_pairs(world.pairs(n, seed, split), tok, most)


def sides(rows):
    """The chosen, then the rejected answers of pairs, as (prompt, completion)."""
    return [(r["prompt"], r[side]) for side in ("chosen", "rejected") for r in rows]


def pair_loss(arm, rows, pad, beta_r, ids, step):
    """The loss of the pairs `ids`, and how many of them the model has right."""
    batch = collate(sides([rows[i] for i in ids]), pad, arm.head.device)
    logp = logp_sum(arm, *batch).chunk(2)
    return autoregressive(*logp, beta_r=beta_r).mean(), dict(accuracy=accuracy(*logp))


def write_arm(target, tok, world, c, run, pairs, beta_r, folder):
    """Train the reward model from the target and save it."""
    rows = encoded(world, pairs, c.seed, "train", tok, target)
    arm = copy.deepcopy(target).float()
    loss_of = partial(pair_loss, arm, rows, tok.pad or 0, beta_r)
    save(fit(arm, c, run, loss_of, len(rows)), tok, folder)


def guided_row(target, tok, world, problems, c, alpha, other, cost):
    """Gold and KL to the base, of samples from π_base π_other^α."""
    T, a = guidance(alpha)
    roll, *_, score = responses(target, tok, world, problems, c, 1, temperature=T,
                                contrast=(other, a))
    with torch.no_grad():
        base = token_logprobs(target, roll.tokens, roll.mask)                            # [B, T]
    kl = ((roll.logp - base) * roll.mask).sum(1).mean().item()
    return dict(gold=score.mean().item(), kl=kl, cost=cost)


# === genarm_table: 2410.08193, gold against KL, beside a cooled base and best of n ================


def genarm(target, tok, c, run, *, beta_r: Positive = 0.05, pairs: Count = 4000,
           alphas="0.125,0.25,0.5,1,2"):
    """GenARM, 2410.08193: gold against KL to the base, nats a response, as α grows.

    Controls: the base cooled to temperature 1/(1+α), which is GenARM with an untrained reward
    model, and the best of n samples by the trained one, log π_r, whose KL is at most log n -
    (n-1)/n. cost: forward passes of a model for a token of the answer, scoring included.
    """
    world, pad = tasks.task(c.data), tok.pad or 0
    if not hasattr(world, "pairs"):
        raise UserError(f"--decode genarm --data {c.data}: it needs preferences; take toyif or "
                        "ring")
    write = partial(write_arm, target, tok, world, c, run, pairs, beta_r)
    arm = load(run.stage("arm", write), c.device)[0].requires_grad_(False)
    held = encoded(world, min(pairs, 1000), c.seed + 1, "val", tok, target)
    right = accuracy(*scored(arm, sides(held), c, pad, logp_sum).chunk(2))
    problems = world.problems(c.split, c.prompts, c.seed)
    row = partial(guided_row, target, tok, world, problems, c)
    rows = {"base": row(0.0, arm, 1)}
    for x in numbers(alphas, "alphas"):
        rows |= {f"GenARM@{x}": row(float(x), arm, 2), f"cooled@{x}": row(float(x), target, 1)}
    roll, *_, score = responses(target, tok, world, problems, c, 2, c.samples)
    with torch.no_grad():
        proxy = token_logprobs(arm, roll.tokens, roll.mask).sum(1).cpu().view(score.shape)
    for n in (2, 4, 8, 16, 32):
        if n <= c.samples:
            rows[f"best of@{n}"] = dict(gold=best_of_n(proxy, score, n).mean().item(),
                                        kl=bon_kl(n), cost=2 * n)
    return tabled(run, rows, f"{len(problems)} {c.split} prompts; the ARM is right on {right:.3f} "
                  f"of {len(held)} held-out pairs") | dict(pair_accuracy=right)


def check_genarm(c, f):
    """The weights are numbers."""
    check_task(c, f)
    numbers(f.decode.keywords["alphas"], "alphas")


DECODERS["genarm"], CHECKS["genarm"], READERS["genarm"] = genarm, check_genarm, own_readers
# learning rates of the decoders are ours, not tuned; of genarm's two were tried
PRESETS["genarm"] = dict(decode="genarm", data="toyif", init="base:toyif_base", prompts=512,
                         steps=200, batch=64, lr=3e-4)


# === control_tokens: 2410.02725, tokens by which a policy is asked what it thinks of its text =====

# ASK is answered by NO (no restart is better) or YES, CHECK by RIGHT or WRONG, after (part of) a
# response.


def controls(model, tok):
    """The ids of six control tokens, right wrong check ask no yes: unused rows of the embedding.

    UserError where there are too few.
    """
    names = ("right", "wrong", "check", "ask", "no", "yes")
    if model.config.vocab_size - tok.vocab_size < len(names):
        raise UserError(f"{len(names)} control tokens need as many unused rows of the embedding; "
                        f"this model has {model.config.vocab_size - tok.vocab_size}: take --init "
                        "base:chain")
    return SimpleNamespace(**{name: tok.vocab_size + i for i, name in enumerate(names)})


def muted(model, ids):
    """The same model, whose logits never choose these ids: they are read, and never written."""
    out, logits, ids = copy.copy(model), model.logits, torch.tensor(ids, device=model.head.device)
    out.logits = lambda hidden: logits(hidden).index_fill(-1, ids, -math.inf)
    return out


def answered(ids, model, tokens, mask):
    """Logits of (NO, YES) after ASK and of (RIGHT, WRONG) after CHECK, each row's last two tokens.

    What the policy says of the text before.   tokens, mask [B, T] -> [2, B, 2]
    """
    last = (mask.cumsum(1) * mask).argmax(1)                                             # [B]
    row = torch.arange(len(tokens), device=tokens.device)[None]
    logits = model.logits(model(tokens)[row, torch.stack([last - 1, last])])             # [2, B, V]
    return torch.stack([logits[0][:, [ids.no, ids.yes]], logits[1][:, [ids.right, ids.wrong]]])


def opinions(ids, model, tokens, mask):
    """answered() as chances of the first answer.   -> [2, B]"""
    return answered(ids, model, tokens, mask).softmax(-1)[..., 0]


def asked(model, rows, ids, c, pad):
    """P(NO: no restart is better), P(correct) after every (prompt, part of a response).  [2, B]"""
    rows = [(p, [*y, ids.ask, ids.check]) for p, y in rows]
    return scored(model, rows, c, pad, partial(opinions, ids))


def rival_label(score):
    """How often a sample is at least as good as another of its prompt, a tie half.   [P, N]

    The paper labels a sample by one rival; ours is the mean over all N - 1 others, which has less
    noise.
    """
    if score.size(1) < 2:
        raise UserError("--samples 1: a sample is judged against others of its prompt; take at "
                        "least 2")
    mine, other = score[:, :, None], score[:, None]
    same = (mine > other).float() + 0.5 * (mine == other).float()                        # [P, N, N]
    return (same.sum(-1) - 0.5) / (score.size(1) - 1)          # a sample ties with itself


def self_eval_loss(logits, label):
    """Cross-entropy of an answer with soft labels:  -l log p - (1-l) log(1-p).

    logits [B, 2] of (NO, YES), label [B]: the chance that no restart is better -> [B]. Ours: p is
    normalised over the two.
    """
    logp = logits.log_softmax(-1)
    return -label * logp[:, 0] - (1 - label) * logp[:, 1]


def cut_points(length, u):
    """Where a response of `length` tokens is cut for a label amid generation, uniform in 1..length.

    u in [0, 1); the label stays that of the whole response.   [B], [B] -> [B]
    """
    return (u * length).long() + 1


# === taught: 2410.02725, the policy learns to judge its own samples ===============================


class Lessons:
    """What the policy learns from: its samples of problems, and what they are worth.

    prompts, answers [P N] ids;  rival, score [P N]: how often no other is better, its reward;
    u [2, steps, batch]: where answers are cut.
    """

    def __init__(self, target, tok, world, c, train_prompts):
        problems = world.problems("train", train_prompts, c.seed)
        *_, self.answers, score = responses(target, tok, world, problems, c, 3, c.samples)
        self.rival, self.score = (x.flatten().to(c.device) for x in (rival_label(score), score))
        self.prompts = [tok.prompt(p) for p in problems for _ in range(c.samples)]
        self.u, self.pad = torch.rand(2, c.steps, c.batch, generator=rng(c, 4)), tok.pad or 0


def lesson_loss(model, ids, lessons, at, step):
    """The loss of the samples `at`: what is said of a part of each, and each under its verdict.

    x y.. ASK CHECK: what it says anyhow, then the chance that no other try is better and that the
    whole is correct, after a part of it (half the time: all);  x RIGHT y or x WRONG y: the same
    under its verdict.
    """
    answers, u, device = [lessons.answers[i] for i in at], lessons.u[:, step], model.head.device
    length = torch.tensor([len(y) for y in answers])                                     # [B]
    cut = torch.where(u[0] < 0.5, cut_points(length, u[1]), length).tolist()
    parts = [(lessons.prompts[i], [*y[:k], ids.ask, ids.check])
             for i, y, k in zip(at, answers, cut)]
    under = [([*lessons.prompts[i], ids.right if lessons.score[i] > 0 else ids.wrong], y)
             for i, y in zip(at, answers)]
    tokens, mask = collate(parts, lessons.pad, device)
    ask, check = (self_eval_loss(z, x[at]).mean() for z, x in
                  zip(answered(ids, model, tokens, mask), (lessons.rival, lessons.score)))
    mask = mask * (tokens < ids.right)                                       # asked is not written
    logp = (token_logprobs(model, tokens, mask),
            token_logprobs(model, *collate(under, lessons.pad, device)))
    nats = -sum(x.sum() for x in logp) / (mask.sum() + length.sum())
    return nats + ask + check, dict(nats=nats.item(), asked=ask.item(), checked=check.item())


def write_policy(target, tok, world, c, run, ids, train_prompts, folder):
    """Train the policy and save it."""
    model, lessons = copy.deepcopy(target).float(), Lessons(target, tok, world, c, train_prompts)
    loss_of = partial(lesson_loss, model, ids, lessons)
    save(fit(model, c, run, loss_of, len(lessons.answers)), tok, folder)


def taught(target, tok, world, c, run, train_prompts):
    """The policy, once it has learned; frozen.   -> it, it without control tokens, their ids"""
    ids = controls(target, tok)
    write = partial(write_policy, target, tok, world, c, run, ids, train_prompts)
    model = load(run.stage("policy", write), c.device)[0].requires_grad_(False)
    return model, muted(model, list(vars(ids).values())), ids


def check_samples(c, f):
    """Samples of one prompt are compared."""
    check_task(c, f)
    if c.samples < 2:
        raise UserError(f"--samples {c.samples}: --decode {c.decode} compares samples: at least 2")


# === tries: 2410.02725, samples of held-out problems and what the policy says of them; votes ======


def tried(model, quiet, ids, tok, world, c, split, salt):
    """N samples of each problem of a split, and what the model says of them.

    -> problems, rows [(prompt, response)], stated [P][N];  score, length, logp, no, right [P, N]
    """
    problems = world.problems(split, c.prompts, c.seed + salt)
    roll, texts, answers, score = responses(quiet, tok, world, problems, c, salt, c.samples)
    rows = [(tok.prompt(problems[i // c.samples]), y) for i, y in enumerate(answers)]
    no, right = asked(model, rows, ids, c, tok.pad or 0).view(2, *score.shape)
    stated = []
    for some, done in zip(texts, roll.finished.view(score.shape).tolist()):
        stated.append([tasks.stated(world, t) if d else "" for t, d in zip(some, done)])
    return SimpleNamespace(problems=problems, rows=rows, stated=stated, score=score, no=no,
                           right=right, length=roll.mask.sum(1).long().cpu().view(score.shape),
                           logp=roll.logp.sum(1).cpu().view(score.shape))


def vote(answers, weights=None):
    """The answer of the largest total weight (1 each: majority vote); ties by first appearance.

    "" only if nothing else was stated.
    """
    total = Counter()
    for a, w in zip(answers, weights or [1.0] * len(answers)):
        total[a] += w
    return max(total, key=lambda a: (a != "", total[a]))


def voted(answers, score, n, weights=None):
    """Mean score of the answer that n samples vote for, over all places to begin.

    answers [P][N] of strings, score and weights [P, N]; equal answers have equal scores
    """
    N, out = score.size(1), []
    weights = torch.ones_like(score) if weights is None else weights
    for a, w, r in zip(answers, weights.tolist(), score.tolist()):
        for k in range(N if n < N else 1):
            at = [(k + i) % N for i in range(n)]
            best = vote([a[i] for i in at], [w[i] for i in at])
            out.append(next(r[i] for i in at if a[i] == best))
    return fmean(out)


def at_cost(costs, values, cost):
    """The value at a cost between two measured ones, by a straight line; beyond, the end's."""
    points = sorted(zip(costs, values))
    for (x0, y0), (x1, y1) in zip(points, points[1:]):
        if x0 <= cost <= x1:
            return y0 + (y1 - y0) * (cost - x0) / max(x1 - x0, 1e-9)
    return points[0][1] if cost < points[0][0] else points[-1][1]


# === consensus: 2310.09139, generator and discriminator play until they agree on an answer ========


def normalised(logits, dim):
    """softmax in logs; all -inf (padding alone) stays -inf."""
    total = logits.logsumexp(dim, keepdim=True)
    return logits - torch.where(total == -math.inf, torch.zeros_like(total), total)


def consensus(generator, discriminator, *, rounds=5000, eta=0.1, lam=0.1):
    """Equilibrium-ranking, 2310.09139: the two play until they agree; nothing is trained.

    generator P(y | x, v), discriminator P(v | x, y), both [..., 2, Y], v = correct first; a
    candidate that is padding has generator 0 in both rows.   π_G¹(y|v) ∝ P(y|x,v) / Σ_v' P(y|x,v'),
    π_D¹(v|y) ∝ P(v|x,y) / Σ_y' P(v|x,y');  then
    π_G(y|v) ∝ exp[(Q_G + λ log π_G¹) / (1/(η t) + λ)],  Q_G = (1/2t) Σ π_D(v|y) over the rounds so
    far, and the same for D.  -> π_G(y|v), π_D(v|y), both [..., 2, Y]; rank by π_D's first.
    """
    if generator.shape != discriminator.shape or generator.size(-2) != 2:
        raise UserError(f"equilibrium: P(y|v) {list(generator.shape)} and P(v|y) "
                        f"{list(discriminator.shape)} must both be [..., 2, Y], correct first")
    if eta <= 0 or lam <= 0:
        raise UserError(f"--eta {eta} --lam {lam}: both above 0")
    real = generator.sum(-2, keepdim=True) > 0                                         # [..., 1, Y]
    d = torch.where(real, discriminator, 0.0)
    G1 = normalised((generator / generator.sum(-2, keepdim=True)).nan_to_num().log(), -1)
    D1 = normalised((d / d.sum(-1, keepdim=True)).log(), -2)
    G, D = G1.exp(), D1.exp()                                                          # [..., 2, Y]
    sum_g, sum_d = torch.zeros_like(G), torch.zeros_like(D)
    for t in range(1, rounds + 1):
        sum_g, sum_d = sum_g + G, sum_d + D
        sharp = 1 / (1 / (eta * t) + lam)
        G = normalised((sum_d / (2 * t) + lam * G1) * sharp, -1).exp()
        D = normalised((sum_g / (2 * t) + lam * D1) * sharp, -2).exp()
    return G, D


def answer_views(answers, logp, given, right):
    """What consensus() plays with, for N sampled responses of a prompt. -> answers [Y], two [2, Y]

    answers [N]: what each states; logp [N] of each, the sampler's; given [2, N]: log P(y|x,v);
    right [N]: P(correct|x,y). Ours: a candidate is a distinct answer a, with P(a|x,v) = (1/N) Σ_{i:
    a} P(y_i|x,v) / P(y_i|x), an unbiased estimate as y_i is drawn from P(y|x), and P(v|x,a) of its
    most convincing response: a mean would hold it against an answer that it was also guessed.
    """
    names = list(dict.fromkeys(answers))
    place = torch.tensor([names.index(a) for a in answers])                              # [N]
    member = F.one_hot(place, len(names)).T.to(logp.dtype)                               # [Y, N]
    generator = (given - logp).exp() @ member.T / len(answers)                           # [2, Y]
    p = (member * right).amax(1)                                                         # [Y]
    return names, generator, torch.stack([p, 1 - p])


# === equilibrium: 2310.09139, the distinct answers of N samples, by who ranks them ================


def views(tries, model, ids, c, pad):
    """Distinct answers of every problem, and the two players' first views, [P, 2, N] each."""
    P, N, sampler, names = len(tries.problems), c.samples, tries.logp.double(), []
    under = []
    for verdict in (ids.right, ids.wrong):
        rows = [([*p, verdict], y) for p, y in tries.rows]
        under.append(scored(model, rows, c, pad, logp_sum).view(P, N))
    under = torch.stack(under).double()                                                  # [2, P, N]
    gen, dis = torch.zeros(P, 2, N).double(), torch.full((P, 2, N), 0.5).double()
    for i in range(P):
        found, g, d = answer_views(tries.stated[i], sampler[i], under[:, i],
                                   tries.right[i].double())
        keep = [j for j, a in enumerate(found) if a] or [0]              # no answer is no candidate
        names.append([found[j] for j in keep])
        gen[i, :, :len(keep)], dis[i, :, :len(keep)] = g[:, keep], d[:, keep]
    return names, gen, dis


def ranked(tries, names, gen, by):
    """Mean score of the answers that `by` [P, 2, N] puts first."""
    best = by[:, 0].masked_fill(gen.sum(1) == 0, -1.0).argmax(1).tolist()
    truth = [dict(zip(a, r)) for a, r in zip(tries.stated, tries.score.tolist())]
    return fmean(t[a[j]] for t, a, j in zip(truth, names, best))


def equilibrium(target, tok, c, run, *, train_prompts: Count = 1024, rounds: Count = 5000,
                eta: Positive = 0.1, lam: Positive = 0.1):
    """Equilibrium-ranking, 2310.09139, of N samples' answers: accuracy by who ranks them."""
    world, N = tasks.task(c.data), c.samples
    model, quiet, ids = taught(target, tok, world, c, run, train_prompts)
    tries = tried(model, quiet, ids, tok, world, c, c.split, 6)
    names, gen, dis = views(tries, model, ids, c, tok.pad or 0)
    first_g, first_d = consensus(gen, dis, rounds=0)
    last_g, last_d = consensus(gen, dis, rounds=rounds, eta=eta, lam=lam)
    score, stated, rank = tries.score, tries.stated, partial(ranked, tries, names, gen)
    values = {
        "one sample": score.mean().item(), "vote": voted(stated, score, N),
        "weighted vote": voted(stated, score, N, tries.right),
        "best sample by P(correct)": best_of_n(tries.right, score, N).mean().item(),
        "best sample by mean log-prob":
            best_of_n(tries.logp / tries.length, score, N).mean().item(),
        "generator P(a|correct)": rank(gen), "generator, first": rank(first_g),
        "discriminator P(correct|a)": rank(dis), "discriminator, first": rank(first_d),
        "equilibrium": rank(last_d), "equilibrium, generator": rank(last_g),
        "some right": (score > 0).any(1).float().mean().item()}
    return tabled(run, {k: dict(accuracy=v) for k, v in values.items()},
                  f"{len(names)} {c.split} problems, {fmean(map(len, names)):.1f} distinct answers "
                  f"of {N} samples")


DECODERS["equilibrium"], CHECKS["equilibrium"] = equilibrium, check_samples
READERS["equilibrium"] = own_readers
PRESETS["equilibrium"] = dict(decode="equilibrium", data="chain", init="base:chain", prompts=256,
                              steps=200, batch=64, lr=2e-3)


# === stopping: 2410.02725, when sampling may stop, and which half may be dropped ==================


def adaptive_best(p, *, threshold=0.98):
    """Adaptive best-of-N: sample until one is good enough, max p >= threshold, or all N are spent.

    p [P, N] in the order of sampling -> (the argmax of what was sampled [P], samples used [P]).
    Threshold 0 is one sample, above 1 plain best-of-N. 0.98 is the paper's style, and depends on
    the policy: sweep it.
    """
    best = p.cummax(1).values                                                            # [P, N]
    used = 1 + (best < threshold)[:, :-1].sum(1)                                         # [P]
    late = torch.arange(p.size(1), device=p.device) >= used[:, None]
    return p.masked_fill(late, -math.inf).argmax(1), used


def adaptive_value(p, score, *, threshold):
    """adaptive_best over all places to begin.   p, score [P, N] -> mean score, mean samples used"""
    turns = [(*adaptive_best(p.roll(k, 1), threshold=threshold), score.roll(k, 1))
             for k in range(p.size(1))]
    return (fmean(r.gather(1, pick[:, None]).mean().item() for pick, _, r in turns),
            fmean(used.float().mean().item() for _, used, _ in turns))


def annealed(k):
    """Temperature of the k-th sample, 1 - 2^-(k-1): the first is greedy, later ones explore."""
    return 1 - 2.0 ** -(k - 1)


def survivors(p, *, keep=0.5):
    """Pruning amid generation: the ⌈keep N⌉ samples of highest p go on; ties by order.   [P, N]"""
    best = p.argsort(dim=1, descending=True, stable=True)[:, :math.ceil(keep * p.size(1) - 1e-9)]
    return torch.zeros_like(p, dtype=torch.bool).scatter(1, best, True)


def pruned_tokens(length, cut, alive):
    """Tokens that pruning at `cut` costs: all are written up to there, the survivors to their end.

    length, alive [P, N] -> [P]
    """
    return (length.clamp(max=cut) + (length - cut).clamp(min=0) * alive).sum(1)


# === self_eval: 2410.02725, the policy says whether another try would be better ===================


class Fixed:
    """What a fixed number of samples is worth: the best of n by P(NO), and the majority of n."""

    def __init__(self, tries, N):
        self.tries, self.N, self.counts = tries, N, list(range(1, N + 1))
        self.best = [best_of_n(tries.no, tries.score, n).mean().item() for n in self.counts]
        self.votes = [voted(tries.stated, tries.score, n) for n in self.counts]
        self.mean = tries.length.float().mean().item()           # tokens a sample

    def kept(self, right, top):
        """The share that `right` has of best of N's gain over one sample, if there is any."""
        return (right - self.best[0]) / (top - self.best[0]) if top > self.best[0] else 0.0

    def adaptive(self, p, threshold):
        """A row: sampling stops when p is high enough."""
        right, used = adaptive_value(p, self.tries.score, threshold=threshold)
        top = best_of_n(p, self.tries.score, self.N).mean().item()
        return dict(accuracy=right, samples=used, gain_kept=self.kept(right, top),
                    fixed=at_cost(self.counts, self.best, used),
                    vote=at_cost(self.counts, self.votes, used))

    def pruned(self, p, place, share):
        """A row: after `place` tokens only the samples of highest p go on."""
        alive, no = survivors(p, keep=share), self.tries.no
        pick = no.masked_fill(~alive, -1.0).argmax(1, keepdim=True)                      # [P, 1]
        tokens = pruned_tokens(self.tries.length, place, alive).float().mean().item()
        right = self.tries.score.gather(1, pick).mean().item()
        costs = [n * self.mean for n in self.counts]
        return dict(accuracy=right, tokens=tokens / (self.N * self.mean),
                    gain_kept=self.kept(right, self.best[-1]),
                    fixed=at_cost(costs, self.best, tokens),
                    vote=at_cost(costs, self.votes, tokens))


def self_eval(target, tok, c, run, *, train_prompts: Count = 1024, cut: Share = 0.5,
              share: Range("(0, 1]") = 0.5, gain=0.9):
    """Self-evaluation, 2410.02725: does P(NO) know, when may sampling stop, which half may go?

    A threshold is the lowest that reaches `gain` of best-of-N's gain on fresh problems of train;
    the cut is at that share of their mean length. Pruning is played on finished samples, which it
    does not change. fixed and vote: the best of n by P(NO), and the majority, for as many samples
    (pruning: tokens).
    """
    world, pad = tasks.task(c.data), tok.pad or 0
    known = model, quiet, ids = taught(target, tok, world, c, run, train_prompts)
    tune = tried(*known, tok, world, c, "train", 5)
    tries = tried(*known, tok, world, c, c.split, 6)
    steady, place = Fixed(tries, c.samples), max(1, round(cut * tune.length.float().mean().item()))
    half = asked(model, [(p, y[:place]) for p, y in tries.rows], ids, c, pad)[0]
    half = half.view(tries.score.shape)                                                  # [P, N]
    before = responses(target, tok, world, tries.problems, c, 7, c.samples)[-1].mean().item()
    out = signals(run, steady, half, place, before, c)
    out |= stopped(run, steady, tune, gain)
    out |= dropped(run, steady, half, place, share, c)
    return out | cooled(run, known, tok, world, steady, c)


DECODERS["self_eval"], CHECKS["self_eval"] = self_eval, check_samples
READERS["self_eval"] = own_readers
PRESETS["self_eval"] = dict(decode="self_eval", data="chain", init="base:chain", prompts=256,
                            steps=200, batch=64, lr=2e-3)


# === self_eval_tables: 2410.02725, its four tables ================================================


def signals(run, steady, half, place, before, c):
    """The table of what tells good samples from bad ones."""
    tries, N = steady.tries, steady.N
    good, going = tries.score > 0, tries.length > place
    rows = {"one sample": dict(accuracy=steady.best[0]), "before training": dict(accuracy=before)}
    for name, x in {"P(NO)": tries.no, "P(correct)": tries.right,
                    "mean log-prob": tries.logp / tries.length, "P(NO) at the cut": half}.items():
        rows[name] = dict(accuracy=best_of_n(x, tries.score, N).mean().item(),
                          auroc=auroc(x.flatten(), good.flatten()))
    rows |= {"... if unfinished": dict(auroc=auroc(half[going], good[going])),
             "vote": dict(accuracy=steady.votes[-1]),
             "weighted vote": dict(accuracy=voted(tries.stated, tries.score, N, tries.right)),
             "some right": dict(accuracy=good.any(1).float().mean().item())}
    return tabled(run, rows, f"{len(tries.problems)} {c.split} problems, {N} samples of "
                  f"{steady.mean:.1f} tokens; the cut is after {place}")


def lowest(p, tune, gain):
    """The lowest threshold of p [P, N] that keeps `gain` of best-of-N's gain on `tune`."""
    one, top = tune.score.mean().item(), best_of_n(p, tune.score, p.size(1)).mean().item()
    grid = p.flatten().quantile(torch.linspace(0, 1, 51)).tolist()
    enough = one + gain * (top - one)
    return next((t for t in grid if adaptive_value(p, tune.score, threshold=t)[0] >= enough),
                grid[-1])


def stopped(run, steady, tune, gain):
    """The table of adaptive best of N, by P(NO) and by what sampling tells for nothing."""
    tries = steady.tries
    chosen, rival = lowest(tune.no, tune, gain), lowest(tune.logp / tune.length, tune, gain)
    rows = {f"adaptive@{t:g}": steady.adaptive(tries.no, t) for t in (0.3, 0.4, 0.5, 0.6, 0.7)}
    rows |= {"P(NO), chosen": steady.adaptive(tries.no, chosen),
             "log-prob, chosen": steady.adaptive(tries.logp / tries.length, rival)}
    note = (f"adaptive best of {steady.N}, threshold of P(NO) chosen on train: {chosen:.2f}, and "
            f"{rival:.2f} for mean log-prob")
    return tabled(run, rows, note) | dict(threshold=chosen)


def dropped(run, steady, half, place, share, c):
    """The table of pruning amid generation, by P(NO) and by lot."""
    lots = [steady.pruned(torch.rand(half.shape, generator=rng(c, 10 + i)), place, share)
            for i in range(20)]
    by_lot = dict(zip(lots[0], map(fmean, zip(*(x.values() for x in lots)))))
    return tabled(run, {"pruned": steady.pruned(half, place, share), "pruned by lot": by_lot},
                  f"after {place} tokens {share:g} of {steady.N} go on; tokens: 1 is all "
                  f"{steady.N} whole")


def cooled(run, known, tok, world, steady, c):
    """The table of annealing: the k-th of n samples is drawn at its own temperature."""
    (model, quiet, ids), tries, nos, scores = known, steady.tries, [], []
    prompts = [p for p, _ in tries.rows[::steady.N]]
    for k in steady.counts:
        *_, answers, score = responses(quiet, tok, world, tries.problems, c, 40 + k,
                                   temperature=annealed(k))
        nos.append(asked(model, list(zip(prompts, answers)), ids, c, tok.pad or 0)[0])
        scores.append(score)
    no, score = torch.stack(nos, 1), torch.cat(scores, 1)                                # [P, N]
    rows = {}
    for n, fixed_best in zip(steady.counts, steady.best):
        pick = no[:, :n].argmax(1, keepdim=True)                                         # [P, 1]
        rows[f"annealed@{n}"] = dict(accuracy=score[:, :n].gather(1, pick).mean().item(),
                                     fixed=fixed_best)
    return tabled(run, rows,
                  "best of n by P(NO), the k-th at temperature 1 - 2^(1-k); fixed: at 1")


if __name__ == "__main__":
    cli(main)
