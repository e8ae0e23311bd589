"""specdec.py: the rule is exact, the loop is lossless, drafts learn what AdaSPEC says, runs run."""
import itertools
import json
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import specdec
from conftest import chi_square, close, merged, rand, rule, tiny_model
from data import text
from data.run import UserError, claims_of, configure, hyper
from data.tokenizer import bytes_tokenizer
from model import ModelConfig, generate, init, save
from specdec import block_efficiency
from wiring import catch

TINY = ["--config", "tiny"]


COST = SimpleNamespace(c=0.1, v=[1 + 0.05 * i for i in range(40)])


def speedup(alpha, gamma, c):
    """Over plain decoding, 2211.17192:  E / (γ c + 1)."""
    return block_efficiency(alpha, gamma) / (gamma * c + 1)


def drafters(target, draft, temperature=0.0, top_k=0, top_p=1.0):
    vocab = target.config.vocab_size
    return dict(small=specdec.Small(draft, vocab, vocab, (temperature, top_k, top_p)),
                lookup=specdec.Lookup())


# --- the rule -------------------------------------------------------------------------------------


def law_of(p, q, verify=specdec.verify, n=40):
    """The law of the first emitted token, by integrating over a fine grid of the three uniforms."""
    grid = (torch.arange(n, dtype=torch.float64) + 0.5) / n
    u = torch.cartesian_prod(grid, grid, grid)                                           # [n³, 3]
    x = specdec.draw(q.expand(len(u), -1), u[:, 0])
    both = torch.stack([p, p]).expand(len(u), 2, -1)
    kept, token = verify(both, q.expand(len(u), 1, -1), x[:, None],
                         torch.ones(len(u), dtype=torch.long), u[:, None, 1:].expand(-1, 2, -1))
    first = torch.where(kept > 0, x, token)
    return torch.bincount(first, minlength=len(p)).double() / len(u), (kept > 0).double().mean()


@pytest.mark.parametrize("p, q, alpha", [
    ((.5, .3, .2, 0), (.25, .25, .4, .1), .7), ((.1, .6, .3), (.5, .3, .2), .6),
    ((.5, .3, .2), (.2, .5, .3), .7)])
def test_the_emitted_token_has_the_target_s_law_and_is_kept_with_the_overlap(p, q, alpha):
    p, q = (torch.tensor(x, dtype=torch.float64) for x in (p, q))
    law, kept = law_of(p, q)
    assert close(law, p, 0.02) and abs(kept - alpha) < 0.02
    assert close(torch.minimum(p, q).sum(), alpha)


@pytest.mark.parametrize("p, q, residual", [
    ((.5, .3, .2, 0), (.25, .25, .4, .1), (.833333, .166667, 0, 0)),
    ((.1, .6, .3), (.5, .3, .2), (0, .75, .25)), ((.5, .3, .2), (.2, .5, .3), (1, 0, 0))])
def test_after_a_rejection_the_residual_is_drawn(p, q, residual):
    p, q = (torch.tensor(x, dtype=torch.float64) for x in (p, q))
    n = 3000
    u = torch.full((n, 2, 2), 0.999999, dtype=torch.float64)          # every test fails where p < q
    u[:, :, 1] = ((torch.arange(n) + 0.5) / n)[:, None]
    worst = (p / q).argmin()                                             # the token most overdrawn
    kept, token = specdec.verify(torch.stack([p, p]).expand(n, 2, -1), q.expand(n, 1, -1),
                                 worst.expand(n, 1), torch.ones(n, dtype=torch.long), u)
    assert (kept == 0).all()
    assert close(torch.bincount(token, minlength=len(p)) / n, torch.tensor(residual), 1e-3)


def test_a_point_mass_is_the_one_hot_law():
    g = torch.Generator().manual_seed(0)
    p = torch.rand(64, 4, 5, generator=g, dtype=torch.float64).softmax(-1)
    x, count = torch.randint(5, (64, 3), generator=g), torch.randint(4, (64,), generator=g)
    u = torch.rand(64, 4, 2, generator=g, dtype=torch.float64)
    hot = torch.nn.functional.one_hot(x, 5).double()
    for a, b in zip(specdec.verify(p, None, x, count, u), specdec.verify(p, hot, x, count, u)):
        assert torch.equal(a, b)


def test_equal_laws_keep_everything_and_disjoint_ones_nothing():
    p = torch.tensor([.5, .5, 0, 0], dtype=torch.float64)
    q = torch.tensor([0, 0, .5, .5], dtype=torch.float64)
    u = torch.rand(50, 4, 2, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    count = torch.full((50,), 3)
    kept, _ = specdec.verify(p.expand(50, 4, -1), p.expand(50, 3, -1),
                             torch.zeros(50, 3, dtype=torch.long), count, u)
    assert (kept == 3).all()
    kept, token = specdec.verify(p.expand(50, 4, -1), q.expand(50, 3, -1), torch.full((50, 3), 2),
                                 count, u)
    assert (kept == 0).all() and (token < 2).all()


def test_padding_behind_a_row_s_own_drafts_is_never_kept():
    p = torch.tensor([1.0, 0], dtype=torch.float64).expand(2, 4, 2)
    kept, token = specdec.verify(p, None, torch.zeros(2, 3, dtype=torch.long), torch.tensor([1, 0]),
                                 torch.full((2, 4, 2), .5, dtype=torch.float64))
    assert kept.tolist() == [1, 0] and token.tolist() == [0, 0]


def test_no_token_of_no_mass_is_kept_or_drawn_at_the_ends_of_the_uniform_numbers():
    p, one = torch.tensor([[0, .5, .5, 0]], dtype=torch.float64), torch.tensor([1])
    ends = torch.tensor([0.0, 0.499, 0.5, 1 - 1e-9], dtype=torch.float64)
    assert specdec.draw(p.expand(4, 4), ends).tolist() == [1, 1, 2, 2]
    u = torch.zeros(1, 2, 2, dtype=torch.float64)
    kept, token = specdec.verify(p.expand(1, 2, 4), None, torch.tensor([[3]]), one, u)
    assert (kept.item(), token.item()) == (0, 1)
    u[..., 0] = 1.0                              # rejected by rounding, where p = q: one of p
    kept, token = specdec.verify(p.expand(1, 2, 4), p[None], torch.tensor([[2]]), one, u)
    assert (kept.item(), token.item()) == (0, 1)


def test_lenience_keeps_more_and_bounds_a_token_s_probability_by_p_over_l():
    p, q = (torch.tensor(x, dtype=torch.float64) for x in ((.5, .3, .2, 0), (.25, .25, .4, .1)))
    law, kept = law_of(p, q, partial(specdec.verify, lenience=0.6))
    assert kept > 0.75 and (law <= p / 0.6 + 0.02).all() and not close(law, p, 0.02)


@pytest.mark.parametrize("alpha, row", [
    (.7, {2: (2.190, 1.825), 4: (2.773, 1.981), 8: (3.199, 1.777)}),
    (.8, {2: (2.440, 2.033), 4: (3.362, 2.401), 8: (4.329, 2.405)}),
    (.9, {2: (2.710, 2.258), 4: (4.095, 2.925), 8: (6.126, 3.403)})])
def test_block_efficiency_and_speedup_by_the_formula(alpha, row):
    for gamma, (E, times) in row.items():
        assert abs(block_efficiency(alpha, gamma) - E) < 5e-4
        assert abs(speedup(alpha, gamma, 0.1) - times) < 5e-4
    assert block_efficiency(1.0, 4) == 5


def test_adaspec_s_own_numbers_by_the_formula():
    assert abs(block_efficiency(.5758, 4) - 2.208) < 1e-3
    assert abs(block_efficiency(.6263, 4) - 2.418) < 1e-3
    assert abs(speedup(.5758, 4, .05) - 1.840) < 1e-3
    assert abs(speedup(.6263, 4, .05) - 2.015) < 1e-3


BEST = {.5: (4, 3, 2, 1), .7: (8, 6, 4, 3), .8: (11, 8, 6, 4), .9: (19, 13, 10, 7)}


@pytest.mark.parametrize("alpha, i", list(itertools.product(BEST, range(4))))
def test_the_optimal_length_is_the_best_fixed_one_where_the_chance_is_constant(alpha, i):
    c = (.02, .05, .1, .2)[i]
    cost = SimpleNamespace(c=c, v=[1.0] * 50)
    k = next(k for k in range(49) if not specdec.pays(
        torch.full((1, k + 1), alpha, dtype=torch.float64), cost))
    best = max(speedup(alpha, n, c) for n in range(40))
    assert close(speedup(alpha, BEST[alpha][i], c), best, 1e-12)
    assert k == BEST[alpha][i] or (alpha, c) == (.5, .2) and close(speedup(alpha, k, c), best,
                                                                   1e-12)


def test_the_optimal_length_is_shorter_where_verification_costs():
    def length(v):
        cost = SimpleNamespace(c=.05, v=v)
        return next(k for k in range(49) if not specdec.pays(
            torch.full((1, k + 1), .8, dtype=torch.float64), cost))
    assert length([1 + .1 * k for k in range(50)]) < length([1.0] * 50)


def test_the_optimal_length_explores_now_and_then():
    """and is never longer than gamma"""
    tally, cost = specdec.Tally(), SimpleNamespace(c=1.0, v=[1.0] * 9)
    tally.tries, tally.hits = [1000] * 10, [0] * 10
    for rounds, wanted in ((16, True), (17, False)):
        tally.passes = specdec.Counter({0: rounds})
        assert specdec.optimal(0, torch.ones(1, 0), tally, cost) == wanted
    tally.hits = tally.tries
    for k, wanted in ((2, True), (3, False)):
        assert specdec.optimal(k, torch.ones(1, k), tally, SimpleNamespace(c=0, v=[1.0] * 9),
                               gamma=3) == wanted


def test_other_lengths_by_hand():
    assert [specdec.fixed(k, gamma=2) for k in range(4)] == [True, True, False, False]
    reach = SimpleNamespace(value=torch.tensor([3, 5]))
    assert specdec.heuristic(3, reach).tolist() == [False, True]
    sure = torch.tensor([[.9, .39], [.1, .41]])
    assert specdec.confident(2, sure).tolist() == [False, True] and specdec.confident(0,
                                                                                      sure[:, :0])


# --- the loop -------------------------------------------------------------------------------------


PROMPTS = [[1, 2, 3], [4], [5, 6, 7, 1, 2], [2, 2], [3, 1, 4, 1, 5, 2, 6]]


@pytest.mark.parametrize("name, kw", [("fixed", dict(gamma=1)), ("fixed", dict(gamma=4)),
                                      ("fixed", dict(gamma=8)),
                                      ("fixed", dict(gamma=0)), ("heuristic", {}),
                                      ("confident", {}), ("optimal", {})])
@pytest.mark.parametrize("which", ["small", "lookup"])
def test_greedy_output_is_the_target_s_own_token_for_token(name, kw, which):
    """also with EOS inside a block, prompts of different lengths, one at a time and together"""
    target, draft = tiny_model(eos=(0,)), tiny_model(layers=1, seed=5)
    for prompts in (PROMPTS, PROMPTS[:1], PROMPTS[1:2]):
        whole = generate(target, prompts, 30, temperature=0)
        roll, tally = specdec.speculate(target, drafters(target, draft)[which], prompts, 30,
                                        rule(name, **kw),
                                        cost=COST)
        assert torch.equal(roll.tokens, whole.tokens) and torch.equal(roll.mask, whole.mask)
        assert close(roll.logp, whole.logp, 1e-9) and torch.equal(roll.finished, whole.finished)


def test_greedy_output_on_a_thousand_prompts():
    target, draft = tiny_model(vocab=32, eos=(0,), layers=3), tiny_model(vocab=32, layers=1, seed=3)
    g = torch.Generator().manual_seed(0)
    prompts = [torch.randint(1, 32, (int(torch.randint(1, 12, (1,), generator=g)),),
                             generator=g).tolist()
               for _ in range(1000)]
    whole = generate(target, prompts, 24, temperature=0)
    for i in range(0, 1000, 250):
        roll, tally = specdec.speculate(target, drafters(target, draft)["small"],
                                        prompts[i:i + 250], 24, rule("fixed"))
        mine = [whole.completions()[i + j] for j in range(250)]
        assert roll.completions() == mine
    assert 0 < tally.acceptance < 1


def test_a_draft_that_is_the_target_is_always_kept():
    target = tiny_model()
    for temperature in (0.0, 1.0):
        drafter = drafters(target, target, temperature)["small"]
        roll, tally = specdec.speculate(target, drafter, PROMPTS, 26, rule("fixed", gamma=4),
                                        temperature=temperature)
        assert tally.acceptance == 1 and tally.efficiency == 5
        assert specdec.independent(tally, {}, None) == dict(independent=5)


def test_what_a_row_draws_does_not_depend_on_the_other_rows():
    target, draft = tiny_model(eos=(0,)), tiny_model(layers=1, seed=5)
    seed = torch.Generator().manual_seed(3)
    together, _ = specdec.speculate(target, drafters(target, draft, 1.0)["small"], PROMPTS, 20,
                                    rule("fixed"),
                                    temperature=1.0, generator=seed)
    u = torch.rand(len(PROMPTS), 25, 3, generator=torch.Generator().manual_seed(3))
    for i, prompt in enumerate(PROMPTS):
        original = torch.rand
        try:
            torch.rand = lambda *a, **k: u[i:i + 1]
            alone, _ = specdec.speculate(target, drafters(target, draft, 1.0)["small"], [prompt],
                                         20, rule("fixed"),
                                         temperature=1.0)
        finally:
            torch.rand = original
        assert alone.completions()[0] == together.completions()[i]


@pytest.mark.parametrize("name, cost", [("fixed", COST), ("optimal", COST),
                                        ("optimal", SimpleNamespace(c=3.0, v=[1.0] * 40))])
def test_what_a_draft_says_is_what_it_says_of_the_whole_text(name, cost):
    """its cache has no holes: also after rounds without a draft, and where rows have left the
    batch"""
    target = tiny_model(sharp=1.0, eos=(0,) if cost is COST else ())
    draft, seen = tiny_model(layers=1, seed=5, sharp=1.0), []

    class Watching(specdec.Small):
        def propose(self, text, length, u, more):
            out = super().propose(text, length, u, more)
            for b in range(len(text)) if out[0].size(1) else ():
                whole = draft.logits(draft(text[b:b + 1, :length[b]])[:, -1])
                seen.append(close(out[1][b, 0], whole[0].softmax(-1), 1e-5))
            return out
    _, tally = specdec.speculate(target, Watching(draft, 8, 8, (1.0, 0, 1.0)), PROMPTS * 3, 40,
                                 rule(name),
                                 cost=cost, temperature=1.0,
                                 generator=torch.Generator().manual_seed(0))
    assert len(seen) > 10 and all(seen)
    assert name == "fixed" or tally.passes[0] > 5 or cost is COST


def test_what_the_target_says_is_what_it_says_of_the_whole_text(monkeypatch):
    """its cache is rolled back right: the verifier's laws are those of a fresh pass over the
    committed text"""
    target, draft, seen = tiny_model(sharp=1.0), tiny_model(layers=1, seed=5, sharp=1.0), []
    texts = []

    class Watching(specdec.Small):
        def propose(self, text, length, u, more):
            texts.append((text, length))
            return super().propose(text, length, u, more)

    def watched(p, q, drafted, count, u, *, lenience=1.0):
        text, length = texts[-1]
        for b in range(len(p)):
            whole = torch.cat([text[b, :length[b]], drafted[b, :count[b]]])[None]
            law = target.logits(target(whole)[:, length[b] - 1:]).softmax(-1)[0]
            seen.append(close(p[b, :count[b] + 1], law, 1e-5))
        return specdec_verify(p, q, drafted, count, u)
    monkeypatch.setattr(specdec, "verify", watched)
    specdec.speculate(target, Watching(draft, 8, 8, (1.0, 0, 1.0)), PROMPTS, 30,
                      rule("fixed", gamma=3),
                      temperature=1.0, generator=torch.Generator().manual_seed(0))
    assert len(seen) > 40 and all(seen)


def test_exploration_counts_rounds_and_not_rows():
    target, draft = tiny_model(), tiny_model(layers=1, seed=5)
    hopeless = SimpleNamespace(c=50.0, v=[1.0] * 40)
    for prompts in (PROMPTS[:1], PROMPTS[:1] * 16):
        _, tally = specdec.speculate(target, drafters(target, draft)["small"], prompts, 40,
                                     rule("optimal"), cost=hopeless)
        assert tally.passes[1] == -(-tally.passes.total() // 16)


def test_drafts_behind_a_stop_do_not_count():
    target = tiny_model(eos=tuple(range(4)))
    for prompt in PROMPTS:
        whole = generate(target, [prompt], 20, temperature=0)
        _, tally = specdec.speculate(target, drafters(target, target)["small"], [prompt], 20,
                                     rule("fixed", gamma=8))
        made = int(whole.mask.sum())
        assert tally.tokens == made - 1 and tally.kept.total() <= made - 1
        assert tally.acceptance == 1 or tally.proposed == 0


def test_a_round_is_committed_up_to_its_first_stop_by_hand():
    """9 stops. Whole; a stop in the draft; as the token after it; behind it; the last token to
    go"""
    start = torch.full((5,), 2)
    flight = specdec.Flight(torch.zeros(5, 2, dtype=torch.long), start, 4, 2, torch.tensor([9]),
                            None)
    flight.end = torch.tensor([6, 6, 6, 6, 5])
    block = torch.tensor([[1, 2, 3], [1, 9, 3], [1, 2, 9], [1, 2, 9], [1, 2, 3]])
    logps = torch.arange(10.).expand(5, 3, 10) / 10
    fresh, early = flight.commit(block, logps, torch.tensor([2, 2, 2, 1, 2]))
    assert fresh.tolist() == [3, 2, 3, 2, 3] and flight.length.tolist() == [5, 4, 5, 4, 5]
    assert early.tolist() == [False, True, False, False, False]
    assert flight.done.tolist() == [False, True, True, False, True]
    assert torch.equal(flight.text[:, 2:5], block) and close(flight.logp[:, 2:5], block / 10)


def test_no_new_token_is_no_token():
    target = tiny_model()
    roll, tally = specdec.speculate(target, specdec.Lookup(), [[1, 2], [3]], 0, rule())
    for mine, plain in zip(roll, generate(target, [[1, 2], [3]], 0, temperature=0)):
        assert torch.equal(mine, plain) if isinstance(mine, torch.Tensor) else mine == plain
    assert tally.rounds == tally.tokens == 0


def test_log_probs_are_those_of_the_law_that_is_sampled_from():
    """and a tally that goes on does not count twice"""
    target, draft, tally = tiny_model(sharp=1.0), tiny_model(layers=1, seed=5), specdec.Tally()
    sampling = dict(temperature=0.7, top_k=5, top_p=0.9)
    for _ in range(2):
        before = tally.rounds
        roll, _ = specdec.speculate(target, drafters(target, draft, **sampling)["small"],
                                    [[1, 2, 3]] * 20, 6, rule(), tally=tally, **sampling)
        assert roll.row_steps == tally.rounds - before > 0
    p = specdec.law(target.logits(target(roll.tokens)), 0.7, 5, 0.9)[:, 2:-1]
    assert close(p.gather(2, roll.tokens[:, 3:, None]).squeeze(2).log(), roll.logp[:, 3:], 1e-5)


def test_nothing_is_drafted_beyond_the_context():
    """a row with far to go beside one that is nearly full, which is always kept"""
    target, widths = tiny_model(context=20), []
    prompts = [[1, 2, 3, 1, 5, 6, 7, 1, 1, 2, 3, 4], [4, 2]]
    whole = generate(target, prompts, 8, temperature=0)

    class Knowing(specdec.Lookup):
        def propose(self, text, length, u, more):
            k, sure, count = 0, torch.ones(len(text), 9), torch.zeros_like(length)
            while (want := more(k, sure[:, :k])).any():
                k, count = k + 1, count + want
            drafted = [whole.tokens[r].roll(-n.item())[:k] + r for r, n in zip(self.rows, length)]
            return torch.stack(drafted) % 8, None, count, sure[:, :k]

        def start(self, prompts, length, rows, new):
            self.rows = [0, 1]

        def keep(self, order):
            self.rows = [self.rows[i] for i in order.tolist()]
    target.register_forward_pre_hook(
        lambda model, args: widths.append(args[0].size(1) + args[1].used) if len(args) > 1 else 0)
    roll, tally = specdec.speculate(target, Knowing(), prompts, 8, rule(gamma=4))
    assert roll.completions() == whole.completions() and max(widths) == 20
    assert tally.kept[3] and tally.passes.keys() & {1, 2, 3}           # kept whole, then held back


def test_the_shorter_of_two_contexts_counts():
    target, draft = tiny_model(context=40), tiny_model(layers=1, seed=5, context=20)
    for prompt in ([1] * 12, [1] * 13):
        drafter = drafters(target, draft)["small"]
        if len(prompt) == 13:
            with pytest.raises(UserError, match="exceed the context of 20"):
                specdec.speculate(target, drafter, [prompt], 8, rule())
        else:
            roll, _ = specdec.speculate(target, drafter, [prompt], 8, rule())
            whole = generate(target, [prompt], 8, temperature=0)
            assert roll.completions() == whole.completions()


def test_a_draft_says_only_words_and_how_sure_it_is():
    """no padding row of its head; of each drafted token its own probability, untempered"""
    draft = tiny_model(vocab=12, layers=1, seed=5, sharp=1.0)
    text = torch.tensor([[1, 2, 3, 0, 0, 0], [4, 5, 6, 7, 1, 0]]).repeat(20, 1)
    length = torch.tensor([3, 5]).repeat(20)
    drafter = specdec.Small(draft, 10, 8, (0.5, 0, 1.0))
    drafter.start(text[:2], length[:2], torch.arange(2).repeat(20), 9)
    u = torch.rand(40, 9, 3, generator=torch.Generator().manual_seed(0))
    wants = torch.tensor([[1, 1], [0, 1], [1, 1], [0, 0]]).bool()    # who stopped does not go on
    drafted, q, count, sure = drafter.propose(text, length, u, lambda k, sure: wants[k].repeat(20))
    assert drafted.max() == 7 and q.shape == (40, 3, 10) and (q[..., 8:] == 0).all()
    assert count.tolist() == [1, 3] * 20
    for b in range(40):
        whole = torch.cat([text[b, :length[b]], drafted[b]])[None]
        z = draft.logits(draft(whole))[0, length[b] - 1:-1, :8]
        assert close(q[b, :, :8], (2 * z).softmax(-1), 1e-5)
        assert close(sure[b], z.softmax(-1).gather(1, drafted[b, :, None])[:, 0], 1e-5)


def test_lookup_drafts_what_followed_the_longest_match_where_it_stood_last():
    text = torch.tensor([[1, 2, 3, 9, 1, 2, 3, 0], [7, 8, 5, 7, 8, 6, 7, 8],
                         [1, 2, 3, 4, 5, 6, 7, 8], [5, 1, 2, 6, 2, 9, 1, 2]])
    u, drafter = torch.zeros(4, 9, 3), specdec.Lookup()
    drafter.start(None, None, torch.arange(4), 9)

    def drafts(length, most, rows=slice(None)):
        drafted, q, count, sure = drafter.propose(text[rows], torch.tensor(length), u[rows],
                                                  lambda k, sure: torch.tensor(k < most))
        assert q is None and (sure == 1).all() and sure.shape == drafted.shape
        return [x[:n] for x, n in zip(drafted.tolist(), count.tolist())]
    assert drafts([7, 8, 8, 8], 3) == [[9, 1, 2], [6, 7, 8], [], [6, 2, 9]]
    assert drafts([7, 8, 8, 8], 9) == [[9, 1, 2, 3], [6, 7, 8], [], [6, 2, 9, 1, 2]]
    drafter.keep(torch.tensor([3, 1]))
    text[3, 7], text[1, 7] = 2, 8
    assert drafts([8, 8], 2, [3, 1]) == [[6, 2], [6, 7]]
    one = specdec.lookup(n=1)
    one.start(None, None, torch.arange(4), 9)
    drafter = one
    assert drafts([7, 8, 8, 8], 2) == [[9, 1], [6, 7], [], [9, 1]]


def test_the_reach_follows_each_row_s_last_verdict(monkeypatch):
    """it starts at 5, two more after a block kept whole, else one fewer, and at least 1"""
    reach = specdec.Reach(torch.zeros(4, dtype=torch.long))
    for kept, count, value in (([5, 4, 0, 5], [5, 5, 5, 5], [7, 4, 4, 7]),
                               ([7, 0, 0, 1], [7, 4, 4, 7], [9, 3, 3, 6])):
        reach.note(torch.tensor(kept), torch.tensor(count))
        assert reach.value.tolist() == value
    reach.keep(torch.tensor([3, 1]))
    assert reach.value.tolist() == [6, 3]
    for _ in range(9):
        reach.note(torch.tensor([0, 0]), torch.tensor([1, 1]))
    assert reach.value.tolist() == [1, 1]
    target, draft, reaches = tiny_model(), tiny_model(layers=1, seed=5), 5
    rounds = catch(monkeypatch, specdec, "one_round")["one_round"]
    specdec.speculate(target, drafters(target, draft)["small"], [[1, 2, 3]], 40, rule("heuristic"))
    left = 39
    for kept, count in (x.out for x in rounds):
        assert count == min(reaches, 16, left - 1)
        reaches, left = reaches + 2 if kept == count else max(1, reaches - 1), left - kept - 1
    assert left == 0 and len(rounds) > 8


# --- sampling is exact ----------------------------------------------------------------------------


def exact_law(target, prompt, steps, **sampling):
    """The target's law over sequences of `steps` tokens after the prompt, flat [V^steps]."""
    V = target.config.vocab_size
    law, rows = torch.ones(1, dtype=torch.float64), torch.tensor([prompt])
    for _ in range(steps):
        p = specdec.law(target.logits(target(rows)[:, -1]).double(), **sampling)         # [n, V]
        law = (law[:, None] * p).flatten()
        rows = torch.cat([rows.repeat_interleave(V, 0),
                          torch.arange(V).repeat(len(rows))[:, None]], 1)
    return law


def sample_counts(target, drafter, prompt, draws, length, at_once=2000, seed=0, **sampling):
    """How often each sequence of three tokens came first, in `draws` speculative generations of
    eight."""
    V, counts, g = target.config.vocab_size, 0, torch.Generator().manual_seed(seed)
    for _ in range(draws // at_once):
        roll, tally = specdec.speculate(target, drafter, [prompt] * at_once, 8, length, cost=COST,
                                        generator=g, **sampling)
        y = roll.tokens[:, len(prompt):len(prompt) + 3]
        counts = counts + torch.bincount((y[:, 0] * V + y[:, 1]) * V + y[:, 2], minlength=V ** 3)
    return counts.double(), tally


SETTINGS = [("small", "fixed", dict(gamma=2), dict(temperature=1.0)),
            ("small", "fixed", dict(gamma=1), dict(temperature=0.7)),
            ("small", "fixed", dict(gamma=4), dict(temperature=1.5)),
            ("small", "optimal", {}, dict(temperature=1.0)),
            ("small", "heuristic", {}, dict(temperature=1.0)),
            ("small", "confident", dict(least=0.2), dict(temperature=1.0)),
            ("small", "fixed", dict(gamma=2), dict(temperature=1.0, top_k=4)),
            ("small", "fixed", dict(gamma=2), dict(temperature=1.0, top_p=0.8)),
            ("lookup", "fixed", dict(gamma=2), dict(temperature=1.0))]


@pytest.mark.parametrize("which, length, kw, sampling", SETTINGS)
def test_samples_have_the_target_s_law(which, length, kw, sampling):
    """chi-square of the first three tokens, 20,000 draws in batches, 180,000 over the settings"""
    target, draft, prompt = tiny_model(sharp=1.0), tiny_model(layers=1, seed=5, sharp=1.0), [1, 2,
                                                                                             1, 3]
    counts, tally = sample_counts(target, drafters(target, draft, **sampling)[which], prompt,
                                  20_000, rule(length, **kw), **sampling)
    df, p = chi_square(counts, exact_law(target, prompt, 3, **sampling))
    assert df > 10 and p > 1e-4
    assert 0.05 < tally.acceptance < 0.98 and (kw.get("gamma") == 1 or tally.kept[1] > 0)


@pytest.mark.slow
@pytest.mark.parametrize("which, length, kw, sampling", SETTINGS)
def test_samples_have_the_target_s_law_in_a_hundred_thousand_draws(which, length, kw, sampling):
    target, draft, prompt = tiny_model(sharp=1.0), tiny_model(layers=1, seed=5, sharp=1.0), [1, 2,
                                                                                             1, 3]
    counts, _ = sample_counts(target, drafters(target, draft, **sampling)[which], prompt, 100_000,
                              rule(length, **kw), seed=1, **sampling)
    assert chi_square(counts, exact_law(target, prompt, 3, **sampling))[1] > 1e-4


def from_p(p, q, drafted, count, u, *, lenience=1.0):
    """Broken: after a rejection a token of p, not of the residual."""
    kept, _ = specdec_verify(p, q, drafted, count, u)
    row = torch.arange(len(p))
    return kept, specdec.draw(p[row, kept], u[row, kept, 1])


def bonus_of_q(p, q, drafted, count, u, *, lenience=1.0):
    """Broken: the token after a block kept whole is drawn from the draft's law."""
    kept, token = specdec_verify(p, q, drafted, count, u)
    row = torch.arange(len(p))
    if q is None:
        return kept, token
    return kept, torch.where(kept == count,
                             specdec.draw(q[row, (kept - 1).clamp(min=0)], u[row, kept, 1]), token)


def always(p, q, drafted, count, u, *, lenience=1.0):
    """Broken: everything is kept."""
    return count, specdec.draw(p[torch.arange(len(p)), count], u[torch.arange(len(p)), count, 1])


specdec_verify = specdec.verify


@pytest.mark.parametrize("broken", [from_p, bonus_of_q, always])
def test_a_broken_rule_fails_the_same_test(broken, monkeypatch):
    monkeypatch.setattr(specdec, "verify", broken)
    target, draft, prompt = tiny_model(sharp=1.0), tiny_model(layers=1, seed=5, sharp=1.0), [1, 2,
                                                                                             1, 3]
    counts, _ = sample_counts(target, drafters(target, draft, 1.0)["small"], prompt, 20_000,
                              rule("fixed", gamma=1),
                              temperature=1.0)
    assert chi_square(counts, exact_law(target, prompt, 3, temperature=1.0))[1] < 1e-6


def test_drafts_at_another_temperature_than_q_says_fail_the_same_test():
    target, draft, prompt = tiny_model(sharp=1.0), tiny_model(layers=1, seed=5, sharp=1.0), [1, 2,
                                                                                             1, 3]

    class Lying(specdec.Small):
        def propose(self, text, length, u, more):
            drafted, q, count, sure = super().propose(text, length, u, more)
            if q is not None:
                q = q.pow(0.5) / q.pow(0.5).sum(-1, keepdim=True)
            return drafted, q, count, sure
    counts, _ = sample_counts(target, Lying(draft, 8, 8, (1.0, 0, 1.0)), prompt, 20_000,
                              rule("fixed", gamma=2),
                              temperature=1.0)
    assert chi_square(counts, exact_law(target, prompt, 3, temperature=1.0))[1] < 1e-6


# --- training drafts ------------------------------------------------------------------------------

P5 = [(.7, .2, .1), (.4, .4, .2), (.9, .05, .05), (.34, .33, .33), (.6, .3, .1)]
Q5 = [(.4, .4, .2), (.3, .4, .3), (.5, .3, .2), (.6, .2, .2), (.55, .3, .15)]
R5 = [(.65, .25, .1), (.3, .3, .4), (.85, .1, .05), (.5, .3, .2), (.6, .25, .15)]


def logits(rows):
    return torch.tensor(rows, dtype=torch.float64).log()


def per_token(name, q, p, **kw):
    """A row of LOSSES on given laws: the head is the identity."""
    eye = torch.eye(q.size(-1), dtype=q.dtype)
    return specdec.LOSSES[name](q, eye, p, eye, **kw)


@pytest.mark.parametrize("name, value", [("forward_kl", .219488), ("reverse_kl", .242779),
                                         ("jsd", .056101), ("tvd", .3)])
def test_divergences_by_hand(name, value):
    p, q = logits([(.5, .3, .15, .05)]), logits([(.25, .25, .4, .1)])
    assert abs(per_token(name, q, p).item() - value) < 1e-6
    assert abs(per_token(name, p, p).item()) < 1e-12


@pytest.mark.parametrize("name", specdec.LOSSES)
def test_divergences_are_positive_and_their_gradients_right(name):
    z, p = rand(6, 5, seed=1).requires_grad_(), rand(6, 5, seed=2)
    assert (per_token(name, z, p) > 0).all()
    assert torch.autograd.gradcheck(lambda z: per_token(name, z, p), z)
    g, = torch.autograd.grad(per_token(name, z, p).sum(), z)
    if name == "forward_kl":
        assert close(g, z.softmax(-1) - p.softmax(-1), 1e-9)
    if name == "tvd":
        assert (g.abs().sum(-1) <= 0.5).all()


def test_adaspec_s_selection_by_hand():
    p, q, r = (logits(x) for x in (P5, Q5, R5))
    loss, ref = per_token("forward_kl", q, p), per_token("forward_kl", r, p)
    assert close(loss, [.1838, .0340, .3701, .1374, .0117], 5e-5)
    assert close(ref, [.0072, .0915, .0168, .0656, .0141], 5e-5)
    assert close(loss - ref, [.1765, -.0575, .3533, .0718, -.0025], 1.1e-4)
    assert abs(torch.quantile(loss - ref, .6).item() - .1137) < 1e-4
    chosen = specdec.adaspec(loss, ref)
    assert chosen.tolist() == [True, False, True, False, False]
    assert abs(loss[chosen].mean().item() - .27695) < 1e-5 and abs(loss.mean().item()
                                                                   - .14739) < 1e-5
    assert abs(torch.minimum(p.exp(), q.exp()).sum(-1).mean().item() - .7780) < 1e-9
    assert specdec.smallest(loss, ref).tolist() == [False, True, False, False, True]
    assert specdec.easiest(loss, ref).tolist() == [True, False, False, False, True]


def test_selections_in_their_limits():
    loss, ref = rand(50, seed=1), rand(50, seed=2)
    assert specdec.adaspec(loss, ref, k=1.0).all() and len(loss[specdec.every()]) == len(loss)
    assert specdec.adaspec(loss, loss).all()                  # no gap anywhere: ties, all are taken
    assert not (specdec.adaspec(loss, ref, k=.4) & specdec.smallest(loss, ref, k=.4)).any()
    lots = specdec.uniform(SimpleNamespace(generator=torch.Generator().manual_seed(0)), *[loss] * 4)
    assert specdec.at_random(lots, k=.4).sum() == specdec.adaspec(loss, ref, k=.4).sum() == 20
    assert lots.unique().numel() == 50 and 0 <= lots.min() and lots.max() < 1


def setting(select="every", micro=64, **kw):
    """(student, rows) of one step on random models."""
    target, draft, ref = (tiny_model(vocab=16, seed=s, sharp=1.0, layers=n)
                          for s, n in ((0, 2), (1, 1), (2, 1)))
    g = torch.Generator().manual_seed(0)
    rows = [(torch.randint(16, (3,), generator=g).tolist(),
             torch.randint(16, (n,), generator=g).tolist())
            for n in (5, 8, 2)]
    chosen = specdec.SELECT[select]
    f = SimpleNamespace(loss=specdec.forward_kl, select=partial(chosen, **{**hyper(chosen), **kw}))
    c = SimpleNamespace(micro=micro, device="cpu", lr=1e-3, seed=0)
    student = specdec.Student(draft.requires_grad_(), target, 16, c, f)
    student.reference = ref
    return student, rows


def gradient(student, rows, known=None):
    student.draft.zero_grad()
    told = student.learn(rows, known)
    return torch.cat([p.grad.flatten() for p in student.draft.parameters()]), told


def test_adaspec_of_all_tokens_is_distillspec():
    a, told = gradient(*setting("adaspec", k=1.0))
    b, plain = gradient(*setting())
    assert close(a, b, 1e-12) and close(told, plain, 1e-12) and told[1] == 1


def test_the_gradient_is_that_of_the_selected_tokens_alone():
    student, rows = setting("adaspec")
    draft, target, ref = student.draft, student.target, student.reference
    a, told = gradient(student, rows)
    tokens, mask = specdec.collate(rows, 0)
    t, r, h = (specdec.states(m, tokens, mask) for m in (target, ref, draft))
    loss, other = (specdec.forward_kl(x, m.head, t, target.head) for x, m in ((h, draft), (r, ref)))
    chosen = specdec.adaspec(loss, other)
    draft.zero_grad()
    loss[chosen].mean().backward()
    assert close(a, torch.cat([p.grad.flatten() for p in draft.parameters()]), 1e-10)
    assert 0.35 < told[1] < 0.5 and len(loss) == 15


def test_remembered_states_and_micro_batches_change_nothing():
    student, rows = setting()
    a, _ = gradient(student, rows, specdec.remember(student.target, rows, 6, student.c))
    b, _ = gradient(student, rows)
    assert close(a, b, 1e-10) and specdec.remember(student.target, rows, 5, student.c) is None
    small, _ = setting(micro=2)
    known = specdec.remember(small.target, rows, 6, small.c)
    assert close(gradient(small, rows, known)[0], a, 1e-10)                     # of unequal lengths


def test_agreement_by_hand_and_in_its_limit():
    student, rows = setting()
    draft, target, c = student.draft, student.target, student.c
    told = specdec.agreement(target, target, rows, c, 16)
    assert close([told["overlap"], told["kl"], told["same_top"]], [1, 0, 1], 1e-9)
    told = specdec.agreement(target, draft, rows, c, 16)
    tokens, mask = specdec.collate(rows, 0)
    p, q = (m.logits(specdec.states(m, tokens, mask)).double().softmax(-1) for m in (target, draft))
    assert abs(told["overlap"] - (1 - (p - q).abs().sum(-1).mean().item() / 2)) < 1e-5


def test_acceptance_is_the_overlap_of_the_laws():
    """what is measured by decoding at temperature 1 agrees with Σ min(p, q) at the tested places"""
    target, draft = tiny_model(sharp=1.0), tiny_model(layers=1, seed=5, sharp=1.0)
    g = torch.Generator().manual_seed(0)
    _, tally = specdec.speculate(target, drafters(target, draft, 1.0)["small"], [[1, 2, 3]] * 3000,
                                 2, rule("fixed", gamma=1), temperature=1.0, generator=g)
    first = torch.softmax(target.logits(target(torch.tensor([[1, 2, 3]]))[:, -1]),
                          -1)[0].double()                                            # the prefill's
    rows = torch.tensor([[1, 2, 3, x] for x in range(8)])
    p, q = (torch.softmax(m.logits(m(rows)[:, -1]).double(), -1) for m in (target, draft))
    expected = (first * torch.minimum(p, q).sum(-1)).sum().item()
    assert tally.rounds == 3000 and tally.proposed == 0          # one token to go: nothing to draft
    _, tally = specdec.speculate(target, drafters(target, draft, 1.0)["small"], [[1, 2, 3]] * 3000,
                                 3, rule("fixed", gamma=1), temperature=1.0, generator=g)
    assert abs(tally.kept[0] / tally.tested[0] - expected) < 0.03


# --- runs -----------------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def few_repetitions(monkeypatch):
    """Costs are measured twice, not thirty times: nothing here judges a speed."""
    monkeypatch.setattr(specdec, "measure_costs", partial(specdec.measure_costs, repeats=2))


def run(*argv):
    """specdec.main, on thirty documents where the default is the whole standard library."""
    names = dict(zip(argv, argv[1:])).get("--config", "").split(",")
    if "--data" not in argv and not any("data" in specdec.PRESETS.get(x, {}) for x in names):
        if not Path("few.txt").exists():
            some = text.documents("stdlib", "train")[:60:2]
            Path("few.txt").write_text("<|endoftext|>".join(some))
        argv = [*argv, "--data", "few.txt"]
    return specdec.main(merged(*argv))


def test_a_draft_learns_and_speeds_are_told(shared_bases, capsys):
    told = run(*TINY, "--draft", "1x32", "--steps", "40", "--batch", "8", "--eval_every", "20")
    out = capsys.readouterr().out
    assert told["overlap"] > told["start_overlap"] and told["kl"] < told["start_kl"]
    assert told["draft_same"] == told["lookup_same"] == 1 and told["draft_speedup"] > 0
    assert "predicted" in out
    assert "greedy outputs equal to plain decoding's: lookup 4 of 4, draft 4 of 4" in out


@pytest.mark.parametrize("name", specdec.PRESETS)
def test_every_preset_fits_the_base_that_it_names(name):
    """what it learns, runs in test_specdec_wiring.py"""
    specdec.check(*configure(specdec.Config, specdec.PRESETS, specdec.AXES, "",
                             ["--config", name], specdec.readers))


def test_resume_ends_at_the_same_weights(shared_bases):
    from safetensors.torch import load_file
    same = [*TINY, "--select", "adaspec", "--source", "mixed", "--steps", "6", "--refresh", "4"]
    run(*same, "--out", "out/whole")
    run(*same, "--out", "out/parts", "--stop", "3")
    run(*same, "--out", "out/parts", "--resume")
    steps = [json.loads(x)["step"] for x in open(shared_bases / "out/parts/log.jsonl")]
    assert steps == [1, 2, 3, 4, 5, 6]
    a, b = (load_file(shared_bases / f"out/{x}/step-000006/model.safetensors")
            for x in ("whole", "parts"))
    assert all(torch.equal(a[k], b[k]) for k in a)


def test_a_finished_run_is_not_made_again(shared_bases, capsys):
    told = run(*TINY, "--out", "out/once")
    again = run(*TINY, "--out", "out/once", "--resume")
    assert told == again and "finished already" in capsys.readouterr().out


def test_a_real_pair_of_checkpoints(stories, shared_bases):
    """a real Llama checkpoint as the target, a new draft of its tokenizer"""
    told = run(*TINY, "--init", str(stories), "--draft", "1x32", "--data", "signatures",
               "--context", "256", "--prompts", "2")
    assert told["draft_same"] == 1


# --- errors ---------------------------------------------------------------------------------------


@pytest.fixture
def pair(workdir):
    """Folders of two random models: the same tokenizer, and another."""
    tok = bytes_tokenizer()
    for name, seed, layers in (("target", 0, 2), ("draft", 1, 1)):
        save(init(ModelConfig(vocab_size=320, hidden_size=32, intermediate_size=32,
                              num_hidden_layers=layers,
                              num_attention_heads=2, num_key_value_heads=1, head_dim=16,
                              max_position_embeddings=64), seed), tok, workdir / name)
    from data.tasks import chain_tokenizer
    other = chain_tokenizer()
    save(init(ModelConfig(vocab_size=64, hidden_size=32, intermediate_size=32, num_hidden_layers=1,
                          num_attention_heads=2, num_key_value_heads=1, head_dim=16,
                          max_position_embeddings=64), 0), other, workdir / "other")
    return workdir


GIVEN = [*TINY, "--init", "target", "--steps", "0"]


@pytest.mark.parametrize("argv, message", [
    (["--draft", "other"], "another vocabulary.*omnidraft"),
    (["--draft", "draft", "--gamma", "99"],
     "--gamma 99: a draft longer than the target's context of 64"),
    (["--draft", "draft", "--max_new", "60"], "--max_new 60 exceed the 64 tokens of target"),
    (["--draft", "nowhere"], "nowhere does not exist"),
    (["--draft", "draft", "--length", "optimum"], "did you mean 'optimal'"),
    (["--draft", "draft", "--steps", "2", "--select", "adaspec", "--k", "2.0"],
     "--k 2.0: must be above 0 and at most 1"),
    (["--draft", "draft", "--steps", "2", "--source", "on_policy", "--context", "8"],
     "leaves no room"),
    (["--draft", "draft", "--together", "0"], "--together 0: must be at least 1"),
    (["--draft", "draft", "--prompt", "0"], "--prompt 0: must be at least 1"),
    (["--draft", "draft", "--refresh", "0"], "--refresh 0: must be at least 1"),
    (["--draft", "draft", "--lenience", "2"], "--lenience 2: must be above 0"),
    (["--draft", "draft", "--lenience", "0.5"], "--lenience below 1 is for sampling"),
    (["--draft", "draft", "--split", "nonsense"], "nonsense"),
    (["--drafter", "lookup", "--n", "0"], "--n 0: must be at least 1")])
def test_what_cannot_be_is_told(argv, message, pair):
    with pytest.raises(UserError, match=message):
        run(*GIVEN, *argv)


READ = dict(draft=True, drafter=True, length=True, loss=True, select=True, source=True, lr=True,
            eval_rows=True, stop=True, prompt=True, ref_batch=False, refresh=False, top_k=False,
            top_p=False, chat=False, samples=False, compile=False)


@pytest.mark.parametrize("argv, change", [
    ([], {}), (["--select", "smallest"], dict(ref_batch=True)),
    (["--source", "mixed"], dict(refresh=True)),
    (["--temperature", "1"], dict(top_k=True, top_p=True)),
    (["--data", "signatures"], dict(chat=True, prompt=False)),
    (["--steps", "0"], dict(loss=False, select=False, source=False, lr=False, stop=False)),
    (["--config", "lookup"], dict(loss=False, select=False, source=False, lr=False, stop=False,
                                  draft=False)),
    (["--config", "omnidraft", "--steps", "9"], dict(loss=False, select=False, source=False,
                                                     lr=False, stop=False)),
    (["--config", "ead"], {k: False for k in READ}),
    (["--config", "genarm"], {k: k in ("samples", "lr") for k in READ})])
def test_a_run_says_which_options_it_reads(argv, change):
    setup = configure(specdec.Config, specdec.PRESETS, specdec.AXES, "", argv, specdec.readers)
    found = specdec.readers(*setup)
    assert {k: bool(found[k][0]) for k in READ} == READ | change


def test_what_just_fits_is_not_refused(pair):
    for more in (["--prompt", "52"], ["--context", "64"], ["--gamma", "63"]):
        argv = merged(*GIVEN, "--draft", "draft", *more)
        specdec.check(*configure(specdec.Config, specdec.PRESETS, specdec.AXES, "", argv,
                                 specdec.readers))


def test_a_draft_bigger_than_the_target_is_told(pair, capsys):
    told = run(*TINY, "--init", "draft", "--draft", "target", "--steps", "0")
    assert "cannot pay" in capsys.readouterr().out and told["draft_same"] == 1


def test_costs_are_measured_and_interpolated():
    target, draft = tiny_model(), tiny_model(layers=1)
    cost = specdec.measure_costs(target, draft, 2, 20, 6, repeats=3)
    assert len(cost.v) == 7 and cost.v[0] == 1 and 0 < cost.c < 2
    assert close(cost.v[3], (cost.v[2] + cost.v[4]) / 2, 1e-9)
    assert specdec.measure_costs(target, None, 1, 20, 0, repeats=2).v == [1.0]


def test_costs_are_those_of_single_passes_the_least_of_many(monkeypatch):
    """a target pass of 1 + w / 10 seconds, a draft's of 0.33; now and then the machine is busy"""
    now, (target, draft) = [0.0, 0], (tiny_model(), tiny_model(layers=1))

    def takes(model, args, seconds):
        now[1] += 1
        now[0] += seconds(args[0].size(1)) + 5 * (now[1] % 4 == 0)
    target.register_forward_pre_hook(partial(takes, seconds=lambda w: 1 + w / 10))
    draft.register_forward_pre_hook(partial(takes, seconds=lambda w: 0.33))
    monkeypatch.setattr(specdec, "clock", lambda device: now[0])
    cost = specdec.measure_costs(target, draft, 2, 20, 6, repeats=4)
    assert close(cost.c, 0.33 / 1.1) and close(cost.v, [(1.1 + i / 10) / 1.1 for i in range(7)])


def test_costs_are_measured_where_a_completion_is_half_done_and_fits(monkeypatch):
    asked, target, draft = [], tiny_model(context=40), tiny_model(context=20)
    monkeypatch.setattr(specdec, "measure_costs", lambda *rest: asked.append(rest))
    f = SimpleNamespace(length=rule(gamma=6))
    for model, most, new in ((draft, 3, 8), (draft, 9, 8), (None, 9, 8), (None, 9, 99)):
        specdec.costs_of(target, SimpleNamespace(model=model), [[1], [1] * most],
                         SimpleNamespace(together=2, max_new=new), f)
    assert [x[1:] for x in asked] == [(draft, 2, 7, 6), (draft, 2, 13, 6), (None, 2, 13, 6),
                                      (None, 2, 33, 6)]


def test_predictions_by_hand():
    tally = specdec.Tally()
    for kept, count in (([2, 0], [2, 2]), ([1, 1], [2, 1])):
        tally.note(torch.tensor(kept), torch.tensor(count), torch.full((2, 2), .55))
    tally.tokens = 8
    assert (tally.rounds, tally.proposed, tally.efficiency) == (4, 7, 2.0)
    assert dict(tally.tested) == {0: 4, 1: 2} and dict(tally.kept) == {0: 3, 1: 1}
    assert close(tally.acceptance, 4 / 6) and tally.passes == {2: 2}
    assert close(specdec.independent(tally, {}, None)["independent"], 1 + 2 / 3 + 4 / 9)
    other = specdec.Tally()
    other.note(torch.tensor([1]), torch.tensor([2]), torch.tensor([[.05, 1.0]]))
    assert other.tries == [1, *[0] * 8, 1] and other.hits == [1, *[0] * 9]
    facts = dict(cost=SimpleNamespace(c=.1, v=[1, 1.1, 1.2, 1.5]))
    for steps, spent in ((1.0, 1.4), (3.0, 1.8)):
        told = specdec.predicted(tally, facts, SimpleNamespace(per_token=steps))
        assert close(told["predicted"], 2 / spent) and close(told["cost"], steps * .1)
        assert close(told["verify_cost"], 1.2)
    chance = specdec.chance(tally, torch.full((1, 1), .55))
    assert close(chance, [[(4 + 1.1) / (6 + 2), (4 + 1.4) / (6 + 2)]])
    chance = specdec.chance(tally, torch.tensor([[1.0, .55], [.05, .99]]))
    assert close(chance, [[1.9 / 2, 5.1 / 8, 5.4 / 8], [.1 / 2, 1.9 / 2, 5.4 / 8]])


def test_claims_name_arms_that_exist():
    for claim in claims_of("specdec").CLAIMS.values():
        for arm in claim.arms.values():
            configure(specdec.Config, specdec.PRESETS, specdec.AXES, "", ["--config", arm])
        labels = json.dumps(list(claim.tests))
        assert all(key.partition("|")[0] in {*claim.arms, ""} for w in claim.tests.values()
                   for key in w), labels


def test_no_option_hides_behind_a_field_of_the_same_name():
    """a Config field wins over a method's argument of its name, which could then never be set"""
    import dataclasses
    fields = {x.name for x in dataclasses.fields(specdec.Config)}
    taken = [(axis, row, k) for axis, rows in specdec.AXES.items() for row, fn in rows.items()
             for k in hyper(fn) if k in fields]
    assert not taken


@pytest.mark.parametrize("argv, message", [
    (["--config", "ead,tiny", "--init", "draft"],
     "another vocabulary than what --recipe chain_right makes"),
    (["--config", "tiny", "--init", "draft", "--decode", "genarm", "--data", "stdlib"],
     "needs answers to score"),
    (["--config", "tiny", "--init", "draft", "--top_p", "5"], "--top_p 5: must be above 0"),
    (["--config", "self_eval,tiny", "--samples", "1"], "compares samples: at least 2"),
    (["--config", "genarm,tiny", "--alphas", "1,x"], "--alphas 1,x: numbers"),
    (["--config", "ead,tiny", "--thresholds", "a,b"], "--thresholds a,b: numbers")])
def test_what_other_decoders_cannot_do_is_told(argv, message, shared_bases):
    if "draft" in argv:
        save(init(ModelConfig(vocab_size=320, hidden_size=32, intermediate_size=32,
                              num_hidden_layers=1,
                              num_attention_heads=2, num_key_value_heads=1, head_dim=16,
                              max_position_embeddings=64),
                  0), bytes_tokenizer(), shared_bases / "draft")
    with pytest.raises(UserError, match=message):
        run(*argv)
