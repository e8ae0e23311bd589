"""
sources.py - where the rows of a preference loss come from: data, annotators, and the policy against
itself.

    rows = SOURCES["ranked"](s, problems)      # [{"prompt": ids, "sides": [ids], …what a loss
    reads}]

s is dpo.py's state of a run: sample(problems, k) and compare(problems, groups) make responses and a
judge's P[i, j] of them; data are the encoded pairs, world a world of prefs.py or None, f and c the
run's settings. A response is {"ids": EOS where it ended by itself, "text", "finished"}.
"""
import math
from functools import partial
from typing import Literal

import torch

from data.judging import rewards_of
from data.prefs import Ring
from data.run import Count, Positive, Range, Share, UserError, batch_indices, needs
from data.search import grow_trees, step_pairs


def demo(s, problem):
    """The problem's demonstration, as sample() gives responses."""
    if s.world is None:
        raise UserError(f"--source {s.c.source} needs demonstrations: take a world, --data ring or toyif")
    text = s.world.demo(problem)
    return dict(ids=[*s.tok.encode(text), s.tok.eos], text=text, finished=True)


def row(s, problem, sides, **fields):
    """One row of responses as ids."""
    return dict(prompt=s.tok.prompt(problem["prompt"], s.c.chat), sides=[y["ids"] for y in sides],
                **fields)


def texts_of(r):
    """An encoded pair's problem and its two responses, as sample() gives them."""
    return dict(prompt=r["text"]["prompt"]), [
        dict(ids=r[side], text=r["text"][side], finished=r["text"].get(f"{side}_finished", True))
        for side in ("chosen", "rejected")]


def take(s, n):
    """The next n encoded pairs of the data, in an order of their own."""
    picked = batch_indices(len(s.data), n, s.taken, s.c.seed + 7).tolist()
    s.taken += 1
    return [s.data[i] for i in picked]


def pairs(s, problems, *, shuffled=False):
    """The data's own pairs; where a loss reads `margin`, it is the judge's log-odds; shuffled:
    another's."""
    rows = [dict(prompt=r["prompt"], sides=[r["chosen"], r["rejected"]], text=r["text"])
            for r in s.data]
    if "margin" in needs(s.f.loss):
        where, groups = zip(*map(texts_of, s.data))
        for r, P in zip(rows, s.compare(where, groups)):
            r["margin"] = torch.logit(P[0, 1], eps=1e-9).item()
        if shuffled:  # a control: is it the information that helps?
            order = torch.randperm(len(rows), generator=s.g).tolist()
            for r, x in zip(rows, [rows[i]["margin"] for i in order]):
                r["margin"] = x
    return rows


def signs(s, problems, *, groups: Literal["A", "B", "AB", "BA"] = "AB"):
    """Ring's pairs with what each group of annotators prefers: 1 the chosen, -1 the rejected one, 0
    none."""
    if not isinstance(s.world, Ring):
        raise UserError("--source signs: only Ring has groups of annotators; take --data ring")
    out = []
    for r in s.data:
        problem, sides = texts_of(r)
        gold = [[s.world.judge(problem["prompt"], y["text"], y["finished"], g)["gold"]
                 for y in sides]
                for g in groups]
        out.append(row(s, problem, sides, signs=[float((a > b) - (a < b)) for a, b in gold]))
    return out


def labels(s, problems):
    """Binary feedback: a file's labelled responses, or both sides of the pairs, each for itself."""
    if s.labels:
        return s.labels
    return [dict(prompt=r["prompt"], sides=[r[side]], good=float(side == "chosen"))
            for r in s.data for side in ("chosen", "rejected")]


def forget(s, problems, *, key="a"):
    """Demonstrations, to be forgotten (good 0) where the prompt holds `key`, else retained (good
    1)."""
    rows = [row(s, p, [demo(s, p)], good=float(key not in p["prompt"])) for p in problems]
    if len({r["good"] for r in rows}) < 2:
        raise UserError(f"--key {key}: it is in all prompts or in none: nothing to forget or to keep")
    return rows


def judged(s, problems, groups, choose):
    """Rows of what choose(P) picks from each problem's responses: (indices of the sides, fields),
    or None."""
    picks = map(choose, s.compare(problems, groups))
    return [row(s, p, [ys[i] for i in pick[0]], **pick[1])
            for p, ys, pick in zip(problems, groups, picks) if pick]


def extremes(P, least=0.0):
    """The best and the worst by mean win rate, against all with themselves at a half (SPPO,
    DNO)."""
    win = P.mean(1)
    a, b = win.argmax().item(), win.argmin().item()
    if win[a] - win[b] >= least:
        return (a, b), dict(chosen_win=win[a].item(), rejected_win=win[b].item())


def coin(s, *further):
    """The first two, the winner drawn with the judge's probability; then further ones by index."""
    def choose(P):
        first = torch.rand((), generator=s.g).item() < P[0, 1]
        return ((0, 1) if first else (1, 0)) + further, {}
    return choose


def lists(s, problems, *, k: Range("[2, inf)") = 4):
    """k samples a prompt, best first, with their mean win rates as labels: for the losses over
    lists."""
    def choose(P):
        order = P.mean(1).argsort(descending=True, stable=True)
        return order.tolist(), dict(labels=P.mean(1)[order].tolist())
    return judged(s, problems, s.sample(problems, k), choose)


def duels(s, problems):
    """Two samples a prompt, the label drawn from the judge's probability (online DPO, INPO)."""
    return judged(s, problems, s.sample(problems, 2), coin(s))


def ranked(s, problems, *, k: Range("[2, inf)") = 5):
    """SPPO: the best and the worst of k samples, with their win rates."""
    return judged(s, problems, s.sample(problems, k), extremes)


def dno_pairs(s, problems, *, k: Range("[2, inf)") = 5, least=0.2):
    """DNO-Prct: best against worst of k samples and the demonstration, if win rates differ by
    `least`.

    ours: the threshold, and that earlier iterations' pairs are not mixed in."""
    groups = [[*ys, demo(s, p)] for p, ys in zip(problems, s.sample(problems, k))]
    rows = judged(s, problems, groups, partial(extremes, least=least))
    s.seen["close"] += len(problems) - len(rows)
    return rows


def accepted(reward, k, beta, generator, passes=0):
    """RSO's rejection sampling, 2309.06657 alg. 1: indices of k of the candidates.   reward [N]

    Passes over the rest: each is accepted with probability exp((r - max of the rest)/β), and
    leaves; the maximum is taken anew before every pass. β -> 0 takes the best in order, β -> ∞
    takes the first ones. passes: stop after so many (0: when there are k); in the first the rest is
    all, so that it is exact.
    """
    rest, out, done = list(range(len(reward))), [], 0
    while rest and len(out) < k and (done < passes or not passes):
        done += 1
        top = max(reward[i] for i in rest)
        u = torch.rand(len(rest), generator=generator).tolist()
        hit = [i for i, x in zip(rest, u) if x < math.exp((reward[i] - top) / beta)]
        out, rest = out + hit, [i for i in rest if i not in hit]
    return out[:k]


def rso(s, problems, *, n: Range("[2, inf)") = 16,
        k: Range("[2, inf)") = 4, beta_rso: Positive = 0.5):
    """RSO: k of the start's n samples accepted in proportion to e^(r/β), paired at random, then
    judged."""
    groups, out = s.sample(problems, n, model=s.models.get("start")), []
    for p, ys, P in zip(problems, groups, s.compare(problems, groups)):
        kept = accepted(rewards_of(P).tolist(), k, beta_rso, s.g)
        kept = [kept[i] for i in torch.randperm(len(kept), generator=s.g)]
        out += [row(s, p, [ys[a], ys[b]] if P[a, b] > 0.5 else [ys[b], ys[a]])
                for a, b in zip(kept[::2], kept[1::2])]
    return out


def spin(s, problems):
    """SPIN: the demonstration is chosen, the last iterate's sample rejected: no judge.

    ours: samples of the iterate before are not mixed in."""
    return [row(s, p, [demo(s, p), y]) for p, (y,) in zip(problems, s.sample(problems))]


def wins(s, problems, ours, theirs):
    """Single rows of our samples with their probability of beating theirs."""
    groups = [[a, b] for (a,), (b,) in zip(ours, theirs)]
    return judged(s, problems, groups, lambda P: ((0,), dict(win=P[0, 1].item())))


def mixture(s, problems, *, kappa: Share = 0.5):
    """Nash-MD: y of the policy against y' of its token-wise mixture π^(1-κ) π_ref^κ; κ = 0 is
    self-play."""
    theirs = s.sample(problems, contrast=(s.models["start"], -kappa))
    return wins(s, problems, s.sample(problems), theirs)


def prox(s, problems, *, inner: Count = 4):
    """Nash-MP: `inner` policy-gradient steps against π_k, then as many against π_(k+½), both near
    π_k."""
    phase = s.stage % (2 * inner)
    if phase == 0:
        s.models["prev"] = s.copy()
    if phase in (0, inner):
        s.models["opponent"] = s.copy()
    return wins(s, problems, s.sample(problems), s.sample(problems, model=s.models["opponent"]))


def explore(s, problems):
    """XPO: a sample of the policy against one of the reference, ỹ, which is the row's third side
    too."""
    both = zip(s.sample(problems), s.sample(problems, model=s.models["start"]))
    return judged(s, problems, [[a, b] for (a,), (b,) in both], coin(s, 1))


def selm_pairs(s, problems):
    """SELM: best and worst of the data's pair and the last iterate's greedy response, the third
    side too."""
    where, groups = zip(*map(texts_of, take(s, len(problems))))
    groups = [[*ys, y] for ys, (y,) in zip(groups, s.sample(where, temperature=0.0))]
    return judged(s, where, groups, lambda P: ((*extremes(P)[0], 2), {}))


def hybrid(s, problems, *, k: Range("[2, inf)") = 2):
    """HyPO: the data's pairs, and k samples of the policy for the online KL."""
    if k < 2:
        raise UserError(f"--k {k}: HyPO's leave-one-out needs 2 samples a prompt")
    where, groups = zip(*map(texts_of, take(s, len(problems))))
    return [row(s, p, [*ys, *more]) for p, ys, more in zip(where, groups, s.sample(where, k))]


def mpo_rows(s, problems, *, easy: Share = 0.5):
    """MPO: half of the run, the share `easy` of the pairs, those of the largest margin; then two
    samples each of the other pairs' prompts and the judge's log-odds, near the model that DPO has
    made."""
    if not s.margins:
        s.margins = [abs(torch.logit(P[0, 1], eps=1e-9).item())
                     for P in s.compare(*zip(*map(texts_of, s.data)))]
    order = sorted(range(len(s.data)), key=lambda i: -s.margins[i])
    cut = round(easy * len(order))  # 0: policy gradients alone; all: DPO alone
    hard = cut == 0 or cut < len(order) and s.step >= s.c.steps // 2
    pool = [s.data[i] for i in (order[cut:] if hard else order[:cut])]
    picked = [pool[i] for i in batch_indices(len(pool), len(problems), s.stage, s.c.seed).tolist()]
    where, groups = zip(*map(texts_of, picked))
    if hard:
        s.models["after_dpo"] = s.models.get("after_dpo") or s.copy()
        groups = s.sample(where, 2)
    return judged(s, where, groups, lambda P: ((0, 1), dict(
        hard=float(hard), gain=torch.logit(P[0, 1], eps=1e-9).item() if hard else 0.0)))


def tree(s, problems, *, iterations: Count = 8,
         children: Range("[2, inf)") = 3, chunk: Count = 4, depth: Count = 4):
    """MCTS-DPO: pairs of steps from a search tree a prompt (data/search.py); a shared prefix
    cancels in h."""
    if s.world is None:
        raise UserError(f"--source tree: {s.c.data} has no verifier; take a world, --data ring or toyif")

    def value(i, ids, done):
        return s.world.reward(problems[i], s.tok.decode(ids[:-1] if done else ids), done)
    prompts = [s.tok.prompt(p["prompt"], s.c.chat) for p in problems]
    trees = grow_trees(prompts, s.extend, value, s.max_new, iterations=iterations,
                       children=children,
                       chunk=chunk, depth=depth)
    return [dict(prompt=prompt + prefix, sides=[a, b]) for prompt, root in zip(prompts, trees)
            for prefix, a, b in step_pairs(root)]


def per_prompt(source):
    """How many rows a source makes of one prompt: RSO pairs what it accepts."""
    return max(1, source.keywords["k"] // 2) if source.func is rso else 1


SOURCES = dict(pairs=pairs, signs=signs, labels=labels, forget=forget, lists=lists, duels=duels,
               ranked=ranked, rso=rso, spin=spin, dno=dno_pairs, mixture=mixture, prox=prox,
               explore=explore, selm=selm_pairs, hybrid=hybrid, mpo=mpo_rows, tree=tree)
STATIC = ("pairs", "signs", "labels", "forget")  # their rows are made once, before the first step
SHOWN = ("forget", "dno", "spin", "tree")  # they read a world's demonstrations or verifier
