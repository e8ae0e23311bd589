"""model.py: transformer against definition, generation against the full forward, checkpoints."""
import json
import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

import kernels
import model as M
from data.run import UserError
from data.tokenizer import bytes_tokenizer
from model import (MoE, ScalarModel, Transformer, collate, from_hf, generate, init, load,
                   load_balance_loss, masked_mean, masked_whiten, pick, preset, save,
                   sequence_score, to_hf, token_logprobs, token_values)

FAMILIES = ["llama", "qwen2", "qwen3", "mixtral", "qwen3_moe"]       # others: test_families.py
LLAMA3 = (("factor", 8.0), ("high_freq_factor", 4.0), ("low_freq_factor", 1.0),
          ("original_max_position_embeddings", 32), ("rope_type", "llama3"))


def small(family="qwen3", **changes):
    """A random model of any family: two layers, grouped queries, noisy norms and biases."""
    config = preset("2x64", bytes_tokenizer(), 96, family)
    config = replace(config, num_attention_heads=4, num_key_value_heads=2, head_dim=16, **changes)
    net = init(config, seed=1)
    g = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for p in net.parameters():
            p.add_(0.1 * torch.randn(p.shape, generator=g))
    return net


def ids(n, length, seed=0):
    """Random byte ids [n, length]."""
    g = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (n, length), generator=g)


# --- the transformer ------------------------------------------------------------------------------


def normed(x, weight):
    """x / rms(x) * weight, of each row."""
    return x / (x.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt() * weight


def turned(x):
    """A head's queries or keys [T, hd]: pairs (i, i + hd/2) turned by t 10000^(-2i/hd)."""
    half = x.size(1) // 2
    angle = torch.arange(len(x))[:, None] * 10000.0 ** (-torch.arange(half) / half)
    a, b = x[:, :half], x[:, half:]
    return torch.cat([a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()], 1)


def attended(h, w, c):
    """Attention of one row, head by head.   h [T, D] -> [T, D]"""
    q, k, v = (h @ w[f"{x}_proj.weight"].T + w.get(f"{x}_proj.bias", 0) for x in "qkv")
    heads, d = [], c.head_dim
    for n in range(c.num_attention_heads):
        g = n * c.num_key_value_heads // c.num_attention_heads          # neighbours share keys
        a, b, y = q[:, n * d:n * d + d], k[:, g * d:g * d + d], v[:, g * d:g * d + d]
        if "q_norm.weight" in w:
            a, b = normed(a, w["q_norm.weight"]), normed(b, w["k_norm.weight"])
        score = turned(a) @ turned(b).T / d ** 0.5
        future = torch.ones(len(h), len(h)).triu(1) > 0
        heads.append(score.masked_fill(future, -math.inf).softmax(-1) @ y)
    return torch.cat(heads, 1) @ w["o_proj.weight"].T


def gated(h, w, at=""):
    """down(silu(gate h) * up h)"""
    gate, up, down = (w[f"{at}{x}_proj.weight"] for x in ("gate", "up", "down"))
    return (F.silu(h @ gate.T) * (h @ up.T)) @ down.T


def mixed(h, w):
    """The two likeliest experts of each token, by their shares."""
    out = torch.zeros_like(h)
    for t, p in enumerate((h @ w["gate.weight"].T).softmax(-1)):
        best = p.argsort(descending=True)[:2].tolist()
        for e in best:
            out[t] += p[e] / p[best].sum() * gated(h[t], w, f"experts.{e}.")
    return out


@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_is_the_equations_of_its_family(family):
    net = small(family).double()
    w, x = net.state_dict(), net.embed_tokens.weight[ids(1, 9)[0]]

    def inside(prefix):
        return {k.removeprefix(prefix): v for k, v in w.items() if k.startswith(prefix)}

    for i in range(2):
        layer = inside(f"layers.{i}.")
        h = normed(x, layer["input_layernorm.weight"])
        x = x + attended(h, inside(f"layers.{i}.self_attn."), net.config)
        h, mlp = normed(x, layer["post_attention_layernorm.weight"]), inside(f"layers.{i}.mlp.")
        x = x + (mixed(h, mlp) if "gate.weight" in mlp else gated(h, mlp))
    want = normed(x, w["norm.weight"]) @ w["embed_tokens.weight"].T
    assert torch.allclose(net(ids(1, 9))[0] @ net.head.T, want, atol=1e-5)
    assert torch.allclose(net.logits(net(ids(1, 9)))[0], want.float(), atol=1e-4)


def test_a_new_model_by_hand():
    """GPT-2's: std 0.02, what writes to the residual stream 1/sqrt(2L) of it; norms 1, biases 0"""
    tok = bytes_tokenizer()
    config = preset("2x96", tok, 77, "qwen2")
    want = M.ModelConfig("qwen2", 320, 96, 256, 2, 3, 3, 32, 77, eos_token_id=(tok.eos,),
                         bos_token_id=tok.bos, pad_token_id=tok.pad)
    assert config == want and preset("1x64", tok).num_key_value_heads == 1
    assert preset("1x64", tok, 9, "mixtral").num_experts == 8
    net = init(config, seed=3)
    for name, p in net.named_parameters():
        if p.dim() > 1:
            out = "o_proj" in name or "down_proj" in name
            assert p.std().item() == pytest.approx(0.01 if out else 0.02, rel=0.05), name
        else:
            assert (p == (0 if "bias" in name else 1)).all()
    again, other = init(config, seed=3), init(config, seed=4)
    assert torch.equal(net.head, again.head) and not torch.equal(net.head, other.head)


def test_positions_pushed_together():
    """linear, factor 4: position 8 is turned as position 2 was"""
    c = replace(small().config, rope_scaling=(("factor", 4.0), ("rope_type", "linear")))
    near, far = (M.rope_table(x, torch.device("cpu")) for x in (c, small().config))
    assert all(torch.allclose(a[8], b[2], atol=1e-6) for a, b in zip(near, far))


@pytest.mark.parametrize("family", FAMILIES)
def test_the_past_never_sees_the_future(family):
    """in float64: the future changes an expert's rows, and with them the order of a product's
    float32 sums"""
    net, x = small(family).double(), ids(2, 12)
    y = x.clone()
    y[:, 8:] = 7
    a, b = net(x), net(y)
    assert torch.allclose(a[:, :8], b[:, :8], atol=1e-10)
    assert not torch.allclose(a[:, 8:], b[:, 8:], atol=1e-2)


def test_rope_depends_on_distance_only():
    """q_i · k_j after rotation is a function of i - j."""
    c = small().config
    cos, sin = M.rope_table(c, torch.device("cpu"))
    q, k = torch.randn(2, 1, 1, 1, 16).unbind(0)
    at = [(M.rope(q, cos[i:i + 1], sin[i:i + 1]) * M.rope(k, cos[j:j + 1], sin[j:j + 1])).sum()
          for i, j in ((3, 1), (50, 48), (3, 2))]
    assert torch.allclose(at[0], at[1], atol=1e-5) and not torch.allclose(at[0], at[2], atol=1e-2)


def test_llama3_scaling_by_hand():
    """Old context 32, factor 8, low 1, high 4: a frequency with more than 4 turns in the old
    context is kept, one with less than 1 is divided by 8, and 2.5 turns (smooth = 0.5) gives half
    of each: 0.5625 of it."""
    c = replace(small().config, rope_theta=10000.0, rope_scaling=LLAMA3, max_position_embeddings=96)
    cos, sin = M.rope_table(c, torch.device("cpu"))
    new = torch.atan2(sin[1], cos[1])                                                   # angle at 1
    old = 10000.0 ** (-torch.arange(8) / 8)
    turns = 32 * old / (2 * math.pi)
    smooth = ((turns - 1) / 3).clamp(0, 1)
    assert turns[0] > 4 and new[0] == pytest.approx(1.0)
    assert turns[-1] < 1 and torch.allclose(new[-1], old[-1] / 8)
    middle = (turns > 1) & (turns < 4)
    want = old * (smooth + (1 - smooth) / 8)
    assert middle.any() and torch.allclose(new[middle], want[middle])


def test_moe_is_the_weighted_sum_of_the_chosen_experts():
    layer = small("mixtral").layers[0].mlp
    x = torch.randn(1, 3, 64)
    prob = layer.gate(x[0]).softmax(-1)
    want = []
    for t in range(3):
        top = prob[t].topk(2)
        want.append(sum(w * layer.experts[e](x[0, t])
                        for w, e in zip(top.values / top.values.sum(), top.indices.tolist())))
    assert torch.allclose(layer(x)[0], torch.stack(want), atol=1e-5)


def test_load_balance_loss_by_hand():
    """4 experts, top 1, two tokens, both to expert 0 with p = (.7 .1 .1 .1) and (.4 .2 .2 .2):
    f = (1 0 0 0), P = (.55 …), 4 * .55 = 2.2; uniform routing gives 1."""
    config = replace(small("mixtral").config, num_experts=4, num_experts_per_tok=1,
                     num_hidden_layers=1)
    net = Transformer(config)
    layer = next(m for m in net.modules() if isinstance(m, MoE))
    logits = torch.tensor([[.7, .1, .1, .1], [.4, .2, .2, .2]]).log()
    layer.router_logits = logits
    assert load_balance_loss(net).item() == pytest.approx(2.2, abs=1e-6)
    assert layer.router_logits is None
    layer.router_logits = logits
    assert load_balance_loss(net, torch.tensor([[1, 0]])).item() == pytest.approx(2.8, abs=1e-6)
    layer.router_logits = torch.eye(4) * 1e-3
    assert load_balance_loss(net).item() == pytest.approx(1.0, abs=1e-3)
    assert load_balance_loss(small("llama")).item() == 0


def test_beyond_the_context_is_an_error():
    with pytest.raises(UserError, match="200 tokens exceed the model's context of 96"):
        small()(ids(1, 200))


# --- scoring --------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_token_logprobs_is_the_definition(family, temperature, monkeypatch):
    monkeypatch.setattr(kernels, "CHUNK", 1000)                       # several chunks
    net, x = small(family), ids(3, 11)
    logp = torch.log_softmax(net.logits(net(x)) / temperature, -1)[:, :-1]
    want = F.pad(logp.gather(2, x[:, 1:, None]).squeeze(2), (1, 0))
    entropy = F.pad(-(logp.exp() * logp).sum(-1), (1, 0))
    got, ent = token_logprobs(net, x, temperature=temperature, entropy=True)
    assert torch.allclose(got, want, atol=1e-5) and torch.allclose(ent, entropy, atol=1e-5)
    mask = (torch.rand(3, 11) < 0.5).float()
    assert torch.allclose(token_logprobs(net, x, mask, temperature=temperature), want * mask,
                          atol=1e-5)


def test_token_logprobs_of_nothing_is_zero():
    assert token_logprobs(small(), ids(2, 5), torch.zeros(2, 5)).abs().sum() == 0


@pytest.mark.parametrize("family", FAMILIES)
def test_padding_and_row_order_change_nothing(family):
    net, rows = small(family), [(ids(1, n, n)[0].tolist(), ids(1, m, m + 50)[0].tolist())
                                for n, m in ((3, 9), (7, 2), (1, 5))]
    tokens, mask = collate(rows, 256)
    wide, wide_mask = F.pad(tokens, (0, 6), value=99), F.pad(mask, (0, 6))
    a = token_logprobs(net, tokens, mask)
    assert torch.allclose(a, token_logprobs(net, wide, wide_mask)[:, :tokens.size(1)], atol=1e-5)
    assert torch.allclose(a.flip(0), token_logprobs(net, tokens.flip(0), mask.flip(0)), atol=1e-5)
    one = torch.cat([token_logprobs(net, t, m) for t, m in zip(tokens.split(1), mask.split(1))])
    assert torch.allclose(a, one, atol=1e-5)


def test_collate_masks_by_length_not_by_token():
    tokens, mask = collate([([5, 0], [0, 9]), ([1], [2])], pad=0)
    assert tokens.tolist() == [[5, 0, 0, 9], [1, 2, 0, 0]]
    assert mask.tolist() == [[0, 0, 1, 1], [0, 1, 0, 0]]
    assert collate([([5], [6]), ([1], [])], pad=9)[0].tolist() == [[5, 6], [1, 9]]


def test_masked_statistics_by_hand():
    x = torch.tensor([[1.0, 3.0, 99.0], [5.0, 99.0, 99.0]])
    mask = torch.tensor([[1.0, 1, 0], [1, 0, 0]])
    assert masked_mean(x, mask) == 3.0
    white = masked_whiten(x, mask)                       # mean 3, biased variance 8/3
    assert torch.allclose(white, torch.tensor([[-1.224745, 0, 0], [1.224745, 0, 0]]), atol=1e-6)
    assert torch.allclose(masked_whiten(x, mask, shift=False), (white + 3) * mask, atol=1e-6)


def test_values_are_read_before_the_token_and_scores_after_it():
    critic = ScalarModel.from_lm(small("llama"), std=1.0)
    x = ids(2, 9)
    raw, values = critic(x), token_values(critic, x, torch.ones(x.shape))
    assert torch.equal(values[:, 1:], raw[:, :-1]) and values[:, 0].abs().sum() == 0
    y = x.clone()
    y[:, 5:] = 3
    again = token_values(critic, y, torch.ones(x.shape))
    assert torch.allclose(again[:, :6], values[:, :6], atol=1e-6)         # V(5) precedes token 5
    assert torch.allclose(sequence_score(critic, x, torch.tensor([9, 4])),
                          torch.stack([raw[0, 8], raw[1, 3]]), atol=1e-6)
    assert ScalarModel.from_lm(small("llama"))(x).abs().sum() == 0


# --- generation -----------------------------------------------------------------------------------

PROMPTS = [ids(1, n, n)[0].tolist() for n in (4, 9, 4, 1)]


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_is_the_argmax_of_the_full_forward(family):
    net = small(family)
    roll = generate(net, PROMPTS, 12, temperature=0, stop=[])
    for row, prompt in zip(roll.tokens, PROMPTS):
        text = list(prompt)
        for _ in range(12):
            text.append(int(net.logits(net(torch.tensor([text]))[:, -1]).argmax()))
        assert row[:len(text)].tolist() == text


@pytest.mark.parametrize("family", FAMILIES)
def test_the_sampler_is_the_policy(family):
    net, stop = small(family), list(range(5, 250, 9))
    roll = generate(net, PROMPTS, 14, samples=5, temperature=0.8, stop=stop,
                    generator=torch.Generator().manual_seed(0))
    logp = token_logprobs(net, roll.tokens, roll.mask, temperature=0.8)
    assert (logp - roll.logp).abs().max() < 1e-4
    assert 0 < roll.finished.sum() < 20          # the batch did shrink, and some ran on
    for b in range(20):
        prompt, n = PROMPTS[b // 5], int(roll.mask[b].sum())
        assert roll.tokens[b, :len(prompt)].tolist() == prompt and roll.prompt_len[b] == len(prompt)
        begin, end = len(prompt), len(prompt) + n
        assert roll.mask[b].nonzero().flatten().tolist() == list(range(begin, end))
        drawn = roll.tokens[b, begin:end].tolist()
        assert (drawn[-1] in stop) == bool(roll.finished[b]) and not set(drawn[:-1]) & set(stop)
        assert n == 14 or roll.finished[b]
        assert roll.completions()[b] == (drawn[:-1] if roll.finished[b] else drawn)


def test_other_rows_do_not_change_a_row():
    """A row's draws are fixed beforehand, whatever else is in the batch."""
    net = small()
    runs = [generate(net, PROMPTS[:1] + others, 10, generator=torch.Generator().manual_seed(3))
            for others in ([], PROMPTS[1:2])]
    u = torch.rand(1, 10, generator=torch.Generator().manual_seed(3))
    v = torch.rand(2, 10, generator=torch.Generator().manual_seed(3))
    assert torch.equal(u[0], v[0])
    n = int(runs[0].mask[0].sum()) + len(PROMPTS[0])
    assert runs[0].tokens[0, :n].tolist() == runs[1].tokens[0, :n].tolist()


def test_each_distinct_prompt_is_prefilled_once(monkeypatch):
    net, seen, forward = small(), [], Transformer.forward
    monkeypatch.setattr(Transformer, "forward", lambda self, t, cache=None:
                        seen.append(tuple(t.shape)) or forward(self, t, cache))
    generate(net, PROMPTS[:2] + PROMPTS[:2], 2, samples=8, stop=[])
    assert seen[0] == (2, 9) and seen[1] == (32, 1)


def test_pick_samples_the_distribution():
    """Evenly spaced u hit every token as often as its probability says; truncation by hand."""
    p = torch.tensor([0.5, 0.3, 0.15, 0.05])
    u = (torch.arange(1000) + 0.5) / 1000
    logits = p.log().repeat(1000, 1)
    token, logp = pick(logits, u)
    assert torch.bincount(token, minlength=4).tolist() == [500, 300, 150, 50]
    assert torch.allclose(logp, p.log()[token])
    assert pick(logits[:5], torch.tensor([0, .499, .501, .799, .96]))[0].tolist() == [0, 0, 1, 1, 3]
    token, logp = pick(logits, u, top_k=2)
    assert (torch.bincount(token, minlength=4).tolist() == [625, 375, 0, 0]
            and torch.allclose(logp.exp().unique(), torch.tensor([.375, .625])))
    assert torch.bincount(pick(logits, u, top_p=0.8)[0], minlength=4).tolist() == [625, 375, 0, 0]
    assert torch.bincount(pick(logits, u, top_p=0.81)[0], minlength=4).argmin() == 3
    hot = pick(logits, u, temperature=0.5)[0]               # squares: .25 .09 .0225 .0025
    hot = torch.bincount(hot, minlength=4)
    assert abs(hot[0].item() - 1000 * .25 / .365) <= 1
    assert pick(logits, u, temperature=0)[0].unique().tolist() == [0]
    edge = pick(torch.tensor([[0.0, -math.inf]]), torch.tensor([1 - 2 ** -24]))
    assert edge[0].item() == 0 and edge[1].item() == 0


def test_contrast_samples_the_product_of_powers():
    """softmax(l + a (l - l')): logp is that of the mixed logits; a = 0 is the model itself."""
    net, other = small(), small("llama")
    roll = generate(net, PROMPTS, 8, stop=[], contrast=(other, 0.7),
                    generator=torch.Generator().manual_seed(0))
    l, l_other = net.logits(net(roll.tokens)), other.logits(other(roll.tokens))
    mixed = torch.log_softmax(1.7 * l - 0.7 * l_other, -1)
    want = F.pad(mixed[:, :-1].gather(2, roll.tokens[:, 1:, None]).squeeze(2), (1, 0)) * roll.mask
    assert torch.allclose(roll.logp, want, atol=1e-4)
    plain, zero = (generate(net, PROMPTS, 8, generator=torch.Generator().manual_seed(0), **kw)
                   for kw in ({}, dict(contrast=(other, 0.0))))
    assert torch.equal(plain.tokens, zero.tokens)
    same = generate(net, PROMPTS, 8, stop=[], generator=torch.Generator().manual_seed(0),
                    contrast=(other, lambda mine, theirs: mine + 0.7 * (mine - theirs)))
    assert torch.equal(same.tokens, roll.tokens) and torch.equal(same.logp, roll.logp)


@pytest.mark.parametrize("prompts, n, words", [
    ([], 4, "at least one prompt"), ([[1], []], 4, "at least one token"),
    ([[1] * 95], 4, "exceed the context of 96"), ([[1]], -1, "-1 new tokens")])
def test_generate_refuses(prompts, n, words):
    with pytest.raises(UserError, match=words):
        generate(small(), prompts, n)
    for kw in (dict(samples=0), dict(temperature=-0.1), dict(top_k=-1)):
        with pytest.raises(UserError, match="generate cannot make"):
            generate(small(), [[1]], 4, **kw)


@pytest.mark.parametrize("options", [dict(temperature=0), dict(temperature=1.5, top_k=9),
                                     dict(temperature=0.9, top_p=0.5)])
def test_stream_gives_what_generate_gives(options):
    """with the same draws, up to the model's own end"""
    net = small()
    whole = generate(net, [PROMPTS[1]], 10, stop=[], generator=torch.Generator().manual_seed(1),
                     **options).tokens[0, 9:].tolist()
    for end, want in (((), whole), ((whole[4],), whole[:whole.index(whole[4]) + 1])):
        net.config = replace(net.config, eos_token_id=end)
        assert list(M.stream(net, PROMPTS[1], 10, generator=torch.Generator().manual_seed(1),
                             **options)) == want
        roll = generate(net, [PROMPTS[1]], 10, generator=torch.Generator().manual_seed(1),
                        **options)
        assert roll.tokens[0, 9:].tolist() == want


def test_rows_and_parts_of_rollouts():
    """some rows, several rollouts as one, and what a model says of them a few rows at a time"""
    torch.manual_seed(0)                                                # of the critic's head
    net, critic = small(), ScalarModel.from_lm(small(), std=1.0)
    a, b = unequal(net), generate(net, PROMPTS[:1], 20, stop=[], temperature=0.5)
    both, n = M.joined([a, b], 7), a.tokens.size(1)
    assert torch.equal(both.tokens[:20, :n], a.tokens) and (both.tokens[:20, n:] == 7).all()
    assert both.mask[:20, n:].sum() == 0 == both.logp[:20, n:].abs().sum()
    for x, y, z in zip(a[1:3], b[1:3], both[1:3]):
        assert torch.equal(z[:20, :n], x) and torch.equal(z[20], y[0])
    assert torch.equal(both.tokens[20], b.tokens[0]) and both.prompt_len[20] == 4
    assert both.finished.tolist() == a.finished.tolist() + [False]
    assert both.row_steps == a.row_steps + 19
    some = M.rows_of(a, torch.tensor([3, 0]))
    assert all(torch.equal(x, y[[3, 0]]) for x, y in zip(some[:5], a[:5]))
    c = SimpleNamespace(device="cpu", dtype="float32", micro=3, temperature=0.7)
    logp, values = M.logprobs(net, *a[:2], c), M.critic_values(critic, *a[:2], c)
    assert torch.allclose(logp, token_logprobs(net, *a[:2], temperature=0.7), atol=1e-5)
    assert torch.allclose(M.logprobs(net, *a[:2], c, 2.0),
                          token_logprobs(net, *a[:2], temperature=2.0), atol=1e-5)
    want = F.pad(critic(a.tokens)[:, :-1], (1, 0)) * a.mask
    assert torch.allclose(values, want, atol=1e-4) and values.abs().sum() > 0


def test_a_critic_starts_as_a_copy():
    """it scores 0 at first, and what it learns leaves the policy as it is"""
    net = small("llama")
    torch.manual_seed(0)                                                  # of a head
    critic = ScalarModel.from_lm(net)
    before = net.head.clone()
    with torch.no_grad():
        for p in critic.parameters():
            p.add_(1.0)
    assert torch.equal(net.head, before) and all(p.requires_grad for p in critic.parameters())
    one = ScalarModel.from_lm(net, std=0.5)
    assert one.score.weight.std().item() == pytest.approx(0.5, rel=0.3)
    hidden = net(ids(1, 5))
    assert torch.allclose(one(ids(1, 5)), (hidden * one.score.weight).sum(-1), atol=1e-4)


def unequal(net, **kw):
    """20 completions of up to 14 tokens of which many end early."""
    return generate(net, PROMPTS, 14, samples=5, stop=list(range(0, 250, 9)),
                    generator=torch.Generator().manual_seed(0), **kw)


def same(a, b):
    """Two rollouts agree: tokens exactly, log-probs to rounding."""
    return (all(torch.equal(x, y) for x, y in zip(a[:2] + a[3:5], b[:2] + b[3:5]))
            and torch.allclose(a.logp, b.logp, atol=1e-5))


def test_finished_rows_cost_nothing(monkeypatch):
    """A row of n tokens needs n - 1 forwards after the prefill, and gives what it gives alone."""
    net, rows, forward = small(), [], Transformer.forward
    monkeypatch.setattr(Transformer, "forward", lambda self, t, cache=None:
                        rows.append(len(t)) or forward(self, t, cache))
    roll = unequal(net)
    length = roll.mask.sum(1)
    assert roll.row_steps == length.sum() - 20 == sum(rows[1:]) < 0.6 * 20 * length.max()
    monkeypatch.setattr(M.Cache, "keep", lambda self, rows: 1 / 0)
    everything = generate(net, PROMPTS, 14, samples=5, stop=[],
                          generator=torch.Generator().manual_seed(0))
    assert everything.row_steps == 20 * 13
    for b in range(20):
        n = int(roll.prompt_len[b] + length[b])
        assert torch.equal(roll.tokens[b, :n], everything.tokens[b, :n])
        assert torch.allclose(roll.logp[b, :n], everything.logp[b, :n], atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("check", [1, 3, 8])
def test_static_steps_give_what_plain_ones_give(family, check, monkeypatch):
    """The loop that CUDA graphs replay, here without a graph: rows leave when half have stopped."""
    net = small(family)
    plain = unequal(net)
    monkeypatch.setattr(M, "graphed", lambda model: True)
    monkeypatch.setattr(M, "CHECK", check)
    static = unequal(net)
    assert same(plain, static)
    length, batch, want = plain.mask.sum(1), 20, 0
    for t in range(1, 14):
        alive = int(((length > t) | ~plain.finished).sum())
        if (t - 1) % check == 0:
            if alive == 0:
                break
            batch = alive if alive <= batch // 2 else batch
        want += batch
    assert plain.row_steps < static.row_steps == want < 20 * 13


@pytest.mark.parametrize("static", [False, True])
def test_the_context_can_be_filled_to_its_end(static, monkeypatch):
    monkeypatch.setattr(M, "graphed", lambda model: static)
    roll = generate(small(), PROMPTS, 96 - 9, temperature=0, stop=[])
    assert roll.tokens.shape == (4, 96) and roll.mask.sum() == 4 * 87 == roll.row_steps + 4


def test_a_static_step_never_asks_the_device(monkeypatch):
    """No number is read back, no shape depends on data, or a CUDA graph could not hold the step."""
    from torch.utils._python_dispatch import TorchDispatchMode
    seen = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append(func.overloadpacket.__name__)
            return func(*args, **(kwargs or {}))

    def watched(step, device, graphs):
        def run():
            with Watch():
                step()
        run()
        return run
    net = small()
    monkeypatch.setattr(M, "graphed", lambda model: True)
    monkeypatch.setattr(M, "capture", watched)
    monkeypatch.setattr(M, "decode_attention", kernels.decode_attention_ref)
    assert unequal(net, temperature=0.9, top_k=200, top_p=0.99).finished.any()
    asks = {"_local_scalar_dense", "nonzero", "masked_select", "_unique2", "_to_cpu"}
    assert "index_put_" in seen and not asks & set(seen)


@pytest.mark.parametrize("kernel", ["auto", "torch"])
def test_sampling_is_reproducible(kernel):
    kernels.use(kernel)
    try:
        a, b = unequal(small()), unequal(small())
    finally:
        kernels.use("auto")
    assert all(torch.equal(x, y) for x, y in zip(a[:5], b[:5])) and a.row_steps == b.row_steps


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_graphs_give_what_plain_steps_give(family, dtype, monkeypatch):
    """CUDA graphs against the same static steps launched one by one, and the policy's own
    log-probs."""
    net = small(family).to("cuda", dtype)
    graph = unequal(net)
    assert graph.row_steps < 20 * 13
    monkeypatch.setattr(M, "capture", lambda step, device, graphs: step() or step)
    assert same(graph, unequal(net))
    monkeypatch.setattr(M, "graphed", lambda model: False)
    plain, logp = unequal(net), token_logprobs(net, graph.tokens, graph.mask)
    assert (logp - graph.logp).abs().max() < (1e-3 if dtype == torch.float32 else 0.2)
    assert dtype == torch.bfloat16 or same(graph, plain)


@pytest.mark.gpu
def test_graphs_under_autocast():
    """float32 weights, bfloat16 matmuls: as ppo.py samples."""
    net = small().cuda()
    with M.autocast("cuda", "bfloat16"):
        roll = unequal(net)
        logp = token_logprobs(net, roll.tokens, roll.mask)
    assert (logp - roll.logp).abs().mean() < 0.02 and roll.row_steps < 20 * 13


# --- checkpoints ----------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("shard", [5_000_000_000, 100_000])
def test_save_and_load_are_bitwise_equal(family, tied, shard, tmp_path):
    net = small(family, tie_word_embeddings=tied, rope_scaling=LLAMA3)
    save(net, bytes_tokenizer(), tmp_path, shard)
    back, tok = load(tmp_path)
    assert back.config == net.config and tok.encode("hé\n") == bytes_tokenizer().encode("hé\n")
    assert (shard > 1e6) == (tmp_path / "model.safetensors").exists()
    a, b = net.state_dict(), back.state_dict()
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
    assert all(p.requires_grad for p in back.parameters())


def test_scalar_models_save_and_load(tmp_path):
    net = ScalarModel.from_lm(small("qwen2", tie_word_embeddings=False), std=0.5)
    save(net, bytes_tokenizer(), tmp_path)
    back, _ = load(tmp_path)
    assert isinstance(back, ScalarModel) and torch.equal(back(ids(2, 7)), net(ids(2, 7)))
    assert (json.loads((tmp_path / "config.json").read_text())["architectures"]
            == ["Qwen2ForSequenceClassification"])


@pytest.mark.parametrize("change, words", [
    (dict(model_type="gpt2"), "model_type 'gpt2' is not supported"),
    (dict(model_type="lama"), "did you mean 'llama'"),
    (dict(rope_scaling=dict(rope_type="su", factor=4.0)), "rope_type 'su' is not supported"),
    (dict(hidden_act="relu"), "hidden_act = 'relu' is not supported; did you mean 'gelu'"),
    (dict(attention_bias=True), "tensor model.layers.0.self_attn.q_proj.bias is missing"),
    (dict(num_hidden_layers=3), "tensor model.layers.2.input_layernorm.weight is missing"),
    (dict(intermediate_size=64),
     r"mlp.gate_proj.weight has shape \[192, 64\], config.json asks for \[64, 64\]"),
    (dict(vocab_size=128), r"embed_tokens.weight has shape"),
    (dict(mlp_bias=True), "mlp.gate_proj.bias is missing"),
    (dict(mlp_only_layers=[0]), "mlp_only_layers"),
    (dict(decoder_sparse_step=2), "decoder_sparse_step"),
    (dict(quantization_config=dict(quant_method="gptq")), "quantization_config"),
    (dict(use_sliding_window=True, max_window_layers=1, sliding_window=95), "sliding_window = 95"),
    (dict(architectures=["LlamaForSequenceClassification"], num_labels=2), "2 labels"),
])
def test_what_cannot_be_loaded_is_named(change, words, tmp_path):
    save(small("llama"), bytes_tokenizer(), tmp_path)
    d = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(d | change))
    with pytest.raises(UserError, match=words):
        net, _ = load(tmp_path)
        net(ids(1, 3))


def test_a_window_that_never_slides_is_none():
    """too wide, switched off, or of layers that the model has not"""
    d, off = to_hf(small("qwen2").config), dict(use_sliding_window=False)
    slides = dict(use_sliding_window=True, max_window_layers=1, sliding_window=95)
    assert from_hf(d | slides).layer_types == ("full_attention", "sliding_attention")
    for change in (dict(sliding_window=96), off, dict(max_window_layers=2)):
        assert from_hf(d | slides | change) == small("qwen2").config


def test_what_config_json_leaves_out():
    """as many key heads as heads, a head's share of the width, an untied head, Llama's theta; the
    rotary options under either key"""
    d = to_hf(small("llama").config)
    absent = ("num_key_value_heads", "head_dim", "rope_theta", "tie_word_embeddings")
    short = {k: v for k, v in d.items() if k not in absent}
    c = from_hf(short)
    assert (c.num_key_value_heads, c.head_dim, c.rope_theta) == (4, 16, 1e4)
    assert not c.tie_word_embeddings
    for said in (dict(rope_parameters=dict(rope_theta=5.0)), dict(rope_theta=5)):
        assert from_hf(short | said).rope_theta == 5
    for eos, written in (((), None), ((5,), 5), ((5, 6), [5, 6])):
        d = to_hf(replace(c, eos_token_id=eos))
        assert d["eos_token_id"] == written and from_hf(d).eos_token_id == eos


@pytest.mark.parametrize("key, value, words", [
    *((k, None, f"{k} is missing")
      for k in ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads",
                "intermediate_size", "max_position_embeddings")),
    *((k, 0, f"{k} is '0': expected a whole number from 1")
      for k in ("vocab_size", "hidden_size", "intermediate_size", "num_key_value_heads",
                "head_dim")),
    ("vocab_size", "512", "expected a whole number"),
    ("vocab_size", True, "expected a whole number"),
    ("hidden_size", 64.0, "expected a whole number"),
    ("rms_norm_eps", 0, "expected a number above 0"),
    ("rope_theta", -1, "expected a number above 0"),
    ("tie_word_embeddings", "yes", "expected true or false"),
    ("architectures", [], "architectures is"),
    ("architectures", ["GPT2LMHeadModel"], "LlamaForCausalLM"),
    ("architectures", "LlamaForCausalLM", "expected a list"),
    ("model_type", 5, "model_type '5' is not supported"),
    ("rope_parameters", [], "expected an object"),
    ("rope_parameters", dict(rope_type="linear"), "factor is missing"),
    ("rope_parameters", dict(rope_type="llama3", factor=8.0), "low_freq_factor is missing"),
    ("eos_token_id", "x", "expected a token's id"), ("eos_token_id", [[]], "expected a token's id"),
    ("eos_token_id", 10 ** 6, "beyond the model's"),
    ("pad_token_id", 10 ** 6, "beyond the model's"),
    ("num_key_value_heads", 3, "do not share 3 key heads"), ("head_dim", 7, "even whole number"),
    ("quantization_config", 5, "expected an object"), ("layer_widths", [-1], "layer_widths"),
    ("swift_layer", 9, "last layer"),
    ("routed_heads", 9, "more routed heads than heads"),
    ("head_router", "x", "head_router is 'x': expected learned or norm")])
def test_a_config_is_read_with_care(key, value, words, tmp_path):
    save(small("llama"), bytes_tokenizer(), tmp_path)
    d = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(d | {key: value}))
    for read in (load, M.peek):
        with pytest.raises(UserError, match=words):
            read(tmp_path)


@pytest.mark.parametrize("key", [
    "rope_theta", "rope_scaling", "num_experts", "num_experts_per_tok", "swift_layer",
    "shared_heads", "routed_heads", "head_router", "layer_widths", "max_window_layers",
    "sliding_window", "pad_token_id", "architectures", "id2label", "tie_word_embeddings",
    "rms_norm_eps", "head_dim"])
def test_null_in_a_config_is_what_is_not_there(key, tmp_path):
    save(small("qwen2", tie_word_embeddings=False), bytes_tokenizer(), tmp_path)
    d = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(d | {key: None}))
    assert isinstance(load(tmp_path)[0], Transformer)


Q = "model.layers.0.self_attn.q_proj.weight"
TENSORS = {                              # what a file may hold, and what is said of it
    "bias": (lambda t: t | {Q.replace("weight", "bias"): torch.zeros(64)},
             "nothing reads the tensor .*q_proj.bias"),
    "99th layer": (lambda t: t | {Q.replace(".0.", ".99."): t[Q].clone()},
                   "nothing reads the tensor model.layers.99"),
    "more layers": (lambda t: t | {Q.replace(".0.", ".2."): t[Q].clone()},
                    "nothing reads .*is of another model"),
    "another head": (lambda t: t | {"lm_head.weight": t["model.embed_tokens.weight"] + 1},
                     "lm_head.weight is not the emb"),
    "integers": (lambda t: t | {Q: t[Q].long()}, "is stored as I64: weights are floats"),
    "complex": (lambda t: t | {Q: t[Q].to(torch.complex64)},
                "is stored as C64: weights are floats"),
    "float8": (lambda t: t | {Q: t[Q].to(torch.float8_e4m3fn)},
               "is stored as F8_E4M3: weights are floats"),
    "NaN": (lambda t: t | {Q: t[Q].index_fill(0, torch.tensor([3]), math.nan)},
            "holds NaN or infinity"),
    "infinity": (lambda t: t | {Q: t[Q] + math.inf}, "holds NaN or infinity")}


@pytest.mark.parametrize("name", TENSORS)
def test_stored_tensors_are_looked_at(name, tmp_path):
    change, words = TENSORS[name]
    save(small("llama"), bytes_tokenizer(), tmp_path)
    stored = change(load_file(tmp_path / "model.safetensors"))
    save_file(stored, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=words):
        load(tmp_path)


def test_what_is_stored_twice_or_computed_is_no_mistake(tmp_path):
    """a tied head that is the embedding, the rotary frequencies of old exports, weights in half
    precision"""
    model = small("llama")
    save(model, bytes_tokenizer(), tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    stored |= {"lm_head.weight": stored["model.embed_tokens.weight"].clone(),
               "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(16)}
    save_file({k: v.bfloat16() for k, v in stored.items()}, tmp_path / "model.safetensors",
              metadata={"format": "pt"})
    assert torch.equal(load(tmp_path)[0].head, model.head.bfloat16().float())
    for dtype in (torch.float32, torch.bfloat16):                  # as it is asked for
        assert {p.dtype for p in load(tmp_path, dtype=dtype)[0].parameters()} == {dtype}


INDEX = {
    "outside": (lambda m: m | {Q: "../model-1.safetensors"},
                "expected a .safetensors file of the same folder"),
    "absolute": (lambda m: m | {Q: "/etc/passwd"},
                 "expected a .safetensors file of the same folder"),
    "another shard": (lambda m: {k: "model-2.safetensors" if v[6] == "1" else v
                                 for k, v in m.items()},
                      "which the index puts into|is missing|lacks the tensor"),
    "unlisted": (lambda m: {k: v for k, v in m.items() if k != Q},
                 "which the index puts into no file"),
    "not there": (lambda m: m | {"foo": "model-1.safetensors"}, "lacks the tensor foo"),
    "a number": (lambda m: m | {Q: 5}, "weight_map is no table"),
    "a list": (lambda m: [], "weight_map is no table")}


@pytest.mark.parametrize("name", INDEX)
def test_an_index_says_what_its_files_hold(name, tmp_path):
    change, words = INDEX[name]
    save(small("llama"), bytes_tokenizer(), tmp_path, shard_bytes=20_000)
    path = tmp_path / "model.safetensors.index.json"
    where, index = (json.loads(path.read_text())[x] for x in ("weight_map", "metadata"))
    assert len(set(where.values())) > 1
    assert index["total_size"] == sum(p.nbytes for p in small("llama").state_dict().values())
    for held in (load_file(tmp_path / x).values() for x in set(where.values())):
        assert len(held) == 1 or sum(x.nbytes for x in held) <= 20_000
    short = {k: f"model-{v.split('-')[1].lstrip('0')}.safetensors" for k, v in where.items()}
    for k in set(where):
        if (tmp_path / where[k]).exists():
            (tmp_path / where[k]).rename(tmp_path / short[k])
    path.write_text(json.dumps(dict(weight_map=short)))
    load(tmp_path)
    path.write_text(json.dumps(dict(weight_map=change(short))))
    with pytest.raises(UserError, match=words):
        load(tmp_path)


@pytest.mark.parametrize("name", ["config.json", "generation_config.json", "tokenizer.json",
                                  "tokenizer_config.json"])
@pytest.mark.parametrize("text", [b"", b"[]", b"5", b'{"a": ', b"\xff\xfe", b"[" * 100_000,
                                  b'{"a": 1, "a": 2}'])
def test_every_json_of_a_checkpoint_goes_through_one_reader(name, text, tmp_path):
    save(small("llama"), bytes_tokenizer(), tmp_path)
    (tmp_path / name).write_bytes(text)
    with pytest.raises(UserError, match=f"{name}.*(is not JSON|expected an object)"):
        load(tmp_path)


def test_broken_weights_of_a_run_name_the_older_good_ones(tmp_path):
    for step in (999_999, 1_000_000):
        save(small("llama"), bytes_tokenizer(), tmp_path / f"step-{step}")
    (tmp_path / "step-1000000/model.safetensors").write_bytes(b"x" * 50)
    with pytest.raises(UserError,
                       match="step-1000000/model.safetensors is not .*older .* is .*step-999999"):
        load(tmp_path)
    load(tmp_path / "step-999999")


def test_predictions_that_are_not_finite_stop_the_sampling():
    model = small("llama")
    model.norm.weight.data[0] = math.nan
    for temperature in (0.0, 1.0):
        with pytest.raises(UserError, match="predictions are not finite"):
            M.generate(model, [[1, 2]], 3, temperature=temperature)


def test_a_tokenizer_of_another_model_is_refused(tmp_path):
    net = init(replace(small().config, vocab_size=128))
    save(net, bytes_tokenizer(), tmp_path)
    with pytest.raises(UserError, match="tokenizer has 261 ids but the model only 128 rows"):
        load(tmp_path)


def test_broken_and_missing_weights_are_named(tmp_path):
    save(small(), bytes_tokenizer(), tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"garbage" * 10)
    with pytest.raises(UserError, match="not a readable safetensors file"):
        load(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(UserError, match="model.safetensors is missing"):
        load(tmp_path)


def test_the_ends_of_a_text_are_those_of_generation_config(tmp_path):
    """where a chat model names all of them; else config.json's"""
    save(small("llama"), bytes_tokenizer(), tmp_path)
    tok, path = bytes_tokenizer(), tmp_path / "generation_config.json"
    assert json.loads(path.read_text()) == dict(bos_token_id=tok.bos, eos_token_id=tok.eos,
                                                pad_token_id=tok.pad)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [5, 6]}')
    assert load(tmp_path)[0].config.eos_token_id == (5, 6)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": null}')
    assert load(tmp_path)[0].config.eos_token_id == (bytes_tokenizer().eos,)


def test_config_json_round_trip():
    for family in FAMILIES:
        for config in (small(family).config, small(family, rope_scaling=LLAMA3).config):
            assert from_hf(json.loads(json.dumps(to_hf(config)))) == config


def test_bad_sizes_are_named():
    for size in ("4", "4x", "4x50", "0x64", "axb"):
        with pytest.raises(UserError, match="expected LAYERSxWIDTH"):
            preset(size, bytes_tokenizer())


def test_stories260k(stories):
    """The real checkpoint: mean next-token loss of a sentence, and a bitwise round trip."""
    net, tok = load(stories)
    text = " Once upon a time, there was a little girl named Lily. She loved to play outside."
    x = torch.tensor([[tok.bos, *tok.encode(text)]])
    loss = -token_logprobs(net, x)[0, 1:].mean().item()
    assert x.size(1) == 27 and loss == pytest.approx(0.2803, abs=5e-4)


def test_stories260k_round_trip(stories, tmp_path):
    net, tok = load(stories)
    save(net, tok, tmp_path)
    back, again = load(tmp_path)
    assert all(torch.equal(a, b)
               for a, b in zip(net.state_dict().values(), back.state_dict().values()))
    assert again.encode(" Lily's dog") == tok.encode(" Lily's dog")


# --- against transformers, where it is installed --------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("rope", [(), LLAMA3])
def test_transformers_loads_what_we_save(family, tied, rope, tmp_path):
    hf = pytest.importorskip("transformers")
    net = small(family, tie_word_embeddings=tied, rope_scaling=rope)
    save(net, bytes_tokenizer(), tmp_path)
    theirs, info = hf.AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True,
                                                           attn_implementation="eager")
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    x = ids(2, 60)
    with torch.no_grad():
        assert torch.allclose(theirs(x).logits, net.logits(net(x)), atol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("rope", [(), LLAMA3])
def test_we_load_what_transformers_saves(family, rope, tmp_path):
    hf = pytest.importorskip("transformers")
    d = to_hf(small(family, rope_scaling=rope, tie_word_embeddings=False).config)
    config = hf.AutoConfig.for_model(family, **{k: v for k, v in d.items()
                                                if k not in ("model_type", "architectures")})
    torch.manual_seed(0)
    theirs = hf.AutoModelForCausalLM.from_config(config, attn_implementation="eager").float().eval()
    theirs.save_pretrained(tmp_path, max_shard_size="150KB")
    bytes_tokenizer().save(tmp_path)
    ours, _ = load(tmp_path)
    x = ids(2, 60)
    with torch.no_grad():
        assert torch.allclose(theirs(x).logits, ours.logits(ours(x)), atol=1e-4)


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_transformers_loads_our_reward_models(family, tmp_path):
    hf = pytest.importorskip("transformers")
    net = ScalarModel.from_lm(small(family), std=0.5)
    save(net, bytes_tokenizer(), tmp_path)
    theirs = hf.AutoModelForSequenceClassification.from_pretrained(tmp_path)
    x = ids(3, 20)
    with torch.no_grad():
        assert torch.allclose(theirs(x).logits[:, 0],
                              sequence_score(net, x, torch.tensor([20] * 3)),
                              atol=1e-4)
