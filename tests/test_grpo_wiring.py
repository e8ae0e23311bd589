"""grpo.py: what reaches every method's function in a run of the script, and what becomes of its
result, against the same quantities computed apart: from weights, tokens, problems and labels."""
import copy
import inspect
import math
import re
import statistics
import zlib
from collections import Counter
from dataclasses import replace
from functools import cached_property, partial
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from conftest import close, merged
from wiring import catch

import grpo
from data import tasks
from data.run import configure, headings, needs, read_log, read_state, steps_of
from model import Rollout, load

TOPICS = {"refused", "measured", "lora"}
CHAPTERS = [x for names, _ in headings(inspect.getsource(grpo)) for x in re.split(", *", names)]
METHODS = ["grpo", *(x for x in CHAPTERS if x not in TOPICS)]
CONTROLS = {"tiny", "lora", "wide", "tokens", "reverse", "replay", "on_sort"}     # and of claims
TEACHER = ["--teacher", "base:chain_right"]
# strong terms, so that a sign of theirs is seen beside the rest; prompts that come back
OPTIONS = dict(
    hapo=["--pool", "4"], rlad=[*TEACHER, "--alpha", "0.3"], kdrl=[*TEACHER, "--beta", "0.5"],
    opd=[*TEACHER, "--prompts", "8", "--samples", "1"],
    exopd=[*TEACHER, "--prompts", "8", "--samples", "1"],
    acereason=["--at_entropy", "1.0"], knowrl=["--pool", "4"], rif=["--screen", "2"],
    recap=["--steps", "3", "--prompts", "3", "--minibatches", "1"],
    aipo=["--steps", "3", "--lag", "1"], rapo=["--beta", "0.5", "--entropy", "0.1"],
    dler=["--beta", "0.5"], co_reward=["--beta", "0.5"], apo=["--beta", "0.5"],
    drpo=["--delta", "1e-9", "--beta", "1e3"],
    da_dler=["--beta", "0.5", "--target", "12", "--easy", "8"],
    clip_cov=["--low", "0.01", "--ratio", "0.1"], kl_cov=["--ratio", "0.1"],
    dot=["--samples", "4", "--prompts", "4", "--spread", "0.5", "--ratio", "0.1"],
    rlpr=["--kl_reward", "0.5", "--data", "sort", "--init", "base:chain_sort"],   # long answers
    arlcp=["--kl_reward", "0.5"], rlvr=["--kl_reward", "2"],
    clip_delta=["--kl_reward", "0.5"], reinforce_pp=["--advantage.beta", "0.5"],
    easy=["--share", "0.5"])
# rows that no preset has, in runs of their own
MORE = dict(
    harsher=["--config", "grpo", "--credit", "harsher", "--surrogate", "clip_stale", "--actor",
             "lagged", "--lag", "1", "--warmup", "4"])


def coin(problem, text, finished):
    """A reward that half of all finished responses earn, by the problem and the text."""
    return float(finished and zlib.crc32((problem["prompt"] + text).encode()) % 2)


def spelled(tok, ids, chars):
    """The fewest first ids whose text has so many characters."""
    return next(i for i in range(len(ids) + 1) if len(tok.decode(ids[:i])) >= chars)


def plain_forward(model, rows, temperature=1.0):
    """Log-probs of a model's own ids and entropies, aligned, by log_softmax.   2 x [N, T]"""
    tokens = torch.zeros(len(rows), max(len(a) + len(b) for a, b in rows), dtype=torch.long)
    for i, (a, b) in enumerate(rows):
        tokens[i, :len(a) + len(b)] = torch.tensor([*a, *b])
    law = (model.logits(model(tokens)).float() / temperature).log_softmax(-1)            # [N, T, V]
    logp = law[:, :-1].gather(2, tokens[:, 1:, None])[..., 0]
    return F.pad(logp, (1, 0)), F.pad(-(law.exp() * law).sum(-1)[:, :-1], (1, 0))


@torch.no_grad()
def answers(model, rows):
    """[(mean probability, mean log-prob, mean entropy)] of ids forced after others."""
    if not rows:
        return []
    logp, entropy = plain_forward(model, rows)
    spans = [slice(len(a), len(a) + len(b)) for a, b in rows]
    return [(p[s].exp().mean().item(), p[s].mean().item(), h[s].mean().item())
            for p, h, s in zip(logp, entropy, spans)]


# --- a run, and all that was caught of it ---------------------------------------------------------


class Run:
    """A run with the calls of its functions; each knows its step, round of groups and update."""

    def __init__(self, monkeypatch, argv):
        self.monkeypatch = monkeypatch
        init = configure(grpo.Config, grpo.PRESETS, grpo.AXES, argv=argv)[0].init
        base = grpo.sft.base(init.removeprefix("base:"), like="tiny", seed=0)
        argv = merged(*argv, "--init", str(base), "--seed", "1")
        self.c, self.f = configure(grpo.Config, grpo.PRESETS, grpo.AXES, argv=argv,
                                   readers=grpo.readers)
        self.events, self.step, self.round, self.update = [], -1, -1, -1
        self.weights, self.first_update, self.grads, self.rates = [], {}, [], []
        monkeypatch.setattr(tasks.Chain, "reward", lambda self, problem, completion, finished=True:
                            coin(problem, completion, finished))
        catch(monkeypatch, grpo, see=partial(self.see, "axis"))
        for table in ("FACTS", "BATCH", "MINIBATCH"):
            catch(monkeypatch, grpo, table, see=partial(self.see, table))
        catch(monkeypatch, grpo, "backward", "generate", "optimiser", "clip_gradients",
              "evaluate", see=partial(self.see, ""))
        self.first, self.known = [], {}
        monkeypatch.setattr(grpo, "check_first_ratio", lambda x, _: self.first.append(x["worst"]))
        self.out = grpo.main([*argv, "--out", "run"])
        self.log = [row for row in read_log("run") if "correct" in row]
        self.task = tasks.task(self.c.data)
        self.ref, self.tok = load(base)
        self.state = read_state(f"run/{steps_of('run')[-1].name}/state.pt") if self.log else {}
        self.teacher = load(grpo.sft.base("chain_right", like="tiny"))[0] if self.c.teacher else 0

    def see(self, table, name, call):
        """Note a call that is about to be made, and the policy's weights where they matter."""
        self.step += name in grpo.ACTORS
        self.round += name in grpo.DRAWS
        self.update += name == "backward"
        call.at = dict(step=self.step, round=self.round, update=self.update)
        call.table = table
        if name == "optimiser":
            self.policy, self.opt = call.model, call
        if name == "backward":
            self.first_update.setdefault(self.step, self.update)
            self.weights.append(copy.deepcopy(self.policy).requires_grad_(False))
        if name == "clip_gradients":
            self.grads.append(torch.cat([p.grad.flatten() for p in self.policy.parameters()]))
            self.rates.append(self.opt.out.param_groups[0]["lr"])
        self.events.append((name, call))

    def of(self, name, table="axis", **when):
        """The calls of a function, at a step, round or update."""
        return [call for x, call in self.events if x == name and call.table == table
                and when.items() <= call.at.items()]

    def row(self, axis):
        """The name of an axis's row."""
        return getattr(self.c, axis)

    def policy_at(self, step):
        """The policy as it was when a step sampled and scored."""
        return self.weights[self.first_update[step]]

    def temperature(self, number):
        """What a round was sampled at."""
        return self.of("generate", "", round=number)[0].temperature

    def groups(self, number):
        """The groups of a round, as they were sampled."""
        roll = self.of("generate", "", round=number)[0].out
        where, problems = self.of(self.row("draw"), round=number)[0].out
        out, G, step = [], self.c.samples, self.of(self.row("draw"), round=number)[0].at["step"]
        for k, problem in enumerate(problems):
            rows = []
            for i in range(k * G, k * G + G):
                start = int(roll.prompt_len[i])
                ids = roll.tokens[i].tolist()
                new = ids[start:][:self.c.max_new]
                new = new[:new.index(self.tok.eos) + 1] if self.tok.eos in new else new
                rows.append((ids[:start], new))
            out.append(SimpleNamespace(problem=problem, rows=rows, where=where[k], place=k,
                                       round=number, step=step))
        return out

    def rounds(self, step):
        """The rounds of a step."""
        return sorted({call.at["round"] for call in self.of(self.row("draw"), step=step)})

    def seen(self, step):
        """All groups of a step."""
        return self.once(("seen", step), lambda: [g for n in self.rounds(step)
                                                  for g in self.groups(n)])

    def once(self, key, make, update=None):
        """Groups that are made once: what is computed of them is kept."""
        if key not in self.known:
            self.known[key] = Groups(self, make(), update)
        return self.known[key]

    def passed(self, step):
        """The groups that the filter keeps, by its rule."""
        groups = self.seen(step).groups
        if self.c.filter == "every":
            return groups
        by = self.row("noise" if self.c.filter == "mixed" else "shaper")
        of_round = {n: self.of(by, round=n)[0].out for n in self.rounds(step)}
        spread = [of_round[g.round][g.place].std() for g in groups]
        most = {n: of_round[n].std(1).max() for n in of_round}
        if self.c.filter == "steady":                            # no usual spread yet: all
            return groups
        assert most
        return [g for g, x in zip(groups, spread) if x > 1e-6]

    def batch(self, step):
        """The groups that train: the first that passed, or if none did those of the last round."""
        return self.once(("batch", step), lambda: (
            self.passed(step) or self.groups(self.rounds(step)[-1]))[:self.c.prompts])

    def mini(self, update):
        """The groups of an update, in its order."""
        call, = self.of("backward", "", update=update)
        groups = self.batch(call.at["step"]).groups
        return self.once(("mini", update), lambda: [groups[i] for i in call.groups.tolist()],
                         update)

    def level(self, name, call):
        """The groups that a call is about; None: it is about no groups."""
        axis = {row: axis for axis, table in grpo.AXES.items() for row in table}.get(name, "")
        level = call.table if call.table != "axis" else axis
        if level in ("FACTS", "noise", "trim", "shaper"):
            number = call.at["round"]
            found = self.once((level == "noise", number), lambda: self.groups(number))
            if level == "noise":
                found.score = found.scored                       # what the noise is to change
            return found
        if level in ("BATCH", "advantage", "credit"):
            return self.batch(call.at["step"])
        if level in ("MINIBATCH", "weight", "surrogate", "penalty"):
            return self.mini(call.at["update"])
        return None


class Groups:
    """Some groups of a run, and every quantity of theirs, computed apart."""

    def __init__(self, run, groups, update=None):
        self.run, self.groups, self.update, self.c = run, groups, update, run.c
        self.P, self.G, self.step = len(groups), run.c.samples, groups[0].step
        self.rows = [row for g in groups for row in g.rows]
        self.posed = [g.problem for g in groups for _ in g.rows]
        self.done = [run.tok.eos in b for _, b in self.rows]
        self.texts = [run.tok.decode(b[:-1] if done else b)
                      for (_, b), done in zip(self.rows, self.done)]
        self.tasks = [tasks.part(run.task, p) for p in self.posed]
        self.numbers = (run.f.surrogate.keywords | run.f.weight.keywords
                        | dict(cap=run.c.max_new, groups=self.P, prompts=run.c.prompts,
                               usual=0.0, progress=self.step / max(1, run.c.steps - 1)))
        self.policy = run.policy_at(self.step) if self.step in run.first_update else run.ref
        self.heat = run.temperature(groups[0].round)

    def per_row(self, fn):
        """A number of each response: fn(problem, text, done, task).   [P, G]"""
        rows = zip(self.posed, self.texts, self.done, self.tasks)
        return torch.tensor([float(fn(*row)) for row in rows]).view(self.P, self.G)

    def of_round(self, name):
        """What a function of a round gave these groups.   [P, …]"""
        return torch.stack([self.run.of(name, round=g.round)[0].out[g.place] for g in self.groups])

    def of_batch(self, name):
        """What a function of the step's batch gave these groups' responses.   [n, …]"""
        call, = self.run.of(name, step=self.step)
        place = {(g.round, g.place): i for i, g in enumerate(self.run.batch(self.step).groups)}
        where = [place[g.round, g.place] for g in self.groups]
        out = call.out.view(-1, self.G, *call.out.shape[1:])[where].flatten(0, 1)
        return out[:, :max(len(a) + len(b) for a, b in self.rows)]

    def aligned(self, fn):
        """A number of each token of each response: fn(row, place in the response).   [N, T]"""
        out = torch.zeros(len(self.rows), max(len(a) + len(b) for a, b in self.rows))
        for i, (a, b) in enumerate(self.rows):
            for t in range(len(b)):
                out[i, len(a) + t] = fn(i, t)
        return out

    # --- of responses

    @cached_property
    def score(self):
        return self.of_round(self.run.row("noise"))

    @cached_property
    def scored(self):
        return self.per_row(lambda *row: tasks.REWARDS[self.c.reward](*row))

    @cached_property
    def correct(self):
        return self.per_row(lambda p, text, done, task: task.reward(p, text, done) > 0.5)

    @cached_property
    def length(self):
        return torch.tensor([float(len(b)) for _, b in self.rows]).view(self.P, self.G)

    @cached_property
    def truncated(self):
        return ~torch.tensor(self.done).view(self.P, self.G)

    @cached_property
    def where(self):
        return torch.tensor([[g.where] for g in self.groups])

    @cached_property
    def records(self):
        """Of every prompt of the pool, the shortest correct response of earlier steps."""
        best = [math.inf] * self.c.pool
        for step in range(self.step):
            seen = self.run.seen(step)
            for g, right, length in zip(seen.groups, seen.correct, seen.length):
                for r, n in zip(right.tolist(), length.tolist()):
                    best[g.where] = min(best[g.where], n) if r else best[g.where]
        return best

    @cached_property
    def best(self):
        return torch.tensor([[self.records[g.where]] for g in self.groups])

    @cached_property
    def reflections(self):
        return self.per_row(lambda p, text, done, task: text.count("w"))

    def after_mark(self, model, what, own):
        """A number of the answer, the response's own or the true one, after its ####.   [P, G]"""
        found, asked = torch.zeros(len(self.rows)), []
        for i, ((a, b), text, p, task) in enumerate(zip(self.rows, self.texts, self.posed,
                                                        self.tasks)):
            ids = b[:-1] if self.done[i] else b
            if "####" not in text:
                continue
            k = spelled(self.run.tok, ids, text.index("####") + 4)
            truth = task.demo(p, "good").split("####")[1]
            answer = ids[k:] if own else self.run.tok.encode(truth)
            if answer:
                asked.append((i, (a + ids[:k], answer)))
        for (i, _), got in zip(asked, answers(model, [row for _, row in asked])):
            found[i] = what(*got)
        return found.view(self.P, self.G)

    @cached_property
    def answer_prob(self):                                       # the slow copy is still the start
        return self.after_mark(self.run.ref, lambda p, logp, h: math.exp(logp), own=True)

    @cached_property
    def truth_prob(self):
        return self.after_mark(self.policy, lambda p, logp, h: p, own=False)

    @cached_property
    def base_prob(self):
        rows = []
        for g in self.groups:
            truth = tasks.part(self.run.task, g.problem).demo(g.problem, "good").split("####")[1]
            rows.append((self.run.tok.prompt(g.problem) + self.run.tok.encode("####"),
                         self.run.tok.encode(truth)))
        return torch.tensor([[p] for p, _, _ in answers(self.run.ref, rows)])

    @cached_property
    def said(self):
        """The number that each finished response states, "" for none."""
        out = []
        for text, done in zip(self.texts, self.done):
            hit = re.search(r"####([-+*0-9]{1,40})", text) if done else None
            value = tasks.value(hit[1]) if hit else None
            out.append("" if not hit else str(value) if value is not None else hit[1])
        return out

    @cached_property
    def stated(self):
        return torch.tensor([float(bool(x)) for x in self.said]).view(self.P, self.G)

    @cached_property
    def answer(self):
        order = [*dict.fromkeys(x for x in self.said if x)]
        return torch.tensor([float(order.index(x)) if x else -1.0
                             for x in self.said]).view(self.P, self.G)

    @cached_property
    def pattern(self):
        return self.per_row(lambda p, text, done, task: tasks.pattern(p, text, True, task))

    @cached_property
    def trained(self):
        return self.of_round(self.run.row("trim"))

    @cached_property
    def objective(self):
        return torch.tensor([[float(g.problem.get("task", 0))] for g in self.groups])

    # --- of tokens

    @cached_property
    def mask(self):
        room = self.trained.flatten().tolist()
        return self.aligned(lambda i, t: float(t < room[i]))

    def logp_of(self, model, temperature=0.0):
        with torch.no_grad():
            return plain_forward(model, self.rows, temperature or self.heat)[0]

    @cached_property
    def old_logp(self):
        return self.logp_of(self.policy)

    @cached_property
    def ref_logp(self):
        return self.logp_of(self.run.ref)

    @cached_property
    def teach_logp(self):
        return self.logp_of(self.run.teacher)

    @cached_property
    def flat_logp(self):
        right = self.correct.view(-1, 1) > 0
        return torch.where(right, self.ref_logp, self.logp_of(self.run.ref, 2 * self.heat))

    @cached_property
    def behaviour_logp(self):
        """Of the policy that sampled: that of one step ago with --lag 1."""
        lag = int(self.c.actor == "lagged")
        return self.logp_of(self.run.policy_at(max(0, self.step - lag)))

    @cached_property
    def logp(self):
        return self.logp_of(self.run.weights[self.update])

    @cached_property
    def anchor(self):
        alpha = self.numbers["alpha"]
        return alpha * self.old_logp + (1 - alpha) * self.teach_logp

    @cached_property
    def price(self):
        return grpo.hinge(self.logp, self.old_logp, self.mask, self.P, self.numbers["beta"],
                          self.numbers["delta"])

    @cached_property
    def shaped(self):
        """What the advantage reads: less β KL, where there is such a term."""
        kl = ((self.old_logp - self.ref_logp) * self.mask).sum(1).view(self.P, self.G)
        return self.of_round(self.run.row("shaper")) - self.c.kl_reward * kl

    @cached_property
    def adv(self):
        if self.update is None:
            return self.of_batch(self.run.row("advantage"))
        flat = self.c.filter != "every" and not self.run.passed(self.step)
        return self.of_batch(self.run.row("credit")) * (not flat)

    # --- of steps of reasoning

    @cached_property
    def cuts(self):
        out = []
        for (_, b), text, task in zip(self.rows, self.texts, self.tasks):
            ends = [m.end() for m in re.finditer(task.kind.cell, text.partition("####")[0])]
            out.append([spelled(self.run.tok, b, end) for end in ends])
        return out

    @cached_property
    def probed(self):
        counts = [len(x) for x in self.cuts]
        return torch.tensor([[k < n for k in range(max(1, *counts))] for n in counts])

    @cached_property
    def step_of(self):
        cuts = self.cuts
        place = self.aligned(lambda i, t: min(sum(t >= x for x in cuts[i]), len(cuts[i]) - 1) + 1)
        return place.long() - 1

    @cached_property
    def process(self):
        out = torch.zeros(self.probed.shape)
        for i, (p, text, task) in enumerate(zip(self.posed, self.texts, self.tasks)):
            scores = task.process(p, text)
            out[i, :len(scores)] = torch.tensor(scores)
        return out

    @cached_property
    def belief(self):
        acc, conf = torch.zeros(2, *self.probed.shape)
        rows, where = [], []
        for i, (cuts, (a, b), p, task) in enumerate(zip(self.cuts, self.rows, self.posed,
                                                        self.tasks)):
            truth = self.run.tok.encode(task.demo(p, "good").split("####")[1])
            for k, end in enumerate(cuts):
                rows.append((a + b[:end] + self.run.tok.encode("####"), truth))
                where.append((i, k))
        for at, (p, _, h) in zip(where, answers(self.policy, rows)):
            acc[at], conf[at] = p, math.exp(-h)
        return acc, conf

    # --- of objectives

    @cached_property
    def losses(self):
        out = [[], []]
        for step in range(self.step):
            seen = self.run.seen(step)
            for k in (0, 1):
                out[k].append(1 - seen.scored[seen.objective.flatten() == k].mean().item())
        return out

    @cached_property
    def priority(self):
        return grpo.reweighted(self.losses, self.numbers["reweigh"], window=1)

    @cached_property
    def lam(self):
        """Each group's objective's weight over that objective's share of the batch's groups."""
        every = [int(x) for x in self.run.batch(self.step).objective]
        K, count = 2, Counter(every)
        return torch.tensor([[self.priority[int(k)] * len(every) / (K * count[int(k)])]
                             for k in self.objective])



WHOLE = {"score", "correct", "length", "truncated", "where", "best", "reflections", "answer_prob",
         "truth_prob", "base_prob", "stated", "answer", "pattern", "trained", "objective", "shaped",
         "lam", "probed", "process"}                             # tensors compared as they are
TOKENS = {"old_logp", "ref_logp", "teach_logp", "flat_logp", "behaviour_logp", "logp", "now",
          "anchor", "price", "adv", "step"}                      # where the mask is 1
NUMBERS = {"cap", "groups", "progress", "prompts", "reweigh", "beta", "delta", "alpha", "ratio",
           "low", "high", "eps", "usual"}
LISTS = {"texts", "posed", "problems", "cuts", "records", "losses", "priority"}
MODELS = {"policy", "ref", "slow", "teacher"}
CAUGHT = {"dropped", "steep"}    # a function's own result, whose arguments are compared
OWN = {"roll", "mask", "tokens", "belief"}
# what these are is seen in what they lead to: the samples, the groups, the decoded texts
APART = {"generator", "fresh", "tok", "task", "c", "cursor", "pool", "past", "problem", "text",
         "finished", "spec"}


def compare(run, groups, name, got):
    """That an argument is what its name says, of these groups."""
    want = getattr(groups, dict(now="logp", step="step_of").get(name, name), None)
    width = max(len(a) + len(b) for a, b in groups.rows)
    if name in WHOLE:
        assert close(got, want, 2e-5), name
    elif name in TOKENS:
        assert close(got[:, :width] * groups.mask, want * groups.mask, 5e-5), name
    elif name in CAUGHT:
        assert torch.equal(got, run.of(name, "MINIBATCH", update=groups.update)[0].out), name
    elif name in NUMBERS:
        assert got == pytest.approx(groups.numbers[name]), name
    elif name in ("texts", "posed", "cuts"):
        assert got == want, name
    elif name in LISTS and name != "problems":                   # of numbers
        assert close(got, want, 1e-5), name
    elif name == "problems":
        assert got == [g.problem for g in groups.groups]
    elif name == "policy":
        assert got is run.policy
    elif name in MODELS:
        a, b = got.state_dict(), (run.teacher if name == "teacher" else run.ref).state_dict()
        assert all(torch.equal(a[k], b[k]) for k in b), name
    elif name == "mask":
        assert close(got[:, :width], groups.mask) and not got[:, width:].any()
    elif name == "roll":
        whole = groups.aligned(lambda i, t: 1.0)
        assert close(got.mask[:, :width], whole) and not got.mask[:, width:].any()
        assert got.finished.tolist() == groups.done
        assert close(got.logp[:, :width] * whole, groups.behaviour_logp * whole, 5e-5)
        tokens_are(got.tokens, groups)
    elif name == "tokens":
        tokens_are(got, groups)
    elif name == "belief":
        assert all(close(x, y, 1e-4) for x, y in zip(got, want, strict=True))
    else:
        assert name in APART, name


def tokens_are(got, groups):
    """Every row begins with its prompt and its response."""
    for row, (a, b) in zip(got.tolist(), groups.rows, strict=True):
        assert row[:len(a) + len(b)] == [*a, *b]


# --- what becomes of the results ------------------------------------------------------------------


def check_draws(run):
    """Every round has the next prompts of the pool, an epoch a shuffle; the sampler sees them."""
    for name, call in run.events:
        if name not in grpo.DRAWS or call.table != "axis":
            continue
        assert call.cursor == call.at["round"] and call.pool == run.pool
        n, half = len(run.pool), run.c.prompts // (1 + (name == "twins"))
        order = {e: torch.randperm(n, generator=torch.Generator().manual_seed(
            run.c.seed * 1_000_003 + e)) for e in range(1 + (call.at["round"] + 1) * half // n)}
        first = call.at["round"] * half
        want = [int(order[i // n][i % n]) for i in range(first, first + half)]
        groups = run.groups(call.at["round"])
        assert [g.where for g in groups] == want * (run.c.prompts // half)
        for i, g in enumerate(groups):
            text = run.tok.decode(g.rows[0][0])
            assert text == g.problem["prompt"] + g.problem.get("hint", "")
            same = run.pool[want[i % half]]
            assert g.problem["answer"] == same["answer"]
            assert g.problem == same or (i >= half and sorted(text) == sorted(same["prompt"]))


def check_rounds(run, step):
    """A filter asks for rounds until enough groups pass, and for no more."""
    most = run.f.filter.keywords.get("rounds", 1)
    rounds, kept = run.rounds(step), run.passed(step)
    before = [g for g in kept if g.round < rounds[-1]]
    assert len(before) < run.c.prompts or len(rounds) == 1
    assert len(kept) >= run.c.prompts or len(rounds) == most or run.c.filter == "steady"


def loss_of(run, update):
    """An update's loss by the row's own functions, of quantities computed apart; its gradient."""
    groups, model = run.mini(update), copy.deepcopy(run.weights[update]).requires_grad_()
    logp, entropy = plain_forward(model, groups.rows, groups.heat)

    def value(fn):
        known = {name: groups.numbers[name] if name in NUMBERS else
                 run.of(name, "MINIBATCH", update=update)[0].out if name in CAUGHT else
                 logp if name == "logp" else getattr(groups, name) for name in needs(fn)}
        return fn(**known)
    weight, loss = value(run.f.weight), value(run.f.surrogate)
    loss = loss.sum() / groups.P if loss.dim() == 1 else (loss * weight).sum()
    loss = loss + ((value(run.f.penalty) - run.c.entropy * entropy) * weight).sum()
    grads = torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)
    return loss.item(), torch.cat([g.flatten() for g in grads]), entropy.detach()


def check_updates(run):
    """Each gradient is that of the loss, and each step goes down; -> the loss of every update"""
    losses = []
    for update, got in enumerate(run.grads):
        loss, want, _ = loss_of(run, update)
        losses.append(loss)
        assert (got - want).norm() <= 1e-3 * want.norm() + 1e-6, update
        clip, = run.of("clip_gradients", "", update=update)
        assert clip.most == 1 and float(clip.out) == pytest.approx(
            float(want.norm()), rel=1e-3, abs=1e-5)
        step = run.of("backward", "", update=update)[0].at["step"]
        assert run.rates[update] == pytest.approx(
            run.c.lr * min(1, (step + 1) / max(1, run.c.warmup)))
    after = [*run.weights[1:], run.policy][0]
    moved = torch.cat([(b - a).detach().flatten() for a, b in zip(
        run.weights[0].parameters(), after.parameters())])
    assert (moved * run.grads[0]).sum() < 0 or run.grads[0].norm() < 1e-6
    return losses


def check_told(run, losses):
    """What the log says of every step, and the result of them all."""
    for key in ("correct", "entropy", "length", "flat", "kl", "generated"):
        assert run.out[f"train_{key}"] == pytest.approx(
            statistics.fmean(x[key] for x in run.log if key in x))
    before, *_, after = told = [row for row in read_log("run") if "val_greedy" in row]
    assert [row["step"] for row in told] == [0, *(k for k in range(1, run.c.steps + 1)
                                                  if k % run.c.eval_every == 0 or k == run.c.steps)]
    for key in {"val_greedy", "ood_length", "val_pass@2"}:
        assert run.out[key] == after[key] and run.out[f"sft_{key}"] == before[key]
    for step, row in enumerate(run.log):
        seen, batch = run.seen(step), run.batch(step)
        shaped = seen.of_round(run.row("shaper"))
        updates = [k for k in range(len(run.grads))
                   if run.of("backward", "", update=k)[0].at["step"] == step]
        kl = ((batch.old_logp - batch.ref_logp) * batch.mask).sum(1).mean()
        entropy, mask = loss_of(run, updates[0])[2], run.mini(updates[0]).mask
        clipped = []
        for k in updates:
            mini, eps = run.mini(k), run.f.surrogate.keywords.get("eps", 0)
            around = getattr(mini, needs(run.f.surrogate)[1]) if eps else mini.logp
            ratio, high = (mini.logp - around).exp(), run.f.surrogate.keywords.get("eps_high", eps)
            out = ((ratio < 1 - eps) | (ratio > 1 + high)) if eps else ratio > 2
            clipped.append(float((out * mini.mask).sum() / mini.mask.sum().clamp(min=1)))
        want = dict(correct=seen.correct.mean(), reward=shaped.mean(),
                    flat=(shaped.max(1).values - shaped.min(1).values < 1e-6).float().mean(),
                    length=seen.length.mean(), truncated=seen.truncated.float().mean(), kl=kl,
                    norm=run.of("clip_gradients", "", update=updates[-1])[0].out,
                    entropy=(entropy * mask).sum() / mask.sum().clamp(min=1),
                    groups=min(len(run.passed(step)), run.c.prompts), generated=seen.length.sum(),
                    loss=sum(losses[k] for k in updates) / len(updates),
                    clipped=sum(clipped) / len(clipped))
        asked = run.c.kl_reward or "ref_logp" in grpo.asked_for(run.f)
        assert ("kl" in row) == bool(asked or step % 5 == 0 or step + 1 == run.c.steps)
        for key in want.keys() & row.keys():
            assert row[key] == pytest.approx(float(want[key]), rel=1e-3, abs=2e-4), key
        for k in updates:                                        # what an update says of itself
            mini, found = run.mini(k), run.of("backward", "", update=k)[0].out
            off = ((mini.logp - mini.old_logp).exp() - 1).abs() * mini.mask
            assert found["worst"] == pytest.approx(float(off.max()), rel=1e-3, abs=2e-4)
            assert found["off"] == pytest.approx(
                float(off.sum() / mini.mask.sum().clamp(min=1)), rel=1e-3, abs=2e-4)
        order = [g for k in updates for g in run.of("backward", "", update=k)[0].groups.tolist()]
        assert sorted(order) == list(range(batch.P))
        assert len(updates) == -(-batch.P // (run.c.prompts // run.c.minibatches))


def check_memories(run):
    """What the checkpoint keeps of every memory, after the last step."""
    kept, steps = run.state["memories"], len(run.log)
    if "records" in kept:
        after = Groups.records.func(SimpleNamespace(run=run, c=run.c, step=steps))
        assert kept["records"] == after and min(after) < math.inf
    if "losses" in kept:
        after = Groups.losses.func(SimpleNamespace(run=run, step=steps))
        assert close(kept["losses"], after, 1e-6)
    if "past" in kept:                                           # and one that is dropped next
        models = [*(run.policy_at(k) for k in range(max(0, steps - 2), steps)), run.policy]
        for mine, model in zip(kept["past"], models, strict=True):
            assert all(torch.equal(mine[k], x) for k, x in model.state_dict().items())
    if "slow" in kept:
        assert all(torch.equal(kept["slow"][k], x) for k, x in run.ref.state_dict().items())
    if "usual" in kept:
        spread = [run.seen(k).of_round(run.row("shaper")).std(1).mean() for k in range(steps)]
        assert close(kept["usual"], spread, 1e-6)


@pytest.mark.parametrize("config", [x for x in [*METHODS, *MORE] if x != "latentseek"])
def test_every_method_is_given_what_its_arguments_say(config, shared_bases, monkeypatch):
    """and takes its steps on the loss that its functions give of it"""
    if config == "recap":                                        # weights after two steps, not 20
        real = grpo.reweighted
        monkeypatch.setitem(grpo.BATCH, "priority",
                            lambda losses, reweigh: real(losses, reweigh, window=1))
    noted, follow = [], grpo.Slow.note
    monkeypatch.setattr(grpo.Slow, "note", lambda self, done, policy: follow(
        self, done, policy) or noted.append((done, policy)))
    small = OPTIONS.get(config, []) + ["--rounds", "3"] * ("filter" in grpo.PRESETS.get(config, {}))
    run = Run(monkeypatch, merged(
        "--config", f"{config},tiny", "--steps", "2", "--lr", "3e-3", "--pool", "8",
        "--eval_prompts", "2", "--eval_samples", "2", *small,
        *(MORE[config] + ["--config", "grpo,tiny"] if config in MORE else [])))
    assert len(run.log) == run.c.steps and max(run.first, default=0) < 1e-4
    assert len(run.first) == (run.c.steps if run.c.actor == "current" else 0)
    assert all(math.isfinite(x) for row in [*run.log, run.out] for x in row.values())
    if config == "care":
        assert noted == [(1, run.policy), (2, run.policy)]
    run.pool_used = run.of(run.row("draw"))[0].pool
    run.pool = prepared(run)
    check_draws(run)
    for name, call in run.events:
        groups = run.level(name, call)
        for key, got in vars(call).items() if groups else ():
            if key in needs({**grpo.FACTS, **grpo.BATCH, **grpo.MINIBATCH}[name] if call.table
                            != "axis" else rows_of_axes()[name]):
                compare(run, groups, key, got)
    for step in range(run.c.steps):
        check_rounds(run, step)
    check_told(run, check_updates(run))
    check_memories(run)
    check_models(run)


def check_models(run):
    """Who is sampled, evaluated and saved; each kind of samples has a seed of its own."""
    saved = load("run")[0].state_dict()
    assert all(torch.equal(saved[k], x) for k, x in run.policy.state_dict().items())
    first = next(i for i, (name, _) in enumerate(run.events) if name == "evaluate")
    for i, (name, call) in enumerate(run.events):
        if name == "evaluate":
            assert call.policy is run.policy and call.c.temperature == run.temperature(0)
        if name == "generate":
            number = call.at["round"]
            train = number >= 0 and run.of("generate", "", round=number)[0] is call
            assert call.generator.initial_seed() == run.c.seed + (0 if train else 2 - (i > first))
            assert call.max_new_tokens == run.c.max_new


def rows_of_axes():
    """{row: function} of every axis."""
    return {row: fn for axis, table in grpo.AXES.items() if axis not in ("kernels", "peft")
            for row, fn in table.items()}


def test_every_argument_of_every_row_is_compared():
    rows = [*rows_of_axes().values(), *grpo.FACTS.values(), *grpo.BATCH.values(),
            *grpo.MINIBATCH.values()]
    names = {name for fn in rows for name in needs(fn)}
    known = WHOLE | TOKENS | NUMBERS | LISTS | MODELS | CAUGHT | OWN | APART
    assert names == known & names, names - known


def test_every_preset_has_a_chapter():
    assert {*grpo.PRESETS} - CONTROLS <= {*METHODS} and len(METHODS) == len({*METHODS})


def test_every_row_is_run():
    """by a preset, or by a run of its own"""
    used = set()
    for argv in [["--config", x] for x in METHODS] + [*MORE.values()]:
        c, _ = configure(grpo.Config, grpo.PRESETS, grpo.AXES, argv=argv)
        used |= {getattr(c, axis) for axis in grpo.AXES if axis not in ("kernels", "peft")}
    assert used >= {*rows_of_axes()} - {"PATH", "latentseek"}


# --- before step 0 --------------------------------------------------------------------------------


def prepared(run):
    """The prompts that a run trains on, by the rule of its preparation and its own samples."""
    pool = run.task.problems("train", run.c.pool, 1000 + run.c.seed)
    first = next(i for i, (name, _) in enumerate(run.events) if name == "evaluate")
    made = [call for name, call in run.events[:first] if name == "generate"]
    share = {}                       # of a prompt's text: the share of its samples that are right
    for call in made:
        roll = call.out
        for i, ids in enumerate(call.prompts):
            rows = range(i * call.samples, (i + 1) * call.samples)
            texts = [(roll.tokens[k].tolist()[len(ids):], k) for k in rows]
            texts = [(ids[:ids.index(run.tok.eos)] if run.tok.eos in ids else ids, k)
                     for ids, k in texts]
            text = run.tok.decode(ids)
            home = next(p for p in pool if text.startswith(p["prompt"]))
            share.setdefault(text, []).append(statistics.fmean(
                coin(home, run.tok.decode(ids), roll.finished[k]) for ids, k in texts))
    if run.c.prepare == "rif":
        assert len(run.pool_used) <= len(pool)
        return [p for p in pool if share[p["prompt"]].pop(0) > 0]
    if run.c.prepare == "hinted":
        for i, p in enumerate(pool):
            hints = run.task.hints(p)[:-1]
            pool[i] = p | dict(hint=fewest(hints, p["prompt"], share, 0.5 / made[0].samples ** 0.5))
    if run.c.prepare == "at_entropy":
        roll, heat = made[-1].out, run.temperature(0)
        rows = [(a[:n], a[n:n + k]) for a, n, k in zip(
            roll.tokens.tolist(), roll.prompt_len.tolist(), roll.mask.sum(1).long().tolist())]
        with torch.no_grad():
            H = (plain_forward(run.ref, rows, heat)[1] * roll.mask).sum() / roll.mask.sum()
        assert float(H) == pytest.approx(1.0, abs=1e-3) and heat != 1
        assert [call.temperature for call in made][1:] != [1.0, 1.0] and len(made) == 3
    return pool


def fewest(hints, prompt, share, margin):
    """The hints that sufficient() keeps by the measured shares, as one text."""
    def accuracy(kept):
        return share[prompt + "".join(hints[i] for i in sorted(kept))][0]
    return "".join(hints[i] for i in sorted(grpo.sufficient(len(hints), accuracy, margin)))


# --- evaluation -----------------------------------------------------------------------------------


@pytest.fixture
def small(shared_bases):
    """A tiny base, its tokenizer, and a Config for it."""
    model, tok = load(grpo.sft.base("chain", like="tiny"))
    return model, tok, grpo.Config(device="cpu", dtype="float32", max_new=16, prompts=3, samples=2,
                                   eval_samples=2, temperature=1.3, seed=3)


def test_what_is_evaluated(small, monkeypatch):
    """samples at the run's temperature, as many as eval_samples says, and one greedy response"""
    policy, tok, c = small
    monkeypatch.setattr(tasks.Chain, "reward", lambda self, problem, completion, finished=True:
                        coin(problem, completion, finished))
    calls = catch(monkeypatch, grpo, "generate")["generate"]
    sets = {split: (tasks.task("chain"), tasks.task("chain").problems(split, 5, 2))
            for split in ("val", "ood")}
    out, samples = grpo.evaluate(policy, sets, tok, c)
    assert [(x.samples, x.temperature, len(x.prompts)) for x in calls] == 2 * [
        (2, 1.3, 3), (1, 0.0, 3), (2, 1.3, 2), (1, 0.0, 2)]
    assert {x.generator.initial_seed() for x in calls} == {4}
    alone = grpo.evaluate(policy, dict(ood=sets["ood"]), tok, c)[0]      # draws of its own
    assert alone == {k: v for k, v in out.items() if k.startswith("ood")}
    for k, (split, (task, problems)) in enumerate(sets.items()):
        hot, cold = ([row for x in calls[4 * k + i:4 * k + 4:2] for row in zip(
            x.out.completions(), x.out.finished.tolist(), x.out.mask.sum(1).tolist())]
            for i in (0, 1))
        right = [coin(problems[i // 2], tok.decode(ids), done)
                 for i, (ids, done, _) in enumerate(hot)]
        greedy = [coin(p, tok.decode(ids), done) for p, (ids, done, _) in zip(problems, cold)]
        lengths = [n for *_, n in hot]
        want = dict(accuracy=statistics.fmean(right), greedy=statistics.fmean(greedy),
                    length=statistics.fmean(lengths),
                    truncated=statistics.fmean(1.0 - done for _, done, _ in hot),
                    length_right=sum(n * r for n, r in zip(lengths, right)) / max(1, sum(right)),
                    length_wrong=sum(n * (1 - r) for n, r in zip(lengths, right))
                    / max(1, 10 - sum(right)),
                    fillers=statistics.fmean(tok.decode(ids).count(";") for ids, *_ in hot))
        want["pass@2"] = statistics.fmean(max(pair) for pair in zip(right[::2], right[1::2]))
        for key, x in want.items():
            assert out[f"{split}_{key}"] == pytest.approx(x, abs=1e-6), key
        assert 0 < want["accuracy"] < 1
        assert samples[2 * k:2 * k + 2] == [
            (tok.shown(p), tok.decode(hot[2 * i][0]), task.demo(p))
            for i, p in enumerate(problems[:2])]


def test_what_samples_come_to_by_hand():
    """of four responses to two problems, half of them right"""
    task, score = tasks.task("chain"), torch.tensor([[1., 0], [0, 1]])
    posed = [dict(prompt=p, answer=a, seed=0) for p, a in (("1+1?", "2"), ("2+1?", "3"))
             for _ in range(2)]
    texts = ["+1=2####2", "####3;", "w####4", "####3"]
    done = torch.tensor([True, True, False, True])
    out = grpo.measured(task, posed, texts, score, torch.tensor([[9., 6], [6, 5]]), done)
    want = {"length": 6.5, "truncated": .25, "accuracy": .5, "pass@2": 1, "length_right": 7,
            "length_wrong": 6, "cells": .25, "waits": .25, "fillers": .25, "guess": .75}
    assert {k: float(out[k]) for k in want} == pytest.approx(want)
    # the first pair's votes are 2 and 3, a tie that the first wins: right; an unfinished has none
    assert out["maj@2"] == 1
    none = grpo.measured(task, posed, texts, 0 * score, torch.ones(2, 2), done)
    assert none["length_right"] == 0 and none["length_wrong"] == 1


def test_what_is_held_out():
    """the task's own splits under their names, and those of --watch under theirs"""
    c = grpo.Config(data="sort", watch="chain,sort", eval_prompts=3, seed=5)
    sets = grpo.held_out(c, tasks.task("sort"))
    assert [*sets] == ["val", "ood", "chain_val", "chain_ood", "sort_val", "sort_ood"]
    for name, (task, problems) in sets.items():
        home, split = "chain" if "chain" in name else "sort", name[-3:]
        assert task.name == home and problems == tasks.task(home).problems(split, 3, 5)
    assert [*grpo.held_out(replace(c, watch=""), tasks.task("sort"))] == ["val", "ood"]


def test_samples_are_made_as_many_rows_at_once_as_a_step_has(monkeypatch):
    calls = []
    monkeypatch.setattr(grpo, "generate", lambda *a, **k: calls.append((a, k)) or len(calls))
    tok = SimpleNamespace(prompt=lambda p, chat: (p, chat))
    c = grpo.Config(device="cpu", prompts=2, samples=6, max_new=9, temperature=.7, chat=True,
                    slots=7)
    got = list(grpo.rollouts("model", list("abcde"), tok, c, 4, "g"))
    assert got == [(["a", "b", "c"], 1), (["d", "e"], 2)]
    assert calls[1] == (("model", [("d", True), ("e", True)], 9),
                        dict(samples=4, temperature=.7, generator="g", slots=7))


def test_rewards_are_of_their_own_problem_and_of_finished_responses(small):
    _, tok, _ = small
    ids = [tok.encode(x) for x in ("1", "22", "3", "44")]
    roll = SimpleNamespace(completions=lambda: ids, tokens=torch.zeros(4),
                           finished=torch.tensor([True, False, True, True]))
    score, texts = grpo.graded(lambda p, text, done: (p == "b") + 2 * done + len(text) / 10,
                               ["a", "b"], roll, tok, 2)
    assert close(score, [[2.1, .2], [3.1, 3.2]]) and texts == ["1", "22", "3", "44"]


# --- memories over more than a few steps ----------------------------------------------------------


def test_the_slow_copy_follows_half_a_per_cent_every_ten_steps():
    ref, policy = (torch.nn.Linear(1, 1, bias=False) for _ in range(2))
    with torch.no_grad():
        ref.weight.fill_(1), policy.weight.fill_(3)
    slow = grpo.Slow(ref)
    for done in range(1, 21):
        slow.note(done, policy)
        want = 1.0 if done < 10 else 1.01 if done < 20 else 1.01995
        assert slow.tell().weight.item() == pytest.approx(want, abs=1e-6)
    other = grpo.Slow(policy)
    other.load(slow.state())
    assert close(other.tell().weight, slow.tell().weight) and ref.weight.item() == 1


def test_memories_of_eleven_steps(shared_bases, monkeypatch):
    """the slow copy has followed once, the usual spread is an average, the result of the last ten
    steps; --kernels reaches the kernels"""
    used = []
    monkeypatch.setattr(grpo.kernels, "use", used.append)
    run = Run(monkeypatch, merged(
        "--config", "care,tiny", "--steps", "11", "--prompts", "2", "--samples", "2", "--filter",
        "steady", "--minibatches", "1", "--max_new", "6", "--eval_prompts", "1", "--eval_samples",
        "2", "--eval_every", "11", "--save_every", "11", "--kernels", "torch", "--lr", "1e-2"))
    assert used[-1] == "torch"                                   # the last: not that of a base
    for key in ("correct", "entropy", "length", "kl", "generated"):
        assert run.out[f"train_{key}"] == pytest.approx(
            statistics.fmean(row[key] for row in run.log[1:] if key in row))
    assert [k for k, row in enumerate(run.log) if "kl" in row] == [0, 5, 10]   # nobody asks for it
    start, moved = run.ref.state_dict(), run.weights[10].state_dict()
    for key, slow in run.state["memories"]["slow"].items():
        assert close(slow, start[key] + 0.005 * (moved[key] - start[key]), 1e-6)
    usual = []
    for step in range(11):
        spread = float(run.seen(step).of_round("consistent").std(1).mean())
        usual.append(spread if step < 6 else 0.99 * usual[-1] + 0.01 * spread)
    assert close(run.state["memories"]["usual"], usual, 1e-5)
    assert [call.usual for call in run.of("steady")] == pytest.approx([0] * 10 + usual[9:10])


@pytest.mark.parametrize("asked, steps", [
    ([], [1, 4]), (["--kl_reward", "0.05"], [1, 2, 3, 4]), (["--penalty", "k3"], [1, 2, 3, 4])])
def test_the_reference_is_asked_where_its_log_probs_are_read(shared_bases, asked, steps):
    grpo.main(merged("--config", "tiny", "--prompts", "2", "--samples", "2", "--minibatches", "1",
                     "--max_new", "4", "--eval_prompts", "1", "--eval_samples", "1", "--out",
                     "run", *asked))
    log = [row for row in read_log("run") if "entropy" in row]
    assert [row["step"] for row in log] == [1, 2, 3, 4]
    assert [row["step"] for row in log if "kl" in row] == steps


def test_steady_groups_are_those_of_the_usual_spread():
    """the filter's rule reads shaped rewards, the usual spread and its share of it"""
    score = torch.tensor([[0., 2], [0, 1], [.7, .7]])
    roll = Rollout(*(torch.zeros(6, 2) for _ in range(3)),
                   torch.ones(6), torch.ones(6) > 0)
    groups = dict(score=0 * score, shaped=score, problems=[*"abc"], posed=[*"aabbcc"],
                  texts=[""] * 6, roll=roll, ref=SimpleNamespace(
                      config=SimpleNamespace(pad_token_id=0)))
    batch, seen = grpo.steady(iter([groups]), 3, 1.0, ratio=.6)
    assert batch["problems"] == ["a", "b"] and seen["problems"] == [*"abc"]
    batch, _ = grpo.mixed_shaped(iter([groups]), 3)
    assert batch["problems"] == ["a", "b"] and batch["passed"] == 2
    assert grpo.mixed(iter([groups]), 3, rounds=1)[0]["passed"] == 0


# --- LatentSeek -----------------------------------------------------------------------------------


def test_a_response_goes_on_greedily(small):
    model, tok, c = small
    prompt = tok.prompt("1+1?")
    ids, text, done = grpo.go_on(model, prompt, [], tok, c)
    whole = grpo.generate(model, [prompt], 16, temperature=0.0)
    assert ids == whole.completions()[0] and done == bool(whole.finished)
    assert text == tok.decode(ids)
    start = tok.encode("+1=2")
    ids, text, done = grpo.go_on(model, prompt, start, tok, c)
    rest = grpo.generate(model, [prompt + start], 12, temperature=0.0)
    assert ids == start + rest.completions()[0] and text == tok.decode(ids)
    assert grpo.go_on(model, prompt, [*start, tok.eos, 7], tok, c) == (start, "+1=2", True)


def test_the_reward_of_a_search_by_hand():
    task, p = tasks.task("chain"), dict(prompt="1+1?", answer="2", seed=0)
    assert grpo.reward_of("oracle", p, "####2", True, task) == 0
    assert grpo.reward_of("oracle", p, "####3", True, task) == -1
    for text, done, held in (("+1=2####2", True, 5), ("+1=2####2", False, 4), ("####2", True, 4),
                             ("+1=3####2", True, 3)):
        assert grpo.reward_of("self", p, text, done, task) == pytest.approx(held / 5 - 1), text


def test_a_search_pushes_its_first_tokens_down(small, monkeypatch):
    """by Adam's first step, lr in every coordinate, up the loss R Σ log p of what they are now"""
    model, tok, c = small
    p, task = dict(prompt="1+1?", answer="2", seed=0), tasks.task("chain")
    states, starts = torch.randn(2, model.config.hidden_size, generator=torch.Generator()
                                 .manual_seed(0)), []
    monkeypatch.setattr(grpo, "go_on", lambda model, prompt, start, tok, c:
                        starts.append((prompt, start)) or (start, "####3", False))
    known = dict(c=c, tok=tok, task=task)
    got = {how: grpo.sought(model, p, states, ("####3", True), how, known, rounds=1, lr=3.0)
           for how in ("oracle", "self", "random")}
    assert set(got.values()) == {("####3", False)}
    z = states.clone().requires_grad_()
    logp = model.logits(z).log_softmax(-1)
    slope, = torch.autograd.grad(logp.max(-1).values.sum(), z)
    down = states - 3 * slope.sign()                             # R < 0: away from its own tokens
    wild = states - 3 * torch.randn(2, len(states[0]), generator=torch.Generator()
                                    .manual_seed(c.seed)).sign()
    want = [model.logits(x).argmax(-1).tolist() for x in (down, down, wild)]
    assert [start for _, start in starts] == want and want[0] != want[2]
    assert {tuple(prompt) for prompt, _ in starts} == {tuple(tok.prompt(p))}
    for text, how in (("+1=2####2", "self"), ("####2", "oracle")):
        assert grpo.sought(model, p, states, (text, True), how, known) == (text, True)
    assert len(starts) == 3                                      # enough: no round was made
    grpo.sought(model, p, states, ("####2", True), "self", known, rounds=1)     # -.2 is not enough
    grpo.sought(model, p, states, ("####3", True), "oracle", known, rounds=4)
    assert len(starts) == 8


def test_latentseek_starts_from_the_greedy_response(shared_bases, monkeypatch):
    """and trains nothing: --config latentseek tells the accuracy before and after the search"""
    calls = catch(monkeypatch, grpo, "sought", "go_on")
    monkeypatch.setattr(tasks.Chain, "reward", lambda self, problem, completion, finished=True:
                        coin(problem, completion, finished))
    out = grpo.main(merged("--config", "latentseek,tiny", "--steps", "0", "--seek", "3",
                           "--eval_prompts", "2", "--out", "run"))
    task = tasks.task("chain")
    problems = task.problems("val", 3, 0)
    greedy = [x for x in calls["go_on"] if x.start == []]
    assert [x.problem for x in calls["sought"]] == [p for p in problems for _ in range(3)]
    for p, first, *found in zip(problems, greedy, *(calls["sought"][i::3] for i in range(3))):
        ids, text, done = first.out
        m = max(1, len(ids) // 5)
        for how, call in zip(("self", "oracle", "random"), found, strict=True):
            assert (call.how, call.first, len(call.states)) == (how, (text, done), m)
            prompt = load(grpo.sft.base("chain", like="tiny"))[1].prompt(p)
            hidden = call.model(torch.tensor([[*prompt, *ids]]))[0]
            assert close(call.states, hidden[len(prompt) - 1:len(prompt) - 1 + m], 1e-5)
            assert call.model.logits(call.states).argmax(-1).tolist() == ids[:m]
    for how in ("self", "oracle", "random"):
        ends = [(x.problem, *x.out) for x in calls["sought"] if x.how == how]
        assert out[f"seek_{how}"] == pytest.approx(statistics.fmean(
            task.reward(*end) for end in ends))
    start = [task.reward(p, *x.out[1:]) for p, x in zip(problems, greedy)]
    assert out["seek_start"] == pytest.approx(statistics.fmean(start))
    assert out["seek_oracle"] >= out["seek_start"]
    assert not [row for row in read_log("run") if "correct" in row]
    assert {out[k] - out[f"sft_{k}"] for k in ("val_greedy", "val_accuracy")} == {0}
