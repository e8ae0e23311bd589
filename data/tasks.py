"""
tasks.py - verifiable tasks, all with one interface.

    task("arithmetic", level=3)   task("signatures")   task("toyif")   task("gsm8k")   task("my.jsonl")

    name, metric, max_new                 what the reward is called; tokens that a response may need
    problems(split, n, seed)              n dicts with a "prompt", the first n of any longer list; from files:
                                          shuffled by seed, n = 0 for all, never more than there are
    sample(rng, split)                    one problem, drawn by rng (random.Random)
    demo(problem, style)                  a worked response
    reward(problem, completion, finished) a float; finished: the response ended by itself, with EOS

Answers are written "#### 42", as GSM8K writes them, so that one verifier serves all. A completion is only
read: nothing in it is evaluated, and reading takes time linear in its length.
"""
import inspect
import random
import re
from fractions import Fraction
from functools import partial
from pathlib import Path

from data.prefs import ToyIF
from data.run import UserError, nearest
from data.text import (NAMED, check_split, digest, examples, is_corpus, locate, read_jsonl, rouge_l,
                       signatures, split_rows)

# --- the verifier -------------------------------------------------------------------------------------

NUMBER = r"(?:(?<![\w.)])[-+])?(?:\d[\d,]*(?:\.\d+)?|\.\d+)(?:/\d+|e[-+]?\d+)?"     # 5-3 has no sign
STATED = re.compile(rf"####[ *]{{0,8}}({NUMBER})", re.I)                 # {0,8}: linear in time
MARKS = str.maketrans({"−": "-", "%": " ", "$": "", "€": "", "£": "", "\\": ""})


def boxed(text):
    r"""The inside of the last \boxed{…}, braces balanced, a fraction as a/b; "" if there is none."""
    start, depth = text.rfind("\\boxed{"), 0
    for i in range(start + 6, len(text) if start >= 0 else 0):
        depth += (text[i] == "{") - (text[i] == "}")
        if depth == 0:
            return re.sub(r"\\[dt]?frac\{(\d{1,60})\}\{(\d{1,60})\}", r"\1/\2", text[start + 7:i]).strip()
    return ""


def extract_answer(text, last=False):
    r"""The answer that a response states: the number right after the first "####" that has one, else inside
    \boxed{…}, else, if last, the last number; else "".   "… #### -$1,234.50." -> "-1,234.50" """
    plain = text.translate(MARKS)
    stated = STATED.search(plain)
    found = stated[1] if stated else boxed(text)
    for hit in re.finditer(NUMBER, plain, re.I) if last and not found else ():
        found = hit[0]
    return found.rstrip(",")


def value(answer):
    """The exact Fraction that an answer writes, None if it is not one number.   "1,234.50" -> 2469/2"""
    text = answer.translate(MARKS).strip().rstrip(".")
    if re.fullmatch(r"[-+]?\d{1,3}(,\d{3})+(\.\d+)?", text):             # thousands; "1,5" is no number
        text = text.replace(",", "")
    try:                                                                 # 1e9999999 would fill memory
        return Fraction(text) if len(text) <= 60 and not re.search(r"e[-+]?\d{3}|_", text, re.I) else None
    except (ValueError, ZeroDivisionError):
        return None


def same_answer(a, b):
    """Whether two answers are one number exactly (1/2 is 0.50, 1/3 is not 0.33), or else one text."""
    x, y = value(a), value(b)
    return x == y if x is not None and y is not None else bool(a.strip()) and a.split() == b.split()


# --- finite data: real pairs --------------------------------------------------------------------------

class Signatures:
    """A Python signature -> the first sentence of its docstring, from the standard library (data/text.py)."""
    name, metric, max_new, splits = "signatures", "rouge_l", 48, ("train", "val", "ood")

    def __init__(self):
        self.rows = {split: signatures(split) for split in ("train", "val", "ood")}

    def problems(self, split, n=0, seed=0):
        check_split(split, self.rows)
        return random.Random(f"problems/{seed}").sample(self.rows[split], len(self.rows[split]))[:n or None]

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
    """Any file of prompts and completions (text.SCHEMAS), GSM8K by default; val is one prompt in sixteen.

    Where every completion states its answer after ####, reward is 1.0 for the same answer, 0.0 for another
    and for an unfinished response; else it is ROUGE-L. strip removes GSM8K's annotations <<48/2=24>> from the
    demonstrations; last reads the last number of a response that states no answer.
    """
    splits = ("train", "val")

    def __init__(self, path="gsm8k", strip=True, last=False, max_new=320):
        self.name, self.last, self.max_new, file = Path(path).stem, last, max_new, locate(path)
        rows = examples(read_jsonl(file), file)
        for row in rows:
            if "messages" in row:                                        # chat templates belong to models
                turns = [f"{turn['role']}: {turn['content']}" for turn in row["messages"]]
                row["prompt"] = "\n".join([*turns, "assistant: "])
            if strip:
                row["completion"] = re.sub(r"<<[^<>]*>>", "", row["completion"])
        self.rows = {split: split_rows(rows, split) for split in self.splits}
        if not self.rows["train"]:
            raise UserError(f"{file}: one prompt cannot be split into train and val: add a second")
        self.metric = "accuracy" if all("####" in row["completion"] for row in rows) else "rouge_l"

    problems, sample, demo = Signatures.problems, Signatures.sample, Signatures.demo     # all read self.rows

    def reward(self, problem, completion, finished=True):
        """Exact answers or ROUGE-L, as the class says."""
        truth = problem["completion"]
        if self.metric == "rouge_l":
            return rouge_l(truth, completion)
        return float(finished and same_answer(extract_answer(completion, self.last), extract_answer(truth)))


Gsm8k = Jsonl                    # with its default path; a copy of the file is Gsm8k("path/to/train.jsonl")


# --- arithmetic ---------------------------------------------------------------------------------------

# level: digits, operands, first operators, bytes of the longest short response
LEVELS = {1: (1, 2, "+-", 50), 2: (2, 2, "+-", 75), 3: (3, 2, "+-*", 100),
          4: (3, 3, "+-*", 150), 5: (4, 4, "+-*", 240)}


def columns(a, op, b):
    """[(left, right, carry, result)] of one column-wise step, units first.   a op b >= 0; * takes a digit.

    The result of + and * is two digits, carry and digit; - writes a borrowed ten into the left number:
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
    """One line a column, in words: four times as long as short, for what studies the length of thoughts."""
    lines = []
    for n, (a, op, b) in enumerate(steps, 1):
        lines.append(f"Step {n}: {a}{op}{b}")
        for i, (text, (x, _, _, r)) in enumerate(zip(equations(a, op, b), columns(a, op, b)), 1):
            after = f"borrow {x[0]}" if op == "-" else f"carry {r[0]}"
            lines.append(f"column {i}: {text}, write {r[-1]}, {after}")
        lines.append(f"so {a}{op}{b}={apply(a, op, b)}")
    return "\n".join([*lines, f"The answer is {apply(*steps[-1])}.\n"])


STYLES = dict(direct=lambda steps: "", short=short, verbose=verbose)
BUDGET = dict(direct=0.2, short=1.0, verbose=4.2)              # the longest response, that of short being 1


class Arithmetic:
    """Sums such as "347*6-58=?" with a column-wise chain of thought, each digit spelled, for small models.

    level 1..5 sets digits and operands (LEVELS). Sums are read from left to right: a product, by one digit,
    only comes first, and no partial result is negative. train and val share no problem (val is 1/8, by hash);
    ood has one digit more in its first number, or one operand more. style is what demo calls "good".
    """
    name, metric, splits = "arithmetic", "accuracy", ("train", "val", "ood")

    def __init__(self, level=2, style="short"):
        if level not in LEVELS or style not in STYLES:
            raise UserError(f"arithmetic has no level {level!r} with style {style!r}: choose a level of "
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
            total, *rest = (rng.randrange(10**(size - 1) if size > 1 else 0, 10**size) for size in sizes)
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


# --- by name ------------------------------------------------------------------------------------------

TASKS = dict(signatures=Signatures, arithmetic=Arithmetic, toyif=ToyIF, gsm8k=Gsm8k,
             toyif_base=partial(ToyIF, "mixture"))


def held_out(name_or_path):
    """The splits that training never sees, of a task, a file or a corpus: val, and ood where there is one."""
    known = (("val", "ood") if name_or_path == "stdlib" else ("val",) if is_corpus(name_or_path)
             else task(name_or_path).splits)
    return [split for split in ("val", "ood") if split in known]


def task(name_or_path, **options):
    """The task of that name, or of a file; UserError for unknown names, missing files and unknown options."""
    make, path = TASKS.get(name_or_path, Jsonl), [] if name_or_path in TASKS else [name_or_path]
    if path and name_or_path not in NAMED and not Path(name_or_path).suffix:
        raise UserError(f"no task {name_or_path!r}{nearest(name_or_path, {*TASKS, *NAMED, 'stdlib'})}, "
                        "or a .jsonl file")
    known = list(inspect.signature(make).parameters)[len(path):]         # a file's path is given already
    if unknown := [key for key in options if key not in known]:
        raise UserError(f"task {name_or_path} has no option {unknown[0]!r}{nearest(unknown[0], known)}")
    return make(*path, **options)
