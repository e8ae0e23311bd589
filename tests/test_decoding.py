"""specdec.py's other decoders: two models in turn, a look ahead, guidance, the consensus game,
self-evaluation."""
import itertools
import math
import random
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from conftest import close, rand

from data.tasks import chain_tokenizer
from data.prefs import tokenizer as toyif_tokenizer
from data.run import UserError, hyper
from data.stats import best_of_n
from model import Cache, ModelConfig, collate, generate, init, pick
from specdec import (Beam, adaptive_best, adaptive_value, annealed, answer_views, answered, at_cost,
                     autoregressive, coin, consensus, controls, cut_points, entropy_bits, guidance,
                     muted, pruned_tokens, rival_label, scored, search, self_eval_loss, signals,
                     survivors, switching, uncertain, vote, voted)

D = partial(torch.tensor, dtype=torch.float64)
SMALL = ModelConfig(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
                    num_attention_heads=4, num_key_value_heads=2, head_dim=8,
                    max_position_embeddings=96,
                    eos_token_id=(2,))


def lively(seed=0, scale=6.):
    """A random float64 model whose predictions are far from uniform."""
    model = init(SMALL, seed).double()
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() > 1:
                p *= scale
    return model.requires_grad_(False)


# --- EAD ------------------------------------------------------------------------------------------


def greedy(logits):
    return logits.argmax(-1)


def empty(model):
    return Cache(model.config, 1, 64, "cpu", torch.float64)


def written(models, prompt, choose, new=24, stop=(2,)):
    return switching(models, prompt, new, choose, greedy, empty, stop)


def alone(model, prompt, new=24, stop=(2,)):
    """Greedy decoding that reads everything again for every token."""
    text = list(prompt)
    while len(text) < len(prompt) + new and not (len(text) > len(prompt) and text[-1] in stop):
        text.append(int(model.logits(model(torch.tensor([text]))[:, -1]).argmax()))
    return text[len(prompt):]


def test_entropy_in_bits_by_hand():
    got = entropy_bits(D([[.5, .3, .2, 0.], [.97, .01, .01, .01], [.25] * 4]).log())
    assert close(got, [1.485475, 0.241941, 2.0])


def test_a_threshold_below_every_entropy_is_the_large_model_and_above_it_the_small_one():
    models = lively(0), lively(1)
    for prompt in ([1, 5, 9], [1, 40], [7, 7, 7, 7, 8]):
        low, high = (written(models, prompt, partial(uncertain, threshold=t))
                     for t in (-1.0, math.inf))
        assert low.ids == alone(models[1], prompt) and high.ids == alone(models[0], prompt)
        assert set(low.large) == {1} and low.read[0] == 0          # the other model is never asked
        assert set(high.large) == {0} and high.read[1] == 0


def test_a_model_that_comes_back_has_read_what_it_missed():
    models, prompt = (lively(0), lively(1)), [1, 5, 9]
    who = [0, 0, 1, 1, 1, 0, 1, 0, 0, 0, 1, 0]
    got = written(models, prompt, lambda seen, large, stayed: who[len(seen)], new=len(who), stop=())
    text = list(prompt)
    for k, ids in zip(who, got.ids):  # by the definition, without caches
        logits = models[k].logits(models[k](torch.tensor([text]))[:, -1])
        assert int(logits.argmax()) == ids
        assert close(entropy_bits(logits.double())[0], got.bits[len(text) - len(prompt)])
        text.append(ids)
    last = [max(i for i, k in enumerate(who) if k == m) for m in (0, 1)]
    assert got.large == who and got.read == [len(prompt) + last[0], len(prompt) + last[1]]


def test_the_stop_token_ends_the_text():
    models = lively(0), lively(1)
    whole = written(models, [1, 5], partial(uncertain, threshold=-1.0), stop=()).ids
    cut = written(models, [1, 5], partial(uncertain, threshold=-1.0), stop=(whole[3],)).ids
    assert cut == whole[:whole.index(whole[3]) + 1] and len(cut) < len(whole)


def test_the_window_is_a_mean_of_the_last_five():
    seen = [9.0, 1.0, 1.0, 1.0, 1.0, 2.0]                          # mean of the last five: 1.2
    assert uncertain(seen, False, math.inf, threshold=1.19)
    assert not uncertain(seen, False, math.inf, threshold=1.21)
    assert uncertain(seen, False, math.inf, threshold=2.4, window=6)
    assert not uncertain([], False, math.inf, threshold=0.0)


def test_a_switch_is_followed_by_a_minimum_stay():
    assert uncertain([0.0] * 9, True, 4) and not uncertain([0.0] * 9, True, 5)
    assert not uncertain([9.0] * 9, False, 4) and uncertain([9.0] * 9, False, 5)
    seen, large, stayed, who = [], False, math.inf, []  # each model is sure, or not, of all
    for _ in range(60):
        turn = uncertain(seen, large, stayed, threshold=1.0, window=1)
        stayed, large = stayed + 1 if turn == large else 1, turn
        who.append(large)
        seen.append(0.0 if large else 3.0)
    runs = [len(list(g)) for _, g in itertools.groupby(who)]
    assert runs == [1, *[5] * 11, 4]


def test_the_large_share_of_a_fixed_text_falls_with_the_threshold():
    bits = (3 * rand(200).abs()).tolist()
    shares = [sum(uncertain(bits[:i], False, math.inf, threshold=t) for i in range(200)) / 200
              for t in (-1.0, 0.5, 1.0, 2.0, 3.0, 4.0, math.inf)]
    assert shares == sorted(shares, reverse=True) and shares[0] == 1 and shares[-1] == 0
    assert 0.2 < shares[3] < 0.9


def test_the_coin_has_its_share_and_its_stays():
    rng, large, out = random.Random(0), False, []
    for _ in range(20000):
        out.append(large := coin(out, large, 0, share=0.3, stay=5, rng=rng))
    assert abs(sum(out) / len(out) - 0.3) < 0.03
    assert all(len({*out[i:i + 5]}) == 1 for i in range(0, 20000, 5))


# --- DeAL -----------------------------------------------------------------------------------------
# A language of four symbols, 3 the stop, in which each prediction depends on the last two symbols.

TABLE = rand(4, 4, 4, seed=3).mul(1.5).log_softmax(-1)


def expand(texts):
    return torch.stack([TABLE[t[-2], t[-1]] for t in texts])


def look(texts, new):
    out = []
    for t in texts:
        more = []
        while len(more) < new and (not more or more[-1] != 3):
            tail = [*t, *more]
            more.append(int(TABLE[tail[-2], tail[-1]].argmax()))
        done = bool(more) and more[-1] == 3
        out.append((more[:-1] if done else more, done))
    return out


def every_text(prompt, new):
    """All texts that stop within `new` tokens, with their log-probs, by brute force."""
    out = []
    for n in range(new):
        for ids in itertools.product(range(3), repeat=n):
            text, logp = list(prompt), 0.0
            for t in (*ids, 3):
                logp += float(TABLE[text[-2], text[-1], t])
                text.append(t)
            out.append((logp, ids))
    return out


def beam_search(prompt, new, beams):
    """The textbook's, written anew: finished hypotheses compete with open ones."""
    rows = [(0.0, (), False)]
    for _ in range(new):
        grown = [r for r in rows if r[2]]
        for logp, ids, done in rows:
            if not done:
                text = (*prompt, *ids)
                grown += [(logp + float(TABLE[text[-2], text[-1], t]),
                           ids + (() if t == 3 else (t,)), t == 3)
                          for t in range(4)]
        rows = sorted(grown, reverse=True)[:beams]
    return rows[0]


PROMPTS = [[0, 1], [2, 2], [1, 0], [0, 0]]


def never(*_):
    raise AssertionError("not to be asked")


@pytest.mark.parametrize("beams", [1, 2, 3, 5])
def test_weight_zero_is_beam_search_and_looks_at_nothing(beams):
    got = search(PROMPTS, expand, never, never, {3}, new=5, weight=0.0, beams=beams, expansions=4)
    for prompt, b in zip(PROMPTS, got):
        logp, ids, done = beam_search(prompt, 5, beams)
        assert b.ids == ids and b.finished == done and close(b.logp, logp) and b.score == b.logp


def test_enough_beams_find_the_best_of_all_texts():
    def h(i, ids, finished):
        return float(sum(ids)) if finished else -math.inf
    got = search(PROMPTS, expand, partial(look, new=0),
               lambda i, ids, done: h(i, ids, True), {3}, new=4,
               weight=0.7, beams=1000, expansions=4)
    for prompt, b in zip(PROMPTS, got):
        best = max(logp + 0.7 * sum(ids) for logp, ids in every_text(prompt, 4))
        assert b.score >= best - 1e-9  # an unfinished text may score more
        if b.finished:
            assert close(b.score, best)


def test_a_forbidden_symbol_never_comes():
    def h(i, ids, finished):
        return -math.inf if 1 in ids else 0.0
    free = search(PROMPTS, expand, never, never, {3}, new=6, weight=0.0)
    got = search(PROMPTS, expand, partial(look, new=0), h, {3}, new=6, beams=3, expansions=4)
    assert any(1 in b.ids for b in free) and not any(1 in b.ids for b in got)


def test_a_look_ahead_sees_a_reward_that_the_prefix_does_not_have():
    """One beam: the reward comes with the third symbol, and only who looks so far goes towards
    it."""
    chain = torch.full((4, 4, 4), -20.0)
    chain[0, 0] = D([math.log(.6), math.log(.4), -20, -20])        # 0 is likelier, 1 leads to a 2
    chain[0, 1, 2] = chain[1, 2, 3] = chain[0, 0, 3] = 0.0
    chain[0, 0, 3] = -3.0

    def step(texts):
        return torch.stack([chain[t[-2], t[-1]] for t in texts])

    def ahead(texts, new=3):
        out = []
        for t in texts:
            more = []
            while len(more) < new and (not more or more[-1] != 3):
                tail = [*t, *more]
                more.append(int(chain[tail[-2], tail[-1]].argmax()))
            out.append(([x for x in more if x != 3], 3 in more))
        return out

    def h(i, ids, finished):
        return float(2 in ids)
    kw = dict(new=3, weight=2.0, beams=1, expansions=2)
    assert 2 in search([[0, 0]], step, ahead, h, {3}, **kw)[0].ids
    assert 2 not in search([[0, 0]], step,
                         lambda texts: [((), False)] * len(texts), h, {3}, **kw)[0].ids


def test_prompts_do_not_touch_each_other():
    def h(i, ids, finished):
        return float(len(ids)) * (1 if PROMPTS[i][0] else -1)
    together = search(PROMPTS, expand, partial(look, new=2), h, {3}, new=5)
    for i, b in enumerate(together):
        single = search([PROMPTS[i]], expand, partial(look, new=2),
                      lambda _, *rest: h(i, *rest), {3}, new=5)
        assert single == [b] and isinstance(b, Beam)


# --- GenARM ---------------------------------------------------------------------------------------


def guided(base, arm, alpha):
    """Logits of  π(v) ∝ π_base(v) π_arm(v)^α  (2410.08193)."""
    return base.log_softmax(-1) + alpha * arm.log_softmax(-1)


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0, 4.0])
def test_guidance_is_what_generate_samples_from(alpha):
    """generate's (1 + a) l - a l_other over T, through model.pick's own log-probs, is l + alpha
    l_arm."""
    base, arm = D([.5, .3, .2]).log(), D([.2, .2, .6]).log()
    T, a = guidance(alpha)
    token, logp = pick(((1 + a) * base - a * arm).expand(999, 3), torch.arange(999) / 999, T)
    p = guided(base, arm, alpha).softmax(-1)
    assert close(logp, p.log()[token], 1e-6)
    assert close(torch.bincount(token, minlength=3) / 999, p, 2e-3)


def test_generate_follows_the_arm():
    models, (T, a) = (lively(0), lively(1)), guidance(1.5)
    roll = generate(models[0], [[1, 5, 9]], 6, samples=4, temperature=T, contrast=(models[1], a),
                    stop=[],
                    generator=torch.Generator().manual_seed(0))
    logits = [m.logits(m(roll.tokens)).double() for m in models]
    want = guided(logits[0], logits[1], 1.5).log_softmax(-1)[:, 2:-1]
    assert close(want.gather(2, roll.tokens[:, 3:, None]).squeeze(2), roll.logp[:, 3:], 1e-4)


def test_guidance_refuses_a_negative_weight():
    with pytest.raises(UserError, match="not negative"):
        guidance(-0.5)


def test_arm_loss_by_hand():
    assert close(autoregressive(D([-10.]), D([-18.])), [0.513015])        # a gap of 8 nats
    assert close(autoregressive(D([-3.]), D([-3.])), [math.log(2)])
    x, y = rand(4).requires_grad_(), rand(4, seed=1).requires_grad_()
    assert torch.autograd.gradcheck(autoregressive, (x, y))
    assert hyper(autoregressive) == dict(beta_r=0.05)


# --- equilibrium-ranking --------------------------------------------------------------------------

GAME = D([[.6, .3, .1], [.2, .3, .5]]), D([[.7, .8, .3], [.3, .2, .7]])


def test_the_game_by_hand_and_its_ranking_flips():
    G, P = consensus(*GAME, rounds=10)
    assert close(G[0], [0.355119, 0.344397, 0.300483]) and close(P[0],
                                                                 [0.516670, 0.523742, 0.463490])
    assert P[0].argmax() == 1
    G, P = consensus(*GAME)
    assert close(G[0], [0.627070, 0.371342, 0.001588]) and close(P[0],
                                                                 [0.965951, 0.937206, 0.002782])
    assert P[0].argmax() == 0 and hyper(consensus) == dict(rounds=5000, eta=0.1, lam=0.1)


def test_no_round_at_all_is_the_first_policy():
    G, P = consensus(*GAME, rounds=0)
    g = GAME[0] / GAME[0].sum(0)
    d = GAME[1] / GAME[1].sum(1, keepdim=True)
    assert close(G, g / g.sum(1, keepdim=True)) and close(P, d / d.sum(0))


def test_the_players_stay_distributions_and_candidates_may_change_places():
    gen, dis = rand(4, 2, 5).exp(), rand(4, 2, 5, seed=1).exp()
    dis = dis / dis.sum(1, keepdim=True)
    G, P = consensus(gen, dis, rounds=50)
    assert close(G.sum(-1), torch.ones(4, 2)) and close(P.sum(-2), torch.ones(4, 5))
    order = torch.tensor([3, 0, 4, 1, 2])
    for a, b in zip(consensus(gen[..., order], dis[..., order], rounds=50), (G, P)):
        assert close(a, b[..., order])


def test_padding_changes_nothing():
    gen, dis = (torch.cat([x, torch.zeros(2, 2)], 1)[None] for x in GAME)
    for a, b in zip(consensus(gen, dis, rounds=20), consensus(*GAME, rounds=20)):
        assert close(a[0, :, :3], b) and a.isfinite().all()
    G, _ = consensus(gen, dis, rounds=20)
    assert (G[0, :, 3:] == 0).all()


def test_a_strong_anchor_keeps_the_first_policies():
    first, held = consensus(*GAME, rounds=0), consensus(*GAME, rounds=300, lam=1e6)
    assert all(close(a, b, 1e-4) for a, b in zip(first, held))


def test_the_game_says_what_shapes_it_wants():
    with pytest.raises(UserError, match="correct first"):
        consensus(rand(3, 2).exp(), rand(3, 2).exp())


def test_views_of_answers_by_hand():
    answers, logp = ["5", "7", "5", ""], D([.4, .1, .2, .3]).log()
    given, right = D([[.2, .2, .3, .1], [.4, .1, .1, .3]]).log(), D([.9, .2, .5, .0])
    names, gen, dis = answer_views(answers, logp, given, right)
    assert names == ["5", "7", ""]
    assert close(gen, [[(.5 + 1.5) / 4, 2 / 4, (1 / 3) / 4], [(1 + .5) / 4, 1 / 4, 1 / 4]])
    assert close(dis, [[.9, .2, 0.], [.1, .8, 1.]])


def test_the_generators_view_is_unbiased():
    """Over many responses y ~ P(y|x), the mean ratio per answer is P(a|x,v)."""
    p, q = D([.5, .3, .2]), D([[.2, .2, .6], [.1, .8, .1]])
    y = torch.multinomial(p, 40000, replacement=True, generator=torch.Generator().manual_seed(0))
    answer = ["a" if i < 2 else "b" for i in y.tolist()]
    names, gen, _ = answer_views(answer, p.log()[y], q.log()[:, y],
                                 torch.full((40000,), .5).double())
    want = D([[.4, .6], [.9, .1]])[:, [0, 1] if names[0] == "a" else [1, 0]]
    assert close(gen, want, 0.02)


# --- self-evaluation ------------------------------------------------------------------------------


def test_labels_against_rivals_by_hand():
    assert close(rival_label(D([[1., 0., 0., 1.], [2., 2., 2., 2.], [3., 2., 1., 0.]])),
                 [[5 / 6, 1 / 6, 1 / 6, 5 / 6], [.5] * 4, [1., 2 / 3, 1 / 3, 0.]])
    assert close(rival_label(D([[1., 0.]])), [[1., 0.]])  # two samples: the paper's own label
    with pytest.raises(UserError, match="at least 2"):
        rival_label(D([[1.], [0.]]))


def test_self_eval_loss_by_hand():
    logits = D([[math.log(3), 0.], [0., 0.], [0., math.log(3)]])
    assert close(self_eval_loss(logits, D([1., .5, 1.])),
                 [-math.log(.75), math.log(2), -math.log(.25)])
    x = rand(3, 2).requires_grad_()
    label = D([.2, .5, .9])
    assert torch.autograd.gradcheck(lambda z: self_eval_loss(z, label), (x,))
    (g,) = torch.autograd.grad(self_eval_loss(x, label).sum(), x)  # least where p is the label
    assert close(g[:, 0], x.softmax(-1)[:, 0] - label)


def test_cuts_are_uniform_over_the_response():
    length = torch.tensor([4]).repeat(4000)
    cut = cut_points(length, torch.rand(4000, generator=torch.Generator().manual_seed(0)))
    assert set(cut.tolist()) == {1, 2, 3, 4} and torch.bincount(cut)[1:].min() > 900
    assert cut_points(torch.tensor([3, 3]), torch.tensor([0.0, 0.999])).tolist() == [1, 3]


def test_adaptive_best_of_n_between_its_limits():
    p = rand(50, 8).sigmoid()
    choice, used = adaptive_best(p, threshold=0.0)
    assert (choice == 0).all() and (used == 1).all()
    choice, used = adaptive_best(p, threshold=1.1)
    assert (choice == p.argmax(1)).all() and (used == 8).all()
    spent = [adaptive_best(p, threshold=t)[1].sum() for t in (0.0, .3, .6, .8, .9, 1.1)]
    assert spent == sorted(spent) and spent[0] < spent[2] < spent[-1]


def test_adaptive_best_of_n_by_hand():
    p = D([[.2, .9, .95, .1], [.2, .3, .1, .25], [.99, .2, .2, .2]])
    choice, used = adaptive_best(p, threshold=0.9)
    assert choice.tolist() == [1, 1, 0] and used.tolist() == [2, 4, 1]


def test_annealing_begins_greedy():
    assert [annealed(k) for k in (1, 2, 3, 4)] == [0, .5, .75, .875]


def test_pruning_keeps_the_best_half():
    p = D([[.1, .9, .3, .8], [.5, .5, .5, .5]])
    assert survivors(p).tolist() == [[False, True, False, True], [True, True, False, False]]
    assert survivors(p, keep=0.25).sum(1).tolist() == [1, 1] and survivors(p, keep=1.0).all()
    assert survivors(rand(3, 5), keep=0.5).sum(1).tolist() == [3, 3, 3]


def test_tokens_of_pruning_by_hand():
    length = torch.tensor([[3, 10, 8, 6]])
    alive = torch.tensor([[True, False, True, False]])
    assert pruned_tokens(length, 5, alive).tolist() == [3 + 5 + 8 + 5]
    assert pruned_tokens(length, 99, alive).tolist() == [27]
    assert pruned_tokens(length, 0, alive | True).tolist() == [27]


def test_votes():
    assert vote(["5", "7", "7"]) == "7" and vote(["5", "7", "7"], [3., 1., 1.]) == "5"
    assert vote(["5", "7"]) == "5" and vote(["", "", "7"]) == "7" and vote(["", ""]) == ""
    assert vote(["", "7"], [5.0, 0.0]) == "7"                      # no answer is none, however sure


def test_muted_tokens_are_never_written_and_the_model_stays_as_it_is():
    model, prompt = lively(0), [[1, 5, 9]]
    free = generate(model, prompt, 20, samples=64, stop=[],
                    generator=torch.Generator().manual_seed(0))
    ids = free.tokens[:, 3:].flatten().mode().values.item()
    quiet = generate(muted(model, [ids]), prompt, 20, samples=64, stop=[],
                     generator=torch.Generator().manual_seed(0))
    assert (free.tokens[:, 3:] == ids).any() and not (quiet.tokens[:, 3:] == ids).any()
    assert model.logits(rand(1, 32)).isfinite().all()
    assert close(muted(model, [3]).logits(rand(1, 32)).softmax(-1).sum(), 1.0)


def test_control_tokens_are_ids_that_no_text_has():
    ids = controls(lively(0), chain_tokenizer())
    assert sorted(vars(ids).values()) == list(range(28, 34))
    with pytest.raises(UserError, match="unused rows"):
        controls(lively(0), toyif_tokenizer())
    just, few = (SimpleNamespace(config=SimpleNamespace(vocab_size=n)) for n in (34, 33))
    assert controls(just, chain_tokenizer()) == ids
    with pytest.raises(UserError, match="this model has 5"):
        controls(few, chain_tokenizer())


def test_many_rows_are_scored_some_at_a_time():
    rows = [([i % 50], [1] * (1 + i % 3)) for i in range(300)]
    got = scored(None, rows, SimpleNamespace(device="cpu"), 0, lambda model, tokens, mask:
                 torch.stack([tokens[:, 0].float(), mask.sum(1)]))
    assert got.tolist() == [[i % 50 for i in range(300)], [1 + i % 3 for i in range(300)]]


def test_answers_are_read_after_the_last_two_tokens_whatever_follows():
    model, ids = lively(0), controls(lively(0), chain_tokenizer())
    rows = [([1, 5], [9, 7, ids.ask, ids.check]), ([1, 5, 6], [ids.ask, ids.check])]
    got = answered(ids, model, *collate(rows, 0))
    for i, (p, y) in enumerate(rows):
        logits = model.logits(model(torch.tensor([[*p, *y]])))[0]
        assert close(got[0, i], logits[-2, [ids.no, ids.yes]], 1e-4)
        assert close(got[1, i], logits[-1, [ids.right, ids.wrong]], 1e-4)
    assert got.shape == (2, 2, 2)


# --- fair comparisons -----------------------------------------------------------------------------


def test_every_place_to_begin_counts_alike():
    p, score = rand(20, 6), (rand(20, 6, seed=1) > 0).double()
    assert close(adaptive_value(p, score, threshold=-9.0), (score.mean(), 1.0), 1e-6)
    assert close(adaptive_value(p, score, threshold=9.0), (best_of_n(p, score, 6).mean(), 6.0),
                 1e-6)
    for k in (1, 4):
        assert close(adaptive_value(p, score, threshold=0.3),
                     adaptive_value(p.roll(k, 1), score.roll(k, 1), threshold=0.3), 1e-9)


def test_votes_over_places_by_hand():
    answers, score = [["5", "7", "5", "7"]], D([[1., 0., 1., 0.]])
    assert voted(answers, score, 1) == 0.5                         # one vote is one sample
    assert voted(answers, score, 3) == 0.5 and voted(answers, score, 4) == 1.0
    assert voted(answers, score, 4, D([[.1, .3, .1, .3]])) == 0.0
    assert voted([["1", "5", "5", "7", "7"]], D([[0., 1., 1., 0., 0.]]), 5) == 1.0  # in their order


def test_a_sample_that_ends_at_the_cut_is_finished():
    x = D([[.9, .1, .8, .2]])
    tries = SimpleNamespace(score=D([[1., 0., 0., 1.]]), length=torch.tensor([[2, 3, 4, 5]]), no=x,
                            right=x, logp=x, stated=[["a", "b", "b", "a"]], problems=[0])
    steady = SimpleNamespace(tries=tries, N=4, best=[0.5] * 4, votes=[0.5] * 4, mean=3.5)
    found = signals(SimpleNamespace(say=print), steady, x, 3, 0.5, SimpleNamespace(split="val"))
    assert found["... if unfinished|auroc"] == 0 and found["P(NO) at the cut|auroc"] == 0.75


def test_a_value_between_two_costs():
    costs, values = [2, 1, 4], [10.0, 0.0, 20.0]
    assert [at_cost(costs, values, x) for x in (0, 1, 1.5, 2, 3, 9)] == [0, 0, 5, 10, 15, 20]
