"""Generation that keeps a batch full: slots, prompts in parts, SARATHI; against a row at a time."""
from types import SimpleNamespace

import pytest
import torch
from test_model import MoE, small

import kernels
import model as M
from data.run import UserError
from data.tokenizer import bytes_tokenizer
from model import Cache, Lean, Transformer, generate, pick, preset

STOP, NEW = list(range(0, 250, 16)), 12
WINDOWED = dict(sliding_window=8, layer_types=("sliding_attention", "full_attention"))
MODELS = dict(qwen3={}, mixtral={}, gemma3_text=WINDOWED)


def seeded(n=0):
    return torch.Generator().manual_seed(n)


def prompts_of(n, longest=30, seed=1):
    """n random prompts of 1 to `longest` bytes."""
    g = seeded(seed)
    sizes = torch.randint(1, longest + 1, (n,), generator=g).tolist()
    return [torch.randint(0, 256, (k,), generator=g).tolist() for k in sizes]


PROMPTS = prompts_of(9)
PROMPTS += PROMPTS[2:4]                                    # two of them twice


@torch.no_grad()
def alone(net, prompts, samples, temperature):
    """Each row's completion and its end, a row at a time, the whole text anew for every token."""
    u = torch.rand(len(prompts) * samples, NEW, generator=seeded(3))
    out = []
    for b in range(len(u)):
        text = list(prompts[b // samples])
        for i in range(NEW):
            logits = net.logits(net(torch.tensor([text]))[:, -1])
            text.append(int(pick(logits, u[b, i:i + 1], temperature)[0]))
            if text[-1] in STOP:
                break
        out.append(text[len(prompts[b // samples]):])
    return out


@pytest.fixture(scope="module", params=[(family, t) for family in MODELS for t in (0, 0.9)],
                ids=lambda p: f"{p[0]}-{p[1]}")
def case(request):
    """A model, its sampling, and what it says row by row."""
    (family, temperature), samples = request.param, 2
    net = small(family, **MODELS[family])
    return net, dict(samples=samples, temperature=temperature), alone(net, PROMPTS, samples,
                                                                      temperature)


def check(roll, prompts, want):
    """The rollout's rows are those of `alone`."""
    samples = len(want) // len(prompts)
    for b, row in enumerate(want):
        size = len(prompts[b // samples])
        assert roll.prompt_len[b] == size and roll.mask[b].sum() == len(row)
        assert roll.tokens[b, size:size + len(row)].tolist() == row
        assert roll.finished[b] == (row[-1] in STOP)


def forwards(monkeypatch):
    """The shapes of all forwards from here on, steps of Lean among them."""
    seen, forward, step = [], Transformer.forward, Lean.__call__

    def lean(self, t, cache):
        if t.size(1) == 1 and type(cache) is Cache:
            seen.append(tuple(t.shape))
        return step(self, t, cache)
    monkeypatch.setattr(Lean, "__call__", lean)
    monkeypatch.setattr(Transformer, "forward", lambda self, t, cache=None:
                        seen.append(tuple(t.shape)) or forward(self, t, cache))
    return seen


@pytest.mark.parametrize("slots, chunk", [(1, 0), (5, 0), (99, 0), (5, 3), (5, 64), (99, 64)])
def test_slots_give_what_rows_give_alone(case, slots, chunk):
    net, how, want = case
    roll = generate(net, PROMPTS, NEW, stop=STOP, generator=seeded(3), slots=slots, chunk=chunk,
                    **how)
    check(roll, PROMPTS, want)
    steps = sum(map(len, want)) - len(want)              # the first token is the prompt's
    assert roll.row_steps == steps if not chunk or slots == 99 else roll.row_steps >= steps


@pytest.mark.parametrize("every", [1, 3, 8])
def test_recorded_steps_give_their_slots_away(case, every, monkeypatch):
    """what CUDA graphs replay, here step by step"""
    net, how, want = case
    monkeypatch.setattr(M, "graphed", lambda model: True)
    monkeypatch.setattr(M, "CHECK", every)
    roll = generate(net, PROMPTS, NEW, stop=STOP, generator=seeded(3), slots=6, **how)
    check(roll, PROMPTS, want)


def test_rows_without_an_end_wait_for_a_slot_too(case):
    net, how, _ = case
    whole = generate(net, PROMPTS, 5, stop=[], generator=seeded(), **how)
    some = generate(net, PROMPTS, 5, stop=[], generator=seeded(), slots=4, **how)
    assert torch.equal(whole.tokens, some.tokens) and some.row_steps == 4 * len(whole.tokens)
    none = generate(net, PROMPTS, 0, stop=[], slots=4, **how)
    assert none.tokens.size(0) == 22 and none.mask.sum() == 0 == none.row_steps


def test_256_prompts_keep_a_batch_full(monkeypatch):
    """row-steps are within 5 % of the tokens, with graphs' checks within 25 %; the cache is as
    large as its slots, and the rows still wait when the batch is full"""
    net, prompts, made = small(), prompts_of(256, 60), []
    how = dict(stop=list(range(0, 250, 19)), temperature=1.0)
    whole = generate(net, prompts, 32, generator=seeded(), **how)
    spread = Cache.spread
    monkeypatch.setattr(Cache, "spread", lambda self, *a: spread(self, *a) or made.append(self.k))
    seen = forwards(monkeypatch)
    roll = generate(net, prompts, 32, generator=seeded(), slots=32, **how)
    total = int(roll.mask.sum())
    assert all(torch.equal(a, b) for a, b in zip(whole[:2] + whole[3:5], roll[:2] + roll[3:5]))
    assert 0.95 * total < roll.row_steps + 256 <= 1.05 * total and 0 < roll.finished.sum() < 256
    assert [x.shape[1] for x in made] == [32]
    steps = [n for n, t in seen if t == 1 and n > 8]               # the others read short prompts
    assert len(steps) > 40 and all(n == 32 for n in steps[:40])
    ridden = generate(net, prompts, 32, generator=seeded(), slots=32, chunk=192,
                      **how)
    assert torch.equal(roll.tokens, ridden.tokens) and ridden.row_steps + 256 <= 1.05 * total
    monkeypatch.setattr(M, "graphed", lambda model: True)
    monkeypatch.setattr(M, "CHECK", 4)
    assert generate(net, prompts, 32, generator=seeded(), slots=32,
                    **how).row_steps < 1.25 * total


@pytest.mark.parametrize("chunk", [0, 1, 16])
def test_a_prompt_is_read_once_for_all_its_rows(chunk, monkeypatch):
    """and beside the steps, a chunk at a time, if it is to be"""
    net, seen = small(), forwards(monkeypatch)
    prompts, sizes = [list(range(n)) for n in (9, 4, 25, 9, 13)], [4, 9, 13, 25]
    roll = generate(net, prompts, 6, samples=3, stop=STOP, slots=2, chunk=chunk,
                    generator=seeded())
    if not chunk:
        assert sorted(t for n, t in seen if t > 1) == sizes
        assert all(n == 1 for n, t in seen if t > 1)              # two rows are of one prompt
    else:
        assert seen[0] == (1, sizes[-1])                          # nothing decodes yet
        rest = [n * t for n, t in seen[1:]]
        assert max(rest) <= 2 + chunk
        assert sum(rest) == roll.row_steps + sum(sizes[:-1])


@pytest.mark.parametrize("most", [1, 24, 40, 100])
def test_prompts_in_parts_are_prompts(case, most, monkeypatch):
    """a few prompts at a time, without the others' padding, and a long one in parts"""
    net, how, want = case
    monkeypatch.setattr(M, "PREFILL", most)
    seen = forwards(monkeypatch)
    check(generate(net, PROMPTS, NEW, stop=STOP, generator=seeded(3), **how), PROMPTS, want)
    reads = [n * t for n, t in seen if t > 1]
    distinct = {tuple(p) for p in PROMPTS}
    assert max(reads, default=1) <= most
    if most == 1:
        assert seen[:sum(map(len, distinct))] == [(1, 1)] * sum(map(len, distinct))
    if most == 40:
        assert sum(reads) < len(distinct) * max(map(len, distinct))


def test_two_models_mix_in_slots():
    net, other = small(), small("llama")
    how = dict(contrast=(other, 0.7), stop=STOP, temperature=0.9)
    whole = generate(net, PROMPTS, NEW, generator=seeded(), **how)
    for chunk in (0, 9):
        some = generate(net, PROMPTS, NEW, generator=seeded(), slots=3, chunk=chunk, **how)
        assert torch.equal(whole.tokens, some.tokens)
        assert torch.allclose(whole.logp, some.logp, atol=1e-5)


def test_a_queue_of_some_rows_reads_their_prompts_alone():
    tokens, length = torch.arange(12).view(4, 3), torch.tensor([3, 1, 2, 3])
    for slots in (0, 2):
        queue = M.Queue([small()], tokens, length, torch.tensor([3, 1, 1]), 4, slots=slots)
        assert sorted(queue.length.tolist()) == [1, 3]
        assert queue.length[queue.prompt].tolist() == [3, 1, 1]
        assert queue.tokens[queue.prompt][:, 0].tolist() == [9, 3, 3]


@pytest.mark.parametrize("how, words", [
    (dict(slots=-1), "expected 0 or more"), (dict(slots=2, chunk=-1), "expected 0 or more"),
    (dict(chunk=8), "slots for a chunk"),
    (dict(slots=2, cache=lambda *a: Cache(*a)), "this cache")])
def test_slots_that_cannot_be_are_refused(how, words):
    with pytest.raises(UserError, match=words):
        generate(small(), [[1]], 4, **how)


def test_chunks_of_a_prompt_beyond_longrope_s_switch_are_refused():
    rope = (("long_factor", (2.0,) * 8), ("original_max_position_embeddings", 16),
            ("rope_type", "longrope"), ("short_factor", (1.0,) * 8))
    net = small("phi3", rope_scaling=rope)
    with pytest.raises(UserError, match="longrope's switch"):
        generate(net, [[1] * 20, [2] * 20], 4, slots=1, chunk=8)
    one, two = (generate(net, [[1] * 20, [2] * 20], 4, slots=n, temperature=0) for n in (0, 1))
    assert torch.equal(one.tokens, two.tokens)
    M_PREFILL, M.PREFILL = M.PREFILL, 8                        # read whole all the same
    try:
        assert torch.equal(one.tokens, generate(net, [[1] * 20, [2] * 20], 4,
                                                temperature=0).tokens)
    finally:
        M.PREFILL = M_PREFILL


def test_the_cache_is_bfloat16_under_autocast(monkeypatch):
    made, init = [], Cache.__init__
    monkeypatch.setattr(Cache, "__init__", lambda self, *a: init(self, *a) or made.append(self))
    with M.autocast("cpu", "bfloat16"):
        generate(small(), PROMPTS, 3, slots=2, stop=STOP)
        generate(small(), PROMPTS, 3, slots=2, chunk=8, stop=STOP)
        list(M.stream(small(), PROMPTS[0], 3))
    assert len(made) > 4 and all(x.k.dtype == torch.bfloat16 for x in made)
    generate(small(), PROMPTS, 3)
    assert made[-1].k.dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("window", [0, 5])
def test_keys_that_are_copied_for_a_group_give_what_it_reads_in_place(dtype, window, monkeypatch):
    """values and gradients; by hand, head h reads keys of h // group"""
    q, k, v = (torch.randn(2, n, 9, 16, generator=seeded(n), dtype=torch.float32).to(dtype)
               for n in (6, 2, 2))
    out = []
    for knows in (True, False):
        monkeypatch.setattr(M, "knows_groups", lambda q, mask, knows=knows: knows)
        leaves = [x.clone().requires_grad_() for x in (q, k, v)]
        y = M.attend(*leaves, None, window)
        (y.float() ** 2).sum().backward()
        out.append([y, *(x.grad for x in leaves)])
    near = dict(atol=1e-5) if dtype == torch.float32 else dict(atol=0.1, rtol=0.1)
    assert all(torch.allclose(a, b, **near) for a, b in zip(*out))
    place = torch.arange(9)
    seen = (place <= place[:, None]) & (place > place[:, None] - (window or 9))
    for h in range(6):
        scores = (q[:, h].float() @ k[:, h // 3].float().mT / 4).masked_fill(~seen, -torch.inf)
        assert torch.allclose(out[1][0][:, h].float(), scores.softmax(-1) @ v[:, h // 3].float(),
                              atol=1e-5 if dtype == torch.float32 else 0.03)


def test_a_model_spread_over_ranks_is_not_graphed(monkeypatch):
    monkeypatch.setattr(kernels, "route", lambda x: "triton")
    model = SimpleNamespace(modules=list, head=SimpleNamespace(is_cuda=True),
                            config=SimpleNamespace(moe=False))
    assert M.graphed(model)
    model.unshard = None                                              # as FSDP's modules have
    assert not M.graphed(model)


# --- experts --------------------------------------------------------------------------------------


def by_hand(moe, x):
    """Each token through each of its experts."""
    weight, chosen = moe.route(moe.gate(x).float())
    rows = [sum(w * moe.experts[e](x[n:n + 1])[0] for w, e in zip(weight[n], chosen[n]))
            for n in range(len(x))]
    return torch.stack(rows)


@pytest.mark.parametrize("adapter", ["full", "lora"])
def test_chosen_experts_give_what_each_token_gets_from_its_own(adapter):
    """values, and gradients: 0, not none, of an expert that no token chose"""
    config = M.replace(preset("2x64", bytes_tokenizer(), 96, "qwen3_moe"), num_experts=16,
                       num_experts_per_tok=3)
    torch.manual_seed(0)
    moe = M.PEFT[adapter](MoE(config, 24), seeded())
    for p in moe.parameters():
        torch.nn.init.normal_(p, std=0.1)
    x = torch.randn(1, 4, 64, generator=seeded())
    got = []
    for run in (lambda x: moe(x)[0], lambda x: by_hand(moe, x[0])):
        moe.zero_grad()
        leaf = x.clone().requires_grad_()
        y = run(leaf)
        (y ** 2).sum().backward()
        got.append((y, leaf.grad, {n: p.grad for n, p in moe.named_parameters()
                                   if p.requires_grad}))
    (a, da, grads), (b, db, wanted) = got
    assert torch.allclose(a, b, atol=1e-4) and torch.allclose(da, db, atol=1e-4)
    unseen = [n for n, g in wanted.items() if g is None or not g.any()]
    assert unseen and all(g is not None for g in grads.values())
    for name, grad in grads.items():
        assert torch.allclose(grad, torch.zeros_like(grad) if name in unseen else wanted[name],
                              atol=1e-4), name


def test_only_chosen_experts_run_for_a_few_tokens():
    config = M.replace(preset("2x64", bytes_tokenizer(), 96, "mixtral"), num_experts=32)
    moe, seen = MoE(config, 24), []
    for i, expert in enumerate(moe.experts):
        expert.register_forward_pre_hook(lambda m, a, i=i: seen.append((i, len(a[0]))))
    with torch.no_grad():
        out = moe(torch.randn(3, 1, 64, generator=seeded()))
        assert sum(n for _, n in seen) == 6 and len(seen) <= 6 and all(n for _, n in seen)
        assert out.shape == (3, 1, 64) and moe(torch.zeros(0, 1, 64)).shape == (0, 1, 64)
