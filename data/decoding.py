"""
decoding.py - more than sampling one model: two models in turn, a look ahead, a reward for every
token, a game between two views of an answer, and a model that says whether another try would be
better.

    switching((small, large), prompt, 64, partial(ead, threshold=1.0), ...)    # two models write
    one text
    deal(prompts, expand, complete, score, {eos}, weight=4.0)                  # search with a look
    ahead
    temperature, a = guidance(1.0)                                             # a reward for every
    token
    equilibrium(generator, discriminator)                                      # the two agree on a
    ranking
    adaptive_best(p, threshold=0.9)                                            # stop when one is
    good enough

Map      1 EAD: the uncertain words to the large model   2 DeAL: beams scored by where they lead
         3 GenARM: a reward a token   4 equilibrium-ranking   5 self-evaluation and what it saves
         6 fair comparisons
Letters  P prompts, N samples each, Y candidate answers, V vocabulary, v in {correct, incorrect}
Pure functions: models, samplers and scores come in as arguments.
"""
import copy
import math
from collections import Counter
from statistics import fmean
from types import SimpleNamespace
from typing import NamedTuple

import torch
import torch.nn.functional as F

from data.judging import self_label
from data.run import Positive, UserError


def muted(model, ids):
    """The same model, whose logits never choose these ids: control tokens are read, and never
    written."""
    out, logits, ids = copy.copy(model), model.logits, torch.tensor(ids, device=model.head.device)
    out.logits = lambda hidden: logits(hidden).index_fill(-1, ids, -math.inf)
    return out


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
    columns = list(dict.fromkeys(k for row in rows.values() for k in row))
    wide = max(map(len, rows)) + 2
    run.say(f"\n  {note}\n  {'':<{wide}}" + "".join(f"{k:>{max(9, len(k) + 2)}}" for k in columns))
    for name, row in rows.items():
        run.say(f"  {name.replace('@', ' '):<{wide}}" + "".join(
            f"{f'{round(row[k], 3) + 0.0:.3f}' if k in row else '':>{max(9, len(k) + 2)}}"
            for k in columns))
    return {f"{name.partition('@')[0]}|{k}{''.join(name.partition('@')[1:])}": v
            for name, row in rows.items() for k, v in row.items()}


# --- 1 EAD: entropy adaptive decoding (2502.06833) ------------------------------------------------


def entropy_bits(logits):
    """H = -Σ p log2 p of a prediction, untempered.   [..., V] -> [...]"""
    return torch.special.entr(logits.softmax(-1)).sum(-1) / math.log(2)


def ead(seen, large, stayed, *, threshold=1.0, window=5, stay=5):
    """EAD, 2502.06833: the large model writes the next token if the mean H of the last 5 is above
    τ.

    seen: bits of every token so far, by the model that wrote it; large: who wrote the last; stayed:
    tokens since the last switch. Ours: nothing seen counts as 0 bits, so the small model begins; at
    least 5 tokens pass between two switches; τ 1 bit (to be swept). -> whether the large model
    writes"""
    if stayed < stay:
        return large
    recent = seen[-window:]
    return sum(recent) / max(1, len(recent)) > threshold


def coin(seen, large, stayed, *, share=0.5, stay=5, rng=None):
    """The control of EAD: every 5 tokens a coin that falls on the large model with probability
    `share`."""
    return large if len(seen) % stay else rng.random() < share


class Switched(NamedTuple):
    """One text by two models: its ids with the stop token, who wrote each (1: large), the bits of
    each, and how many tokens each model has read, the prompt and what it had missed included."""
    ids: list
    large: list
    bits: list
    read: list


@torch.no_grad()
def switching(models, prompt, new, choose, pick, make, stop):
    """Two models in turn write up to `new` tokens after the prompt (ids) -> Switched. Nothing is
    verified.

    models: (small, large); choose(seen, large, stayed) -> who is next; pick(logits [1, V]) -> id;
    make(model): an empty cache of one row. The idle model's cache lags behind: on its next turn it
    reads all that it has missed in one pass, the prompt too if it has never been asked."""
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


# --- 2 DeAL: decoding-time alignment (2402.06147) -------------------------------------------------


class Beam(NamedTuple):
    """A prefix: ids without the stop token, Σ log π with it, whether it has stopped, and its
    score."""
    ids: tuple = ()
    logp: float = 0.0
    finished: bool = False
    score: float = 0.0


def deal(prompts, expand, complete, score, stop, *, new=12, weight=1.0, beams=3, expansions=5):
    """DeAL, 2402.06147: heuristic search for  log π(y_1..t | x) + λ h(x, y_1..t and a look ahead).

    expand([ids]) -> log π of the next token [n, V]; complete([ids]) -> [(further ids, finished)],
    the greedy look ahead; score(i, ids, finished) -> h of a text after prompt i, -inf where it is
    forbidden. 3 beams of 5 expansions as in a public toolkit; ours: as many rounds as tokens, sums
    without a length norm. λ 0 is beam search; a `complete` that adds nothing, a beam search with a
    reward. -> the best Beam a prompt"""
    front = [[Beam()] for _ in prompts]
    for _ in range(new):
        live = [(i, b) for i, row in enumerate(front) for b in row if not b.finished]
        if not live:
            break
        logp = expand([[*prompts[i], *b.ids] for i, b in live])                          # [n, V]
        top, token = logp.topk(min(expansions, logp.size(-1)), -1)                 # [n, expansions]
        made = [(i, Beam(b.ids if t in stop else (*b.ids, t), b.logp + x, t in stop, b.logp + x))
                for (i, b), xs, ts in zip(live, top.tolist(), token.tolist())
                for x, t in zip(xs, ts) if x > -math.inf]
        if weight:  # λ 0 never looks: 0 times -inf is no number
            ahead = iter(complete([[*prompts[i], *b.ids] for i, b in made if not b.finished]))
            ends = [((), True) if b.finished else next(ahead) for _, b in made]
            made = [(i, b._replace(score=b.logp + weight * score(i, (*b.ids, *more), done)))
                    for (i, b), (more, done) in zip(made, ends)]
        pool = [[b for b in row if b.finished] for row in front]
        for i, b in made:
            pool[i].append(b)
        front = [sorted(row, key=lambda b: -b.score)[:beams] for row in pool]
    return [row[0] for row in front]


# --- 3 GenARM: a reward model that scores the next token (2410.08193) -----------------------------


def autoregressive(chosen_logp, rejected_logp, *, beta_r: Positive = 0.05):
    """GenARM, 2410.08193:  -log σ(β_r (log π_r(y+) - log π_r(y-))), sums, no reference.   [B] ->
    [B]"""
    return -F.logsigmoid(beta_r * (chosen_logp - rejected_logp))


def guided(base, arms, alphas):
    """Logits of  π(v) ∝ π_base(v) Π_i π_i(v)^α_i,  α = 1/β (2410.08193). Sample at temperature 1.

    base [..., V], arms: as many [..., V], an α each -> [..., V]. A token that the base excludes
    stays out."""
    total = base.log_softmax(-1)
    for arm, alpha in zip(arms, alphas, strict=True):
        if alpha:                                              # 0 times -inf is no number
            total = total + alpha * arm.log_softmax(-1)
    return total


def guidance(alpha):
    """(temperature, a) with which model.generate(contrast=(arm, a)) samples from π_base π_arm^α.

    generate's logits ((1 + a) l - a l_arm) / T  are  l + α l_arm  for  T = 1/(1 + α), a = -α T."""
    if alpha < 0:
        raise UserError(f"alpha {alpha}: the weight of a reward is not negative")
    return 1 / (1 + alpha), -alpha / (1 + alpha)


# --- 4 equilibrium-ranking: the consensus game (2310.09139) ---------------------------------------


def normalised(logits, dim):
    """softmax in logs; all -inf (padding alone) stays -inf."""
    total = logits.logsumexp(dim, keepdim=True)
    return logits - torch.where(total == -math.inf, torch.zeros_like(total), total)


def equilibrium(generator, discriminator, *, rounds=5000, eta=0.1, lam=0.1):
    """Equilibrium-ranking, 2310.09139: generator and discriminator play until they agree; nothing
    is trained.

    generator P(y | x, v), discriminator P(v | x, y), both [..., 2, Y], v = correct first; a
    candidate that is
    padding has generator 0 in both rows.   π_G¹(y|v) ∝ P(y|x,v) / Σ_v' P(y|x,v'),  π_D¹(v|y) ∝
    P(v|x,y) / Σ_y' P(v|x,y');  then  π_G(y|v) ∝ exp[(Q_G + λ log π_G¹) / (1/(η t) + λ)],  Q_G =
    (1/2t) Σ π_D(v|y) over the rounds so far, and the same for D.  -> π_G(y|v), π_D(v|y), both [...,
    2, Y]; rank by π_D's first."""
    if generator.shape != discriminator.shape or generator.size(-2) != 2:
        raise UserError(f"equilibrium: P(y|v) {list(generator.shape)} and P(v|y) {list(discriminator.shape)} "
                        "must both be [..., 2, Y], correct first")
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
    """What equilibrium() plays with, for the N sampled responses of one prompt.   -> answers [Y],
    two [2, Y]

    answers [N]: what each states; logp [N] of each, the sampler's; given [2, N]: log P(y|x,v);
    right [N]: P(correct|x,y). Ours: a candidate is a distinct answer a, with P(a|x,v) = (1/N) Σ_{i:
    a} P(y_i|x,v) / P(y_i|x), an unbiased estimate as y_i is drawn from P(y|x), and P(v|x,a) of its
    most convincing response: a mean would hold it against an answer that it was also guessed."""
    names = list(dict.fromkeys(answers))
    member = torch.tensor([[a == name for a in answers] for name in names],
                          dtype=logp.dtype)                                                 # [Y, N]
    generator = (given - logp).exp() @ member.T / len(answers)                           # [2, Y]
    p = (member * right).amax(1)                                                         # [Y]
    return names, generator, torch.stack([p, 1 - p])


# --- 5 self-evaluation: can I do better? (2410.02725) ---------------------------------------------
# The policy answers one control token, ASK, after (part of) a response: NO, no restart is better,
# or YES.


def rival_label(score):
    """How often a sample is at least as good as another of its prompt, a tie half.   score [P, N]
    -> [P, N]

    The paper labels a sample by one rival; ours is the mean over all N - 1 others, which has less
    noise."""
    if score.size(1) < 2:
        raise UserError("--samples 1: a sample is judged against others of its prompt; take at least 2")
    same = self_label(score[:, :, None], score[:, None])                                 # [P, N, N]
    return (same.sum(-1) - 0.5) / (score.size(1) - 1)          # a sample ties with itself


def self_eval_loss(logits, label):
    """Cross-entropy of the answer to ASK with soft labels:  -l log p - (1-l) log(1-p).   [B, 2],
    [B] -> [B]

    logits of (NO, YES), label: the chance that no restart is better. Ours: p is normalised over the
    two."""
    logp = logits.log_softmax(-1)
    return -label * logp[:, 0] - (1 - label) * logp[:, 1]


def cut_points(length, u):
    """Where a response of `length` tokens is cut for a label amid generation, uniform in 1..length,
    by u in
    [0, 1); the label stays that of the whole response.   [B], [B] -> [B]"""
    return (u * length).long() + 1


def adaptive_best(p, *, threshold=0.98):
    """Adaptive best-of-N: sample until one is good enough, max p >= threshold, or all N are spent.

    p [P, N] in the order of sampling -> (the argmax of what was sampled [P], samples used [P]).
    Threshold 0 is one sample, above 1 plain best-of-N. 0.98 is the paper's style, and depends on
    the policy: sweep it."""
    best = p.cummax(1).values                                                            # [P, N]
    used = 1 + (best < threshold)[:, :-1].sum(1)                                         # [P]
    late = torch.arange(p.size(1), device=p.device) >= used[:, None]
    return p.masked_fill(late, -math.inf).argmax(1), used


def annealed(k):
    """Temperature of the k-th sample, from 1: 1 - 2^-(k-1), so the first is greedy and later ones
    explore."""
    return 1 - 2.0 ** -(k - 1)


def survivors(p, *, keep=0.5):
    """Pruning amid generation: the ⌈keep N⌉ samples of highest p go on; ties by order.   [P, N] ->
    bool"""
    if not 0 < keep <= 1:
        raise UserError(f"--share {keep}: a share of the samples, above 0 and up to 1")
    best = p.argsort(dim=1, descending=True, stable=True)[:, :math.ceil(keep * p.size(1) - 1e-9)]
    return torch.zeros_like(p, dtype=torch.bool).scatter(1, best, True)


def pruned_tokens(length, cut, alive):
    """Tokens that pruning at `cut` costs: all are written up to there, the survivors to their end.
    length, alive [P, N] -> [P]"""
    return (length.clamp(max=cut) + (length - cut).clamp(min=0) * alive).sum(1)


def vote(answers, weights=None):
    """The answer of the largest total weight (1 each: majority vote); ties by first appearance; ""
    only if nothing else was stated."""
    total = Counter()
    for a, w in zip(answers, weights or [1.0] * len(answers)):
        total[a] += w
    return max(total, key=lambda a: (a != "", total[a]))


def controls(model, tok):
    """The ids of six control tokens, right wrong check ask no yes, on rows of the embedding that no
    token of the tokenizer uses. UserError where there are too few."""
    names = ("right", "wrong", "check", "ask", "no", "yes")
    if model.config.vocab_size - tok.vocab_size < len(names):
        raise UserError(f"{len(names)} control tokens need as many unused rows of the embedding; this model "
                        f"has {model.config.vocab_size - tok.vocab_size}: take --init base:chain")
    return SimpleNamespace(**{name: tok.vocab_size + i for i, name in enumerate(names)})


def answered(ids, model, tokens, mask):
    """Logits of (NO, YES) after ASK and of (RIGHT, WRONG) after CHECK, each row's last two tokens
    (by the
    mask [B, T]): what the policy says of the text before.   tokens [B, T] -> [2, B, 2]"""
    last = (mask.cumsum(1) * mask).argmax(1)                                             # [B]
    row = torch.arange(len(tokens), device=tokens.device)[None]
    logits = model.logits(model(tokens)[row, torch.stack([last - 1, last])])             # [2, B, V]
    return torch.stack([logits[0][:, [ids.no, ids.yes]], logits[1][:, [ids.right, ids.wrong]]])


# --- 6 fair comparisons: the same samples begun at every place, controls at the same cost ---------


def adaptive_value(p, score, *, threshold):
    """adaptive_best over all places to begin.   p, score [P, N] -> (mean score, mean samples
    used)"""
    turns = [(*adaptive_best(p.roll(k, 1), threshold=threshold), score.roll(k, 1))
             for k in range(p.size(1))]
    return (fmean(r.gather(1, pick[:, None]).mean().item() for pick, _, r in turns),
            fmean(used.float().mean().item() for _, used, _ in turns))


def voted(answers, score, n, weights=None):
    """Mean score of the answer that n samples vote for, over all places to begin.   answers [P][N]
    of strings, score and weights [P, N]; equal answers have equal scores"""
    N, out = score.size(1), []
    weights = torch.ones_like(score) if weights is None else weights
    for a, w, r in zip(answers, weights.tolist(), score.tolist()):
        for k in range(N if n < N else 1):
            at = [(k + i) % N for i in range(n)]
            best = vote([a[i] for i in at], [w[i] for i in at])
            out.append(next(r[i] for i in at if a[i] == best))
    return fmean(out)


def at_cost(costs, values, cost):
    """The value at a cost between two measured ones, by a straight line; beyond the ends, the
    end's."""
    points = sorted(zip(costs, values))
    for (x0, y0), (x1, y1) in zip(points, points[1:]):
        if x0 <= cost <= x1:
            return y0 + (y1 - y0) * (cost - x0) / max(x1 - x0, 1e-9)
    return points[0][1] if cost < points[0][0] else points[-1][1]
