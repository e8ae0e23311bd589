"""data/run.py: configuration, the run's folder, resume, intervals and verdicts."""
import json
import math
from dataclasses import dataclass

import pytest
import torch

from data import run
from data.run import (Claim, Run, UserError, batch_indices, conclude_all, configure, draw_sweep, gated,
                      in_parts, interval, judge, of, read_log, sweep, verdict)


@dataclass(frozen=True)
class Config:
    """A script's Config."""
    config: str = ""
    loss: str = "a"              # which loss
    lr: float = 1e-3             # peak learning rate
    steps: int = 4               # steps
    flag: bool = False           # a switch
    name: str = "x"              # a text
    stop: int = 0
    keep: int = 2
    seed: int = 0
    out: str = ""
    resume: bool = False


def a(x, *, beta=0.1):
    """first loss"""
    return x * beta


def b(x, *, gamma=1.0, beta=0.2):
    """second loss"""
    return x * gamma * beta


def k(x, *, beta=0.5):
    """a fixed part"""
    return x * beta


PRESETS = dict(fast=dict(lr=0.1, steps=2), second=dict(loss="b", gamma=3.0))
AXES = dict(loss=dict(a=a, b=b, PATH=b), kl=dict(k=k))


def conf(*argv):
    """configure(), from these words of a command line."""
    return configure(Config, PRESETS, AXES, "doc", argv)


def test_order_of_force(tmp_path):
    """defaults < presets and TOML files from left to right < the command line"""
    toml = tmp_path / "my.toml"
    toml.write_text("lr = 0.5\nname = 'toml'\n")
    assert conf()[0].lr == 1e-3
    assert conf("--config", "fast")[0].lr == 0.1
    assert conf("--config", f"fast,{toml}")[0].lr == 0.5
    assert conf("--config", f"{toml},fast")[0].lr == 0.1
    assert conf("--lr", "7", "--config", f"{toml},fast")[0].lr == 7.0
    assert conf("--config", f"{toml}")[0].name == "toml"


def test_functions_arrive_with_their_numbers_bound(tmp_path):
    assert conf()[1].loss(10) == pytest.approx(1.0)
    assert conf("--config=second")[1].loss(10) == pytest.approx(6.0)
    assert conf("--beta=2")[1].loss(10) == 20 and conf("--beta=2")[1].kl(10) == 20   # a key of both
    assert conf("--kl.beta=2")[1].loss(10) == pytest.approx(1.0) and conf("--kl.beta=2")[1].kl(10) == 20
    assert conf("--loss", str(tmp_path), "--gamma", "5")[1].loss(1) == pytest.approx(1.0)   # the row PATH


def test_a_preset_s_key_may_lie_idle_a_typed_one_may_not():
    """--config second sets gamma for loss b; choosing loss a leaves it idle, which is no user's mistake"""
    assert conf("--config", "second", "--loss", "a")[1].loss(10) == pytest.approx(1.0)


@pytest.mark.parametrize("text, value", [("--flag", True), ("--flag=false", False), ("--flag true", True)])
def test_switches(text, value):
    assert conf(*text.split())[0].flag is value


@pytest.mark.parametrize("argv, words", [
    (["--lrr", "1"], "unknown key --lrr; did you mean 'lr'"),
    (["--lr", "fast"], "--lr fast: expected float"),
    (["--steps", "1.5"], "--steps 1.5: expected int"),
    (["--flag=maybe"], "--flag maybe: expected bool"),
    (["--config", "fsat"], "no preset 'fsat'; did you mean 'fast'"),
    (["--config", "nowhere.toml"], "no config file nowhere.toml"),
    (["--config", "second", "--loss", "a", "--gamma", "1"], "unknown key --gamma; it belongs to loss 'b'"),
    (["--gamma", "1"], "unknown key --gamma; it belongs to loss 'b'"),
    (["--loss", "c"], "no loss 'c'"),
    (["--lr"], "--lr needs a value"),
    (["lr=1"], "unexpected argument 'lr=1'"),
    (["--steps=-1"], "--steps -1: must be at least 0"),
])
def test_bad_command_lines_name_the_thing_and_the_cure(argv, words):
    with pytest.raises(UserError, match=words.replace("(", r"\(")):
        conf(*argv)


def test_bad_toml_is_named(tmp_path):
    (tmp_path / "x.toml").write_text("lr = = 1")
    with pytest.raises(UserError, match="x.toml is not valid TOML"):
        conf("--config", str(tmp_path / "x.toml"))


def test_help_shows_every_field_preset_and_argument(capsys):
    with pytest.raises(SystemExit) as stop:
        conf("--help")
    text = capsys.readouterr().out
    assert stop.value.code == 0
    assert all(word in text for word in
               ("peak learning rate", "fast", "lr=0.1", "--gamma 1.0", "second loss", "--beta"))


def test_a_user_error_is_one_line_and_exit_code_2(capsys):
    def main():
        raise UserError("the thing: do that")
    with pytest.raises(SystemExit) as stop:
        run.cli(main)
    assert stop.value.code == 2 and capsys.readouterr().err == "error: the thing: do that\n"


def test_other_errors_keep_their_traceback():
    def main():
        raise RuntimeError("a bug")
    with pytest.raises(RuntimeError, match="a bug"):
        run.cli(main)


def test_out_of_memory_names_micro(capsys):
    def main():
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory")
    with pytest.raises(SystemExit):
        run.cli(main)
    assert "--micro" in capsys.readouterr().err


# --- the folder ---------------------------------------------------------------------------------------


def fake(folder):
    """What counts as a checkpoint."""
    (folder / "config.json").write_text("{}")


def test_a_run_leaves_its_traces_and_keeps_the_newest(workdir):
    c, f = conf("--config", "fast", "--steps", "5")
    with Run(c, f, "t", {"loss": ["loss"]}) as r:
        for step in r.steps(c.steps):
            r.log(step + 1, loss=1.0 / (step + 1))
            r.save(step + 1, fake, x=torch.tensor(step))
        r.finish(loss=0.2)
    folder = workdir / "out/t/fast"
    assert r.folder.resolve() == folder and (folder / "curve.png").stat().st_size > 1000
    assert [row["step"] for row in read_log(folder)] == [1, 2, 3, 4, 5]
    assert sorted(p.name for p in folder.glob("step-*")) == ["step-000004", "step-000005"]
    info = json.loads((folder / "run.json").read_text())
    assert (info["config"]["lr"] == 0.1 and info["config"]["loss.beta"] == 0.1
            and info["result"] == {"loss": 0.2})
    assert run.checkpoint(folder).name == "step-000005" and run.result(folder) == {"loss": 0.2}


def began(c, f):
    """A run that has logged one row."""
    with Run(c, f, "t") as r:
        r.log(1, loss=1.0)


def test_a_second_run_never_overwrites_the_first(workdir):
    c, f = conf()
    assert [Run(c, f, "t").folder.name for _ in range(3)] == ["default", "default-2", "default-3"]
    c, f = conf("--out", "here")
    began(c, f)
    with pytest.raises(UserError, match="already holds a run: add --resume"):
        Run(c, f, "t")


def test_resume_takes_the_state_and_drops_rows_and_folders_that_came_later(workdir):
    c, f = conf("--out", "here")
    with Run(c, f, "t") as r:
        for step in r.steps(4):
            r.log(step + 1, loss=1.0)
            if step == 1:
                r.save(2, fake, x=torch.tensor(7))
    half = workdir / "here/.step-000003-1.tmp"                       # as if killed while writing
    half.mkdir()
    info = json.loads((workdir / "here/run.json").read_text())
    (workdir / "here/run.json").write_text(json.dumps(info | dict(writing=half.name)))
    (workdir / "here/mine.tmp").mkdir()
    with open("here/log.jsonl", "a") as file:
        file.write('{"step": 5, "los')
    c, f = conf("--out", "here", "--resume")
    with Run(c, f, "t") as r:
        assert r.start == 2 and int(r.state["x"]) == 7 and list(r.steps(4)) == [2, 3]
        r.log(3, loss=2.0)
    assert [(x["step"], x["loss"]) for x in read_log("here")] == [(1, 1.0), (2, 1.0), (3, 2.0)]
    assert not half.exists() and (workdir / "here/mine.tmp").exists()


def test_resume_with_other_settings_is_refused(workdir):
    began(*conf("--out", "here"))
    with pytest.raises(UserError, match="lr was 0.001 and is now 0.5"):
        Run(*conf("--out", "here", "--resume", "--lr", "0.5"), "t")
    with pytest.raises(UserError, match="no run in nowhere"):
        Run(*conf("--out", "nowhere", "--resume"), "t")


def test_a_loss_that_is_not_finite_stops_the_run(workdir):
    with Run(*conf(), "t") as r:
        r.save(3, fake)
        with pytest.raises(UserError, match="loss became nan at step 4; "
                                            r"the last good checkpoint is .*step-000003"):
            r.log(4, loss=math.nan)


def test_a_run_that_never_began_leaves_no_folder(workdir):
    """a mistyped data set must not become the newest run, which --resume would pick; one that logged stays"""
    for rows, left in ((0, False), (1, True)):
        with pytest.raises(UserError), Run(*conf("--out", f"o{rows}"), "t") as r:
            if rows:
                r.log(1, loss=1.0)
            raise UserError("no such data")
        assert (workdir / f"o{rows}").exists() == left


def test_checkpoint_names_what_is_wrong(tmp_path):
    with pytest.raises(UserError, match="does not exist"):
        run.checkpoint(tmp_path / "nothing")
    with pytest.raises(UserError, match="neither config.json nor step"):
        run.checkpoint(tmp_path)


def test_batches_cover_every_row_once_an_epoch_and_depend_on_seed_and_step_only():
    seen = torch.cat([batch_indices(10, 4, step, 1) for step in range(5)])            # two epochs of ten rows
    assert sorted(seen[:10].tolist()) == sorted(seen[10:].tolist()) == list(range(10))
    assert seen[:10].tolist() != seen[10:].tolist() != list(range(10))
    assert batch_indices(10, 4, 3, 1).tolist() == seen[12:16].tolist()
    assert batch_indices(10, 4, 3, 2).tolist() != seen[12:16].tolist()
    with pytest.raises(UserError, match="empty"):
        batch_indices(0, 4, 0, 0)


# --- claims -------------------------------------------------------------------------------------------


def test_interval_by_hand():
    """1, 2, 3: mean 2, s = 1, t(2) = 4.303, half width 4.303 / sqrt(3) = 2.484338"""
    mean, half = interval([1.0, 2.0, 3.0])
    assert mean == 2 and half == pytest.approx(2.484338, abs=1e-6)
    assert interval([1.0])[1] == math.inf


@pytest.mark.parametrize("diffs, better, word", [
    ([1.0, 1.1, 0.9], "higher", "holds"), ([1.0, 1.1, 0.9], "lower", "does not hold"),
    ([-1.0, -1.1, -0.9], "higher", "does not hold"), ([1.0, -1.0, 0.5], "higher", "undecided"),
    ([5.0], "higher", "undecided"),
])
def test_verdict_comes_from_the_interval(diffs, better, word):
    assert verdict(diffs, better) == word


def claim_train(c, f):
    """A run that is over at once: its score is the learning rate, plus a little for the seed."""
    with Run(c, f, "t") as r:
        return r.finish(score=c.lr + 0.01 * c.seed)


def claim_setup(argv):
    """configure() of an arm."""
    return configure(Config, PRESETS, AXES, "", argv)


def test_a_claim_runs_every_arm_and_concludes(workdir):
    claim = Claim("fast is better", "none", arms=dict(ours="fast", base="second"), metric="score",
                  tests={"ours - base": {"ours": 1, "base": -1}, "base - ours": {"ours": -1, "base": 1}},
                  conclude=lambda v: " / ".join(v.values()))
    report = run.run_claim("c", claim, "t", claim_setup, claim_train, seeds=3, jobs=2)
    assert report["verdict"] == "holds / does not hold"
    assert report["arms"]["ours"]["score"]["values"] == pytest.approx([0.1, 0.11, 0.12])
    assert (json.loads((workdir / "data/results/c.json").read_text())["tests"][0]["difference"]
            == pytest.approx(0.099))
    assert (workdir / "data/results/c.png").exists()
    stamp = (workdir / "out/claims/c/ours-s0/run.json").stat().st_mtime_ns
    run.run_claim("c", claim, "t", claim_setup, claim_train, seeds=3, jobs=1)    # finished arms are reused
    assert (workdir / "out/claims/c/ours-s0/run.json").stat().st_mtime_ns == stamp


def tuned_train(c, f):
    """A run whose metric has its optimum at lr 0.05, and which diverges above 0.3."""
    with Run(c, f, "t") as r:
        if c.lr > 0.3:
            r.log(1, loss=math.nan)
        r.log(1, score=c.lr + c.seed, seconds=2.0)
        return r.finish(score=c.lr + c.seed, tune=abs(math.log(c.lr / 0.05)), seed=c.seed)


def test_every_arm_is_tuned_on_a_seed_of_its_own_until_the_best_is_inside(workdir):
    """from 1e-3 and from 0.1, ratio 2: 0.064 and 0.05; what diverges is no candidate; seeds 0, 1 count"""
    claim = Claim("none", "none", arms=dict(low="second", high="fast"), metric="score",
                  tests={"constant": {"low": 1, "": -0.06}}, tune=("lr", 2.0, "tune"), curve="score")
    report = run.run_claim("c", claim, "t", claim_setup, tuned_train, seeds=2, jobs=1)
    low, high = report["tuned"]["low"], report["tuned"]["high"]
    assert low["value"] == 0.064 and not low["edge"] and high["value"] == 0.05 and not high["edge"]
    assert list(low["grid"]) == [0.0005, 0.001, 0.002, 0.004, 0.008, 0.016, 0.032, 0.064, 0.128]
    assert list(high["grid"]) == [0.025, 0.05, 0.1, 0.2]
    assert report["arms"]["low"]["score"]["values"] == pytest.approx([0.064, 1.064])
    assert report["tests"][0]["difference"] == pytest.approx(0.504)
    assert report["curve"]["low"] == [[1, 2.0, 0.564]] and (workdir / "data/results/c_curves.png").exists()
    assert (workdir / f"out/claims/c/low-s{run.TUNING_SEED}-lr0.064/run.json").exists()
    got = run.tune_arms(claim, claim_setup, lambda arm, seed, changes, tag: (arm, changes), Serial(),
                        widest=2)
    assert got["low"]["edge"] and got["low"]["value"] == 0.008 and not got["high"]["edge"]


class Serial:
    """A pool whose map answers from the optimum at 0.05, infinite above 0.3."""

    def map(self, fn, jobs):
        values = [float(changes[0].split("=")[1]) for _, changes in jobs]
        return [{} if x > 0.3 else dict(tune=abs(math.log(x / 0.05))) for x in values]


def test_a_claim_s_tuned_key_cannot_be_set(workdir):
    claim = Claim("none", "none", arms=dict(low="second"), metric="score", tests={}, tune=("lr", 2.0, "tune"))
    with pytest.raises(UserError, match="--claim c with lr: the claim sets it itself"):
        run.launch("t", Config, PRESETS, AXES, dict(c=claim), "", tuned_train, ["--claim", "c", "--lr", "1"])


def test_without_torchrun_there_is_one_rank():
    assert run.start_ranks("cpu") == (0, 1) and run.rank() == 0 and run.share("x") == "x"


# --- claims whose arms share a run -----------------------------------------------------------------------

SHARED = Claim("a beats b", "", dict(a="both", b="both", c="alone"), "gold",
               {"a > b": {"a": 1, "b": -1}, "peak: a > c": {"a|peak": 1, "c|peak": -1}, "gate": {"a": 1, "": -2}},
               conclude=in_parts("a > b", "peak", "gate"), sweep=("n", ("gold",)))


def shared_results(seeds=3):
    """What two runs a seed return: one of the arms a and b, one of c alone."""
    both = [{"a|gold": 3 + s, "b|gold": 1.5 + s, "a|peak": 1 + .1 * s, "a|gold@1": s, "a|gold@4": 2 * s,
             "b|gold@1": 0} for s in range(seeds)]
    return {(arm, s): both[s] if arm != "c" else {"gold": .5 * s, "peak": 1 - .1 * s, "gold@2": 7}
            for arm in "abc" for s in range(seeds)}


def test_arms_of_one_run_are_told_apart():
    report = judge("x", SHARED, 3, shared_results())
    assert [report["arms"][arm]["gold"]["values"] for arm in "abc"] == [[3, 4, 5], [1.5, 2.5, 3.5], [0, .5, 1]]
    by = {t["test"]: (t["difference"], t["verdict"]) for t in report["tests"]}
    assert by["a > b"] == (1.5, "holds") and by["peak: a > c"][0] == pytest.approx(.2)
    assert by["gate"] == (2.0, "undecided")                      # 1, 2, 3 with t 4.303: 2 ± 2.48
    assert report["verdict"] == "a > b: holds; peak: undecided; gate: undecided"
    assert conclude_all({"x": "holds"}) == "holds"


@pytest.mark.parametrize("gate, said", [("holds", "a: holds; b: undecided"), (
    "undecided", "weak (gate: a > 1: not met), a: holds; b: undecided")])
def test_a_gate_that_is_not_met_is_told_first(gate, said):
    """and is no test of the part that its label happens to name"""
    verdicts = {"a > c": "holds", "b > c": "undecided", "gate: a > 1": gate}
    assert gated("weak", "a", "b")(verdicts) == said


def test_a_sweep_collects_an_arm_s_own_points(tmp_path):
    got = sweep(SHARED, 3, shared_results())["gold"]
    assert [p[:2] for p in got["a"]] == [[1.0, 1.0], [4.0, 2.0]] and [p[:2] for p in got["b"]] == [[1.0, 0]]
    assert got["c"][0][:2] == [2.0, 7]
    draw_sweep(dict(sweep=dict(gold=got)), "n", tmp_path / "x.png")
    assert (tmp_path / "x.png").stat().st_size > 1000


def test_a_metric_that_no_run_has_is_named():
    with pytest.raises(UserError, match="the run of arm 'a' has no 'gould'"):
        of({"a|gold": 1.0}, "a", "gould")


def test_a_finished_stage_is_made_once(workdir):
    """and the log of a resumed run goes on where the finished stages end"""
    c, f = conf("--out", "o")
    made = []

    def write(name):
        def make(folder):
            (folder / "it").write_text(name)
            made.append(name)
        return make
    with Run(c, f, "x") as run:
        for k, name in enumerate("ab"):
            run.log(run.at + 1, loss=k)
            run.at += 1
            assert (run.stage(name, write(name)) / "it").read_text() == name
        run.log(3, loss=9.0)                                     # of a stage that a kill ends
    c, f = conf("--out", "o", "--resume")
    with Run(c, f, "x") as run:
        assert (run.stage("a", write("a")), run.at, run.stage("b", write("b")), run.at)[1::2] == (1, 2)
        run.stage("c", write("c"))
    assert made == ["a", "b", "c"] and [r["loss"] for r in read_log("o")] == [0, 1]


def test_a_stage_s_loss_stops_the_run_too(workdir):
    c, f = conf("--out", "o")
    with Run(c, f, "x") as run, pytest.raises(UserError, match="member-0 loss became nan"):
        run.log(1, **{"member-0 loss": math.nan})
