"""The verifiable tasks: one interface, a verifier that only reads, demonstrations that earn full reward."""
import json
import os
import random
import time
from fractions import Fraction
from pathlib import Path

import pytest

from data import text
from data.run import UserError
from data.tasks import (LEVELS, STYLES, TASKS, Arithmetic, Jsonl, boxed, columns, extract_answer,
                        same_answer, task,
                        value, verbose)

DATA = Path(os.environ.get("DATA_DIR", Path(__file__).parents[2] / "shared" / "data"))


def write(path, rows):
    path.write_text("\n".join(json.dumps(row) for row in rows) + "\n", encoding="utf-8")
    return path


# --- the verifier -------------------------------------------------------------------------------------

@pytest.mark.parametrize("completion, answer", [
    ("48/2=24\n#### 72", "72"), ("#### -$1,234.50.", "-1,234.50"), ("#### $-5", "-5"),
    ("#### −7 apples", "-7"),
    ("#### 50%", "50"), ("####12", "12"), ("#### **18**", "18"), ("#### \\$18", "18"), ("#### 3/4", "3/4"),
    ("#### .5", ".5"), ("#### 42\n#### 43", "42"),                       # the first one stated counts
    ("#### Step 1\nfine\n#### 9", "9"),                                  # a heading states nothing
    ("####\n7", ""), ("#### none", ""), ("", ""), ("the total is 42", ""),
    (r"so \boxed{42}", "42"), (r"\boxed{1} or \boxed{\frac{3}{4}}", "3/4"), (r"\boxed{x^{2}+1}", "x^{2}+1"),
    (r"\boxed{8} #### 9", "9"), (r"\boxed{8", ""),
])
def test_answers_are_found(completion, answer):
    assert extract_answer(completion) == answer


@pytest.mark.parametrize("completion, answer", [
    ("48 - 24 is 24.", "24"), ("48-24", "24"), ("from 5 down to -3", "-3"), ("#### 7 and then 8", "7"),
    ("none", ""),
    ("1,234, in all", "1,234")])
def test_the_last_number_only_if_asked(completion, answer):
    assert extract_answer(completion, last=True) == answer


@pytest.mark.parametrize("a, b, same", [
    ("42", "42.0", True), ("1,234", "1234", True), ("1/2", "0.50", True), ("-$5", "-5", True),
    ("50%", "50", True),
    ("42.", "42", True), ("007", "7", True), ("1e3", "1000", True), ("+3", "3", True), ("6/4", "3/2", True),
    ("42", "43", False), ("0.33", "1/3", False), ("5", "-5", False), ("1,5", "15", False),
    ("1/0", "1", False),
    ("", "", False), ("x+1", "x+1", True), ("x + 1", "x+2", False), ("1_000", "1000", False),
    ("1 1/2", "11/2", False),
    ("0.1", "0.10000000000000001", False)])
def test_answers_compare_exactly(a, b, same):
    assert same_answer(a, b) == same_answer(b, a) == same


def test_values_by_hand():
    assert value("1,234.50") == Fraction(2469, 2) and value("1e9999999") is None and value("9" * 61) is None
    assert boxed(r"\boxed{a{b}c} tail") == "a{b}c"


@pytest.mark.parametrize("piece", ["1,", "1", "-", "- ", "#", "####", "\\boxed{", "{", "1/", "1 ", "1e", ".",
                                   ".1", "-$",
                                   "#### ", "\\frac{1}{", "<<", "\n", "e1", "))-"])
def test_a_megabyte_of_malice_takes_linear_time(piece):
    for head in ("", "#### ", "#### 1", "\\boxed{"):
        hostile = head + piece * (1_000_000 // len(piece))
        start = time.process_time()
        same_answer(extract_answer(hostile, last=True), "1")
        assert time.process_time() - start < 2.0               # about 0.2 s; quadratic would take hours


def test_nothing_is_evaluated():
    assert not same_answer(extract_answer("#### 6*7"), "42") and not same_answer("__import__('os')", "1")


# --- arithmetic ---------------------------------------------------------------------------------------

@pytest.mark.parametrize("a, op, b, cells", [
    (47, "+", 85, [("7", 5, 0, "12"), ("4", 8, 1, "13")]),
    (52, "-", 27, [("12", 7, 0, "5"), ("05", 2, 1, "2")]),
    (100, "-", 99, [("10", 9, 0, "1"), ("10", 9, 1, "0"), ("01", 0, 1, "0")]),
    (47, "*", 6, [("7", 6, 0, "42"), ("4", 6, 4, "28")])])
def test_columns_by_hand(a, op, b, cells):
    assert columns(a, op, b) == cells


def test_a_short_and_a_verbose_thought_by_hand():
    problem = dict(prompt="47+85-9=?\n", answer="123", steps=[(47, "+", 85), (132, "-", 9)])
    t = Arithmetic(4)
    assert t.demo(problem, "direct") == "#### 123"
    assert t.demo(problem) == "7+5+0=12 4+8+1=13 so 132\n12-9-0=3 03-0-1=2 01-0-0=1 so 123\n#### 123"
    lines = ["Step 1: 9+8", "column 1: 9+8+0=17, write 7, carry 1", "so 9+8=17", "The answer is 17.", ""]
    assert verbose([(9, "+", 8)]).split("\n") == lines


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("level", LEVELS)
def test_demonstrations_are_right_and_fit(level, style):
    t = Arithmetic(level, style)
    for split in ("train", "val", "ood"):
        for p in t.problems(split, 500):
            demo = t.demo(p)
            assert t.reward(p, demo) == 1.0 and len(demo) < t.max_new                    # room for EOS
            assert t.reward(p, demo, finished=False) == 0.0 == t.reward(p, f"{demo}1")
            assert eval(p["prompt"].removesuffix("=?\n")) == int(p["answer"]) >= 0
            for a, op, b in p["steps"]:                        # the columns are true and spell the result
                cells = columns(a, op, b)
                sign = -1 if op == "-" else 1
                for x, y, c, r in cells:
                    assert int(r) == (int(x) * y + c if op == "*" else int(x) + sign * (y + c))
                top = 0 if op == "-" else int(cells[-1][3][0]) * 10**len(cells)
                spelled = top + sum(int(r[-1]) * 10**i for i, (*_, r) in enumerate(cells))
                assert spelled == {"+": a + b, "-": a - b, "*": a * b}[op]


@pytest.mark.parametrize("level", LEVELS)
def test_arithmetic_splits(level):
    digits, operands, *_ = LEVELS[level]
    t = Arithmetic(level)
    seen = {split: {p["prompt"] for p in t.problems(split, 1000)} for split in ("train", "val", "ood")}
    assert not seen["train"] & seen["val"] and not seen["ood"] & (seen["train"] | seen["val"])
    assert len(seen["val"]) > 10
    sizes = {split: [[len(x) for x in p[:-3].replace("-", "+").replace("*", "+").split("+")] for p in prompts]
             for split, prompts in seen.items()}
    assert all(len(s) == operands and max(s) <= digits for split in ("train", "val") for s in sizes[split])
    assert all((len(s) == operands + 1) != (s[0] == digits + 1) for s in sizes["ood"])
    assert {op for p in seen["train"] for op in "+-*" if op in p} == set(LEVELS[level][2])


# --- one interface ------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tasks")
    gsm = [dict(question=f"What is {i} + 1?", answer=f"<<{i}+1={i + 1}>>{i + 1}\n#### {i + 1}")
           for i in range(40)]
    turns = [[dict(role="user", content=f"Say {i}"),
              dict(role="assistant", content=f"word {i}")] for i in range(40)]
    chat = write(folder / "chat.jsonl", [dict(messages=pair) for pair in turns])
    return dict(signatures=task("signatures"), arithmetic=task("arithmetic"), toyif=task("toyif"),
                gsm8k=task("gsm8k", path=write(folder / "gsm.jsonl", gsm)), chat=task(str(chat)))


@pytest.mark.parametrize("name", ["signatures", "arithmetic", "toyif", "gsm8k", "chat"])
def test_every_task_keeps_the_interface(tasks, name):
    t = tasks[name]
    assert t.name and t.metric in ("rouge_l", "accuracy", "gold") and t.max_new > 0
    for split in ("train", "val"):
        few, more = t.problems(split, 2, seed=1), t.problems(split, 12, seed=1)
        assert few == more[:2] and more != t.problems(split, 12, seed=2)
        assert t.sample(random.Random(3), split) == t.sample(random.Random(3), split)
        for p in few:
            demo = t.demo(p)
            best = t.reward(p, demo)
            assert isinstance(p["prompt"], str) and demo and 0.5 < best <= 1.5 and t.reward(p, "zzz") < best
    assert not {p["prompt"] for p in t.problems("train", 100)} & {p["prompt"] for p in t.problems("val", 100)}
    with pytest.raises(UserError, match="no split 'vall'; did you mean 'val'"):
        t.problems("vall", 1)


def test_finite_tasks_draw_without_replacement(tasks):
    rows = tasks["gsm8k"].problems("train", seed=4)
    assert len(rows) == len({r["prompt"] for r in rows}) == 38
    assert tasks["gsm8k"].problems("train", 99, 4) == rows


def test_gsm8k_rewards_and_strips(tasks):
    t, p = tasks["gsm8k"], dict(prompt="q", completion="#### 1,200")
    assert t.metric == "accuracy" and not any("<<" in p["completion"] for p in t.problems("train"))
    assert t.reward(p, "#### $1200.00") == t.reward(p, r"\boxed{1200}") == 1
    assert t.reward(p, "it is 1200") == t.reward(p, "#### 1201") == t.reward(p, "") == 0
    assert t.reward(p, "#### 1200", finished=False) == 0


def test_last_number_and_annotations_are_options(tmp_path):
    rows = [dict(question=f"q{i}", answer="<<1+1=2>>2\n#### 2") for i in range(4)]
    t = Jsonl(write(tmp_path / "a.jsonl", rows), strip=False, last=True)
    assert t.reward(t.problems("train")[0], "so 2") == 1 and "<<" in t.problems("train")[0]["completion"]


def test_conversations_become_text(tasks):
    p = tasks["chat"].problems("train", 1)[0]
    assert p["prompt"].startswith("user: Say ") and p["prompt"].endswith("\nassistant: ")
    assert tasks["chat"].metric == "rouge_l"


@pytest.mark.parametrize("call, message", [
    (lambda: task("arithmetik"), "no task 'arithmetik'; did you mean 'arithmetic'"),
    (lambda: task("arithmetic", levle=3), "no option 'levle'; did you mean 'level'"),
    (lambda: task("nowhere.jsonl"), "no file and no named data 'nowhere.jsonl'"),
    (lambda: task("arithmetic", level=9), "level 9"),
    (lambda: task("arithmetic", style="long"), "style 'long'"),
    (lambda: Arithmetic().problems("train"), "say how many"),
    (lambda: Arithmetic().demo(Arithmetic().problems("train", 1)[0], "shrot"), "did you mean 'short'")])
def test_wrong_names_get_the_nearest(call, message):
    with pytest.raises(UserError, match=message):
        call()


def test_malformed_files_name_the_line(tmp_path):
    with pytest.raises(UserError, match=r"a\.jsonl:2: no schema fits \{prompt: str\}"):
        task(str(write(tmp_path / "a.jsonl", [dict(prompt="p", completion="c"), dict(prompt="p")])))
    with pytest.raises(UserError, match="one prompt"):
        task(str(write(tmp_path / "b.jsonl", [dict(prompt="p", completion="c")])))


def test_a_named_download_is_a_task(tmp_path, monkeypatch):
    path = write(tmp_path / "train.jsonl", [dict(question=f"q{i}", answer=f"#### {i}") for i in range(4)])
    sha = text.hashlib.sha256(path.read_bytes()).hexdigest()
    monkeypatch.setattr(text, "CACHE", tmp_path / "cache")
    monkeypatch.setitem(text.NAMED, "gsm8k", (path.as_uri(), sha))
    assert {"signatures", "arithmetic", "toyif", "gsm8k"} <= set(TASKS) and task("gsm8k").name == "gsm8k"


def test_real_gsm8k():
    path = DATA / "gsm8k-train.jsonl"
    if not path.exists():
        pytest.skip(f"no {path}: set DATA_DIR to the folder of real data")
    t = task(str(path))
    train, val = t.problems("train"), t.problems("val")
    assert len(train) + len(val) == 7473 and 400 < len(val) < 530 and t.metric == "accuracy"
    for p in train + val:
        assert value(extract_answer(p["completion"])) is not None and t.reward(p, t.demo(p)) == 1
