"""grpo.py: every worked value and limit of its methods, and whole runs."""
import math
from dataclasses import replace

import pytest
import torch
from conftest import close, merged, rand

import grpo
import model
from data import tasks
from data.run import UserError, configure, needs, read_log
from data.stats import pass_at_k
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


# --- shapers --------------------------------------------------------------------------------------


def test_overlong_by_hand():
    shaped = grpo.overlong(C1, L1, 10, buffer=4)
    assert close(shaped, [[1, -2, -1, .5]])
    adv = rows(grpo.group_norm(shaped, mask_of(L1)), mask_of(L1))
    assert close(adv, [.998625, -1.180193, -.453920, .635488], 1e-5)
    at = grpo.overlong(D([[1., 1, 1]]), D([[6., 10, 8]]), 10, buffer=4)   # the ends of the slope
    assert close(at, [[1, 0, .5]])


def test_truncate_by_hand():
    shaped = grpo.truncate(C2, C2, L2, target=7)
    assert close(shaped, [[1, 0, 0, 0], [1, 1, 1, 0]])
    adv = rows(grpo.whitened(shaped, mask_of(L2)), mask_of(L2))
    assert close(adv, [2.031959, *[-.353384] * 3, *[.839287] * 3, -1.546056], 1e-5)
    plain = rows(grpo.group_norm(shaped, mask_of(L2)), mask_of(L2))
    assert close(plain, [1.499997, -.5, -.5, -.5, .5, .5, .5, -1.499997], 1e-5)


@pytest.mark.parametrize("price", [.01, 1, 50])
def test_in_a_group_of_wrong_answers_any_price_of_length_is_the_same(price):
    shaped = grpo.linear_length(torch.zeros(1, 4).double(), L1, CAP, price=price)
    adv = rows(grpo.group_norm(shaped, mask_of(L1), group_eps=0), mask_of(L1))
    assert close(adv, [1.161895, -1.161895, .387298, -.387298], 1e-5)
    assert close(grpo.linear_length(0 * C1, L1, CAP, price=price, correct_only=True), 0 * C1)


def test_easiest_by_hand():
    shaped = grpo.easiest(C2, L2)
    assert close(shaped, [[1, 0, 0, 1], [.801857, .801857, .517342, 0]], 1e-6)
    adv = rows(grpo.group_norm(shaped, mask_of(L2)), mask_of(L2))[4:]
    assert close(adv, [.718313, .718313, -.034175, -1.402451], 1e-5)      # correct, and pushed down
    assert close(grpo.easiest(C1, L1, share=1.0), [[.838635, 0, 0, .561365]], 1e-6)


def test_easiest_limits():
    assert torch.equal(grpo.easiest(C2, L2, share=0.0), C2)
    all_of = grpo.easiest(C2, L2, share=1.0, alpha=.3)
    assert torch.all(all_of[C2 == 0] == 0) and torch.all((all_of[C2 > 0] > .7)
                                                         & (all_of[C2 > 0] < 1))
    twin = torch.cat([C2[:1]] * 5)                               # ties: the first prompt
    assert (grpo.easiest(twin, L2[:1].expand(5, 4))
            != twin).any(1).tolist() == [True] + [False] * 4
    assert close(grpo.easiest(D([[1., 0]]), D([[3., 5]]), share=1.0),
                 [[.7, 0]])                                                        # alone: σ(0) = ½


def test_history_by_hand():
    shaped = grpo.history(C1, L1, D([[5.]]))
    assert close(shaped, [[1.309017, -1, -.309017, .3]], 1e-6)
    adv = rows(grpo.group_norm(shaped, mask_of(L1)), mask_of(L1))
    assert close(adv, [1.260224, -1.097830, -.392173, .229778], 1e-5)
    assert close(grpo.history(C1, L1, D([[8.]])), [[1.707107, -.382683, 0, 1]], 1e-6)


def test_history_limits():
    assert torch.equal(grpo.history(C1, L1, D([[math.inf]])), C1)               # the first visit
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
    assert grpo.verified(C1, T([[True, False, False, False]]))[0,
                                                                  0] == -10    # correct, unfinished


def test_consistent_by_hand():
    shaped = grpo.consistent(C1, D([[.9, .4, .99, .6]]), margin=0.0)
    assert close(shaped, [[1.5, 0, 0, 1]])
    adv = rows(grpo.group_norm(shaped, mask_of(L1), group_eps=1e-4), mask_of(L1))
    assert close(adv, [1.166511, -.833222, -.833222, .499933], 1e-5)
    assert close(grpo.consistent(C1, D([[.97, 1, 1, .96]]), margin=0.0), [[1.5, 0, 0, 1.5]])
    assert close(grpo.consistent(D([[0., 1, 0]]), D([[.9, .1, .9]])), [[0, 1.5, 0]])


def test_targets_of_easy_and_hard_prompts():
    """DA-DLER: the shorter one where at least half are correct within the longer"""
    assert close(grpo.truncate(C2, C2, L2, target=7, easy=4), [[1, 0, 0, 0], [0, 0, 0, 0]])
    assert close(grpo.to_target(C2, L2, target=7, easy=4), [[4, 7, 6, 7], [4, 4, 4, 4]])
    assert close(grpo.to_target(D([[1., 0, 0, 0]]), L1, target=7, easy=4), [[4, 7, 6, 7]])
    assert close(grpo.to_target(C2, L2, target=7), L2.clamp(max=7))
    assert grpo.targets(C1, D([[5., 9, 9, 6]]), 7, 4).item() == 4        # just half


def test_outliers_by_hand():
    length, right = D([[4., 5, 4, 6, 5, 4, 5, 40]]), torch.ones(1, 8).double()
    trained = grpo.outliers(right, length, spread=2.0)
    assert close(trained, [[4, 5, 4, 6, 5, 4, 5, 34]])
    shaped = grpo.regraded(right, length, trained)
    adv = rows(grpo.group_norm(shaped, mask_of(length)), mask_of(length))
    assert close(adv, [*[.353552] * 7, -2.474867], 1e-5)
    assert torch.equal(grpo.outliers(right, length, spread=3.0),
                       length)                                           # (G - 1) / √G = 2.4749 < 3
    wrong = right.clone()
    wrong[0, 0] = 0
    assert torch.equal(grpo.outliers(wrong, length, spread=1.0), length)
    assert torch.equal(grpo.outliers(right, length, spread=2.0, least=7), length)
    assert torch.equal(grpo.outliers(right, trained, spread=2.5), trained)


def test_a_clip_is_counted_around_its_own_anchor():
    """the second argument of a surrogate with an eps is what its ratio is around"""
    around = {name: needs(fn)[1] for name, fn in grpo.SURROGATES.items()}
    assert {around[x] for x in ("clip", "clip_higher", "clip_cov", "drpo")} == {"old_logp"}
    assert (around["clip_stale"], around["anchored"]) == ("behaviour_logp", "anchor")
    assert close(grpo.anchor(OLD, TEACH, .5), .5 * OLD + .5 * TEACH)


def test_unfinished_responses_do_not_train():
    assert close(grpo.ended(L1, T([[False, True, False, False]])), [[4, 0, 6, 8]])
    assert grpo.whole(L1) is L1


def test_probable_by_hand():
    shaped = grpo.probable(D([[.8, .3, .1, .7]]), D([[.2]]), D([[1., 1, 0, 1]]))
    assert close(shaped, [[.64, .19, 0, .55]])
    adv = rows(grpo.group_norm(shaped, mask_of(L1)), mask_of(L1))
    assert close(adv, [.979528, -.514667, -1.145550, .680689], 1e-5)
    assert close(grpo.probable(C2, D([[0.], [0]]), 0 * C2), .9 * C2)


def test_agreed_by_hand():
    answers = T([[7, 7, 3, 7], [7, 5, 5, 5]])
    assert grpo.agreed(answers).tolist() == [[0, 0, 0, 0], [1, 0, 0, 0]]
    assert grpo.agreed(answers, cross=False).tolist() == [[1, 1, 0, 1], [0, 1, 1, 1]]
    assert grpo.agreed(T([[7, 7, 3, 7], [7, 7, 5, 7]])).tolist() == [[1, 1, 0, 1], [1, 1, 0, 1]]
    assert torch.equal(grpo.agreed(answers.flip(0)), grpo.agreed(answers).flip(0))
    four = T([[7, 7], [1, 1], [7, 7], [2, 2]])                   # 0 and 2 are twins, 1 and 3
    assert grpo.agreed(four).tolist() == [[1, 1], [0, 0], [1, 1], [0, 0]]
    assert grpo.agreed(T([[-1, -1, -1], [2, 1, -1]])).tolist() == [[0, 0, 0], [0, 0, 0]]
    assert grpo.agreed(T([[2, 1, -1], [1, 2, -1]])).tolist() == [[0, 1, 0],
                                                                    [0, 1, 0]]         # ties: first


def test_calibrated_by_hand():
    assert close(grpo.calibrated(D([[.3, .6, .49]]), D([[.35, 1, 1]])), [[.335, .6, .59]])


@pytest.mark.parametrize("level", ["group", "response"])
def test_flipped_rewards(level):
    g, score = torch.Generator().manual_seed(0), (rand(4000, 4) > 0).double()
    stated = torch.ones_like(score)
    stated[:, 0], score[:, 0] = 0, 0
    noisy = grpo.flipped(score, stated, g, rate=.4, level=level)
    off = (noisy != score)[:, 1:].double()
    assert off.mean() == pytest.approx(.4, abs=.03) and not noisy[:, 0].any()
    assert (off.std(1) == 0).all() == (level == "group")
    adv = grpo.deviations(score)  # a flipped group is its negative: 1 - 2p of the signal
    assert close(grpo.deviations(1 - score), -adv)
    for rate in (0.0, 1.0):
        assert close(grpo.flipped(C2, C2 + 1, g, rate=rate), (1 - C2) * rate + C2 * (1 - rate))


# --- advantages -----------------------------------------------------------------------------------


def test_group_norm_by_hand():
    adv = rows(grpo.group_norm(C1, mask_of(L1)), mask_of(L1))
    assert close(adv, [.866024, -.866024, -.866024, .866024], 1e-6)
    assert close(rows(grpo.group_norm(C1, mask_of(L1), group_eps=1e-4), mask_of(L1))[0], .865875,
                 1e-6)
    more = grpo.group_norm(3 * C2 - 7, mask_of(L2), group_eps=0)
    assert close(more, grpo.group_norm(C2, mask_of(L2), group_eps=0)) and not more[mask_of(L2)
                                                                                   == 0].any()


@pytest.mark.parametrize("name", ["group", "centred", "rloo"])
def test_a_group_without_a_signal_has_no_advantage(name):
    for reward in (0., 1., .3, .7, .9):  # eight float32 .7 do not average to .7
        assert not grpo.ADVANTAGES[name](torch.full((2, 8), reward), torch.ones(16, 3)).any()
    assert close(rows(grpo.ADVANTAGES[name](C2, mask_of(L2)), mask_of(L2)).view(2, 4).sum(1),
                 [0, 0])


def test_baselines_by_hand():
    assert close(rows(grpo.centred(C1, mask_of(L1)), mask_of(L1)), [.5, -.5, -.5, .5])
    assert close(rows(grpo.leave_one_out(C1, mask_of(L1)), mask_of(L1)), D([2, -2, -2, 2]) / 3)


def test_whitened_over_the_batch_by_hand():
    mask, flat = mask_of(L2), torch.zeros(8, 10).double()
    adv = rows(grpo.returns(C2, mask, flat, flat), mask)
    right = C2.flatten() > 0
    assert close(adv[right], [.919839] * 5, 1e-5) and close(adv[~right], [-1.067014] * 3, 1e-5)
    adv = rows(grpo.whitened(C2, mask), mask)
    assert close(adv, [1.189322, -.849516, -.849516, 1.189322, .679613, .679613, .679613,
                       -1.359226], 1e-5)
    assert close((adv[:, None] * mask).sum(), 0) and close(((adv[:, None] * mask) ** 2).sum() / 53,
                                                           1, 1e-6)


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
    far = BASE - 30                                              # beyond the clamp, too
    assert close(grpo.distilled(OLD, TEACH, far, MASK), (TEACH - OLD) * MASK)
    assert close(grpo.distilled(OLD, TEACH, far, MASK, lam=1.25, most=4.0),
                 [[1.4, 1.1, 1.5], [.2, 0, 0]])                  # (T - old) + (λ - 1) most
    assert close(grpo.distilled(OLD, TEACH, BASE, MASK, lam=0.0), (BASE - OLD) * MASK)
    assert not grpo.distilled(OLD, OLD, OLD, MASK, lam=1.7).any()


# --- credit ---------------------------------------------------------------------------------------


def test_overconfident_by_hand():
    mask = mask_of(L1)
    shift = D([[.2], [.5], [-.5], [-.1]]) * mask                 # so much a token
    adv = rows(grpo.overconfident(grpo.group_norm(C1, mask), shift, 0 * shift, mask), mask)
    assert close(adv, [.866024, -1.709598, -1.276586, .866024], 1e-5)
    same = grpo.overconfident(grpo.group_norm(C1, mask), shift, 0 * shift, mask, alpha=0.0)
    assert torch.equal(same, grpo.group_norm(C1, mask))
    level = rows(grpo.overconfident(grpo.group_norm(C1, mask), 0 * shift, 0 * shift, mask), mask)
    assert close(level[1] / -.866024, 1 + math.log(2), 1e-5)


def test_controls_by_hand():
    assert close(grpo.harsher(ADV), D([[1., 1, 1], [-1.693147, -1.693147, 0]]))
    loss = grpo.clip_stale(LOGP, OLD, ADV)
    assert close(loss * MASK, [[-1.2, -1, -.606531], [.904837, .8, 0]], 1e-6)
    assert close(grpo.linear_length(C1, L1, CAP, price=.16), [[.96, -.1, -.06, .92]])
    assert close(grpo.linear_length(C1, L1, CAP, price=.16, correct_only=True), [[.96, 0, 0, .92]])


def test_too_long_by_hand():
    mask = mask_of(L1)
    adv = grpo.group_norm(C1, mask)
    got = rows(grpo.too_long(adv, C1, L1), mask)
    assert close(got, [.866024, -1.140542, -.866024, .866024], 1e-5)
    assert close(rows(grpo.too_long(adv, C1, L1, base=1.00001), mask)[1] / -.866024, 1.000040, 1e-5)
    assert torch.equal(grpo.too_long(adv, 0 * C1, L1), adv)


# --- surrogates -----------------------------------------------------------------------------------


def test_clip_by_hand():
    loss = grpo.clip(LOGP, OLD, ADV)
    assert close(loss * MASK, [[-1.2, -1, -.606531], [.904837, .8, 0]], 1e-6)
    assert close(mean(loss), -.220339, 1e-6)
    assert close((loss * grpo.sequence_mean(MASK)).sum(), -.041546, 1e-6)
    assert close((loss * grpo.constant(MASK, 4)).sum(), -.137712, 1e-6)
    assert close(grad(lambda x: mean(grpo.clip(x, OLD, ADV))),
                 [[0, -.2, -.121306], [.180967, 0, 0]], 1e-6)
    k3 = grpo.k3(LOGP, REF)
    assert close(((loss + k3) * grpo.sequence_mean(MASK)).sum(), -.040355, 1e-6)


def test_clip_higher_by_hand():
    loss = grpo.clip_higher(LOGP, OLD, ADV, eps_high=.28)
    assert close(loss[0], [-1.221403, -1, -.606531], 1e-6) and close(mean(loss), -.224619, 1e-6)
    got = grad(lambda x: mean(grpo.clip_higher(x, OLD, ADV, eps_high=.28)))
    assert close(got[0, 0], -.244281, 1e-6)
    assert torch.equal(grpo.clip_higher(LOGP, OLD, ADV, eps_high=.2), grpo.clip(LOGP, OLD, ADV))


def test_dual_clip_by_hand():
    five = D([[math.log(5)]])
    assert close(grpo.clip_higher(five, 0 * five, D([[-1.]])), [[5]])
    assert close(grpo.clip_higher(five, 0 * five, D([[-1.]]), dual=3.0), [[3]])


@pytest.mark.parametrize("name", ["clip", "stale", "clip_cov", "kl_cov"])
def test_at_ratio_one_every_surrogate_is_reinforce(name):
    fn, zero = grpo.SURROGATES[name], torch.zeros_like(MASK)
    have = dict(old_logp=LOGP, behaviour_logp=LOGP, adv=ADV, dropped=zero, steep=zero)
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
    assert close(mean(grpo.anchored(LOGP, grpo.anchor(OLD, TEACH, alpha), ADV)), want, 1e-6)


def test_anchored_limits():
    clip = grpo.clip(LOGP, OLD, ADV)
    assert torch.equal(grpo.anchored(LOGP, grpo.anchor(OLD, TEACH, 1.0), ADV), clip)
    assert close(grpo.anchored(LOGP, grpo.anchor(OLD, OLD, .3), ADV), clip)


def test_covariances_by_hand():
    cov = grpo.covariance(LOGP, ADV, MASK)
    assert close(cov * MASK, [[.032, .432, -.768], [-1.008, .552, 0]])
    g = torch.Generator().manual_seed(0)
    assert not grpo.band(LOGP, OLD, ADV, MASK, g, ratio=2e-3, low=1.0, high=5.0, eps=1.0).any()
    got = grpo.band(LOGP, OLD, ADV, MASK, g, ratio=1.0, low=.3, high=5.0, eps=.2)
    assert got.tolist() == [[0, 1, 0], [0, 0, 0]]                # PPO's clip has (1, 1) already
    assert grpo.steepest(LOGP, ADV, MASK, ratio=2e-4).tolist() == [[0, 0, 0], [0, 1, 0]]


def test_kl_cov_by_hand():
    steep = grpo.steepest(LOGP, ADV, MASK, ratio=2e-4)
    loss = grpo.kl_cov(LOGP, OLD, ADV, steep)
    assert close(loss[1, 1], 1.106531, 1e-6) and close(mean(loss), -.163313, 1e-6)
    assert close(grpo.kl_cov(LOGP, OLD, ADV, steep, coef=0.0), -ADV * (LOGP - OLD).exp())


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


@pytest.mark.parametrize("lam, want",
                         [(.2, [.777300, .222700]), (1., [.562177, .437823]), (1e9, [.5, .5])])
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
    loss = grpo.drpo(now, old, mask, C2, L2, CAP, price) - grpo.drpo(now, old, mask, C2, L2, CAP,
                                                                     0 * mask)
    assert close(loss.mean(), 10 * (kl - .01) * kl)
    assert not grpo.hinge(now, now, mask, 2, beta=10.0, delta=1e-4).any()


# --- penalties ------------------------------------------------------------------------------------


def test_kl_terms_by_hand():
    want = [[.004837, .070320, .021403], [.004837, .049859, 0]]
    assert close(grpo.k3(LOGP, REF, beta=1.0) * MASK, want, 1e-6)
    assert close(mean(grpo.k3(LOGP, REF, beta=1.0)), .030251, 1e-6)
    assert close(mean(grpo.k2(LOGP, REF, beta=1.0)), .031)
    k2, k3 = ([[.02, .08, -.04], [.02, -.06, 0]],
              [[.019033, .065936, -.044281], [.019033, -.069972, 0]])
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
    assert close(loss, [[value]], 1e-6) and close(torch.autograd.grad(loss.sum(), x)[0], [[slope]],
                                                  1e-6)


def test_flattened_is_forward_kl_in_expectation():
    p, q = torch.softmax(rand(4), 0), torch.softmax(rand(4, seed=1), 0)
    got = (p * grpo.flattened(p.log(), q.log(), beta=1.0)).sum()
    assert close(got, (q * (q / p).log()).sum())


def test_to_teacher_by_hand():
    loss = grpo.clip(LOGP, OLD, ADV)
    assert close(mean(loss + grpo.to_teacher(LOGP, TEACH, D([[1., 0]]), .5, beta=.2)), -.184539,
                 1e-6)
    assert close(mean(loss + grpo.to_teacher(LOGP, TEACH, D([[1., 0]]), .5, beta=.002)), -.219981,
                 1e-6)
    wrong = grpo.to_teacher(LOGP, TEACH, D([[1., 0]]), .5, beta=.2, wrong_only=True)
    assert close(mean(wrong), .0148, 1e-6) and not wrong[0].any()
    for progress, beta in ((0.0, .2), (.5, .101), (1.0, .002)):  # annealed
        now = grpo.to_teacher(LOGP, TEACH, D([[1., 0]]), progress, beta=.002, beta_start=.2)
        assert close(now, grpo.k2(LOGP, TEACH, beta=beta))


def test_kl_estimators_in_expectation():
    """of a vocabulary of four: the gradient of k2 is that of KL(π||T), of k3 that of KL(T||π)"""
    z, t = rand(4).requires_grad_(), torch.log_softmax(rand(4, seed=1), 0)
    logp = torch.log_softmax(z, 0)
    p = logp.exp()

    def slope(x):
        return torch.autograd.grad(x, z, retain_graph=True)[0]
    assert close(slope((p.detach() * grpo.k2(logp, t, beta=1.0)).sum()),
                 slope((p * (logp - t)).sum()))
    assert close(slope((p.detach() * grpo.k3(logp, t, beta=1.0)).sum()),
                 slope((t.exp() * (t - logp)).sum()))


# --- steps, curricula, LatentSeek -----------------------------------------------------------------


def test_step_potentials_by_hand():
    acc, conf = D([[.1, .3, .95, .96, .5]]), D([[.2, .4, .95, .97, .9]])
    assert close(grpo.potential(acc, conf), [[-.12, -.07, .87875, .9068, .025]])
    assert close(grpo.potential(D([1., 0, 0, 1]), D([1., 1, 0, 0])), [1, -1, 0, .5])
    mask, step, probed = torch.ones(2,
                                    5).double(), torch.arange(5).expand(2, 5), torch.ones(2,
                                                                                          5).bool()
    two = [torch.cat([x, x]) for x in (acc, conf)]               # A of the group: .5 and -.5
    adv = grpo.stepwise(D([[1., 0]]), mask, step, two, probed, white=False)
    assert close(adv[0], [.444958, .467372, .994677, .457457, -.022494], 1e-5)
    plain = grpo.stepwise(D([[1., 0]]), mask, step, two, probed, alpha=0.0, xi=0.0, white=False)
    assert close(plain, mask * D([[.5], [-.5]]))                         # Dr. GRPO's
    some = probed.clone()
    some[1] = False                                                      # a response without a step
    adv = grpo.stepwise(D([[1., 0]]), mask, step.where(some, -1), two, some, white=False)
    assert close(adv[1], [-.5] * 5) and close(adv[0],
                                              [.444958, .467372, .994677, .457457, -.022494], 1e-5)
    white = grpo.stepwise(D([[1., 0]]), mask, step, two, probed)
    assert close(white.mean(), 0) and close(white.var(), 1, 1e-6)


def test_step_returns_by_hand():
    p, all_of = D([[.9, .6, .95, .95, .8]]), torch.ones(1, 5).double()
    assert close(grpo.step_returns(p, all_of, "clip"), [[-.4, -.4, -.1, -.1, -.1]])
    assert close(grpo.step_returns(p, all_of, "delta"), [[.9, .6, .95, .95, 0]])
    assert close(grpo.step_returns(p, all_of, "clip_delta"), [[0, -.3, 0, 0, 0]])
    assert close(grpo.step_returns(p, all_of, "sum"), [[4.2, 3.3, 2.7, 1.75, .8]])
    wide, fewer = torch.cat([p, p], 1), torch.cat([all_of, 0 * all_of],
                                                  1)                      # steps that are not there
    for rule in ("sum", "clip", "delta", "clip_delta"):
        assert close(grpo.step_returns(wide, fewer, rule)[:, :5],
                     grpo.step_returns(p, all_of, rule))
    again = D([[.9, .6, .6, .95, .95, .8]])                                      # a repeated step
    first = [grpo.step_returns(x, torch.ones_like(x), "delta")[0, 0] for x in (p, again)]
    assert close(first[0], first[1])
    assert close(grpo.step_returns(D([[.7]]), D([[1.]]), "delta"), [[0]])     # alone: the outcome's


def test_process_returns_by_hand():
    """the outcome and the return of the token's step, whitened: 2.5 1.6 1.6 .8 of mean 1.625"""
    two, p = torch.ones(2, 2).double(), D([[.9, .6], [.8, .8]])
    step, probed = T([[0, 1], [0, 1]]), T([[True, True]] * 2)
    got = grpo.process_returns(D([[1., 0]]), two, step, p, probed, rule="sum")
    assert close(got, [[1.259678, -.035991], [-.035991, -1.187696]], 1e-6)
    bugged = grpo.process_returns(D([[1., 0]]), two, step, p - .1, probed, rule="sum", bug=.1)
    assert close(bugged, got)
    plain = grpo.process_returns(D([[1., 0]]), two, step, p, probed, scale=0.0)
    assert close(plain, grpo.whiten(D([[1., 1], [0, 0]]), two))


def test_groups_of_the_usual_spread_train():
    shaped = D([[0., 1, 0, 1], [.5, .6, .5, .6], [.5, .5, .5, .5]])
    assert grpo.spread_enough(shaped, 0.0, .5).tolist() == [True] * 3
    assert grpo.spread_enough(shaped, .2, .5).tolist() == [True, False, False]
    assert grpo.spread_enough(shaped, 9.0, .5).tolist() == [True, False, False]  # never none


def test_the_usual_spread_by_hand():
    """0 until it has been seen ten times; the first six stand for themselves"""
    usual = grpo.Usual()
    for spread in (1., 2, 3, 4, 5, 6):
        usual.note(spread * D([[0, 2 ** .5]]))
        assert usual.tell() == 0 and usual.state()[-1] == pytest.approx(spread)
    for _ in range(4):
        usual.note(D([[0, 2 ** .5]]))
    assert usual.tell() == pytest.approx(1 + 5 * .99 ** 4)
    other = grpo.Usual()
    other.load(usual.state())
    assert other.tell() == usual.tell()


def test_sufficient_hints_by_hand():
    table, asked = {(): .2, (0, 1, 2): .7, (1, 2): .75, (0, 2): .8, (0, 1): .4, (2,): .9}, []

    def accuracy(kept):
        asked.append(tuple(sorted(kept)))
        return table[asked[-1]]
    assert grpo.sufficient(3, accuracy) == {2} and set(asked) == set(table)
    table[2,] = .6
    assert grpo.sufficient(3, accuracy) == {0, 2}
    table[2,] = .8                                                               # ties: fewer
    assert grpo.sufficient(3, accuracy) == {2}
    hurts = {(): .1, (0, 1): .9, (0,): .2, (1,): .3}
    assert grpo.sufficient(2, lambda kept: hurts[tuple(sorted(kept))]) == {0, 1}
    assert grpo.sufficient(2, lambda kept: 1.0 - .1 * len(kept)) == set()
    pair = {(): .1, (0, 1, 2): .5, (1, 2): .8, (0, 2): .7, (0, 1): .7, (0,): .95, (1,): .3,
            (2,): .3}                # what is best removed is, and so {0} is never tried
    assert grpo.sufficient(3, lambda kept: pair[tuple(sorted(kept))]) == {1, 2}
    near = {(): .1, (0, 1): .8, (0,): .7, (1,): .3}  # within a standard error: the fewest
    assert grpo.sufficient(2, lambda kept: near[tuple(sorted(kept))], margin=.15) == {0}


def test_solvable_prompts(monkeypatch):
    right = T([[0., 0], [1, 0], [1, 1]])
    monkeypatch.setattr(grpo, "rollouts", lambda *a: [(["never", "once", "always"], None)])
    monkeypatch.setattr(grpo, "graded", lambda *a: (right, []))
    c = grpo.Config(temperature=.7)
    pool, heat, _ = grpo.solvable(None, [], tasks.task("chain"), None, c, None)
    assert (pool, heat) == (["once", "always"], .7)
    right[:] = 0
    with pytest.raises(UserError, match="no prompt is ever solved"):
        grpo.solvable(None, [], tasks.task("chain"), None, c, None)


def test_reweighted_by_hand():
    a, b = [.5] * 4, [.9, .7, .8, .4]
    assert close(grpo.reweighted([a, b], 5.0, window=2), [1.010714, .989286], 1e-6)
    assert close(grpo.reweighted([a, b], .5, window=2), [1.106735, .893265], 1e-6)
    assert close(grpo.reweighted([a, b], 1e9, window=2), [1, 1])
    assert grpo.reweighted([a, a, a], 5.0, window=2) == [1, 1, 1]
    assert grpo.reweighted([a, b, b], 5.0, window=3) == [1, 1, 1]


def test_a_group_s_weight_is_its_task_s_by_the_task_s_share():
    each = T([[0.], [1.], [0.], [0.]])                           # three quarters of a half
    got = grpo.weight_of_group([1.2, .8], each, MASK)
    assert close(got, [[.8], [1.6], [.8], [.8]])
    assert close(grpo.converging(MASK, D([[2.]])), 2 * grpo.sequence_mean(MASK))
    four = torch.cat([MASK, MASK])                               # two groups of two responses
    assert close(grpo.converging(four, D([[1.], [3]])), grpo.sequence_mean(four) * D(
        [[1.], [1], [3], [3]]))


def test_losses_of_tasks_by_hand():
    losses = grpo.Losses(tasks.task("sort+chain"))
    score, objective = T([[1., 0], [1, 1], [0, 0]]), T([[0.], [0.], [1.]])
    assert losses.note([.9, 1.1], score, objective) == dict(lam_0=.9, lam_1=1.1)
    losses.note([1, 1], score[:1], objective[:1])
    assert losses.tell() == [[.25, .5], [1.0]]


def test_records_are_of_correct_responses():
    records = grpo.Records(["a", "b", "c"])
    records.note(T([[2], [0]]), T([[5., 3, 9], [4, 4, 4]]), T([[1., 0, 1], [0, 0, 0]]))
    assert records.tell() == [math.inf, math.inf, 5]
    records.note(T([[2]]), T([[7., 6, 9]]), T([[1., 1, 1]]))
    assert grpo.record_of(records.tell(), T([[2], [1]])) == [5, math.inf]


def test_the_lagged_policy_is_of_so_many_steps_ago():
    policy = torch.nn.Linear(1, 1, bias=False)
    past = grpo.Past(policy)
    for step in range(5):
        with torch.no_grad():
            policy.weight.fill_(step)
        past.note(policy)                                        # the start, 0, 1, 2, 3, 4
    assert grpo.lagged(past, lag=2).weight.item() == 2 and len(past.state()) == 3
    assert grpo.lagged(past, lag=9).weight.item() == 2           # as far back as there is


def test_majority_and_pass_at_k():
    right = T([[True, False, False, True], [False] * 4, [False, True, True, True]])
    shares = grpo.of_samples(right, ["3", "4", "4", "3", "", "", "", "", "1", "2", "2", ""])
    assert shares == {"pass@2": pytest.approx((5 / 6 + 0 + 1) / 3), "pass@4": pytest.approx(2 / 3),
                      "maj@4": pytest.approx(2 / 3)}             # 3 ties with 4 and comes first
    assert grpo.of_samples(T([[True]]), ["3"]) == {"maj@1": 1.0}
    cut = grpo.of_samples(T([[False, True, True, False]]),
                               ["", "3", "3", "5"])                            # unfinished: no vote
    assert cut["maj@4"] == 1


def test_the_temperature_of_an_entropy():
    logits = D([2., 1, 0, -1])
    for t, H in ((.6, .587660), (.85, .841205), (1, .947537), (1.2, 1.051125)):
        p = torch.softmax(logits / t, 0)
        assert close(-(p * p.log()).sum(), H, 1e-5)


def test_an_entropy_is_met(shared_bases):
    policy, tok = load(grpo.sft.base("chain_right", like="tiny"))
    c = grpo.Config(device="cpu", dtype="float32", prompts=8, samples=8, max_new=24)
    problems, g = tasks.task("chain").problems("train", 8), torch.Generator().manual_seed(0)
    _, t, _ = grpo.temperature_at(policy, problems, tok, c, g, at_entropy=1.0)
    _, roll = next(grpo.rollouts(policy, problems, tok, replace(c, temperature=t), 8, g))
    assert close(grpo.entropy_of(policy, roll, c, t), 1.0, .1)                   # of fresh samples
    with pytest.raises(UserError, match="--at_entropy 9"):
        grpo.temperature_at(policy, problems, tok, c, g, at_entropy=9.0)


def test_where_a_rising_function_crosses():
    assert grpo.crossing(math.log, 0.5) == pytest.approx(math.exp(.5), rel=1e-4)
    assert grpo.crossing(math.log, 9.0) is None is grpo.crossing(math.log, -9.0)


def test_forced_answers(shared_bases):
    """probabilities of forced ids equal those of a plain forward pass, one row at a time"""
    policy, tok = load(grpo.sft.base("chain_right", like="tiny"))
    c = grpo.Config(device="cpu", dtype="float32", micro=2)
    some = [(tok.prompt(prompt), tok.encode(text))
            for prompt, text in (("1+2?", "####3"), ("7-1+2+3?", "1"), ("7-1?", "-1=6##"))]
    p, logp, entropy = grpo.forced(policy, some, c)
    for i, (a, b) in enumerate(some):
        logits = policy.logits(policy(torch.tensor([[*a, *b]])))[0, len(a) - 1:-1].log_softmax(-1)
        one = logits.gather(1, torch.tensor(b)[:, None]).flatten()
        assert close(p[i], one.exp().mean(), 1e-5) and close(logp[i], one.mean(), 1e-5)
        assert close(entropy[i], -(logits.exp() * logits).sum(1).mean(), 1e-5)


TEXTS = ["-1=8;;+2=0####0", "####7", "+1=3w+1=2####2", "+1=2"]
FOUND = ("stated", "answer", "reflections", "truth_prob", "answer_prob", "base_prob", "pattern",
         "objective")


@pytest.fixture
def asked(shared_bases):
    """What is known of four responses to two problems, and the probability of a text's answer."""
    policy, tok = load(grpo.sft.base("chain_right", like="tiny"))
    task, c = tasks.task("chain"), grpo.Config(device="cpu", dtype="float32", samples=2)
    problems = [dict(prompt="9-1+2?", answer="0", seed=0), dict(prompt="1+1?", answer="2", seed=0)]
    posed = [p for p in problems for _ in range(2)]
    full = [(tok.prompt(p), [*tok.encode(x), tok.eos]) for p, x in zip(posed, TEXTS)]
    tokens, mask = grpo.collate(full, tok.pad)
    roll = model.Rollout(tokens, mask, 0 * mask, T([len(p) for p, _ in full]),
                        T([True, True, True, False]))

    def prob(prompt, text, answer):
        rows = [(tok.prompt(prompt) + tok.encode(text), tok.encode(answer))]
        return grpo.forced(policy, rows, c)[0]
    return dict(c=c, policy=policy, ref=policy, slow=policy, tok=tok, task=task, roll=roll,
                texts=TEXTS, problems=problems, posed=posed, mask=mask), prob


def test_facts_of_responses(asked):
    known, prob = asked
    facts = {k: torch.as_tensor(grpo.call(grpo.FACTS[k], known)).float().view(2, -1)
             for k in FOUND}
    assert {*FOUND, "best"} == {*grpo.FACTS}
    assert facts["stated"].tolist() == [[1, 1], [1, 0]]
    assert facts["answer"].tolist() == [[0, 1], [2, -1]]
    assert facts["reflections"].tolist() == [[0, 0], [1, 0]]
    after, bare = prob("9-1+2?", "-1=8;;+2=0####", "0"), prob("9-1+2?", "####", "0")
    assert close(facts["truth_prob"][0], [after, bare], 1e-6)
    assert close(facts["answer_prob"][0, 1:], prob("9-1+2?", "####", "7"), 1e-6)
    assert facts["answer_prob"][1, 1] == 0
    assert close(facts["base_prob"][:, 0], [prob("9-1+2?", "####", "0"),
                                            prob("1+1?", "####", "2")], 1e-6)


def test_facts_of_steps(asked):
    known, prob = asked
    grpo.ask({"step", "belief", "process"}, grpo.BATCH, known)
    assert known["probed"].tolist() == [[True, True], [False, False], [True, True], [True, False]]
    at = len(known["tok"].prompt(known["problems"][0]))
    assert known["step"][0, at:at + 11].tolist() == [0] * 4 + [1] * 7
    assert (known["step"][1] == -1).all()
    after = prob("9-1+2?", "-1=8;;+2=0####", "0")
    assert close(known["belief"][0][0], [prob("9-1+2?", "-1=8####", "0"), after], 1e-6)
    assert known["process"].tolist() == [[1, 1], [0, 0], [0, 1], [1, 0]]


def test_only_what_is_asked_for_is_computed():
    calls = []

    def a(b):
        calls.append("a")
        return b + 1

    def b(x):
        calls.append("b")
        return 2 * x

    def never(x):
        raise AssertionError
    known = dict(x=3)
    grpo.ask({"a", "b", "x"}, dict(a=a, b=b, c=never), known)
    assert known == dict(x=3, a=7, b=6) and calls == ["b", "a"]


def test_what_a_run_asks_for_in_the_end():
    def names(*argv):
        _, f = configure(grpo.Config, grpo.PRESETS, grpo.AXES, argv=["--config", *argv])
        return grpo.asked_for(f)
    assert {"records", "best"} <= names("hapo") and not {"slow", "cuts", "now"} & names("hapo")
    assert {"slow", "roll"} <= names("care") and {"cuts", "belief"} <= names("spae")
    assert {"losses", "priority", "objective"} <= names("recap") and "now" in names("drpo")
    assert {"past", "behaviour_logp"} <= names("aipo") and "teacher" in names("kdrl")
    assert not {*grpo.MEMORIES, *grpo.FACTS, *grpo.BATCH, *grpo.MINIBATCH} & names("grpo")


# --- weights and filters --------------------------------------------------------------------------


@pytest.mark.parametrize("name", grpo.WEIGHTS)
def test_padding_weighs_nothing(name):
    fn, loss = grpo.WEIGHTS[name], rand(2, 3)
    wide = torch.cat([MASK, torch.zeros(2, 3).double()], 1)

    def weight(mask):
        return grpo.call(fn, dict(mask=mask, cap=CAP, lam=D([[2.]])))
    assert close((weight(MASK) * loss).sum(), (weight(wide)[:, :3] * loss).sum())
    assert not weight(wide)[:, 3:].any()
    assert torch.isfinite(weight(0 * MASK)).all()                # rows that do not train


def test_weights_by_hand():
    ones = torch.ones(3, 4).double()
    assert close(grpo.token_mean(ones),
                 grpo.sequence_mean(ones)) and close(grpo.token_mean(MASK).sum(), 1)
    assert close(grpo.sequence_sum(MASK), MASK / 2)


STEP = torch.arange(10).expand(8, 10) // 3
PROBED = torch.tensor([[True] * 4, [True, True, False, False]] * 4)


def rounds(*scores):
    """Rounds of groups, and how many have been made."""
    drawn = []
    for i, score in enumerate(scores):
        score = D(score)
        n, width = score.numel(), 3 + i                          # a later round is wider
        roll = model.Rollout(torch.full((n, width), i + 1), torch.ones(n, width),
                            torch.zeros(n, width), torch.ones(n), torch.ones(n) > 0)
        drawn.append(dict(
            score=score, shaped=2 * score, roll=roll, ref=REFERENCE,
            problems=[f"{i}.{k}" for k in range(len(score))],
            posed=[f"{i}.{k}" for k in range(len(score)) for _ in score[0]], texts=["x"] * n))
    return iter(drawn)


class REFERENCE:
    class config:
        pad_token_id = 9


FLAT, MIXED = [1., 1], [1., 0]


def test_a_filter_asks_for_rounds_until_enough_groups_are_mixed():
    fresh = rounds([FLAT, MIXED], [FLAT, FLAT], [MIXED, MIXED], [MIXED, MIXED])
    batch, seen = grpo.mixed(fresh, 2)
    assert batch["problems"] == ["0.1", "2.0"] and batch["passed"] == 3
    assert batch["posed"] == ["0.1", "0.1", "2.0", "2.0"] and len(seen["score"]) == 6
    assert batch["roll"].tokens.tolist() == [[1, 1, 1, 9, 9]] * 2 + [[3] * 5] * 2
    assert len(list(fresh)) == 1                                 # and for no more


def test_a_step_of_fewer_groups_than_prompts(shared_bases):
    """a filter that gives up hands on what it has: all of it trains, and nothing else"""
    tiny("dapo", "few", "--rounds", "1", "--prompts", "8", "--minibatches", "4")
    groups = [row["groups"] for row in read_log("few") if "groups" in row]
    assert len(groups) == 2 and 0 < min(groups) < 8


def test_a_filter_gives_up_after_so_many_rounds():
    fresh = rounds([FLAT, MIXED], [FLAT, FLAT], [MIXED, MIXED])
    batch, seen = grpo.mixed(fresh, 2, rounds=2)
    assert batch["problems"] == ["0.1"] and batch["passed"] == 1 and len(seen["score"]) == 4
    batch, _ = grpo.mixed(rounds([FLAT, FLAT], [FLAT, FLAT]), 2, rounds=2)       # none: the last
    assert batch["problems"] == ["1.0", "1.1"] and batch["passed"] == 0
    batch, seen = grpo.every(rounds([FLAT, MIXED]))
    assert batch["problems"] == ["0.0", "0.1"] and seen["score"] is batch["score"]


HAVE = dict(
    score=C2, correct=C2, shaped=C2, length=L2, cap=CAP, best=D([[5.], [9.]]), reflections=L2,
    truncated=C2 > 0, answer_prob=C2 / 2, mask=mask_of(L2), generator=None, price=mask_of(L2),
    dropped=mask_of(L2), steep=mask_of(L2), truth_prob=C2 / 3, base_prob=D([[.1], [.2]]),
    stated=C2, answer=3 * C2, pattern=C2 / 4, trained=L2, step=torch.arange(10).expand(8, 10) // 3,
    probed=torch.tensor([[True] * 4, [True, True, False, False]] * 4), progress=.5,
    belief=(rand(8, 4).sigmoid(), rand(8, 4, seed=1).sigmoid()), lam=D([[1.], [2]]),
    process=rand(8, 4, seed=2).sigmoid())
HAVE |= {k: rand(8, 10, seed=i) for i, k in enumerate((
    "logp", "old_logp", "ref_logp", "teach_logp", "anchor", "behaviour_logp", "flat_logp", "adv"))}


@pytest.mark.parametrize("table", [
    grpo.TRIMS, grpo.SHAPERS, grpo.ADVANTAGES, grpo.CREDITS, grpo.SURROGATES, grpo.PENALTIES,
    grpo.WEIGHTS])
def test_nothing_changes_its_input(table):
    before = {k: x.clone() for k, x in HAVE.items() if torch.is_tensor(x)}
    for fn in table.values():
        assert torch.isfinite(grpo.call(fn, HAVE).double()).all()
        assert all(torch.equal(HAVE[k], x) for k, x in before.items())


# --- whole runs -----------------------------------------------------------------------------------

LEARNS_FROM_A_TEACHER = {"rlad", "kdrl", "opd", "exopd"}


def tiny(config, out, *extra):
    teacher = ["--teacher", "base:chain_right"] if config in LEARNS_FROM_A_TEACHER else []
    small = dict(opd=["--prompts", "8", "--samples", "1"],
                 exopd=["--prompts", "8", "--samples", "1"],
                 acereason=["--at_entropy", "1.0"], rif=["--screen", "64", "--pool", "8"])
    return grpo.main(merged("--config", f"{config},tiny", "--steps", "2", "--eval_prompts", "2",
                            *small.get(config, []), *teacher, "--out", out, *extra))


def weights(folder):
    return load(folder)[0].state_dict()


@pytest.mark.parametrize("config, extra", [
    ("hapo", ()), ("aipo", ("--lag", "1")), ("rif", ()), ("acereason", ()), ("recap", ()),
    ("care", ()), ("rlpr", ()), ("kdrl", ())])
def test_resume_is_exact(config, extra, shared_bases):
    """4 steps = 2 + --resume + 2, bit for bit: memories, and what was prepared, too"""
    args = ["--steps", "4", "--save_every", "2", *extra]
    whole = tiny(config, "whole", *args)
    tiny(config, "half", *args, "--stop", "2")
    assert tiny(config, "half", *args, "--resume") == whole
    a, b = weights("whole"), weights("half")
    assert all(torch.equal(a[k], b[k]) for k in a)


@pytest.mark.parametrize("config",
                         ["grpo", "dr_grpo", "rloo", "dapo", "drpo", "clip_cov", "kl_cov", "rapo"])
def test_neither_micro_nor_order_changes_the_gradient(config, shared_bases, monkeypatch):
    """of every minibatch of a run; not the weights after it: Adam makes steps of what rounding
    leaves"""
    real, compared = grpo.backward, []

    def twice(policy, batch, groups, c, f, g, progress):
        state, grads = g.get_state(), []
        for micro, order in ((4, groups.flip(0) if config != "clip_cov" else groups), (64, groups)):
            g.set_state(state)  # Clip-Cov draws tokens in their order
            policy.zero_grad()
            result = real(policy, batch, order, replace(c, micro=micro), f, g, progress)
            grads.append(torch.cat([p.grad.flatten() for p in policy.parameters()
                                    if p.grad is not None]))
        if grads[1].norm() > 0:                                  # a rollout may have no signal
            compared.append(((grads[0] - grads[1]).norm() / grads[1].norm()).item())
        return result
    monkeypatch.setattr(grpo, "backward", twice)
    tiny(config, "micro", "--samples", "8")
    assert compared and max(compared) < 1e-4


def test_the_weights_of_objectives_scale_their_gradients(shared_bases, monkeypatch):
    """RECAP: without the weight of one task, what is left and what is gone add up to the whole"""
    real, compared = grpo.backward, []

    def split(policy, batch, groups, *rest):
        grads, lam = [], batch["lam"]
        for keep in (batch["objective"] == 0, batch["objective"] == 1, batch["objective"] >= 0):
            policy.zero_grad()
            result = real(policy, batch | dict(lam=lam * keep), groups, *rest)
            grads.append(torch.cat([p.grad.flatten() for p in policy.parameters()
                                    if p.grad is not None]))
        if grads[2].norm() > 0:
            compared.append(((grads[0] + grads[1] - grads[2]).norm() / grads[2].norm()).item())
        return result
    monkeypatch.setattr(grpo, "backward", split)
    tiny("recap", "lam", "--samples", "8", "--penalty", "k2", "--beta", "1.0")
    assert compared and max(compared) < 1e-4


def test_a_filter_that_nothing_passes(shared_bases):
    """a reward that is the same for all: every group is flat, and the weights stay as they are"""
    (shared_bases / "flat.py").write_text("def same(problem, text, finished):\n    return 0.7\n")
    tiny("dapo", "flat", "--reward", "flat.py:same", "--shaper", "plain", "--save_every", "1")
    # an advantage that the rewards do not decide: nothing passed, so that nothing trains
    tiny("opd", "taught", "--reward", "flat.py:same", "--filter", "mixed", "--samples", "2",
         "--prompts", "4", "--rounds", "1")
    for name in ("flat", "taught"):
        log = [row for row in read_log(name) if "correct" in row]
        assert len(log) == 2 and all(row["groups"] == 0 and row["flat"] == 1 and row["norm"] == 0
                                     for row in log)


def test_a_split_of_one_problem(shared_bases):
    assert "val_accuracy" in tiny("grpo", "one", "--eval_prompts", "1")


def test_a_teacher_must_speak_the_same_tokens(shared_bases):
    with pytest.raises(UserError, match="with the tokenizer of --init"):
        grpo.main(["--config", "kdrl,tiny", "--teacher", "base:toyif_base", "--out", "mixed"])


def test_a_reward_of_ones_own(shared_bases):
    code = "def short(problem, text, finished):\n    return float(len(text) < 9)\n"
    (shared_bases / "mine.py").write_text(code)
    tiny("grpo", "mine", "--reward", "mine.py:short")
    assert any(row.get("reward", 0) > 0 for row in read_log("mine"))
    for spec, words in (("mine.py:shrot", "has no function 'shrot'"), ("mine", "give task, swe_rl"),
                        ("PATH", "write the path itself"),
                        ("ours.py:short", "of a file that exists")):
        with pytest.raises(UserError, match=words):
            tiny("grpo", f"bad{spec}", "--reward", spec)


@pytest.mark.parametrize("argv, words", [
    (("--init", "nowhere"), "nowhere does not exist"), (("--max_new", "5000"), "does not fit the"),
    (("--config", "grpoo"), "did you mean 'grpo'"), (("--temperature", "0"), "must be above 0"),
    (("--samples", "1"), "a group needs two responses"),
    (("--minibatches", "0"), "must be at least 1"),
    (("--config", "aipo", "--lag", "0"), "--lag 0: must be at least 1"),
    (("--minibatches", "3"), "does not part into.* whole groups; --minibatches 1 does"),
    (("--group_esp", "2"), "did you mean 'group_eps'"), (("--config", "kdrl"), "give --teacher"),
    (("--data", "gsm8k.jsonl", "--config", "knowrl"), "no file")])
def test_bad_input_is_named(argv, words, shared_bases):
    with pytest.raises(UserError, match=words):
        grpo.main(merged("--config", "tiny", "--out", "bad", *argv))


@pytest.mark.parametrize("config, argv, words", [
    ("drpo", ("--advantage", "rloo"), "--advantage: this run does not read it"),
    ("drpo", ("--group_eps", "1"), "--group_eps: this run does not read it"),
    ("drpo", ("--weight", "token_mean"), "--weight token_mean does nothing"),
    ("opd", ("--kl_reward", "1", "--teacher", "base:chain_right"), "--kl_reward: this run"),
    ("hapo", ("--noise", "noisy"), "--noise: this run does not read it"),
    ("easy", ("--reward", "rpr"), "--reward: this run does not read it"),
    ("grpo", ("--teacher", "base:chain_right"), "--teacher: this run does not read it"),
    ("grpo", ("--ratio", "0.1"), "it belongs to surrogate 'clip_cov'"),
    ("grpo", ("--rounds", "3"), "it belongs to filter 'mixed'"),
    ("grpo", ("--shaper", "regraded"), "does nothing with --trim whole"),
    ("grpo", ("--shaper", "agreed"), "give --draw twins"),
    ("co_reward", ("--prompts", "5", "--minibatches", "1"), "even --prompts"),
    ("co_reward", ("--filter", "mixed"), "--filter every"),
    ("grpo", ("--weight", "recap"), "give several"),
    ("recap", ("--surrogate", "drpo"), "whose loss is of groups"),
    ("grpo", ("--data", "signatures", "--prepare", "rif", "--noise", "noisy"), "asks for answers"),
    ("knowrl", ("--data", "arithmetic"), "needs a task with 'hints'")])
def test_what_would_do_nothing_is_an_error(config, argv, words, shared_bases):
    with pytest.raises(UserError, match=words):
        grpo.main(merged("--config", f"{config},tiny", "--out", "bad", *argv))
    assert not (shared_bases / "bad").exists()


def test_pass_at_k_by_hand():
    got = [pass_at_k(8, 2, k) for k in (1, 2, 4, 8)]
    assert got == pytest.approx([.25, .464286, .785714, 1], abs=1e-6)
    assert pass_at_k(4, 0, 2) == 0 and pass_at_k(4, 4, 1) == 1
