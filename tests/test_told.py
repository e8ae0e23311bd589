"""What can be known at once is told at once, in every script: before a base is made, and without a
trace."""
import importlib
import json
import re
import subprocess
import sys
import time
from typing import get_args

import fuzz
import pytest
from conftest import ROOT

from data.run import Range, UserError, configure, kinds
from data.tasks import scorer, task
from data.text import documents, examples, read_jsonl
from data.tokenizer import Tokenizer, bytes_tokenizer

SCRIPTS = {name: importlib.import_module(name) for name in fuzz.SCRIPTS}
PAIR = '{"prompt": "a", "chosen": "b", "rejected": "c"}\n'


# --- before a base is made ------------------------------------------------------------------------


@pytest.mark.parametrize("script, argv, words", [
    *((name, ["--data", "none.jsonl"], "no file and no named data 'none.jsonl'")
      for name in SCRIPTS),
    *((name, ["--init", "none"], "none does not exist") for name in SCRIPTS),
    *((name, ["--init", "base:"], "names no preset") for name in SCRIPTS),
    *((name, ["--init", "base:pretrian"], "did you mean 'pretrain'") for name in SCRIPTS),
    *((name, ["--init", "empty"], "neither config.json nor step") for name in SCRIPTS),
    *((name, ["--device", "cuda:99"], "CUDA device") for name in SCRIPTS),
    *((name, ["--kernels", "none"], "no kernels 'none'") for name in SCRIPTS),
    *((name, ["--seed", str(2 ** 70)], "must be at most") for name in SCRIPTS),
    *((name, ["--data", "broken.jsonl"], "broken.jsonl:2: not a JSON object")
      for name in ("sft", "grpo", "dpo", "reward")),
    ("sft", ["--watch", "none.jsonl"], "none.jsonl"),
    ("sft", ["--context", "9999"], "--context 9999 exceeds the 512"),
    ("sft", ["--model", "1x64"], "--model is for a new model"),
    ("sft", ["--config", "dckd"], "needs --teacher"),
    ("sft", ["--config", "dckd", "--teacher", "none"], "none does not exist"),
    ("sft", ["--config", "adpa", "--teacher", "base:toyif", "--other", "none"],
     "none does not exist"),
    ("sft", ["--config", "pretrain", "--model", "big"], "--model big"),
    ("sft", ["--feedback", "both"], "signatures"),
    ("ppo", ["--base", "none"], "none does not exist"),
    ("ppo", ["--reward", "empty"], "neither config.json"),
    ("ppo", ["--advantage", "best", "--samples", "1"], "at least two"),
    ("ppo", ["--data", "stdlib"], "is a text"),
    ("grpo", ["--config", "kdrl", "--teacher", "none"], "none does not exist"),
    ("grpo", ["--reward", "none.py:f"], "of a file that exists"),
    ("grpo", ["--watch", "nothing"], "no task 'nothing'"),
    ("dpo", ["--config", "online", "--judge", "empty"], "neither config.json"),
    ("dpo", ["--config", "madpo", "--judge", "cdr", "--strong", "none"], "none does not exist"),
    ("reward", ["--eval", "none"], "none does not exist"),
    ("reward", ["--recipe", "armo", "--data", "toyif"], "needs --data ring"),
    ("reward", ["--context", "9999"], "--context 9999 exceeds the"),
    ("compress", ["--domain", "none.txt", "--method", "dprune"], "none.txt"),
    ("compress", ["--context", "9999"], "at most"),
    ("specdec", ["--draft", "none"], "none does not exist"),
    ("specdec", ["--draft", "base:non"], "no preset 'non'"),
    ("specdec", ["--config", "ead", "--thresholds", "x"], "numbers with"),
    ("specdec", ["--context", "9999"], "--context 9999 exceeds")])
def test_nothing_is_made_before_what_is_missing_is_told(script, argv, words, workdir):
    (workdir / "empty").mkdir()
    (workdir / "broken.jsonl").write_text(PAIR + "{\n")
    began = time.monotonic()
    with pytest.raises(UserError, match=words):
        SCRIPTS[script].main(argv)
    assert not (workdir / "out").exists() and time.monotonic() - began < 10


NUMBERS = ("lr", "clip", "temperature", "batch", "epochs", "noise", "keep")
ROWS = dict(noise=["--noise=noisy", "--rate"])           # where a field names a row: its number


@pytest.mark.parametrize("script, field", [(name, field) for name, module in SCRIPTS.items()
                                           for field in NUMBERS if hasattr(module.Config, field)])
@pytest.mark.parametrize("value", ["nan", "inf", "-1"])
def test_ranges_hold_in_every_script(script, field, value, workdir):
    named = ROWS[field] if isinstance(getattr(SCRIPTS[script].Config, field), str) else []
    *row, option = named or [f"--{field}"]
    with pytest.raises(UserError, match=f"{option} {value}: (must be|expected)"):
        SCRIPTS[script].main([*row, f"{option}={value}"])
    assert not any(workdir.iterdir())


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_default_and_preset_is_within_its_ranges(script):
    """and every annotation is one that cast understands"""
    module = SCRIPTS[script]
    for name in ["", *module.PRESETS]:
        configure(module.Config, module.PRESETS, module.AXES, "", ["--config", name])
    for rows in module.AXES.values():
        for fn in rows.values():
            assert all(isinstance(x, Range) or get_args(x) for x in kinds(fn).values())


# --- data -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("text, words", [
    (b'{"prompt": "a", "completion": "b"}\n{"prompt": "a", "prompt": "b", "completion": "c"}\n',
     ":2: .*'prompt' stands twice"),
    (b'{"prompt": "a", "completion": "\\ud83d"}\n', ":1: .* is half of a character"),
    (b'{"prompt": "a", "completion": ""}\n{"prompt": "b", "completion": " "}\n',
     "every completion is empty"),
    (b"[" * 100_000, ":1: not a JSON object"), (b"\xff\xfe", "cannot be read as UTF-8"),
    (b"\n \n", "the file is empty")])
def test_a_data_file_is_read_with_care(text, words, workdir):
    (workdir / "d.jsonl").write_bytes(text)
    with pytest.raises(UserError, match=words):
        examples("d.jsonl")


def test_whole_characters_pass(workdir):
    text = '{"prompt": "\\\\ud83d\\\\ude00 and \\\\ud", "completion": "\\ud83d\\ude00"}\n'
    (workdir / "d.jsonl").write_text(text)
    assert read_jsonl("d.jsonl")[0]["completion"] == "\N{GRINNING FACE}"


@pytest.mark.parametrize("name, text", [("c.txt", "<|endoftext|>" * 9), ("c.txt", "a"),
    ("c.jsonl", '{"text": ""}\n' * 3)])
def test_a_corpus_without_text(name, text, workdir):
    (workdir / name).write_text(text)
    with pytest.raises(UserError, match="there is no text in it"):
        documents(name)


def test_a_row_that_is_too_long_is_told_by_its_line(workdir, capsys):
    """positions of a shuffled list are not positions in the file"""
    fuzz.prepare(workdir)
    rows = [dict(prompt=f"{i}+1=", completion=f"#### {i + 1}") for i in range(60)]
    rows += [dict(prompt="z" * 490, completion="#### 7")]
    (workdir / "late.jsonl").write_text(fuzz.lines(rows))
    SCRIPTS["sft"].main(fuzz.command("sft", "--context", "128", "--data", "late.jsonl"))
    assert re.search(r"late: 1 of \d+ rows are longer than --context 128 and left out "
                     r"\(late.jsonl:61\)", capsys.readouterr().out)


def test_few_labels_that_are_alike_where_they_are_held_out_still_train(workdir):
    fuzz.prepare(workdir)
    out = SCRIPTS["dpo"].main(fuzz.command("dpo", "--config", "kto,tiny", "--data", "labels.jsonl"))
    assert "val_accuracy" not in out and "val_kl" in out


# --- a reward of the user's -----------------------------------------------------------------------


@pytest.mark.parametrize("code, words", [
    ("def f(problem, text, finished): return None", "returned None .*expected a finite number"),
    ("def f(problem, text, finished): return float('nan')",
     "returned nan .*expected a finite number"),
    ("def f(problem, text, finished): return '1.0'", "returned 1.0 .*expected a finite number"),
    ("def f(problem, text, finished): return [1.0]", "expected a finite number"),
    ("def f(problem, text, finished):\n    return 1 / 0",
     r"failed on the response 'hi': ZeroDivisionError.*\(line 2\)"),
    ("import sys\ndef f(problem, text, finished): sys.exit(0)", "failed on the response"),
    ("async def f(problem, text, finished): return 1.0",
     "has no function 'f' that is called and returns"),
    ("def f(text): return 1.0", r"it is called as f\(problem, text, finished\)"),
    ("def f(a, b, c, d): return 1.0", "it is called as"), ("f = 5", "has no function 'f'"),
    ("def g(a, b, c): return 1", "has no"), ("def f(:", r"does not run: SyntaxError.*\(line 1\)"),
    ("x = 1\nimport nosuch", r"does not run: .*nosuch.*\(line 2\)"),
    ("raise SystemExit(0)", "does not run")])
def test_a_reward_is_called_with_care(code, words, workdir):
    (workdir / "mine.py").write_text(code)
    with pytest.raises(UserError, match=words):
        scorer("mine.py:f", task("arithmetic"))({}, "hi", True)


def test_a_reward_may_be_an_object_and_careless(workdir):
    (workdir / "mine.py").write_text("""
from dataclasses import dataclass

@dataclass
class Score:
    unit: float = 0.5

    def __call__(self, problem, text, finished):
        problem.clear()
        return self.unit

f = Score()
""")
    problem = dict(prompt="a")
    assert scorer("mine.py:f", task("arithmetic"))(problem, "hi", True) == 0.5 and problem


@pytest.mark.parametrize("value", ["1", "True", "0.5", "torch.tensor(0.5)"])
def test_a_reward_may_be_any_number(value, workdir):
    (workdir
     / "mine.py").write_text(f"import torch\ndef f(problem, text, finished, *more): return {value}")
    assert 0 < scorer("mine.py:f", task("arithmetic"))({}, "hi", True) <= 1


# --- half a tokenizer -----------------------------------------------------------------------------


@pytest.mark.parametrize("change, words", [
    (lambda d: d.pop("model"), "model is missing"),
    (lambda d: d["model"].pop("vocab"), "no vocabulary"),
    (lambda d: d["model"].pop("merges"), "BPE without merges, not plain BPE"),
    (lambda d: d["model"].update(vocab=[]), "expected an object"),
    (lambda d: d["model"].update(vocab={"a": "b"}), "a token's id is 'b'"),
    (lambda d: d["model"]["vocab"].update(a=-1), "a token's id is -1"),
    (lambda d: d["model"]["vocab"].update(zz=10 ** 12), "a token's id is 1000000000000"),
    (lambda d: d["model"]["vocab"].update(zz=5), "two entries of the vocabulary have one id"),
    (lambda d: d["model"].update(merges=[1]), "a merge is 1"),
    (lambda d: d["model"].update(merges=["ab"]), "a merge is"),
    (lambda d: d.update(added_tokens="x"), "expected a list"),
    (lambda d: d.update(added_tokens=[5]), "an added token is 5"),
    (lambda d: d["added_tokens"][0].pop("id"), "id is missing"),
    (lambda d: d["added_tokens"][0].pop("content"), "an added token is"),
    (lambda d: d.update(pre_tokenizer=[1]), "expected an object"),
    (lambda d: d.update(normalizer="x"), "expected an object"),
    (lambda d: d["pre_tokenizer"].update(pretokenizers=5), "is no list")])
def test_half_a_tokenizer(change, words, workdir):
    bytes_tokenizer().save(workdir)
    d = json.loads((workdir / "tokenizer.json").read_text())
    change(d)
    (workdir / "tokenizer.json").write_text(json.dumps(d))
    with pytest.raises(UserError, match=words):
        Tokenizer.load(workdir)


# --- all together ---------------------------------------------------------------------------------


def test_a_sample_of_hostile_commands():
    """forty of tests/fuzz.py's thousands; python tests/fuzz.py runs them all"""
    told = subprocess.run([sys.executable, str(ROOT / "tests/fuzz.py"), "--sample", "40", "--seed",
                           "0"],
                          capture_output=True, text=True)
    assert told.returncode == 0 and "40 cases, 0 not good" in told.stdout, told.stdout + told.stderr


def test_there_are_enough_of_them():
    assert sum(1 for build in fuzz.BUILDERS.values() for _ in build()) > 400


@pytest.mark.slow
def test_all_hostile_commands():
    assert fuzz.main([]) == 0


@pytest.mark.slow
def test_kills():
    assert fuzz.main(["--kills", "40"]) == 0
