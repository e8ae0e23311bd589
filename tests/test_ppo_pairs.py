"""ppo.py's methods that compare the responses of a prompt: a routed judge, a judge that reasons,
pairwise PPO. Every equation by hand, then what reaches each function in whole runs."""
import itertools
import math

import pytest
import torch
from conftest import close, rand

import ppo
from data.prefs import ToyIF
from ppo import (at_random, by_margin, by_uncertainty, dual_clip, group_norm, judge_matrix,
                 of_routing, p3o, p3o_joint, pair_gap, pair_scores, pairwise_grpo, pairwise_rloo,
                 parse_verdict, ppo_clip, route, spoken, to_go)

T = torch.tensor
R4 = T([1, 0, -.5, 2], dtype=torch.float64)
D4 = R4[:, None] - R4

# --- whom to ask (2510.20369) ---------------------------------------------------------------------

F12 = T([[0, 1, -.4], [-.6, 0, .5], [.8, -.9, 0]])
U12 = T([[0, 1.2, 1.6], [1.3, 0, 1.1], [1.5, 1.4, 0]])


def most_uncertain(s, u):
    return u


def asking(S, U, verdict, priority=most_uncertain, **limits):
    """route() of one group, whose judge says verdict(i, j).   -> S [K, K], the pairs asked"""
    S, where, verdicts = route(S[None], U[None], priority,
                               lambda where: [verdict(i, j) for _, i, j in where], **limits)
    assert len(where) == len(verdicts)
    return S[0], [(i, j) for _, i, j in where]


def test_both_orders_by_hand():
    S, U = pair_scores(F12, U12)
    assert close(S, [[0, .8, -.6], [-.8, 0, .7], [.6, -.7, 0]])
    assert close(U, [[0, 1.25, 1.55], [1.25, 0, 1.25], [1.55, 1.25, 0]])
    assert close(pairwise_rloo(S), [.1, -.05, -.05])
    both = pair_scores(torch.stack([F12, F12.T]) + 5 * torch.eye(3), torch.stack([U12, U12]))
    assert close(both[0], torch.stack([S, -S])) and close(both[1], torch.stack([U, U]))


def test_routing_by_hand():
    """only (1, 3) is above 1.45; the judge says that the first is better"""
    S, asked = asking(*pair_scores(F12, U12), lambda i, j: 1, threshold=1.45)
    assert asked == [(0, 2)] and close(pairwise_rloo(S), [1.4, -.05, -1.35])


@pytest.mark.parametrize("said, logit", [(1, 2.0), (2, -2.0), (0, 0.0), (None, -.6)])
def test_what_the_judge_says_replaces_the_score(said, logit):
    """a judge that fails leaves it"""
    S, _ = asking(*pair_scores(F12, U12), lambda i, j: said, threshold=1.45)
    assert close(S[0, 2], logit) and close(S + S.T, torch.zeros(3, 3))
    S, _ = asking(*pair_scores(F12, U12), lambda i, j: said, threshold=1.45, logit=5.0)
    assert close(S[0, 2], logit if said is None else 2.5 * logit)


def test_a_budget_is_a_share_of_all_groups_pairs_and_goes_where_it_is_needed_most():
    S, U = pair_scores(rand(3, 4, 4), rand(3, 4, 4, seed=1).exp() + 1)
    before = S.clone()
    every = [(p, i, j) for p in range(3) for i, j in itertools.combinations(range(4), 2)]
    order = sorted(every, key=lambda x: -U[x])
    small = sorted(every, key=lambda x: S[x].abs())
    for n in (0, 1, 7, 18):
        _, where, _ = route(S, U, most_uncertain, lambda w: [1] * len(w), budget=n / 18)
        assert where == order[:n]
        _, where, _ = route(S, U, lambda s, u: by_margin(s, u, None), lambda w: [0] * len(w),
                            budget=n / 18)
        assert where == small[:n]
    assert torch.equal(S, before) and len(route(S, U, most_uncertain, lambda w: [1] * len(w),
                                                budget=0.25)[1]) == 4           # 4.5, to even


def test_the_random_control_asks_about_as_many_anywhere():
    S, U = pair_scores(rand(5, 4, 4), 1 + rand(5, 4, 4, seed=1).abs())
    bar = U[:, *torch.triu_indices(4, 4, 1)].quantile(0.7).item()
    want = (U[:, *torch.triu_indices(4, 4, 1)] > bar).sum()
    seen = set()
    for seed in range(40):
        g = torch.Generator().manual_seed(seed)
        _, where, _ = route(S, U, lambda s, u, g=g: at_random(s, u, g), lambda w: [1] * len(w),
                            threshold=bar)
        assert len(where) == want == len({*where}) and all(i < j for _, i, j in where)
        seen |= {*where}
    assert len(seen) == 30 and any(U[x] <= bar for x in seen)
    assert by_uncertainty(S, U, None) is U


def test_limits_of_routing():
    """no budget, or a threshold that nothing passes: the model alone. u >= 1 > 0: the judge on
    all"""
    S, U = pair_scores(rand(5, 5), 1 + rand(5, 5, seed=1).abs())
    gold = rand(5, seed=2)
    for options in (dict(threshold=math.inf), dict(budget=0.0)):
        same, asked = asking(S, U, lambda i, j: 1, **options)
        assert not asked and torch.equal(same, S)
    judged, asked = asking(S, U, lambda i, j: 1 if gold[i] > gold[j] else 2)
    assert len(asked) == 10 and close(judged, 2 * torch.sign(gold[:, None] - gold))
    assert torch.equal(pairwise_rloo(judged).argsort(), gold.argsort())
    kept, asked = asking(S, U, lambda i, j: None)  # every call failed, and was paid for
    assert len(asked) == 10 and torch.equal(kept, S)


@pytest.mark.parametrize("seed", range(3))
def test_advantages_sum_to_zero_and_move_with_the_responses(seed):
    Fs, Us = rand(4, 4, seed=seed), 1 + rand(4, 4, seed=seed + 9).abs()
    gold = rand(4, seed=seed + 19)
    new = torch.randperm(4, generator=torch.Generator().manual_seed(seed))

    def advantages(fn, p):
        S, U = pair_scores(Fs[p][:, p], Us[p][:, p])
        return fn(asking(S, U, lambda i, j: 1 if gold[p[i]] > gold[p[j]] else 2, threshold=1.6)[0])
    for fn in (pairwise_rloo, pairwise_grpo):
        A = advantages(fn, torch.arange(4))
        assert A.sum().abs() < 1e-9 and close(advantages(fn, new), A[new])


@pytest.mark.parametrize("shift", [0.0, 7.0])
def test_differences_of_rewards_are_rloo(shift):
    r, want = R4 + shift, T([.5, -.833333, -1.5, 1.833333])
    assert close(pairwise_rloo(r[:, None] - r), want)
    assert close(pairwise_rloo(torch.stack([D4, -D4])), torch.stack([want, -want]))
    assert close(pairwise_rloo(D4, scale=3.0), 3 * want)


def test_a_group_s_scores_become_a_number_a_response():
    """its advantage; in a group of one the score against its rival"""
    assert close(spoken(torch.stack([D4, -D4]), 4)[[0, 3, 4]], [.5, 1.833333, -.5])
    assert spoken(T([[[0., 3], [-3, 0]], [[0, -1], [1, 0]]]), 1).tolist() == [3, -1]


def test_what_routing_tells():
    """two of three pairs asked; on one the judge agrees; std: of ±2 and of what is left, .7"""
    S, _ = pair_scores(F12, U12)
    mixed, where, verdicts = route(S[None], T([[[0, 3., 2], [3, 0, 1], [2, 1, 0]]]), most_uncertain,
                                   lambda w: [1, 1], budget=2 / 3)
    out = of_routing(S[None], mixed, where, verdicts)
    assert where == [(0, 0, 1), (0, 0, 2)] and out["agreement"] == 0.5
    assert close([out["asked"], out["std_routed"], out["std_unrouted"]], [2 / 3, 2, .7])
    none = of_routing(S[None], S[None], [], [])
    assert none.keys() == {"asked", "std_unrouted"} and none["asked"] == 0
    tie = of_routing(S[None], mixed, where, [0, None])
    assert "agreement" not in tie


# --- without a critic -----------------------------------------------------------------------------


def test_rewards_to_go_by_hand():
    mask = T([[0., 1, 1, 1], [1, 1, 0, 0]])
    A, returns = to_go(T([[9., -.1, .2, 1], [.5, -1, 9, 9]]), mask)
    assert returns is None and close(A, [[0, 1.1, 1.2, 1], [-.5, -1, 0, 0]])
    r, m = rand(3, 5), torch.ones(3, 5)
    assert close(to_go(r, m)[0], ppo.gae(r, torch.zeros(3, 5), m, 1.0, 1.0)[0])


def test_a_transform_in_a_group_s_own_unit():
    assert close(group_norm(R4, 4, group_eps=0.0), [.338241, -.563734, -1.014722, 1.240216])
    both = torch.cat([R4, 5 * R4 + 3])
    assert close(group_norm(both, 4, group_eps=0.0).view(2, 4)[1], group_norm(R4, 4, group_eps=0.0))
    assert group_norm(torch.full((4,), .1), 4).tolist() == [0] * 4
    assert group_norm(R4, 1) is R4


# --- a judge's verdicts (2505.16265) --------------------------------------------------------------


@pytest.mark.parametrize("scale, shift", [(1, 0), (5, 0), (1, 3), (.01, -2)])
def test_differences_of_rewards_are_grpo(scale, shift):
    """the denominator is the unbiased std, 1.108678; with eps 0 neither shift nor scale matters"""
    r = scale * R4 + shift
    assert close(pairwise_grpo(r[:, None] - r, eps=0.0), [.338241, -.563734, -1.014722, 1.240216])
    assert close(R4.std(), 1.108678)
    assert close(pairwise_grpo(torch.stack([D4, -3 * D4]), eps=0.0)[1],
                 [-.338241, .563734, 1.014722, -1.240216])


def test_pairwise_grpo_by_hand():
    D = judge_matrix({(0, 1): -2, (0, 2): 1, (1, 2): -3}, 3)
    assert D.tolist() == [[0, 2, -1], [-2, 0, 3], [1, -3, 0]]        # negative: the first is better
    assert close(pairwise_grpo(D), [.218218, .218218, -.436436])
    assert close((D ** 2).sum() / 12, 1.527525 ** 2, 1e-5)
    cycle = judge_matrix({(0, 1): -2, (1, 2): -2, (0, 2): 2}, 3)
    assert close(pairwise_grpo(cycle), torch.zeros(3))


def test_invalid_verdicts_count_as_nothing():
    D = judge_matrix({(0, 1): None, (0, 2): None, (1, 2): None}, 3)
    assert close(D, torch.zeros(3, 3)) and close(pairwise_grpo(D), torch.zeros(3))      # and no NaN
    assert close(judge_matrix({(0, 1): None}, 2, {(0, 1): 40}), torch.zeros(2, 2))
    some = judge_matrix({(0, 1): 3, (0, 2): None}, 3)
    assert some.tolist() == judge_matrix({(0, 1): 3}, 3).tolist()


def test_the_order_of_display_changes_nothing():
    says, length = {(0, 1): 2, (0, 2): -1, (1, 2): 3}, {(0, 1): 5, (0, 2): 7, (1, 2): 9}
    turned = {(j, i): -s for (i, j), s in says.items()}, {(j, i): n for (i, j), n in length.items()}
    assert torch.equal(judge_matrix(says, 3), judge_matrix(turned[0], 3))
    assert torch.equal(judge_matrix(says, 3, length), judge_matrix(turned[0], 3, turned[1]))


def test_of_both_orders_the_mean_counts():
    """d_12 = (s_21 - s_12) / 2: a judge that always prefers what it reads first says nothing"""
    assert judge_matrix({(0, 1): -1, (1, 0): 3}, 2).tolist() == [[0, 2], [-2, 0]]
    assert judge_matrix({(0, 1): -2, (1, 0): -2}, 2).tolist() == [[0, 0], [0, 0]]
    assert judge_matrix({(0, 1): -2, (1, 0): None}, 2).tolist() == [[0, 1], [-1, 0]]


def test_short_verdicts_weigh_more_and_eps_is_not_harmless():
    """lengths 1200 800 2000, 1 > 2, 1 > 3, 3 > 2: Σd²/12 = 4.2e-7 is below eps: half the
    advantages"""
    says, length = {(0, 1): -1, (0, 2): -3, (1, 2): 2}, {(0, 1): 1200, (0, 2): 800, (1, 2): 2000}
    D = judge_matrix(says, 3, length)                                          # only signs count
    assert close(D, [[0, 1 / 1200, 1 / 800], [-1 / 1200, 0, -1 / 2000], [-1 / 800, 1 / 2000, 0]])
    assert close(pairwise_grpo(D), [.583212, -.373256, -.209956], 2e-6)
    assert close(pairwise_grpo(D, eps=0.0), [1.074338, -.687576, -.386762], 2e-6)
    over_mean = {k: 3 * n / 4000 for k, n in length.items()}
    relative = judge_matrix(says, 3, over_mean)
    assert close(pairwise_grpo(relative), [1.074338, -.687576, -.386762], 1e-5)


@pytest.mark.parametrize("text, score", [
    ("<answer>-2</answer>", -2), ("thoughts 3 <answer> 1 </answer>", 1),
    ("<answer>3</answer> no: <answer>-1</answer>", -1),                      # the last block counts
    ("<answer>2 ... -3</answer>", -3),
    ("<answer>\nfrom 1\nto 2\n</answer>", 2),                                  # and its last number
    ("<answer>+2</answer>", 2), ("<answer>score:-3</answer>", -3),
    ("<answer>2.</answer>", 2), ("<answer>The score is -3.</answer>", -3),       # a full stop
    ("<answer>so...-3</answer>", -3), ("<answer>2...-3</answer>", -3),   # dots leave the sign alone
    ("<answer>0</answer>", None), ("<answer>10</answer>", None), ("<answer>-12</answer>", None),
    ("<answer>4</answer>", None), ("<answer>1.5</answer>", None), ("<answer>0.3</answer>", None),
    ("<answer></answer>", None), ("2", None), ("", None), ("<answer>2", None),
    ("<answer>2</answer><answer>0</answer>", None)])                   # it says nothing, but counts
def test_verdicts_are_parsed(text, score):
    assert parse_verdict(text) == score


def test_the_dual_clip_by_hand():
    """ρ 5 with A = -1 costs 3 and not 5, and has no gradient; elsewhere it is PPO's"""
    logp = T([[5.0, 2.0, 5.0, 0.5, 1.0]]).log().requires_grad_()
    adv = T([[-1.0, -1.0, 1.0, -1.0, 0.0]])
    loss = dual_clip(logp, torch.zeros(1, 5), adv)
    assert close(loss, [[3, 2, -1.2, .8, 0]])
    loss.sum().backward()
    assert logp.grad[0, 0] == 0 and close(logp.grad[0, 1], 2.0)
    x, old, A = rand(4, 6), rand(4, 6, seed=1), rand(4, 6, seed=2)
    assert close(dual_clip(x, old, A, dual=1e9), ppo_clip(x, old, A))


# --- pairwise PPO (2310.00212) --------------------------------------------------------------------


def of_bandit(logp, old, s):
    """A pair's log-probs and sequence rewards as responses of one token.   [2] each"""
    adv, _ = pair_gap(s[:, None], torch.ones(2, 1))
    return logp[:, None], old[:, None], adv, torch.ones(2, 1)


def test_pairwise_ppo_by_hand():
    """s = (1 .2), ρ = (1.3 .9): V1's terms .864 and -.936, V2's D = .367725"""
    known = of_bandit(T([1.3, .9]).log(), torch.zeros(2), T([1.0, .2]))
    assert close(p3o(*known), [-.864, .936]) and close(p3o(*known).mean(), .036)
    assert close(p3o_joint(*known), [-.0936, -.0936])


def test_the_gap_is_of_whole_responses_within_a_pair():
    mask = T([[0., 1, 1, 1], [0, 1, 0, 0], [0, 1, 1, 0], [0, 1, 1, 1]])
    rewards = T([[9., -.1, .2, 1], [9, .5, 9, 9], [0, 1, 1, 9], [0, 1, 1, 1]])
    A, returns = pair_gap(rewards, mask)
    assert returns is None
    assert close(A, mask * T([.6, -.6, -1.0, 1.0])[:, None])


@pytest.mark.parametrize("fn", [p3o, p3o_joint])
def test_pairwise_ppo_s_invariances(fn):
    """a shift of both rewards, the order of the pair, tokens off the mask; two equal responses say
    nothing"""
    mask = T([[0., 1, 1, 1], [0, 1, 1, 0], [0, 1, 1, 0], [0, 1, 1, 1]])
    logp, old, r = rand(4, 4), rand(4, 4, seed=1), rand(4, 4, seed=2)
    loss = fn(logp, old, pair_gap(r, mask)[0], mask)
    last = mask * (mask.cumsum(1) == mask.sum(1, keepdim=True))
    shifted = r + T([3., 3, -5, -5])[:, None] * last
    assert close(fn(logp, old, pair_gap(shifted, mask)[0], mask), loss, 1e-5)
    p = [1, 0, 3, 2]
    swapped = fn(logp[p], old[p], pair_gap(r[p], mask[p])[0], mask[p])
    assert close(swapped, loss[p])
    wild = torch.where(mask > 0, logp, torch.full_like(logp, 7.0))
    assert close(fn(wild, old, pair_gap(r, mask)[0], mask), loss)
    same = [x[[0, 0]] for x in (logp, old, pair_gap(r[[0, 0]], mask[[0, 0]])[0], mask)]
    assert fn(*same).tolist() == [0, 0]
    assert torch.isfinite(fn(logp + 999 * mask, old, pair_gap(r, mask)[0], mask)).all()


def in_expectation(fn, theta, old, s):
    """The gradient of a loss over all pairs of arms, weighed by the law that drew them."""
    theta = theta.clone().requires_grad_()
    logp, before, total = theta.log_softmax(0), old.log_softmax(0), 0.0
    for i, j in itertools.product(range(len(s)), repeat=2):
        loss = fn(*of_bandit(logp[[i, j]], before[[i, j]], s[[i, j]]), eps=1e9).mean()
        total = total + (before[i] + before[j]).exp() * loss
    total.backward()
    return theta.grad


@pytest.mark.parametrize("fn", [p3o, p3o_joint])
@pytest.mark.parametrize("moved", [0.0, 0.3])
def test_unclipped_the_gradient_is_that_of_the_mean_reward(fn, moved):
    """over all pairs of four arms, on the policy and off it"""
    theta, s = rand(4, seed=3).double(), R4
    exact = theta.clone().requires_grad_()
    (exact.softmax(0) * s).sum().backward()
    got = in_expectation(fn, theta, theta + moved * rand(4, seed=4).double(), s)
    assert close(got, -exact.grad, 1e-5)


def test_where_pairwise_ppo_is_clipped_it_has_no_gradient():
    """V1: w > 0 and ρ > 1 + ε, or w < 0 and ρ < 1 - ε;  V2: |D| > ε in the direction of w"""
    for ratio, w, flat in ((1.3, 1, True), (1.3, -1, False), (.7, -1, True), (.7, 1, False)):
        logp = T([ratio, 1.0]).log().requires_grad_()
        args = of_bandit(logp, torch.zeros(2), T([float(w), 0.0]))
        p3o(*args)[0].backward()
        assert (logp.grad[0] == 0) == flat and logp.grad[1] == 0       # the other's is a constant
        logp.grad = None
        p3o_joint(*args).sum().backward()
        assert (logp.grad == 0).all() == flat
