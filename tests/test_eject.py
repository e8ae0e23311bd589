"""--eject: the script of one method is the spine and its chapters, and runs with the same
numbers."""
import importlib
import importlib.util
import json
import re
import sys
import textwrap

import pytest

from data import run
from data.run import UserError, read_log

SCRIPTS = ("sft", "ppo", "grpo", "dpo", "reward", "compress", "specdec")
FEW = [("ppo", ""), ("ppo", "raft"), ("sft", "pretrain"), ("sft", "lora"), ("grpo", "dapo"),
       ("grpo", "hapo"), ("dpo", "simpo"), ("dpo", "online"), ("reward", "margin"),
       ("compress", "armor"), ("compress", "kivi"), ("specdec", "lookup")]
ALL = [(script, name) for script in SCRIPTS for name in importlib.import_module(script).PRESETS
       if name not in run.SIZES]
TEACHER, OTHER = "--teacher=base:toyif_base", "--other=base:toyif_base"
MORE = dict(dckd=[TEACHER], adpa=[TEACHER, OTHER], aligndistil=[TEACHER, OTHER],
            **dict.fromkeys(("rlad", "kdrl", "opd", "exopd"), ["--teacher=base:chain_right"]))
# a spine of a draft, its costs and a race; one of thirteen axes, and a target's normaliser
LINES = dict.fromkeys(SCRIPTS, 650) | dict(specdec=900, ppo=1000)

SCRIPT = textwrap.dedent('''
    """mini.py - a spine and two chapters.

    Letters  N rows
    """
    import math
    from functools import partial, reduce


    def plain(x):
        return x


    SHAPERS, MEMORIES = dict(plain=plain), {}
    KINDS = dict(one=1, two=2)


    # === best: 2505.11225, the best yet =====================================================


    class Best:
        """What is remembered."""


    # it compares
    def history(x, best, *, weight=1.0):
        return partial(x, best * weight + KINDS["one"])


    MEMORIES["best"], SHAPERS["history"] = Best, history
    PRESETS["best"] = dict(shaper="history", weight=2.0)

    # === worse: 2505.11226, the worst yet ===================================================


    def worst(x, bad):
        return math.sqrt(x) + bad


    MEMORIES["bad"], SHAPERS["worst"] = Best, worst


    def train(c, f):
        return [MEMORIES, c, f]
    ''').strip()


def kept(row):
    """The names and rows that a run of the small script's row comes to."""
    found, _ = run.reach(SCRIPT, {"train", "SHAPERS"}, {"SHAPERS": row})
    units = run.units_of(SCRIPT)
    names = set().union(*(units[i].defines for i in found))
    return names | {f"{table}.{key}" for rows in found.values() for table, key, _ in rows or ()}


def test_a_run_reaches_its_row_and_what_it_asks_for():
    assert kept("plain") == {"train", "SHAPERS", "MEMORIES", "plain"}
    more = {"Best", "history", "partial", "reduce", "KINDS", "MEMORIES.best", "SHAPERS.history"}
    assert kept("history") >= more and not kept("history") & {"worst", "math", "MEMORIES.bad"}
    assert {"worst", "math", "MEMORIES.bad", "SHAPERS.worst"} <= kept("worst")
    assert not kept("worst") & {"history", "MEMORIES.best", "partial"}


def test_comments_belong_to_what_follows_them():
    unit = next(x for x in run.units_of(SCRIPT) if "history" in x.defines)
    assert SCRIPT.splitlines()[unit.first - 1] == "# it compares"


def test_headings_are_the_map():
    assert run.headings(SCRIPT) == [("best", "2505.11225, the best yet"),
                                    ("worse", "2505.11226, the worst yet")]


CLOCK = re.compile(r"^t_|time|seconds|share|per_s|per_token|speed|predicted|cost|bytes|gain")


def without_clock(numbers):
    """A row without what a clock says, or memory."""
    return {k: x for k, x in numbers.items() if not CLOCK.search(k)}


def log_of(main, folder, argv):
    """A tiny run's log and its result, without what a clock says."""
    try:
        main([*argv, "--out", str(folder), "--device", "cpu"])
    except UserError as e:                       # a size that a preset's data does not fit
        return [], dict(refused=str(e))
    rows = read_log(folder) if (folder / "log.jsonl").exists() else []
    result = json.loads((folder / "run.json").read_text()).get("result", {})
    return [without_clock(row) for row in rows], without_clock(result)


def ejected(script, name, folder):
    """The module of one preset's own script, and its text."""
    path = folder / f"{script}_{name or 'default'}.py"
    importlib.import_module(script).main([*(["--config", name] if name else []),
                                          *MORE.get(name, ()), "--eject", str(path)])
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module
    spec.loader.exec_module(module)
    return module, path.read_text()


def check_ejected(script, name, folder):
    """A preset's script is of the right size and runs as the preset does. What it does not have
    (a drafter that races beside the chosen one) it cannot measure."""
    module, text = ejected(script, name, folder)
    lines = text.splitlines()
    assert len(lines) <= LINES[script], f"{len(lines)} lines"
    assert max(map(len, lines)) <= 100 and "--eject" not in text.split('"""', 2)[2]
    config = f"{name},tiny" if name else "tiny"
    rows, result = log_of(importlib.import_module(script).main, folder / "a",
                          ["--config", config, *MORE.get(name, ())])
    own_rows, own = log_of(module.main, folder / "b", ["--config", "tiny"])
    assert own_rows == rows and own
    assert own == {k: x for k, x in result.items() if k in own or script != "specdec"}


@pytest.mark.parametrize("script, name", FEW)
def test_an_ejected_script_runs_with_the_same_numbers(script, name, shared_bases):
    check_ejected(script, name, shared_bases)


@pytest.mark.slow
@pytest.mark.parametrize("script, name", ALL)
def test_every_preset_can_be_ejected(script, name, shared_bases):
    check_ejected(script, name, shared_bases)


def test_an_ejected_script_names_its_method_and_has_its_values(workdir):
    _, text = ejected("ppo", "raft", workdir)
    assert "2304.06767" in text.split('"""')[1] and "SURROGATES[\"nll\"]" in text
    assert "ppo_clip" not in text and "likelihood(" not in text and "PRESETS = dict(" in text
    assert f"commit {run.commit()}" in text


def test_an_ejected_script_is_nobody_else_s(workdir, monkeypatch):
    """its runs go to a folder of its name, its help does not offer what it cannot, any text that a
    command line holds is a default, and a compression runs on one rank as its script does"""
    words = 'C:\\new\\x "quoted" \u2028'
    path = workdir / "mine_dapo.py"
    importlib.import_module("grpo").main(["--config", "dapo", "--watch", "", "--data", words,
                                          "--eject", str(path)])
    text = path.read_text()
    assert 'Run(c, f, "mine_dapo", CURVES)' in text and "refuse_ranks" not in text
    spec = importlib.util.spec_from_file_location("mine_dapo", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules["mine_dapo"] = module
    spec.loader.exec_module(module)
    assert module.Config().data == words
    module, text = ejected("compress", "wanda", workdir)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="runs on one rank"):
        module.main([])


def test_arguments_of_functions_elsewhere_are_kept(workdir):
    """optim.py's rules are not in an ejected sft.py, the values that a preset gives them are"""
    module, text = ejected("sft", "classp", workdir)
    assert "threshold=0.0" in text and "aux_lr=0.003" in text
    _, f = run.configure(module.Config, module.PRESETS, module.AXES, argv=[])
    assert f.optimiser.keywords["threshold"] == 0.0 and f.update.keywords["aux_lr"] == 0.003


def test_dtype_is_kept_where_it_was_asked_for(workdir):
    main = importlib.import_module("grpo").main
    main(["--config", "dapo", "--eject", "one.py"])
    main(["--config", "dapo", "--dtype", "bfloat16", "--eject", "two.py"])
    assert "dtype:" not in (workdir / "one.py").read_text()
    assert 'dtype: str = "bfloat16"' in (workdir / "two.py").read_text()


@pytest.mark.parametrize("name, words", [
    ("there.py", "is there already"), ("method", "give the name of a script"),
    ("my-method.py", "give the name of a script"), ("class.py", "give the name of a script"),
    ("json.py", "a module is called json"), ("model.py", "a module is called model"),
    ("none/x.py", "there is no folder none"), ("x.py --config dapo,tiny", "leave it out here")])
def test_eject_refuses_what_it_should(name, words, workdir):
    (workdir / "there.py").write_text("precious")
    with pytest.raises(UserError, match=words):
        importlib.import_module("grpo").main(["--eject", *name.split()])
    assert [p.name for p in workdir.iterdir()] == ["there.py"]
    assert (workdir / "there.py").read_text() == "precious"
