"""ppo.py's shaped rewards: PAR's family, InfAlign, RTO, RPO with a reward model that learns, ptx;
each by hand, in its limits, and as the script's own run calls it."""
import copy
import json
import math
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from conftest import close, rand
from wiring import catch

import ppo
from data import prefs, tasks
from data.run import UserError, batch_indices, configure, read_log
from data.stats import accuracy
from model import ScalarModel, generate, init, load, preset, save

T = partial(torch.tensor, dtype=torch.float64)
S, Q = T([1.2]), T([[.1, -.4, .6]])


# --- PAR and its family ---------------------------------------------------------------------------


def test_shaped_scores_by_hand():
    """q = (.1, -.4, .6), s = 1.2"""
    sigma = [1 / (1 + math.exp(-x)) for x in (1.1, 1.6, .6)]
    assert close(ppo.par(S, Q), [.742645]) and close(sum(sigma) / 3, .742645)
    assert close(ppo.tanh(S, Q), [.753072]) and close(ppo.centered(S, Q), [1.1])
    q85 = .1 + 1.036433 * (.5 + 1e-5)                                 # the unbiased std is .5
    assert close(ppo.lsc(S, Q), [-.443985]) and close(-math.log1p(math.exp(q85 - 1.2)), -.443985)
    assert close(ppo.sigmoid(S), [.768525]) and close(ppo.sigmoid(S, k=2.), [.916827])
    late = [1 / (1 + math.exp(-3 * (1.2 - 3 - q))) for q in (.1, -.4, .6)]
    assert close(ppo.sgfc(S, Q), [sum(late) / 3]) and close(ppo.par(S, Q, k=3.),
                                                            [(.964429 + .991837 + .858149) / 3])
    assert ppo.ceil(T([-5, 2.5, 9])).tolist() == [-5, 2.5, 3]
    assert ppo.ceil(T([-5, 2.5, 9]), ceiling=-1.).tolist() == [-5, -1, -1]


def test_par_is_the_chance_to_beat_a_reference():
    s, q = 3 * rand(50), rand(50, 4, seed=1)
    p = ppo.par(s, q)
    assert ((0 < p) & (p < 1)).all() and close(ppo.par(s, s[:, None]), [.5] * 50)
    assert close(p, torch.stack([-F.softplus(q[:, i] - s) for i in range(4)], 1).exp().mean(1))
    assert close(ppo.par(-s, -q), 1 - p)                             # who beats whom, exchanged


BOUNDED = dict(par=ppo.par, tanh=ppo.tanh, lsc=ppo.lsc, sgfc=ppo.sgfc)


@pytest.mark.parametrize("name", [*BOUNDED, "centered"])
def test_shapes_rise_with_the_score_and_know_the_prompt_s_own_level(name):
    """adding c(x) to all scores of a prompt changes none but sgfc's… which moves along, too"""
    fn, q = dict(BOUNDED, centered=ppo.centered)[name], rand(1, 5).repeat(60, 1)
    s = torch.linspace(-8, 8, 60, dtype=torch.float64).requires_grad_()
    slope, = torch.autograd.grad(fn(s, q).sum(), s)
    assert (slope > 0).all() and close(fn(s + 7.5, q + 7.5), fn(s, q), 1e-9)
    above = T([60.]).requires_grad_()
    flat, = torch.autograd.grad(fn(above, q[:1]).sum(), above)
    assert (name == "centered") == (flat.item() > 1e-9)
    low = T([-60.])
    assert (name in ("lsc", "centered")) == (fn(low, q[:1]).item() < -2)        # no floor


def test_shapes_that_are_blind_to_the_prompt_are_not_so():
    s = rand(9)
    for fn in (ppo.sigmoid, ppo.ceil):
        assert not close(fn(s + 7.5), fn(s))
    now = ppo.seen((0, 0., 0., math.inf, -math.inf), s)
    for fn in (ppo.meanstd, ppo.minmax):
        assert not close(fn(s + 7.5, now), fn(s, now))


def test_rows_keep_their_own_references():
    """row i is of q[i]: not of the batch's"""
    s, q = rand(6), rand(6, 3, seed=1)
    for fn in (*BOUNDED.values(), ppo.centered, ppo.calibrated):
        assert close(fn(s, q), [fn(s[i:i + 1], q[i:i + 1]).item() for i in range(6)])


# --- statistics of the run so far -----------------------------------------------------------------


def test_running_statistics_are_those_of_all_batches_together():
    memory, x = ppo.Running(), torch.cat([rand(7) + 3, 9 * rand(1, seed=1), rand(20, seed=2) - 5])
    for part in x.split([7, 1, 20]):
        now = ppo.seen(memory.tell(), part)
        memory.note(now)
    n, mean, square, low, high = memory.state()
    assert (n, low, high) == (28, x.min().item(), x.max().item())
    assert close(mean, x.mean(), 1e-12) and close(square / n, x.var(correction=0), 1e-12)
    again = ppo.Running()
    again.load(memory.state())
    assert again.tell() == now


def test_shapes_by_running_statistics_by_hand():
    """(1, 2, 6): mean 3, biased variance 14/3; what came before counts, too"""
    x = T([1., 2, 6])
    now = ppo.seen(ppo.Running().tell(), x)
    std = math.sqrt(14 / 3)
    assert close(ppo.meanstd(x, now), [-2 / std, -1 / std, 3 / std])
    assert close(ppo.clip_reward(x, now), [1, 2, 3 + std]) and close(ppo.minmax(x, now), [0, .2, 1])
    assert close(ppo.clip_reward(T([-9.]), now), [3 - std])
    more = ppo.seen(now, T([11.]))                                    # (1, 2, 6, 11): mean 5
    assert close(ppo.meanstd(T([11.]), more), [6 / math.sqrt(62 / 4)])
    assert close(ppo.minmax(T([6.]), more), [.5])


def test_equal_scores_divide_by_nothing():
    now = ppo.seen(ppo.Running().tell(), T([2., 2, 2]))
    assert ppo.minmax(T([2., 2]), now).tolist() == [.5, .5]
    assert ppo.meanstd(T([2., 2]), now).tolist() == [0, 0]
    assert ppo.clip_reward(T([2., 2]), now).tolist() == [2, 2]


# --- InfAlign -------------------------------------------------------------------------------------


def test_calibrated_scores_by_hand_and_by_rank():
    q = T([[0., 1, 1, 2]])
    for s, u in ((-1., 0), (0., .125), (.5, .25), (1., .5), (2., .875), (3., 1)):
        assert close(ppo.calibrated(T([s]), q), [u])                  # a tie is half a win
    s, q = rand(500), rand(500, 40, seed=1)
    assert close(ppo.calibrated(s.exp(), q.exp()), ppo.calibrated(s, q))      # any rising function
    whole = (10 * torch.rand(4000, 41, generator=torch.Generator().manual_seed(0))).floor().double()
    assert abs(ppo.calibrated(whole[:, 0], whole[:, 1:]).mean() - .5) < .02     # ten values, tied


def test_infalign_s_functions_by_hand():
    s, q = T([1., 0]), T([[0., 1, 1, 2], [1, 1, 1, 1]])                                # u = .5, 0
    assert close(ppo.infalign_id(s, q), [.5, 0])
    assert close(ppo.infalign_bon(s, q), [math.exp(5), 1], 1e-4)
    assert close(ppo.infalign_bon(s, q, t=2.), [math.e, 1])
    assert close(ppo.infalign_won(s, q), [-math.exp(-5), -1])
    assert close(ppo.infalign_log(s, q), [math.log(.5), math.log(.125)])       # u = 0: half of 1/4


U = (torch.arange(2000, dtype=torch.float64) + .5) / 2000                      # midpoints of [0, 1]


def nats(law):
    """KL of a law of u to the uniform one."""
    return (law * law.clamp(min=1e-300).log()).mean()


def wins(law, n, worst=False):
    """How often the best (worst) of n draws of the law beats that of n uniform ones."""
    below = (law.cumsum(0) - law / 2) / len(law)
    if worst:
        return ((1 - below) ** n * n * (1 - U) ** (n - 1)).mean()
    return 1 - (below ** n * n * U ** (n - 1)).mean()


def at_half_a_nat(law_of, low, high):
    """The law whose KL is .5, by bisection of a number that it grows with."""
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if nats(law_of(middle)) < .5 else (low, middle)
    return law_of(middle)


TABLE = dict(id=(.7737, .7998, .8860), log=(.7682, .7682, .9270), bon5=(.7461, .8566, .7465),
             bon=(.7117, .8715, .6763), won=(.7358, .6859, .9476))


@pytest.mark.parametrize("name", TABLE)
def test_win_rates_at_equal_kl_are_the_table_s(name):
    """plain, best of 4, worst of 4, when PPO is perfect: the law of u is exp(λ φ(u)), KL .5"""
    t = dict(t=5.) if name == "bon5" else {}
    fn, places = ppo.TRANSFORMS[f"infalign_{name.rstrip('5')}"], U[None]
    phi = torch.cat([fn(u, places.expand(len(u), -1), **t) for u in U.split(500)])
    phi = (phi - phi.mean()) / phi.std()
    law = at_half_a_nat(lambda x: torch.softmax(x * phi, 0) * 2000, 0, 50)
    found = wins(law, 1), wins(law, 4), wins(law, 4, worst=True)
    assert all(abs(a - b) < 6e-5 for a, b in zip(found, TABLE[name]))


@pytest.mark.parametrize("worst, beta, best", [(False, .2166, .8733), (True, .2084, .9479)])
def test_the_fixed_point_beats_every_other_function_at_equal_kl(worst, beta, best):
    law, R = ppo.infalign_fixed_point(4, beta, worst)
    assert abs(nats(law) - .5) < 1e-3 and abs(wins(law, 4, worst) - best) < 3e-4
    assert best > max(row[1 + worst] for row in TABLE.values())
    again = torch.softmax(R / beta, 0) * 2000                         # each made by the other
    assert (again - law).abs().max() < 1e-6 and close(law.mean(), 1.)
    slope, bump = (R[1:] - R[:-1]) * 2000, torch.zeros_like(law)
    bump[[600, 1400]] = T([-1., 1])                # the derivative of W in the direction of a bump
    change = (wins(law + 1e-4 * bump, 4, worst) - wins(law - 1e-4 * bump, 4, worst)) / 2e-4
    assert close(change * 2000, slope[600:1400].sum() / 2000, 1e-3)


@pytest.mark.parametrize("n, beta", [(4, .05), (16, .1), (64, .01)])
def test_the_fixed_point_is_found_where_plain_damping_goes_to_and_fro(n, beta):
    law, R = ppo.infalign_fixed_point(n, beta)
    assert (torch.softmax(R / beta, 0) * 2000 - law).abs().mean() < 1e-8


def test_the_best_function_is_read_off_at_u():
    _, R = ppo.infalign_fixed_point(4, .2)
    q = torch.arange(8, dtype=torch.float64)[None].repeat(3, 1)
    got = ppo.infalign_best(T([-1., 3.5, 9]), q)                               # u = 0, .5, 1
    assert close(got, R[[0, 1000, 1999]]) and got[0] < got[1] < got[2]
    _, R = ppo.infalign_fixed_point(9, .3, True)
    assert close(ppo.infalign_best(T([3.5]), q[:1], n=9, beta=.3, worst=True), R[[1000]])


# --- RTO ------------------------------------------------------------------------------------------

DPO, REF, OLD = T([[-.8, -.4, -1.]]), T([[-1.2, -.5, -.7]]), T([[-1., -.6, -.9]])
ONES = torch.ones(1, 3, dtype=torch.float64)


def test_rto_by_hand():
    r = ppo.rto(T([1.5]), OLD, REF, DPO, ONES, 1.)
    assert close(r, [[.018, .006, 1.487]])
    far = ppo.rto(T([99.]), OLD, REF, REF + T([[9., -9, .1]]), T([[1., 1, 0]]), 2.)
    assert close(far, [[.05 - .004, -.05 + .002 + 10, 0]])            # scaled, then clamped; masked
    low = ppo.rto(T([-99.]), OLD, REF, REF + 2, ONES, 1., dpo_scale=.1, dpo_clip=.15)
    assert close(low, [[.15 - .002, .15 + .001, .15 + .002 - 10]])


def test_rto_s_limits():
    plain = ppo.token_rewards(T([1.5]), OLD, REF, ONES, .7, beta=.01)
    assert close(ppo.rto(T([1.5]), OLD, REF, DPO, ONES, .7, dpo_scale=0.), plain)      # PPO
    assert close(ppo.rto(T([1.5]), OLD, REF, REF, ONES, .7), plain)              # a DPO of no step
    r = ppo.rto(T([0.]), OLD, REF, DPO, ONES, 1., beta=.3, dpo_scale=.3, dpo_clip=9.)
    assert close(r.sum(), .3 * (DPO.sum() - OLD.sum()))                    # the reference drops out


# --- RPO ------------------------------------------------------------------------------------------


def test_the_adversary_s_loss_by_hand():
    """-log σ(.5) = .474077;  .1 (2 - 1) = .1"""
    got = ppo.adversarial(T([1., 0]), T([.5, 0]), T([2., 0]), eta=.1)
    assert close(got, [.574077, math.log(2)])


def test_the_adversary_s_loss_without_eta_is_bradley_terry_and_knows_no_constant():
    c, r, y = (rand(8, seed=i).requires_grad_() for i in range(3))
    assert close(ppo.adversarial(c, r, y, eta=0.), -F.logsigmoid(c - r))
    grads = torch.autograd.grad(ppo.adversarial(c, r, y, eta=.3).sum(), (c, r, y))
    assert close(sum(grads), torch.zeros(8), 1e-12)                   # of a shift of all scores
    assert close(grads[2], torch.full((8,), .3))                      # the policy's samples go down
