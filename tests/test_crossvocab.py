"""specdec.py's OmniDraft: a draft of another vocabulary leaves the target's words and laws as they
are."""
import itertools
import math
from functools import partial

import conftest
import pytest
import torch
from conftest import chi_square, close, rule

import specdec
from data.run import UserError
from data.tokenizer import Tokenizer, bytes_tokenizer, char_tokenizer, train_bpe
from model import ModelConfig, generate
from specdec import NgramCache, Translated, carried, matches, spell, translate

TEXT = ("the cat sat on the mat and the other cat sat there; then they thought of theories. "
        "caf\u00e9 na\u00efve \u20ac5 \u20ac6 \u20ac7 ") * 3
BYTES, BPE = bytes_tokenizer(), train_bpe([TEXT], 300)
GREEDY = (0.0, 0, 1.0)


def words(*tokens):
    """A tokenizer of <|eos|> (0) and the given words; merges in their order."""
    single = {x.encode(): i for i, x in enumerate(tokens, 1) if len(x) == 1}
    order = [single.get(bytes([b]), -1) for b in range(256)]
    order += [i for i, x in enumerate(tokens, 1) if len(x) > 1]
    return Tokenizer([b"<|eos|>", *(x.encode() for x in tokens)], order, {"<|eos|>": 0}, bos=None,
                     eos=0,
                     pad=None)


WORDS, LETTERS = words("a", "b", "c", "ab", "bc", "abc", "cc"), words("a", "b", "c")


def tiny_model(vocab, seed=0, layers=1, context=256, **kw):
    return conftest.tiny_model(vocab, layers, seed, context, **kw)


def drafter(target, draft, target_tok, draft_tok, sampling=GREEDY, cls=Translated, **kw):
    return cls(draft, NgramCache(target_tok, draft_tok), target.config.vocab_size, sampling,
               **kw)


# --- the cache ------------------------------------------------------------------------------------


def test_direct_maps_are_the_equal_bytes_and_never_specials_or_holes():
    target, draft = words("a", "b", "ab", "abc", "c"), words("b", "a", "bc", "c", "abc")
    assert matches(target, draft) == {1: 2, 2: 1, 4: 5, 5: 4}
    assert len(matches(BPE, BYTES)) == 256 and not set(BPE.specials.values()) & set(matches(BPE,
                                                                                            BYTES))
    target.tokens.append(b"")
    draft.tokens.append(b"")
    assert len(matches(target, draft)) == 4


def test_of_two_tokens_with_equal_bytes_the_lower_id_maps():
    target, draft = words("a", "b"), words("a", "b")
    target.tokens.append(b"a")
    draft.tokens.append(b"b")
    assert matches(target, draft) == {1: 1, 2: 2}


def test_a_draft_of_bytes_or_characters_knows_every_token_from_the_beginning():
    cache = NgramCache(BPE, BYTES)
    plain = set(range(BPE.vocab_size)) - set(BPE.specials.values())
    assert cache.known == plain and len(cache.strings) == len(plain)
    for string, t in cache.strings.items():
        assert b"".join(BYTES.tokens[d] for d in string) == BPE.tokens[t]
    letters = char_tokenizer("abcdefghijklmnopqrstuvwxyz .;")
    some = NgramCache(BPE, letters)
    lost = {t for t in plain if any(letters.order[b] < 0 for b in BPE.tokens[t])}
    assert some.known == plain - lost and lost


def test_a_draft_with_merges_learns_the_strings_whose_ends_line_up():
    target, draft = words("a", "b", "c", "abc", "cab"), words("a", "b", "c", "ab")
    cache = NgramCache(target, draft)
    assert set(cache.strings) == {(1,), (2,), (3,)}
    assert cache.follow([4, 1]) == [4, 3, 1]                  # abc|a is ab|c|a: 'abc' = ab, c
    assert cache.strings[4, 3] == 4 and (4,) in cache.starts
    assert (cache.hits, cache.read) == (1, 2)                 # 'a' was known, 'abc' was a miss
    cache.follow([4])
    assert (cache.hits, cache.read) == (2, 3)                 # now it is a hit
    cache.follow([5, 2])                                      # cab|b is c|ab|b
    assert cache.strings[3, 4] == 5
    cache = NgramCache(target, draft)
    cache.follow([1, 2])  # a|b is one draft token: nothing lines up
    assert set(cache.strings) == {(1,), (2,), (3,)}


def test_only_usable_draft_tokens_are_those_of_strings():
    cache = NgramCache(words("a", "b", "c", "abc"), words("a", "b", "c", "ab"))
    assert cache.usable.tolist() == [False, True, True, True, False]
    cache.follow([4])
    assert cache.usable.tolist() == [False, True, True, True, True]


def test_pieces_of_characters_are_spelled_by_bytes():
    euro = "\u20ac".encode()
    for data in (euro[:1], euro[1:], b"a" + euro[:2], euro[2:] + b" the", TEXT.encode()):
        for tok in (BYTES, BPE):
            assert b"".join(tok.tokens[d] for d in spell(data, tok)) == data
    assert spell(TEXT.encode(), BPE) == BPE.encode(TEXT)
    cache = NgramCache(BYTES, BPE)                            # the target's tokens are the pieces
    assert cache.follow(list(euro[:1])) + cache.follow(list(euro[1:])) == list(euro)
    assert spell(b"a\xffb", char_tokenizer("ab")) == [3, 4]


def test_specials_are_read_as_the_draft_s_own_and_never_proposed():
    cache = NgramCache(BPE, BYTES)
    assert cache.follow([BPE.bos, ord("a"), BPE.eos]) == [BYTES.bos, ord("a"), BYTES.eos]
    assert not cache.usable[list(BYTES.specials.values())].any()
    assert NgramCache(BPE, words("a")).follow([BPE.bos, ord("a"), BPE.eos]) == [1,
                                                                                0]    # no BOS there
    assert cache.follow([9999]) == []                         # a padding row of the embedding


def test_vocabularies_without_a_common_word_are_refused():
    with pytest.raises(UserError, match="share no token"):
        NgramCache(words("a", "b"), words("c", "d"))


# --- translation ----------------------------------------------------------------------------------


def test_translation_by_hand():
    target, draft = words("a", "b", "c", "ab", "abca", "bc"), char_tokenizer("abcd")
    cache, (a, b, c, d) = NgramCache(target, draft), draft.encode("abcd")
    read = partial(translate, cache=cache)
    assert read([a, b, c, c]) == ([(4, 2), (3, 1), (3, 1)], True)      # abca did not come: ab, c, c
    assert read([a, b, c, a, b, c]) == ([(5, 4), (6, 2)], True)
    assert read([a, d, a]) == ([(1, 1)], False)                           # d: the block stops
    assert read([a, b, c], over=False) == ([], True)                      # could become abca
    assert read([a, b, c, b], over=False) == ([(4, 2), (3, 1)], True)     # b could become bc
    assert read([]) == ([], True)
    assert read([draft.eos, a]) == ([], False)


def test_what_is_complete_does_not_depend_on_what_follows():
    cache, g = NgramCache(BPE, BYTES), torch.Generator().manual_seed(0)
    text = TEXT.encode()
    for _ in range(200):
        i, n = (int(x) for x in torch.randint(0, 60, (2,), generator=g))
        drafted = list(text[i:i + n])
        whole, _ = translate(drafted, cache)
        assert b"".join(BPE.tokens[t] for t, _ in whole) == bytes(drafted)
        for cut in range(n):
            sure, _ = translate(drafted[:cut], cache, over=False)
            assert sure == whole[:len(sure)]


def test_a_longer_string_of_a_learning_cache_wins():
    cache = NgramCache(words("a", "b", "ab"), words("b", "a"))
    assert translate([2, 1], cache) == ([(3, 2)], True)


# --- q' -------------------------------------------------------------------------------------------


def test_mass_of_merged_strings_by_hand():
    pairs, law = torch.tensor([[1, 2, 5], [0, 1, 2]]), torch.tensor([0.5, 0.3, 0.1, 0.1],
                                                                    dtype=torch.float64)
    one = carried(law, pairs, 6, 2, 0, 2)
    assert close(one, [0, 0.5, 0.3, 0, 0, 0.1])
    two = carried(law, pairs, 6, 4, 0.5 * 0.4, 1)
    assert close(two, [0, 0.3, 0.3, 0, 0.2, 0.1]) and close(two.sum(), one.sum())
    none = carried(law, pairs, 6, 4, 0.1 * 0.4, None)            # d_1 has no token of its own
    assert close(none.sum(), one.sum() + 0.04) and none.sum() <= 1


class Watching(Translated):
    """Keeps what it proposed."""
    log = ()

    def propose(self, text, length, u, more):
        out = super().propose(text, length, u, more)
        if out[0].size(1):                                            # and nothing is read twice
            assert self.rows.held == [len(x) for x in self.rows.ids]
        self.log = [*self.log, (text.clone(), length.clone(), u.clone(), *out)]
        return out


def test_q_is_a_sub_distribution_that_holds_what_was_proposed():
    target, draft = tiny_model(8, sharp=1.0), tiny_model(4, 1, sharp=1.0)
    d = drafter(target, draft, WORDS, LETTERS, (1.0, 0, 1.0), Watching, mode="ngram")
    specdec.speculate(target, d, [[1, 4], [7]], 24, rule(gamma=3), temperature=1.0,
                      generator=torch.Generator().manual_seed(0))
    merged = 0
    for *_, drafted, q, count, sure in d.log:
        if q is None:
            assert not count.any()
            continue
        assert (q >= 0).all() and (q.sum(-1) <= 1 + 1e-6).all()
        for b, n in enumerate(count.tolist()):
            assert (q[b, :n].gather(1, drafted[b, :n, None]) > 0).all() and (q[b, n:] == 0).all()
            merged += (drafted[b, :n] >= 4).sum().item()
            for j, t in enumerate(drafted[b, :n].tolist()):                 # a letter is itself
                assert t >= 4 or close(sure[b, j], q[b, j, t])
    assert len(d.log) > 10 and merged


# --- greedy decoding is the target's own ----------------------------------------------------------


def prompts_of(tok, n=3):
    return [tok.encode(TEXT[7 * i:7 * i + 5 + 9 * i]) for i in range(n)]


@pytest.mark.parametrize("mode", ["point", "ngram"])
@pytest.mark.parametrize("name, kw",
                         [("fixed", dict(gamma=1)), ("fixed", dict(gamma=4)), ("heuristic", {}),
                                      ("confident", dict(gamma=6, least=0.1))])
@pytest.mark.parametrize("draft_tok", [BYTES, train_bpe([TEXT[20:] + "another other then"], 285)],
                         ids=["bytes", "merges"])
def test_greedy_output_is_the_target_s_own_token_for_token(draft_tok, name, kw, mode):
    target = tiny_model(BPE.vocab_size, layers=2, eos=(BPE.eos,))
    draft, prompts = tiny_model(draft_tok.vocab_size, 1), prompts_of(BPE)
    for batch in (1, 3):
        d = drafter(target, draft, BPE, draft_tok, mode=mode, longest=12)
        for i in range(0, len(prompts), batch):
            roll, _ = specdec.speculate(target, d, prompts[i:i + batch], 20, rule(name, **kw))
            plain = generate(target, prompts[i:i + batch], 20, temperature=0.0)
            assert roll.completions() == plain.completions()
        assert d.places > 0 and d.passes >= d.places


@pytest.mark.parametrize("tok, draft_tok, prompts", [
    (BPE, BYTES, prompts_of(BPE, 3)), (WORDS, LETTERS, [[1], [4, 6, 5, 5, 2], [7, 7, 1]])],
    ids=["bpe", "words"])
def test_drafts_are_those_of_a_fresh_pass_over_everything_committed(tok, draft_tok, prompts):
    target = tiny_model(tok.vocab_size, layers=2)
    draft = tiny_model(draft_tok.vocab_size, 1, layers=2, context=120, sharp=0.6)
    d = drafter(target, draft, tok, draft_tok, cls=Watching, longest=10)
    specdec.speculate(target, d, prompts, 40, rule(gamma=4))
    checked = 0
    for text, length, _, drafted, _, count, sure in d.log:
        for b, n in enumerate(length.tolist()):
            ids, chance = d.cache.follow(text[b, :n].tolist()), []
            read = len(ids)
            for _ in range(10 if count[b] else 0):
                logits = draft.logits(draft(torch.tensor([ids]))[:, -1])[0, :draft_tok.vocab_size]
                logits[~d.cache.usable] = -math.inf
                ids.append(int(logits.argmax()))
                chance.append(logits.softmax(-1)[ids[-1]].item())
            found, _ = translate(ids[read:], d.cache, over=False)
            assert drafted[b, :count[b]].tolist() == [t for t, _ in found[:count[b]]]
            done = 0
            for j in range(count[b]):
                assert close(sure[b, j], math.prod(chance[done:done + found[j][1]]), 1e-5)
                done += found[j][1]
            checked += int(count[b])
    assert checked > 100


class Scripted:
    """A model that keeps the ids it reads in the cache, and says what follows them in one of its
    scripts; 0 at every `wrong`-th place, and where the ids are those of no script."""
    head = torch.zeros(1, dtype=torch.float64)

    def __init__(self, scripts, vocab, wrong=10 ** 9, context=256):
        self.scripts, self.wrong = scripts, wrong
        self.config = ModelConfig(vocab_size=vocab, num_hidden_layers=1, num_key_value_heads=1,
                                  head_dim=1,
                                  max_position_embeddings=context)

    def __call__(self, tokens, kv):
        T, held = tokens.size(1), kv.length
        place, at = kv.at(T)
        assert kv.used + T <= self.config.max_position_embeddings
        assert int(place.max()) < kv.k.size(3)
        kv.put(0, *[tokens[:, None, :, None].double()] * 2, at)
        kv.length, kv.used = held + T, kv.used + T
        rows = kv.k[0, :, 0, :, 0].long().tolist()
        says = [[[self.after(ids[:n + 1])] for n in row]
                for ids, row in zip(rows, place.tolist())]
        return torch.tensor(says)                                                        # [B, T, 1]

    def after(self, read):
        n = len(read)
        return next((x[n] for x in self.scripts if x[:n] == read and n < len(x)
                     and n % self.wrong), 0)

    def logits(self, hidden):
        return torch.nn.functional.one_hot(hidden[..., 0], self.config.vocab_size) * 30.0


def scripted(wrong, context=256, **kw):
    """Target and drafter that know three texts, the target in its longest tokens; prompts;
    scripts."""
    texts = [TEXT[i:i + 150].encode() for i in (0, 40, 83)]
    cache = NgramCache(BPE, BYTES)
    scripts = [[t for t, _ in translate(list(x), cache)[0]] for x in texts]
    target = Scripted(scripts, BPE.vocab_size)
    d = drafter(target, Scripted([list(x) for x in texts], 261, wrong, context), BPE, BYTES, **kw)
    return target, d, [x[:3 + 2 * i] for i, x in enumerate(scripts)], scripts


@pytest.mark.parametrize("gamma, longest", [(1, 32), (4, 32), (4, 3), (8, 32)])
def test_a_draft_that_knows_the_text_is_kept_whole(gamma, longest):
    target, d, prompts, scripts = scripted(10 ** 9, longest=longest)
    roll, tally = specdec.speculate(target, d, prompts, 30, rule(gamma=gamma), stop=())
    assert [p + x for p, x in zip(prompts, roll.completions())] == [
        x[:len(p) + 30] for p, x in zip(prompts, scripts)]
    assert tally.acceptance == 1 and tally.efficiency > 1.3


@pytest.mark.parametrize("wrong", [2, 5, 7, 11])
def test_a_draft_that_errs_now_and_then_is_rolled_back(wrong):
    target, d, prompts, scripts = scripted(wrong)
    roll, tally = specdec.speculate(target, d, prompts, 30, rule(gamma=5), stop=())
    assert [p + x for p, x in zip(prompts, roll.completions())] == [
        x[:len(p) + 30] for p, x in zip(prompts, scripts)]
    assert 0 < tally.acceptance < 1


def test_a_row_shorter_than_what_another_has_to_read_is_padded():
    tok, letters = words("x", "y", *"abcdefgh", "abcdefgh"), words("x", "y", *"abcdefgh")
    scripts = [[2, 10, 10] * 9, [3] + [11, 1] * 13]  # one byte a token; nine bytes in two tokens
    spelled = [list(spell(b"".join(tok.tokens[t] for t in x), letters)) for x in scripts]
    d = drafter(Scripted(scripts, 12), Scripted(spelled, 11), tok, letters)
    prompts = [x[:1] for x in scripts]
    roll, tally = specdec.speculate(Scripted(scripts, 12), d, prompts, 20, rule(gamma=2), stop=())
    assert roll.completions() == [x[1:21] for x in scripts] and tally.acceptance == 1
    assert tally.rounds == 2 * math.ceil(19 / 3)           # every block was full


def test_where_the_draft_s_context_is_full_nothing_is_drafted():
    target, d, prompts, scripts = scripted(10 ** 9, context=60)
    roll, tally = specdec.speculate(target, d, prompts, 30, rule(gamma=4), stop=())
    assert [p + x for p, x in zip(prompts, roll.completions())] == [
        x[:len(p) + 30] for p, x in zip(prompts, scripts)]
    assert tally.passes[0] > 0 and tally.acceptance == 1
    with pytest.raises(UserError, match="exceeds its context of 5"):
        target, d, prompts, _ = scripted(10 ** 9, context=5)
        specdec.speculate(target, d, prompts, 30, rule(gamma=4), stop=())


# --- sampling -------------------------------------------------------------------------------------


def law_of_three(target, prompt):
    """The target's law of the first three tokens, flat [V^3]."""
    V = target.config.vocab_size
    text = torch.tensor([[*prompt, *x] for x in itertools.product(range(V), repeat=3)])
    p = target.logits(target(text)).double().log_softmax(-1)[:, len(prompt) - 1:-1]
    return p.gather(-1, text[:, len(prompt):, None]).squeeze(-1).sum(1).exp()


def draws(target, d, prompt, n, temperature=1.0, gamma=2, at_once=2500, seed=0):
    """How often each three tokens were sampled [V^3]; the tally of the last batch."""
    V, g, counts = target.config.vocab_size, torch.Generator().manual_seed(seed), 0
    for _ in range(n // at_once):
        roll, tally = specdec.speculate(target, d, [prompt] * at_once, 7, rule(gamma=gamma),
                                        stop=(),
                                        generator=g, temperature=temperature)
        x = roll.tokens[:, len(prompt):]
        counts = counts + torch.bincount(x[:, 0] * V * V + x[:, 1] * V + x[:, 2], minlength=V ** 3)
    return counts, tally


class Peeking(Translated):
    """Broken: it draws with the number that verify tests its first token by."""

    def uniforms(self, u, steps):
        return u[:, :1, 1].expand(-1, steps)


def arena(sampling, cls=Translated, target_tok=WORDS, **kw):
    target, draft = tiny_model(8, sharp=0.6), tiny_model(4, 5, sharp=0.6)
    return target, drafter(target, draft, target_tok, LETTERS, sampling, cls, longest=6, **kw)


@pytest.mark.parametrize("sampling", [(1.0, 0, 1.0), GREEDY, (0.7, 2, 1.0)],
                         ids=["sampled", "greedy", "truncated"])
def test_samples_of_point_masses_have_the_target_s_law(sampling):
    target, d = arena(sampling)
    counts, tally = draws(target, d, [1, 5, 4], 20_000)
    assert chi_square(counts, law_of_three(target, [1, 5, 4]))[1] > 1e-3
    assert 0.02 < tally.acceptance < 0.9 and tally.proposed > 2000


def test_what_the_draft_draws_by_hangs_on_the_first_number_of_a_row_alone():
    _, d = arena((1.0, 0, 1.0))
    u = torch.rand(3, 4, 3, generator=torch.Generator().manual_seed(0))
    other = torch.rand(3, 4, 3, generator=torch.Generator().manual_seed(1))
    other[:2, 0, 0] = u[:2, 0, 0]
    a, b = d.uniforms(u, 5), d.uniforms(other, 5)
    assert torch.equal(a[:2], b[:2]) and (a[2] != b[2]).all() and (a[0] != a[1]).all()


def test_drafting_with_the_numbers_of_the_test_fails_the_same_test():
    target, d = arena((1.0, 0, 1.0), Peeking)
    counts, _ = draws(target, d, [1, 5, 4], 5_000)
    assert chi_square(counts, law_of_three(target, [1, 5, 4]))[1] < 1e-6


def test_q_of_strings_is_approximate_and_of_single_tokens_exact():
    target, d = arena((1.0, 0, 1.0), mode="ngram")
    counts, _ = draws(target, d, [1, 5, 4], 5_000)
    assert chi_square(counts, law_of_three(target, [1, 5, 4]))[1] < 1e-6   # what its docstring says
    target, d = arena((1.0, 0, 1.0), target_tok=words("a", "x", "b", "yz", "c", "w", "v"),
                      mode="ngram")
    assert [*d.cache.strings] == [(1,), (2,), (3,)]
    counts, tally = draws(target, d, [1, 5, 4], 20_000)
    assert chi_square(counts, law_of_three(target, [1, 5, 4]))[1] > 1e-3
    assert 0.1 < tally.acceptance < 0.9


def test_what_a_row_says_does_not_depend_on_the_other_rows():
    target, prompts = tiny_model(8, sharp=0.6, layers=2), [[1, 5, 4], [7], [4, 4, 2, 3, 6, 6, 1]]
    alone, among = (specdec.speculate(target, arena((1.0, 0, 1.0))[1], rows, 40, rule(gamma=3),
                                      stop=(),
                                      temperature=1.0, generator=torch.Generator().manual_seed(3)
                                      )[0].completions() for rows in (prompts[:1], prompts))
    assert alone[0] == among[0] and among[0] != among[1]
