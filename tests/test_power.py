"""How many seeds a claim needs: Student's t against tables, Holm by hand, planted spreads, planted
nulls and effects."""
import importlib
import json
import math
from functools import partial

import pytest
import torch

import claims
import data.run as run
from claims import (Claim, critical_t, judge, judge_together, run_claim, run_from_options,
                    run_pilot, verdict)
from claims import power as P
from data.run import MeanOf, Run, UserError, claims_of, configure, read_json
from test_run import AXES, PRESETS, Config


# --- Student's t ----------------------------------------------------------------------------------


@pytest.mark.parametrize("df, level, t", [
    (1, .05, 12.7062), (4, .05, 2.776445), (9, .05, 2.262157), (30, .05, 2.042272),
    (9, .01, 3.249836), (200, .05, 1.971896)])
def test_critical_values_are_those_of_the_tables(df, level, t):
    assert P.critical(df, level) == pytest.approx(t, rel=1e-3)
    assert P.tail(t, df) == pytest.approx(level / 2, rel=2e-3)
    assert critical_t(df + 1) == pytest.approx(P.critical(df), rel=5e-3)


@pytest.mark.parametrize("effect, n, power", [
    (1.0, 10, .8031), (0.5, 34, .8078), (0.5, 44, .9000), (0.0, 10, .0250)])
def test_power_is_that_of_the_tables(effect, n, power):
    """of a paired t-test, two-sided 5 %, effect in standard deviations"""
    assert P.power_of(effect, 1.0, n) == pytest.approx(power, abs=1.5e-3)


def test_the_least_number_of_seeds():
    assert P.seeds_for(0.5, 1.0) == 44 and P.seeds_for(1.0, 1.0) == 13
    assert P.seeds_for(5.0, 10.0) == 44                                    # only their ratio counts
    assert P.seeds_for(0.5, 1.0, level=.05 / 4) > 44 > P.seeds_for(0.5, 1.0, power=.8) == 34
    assert P.seeds_for(0.01, 1.0) is None and P.seeds_for(1.0, 0.0) == 2


def test_a_pilot_s_spread_is_taken_at_its_upper_limit():
    """chi-square of four degrees is 1.6488 at 20 %: sqrt(4 / 1.6488) = 1.557575"""
    assert P.cautious(2.0, 5) == pytest.approx(2 * 1.557575, abs=1e-5)
    assert P.cautious(1.0, 2) > P.cautious(1.0, 10) > 1 and P.cautious(1.0, 1) == math.inf


def test_p_values():
    """mean 1, sd 1, n 10: t = 3.162278, nine degrees: 0.011507"""
    assert P.p_value(1.0, 1.0, 10) == pytest.approx(.011507, abs=1e-5)
    assert P.p_value(-1.0, 1.0, 10) == P.p_value(1.0, 1.0, 10)
    assert P.p_value(0.0, 0.0, 5) == 1 and P.p_value(1.0, 0.0, 5) == 0 == 1 - P.p_value(1, 1, 1)


def test_holm_by_hand():
    """.005·4, .01·3, then .03·2, and .04·1 may not fall below it"""
    got = P.holm(dict(a=.01, b=.04, c=.03, d=.005))
    assert got == pytest.approx(dict(a=.03, b=.06, c=.06, d=.02)) and list(got) == list("abcd")
    assert P.holm(dict(a=.5, b=.6)) == dict(a=1.0, b=1.0)


# --- verdicts -------------------------------------------------------------------------------------


@pytest.mark.parametrize("diffs, word", [
    ([.010, .011, .009], "negligible"), ([-.010, -.011, -.009], "negligible"),
    ([.10, .11, .09], "holds"), ([-.10, -.11, -.09], "does not hold"), ([.01, -.04, .03],
                                                                        "undecided")])
def test_what_lies_within_the_smallest_effect_is_negligible(diffs, word):
    assert verdict(diffs, smallest=0.02) == word
    turned = {"holds": "does not hold", "does not hold": "holds"}
    assert verdict(diffs, better="lower", smallest=0.02) == turned.get(word, word)


CLAIM = Claim("a beats b", "", dict(a="a", b="b", c="c"), "gold",
              {"a > b": {"a": 1, "b": -1}, "a > c": {"a": 1, "c": -1}, "gate": {"a": 1, "": -1}},
              smallest=dict(gold=0.2), why="because")


def results(a, b, c):
    """{(arm, seed): result} of lists by seed."""
    return {(arm, s): dict(gold=x) for arm, xs in dict(a=a, b=b, c=c).items()
            for s, x in enumerate(xs)}


def test_contrasts_are_judged_together():
    """p = .0351 alone holds; of three contrasts, the other at 1e-4, it does not"""
    tests = [dict(test="a", p=.0351, alone="holds"), dict(test="b", p=1e-4, alone="holds"),
             dict(test="c", p=.9, alone="undecided"), dict(test="d", p=.03, alone="negligible")]
    judge_together(tests)
    assert [t["verdict"] for t in tests] == ["undecided", "holds", "undecided", "negligible"]
    assert [round(t["p_holm"], 4) for t in tests] == [.09, .0004, .9, .09]


def test_a_report_tells_both_verdicts_and_what_would_matter():
    base = [.1, .2, .3, .4, .5]
    got = results([x + 1 + .01 * i for i, x in enumerate(base)], base, [1.1, 1.2, 1.3, 1.4, 1.5])
    by = {t["test"]: t for t in judge("x", CLAIM, 5, got)["tests"]}
    assert by["a > b"]["verdict"] == by["a > b"]["alone"] == "holds"
    assert by["a > c"]["verdict"] == "negligible" and by["a > c"]["smallest"] == 0.2
    assert by["gate"]["smallest"] == 0                         # a threshold, not an effect


def test_every_claim_says_which_effect_would_matter():
    for script in ("sft", "reward", "ppo", "grpo", "dpo", "compress", "specdec"):
        for name, claim in claims_of(script).CLAIMS.items():
            assert claim.why and len(claim.why) > 15, name
            for label, weights in claim.tests.items():
                assert P.smallest_of(claim, weights) > 0, (name, label)


# --- where the spread comes from ------------------------------------------------------------------


def planted(seeds, prompts, samples, sd, g):
    """Paired differences of two arms with a spread of seeds, prompts and samples, and their
    values."""
    diffs, values = [], []
    for _ in range(seeds):
        shift, hard = sd[0] * torch.randn(1, generator=g), torch.randn(prompts, 1, generator=g)
        a, b = (sd[2] * torch.randn(prompts, samples, generator=g) for _ in "ab")
        a = a + shift + sd[1] * hard
        diffs.append(float(a.mean() - b.mean()))
        values.append({"a": (1, a.tolist()), "b": (-1, b.tolist())})
    return diffs, values


def test_the_parts_of_a_planted_spread():
    """.3 of seeds; 1 of 25 prompts: .2; 1 of 2 · 25 · 4 samples: sqrt(2 / 100)"""
    g = torch.Generator().manual_seed(0)
    parts = P.parts_of(*planted(300, 25, 4, (.3, 1.0, 1.0), g))
    assert parts == pytest.approx(dict(seeds=.3, prompts=.2, samples=math.sqrt(.02)), rel=.12)
    none = P.parts_of(*planted(300, 25, 4, (0.0, 1.0, 0.0), g))
    assert none["samples"] == 0 and none["seeds"] < .06
    assert P.parts_of([1.0, 2.0, 3.0], [None, None, None]) == dict(seeds=1.0)


def test_what_makes_a_prompt_hard_for_both_arms_is_no_spread_of_their_difference():
    hard = torch.arange(8.0)
    values = [{"a": (1, (hard + s).tolist()), "b": (-1, hard.tolist())} for s in range(3)]
    assert P.parts_of([0.0, 1.0, 2.0], values) == pytest.approx(dict(seeds=1, prompts=0, samples=0))


def test_a_plan_takes_the_contrast_that_needs_most_among_all_of_them():
    """sd 0.2 and 0.1 of three seeds, effect 0.2, two contrasts: Holm's first step is 2.5 %"""
    diffs = {"a > b": [0.0, 0.2, 0.4], "a > c": [0.0, 0.1, 0.2]}
    found = P.plan(CLAIM, diffs, {label: [None] * 3 for label in diffs})
    for row, sd in zip(found["contrasts"], (0.2, 0.1)):
        assert row["sd"] == pytest.approx(sd) and row["smallest"] == 0.2
        for key, level in (("seeds", .05), ("seeds_holm", .025)):
            assert row[key] == P.seeds_for(0.2, P.cautious(sd, 3), level, .925)
    assert found["seeds"] == found["contrasts"][0]["seeds_holm"]
    assert found["contrasts"][0]["seeds_holm"] > found["contrasts"][0]["seeds"] > 20


def test_a_mean_leaves_its_values(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    c, f = configure(Config, PRESETS, AXES, "", ["--out", "r"])
    score = MeanOf(torch.tensor([[1.0, 2.0], [3.0, 6.0]]))
    assert score == 3 and json.dumps(dict(x=score)) == '{"x": 3.0}'
    with Run(c, f, "t") as r:
        r.log(1, score=score)
        r.save(1, lambda folder: (folder / "config.json").write_text("{}"), last=dict(score=score))
        r.finish(score=score, other=1.0)
    assert read_json(tmp_path / "r/values.json") == dict(score=[[1.0, 2.0], [3.0, 6.0]])
    assert type(run.read_state(r.last / "state.pt")["last"]["score"]) is float
    assert P.values_kept("r", "arm", "score") == [[1.0, 2.0], [3.0, 6.0]]
    assert P.values_kept("r", "arm", "other") is None is P.values_kept("nowhere", "arm", "score")
    claim = Claim("", "", dict(a="a", b="b"), "score", {})
    homes = dict(a="r", b="r")
    assert P.kept_of(claim, {"a": 1, "b": -1, "": .5}, homes).keys() == {"a", "b"}
    assert P.kept_of(claim, {"a": 1, "b|other": -1}, homes) is None


# --- pilots, planted nulls and effects ------------------------------------------------------------

EFFECT = 0.1     # the planted difference, which is what would matter


def noisy_train(c, f):
    """A run whose score is the rate's tenth and noise of its seed and rate, over prompts too."""
    g = torch.Generator().manual_seed(1000 * c.seed + int(c.lr * 1000))
    values = (EFFECT * (c.lr == 0.2) + 0.06 * torch.randn(1, generator=g)
              + 0.1 * torch.randn(20, generator=g))
    with Run(c, f, "t") as r:
        return r.finish(score=MeanOf(values))


def claim_of(ours):
    """A claim in which the arm of learning rate 0.2 is better by EFFECT, all others equal."""
    return Claim("ours is better", "", dict(ours=f"fast,lr={ours}", base="fast,lr=0.3"), "score",
                 {"ours > base": {"ours": 1, "base": -1}}, smallest=dict(score=EFFECT),
                 why="planted")


def launch(claim, *argv):
    """What a script's main does with --claim c."""
    options = dict(run.parse(["--claim", "c", *argv], dict(power=False)))
    setup = partial(configure, Config, PRESETS, AXES, "")
    return run_from_options("t", dict(c=claim), setup, (PRESETS, AXES), noisy_train, options)


def test_a_pilot_fixes_the_number_of_seeds(workdir, capsys):
    """its seeds are none of the result's; the claim takes its number and writes it down"""
    found = launch(claim_of(0.2), "--power", "--seeds", "4", "--jobs", "1")
    [row] = found["contrasts"]
    assert set(row["parts"]) == {"seeds", "prompts", "samples"} and row["parts"]["samples"] == 0
    assert 0 < row["parts"]["prompts"] < .1 and found["seeds"] == row["seeds"] == row["seeds_holm"]
    assert "which" not in found and "matters: planted" in capsys.readouterr().out
    assert read_json(workdir / "data/results/plans/c.json")["seeds"] == found["seeds"]
    assert {p.name for p in (workdir / "out/claims/c").iterdir() if p.is_dir()} == {
        f"{arm}-s{seed}-pilot" for arm in ("ours", "base") for seed in range(2000, 2004)}
    report = launch(claim_of(0.2), "--jobs", "1")
    assert report["seeds"] == report["plan"]["seeds"] == found["seeds"]
    assert report["plan"]["pilot"] == 4
    assert launch(claim_of(0.2), "--jobs", "1", "--seeds", "2")["seeds"] == 2


@pytest.mark.parametrize("argv, words", [
    (["--power", "--seeds", "1"], "a spread takes at least 2"), (["--power=maybe"], "--power")])
def test_a_pilot_that_cannot_be_is_refused(argv, words, workdir):
    with pytest.raises(UserError, match=words):
        launch(claim_of(0.2), *argv)


def test_a_claim_that_does_not_say_what_matters_has_no_plan():
    with pytest.raises(UserError, match="which effect would matter in 'a > b'"):
        P.plan(Claim("", "", {}, "gold", {"a > b": {"a": 1, "b": -1}}), {"a > b": [1.0, 2.0]},
               {"a > b": [None, None]})


def outcomes(effect, seeds, sets, g, sd=0.1):
    """How often each verdict falls over sets of seeds with a true difference."""
    found = []
    for _ in range(sets):
        a, b, c = (torch.randn(seeds, generator=g).mul(sd / math.sqrt(2)) for _ in "abc")
        got = results((a + effect).tolist(), b.tolist(), (a + effect).tolist())
        found.append({t["test"]: t["verdict"]
                      for t in judge("x", CLAIM, seeds, got)["tests"]}["a > b"])
    return found


def test_a_null_is_rarely_found_and_an_effect_of_the_stated_size_mostly():
    """of 200 sets: 5 expected by chance at 2.5 %; 180 at 90 % power"""
    g = torch.Generator().manual_seed(0)
    seeds = P.seeds_for(0.2, 0.1, P.LEVEL / 3)
    assert outcomes(0.0, seeds, 200, g).count("holds") <= 11
    assert outcomes(0.2, seeds, 200, g).count("holds") >= 170


class InOne:
    """A pool of this process alone."""

    def __init__(self, *args, **kw):
        self.map = map

    def __enter__(self):
        return self

    def __exit__(self, *args):
        pass


@pytest.mark.slow
def test_planted_claims_from_the_pilot_to_the_verdict(workdir, monkeypatch):
    """20 sets of runs: a baseline under another name never holds, and is negligible; one with other
    noise holds by chance at 2.5 %; an arm that has the stated effect holds in 18"""
    monkeypatch.setattr(claims, "ProcessPoolExecutor", InOne)
    rates, words = dict(same=0.3, noise=0.4, effect=0.2), dict(same=[], noise=[], effect=[])
    for number in range(20):
        setup = partial(shifted, 10_000 * (number + 1))
        for kind, rate in rates.items():
            name, claim = f"{kind}{number}", claim_of(rate)
            plan = run_pilot(name, claim, "t", setup, noisy_train, seeds=5, jobs=2)
            report = run_claim(name, claim, "t", setup, noisy_train, seeds=plan["seeds"], jobs=2)
            words[kind].append(report["verdict"])
    assert words["same"] == ["negligible"] * 20 and words["noise"].count("holds") <= 2
    assert words["effect"].count("holds") >= 18


def shifted(by, argv):
    """A setup whose seeds are others: each set of a planted claim has its own."""
    at = argv.index("--seed") + 1
    return configure(Config, PRESETS, AXES, "", [*argv[:at], str(int(argv[at]) + by),
                                                 *argv[at + 1:]])


@pytest.mark.parametrize("script, argv, metrics", [
    ("ppo", ["--config", "toyif,srppo,tiny", "--max_new", "0", "--steps", "0", "--eval_prompts",
             "16"], ["val_gold", "ood_reward"]),
    ("grpo", ["--config", "grpo,tiny", "--steps", "0"], ["val_accuracy", "val_greedy"]),
    ("dpo", ["--config", "dpo,tiny", "--steps", "0"], ["val_gold", "ood_length"])])
def test_a_script_keeps_what_its_means_are_of(script, argv, metrics, shared_bases):
    """one number a prompt, or a row of them with several samples each, whose mean is the result"""
    out = importlib.import_module(script).main([*argv, "--out", "kept"])
    for metric in metrics:
        values = torch.tensor(P.values_kept("kept", "", metric))
        assert values.mean().item() == pytest.approx(out[metric], abs=1e-6) and len(values) > 3
