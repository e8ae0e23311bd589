"""compress.py in whole runs: what reaches every preset's functions and what becomes of what they
return, compared with the same quantities computed apart from the checkpoints and the text."""
import copy
import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from conftest import close, merged
from safetensors.torch import load_file
from wiring import catch

import compress
from data import text
from data.run import needs, read_log
from data.tokenizer import bytes_tokenizer
from kernels import PackedLinear
from model import ModelConfig, init, load, plain_linear, replace_linears, save

# every row of an axis that decides what is made, and every preset that names a method
ROWS = [row for axis in ("method", "smooth", "cache") for row in compress.AXES[axis]]
PRESETS = list(dict.fromkeys([*(x for x in ROWS if x not in ("none", "full")), *(
    name for name, row in compress.PRESETS.items() if "method" in row)]))
SEQUENTIAL = {"wanda", "sparsegpt", "gptq", "baq", "gptvq"}      # as their authors' code calibrates
# a preset's run has more where the tiny one could not tell right from wrong
MORE = dict(dprune=["--domain=domain.txt", "--samples=12"], evicting=["--chunk=12"],
            moh=["--init=four_heads", "--seed=3"], kmeans=["--init=four_heads", "--seed=3"],
            fresh=["--kd_loss=ce", "--kd_lr=0.002"])


def tiny(config, out, *extra):
    """The numbers of a run of two layers."""
    return compress.main(merged("--config", f"{config},tiny", "--out", out, *extra))


# --- the quantities, computed apart ---------------------------------------------------------------


@torch.no_grad()
def law(model, tokens):
    """log p of all words behind every token but the last.   [B, T-1, V]"""
    return F.linear(model(tokens)[:, :-1], model.head).double().log_softmax(-1)


def nats(model, tokens, start=0):
    """Mean -log p of the tokens behind the first `start` of a row."""
    logp = law(model, tokens).gather(2, tokens[:, 1:, None])
    return -logp[:, max(start - 1, 0):].mean().item()


@torch.no_grad()
def read_by(model, block, tokens):
    """What the linear layers of a block read: {name: x [N, n]}."""
    found, hooks = {}, []
    for name, m in model.layers[block].named_modules():
        if isinstance(m, torch.nn.Linear | PackedLinear):
            hooks.append(m.register_forward_pre_hook(
                lambda m, args, name=name: found.update({name: args[0].flatten(0, 1)})))
    model(tokens)
    for hook in hooks:
        hook.remove()
    return found


def domain_gradient(base, weight, tokens):
    """Mean gradient and mean squared gradient of a weight over micro-batches of 8 windows."""
    model, sums = copy.deepcopy(base), [0.0, 0.0]
    p = model.get_submodule(weight).weight.requires_grad_()
    for part in (parts := tokens.split(8)):
        z = F.linear(model(part)[:, :-1], model.head).log_softmax(-1)
        loss = -z.gather(2, part[:, 1:, None]).mean()
        g, = torch.autograd.grad(loss, p)
        sums = [sums[0] + g / len(parts), sums[1] + g ** 2 / len(parts)]
    return sums


def relative(W, new, h):
    """NoWag's error: both by the norms of W's columns, then of its rows, an input's share h."""
    r1 = W.norm(dim=0) + 1e-5
    r2 = (W / r1).norm(dim=1, keepdim=True) + 1e-5
    return ((((W - new) / r1 / r2) ** 2 * h).sum() / ((W / r1 / r2) ** 2 * h).sum()).item()


ORACLE = dict(              # an argument's name: the same, from what is known of the layer or run
    W=lambda x: x.weight,
    h=lambda x: 2 * (x.read ** 2).mean(0),
    H=lambda x: 2 * x.read.T @ x.read / len(x.read),
    absmax=lambda x: x.read.abs().amax(0),
    domain_gradients=lambda x: domain_gradient(x.base, x.name, x.domain),
    generator=lambda x: x.generator,
    trace=lambda x: [],
    model=lambda x: x.base,
    teacher=lambda x: x.states["teacher"] if hasattr(x, "states") else x.base,
    batches=lambda x: [*x.tokens.split(8)], tokens=lambda x: x.tokens,
    inputs=lambda x: [x.base.embed_tokens(part) for part in x.tokens.split(8)],
    student=lambda x: x.states["student"], targets=lambda x: x.targets)
OWN = {"where", "f"}        # a block's further arguments, and the settings: no quantity of a run


def alike(got, want, tol=2e-3):
    """Whether two arguments are the same: tensors to a share of their size, models by weights."""
    if isinstance(want, torch.nn.Module):
        a, b = got.state_dict(), want.state_dict()
        return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
    if isinstance(want, torch.Generator):
        return torch.equal(got.get_state(), want.get_state())
    if isinstance(want, SimpleNamespace):
        return all(alike(x, vars(want)[k]) for k, x in vars(got).items())
    if isinstance(want, list | tuple):
        return len(got) == len(want) and all(map(alike, got, want))
    return close(got.double(), want.double(), tol * want.abs().max().item() + 1e-7)


def state_of(model, tokens):
    """A model's final states at all but the last token, its head, what its last block reads."""
    read = []
    hook = model.layers[-1].register_forward_pre_hook(lambda m, args: read.append(args[0]))
    with torch.no_grad():
        hidden = model(tokens)
    hook.remove()
    return SimpleNamespace(hidden=hidden[:, :-1].flatten(0, 1), head=model.head.detach(),
                           before=read[0][:, :-1].flatten(0, 1))


class Watch:
    """What is seen of a run while it goes: what reaches a function must be as it is then."""

    def __init__(self):
        self.steps, self.cuts, self.penalised, self.base = [], [], [], None

    def __call__(self, name, call):
        row = {"open_model": self.opened, "W": self.walk, "batches": self.walk,
               "distil": self.distil, "token_losses": self.both, "speed": self.speed}
        if name in compress.LOSSES:
            self.steps.append(self.now.tokens)
            self.agree(name, call, needs(compress.LOSSES[name]))
        elif name in row:
            row[name](call)
        elif hasattr(call, "teacher") or name in compress.SMOOTH:
            self.agree(name, call, {"model", "teacher", "batches", "inputs"} & vars(call).keys())
            if hasattr(call, "teacher"):
                assert alike(call.generator, self.generator)
                assert all(p.requires_grad for p in call.model.parameters())
                assert call.teacher.head.data_ptr() != call.model.head.data_ptr()
        elif name == "moh":                                      # its penalty
            self.penalised.append(call.model is self.now.student)
        elif hasattr(call, "generator") and not hasattr(self, "drawn"):
            self.drawn = alike(call.generator, self.generator)   # later layers find it used

    def agree(self, name, call, keys):
        for key in keys:
            assert alike(getattr(call, key), ORACLE[key](self)), (name, key)

    def opened(self, call):
        if self.base is None:
            self.base, tok = load(call.folder)
            c, ids = call.c, text.stream(text.documents(call.c.data, "val"), load(call.folder)[1],
                                         call.c.windows * call.c.context)
            self.held = ids[:c.windows * c.context].view(c.windows, c.context)

    def walk(self, call):
        self.c, self.tokens, self.generator = call.c, call.tokens, torch.Generator()
        c, g = self.c, self.generator.manual_seed(call.c.seed)
        assert torch.equal(call.held, self.held) and alike(call.model, self.base)
        if "batches" in needs(call.f.method):
            ids = text.stream(text.shuffled(c.data, g), call.tok, c.kd_steps * c.kd_batch
                              * c.context)
            ids = ids[:len(ids) // c.context * c.context].view(-1, c.context)
            self.order = ids[torch.randperm(len(ids), generator=g)]

    def distil(self, call):
        self.cuts.append(nats(call.student, self.held))
        assert call.lr == self.c.kd_lr

    def speed(self, call):
        assert torch.equal(call.prompt, self.held[0])
        assert self.steps or hasattr(self, "tokens") or alike(call.model, self.base)

    def both(self, call):
        self.now = call
        self.states = {k: state_of(getattr(call, k), call.tokens) for k in ("student", "teacher")}
        self.targets = call.tokens[:, 1:].flatten()
        assert alike(call.teacher, self.base)


def layers(model):
    """[(block, name, layer)] of the linear layers of all blocks."""
    return [(i, name, m) for i, block in enumerate(model.layers)
            for name, m in block.named_modules() if isinstance(m, torch.nn.Linear | PackedLinear)]


def check_numbers(out, base, small, held):
    """The table's numbers by the laws of both models."""
    p, q = law(base, held), law(small, held)
    before, after = nats(base, held), nats(small, held)
    want = dict(dense_loss=before, loss=after, loss_increase=after - before,
                kl=(p.exp() * (p - q)).sum(-1).mean().item())
    for key, x in want.items():
        assert out[key] == pytest.approx(x, abs=1e-4), key
    assert out["perplexity"] == pytest.approx(math.exp(after), rel=1e-3)
    assert out["same_top"] == pytest.approx(
        (p.argmax(-1) == q.argmax(-1)).double().mean().item(), abs=5e-3)


def check_layers(out, calls, config, watch, small):
    """Every argument of every layer's call, and what the call returned, stored in its place."""
    method = compress.PRESETS.get(config, {}).get("method", config)
    method = "rtn" if config in ("awq", "smoothquant") else method
    made, row = calls[method], compress.METHODS[method]
    whole = copy.deepcopy(small)             # as it was before it was rounded or pruned
    for (i, name, m), call in zip(layers(whole), made, strict=True):
        whole.layers[i].set_submodule(name, plain_linear(m, call.W))
    if method == config or config not in ("awq", "smoothquant"):
        assert alike(whole, watch.base)
    else:                                                 # an equal model, but for what AWQ clips
        assert calls[config] and not alike(whole, watch.base)
        assert close(law(whole, watch.held), law(watch.base, watch.held),
                     1e-3 if config == "smoothquant" else 3)
    domain = [x.out for x in calls["calibration"] if x.data == "domain.txt"]
    seen, proxies, size, start = copy.deepcopy(whole), [], 0, []
    for (i, name, m), call in zip(layers(whole), made, strict=True):
        read = read_by(seen, i, watch.tokens)[name]
        known = SimpleNamespace(weight=m.weight, read=read, base=whole, name=f"layers.{i}.{name}",
                                domain=domain[0] if domain else None)
        for key in set(needs(row)) - {"generator", "trace"}:
            assert alike(getattr(call, key), ORACLE[key](known)), (i, name, key)
        assert not getattr(call, "trace", [])
        kept = small.layers[i].get_submodule(name)
        new, then = (x.dequantize() if isinstance(x, PackedLinear) else x
                     for x in (kept, call.out))
        assert torch.equal(new if isinstance(kept, PackedLinear) else kept.weight, then)
        h = ORACLE["h"](known)
        proxies.append(relative(call.W, then, h))
        packed = dict(kept.named_buffers()) if isinstance(kept, PackedLinear) else {}
        size += sum(x.nbytes for x in packed.values()) or 2 * m.weight.numel()
        mask = compress.kept(call.W ** 2 / call.W.norm(dim=0) ** 2 * h, "2:4")
        start.append(relative(call.W, call.W * mask, h))
        if name == "mlp.down_proj" and config in SEQUENTIAL:
            seen.layers[i] = small.layers[i]
    assert max(proxies) < .6                   # what is stored stands for the weight that was given
    assert out["proxy"] == pytest.approx(sum(proxies) / len(proxies), rel=2e-3)
    count = sum(m.weight.numel() for *_, m in layers(whole))
    assert out["bits"] == pytest.approx(8 * size / count)
    log = read_log("run")
    assert (log[-1]["bits"], log[-1]["proxy"]) == (out["bits"], out["proxy"])
    assert log[0]["proxy"] == pytest.approx(sum(proxies[:7]) / 7, rel=2e-3)
    if config == "armor":
        worst = max(a / b for a, b in zip(proxies, start))
        assert out["worst_layer"] == pytest.approx(worst, rel=1e-2) and out["rise"] <= 1e-6
    return made


def check_students(out, config, calls, watch, small):
    """The windows of every step, the numbers before and after each stage."""
    log, size = read_log("run"), sum(p.numel() for p in small.parameters())
    want = watch.order[torch.arange(4 * 4) % len(watch.order)]           # kd_steps x kd_batch
    assert torch.equal(torch.cat(watch.steps), want)
    assert [x["cut_nats"] for x in log] == pytest.approx(watch.cuts, abs=1e-4)
    assert out["first_cut_loss"] == pytest.approx(watch.cuts[0], abs=1e-4)
    assert out["cut_loss"] == pytest.approx(watch.cuts[-1], abs=1e-4)
    assert log[-1]["distilled_nats"] == pytest.approx(out["loss"], abs=1e-4)
    assert out["parameters"] == size and out["share"] == pytest.approx(
        size / sum(p.numel() for p in watch.base.parameters()))
    assert watch.penalised == [True] * (4 if config == "moh" else 0)
    losses = [x.out.mean().item() for name in compress.LOSSES for x in calls[name]]
    assert log[-1]["train"] == pytest.approx(losses[-1], rel=1e-5)
    return [x for x in calls[config] if hasattr(x, "teacher")]


@torch.no_grad()
def check_cache(out, config, call, small, held):
    """The second half of every window, a token at a time through the cache that was made."""
    whole, cache, n = nats(small, held, 32), call.out(small.config, 8, 32, "cpu", torch.float32), 32
    if config == "evicting":
        for part in held[:, :24].split(12, 1):
            small(part, cache)
            cache.evict(8)
        n = 8
    hidden, logp = small(held[:, 32 - n:32], cache)[:, -1], []
    cache.spread(torch.arange(8), 31)
    for t in range(32, 64):
        z = F.linear(hidden, small.head).log_softmax(-1)
        logp.append(z.gather(1, held[:, t, None]))
        if t < 63:
            hidden = small(held[:, t:t + 1], cache)[:, -1]
    loss, size = -torch.cat(logp).mean().item(), cache.nbytes() / (8 * 63)
    full = 2 * 4 * len(small.layers) * small.config.num_key_value_heads * small.config.head_dim
    want = dict(cache_loss=loss, cache_increase=loss - whole, cache_bytes=size,
                cache_share=size / full)
    for key, x in want.items():
        assert out[key] == pytest.approx(x, abs=1e-4), key
    assert abs(loss - whole) > 1e-4 and size != full


@pytest.mark.parametrize("config", PRESETS)
def test_every_preset_is_given_what_it_names_and_its_checkpoint_opens(config, shared_bases,
                                                                      monkeypatch):
    c = ModelConfig(vocab_size=320, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
                    head_dim=8, num_attention_heads=4, num_key_value_heads=2,
                    eos_token_id=(bytes_tokenizer().eos,))
    model, g = init(replace(c, model_type="qwen2")), torch.Generator().manual_seed(0)
    for p in model.parameters():
        p.data += .1 * torch.randn(p.shape, generator=g) if p.dim() == 1 else 0     # biases, norms
    save(model, bytes_tokenizer(), "four_heads")
    Path("domain.txt").write_text("".join(f"{i} + {i * i % 7} = {i + i * i % 7}\n"
                                          for i in range(3000)))
    watch = Watch()
    calls = catch(monkeypatch, compress, "METHODS", "SMOOTH", "CACHES", "LOSSES", "PENALTIES",
                  "WALKS", "open_model", "calibration", "distil", "token_losses", "speed",
                  "train_heads", see=watch)
    out = tiny(config, "run", *MORE.get(config, []))
    small, base = load("run/step-000002")[0], watch.base
    check_numbers(out, base, small, held := watch.held)
    assert torch.equal(watch.tokens if calls["W"] or calls["batches"] else
                       calls["calibration"][0].out, calls["calibration"][0].out)
    assert [out["dense_tokens_per_second"], out["tokens_per_second"]] == [
        x.out for x in calls["speed"]]
    made = []
    if calls["W"]:
        made = check_layers(out, calls, config, watch, small)
        assert getattr(watch, "drawn", True)
    elif calls["batches"]:
        made = check_students(out, config, calls, watch, small)
    if config in compress.MEASURES:
        made = calls[config]
        model = getattr(made[-1], "model", small)                # eviction hangs on its own model
        assert alike(model, small)
        check_cache(out, config, made[-1], model, held)
    if config == "evicting":
        heads, = calls["train_heads"]
        assert alike(heads.model, small) and heads.steps == 5
        assert torch.equal(heads.windows, calls["calibration"][0].out)
        assert torch.equal(made[-1].tokens, heads.windows)
    asked = compress.PRESETS.get(config, {}) | compress.PRESETS["tiny"] | {
        k: v for k, v in (x[2:].split("=") for x in MORE.get(config, []))}
    for call in made:                                            # the preset's own numbers
        for key in asked.keys() & vars(call).keys():
            assert str(getattr(call, key)) == str(asked[key]), key
    check_file(out, config, small)


def check_file(out, config, small):
    """The checkpoint computes what its weights say, but for rounded activations; its size."""
    tokens = torch.arange(10, 60).view(2, 25)
    unpacked = replace_linears(load("run/step-000002")[0], lambda name, m: plain_linear(
        m, m.dequantize()) if isinstance(m, PackedLinear) else m)
    rounded = [m for m in small.modules() if isinstance(m, PackedLinear) and m.act]
    first = small(tokens)
    for m in rounded:  # the unpacked reference has whole activations
        m.act = ()
    assert close(small(tokens), unpacked(tokens), 1e-3)
    assert bool(rounded) == (config in ("w4a4", "comet", "halo")) == (
        not close(first, small(tokens), 1e-3))
    counted = sum(x.nbytes for x in small.state_dict().values())
    stored = sum(x.nbytes for x in load_file("run/step-000002/model.safetensors").values())
    foreign = config in ("rtn", "gptq", "smoothquant", "awq")       # shapes, and whole words a row
    assert 0 < stored - counted < 0.05 * counted if foreign else stored == counted
    with open("run/step-000002/model.safetensors", "rb") as file:   # 8 bytes, a header, the tensors
        assert out["disk_bytes"] == 8 + int.from_bytes(file.read(8), "little") + stored
    assert (out["loss_increase"] == 0) == (config in ("dense", "kivi", "evicting"))


def test_heads_are_trained_at_a_rate_that_warms_up_with_gradients_clipped_by_value(monkeypatch):
    model, seen = init(ModelConfig(vocab_size=8, hidden_size=16, intermediate_size=16, head_dim=8,
                                   num_hidden_layers=2, num_attention_heads=2,
                                   num_key_value_heads=1)), []
    monkeypatch.setattr(compress, "fit", lambda groups, loss_of, steps, name, **kw: seen.append(
        (groups, loss_of, steps, kw)))
    windows = torch.randint(8, (5, 20))
    heads = compress.train_heads(model, windows, steps=10, lr=.25, width=4, answer=6, batch=3,
                                 warmup=.5)
    (groups, loss_of, steps, kw), = seen
    assert (steps, kw["lr"], kw["clip_value"]) == (10, .25, .5)
    assert [kw["rate"](i) for i in (0, 1, 4, 9)] == [.2, .4, 1, 1]
    g = torch.Generator().manual_seed(0)
    for _ in heads:
        compress.RetainingHead(model.config, 4, g)                       # draws what theirs drew
    rows = torch.randint(5, (3,), generator=g)
    data = compress.retaining_data(model, windows[rows], 6)
    want = [F.smooth_l1_loss(y := head.w2(F.silu(head.w1(c))).mT, label)
            + .0025 * (y[..., 1:] - y[..., :-1]).square().mean() for head, (c, label) in zip(
                heads, data)]
    assert close(loss_of(0), sum(want) / 2, 1e-6)
    std = torch.cat([head.w1.weight.flatten() for head in heads]).std().item()
    assert std == pytest.approx(heads[0].w1.in_features ** -.5, rel=.2)


def test_every_argument_that_a_row_reads_is_compared_with_one_computed_apart():
    read = {name for axis in ("method", "smooth", "cache", "kd_loss")
            for fn in compress.AXES[axis].values() for name in needs(fn)}
    assert read == ORACLE.keys() | OWN
