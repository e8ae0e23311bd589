"""ppo.py's methods that compare the responses of a prompt: a routed judge, a judge that reasons,
pairwise PPO. Every equation by hand, then what reaches each function in whole runs."""
import copy
import itertools
import json
import math
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from conftest import close, merged, rand
from safetensors.torch import load_file, save_file
from wiring import catch

import model as models
import ppo
import reward
from data import prefs, tasks
from data.prefs import ToyIF
from data.run import UserError, checkpoint, read_log
from ppo import (at_random, by_margin, by_uncertainty, dual_clip, group_norm, judge_matrix,
                 of_routing, p3o, p3o_joint, pair_gap, pair_scores, pairwise_grpo, pairwise_rloo,
                 parse_verdict, ppo_clip, route, spoken, to_go)

T = torch.tensor
R4 = T([1, 0, -.5, 2], dtype=torch.float64)
D4 = R4[:, None] - R4

# --- whom to ask (2510.20369) ---------------------------------------------------------------------

F12 = T([[0, 1, -.4], [-.6, 0, .5], [.8, -.9, 0]])
U12 = T([[0, 1.2, 1.6], [1.3, 0, 1.1], [1.5, 1.4, 0]])


def most_uncertain(s, u):
    return u


def asking(S, U, verdict, priority=most_uncertain, **limits):
    """route() of one group, whose judge says verdict(i, j).   -> S [K, K], the pairs asked"""
    S, where, verdicts = route(S[None], U[None], priority,
                               lambda where: [verdict(i, j) for _, i, j in where], **limits)
    assert len(where) == len(verdicts)
    return S[0], [(i, j) for _, i, j in where]


def test_both_orders_by_hand():
    S, U = pair_scores(F12, U12)
    assert close(S, [[0, .8, -.6], [-.8, 0, .7], [.6, -.7, 0]])
    assert close(U, [[0, 1.25, 1.55], [1.25, 0, 1.25], [1.55, 1.25, 0]])
    assert close(pairwise_rloo(S), [.1, -.05, -.05])
    own = 5 * torch.eye(3)                                         # a pair with itself: nothing
    both = pair_scores(torch.stack([F12, F12.T]) + own, torch.stack([U12, U12]) + own)
    assert close(both[0], torch.stack([S, -S])) and close(both[1], torch.stack([U, U]))


def test_routing_by_hand():
    """only (1, 3) is above 1.45; the judge says that the first is better"""
    S, asked = asking(*pair_scores(F12, U12), lambda i, j: 1, threshold=1.45)
    assert asked == [(0, 2)] and close(pairwise_rloo(S), [1.4, -.05, -1.35])


@pytest.mark.parametrize("said, logit", [(1, 2.0), (2, -2.0), (0, 0.0), (None, -.6)])
def test_what_the_judge_says_replaces_the_score(said, logit):
    """a judge that fails leaves it"""
    S, _ = asking(*pair_scores(F12, U12), lambda i, j: said, threshold=1.45)
    assert close(S[0, 2], logit) and close(S + S.T, torch.zeros(3, 3))
    S, _ = asking(*pair_scores(F12, U12), lambda i, j: said, threshold=1.45, logit=5.0)
    assert close(S[0, 2], logit if said is None else 2.5 * logit)


def test_a_budget_is_a_share_of_all_groups_pairs_and_goes_where_it_is_needed_most():
    S, U = pair_scores(rand(3, 4, 4), rand(3, 4, 4, seed=1).exp() + 1)
    before = S.clone()
    every = [(p, i, j) for p in range(3) for i, j in itertools.combinations(range(4), 2)]
    order = sorted(every, key=lambda x: -U[x])
    small = sorted(every, key=lambda x: S[x].abs())
    for n in (0, 1, 7, 18):
        _, where, _ = route(S, U, most_uncertain, lambda w: [1] * len(w), budget=n / 18)
        assert where == order[:n]
        _, where, _ = route(S, U, lambda s, u: by_margin(s, u, None), lambda w: [0] * len(w),
                            budget=n / 18)
        assert where == small[:n]
    assert torch.equal(S, before) and len(route(S, U, most_uncertain, lambda w: [1] * len(w),
                                                budget=0.25)[1]) == 4           # 4.5, to even


def test_the_random_control_asks_about_as_many_anywhere():
    S, U = pair_scores(rand(5, 4, 4), 1 + rand(5, 4, 4, seed=1).abs())
    bar = U[:, *torch.triu_indices(4, 4, 1)].quantile(0.7).item()
    want = (U[:, *torch.triu_indices(4, 4, 1)] > bar).sum()
    seen = set()
    for seed in range(40):
        g = torch.Generator().manual_seed(seed)
        _, where, _ = route(S, U, lambda s, u, g=g: at_random(s, u, g), lambda w: [1] * len(w),
                            threshold=bar)
        assert len(where) == want == len({*where}) and all(i < j for _, i, j in where)
        seen |= {*where}
    assert len(seen) == 30 and any(U[x] <= bar for x in seen)
    assert by_uncertainty(S, U, None) is U


def test_limits_of_routing():
    """no budget, or a threshold that nothing passes: the model alone. u >= 1 > 0: the judge on
    all"""
    S, U = pair_scores(rand(5, 5), 1 + rand(5, 5, seed=1).abs())
    gold = rand(5, seed=2)
    for options in (dict(threshold=math.inf), dict(budget=0.0)):
        same, asked = asking(S, U, lambda i, j: 1, **options)
        assert not asked and torch.equal(same, S)
    judged, asked = asking(S, U, lambda i, j: 1 if gold[i] > gold[j] else 2)
    assert len(asked) == 10 and close(judged, 2 * torch.sign(gold[:, None] - gold))
    assert torch.equal(pairwise_rloo(judged).argsort(), gold.argsort())
    kept, asked = asking(S, U, lambda i, j: None)  # every call failed, and was paid for
    assert len(asked) == 10 and torch.equal(kept, S)


@pytest.mark.parametrize("seed", range(3))
def test_advantages_sum_to_zero_and_move_with_the_responses(seed):
    Fs, Us = rand(4, 4, seed=seed), 1 + rand(4, 4, seed=seed + 9).abs()
    gold = rand(4, seed=seed + 19)
    new = torch.randperm(4, generator=torch.Generator().manual_seed(seed))

    def advantages(fn, p):
        S, U = pair_scores(Fs[p][:, p], Us[p][:, p])
        return fn(asking(S, U, lambda i, j: 1 if gold[p[i]] > gold[p[j]] else 2, threshold=1.6)[0])
    for fn in (pairwise_rloo, pairwise_grpo):
        A = advantages(fn, torch.arange(4))
        assert A.sum().abs() < 1e-9 and close(advantages(fn, new), A[new])


@pytest.mark.parametrize("shift", [0.0, 7.0])
def test_differences_of_rewards_are_rloo(shift):
    r, want = R4 + shift, T([.5, -.833333, -1.5, 1.833333])
    assert close(pairwise_rloo(r[:, None] - r), want)
    assert close(pairwise_rloo(torch.stack([D4, -D4])), torch.stack([want, -want]))
    assert close(pairwise_rloo(D4, scale=3.0), 3 * want)


def test_a_group_s_scores_become_a_number_a_response():
    """its advantage; in a group of one the score against its rival"""
    assert close(spoken(torch.stack([D4, -D4]), 4)[[0, 3, 4]], [.5, 1.833333, -.5])
    assert spoken(T([[[0., 3], [-3, 0]], [[0, -1], [1, 0]]]), 1).tolist() == [3, -1]
    assert spoken(T([[[0., 13], [-13, 0]]]), 2).tolist() == [10, -10]              # as released


def test_what_routing_tells():
    """two of three pairs asked; on one the judge agrees; std: of ±2 and of what is left, .7"""
    S, _ = pair_scores(F12, U12)
    mixed, where, verdicts = route(S[None], T([[[0, 3., 2], [3, 0, 1], [2, 1, 0]]]), most_uncertain,
                                   lambda w: [1, 1], budget=2 / 3)
    out = of_routing(S[None], mixed, where, verdicts)
    assert where == [(0, 0, 1), (0, 0, 2)] and out["agreement"] == 0.5
    assert close([out["asked"], out["std_routed"], out["std_unrouted"]], [2 / 3, 2, .7])
    most = of_routing(S[None], mixed, [*where, (0, 1, 2)], [1, 1, 1])
    assert most["agreement"] == pytest.approx(2 / 3) and "std_unrouted" not in most
    none = of_routing(S[None], S[None], [], [])
    assert none.keys() == {"asked", "std_unrouted"} and none["asked"] == 0
    tie = of_routing(S[None], mixed, where, [0, None])
    assert "agreement" not in tie


# --- without a critic -----------------------------------------------------------------------------


def test_rewards_to_go_by_hand():
    mask = T([[0., 1, 1, 1], [1, 1, 0, 0]])
    A, returns = to_go(T([[9., -.1, .2, 1], [.5, -1, 9, 9]]), mask)
    assert returns is None and close(A, [[0, 1.1, 1.2, 1], [-.5, -1, 0, 0]])
    r, m = rand(3, 5), torch.ones(3, 5)
    assert close(to_go(r, m)[0], ppo.gae(r, torch.zeros(3, 5), m, 1.0, 1.0)[0])


def test_a_transform_in_a_group_s_own_unit():
    assert close(group_norm(R4, 4, group_eps=0.0), [.338241, -.563734, -1.014722, 1.240216])
    both = torch.cat([R4, 5 * R4 + 3])
    assert close(group_norm(both, 4, group_eps=0.0).view(2, 4)[1], group_norm(R4, 4, group_eps=0.0))
    assert group_norm(torch.full((4,), .1), 4).tolist() == [0] * 4
    assert group_norm(R4, 1) is R4


# --- a judge's verdicts (2505.16265) --------------------------------------------------------------


@pytest.mark.parametrize("scale, shift", [(1, 0), (5, 0), (1, 3), (.01, -2)])
def test_differences_of_rewards_are_grpo(scale, shift):
    """the denominator is the unbiased std, 1.108678; with eps 0 neither shift nor scale matters"""
    r = scale * R4 + shift
    assert close(pairwise_grpo(r[:, None] - r, eps=0.0), [.338241, -.563734, -1.014722, 1.240216])
    assert close(R4.std(), 1.108678)
    assert close(pairwise_grpo(torch.stack([D4, -3 * D4]), eps=0.0)[1],
                 [-.338241, .563734, 1.014722, -1.240216])


def test_pairwise_grpo_by_hand():
    D = judge_matrix({(0, 1): -2, (0, 2): 1, (1, 2): -3}, 3)
    assert D.tolist() == [[0, 2, -1], [-2, 0, 3], [1, -3, 0]]        # negative: the first is better
    assert close(pairwise_grpo(D), [.218218, .218218, -.436436])
    assert close((D ** 2).sum() / 12, 1.527525 ** 2, 1e-5)
    cycle = judge_matrix({(0, 1): -2, (1, 2): -2, (0, 2): 2}, 3)
    assert close(pairwise_grpo(cycle), torch.zeros(3))


def test_invalid_verdicts_count_as_nothing():
    D = judge_matrix({(0, 1): None, (0, 2): None, (1, 2): None}, 3)
    assert close(D, torch.zeros(3, 3)) and close(pairwise_grpo(D), torch.zeros(3))      # and no NaN
    assert close(judge_matrix({(0, 1): None}, 2, {(0, 1): 40}), torch.zeros(2, 2))
    some = judge_matrix({(0, 1): 3, (0, 2): None}, 3)
    assert some.tolist() == judge_matrix({(0, 1): 3}, 3).tolist()


def test_the_order_of_display_changes_nothing():
    says, length = {(0, 1): 2, (0, 2): -1, (1, 2): 3}, {(0, 1): 5, (0, 2): 7, (1, 2): 9}
    turned = {(j, i): -s for (i, j), s in says.items()}, {(j, i): n for (i, j), n in length.items()}
    assert torch.equal(judge_matrix(says, 3), judge_matrix(turned[0], 3))
    assert torch.equal(judge_matrix(says, 3, length), judge_matrix(turned[0], 3, turned[1]))


def test_of_both_orders_the_mean_counts():
    """d_12 = (s_21 - s_12) / 2: a judge that always prefers what it reads first says nothing"""
    assert judge_matrix({(0, 1): -1, (1, 0): 3}, 2).tolist() == [[0, 2], [-2, 0]]
    assert judge_matrix({(0, 1): -2, (1, 0): -2}, 2).tolist() == [[0, 0], [0, 0]]
    assert judge_matrix({(0, 1): -2, (1, 0): None}, 2).tolist() == [[0, 1], [-1, 0]]


def test_short_verdicts_weigh_more_and_eps_is_not_harmless():
    """lengths 1200 800 2000, 1 > 2, 1 > 3, 3 > 2: Σd²/12 = 4.2e-7 is below eps: half the
    advantages"""
    says, length = {(0, 1): -1, (0, 2): -3, (1, 2): 2}, {(0, 1): 1200, (0, 2): 800, (1, 2): 2000}
    D = judge_matrix(says, 3, length)                                          # only signs count
    assert close(D, [[0, 1 / 1200, 1 / 800], [-1 / 1200, 0, -1 / 2000], [-1 / 800, 1 / 2000, 0]])
    assert close(pairwise_grpo(D), [.583212, -.373256, -.209956], 2e-6)
    assert close(pairwise_grpo(D, eps=0.0), [1.074338, -.687576, -.386762], 2e-6)
    over_mean = {k: 3 * n / 4000 for k, n in length.items()}
    relative = judge_matrix(says, 3, over_mean)
    assert close(pairwise_grpo(relative), [1.074338, -.687576, -.386762], 1e-5)


@pytest.mark.parametrize("text, score", [
    ("<answer>-2</answer>", -2), ("thoughts 3 <answer> 1 </answer>", 1),
    ("<answer>3</answer> no: <answer>-1</answer>", -1),                      # the last block counts
    ("<answer>2 ... -3</answer>", -3),
    ("<answer>\nfrom 1\nto 2\n</answer>", 2),                                  # and its last number
    ("<answer>+2</answer>", 2), ("<answer>score:-3</answer>", -3),
    ("<answer>2.</answer>", 2), ("<answer>The score is -3.</answer>", -3),       # a full stop
    ("<answer>so...-3</answer>", -3), ("<answer>2...-3</answer>", -3),   # dots leave the sign alone
    ("<answer>0</answer>", None), ("<answer>10</answer>", None), ("<answer>-12</answer>", None),
    ("<answer>4</answer>", None), ("<answer>1.5</answer>", None), ("<answer>0.3</answer>", None),
    ("<answer></answer>", None), ("2", None), ("", None), ("<answer>2", None),
    ("<answer>2</answer><answer>0</answer>", None)])                   # it says nothing, but counts
def test_verdicts_are_parsed(text, score):
    assert parse_verdict(text) == score


def test_what_judges_of_each_world_read_and_say():
    asked = ppo.in_words(dict(prompt="user: Why?\nassistant: "), "No.", "Yes.")
    assert asked == ppo.QUESTION.format("user: Why?", "No.", "Yes.")
    assert asked.index("Why?") < asked.index("A:\nNo.") < asked.index("B:\nYes.")
    assert ppo.in_words(dict(prompt="2+2="), "4", "5") == ppo.QUESTION.format("2+2=", "4", "5")
    assert [ppo.winner(x) for x in ("(", ")", "a(b)", "", "~")] == [-1, 1, 1, None, None]
    assert ppo.bit_by_bit(dict(prompt="101="), "11011", "1") == tasks.judging(
        "101", "110", "1mm")["prompt"] == "11101m10m="
    assert ppo.ASKED["parity"][1](tasks.task("parity_long").demo(tasks.judging(
        "101", "110", "100", 3))) == -1                                     # the first is better


def test_the_dual_clip_by_hand():
    """ρ 5 with A = -1 costs 3 and not 5, and has no gradient; elsewhere it is PPO's"""
    logp = T([[5.0, 2.0, 5.0, 0.5, 1.0]]).log().requires_grad_()
    adv = T([[-1.0, -1.0, 1.0, -1.0, 0.0]])
    loss = dual_clip(logp, torch.zeros(1, 5), adv)
    assert close(loss, [[3, 2, -1.2, .8, 0]])
    loss.sum().backward()
    assert logp.grad[0, 0] == 0 and close(logp.grad[0, 1], 2.0)
    x, old, A = rand(4, 6), rand(4, 6, seed=1), rand(4, 6, seed=2)
    assert close(dual_clip(x, old, A, dual=1e9), ppo_clip(x, old, A))


# --- pairwise PPO (2310.00212) --------------------------------------------------------------------


def of_bandit(logp, old, s):
    """A pair's log-probs and sequence rewards as responses of one token.   [2] each"""
    adv, _ = pair_gap(s[:, None], torch.ones(2, 1))
    return logp[:, None], old[:, None], adv, torch.ones(2, 1)


def test_pairwise_ppo_by_hand():
    """s = (1 .2), ρ = (1.3 .9): V1's terms .864 and -.936, V2's D = .367725"""
    known = of_bandit(T([1.3, .9]).log(), torch.zeros(2), T([1.0, .2]))
    assert close(p3o(*known), [-.864, .936]) and close(p3o(*known).mean(), .036)
    assert close(p3o_joint(*known), [-.0936, -.0936])


def test_the_gap_is_of_whole_responses_within_a_pair():
    mask = T([[0., 1, 1, 1], [0, 1, 0, 0], [0, 1, 1, 0], [0, 1, 1, 1]])
    rewards = T([[9., -.1, .2, 1], [9, .5, 9, 9], [0, 1, 1, 9], [0, 1, 1, 1]])
    A, returns = pair_gap(rewards, mask)
    assert returns is None
    assert close(A, mask * T([.6, -.6, -1.0, 1.0])[:, None])


@pytest.mark.parametrize("fn", [p3o, p3o_joint])
def test_pairwise_ppo_s_invariances(fn):
    """a shift of both rewards, the order of the pair, tokens off the mask; two equal responses say
    nothing"""
    mask = T([[0., 1, 1, 1], [0, 1, 1, 0], [0, 1, 1, 0], [0, 1, 1, 1]])
    logp, old, r = rand(4, 4), rand(4, 4, seed=1), rand(4, 4, seed=2)
    loss = fn(logp, old, pair_gap(r, mask)[0], mask)
    last = mask * (mask.cumsum(1) == mask.sum(1, keepdim=True))
    shifted = r + T([3., 3, -5, -5])[:, None] * last
    assert close(fn(logp, old, pair_gap(shifted, mask)[0], mask), loss, 1e-5)
    p = [1, 0, 3, 2]
    swapped = fn(logp[p], old[p], pair_gap(r[p], mask[p])[0], mask[p])
    assert close(swapped, loss[p])
    wild = torch.where(mask > 0, logp, torch.full_like(logp, 7.0))
    assert close(fn(wild, old, pair_gap(r, mask)[0], mask), loss)
    same = [x[[0, 0]] for x in (logp, old, pair_gap(r[[0, 0]], mask[[0, 0]])[0], mask)]
    assert fn(*same).tolist() == [0, 0]
    assert torch.isfinite(fn(logp + 999 * mask, old, pair_gap(r, mask)[0], mask)).all()


def test_a_shift_of_a_prompt_s_rewards_moves_both_of_a_pair():
    problems = [dict(prompt=x) for x in ("a", "b", "ab")]
    score = T([1., 2, 3, 4, 5, 6])
    got = ppo.shifted(score, problems, 2, shift=10.0) - score
    assert close(got[::2], [20 * n / 1009 - 10 for n in (97, 98, (97 * 256 + 98) % 1009)], 1e-4)
    assert close(got[::2], got[1::2], 1e-5) and got.abs().max() < 10


def test_a_shift_of_a_prompt_s_rewards_is_not_in_the_unit_of_pairs(folders, workdir, monkeypatch):
    """the gradient's norm would tell of it"""
    calls = catch(monkeypatch, ppo, "calibrate")
    for name, more in (("plain", []), ("moved", ["--transform", "shifted"])):
        ppo.main(merged(*argv(folders, "toyif,p3o", "--reward", "gold"), *more, "--samples", "2",
                        "--batch", "4", "--out", name))
    plain, moved = (x.out for x in calls["calibrate"])
    assert near(plain["std"], moved["std"]) and not near(plain["mean"], moved["mean"])


def in_expectation(fn, theta, old, s):
    """The gradient of a loss over all pairs of arms, weighed by the law that drew them."""
    theta = theta.clone().requires_grad_()
    logp, before, total = theta.log_softmax(0), old.log_softmax(0), 0.0
    for i, j in itertools.product(range(len(s)), repeat=2):
        loss = fn(*of_bandit(logp[[i, j]], before[[i, j]], s[[i, j]]), eps=1e9).mean()
        total = total + (before[i] + before[j]).exp() * loss
    total.backward()
    return theta.grad


@pytest.mark.parametrize("fn", [p3o, p3o_joint])
@pytest.mark.parametrize("moved", [0.0, 0.3])
def test_unclipped_the_gradient_is_that_of_the_mean_reward(fn, moved):
    """over all pairs of four arms, on the policy and off it"""
    theta, s = rand(4, seed=3).double(), R4
    exact = theta.clone().requires_grad_()
    (exact.softmax(0) * s).sum().backward()
    got = in_expectation(fn, theta, theta + moved * rand(4, seed=4).double(), s)
    assert close(got, -exact.grad, 1e-5)


def test_where_pairwise_ppo_is_clipped_it_has_no_gradient():
    """V1: w > 0 and ρ > 1 + ε, or w < 0 and ρ < 1 - ε;  V2: |D| > ε in the direction of w"""
    for ratio, w, flat in ((1.3, 1, True), (1.3, -1, False), (.7, -1, True), (.7, 1, False)):
        logp = T([ratio, 1.0]).log().requires_grad_()
        args = of_bandit(logp, torch.zeros(2), T([float(w), 0.0]))
        p3o(*args)[0].backward()
        assert (logp.grad[0] == 0) == flat and logp.grad[1] == 0       # the other's is a constant
        logp.grad = None
        p3o_joint(*args).sum().backward()
        assert (logp.grad == 0).all() == flat


# --- whole runs: what reaches each function, compared with the same quantity computed apart -------

SEED = 3
TINY = ["--steps", "2", "--rollouts", "4", "--samples", "3", "--batch", "12", "--micro", "5",
        "--eval_every", "2", "--save_every", "1", "--max_new", "6", "--eval_prompts", "4",
        "--calibrate", "2", "--seed", str(SEED), "--lr", "2e-3"]


def near(a, b, tol=1e-4):
    a, b = (torch.as_tensor(x).detach().double() for x in (a, b))
    return a.shape == b.shape and torch.allclose(a, b, rtol=tol, atol=tol)


@pytest.fixture(scope="session")
def folders(tmp_path_factory):
    """Random models of the toy worlds' alphabet: init, which ends its texts now and then, writer, a
    language model, and pm, a model of pairs that knows its features' covariance. -> their folders
    """
    tok, out = prefs.tokenizer(), {x: tmp_path_factory.mktemp(x) for x in ("init", "writer", "pm")}
    net, g = models.init(models.preset("1x64", tok, 64)), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name in ("writer", "init"):
            for p in net.parameters():
                p.add_(0.1 * torch.randn(p.shape, generator=g))
            usual = net(torch.arange(64)[None]).mean((0, 1))                             # [D]
            net.embed_tokens.weight[tok.eos] = usual / usual.norm()
            models.save(net, tok, out[name])
    pm = reward.PairModel(net, 32, 0.3, True, g)
    pm.w.data.mul_(60)
    pm.pool.weight.data.mul_(0.5)
    pm.add(torch.randint(3, 64, (40, 12), generator=g), torch.full((40,), 12))
    reward.save_classifier(out["pm"], pm, tok, (3.0, 10.0, 0.1))
    return {name: str(path) for name, path in out.items()}


def argv(folders, config, *more):
    return merged("--config", f"{config},tiny", *TINY, "--init", folders["init"], "--out", "run",
                  *more)


def run(monkeypatch, words, *names):
    """ppo.py's own run -> its result, {name: calls} of rows, of these functions and of more."""
    rows, named = catch(monkeypatch, ppo), catch(monkeypatch, ppo, "calibrate", *names)
    monkeypatch.setattr(ppo, "rows_at_once", lambda c: 512)
    monkeypatch.setitem(ppo.BESIDE, "pair.safetensors", ppo.against_sft)
    plain, rolls, updates = ppo.generate, [], []

    def generate(model, prompts, *args, **kw):
        roll = plain(model, prompts, *args, **kw)
        rolls.append(SimpleNamespace(model=model, prompts=prompts, out=roll, **kw))
        return roll

    def backward(policy, critic, batch, rows, known, f, plain=ppo.backward):
        net = copy.deepcopy(policy)
        out = plain(policy, critic, batch, rows, known, f)
        grads = [p.grad.clone() for p in policy.parameters()]
        frozen = [x for x in known.values() if isinstance(x, torch.nn.Module) and x is not policy]
        frozen += [] if "returns" in batch else [critic]
        assert all(p.grad is None for net in frozen for p in net.parameters())
        updates.append(SimpleNamespace(net=net, batch=batch, rows=rows, grads=grads))
        return out
    monkeypatch.setattr(ppo, "generate", generate)
    monkeypatch.setattr(ppo, "backward", backward)
    out = ppo.main(words)
    return out, rows | named | dict(generate=rolls, grads=updates)


def logp_of(net, tokens, mask):
    """log p(token t | before), 0 off the mask, from whole logits.   [B, T]"""
    law = (net(tokens) @ net.head.T).float().log_softmax(-1)[:, :-1]
    return F.pad(law.gather(2, tokens[:, 1:, None]).squeeze(2), (1, 0)) * mask


def judged_apart(folder, tok, group):
    """S and U of a group by reward.py's own classifier, a pair at a time."""
    body = models.load(folder)[0]
    own = load_file(f"{folder}/pair.safetensors")
    own.pop("settings"), own.pop("marks")
    pm = reward.PairModel(body.model, 32)
    pm.load_state_dict(own | {f"body.{k}": x for k, x in body.model.state_dict().items()})
    a, b = tok.encode("AB")
    K = len(group.ys)
    f, u = torch.zeros(2, K, K)
    for i, j in itertools.permutations(range(K), 2):
        ids = [*group.ids, a, *group.ys[i], b, *group.ys[j], tok.eos]
        f[i, j], u[i, j] = pm.calibrated(torch.tensor([ids]), torch.tensor([len(ids)]), 3.0, 10.0)
    return (f - f.T) / 2, (u + u.T) / 2


def check_groups(groups, gen, tok, samples, ref):
    """What is compared is what was sampled, a prompt's responses together; of a group of one, with
    the greedy response of the SFT model."""
    assert len(groups) * samples == len(gen.out.tokens)
    ys = gen.out.completions()
    for k, group in enumerate(groups):
        assert group.ids == tok.prompt(group.problem["prompt"]) == gen.prompts[k]
        assert group.ys[:samples] == ys[k * samples:(k + 1) * samples]
        done = gen.out.finished.tolist()[k * samples:(k + 1) * samples]
        if samples == 1:
            rival = models.generate(ref, [group.ids], 6, temperature=0.0)
            assert group.ys[1:] == rival.completions()
            done += rival.finished.tolist()
        assert group.done == done and group.texts == [tok.decode(y) for y in group.ys]


def check_update(calls, k, score, no_eos, out, samples=3):
    """A step's scores become advantages: EOS rule, unit, KL, rewards to go."""
    scale, gen = calls["calibrate"][0].out, calls["fresh"][k].out["roll"]
    assert scale["mean"] == 0              # equals of a group train nothing, whatever others do
    ended = torch.where(gen.finished, score, torch.tensor(no_eos))
    unit = (ended - scale["mean"]) / scale["std"]
    assert near(calls["ends"][k].unit, unit)
    rewards = calls["ends"][k].out
    last = gen.mask * (gen.mask.cumsum(1) == gen.mask.sum(1, keepdim=True))
    assert near((rewards * last).sum(1) + calls["ends"][k].beta * calls["ends"][k].coefficient
                * ((gen.logp - calls["ends"][k].ref_logp) * last).sum(1), unit)
    adv = torch.stack([rewards[:, t:].sum(1) for t in range(rewards.size(1))], 1) * gen.mask
    assert near(calls["to_go"][k].out[0], adv)
    assert near(calls["grads"][k].batch["adv"], adv)


def gold_of_any(self, prompt, text, finished=True):
    """A world that values any text: random ones earn nothing by its own."""
    return dict(gold=sum(map(ord, prompt + text)) % 11 / 7 + finished)


def test_a_routed_judge_is_asked_about_the_most_uncertain_pairs(folders, workdir, monkeypatch):
    """both orders, a quarter of a step's pairs, gold's verdicts; in calibration and evaluation the
    model of pairs alone, at last against the SFT model"""
    monkeypatch.setattr(ToyIF, "judge", gold_of_any)
    out, calls = run(monkeypatch, argv(folders, "toyif,route", "--pair_model", folders["pm"],
                                       "--no_eos", "-2.5"), "route")
    ref, tok = models.load(folders["init"])
    judge, log = prefs.StrongJudge(ToyIF(), 0.1), [r for r in read_log("run") if "loss" in r]
    assert [call.samples for call in calls["routed"]] == [8, 1, 1, 3, 3, 1, 1]
    assert [call.training for call in calls["routed"]] == [call.samples == 3
                                                           for call in calls["routed"]]
    gens, k, asked = [x for x in calls["generate"] if x.temperature != 0], 0, 0
    for call, gen in zip(calls["routed"], gens, strict=True):
        n = call.samples
        check_groups(call.groups, gen, tok, n, ref)
        S, U = map(torch.stack, zip(*(judged_apart(folders["pm"], tok, g) for g in call.groups)))
        assert near(call.beliefs[0], S) and near(call.beliefs[1], U)
        assert U[0, 0, 1] > 1.001 and U.std() > 1e-3
        if n == 3:
            every = [(p, i, j) for p in range(4) for i, j in ((0, 1), (0, 2), (1, 2))]
            where, agree, before = sorted(every, key=lambda x: -U[x])[:3], [], S.clone()
            for p, i, j in where:
                g = call.groups[p]
                said = judge.judge(g.problem["prompt"], g.texts[i], g.texts[j], g.done[i],
                                   g.done[j])
                S[p, i, j] = {1: 2, 2: -2, 0: 0}[said]
                S[p, j, i] = -S[p, i, j]
                agree += [(before[p, i, j] > 0) == (said == 1)] if said else []
            asked += 3
            row = log[k]
            assert row["asked"] == 0.25 and row["judge_calls"] == judge.calls == asked
            assert row.get("agreement") == (sum(agree).item() / len(agree) if agree else None)
            routed = [S[w].item() for w in where]
            assert near(row["std_routed"], T([*routed, *(-x for x in routed)]).std(correction=0))
            check_update(calls, k, S.sum(2).flatten() / 2, -2.5, out)
            k += 1
        assert near(call.out, S[:, 0, 1] if n == 1 else S.sum(2).flatten() / (n - 1))
    assert out["val_reward"] == pytest.approx(calls["routed"][5].out.mean().item(), abs=1e-5)
    assert calls["routed"][0].budget == 0.25 and {x.beta for x in calls["ends"]} == {0.01}


@pytest.mark.parametrize("size", [0.5, 3.0])
def test_the_pool_brings_states_no_further_apart(size, folders):
    """its largest singular value is at most 1: a bound, by which a smaller one is not raised"""
    own = load_file(f"{folders['pm']}/pair.safetensors")
    own |= {"pool.weight": size * own["pool.weight"] / own["pool.weight"].norm() * 8}
    own["u"] = torch.linalg.svd(own["pool.weight"])[0][:, 0]
    h = rand(6, 64).float()
    W = own["pool.weight"] / max(1.0, torch.linalg.matrix_norm(own["pool.weight"], 2).item())
    wide = own | {"pool.weight": W, "u": own["u"] * 0}
    assert near(torch.stack(ppo.pair_logits(h, ppo.factored(own))),
                torch.stack(ppo.pair_logits(h, ppo.factored(wide))))
    plain = {"W": torch.zeros(0, 64), "w": rand(64).float(), "b": torch.zeros(0)}
    g, u = ppo.pair_logits(h, ppo.factored(plain))
    assert near(g, h @ plain["w"]) and u.tolist() == [1] * 6


def test_a_model_of_pairs_alone_scores_against_the_sft_model(folders, workdir, monkeypatch):
    """--reward FOLDER of what the router left, less its mean over the SFT model's samples"""
    _, calls = run(monkeypatch, argv(folders, "toyif,ppo", "--reward", folders["pm"]),
                   "against_sft")
    ref, tok = models.load(folders["init"])
    scored = list(zip(calls["against_sft"], calls["PATH"], strict=True))
    assert len(scored) == 7
    for call, paid in scored[1:4]:
        ids = [row[:n] for row, n in zip(call.roll.tokens.tolist(), call.roll.prompt_len.tolist())]
        rivals = models.generate(ref, ids, 6, temperature=0.0).completions()
        groups = [ppo.Group(x, ys, {}, [], []) for x, *ys in zip(ids, call.roll.completions(),
                                                                  rivals)]
        want = torch.stack([judged_apart(folders["pm"], tok, g)[0][0, 1] for g in groups])
        assert near(call.out, want)
        assert near(paid.judged, want - calls["calibrate"][0].out["bias"])


def pretended(text):
    """A verdict that any text has."""
    return (None, -3, -2, -1, 1, 2, 3)[sum(map(ord, text)) % 7]


def said_of(written, tok, where, groups, question):
    """The scores that the judge wrote, None where it did not end, which was asked about these pairs
    in this order; the lengths of its texts; and the last of its calls."""
    asked = [tok.prompt(question(groups[p].problem, groups[p].texts[i], groups[p].texts[j]))
             for p, i, j in where]
    prompts, texts, done = [], [], []
    while len(prompts) < len(asked):
        gen = written.pop(0)
        prompts += gen.prompts
        texts += map(tok.decode, gen.out.completions())
        done += gen.out.finished.tolist()
    assert prompts == asked
    return [pretended(x) if d else None for x, d in zip(texts, done)], [*map(len, texts)], gen


def test_a_checkpoint_as_the_judge_of_uncertain_pairs(folders, workdir, monkeypatch):
    """it reads the pair as ToyIF's judges do; a negative score: the first is better; no verdict
    leaves the score"""
    monkeypatch.setitem(ppo.ASKED, "toyif", (ppo.symbols, pretended, 5))
    words = argv(folders, "toyif,route", "--reward", "routed_model", "--budget", "0.75",
                 "--pair_model", folders["pm"], "--judge", folders["writer"])
    out, calls = run(monkeypatch, words, "route")
    tok, log = prefs.tokenizer(), [r for r in read_log("run") if "loss" in r]
    written = [x for x in calls["generate"] if near_weights(x.model, folders["writer"])]
    training = [x for x in calls["routed_model"] if x.training]
    for k, (call, routing) in enumerate(zip(training, calls["route"], strict=True)):
        _, where, verdicts = routing.out
        want, _, gen = said_of(written, tok, where, call.groups, lambda p, a, b: prefs.question(
            dict(prompt=p["prompt"], chosen=a, rejected=b), ""))
        assert gen.temperature == 0.6 and len(where) == 9
        assert verdicts == [s and (1 if s < 0 else 2) for s in want]
        assert log[k]["judge_calls"] == 9 * (k + 1)
        assert log[k]["no_verdict"] == pytest.approx(sum(s is None for s in want) / 9)
        S = call.beliefs[0].clone()
        for (p, i, j), s in zip(where, want):
            S[p, i, j] = S[p, i, j] if s is None else 2.0 if s < 0 else -2.0
            S[p, j, i] = -S[p, i, j]
        assert near(call.out, S.sum(2).flatten() / 2)
    assert not written                                     # never in calibration, nor in evaluation


def near_weights(model, folder):
    """Whether a model is that of a folder."""
    other = models.load(folder)[0].state_dict()
    return all(torch.equal(x, other[k]) for k, x in model.state_dict().items() if k in other)


@pytest.mark.parametrize("more", [[], ["--both_orders", "true", "--votes", "length"],
                                  ["--points", "true", "--transform", "group"]])
def test_a_reasoning_judge_s_verdicts_become_advantages(more, folders, workdir, monkeypatch):
    """the bits of prompt and both responses, i first; sampled at .6 in training, greedy otherwise;
    in evaluation against the SFT model's greedy response"""
    monkeypatch.setitem(ppo.ASKED, "parity", (ppo.bit_by_bit, pretended, 5))
    both, points = "--both_orders" in more, "--points" in more
    out, calls = run(monkeypatch, argv(folders, "parity,thinkrm", "--judge", folders["writer"],
                                       *more))
    tok, k, asked = prefs.tokenizer(), 0, 0
    log = [r for r in read_log("run") if "loss" in r]
    written = [x for x in calls["generate"] if near_weights(x.model, folders["writer"])]
    for call in calls["verdicts"]:
        n = call.samples
        K = max(n, 2)
        orders = [(i, j) for i in range(K) for j in range(K) if (i != j if both else i < j)]
        where = [(p, i, j) for p in range(len(call.groups)) for i, j in orders]
        want, lengths, gen = said_of(written, tok, where, call.groups, bits_of)
        assert gen.temperature == (0.6 if call.training else 0.0)
        D, mean = torch.zeros(len(call.groups), K, K), sum(lengths) / len(lengths)
        for (p, i, j), score, length in zip(where, want, lengths):
            d = -(score or 0) / (1 + both)
            d = math.copysign(mean / max(length, 1), d) / (1 + both) * (d != 0) if both else d
            D[p, i, j] += d
            D[p, j, i] -= d
        A = D.mean(2) / ((D ** 2).sum((1, 2))[:, None] / (2 * K * (K - 1)) + 1e-6).sqrt()
        A = D.sum(2) / (K - 1) if points else A
        assert near(call.out, D[:, 0, 1] if n == 1 else A.flatten())
        if n == 3:
            asked += len(where)
            assert log[k]["judge_calls"] == asked
            score = call.out
            if points:
                ended = torch.where(calls["fresh"][k].out["roll"].finished, score, T(-3.0))
                score = group_norm(ended, 3)
                assert near(calls["group"][k + 1].score, ended)
                assert near(calls["group"][k + 1].out, score)
                assert near(calls["ends"][k].unit, (score - calls["calibrate"][0].out["mean"])
                            / calls["calibrate"][0].out["std"])
            else:
                check_update(calls, k, score, -3.0, out)
            k += 1
    assert k == 2 and not written
    assert out["val_exact"] == 0 <= out["val_gold"]
    assert {x.beta for x in calls["ends"]} == {0.0} and {x.kl_coef for x in calls["k3"]} == {1e-3}
    assert len(calls["dual"]) == len(calls["k3"]) == 6


def test_the_quality_of_parities_is_also_how_many_are_wholly_right():
    known = dict(quality=T([1.0, 6 / 7, 0.0, 1.0]), c=SimpleNamespace(reward="verdicts"))
    found = ppo.measured(known | dict(task=tasks.task("parity")))
    assert found.keys() == {"exact"} and found["exact"].tolist() == [1, 0, 0, 1]
    assert ppo.measured(known | dict(task=tasks.task("toyif"))) == {}


def bits_of(problem, a, b):
    """What a judge of parities reads; a response of another length is cut, or ends in m."""
    x = problem["prompt"].rstrip("=")
    return "".join(q + u + v for q, u, v in zip(x, a + 7 * "m", b + 7 * "m")) + "="


def test_the_length_of_a_judgement_weighs_its_sign():
    """binary verdicts, over lengths in units of the step's mean"""
    says = iter([(-3, 10), (2, 30), (None, 20), (1, 20), (-1, 10), (-2, 30)])
    panel = SimpleNamespace(scores=lambda groups, where, generator, training: [
        next(says) for _ in where])
    groups = [ppo.Group([], [[]] * 3, {}, [], [])] * 2
    D = ppo.duels(panel, groups, None, True, both_orders=False, votes="length")
    assert close(D, [[[0, 2, -2 / 3], [-2, 0, 0], [2 / 3, 0, 0]],
                     [[0, -1, 2], [1, 0, 2 / 3], [-2, -2 / 3, 0]]])


@pytest.mark.parametrize("preset", ["p3o", "p3o_joint"])
def test_pairwise_ppo_s_step_is_on_whole_pairs(preset, folders, workdir, monkeypatch):
    """rows of one prompt side by side in every minibatch; the first step's gradient is that of
    -½ Σ w (log π(y) - log π(y')), KL within w"""
    out, calls = run(monkeypatch, argv(folders, f"toyif,{preset}", "--samples", "4", "--batch", "8",
                                       "--reward", folders["pm"]), "against_sft")
    for k, (gap, ends) in enumerate(zip(calls["pair"], calls["ends"], strict=True)):
        s = ends.unit - 0.05 * ends.coefficient * ((ends.logp - ends.ref_logp)
                                                   * ends.mask).sum(1)                   # [B]
        w = s - s.view(-1, 2)[:, [1, 0]].flatten()
        assert near(gap.out[0], w[:, None] * ends.mask, 2e-4)
        for step in calls["grads"][2 * k:2 * k + 2]:
            pairs = step.rows.view(-1, 2)
            assert (pairs[:, 0] % 2 == 0).all() and (pairs[:, 1] == pairs[:, 0] + 1).all()
            assert near(step.batch["adv"], gap.out[0])
        first = calls["grads"][2 * k]
        tokens, mask = (first.batch[x][first.rows] for x in ("tokens", "mask"))
        logp = logp_of(first.net, tokens, mask).sum(1)                                   # [b]
        loss = -(w[first.rows] * logp).sum() / len(logp) if preset == "p3o" else -0.5 * (
            w[first.rows] * (logp - logp.view(-1, 2)[:, [1, 0]].flatten())).sum() / len(logp)
        wanted = torch.autograd.grad(loss, list(first.net.parameters()))
        assert max(g.abs().max() for g in wanted) > 1e-4
        assert all(near(a, b, 2e-3) for a, b in zip(first.grads, wanted))
    assert {len(x.logp) for x in calls[preset]} == {4} and len(calls[preset]) == 8


@pytest.mark.parametrize("config, more", [
    ("toyif,route", ["--pair_model", "pm"]), ("parity,thinkrm", ["--judge", "writer"]),
    ("toyif,p3o", ["--samples", "2", "--batch", "8", "--reward", "pm"])])
def test_resume_is_exact_and_goes_on_counting(config, more, folders, workdir):
    more = [folders.get(x, x) for x in more]
    for name, tail in (("whole", []), ("half", ["--stop", "1"]), ("half", ["--resume"])):
        ppo.main(merged(*argv(folders, config, *more), "--out", name, *tail))
    whole, half = (models.load(x)[0].state_dict() for x in ("whole", "half"))
    assert all(torch.equal(whole[k], half[k]) for k in whole)
    results = [json.loads(open(f"{x}/run.json").read())["result"] for x in ("whole", "half")]
    assert results[0] == results[1]
    a, b = ([r.get("judge_calls") for r in read_log(x) if "loss" in r] for x in ("whole", "half"))
    assert a == b and (a[0] is None or 0 < a[0] < a[1])
    assert not (checkpoint("whole") / "critic").exists()            # nobody asks for its values


@pytest.mark.parametrize("config, more, words", [
    ("toyif,route", ["--samples", "1"], "--samples 1: --reward routed compares the responses"),
    ("parity,thinkrm", ["--samples", "1"], "--samples 1: --reward verdicts compares"),
    ("toyif,p3o", ["--samples", "3"], "give multiples of 2"),
    ("toyif,route", ["--budget", "1.5"], "budget"),
    ("toyif,route", ["--budget", "-0.1"], "budget"),
    ("toyif,route", ["--pair_model", ""], "--pair_model FOLDER is missing"),
    ("toyif,route", ["--pair_model", "nowhere"], "nowhere does not exist"),
    ("toyif,route", ["--pair_model", "writer"], "has no pair.safetensors"),
    ("parity,route", [], "knows gold: ring or toyif, not of --data parity"),
    ("parity,thinkrm", ["--judge", ""], "--judge FOLDER is missing"),
    ("parity,thinkrm", ["--judge", "pm"], "need a language model"),
    ("parity,thinkrm", ["--judge", "other"], "have different tokenizers"),
    ("parity,thinkrm", ["--judge_tokens", "60"], "leaves room for 60"),
    ("toyif,route", ["--pair_model", "broken"], "are NaN or infinite"),
    ("toyif,p3o", ["--samples", "2", "--batch", "8", "--reward", "broken"], "are NaN or infinite")])
def test_bad_input_is_one_line(config, more, words, folders, workdir):
    if "other" in more:
        tok = prefs.ring_tokenizer()
        models.save(models.init(models.preset("1x64", tok, 64)), tok, "other")
    if "broken" in more:
        copy_of_pm(folders["pm"])
    needed = dict(route=["--pair_model", folders["pm"]], thinkrm=["--judge", folders["writer"]])
    more = [folders.get(x, x) for x in more]
    with pytest.raises(UserError, match=words) as error:
        ppo.main(merged(*argv(folders, config), *needed.get(config.split(",")[1], []), *more))
    assert "\n" not in str(error.value)


def copy_of_pm(folder):
    """A model of pairs whose head is no number."""
    net, tok = models.load(folder)
    models.save(net, tok, "broken")
    own = load_file(f"{folder}/pair.safetensors")
    save_file(own | dict(w=own["w"] * math.nan), "broken/pair.safetensors")


def test_a_judge_that_fails_on_a_long_pair_has_no_verdict(folders):
    """only what fits is asked; a judgement that does not end says nothing"""
    net, tok = models.load(folders["writer"])
    c = SimpleNamespace(chat=False, micro=2, slots=0, device="cpu", dtype="float32")
    f = SimpleNamespace(reward=SimpleNamespace(keywords=dict(judge_tokens=20,
                                                             judge_temperature=0.6)))
    panel = ppo.Panel(net, tasks.task("toyif"), tok, c, f)
    groups = [ppo.Group([], [[], []], dict(prompt="<Fc="), ["ab", "c" * n], [True, True])
              for n in (1, 60)]
    g = torch.Generator().manual_seed(0)
    found = panel.scores(groups, [(0, 0, 1), (1, 0, 1), (1, 1, 0)], g)
    assert found[1] == found[2] == (None, 0) and panel.calls == 3
    said = []
    run = SimpleNamespace(say=said.append)
    assert panel.note(run)["no_verdict"] >= 2 / 3 and panel.note(run)["judge_calls"] == 3
    panel.scores(groups, [(0, 0, 1)], g, training=False)
    assert panel.calls == 3
    said.clear()
    panel.silent = False
    for share in (0.5, 1.0, 1.0):
        panel.seen["no_verdict"] = share
        panel.note(run)
        assert len(said) == (share == 1)
    assert len(said) == 1 and "gave no verdict in a whole step" in said[0]         # once
