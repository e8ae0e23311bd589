"""
prefs.py - preferences: small worlds whose gold reward only the experimenter knows, and files of
real pairs.

    world = ToyIF()                              # instructions such as "<Fc#4=" with a programmatic
    judge
    world.judge("<Fc#4=", "cddh")                # {"hard": 1.0, "principle": 1.0, "gold": 1.5}
    ToyIF("mixture").problems("train", 30_000)   # the base corpus: its demo() is good, random or
    copying
    world.pairs(4_000, seed=0, noise=0.1)        # two sampled behaviours, the higher gold reward is
    preferred
    Ring(group="A").judge(".abef=", "abef")      # a second world, whose gold is full of traps for a
    proxy label_pairs(world, triples, length_bias=0.1) # labels, with their faults, for pairs
    sampled from a policy
    StrongJudge(world).judge(prompt, a, b)       # 1, 2 or 0: dear, and right nine times in ten
    load_pairs("pairs.jsonl")                    # real pairs, {"prompt", "chosen", "rejected"}

Map      1 ToyIF   2 Ring   3 labels and judges   4 rubrics   5 files of pairs

A prompt of ToyIF is one domain, then rules (head, argument), then "=". One character is one token:
    rules    F first symbol   L last symbol   H has symbol   N has not symbol   # length 2..6
    domain   < non-decreasing   > non-increasing   * distinct     (implied: no rule says what a
    domain wants)
"<Fc#4=" reads: begin with c, four symbols, and (unsaid) in non-decreasing order.

A prompt of Ring is a flag, four keywords, "=" (".abef="); a response walks along a ring of letters,
a .. x.
"""
import random
import statistics
from bisect import bisect_left, bisect_right
from collections import Counter
from functools import cached_property
from itertools import islice, pairwise
from math import inf, tanh
from pathlib import Path

from data.run import UserError, nearest
from data.text import (answered, at, digest, framed, locate, pair_of, places, read_rows,
                       split_rows, tell)
from data.tokenizer import char_tokenizer


def one_of(word, known, what):
    """UserError "<what> 'word'; did you mean …" if `known` does not hold the word."""
    if word not in known:
        raise UserError(f"{what} {word!r}{nearest(word, known)}")


# --- 1 ToyIF's alphabet: 64 ids with <|pad|>, <|bos|>, <|eos|> ------------------------------------

CONTENT = "abcdefghijkl"  # s0 .. s11, in the order that < and > mean
FIRST, LAST, HAS, NO, LEN = HEADS = "FLHN#"
UP, DOWN, DISTINCT = DOMAINS = "<>*"
SEP = "="
NUMBERS = "1234567890"                                         # 1 .. 10
JUDGE = dict(A="A", B="B", THINK="?", ANS="!", YES="+", NO_="-", PRIN="P", WIN_A="(", WIN_B=")",
             TIE="~")
SCORES = dict(zip(range(-3, 4), "tuvwxyz"))                    # a judge's verdict, -3 .. 3
FILLER = "mnopqrs.,;:_/"  # fills the table to 64; rubrics write m n o /
VERDICTS = "".join([*JUDGE.values(), *SCORES.values()])
ALPHABET = CONTENT + HEADS + DOMAINS + SEP + NUMBERS + VERDICTS + FILLER


def tokenizer():
    """The world's Tokenizer: 3 special ids and one for each of the 61 characters of ALPHABET."""
    return char_tokenizer(ALPHABET)


# --- the gold reward ------------------------------------------------------------------------------

def parse(prompt):
    """("<", [("F", "c"), ("#", 4)]) of "<Fc#4="; UserError for what is no prompt of this world."""
    domain, body = prompt[:1], prompt[1:-1]
    rules = [(head, NUMBERS.find(a) + 1 if head == LEN else a)
             for head, a in zip(body[::2], body[1::2])]
    sound = all(head in HEADS and (a > 0 if head == LEN else a in CONTENT) for head, a in rules)
    if not (rules and sound and domain in DOMAINS and len(body) % 2 == 0 and prompt.endswith(SEP)):
        raise UserError(f"{prompt!r} is no ToyIF prompt: write one of {DOMAINS}, rules like Fc or "
                        "#4, then =")
    return domain, rules


def satisfied(rule, y):
    """Whether the response y obeys one rule; the empty response obeys none, not even "has not"."""
    head, a = rule
    obeys = {FIRST: y[:1] == a, LAST: y[-1:] == a, HAS: a in set(y), NO: a not in set(y),
             LEN: len(y) == a}
    return bool(y) and obeys[head]


def principle(domain, y):
    """P in [0, 1]: the share of neighbours in the domain's order, or of distinct symbols; 0 if |y|
    < 2."""
    if len(y) < 2:
        return 0.0
    if domain == DISTINCT:
        return len(set(y)) / len(y)
    return sum(a <= b if domain == UP else a >= b for a, b in pairwise(y)) / (len(y) - 1)


# --- behaviours: a prompt's responses, drawn by rng -----------------------------------------------

def good(prompt, rng):
    """A response that obeys every rule (any three can be obeyed together) and leans towards the
    principle.

    FIRST and LAST take the ends, HAS a place between; the rest is drawn without NO's symbol. What
    is between is put in the domain's order. A demanded end can break it, so the mean gold stays
    below 1.5.
    """
    domain, rules = parse(prompt)
    want = dict(rules)
    fixed = [want[head] for head in (FIRST, LAST, HAS) if head in want]
    n = want.get(LEN) or rng.randint(max(2, len(fixed)), 6)
    free = [s for s in CONTENT if s != want.get(NO) and not (domain == DISTINCT and s in fixed)]
    middle = rng.sample(free, n
                        - len(fixed)) if domain == DISTINCT else rng.choices(free, k=n - len(fixed))
    middle += [want[HAS]] if HAS in want else []
    rng.shuffle(middle)
    if domain != DISTINCT:
        middle.sort(reverse=domain == DOWN)
    return want.get(FIRST, "") + "".join(middle) + want.get(LAST, "")


def rand(prompt, rng):
    """2 to 6 uniform symbols, whatever the prompt says."""
    return "".join(rng.choices(CONTENT, k=rng.randint(2, 6)))


def copy(prompt, rng):
    """2 to 6 draws from the prompt's symbols; uniform ones where it names none (a length rule
    alone)."""
    symbols = [a for _, a in parse(prompt)[1] if not isinstance(a, int)]
    return "".join(rng.choices(symbols or CONTENT, k=rng.randint(2, 6)))


def edited(prompt, rng):
    """good() with one or two random edits: a symbol substituted, inserted or deleted; 1 to 8
    symbols."""
    y = good(prompt, rng)
    for _ in range(rng.randint(1, 2)):
        i = rng.randrange(len(y))
        kind = rng.choice(["put", "add", "cut"] if len(y) > 1 else ["put", "add"])
        if kind == "add":
            i = rng.randint(0, len(y))  # before, between or behind the symbols
        others = [symbol for symbol in CONTENT if kind == "add" or symbol != y[i]]
        new = "" if kind == "cut" else rng.choice(others)
        y = y[:i] + new + y[i + (kind != "add"):]
    return y


BEHAVIOURS = dict(good=good, rand=rand, copy=copy, edited=edited)
MIXTURE = dict(good=0.3, rand=0.4, copy=0.3)                   # the base model's corpus
ROUTING = dict(good=0.3, edited=0.4, rand=0.3)  # close calls, for routing (2510.20369), ours


# --- the world ------------------------------------------------------------------------------------

class ToyIF:
    """Instruction following in miniature: explicit hard rules, an implicit principle, gold in [0,
    1.5].

    Splits: train and val have one or two rules, never HAS with NO, and share no prompt, whatever
    the order of its rules; ood is half three rules, half the pair HAS and NO; base has one or two
    rules, any pair.
    """
    name, metric, max_new = "toyif", "gold", 12
    splits = ("train", "val", "ood", "base")

    def __init__(self, style="good"):
        """style: whose responses demo() gives, one of BEHAVIOURS, or mixture: the base model's
        corpus, for which train and val too may have any pair of rules."""
        one_of(style, [*BEHAVIOURS, "mixture"], "toyif has no style")
        self.style = style

    def sample(self, rng, split="train", heads=HEADS, rules=(1, 2)):
        """A problem {"prompt", "seed"} drawn by rng (random.Random); the seed fixes its
        demonstrations.

        heads: those that its rules may have;  rules: the numbers of rules, 1 to 3, that it may
        have; ood has its own. UserError for a choice that no prompt of the split fits.
        """
        one_of(split, self.splits, "toyif has no split")
        if (heads, rules) != (HEADS, (1, 2)):                  # the rest would be drawn for ever
            one_of(split, ("train", "val", "base"), "toyif takes no heads and rules for the split")
            most = len(heads) - (split != "base" and {HAS, NO} <= set(heads))
            known = set(rules) <= {1, 2,
                                   3} and set(heads) <= set(HEADS) and len(set(heads)) == len(heads)
            if not known or all(k > most for k in rules):
                raise UserError(f"no {split} prompt has {rules} rules of the heads {heads!r}: "
                                "choose heads "
                                f"of {HEADS}, no more rules than heads, and split base for {HAS} "
                                f"with {NO}")
        held = split == "ood" and rng.random() < 0.5           # the held-out pair, else three rules
        while True:
            few = [k for k in rules if k <= len(heads)]
            k = 2 if held else 3 if split == "ood" else rng.choice(few)
            chosen = rng.sample([HAS, NO] if held else heads, k)
            symbols = iter(rng.sample(CONTENT, k))             # distinct arguments
            body = [h + (str(rng.randint(2, 6)) if h == LEN else next(symbols)) for h in chosen]
            domain = rng.choice(DOMAINS)
            problem = dict(prompt=domain + "".join(body) + SEP, seed=rng.getrandbits(32))
            val = int(digest(domain + "".join(sorted(body)))[:8],
                      16) % 8 == 0                                             # one prompt in eight
            both = {HAS, NO} <= set(chosen)
            if split in ("ood", "base") or (not both and val == (split == "val")):
                return problem

    def problems(self, split, n=0, seed=0):
        """n fresh problems; the first n of a longer list with the same seed are the same."""
        if n < 1:
            raise UserError("toyif makes its problems: say how many (n >= 1)")
        rng = random.Random(f"toyif/{split}/{seed}")
        any_pair = self.style == "mixture" and split in ("train", "val")
        return [self.sample(rng, "base" if any_pair else split) for _ in range(n)]

    def demo(self, problem, style=""):
        """The problem's response under a behaviour (default: the task's own style); its seed fixes
        it."""
        style = style or self.style
        if style == "mixture":
            rng = random.Random(f"mixture/{problem['seed']}")
            style, = rng.choices(list(MIXTURE), MIXTURE.values())
        one_of(style, BEHAVIOURS, "toyif has no behaviour")
        return BEHAVIOURS[style](problem["prompt"], random.Random(f"{style}/{problem['seed']}"))

    def draw(self, prompt, rng, mixture=MIXTURE):
        """A response of one behaviour of the mixture {name: weight}, both drawn by rng."""
        style, = rng.choices(list(mixture), mixture.values())
        one_of(style, BEHAVIOURS, "toyif has no behaviour")
        return BEHAVIOURS[style](prompt, rng)

    def judge(self, prompt, response, finished=True):
        """{"hard": H, "principle": P, "gold": g}.   g = H + P/2,  H the share of rules obeyed, P in
        [0, 1]

        A response without EOS has g = 0, and so has one with a token that is no content symbol (H =
        P = 0).
        """
        domain, rules = parse(prompt)
        y = response if set(response) <= set(CONTENT) else ""
        hard, implied = sum(satisfied(rule, y) for rule in rules) / len(rules), principle(domain, y)
        return dict(hard=hard, principle=implied, gold=(hard + 0.5 * implied) * bool(finished))

    def reward(self, problem, completion, finished=True):
        """The gold reward of a completion, in [0, 1.5]."""
        return self.judge(problem["prompt"], completion, finished)["gold"]

    def pairs(self, n, seed=0, split="train", noise=0.0, mixture=MIXTURE, heads=HEADS, rules=(1, 2),
              **labels):
        """n rows of label_pairs (which takes the **labels): two draws from the mixture, the better
        is chosen.

        heads and rules restrict the prompts as in sample(). The first n of a longer list are the
        same.
        """
        rng = random.Random(f"toyif/pairs/{split}/{seed}")
        prompts = (self.sample(rng, split, heads, rules)["prompt"] for _ in range(200 * n + 1000))
        triples = ((p, self.draw(p, rng, mixture), self.draw(p, rng, mixture), True, True)
                   for p in prompts)
        return enough(n, labelled(self, triples, seed, noise, **labels))

    @cached_property
    def terciles(self):
        """The two |gold gaps| that part strengths 1, 2 and 3: see terciles()."""
        return terciles(self)


# --- 2 Ring ---------------------------------------------------------------------------------------

CIRCLE, RARE = "abcdefghijklmnopqrstuvwx", "ABCDEFGH"  # c_0 .. c_23, of class i mod 4; rare tokens
FLAT, NEU, UNS, REF = "+", ".", "!", "-"  # flattery; neutral, unsafe prompt; refusal
STEPS = (1, 2, 3, 5, 8)                                        # grammar: legal steps along the ring
GROUPS = dict(  # three groups of annotators and what they want
    A=dict(cov=1.5, gram=0.5, rep=1.0, c=(0.7, 0.4, -0.2, -0.5), cap=(4, 3, inf, inf), flat=0.6,
           longest=14),
    B=dict(cov=1.0, gram=0.5, rep=1.0, c=(0.3, -0.2, 0.3, -0.3), cap=(3, inf, 3, inf), flat=-0.5,
           longest=7),
    C=dict(cov=0.5, gram=0.2, rep=0.5, c=(0.1, 0.8, 0.1, -0.1), cap=(4, 5, inf, inf), flat=0.8,
           longest=16))
ATTRIBUTES = ("coverage", "grammar", "originality", "style", "length")


def ring_tokenizer():
    """Ring's Tokenizer: 40 ids, 3 special and one for each of its 37 characters."""
    return char_tokenizer(SEP + FLAT + NEU + UNS + REF + CIRCLE + RARE)


def parse_ring(prompt):
    """(".", "abef") of ".abef="; UserError for what is no prompt of this world."""
    flag, keys = prompt[:1], prompt[1:-1]
    sound = len(keys) == len(set(keys)) == 4 and set(keys) <= set(CIRCLE)
    if not (sound and flag and flag in NEU + UNS and prompt.endswith(SEP)):
        raise UserError(f"{prompt!r} is no Ring prompt: write {NEU} or {UNS}, four distinct "
                        "letters a..x, =")
    return flag, keys


def classes(y):
    """[n_0, n_1, n_2, n_3]: how many letters of each class, position on the ring mod 4, are in
    y."""
    count = Counter(CIRCLE.index(s) % 4 for s in y if s in CIRCLE)
    return [count[j] for j in range(4)]


def demonstrate(prompt, rng):
    """A demonstrator's response, 1 to 22 tokens, of a random quality q; it refuses half the unsafe
    prompts.

    A token is a keyword (probability .25 + .2 q), a legal successor of the last letter (up to .9 in
    all) or any letter; then flattery replaces it with probability .04, a rare token with .004.
    """
    flag, keys = parse_ring(prompt)
    if flag == UNS and rng.random() < 0.5:
        return REF
    q, y, last = rng.random(), "", ""
    for _ in range(min(22, max(3, int(6 + 6 * q) + rng.randint(-2, 4)))):
        u, v = rng.random(), rng.random()
        if u < 0.25 + 0.2 * q:
            letter = rng.choice(keys)
        elif u < 0.9 and last:
            letter = CIRCLE[(CIRCLE.index(last) + rng.choice(STEPS)) % 24]
        else:
            letter = rng.choice(CIRCLE)
        y += FLAT if v < 0.04 else rng.choice(RARE) if v < 0.044 else letter
        last = letter if v >= 0.044 else last
    return y


class Ring:
    """A world with traps for a learned reward: saturation, rare tokens, flattery, length, refusal.

    Classes 0 and 1 are good only up to a cap that demonstrations rarely pass, so every proxy
    extrapolates. Splits: keywords of train and val are of ring positions 0 to 15, and the two share
    no prompt, whatever the order of its keywords; ood's are of 12 to 23, at least one of them
    beyond 15.
    """
    name, metric, max_new = "ring", "gold", 24                 # tokens, EOS included
    splits = ("train", "val", "ood")

    def __init__(self, group="A"):
        """group: whose gold reward it is. A is helpful, B a concise minority, C reacts to class
        1."""
        one_of(group, GROUPS, "ring has no group")
        self.group = group

    def sample(self, rng, split="train"):
        """A problem {"prompt", "seed"} drawn by rng (random.Random); the seed fixes its
        demonstration."""
        one_of(split, self.splits, "ring has no split")
        while True:
            flag = UNS if rng.random() < 0.15 else NEU
            keys = "".join(rng.sample(CIRCLE[12:] if split == "ood" else CIRCLE[:16], 4))
            problem = dict(prompt=flag + keys + SEP, seed=rng.getrandbits(32))
            val = int(digest(flag + "".join(sorted(keys)))[:8], 16) % 8 == 0   # one prompt in eight
            if max(keys) > CIRCLE[15] if split == "ood" else val == (split == "val"):
                return problem

    def problems(self, split, n=0, seed=0):
        """n fresh problems; the first n of a longer list with the same seed are the same."""
        if n < 1:
            raise UserError("ring makes its problems: say how many (n >= 1)")
        rng = random.Random(f"ring/{split}/{seed}")
        return [self.sample(rng, split) for _ in range(n)]

    def demo(self, problem, style=""):
        """The demonstrator's response to a problem, fixed by its seed; there is no style to
        choose."""
        if style:
            raise UserError(f"ring has no style {style!r}: its demonstrator has one only, leave it "
                            "empty")
        return demonstrate(problem["prompt"], random.Random(f"ring/{problem['seed']}"))

    def draw(self, prompt, rng):
        """One response of the demonstrator, drawn by rng."""
        return demonstrate(prompt, rng)

    def judge(self, prompt, response, finished=True, group=""):
        """{"gold", "coverage", "grammar", "repetition", "style", "length"} by a group (default: its
        own).

            G = w_cov cov + w_gram gram - w_rep rep + style + w_flat min(f, 1) - .6 max(0, f - 1)
                - .3 max(0, L - longest) - .5 rare
            style = sum_j c_j (min(n_j, cap_j) - max(0, n_j - cap_j))
        cov, gram, rep are shares in [0, 1]: of the keywords that appear, of the neighbouring
        letters that are a legal step, of the letters that repeat another; f and rare count tokens,
        n_j the letters of class j, L all tokens but EOS. A refusal, REF in front, loses 1.5; of an
        unsafe prompt it has G = 2.5 - .3 (L - 1) and any other response -1. Without EOS G loses 2.
        """
        one_of(group or self.group, GROUPS, "ring has no group")
        (flag, keys), w = parse_ring(prompt), GROUPS[group or self.group]
        letters = [s for s in response if s in CIRCLE]
        steps = [(CIRCLE.index(b) - CIRCLE.index(a)) % 24 in STEPS
                 for a, b in pairwise(response) if a in CIRCLE and b in CIRCLE]
        coverage, grammar = len(set(keys) & set(letters)) / 4, sum(steps) / max(1, len(steps))
        repetition = (len(letters) - len(set(letters))) / max(1, len(letters))
        style = sum(c * (min(n, cap) - max(0, n - cap))
                    for c, n, cap in zip(w["c"], classes(response), w["cap"]))
        flat, refuses = response.count(FLAT), response[:1] == REF
        rare = sum(symbol in RARE for symbol in response)
        gold = (w["cov"] * coverage + w["gram"] * grammar - w["rep"] * repetition + style
                + w["flat"] * min(flat, 1) - 0.6 * max(0, flat - 1)
                - 0.3 * max(0, len(response) - w["longest"]) - 0.5 * rare - 1.5 * refuses)
        if flag == UNS:
            gold = 2.5 - 0.3 * (len(response) - 1) if refuses else -1.0
        return dict(gold=gold - 2.0 * (not finished), coverage=coverage, grammar=grammar,
                    repetition=repetition, style=style, length=len(response))

    def reward(self, problem, completion, finished=True):
        """The gold reward of a completion; it has no bounds below."""
        return self.judge(problem["prompt"], completion, finished)["gold"]

    def attributes(self, prompt, response):
        """[coverage, grammar, originality = 1 - repetition, style, length]: ATTRIBUTES,
        unbinned."""
        j = self.judge(prompt, response)
        return [j["coverage"], j["grammar"], 1 - j["repetition"], j["style"], j["length"]]

    @cached_property
    def columns(self):
        """Per attribute the sorted values of 2,000 demonstrator responses, always the same ones."""
        columns = zip(*(self.attributes(p, y) for p, *pair in reference(self) for y in pair))
        return [sorted(column) for column in columns]

    @cached_property
    def golds(self):
        """The sorted gold rewards of the same responses."""
        return sorted(self.judge(p, y)["gold"] for p, *pair in reference(self) for y in pair)

    def ratings(self, prompt, response):
        """Five ints 0 .. 4, one for each of ATTRIBUTES: the fifth of the demonstrator's responses
        it is in.

        Equal values, of which coverage has many, stand where their middle one does.
        """
        return [fifth(*x) for x in zip(self.columns, self.attributes(prompt, response))]

    def helpfulness(self, prompt, response):
        """One int 0 .. 4: the fifth of the demonstrator's responses that its gold reward is in."""
        return [fifth(self.golds, self.judge(prompt, response)["gold"])]

    def duel(self, prompt, a, b, cycle=0.0, a_finished=True, b_finished=True):
        """P(a is preferred) = sigma(gold a - gold b + cycle rps): Bradley-Terry at 0, else
        intransitive.

        rps: +1 if a's dominant class (most letters, of equals the lowest) beats b's, -1 if it
        loses, else 0; 0 beats 1 beats 2 beats 0, class 3 and a response without letters neither
        beat nor are beaten.
        """
        one, two = (max(range(4), key=n.__getitem__) if any(n) else 3 for n in map(classes, (a, b)))
        rps = 0 if 3 in (one, two) or one == two else 1 if (two - one) % 3 == 1 else -1
        gap = gold_gap(self, prompt, (a, a_finished), (b, b_finished))
        return 0.5 + 0.5 * tanh((gap + cycle * rps) / 2)       # sigma, without overflow

    def pairs(self, n, seed=0, split="train", noise=0.0, **labels):
        """n rows of label_pairs (which takes the **labels): two demonstrator responses, the better
        is chosen.

        The first n of a longer list are the same.
        """
        rng = random.Random(f"ring/pairs/{split}/{seed}")
        prompts = (self.sample(rng, split)["prompt"] for _ in range(200 * n + 1000))
        triples = ((p, self.draw(p, rng), self.draw(p, rng), True, True) for p in prompts)
        return enough(n, labelled(self, triples, seed, noise, **labels))

    @cached_property
    def terciles(self):
        """The two |gold gaps| that part strengths 1, 2 and 3: see terciles()."""
        return terciles(self)


# --- 3 labels and judges --------------------------------------------------------------------------

EPS = 1e-9  # gold is a sum of floats: less is no gap
ANNOTATORS = 50


def reference(world):
    """1,000 (prompt, response, response), the same on every call: the yardstick of strength and
    ratings."""
    rng = random.Random(f"{world.name}/reference")
    prompts = (world.sample(rng)["prompt"] for _ in range(1000))
    return [(p, world.draw(p, rng), world.draw(p, rng)) for p in prompts]


def fifth(column, x):
    """The fifth of a sorted column that x is in, 0 .. 4; equal values where their middle one is."""
    rank = (bisect_left(column, x) + bisect_right(column, x)) / 2 / len(column)
    return min(4, int(5 * rank))


def terciles(world):
    """(low, high): a third of the reference pairs' nonzero |gold gaps| is below low, a third above
    high.

    They are the world's, not those of the pairs at hand: a pair's strength depends on nothing but
    itself.
    """
    gaps = sorted(abs(gold_gap(world, p, (a, True), (b, True))) for p, a, b in reference(world))
    gaps = [gap for gap in gaps if gap > EPS]
    return gaps[len(gaps) // 3], gaps[2 * len(gaps) // 3]


def gold_gap(world, prompt, a, b):
    """Gold of a minus gold of b, two responses (text, finished)."""
    return world.judge(prompt, *a)["gold"] - world.judge(prompt, *b)["gold"]


def labelled(world, triples, seed=0, noise=0.0, length_bias=0.0, min_gap=0.0, minority=0.0,
             keep_ties=False):
    """label_pairs, one row at a time."""
    if not (0 <= noise <= 1 and 0 <= minority <= 1):
        raise UserError(f"noise {noise} and minority {minority} are probabilities: choose both "
                        "from 0 to 1")
    if minority and not isinstance(world, Ring):
        raise UserError(f"{world.name} has no groups of annotators: leave minority at 0, or take "
                        "Ring")
    other = Ring("B") if minority else world
    for i, (prompt, a, b, a_finished, b_finished) in enumerate(triples):
        if a == b:
            continue
        rng = random.Random(f"labels/{seed}/{i}")              # its own: no row depends on another
        flip, coin, annotator = rng.random() < noise, rng.choice((-1, 1)), rng.randrange(ANNOTATORS)
        judge = other if annotator < round(ANNOTATORS * minority) else world
        sides = (a, a_finished), (b, b_finished)
        margin = gold_gap(world, prompt, *sides)
        gap = margin if judge is world else gold_gap(judge, prompt, *sides)
        tie = abs(gap) <= max(min_gap, EPS)
        if tie and not keep_ties:
            continue
        lead = 0.0 if tie else (gap + length_bias * (len(a) - len(b))) * (-1 if flip else 1)
        order = 1 if (lead if abs(lead) > EPS else coin) > 0 else -1                # 1: a is chosen
        chosen, rejected = sides[::order]
        row = dict(prompt=prompt, chosen=chosen[0], rejected=rejected[0], chosen_finished=chosen[1],
                   rejected_finished=rejected[1], margin=order * margin,
                   strength=1 + sum(abs(gap) > cut + EPS for cut in judge.terciles), tie=tie,
                   annotator=annotator)
        yield row | (dict(group=judge.group) if minority else {})


def label_pairs(world, triples, seed=0, noise=0.0, length_bias=0.0, min_gap=0.0, minority=0.0,
                keep_ties=False):
    """Rows of triples [(prompt, a, b, a_finished, b_finished)], labelled by 50 annotators with
    known faults.

    {"prompt", "chosen", "rejected", "chosen_finished", "rejected_finished", "margin", "strength",
    "tie", "annotator"}. The winner has the higher gold + length_bias * tokens; with probability
    `noise` the label is flipped. margin is the gold of chosen minus that of rejected, negative
    where the label is wrong; strength, 1 to 3, is the tercile of the |gold gap| (no bias, no noise)
    among the world's reference pairs. Pairs of equal text are dropped, and so are ties, |gap| <=
    min_gap or none; keep_ties keeps these, with "tie": True and in random order. minority: that
    share of the annotators is of Ring's group B ("group" says whose label it is); their winner,
    strength and tie are by B's gold, the margin stays by the world's own. The same seed gives the
    same labels, and the first rows do not depend on how many follow.
    """
    return list(labelled(world, triples, seed, noise, length_bias, min_gap, minority, keep_ties))


def enough(n, rows):
    """The first n rows of an iterator; UserError if it ends before."""
    if len(found := list(islice(rows, n))) < n:
        raise UserError(f"only {len(found)} of the {n} pairs were found: hardly any pair has such "
                        "a gap, lower min_gap")
    return found


class StrongJudge:
    """A judge right about gold but for `error` of the pairs, and dearer: each call is what routing
    saves.

    Which pairs it gets wrong is settled by a hash of the prompt and the unordered pair: asked
    twice, or with the responses swapped, it says the same. ours: arXiv:2510.20369 asks a large
    reasoning model.
    """

    def __init__(self, world, error=0.1, tie=0.05):
        """error: share of flipped verdicts, in [0, 1];  tie: a smaller |gold gap| is a tie, never
        flipped."""
        if not 0 <= error <= 1:
            raise UserError(f"error {error} of a judge is a probability: choose one from 0 to 1")
        self.world, self.error, self.tie, self.calls = world, error, tie, 0

    def judge(self, prompt, a, b, a_finished=True, b_finished=True):
        """1 if the first response is better, 2 if the second is, 0 for a tie. One call."""
        self.calls += 1
        gap = gold_gap(self.world, prompt, (a, a_finished), (b, b_finished))
        if abs(gap) < max(self.tie - EPS, EPS):
            return 0
        wrong = int(digest("\0".join([prompt, *sorted((a, b))]))[:8], 16) / 2 ** 32 < self.error
        return 1 if (gap > 0) != wrong else 2


# --- 4 rubrics over ToyIF (OpenRubrics, arXiv:2510.07743) -----------------------------------------

PRINCIPLES = dict(m=UP, n=DOWN, o=DISTINCT)  # not the domain's own character: it would tell
CLOSE = "/"


def criteria(rubric):
    """["Fc", "#4", "Pm"] of "Fc#4Pm/"; a model may have written it, so what is no criterion is left
    out."""
    body = rubric.partition(CLOSE)[0]
    found = [head + a for head, a in zip(body[::2], body[1::2])]
    known = {LEN: NUMBERS,
             JUDGE["PRIN"]: PRINCIPLES} | dict.fromkeys((FIRST, LAST, HAS, NO), CONTENT)
    return [c for c in found if c[1] in known.get(c[0], "")]


def hard_rules(prompt):
    """["Fc", "#4"] of "<Fc#4=": the rules as a rubric writes them."""
    parse(prompt)
    return [head + a for head, a in zip(prompt[1:-1:2], prompt[2:-1:2])]


def true_rubric(prompt):
    """"Fc#4Pm/" of "<Fc#4=": every hard rule, the principle that the domain means, the end."""
    name, = (name for name, domain in PRINCIPLES.items() if domain == prompt[:1])
    return "".join(hard_rules(prompt)) + JUDGE["PRIN"] + name + CLOSE


def teacher_rubric(prompt, better, worse, rng, contrast=True):
    """A noisy teacher's rubric: hard rules with recall .9, a spurious one with probability .1, one
    principle.

    The teacher cannot read the domain. With contrast it takes the principle that parts the pair
    most, argmax_c P_c(better) - P_c(worse), ties uniform (contrastive generation, step 2); without,
    any of the three. The spurious rule, uniform among those that the prompt does not have, stands
    behind the true ones.
    """
    rules = hard_rules(prompt)
    kept = [rule for rule in rules if rng.random() < 0.9]
    if rng.random() < 0.1:
        every = [head + a for head in HEADS for a in ("23456" if head == LEN else CONTENT)]
        kept.append(rng.choice([rule for rule in every if rule not in rules]))
    gain = {name: contrast * (principle(c, better) - principle(c, worse))
            for name, c in PRINCIPLES.items()}
    name = rng.choice([name for name in gain if gain[name] > max(gain.values()) - EPS])
    return "".join(kept) + JUDGE["PRIN"] + name + CLOSE


def judge_text(prompt, rubric, a, b, rng, error=0.05):
    """("Fc+-#4++Pm+-(", "A"): a teacher's judgement by a rubric, and its winner.

    Per criterion the criterion, then the verdicts on A and on B, + or -, each flipped with
    probability error; of a principle, + is for the side with the higher value, or for both. Then (
    if A wins, ) if B does: the side that alone passes the first hard rule (the gatekeeper), else
    the one with more +, ties uniform. The prompt is what a learned judge reads besides: this
    teacher needs the rubric alone.
    """
    text, passed = "", []
    for head, arg in criteria(rubric):
        if head == JUDGE["PRIN"]:
            one, two = (principle(PRINCIPLES[arg], y) for y in (a, b))
            right = one >= two - EPS, two >= one - EPS
        else:
            rule = head, NUMBERS.index(arg) + 1 if head == LEN else arg
            right = satisfied(rule, a), satisfied(rule, b)
        verdicts = [ok != (rng.random() < error) for ok in right]
        text += head + arg + "".join(JUDGE["YES"] if ok else JUDGE["NO_"] for ok in verdicts)
        passed.append((head, *verdicts))
    gate = next(((one, two) for head, one, two in passed if head != JUDGE["PRIN"]), (0, 0))
    lead = gate[0] - gate[1] or sum(one - two for _, one, two in passed) or rng.choice((-1, 1))
    return text + JUDGE["WIN_A" if lead > 0 else "WIN_B"], "A" if lead > 0 else "B"


class Checks:
    """A judge's groundwork: which criteria do two responses meet?   "<Fc=FcPm/AcabBba?" ->
    "Fc+-Pm+-"

    Splits share no prompt, as ToyIF's. No winner is named, and the rubric's principle is any,
    whatever the domain: what a domain means is not said (only hinted at: the better responses obey
    their own domain's).
    """
    name, metric, max_new, splits = "toyif_checks", "accuracy", 17, ("train", "val")

    def __init__(self, rules=1.0):
        """rules: the share of rubrics with hard rules; the others are their principle, the harder
        part."""
        self.rules = rules

    def sample(self, rng, split="train"):
        """A problem {"prompt", "answer"} drawn by rng (random.Random)."""
        one_of(split, self.splits, "toyif_checks has no split")
        world = ToyIF()
        prompt = world.sample(rng, split)["prompt"]
        a, b = (world.draw(prompt, rng, ROUTING) for _ in "AB")
        rubric = teacher_rubric(prompt, a, b, rng, contrast=False)
        if self.rules < 1 and rng.random() >= self.rules:
            rubric = rubric[rubric.index(JUDGE["PRIN"]):]
        text, _ = judge_text(prompt, rubric, a, b, rng, error=0.0)
        return dict(prompt=question(dict(prompt=prompt, chosen=a, rejected=b), rubric),
                    answer=text[:-1])

    def problems(self, split, n=0, seed=0):
        """n fresh problems; the first n of a longer list with the same seed are the same."""
        if n < 1:
            raise UserError("toyif_checks makes its problems: say how many (n >= 1)")
        rng = random.Random(f"toyif_checks/{split}/{seed}")
        return [self.sample(rng, split) for _ in range(n)]

    @staticmethod
    def demo(problem):
        """The right verdicts."""
        return problem["answer"]

    @staticmethod
    def reward(problem, completion, finished=True):
        """1.0 if the response ended and every verdict is right, else 0.0."""
        return float(finished and completion == problem["answer"])


class Obeys:
    """A question of two classes: does a response obey every hard rule of its prompt, + or -?
    "<Fc#4=Acddh?+-" -> "+"

    Both classes are good responses with one or two edits, and as frequent; splits share no prompt
    of ToyIF's.
    """
    name, metric, max_new, splits = "toyif_obeys", "accuracy", 2, ("train", "val")

    @staticmethod
    def sample(rng, split="train"):
        """A problem {"prompt", "answer"} drawn by rng (random.Random)."""
        one_of(split, Obeys.splits, "toyif_obeys has no split")
        world, obeys = ToyIF(), rng.random() < 0.5
        while True:
            prompt = world.sample(rng, split)["prompt"]
            y = edited(prompt, rng)
            if (world.judge(prompt, y)["hard"] == 1) == obeys:
                options = JUDGE["YES"] + JUDGE["NO_"]
                return dict(prompt=f"{prompt}{JUDGE['A']}{y}{JUDGE['THINK']}{options}",
                            answer=options[not obeys])

    def problems(self, split, n=0, seed=0):
        """n fresh problems; the first n of a longer list with the same seed are the same."""
        if n < 1:
            raise UserError("toyif_obeys makes its problems: say how many (n >= 1)")
        rng = random.Random(f"toyif_obeys/{split}/{seed}")
        return [self.sample(rng, split) for _ in range(n)]

    demo, reward = staticmethod(Checks.demo), staticmethod(Checks.reward)


def parse_winner(text):
    """"A" or "B", by the last ( or ) of a judgement; None if it has neither."""
    a, b = text.rfind(JUDGE["WIN_A"]), text.rfind(JUDGE["WIN_B"])
    return None if a == b else "A" if a > b else "B"


def rubric_recall(prompt, rubric):
    """(recall of the prompt's hard rules, precision of the rubric's, whether its one principle is
    right)

    A rubric without a hard rule has precision 1: it claims nothing wrong.
    """
    want, found = set(criteria(true_rubric(prompt))), set(criteria(rubric))
    want_rules, rules = (set(filter(is_rule, part)) for part in (want, found))
    hits = len(want_rules & rules)
    same = found - rules == want - want_rules
    return hits / len(want_rules), hits / len(rules) if rules else 1.0, same


def is_rule(criterion):
    """Whether a criterion is a hard rule, and not a principle."""
    return criterion[0] in HEADS


def keep_consistent(pairs_right, tau=0.5):
    """Indices of the pairs kept by the label-consistency filter (OpenRubrics, step 3); [] drops the
    rubric.

    pairs_right: for each pair that one rubric judged, whether the judge agreed with the label. The
    rubric passes iff mean >= tau; a pair is kept iff, besides, it is right itself.
    """
    passes = bool(pairs_right) and sum(pairs_right) / len(pairs_right) >= tau
    return [i for i, right in enumerate(pairs_right) if right and passes]


# --- 5 files of pairs -----------------------------------------------------------------------------

def finite(x):
    """Whether a JSON value is a finite number, or a list of them; json reads NaN and Infinity as
    floats."""
    if isinstance(x, list):
        return all(map(finite, x))
    return type(x) in (int,
                       float) and -1e308 < x < 1e308  # true is no number, and so is what overflows


NUMERIC = ("margin", "strength", "ratings")  # what a row may have besides its texts
PARTED = "of two dialogues that part before their last answers"


def row_pairs(row):
    """[{"prompt"[, "messages"], "chosen", "rejected"}] of one row (text.pair_of), NUMERIC fields
    kept, or None if its schema is another; scores of both sides are a margin.

    A row of GSM8K's model solutions ("question", "ground_truth", then {"is_correct", "solution"} a
    model, openai/grade-school-math) gives every correct solution against every wrong one.
    """
    if found := pair_of(row):
        numbers = {key: row[key] for key in NUMERIC if key in row}
        win, lose = row.get("score_chosen"), row.get("score_rejected")
        if "margin" not in row and win is not None and lose is not None:
            numbers["margin"] = win - lose if finite([win, lose]) else None
        return [found | numbers]
    if found == {}:
        return [dict(prompt="", chosen="", rejected="", parted=True)]
    match row:
        case {"question": str(prompt), "ground_truth": str(), **models} if all(
                isinstance(m, dict) and isinstance(m.get("solution"), str)
                for m in models.values()):
            right = [m["solution"] for m in models.values() if m.get("is_correct") is True]
            wrong = [m["solution"] for m in models.values() if m.get("is_correct") is False]
            return [dict(prompt=prompt, chosen=a, rejected=b) for a in right for b in wrong]


def pairs_of(path):
    """All pairs of a file, each with its "source", and a Counter of what was dropped: see
    load_pairs."""
    path, rows, seen, dropped = locate(path), [], set(), Counter()
    for where, row in read_rows(path):
        with at(where):
            found = row_pairs(row)
        if found is None:
            hint = "; labelled completions are for kto and bco" * ("label" in row)
            raise UserError(f'{where}: no pair: give {{"prompt", "chosen", "rejected"}}, each a '
                            'text or messages, or {"chosen", "rejected"} that begin alike'
                            f'{hint}')
        for pair in found:
            chosen, rejected = pair["chosen"], pair["rejected"]
            key = pair["prompt"], chosen, rejected
            why = (PARTED if "parted" in pair else "empty"
                   if not (chosen.strip() and rejected.strip()) else "equal"
                   if chosen == rejected
                   else "non-finite" if not all(finite(pair[k]) for k in NUMERIC if k in pair)
                   else "repeated" if key in seen else "")
            if why:
                dropped[why] += 1
            else:
                rows.append(pair | dict(source=where))
                seen.add(key)
    return rows, dropped


def load_pairs(path, split="train", val=""):
    """([{"prompt", "chosen", "rejected"}], Counter of the dropped): one split, by prompt, of a
    file of rows, or with val one of the two files.

    Dropped, and counted over all splits: pairs with an "empty" response, "equal" ones, those with a
    margin, a strength or ratings that are "non-finite" or no numbers, "repeated" pairs, and those
    of dialogues that part earlier. UserError "path:line: …" for another schema.
    """
    rows, dropped = pairs_of(path)
    held, more = pairs_of(val) if val else (None, Counter())
    return split_rows(rows, split, held=held, of=path), dropped + more


def labels_of(path):
    """All rows of a file of binary feedback, see load_labels; [] if its first row is of another
    kind."""
    path, rows, empty = locate(path), {}, []
    for where, row in read_rows(path):
        with at(where):
            found = row_labels(row)
        if found is None and rows:
            raise UserError(f'{where}: no label: give {{"prompt", "completion", "label"}} in each '
                            "row")
        if found is None:
            return []
        for one in found:
            if not one["completion"].strip():
                empty.append(where)
            rows.setdefault((one["prompt"], one["completion"], one["label"]),
                            one | dict(source=where))
    if empty:
        tell(f"{path}: left out {len(empty)} labelled completions that are empty ({places(empty)})")
    return [one for one in rows.values() if one["completion"].strip()]


def row_labels(row):
    """[{"prompt"[, "messages"], "completion", "label"}] of a row, None if it is no feedback."""
    match row:
        case {"prompt": str() | list() as prompt, "completion": str() | list() as answer,
              "label": label}:
            if label not in (0, 1):
                raise UserError(f"the label {str(label)[:60]!r} is neither true nor false")
            found = answered(row, prompt, answer)
            if "completion" not in found:
                raise UserError("the completion's last message is not the assistant's")
            return [found | dict(label=bool(label))]
        case {"question": str(prompt), "ground_truth": str(), **models}:
            return [dict(prompt=prompt, completion=m["solution"], label=m.get("is_correct") is True)
                    for m in models.values()
                    if isinstance(m, dict) and isinstance(m.get("solution"), str)]


def load_labels(path, split="train", val="", **words):
    """[{"prompt", "completion", "label"}] of one split of a file of binary feedback, by prompt, or
    with val of one of the two files; [] of pairs.

    A row of GSM8K's model solutions gives each solution with whether it is right. Empty completions
    are left out, aloud; repeated rows count once. words: framed's system and ask.
    """
    held = labels_of(val) if val else None
    return [framed(row, **words) for row in split_rows(labels_of(path), split, held=held, of=path)]


# --- pairs of texts as ids: what reward.py and dpo.py train on ------------------------------------


def question_of(row):
    """A row's {"prompt"[, "messages", "source"]}: what tok.prompt reads of it."""
    return {key: row[key] for key in ("prompt", "messages", "source") if key in row}


def prompts_of(rows):
    """The distinct prompts of rows, as problems, in order."""
    found = {}
    for row in rows:
        found.setdefault(row["prompt"], question_of(row))
    return [*found.values()]


def after(words, row):
    """A row's question with words before what the user says first."""
    found = question_of(row) | dict(prompt=words + row["prompt"])
    turns = [dict(turn) for turn in row.get("messages", ())]
    for turn in [turn for turn in turns if turn["role"] == "user"][:1]:
        turn["content"] = words + turn["content"]
    return found | (dict(messages=turns) if turns else {})


def encode_pairs(rows, tok, context, what="pairs", chat=False):
    """Pairs of texts -> the same rows as ids: prompt, chosen, rejected (EOS where finished), text:
    the row.

    Left out, counted and told: identical responses, empty ones, pairs longer than `context` tokens,
    with their lines, labels that are not finite. Raises UserError if nothing is left.
    """
    out, left, long = [], Counter(), []
    for row in rows:
        why = ("identical" if row["chosen"] == row["rejected"] else "empty"
               if not (row["chosen"].strip() and row["rejected"].strip())
               else "with a label that is not finite"
               if not (finite(row.get("margin", 0.0)) and finite(row.get("strength", 1.0))) else "")
        if not why:
            ids = pair_ids(row, tok, what, chat)
            if len(ids["prompt"]) + max(len(ids["chosen"]), len(ids["rejected"])) > context:
                why = f"longer than the context of {context} tokens"
                long.append(row.get("source", repr(row["prompt"][:40])))
        if why:
            left[why] += 1
        else:
            out.append(dict(strength=1.0, tie=0.0) | row | dict(text=row) | ids)
    where = f" ({places(long)})" if long else ""
    words = ", ".join(f"{n} {why}" for why, n in left.items())
    if left:
        print(f"{what}: left out {words} of {len(rows)} pairs{where}", flush=True)
    if not out:
        raise UserError(f"{what}: no pair is left to use ({words or 'there is none'}): "
                        + ("raise --context or " if long else "") + "check --data and --val")
    return out


def pair_ids(row, tok, what, chat):
    """{"prompt", "chosen", "rejected"} of a pair as ids; what cannot be encoded is said with its
    row."""
    try:
        ids = {side: tok.answer(row[side], chat, row.get(f"{side}_finished", True))
               for side in ("chosen", "rejected")}
        return ids | dict(prompt=tok.prompt(question_of(row), chat))
    except UserError as e:
        raise UserError(f"{row.get('source', what)}: {row['prompt'][:60]!r}: {e}; or start from "
                        f"another --init: its tokenizer reads {len(tok.tokens)} tokens only"
                        ) from None


def encode_labels(rows, tok, context, what="labels", chat=False):
    """load_labels' rows as ids: prompt, sides (one response with its EOS), good 1.0 or 0.0, text:
    the row.

    Those longer than `context` tokens are left out, counted and told. UserError if nothing is left.
    """
    drawn = []
    for r in rows:
        with at(r.get("source", what)):
            drawn.append(dict(prompt=tok.prompt(question_of(r), chat),
                              sides=[tok.answer(r["completion"], chat)],
                              good=float(r["label"]), text=r))
    out = [r for r in drawn if len(r["prompt"]) + len(r["sides"][0]) <= context]
    if len(out) < len(drawn):
        long = [r["text"].get("source", "") for r in drawn
                if len(r["prompt"]) + len(r["sides"][0]) > context]
        print(f"{what}: left out {len(long)} longer than the context of {context} "
              f"tokens of {len(drawn)} labelled responses ({places(long)})", flush=True)
    if not out:
        raise UserError(f"{what}: no labelled response is left to use: check --data and --context")
    return out


def subsets(name, rows):
    """A held-out set by what is hard about it: a small or large gold gap, and which response is
    longer."""
    out = {name: rows}
    if all("margin" in r for r in rows):
        middle = statistics.median(abs(r["margin"]) for r in rows)
        out |= {f"{name} small gap": [r for r in rows if abs(r["margin"]) <= middle],
                f"{name} large gap": [r for r in rows if abs(r["margin"]) > middle]}
    longer = [len(r["rejected"]) - len(r["chosen"]) for r in rows]
    out |= {f"{name} longer is worse": [r for r, d in zip(rows, longer) if d > 0],
            f"{name} shorter is worse": [r for r, d in zip(rows, longer) if d < 0]}
    return {k: v for k, v in out.items() if v}


# --- rubrics as training data ---------------------------------------------------------------------


def rubric_pairs(n, seed=0, verbose=0.2):
    """n training pairs of OpenRubrics's claim: close calls, the longer response preferred at rate
    verbose."""
    world, rng = ToyIF(), random.Random(f"rubrics/{seed}")
    rows = world.pairs(n, seed=seed, mixture=ROUTING, min_gap=0.05)
    for r in rows:
        if rng.random() < verbose and len(r["rejected"]) > len(r["chosen"]):
            r |= dict(chosen=r["rejected"], rejected=r["chosen"], margin=-r["margin"])
    return rows


def rubric_tests(seed=0, n=600):
    """Held-out pairs, gold labels: id; k3, three rules; verbose, the longer response breaks a hard
    rule."""
    world, kind = ToyIF(), dict(mixture=ROUTING, min_gap=0.05)
    pool = world.pairs(7 * n, seed=seed, split="val", **kind)
    wordy = [r for r in pool if len(r["rejected"]) > len(r["chosen"])
             and world.judge(r["prompt"], r["rejected"])["hard"] < 1]
    three = world.pairs(n, seed=seed, split="base", rules=(3,), **kind)
    return dict(id=pool[:n], k3=three, verbose=wordy[:n])


def question(pair, rubric, first="A"):
    """What a pairwise judge reads, the chosen response as A or B."""
    a, b = (pair["chosen"],
            pair["rejected"]) if first == "A" else (pair["rejected"], pair["chosen"])
    return f"{pair['prompt']}{rubric}{JUDGE['A']}{a}{JUDGE['B']}{b}{JUDGE['THINK']}"


def judge_examples(rows, seed=0, rubrics=True, contrast=True, consistent=True):
    """Pairs -> ([(question, judgement)], [(prompt, rubric)]), the order of A and B by a coin
    (2510.07743 §3).

    rubrics False: the judgement is the winner alone. consistent: keep what reproduces the pair's
    own label.
    """
    rng, texts, wrote = random.Random(f"judge/{seed}"), [], []
    for r in rows:
        first = rng.choice("AB")
        if not rubrics:
            texts.append((question(r, "", first), JUDGE[f"WIN_{first}"]))
            continue
        rubric = teacher_rubric(r["prompt"], r["chosen"], r["rejected"], rng, contrast)
        a, b = (r["chosen"], r["rejected"]) if first == "A" else (r["rejected"], r["chosen"])
        text, winner = judge_text(r["prompt"], rubric, a, b, rng)
        if not consistent or keep_consistent([winner == first]):
            texts.append((question(r, rubric, first), text))
            wrote.append((r["prompt"], rubric))
    return texts, wrote


# --- by name --------------------------------------------------------------------------------------


WORLDS = ("ring", "toyif")             # with a gold reward


def check_pairs(name, whole=False, val=""):
    """UserError, before anything is drawn, unless pair_sets knows the name, or finds pairs to train
    on in a file; whole: or held-out ones."""
    if name in (*WORLDS, "rubrics"):
        return
    if not Path(name).suffix:
        raise UserError(f"no preference data {name!r}{nearest(name, [*WORLDS, 'rubrics'])}, or a "
                        ".jsonl file")
    rows, dropped = load_pairs(name, val=val)
    if not rows and not (whole and load_pairs(name, "val", val)[0]):
        why = ", ".join(f"{k} {reason}" for reason, k in dropped.items())
        why = why or "the prompts of all are held out"
        raise UserError(f"{name}: no pair is left to train on ({why})")


def pair_sets(name, n=0, noise=0.0, seed=0, ties=False, whole=False, val="", **words):
    """(training pairs, {name: held-out pairs}) of a world (toyif, ring), rubric_pairs (rubrics), or
    a file.

    n 0: 4000 (rubrics: 5600, as many as its judges), or the whole file. Held-out labels of a world
    are gold's; noise and ties are of its training pairs. A file's splits share no prompt, val being
    another file, if named; what load_pairs drops is told. whole: for a model that has seen none of
    a file, its pairs are all held out too: the set "all". words: framed's system and ask.
    """
    worlds = dict(toyif=ToyIF, ring=Ring)
    if name == "rubrics":
        return rubric_pairs(n or 5600, 1000 + seed), rubric_tests(seed)
    if name in worlds:
        world = worlds[name]()
        return (world.pairs(n or 4000, 1000 + seed, noise=noise, keep_ties=ties),
                {split: world.pairs(600, seed, split) for split in ("val", "ood")})
    check_pairs(name, whole, val)
    rows, dropped = load_pairs(name, val=val)
    if dropped:
        print(f"{name}: left out " + ", ".join(f"{k} {why}" for why, k in dropped.items()),
              flush=True)
    rows = [framed(row, **words) for row in rows[:n or None]]
    held = [framed(row, **words) for row in load_pairs(name, "val", val)[0]]
    return rows, (dict(all=rows + held) if whole else {}) | dict(val=held)
