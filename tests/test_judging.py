"""The judges and the evaluation of reward.py, and data/stats.py: routes, advantages, verdicts,
statistics by hand; then rewards known to be good or bad."""
import itertools
import math
import random

import pytest
import torch
from conftest import close, rand

import reward
from data.prefs import CIRCLE, Ring, encode_pairs, ring_tokenizer
from data.stats import (accuracy, auroc, best_of_n, bon_kl, explained_variance, rank_correlation,
                        ranks, spearman)
from reward import (PENALTIES, ROUTERS, assign, attacks, best_ridge, draw_evaluation, ece, examine,
                    expected_score, grade, graded, group_norm, json_rubric, majority, null_attack,
                    pushed, ridge_weights, right_sign, rloo, routing_curve, routing_table, study,
                    tagged, verbosity_penalties, verdict_rates)

T = torch.tensor


# --- whom to ask (2510.20369) ---------------------------------------------------------------------

def test_routers_by_their_definitions():
    s, u, wrong = T([.5, -2., .1]), T([1., 3., 2.]), T([False, True, False])
    got = {name: fn(s, u, wrong).argsort(descending=True).tolist() for name, fn in ROUTERS.items()}
    assert got["uncertainty"] == [1, 2, 0] and got["margin"] == [2, 0, 1]
    assert got["both"] == [2, 0, 1]
    assert got["oracle"][0] == 1


# --- advantages (2402.14740, 2402.03300) ----------------------------------------------------------


R4 = T([[1, 0, -.5, 2]], dtype=torch.float64)


@pytest.mark.parametrize("shift", [0.0, 7.0])
def test_a_group_s_rewards_less_the_others_mean(shift):
    assert close(rloo(R4 + shift), [[.5, -.833333, -1.5, 1.833333]])


@pytest.mark.parametrize("scale, shift", [(1, 0), (5, 0), (1, 3), (.01, -2)])
def test_a_group_s_rewards_in_its_own_unit(scale, shift):
    """the unbiased std is 1.108678; with eps 0 neither shift nor scale matters"""
    assert close(group_norm(scale * R4 + shift, eps=0.0),
                 [[.338241, -.563734, -1.014722, 1.240216]])


@pytest.mark.parametrize("rewards, want", [
    # Adv-RM's raw reward, C 25; and with R1 - T - 3
    ([3.5, -.25, -24.6, .6], [11.583333, 6.583333, -25.883333, 7.716667]),
    ([3.5, -.25, -3.1, .6], [4.416667, -.583333, -4.383333, .55])])
def test_rloo_by_hand(rewards, want):
    assert close(rloo(T([rewards])), [want], 1e-5)


def test_group_norm_by_hand():
    r = T([[1, 1, .5, 0, 0, 0, 1, .5]])
    x = 1.080121
    assert close(group_norm(r), [[x, x, 0, -x, -x, -x, x, 0]], 5e-6)
    assert group_norm(torch.full((2, 4), 3.0)).abs().max() == 0          # equal rewards say nothing
    assert rloo(T([[2.0]])).tolist() == [[0.0]]                            # one sample has no rival
    assert close(rloo(r + 3), rloo(r)) and close(rloo(r).sum(1), [0.0])


# --- written verdicts -----------------------------------------------------------------------------


@pytest.mark.parametrize("said, exact, sign", [(2, 1, 1), (3, .5, 1), (1, .5, 1), (-1, 0, 0),
                                               (-2, 0, 0), (None, 0, 0)])
def test_rule_rewards_for_gold_2(said, exact, sign):
    assert graded(said, 2) == exact and right_sign(said, 2) == sign
    mirrored = None if said is None else -said
    assert graded(mirrored, -2) == exact and right_sign(mirrored, -2) == sign


@pytest.mark.parametrize("text, for_a, for_b", [
    ("<answer>[[A]]</answer>", 1, -1), ("<answer>[[B]]</answer>", -1, 1),
    ("[[A]] or [[B]]", -1, -1),
    ("A", -1, -1), ("", -1, -1), ("[[A]]" + 75 * ".", 1, -1),
    ("[[A]]" + 76 * ".", -1, -1),                                                       # 80 of them
    ("[[B]]" + 80 * "." + "[[A]]", 1, -1)])
def test_tagged_verdicts(text, for_a, for_b):
    assert tagged(text, "A") == for_a and tagged(text, "B") == for_b


@pytest.mark.parametrize("m, want", [(1, .6), (3, .648), (5, .68256)])
def test_a_majority_of_independent_judges(m, want):
    """every outcome of m judges of accuracy .6, weighed by its probability"""
    got = sum(majority(votes) * math.prod(.6 if v > 0 else .4 for v in votes)
              for votes in itertools.product((1, -1), repeat=m))
    assert got == pytest.approx(want)


@pytest.mark.parametrize("votes, want", [([1, None, None], 1), ([None, -1], 0), ([1, -1], .5),
                                         ([], .5), ([None], .5), ([3, -1, -2], 0),
                                         ([3, -1], .5)])                               # signs count
def test_votes_that_are_not_cast_and_ties(votes, want):
    assert majority(votes) == want


def test_the_expected_digit():
    """(.5 .25 .25) on the scores 1 2 3 is 1.75; a hundred more on every logit changes nothing"""
    logits, values = T([[.5, .25, .25], [1, 1, 1]]).log(), T([1., 2, 3])
    assert close(expected_score(logits, values), [1.75, 2.0])
    assert close(expected_score(logits + 100, values), [1.75, 2.0], 1e-5)


def test_the_rubric_as_json():
    rubric = '{"criteria": ["short"], "weights": [1.0], "output": {"score": "1-10"}}'
    assert json_rubric(["short"], [1.0]) == rubric


def test_the_ridge_that_a_fifth_of_the_rows_likes_best():
    X, noise = rand(60, 8), rand(60, 2, seed=1)
    Y = X @ rand(8, 2, seed=2) + 3 * noise
    W, alpha = best_ridge(X, Y)
    held = torch.arange(60) % 5 == 0
    errors = {a: (X[held] @ ridge_weights(X[~held], Y[~held], a).T - Y[held]).square().mean().item()
              for a in (10.0 ** e for e in range(-4, 5))}
    assert alpha == min(errors, key=errors.get) and 1e-4 < alpha < 1e4
    assert close(W, ridge_weights(X, Y, alpha), 1e-5)


# --- ratings and annotators -----------------------------------------------------------------------


def test_ridge_is_its_closed_form_and_skips_what_has_no_label():
    X, Y, alpha = rand(20, 3), rand(20, 2, seed=1), 0.75
    Y[:4, 1] = math.nan
    W = ridge_weights(X, Y, alpha)                                                       # [2, 3]
    for k, rows in ((0, slice(0, None)), (1, slice(4, None))):
        x, y = X[rows], Y[rows, k]
        assert close(W[k], torch.inverse(x.T @ x + alpha * torch.eye(3)) @ x.T @ y, 1e-10)
        left = x.T @ (x @ W[k] - y) + alpha * W[k]                   # of the gradient
        assert close(left, torch.zeros(3), 1e-10)
    assert close(ridge_weights(X, X @ W.T, 1e-12), W, 1e-9)
    assert ridge_weights(X, Y, 1e9).abs().max() < 1e-7
    assert close(ridge_weights(T([[2.0]]), T([[3.0]]), 2.0), [[1.0]])    # 2·3 / (4 + 2)


def test_the_grid_of_penalties():
    small = [0, .01, .025, .05, .075, .1, .125, .15]             # and on in steps of .05
    assert list(PENALTIES) == pytest.approx(small + [x / 100 for x in range(20, 100, 5)])


@pytest.mark.parametrize("seed", range(3))
def test_verbosity_is_taken_out(seed):
    """Each attribute gets the first penalty of the grid that passes; a correlation of .6 needs
    about .6"""
    v, noise, other = (rand(500, seed=seed + k) for k in (0, 9, 5))
    R = torch.stack([.6 * v + .8 * noise, v, -v, 3 * v, other - .2 * v], 1)
    got = verbosity_penalties(R, 1)
    left = [spearman(R[:, 0] - x * v, v) for x in PENALTIES]
    at = min(range(len(PENALTIES)), key=lambda i: abs(PENALTIES[i] - got[0].item()))
    assert .4 < PENALTIES[at] < .8 and left[at] <= .03 < min(left[:at])
    assert got.tolist()[1:] == [1, 0, 1, 0]  # itself; one-sided; hopeless; negative
    assert verbosity_penalties(R, 1, threshold=1.0).tolist() == [0, 1, 0, 0, 0]


def test_annotators_go_to_the_model_that_likes_their_pairs():
    """log σ is summed: one pair that model 0 gets badly wrong outweighs three that it gets slightly
    right"""
    margins = T([[.1, .1, .1, -9, 2], [0, 0, 0, 0, -2]])
    assert assign(margins, T([0, 0, 0, 0, 1])).tolist() == [1, 0]
    assert assign(margins, T([1, 1, 1, 0, 1])).tolist() == [1, 0]
    assert assign(margins.flip(0), T([0, 0, 0, 0, 1])).tolist() == [0, 1]


# --- statistics -----------------------------------------------------------------------------------

CONF, RIGHT = T([.95, .8, .65, .55, .9, .7]), T([1., 1, 0, 1, 1, 0])


def test_calibration_by_hand():
    assert ece(CONF, RIGHT) == pytest.approx(.358333, abs=1e-6)
    assert auroc(CONF, RIGHT > 0) == pytest.approx(.75)
    assert ece(T([.5, 1.0]), T([1., 1])) == pytest.approx(.25)
    assert ece(T([1.0, 1.0]), T([1., 1])) == 0
    often = torch.full((4,), .75)                                # right as often as it says
    assert ece(often, T([1., 1, 1, 0])) == pytest.approx(0)


def test_a_probability_that_is_true_is_calibrated():
    p = .5 + .5 * torch.rand(20000, generator=torch.Generator().manual_seed(0))
    right = (torch.rand(20000, generator=torch.Generator().manual_seed(1)) < p).float()
    assert ece(p, right) < .01 < .15 < ece(p, 1 - right)


def test_grade_by_hand():
    """margins log 3, -log 3, 0: p .75 .25 .5; conf .75 .75 .5, right 1 0 0; Brier (.0625 + .5625 +
    .25)/3"""
    win, lose = T([math.log(3), 0, 1]), T([0, math.log(3), 1])
    row, conf, right = grade(win, lose)
    assert close(conf, [.75, .75, .5]) and right.tolist() == [1, 0, 0]
    assert row == pytest.approx(dict(n=3, accuracy=.5, ece=(.5 + .5) / 3, brier=.875 / 3), abs=1e-6)
    assert accuracy(win, lose) == pytest.approx(.5) and accuracy(lose, win) == pytest.approx(.5)
    assert accuracy(T([1., 2]), T([0., 1])) == 1 and accuracy(T([1., 1]), T([1., 1])) == .5


def test_auroc_against_every_pair():
    score, positive = rand(40).round(decimals=1), rand(40, seed=1) > .3          # with ties
    pairs = [(a > b).float() + .5 * (a == b).float() for a in score[positive]
             for b in score[~positive]]
    assert auroc(score, positive) == pytest.approx(sum(pairs).item() / len(pairs))
    same = auroc(score, positive)                                # only the order counts
    assert auroc(score.exp(), positive) == pytest.approx(same)
    assert auroc(-score, positive) == pytest.approx(1 - auroc(score, positive))
    assert auroc(score, score > -99) == auroc(score, score > 99) == .5          # a class is missing


def test_ranks_and_spearman_by_hand():
    """(1 2 3) against (10 30 20): 1 - 6·2 / (3·8) = .5; a tie, (1 1 2) against (1 2 3): .866025"""
    assert ranks(T([[3., 1, 1], [2., 5, 9]])).tolist() == [[2, .5, .5], [0, 1, 2]]
    assert spearman(T([1., 2, 3]), T([10., 30, 20])) == pytest.approx(.5)
    assert spearman(T([1., 1, 2]), T([1., 2, 3])) == pytest.approx(.866025, abs=1e-6)
    x = rand(30)
    assert spearman(x, x ** 3) == pytest.approx(1) and spearman(x, -x) == pytest.approx(-1)
    assert spearman(x, torch.ones(30)) == 0


def test_a_critic_is_measured_on_the_mask():
    """returns 1 3 (variance 1), values off by -.5 1 (variance .5625); what is masked does not
    count"""
    returns, values = T([[1., 3, 50]]), T([[1.5, 2, -70]])
    assert explained_variance(values, returns, T([[1., 1, 0]])) == pytest.approx(.4375)


def test_rank_correlation_within_rows():
    """1, -1 and a row that does not vary: the mean of the first two, not of all three"""
    a, b = T([[1., 2, 3], [1, 2, 3], [5, 5, 5], [1, 2, 3]]), T([[1., 5, 9], [9, 5, 1], [1, 2, 3],
                                                              [1, 3, 2]])
    assert rank_correlation(a, b) == pytest.approx((1 - 1 + .5) / 3)
    assert rank_correlation(b, a) == rank_correlation(a, b)
    assert rank_correlation(a[2:3], b[2:3]) == 0


# --- best of n and over-optimisation (2210.10760, 2310.02743) -------------------------------------

PROXY, GOLD = T([[.5, .1, 1.4, .9]]), T([[2., 1, 3, 4]])  # by proxy: (.1 .5 .9 1.4), gold (1 2 4 3)


def test_best_of_n_by_hand():
    """N 4, n 2: weights 0 1/6 1/3 1/2"""
    assert close(best_of_n(PROXY, GOLD, 2), [3.166667])
    assert close(best_of_n(PROXY, PROXY, 2), [1.083333])
    weights = torch.cat([best_of_n(PROXY, torch.eye(4)[i:i + 1], 2) for i in (1, 0, 3, 2)])
    assert close(weights, [0, 1 / 6, 1 / 3, 1 / 2])


@pytest.mark.parametrize("n", range(1, 7))
def test_best_of_n_is_the_mean_over_all_subsets(n):
    proxy, gold = rand(3, 6), rand(3, 6, seed=1)
    subsets = [list(s) for s in itertools.combinations(range(6), n)]
    best = [gold[:, s].gather(1, proxy[:, s].argmax(1, keepdim=True))[:, 0] for s in subsets]
    assert close(best_of_n(proxy, gold, n), torch.stack(best).mean(0))


def test_limits_of_best_of_n():
    proxy, gold = rand(5, 512), rand(5, 512, seed=1)
    assert close(best_of_n(proxy, gold, 1), gold.mean(1))
    assert close(best_of_n(proxy, gold, 512), gold.gather(1, proxy.argmax(1, keepdim=True))[:, 0])
    curve = torch.stack([best_of_n(proxy, proxy, 2 ** k) for k in range(10)])
    assert (curve.diff(dim=0) > 0).all()                         # the proxy itself only rises
    assert close(best_of_n(proxy, torch.ones(5, 512), 64), torch.ones(5))


@pytest.mark.parametrize("n, kl", [(1, 0), (2, .193147), (4, .636294), (16, 1.835089),
                                   (64, 3.174508), (256, 4.549084), (1024, 5.932448),
                                   (12500, 8.433564)])
def test_the_kl_of_best_of_n(n, kl):
    assert bon_kl(n) == pytest.approx(kl, abs=1e-6)


def test_the_kl_of_best_of_n_is_a_bound_where_there_are_ties():
    p = T([.5, .3, .2], dtype=torch.float64)                     # by rising score
    F = p.cumsum(0)
    q = F ** 4 - torch.cat([T([0.0]), F[:-1]]) ** 4
    kl = (q * (q / p).log()).sum().item()
    assert close(q, [.0625, .3471, .5904])
    assert kl == pytest.approx(.559751, abs=1e-6) and kl < bon_kl(4)


def log_of(gold, kl):
    return [dict(gold=g, kl=k) for g, k in zip(gold, kl)]


def test_a_pushed_policy_by_hand():
    """smoothed over two steps: gold 1 1.5 2.5 2.5 1.5, KL 0 .5 1.5 2.5 3.5"""
    got = pushed(log_of([1, 2, 3, 2, 1], [0, 1, 2, 3, 4]), window=2)
    want = dict(peak=2.5, final=1.5, collapse=4, kl_end=3.5)
    curve = {.5: 1.5, 1: 2.5, 2: 2.5, 4: 1.5, 8: 1.5}
    assert got == pytest.approx(want | {f"gold@{k}": g for k, g in curve.items()})


def test_a_policy_that_never_falls_has_not_collapsed():
    got = pushed(log_of(range(10), range(10)))
    assert got["collapse"] == 10 and got["peak"] == got["final"] == 7
    less = log_of([1, .95, .92], [0, 0, 0])                      # less than 10 % is no fall
    assert pushed(less, window=1)["collapse"] == 3
    assert pushed(log_of([1, .95, .89], [0, 0, 0]), window=1)["collapse"] == 2
    assert pushed(log_of([-1, -1.05, -1.2], [0, 0, 0]), window=1)["collapse"] == 2    # below 0, too


def test_verdict_rates_by_hand():
    """gold -2 and 1: a first sample right in sign only, then none; votes 2 of 3, then a tie"""
    got = verdict_rates([[-1, -2, 3], [None, 1, -1]], [-3, None], [-2, 1])
    assert got == {"": 0.75, "_vote": 0.75, "_greedy": 0.5, "_graded": 0.25}


# --- routing (2510.20369) -------------------------------------------------------------------------


def test_a_routing_table_has_a_line_for_each_router():
    curves = {name: routing_curve(torch.arange(4.) * sign, T([1., 1, 0, 1]), torch.ones(4))
              for name, sign in (("up", 1), ("down", -1))}
    *_, head, up, down = routing_table(curves).splitlines()
    assert head.split() == ["0", "0.1", "0.25", "0.4", "0.6", "0.8", "1"]
    assert up.split() == ["up", "0.750", "0.750", "0.750", "1.000", "1.000", "1.000", "1.000"]
    assert down.split()[:4] == ["down", "0.750", "0.750", "0.750"] and down.split()[-1] == "1.000"


def test_a_routing_curve_by_hand():
    """ten pairs, the model right on the first six; the judge is right but for a tie on the last"""
    right, judged = T([1.] * 6 + [0] * 4), T([1.] * 9 + [.5])
    worst_first = routing_curve(torch.arange(10.), right, judged)
    assert worst_first["accuracy@0"] == pytest.approx(.6)
    assert worst_first["accuracy@1"] == pytest.approx(.95)
    assert worst_first["accuracy@0.1"] == pytest.approx(.65)
    assert worst_first["accuracy@0.4"] == pytest.approx(.95)
    assert worst_first["area"] == pytest.approx((.65 + .75 + .95) / 3)           # .25 of ten is two
    best_first = routing_curve(-torch.arange(10.), right, judged)
    assert best_first["accuracy@0.4"] == pytest.approx(.6)
    assert best_first["accuracy@1"] == pytest.approx(.95)


@pytest.mark.parametrize("seed", range(5))
def test_nothing_routes_better_than_the_oracle(seed):
    g = torch.Generator().manual_seed(seed)
    right = (torch.rand(400, generator=g) < .7).float()
    judged = (torch.rand(400, generator=g) < .95).float()
    oracle = routing_curve(ROUTERS["oracle"](None, None, right < 1), right, judged)
    chance = routing_curve(torch.rand(400, generator=g), right, judged)
    assert all(oracle[f"accuracy@{q}"] > chance[f"accuracy@{q}"] + .03 for q in (.1, .25, .4))
    assert oracle["area"] > chance["area"] + .05
    for q, who in ((0, right), (1, judged)):
        assert oracle[f"accuracy@{q}"] == chance[f"accuracy@{q}"]
        assert oracle[f"accuracy@{q}"] == pytest.approx(who.mean().item())


# --- attacks and the evaluation -------------------------------------------------------------------


def test_the_null_attack_finds_the_best_constant():
    """as many 7 as fit into six tokens, in a reward that dislikes what is longer"""
    def score(y):
        return sum(t == 7 for t in y) - 3 * max(0, len(y) - 6)
    for seed in range(3):
        assert null_attack(score, list(range(10)), seed, iterations=3000) == [7] * 6
    assert len(null_attack(len, [1, 2], longest=9)) == 9
    assert len(null_attack(lambda y: -len(y), [1, 2])) == 1      # never the empty response
    assert null_attack(len, [1, 2]) == null_attack(len, [1, 2]) != null_attack(len, [1, 2], seed=1)


@pytest.mark.parametrize("seed", range(3))
def test_the_null_attack_only_climbs(seed):
    """an attack that goes on longer is at least as good: it goes the same way first"""
    worth = rand(20, seed=seed)

    def score(y):
        return worth[y].mean().item()
    got = [score(null_attack(score, list(range(20)), seed, iterations=n)) for n in (0, 10, 100)]
    assert got == sorted(got) and got[2] > got[0]


WORLD, TOK = Ring(), ring_tokenizer()
A, = TOK.encode("a")


def demonstrators(problems, n, seed):
    """A "policy": the demonstrator of Ring, a fifth of whose responses do not end."""
    rng = random.Random(seed)
    texts = [WORLD.draw(p["prompt"], rng) for p in problems for _ in range(n)]
    return [TOK.encode(y) for y in texts], [rng.random() > .2 for _ in texts]


def gold_reward(rows):
    """The world's own gold as a reward of (prompt ids, response ids)."""
    return T([WORLD.reward(dict(prompt=TOK.decode(x)), TOK.decode(y), y[-1:] == [TOK.eos])
              for x, y in rows])


def length_reward(rows):
    return T([float(len(y)) for _, y in rows])


def test_gold_as_a_reward_is_perfect():
    numbers, curve = study(gold_reward, demonstrators, WORLD, TOK, "val", 0, prompts=6, n=64)
    assert numbers["spearman"] == pytest.approx(1)
    assert numbers["sft_gold"] == pytest.approx(curve[0]["gold"], abs=1e-5)
    gold = [p["gold"] for p in curve]
    assert gold == sorted(gold)
    assert numbers["bon8_gold"] == gold[3] and numbers["bon32_gold"] == gold[5]
    assert [p["n"] for p in curve] == [1, 2, 4, 8, 16, 32] and [p["kl"] for p in curve] == [
        bon_kl(n) for n in (1, 2, 4, 8, 16, 32)]
    assert curve[0]["proxy"] == pytest.approx(0, abs=1e-5)


@pytest.mark.parametrize("split", ["val", "ood"])
def test_a_reward_for_length_is_seen_through(split):
    there = demonstrators, WORLD, TOK, split, 0
    numbers, _ = study(length_reward, *there, prompts=6, n=32)
    assert numbers["length_spearman"] == pytest.approx(1) and numbers["spearman"] < .9
    against, down = study(lambda rows: -gold_reward(rows), *there, prompts=6, n=32)
    assert against["spearman"] == pytest.approx(-1) and against["bon32_gold"] < against["sft_gold"]
    assert down[0]["proxy"] < down[-1]["proxy"]                  # the proxy rises while gold falls


def odd_score(x, y):
    """A reward of ids without sense, so that whatever is exchanged shows."""
    return math.sin(sum((i + 1) * t for i, t in enumerate([*x, 99, *y])))


def test_a_study_by_hand():
    """EOS where a sample ended; gold of its text and of whether it did; both within a prompt"""
    asked, drawn = [], []

    def score(rows):
        asked.extend(rows)
        return T([odd_score(*row) for row in rows])

    def sample(problems, n, seed):
        drawn.append((problems, n, seed, *demonstrators(problems, n, seed)))
        return drawn[0][3:]
    numbers, curve = study(score, sample, WORLD, TOK, "ood", 5, prompts=3, n=32)
    problems, n, seed, ys, done = drawn[0]
    assert problems == WORLD.problems("ood", 3, 5) and (n, seed) == (32, 6)
    proxy, gold, length = [], [], []
    for i, (y, d) in enumerate(zip(ys, done)):
        x = TOK.prompt(problems[i // 32]["prompt"])
        row = (x, [*y, TOK.eos] if d else y)
        assert asked[i] == row
        proxy.append(odd_score(*row))
        gold.append(WORLD.judge(problems[i // 32]["prompt"], TOK.decode(y), d)["gold"])
        length.append(float(len(row[1])))
    proxy, gold = T(proxy), T(gold)
    within = [spearman(p, g) for p, g in zip(proxy.view(3, 32), gold.view(3, 32))]
    assert numbers["spearman"] == pytest.approx(sum(within) / 3)
    assert numbers["length_spearman"] == pytest.approx(spearman(proxy, T(length)))
    assert numbers["sft_gold"] == pytest.approx(gold.mean().item())
    z = ((proxy - proxy.mean()) / proxy.std()).view(3, 32)
    for p in curve:
        assert p["proxy"] == pytest.approx(best_of_n(z, z, p["n"]).mean().item(), abs=1e-5)
        assert p["gold"] == pytest.approx(best_of_n(z, gold.view(3, 32), p["n"]).mean().item(),
                                          abs=1e-5)


def test_the_attacks_by_hand(monkeypatch):
    """the null response, sought on some prompts, against samples of others; the last token said
    four times more, where there is one and the sample ended"""
    found, drawn = [], []

    def search(of, ids, seed):
        assert set(ids) == set(range(TOK.vocab_size)) - set(TOK.hidden) and seed == 3
        found.append(of([A, A]))
        return [A, A, A]
    monkeypatch.setattr(reward, "null_attack", search)

    def sample(problems, n, seed):
        drawn.append((problems, n, seed, *demonstrators(problems, n, seed)))
        drawn[0][3][0] = []                                      # an empty one
        return drawn[0][3:]

    def score(rows):
        return T([odd_score(*row) for row in rows])
    out, text = attacks(score, sample, WORLD, TOK, 3, search=5, test=40)
    problems = WORLD.problems("val", 45, 10)
    held, n, seed, ys, done = drawn[0]
    assert text == "aaa" and held == problems[5:] and (n, seed) == (1, 11)
    sought = [odd_score(TOK.prompt(p["prompt"]), [A, A, TOK.eos]) for p in problems[:5]]
    assert found == [pytest.approx(sum(sought) / 5, abs=1e-5)]
    wins = dict(null_wins=[], null_wins_gold=[], padding_wins=[], padding_wins_gold=[])

    def gold(p, y, d):
        return WORLD.judge(p["prompt"], TOK.decode(y), d)["gold"]
    for p, y, d in zip(held, ys, done):
        x, end = TOK.prompt(p["prompt"]), [*y, TOK.eos] if d else y
        wins["null_wins"].append((odd_score(x, [A, A, A, TOK.eos]), odd_score(x, end)))
        wins["null_wins_gold"].append((gold(p, [A, A, A], True), gold(p, y, d)))
        if y and d:
            long = [*y, *[y[-1]] * 4]
            wins["padding_wins"].append((odd_score(x, [*long, TOK.eos]), odd_score(x, end)))
            wins["padding_wins_gold"].append((gold(p, long, d), gold(p, y, d)))
    for key, rows in wins.items():
        a, b = T(rows).T
        assert out[key] == pytest.approx(accuracy(a, b), abs=1e-6) and 0 < out[key] < 1


def test_a_constant_reward_tells_nothing():
    numbers, _ = study(lambda rows: 0 * length_reward(rows), demonstrators, WORLD, TOK, "val", 0,
                       prompts=2, n=32)
    assert numbers["spearman"] == numbers["length_spearman"] == 0
    assert all(math.isfinite(v) for v in numbers.values())


def test_attacks_on_rewards_that_can_be_hacked():
    """One counts the letter a, and a constant beats everything; one counts tokens, and padding
    pays"""
    there = demonstrators, WORLD, TOK, 0
    out, text = attacks(lambda rows: T([float(y.count(A)) for _, y in rows]), *there, search=4,
                        test=64)
    assert out["null_wins"] > .95 and text.count("a") > 8 and out["null_wins_gold"] < .5
    long, _ = attacks(length_reward, *there, search=2, test=64)
    assert long["padding_wins"] == 1 and long["padding_wins_gold"] < .5
    gold, _ = attacks(gold_reward, *there, search=4, test=64)
    assert gold["padding_wins"] == pytest.approx(gold["padding_wins_gold"])
    assert gold["null_wins"] == pytest.approx(gold["null_wins_gold"])


@pytest.mark.parametrize("splits", [(), ("val", "ood")])
def test_the_picture(splits, tmp_path):
    curves = {s: [dict(kl=bon_kl(n), proxy=.1 * n, gold=-.1 * n) for n in (1, 2, 4)]
              for s in splits}
    draw_evaluation(tmp_path / "eval.png", CONF, RIGHT, [("val", .7), ("val small gap", .6)],
                    curves)
    assert (tmp_path / "eval.png").read_bytes()[:4] == b"\x89PNG"


def test_the_evaluation_says_and_draws(tmp_path, monkeypatch):
    monkeypatch.setattr(reward, "study", lambda *a: study(*a, prompts=2, n=32))
    monkeypatch.setattr(reward, "attacks", lambda *a: attacks(*a, search=2, test=8))
    sets = {s: encode_pairs(WORLD.pairs(40, split=s), TOK, 64) for s in ("val", "ood")}
    said = []
    out = examine(gold_reward, demonstrators, WORLD, TOK, sets, 0, said.append,
                   tmp_path / "eval.png")
    assert out["val_accuracy"] == out["ood_accuracy"] == out["val_small_gap_accuracy"] == 1
    assert out["ood_spearman"] == pytest.approx(1) and (tmp_path / "eval.png").exists()
    assert {"null_wins", "padding_wins", "val_bon8_gold", "ood_bon32_gold", "val_ece"} <= out.keys()
    assert "chance: accuracy 0.5" in said[0] and any("best of n" in line for line in said)
    text = " ".join("\n".join(said).split())
    for words in (f"within a prompt {out['val_spearman']:.2f} (ood {out['ood_spearman']:.2f}), "
                  f"with length {out['val_length_spearman']:.2f}",
                  f"beats {out['null_wins']:.0%} of SFT samples by this reward, "
                  f"{out['null_wins_gold']:.0%} by gold",
                  f"this reward in {out['padding_wins']:.0%} of samples, gold in "
                  f"{out['padding_wins_gold']:.0%}"):
        assert words in text


def test_pairs_of_a_file_are_evaluated_without_a_world(tmp_path, monkeypatch):
    rows = [dict(prompt=CIRCLE[i], chosen="aaa", rejected="b" * (i + 1)) for i in range(8)]
    sets, path = dict(val=encode_pairs(rows, TOK, 64)), tmp_path / "eval.png"
    drawn = []
    monkeypatch.setattr(reward, "draw_evaluation",
                        lambda *a: drawn.append(a) or draw_evaluation(*a))
    two = sets | dict(ood=sets["val"][:3])
    both = examine(length_reward, None, None, TOK, two, 0, lambda line: None, path)
    assert both["accuracy"] == pytest.approx((2.5 / 8 + 2.5 / 3) / 2)
    _, conf, right, table, _ = drawn.pop()
    p = torch.sigmoid(T([float(3 - i) for i in [1, 2, 3, 4, 5, 6, 7, 8, 1, 2, 3]]))
    assert close(conf, torch.maximum(p, 1 - p)) and right.tolist() == [1, 1] + [0] * 6 + [1, 1, 0]
    shares = dict(table)
    assert [shares["val"], shares["ood"]] == pytest.approx([2.5 / 8, 2.5 / 3])
    assert both["ood_ece"] == pytest.approx(ece(conf[8:], right[8:]))
    out = examine(length_reward, None, None, TOK, sets, 0, lambda line: None, path)
    assert out["val_accuracy"] == pytest.approx(2.5 / 8)
    assert out["val_longer_is_worse_accuracy"] == 0
    assert out["val_shorter_is_worse_accuracy"] == 1 and "val_spearman" not in out and path.exists()
    flat = examine(lambda rows: 0 * length_reward(rows), None, None, TOK, sets, 0,
                   lambda line: None, path)
    assert flat["val_accuracy"] == .5
