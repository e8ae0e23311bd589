"""reward.py: what reaches the functions of every recipe in its own run, beside the same computed
apart; what the runs say, from the checkpoints that they leave."""
import copy
import math
import os
import re
import statistics
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from conftest import close
from reward_runs import (APART, CALLS, METHODS, ORACLE, SKIP, features, logps, quick, ran, runs,
                         score, scores_of, states)
from safetensors.torch import load_file

import reward
import sft
from data import prefs, tasks
from data.prefs import Ring, StrongJudge, ToyIF, ring_tokenizer, tokenizer
from data.run import needs, read_log
from data.stats import auroc, best_of_n, spearman
from model import generate, load
from optim import optimiser

T = torch.tensor
RING, TOYIF, RTOK, TTOK = Ring(), ToyIF(), ring_tokenizer(), tokenizer()


def calls_of(config, *extra):
    return CALLS[ran(config, *extra)[1]]


# --- the losses -----------------------------------------------------------------------------------


@pytest.mark.parametrize("config", METHODS)
def test_a_loss_is_given_what_it_names(config, quick):
    """of the rows at hand and the weights as they are, before and after the first step"""
    steps = calls_of(config).steps
    assert steps and all(x.passes for x in steps)
    for x in steps:
        for call in x.passes:
            assert {*call.names} == {*call.out} and {*call.names} <= {*ORACLE} | APART
            for name, want in call.want.items():
                if name == "logp":                       # [B, T], on the answer's tokens
                    for row, r, y in zip(call.out[name][::SKIP], call.rows[::SKIP], want):
                        n = len(r["prompt"])
                        assert close(row[n:n + len(y)], y, 1e-4) and row[:n].abs().sum() == 0
                        assert row[n + len(y):].abs().sum() == 0
                else:
                    assert close(call.out[name][::SKIP], torch.stack(want), 1e-4), name
        for call, loss in zip(x.passes, x.losses):       # and it arrives under its name
            assert all(torch.equal(getattr(loss, k), call.out[k]) for k in call.names)
    if config != "thinkrm":
        assert all(len(x.losses) == len(x.passes) for x in steps)


UNITS = dict(ratings=lambda rows: sum(math.isfinite(x) for r in rows for x in r["ratings"]),
             logp=lambda rows: sum(len(r["answer"]) for r in rows))


@pytest.mark.parametrize("config", ["bt", "scaled", "win_tie", "regression", "arm", "first",
                                    "judge_lora", "router"])
def test_the_step_s_loss_is_the_sum_over_its_units(config, quick):
    """rows; labels of a rater; tokens of a judge, but rows of a listwise one"""
    calls, (_, folder) = calls_of(config), ran(config)
    x = calls.steps[0]
    few = x.losses[:math.ceil(16 / x.fit.c.micro)]       # of the first step
    rows = [r for call in x.passes[:len(few)] for r in call.rows]
    assert len(rows) == 16
    names = x.passes[0].names
    unit = next((UNITS[k] for k in names if k in UNITS and "ranks" not in names), len)(rows)
    key = f"{x.fit.name} loss".strip()
    told = next(row[key] for row in read_log(folder) if key in row)
    assert told == pytest.approx(sum(loss.out.sum().item() for loss in few) / unit, rel=1e-4)


def test_the_loop_is_plain_adamw_on_the_mean_loss():
    """by hand: order of rows, gradient and its clip, warmup and fall of the rate, metrics"""
    c = reward.Config(device="cpu", dtype="float32", micro=3, batch=5, lr=1e-2, warmup=2, clip=.05,
                      weight_decay=.1)
    rows = prefs.encode_pairs(Ring.pairs(RING, 10), RTOK, 96)
    body = reward.init(reward.preset("1x32", RTOK, 96))
    one, two = reward.new_scalar(body, 3), reward.new_scalar(body, 3)
    log = []
    run = SimpleNamespace(at=5, log=lambda step, **k: log.append((step, k)))
    assert reward.fit(one, rows, reward.bt, c, run, RTOK, seed=7, steps=4, name="x")
    opt = optimiser(two, reward.RULES["adamw"], c.lr, .1, 7, aux_lr=c.aux_lr)
    for step, rate in enumerate((.5, 1, 1, .5)):         # of lr: up in two, down to 0
        picked = [rows[i] for i in reward.batch_indices(10, 5, step, 7).tolist()]
        win, lose = (torch.stack([score(two, r, side) for r in picked])
                     for side in ("chosen", "rejected"))
        loss = -torch.nn.functional.logsigmoid(win - lose).mean()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(two.parameters(), .05)
        said = log[step][1]
        assert log[step][0] == 6 + step
        assert said["x loss"] == pytest.approx(loss.item(), rel=1e-4)
        assert said["x norm"] == pytest.approx(norm.item(), rel=1e-3) and norm > .05
        last = slice(3, 5)                               # the micro-batch at hand: two rows
        assert said["x gap"].item() == pytest.approx((win - lose)[last].mean().item(), abs=1e-4)
        assert said["x accuracy"] == (win > lose)[last].float().mean()
        spread = (win[3] - win[4]).abs() / 2
        assert said["x score_std"].item() == pytest.approx(spread.item(), abs=1e-4)
        reward.set_lr(opt, c.lr * reward.linear(step, 4, 2))
        assert reward.linear(step, 4, 2) == pytest.approx(rate)
        opt.step()
        opt.zero_grad()
    assert all(close(a, b, 2e-4) for a, b in zip(one.state_dict().values(),
                                                 two.state_dict().values()))
    assert run.at == 9


def test_a_new_head_is_small_and_random():
    body = reward.init(reward.preset("1x32", RTOK, 96))
    one, two, same = (reward.new_scalar(body, seed).score.weight for seed in (1, 2, 1))
    assert torch.equal(one, same) and not torch.equal(one, two)
    assert torch.stack([one, two]).std().item() == pytest.approx(33 ** -.5, rel=.3)


@torch.no_grad()
def test_goal_draws_from_the_states_of_both_responses(quick):
    calls = calls_of("goal")
    x = calls.steps[0]
    for call, drawn in zip(x.passes[:2], calls.goal_states):     # before the first step
        rows = [(r, side) for side in ("chosen", "rejected") for r in call.rows]
        for i, (r, side) in enumerate(rows):
            n, m = len(r["prompt"]), len(r[side])
            assert (drawn.start[i], drawn.n[i]) == (n, m)
            assert drawn.hidden[i, n + m:].shape[0] == drawn.hidden.shape[1] - n - m
        assert len(drawn.hidden) == len(rows) and drawn.draws == 16
        for k in ("early", "late", "wrong"):
            assert torch.equal(call.out[k], drawn.out[k])


FROM = dict(hs2pref=["", "regression"], polar=["", "pretrained", ""], overopt=[], thinkrm=[],
            rmr1=[], judge_lora=[])                      # the stage before; no list: another test


@pytest.mark.parametrize("config", [x for x in METHODS if FROM.get(x, [""])])
def test_a_model_starts_from_the_base_or_from_the_stage_before(config, quick):
    """body and, of a stage before, head; the base is the one of --init"""
    (_, folder), steps = ran(config), calls_of(config).steps
    for x, stage in zip(steps, FROM.get(config, [""] * len(steps)), strict=True):
        init = steps[0].fit.run.c.init if not stage else ""
        model = load(f"{folder}/{stage}" if stage else sft.find(init, "tiny"))[0]
        for k, w in model.state_dict().items():
            same = [v for name, v in x.begins.items() if name == k or name.endswith(f".{k}")]
            assert same and torch.equal(same[0], w) or k == "lm_head.weight" and not same, k


# --- the rows -------------------------------------------------------------------------------------


def check_pairs_of_texts(rows, tok, world, ties=False, wrong=0.0):
    """ids are those of the texts, EOS where finished; gold prefers what is chosen."""
    bad = 0
    for r in rows:
        text = r["text"]
        assert r["prompt"] == tok.prompt(text["prompt"])
        gold = []
        for side in ("chosen", "rejected"):
            done = text[f"{side}_finished"]
            assert r[side] == [*tok.encode(text[side]), *[tok.eos] * done]
            gold.append(world.reward(text, text[side], done))
        gap = gold[0] - gold[1]
        assert r["tie"] == (abs(gap) < 1e-6) and (ties or not r["tie"])
        low, high = world.terciles
        assert r["strength"] == 1 + (abs(gap) > low + 1e-9) + (abs(gap) > high + 1e-9)
        bad += gap < -1e-6
    assert bad <= wrong * len(rows)


def check_rated(rows, pairs, ratings):
    """Responses with their own ratings, all chosen ones first."""
    assert len(rows) == 2 * len(pairs)
    for i, r in enumerate(rows):
        text = pairs[i % len(pairs)]["text"]
        y = text["chosen" if i < len(pairs) else "rejected"]
        assert RTOK.decode(r["answer"]) == y and r["prompt"] == RTOK.prompt(text["prompt"])
        assert r["ratings"] == ratings(text["prompt"], y)
    assert len({tuple(r["ratings"]) for r in rows}) > 3


@pytest.mark.parametrize("config", ["bt", "win_tie", "regression", "hs2pref", "armo", "cdr", "arm",
                                    "ensemble", "overopt", "toyif"])
def test_a_model_learns_from_the_texts_and_their_labels(config, quick):
    world, tok = (TOYIF, TTOK) if config == "toyif" else (RING, RTOK)
    fits = [x.fit for x in calls_of(config).steps]
    plain = prefs.encode_pairs(Ring.pairs(RING, 64, 1000), RTOK, 96) if world is RING else []
    for call in fits:
        if "ratings" in needs(call.loss):
            rater = RING.helpfulness if config == "hs2pref" else RING.ratings
            check_rated(call.rows, plain, rater)
        else:
            check_pairs_of_texts(call.rows, tok, world, ties=config == "win_tie")
    assert len(fits) == dict(hs2pref=2, ensemble=2, overopt=2).get(config, 1)
    assert config != "win_tie" or any(r["tie"] for r in fits[0].rows)
    assert len({call.seed for call in fits}) == (2 if config in ("ensemble", "overopt") else 1)


def test_the_router_learns_both_orders_with_their_labels(quick):
    rows, right = calls_of("router").steps[0].fit.rows, 0
    assert len(rows) == 2 * 64 and [r["label"] for r in rows] == [1.0, 0.0] * 64
    for r, other in zip(rows[::2], rows[1::2]):
        x, _, ab = TTOK.decode(r["pair"]).partition("=A")
        a, _, b = ab.partition("B")
        assert TTOK.decode(other["pair"]) == f"{x}=A{b}B{a}" and r["pair"][-1] == TTOK.eos
        gap = TOYIF.judge(f"{x}=", a)["gold"] - TOYIF.judge(f"{x}=", b)["gold"]
        right += gap > 0
        low, high = TOYIF.terciles
        assert r["strength"] == other["strength"] == 1 + (abs(gap) > low) + (abs(gap) > high)
        assert {h for h, _ in prefs.parse(f"{x}=")[1]} <= set("FLH")
    assert 54 < right < 64                                       # a twentieth is flipped


def test_a_pointwise_judge_learns_levels_of_gold(quick):
    """the lowest letter is the lowest level"""
    letters = list(prefs.SCORES.values())
    for r in calls_of("judge_lora").steps[0].fit.rows:
        x, _, y = TTOK.decode(r["prompt"]).partition("=")
        level = round(TOYIF.judge(f"{x}=", y[:-1])["gold"] / 1.5 * 6)
        assert y[-1] == "!" and TTOK.decode(r["answer"]) == letters[level]


def test_a_listwise_judge_learns_the_ranking_by_gold(quick):
    for r in calls_of("first").steps[0].fit.rows:
        x, _, rest = TTOK.decode(r["prompt"]).partition("=")
        ys = re.split("[1234]", rest[:-1])[1:]
        gold = [TOYIF.judge(f"{x}=", y)["gold"] for y in ys]
        assert close(gold, r["gold"], 1e-5) and rest[-1] == "!"
        order = [int(d) - 1 for d in TTOK.decode(r["answer"])]
        assert r["answer"][-1] == TTOK.eos and sorted(order) == [0, 1, 2, 3]
        assert all(gold[a] >= gold[b] - 1e-9 for a, b in zip(order, order[1:]))
        assert r["ranks"] == [order.index(k) + 1 for k in range(4)]
        assert r["identifier_ids"] == [TTOK.encode(d)[0] for d in "1234"]


def test_a_rubric_s_judge_learns_the_better_response(quick):
    agree = []
    for r in calls_of("rubrics").steps[0].fit.rows:
        x, _, rest = TTOK.decode(r["prompt"]).partition("=")
        a, _, b = rest.partition("/A")[2].rstrip("?").partition("B")
        gold = [TOYIF.judge(f"{x}=", y)["gold"] for y in (a, b)]
        assert r["answer"][-1] == TTOK.eos
        agree.append((prefs.parse_winner(TTOK.decode(r["answer"])) == "A") == (gold[0] > gold[1]))
    assert statistics.fmean(agree) > .7                          # some prefer what is longer


@pytest.mark.parametrize("config", ["thinkrm", "rmr1"])
def test_a_judge_that_thinks_learns_the_label_of_its_pair(config, quick):
    rows = calls_of(config).steps[0].fit.rows
    for r in rows:
        text = TTOK.decode(r["prompt"])
        label = tasks.judging(*(text[i:-1:3] for i in range(3)))["label"]
        said = TTOK.decode(r["answer"])
        assert tasks.ParityJudge.parse(said) == label and r["answer"][-1] == TTOK.eos
        assert said.startswith("?")                              # it thinks first
    assert len({len(r["answer"]) for r in rows}) > 1


# --- what the runs come to ------------------------------------------------------------------------


def base_of(config):
    return load(sft.base("ring" if config != "toyif" else "toyif_base", like="tiny"))[0]


def gated(folder):
    """ArmoRM's score of one response, from what lies beside the body."""
    body, own = load(f"{folder}/body")[0], load_file(f"{folder}/body/armo.safetensors")

    def of(r, side):
        h, x = states(body, [*r["prompt"], *r[side]])[-1], states(body, r["prompt"])[-1]
        for k in (0, 2, 4, 6):
            x = own[f"gate.mlp.{k}.weight"] @ x + own[f"gate.mlp.{k}.bias"]
            x = x.relu() if k < 6 else x
        return (torch.softmax(x / 10, 0) * own["gate.scale"] * (own["ratings"] @ h)).sum()
    return of


def members(folder, calls, how):
    """Members less their mean, over their std, on samples of the SFT model; then how they agree."""
    models = [load(f"{folder}/member-{i}")[0] for i in range(2)]
    roll, base = calls.standardised[0].roll, base_of("ring")
    rows = [dict(prompt=x[:n], y=x[n:n + m]) for x, n, m in zip(
        roll.tokens.tolist(), roll.prompt_len.tolist(), roll.mask.sum(1).int().tolist())]
    assert close(logps(base, rows[0], "y"), roll.logp[0][roll.mask[0] > 0], 1e-3)
    raw = torch.stack([scores_of(m, rows, "y") for m in models])
    mu, sd = raw.mean(1), raw.std(1)
    return lambda r, side: how((torch.stack([score(m, r, side) for m in models]) - mu) / sd)


def scalar_at(name=""):
    return lambda folder, calls: partial(score, load(os.path.join(folder, name))[0])


def density(folder, calls):
    strong, base = load(f"{folder}/strong")[0], base_of("ring")
    return lambda r, side: (logps(strong, r, side) - logps(base, r, side)).sum()


def likelihood(folder, calls):
    model = load(folder)[0]
    return lambda r, side: logps(model, r, side).sum()


REWARDS = dict(
    bt=scalar_at(), goal=scalar_at(), toyif=scalar_at(), hs2pref=scalar_at("final"), arm=likelihood,
    regression=scalar_at(), armo=lambda folder, calls: gated(folder), cdr=density,
    ensemble=lambda folder, calls: members(folder, calls, lambda z: z.mean()))


@pytest.mark.parametrize("config", REWARDS)
@torch.no_grad()
def test_the_reward_that_is_evaluated_is_that_of_the_checkpoint(config, quick):
    """on held-out pairs, labelled by gold; and the policy whose samples it scores is --init"""
    (out, folder), calls = ran(config), calls_of(config)
    call, of = calls.evaluate[0], REWARDS[config](folder, calls)
    world, tok = (TOYIF, TTOK) if config == "toyif" else (RING, RTOK)
    assert [*call.sets] == ["val", "ood"]
    for split, rows in call.sets.items():
        check_pairs_of_texts(rows, tok, world)
        assert [r["text"] for r in rows] == world.pairs(64, 0, split)
    rows, got = call.sets["val"], {}
    for side in ("chosen", "rejected"):
        want = torch.stack([of(r, side) for r in rows[:12]])
        got[side] = reward.score_rows(call.reward, rows, side, call.c, 0)
        assert close(got[side][:12], want, 2e-3) and want.std() > 1e-4
    assert out["val_accuracy"] == pytest.approx(
        (got["chosen"] > got["rejected"]).float().mean().item(), abs=1e-6)
    assert out["accuracy"] == pytest.approx((out["val_accuracy"] + out["ood_accuracy"]) / 2)
    base = base_of(config).state_dict()
    assert all(torch.equal(x, base[k]) for k, x in call.policy.state_dict().items())


@torch.no_grad()
def test_a_rater_s_score_is_the_fixed_combination_of_its_ratings(quick):
    """of all five, or of helpfulness alone"""
    for config, name, weights in (("regression", "", (.65, .8, .45, .55, -.4)),
                                  ("hs2pref", "regression", (1.0,))):
        (_, folder), x = ran(config), calls_of(config).steps[0]
        plain, r = load(os.path.join(folder, name))[0], x.fit.rows[0]
        assert x.fit.model.ratings.weight.shape[0] == len(weights)
        want = T(weights) @ (x.fit.model.ratings.weight
                             @ states(x.fit.model, r["prompt"] + r["answer"])[-1])
        assert close(score(plain, r, "answer"), want, 1e-4)


@torch.no_grad()
def test_armo_fits_ridge_and_gate_to_frozen_features(quick):
    """features at the last token of a response, ratings in [0, 1], the gate at the prompt's end"""
    (_, folder), calls = ran("armo"), calls_of("armo")
    body, both = load(f"{folder}/body")[0], calls.steps[0].fit.rows
    ridge, gate = calls.best_ridge[0], calls.train_gate[0]
    X = torch.stack([states(body, r["prompt"] + r["answer"])[-1] for r in both])
    assert close(ridge.X, X, 1e-4)
    assert close(ridge.Y, T([r["ratings"] for r in both]) / 4)
    W, v = ridge.out[0], 4
    penalty = reward.verbosity_penalties(X @ W.T, v)
    clean = torch.stack([w - p * W[v] for w, p in zip(W, penalty)])
    assert close(load_file(f"{folder}/body/armo.safetensors")["ratings"], clean, 1e-5)
    assert close(gate.gap, (X[:64] - X[64:]) @ clean.T, 1e-4)
    assert close(gate.at_prompt, torch.stack([states(body, r["prompt"])[-1] for r in both[:64]]),
                 1e-4)
    raw = calls_of("armo", "--train_raw", "true").train_gate[0]
    assert close(raw.gap, (X[:64] - X[64:]) @ W.T, 1e-4)


def test_a_gate_learns_which_rating_matters_where():
    """two attributes that pull apart, one of which is right on each kind of prompt"""
    torch.manual_seed(0)
    x = torch.randn(256, 4)
    kind = (x[:, 0] > 0).float()
    gap = torch.stack([2 * kind - 1, 1 - 2 * kind], 1)
    gate = reward.Gate(4, 2, 32)
    hand, c = copy.deepcopy(gate), SimpleNamespace(seed=0)
    few = copy.deepcopy(gate)
    reward.train_gate(few, x, gap, c, 3, 1e-2)
    opt = torch.optim.AdamW(hand.parameters(), lr=1e-2, weight_decay=0.0)
    for step in range(3):
        opt.param_groups[0]["lr"] = 1e-2 * (.05 + .95 * (1 + math.cos(math.pi * step / 3)) / 2)
        opt.zero_grad()
        torch.nn.functional.softplus(-(hand(x) * gap).sum(1)).mean().backward()
        opt.step()
    assert all(close(a, b, 1e-5) for a, b in zip(few.parameters(), hand.parameters()))
    reward.train_gate(gate, x, gap, c, 60, 1e-2)
    assert ((gate(x) * gap).sum(1) > 0).float().mean() > .9
    assert gate.scale > 1


@torch.no_grad()
def test_genarm_guides_the_sft_model_by_what_it_learned(quick):
    """π π_r of the base and the trained model, temperature 1 of the product; gold of its texts"""
    (out, folder), calls = ran("arm"), calls_of("arm")
    model, base = load(folder)[0], base_of("ring")
    guided, = (x for x in calls.generate if x.contrast)
    gold = []
    problems = RING.problems("val", 64, 0)
    roll = guided.out
    for i, p in enumerate(problems):
        n, m = int(roll.prompt_len[i]), int(roll.mask[i].sum())
        ids = roll.tokens[i, :n + m].tolist()
        assert ids[:n] == RTOK.prompt(p["prompt"])
        if i < 6:
            logits = [x.logits(states(x, ids)).float() for x in (base, model)]
            both = torch.log_softmax(sum(torch.log_softmax(x, -1) for x in logits), -1)
            want = both[n - 1:-1].gather(1, T(ids[n:])[:, None])[:, 0]
            assert close(roll.logp[i, n:n + m], want, 1e-3)
        done = ids[-1] == RTOK.eos
        gold.append(RING.reward(p, RTOK.decode(ids[n:n + m - done]), done))
    assert out["guided_gold"] == pytest.approx(statistics.fmean(gold), abs=1e-4)


def test_the_samples_that_are_scored_are_of_the_sft_model(quick):
    """held-out prompts of both splits, then one sample a prompt for the attacks"""
    drawn = calls_of("bt").samples_of
    assert [(x.samples, x.seed) for x in drawn] == [(32, 1), (32, 1), (1, 8)]
    for x, split in zip(drawn, ("val", "ood")):
        assert x.problems == RING.problems(split, 4)
        roll, base = x.out, base_of("ring")
        for i in (0, 40, 127):
            n, m = int(roll.prompt_len[i]), int(roll.mask[i].sum())
            ids = roll.tokens[i].tolist()
            assert ids[:n] == RTOK.prompt(x.problems[i // 32]["prompt"]) and m <= 24
            with torch.no_grad():
                want = logps(base, dict(prompt=ids[:n], y=ids[n:n + m]), "y")
            assert close(roll.logp[i, n:n + m], want, 1e-3)


# --- the router -----------------------------------------------------------------------------------


def stream():
    """The pairs that the router is tested on: rules seen, unseen, both."""
    pair = partial(TOYIF.pairs, mixture=prefs.ROUTING, min_gap=0.05)
    tests = dict(id=pair(64, seed=0, split="val", heads="FLH"),
                 ood=pair(64, seed=0, split="base", heads="N#", rules=(1,)),
                 mix=pair(64, seed=0, split="val", rules=(2,)))
    return tests, [r for some in tests.values() for r in some]


def test_the_router_reads_both_orders_of_a_pair_and_calibrates_them(quick):
    calls, (_, rows) = calls_of("router"), stream()
    pm = calls.steps[0].fit.model
    with torch.no_grad():
        phi = torch.stack([features(pm, r["pair"]) for r in calls.steps[0].fit.rows]).double()
        P, s, u = phi.T @ phi, [], []
        assert close(pm.P, P, 1e-3)
        inverse = torch.linalg.inv(P + 30 * torch.eye(64))
        for r in rows:
            f, v = [], []
            for a, b in (("chosen", "rejected"), ("rejected", "chosen")):
                ids = [*TTOK.prompt(f"{r['prompt']}A{r[a]}B{r[b]}"), TTOK.eos]
                x = features(pm, ids).double()
                v.append((1 + 10 * 30 * x @ inverse @ x).sqrt())
                f.append(x @ pm.w.double() / v[-1])
            s.append((f[0] - f[1]) / 2)
            u.append((v[0] + v[1]) / 2)
    s, u = torch.stack(s), torch.stack(u)
    assert all(close(a, b, 1e-4) for a, b in zip(calls.both_orders[0].out, (s, u)))


def test_the_router_s_numbers_are_those_of_its_classifier_and_judge(quick):
    """credit of model and judge; whom to ask first; each set's accuracy"""
    (out, _), calls, (tests, rows) = ran("router"), calls_of("router"), stream()
    s, u = calls.both_orders[0].out
    judge, right = StrongJudge(TOYIF, .1), (s > 0).float()
    judged = T([{1: 1.0, 2: 0.0, 0: .5}[judge.judge(r["prompt"], r["chosen"], r["rejected"])]
                for r in rows])
    rivals = torch.stack([x.out[0] for x in calls.both_orders[1:]])
    assert len(rivals) == 2
    order = dict(uncertainty=u, margin=-s.abs(), both=-(s * u).abs(), oracle=1 - right,
                 ensemble=rivals.std(0))
    for name, x in order.items():
        for q in (0, .25, 1):
            for kind, part in (("", slice(None)), ("ood_", slice(64, 128))):
                first = set(x[part].argsort(descending=True)[:round(q * len(x[part]))].tolist())
                credit = [j if i in first else k for i, (k, j) in enumerate(
                    zip(right[part].tolist(), judged[part].tolist()))]
                assert out[f"{name}|{kind}accuracy@{q}"] == pytest.approx(
                    statistics.fmean(credit), abs=1e-5)
    for i, name in enumerate(tests):
        assert out[f"{name}_accuracy"] == pytest.approx(right[64 * i:64 * i + 64].mean().item())
    assert out["u_auroc"] == pytest.approx(auroc(u, right < 1))
    assert out["margin_auroc"] == pytest.approx(auroc(-s.abs(), right < 1))
    assert out["u_shift"] == pytest.approx((u[64:128].mean() - u[:64].mean()).item(), abs=1e-6)
    assert out["u_mean"] == pytest.approx(u.mean().item()) and out["judge_calls"] == 192
    assert out["random|accuracy@1"] == out["oracle|accuracy@1"] == pytest.approx(
        judged.mean().item())
    assert out["random|accuracy@0.25"] == pytest.approx(
        .75 * right.mean().item() + .25 * judged.mean().item(), abs=.03)


def test_the_kernel_s_width_is_the_median_distance_of_the_base(quick):
    calls = calls_of("router")
    pm, base = calls.steps[0].fit.model, load(sft.base("toyif_base", like="tiny"))[0]
    with torch.no_grad():
        h = torch.stack([states(base, r["pair"])[-1] for r in calls.steps[0].fit.rows[:256]])
    squares = ((h[:, None] - h) ** 2).sum(-1)[torch.triu(torch.ones(128, 128), 1) > 0]
    sigma = (2 / squares.sqrt().median() ** 2) ** .5
    assert pm.W.std() == pytest.approx(sigma.item(), rel=.05)
    g = torch.Generator().manual_seed(0)
    torch.randn(64, generator=g)
    assert close(pm.W, torch.randn(64, 64, generator=g) * sigma, 1e-3)


# --- systems that judge ---------------------------------------------------------------------------


@torch.no_grad()
def test_maxmin_puts_annotators_where_their_pairs_are_liked(quick):
    (out, folder), calls = ran("maxmin"), calls_of("maxmin")
    names = ["pooled", "round-0-group-0", "round-0-group-1", "round-1-group-0", "round-1-group-1"]
    pooled, models = load(f"{folder}/pooled")[0], [load(f"{folder}/{x}")[0] for x in names[3:]]
    rows = calls.steps[0].fit.rows
    kinds = {r["text"]["annotator"]: r["text"]["group"] == "B" for r in rows}
    assert [x.fit.name for x in calls.steps] == names
    own = [{r["annotator"] for r in x.fit.rows} for x in calls.steps[1:]]
    assert not own[0] & own[1] and own[0] | own[1] == kinds.keys()       # a partition by annotator
    before = calls.assign[0].out
    for u in (0, 1):                                     # and the next by whom the first suit
        theirs = {a for a in kinds if before[a] == u}
        assert own[2 + u] == (theirs or {*kinds})
    total = {a: [0.0, 0.0] for a in kinds}
    for u, m in enumerate(models):
        gaps = scores_of(m, rows, "chosen") - scores_of(m, rows, "rejected")
        for r, x in zip(rows, torch.nn.functional.logsigmoid(gaps).tolist()):
            total[r["annotator"]][u] += x
    group = {a: int(x[1] > x[0]) for a, x in total.items()}
    found = calls.assign[1].out
    assert all(found[a] == g for a, g in group.items())
    agree = statistics.fmean((group[a] == 1) == b for a, b in kinds.items())
    assert out["assignment"] == pytest.approx(max(agree, 1 - agree))
    mine, single, told = [], [], iter(calls.pair_accuracy)
    for b in (False, True):
        own = models[statistics.mode(group[a] for a, x in kinds.items() if x == b)]
        judge = Ring("B" if b else "A")
        test = prefs.encode_pairs(RING.pairs(64, seed=0, split="val", minority=float(b)), RTOK, 96)
        assert all(judge.reward(r["text"], r["text"]["chosen"])
                   > judge.reward(r["text"], r["text"]["rejected"]) for r in test)
        for model, to in ((own, mine), (pooled, single)):
            x = next(told)
            got = reward.score_rows(x.reward, test[:4], "chosen", x.c, 0)
            assert close(got, torch.stack([score(model, r, "chosen") for r in test[:4]]), 1e-4)
            assert [r["text"] for r in x.rows] == [r["text"] for r in test]
            gaps = scores_of(model, test, "chosen") - scores_of(model, test, "rejected")
            to.append((gaps > 0).float().mean().item())
    assert out["min_accuracy"] == pytest.approx(min(mine))
    assert out["pooled_min_accuracy"] == pytest.approx(min(single))


def test_the_worse_served_group_is_told(monkeypatch):
    """of the groups' own models, and of the single one"""
    body = reward.init(reward.preset("1x32", RTOK, 96))
    accuracies = iter((.6, .7, .8, .5))                  # A's own, the single on A; B's own, on B
    monkeypatch.setattr(reward, "trained", lambda run, name, model, *a, **k: model)
    monkeypatch.setattr(reward, "pair_accuracy", lambda *a: next(accuracies))
    base = SimpleNamespace(world=RING, policy=body, tok=RTOK, pad=0)
    c = SimpleNamespace(seed=0, device="cpu", dtype="float32", micro=64)
    run = SimpleNamespace(say=lambda line: None)
    every = Ring.pairs
    monkeypatch.setattr(Ring, "pairs", lambda self, n, **k: every(self, min(n, 60), **k))
    out = reward.maxmin(c, run, base, lambda rows: prefs.encode_pairs(rows, RTOK, 96), None, 60,
                        0.0, rounds=1)
    assert (out["min_accuracy"], out["pooled_min_accuracy"]) == (.6, .5)


@torch.no_grad()
def test_a_pointwise_judge_is_read_by_its_expected_level(quick):
    out, folder = ran("judge_lora")
    ids = [TTOK.encode(x)[0] for x in prefs.SCORES.values()]
    rows = prefs.encode_pairs(TOYIF.pairs(64, 0, "val"), TTOK, 32)
    for key, model in (("accuracy", load(f"{folder}/judge")[0]), ("off", base_of("toyif"))):
        level = {}
        for side in ("chosen", "rejected"):
            level[side] = []
            for r in rows:
                x = TTOK.prompt(r["text"]["prompt"] + r["text"][side] + "!")
                p = torch.softmax(model.logits(states(model, x)[-1])[ids].float(), 0)
                level[side].append((p * torch.arange(7.)).sum())
        want = (torch.stack(level["chosen"]) > torch.stack(level["rejected"])).float().mean()
        assert out[f"val_{key}"] == pytest.approx(want.item(), abs=.02)
    assert out["val_accuracy"] != out["val_off"]


@torch.no_grad()
def test_a_listwise_judge_is_read_at_its_first_token_and_by_what_it_writes(quick):
    (out, folder) = ran("first")
    model, _ = load(f"{folder}/judge")
    base = SimpleNamespace(tok=TTOK, world=TOYIF)
    rows = reward.lists(600, "val", 0, base, "1234")
    ids = [TTOK.encode(d)[0] for d in "1234"]
    first, wrote = [], []
    texts = generate(model, [r["prompt"] for r in rows], 5, temperature=0.0)
    for r, y, done in zip(rows, texts.completions(), texts.finished.tolist()):
        first.append(spearman(model.logits(states(model, r["prompt"])[-1])[ids], T(r["gold"])))
        text = (TTOK.decode(y) if done else "") + "1234"
        wrote.append(spearman(T([-text.index(d) for d in "1234"]), T(r["gold"])))
    assert out["first_spearman"] == pytest.approx(statistics.fmean(first), abs=.02)
    assert out["generated_spearman"] == pytest.approx(statistics.fmean(wrote), abs=.02)


def test_votes_are_for_the_response_that_was_shown_there(monkeypatch, quick):
    """a judge that always says A: +1 where chosen is A, -1 where it is B; no end, no vote"""
    rows = TOYIF.pairs(40)
    shown = []

    def says(text):
        def written(model, tok, prompts, c, **options):
            shown.append([tok.decode(x) for x in prompts])
            return [[text, ""]] * len(prompts)
        monkeypatch.setattr(reward, "written", written)
        c = SimpleNamespace(seed=3)
        rubric = {r["prompt"]: "Pm/" for r in rows}
        return reward.rubric_votes(None, rows, rubric, "id", TTOK, c, 2)
    votes, turned = says("Pm++("), says("Pm++)")
    for r, text, vote, other in zip(rows, shown[0], votes, turned):
        first = text.partition("/A")[2].startswith(f"{r['chosen']}B")
        assert vote == [1 if first else -1, None] and other == [-vote[0], None]
    assert {v[0] for v in votes} == {1, -1}


def test_a_judge_s_texts_are_its_samples_in_order(quick):
    """greedy texts are those of generate; '' where one has not ended; samples stand together"""
    model = load(sft.base("toyif_base", like="tiny"))[0]
    prompts = [TTOK.prompt(p["prompt"]) for p in TOYIF.problems("val", 20)]
    c = SimpleNamespace(seed=0, micro=2, device="cpu", dtype="float32")
    roll = generate(model, prompts, 3, temperature=0.0)
    want = [TTOK.decode(y) if done else "" for y, done in zip(roll.completions(),
                                                              roll.finished.tolist())]
    assert reward.written(model, TTOK, prompts, c, max_new=3) == [[x] for x in want]
    assert "" in want and any(want)
    twice = reward.written(model, TTOK, prompts, c, max_new=3, samples=2)
    assert twice == [[x, x] for x in want]
    drawn = reward.written(model, TTOK, prompts, c, max_new=3, samples=2, temperature=1.0)
    assert any(a != b for a, b in drawn)


# --- policies that are pushed, and those that push ------------------------------------------------


class Keeps:
    """An optimiser that only remembers the gradients of every step."""
    def __init__(self, model):
        self.model, self.steps, self.param_groups = model, [], [dict(lr=0.0)]

    def step(self):
        self.steps.append([p.grad.clone() for p in self.model.parameters() if p.grad is not None])

    def zero_grad(self):
        self.model.zero_grad()


def test_the_policy_gradient_by_hand(monkeypatch, quick):
    """advantages of score - β KL, k3 of the reference in the loss, a mean over tokens, the clip"""
    base = base_of("ring").requires_grad_(False)
    ref = copy.deepcopy(base)
    ref.layers[0].mlp.down_proj.weight.mul_(2)
    policy = copy.deepcopy(base).requires_grad_()
    keeps, rolls, rates, log = Keeps(policy), [], [], []
    monkeypatch.setattr(reward, "optimiser", lambda model, lr: keeps)
    monkeypatch.setattr(reward, "set_lr", lambda opt, lr: rates.append(lr))
    problems = RING.problems("train", 12)

    def judge(roll, picked):
        rolls.append((roll, picked))
        return roll.mask.sum(1) + (roll.tokens[:, -1] > 9), dict(gold=.5)
    c = SimpleNamespace(seed=4, device="cpu", dtype="float32", micro=3, clip=.2)
    run = SimpleNamespace(at=10, cut=lambda: None, log=lambda step, **k: log.append((step, k)))
    rows = reward.rl(policy, ref, RTOK, problems, judge, c, run, name="x", steps=2, max_new=5,
                     groups=3, samples=2, lr=1e-3, beta=.3, kl_loss=.7)
    assert rates == [1e-3, 5e-4] and [step for step, _ in log] == [11, 12] and run.at == 12
    twin = copy.deepcopy(base).requires_grad_()
    for step, (roll, picked) in enumerate(rolls):
        where = reward.batch_indices(12, 3, step, 4).tolist()
        assert picked == [problems[i] for i in where] and len(roll.tokens) == 6
        losses, scores, kls, k = [], [], [], []
        for i in range(6):
            n, m = int(roll.prompt_len[i]), int(roll.mask[i].sum())
            ids = roll.tokens[i].tolist()
            r = dict(prompt=ids[:n], y=ids[n:n + m])
            assert r["prompt"] == RTOK.prompt(picked[i // 2]["prompt"])
            mine, theirs = logps(twin, r, "y"), logps(ref, r, "y").detach()
            kls.append((mine - theirs).sum().item())
            k.append((mine, theirs))
            scores.append(m + (ids[-1] > 9) - .3 * kls[-1])
        for i, (mine, theirs) in enumerate(k):
            adv = scores[i] - scores[i ^ 1]              # RLOO of two
            d = theirs - mine
            losses.append((-adv * mine + .7 * (d.exp() - 1 - d)).sum())
        twin.zero_grad()
        (sum(losses) / roll.mask.sum()).backward()
        norm = torch.nn.utils.clip_grad_norm_(twin.parameters(), .2)
        want = [p.grad for p in twin.parameters() if p.grad is not None]
        assert all(close(a, b, 1e-4) for a, b in zip(keeps.steps[step], want))
        row = rows[step]
        kl = statistics.fmean(kls)
        assert row["kl"] == pytest.approx(kl, abs=1e-3) and abs(kl) > 2e-3
        assert row["norm"] == pytest.approx(norm.item(), rel=1e-3) and row["norm"] > .2
        assert row["length"] == roll.mask.sum(1).mean() and row["gold"] == .5
        assert row["reward"] == pytest.approx((roll.mask.sum(1) + (roll.tokens[:, -1] > 9)
                                               ).mean().item())
        assert log[step][1] == {f"x {key}": v for key, v in row.items()}


def test_a_pushed_policy_s_reward_is_the_reward_less_what_never_ends(quick):
    """gold is told beside it; KL is to the policy that it began as"""
    calls = calls_of("overopt")
    assert [x.name for x in calls.rl] == ["single", "mean", "wco", "uwo"]
    for push, call in zip(calls.steer, calls.rl):
        roll = generate(call.ref, [RTOK.prompt(p) for p in call.problems[:8]], 9, samples=2,
                        generator=torch.Generator().manual_seed(3))
        assert 0 < roll.finished.float().mean() < 1
        got, told = call.reward(roll, call.problems[:8])
        proxy = reward.score_roll(lambda *x: push.reward(roll, call.problems[:8]), roll)
        assert close(got, proxy - push.no_eos * (~roll.finished).float(), 1e-4)
        ended = zip(roll.completions(), roll.finished.tolist())
        gold = [RING.reward(call.problems[i // 2], RTOK.decode(y), d)
                for i, (y, d) in enumerate(ended)]
        assert told["gold"] == pytest.approx(statistics.fmean(gold), abs=1e-4)
        assert call.policy is not call.ref and call.ref is push.base.policy
        assert call.max_new == RING.max_new and push.no_eos == 1.0


@torch.no_grad()
def test_overoptimisation_is_told_from_the_same_samples(quick):
    """gold of best of n by each proxy, in units of the SFT samples' gold"""
    (out, folder), calls = ran("overopt"), calls_of("overopt")
    models = [load(f"{folder}/member-{i}")[0] for i in range(2)]
    roll = calls.standardised[0].roll
    gold = torch.tensor([RING.reward(dict(prompt=RTOK.decode(x[1:n])), RTOK.decode(y), d)
                         for x, n, y, d in zip(roll.tokens.tolist(), roll.prompt_len.tolist(),
                                               roll.completions(), roll.finished.tolist())])
    mu, sd = gold.mean(), gold.std()
    scored, truth = calls.scored_samples[0].out
    z = [(reward.score_roll(reward.scalar_reward(m, calls.steps[0].fit.c), roll)) for m in models]
    assert scored.shape == (2, 2, 512) and scored.std() == pytest.approx(1, abs=.3)
    standard = (z[1] - z[1].mean()) / z[1].std()
    assert close(reward.score_roll(calls.standardised[1].out, roll), standard, 1e-4)
    truth = (truth - mu) / sd
    proxies = dict(single=None, mean=scored.mean(0), wco=scored.amin(0),
                   uwo=scored.mean(0) - .5 * scored.var(0))
    for name, proxy in proxies.items():
        for n in (1, 4, 64):
            want = (best_of_n(proxy, truth, n) if proxy is not None else torch.stack(
                [best_of_n(x, truth, n) for x in scored])).mean()
            assert out[f"{name}|best-of-n gold@{n}"] == pytest.approx(want.item(), abs=1e-4)
    assert [x.aggregate for x in calls.combined[:3]] == [reward.mean, reward.mean, reward.wco]
    assert calls.combined[3].aggregate.keywords == dict(lam=.1)
    assert [len(x.rewards) for x in calls.combined] == [1, 2, 2, 2]
    test = prefs.encode_pairs(calls.sampled_pairs[1].out, RTOK, 96)
    right = [scores_of(m, test, "chosen") > scores_of(m, test, "rejected") for m in models]
    assert out["clean_accuracy"] == pytest.approx(torch.cat(right).float().mean().item(), abs=.02)
    for name, rows in ((x.name, x.out) for x in calls.rl):
        final = statistics.fmean(r["gold"] for r in rows)
        assert out[f"{name}|RL final"] == pytest.approx((final - mu.item()) / sd.item(), abs=1e-4)
        assert out[f"{name}|RL kl_end"] == pytest.approx(statistics.fmean(r["kl"] for r in rows))


def test_polar_tells_policies_apart(quick):
    """two samples of one policy against one of another; then labels against the demonstration"""
    calls = calls_of("polar")
    rows, few = (x.fit.rows for x in calls.steps[:2])
    drawn, at = calls.samples_of, 0
    for i in range(8):
        mine, rival = drawn[2 * i:2 * i + 2]
        assert (mine.samples, rival.samples) == (2, 1) and mine.problems == rival.problems
        assert (mine.policy is not rival.policy) or mine.temperature != rival.temperature
        assert mine.seed != rival.seed and mine.problems == RING.problems("train", 64)[i::8]
        same, other = mine.out.completions(), rival.out.completions()
        for k, p in enumerate(mine.problems):
            x = RTOK.prompt(p["prompt"])
            assert rows[at] == dict(prompt=[*x, *same[2 * k], RTOK.eos],
                                    chosen=[*x, *same[2 * k + 1], RTOK.eos],
                                    rejected=[*x, *other[k], RTOK.eos])
            at += 1
    assert at == len(rows) == 64
    assert len({(id(x.policy), x.temperature) for x in drawn[::2]}) == 8
    for i, r in enumerate(few):
        text = r["text"]
        x = RTOK.prompt(text["prompt"])
        best = RTOK.encode(RING.demo(dict(prompt=text["prompt"], seed=i)))
        assert r["prompt"] == [*x, *best, RTOK.eos]
        assert r["chosen"] == [*x, *RTOK.encode(text["chosen"]), RTOK.eos]
        assert r["rejected"] == [*x, *RTOK.encode(text["rejected"]), RTOK.eos]
    assert [r["text"] for r in few] == RING.pairs(32, 1000, "train", 0.0)
    plain = calls.steps[2].fit.rows
    assert [r["text"] for r in plain] == [r["text"] for r in few]
    check_pairs_of_texts(plain, RTOK, RING)


@torch.no_grad()
def test_polar_s_accuracies_are_of_its_three_models(quick):
    (out, folder) = ran("polar")
    test = prefs.encode_pairs(RING.pairs(64, 0, "val", 0.0), RTOK, 96)
    seen = reward.referred(test, SimpleNamespace(tok=RTOK, world=RING))
    for key, name, rows in (("pretrained", "pretrained", seen), ("val", "final", seen),
                            ("scratch", "scratch", test)):
        model = load(f"{folder}/{name}")[0]
        right = scores_of(model, rows, "chosen") > scores_of(model, rows, "rejected")
        assert out[f"{key}_accuracy"] == pytest.approx(right.float().mean().item(), abs=.02)


# --- Think-RM -------------------------------------------------------------------------------------


def test_a_judgement_is_rewarded_by_its_own_problem_s_label(quick):
    """eight a problem, and nothing for what has not ended"""
    task = tasks.task("parity_long")
    problems = [p for p in task.problems("train", 40) if p["label"] == 2][:1]
    problems += [p for p in task.problems("train", 40) if p["label"] == -1][:1]
    texts = ["?!z", "?!y", "?!x", "?!t", "?!v", "?!u", "", "?!x"] * 2    # 3 2 1 -3 -1 -2 none 1
    done = torch.ones(16, dtype=torch.bool)
    done[7] = False
    roll = SimpleNamespace(completions=lambda: [TTOK.encode(x) for x in texts], finished=done)
    r, told = reward.rule_reward(roll, problems, task=task, tok=TTOK, rule="graded")
    assert r.tolist() == [.5, 1, .5, 0, 0, 0, 0, 0] + [0, 0, 0, .5, 1, .5, 0, 0]
    r, _ = reward.rule_reward(roll, problems, task=task, tok=TTOK, rule="sign")
    assert r.tolist() == [1, 1, 1, 0, 0, 0, 0, 0] + [0, 0, 0, 1, 1, 1, 0, 0]
    roll.completions = lambda: [TTOK.encode(x) for x in ["?!x"] * 8 + texts[8:]]
    assert told["flat"] == 0 and reward.rule_reward(
        roll, problems, task=task, tok=TTOK, rule="sign")[1]["flat"] == 0
    done[7] = True
    assert reward.rule_reward(roll, problems, task=task, tok=TTOK, rule="sign")[1]["flat"] == .5


@pytest.mark.parametrize("config, rule", [("thinkrm", "graded"), ("rmr1", "sign")])
def test_think_rm_s_rl_starts_from_its_judge(config, rule, quick):
    (out, folder), calls = ran(config), calls_of(config)
    call, = calls.rl
    judge = load(f"{folder}/sft")[0].state_dict()
    assert all(torch.equal(x, judge[k]) for k, x in call.ref.state_dict().items())
    after = load(f"{folder}/rl")[0].state_dict()
    assert all(torch.equal(x, after[k]) for k, x in call.policy.state_dict().items())
    assert any(not torch.equal(x, judge[k]) for k, x in after.items())
    assert call.reward.keywords["rule"] == rule and call.samples == 8 and call.kl_loss == 1e-3
    assert call.advantages is reward.group_norm and call.beta == 0
    assert call.problems == tasks.task("parity_long" if rule == "graded" else "parity_random"
                                       ).problems("train", 64, 5000)
    assert out[f"{'long' if rule == 'graded' else 'random'}+RL|flat_end"] == call.out[-1]["flat"]


def test_verdicts_are_those_of_the_judge_s_texts(monkeypatch):
    """sampled at .6, greedy apart; each set's, and their mean"""
    task = tasks.task("parity_long")
    sets = dict(id=task.problems("val", 6), hard=task.problems("hard", 4))

    def written(judge, tok, prompts, c, *, max_new, temperature=0.0, samples=1):
        assert max_new == task.max_new and temperature == (.6 if samples > 1 else 0.0)
        problems = next(x for x in sets.values() if [tok.prompt(p) for p in x] == prompts)
        right = [prefs.SCORES[p["label"]] for p in problems]
        wrong = [prefs.SCORES[-p["label"]] for p in problems]
        if samples == 1:
            return [[f"!{x}"] for x in right]
        return [[f"??!{x}", f"!{y}", f"!{y}"] for x, y in zip(right, wrong)]
    monkeypatch.setattr(reward, "written", written)
    out = reward.verdicts(None, task, TTOK, sets, None, 3)
    for name in ("id", "hard", "accuracy"):
        assert {k: out[f"{name}{k}"] for k in ("", "_vote", "_greedy", "_graded", "_length")} == {
            "": 1.0, "_vote": 0.0, "_greedy": 1.0, "_graded": 1.0, "_length": 4.0}


def test_the_scalar_judge_prefers_what_the_label_does(quick):
    x = calls_of("thinkrm,bt_style", "--rl_steps", "2", "--votes", "2").steps[0]  # a claim's arm
    for r in x.fit.rows:
        text = r["text"]
        p = tasks.judging(text["prompt"].rstrip("="), text["chosen"], text["rejected"])
        assert p["label"] < 0                            # negative: the first is better
    pairs = {(r["text"]["prompt"], r["text"]["chosen"], r["text"]["rejected"]) for r in x.fit.rows}
    assert len(pairs) > 60 and len(x.fit.rows) == 64     # each in one order


# --- Adv-RM ---------------------------------------------------------------------------------------


def test_what_the_attacker_finds_joins_the_data_as_rejected(quick):
    """round 1 learns from the old pairs and those found, and from as many others in its controls"""
    (out, folder), calls = ran("advrm"), calls_of("advrm")
    fits = {x.fit.name: x.fit for x in calls.steps}
    assert [*fits] == ["round-0-1", "round-0-2", "round-1-1", "round-1-2", "more_random-1",
                       "more_gold-1"]
    train, found = fits["round-0-1"].rows, calls.findings[0].out
    check_pairs_of_texts(train, TTOK, TOYIF)
    assert len(found) == out["pairs_0"] > 20
    for name in ("round-1-1", "round-1-2"):
        assert fits[name].rows[:len(train)] == train
        more = [r["text"] for r in fits[name].rows[len(train):]]
        assert 0 < len(more) <= len(found) and all(r in found for r in more)
    assert fits["round-0-1"].seed == fits["round-1-1"].seed == 1 != fits["round-0-2"].seed == 2
    for name in ("more_random-1", "more_gold-1"):
        extra = fits[name].rows[len(train):]
        assert fits[name].rows[:len(train)] == train and 0 < len(extra) <= len(found)
    check_pairs_of_texts(fits["more_gold-1"].rows, TTOK, TOYIF)
    good = [r["margin"] > 0 for r in found]
    assert out["confirmed_0"] == pytest.approx(statistics.fmean(good))
    for r in found:
        gold = [TOYIF.reward(r, r[s], r[f"{s}_finished"]) for s in ("chosen", "rejected")]
        assert r["margin"] == pytest.approx(gold[0] - gold[1], abs=1e-5)


@torch.no_grad()
def test_the_attack_pleases_the_model_and_displeases_its_twin(quick):
    """z of both on the attacker's field; what is found is above the SFT mean and an outlier of U"""
    folder, calls = ran("advrm")[1], calls_of("advrm")
    one, two = (load(f"{folder}/round-0-{i}")[0] for i in (1, 2))
    weak, first, last = calls.rl[:3]
    field, c = calls.findings[0].field, calls.steps[0].fit.c

    def z(model, roll):
        raw, own = (reward.score_roll(reward.scalar_reward(model, c), x)
                    for x in (roll, field.roll))
        own = own.view(len(field.problems), -1)
        return (raw.view(len(own), -1) - own.mean(1, keepdim=True)).flatten() / own.std()
    roll = generate(first.ref, [TTOK.prompt(p) for p in field.problems], 4, samples=2,
                    generator=torch.Generator().manual_seed(3))
    assert 0 < roll.finished.float().mean() < 1
    z1, z2, unfinished = z(one, roll), z(two, roll), 3.0 * (~roll.finished).float()
    assert close(weak.reward(roll, field.problems)[0], z1 - unfinished, 1e-3)
    want = torch.where(z1 > 0, z1 - 1.5 * z2, z1 - 3.0) - unfinished
    assert close(first.reward(roll, field.problems)[0], want, 1e-3)
    one, two = (load(f"{folder}/round-1-{i}")[0] for i in (1, 2))
    z1, z2 = z(one, roll), z(two, roll)
    want = torch.where(z1 > 0, z1 - 1.5 * z2, z1 - 3.0) - unfinished
    assert close(last.reward(roll, field.problems)[0], want, 1e-3)
    one, two = (load(f"{folder}/round-0-{i}")[0] for i in (1, 2))
    net, kept = calls.findings[0].net, calls.adversarial[0]
    roll = reward.samples_of(net, TTOK, TOYIF, field.problems, c, 13, 8)
    z1, z2 = z(one, roll), z(two, roll)
    own = z(one, field.roll) - 1.5 * z(two, field.roll)
    assert close(kept.z1, z1, 1e-3) and close(kept.disagreement, z1 - 1.5 * z2, 1e-3)
    assert close(kept.mean, own.mean(), 1e-3) and close(kept.std, own.std(), 1e-3)
    where = torch.where(kept.out)[0].tolist()
    texts = [TTOK.decode(y) for y in roll.completions()]
    assert {texts[i] for i in where if texts[i].strip()} >= {r["rejected"] for r in
                                                            calls.findings[0].out}
    assert calls.pairs_against[0].rows == where


def test_a_strike_is_liked_by_the_model_and_far_below_the_sft_samples_in_gold(monkeypatch):
    """z of gold: less its prompt's SFT mean, over that prompt's std"""
    gold = T([[0., 2], [5, 5.2]])
    field = SimpleNamespace(gold=gold, problems=[0, 1],
                            standard=lambda r: lambda roll, problems: r)
    base = SimpleNamespace(policy=None, tok=None, world=None)
    monkeypatch.setattr(reward, "samples_of", lambda *a, samples: "roll")
    said = T([1 - 2.8] + [1 - 2.7] * 7 + [5.1 - .2828] * 4 + [5.1 - .27] * 4)
    monkeypatch.setattr(reward, "gold_of", lambda *a: said)
    z1 = T([1.] * 8 + [1, 1, -1, -1] + [1.] * 4)
    roll, a, b, rate = reward.struck(None, (z1, -z1), field, base, SimpleNamespace(seed=0))
    assert roll == "roll" and torch.equal(a, z1) and torch.equal(b, -z1)
    assert rate == pytest.approx(3 / 16)                 # -1.98, then two of -2.0


def test_each_attack_is_told_by_its_own_strikes(quick):
    """on prompts that it has not seen, against the models that it attacked"""
    (out, _), calls = ran("advrm"), calls_of("advrm")
    weak, first, last = (x.policy for x in calls.rl[:3])
    seen, unseen = calls.findings[0].field, calls.struck[0].field
    assert {p["prompt"] for p in seen.problems}.isdisjoint(p["prompt"] for p in unseen.problems)
    assert [(x.net, x.field) for x in calls.struck] == [
        (weak, unseen), (first, seen), (first, unseen), (last, unseen), (weak, seen)]
    before, after = calls.struck[0].rewards, calls.struck[3].rewards
    assert [x.rewards == before for x in calls.struck] == [True, True, True, False, True]
    assert not set(before) & set(after) and [x.rewards == after for x in calls.struck][3]
    for key, i in (("strict_overopt", 0), ("strict_0", 2), ("strict_last", 3)):
        assert out[key] == calls.struck[i].out[-1]
    assert calls.pairs_against[1].roll is calls.struck[4].out[0]


def test_rubrics_are_the_writer_s_or_the_true_ones(quick):
    """and what is told are the votes on each set, single and together"""
    (out, _), calls = ran("rubrics"), calls_of("rubrics")
    votes = calls.rubric_votes
    assert [x.name for x in votes] == ["id", "k3", "verbose"] * 2
    for i, call in enumerate(votes):
        assert {*call.rubric} == {r["prompt"] for r in call.rows}
        true = {x: prefs.true_rubric(x) for x in call.rubric}
        assert call.rubric == (true if i > 2 else calls.write_rubrics[i].out[0])
        key = "oracle|" * (i > 2) + call.name
        one, all_ = ([reward.majority(v[:n]) for v in call.out] for n in (1, 2))
        assert out[key] == pytest.approx(statistics.fmean(one))
        assert out[f"{key}_vote"] == pytest.approx(statistics.fmean(all_))
    for source in ("", "oracle|"):
        assert out[f"{source}accuracy"] == pytest.approx(
            statistics.fmean(out[f"{source}{x}"] for x in ("id", "k3", "verbose")))
    asked, wrote = (x.fit.rows for x in calls.steps)
    assert out["kept"] == len(asked) / 64 and len(wrote) == len(asked) and 32 < len(asked) < 64
    for r in wrote:
        text = TTOK.decode(r["prompt"])
        assert r["answer"][-1] == TTOK.eos and text.endswith("=") and any(
            TTOK.decode(x["prompt"]).startswith(text + TTOK.decode(r["answer"])) for x in asked)


def test_what_a_writer_writes_is_graded_by_the_true_rubric(monkeypatch):
    monkeypatch.setattr(reward, "written", lambda *a, **k: [["Fc#4Pm/"], ["LaPm/"]])
    rubric, grades = reward.write_rubrics(None, ["<Fc#4=", ">Lb="], TTOK, None)
    assert rubric == {"<Fc#4=": "Fc#4Pm/", ">Lb=": "LaPm/"}
    assert grades == dict(recall=.5, precision=.5, principle=.5)
    monkeypatch.setattr(reward, "written", lambda *a, **k: [["FcLaPn/"]])
    assert reward.write_rubrics(None, ["<Fc#4Lb="], TTOK, None)[1] == dict(
        recall=pytest.approx(1 / 3), precision=.5, principle=False)


def test_whom_rlhf_pushes_against(quick):
    calls = calls_of("advrm")
    arms = reward.arms([1, 2], [3, 4], dict(more=[5]))
    assert {k: (some, how) for k, (some, how) in arms.items()} == dict(
        plain=([1], reward.mean), mean=([1, 2], reward.mean), lcb=([1, 2], reward.lcb),
        adv=([3], reward.mean), more=([5], reward.mean))
    assert [len(x.rewards) for x in calls.combined] == [1, 2, 2, 1, 1, 1]
    (a, b), (adv, _) = calls.struck[0].rewards, calls.struck[3].rewards
    assert [x.reward for x in calls.standardised[:6]] == [a, a, b, a, b, adv]
    assert [x.name for x in calls.rl[3:]] == ["plain", "mean", "lcb", "adv", "more_random",
                                              "more_gold"]


def test_pairs_of_two_samples_are_of_the_same_prompt(quick):
    """labelled by gold of texts and of whether they ended"""
    call = calls_of("overopt").sampled_pairs[0]
    drawn = calls_of("overopt").samples_of[0]
    texts = [RTOK.decode(y) for y in drawn.out.completions()]
    done = drawn.out.finished.tolist()
    known = {(p["prompt"], *sorted(texts[2 * i:2 * i + 2])): dict(zip(texts[2 * i:2 * i + 2],
                                                                      done[2 * i:2 * i + 2]))
             for i, p in enumerate(drawn.problems)}
    assert call.out
    for r in call.out:
        ended = known[r["prompt"], *sorted((r["chosen"], r["rejected"]))]
        gold = []
        for side in ("chosen", "rejected"):
            assert r[f"{side}_finished"] == ended[r[side]]
            gold.append(RING.reward(r, r[side], ended[r[side]]))
        assert gold[0] > gold[1] and r["margin"] == pytest.approx(gold[0] - gold[1])
