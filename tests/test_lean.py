"""Decoding on a CPU in few products: the numbers of the model itself, where it is used, and where
it must not be."""
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import kernels
import model as M
from data.tokenizer import bytes_tokenizer
from model import PEFT, Cache, Lean, Transformer, generate, init, laid_out, lean_fits, preset

USUAL = dict(llama={}, mistral={}, qwen2={}, qwen3=dict(query_pre_attn_scalar=40.0),
             untied=dict(tie_word_embeddings=False, lm_head_bias=True, attention_bias=True,
                         mlp_bias=True),
             longrope=dict(rope_scaling=(
                 ("rope_type", "longrope"), ("original_max_position_embeddings", 8), ("factor", 4),
                 ("short_factor", (1.0,) * 8), ("long_factor", (3.0,) * 8))))
ODD = dict(mixtral={}, qwen3_moe={}, gemma3_text={}, phi3=dict(partial_rotary_factor=0.5),
           window=dict(sliding_window=8, layer_types=("sliding_attention", "full_attention")),
           widths=dict(layer_widths=(64, 0)), heads=dict(routed_heads=1, shared_heads=1),
           swift=dict(swift_layer=1))


def small(name="llama", dtype=torch.float64, **changes):
    """A random model: two layers, two query heads a key head."""
    family, given = (name if name in M.FAMILIES else "llama"), {**USUAL, **ODD}.get(name, {})
    config = preset("2x64", bytes_tokenizer(), 96, family)
    net = init(replace(config, num_attention_heads=4, num_key_value_heads=2, head_dim=16,
                       **given | changes), seed=1).to(dtype)
    g = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for p in net.parameters():
            p.add_(0.1 * torch.randn(p.shape, generator=g))
    return net


@pytest.fixture(autouse=True)
def usual(monkeypatch):
    """Lean from the first token on, with the kernels of a CPU."""
    monkeypatch.setattr(M, "LEAN", 1)
    kernels.use("auto")
    yield
    kernels.use("auto")


def decoded(net, step, lengths, steps, static=False):
    """States and logits of some steps after prompts of those lengths.   [n, steps, ...] each"""
    g = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, 256, (len(lengths), max(lengths)), generator=g)
    hidden, cache = M.read(net, tokens, torch.tensor(lengths))
    cache.spread(torch.arange(len(lengths)), steps + 3)
    if static:
        cache.static, cache.used = True, cache.used + steps
    states = []
    for i in range(steps):
        states.append(step(torch.randint(0, 256, (len(lengths), 1), generator=g), cache)[:, 0])
    return torch.stack(states, 1), cache.length.tolist(), cache.used


@pytest.mark.parametrize("name", USUAL)
@pytest.mark.parametrize("static", [False, True])
@torch.no_grad()
def test_a_step_is_the_models_own(name, static):
    net = small(name)
    assert lean_fits(net)
    lean, lengths = Lean(net, 3), ([9, 9, 9] if static else [11, 5, 9])
    want, *ends = decoded(net, net, lengths, 4, static)
    got, *same = decoded(net, lean, lengths, 4, static)
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)
    assert same == ends
    torch.testing.assert_close(lean.logits(got[:, 0]), net.logits(want[:, 0]), rtol=1e-6, atol=1e-6)


@torch.no_grad()
def test_what_is_no_step_of_tokens_is_the_models(monkeypatch):
    """Prompts, and a cache of another kind."""
    net, other, plain, asked = small(), type("Other", (Cache,), {}), Transformer.forward, []
    lean, tokens = Lean(net, 2), torch.randint(0, 256, (2, 7))
    monkeypatch.setattr(Transformer, "forward", lambda *a: asked.append(a) or plain(*a))
    for make, width, own in ((Cache, 7, 1), (other, 7, 1), (other, 1, 1), (Cache, 1, 0)):
        caches = [make(net.config, 2, 8, "cpu", torch.float64) for _ in range(2)]
        want = plain(net, tokens[:, :width], caches[0])
        asked.clear()
        torch.testing.assert_close(lean(tokens[:, :width], caches[1]), want, rtol=1e-10, atol=1e-10)
        assert len(asked) == own


def test_a_step_beyond_the_context_is_refused():
    net = small()
    cache = Cache(net.config, 1, 96, "cpu", torch.float64)
    net(torch.zeros(1, 96, dtype=torch.long), cache)
    with pytest.raises(M.UserError, match="97 tokens exceed the model's context of 96"):
        Lean(net, 1)(torch.zeros(1, 1, dtype=torch.long), cache)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rows", [1, 3, 16])
@torch.no_grad()
def test_laid_out_is_a_linear_layer(dtype, rows):
    """Several layers side by side, of rows for which the weights were not laid out, too."""
    g = torch.Generator().manual_seed(0)
    layers, x = [nn.Linear(48, n) for n in (32, 16, 7)], torch.randn(5, 48, generator=g)
    for m in layers:
        m.weight.copy_(torch.randn(m.weight.shape, generator=g))
        m.bias.copy_(torch.randn(m.bias.shape, generator=g))
    want = torch.cat([F.linear(*(z.to(dtype).double() for z in (x, m.weight, m.bias)))
                      for m in layers], 1)
    got = laid_out(rows, dtype, *layers)(x)
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5}.get(dtype, 3e-2)
    assert got.dtype == dtype
    torch.testing.assert_close(got.double(), want, rtol=tolerance, atol=tolerance)
    alone = laid_out(rows, dtype, layers[0].weight)(x)
    torch.testing.assert_close(alone.double(), want[:, :32] - layers[0].bias.to(dtype).double(),
                               rtol=tolerance, atol=4 * tolerance)


@pytest.mark.parametrize("name", ODD)
def test_models_that_lean_does_not_know_keep_their_own_step(name):
    assert not lean_fits(small(name))


def test_layers_that_are_not_plain_keep_their_own_step(monkeypatch):
    class Options:
        rank, alpha, targets, dropout = 2, 4.0, "all", 0.0
    net = small(dtype=torch.float32)
    assert lean_fits(net)
    net.layers[1].mlp.down_proj = type("Other", (nn.Linear,), {})(192, 64)
    assert not lean_fits(net)
    net = small(dtype=torch.float32)
    monkeypatch.setattr(M, "LEAN_BYTES", sum(x.nbytes for x in net.parameters()) - 1)
    assert not lean_fits(net)
    monkeypatch.setattr(M, "LEAN_BYTES", sum(x.nbytes for x in net.parameters()))
    assert lean_fits(net)
    PEFT["lora"](net, torch.Generator().manual_seed(0))
    assert not lean_fits(net)


@pytest.mark.parametrize("mode", ["torch", "triton"])
def test_definitions_and_triton_keep_their_own_step(mode):
    net = small(dtype=torch.float32)
    kernels.use(mode)
    assert not lean_fits(net)


@pytest.mark.parametrize("options", [dict(stop=[]), {}, dict(slots=3), dict(slots=3, chunk=8),
                                     dict(temperature=0)], ids=str)
def test_a_rollout_is_the_same(monkeypatch, options):
    """Rows that stop, wait, get a slot, and all at once; and each step is Lean's own."""
    net, g = small("qwen3", torch.float32), torch.Generator().manual_seed(4)
    prompts = [torch.randint(0, 256, (n,), generator=g).tolist() for n in (3, 9, 2, 7, 5)]
    options = dict(stop=list(range(0, 250, 16))) | options
    plain, calls = Transformer.forward, []

    def counted(self, tokens, cache=None):
        calls.append(tokens.size(1))
        return plain(self, tokens, cache)
    monkeypatch.setattr(Transformer, "forward", counted)
    rolls, steps = [], []
    for least in (10 ** 9, 1):
        monkeypatch.setattr(M, "LEAN", least)
        calls.clear()
        rolls.append(generate(net, prompts, 12, samples=2, generator=torch.Generator()
                              .manual_seed(5), **options))
        steps.append(calls.count(1))
    own, lean = rolls
    assert torch.equal(own.tokens, lean.tokens) and torch.equal(own.mask, lean.mask)
    torch.testing.assert_close(own.logp, lean.logp, rtol=1e-4, atol=1e-4)
    assert steps[1] == 0 < steps[0] and own.row_steps == lean.row_steps


def test_few_tokens_are_not_worth_it(monkeypatch):
    net = small(dtype=torch.float32)
    monkeypatch.setattr(M, "LEAN", 6)
    assert M.stepping(net, 2, 5, Cache) is net
    assert isinstance(M.stepping(net, 2, 6, Cache), Lean)
    assert M.stepping(net, 2, 6, type("Other", (Cache,), {})) is net


@torch.no_grad()
def test_autocast_decides_the_precision():
    net = small(dtype=torch.float32)
    assert Lean(net, 2).dtype == torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        lean = Lean(net, 2)
        want, *_ = decoded(net, net, [4, 6], 3)
        got, *_ = decoded(net, lean, [4, 6], 3)
    assert lean.dtype == torch.bfloat16
    torch.testing.assert_close(got, want, rtol=0.1, atol=0.1)
