"""grpo.py: every worked value and limit of its methods, and whole runs."""
import math
from dataclasses import replace

import pytest
import torch
from conftest import close, rand

import grpo
from data.run import UserError, needs, read_log
from model import load

T = torch.tensor


def D(x):
    return torch.tensor(x, dtype=torch.float64)


# One group; two groups; two rows of three tokens
C1, L1, CAP = D([[1., 0, 0, 1]]), D([[4., 10, 6, 8]]), 16
C2, L2 = D([[1., 0, 0, 1], [1, 1, 1, 0]]), D([[4., 10, 6, 8], [5, 5, 7, 9]])
MASK = D([[1., 1, 1], [1, 1, 0]])
ADV = D([[1.], [-1]]) * MASK
LOGP = D([[-1.0, -0.5, -2.0], [-0.2, -1.5, -0.7]])
OLD = D([[-1.2, -0.5, -1.5], [-0.1, -1.0, -0.7]])
REF = D([[-1.1, -0.9, -1.8], [-0.3, -1.2, -0.9]])
TEACH = D([[-0.8, -0.4, -1.0], [-0.9, -2.0, -0.3]])
BASE = D([[-1.3, -0.8, -1.9], [-0.4, -1.1, -0.8]])


def mask_of(length):
    """Ones for so many tokens a row.   [P, G] -> [N, T]"""
    return (torch.arange(int(length.max())) < length.reshape(-1, 1)).double()


def rows(adv, mask):
    """One number a row of a [N, T] that is constant over each row's tokens."""
    first = adv[:, :1]
    assert close(adv, first * mask)
    return first.flatten()


def mean(loss, mask=MASK):
    return (loss * grpo.token_mean(mask)).sum()


def grad(fn, logp=LOGP):
    x = logp.clone().requires_grad_()
    return torch.autograd.grad(fn(x), x)[0] * MASK


# --- shapers --------------------------------------------------------------------------------------------


def test_overlong_by_hand():
    shaped = grpo.overlong(C1, L1, 10, buffer=4)
    assert close(shaped, [[1, -2, -1, .5]])
    adv = rows(grpo.group_norm(shaped, mask_of(L1)), mask_of(L1))
    assert close(adv, [.998625, -1.180193, -.453920, .635488], 1e-5)
    at = grpo.overlong(D([[1., 1, 1]]), D([[6., 10, 8]]), 10, buffer=4)          # the ends of the slope
    assert close(at, [[1, 0, .5]])


def test_truncate_by_hand():
    shaped = grpo.truncate(C2, L2, target=7)
    assert close(shaped, [[1, 0, 0, 0], [1, 1, 1, 0]])
    adv = rows(grpo.whitened(shaped, mask_of(L2)), mask_of(L2))
    assert close(adv, [2.031959, *[-.353384] * 3, *[.839287] * 3, -1.546056], 1e-5)
    plain = rows(grpo.group_norm(shaped, mask_of(L2)), mask_of(L2))
    assert close(plain, [1.499997, -.5, -.5, -.5, .5, .5, .5, -1.499997], 1e-5)


@pytest.mark.parametrize("price", [.01, 1, 50])
def test_in_a_group_of_wrong_answers_any_price_of_length_is_the_same(price):
    shaped = grpo.linear_length(torch.zeros(1, 4).double(), L1, CAP, price=price)
    adv = rows(grpo.group_norm(shaped, mask_of(L1), eps=0), mask_of(L1))
    assert close(adv, [1.161895, -1.161895, .387298, -.387298], 1e-5)
    assert close(grpo.linear_length(0 * C1, L1, CAP, price=price, correct_only=True), 0 * C1)


def test_easiest_by_hand():
    shaped = grpo.easiest(C2, L2)
    assert close(shaped, [[1, 0, 0, 1], [.801857, .801857, .517342, 0]], 1e-6)
    adv = rows(grpo.group_norm(shaped, mask_of(L2)), mask_of(L2))[4:]
    assert close(adv, [.718313, .718313, -.034175, -1.402451], 1e-5)             # correct, and pushed down
    assert close(grpo.easiest(C1, L1, share=1.0), [[.838635, 0, 0, .561365]], 1e-6)


def test_easiest_limits():
    assert torch.equal(grpo.easiest(C2, L2, share=0.0), C2)
    all_of = grpo.easiest(C2, L2, share=1.0, alpha=.3)
    assert torch.all(all_of[C2 == 0] == 0) and torch.all((all_of[C2 > 0] > .7) & (all_of[C2 > 0] < 1))
    twin = torch.cat([C2[:1]] * 5)                               # ties: the first prompt
    assert (grpo.easiest(twin, L2[:1].expand(5, 4)) != twin).any(1).tolist() == [True] + [False] * 4
    assert close(grpo.easiest(D([[1., 0]]), D([[3., 5]]), share=1.0), [[.7, 0]])         # alone: σ(0) = ½


def test_history_by_hand():
    shaped = grpo.history(C1, L1, D([[5.]]))
    assert close(shaped, [[1.309017, -1, -.309017, .3]], 1e-6)
    adv = rows(grpo.group_norm(shaped, mask_of(L1)), mask_of(L1))
    assert close(adv, [1.260224, -1.097830, -.392173, .229778], 1e-5)
    assert close(grpo.history(C1, L1, D([[8.]])), [[1.707107, -.382683, 0, 1]], 1e-6)


def test_history_limits():
    assert torch.equal(grpo.history(C1, L1, D([[math.inf]])), C1)                # the first visit
    assert torch.equal(grpo.history(C1, L1, D([[5.]]), weight=0.0), C1)
    shaped = grpo.history(C2, L2, D([[6.], [7.]]))
    assert shaped[C2 > 0].min() > shaped[C2 == 0].max()
    assert torch.all(grpo.history(C2, L2, D([[6.], [7.]]), wrong_penalty=False)[C2 == 0] == 0)


def test_reflective_by_hand():
    k = D([[2., 3, 1, 0]])
    shaped = grpo.reflective(C1, L1, k, low=40, high=80)
    assert close(shaped, [[.916976, 0, 0, .883024]], 1e-6)
    adv = rows(grpo.leave_one_out(shaped, mask_of(L1)), mask_of(L1))
    assert close(adv, [.622635, -.6, -.6, .577365], 1e-6)
    assert close(grpo.reflective(C1, L1, k), [[.9, 0, 0, .883024]], 1e-6)
    assert close(grpo.reflective(C1, D([[5.] * 4]), D([[2.] * 4])), [[.9, 0, 0, .9]])


def test_verified_by_hand():
    shaped = grpo.verified(C1, T([[False, True, False, False]]))
    assert close(shaped, [[10, -10, 0, 10]])
    adv = rows(grpo.group_norm(shaped, mask_of(L1)), mask_of(L1))
    assert close(adv, [.783349, -1.305582, -.261116, .783349], 1e-5)
    assert grpo.verified(C1, T([[True, False, False, False]]))[0, 0] == -10    # correct, unfinished


def test_consistent_by_hand():
    shaped = grpo.consistent(C1, D([[.9, .4, .99, .6]]), margin=0.0)
    assert close(shaped, [[1.5, 0, 0, 1]])
    adv = rows(grpo.group_norm(shaped, mask_of(L1), eps=1e-4), mask_of(L1))
    assert close(adv, [1.166511, -.833222, -.833222, .499933], 1e-5)
    assert close(grpo.consistent(C1, D([[.97, 1, 1, .96]]), margin=0.0), [[1.5, 0, 0, 1.5]])         # capped
    assert close(grpo.consistent(D([[0., 1, 0]]), D([[.9, .1, .9]])), [[0, 1.5, 0]])                 # alone


# --- advantages -----------------------------------------------------------------------------------------


def test_group_norm_by_hand():
    adv = rows(grpo.group_norm(C1, mask_of(L1)), mask_of(L1))
    assert close(adv, [.866024, -.866024, -.866024, .866024], 1e-6)
    assert close(rows(grpo.group_norm(C1, mask_of(L1), eps=1e-4), mask_of(L1))[0], .865875, 1e-6)
    more = grpo.group_norm(3 * C2 - 7, mask_of(L2), eps=0)
    assert close(more, grpo.group_norm(C2, mask_of(L2), eps=0)) and not more[mask_of(L2) == 0].any()


@pytest.mark.parametrize("name", ["group", "centred", "rloo"])
def test_a_group_without_a_signal_has_no_advantage(name):
    for reward in (0., 1., .3, .7, .9):                          # eight float32 .7 do not average to .7
        assert not grpo.ADVANTAGES[name](torch.full((2, 8), reward), torch.ones(16, 3)).any()
    assert close(rows(grpo.ADVANTAGES[name](C2, mask_of(L2)), mask_of(L2)).view(2, 4).sum(1), [0, 0])


def test_baselines_by_hand():
    assert close(rows(grpo.centred(C1, mask_of(L1)), mask_of(L1)), [.5, -.5, -.5, .5])
    assert close(rows(grpo.leave_one_out(C1, mask_of(L1)), mask_of(L1)), D([2, -2, -2, 2]) / 3)


def test_whitened_over_the_batch_by_hand():
    mask, flat = mask_of(L2), torch.zeros(8, 10).double()
    adv = rows(grpo.returns(C2, mask, flat, flat), mask)
    right = C2.flatten() > 0
    assert close(adv[right], [.919839] * 5, 1e-5) and close(adv[~right], [-1.067014] * 3, 1e-5)
    adv = rows(grpo.whitened(C2, mask), mask)
    assert close(adv, [1.189322, -.849516, -.849516, 1.189322, .679613, .679613, .679613, -1.359226], 1e-5)
    assert close((adv[:, None] * mask).sum(), 0) and close(((adv[:, None] * mask) ** 2).sum() / 53, 1, 1e-6)


def test_returns_look_ahead_only():
    """with KL in the reward a token pays for itself and for what follows"""
    mask, k1 = mask_of(D([[3., 2]])), rand(2, 3)
    adv = grpo.returns(D([[1., 0]]), mask, k1, 0 * k1, beta=.1)
    ahead = D([[k1[0].sum(), k1[0, 1:].sum(), k1[0, 2]], [k1[1, :2].sum(), k1[1, 1], 0]])
    assert close(adv, grpo.whiten((D([[1.], [0]]) - .1 * ahead) * mask, mask))


@pytest.mark.parametrize("lam, want", [
    (1, [[.4, .1, .5], [-.8, -1, 0]]), (1.25, [[.525, .2, .725], [-.925, -1.225, 0]])])
def test_distilled_by_hand(lam, want):
    assert close(grpo.distilled(OLD, TEACH, BASE, MASK, lam=lam), want)


def test_distilled_limits():
    assert close(grpo.distilled(OLD, TEACH, BASE, MASK), grpo.distilled(OLD, TEACH, REF, MASK))
    assert close(grpo.distilled(OLD, TEACH, BASE, MASK, lam=0.0), (BASE - OLD) * MASK)
    assert not grpo.distilled(OLD, OLD, OLD, MASK, lam=1.7).any()


# --- credit ---------------------------------------------------------------------------------------------


def test_overconfident_by_hand():
    mask = mask_of(L1)
    shift = D([[.2], [.5], [-.5], [-.1]]) * mask                 # so much a token
    adv = rows(grpo.overconfident(grpo.group_norm(C1, mask), shift, 0 * shift, mask), mask)
    assert close(adv, [.866024, -1.709598, -1.276586, .866024], 1e-5)
    same = grpo.overconfident(grpo.group_norm(C1, mask), shift, 0 * shift, mask, alpha=0.0)
    assert torch.equal(same, grpo.group_norm(C1, mask))
    level = rows(grpo.overconfident(grpo.group_norm(C1, mask), 0 * shift, 0 * shift, mask), mask)
    assert close(level[1] / -.866024, 1 + math.log(2), 1e-5)


def test_too_long_by_hand():
    mask = mask_of(L1)
    adv = grpo.group_norm(C1, mask)
    got = rows(grpo.too_long(adv, C1, L1), mask)
    assert close(got, [.866024, -1.140542, -.866024, .866024], 1e-5)
    assert close(rows(grpo.too_long(adv, C1, L1, base=1.00001), mask)[1] / -.866024, 1.000040, 1e-5)
    assert torch.equal(grpo.too_long(adv, 0 * C1, L1), adv)


# --- surrogates -----------------------------------------------------------------------------------------


def test_clip_by_hand():
    loss = grpo.clip(LOGP, OLD, ADV)
    assert close(loss * MASK, [[-1.2, -1, -.606531], [.904837, .8, 0]], 1e-6)
    assert close(mean(loss), -.220339, 1e-6)
    assert close((loss * grpo.sequence_mean(MASK)).sum(), -.041546, 1e-6)
    assert close((loss * grpo.constant(MASK, 4)).sum(), -.137712, 1e-6)
    assert close(grad(lambda x: mean(grpo.clip(x, OLD, ADV))), [[0, -.2, -.121306], [.180967, 0, 0]], 1e-6)
    k3 = grpo.k3(LOGP, REF)
    assert close(((loss + k3) * grpo.sequence_mean(MASK)).sum(), -.040355, 1e-6)


def test_clip_higher_by_hand():
    loss = grpo.clip(LOGP, OLD, ADV, eps_high=.28)
    assert close(loss[0], [-1.221403, -1, -.606531], 1e-6) and close(mean(loss), -.224619, 1e-6)
    assert close(grad(lambda x: mean(grpo.clip(x, OLD, ADV, eps_high=.28)))[0, 0], -.244281, 1e-6)


def test_dual_clip_by_hand():
    five = D([[math.log(5)]])
    assert close(grpo.clip(five, 0 * five, D([[-1.]])), [[5]])
    assert close(grpo.clip(five, 0 * five, D([[-1.]]), dual=3.0), [[3]])


@pytest.mark.parametrize("name", ["clip", "stale", "clip_cov", "kl_cov"])
def test_at_ratio_one_every_surrogate_is_reinforce(name):
    fn, zero = grpo.SURROGATES[name], torch.zeros_like(MASK)
    have = dict(old_logp=LOGP, behaviour_logp=LOGP, adv=ADV, chosen=zero)
    got = grad(lambda x: mean(fn(x, **{k: have[k] for k in needs(fn)[1:]})))
    assert close(got, grad(lambda x: mean(grpo.reinforce(x, ADV))))


def test_stale_by_hand():
    assert close(mean(grpo.stale(LOGP, OLD, ADV, most=2.0)), .368740, 1e-6)
    got = grad(lambda x: mean(grpo.stale(x, OLD, ADV, most=2.0)))
    assert close(got, [[-.244281, -.2, -.121306], [.180967, .121306, 0]], 1e-6)
    capped = grpo.stale(LOGP, LOGP - 3, ADV, most=2.0)
    assert close(capped, -2 * ADV * LOGP)


@pytest.mark.parametrize("alpha, want", [(.5, -.014747), (0., .314205), (1., -.220339)])
def test_anchored_by_hand(alpha, want):
    assert close(mean(grpo.anchored(LOGP, OLD, TEACH, ADV, alpha=alpha)), want, 1e-6)


def test_anchored_limits():
    assert torch.equal(grpo.anchored(LOGP, OLD, TEACH, ADV, alpha=1.0), grpo.clip(LOGP, OLD, ADV))
    assert close(grpo.anchored(LOGP, OLD, OLD, ADV, alpha=.3), grpo.clip(LOGP, OLD, ADV))


def test_covariances_by_hand():
    cov = grpo.covariance(LOGP, ADV, MASK)
    assert close(cov * MASK, [[.032, .432, -.768], [-1.008, .552, 0]])
    g = torch.Generator().manual_seed(0)
    assert not grpo.band(LOGP, OLD, ADV, MASK, g, low=1.0).any()
    got = grpo.band(LOGP, OLD, ADV, MASK, g, low=.3, ratio=1.0, eps=.2)
    assert got.tolist() == [[0, 1, 0], [0, 0, 0]]                # PPO's clip has (1, 1) already
    assert grpo.top(LOGP, ADV, MASK, ratio=2e-4).tolist() == [[0, 0, 0], [0, 1, 0]]


def test_kl_cov_by_hand():
    chosen = grpo.top(LOGP, ADV, MASK, ratio=2e-4)
    loss = grpo.kl_cov(LOGP, OLD, ADV, chosen)
    assert close(loss[1, 1], 1.106531, 1e-6) and close(mean(loss), -.163313, 1e-6)
    assert close(grpo.kl_cov(LOGP, OLD, ADV, chosen, coef=0.0), -ADV * (LOGP - OLD).exp())


def test_clip_cov_removes_what_is_chosen():
    chosen = D([[0., 1, 0], [0, 0, 0]])
    got = grad(lambda x: mean(grpo.clip_cov(x, OLD, ADV, chosen, eps=.2)))
    assert close(got, [[0, 0, -.121306], [.180967, 0, 0]], 1e-6)
    assert torch.equal(grpo.clip_cov(LOGP, OLD, ADV, 0 * MASK, eps=.2), grpo.clip(LOGP, OLD, ADV))


S = D([-.5, -.8, -1.2, -.4])                                     # a response's mean log-prob


def drpo_of(s, correct=C1, length=L1, **options):
    mask = mask_of(length)
    logp = s[:, None] * mask
    return grpo.drpo(logp, logp.detach(), mask, correct, length, CAP, 0 * mask, **options)


def test_drpo_by_hand():
    s = S.clone().requires_grad_()
    loss = drpo_of(s)
    assert close(-loss, [.505586], 1e-6)
    got, = torch.autograd.grad(-loss.sum(), s)
    assert close(got, [.924142, -.509999, -.490001, .075858], 1e-6) and close(got.sum(), 0)


@pytest.mark.parametrize("lam, want", [(.2, [.777300, .222700]), (1., [.562177, .437823]), (1e9, [.5, .5])])
def test_drpo_weights_by_length(lam, want):
    s = S.clone().requires_grad_()
    got, = torch.autograd.grad(-drpo_of(s, lam=lam).sum(), s)
    assert close(got[[0, 3]], want, 1e-6) and got[1] < 0 > got[2]


def test_drpo_needs_both_kinds():
    for c in (0 * C1, C1 * 0 + 1):
        s = S.clone().requires_grad_()
        loss = drpo_of(s, correct=c)
        assert not loss.any() and not torch.autograd.grad(loss.sum(), s)[0].any()
    assert close(drpo_of(S + 3), drpo_of(S))                     # a constant changes nothing


def test_drpo_trust_region():
    """(β (KL - δ)) KL over the minibatch's tokens, whatever the number of groups; 0 within δ"""
    mask, old = mask_of(L2), rand(8, 10)
    now = old - .1 - .05 * rand(8, 10, seed=1)
    kl = ((old - now) * mask).sum() / mask.sum()
    price = grpo.hinge(now, old, mask, 2, beta=10.0, delta=.01)
    loss = grpo.drpo(now, old, mask, C2, L2, CAP, price) - grpo.drpo(now, old, mask, C2, L2, CAP, 0 * mask)
    assert close(loss.mean(), 10 * (kl - .01) * kl)
    assert not grpo.hinge(now, now, mask, 2).any()


# --- penalties ------------------------------------------------------------------------------------------


def test_kl_terms_by_hand():
    want = [[.004837, .070320, .021403], [.004837, .049859, 0]]
    assert close(grpo.k3(LOGP, REF, beta=1.0) * MASK, want, 1e-6)
    assert close(mean(grpo.k3(LOGP, REF, beta=1.0)), .030251, 1e-6)
    assert close(mean(grpo.k2(LOGP, REF, beta=1.0)), .031)
    k2, k3 = ([[.02, .08, -.04], [.02, -.06, 0]], [[.019033, .065936, -.044281], [.019033, -.069972, 0]])
    assert close(grad(lambda x: mean(grpo.k2(x, REF, beta=1.0))), k2)
    assert close(grad(lambda x: mean(grpo.k3(x, REF, beta=1.0))), k3, 1e-6)
    assert close(grad(lambda x: mean(grpo.k3_straight(x, REF, beta=1.0))), k2)
    assert close(grpo.k3_straight(LOGP, REF), grpo.k3(LOGP, REF))


def test_kl_loosens_with_difficulty():
    for correct, w in ((.75, .869804), (.5, .743119), (.25, .493165)):           # d = .25, .5, .75
        c = (torch.arange(4) < 4 * correct).double()[None]
        one = torch.ones(4, 1).double()
        got = grpo.by_difficulty(one, 0 * one, one, c, beta=1.0) / grpo.k3(one, 0 * one, beta=1.0)
        assert close(got, w * one, 1e-6)
        assert close(grpo.by_difficulty(one, 0 * one, -one, c), grpo.k3(one, 0 * one, beta=1e-3))
    for c in (0 * C1, 0 * C1 + 1):
        assert close(grpo.by_difficulty(one, 0 * one, one, c), grpo.k3(one, 0 * one, beta=1e-3))


@pytest.mark.parametrize("phi, value, slope", [(1, .072641, .283444), (.5, .034164, .215578),
                                               (0, .057915, .262514)])
def test_flattened_by_hand(phi, value, slope):
    flat = torch.log_softmax(phi * D([2., 1, 0, -1]), 0)[1].view(1, 1)
    x = D([[-1.]]).requires_grad_()
    loss = grpo.flattened(x, flat, beta=1.0)
    assert close(loss, [[value]], 1e-6) and close(torch.autograd.grad(loss.sum(), x)[0], [[slope]], 1e-6)


def test_flattened_is_forward_kl_in_expectation():
    p, q = torch.softmax(rand(4), 0), torch.softmax(rand(4, seed=1), 0)
    got = (p * grpo.flattened(p.log(), q.log(), beta=1.0)).sum()
    assert close(got, (q * (q / p).log()).sum())


def test_to_teacher_by_hand():
    loss = grpo.clip(LOGP, OLD, ADV)
    assert close(mean(loss + grpo.to_teacher(LOGP, TEACH, D([[1., 0]]), beta=.2)), -.184539, 1e-6)
    assert close(mean(loss + grpo.to_teacher(LOGP, TEACH, D([[1., 0]]), beta=.002)), -.219981, 1e-6)
    wrong = grpo.to_teacher(LOGP, TEACH, D([[1., 0]]), beta=.2, wrong_only=True)
    assert close(mean(wrong), .0148, 1e-6) and not wrong[0].any()


def test_kl_estimators_in_expectation():
    """of a vocabulary of four: the gradient of k2 is that of KL(π||T), of k3 that of KL(T||π)"""
    z, t = rand(4).requires_grad_(), torch.log_softmax(rand(4, seed=1), 0)
    logp = torch.log_softmax(z, 0)
    p = logp.exp()

    def slope(x):
        return torch.autograd.grad(x, z, retain_graph=True)[0]
    assert close(slope((p.detach() * grpo.k2(logp, t, beta=1.0)).sum()), slope((p * (logp - t)).sum()))
    assert close(slope((p.detach() * grpo.k3(logp, t, beta=1.0)).sum()), slope((t.exp() * (t - logp)).sum()))


# --- weights and filters --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", grpo.WEIGHTS)
def test_padding_weighs_nothing(name):
    fn, loss = grpo.WEIGHTS[name], rand(2, 3)
    wide = torch.cat([MASK, torch.zeros(2, 3).double()], 1)
    args = () if name != "constant" else (CAP,)
    assert close((fn(MASK, *args) * loss).sum(), (fn(wide, *args)[:, :3] * loss).sum())
    assert not fn(wide, *args)[:, 3:].any()
    assert torch.isfinite(fn(0 * MASK, *args)).all()             # rows that do not train


def test_weights_by_hand():
    ones = torch.ones(3, 4).double()
    assert close(grpo.token_mean(ones), grpo.sequence_mean(ones)) and close(grpo.token_mean(MASK).sum(), 1)
    assert close(grpo.sequence_sum(MASK), MASK / 2)


def test_mixed_groups_train():
    assert grpo.mixed(D([[1., 1, 1], [1, 0, 1], [0, 0, 0]])).tolist() == [False, True, False]


@pytest.mark.parametrize("table", [grpo.SHAPERS, grpo.ADVANTAGES, grpo.CREDIT, grpo.SURROGATES,
                                   grpo.PENALTIES, grpo.WEIGHTS, grpo.FILTERS])
def test_nothing_changes_its_input(table):
    have = dict(score=C2, correct=C2, shaped=C2, length=L2, cap=CAP, best=D([[5.], [9.]]), reflections=L2,
                truncated=C2 > 0, answer_prob=C2 / 2, mask=mask_of(L2), generator=None, chosen=mask_of(L2))
    have |= {k: rand(8, 10, seed=i) for i, k in enumerate((
        "logp", "old_logp", "ref_logp", "teach_logp", "base_logp", "behaviour_logp", "flat_logp", "adv"))}
    before = {k: x.clone() for k, x in have.items() if torch.is_tensor(x)}
    for fn in table.values():
        out = fn(**{k: have[k] for k in needs(fn)})
        assert torch.isfinite(out.double()).all()
        assert all(torch.equal(have[k], x) for k, x in before.items())


# --- whole runs -----------------------------------------------------------------------------------------

METHODS = [p for p in grpo.PRESETS if p != "tiny"]
LEARNS_FROM_A_TEACHER = {"rlad", "kdrl", "opd", "exopd"}


def tiny(config, out, *extra):
    teacher = ["--teacher", "base:chain_clean"] if config in LEARNS_FROM_A_TEACHER else []
    small = ["--prompts", "8", "--samples", "1"] if config in ("opd", "exopd") else []
    return grpo.main(["--config", f"{config},tiny", "--steps", "2", *small, *teacher, "--out", out, *extra])


@pytest.mark.parametrize("config", METHODS)
def test_every_preset_takes_two_steps(config, shared_bases):
    out = tiny(config, "run")
    assert {"val_accuracy", "ood_accuracy", "val_pass@4", "sft_val_accuracy"} <= out.keys()
    assert all(math.isfinite(v) for v in out.values())
    log = [row for row in read_log("run") if "correct" in row]
    keys = {"flat", "entropy", "kl", "length", "truncated", "clipped", "t_gen", "t_score", "t_update"}
    assert len(log) == 2 and keys <= log[0].keys()
    assert all(math.isfinite(v) for row in log for v in row.values())


def test_the_map_names_every_method():
    table = grpo.__doc__.partition("\npreset ")[2].partition("\nWatch")[0].splitlines()[1:]
    assert [row.split()[0] for row in table] == METHODS


def weights(folder):
    return load(folder)[0].state_dict()


@pytest.mark.parametrize("config, extra", [("hapo", ()), ("aipo", ("--lag", "1"))])
def test_resume_is_exact(config, extra, shared_bases):
    """4 steps = 2 + --resume + 2, bit for bit: HAPO's records and a lagged policy too"""
    args = ["--steps", "4", "--save_every", "2", *extra]
    whole = tiny(config, "whole", *args)
    tiny(config, "half", *args, "--stop", "2")
    assert tiny(config, "half", *args, "--resume") == whole
    a, b = weights("whole"), weights("half")
    assert all(torch.equal(a[k], b[k]) for k in a)


@pytest.mark.parametrize("config", ["grpo", "dr_grpo", "rloo", "dapo", "drpo", "clip_cov", "kl_cov", "rapo"])
def test_micro_does_not_change_the_gradient(config, shared_bases, monkeypatch):
    """of every minibatch of a run; not the weights after it: Adam makes steps of what rounding leaves"""
    real, compared = grpo.backward, []

    def twice(policy, batch, groups, c, f, g):
        state, grads = g.get_state(), []
        for micro in (4, 64):
            g.set_state(state)
            policy.zero_grad()
            told = real(policy, batch, groups, replace(c, micro=micro), f, g)
            grads.append(torch.cat([p.grad.flatten() for p in policy.parameters() if p.grad is not None]))
        if grads[1].norm() > 0:                                  # a rollout may have no signal
            compared.append(((grads[0] - grads[1]).norm() / grads[1].norm()).item())
        return told
    monkeypatch.setattr(grpo, "backward", twice)
    tiny(config, "micro", "--samples", "8")
    assert compared and max(compared) < 1e-4


def test_a_filter_that_nothing_passes(shared_bases):
    """a reward that is the same for all: every group is flat, and the weights stay as they are"""
    (shared_bases / "flat.py").write_text("def same(problem, text, finished):\n    return 0.7\n")
    tiny("dapo", "flat", "--reward", "flat.py:same", "--shaper", "plain", "--save_every", "1")
    log = [row for row in read_log("flat") if "correct" in row]
    assert len(log) == 2 and all(row["groups"] == 0 and row["flat"] == 1 and row["norm"] == 0 for row in log)


def test_a_split_of_one_problem(shared_bases):
    assert "val_accuracy" in tiny("grpo", "one", "--eval_prompts", "1")


def test_a_teacher_must_speak_the_same_tokens(shared_bases):
    with pytest.raises(UserError, match="with the tokenizer of --init"):
        grpo.main(["--config", "kdrl,tiny", "--teacher", "base:toyif_base", "--out", "mixed"])


def test_a_reward_of_ones_own(shared_bases):
    code = "def short(problem, text, finished):\n    return float(len(text) < 9)\n"
    (shared_bases / "mine.py").write_text(code)
    tiny("grpo", "mine", "--reward", "mine.py:short")
    assert any(row.get("correct", 0) > 0 for row in read_log("mine"))
    for spec, words in (("mine.py:shrot", "has no function 'shrot'"), ("mine", "PATH.py:FUNCTION"),
                        ("ours.py:short", "of a file that exists")):
        with pytest.raises(UserError, match=words):
            tiny("grpo", f"bad{spec}", "--reward", spec)


@pytest.mark.parametrize("argv, words", [
    (("--init", "nowhere"), "nowhere does not exist"), (("--max_new", "5000"), "exceeds the context of"),
    (("--config", "grpoo"), "did you mean 'grpo'"), (("--temperature", "0"), "must be positive"),
    (("--samples", "1"), "a group needs two responses"),
    (("--minibatches", "0"), "must be at least 1"), (("--lag", "-1"), "--lag at least 0"),
    (("--minibatches", "3"), "does not part into"),
    (("--eps_hihg", "2"), "did you mean 'eps_high'"), (("--config", "kdrl"), "give --teacher")])
def test_bad_input_is_named(argv, words, shared_bases):
    with pytest.raises(UserError, match=words):
        grpo.main(["--config", "tiny", "--out", "bad", *argv])


def test_pass_at_k_by_hand():
    got = [grpo.pass_at_k(8, 2, k) for k in (1, 2, 4, 8)]
    assert got == pytest.approx([.25, .464286, .785714, 1], abs=1e-6)
    assert grpo.pass_at_k(4, 0, 2) == 0 and grpo.pass_at_k(4, 4, 1) == 1
