"""ppo.py's chapters of several rewards: their equations by hand, then what reaches them in runs."""
import copy
import json
import math
import re
import shutil
import statistics
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from conftest import close, merged
from test_ppo_wiring import entropy_of, gae_of, logp_of
from wiring import catch

import model as models
import ppo
import reward
from data import prefs, tasks
from data.prefs import Ring, ring_tokenizer
from data.run import UserError, read_log
from model import ScalarModel, load, preset, save
from ppo import (Heads, Points, TriWeights, TwinHeads, clipped_each, gae, gae_each,
                 gae_pessimistic, gae_served, huber_pair, inert, lagrangian, mixture,
                 multiplier_step, nelder_mead_step, numbers_of, on_last, phase_of, proxy_points,
                 reward_folders, safe_gate, safe_kl, safe_pid, soft_min, squared_each, tri_factor,
                 weighted, worst_served)

T = torch.tensor


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
    assert close(proxy_points([dict(step=0, val_gold=9), *rows], 2, 3), [.3, -3])
    assert close(proxy_points(rows, 2, 1), [.3, -3]) and close(proxy_points(rows, 1, 1), [.3])
    assert close(proxy_points(rows[:2], 2), [.05, -.5])             # a short run: all of it
    assert proxy_points([dict(step=0)], 2) == [] == proxy_points(rows, 3)


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
    assert close(step(4.)[0], [1.5, -2])                                   # best: further
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


def test_the_eos_rule_counts_in_whom_a_batch_serves_worst():
    """group 0 is worst served but for a text that never ended, which scores -1 for both; where
    nothing is trained all groups count alike"""
    score, done = T([[-5., .5], [.6, .5]]), torch.tensor([False, True])
    f = SimpleNamespace(eos=partial(ppo.eos_replace, no_eos=-1.0),
                        reward=SimpleNamespace(keywords=dict(softness=0.0)))
    assert ppo.served(score, done, True, f).tolist() == [0, 1]
    assert ppo.served(score, done | True, True, f).tolist() == [1, 0]
    assert ppo.served(score, done, False, f).tolist() == [.5, .5]


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
    state, adjustment = safe_pid(state, .405)                              # e = -.005 - .001
    assert close(adjustment, .3 * -.006 + .01 * -.002 + .05 * -.010) and close(state[1], -.002)
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


# --- whole runs: a random model of Ring that ends its texts now and then, and two reward models ---

TINY = ["--steps", "2", "--rollouts", "8", "--samples", "2", "--batch", "8", "--micro", "5",
        "--eval_every", "2", "--save_every", "99", "--max_new", "6", "--eval_prompts", "8",
        "--calibrate", "2", "--lr", "2e-3", "--critic_lr", "1e-2", "--seed", "3", "--eos",
        "subtract", "--no_eos", "0.7"]


@pytest.fixture(scope="session")
def folders(tmp_path_factory):
    """The policy's checkpoint and two reward models'."""
    tok, g = ring_tokenizer(), torch.Generator().manual_seed(0)
    net = models.init(preset("1x64", tok, 64))
    out = [str(tmp_path_factory.mktemp(x)) for x in ("init", "one", "two")]
    with torch.no_grad():
        for p in net.parameters():
            p.add_(0.1 * torch.randn(p.shape, generator=g))
        usual = net(torch.arange(40)[None]).mean((0, 1))                                 # [D]
        net.embed_tokens.weight[tok.eos] = usual / usual.norm()
    save(net, tok, out[0])
    for seed, folder in enumerate(out[1:]):
        torch.manual_seed(seed)
        save(ScalarModel.from_lm(net, std=0.3), tok, folder)
    return out


def run(monkeypatch, folders, config, *names, extra=(), see=None):
    """A tiny run of a method: what reached these of its functions, and the log of its steps."""
    calls = catch(monkeypatch, ppo, *names, see=see)
    argv = ["--config", f"ring,{config},tiny", *TINY, "--init", folders[0], "--out", "run"]
    ppo.main(merged(*argv, "--rewards", ",".join(folders[1:]), *extra))
    return calls, [row for row in read_log("run") if "loss" in row]


def numbered(row, name, n=2):
    """The numbers that a row of the log has of each reward model."""
    return [row[f"{name}_{k + 1}"] for k in range(n)]


def said(folder, roll):
    """A reward model's number after each response's last token, pads that it wrote apart.   [B]"""
    net, length = load(folder)[0], roll.prompt_len + roll.mask.sum(1).long()
    ends = [int(row[:n].nonzero().max()) for row, n in zip(roll.tokens, length)]
    return (net.model(roll.tokens)[torch.arange(len(ends)), ends] @ net.score.weight[0]).detach()


def scores_of(folders, roll):
    """Both reward models' scores, in units of 8 samples of the SFT model for each of the first two
    training prompts.   [B, 2]"""
    net, tok = load(folders[0])
    prompts = [tok.prompt(p) for p in tasks.task("ring").problems("train", 2, 1003)]
    base = models.generate(net, prompts, 6, samples=8, generator=torch.Generator().manual_seed(6))
    raw = [(said(x, roll), said(x, base)) for x in folders[1:]]
    return torch.stack([(x - usual.mean()) / usual.std() for x, usual in raw], 1)


def test_each_reward_model_scores_each_response_in_its_own_unit(workdir, monkeypatch, folders):
    """and held-out ones, whose gold for the other group and whose flattery are counted"""
    calls, log = run(monkeypatch, folders, "rluf,weights=0.9,0.1", "FACTS.components",
                     "REWARDS.weighted", "measured")
    assert [len(x.out) for x in calls["components"]] == [16, 8, 8, 16, 16, 8, 8]
    for call, later in zip(calls["components"], calls["weighted"], strict=True):
        want = scores_of(folders, call.roll)
        assert close(call.out, want, 1e-4) and close(later.components, want, 1e-4)
        assert close(later.out, want @ T([.9, .1]), 1e-4)
    for row, call in zip(log, calls["components"][3:5], strict=True):
        want = under_eos(call.out, call.roll)
        assert close(numbered(row, "reward"), want.mean(0), 1e-5) and not close(want, call.out)
    tok, held = ring_tokenizer(), [row for row in read_log("run") if "val_gold_b" in row][-1]
    for split, call in zip(("val", "ood"), calls["measured"][-2:]):
        texts = [tok.decode(ids) for ids in call.known["roll"].completions()]
        done = call.known["finished"].tolist()
        gold = [Ring("B").reward(p, x, d) for p, x, d in zip(call.known["problems"], texts, done)]
        assert held[f"{split}_gold_b"] == pytest.approx(sum(gold) / 8, abs=1e-5)
        assert held[f"{split}_flattery"] == sum(x.count("+") for x in texts) / 8
    assert len({held["val_gold_b"], held["val_gold"]}) == 2


def snapshot(name, call):
    """A critic as it is when it is asked."""
    if name == "critic_values":
        call.critic = copy.deepcopy(call.critic)


def check_heads(w, calls, i, score, kl, weights, gamma, whiten):
    """Step i of a critic with several heads: token rewards, values before each token, advantages
    mixed by the weights, what the critic is to say.

    score [B, K] on the last token, of the last K heads, kl of every token; whiten: each head's
    advantages, before they are mixed, or what they come to. w: the names of the rows."""
    roll, critic = calls["components"][3 + i].roll, calls["critic_values"][i].critic
    mask, call = roll.mask, calls[w.advantage][i]
    last = mask * (mask.flip(1).cumsum(1).flip(1) == 1)                                  # [B, T]
    rewards = kl + last[..., None] * F.pad(score, (kl.size(2) - score.size(1), 0))[:, None]
    values = (critic.model(roll.tokens) @ critic.score.weight.T)[:, :-1].detach()
    values = F.pad(values, (0, 0, 1, 0)) * mask[..., None]
    assert close(calls[w.shaping][i].out, rewards, 1e-4) and close(call.rewards, rewards, 1e-4)
    assert close(call.values, values, 1e-4) and values.any() == (i > 0)
    if whiten and i == 0:                                  # the policy is the SFT model still
        assert not call.rewards[..., 0].any()
    parts = [gae_of(call.rewards[..., k], call.values[..., k], mask, gamma, 0.95)
             for k in range(rewards.size(2))]

    def white(x):
        inside = x[mask > 0]
        return (x - inside.mean()) / (inside.var(correction=0) + 1e-8).sqrt() * mask
    adv = sum(w * (white(a) if whiten else a) for w, (a, _) in zip(weights, parts))
    adv, returns = adv if whiten else white(adv), torch.stack([b for _, b in parts], -1)
    tol = 2e-3 if i else 2e-2         # at first the KL is rounding, which whitening makes larger
    assert close(call.out[0], adv, tol) and close(call.out[1], returns, 2e-3)
    for trained, name, want in (("clip", "adv", adv), (w.value, "returns", returns),
                                (w.value, "old_values", values)):
        part = vars(calls[trained][i * len(calls[trained]) // 2])
        if name in part:                                                       # some of the rows
            rows = [want[:, :part[name].size(1)] for _ in part[name]]
            near = [(r - x).abs().flatten(1).amax(1).min() for r, x in zip(rows, part[name])]
            assert max(near) < 2e-3, name
    first = calls[w.value][0]
    assert first.grad == {"values"} and first.values.shape[2] == rewards.size(2)


def kl_of(folders, roll):
    """log π / π_SFT of each token.   [B, T]"""
    return roll.logp - logp_of(load(folders[0])[0], roll.tokens, roll.mask, 1.0).detach()


def under_eos(score, roll):
    """Scores less .7 where a response has not ended.   [B, K]"""
    return score - 0.7 * (~roll.finished).float()[:, None]


@pytest.mark.parametrize("kind", ["xi", "mu", "all"])
def test_constraints_reach_policy_critic_and_multipliers(kind, workdir, monkeypatch, folders):
    w = SimpleNamespace(advantage=kind, shaping="constraints", value="constraints_loss")
    monkeypatch.setitem(ppo.VALUES, "constraints_loss", ppo.VALUES["constraints"])
    monkeypatch.setitem(ppo.CHECKS, "constraints_loss", ppo.CHECKS["constraints"])
    calls, log = run(monkeypatch, folders, f"{kind}_ppo,value=constraints_loss,gamma=0.9",
                     "FACTS.components", f"ADVANTAGES.{kind}", "SHAPINGS.constraints",
                     "VALUES.constraints_loss", "SURROGATES.clip", "critic_values",
                     extra=["--thresholds", "0.9,-0.4"], see=snapshot)
    u = 0.01 * torch.randn(2, generator=torch.Generator().manual_seed(7))
    velocity, theta = torch.zeros(2), T([.9, -.4])
    for i in range(2):
        roll = calls["components"][3 + i].roll
        score = under_eos(scores_of(folders, roll), roll)
        g, slope = u.sigmoid(), u.sigmoid() * (1 - u.sigmoid())
        if kind == "xi":
            g, slope = u.tanh(), 1 - u.tanh() ** 2
        weights = [0, *(1 - g)] if kind == "all" else [2 - g.sum(), *g]
        kl = torch.stack([-kl_of(folders, roll), *[0 * roll.mask] * 2], -1)
        check_heads(w, calls, i, score, kl, weights, 0.9, True)
        away = (score.mean(0) - theta) * (-1 if kind == "all" else 1)
        for _ in range(4):                                 # two epochs of two minibatches
            gradient = slope * away
            velocity = 0.1 * velocity + gradient * min(1, 0.5 / gradient.norm())
            u = u - 0.1 * velocity
            g, slope = ((u.tanh(), 1 - u.tanh() ** 2) if kind == "xi" else
                        (u.sigmoid(), u.sigmoid() * (1 - u.sigmoid())))
        assert close(numbered(log[i], "weight"), 1 - g if kind == "all" else g, 1e-4)
        assert close(numbered(log[i], "violation"), score.mean(0) - theta, 1e-4)
        assert close(numbered(log[i], "threshold"), theta)


def test_the_worst_served_group_s_reward_reaches_policy_and_critic(workdir, monkeypatch, folders):
    w = SimpleNamespace(advantage="groups", shaping="shapes", value="losses")
    for table, row in ((ppo.SHAPINGS, "shapes"), (ppo.VALUES, "losses")):
        monkeypatch.setitem(table, row, table["groups"])
    calls, log = run(monkeypatch, folders, "maxmin,shaping=shapes,value=losses,beta=0.2",
                     "FACTS.components", "REWARDS.egalitarian", "SHAPINGS.shapes",
                     "ADVANTAGES.groups", "VALUES.losses", "SURROGATES.clip", "critic_values",
                     extra=["--softness", "0.3"], see=snapshot)
    for call, later in zip(calls["components"], calls["egalitarian"], strict=True):
        score = scores_of(folders, call.roll)
        served = (-under_eos(score, call.roll).mean(0) / 0.3).softmax(0)
        assert not close(served, [.5, .5], 1e-2)
        trains = later is calls["egalitarian"][3] or later is calls["egalitarian"][4]
        assert close(later.out, score @ served if trains else score.mean(1), 1e-4)
    before = calls["components"][0]
    std = (under_eos(calls["egalitarian"][0].out[:, None], before.roll)).std()
    for i in range(2):
        roll = calls["components"][3 + i].roll
        score = under_eos(scores_of(folders, roll), roll)
        kl = -0.2 / std * kl_of(folders, roll)[..., None].expand(-1, -1, 2)
        served = (-score.mean(0) / 0.3).softmax(0)
        check_heads(w, calls, i, score / std, kl, served, 1.0, False)


def test_ppo_sat_wants_each_reward_at_its_point(workdir, monkeypatch, folders):
    calls, _ = run(monkeypatch, folders, "ppo_sat,thresholds=0.9,-0.4", "FACTS.components",
                   "REWARDS.satisfying", "SHAPINGS.ends")
    for call, later in zip(calls["components"], calls["satisfying"], strict=True):
        score = scores_of(folders, call.roll)
        assert close(later.out, -(score[:, 0] - .9) ** 2 - (score[:, 1] + .4) ** 2, 1e-3)
    assert calls["ends"][0].beta == 0.2


def test_three_factors_follow_the_rollouts(workdir, monkeypatch, folders):
    calls, log = run(monkeypatch, folders, "quark,bound=0.8", "FACTS.components", "REWARDS.tri",
                     extra=["--risks", "2,1"])
    mean, corr, seen, n = torch.zeros(2), 0.0, [], 0
    for k, (call, later) in enumerate(zip(calls["components"], calls["tri"], strict=True)):
        weak = 1 / (1 + (2 * mean).exp()) * T([2., 1]) / (1 + max(0.0, corr))
        score = scores_of(folders, call.roll).clamp(-.8, .8)
        assert close(later.tri_weights, 2 * weak / weak.sum(), 1e-4)
        assert close(later.out, score @ (2 * weak / weak.sum()), 1e-4)
        if k in (3, 4):                                                        # what is trained on
            mean = 0.9 * mean + 0.1 * score.mean(0)
            seen.append(score)
            corr = float(torch.corrcoef(torch.cat(seen).T)[0, 1])
            weak = 1 / (1 + (2 * mean).exp()) * T([2., 1]) / (1 + max(0.0, corr))
            assert close(numbered(log[n], "weight"), 2 * weak / weak.sum(), 1e-4)
            n += 1


@pytest.mark.parametrize("name", ["safe", "safe_literal"])
def test_the_controller_sees_each_minibatch_before_its_gradient(name, workdir, monkeypatch,
                                                                folders):
    row, fact = ("safe_kl", "kl_slope") if name == "safe" else ("safe_literal", "kl_penalty")
    policies, plain = [], ppo.Safe.__init__

    def far(self):                                         # so that there is something to pay
        plain(self)
        self.kl = 3.0

    def see(called, call):
        snapshot(called, call)
        if called == "drift":
            policies.append(copy.deepcopy(call.policy))
    monkeypatch.setattr(ppo.Safe, "__init__", far)
    calls = catch(monkeypatch, ppo, "MINIBATCH.drift", f"MINIBATCH.{fact}", f"REGULARISERS.{row}",
                  "ADVANTAGES.safe", "VALUES.safe", "critic_values", see=see)
    ppo.main(merged("--config", f"ring,{name},tiny", *TINY, "--init", folders[0], "--out", "run",
                    "--reward", folders[1]))
    log, ref = [x for x in read_log("run") if "loss" in x], load(folders[0])[0]
    kl, ema, total, error, seen = 3.0, None, 0.0, 0.0, []
    assert len(policies) == 8                              # two steps, two epochs, two minibatches
    for k, (net, call, later) in enumerate(zip(policies, calls["drift"], calls[fact])):
        logp, off = (logp_of(x, call.tokens, call.mask, 1.0).detach() for x in (net, ref))
        entropy = entropy_of(net, call.tokens, 1.0).detach()
        want = torch.stack([((logp - off) * call.mask).sum(1), (entropy * call.mask).sum(1)], 1)
        assert close(call.out, want, 1e-3) and close(later.drift, want, 1e-3)
        assert (k == 0) == bool(want[:, 0].abs().max() < 1e-4)
        now, H = (want.sum(0) / call.mask.sum()).tolist()
        reward = later.unit.sigmoid().mean().item()
        seen.append(reward)
        adjust = 0.0
        if ema is None:
            ema = reward
        else:
            after = 0.95 * ema + 0.05 * reward
            new = after - ema - 0.001
            total, adjust = total + new, 0.3 * new + 0.01 * (total + new) + 0.05 * (new - error)
            ema, error = after, new
        kl = 0.9 * kl + 0.1 * now
        threshold = min(0.6, 1.5 * (0.3 + adjust))
        g = max(0.5, 2 / (H + 0.1))
        over = kl - threshold
        pays = dict(kl_slope=0.2 * g * over, kl_penalty=0.1 * g * over ** 2)
        assert close(later.out, pays[fact], 1e-5)
        for one in [x for x in calls[row] if close(getattr(x, fact), pays[fact], 1e-9)]:
            assert one.grad == {"logp"}
    assert len({round(x, 6) for x in seen}) > 2            # the score of the minibatch at hand
    assert close([log[-1][x] for x in ("kl_short", "kl_threshold")], [kl, threshold], 1e-4)
    assert log[-1]["kl_penalty"] == pytest.approx(pays["kl_penalty"], rel=1e-3)


# --- memories, and what is refused ----------------------------------------------------------------


def fake(**advantage):
    """A run's functions, as far as thresholds ask."""
    return SimpleNamespace(reward=SimpleNamespace(keywords=dict(rewards="a,b")),
                           advantage=SimpleNamespace(keywords=dict(thresholds="1,2", **advantage)))


def test_a_search_goes_on_from_the_policy_that_was_best_by_gold():
    """three vertices of two steps each, then the worst reflected; gold is asked once a vertex"""
    policy = torch.nn.Linear(1, 1, bias=False)
    points = Points(None, fake(segment=2, edge=0.5), policy)
    seen, golds = [], iter([.3, .9, .1, .7])
    for done in range(1, 9):
        seen.append(points.theta.tolist())
        policy.weight.data.fill_(done)                                         # it trains
        points.note(T([next(golds)] * 4) if done % 2 == 0 else T([math.nan]), done)
        if done % 2 == 0:
            best = {2: 2, 4: 4, 6: 4, 8: 4}[done]                              # .9 after step 4
            assert policy.weight.item() == best
    assert close(seen, [[1., 2]] * 2 + [[1.5, 2]] * 2 + [[1., 2.5]] * 2 + [[1.5, 1.5]] * 2)
    copied = Points(None, fake(segment=2, edge=0.5), policy)
    copied.load(points.state())
    for one in (points, copied):
        one.note(T([.95]), 10)                       # .7 was between: taken; this expands or not
    assert close(points.theta, copied.theta) and points.best == copied.best == pytest.approx(.95)


def test_fixed_thresholds_stay_and_ask_no_gold():
    points = Points(None, fake(segment=0, edge=0.5), torch.nn.Linear(1, 1))
    points.note(T([math.nan]), 2)
    assert close(points.theta, [1, 2]) and points.tried == []


def test_weights_of_a_resumed_run_are_the_same():
    """three rewards, the first two correlated: of two it would not tell"""
    f = SimpleNamespace(reward=SimpleNamespace(keywords=dict(rewards="a,b,c", risks="", bound=5.0)))
    one, two = TriWeights(f), TriWeights(f)
    assert close(one.tell(), [1, 1, 1])
    first, second = noise(700, 3) + 1, noise(700, 1, seed=1) * T([1., 2, 0]) + noise(700, 3, seed=2)
    one.note(first, f)
    one.note(second, f)
    joint = torch.cat([first[-324:], second]).clamp(-5, 5)                 # the last 1024
    mean = 0.9 * 0.1 * first.clamp(-5, 5).mean(0) + 0.1 * second.clamp(-5, 5).mean(0)
    want = tri_factor(mean, torch.ones(3), torch.corrcoef(joint.T))
    assert close(one.tell(), want, 1e-5)
    assert not close(want, tri_factor(mean, torch.ones(3), torch.corrcoef(second.T)), 1e-3)
    two.load(one.state())
    assert torch.equal(one.tell(), two.tell())


@pytest.mark.parametrize("config, extra", [
    ("nm_ppo,lora,rank=2", ["--thresholds", "0.1,0.2", "--segment", "1"]),
    ("safe,critic_lr=1e-2", [])])
def test_a_resumed_run_ends_where_the_whole_one_does(config, extra, workdir, folders):
    """its memories, its heads and their optimiser"""
    argv = merged("--config", f"ring,{config},tiny", *TINY, "--init", folders[0], "--out", "run",
                  "--save_every", "1", *extra)
    argv += ["--rewards", ",".join(folders[1:])] if extra else ["--reward", folders[1]]
    ppo.main(argv)
    want = [path.read_bytes() for path in sorted(Path("run/step-000002").glob("*.safetensors"))]
    state = torch.load("run/step-000002/state.pt", weights_only=True)
    assert state["critic"] and not Path("run/step-000002/critic").exists()
    shutil.rmtree("run/step-000002")
    ppo.main([*argv, "--resume"])
    assert [x.read_bytes() for x in sorted(Path("run/step-000002").glob("*.safetensors"))] == want
    again = torch.load("run/step-000002/state.pt", weights_only=True)
    for name in ("critic", "critic_opt", "memories", "opt"):
        assert str(again[name]) == str(state[name]), name
    for key, x in state["critic"].items():
        assert torch.equal(x, again["critic"][key])
    assert any("score" in key for key in state["critic"])
    if "safe" in config:
        seen = state["memories"]["safe"]
        assert len(seen["rewards"]) == 8 and seen["kl"] and len(seen["pid"]) == 3


def test_a_constraint_that_cannot_be_met_is_told_once(workdir, monkeypatch, folders, capsys):
    """as is a threshold that another run's log says"""
    Path("sum").mkdir()
    rows = [dict(step=i, time=0.0, quality=-abs(i - 2), reward_1=9.0, reward_2=-i)
            for i in range(5)]
    Path("sum/log.jsonl").write_text("\n".join(map(json.dumps, rows)))
    _, log = run(monkeypatch, folders, "xi_ppo,multiplier_lr=50", extra=["--thresholds", "sum"])
    assert max(map(abs, numbered(log[-1], "weight"))) == pytest.approx(math.tanh(2))
    out = capsys.readouterr().out
    assert out.count("WARNING") == len(set(re.findall(r"reward model (\d) is at", out))) >= 1
    assert "reward model 1 is at" in out and "its threshold 9.00" in out and "cannot be met" in out


@pytest.mark.parametrize("config, words, remedy", [
    ("rluf", [], "--reward weighted: name its reward models, --rewards FOLDER,FOLDER"),
    ("rluf", ["--rewards", "none"], "none does not exist"),
    ("rluf", ["--rewards", "INIT"], "need a reward model"),
    ("rluf", ["--rewards", "ONE,TWO", "--weights", "1"], "--weights 1: give 2 numbers"),
    ("quark", ["--rewards", "ONE,TWO", "--risks", "1,x"], "--risks 1,x: give 2 numbers"),
    ("xi_ppo", ["--rewards", "ONE,TWO"], "--thresholds (empty): give 2 numbers"),
    ("xi_ppo", ["--rewards", "ONE,TWO", "--thresholds", "."], "its log says nothing of 2 reward"),
    ("mu_ppo", ["--rewards", "ONE", "--thresholds", "1,2"], "--thresholds 1,2: give 1 numbers"),
    ("ppo_sat", ["--rewards", "ONE,TWO", "--thresholds", "nan,1"], "nan,1: give 2 numbers"),
    ("all_ppo,critic=scalar", ["--rewards", "ONE", "--thresholds", "1"], "--critic constraints"),
    ("maxmin,advantage=gae", ["--rewards", "ONE,TWO"], "needs --advantage groups"),
    ("mu_ppo,reward=gold", ["--thresholds", "1"], "needs --reward weighted"),
    ("safe,value=clipped,reward=gold", [], "needs --value safe")])
def test_what_does_not_fit_is_one_line(config, words, remedy, workdir, folders):
    paths = dict(zip(("INIT", "ONE", "TWO"), folders))
    words = [re.sub("|".join(paths), lambda m: paths[m[0]], word) for word in words]
    with pytest.raises(UserError) as error:
        ppo.main(merged("--config", f"ring,{config},tiny", *TINY, "--init", folders[0], *words))
    assert remedy in str(error.value) and "\n" not in str(error.value)


def test_reward_models_that_cannot_be_used_are_refused(workdir, monkeypatch, folders):
    """another tokenizer; the same number for every response; NaN"""
    net, tok = load(folders[1])
    save(net, prefs.tokenizer(), "other")
    with pytest.raises(UserError, match="--rewards other and --init .* different tokenizers"):
        run(monkeypatch, [folders[0], folders[1], "other"], "quark")
    with torch.no_grad():
        net.score.weight.zero_()
    save(net, tok, "flat")
    with pytest.raises(UserError, match="--rewards flat says the same of all samples"):
        run(monkeypatch, [folders[0], folders[1], "flat"], "quark", extra=["--out", "two"])
    monkeypatch.setattr(ppo, "sequence_scores", lambda model, tokens, *rest:
                        torch.full((len(tokens),), math.nan))
    with pytest.raises(UserError, match="--reward .*one0?: 16 of 16 scores are NaN"):
        run(monkeypatch, folders, "quark", extra=["--out", "three"])


def test_a_mixture_s_last_groups_are_its_reward_models(workdir):
    for name in ("pooled", "round-2-group-0", "round-2-group-1", "round-10-group-0",
                 "round-10-group-1"):
        Path("em", name).mkdir(parents=True)
    assert reward_folders("em") == ["em/round-10-group-0", "em/round-10-group-1"]
    assert reward_folders("x,em/pooled") == ["x", "em/pooled"] == reward_folders("x+em/pooled")
    Path("a+b").mkdir()
    assert reward_folders("a+b") == ["a+b"] and reward_folders("") == []
    assert numbers_of("", 2, "--weights", [.5, .5]) == [.5, .5]


# --- P[Love] --------------------------------------------------------------------------------------


def test_the_loss_of_rare_reactions_by_hand():
    """kept ¼: z = 0 + log 4; and its gradient is p - label"""
    loss = reward.bce_love(T([0., 0.]), T([1., 0.]), T([.25, .25]))
    assert close(loss, [math.log(1.25), math.log(5)])
    z = T([.3, -1.2], requires_grad=True)
    grad, = torch.autograd.grad(reward.bce_love(z, T([1., 0]), T([1., 1])).sum(), z)
    assert close(grad, torch.sigmoid(z).detach() - T([1., 0]))


def test_subsampled_negatives_leave_the_natural_rate():
    """30 of 1000 love, a tenth of the others is kept: the best constant is still log .03/.97"""
    love, kept = torch.cat([torch.ones(30), torch.zeros(97)]), T(.1)
    x = torch.zeros(1, requires_grad=True)
    for _ in range(200):
        loss = reward.bce_love(x.expand(127), love, kept.expand(127)).mean()
        x.data -= 8 * torch.autograd.grad(loss, x)[0]
    assert close(torch.sigmoid(x).detach(), [30 / 1000], 1e-4)


def test_reactions_are_those_of_group_c():
    """positives are all there, negatives in part; the chance is σ(1.5 z - 2.5) of C's gold"""
    world, tok = Ring(), ring_tokenizer()
    every, some = (reward.loved(world, 300, 5, "train", tok, kept) for kept in (1.0, 0.2))
    hits = [sum(r["love"] for r in rows) for rows in (every, some)]
    assert len(every) == 300 and hits[0] == hits[1] and 20 < hits[0] < 80
    assert .1 < (len(some) - hits[1]) / (300 - hits[0]) < .3
    usual = [Ring("C").judge(p, y)["gold"] for p, *pair in prefs.reference(world) for y in pair]
    mean, std = statistics.fmean(usual), statistics.stdev(usual)
    for row in every[:20]:
        prompt, y = tok.decode(row["prompt"][1:]), tok.decode(row["answer"][:-1])
        z = (Ring("C").judge(prompt, y)["gold"] - mean) / std
        assert row["chance"] == pytest.approx(1 / (1 + math.exp(2.5 - 1.5 * z)), rel=1e-4)
        assert row["answer"][-1] == tok.eos


def test_a_model_of_reactions_reads_the_answer_s_end(workdir, monkeypatch, folders):
    before = []
    calls = catch(monkeypatch, reward, "bce_love", "FACTS.reaction", see=lambda name, call:
                  name == "reaction" and before.append(copy.deepcopy(call.batch.model)))
    reward.main(["--recipe", "love", "--data", "ring", "--init", folders[0], "--rows", "60",
                 "--steps", "2", "--batch", "6", "--micro", "4", "--out", "run", "--kept", "0.5"])
    out = json.loads(Path("run/run.json").read_text())["result"]
    assert 0 <= out["auroc"] <= 1 and .05 < out["rate"] < .3
    call, batch = calls["bce_love"][-1], calls["reaction"][-1].batch
    assert call.grad == {"reaction"} and close(call.kept, T([.5] * len(call.love)))
    for logit, love, row in zip(call.reaction, call.love, batch.rows, strict=True):
        ids = torch.tensor([[*row["prompt"], *row["answer"]]])
        assert love == row["love"] and close(logit, before[-1](ids)[0, -1].detach(), 1e-4)
