"""ppo.py: every equation by hand, its limits and invariances; then whole runs."""
import json
import math
import os
from functools import partial

import pytest
import torch
from conftest import merged

import ppo
import sft
from data.run import UserError, check_first_ratio, checkpoint, claims_of, configure, read_log
from model import ScalarModel, load, masked_mean, masked_whiten, save
from ppo import (adaptive, best_of_group, coherent, eos_ignore, eos_replace, eos_subtract,
                 explained_variance, fixed, gae, k1, k2_loss, k3, k3_loss, learned, likelihood,
                 no_regulariser, ppo_clip, token_rewards, value_loss, weighted_nll, whitened_gae)

T = torch.tensor


def close(a, b, tol=1e-6):
    a, b = (torch.as_tensor(x, dtype=torch.float64) for x in (a, b))
    return torch.allclose(a, b, atol=tol)


# --- Self-Rewarding PPO by hand: three tokens, p_sft = (.5 .4 .8), p_base = (.25 .5 .2) -----------

SFT, BASE, OLD = (T([p]).log() for p in ([.5, .4, .8], [.25, .5, .2], [.6, .5, .8]))
ONES = torch.ones(1, 3)


def test_coherent_reward_by_hand():
    """.693147 - .223144 + 1.386294 = log(.16 / .025)"""
    assert close(coherent(SFT, BASE, ONES), [1.856298]) and close([math.log(.16 / .025)],
                                                                  [1.856298])
    assert close(coherent(SFT, BASE, ONES, per_token=True), [1.856298 / 3])
    assert close(coherent(SFT, BASE, T([[1., 1, 0]]), per_token=True), [.470004 / 2])
    assert close(likelihood(SFT, ONES), [math.log(.16)])


def test_coherent_reward_identities():
    assert coherent(SFT, SFT, ONES).item() == 0                             # SFT that moved nothing
    assert coherent(SFT, BASE, ONES).item() == -coherent(BASE, SFT, ONES).item()
    assert not close(coherent(SFT, BASE, T([[1., 1, 0]])),
                     coherent(SFT, BASE, ONES))                                # the EOS term counts
    wild = SFT.clone()
    wild[0, 0] = 99.0
    assert close(coherent(wild, BASE, T([[0., 1, 1]])), coherent(SFT, BASE, T([[0., 1, 1]])))


def test_token_rewards_by_hand():
    """beta .1 against ref = sft: k1 = (.182322 .223144 0), the score on the last token"""
    r = token_rewards(T([1.856298]), OLD, SFT, ONES, 1.0, beta=0.1)
    assert close(r, [[-.018232, -.022314, 1.856298]])
    short = token_rewards(T([1.0]), OLD, SFT, T([[1., 1, 0]]), 2.0, beta=0.1)
    assert close(short, [[-.036464, 1 - .044629, 0]])
    two = token_rewards(T([5.0, 7.0]), torch.zeros(2, 3), torch.zeros(2, 3),
                        T([[0., 1, 0], [1, 1, 1]]), 1.0)
    assert two.tolist() == [[0, 5, 0], [0, 0, 7]]


def test_gae_by_hand():
    r, v = T([[-.018232, -.022314, 1.856298]]), T([[1.0, 1.5, 1.2]])
    adv, returns = gae(r, v, ONES, lam=0.95)
    assert close(adv, [[.767878, .301169, .656298]], 2e-6)
    assert close(returns, [[1.767878, 1.801169, 1.856298]], 2e-6)
    assert close(masked_whiten(adv, ONES), [[.968692, -1.376661, .407969]], 1e-5)
    assert close(gae(r, v, ONES, lam=1.0)[0], [[.815752, .333984, .656298]], 2e-6)


# --- the bandit: base (.5 .3 .2), sft (.2 .3 .5) --------------------------------------------------

PB, PS = T([.5, .3, .2], dtype=torch.float64), T([.2, .3, .5], dtype=torch.float64)


def policy_gradient(p, ref, beta):
    """The exact expected REINFORCE gradient in the logits, from ppo.py's own rewards for every
    action."""
    score = coherent(PS.log()[:, None], PB.log()[:, None],
                     torch.ones(3, 1, dtype=torch.float64))                                    # [3]
    r = token_rewards(score, p.log()[:, None], ref.log()[:, None], torch.ones(3, 1), 1.0,
                      beta=beta)[:, 0]
    return p * (r - (p * r).sum())


@pytest.mark.parametrize("ref, beta, optimum", [
    (PB, 1.0, [.2, .3, .5]),  # reference = base, beta 1: SFT is the fixed point
    (PB, 0.5, [.049080, .184049, .766871]), (PS, 1.0, [.049080, .184049, .766871]),
    (PS, 2.0, [.103932, .246496, .649573]), (PS, 1e9, [.2, .3, .5])])
def test_where_self_rewarding_ppo_is_stationary(ref, beta, optimum):
    """π* ~ ref (π_sft / π_base)^(1/β): no gradient there, and the formula gives the numbers"""
    star = ref * (PS / PB) ** (1 / beta)
    star = star / star.sum()
    assert close(star, optimum) and policy_gradient(star, ref, beta).abs().max() < 1e-7 * max(1,
                                                                                              beta)
    assert policy_gradient(torch.softmax(star.log() + T([.1, 0, 0]), 0), ref,
                           beta).abs().max() > 1e-3


def test_mean_coherent_reward_is_a_kl():
    r = (PS / PB).log()
    assert close((PS * r).sum(), .274887) and close((PB * r).sum(), -.274887)


# --- PPO by hand ----------------------------------------------------------------------------------

M = T([[1., 1, 1, 0], [1, 1, 1, 1]])
OLD2, REF2 = T([[-1., -.5, -2, 0], [-.7, -1.2, -.3, -.9]]), T([[-1.2, -.5, -1.5, 0],
                                                               [-.6, -1.0, -.8, -.9]])
V2 = T([[.2, .3, .5, 0], [.1, 0, -.2, -.4]])


def rollout():
    score = eos_subtract(T([1.0, 0.4]), T([True, False]), no_eos=1.0)
    return token_rewards(score, OLD2, REF2, M, 1.0, beta=0.05)


def test_ppo_rewards_and_advantages_by_hand():
    r = rollout()
    assert close(r, [[-.01, 0, 1.025, 0], [.005, .01, -.025, -.6]])
    adv, returns = gae(r, V2, M)
    assert close(adv, [[.753812, .698750, .525, 0], [-.650037, -.584250, -.415, -.2]], 2e-6)
    assert close(returns, [[.953812, .998750, 1.025, 0], [-.550037, -.584250, -.615, -.6]], 2e-6)
    white, same = whitened_gae(r, V2, M)
    assert close(white, [[1.281462, 1.185525, .882795, 0],
                         [-1.164508, -1.049885, -.754995, -.380394]], 1e-5)
    assert close(same, returns)                                         # returns are never whitened
    assert close(masked_whiten(r, M, shift=False),
                 [[-.094528, -.072071, 2.229749, 0], [-.060843, -.049615, -.128213, -1.419478]],
                 1e-5)


def test_rewards_are_rescaled_before_the_advantages_if_asked():
    """and discount and lambda each go where they belong"""
    r = masked_whiten(rollout(), M, shift=False)
    adv, returns = whitened_gae(rollout(), V2, M, gamma=0.9, lam=0.7, whiten_rewards=True)
    want = gae(r, V2, M, 0.9, 0.7)
    assert close(adv, masked_whiten(want[0], M)) and close(returns, want[1])


def test_a_reward_model_s_score_is_bounded_if_asked():
    assert learned(T([-3., .5, 2.])).tolist() == [-3, .5, 2]
    assert learned(T([-3., .5, 2.]), clamp=1.0).tolist() == [-1, .5, 1]


def test_a_wild_ratio_is_capped():
    assert close(ppo_clip(T([[90.]]), T([[0.]]), T([[-1.]]), cap=2.0), [[math.exp(2)]], 1e-5)


def test_ppo_losses_by_hand():
    adv, returns = whitened_gae(rollout(), V2, M)
    logp = OLD2 + T([[.1, -.3, .25, 0], [.05, -.1, .3, -.02]])
    assert close(masked_mean(ppo_clip(logp, OLD2, adv), M), 0.030334, 2e-6)
    v = V2 + T([[.3, -.1, .1, 0], [0, -.25, .1, .5]])
    assert close(masked_mean(value_loss(v, V2, returns), M), 0.175054, 2e-6)
    assert close(0.030334 + 0.1 * 0.175054, 0.047840, 1e-6)


def test_kl_estimators_by_hand():
    whole = partial(k2_loss, kl_coef=1.0)
    sums = [((f(OLD2, REF2)) * M).sum(1) for f in (k1, whole, k3)]
    assert close(sums[0], [-.3, .2])
    assert close(sums[1], [.145, .15])
    assert close(sums[2], [.167452, .133104])
    assert all(f(OLD2, OLD2).abs().sum() == 0 for f in (k1, whole, k3))
    assert (whole(OLD2, REF2) >= 0).all() and (k3(OLD2, REF2) >= 0).all()
    assert close(k3_loss(OLD2, REF2, kl_coef=0.3), 0.3 * k3(OLD2, REF2))


@pytest.mark.parametrize("loss, other", [(k2_loss, False), (k3_loss, True)])
def test_what_a_kl_loss_differentiates(loss, other):
    """θ = (.3 -.2 .5), π_ref = (.5 .3 .2): k2's gradient is that of KL(π||ref), k3's of
    KL(ref||π)."""
    theta = T([.3, -.2, .5], dtype=torch.float64, requires_grad=True)
    ref = T([.5, .3, .2], dtype=torch.float64)
    logp = torch.log_softmax(theta, 0)
    sampled = (logp.exp().detach()
               * loss(logp, ref.log(), kl_coef=1.0)).sum()
    got, = torch.autograd.grad(sampled, theta, retain_graph=True)
    kl = (ref * (ref.log() - logp)).sum() if other else (logp.exp() * (logp - ref.log())).sum()
    want, = torch.autograd.grad(kl, theta)
    assert close(got, want, 1e-12)
    if other:
        assert close(got, [-0.146385, -0.085522, 0.231906])


def test_the_regulariser_is_off_by_default():
    assert no_regulariser(OLD2).abs().sum() == 0


def test_adaptive_beta_by_hand():
    """beta .2, KL 9, target 6, 64 of 10000: .2 (1 + .2·.0064) = .200256"""
    assert 0.2 * adaptive(1.0, 9.0, 64, target=6.0) == pytest.approx(.200256)
    assert adaptive(1.0, 3.0, 64, target=6.0) == pytest.approx(1 - .2 * .0064)
    assert adaptive(1.0, 6.3, 64, target=6.0) == pytest.approx(1 + .05 * .0064)
    assert fixed(0.7) == 0.7


def test_eos_rules():
    s, done = T([2.0, 3.0]), T([True, False])
    assert eos_replace(s, done).tolist() == [2, -5] and eos_replace(s, done,
                                                                    no_eos=-1.0).tolist() == [2, -1]
    assert eos_subtract(s, done,
                        no_eos=4.0).tolist() == [2, -1] and eos_ignore(s, done).tolist() == [2, 3]


def random_rollout(seed, rows=5, width=7):
    """Rows of every kind: all ones, length one, prompts of different lengths."""
    g = torch.Generator().manual_seed(seed)
    mask = torch.zeros(rows, width)
    for b, (start, end) in enumerate([(0, width), (3, 4), (2, 6), (1, width), (5, 6)][:rows]):
        mask[b, start:end] = 1
    return [torch.randn(rows, width, generator=g) * (mask if i < 2 else 1)
            for i in range(4)] + [mask]


@pytest.mark.parametrize("seed", range(3))
def test_gae_limits(seed):
    rewards, values, *_, mask = random_rollout(seed)
    adv, _ = gae(rewards, values, mask, 1.0, 1.0)
    to_go = rewards.flip(1).cumsum(1).flip(1)  # lam = 1: A + V = sum of rewards to come
    assert torch.allclose((adv + values) * mask, to_go * mask, atol=1e-5)
    after = torch.cat([values[:, 1:] * mask[:, 1:], torch.zeros(5, 1)], 1)
    delta = (rewards + after - values) * mask
    assert torch.allclose(gae(rewards, values, mask, 1.0, 0.0)[0], delta, atol=1e-6)
    c = 2.5  # a constant score adds c (γλ)^(last - t)
    last = mask * (mask.cumsum(1) == mask.sum(1, keepdim=True))
    left = (mask.sum(1, keepdim=True) - mask.cumsum(1)) * mask
    more = gae(rewards + c * last, values, mask, 0.9, 0.8)[0] - gae(rewards, values, mask, 0.9,
                                                                    0.8)[0]
    assert torch.allclose(more, c * 0.72 ** left * mask, atol=1e-5)


def test_a_perfect_critic_leaves_no_advantage():
    mask = torch.ones(2, 4)
    rewards = token_rewards(T([3.0, 3.0]), mask, mask, mask, 1.0)
    assert gae(rewards, torch.full((2, 4), 3.0), mask)[0].abs().max() < 1e-6


@pytest.mark.parametrize("seed", range(3))
def test_what_is_masked_changes_nothing(seed):
    """Values outside the mask, and doubled padding, change neither the losses nor their
    gradients."""
    rewards, values, old, new, mask = random_rollout(seed)

    def losses(rewards, values, old, new, mask):
        new = new.clone().requires_grad_()
        adv, returns = whitened_gae(rewards, values, mask)
        loss = masked_mean(ppo_clip(new, old, adv) + value_loss(new, values, returns), mask)
        return loss.detach(), torch.autograd.grad(loss, new)[0] * mask

    base = losses(rewards, values, old, new, mask)
    noisy = losses(*(x + 5 * torch.randn(x.shape) * (1 - mask)
                     for x in (rewards, values, old, new)), mask)
    wide = losses(*(torch.cat([x, torch.zeros_like(x)], 1)
                    for x in (rewards, values, old, new, mask)))
    assert torch.allclose(base[0], noisy[0], atol=1e-5) and torch.allclose(base[1], noisy[1],
                                                                           atol=1e-5)
    assert torch.allclose(base[0], wide[0], atol=1e-5) and torch.allclose(base[1], wide[1][:, :7],
                                                                          atol=1e-5)


def test_at_ratio_one_ppo_is_reinforce():
    *_, old, _, mask = random_rollout(0)
    adv = torch.randn(old.shape)
    grads = []
    for loss in (ppo_clip, weighted_nll):
        new = old.clone().requires_grad_()
        grads.append(torch.autograd.grad(loss(new, old, adv).sum(), new)[0])
    assert torch.allclose(*grads, atol=1e-6)
    assert close(masked_mean(ppo_clip(old, old, adv), mask), -masked_mean(adv, mask))


@pytest.mark.parametrize("adv, shift, moves",
                         [(1, .3, False), (1, -.3, True), (1, .1, True), (-1, .3, True),
                                               (-1, -.3, False)])
def test_the_clip_stops_the_gradient_where_it_should(adv, shift, moves):
    new = T([[shift]], requires_grad=True)
    grad, = torch.autograd.grad(ppo_clip(new, torch.zeros(1, 1), T([[float(adv)]])).sum(), new)
    assert (grad.item() != 0) == moves


def test_value_loss_without_clip_is_the_squared_error():
    assert close(value_loss(T([[3.0]]), T([[0.0]]), T([[1.0]]), eps_v=0.0), [[2.0]])
    assert close(value_loss(T([[.9]]), T([[0.0]]), T([[1.0]])),
                 [[.5 * .8 ** 2]])                                          # V at .9, clipped to .2


def test_best_of_group():
    adv, returns = best_of_group(T([1.0, 3.0, 2.0, -1.0, -5.0, -2.0]), torch.ones(6, 2), 3)
    assert adv.tolist() == [[0, 0], [1, 1], [0, 0], [1, 1], [0, 0], [0, 0]] and returns is None


def test_explained_variance():
    r, mask = T([[1., 2, 3]]), torch.ones(1, 3)
    assert explained_variance(r, r, mask) == 1 and explained_variance(torch.zeros(1, 3), r,
                                                                      mask) == 0
    assert close(explained_variance(r / 2, r, mask), 0.75)


def test_rank_correlation_by_hand():
    """(1 2 3) against (10 30 20): 1 - 6·2 / (3·8) = .5; a tie, (1 1 2) against (1 2 3): .866025"""
    assert ppo.rank_correlation(T([[1., 2, 3]]), T([[10., 30, 20]])) == pytest.approx(0.5)
    assert ppo.rank_correlation(T([[1., 1, 2]]), T([[1., 2, 3]])) == pytest.approx(0.866025,
                                                                                   abs=1e-6)
    assert ppo.rank_correlation(T([[1., 2, 3], [5., 5, 5]]),
                                T([[3., 2, 1], [1., 2, 3]])) == pytest.approx(-1)
    assert ppo.rank_correlation(T([[5., 5]]), T([[1., 2]])) == 0.0


def test_a_sampler_that_is_not_the_policy_is_caught():
    check_first_ratio(dict(worst=1e-5, off=1e-6), "float32")
    check_first_ratio(dict(worst=0.3, off=0.01), "bfloat16")
    for told, dtype in ((dict(worst=0.01, off=1e-4), "float32"),
                        (dict(worst=0.3, off=0.05), "bfloat16")):
        with pytest.raises(UserError, match="the sampler is not the policy"):
            check_first_ratio(told, dtype)


# --- whole runs -----------------------------------------------------------------------------------

TINY = ["--steps", "2", "--rollouts", "8", "--batch", "8", "--micro", "8", "--eval_every", "2",
        "--save_every", "99"]


def toy(config, out, *extra):
    return ppo.main(merged("--config", f"toyif,{config},tiny", *TINY, "--max_new", "0", "--out",
                           out, *extra))


def test_a_world_s_base_takes_further_keys(shared_bases):
    """an arm of the claim: SFT on few demonstrations"""
    out = toy("sft,init=base:toyif+rows=64", "few", "--steps", "0")
    assert {"val_gold", "ood_gold", "ood_reward", "ood_kl", "sft_ood_gold"} <= out.keys()
    assert all(math.isfinite(v) for v in out.values())


@pytest.mark.curve
def test_the_default_chain_runs_on_real_docstrings(shared_bases):
    out = ppo.main(["--config", "docs,tiny", "--out", "docs"])
    log = read_log("docs")
    keys = {"reward", "kl", "k3", "entropy", "ev", "truncated", "flat", "length", "quality",
            "t_gen"}
    assert keys <= next(r for r in log if r["step"] == 4 and "reward" in r).keys()
    assert {"val_reward", "ood_reward", "val_rouge_l", "ood_rouge_l"} <= out.keys()
    assert os.path.exists("docs/curve.png") and load("docs")[0]
    assert isinstance(load(checkpoint("docs") / "critic")[0], ScalarModel)


def test_ppo_raises_its_reward(shared_bases):
    """Against the gold reward, from a base that has seen the toy world for 300 steps."""
    path = sft.base("toyif_base", steps=300, rows=3000, eval_every=1000, model="1x64")
    out = ppo.main(["--config", "toyif,ppo", "--init", str(path), "--out", "up", "--steps", "60",
                    "--rollouts", "64", "--lr", "5e-4", "--critic_lr", "2e-3", "--eval_every",
                    "60"])
    assert out["val_gold"] > out["sft_val_gold"] + 0.05
    log = [r for r in read_log("up") if "reward" in r]
    assert log[-1]["ev"] > 0.1 > abs(log[0]["ev"])


def test_a_run_resumed_after_its_end_keeps_its_result(shared_bases):
    first = toy("srppo", "ended")
    again = toy("srppo", "ended", "--resume")
    assert again == first == json.loads(open("ended/run.json").read())["result"]


def test_sft_equal_to_base_pays_nothing(shared_bases):
    """A whole run whose SFT model is the base: before the first step the coherent reward is exactly
    0, and its unit is 1, not its spread."""
    path = str(sft.base("toyif_base", like="tiny"))
    out = toy("docs", "same", "--init", path, "--base", path, "--eos", "ignore")
    assert out["sft_val_reward"] == out["sft_ood_reward"] == 0.0


def test_a_minibatch_that_runs_away_is_skipped(shared_bases, monkeypatch):
    """a mean ratio of 1 is beyond a limit of 0.9: no weight moves, and the log counts them"""
    monkeypatch.setattr(ppo, "MAX_RATIO", 0.9)
    path = str(sft.base("toyif", like="tiny"))
    toy("srppo", "away", "--init", path)
    first, now = load(path)[0].state_dict(), load("away")[0].state_dict()
    assert all(torch.equal(first[k], now[k]) for k in first)
    assert [r["skipped"] for r in read_log("away") if "loss" in r] == [4, 4]


def test_a_sampler_that_is_not_the_policy_stops_the_run(shared_bases, monkeypatch, capsys):
    """and one that never ends is told before"""
    plain = ppo.generate

    def other(*args, **kw):
        roll = plain(*args, **kw)
        return roll._replace(logp=roll.logp * 1.1, finished=torch.zeros_like(roll.finished))

    monkeypatch.setattr(ppo, "generate", other)
    with pytest.raises(UserError, match="the sampler is not the policy"):
        toy("srppo", "other")
    assert "every SFT sample is cut off at 12 tokens" in capsys.readouterr().out


@pytest.mark.gpu
def test_the_chain_runs_on_cuda(shared_bases):
    out = ppo.main(["--config", "docs,tiny", "--out", "cuda", "--device", "cuda"])
    assert math.isfinite(out["val_reward"]) and len([r for r in read_log("cuda")
                                                     if "reward" in r]) == 4


def test_bfloat16_sampling_is_the_policy_too(shared_bases):
    toy("srppo", "half-precision", "--dtype", "bfloat16")
    assert len([r for r in read_log("half-precision") if "reward" in r]) == 2


def weights(folder):
    own = checkpoint(folder) / "critic"                     # where the advantages read values
    critic = load(own)[0].state_dict() if own.exists() else {}
    return load(folder)[0].state_dict() | {f"critic.{k}": v for k, v in critic.items()}


@pytest.mark.parametrize("config", ["srppo", "raft"])
def test_resume_is_exact(config, shared_bases):
    """4 steps = 2 + --resume + 2, bit for bit, the critic too; raft by a reward model that is
    centred"""
    args = ["--steps", "4", "--save_every", "2"]
    if config == "srppo":
        args += ["--controller", "adaptive", "--target", "1.0"]
    if config == "raft":
        torch.manual_seed(0)
        policy, tok = load(sft.base("toyif_base", like="tiny"))
        save(ScalarModel.from_lm(policy, std=0.3), tok, "rm")
        args += ["--reward", "rm"]
    toy(config, f"whole-{config}", *args)
    toy(config, f"half-{config}", *args, "--stop", "2")
    out = toy(config, f"half-{config}", *args, "--resume")
    a, b = weights(f"whole-{config}"), weights(f"half-{config}")
    assert all(torch.equal(a[k], b[k]) for k in a)
    assert out == json.loads(open(f"whole-{config}/run.json").read())["result"]


def test_micro_does_not_change_the_result(shared_bases):
    for name, micro in (("m8", "8"), ("m3", "3")):
        toy("srppo", name, "--micro", micro)
    a, b = weights("m8"), weights("m3")
    assert all(torch.allclose(a[k], b[k], atol=1e-4) for k in a)


def test_the_plain_kernels_give_the_same_losses(shared_bases):
    """--kernels torch, to rounding: sampling, scoring, policy and critic"""
    for name in ("auto", "torch"):
        toy("srppo", f"k-{name}", "--kernels", name)
    fast, plain = ([r for r in read_log(f"k-{name}") if "loss" in r] for name in ("auto", "torch"))
    for a, b in zip(fast, plain, strict=True):
        assert all(a[k] == pytest.approx(b[k], rel=1e-3, abs=1e-5)
                   for k in ("loss", "reward", "norm"))
        assert a["work"] <= 1


@pytest.mark.parametrize("argv, words", [
    (["--reward", "cohrent"], "no reward 'cohrent'; did you mean 'coherent'"),
    (["--init", "nowhere"], "nowhere does not exist"),
    (["--max_new", "384"], "does not fit the 384 tokens"),
    (["--alpha", "2"], "unknown key --alpha; it belongs to decode 'contrast'"),
    (["--horizon", "9"], "unknown key --horizon; it belongs to controller 'adaptive'"),
    (["--warmup", "9"], "--warmup: this run does not read it"),
    (["--reward", "gold", "--base", "x"], "--base: this run does not read it"),
    (["--advantage", "best", "--critic_lr", "1"], "--critic_lr: this run does not read it"),
    (["--advantage", "best", "--samples", "1"], "takes the best of at least two"),
    (["--steps", "0", "--lr", "1"], "--lr: this run does not read it"),
    (["--claim", "srpo"], "no claim 'srpo'; did you mean 'srppo'"),
    (["--claim", "srppo", "--seeds", "many"], "--seeds many: expected int"),
    (["--temperature", "0"], "--temperature 0: must be above 0"),
    (["--samples", "0"], "--samples 0: must be at least 1"),
])
def test_bad_input_is_named(argv, words, shared_bases):
    with pytest.raises(UserError, match=words):
        toy("srppo", f"bad-{len(words)}-{argv[-1]}", *argv)


@pytest.mark.parametrize("option, words",
                         [("--reward", "need a reward model .*, found a Transformer"),
                          ("--init", "need a language model, found a ScalarModel")])
def test_the_wrong_kind_of_model_is_named(option, words, shared_bases):
    policy, tok = load(sft.base("toyif_base", like="tiny"))
    save(policy if option == "--reward" else ScalarModel.from_lm(policy), tok, f"kind{option}")
    with pytest.raises(UserError, match=words):
        toy("srppo", f"kind-run{option}", option, f"kind{option}")


def test_models_with_different_tokenizers_are_refused(shared_bases):
    other = sft.base("arithmetic,tiny", steps=2, rows=32)
    with pytest.raises(UserError, match="have different tokenizers"):
        toy("srppo", "mixed", "--base", str(other))


def test_the_claim_compares_every_arm():
    claim = claims_of("ppo").CLAIMS["srppo"]
    assert len(claim.arms) == 24 and len(claim.tests) == 23
    assert all(set(w) <= set(claim.arms) and sum(w.values()) == 0 for w in claim.tests.values())
    for arm in claim.arms.values():
        c, f = configure(ppo.Config, ppo.PRESETS, ppo.AXES, "", ["--config", arm], ppo.readers)
        assert sft.find(c.init, c.config, make=False) == 64
    v = {t: "holds" for t in claim.tests}
    assert claim.conclude(v).startswith("holds (512 demonstrations), holds (64)")
    for test, verdict, words in [
            ("srppo - greedy, 64", "undecided", "holds (512 demonstrations), undecided (64)"),
            ("srppo - greedy, 64", "does not hold", "holds (512 demonstrations), sharpening only"),
            ("srppo - sft, 512", "does not hold", "does not hold (512"),
            ("srppo - sft_more, 512", "does not hold", "does not hold (512"),
            ("srppo - sft_more, 64", "undecided", "holds (512 demonstrations), undecided (64)")]:
        assert claim.conclude(v | {test: verdict}).startswith(words)


@pytest.mark.parametrize("extra", [["--steps", "5"], ["--seed", "3"], ["--config", "tiny"]])
def test_a_claim_refuses_what_its_arms_set(extra, workdir):
    """--steps would train the arm that is called sft, --seed would make all seeds one"""
    with pytest.raises(UserError, match="the claim sets it itself"):
        ppo.main(merged("--claim", "srppo", *extra))
