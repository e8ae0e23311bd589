"""The world ToyIF by its worked values and promises, and files of pairs."""
import json
import os
import random
from collections import Counter
from pathlib import Path

import pytest

from data.prefs import ALPHABET, BEHAVIOURS, CONTENT, HAS, NO, ToyIF, load_pairs, parse, tokenizer
from data.run import UserError

WORLD = ToyIF()
DATA = Path(os.environ.get("DATA_DIR", Path(__file__).parents[2] / "shared" / "data"))


# --- the gold reward: values worked by hand -----------------------------------------------------------

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
        assert WORLD.judge(f"<{body}=", y)["principle"] == WORLD.judge(f">{body}=", y[::-1])["principle"]


@pytest.mark.parametrize("prompt", ["", "=", "<=", "Fc=", "<Fc", "<Fc#=", "<F4=", "<#c=", "<Xc=", "?Fc=",
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


# --- splits and behaviours ----------------------------------------------------------------------------

def canonical(prompt):
    """A prompt's meaning: its domain and rules, in whatever order they were written."""
    domain, rules = parse(prompt)
    return domain, tuple(sorted(map(str, rules)))


def test_splits_hold_what_they_promise():
    seen = {split: WORLD.problems(split, 3000, seed=1) for split in WORLD.splits}
    prompts = {split: {canonical(p["prompt"]) for p in rows} for split, rows in seen.items()}
    assert not prompts["train"] & prompts["val"] and not prompts["ood"] & (prompts["train"] | prompts["val"])
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
    judged = {s: [WORLD.judge(p["prompt"], WORLD.demo(p, s)) for p in problems] for s in BEHAVIOURS}
    gold = {style: sum(j["gold"] for j in rows) / 2000 for style, rows in judged.items()}
    assert all(j["hard"] == 1 for j in judged["good"]) and 1.40 < gold["good"] < 1.48
    assert gold["good"] > gold["copy"] > gold["rand"]
    for style in BEHAVIOURS:
        responses = [WORLD.demo(p, style) for p in problems]
        assert all(2 <= len(y) <= 6 and set(y) <= set(CONTENT) for y in responses)
    for p in problems[:200]:
        symbols = {a for _, a in parse(p["prompt"])[1] if isinstance(a, str)}
        assert not symbols or set(WORLD.demo(p, "copy")) <= symbols


def test_the_base_corpus_mixes_the_behaviours_in_proportion():
    """mean gold of the mixture = .3 good + .4 rand + .3 copy, each on the same prompts; any pair of rules"""
    base = ToyIF("mixture")
    problems = base.problems("train", 4000)
    gold = {s: sum(WORLD.reward(p, WORLD.demo(p, s)) for p in problems) / 4000 for s in BEHAVIOURS}
    mixed = sum(base.reward(p, base.demo(p)) for p in problems) / 4000
    assert mixed == pytest.approx(.3 * gold["good"] + .4 * gold["rand"] + .3 * gold["copy"], abs=0.03)
    assert any({h for h, _ in parse(p["prompt"])[1]} == {HAS, NO} for p in problems)
    assert all(base.demo(p) == base.demo(p) in {base.demo(p, s) for s in BEHAVIOURS} for p in problems[:50])
    with pytest.raises(UserError, match="no style 'godo'; did you mean 'good'"):
        ToyIF("godo")


def test_pairs_prefer_gold_and_noise_flips_that_share():
    for noise in (0.0, 0.2):
        rows = WORLD.pairs(2000, seed=2, noise=noise)
        for r in rows:
            chosen, rejected = (WORLD.reward(r, r[side]) for side in ("chosen", "rejected"))
            assert chosen - rejected == pytest.approx(r["margin"]) and chosen != rejected
        assert abs(sum(r["margin"] < 0 for r in rows) / 2000 - noise) < 0.04


@pytest.mark.parametrize("call, word", [
    (lambda: WORLD.problems("trian", 1), "did you mean 'train'"),
    (lambda: WORLD.problems("train"), "how many"),
    (lambda: WORLD.demo(dict(prompt="<Fc=", seed=1), "copi"), "did you mean 'copy'")])
def test_wrong_names_get_the_nearest(call, word):
    with pytest.raises(UserError, match=word):
        call()


# --- files of pairs -----------------------------------------------------------------------------------

def write(path, rows):
    """Rows as a JSONL file; returns its path."""
    path.write_text("\n".join(json.dumps(row) for row in rows) + "\n", encoding="utf-8")
    return path


def test_load_pairs_drops_counts_and_splits_by_prompt(tmp_path):
    rows = [dict(prompt=f"p{i // 2}", chosen=f"good {i}", rejected="bad") for i in range(64)]
    odd = [dict(prompt="p0", chosen="x", rejected="x"), dict(prompt="p0", chosen="", rejected="x"), rows[0]]
    path = write(tmp_path / "pairs.jsonl", rows + odd)
    (train, dropped), (val, same) = load_pairs(path, "train"), load_pairs(path, "val")
    assert dropped == same == dict(equal=1, empty=1, repeated=1)
    assert sorted(map(str, train + val)) == sorted(map(str, rows))
    held = {r["prompt"] for r in val}
    assert len(held) == 2 and not held & {r["prompt"] for r in train}


@pytest.mark.parametrize("bad", [dict(prompt="p", chosen="a"), dict(prompt="p", chosen="a", rejected=3),
                                 dict(question="q", ground_truth="g", model=dict(solution=1))])
def test_load_pairs_names_the_line(tmp_path, bad):
    path = write(tmp_path / "pairs.jsonl", [dict(prompt="p", chosen="a", rejected="b"), bad])
    with pytest.raises(UserError, match=r"pairs\.jsonl:2: no pair"):
        load_pairs(path)


def test_model_solutions_become_pairs_of_right_and_wrong(tmp_path):
    def model(ok, text):
        return dict(is_correct=ok, solution=text)
    row = dict(question="q", ground_truth="g", a=model(True, "1"), b=model(False, "2"), c=model(True, "3"))
    path = write(tmp_path / "s.jsonl", [row, dict(question="all wrong", ground_truth="g",
                                                  a=model(False, "4"))])
    found = load_pairs(path, "train")[0] + load_pairs(path, "val")[0]
    assert [(p["prompt"], p["chosen"], p["rejected"]) for p in found] == [("q", "1", "2"), ("q", "3", "2")]


def test_real_solutions():
    path = DATA / "gsm8k-solutions-1000.jsonl"
    if not path.exists():
        pytest.skip(f"no {path}: set DATA_DIR to the folder of real data")
    train, dropped = load_pairs(path, "train")
    val, _ = load_pairs(path, "val")
    assert len(train) > 1500 and len(val) > 50 and sum(dropped.values()) < 20
    assert not {p["prompt"] for p in train} & {p["prompt"] for p in val}
