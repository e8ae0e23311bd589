"""ppo.py's shaped rewards: PAR's family, InfAlign, RTO, RPO with a reward model that learns, ptx;
each by hand, in its limits, and as the script's own run calls it."""
import copy
import math
import statistics
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from conftest import close, merged, rand
from safetensors.torch import save_file
from test_ppo_wiring import (logp_of, near, pretend, same_weights,
                             two_models)  # noqa: F401, a fixture
from wiring import catch

import ppo
from data import prefs, tasks
from data.run import UserError, batch_indices, configure, hyper, needs, read_log
from data.stats import accuracy
from data.tokenizer import bytes_tokenizer
from model import ScalarModel, generate, load, preset, save
from model import init as init_model

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
    memory, x = ppo.Running(), torch.cat([rand(7) - 5, T([9.]), rand(20, seed=2)])
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
    assert close(ppo.minmax(T([2., 6]), more), [.1, .5])


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
    assert close(ppo.calibrated(T([1 + 2e-6]), q), [.5])              # rounding is no win
    s, q = rand(500), rand(500, 40, seed=1)
    assert close(ppo.calibrated(s.exp(), q.exp()), ppo.calibrated(s, q))      # any rising function
    whole = (10 * torch.rand(4000, 41, generator=torch.Generator().manual_seed(0))).floor().double()
    assert abs(ppo.calibrated(whole[:, 0], whole[:, 1:]).mean() - .5) < .02     # ten values, tied


def test_infalign_s_functions_by_hand():
    """u = .5 and 0; of exp(10 u) under a uniform u the mean is 2202.547, the std 4405.343"""
    s, q = T([1., 0]), T([[0., 1, 1, 2], [1, 1, 1, 1]])
    assert close(ppo.infalign_id(s, q), [0, -math.sqrt(3)])
    mean = (math.exp(10) - 1) / 10
    std = math.sqrt((math.exp(20) - 1) / 20 - mean ** 2)
    assert close(ppo.infalign_bon(s, q), [(math.exp(5) - mean) / std, (1 - mean) / std])
    assert close(ppo.infalign_bon(s, q)[0], -.466282)
    mean = (1 - math.exp(-10)) / 10
    std = math.sqrt((1 - math.exp(-20)) / 20 - mean ** 2)
    assert close(ppo.infalign_won(s, q), [(mean - math.exp(-5)) / std, (mean - 1) / std])
    assert close(ppo.infalign_log(s, q), [1 + math.log(.5), 1 + math.log(.125)])       # ½ of 1/4


def test_infalign_s_functions_are_standardised_under_the_sft_model():
    """and between best and worst there is, as t goes to 0, the plain win rate"""
    for name in ("id", "bon", "won", "log"):
        phi = ppo.TRANSFORMS[f"infalign_{name}"](U, U[None].expand(2000, -1))
        assert close(phi.mean(), 0., 1e-3) and close(phi.std(), 1., 4e-3)
    q, small = U[None].expand(2000, -1), dict(t=1e-4)
    for fn in (ppo.infalign_bon, ppo.infalign_won):
        assert close(fn(U, q, **small), ppo.infalign_id(U, q), 1e-3)
        assert torch.isfinite(fn(U.float(), q.float(), t=500.)).all()


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


@pytest.mark.parametrize("words, key, own, value", [
    ("transform.beta=0.3", "beta", 0.3, 0.2), ("decode=bon,decode.n=9", "n", 4, 9),
    ("decode=won,n=4", "worst", False, True)])
def test_the_best_function_is_made_for_the_run(words, key, own, value, two_models):
    """its number of samples, its end, its KL weight: another's would be best for nothing here"""
    with pytest.raises(UserError, match=f"is for {key} {own}, this run has {value}: say --transf"):
        ppo.main(["--config", f"toyif,ppo,transform=infalign_best,beta=0.2,tiny,{words}",
                  "--init", two_models[1]])


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


def test_without_pairs_a_lesson_only_lowers_the_policy_below_the_base(judges):
    """pairs of one response with itself teach nothing"""
    (model, tok), (policy, _), task = load(judges[2]), load(judges[1]), tasks.task("toyif")
    problems = task.problems("train", 8, 1)
    roll = generate(policy, [tok.prompt(p) for p in problems], 6,
                    generator=torch.Generator().manual_seed(0))
    demos = [[*tok.encode(task.demo(p)), tok.eos] for p in problems]
    pairs = [dict(prompt=tok.prompt(p), chosen=y, rejected=y) for p, y in zip(problems, demos)]
    c = SimpleNamespace(batch=8, micro=3, seed=0, device="cpu", dtype="float32")
    opt, gaps = ppo.optimiser(model.requires_grad_(), lr=1e-3), []
    for number in range(6):
        base = torch.stack([model(torch.tensor([x["prompt"] + x["chosen"]]))[0, -1] for x in pairs])
        gaps.append((said(model, roll).mean() - base.mean()).item())
        ppo.lesson(model, opt, pairs, roll, number, 0.5, c)
    assert gaps == sorted(gaps, reverse=True) and gaps[0] - gaps[-1] > 1e-3


# --- the script's own runs, followed --------------------------------------------------------------

SEED, NO_EOS = 3, -2.
TINY = ["--steps", "2", "--rollouts", "6", "--batch", "6", "--micro", "5", "--eval_every", "2",
        "--save_every", "99", "--max_new", "6", "--eval_prompts", "4", "--calibrate", "5", "--seed",
        str(SEED), "--samples", "2", "--out", "run"]


@pytest.fixture(scope="session")
def judges(two_models, tmp_path_factory):
    """The base, the SFT model, two reward models with large heads, of which none is another."""
    folders, (net, tok) = [], load(two_models[0])
    for seed in (0, 1):
        torch.manual_seed(seed)                                       # of the head
        folders.append(str(tmp_path_factory.mktemp("judge")))
        save(ScalarModel.from_lm(net, std=0.3), tok, folders[-1])
    return [*two_models, *folders]


def said(judge, roll):
    """A reward model's score of each row, alone and without padding, at its last token."""
    out = []
    for ids, n in zip(roll.tokens, roll.prompt_len + roll.mask.sum(1).long()):
        ids = ids[:n].tolist()
        while ids[-1] == judge.config.pad_token_id:                   # as transformers reads it
            ids.pop()
        out.append(judge(torch.tensor([ids]))[0, -1].detach())
    return torch.stack(out)


def few_prompts(monkeypatch):
    """Sixty prompts to train on, in the place of thousands."""
    plain = prefs.ToyIF.problems
    monkeypatch.setattr(prefs.ToyIF, "problems", lambda self, split, n=0, seed=0: plain(
        self, split, min(n, 60), seed))


class World:
    """A run of ppo.py on ToyIF, and what is known of it from its files and settings alone."""

    def __init__(self, monkeypatch, judges, config, *more, names=(), see=None):
        pretend(monkeypatch)
        few_prompts(monkeypatch)
        base, init, judge, other = judges
        argv = merged("--config", f"toyif,{config},tiny", *TINY, "--init", init,
                      *([] if "--eos" in more else ["--no_eos", str(NO_EOS)]),
                      *([] if "--steps 0" in " ".join(more) else ["--lr", "2e-3"]), *more)
        self.calls = catch(monkeypatch, ppo, "ROLLOUTS.fresh", *names, see=see)
        self.out = ppo.main(argv)
        self.c, self.f = configure(ppo.Config, ppo.PRESETS, ppo.AXES, "", argv)
        (self.ref, self.tok), self.task = load(init), tasks.task("toyif")
        self.base, self.judge, self.other = (load(x)[0] for x in (base, judge, other))
        self.pool, self.log = self.task.problems("train", 60, 1000 + SEED), read_log(self.c.out)
        self.trained = [row for row in self.log if "loss" in row]
        self.rolls = [call.out["roll"] for call in self.calls["fresh"]]

    def ended(self, roll, bias):
        """The reward model's score, centred, under the EOS rule."""
        return torch.where(roll.finished, said(self.judge, roll) - bias, torch.tensor(NO_EOS))

    def sampled(self, problems, samples, seed):
        """What the SFT model says to these prompts with the draws of a seed."""
        prompts = [self.tok.prompt(p) for p in problems]
        return generate(self.ref, prompts, 6, samples=samples,
                        generator=torch.Generator().manual_seed(seed))

    def step(self, i):
        """The problems of an iteration."""
        return [self.pool[j] for j in batch_indices(60, 6, i, SEED).tolist()]

    def distinct(self, problems, before=()):
        """Problems whose prompts are not yet there, once each."""
        found = {p["prompt"]: p for p in problems}
        return [p for x, p in found.items() if x not in {p["prompt"] for p in before}]


SHAPES = dict(
    par=lambda s, q, old: [sum(1 / (1 + math.exp(y - x)) for y in row) / 3 for x, row in zip(s, q)],
    lsc=lambda s, q, old: [-math.log1p(math.exp(
        statistics.fmean(row) + 1.036433 * statistics.stdev(row) + 1.036433e-5 - x))
        for x, row in zip(s, q)],
    infalign_won=lambda s, q, old: [
        (.1 - math.exp(-10 * sum((x > y + 1e-4) + (abs(x - y) < 1e-4) / 2 for y in row) / 3)) / .2
        for x, row in zip(s, q)],
    minmax=lambda s, q, old: [(x - min(old)) / (max(old) - min(old)) for x in s])


@pytest.mark.parametrize("row", SHAPES)
def test_a_shaped_score_is_of_the_score_its_prompt_s_references_and_what_came_before(
        row, judges, workdir, monkeypatch):
    """whose score, after which rule, whose references; and that is what tokens are rewarded with"""
    more = [] if row == "minmax" else ["--references", "3"]
    w = World(monkeypatch, judges, f"transform={row}", "--reward", judges[2], *more, names=(
        f"TRANSFORMS.{row}", "SHAPINGS.ends"))
    first, steps = w.pool[:5], [w.step(0), w.step(1)]
    (measured, *shaped), rolls = w.calls[row], [w.sampled(first, 8, SEED), *w.rolls]
    bias = said(w.judge, rolls[0]).mean()
    blocks = [w.distinct(first)]
    blocks += [w.distinct(steps[0], blocks[0]), w.distinct(steps[1], blocks[0] + steps[0])]
    levels = {}
    for i, block in enumerate(blocks):
        q = w.ended(w.sampled(block, 3, SEED * 1_000_003 + i), bias).view(-1, 3)
        levels |= dict(zip([p["prompt"] for p in block], q))
    earlier = []
    for i, (call, problems) in enumerate(zip([measured, *shaped], [first, *steps], strict=True)):
        assert near(call.score, w.ended(rolls[i], bias))
        q = torch.stack([levels[p["prompt"]] for p in problems for _ in range(8 if i == 0 else 2)])
        assert row == "minmax" or near(call.sft_scores, q)
        earlier += call.score.tolist() if i else []
        wanted = SHAPES[row](call.score.tolist(), q.tolist(), earlier if i else call.score.tolist())
        assert near(call.out, wanted)
    mean, std = measured.out.mean(), measured.out.std()
    for call, given in zip(shaped, w.calls["ends"], strict=True):
        assert near(given.unit, (call.out - mean) / std) and near(given.coefficient, 1 / std)


def test_evaluation_is_by_the_reward_as_it_is_and_the_worst_of_n_is_the_worst(judges, workdir,
                                                                              monkeypatch):
    """no shape, no EOS rule in val_reward; of eight draws the finished one that scores least"""
    w = World(monkeypatch, judges, "transform=infalign_won", "--references", "2", "--decode", "won",
              "--n", "8", "--steps", "0", "--reward", judges[2], "--eval_prompts", "8",
              names=("DECODERS.won", "worst_of_n", "generate"))
    bias = said(w.judge, w.sampled(w.pool[:5], 8, SEED)).mean()
    problems = w.task.problems("val", 8, SEED)
    drawn = generate(w.ref, [w.tok.prompt(p) for p in problems], 6, samples=8,
                     generator=torch.Generator().manual_seed(SEED + 1))
    raw, done = said(w.judge, drawn) - bias, drawn.finished.tolist()
    picked = [min(range(i, i + 8), key=lambda j: raw[j].item() if done[j] else 1e9)
              for i in range(0, 64, 8)]
    best = [max(range(i, i + 8), key=lambda j: raw[j].item() if done[j] else -1e9)
            for i in range(0, 64, 8)]
    assert picked != best and 0 < sum(done) < 64
    assert near(w.log[0]["val_reward"], raw[picked].mean())


def references_of(judges, config, **changes):
    """A run's memory of references, and what it knows, without a run."""
    _, init, judge, _ = judges
    few = "" if "=" in config and "references" not in hyper(ppo.TRANSFORMS[config[10:]]) else (
        ",references=5")
    argv = ["--config", f"toyif,{config}{few},tiny", "--init", init, "--reward", judge]
    c, f = configure(ppo.Config, ppo.PRESETS, ppo.AXES, "", argv)
    c = replace(c, rollouts=4, calibrate=5, seed=SEED, **changes)
    (ref, tok), task = load(init), tasks.task("toyif")
    pool = task.problems("train", 30, 1)
    known = dict(c=c, f=f, tok=tok, pool=pool, ref=ref, task=task, max_new=6, bias=0.3,
                 judge=load(judge)[0])
    return ppo.References(c, f, tok, pool) if few else None, known


def test_a_prompt_s_references_depend_on_the_seed_alone(judges):
    """not on what is asked for first, nor on --micro, nor on whether a run was resumed"""
    def asked(memory, common, problems):
        return ppo.sft_scores(memory, common, problems, 1, common["tok"], common["c"])
    memory, common = references_of(judges, "par")
    pool = common["pool"]
    forth = asked(memory, common, pool)
    assert forth.shape == (30, memory.count) and torch.isfinite(forth).all()
    again, common = references_of(judges, "par", micro=3)
    back = torch.cat([asked(again, common, [p]) for p in reversed(pool)]).flip(0)
    assert near(forth, back)
    resumed, common = references_of(judges, "par")
    resumed.load({k: x for k, x in list(memory.state().items())[:2]})
    assert torch.equal(asked(resumed, common, pool[::-1]).flip(0), forth)
    other, common = references_of(judges, "par")
    common["c"] = replace(common["c"], seed=SEED + 1)
    assert not near(asked(other, common, pool), forth)
    twice = ppo.sft_scores(memory, common, pool[:3], 2, common["tok"], common["c"])
    assert torch.equal(twice, forth[[0, 0, 1, 1, 2, 2]])


ELSEWHERE = {"plain", "group", "shifted"}      # the spine's, and of pairs of responses


def by_hand(row, score, q):
    """A row's function, called with what its shape depends on."""
    fn = getattr(ppo, dict(clip="clip_reward").get(row, row))
    known = dict(score=score, sft_scores=q, seen=ppo.seen(ppo.Running().tell(), score))
    return fn(*[known[name] for name in needs(fn)])


@pytest.mark.parametrize("row", [row for row in ppo.TRANSFORMS if row not in ELSEWHERE])
def test_every_shape_has_its_row(row, judges):
    """of the reward model's score under the EOS rule, as a run asks for it"""
    memory, common = references_of(judges, f"transform={row}")
    c, f, tok, pool = (common[k] for k in ("c", "f", "tok", "pool"))
    memories = dict(references=memory, running=ppo.Running().tell())
    roll = generate(common["ref"], [tok.prompt(p) for p in pool[:5]], 6, samples=2,
                    generator=torch.Generator().manual_seed(0))
    known = ppo.rolled(common | memories, pool[:5], roll)
    _, out = ppo.worth(known, f)
    score = torch.where(roll.finished, said(common["judge"], roll) - .3, torch.tensor(-5.))
    q = ppo.sft_scores(memory, common, pool[:5], 2, tok, c) if "sft_scores" in known else None
    assert near(out, by_hand(row, score, q))


def test_only_the_prompts_of_an_iteration_are_sampled(judges):
    """calibration's first; then what each iteration of the first epoch adds to those before"""
    memory, common = references_of(judges, "par")
    pool, c, tok = common["pool"], common["c"], common["tok"]
    ppo.sft_scores(memory, common, pool[:5], 1, tok, c)
    assert list(memory.scores) == [0] and len(memory.scores[0]) == len(memory.blocks[0]) <= 5
    first = [pool[i] for i in batch_indices(30, 4, 0, SEED).tolist()]
    ppo.sft_scores(memory, common, first, 1, tok, c)
    assert set(memory.scores) <= {0, 1} and sum(map(len, memory.blocks)) == len(
        {p["prompt"] for p in pool})


def test_rto_s_token_rewards_are_of_the_dpo_model_against_the_sft_model(judges, workdir,
                                                                        monkeypatch):
    w = World(monkeypatch, judges, "shaping=rto", "--reward", judges[2], "--dpo", judges[0],
              "--beta", "0.3", names=("SHAPINGS.rto",))
    calibration = w.sampled(w.pool[:5], 8, SEED)
    bias = said(w.judge, calibration).mean()
    score = w.ended(calibration, bias)
    for call, roll in zip(w.calls["rto"], w.rolls, strict=True):
        dpo, ref = (logp_of(net, roll.tokens, roll.mask, 1.) for net in (w.base, w.ref))
        assert near(call.dpo_logp, dpo) and near(call.ref_logp, ref) and near(call.logp, roll.logp)
        unit = (w.ended(roll, bias) - score.mean()) / score.std()
        wanted = (.05 * (dpo - ref)).clamp(-.05, .05) - .3 / score.std() * (roll.logp - ref)
        last = (roll.prompt_len + roll.mask.sum(1).long() - 1)[:, None]
        wanted = (wanted * roll.mask).scatter_add(1, last, unit[:, None])
        assert near(call.unit, unit) and near(call.mask, roll.mask) and near(call.out, wanted)
    assert (.05 * (dpo - ref)).abs().max() > .05                      # some of it is clamped


def alone(net, w, pairs, side):
    """A reward model's score of a side of each pair: a row at a time, without padding."""
    rows = [[*w.tok.prompt(p), *w.tok.answer(p[side])] for p in pairs]
    return torch.stack([net(torch.tensor([ids]))[0, -1].detach() for ids in rows])


def few_pairs(monkeypatch):
    """Forty pairs to learn and ten held out, in the place of the world's thousands."""
    plain = prefs.ToyIF.pairs
    monkeypatch.setattr(prefs.ToyIF, "pairs", lambda self, n, *a, **kw: plain(
        self, 40 if n > 600 else 10, *a, **kw))


def the_adversary(monkeypatch):
    """The run's memory, and the frozen model that it was copied from, once there are any."""
    made = []

    class Kept(ppo.Adversary):
        def __init__(self, c, f, tok, ref, pool, max_new, first_judge, run):
            super().__init__(c, f, tok, ref, pool, max_new, first_judge, run)
            made.extend([self, first_judge])
    monkeypatch.setitem(ppo.MEMORIES, "contest", Kept)
    return made


RPO = ["--eta", "0.3", "--lesson_every", "1", "--lessons", "2", "--lesson_lr", "1e-3"]


def test_rpo_s_reward_model_learns_its_pairs_against_what_the_policy_has_just_said(
        judges, workdir, monkeypatch):
    """whose scores, of which rows, reach its loss, and which way it goes"""
    nets = []
    few_pairs(monkeypatch)
    made = the_adversary(monkeypatch)
    monkeypatch.setattr(ppo.Adversary, "measured", lambda self: (.5, 0., 1.))
    w = World(monkeypatch, judges, "reward=rpo", "--adversary", judges[2], *RPO,
              names=("lesson", "adversarial"), see=lambda name, call: name == "lesson"
              and nets.append(copy.deepcopy(call.model)))
    pairs = prefs.ToyIF().pairs(4000, 1000 + SEED)
    parts = w.calls["adversarial"]
    assert len(nets) == 4 and [len(x.chosen) for x in parts] == 4 * [5, 1]             # --micro 5
    for i, net in enumerate(nets):
        rows = [pairs[j] for j in batch_indices(40, 6, i, SEED).tolist()]
        chosen, rejected = (alone(net, w, rows, side) for side in ("chosen", "rejected"))
        own = said(net, w.rolls[i // 2])[batch_indices(12, 6, i, SEED + 1)]
        for k, wanted in dict(chosen=chosen, rejected=rejected, sampled=own).items():
            assert near(torch.cat([getattr(x, k) for x in parts[2 * i:2 * i + 2]]), wanted), k
        assert parts[2 * i].eta == .3 and parts[2 * i].grad == {"chosen", "rejected", "sampled"}
    lost = [F.softplus(alone(x, w, pairs, "rejected") - alone(x, w, pairs, "chosen")).mean()
            + .3 * (said(x, w.rolls[1]).mean() - alone(x, w, pairs, "chosen").mean())
            for x in (nets[2], made[0].model)]
    assert lost[1] < lost[0]
    assert same_weights(nets[0], w.judge, 0) and same_weights(made[1], w.judge, 0)
    assert not same_weights(nets[1], w.judge, 1e-4) and not same_weights(nets[3], nets[2], 1e-4)
    assert not any(p.requires_grad for p in made[1].parameters())


def test_rpo_s_reward_has_sft_samples_where_they_were_at_first(judges, workdir, monkeypatch):
    few_pairs(monkeypatch)
    nets, held = [], prefs.ToyIF().pairs(600, SEED, "val")
    made = the_adversary(monkeypatch)
    w = World(monkeypatch, judges, "reward=rpo", "--adversary", judges[2], *RPO, "--eos", "ignore",
              names=("FACTS.contested", "REWARDS.rpo", "SHAPINGS.ends"),
              see=lambda name, call: name == "contested"
              and nets.append(copy.deepcopy(call.contest.model)))
    samples = w.sampled(w.pool[:5], 8, SEED)
    first = said(w.judge, samples)
    for call, net in zip(w.calls["contested"], nets, strict=True):
        now = said(net, samples)
        wanted = (said(net, call.roll) - now.mean()) / now.std() * first.std()
        assert near(call.out, wanted, 1e-3) and call.roll.tokens.size(0) in (4, 12, 40)
    assert all(near(x.contested, y.out) for x, y in zip(w.calls["rpo"], w.calls["contested"]))
    trained = [call for call in w.calls["contested"] if len(call.roll.tokens) == 12]
    assert near(w.calls["ends"][1].unit, trained[1].out / first.std(), 1e-3)
    right = accuracy(*(alone(made[0].model, w, held, x) for x in ("chosen", "rejected")))
    assert near(w.trained[-1]["judge_accuracy"], right)
    assert near(w.trained[-1]["judge_scale"], first.std() / said(made[0].model, samples).std())


def test_rpo_without_lessons_is_ppo(judges, workdir, monkeypatch):
    few_pairs(monkeypatch)
    rows = []
    for more in (["--reward", "rpo", "--adversary", judges[2], "--lessons", "0", "--eta", "0"],
                 ["--reward", judges[2]]):
        with monkeypatch.context() as patch:
            w = World(patch, judges, "docs", *more, "--out", f"run{len(rows)}")
        rows.append([{k: x for k, x in row.items() if k != "time" and k[:2] != "t_"}
                     for row in read_log(w.c.out)])
    assert rows[0] == rows[1] and len(rows[0]) == 4


def test_lessons_that_cost_two_points_of_accuracy_are_undone_and_the_last(judges, workdir,
                                                                          monkeypatch, capsys):
    few_pairs(monkeypatch)
    made, right = the_adversary(monkeypatch), iter([.8, .785, .77])
    monkeypatch.setattr(ppo, "accuracy", lambda chosen, rejected: next(right))
    nets = []
    w = World(monkeypatch, judges, "reward=rpo", "--adversary", judges[2], *RPO, "--steps", "4",
              names=("lesson",), see=lambda name, call: nets.append(copy.deepcopy(call.model))
              if name == "lesson" else None)
    assert len(nets) == 4 and same_weights(made[0].model, nets[2], 0)          # two of two lessons
    assert "fell from 0.800 to 0.770: no more lessons, the last undone" in capsys.readouterr().out
    assert ["judge_accuracy" in row for row in w.trained] == [True, True, False, False]


def test_ptx_adds_the_likelihood_of_chosen_responses_to_the_policy_s_loss(judges, workdir,
                                                                          monkeypatch):
    """of which rows; by token; and its gradient reaches the policy beside PPO's"""
    few_pairs(monkeypatch)
    grads, nets, plain = [], [], ppo.backward

    def backward(policy, critic, batch, rows, known, f):
        nets.append(copy.deepcopy(policy))
        bare = SimpleNamespace(**vars(f) | dict(regulariser=ppo.no_regulariser))
        found = []
        for each in (bare, f):                                        # the last one's are the run's
            for p in policy.parameters():
                p.grad = None
            out = plain(policy, critic, batch, rows, known, each)
            found.append([None if p.grad is None else p.grad.clone() for p in policy.parameters()])
        grads.append(found)
        return out
    monkeypatch.setattr(ppo, "backward", backward)
    w = World(monkeypatch, judges, "regulariser=ptx", "--mu", "0.7", "--reward", judges[2],
              "--temperature", "0.9", names=("backward", "REGULARISERS.ptx"))
    pairs = prefs.ToyIF().pairs(4000, 1000 + SEED)
    updates = w.calls["backward"]
    for i, (update, net) in enumerate(zip(updates, nets, strict=True)):
        step = i // 4                                                 # two epochs of two
        picked = batch_indices(40, 12, step, SEED)[update.rows]
        nll = []
        for pair in (pairs[j] for j in picked.tolist()):
            prompt, answer = w.tok.prompt(pair), w.tok.answer(pair["chosen"])
            ids = torch.tensor([[*prompt, *answer]])
            mask = torch.ones_like(ids).float()
            mask[:, :len(prompt)] = 0
            nll.append(-logp_of(net, ids, mask, .9).sum() / len(answer))
        wanted = torch.autograd.grad(.7 * torch.stack(nll).mean(), list(net.parameters()),
                                     allow_unused=True)
        for without, with_it, g in zip(*grads[i], wanted):
            assert g is None or torch.allclose(with_it - without, g, rtol=1e-3, atol=1e-5)
    assert len(updates) == 8 and all(call.grad == set() for call in w.calls["ptx"])


# --- whole runs -----------------------------------------------------------------------------------

MEMORIES = {"transform=par,regulariser=ptx": ["--reward", 2, "--references", "2"],
            "transform=minmax,reward=rpo,lesson_every=1": ["--adversary", 2, "--lessons", "1"]}


@pytest.mark.parametrize("config", MEMORIES)
def test_a_run_with_memories_resumes_to_the_same_weights(config, judges, workdir, monkeypatch):
    """references, and demonstrations in their order; statistics, and a reward model that learns"""
    few_pairs(monkeypatch)
    few_prompts(monkeypatch)
    monkeypatch.setattr(ppo.Adversary, "measured", lambda self: (.5, .1, 1.1))
    more = [judges[x] if x == 2 else x for x in MEMORIES[config]]
    argv = merged("--config", f"toyif,{config},tiny", *TINY, "--init", judges[1], *more, "--steps",
                  "3", "--eval_every", "9", "--eval_prompts", "1", "--save_every", "3")
    ppo.main(merged(*argv, "--out", "whole"))
    ppo.main(merged(*argv, "--out", "parts", "--stop", "1"))
    asked = []
    plain = ppo.References.make
    monkeypatch.setattr(ppo.References, "make", lambda self, block, common: asked.append(block)
                        or plain(self, block, common))
    ppo.main(merged(*argv, "--out", "parts", "--resume"))
    assert 0 not in asked                                             # what was made is kept
    whole, parts = (sorted(workdir.glob(f"{x}/step-000003/**/*.safetensors")) for x in
                    ("whole", "parts"))
    assert len(whole) == 2 and all(a.read_bytes() == b.read_bytes() for a, b in zip(whole, parts))
    told = [[{k: x for k, x in row.items() if k != "time" and k[:2] != "t_"} for row in read_log(x)]
            for x in ("whole", "parts")]
    assert told[0] == told[1]


def refusal(*argv):
    """What a run says that refuses to begin."""
    with pytest.raises(UserError) as e:
        ppo.main(["--config", "toyif,tiny", "--out", f"run{len(argv)}", *argv])
    return str(e.value)


def test_what_cannot_be_is_told_at_once(judges, workdir):
    base, init, judge, _ = judges
    like = ["--init", init, "--reward", judge]
    assert "--references 1: must be at least 2" in refusal(*like, "--transform", "lsc",
                                                            "--references", "1")
    assert "--dpo FOLDER is missing" in refusal(*like, "--shaping", "rto")
    assert "--adversary FOLDER is missing" in refusal("--init", init, "--reward", "rpo")
    assert "does not exist" in refusal("--init", init, "--reward", "rpo", "--adversary", "none")
    assert "has no preference pairs: give --pairs" in refusal(*like, "--data", "chain",
                                                              "--regulariser", "ptx")
    assert "no preference data" in refusal(*like, "--regulariser", "ptx", "--pairs", "none")
    rpo = ["--init", init, "--reward", "rpo", "--adversary"]
    assert "--transform par keeps scores" in refusal(*rpo, judge, "--transform", "par")
    net, tok = load(judge)
    save(net, tok, "armo")
    save_file(dict(x=torch.zeros(1)), "armo/armo.safetensors")
    assert "trains one scalar model" in refusal(*rpo, "armo")
    other = preset("1x64", bytes_tokenizer(), 64)
    save(init_model(other), bytes_tokenizer(), "bytes")
    save(ScalarModel.from_lm(init_model(other)), bytes_tokenizer(), "bytes_judge")
    assert "--dpo bytes and --init" in refusal(*like, "--shaping", "rto", "--dpo", "bytes")
    assert "--adversary bytes_judge and --init" in refusal(*rpo, "bytes_judge")


def test_a_reward_model_that_says_nan_trains_nothing(judges, workdir, monkeypatch):
    few_pairs(monkeypatch)
    net, tok = load(judges[2])
    sick = workdir / "sick"
    save(net, tok, sick)
    plain = ppo.sequence_scores
    monkeypatch.setattr(ppo, "sequence_scores", lambda *x: plain(*x) * float("nan"))
    for more in (["--reward", str(sick), "--transform", "par"],
                 ["--reward", "rpo", "--adversary", str(sick)]):
        assert "scores are NaN or infinite" in refusal("--init", judges[1], *more, "--samples", "2")
