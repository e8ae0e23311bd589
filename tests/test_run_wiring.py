"""data/run.py: whose value reaches a function or a file: layers of settings, rows of the log, the
state that a resume takes, batches, what is drawn and what is said."""
import json
import math
import time
from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch
from conftest import merged
from safetensors.torch import save_file

from data import run
from data.run import Run, UserError, batch_indices, configure, read_log
from test_run import AXES, PRESETS


@dataclass(frozen=True)
class Config(run.Training):
    """A script's Config."""
    loss: str = "a"
    steps: int = 4


def conf(*argv):
    """configure(), from these words of a command line, on a CPU."""
    return configure(Config, PRESETS, AXES, "doc", merged("--device=cpu", *argv))


def fake(folder):
    """What counts as a checkpoint."""
    (folder / "config.json").write_text("{}")


# --- settings -------------------------------------------------------------------------------------


def test_layers_of_config_lie_on_each_other_from_left_to_right():
    for config, lr in (("fast,lr=5", 5), ("lr=5,fast", 0.1), ("fast,lr=5,lr=6", 6)):
        c, _ = conf("--config", config)
        assert c.lr == lr and c.steps == 2 and c.config == config
    assert conf("--config", "lr=5,fast", "--lr", "7")[0].lr == 7
    assert conf("--config", "b")[0].loss == "b"                       # a row that one axis has
    c, f = conf("--config", "second,b,gamma=4")
    assert c.loss == "b" and f.loss.keywords == dict(gamma=4.0, beta=0.2)


def test_a_dotted_key_is_its_axis_s_alone_and_the_stronger():
    _, f = conf("--beta=1", "--kl.beta=2")
    assert (f.loss.keywords, f.kl.keywords) == (dict(beta=1.0), dict(beta=2.0))
    _, f = conf("--config", "kl.beta=2,beta=3")
    assert (f.loss.keywords, f.kl.keywords) == (dict(beta=3.0), dict(beta=2.0))


def test_auto_is_what_it_comes_to_on_a_cpu():
    assert (conf()[0].device, conf()[0].dtype) == ("cpu", "float32")
    assert conf("--dtype", "bfloat16")[0].dtype == "bfloat16"
    with pytest.raises(UserError, match="--dtype float16: choose float32 or bfloat16"):
        conf("--dtype", "float16")


def test_a_field_s_own_arguments_are_idle_with_it():
    def readers(c, f):
        return dict(loss=(c.chat, "runs with --chat"))
    for argv in (["--gamma=2", "--loss=b"], ["--loss.beta=2"]):
        with pytest.raises(UserError, match="does not read it; --loss is for runs with --chat"):
            configure(Config, PRESETS, AXES, "", ["--device=cpu", *argv], readers)
        configure(Config, PRESETS, AXES, "", ["--device=cpu", "--chat", *argv], readers)


def test_a_base_is_known_by_what_changes_its_result():
    c, f = conf("--lr=0.1", "--micro=2", "--seed=3", "--keep=9", "--steps=7", "--kl.beta=2",
                "--save_every=1", "--compile")
    assert run.changed(c, f) == {"lr": 0.1, "seed": 3, "steps": 7, "kl.beta": 2.0}
    assert run.changed(*conf("--steps=4", "--dtype=float32")) == {}
    assert run.changed(*conf("--dtype=bfloat16")) == dict(dtype="bfloat16")
    both = run.settings(*conf("--gamma=2", "--loss=b"))
    assert both["loss.gamma"] == 2 and both["kl.beta"] == 0.5 and both["lr"] == 1e-3


@pytest.mark.parametrize("key, value, free", [
    *((k, v, True) for k, v in (("steps", "9"), ("keep", "5"), ("micro", "3"), ("stop", "9"),
                                ("eval_every", "3"), ("save_every", "3"), ("profile", "true"))),
    *((k, v, False) for k, v in (("seed", "1"), ("warmup", "2"), ("dtype", "bfloat16"),
                                 ("loss", "b"), ("kl.beta", "3"), ("chat", "true")))])
def test_a_resume_may_change_what_changes_no_result(key, value, free, workdir):
    with Run(*conf("--out", "o"), "t") as r:
        r.log(1, loss=1.0)
    again = conf("--out", "o", "--resume", f"--{key}={value}")
    if free:
        return Run(*again, "t").release()
    with pytest.raises(UserError, match=f"--resume: {key} was .* and is now"):
        Run(*again, "t")


# --- the run --------------------------------------------------------------------------------------


def test_a_resumed_run_has_the_newest_state_and_goes_on_from_its_step_and_time(workdir):
    clock = SimpleNamespace(now=100.0)
    with pytest.MonkeyPatch.context() as m:
        m.setattr(run, "time", SimpleNamespace(time=lambda: clock.now,
                                               perf_counter=time.perf_counter))
        for argv in (["--stop", "3"], ["--resume"]):
            with Run(*conf("--out", "o", "--save_every", "1", *argv), "t") as r:
                seen = list(r.steps(6))
                assert seen == ([0, 1, 2] if not r.start else [3, 4, 5])
                assert r.state is None or int(r.state["x"]) == 30 and r.state["step"] == 3
                for step in seen:
                    clock.now += 7
                    r.log(step + 1, loss=step, norm=2)
                    r.save(step + 1, fake, x=torch.tensor(10 * (step + 1)))
            clock.now += 1000                                     # while nothing runs
    assert [x["time"] for x in read_log("o")] == [7, 14, 21, 28, 35, 42]
    assert [x["loss"] for x in read_log("o")] == [0, 1, 2, 3, 4, 5]
    assert [p.name for p in run.steps_of("o")] == ["step-000005", "step-000006"]
    assert int(run.read_state("o/step-000006/state.pt")["x"]) == 60


def test_a_step_is_saved_once(workdir):
    with Run(*conf("--out", "o"), "t") as r:
        r.save(1, fake, x=1)
        r.save(1, lambda folder: pytest.fail("again"), x=2)
        assert run.read_state("o/step-000001/state.pt") == dict(step=1, x=1)


@pytest.mark.parametrize("key, stops", [("loss", True), ("norm", True), ("val_loss", True),
                                        ("critic loss", True), ("reward", False),
                                        ("normal", False)])
def test_a_loss_or_a_norm_that_is_not_finite_stops_the_run(key, stops, workdir):
    with Run(*conf("--out", "o"), "t") as r:
        for value in (math.nan, math.inf):
            if not stops:
                r.log(1, **{key: value})
                continue
            with pytest.raises(UserError, match=f"{key} became {value} at step 1; no checkpoint"):
                r.log(1, **{key: value})


def test_a_line_is_shown_at_the_end_when_asked_and_every_two_seconds(workdir, monkeypatch, capsys):
    now = [0.0]
    monkeypatch.setattr(run, "time", SimpleNamespace(time=lambda: now[0],
                                                     perf_counter=time.perf_counter))
    with Run(*conf("--out", "o"), "t") as r:
        for step in r.steps(5):
            now[0] = 100 + step / 2
            r.log(step + 1, show=step == 1, loss=step)
    shown = [line.split()[1] for line in capsys.readouterr().out.splitlines()]
    assert shown == ["1", "2", "5"]                     # 4 is 1.5 s after 2


def test_what_is_saved_is_looked_at_everywhere(workdir):
    """tensors in lists, dicts, tuples; whole numbers and texts are no matter"""
    bad = torch.tensor([1.0, math.inf])
    assert run.not_finite(dict(a=1, b=[torch.ones(2), (torch.ones(1), bad)])) == "b.1.1"
    assert run.not_finite([torch.ones(2).long(), "nan", None]) == "" and run.not_finite(bad) == "it"
    for name, x in (("good", torch.ones(2)), ("worse", bad)):
        (workdir / name / "deep").mkdir(parents=True)
        save_file({"w": x}, workdir / name / "deep" / "model.safetensors")
    assert (run.not_finite_in("good"), run.not_finite_in("worse")) == ("", "w")


def test_files_are_marked_by_name_size_and_ends(workdir):
    """of 70 MB the middle is not read"""
    (workdir / "m").mkdir()
    fake(workdir / "m")
    with open("m/model.safetensors", "wb") as file:
        file.truncate(70 << 20)
    first = run.mark_of(workdir / "m")
    for at, differs in ((35 << 20, False), ((70 << 20) - 5, True)):
        with open("m/model.safetensors", "r+b") as file:
            file.seek(at)
            file.write(b"y")
        assert (run.mark_of(workdir / "m") != first) == differs
    for name, text in (("a", "a"), ("b", "b"), ("twin", "a")):
        (workdir / name).write_text(text)
    assert run.mark_of(workdir, ["a"]) != run.mark_of(workdir, ["b"])
    assert run.mark_of(workdir, ["a"]) != run.mark_of(workdir, ["twin"])
    assert run.mark_of(workdir, ["a", "b"]) != run.mark_of(workdir, ["b", "a"])


def test_a_field_s_file_is_hashed_whoever_names_it(workdir):
    (workdir / "d.py").write_text("x = 1")
    (workdir / "fast").write_text("a file that a preset is called like")
    (workdir / "r/step-000002").mkdir(parents=True)
    fake(workdir / "r/step-000002")
    found = run.files_of(conf("--data", "d.py:x", "--init", "r", "--config", "fast")[0])
    assert found == dict(data=run.sha256("d.py"), init=run.mark_of(workdir / "r/step-000002"))


def test_checkpoints_of_a_run_are_told_by_their_numbers(workdir):
    for name in ("step-000009", "step-000010", "step-000011"):
        (workdir / "o" / name).mkdir(parents=True)
        fake(workdir / "o" / name)
    (workdir / "o/step-000011/config.json").unlink()
    assert run.checkpoint("o").name == "step-000010"
    assert "checkpoint is o/step-000009:" in run.older_than("o/step-000010")
    assert "has no older checkpoint" in run.older_than("o/step-000009")
    assert run.older_than("elsewhere") == ""


def test_a_run_is_finished_when_it_has_a_result(workdir):
    with Run(*conf("--out", "o"), "t") as r:
        r.log(1, loss=1)
        assert run.result("o") is None is run.result("nowhere")
        assert r.finish(gold=torch.tensor(2), x=1) == dict(gold=2.0, x=1.0) == run.result("o")


def test_batches_are_each_epoch_s_permutation():
    for epoch in (0, 3):
        order = torch.randperm(10, generator=torch.Generator().manual_seed(2 * 1_000_003 + epoch))
        got = torch.cat([batch_indices(10, 5, 2 * epoch + i, 2) for i in range(2)])
        assert torch.equal(got, order)
    across = batch_indices(10, 4, 2, 2)                       # an epoch's last two, the next's two
    order = [torch.randperm(10, generator=torch.Generator().manual_seed(2_000_006 + e))
             for e in (0, 1)]
    assert across.tolist() == [*order[0][8:].tolist(), *order[1][:2].tolist()]
    assert batch_indices(10, 10, 0, 1).tolist() != batch_indices(10, 10, 1, 0).tolist()


@pytest.mark.curve
def test_the_curve_s_panels_hold_their_keys(workdir, monkeypatch):
    drawn = []

    class Axis:
        def plot(self, x, y, label, **how):
            drawn.append((label, x, y))

        def set(self, title, **how):
            drawn.append(title)

        def legend(self):
            pass

    figure = SimpleNamespace(tight_layout=lambda: None, savefig=lambda path: path.write_text("x"))
    plt = SimpleNamespace(subplots=lambda rows, n, **how: (figure, [[Axis() for _ in range(n)]]),
                          close=lambda figure: None)
    monkeypatch.setattr(run, "pyplot", lambda: plt)
    rows = [dict(step=1, time=0, loss=3, val_loss=5), dict(step=4, time=0, loss=2),
            dict(step=5, time=0, **{"stage-0 loss": 9})]
    (workdir / "log.jsonl").write_text("".join(json.dumps(x) + "\n" for x in rows))
    run.draw(workdir, dict(both=["val_loss", "loss"], none=["reward"]))
    assert drawn == [("val loss", (1,), (5,)), ("loss", (1, 4), (3, 2)),
                     ("stage-0 loss", (5,), (9,)), "both"]


def test_a_report_has_the_start_beside_the_end(capsys):
    said = SimpleNamespace(say=print, folder="o", last=None)
    run.report(said, dict(gold=1.0, length=2.0), dict(length=20.0, gold=10.0),
               [("p", "t", "r"), ("q", "u", "")])
    text = capsys.readouterr().out
    assert [x.split() for x in text.splitlines() if x.startswith("  gold")] == [
        ["gold", "1.000", "10.000"]]
    assert "length                   2.000     20.000" in text
    assert "prompt     'p'\n  policy     't'\n  reference  'r'\n" in text and "no step" in text
    assert "policy     'u'\n\n" in text                        # without a reference no empty one


@pytest.mark.parametrize("dtype, worst, off, stops", [
    ("float32", 0.9e-3, 1.0, False), ("float32", 1.1e-3, 0.0, True),
    ("bfloat16", 1.0, 0.019, False), ("bfloat16", 0.0, 0.021, True)])
def test_the_first_ratio_is_held_by_its_worst_or_its_mean(dtype, worst, off, stops):
    metrics = dict(worst=worst, off=off)
    if not stops:
        return run.check_first_ratio(metrics, dtype)
    with pytest.raises(UserError, match=f"is off by {max(worst, off):.2g}"):
        run.check_first_ratio(metrics, dtype)


def test_times_and_sizes_are_in_seconds_and_bytes():
    assert 5e7 < run.peak_bytes("cpu") < 1e12
    assert abs(run.clock(torch.device("cpu")) - time.perf_counter()) < 5


def test_bandwidth_is_of_the_fastest_copy_both_ways(monkeypatch):
    ticks = iter([0, 4, 4, 5, 5, 8, 8, 10])
    empty = torch.empty
    monkeypatch.setattr(run, "time", SimpleNamespace(perf_counter=lambda: next(ticks)))
    monkeypatch.setattr(run.torch, "empty", lambda n, device: empty(100, device=device))
    assert run.bandwidth("cpu") == 2 * 400


def test_a_product_s_rate_is_of_the_fastest(monkeypatch):
    ticks = iter([0, 8, 8, 12, 12, 20, 20, 30, 30, 40, 40, 50])
    monkeypatch.setattr(run, "time", SimpleNamespace(perf_counter=lambda: next(ticks)))
    assert run.product_rate("cpu", torch.float32) == 2 * 1024 ** 3 / 4


def test_products_are_counted_with_what_they_had_to_take():
    a, b = torch.randn(6, 50), torch.randn(50, 4)
    flops, moved = 2 * 6 * 50 * 4, 4 * (6 * 50 + 50 * 4 + 6 * 4)
    for rate, speed, least in ((1e3, 1e9, flops / 1e3), (1e9, 1e3, moved / 1e3)):
        with run.Products(rate, speed) as products:
            a @ b
            a + 1
        assert products.flops == flops and products.least == pytest.approx(least)
    with run.Products(1.0, 1e30) as products:           # each product the longer of its own two
        torch.nn.functional.linear(a, b.T)
        torch.bmm(a[None], b[None])
        w = torch.ops.mkldnn._reorder_linear_weight(b.T.contiguous(), 6)
        torch.ops.mkldnn._linear_pointwise(a, w, None, "none", [], "")
        (a.clone().requires_grad_() @ b).sum().backward()
    assert products.flops == 5 * flops == products.least


def clocked(monkeypatch, *steps, counted=None):
    """A clock that has seen steps of [(part, seconds), …] and a rest of a second."""
    clock, now = run.Clock(), [0.0]
    monkeypatch.setattr(run, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    for i, parts in enumerate(steps):
        if i == counted:
            clock.products = SimpleNamespace(flops=0, least=0.0)
        begin = now[0]
        for part, seconds in parts:
            clock.next(part)
            now[0] += seconds
            if i == counted:
                clock.products.flops += int(seconds * 1e9)
                clock.products.least += seconds / 4
        row = clock.row()
        now[0] += 1
        if i == counted:
            clock.products.flops += 10 ** 9
        clock.end(now[0] - begin)
    return clock, row


def test_a_step_s_parts_are_told_in_its_row(monkeypatch):
    clock, row = clocked(monkeypatch, [("gen", 2), ("score", 3), ("gen", 4)])
    assert row == dict(t_gen=6, t_score=3) and clock.row() == {}
    assert clock.steps == [dict(gen=6, score=3, step=10)]


def test_the_profile_is_of_medians_without_the_first_and_the_counted_step(monkeypatch):
    """a tenth of a second of warm-up, and of counting, would be seen"""
    usual = [("gen", 2), ("update", 5)]
    clock, _ = clocked(monkeypatch, [("gen", 90), ("update", 9)], [("gen", 70), ("update", 8)],
                       usual, usual, [("gen", 3), ("update", 7)], counted=1)
    title, _, *lines = clock.table()
    assert title.startswith("profile: median of 3 steps")
    assert [line.split() for line in lines] == [
        ["gen", "2.0000", "25%", "70.00", "17.5000", "875%"],
        ["update", "5.0000", "62%", "8.00", "2.0000", "40%"],
        ["rest", "1.0000", "12%", "1.00", "0.0000", "0%"],
        ["step", "8.0000", "100%", "79.00", "19.5000", "244%"]]
    assert "three or more" in clocked(monkeypatch, usual, usual, counted=1)[0].table()[0]
    assert "three or more" in clocked(monkeypatch, usual, usual, usual)[0].table()[0]


def test_profile_counts_the_second_step_and_says_so_at_the_end(workdir, monkeypatch, capsys):
    monkeypatch.setattr(Run, "speeds", lambda self: (1e9, 1e30))
    x = torch.ones(10, 10)
    for words, told in ((["--profile", "true"], True), ([], False)):
        with Run(*conf("--out", f"o{told}", *words), "t") as r:
            for step in r.steps(4):
                r.phase("update")
                for _ in range(step + 1):
                    x @ x
                r.log(step + 1, loss=1.0)
            r.finish()
        out = capsys.readouterr().out
        assert ("GFLOP" in out) == told
        assert r.clock.counts == (dict(update=(4000, 4e-6), step=(4000, 4e-6)) if told else {})
        assert all(row.get("t_update", 0) > 0 for row in read_log(r.folder))
        assert len(r.clock.steps) == 4 - told


@pytest.mark.parametrize("changed, want", [("", "abc1"), (" M x.py", "abc1+")])
def test_a_commit_with_changes_is_marked(changed, want, monkeypatch):
    out = {"rev-parse": "abc1\n", "status": changed}
    monkeypatch.setattr(run.subprocess, "run", lambda words, **how: SimpleNamespace(
        stdout=out[words[3]]))
    assert run.commit() == want


def test_resume_goes_on_with_the_newest_run_of_the_name(workdir):
    (workdir / "my.toml").write_text("lr = 0.5")
    for _ in range(2):
        with Run(*conf("--config", "fast,my.toml,seed=2"), "t") as r:
            r.log(1, loss=1)
    assert sorted(p.name for p in (workdir / "out/t").iterdir()) == ["fast-my-seed=2",
                                                                     "fast-my-seed=2-2"]
    again = Run(*conf("--config", "fast,my.toml,seed=2", "--resume"), "t")
    assert again.folder.name == "fast-my-seed=2-2"
    again.release()


def test_kinds_of_a_json_file_s_values():
    good = dict(size=(1, 9), whole=(0, 9), number=(-1.5, 0), positive=(0.1, 2), flag=(True,),
                text=("", "x"), list=([],), object=({},))
    bad = dict(size=(0, -1, 1.0, True), whole=(-1, 0.5), number=(math.nan, math.inf, True, "1"),
               positive=(0, -1, math.inf), flag=(0, 1, "true"), text=(1,), list=({},), object=([],))
    for kind in run.KINDS:
        for x in good[kind]:
            run.expect(dict(x=x), "f.json", x=kind)
        for x in bad[kind]:
            with pytest.raises(UserError, match=f"f.json: x is .*: expected {run.KINDS[kind][0]}"):
                run.expect(dict(x=x), "f.json", x=kind)
    run.expect(dict(y=1), "f.json", x="size")
    for given in ({}, dict(x=None)):
        with pytest.raises(UserError, match="f.json: x is missing"):
            run.expect(given, "f.json", ("x",), x="size")


def test_what_is_in_the_way_is_set_aside_under_the_first_free_number(workdir):
    for name in ("a", "a.old-1"):
        (workdir / name).mkdir()
    run.set_aside("a")
    assert sorted(p.name for p in workdir.iterdir()) == ["a.old-1", "a.old-2"]
