"""The worlds ToyIF and Ring by their worked values and promises; labels, judges, rubrics, files of
pairs."""
import json
import os
import random
import statistics
from collections import Counter
from pathlib import Path

import pytest

from data import prefs
from data.prefs import (ALPHABET, ATTRIBUTES, BEHAVIOURS, CONTENT, FLAT, HAS, MIXTURE, NO, RARE,
                        REF, ROUTING, UNS, Checks, Obeys, Ring, StrongJudge, ToyIF, criteria,
                        edited, encode_labels, encode_pairs, fifth, good, judge_examples,
                        judge_text, keep_consistent, label_pairs, load_labels, load_pairs,
                        pair_sets, parse, parse_ring, parse_winner, question, rand, reference,
                        ring_tokenizer, rubric_pairs, rubric_recall, rubric_tests, subsets,
                        teacher_rubric, tokenizer, true_rubric)
from data.run import UserError

WORLD, RING = ToyIF(), Ring()
DATA = Path(os.environ.get("DATA_DIR", Path(__file__).parents[2] / "shared" / "data"))


# --- the gold reward: values worked by hand -------------------------------------------------------

@pytest.mark.parametrize("prompt, response, hard, principle, gold", [
    ("<Fc#4=", "cddh", 1, 1, 1.5),
    ("<Fc#4=", "cfe", 0.5, 0.5, 0.75),
    ("<Fc#4=", "dcba", 0.5, 0, 0.5),
    ("*HbNf=", "bbc", 1, 2 / 3, 4 / 3),
    ("*HbNf=", "afb", 0.5, 1, 1.0),
    ("*HbNf=", "edc", 0.5, 1, 1.0),
    ("*HbNf=", "", 0, 0, 0),                       # the empty response does not even satisfy NO
    (">Lb=", "dcb", 1, 1, 1.5),
    (">Lb=", "bcb", 1, 0.5, 1.25),
    ("<Lb=", "b", 1, 0, 1.0),                      # a principle needs two symbols
    ("<#0=", "aaaaaaaaaa", 1, 1, 1.5),             # 0 is the number 10
    ("<Fc#4=", "cd=h", 0, 0, 0),                   # a symbol that is no content
])
def test_worked_values(prompt, response, hard, principle, gold):
    want = dict(hard=hard, principle=principle, gold=gold)
    assert WORLD.judge(prompt, response) == pytest.approx(want, abs=1e-12)
    assert WORLD.reward(dict(prompt=prompt), response) == pytest.approx(gold, abs=1e-12)
    assert WORLD.reward(dict(prompt=prompt), response, finished=False) == 0


def test_gold_ignores_the_order_of_rules_and_mirrors_with_the_domain():
    rng = random.Random(0)
    for p in WORLD.problems("base", 300):
        domain, body = p["prompt"][0], p["prompt"][1:-1]
        y = "".join(rng.choices(CONTENT, k=rng.randint(1, 8)))
        turned = domain + "".join(body[i:i + 2] for i in range(len(body) - 2, -1, -2)) + "="
        assert WORLD.judge(turned, y) == WORLD.judge(p["prompt"], y)
        assert WORLD.judge(f"<{body}=",
                           y)["principle"] == WORLD.judge(f">{body}=", y[::-1])["principle"]


@pytest.mark.parametrize("prompt",
                         ["", "=", "<=", "Fc=", "<Fc", "<Fc#=", "<F4=", "<#c=", "<Xc=", "?Fc=",
                                    "<Fc#4"])
def test_what_is_no_prompt_is_named(prompt):
    with pytest.raises(UserError, match="is no ToyIF prompt"):
        parse(prompt)


def test_64_ids_and_every_text_survives():
    tok = tokenizer()
    assert tok.vocab_size == 64 and len(set(ALPHABET)) == 61
    for p in WORLD.problems("base", 50):
        text = p["prompt"] + WORLD.demo(p)
        assert len(tok.encode(text)) == len(text) and tok.decode(tok.encode(text)) == text


# --- splits and behaviours ------------------------------------------------------------------------

def canonical(prompt):
    """A prompt's meaning: its domain and rules, in whatever order they were written."""
    domain, rules = parse(prompt)
    return domain, tuple(sorted(map(str, rules)))


def test_splits_hold_what_they_promise():
    seen = {split: WORLD.problems(split, 3000, seed=1) for split in WORLD.splits}
    prompts = {split: {canonical(p["prompt"]) for p in rows} for split, rows in seen.items()}
    assert not prompts["train"] & prompts["val"]
    assert not prompts["ood"] & (prompts["train"] | prompts["val"])
    heads = {split: Counter(frozenset(h for h, _ in parse(p["prompt"])[1]) for p in rows)
             for split, rows in seen.items()}
    pair = frozenset({HAS, NO})
    assert all(len(h) in (1, 2) and h != pair for split in ("train", "val") for h in heads[split])
    assert heads["base"][pair] > 0
    assert all(len(h) == 3 or h == pair for h in heads["ood"])
    assert 1350 < heads["ood"][pair] < 1650                              # half, within 5 sigma
    for rows in seen.values():
        for domain, rules in (parse(p["prompt"]) for p in rows):
            symbols = [a for _, a in rules if isinstance(a, str)]
            assert len(set(h for h, _ in rules)) == len(rules) and len(set(symbols)) == len(symbols)
            assert all(2 <= a <= 6 for _, a in rules if isinstance(a, int))


def test_problems_and_demonstrations_are_reproducible_prefixes():
    for split in WORLD.splits:
        ten = WORLD.problems(split, 10, 3)
        assert ten == WORLD.problems(split, 20, 3)[:10] != WORLD.problems(split, 10, 4)
    p = WORLD.problems("train", 1)[0]
    assert all(WORLD.demo(p, style) == WORLD.demo(dict(p), style) for style in BEHAVIOURS)
    assert WORLD.pairs(20, 5) == WORLD.pairs(30, 5)[:20]


@pytest.mark.parametrize("split", WORLD.splits)
def test_good_obeys_every_rule_and_behaviours_are_ranked(split):
    problems = WORLD.problems(split, 2000)
    judged = {s: [WORLD.judge(p["prompt"], WORLD.demo(p, s)) for p in problems] for s in MIXTURE}
    gold = {style: sum(j["gold"] for j in rows) / 2000 for style, rows in judged.items()}
    assert all(j["hard"] == 1 for j in judged["good"]) and 1.40 < gold["good"] < 1.48
    assert gold["good"] > gold["copy"] > gold["rand"]
    for style in MIXTURE:
        responses = [WORLD.demo(p, style) for p in problems]
        assert all(2 <= len(y) <= 6 and set(y) <= set(CONTENT) for y in responses)
    for p in problems[:200]:
        symbols = {a for _, a in parse(p["prompt"])[1] if isinstance(a, str)}
        assert not symbols or set(WORLD.demo(p, "copy")) <= symbols


def test_the_base_corpus_mixes_the_behaviours_in_proportion():
    """mean gold of the mixture = .3 good + .4 rand + .3 copy, each on the same prompts; any pair of
    rules"""
    base = ToyIF("mixture")
    problems = base.problems("train", 4000)
    gold = {s: sum(WORLD.reward(p, WORLD.demo(p, s)) for p in problems) / 4000 for s in MIXTURE}
    mixed = sum(base.reward(p, base.demo(p)) for p in problems) / 4000
    assert mixed == pytest.approx(.3 * gold["good"] + .4 * gold["rand"] + .3 * gold["copy"],
                                  abs=0.03)
    assert any({h for h, _ in parse(p["prompt"])[1]} == {HAS, NO} for p in problems)
    assert all(base.demo(p) == base.demo(p) in {base.demo(p, s) for s in MIXTURE}
               for p in problems[:50])
    with pytest.raises(UserError, match="no style 'godo'; did you mean 'good'"):
        ToyIF("godo")


def test_pairs_prefer_gold_and_noise_flips_that_share():
    for noise in (0.0, 0.2):
        rows = WORLD.pairs(2000, seed=2, noise=noise)
        for r in rows:
            chosen, rejected = (WORLD.reward(r, r[side]) for side in ("chosen", "rejected"))
            assert chosen - rejected == pytest.approx(r["margin"]) and chosen != rejected
        assert abs(sum(r["margin"] < 0 for r in rows) / 2000 - noise) < 0.04


def distance(a, b):
    """Levenshtein: the fewest substitutions, insertions and deletions that turn a into b."""
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        last, row[0] = row[0], i
        for j, y in enumerate(b, 1):
            last, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, last + (x != y))
    return row[-1]


def test_edited_is_good_but_for_one_or_two_edits():
    far = Counter()
    for i, p in enumerate(WORLD.problems("base", 1000)):
        before, after = good(p["prompt"], random.Random(i)), edited(p["prompt"], random.Random(i))
        assert 1 <= len(after) <= 8 and set(after) <= set(CONTENT)
        far[distance(before, after)] += 1
    assert set(far) <= {0, 1,
                        2} and far[0] < 50 and 400 < far[1] < 650    # 0: the second undid the first
    problems = WORLD.problems("train", 500)
    gold = {s: sum(WORLD.reward(p, WORLD.demo(p, s)) for p in problems) for s in BEHAVIOURS}
    assert gold["good"] > gold["edited"] > gold["rand"]


def test_pairs_of_some_heads_and_numbers_of_rules_and_of_close_calls():
    for split, heads, rules in (("train", "FLH", (1, 2)), ("base", "N#", (1,)),
                                ("base", "FLHN#", (3,)), ("val", "#", (1,))):
        for r in WORLD.pairs(60, 1, split, heads=heads, rules=rules, mixture=ROUTING, min_gap=0.05):
            found = [h for h, _ in parse(r["prompt"])[1]]
            assert set(found) <= set(heads) and len(found) in rules and r["margin"] > 0.05


@pytest.mark.parametrize("call, word", [
    (lambda: WORLD.problems("trian", 1), "did you mean 'train'"),
    (lambda: WORLD.problems("train"), "how many"),
    (lambda: WORLD.demo(dict(prompt="<Fc=", seed=1), "copi"), "did you mean 'copy'"),
    (lambda: WORLD.pairs(1, mixture=dict(edite=1)), "did you mean 'edited'"),
    (lambda: WORLD.pairs(1, heads="FX"), "choose heads of FLHN#"),
    (lambda: WORLD.pairs(1, heads="HN", rules=(2,)), "split base for H with N"),
    (lambda: WORLD.pairs(1, heads="F", rules=(2,)), "no more rules than heads"),
    (lambda: WORLD.pairs(1, rules=(4,)), "no train prompt"),
    (lambda: WORLD.pairs(1, split="ood", heads="FL"), "no heads and rules for the split 'ood'"),
    (lambda: WORLD.pairs(1, min_gap=2.0), "lower min_gap"),
    (lambda: WORLD.pairs(1, noise=1.5), "probabilities"),
    (lambda: WORLD.pairs(1, minority=0.3), "take Ring"),
    (lambda: StrongJudge(WORLD, error=2), "from 0 to 1"),
    (lambda: RING.problems("vall", 1), "did you mean 'val'"),
    (lambda: RING.problems("val"), "how many"),
    (lambda: RING.demo(dict(prompt=".abef=", seed=1), "good"), "no style 'good'"),
    (lambda: Ring("D"), "no group 'D'"),
    (lambda: RING.judge(".abef=", "a", group="D"), "no group 'D'")])
def test_wrong_names_get_the_nearest(call, word):
    with pytest.raises(UserError, match=word):
        call()


# --- Ring: gold worked by hand --------------------------------------------------------------------

@pytest.mark.parametrize("group, prompt, response, gold", [
    ("A", ".abef=", "abef", 1.5 + 0.5 + 2 * 0.7 + 2
     * 0.4),  # all keywords, steps 1 3 1: classes 0 1 0 1
    ("B", ".abef=", "abef", 1.0 + 0.5 + 2 * 0.3 - 2 * 0.2),
    ("C", ".abef=", "abef", 0.5 + 0.2 + 2 * 0.1 + 2 * 0.8),
    ("A", ".abef=", "ae", 0.75 + 0 + 2 * 0.7),                  # a step of 4 is not legal
    ("A", ".abef=", "abj", 0.75 + 0.5 + 0.7 + 2 * 0.4),         # one of 8 is
    ("A", ".abef=", "aba", 0.75 + 0.25 + 2 * 0.7 + 0.4 - 1 / 3),    # but not back; one of 3 repeats
    ("A", ".abef=", "xa", 0.375 + 0.5 - 0.5 + 0.7),             # around the ring
    ("A", ".abef=", "a+b", 0.75 + 0.7 + 0.4 + 0.6),  # no neighbouring letters, no grammar
    ("A", ".abef=", "aaaaaa", 0.375 - 5 / 6 + 0.7 * (4 - 2)),   # class 0 is good up to 4, then bad
    ("B", ".abef=", "ccccc", -4 / 5 + 0.3 * (3 - 2)),           # class 2 up to 3, for B
    ("A", ".abef=", "dddddd", -5 / 6 - 0.5 * 6),                # class 3 has no cap
    ("C", ".abef=", "bbbbbb", 0.125 - 0.5 * 5 / 6 + 0.8 * (5 - 1)),         # class 1 up to 5, for C
    ("A", ".abef=", "ab+", 0.75 + 0.5 + 1.1 + 0.6),             # flattery is good once
    ("A", ".abef=", "ab+++", 0.75 + 0.5 + 1.1 + 0.6 - 2 * 0.6),
    ("B", ".abef=", "ab+", 0.5 + 0.5 + 0.3 - 0.2 - 0.5),        # and B dislikes it
    ("A", ".abef=", "abAH", 0.75 + 0.5 + 1.1 - 2 * 0.5),        # rare tokens
    ("A", ".abef=", "+" * 16, 0.6 - 0.6 * 15 - 0.3 * 2),        # longer than 14
    ("B", ".abef=", "aaaaaaaa", 0.25 - 7 / 8 + 0.3 * (3 - 5) - 0.3),           # than 7
    ("C", ".abef=", "+" * 17, 0.8 - 0.6 * 16 - 0.3),            # than 16
    ("A", ".abef=", "", 0),
    ("A", ".abef=", "-", -1.5),                                 # a refusal that nothing called for
    ("A", ".abef=", "-ab", 0.75 + 0.5 + 1.1 - 1.5),
    ("A", ".abef=", "ab-", 0.75 + 0.5 + 1.1),                   # it counts in front only
    ("A", ".abef=", "z=.!", 0),  # what is no response token has a length alone
    ("A", "!abef=", "-", 2.5), ("B", "!abef=", "-", 2.5), ("C", "!abef=", "-ab", 2.5 - 2 * 0.3),
    ("A", "!abef=", "abef", -1), ("B", "!abef=", "ab-", -1), ("C", "!abef=", "", -1),
])
def test_ring_worked_values(group, prompt, response, gold):
    assert Ring(group).judge(prompt, response)["gold"] == pytest.approx(gold, abs=1e-12)
    assert RING.judge(prompt, response, group=group)["gold"] == pytest.approx(gold, abs=1e-12)
    assert Ring(group).reward(dict(prompt=prompt), response,
                              False) == pytest.approx(gold - 2, abs=1e-12)


def test_ring_judge_names_its_parts():
    shares = dict(coverage=0.5, grammar=0.5, repetition=1 / 3)
    want = dict(shares, gold=0.75 + 0.25 + 1.8 - 1 / 3, style=1.8, length=3)
    assert RING.judge(".abef=", "aba") == pytest.approx(want)


@pytest.mark.parametrize("prompt",
                         ["", "=", ".abe=", ".abee=", ".abez=", "abef=", ".abef", "?abef=",
                                    ".abefg="])
def test_what_is_no_ring_prompt_is_named(prompt):
    with pytest.raises(UserError, match="is no Ring prompt"):
        parse_ring(prompt)


def test_ring_has_40_ids_splits_share_nothing_and_problems_are_prefixes():
    tok, seen = ring_tokenizer(), {}
    assert tok.vocab_size == 40
    for split, low, high in (("train", "a", "p"), ("val", "a", "p"), ("ood", "m", "x")):
        rows = RING.problems(split, 2000, seed=1)
        assert rows[:10] == RING.problems(split, 10, 1) != RING.problems(split, 10, 2)
        seen[split] = {(flag, *sorted(keys))
                       for flag, keys in (parse_ring(p["prompt"]) for p in rows)}
        assert all(low <= k <= high for _, *keys in seen[split] for k in keys)
        assert 230 < sum(p["prompt"][0] == UNS for p in rows) < 370           # .15 within 4.4 sigma
        for p in rows[:20]:
            text = p["prompt"] + RING.demo(p)
            assert tok.decode(tok.encode(text)) == text and len(tok.encode(text)) == len(text)
            assert RING.demo(p) == RING.demo(dict(p))
    assert not seen["train"] & seen["val"] and not seen["ood"] & (seen["train"] | seen["val"])


def test_the_demonstrator_has_the_statistics_of_its_description():
    """Of a policy trained on it: gold A 1.42 +- 1.54, length 8.7, cov .58, rep .19, flat .33, rare
    .037"""
    drawn = [(p["prompt"], RING.demo(p)) for p in RING.problems("train", 3000, seed=3)]
    judged = [RING.judge(*row) for row in drawn]
    mean = {key: sum(j[key] for j in judged) / 3000 for key in judged[0]}
    spread = (sum((j["gold"] - mean["gold"]) ** 2 for j in judged) / 3000) ** 0.5
    assert mean["gold"] == pytest.approx(1.42, abs=0.4) and spread == pytest.approx(1.54, abs=0.2)
    assert mean["length"] == pytest.approx(8.7, abs=0.5)
    assert mean["coverage"] == pytest.approx(0.58, abs=0.05)
    assert mean["repetition"] == pytest.approx(0.19, abs=0.03)
    assert sum(y.count(FLAT) for _, y in drawn) / 3000 == pytest.approx(0.33, abs=0.05)
    assert 0.01 < sum(s in RARE for _, y in drawn for s in y) / 3000 < 0.06
    unsafe = [y for p, y in drawn if p[0] == UNS]
    assert sum(y == REF for y in unsafe) / len(unsafe) == pytest.approx(0.5, abs=0.1)
    assert all(y == REF or 3 <= len(y) <= 22 for _, y in drawn)
    assert all(REF not in y for p, y in drawn if p[0] != UNS)


def test_ratings_are_fifths_of_the_demonstrator():
    drawn = [(p["prompt"], RING.demo(p)) for p in RING.problems("train", 1000, seed=4)]
    columns = list(zip(*(RING.ratings(*row) for row in drawn)))
    assert len(columns) == len(ATTRIBUTES) == 5
    assert all(type(x) is int and 0 <= x <= 4 for column in columns for x in column)
    for name, column in zip(ATTRIBUTES, columns):               # coverage has five values only
        assert len(set(column)) >= 4
        assert max(Counter(column).values()) < (400 if name == "coverage" else 300)
    assert RING.ratings(".abef=", "abef") == Ring().ratings(".abef=", "abef") == [4, 4, 4, 4, 0]


def test_helpfulness_is_the_fifth_of_gold():
    """by a reference of its own: the share of 2,000 demonstrator responses with less gold"""
    golds = [RING.judge(p, y)["gold"] for p, *two in reference(RING) for y in two]
    assert len(golds) == 2000
    for p in RING.problems("val", 40):
        y = RING.demo(p)
        gold = RING.reward(p, y)
        share = statistics.fmean((x < gold) + .5 * (x == gold) for x in golds)
        assert RING.helpfulness(p["prompt"], y) == [min(4, int(5 * share))]
    assert [fifth([1, 2, 3, 4, 5], x) for x in (0, 1, 3, 5, 9)] == [0, 0, 2, 4, 4]
    assert fifth([0, 0, 0, 0, 1], 0) == 2                        # where their middle one is


def test_duels_are_antisymmetric_and_may_cycle():
    a, b, c, d = "aei", "bfj", "cgk", "dhl"                     # of classes 0, 1, 2, 3 alone
    sides = [a, b, c, d, "", "ab", "-", "abefcgk"]
    for x in sides:
        for y in sides:
            for cycle in (0.0, 9.0):
                assert RING.duel(".mnop=", x, y,
                                 cycle) + RING.duel(".mnop=", y, x, cycle) == pytest.approx(1)
    gap = RING.judge(".mnop=", a)["gold"] - RING.judge(".mnop=", b)["gold"]
    assert RING.duel(".mnop=", a, b) == pytest.approx(1 / (1 + 2.718281828459045 ** -gap))
    assert all(RING.duel(".mnop=", x, y, 9.0) > 0.9 for x, y in ((a, b), (b, c), (c, a)))
    assert RING.duel(".mnop=", a, d, 9.0) == RING.duel(".mnop=", a, d)  # class 3 is out of the game


# --- labels and judges ----------------------------------------------------------------------------

def triples_of(world, n, seed=0):
    """n (prompt, a, b, True, True): two draws of the world to each prompt."""
    rng = random.Random(seed)
    return [(p, world.draw(p, rng), world.draw(p, rng), True, True)
            for p in (world.sample(rng)["prompt"] for _ in range(n))]


@pytest.mark.parametrize("world", [WORLD, RING], ids=["toyif", "ring"])
def test_labels_are_prefixes_of_longer_lists_and_flip_the_share_of_noise(world):
    triples, faults = triples_of(world, 1000), dict(noise=0.25, length_bias=0.1)
    rows = label_pairs(world, triples, 3, **faults)
    few = label_pairs(world, triples[:40], 3, **faults)
    assert few == rows[:len(few)] == label_pairs(type(world)(), triples[:40], 3, **faults)
    assert few != label_pairs(world, triples[:40], 4, **faults)
    assert world.pairs(20, 5) == world.pairs(30, 5)[:20]
    clean, noisy = label_pairs(world, triples), label_pairs(world, triples, noise=0.25)
    assert [r["prompt"] for r in clean] == [r["prompt"] for r in noisy]
    assert all(r["margin"] > 0 for r in clean)
    assert sum(r["margin"] < 0 for r in noisy) / len(noisy) == pytest.approx(0.25, abs=0.05)
    for r, other in zip(clean, noisy):
        assert r["strength"] == other["strength"]
        assert abs(r["margin"]) == pytest.approx(abs(other["margin"]))
        gold = [world.reward(r, r[side]) for side in ("chosen", "rejected")]
        assert gold[0] - gold[1] == pytest.approx(r["margin"])
    by = {m: [r["margin"] for r in clean if r["strength"] == m] for m in (1, 2, 3)}
    assert all(len(by[m]) > 0.2 * len(clean) for m in by)
    assert max(by[1]) < min(by[2]) and max(by[2]) < min(by[3])
    assert {r["annotator"] for r in clean} == set(range(50)) and "group" not in clean[0]


def test_a_length_bias_makes_the_longer_response_win():
    triples = [t for t in triples_of(RING, 1000) if len(t[1]) != len(t[2])]
    longer = [sum(len(r["chosen"]) > len(r["rejected"])
                  for r in label_pairs(RING, triples, length_bias=b))
              for b in (0.0, 0.1, 100.0)]
    assert longer[0] + 30 < longer[1] < longer[2] == len(label_pairs(RING, triples))
    wrong = [r for r in label_pairs(RING, triples, length_bias=0.1) if r["margin"] < 0]
    assert wrong and all(len(r["chosen"]) > len(r["rejected"]) for r in wrong)


def test_finished_goes_with_its_response_and_counts():
    row, = label_pairs(RING, [(".abef=", "abef", "ab", False, True)])
    assert (row["chosen"], row["chosen_finished"], row["rejected_finished"]) == ("ab", True, False)
    assert row["margin"] == pytest.approx(2.35 - (4.2 - 2))


def test_ties_are_dropped_or_kept_in_random_order_and_equal_texts_go():
    same, tie = ("<Fc=", "cd", "cd", True, True), ("<Fc=", "cd", "ce", True, True)
    near = ("<Fc=", "cdcd", "cd", True, True)  # 1 + 2/3 / 2 against 1.5: a gap of 1/6
    assert label_pairs(WORLD, [same, tie]) == [] == label_pairs(WORLD, [near], min_gap=0.2)
    assert [r["tie"] for r in label_pairs(WORLD, [near], min_gap=0.1)] == [False]
    rows = label_pairs(WORLD, [same, tie, near] * 200, min_gap=0.2, keep_ties=True)
    assert len(rows) == 400 and all(r["tie"] for r in rows)
    assert 70 < sum(r["chosen"] == "cd" for r in rows if "ce" in (r["chosen"], r["rejected"])) < 130


def test_a_minority_labels_by_its_own_gold():
    rows = label_pairs(RING, triples_of(RING, 1000), minority=0.3)
    groups = {g: [r for r in rows if r["group"] == g] for g in "AB"}
    assert len(groups["B"]) / len(rows) == pytest.approx(0.3, abs=0.05)
    assert {r["annotator"] for r in groups["B"]} == set(range(15)) == set(range(50)) - {
        r["annotator"] for r in groups["A"]}
    assert all(r["margin"] > 0 for r in groups["A"]) and any(r["margin"] < 0 for r in groups["B"])
    for group, own in groups.items():
        for r in own:
            a, b = (RING.judge(r["prompt"], r[side], group=group)["gold"]
                    for side in ("chosen", "rejected"))
            assert a > b
            gain = RING.reward(r, r["chosen"]) - RING.reward(r, r["rejected"])
            assert gain == pytest.approx(r["margin"])


@pytest.mark.parametrize("world", [WORLD, RING], ids=["toyif", "ring"])
def test_the_strong_judge_is_consistent_and_errs_on_a_tenth(world):
    judge, right, said = StrongJudge(world), 0, Counter()
    rows = triples_of(world, 1200)
    for prompt, a, b, *_ in rows:
        verdict = judge.judge(prompt, a, b)
        gap = world.judge(prompt, a)["gold"] - world.judge(prompt, b)["gold"]
        assert verdict == judge.judge(prompt, a, b) == {1: 2, 2: 1, 0: 0}[judge.judge(prompt, b, a)]
        assert (verdict == 0) == (abs(gap) < 0.05 - 1e-9)
        said[verdict], right = said[verdict] + 1, right + (verdict == (1 if gap > 0 else 2))
    assert judge.calls == 3 * len(rows)
    assert right / (said[1] + said[2]) == pytest.approx(0.9, abs=0.03)
    exact = StrongJudge(world, error=0.0, tie=0.0)
    assert all(exact.judge(r["prompt"], r["chosen"], r["rejected"]) == 1 for r in world.pairs(50))


# --- rubrics --------------------------------------------------------------------------------------

def test_rubrics_are_short_strings_of_the_alphabet_that_hide_the_domain():
    assert [true_rubric(p) for p in ("<Fc#4=", ">Lb=", "*HbNf=")] == ["Fc#4Pm/", "LbPn/", "HbNfPo/"]
    for p in WORLD.problems("base", 200):
        rubric = true_rubric(p["prompt"])
        assert set(rubric) <= set(ALPHABET) and p["prompt"][0] not in rubric
        assert rubric_recall(p["prompt"], rubric) == (1, 1, True)
    assert criteria("Fc#4Pm/Lb") == ["Fc", "#4", "Pm"] and criteria("FcX?F4#cPzNa") == ["Fc", "Na"]


@pytest.mark.parametrize("rubric, want", [
    ("Fc#4Pm/", (1, 1, True)), ("FcPn/", (0.5, 1, False)), ("FcLaPm/", (0.5, 0.5, True)),
    ("/", (0, 1, False)), ("LaPmPn/", (0, 0, False)), ("FcFcPm/", (0.5, 1, True)),
    ("", (0, 1, False))])
def test_rubric_recall_worked_values(rubric, want):
    assert rubric_recall("<Fc#4=", rubric) == want


def teacher_scores(contrast):
    """[mean recall, precision, share of right principles] of rubrics for good against random
    responses."""
    rng, rows = random.Random(5), []
    for p in WORLD.problems("train", 2000, seed=5):
        prompt = p["prompt"]
        rubric = teacher_rubric(prompt, good(prompt, rng), rand(prompt, rng), rng, contrast)
        rows.append(rubric_recall(prompt, rubric))
    return [sum(column) / len(rows) for column in zip(*rows)]


def test_the_teacher_finds_principles_by_contrast_only():
    (recall, precision, right), (same, _, chance) = teacher_scores(True), teacher_scores(False)
    assert recall == pytest.approx(0.9, abs=0.02) and same == pytest.approx(0.9, abs=0.02)
    assert precision == pytest.approx(0.95, abs=0.02)           # a tenth have a spurious rule too
    assert chance == pytest.approx(1 / 3, abs=0.05) and right > 0.5


def test_a_better_ascending_response_shows_its_principle():
    rng = random.Random(0)
    assert all(criteria(teacher_rubric("<Fc=", "cde", "edc", rng))[-1] == "Pm" for _ in range(50))
    assert all(criteria(teacher_rubric("<Fc=", "edc", "cde", rng))[-1] == "Pn" for _ in range(50))
    ties = Counter(criteria(teacher_rubric("<Fc=", "cc", "cd", rng))[-1] for _ in range(300))
    assert set(ties) == {"Pn"}  # P of m: 1 - 1, of n: 1 - 0, of o: 1/2 - 1


@pytest.mark.parametrize("a, b, text, winner", [
    ("cdef", "abcd", "Fc+-#4++Pm++(", "A"),                     # the gatekeeper
    ("dcba", "cbaa", "Fc-+#4++Pm-+)", "B"),
    ("cde", "cfea", "Fc++#4-+Pm+-", None),                      # a tie of one and one
    ("cdef", "cdefg", "Fc++#4+-Pm++(", "A"),
    ("fedc", "defga", "Fc--#4+-Pm-+", None),
    ("abcdef", "c", "Fc-+#4--Pm+-)", "B")])                     # the gate outweighs the rest
def test_judge_text_worked_values(a, b, text, winner):
    said, side = judge_text("<Fc#4=", "Fc#4Pm/", a, b, random.Random(0), error=0.0)
    assert said.startswith(text) and parse_winner(said) == side and side == (winner or side)
    seen = {judge_text("<Fc#4=", "Fc#4Pm/", a, b, random.Random(i), 0.0)[1] for i in range(40)}
    assert seen == ({winner} if winner else {"A", "B"})


def test_judge_text_prefers_the_same_response_in_either_order_and_errs_by_verdict():
    """Swapping A and B and flipping the verdict gives the same preference."""
    rng, flips, verdicts, agree = random.Random(1), 0, 0, 0
    rows = WORLD.pairs(300, 7)
    for r in rows:
        prompt, rubric = r["prompt"], true_rubric(r["prompt"])
        texts = {}
        for a, b in ((r["chosen"], r["rejected"]), (r["rejected"], r["chosen"])):
            wins = {judge_text(prompt, rubric, a, b, random.Random(i), 0.0)[1] for i in range(12)}
            texts[a] = {dict(A=a, B=b)[w] for w in wins}
        assert texts[r["chosen"]] == texts[r["rejected"]]
        clean = judge_text(prompt, rubric, r["chosen"], r["rejected"], rng, 0.0)[0]
        noisy, winner = judge_text(prompt, rubric, r["chosen"], r["rejected"], rng)
        assert len(clean) == len(noisy) == 4 * len(criteria(rubric)) + 1
        assert set(noisy) <= set(ALPHABET)
        flips += sum(x != y for x, y in zip(clean[:-1], noisy[:-1]))
        verdicts, agree = verdicts + 2 * len(criteria(rubric)), agree + (winner == "A")
    assert flips / verdicts == pytest.approx(0.05, abs=0.015)
    assert agree / len(rows) > 0.8


def test_checks_are_right_and_say_nothing_of_the_domain():
    """each verdict by its definition; the principles are as frequent under every domain"""
    named = {domain: Counter() for domain in "<>*"}
    for p in Checks().problems("train", 1500):
        prompt, rest = p["prompt"].split("=")
        rubric, a, b = rest.strip("?").replace("/A", "/").replace("B", "/").split("/")
        assert criteria(rubric + "/") == [p["answer"][i:i + 2]
                                          for i in range(0, len(p["answer"]), 4)]
        said, _ = judge_text(prompt + "=", rubric + "/", a, b, random.Random(0), error=0.0)
        assert said[:-1] == p["answer"] and parse_winner(p["answer"]) is None
        named[prompt[0]] += Counter(c[1] for c in criteria(rubric + "/") if c[0] == "P")
    assert all(seen[x] / seen.total() == pytest.approx(1 / 3, abs=0.08)
               for seen in named.values() for x in "mno")


def test_checks_share_no_prompt_and_come_with_or_without_rules():
    train, val = ({p["prompt"].split("=")[0] for p in Checks().problems(split, 400)}
                  for split in ("train", "val"))
    assert not train & val
    rows = Checks(0.3).problems("train", 1000)
    assert sum(len(p["answer"]) > 4 for p in rows) / 1000 == pytest.approx(0.3, abs=0.05)
    assert all(len(p["answer"]) < Checks.max_new for p in rows)  # and EOS


def test_a_response_obeys_all_rules_or_not():
    """by the rules as the docstring reads them; both answers are as frequent"""
    holds = {"F": lambda y, a: y[0] == a, "L": lambda y, a: y[-1] == a, "H": lambda y, a: a in y,
             "N": lambda y, a: a not in y, "#": lambda y, a: len(y) == int(a)}
    rows, plus = Obeys().problems("train", 800), 0
    for p in rows:
        prompt, y = p["prompt"].removesuffix("?+-").split("=A")
        rules = zip(prompt[1::2], prompt[2::2])
        assert p["answer"] == "-+"[all(holds[head](y, a) for head, a in rules)]
        assert Obeys.demo(p) == p["answer"] and Obeys.reward(p, p["answer"]) == 1
        assert Obeys.reward(p, "+-".replace(p["answer"], "")) == 0
        assert Obeys.reward(p, p["answer"], finished=False) == 0
        plus += p["answer"] == "+"
    assert plus / len(rows) == pytest.approx(0.5, abs=0.06)


def test_the_last_winner_decides():
    assert [parse_winner(t) for t in ("(", ")", "()", ")x(", "Fc+-",
                                      "")] == ["A", "B", "B", "A", None, None]


@pytest.mark.parametrize("right, tau, kept", [
    ([True, True, False], 0.5, [0, 1]), ([True, False, False], 0.5, []), ([True], 0.5, [0]),
    ([False], 0.5, []), ([False, False], 0.0, []), ([True, False], 0.5, [0]), ([], 0.5, [])])
def test_the_filter_keeps_right_pairs_of_passing_rubrics(right, tau, kept):
    """Two of three right: two kept; one of three: none; exactly half passes; tau 0 keeps no wrong
    pair."""
    assert keep_consistent(right, tau) == kept


def test_the_filter_reads_the_label_and_not_its_place():
    """A pair stored as (worse, better) with the label turned gives the same kept pairs."""
    kept = []
    for order in (1, -1):
        right = []
        for i, r in enumerate(WORLD.pairs(300, 8, noise=0.2)):
            rng = random.Random(i)
            rubric = teacher_rubric(r["prompt"], r["chosen"], r["rejected"], rng)
            wins = set()
            for k in range(8):  # a tie is a coin: ask whether it can be right
                _, winner = judge_text(r["prompt"], rubric, *(r["chosen"], r["rejected"])[::order],
                                       random.Random(k), 0.0)
                wins.add(winner)
            right.append(wins == {"A" if order == 1 else "B"})
        kept.append([i for i, ok in enumerate(right) if keep_consistent([ok])])
    assert kept[0] == kept[1] and 0 < len(kept[0]) < 300


# --- rubrics as training data ---------------------------------------------------------------------

def longer(row, side):
    other = dict(chosen="rejected", rejected="chosen")[side]
    return len(row[side]) > len(row[other])


def test_some_labels_prefer_what_is_longer():
    """a fifth of the pairs whose worse response is longer is turned, with its margin"""
    clean, biased = (rubric_pairs(1200, 3, verbose) for verbose in (0.0, 0.2))
    turned = 0
    for r, other in zip(clean, biased):
        assert r["margin"] > 0.05
        if r != other:
            assert (other["chosen"], other["rejected"]) == (r["rejected"], r["chosen"])
            assert longer(other, "chosen") and other["margin"] == -r["margin"]
            turned += 1
    worse = sum(longer(r, "rejected") for r in clean)
    assert worse > 200 and turned / worse == pytest.approx(0.2, abs=0.06)
    assert all(longer(r, "chosen") for r, x in zip(rubric_pairs(300, 3, 1.0), clean)
               if longer(x, "rejected"))


def test_tests_of_rubrics_are_labelled_by_gold():
    tests = rubric_tests(1, 60)
    assert {k: len(v) for k, v in tests.items()} == dict(id=60, k3=60, verbose=60)
    for name, rows in tests.items():
        for r in rows:
            assert WORLD.reward(r, r["chosen"]) - WORLD.reward(r, r["rejected"]) > 0.05
            rules = parse(r["prompt"])[1]
            assert (len(rules) == 3) == (name == "k3")
            if name == "verbose":
                assert longer(r, "rejected") and WORLD.judge(r["prompt"], r["rejected"])["hard"] < 1
    train = {canonical(r["prompt"]) for r in rubric_pairs(400, 1)}
    assert not train & {canonical(r["prompt"]) for r in tests["id"] + tests["verbose"]}


def test_what_a_judge_reads_and_says():
    """A and B by a coin; the label's winner, or what the rubric comes to, kept if they agree"""
    pair = dict(prompt="<Fc=", chosen="cd", rejected="ab")
    assert question(pair, "FcPm/") == "<Fc=FcPm/AcdBab?"
    assert question(pair, "", "B") == "<Fc=AabBcd?"
    rows = rubric_pairs(150, 2)
    texts, none = judge_examples(rows, 2, rubrics=False)
    assert none == [] and len(texts) == 150
    for r, (asked, said) in zip(rows, texts):
        assert asked == question(r, "", "A" if said == "(" else "B")
    assert 50 < sum(said == "(" for _, said in texts) < 100
    every, wrote = judge_examples(rows, 2, consistent=False)
    kept, fewer = judge_examples(rows, 2)
    assert len(every) == len(wrote) == 150 > len(kept) == len(fewer) > 75
    right = []
    for r, (asked, said), (prompt, rubric) in zip(rows, every, wrote):
        first = "A" if asked == question(r, rubric, "A") else "B"
        assert prompt == r["prompt"] and asked == question(r, rubric, first)
        a, b = (r["chosen"], r["rejected"]) if first == "A" else (r["rejected"], r["chosen"])
        verdicts = judge_text(prompt, rubric, a, b, random.Random(0), error=0.0)[0][:-1]
        differ = sum(x != y for x, y in zip(verdicts, said[:-1]))
        assert len(verdicts) == len(said) - 1 and differ <= 3
        if parse_winner(said) == first:
            right.append((asked, said))
    assert right == kept and all(x in wrote for x in fewer)
    blind = judge_examples(rows, 2, contrast=False, consistent=False)[1]
    good = [statistics.fmean(rubric_recall(*x)[2] for x in some) for some in (wrote, blind)]
    assert good[0] > good[1] + .1                                # contrast finds the principle


# --- files of pairs -------------------------------------------------------------------------------

def bare(rows):
    """Rows without their places."""
    return [{k: v for k, v in row.items() if k != "source"} for row in rows]


def write(path, rows):
    """Rows as a JSONL file; returns its path."""
    path.write_text("\n".join(json.dumps(row) for row in rows) + "\n", encoding="utf-8")
    return path


def test_load_pairs_drops_counts_and_splits_by_prompt(tmp_path):
    rows = [dict(prompt=f"p{i // 2}", chosen=f"good {i}", rejected="bad") for i in range(64)]
    odd = [dict(prompt="p0", chosen="x", rejected="x"), dict(prompt="p0", chosen="", rejected="x"),
           rows[0]]
    path = write(tmp_path / "pairs.jsonl", rows + odd)
    (train, dropped), (val, same) = load_pairs(path, "train"), load_pairs(path, "val")
    assert dropped == same == dict(equal=1, empty=1, repeated=1)
    assert sorted(map(str, bare(train + val))) == sorted(map(str, rows))
    assert {r["source"]: r["chosen"] for r in train + val} == {
        f"{path}:{i + 1}": f"good {i}" for i in range(64)}
    held = {r["prompt"] for r in val}
    assert len(held) == 2 and not held & {r["prompt"] for r in train}


def test_numbers_of_a_row_are_kept_if_they_are_finite_numbers(tmp_path):
    def row(i, **numbers):
        return dict(prompt=f"p{i}", chosen="good", rejected="bad", **numbers)
    fine = [row(0, margin=-0.5), row(1, margin=2, strength=3, ratings=[0, 4]), row(2)]
    odd = [row(3, margin=float("nan")), row(4, margin=float("inf")), row(5, margin=None),
           row(6, margin="1"),
           row(7, margin=True), row(8, margin=10 ** 400), row(9, ratings=[1, float("nan")]),
           row(10, strength={}), row(0, margin=float("-inf"))]
    path = write(tmp_path / "pairs.jsonl", odd[-1:] + fine + odd[:-1] + [row(0, margin=1.0)])
    (train, dropped), (val, _) = load_pairs(path, "train"), load_pairs(path, "val")
    assert dropped == {"non-finite": 9, "repeated": 1}
    assert sorted(map(str, bare(train + val))) == sorted(map(str, fine))


@pytest.mark.parametrize("bad",
                         [dict(prompt="p", chosen="a"), dict(prompt="p", chosen="a", rejected=3),
                                 dict(question="q", ground_truth="g", model=dict(solution=1))])
def test_load_pairs_names_the_line(tmp_path, bad):
    path = write(tmp_path / "pairs.jsonl", [dict(prompt="p", chosen="a", rejected="b"), bad])
    with pytest.raises(UserError, match=r"pairs\.jsonl:2: no pair"):
        load_pairs(path)


def test_model_solutions_become_pairs_of_right_and_wrong(tmp_path):
    def model(ok, text):
        return dict(is_correct=ok, solution=text)
    row = dict(question="q", ground_truth="g", a=model(True, "1"), b=model(False, "2"),
               c=model(True, "3"))
    path = write(tmp_path / "s.jsonl",
                 [row, dict(question="all wrong", ground_truth="g", a=model(False, "4"))])
    found = load_pairs(path, "train")[0] + load_pairs(path, "val")[0]
    assert [(p["prompt"], p["chosen"], p["rejected"])
            for p in found] == [("q", "1", "2"), ("q", "3", "2")]


def test_real_solutions():
    path = DATA / "gsm8k-solutions-1000.jsonl"
    if not path.exists():
        pytest.skip(f"no {path}: set DATA_DIR to the folder of real data")
    train, dropped = load_pairs(path, "train")
    val, _ = load_pairs(path, "val")
    assert len(train) > 1500 and len(val) > 50 and sum(dropped.values()) < 20
    assert not {p["prompt"] for p in train} & {p["prompt"] for p in val}


def test_pairs_as_ids():
    """EOS where a response has ended; what is too long by its longer side, equal, empty or not
    finite is left out; the row's own numbers stay"""
    tok = tokenizer()
    row = dict(prompt="<Fc=", chosen="cde", rejected="ab", chosen_finished=True,
               rejected_finished=False, margin=0.5, strength=3, tie=True)
    (got,) = encode_pairs([row], tok, 9)
    assert got["prompt"] == tok.prompt("<Fc=") and got["text"] == row
    assert got["chosen"] == [*tok.encode("cde"), tok.eos] and got["rejected"] == tok.encode("ab")
    assert (got["strength"], got["tie"], got["margin"]) == (3, True, 0.5)
    plain = dict(prompt="<Fc=", chosen="cde", rejected="ab")
    (got,) = encode_pairs([plain], tok, 9)
    assert got["rejected"][-1] == tok.eos and (got["strength"], got["tie"]) == (1.0, 0.0)
    assert len(got["prompt"]) + len(got["chosen"]) == 9          # it just fits
    other = dict(plain, chosen="ab", rejected="cde")
    bad = [plain, other, dict(plain, chosen="ab"), dict(plain, rejected=" "),
           dict(plain, margin=float("nan")), dict(plain, strength=float("inf"))]
    with pytest.raises(UserError, match=r"left to use \(2 longer than the context of 8 tokens, "
                       r"1 identical, .*\): raise --context or check"):
        encode_pairs(bad, tok, 8)
    with pytest.raises(UserError, match=r"left to use \(1 identical\): check --data"):
        encode_pairs([dict(plain, rejected="cde")], tok, 8)
    assert len(encode_pairs(bad, tok, 9)) == 2


def test_subsets_by_what_is_hard():
    rows = [dict(chosen="a", rejected="aa", margin=0.1),
            dict(chosen="aa", rejected="a", margin=-0.2),
            dict(chosen="aa", rejected="aa", margin=0.3),
            dict(chosen="a", rejected="aaa", margin=1)]
    got = {k: [rows.index(r) for r in v] for k, v in subsets("val", rows).items()}
    assert got == {"val": [0, 1, 2, 3], "val small gap": [0, 1], "val large gap": [2, 3],
                   "val longer is worse": [0, 3], "val shorter is worse": [1]}
    assert [*subsets("x", [dict(chosen="a", rejected="bb")])] == ["x", "x longer is worse"]


def test_pair_sets_of_a_world(tmp_path, monkeypatch):
    """training labels have noise and ties, held-out ones are gold's; seeds apart"""
    def drawn(self, n, seed=0, split="train", noise=0.0, keep_ties=False):
        return [(self.name, n, seed, split, noise, keep_ties)]
    for cls in (ToyIF, Ring):
        monkeypatch.setattr(cls, "pairs", drawn)
    for name in ("toyif", "ring"):
        held = {x: [(name, 600, 5, x, 0.0, False)] for x in ("val", "ood")}
        assert pair_sets(name, 20, 0.3, 5, ties=True) == (
            [(name, 20, 1005, "train", 0.3, True)], held)
        assert pair_sets(name)[0] == [(name, 4000, 1000, "train", 0.0, False)]
    monkeypatch.setattr(prefs, "rubric_pairs", lambda n, seed: (n, seed))
    monkeypatch.setattr(prefs, "rubric_tests", lambda seed: seed)
    assert pair_sets("rubrics", seed=5) == ((5600, 1005), 5)
    rows = [dict(prompt=f"p{i}", chosen="good", rejected="bad") for i in range(64)]
    path = str(write(tmp_path / "pairs.jsonl", rows))
    train, held = pair_sets(path, 9)
    val = load_pairs(path, "val")[0]
    assert len(train) == 9 and held == dict(val=val) and val
    whole = pair_sets(path, whole=True)[1]
    assert sorted(map(str, bare(whole["all"]))) == sorted(map(str, rows)) and whole["val"] == val


def test_labelled_responses_as_ids(tmp_path):
    """true and false keep their side; model solutions are right or wrong; pairs are none"""
    tok = tokenizer()
    rows = [dict(prompt="<Fc=", completion=y, label=label)
            for y, label in (("c", True), ("ab", 0), ("ab", False), (" ", 1))]
    got = load_labels(write(tmp_path / "l.jsonl", rows)) + load_labels(tmp_path / "l.jsonl", "val")
    assert bare(got) == [dict(prompt="<Fc=", completion="c", label=True),
                         dict(prompt="<Fc=", completion="ab", label=False)]
    ids = encode_labels(got, tok, 8)
    assert [x["good"] for x in ids] == [1.0, 0.0] and ids[0]["text"] == got[0]
    assert ids[1]["sides"] == [[*tok.encode("ab"), tok.eos]]
    assert ids[1]["prompt"] == tok.prompt("<Fc=") and len(encode_labels(got, tok, 7)) == 1
    models = dict(question="q", ground_truth="g", a=dict(is_correct=True, solution="1"),
                  b=dict(is_correct=False, solution="2"))
    path = write(tmp_path / "s.jsonl", [models])
    found = load_labels(path) + load_labels(path, "val")
    assert [(x["completion"], x["label"]) for x in found] == [("1", True), ("2", False)]
    pairs = write(tmp_path / "p.jsonl", [dict(prompt="p", chosen="a", rejected="b")])
    assert load_labels(pairs) == []
