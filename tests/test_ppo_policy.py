"""ppo.py's chapters on rollouts, references and targets (T-PPO, NLPO, χ², f-DPG, GDC, SALSA): every
equation by hand and against exact sums over small worlds; then what reaches it in a run."""
import copy
import itertools
import math
from pathlib import Path
from functools import partial
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from conftest import close, merged, rand
from test_ppo_wiring import (SEED, TINY, Rolled, clipped, followed, law, logp_of, near,
                             pretend, same_weights, scores_of, two_models, white, world_of)

import kernels
import model as models
import ppo
import sft
from data.prefs import ToyIF
from data.run import UserError, batch_indices, checkpoint, configure, read_log
from model import Rollout, load, preset, save
from ppo import (PSEUDO, Partition, Proposal, Recent, Tilt, Unfinished, assured, both_ways,
                 chi2_loss, chi2_rewards, discriminate, egae, extended_gae, fdpg, fitted, gae, gdc,
                 kl_loss, log_p, log_ratio, log_t, log_weight, log_z, masses, nucleus,
                 occupancy_reward, pseudo, resumed, soup_of, stretched, when_ended, whole_response)

assert two_models                                        # the fixture of the other file, used here
T = partial(torch.tensor, dtype=torch.float64)
BASE, NEAR = T([.5, .3, .2]), T([.2, .3, .5])                    # π0 and a policy of three outcomes


def options(axis="advantage", **keywords):
    """What a fact reads of the run's functions."""
    return SimpleNamespace(**{axis: partial(print, **keywords)}, shaping=partial(print, beta=0.5))


# --- T-PPO ----------------------------------------------------------------------------------------


def test_extended_gae_takes_the_last_value_for_what_lies_behind_a_cut():
    """γ 1, λ .95, no reward, V (.2 .35 .5): cut (.2925 .15 0), ended (-.15875 -.325 -.5)"""
    v, zero, ones = T([[.2, .35, .5]] * 2), torch.zeros(2, 3).double(), torch.ones(2, 3).double()
    adv = egae(zero, v, ones, torch.tensor([False, True]))
    assert close(adv, [[.2925, .15, 0], [-.15875, -.325, -.5]])
    wide = torch.nn.functional.pad(v, (1, 2), value=9.0)                # prompt and padding
    inside = torch.nn.functional.pad(ones, (1, 2))
    padded = egae(torch.zeros(2, 6).double(), wide, inside, torch.tensor([False, True]))
    assert close(padded[:, 1:4], adv)
    assert close(egae(zero, v, ones, torch.tensor([False] * 2), 0.5, 0.0)[0],
                 [.5 * .35 - .2, .5 * .5 - .35, .5 * .5 - .5])


def test_policy_and_critic_of_a_window_learn_from_different_tokens():
    """adv of mean 0 and variance 1 over this step's tokens; returns are sums of rewards"""
    r, v, mask = rand(3, 6), rand(3, 6, seed=1), torch.ones(3, 6).double()
    mask[1, 4:] = 0
    trained, valued = mask.clone(), mask.clone()
    trained[0, :3], valued[2] = 0, 0
    adv, returns = extended_gae(r * mask, v * mask, mask, trained, valued, lam=0.8)
    raw = egae(r * mask, v * mask, mask, torch.tensor([True, True, False]), 1.0, 0.8)
    inside = raw[trained > 0]
    assert close(adv[trained > 0], (inside - inside.mean()) / inside.std(unbiased=False), 1e-5)
    assert (adv[trained == 0] == 0).all()
    sums = (r * mask).flip(1).cumsum(1).flip(1) * mask
    assert close(returns[:2], sums[:2])
    every = extended_gae(r * mask, v * mask, mask, mask, mask)
    plain = gae(r * mask, v * mask, mask)[0]
    inside = plain[mask > 0]
    assert close(every[0], (plain - inside.mean()) / inside.std(unbiased=False) * mask, 1e-5)


def test_a_response_that_goes_on_has_no_score_yet():
    zero, mask = torch.zeros(2, 3), torch.ones(2, 3)
    valued = torch.tensor([[1., 1, 1], [0, 0, 0]])
    r = when_ended(torch.tensor([2., math.nan]), zero + 1, zero, mask, 0.5, valued, beta=0.1)
    assert close(r, [[-.05, -.05, 1.95], [-.05, -.05, -.05]])


def test_a_resumed_response_is_one_response_again():
    """prompts of 2 and 3 ids; the second goes on behind two ids drawn before"""
    roll = Rollout(torch.tensor([[5, 6, 7, 0, 0, 0], [5, 6, 8, 1, 2, 3]]),
                   torch.tensor([[0., 0, 1, 0, 0, 0], [0, 0, 0, 0, 0, 1]]),
                   torch.tensor([[0., 0, -.5, 0, 0, 0], [0, 0, 0, 0, 0, -.25]]),
                   torch.tensor([2, 5]), torch.tensor([True, False]), 7)
    out = resumed(roll, [["a", [], []], ["b", [1, 2], [-1.5, -2.5]]])
    assert out.mask.tolist() == [[0, 0, 1, 0, 0, 0], [0, 0, 0, 1, 1, 1]]
    assert out.logp[1].tolist() == [0, 0, 0, -1.5, -2.5, -.25] and out.prompt_len.tolist() == [2, 3]
    assert roll.mask[1].sum() == 1 and out.completions() == [[], [1, 2, 3]]
    memory = Unfinished()
    told = dict(score=torch.tensor([3., 9.]), quality=torch.tensor([1., 2.]), logp=out.logp,
                ref_logp=out.logp - torch.tensor([[.1], [.2]]))
    row = memory.note(["a", "b"], out, roll.mask, out.mask * torch.tensor([[1.], [0]]), **told)
    assert close(row["kl"], .1) and close(row["k3"], math.expm1(-.1) + .1)
    assert memory.rows == [["b", [1, 2, 3], [-1.5, -2.5, -.25]]] and memory.begun == 1
    row = memory.note(["a", "b"], out, roll.mask, out.mask, **told)
    assert close(row.pop("kl"), .35) and row.pop("k3") > 0
    assert memory.rows == [] and memory.begun == 2
    assert {k: float(x) for k, x in row.items()} == dict(
        generated=2, ended=1, reward=6, quality=1.5, length=2, truncated=.5)
    nothing = memory.note(["a", "b"], out, roll.mask, 0 * out.mask, **told)
    assert nothing.keys() == {"generated", "ended"} and nothing["ended"] == 0


# --- NLPO -----------------------------------------------------------------------------------------


def test_a_nucleus_keeps_the_first_token_over_its_mass():
    """(.609460 .224208 .135989 .030343), p .9: three; π (.2 .1 .3 .4) within is (1/3 1/6 1/2 0)"""
    psi, pi = T([[.609460, .224208, .135989, .030343]]), T([[.2, .1, .3, .4]])
    assert nucleus(psi.log(), .9, 1).tolist() == [[True, True, True, False]]
    assert nucleus(psi.log(), .8, 1).tolist() == [[True, True, False, False]]
    law = partial(ppo.law_within, pi.log(), psi.log(),
                  policy=SimpleNamespace(logits=lambda h: h), temperature=1.0,
                  masker=SimpleNamespace(logits=lambda h: h), keep=lambda x: nucleus(x, .9, 1))
    logp, entropy = zip(*[law(torch.tensor([k])) for k in range(3)])
    assert close(torch.cat(logp).exp(), [1 / 3, 1 / 6, 1 / 2])
    want = -sum(p * math.log(p) for p in (1 / 3, 1 / 6, 1 / 2))
    assert close(torch.cat(entropy), [want] * 3)
    assert close(law(torch.tensor([3]))[0].exp(), [.4])         # rounding may put a draw outside


def test_a_nucleus_is_never_too_small_and_always_holds_what_ends_a_text():
    logits = T([[3., 2, 1, 0, -1, -2], [-2, 3, 2, 1, 0, -1]])
    assert nucleus(logits, 0.0, 1).sum(1).tolist() == [1, 1]
    assert nucleus(logits, 0.0, 3).tolist() == [[True] * 3 + [False] * 3,
                                                [False] + [True] * 3 + [False] * 2]
    assert nucleus(logits, 0.0, 1, [4]).nonzero()[:, 1].tolist() == [0, 4, 1, 4]
    assert nucleus(rand(50, 400) * 9, 1.0, 1).all()                    # p = 1: whatever rounds


# --- χ² -------------------------------------------------------------------------------------------


def rows(logp):
    """A number a row as log-probs of responses of two tokens, the first of which is the prompt."""
    return torch.stack([torch.zeros_like(logp), logp], 1), torch.tensor([[0., 1]] * len(logp))


def test_chi2_by_hand():
    """π0 (.5 .3 .2), π (.2 .3 .5): χ² .63, KL .274887; the control variate has mean 0"""
    L = (NEAR / BASE).log()
    assert close((NEAR * both_ways(L, 10.0)).sum(), .63) and close((NEAR * L).sum(), .274887)
    assert close((NEAR * stretched(-L, 10.0)).sum(), 0)
    logp, mask = rows(NEAR.log())
    assert close(log_ratio(logp, rows(BASE.log())[0] + T([[7., 0]]), mask), L)


def test_the_exponential_goes_on_as_a_line():
    z = T([-30., 0, 10, 10 + 1e-9, 12]).requires_grad_()
    y = stretched(z, 10.0)
    assert close(y[:3] / T([1, 1, math.exp(10)]), [math.expm1(-30), 0, 1 - math.exp(-10)])
    assert close(y[4] / math.exp(10), 3 - math.exp(-10))
    slope, = torch.autograd.grad(y.sum(), z)
    assert close(slope[1:] / T([1] + [math.exp(10)] * 3), [1, 1, 1, 1])


def softmax_world(seed, n=3):
    """Logits of a policy that want gradients, its log-probs, and another law's."""
    theta = rand(n, seed=seed).requires_grad_()
    return theta, torch.log_softmax(theta, 0), torch.log_softmax(rand(n, seed=seed + 50), 0)


def grad(x, theta):
    return torch.autograd.grad(x, theta, retain_graph=True)[0]


@pytest.mark.parametrize("seed", range(5))
def test_what_the_chi2_losses_differentiate(seed):
    """χ²'s: ½ grad χ²(π||π0) + grad KL(π0||π); its root's by the chain rule; KL's: KL(π0||π)"""
    theta, logp, base = softmax_world(seed)
    p = logp.exp().detach()
    chi2, back = (logp.exp() ** 2 / base.exp()).sum() - 1, (base.exp() * (base - logp)).sum()
    now = (p * both_ways((logp - base).detach(), 10.0)).sum()
    (mine, mask), theirs = rows(logp), rows(base)[0]
    whole = 0.5 * grad(chi2, theta) + grad(back, theta)
    plain = (p * chi2_loss(mine, theirs, mask, now, 10.0, weight=0.3, root=False)).sum()
    assert close(grad(plain, theta), 0.3 * whole)
    rooted = (p * chi2_loss(mine, theirs, mask, now, 10.0, weight=0.3)).sum()
    assert close(rooted, 0.3 * now.sqrt()) and close(now, chi2)
    assert close(grad(rooted, theta), 0.3 * whole / (2 * now.sqrt()))
    kl = (p * kl_loss(mine, theirs, mask, 10.0, weight=0.3)).sum()
    assert close(grad(kl, theta), 0.3 * grad(back, theta))
    assert close(kl, 0.3 * (p * (logp - base)).sum())
    forward = (p * (logp - base)).sum()
    assert chi2 >= torch.expm1(forward) >= forward


def test_a_root_of_a_mean_is_the_same_in_micro_batches():
    """the gradient of w sqrt(max(mean, 1e-4)) over eight rows, in parts of three"""
    logp, ref, mask = rand(8, 4).requires_grad_(), rand(8, 4, seed=1), torch.ones(8, 4).double()
    L = ((logp - ref) * mask).sum(1)
    defined = 0.2 * (torch.expm1(L) + torch.expm1(-L)).mean().clamp(min=1e-4).sqrt()
    now = (torch.expm1(L) + torch.expm1(-L)).mean().detach()
    parts = sum(chi2_loss(logp[i:i + 3], ref[i:i + 3], mask[i:i + 3], now, 10.0, weight=0.2).sum()
                for i in (0, 3, 6)) / 8
    assert close(parts, defined) and close(grad(parts, logp), grad(defined, logp))
    same = chi2_loss(ref.clone().requires_grad_(), ref, mask, T(0.0), 10.0)
    assert close(same, [1e-4] * 8)                                       # the floor, and no slope


@pytest.mark.parametrize("root", [True, False])
@pytest.mark.parametrize("seed", range(3))
def test_chi2_in_the_score_has_the_true_policy_gradient(seed, root):
    """E_π[reward grad log π] = -β' grad sqrt(χ²(π||π0)), or grad χ², with β' = β coefficient"""
    theta, logp, base = softmax_world(seed)
    p, chi2 = logp.exp().detach(), (logp.exp() ** 2 / base.exp()).sum() - 1
    rewards = []
    for k in range(3):                         # a batch with the policy's own mean of χ²
        n = (p * 20000).round().long()
        ids = torch.cat([torch.tensor([k]), torch.arange(3).repeat_interleave(n)])
        r = chi2_rewards(torch.zeros(len(ids)).double(), rows(logp.detach()[ids])[0],
                         rows(base[ids])[0], rows(base[ids])[1].double(), 0.5, 10.0, beta=0.6,
                         root=root)
        rewards.append(r[0].sum())
        assert (r[:, 0] == 0).all()
    got = grad((p * torch.stack(rewards) * logp).sum(), theta)
    assert close(got, -0.3 * grad(chi2.sqrt() if root else chi2, theta), 2e-4)


def test_a_policy_at_its_reference_pays_nothing():
    logp, mask = rows(BASE.log())
    r = chi2_rewards(T([1., 2, 3]), logp, logp, mask, 1.0, 10.0, beta=5.0)
    assert close(r, [[0, 1], [0, 2], [0, 3]])


def test_chi2_is_exact_on_a_tabular_world():
    """two tokens of three kinds, the second's law depends on the first: χ² of nine responses"""
    def law(seed):
        first, second = rand(3, seed=seed).softmax(0), rand(3, 3, seed=seed + 1).softmax(1)
        return first, second
    (a, A), (b, B) = law(0), law(7)
    pairs = list(itertools.product(range(3), repeat=2))
    logp, ref = (torch.stack([torch.stack([f[i].log(), S[i, j].log()]) for i, j in pairs])
                 for f, S in ((a, A), (b, B)))                                           # [9, 2]
    p, q = logp.sum(1).exp(), ref.sum(1).exp()
    exact = (p ** 2 / q).sum() - 1
    assert close(p.sum(), 1) and close((p * both_ways(log_ratio(logp, ref, T([[1., 1]] * 9)),
                                                      10.0)).sum(), exact)
    per_state = (a ** 2 / b).sum() - 1, ((A ** 2 / B).sum(1) - 1)
    assert not close(exact, per_state[0] + (a * per_state[1]).sum(), 1e-3)      # no sum over tokens


def test_what_a_proxy_s_gain_assures():
    """2000 random worlds: never above the true gain; never below the looser bound of the paper"""
    g = torch.Generator().manual_seed(0)
    checked = 0
    for _ in range(2000):
        n = int(torch.randint(3, 7, (1,), generator=g))
        p, q = (torch.rand(n, generator=g).double().pow(2).add(1e-3) for _ in range(2))
        p, q = p / p.sum(), q / q.sum()
        R, proxy = (torch.randn(n, generator=g).double() for _ in range(2))
        R, proxy = ((x - (q * x).sum()) / (q * (x - (q * x).sum()) ** 2).sum().sqrt()
                    for x in (R, proxy))
        r, chi2 = (q * R * proxy).sum(), (p ** 2 / q).sum() - 1
        if r > 0:
            bound = assured((p * proxy).sum(), r, chi2)
            assert bound <= (p * R).sum() + 1e-9
            assert bound >= r * (p * proxy).sum() - ((1 - r ** 2) * chi2).sqrt() - 1e-9
            checked += 1
    assert checked > 500
    assert close(assured(T(1.0), T(0.6), T(5.0)), .6 - .8 * 2)


def test_a_discriminator_at_its_best_says_the_ratio_of_occupancies():
    """on pairs in the proportions of π and π0, the loss is least at log π/π0"""
    n = (1000 * torch.stack([NEAR, BASE])).round().long()
    d = torch.zeros(3).double().requires_grad_()
    for _ in range(400):
        loss = discriminate(d.repeat_interleave(n[0]), d.repeat_interleave(n[1]))
        d.data -= 3 * grad(loss, d)
    assert close(d, (NEAR / BASE).log(), 1e-4)
    assert close(occupancy_reward(T([0., 1]), "kl"), [0, 1])
    assert close(occupancy_reward(T([0., math.log(3)]), "chi2"), [0, 2])
    assert close(occupancy_reward(T([0., math.log(3)])), [0, 2])                 # mean 1
    many = torch.cat([torch.zeros(1), torch.full((98,), 5.), torch.tensor([3e4])]).double().log1p()
    assert close(occupancy_reward(many)[1], 5 ** .5)                             # trimmed: 5
    assert close(occupancy_reward(T([-1., -2])), torch.expm1(T([-1., -2])))      # no root of these


# --- f-DPG: the target, its normaliser, six divergences -------------------------------------------

EXACT = dict(
    kl=lambda pi, p: (p * (p / pi).log()).sum(), rkl=lambda pi, p: (pi * (pi / p).log()).sum(),
    tv=lambda pi, p: (pi - p).abs().sum() / 2, chi2=lambda pi, p: ((p - pi) ** 2 / pi).sum(),
    js=lambda pi, p: (pi * (2 * pi / (pi + p)).log() + p * (2 * p / (pi + p)).log()).sum(),
    rchi2=lambda pi, p: ((p - pi) ** 2 / p).sum())


def test_pseudo_rewards_by_hand():
    """-f' at t = .5 and t = 2"""
    for name, want in dict(kl=(2, .5), rkl=(-.306853, -1.693147), tv=(.5, -.5), chi2=(3, -.75),
                           js=(.405465, -.287682), rchi2=(1, -2)).items():
        assert close(PSEUDO[name](T([.5, 2]).log()), want), name
        assert close(pseudo(T([.5, 2]).log(), options(divergence=name)), want)
    assert EXACT.keys() == PSEUDO.keys()


@pytest.mark.parametrize("name", EXACT)
def test_f_dpg_s_gradient_is_that_of_its_divergence(name):
    """over three outcomes, by the script's own functions; 0 where π is p; any baseline"""
    for seed in range(3):
        theta, logp, base = softmax_world(seed)
        score = rand(3, seed=seed + 90)
        p = (base + score / 0.5).softmax(0)
        if seed == 2:                                                           # π is p
            theta = p.log().requires_grad_()
            logp = torch.log_softmax(theta, 0)
        (mine, mask), theirs = rows(logp), rows(base)[0]
        f = options(divergence=name, aim="reward", most=1.0)
        P = log_p(theirs, mask, score, None, 0.0, f)
        t = log_t(mine.detach(), mask, P, P.logsumexp(0), f)
        assert close(t, logp.detach() - p.log())
        adv, returns = fdpg(pseudo(t, f), mask, 0.7)
        loss = (logp.exp().detach() * whole_response(mine, mine.detach(), adv, mask)).sum()
        want = grad(EXACT[name](logp.exp(), p), theta)
        assert close(grad(loss, theta), want) and returns is None
        assert seed < 2 or name == "tv" or close(want, [0, 0, 0])


def test_a_sample_of_an_older_policy_counts_by_its_ratio():
    """whole responses: π(y)/q(y) = e^(.3 + .2), no gradient through it; A is the row's number"""
    logp = T([[0., -1, -2, -9]]).requires_grad_()
    old, mask = T([[0., -1.3, -2.2, 5]]), T([[0., 1, 1, 0]])
    loss = whole_response(logp, old, 1.5 * mask, mask)
    assert loss.shape == (1,) and close(loss, [1.5 * 3 * math.exp(.5)])
    assert close(grad(loss.sum(), logp), [[0, -1.5 * math.exp(.5), -1.5 * math.exp(.5), 0]])


def test_f_dpg_with_the_reverse_kl_is_ppo_without_clip():
    """its pseudo-reward is s/β - log π/π0 but for a constant, and so is its gradient"""
    theta, logp, base = softmax_world(4)
    s, f = rand(3, seed=5), options(divergence="rkl", aim="reward", most=1.0)
    (mine, mask), theirs = rows(logp), rows(base)[0]
    got = pseudo(log_t(mine.detach(), mask, log_p(theirs, mask, s, None, 0.0, f), 0.0, f), f)
    ppo_s = ppo.token_rewards(s, mine.detach(), theirs, mask, 1.0, beta=0.5).sum(1) / 0.5
    assert close(got - ppo_s, [-1.0] * 3)


def posterior(base, s, beta):
    """What RL with a KL penalty converges to, by Bayes: π0 exp(s/β)/Z, and log Z.   [N] each"""
    joint = base.log() + s / beta
    return joint.softmax(0), joint.logsumexp(0)


def test_rl_with_a_kl_is_inference():
    """π0 (.5 .3 .2), s (0 1 2), β .5: p (.036667 .162559 .800774), both sides 1.306369"""
    s = T([0., 1, 2])
    p, z = posterior(BASE, s, 0.5)
    assert close(p, [.036667, .162559, .800774])
    for pi in (NEAR, p, T([.1, .8, .1])):
        objective = (pi * s).sum() - 0.5 * (pi * (pi / BASE).log()).sum()
        assert close(objective, 0.5 * z - 0.5 * (pi * (pi / p).log()).sum())
    assert close(0.5 * z, 1.306369)


def tabular():
    """A world of responses of two tokens of three kinds: both tokens [9], π0's log-probs [9, 2],
    scores [9]."""
    first, second = torch.arange(9) // 3, torch.arange(9) % 3
    return first, second, by_token(rand(4, 3), first, second), rand(9, seed=2)


def by_token(theta, first, second):
    """A policy's log-probs of all responses, of its logits [4, 3]: of the first token, and of the
    second behind each first.   [9, 2]"""
    law = torch.log_softmax(theta, 1)
    return torch.stack([law[0, first], law[1 + first, second]], 1)


def ascended(reward, world, steps=250):
    """The law of responses [9] after exact policy gradient steps, from π0 on, where reward gives
    what each is worth by its log-probs [9, 2]."""
    first, second, *_ = world
    theta, mask = rand(4, 3).requires_grad_(), torch.ones(9, 2).double()
    opt = torch.optim.Adam([theta], lr=0.1)
    for step in range(steps):
        opt.param_groups[0]["lr"] = 0.1 * (1 - step / steps)
        logp = by_token(theta, first, second)
        old = logp.detach()
        r = reward(old)
        adv = (r - (old.sum(1).exp() * r).sum())[:, None] * mask
        loss = (old.sum(1).exp() * whole_response(logp, old, adv, mask)).sum()
        theta.grad, = torch.autograd.grad(loss, theta)
        opt.step()
    return by_token(theta.detach(), first, second).sum(1).exp()


@pytest.mark.parametrize("name", ["ppo", *EXACT])
def test_every_divergence_ends_at_the_posterior(name):
    """exact gradient ascent on a tabular world, by the script's own rewards: π0 exp(s/β)/Z (TV's
    slope does not shrink: near it)"""
    world = *_, ref, s = tabular()
    p, z = posterior(ref.sum(1).exp(), s, 0.5)
    mask, f = torch.ones(9, 2).double(), options(divergence=name, aim="reward", most=1.0)

    def reward(logp):
        if name == "ppo":
            return ppo.token_rewards(s, logp, ref, mask, 1.0, beta=0.5).sum(1)
        return pseudo(log_t(logp, mask, log_p(ref, mask, s, None, 0.0, f), z, f), f)
    pi = ascended(reward, world)
    assert close(pi, p, 0.02 if name == "tv" else 5e-3), (pi, p)


def test_without_a_kl_rl_collapses_to_one_response():
    """where the posterior keeps an entropy of its own"""
    world = *_, ref, s = tabular()
    pi, (p, _) = ascended(lambda logp: 5 * s, world), posterior(ref.sum(1).exp(), s, 0.5)
    assert pi[s.argmax()] > .98 and p.max() < .7


def test_a_share_of_texts_with_a_feature_is_a_tilt():
    """true with .1 under π0, a half is wanted: λ = ln 9; two features each get their own"""
    phi = torch.cat([torch.ones(10), torch.zeros(90)]).double()[:, None]
    assert close(fitted(phi, T([.5]), near=1e-9), [math.log(9)])
    assert close(fitted(phi, T([.1])), [0])
    two = torch.stack([phi[:, 0], (torch.arange(100) % 4 == 0).double()], 1)
    lam = fitted(two, T([.3, .6]), near=1e-9)
    assert close((two @ lam).softmax(0) @ two, [.3, .6])
    loose = fitted(phi, T([.5]))
    assert 1e-3 < (loose - math.log(9)).abs().item() < 0.1
    tilt, unit = Tilt(), torch.cat([torch.ones(10), -torch.ones(90)]).double()
    f = options(aim="moments", above=0.0, share=0.5)
    lam = ppo.steer(unit, tilt.tell(), f)
    assert lam == pytest.approx(math.log(9), abs=2e-3)
    assert close(list(tilt.note(lam, unit, f).values()), [lam, .1])
    assert ppo.steer(-unit, tilt.tell(), f) == lam
    assert ppo.steer(unit, None, options(aim="reward", above=0.0, share=0.5)) == 0
    with pytest.raises(UserError, match="--above 2.0: 0 of the first 100 responses score more"):
        ppo.steer(unit, None, options(aim="moments", above=2.0, share=0.5))


def test_the_three_targets():
    """log P = log π0 + s/β, + log [unit > above], + λ [unit > above]"""
    ref, mask = T([[7., -1, -2], [7, -3, -4]]), T([[0., 1, 1]] * 2)
    P, f = partial(log_p, ref, mask, T([1., 0])), partial(options, above=0.5)
    assert close(P(None, 9.0, f(aim="reward")), [-1, -7])
    assert P(T([1., 0]), 9.0, f(aim="pointwise")).tolist() == [-3, -math.inf]
    assert close(P(T([1., 0.5]), 9.0, f(aim="moments")), [6, -7])


def test_a_normaliser_is_the_mean_of_all_weights_so_far():
    """P/q (1 3 | 2 2), then (5 5 | 1 1): of prompts 3.5 and 1.5, of all 2.5"""
    problems = [dict(prompt="a"), dict(prompt="b")]
    first, then = T([1, 3, 2, 2]).log(), T([5, 5, 1, 1]).log()
    for per, want in dict(prompt=[3.5, 3.5, 1.5, 1.5], all=[2.5] * 4).items():
        memory, f = Partition(), options(per=per)
        found = masses(memory.tell(), first, problems, f)
        assert memory.masses == {}
        memory.note(found, first, torch.zeros(4))
        found = masses(memory.tell(), then, problems, f)
        assert close(log_z(found, then, problems, f).exp(), want)
    roll = Rollout(None, None, T([[9., -1, -2]]), None, None)
    assert close(log_weight(roll, T([[0., 1, 1]]), T([-5.])), [-2])
    nothing = masses({}, T([-math.inf, -math.inf]), [dict(prompt="a")], options(per="prompt"))
    assert nothing == {"a": (-math.inf, 2)}
    again = masses(nothing, T([0., -math.inf]), [dict(prompt="a")], options(per="prompt"))
    assert again["a"][0] == 0 and again["a"][1] == 4


def test_how_many_samples_a_rollout_is_worth():
    memory = Partition()
    same = torch.zeros(4)
    assert close(memory.note({}, same, same)["ess"], 1)
    assert close(memory.note({}, T([0., -math.inf, -math.inf, -math.inf]), same)["ess"], .25)
    assert close(memory.note({}, T([1, 3]).log(), T([0, 0]))["ess"], 16 / 10 / 2)
    assert close(memory.note({}, T([0., 5.]), T([0., 5.]))["ess"], 1)           # q = p of each Z
    assert memory.note({}, T([-math.inf] * 2), T([-math.inf] * 2))["ess"] == 0


def test_weights_are_clipped_at_a_percentile_and_unknown_ones_train_nothing():
    t = torch.linspace(-10, 0, 101).double()
    mask = torch.ones(101, 1).double()
    got = log_t(t[:, None], mask, 0 * t, 0 * t, options(most=.95, divergence="chi2"))
    assert close(got[:5], [-9.5] * 5) and close(got[6:], t[6:])
    for name, most in (("kl", 20), ("js", math.inf), ("tv", math.inf)):
        f = options(most=1.0, divergence=name)
        bad = log_t(t[:3, None], mask[:3], T([-math.inf, -math.inf, 0]), T([-math.inf, 0, 0]), f)
        assert bad[0].isnan() and bad[1] == most and close(bad[2], t[2])
        adv, _ = fdpg(pseudo(bad, f), mask[:3], 0.25)
        assert adv[0] == 0 and close(adv[1], [dict(kl=0, js=-math.log(2), tv=-.5)[name] - .25],
                                     1e-6)
    far = log_t(T([[0], [0], [0.]]), mask[:3], T([0, 30, 60]), T([0] * 3),
                options(most=.5, divergence="rkl"))
    assert far.tolist() == [0, -30, -60]               # RLHF's is linear: nothing is clipped
    weight, none = gdc(torch.arange(101).double().log(), torch.zeros(101).double(), mask, most=.9)
    assert close(weight[:, 0], torch.arange(101).clamp(max=90)) and none is None
    assert gdc(T([-math.inf, 0]), T([-math.inf, 0]), mask[:2])[0].tolist() == [[0], [.99]]


def test_a_baseline_is_the_mean_of_the_last_1024():
    memory = Recent()
    assert memory.tell() == 0
    memory.note(torch.ones(1000))
    memory.note(torch.cat([torch.full((100,), 3.), torch.tensor([math.nan])]))
    assert len(memory.seen) == 1024 and memory.tell() == pytest.approx((924 + 300) / 1024)


# --- SALSA ----------------------------------------------------------------------------------------


def small(seed=0):
    """A small random model."""
    return models.init(models.ModelConfig(vocab_size=24, hidden_size=32, num_hidden_layers=2,
                                          intermediate_size=32, num_attention_heads=2,
                                          num_key_value_heads=1, head_dim=16), seed)


def test_a_soup_is_the_average_of_the_weights():
    a, b = small(0), small(1)
    soup = soup_of(a, b, 0.3).state_dict()
    assert all(close(x, 0.3 * a.state_dict()[k] + 0.7 * b.state_dict()[k]) for k, x in soup.items())
    for share in (0.3, 0.5, 0.7):
        same = soup_of(a, copy.deepcopy(a), share).state_dict()
        assert all(x.equal(a.state_dict()[k]) for k, x in same.items())
    assert all(x.equal(a.state_dict()[k]) for k, x in soup_of(a, b, 1.0).state_dict().items())
    assert all(x.equal(b.state_dict()[k]) for k, x in soup_of(a, b, 0.0).state_dict().items())
    before = copy.deepcopy(a.state_dict())
    frozen = soup_of(a.requires_grad_(False), b, 0.5)
    assert all(x.equal(before[k]) for k, x in a.state_dict().items())
    assert not any(p.requires_grad for p in frozen.parameters())


# --- runs, followed: what reaches each function, computed apart from the ids ----------------------


def small_world(monkeypatch):
    """The toy world with 64 prompts and a reward that tells texts apart."""
    pretend(monkeypatch)
    plain = ToyIF.problems
    monkeypatch.setattr(ToyIF, "problems", lambda self, split, n, seed=0: plain(
        self, split, min(n, 64), seed))


def follow(monkeypatch, two_models, config, *more, steps=3):
    """A run of ppo.py on the toy world by the task's own reward, 16 responses a step; -> what is
    known of it apart, its iterations, its log."""
    base, init = two_models
    small_world(monkeypatch)
    critic = [] if "dpg" in config or "gdc" in config else ["--critic_lr", "1e-2"]
    argv = merged("--config", f"toyif,ppo,{config},tiny", *TINY, "--lr", "1e-3", *critic, "--steps",
                  str(steps), "--eval_every", str(steps), "--calibrate", "6", *more, "--out",
                  "run")
    _, events = followed(monkeypatch, argv, init, base)
    w = world_of(argv, init, base, "")
    scale = next(call.out for name, call in events if name == "calibrate")
    w.mean, w.std, w.no_eos = scale["mean"], scale["std"], -1.0
    starts = [i for i, (name, _) in enumerate(events) if name == w.c.rollout]
    scenes = []
    for a, b in zip(starts, [*starts[1:], len(events)]):
        scene = {}
        for name, call in events[a:b]:
            scene.setdefault(name, []).append(call)
        scenes.append(scene)
    assert len(scenes) == steps
    w.evaluations = [call for name, call in events if name == "evaluate"]
    return w, scenes, [row for row in read_log("run") if "loss" in row]


def responses(w, scene):
    """A rollout by its ids alone: problems, masks, scores and log-probs of each response."""
    out = scene[w.c.rollout][0].out
    s = Rolled(w, out["problems"], w.samples, out["roll"], scene[w.c.rollout][0].policy,
               scene["critic_values"][0].critic if "critic_values" in scene else None)
    i = w.steps.append(s) or len(w.steps) - 1
    assert out["problems"] == [w.train[j] for j in batch_indices(len(w.train), 8, i, SEED)]
    return s


def check_gradients(net, loss, found):
    """d loss / d parameters, as they were found, to a ten-thousandth of their length."""
    for a, b in zip(torch.autograd.grad(loss, list(net.parameters())), found, strict=True):
        assert (a - b).norm() <= 1e-4 * b.norm() + 1e-7


def check_policy(w, s, scene, loss):
    """The gradient of every minibatch is that of `loss`: a function of the policy's new log-probs,
    and of the rows -> a number."""
    for update in scene["update"]:
        new = logp_of(update.nets[0], s.tokens, s.mask, w.temperature)
        check_gradients(update.nets[0], loss(new, update.rows), update.grads[0])


def expect(call, **wanted):
    """Arguments of a call, each near what it must be."""
    for name, x in wanted.items():
        assert near(getattr(call, name), x), name


def response_of(w, problem, ids, logp, row, room):
    """A response that goes on by up to `room` tokens of a row of ids.   -> a namespace"""
    n = len(w.tok.prompt(problem["prompt"]))
    assert row[:n] == w.tok.prompt(problem["prompt"]) and row[n:n + len(ids)] == ids
    new = row[n + len(ids):n + len(ids) + room]
    done = w.tok.eos in new
    ids = ids + (new[:new.index(w.tok.eos) + 1] if done else new)
    text = w.tok.decode(ids[:-1] if done else ids)
    score = w.task.reward(problem, text, True) if done else w.no_eos
    return SimpleNamespace(problem=problem, ids=ids, logp=logp, begin=n, end=n + len(ids),
                           done=done, fresh=n + len(logp), ended=done or len(ids) == 7,
                           score=score)


def window_of(w, rows, scene):
    """A step's responses [problem, ids, log-probs of then], gone on by its rollout's ids: masks,
    log-probs, rewards, values, each by its definition."""
    call = scene["windowed"][0]
    roll = call.out["roll"]
    ys = [response_of(w, *y, ids, min(3, 7 - len(y[1])))
          for y, ids in zip(rows, roll.tokens.tolist(), strict=True)]
    s = SimpleNamespace(ys=ys, tokens=roll.tokens, ended=torch.tensor([y.ended for y in ys]))
    s.mask, s.trained, s.valued, then = (torch.zeros(roll.tokens.shape) for _ in range(4))
    s.unit = torch.tensor([(y.score - w.mean) / w.std if y.ended else 0.0 for y in ys])
    for b, y in enumerate(ys):
        s.mask[b, y.begin:y.end], s.trained[b, y.fresh:y.end] = 1, 1
        s.valued[b, y.begin:y.end] = float(y.ended)
        then[b, y.begin:y.fresh] = torch.tensor(y.logp)
    now = logp_of(call.policy, s.tokens, s.mask, 1.0).detach()
    s.old = torch.where(s.trained > 0, now, then)
    s.sft = logp_of(w.ref, s.tokens, s.mask, 1.0).detach()
    s.rewards = -w.beta / w.std * (s.old - s.sft) * s.mask
    for b, y in enumerate(ys):
        s.rewards[b, y.end - 1] += s.unit[b]
    critic = scene["critic_values"][0].critic
    s.values = F.pad(scores_of(critic, s.tokens)[:, :-1], (1, 0)).detach() * s.mask
    s.adv, s.returns = torch.zeros(s.mask.shape), torch.zeros(s.mask.shape)
    for b, y in enumerate(ys):
        after, last, total = 0.0 if y.ended else s.values[b, y.end - 1], 0.0, 0.0
        for t in reversed(range(y.begin, y.end)):
            last = s.rewards[b, t] + after - s.values[b, t] + 0.8 * last
            total = total + s.rewards[b, t]
            after, s.adv[b, t], s.returns[b, t] = s.values[b, t], last, total
    s.adv = white(s.adv, s.trained)
    return s


def check_window(s, scene, row):
    """What a step's functions got, the gradients of policy and critic, the logged numbers."""
    out = scene["windowed"][0].out
    assert out["problems"] == [y.problem for y in s.ys]
    expect(SimpleNamespace(**out), trained=s.trained, valued=s.valued)
    expect(SimpleNamespace(**out["roll"]._asdict()), mask=s.mask, logp=s.old,
           prompt_len=[y.begin for y in s.ys], finished=[y.done for y in s.ys])
    shaped, advantage = scene["ended"][0], scene["extended"][0]
    assert near(shaped.unit[s.ended], s.unit[s.ended])
    expect(shaped, logp=s.old, ref_logp=s.sft, mask=s.mask, valued=s.valued)
    expect(advantage, rewards=s.rewards, values=s.values, mask=s.mask, trained=s.trained,
           valued=s.valued)
    assert near(advantage.out[0], s.adv)
    assert near(advantage.out[1] * s.valued, s.returns * s.valued)
    for update in scene["update"]:
        (policy, critic), some = update.nets, update.rows
        new = logp_of(policy, s.tokens, s.mask, 1.0)
        n, n_valued = (x[some].sum().clamp(min=1) for x in (s.trained, s.valued))
        check_gradients(policy, (clipped(new, s.old, s.adv) * s.trained)[some].sum() / n,
                        update.grads[0])
        seen = F.pad(scores_of(critic, s.tokens)[:, :-1], (1, 0))
        near_old = s.values + (seen - s.values).clamp(-.2, .2)
        error = torch.maximum((seen - s.returns) ** 2, (near_old - s.returns) ** 2) / 2
        check_gradients(critic, (error * s.valued)[some].sum() / n_valued, update.grads[1])
    assert near(row["generated"], s.trained.sum()) and near(row["ended"], s.ended.float().mean())
    if s.ended.any():
        assert near(row["reward"], sum(y.score for y in s.ys if y.ended) / int(s.ended.sum()))
        d = ((s.old - s.sft) * s.mask)[s.ended]
        assert near(row["kl"], d.sum(1).mean())                  # of whole responses
        assert near(row["k3"], ((torch.expm1(-d) + d)).sum(1).mean())


@pytest.mark.parametrize("words, error", [
    ("tppo,controller=adaptive", "--controller adaptive would steer by the KL of what has not"),
    ("salsa,other=base:sft+seed=3", "--other base:sft.seed=3 is no model of base:toyif: give")])
def test_a_window_and_one_kind_of_model_are_asked_for(words, error):
    with pytest.raises(UserError, match=error):
        ppo.main(["--config", f"toyif,ppo,tiny,{words}"])


def test_a_window_trains_its_own_tokens_and_the_critic_those_of_what_ended(
        two_models, workdir, monkeypatch):
    """rows go on where they were cut, with the log-probs of then; new prompts take free places;
    seven tokens are windows of three, three and one"""
    w, scenes, log = follow(monkeypatch, two_models, "tppo,window=3", "--beta", "0.3", "--lam",
                            "0.8", "--max_new", "7", steps=5)
    stream = torch.cat([batch_indices(len(w.train), 8, i, SEED) for i in range(10)])
    waiting, begun, ages = [], 0, set()
    for scene, row in zip(scenes, log):
        count = 16 - len(waiting)
        some = stream[[k // 2 for k in range(begun, begun + count)]].tolist()
        s = window_of(w, [*waiting, *((w.train[i], [], []) for i in some)], scene)
        check_window(s, scene, row)
        begun += count
        ages |= {(len(y.ids), y.fresh - y.begin, y.ended) for y in s.ys}
        waiting = [(y.problem, y.ids, s.old[b, y.begin:y.end].tolist())
                   for b, y in enumerate(s.ys) if not y.ended]
    assert {(3, 0, False), (6, 3, False), (7, 6, True)} <= ages and begun > 24


def weights(folder):
    """All tensors of a run's last checkpoint, policy and critic, if it has one."""
    return [x for path in (folder, checkpoint(folder) / "critic") if Path(path).exists()
            for x in load(path)[0].state_dict().values()]


def alike(a, b):
    """Whether two runs ended with the same weights, bit for bit."""
    return all(x.equal(y) for x, y in zip(weights(a), weights(b), strict=True))


def go(monkeypatch, two_models, config, out, *more):
    """A short run, its models those of the toy world; -> its result."""
    base, init = two_models
    small_world(monkeypatch)
    monkeypatch.setattr(sft, "find", lambda path, like, make=True, option="--init", **changes: (
        64 if not make else base if "_base" in path or option == "--other" else init))
    return ppo.main(merged("--config", f"toyif,ppo,{config},tiny", *TINY, "--lr", "2e-3",
                           "--calibrate", "6", *more, "--out", out))


def test_where_every_response_ends_in_its_window_t_ppo_is_ppo(two_models, workdir, monkeypatch):
    """with a critic of λ = 1: bit for bit"""
    tppo = "tppo,window=6", "one"
    plain = "tppo,rollout=fresh", "other"
    results = [go(monkeypatch, two_models, *x) for x in (tppo, plain)]
    assert results[0] == results[1] and alike("one", "other")


@pytest.mark.parametrize("config", [
    "tppo,window=2", "gdc",
    "nlpo,refresh=1,advantage=fdpg,surrogate=whole,regulariser=chi2"])
def test_a_memory_goes_on_where_it_was(config, two_models, workdir, monkeypatch):
    """2 steps = 1 + --resume + 1, bit for bit; nlpo's, f-DPG's and χ²'s memories in one run"""
    more = "--steps", "2", "--save_every", "1"
    whole = go(monkeypatch, two_models, config, "whole", *more)
    go(monkeypatch, two_models, config, "half", *more, "--stop", "1")
    again = go(monkeypatch, two_models, config, "half", *more, "--resume")
    assert whole == again and alike("whole", "half")


# --- NLPO in a run --------------------------------------------------------------------------------


def inside(net, tokens, top, least, special):
    """What the nucleus of the law of each token keeps, one token at a time.   [B, T-1, V]"""
    p = law(net, tokens, 1.0).exp()
    keep = torch.zeros(p.shape, dtype=torch.bool)
    for b, t in itertools.product(*map(range, p.shape[:2])):
        mass = 0.0
        for rank, k in enumerate(p[b, t].argsort(descending=True).tolist()):
            keep[b, t, k] = mass <= top or rank < least
            mass += p[b, t, k].item()
    keep[..., special] = True
    return keep


def masked_logp(net, keep, tokens, mask):
    """log π_m of each token, and the entropy of π_m.   [B, T] each"""
    logits = (net(tokens) @ net.head.T)[:, :-1].masked_fill(~keep, -1e9)
    logp = logits.log_softmax(-1)
    entropy = -(logp.exp() * logp).sum(-1)
    hit = logp.gather(2, tokens[:, 1:, None]).squeeze(2)
    return [F.pad(x, (1, 0)) * mask for x in (hit, entropy)]


def test_nlpo_samples_and_scores_within_the_nuclei_of_a_copy(two_models, workdir, monkeypatch):
    """refreshed after every second step; the KL in the reward is that of the whole laws"""
    w, scenes, log = follow(monkeypatch, two_models, "nlpo,refresh=2,top=0.6,least=2,entropy=0.1",
                            "--beta", "0.4", steps=3)
    special = [x for x in (*w.ref.config.eos_token_id, w.ref.config.pad_token_id,
                           w.ref.config.bos_token_id) if x >= 0]
    policies = [scene["masked"][0].policy for scene in scenes]
    for i, (scene, row) in enumerate(zip(scenes, log)):
        call = scene["masked"][0]
        assert same_weights(call.masker, policies[2 * (i // 2)], 0)
        w.factor = log[i - 1]["beta_factor"] if i else 1.0
        s = responses(w, scene)
        keep = inside(call.masker, s.tokens, 0.6, 2, special)
        n = keep.sum(-1)[s.mask[:, 1:] > 0]
        assert n.min() < w.ref.config.vocab_size / 3 and len(n) > 20
        assert keep.gather(2, s.tokens[:, 1:, None])[s.mask[:, 1:] > 0].all()
        old = masked_logp(call.policy, keep, s.tokens, s.mask)[0].detach()
        assert near(scene["generate"][0].out.logp, old)
        assert not near(s.logp, old, 1e-2)
        expect(scene["ends"][0], logp=s.logp, ref_logp=s.sft)
        expect(scene["clip"][0], old_logp=old[scene["update"][0].rows[:5]][:, :scene["clip"][0]
                                                                           .old_logp.size(1)])
        adv = s.adv[0]
        for update in scene["update"]:
            policy, some = update.nets[0], update.rows
            new, entropy = masked_logp(policy, keep, s.tokens, s.mask)
            loss = ((clipped(new, old, adv) - 0.1 * entropy) * s.mask)[some].sum()
            check_gradients(policy, loss / s.mask[some].sum(), update.grads[0])
            assert near(update.out["entropy"], entropy[some].sum() / s.mask[some].sum())
        kl = (s.logp - s.sft).sum(1).mean().item()
        assert near(row["kl"], kl)
        assert near(row["beta_factor"], w.factor * (1 + max(-.2, min(.2, kl - 1)) * 16 / 1000))
    last = scenes[-1]["nuclei"][0]
    assert same_weights(last.masker, policies[2], 0)
    assert not same_weights(last.model, policies[2], 0)
    tokens, mask = last.out.tokens, last.out.mask
    keep = inside(last.masker, tokens, 0.6, 2, special)
    assert near(last.out.logp, masked_logp(last.model, keep, tokens, mask)[0])


def test_a_mask_of_everything_is_ppo(two_models, workdir, monkeypatch):
    """top 1: the same responses, and weights that differ by rounding alone"""
    go(monkeypatch, two_models, "nlpo,top=1", "masked", "--steps", "1")
    go(monkeypatch, two_models, "nlpo,rollout=fresh,decode=sample", "plain", "--steps", "1")
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(weights("masked"), weights("plain")))


def test_a_masked_law_holds_a_chunk_of_logits_at_a_time(monkeypatch):
    """three rows at a time or all: the same numbers and gradients"""
    policy, masker = small(0), small(1)
    tokens = torch.randint(24, (4, 7), generator=torch.Generator().manual_seed(0))
    mask = torch.ones(4, 7)
    mask[:, :2] = mask[1, 5:] = 0
    c, f = SimpleNamespace(temperature=0.7), options("rollout", top=0.5, least=3)
    found, sizes = [], []
    monkeypatch.setattr(ppo, "law_within", lambda *a, fn=ppo.law_within, **k: (
        sizes.append(len(a[0])) or fn(*a, **k)))
    for rows in (256, 3):
        monkeypatch.setattr(kernels, "slices", lambda N, V, path, rows=rows: [
            slice(i, min(i + rows, N)) for i in range(0, N, rows)])
        logp, entropy = ppo.masked_law(policy, masker, tokens, mask, c, f)
        up = torch.randn(logp.shape, generator=torch.Generator().manual_seed(1))
        found.append([logp, entropy, *torch.autograd.grad((up * (logp + entropy)).sum(),
                                                          [*policy.parameters()])])
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(*found))
    assert max(sizes[2:]) == 3 and (found[0][0][mask == 0] == 0).all()
    keep = nucleus(law(masker, tokens, 0.7), 0.5, 3)
    logits = ((policy(tokens) @ policy.head.T)[:, :-1] / 0.7).masked_fill(~keep, -1e9)
    hit = logits.log_softmax(-1).gather(2, tokens[:, 1:, None]).squeeze(2)
    allowed = keep.gather(2, tokens[:, 1:, None]).squeeze(2) & (mask[:, 1:] > 0)
    assert allowed.any() and near(found[0][0][:, 1:][allowed], hit[allowed])


# --- χ², f-DPG, GDC and SALSA in runs -------------------------------------------------------------


@pytest.mark.parametrize("config", ["chi2", "chi2_kl"])
def test_a_minibatch_pays_for_its_own_chi2(config, two_models, workdir, monkeypatch):
    """the gradient is that of the whole minibatch's formula, whatever the micro-batches"""
    w, scenes, log = follow(monkeypatch, two_models, config, "--weight", "0.5", steps=2)
    for scene, row in zip(scenes, log):
        s = responses(w, scene)
        adv = s.adv[0]

        def loss(new, rows):
            ratio = (new - s.logp).exp()
            token = -torch.minimum(adv * ratio, adv * ratio.clamp(0.6, 1.4))
            L = ((new - s.sft) * s.mask).sum(1)[rows]
            chi2 = (L.exp() - 1 + (-L).exp() - 1).mean()
            more = dict(chi2=chi2.clamp(min=1e-4).sqrt(), chi2_kl=(L + (-L).exp() - 1).mean())
            return (token * s.mask)[rows].sum() / s.mask[rows].sum() + 0.5 * more[config]
        assert all(call.grad == {"logp"} for call in scene[w.c.regulariser])
        check_policy(w, s, scene, loss)
        L = (s.logp - s.sft).sum(1)
        assert near(row["chi2"], (L.exp() + (-L).exp() - 2).mean()) and row["far"] == 0
    assert row["chi2"] > 1e-3


def test_chi2_is_taken_off_the_score(two_models, workdir, monkeypatch):
    """(e^L - 1)/sqrt(χ²) of the rollout, in the score's unit, on the last token; no KL beside it"""
    w, scenes, _ = follow(monkeypatch, two_models, "chi2_exact", "--beta", "0.7", steps=2)
    for scene in scenes:
        s = responses(w, scene)
        L = (s.logp - s.sft).sum(1)
        chi2 = (L.exp() + (-L).exp() - 2).mean().clamp(min=1e-4)
        unit = (s.ended - w.mean) / w.std - 0.7 / w.std * (L.exp() - 1) / chi2.sqrt()
        wanted = torch.zeros(s.mask.shape)
        for b, m in enumerate(s.mask):
            wanted[b, int(m.nonzero().max())] = unit[b]
        expect(scene["gae"][0], rewards=wanted)


DIVERGENCE = dict(js=lambda t: -(math.log(2) - math.log1p(math.exp(-t))), kl=lambda t: math.exp(-t))


@pytest.mark.parametrize("config, per", [("fdpg_js", "prompt"), ("fdpg_kl,per=all", "all")])
def test_f_dpg_s_pseudo_rewards_in_a_run(config, per, two_models, workdir, monkeypatch):
    """β .5 of the shaping row; Z of all samples so far; the baseline of earlier rollouts"""
    w, scenes, log = follow(monkeypatch, two_models, f"{config},most=0.9", "--beta", "0.5",
                            "--rollouts", "8", "--samples", "2", "--batch", "8", "--epochs", "2",
                            steps=2)
    sums, earlier = {}, []
    for scene, row in zip(scenes, log):
        s = responses(w, scene)
        L, weight = s.logp.sum(1), (s.sft.sum(1) + s.ended / 0.5 - s.logp.sum(1)).tolist()
        keys = [p["prompt"] if per == "prompt" else "" for p in s.problems]
        for key, x in zip(keys, weight):
            sums.setdefault(key, []).append(math.exp(x))
        t = torch.tensor([math.log(sum(sums[k]) / len(sums[k])) - x for k, x in zip(keys, weight)])
        t = t.clamp(min=t.quantile(0.1)) if "kl" in config else t
        reward = [DIVERGENCE[config[5:7]](x) for x in t.tolist()]
        base = sum(earlier) / len(earlier) if earlier else 0.0
        A = torch.tensor(reward) - base
        earlier += reward
        assert near(scene["fdpg"][0].pseudo, reward) and near(scene["fdpg"][0].recent, base)

        def loss(new, rows):
            total = (new * s.mask).sum(1)
            return -((total - L).exp().detach() * A * total)[rows].mean()
        check_policy(w, s, scene, loss)
        z = [math.log(sum(sums[k]) / len(sums[k])) for k in keys]
        q = (torch.tensor(weight) - torch.tensor(z)).exp()
        assert near(row["ess"], q.sum() ** 2 / (q ** 2).sum() / 16)
        assert "value" not in scene and all(g is None for u in scene["update"] for g in u.grads[1])


@pytest.mark.parametrize("aim", ["moments", "pointwise"])
def test_gdc_weighs_a_proposal_s_samples(aim, two_models, workdir, monkeypatch):
    """P/(Z q), q the copy that sampled; λ is that of the first rollout, π0's"""
    w, scenes, log = follow(monkeypatch, two_models, f"gdc,aim={aim}", "--above", "0.3", "--share",
                            "0.7", "--most", "0.9", "--batch", "8", steps=2)
    sums, gain = [], 0.0
    for i, (scene, row) in enumerate(zip(scenes, log)):
        call = scene["proposed"][0]
        assert same_weights(call.proposal, w.ref, 0)
        out = call.out
        s = Rolled(w, out["problems"], w.samples, out["roll"], w.ref)
        L = logp_of(scene["update"][0].nets[0], s.tokens, s.mask, 1.0).sum(1).detach()
        phi = ((s.ended - w.mean) / w.std > 0.3).float()
        if i == 0 and aim == "moments":
            k, lam = phi.mean().item(), row["steer"]
            assert near(lam, math.log(0.7 / 0.3 * (1 - k) / k), 2e-3) and 0 < k < 1
        tilt = lam * phi if aim == "moments" else phi.log()
        P = s.sft.sum(1) + tilt
        q = s.logp.sum(1)                                  # the proposal is still the first model
        weight = (P - q).exp()
        sums += weight.tolist()
        weight = weight / (sum(sums) / len(sums))
        gain += (weight * (L - q)).mean().item()
        assert near(row["kl_gain"], gain, 1e-3)
        assert row["steer"] == (lam if aim == "moments" else 0) and near(row["share"], phi.mean())
        cut = weight.clamp(max=weight.quantile(0.9))
        assert near(scene["gdc"][0].out[0], cut[:, None] * s.mask, 1e-3)

        def loss(new, rows):
            return -(cut[:, None] * new * s.mask)[rows].sum() / s.mask[rows].sum()
        check_policy(w, s, scene, loss)


def test_a_proposal_is_renewed_where_the_policy_is_nearer():
    """every ten steps, if E_p log π/q was above 0 in sum"""
    policy, other = small(0), small(1)
    memory = Proposal(policy)
    roll = Rollout(None, None, torch.tensor([[0., -1], [0, -2]]), None, None)
    note = partial(memory.note, policy=other, roll=roll, mask=torch.tensor([[0., 1]] * 2),
                   log_weight=torch.tensor([0., -torch.inf]),
                   log_z=torch.tensor([0., -torch.inf]))
    for better, renewed in ((-.5, False), (.5, True)):
        for step in range(1, 11):
            row = note(step, logp=roll.logp + better)
            assert row["renewed"] == float(step == 10 and renewed)
            assert row["kl_gain"] == pytest.approx(better / 2 * step)
        assert same_weights(memory.tell(), other if renewed else policy, 0)


def test_salsa_s_kl_is_to_the_average_of_two_models(two_models, workdir, monkeypatch, capsys):
    """and the KL that is evaluated to the SFT model; both models stay as they are"""
    w, scenes, log = follow(monkeypatch, two_models, "salsa,share=0.7", "--other", "second_base",
                            "--beta", "0.3", steps=2)
    soup = copy.deepcopy(w.ref)
    with torch.no_grad():
        for a, b in zip(soup.parameters(), w.base.parameters()):
            a.mul_(0.7).add_(0.3 * b)
    for scene, row in zip(scenes, log):
        s = responses(w, scene)
        anchor = s.by(soup).detach()
        expect(scene["ends"][0], ref_logp=anchor, logp=s.logp)
        assert near(row["kl"], (s.logp - anchor).sum(1).mean(), 1e-3)
    assert abs(log[0]["kl"]) > 0.01                   # the policy is not where the soup is
    first, last = w.evaluations
    assert first.out[0]["val_kl"] == 0 and same_weights(last.known["ref"], w.ref, 0)
    said = capsys.readouterr().out
    rows = [(w.tok.prompt(p), [*w.tok.encode(w.task.demo(p)), w.tok.eos])
            for p in w.task.problems("val", 128, SEED)]
    tokens, mask = models.collate(rows, 0)
    nats = [-(logp_of(m, tokens, mask, 1.0).sum() / mask.sum()).item()
            for m in (soup, w.ref, w.base)]
    assert "{:.4f} nats a token of val demonstrations, its parents {:.4f} and {:.4f}".format(
        *nats) in said
    assert ("WARNING: the soup is worse" in said) == (nats[0] > max(nats[1:]))


def test_a_soup_that_is_worse_than_both_parents_is_told(two_models, monkeypatch):
    """one between them is not; nor are two models that are not alike called one"""
    (ref, tok), (second, _) = map(load, two_models[::-1])
    c, said = configure(ppo.Config, ppo.PRESETS, ppo.AXES, "", ["--config", "toyif"])[0], []
    for losses in ([2., 1, 3], [4., 1, 3]):
        found = iter(losses)
        monkeypatch.setattr(ppo, "nats", lambda *of, found=found: next(found))
        ppo.soup(ref, second, tok, SimpleNamespace(say=said.append), c)
    assert "2.0000 nats a token" in said[0] and "parents 1.0000 and 3.0000" in said[0]
    assert ["WARNING: the soup is worse" in x for x in said] == [False, False, True]


def test_salsa_of_one_model_is_ppo(two_models, workdir, monkeypatch, capsys):
    """bit for bit, and it says so"""
    base, init = two_models
    go(monkeypatch, (init, init), "salsa,other=base:toyif", "soup")
    assert "--other is --init itself" in capsys.readouterr().out
    go(monkeypatch, two_models, "salsa,reference=own", "plain")
    assert "--other is" not in capsys.readouterr().out and alike("soup", "plain")


@pytest.mark.parametrize("config, words", [
    ("tppo,advantage=gae", "--rollout windowed leaves responses that have not ended"),
    ("tppo,shaping=ends", "--rollout windowed leaves responses that have not ended"),
    ("nlpo,rollout=fresh", "--decode nuclei: its copy is that of --rollout masked"),
    ("fdpg_rkl,aim=pointwise", "--aim pointwise: p is 0 for most texts"),
    ("fdpg_rchi2,aim=pointwise", "--aim pointwise: p is 0 for most texts"),
    ("fdpg_js,beta=0", "--beta 0: the target"), ("gdc,aim=reward,beta=0", "--beta 0: the target"),
    ("salsa,other=", "--other FOLDER is missing")])
def test_what_does_not_go_together_is_told(config, words, two_models, workdir, monkeypatch):
    with pytest.raises(UserError, match=words):
        go(monkeypatch, two_models, config, "run")


def test_a_soup_of_two_shapes_is_refused(two_models, workdir, monkeypatch):
    net, tok = load(two_models[1])
    save(models.init(preset("2x64", tok, 64)), tok, "deeper")
    with pytest.raises(UserError, match="--other second_base and --init .* different shapes"):
        go(monkeypatch, ("deeper", two_models[1]), "salsa,other=second_base", "run")
