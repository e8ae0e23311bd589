"""ppo.py's sharpening, LaRe, PPO on classes and asymptotics: worked values, limits, invariances;
then what reaches each function in the script's own runs."""
import copy
import itertools
import json
import math
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import close, merged
from test_ppo_wiring import logp_of, near, two_models  # noqa: F401: a fixture
from wiring import catch

import model as models
import ppo
from data.prefs import ring_tokenizer, tokenizer
from data.run import UserError, checkpoint, read_log
from data.stats import bon_kl
from model import Rollout, ScalarModel, load, save

T = torch.tensor


def D(*x):
    """Float64 numbers."""
    return torch.tensor(x, dtype=torch.float64)


# --- sharpening -----------------------------------------------------------------------------------


def test_own_likelihood_by_hand():
    """log(.5 .4 .8) = log .16; a third of it per token; what is masked does not count"""
    logp = T([[.5, .4, .8]]).log()
    assert close(ppo.own_likelihood(logp, torch.ones(1, 3)), [math.log(.16)])
    assert close(ppo.own_likelihood(logp, T([[1., 1, 0]])), [math.log(.2)])
    assert close(ppo.own_likelihood(logp, T([[1., 1, 0]]), per_token=True), [math.log(.2) / 2])


def test_a_token_of_sharpening_is_worth_more_likelihood_less_its_own():
    """summed, KL term and self-reward are Σ (1 + β) log π_base - β log π_old"""
    old, base, mask = T([[-1., -.5, -2, 0]]), T([[-1.2, -.7, -1.5, 0]]), T([[1., 1, 1, 0]])
    score = ppo.own_likelihood(base, mask)
    rewards = ppo.token_rewards(score, old, base, mask, 1.0, beta=0.5)
    assert close(rewards.sum(1), [(1.5 * -3.4 + 0.5 * 3.5)])


PB = D(.4, .3, .2, .1)


def softmax_optimum(gradient, start, rate=2.0, steps=600):
    """Where gradient ascent in the logits ends."""
    theta = start.clone()
    for _ in range(steps):
        theta = theta + rate * gradient(torch.softmax(theta, 0))
    return torch.softmax(theta, 0)


def test_the_optimum_of_sharpening_is_a_power_of_the_base():
    """base (.4 .3 .2 .1), β .5: π_base³ = (.64 .27 .08 .01), by ascent on the script's own rewards
    of every action"""
    def gradient(p):
        score = ppo.own_likelihood(PB.log()[:, None], torch.ones(4, 1))
        r = ppo.token_rewards(score, p.log()[:, None], PB.log()[:, None], torch.ones(4, 1).double(),
                              1.0, beta=0.5)[:, 0]
        return p * (r - (p * r).sum())
    assert close(softmax_optimum(gradient, D(0, 0, 0, 0)), [.64, .27, .08, .01], 1e-5)


def test_the_regression_is_0_at_the_same_law_and_leads_there():
    """all pairs of the four actions; any constant of the ratio cancels"""
    pairs = list(itertools.permutations(range(4), 2))
    flat = T([i for pair in pairs for i in pair])
    base, ones = PB.log()[flat, None], torch.ones(len(flat), 1)

    def losses(logp):
        score = ppo.own_likelihood(base, ones)
        return ppo.sharpen_regression(logp[flat, None], base, ones, score, pair_beta=0.5)

    star = D(.64, .27, .08, .01).log()
    assert losses(star).abs().max() < 1e-12 and losses(star + 3).abs().max() < 1e-12
    assert losses(PB.log()).min() > 0.08
    theta = PB.log().clone().requires_grad_()
    opt = torch.optim.Adam([theta], lr=0.05)
    for _ in range(300):
        opt.zero_grad()
        losses(torch.log_softmax(theta, 0)).mean().backward()
        opt.step()
    assert close(torch.softmax(theta.detach(), 0), [.64, .27, .08, .01], 1e-3)


def test_the_regression_by_hand():
    """ratios .3 and -.1, sums over tokens, rewards 1 and .5, β 2: (2 · .4 - .5)² = .09 of both"""
    logp, ref = T([[.1, .2], [0., 7.]]), T([[0., 0.], [.1, 0.]])
    mask = T([[1., 1], [1, 0]])
    loss = ppo.sharpen_regression(logp, ref, mask, T([1., .5]), pair_beta=2.0)
    assert close(loss, [.09, .09])
    assert close(ppo.sharpen_regression(logp, ref, mask, T([.5, 1.]), pair_beta=2.0),
                 [1.69, 1.69])


def test_sharpened_and_coverage_by_hand():
    """π(y*|x) = .9 .6 .95 .2: at δ .1 half of the prompts, at δ .5 three of four"""
    best = D(.9, .6, .95, .2)
    assert ppo.sharpened(best, 0.1) == 0.5 and ppo.sharpened(best, 0.5) == 0.75
    assert ppo.sharpened(best) == 0.75 and ppo.coverage(D(.5, .25)) == 3.0


def responses(texts, tok, prompt="x", width=8):
    """A Rollout of texts, "!" at an end for one that did not end."""
    rows, mask, finished = [], [], []
    for text in texts:
        ids = tok.encode(text.rstrip("!")) + [tok.eos] * (text[-1:] != "!")
        rows.append([1] + ids + [0] * (width - len(ids)))
        mask.append([0.] + [1.] * len(ids) + [0.] * (width - len(ids)))
        finished.append(text[-1:] != "!")
    return Rollout(T(rows), T(mask), torch.zeros(len(rows), width + 1),
                   torch.ones(len(rows)).long(), T(finished))


def test_a_vote_is_a_share_of_the_prompt_s_own_responses():
    """texts where nothing is stated; what did not end has no vote; a prompt's votes are its own"""
    tok = tokenizer()
    roll = responses(["ab", "ab", "cd", "ab!", "ab", "ab", "ab", "cd"], tok)
    votes = ppo.majority(roll, [dict(prompt="p"), dict(prompt="q")], 4, SimpleNamespace(), tok)
    assert close(votes, [.5, .5, .25, 0, .75, .75, .75, .25])
    stating, roll = SimpleNamespace(stated=lambda text: text[-1]), ["ab", "cb", "cd", "b!"]
    votes = ppo.majority(responses(roll, tok), [dict(prompt="p")], 4, stating, tok)
    assert close(votes, [.5, .5, .25, 0])


def test_the_best_of_one_own_sample_is_plain_sft():
    """N = 1: every response is the best, and the loss is likelihood's"""
    mask = T([[1., 1, 0], [1, 1, 1]])
    adv, returns = ppo.best_of_group(D(-3, -9), mask, 1)
    assert torch.equal(adv, mask.to(adv)) and returns is None
    logp = T([[-1., -2, 0], [-1, -1, -3]])
    assert torch.equal(ppo.weighted_nll(logp, logp, adv) * mask, -logp * mask)


# --- asymptotics ----------------------------------------------------------------------------------


def test_kl_of_best_of_n_by_hand():
    worked = {2: .193147, 4: .636294, 16: 1.835089, 64: 3.174508, 256: 4.549084, 1024: 5.932448,
              12500: 8.433564}
    assert all(bon_kl(n) == pytest.approx(x, abs=1e-6) for n, x in worked.items())


def test_the_law_of_the_best_of_four_by_hand():
    q = ppo.bon_pmf(D(1, 2, 3), D(.5, .3, .2), 4)
    assert close(q, [.0625, .3471, .5904]) and close(ppo.kl_of(q, D(.5, .3, .2)), .559751)
    assert close(ppo.bon_pmf(D(3, 1, 2), D(.2, .5, .3), 4), [.5904, .0625, .3471])     # any order
    assert close(ppo.bon_pmf(D(1, 2, 3), D(.5, .3, .2), 1), [.5, .3, .2])


def test_the_law_of_the_best_is_that_of_all_draws():
    """equal scores: of the draws that tie for the best, any is as likely"""
    p, scores = D(.1, .4, .2, .3), D(2., 1., 2., 0.)
    law = torch.zeros(4, dtype=torch.float64)
    for draw in itertools.product(range(4), repeat=3):
        best = [i for i in draw if scores[i] == max(scores[j] for j in draw)]
        for i in best:
            law[i] += p[list(draw)].prod() / len(best)
    assert close(ppo.bon_pmf(scores, p, 3), law) and close(law.sum(), 1)
    assert ppo.kl_of(law, p) < bon_kl(3)                                    # ties: an upper bound


def binomial(m, p):
    """The law of the number of successes."""
    return D(*(math.comb(m, k) * p ** k * (1 - p) ** (m - k) for k in range(m + 1)))


@pytest.mark.parametrize("n, kl, best, optimum", [(16, 1.811975, .431040, .442849),
                                                  (256, 4.489405, .513272, .527755)])
def test_best_of_n_against_the_optimum_at_its_kl_by_hand(n, kl, best, optimum):
    """Bernoulli .3, 40 symbols, the share of ones: the optimum is the memoryless source's sup"""
    p, s = binomial(40, .3), torch.arange(41).double() / 40
    q = ppo.bon_pmf(s, p, n)
    delta = ppo.kl_of(q, p).item()
    t, law = ppo.tilt_at_kl(s, p, delta)
    assert close(delta, kl) and close((q * s).sum(), best) and close((law * s).sum(), optimum)
    assert close(ppo.kl_of(law, p), delta, 1e-9) and close(law, ppo.tilted(s, p, t))
    assert close(ppo.memoryless(D(0, 1), D(.7, .3), delta, 40), optimum)


def test_the_gap_to_the_optimum_shrinks_with_length():
    gaps = []
    for m in (10, 20, 40, 80):
        p, s = binomial(m, .3), torch.arange(m + 1).double() / m
        q = ppo.bon_pmf(s, p, 16)
        gaps.append((ppo.tilt_at_kl(s, p, ppo.kl_of(q, p).item())[1] * s).sum() - (q * s).sum())
    assert all(0 < b < a for a, b in zip(gaps, gaps[1:]))


@pytest.mark.parametrize("seed", range(3))
def test_no_law_of_a_kl_beats_the_tilted_one(seed):
    """random laws moved to the same KL by mixing with p; best of n too"""
    g = torch.Generator().manual_seed(seed)
    p = torch.rand(6, generator=g, dtype=torch.float64)
    p, s = p / p.sum(), torch.randn(6, generator=g, dtype=torch.float64)
    other = torch.rand(6, generator=g, dtype=torch.float64) ** 3
    for q in (other / other.sum(), ppo.bon_pmf(s, p, 5)):
        law = ppo.tilt_at_kl(s, p, ppo.kl_of(q, p).item())[1]
        assert (law * s).sum() >= (q * s).sum() - 1e-9


def test_limits_of_the_tilt():
    """no nats, no move; more than the best level is worth: that level alone; equal scores: p"""
    p, s = D(.5, .3, .2), D(1., 2., 2.)
    t, law = ppo.tilt_at_kl(s, p, 0.0)
    assert close(law, p) and t < 1e-6
    t, law = ppo.tilt_at_kl(s, p, 5.0)
    assert t == math.inf and close(law, [0, .6, .4])
    assert close(ppo.tilt_at_kl(D(1., 1, 1), p, 1.0)[1], p)
    t, law = ppo.tilt_at_kl(s * 1e-6, p, 0.3)                            # whatever the score's unit
    assert close(ppo.kl_of(law, p), 0.3) and close(law, ppo.tilt_at_kl(s, p, 0.3)[1])


# --- gold at a KL ---------------------------------------------------------------------------------


def test_peaks_of_gold_by_hand():
    assert close(ppo.gao_peak(1, .25, "bon"), [2, 1])
    assert close(ppo.gao_peak(1, .4, "rl"), [4.481689, 1.792676])
    assert close(ppo.gao(D(12.182494), 1, .4, "rl"), [0], 1e-6)
    assert ppo.gao_peak(1, -.1, "rl") == (math.inf, math.inf)
    assert ppo.gao_peak(1, .001, "rl") == (math.inf, math.inf)             # e^999
    assert ppo.gao_peak(-1, .1, "bon") == (0, 0)


def test_dead_symbols_are_never_drawn():
    """of probability 0, the best of all among them: KL, best of n and the tilt leave them out"""
    p, s = D(.5, .5, 0), D(1, 2, 3)
    assert close(ppo.kl_of(D(.1, .9, 0), p), .1 * math.log(.2) + .9 * math.log(1.8))
    assert close(ppo.bon_pmf(s, p, 4), [.0625, .9375, 0])
    t, law = ppo.tilt_at_kl(s, p, .2)
    assert 0 < t < 9 and close(ppo.kl_of(law, p), .2) and law[2] == 0
    assert ppo.tilt_at_kl(s, p, 1.0)[1].tolist() == [0, 1, 0]


@pytest.mark.parametrize("words, method", [
    ("ppo,rollout=proposed", "gdc"), ("fdpg_js,rollout=proposed", "gdc"),
    ("fdpg_js,rollout=from_sft", "best"), ("ppo,rollout=from_sft", "best")])
def test_other_samples_go_with_what_weighs_them(words, method, two_models):
    """a ratio to the policy itself would take a proposal's samples for its own"""
    with pytest.raises(UserError, match=f"the rest of this method needs --advantage {method}"):
        ppo.main(["--config", f"toyif,{words},tiny", "--init", two_models[1]])


@pytest.mark.parametrize("words, error", [
    ("advantage=pair,samples=1", "--advantage pair: the rest of this method needs --surrogate p3o"),
    ("surrogate=p3o,samples=2", "--advantage: the rest of this method needs --advantage pair"),
    ("surrogate=whole", "--advantage: the rest of this method needs --advantage fdpg"),
    ("advantage=fdpg", "--surrogate: the rest of this method needs --surrogate whole"),
    ("advantage=gdc", "--surrogate: the rest of this method needs --surrogate nll"),
    ("surrogate=pairs", "--rollout: the rest of this method needs --rollout from_sft"),
    ("transform=group,samples=1", "--samples 1: --transform group compares at least 2"),
    ("tppo,p3o", "--rollout windowed ends responses of a prompt in different steps: --surrogate"),
    ("gdc,beta=0.3", "--beta: this run does not read it; --shaping is for advantages made of tok"),
    ("raft,controller=adaptive", "--controller: this run does not read it"),
    ("controller=adaptive,horizon=3", "--horizon 3: a step of 16 completions would change"),
    ("quark,risks=0,0", "--risks 0,0: weights, at least 0 and not all of them"),
    ("quark,risks=-1,2", "--risks -1,2: weights, at least 0"),
    ("rluf,twice", "--rewards names .*one twice: leave one out")])
def test_half_a_method_is_refused(words, error, two_models, workdir):
    """what would run as something else, without a word"""
    if "quark" in words or "twice" in words:
        for name in ("one", "two"):
            save(ScalarModel.from_lm(load(two_models[1])[0]), load(two_models[1])[1], name)
        words = words.replace(",twice", "") + f",rewards=one+{'one' if 'twice' in words else 'two'}"
    with pytest.raises(UserError, match=error):
        ppo.main(["--config", f"toyif,ppo,tiny,{words}", "--init", two_models[1]])


@pytest.mark.parametrize("kind, law", [("bon", lambda d: d * (1.3 - .4 * d)),
                                       ("rl", lambda d: d * (1.3 - .4 * d.log()))])
def test_a_fit_finds_its_own_law(kind, law):
    """what lies below d = .2 does not count; noise of opposite signs cancels"""
    d = torch.linspace(.05, 3, 60, dtype=torch.float64)
    gold = law(d) + torch.where(d < .2, 9.0, 0.0)
    assert close(ppo.gao_fit(d, gold, kind), [1.3, .4], 1e-9)
    noisy = torch.cat([law(d) + .1 * d, law(d) - .1 * d])
    assert close(ppo.gao_fit(torch.cat([d, d]), noisy, kind), [1.3, .4], 1e-9)


def test_gold_at_matched_kl_by_hand():
    """of the rows of training: those within a quarter of 2 nats are 1.6 and 2.3, whose gold is 4
    and 6; nobody is near 8: the nearest, 3, stands there and says so"""
    log = [dict(step=0, val_kl=0., val_gold=1.)]
    log += [dict(step=i + 1, kl=k, quality=g, entropy=i / 4) for i, (k, g) in enumerate(
        [(0., 1.), (1.6, 4.), (2.3, 6.), (3., 2.), (2.9, 0.)])]
    found = ppo.frontier(log, bins=(2, 8), window=2)
    assert found == {"gold@2": 5.0, "kl@2": 1.95, "gold@8": 2.0, "kl@8": 3.0, "best_gold": 5.0,
                     "early_gold": 1.0, "end_entropy": 1.0}
    assert ppo.frontier(log + log[1:4], window=1) == pytest.approx(
        ppo.frontier(log + log[1:4]) | dict(best_gold=6.0, early_gold=2.5, end_entropy=0.375))
    assert ppo.frontier(log[:1]) == {}
    assert ppo.frontier(log)["best_gold"] == pytest.approx(13 / 5)
    assert list(ppo.frontier(log))[:4] == ["gold@0.5", "kl@0.5", "gold@1", "kl@1"]


# --- the script's own runs ------------------------------------------------------------------------

SMALL = ["--steps", "2", "--rollouts", "4", "--samples", "2", "--batch", "4", "--micro", "3",
         "--epochs", "1", "--eval_every", "2", "--save_every", "99", "--max_new", "6",
         "--eval_prompts", "4", "--calibrate", "4", "--seed", "3", "--lr", "3e-3"]


def small(config, init, out, *extra):
    """A tiny run of ppo.py from a random model; -> what it returns."""
    return ppo.main(merged("--config", f"toyif,{config},tiny", *SMALL, "--init", init, "--out", out,
                           *extra))


def idle(init, out):
    """A run that makes no step."""
    return ppo.main(["--config", "toyif,sft,tiny,steps=0,max_new=6,eval_prompts=4,calibrate=4",
                     "--reward", "self", "--init", init, "--out", out])


def weights_at(call):
    """Copies of the models that a call was given, as they were then."""
    for key, x in vars(call).items():
        if isinstance(x, torch.nn.Module):
            setattr(call, key, copy.deepcopy(x))


@pytest.mark.parametrize("reward, heat", [("self", 0.7), ("majority", 0.2)])
def test_sharpening_rewards_what_the_sft_model_finds_likely(reward, heat, two_models, workdir,
                                                            monkeypatch):
    """π_sft's log-probs of every rollout, also after the policy has moved; a vote of its own group,
    of the texts"""
    init = two_models[1]
    calls = catch(monkeypatch, ppo, "REWARDS", "rolled")
    out = small("sharpen_rl", init, "run", "--reward", reward, "--samples", "4", "--temperature",
                str(heat))
    (ref, tok), seen = load(init), calls[reward]
    assert [len(x.out) for x in seen] == [32, 4, 4, 16, 16, 4, 4]
    for x, found in zip(seen, calls["rolled"], strict=True):
        tokens, mask, n = found.roll.tokens, found.roll.mask, len(x.out) // len(found.problems)
        if reward == "self":
            assert near(x.out, logp_of(ref, tokens, mask, heat).sum(1))
            continue
        texts = [(i // n, tuple(ids), done) for i, (ids, done) in enumerate(
            zip(found.roll.completions(), found.roll.finished.tolist()))]
        assert near(x.out, T([texts.count(t) / n * t[2] for t in texts]))
    assert reward == "self" or seen[0].out.unique().numel() > 2
    log = read_log("run")
    assert ppo.frontier(log).items() <= out.items() and out["best_gold"] == sum(
        row["quality"] for row in log if "loss" in row) / 2
    told = [row["reward"] for row in log if "loss" in row]
    trained = [torch.where(found.roll.finished, x.out, -50.0).mean()
               for x, found in zip(seen[3:5], calls["rolled"][3:5])]
    assert near(T(told), torch.stack(trained), 1e-3)


def test_sharpen_sft_learns_the_best_of_the_frozen_model_s_samples(two_models, workdir,
                                                                   monkeypatch):
    """whose samples: the SFT model's in every step; whose log-probs: the policy's; which train:
    each prompt's likeliest"""
    init = two_models[1]
    ref, tok = load(init)
    calls = catch(monkeypatch, ppo, "ROLLOUTS", "fresh", "SURROGATES",
                  see=lambda _, x: weights_at(x))
    small("sharpen_sft", init, "run", "--samples", "3", "--batch", "12", "--micro", "12")
    assert len(calls["nll"]) == 2 and not torch.equal(calls["nll"][0].logp, calls["nll"][1].logp)
    assert len(calls["from_sft"]) == len(calls["fresh"]) == 2
    for k, (x, drawn, loss) in enumerate(zip(calls["from_sft"], calls["fresh"], calls["nll"])):
        roll = drawn.out["roll"]
        assert near(roll.logp, logp_of(ref, roll.tokens, roll.mask, 1.0))          # of its sampler
        mine = logp_of(x.policy, roll.tokens, roll.mask, 1.0)
        assert near(x.out["roll"].logp, mine) and (k == 0) == near(mine, roll.logp)
        score = torch.where(roll.finished, logp_of(ref, roll.tokens, roll.mask, 1.0).sum(1), -50.0)
        best = torch.eye(3)[score.view(4, 3).argmax(1)].view(-1, 1)     # of equals the first
        order = [next(i for i in range(12) if near(mine[i, :loss.logp.size(1)], row))
                 for row in loss.logp]
        assert sorted(order) == list(range(12))
        assert near(loss.adv, (best * roll.mask)[order][:, :loss.adv.size(1)])


def test_sharpen_pairs_regress_the_policy_on_its_neighbours(two_models, workdir, monkeypatch):
    """rows 2 i and 2 i + 1 are of one prompt; the gradient is that of the pairs' mean loss"""
    init, found = two_models[1], []
    (ref, tok), plain = load(init), ppo.backward

    def update(policy, critic, batch, rows, known, f):
        before = copy.deepcopy(policy)
        out = plain(policy, critic, batch, rows, known, f)
        grads = [p.grad.clone() for p in policy.parameters() if p.grad is not None]
        found.append((before, batch, rows, out, grads))
        return out

    monkeypatch.setattr(ppo, "backward", update)
    small("sharpen_pairs", init, "run", "--micro", "3", "--pair_beta", "0.7")
    assert len(found) == 4
    for policy, batch, rows, out, grads in found:
        tokens, mask = batch["tokens"][rows], batch["mask"][rows]
        assert all(torch.equal(a[:3], b[:3]) for a, b in tokens.view(-1, 2, tokens.size(1)))
        base = logp_of(ref, tokens, mask, 1.0).sum(1)
        done = ((tokens == tok.eos) * mask).sum(1) > 0
        score = torch.where(done, base, -50.0)
        ratio = logp_of(policy, tokens, mask, 1.0).sum(1) - base
        loss = (0.7 * (ratio[::2] - ratio[1::2]) - (score[::2] - score[1::2])).square().mean()
        assert near(out["loss"], loss, 1e-3)
        wanted = torch.autograd.grad(loss, [p for p in policy.parameters()])
        assert all(near(a, b, 1e-2) for a, b in zip(grads, wanted, strict=True))


# --- LaRe: factors --------------------------------------------------------------------------------


def test_factors_of_a_ring_response_by_hand():
    """by the docstring: keyword, illegal, again, end, place, four classes, how many of the class, +
    and + again, rare, refusal, unsafe"""
    rows = T(ppo.ring_factors(".abef=", ["b", "+", "b", "d", "A", "+", ""])).float()
    wanted = T([[1, 0, 0, 0, 0.0, 0, 1, 0, 0, 0.00, 0, 0, 0, 0, 0],
                [0, 0, 0, 0, 0.1, 0, 0, 0, 0, 0.00, 1, 0, 0, 0, 0],
                [0, 0, 1, 0, 0.2, 0, 1, 0, 0, 0.25, 0, 0, 0, 0, 0],    # after +: no step is judged
                [0, 0, 0, 0, 0.3, 0, 0, 0, 1, 0.00, 0, 0, 0, 0, 0],    # b to d: 2, legal
                [0, 0, 0, 0, 0.4, 0, 0, 0, 0, 0.00, 0, 0, 1, 0, 0],
                [0, 0, 1, 0, 0.5, 0, 0, 0, 0, 0.00, 1, 1, 0, 0, 0],
                [0, 0, 0, 1, 0.6, 0, 0, 0, 0, 0.00, 0, 0, 0, 0, 0]])
    assert close(rows, wanted, 1e-6)
    rows = T(ppo.ring_factors("!abef=", ["-", "a", "e", "x", "b"])).float()
    assert rows[:, 13].tolist() == rows[:, 14].tolist() == [1, 0, 0, 0, 0]
    assert rows[:, 1].tolist() == [0, 0, 1, 1, 0]                # 4 and 19 are illegal, 2 is not
    assert ppo.ring_factors(".abef=", ["e"])[0][14] is False


def test_factors_of_a_toyif_response_by_hand():
    """rules met and broken at once, order kept and against it, too much, the end, met by ending"""
    rows = T(ppo.toyif_factors("<Fc#2=", ["c", "b", "d", ""])).float()
    assert rows.tolist() == [[.5, 0, 0, 0, 0, 0, 0], [0, 0, 0, 1, 0, 0, 0],
                             [0, 0, 1, 0, 1, 0, 0], [0, 0, 0, 0, 0, 1, 0]]
    rows = T(ppo.toyif_factors("*HaNb=", ["b", "a", "a", "b", ""])).float()
    assert rows.tolist() == [[0, .5, 0, 0, 0, 0, 0], [.5, 0, 1, 0, 0, 0, 0],
                             [0, 0, 0, 1, 0, 0, 0], [0, 0, 0, 1, 0, 0, 0], [0, 0, 0, 0, 0, 1, 0]]
    rows = T(ppo.toyif_factors(">Ld#2=", ["e", "d", ""])).float()
    assert rows.tolist() == [[0, 0, 0, 0, 0, 0, 0], [0, 0, 1, 0, 0, 0, 0], [0, 0, 0, 0, 0, 1, 1]]
    assert ppo.toyif_factors(">NcFa=", [""])[0][1] == 0.5      # an empty response has no first
    assert [row[:2] for row in ppo.toyif_factors("<Fc=", ["d", "c"])] == [[0, 1], [0, 0]]
    assert [row[6] for row in ppo.toyif_factors(">Ld=", ["d", "e", ""])] == [0, 0, 0]


BAD = {"raises": "def f(prompt, tokens): return [[1 / (len(tokens) - 3)] for t in tokens]",
       "nan": "def f(prompt, tokens): return [[float('nan') * (t == 'a')] for t in tokens]",
       "wrong K": "def f(prompt, tokens): return [[1.0] * (1 + ('a' in tokens)) for t in tokens]",
       "ragged": "def f(prompt, tokens): return [[1.0] * (i + 1) for i, t in enumerate(tokens)]",
       "rows": "def f(prompt, tokens): return [[1.0] for t in [*tokens, 'end']]",
       "words": "def f(prompt, tokens): return [['x'] for t in tokens]",
       "arguments": "def f(prompt): return 1",
       "module": "import nowhere"}
WORDS = {"raises": "it failed: ZeroDivisionError.*line 1", "nan": "a number is NaN or infinite",
         "wrong K": "1 or 2 factors, by the state", "ragged": r"it gave \d+ rows of \[1, 2",
         "rows": r"it gave \d+ rows of ", "words": "it failed: ValueError",
         "arguments": r"it is called as f\(prompt, tokens\)", "module": "the file does not run"}


@pytest.mark.parametrize("why", BAD)
def test_factor_code_is_run_before_it_is_believed(why, workdir):
    """on 64 states of both kinds; what is sound passes, and tells how many factors it gives"""
    tok, pool = tokenizer(), [dict(prompt="<Fc="), dict(prompt="*HaNb=")]
    (workdir / f"{why.replace(' ', '_')}.py").write_text(BAD[why])
    spec = f"{why.replace(' ', '_')}.py:f"
    with pytest.raises(UserError, match=f"--factors {spec}.*{WORDS[why]}"):
        ppo.verified(ppo.factor_code(spec, "toyif"), spec, pool, tok, 12, 0)
    assert ppo.verified(ppo.toyif_factors, "", pool, tok, 12, 0) == 7
    ring = [dict(prompt=".abef="), dict(prompt="!abef=")]
    assert ppo.verified(ppo.ring_factors, "", ring, ring_tokenizer(), 24, 0) == 15


def test_factor_code_sees_64_states_that_end_and_that_do_not():
    seen = []

    def watch(prompt, tokens):
        seen.append((prompt, tokens))
        return [[0.0]] * len(tokens)

    assert ppo.verified(watch, "", [dict(prompt=x) for x in "pq"], tokenizer(), 12, 0) == 1
    ended = [tokens[-1] == "" for _, tokens in seen]
    assert len(seen) == 64 and 25 < sum(ended) < 45 and {p for p, _ in seen} == {*"pq"}
    assert {len(t) for _, t in seen} >= {*range(1, 12)} and all("" not in t[:-1] for _, t in seen)


# --- LaRe: the decoder ----------------------------------------------------------------------------


def decoder(factors, world=True, **fit):
    """A Decoder of a function's factors, as a run makes it."""
    fit = dict(factors="", layers=5, updates=50, decoder_lr=5e-4) | fit
    shaping = SimpleNamespace(keywords=fit)
    ppo.factor_code.cache_clear()
    return ppo.Decoder(SimpleNamespace(seed=0, device="cpu"), SimpleNamespace(shaping=shaping),
                       SimpleNamespace(name="toyif" if world else factors), [dict(prompt="<Fc=")],
                       tokenizer(), 12)


def episodes(n, seed, K=7):
    """Random factors, masks of different lengths, and the score of a linear gold."""
    g = torch.Generator().manual_seed(seed)
    mask = (torch.arange(6) < torch.randint(1, 7, (n, 1), generator=g)).float()
    phi = torch.randn(n, 6, K, generator=g) * mask[..., None]
    w = torch.linspace(-1, 1, K)
    return phi, mask, (phi @ w).sum(1) + 0.3 * mask.sum(1), w


def test_a_linear_decoder_recovers_a_linear_gold():
    """weights -1 … 1 and .3 a token, from sums alone; lare_r2 is of episodes not yet seen"""
    one = decoder("", layers=1, updates=150, decoder_lr=0.03)
    assert one.tell() is None
    phi, mask, score, w = episodes(300, 0)
    first = one.note(phi, mask, score)
    assert "lare_r2" not in first and one.tell() is one.net
    unseen = episodes(200, 1)[:3]
    with torch.no_grad():
        off = unseen[2] - ppo.step_rewards(one.net, *unseen[:2]).sum(1)
    second = one.note(*unseen)
    assert near(second["lare_r2"], 1 - off.square().sum() / unseen[2].var(correction=0) / 200)
    assert second["lare_r2"] > 0.95 and second["lare_loss"] < first["lare_loss"]
    last = one.note(*episodes(300, 2)[:3])
    assert last["lare_r2"] > 0.999
    assert close(one.net[0].weight.detach()[0].double(), w.double(), 0.02)
    assert close(one.net[0].bias.item(), 0.3, 0.02)


def test_a_decoder_keeps_the_last_2000_episodes_and_its_state(workdir):
    """and of a masked token nothing"""
    one, other = decoder("", updates=2), decoder("", updates=2)
    assert [x.weight.shape for x in one.net if hasattr(x, "weight")] == [
        (64, 7), (64, 64), (64, 64), (64, 64), (1, 64)]
    assert all(torch.equal(a, b) for a, b in zip(one.net.parameters(), other.net.parameters()))
    for seed in range(3):
        phi, mask, score, _ = episodes(900, seed)
        one.note(phi + 9 * (1 - mask[..., None]), mask, score)
    assert len(one.episodes) == 2000 and near(T([u for _, u in one.episodes[-900:]]), score)
    assert all(torch.equal(x, p[m > 0]) for (x, _), p, m in zip(one.episodes[-900:], phi, mask))
    torch.save(one.state(), "decoder.pt")
    other.load(torch.load("decoder.pt", weights_only=True))
    a, b = (x.note(*episodes(50, 9)[:3]) for x in (one, other))
    assert {k: float(x) for k, x in a.items()} == {k: float(x) for k, x in b.items()}
    assert all(torch.equal(a, b) for a, b in zip(one.net.parameters(), other.net.parameters()))


def test_lare_puts_step_rewards_in_the_score_s_place():
    """f(φ) = 2 φ: without a decoder the score is on the last token; with one it is nowhere"""
    logp, ref, mask = T([[-1., -2, 0]]), T([[-1.5, -1, 0]]), T([[1., 1, 0]])
    phi, unit = T([[[1.], [3.], [5.]]]), T([7.])
    plain = ppo.lare(unit, logp, ref, mask, 0.5, phi, None, beta=0.2)
    assert close(plain, [[-.05, .1 + 7, 0]])
    double = torch.nn.Linear(1, 1)
    torch.nn.init.constant_(double.weight, 2.0)
    torch.nn.init.zeros_(double.bias)
    dense = ppo.lare(unit, logp, ref, mask, 0.5, phi, double, beta=0.2)
    assert close(dense, [[2 - .05, 6 + .1, 0]]) and not dense.requires_grad


def test_lare_rewards_tokens_by_what_earlier_rollouts_taught(two_models, workdir, monkeypatch):
    """factors of each token of each row, by the definition; step 1 has the score on the last
    token, step 2 the decoder that was fitted to step 1's scores, in their unit"""
    calls = catch(monkeypatch, ppo, "SHAPINGS", "rolled", "calibrate",
                  see=lambda _, x: weights_at(x))
    small("lare", two_models[1], "run", "--updates", "3", "--beta", "0.1", "--no_eos", "-1.0")
    scale, tok = calls["calibrate"][0].out, load("run")[1]
    rolls = [x.out for x in calls["rolled"] if x.known["training"]]
    first, second = calls["lare"]
    memory = decoder("", updates=3)
    memory.g.manual_seed(3)                                        # the run's seed
    with torch.random.fork_rng([]):
        torch.manual_seed(3)
        for layer in memory.net:
            if hasattr(layer, "reset_parameters"):
                layer.reset_parameters()
    for x, known in zip((first, second), rolls, strict=True):
        roll = known["roll"]
        for b, (ids, done) in enumerate(zip(roll.completions(), roll.finished.tolist())):
            tokens = [tok.decode([i], False) for i in ids] + [""] * done
            rows = ppo.toyif_factors(known["problems"][b // 2]["prompt"], tokens)
            assert near(x.phi[b][roll.mask[b] > 0], T(rows).float())
            assert not x.phi[b][roll.mask[b] == 0].any()
        score = torch.where(roll.finished, known["quality"], -1.0)
        assert near(x.unit, (score - scale["mean"]) / scale["std"])
        wanted = ppo.token_rewards(x.unit * (x is first), roll.logp, x.ref_logp, roll.mask,
                                   1 / scale["std"], beta=0.1)
        if x is second:
            assert all(near(a, b) for a, b in zip(x.decoder.parameters(), memory.net.parameters()))
            with torch.no_grad():
                wanted = wanted + memory.net(x.phi).squeeze(-1) * roll.mask
        assert near(x.out, wanted) and (x.decoder is None) == (x is first)
        memory.note(x.phi, roll.mask, x.unit)
    log = [row for row in read_log("run") if "loss" in row]
    assert "lare_r2" not in log[0] and {"lare_r2", "lare_loss"} <= log[1].keys()


@pytest.mark.parametrize("extra, words", [
    (["--data", "arithmetic", "--shaping", "lare"], "say with --factors PATH.py:FUNCTION what"),
    (["--shaping", "lare", "--factors", "nowhere.py:f"], "--factors nowhere.py:f: give PATH"),
    (["--reward", "majority", "--samples", "1"], "take at least two"),
    (["--reward", "label", "--data", "toyif"], r"\d+ different labels in 4096 rows"),
    (["--surrogate", "pairs", "--samples", "3"], "compares 2 responses of a prompt")])
def test_what_does_not_go_together_is_told(extra, words, two_models, workdir):
    with pytest.raises(UserError, match=words):
        small("ppo", two_models[1], "bad", *extra)


def weights(folder):
    """All that a run saved."""
    critic = load(checkpoint(folder) / "critic")[0].state_dict()
    return load(folder)[0].state_dict() | {f"critic.{k}": v for k, v in critic.items()}


def test_resume_is_exact(two_models, workdir):
    """3 steps = 2 + --resume + 1, bit for bit, with what the memory holds"""
    extra = ["--steps", "3", "--save_every", "2", "--updates", "3"]
    small("lare", two_models[1], "whole", *extra)
    small("lare", two_models[1], "half", *extra, "--stop", "2")
    small("lare", two_models[1], "half", *extra, "--resume")
    a, b = weights("whole"), weights("half")
    assert all(torch.equal(a[k], b[k]) for k in a)
    logs = [[{k: x for k, x in row.items() if k[:2] != "t_" and k != "time"}
             for row in read_log(name)] for name in ("whole", "half")]
    assert logs[0] == logs[1]


# --- PPO on classes -------------------------------------------------------------------------------


def test_a_label_is_right_wrong_or_none():
    """the classes are those of the training rows; what does not end names none"""
    tok, pool = tokenizer(), [dict(answer=" + "), dict(answer="-"), dict(answer="-")]
    roll = responses(["+", "-", "-", "a", "+-", "-!", ""], tok)
    task = SimpleNamespace(demo=lambda problem: problem["answer"])
    quality = T([1., 0, 1, 0, 0, 0, 0])
    value = ppo.class_label(quality, roll, pool, task, tok)
    assert value.tolist() == [1, -1, 1, -3, -3, -3, -3]
    value = ppo.class_label(quality, roll, pool, task, tok, right=2.0, wrong=0.5, unknown=0.0)
    assert value.tolist() == [2, 0.5, 2, 0, 0, 0, 0]


def test_classify_trains_adapters_on_labels(two_models, workdir, monkeypatch):
    """the reward of every rollout by the rows' own answers; the base stays as it was. The model
    says + and - more often than a random one"""
    (net, tok), init = load(two_models[1]), "labels"
    some = ppo.tasks.task("toyif_obeys").problems("train", 40, 0)
    with torch.no_grad():
        usual = torch.stack([net(T([tok.prompt(p)]))[0, -1] for p in some]).mean(0)      # [D]
        for word, size in zip([*tok.encode("+-"), tok.eos], (1.0, 0.99, 0.95)):
            net.embed_tokens.weight[word] = size * usual / usual.norm()
    save(net, tok, init)
    calls, hits = catch(monkeypatch, ppo, "REWARDS", "rolled"), Counter()
    out = small("classify", init, "run", "--max_new", "3")
    for x, found in zip(calls["label"], calls["rolled"], strict=True):
        n = len(x.out) // len(found.problems)
        done = found.roll.finished.tolist()
        for i, ids in enumerate(found.roll.completions()):
            text, answer = tok.decode(ids), found.problems[i // n]["answer"]
            right = done[i] and text == answer
            worth = 1 if right else -1 if done[i] and text in ("+", "-") else -3
            assert x.out[i] == worth and x.quality[i] == right
            hits[worth] += 1
    assert min(hits[x] for x in (1, -1, -3)) > 1
    assert {"val_accuracy", "val_reward", "sft_val_accuracy"} <= out.keys()
    a, b = load(init)[0].state_dict(), load("run")[0].state_dict()
    moved = {k for k in a if not torch.equal(a[k], b[k])}
    assert moved and not any("embed" in k or "norm" in k for k in moved)


def test_a_file_of_labelled_rows_is_a_question_of_classes(two_models, workdir):
    """prompt and completion, or a column "answer"; without --answer whole it is refused"""
    rows = [dict(prompt=f"<F{x}=" + "A" * (i // 12), completion="+-"[i % 2])
            for i, x in enumerate("abcdefghijkl" * 3)]
    Path("rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    small_file = ["--data", "rows.jsonl", "--max_new", "0"]
    out = small("classify", two_models[1], "run", *small_file, "--answer", "whole")
    assert 0 <= out["val_accuracy"] <= 1 and out["val_length"] <= 2
    with pytest.raises(UserError, match="2 different labels in .*--answer whole"):
        small("classify", two_models[1], "mark", *small_file)
    rows = [row | dict(completion="+") for row in rows]
    Path("one.jsonl").write_text("\n".join(map(json.dumps, rows)))
    with pytest.raises(UserError, match="1 different labels"):
        small("classify", two_models[1], "one", "--data", "one.jsonl", "--answer", "whole")


# --- --analysis -----------------------------------------------------------------------------------


def by_enumeration(score, gold, n):
    """What best of n of eight samples comes to, over all draws, and the tilt of its KL; means."""
    found = []
    for s, g in zip(score, gold):
        q = torch.zeros(8, dtype=torch.float64)
        for draw in itertools.product(range(8), repeat=n):
            winners = [i for i in draw if s[i] == s[list(draw)].max()]
            for i in winners:
                q[i] += 1 / 8 ** n / len(winners)
        law = ppo.tilt_at_kl(s, torch.full((8,), 1 / 8), ppo.kl_of(q, T(1 / 8)).item())[1]
        found.append([torch.xlogy(q, 8 * q).sum(), q @ s, law @ s, q @ g, law @ g])
    names = "kl", "best", "optimum", "gold_best", "gold_optimum"
    return dict(zip(names, D(*found).mean(0).tolist()))


def test_an_analysis_reads_runs_and_samples_the_first_one_s_model(two_models, workdir,
                                                                  monkeypatch, capsys):
    """by the run's own reward and EOS rule, of its held-out prompts: best of n by enumeration of
    the samples, the optimum by its definition; and what the logs say"""
    init = two_models[1]
    small("sharpen_rl", init, "a", "--no_eos", "-30.0")
    idle(init, "b")
    monkeypatch.setattr(ppo, "rows_at_once", lambda c: 512)
    calls = catch(monkeypatch, ppo, "generate", "draw_analysis")
    out = ppo.main(["--analysis", "a", "b/", "--draws", "8", "--out", "both", "--eval_prompts",
                    "3"])
    ref, tok = load(init)
    drawn = calls["generate"][0]
    problems = ppo.tasks.task("toyif").problems("val", 3, 3)
    assert drawn.prompts == [tok.prompt(p) for p in problems] and drawn.samples == 8
    assert same(drawn.model, ref)
    roll, gold = drawn.out, []
    score = logp_of(ref, roll.tokens, roll.mask, 1.0).sum(1).detach()
    score = torch.where(roll.finished, score, -30.0).view(3, 8).double()
    for i, (ids, done) in enumerate(zip(roll.completions(), roll.finished.tolist())):
        gold.append(ppo.tasks.task("toyif").reward(problems[i // 8], tok.decode(ids), done))
    gold = T(gold).view(3, 8).double()
    for n in (2, 4):
        for key, x in by_enumeration(score, gold, n).items():
            assert close(out[f"{key}@{n}"], x, 1e-5), key
        assert out[f"formula@{n}"] == bon_kl(n) >= out[f"kl@{n}"]
        assert out[f"optimum@{n}"] >= out[f"best@{n}"]
    for name in ("a", "b"):
        assert {k: out[f"{name}|{k}"] for k in ppo.frontier(read_log(name))} == ppo.frontier(
            read_log(name))
    greedy = models.generate(ref, drawn.prompts, 6, temperature=0.0)
    for name, net in (("", ref), ("a|", load("a")[0])):
        best = logp_of(net, greedy.tokens, greedy.mask, 1.0).sum(1).exp().detach()
        assert close(out[f"{name}sharpened"], (best >= 0.5).float().mean())
        assert name or near(out["coverage"], (1 / best).mean())
    text = capsys.readouterr().out
    assert "best of n of the SFT model's samples" in text and "  a: best gold" in text
    assert "  b: no step was made" in text and "b|sharpened" not in out
    drawn = calls["draw_analysis"][0]
    assert drawn.ns == [2, 4] and [*drawn.logs] == ["a", "b"]
    assert (workdir / "both" / "analysis.png").exists()
    assert json.loads((workdir / "both" / "run.json").read_text())["result"] == out


def test_any_run_is_analysed_by_another_reward_too(two_models, workdir):
    """whose --config had options of its rows beside presets; runs of one world only, all runs"""
    init = two_models[1]
    idle(init, "one")
    small("rluf,lam=0.9,eos=ignore", init, "row", "--reward", "self")
    out = ppo.main(["--analysis", "row", "one", "--draws", "4", "--eval_prompts", "2", "--out",
                    "other", "--reward", "gold"])
    gold, best = out["gold_best@2"], out["best@2"]
    assert gold == pytest.approx(best)                               # the reward is gold now
    write = (workdir / "ring").mkdir() or (workdir / "ring/run.json").write_text
    write((workdir / "one/run.json").read_text().replace('"data": "toyif"', '"data": "ring"'))
    (workdir / "none").mkdir()
    for name, error in (("ring", "ring is a run on --data ring, row on toyif"),
                        ("none", "none/run.json does not exist")):
        with pytest.raises(UserError, match=error):
            ppo.main(["--analysis", "row", name, "--draws", "4", "--eval_prompts", "2"])


def same(a, b):
    """Two models' weights."""
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values()))


@pytest.mark.parametrize("words, error", [
    ([], "give the folders of one or more runs"),
    (["nowhere"], "nowhere/run.json does not exist: give the folder of a run of ppo.py"),
    (["other"], "other: that is a run of grpo.py"),
    (["other", "--draws", "3"], "must be at least 4")])
def test_an_analysis_names_what_it_cannot_read(words, error, workdir):
    (workdir / "other").mkdir()
    (workdir / "other" / "run.json").write_text('{"script": "grpo", "config": {}}')
    for argv in (["--analysis", *words], [f"--analysis={words[0]}", *words[1:]] if words else []):
        with pytest.raises(UserError, match=error):
            ppo.main(argv or ["--analysis"])


def test_a_fit_of_a_run_s_log():
    """gold less that of the iterations below d = .2; too few beyond it are no law"""
    d = torch.linspace(0, 2, 21, dtype=torch.float64)
    gold = 0.5 + torch.where(d > 0, d * (1.3 - .4 * d.clamp(min=1e-9).log()), 0.0)
    log = [dict(kl=x.item() ** 2, quality=g.item()) for x, g in zip(d, gold)]
    log[1] = dict(kl=.01, quality=0.5)
    found = ppo.fitted_curve(log)
    assert close(found[0], d) and close(found[1], gold - 0.5 - (d == 0.1) * (gold - 0.5), 1e-9)
    assert close(found[2:], [1.3, .4], 1e-6)
    assert ppo.fitted_curve(log[:4]) is None and ppo.fitted_curve([]) is None
    assert ppo.fitted_curve([dict(kl=-.2, quality=1.)]) is None
