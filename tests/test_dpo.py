"""dpo.py: every worked value, limit and sign of its losses, exact tabular checks, and whole
runs."""
import json
import math
from collections import Counter
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from conftest import close, merged, rand

import dpo
import optim
import reward
from data import prefs
from data.run import UserError, headings, hyper, needs, read_log
from model import load

D = partial(torch.tensor, dtype=torch.float64)
LOG2 = math.log(2)

# Two worked pairs: the same sums of log-probs, other lengths
E = dict(chosen_logp=D([-10.]), rejected_logp=D([-12.]), chosen_len=D([5.]), rejected_len=D([6.]),
         chosen_ratio=D([1.]), rejected_ratio=D([-.5]))
E2 = E | dict(chosen_len=D([4.]), rejected_len=D([8.]))
TOK = dict(chosen_logps=D([[-1., -2, -3, -2, -2, 0]]),
           rejected_logps=D([[-1., -3, -2, -2, -1, -3]]))
REF = dict(chosen=D([[-1.5, -2, -3.5, -2, -2, 0]]), rejected=D([[-1., -2.5, -2, -2, -1.5, -2.5]]))
MASKS = dict(chosen_mask=D([[1., 1, 1, 1, 1, 0]]), rejected_mask=torch.ones(1, 6).double(),
             chosen_eos=D([[0., 0, 0, 0, 1, 0]]), rejected_eos=D([[0., 0, 0, 0, 0, 1]]))
DELTA = {f"{side}_delta": TOK[f"{side}_logps"] - REF[side] for side in REF}
for world in (E, E2):
    world |= {f"{side}_mean": world[f"{side}_logp"] / world[f"{side}_len"] for side in REF}
    world |= TOK | MASKS | DELTA


def call(name, have=E, **kw):
    """A loss of LOSSES on the worked pair, or on what it is given."""
    fn = dpo.LOSSES[name]
    return fn(*(have[k] for k in needs(fn)), **kw)


GOLDEN = [
    ("dpo", {}, .620957), ("dpo", dict(beta=5.), .000553), ("cdpo", {}, .635957),
    ("cdpo", dict(flip=.2), .650957), ("rdpo", {}, .602207), ("ipo", {}, 12.25),
    ("ipo_norm", {}, 22.246944),
    ("dpo_norm", dict(beta=.1), .679081), ("hinge", dict(gamma=.1), .85), ("hinge", {}, .925),
    ("exo", {}, 2.505517),
    ("bco_pair", {}, 1.312856), ("nca", {}, 1.350825), ("apo_zero", {}, .962523),
    ("apo_down", {}, .987549),
    ("flex", {}, .639659), ("sppo_hard", {}, 18.125), ("sppo_hard", dict(beta=.001), 249250.625),
    ("simpo", {}, 1.313262), ("simpo", dict(beta=2.5, gamma=1.375), 1.600413),
    ("orpo", {}, 2.069315),
    ("slic_hf", dict(lam=0.), 0.), ("slic_hf", {}, 5.),
    ("fdpo", dict(divergence="forward_kl"), .631154),
    ("fdpo", dict(divergence="js"), .660652), ("fdpo", dict(divergence="alpha"), .627691),
    ("ld_dpo", {}, .632599), ("ld_dpo", dict(alpha=0.), .644397),
    ("ld_dpo", dict(alpha=1.), .620957)]


@pytest.mark.parametrize("name, kw, value", GOLDEN)
def test_worked_values(name, kw, value):
    assert close(call(name, **kw), [value])


@pytest.mark.parametrize("name, kw, value", [
    ("simpo", {}, 3.048587), ("simpo", dict(beta=2.5, gamma=1.375), 3.895542),
    ("orpo", {}, 2.643789), ("ipo_norm", {}, 21.972656), ("dpo_norm", dict(beta=.1), .677644)])
def test_worked_values_where_lengths_differ(name, kw, value):
    assert close(call(name, E2, **kw), [value])


def test_kto_by_hand():
    both = D([1., -.5]), D([1., 0])
    assert close(dpo.kto(*both, D(0.)), [.475021, .487503])
    assert close(dpo.kto(*both, D(.5)), [.487503, .475021])
    assert close(dpo.kto(*both, D(0.), desirable=2., undesirable=3.), [2 * .475021, 3 * .487503],
                 2e-6)


def test_bco_by_hand_and_its_limit():
    both, shift = (D([1., -.5]), D([1., 0])), D([.025, .025])
    assert close(dpo.bco(*both, shift), [.65635, .65635])
    assert close(dpo.bco(*both, 0 * shift).sum(), call("bco_pair")[0])
    moved = dpo.bco(both[0] + 3, both[1], shift + .3)  # the same constant on rewards and shift
    assert close(moved, dpo.bco(*both, shift))


def test_the_shift_is_the_mean_of_both_classes_means():
    shifts, ratio, good = dpo.Shift(), D([1., -.5, -.5]), D([1., 0, 0])
    assert close(dpo.shift(ratio, good, shifts)["reward_shift"], [.025] * 3)
    assert close(dpo.shift(2 * ratio, good, shifts)["reward_shift"], [.99 * .025 + .01 * .05] * 3)
    again = dpo.Shift()
    again.load(shifts.state())
    assert again.note(0., .99) == shifts.note(0., .99)


def test_npo_by_hand_its_limit_and_bounds():
    have = D([-.5]), D([0.]), D([-2.])
    assert close(dpo.npo(*have), [13.369193]) and close(dpo.npo(*have, beta=1.), [.948154])
    small = 1e-4
    assert abs(dpo.npo(*have, beta=small) - 2 / small * LOG2
               + .5).item() < 1e-5                                             # gradient ascent's d
    assert close(dpo.npo(D([-.5]), D([1.]), D([-2.]), retain=.5), [1.])
    assert close(dpo.ga(D([-3., -3]), D([0., 1]), D([-1., -2])), [-3, 2])
    for d, weight in ((0., 1.), (-50., 2 * torch.sigmoid(D(-5.)).item()), (-1e3, 0.), (1e3, 2.)):
        x = D([d]).requires_grad_()
        dpo.npo(x, D([0.]), D([0.])).backward()
        assert close(x.grad, [weight], 1e-5)


def test_madpo_weights_by_hand():
    for m, c, w in ((.5, 1.537158, 1.097603), (4., .595068, .932075), (-1., 1.364175, .756903)):
        assert close(torch.stack(dpo.margin_weight(D(m))), [c, w])
    assert dpo.margin_weight(D(-3.))[1] == 1
    for m, tau, value in ((.5, 2., .681564), (4., 2., .578779), (-1., 2., .470004),
                          (.5, 6.906755, .72881)):
        assert close(call("madpo", E | dict(margin=D([m])), tau=tau), [value])
    assert close(dpo.margin_weight(D([2., -2.]))[0], [1, 1])


def test_madpo_s_minimiser_is_c_m():
    """With labels of probability σ(m) the best βh is c(m) m."""
    m = D(.5)
    z = torch.linspace(-1, 3, 400001).double()
    p, (c, w), back = torch.sigmoid(m), dpo.margin_weight(m), dpo.margin_weight(-m)[1]
    risk = p * w * -dpo.logs(z) + (1 - p) * back * -dpo.logs(-z)
    assert abs(z[risk.argmin()] - .768579) < 2e-5 and close(c * m, .768579)


def test_beta_dpo_by_hand():
    for kept, beta, value in ((1.5, .13, .600393), (-2., .001, .692397)):
        now = max(1e-3, .1 * (1 + .6 * (kept - 1)))
        assert close(now, beta) and close(dpo.beta_dpo(D([1.]), D([-.5]), D([now]), D([1.])),
                                          [value])


def test_pace_keeps_an_exact_number_and_a_bounded_beta():
    g, gaps, gap, zero = torch.Generator().manual_seed(0), dpo.Gaps(), rand(40) * 3, rand(40)

    def pace(gap, gaps, **kw):
        return dpo.pace(gap + zero, zero, gaps, g, **kw)
    out = pace(gap, gaps)
    assert (out["kept"] > 0).sum() == 32 and close(out["kept"].sum(), 40)
    assert close(gaps.now[0], gap.mean())
    kept = gap[out["kept"] > 0].mean().item()
    assert close(out["beta_now"], [.1 * (1 + .6 * (kept - gap.mean().item()))] * 40)
    again = pace(gap + 5, gaps)  # the running mean moves a tenth of the way
    assert close(gaps.now[0], gap.mean() + .5) and again["beta_now"][0] > out["beta_now"][0]
    assert close(pace(gap - 1e3, dpo.Gaps(), momentum=1.)["beta_now"].min() >= 1e-3, True)
    plain = pace(gap, dpo.Gaps(), a=0., drop=0.)
    assert close(plain["beta_now"], [.1] * 40) and close(plain["kept"], [1.] * 40)


def test_treg_by_hand():
    credit = dict(chosen_credit=D([[.2, -.1, .3, 0, .1, 0]]),
                  rejected_credit=D([[-.2, -.3, 0, .1, -.1, .2]]))
    assert close(call("treg", E | credit), [.629052])
    zero = {k: 0 * v for k, v in credit.items()}
    assert close(call("treg", E | zero), call("dpo"))
    tok = TOK["chosen_logps"].clone().requires_grad_()  # ω = .46257 is a weight, detached
    call("treg", E | credit | dict(chosen_logps=tok)).sum().backward()
    assert close(tok.grad, -.25 * .46257 * .1 * credit["chosen_credit"])


def test_sparsepo_by_hand():
    """KL on the chosen prefix is added, on the rejected one subtracted; without masks it is DPO."""
    have = E | dict(chosen_kl=D([[.1, .1, .1, 0, 0, 0]]), rejected_kl=D([[.1, 0, 0, 0, 0, 0]]))
    have |= dict(chosen_weight=D([[.5] * 6]), rejected_weight=D([[.5] * 6]))
    ones = dict(reward_mask="ones", kl_mask="ones")
    assert close(call("sparsepo", have, **ones), [.611755])
    assert close(call("sparsepo", have, reward_mask="ones", kl_mask="zeros"), call("dpo"))
    half = -dpo.logs(D([.1 * (.75 + .1)]))
    assert close(call("sparsepo", have), half) and close(call("sparsepo", have, l1=.01),
                                                         half + .01 * 12)


def test_lists_by_hand():
    ratio, labels = D([[1., -.5, .25]]), D([[.9, .2, .5]])
    assert close(dpo.lipo(ratio, labels), [.512158]) and close(dpo.list_mle(ratio, labels),
                                                               [1.681837])
    two = D([[1., -.5]]), D([[1., 0]])
    assert close(dpo.lipo(*two), [.330632]) and close(dpo.lipo(*two), .532456 * call("dpo"), 2e-6)
    assert close(dpo.lipo(ratio, D([[.5, .5, .5]])), [0])
    order = [2, 0, 1]
    assert close(dpo.lipo(ratio[:, order], labels[:, order]), dpo.lipo(ratio, labels))
    assert close(dpo.list_mle(ratio[:, order], labels[:, order]), dpo.list_mle(ratio, labels))


def test_lipo_s_weights_have_no_gradient():
    x = D([[1., -.5, .25]]).requires_grad_()
    labels = D([[.9, .2, .5]])
    dpo.lipo(x, labels).sum().backward()
    by_hand = torch.zeros(3).double()
    rank = {0: 1, 2: 2, 1: 3}
    for i in range(3):
        for j in range(3):
            if labels[0, i] > labels[0, j]:
                delta = abs(2 ** labels[0, i] - 2 ** labels[0, j]) * abs(
                    1 / math.log1p(rank[i]) - 1 / math.log1p(rank[j]))
                pull = .1 * delta * torch.sigmoid(-.1 * (x[0, i] - x[0, j])).detach()
                by_hand[i], by_hand[j] = by_hand[i] - pull, by_hand[j] + pull
    assert close(x.grad[0], by_hand)


def test_pro_by_hand():
    a, r, logp = D([[-2., -2, -1.5]]), D([[1., .4, -.2]]), D([[-10., -12, -9]])
    assert close(dpo.pro(a, logp, r), [2.669544 + 2]) and close(dpo.pro(a, logp, r, weight=0.),
                                                                [2.669544])
    two = dpo.pro(D([[-1., -2]]), D([[0., 0]]), D([[1., 0]]))
    assert close(two, -dpo.logs(D([1.])))
    order = [1, 2, 0]
    assert close(dpo.pro(a[:, order], logp[:, order], r[:, order]), dpo.pro(a, logp, r))


def test_logo_by_hand():
    means = D([[-2., -2, -3]])
    kw = dict(beta=2.5, gamma=2.5 * .25)
    assert close(dpo.logo(means, lam=0., **kw), [.428701]) and close(dpo.logo(means, **kw),
                                                                     [.628701])
    assert close(dpo.logo(means[:, :2], lam=0., beta=2., gamma=1.), call("simpo"))
    assert close(dpo.logo(means[:, [0, 2, 2]], **kw), dpo.logo(means[:, [0, 2]], **kw))


def test_self_play_losses_by_hand():
    have = E | dict(chosen_win=D([.8]), rejected_win=D([.3]))
    assert close(call("sppo", have), [3.125]) and close(call("sppo", have, beta=.001), [64600.625])
    assert close(call("dno", have), [.677588])
    last = dict(chosen_prev_ratio=D([-10 + 10.5]), rejected_prev_ratio=D([-12 + 11.8]))
    assert close(call("inpo", E | last, eta=.1, tau=.1 / 3), [16.267778])
    assert close(call("inpo", E | last, eta=.0075, tau=.0025), [4316.49], .01)
    assert close(call("inpo", E | last, eta=.1, tau=.1), call("ipo"))
    other = E | dict(other_logp=D([-12.]), other_ratio=D([-.5]))
    assert close(call("xpo", other), [.620837]) and close(call("xpo", other, alpha=.01), [.500957])
    assert close(call("selm", other), [.620907]) and close(call("selm", other, alpha=.1), [.615957])
    logp = D([-7.]).requires_grad_()
    dpo.nash_md(logp, D([1.]), D([.7])).backward()
    assert close(logp.grad, [-.1])                                 # .7 - .5 - .1, to be ascended
    assert close(dpo.nash_mp(D([-1.]), D([1.]), D([0.5]), D([.7]), tau=.1, eta=.5), [.2 - .1 * 2])


def test_hypo_by_hand():
    ratio, logp = D([[1., -.5, 1., -.5]]), D([[-10., -12, -3, -4]]).requires_grad_()
    loss = dpo.hypo(D([1.]), D([-.5]), ratio, logp, lam=.1)
    loss.backward()
    assert close(logp.grad, [[0, 0, .1 * 1.5 / 2, -.1 * 1.5 / 2]])
    assert close(dpo.hypo(D([1.]), D([-.5]), ratio, logp, lam=0.), call("dpo"))


def test_hypo_s_surrogate_has_the_gradient_of_the_kl():
    """On four answers, exactly: E_y1,y2 of the surrogate's gradient is that of KL(π||π_ref)."""
    z, ref = rand(4).requires_grad_(), torch.log_softmax(rand(4, seed=1), 0)
    logp = torch.log_softmax(z, 0)
    kl = (logp.exp() * (logp - ref)).sum()
    exact, = torch.autograd.grad(kl, z, retain_graph=True)
    zero, total = D([0.]), 0.0
    for i in range(4):
        for j in range(4):
            pick = [0, 0, i, j]
            loss = dpo.hypo(zero, zero, (logp - ref)[pick][None], logp[pick][None], lam=1.)
            total = total + (logp[i] + logp[j]).exp().detach() * loss.sum()
    got, = torch.autograd.grad(total, z)
    assert close(got, exact)


def test_mpo_is_dpo_on_easy_rows_and_a_policy_gradient_on_hard_ones():
    a, b = D([-10., -10]).requires_grad_(), D([-12., -12]).requires_grad_()
    loss = dpo.mpo(D([1., 1]), D([-.5, -.5]), a, b, D([0., .7]), D([0., 1]))
    assert close(loss[0], call("dpo")[0])
    loss[1].backward()
    advantage = .7 - .1 * 1.5
    assert close(a.grad, [0, -.5 * advantage]) and close(b.grad, [0, .5 * advantage])


# --- limits, signs, gradients ---------------------------------------------------------------------

NEUTRAL = dict(margin=D([0.]), kept=D([1.]), beta_now=D([.1]), chosen_win=D([9e3]),
               rejected_win=D([-9e3]),
               other_logp=D([-9.]), other_ratio=D([-1.]), chosen_kl=torch.ones(1, 6).double(),
               rejected_kl=torch.ones(1, 6).double(), chosen_weight=torch.ones(1, 6).double(),
               rejected_weight=torch.ones(1, 6).double(), chosen_credit=torch.ones(1, 6).double(),
               rejected_credit=torch.ones(1, 6).double(), list_ratio=D([[1., -.5, 3, 1]]),
               list_logp=D([[-1., -2, -3, -4]]))


@pytest.mark.parametrize("name, kw", [
    ("cdpo", dict(flip=0.)), ("rdpo", dict(flip=0.)), ("flex", dict(beta_minus=.1)), ("madpo", {}),
    ("madpo", dict(strongest=1.)), ("beta_dpo", {}), ("ld_dpo", dict(alpha=1.)),
    ("treg", dict(alpha=0.)),
    ("fdpo", dict(divergence="reverse_kl")),
    ("sparsepo", dict(reward_mask="ones", kl_mask="zeros")),
    ("xpo", dict(alpha=0.)), ("selm", dict(alpha=0.)), ("hypo", dict(lam=0.)), ("dno", {})])
def test_limits_that_are_dpo(name, kw):
    assert close(call(name, E | NEUTRAL, **kw), call("dpo"))


def test_more_limits():
    alpha = call("fdpo", divergence="alpha", alpha=1e-7)
    assert close(alpha, call("dpo")) and close(call("fdpo", divergence="alpha", alpha=1.),
                                               call("fdpo", divergence="forward_kl"))
    same = E | MASKS | dict(chosen_mask=MASKS["rejected_mask"])    # equal lengths: alpha is idle
    assert close(call("ld_dpo", same, alpha=0.), call("ld_dpo", same, alpha=1.))
    far = E | dict(chosen_ratio=D([-50.]), rejected_ratio=D([-500.]))
    assert call("fdpo", far, divergence="forward_kl").isfinite().all()


def test_rdpo_is_unbiased_under_flips():
    h = torch.linspace(-8, 8, 33).double()
    zero = torch.zeros_like(h)
    mean = .8 * dpo.rdpo(h, zero, beta=.3, flip=.2) + .2 * dpo.rdpo(-h, zero, beta=.3, flip=.2)
    assert close(mean, dpo.dpo(h, zero, beta=.3))
    assert close(dpo.dpo(D([.7]), D([0.]), beta=.3), [.59365])


def test_where_each_link_is_stationary():
    h = torch.linspace(-60, 60, 1200001).double()
    zero = torch.zeros_like(h)
    assert abs(h[dpo.cdpo(h, zero).argmin()] * .1 - 2.197225) < 1e-4
    for p in (.5, .7, 1.):
        risk = p * dpo.ipo(h, zero) + (1 - p) * dpo.ipo(-h, zero)
        assert abs(h[risk.argmin()] - (2 * p - 1) / .2) < 1e-3
        inpo = partial(dpo.inpo, eta=.1, tau=.05)
        risk = p * inpo(h, zero, h, zero) + (1 - p) * inpo(-h, zero, -h, zero)
        assert abs(h[risk.argmin()] - (2 * p - 1) / .2) < 1e-3
    soft = dpo.dno(h, zero, D(.8), D(.3))
    assert abs(h[soft.argmin()] * .1 - .5) < 1e-4                  # βh = r_w - r_l
    x = D([25.]).requires_grad_()
    dpo.hinge(x, D([0.])).sum().backward()
    assert x.grad == 0


def test_bco_bounds_dpo_and_starts_are_log_2():
    a, b = 20 * rand(10000), 20 * rand(10000, seed=1)
    assert (dpo.bco_pair(a, b) >= dpo.dpo(a, b)).all()
    zero = E | NEUTRAL | dict(chosen_ratio=D([0.]), rejected_ratio=D([0.]),
                              list_ratio=D([[0., 0, 0, 0]]))
    for name in ("dpo", "cdpo", "rdpo", "flex", "fdpo", "madpo", "beta_dpo", "dpo_norm"):
        assert close(call(name, zero,
                          **({"flip": .1} if "flip" in hyper(dpo.LOSSES[name]) else {})), [LOG2])
    assert close(call("apo_zero", zero), [1])
    assert close(dpo.kto(D([0., 0]), D([1., 0]), D(0.)), [.5, .5])


READ = {k: set(needs(fn)) for k, fn in dpo.LOSSES.items()}
PAIRWISE = [k for k, names in READ.items() if {"chosen_ratio", "chosen_mean", "chosen_logp"} & names
            and not {"gain", "signs", "list_logp"} & names]


@pytest.mark.parametrize("name", PAIRWISE)
def test_a_step_raises_the_chosen_side_and_lowers_the_rejected_one(name):
    have = {k: v.clone() for k, v in (E | NEUTRAL).items()} | dict(
        margin=D([.5]), chosen_win=D([.8]), rejected_win=D([.3]), chosen_prev_ratio=D([0.]),
        rejected_prev_ratio=D([0.]), chosen_ratio=D([-.1]), rejected_ratio=D([.1]),
        chosen_logp=D([-12.]),
        rejected_logp=D([-10.]), chosen_mean=D([-2.4]), rejected_mean=D([-1.8]))
    sides = {}
    for side, sign in (("chosen", -1), ("rejected", 1)):
        for what in ("ratio", "logp", "mean"):
            if f"{side}_{what}" in needs(dpo.LOSSES[name]):
                have[f"{side}_{what}"].requires_grad_()
                sides.setdefault(sign, []).append(have[f"{side}_{what}"])
    call(name, have).sum().backward()
    for sign, xs in sides.items():
        total = sum(x.grad.item() for x in xs if x.grad is not None)
        lowers_both = name == "apo_down" and sign == -1            # by design
        assert total == 0 or (total > 0) == ((sign > 0) != lowers_both), (name, sign, total)


@pytest.mark.parametrize("name",
                         [k for k in dpo.LOSSES if k not in ("treg", "mpo")])     # detached weights
def test_gradients_are_those_of_finite_differences(name):
    fn, B = dpo.LOSSES[name], 3
    shape = dict(logps=(B, 4), delta=(B, 4), mask=(B, 4), eos=(B, 4), kl=(B, 4), weight=(B, 4),
                 credit=(B, 4),
                 list=(B, 4), rates=(B, 4), signs=(B, 2))
    constant = ("mask", "eos", "len", "credit", "weight", "margin", "win", "good", "z0", "rates",
                "signs", "gain", "hard", "kept", "beta_now", "shift")
    have, free = {}, []
    for i, k in enumerate(needs(fn)):
        kind = "list" if k.startswith("list") else k.rpartition("_")[2]
        x = rand(*shape.get(kind, (B,)), seed=i)
        if k.endswith(("mean", "logp", "logps")):
            x = -x.abs() - .5
        if k.endswith("len"):
            x = torch.tensor([3., 5, 7]).double()
        if k.endswith("mask"):
            x = D([[1., 1, 0, 0], [1, 1, 1, 0], [1, 1, 1, 1]])
            x = x if "chosen" in k else x.flip(0)
        if k in ("good", "hard", "signs"):
            x = (x > 0).double()
        have[k] = x
        if not any(k == c or k.endswith(c) for c in constant):
            free.append(k)
    detached = dict(hypo=["list_ratio"], nash_md=["ratio"],
                    nash_mp=["ratio", "iterate_ratio"]).get(name, [])
    free = [k for k in free if k not in detached]

    def value(*xs):
        return fn(*(dict(have, **dict(zip(free, xs)))[k] for k in needs(fn)))
    assert torch.autograd.gradcheck(value, [have[k].clone().requires_grad_() for k in free])


def test_flex_scales_the_ratio_of_gradients_in_probability():
    """∂L/∂π_l over ∂L/∂π_w is -π_w/π_l for DPO, times β⁻/β⁺ for Flex (3D-properties)."""
    for loss, ratio in ((dpo.dpo, -4.), (dpo.flex, -4 * .2)):
        w, l = D([.2]).requires_grad_(), D([.05]).requires_grad_()
        loss(w.log(), l.log()).sum().backward()
        assert close(l.grad / w.grad, [ratio])


# --- several objectives ---------------------------------------------------------------------------


def test_cagrad_by_hand():
    G = D([[1., 0], [-.5, 1]])
    w = D([.5, .5])
    assert close(optim.worst_direction(G @ G.T, w, .4), [.63882, .36118], 1e-4)
    assert close(optim.cagrad(G), [.398131, .667503], 1e-5)
    assert close(optim.cagrad(G, clipped=False), [.425613, .63842], 1e-5)
    assert close(optim.cagrad(G, c=0.), optim.weighted(G))
    assert close(optim.weighted(G, weights="1,3"), [-.125, .75])
    same = torch.stack([G[0], G[0], G[0]])
    assert close(optim.cagrad(same), 1.4 * G[0]) and close(optim.cagrad(G[:1]), 1.4 * G[0])
    assert close(optim.cagrad(D([[1., 0], [-1, 0]])), [0, 0])
    assert close(optim.maxmin(G, D([.3, .4])), G[1])
    with pytest.raises(UserError, match="--weights"):
        optim.cagrad(G, weights="1,2,3")


def test_the_worst_direction_of_three_is_a_minimum():
    G, w = rand(3, 8), D([.5, .3, .2])
    K = G @ G.T

    def value(p):
        return p @ K @ w + .4 * (w @ K @ w).sqrt() * (p @ K @ p).sqrt()
    p = optim.worst_direction(K, w, .4)
    assert close(p.sum(), 1) and (p >= 0).all()
    law = torch.distributions.Dirichlet(torch.ones(3).double())
    assert all(value(p) <= value(law.sample()) + 1e-9 for _ in range(2000))
    down = optim.cagrad(G, weights="0.5,0.3,0.2", clipped=False)
    assert down @ (w @ G) >= (1 - .4) * (w @ G).norm() ** 2 - 1e-9


def test_objectives_skip_ties_and_turn_with_the_sign():
    loss = dpo.objectives(D([1.]), D([-.5]), D([[1., -1, 0]]))
    assert close(loss, [[.620957, .620957 + .15, 0]])


# --- judges and sources ---------------------------------------------------------------------------


def test_judges_are_antisymmetric_and_their_rewards_come_back():
    score = D([1., .2, -3])
    P = dpo.gold(score)
    assert close(P + P.T, torch.ones(3, 3)) and close(P.diagonal(), [.5] * 3)
    assert close(dpo.rewards_of(P), score - score.mean())
    assert close(dpo.gold(score, sharp=0.), .5 + 0 * P)
    world, problem = prefs.Ring(), dict(prompt=".abcd=")

    def duel(cycle, *texts):
        return dpo.duel(world, problem, [dict(text=x, finished=y) for x, y in texts], cycle=cycle)
    P = duel(50., ("aei", True), ("bfj", True), ("cgk", True))     # dominant classes 0, 1, 2
    assert close(P + P.T, torch.ones(3, 3)) and P[0, 1] > .9 and P[1, 2] > .9 and P[2, 0] > .9
    cut = duel(0., ("aei", True), ("aei", False))
    assert close(cut[0, 1], torch.sigmoid(D(2.)))                  # no EOS: two points of gold less
    assert close(dpo.learned(score), dpo.gold(score))
    assert close(dpo.cdr(score), dpo.gold(score))


def test_extremes_and_win_rates_include_oneself():
    P = dpo.gold(D([3., 0, -3]))
    (a, b), fields = dpo.extremes(P)
    assert (a, b) == (0, 2) and close(fields["chosen_win"],
                                      P[0].mean()) and fields["rejected_win"] < .5
    assert dpo.extremes(P, least=.99) is None


def test_rso_accepts_by_e_to_the_reward():
    g, r = torch.Generator().manual_seed(0), [1, .5, 0, -1]
    assert dpo.accepted(r, 4, 1e9, g) == [0, 1, 2, 3]          # β -> ∞: everything, in order
    assert dpo.accepted(r, 2, 1e-9, g) == [0, 1]  # β -> 0: the best, one after the other
    n, count = 20000, torch.zeros(4)
    for _ in range(n):
        count[dpo.accepted(r, 4, .5, g, passes=1)] += 1
    assert close(count / n, [1, .367879, .135335, .018316], .01)
    first = [dpo.accepted(r, 1, .5, g)[0] for _ in range(2000)]
    assert set(first) == {0}  # the maximum is always accepted, first


def test_rso_keeps_the_optimum_s_proportions():
    """Accepted in one pass, candidates of a uniform policy are distributed as e^(r/β), where the
    maximum is among them; with many candidates it always is."""
    g, r = torch.Generator().manual_seed(1), D([1., .5, 0.])
    count = torch.zeros(3)
    for _ in range(300):
        draws = torch.randint(3, (64,), generator=g)
        for i in dpo.accepted(r[draws].tolist(), 64, .5, g, passes=1):
            count[draws[i]] += 1
    assert close(count / count.sum(), torch.softmax(r / .5, 0), .02)


def test_tree_search_finds_the_better_step():
    """Two steps a level; a response is worth its number of ones: the tree prefers them, pairs say
    so."""
    def extend(starts, new, k):
        return [[([i % 2] * new, .5, False) for i in range(k)] for _ in starts]

    def value(i, ids, finished):
        return sum(ids) / 6
    root, other = dpo.grow_trees([[7], [8]], extend, value, 6, iterations=5, children=2,
                                    chunk=2, depth=3)
    assert root.N == 5 and len(root.children) == 2
    assert dpo.step_pairs(root)[0] == ([], [1, 1], [0, 0])
    for prefix, better, worse in dpo.step_pairs(root):
        assert sum(better) > sum(worse) and sum(prefix) == len(prefix)
    assert dpo.step_pairs(other) == dpo.step_pairs(root)
    same = dpo.grow_trees([[7]],
                             lambda s, n, k: [[([3] * n, 1., False)] * k for _ in s], value, 4)[0]
    assert dpo.step_pairs(same) == []                           # identical children: no pair


def test_back_up_weighs_children_by_visits():
    root = dpo.Node()
    a, b = (dpo.Node([i], parent=root) for i in (1, 2))
    a.v, b.v, root.children = 1., 0., [a, b]
    dpo.back_up(root)
    assert root.V == .5 and root.N == 1
    dpo.back_up(a)
    dpo.back_up(a)
    assert root.N == 3 and close(root.V, (2 * 1 + 1 * 0) / 3)
    assert dpo.descend(root, w=.5) is a
    b.prior = 100.
    assert dpo.descend(root) is b  # the prior of what was not visited


# --- tabular games: the population step of each self-play loss ------------------------------------

RPS = D([[.5, .9, .1], [.1, .5, .9], [.9, .1, .5]])
MU = D([.6, .3, .1])


def minimise(loss, steps=200):
    """The policy of three answers that minimises loss(log π), by Newton-like steps in float64."""
    z = MU.log().clone().requires_grad_()
    opt = torch.optim.LBFGS([z], max_iter=steps, tolerance_grad=1e-12, tolerance_change=1e-14,
                            line_search_fn="strong_wolfe")

    def closure():
        opt.zero_grad()
        value = loss(torch.log_softmax(z, 0))
        value.backward()
        return value
    opt.step(closure)
    return torch.softmax(z, 0).detach()


def all_pairs(loss, logp, ref, prev, P, weight):
    """E over both answers drawn from `weight` and a label by P of a pair loss on (w, l)."""
    total = 0.0
    for i in range(3):
        for j in range(3):
            for w, l, p in ((i, j, P[i, j]), (j, i, P[j, i])):
                have = dict(chosen_ratio=logp[w] - ref[w], rejected_ratio=logp[l] - ref[l],
                            chosen_prev_ratio=logp[w] - prev[w],
                            rejected_prev_ratio=logp[l] - prev[l])
                total = total + weight[i] * weight[j] * p * loss(*(have[k] for k in needs(loss)))
    return total


def test_inpo_s_step_is_mirror_descent():
    """Its population minimiser is π ∝ μ^(τ/η) π_t^(1-τ/η) e^(P(y > π_t)/η)."""
    loss = partial(dpo.inpo, eta=.3, tau=.1)
    got = minimise(lambda logp: all_pairs(loss, logp, MU.log(), MU.log(), RPS, MU))
    want = torch.softmax(MU.log() + RPS @ MU / .3, 0)
    assert close(want, [.7209, .1418, .1373], 1e-4) and close(got, want, 1e-5)


def test_sppo_s_step_is_multiplicative_weights_to_first_order():
    """Regressed on P - ½ against π_t; the exact step is π_t e^(P/β) normalised."""
    win = RPS @ MU
    want = torch.softmax(MU.log() + win, 0)
    assert close(want, [.6446, .2436, .1118], 1e-4)
    beta = 20.                                                     # small steps: log Z is ½/β

    def loss(logp):
        d = logp - MU.log()
        return (MU * 0.5 * (d - (win - .5) / beta) ** 2).sum()
    assert close(minimise(loss), torch.softmax(MU.log() + win / beta, 0), 1e-3)
    flat = dpo.sppo(D([0.]), D([0.]), D([.5]), D([.5]))
    assert close(flat, [0])                                        # no preference: stay


def test_nash_mp_s_step_maximises_the_proximal_objective():
    """(1/β) P(y > π_k) - KL(π||μ) - (1/η) KL(π||π_k): closed form, and the policy gradient vanishes
    there."""
    beta = eta = .1

    def step(opponent):
        return torch.softmax((eta * MU.log() + MU.log() + eta / beta * RPS @ opponent) / (1 + eta),
                             0)
    want = step(MU)
    assert close(step(want), [.6349, .249, .1161], 1e-4)           # both half-steps
    z = want.log().clone().requires_grad_()
    logp = torch.log_softmax(z, 0)
    ratio = logp - MU.log()
    loss = (want * dpo.nash_mp(logp, ratio, ratio, RPS @ MU, tau=beta, eta=eta)).sum()
    g, = torch.autograd.grad(loss, z)
    assert close(g, [0, 0, 0], 1e-9)


def test_nash_md_s_step_and_its_fixed_point():
    """π ∝ π^(1-ητ) μ^(ητ) e^(η P); at the regularised equilibrium the policy gradient is 0 in
    expectation."""
    assert close(torch.softmax(MU.log() + RPS @ MU, 0), [.6446, .2436, .1118], 1e-4)
    tau, pi = .5, MU.clone()
    for t in range(4000):
        eta = 2 / (tau * (t + 2))
        mixed = torch.softmax((1 - eta * tau) * pi.log() + eta * tau * MU.log(), 0)
        pi = torch.softmax(mixed.log() + eta * RPS @ mixed, 0)
    fixed = torch.softmax(MU.log() + RPS @ pi / tau, 0)
    assert close(pi, fixed, 2e-3)
    z = fixed.log().clone().requires_grad_()
    logp = torch.log_softmax(z, 0)
    loss = (fixed * dpo.nash_md(logp, logp - MU.log(), RPS @ pi, tau=tau)).sum()
    assert close(torch.autograd.grad(loss, z)[0], [0, 0, 0], 2e-3)


def test_dpo_s_minimiser_is_the_tilted_reference():
    """With Bradley-Terry labels of r, π ∝ π_ref e^(r/β); f-DPO's solve f'(u) = r/β + a constant."""
    r, beta = D([.3, 0., -.4]), .5
    P = torch.sigmoid(r[:, None] - r[None])
    weight = D([1 / 3] * 3)
    got = minimise(lambda logp: all_pairs(partial(dpo.dpo, beta=beta), logp, MU.log(), MU.log(), P,
                                          weight))
    assert close(got, torch.softmax(MU.log() + r / beta, 0), 1e-5)
    for kind in ("js", "alpha", "forward_kl"):
        loss = partial(dpo.fdpo, beta=beta, divergence=kind)
        got = minimise(lambda logp: all_pairs(loss, logp, MU.log(), MU.log(), P, weight))
        prime = dpo.F_PRIME[kind](got.log() - MU.log(), .5) - r / beta
        assert close(prime, prime[0].expand(3), 1e-4)


# --- against TRL ----------------------------------------------------------------------------------


def test_losses_equal_trl_s():
    """The losses that both have, on random inputs, through TRL's own functions (versions 0.12 to
    0.2x)."""
    trl = pytest.importorskip("trl")
    try:
        made = trl_losses(trl)
    except (AttributeError, TypeError,
            RuntimeError) as e:  # later ones inline them into the trainer
        pytest.skip(f"trl {trl.__version__} has no loss function to call: {e}")
    for name, (ours, theirs) in made.items():
        assert close(ours, theirs, 1e-6), name
    assert len(made) == 16


def trl_losses(trl):
    """{name: (ours, theirs)}: the trainers' methods, given a namespace instead of a trainer."""
    g = torch.Generator().manual_seed(0)
    pol_w, pol_l, ref_w, ref_l = -20 * torch.rand(4, 64, generator=g, dtype=torch.float64) - 1
    d = pol_w - ref_w, pol_l - ref_l
    here, out = SimpleNamespace(device="cpu", gather_for_metrics=lambda x: x), {}
    for name, kind, kw in (
            ("dpo", "sigmoid", {}), ("cdpo", "sigmoid", dict(flip=.1)),
            ("rdpo", "robust", dict(flip=.1)),
            ("ipo", "ipo", {}), ("hinge", "hinge", dict(gamma=.1)),
            ("exo", "exo_pair", dict(flip=1e-3)),
            ("nca", "nca_pair", {}), ("sppo_hard", "sppo_hard", {}), ("apo_zero", "apo_zero", {}),
            ("apo_down", "apo_down", {}), ("js", "sigmoid", dict(divergence="js")),
            ("alpha", "sigmoid", dict(divergence="alpha"))):
        me = SimpleNamespace(beta=.1, label_smoothing=kw.get("flip", 0.), reference_free=False,
                             loss_type=kind, accelerator=here,
                             f_divergence_params=dict(alpha_divergence_coef=.5),
                             f_divergence_type=dict(js="js_divergence",
                                                    alpha="alpha_divergence").get(
                                 name, "reverse_kl"))
        theirs = trl.DPOTrainer.dpo_loss(me, pol_w, pol_l, ref_w, ref_l)[0]
        loss = dpo.LOSSES.get(name, dpo.fdpo)
        out[name] = loss(*d, **kw) * (2 if name == "sppo_hard"
                                      else 1), theirs                         # TRL's omits the half
    me = SimpleNamespace(beta=.1, loss_type="kto", calculate_KL=True, desirable_weight=1.5,
                         undesirable_weight=1., accelerator=here)
    mixed = pol_w + 1.5
    theirs = trl.KTOTrainer.kto_loss(me, pol_w, pol_l, mixed, ref_w, ref_l, pol_w)
    z0 = dpo.mismatch(mixed - pol_w)["z0"]
    good = torch.cat([torch.ones(64), torch.zeros(64)])
    out["kto"] = dpo.kto(torch.cat(d), good, z0[0], desirable=1.5), theirs[0]
    for name, kind, ours in (("simpo", "simpo", dpo.simpo(pol_w, pol_l, beta=2., gamma=1.)),
                             ("ipo, no reference", "ipo", dpo.ipo(pol_w, pol_l, tau=2.))):
        me = SimpleNamespace(beta=2., simpo_gamma=1., loss_type=kind, label_smoothing=0.,
                             accelerator=here)
        out[name] = ours, trl.CPOTrainer.cpo_loss(me, pol_w, pol_l)[0]
    me = SimpleNamespace(beta=.1, accelerator=here)
    a, b = pol_w / 10, pol_l / 10
    out["orpo"] = dpo.orpo(a, b) + a, -trl.ORPOTrainer.odds_ratio_loss(me, a, b)[0]
    return out


# --- whole runs -----------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def own_cache(monkeypatch, tmp_path_factory):
    """Reference log-probs of tests go to a folder that pytest clears, not to data/cache."""
    monkeypatch.setattr(dpo, "CACHE", tmp_path_factory.getbasetemp() / "cache")


ARMS = {"tiny", "few", "short", "plain_sgd", "flips20", "flips40", "no_eos"}


def tiny(config, out, *extra):
    """One run in seconds -> its result."""
    return dpo.main(merged("--config", f"{config},tiny" if config else "tiny", "--out", str(out),
                           *extra))


def test_the_headings_name_every_method():
    text = open(dpo.__file__).read()
    named = {name for names, _ in headings(text) for name in names.split(", ")}
    assert set(dpo.PRESETS) - ARMS - {"toyif"} <= named
    assert {*dpo.LOSSES} - {"dpo", "objectives"} <= named


@pytest.mark.parametrize("table", ["SOURCES", "STATISTICS"])
def test_every_source_and_statistic_says_what_it_gives(table):
    assert set(getattr(dpo, table)) <= set(dpo.GIVES)


def test_demonstrations_to_forget_fit_the_context(shared_bases):
    """those that are longer do not train, and are counted"""
    dpo.main(["--config", "npo,tiny", "--steps", "1", "--context", "18", "--out", "short"])
    dpo.main(["--config", "npo,tiny", "--steps", "1", "--out", "whole"])
    short, whole = (next(x for x in read_log(o) if "loss" in x) for o in ("short", "whole"))
    assert short["long"] > 0 and "long" not in whole


def test_every_source_says_how_its_rows_are_made():
    """once, and their log-probs kept on disk, exactly if it asks nothing of the policy"""
    assert set(dpo.SOURCES) == set(dpo.ROWS)
    for name, source in dpo.SOURCES.items():
        fixed = dpo.static(SimpleNamespace(source=source))
        assert (dpo.ROWS[name] in (dpo.once, dpo.forget_rows)) == fixed, name
    assert set(dpo.STATISTICS) == {"none", *dpo.WHOLE}


def test_what_a_function_asks_for_is_made_once_and_only_then():
    calls = []

    def ratio(logps, ref_logps):
        calls.append("ratio")
        return logps - ref_logps
    known = dict(logps=2., ref_logps=.5)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(dpo.READS, "ratio", ratio)
        assert dpo.ask(lambda ratio, logps: ratio + logps, known) == 3.5
        assert dpo.ask(lambda ratio: ratio, known) == 1.5 and calls == ["ratio"]
    assert dpo.part_of("chosen_ratio") == (0, "ratio") and dpo.part_of("ratio") == (0, "ratio")
    assert dpo.part_of("rejected_logps") == (1, "logps") and dpo.part_of("good") == (None, "good")
    assert dpo.part_of("chosen_win") == (None, "chosen_win")


def test_the_first_step_of_dpo_is_log_2_and_the_log_has_both_sides(shared_bases):
    tiny("dpo", "run")
    row = next(r for r in read_log("run") if "loss" in r)
    assert abs(row["loss"]
               - LOG2) < 1e-5 and abs(row["chosen_ratio"]) < 1e-4 and abs(row["margin"]) < 1e-4
    assert {"chosen_logp", "rejected_logp", "rejected_ratio", "accuracy"} <= set(row)
    first = next(r for r in read_log("run") if "val_win" in r)
    assert first["val_win"] == .5 and abs(first["val_kl"]) < 1e-4


@pytest.mark.parametrize("config", ["beta_dpo", "raco"])
def test_micro_batches_change_nothing(config, shared_bases):
    a, b = (tiny(config, f"run{m}", f"--micro={m}", "--dtype=float32") for m in (16, 3))
    one, two = (load(f"run{m}/step-000004")[0] for m in (16, 3))
    for p, q in zip(one.parameters(), two.parameters()):
        assert (p - q).abs().max() < 2e-4
    assert abs(a["val_accuracy"] - b["val_accuracy"]) < .1


@pytest.mark.parametrize("config", ["dpo", "nash_mp", "mpo", "beta_dpo", "selm", "sppo"])
def test_resume_gives_the_same_weights(config, shared_bases):
    extra = ["--save_every=2", "--keep=9"]
    whole = tiny(config, "whole", *extra)
    tiny(config, "part", *extra, "--stop=2")
    part = dpo.main(merged("--config", f"{config},tiny", "--out", "part", *extra, "--resume"))
    one, two = (load(f"{x}/step-000004")[0] for x in ("whole", "part"))
    assert all(torch.equal(p, q) for p, q in zip(one.parameters(), two.parameters()))
    assert part == whole
    logs = [[{k: v for k, v in row.items() if not k.startswith("t")} for row in read_log(out)]
            for out in ("whole", "part")]
    assert logs[0] == logs[1]


def test_reference_log_probs_are_kept_on_disk(shared_bases, monkeypatch, tmp_path):
    monkeypatch.setattr(dpo, "CACHE", tmp_path / "cache")
    calls, real = [], dpo.response_logprobs

    def counted(tok, c, rows, model):
        calls.append(len(rows))
        return real(tok, c, rows, model)
    monkeypatch.setattr(dpo, "response_logprobs", counted)
    a = tiny("dpo", "a", "--steps=1")
    n = sum(x == 8 for x in calls)                             # the rows of one step
    files = list((tmp_path / "cache").iterdir())
    calls.clear()
    b = tiny("cdpo", "b", "--steps=1", "--flip=0")  # another loss, the same rows and weights
    assert n == 1 and sum(x == 8 for x in calls) == 0 and a == b
    tiny("dpo", "c", "--steps=1", "--noise=0.5")                   # other rows
    assert len(list((tmp_path / "cache").iterdir())) == len(files) + 1


def test_references_are_made_of_the_rows_that_a_run_comes_to(shared_bases, monkeypatch):
    """of less than a pass only those; the run is that with all of them"""
    c = dpo.Config(steps=2, batch=3, seed=5)
    f, rows = SimpleNamespace(source=partial(dpo.pairs)), list(range(20))
    picked = {i for step in range(2) for i in dpo.batch_indices(20, 3, step, 5).tolist()}
    assert dpo.met(c, f, rows) == sorted(picked) and len(picked) == 6
    assert dpo.met(c, f, rows[:6]) == rows[:6]                         # a whole pass
    assert len(dpo.met(dpo.Config(epochs=0.5, batch=3), f, rows)) == 12
    made, asked = [], dpo.cached_logprobs
    monkeypatch.setattr(dpo, "cached_logprobs", lambda tok, c, rows, model: (
        made.append(len(rows)), asked(tok, c, rows, model))[1])
    few = tiny("", "few", "--steps=2")
    monkeypatch.setattr(dpo, "met", lambda c, f, rows: rows)
    whole = tiny("", "whole", "--steps=2")
    assert made[0] == 2 * 8 and made[1] == 64 and few == pytest.approx(whole, rel=1e-4, abs=1e-6)


def test_dpo_learns(shared_bases):
    """Sixty steps on 64 pairs, from a tiny base: the training pairs' accuracy rises well above a
    half."""
    out = tiny("", "run", "--steps=60", "--batch=32", "--eval_every=60")
    last = [r for r in read_log("run") if "loss" in r][-1]
    assert last["accuracy"] > .8 and last["margin"] > .5 and out["val_kl"] > 0


def test_real_pairs_and_labels_from_files(shared_bases):
    rows = [dict(prompt=f".{k}=", chosen=a, rejected=b) for k, a, b in
            [("abcd", "abc", "xvu"), ("bcde", "bcd", "uvwx"), ("cdef", "cde", "cde"),
             ("defg", "", "x"),
             ("efgh", "e" * 300, "x"), ("fghi", "fgh", "xx"), ("abce", "abc", "xx"),
             ("abcf", "ab", "x")]]
    with open("pairs.jsonl", "w") as f:
        f.write("".join(json.dumps(r) + "\n" for r in rows))
    out = tiny("", "run", "--data=pairs.jsonl", "--init=base:ring", "--steps=1")
    assert set(out) >= {"val_accuracy"}
    with open("labels.jsonl", "w") as f:
        f.write("".join(json.dumps(dict(prompt=r["prompt"], completion=r[x], label=x == "chosen"))
                        + "\n" for r in rows for x in ("chosen", "rejected") if r[x]))
    out = tiny("kto", "kto", "--data=labels.jsonl", "--init=base:ring", "--steps=1", "--rows=0")
    assert 0 <= out["val_accuracy"] <= 1
    plain = tiny("ga", "ga", "--source=labels", "--data=labels.jsonl", "--init=base:ring",
                 "--steps=1", "--rows=0")                          # ranked without a reference
    assert 0 <= plain["val_accuracy"] <= 1 and "val_kl" not in plain


def test_gsm8k_solutions_are_labels_and_split_by_problem(tmp_path):
    models = {m: dict(is_correct=m == "b", solution=f"{m} says 4") for m in "ab"}
    with open(tmp_path / "s.jsonl", "w") as f:
        for i in range(40):
            f.write(json.dumps(dict(question=f"q{i}", ground_truth="4", **models)) + "\n")
    train, val = (prefs.load_labels(tmp_path / "s.jsonl", x) for x in ("train", "val"))
    assert len(train) + len(val) == 80 and not {r["prompt"] for r in train} & {r["prompt"]
                                                                               for r in val}
    assert {(r["completion"], r["label"]) for r in train} == {("a says 4", False),
                                                              ("b says 4", True)}
    with open(tmp_path / "pairs.jsonl", "w") as f:
        f.write(json.dumps(dict(prompt="p", chosen="a", rejected="b")) + "\n")
    assert prefs.load_labels(tmp_path / "pairs.jsonl") == []
    with open(tmp_path / "odd.jsonl", "w") as f:
        f.write(json.dumps(dict(prompt="p", completion="a", label="yes")) + "\n")
    with pytest.raises(UserError, match="neither true nor false"):
        prefs.load_labels(tmp_path / "odd.jsonl")
    with pytest.raises(UserError, match="for kto and bco"):
        prefs.load_pairs(tmp_path / "odd.jsonl")


def test_bad_pairs_are_counted_and_told(shared_bases, capsys):
    c, counts = SimpleNamespace(source="online"), Counter()
    rows = [dict(prompt=[1], sides=sides)
            for sides in ([[3], [3]], [[3], []], [[3] * 9, [4]], [[3], [4]])]
    assert dpo.usable(rows, c, 8, counts) == [dict(prompt=[1], sides=[[3], [4]])]
    assert counts == dict(identical=1, empty=1, long=1)
    c.source = "lists"                                 # a list is dropped only if all are alike
    lists = [dict(prompt=[1], sides=sides, rates=[.5] * 3)
             for sides in ([[3], [3], [3]], [[3], [3], [4]])]
    assert len(dpo.usable(lists, c, 8, counts)) == 1 and counts["identical"] == 2
    with pytest.raises(UserError, match="no row is left"):
        dpo.usable(rows[:3], c, 8, counts)
    tiny("online", "run", "--max_new=2")
    assert "truncated" in capsys.readouterr().out


@pytest.mark.parametrize("argv, words", [
    (["--judge=duel", "--data=toyif", "--init=base:toyif", "--config=online,tiny"], "only Ring"),
    (["--config=raco,tiny", "--data=toyif", "--init=base:toyif"], "only Ring"),
    (["--config=npo,tiny", "--key=="], "all prompts or in none"),
    (["--config=tiny", "--optimiser=adam"], "choose from adamw, sgd"),
    (["--config=hypo,tiny", "--source.k=1"], "--k 1: must be at least 2"),
    (["--config=online,tiny", "--judge=out/reward/none"], "no such folder"),
    (["--config=raco,tiny", "--weights=0.5"], "2 numbers"),
    (["--config=tiny", "--anchor=prev"], "did you mean 'previous'"),
    (["--config=tiny", "--anchor=handover"], "--anchor handover is of --loss mpo"),
    (["--config=mpo,tiny", "--anchor=start"], "--anchor handover is of --loss mpo"),
    (["--config=tiny", "--anchor=previous"], "made once"),
    (["--config=tiny", "--loss=inpo"], "made once"),
    (["--config=tiny", "--loss=lipo"], "reads rates.* but lists; try --config lipo"),
    (["--config=tiny", "--loss=npo"], "reads good.* try --config npo"),
    (["--config=tiny", "--loss=hypo"], "take --source hybrid"),
    (["--config=nash_mp,tiny", "--source=mixture"], "take --source prox"),
    (["--config=inpo,tiny", "--tau=0.5"], "--tau is at most --eta"),
    (["--config=fdpo,tiny", "--divergence=kl"], "choose from"),
    (["--config=sparsepo,tiny", "--reward_mask=one"], "choose from"),
    (["--config=spin,tiny", "--judge=gold"], "does not read it"),
    (["--config=mpo,tiny", "--sft=0.1"], "no chosen response"),
    (["--config=kto,tiny", "--sft=0.1"], "no chosen response"),
    (["--config=raco,tiny", "--sft=0.1"], "no chosen response"),
    (["--config=tiny", "--loss=sppo"], "reads chosen_win"),
    (["--config=tiny", "--loss=beta_dpo"], "reads beta_now"),
    (["--config=tiny", "--loss=xpo"], "reads other:"),
    (["--config=treg,tiny", "--source=online"], "reads credits"),
    (["--config=treg,tiny", "--data=pairs.jsonl"], "take a world"),
    (["--config=rdpo,tiny", "--flip=0.5"], "--flip 0.5: must be at least 0 and below 0.5"),
    (["--config=kto,tiny", "--batch=1"], "raise --batch"),
    (["--config=madpo,tiny", "--judge=cdr", "--strong=base:ring", "--weak=base:ring"],
     "the same model"),
    (["--config=tiny", "--noise=0.1", "--data=nowhere.jsonl"], "--noise"),
    (["--config=raco,tiny", "--weights=1,2,3"], "--weights"),
    (["--config=tiny", "--max_new=5000"], "does not fit"),
    (["--config=plain_sgd,tiny", "--steps=1", "--lr=1e30", "--clip=1e30", "--beta=1e12"],
     "is not finite"),
    (["--config=tiny", "--gamma=2"], "unknown key --gamma")])
def test_clear_errors(argv, words, shared_bases):
    with pytest.raises(UserError, match=words):
        dpo.main(argv)


def test_an_online_run_of_a_file_needs_a_judge(shared_bases):
    with open("pairs.jsonl", "w") as f:
        f.write("".join(json.dumps(dict(prompt=f".{k}=", chosen="abc", rejected="x")) + "\n"
                        for k in ("abcd", "bcde", "cdef")))
    with pytest.raises(UserError, match="no gold reward"):
        tiny("online", "run", "--data=pairs.jsonl")
    tiny("dpo", "trained", "--steps=1")
    out = tiny("online", "cdr", "--data=pairs.jsonl", "--judge=cdr", "--strong=trained/step-000001",
               "--weak=base:ring", "--steps=1")
    assert "val_accuracy" in out


def test_measure_reads_one_batched_forward_and_padding_changes_nothing(shared_bases):
    model, tok = load(str(dpo.sft.base("ring", "tiny")))
    c, known = SimpleNamespace(device="cpu", micro=8, dtype="float32"), dict(policy=model, tok=tok)
    short = dict(prompt=tok.encode(".abcd="), sides=[tok.encode("ab"), tok.encode("cde")])
    long = dict(prompt=tok.encode(".abcd="),
                sides=[tok.encode("abcabcabc"), tok.encode("cdecdecdecde")])
    calls, names = [], ["chosen_logp", "rejected_logp"]
    x = dpo.inputs(names, dpo.measure(c, known, [short]))
    hook = model.register_forward_hook(lambda *_: calls.append(1))
    y = dpo.inputs(names, dpo.measure(c, known, [short, long]))
    hook.remove()
    assert calls == [1] and all(len(y[k]) == 2 and close(x[k][0], y[k][0], 1e-5) for k in names)
    for k, side in zip(names, short["sides"]):
        alone, = dpo.response_logprobs(tok, c, [dict(prompt=short["prompt"], sides=[side])], model)
        assert close(alone.sum(), x[k][0], 1e-5)


def test_a_real_checkpoint_without_a_pad_token(stories, workdir):
    """Pairs of unequal length on stories260k, whose tokenizer names no pad"""
    with open("pairs.jsonl", "w") as f:
        f.write("".join(json.dumps(dict(prompt=f"Once {w}", chosen=" a cat." * (1 + i % 3),
                                        rejected=" no"))
                        + "\n" for i, w in enumerate("abcdefgh")))
    out = tiny("", "run", "--data=pairs.jsonl", f"--init={stories}", "--steps=2")
    assert math.isfinite(out["val_kl"]) and out["val_accuracy"] in (0, .5, 1)


def test_a_reward_model_judges(shared_bases):
    """reward.py's checkpoint as --judge: pairs of samples"""
    reward.main(["--config", "bt,tiny", "--out", "rm", "--steps", "2"])
    assert math.isfinite(tiny("online", "run", "--judge=rm", "--steps=1")["val_gold"])
    with pytest.raises(UserError, match="need a reward model"):
        tiny("online", "wrong", f"--judge={dpo.sft.base('ring', 'tiny')}")
