"""
chains.py - the arena of grpo.py: five small tasks solved step by step, and demonstrations of mixed
quality.

    chain      9-1+2+3?               -1=8+2=0+3=3####3            a running digit, modulo 10
    sort       s52918?                >1>2>5>8>9####12589          the smallest of what is left
    graph      g2>1,1>3,3>2:1,2?      1>33>2####2                  so many hops from a node
    add        a78,21?                780=15211=04####45           27+18, a column at a time, units
    first
    countdown  c4,7,3>25?             4+7=11,11-3=8w4*7=28,28-3=25####4*7-3      search; w after
    what failed

A problem is {"prompt", "answer", "seed"}; a response is cells, each a lead and a value, then ####
and an answer. A kind is a few functions of the prompt; its solver is a generator that yields (lead,
right value, values that a slip may write) and is sent the value that was written (None: the cell
was left out), so that errors carry on.
"""
import random
import re
from functools import partial
from typing import Callable, NamedTuple

from data.run import UserError, nearest
from data.text import check_split, digest
from data.tokenizer import char_tokenizer

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


# --- the five -------------------------------------------------------------------------------------

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


# --- the task -------------------------------------------------------------------------------------


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
