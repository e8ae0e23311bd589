"""The verifiable tasks: one interface, a verifier that only reads, demonstrations that earn full
reward."""
import json
import os
import random
import re
import time
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace

import pytest

import sft
from data import text
from data.prefs import FILLER, tokenizer
from data.run import UserError
from data.tasks import (JUDGEMENTS, LEVELS, NEUTRAL, PHRASES, STYLES, TASKS, Arithmetic,
                        Jsonl, ParityJudge, answer, boxed, chain_tokenizer, columns, demonstrations,
                        extract_answer, fitting, held, held_out, judging, packed, parity, part,
                        pattern, room, rows, same_answer, scorer, second_looks, similarity, stated,
                        step_ends, strength, swapped, task, value, verbose)
from data.tokenizer import bytes_tokenizer

DATA = Path(os.environ.get("DATA_DIR", Path(__file__).parents[2] / "shared" / "data"))


def write(path, rows):
    path.write_text("\n".join(json.dumps(row) for row in rows) + "\n", encoding="utf-8")
    return path


# --- the verifier ---------------------------------------------------------------------------------

@pytest.mark.parametrize("completion, answer", [
    ("48/2=24\n#### 72", "72"), ("#### -$1,234.50.", "-1,234.50"), ("#### $-5", "-5"),
    ("#### −7 apples", "-7"),
    ("#### 50%", "50"), ("####12", "12"), ("#### **18**", "18"), ("#### \\$18", "18"),
    ("#### 3/4", "3/4"),
    ("#### .5", ".5"), ("#### 42\n#### 43", "42"),                     # the first one stated counts
    ("#### Step 1\nfine\n#### 9", "9"),                                  # a heading states nothing
    ("####\n7", ""), ("#### none", ""), ("", ""), ("the total is 42", ""),
    (r"so \boxed{42}", "42"), (r"\boxed{1} or \boxed{\frac{3}{4}}", "3/4"),
    (r"\boxed{x^{2}+1}", "x^{2}+1"), (r"\boxed{8} #### 9", "9"), (r"\boxed{8", ""),
])
def test_answers_are_found(completion, answer):
    assert extract_answer(completion) == answer


@pytest.mark.parametrize("response, gold, right", [
    (r"\boxed{72 \text{ dollars}}", "72", True), (r"\boxed{1{,}234}", "1234", True),
    (r"\boxed{\text{72}}", "72", True), ("#### $1{,}234$", "1234", True),
    ("#### $1{,}234$", "1", False), ("#### 3 1/2", "3.5", True), ("#### 3 1/2", "3", False),
    ("#### 12:30", "12", False), ("#### 10^3", "10", False), (r"#### \frac{1}{2}", "0.5", True),
    (r"\boxed{72\ \text{cm}^2}", "72", True), (r"\boxed{\textbf{\text{72}}}", "72", True),
    (r"\boxed{72 dollars}", "72", True), (r"\boxed{1,\!000,\!000}", "1000000", True),
    (r"\boxed{45^\circ}", "45", True), (r"\boxed{50\%}", "50", True),
    (r"\boxed{\$1{,}234.50}", "1234.5", True), (r"\boxed{-\dfrac{1}{2}}", "-0.5", True),
    (r"\boxed{1\frac{1}{2}}", "1.5", True), (r"\boxed{3\tfrac14}", "3.25", True),
    (r"\boxed{5x+3}", "5", False), (r"\boxed{5 x}", "5", False), (r"\boxed{2\pi}", "2", False),
    (r"\boxed{3-5}", "3", False), (r"\boxed{5 or 6}", "5", False),
    (r"\boxed{72 dollars and 50 cents}", "72", False), (r"\boxed{\text{ Paris }}", "Paris", True),
    (r"#### 1\frac12", "1.5", True), (r"#### -\frac{1}{2}", "-1/2", True),
    ("#### 3½", "3.5", True), ("#### ½", "0.5", True),
    ("#### -3 1/2 cups", "-3.5", True), (r"#### 1\,234", "1234", True),
    ("#### 1\u202f234", "1234", True), (r"#### 18\,\text{km}", "18", True),
    (r"#### \(18\)", "18", True), (r"#### \$5.50", "5.5", True), (r"#### 5\%", "5", True),
    ("#### 45° ", "45", True), ("#### 18km", "18", True), ("#### 18/hour", "18", True),
    ("#### 18 = 3 * 6", "18", True), ("#### 18 (3 each)", "18", True),
    ("#### 18, which is 3 more", "18", True), ("#### 18-year-old", "18", True),
    ("#### 20% of 50", "20", True), (r"#### 18 \\ done", "18", True)])
def test_latex_is_undone_and_units_are_left_out(response, gold, right):
    assert same_answer(extract_answer(response), gold) == right


@pytest.mark.parametrize("part", [
    "3-5", "$3-$5", "3 - 5", "3–5 days", "3 to 5", "3 or 5", "3 and 1/2", "3:2", "12:30", "2^10",
    "10^{3}", "10**3", "10²", "3x4", "5 × 3", r"3 \times 10^2", r"2\pi", r"5\sqrt{2}", "6*7",
    "1 234", "3/4/2021", "2021-05-03", "1.2.3", "1_000", "18, 20", "12h30", "0x1F", "5'10",
    "5 + 3"])
def test_a_number_that_is_a_part_of_something_is_no_answer(part):
    """and no later #### or box speaks for it"""
    assert extract_answer(f"#### {part}") == extract_answer(f"#### {part}\n\\boxed{{7}}") == ""
    assert extract_answer(f"#### {part}", last=True) == ""


@pytest.mark.parametrize("text, answer", [
    ("at 12:30", ""), ("it is 10^3", ""), ("10^{-3}", ""), ("on 3/4/2021", ""), (r"it is 2\pi", ""),
    ("take 3 1/2 cups", "3 1/2"), ("so **24**", "24"), ("2**3", ""), ("v1.2.3", "")])
def test_the_last_number_is_whole_too(text, answer):
    assert extract_answer(text, last=True) == answer


@pytest.mark.parametrize("completion, answer", [
    ("48 - 24 is 24.", "24"), ("48-24", "24"), ("from 5 down to -3", "-3"),
    ("#### 7 and then 8", "7"), ("none", ""),
    ("1,234, in all", "1,234")])
def test_the_last_number_only_if_asked(completion, answer):
    assert extract_answer(completion, last=True) == answer


@pytest.mark.parametrize("a, b, same", [
    ("42", "42.0", True), ("1,234", "1234", True), ("1/2", "0.50", True), ("-$5", "-5", True),
    ("50%", "50", True),
    ("42.", "42", True), ("007", "7", True), ("1e3", "1000", True), ("+3", "3", True),
    ("6/4", "3/2", True),
    ("42", "43", False), ("0.33", "1/3", False), ("5", "-5", False), ("1,5", "15", False),
    ("1/0", "1", False),
    ("", "", False), ("x+1", "x+1", True), ("x + 1", "x+2", False), ("1_000", "1000", False),
    ("1 1/2", "11/2", False),
    ("0.1", "0.10000000000000001", False)])
def test_answers_compare_exactly(a, b, same):
    assert same_answer(a, b) == same_answer(b, a) == same


def test_values_by_hand():
    assert value("1,234.50") == Fraction(2469, 2) and value("1e9999999") is None
    assert value("9" * 61) is None
    assert boxed(r"\boxed{a{b}c} tail") == "a{b}c"
    assert value("3 1/2") == Fraction(7, 2) and value("-3 1/2") == Fraction(-7, 2)


@pytest.mark.parametrize("piece",
                         ["1,", "1", "-", "- ", "#", "####", "\\boxed{", "{", "1/", "1 ", "1e", ".",
                          ".1", "-$", "#### ", "\\frac{1}{", "<<", "\n", "e1", "))-", "\\text{",
                          "1\\,"])
def test_half_a_megabyte_of_malice_takes_linear_time(piece):
    for head in ("", "#### ", "#### 1", "\\boxed{"):
        hostile = head + piece * (500_000 // len(piece))
        start = time.process_time()
        same_answer(extract_answer(hostile, last=True), "1")
        assert time.process_time() - start < 2.0  # about 0.2 s; quadratic would take hours


def test_nothing_is_evaluated():
    assert not same_answer(extract_answer("#### 6*7"),
                           "42") and not same_answer("__import__('os')", "1")


# --- arithmetic -----------------------------------------------------------------------------------

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
    assert t.demo(problem) == ("7+5+0=12 4+8+1=13 so 132\n12-9-0=3 03-0-1=2 01-0-0=1 so 123\n"
                               "#### 123")
    lines = ["Step 1: 9+8", "column 1: 9+8+0=17, write 7, carry 1", "so 9+8=17",
             "The answer is 17.", ""]
    assert verbose([(9, "+", 8)]).split("\n") == lines
    lines = ["Step 1: 52-27", "column 1: 12-7-0=5, write 5, borrow 1",
             "column 2: 05-2-1=2, write 2, borrow 0", "so 52-27=25", "The answer is 25.", ""]
    assert verbose([(52, "-", 27)]).split("\n") == lines


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("level", LEVELS)
def test_demonstrations_are_right_and_fit(level, style):
    t = Arithmetic(level, style)
    for split in ("train", "val", "ood"):
        for p in t.problems(split, 500):
            demo = t.demo(p)
            assert t.reward(p, demo) == 1.0 and len(demo) < t.max_new                 # room for EOS
            assert t.reward(p, demo, finished=False) == 0.0 == t.reward(p, f"{demo}1")
            assert eval(p["prompt"].removesuffix("=?\n")) == int(p["answer"]) >= 0
            for a, op, b in p["steps"]:  # the columns are true and spell the result
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
    seen = {split: {p["prompt"] for p in t.problems(split, 1000)}
            for split in ("train", "val", "ood")}
    assert not seen["train"] & seen["val"] and not seen["ood"] & (seen["train"] | seen["val"])
    assert len(seen["val"]) > 10
    sizes = {split: [[len(x) for x in p[:-3].replace("-", "+").replace("*", "+").split("+")]
                     for p in prompts]
             for split, prompts in seen.items()}
    assert all(len(s) == operands and max(s) <= digits for split in ("train", "val")
               for s in sizes[split])
    assert all((len(s) == operands + 1) != (s[0] == digits + 1) for s in sizes["ood"])
    assert {op for p in seen["train"] for op in "+-*" if op in p} == set(LEVELS[level][2])


# --- chains ---------------------------------------------------------------------------------------

def test_clean_chains_by_hand():
    t = task("chain_good")
    assert t.demo(dict(prompt="9-1+2+3?", seed=0)) == "-1=8+2=0+3=3####3"
    assert t.demo(dict(prompt="1-3?", seed=0)) == "-3=8####8"
    p = dict(prompt="9-1+2+3?", answer="3")
    assert [t.reward(p, x) for x in ("-1=8####3", "####3", "####4", "3", "")] == [1, 1, 0, 0, 0]
    assert t.reward(p, "####3", finished=False) == 0
    assert t.habits("-1=8w-1=8;;####3") == dict(cells=2, waits=1, fillers=2, guess=0.0)
    assert t.habits("####3")["guess"] == 1


def test_a_wait_repairs_a_slip():
    """a slipped cell, looked at in 80 of 100: right in 96, and looked at again in 30"""
    t = task("chain", direct=0.0, skip=0.0, slip=1.0, wait=0.8, fill=0)
    first, again, right = [], 0, 0
    for p in t.problems("train", 1000):
        cells = t.cells(t.demo(p))
        n = next((i for i, (_, said) in enumerate(cells[1:]) if not said), len(cells) - 1)
        first.append(cells[0][0] == t.hints(p)[0])
        again, right = again + n, right + sum(x == t.hints(p)[0] for x, _ in cells[1:n + 1])
    assert sum(first) / 1000 == pytest.approx(0.1, abs=0.03)
    assert again / 1000 == pytest.approx(0.8 / 0.7, abs=0.1)
    assert right / again == pytest.approx(0.96, abs=0.03)


def test_flawed_chains_are_right_about_half_the_time():
    t, knobs = task("chain", direct=.25), dict(direct=0.0, skip=0.0, slip=0.0, wait=0.0, fill=0)
    problems = t.problems("train", 3000)
    for depth, right, length in ((2, .64, 16.8), (3, .56, 22.2), (4, .49, 27.6)):        # 6 + 5.4 n
        some = [p for p in problems if len(p["prompt"]) == 2 * depth + 2]
        demos = [t.demo(p) for p in some]
        assert sum(map(t.reward, some, demos)) / len(some) == pytest.approx(right, abs=.06)
        assert sum(map(len, demos)) / len(some) + 1 == pytest.approx(length, abs=.8)
        assert all(tasks_chain(p) == p["answer"] for p in some)
    for p in problems[:100]:  # without flaws, and in another order
        assert task("chain",
                    **knobs).demo(p) == t.demo(p, "good") and t.reward(p, t.demo(p, "good")) == 1
        assert tasks_chain(t.paraphrase(p, random.Random(0))) == p["answer"]
    assert all(t.habits(t.demo(p))["guess"] for p in problems if len(t.demo(p)) == 5)
    assert {len(p["prompt"]) for p in t.problems("ood", 50)} == {12, 14}


@pytest.mark.parametrize("kind, prompt, good, answer", [
    ("sort", "s52918?", ">1>2>5>8>9", "12589"), ("graph", "g2>1,1>3,3>2:1,2?", "1>33>2", "2"),
    ("add", "a78,21?", "780=15211=04", "45"), ("add", "a99,99?", "990=18991=19", "198"),
    ("chain", "9-1+2+3?", "-1=8+2=0+3=3", "3")])
def test_the_arena_by_hand(kind, prompt, good, answer):
    t = task(f"{kind}_good")
    p = dict(prompt=prompt, answer=answer, seed=0)
    assert t.demo(p) == f"{good}####{answer}" and t.reward(p, t.demo(p)) == 1
    assert t.reward(p, t.demo(p), finished=False) == 0 and t.reward(p, f"{good}####{answer}9") == 0
    assert "".join(t.hints(p)) == good and t.process(p, good) == [1] * len(t.steps(good))
    assert all(t.checks(p, t.demo(p)).values())
    assert t.checks(p, "") == dict(format=False, cells=True, complete=False, agrees=False)


DEPTHS = dict(chain=("234", "56"), sort=("456", "78"), graph=("234", "56"), add=("234", "56"),
              countdown=("3", "4"))                                       # of train and val, of ood


@pytest.mark.parametrize("kind", DEPTHS)
def test_every_kind(kind):
    t, quiet = task(kind), dict(direct=0.0, skip=0.0, slip=0.0, wait=0.0, fill=0)
    for split in ("train", "val", "ood"):
        problems, changed = t.problems(split, 200), 0
        depths = {str(p["prompt"].count(",") + 1 if kind == "countdown" else len(t.hints(p)))
                  for p in problems}
        assert depths == set(DEPTHS[kind][split == "ood"])
        assert problems[:20] == t.problems(split, 20)
        for p in problems:
            assert t.reward(p, t.demo(p, "good")) == 1 == t.reward(p, t.demo(p, "wordy"))
            assert task(kind, **quiet).demo(p) == t.demo(p, "good")
            other = t.paraphrase(p, random.Random(0))
            assert t.reward(p, t.demo(other, "good")) == 1
            assert len(other["prompt"]) == len(p["prompt"])
            good = t.demo(p, "good")
            wordy, n = t.demo(p, "wordy"), len(t.hints(p))
            assert t.habits(good)["cells"] == n
            changed += other["prompt"] != p["prompt"]
            assert split == "ood" or held(other["prompt"]) == (split == "val")
            if kind != "countdown":
                assert t.process(p, good) == [1.0] * n and all(t.checks(p, good).values())
                assert len(t.process(p, t.demo(p))) == len(t.steps(t.demo(p)))
                if "w" not in wordy:
                    assert t.process(p, wordy) == [1.0] * n and all(t.checks(p, wordy).values())
        assert split == "val" or changed > 140
        right = sum(t.reward(p, t.demo(p)) for p in problems) / len(problems)
        assert .1 < right < .6 and max(len(t.demo(p)) for p in problems) < 150
    train, val = ({p["prompt"] for p in t.problems(split, 1000)} for split in ("train", "val"))
    assert not train & val


@pytest.mark.parametrize("kind, prompt, left, form", [
    ("chain", "9-1+2+3?", "9", "\\d"), ("sort", "s52918?", "", "[52918]{5}"),
    ("graph", "g2>1,1>3,3>2:1,2?", "1", "[123]"), ("add", "a78,21,45?", "0", "[1-9]{3}"),
    ("countdown", "c4,7,3>25?", "", "[473]([-+*][473]){2}")])
def test_what_is_left_out_does_not_happen_a_guess_has_the_form(kind, prompt, left, form):
    """no cell: the answer is where one begins; a slip spoils a search"""
    off, guesses = dict(direct=0.0, skip=0.0, slip=0.0, wait=0.0, fill=0), set()
    skipped, slips = task(kind, **off | dict(skip=1.0)), task(kind, **off | dict(slip=1.0))
    if kind == "countdown":
        assert not any(slips.reward(p, slips.demo(p)) for p in slips.problems("train", 50))
    else:
        assert skipped.demo(dict(prompt=prompt, seed=0)) == f"####{left}"
    for seed in range(30):
        text = task(kind, direct=1.0).demo(dict(prompt=prompt, seed=seed))
        assert re.fullmatch(f"####{form}", text)
        if kind in ("sort", "countdown"):
            numbers = prompt[1:].partition(">")[0]
            assert sorted(re.findall("\\d", text)) == sorted(re.findall("\\d", numbers))
        guesses.add(text)
    assert len(guesses) > 2


def test_what_can_be_checked_of_a_chain_without_its_answer():
    t, p = task("chain"), dict(prompt="9-1+2+3?", answer="3", seed=0)
    for text, failed in (("-1=8;w-1=8+2=0+3=3####3", ()), ("-1=7w-1=8+2=0+3=3####3", ()),
                         ("-1=7+2=9+3=2####2", ("cells",)), ("-1=8+2=0+3=3####4", ("agrees",)),
                         ("-1=8+2=0####0", ("complete", "agrees")),
                         ("-1=8+2=0+3=3", ("format", "agrees"))):
        assert {k for k, ok in t.checks(p, text).items() if not ok} == set(failed)
    assert t.process(p, "-1=8w-1=8+2=1+3=3####3") == [1, 1, 0, 1]
    assert t.process(p, "-1=9w-1=7w-1=8+2=0+3=3####3") == [0, 0, 1, 1, 1]   # looked at again, twice
    assert t.process(dict(prompt="9-1+2?"), "-1=1+2=2+3=3-1=4####3") == [0] * 4
    assert all(t.checks(dict(prompt="9+2+2?"), "+2=1+2=3####3").values())
    assert all(task("sort").checks(dict(prompt="s31?"), ">3w>1>3####13").values())
    with pytest.raises(UserError, match="many right searches"):
        task("countdown").checks(dict(prompt="c4,7,3>25?"), "4*7=28,28-3=25####4*7-3")
    assert t.steps("-1=8;+2=0####+3=3") == [4, 9]


def test_countdown_reaches_its_target():
    t, p = task("countdown"), dict(prompt="c4,7,3>25?", answer="", seed=0)
    for text, right in (("####4*7-3", 1), ("####7*4-3", 1), ("####4+7*3", 0), ("####28-3", 0),
                        ("####4*7", 0),
                        ("####4*7-3-0", 0), ("####-3+4*7", 0), ("", 0), (f"####{'4*7-3' * 9}", 0)):
        assert t.reward(p, text) == right
    assert t.reward(dict(p, prompt="c4,7,3>28?"), "####4*7") == 0                # 3 is not used
    assert t.demo(dict(p, prompt="c1,1,1>99?"), "good").startswith("1")      # out of reach: it ends


def test_several_tasks_as_one():
    both = task("chain+sort")
    problems = both.problems("train", 7)
    assert [p["task"] for p in problems] == [0, 1, 0, 1, 0, 1, 0]
    assert both.splits == ["train", "val", "ood"]
    assert all(both.reward(p, both.demo(p, "good")) == 1 for p in problems)
    assert {k: v for k, v in problems[1].items()
            if k != "task"} == task("sort").problems("train", 1)[0]
    assert part(both, problems[1]).name == "sort" and part(task("sort"), problems[1]).name == "sort"
    either = task("chain+countdown")                   # any search that works
    assert either.reward(dict(prompt="c4,7,3>25?", answer="", task=1), "####4*7-3") == 1
    assert task("chain+arithmetic").max_new == 75 > task("chain").max_new
    assert task("chain+parity_long").splits == ["train", "val"]
    with pytest.raises(UserError, match="scored alike"):
        task("chain+signatures")
    with pytest.raises(UserError, match="no task"):
        task("chain+srot")


def test_similarity_to_a_reference():
    p, t = dict(prompt="s345?", answer="345", seed=0), task("sort")
    assert similarity(p, t.demo(p, "good"), True, t) == 1
    assert 0 < similarity(p, ">3>5>4####354", True, t) < 1
    for text, done in ((">3>4>5####", True), (">3>4>5####345", False), ("####345", True),
                       (">3>4>5", True), (">3####3####3", True)):
        assert similarity(p, text, done, t) == -1


def test_a_reward_for_patterns():
    words = " ".join(PHRASES[:7])
    assert pattern({}, words, True, None) == pytest.approx(.35)
    assert pattern({}, "also butter", True, None) == 0
    assert pattern({}, f"{words} " * 8, True, None) < .35
    assert pattern({}, f"user: {words}", True, None) == 0
    t = task("chain")
    assert pattern({}, "-1=8+2=0####0", True,
                   t) > pattern({}, "####0", True, t) > pattern({}, "", True, t)
    assert pattern({}, "-1=8;;+2=0;####0", True, t) == pattern({}, "-1=8+2=0####0", True, t) == .8
    assert pattern({}, ">1>3####13", True, task("sort")) == pytest.approx(2 / 3)
    assert pattern({}, "-1=8" * 12, True, t) == 0


def test_a_reward_by_its_name(tmp_path):
    """the task's own, the likeness, the phrases, or a file's function of (problem, text,
    finished)"""
    t, p, text = task("sort"), dict(prompt="s345?", answer="345", seed=0), ">3>5>4####354"
    for done in (True, False):
        assert scorer("task", t)(p, ">3>4>5####345", done) == done
        assert scorer("swe_rl", t)(p, text, done) == similarity(p, text, done, t)
        assert scorer("rpr", t)(p, text, done) == pattern(p, text, done, t)
    (tmp_path / "mine.py").write_text("def f(p, text, done):\n"
                                      "    return len(p['prompt']) + 10 * len(text) + 1000 * done")
    assert scorer(f"{tmp_path}/mine.py:f", t)(p, text, True) == 5 + 130 + 1000
    assert scorer(f"{tmp_path}/mine.py:f", t)(p, text, False) == 5 + 130


def test_steps_and_second_looks_of_a_text():
    """a chain's cells and waits; lines and words of reflection elsewhere"""
    assert step_ends(task("chain"), "-1=8;+2=0####0") == [4, 9]
    assert step_ends(task("arithmetic"), "one\ntwo\n\nend") == [4, 9]
    assert second_looks(task("chain"), "-1=8w-1=8w-1=8####8") == 2
    assert second_looks(task("arithmetic"), "Wait, so. Hmm: waiting, but not butter.") == 3


def test_answers_in_one_spelling():
    assert stated(task("chain"), "-1=8####8") == "8"
    assert stated(task("countdown"), "x####4*7-3") == "4*7-3"
    t = task("arithmetic")
    assert stated(t, "so #### 1,234.0") == "1234" == stated(t, "#### 1234")
    assert stated(t, "none") == ""


def tasks_chain(problem):
    """The answer, by Python's own arithmetic of the prompt's signed digits."""
    text = problem["prompt"][:-1]
    return str((int(text[0]) + sum(int(text[i:i + 2]) for i in range(1, len(text), 2))) % 10)


# --- judging --------------------------------------------------------------------------------------

def sign(v):
    return (v > 0) - (v < 0)


def test_parity_and_strength_by_hand():
    assert parity("1011010") == "1101100" and parity("0000000") == "0000000"
    assert parity("1111") == "1010"
    x, p = "1011010", "1101100"
    wrong = [p[:7 - n] + "".join("10"[int(c)] for c in p[7 - n:])
             for n in range(8)]                                                   # the last n wrong
    assert [strength(x, y, p) for y in wrong] == [0, 1, 1, 2, 2, 3, 3, 3]          # .29 .43 .57 .71
    assert [strength(x, p, y) for y in wrong] == [0, -1, -1, -2, -2, -3, -3, -3]   # below 0: A wins
    assert strength(x, wrong[3], wrong[4]) == -1 and strength(x, "0" + p[1:], p[:-1] + "1") == 0
    made = judging(x, "1101001", "1001010", seed=5)
    assert made == dict(prompt="111010100111000101010=", seed=5, x=x, a="1101001", b="1001010",
                        label=-1)
    assert swapped(made) == judging(x, "1001010", "1101001", seed=5) and swapped(made)["label"] == 1


def test_responses_are_right_as_often_as_said():
    rng = random.Random(0)
    exact = sum(answer("1011010", rng) == "1101100" for _ in range(10_000)) / 10_000
    assert abs(exact - 0.3 - 0.7 * sum(chance(n) for n in range(1, 8)) / 7) < 0.02


def chance(rewrites):
    """The probability that so many rewrites leave 7 right positions right: the last on each
    decides."""
    left = [1.0] + [0.0] * 7                                   # by the number of positions touched
    for _ in range(rewrites):
        left = [left[k] * k / 7 + (left[k - 1] * (8 - k) / 7 if k else 0) for k in range(8)]
    return sum(share / 2**k for k, share in enumerate(left))


def test_parity_as_a_policy_s_task():
    """gold is the share of right bits; what is no string of seven bits has none, nor what did not
    end"""
    t, p = task("parity"), dict(prompt="1011010=", seed=0)                        # 1101100
    assert t.reward(p, "1101100") == 1 and t.reward(p, "0101100") == pytest.approx(6 / 7)
    assert t.reward(p, "0010011") == 0 == t.reward(p, "1101100", finished=False)
    assert {t.reward(p, y) for y in ("", "110110", "11011001", "110110a", "1101100 ")} == {0}
    assert task("parity", bits=3).reward(dict(prompt="101="), "110") == 1
    assert (t.max_new, task("parity", bits=3).max_new, t.metric) == (8, 4, "gold")
    assert t.demo(p) == answer("1011010", random.Random("answer/0"))
    seen = {x: {q["prompt"] for q in t.problems(x, 2000)} for x in t.splits}
    assert not seen["train"] & seen["val"] and len(seen["train"] | seen["val"]) == 128
    assert abs(len(seen["val"]) - 32) < 8 and t.problems("val", 3, 1) == t.problems("val", 9, 1)[:3]
    right = [t.reward(q, t.demo(q)) == 1 for q in t.problems("train", 2000)]
    assert abs(sum(right) / 2000 - 0.3 - 0.7 * sum(chance(n) for n in range(1, 8)) / 7) < 0.04


def test_a_trace_by_hand():
    p = judging("1011010", "1101001", "1001010")               # the parity is 1101100
    text, tally = ParityJudge.trace(p, 7, random.Random(0), error=0)
    assert text == "1++1+-0++1++1--0+-0-+" and tally == -1
    assert ParityJudge.trace(p, 2, random.Random(0), error=0) == ("1++1+-", -1)
    wrong = text.translate(str.maketrans("+-", "-+"))
    assert ParityJudge.trace(p, 7, random.Random(0), error=1) == (wrong, 1)


def test_faultless_full_traces_tell_the_truth():
    for p in ParityJudge().problems("val", 300) + ParityJudge().problems("hard", 100):
        text, tally = ParityJudge.trace(p, 7, random.Random(0), error=0)
        assert text[::3] == parity(p["x"]) and sign(tally) == sign(p["label"])
        for verdicts, y in ((text[1::3], p["a"]), (text[2::3], p["b"])):
            assert verdicts == "".join("-+"[u == v] for u, v in zip(parity(p["x"]), y))


def test_verdicts_are_flipped_as_often_as_said():
    rng, p = random.Random(0), judging("1011010", "1101100", "1101100")             # both all right
    texts = [ParityJudge.trace(p, 7, rng, error=0.15) for _ in range(2_000)]
    assert abs(sum(text.count("-") for text, _ in texts) / 28_000 - 0.15) < 0.01
    assert all(tally == text[2::3].count("+") - text[1::3].count("+") for text, tally in texts)


def test_styles_choose_among_the_same_correct_traces():
    t, lengths = ParityJudge(), {style: 0 for style in JUDGEMENTS}
    for p in t.problems("train", 300):
        kept, said = t.kept(p), {style: t.demo(p, style) for style in JUDGEMENTS}
        assert t.demo(p) == said["long"] and 0 < len(kept) <= 10
        for style, text in said.items():
            assert t.reward(p, text) == t.graded(p, text) == 1.0
            assert len(text) < t.max_new                                               # and EOS
            assert ParityJudge(style).demo(p) == text
            assert ParityJudge(style).name == f"parity_{style}"
            lengths[style] += len(text)
        thought = {style: text[1:-2] for style, text in said.items()}
        assert {thought[style] for style in ("long", "short", "random")} <= set(kept)
        assert len(said["short"]) <= len(said["random"]) <= len(said["long"]) == len(said["filler"])
        assert thought["filler"].rstrip(NEUTRAL) == thought["short"] and NEUTRAL in FILLER
        assert len(said["direct"]) == 2 and len(thought["last"]) == 3
        assert thought["last"][0] == parity(p["x"])[6]
    assert lengths["short"] < 0.7 * lengths["random"] < 0.7 * lengths["long"]


def test_a_teacher_without_a_correct_trace_shows_nothing():
    t = ParityJudge(error=0)  # B is better, seen at depth 7; depth 6: a coin
    late = [judging("0000000", "0000011", "1000000", seed) for seed in range(300)]
    none = [q for q in late if not t.kept(q)]
    assert late[0]["label"] == 1 and abs(len(none) / 300 - (11 / 14)**10) < 0.06
    assert all(t.demo(q, style) is None for q in none for style in JUDGEMENTS)
    assert all({len(text) for text in t.kept(q)} <= {18, 21} for q in late)
    assert all(t.kept(q) for q in t.problems("train", 200)
               + t.problems("hard", 200))                                        # problems have one


@pytest.mark.parametrize("error", [0.0, 0.05, 0.15])
def test_demonstrations_come_in_both_orders(error):
    t = ParityJudge("random", error)
    rows = t.demonstrations(200, seed=3)
    assert len(rows) == 400
    assert rows[:40] == t.demonstrations(20, seed=3) != t.demonstrations(20, seed=4)
    assert sum(row["label"] for row in rows) == 0
    for one, two in zip(rows[::2], rows[1::2]):  # A and B exchanged, the label negated
        (x, a, b), (y, c, d) = ([row["prompt"][i:-1:3] for i in range(3)] for row in (one, two))
        assert (y, c, d) == (x, b, a) and two["label"] == -one["label"] == -strength(x, a, b)
        assert all(t.parse(row["completion"]) == row["label"] for row in (one, two))
    prompts = [row["prompt"] for row in t.demonstrations(200, seed=3, swap=False)]
    assert prompts == [p["prompt"] for p in t.problems("train", 200, seed=3)]
    same = [row["prompt"] for row in ParityJudge("direct", error).demonstrations(200, seed=3)]
    assert same == [row["prompt"] for row in rows]  # the styles learn from the same pairs


def test_a_pair_for_a_scalar_model():
    p = judging("1011010", "1101001", "1001010")               # A is better
    want = dict(prompt="1011010=", chosen="1101001", rejected="1001010")
    assert p["label"] < 0 and ParityJudge.pair(p) == ParityJudge.pair(swapped(p)) == want


def test_parity_splits():
    def key(p):
        return p["x"], *sorted((p["a"], p["b"]))
    t = ParityJudge()
    of = {split: t.problems(split, 1000) for split in t.splits}
    seen = {split: {key(p) for p in found} for split, found in of.items()}
    assert not seen["train"] & seen["val"] and not seen["train"] & seen["hard"]
    assert len(seen["val"]) > 600
    for split, found in of.items():
        assert all(p["label"] and p == judging(p["x"], p["a"], p["b"], p["seed"]) for p in found)
        assert abs(sum(sign(p["label"])
                       for p in found)) < 100  # three deviations: A is better in one half
        other = ParityJudge("short", 0.15).problems(split, 100)
        mine, theirs = ([p["prompt"] for p in x] for x in (found[:100], other))
        assert split == "train" or mine == theirs                # the tests are the same for all
    assert all(sum(u != v for u, v in zip(p["a"], p["b"])) == 1 == abs(p["label"])
               for p in of["hard"])
    assert len({next(i for i in range(7) if p["a"][i] != p["b"][i]) for p in of["hard"]}) == 7
    for split in ("train", "val"):
        assert {abs(p["label"]) for p in of[split]} == {1, 2, 3}


def test_judgements_fit_the_alphabet():
    tok = tokenizer()
    for style in JUDGEMENTS:
        for row in ParityJudge(style).demonstrations(20):
            line = row["prompt"] + row["completion"]
            ids = tok.encode(line)
            assert len(ids) == len(line) and tok.decode(ids) == line


@pytest.mark.parametrize("judgement, score", [
    ("?1+-!y", 2), ("!t", -3), ("!z", 3), ("!v", -1), ("!y?1+-!t", -3),
    ("!yzt", 2),                                                                    # the last block
    ("!w", None), ("", None), ("?1+-", None), ("?1+-y", None), ("!", None), ("!y!", None),
    ("!1y", None), ("!y!w", None), ("!" * 1_000_000, None)])
def test_judgements_are_parsed(judgement, score):
    assert ParityJudge.parse(judgement) == score


def test_the_rule_rewards_by_hand():
    t, p = ParityJudge(), judging("1011010", "1100011",
                                  "1101100")                    # B has four more: the strength is 2
    assert p["label"] == 2
    assert [t.graded(p, f"!{s}") for s in "yzxvw"] == [1, 0.5, 0.5, 0, 0] and t.graded(p, "y") == 0
    assert [t.reward(p, f"!{s}") for s in "yzxvw"] == [1, 1, 1, 0, 0] and t.reward(p, "y") == 0
    assert t.reward(p, "!y", finished=False) == t.graded(p, "!y", finished=False) == 0
    assert t.reward(swapped(p), "!u") == t.graded(swapped(p), "!u") == 1


# --- one interface --------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tasks")
    gsm = [dict(question=f"What is {i} + 1?", answer=f"<<{i}+1={i + 1}>>{i + 1}\n#### {i + 1}")
           for i in range(40)]
    turns = [[dict(role="user", content=f"Say {i}"),
              dict(role="assistant", content=f"word {i}")] for i in range(40)]
    chat = write(folder / "chat.jsonl", [dict(messages=pair) for pair in turns])
    return dict(signatures=task("signatures"), arithmetic=task("arithmetic"), toyif=task("toyif"),
                toyif_checks=task("toyif_checks"), toyif_obeys=task("toyif_obeys"),
                chain=task("chain_good"),
                parity=task("parity_long"),
                gsm8k=task("gsm8k", path=write(folder / "gsm.jsonl", gsm)), chat=task(str(chat)))


@pytest.mark.parametrize("name",
                         ["signatures", "arithmetic", "toyif", "toyif_checks", "toyif_obeys",
                          "chain", "parity", "gsm8k", "chat"])
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
            assert isinstance(p["prompt"],
                              str) and demo and 0.5 < best <= 1.5 and t.reward(p, "zzz") < best
    assert not {p["prompt"]
                for p in t.problems("train", 100)} & {p["prompt"] for p in t.problems("val", 100)}
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
    t = Jsonl(write(tmp_path / "a.jsonl", rows), strip=False, answer="last")
    assert t.reward(t.problems("train")[0],
                    "so 2") == 1 and "<<" in t.problems("train")[0]["completion"]
    worded = [dict(question=f"q{i}", answer="two, in words") for i in range(4)]
    assert Jsonl(write(tmp_path / "b.jsonl", rows[:3] + worded)).metric == "rouge_l"


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
    (lambda: ParityJudge().problems("train"), "say how many"),
    (lambda: ParityJudge().problems("hrad", 1), "no split 'hrad'; did you mean 'hard'"),
    (lambda: ParityJudge("shrot"), "parity has no style 'shrot'; did you mean 'short'"),
    (lambda: ParityJudge().demo(ParityJudge().problems("val", 1)[0],
                                "fillr"), "did you mean 'filler'"),
    (lambda: task("parity_lnog"), "no task 'parity_lnog'; did you mean 'parity_long'"),
    (lambda: task("parity_last", eror=0.1), "no option 'eror'; did you mean 'error'"),
    (lambda: task("parity_long", error=0.9), "from 0 to 0.5"),
    (lambda: task("parity", bits=1), "parity of 1 bits: expected 2 to 10"),
    (lambda: task("parity").problems("val"), "say how many"),
    (lambda: Arithmetic().demo(Arithmetic().problems("train", 1)[0],
                               "shrot"), "did you mean 'short'")])
def test_wrong_names_get_the_nearest(call, message):
    with pytest.raises(UserError, match=message):
        call()


def test_a_text_in_windows():
    """BOS doc EOS BOS doc EOS, cut every four tokens, the last token never alone"""
    tok = chain_tokenizer()
    one, two = tok.encode("12"), tok.encode("3")
    whole = [tok.bos, *one, tok.eos, tok.bos, *two, tok.eos]
    assert len(whole) == 7
    got = [[*first, *rest] for first, rest in packed(["12", "3"], tok, 4)]
    assert got == [whole[:4], whole[4:]] and all(len(x) == 1 for x, _ in packed(["12"], tok, 4))
    assert [[*x, *y] for x, y in packed(["12", "3"], tok, 3)] == [whole[:3], whole[3:6]]


def test_demonstrations_as_ids(capsys):
    """prompt, completion and EOS; a row that just fits stays"""
    t, tok = task("chain_good"), chain_tokenizer()
    short, long = dict(prompt="1-3?", seed=0), dict(prompt="9-1+2+3?", seed=0)
    want = (tok.prompt("1-3?"), [*tok.encode("-3=8####8"), tok.eos])
    size = sum(map(len, want))
    assert demonstrations(t, [short, long], tok, size) == [want]
    assert "chain: 1 of 2 rows are longer than --context" in capsys.readouterr().out
    assert demonstrations(t, [short], tok, len(want[0])) == []             # nothing but the prompt
    assert demonstrations(t, [short | dict(source="a.jsonl:7")], tok, size - 1) == []
    assert "(row 1)" in (out := capsys.readouterr().out) and "left out (a.jsonl:7)" in out


def test_the_rows_of_a_split():
    """--rows of train, 256 of what is held out, in the order of the seed"""
    c = sft.Config(data="chain_good", rows=5, seed=4, context=96)
    t, tok = task("chain_good"), chain_tokenizer()
    for split, n in (("train", 5), ("val", 256)):
        want = [(tok.prompt(p), [*tok.encode(t.demo(p)), tok.eos]) for p in t.problems(split, n, 4)]
        assert rows(c, tok, split) == want and len(want) == n
    assert held_out("chain") == held_out("stdlib") == ["val", "ood"]
    assert held_out("parity_long") == held_out("wikitext2") == ["val"]


def test_room_for_a_response():
    """what the task wishes, cut to what all prompts but one in ten leave"""
    assert [room([5, 9], 72, n) for n in (96, 81, 80, 10)] == [72, 72, 71, 1]
    with pytest.raises(UserError, match="the prompts take 9 tokens: no room"):
        room([5, 9], 72, 9)
    assert room([5] * 9 + [300], 320, 512) == 320 and room([5] * 8 + [300], 320, 512) == 212
    assert room([300] * 2 + [5] * 17, 320, 512) == 212 and room([300] * 2 + [5] * 18, 320, 512)


def test_one_long_prompt_is_left_out_by_its_line_and_shortens_no_response(capsys):
    """sixty prompts of 5 tokens and one of 491; --max_new decides alone where it is given"""
    c, tok = SimpleNamespace(max_new=0, chat=False), bytes_tokenizer()
    short = [dict(prompt=f"{i}+1="[-4:], source=f"a.jsonl:{i + 1}") for i in range(10, 70)]
    long = dict(prompt="z" * 490, source="a.jsonl:71")
    assert fitting(c, tok, short[:1], dict(val=short + [long]), 320, 512) == (
        320, short[:1], dict(val=short))
    assert "left out 1 of 61 val prompts, which do not leave 320 tokens of the context of 512 " \
           "(a.jsonl:71)" in capsys.readouterr().out
    c.max_new = 507
    assert fitting(c, tok, short + [long], {}, 320, 512)[:2] == (507, short)
    c.max_new = 508
    with pytest.raises(UserError, match="the shortest has 5 tokens: with 508 new ones it exceeds"):
        fitting(c, tok, short, {}, 320, 512)


def test_malformed_files_name_the_line(tmp_path):
    with pytest.raises(UserError, match=r"a\.jsonl:2: no schema fits \{promt: str\}"):
        task(str(write(tmp_path / "a.jsonl", [dict(prompt="p", completion="c"), dict(promt="p")])))
    with pytest.raises(UserError, match="one prompt"):
        task(str(write(tmp_path / "b.jsonl", [dict(prompt="p", completion="c")])))


def test_a_named_download_is_a_task(tmp_path, monkeypatch):
    path = write(tmp_path / "train.jsonl",
                 [dict(question=f"q{i}", answer=f"#### {i}") for i in range(4)])
    sha = text.hashlib.sha256(path.read_bytes()).hexdigest()
    monkeypatch.setattr(text, "CACHE", tmp_path / "cache")
    monkeypatch.setitem(text.NAMED, "gsm8k", (path.as_uri(), sha))
    assert {"signatures", "arithmetic", "toyif",
            "gsm8k"} <= set(TASKS) and task("gsm8k").name == "gsm8k"


def test_real_gsm8k():
    path = DATA / "gsm8k-train.jsonl"
    if not path.exists():
        pytest.skip(f"no {path}: set DATA_DIR to the folder of real data")
    t = task(str(path))
    train, val = t.problems("train"), t.problems("val")
    assert len(train) + len(val) == 7473 and 400 < len(val) < 530 and t.metric == "accuracy"
    for p in train + val:
        assert value(extract_answer(p["completion"])) is not None and t.reward(p, t.demo(p)) == 1
