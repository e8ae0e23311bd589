"""compress.py, smaller caches: KIVI's codes and state machine, what eviction keeps, its heads,
decoding through both."""
import copy
import functools
import itertools
import math
import weakref

import pytest
import torch
from conftest import DATA_DIR, close, rand

import compress as kv
from data.run import UserError
from kernels import rope
from model import Cache, ModelConfig, generate, init, load, rope_table, token_logprobs

D = functools.partial(torch.tensor, dtype=torch.float64)
SMALL = ModelConfig(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
                    num_attention_heads=4, num_key_value_heads=2, head_dim=8,
                    max_position_embeddings=96)
LLAMA = ModelConfig(**{**SMALL.__dict__, "model_type": "llama"})


def small(config=SMALL, seed=0, scale=6.):
    """A random model with logits and attention that are far from uniform."""
    model = init(config, seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.dim() > 1:
                p *= scale
            elif name.endswith("_norm.weight"):
                p += torch.rand(p.shape, generator=torch.Generator().manual_seed(1))
    return model.requires_grad_(False)


def kivi(bits=2, group=32, window=32, **axes):
    """What makes a cache of codes."""
    return kv.kivi(cache_bits=bits, cache_group=group, cache_window=window, **axes)


def text(B, T, seed=0):
    return torch.randint(64, (B, T), generator=torch.Generator().manual_seed(seed))


def make(maker, model, rows, slots=0, dtype=torch.float32):
    return maker(model.config, rows, slots, "cpu", dtype)


def same(a, b):
    return close(a, b, 2e-5)


@torch.no_grad()
def decoded(model, tokens, prefix, maker, **chunks):
    """The hidden state after every token from prefix - 1 on, and the cache.
    [B, T - prefix + 1, D]"""
    cache = make(maker, model, len(tokens), prefix)
    read = kv.read_in_chunks if isinstance(cache, kv.Evicting) else kv.read_whole
    out = [read(model, tokens[:, :prefix], cache, **chunks)[:, -1:]]
    cache.spread(torch.arange(len(tokens)), tokens.size(1) - prefix)
    out += [model(tokens[:, t:t + 1], cache) for t in range(prefix, tokens.size(1))]
    return torch.cat(out, 1), cache


# --- codes ----------------------------------------------------------------------------------------


def test_two_bits_by_hand():
    codes, scale, low = kv.encode(D([[-1., 0., .9, 2.], [3., 3., 3., 3.]]), 2)
    assert close(scale, [1, 1]) and close(low, [-1, 3])
    assert codes.tolist() == [[0b11_10_01_00], [0]]                   # the first in the lowest bits
    assert close(kv.decode(codes, scale, low, 2), [[-1, 0, 1, 2], [3, 3, 3, 3]])


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_codes_are_off_by_half_a_scale_at_most_and_come_back_the_same(bits):
    x = rand(5, 7, 16)
    codes, scale, low = kv.encode(x, bits)
    assert codes.shape == (5, 7, 2 * bits) and codes.dtype == torch.uint8
    y = kv.decode(codes, scale, low, bits)
    assert ((x - y).abs() <= scale[..., None] / 2 + 1e-12).all()
    assert close(kv.decode(*kv.encode(y, bits), bits), y, 1e-12)
    assert close(y.amin(-1), x.amin(-1)) and close(y.amax(-1), x.amax(-1))     # the ends are exact
    if bits == 8:
        assert (x - y).norm() / x.norm() < 1e-2


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_constant_groups_are_exact_in_every_dtype(dtype):
    x = torch.tensor([[0.] * 8, [-3.1] * 8, [6e-8] * 7 + [1.2e-7]]).to(dtype)
    y = kv.decode(*kv.encode(x, 2), 2)
    assert y.dtype == dtype and y.isfinite().all()
    assert torch.equal(y[:2], x[:2])


def test_the_axes_group_what_they_say_and_back():
    x = rand(2, 8, 3, 16)
    channel, token = kv.by_channel(x, 4), kv.by_token(x, 4)
    assert torch.equal(channel[1, 1, 2, 5], x[1, 4:8, 2, 5])
    assert torch.equal(token[1, 6, 2, 3], x[1, 6, 2, 12:])
    for axis, y in (("channel", channel), ("token", token)):
        assert torch.equal(kv.GROUPS[axis][1](y), x)


# --- KIVI -----------------------------------------------------------------------------------------


def filled(splits, seed=0, **hypers):
    """A cache of one layer that got the same random keys and values in these pieces; -> the cache,
    k, v."""
    T = sum(splits)
    k, v = (rand(2, 2, T, 8, seed=s).float() for s in (seed, seed + 1))
    cache, start = make(kivi(**hypers), small(), 2), 0
    for n in splits:
        for layer in range(2):
            cache.put(layer, k[:, :, start:start + n], v[:, :, start:start + n], None)
        start += n
        cache.length += n
        cache.used += n
    cache.settle()
    return cache, k, v


@pytest.mark.parametrize("length", [1, 7, 8, 9, 15, 16, 17, 30])
def test_the_state_machine_keeps_what_the_paper_keeps(length):
    cache, k, v = filled([length], group=4, window=8)
    keys, values = cache.parts[1]
    assert keys.tail.size(1) == length % 8 and values.tail.size(1) == min(length, 8)
    assert keys.codes.shape[1] == length // 8 * 2 and values.codes.shape[1] == max(length - 8, 0)
    for part, x in ((keys, k), (values, v)):
        assert torch.equal(part.whole(length)[:, :, length - part.tail.size(1):],
                           x[:, :, length - part.tail.size(1):])
        assert (part.whole(length) - x).abs().max() < 2                     # old ones: half a scale
    if length >= 16:
        assert not torch.equal(keys.whole(length), k) and not torch.equal(values.whole(length), v)


@pytest.mark.parametrize("axes", list(itertools.product(kv.GROUPS, repeat=2)))
@pytest.mark.parametrize("window", [0, 8])
def test_token_by_token_leaves_the_state_that_a_prompt_leaves(axes, window):
    hypers = dict(group=4, window=window, keys=axes[0], values=axes[1])
    whole = filled([27], **hypers)[0]
    for splits in ([1] * 27, [16] + [1] * 11, [5, 3, 8, 8, 3], [26, 1]):
        other = filled(splits, **hypers)[0]
        for a, b in zip((p for pair in whole.parts for p in pair),
                        (p for pair in other.parts for p in pair)):
            for name in ("codes", "scale", "low", "tail", "held"):
                assert torch.equal(getattr(a, name), getattr(b, name))


@pytest.mark.parametrize("config", [SMALL, LLAMA], ids=["qwen3", "llama"])
def test_a_context_within_the_window_is_exact(config):
    model, tokens = small(config), text(3, 32)
    want = model(tokens)[:, 9:]
    got, cache = decoded(model, tokens, 10, kivi(window=64))
    assert same(got,  # all of it in full precision
                want) and cache.nbytes() == 2 * 2 * 3 * 32 * 2 * 8 * 4
    assert not same(decoded(model, tokens, 10, kivi(group=8, window=8))[0], want)


def test_a_prompt_itself_is_read_in_full_precision():
    model, tokens = small(), text(2, 40)
    cache = make(kivi(group=4, window=4), model, 2)
    assert same(model(tokens, cache), model(tokens))


def test_eight_bits_are_close_and_more_bits_closer():
    model, tokens = small(scale=4.), text(4, 60)
    want = model(tokens)[:, 7:]
    off = [((decoded(model, tokens, 8, kivi(bits=b, group=8, window=0))[0] - want).norm()
            / want.norm())
           for b in (2, 4, 8)]
    assert off[0] > 2 * off[1] > 4 * off[2] and off[2] < 1e-2


def test_decoding_sees_its_own_codes():
    """What attention reads is what a fake quantiser of the same state machine makes of the true
    keys."""
    cache, k, v = filled([16, 1, 1], group=4, window=8)
    got = cache.parts[0][0].whole(18)
    want = k.clone()
    old = k[:, :, :16].unflatten(2, (4, 4))                                  # [B, K, groups, g, hd]
    low, high = old.amin(3, keepdim=True), old.amax(3, keepdim=True)
    want[:, :, :16] = (((old - low) / (high - low) * 3).round() / 3 * (high - low)
                       + low).flatten(2, 3)
    assert close(got, want, 1e-5)
    old = v[:, :, :10].unflatten(3, (2, 4))
    low, high = old.amin(4, keepdim=True), old.amax(4, keepdim=True)
    old = (((old - low) / (high - low) * 3).round() / 3 * (high - low) + low).flatten(3)
    want = torch.cat([old, v[:, :, 10:]], 2)
    assert close(cache.parts[0][1].whole(18), want, 1e-5)


@pytest.mark.parametrize("hypers", [dict(group=8, window=16), dict(group=8, window=0),
                                    dict(group=8, window=0, keys="token", bits=8),
                                    dict(group=8, window=8, keys="token", values="channel",
                                         bits=4)])
def test_stored_bytes_are_codes_two_numbers_a_group_and_the_rest(hypers):
    """A coded token has 8 bits / 8 bytes a head and a share of a scale and a low, another 8
    numbers."""
    model, bits, window = small(), hypers.get("bits", 2), hypers["window"]
    for T, prefix in ((30, 5), (33, 32), (41, 40), (6, 1)):
        for dtype, size in ((torch.float32, 4), (torch.bfloat16, 2)):
            cache, total = make(kivi(**hypers), model, 3, dtype=dtype), 0
            for part in text(3, T).split([prefix] + [1] * (T - prefix), 1):
                model(part, cache)
            for axis in (hypers.get("keys", "channel"), hypers.get("values", "token")):
                block = max(window, 8)
                coded = T // block * block if axis == "channel" else max(T - window, 0)
                total += coded * (bits + 2 * size) + (T - coded) * 8 * size
            assert cache.nbytes() == 2 * 3 * 2 * total                     # layers, rows, key heads


def test_one_layer_at_a_time_is_dequantised(monkeypatch):
    whole, alive, most = kv.CodedPart.whole, [], []

    def spy(self, size):
        alive[:] = [r for r in alive if r() is not None]
        out = whole(self, size)
        alive.append(weakref.ref(out))
        most.append(len(alive))
        return out
    monkeypatch.setattr(kv.CodedPart, "whole", spy)
    model = small()
    decoded(model, text(2, 40), 20, kivi(group=4, window=4))
    assert len(most) == 2 * 2 * 21 and max(most) == 2                  # one layer's keys and values


def test_constant_channels_leave_no_nan():
    model = small(LLAMA)
    for block in model.layers:
        block.self_attn.k_proj.weight.zero_()
        block.self_attn.v_proj.weight[:8].zero_()
    tokens = text(2, 40)
    got, _ = decoded(model, tokens, 20, kivi(group=4, window=4))
    assert got.isfinite().all()


def test_keys_of_outlier_channels_want_groups_of_a_channel():
    """KIVI's observation 1: a channel that is large in every token swallows a token's scale."""
    x = rand(1, 64, 1, 8) * D([20., 1, 1, 1, 1, 1, 1, 1]) + D([40., 0, 0, 0, 0, 0, 0, 0])
    off = {axis: ((back(kv.decode(*kv.encode(split(x, 8), 2), 2))
                   - x)[..., 1:] ** 2).mean().item()
           for axis, (split, back) in kv.GROUPS.items()}
    assert off["channel"] < .3 * off["token"]


def test_groups_that_do_not_fit_are_named():
    for bad, word in ((dict(window=40), "window 40"), (dict(group=2, window=0), "group 2")):
        with pytest.raises(UserError, match=word):
            kivi(**bad)
    odd = ModelConfig(**{**SMALL.__dict__, "head_dim": 24})
    with pytest.raises(UserError, match="24 channels"):
        kivi(group=16, window=16)(odd, 1, 0, "cpu", torch.float32)


# --- what eviction keeps --------------------------------------------------------------------------


def test_retained_by_hand():
    score = D([[[[5., 1, 4, 2, 3], [0, 1, 2, 3, 4]]]])                   # one layer, row; two heads
    slots, count = kv.retained(score, torch.tensor([5]), 3, 0)
    assert slots.tolist() == [[[[0, 2, 4], [2, 3, 4]]]] and count.tolist() == [3]
    slots, _ = kv.retained(score, torch.tensor([5]), 3, 2)                 # the newest two are safe
    assert slots.tolist() == [[[[0, 3, 4], [2, 3, 4]]]]
    slots, count = kv.retained(score, torch.tensor([2]), 3, 0)         # behind a row's end: nothing
    assert slots[..., :2].tolist() == [[[[0, 1], [0, 1]]]] and count.tolist() == [2]


def test_retained_slots_increase_and_hold_the_protected():
    score, length = rand(2, 3, 4, 20), torch.tensor([20, 13, 5])
    slots, count = kv.retained(score, length, 8, 3)
    assert count.tolist() == [8, 8, 5]
    for b, n in enumerate(count.tolist()):
        own = slots[:, b, :, :n]
        assert (own.diff(dim=-1) > 0).all() and own.max() < length[b]
        assert torch.equal(own[..., -3:],
                           torch.arange(length[b] - 3, length[b]).expand_as(own[..., -3:]))
        rest = score[:, b].gather(-1, own)[..., :-3]                     # no better one was dropped
        dropped = score[:, b, :, :length[b] - 3].scatter(-1, own[..., :-3], -math.inf)
        assert b == 2 or (rest.amin(-1) >= dropped.amax(-1)).all()


def heads_of(model, width=16, seed=0):
    g = torch.Generator().manual_seed(seed)
    heads = torch.nn.ModuleList(kv.RetainingHead(model.config, width, g) for _ in model.layers)
    return heads.requires_grad_(False)


@pytest.mark.parametrize("score", kv.SCORES)
@pytest.mark.parametrize("config", [SMALL, LLAMA], ids=["qwen3", "llama"])
def test_a_budget_of_everything_changes_nothing(score, config):
    model, tokens = small(config), text(2, 40)
    maker = kv.locret(model, heads_of(model), score=score, budget=64, local=4)
    assert same(decoded(model, tokens, 30, maker)[0], model(tokens)[:, 29:])
    assert same(decoded(model, tokens, 30, maker, chunk=7)[0], model(tokens)[:, 29:])


def test_a_window_is_the_model_that_sees_no_more():
    """Recency, one layer, the prompt in one chunk: decoding attends to the last tokens alone."""
    model, tokens = small(ModelConfig(**{**SMALL.__dict__, "num_hidden_layers": 1})), text(2, 31)
    maker = kv.locret(model, score="recency", budget=6, local=4)
    got, cache = decoded(model, tokens, 30, maker)
    assert cache.k.shape[-2] == 11 and cache.length.tolist() == [11, 11]
    seen = torch.cat([tokens[:, 20:30], tokens[:, 30:]], 1)             # RoPE: only distances count
    assert same(got[:, -1], model(seen)[:, -1])


def test_chunks_never_hold_more_than_the_budget_and_a_chunk(monkeypatch):
    model, sizes, at = small(), [], kv.Evicting.at

    def spy(self, T):
        out = at(self, T)
        sizes.append(self.k.size(3))
        return out
    monkeypatch.setattr(kv.Evicting, "at", spy)
    tokens = text(2, 70)
    for score in kv.SCORES:
        maker = kv.locret(model, heads_of(model), score=score, budget=12, local=3)
        _, cache = decoded(model, tokens, 70, maker, chunk=8, stabilizers=5)
        assert max(sizes) == 20 and sizes[-1] == 15 and cache.length.tolist() == [15, 15]
        assert cache.gone.tolist() == [55, 55] and cache.nbytes() == 2 * 2 * 2 * 2 * 15 * 8 * 4
        sizes.clear()


def test_protected_tails_survive_each_chunk(monkeypatch):
    model, seen, kept = small(), [], kv.retained

    def spy(score, length, budget, protect):
        out = kept(score, length, budget, protect)
        seen.append((protect, out[0][..., -protect:] if protect else None, length.clone()))
        return out
    monkeypatch.setattr(kv, "retained", spy)
    maker = kv.locret(model, score="random", budget=10, local=4)
    decoded(model, text(1, 40), 40, maker, chunk=12, stabilizers=6)
    assert [p for p, *_ in seen] == [6, 6, 0]                        # the final chunk protects none
    for protect, tail, length in seen[:2]:
        assert torch.equal(tail, torch.arange(int(length) - 6, int(length)).expand_as(tail))


def test_scores_that_never_change_keep_the_same_whatever_the_chunks():
    """The best of the best so far are the best of all: one layer, whose scores no eviction
    changes."""
    model, tokens = small(ModelConfig(**{**SMALL.__dict__, "num_hidden_layers": 1})), text(2, 40)
    maker = kv.locret(model, heads_of(model), budget=8, local=3)
    want, _ = decoded(model, tokens, 36, maker)
    for chunk in (1, 5, 16):
        assert same(decoded(model, tokens, 36, maker, chunk=chunk)[0], want)
    assert not same(want, model(tokens)[:, 35:])


@pytest.mark.parametrize("name", ["kivi", "locret", "attention"])
def test_mixed_precision_keeps_a_cache_of_bfloat16(name):
    model = small(scale=3.)
    with torch.autocast("cpu", torch.bfloat16):
        prompts, maker = [text(1, 30)[0].tolist(), [1, 2]], MAKERS[name](model)
        got, plain = (generate(model, prompts, 12, temperature=0, cache=c) for c in (maker, Cache))
        cache = maker(model.config, 1, 0, "cpu", torch.bfloat16)
        model(torch.tensor(prompts[:1]), cache)
    assert got.logp.isfinite().all() and close(got.logp[0, 30], plain.logp[0, 30], 1e-6)
    held = cache.k if name != "kivi" else cache.parts[0][0].tail
    assert held.dtype == torch.bfloat16


def test_kept_tokens_stand_where_they_stood():
    """Positions run on over evicted tokens, and keys keep their phase: they are those of a full
    cache."""
    model, tokens = small(ModelConfig(**{**SMALL.__dict__, "num_hidden_layers": 1})), text(1, 34)
    full = Cache(model.config, 1, 34, "cpu", torch.float32)
    model(tokens, full)
    _, cache = decoded(model, tokens, 30, kv.locret(model, score="random", budget=6, local=4))
    assert cache.at(1)[0].tolist() == [[34]]
    for head in range(2):
        far = (cache.k[0, 0, head, :14, None] - full.k[0, 0, head]).norm(dim=-1)        # [slots, T]
        where = far.argmin(1)
        assert far.amin(1).max() < 1e-5 and (where.diff() > 0).all()
        assert where[-8:].tolist() == [*range(26, 34)]


def test_attention_sums_are_those_of_the_model():
    model, tokens = small(ModelConfig(**{**SMALL.__dict__, "num_hidden_layers": 1})), text(2, 12)
    taken = []
    hooks = kv.watch_attention(model, lambda layer, a, seen, where: taken.append(
        [kv.rotated(a, seen[n], f"{n}_norm", *where[1:3]) for n in "qk"]))
    model(tokens)
    for hook in hooks:
        hook.remove()
    q, k = taken[0]
    logit = q @ k.repeat_interleave(2, 1).mT / 8 ** .5
    p = logit.masked_fill(torch.ones(12, 12).triu(1) > 0, -math.inf).softmax(-1)      # [B, H, T, T]
    want = p.sum(2).unflatten(1, (2, 2)).sum(2)                                # [B, K, T]
    cache = make(kv.locret(model, score="attention"), model, 2)
    model(tokens, cache)
    cache.absorb()
    assert close(cache.score[0], want, 1e-4) and close(want.sum(-1), torch.full((2, 2), 24.), 1e-4)
    chunks = make(kv.locret(model, score="attention"), model, 2)
    for part in tokens.split(5, 1):
        model(part, chunks)
    chunks.absorb()
    assert close(chunks.score, cache.score, 1e-4)


def test_hooks_leave_with_the_prompt_and_with_the_cache():
    model = small()

    def hooks():
        return sum(len(m._forward_hooks) for m in model.modules())
    maker = kv.locret(model, heads_of(model))
    assert hooks() == 0
    decoded(model, text(1, 20), 10, maker)
    assert hooks() == 0
    cache = make(maker, model, 1)
    assert hooks() == 8
    del cache
    assert hooks() == 0


def test_what_a_cache_cannot_do_is_said():
    model, tokens = small(), text(1, 90)
    with pytest.raises(UserError, match="train_heads"):
        kv.locret(model)
    other = make(kv.locret(small(), score="recency"), model, 1)
    model(tokens, other)
    with pytest.raises(UserError, match="another model's"):
        other.spread(torch.arange(1), 4)
    cache = make(kv.locret(model, score="recency", budget=24), model, 1)
    model(tokens, cache)
    cache.spread(torch.arange(1), 8)
    model(tokens[:, :6], cache)
    with pytest.raises(UserError, match="97 tokens exceed"):
        model(tokens[:, :1], cache)


# --- rows of different lengths --------------------------------------------------------------------

MAKERS = dict(kivi=lambda m: kivi(group=4, window=8),
              token=lambda m: kivi(bits=4, group=8, window=0, keys="token"),
              swapped=lambda m: kivi(group=4, window=4, keys="token", values="channel"),
              locret=lambda m: kv.locret(m, heads_of(m), budget=6, local=3),
              recency=lambda m: kv.locret(m, score="recency", budget=6, local=3),
              attention=lambda m: kv.locret(m, score="attention", budget=6, local=3))


@pytest.mark.parametrize("name", MAKERS)
def test_a_ragged_batch_equals_its_rows_alone(name):
    model = small()
    maker = MAKERS[name](model)
    prompts = [text(1, n, seed=n)[0].tolist() for n in (3, 21, 8, 14, 30)]
    batch = generate(model, prompts, 30, temperature=0, stop=(), cache=maker)
    for i, prompt in enumerate(prompts):
        alone = generate(model, [prompt], 30, temperature=0, stop=(), cache=maker)
        row = batch.mask[i] > 0
        assert torch.equal(batch.tokens[i][row], alone.tokens[0][alone.mask[0] > 0])
        assert close(batch.logp[i][row], alone.logp[0][alone.mask[0] > 0], 1e-4)


@pytest.mark.parametrize("name", MAKERS)
def test_rows_that_finish_leave_and_change_nothing(name):
    model = small()
    maker = MAKERS[name](model)
    prompts = [text(1, n, seed=n)[0].tolist() for n in (30, 4, 17)]
    free = generate(model, prompts, 30, samples=2, stop=(), cache=maker,
                    generator=torch.Generator().manual_seed(0))
    stop = tuple(range(0, 12))
    got = generate(model, prompts, 30, samples=2, stop=stop, cache=maker,
                   generator=torch.Generator().manual_seed(0))
    assert 0 < got.row_steps < free.row_steps and len(set(got.mask.sum(1).tolist())) > 1
    for a, b in zip(free.completions(), got.completions()):
        assert a[:len(b)] == b


def test_copies_of_a_prompt_share_nothing_but_the_past():
    model, tokens = small(), text(1, 20)
    cache = make(kivi(group=4, window=4), model, 1)
    model(tokens, cache)
    cache.spread(torch.tensor([0, 0]), 30)
    more = text(2, 25, seed=3)
    got = torch.cat([model(more[:, t:t + 1], cache) for t in range(25)], 1)
    for b in range(2):
        alone, _ = decoded(model, torch.cat([tokens, more[b:b + 1]], 1), 20,
                           kivi(group=4, window=4))
        assert same(got[b], alone[0, 1:])


# --- retaining heads ------------------------------------------------------------------------------


def test_labels_and_loss_by_hand():
    q = D([[[[9., 9], [1, 0]], [[9, 9], [0, 2]]]])                    # two heads; only token 1 asks
    k = D([[[[3., 1], [7, 7]]]])                                               # one key head
    assert close(kv.retaining_labels(q, k, 1), [[[3 / 2 ** .5]]])              # max(3, 2) / sqrt(2)
    score, label = D([[[0., 2., 2.]]]), D([[[.5, 0., 2.]]])
    want = (.125 + 1.5 + 0) / 3                                          # SmoothL1: d²/2, |d| - 1/2
    assert close(kv.retaining_loss(score, label, smooth=0.), want)
    assert close(kv.retaining_loss(score, label), want + .0025 * 2)            # mean of 4 and 0
    label, score = rand(1, 2, 5, seed=2), rand(1, 2, 5).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: kv.retaining_loss(x, label), score)


def test_labels_are_the_attention_that_the_model_computes():
    model, tokens = small(), text(2, 24)
    (c, label), *_ = kv.retaining_data(model, tokens, 6)
    x = model.layers[0].input_layernorm(model.embed_tokens(tokens))
    a = model.layers[0].self_attn
    assert close(c, torch.cat([a.q_proj(x), a.k_proj(x), a.v_proj(x)], -1)[:, :18], 1e-5)
    cache = Cache(model.config, 2, 24, "cpu", torch.float32)
    model(tokens, cache)                                               # its keys: normed and turned
    q = a.q_norm(a.q_proj(x).view(2, 24, 4, 8)).transpose(1, 2)
    q = rope(q, *(t[:24] for t in rope_table(model.config, "cpu")))
    want = torch.full((2, 2, 18), -math.inf)
    for h in range(4):
        for j in range(18, 24):
            logit = (cache.k[0][:, h // 2, :18] * q[:, h, j, None]).sum(-1)
            want[:, h // 2] = torch.maximum(want[:, h // 2], logit)
    assert close(label, want / 8 ** .5, 1e-4)


def test_training_touches_the_heads_alone_and_learns():
    """Queries all point one way, in a channel that RoPE hardly turns: a key's own channel is the
    label."""
    config = ModelConfig(**{**SMALL.__dict__, "model_type": "qwen2", "rope_theta": 1e6})
    model = small(config).requires_grad_()
    for block in model.layers:
        block.self_attn.q_proj.bias.data.view(4, 8)[:, 3] = 8.
    before, windows = copy.deepcopy(model.state_dict()), text(32, 40)
    first, again = (kv.train_heads(model, windows, steps=1, lr=0., width=32, answer=8)
                    for _ in range(2))
    heads = kv.train_heads(model, windows, steps=100, lr=1e-2, width=32, answer=8)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
    assert not any(m._forward_hooks for m in model.modules())
    assert all(torch.equal(a, b)
               for a, b in zip(first.state_dict().values(), again.state_dict().values()))
    data = kv.retaining_data(model, text(8, 40, seed=9), 8)

    def mean(f, heads):
        return sum(float(f(h(c).mT, y)) for h, (c, y) in zip(heads, data)) / len(data)
    guess = sum(kv.retaining_loss(y.mean((0, 2), keepdim=True).expand_as(y), y).item()
                for _, y in data) / 2
    assert mean(kv.retaining_loss, heads) < .5 * guess
    # and what the heads keep serves the model better than what chance keeps
    tokens = text(16, 60, seed=5)
    want = model(tokens)[:, 40:]

    def off(score):
        maker = kv.locret(model, heads, score=score, budget=10, local=2)
        got = decoded(model, tokens, 40, maker, chunk=12, stabilizers=2)[0][:, 1:]
        return (got - want).norm() / want.norm()
    assert off("locret") < .7 * off("random")
    with pytest.raises(UserError, match="last 40 tokens"):
        kv.train_heads(model, windows, steps=1, answer=40)


# --- evaluation -----------------------------------------------------------------------------------


def test_the_full_cache_scores_what_the_model_scores():
    model, windows = small(), text(5, 30)
    logp, size = kv.cached_logp(model, windows, 11, Cache, batch=2)
    assert close(logp, token_logprobs(model, windows)[:, 11:], 1e-4)
    assert size == 2 * 2 * 2 * 8 * 4                                    # layers, k and v, heads, hd
    assert close(kv.cached_nll(model, windows, 11, Cache)[0], -logp.mean(), 1e-5)
    assert kv.cached_nll(model, windows, 11, kivi(window=0, group=8))[1] < size


def test_on_a_real_model_keys_want_groups_of_a_channel(stories):
    """KIVI's claim, 2 bits, groups of 8 both ways, so that bytes are equal: stories260k on real
    stories."""
    model, tok = load(stories)
    lines = (DATA_DIR / "tinystories-30k.txt").read_text().split("\n")
    windows = torch.tensor([[tok.bos, *tok.encode(line)][:112] for line in lines[:8]])
    full = kv.cached_nll(model, windows, 64, Cache)[0]
    loss = {axis: kv.cached_nll(model, windows, 64, kivi(group=8, window=8, keys=axis))
            for axis in kv.GROUPS}
    assert full < loss["channel"][0] < full + .5 < full + 1 < loss["token"][0]
    assert loss["channel"][1] == pytest.approx(loss["token"][1], rel=.05)
