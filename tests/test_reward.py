"""reward.py: every loss by hand, its limits and gradients; the Gaussian process; then whole
runs."""
import copy
import json
import math
import os
import random
import re
import shutil
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from conftest import DATA_DIR, close, merged, rand
from reward_runs import METHODS, quick, ran, runs, tiny
from safetensors.torch import load_file
from torch.autograd import gradcheck
from wiring import catch

import claims
import data.run
import ppo
import reward
import sft
from data.prefs import Ring, ToyIF, encode_pairs, load_pairs, ring_tokenizer
from data.run import UserError, checkpoint, claims_of, headings, needs, read_log
from data.tokenizer import Tokenizer
from model import (ScalarModel, autocast, generate, init, load, preset, save, sequence_score,
                   token_logprobs)
from reward import (AGGREGATES, LOSSES, PRESETS, RATING_WEIGHTS, RECIPES, Config, Field, Gate,
                    PairModel, adversarial, autoregressive, both_orders, bt, bt_margin, bt_scaled,
                    bt_smooth, combined, density_ratio, disagreement, fit, folded, goal,
                    goal_states, gp_variance, lcb, likelihood_reward, listwise, mean, new_rater,
                    new_scalar, nll, overoptimise, pair_accuracy, pair_ids, pairs_against,
                    preference, provide, random_features, ranknet, rated, regression, rl, rloo,
                    scalar_reward, score_rows, spectrally_bounded, standardised, strict_success,
                    units, uwo, wco, win_tie)

T = torch.tensor


def grad(fn, *inputs):
    """Gradients of the sum of fn(*inputs) at the inputs."""
    inputs = [x.detach().clone().requires_grad_() for x in inputs]
    return torch.autograd.grad(fn(*inputs).sum(), inputs)


# --- Bradley-Terry and its variants by hand -------------------------------------------------------

WIN, LOSE, STRENGTH = T([1.2, .3]), T([.4, .9]), T([3., 1.])


@pytest.mark.parametrize("loss, want", [
    (bt, [.371101, 1.037488]),
    (lambda c, r: bt_margin(c, r, STRENGTH), [2.305083, 1.783901]),
    (lambda c, r: bt_scaled(c, r, STRENGTH), [1.113302, 1.037488]),
    (lambda c, r: bt_smooth(c, r, flip=.1), [.451101, .977488])])
def test_bradley_terry_by_hand(loss, want):
    """and r + k(x) changes nothing: a reward is known up to what depends on the prompt alone"""
    assert close(loss(WIN, LOSE), want)
    assert close(loss(WIN + T([3., -7]), LOSE + T([3., -7])), want)


def test_means_and_the_centre_by_hand():
    assert bt(WIN, LOSE).mean().item() == pytest.approx(.704294, abs=1e-6)
    assert bt_scaled(WIN, LOSE, STRENGTH).mean().item() == pytest.approx(1.075395, abs=1e-6)
    centre = bt(WIN, LOSE, center=.01) - bt(WIN, LOSE)
    assert centre.mean().item() == pytest.approx(.02) and close(centre, [.0256, .0144])
    assert not close(bt(WIN + 1, LOSE + 1, center=.01), bt(WIN, LOSE, center=.01))  # no longer free


def test_wrong_pairs_pull_hardest():
    """margin -1.5: 1.701413 with weight .817574; 0: log 2; the gradient in r_c is -σ(-d)"""
    d = T([-1.5, 0, .1, 3])
    loss, weight = bt(d, torch.zeros(4)), -grad(bt, d, torch.zeros(4))[0]
    assert close(loss[:2], [1.701413, .693147]) and close(weight[0], .817574)
    assert close(weight, torch.sigmoid(-d)) and (weight.diff() < 0).all()
    assert close(grad(bt, d, torch.zeros(4))[1], weight)


@pytest.mark.parametrize("flip", [.05, .1, .3])
def test_smoothing_has_a_finite_optimum(flip):
    """d* = log((1 - e) / e), where -log σ has none"""
    best = T([math.log((1 - flip) / flip)], dtype=torch.float64)
    zero = torch.zeros(1)
    assert grad(partial(bt_smooth, flip=flip), best, zero)[0].abs() < 1e-7
    beside = [bt_smooth(best + e, zero, flip=flip) for e in (-.1, .1)]
    assert bt_smooth(best, zero, flip=flip) < min(beside)


@pytest.mark.parametrize("d, tie, win", [(0, 6.097175, 3.048587), (.5, 6.108640, None),
                                         (3, 6.695623, .693147)])
def test_win_tie_by_hand(d, tie, win):
    d = T([float(d)])
    assert close(win_tie(d, 0 * d, T([1.])), [tie])
    assert close(win_tie(-d, 0 * d, T([1.])), [tie])             # even
    assert win is None or close(win_tie(d, 0 * d, T([0.])), [win])
    assert close(win_tie(d, 0 * d, T([1.]), tie_coef=.5), [tie / 2])


def test_a_tie_pulls_its_two_scores_together():
    """least at d = 0, 2 softplus(m), with curvature 2 σ(m) σ(-m)"""
    zero = T([0.0], dtype=torch.float64, requires_grad=True)
    loss = win_tie(zero, T([0.0]), T([1.0]))
    slope, = torch.autograd.grad(loss.sum(), zero, create_graph=True)
    bend, = torch.autograd.grad(slope.sum(), zero)
    assert close(loss.detach(), [2 * math.log1p(math.exp(3))]) and abs(slope.item()) < 1e-9
    assert close(bend, 2 * torch.sigmoid(T([3.])) * torch.sigmoid(T([-3.])))


def test_limits_of_the_variants_are_plain():
    c, r, ones, zeros = rand(9), rand(9, seed=1), torch.ones(9), torch.zeros(9)
    plain = bt(c, r)
    for same in (bt_margin(c, r, ones, unit=0.0), bt_margin(c, r, zeros), bt_scaled(c, r, ones),
                 bt_smooth(c, r, flip=0.0), win_tie(c, r, zeros, margin=0.0), bt(c, r, center=0.0),
                 autoregressive(c, r, beta_r=1.0), preference(c - r, ones, ones)):
        assert close(same, plain, 1e-12)
    assert close(bt_margin(c, r, 2 * ones, unit=.5), bt(c - 1, r), 1e-12)


# --- the other losses by hand ---------------------------------------------------------------------

NAN = math.nan


def test_regression_by_hand():
    """(3.2 2.5 3.8 1 1.5) against (4 ? 4 1 2): .93 over four known labels is .2325"""
    said, label = T([[3.2, 2.5, 3.8, 1.0, 1.5]]), T([[4, NAN, 4, 1, 2]])
    rows = [dict(ratings=label[0].tolist())]
    assert close(regression(said, label), [.93]) and units(needs(regression), rows) == 4
    assert (regression(said, label) / units(needs(regression), rows)).item() == pytest.approx(.2325)
    assert close(regression(rand(6, 1), rand(6, 1, seed=1)),
                 ((rand(6, 1) - rand(6, 1, seed=1)) ** 2)[:, 0])


def test_a_row_without_labels_pays_nothing_and_pulls_nowhere():
    label = T([[NAN, NAN], [1, NAN]])
    assert close(regression(T([[5., 5], [3, 9]]), label), [0, 4])
    slope, = grad(lambda x: regression(x, label), T([[5., 5], [3, 9]]))
    assert slope.tolist() == [[0, 0], [4, 0]]
    assert units(needs(regression), [dict(ratings=[NAN, NAN]), dict(ratings=[1.0, NAN])]) == 1


def states(plus, minus):
    """early, late, wrong [1, 1, 2] with these cosines to early; lengths do not matter."""
    return (T([[[2., 0]]]), T([[[plus, math.sqrt(1 - plus ** 2)]]]) * 3,
            T([[[minus, math.sqrt(1 - minus ** 2)]]]) * .5)


def test_the_goal_term_by_hand():
    """cosines .6 and .1: .590942; at best 1 and -1: .313262"""
    def extra(*cosines, **options):
        return (goal(*states(*cosines), WIN, LOSE, **options) - bt(WIN, LOSE))[0].item()
    assert [extra(.6, .1), extra(1, -1)] == pytest.approx([.590942, .313262], abs=1e-6)
    weighted = [extra(.6, .1, weight=w) for w in (1.0, 0.0)]
    assert weighted == pytest.approx([2 * .590942, 0], abs=2e-6)
    assert extra(-1, 1) == pytest.approx(math.log(1 + math.e), abs=1e-6)                 # bounded


def test_the_goal_term_is_the_log_of_a_mean():
    """over all pairs of states and the step: not a mean of logs"""
    early, late, wrong = (x.expand(2, 3, 2).clone() for x in states(.6, .1))
    late[0], wrong[1] = early[0], early[1]                       # cosines 1 .6, and .1 1
    plus, minus = (torch.sigmoid(T(x)).mean() for x in ([1, .6], [.1, 1]))
    want = .5 * (-plus.log() - (1 - minus).log())
    assert close(goal(early, late, wrong, WIN, LOSE) - bt(WIN, LOSE), want.expand(2))
    assert not close(goal(early, wrong, late, WIN, LOSE), goal(early, late, wrong, WIN, LOSE))


def test_genarm_by_hand():
    assert close(autoregressive(T([-2.]), T([-10.])), [.513015])                 # a gap of 8 at .05
    assert close(autoregressive(T([-2.]), T([-2.])), [math.log(2)])


def test_the_pairwise_classifier_by_hand():
    """g .7: s 3 and a win 1.209558; a coin .753186. Both orders of a pair agree"""
    assert close(preference(T([.7]), T([1.]), T([3.])), [1.209558])
    assert close(preference(T([.7]), T([.5]), T([1.])), [.753186])
    g = rand(5)
    assert close(preference(g, torch.ones(5), torch.ones(5)),
                 preference(-g, torch.zeros(5), torch.ones(5)))


def test_first_by_hand():
    """s (2 1 1.5), ranks (1 2 3): the pairs sum to .417755, their mean is .139252"""
    s, ranks = T([[2, 1, 1.5]]), T([[1., 2, 3]])
    assert close(ranknet(s, ranks), [.139252]) and close(3 * ranknet(s, ranks), [.417755])
    assert close(ranknet(s + 50, ranks), [.139252], 1e-5)
    new = [2, 0, 1]
    assert close(ranknet(s[:, new], ranks[:, new]), [.139252])
    assert ranknet(T([[9., 0, -9]]), ranks) < ranknet(s, ranks) < ranknet(T([[-9., 0, 9]]), ranks)
    assert ranknet(s, torch.ones(1, 3)).item() == 0              # nothing is above anything


def test_text_losses_by_hand():
    """target probabilities .5 .25 .8: 2.302585"""
    logp = T([[.5, .25, .8]]).log()
    assert close(nll(logp), [2.302585])
    s, ranks = T([[2, 1, 1.5]]), T([[1., 2, 3]])
    assert close(listwise(logp, s, ranks), [2.302585 / 4 + 1.392516], 2e-6)      # three ids and EOS
    assert close(listwise(logp, s, ranks, weight=0.0), nll(logp) / 4)
    assert units(needs(listwise), [dict(answer=[1, 2, 3, 4])] * 2) == 2                  # rows
    assert units(needs(nll), [dict(answer=[1, 2, 3]), dict(answer=[1])]) == 4            # tokens
    assert units(needs(bt), [{}, {}, {}]) == units(needs(preference), [{}, {}, {}]) == 3      # rows


@pytest.mark.parametrize("loss, shapes", [
    (partial(bt, center=.1), [5, 5]), (lambda c, r: bt_margin(c, r, rand(5).abs()), [5, 5]),
    (lambda c, r: bt_scaled(c, r, rand(5).abs()), [5, 5]), (bt_smooth, [5, 5]),
    (lambda c, r: win_tie(c, r, (rand(5) > 0).double()), [5, 5]),
    (lambda x: regression(x, torch.where(rand(4, 3) > .8, NAN, rand(4, 3, seed=1))), [(4, 3)]),
    (goal, [(2, 3, 4), (2, 3, 4), (2, 3, 4), 2, 2]), (autoregressive, [5, 5]),
    (lambda g: preference(g, torch.rand(5), torch.rand(5)), [5]),
    (lambda logp, s: listwise(logp, s, T([[2., 1, 3], [1, 3, 2]])), [(2, 4), (2, 3)]),
    (uwo, [(4, 5)]), (lcb, [(4, 5)]), (wco, [(4, 5)])], ids=lambda x: getattr(x, "__name__", None))
def test_gradients_are_those_of_the_formula(loss, shapes):
    torch.manual_seed(0)
    fixed = torch.get_rng_state()

    def again(*x):
        torch.set_rng_state(fixed)
        return loss(*x)
    assert gradcheck(again, [rand(*(s if isinstance(s, tuple) else (s,)), seed=i).requires_grad_()
                             for i, s in enumerate(shapes)])


# --- many models, one reward ----------------------------------------------------------------------


def test_aggregates_by_hand():
    """(1 .6 1.4 .2 .8): mean .8, worst .2, uwo .7 with the unbiased variance .2; (1 3): lcb
    .585786"""
    S = T([[1], [.6], [1.4], [.2], [.8]])
    assert [fn(S).item() for fn in (mean, wco, uwo)] == pytest.approx([.8, .2, .7])
    assert close(lcb(T([[1.], [3.]])), [.585786]) and close(mean(T([[1.], [3.]])), [2])
    assert close(uwo(S, lam=0.0), mean(S))


@pytest.mark.parametrize("name", AGGREGATES)
def test_properties_of_aggregates(name):
    fn, S = AGGREGATES[name], rand(5, 7)
    assert close(fn(S[:1]), S[0], 1e-12)                         # one member is itself, without NaN
    assert close(fn(S[T([3, 0, 4, 1, 2])]), fn(S), 1e-12) and (fn(S) <= S.mean(0) + 1e-12).all()
    assert close(fn(S[:1].expand(5, 7)), S[0], 1e-12)            # members that agree are one
    assert close(fn(S + 3), fn(S) + 3, 1e-12)


def test_members_are_standardised_before_they_are_compared():
    """scale and shift of a member do not matter: all are measured on the same samples of the SFT
    model"""
    raw = rand(3, 6).float()
    roll = rolled(6)
    want = wco((raw - raw.mean(1, keepdim=True)) / raw.std(1, keepdim=True))
    skewed = T([2., 50, .1])[:, None] * raw + T([0., -9, 4])[:, None]
    members = [standardised(lambda *where, s=s: s, roll) for s in skewed]
    assert close(combined(members, wco)(roll.tokens), want, 1e-4)
    assert close(combined(members[:1], wco)(roll.tokens), (raw[0] - raw[0].mean()) / raw[0].std(),
                 1e-4)


def test_the_gate_shares_its_scale_among_the_attributes():
    torch.manual_seed(0)
    gate, h = Gate(8, 5, hidden=16), rand(20, 8).float() * 9
    assert (gate(h) >= 0).all() and close(gate(h).detach().sum(1), torch.ones(20))      # 1 at first
    gate.scale.data.fill_(2.5)
    assert (gate(h) >= 0).all() and close(gate(h).detach().sum(1), torch.full((20,), 2.5), 1e-5)
    assert gate(h).std(0).max() > 1e-4                           # and it does read the prompt
    one = Gate(8, 1, hidden=16)
    assert close(one(h).detach(), torch.ones(20, 1))  # a single attribute: Bradley-Terry on c r


def test_density_ratio_by_hand():
    """.693147 - .223144 + 1.386294; swapping the models negates it, what is masked does not
    count"""
    strong, weak = T([[.5, .4, .8]]).log(), T([[.25, .5, .2]]).log()
    assert close(density_ratio(strong, weak, torch.ones(1, 3)), [1.856298])
    assert close(density_ratio(weak, strong, torch.ones(1, 3)), [-1.856298])
    assert close(density_ratio(strong, weak, T([[1., 1, 0]])), [.470004])


def test_the_density_ratio_of_an_optimum_is_its_reward():
    """π* ~ π exp(r / β): β (log π* - log π) = r - β log Z"""
    p, r, beta = torch.softmax(rand(6), 0), rand(6, seed=1), .3
    z = (p * (r / beta).exp()).sum()
    star = p * (r / beta).exp() / z
    ratio = density_ratio(star.log()[:, None], p.log()[:, None], torch.ones(6, 1))
    assert close(beta * ratio, r - beta * z.log())


def constant_lm(*probs):
    """A language model that always says tokens 5, 6, … with these probabilities."""
    lm = init(replace(preset("1x32", TOK, 96), tie_word_embeddings=False)).requires_grad_(False)
    for name, p in lm.named_parameters():
        if "o_proj" in name or "down_proj" in name:
            p.zero_()                                            # the layers write nothing
    lm.embed_tokens.weight.fill_(1.0)                            # and the norm hands on ones
    lm.lm_head.weight.fill_(-1e4 / 32)
    for i, x in enumerate(probs):
        lm.lm_head.weight[5 + i] = math.log(max(x, 1e-30)) / 32
    return lm


@pytest.mark.parametrize("arm, alpha, want", [
    ([.2, .2, .6], 1, [.357143, .214286, .428571]), ([.2, .2, .6], 0, [.5, .3, .2]),
    ([1, 1, 1], 3, [.5, .3, .2]),                                # a uniform reward changes nothing
    ([.2, .2, .6], 60, [0, 0, 1])])                              # a strong one leaves its argmax
def test_guided_decoding_by_hand(arm, alpha, want):
    """π_base π_r^α is generate's contrast -α/(1+α) at temperature 1/(1+α): base (.5 .3 .2)"""
    roll = generate(constant_lm(.5, .3, .2), [[1]], 1, samples=64, temperature=1 / (1 + alpha),
                    generator=torch.Generator().manual_seed(0),
                    contrast=(constant_lm(*arm), -alpha / (1 + alpha)))
    said = roll.tokens[:, 1] - 5
    assert close(roll.logp[:, 1].exp(), T(want)[said], 1e-4)
    assert set(said.tolist()) == {i for i, p in enumerate(want) if p > 0}


def test_a_reward_cannot_make_the_base_say_what_it_never_says():
    roll = generate(constant_lm(.5, .5, 0), [[1]], 1, samples=64, temperature=.1,
                    generator=torch.Generator().manual_seed(0),
                    contrast=(constant_lm(.3, .1, .6), -.9))
    assert set(roll.tokens[:, 1].tolist()) == {5}  # where both may speak, the reward decides


# --- Adv-RM (2504.06141) --------------------------------------------------------------------------


def test_the_attack_s_reward_by_hand():
    """bar .5, λ 1.5, C 25: (2 -1) 3.5; (2 1.5) -.25; (.4 -3) breaks the constraint, -24.6; (.9 .2)
    .6"""
    r1, r2 = T([2, 2, .4, .9]), T([-1, 1.5, -3, .2])
    raw, mild = (disagreement(r1, r2, .5, C=C) for C in (25.0, 3.5))             # 3.5: R1 - T - 3
    assert close(raw, [3.5, -.25, -24.6, .6], 1e-5) and close(mild, [3.5, -.25, -3.1, .6])
    assert close(rloo(raw[None]), [[11.583333, 6.583333, -25.883333, 7.716667]], 1e-5)
    assert close(rloo(mild[None]), [[4.416667, -.583333, -4.383333, .55]], 1e-5)
    standard = disagreement(r1 - .5, r2)                         # of standardised rewards: bar 0
    assert close(standard, [1.5 + 1.5, 1.5 - 2.25, -3.1, .4 - .3])


def test_limits_of_the_attack():
    z1, z2 = rand(50), rand(50, seed=1)
    assert close(disagreement(z1, z2, -math.inf, lam=0.0), z1) and close(overoptimise(z1, z2), z1)
    assert close(disagreement(z1, z1, lam=1.0)[z1 > 0], 0 * z1[z1 > 0])         # a twin that agrees
    assert (disagreement(z1, z2)[z1 <= 0] <= -3).all()
    assert close(overoptimise(z1, z2), overoptimise(z1, z1))


def test_the_filter_by_hand():
    """SFT samples of mean 0, std .2: the bar is .392; .5 passes, .3 does not, nor anything below
    the mean"""
    U = T([.1, -.2, .3, 0, -.1, .2, -.3, 0])
    assert close(U.mean(), 0) and close(U.std(), .2)
    got = adversarial(T([1, 1, -.1, 1, 0]), T([.5, .3, .5, .393, .5]), U.mean(), U.std())
    assert got.tolist() == [True, False, False, True, False]
    assert adversarial(T([1.]), T([.3]), 0.0, .2, z_min=1.0).item()


def test_strict_success_by_hand():
    got = strict_success(T([.1, .1, -.1, 0, 2]), T([-2, -1.9, -2, -2, -1.96]))
    assert got.tolist() == [True, False, False, False, False]


def rolled(n):
    """A rollout of n rows that hold only their numbers."""
    return SimpleNamespace(tokens=torch.arange(n)[:, None], prompt_len=torch.zeros(n),
                           mask=torch.ones(n, 1))


@pytest.mark.parametrize("scale, shift", [(1, 0), (7, 0), (1, -50), (.01, 3)])
def test_the_standardised_attack_does_not_see_scale_or_shift(scale, shift):
    """z: less the prompt's mean over SFT samples, over the std of all"""
    ours = rand(3, 4).float()
    new = rand(2, 2, seed=1).float()          # of the third prompt, then the first
    field = SimpleNamespace(roll=rolled(12), gold=torch.zeros(3, 4), at={5: 0, 6: 1, 7: 2})
    z = Field.standard.__wrapped__(field, lambda tokens, start, end: scale * (
        ours if len(tokens) == 12 else new).flatten() + shift)
    want = (new - ours.mean(1)[[2, 0], None]) / ours.std()
    assert close(z(rolled(4), [dict(seed=7), dict(seed=5)]), want.flatten(), 1e-4)


# --- the Gaussian process on top (2510.20369) -----------------------------------------------------

PHI = T([[1., 0], [1, 0], [.6, .8]])
P3 = PHI.T @ PHI
TOK, WORLD = ring_tokenizer(), Ring()


def small_lm(seed=0, size="1x32"):
    return init(preset(size, TOK, 96), seed)


def pair_model(features=16, **options):
    return PairModel(small_lm(), features, generator=torch.Generator().manual_seed(0), **options)


@pytest.mark.parametrize("phi, var, u", [([1., 0.], .310606, 2.026342),
                                         ([0., 1.], .636364, 2.713602),
                                         ([.6, .8], .431818, 2.306118)])
def test_variance_by_hand(phi, var, u):
    assert close(P3, [[2.36, .48], [.48, .64]])
    assert close(gp_variance(T([phi]), P3, 1.0), [var])
    pm = pair_model(2)
    pm.w.data = T([3., -2])
    pm.phi = lambda rows, end: rows                              # a body that hands on its input
    for row in PHI:
        pm.add(row[None], None)
    assert close(pm.P, P3)
    g, got = pm.calibrated(T([phi]), None, ridge=1.0, lam=10.0)
    assert close(got, [u]) and close(g, [(3 * phi[0] - 2 * phi[1]) / u], 1e-5)


def test_limits_of_the_variance():
    small = gp_variance(T([[1., 0]]), P3, 1e-3)
    assert close(small, [.000500])
    assert math.sqrt(1 + 10 * small.item()) == pytest.approx(1.002495, abs=1e-6)
    phi = rand(4, 3).float()
    assert close(gp_variance(phi, torch.zeros(3, 3), 7.0), (phi ** 2).sum(1))    # no data: |φ|²
    assert close(gp_variance(phi, P3.new_ones(3, 3), 1e9), (phi ** 2).sum(1), 1e-4)
    pm = pair_model(2)
    pm.phi = lambda rows, end: rows
    g, u = pm.calibrated(PHI, None)
    assert close(u, [math.sqrt(11)] * 3, 1e-5)                   # 3.316625
    g, u = pm.calibrated(PHI, None, lam=0.0)
    assert close(u, torch.ones(3)) and close(g.detach(), (PHI @ pm.w).detach())
    assert [(u ** 2 - 1) / 10 for u in (1.45, 1.30)] == pytest.approx([.11025, .069])


@pytest.mark.parametrize("ridge", [.01, 1.0, 30.0])
def test_data_never_adds_uncertainty(ridge):
    """anywhere, and var stays in (0, |φ|²]"""
    phi, P = rand(40, 6).float(), torch.zeros(6, 6)
    before = gp_variance(phi, P, ridge)
    for row in rand(8, 6, seed=1).float():
        P = P + row[:, None] * row
        after = gp_variance(phi, P, ridge)
        assert (after <= before + 1e-6).all() and (after > 0).all()
        assert (after <= (phi ** 2).sum(1) + 1e-5).all()
        before = after


def test_random_features_approximate_the_kernel():
    """D 4096, σ .05, d 64: |φ|² within 3 % of 1, φ·φ' within .02 of exp(-σ² |h - h'|² / 2)"""
    g = torch.Generator().manual_seed(0)
    W, b = .05 * torch.randn(4096, 64, generator=g), 2 * math.pi * torch.rand(4096, generator=g)
    h = torch.randn(8, 64, generator=g)
    phi, kernel = random_features(h, W, b), (-.05 ** 2 * torch.cdist(h, h) ** 2 / 2).exp()
    assert (phi @ phi.T - kernel).abs().max() < .03 and ((phi ** 2).sum(1) - 1).abs().max() < .03
    assert (phi @ phi.T - kernel)[~torch.eye(8, dtype=torch.bool)].abs().max() < .02
    assert kernel[0, 1] < .95                                    # not because nothing differs


def singular(W, steps=50):
    u = torch.ones(len(W), dtype=W.dtype)
    spectrally_bounded(W, u, steps)
    return u


@pytest.mark.parametrize("values, want",
                         [([3., 1.], [1, 1 / 3]), ([.5, .2], [.5, .2]), ([1., 1.], [1, 1])])
def test_the_spectral_bound_is_no_division(values, want):
    W = torch.diag(T(values))
    assert close(spectrally_bounded(W, singular(W)), torch.diag(T(want)))
    assert close(spectrally_bounded(W, singular(W), bound=.1),
                 torch.diag(T(values)) * .1 / max(values))


def test_the_spectral_norm_is_found_by_steps_that_are_kept():
    W = rand(6, 6)
    u = torch.ones(6, dtype=torch.float64)
    for _ in range(200):
        spectrally_bounded(W, u, 1)
    bounded = spectrally_bounded(W, u.clone())
    assert torch.linalg.matrix_norm(bounded, 2).item() == pytest.approx(1, abs=1e-6)
    frozen = u.clone()
    spectrally_bounded(W, u)                                     # none in evaluation
    assert torch.equal(u, frozen)


def test_a_fresh_pooling_layer_is_left_alone():
    """it is orthogonal, so that its norm is 1 and the bound does nothing, before the first step
    too"""
    pm = pair_model()
    assert close(spectrally_bounded(pm.pool.weight, pm.u).detach(), pm.pool.weight.detach(), 1e-4)


def test_the_bound_is_differentiable_through_its_norm():
    W, G = rand(5, 5) * 3, rand(5, 5, seed=1)
    u = singular(W, 500)
    got, = grad(lambda x: spectrally_bounded(x, u) * G, W)
    want, = grad(lambda x: x / torch.linalg.matrix_norm(x, 2) * G, W)
    assert close(got, want, 1e-8)


def test_gradient_reaches_body_pool_and_w_but_not_the_features():
    pm = pair_model(sigma=.5)
    tokens, end, before = torch.randint(3, 40, (4, 9)), T([9, 5, 7, 3]), pm.u.clone()
    pm(tokens, end).square().sum().backward()
    trained = {n for n, p in pm.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
    assert {"w", "pool.weight", "pool.bias", "body.layers.0.mlp.down_proj.weight"} <= trained
    assert not {"W", "b", "P", "u"} & dict(pm.named_parameters()).keys()
    assert not torch.equal(pm.u, before) and not pm.u.requires_grad       # a power iteration a step
    kept = pm.u.clone()
    with torch.no_grad():
        pm(tokens, end)
        pm.add(tokens, end)
    assert torch.equal(pm.u, kept) and pm.P.trace() > 0


def test_the_classifier_reads_its_last_token_alone():
    pm = pair_model().requires_grad_(False)
    tokens = torch.randint(3, 40, (3, 12), generator=torch.Generator().manual_seed(0))
    noisy = tokens.clone()
    noisy[:, 8:] = 0
    assert torch.allclose(pm(tokens, T([8, 5, 8])), pm(noisy, T([8, 5, 8])), atol=1e-6)


@pytest.mark.parametrize("features, sn", [(16, True), (16, False), (0, True)])
def test_heads_of_the_classifier(features, sn):
    """without features a plain linear head that is always certain; without sn no pooling layer"""
    pm = PairModel(small_lm(), features, .3, sn,
                   torch.Generator().manual_seed(0)).requires_grad_(False)
    assert isinstance(pm.pool, torch.nn.Linear) == bool(features and sn)
    tokens, end = torch.randint(3, 40, (4, 6)), T([6, 6, 6, 6])
    with torch.no_grad():
        (g, u), logit, h = pm.calibrated(tokens, end), pm(tokens, end), pm.body(tokens)[:, -1]
    assert close(g * u, logit, 1e-5) and (u >= 1).all() and (features or close(u, torch.ones(4)))
    if not features:
        assert close(logit, h @ pm.w, 1e-5)
    elif not sn:
        assert close(logit, random_features(h, pm.W, pm.b) @ pm.w, 1e-5)
    again = PairModel(small_lm(), features, .3, sn, torch.Generator().manual_seed(0))
    assert all(torch.equal(a, b)
               for a, b in zip(pm.state_dict().values(), again.state_dict().values()))


def test_both_orders_of_a_pair_are_one_question():
    pm, c = pair_model(sigma=20.0).requires_grad_(False), context()
    triples = [(r["prompt"], r["chosen"], r["rejected"]) for r in WORLD.pairs(6)]
    score, u = both_orders(pm, TOK, triples, c)
    turned, same = both_orders(pm, TOK, [(x, b, a) for x, a, b in triples], c | dict(micro=5))
    assert close(turned, -score, 1e-4) and close(same, u, 1e-4) and score.abs().max() > 3e-3


# --- what a loss is given -------------------------------------------------------------------------


class Context(SimpleNamespace):
    """A Config for what needs only a few of its fields."""
    def __or__(self, changes):
        return Context(**vars(self) | changes)


def context(**changes):
    return Context(**vars(Config(device="cpu", dtype="float32", micro=4, batch=16)) | changes)


def pairs(n=8, seed=0, **kind):
    return encode_pairs(WORLD.pairs(n, seed=seed, **kind), TOK, 96)


def given(model, rows, loss, seed=0):
    return provide(model, rows, needs(loss), context(), TOK.pad,
                   torch.Generator().manual_seed(seed))


@torch.no_grad()
def alone(model, row, side):
    """A response's score, of a sequence without company or padding."""
    ids = T([*row["prompt"], *row[side]])[None]
    return sequence_score(model, ids, T([ids.size(1)]))[0]


def test_scores_are_those_of_each_sequence_alone():
    """whatever stands beside it, in whatever order, padded however far"""
    model, rows = new_scalar(small_lm(), 0), pairs(8)
    have = given(model, rows, bt)
    for side in ("chosen", "rejected"):
        want = torch.stack([alone(model, r, side) for r in rows])
        assert close(have[side].detach(), want, 1e-5) and want.std() > .01
        assert close(score_rows(scalar_reward(model, context(micro=3)), rows, side, context(), 0),
                     want, 1e-5)
        long = dict(rows[0], rejected=rows[0]["rejected"] * 6)   # pads every other row
        assert close(given(model, [*rows, long], bt)[side][:8].detach(), want, 1e-5)
        assert close(given(model, rows[::-1], bt)[side].flip(0).detach(), want, 1e-5)
    assert pair_accuracy(scalar_reward(model, context()), rows, context(), 0) == (
        (have["chosen"] > have["rejected"]).float().mean().item())


@pytest.mark.parametrize("loss, name",
                         [(bt, "chosen"), (regression, "predicted"), (preference, "logit")])
def test_scores_stay_float32_where_matmuls_are_bfloat16(loss, name):
    """the default on CUDA: a gap of .01 between scores near 5 would be rounded away"""
    model = new_rater(small_lm(), 0)
    rows = rated(pairs(6), WORLD.ratings) if loss is regression else pairs(6)
    torch.nn.init.normal_(model.ratings.weight, generator=torch.Generator().manual_seed(0))
    if loss is preference:
        model = pair_model(sigma=.5)
        rows = [dict(pair=pair_ids(TOK, r["text"]["prompt"], "ab", r["text"]["chosen"]), label=1,
                     strength=1)
                for r in rows]
    with torch.no_grad(), autocast("cpu", "bfloat16"):
        got = given(model, rows, loss)[name]
        assert got.dtype == torch.float32
        assert loss is not bt or close(got, torch.stack([alone(model, r, "chosen") for r in rows]),
                                       1e-4)


def test_likelihoods_are_those_of_each_sequence_alone():
    lm, rows = small_lm(), pairs(6)
    have = given(lm, rows, autoregressive)
    for i, r in enumerate(rows):
        logp = token_logprobs(lm, T([[*r["prompt"], *r["rejected"]]]))[0, len(r["prompt"]):]
        assert close(have["rejected_logp"][i].detach(), logp.sum().detach(), 1e-4)
    assert close(have["chosen_logp"].detach(),
                 score_rows(likelihood_reward(lm, context(micro=5)), rows, "chosen", context(), 0),
                 1e-4)
    assert score_rows(likelihood_reward(lm, context(), lm), rows, "chosen", context(),
                      0).abs().max() == 0
    other = small_lm(1)
    forth, back = (score_rows(likelihood_reward(a, context(), b), rows, "chosen", context(), 0)
                   for a, b in ((lm, other), (other, lm)))
    assert close(forth, -back, 1e-4) and forth.std() > .01


def test_ratings_come_from_the_raters_heads():
    model, rows = new_rater(small_lm(), 0), rated(pairs(6), WORLD.ratings)
    assert given(model, rows, regression)["predicted"].abs().max() == 0        # zero heads at first
    torch.nn.init.normal_(model.ratings.weight)
    have = given(model, rows, regression)
    assert have["ratings"].shape == have["predicted"].shape == (12, len(RATING_WEIGHTS))
    plain = folded(model)
    tokens = T([[*rows[0]["prompt"], *rows[0]["answer"]]])
    want = (T(RATING_WEIGHTS) * have["predicted"][0].detach()).sum()
    assert close(sequence_score(plain, tokens, T([tokens.size(1)])).detach(), want[None], 1e-5)
    assert not hasattr(plain, "ratings") and hasattr(model, "ratings") and RATING_WEIGHTS[-1] < 0


def test_a_judge_s_tokens_are_scored_where_it_speaks():
    """nll is given the answer's log-probs, listwise also the identifiers' logits before it"""
    lm, ids = small_lm(), TOK.encode("abc")
    rows = [dict(prompt=r["prompt"], answer=r["chosen"], ranks=[1., 2, 3], identifier_ids=ids)
            for r in pairs(4)]
    have = given(lm, rows, listwise)
    for i, r in enumerate(rows):
        tokens = T([[*r["prompt"], *r["answer"]]])
        n = len(r["prompt"])
        hidden, logp = lm(tokens)[0, n - 1], token_logprobs(lm, tokens)[0, n:]
        assert close(have["identifiers"][i].detach(), lm.logits(hidden)[ids].detach(), 1e-4)
        assert close(nll(have["logp"])[i].detach(), -logp.sum().detach(), 1e-4)


def test_positions_of_goals_lie_within_their_own_response():
    """early is not behind late, wrong is of the rejected response; every position can be drawn"""
    rows = pairs(5)
    start = T([len(r["prompt"]) for r in rows * 2])
    n = T([len(r[s]) for s in ("chosen", "rejected") for r in rows])
    hidden = torch.arange(40.).expand(10, 40)[..., None] + 100 * torch.arange(10)[:, None, None]
    got = goal_states(hidden, start, n, torch.Generator().manual_seed(0), draws=4000)
    row, at = ({k: f(x[..., 0]) for k, x in got.items()}
               for f in (lambda x: x // 100, lambda x: x % 100))
    assert (at["early"] <= at["late"]).all()
    assert (row["wrong"] == torch.arange(5, 10)[:, None]).all()
    for k, rows_ in (("early", slice(0, 5)), ("late", slice(0, 5)), ("wrong", slice(5, 10))):
        assert (row[k] == torch.arange(10)[rows_][:, None]).all()
        assert (at[k].amin(1) == start[rows_]).all()
        assert (at[k].amax(1) == (start + n)[rows_] - 1).all()


@pytest.mark.parametrize("term", ["plus", "minus"])
def test_both_goal_terms_reach_the_body(term):
    model, rows = new_scalar(small_lm(), 0), pairs(6)
    have = given(model, rows, goal)
    cos = [torch.nn.functional.normalize(have[k], dim=-1) for k in ("early", "late", "wrong")]
    loss = (cos[0] @ cos[1 if term == "plus" else 2].transpose(1, 2)).mean()
    loss.backward()
    assert sum(p.grad.abs().sum() for p in model.model.layers.parameters()) > 0


RUN = SimpleNamespace(cut=lambda: None, at=0, log=lambda *a, **k: None)


def fitted(model, rows, loss, micro, steps=3):
    model = copy.deepcopy(model)
    fit(model, rows, loss, context(micro=micro), SimpleNamespace(**vars(RUN)), TOK, steps=steps)
    return torch.cat([p.detach().flatten() for p in model.parameters()])


MICRO = dict(bt=bt, scaled=bt_scaled, win_tie=win_tie, arm=autoregressive, regression=regression,
             nll=nll, listwise=listwise, preference=preference, goal=goal)


@pytest.mark.parametrize("loss", MICRO)
def test_micro_does_not_change_the_result(loss):
    """goal is the exception that its docstring names: the log of a mean over the micro-batch"""
    rows, model = pairs(32, keep_ties=True), new_scalar(small_lm(), 0)
    if loss in ("arm", "nll", "listwise"):
        model = small_lm()
        rows = [r | dict(answer=r["chosen"], ranks=[2., 1], identifier_ids=[5, 6]) for r in rows]
    if loss == "regression":
        model, rows = new_rater(small_lm(), 0), rated(rows, WORLD.ratings)
        rows = [r | dict(ratings=r["ratings"][:i % 5] + [NAN] * (5 - i % 5))
                for i, r in enumerate(rows)]
    if loss == "preference":
        model = pair_model(sigma=.5, sn=False)
        rows = [dict(pair=pair_ids(TOK, x["prompt"], x["chosen"], x["rejected"]), label=i % 2,
                     strength=x["strength"]) for i, x in enumerate(r["text"] for r in rows)]
    four, sixteen = (fitted(model, rows, MICRO[loss], micro) for micro in (4, 16))
    moved = (four - torch.cat([p.detach().flatten() for p in model.parameters()])).abs().max()
    assert moved > 1e-3 and torch.allclose(four, sixteen, rtol=0, atol=1e-5) == (loss != "goal")


def test_rl_climbs_its_reward_and_kl_holds_it_back():
    """a planted reward, the share of the letter a: up without a penalty, less far with one"""
    lm, a = small_lm(), TOK.encode("a")[0]
    problems = WORLD.problems("train", 64)

    def share(roll, picked):
        return ((roll.tokens == a) * roll.mask).sum(1) / roll.mask.sum(1), {}

    def end(**options):
        policy = copy.deepcopy(lm).requires_grad_()
        told = rl(policy, lm.requires_grad_(False), TOK, problems, share, context(micro=128),
                  SimpleNamespace(**vars(RUN)), name="rl", steps=16, max_new=3, lr=2e-2, groups=16,
                  samples=8, **options)
        assert all(math.isfinite(v) for row in told for v in row.values())
        assert told[0]["kl"] == pytest.approx(0, abs=1e-4)  # the policy is its reference at first
        return told
    free, held = end(), end(beta=3.0)
    assert free[-1]["reward"] > free[0]["reward"] + .5 and held[-1]["kl"] < .1 * free[-1]["kl"]


def test_adversarial_pairs_prefer_sft_samples_and_repeat_nothing():
    texts = ["ab", "cd", "ef", "gh"]  # one prompt's samples of the SFT model
    roll = SimpleNamespace(completions=lambda: [TOK.encode(y) for y in ("x", "x", "ab", "")],
                           finished=torch.ones(4, dtype=torch.bool), tokens=torch.zeros(4, 1))
    problems = WORLD.problems("val", 1)
    field = SimpleNamespace(problems=problems, samples=4, texts=texts, gold=torch.zeros(1, 4),
                            roll=SimpleNamespace(finished=T([True, True, False, True])))
    base = SimpleNamespace(tok=TOK, world=WORLD)
    made = pairs_against(base, field, roll, range(4), random.Random(0))
    want = [(y, "x") for y in texts] + [(y, "ab") for y in texts[1:]]
    assert sorted((r["chosen"], r["rejected"]) for r in made) == sorted(want)    # none empty
    gold = WORLD.reward(problems[0], "x")
    assert all(r["margin"] == pytest.approx(-gold) for r in made if r["rejected"] == "x")
    assert all(r["chosen_finished"] == (r["chosen"] != "ef") for r in made)


# --- whole runs -----------------------------------------------------------------------------------

def weights(folder):
    return load(folder)[0].state_dict()


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


SAID = dict(                     # one number of each recipe's result
    arm="guided_gold", love="auroc", maxmin="pooled_min_accuracy", polar="scratch_accuracy",
    overopt="wco|RL gold@4",
    router="uncertainty|accuracy@0.25", rubrics="oracle|accuracy_vote", thinkrm="hard_graded",
    rmr1="id_vote",
    judge_lora="val_off", first="generated_spearman", advrm="more_gold|collapse")
LEFT = dict(  # a checkpoint of those that leave none in step folders of their own
    hs2pref="final", armo="body", polar="final", cdr="strong", ensemble="member-1",
    maxmin="round-0-group-1",
    overopt="member-1", router="pm", rubrics="judge", thinkrm="rl", rmr1="rl", judge_lora="judge",
    first="judge", advrm="more_gold-1")
LANGUAGE = {"arm", "cdr", "rubrics", "thinkrm", "rmr1", "judge_lora", "first"}


@pytest.mark.parametrize("config", METHODS)
def test_every_preset_runs(config, quick):
    out, folder = ran(config)
    assert SAID.get(config, "val_accuracy") in out and all(math.isfinite(v) for v in out.values())
    model, _ = load(os.path.join(folder, LEFT.get(config, "")))
    assert isinstance(model, ScalarModel) == (config not in LANGUAGE)
    log = read_log(folder)
    assert log and all(math.isfinite(v) for row in log for v in row.values())
    assert json.loads(open(f"{folder}/run.json").read())["result"] == out


@pytest.mark.parametrize("config, extra, key", [
    ("cdr,toyif", "", "ood_spearman"), ("router", "--sn false --rivals 0", "u_auroc")])
def test_other_ways_to_run_them(config, extra, key, quick):
    out, _ = ran(config, *extra.split())
    assert key in out and all(math.isfinite(v) for v in out.values())


@pytest.mark.parametrize("name", claims_of("reward").CLAIMS)
def test_claims_find_all_their_numbers(name, quick):
    """the report, the curves and the verdict of tiny runs: no key is missing after hours of the
    real ones"""
    claim = claims_of("reward").CLAIMS[name]
    sizes = ["--rl_steps", "2", "--votes", "2"] if name == "thinkrm" else []
    got = {(arm, 0): ran(config, *sizes)[0] for arm, config in claim.arms.items()}
    report = claims.judge(name, claim, 1, got)
    assert len(report["tests"]) == len(claim.tests) and isinstance(report["verdict"], str)
    lines = claims.sweep(claim, 1, got) if claim.sweep else {}
    assert all(arms and all(arms.values()) for arms in lines.values())


def test_the_map_names_every_method():
    text = open(reward.__file__).read()
    named = {name for names, _ in headings(text) for name in re.split(r", *", names)}
    spine = {"bt", "mean", "ring", "toyif", "tiny"}
    assert {*RECIPES, *LOSSES, *AGGREGATES, *PRESETS} <= named | spine


def test_extrapolation_goes_on_along_the_line(quick):
    """θ1 + 1.52 (θ2 - θ1), the head too"""
    one, two, far = (weights(os.path.join(ran("hs2pref")[1], x))
                     for x in ("regression", "scaled", "final"))
    assert max((one[k] - two[k]).abs().max() for k in one) > 1e-3
    assert all(close(far[k], one[k] + 1.52 * (two[k] - one[k])) for k in far)
    assert close(1 + 1.52 * .4, 1.608)


def test_armo_takes_verbosity_out(quick):
    saved = load_file(os.path.join(ran("armo")[1], "body", "armo.safetensors"))
    assert saved["ratings"][-1].abs().max() == 0                 # verbosity less itself
    assert saved["ratings"][:-1].abs().sum(1).min() > 0 and saved["gate.scale"].shape == ()


@pytest.mark.parametrize("config", ["bt", "regression", "goal"])
def test_resume_is_exact(config, quick):
    """6 steps = 3 + --resume + 3, bit for bit: the optimizer, the raters' heads, the draws of
    goal"""
    whole, folder = ran(config)
    assert not tiny(config, f"half-{config}", "--stop", "3")
    assert tiny(config, f"half-{config}", "--resume") == whole
    assert equal(weights(folder), weights(f"half-{config}"))
    assert [r["loss"] for r in read_log(folder)] == [r["loss"] for r in read_log(f"half-{config}")]


def test_a_resumed_run_keeps_its_finished_stages(quick):
    """their checkpoints and what they logged; the lost one becomes what it was"""
    out, folder = ran("ensemble")
    shutil.copytree(folder, "stages")
    kept = os.stat("stages/member-0/model.safetensors").st_mtime_ns
    shutil.rmtree("stages/member-1")
    assert tiny("ensemble", "stages", "--resume") == out
    assert os.stat("stages/member-0/model.safetensors").st_mtime_ns == kept
    assert all(equal(weights(f"stages/member-{i}"), weights(f"{folder}/member-{i}"))
               for i in (0, 1))
    assert not equal(weights("stages/member-0"), weights("stages/member-1"))
    whole, again = ([(r["step"], sorted(r)) for r in read_log(x)] for x in (folder, "stages"))
    assert again == whole


def test_a_stage_that_diverges_stops_the_run(quick):
    """as a run with a single stage does; its members would be NaN, which no comparison shows"""
    with pytest.raises(UserError, match="became nan.*try a lower --lr"):
        tiny("ensemble", "wild", "--lr", "1e8")


DRAW = data.run.draw             # as it is: quick draws nothing


@pytest.mark.parametrize("config", ["bt", "ensemble"])
def test_every_run_has_its_curve(config, quick, tmp_path):
    """of several stages too"""
    shutil.copy(os.path.join(ran(config)[1], "log.jsonl"), tmp_path)
    DRAW(tmp_path, reward.CURVES)
    assert (tmp_path / "curve.png").exists()


def test_an_ensemble_of_one_is_its_member(quick, monkeypatch):
    """uwo and mean of one standardised member order all pairs alike"""
    calls = catch(monkeypatch, reward, "combined")
    one, same = (tiny("ensemble", f"one-{how}", "--members", "1", "--aggregate", how)
                 for how in ("uwo", "mean"))
    assert one == same
    assert [getattr(x.aggregate, "func", x.aggregate) for x in calls["combined"]] == [uwo, mean]


PAIRS = Ring.pairs               # as they are: quick makes fewer


@pytest.mark.parametrize("seed, noise", [(0, 0.0), (2, 1.0)])
def test_a_reward_model_learns_its_labels(seed, noise, shared_bases):
    """60 steps on Ring: above .6 on pairs it has not seen; with every label flipped, below .4"""
    body, tok = load(sft.base("ring", like="tiny"))
    rows, test = (encode_pairs(PAIRS(WORLD, n, seed=1000 + seed, **kind), tok, 96)
                  for n, kind in ((800, dict(noise=noise)), (200, dict(split="val"))))
    model = new_scalar(body, seed)
    c = context(batch=16, micro=16, lr=2e-3)
    fit(model, rows, bt, c, SimpleNamespace(**vars(RUN)), tok, seed=seed, steps=60)
    got = pair_accuracy(scalar_reward(model, c), test, c, 0)
    assert got > .6 if noise == 0 else got < .4


# --- files of pairs -------------------------------------------------------------------------------


def write(path, rows):
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return str(path)


def some_pairs(n, flip=lambda i: False):
    rows = [{k: r[k] for k in ("prompt", "chosen", "rejected")} for r in PAIRS(WORLD, n, seed=5)]
    return [r | dict(chosen=r["rejected"], rejected=r["chosen"]) if flip(i) else r
            for i, r in enumerate(rows)]


def test_a_checkpoint_is_evaluated_on_a_file(quick, tmp_path):
    """labels by a coin: about one half; the same file with its labels swapped: what is missing to
    one"""
    rng = random.Random(0)
    coins = [rng.random() < .5 for _ in range(640)]
    result, folder = ran("bt")
    files = [write(tmp_path / f"{x}.jsonl", some_pairs(640, lambda i, x=x: coins[i] != x))
             for x in (False, True)]
    out, back = (reward.main(["--eval", folder, "--data", path, "--out", f"eval-{i}"])
                 for i, path in enumerate(files))
    assert out["val_accuracy"] == pytest.approx(1 - back["val_accuracy"])
    assert .25 < out["val_accuracy"] < .75
    assert out["all_accuracy"] == pytest.approx(1 - back["all_accuracy"]) != out["val_accuracy"]
    assert not any(k.startswith("ood") or "gold" in k for k in out)
    assert reward.main(["--config", "bt,tiny", "--eval", folder, "--out", "eval-world"]) == result


def test_a_file_of_one_prompt_can_be_evaluated(quick, tmp_path):
    """its pairs are all held out: what is not trained needs no training pairs"""
    rows = [r | dict(prompt=".abef=") for r in some_pairs(5)]
    path = write(tmp_path / "one.jsonl", rows)
    out = reward.main(["--eval", ran("bt")[1], "--data", path, "--out", "eval-one"])
    assert 0 <= out["val_accuracy"] <= 1


def test_bad_rows_are_counted_and_left_out(quick, tmp_path, capsys):
    good = some_pairs(60)
    bad = [*[r | dict(rejected=r["chosen"]) for r in good[:2]],
           *[r | dict(chosen="") for r in good[2:5]],
           good[5] | dict(margin=NAN), good[6] | dict(margin=1), good[7] | dict(strength="high"),
           good[8], *[r | dict(chosen="a" * 200) for r in good[9:11]]]
    path = write(tmp_path / "bad.jsonl", good + bad)
    out = reward.main(["--config", "margin,tiny", "--data", path, "--rows", "0", "--context", "64",
                       "--out", "bad"])
    text = capsys.readouterr().out
    assert all(x in text for x in ("3 empty", "2 equal", "2 non-finite", "2 repeated"))
    left = re.findall(r"(train|val): left out (\d+) longer than the context of 64 tokens of \d+ "
                      "pairs", text)
    assert sum(int(n) for _, n in left) == 2 and "train" in dict(left)
    assert math.isfinite(out["val_accuracy"]) and len(read_log("bad")) == 6


def test_numbers_that_only_some_rows_have_are_no_reason_to_stop(quick, tmp_path):
    """whichever half of the rows has them: of two files, one begins with a row that does"""
    for half in (0, 1):
        rows = [r | (dict(margin=.5, strength=2) if i % 2 == half else {})
                for i, r in enumerate(some_pairs(160))]
        path = write(tmp_path / f"{half}.jsonl", rows)
        out = reward.main(["--config", "margin,tiny", "--data", path, "--rows", "0", "--out",
                           f"some-{half}"])
        assert math.isfinite(out["val_accuracy"])


def test_a_file_without_a_good_pair_is_refused(quick, tmp_path):
    same = [r | dict(rejected=r["chosen"]) for r in some_pairs(20)]
    for name, rows in (("same", same),
                       ("long", [r | dict(chosen="a" * 500) for r in some_pairs(20)])):
        path = write(tmp_path / f"{name}.jsonl", rows)
        with pytest.raises(UserError, match="no pair is left"):
            reward.main(["--config", "tiny", "--data", path, "--out", name])
        assert not os.path.exists(name)                          # a typo leaves no run behind


@pytest.fixture(scope="session")
def solutions():
    path = DATA_DIR / "gsm8k-solutions-1000.jsonl"
    if not path.exists():
        pytest.skip(f"no {path}: set DATA_DIR to the folder of real data sets")
    return path


def test_real_pairs_split_by_problem_and_fit_the_context(solutions, stories, capsys):
    (train, left), (val, same) = load_pairs(solutions), load_pairs(solutions, "val")
    prompts = [{r["prompt"] for r in rows} for rows in (train, val)]
    assert not prompts[0] & prompts[1] and left == same
    assert 14 < len(prompts[0]) / len(prompts[1]) < 18
    tok = Tokenizer.load(stories)
    rows = encode_pairs(val, tok, 512, what="val")
    left = re.search(r"val: left out (\d+) longer than the context of 512 tokens of (\d+)",
                     capsys.readouterr().out)
    n, of = map(int, left.groups())
    assert of == len(val) and len(rows) == of - n > 0
    assert max(len(r["prompt"]) + len(r[s]) for r in rows for s in ("chosen", "rejected")) <= 512
    assert all(r["chosen"][-1] == r["rejected"][-1] == tok.eos for r in rows)
    assert all(r["prompt"] == tok.encode(r["text"]["prompt"]) for r in rows)   # its files: no BOS
    assert all(tok.decode(r["chosen"]).strip() == r["text"]["chosen"].strip() for r in rows[:20])


def test_a_real_checkpoint_learns_from_real_pairs(solutions, stories, quick):
    out = reward.main(["--data", str(solutions), "--init", str(stories), "--rows", "32", "--steps",
                       "2", "--batch", "4", "--context", "256", "--out", "real"])
    assert 0 <= out["val_accuracy"] <= 1 and len(read_log("real")) == 2
    model, tok = load("real")
    assert isinstance(model, ScalarModel) and tok.bos == 1


# --- what it hands on -----------------------------------------------------------------------------


def test_transformers_opens_a_trained_reward_model(quick):
    hf = pytest.importorskip("transformers")
    folder = ran("bt")[1]
    theirs = hf.AutoModelForSequenceClassification.from_pretrained(checkpoint(folder))
    ours = load(folder)[0]
    for r in pairs(4):
        ids = T([[*r["prompt"], *r["chosen"]]])
        with torch.no_grad():
            assert close(theirs(ids).logits[0], sequence_score(ours, ids, T([ids.size(1)])), 1e-4)


@pytest.mark.parametrize("world, model", [("ring", ""), ("toyif", ""), ("ring", "armo/body"),
                                          ("toyif", "router/pm")])
def test_ppo_takes_steps_against_it(world, model, quick):
    config, _, part = (model or dict(ring="bt", toyif="toyif")[world]).partition("/")
    folder = os.path.join(ran(config)[1], part)
    out = ppo.main(["--config", f"{world},ppo,tiny", "--reward", folder, "--steps", "2",
                    "--eval_every", "2", "--max_new", "0", "--out", f"ppo-{world}-{config}"])
    assert {"val_gold", "ood_reward"} <= out.keys() and all(math.isfinite(v) for v in out.values())
    assert len([r for r in read_log(f"ppo-{world}-{config}") if "kl" in r]) == 2


@pytest.mark.parametrize("config, part, world", [("armo", "body", "ring"),
                                                 ("router", "pm", "toyif")])
def test_what_lies_beside_the_weights_is_read_back(config, part, world, quick):
    """--eval of the folder gives the numbers that training ended with, those of rivals apart"""
    out, folder = ran(config)
    again = reward.main(["--config", f"{world},tiny", "--eval", f"{folder}/{part}", "--out",
                         f"eval-{config}"])
    assert again == {k: x for k, x in out.items() if not k.startswith("ensemble")}
    with pytest.raises(UserError, match="is a reward model already"):
        reward.main(["--config", f"{world},tiny", "--init", f"{folder}/{part}", "--out", "no"])
    if config == "router":
        with pytest.raises(UserError, match="a model of toyif's pairs: give --config toyif"):
            reward.main(["--config", "tiny", "--eval", f"{folder}/{part}", "--out", "no"])


def ppo_reads(folder, model, problems, samples=2):
    """What ppo.py's reward says of a rollout, and that rollout and the SFT model."""
    sft_model, tok = load(sft.base("ring" if model == "armo" else "toyif", like="tiny"))
    g = torch.Generator().manual_seed(0)
    roll = generate(sft_model, [tok.prompt(p) for p in problems], 12, samples=samples, generator=g)
    c = context(reward=folder, micro=3)
    with torch.no_grad():
        got = ppo.judged(load(folder)[0], roll, c, sft_model, ToyIF.max_new, .25)
    return got, roll, sft_model, tok


def test_ppo_reads_the_gate_that_armo_has_left(quick):
    folder = os.path.join(ran("armo")[1], "body")
    got, roll, _, _ = ppo_reads(folder, "armo", WORLD.problems("val", 5))
    own, body = load_file(f"{folder}/armo.safetensors"), load(folder)[0].model
    for i, n in enumerate(roll.prompt_len.tolist()):
        ids = roll.tokens[i, :n + int(roll.mask[i].sum())]
        with torch.no_grad():
            h, x = body(ids[None])[0, -1], body(ids[None, :n])[0, -1]
        for k in (0, 2, 4, 6):
            x = own[f"gate.mlp.{k}.weight"] @ x + own[f"gate.mlp.{k}.bias"]
            x = x.relu() if k < 6 else x
        want = (torch.softmax(x / 10, 0) * own["gate.scale"] * (own["ratings"] @ h)).sum()
        assert close(got[i], want - .25, 1e-4)
    assert got.std() > 1e-4


def test_ppo_asks_a_model_of_pairs_about_the_sft_model_s_response(quick, monkeypatch):
    """as reward.py scores the pair of texts, in both orders"""
    monkeypatch.setattr(reward, "routed", lambda pm, *a, **k: pms.append(pm) or dict(x=0.0))
    pms, folder = [], os.path.join(ran("router")[1], "pm")
    reward.main(["--config", "toyif,tiny", "--eval", folder, "--out", "eval-pm"])
    problems = ToyIF().problems("val", 6)
    got, roll, ref, tok = ppo_reads(folder, "router", problems)
    greedy = generate(ref, [tok.prompt(p) for p in problems], ToyIF.max_new, temperature=0.0)
    texts, theirs = ([tok.decode(x) for x in r.completions()] for r in (roll, greedy))
    triples = [(problems[i // 2]["prompt"], y, theirs[i // 2]) for i, y in enumerate(texts)]
    want, _ = both_orders(pms[0], tok, triples, context(micro=5), ridge=30.0, lam=10.0)
    assert close(got, want - .25, 1e-4) and got.std() > 1e-4


# --- what is wrong is named -----------------------------------------------------------------------


@pytest.mark.parametrize("argv, words", [
    ("--loss scalde", "no loss 'scalde'; did you mean 'scaled'"),
    ("--recipe ensembel", "no recipe 'ensembel'; did you mean 'ensemble'"),
    ("--recipe ensemble --aggregate wcoo", "no aggregate 'wcoo'; did you mean 'wco'"),
    ("--recipe advrm --attack overopt", "unknown key --attack"),
    ("--config advrn", "no preset 'advrn'; did you mean 'advrm'"),
    ("--claim ensemble", "no claim 'ensemble'; did you mean 'ensembles'"),
    ("--recipe thinkrm --rule grade", "--rule grade: choose from graded, sign"),
    ("--config first --candidates 12", "--candidates 12: must be at least 2 and at most 9"),
    ("--config judge_lora --levels 9", "--levels 9: must be at least 2 and at most 7"),
    ("--recipe thinkrm --style lnog", "--style lnog: choose from long"),
    ("--config rubrics --judge rubrik", "rubrik"),
    ("--data rign", "did you mean 'ring'"),
    ("--data absent.jsonl", "no file"),
    ("--flip 0.2", "unknown key --flip; it belongs to loss 'smooth'"),
    ("--step 3", "unknown key --step; did you mean 'steps'"),
    ("--noise 2", "--noise 2: must be at least 0 and at most 1"),
    ("--context 5000", "--context 5000 exceeds the"),
    ("--init nowhere", "nowhere does not exist"),
    ("--eval nowhere", "nowhere does not exist"),
    ("--recipe armo --data toyif --init base:toyif_base", "--recipe armo needs --data ring"),
    ("--recipe regression --data toyif --init base:toyif_base", "--data ring"),
    ("--config ensemble,tiny --data rubrics", "needs --data ring"),
    ("--batch 0", "--batch 0: must be at least 1"),
    ("--config ensemble --members 0", "--members 0: must be at least 1"),
    ("--config maxmin --rounds 0", "--rounds 0: must be at least 1"),
    *((f"--loss {x}", f"no loss '{x}'") for x in ("nll", "listwise", "regression")),
    ("--config ensemble --loss arm", "no loss 'arm'"),
    ("--config armo --loss margin", "--loss is for recipes that leave the loss open"),
    ("--config armo --center 0.1", "--center: this run does not read it"),
    ("--config bt --aggregate uwo", "--aggregate is for --recipe ensemble"),
    ("--config bt --eval_every 5", "--eval_every: this run does not read it"),
    ("--config bt --compile", "--compile: this run does not read it"),
    ("--config ensemble --save_every 3", "others save and resume by stages"),
    ("--config thinkrm --context 64", "--context: this run does not read it"),
    ("--config thinkrm --data toyif", "--data: this run does not read it"),
    ("--config router --chat", "--chat: this run does not read it"),
    ("--config router --rivals 1", "a spread needs two"),
    ("--config polar --rows 99", "--rows: this run does not read it"),
    ("--config cdr --strong nowhere", "nowhere does not exist"),
    ("--config cdr --weak nowhere", "nowhere does not exist")])
def test_bad_input_is_named(argv, words, quick):
    out, argv = "never" + re.sub(r"\W+", "-", argv), argv.split()
    if "--config" in argv:
        argv[argv.index("--config") + 1] += ",tiny"
    else:
        argv = ["--config", "tiny", *argv]
    with pytest.raises(UserError, match=words):
        reward.main(merged(*argv, "--out", out))
    assert not os.path.exists(out)                               # and no run is left behind


def test_the_wrong_kind_of_model_is_named(quick):
    lm, tok = load(sft.base("ring", like="tiny"))
    save(lm, tok, "kind-lm")
    save(new_scalar(lm, 0), tok, "kind-rm")
    for option, path, words in (("--init", "kind-rm", "need a language model"),
                                ("--eval", "kind-lm", "need a reward model")):
        with pytest.raises(UserError, match=words):
            reward.main(["--config", "tiny", option, path, "--out", f"kind{option}"])


def test_an_evaluation_refuses_what_it_does_not_read(quick):
    """options of training; rows of a world; --init of a file or of a model of pairs"""
    rm, pm = ran("bt")[1], f"{ran('router')[1]}/pm"
    for folder, config, argv in ((rm, "tiny", "--steps 3"), (rm, "tiny", "--lr 1e-3"),
                                 (rm, "tiny", "--rows 5"), (rm, "tiny,data=x.jsonl", "--init y"),
                                 (pm, "toyif,tiny", "--init y"), (pm, "toyif,tiny", "--context 9")):
        option = argv.split()[0]
        with pytest.raises(UserError, match=f"{option}: this run does not read it"):
            reward.main(["--config", config, "--eval", folder, *argv.split(), "--out", "never-e"])
    assert not os.path.exists("never-e")


@pytest.mark.parametrize("config, key",
                         [("first", "weight"), ("polar", "center"), ("overopt", "center")])
def test_no_option_is_silently_without_effect(config, key, quick, monkeypatch):
    """either the loss that the recipe trains with takes it, or it is refused"""
    seen = []

    def stop(model, rows, loss, *rest, **options):
        seen.append(getattr(loss, "keywords", {}).get(key))
        raise InterruptedError
    monkeypatch.setattr(reward, "fit", stop)
    with pytest.raises((InterruptedError, UserError)):
        tiny(config, f"idle-{config}", f"--{key}", "0.25")
    assert seen in ([], [0.25])


@pytest.mark.gpu
@pytest.mark.parametrize("config", METHODS)
def test_every_preset_runs_on_cuda(config, quick):
    out = tiny(config, f"cuda-{config}", "--device", "cuda")
    assert all(math.isfinite(v) for v in out.values())
