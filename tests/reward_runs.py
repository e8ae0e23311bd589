"""Tiny runs of reward.py, each made once a session, and what reached the functions of a run beside
what should have: the same quantities computed apart, from the weights at that moment and the
rows."""
import os
import re
from functools import partial
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from conftest import merged
from wiring import catch

import data.run
import reward
import sft
from data import prefs, tasks
from data.prefs import Ring, ToyIF
from model import ScalarModel
from reward import LOSSES, PRESETS, RECIPES

T = torch.tensor

# --- what a loss should be given, a row at a time -------------------------------------------------


def states(model, ids):
    """The body's hidden state after each of some ids.   [T, D]"""
    body = model.model if isinstance(model, ScalarModel) else getattr(model, "body", model)
    return body(T([ids]))[0].float()


def score(model, r, side):
    """A reward model's score of one response."""
    return (states(model, [*r["prompt"], *r[side]])[-1] * model.score.weight[0]).sum()


def scores_of(model, rows, side):
    """score() of many, in one pass.   [N]"""
    ids = [T([*r["prompt"], *r[side]]) for r in rows]
    h = model.model(torch.nn.utils.rnn.pad_sequence(ids, batch_first=True)).float()
    last = torch.stack([x[len(y) - 1] for x, y in zip(h, ids)])
    return (last * model.score.weight[0]).sum(1)


def logps(model, r, side):
    """The log-probabilities of one response's tokens."""
    n, ids = len(r["prompt"]), [*r["prompt"], *r[side]]
    logits = model.logits(states(model, ids)).float()
    return torch.log_softmax(logits[n - 1:-1], -1).gather(1, T(ids[n:])[:, None])[:, 0]


def bounded(W, u, steps):
    """W with spectral norm at most 1, the norm by `steps` of power iteration."""
    for _ in range(steps):
        u = F.normalize(W @ F.normalize(W.T @ u, dim=0), dim=0)
    return W / (W.T @ u).norm().clamp(min=1)


def features(pm, ids, steps=0):
    """φ of a pair."""
    h = states(pm, ids)[-1]
    if not pm.features:
        return h
    if isinstance(pm.pool, torch.nn.Linear):
        h = bounded(pm.pool.weight, pm.u, steps) @ h + pm.pool.bias
    return (2 / len(pm.W)) ** .5 * torch.cos(pm.W @ h + pm.b)


def given(name):
    """What a row itself holds."""
    return lambda model, r: T(r[name])


ORACLE = dict(
    chosen=lambda model, r: score(model, r, "chosen"),
    rejected=lambda model, r: score(model, r, "rejected"),
    chosen_logp=lambda model, r: logps(model, r, "chosen").sum(),
    rejected_logp=lambda model, r: logps(model, r, "rejected").sum(),
    predicted=lambda model, r: model.ratings.weight @ states(model, r["prompt"] + r["answer"])[-1],
    logp=lambda model, r: logps(model, r, "answer"),
    identifiers=lambda model, r: model.logits(states(model, r["prompt"])[-1])[r["identifier_ids"]],
    logit=lambda model, r: features(model, r["pair"], 1) @ model.w,
    strength=given("strength"), tie=given("tie"), ratings=given("ratings"), ranks=given("ranks"),
    label=given("label"), love=given("love"), kept=given("kept"),
    reaction=lambda model, r: score(model, r, "answer"))
APART = {"early", "late", "wrong"}                       # of a draw: see the test of goal's states
NAMED = {*LOSSES, "regression", "nll", "listwise", "preference", "autoregressive", "bt_scaled",
         "bce_love"}
FEW, SKIP = 3, 3             # passes of a fit, and every how many rows, that are computed apart


@torch.no_grad()
def apart(name, call):
    """A pass of the model, and what its loss should be given: {argument: [one of each row]}."""
    if name == "fit":
        begins = {k: x.detach().clone() for k, x in call.model.state_dict().items()}
        STEPS.append(SimpleNamespace(fit=call, begins=begins, passes=[], losses=[]))
    elif name == "provide" and len(STEPS[-1].passes) < FEW:
        call.want = {k: [ORACLE[k](call.model, r) for r in call.rows[::SKIP]]
                     for k in call.names if k in ORACLE}
        STEPS[-1].passes.append(call)
    elif name in NAMED and STEPS and len(STEPS[-1].losses) < len(STEPS[-1].passes):
        STEPS[-1].losses.append(call)                    # and not what it calls in its turn


WATCHED = ("fit", "provide", "regression", "nll", "listwise", "preference", "autoregressive",
           "bt_scaled", "goal_states", "evaluate", "best_ridge", "train_gate", "standardised",
           "combined", "samples_of", "generate", "ROUTERS", "assign", "rl", "sampled_pairs",
           "both_orders", "pairs_against", "steer", "referred", "struck", "adversarial",
           "findings", "scored_samples", "rubric_votes", "write_rubrics",
           "pair_accuracy", "bce_love")
STEPS = []

# --- the runs -------------------------------------------------------------------------------------

ARMS = {"bt_rubrics", "big_router", "filler_style", "direct_style", "bt_style"}    # of claims
METHODS = sorted({"bt", *RECIPES, *LOSSES, *(p for p in PRESETS if p not in ARMS)}
                 - {"ring", "toyif", "tiny", "lora"})           # worlds, size, and test_adapters.py
SIZES = dict(
    advrm="--attack_steps 1 --rl_steps 1 --rounds 1 --prompts 32",
    polar="--pretrain 64 --labels 32",
    overopt="--members 2 --rl_steps 2 --samples 512 --prompts 2", router="--features 64 --rivals 2",
    maxmin="--rounds 2", thinkrm="--votes 2 --rl_steps 2", rmr1="--votes 2 --rl_steps 2",
    rubrics="--votes 2",
    ensemble="--members 2", armo="--gate_steps 5")


@pytest.fixture(scope="session")
def runs(tmp_path_factory):
    """Where ran() keeps its runs: bases may outlast the session, runs may not."""
    RAN.setdefault("", tmp_path_factory.mktemp("ran"))


@pytest.fixture
def quick(workdir, bases_folder, runs, monkeypatch):
    """Bases that last for the session, of few rows and so in a folder of their own, and an
    evaluation of a few samples, without pictures."""
    few_rows = bases_folder.with_name(f"{bases_folder.name}-few")
    few_rows.mkdir(exist_ok=True)
    (workdir / "out").mkdir()
    (workdir / "out" / "sft").symlink_to(few_rows, target_is_directory=True)
    for module, name, small in (
            (reward, "study", dict(prompts=4, n=32)), (reward, "attacks", dict(search=4, test=8)),
            (reward, "null_attack", dict(iterations=5)), (prefs, "rubric_tests", dict(n=20))):
        monkeypatch.setattr(module, name, partial(getattr(module, name), **small))
    for module, name in ((reward, "draw_evaluation"), (data.run, "draw")):
        monkeypatch.setattr(module, name, lambda *a: None)

    def few(cls, name, most=64):
        real = getattr(cls, name)
        monkeypatch.setattr(cls, name, lambda self, *a, **k: real(
            self, *(min(x, most) if type(x) is int else x for x in a), **k))
    for cls in (Ring, ToyIF, prefs.Checks, tasks.ParityJudge):
        few(cls, "problems")
    few(Ring, "pairs")
    few(ToyIF, "pairs")
    base = sft.base  # polar's early checkpoints: 5 and 15 steps
    monkeypatch.setattr(sft, "base", lambda *a, steps=0, **k: base(*a, **k | (
        dict(steps=steps // 10) if steps else {})))


def tiny(config, out, *extra):
    sizes = "" if "bt_rubrics" in config else SIZES.get(config.split(",")[0], "")
    rows = [] if config == "polar" else ["--rows", "64"]         # it has two numbers of its own
    return reward.main(merged("--config", f"{config},tiny", *rows, "--out", out, *sizes.split(),
                              *extra))


RAN, CALLS = {}, {}


def ran(config, *extra):
    """The result of a tiny run, made once, and its folder, where every test finds it; what reached
    the functions of WATCHED meanwhile is CALLS[folder]."""
    folder = os.path.join(RAN[""], re.sub(r"\W+", "-", " ".join([config, *extra])))
    if folder not in RAN:
        with pytest.MonkeyPatch.context() as patch, torch.enable_grad():
            STEPS.clear()
            calls = catch(patch, reward, "LOSSES", *WATCHED, see=apart)
            RAN[folder] = tiny(config, folder, *extra)
        CALLS[folder] = SimpleNamespace(**{k: calls[k] for k in WATCHED}, steps=[*STEPS])
    return RAN[folder], folder
