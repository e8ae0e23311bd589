"""data/run.py: configuration, the run's folder, resume, intervals and verdicts."""
import json
import math
import os
import subprocess
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Literal

import pytest
import torch
from conftest import ROOT
from safetensors.torch import save_file

import claims
from claims import (Claim, conclude_all, draw_sweep, gated, in_parts, interval, judge, of, sweep,
                    verdict)
from data import run
from data.run import Run, UserError, batch_indices, configure, read_log


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
    only_kl = conf("--kl.beta=2")[1]
    assert only_kl.loss(10) == pytest.approx(1.0) and only_kl.kl(10) == 20
    assert conf("--loss", str(tmp_path), "--gamma",
                "5")[1].loss(1) == pytest.approx(1.0)                                 # the row PATH


def test_a_preset_s_key_may_lie_idle_a_typed_one_may_not():
    """--config second sets gamma for loss b; choosing loss a leaves it idle, which is no user's
    mistake"""
    assert conf("--config", "second", "--loss", "a")[1].loss(10) == pytest.approx(1.0)


@pytest.mark.parametrize("text, value",
                         [("--flag", True), ("--flag=false", False), ("--flag true", True)])
def test_switches(text, value):
    assert conf(*text.split())[0].flag is value


@pytest.mark.parametrize("text, inside, outside, words", [
    ("(0, 1]", (1e-9, 0.5, 1), (0, -1, 1.1, math.nan, math.inf), "above 0 and at most 1"),
    ("[1, inf)", (1, 1e300), (0.99, math.inf, math.nan, -math.inf), "at least 1"),
    ("(-inf, inf)", (-1e300, 0), (math.inf, -math.inf, math.nan), "finite")])
def test_a_range_knows_what_is_in_it(text, inside, outside, words):
    kind = run.Range(text)
    assert all(x in kind for x in inside) and not any(x in kind for x in outside)
    assert str(kind) == words


@pytest.mark.parametrize("value, like, kind, words", [
    ("nan", 1.0, None, "must be at least 0"), ("-1", 1.0, None, "must be at least 0"),
                                                      ("-1", -5.0, None, ""),
    ("inf", -5.0, None, "must be finite"), ("0", 1.0, run.Positive, "must be above 0"),
                                                      ("0", 3, run.Count, "at least 1"),
    ("1", 0.5, run.Fraction, "below 1"), ("1", 0.5, run.Share, ""),
                                                      ("1e400", 1.0, None, "must be at least 0"),
    ("3000000000", 1, None, "at most 2147483647"),
    ("1e31", 1.0, None, "at most 1e"),
    ("-1e300", -5.0, None, "at most 1e"), ("9" * 5000, 1, None, "expected int"),
                                                      ("c", "a", Literal["a", "b"],
     "choose from a, b"), (3, 0, Literal[0, 1], "choose from 0, 1"),
                                                      (True, 1.0, None, "expected float"),
    (True, 1, None, "expected int"), (1, True, None, "expected bool"),
    ([1], 1.0, None, "expected float"),
    (2, 1.0, None, ""), (1.5, 1, None, "expected int"), (5, "x", None, "expected str"),
                                                      ("a\0b", "x", None, "zero byte")])
def test_what_a_value_may_be(value, like, kind, words):
    if not words:
        assert type(run.cast("key", value, like, kind)) is type(like)
        return
    with pytest.raises(UserError, match=f"^--key .*{words}"):
        run.cast("key", value, like, kind)


@pytest.mark.parametrize("text, words", [
    ("lr = [1]", "lr is a list"), ("lr = 2020-01-01", "lr is a date"),
    ("[lr]\na = 1", "did you mean .lr"), ("[a.b]\nc = 1", "a.b is a dict"),
    ("lr = true", "--lr True: expected float"), ("lr = nan", "--lr nan: must be at least 0"),
                                         ("config = 'fast'", "config belongs"),
    ("resume = true", "resume belongs"), ("steps = 1.5", "--steps 1.5: expected int"),
                                         ("lrr = 1", "did you mean 'lr'"),
    ("name = 5", "expected str")])
def test_a_toml_file_may_hold_numbers_switches_and_texts(text, words, workdir):
    (workdir / "x.toml").write_text(text)
    with pytest.raises(UserError, match=words):
        conf("--config", "x.toml")


def test_a_toml_that_is_none(workdir):
    (workdir / "x.toml").mkdir()
    (workdir / "y.toml").write_bytes(b"\xff\xfe")
    for name in "xy":
        with pytest.raises(UserError, match=f"{name}.toml is no TOML file"):
            conf("--config", f"{name}.toml")


def test_entries_of_config_are_parted_at_commas_but_not_within_numbers():
    got = run.entries("a,weights=0.2,0.8,./t.toml,4bit.toml,../x.toml,x=-1,2e-3,b")
    assert got == ["a", "weights=0.2,0.8", "./t.toml", "4bit.toml", "../x.toml", "x=-1,2e-3", "b"]
    assert run.entries("") == run.entries(",,") == []


def test_a_toml_file_s_tables_are_axes(workdir):
    (workdir / "x.toml").write_text("kl.beta = 2\n[loss]\nbeta = 3\n")
    _, f = conf("--config", "x.toml")
    assert f.kl.keywords["beta"] == 2 and f.loss.keywords["beta"] == 3


def test_a_key_that_its_dotted_twins_overrule_is_refused():
    assert conf("--beta=1", "--kl.beta=2")[1].loss(1) == 1               # loss reads it
    for argv in (["--beta=1", "--kl.beta=2", "--loss.beta=3"],
                 ["--loss=b", "--gamma=1", "--loss.gamma=2"]):
        with pytest.raises(UserError, match="does nothing beside"):
            conf(*argv)


def test_the_row_for_paths_is_no_word_of_the_command_line():
    for argv in (["--loss", "PATH"], ["--loss="], ["--config", "PATH"]):
        with pytest.raises(UserError, match="no (loss|preset) '(PATH)?'") as e:
            conf(*argv)
        assert "or PATH" not in str(e.value) and "PATH," not in str(e.value)


def test_a_command_leaves_its_ranks_together(monkeypatch):
    """main, then all wait for each other, then the group ends; one process alone does neither"""
    calls = []
    group = SimpleNamespace(is_initialized=lambda: True, barrier=lambda: calls.append("wait"),
                            destroy_process_group=lambda: calls.append("leave"))
    monkeypatch.setattr(run, "dist", group)
    run.cli(lambda: calls.append("main"))
    assert calls == ["main", "wait", "leave"]
    group.is_initialized = lambda: False
    run.cli(lambda: calls.append("main"))
    assert calls == ["main", "wait", "leave", "main"]


def test_a_key_is_given_once():
    for argv in (["--lr", "1", "--lr", "2"], ["--lr=1", "--lr=1"],
                 ["--config", "fast", "--config", "second"]):
        with pytest.raises(UserError, match="given twice"):
            conf(*argv)


def test_a_field_that_the_run_does_not_read_may_not_be_typed(workdir):
    """but a preset may set it, as it may an argument of another row"""
    def readers(c, f):
        return dict(lr=(c.flag, "runs with --flag"))

    def resolve(*argv):
        return configure(Config, PRESETS, AXES, "", argv, readers)
    with pytest.raises(UserError,
                       match="--lr: this run does not read it; --lr is for runs with --flag"):
        resolve("--lr", "0.5")
    (workdir / "x.toml").write_text("lr = 0.5")
    with pytest.raises(UserError, match="does not read it"):
        resolve("--config", "x.toml")
    assert resolve("--config", "fast")[0].lr == 0.1
    assert resolve("--lr", "0.5", "--flag")[0].lr == 0.5


@pytest.mark.parametrize("name, words", [("tpu", "choose auto, cpu"), ("cuda:x", "choose auto"),
                                         ("", "choose auto"),
                                         ("cpu:0", "choose auto"), ("cuda:99", "CUDA device")])
def test_a_device_that_is_not_there(name, words):
    with pytest.raises(UserError, match=words):
        run.device_of(name)


@pytest.mark.parametrize("argv, words", [
    (["--lrr", "1"], "unknown key --lrr; did you mean 'lr'"),
    (["--lr", "fast"], "--lr fast: expected float"),
    (["--steps", "1.5"], "--steps 1.5: expected int"),
    (["--flag=maybe"], "--flag maybe: expected bool"),
    (["--config", "fsat"], "no preset 'fsat'; did you mean 'fast'"),
    (["--config", "nowhere.toml"], "no config file nowhere.toml"),
    (["--config", "second", "--loss", "a", "--gamma", "1"],
     "unknown key --gamma; it belongs to loss 'b'"),
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


@pytest.mark.parametrize("bug", [RuntimeError("a bug"), RuntimeError("unsupported memory format"),
                                 KeyError("x")])
def test_other_errors_keep_their_traceback(bug):
    def main():
        raise bug
    with pytest.raises(type(bug)):
        run.cli(main)


@pytest.mark.parametrize("error",
                         [RuntimeError("DefaultCPUAllocator: can't allocate memory: tried 9 bytes"),
                                   torch.OutOfMemoryError("CUDA out of memory. Tried 9 GiB"),
                                   MemoryError()])
def test_out_of_memory_names_micro_and_shows_what_was_said(error, capsys):
    def main():
        raise error
    with pytest.raises(SystemExit) as stop:
        run.cli(main)
    err = capsys.readouterr().err
    assert stop.value.code == 2 and "--micro" in err and err.count("\n") == 1
    assert (str(error) or "MemoryError") in err


def test_an_error_of_the_system_is_one_line(capsys, workdir):
    def main():
        open(workdir / "no" / "such")
    with pytest.raises(SystemExit) as stop:
        run.cli(main)
    err = capsys.readouterr().err
    assert stop.value.code == 2 and err == f"error: {workdir}/no/such: No such file or directory\n"


def test_a_reader_that_leaves_is_no_error(workdir):
    """python … | head"""
    code = (f"import sys; sys.path.insert(0, {str(ROOT)!r}); from data.run import cli; "
            "cli(lambda: print('x' * 10 ** 6))")
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE,
                          stderr=subprocess.PIPE) as p:
        p.stdout.read(10)
        p.stdout.close()
        assert p.stderr.read() == b"" and p.wait() == 141


def test_a_closed_stdout_is_no_error():
    """python … >&-"""
    code = (f"import sys; sys.path.insert(0, {str(ROOT)!r}); from data.run import cli; "
            "cli(lambda: print(1))")
    told = subprocess.run(["sh", "-c", 'exec "$0" -c "$1" >&-', sys.executable, code],
                          stderr=subprocess.PIPE)
    assert told.returncode == 0 and told.stderr == b""


def test_torchrun_is_refused_where_ranks_would_do_the_same(monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="t.py runs on one rank, and would do the same 2 times"):
        run.launch("t", Config, PRESETS, AXES, "", lambda c, f: 1, [])
    assert run.launch("t", Config, PRESETS, AXES, "", lambda c, f: 1, [], ranks=True) == 1
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setattr(run.time, "sleep", lambda seconds: None)
    with pytest.raises(SystemExit):
        run.fail("of this rank alone")
    assert capsys.readouterr().err == "rank 1: error: of this rank alone\n"


# --- the folder -----------------------------------------------------------------------------------


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
        words = "loss became nan at step 4; the last good checkpoint is .*step-000003"
        with pytest.raises(UserError, match=words):
            r.log(4, loss=math.nan)


def test_a_run_that_never_began_leaves_no_folder(workdir):
    """a mistyped data set must not become the newest run, which --resume would pick; one that
    logged stays"""
    for rows, left in ((0, False), (1, True)):
        with pytest.raises(UserError), Run(*conf("--out", f"o{rows}"), "t") as r:
            if rows:
                r.log(1, loss=1.0)
            raise UserError("no such data")
        assert (workdir / f"o{rows}").exists() == left


def content(folder):
    """{path: bytes} of all files under a folder."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.mark.parametrize("files",
                         [["thesis.txt"], ["config.json", "model.safetensors"], ["log.jsonl"],
                                   ["x.tmp"],
                                   ["step-000001/config.json"], [".hidden"]])
@pytest.mark.parametrize("resume", [(), ("--resume",)])
def test_a_folder_that_holds_anything_but_a_run_is_refused_untouched(files, resume, workdir):
    for name in files:
        (workdir / "D" / name).parent.mkdir(parents=True, exist_ok=True)
        (workdir / "D" / name).write_text("years of work")
    before = content(workdir)
    with pytest.raises(UserError, match="no run"):
        Run(*conf("--out", "D", *resume), "t")
    assert content(workdir) == before


@pytest.mark.parametrize("out", ["file", "file/below", "."])
def test_what_is_no_folder_is_refused(out, workdir):
    (workdir / "file").write_text("x")
    with pytest.raises((UserError, OSError)):
        Run(*conf("--out", out), "t")
    assert content(workdir) == dict(file=b"x")


def test_an_empty_folder_will_do_and_outlives_a_run_that_never_began(workdir):
    (workdir / "D").mkdir()
    with pytest.raises(UserError), Run(*conf("--out", "D"), "t"):
        raise UserError("no such data")
    assert not any((workdir / "D").iterdir())
    with pytest.raises(UserError), Run(*conf("--out", "E/F/G"), "t"):
        raise UserError("no such data")
    assert [p.name for p in workdir.iterdir()] == ["D"]              # what it made, it took away
    began(*conf("--out", "D"))


def test_only_what_the_run_made_is_removed(workdir):
    """--keep 1 takes its older checkpoints, by name: not a copy, nor what the user keeps inside of
    one"""
    c, f = conf("--out", "o", "--steps", "4", "--keep", "1")
    with Run(c, f, "t") as r:
        for step in r.steps(3):
            r.save(step + 1, fake, x=torch.tensor(step))
            if step == 0:
                for name in ("step-000001-copy", "step-1", "step-000001.old"):
                    (workdir / "o" / name).mkdir()
                    (workdir / "o" / name / "config.json").write_text("mine")
                (workdir / "o/step-000001/eval").mkdir()
                (workdir / "o/step-000001/eval/notes.txt").write_text("mine")
    left = content(workdir / "o")
    assert {k for k in left if k.startswith("step-")} == {
        "step-000001-copy/config.json", "step-1/config.json", "step-000001.old/config.json",
        "step-000001/eval/notes.txt", "step-000003/config.json", "step-000003/state.pt"}
    assert run.checkpoint("o").name == "step-000003"


def test_what_stands_where_a_checkpoint_goes_is_set_aside(workdir):
    with Run(*conf("--out", "o"), "t") as r:
        r.log(1, loss=1.0)
        (workdir / "o/step-000001").mkdir()
        (workdir / "o/step-000001/notes.txt").write_text("mine")
        (workdir / "o/step-000002").mkdir()
        r.save(1, fake)
        r.save(2, fake)
    assert (workdir / "o/step-000001.old-1/notes.txt").read_text() == "mine"
    assert [p.name for p in run.steps_of("o")] == ["step-000001", "step-000002"]


def test_a_made_up_record_removes_nothing_outside(workdir):
    """run.json may have been edited: names that lead out of the run's folder are not followed"""
    began(*conf("--out", "o"))
    (workdir / "precious").mkdir()
    (workdir / "precious/x").write_text("mine")
    info = json.loads((workdir / "o/run.json").read_text())
    made = {"../precious": ["x"], "step-000001": ["../../precious/x", "/etc/nosuch"],
            "step-000002": []}
    (workdir / "o/run.json").write_text(json.dumps(info | dict(made=made, writing="../precious")))
    with Run(*conf("--out", "o", "--resume", "--keep", "1"), "t") as r:
        r.save(3, fake)
        for name in made:
            r.remove(name)
    assert (workdir / "precious/x").read_text() == "mine"


def test_steps_are_ordered_by_number(workdir):
    c, f = conf("--out", "o", "--keep", "1")
    with Run(c, f, "t") as r:
        for step in (999_998, 999_999, 1_000_000, 1_000_001):
            r.save(step, fake)
    assert [p.name for p in run.steps_of("o")] == ["step-1000001"]
    assert run.checkpoint("o").name == "step-1000001"
    with Run(*conf("--out", "o", "--resume"), "t") as r:
        assert r.start == 1_000_001


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("where", ["weights", "critic", "state"])
def test_what_is_not_finite_is_not_saved_and_the_good_one_stays(bad, where, workdir):
    def write(value):
        def make(folder):
            fake(folder)
            whole = 1.0 if where == "critic" else value
            save_file({"w": torch.tensor([1.0, whole])}, folder / "model.safetensors")
            if where == "critic":
                (folder / "critic").mkdir()
                save_file({"v": torch.tensor([value])}, folder / "critic/model.safetensors")
        return make
    with pytest.raises(UserError,
                       match=r"not finite at step 2; the last good checkpoint is .*step-000001"):
        with Run(*conf("--out", "o", "--keep", "1"), "t") as r:
            r.save(1, write(1.0), opt=dict(m=[torch.ones(2)]))
            moment = bad if where == "state" else 1.0
            r.save(2, write(1.0 if where == "state" else bad), opt=dict(m=[torch.tensor([moment])]))
    assert [p.name for p in run.steps_of("o")] == ["step-000001"]
    assert not [p for p in (workdir / "o").iterdir() if p.name.endswith(".tmp")]


def test_weights_are_looked_at_before_they_are_evaluated(workdir):
    model = torch.nn.Linear(2, 2)
    with Run(*conf("--out", "o"), "t") as r:
        r.check(1, model)
        model.bias.data[1] = math.inf
        with pytest.raises(UserError, match="the weight bias is not finite at step 2"):
            r.check(2, model)
    assert run.not_finite(dict(a=[dict(b=torch.tensor(math.nan))])) == "a.0.b"
    assert run.not_finite(torch.ones(2, dtype=torch.float8_e4m3fn)) == ""


@pytest.mark.parametrize("argv", [["--out", "o"], ["--out", "o", "--resume"]])
def test_one_run_has_one_process(argv, workdir):
    """the second is refused, the log of the first goes on; when the first has ended, --resume
    works"""
    with Run(*conf("--out", "o"), "t") as r:
        r.log(1, loss=1.0)
        with pytest.raises(UserError,
                           match=f"another process is at work on this run .{os.getpid()} on"):
            Run(*conf(*argv), "t")
        r.log(2, loss=1.0)
        r.save(2, fake)
    assert [row["step"] for row in read_log("o")] == [1, 2]
    with Run(*conf("--out", "o", "--resume"), "t") as r:
        assert r.start == 2


def test_two_that_start_at_once_get_two_folders(workdir):
    with Run(*conf(), "t") as a, Run(*conf(), "t") as b:
        assert {a.folder.name, b.folder.name} == {"default", "default-2"}


FAULTS = dict(cut=lambda p: (p
                             / "state.pt").write_bytes((p / "state.pt").read_bytes()[:50]),
              gone=lambda p: (p
                              / "state.pt").unlink(),
              text=lambda p: (p
                              / "state.pt").write_text("x"),
              other=lambda p: torch.save([1],
                                         p / "state.pt"),
              code=lambda p: torch.save(dict(step=math.sin), p / "state.pt"))


@pytest.mark.parametrize("fault", FAULTS)
def test_a_broken_state_names_the_next_older_checkpoint(fault, workdir):
    with Run(*conf("--out", "o"), "t") as r:
        r.save(1, fake)
        r.save(2, fake)
    FAULTS[fault](workdir / "o/step-000002")
    before = content(workdir)
    with pytest.raises(UserError,
                       match=r"step-000002/state.pt cannot be read .* older .* is o/step-000001"):
        Run(*conf("--out", "o", "--resume"), "t")
    assert content(workdir) == before
    (workdir / "o/step-000002").rename(workdir / "away")              # what the message says
    with Run(*conf("--out", "o", "--resume"), "t") as r:
        assert r.start == 1


@pytest.mark.parametrize("name, text, words", [
    ("run.json", "{", "is not JSON"), ("run.json", "[]", "expected an object"),
                                               ("run.json", "{}", "config is missing"),
    ("run.json", '{"config": 5}', "config is '5': expected an object"),
    ("run.json", '{"config": {}, "config": {}}', "stands twice"),
    ("log.jsonl", "[]\n{}\n", "log.jsonl:1: no row"),
                                               ("log.jsonl", '{"step": "x"}\n{}\n',
                                                "log.jsonl:1: no row"),
    ("data.txt", "other text", "--name data.txt does not hold what it did")])
def test_a_run_s_own_files_are_read_with_care(name, text, words, workdir):
    (workdir / "data.txt").write_text("text")
    with Run(*conf("--out", "o", "--name", "data.txt"), "t") as r:
        r.log(1, loss=1.0)
        r.save(1, fake)
    (workdir / (name if name == "data.txt" else f"o/{name}")).write_text(text)
    with pytest.raises(UserError, match=words):
        Run(*conf("--out", "o", "--resume", "--name", "data.txt"), "t")


def test_a_checkpoint_that_changed_is_not_the_one_the_run_began_with(workdir):
    """the folder that a field names: its config, and its weights' size, first and last megabyte"""
    (workdir / "m").mkdir()
    for name in ("config.json", "model.safetensors"):
        (workdir / "m" / name).write_bytes(b"x" * (5 << 20))
    began(*conf("--out", "o", "--name", "m"))
    Run(*conf("--out", "o", "--name", "m", "--resume"), "t").release()
    (workdir / "m/model.safetensors").write_bytes(b"x" * (5 << 20) + b"y")
    with pytest.raises(UserError, match="--name m does not hold what it did"):
        Run(*conf("--out", "o", "--name", "m", "--resume"), "t")


def test_a_newest_checkpoint_without_its_config_is_not_passed_over(workdir):
    with Run(*conf("--out", "o"), "t") as r:
        r.save(1, fake)
        r.save(2, fake)
    (workdir / "o/step-000002/notes.txt").write_text("mine")  # what the user adds is no change
    Run(*conf("--out", "o", "--resume"), "t").release()
    (workdir / "o/step-000002/config.json").unlink()
    with pytest.raises(UserError,
                       match="step-000002 has no config.json any more; .* is .*step-000001"):
        Run(*conf("--out", "o", "--resume"), "t")


def test_a_state_of_another_run_is_refused(workdir):
    for out in "ab":
        with Run(*conf("--out", out), "t") as r:
            r.save(1, fake, x=torch.tensor(ord(out)))
    other = (workdir / "b/step-000001/state.pt").read_bytes()
    (workdir / "a/step-000001/state.pt").write_bytes(other)
    with pytest.raises(UserError, match="a/step-000001 is not as this run wrote it"):
        Run(*conf("--out", "a", "--resume"), "t")


def test_a_run_of_another_script_is_not_resumed(workdir):
    began(*conf("--out", "o"))
    with pytest.raises(UserError, match="that run is one of t.py"):
        Run(*conf("--out", "o", "--resume"), "u")


def test_a_full_disk_is_told_and_leaves_the_older_checkpoint(workdir):
    def full(folder):
        (folder / "config.json").write_text("{}")
        raise OSError(28, "No space left on device", "x")
    with pytest.raises(UserError,
                       match="step-000002 cannot be .*No space left.*step-000001 is the newest"):
        with Run(*conf("--out", "o", "--keep", "1"), "t") as r:
            r.save(1, fake)
            r.save(2, full)
    assert [p.name for p in run.steps_of("o")] == ["step-000001"]
    assert not [p for p in (workdir / "o").iterdir() if p.name.endswith(".tmp")]


def test_a_curve_that_fails_hides_nothing(workdir, monkeypatch, capsys):
    monkeypatch.setattr(run, "draw", lambda *a: 1 / 0)
    run_of_one = Run(*conf("--out", "o"), "t", {"loss": ["loss"]})
    with pytest.raises(UserError, match="the first error"), run_of_one as r:
        r.log(1, loss=1.0)
        raise UserError("the first error")
    with Run(*conf("--out", "p"), "t", {"loss": ["loss"]}) as r:
        r.log(1, loss=1.0)
    assert "p/curve.png could not be drawn: division by zero" in capsys.readouterr().err


def test_checkpoint_names_what_is_wrong(tmp_path):
    with pytest.raises(UserError, match="does not exist"):
        run.checkpoint(tmp_path / "nothing")
    with pytest.raises(UserError, match="neither config.json nor step"):
        run.checkpoint(tmp_path)


def test_batches_cover_every_row_once_an_epoch_and_depend_on_seed_and_step_only():
    seen = torch.cat([batch_indices(10, 4, step,
                                    1) for step in range(5)])            # two epochs of ten rows
    assert sorted(seen[:10].tolist()) == sorted(seen[10:].tolist()) == list(range(10))
    assert seen[:10].tolist() != seen[10:].tolist() != list(range(10))
    assert batch_indices(10, 4, 3, 1).tolist() == seen[12:16].tolist()
    assert batch_indices(10, 4, 3, 2).tolist() != seen[12:16].tolist()
    with pytest.raises(UserError, match="empty"):
        batch_indices(0, 4, 0, 0)


# --- claims ---------------------------------------------------------------------------------------


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


def launch_claim(claim, train, *argv):
    """A script's main, asked for its only claim, c."""
    options = dict(run.parse(["--claim", "c", *argv], {}))
    setup = partial(configure, Config, PRESETS, AXES, "")
    return claims.run_from_options("t", dict(c=claim), setup, (PRESETS, AXES), train,
                                   options)


def test_a_claim_runs_every_arm_and_concludes(workdir):
    claim = Claim("fast is better", "none", arms=dict(ours="fast", base="second"), metric="score",
                  tests={"ours - base": {"ours": 1, "base": -1},
                         "base - ours": {"ours": -1, "base": 1}},
                  conclude=lambda v: " / ".join(v.values()))
    report = claims.run_claim("c", claim, "t", claim_setup, claim_train, seeds=3, jobs=2)
    assert report["verdict"] == "holds / does not hold"
    assert report["arms"]["ours"]["score"]["values"] == pytest.approx([0.1, 0.11, 0.12])
    assert (json.loads((workdir / "data/results/c.json").read_text())["tests"][0]["difference"]
            == pytest.approx(0.099))
    assert (workdir / "data/results/c.png").exists()
    stamp = (workdir / "out/claims/c/ours-s0/run.json").stat().st_mtime_ns
    claims.run_claim("c", claim, "t", claim_setup, claim_train, seeds=3,
                  jobs=1)                                                 # finished arms are reused
    assert (workdir / "out/claims/c/ours-s0/run.json").stat().st_mtime_ns == stamp


def test_the_models_of_a_claim_are_made_once_for_every_seed(workdir, monkeypatch):
    asked = []

    def main(argv):
        asked.append(argv)
        folder = Path(argv[-1])
        folder.mkdir()
        (folder / "run.json").write_text('{"result": {}}')

    monkeypatch.setitem(sys.modules, "maker", SimpleNamespace(main=main))
    def claim_of(rows):
        return Claim("none", "none", arms={}, metric="score", tests={},
                     models=dict(rm=("maker", f"ring,rows={rows}"), late=("maker", "x,on={rm}")))

    def make(claim, model, seed):
        script, options = claim.models[model]
        claims.make_model((script, claims.with_models(options, claim, seed), seed,
                           claims.model_folder(claim, model, seed), 1))

    claim = claim_of(3)
    for seed in (4, 7, 4):
        make(claim, "rm", seed)
    assert [argv[:-1] for argv in asked] == [
        ["--config", "ring,rows=3", "--seed", seed, "--out"] for seed in ("4", "7")]
    assert claims.with_models("ring,reward={rm}/a", claim, 7) == f"ring,reward={asked[1][-1]}/a"
    assert claims.with_models("rewards={rm}/a+{late}/b,c=1", claim) == "rewards=.+.,c=1"
    make(claim, "late", 7)
    make(claim, "late", 7)
    make(claim_of(5), "late", 7)                    # of another model: another
    first, second = asked[2:]
    assert first[1] == f"x,on={asked[1][-1]}" != second[1] and first[-1] != second[-1]


def tuned_train(c, f):
    """A run whose metric has its optimum at lr 0.05, and which diverges above 0.3."""
    with Run(c, f, "t") as r:
        if c.lr > 0.3:
            r.log(1, loss=math.nan)
        r.log(1, score=c.lr + c.seed, seconds=2.0)
        return r.finish(score=c.lr + c.seed, tune=abs(math.log(c.lr / 0.05)), seed=c.seed)


def test_every_arm_is_tuned_on_a_seed_of_its_own_until_the_best_is_inside(workdir):
    """from 1e-3 and from 0.1, ratio 2: 0.064 and 0.05; what diverges is no candidate; seeds 0, 1
    count"""
    claim = Claim("none", "none", arms=dict(low="second", high="fast"), metric="score",
                  tests={"constant": {"low": 1, "": -0.06}}, tune=("lr", 2.0, "tune"),
                  curve="score")
    report = claims.run_claim("c", claim, "t", claim_setup, tuned_train, seeds=2, jobs=1)
    low, high = report["tuned"]["low"], report["tuned"]["high"]
    assert low["value"] == 0.064 and not low["edge"] and high["value"] == 0.05 and not high["edge"]
    assert list(low["grid"]) == [0.0005, 0.001, 0.002, 0.004, 0.008, 0.016, 0.032, 0.064, 0.128]
    assert list(high["grid"]) == [0.025, 0.05, 0.1, 0.2]
    assert report["arms"]["low"]["score"]["values"] == pytest.approx([0.064, 1.064])
    assert report["tests"][0]["difference"] == pytest.approx(0.504)
    assert report["curve"]["low"] == [[1, 2.0, 0.564]]
    assert (workdir / "data/results/c_curves.png").exists()
    assert (workdir / f"out/claims/c/low-s{claims.TUNING_SEED}-lr0.064/run.json").exists()
    got = claims.tune_arms(claim, claim_setup,
                        lambda arm, seed, changes, tag: (arm, changes), Serial(),
                        widest=2)
    assert got["low"]["edge"] and got["low"]["value"] == 0.008 and not got["high"]["edge"]


class Serial:
    """A pool whose map answers from the optimum at 0.05, infinite above 0.3."""

    def map(self, fn, jobs):
        values = [float(changes[0].split("=")[1]) for _, changes in jobs]
        return [{} if x > 0.3 else dict(tune=abs(math.log(x / 0.05))) for x in values]


def test_a_claim_s_options_are_checked_before_any_arm_runs(workdir):
    claim = Claim("none", "none", arms=dict(low="second"), metric="score", tests={})
    for argv, words in ((["--foo", "1"], "unknown key --foo"),
                        (["--steps", "-1"], "must be at least 0"),
                        (["--config", "fsat"], "did you mean 'fast'")):
        with pytest.raises(UserError, match=words):
            launch_claim(claim, tuned_train, *argv)
    assert not any(workdir.iterdir())


def test_a_claim_s_tuned_key_cannot_be_set(workdir):
    claim = Claim("none", "none", arms=dict(low="second"), metric="score", tests={},
                  tune=("lr", 2.0, "tune"))
    with pytest.raises(UserError, match="--claim c with lr: the claim sets it itself"):
        launch_claim(claim, tuned_train, "--lr", "1")


def test_without_torchrun_there_is_one_rank():
    assert run.start_ranks("cpu") == (0, 1) and run.rank() == 0 and run.share("x") == "x"


# --- claims whose arms share a run ----------------------------------------------------------------

SHARED = Claim("a beats b", "", dict(a="both", b="both", c="alone"), "gold",
               {"a > b": {"a": 1, "b": -1}, "peak: a > c": {"a|peak": 1, "c|peak": -1},
                "gate": {"a": 1, "": -2}},
               conclude=in_parts("a > b", "peak", "gate"), sweep=("n", ("gold",)))


def shared_results(seeds=3):
    """What two runs a seed return: one of the arms a and b, one of c alone."""
    both = [{"a|gold": 3 + s, "b|gold": 1.5 + s, "a|peak": 1 + .1 * s, "a|gold@1": s,
             "a|gold@4": 2 * s, "b|gold@1": 0} for s in range(seeds)]
    return {(arm, s): both[s] if arm != "c" else {"gold": .5 * s, "peak": 1 - .1 * s, "gold@2": 7}
            for arm in "abc" for s in range(seeds)}


def test_arms_of_one_run_are_told_apart():
    report = judge("x", SHARED, 3, shared_results())
    assert [report["arms"][arm]["gold"]["values"]
            for arm in "abc"] == [[3, 4, 5], [1.5, 2.5, 3.5], [0, .5, 1]]
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
    assert [p[:2] for p in got["a"]] == [[1.0, 1.0], [4.0, 2.0]]
    assert [p[:2] for p in got["b"]] == [[1.0, 0]]
    assert got["c"][0][:2] == [2.0, 7]
    draw_sweep(dict(sweep=dict(gold=got)), "n", tmp_path / "x.png")
    assert (tmp_path / "x.png").stat().st_size > 1000


def test_a_metric_that_no_run_has_is_named():
    with pytest.raises(UserError, match="the run of arm 'a' has no 'gould'"):
        of({"a|gold": 1.0}, "a", "gould")


def test_an_arm_of_other_settings_is_set_aside_not_deleted(workdir):
    for lr in (0.1, 0.2):
        claims.run_arm((claim_setup, claim_train, ["--config", "fast", f"--lr={lr}"], "arm", 1))
        (workdir / "arm/notes.txt").write_text("mine")
    assert (workdir / "arm.old-1/notes.txt").exists() and run.result("arm")["score"] == 0.2


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
        assert (run.stage("a", write("a")), run.at, run.stage("b", write("b")),
                run.at)[1::2] == (1, 2)
        run.stage("c", write("c"))
    assert made == ["a", "b", "c"] and [r["loss"] for r in read_log("o")] == [0, 1]


def test_a_stage_s_loss_stops_the_run_too(workdir):
    c, f = conf("--out", "o")
    with Run(c, f, "x") as run, pytest.raises(UserError, match="member-0 loss became nan"):
        run.log(1, **{"member-0 loss": math.nan})


# --- the dtype ------------------------------------------------------------------------------------


def stored(folder, *shape, base=""):
    """A checkpoint's folder with one tensor, or an adapter's on a base."""
    folder.mkdir()
    save_file({"w": torch.zeros(shape)}, folder / "model.safetensors")
    name, d = ("adapter_config.json", dict(base_model_name_or_path=base)) if base else (
        "config.json", {})
    (folder / name).write_text(json.dumps(d))
    return str(folder)


def test_a_cpu_computes_in_bfloat16_where_it_is_faster_and_the_model_large(tmp_path, monkeypatch):
    large, small = stored(tmp_path / "a", 101, 10), stored(tmp_path / "b", 99, 10)
    adapter = stored(tmp_path / "c", 2, 10, base=large)
    monkeypatch.setattr(run, "MANY", 1_000)
    assert [run.numbers_in(x) for x in (large, small, adapter)] == [1010, 990, 1030]
    assert run.numbers_in("base:toyif") == run.numbers_in("") == run.numbers_in("nowhere") == 0

    def auto(gain, init):
        monkeypatch.setattr(run, "bfloat16_gain", lambda: gain)
        return run.with_device(dict(device="cpu", dtype="auto", init=init))["dtype"]
    assert [auto(1.31, x) for x in (large, small, adapter, "")] == [
        "bfloat16", "float32", "bfloat16", "float32"]
    assert auto(1.29, large) == "float32"
    monkeypatch.setattr(run, "bfloat16_gain", lambda: 1 / 0)           # nothing is measured for it
    assert run.with_device(dict(device="cpu", dtype="auto", init=small))["dtype"] == "float32"
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert auto(9.0, large) == "float32"


def test_the_gain_of_bfloat16_is_a_ratio_of_layers(monkeypatch):
    now = [0.0]

    def layer(x, w):
        now[0] += 3.0 if x.dtype == torch.float32 else 2.0
    monkeypatch.setattr(run.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(torch.nn.functional, "linear", layer)
    assert run.bfloat16_gain.__wrapped__() == 1.5
