"""What reaches dpo.py's functions in its own runs, beside the same quantity computed apart: by
plain forward passes of the models as they were, from ids, texts and the world's gold. The policy is
moved away from its reference before the first step, so that no two models are equal."""
import copy
import json
import math
from collections import Counter
from functools import cache, partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import close, merged
from torch.nn.functional import logsigmoid
from wiring import catch

import dpo
import optim
from data import prefs
from data.run import UserError, hyper, needs, read_log
from model import Rollout, ScalarModel, init, load, preset, save

D = partial(torch.tensor, dtype=torch.float64)
RING = prefs.Ring()
WORLDS = dict(ring=RING, toyif=prefs.ToyIF())


@pytest.fixture(autouse=True)
def own_cache(monkeypatch, tmp_path_factory):
    """Reference log-probs of tests go to a folder that pytest clears, not to data/cache."""
    monkeypatch.setattr(dpo, "CACHE", tmp_path_factory.getbasetemp() / "cache")


# --- a run that is watched ------------------------------------------------------------------------


class Watched:
    """A run of a few steps: what its functions got and gave, and the policy as it was then.

    makings: rows made, with the policy that made them; steps, with their batch; evaluations."""

    scorers = ()                                       # the models of a judge, beside gold

    def __init__(self, monkeypatch, *argv):
        self.makings, self.evaluations, self.steps = [], [], []
        self.now, self.patch, opened = None, monkeypatch, dpo.open_models

        def unequal(c, f, origin, run):
            self.c, self.f, self.init = c, f, dpo.initial(c, f)
            self.policy, tok, self.models = opened(c, f, origin, run)
            moved_apart(self.policy)
            return self.policy, tok, self.models
        monkeypatch.setattr(dpo, "open_models", unequal)
        self.around(vars(dpo), "make_rows", self.making)
        self.around(vars(dpo), "evaluate", self.evaluating)
        self.around(vars(dpo), "compare", self.comparing)
        self.around(vars(dpo), "backward", self.stepping)
        self.around(dpo.BACKWARD, "objectives", self.stepping)
        self.losses = catch(monkeypatch, dpo, "LOSSES", see=self.within)
        self.statistics = catch(monkeypatch, dpo, "STATISTICS")
        self.combined = catch(monkeypatch, optim, "COMBINE")
        self.other = catch(monkeypatch, dpo, "generate", "clip_gradients", "sample", "accepted",
                           "grow_trees", "step_pairs", see=self.within)
        self.result = dpo.main(merged(*argv))
        self.start, self.tok = load(self.init)
        self.rows = read_log("run")

    def around(self, table, name, see):
        """table[name] notes its result in what see(its arguments) gives, called before it."""
        real = table[name]

        def watched(*args, **kw):
            note = see(*args, **kw)
            note.out = real(*args, **kw)
            return note.out
        self.patch.setitem(table, name, watched)

    def moment(self, **what):
        """The policy as it is, and what will be seen until the next moment."""
        self.now = SimpleNamespace(policy=copy.deepcopy(self.policy), generate=[], compare=[],
                                   loss=[], **what)
        return self.now

    def making(self, c, f, known):
        self.makings.append(self.moment(stage=known["stage"], step=known["step"]))
        return self.now

    def evaluating(self, c, f, known, sets, before):
        self.evaluations.append(self.moment(sets=sets, before=before))
        return self.now

    def comparing(self, f, known, problems, groups):
        self.now.compare.append(SimpleNamespace(problems=problems, groups=groups))
        return self.now.compare[-1]

    def stepping(self, c, f, known, batch, metrics):
        self.steps.append(self.moment(batch=batch, made=self.makings[-1], step=known["step"]))
        return self.now

    def within(self, name, call):
        """A call of a moment: kept there, under its own name or as `loss`."""
        if name == "clip_gradients":
            self.now.grads = [p.grad.clone() for p in self.policy.parameters()]
        if name == "generate":
            call.weights = {key: p.clone() for key, p in call.model.state_dict().items()}
        which = "loss" if name in dpo.LOSSES else name
        setattr(self.now, which, [*getattr(self.now, which, []), call])


def moved_apart(model, seed=1):
    """The model, every weight moved a little."""
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.05 * p.abs().mean() * torch.randn(p.shape, generator=g))
    return model


# --- computed apart: models, texts, gold ----------------------------------------------------------


def states(model, rows):
    """The hidden state that each token behind the prompt is predicted from.   -> [n, D] a row"""
    width = max(len(p) + len(y) for p, y in rows)
    tokens = torch.tensor([[*p, *y] + [0] * (width - len(p) - len(y)) for p, y in rows])
    return [h[len(p) - 1:len(p) + len(y) - 1] for (p, y), h in zip(rows, model(tokens))]


def laws(model, rows):
    """The log-probs of all tokens there.   -> [n, V] a row"""
    return [torch.log_softmax(h @ model.head.T, -1) for h in states(model, rows)]


def logs(model, rows):
    """log π of each token of the rows (prompt, ids).   -> [n] a row"""
    return [law.gather(1, torch.tensor(y)[:, None])[:, 0]
            for (_, y), law in zip(rows, laws(model, rows))]


def text_of(x, ids):
    return x.tok.decode([i for i in ids if i not in (x.tok.eos, x.tok.bos)])


def gold_of(x, prompt, ids, group="A"):
    """A response's gold reward; it ended by itself if it ends in EOS."""
    group = dict(group=group) if x.c.data == "ring" else {}
    return WORLDS[x.c.data].judge(text_of(x, prompt), text_of(x, ids), ids[-1:] == [x.tok.eos],
                                  **group)["gold"]


def preferred(golds, sharp=1.0):
    """Bradley-Terry, P that i is preferred to j.   [K] -> [K, K]"""
    return [[1 / (1 + math.exp(-max(-700, sharp * (a - b)))) for b in golds] for a in golds]


def wins(golds):
    """Mean win rates against all, oneself at a half."""
    return [sum(own) / len(own) for own in preferred(golds)]


def samples(x, call):
    """What generate gave for each prompt, cut after the first EOS.   -> [[ids]] a prompt"""
    k, out = call.samples, []
    for i, tokens in enumerate(call.out.tokens.tolist()):
        ids = tokens[len(call.prompts[i // k]):][:call.max_new_tokens]
        out.append(ids[:ids.index(x.tok.eos) + 1] if x.tok.eos in ids else ids)
    return [out[i:i + k] for i in range(0, len(out), k)]


def encoded(x, text):
    return [*x.tok.encode(text), x.tok.eos]


@cache
def world_pairs(world, noise, n=64, seed=1000, split="train"):
    return WORLDS[world].pairs(n, seed, split, noise=noise)


@cache
def train_problems():
    return RING.problems("train", 4096, 1000)


def data_pairs(x, *which):
    """The world's pairs as ids.   -> [(prompt, chosen, rejected)]"""
    return [(x.tok.prompt(r["prompt"]), encoded(x, r["chosen"]), encoded(x, r["rejected"]))
            for r in world_pairs(x.c.data, 0.0 if which else x.c.noise, *which)]


# --- what a loss reads, by the names of its arguments ---------------------------------------------


def reference(x, step):
    """The model that log-ratios are against."""
    late = [m for m in x.makings if m.step >= x.c.steps // 2 and m.step <= step.step]
    return dict(start=x.start, previous=step.made.policy,
                handover=late[0].policy if late else x.start)[x.c.anchor]


def iterate(x, step):
    """Nash-MP's π_k: the policy as it was when its phases began."""
    inner = x.f.source.keywords["inner"]
    return x.makings[step.made.stage - step.made.stage % (2 * inner)].policy


MODELS = dict(pi=lambda x, s: s.policy, ref=reference, maker=lambda x, s: s.made.policy,
              iterate=iterate, start=lambda x, s: x.start)


class Side:
    """A side of a row, in a step's facts: its ids, its tokens' log-probs by each model."""

    def __init__(self, facts, row, i):
        self.facts, self.x, self.row, self.i = facts, facts.x, row, i
        self.prompt, self.ids = row["prompt"], row["sides"][i]

    def __getattr__(self, name):
        return self.facts.logs(name)[id(self.row), self.i]


def credit(v):
    """What each token adds to gold, or T-REG's two prompts; squashed to (-½, ½)."""
    if v.x.c.source == "prompted":
        a, b = (logs(v.x.start, [(v.x.tok.prompt(text + text_of(v.x, v.prompt)), v.ids)])[0]
                for text in ("ab", "xw"))
        return torch.sigmoid(a - b) - 0.5
    gold = [RING.judge(text_of(v.x, v.prompt), text_of(v.x, v.ids[:i]))["gold"]
            for i in range(len(v.ids) + 1)]
    return torch.tensor([1 / (1 + math.exp(a - b)) - 0.5 for a, b in zip(gold, gold[1:])])


def weight(v):
    """The mean of the start's hidden state, stretched to [0, 1] in the response."""
    a = states(v.x.start, [(v.prompt, v.ids)])[0].mean(-1)
    return (a - a.min()) / (a.max() - a.min())


def divergence(v):
    """KL(π_ref||π) of each token's law."""
    ref, own = (laws(m, [(v.prompt, v.ids)])[0] for m in (v.x.start, v.facts.step.policy))
    return (ref.exp() * (ref - own)).sum(-1)


TOKENS = dict(logps=lambda v: v.pi, mask=lambda v: torch.ones(len(v.ids)), credit=credit,
              delta=lambda v: v.pi - v.ref, weight=weight, kl=divergence,
              eos=lambda v: torch.tensor([float(i == v.x.tok.eos) for i in v.ids]))
SUMS = dict(logp=lambda v: v.pi.sum(), len=lambda v: torch.tensor(float(len(v.ids))),
            mean=lambda v: v.pi.mean(), ratio=lambda v: (v.pi - v.ref).sum(),
            prev_ratio=lambda v: (v.pi - v.maker).sum(),
            iterate_ratio=lambda v: (v.pi - v.iterate).sum())


def margins(x, step):
    return [gold_of(x, r["prompt"], r["sides"][0]) - gold_of(x, r["prompt"], r["sides"][1])
            for r in step.batch]


def signs(x, step):
    """1 where a group prefers the chosen response, -1 the rejected one, group after group."""
    gaps = [[gold_of(x, r["prompt"], r["sides"][0], g) - gold_of(x, r["prompt"], r["sides"][1], g)
             for g in x.f.source.keywords["groups"]] for r in step.batch]
    return [[float(a > 0) - float(a < 0) for a in own] for own in gaps]


def good(x, step):
    """Of pairs: which side it was; of demonstrations: those without the key."""
    if x.c.source == "forget":
        return [float("k" not in text_of(x, r["prompt"])) for r in step.batch]
    chosen = {(*p, *y) for p, y, _ in data_pairs(x)}
    return [float((*r["prompt"], *r["sides"][0]) in chosen) for r in step.batch]


def rates(x, step):
    return [wins([gold_of(x, r["prompt"], y) for y in r["sides"]]) for r in step.batch]


def group_win(i, x, step):
    """The win rate of a row's i-th side among all responses that it was chosen from."""
    groups = {tuple(p): ys for p, ys in groups_of(x, step.made)}
    out = []
    for r in step.batch:
        ys = groups[tuple(r["prompt"])]
        out.append(wins([gold_of(x, r["prompt"], y) for y in ys])[ys.index(r["sides"][i])])
    return out


def win(x, step):
    """P(y > y') of a sample against its opponent's."""
    first, second = (samples(x, call) for call in step.made.generate)
    ours, theirs = (second, first) if x.c.source == "mixture" else (first, second)
    prompts = list(map(tuple, step.made.generate[0].prompts))
    out = []
    for r in step.batch:
        i = prompts.index(tuple(r["prompt"]))
        assert ours[i] == r["sides"]
        out.append(preferred([gold_of(x, r["prompt"], y) for y in (*ours[i], *theirs[i])])[0][1])
    return out


def mismatched(x, step):
    """The mean log-ratio of prompts with the response of the row before, every row's."""
    rows = [(r["prompt"], step.batch[i - 1]["sides"][0]) for i, r in enumerate(step.batch)]
    with torch.no_grad():
        both = zip(logs(step.policy, rows), logs(x.start, rows))
        return [sum((a - b).sum().item() for a, b in both) / len(rows)] * len(rows)


def reward_shift(x, step):
    """The moving average of ½ (mean β d of the good and of the others)."""
    now = None
    for s in x.steps[:x.steps.index(step) + 1]:
        d, which = Facts(x, s)["ratio"].detach(), torch.tensor(good(x, s)) > 0
        shift = sum(0.1 * d[w].mean().item() for w in (which, ~which) if w.any()) / len(
            {*which.tolist()})
        now = shift if now is None else 0.99 * now + 0.01 * shift
    return [now] * len(step.batch)


def beta_now(x, step):
    """β by the mean gap of the kept pairs over the running mean."""
    now = None
    for s in x.steps[:x.steps.index(step) + 1]:
        gap = (Facts(x, s)["chosen_ratio"] - Facts(x, s)["rejected_ratio"]).detach()
        now = gap.mean() if now is None else 0.9 * now + 0.1 * gap.mean()
    mine = gap[torch.tensor([r["kept"] for r in step.batch]) > 0].mean()
    return [max(1e-3, 0.1 * (1 + 0.6 * (mine - now).item()))] * len(step.batch)


def kept(x, step):
    """Six of eight, weighted so that the mean over the step is theirs."""
    own = [r["kept"] > 0 for r in step.batch]
    assert sum(own) == 6
    return [8 / 6 if k else 0.0 for k in own]


FIELDS = dict(margin=margins, gain=margins, signs=signs, good=good, rates=rates, win=win,
              chosen_win=partial(group_win, 0), rejected_win=partial(group_win, 1),
              hard=lambda x, s: [float(s.step >= x.c.steps // 2)] * len(s.batch),
              z0=lambda x, s: [max(0, z) for z in mismatched(x, s)], mismatched=mismatched,
              reward_shift=reward_shift, beta_now=beta_now, kept=kept)


class Facts:
    """What should reach a step's loss, by name: [B], [B, K], or [B, T] of what is a token's."""
    side = dict(chosen=0, rejected=1, other=2)

    def __init__(self, x, step):
        self.x, self.step, self.known = x, step, {}
        self.flat = [(r, i) for r in step.batch for i in range(len(r["sides"]))]

    def logs(self, which):
        """{(row, side): log π of its tokens} by a model; a gradient reaches the policy alone."""
        if which not in self.known:
            rows = [(r["prompt"], r["sides"][i]) for r, i in self.flat]
            with torch.set_grad_enabled(which == "pi"):
                found = logs(MODELS[which](self.x, self.step), rows)
            self.known[which] = {(id(r), i): own for (r, i), own in zip(self.flat, found)}
        return self.known[which]

    def spread(self, sides, values):
        """A number for each token, where it stands behind its prompt.   -> [B, T]"""
        out = torch.zeros(len(sides), max(len(r["prompt"]) + len(r["sides"][i])
                                          for r, i in self.flat))
        return torch.stack([row.index_add(0, torch.arange(len(v.ids)) + len(v.prompt), own)
                            for row, v, own in zip(out, sides, values)])

    def __getitem__(self, name):
        head, _, tail = name.partition("_")
        if name in FIELDS:
            return torch.tensor(FIELDS[name](self.x, self.step))
        if head == "list":
            values = [SUMS[tail](Side(self, r, i)) for r, i in self.flat]
            return torch.stack(values).view(len(self.step.batch), -1)
        i, what = (self.side[head], tail) if head in self.side else (0, name)
        sides = [Side(self, r, i) for r in self.step.batch]
        if what in TOKENS:
            return self.spread(sides, [TOKENS[what](v) for v in sides])
        return torch.stack([SUMS[what](v) for v in sides])


# --- what a source should make --------------------------------------------------------------------


def groups_of(x, made):
    """The prompts of a source's first samples with all responses that are compared."""
    call = made.generate[0]
    groups = samples(x, call)
    if x.c.source == "dno":
        groups = [[*ys, demo] for demo, ys in zip(demos_of(x, made), groups)]
    return list(zip(call.prompts, groups))


def demos_of(x, made):
    """The demonstrations of the problems that were sampled."""
    return [encoded(x, RING.demo(p)) for p in made.sample[0].problems]


def spin(x, made):
    """A problem's demonstration before its sample."""
    return [(p, [demo, y]) for demo, (p, (y,)) in zip(demos_of(x, made), groups_of(x, made))]


def best_and_worst(x, made):
    """Of each prompt's responses, if their win rates are so far apart as is asked."""
    out, least = [], x.f.source.keywords.get("least", 0.0)
    for p, ys in groups_of(x, made):
        rate = wins([gold_of(x, p, y) for y in ys])
        a, b = rate.index(max(rate)), rate.index(min(rate))
        if rate[a] - rate[b] >= least:
            out.append((p, [ys[a], ys[b]]))
    return out


def by_gold(x, made):
    """Two samples, that of more gold first (with a very sharp judge)."""
    return [(p, sorted(ys, key=lambda y: -gold_of(x, p, y))) for p, ys in groups_of(x, made)]


def ranked_lists(x, made):
    return [(p, sorted(ys, key=lambda y: -gold_of(x, p, y))) for p, ys in groups_of(x, made)]


def paired(x, made):
    """The prompts of two calls, with the sample of each."""
    first, second = made.generate
    assert first.prompts == second.prompts
    return [(p, a, b) for p, (a,), (b,) in zip(first.prompts, samples(x, first),
                                               samples(x, second))]


def explored(x, made):
    """The policy's sample and the start's, by gold, and the start's again."""
    return [(p, [*sorted((a, b), key=lambda y: -gold_of(x, p, y)), b])
            for p, a, b in paired(x, made)]


def with_data(x, made):
    """The pair of the data that each of a call's prompts belongs to, and the prompt's samples."""
    call, pairs = made.generate[0], {}
    for p, *ys in data_pairs(x):
        pairs.setdefault(tuple(p), []).extend(ys)
    return [(p, pairs[tuple(p)], ys) for p, ys in zip(call.prompts, samples(x, call))]


def selm(x, made):
    """Best and worst of the pair and the greedy response, which is the third side."""
    out = []
    for p, pair, (greedy,) in with_data(x, made):
        rate = wins([gold_of(x, p, y) for y in (*pair, greedy)])
        a, b = ([*pair, greedy][rate.index(pick(rate))] for pick in (max, min))
        out.append((p, [a, b, greedy]))
    return out


def rso(x, made):
    """Pairs of the accepted ones of a prompt's samples, two pairs at most, by gold."""
    rows, left = [], list(made.out)
    for call, (p, ys) in zip(made.accepted, groups_of(x, made), strict=True):
        golds = D([gold_of(x, p, y) for y in ys])
        assert close(call.reward, golds - golds.mean(), 1e-4) and (call.k, call.beta) == (4, .5)
        mine = [left.pop(0) for _ in range(sum(r["prompt"] == p for r in left))]
        assert len(mine) <= 2
        for r in mine:
            assert {tuple(y) for y in r["sides"]} <= {tuple(ys[i]) for i in call.out}
            rows.append((p, sorted(r["sides"], key=lambda y: -gold_of(x, p, y))))
    return rows


def mpo(x, made):
    """First the half of the pairs with the largest gaps, then samples on the others' prompts."""
    pairs = sorted(data_pairs(x), key=lambda r: -abs(gold_of(x, *r[:2]) - gold_of(x, r[0], r[2])))
    prompts = [[p for p, *_ in half] for half in (pairs[:32], pairs[32:])]
    assert len(made.out) <= 8
    if made.step >= x.c.steps // 2:
        assert all(p in prompts[1] for p in made.generate[0].prompts)
        return groups_of(x, made)
    assert not made.generate and len({*map(str, made.out)}) == 8
    easy = {str(p + a + b): (p, [a, b]) for p, a, b in pairs[:32]}
    return [easy[str(r["prompt"] + r["sides"][0] + r["sides"][1])] for r in made.out]


def mcts(x, made):
    """The children of most and of least Q at every node down the path of the former; prompts grow.

    Every step is worth the gold of a whole response that begins with it, and its prior is
    exp(Σ log π / n^1.25)."""
    (grown,), out = made.grow_trees, []
    ids = encoded(x, "abc")
    for i, p in enumerate(grown.prompts):
        assert grown.value(i, ids, True) == gold_of(x, p, ids)
        assert grown.value(i, ids[:-1], False) == gold_of(x, p, ids[:-1])
    for p, root in zip(grown.prompts, grown.out):
        node = root
        while node.children:
            q = [child.v - node.v + child.V for child in node.children]
            best, worst = (node.children[q.index(pick(q))] for pick in (max, min))
            if max(q) > min(q) and best.ids != worst.ids:
                out.append((p + node.path(), [best.ids, worst.ids]))
            for child in node.children:
                check_worth(x, made, p, child)
                n = len(child.ids)
                own = logs(made.policy, [(p + node.path(), child.ids)])[0].sum().item()
                assert abs(child.prior - math.exp(own / n ** 1.25)) < 1e-4
                assert child.finished == (child.ids[-1] == x.tok.eos)
            node = best
        assert root.N == 8
    assert len(out) >= len(grown.prompts) / 2
    return out


def check_worth(x, made, prompt, node):
    """A step is worth the gold of the response that it ends, or of one that goes on from it."""
    ids, ends = node.path(), []
    assert len(node.parent.children) == 3 and len(node.ids) <= 4 and len(ids) <= 12
    for call in made.generate:
        if call.samples == 1 and (prompt + ids) in call.prompts:
            i = call.prompts.index(prompt + ids)
            ends.append(samples(x, call)[i][0])
            assert len(ids) + call.max_new_tokens == 12
    whole = node.finished or len(ids) == 12
    golds = [gold_of(x, prompt, ids + end) for end in ([[]] if whole else ends)]
    assert node.v in golds


def from_data(x, made):
    return [(p, [a, b]) for p, a, b in data_pairs(x)]


def one_by_one(x, made):
    return [(p, [y]) for p, *ys in data_pairs(x) for y in ys]


def demonstrations(x, made):
    """Of all training problems, in their order."""
    return [(x.tok.prompt(p["prompt"]), [encoded(x, RING.demo(p))])
            for p in train_problems()]


EXPECTED = dict.fromkeys(("pairs", "margins", "credited", "prompted", "signs"), from_data) | dict(
    labels=one_by_one, forget=demonstrations, online=by_gold, lists=ranked_lists, rso=rso,
    ranked=best_and_worst, dno=best_and_worst, explore=explored, selm=selm,
    mixture=lambda x, m: [(p, [b]) for p, a, b in paired(x, m)],
    prox=lambda x, m: [(p, [a]) for p, a, b in paired(x, m)],
    hybrid=lambda x, m: [(p, [*pair, *ys]) for p, pair, ys in with_data(x, m)],
    spin=spin, mpo=mpo, mcts=mcts)
POLICY, START = "policy", "start"
CALLS = dict(online=[(POLICY, 2)], lists=[(POLICY, 4)], spin=[(POLICY, 1)], ranked=[(POLICY, 5)],
             dno=[(POLICY, 5)], mixture=[(POLICY, 1), (POLICY, 1)], selm=[(POLICY, 1)],
             prox=[(POLICY, 1), ("opponent", 1)], explore=[(POLICY, 1), (START, 1)],
             hybrid=[(POLICY, 2)], rso=[(START, 16)])


# --- every preset, watched ------------------------------------------------------------------------

ARMS = {"tiny", "lora", "few", "short", "plain_sgd", "flips20", "flips40", "no_eos"}
PLAIN = [f"{side}_{x}" for side in ("chosen", "rejected") for x in (*dpo.READS, *dpo.PASS)]
SINGLE = [k for k, fn in dpo.LOSSES.items() if k not in dpo.PRESETS and {*needs(fn)} <= {*PLAIN}]
METHODS = [*SINGLE, "online", "mcts", *(k for k in dpo.PRESETS if k not in ARMS),
           "treg,source=prompted", "online,judge=duel", "raco,combine=maxmin",
           "raco,combine=weighted", "plain_sgd"]
SHARP = "--sharp=1e9"                                  # a judge that throws no coin
EXTRA = dict(online=[SHARP], inpo=[SHARP], xpo=[SHARP],
             mpo=["--steps=4", "--refresh=1", "--noise=0.5"],
             nash_mp=["--steps=5", "--refresh=1", "--inner=2"],
             plain_sgd=["--steps=3"], simpo=["--kl=true"], npo=["--key=k"], ga=["--key=k"],
             dno=["--least=0.5"])
EXTRA |= {"treg,source=prompted": ["--better=ab", "--worse=xw"],
          "raco,combine=maxmin": ["--groups=BA"]}
ALONE = {"simpo", "orpo", "slic_hf", "ga", "pro", "logo"}      # losses without a reference
RUN = ["--out=run", "--steps=2", "--micro=5", "--eval_prompts=4", "--lr=3e-3", "--dtype=float32"]


# of every preset what makes it that method, beside the defaults
PARTS = dict(
    toyif=dict(data="toyif", init="base:toyif"), rso=dict(loss="hinge", source="rso", refresh=200),
    rpo=dict(loss="dpo", sft=0.005), madpo=dict(loss="madpo", source="margins"),
    beta_dpo=dict(loss="beta_dpo", statistic="pace"), treg=dict(loss="treg", source="credited"),
    kto=dict(loss="kto", statistic="mismatch", source="labels", batch=128, micro=128),
    bco=dict(loss="bco", statistic="shift", source="labels", batch=128, micro=128),
    npo=dict(loss="npo", source="forget"), ga=dict(loss="ga", source="forget"),
    lipo=dict(loss="lipo", source="lists", refresh=200, beta=0.05),
    list_mle=dict(loss="list_mle", source="lists", refresh=200),
    pro=dict(loss="pro", source="lists", refresh=200),
    logo=dict(loss="logo", source="lists", refresh=200),
    raco=dict(loss="objectives", source="signs", combine="cagrad", beta=0.2),
    spin=dict(source="spin", anchor="previous", refresh=50),
    sppo=dict(loss="sppo", source="ranked", anchor="previous", refresh=50),
    sppo_hard=dict(loss="sppo_hard", source="ranked", anchor="previous", refresh=50),
    dno=dict(source="dno", anchor="previous", refresh=50),
    inpo=dict(loss="inpo", source="online", refresh=50),
    nash_md=dict(loss="nash_md", source="mixture"), nash_mp=dict(loss="nash_mp", source="prox"),
    xpo=dict(loss="xpo", source="explore"), hypo=dict(loss="hypo", source="hybrid"),
    selm=dict(loss="selm", source="selm", anchor="previous", refresh=50),
    mpo=dict(loss="mpo", source="mpo", anchor="handover"))


def test_every_preset_is_the_method_that_it_is_called():
    assert {k: v for k, v in dpo.PRESETS.items() if k not in ARMS} == PARTS
    assert dpo.PRESETS["flips20"] == dict(noise=0.2, flip=0.2)
    assert dpo.PRESETS["flips40"] == dict(noise=0.4, flip=0.4)
    assert dpo.PRESETS["no_eos"] == dict(alpha=0.0, with_eos=False)
    for table in (dpo.LOSSES, dpo.STATISTICS, dpo.SOURCES, dpo.JUDGES):
        functions = [fn for key, fn in table.items() if key != "none"]
        assert len({fn.__name__ for fn in functions}) == len(functions)
    assert all(fn.__name__ == name for name, fn in dpo.LOSSES.items())


def test_every_argument_of_every_loss_is_computed_apart():
    names = {name for fn in (*dpo.LOSSES.values(), *dpo.STATISTICS.values()) for name in needs(fn)}
    sides = {f"{side}_{what}" for side in ("chosen", "rejected", "other", "list")
             for what in TOKENS | SUMS}
    assert names - sides - {*SUMS} - {*FIELDS} == {"gaps", "shifts", "generator"}
    assert {*dpo.SOURCES} == {*EXPECTED}


@pytest.mark.parametrize("config", METHODS)
def test_what_reaches_every_preset(config, shared_bases, monkeypatch):
    check_run(Watched(monkeypatch, *RUN, "--config", f"{config},tiny", *EXTRA.get(config, [])))


def check_run(x):
    """Everything that a run's functions got and gave."""
    assert all(math.isfinite(value) for value in x.result.values())
    assert len(x.steps) == x.c.steps and all(p.isfinite().all() for p in x.policy.parameters())
    for step in x.steps:
        facts = Facts(x, step)
        check_loss(x, step, facts)
        check_gradient(x, step, facts)
        check_log(x, step, facts)
    check_statistic(x)
    check_updates(x)
    check_effect(x)
    check_rhythm(x)
    if x.c.source == "dno":
        far = sum(len(best_and_worst(x, made)) for made in x.makings)
        assert [r for r in x.rows if "loss" in r][-1]["close"] == 16 * len(x.makings) - far > 0
    for made in x.makings:
        check_samples(x, made)
        check_judge(x, made)
        check_rows(x, made)
    for seen in x.evaluations:
        check_evaluation(x, seen)


def check_loss(x, step, facts):
    """Every argument of the loss in every micro-batch; and what becomes of its result."""
    at, total = 0, 0.0
    assert [len(call.out) for call in step.loss] == [5, 3]
    for call in step.loss:
        for name in needs(dpo.LOSSES[x.c.loss]):
            got, want = getattr(call, name), facts[name].detach()[at:at + len(call.out)]
            if got.shape != want.shape:                # padded to the longest of its micro-batch
                assert not want[:, got.size(1):].any()
                want = want[:, :got.size(1)]
            assert close(got, want, 2e-4 * max(1, want.abs().max().item())), name
        at, total = at + len(call.out), total + call.out.sum(0)
    if x.c.loss == "objectives":
        count = facts["signs"].abs().sum(0).clamp(min=1)
        assert step.out == pytest.approx((total / count).sum().item(), rel=1e-4)
    else:
        mean = total.item() / len(step.batch)
        mean -= x.c.sft * facts["chosen_mean"].mean().item() if x.c.sft else 0.0
        assert step.out == pytest.approx(mean, rel=1e-4)


def gradient(x, step, loss):
    """∂ loss / ∂ the policy as it was, as one vector."""
    grads = torch.autograd.grad(loss, list(step.policy.parameters()), retain_graph=True)
    return torch.cat([g.flatten() for g in grads])


def check_gradient(x, step, facts):
    """The step's gradient is that of the loss of what was computed apart, and of the SFT term."""
    fn = dpo.LOSSES[x.c.loss].__wrapped__
    loss = fn(*(facts[name] for name in needs(fn)),
              **{key: getattr(step.loss[0], key) for key in hyper(fn)})
    got = torch.cat([g.flatten() for g in step.grads])
    if x.c.loss == "objectives":
        count = facts["signs"].abs().sum(0).clamp(min=1)
        call = x.combined[x.c.combine][x.steps.index(step)]
        want = torch.stack([gradient(x, step, one) for one in loss.sum(0) / count])
        assert close(call.G, want, 1e-3 * want.abs().max().item())
        if "losses" in vars(call):
            assert close(call.losses, (loss.sum(0) / count).detach(), 1e-5)
        assert torch.equal(got, call.out)
        return
    if x.c.sft:
        loss = loss - x.c.sft * facts["chosen_mean"]
    want = gradient(x, step, loss.mean())
    assert (got - want).norm() < 2e-3 * want.norm()


def check_log(x, step, facts):
    """The log's row of a step: its loss, its gradient's norm, both sides' means."""
    row = next(r for r in x.rows if "loss" in r and r["step"] == step.step + 1)
    norm = torch.cat([g.flatten() for g in step.grads]).norm().item()
    assert row["loss"] == pytest.approx(step.out) and row["norm"] == pytest.approx(norm, rel=1e-4)
    flat = [Side(facts, r, i) for r, i in facts.flat]
    S, labels = len(step.batch[0]["sides"]), [r.get("good", 1.0) > 0 for r in step.batch]
    first, second = flat[::S], flat[min(S, 2) - 1::S]
    for side, rows in (("chosen", [v for v, good in zip(first, labels) if good]),
                       ("rejected", [v for v, good in zip(second, labels) if good == (S > 1)])):
        keys = ["logp", "len", *["ratio"] * ("anchor" in dpo.asked_by(x.c, x.f))]
        for key in keys if rows else ():
            mean = sum(SUMS[key](v).item() for v in rows) / len(rows)
            assert row[f"{side}_{key}"] == pytest.approx(mean, rel=1e-3, abs=2e-3), key
    if S > 1:
        by = SUMS["ratio" if "chosen_ratio" in row else "mean"]
        gaps = [(by(a) - by(b)).item() for a, b in zip(first, second)]
        right, alike = (sum(map(test, gaps)) for test in (lambda x: x > 0, lambda x: abs(x) < 1e-4))
        assert abs(row["accuracy"] - right / 8) <= alike / 8 + 1e-6
    if "chosen_ratio" in row and S > 1:
        assert row["margin"] == pytest.approx(row["chosen_ratio"] - row["rejected_ratio"])


def check_statistic(x):
    """What a statistic reads is of the whole batch, before the step."""
    for step, call in zip(x.steps, x.statistics[x.c.statistic], strict=x.c.statistic != "none"):
        for name in {*needs(dpo.STATISTICS[x.c.statistic])} & ({*FIELDS, *SUMS} | {*PLAIN}):
            assert close(getattr(call, name), Facts(x, step)[name].detach(), 1e-3), name


def vector(parameters):
    return torch.cat([p.detach().flatten() for p in parameters])


def check_updates(x):
    """Adam's first step, SGD's every step, is against the gradient, of the size of --lr's cosine
    from a half to nothing and its warm-up."""
    for one, two in zip(x.steps, x.steps[1:]):
        moved = vector(two.policy.parameters()) - vector(one.policy.parameters())
        g, done = vector(one.grads), one.step / x.c.steps
        if x.c.optimiser == "sgd":
            lr = 3e-3 * (0.05 + 0.95 * (1 + math.cos(math.pi * done)) / 2)
            assert close(moved, -lr * g, 1e-5 * g.abs().max().item())
        elif one.step == 0:
            big = g.abs() > 1e-5 * max(1, g.norm())
            assert close(moved[big] * g[big].sign(), torch.full((big.sum(),), -3e-4), 1e-5)
        assert moved @ g < 0 or one.step


def check_effect(x):
    """After the first step the chosen side has gained on the rejected one; what is to be forgotten
    is less likely and the rest, like good labels, more."""
    batch, (one, two) = x.steps[0].batch, (s.policy for s in x.steps[:2])
    last = -1 if x.c.source == "lists" or len(batch[0]["sides"]) == 1 else 1
    with torch.no_grad():
        gain = [[(b - a).sum().item() for a, b in zip(logs(one, rows), logs(two, rows))]
                for rows in ([(r["prompt"], r["sides"][0]) for r in batch],
                             [(r["prompt"], r["sides"][last]) for r in batch])]
    up, down = (sum(side) for side in gain)
    if "good" in batch[0]:
        signed = [g if r["good"] else -g for g, r in zip(gain[0], batch)]
        assert sum(signed) > 0
    elif len(batch[0]["sides"]) > 1 and x.c.loss != "objectives":
        assert up > down


def check_rhythm(x):
    """When rows are made and numbers taken; every row of an epoch is read once; what is counted."""
    static, steps, every = dpo.static(x.f), x.c.steps, [s.step for s in x.steps]
    assert every == [*range(steps)]
    assert [m.step for m in x.makings] == ([0] if static else [*range(0, steps, x.c.refresh)])
    assert [m.stage for m in x.makings] == [*range(len(x.makings))]
    assert [r["step"] for r in x.rows if "val_win" in r] == sorted({*range(0, steps, 2), steps})
    for made in x.makings:
        used, rows = ([str(r["prompt"]) + str(r["sides"]) for r in rs] for rs in (
            [r for s in x.steps if s.made is made for r in s.batch], made.out))
        assert {*used} <= {*rows} and used != rows[:len(used)]
        assert len({*used}) == min(len(used), len(rows))
    last = [r for r in x.rows if "loss" in r][-1]
    calls = [call for m in x.makings for call in getattr(m, "sample", [])]
    ys = [y for call in calls for own in call.out for y in own]
    assert last.get("sampled", 0) == len(ys)
    assert last.get("truncated", 0) == sum(y["ids"][-1] != x.tok.eos for y in ys)
    assert all(call.most == x.c.clip for s in x.steps for call in s.clip_gradients)
    kept = sorted({*range(2, steps, 2), steps})[-2:]
    assert sorted(p.name for p in Path("run").glob("step-*")) == [f"step-{i:06d}" for i in kept]
    saved, _ = load(f"run/step-{steps:06d}")
    assert torch.equal(vector(saved.parameters()), vector(x.policy.parameters()))
    assert [*x.models] == ["start"] * (x.c.kl or x.c.loss not in ALONE)
    assert not any(p.requires_grad for m in x.models.values() for p in m.parameters())
    first, final = (x.evaluations[i].out[0] for i in (0, -1))
    golds = [r["val_gold"] for r in x.rows if "val_gold" in r]
    want = final | {f"start_{k}": v for k, v in first.items()} | dict(val_peak=max(golds))
    assert x.result == pytest.approx(want)


def check_samples(x, made):
    """Who is asked for how many samples, and how; of which problems."""
    calls = CALLS.get(x.c.source, [(POLICY, 2)] * (
        x.c.source == "mpo" and made.step >= x.c.steps // 2))
    if x.c.source == "mcts":
        return
    for (who, k), call in zip(calls, made.generate, strict=True):
        opponent = x.makings[made.stage - made.stage % 2].policy
        want = dict(policy=made.policy, start=x.start, opponent=opponent)[who]
        assert all(torch.equal(p, call.weights[key]) for key, p in want.state_dict().items()), who
        assert (call.samples, call.max_new_tokens) == (k, 12)
        assert call.temperature == (0 if x.c.source == "selm" else 1) and call.top_p == 1
        mixed = x.c.source == "mixture" and call is made.generate[0]
        assert (call.contrast == (x.models["start"], -0.5)) if mixed else call.contrast is None
    known = {(p["prompt"], p.get("seed")) for p in train_problems()}
    for call in getattr(made, "sample", []):
        if x.c.source not in ("selm", "hybrid", "mpo"):
            assert {(p["prompt"], p["seed"]) for p in call.problems} <= known
        assert len(call.problems) == math.ceil(8 * x.c.refresh / (2 if x.c.source == "rso" else 1))


def check_judge(x, made):
    """P of every group of responses that is compared."""
    for call in made.compare:
        for problem, group, P in zip(call.problems, call.groups, call.out, strict=True):
            if x.c.judge == "duel":
                want = [[RING.duel(problem["prompt"], a["text"], b["text"], 2.0, a["finished"],
                                   b["finished"]) for b in group] for a in group]
            else:
                score = [score_of(x, problem["ids"], y["ids"]) for y in group]
                want = preferred(score, x.f.judge.keywords["sharp"])
            assert close(P, want, 1e-4 if x.scorers else 1e-6)


def score_of(x, prompt, ids):
    """What a judge's Bradley-Terry stands on: gold; two models' mean log-ratio; a reward."""
    if not x.scorers:
        return gold_of(x, prompt, ids)
    if x.c.judge == "cdr":
        strong, weak = (logs(model, [(prompt, ids)])[0].mean().item() for model in x.scorers)
        return strong - weak
    return x.scorers[0](torch.tensor([[*prompt, *ids]]))[0, -1].item()


@torch.no_grad()
@pytest.mark.parametrize("source, judge", [("margins", "cdr"), ("lists", "rm")])
def test_what_a_judge_that_is_a_model_says(source, judge, shared_bases, monkeypatch):
    """two checkpoints, a reward model: which is which, and of which tokens"""
    model, tok = load(str(dpo.sft.base("ring", "tiny")))
    save(moved_apart(model, 2), tok, "strong")
    save(moved_apart(model, 3), tok, "weak")
    save(ScalarModel.from_lm(model, std=0.5), tok, "rm")
    names = [judge] if judge == "rm" else ["strong", "weak"]
    monkeypatch.setattr(Watched, "scorers", [load(name)[0] for name in names])
    loss = dict(margins="madpo", lists="lipo")[source]
    options = [f"--{name}={name}" for name in names if judge == "cdr"]
    with torch.enable_grad():
        x = Watched(monkeypatch, *RUN, f"--config={loss},tiny", f"--judge={judge}", *options)
    for made in x.makings:
        check_judge(x, made)
        for r in made.out:
            score = [score_of(x, r["prompt"], y) for y in r["sides"]]
            if source == "margins":
                assert r["margin"] == pytest.approx(score[0] - score[1], abs=1e-3)
            else:
                assert r["rates"] == pytest.approx(wins(score), abs=1e-4)
                assert sorted(score, reverse=True) == pytest.approx(score, abs=1e-4)


def check_rows(x, made):
    """Which responses stand on which side of a row, in which order."""
    want = [(p, sides) for p, sides in EXPECTED[x.c.source](x, made)
            if len(sides) == 1 or len({*map(tuple, sides[:2 if x.c.source != "lists" else 9])}) > 1]
    got = [(r["prompt"], r["sides"]) for r in made.out]
    assert len(got) == len(want)
    for (p, sides), (q, expected) in zip(got, want):
        tossed = x.c.source in ("online", "explore") and (
            x.c.judge == "duel" or gold_of(x, p, sides[0]) == gold_of(x, p, sides[1]))
        if tossed:                                     # for its sides a coin was thrown
            sides, expected = sorted(sides[:2]) + sides[2:], sorted(expected[:2]) + expected[2:]
        assert p == q and sides == expected


def check_evaluation(x, seen):
    """The held-out numbers of one evaluation, and the samples that are shown."""
    out, golds, shown = seen.out
    n = len(seen.generate) // len(seen.sets)
    for i, (split, held) in enumerate(seen.sets.items()):
        call, *more = seen.generate[i * n:i * n + n]
        ys = [ys[0] for ys in samples(x, call)]
        assert held == [p | dict(ids=x.tok.prompt(p["prompt"]))
                        for p in WORLDS[x.c.data].problems(split, 4, 0)]
        assert call.prompts == [p["ids"] for p in held] and call.samples == 1
        assert call.generator.initial_seed() == 1 and call.temperature == 1.0
        for p, y, row in zip(held, ys, shown[2 * i:2 * i + 2]):
            asked = x.tok.decode(p["ids"], skip_specials=False)
            assert row == (asked, text_of(x, y), WORLDS[x.c.data].demo(p))
        want = held_out(x, seen, split, list(zip(call.prompts, ys)))
        if more:
            want["exploitability"] = exploitability(x, seen, split, held, more)
        mine = {k.removeprefix(f"{split}_"): v for k, v in out.items() if k.startswith(split)}
        assert mine.keys() == want.keys()
        for key, value in want.items():
            assert mine[key] == pytest.approx(value, rel=1e-3, abs=1e-4), (split, key)


def held_out(x, seen, split, rows):
    """{what the log says of a split: the same apart} of samples, and of held-out pairs."""
    now, before = [gold_of(x, p, y) for p, y in rows], x.evaluations[0].out[1][split]
    want = dict(length=sum(len(y) for _, y in rows) / 4, gold=sum(now) / 4,
                truncated=sum(y[-1] != x.tok.eos for _, y in rows) / 4,
                win=sum((a > b) + 0.5 * (a == b) for a, b in zip(now, before)) / 4)
    reads = "start" in x.models                        # then held-out pairs are told apart by it
    if reads:
        both = zip(logs(seen.policy, rows), logs(x.start, rows))
        want["kl"] = sum((a - b).sum().item() for a, b in both) / 4
    if x.c.source == "signs":
        want |= {f"gold_{g}": sum(gold_of(x, p, y, g) for p, y in rows) / 4 for g in "AB"}
    if split == "val":
        score = []
        pairs = data_pairs(x, 8, 0, "val")
        for rows in ([(p, a) for p, a, _ in pairs], [(p, b) for p, _, b in pairs]):
            own, ref = logs(seen.policy, rows), logs(x.start, rows)
            score.append([(a - b).sum() if reads else a.mean() for a, b in zip(own, ref)])
        want["accuracy"] = sum(float(a > b) for a, b in zip(*score)) / 8
        if x.c.source == "forget":
            want |= forgotten(x, seen)
    return want


def forgotten(x, seen):
    """The mean NLL of a token of held-out demonstrations, of those to forget and of the rest."""
    out = {}
    for name, key in (("forget_nll", True), ("retain_nll", False)):
        rows = [(p["ids"], encoded(x, RING.demo(p))) for p in seen.sets["val"]
                if ("k" in p["prompt"]) == key]
        out[name] = -torch.cat(logs(seen.policy, rows)).mean().item()
    return out


def exploitability(x, seen, split, held, calls):
    """What the best of the start's and the policy's 16 wins against 16 others of the policy."""
    own, start = seen.policy.state_dict(), x.start.state_dict()
    for call, weights in zip(calls, (start, own, own), strict=True):
        assert all(torch.equal(p, call.weights[key]) for key, p in weights.items())
    best = []
    for problem, *groups in zip(held, *(samples(x, call) for call in calls)):
        texts = [[(text_of(x, y), y[-1] == x.tok.eos) for y in ys] for ys in groups]
        rates = [sum(RING.duel(problem["prompt"], a, b, 2.0, whole, other) for b, other in texts[2])
                 for a, whole in (*texts[0], *texts[1])]
        best.append(max(rates) / 16)
    return sum(best) / len(best) - 0.5


# --- what a run of two steps does not show --------------------------------------------------------


def options(**own):
    """A config of the fields that the functions here read."""
    return SimpleNamespace(**dict(rows=40, seed=0, noise=0.0, length_bias=0.0, eval_prompts=4,
                                  chat=False, val="", system="", ask="", answer="mark",
                                  data="ring", max_new=0, micro=2, device="cpu",
                                  dtype="float32", source="kto", loss="kto", batch=4, refresh=1,
                                  slots=9)
                           | own)


@pytest.fixture(scope="session")
def two_models(bases_folder):
    """Two unequal models with Ring's letters, and its tokenizer."""
    tok = prefs.ring_tokenizer()
    config = preset("2x32", tok, 64)
    return init(config, 0), init(config, 1), tok


def test_a_coin_falls_by_the_judge_s_probability():
    g, P = torch.Generator().manual_seed(0), D([[.5, .8], [.2, .5]])
    tossed = [dpo.coin(P, g) for _ in range(2000)]
    assert {*tossed} == {(0, 1), (1, 0)} and abs(tossed.count((0, 1)) / 2000 - .8) < .03


def test_an_objective_s_gradient_is_a_mean_over_the_rows_on_which_it_has_an_opinion(two_models):
    """of all micro-batches; the step's gradient is what --combine makes of them"""
    model, ref, tok = two_models
    rows = [dict(prompt=[1, 5 + i], sides=[[6 + i, 7], [8, 9 + i, 2]], signs=own)
            for i, own in enumerate(([1., 0.], [-1., 1.], [1., 0.]))]
    h = []
    for r in rows:
        flat = [(r["prompt"], y) for y in r["sides"]]
        r["ref_logps"] = torch.cat(logs(ref, flat)).detach()
        a, b = (own.sum() for own in logs(model, flat))
        h.append(a - b - r["ref_logps"][:2].sum() + r["ref_logps"][2:].sum())
    want = [-(logsigmoid(.1 * h[0]) + logsigmoid(-.1 * h[1]) + logsigmoid(.1 * h[2])) / 3,
            -logsigmoid(.1 * h[1])]
    caught = {}

    def combine(G, losses):
        caught.update(G=G, losses=losses)
        return 2 * G[0] - G[1]
    f = SimpleNamespace(loss=dpo.objectives, combine=combine)
    value = dpo.backward_each(options(), f, dict(policy=model, tok=tok), rows, Counter())
    exact = torch.stack([torch.cat([g.flatten() for g in torch.autograd.grad(
        one, list(model.parameters()), retain_graph=True)]) for one in want])
    assert close(caught["G"], exact, 1e-6) and exact.norm() > 0.01
    assert close(caught["losses"], torch.stack(want).detach(), 1e-5)
    assert value == pytest.approx(sum(want).item(), rel=1e-5)
    assert close(torch.cat([p.grad.flatten() for p in model.parameters()]),
                 2 * exact[0] - exact[1], 1e-6)
    model.zero_grad()


def test_rso_pairs_what_it_accepts_at_random():
    """of the start's samples; the better one is chosen"""
    asked, g = [], torch.Generator().manual_seed(0)

    def sample(problems, k, model=None):
        asked.append((k, model))
        return [[dict(ids=[i]) for i in range(k)] for _ in problems]

    def compare(problems, groups):
        return [dpo.gold(D([0., 1, 2, 3])) for _ in groups]
    rows = dpo.rso([dict(ids=[9])] * 60, sample, compare, "start", g, n=4, k=4, beta_rso=1e-9)
    assert asked == [(4, "start")] and len(rows) == 120
    assert all(a[0] > b[0] for a, b in (r["sides"] for r in rows))
    pairs = {tuple(y[0] for y in r["sides"]) for r in rows}
    assert pairs == {(a, b) for a in range(4) for b in range(a)}


def test_margins_shuffled_are_another_pair_s():
    data = [dict(prompt=[i], chosen=[1], rejected=[2], text=dict(prompt="", chosen="", rejected=""))
            for i in range(20)]

    def compare(problems, groups):
        return [dpo.gold(D([p["ids"][0] / 4, 0.])) for p in problems]
    for shuffled in (False, True):
        rows = dpo.margins(data, compare, torch.Generator().manual_seed(0), shuffled=shuffled)
        found = [r["margin"] for r in rows]
        assert close(sorted(found), [i / 4 for i in range(20)], 1e-5)
        assert close(found, sorted(found), 1e-5) != shuffled
        assert [r["prompt"] for r in rows] == [[i] for i in range(20)]


def test_pace_drops_the_unlikely_gaps():
    g, zero, kept = torch.Generator().manual_seed(0), torch.zeros(10), 0
    for _ in range(50):
        gap = torch.tensor([0.] * 9 + [100.])
        kept += dpo.pace(gap, zero, dpo.Gaps(), g)["kept"][9] > 0
    assert kept < 25


def test_pace_draws_by_the_running_mean_and_spread(monkeypatch):
    """weights exp(-½ ((gap - M0)/s0)²), M0 and s0 a tenth of the way to each batch's own"""
    weights, gaps, g = [], dpo.Gaps(), torch.Generator().manual_seed(0)
    monkeypatch.setattr(torch, "multinomial", lambda weight, n, generator: weights.append(
        (weight, n)) or torch.arange(n))
    for gap in ([1., 2, 3, 4, 5], [5., 5, 7, 7, 11]):
        out = dpo.pace(D(gap), D([0.] * 5), gaps, g, drop=.4)
    assert close(gaps.now, [.9 * 3 + .1 * 7, .9 * 1.581139 + .1 * 2.449490])
    z = [(x - 3.4) / 1.667974 for x in gap]
    assert close(weights[1][0], [math.exp(-.5 * v * v) for v in z], 1e-5) and weights[1][1] == 3
    assert close(out["beta_now"], [.1 * (1 + .6 * (17 / 3 - 3.4))] * 5)


def test_mpo_has_a_share_of_easy_pairs():
    """0: the policy gradient alone; 1: DPO alone; half: both, one after the other"""
    data = [dict(prompt=[i], chosen=[1, i], rejected=[2, i], gap=float(i),
                 text=dict(prompt=str(i), chosen="", rejected="")) for i in range(8)]
    taken, c = [], options(steps=10)
    handover = SimpleNamespace(models={}, take=taken.append)

    def rows(easy, step):
        return dpo.mpo_rows(
            [0] * 4, data, lambda where, k: [[dict(ids=[3]), dict(ids=[4])] for _ in where],
            lambda problems, groups: [D([[.5, .7], [.3, .5]])] * len(groups), handover, step, 0, c,
            easy=easy)
    for easy, step, hard, prompts in ((.5, 4, 0, range(4, 8)), (.5, 5, 1, range(4)),
                                      (0., 0, 1, range(8)), (1., 9, 0, range(8))):
        found, before = rows(easy, step), len(taken)
        assert [r["hard"] for r in found] == [hard] * 4
        assert {r["prompt"][0] for r in found} <= {*prompts}
        assert found[0]["gain"] == pytest.approx(math.log(7 / 3), abs=1e-6)
        assert found[0]["sides"] == ([[3], [4]] if hard else [[1, *found[0]["prompt"]],
                                                              [2, *found[0]["prompt"]]])
    assert taken == ["policy"] * 2 and before == 2


def test_a_search_goes_no_deeper_than_asked_nor_beyond_the_room():
    def extend(starts, new, k):
        return [[([i] * new, 1 / k, False) for i in range(k)] for _ in starts]

    def deepest(node):
        return max([len(node.path()), *map(deepest, node.children)])
    for room, depth, want in ((9, 2, 4), (5, 9, 4), (6, 9, 6), (9, 1, 2)):
        ends = []
        root, = dpo.grow_trees([[7]], extend, lambda i, ids, done: ends.append(ids) or sum(ids),
                               room, iterations=9, children=2, chunk=2, depth=depth)
        assert deepest(root) == want and {len(ids) for ids in ends} == {room}


def test_a_base_is_made_of_the_run_s_own_seed_and_size(monkeypatch):
    asked = []
    monkeypatch.setattr(dpo.sft, "find", lambda *a, **kw: asked.append((*a, kw)))
    c = options(init="base:ring", config="tiny", seed=3, judge="cdr")
    f = SimpleNamespace(judge=SimpleNamespace(keywords=dict(strong="here", weak="")))
    dpo.initial(c, f, make=False)
    dpo.strong(c, f, make=False)
    dpo.weak(c, f, make=False)
    assert asked == [("base:ring", "tiny", False, dict(seed=3, device="cpu")),
                     ("here", "tiny", False, "--strong", dict(device="cpu")),
                     ("base:ring", "tiny", False, "--weak", dict(device="cpu"))]


def test_models_with_different_tokenizers_are_refused(shared_bases):
    tok = prefs.tokenizer()
    save(init(preset("1x32", tok, 64)), tok, "toy")
    with pytest.raises(UserError, match="different tokenizers"):
        dpo.main(["--config=madpo,tiny", "--judge=cdr", "--strong=toy"])


def test_the_pairs_of_a_world_are_labelled_with_its_faults(two_models):
    """noise and a taste for length in the training labels alone; seeds give other pairs"""
    *_, tok = two_models
    def opened(**own):
        return dpo.open_pairs(options(**own), tok, RING, 64)
    (clean, held, prompts), (noisy, same, _), (long, also, _) = (
        opened(), opened(noise=.5), opened(length_bias=9.))
    assert len(clean) == 40 and len(held) == len(prompts) == 8 and held == same == also
    assert [sorted((r["chosen"], r["rejected"])) for r in noisy] == [
        sorted((r["chosen"], r["rejected"])) for r in clean]
    flipped = sum(a["chosen"] != b["chosen"] for a, b in zip(clean, noisy))
    assert 10 < flipped < 30 and all(len(r["chosen"]) >= len(r["rejected"]) for r in long)
    gaps = [RING.judge(r["text"]["prompt"], r["text"]["chosen"])["gold"]
            - RING.judge(r["text"]["prompt"], r["text"]["rejected"])["gold"] for r in clean]
    assert min(gaps) > 0
    assert {len(r["sides"]) for r in held} == {2}
    assert [r["sides"][0] for r in held] == [
        [*tok.encode(r["chosen"]), tok.eos] for r in RING.pairs(8, 0, "val")]
    other = opened(seed=1)[0]
    assert [r["prompt"] for r in other] == [tok.prompt(r["prompt"]) for r in RING.pairs(40, 1001)]
    assert len(opened(eval_prompts=999)[1]) == 600


def test_the_problems_of_a_world_and_of_a_file_leave_room_for_a_response(two_models):
    """training, held-out splits with their prompts' ids; samples end before the context does"""
    *_, tok = two_models
    problems, sets, room = dpo.open_problems(options(seed=2), tok, RING, 64, 64, [], [])
    assert problems == [p | dict(ids=tok.prompt(p["prompt"]))
                        for p in RING.problems("train", 4096, 1002)]
    assert {k: [p["prompt"] for p in x] for k, x in sets.items()} == {
        k: [p["prompt"] for p in RING.problems(k, 4, 2)] for k in ("val", "ood")}
    assert room == 24                                  # Ring's own
    width = len(problems[0]["ids"])
    for context, max_new, want in ((20, 0, 20 - width), (64, 9, 9)):
        got = dpo.open_problems(options(max_new=max_new), tok, RING, context, context, [], [])
        assert got[2] == want
    with pytest.raises(UserError, match="no room"):
        dpo.open_problems(options(), tok, RING, width, width, [], [])
    texts = [".abcd=", ".abce=", ".abcd="]
    data = [dict(text=dict(prompt=t), chosen=[5]) for t in texts] + [
        dict(text=dict(prompt="!abcf="), sides=[[5]])]                 # a label has no pair
    problems, sets, room = dpo.open_problems(options(), tok, None, 500, 500, data,
                                             [dict(prompt=f".{x}bcd=") for x in "eefghi"])
    assert [p["prompt"] for p in problems] == [".abcd=", ".abce="] and room == 128
    assert [p["prompt"] for p in sets["val"]] == [f".{x}bcd=" for x in "efgh"] and len(sets) == 1


def test_samples_are_drawn_a_few_thousand_at_a_time(monkeypatch):
    """all problems, in order; those that were cut off are counted"""
    asked, counts = [], Counter()

    def generate(model, prompts, room, *, samples, generator, slots, temperature=1.0):
        assert slots == 9
        asked.append((model, len(prompts) * samples, room, temperature))
        rows = [[*p, 7, 2] for p in prompts for _ in range(samples)]
        done = torch.tensor([p[0] > 1 for p in prompts for _ in range(samples)])
        return Rollout(torch.tensor(rows), torch.tensor([[0, 1, 1]] * len(rows)), None,
                       torch.ones(len(rows), dtype=torch.long), done)
    monkeypatch.setattr(dpo, "generate", generate)
    tok = SimpleNamespace(decode=lambda ids: str(ids))
    ys = dpo.sample("policy", tok, options(), 5, [dict(ids=[i]) for i in range(3)], 2000,
                    generator=None, counts=counts)
    assert asked == [("policy", 4000, 5, 1.0), ("policy", 2000, 5, 1.0)]
    assert [len(own) for own in ys] == [2000] * 3 and counts == dict(sampled=6000, truncated=4000)
    assert [own[0] for own in ys] == [dict(ids=[7, 2], text="[7, 2]", finished=False)] * 2 + [
        dict(ids=[7, 2], text="[7]", finished=True)]
    dpo.sample("policy", tok, options(), 5, [dict(ids=[1])], model="start", generator=None,
               counts=counts, temperature=0.0)
    assert asked[-1] == ("start", 1, 5, 0.0)


def test_log_probs_on_disk_are_of_one_model_of_its_rows_and_of_one_precision(two_models):
    one, two, tok = two_models
    rows = [dict(prompt=[1, 5], sides=[[6, 7], [8]]), dict(prompt=[1, 9, 4], sides=[[5], [6, 2]])]
    seen = []
    for model in (one, two, one):
        turned = dict(rows[0], sides=rows[0]["sides"][::-1])
        for own in (rows, rows[::-1], rows[:1], [turned]):
            found = dpo.cached_logprobs(tok, options(), own, model)
            want = [torch.cat(logs(model, [(r["prompt"], y) for y in r["sides"]])) for r in own]
            assert all(close(a, b.detach(), 1e-5) for a, b in zip(found, want, strict=True))
        seen.append(len(list(dpo.CACHE.iterdir())))
    assert seen[1] == seen[2]
    dpo.cached_logprobs(tok, options(dtype="bfloat16"), rows, one)
    assert len(list(dpo.CACHE.iterdir())) == seen[2] + 1


def test_the_ranking_of_labels_is_by_log_ratio_or_by_mean():
    """1 if every good response is above every other one"""
    held = [dict(good=g, ref_logps=torch.tensor(r)) for g, r in
            ((1.0, [-3., -3]), (0.0, [-1.]), (1.0, [-2., -9]))]
    found = [torch.tensor([-2., -3]), torch.tensor([-1.5]), torch.tensor([-1., -9])]
    asked = []

    def logprobs(rows, model):
        asked.append(model)
        return found
    assert dpo.ranking("val", held, "policy", logprobs) == dict(accuracy=1.0)
    for r in held:
        del r["ref_logps"]                             # means -2.5, -1.5, -5: the other order
    assert dpo.ranking("val", held, "policy", logprobs) == dict(accuracy=0.0)
    assert asked == ["policy"] * 2
    assert dpo.ranking("ood", held, "policy", logprobs) == {}
    assert dpo.ranking("val", [dict(sides=[])], "policy", logprobs) == {}


def test_labels_of_a_file_are_trained_on_and_held_out(two_models, tmp_path, capsys):
    *_, tok = two_models
    rows = [dict(prompt=f".{x}bcd=", completion=y, label=y == "ab")
            for x in "efghijklmnopqrstuvwx" for y in ("ab", "cd")]

    def opened(lines, rows=0):
        (tmp_path / "x.jsonl").write_text("".join(json.dumps(r) + "\n" for r in lines))
        c = options(data=str(tmp_path / "x.jsonl"), rows=rows)
        return dpo.open_labels(c, tok, None, 64)
    train, val, prompts = opened(rows)
    assert [r["text"] for r in opened(rows, 10)[0]] == [r["text"] for r in train[:10]]
    assert len(train) == 38 and len(val) == 2 and prompts == [r["text"] for r in val]
    assert all((r["good"], r["sides"]) == (float(r["text"]["label"]), [
        [*tok.encode(r["text"]["completion"]), tok.eos]]) for r in train + val)
    with pytest.raises(UserError, match="are alike"):
        opened([r for r in rows if r["label"]])
    held = val[0]["text"]["prompt"]
    mixed = [r for r in rows if r["prompt"] != held or r["label"]]
    assert opened(mixed)[1] == [] and "no val_accuracy" in capsys.readouterr().out
    assert len(opened(mixed)[2]) == 1


def test_kto_s_mismatched_prompts_fit_the_context():
    """each prompt with the response of the row before, both models' log-probs of it"""
    batch = [dict(prompt=[1] * n, sides=[[i] * m]) for i, (n, m) in
             enumerate(((2, 3), (4, 1), (1, 6)))]
    asked = []

    def logprobs(rows, model):
        asked.append((model, [(len(r["prompt"]), r["sides"][0]) for r in rows]))
        return [torch.full((len(r["sides"][0]),), dict(policy=-1., start=-3.)[model])
                for r in rows]
    found = dpo.mismatched(batch, 7, "policy", "start", logprobs, options())
    pairs = [(4, [0] * 3), (1, [1])]                   # 2 + 6 is too long
    assert asked == [("policy", pairs), ("start", pairs)] and close(found, [4.] * 3)
    assert close(dpo.mismatched(batch, 1, "policy", "start", logprobs, options()), [0.] * 3)


def test_rows_of_the_full_context_are_kept():
    rows = [dict(prompt=[1] * 5, sides=[[2] * 3, [3]]), dict(prompt=[1] * 5, sides=[[2], [3] * 4])]
    counts = Counter()
    assert dpo.usable(rows, options(), 8, counts) == rows[:1] and counts == dict(long=1)


def test_a_pair_s_texts_know_which_response_was_cut_off():
    text = dict(prompt="p", chosen="c", rejected="r", rejected_finished=False)
    problem, (a, b) = dpo.texts_of(dict(prompt=[1], chosen=[2], rejected=[3], text=text))
    assert problem == dict(prompt="p", ids=[1]) and a == dict(ids=[2], text="c", finished=True)
    assert b == dict(ids=[3], text="r", finished=False)


def test_the_search_s_next_leaf_weighs_worth_and_prior():
    """Q + w p √N / (1 + n), worked"""
    root = dpo.Node()
    root.N, root.v = 9, .5
    a, b = (dpo.Node([i], p, parent=root) for i, p in ((1, .2), (2, .6)))
    a.v, a.N, b.v, b.N, root.children = 1.0, 1, .4, 3, [a, b]
    assert (a.Q, b.Q) == (.5, pytest.approx(-.1))      # .5 + .3 w against -.1 + .45 w
    assert dpo.descend(root, w=3.9) is a and dpo.descend(root, w=4.1) is b
    a.children = [dpo.Node([3], parent=a)]
    assert dpo.descend(root) is a.children[0] and a.children[0].path() == [1, 3]


def test_fresh_rows_are_of_other_problems_every_time():
    """as many as the steps until the next ones take, each problem once"""
    seen, counts = [], Counter()

    def source(problems):
        seen.append([p["ids"][0] for p in problems])
        return [dict(prompt=p["ids"], sides=[[3], [4]]) for p in problems]
    known = dict(problems=[dict(ids=[i]) for i in range(40)], context=9, counts=counts,
                 logprobs="logprobs")
    for stage in range(3):
        rows, logprobs = dpo.fresh_rows(options(refresh=5), SimpleNamespace(source=source),
                                        known | dict(stage=stage), 2)
        assert [r["prompt"][0] for r in rows] == seen[-1] and logprobs == "logprobs"
    assert [len({*x}) for x in seen] == [10] * 3 and len(set(map(str, seen))) == 3
    c, problems = options(), [0] * 10
    drawn = [dpo.next_pairs([*range(40)], problems, stage, c) for stage in range(3)]
    assert [len({*x}) for x in drawn] == [10] * 3 and len(set(map(str, drawn))) == 3
    assert not {*map(str, drawn)} & {*map(str, seen)}


@pytest.mark.parametrize("config, option", [
    ("dpo", "--combine=cagrad"), ("dpo", "--refresh=3"), ("dpo", "--statistic=pace"),
    ("simpo", "--anchor=previous"), ("spin", "--judge=gold"), ("dpo", "--compile=true"),
    ("dpo,data=pairs.jsonl", "--noise=0.1"), ("dpo,data=pairs.jsonl", "--length_bias=0.1")])
def test_an_option_that_nobody_reads_is_refused(config, option, monkeypatch):
    monkeypatch.setattr(dpo, "train", lambda c, f: None)
    with pytest.raises(UserError, match="does not read it|are of a world's labels"):
        dpo.main([f"--config={config}", option])
