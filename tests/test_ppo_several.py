"""ppo.py's chapters of several rewards: their equations by hand, then what reaches them in runs."""
import math

import pytest
import torch
from torch.nn import functional as F

import ppo
from ppo import (Heads, TriWeights, TwinHeads, clipped_each, gae, gae_each, gae_pessimistic, gae_served,
                 huber_pair, inert, lagrangian, mixture, multiplier_step, nelder_mead_step, on_last, phase_of,
                 proxy_points, safe_gate, safe_kl, safe_pid, satisfying, soft_min, squared_each,
                 tri_factor, weighted, worst_served)

T = torch.tensor


def close(a, b, tol=1e-6):
    a, b = (torch.as_tensor(x, dtype=torch.float64) for x in (a, b))
    return a.shape == b.shape and torch.allclose(a, b, atol=tol, rtol=0)


def masks(B=5, T_=7):
    """all ones, one token alone, a prompt before the response, short ones"""
    mask = torch.zeros(B, T_)
    for row, (a, b) in zip(mask, [(0, 7), (6, 7), (2, 6), (0, 1), (1, 5)]):
        row[a:b] = 1
    return mask


def noise(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# --- several reward models ------------------------------------------------------------------------


def test_a_weighted_sum_by_hand():
    r = T([[1., 2, 4], [-1, 0, 3]])
    assert close(weighted(r, weights="0.6,0.3,0.1"), [1.6, -.3])
    assert close(weighted(r), [7 / 3, 2 / 3])                              # their mean
    assert close(weighted(r, weights="0.5,0.5,0"), weighted(r[:, :2]))     # no love: two objectives
    assert close(weighted(r, weights="0,0,1"), r[:, 2])


def test_a_score_on_the_last_token_of_every_head():
    mask = T([[0., 1, 1, 0], [0, 1, 1, 1]])
    out = on_last(T([[1., 2], [3, 4]]), mask)
    assert close(out, [[[0, 0], [0, 0], [1, 2], [0, 0]], [[0, 0], [0, 0], [0, 0], [3, 4]]])


def test_every_head_has_its_own_advantages():
    r, v, mask = noise(5, 7, 3), noise(5, 7, 3, seed=1), masks()
    adv, returns = gae_each(r, v, mask, 0.9, 0.7)
    for k in range(3):
        a, b = gae(r[..., k], v[..., k], mask, 0.9, 0.7)
        assert close(adv[..., k], a) and close(returns[..., k], b)


def test_linear_heads_start_at_zero_and_are_linear():
    heads = Heads(4, 3, "cpu")
    hidden = noise(2, 5, 4)
    assert heads(hidden).shape == (2, 5, 3) and not heads(hidden).any()
    heads.weight.data = noise(3, 4, seed=2)
    assert close(heads(hidden), hidden @ heads.weight.T, 1e-5)


# --- constrained ----------------------------------------------------------------------------------

U = T([.4, -.2])
A = T([[.5, -1., .2], [1., 0, -1], [-.3, .8, .1]]).T                       # [3 samples, N + 1]


@pytest.mark.parametrize("kind, mix", [("xi", [1.347875, -1.975327, -.036201]),
                                       ("mu", [.939211, -.591014, -.363442])])
def test_advantages_are_mixed_by_hand(kind, mix):
    assert close(A @ mixture(U, kind), mix)
    assert close(mixture(U, kind).sum(), 2)                                # weights of N rewards


def test_all_ppo_takes_weight_away_from_what_is_above():
    """1 - σ(.4), 1 - σ(-.2), and nothing of the KL"""
    assert close(mixture(U, "all"), [0, .401312, .549834])


def test_tanh_pushes_back_and_sigmoid_does_not():
    low = T([-2., -3.])
    assert (mixture(low, "xi")[1:] < 0).all() and (mixture(low, "mu")[1:] > 0).all()


@pytest.mark.parametrize("kind, u", [("mu", .0035), ("xi", .014)])
def test_a_multiplier_s_step_by_hand(kind, u):
    """.14 below its point: .1 · .14 · g'(0), which is ¼ of σ and 1 of tanh"""
    new, velocity = multiplier_step(T([0.]), T([0.]), T([-.14]), kind)
    assert close(new, [u])
    again, _ = multiplier_step(new, velocity, T([0.]), kind)               # momentum .1 alone
    assert close(again, [1.1 * u])


def test_a_multiplier_s_gradient_is_that_of_its_objective_and_is_clipped():
    u = T([.3, -.7], requires_grad=True)
    away = T([.2, -.1])
    for kind, g in (("mu", torch.sigmoid), ("xi", torch.tanh)):
        grad, = torch.autograd.grad((g(u) * away).sum(), u)
        new, _ = multiplier_step(u.detach(), torch.zeros(2), away, kind, lr=1.0)
        assert close(u.detach() - new, grad)
    new, _ = multiplier_step(T([0., 0]), torch.zeros(2), T([3., 4]), "xi", lr=1.0)
    assert close(new, [-.3, -.4])                                          # norm 5 becomes .5


def test_frozen_multipliers_are_ppo_with_fixed_weights():
    """each head's GAE is whitened before they are mixed, not after"""
    r, v, mask = noise(5, 7, 3), noise(5, 7, 3, seed=1), masks()
    mix = mixture(U, "xi")
    adv, returns = lagrangian(r, v, mask, mix, gamma=0.9, lam=0.7)
    want = 0
    for k in range(3):
        a, b = gae(r[..., k], v[..., k], mask, 0.9, 0.7)
        some = a[mask > 0]
        want = want + mix[k] * (a - some.mean()) / some.std(unbiased=False) * mask
        assert close(returns[..., k], b)
    assert close(adv, want, 1e-5)


def test_squared_values_by_hand():
    """⅕ 1² + ½ (2² + 3²)"""
    assert close(squared_each(T([[[1., 2, 3]]]), T([[[0., 0, 0]]])), [[6.7]])


def test_proxy_points_stand_where_gold_peaks():
    gold = [0, 1, 3, 4, 3, 1, 0, -2]
    rows = [dict(step=i, quality=q, reward_1=i / 10, reward_2=-i) for i, q in enumerate(gold)]
    assert close(proxy_points([dict(step=0, val_gold=9), *rows], window=3), [.3, -3])
    assert close(proxy_points(rows, window=1), [.3, -3])
    assert close(proxy_points(rows[:2], window=5), [.05, -.5])             # a short run: all of it
    assert proxy_points([dict(step=0)]) == []


# --- Nelder-Mead ----------------------------------------------------------------------------------

SIMPLEX = T([[0., 0], [1, 0], [0, 1]])


def test_a_simplex_reflects_expands_contracts_and_shrinks_by_hand():
    """scores 3, 2, 1: the worst, (0, 1), is reflected about (.5, 0)"""
    scores = T([2., 3, 1])                                                 # (1, 0) is best

    def step(*tried):
        return nelder_mead_step(SIMPLEX, scores, list(tried))
    assert close(step()[0], [1, -1])
    point, x, y = step(2.5)                                                # between: taken
    assert point is None and close(x, [[1, 0], [0, 0], [1, -1]]) and close(y, [3, 2, 2.5])
    assert close(step(4.)[0], [1.5, -2])                                   # better than all: further
    assert close(step(4., 5.)[1][-1], [1.5, -2]) and close(step(4., 5.)[2], [3, 2, 5])
    assert close(step(4., 3.5)[1][-1], [1, -1]) and close(step(4., 3.5)[2], [3, 2, 4])
    assert close(step(0.)[0], [.25, .5])                                   # bad: half way back
    assert close(step(2.)[0], [.25, .5])                                   # no better than second
    assert close(step(0., 1.5)[1][-1], [.25, .5]) and close(step(0., 1.5)[2], [3, 2, 1.5])
    assert close(step(0., .5)[0], [.5, 0]) and close(step(0., .5, 7.)[0], [.5, .5])
    point, x, y = step(0., .5, 7., 8.)
    assert point is None and close(x, [[1, 0], [.5, 0], [.5, .5]]) and close(y, [3, 7, 8])


def test_the_search_climbs_a_hill():
    def hill(p):
        return -((p - T([1.2, -.7])) ** 2 * T([1., 3])).sum().item()
    x = SIMPLEX
    y = T([hill(p) for p in x])
    for _ in range(60):
        point, tried = 0, []
        while point is not None:
            point, x, y = nelder_mead_step(x, y, tried)
            tried += [] if point is None else [hill(point)]
    assert close(x[y.argmax()], [1.2, -.7], 1e-2)


# --- MaxMin-RLHF ----------------------------------------------------------------------------------


def test_the_worst_served_group_by_hand():
    F_u = T([.31, -.12, .05])
    assert close(worst_served(F_u), [0, 1, 0])
    assert close(worst_served(F_u, 0.1), [.011343, .835944, .152713])


def test_a_single_group_is_ppo_and_their_order_is_no_matter():
    r, v, mask = noise(5, 7, 1), noise(5, 7, 1, seed=1), masks()
    adv, returns = gae_served(r, v, mask, worst_served(T([.3])))
    want = ppo.whitened_gae(r[..., 0], v[..., 0], mask)
    assert close(adv, want[0]) and close(returns[..., 0], want[1])
    F_u, order = T([.31, -.12, .05]), T([2, 0, 1])
    for softness in (0, .1):
        assert close(worst_served(F_u[order], softness), worst_served(F_u, softness)[order])
    r, v = noise(5, 7, 3), noise(5, 7, 3, seed=1)
    one = gae_served(r, v, mask, worst_served(F_u, .1))[0]
    other = gae_served(r[..., order], v[..., order], mask, worst_served(F_u[order], .1))[0]
    assert close(one, other, 1e-5)


def test_a_soft_minimum_s_advantages_are_those_of_the_mean_reward():
    """GAE is linear in rewards and values together"""
    r, v, mask, w = noise(5, 7, 3), noise(5, 7, 3, seed=1), masks(), T([.2, .5, .3])
    adv, _ = gae_served(r, v, mask, w, gamma=0.9, lam=0.7)
    assert close(adv, ppo.whitened_gae(r @ w, v @ w, mask, gamma=0.9, lam=0.7)[0], 1e-5)


def test_the_loss_of_every_group_s_head_counts_alike():
    v, old, returns = noise(2, 3, 2), noise(2, 3, 2, seed=1), noise(2, 3, 2, seed=2)
    want = sum(ppo.value_loss(v[..., k], old[..., k], returns[..., k], eps_v=0.1) for k in (0, 1))
    assert close(clipped_each(v, old, returns, eps_v=0.1), want / 2)


# --- Quark ----------------------------------------------------------------------------------------


def test_three_factors_by_hand():
    corr = T([[1., .1, .8], [.1, 1, 0], [.8, 0, 1]])
    w = tri_factor(T([.2, -.5, .1]), T([1., 2, 1]), corr)
    assert close(w, [.353895, 2.227075, .419030]) and close(w.sum(), 3)
    assert close(torch.sigmoid(-T([.2, -.5, .1]) / .5), [.401312, .731059, .450166])


def test_opposed_rewards_are_not_redundant_and_two_of_a_kind_share_a_weight():
    even, risk = torch.zeros(3), torch.ones(3)
    assert close(tri_factor(even, risk, T([[1., -.9, 0], [-.9, 1, 0], [0, 0, 1]])), [1, 1, 1])
    w = tri_factor(even, risk, T([[1., 1, 0], [1, 1, 0], [0, 0, 1]]))
    assert close(w, [.75, .75, 1.5])


# --- SAFE -----------------------------------------------------------------------------------------


def test_the_soft_minimum_by_hand():
    assert close(soft_min(T([.5, .8])), .613966)
    assert close(soft_min(T([.7, .7])), .7)
    assert close(soft_min(T([.5, .8]), 1e-3), .5 + 1e-3 * math.log(2)) and close(
        soft_min(T([.5, .8]), 1e4), .65, 1e-3)
    v = noise(50, 2).requires_grad_()
    low = soft_min(v)
    assert (v.amin(1) <= low + 1e-6).all() and (low <= v.mean(1) + 1e-6).all()
    assert close(torch.autograd.grad(low.sum(), v)[0].sum(1), torch.ones(50))


def test_pessimistic_advantages_are_gae_s_on_the_soft_minimum():
    r, v, mask = noise(5, 7), noise(5, 7, 2, seed=1), masks()
    want = ppo.whitened_gae(r, soft_min(v, 0.4), mask, gamma=0.9, lam=0.7)
    for a, b in zip(gae_pessimistic(r, v, mask, pessimism=0.4, gamma=0.9, lam=0.7), want):
        assert close(a, b)


def test_the_huber_pair_by_hand():
    """v 1, clipped to .2 from 0; R 0: ½ (½ (1 - ¼) + ½ .2²) = ½ (.375 + .02); and both count"""
    one, zero = torch.ones(1, 1, 2), torch.zeros(1, 1, 2)
    assert close(huber_pair(one, zero, T([[0.]])), [[.1975]])
    assert close(huber_pair(one * .1, zero, T([[0.]])), [[.005]])          # within both: ½ .1²


def test_the_controller_of_the_reward_s_velocity_by_hand():
    state, adjustment = safe_pid((), .5)
    assert adjustment == 0 and state == (.5, 0, 0)
    state, adjustment = safe_pid(state, .6)
    assert close(adjustment, .00144) and close(state, [.505, .004, .004])
    assert close(safe_pid((0., 0., 0.), 1e9)[0][1], 1.0)                   # the sum is bounded


def test_the_gate_by_hand():
    assert close(safe_gate(.45, .36, 1.5), [.0010125, .0225])
    assert safe_gate(.36, .36, 1.5) == (0, 0) and safe_gate(.1, .36, 1.5) == (0, 0)
    assert close(safe_gate(.45, .36, 9.9), [.1 * .5 * .0081, .2 * .5 * .09])   # the gate's floor
    h = 1e-5
    slope = (safe_gate(.45 + h, .36, 1.5)[0] - safe_gate(.45 - h, .36, 1.5)[0]) / (2 * h)
    assert close(slope, .0225)


def test_phases():
    flat, high = [.5] * 50, [.9] * 50
    assert phase_of(flat[:49]) == 1.5 and phase_of(flat) == .8 and phase_of(high) == 1.0
    assert phase_of(flat + high) == 1.2 and phase_of(high + flat) == .8
    assert phase_of([.8, 1.0] * 25) == .8                                  # high but unsteady


def test_the_penalty_s_gradient_is_its_slope_times_the_kl_s():
    """and the released one has none"""
    logp, ref = noise(2, 3).requires_grad_(), noise(2, 3, seed=1)
    grad, = torch.autograd.grad(safe_kl(logp, ref, T(.0225)).mean(), logp)
    assert close(grad, .0225 * (logp - ref).detach() / 6)
    loss = inert(logp, T(.0010125))
    assert close(loss.mean().detach(), .0010125) and loss.shape == (2, 3)
    assert not loss.requires_grad


def test_twin_heads_differ_though_both_say_zero_at_first():
    heads = TwinHeads(8, "cpu")
    hidden = noise(2, 3, 8)
    assert heads(hidden).shape == (2, 3, 2) and not heads(hidden).any()
    a, b = heads.heads
    assert not torch.equal(a[0].weight, b[0].weight) and a[0].weight.shape == (2, 8)
    for head, weight in zip(heads.heads, (1., 2.)):
        head[2].weight.data.fill_(weight)
    x = F.layer_norm(hidden, (8,))
    want = [w * F.gelu(x @ h[0].weight.T + h[0].bias).sum(-1) for h, w in ((a, 1), (b, 2))]
    assert close(heads(hidden).detach(), torch.stack(want, -1).detach(), 1e-5)
