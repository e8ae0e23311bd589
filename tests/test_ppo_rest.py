"""ppo.py's sharpening, LaRe, PPO on classes and asymptotics: worked values, limits, invariances;
then what reaches each function in the script's own runs."""
import itertools
import math
from types import SimpleNamespace

import pytest
import torch
from conftest import close

import ppo
from data.prefs import ring_tokenizer, tokenizer
from data.run import UserError
from data.stats import bon_kl
from model import Rollout

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


def softmax_optimum(gradient, start, rate=0.5, steps=4000):
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
    for _ in range(1000):
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
    assert ppo.sharpened(best, 0.5, 0.1) and not ppo.sharpened(best, 0.4, 0.1)
    assert ppo.sharpened(best, 0.25, 0.5) and not ppo.sharpened(best, 0.2, 0.5)
    assert ppo.coverage(D(.5, .25)) == 3.0


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
    assert ppo.gao_peak(-1, .1, "bon") == (0, 0)


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
    """of the rows of training: those within a quarter of 2 nats are 1.6 and 2.4, whose gold is 4
    and 6; nobody is near 8: the nearest, 3, stands there and says so"""
    log = [dict(step=0, val_kl=0., val_gold=1.)]
    log += [dict(step=i + 1, kl=k, quality=g) for i, (k, g) in enumerate(
        [(0., 1.), (1.6, 4.), (2.4, 6.), (3., 2.), (2.9, 0.)])]
    found = ppo.frontier(log, bins=(2, 8), window=2)
    assert found == {"gold@2": 5.0, "kl@2": 2.0, "gold@8": 2.0, "kl@8": 3.0, "best_gold": 5.0}
    assert ppo.frontier(log[:1]) == {}
    assert ppo.frontier(log)["best_gold"] == pytest.approx(13 / 5)
    assert list(ppo.frontier(log))[:4] == ["gold@0.5", "kl@0.5", "gold@1", "kl@1"]
