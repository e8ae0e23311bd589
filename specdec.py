"""
specdec.py - speculative decoding: train a draft, verify, measure; and other ways to decode.

    python specdec.py                                   # a draft for a small base model, made first
    python specdec.py --config adaspec --init base:sft --data signatures
    python specdec.py --init Qwen2.5-7B --draft Qwen2.5-0.5B --data gsm8k.jsonl --steps 0 --max_new 256
    python specdec.py --claim adaspec --seeds 5         # the paper's claim, and at equal data

Map      1 config   2 the rule   3 draft lengths   4 drafters   5 the loop   6 training a draft   7 measure
         8 decode   9 train   10 claims
Letters  p the target's distribution, q the draft's; G drafted tokens a round; B rows, V vocabulary;
         c = a draft step / a target step, v = a target step over G + 1 tokens / over one
preset      paper          idea
speculative 2211.17192     draft, verify in one pass, keep what the target would have said (the default)
lookup      -              no model: what followed the last words when they stood there before
omnidraft   2507.02659     a draft of another vocabulary, translated by a cache
distillspec 2310.08461     the draft distilled from the target on all tokens
on_policy   2310.08461     ... on its own samples
adaspec     2510.19779     ... on the tokens where a reference draft shows most left to learn
tiny        size           seconds on any CPU
Watch    E, tokens a target pass (block efficiency), and the measured speedup beside the predicted one,
         E / (G c + v): a gap between them is overhead. acceptance counts tested tokens alone, so it is above
         accepted / proposed, where what follows a rejection counts as proposed.
"""
import copy
import math
import re
import time
from dataclasses import dataclass
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn.functional as F
from torch.nn.utils import clip_grad_norm_
from tqdm import tqdm

import kernels
import sft
from data import tasks
from data.crossvocab import NgramCache, Translated
from data.drafting import Lookup, Tally
from data.text import is_corpus
from data.run import Claim, Run, UserError, batch_indices, checkpoint, cli, in_parts, launch, needs
from model import (Cache, Transformer, collate, collect, generate, init, load, prefill, preset, save,
                   tempered)
from optim import linear, optimiser, set_lr

# --- 1 config -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Config:
    """What every run has; what belongs to a method is an argument of its function."""
    config: str = ""             # presets and TOML files, left to right
    init: str = "base:target"      # the target
    draft: str = "base:draft64"  # a checkpoint, or a new draft of LAYERSxWIDTH
    data: str = "stdlib"         # what a draft learns from and prompts come from: a text, or a task or file
    rows: int = 0                # learn from only so many demonstrations or windows (0: all)
    chat: bool = False           # wrap prompts in the target's chat template
    decode: str = "speculative"  # which row of DECODERS
    drafter: str = "small"       # which row of DRAFTERS
    length: str = "optimal"      # which row of LENGTHS says when a draft is long enough
    temperature: float = 0.0     # of the decoding that is measured; 0 is greedy
    top_k: int = 0               # keep only the k likeliest tokens (0: all), of target and draft
    top_p: float = 1.0           # keep the likeliest tokens of this total mass, of target and draft
    prompts: int = 64            # held-out prompts to decode
    prompt: int = 32             # their tokens, where --data is a text
    max_new: int = 64            # new tokens of each
    together: int = 1            # rows decoded at once
    loss: str = "forward_kl"     # which row of LOSSES draws the draft to the target
    select: str = "every"        # which row of SELECT says which tokens of a batch count
    source: str = "data"         # which row of SOURCES: whose completions the draft learns on
    steps: int = 300             # of the draft's training; 0: it is used as it is
    batch: int = 16              # rows a step
    micro: int = 64              # rows per forward pass; select compares tokens within one
    context: int = 96            # tokens of a training row
    lr: float = 3e-3             # peak learning rate
    warmup: int = 30             # steps of linear warm-up
    clip: float = 1.0            # largest gradient norm
    ref_batch: int = 16          # rows a step of the reference draft, where --select reads one
    ref_steps: int = 0           # its steps (0: as many as the draft's)
    refresh: int = 50            # steps between new samples, where --source samples
    eval_rows: int = 64          # held-out rows on which agreement is measured
    eval_every: int = 100        # steps between such measurements
    save_every: int = 200        # steps between checkpoints
    keep: int = 1                # checkpoints to keep
    stop: int = 0                # pause after this step (0: no); --resume goes on
    out: str = ""                # run folder (default out/specdec/<presets>)
    seed: int = 0                # of a new draft, the data order, sampling, and of a base:… model
    device: str = "auto"         # cpu or cuda
    kernels: str = "auto"        # auto, or torch: the plain definition of every kernel
    resume: bool = False         # go on from the newest checkpoint of the run folder


PRESETS = dict(
    speculative=dict(), lookup=dict(drafter="lookup", length="fixed", gamma=8, steps=0),
    omnidraft=dict(drafter="omnidraft", init="base:pretrain", length="fixed", gamma=3, steps=0),
    distillspec=dict(), on_policy=dict(source="draft"),
    adaspec=dict(select="adaspec", batch=40, ref_batch=16),
    # what only the arms of claims need
    arena=dict(rows=1000, batch=8, ref_batch=8, prompts=16, temperature=1.0, length="fixed", gamma=4),
    wide=dict(batch=20), by_chance=dict(select="at_random"), smallest_gap=dict(select="smallest"),
    docs=dict(init="base:target_docs", data="signatures", context=320, micro=20),
    draft64=dict(draft="base:draft64"), draft32=dict(draft="base:draft32"),
    tiny=dict(steps=4, batch=4, ref_batch=4, context=48, prompts=4, max_new=12, prompt=8,
              eval_rows=4, refresh=2),
)
CURVES = {"divergence": ["loss", "kl"], "acceptance Σ min(p, q)": ["overlap"]}

# --- 2 the rule: 2211.17192, 2302.01318 -------------------------------------------------------------------


def draw(p, u):
    """Sample by inverting the distribution function.   p [..., V] of any sum, u [...] in [0, 1) -> [...]"""
    cdf = p.double().cumsum(-1)
    return torch.searchsorted(cdf, u[..., None].double() * cdf[..., -1:], right=True).squeeze(-1)


def law(logits, temperature=1.0, top_k=0, top_p=1.0):
    """The distribution that is sampled from [..., V]; greedy (temperature 0): all mass on the argmax."""
    if temperature == 0:
        return F.one_hot(logits.argmax(-1), logits.size(-1)).to(logits.dtype)
    return tempered(logits, temperature, top_k, top_p).softmax(-1)


def verify(p, q, drafted, count, u, *, lenience=1.0):
    """Which drafted tokens stay, and the one after them: together distributed as p, whatever q is.

    Token x is kept with probability min(1, p(x) / q(x)); after the first that is not, one of max(p - q, 0),
    normalised, and after a block kept whole one of p (Leviathan et al., 2211.17192, Algorithm 1). Greedy is
    the same with one-hot p. lenience l < 1 is their lossy variant: l q for q, so that no token gets more than
    p / l.
    p [B, G+1, V];  q [B, G, V], what the tokens were drawn from, or None where nothing was drawn (point
    masses);  drafted [B, G], of which count [B] are real;  u [B, G+1, 2], uniform: of the tests, of the drawn
    tokens.   -> kept [B], next token [B]
    """
    G, row = drafted.size(1), torch.arange(len(drafted), device=p.device)
    px = p[:, :G].gather(-1, drafted[..., None]).squeeze(-1)                             # [B, G]
    qx = 1.0 if q is None else q.gather(-1, drafted[..., None]).squeeze(-1)
    keep = (u[:, :G, 0] * lenience * qx < px) & (torch.arange(G, device=p.device) < count[:, None])
    kept = keep.long().cumprod(1).sum(1)                                                 # [B]
    p, lost = p[row, kept], (kept < count)[:, None]                                      # [B, V], [B, 1]
    if q is None:
        x = F.pad(drafted, (0, 1)).gather(1, kept[:, None])                              # [B, 1]
        rest = p.scatter_add(1, x, -lenience * lost.to(p)).clamp(min=0)
    else:
        rest = (p - lenience * F.pad(q, (0, 0, 0, 1))[row, kept] * lost).clamp(min=0)
    rest = torch.where(rest.sum(-1, keepdim=True) > 0, rest, p)      # p = q: then rejection was rounding
    return kept, draw(rest, u[row, kept, 1])


# --- 3 draft lengths: is one more token, the (k+1)-th, worth drafting? -> bool or bool [B] ---------------
# They see the draft and what is committed, never the verdict on the draft at hand: the rule stays lossless.


def fixed(k, *, gamma=4):
    """As many every time."""
    return k < gamma


def heuristic(k, reach, *, gamma=16):
    """Two more after a block kept whole, else one fewer (Hugging Face's assisted generation); starts at 5."""
    return (k < reach) & (k < gamma)


def confident(k, sure, *, gamma=8, least=0.4):
    """While the draft's own probability of its last token is at least `least` (Hugging Face's default)."""
    return sure[:, -1] >= least if 0 < k < gamma else k < gamma


def optimal(k, chance, cost, turn, *, gamma=8, explore=16):
    """While it raises  E_k / (k c + v_k),  E_k = 1 + Σ_{i≤k} Π_{j≤i} a_j,  a the chances to be kept.

    chance [B, k+1]: of the k tokens, from how often tokens of that confidence were kept, and for the next the
    mean. For constant a it stops at the best fixed length. ours: the calibration (Tally.chance), and that
    every 16th round drafts one token at least, or a bad beginning would never be corrected.
    """
    if k == 0 and turn % explore == 0 or k >= gamma:
        return k < gamma
    stays = chance.cumprod(1)                                                            # [B, k+1]
    now, more = 1 + stays[:, :k].sum(1), 1 + stays.sum(1)                                # [B]
    return more * (k * cost.c + cost.v[k]) > now * ((k + 1) * cost.c + cost.v[k + 1])


LENGTHS = dict(optimal=optimal, fixed=fixed, heuristic=heuristic, confident=confident)

# --- 4 drafters: propose(text, length, u, more) drafts after text[b, :length[b]] ----------------------------
# -> drafted [B, G], q [B, G, V] (None: nothing was drawn), count [B] (row b's real drafts), sure [B, G] (the
# draft's own probability of each).
# more(k, sure [B, k]) -> bool [B]: which rows want a (k+1)-th. start and keep follow the loop's batch.


class Small:
    """A smaller language model of the target's vocabulary; padding rows of either head are never drafted."""

    def __init__(self, model, vocab, words, sampling):
        self.model, self.vocab, self.sampling = model, vocab, sampling
        self.words, self.context = min(words, model.config.vocab_size), model.config.max_position_embeddings

    def start(self, prompts, length, rows, new):
        self.cache = prefill(self.model, prompts, length, rows, new)[1]

    def keep(self, order):
        self.cache.keep(order)

    def propose(self, text, length, u, more):
        """Feeds the last two tokens first: after a block kept whole the cache lacks the last drafted one."""
        self.cache.length, self.cache.used = length - 2, int(length.max()) - 2
        feed = text.gather(1, torch.stack([length - 2, length - 1], 1))                  # [B, 2]
        count, drafted, qs, sure = torch.zeros_like(length), text[:, :0], [], u[:, :0, 0]
        alive = more(0, sure)                                                            # [B]
        while alive.any():
            logits = self.model.logits(self.model(feed, self.cache)[:, -1])[:, :self.words]
            if self.sampling[0]:
                q = law(logits, *self.sampling)                                          # [B, words]
                qs.append(F.pad(q, (0, self.vocab - self.words)))
                feed = draw(q, u[:, len(qs) - 1, 0])[:, None]                            # [B, 1]
            else:
                feed = logits.argmax(-1, keepdim=True)
            drafted = torch.cat([drafted, feed], 1)                                      # [B, k]
            sure = torch.cat([sure, logits.softmax(-1).gather(1, feed)], 1)              # [B, k]
            count += alive
            alive = alive & more(drafted.size(1), sure)
        return drafted, torch.stack(qs, 1) if qs else None, count, sure


# --- 5 the loop ---------------------------------------------------------------------------------------

def fits(target, drafter, prompts, max_new, most):
    """The context that target and draft share; UserError where prompt, new tokens and draft do not fit it."""
    whole, longest = target.config.max_position_embeddings, max((len(p) for p in prompts), default=0)
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
def speculate(target, drafter, prompts, max_new, length_rule, *, cost=None, temperature=0.0, top_k=0,
              top_p=1.0, stop=None, generator=None, lenience=1.0, tally=None):
    """model.generate, one sample a prompt, by drafting and verifying -> (Rollout, Tally).

    Rounds: draft after the committed tokens, one target pass over the last of them and the draft, verify,
    commit. The target's cache holds all committed tokens but the last, the draft's all but two; rolling back
    is setting their length. Rows commit different numbers; finished ones leave the batch. Row b's i-th new
    token has three uniform numbers fixed beforehand (draft, test, draw), so that the other rows change
    nothing. length_rule: a row of LENGTHS with its arguments bound; cost: of measure_costs, if it reads one.
    Raises UserError where they do not fit the context.
    """
    device, config = target.head.device, target.config
    most, reads = length_rule.keywords["gamma"], needs(length_rule)
    context = fits(target, drafter, prompts, max_new, most)
    stop = torch.tensor(config.eos_token_id if stop is None else stop, device=device, dtype=torch.long)
    index = {p: i for i, p in enumerate(dict.fromkeys(map(tuple, prompts)))}
    rows = torch.tensor([index[tuple(p)] for p in prompts], device=device)               # [B]
    distinct, _ = collate([(p, ()) for p in index], max(config.pad_token_id, 0), device)
    length = torch.tensor([len(p) for p in index], device=device)                        # [U]
    tally = tally or Tally()

    B, start = len(rows), length[rows]
    u = torch.rand(B, max_new + most + 1, 3, generator=generator).to(device)
    text = F.pad(distinct[rows], (0, max_new + most + 1))                                # [B, W]
    logp = torch.zeros_like(text, dtype=torch.float32)
    hidden, cache = prefill(target, distinct, length, rows, max_new + most)
    drafter.start(distinct, length, rows, max_new + most)
    row, end = torch.arange(B, device=device), start + max_new
    length = start.clone()                                   # [B] committed tokens: prompt and completion
    reach = torch.full_like(length, 5)

    def score(logits):
        """log-probs as generate() reports them, and the law that is sampled from."""
        logp = torch.log_softmax(tempered(logits, temperature, top_k, top_p) if temperature else logits, -1)
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
        here = (length - start[row])[:, None] + torch.arange(most + 1, device=device)    # [n, most+1]
        mine = u[row[:, None], here]                                                     # [n, most+1, 3]

        def more(k, sure):
            have = dict(k=k, reach=reach, sure=sure, cost=cost, turn=tally.rounds)
            if "chance" in reads:
                have["chance"] = tally.chance(sure)
            return (k < room) & length_rule(**{x: have[x] for x in reads})
        clock = time.perf_counter()
        drafted, q, count, sure = drafter.propose(text[row], length, mine, more)
        tally.drafting += time.perf_counter() - clock
        # 2. verify
        last = text[row].gather(1, length[:, None] - 1)                                  # [n, 1]
        cache.length, cache.used = length - 1, int(length.max()) - 1
        logps, p = score(target.logits(target(torch.cat([last, drafted], 1), cache)))    # [n, G+1, V]
        kept, token = verify(p, q, drafted, count, mine[:, :drafted.size(1) + 1, 1:], lenience=lenience)
        # 3. commit: the kept tokens and one more; what stands behind them is overwritten later
        block = torch.cat([drafted, last], 1).scatter(1, kept[:, None], token[:, None])  # [n, G+1]
        at = torch.arange(block.size(1), device=device)
        text[row[:, None], length[:, None] + at] = block
        logp[row[:, None], length[:, None] + at] = logps.gather(-1, block[..., None]).squeeze(-1)
        ends = torch.isin(block, stop) & (at <= kept[:, None])                           # [n, G+1]
        fresh = torch.where(ends.any(1), ends.long().argmax(1), kept) + 1                # [n] up to a stop
        length = length + fresh
        done = ends.any(1) | (length == end[row])
        reach = torch.where(kept == count, reach + 2, (reach - 1).clamp(min=1))
        tally.note(kept, count, sure)
        tally.tokens += int(fresh.sum())
    place = start[:, None] + torch.arange(max_new, device=device)                        # [B, new]
    roll = collect(distinct[rows], start, text.gather(1, place), logp.gather(1, place), stop,
                   max(config.pad_token_id, 0), tally.rounds)
    return roll, tally


# --- 6 training a draft -----------------------------------------------------------------------------------
# h [N, D] and W [V, D] of the draft, t and U of the target -> nats a token [N]; target, draft: p, q


def forward_kl(h, W, t, U):
    """Σ p log(p / q):  DistillSpec's and AdaSPEC's."""
    return kernels.linear_distill(h, W, t, U, "forward_kl")


def reverse_kl(h, W, t, U):
    """Σ q log(q / p)."""
    return kernels.linear_distill(h, W, t, U, "reverse_kl")


def jsd(h, W, t, U, *, beta=0.5):
    """β KL(p‖m) + (1-β) KL(q‖m),  m = β p + (1-β) q."""
    return kernels.linear_distill(h, W, t, U, "jsd", beta=beta)


def tvd(h, W, t, U):
    """½ Σ |p - q|: what acceptance loses itself."""
    return ((h @ W.T).softmax(-1) - (t @ U.T).softmax(-1).detach()).abs().sum(-1) / 2


LOSSES = dict(forward_kl=forward_kl, reverse_kl=reverse_kl, jsd=jsd, tvd=tvd)

# which tokens of a micro-batch count: loss [N] of the draft, ref [N] of the reference draft -> bool [N]


def every(loss):
    """All: DistillSpec (2310.08461)."""
    return torch.ones_like(loss, dtype=torch.bool)


def top(x, k):
    """The share k of largest values: those not below the (1-k) quantile, so equal ones may be more."""
    if not 0 < k <= 1:
        raise UserError(f"--k {k}: a share of the tokens, above 0 and at most 1")
    return x >= torch.quantile(x, 1 - k) if x.numel() else x > 0


def adaspec(loss, ref, *, k=0.4):
    """AdaSPEC (2510.19779): the largest  Δ = loss - ref,  what a draft of this size can still learn."""
    return top(loss - ref, k)


def smallest(loss, ref, *, k=0.4):
    """A control: the smallest Δ."""
    return top(ref - loss, k)


def easiest(loss, ref, *, k=0.4):
    """A control: the tokens on which the reference is nearest to the target."""
    return top(-ref, k)


def at_random(loss, generator, *, k=0.4):
    """A control: as many at random."""
    return top(torch.rand(len(loss), generator=generator).to(loss), k)


SELECT = dict(every=every, adaspec=adaspec, smallest=smallest, easiest=easiest, at_random=at_random)

# whose completions: rows, [(prompt ids, completion ids)], -> such rows


def head(row, c, corpus):
    """A row's prompt; of a window of text the first --prompt tokens."""
    return [*row[0], *row[1][:c.prompt - len(row[0])]] if corpus else list(row[0])


def sampled(model, rows, c, generator, temperature=1.0):
    """The rows with completions that the model samples, as long as --context allows."""
    out, prompts = [], [head(row, c, is_corpus(c.data)) for row in rows]
    new = min(c.context, model.config.max_position_embeddings) - max(map(len, prompts))
    if new < 1:
        raise UserError(f"--context {c.context}: a prompt of {max(map(len, prompts))} tokens leaves no room "
                        "for a completion; raise it")
    for i in range(0, len(prompts), 64):
        roll = generate(model, prompts[i:i + 64], new, temperature=temperature, generator=generator)
        out += [(p, t[m > 0].tolist()) for p, t, m in zip(prompts[i:i + 64], roll.tokens, roll.mask)]
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
    return [x for pair in zip(rows[::2], sampled(draft, rows[1::2], c, generator)) for x in pair] + (
        rows[-1:] if len(rows) % 2 else [])


SOURCES = dict(data=given, draft=own, target=teacher, mixed=mixed)


def states(model, tokens, mask):
    """The hidden states that predict the scored tokens [N, D]."""
    return model(tokens)[:, :-1][mask[:, 1:] > 0]


@torch.no_grad()
def remember(target, rows, visits, c):
    """The target's states [n, D] of each row, made once, if rows come twice and 2 GB hold them; else None."""
    size = sum(len(y) for _, y in rows) * target.config.hidden_size * 4
    if visits < 2 * len(rows) or size > 2e9:
        return None
    out = []
    for i in tqdm(range(0, len(rows), c.micro), desc="target", disable=None, leave=False):
        tokens, mask = collate(rows[i:i + c.micro], target.config.pad_token_id, c.device)
        out += states(target, tokens, mask).split(mask[:, 1:].sum(1).long().tolist())
    return out


def learn(draft, target, reference, rows, known, c, f, generator, words):
    """Accumulate the gradient of one step over its rows. -> loss of the selected tokens, share selected

    With a selection the losses of all tokens are made without a graph first; head and backward then see the
    selected ones alone. A micro-batch weighs by its rows.
    """
    U, W, told, names = target.head[:words], draft.head[:words], [0.0, 0.0], needs(f.select)
    for i in range(0, len(rows), c.micro):
        part = rows[i:i + c.micro]
        tokens, mask = collate(part, target.config.pad_token_id, c.device)               # [b, T] each
        with torch.no_grad():                                                            # [N, D]
            t = torch.cat(known[i:i + c.micro]) if known else states(target, tokens, mask)
        h = states(draft, tokens, mask)
        chosen = slice(None)
        if names != ["loss"]:
            with torch.no_grad():
                have = dict(loss=f.loss(h, W, t, U), generator=generator)
                if "ref" in names:
                    have["ref"] = f.loss(states(reference, tokens, mask), reference.head[:words], t, U)
                chosen = f.select(**{x: have[x] for x in names})                         # [N]
        loss = f.loss(h[chosen], W, t[chosen], U)
        weight = len(part) / len(rows)
        (loss.mean() * weight).backward()
        told[0] += loss.mean().item() * weight
        told[1] += len(loss) / len(h) * weight
    return told


def teach(draft, target, reference, rows, known, c, f, run, steps, batch, ticks, words, save_at=None):
    """Train the draft in place on `rows` for the steps that `ticks` yields, `batch` rows each; known: of
    remember(), or None."""
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
                pool = f.source([(list(p), list(y)) for p, y in map(rows.__getitem__, ahead)], draft, target,
                                c, g)
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


# --- 7 measure ----------------------------------------------------------------------------------------


@torch.no_grad()
def agreement(target, draft, rows, c, words):
    """On rows [(prompt, completion)]: overlap = Σ min(p, q), the chance that a sample is kept at temperature
    1; kl = KL(p‖q) in nats; same_top; means over the completions' tokens."""
    told, count = torch.zeros(3, dtype=torch.double), 0
    for i in range(0, len(rows), c.micro):
        tokens, mask = collate(rows[i:i + c.micro], target.config.pad_token_id, c.device)
        p, q = (torch.log_softmax(m.logits(states(m, tokens, mask))[:, :words], -1)
                for m in (target, draft))                                                # [N, V] each
        told += torch.stack([torch.minimum(p.exp(), q.exp()).sum(), (p.exp() * (p - q)).sum(),
                             (p.argmax(-1) == q.argmax(-1)).sum()]).double().cpu()
        count += len(p)
    return dict(zip(("overlap", "kl", "same_top"), (told / max(1, count)).tolist()))


def synchronised(device):
    """The clock, after all work on the device is done."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


@torch.no_grad()
def measure_costs(target, draft, rows, held, most, repeats=30):
    """What passes cost beside a target pass over one token: c, the draft's step (0 without a draft), and v[G]
    of a target pass over G + 1; rows sequences of `held` tokens. The least of interleaved repetitions."""
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
            began = synchronised(device)
            model.logits(model(tokens, cache)).argmax(-1)
            best[model, w] = min(best.get((model, w), math.inf), synchronised(device) - began)
            cache.length -= w
            cache.used -= w
    one = best[target, 1]
    v = np.interp(range(1, most + 2), widths, [best[target, w] / one for w in widths])
    return SimpleNamespace(c=best[draft, 1] / one if draft else 0.0, v=v.tolist())


def first_difference(target, a, b, prompt):
    """The target's gap between its two likeliest tokens, in nats, where two greedy completions part."""
    i = next(i for i, (x, y) in enumerate(zip([*a, -1], [*b, -1])) if x != y)
    with torch.no_grad():
        logits = target.logits(target(torch.tensor([[*prompt, *a[:i]]], device=target.head.device))[:, -1])
    best = logits[0].topk(2).values
    return (best[0] - best[1]).item()


def race(target, drafters, prompts, c, f, run, lenience):
    """Decode the prompts plainly and with each drafter, in turns, so that a busy machine slows all alike.

    -> numbers of the table, drafter x's as "x_speedup", …; greedy outputs are compared token by token.
    """
    device, most = target.head.device, f.length.keywords["gamma"]
    sampling = dict(temperature=c.temperature, top_k=c.top_k, top_p=c.top_p)
    room = min(fits(target, d, prompts, c.max_new, most) for d in drafters.values())
    room = min([room, *(d.model.config.max_position_embeddings for d in drafters.values() if d.model)])
    held = max(1, min(max(map(len, prompts)) + c.max_new // 2, room - most - 1))
    costs = {x: measure_costs(target, d.model, c.together, held, most) for x, d in drafters.items()}
    tallies, spent, plain = {x: Tally() for x in drafters}, dict.fromkeys(drafters, 0.0), [0.0, 0]
    same, gaps = dict.fromkeys(drafters, 0), []
    parts = [prompts[i:i + c.together] for i in range(0, len(prompts), c.together)]
    for i, part in enumerate(tqdm([parts[0], *parts], desc="race", disable=None, leave=False)):
        seed = torch.Generator().manual_seed(c.seed * 100_003 + i)
        began = synchronised(device)
        whole = generate(target, part, c.max_new, generator=seed, **sampling)
        took = synchronised(device) - began
        for x, drafter in drafters.items():
            began = synchronised(device)
            roll, _ = speculate(target, drafter, part, c.max_new, f.length, cost=costs[x], generator=seed,
                                lenience=lenience, tally=tallies[x], **sampling)
            spent[x] += synchronised(device) - began
            if i:
                pairs = list(zip(whole.completions(), roll.completions(), part))
                same[x] += sum(a == b for a, b, _ in pairs)
                gaps += [first_difference(target, *pair) for pair in pairs if pair[0] != pair[1]
                         and c.temperature == 0]
            else:                                # the first part warms everything up and is not counted
                tallies[x], spent[x] = Tally(), 0.0
        plain = [plain[0] + took, plain[1] + whole.mask.sum().item()] if i else plain
    rate = plain[1] / plain[0]
    run.say(f"  {'':<12}{'tokens/s':>9}{'speedup':>9}{'predicted':>10}{'acceptance':>11}{'kept/drafted':>13}"
            f"{'E':>7}{'E, i.i.d.':>10}{'drafts':>8}{'c':>7}{'v':>6}\n  {'plain':<12}{rate:>9.1f}{1:>9.2f}")
    told = dict(plain_tokens_per_second=rate)
    for x, t in tallies.items():
        costs[x].c *= getattr(drafters[x], "per_token", 1.0)     # a translated token is several draft steps
        drafts = sum(G * n for G, n in t.passes.items()) / max(1, sum(t.passes.values()))
        row = dict(tokens_per_second=(t.tokens + len(prompts)) / spent[x], predicted=t.predicted(costs[x]),
                   acceptance=t.acceptance, kept_of_drafted=t.kept.total() / max(1, t.proposed),
                   efficiency=t.efficiency, independent=t.independent(), drafts=drafts, cost=costs[x].c,
                   verify_cost=float(np.interp(drafts, range(most + 1), costs[x].v)),
                   same=same[x] / len(prompts))
        row["speedup"] = row["tokens_per_second"] / rate
        told |= {f"{x}_{k}": v for k, v in row.items()}
        run.say(f"  {x:<12}{row['tokens_per_second']:>9.1f}{row['speedup']:>9.2f}{row['predicted']:>10.2f}"
                f"{row['acceptance']:>11.3f}{row['kept_of_drafted']:>13.3f}{t.efficiency:>7.2f}"
                f"{row['independent']:>10.2f}{drafts:>8.2f}{costs[x].c:>7.3f}{row['verify_cost']:>6.2f}")
        survival = [f"{k / n:.2f}" for k, n in ((t.kept[j], t.tested[j]) for j in range(len(t.tested)))]
        run.say(f"  {'':<12}kept by place in the draft: {' '.join(survival)}")
    if c.temperature == 0:
        run.say("  greedy outputs equal to plain decoding's: "
                + ", ".join(f"{x} {n} of {len(prompts)}" for x, n in same.items())
                + (f"; where they part the target's two likeliest tokens are at most {max(gaps):.1e} nats "
                   "apart: rounding" if gaps else ""))
    return told | dict(widest_gap=max(gaps, default=0.0))


# --- 8 decode -----------------------------------------------------------------------------------------


def small(draft, tok, c, target):
    """A smaller language model of the target's vocabulary."""
    return Small(draft, target.config.vocab_size, tok.vocab_size, (c.temperature, c.top_k, c.top_p))


def lookup(*, n=3):
    """No model: what followed the last n tokens, or fewer, where they stood last."""
    return Lookup(n)


def omnidraft(draft, tok, own, c, target, *, mode="point", longest=32):
    """OmniDraft (2507.02659): a model of another tokenizer, `own`, whose tokens a cache translates. point: its
    likeliest tokens as point masses, exact. ngram: samples and the paper's q', approximate where strings nest."""
    sampling = (0, 0, 1.0) if mode == "point" else (c.temperature, c.top_k, c.top_p)
    return Translated(draft, NgramCache(tok, own), target.config.vocab_size, sampling, prefill=prefill, law=law,
                      draw=draw, mode=mode, longest=longest)


DRAFTERS = dict(small=small, lookup=lookup, omnidraft=omnidraft)


def open_draft(target, tok, c, f, run):
    """--draft: a new model of that size, or a checkpoint, and its tokenizer. UserError for another vocabulary,
    unless the drafter translates."""
    if re.fullmatch(r"\d+x\d+", c.draft):
        family = "qwen3" if target.config.moe else target.config.model_type
        shape = preset(c.draft, tok, target.config.max_position_embeddings, family)
        draft, own = init(shape, c.seed).to(c.device), tok
    else:
        draft, own = load(checkpoint(sft.find(c.draft, c.config, device=c.device, seed=c.seed)), c.device)
    if not isinstance(draft, Transformer):
        raise UserError(f"--draft {c.draft} is a reward model; a draft is a language model")
    if "own" not in needs(f.drafter) and own.tokens != tok.tokens:
        raise UserError(f"--draft {c.draft} has another vocabulary than --init {c.init}: take a draft with the "
                        "target's tokenizer, a new one (--draft 1x64), or --drafter omnidraft")
    if "own" in needs(f.drafter) and c.steps:
        run.say(f"  --drafter {c.drafter} uses the draft as it is: nothing here distils across vocabularies")
    sizes = [sum(p.numel() for p in m.parameters()) for m in (draft, target)]
    if sizes[0] >= sizes[1]:
        run.say(f"warning: the draft has {sizes[0] / 1e6:.2f} M parameters, the target "
                f"{sizes[1] / 1e6:.2f} M: drafting with it cannot pay")
    return draft, own


def speculative(target, tok, c, f, run, *, lenience=1.0):
    """Train a draft, then decode held-out prompts with it, by prompt lookup, and plainly."""
    corpus, told, drafters = is_corpus(c.data), {}, dict(lookup=Lookup())
    held = tasks.rows(c, tok, "val")
    held = held[:-1] if corpus and len(held) > 1 else held       # a text's last window may be short
    prompts = [head(row, c, corpus) for row in held][:c.prompts]
    have = dict(target=target, tok=tok, c=c)
    if "draft" in needs(f.drafter):
        have["draft"], have["own"] = open_draft(target, tok, c, f, run)
        if "own" not in needs(f.drafter):
            said = sampled(target, held[:c.eval_rows], c, torch.Generator().manual_seed(c.seed))
            told = train_draft(have["draft"], target, tok, said, tok.vocab_size, c, f, run)
    drafters["draft" if "draft" in have else "lookup"] = f.drafter(**{x: have[x] for x in needs(f.drafter)})
    return told | race(target, drafters, prompts, c, f, run, lenience)


def train_draft(draft, target, tok, said, words, c, f, run):
    """--steps of learning, after a reference draft where --select reads one. -> agreement before and after"""
    rows = tasks.rows(c, tok, "train") if c.steps else []
    if c.rows and c.rows < len(rows):            # of a text: windows at random
        at = torch.randperm(len(rows), generator=torch.Generator().manual_seed(c.seed))[:c.rows]
        rows = [rows[i] for i in at.tolist()]
    known = remember(target, rows, c.steps * c.batch, c) if c.source == "data" else None
    before, reference = agreement(target, draft, said, c, words), None
    if c.steps and "ref" in needs(f.select):
        steps = c.ref_steps or c.steps
        plain = SimpleNamespace(**vars(f) | dict(select=every))

        def write(path):
            ref = copy.deepcopy(draft)
            ticks = tqdm(range(steps), desc="reference", disable=None, leave=False)
            teach(ref, target, None, rows, known, c, plain, run, steps, c.ref_batch, ticks, words)
            save(ref, tok, path)
        reference = load(run.stage("reference", write), c.device)[0].requires_grad_(False)
        told = agreement(target, reference, said, c, words)
        run.say(f"  reference: overlap {told['overlap']:.3f}, kl {told['kl']:.3f}")
    if run.last:
        draft.load_state_dict(load(run.last, c.device)[0].state_dict())

    def after(step, opt, g, pool, told):
        last = step in (c.steps, c.stop)
        if step % c.eval_every == 0 or last:
            told |= agreement(target, draft, said, c, words)
        run.log(step, **told, show=last)
        if step % c.save_every == 0 or last:
            run.save(step, lambda path: save(draft, tok, path), opt=opt.state_dict(), rng=g.get_state(),
                     pool=pool)
    ticks = run.steps(c.steps)
    teach(draft, target, reference, rows, known, c, f, run, c.steps, c.batch, ticks, words, after)
    told = agreement(target, draft, said, c, words)
    run.say(f"  agreement on the target's samples: overlap {before['overlap']:.3f} -> {told['overlap']:.3f}, "
            f"kl {before['kl']:.3f} -> {told['kl']:.3f}, same top token {before['same_top']:.1%} -> "
            f"{told['same_top']:.1%}")
    return told | {f"start_{k}": v for k, v in before.items()}


DECODERS = dict(speculative=speculative)
AXES = dict(decode=DECODERS, drafter=DRAFTERS, length=LENGTHS, loss=LOSSES, select=SELECT, source=SOURCES,
            kernels=kernels.MODES)

# --- 9 train ------------------------------------------------------------------------------------------


def train(c, f):
    """One run: load the target, train what helps it, decode, measure. -> the numbers of the table."""
    folder = sft.find(c.init, c.config, device=c.device, seed=c.seed)
    kernels.use(c.kernels)
    with Run(c, f, "specdec", CURVES) as run:
        if "result" in run.info:
            run.say(f"  finished already: {run.last or run.folder}")
            return run.info["result"]
        target, tok = load(folder, c.device)
        if not isinstance(target, Transformer):
            raise UserError(f"--init {c.init} is a reward model; specdec.py decodes with a language model")
        target.requires_grad_(False)
        run.say(f"{run.folder}: target {sum(p.numel() for p in target.parameters()) / 1e6:.2f} M parameters, "
                f"{c.device}")
        have = dict(target=target, tok=tok, c=c, f=f, run=run)
        told = f.decode(**{x: have[x] for x in needs(f.decode)})
        if c.stop and c.stop < c.steps:
            run.say(f"  paused at step {c.stop}: the same command with --resume, without --stop, goes on")
            return told
        return run.finish(**told)


# --- 10 claims ----------------------------------------------------------------------------------------

CELLS = {f"{name} {size}": f"{preset}draft{size}" for name, preset in (("text", ""), ("docstrings", "docs,"))
         for size in (64, 32)}
DRAFTS = {"KD": "distillspec,arena", "AdaSPEC": "adaspec,arena", "KD, 2.5x": "distillspec,arena,wide",
          "AdaSPEC, 2.5x": "adaspec,arena,wide"}
CONTROLS = {"random, 2.5x": "adaspec,arena,wide,by_chance",
            "smallest, 2.5x": "adaspec,arena,wide,smallest_gap"}
TOLD = ("draft_acceptance", "draft_efficiency", "draft_independent", "draft_speedup", "draft_predicted")


def over(part, cells, ours, theirs):
    """Tests 'ours above theirs' in each cell."""
    return {f"{part}: {cell}": {f"{cell}, {ours}": 1, f"{cell}, {theirs}": -1} for cell in cells}


CLAIMS = dict(
    adaspec=Claim(
        "A draft distilled on the tokens with most left to learn is accepted more often than one distilled "
        "on all, at the paper's budgets and at equal data",
        "2510.19779: acceptance of DistillSpec -> AdaSPEC: GSM8K 57.6 -> 62.6, CNN/DailyMail 73.1 -> 74.2, "
        "XSum 47.2 -> 49.1 % (Pythia, 3 epochs); the code gives AdaSPEC 2.5 times the data",
        {f"{cell}, {arm}": f"{presets},{config}" for cell, config in CELLS.items() for arm, presets in (
            DRAFTS | (CONTROLS if cell == "docstrings 64" else {})).items()},
        "overlap",
        over("paper's budgets", CELLS, "AdaSPEC, 2.5x", "KD")
        | over("equal data", CELLS, "AdaSPEC, 2.5x", "KD, 2.5x")
        | over("same batch", CELLS, "AdaSPEC", "KD")
        | over("selection", ["docstrings 64"], "AdaSPEC, 2.5x", "random, 2.5x")
        | over("order", ["docstrings 64"], "AdaSPEC, 2.5x", "smallest, 2.5x"),
        also=TOLD, conclude=in_parts("paper's budgets", "equal data", "same batch", "selection", "order")),
)

# --- main ---------------------------------------------------------------------------------------------


def main(argv=None):
    """python specdec.py …: see the docstring above, or --help."""
    return launch("specdec", Config, PRESETS, AXES, CLAIMS, __doc__, train, argv)


if __name__ == "__main__":
    cli(main)
