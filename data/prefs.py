"""
prefs.py - preferences: a small world whose gold reward only the experimenter knows, and files of real pairs.

    world = ToyIF()                              # instructions such as "<Fc#4=" with a programmatic judge
    world.judge("<Fc#4=", "cddh")                # {"hard": 1.0, "principle": 1.0, "gold": 1.5}
    ToyIF("mixture").problems("train", 30_000)   # the base corpus: its demo() is good, random or copying
    world.pairs(4_000, seed=0, noise=0.1)        # two sampled behaviours, the higher gold reward is preferred
    load_pairs("pairs.jsonl")                    # real pairs, {"prompt", "chosen", "rejected"}

A prompt is one domain, then rules (head, argument), then "=". One character is one token:
    rules    F first symbol   L last symbol   H has symbol   N has not symbol   # length 2..6
    domain   < non-decreasing   > non-increasing   * distinct     (implied: no rule says what a domain wants)
"<Fc#4=" reads: begin with c, four symbols, and (unsaid) in non-decreasing order.
"""
import random
from collections import Counter
from itertools import pairwise

from data.run import UserError, nearest
from data.text import digest, locate, read_jsonl, split_rows
from data.tokenizer import char_tokenizer

# --- the alphabet: 64 ids with <|pad|>, <|bos|>, <|eos|> ------------------------------------------------

CONTENT = "abcdefghijkl"                                       # s0 .. s11, in the order that < and > mean
FIRST, LAST, HAS, NO, LEN = HEADS = "FLHN#"
UP, DOWN, DISTINCT = DOMAINS = "<>*"
SEP = "="
NUMBERS = "1234567890"                                         # 1 .. 10
JUDGE = dict(A="A", B="B", THINK="?", ANS="!", YES="+", NO_="-", PRIN="P", WIN_A="(", WIN_B=")", TIE="~")
SCORES = dict(zip(range(-3, 4), "tuvwxyz"))                    # a judge's verdict, -3 .. 3
FILLER = "mnopqrs.,;:_/"                                       # never written: they only fill the table to 64
ALPHABET = CONTENT + HEADS + DOMAINS + SEP + NUMBERS + "".join([*JUDGE.values(), *SCORES.values()]) + FILLER


def tokenizer():
    """The world's Tokenizer: 3 special ids and one for each of the 61 characters of ALPHABET."""
    return char_tokenizer(ALPHABET)


# --- the gold reward ----------------------------------------------------------------------------------

def parse(prompt):
    """("<", [("F", "c"), ("#", 4)]) of "<Fc#4="; UserError for what is no prompt of this world."""
    domain, body = prompt[:1], prompt[1:-1]
    rules = [(head, NUMBERS.find(a) + 1 if head == LEN else a) for head, a in zip(body[::2], body[1::2])]
    sound = all(head in HEADS and (a > 0 if head == LEN else a in CONTENT) for head, a in rules)
    if not (rules and sound and domain in DOMAINS and len(body) % 2 == 0 and prompt.endswith(SEP)):
        raise UserError(f"{prompt!r} is no ToyIF prompt: write one of {DOMAINS}, rules like Fc or #4, then =")
    return domain, rules


def satisfied(rule, y):
    """Whether the response y obeys one rule; the empty response obeys none, not even "has not"."""
    head, a = rule
    obeys = {FIRST: y[:1] == a, LAST: y[-1:] == a, HAS: a in set(y), NO: a not in set(y), LEN: len(y) == a}
    return bool(y) and obeys[head]


def principle(domain, y):
    """P in [0, 1]: the share of neighbours in the domain's order, or of distinct symbols; 0 if |y| < 2."""
    if len(y) < 2:
        return 0.0
    if domain == DISTINCT:
        return len(set(y)) / len(y)
    return sum(a <= b if domain == UP else a >= b for a, b in pairwise(y)) / (len(y) - 1)


# --- behaviours: a prompt's responses, drawn by rng ---------------------------------------------------

def good(prompt, rng):
    """A response that obeys every rule (any three can be obeyed together) and leans towards the principle.

    FIRST and LAST take the ends, HAS a place between; the rest is drawn without NO's symbol. What is
    between is put in the domain's order. A demanded end can break it, so the mean gold stays below 1.5.
    """
    domain, rules = parse(prompt)
    want = dict(rules)
    fixed = [want[head] for head in (FIRST, LAST, HAS) if head in want]
    n = want.get(LEN) or rng.randint(max(2, len(fixed)), 6)
    free = [s for s in CONTENT if s != want.get(NO) and not (domain == DISTINCT and s in fixed)]
    middle = rng.sample(free, n - len(fixed)) if domain == DISTINCT else rng.choices(free, k=n - len(fixed))
    middle += [want[HAS]] if HAS in want else []
    rng.shuffle(middle)
    if domain != DISTINCT:
        middle.sort(reverse=domain == DOWN)
    return want.get(FIRST, "") + "".join(middle) + want.get(LAST, "")


def rand(prompt, rng):
    """2 to 6 uniform symbols, whatever the prompt says."""
    return "".join(rng.choices(CONTENT, k=rng.randint(2, 6)))


def copy(prompt, rng):
    """2 to 6 draws from the prompt's symbols; uniform ones where it names none (a length rule alone)."""
    symbols = [a for _, a in parse(prompt)[1] if not isinstance(a, int)]
    return "".join(rng.choices(symbols or CONTENT, k=rng.randint(2, 6)))


BEHAVIOURS = dict(good=good, rand=rand, copy=copy)
MIXTURE = dict(good=0.3, rand=0.4, copy=0.3)                   # the base model's corpus


# --- the world ----------------------------------------------------------------------------------------

class ToyIF:
    """Instruction following in miniature: explicit hard rules, an implicit principle, gold in [0, 1.5].

    Splits: train and val have one or two rules, never HAS with NO, and share no prompt, whatever the order of
    its rules; ood is half three rules, half the pair HAS and NO; base has one or two rules, any pair.
    """
    name, metric, max_new = "toyif", "gold", 12
    splits = ("train", "val", "ood", "base")

    def __init__(self, style="good"):
        """style: whose responses demo() gives, one of BEHAVIOURS, or mixture: the base model's corpus, for
        which train and val too may have any pair of rules."""
        if style not in (*BEHAVIOURS, "mixture"):
            raise UserError(f"toyif has no style {style!r}{nearest(style, [*BEHAVIOURS, 'mixture'])}")
        self.style = style

    def sample(self, rng, split="train"):
        """A problem {"prompt", "seed"} drawn by rng (random.Random); the seed fixes its demonstrations."""
        if split not in self.splits:
            raise UserError(f"toyif has no split {split!r}{nearest(split, self.splits)}")
        held = split == "ood" and rng.random() < 0.5          # the held-out pair, else three rules
        while True:
            k = 2 if held else 3 if split == "ood" else rng.randint(1, 2)
            heads = rng.sample([HAS, NO] if held else HEADS, k)
            symbols = iter(rng.sample(CONTENT, k))             # distinct arguments
            rules = [h + (str(rng.randint(2, 6)) if h == LEN else next(symbols)) for h in heads]
            domain = rng.choice(DOMAINS)
            problem = dict(prompt=domain + "".join(rules) + SEP, seed=rng.getrandbits(32))
            val = int(digest(domain + "".join(sorted(rules)))[:8], 16) % 8 == 0       # one prompt in eight
            if split in ("ood", "base") or (not {HAS, NO} <= set(heads) and val == (split == "val")):
                return problem

    def problems(self, split, n=0, seed=0):
        """n fresh problems; the first n of a longer list with the same seed are the same."""
        if n < 1:
            raise UserError("toyif makes its problems: say how many (n >= 1)")
        rng = random.Random(f"toyif/{split}/{seed}")
        any_pair = self.style == "mixture" and split in ("train", "val")
        return [self.sample(rng, "base" if any_pair else split) for _ in range(n)]

    def demo(self, problem, style=""):
        """The problem's response under a behaviour (default: the task's own style); its seed fixes it."""
        style = style or self.style
        if style == "mixture":
            style, = random.Random(f"mixture/{problem['seed']}").choices(list(MIXTURE), MIXTURE.values())
        if style not in BEHAVIOURS:
            raise UserError(f"toyif has no behaviour {style!r}{nearest(style, BEHAVIOURS)}")
        return BEHAVIOURS[style](problem["prompt"], random.Random(f"{style}/{problem['seed']}"))

    def judge(self, prompt, response, finished=True):
        """{"hard": H, "principle": P, "gold": g}.   g = H + P/2,  H the share of rules obeyed, P in [0, 1]

        A response without EOS has g = 0, and so has one with a token that is no content symbol (H = P = 0).
        """
        domain, rules = parse(prompt)
        y = response if set(response) <= set(CONTENT) else ""
        hard, implied = sum(satisfied(rule, y) for rule in rules) / len(rules), principle(domain, y)
        return dict(hard=hard, principle=implied, gold=(hard + 0.5 * implied) * bool(finished))

    def reward(self, problem, completion, finished=True):
        """The gold reward of a completion, in [0, 1.5]."""
        return self.judge(problem["prompt"], completion, finished)["gold"]

    def pairs(self, n, seed=0, split="train", noise=0.0):
        """n rows {"prompt", "chosen", "rejected", "margin"}: of two draws from MIXTURE the better is chosen.

        Better is higher gold; ties are drawn again. With probability `noise` the label is flipped: margin,
        the gold of chosen minus that of rejected, is negative.
        """
        rng, rows = random.Random(f"toyif/pairs/{split}/{seed}"), []
        while len(rows) < n:
            prompt = self.sample(rng, split)["prompt"]
            a, b = (BEHAVIOURS[s](prompt, rng) for s in rng.choices(list(MIXTURE), MIXTURE.values(), k=2))
            margin, flip = self.judge(prompt, a)["gold"] - self.judge(prompt, b)["gold"], rng.random() < noise
            if margin:
                a, b, margin = (a, b, margin) if (margin > 0) != flip else (b, a, -margin)
                rows.append(dict(prompt=prompt, chosen=a, rejected=b, margin=margin))
        return rows


# --- files of pairs -----------------------------------------------------------------------------------

def row_pairs(row):
    """[{"prompt", "chosen", "rejected"}] of one row, or None if its schema is another.

    A row of GSM8K's model solutions ("question", "ground_truth", then {"is_correct", "solution"} a model,
    openai/grade-school-math) gives every correct solution against every wrong one.
    """
    match row:
        case {"prompt": str(prompt), "chosen": str(chosen), "rejected": str(rejected)}:
            return [dict(prompt=prompt, chosen=chosen, rejected=rejected)]
        case {"question": str(prompt), "ground_truth": str(), **models} if all(
                isinstance(m, dict) and isinstance(m.get("solution"), str) for m in models.values()):
            right = [m["solution"] for m in models.values() if m.get("is_correct") is True]
            wrong = [m["solution"] for m in models.values() if m.get("is_correct") is False]
            return [dict(prompt=prompt, chosen=a, rejected=b) for a in right for b in wrong]


def load_pairs(path, split="train"):
    """([{"prompt", "chosen", "rejected"}], Counter of the dropped): one split, by prompt, of a JSONL file.

    Dropped, and counted over all splits: pairs with an "empty" response, "equal" ones, and "repeated" pairs.
    UserError "path:line: …" for another schema.
    """
    path, rows, seen, dropped = locate(path), [], set(), Counter()
    for i, row in enumerate(read_jsonl(path), 1):
        if (found := row_pairs(row)) is None:
            raise UserError(f'{path}:{i}: no pair: give {{"prompt", "chosen", "rejected"}} as strings')
        for pair in found:
            _, chosen, rejected = key = tuple(pair.values())
            why = ("empty" if not (chosen.strip() and rejected.strip()) else "equal" if chosen == rejected
                   else "repeated" if key in seen else "")
            dropped.update([why] if why else [])
            rows += [] if why else [pair]
            seen.add(key)
    return split_rows(rows, split), dropped
