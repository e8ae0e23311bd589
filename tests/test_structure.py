"""compress.py, methods that cut the whole model: importance, cuts and their limits, distillation,
Puzzle's choice, shaped checkpoints."""
import copy
import functools
import itertools
import json
import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from conftest import close, rand

import compress as S
from data.run import UserError
from data.tokenizer import bytes_tokenizer
from model import (ModelConfig, Transformer, from_hf, generate, init, load, preset, save, to_hf,
                   token_logprobs)

D = functools.partial(torch.tensor, dtype=torch.float64)


def small(family="qwen3_moe", size="2x64", **changes):
    """A random model in float64: grouped queries, noisy norms and biases, narrow MLPs."""
    changes = dict(num_attention_heads=4, num_key_value_heads=2, head_dim=16,
                   intermediate_size=16) | changes
    config = replace(preset(size, bytes_tokenizer(), 96, family), **changes)
    net, g = init(config, seed=1), torch.Generator().manual_seed(2)
    with torch.no_grad():
        for p in net.parameters():
            p.add_(0.1 * torch.randn(p.shape, generator=g))
        for name, p in net.named_parameters():
            if ".mlp." in name and "gate.weight" not in name:
                p.mul_(2)                                    # what is cut should matter
    return net.double()


def twin(model):
    """A copy. What the last forward left behind cannot be copied, so it goes first."""
    S.forget(model)
    return copy.deepcopy(model)


def ids(n, length, seed=0):
    """Random byte ids [n, length]."""
    return torch.randint(0, 256, (n, length), generator=torch.Generator().manual_seed(seed))


def gen(seed=0):
    """A seeded generator."""
    return torch.Generator().manual_seed(seed)


def first(method, model, teacher, batches, seed=0, **kw):
    """A structural method's only, or last, student."""
    return list(method(model, teacher, batches, gen(seed), **kw))[-1]


def logits(model, tokens):
    """[B, T, V]"""
    return model.logits(model(tokens)).double()


@pytest.fixture(scope="module")
def pair():
    """A small MoE and its frozen copy, and calibration batches."""
    model = small()
    return model, twin(model).requires_grad_(False), [ids(4, 24, s) for s in range(4)]


# --- losses ---------------------------------------------------------------------------------------


def gradient(loss, z):
    """d loss / d z."""
    z = z.clone().requires_grad_()
    loss(z).sum().backward()
    return z.grad


def seen(z, **more):
    """What a loss reads of a model whose logits are z [N, V]."""
    return SimpleNamespace(hidden=z, head=torch.eye(z.size(1)).to(z), **more)


def test_kd_gradients_where_the_student_is_the_teacher():
    p = D([[.5, .3, .1, .06, .04]])
    z = p.log()
    assert close(gradient(lambda x: S.forward_kl(seen(x), seen(z)), z), [[0.] * 5], 1e-12)
    raw = gradient(lambda x: S.kd_topk(seen(x), seen(z), k=2), z)
    assert close(raw, [[-.10, -.06, .08, .048, .032]], 1e-12)              # q m - p 1[in T], m = .8
    assert close(raw / .8, [[-.125, -.075, .10, .06, .04]], 1e-12)             # p renormalised


def test_losses_by_hand_and_in_their_limits():
    p, q = D([[.7, .2, .1]]), D([[.5, .3, .2]])
    student, teacher = seen(q.log()), seen(p.log())
    assert close(S.forward_kl(student, teacher), [.08512], 1e-5)
    assert close(S.kd_topk(student, teacher, k=1), [-.7 * math.log(.5)])
    entropy = -(p * p.log()).sum(1)
    assert close(S.kd_topk(student, teacher) - entropy, S.forward_kl(student, teacher))     # k >= V
    assert close(S.ce(student, torch.tensor([2])), [-math.log(.2)])
    assert close(gradient(lambda x: S.forward_kl(seen(x), teacher), q.log()), q - p)
    a, b = rand(5, 7), rand(5, 7, seed=1)
    assert close(S.forward_kl(seen(a + 3), seen(b - 2)), S.forward_kl(seen(a), seen(b)))
    away = SimpleNamespace(hidden=-b, head=-torch.eye(7).double())             # the same logits
    assert close(S.cosine_kl(seen(3 * b), seen(b)), S.forward_kl(seen(3 * b), seen(b)))
    assert close(S.cosine_kl(away, seen(b)), torch.full((5,), 2.).double())
    h = rand(5, 4, seed=2)
    student, teacher = seen(a, before=h), seen(b, before=h)
    assert close(S.swift_kl(student, teacher, temperature=1.), S.forward_kl(student, teacher))
    further = S.swift_kl(seen(a, before=h + 1), teacher)
    assert close(further, 4 * S.forward_kl(seen(a / 2), seen(b / 2)) + 1)


def test_the_likeliest_words_do_not_depend_on_the_rows_at_a_time():
    h, W = rand(9, 6), rand(20, 6, seed=1)
    at, p = S.likeliest(h, W, 3)
    want = (h @ W.T).softmax(-1).topk(3, -1)
    assert torch.equal(at, want.indices) and close(p, want.values, 1e-12)
    assert torch.equal(S.likeliest(h, W, 3, rows=2)[0], at)
    assert S.likeliest(h, W, 50)[0].shape == (9, 20)


def test_states_are_what_the_model_computes():
    model, tokens = small("qwen3"), ids(2, 9)
    found = S.states(model, tokens)
    assert close(found.hidden, model(tokens)[:, :-1].flatten(0, 1))
    assert found.head is model.head
    inputs = []
    hook = model.layers[0].register_forward_hook(lambda m, args, out: inputs.append(out))
    model(tokens)
    hook.remove()
    assert close(found.before, inputs[0][:, :-1].flatten(0, 1))
    assert not model.layers[-1]._forward_pre_hooks
    nll = S.token_losses(S.ce, model, None, tokens).mean()
    assert abs(nll + token_logprobs(model, tokens)[:, 1:].mean().item()) < 1e-5


def test_a_loss_reads_the_student_and_the_teacher_in_their_places():
    model, other, tokens = small("qwen3"), small("qwen3", intermediate_size=8), ids(2, 9)
    logq, logp = (logits(m, tokens)[:, :-1].log_softmax(-1).flatten(0, 1) for m in (model, other))
    got = S.token_losses(S.forward_kl, model, other, tokens)
    assert close(got, (logp.exp() * (logp - logq)).sum(-1), 1e-6)
    got = S.token_losses(S.kd_topk, model, other, tokens)
    p, at = logp.exp().topk(8, -1)
    assert close(got, -(p * logq.gather(-1, at)).sum(-1), 1e-6)


# --- SlimMoE --------------------------------------------------------------------------------------


def test_the_terms_of_up_and_down_are_the_activation_s_and_gate_s_is_another(pair):
    model, teacher, batches = pair
    mlp, inputs = S.mlps(model)["layers.1.mlp.experts.2"], []

    def note(layer, args):
        args[0].retain_grad()
        inputs.append(args[0])
    hook = mlp.down_proj.register_forward_pre_hook(note)
    model.zero_grad()
    S.token_losses(S.kd_topk, model, teacher, batches[0]).mean().backward()
    hook.remove()
    w1, w3, w2 = (x.weight for x in (mlp.gate_proj, mlp.up_proj, mlp.down_proj))
    a = (inputs[0] * inputs[0].grad).sum(0)
    assert a.abs().max() > 1e-8
    assert close((w2 * w2.grad).sum(0), a, 1e-12) and close((w3 * w3.grad).sum(1), a, 1e-12)
    gate = (w1 * w1.grad).sum(1)
    assert not close(gate, a, 1e-3 * a.abs().max().item())
    assert close(S.taylor(mlp), 2 * a + gate, 1e-12)
    model.zero_grad()


def test_the_taylor_term_is_the_slope_of_scaling_a_neuron_or_a_group():
    """On a dense model: a router's weights are float32."""
    model, teacher, batches = small("qwen2"), None, [ids(4, 24)]
    mlp, attention = model.layers[0].mlp, model.layers[1].self_attn

    def loss():
        return S.token_losses(S.ce, model, teacher, batches[0]).mean()
    loss().backward()
    want = S.taylor(mlp)[3].item(), S.taylor_groups(attention, 2)[1].item()

    def scale(c, group):
        with torch.no_grad():
            if group:
                attention.q_proj.weight[32:] *= c
                attention.k_proj.weight[16:] *= c
                attention.v_proj.weight[16:] *= c
                attention.o_proj.weight[:, 32:] *= c
            else:
                mlp.gate_proj.weight[3] *= c
                mlp.up_proj.weight[3] *= c
                mlp.down_proj.weight[:, 3] *= c
    for group in (0, 1):
        scale(1 + 1e-5, group)
        up = loss().item()
        scale((1 - 1e-5) / (1 + 1e-5), group)
        slope = (up - loss().item()) / 2e-5
        scale(1 / (1 - 1e-5), group)
        assert abs(slope - want[group]) < 1e-6 * abs(want[group])


def test_slicing_is_masking(pair):
    model, _, batches = pair
    kept = {name: torch.arange(16)[torch.randperm(16, generator=gen(i))[:5]].sort().values
            for i, name in enumerate(S.mlps(model))}
    small_one, masked = S.slice_neurons(model, kept), twin(model)
    with torch.no_grad():
        for name, m in S.mlps(masked).items():
            gone = torch.ones(16, dtype=torch.bool)
            gone[kept[name]] = False
            m.down_proj.weight[:, gone] = 0
    assert close(small_one(batches[0]), masked(batches[0]), 1e-12)
    assert not close(small_one(batches[0]), model(batches[0]), 1e-3)
    assert small_one.config.intermediate_size == 5
    count = sum(p.numel() for p in model.parameters()) - sum(p.numel()
                                                             for p in small_one.parameters())
    assert count == 2 * 8 * 3 * 64 * (16 - 5)


def test_a_neuron_cut_leaves_the_router_and_the_original_as_they_are(pair):
    model, _, batches = pair
    before = copy.deepcopy(model.state_dict())
    cut = S.slice_neurons(model, {name: torch.arange(4) for name in S.mlps(model)})
    x = rand(3, 5, 64)
    for a, b in zip(model.layers, cut.layers):
        a.mlp(x), b.mlp(x)
        assert torch.equal(a.mlp.router_logits, b.mlp.router_logits)
    S.forget(model)
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    same = S.slice_neurons(model, {name: torch.arange(16) for name in S.mlps(model)})
    assert torch.equal(same(batches[0]), model(batches[0])) and same.config == model.config


def test_a_dead_neuron_scores_exactly_zero_and_goes_first(pair):
    model, teacher, batches = twin(pair[0]), *pair[1:]
    with torch.no_grad():
        model.layers[0].mlp.experts[3].down_proj.weight[:, 7] = 0
    neurons, _ = S.sensitivity(model, teacher, batches, S.kd_topk)
    score = neurons["layers.0.mlp.experts.3"]
    assert score[7] == 0 and (score > 0).sum() == 15
    assert 7 not in S.top(score, 15).tolist() and len(S.top(score, 15)) == 15
    assert all(p.grad is None or not p.grad.any() for p in model.parameters())


def test_sensitivity_sums_absolute_values_over_batches_and_fisher_squares(pair):
    model, teacher, batches = pair
    parts = [S.sensitivity(model, teacher, [b], S.ce) for b in batches]
    whole, heads = S.sensitivity(model, teacher, batches, S.ce)
    fisher, _ = S.sensitivity(model, teacher, batches, S.ce, power=2)
    for name in whole:
        assert close(whole[name], sum(p[0][name] for p in parts), 1e-10)
        assert close(fisher[name], sum(p[0][name] ** 2 for p in parts), 1e-10)
    assert close(heads[1], sum(p[1][1] for p in parts), 1e-10) and heads[0].shape == (2,)
    for kind, want in (("ce", whole), ("fisher", fisher)):
        got, _ = S.importance_of(kind, model, teacher, batches, gen())
        assert all(close(got[name], want[name], 1e-10) for name in want if want[name].any())


def test_the_degenerate_start_is_refused(pair):
    model, teacher, batches = pair
    with pytest.raises(UserError, match="rounding noise"):
        S.sensitivity(model, teacher, batches, S.forward_kl)
    with pytest.raises(UserError, match="rounding noise"):
        S.sensitivity(twin(model).float(), copy.deepcopy(teacher).float(), batches, S.forward_kl)
    for kind in (*S.IMPORTANCE, "random"):
        cut = first(S.slimmoe, model, teacher, batches, importance=kind)
        assert cut.config.intermediate_size == 8


def only_four(model):
    """A copy that sends every token to two of the experts 0 to 3: logits ±v x and ±w x, the others
    0."""
    model = twin(model)
    with torch.no_grad():
        for block in model.layers:
            W = block.mlp.gate.weight
            W[1], W[3], W[4:] = -W[0], -W[2], 0
    return model


def test_an_expert_without_tokens_is_ranked_by_its_weights(pair):
    model, teacher, batches = only_four(pair[0]), *pair[1:]
    assert not S.usage(model, batches)[:, 4:].any() and S.usage(model, batches)[:, :4].all()
    neurons, _ = S.importance_of("kd_topk", model, teacher, batches, gen())
    for e in range(8):
        m = model.layers[0].mlp.experts[e]
        norm = torch.cat([m.gate_proj.weight, m.up_proj.weight, m.down_proj.weight.T],
                         1).norm(dim=1)
        assert close(neurons[f"layers.0.mlp.experts.{e}"], norm, 1e-12) == (e > 3)
    assert set(S.activity(model, batches)) == set(neurons)


@pytest.mark.parametrize("family", ["qwen3_moe", "qwen2"])
def test_groups_keep_their_heads_and_their_columns(family):
    model = small(family)
    with torch.no_grad():
        for block, gone in zip(model.layers, (0, 1)):
            block.self_attn.o_proj.weight[:, 32 * gone:32 * gone + 32] = 0
    cut, tokens = S.slice_groups(model, [torch.tensor([1]), torch.tensor([0])]), ids(2, 20)
    assert close(cut(tokens), model(tokens), 1e-12)
    assert (cut.config.num_attention_heads, cut.config.num_key_value_heads) == (2, 1)
    assert torch.equal(cut.layers[0].self_attn.q_proj.weight,
                       model.layers[0].self_attn.q_proj.weight[32:])
    assert torch.equal(cut.layers[1].self_attn.v_proj.weight,
                       model.layers[1].self_attn.v_proj.weight[:16])
    assert torch.equal(cut.layers[0].self_attn.o_proj.weight,
                       model.layers[0].self_attn.o_proj.weight[:, 32:])
    assert torch.equal(S.slice_groups(model, [torch.arange(2)] * 2)(tokens), model(tokens))


@pytest.mark.parametrize("f, heads, kv, total, active", [
    (6400, 32, 8, 41.87, 6.64), (960, 32, 8, 7.65, 2.36), (448, 16, 4, 3.75, 1.29)])
def test_the_parameters_of_the_released_models(f, heads, kv, total, active):
    c = ModelConfig(model_type="mixtral", vocab_size=32064, hidden_size=4096, intermediate_size=f,
                    num_hidden_layers=32, num_attention_heads=heads, num_key_value_heads=kv,
                    head_dim=128,
                    num_experts=16, num_experts_per_tok=2, tie_word_embeddings=False)
    with torch.device("meta"):
        model = Transformer(c)
    count = sum(p.numel() for p in model.parameters())
    idle = 32 * 14 * 3 * 4096 * f
    assert abs(count / 1e9 / total - 1) < 2e-3 and abs((count - idle) / 1e9 / active - 1) < 4e-3


def test_the_path_of_widths():
    sizes = S.stage_sizes
    assert sizes(64, .125, 1, 8) == [8] and sizes(64, .125, 2, 8) == [24, 8]
    assert sizes(6400, .15, 2, 1) == [2479, 960] and sizes(6400, .07, 3, 1) == [2638, 1087, 448]
    assert sizes(4, 1.0, 3, 1) == [4, 4, 4] and sizes(16, .01, 1, 8) == [8]


def test_slimmoe_cuts_in_stages_and_scores_what_was_distilled(pair):
    model, teacher, batches = pair
    stages, marked = [], {}
    for student in S.slimmoe(model, teacher, batches, gen(), share=.25, stages=2, share_groups=.5,
                             multiple=1):
        stages.append((student.config.intermediate_size, student.config.num_key_value_heads))
        for name, m in S.mlps(student).items() if len(stages) == 1 else ():
            with torch.no_grad():  # a stand-in for distillation: neuron 0 dies, neuron 5 grows
                m.down_proj.weight[:, 0] = 0
                marked[name] = m.down_proj.weight[:, 5].mul_(9).clone()
    assert stages == [(8, 1), (4, 1)]
    columns = {name: m.down_proj.weight.T for name, m in S.mlps(student).items()}
    assert all(x.shape == (4, 64) and x.any(1).all() for x in columns.values())
    assert sum((x == marked[name]).all(1).any().item() for name, x in columns.items()) > 8  # of 16
    sizes = []
    for student in S.slimmoe(model, teacher, batches, gen(), share=.25, stages=3, multiple=1,
                             at_once=True):
        weight = student.layers[0].mlp.experts[0].up_proj.weight
        sizes.append((student.config.intermediate_size, weight.sum().item()))
    assert sizes == [sizes[0]] * 3 and sizes[0][0] == 4                   # later stages cut nothing
    dense = small("qwen3")
    cut = first(S.slimmoe, dense, twin(dense), batches, share=.5)      # a dense MLP is one expert
    assert cut.config.intermediate_size == 8


def test_fresh_is_slimmoe_s_size_and_nothing_of_its_weights(pair):
    model, teacher, batches = pair
    kw = dict(share=.25, share_groups=.5, multiple=1)
    a = first(S.slimmoe, model, teacher, batches, stages=1, **kw)
    b = first(S.fresh, model, teacher, batches, **kw)
    assert a.config == b.config
    assert 0.015 < b.embed_tokens.weight.std() < 0.025 and (b.norm.weight == 1).all()
    for name, want in (("q_proj", .02), ("o_proj", .01)):                # outputs: over √(2L) = 2
        std = getattr(b.layers[0].self_attn, name).weight.std()
        assert .8 * want < std < 1.2 * want
    assert not torch.equal(a.layers[0].mlp.gate.weight, b.layers[0].mlp.gate.weight)
    biased = S.renewed(small("qwen2"), gen()).layers[0].self_attn.q_proj
    assert not biased.bias.any() and biased.weight.std() > .01
    again = first(S.fresh, model, teacher, batches, **kw)
    assert torch.equal(again.layers[0].mlp.gate.weight, b.layers[0].mlp.gate.weight)


def test_dropping_experts_keeps_the_most_used_with_their_rows(pair):
    model, teacher, batches = twin(pair[0]), *pair[1:]
    used = S.usage(model, batches)
    assert used.shape == (2, 8) and (used.sum(1) == 4 * 4 * 24 * 2).all()
    cut = first(S.drop_experts, model, teacher, batches, share=.5)
    for i, block in enumerate(cut.layers):
        kept = used[i].argsort(descending=True, stable=True)[:4].sort().values
        assert torch.equal(block.mlp.gate.weight, model.layers[i].mlp.gate.weight[kept])
        for e, expert in zip(kept.tolist(), block.mlp.experts):
            assert torch.equal(expert.up_proj.weight, model.layers[i].mlp.experts[e].up_proj.weight)
    one = first(S.drop_experts, model, teacher, batches, share=.125)
    assert (one.config.num_experts, one.config.num_experts_per_tok) == (1, 1)
    assert one(batches[0]).isfinite().all()
    with pytest.raises(UserError, match="experts"):
        first(S.drop_experts, small("qwen3"), None, batches)


def test_dropping_experts_that_nobody_chooses_changes_nothing(pair):
    model, batches = only_four(pair[0]), pair[2]
    assert not S.usage(model, batches)[:, 4:].any()
    cut = first(S.drop_experts, model, None, batches, share=.5)
    assert cut.config.num_experts == 4
    with torch.no_grad():  # a token's weights are renormalised over its two
        assert close(cut(batches[0]), model(batches[0]), 1e-5)
    kept = first(S.drop_experts, model, None, batches, share=1.0)
    assert torch.equal(kept(batches[0]), model(batches[0]))


# --- distillation ---------------------------------------------------------------------------------


def test_distillation_brings_a_cut_model_back(pair):
    model, teacher, batches = twin(pair[0]).float(), copy.deepcopy(pair[1]).float(), pair[2]
    student = first(S.slimmoe, model, teacher, batches, share=.5)
    before = S.divergence(student, teacher, batches)
    history = S.distil(student, teacher, lambda step: batches[step % 4], 30, lr=3e-3)
    assert S.divergence(student, teacher, batches) < .8 * before and len(history) == 30
    copy.deepcopy(student)                                   # no graph is left behind
    again = first(S.slimmoe, model, teacher, batches, share=.5)
    assert S.distil(again, teacher, lambda step: batches[step % 4], 30, lr=3e-3) == history


def test_distillation_trains_what_it_is_given_and_follows_its_schedule(pair, monkeypatch):
    model, teacher, batches = pair[0], pair[1], pair[2]
    student, rates, step = twin(model).requires_grad_(False), [], torch.optim.AdamW.step
    student.layers[0].mlp.gate.requires_grad_()
    monkeypatch.setattr(torch.optim.AdamW, "step", lambda self: rates.append(
        self.param_groups[0]["lr"]) or step(self))
    distil = functools.partial(S.distil, batch_of=lambda step: batches[0], loss=S.kd_topk)
    distil(student, teacher, steps=21, lr=1e-2, warmup=.1, floor=.1)
    changed = {k for k, v in student.state_dict().items()
               if not torch.equal(v, model.state_dict()[k])}
    assert changed == {"layers.0.mlp.gate.weight"}
    assert close(rates[:2], [5e-3, 1e-2]) and rates[1:] == sorted(rates[1:], reverse=True)
    assert abs(rates[-1] - 1e-3) < 1e-9
    with pytest.raises(UserError, match="no parameter"):
        distil(copy.deepcopy(teacher), teacher, steps=1)
    with torch.no_grad():
        student.norm.weight[0] = math.nan
    with pytest.raises(UserError, match="nan"):
        distil(student, teacher, steps=1)


def test_a_penalty_is_trained_on_and_not_in_the_losses():
    model = small("qwen3").float()
    teacher, batch = twin(model).requires_grad_(False), ids(2, 12)
    first_loss = S.token_losses(S.ce, model, None, batch).mean().item()
    weight = model.layers[0].mlp.gate_proj.weight
    before = weight.detach().norm()
    history = S.distil(model, teacher, lambda step: batch, 3, loss=S.ce,
                       penalty=lambda student: 1e3 * student.layers[0].mlp.gate_proj.weight.norm())
    assert abs(history[0] - first_loss) < 1e-6 and weight.norm() < before


def test_matrices_alone_decay(monkeypatch):
    model, seen = small("qwen2").float(), []
    monkeypatch.setattr(S, "fit", lambda groups, *args, **kw: seen.append((groups, kw)))
    S.distil(model, None, None, 3, lr=.5, clip=.7)
    (matrices, rest), kw = seen[0][0], seen[0][1]
    assert (matrices["weight_decay"], rest["weight_decay"]) == (.1, 0)
    assert {p.dim() for p in matrices["params"]} == {2} and {p.dim() for p in rest["params"]} == {1}
    assert len(matrices["params"]) + len(rest["params"]) == len(list(model.parameters()))
    assert (kw["lr"], kw["clip"]) == (.5, .7)


def test_fit_is_adamw_at_its_rate_with_its_clips(monkeypatch):
    """Two steps on slopes of 3 and 4: each moves by its rate; what the optimiser saw is clipped."""
    grads, step = [], torch.optim.AdamW.step
    monkeypatch.setattr(torch.optim.AdamW, "step", lambda self: grads.append(
        self.param_groups[0]["params"][0].grad.tolist()) or step(self))
    for clips, want in ((dict(), [3., 4.]), (dict(clip_value=.5), [.5, .5]),
                        (dict(clip=.5), [.3, .4])):
        p = torch.zeros(2, requires_grad=True)
        S.fit([dict(params=[p], weight_decay=0.)], lambda step: 3 * p[0] + 4 * p[1], 2, "x", lr=.1,
              rate=lambda step: 1 / (step + 1), **clips)
        assert close(p, [-.15, -.15], 1e-5) and close(torch.tensor(grads.pop()), want, 1e-5)
    with pytest.raises(UserError, match="the loss of x became nan"):
        S.fit([dict(params=[p])], lambda step: p[0] * math.nan, 1, "x", lr=.1, rate=lambda step: 1.)


# --- ShortGPT, Minitron and PruneNet --------------------------------------------------------------


def test_block_influence_is_one_less_the_cosine_over_a_layer():
    model, tokens = small("qwen3", "4x64"), [ids(3, 10), ids(2, 8, 1)]
    states = [[] for _ in range(5)]
    for part in tokens:                    # 46 tokens, those of the longer batch no heavier
        x = model.embed(part)
        where = [t[:part.size(1)] for t in S.rope_table(model.config, "cpu")]
        states[0].append(x.flatten(0, 1))
        for i, block in enumerate(model.layers):
            x = block(x, *where, None, i, None, None)
            states[i + 1].append(x.flatten(0, 1))
    states = [torch.cat(x).detach() for x in states]
    want = [1 - ((a * b).sum(1) / a.norm(dim=1) / b.norm(dim=1)).mean()
            for a, b in itertools.pairwise(states)]
    assert close(S.influence(model, tokens), torch.stack(want), 1e-8)
    assert not model.layers[0]._forward_hooks


def test_shortgpt_drops_the_layers_that_do_least_and_nothing_else():
    """Layers 1 and 3 add nothing at all: the model without them says the same."""
    model = small("qwen3_moe", "4x64", sliding_window=4, layer_types=(
        "full_attention", "sliding_attention", "sliding_attention", "full_attention"))
    with torch.no_grad():
        for i in (1, 3):
            model.layers[i].self_attn.o_proj.weight.zero_()
            for expert in model.layers[i].mlp.experts:
                expert.down_proj.weight.zero_()
    tokens = ids(3, 12)
    assert close(S.influence(model, [tokens])[[1, 3]], [0., 0.], 1e-12)
    cut = first(S.shortgpt, model, None, [tokens], share=.5)
    assert cut.config == replace(model.config, num_hidden_layers=2, layer_types=(
        "full_attention", "sliding_attention"))
    assert close(logits(cut, tokens), logits(model, tokens), 1e-10)
    for new, old in enumerate((0, 2)):
        for a, b in zip(cut.layers[new].parameters(), model.layers[old].parameters()):
            assert torch.equal(a, b)
    assert len(first(S.shortgpt, model, None, [tokens], share=.75).layers) == 3
    whole = first(S.shortgpt, model, None, [tokens], share=1.)
    assert close(logits(whole, tokens), logits(model, tokens), 1e-12)


def test_minitron_s_score_is_the_mean_over_tokens_and_the_norm_over_rows():
    model, tokens, inputs = small("qwen3"), [ids(3, 10), ids(2, 10, 1)], []
    hook = model.layers[1].mlp.down_proj.register_forward_pre_hook(
        lambda m, args: inputs.append(args[0]))
    score = S.activity(model, tokens)["layers.1.mlp"]
    hook.remove()
    rows = torch.cat([x.abs().mean(1) for x in inputs])                        # [5, f]
    assert close(score, rows.norm(dim=0), 1e-5)
    cut = first(S.minitron, model, None, tokens, share=.5)
    kept = score.topk(8).indices.sort().values
    assert torch.equal(cut.layers[1].mlp.up_proj.weight, model.layers[1].mlp.up_proj.weight[kept])
    assert torch.equal(cut.layers[1].mlp.down_proj.weight,
                       model.layers[1].mlp.down_proj.weight[:, kept])


def test_minitron_on_experts_reads_each_one_s_tokens(pair):
    model, _, batches = pair
    scores = S.activity(model, batches)
    assert set(scores) == set(S.mlps(model)) and all(s.isfinite().all() for s in scores.values())
    assert first(S.minitron, model, None, batches, share=.5).config.intermediate_size == 8


def test_kolmogorov_smirnov_and_the_reward_by_hand():
    a, b = D([5., 4, 3, 2, 1]), D([4.8, 3.1, 1.2])
    assert abs(S.ks_distance(a, b) - .266667) < 1e-6 and abs(S.ks_distance(b, a) - .266667) < 1e-6
    assert S.ks_distance(a, a) == 0 and S.ks_distance(a, a + 10) == 1
    W = torch.diag(torch.tensor([5., 4, 3, 2, 1]))
    # kept rows 0, 2, 4: spectra [5 4 3 2 1] and [5 3 1], the largest gap 2/3 - 3/5 at 3, 1/3 - 1/5
    # at 1
    assert abs(S.spectrum_reward(W, torch.tensor([0, 2, 4])) - 1 / (1 / 3 - 1 / 5)) < 1e-4
    assert S.spectrum_reward(W, torch.arange(5)) == 99999.0


def test_prunenet_cuts_what_it_says():
    model, tokens = small("qwen3").float(), ids(2, 12)
    for sampled in (True, False):
        cut = first(S.prunenet, model, None, [], share=.5, episodes=2, sampled=sampled)
        gone = sum(p.numel() for p in model.parameters()) - sum(p.numel() for p in cut.parameters())
        assert gone == 2 * 3 * 64 * 8
        same = first(S.prunenet, model, None, [], share=1.0, episodes=1, sampled=sampled)
        assert torch.equal(same(tokens), model(tokens))
    alpha, e = D([.3, .5, .8]), torch.rand(3, generator=gen(4)).double()
    want = 1 / (1 + (1 - e) / e * (1 - alpha) / alpha)                     # σ(logit e + logit α)
    assert close(S.relaxed(alpha, gen(4)), want, 1e-9)
    fixed = [first(S.prunenet, model, None, [], share=.5, episodes=2, seed=3) for _ in range(2)]
    assert torch.equal(fixed[0](tokens), fixed[1](tokens))
    W = model.layers[0].mlp.gate_proj.weight.detach()
    policy = S.learn_policy([W], 8, gen(), episodes=3)
    alpha = policy(W)
    assert alpha.shape == (16,) and (alpha > 0).all() and (alpha < 1).all()
    top = S.top(alpha, 8)
    cut = first(S.prunenet, small("qwen3", size="1x64").float(), None, [], share=.5, episodes=3,
                sampled=False)
    assert len(top) == 8 and cut.config.intermediate_size == 8


@pytest.mark.parametrize("sampled", [True, False])
def test_prunenet_keeps_the_rows_that_its_policy_prefers(sampled, monkeypatch):
    """A policy that is sure of eight rows, by what a row of gate holds; never by chance another."""
    model, seen = small("qwen3").float(), []

    def sure(weights, width, generator, episodes):
        seen.append((weights, width, episodes))
        return lambda W: (W.sum(1) >= W.sum(1).sort().values[8]).float()
    monkeypatch.setattr(S, "learn_policy", sure)
    cut = first(S.prunenet, model, None, [], share=.5, episodes=3, sampled=sampled)
    assert seen[0][1:] == (8, 3)
    for given, a, b in zip(seen[0][0], model.layers, cut.layers):
        W = a.mlp.gate_proj.weight
        assert torch.equal(given, W)
        kept = W.sum(1).topk(8).indices.sort().values
        assert torch.equal(b.mlp.up_proj.weight, a.mlp.up_proj.weight[kept])


def test_the_policy_steps_on_discounted_rewards_of_the_rows_that_it_drew(monkeypatch):
    """One AdamW step of two layers, by the definition: -Σ_i γ^i r_i Σ_kept log relaxed(α_i); the
    policy that is handed out is that of the larger Σ γ^i r_i."""
    weights, kept, rewards = [rand(6, 4, seed=s).float() for s in (1, 2)], [], iter([3., 5, 4, 7])
    monkeypatch.setattr(S, "spectrum_reward",
                        lambda W, rows: kept.append(rows) or next(rewards))
    policy = S.learn_policy(weights, 3, gen(), episodes=2, lr=.1, discount=.5)   # 5.5, then 7.5
    g = gen()
    draw = lambda *shape: torch.rand(shape, generator=g)
    x = [p.requires_grad_() for p in ((2 * draw(6, 4) - 1) / 2, (2 * draw(6) - 1) / 2, draw(6))]
    alpha = lambda W: ((W @ x[0].T + x[1]) @ x[2]).sigmoid()
    loss = 0.0
    for i, (W, r) in enumerate(zip(weights, (3., 5.))):
        rows = torch.multinomial(S.relaxed(alpha(W).detach(), g), 3, generator=g)
        assert torch.equal(rows, kept[i])
        loss = loss - .5 ** i * r * S.relaxed(alpha(W), g)[rows].log().sum()
    opt = torch.optim.AdamW(x, .1)
    loss.backward()
    opt.step()
    assert close(policy(weights[0]), alpha(weights[0]), 1e-5)


def test_the_policy_learns_to_prefer_rows_that_are_rewarded(monkeypatch):
    """A reward that counts how many of the first half are kept: their α rises above the others'."""
    monkeypatch.setattr(S, "spectrum_reward", lambda W, kept: ((kept < 8).sum() - 4).item() * 1.0)
    W = torch.cat([torch.ones(8, 4), -torch.ones(8, 4)]) + .1 * rand(16, 4).float()
    start, alpha = S.learn_policy([W], 8, gen(), episodes=1)(W), S.learn_policy([W], 8, gen(),
                                                                                episodes=60,
                                                                                lr=.03)(W)
    gap = [(a[:8].mean() - a[8:].mean()).item() for a in (start, alpha)]
    assert gap[1] > gap[0] + .05


# --- Puzzle ---------------------------------------------------------------------------------------


def test_the_choice_by_hand():
    scores = D([[0, .02, .10], [0, .05, .06], [0, .01, .30]])
    picks = S.choose_dp(scores, [4, 2, 0], 6, None)
    assert picks == [0, 2, 1] and abs(sum(scores[i, j] for i, j in enumerate(picks)) - .07) < 1e-12
    assert S.choose_dp(scores, [4, 2, 0], 12, None) == [0, 0, 0]
    assert S.choose_uniform(scores, [4, 2, 0], 6, None) == [1, 1, 1]
    with pytest.raises(UserError, match="--share"):
        S.choose_dp(scores, [4, 3, 2], 5, None)


@pytest.mark.parametrize("seed", range(6))
def test_dynamic_programming_is_brute_force(seed):
    scores, costs, budget = rand(4, 3, seed=seed).abs(), [7, 3, 1], [4, 10, 13, 17, 22, 28][seed]
    every = [(sum(scores[i, j].item() for i, j in enumerate(p)), p)
             for p in itertools.product(range(3), repeat=4) if sum(costs[j] for j in p) <= budget]
    assert tuple(S.choose_dp(scores, costs, budget, None)) == min(every)[1]


def test_random_choices_spend_the_budget_and_differ():
    scores, costs = rand(4, 5), [16, 12, 8, 4, 0]
    found = [S.choose_random(scores, costs, 32, gen(s)) for s in range(20)]
    assert all(sum(costs[j] for j in p) == 32 for p in found) and len({tuple(p) for p in found}) > 8


def test_the_normalised_error_of_nothing_is_one():
    y = rand(3, 5, 8)
    assert S.normalised_mse(torch.zeros_like(y), y) == 1 and S.normalised_mse(y, y) == 0


@pytest.fixture(scope="module")
def puzzle_parts():
    """A dense model, its batches and a library of widths 16, 8 and 0."""
    model, batches = small("qwen3", size="3x64").float(), [ids(4, 24, s) for s in range(3)]
    return model, batches, S.block_library(model, batches, [1, .5, 0], 8)


def test_block_distillation_lowers_its_own_loss_and_leaves_the_rest(puzzle_parts):
    model, batches, _ = puzzle_parts
    library = S.block_library(model, batches, [1, .5, 0], 8)
    assert list(library) == [16, 8, 0] and library[0] is None
    kept = S.activity(model, batches)["layers.1.mlp"].topk(8).indices.sort().values
    assert torch.equal(library[8].layers[1].mlp.up_proj.weight,
                       model.layers[1].mlp.up_proj.weight[kept])
    assert torch.equal(library[16](batches[0]), model(batches[0]))
    before, scores = copy.deepcopy(library[8].state_dict()), S.replace_one(model, library, batches)
    early, read = S.distil_blocks(model, library, batches, 1, 0.0), []
    hook = model.register_forward_pre_hook(lambda m, args: read.append(args[0]))
    late = S.distil_blocks(model, library, batches, 60, 3e-3)
    hook.remove()
    assert all(torch.equal(a, b) for a, b in zip(read, batches)) and len(read) == 60
    assert len(late) == 3 and all(b < .9 * a for a, b in zip(early, late))
    changed = {k for k, v in library[8].state_dict().items() if not torch.equal(v, before[k])}
    assert changed == {k for k in before if ".mlp." in k}
    assert not any(block.mlp._forward_hooks for block in model.layers)
    after = S.replace_one(model, library, batches)
    assert (scores[:, 0] == 0).all() and (scores[:, 1:] > 0).all() and (scores[:, 2]
                                                                        == after[:, 2]).all()
    assert after[:, 1].sum() < scores[:, 1].sum()


def test_replacing_one_is_the_assembled_model_and_leaves_the_teacher(puzzle_parts):
    model, batches, library = puzzle_parts
    before = model(batches[0])
    scores = S.replace_one(model, library, batches)
    for widths, (i, j) in (([16, 8, 16], (1, 1)), ([0, 16, 16], (0, 2))):
        one = S.assemble(model, library, widths)
        assert abs(S.divergence(one, model, batches) - scores[i, j].item()) < 1e-6
    assert torch.equal(model(batches[0]), before)


def test_puzzle_finds_its_budget(puzzle_parts):
    model, batches, _ = puzzle_parts
    teacher, kw = twin(model).requires_grad_(False), dict(shares="100,50,0", local_steps=5)
    whole = first(S.puzzle, model, teacher, batches, share=1.0, **kw)
    assert torch.equal(whole(batches[0]), model(batches[0])) and whole.config == model.config
    found = []
    choose, S.CHOICES["dp"] = S.CHOICES["dp"], lambda *args: found.append(args) or choose(*args)
    try:
        first(S.puzzle, model, teacher, batches, share=.5, choice="dp", **kw)
    finally:
        S.CHOICES["dp"] = choose
    (scores, widths, budget, _), = found
    assert (widths, budget) == ([16, 8, 0], 24) and (scores[:, 0] == 0).all()
    gone = copy.deepcopy(teacher)
    gone.layers[1].mlp = None
    assert abs(S.divergence(gone, teacher, batches) - scores[1, 2].item()) < 1e-6
    made = {choice: first(S.puzzle, model, teacher, batches, share=.5, choice=choice, **kw)
            for choice in S.CHOICES}
    assert made["uniform"].config == replace(model.config, intermediate_size=8)
    for net in (made["dp"], made["random"]):
        assert sum(net.config.layer_widths or (8, 8, 8)) <= 24


def test_scores_of_single_replacements_nearly_add_up(puzzle_parts):
    """The choice's assumption. Here, at random weights, the sum is within a factor of two of the
    truth."""
    model, batches, library = puzzle_parts
    total = S.replace_one(model, library, batches)[:, 1].sum().item()
    true = S.divergence(S.assemble(model, library, [8, 8, 8]), model, batches)
    assert .5 < total / true < 2


# --- shaped models --------------------------------------------------------------------------------


def decoded(net):
    """Greedy decoding with the cache takes the argmax of the full forward at every step, batched or
    not."""
    net = net.float()
    prompts = [ids(1, n, n)[0].tolist() for n in (4, 9, 1)]
    roll = generate(net, prompts, 10, temperature=0, stop=[])
    logp = token_logprobs(net, roll.tokens, roll.mask)
    for row, prompt in zip(roll.tokens, prompts):
        text = list(prompt)
        for _ in range(10):
            text.append(int(net.logits(net(torch.tensor([text]))[:, -1]).argmax()))
        if row[:len(text)].tolist() != text:
            return False
    return (logp - roll.logp).abs().max() < 1e-4


def returned(net, path):
    """Whether the checkpoint loads bitwise, its config.json under a name that no other tool
    takes."""
    net = net.float()
    save(net, bytes_tokenizer(), path)
    raw, (back, _) = json.loads((path / "config.json").read_text()), load(path)
    return (raw["model_type"] == "shaped-" + net.config.model_type and back.config == net.config
            and torch.equal(back(ids(2, 9)), net(ids(2, 9))))


@pytest.mark.parametrize("family", ["qwen3", "qwen3_moe"])
def test_layers_of_their_own_width(family, tmp_path):
    config = replace(small(family).config, layer_widths=(8, 0))
    net = init(config)
    assert net.layers[1].mlp is None and sum(m.gate_proj.out_features
                                             for m in S.mlps(net).values()) == (
        64 if config.moe else 8)
    assert decoded(net) and returned(net, tmp_path)
    assert close(net.layers[1](rand(1, 4, 64).float(), *where(net, 4)),
                 attended(net.layers[1], rand(1, 4, 64).float(), where(net, 4)))


def where(net, T):
    """A block's further arguments, without a cache."""
    from model import rope_table
    cos, sin = rope_table(net.config, torch.device("cpu"))
    return cos[:T], sin[:T], None, 0, None, None


def attended(block, x, args, **kw):
    """A block's attention half."""
    return x + block.self_attn(block.input_layernorm(x), *args, **kw)


def test_plain_models_say_nothing_of_shapes():
    d = to_hf(small("qwen3").config)
    assert not {"layer_widths", "swift_layer", "shared_heads", "routed_heads",
                "head_router"} & set(d)
    assert d["model_type"] == "qwen3"


@pytest.mark.parametrize("changes, words", [
    (dict(model_type="qwen3"), "does not go with"), (dict(layer_widths=[8]), "2 layers"),
    (dict(layer_widths=[]), "does not go with"),
    (dict(model_type="shaped-qwen9"), "not supported")])
def test_a_shaped_config_that_does_not_fit_is_refused(changes, words):
    d = json.loads(json.dumps(to_hf(replace(small("qwen3").config, layer_widths=(8, 0)))))
    assert from_hf(d).layer_widths == (8, 0)
    with pytest.raises(UserError, match=words):
        from_hf(d | changes)


# --- SwiftKV --------------------------------------------------------------------------------------


def test_swiftkv_at_the_last_layer_changes_nothing():
    model, tokens = small("qwen3", size="4x64"), ids(2, 12)
    assert torch.equal(first(S.swiftkv, model, None, [], layer=4)(tokens), model(tokens))
    half = first(S.swiftkv, model, None, [])
    assert half.config.swift_layer == 2 and not close(half(tokens), model(tokens), 1e-3)


def test_keys_of_a_layer_s_own_input_are_the_teacher_s():
    model, x = small("qwen3"), rand(2, 7, 64)
    block = model.layers[1]
    own = attended(block, x, where(model, 7))
    assert torch.equal(attended(block, x, where(model, 7), source=block.input_layernorm(x)), own)
    assert not close(attended(block, x, where(model, 7), source=rand(2, 7, 64, seed=1)), own, 1e-3)


def test_keys_and_values_of_late_layers_come_from_one_state():
    """By definition: block by block, with keys and values of the normed state that enters layer
    2."""
    model, tokens = small("qwen3", size="4x64"), ids(2, 12)
    student, x = first(S.swiftkv, model, None, []), model.embed_tokens(tokens)
    for i, block in enumerate(model.layers):
        if i == 2:
            source = block.input_layernorm(x)
        x = attended(block, x, where(model, 12), **(dict(source=source) if i >= 2 else {}))
        x = x + block.mlp(block.post_attention_layernorm(x))
    assert close(student(tokens), model.norm(x), 1e-10)


@pytest.mark.parametrize("family", ["qwen3", "qwen2"])
def test_swiftkv_trains_the_listed_tensors_only(family):
    model, tokens = small(family, size="4x64"), ids(2, 12)
    student = first(S.swiftkv, model, None, [])
    S.token_losses(S.swift_kl, student, model, tokens).mean().backward()
    got = {k for k, p in student.named_parameters() if p.grad is not None}
    kinds = ("weight", "bias") if family == "qwen2" else ("weight",)
    assert got == {"norm_swiftkv.weight"} | {f"layers.{i}.self_attn.{x}_proj.{kind}" for i in (2, 3)
                                             for x in "qkv" for kind in kinds}
    with pytest.raises(UserError, match="--layer"):
        first(S.swiftkv, model, None, [], layer=5)


def test_swiftkv_decodes_and_returns(tmp_path):
    student = first(S.swiftkv, small("qwen3", size="4x64"), None, [])
    assert decoded(student) and returned(student, tmp_path)


# --- MoH ------------------------------------------------------------------------------------------


def router(router="learned", S=2, K=1):
    """A head router of 4 heads in width 8, its weights random."""
    from model import HeadRouter
    c = replace(small().config, hidden_size=8, shared_heads=S, routed_heads=K, head_router=router)
    made = HeadRouter(c).double()
    for i, p in enumerate(made.parameters()):
        p.data = rand(*p.shape, seed=i)
    return made


def test_all_heads_with_even_gates_are_plain_attention():
    model, tokens = small("qwen3"), ids(2, 12)
    moh = first(S.moh, model, None, [], active=1.0, router="learned")
    with torch.no_grad():
        for p in (p for k, p in moh.named_parameters() if ".heads." in k):
            p.zero_()
    assert moh.config.routed_heads == 2 and close(moh(tokens), model(tokens), 1e-6)
    free = first(S.moh, model, None, [], active=1.0)
    assert close(free(tokens), model(tokens), 1e-6)


def test_gates_by_their_definition():
    heads, x, q = router(), rand(2, 3, 8, seed=5), rand(2, 4, 3, 16, seed=6)
    gate = heads(x, q)[..., 0].transpose(1, 2)                                 # [B, T, H]
    a = 2 * (x @ heads.groups.weight.T).softmax(-1)
    p = (x @ heads.routed.weight.T).softmax(-1)
    assert close(gate[..., :2], a[..., :1] * 2 * (x @ heads.shared.weight.T).softmax(-1), 1e-6)
    best = p.argmax(-1, keepdim=True)
    assert close(gate[..., 2:], torch.zeros_like(p).scatter(-1, best, a[..., 1:]), 1e-6)
    assert close(gate.sum(-1), 2 * a[..., 0] + 1 * a[..., 1], 1e-6)            # S a1 + K a2


def test_the_parameter_free_router_counts_heads_and_passes_gradients():
    heads, x, q = router("norm"), rand(2, 3, 8), rand(2, 4, 3, 16, seed=1).requires_grad_()
    assert not list(heads.parameters())
    gate = heads(x, q)[..., 0]                                                 # [B, H, T]
    assert close(gate[:, :2], torch.ones(2, 2, 3)) and close(gate.sum(1), torch.full((2, 3), 3.),
                                                             1e-6)
    norm = q[:, 2:].norm(dim=-1)
    assert torch.equal(gate[:, 2:].argmax(1), norm.argmax(1))
    (gate * rand(2, 4, 3, seed=2)).sum().backward()
    assert q.grad[:, 2:].abs().min() > 0 and not q.grad[:, :2].any()
    even = torch.ones(2, 4, 3, 16).requires_grad_()                         # norms without a spread
    heads(x, even)[:, 2].sum().backward()
    assert even.grad.isfinite().all()


def test_the_balance_loss_of_heads_by_hand():
    model, balance = small("qwen3"), functools.partial(S.head_balance, weight=1.0)
    moh = first(S.moh, model, None, [], router="learned", shared=.25, active=.5)  # 1 shared, 1 of 3
    p = torch.full((1, 3, 3), 1 / 3)
    for block in moh.layers:
        block.self_attn.heads.routing = p, torch.eye(3)[None]
    assert abs(balance(moh).item() - 1) < 1e-6                                 # K = 1
    for block in moh.layers:
        block.self_attn.heads.routing = torch.tensor([[[.8, .1, .1]]]), torch.tensor([[[1., 0, 0]]])
    assert abs(balance(moh).item() - 2.4) < 1e-6                               # R Σ p̄ f̄ = 3 * .8
    assert abs(S.head_balance(moh).item() - .024) < 1e-6


@pytest.mark.parametrize("router", ["learned", "norm"])
def test_mixtures_of_heads_decode_return_and_train(router, tmp_path):
    model = small("qwen3").float()
    moh = first(S.moh, model, None, [], router=router)
    assert (moh.config.shared_heads, moh.config.routed_heads) == (2, 1)
    assert decoded(moh) and returned(moh, tmp_path)
    teacher, batches = twin(model).requires_grad_(False), [ids(4, 24, s) for s in range(2)]
    before = S.divergence(moh, teacher, batches)
    S.distil(moh, teacher, lambda step: batches[step % 2], 20, penalty=S.PENALTIES["moh"])
    assert 0 < S.divergence(moh, teacher, batches) < .7 * before
    with pytest.raises(UserError, match="--shared"):
        first(S.moh, model, None, [], shared=.75, active=.75)


def test_a_dense_model_of_the_active_size(pair):
    model, teacher, batches = pair
    slim = first(S.slimmoe, model, teacher, batches, share=.5, stages=1, multiple=1)
    dense = first(S.dense_active, model, teacher, batches, share=.5, multiple=1)
    c, width = dense.config, slim.config.intermediate_size
    assert not c.moe and c.intermediate_size == width * c.num_experts_per_tok
    assert dense(batches[0]).isfinite().all() and c.model_type == "qwen3"
    with pytest.raises(UserError, match="with experts"):
        first(S.dense_active, dense, None, batches)
