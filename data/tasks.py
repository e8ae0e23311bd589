"""
tasks.py - verifiable tasks, all with one interface.

    task("arithmetic",
    level=3)   task("signatures")   task("gsm8k")   task("my.jsonl")   task("chain+sort")

    name, metric, max_new                 what the reward is called; tokens that a response may need
    problems(split, n, seed)              n dicts with a "prompt", the first n of any longer list;
    from files:
                                          shuffled by seed, n = 0 for all, never more than there are
    sample(rng, split)                    one problem, drawn by rng (random.Random)
    demo(problem, style)                  a worked response
    reward(problem, completion, finished) a float; finished: the response ended by itself, with EOS

rows(c, tok, split) makes ids of a task's demonstrations, or of windows of a text: what training
reads.

Answers are written "#### 42", as GSM8K writes them, so that one verifier serves all. A completion
is only read: nothing in it is evaluated, and reading takes time linear in its length.
"""
import contextlib
import copy
import importlib.util
import inspect
import math
import random
import re
import sys
import traceback
import unicodedata
from array import array
from difflib import SequenceMatcher
from fractions import Fraction
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import Callable, NamedTuple

from data.prefs import FILLER, JUDGE, SCORES, SEP, Checks, Obeys, Ring, ToyIF
from data.run import HUGE, UserError, nearest
from data.text import (NAMED, SCHEMAS, at, check_split, digest, documents, examples, framed,
                       is_corpus, locate, places, reading, rouge_l, signatures, split_rows, tell)
from data.tokenizer import char_tokenizer

# --- the verifier ---------------------------------------------------------------------------------

SIGN, SIZE = r"(?:(?<![\w.)])[-+])?", r"(?:\d[\d,]*(?:\.\d+)?|\.\d+)"             # 5-3 has no sign
NUMBER = rf"{SIGN}{SIZE}(?:(?: \d+)?/\d+|e[-+]?\d+)?"                    # 3 1/2 is one number
MARK = "####"            # what the answer follows
STATED = re.compile(rf"####[ *]{{0,8}}({NUMBER})", re.I)                 # {0,8}: linear in time
# what makes a number a part of something, 12:30, 1 234, 10^3, 3-5, 3 or 4, 2\pi, and from before
GOES_ON = re.compile(r"""[.:/_'’]\d | [a-z]{1,2}\d | [ ]{1,8}\d | [ ]{0,8}\^ | [²³¹⁰⁴-⁹]
    | [ *]{0,8}[-+*/×÷·±:–—x][ *]{0,8}[-+]?[.(]{0,2}\d | [ ]{1,8}(?:to|or|and)[ ]{1,8}[-+]?\d
    | [ ]{0,8}\\(?:pi|sqrt|times|cdot|div|pm|mp|[dt]?frac|log|ln|sin|cos|tan|theta)(?![a-z])""",
                     re.I | re.X)
GOES_BEFORE = re.compile(r"(?:\^[{(]?|\d(?:[:/_'’]|\*\*)?)$")
FRACTIONS = {c: " " + unicodedata.normalize("NFKD", c).replace("⁄", "/") for c in "½⅓⅔¼¾⅕⅖⅗⅘⅙⅛⅜⅝⅞"}
SIGNS = str.maketrans(FRACTIONS | {"−": "-", "%": " ", "$": "", "€": "", "£": ""})
WRAPPED = r"\\(?:text[a-z]*|math[a-z]+|[mh]box)\{([^{}]*)\}"
LATEX = [(re.compile(pattern), plain) for pattern, plain in (
    (WRAPPED, r" \1"), (WRAPPED, r" \1"),                            # \textbf{\text{72}}
    (r"(?<=\d)(?:\{,\}|\\[,;:! ]|[\u2009\u202f\u00a0])(?=\d{3}(?!\d))", ","),         # 1{,}234
    (r"\\\\|\\[()\[\],;: ]|\\q?quad|\^ ?\{? ?\\circ ?\}?|\\degree|[°~\u2009\u202f\u00a0]", " "),
    (r"\\!|\\left|\\right|\\displaystyle|\\(?=[-+.\d])", ""),        # of \$5 the dollar is gone
    (r"(?<=\d) ?(?=\\[dt]?frac)", " "),                              # 1\frac12 is one and a half
    (r"\\[dt]?frac ?(?:\{(-?\d{1,60})\}|(\d)) ?(?:\{(\d{1,60})\}|(\d))", r"\1\2/\3\4"))]
UNIT = re.compile(r"(?<=[^\s{\\])(?:\\?\s|\\[,;:])*\\(?:text|mathrm|[mh]box)\{[^{}]*\}"
                  r"(?:\^\{?[23]\}?)?\.?$")
WHOLE = re.compile(rf"({NUMBER})(?: [a-z]{{2}}[a-z /.-]*)?\.?", re.I)    # 72 dollars, not 5 x


def undone(text):
    r"""A text without currencies, percents and LaTeX's ways to write numbers, units and spaces.
    "$1{,}234\,\text{km}$" -> "1,234  km";  "1\frac12" -> "1 1/2";  \pi and the like stay"""
    text = text.translate(SIGNS)
    for pattern, plain in LATEX if re.search(r"[\\{~]", text) or not text.isascii() else ():
        text = pattern.sub(plain, text)
    return text


def whole(text):
    r"""The number that a text is, without the unit behind it; if it is more, the text itself.
    "72 \text{ dollars}" -> "72";  "\frac{3}{4}" -> "3/4";  "3-5" -> "3-5" """
    if len(text) > 200:
        return text.strip()
    plain = undone(UNIT.sub("", text.strip())).strip()
    number = WHOLE.fullmatch(plain)
    return number[1].rstrip(",") if number else plain


def boxed(text):
    r"""The inside of the last \boxed{…}, braces balanced; "" if there is none."""
    start, depth = text.rfind("\\boxed{"), 0
    for i in range(start + 6, len(text) if start >= 0 else 0):
        depth += (text[i] == "{") - (text[i] == "}")
        if depth == 0:
            return text[start + 7:i]
    return ""


def extract_answer(text, last=False):
    r"""The answer that a response states: the number right after the first "####" that has one,
    else inside \boxed{…}, else, if last, the last number; "" if there is none, or if that number
    is only a part of something.   "… #### -$1,234.50." -> "-1,234.50";  "#### 12:30" -> "" """
    plain = undone(text)
    stated = STATED.search(plain)
    if not stated and (box := boxed(text)):
        return whole(box)
    begin, end = stated.span(1) if stated else (0, 0)
    for number in re.finditer(NUMBER, plain, re.I) if last and not stated else ():
        begin, end = number.span()
    part = GOES_ON.match(plain, end) or GOES_BEFORE.search(plain[max(0, begin - 3):begin])
    return "" if part else plain[begin:end].rstrip(",")


def boxed_answer(text):
    r"""What stands in the last \boxed{…}, and nothing else."""
    return whole(boxed(text))


def label(text):
    """The whole response, without blanks at its ends: a class's name."""
    return text.strip()


STATES = dict(mark=extract_answer, last=partial(extract_answer, last=True), boxed=boxed_answer,
              whole=label)


def value(answer):
    """The exact Fraction that an answer writes, None if it is not one number.   "1,234.50" ->
    2469/2;  "1 1/2" -> 3/2"""
    text = undone(answer).strip().rstrip(".") if len(answer) <= 200 else ""
    if re.fullmatch(r"[-+]?\d{1,3}(,\d{3})+(\.\d+)?", text):         # thousands; "1,5" is no number
        text = text.replace(",", "")
    mixed = re.fullmatch(r"([-+]?)(\d+) +(\d+/\d+)", text)
    try:                                                               # 1e9999999 would fill memory
        if len(text) > 60 or re.search(r"e[-+]?\d{3}|_", text, re.I):
            return None
        if mixed:
            size = int(mixed[2]) + Fraction(mixed[3])
            return -size if mixed[1] == "-" else size
        return Fraction(text)
    except (ValueError, ZeroDivisionError):
        return None


def same_answer(a, b):
    """Whether two answers are one number exactly (1/2 is 0.50, 1/3 is not 0.33), or else one
    text."""
    x, y = value(a), value(b)
    return x == y if x is not None and y is not None else bool(a.strip()) and a.split() == b.split()


# --- finite data: real pairs ----------------------------------------------------------------------

def drawn(rows, n, seed):
    """n of the rows (0: all) without replacement, by a seed."""
    return random.Random(f"problems/{seed}").sample(rows, len(rows))[:n or None]


class Signatures:
    """A Python signature -> the first sentence of its docstring, from the standard library
    (data/text.py)."""
    name, metric, max_new, splits = "signatures", "rouge_l", 48, ("train", "val", "ood")

    def __init__(self):
        self.rows = {split: signatures(split) for split in ("train", "val", "ood")}

    def problems(self, split, n=0, seed=0):
        check_split(split, self.rows)
        return drawn(self.rows[split], n, seed)

    def sample(self, rng, split="train"):
        check_split(split, self.rows)
        return rng.choice(self.rows[split])

    def demo(self, problem, style="good"):
        """The real completion, the only style there is."""
        return problem["completion"]

    def reward(self, problem, completion, finished=True):
        """ROUGE-L against the real sentence; a response that runs on pays in precision."""
        return rouge_l(problem["completion"], completion)


class Jsonl:
    """Any file of rows that text.SCHEMAS lists, GSM8K by default; val is one prompt in sixteen, or
    another file.

    Where more than half of the rows state an answer (see truth), reward is 1.0 for the same answer,
    0.0 for another and for an unfinished response, and a row that states none is not posed, which
    is told. Else it is ROUGE-L, or the user's alone if there are no completions. strip removes
    GSM8K's annotations <<48/2=24>> from demonstrations in its own schema. answer: a row of STATES,
    what a response is read for; whole: rows are labelled, a row's answer, or else its completion,
    is its class, and a response is that or wrong. system, ask: words around every question, see
    framed.
    """
    splits = ("train", "val")

    def __init__(self, path="gsm8k", strip=True, answer="mark", max_new=320, val="", system="",
                 ask=""):
        self.name, self.max_new, file = Path(path).stem, max_new, locate(path)
        self.stated, self.truth = STATES[answer], label_of if answer == "whole" else truth
        rows, held = good_rows(file, strip), good_rows(locate(val), strip) if val else None
        if val:
            rows = split_rows(rows, "train", held=held, of=file)
        every = rows + (held or [])
        self.metric = ("accuracy" if 2 * sum(map(bool, map(self.truth, every))) > len(every) else
                       "rouge_l" if any(map(has_completion, every)) else "reward")
        graded = dict(accuracy=self.truth, rouge_l=has_completion, reward=bool)[self.metric]
        posed = list(filter(graded, rows))
        self.rows = (dict(train=posed, val=list(filter(graded, held))) if val else
                     {x: split_rows(posed, x) for x in self.splits})         # what can be graded
        asked = {row["prompt"] for row in held or self.rows["val"]}
        self.shown = dict(train=[], val=[])                                  # what can be learnt
        for row in filter(has_completion, every):
            self.shown["val" if row["prompt"] in asked else "train"].append(row)
        if not self.rows["train"] and not self.shown["train"]:
            raise UserError(f"{file}: one prompt cannot be split into train and val: add a second, "
                            "or give --val FILE")
        self.report(every)
        if self.truth is label_of:                             # a token is at least a byte; EOS
            self.max_new = 1 + max(len(label_of(row).encode()) for row in every)
        for row in every:
            row |= framed(row, system, ask)

    def report(self, every):
        """Say which rows have no answer or no completion, where others do."""
        posed, shown = (sum(some.values(), []) for some in (self.rows, self.shown))
        what = "answer" if self.metric == "accuracy" else "completion"
        for kept, words in ((posed, f"state no {what} and are not posed"),
                            (shown or every, "have no completion and are not trained on")):
            if len(kept) < len(every):
                kept = {row["source"] for row in kept}
                left = [row["source"] for row in every if row["source"] not in kept]
                tell(f"{self.name}: {len(left)} of {len(every)} rows {words} ({places(left)})")
        marked = [row for row in shown if MARK in row["completion"] and not truth(row)]
        if self.metric == "rouge_l" and 2 * len(marked) > len(every):
            tell(f"{self.name}: no number follows {MARK} in {len(marked)} rows: responses are "
                 "graded by ROUGE-L, not by their answers")

    problems, sample = Signatures.problems, Signatures.sample

    def lessons(self, split, n=0, seed=0):
        """As problems(), of the rows that have a completion to learn."""
        check_split(split, self.shown)
        return drawn(self.shown[split], n, seed)

    def demo(self, problem, style="good"):
        """The real completion, the only style there is; of a row without one its answer."""
        if self.truth is label_of:
            return label_of(problem)
        answer = f"{MARK} {problem['answer']}" if "answer" in problem else ""
        return problem.get("completion", answer)

    def reward(self, problem, completion, finished=True):
        """Exact answers or ROUGE-L, as the class says."""
        if self.metric == "reward":
            raise UserError(f"{problem['source']}: there is neither a completion nor an answer to "
                            "grade by: give --reward PATH.py:FUNCTION")
        if self.metric == "rouge_l":
            return rouge_l(problem["completion"], completion)
        return float(finished and same_answer(self.stated(completion), self.truth(problem)))


def has_completion(row):
    """Whether a row of a file can be learnt."""
    return "completion" in row


def good_rows(file, strip):
    """A file's rows but for those with "label": false, which are not to be imitated, aloud."""
    rows = examples(file)
    for row in rows:
        text, own = row.get("completion", ""), {"question", "answer"} <= row["row"].keys()
        if strip and own and MARK in text:
            row["completion"] = re.sub(r"<<[^<>\n]*=[^<>\n]*>>", "", text)
    good = [row for row in rows if row.get("label", True)]
    if len(good) < len(rows):
        tell(f"{file}: {len(rows) - len(good)} of {len(rows)} rows are labelled false and left out")
    if not good:
        raise UserError(f"{file}: all rows are labelled false: there is nothing to imitate")
    return good


def truth(problem):
    r"""The answer of a file's row, "" for none: what its completion states after "####", or its
    answer column: after "####", in \boxed{…}, or all of a short one (a number, if the row has a
    completion too)."""
    text, column = problem.get("completion"), problem.get("answer", "").strip()
    if text is not None and MARK in text:
        return extract_answer(text)
    if MARK in column or "\\boxed" in column:
        return extract_answer(column)
    short = len(column) <= 100 and "\n" not in column and whole(column)
    return short if short and (text is None or value(short) is not None) else ""


def label_of(problem):
    """The class of a labelled row: its answer column, or all of its completion."""
    return label(problem.get("answer") or problem.get("completion", ""))


Gsm8k = Jsonl  # with its default path; a copy of the file is Gsm8k("path/to/train.jsonl")


# --- arithmetic -----------------------------------------------------------------------------------

# level: digits, operands, first operators, bytes of the longest short response
LEVELS = {1: (1, 2, "+-", 50), 2: (2, 2, "+-", 75), 3: (3, 2, "+-*", 100),
          4: (3, 3, "+-*", 150), 5: (4, 4, "+-*", 240)}


def columns(a, op, b):
    """[(left, right, carry, result)] of one column-wise step, units first.   a op b >= 0; * takes a
    digit.

    The result of + and * is two digits, carry and digit; - writes a borrowed ten into the left
    number:
    47+85 -> 7+5+0=12 4+8+1=13     52-27 -> 12-7-0=5 05-2-1=2     47*6 -> 7*6+0=42 4*6+4=28
    """
    carry, out = 0, []
    for i in range(max(len(str(a)), len(str(b)))):
        x, y = a // 10**i % 10, b if op == "*" else b // 10**i % 10
        if op == "-":
            borrow = int(x < y + carry)
            out.append((f"{borrow}{x}", y, carry, str(10 * borrow + x - y - carry)))
            carry = borrow
        else:
            total = carry + (x * y if op == "*" else x + y)
            out.append((str(x), y, carry, f"{total:02d}"))
            carry = total // 10
    return out


def equations(a, op, b):
    """The columns as text, each a true equation of digits."""
    return [f"{x}{op}{y}{'-' if op == '-' else '+'}{c}={r}" for x, y, c, r in columns(a, op, b)]


def apply(a, op, b):
    """a op b, exactly."""
    return {"+": a + b, "-": a - b, "*": a * b}[op]


def short(steps):
    """One line a step: its columns, units first, then the number that they spell."""
    return "".join(f"{' '.join(equations(*step))} so {apply(*step)}\n" for step in steps)


def verbose(steps):
    """One line a column, in words: four times as long as short, for what studies the length of
    thoughts."""
    lines = []
    for n, (a, op, b) in enumerate(steps, 1):
        lines.append(f"Step {n}: {a}{op}{b}")
        for i, (text, (x, _, _, r)) in enumerate(zip(equations(a, op, b), columns(a, op, b)), 1):
            after = f"borrow {x[0]}" if op == "-" else f"carry {r[0]}"
            lines.append(f"column {i}: {text}, write {r[-1]}, {after}")
        lines.append(f"so {a}{op}{b}={apply(a, op, b)}")
    return "\n".join([*lines, f"The answer is {apply(*steps[-1])}.\n"])


STYLES = dict(direct=lambda steps: "", short=short, verbose=verbose)
BUDGET = dict(direct=0.2, short=1.0, verbose=4.2)  # the longest response, that of short being 1


class Arithmetic:
    """Sums such as "347*6-58=?" with a column-wise chain of thought, each digit spelled, for small
    models.

    level 1..5 sets digits and operands (LEVELS). Sums are read from left to right: a product, by
    one digit, only comes first, and no partial result is negative. train and val share no problem
    (val is 1/8, by hash); ood has one digit more in its first number, or one operand more. style is
    what demo calls "good".
    """
    name, metric, splits = "arithmetic", "accuracy", ("train", "val", "ood")

    def __init__(self, level=2, style="short"):
        if level not in LEVELS or style not in STYLES:
            raise UserError(f"arithmetic has no level {level!r} with style {style!r}: choose a "
                            "level of "
                            f"{', '.join(map(str, LEVELS))} and a style of {', '.join(STYLES)}")
        self.level, self.style, self.max_new = level, style, int(LEVELS[level][3] * BUDGET[style])

    def sample(self, rng, split="train"):
        """{"prompt", "answer", "steps": [(a, op, b)]} of one problem."""
        check_split(split)
        digits, operands, first, _ = LEVELS[self.level]
        more = rng.choice(["digits", "operands"]) if split == "ood" else ""
        while True:
            sizes = [rng.randint(1, digits) for _ in range(operands + (more == "operands"))]
            sizes[0] = digits + 1 if more == "digits" else sizes[0]
            total, *rest = (rng.randrange(10**(size - 1) if size > 1 else 0, 10**size)
                            for size in sizes)
            text, steps = str(total), []
            for b in rest:
                op = rng.choice("+-" if steps else first)
                op, b = "+" if op == "-" and b > total else op, b % 10 if op == "*" else b
                steps.append((total, op, b))
                text, total = f"{text}{op}{b}", apply(total, op, b)
            if more or (int(digest(text)[:8], 16) % 8 == 0) == (split == "val"):
                return dict(prompt=f"{text}=?\n", answer=str(total), steps=steps)

    def problems(self, split, n=0, seed=0):
        if n < 1:
            raise UserError("arithmetic makes its problems: say how many (n >= 1)")
        rng = random.Random(f"arithmetic/{self.level}/{split}/{seed}")
        return [self.sample(rng, split) for _ in range(n)]

    def demo(self, problem, style="good"):
        """A worked response: direct, short or verbose; good is the task's own style."""
        style = self.style if style == "good" else style
        if style not in STYLES:
            raise UserError(f"arithmetic has no style {style!r}{nearest(style, STYLES)}")
        return f"{STYLES[style](problem['steps'])}#### {problem['answer']}"

    def reward(self, problem, completion, finished=True):
        """1.0 if the response ended and states the right answer, else 0.0."""
        return float(finished and same_answer(extract_answer(completion), problem["answer"]))


# --- chains: five small tasks solved step by step, and demonstrations of mixed quality ------------
#
#   chain      9-1+2+3?               -1=8+2=0+3=3####3            a running digit, modulo 10
#   sort       s52918?                >1>2>5>8>9####12589          the smallest of what is left
#   graph      g2>1,1>3,3>2:1,2?      1>33>2####2                  so many hops from a node
#   add        a78,21?                780=15211=04####45           27+18, columns, units first
#   countdown  c4,7,3>25?             4+7=11,11-3=8w4*7=28,28-3=25####4*7-3      w after what failed
#
# A problem is {"prompt", "answer", "seed"}; a response is cells, each a lead and a value, then ####
# and an answer. A kind is a few functions of the prompt; its solver is a generator that yields
# (lead, right value, values that a slip may write) and is sent the value that was written (None:
# the cell was left out), so that errors carry on.

ALPHABET = "0123456789+-*=;w?#>,:sgac"
DIGITS = "0123456789"


def chain_tokenizer():
    """The arena's Tokenizer: 3 special ids and one for each of 25 characters."""
    return char_tokenizer(ALPHABET)


class Kind(NamedTuple):
    """One family of problems. A depth is a number of cells: from train[0] to train[1], or of
    ood."""
    draw: Callable               # (rng, depth) -> prompt
    solve: Callable              # prompt -> generator of (lead, right, choices), returns the answer
    guess: Callable              # (prompt, rng) -> an answer of the right form
    shuffle: Callable            # (prompt, rng) -> another prompt with the same answer
    cell: str                    # the pattern of a cell: its lead and its value
    train: tuple
    ood: tuple


# --- chains: the five kinds -----------------------------------------------------------------------

def draw_chain(rng, depth):
    """A digit and `depth` terms of ±1, ±2 or ±3."""
    start = rng.randrange(10)
    return f"{start}{''.join(rng.choice('+-') + rng.choice('123') for _ in range(depth))}?"


def solve_chain(prompt):
    """Each term in turn, modulo 10."""
    value = int(prompt[0])
    for term in re.findall(r"[+-]\d", prompt):
        seen = yield f"{term}=", str((value + int(term)) % 10), DIGITS
        value = value if seen is None else int(seen)
    return str(value)


def shuffle_chain(prompt, rng):
    """The terms in another order."""
    terms = re.findall(r"[+-]\d", prompt)
    return f"{prompt[0]}{''.join(rng.sample(terms, len(terms)))}?"


def draw_sort(rng, depth):
    """So many different digits; more than six may repeat."""
    digits = DIGITS[1:]
    drawn = rng.sample(digits, depth) if depth < 7 else rng.choices(digits, k=depth)
    return f"s{''.join(drawn)}?"


def solve_sort(prompt):
    """The smallest of what is left, until nothing is."""
    left, out = list(prompt[1:-1]), ""
    while left:
        seen = yield ">", min(left), "".join(left)
        left.remove(seen or min(left))
        out += seen or ""
    return out


def draw_graph(rng, depth):
    """One edge from each of six nodes (more than four hops: eight), in any order; a start, and the
    hops."""
    nodes = DIGITS[1:7] if depth < 5 else DIGITS[1:9]
    edges = [f"{a}>{rng.choice(nodes.replace(a, ''))}" for a in rng.sample(nodes, len(nodes))]
    return f"g{','.join(edges)}:{rng.choice(nodes)},{depth}?"


def solve_graph(prompt):
    """Hop by hop."""
    edges = dict(re.findall(r"(\d)>(\d)", prompt))
    at, hops = re.search(r":(\d),(\d)", prompt).groups()
    for _ in range(int(hops)):
        at = (yield f"{at}>", edges[at], "".join(sorted(edges))) or at
    return at


def shuffle_graph(prompt, rng):
    """The edges in another order."""
    edges, rest = prompt[1:].split(":")
    edges = edges.split(",")
    return f"g{','.join(rng.sample(edges, len(edges)))}:{rest}"


def draw_add(rng, depth):
    """Two numbers of `depth` digits, their columns side by side, units first."""
    columns = [(rng.randrange(i == depth - 1, 10), rng.randrange(i == depth - 1, 10))
               for i in range(depth)]
    return f"a{','.join(f'{x}{y}' for x, y in columns)}?"


def solve_add(prompt):
    """Each column with what it carries."""
    out, carry = "", 0
    for x, y in re.findall(r"(\d)(\d)", prompt):
        total = int(x) + int(y) + carry
        seen = yield f"{x}{y}{carry}=", f"{total:02d}", [f"{i:02d}" for i in range(20)]
        carry, out = (0, out) if seen is None else (int(seen) // 10, seen[1] + out)
    return (str(carry) if carry or not out else "") + out


def shuffle_add(prompt, rng):
    """The numbers swapped."""
    return re.sub(r"(\d)(\d)", r"\2\1", prompt)


def attempt(numbers, rng):
    """A random way to use every number once, from left to right: ([(lead, value)], expression,
    result)."""
    first, *rest = rng.sample(numbers, len(numbers))
    total, text, cells = int(first), first, []
    for n in rest:
        op, before = rng.choice("+-*"), total
        total = {"+": total + int(n), "-": total - int(n), "*": total * int(n)}[op]
        cells, text = [*cells, (f"{before}{op}{n}=", str(total))], f"{text}{op}{n}"
    return cells, text, total


def draw_countdown(rng, depth):
    """`depth` digits, and a target that they reach."""
    while True:
        numbers = [rng.choice(DIGITS[1:]) for _ in range(depth)]
        if 0 < (target := attempt(numbers, rng)[2]) < 100:
            return f"c{','.join(numbers)}>{target}?"


def solve_countdown(prompt):
    """Up to two attempts that fail, each followed by w, then one that works; slips spoil the
    last."""
    numbers, target = re.findall(r"\d+",
                                 prompt.partition(">")[0]), int(prompt.partition(">")[2][:-1])
    rng, failed, works = random.Random(f"search/{prompt}"), [], None
    fails = rng.randint(0, 2)
    for _ in range(10000):  # a drawn target is reached; a made-up one may not be
        one = attempt(numbers, rng)
        if one[2] != target:
            failed.append(one)
        elif works is None:
            works = one
        if works and len(failed) >= max(1, fails):
            break
    spoilt, lead = works is None, ""
    for cells, *_ in [*failed[:fails], works or failed[-1]]:
        for start, right in cells:
            seen = yield lead + start, right, [str(i) for i in range(40)]
            lead, spoilt = ",", spoilt or seen not in (None, right)
        lead = "w"
    return failed[0][1] if spoilt and failed else works[1]


def shuffle_countdown(prompt, rng):
    """The numbers in another order."""
    numbers, target = prompt[1:].split(">")
    numbers = numbers.split(",")
    return f"c{','.join(rng.sample(numbers, len(numbers)))}>{target}"


def guess_digit(prompt, rng):
    """Any digit."""
    return str(rng.randrange(10))


def guess_order(prompt, rng):
    """The prompt's digits in any order."""
    return "".join(rng.sample(prompt[1:-1], len(prompt) - 2))


def shuffle_sort(prompt, rng):
    """The same digits in another order."""
    return f"s{guess_order(prompt, rng)}?"


def guess_node(prompt, rng):
    """Any node that an arrow leaves."""
    return rng.choice(re.findall(r"(\d)>", prompt))


def guess_sum(prompt, rng):
    """As many digits as there are columns."""
    return "".join(rng.choices(DIGITS[1:], k=len(re.findall(r"\d\d", prompt))))


def guess_expression(prompt, rng):
    """Any expression of all the numbers."""
    return attempt(re.findall(r"\d+", prompt.partition(">")[0]), rng)[1]


KINDS = dict(
    chain=Kind(draw_chain, solve_chain, guess_digit, shuffle_chain, r"[+-]\d=\d", (2, 4), (5, 6)),
    sort=Kind(draw_sort, solve_sort, guess_order, shuffle_sort, r">\d", (4, 6), (7, 8)),
    graph=Kind(draw_graph, solve_graph, guess_node, shuffle_graph, r"\d>\d", (2, 4), (5, 6)),
    add=Kind(draw_add, solve_add, guess_sum, shuffle_add, r"\d\d\d=\d\d", (2, 4), (5, 6)),
    countdown=Kind(draw_countdown, solve_countdown, guess_expression, shuffle_countdown,
                   r"-?\d+[-+*]\d+=-?\d+", (3, 3), (4, 4)))


def reaches(prompt, expression):
    """Whether sums and products from left to right, every number of the prompt once, reach its
    target."""
    numbers, _, target = prompt[1:-1].partition(">")
    if len(expression) > 40 or not re.fullmatch(r"\d+(?:[-+*]\d+)*", expression):
        return False
    first, *rest = re.findall(r"[-+*]|\d+", expression)
    total = int(first)
    for op, n in zip(rest[::2], map(int, rest[1::2])):
        total = {"+": total + n, "-": total - n, "*": total * n}[op]
    used = sorted(re.findall(r"\d+", expression))
    return total == int(target) and used == sorted(numbers.split(","))


# --- chains: the task -----------------------------------------------------------------------------


def held(prompt):
    """Whether a prompt belongs to val: one in eight, by hash."""
    return int(digest(prompt)[:8], 16) % 8 == 0


class Chain:
    """One of KINDS, with demonstrations of a style: good (brief and right), wordy (right), mixed
    (flawed).

    Flaws, each a probability: direct guesses at once (the short wrong strategy that a price on
    length can collapse to); skip leaves a cell out; slip writes a wrong value. Words: wait says "w"
    and the cell again, nearly always right (useful: it repairs slips); up to `fill` ";" follow a
    cell (neutral). train and val share no problem (val is 1/8, by hash); ood is longer.
    """
    metric, splits, max_new = "accuracy", ("train", "val", "ood"), 72

    def __init__(self, kind="chain", style="mixed", direct=0.5, skip=0.03, slip=0.1, wait=0.2,
                 fill=4):
        if kind not in KINDS or style not in ("mixed", "wordy", "good"):
            raise UserError(f"{kind} has no style "
                            f"{style!r}{nearest(style, ('mixed', 'wordy', 'good'))}")
        self.name, self.kind, self.style = kind, KINDS[kind], style
        self.direct, self.skip, self.slip, self.wait, self.fill = direct, skip, slip, wait, fill
        self.phrases = (*(x for x in "=>+-*" if x in self.kind.cell), "w",
                        "####")                                                 # forms of reasoning

    def sample(self, rng, split="train"):
        """{"prompt", "answer", "seed"} of one problem, drawn by rng; the seed fixes its
        demonstration."""
        check_split(split)
        while True:
            depths = self.kind.ood if split == "ood" else self.kind.train
            prompt = self.kind.draw(rng, rng.randint(*depths))
            if split == "ood" or held(prompt) == (split == "val"):
                return dict(prompt=prompt, answer=self.follow(prompt)[0], seed=rng.getrandbits(32))

    def problems(self, split, n=0, seed=0):
        """n fresh problems; the first n of a longer list with the same seed are the same."""
        if n < 1:
            raise UserError(f"{self.name} makes its problems: say how many (n >= 1)")
        rng = random.Random(f"{self.name}/{split}/{seed}")
        return [self.sample(rng, split) for _ in range(n)]

    def follow(self, prompt, write=lambda lead, right, choices: right):
        """The solver's (answer, [(lead, value)]) where write says what each cell's value
        becomes."""
        steps, cells, seen = self.kind.solve(prompt), [], None
        try:
            lead, right, choices = next(steps)
            while True:
                seen = write(lead, right, choices)
                cells.append((lead, seen))
                lead, right, choices = steps.send(seen)
        except StopIteration as end:
            return end.value, cells

    def demo(self, problem, style=""):
        """A response of the style (default: the task's own); mixed ones are right about half the
        time."""
        rng, text = random.Random(f"{self.name}/{problem['prompt']}/{problem['seed']}"), []
        flawed, wordy = (style or self.style) == "mixed", (style or self.style) != "good"
        if flawed and rng.random() < self.direct:
            return f"####{self.kind.guess(problem['prompt'], rng)}"

        write = partial(self.write_step, rng, text, flawed, wordy)
        answer, _ = self.follow(problem["prompt"], write)
        return f"{''.join(text)}####{answer}"

    def write_step(self, rng, text, flawed, wordy, lead, right, choices):
        """One step of a demonstration, appended to `text`; -> what it says, None if left out."""
        if flawed and rng.random() < self.skip:
            return None
        seen = rng.choice(choices) if flawed and rng.random() < self.slip else right
        text.append(f"{lead}{seen}")
        again = self.wait
        while wordy and rng.random() < again:
            seen, again = right if rng.random() < 0.96 else seen, 0.3
            text.append(f"w{lead.lstrip('w,')}{seen}")
        text.append(";" * rng.randint(0, self.fill) if wordy else "")
        return seen

    def stated(self, text):
        """What a response states after its first ####: digits and operators; "" if nothing."""
        found = re.search(r"####([-+*0-9]{1,40})", text)
        return found[1] if found else ""

    def reward(self, problem, completion, finished=True):
        """1.0 if the response ended and states the right answer (countdown: any that works), else
        0.0."""
        answer = self.stated(completion)
        if self.name == "countdown":
            return float(finished and reaches(problem["prompt"], answer))
        return float(finished and answer == problem["answer"])

    def paraphrase(self, problem, rng):
        """The same problem in other words, on the same side of train and val: the same answer."""
        for _ in range(100):  # numbers swapped: one other way, or none
            prompt = self.kind.shuffle(problem["prompt"], rng)
            if prompt != problem["prompt"] and held(prompt) == held(problem["prompt"]):
                return problem | dict(prompt=prompt)
        return problem

    def habits(self, text):
        """What a response spends its tokens on: {"cells", "waits", "fillers", "guess"}; guess: no
        cell."""
        cells = len(self.steps(text))
        return dict(cells=cells, waits=text.count("w"), fillers=text.count(";"),
                    guess=float(cells == 0))

    def steps(self, text):
        """Where each cell of a response ends, as indices of characters."""
        return [m.end() for m in re.finditer(self.kind.cell, text.partition("####")[0])]

    def hints(self, problem):
        """The facts that solve a problem, as texts that may follow its prompt: a good response's
        cells."""
        return [lead + value for lead, value in self.follow(problem["prompt"])[1]]

    def cells(self, text):
        """The cells of a response, [(text, is it said again, after a w?)]; countdown says none
        again."""
        text = text.partition("####")[0]
        return [(m[0], self.name != "countdown" and text[m.start() - 1:m.start()] == "w")
                for m in re.finditer(self.kind.cell, text)]

    def only_one_way(self):
        """UserError in countdown, where many searches are right."""
        if self.name == "countdown":
            raise UserError("countdown has many right searches: no steps to compare with; choose "
                            "another")

    def process(self, problem, text):
        """A score of each cell of a response: 1.0 if it is what a good response has there (not
        countdown)."""
        good, at, out = self.hints(problem), 0, []
        self.only_one_way()
        for cell, again in self.cells(text):
            at += not again
            out.append(float(at > 0 and good[at - 1:at] == [cell]))
        return out

    def checks(self, problem, text):
        """What can be checked without the answer: {"format", "cells", "complete", "agrees"}, each a
        bool.

        cells: every one follows from the last; complete: none is missing; agrees: the answer is
        their result. What is said again counts in the place of what it repeats. Not for countdown:
        every search differs.
        """
        self.only_one_way()
        found = self.cells(text)
        left = [cell for i, (cell, _) in enumerate(found)
                if not (i + 1 < len(found) and found[i + 1][1])]
        fits, missing = [], []

        def write(lead, right, choices):
            cell = left.pop(0) if left else ""
            missing.append(not cell)
            fits.append(not cell or cell == lead + right)
            if cell.startswith(lead) and cell[len(lead):] in choices:
                return cell[len(lead):]
            return right
        answer, _ = self.follow(problem["prompt"], write)
        return dict(format=bool(self.stated(text)), cells=all(fits), complete=not any(missing)
                    and not left,
                    agrees=answer == self.stated(text))


# --- several as one -------------------------------------------------------------------------------


class Mixed:
    """Several tasks in turn, "chain+sort": each problem carries the number of its "task"."""

    def __init__(self, name):
        self.name, self.parts = name, [task(part) for part in name.split("+")]
        common = set.intersection(*(set(part.splits) for part in self.parts))
        self.splits = [split for split in self.parts[0].splits if split in common]
        self.max_new = max(part.max_new for part in self.parts)
        if len({part.metric for part in self.parts}) > 1:
            raise UserError(f"{name}: tasks that are scored alike go together; these give "
                            f"{' and '.join(sorted({part.metric for part in self.parts}))}")
        self.metric = self.parts[0].metric

    def problems(self, split, n=0, seed=0):
        k = len(self.parts)
        lists = [part.problems(split, -(-n // k), seed) for part in self.parts]
        return [row | dict(task=i) for rows in zip(*lists)
                for i, row in enumerate(rows)][:n or None]

    def sample(self, rng, split="train"):
        i = rng.randrange(len(self.parts))
        return self.parts[i].sample(rng, split) | dict(task=i)

    def demo(self, problem, style=""):
        """Its own task's."""
        return self.parts[problem["task"]].demo(problem, *([style] if style else []))

    def reward(self, problem, completion, finished=True):
        """Its own task's."""
        return self.parts[problem["task"]].reward(problem, completion, finished)


def part(task, problem):
    """The task that a problem belongs to: one of a mixture, or the task itself."""
    return task.parts[problem["task"]] if isinstance(task, Mixed) else task


def step_ends(task, text):
    """Where each step of a response ends, as indices of characters: the task's cells, else its
    lines."""
    steps = getattr(task, "steps", lambda x: [m.end() for m in re.finditer(r"\n+", x)])
    return steps(text)


def stated(task, text):
    """The answer that a response states, as one spelling of each number; "" for none."""
    answer = task.stated(text) if hasattr(task, "stated") else extract_answer(text)
    number = value(answer)
    return str(number) if number is not None else answer.strip()


# --- judging --------------------------------------------------------------------------------------

CANDIDATES = 10                  # the teacher's traces for a pair: Think-RM's M (2505.16265)
THINK, ANSWER, YES, NO = (JUDGE[name] for name in ("THINK", "ANS", "YES", "NO_"))
NEUTRAL = FILLER[0]              # fills a trace and says nothing
VERDICT = {letter: score for score, letter in SCORES.items()}


def parity(x):
    """The running parity p_i = x_1 xor … xor x_i of a string of bits.   "1011010" -> "1101100" """
    return "".join(accumulate(x, lambda p, bit: "01"[p != bit]))


def answer(x, rng):
    """A response of mixed quality: the parity with probability 0.3, else after 1 to len(x) random
    rewrites.

    A rewrite sets a random position to a random bit, so that some change nothing.
    """
    y = list(parity(x))
    for _ in range(0 if rng.random() < 0.3 else rng.randint(1, len(y))):
        y[rng.randrange(len(y))] = rng.choice("01")
    return "".join(y)


class Parity:
    """Running parities, answered with mixed quality: what a policy improves by ParityJudge's
    verdicts.

    "1011010=" -> "1101100". Gold is the share of right positions, 0 for what is no string of as
    many bits. val has one prompt in four.
    """
    name, metric, splits = "parity", "gold", ("train", "val")

    def __init__(self, bits=7):
        if not 2 <= bits <= 10:
            raise UserError(f"parity of {bits} bits: expected 2 to 10")
        self.bits, self.max_new = bits, bits + 1               # EOS

    def sample(self, rng, split="train"):
        """A problem {"prompt", "seed"} drawn by rng; the seed fixes its demonstration."""
        check_split(split, self.splits)
        while True:
            x = "".join(rng.choices("01", k=self.bits))
            problem = dict(prompt=x + SEP, seed=rng.getrandbits(32))
            if (int(digest(x)[:8], 16) % 4 == 0) == (split == "val"):
                return problem

    def problems(self, split, n=0, seed=0):
        """n problems; the first n of a longer list with the same seed are the same."""
        if n < 1:
            raise UserError("parity makes its problems: say how many (n >= 1)")
        rng = random.Random(f"parity/answers/{split}/{seed}")
        return [self.sample(rng, split) for _ in range(n)]

    def demo(self, problem):
        """A response of mixed quality, see answer(); the problem's seed fixes it."""
        return answer(problem["prompt"][:-1], random.Random(f"answer/{problem['seed']}"))

    def well_formed(self, text):
        """Whether a response is a string of as many bits: only those can be judged bit by bit."""
        return len(text) == self.bits and set(text) <= {"0", "1"}

    def reward(self, problem, completion, finished=True):
        """The share of right positions, in [0, 1]."""
        right = zip(parity(problem["prompt"][:-1]), completion)
        sound = finished and self.well_formed(completion)
        return sum(p == y for p, y in right) / self.bits if sound else 0.0


def strength(x, a, b):
    """The gold verdict on responses a and b, -3 .. 3: NEGATIVE if a is better, 0 for a tie.

    sign(q_b - q_a) * (1 up to a difference of .34, 2 up to .67, else 3),  q the share of right
    positions
    """
    gap = sum((p == v) - (p == u) for p, u, v in zip(parity(x), a, b)) / len(x)
    return 0 if gap == 0 else (1 if gap > 0 else -1) * (1 + (abs(gap) > 0.34) + (abs(gap) > 0.67))


def judging(x, a, b, seed=0):
    """The problem of judging a against b; its prompt, x, a and b bit by bit, reads "110001…=".

    {"prompt", "seed", "x", "a", "b", "label"}: label is the strength, seed fixes the
    demonstrations. Side by side, what a step of the reasoning looks up stands at one distance: a
    rotary model finds it quickly.
    """
    prompt = "".join(map("".join, zip(x, a, b))) + SEP
    return dict(prompt=prompt, seed=seed, x=x, a=a, b=b, label=strength(x, a, b))


def swapped(problem):
    """The same pair in the other order: its label is negated, and its prompt gets traces of its
    own."""
    return judging(problem["x"], problem["b"], problem["a"], problem["seed"])


# What a judge's demonstrations think, by style: of the teacher's correct traces, and of a full one.
JUDGEMENTS = dict(
    long=lambda kept, full: max(kept, key=len),                          # Think-RM's choice
    short=lambda kept, full: min(kept, key=len),
    random=lambda kept, full: kept[0],                                   # all are drawn alike
    direct=lambda kept, full: "",
    last=lambda kept, full: full[-3:],
    filler=lambda kept, full: min(kept, key=len).ljust(len(max(kept, key=len)), NEUTRAL))


class ParityJudge:
    """Judging pairs of running parities: a verdict that tiny models reach by thinking, position by
    position.

    A judgement is "?1+-1++…!y": after ? the right bit of each position and whether A, then B, has
    it; after ! a letter, the strength -3 .. 3 as t .. z. A made-up teacher writes the traces, to a
    random depth and with each + or - flipped with probability error; style says which of its
    correct ones is shown (Think-RM, 2505.16265: the longest). Every style has the same problems.

    train and val are alike and share no pair, in either order; hard shares none with train, and its
    responses differ in exactly one position.
    """
    metric, splits = "accuracy", ("train", "val", "hard")

    def __init__(self, style="long", error=0.05, bits=7):
        if style not in JUDGEMENTS:
            raise UserError(f"parity has no style {style!r}{nearest(style, JUDGEMENTS)}")
        if not 0 <= error <= 0.5:
            raise UserError(f"parity with error {error}: expected a probability from 0 to 0.5, a "
                            "coin")
        if not 2 <= bits <= 10:
            raise UserError(f"parity of {bits} bits: expected 2 to 10")
        self.name, self.style, self.error, self.bits = f"parity_{style}", style, error, bits
        self.max_new = 3 * bits + 4                            # ? and ! and a letter, EOS

    def sample(self, rng, split="train"):
        """One problem, see judging(), never a tie; where the teacher finds no correct trace, train
        drops it.

        The tests draw the seed again instead, so that their pairs depend on neither style nor
        error.
        """
        check_split(split, self.splits)
        while True:
            x = "".join(rng.choices("01", k=self.bits))
            a, b = answer(x, rng), answer(x, rng)
            if split == "hard":  # a random order: a is right more often
                i = rng.randrange(self.bits)
                a, b = rng.sample([a, a[:i] + "10"[int(a[i])] + a[i + 1:]], 2)
            problem = judging(x, a, b, rng.getrandbits(32))
            held = int(digest(x + min(a, b) + max(a, b))[:8], 16) % 4 == 0       # one pair in four
            if problem["label"] and held == (split != "train"):
                while split != "train" and not self.kept(problem):
                    problem["seed"] += 1
                if self.kept(problem):
                    return problem

    def problems(self, split, n=0, seed=0):
        """n fresh problems; the first n of a longer list with the same seed are the same."""
        if n < 1:
            raise UserError("parity makes its problems: say how many (n >= 1)")
        rng = random.Random(f"parity/{split}/{seed}")
        return [self.sample(rng, split) for _ in range(n)]

    @staticmethod
    def trace(problem, depth, rng, error):
        """("1+-1++", tally) to a depth of positions: the right bit, is A right, is B right, with
        errors.

        tally = sum (B right) - (A right), as written: the trace's own verdict, which may be wrong.
        """
        text, tally = "", 0
        for p, *bits in list(zip(parity(problem["x"]), problem["a"], problem["b"]))[:depth]:
            a, b = ((bit == p) != (rng.random() < error) for bit in bits)
            text, tally = text + p + (NO, YES)[a] + (NO, YES)[b], tally + b - a
        return text, tally

    def kept(self, problem):
        """The texts of the teacher's candidates that favour the better response; no tally tosses a
        coin."""
        rng = random.Random(f"teacher/{problem['prompt']}/{problem['seed']}")
        drawn = [(*self.trace(problem, rng.randint(1, self.bits), rng, self.error),
                  rng.choice((-1, 1)))
                 for _ in range(CANDIDATES)]
        return [text for text, tally, coin in drawn if (tally or coin) * problem["label"] > 0]

    def demo(self, problem, style=""):
        """A judgement by the teacher (default: the task's style), None if no candidate was correct.

        The letter is the gold strength: the filter has only made sure of its sign.
        """
        style = style or self.style
        if style not in JUDGEMENTS:
            raise UserError(f"parity has no style {style!r}{nearest(style, JUDGEMENTS)}")
        if not (kept := self.kept(problem)):
            return None
        rng = random.Random(f"full/{problem['prompt']}/{problem['seed']}")
        thought = JUDGEMENTS[style](kept, self.trace(problem, self.bits, rng, self.error)[0])
        return (THINK + thought if thought else "") + ANSWER + SCORES[problem["label"]]

    def demonstrations(self, n, seed=0, swap=True):
        """Rows {"prompt", "completion", "label"} of train's first n problems that have a correct
        trace.

        swap: 2n rows, each pair in both orders one after the other; both need a correct trace of
        their own.
        """
        rng, rows = random.Random(f"parity/train/{seed}"), []
        while len(rows) < n * (1 + swap):
            problem = self.sample(rng, "train")
            orders = [problem, swapped(problem)] if swap else [problem]
            shown = [dict(prompt=p["prompt"], completion=self.demo(p), label=p["label"])
                     for p in orders]
            rows += shown if all(row["completion"] for row in shown) else []
        return rows

    @staticmethod
    def pair(row):
        """{"prompt", "chosen", "rejected"}, for a scalar reward model, of a problem or a
        demonstration."""
        x, a, b = (row["prompt"][i:-1:3] for i in range(3))
        better, worse = (a, b) if row["label"] < 0 else (b, a)
        return dict(prompt=x + SEP, chosen=better, rejected=worse)

    @staticmethod
    def parse(text):
        """The score, -3 .. 3, of the letter right after the LAST "!"; None for no "!", no such
        letter, 0."""
        _, found, block = text.rpartition(ANSWER)
        return VERDICT.get(block[:1]) or None if found else None

    def reward(self, problem, completion, finished=True):
        """1.0 if the judgement ended and prefers the better response, else 0.0."""
        return float(self.graded(problem, completion, finished) > 0)

    def graded(self, problem, completion, finished=True):
        """Think-RM's rule for strengths (2505.16265): 1.0 if exact, 0.5 if only the sign is, else
        0.0."""
        score, gold = self.parse(completion) if finished else None, problem["label"]
        return 0.0 if score is None or score * gold < 0 else 1.0 if score == gold else 0.5


# --- rewards from the text alone: (problem, text, finished, task) -> float ------------------------


def similarity(problem, text, finished, task):
    """SWE-RL (2502.18449): -1 without one answer after some reasoning, else the likeness in [0,
    1]."""
    before = text.partition("####")[0].strip()
    if not (finished and before and text.count("####") == 1 and stated(part(task, problem), text)):
        return -1.0
    return SequenceMatcher(None, text, task.demo(problem, "good"), autojunk=False).ratio()


PHRASES = ("first", "then", "next", "finally", "so", "therefore", "because", "since", "thus", "let",
           "check", "wait", "but", "if", "we need", "means", "equals", "total", "step", "answer")


def pattern(problem, text, finished, task):
    """RPR (2505.22653): min(1, share of the key phrases) - repeated n-grams - stray turn markers,
    from 0.

    n-grams of 20 words, or of 8 characters where a response has no spaces.
    """
    known = getattr(task, "phrases", PHRASES)
    units, n = (text.split(), 20) if " " in text else (text, 8)
    grams = [tuple(units[i:i + n]) for i in range(len(units) - n + 1)]
    repeated = 1 - len(set(grams)) / len(grams) if grams else 0.0
    stray = len(re.findall(r"<\|\w+\|>|\b(?:user|assistant):", text, re.I))
    found = sum(bool(re.search(rf"\b{x}\b", text, re.I)) if x in PHRASES else x in text
                for x in known)
    return max(0.0, min(1.0, found / len(known)) - repeated - stray)


REWARDS = dict(task=lambda problem, text, finished, task: task.reward(problem, text, finished),
               swe_rl=similarity, rpr=pattern)


def scorer(spec, task):
    """The reward as a function (problem, text, finished) -> float: one of REWARDS, or
    PATH.py:FUNCTION.

    UserError if the file or the function is not there, does not run, takes other arguments, or,
    when it is called, returns anything but a finite number.
    """
    if spec in REWARDS:
        return lambda problem, text, finished: REWARDS[spec](problem, text, finished, task)
    return partial(checked, user_function(spec), spec)


def user_function(spec, option="--reward", takes=("problem", "text", "finished")):
    """The function that an option's PATH.py:FUNCTION names; UserError if it cannot be had or called
    with what it takes."""
    path, _, name = spec.rpartition(":")
    if not path.endswith(".py") or not Path(path).is_file():
        known = f"{', '.join(REWARDS)}, or " * (option == "--reward")
        raise UserError(f"{option} {spec}: give {known}PATH.py:FUNCTION of a file that exists")
    found = importlib.util.spec_from_file_location("reward_of_the_user", path)
    module = importlib.util.module_from_spec(found)
    sys.modules[found.name] = module                           # dataclasses look there
    try:
        found.loader.exec_module(module)
    except KeyboardInterrupt:
        raise
    except BaseException as e:
        raise UserError(f"{option} {spec}: the file does not run: {blame(e)}") from None
    fn = getattr(module, name, None)
    if not callable(fn) or inspect.iscoroutinefunction(fn):
        raise UserError(f"{option} {spec}: {path} has no function {name!r} that is called and "
                        "returns")
    try:
        with contextlib.suppress(ValueError):  # a built-in function tells no signature
            inspect.signature(fn).bind(*takes)
    except TypeError as e:
        raise UserError(f"{option} {spec}: it is called as {name}({', '.join(takes)}): "
                        f"{e}") from None
    return fn


def checked(fn, spec, problem, text, finished):
    """What the user's function says of a response, as a finite number; UserError else."""
    try:
        value = fn(copy.deepcopy(row_of(problem)), text, finished)       # which it may change
    except KeyboardInterrupt:
        raise
    except BaseException as e:
        raise UserError(f"--reward {spec} failed on the response {text[:60]!r}: "
                        f"{blame(e)}") from None
    try:
        value = value.item() if hasattr(value, "item") else value              # of torch, numpy
        number = math.nan if isinstance(value, (str, bytes)) else float(value)
    except (TypeError, ValueError, RuntimeError, OverflowError):
        number = math.nan
    if not abs(number) <= HUGE:
        raise UserError(f"--reward {spec} returned {str(value)[:60]} for the response "
                        f"{text[:60]!r}: expected a finite number, up to {HUGE:g}")
    return number


def row_of(problem):
    """What a user's reward reads: a problem, of a file the row with all its columns, its "prompt"
    (and "completion") as text."""
    texts = ("prompt", "messages", "completion")
    ours = {key: problem[key] for key in texts if key in problem}
    if "row" not in problem:
        return problem
    return dict(source=problem["source"]) | problem["row"] | ours


def blame(error):
    """An exception of the user's code in one line: what, and where."""
    where = traceback.extract_tb(error.__traceback__)[-1:]
    line = error.lineno if isinstance(error, SyntaxError) else where[0].lineno if where else 0
    return f"{type(error).__name__}: {' '.join(str(error).split())} (line {line})"


REFLECTS = re.compile(r"\b(?:wait|alternatively|hold on|another thought|verify|think "
                      r"again|but|however|"
                      r"alternative|double-check|check|oh|hmm)\b", re.I)             # ARLCP's words


def second_looks(task, text):
    """How often a response reflects: a chain's waits, else words of reflection (ARLCP,
    2602.12113)."""
    return task.habits(text)["waits"] if hasattr(task, "habits") else len(REFLECTS.findall(text))


# --- by name --------------------------------------------------------------------------------------

TASKS = dict(signatures=Signatures, arithmetic=Arithmetic, toyif=ToyIF, ring=Ring, gsm8k=Gsm8k,
             toyif_base=partial(ToyIF, "mixture"), toyif_checks=Checks,
             toyif_principles=partial(Checks, 0.3), toyif_obeys=Obeys, parity=Parity,
             **{kind: partial(Chain, kind) for kind in KINDS},
             **{f"{kind}_{x}": partial(Chain, kind, x) for kind in KINDS
                for x in ("wordy", "good")},
             **{f"parity_{style}": partial(ParityJudge, style) for style in JUDGEMENTS})
MADE = TASKS.keys() - {"gsm8k"}  # those that read no file


def held_out(name_or_path):
    """The splits that training never sees, of a task, a file or a corpus: val, and ood where there
    is one."""
    named = {*name_or_path.split("+")} <= MADE
    known = (("val", "ood") if name_or_path == "stdlib" else
             task(name_or_path).splits if named else ("val",))
    return [split for split in ("val", "ood") if split in known]


def task(name_or_path, **options):
    """The task of that name, or of a file; UserError for unknown names, missing files and unknown
    options."""
    if "+" in name_or_path and all(name in TASKS for name in name_or_path.split("+")):
        return Mixed(name_or_path)
    make, path = TASKS.get(name_or_path, Jsonl), [] if name_or_path in TASKS else [name_or_path]
    if path and name_or_path not in NAMED and not Path(name_or_path).suffix:
        hint = nearest(name_or_path, {*TASKS, *NAMED, "stdlib"})
        raise UserError(f"no task {name_or_path!r}{hint}, or a .jsonl file")
    known = list(inspect.signature(make).parameters)[len(path):]    # a file's path is given already
    if unknown := [key for key in options if key not in known]:
        raise UserError(f"task {name_or_path} has no option "
                        f"{unknown[0]!r}{nearest(unknown[0], known)}")
    return make(*path, **options)


def of_run(c):
    """The task of a run's --data, read as it says."""
    return task(c.data, **reading(c))


def is_own(c):
    """Whether a run has a model and a file of the user's, and of --base only an example's."""
    folder = c.init and not c.init.startswith("base:")
    return bool(folder) and c.base.startswith("base:") and c.data not in MADE


def file_readers(c, pairs=False):
    """readers() of the fields that only a file reads; pairs: of pairs, or of labels."""
    named = {*c.data.split("+")} <= MADE | {"stdlib", "rubrics"}
    rows = not named and (pairs or not is_corpus(c.data))
    return dict.fromkeys(("system", "ask"), (rows, "a file of rows as --data")) | dict(
        val=(not named, "a file as --data"),
        answer=(rows and not pairs, "a file of rows with answers as --data"))


def check_data(name, is_text=True, needs="completions", **options):
    """UserError, before anything is made, if the task is unknown, or its file, or a text's, is
    missing or broken. is_text: whether a text without prompts will do. needs: what a file's rows
    must have beside prompts: completions, answers (or completions) to grade by, or nothing."""
    if not is_corpus(name):
        found = task(name, **options)
        if needs == "completions" and not getattr(found, "shown", {"train": True})["train"]:
            raise UserError(f"{name}: the rows to train on have no completion to learn: give one, "
                            f"as in {SCHEMAS}")
        none = [x for x in ("train", "val") if not getattr(found, "rows", {x: True})[x]]
        if needs == "answers" and none:
            raise UserError(f"{name}: no row of {none[0]} can be graded by an answer; give more")
        if needs == "answers" and found.metric == "reward":
            raise UserError(f"{name}: the rows have neither a completion nor an answer to grade "
                            'by: add a column "answer", or give grpo.py --reward PATH.py:FUNCTION')
    elif not is_text:
        raise UserError(f"{name} is a text: this needs prompts and completions, a task or a .jsonl "
                        "of them")
    elif name != "stdlib":
        documents(name, val=options.get("val", ""))


def room(widths, wish, context):
    """New tokens a response beside prompts of these widths: as many as are wished for, or what all
    but one prompt in ten leave of the context if that is less, which is told; UserError for
    none."""
    widths = sorted(widths)
    most = widths[len(widths) - 1 - len(widths) // 10]
    if most >= context:
        raise UserError(f"the prompts take {most} tokens: no room for a response in the context of "
                        f"{context}; shorten them, or take a model that reads more")
    if most + wish > context:
        tell(f"responses get {context - most} tokens, not {wish}: of the context of {context} the "
             f"prompts take up to {most}")
    return min(wish, context - most)


def fitting(c, tok, problems, sets, wish, context):
    """(new tokens a response: --max_new, else room(); the problems whose prompts leave them; the
    {split: problems} too). Longer prompts are left out, aloud; UserError if all are."""
    width, left = {}, {}
    for split, some in ({"": problems} | sets).items():
        width[split] = [len(prompt_ids(tok, p, c.chat)) for p in some]
    new = getattr(c, "max_new", 0) or room(sum(width.values(), []), wish, context)
    for split, some in ({"": problems} | sets).items():
        what, sized = f"{split} prompts".strip(), list(zip(some, width[split]))
        left[split] = [p for p, n in sized if n + new <= context]
        long = [p.get("source", repr(p["prompt"][:40])) for p, n in sized if n + new > context]
        if some and not left[split]:
            raise UserError(f"{what}: the shortest has {min(width[split])} tokens: with {new} new "
                            f"ones it exceeds the context of {context}; lower --max_new")
        if long:
            print(f"left out {len(long)} of {len(some)} {what}, which do not leave {new} tokens "
                  f"of the context of {context} ({places(long)})", flush=True)
    return new, left.pop(""), left


def out_of(problems, task):
    """How many problems, in words, and of how many if a file has more.   "400 of 7000 prompts" """
    there = len(getattr(task, "rows", dict(train=problems))["train"])
    return f"{len(problems)}{f' of {there}' if there > len(problems) else ''} prompts"


def no_signal(task, texts, seen):
    """What is wrong where no response of a rollout earned more than another, with one of them; ""
    where some did. seen: score, truncated [P, G]"""
    score, cut = seen["score"], seen["truncated"].flatten().tolist()
    if score.max() > score.min() or score.min() >= 1:
        return ""
    lost = sum(cut) / len(cut)
    answers = task.metric == "accuracy" and score.max() == 0
    quiet = [not stated(task, text) for text in texts]
    silent = sum(quiet) / len(texts)
    why, shown = ((f"{lost:.0%} ran out of tokens: raise --max_new", cut) if lost >= 0.5 else
                  ("look at what it reads", [True]) if not answers else
                  (f"{silent:.0%} state no answer: say with --ask how to, or read it with "
                   "--answer last", quiet) if silent >= 0.5 else
                  ("all are wrong: take easier prompts, or train with sft.py first",
                   [not x for x in quiet]))
    example = texts[shown.index(True)]
    return (f"  WARNING: every response earned {score.max():g}, so there is nothing to learn from: "
            f"{why}. One of them: {example[-300:]!r}")


# --- rows of ids ----------------------------------------------------------------------------------


def prompt_ids(tok, problem, chat=False):
    """The ids of a problem's prompt; what cannot be encoded is said with its row."""
    with at(problem.get("source") or repr(problem["prompt"][:40])):
        return tok.prompt(problem, chat)


def packed(documents, tok, width):
    """Documents -> windows of `width` tokens of BOS doc EOS BOS doc …, as (first, rest) rows."""
    flat = array("i")  # four bytes a token, and slices that collate reads fast
    for d in documents:
        with at(f"the document {d[:40]!r}"):
            flat.extend([*tok.prompt(""), *tok.encode(d), tok.eos])
    return [(flat[i:i + 1], flat[i + 1:i + width]) for i in range(0, len(flat) - 1, width)]


def demonstration(task, problem, tok, chat=False, turns="all"):
    """(prompt ids, completion ids) of a problem; with chat of the whole conversation, all turns of
    the assistant or the "last" trained."""
    with at(problem.get("source") or repr(problem["prompt"][:40])):
        answer = task.demo(problem)
        if not chat:
            return tok.prompt(problem), tok.answer(answer)
        return tok.dialogue([*tok.messages(problem), dict(role="assistant", content=answer)], turns)


def demonstrations(task, problems, tok, width, chat=False, turns="all"):
    """Problems -> (prompt ids, completion ids + EOS) rows that fit `width`; longer ones are left
    out, aloud, by their lines in the file."""
    found = [demonstration(task, p, tok, chat, turns) for p in problems]
    long = [p.get("source", f"row {i}") for i, (p, (x, y)) in enumerate(zip(problems, found), 1)
            if len(x) + len(y) > width]
    if long:
        print(f"{task.name}: {len(long)} of {len(problems)} rows are longer than --context {width} "
              f"and left out ({places(long)})", flush=True)
    return [(x, y) for x, y in found if len(x) + len(y) <= width]


def rows(c, tok, split, turns="all"):
    """The data set of a split as (prompt ids, completion ids) rows; the loss falls on the
    completions."""
    if is_corpus(c.data):
        return packed(documents(c.data, split, c.val), tok, c.context)
    found = of_run(c)
    lessons = getattr(found, "lessons", found.problems)     # a file's rows that have a completion
    problems = lessons(split, c.rows if split == "train" else 256, c.seed)
    fits = demonstrations(found, problems, tok, c.context, c.chat, turns)
    if split == "train" and not fits:
        raise UserError(f"{c.data}: no row fits --context {c.context}, prompt and completion "
                        "together; raise it")
    return fits
