"""optim.py: schedules, rounding, stored weights; model.py: adapters; sft.py: LoRAM and step law.

Worked numbers are those of the papers' specs; a W is [F, D] = (out, in)."""
import math
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import sft
from data.run import UserError, needs
from data.tokenizer import bytes_tokenizer
from kernels import pack_int
from model import (Bat, Bone, LoRA, adapter_state, bat, bone, full, hft, init, lora, merge, preset,
                   replace_linears)
from optim import (SCHEDULES, STORES, TABLES, StoredLinear, constant, cosine, get8, linear,
                   optimiser, power, put8, quantize_groups, round_bf16, store, store_bfloat16,
                   store_int4, store_int8, wsd)
from sft import step_law


def seeded(seed=0):
    """A generator."""
    return torch.Generator().manual_seed(seed)


def net(family="qwen2", size="2x64"):
    """A new small model."""
    return init(preset(size, bytes_tokenizer(), 32, family), 0)


def pack4(model):
    """The model with 4-bit packed layers: a QLoRA base."""
    def pack(name, layer):
        codes, scale, zero = quantize_groups(layer.weight.detach(), 4, 16)
        return pack_int(codes.flatten(1), scale[..., 0], zero[..., 0], bits=4, group=16,
                        bias=layer.bias)
    return replace_linears(model, pack)


def tokens(seed=0):
    """Two rows of random bytes [2, 9]."""
    return torch.randint(0, 256, (2, 9), generator=seeded(seed))


def train(model, steps=3, **how):
    """A few steps of AdamW with decay on random tokens."""
    opt = optimiser(model, lr=1e-2, weight_decay=0.5, **how)
    for step in range(steps):
        x = tokens(step)
        F.cross_entropy(model.logits(model(x))[:, :-1].flatten(0, 1), x[:, 1:].flatten()).backward()
        opt.step()
        opt.zero_grad()
    return model


def shake(model, std=0.1):
    """Random values for all that trains, so that no adapter is 0."""
    g = seeded(1)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.copy_(std * torch.randn(p.shape, generator=g))
    return model


def weights(model):
    """Copies of all of a model's parameters."""
    return {k: p.detach().clone() for k, p in model.named_parameters()}


def differ(a, b):
    """The names under which two dicts of tensors are not equal, bit for bit."""
    return {k for k in a.keys() | b.keys() if k not in a or k not in b
            or not torch.equal(a[k], b[k])}


def projections(model):
    """{name: layer} of the linear layers inside the blocks, or of what took their place."""
    return {n: m for n, m in model.named_modules() if n.endswith("_proj")}


# --- schedules ------------------------------------------------------------------------------------

@pytest.mark.parametrize("fn, values, area", [
    (constant, {0: .25, 1: .5, 3: 1, 4: 1, 19: 1}, 18.5),
    (linear, {0: .25, 3: 1, 4: 1, 12: .5, 19: 1 / 16}, 11.0),
    (cosine, {0: .25, 3: 1, 4: 1, 12: .525, 20: .05}, 11.375),
    (wsd, {0: .25, 3: 1, 15: 1, 16: 1, 18: .5, 20: 0}, 17.0),
    (partial(wsd, shape="sqrt"), {16: 1, 17: .5, 20: 0},
     14.5 + 4 - .5 - math.sqrt(.5) - math.sqrt(.75)),
    (partial(wsd, shape="exp"), {16: 1, 18: 2 ** -2.5, 20: 1 / 32},
     14.5 + (1 - 1 / 32) / (1 - 2 ** -1.25)),
])
def test_schedules_by_hand(fn, values, area):
    """20 steps, 4 of warm-up; area: the sum over all steps, what the weights can travel"""
    assert {s: fn(s, 20, 4) for s in values} == pytest.approx(values)
    assert sum(fn(s, 20, 4) for s in range(20)) == pytest.approx(area)


def curve(name, steps, warmup):
    """All factors of a run; power's leave the ceiling when a third of its tokens are seen."""
    n = (0.02 / (128 * 4.0)) ** (1 / -0.51)
    seen = dict(steps=steps, warmup=warmup, lr=0.02, batch=128, tokens=3 * n / steps)
    return [SCHEDULES[name](**{k: (seen | dict(step=s))[k] for k in needs(SCHEDULES[name])})
            for s in range(steps)]


@pytest.mark.parametrize("name", SCHEDULES)
def test_schedules_stay_between_0_and_1(name):
    assert all(0 < x <= 1 for n in (1, 7, 100) for w in (0, 1, 10) for x in curve(name, n, w))


@pytest.mark.parametrize("name", SCHEDULES)
def test_schedules_rise_to_1_then_only_fall_and_never_jump(name):
    x = curve(name, 1000, 50)
    assert x[:50] == pytest.approx([(s + 1) / 50 for s in range(50)])    # the first update is not 0
    assert all(0 <= a - b < 0.011 for a, b in zip(x[49:], x[50:]))          # 0.01: power's cooldown
    assert x[-1] == pytest.approx(dict(constant=1, linear=0, cosine=.05, wsd=0, power=0)[name],
                                  abs=0.006)


def test_wsd_worked_values():
    """MiniCPM's cooldown from S = 90 with a half-life of 5 steps; it ends after five of them"""
    mult = partial(wsd, steps=115, warmup=10, cooldown=25 / 115, shape="exp")
    assert [mult(s) for s in (89, 90, 95, 100, 115)] == pytest.approx([1, 1, .5, .25, 1 / 32])


def test_wsd_runs_of_two_lengths_share_their_stable_part():
    assert [wsd(s, 100, 10) for s in range(80)] == [wsd(s, 1000, 10) for s in range(80)]
    assert wsd(81, 100, 10) < wsd(81, 1000, 10)
    with pytest.raises(UserError, match="--shape expo; did you mean 'exp'"):
        wsd(0, 100, shape="expo")


def eta(n, batch=128, steps=10 ** 6):
    """The power scheduler's learning rate after n tokens, its ceiling 0.02."""
    return 0.02 * power(0, steps, 0, 0.02, batch, n)


def test_power_worked_values():
    got = [eta(n) for n in (1e9, 1e10, 1e11, 1e12)]
    assert got == pytest.approx([1.3160e-2, 4.0670e-3, 1.2568e-3, 3.8839e-4], rel=1e-4)
    assert eta(4.39e8) == 0.02 > eta(4.41e8)                          # leaves the ceiling at 4.40e8


def test_power_doubles_with_the_batch_and_does_not_know_the_end():
    assert eta(1e11, batch=256) == pytest.approx(2 * eta(1e11), rel=1e-12)
    a, b = ([power(s, steps, 10, 0.02, 128, 1e8) for s in range(90)] for steps in (100, 5000))
    assert a == b and a[20] < 1                                    # bit for bit, up to the cooldown
    half = power(95, 5000, 10, 0.02, 128, 1e8) / 2
    assert power(95, 100, 10, 0.02, 128, 1e8) == pytest.approx(half)


@pytest.mark.parametrize("N, D, lr, batch", [
    (1e7, 1e8, 5.222e-3, 21450), (1.24e8, 1e10, 3.567e-3, 297460), (1e9, 1e11, 1.632e-3, 1107715)])
def test_step_law_worked_values(N, D, lr, batch):
    got = step_law(N, D)
    assert got[0] == pytest.approx(lr, abs=5.1e-7) and round(got[1]) == batch
    assert step_law(N, D)[1] == step_law(10 * N, D)[1]                # the batch depends on D alone


# --- rounding to bfloat16 -------------------------------------------------------------------------

@pytest.mark.parametrize("x", [1.001, 1.999, -3.3333, 0.1, 1e-30, -7e30])
def test_stochastic_bf16_is_unbiased(x):
    """1e5 draws: only the two neighbours, the mean within 4 σ"""
    draws = round_bf16(torch.full((1, 100_000), x), [seeded()])[0].double()
    exact = torch.tensor(x).item()                                          # float32
    low, high = draws.min().item(), draws.max().item()
    step = 2.0 ** (math.floor(math.log2(abs(exact))) - 7)                   # bfloat16 keeps 8 bits
    assert low < exact < high and high - low == step and len(draws.unique()) == 2
    sigma = math.sqrt((high - exact) * (exact - low) / len(draws))
    assert abs(draws.mean().item() - exact) < 4 * sigma


def test_what_bf16_can_hold_is_left_alone():
    fine = torch.randn(2, 5000, generator=seeded()).bfloat16().float()
    special = torch.tensor([[0.0, -0.0, math.inf, -math.inf, 2.0 ** -130,
                             torch.finfo(torch.bfloat16).max]])
    nans = torch.tensor([[0x7FFFFFFF, -1, 0x7F800001]], dtype=torch.int32).view(torch.float32)
    special = torch.cat([special, nans], 1)              # these bits would carry, or be cut to inf
    for x, g in ((fine, [seeded(1), seeded(2)]), (special, [seeded(3)])):
        for _ in range(20):
            y, nan = round_bf16(x, g), x.isnan()
            assert torch.equal(y.isnan(), nan)
            bits, exact = y[~nan].view(torch.int32), x[~nan].view(torch.int32)
            assert torch.equal(bits, exact)                                      # -0 keeps its sign


def test_without_generators_bf16_is_the_nearest():
    assert round_bf16(torch.tensor([1.001, 1.005, -3.3333])).tolist() == [1.0, 1.0078125, -3.328125]


def test_each_matrix_is_rounded_from_its_own_generator():
    x = torch.full((2, 1000), 1.002)
    both = round_bf16(x, [seeded(1), seeded(2)])
    assert not torch.equal(both[0], both[1])
    assert torch.equal(both[1:], round_bf16(x[1:], [seeded(2)]))          # whoever shares the stack


# --- codes of groups ------------------------------------------------------------------------------

@pytest.mark.parametrize("bits, group, scale, zero, codes, back", [
    (8, [-1, 2, 3, 4], .019608, 51, [0, 153, 204, 255], [-1, 2, 3, 4]),
    (4, [.525731, .850651, -.2, .1], .070043, 3, [11, 15, 0, 4],
     [.560347, .840521, -.21013, .070043]),
    (8, [1.5, 2.4, 3, 4], 4 / 255, 0, [96, 153, 191, 255], [1.505882, 2.4, 2.996078, 4]),
    (8, [-4, -3, -2.4, -1.5], 4 / 255, 255, [0, 64, 102, 159], [-4, -2.996078, -2.4, -1.505882]),
    (4, [0, 0, 0, 0], 1e-5 / 15, 0, [0, 0, 0, 0], [0, 0, 0, 0]),
])
def test_group_quantiser_worked_values(bits, group, scale, zero, codes, back):
    """the third and fourth group lie on one side of 0: there the public code clamps the zero"""
    c, s, z = quantize_groups(torch.tensor([group]).float(), bits, group=4)
    assert s.item() == pytest.approx(scale, rel=3e-5) and z.item() == zero
    assert c.flatten().tolist() == codes
    assert ((c - z) * s).flatten().tolist() == pytest.approx(back, abs=2e-6)


@pytest.mark.parametrize("group", [[1, 2, 3, 4], [-4, -3, -2, -1], [3, 3, 3, 3], [0, 0, 0, 1e-3],
                                   [-7, 0, 1, 7]])
def test_a_group_on_one_side_of_0_comes_back_to_half_a_step(group):
    """[1, 2, 3, 4] would come back as [1, 2, 3, 3] from the public code"""
    w = torch.tensor([group]).float()
    c, s, z = quantize_groups(w, 8, group=4)
    low, high = min(0, *group), max(0, *group)
    assert s.item() == pytest.approx((high - low) / 255)
    assert ((c - z) * s - w.view_as(c)).abs().max() <= 0.5001 * s.item()


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("shift", [-9.0, -0.3, 0.0, 0.3, 9.0])
def test_nearest_is_within_half_a_step_wherever_0_lies(bits, shift):
    w = shift + torch.randn(3, 512, generator=seeded())
    c, s, z = quantize_groups(w, bits, group=64)
    assert c.min() >= 0 and c.max() <= 2 ** bits - 1 and torch.equal(c, c.round())
    assert ((((c - z) * s).flatten(1) - w).abs().unflatten(1, (-1, 64)) <= 0.5001 * s).all()
    assert (z == z.round()).all()                                             # so 0 itself is exact
    assert (z >= 0).all() and (z <= 2 ** bits - 1).all()


@pytest.mark.parametrize("bits", [8, 4])
def test_stochastic_codes_are_unbiased(bits):
    """the inner two of 1e5 equal groups; the outer two are clipped to the range"""
    n, inner = 100_000, torch.tensor([0.31, 1.77])
    w = torch.tensor([-1.0, *inner, 4.0]).repeat(1, n)
    c, s, z = quantize_groups(w, bits, 4, [seeded()])
    back = ((c - z) * s)[0].double()                                                     # [n, 4]
    assert ((back[:, 1:3].mean(0) - inner).abs() < 4 * s[0, 0] / (2 * math.sqrt(n))).all()
    assert all(len(back[:, i].unique()) == 2 for i in (1, 2))        # the two neighbours, no others


def test_stochastic_codes_leave_alone_what_lies_on_the_grid():
    """⌊x⌋ + [u < x - ⌊x⌋] never moves an integer; ⌊x + u⌋ in float32 would, once in 1e5"""
    unit = quantize_groups(torch.tensor([[0.0, 1.0]]), 8, 2, [seeded()])[1]  # 1 over the steps used
    grid = torch.arange(-127.0, round(1 / unit.item()) - 126)                     # as many, by 1/64
    grid = F.pad(grid, (0, 256 - len(grid))).repeat(1, 1 << 14) / 64
    c, s, z = quantize_groups(grid, 8, 256, [seeded()])
    assert (s == 1 / 64).all() and (z == 127).all()
    assert ((c - z) * s != grid.view_as(c)).sum().item() == 0


# --- 8-bit states ---------------------------------------------------------------------------------

@pytest.mark.parametrize("key", TABLES)
def test_code_table(key):
    """m is signed, v is not; both have 0, 1 and seven decades, each twice as fine as that below"""
    t = TABLES[key].tolist()
    assert len(t) == len(set(t)) == 256 and t == sorted(t) and t[-1] == 1 and 0 in t
    for d in range(7):
        inside = [x for x in t if 10 ** (d - 7) < x < 10 ** (d - 6)]
        assert len(inside) == 2 ** d * (1 if key == "m" else 2)
    mirrored = [-x for x in t[:127][::-1]]
    assert t[0] == 0 if key == "v" else mirrored == t[128:255]                           # all but 1


@pytest.mark.parametrize("key", TABLES)
def test_8_bits_hold_six_decades(key):
    """an entry of decade d errs by half of its step; even codes would lose all below 1e-3"""
    size = 10.0 ** (-6 * torch.rand(4, 250, generator=seeded(), dtype=torch.float64))    # 1e-6 to 1
    size[:, 0] = 1.0
    x = size * (torch.randn(size.shape, generator=seeded(1)).sign() if key == "m" else 1)
    x[:, 0], s = 1.0, {}
    put8(s, key, 0.03 * x)
    back = get8(s, key, x) / 0.03
    decade = size.log10().ceil()                                            # 0 for (0.1, 1]
    step = 0.9 * 10 ** decade * 2 ** -(decade + 6) / (1 if key == "m" else 2)
    assert ((back - x).abs() <= 0.501 * step).all()
    assert torch.equal(back.sign(), x.sign())                      # nothing is lost, no sign turned
    assert torch.equal(back[:, 0].float(), torch.ones(4))                   # the largest is exact


def test_8_bit_states_are_scaled_by_the_largest_of_either_sign():
    s, x = {}, torch.tensor([[-4.0, 0.04, 1.0]])
    put8(s, "m", x)
    assert torch.allclose(get8(s, "m", x), x, rtol=0, atol=4 * 0.0071) and s["m_scale"] == 4


def test_8_bit_states_of_odd_shapes_zeros_and_several_blocks():
    s, like = {}, torch.ones(2, 19, 30)                                  # 570 entries: 2 1/4 blocks
    assert (get8(s, "v", like) == 0).all()                                  # nothing stored yet
    x = torch.rand(2, 19, 30, generator=seeded())
    x.view(2, -1)[:, 256:512] = 0                                           # a whole block of zeros
    x.view(2, -1)[:, 512:] *= 1e-12                                       # a block of its own scale
    put8(s, "v", x)
    back = get8(s, "v", like)
    assert s["v8"].dtype == torch.uint8 and s["v8"].shape == (2, 3, 256)
    assert s["v_scale"].shape == (2, 3, 1)
    assert back.isfinite().all() and (back.view(2, -1)[:, 256:512] == 0).all()
    top = torch.tensor([1.0, 1.0, 1e-12]).repeat_interleave(256)[:570]
    error = (back - x).abs().view(2, -1)
    assert (error <= 0.0036 * top).all()                               # half a step: 0.45/128 of it
    assert torch.equal(back > 0, x > 0)


# --- stored weights -------------------------------------------------------------------------------

KINDS = [("bfloat16", 0, 2.0), ("int8", 256, 1 + 8 / 256), ("int4", 32, 0.5 + 8 / 32)]


def stored(kind, group, rounding="stochastic", out=48, inputs=64, bias=True):
    """(plain layer, StoredLinear made of it)."""
    torch.manual_seed(0)
    plain = nn.Linear(inputs, out, bias)
    return plain, StoredLinear(plain, kind, group, rounding)


@pytest.mark.parametrize("kind, group, size", KINDS)
@pytest.mark.parametrize("shape", [(48, 64), (7, 5), (33, 31)])          # 35 and 1023: no multiples
def test_stored_weights_compute_and_differentiate_as_a_plain_layer(kind, group, size, shape):
    plain, layer = stored(kind, group, out=shape[0], inputs=shape[1])
    W = layer.read()
    part = 2 ** -8 if kind == "bfloat16" else 1 / (2 ** int(kind[3:]) - 2)
    step = plain.weight.abs().amax() * part
    assert W.shape == shape and (W != plain.weight).any()
    assert ((W - plain.weight).abs() <= 1.001 * step).all()
    twin = layer.merged()
    assert type(twin) is nn.Linear
    assert torch.equal(twin.weight, W) and torch.equal(twin.bias, plain.bias)
    x = torch.randn(3, 4, shape[1], generator=seeded())
    y = layer(x)
    assert torch.equal(y, F.linear(x, W, plain.bias))
    g = torch.randn(y.shape, generator=seeded(1))
    y.backward(g)
    twin(x).backward(g)
    assert layer.weight.grad.shape == shape and torch.equal(layer.weight.grad, twin.weight.grad)


@pytest.mark.parametrize("kind, group, size", KINDS)
def test_stored_weights_take_the_promised_bytes(kind, group, size):
    _, layer = stored(kind, group)
    assert sum(b.nbytes for b in layer.buffers()) / (48 * 64) == size
    assert layer.weight.untyped_storage().nbytes() == 4               # one zero stands for all of W


@pytest.mark.parametrize("kind", ["bfloat16", "int8", "int4"])
def test_no_float_copy_of_the_matrices_outlives_a_step(kind):
    m = STORES[kind](net())
    before = {n: layer.read() for n, layer in projections(m).items()}
    train(m, 2)
    assert len(before) == 14 and all(type(x) is StoredLinear for x in projections(m).values())
    for name, layer in projections(m).items():
        assert layer.weight.untyped_storage().nbytes() == 4 and layer.weight.grad is None
        assert not torch.equal(layer.read(), before[name])                # but the stored one moved
    floats = sum(p.untyped_storage().nbytes() for n, p in m.layers.named_parameters()
                 if p.dim() == 2)
    assert floats == 14 * 4


@pytest.mark.parametrize("rounding", ["stochastic", "nearest"])
@pytest.mark.parametrize("kind, group, size", KINDS)
def test_writing_what_is_stored_changes_nothing(kind, group, size, rounding):
    _, layer = stored(kind, group, rounding, out=33, inputs=31)
    before = {k: b.clone() for k, b in layer.named_buffers()}
    layer.write(layer.read(), seeded(7))
    assert not differ(before, dict(layer.named_buffers()))


@pytest.mark.parametrize("kind, size", [("int8", 256), ("int4", 32)])
def test_writing_leaves_groups_without_a_change_alone(kind, size):
    """one weight moves far out: its group gets a new scale, the others keep all that they had"""
    _, layer = stored(kind, size, out=33, inputs=31)
    before = {k: b.clone() for k, b in layer.named_buffers()}
    W = layer.read()
    W.view(-1)[size + 3] = 5.0
    layer.write(W, seeded(7))
    changed = {k: (b != before[k]).any(1).nonzero().flatten().tolist()
               for k, b in layer.named_buffers()}
    assert changed == dict(stored=[1], scale=[1], zero=[1])
    assert layer.read().view(-1)[size + 3].item() == pytest.approx(5.0, rel=0.2)


@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_nearest_loses_small_steps_and_stochastic_takes_them_at_the_right_rate(kind):
    """+0.3 of a grid step for every weight well inside its group's range"""
    top = 2 ** int(kind[3:]) - 1
    for rounding in ("nearest", "stochastic"):
        _, layer = stored(kind, 64, rounding, out=256)
        W = layer.read()
        scale = layer.scale.expand(-1, 64)                                            # [groups, 64]
        codes = (W.view(-1, 64) / scale + layer.zero).round()
        inner = (codes > 0.2 * top) & (codes < 0.8 * top)
        for _ in range(20 if rounding == "nearest" else 1):                 # again and again
            layer.write(layer.read() + (0.3 * scale * inner).view_as(W), seeded(7))
        moved = ((layer.read() - W).view(-1, 64) / scale)[inner]
        n = len(moved)
        assert n > 8000
        if rounding == "nearest":
            assert moved.abs().max() < 1e-3
        else:
            sigma = 0.55 / math.sqrt(n)                                     # half a step at most
            assert abs(moved.mean().item() - 0.3) < 4 * sigma
            assert (moved > 0.5).any() and (moved < 0.1).any()


@pytest.mark.parametrize("kind, group, size", KINDS)
def test_a_tiny_step_moves_few_weights(kind, group, size):
    """1e-4 of their size, all at once: the grid must stay, or every weight is rounded anew"""
    _, layer = stored(kind, group)
    W = layer.read()
    step = 1e-5 * torch.randn(W.shape, generator=seeded(5))             # a grid's is 1e-3 or more
    layer.write(W + step, seeded(7))
    moved = layer.read() - W
    assert (moved.abs() > 2e-4).float().mean() < 0.05
    assert moved.square().mean().sqrt() < 5e-3 * W.square().mean().sqrt()


def test_bfloat16_stores_round_as_asked():
    """+2^-9 at 1.0, a quarter of a bfloat16 step"""
    for rounding, rate in (("nearest", 0.0), ("stochastic", 0.25)):
        layer = StoredLinear(nn.Linear(100, 100, False), "bfloat16", 0, rounding)
        layer.stored.fill_(1.0)
        layer.write(torch.full((100, 100), 1 + 2.0 ** -9), seeded())
        assert sorted(layer.read().unique().tolist()) == ([1.0, 1 + 2.0 ** -7] if rate else [1.0])
        assert abs((layer.read() > 1).float().mean().item() - rate) < 4 * math.sqrt(0.1875 / 1e4)


def test_stores_merge_into_a_plain_checkpoint_that_computes_the_same():
    for make in (store_bfloat16, store_int8, store_int4):
        m = make(net())
        plain = merge(m)
        assert plain.state_dict().keys() == net().state_dict().keys()
        assert torch.equal(plain(tokens()), m(tokens()))
        assert all(type(x) is StoredLinear for x in projections(m).values())  # the original is left
        assert all(p.requires_grad for p in plain.parameters())


@pytest.mark.parametrize("make", [partial(store, kind="int4", group=32), store_bfloat16, store_int8,
                                  store_int4])
def test_a_store_refuses_an_unknown_rounding(make):
    with pytest.raises(UserError, match="--rounding stochastc: choose stochastic or nearest"):
        make(net(), rounding="stochastc")


@pytest.mark.parametrize("make", [store_int8, store_int4])
@pytest.mark.parametrize("group", [0, -1])
def test_a_store_refuses_groups_of_no_weight(make, group):
    with pytest.raises(UserError, match=f"--group {group}"):
        make(net(), group=group)


@pytest.mark.parametrize("make", [store_bfloat16, store_int8, store_int4])
def test_a_store_refuses_packed_layers(make):
    """they are rounded already, and have no weight to train"""
    with pytest.raises(UserError, match="packed layers"):
        make(pack4(net()))


@pytest.mark.parametrize("name", ["lora", "bone", "bat"])
def test_adapters_on_stored_layers_are_an_error_at_the_latest_when_training_starts(name):
    with pytest.raises(UserError, match="trainable|--store"):
        optimiser(ADAPTERS[name](store_int8(net()), seeded()))


# --- adapters: LoRA, Bone, Bat --------------------------------------------------------------------

ADAPTERS = dict(lora=partial(lora, rank=4), bone=partial(bone, rank=6), bat=partial(bat, rank=16))


@pytest.mark.parametrize("base", ["float", "packed"])
@pytest.mark.parametrize("name", ADAPTERS)
def test_adapters_start_as_the_layer_and_merge_into_it(name, base):
    m, x = pack4(net()) if base == "packed" else net(), tokens()
    before = m(x).detach()
    ADAPTERS[name](m, seeded())
    assert torch.equal(m(x), before) or base == "packed" and torch.allclose(m(x), before, atol=1e-6)
    frozen = {k: p for k, p in weights(m).items() if k not in adapter_state(m)}
    shake(m)
    after, plain = m(x).detach(), merge(m)
    assert not torch.allclose(after, before, atol=1e-2)
    assert torch.allclose(plain(x), after, atol=2e-5)
    assert plain.state_dict().keys() == net().state_dict().keys()           # a plain checkpoint
    assert all(p.requires_grad for p in plain.parameters())
    assert torch.equal(m(x), after)                                # merging left the original alone
    train(m)
    assert all(torch.equal(p, weights(m)[k]) for k, p in frozen.items()) and not torch.equal(m(x),
                                                                                             after)


@pytest.mark.parametrize("name, ends, size", [
    ("lora", (".A", ".B"), lambda F, D: 4 * (F + D)),
    ("bone", (".M",), lambda F, D: 6 * F),
    ("bat", (".M",), lambda F, D: 16 * F),
])
def test_adapter_state_names_what_trains(name, ends, size):
    m = net()
    shapes = {k: layer.weight.shape for k, layer in projections(m).items()}
    state = adapter_state(ADAPTERS[name](m, seeded()))
    assert state.keys() == {k + e for k in shapes for e in ends} and len(shapes) == 14
    assert state.keys() == {k for k, p in m.named_parameters() if p.requires_grad}
    for k, (rows, cols) in shapes.items():
        assert sum(state[k + e].numel() for e in ends) == size(rows, cols)


@pytest.mark.parametrize("kind, make", [
    *(("float32", f) for f in (full, hft, *ADAPTERS.values(), partial(sft.loram, rank=4))),
    *((kind, f) for kind in ("bfloat16", "int8", "int4") for f in (full, hft))])
def test_the_start_and_adapter_state_are_all_that_a_resume_needs(kind, make):
    """adapter_state is empty: the checkpoint holds all; if not, sft.py starts from the run's origin
    again"""
    m = train(make(STORES[kind](net()), seeded()))
    state = {k: v.clone() for k, v in adapter_state(m).items()}
    assert bool(state) == (kind != "float32" or make not in (full, hft))
    if state:
        again = make(STORES[kind](net()), seeded())
        assert not again.load_state_dict(state, strict=False).unexpected_keys
        assert differ(weights(merge(again)), weights(merge(m))) == set()


@pytest.mark.parametrize("name", ADAPTERS)
def test_adapters_reach_every_expert_and_leave_the_router(name):
    m = ADAPTERS[name](net("mixtral"), seeded())
    ours = {k.rsplit(".", 1)[0] for k in adapter_state(m)}
    assert ours == projections(m).keys() and len(ours) == 2 * (4 + 3 * 8)
    assert not any(layer.mlp.gate.weight.requires_grad for layer in m.layers)


def test_lora_by_hand():
    """W = 2, A = 3, B = 5, rank 1, alpha 4: y = 2x + 4·5·3·x = 62x"""
    layer = LoRA(nn.Linear(1, 1, bias=False), 1, 4.0)
    for p, v in ((layer.linear.weight, 2.0), (layer.A, 3.0), (layer.B, 5.0)):
        p.data.fill_(v)
    assert layer(torch.ones(1, 1)).item() == 62 and layer.merged()(torch.ones(1, 1)).item() == 62
    assert not layer.linear.weight.requires_grad


def test_lora_scales_by_alpha_over_rank():
    """alpha 0: twice the rank"""
    for alpha, want in ((0.0, 2.0), (16.0, 2.0), (4.0, 0.5)):
        m = lora(net(), seeded(), rank=8, alpha=alpha)
        assert all(layer.scale == want for layer in projections(m).values())


def test_lora_starts_kaiming_uniform_from_its_generator():
    a, b, c = (adapter_state(lora(net(), seeded(s), rank=8)) for s in (0, 0, 1))
    assert not differ(a, b)
    for k in a:
        if k.endswith(".B"):
            assert (a[k] == 0).all()
        else:
            bound = a[k].size(1) ** -0.5                             # gain √(1/3): uniform in ±1/√D
            assert 0.97 * bound < a[k].abs().max() <= bound and not torch.equal(a[k], c[k])
            assert a[k].std().item() == pytest.approx(bound / math.sqrt(3), rel=0.1)


def test_lora_a_has_no_gradient_at_the_first_step():
    m = lora(net(), seeded(), rank=4)
    m(tokens()).square().sum().backward()
    for layer in projections(m).values():
        assert (layer.A.grad == 0).all() and layer.B.grad.abs().max() > 0   # B = 0 stands before A


@pytest.mark.parametrize("make, rank", [
    (lambda layer: LoRA(layer, 3, 6.0, seeded()), 3), (lambda layer: Bone(layer, 3), 3),
    (lambda layer: Bat(layer, 4), 16)])
def test_rank_of_the_change(make, rank):
    """LoRA and Bone stay at r; Bat, whose blocks differ, reaches all of 16"""
    torch.manual_seed(0)
    plain = nn.Linear(20, 16).double()
    W = plain.weight.detach().clone()
    layer = shake(make(plain).double(), 0.5)
    assert torch.linalg.matrix_rank(layer.merged().weight - W, rtol=1e-9) == rank


W0 = torch.tensor([[1., 2, 3, 4], [5, 6, 7, 8]])
M2 = torch.tensor([[.1, .2], [.3, .4]])


def worked(kind, M):
    """The spec's layer: W0, r = 2, M."""
    plain = nn.Linear(4, 2, bias=False)
    plain.weight.data.copy_(W0)
    layer = kind(plain, 2)
    layer.M.data.copy_(M)
    return layer


def test_bone_worked_values():
    layer = worked(Bone, M2)
    assert layer(torch.tensor([1., 2, 3, 4])).tolist() == pytest.approx([32.2, 73.2])
    want = torch.tensor([[1.1, 2.3, 3.1, 4.3], [5.2, 6.4, 7.2, 8.4]])
    assert torch.allclose(layer.merged().weight, want)


def test_bat_worked_values():
    layer = worked(Bat, M2[None])
    want = torch.tensor([[.8, 1.2, 1.6, 2.4], [2.6, 3.8, 3.4, 5.0]])
    assert torch.allclose(layer.merged().weight - W0, want, atol=1e-6)
    x = torch.tensor([1., 2, 3, 4])
    assert torch.allclose(layer(x), (W0 + want) @ x, atol=1e-5)


def test_bat_can_be_undone():
    """W_ij = (W'_ij - M_i) (I + M_i)^-1: Bat is an invertible map of every block"""
    torch.manual_seed(0)
    plain = nn.Linear(12, 8, bias=False).double()
    layer = shake(Bat(plain, 4).double())
    W = layer.merged().weight.detach()
    for i in range(2):
        for j in range(3):
            at = slice(4 * i, 4 * i + 4), slice(4 * j, 4 * j + 4)
            back = (W[at] - layer.M[i]) @ torch.linalg.inv(torch.eye(4).double() + layer.M[i])
            assert torch.allclose(back, plain.weight[at], atol=1e-12)


@pytest.mark.parametrize("rank", [1, 3, 7, 10])
def test_bone_merges_at_widths_that_the_rank_does_not_divide(rank):
    torch.manual_seed(0)
    layer = shake(Bone(nn.Linear(7, 5), rank), 0.5)
    x = torch.randn(2, 3, 7)
    assert torch.allclose(layer.merged()(x), layer(x), atol=1e-5)
    delta = layer.merged().weight - layer.linear.weight
    assert torch.allclose(delta[:, -1], layer.M[6 % rank], atol=1e-6)    # the last group is cut off


def test_bone_changes_all_blocks_alike_and_bat_each_in_its_own_way():
    torch.manual_seed(0)
    for kind in (Bone, Bat):
        plain = nn.Linear(12, 8, bias=False)
        W = plain.weight.detach().clone()
        layer = shake(kind(plain, 4), 0.5)
        first, *others = (layer.merged().weight - W).detach().split(4, 1)
        assert all(torch.allclose(first, x, atol=1e-6) == (kind is Bone) for x in others)


def test_bat_refuses_a_rank_that_does_not_divide():
    with pytest.raises(UserError, match="--rank 5 must divide both sides of a 64x64 layer: try 64"):
        bat(net(), seeded(), rank=5)
    with pytest.raises(UserError, match="--rank 48 must divide both sides of a 10x96 layer: try 2"):
        Bat(nn.Linear(96, 10), 48)




# --- half fine-tuning -----------------------------------------------------------------------------

ATTENTION, MLP = ("q_proj", "k_proj", "v_proj", "o_proj"), ("gate_proj", "up_proj", "down_proj")
NORMS = ("input_layernorm", "post_attention_layernorm")


def trains(layer):
    """{kind: whether it trains} of one block; the experts' matrices, and biases, must agree."""
    out = {}
    for name, p in layer.named_parameters():
        kind = {"q_norm": "q_proj", "k_norm": "k_proj"}.get(name.split(".")[-2],
                                                            name.split(".")[-2])
        assert out.setdefault(kind, p.requires_grad) == p.requires_grad, name
    return out


@pytest.mark.parametrize("family", ["qwen2", "qwen3", "mixtral"])
@pytest.mark.parametrize("layers", [2, 3])
def test_hft_trains_half_of_every_layer(family, layers):
    """2 of q, k, v, o; 2 of gate, up, down in half of the layers, else 1; a norm; all outside the
    blocks"""
    m = net(family, f"{layers}x64")
    for seed in range(4):
        m.requires_grad_(True)
        hft(m, seeded(seed))
        on = [trains(layer) for layer in m.layers]
        assert all(sum(x[k] for k in ATTENTION) == 2 and sum(x[k] for k in NORMS) == 1 for x in on)
        ways = sorted(sum(x[k] for k in MLP) for x in on)
        assert ways == [1] * (layers - layers // 2) + [2] * (layers // 2)
        assert sum(x[k] for x in on for k in (*ATTENTION, *MLP)) == 7 * layers // 2   # of 7 a layer
        outside = [p for n, p in m.named_parameters() if not n.startswith("layers.")]
        assert len(outside) == 2 and all(p.requires_grad
                                         for p in outside)              # tied embedding, final norm
        assert all(x.get("gate", True) for x in on)                         # the router


def test_hft_trains_an_untied_head():
    config = preset("2x64", bytes_tokenizer(), 32, "llama")
    m = hft(init(type(config)(**vars(config) | dict(tie_word_embeddings=False)), 0), seeded())
    assert m.lm_head.weight.requires_grad and m.embed_tokens.weight.requires_grad


def test_hft_draws_anew_with_every_seed_and_reaches_every_kind():
    drawn = [[trains(layer) for layer in hft(net(), seeded(s)).layers]
             for s in (0, 0, *range(1, 12))]
    assert drawn[0] == drawn[1] and all(drawn[0] != x for x in drawn[2:])
    for i in range(2):
        for kind in (*ATTENTION, *MLP, *NORMS):
            assert {x[i][kind] for x in drawn} == {True, False}
        assert {sum(x[i][k] for k in MLP) for x in drawn} == {1, 2}    # which layers train 2: drawn


def test_hft_leaves_frozen_tensors_bit_identical_under_decay():
    m = hft(net(), seeded())
    before, on = weights(m), {k: p.requires_grad for k, p in m.named_parameters()}
    train(m)
    assert differ(weights(m), before) == {k for k in on if on[k]}
    assert adapter_state(m) == {} and merge(m).state_dict().keys() == net().state_dict().keys()


# --- LoRAM ----------------------------------------------------------------------------------------

BIG = "2x128"                # 4 query heads in 2 groups, 352 neurons


def test_loram_with_ratio_0_is_lora_bit_for_bit():
    small = train(sft.loram(net(size=BIG), seeded(), rank=4, ratio=0.0))
    plain = train(lora(net(size=BIG), seeded(), rank=4))
    want = weights(merge(plain))
    assert differ(weights(merge(sft.recover(small, net(size=BIG)))), want) == set()
    assert len(differ(want, weights(net(size=BIG)))) == 14


def test_loram_keeps_the_heaviest_neurons_and_whole_groups_of_heads():
    """layer 0: key head 1 is made the heavier one, so its queries 64 … 127 stay, and neurons 7, 8,
    300 …"""
    m = net(size=BIG)
    att, mlp = m.layers[0].self_attn, m.layers[0].mlp
    neurons = sorted({7, 8, 300} | set(range(20, 193)))                     # 176 of 352
    with torch.no_grad():
        att.v_proj.weight[32:] *= 3
        mlp.up_proj.weight[neurons] *= 9
    kept = {k.removeprefix("layers.0."): v for k, v in sft.kept_units(m, 0.5).items()
            if k[:8] == "layers.0"}
    keys, queries = list(range(32, 64)), list(range(64, 128))
    want = {"self_attn.q_proj": (queries, None), "self_attn.k_proj": (keys, None),
            "self_attn.v_proj": (keys, None), "self_attn.o_proj": (None, queries),
            "mlp.gate_proj": (neurons, None), "mlp.up_proj": (neurons, None),
            "mlp.down_proj": (None, neurons)}
    assert {k: tuple(x if x is None else x.tolist() for x in v) for k, v in kept.items()} == want


@pytest.mark.parametrize("family", ["qwen2", "qwen3"])
def test_loram_s_small_model_is_the_whole_one_without_the_cut_units(family):
    """a unit is cut when nothing reads it any more: o and down with its columns 0, in the whole
    model"""
    small, whole = sft.loram(net(family, BIG), seeded(), rank=4), net(family, BIG)
    for name, (rows, cols) in small.kept.items():
        if cols is not None:
            W = projections(whole)[name].weight.data
            W.copy_(torch.zeros_like(W).index_copy(1, cols, W[:, cols]))
    assert torch.allclose(small(tokens()), whole(tokens()), atol=1e-5)
    assert not torch.allclose(small(tokens()), net(family, BIG)(tokens()), atol=1e-3)
    size = [sum(p.numel() for n, p in m.layers.named_parameters()
                if not n.endswith((".A", ".B", "norm.weight"))) for m in (small, whole)]
    assert size[0] == size[1] / 2


def test_loram_recovers_the_change_where_rows_and_columns_were_kept():
    """ΔW on the kept rows and columns is the trained scale · B A, elsewhere exactly 0"""
    m = shake(sft.loram(net(size=BIG), seeded(), rank=4, alpha=2.0))
    plain, big = net(size=BIG), sft.recover(m, net(size=BIG))
    merged = projections(merge(big))
    for name, layer in projections(m).items():
        rows, cols = (torch.arange(n) if x is None else x for x, n in zip(
            m.kept[name], projections(plain)[name].weight.shape))
        found = projections(big)[name]
        delta = (found.scale * found.B @ found.A).detach()
        want = torch.zeros_like(delta)
        want[rows[:, None], cols] = (layer.scale * layer.B @ layer.A).detach()
        outside = torch.ones_like(delta, dtype=torch.bool)
        outside[rows[:, None], cols] = False
        assert layer.scale == 0.5 and outside.any() and (delta[outside] == 0).all()
        assert torch.allclose(delta, want, atol=1e-6) and want.abs().max() > 0.01
        W = projections(plain)[name].weight
        assert torch.equal(merged[name].weight[outside],
                           W[outside])                             # the original, not the pruned, W
        assert torch.allclose(merged[name].weight, W + want, atol=1e-6)
    assert torch.allclose(merge(big)(tokens()), big(tokens()), atol=1e-4)


@pytest.mark.parametrize("first, last, cut",
                         [(0, 0, {0, 1, 2}), (1, 0, {1, 2}), (0, 1, {0, 1}), (1, 1, {1}),
                                              (4, 2, set()), (0, 3, set()), (0, 4, set())])
def test_loram_leaves_the_first_and_last_layers_whole(first, last, cut):
    kept = sft.kept_units(net(size="3x64"), 0.5, first, last)
    assert {int(k.split(".")[1]) for k in kept} == cut


def test_loram_with_whole_layers_recovers_them_too():
    m = shake(sft.loram(net(size=BIG), seeded(), rank=4, first=1))
    big = sft.recover(m, net(size=BIG))
    assert m.kept.keys() == {k for k in projections(m) if k.startswith("layers.1")}
    for name, layer in projections(m).items():
        if name not in m.kept:
            found = projections(big)[name]
            assert torch.equal(found.A, layer.A) and torch.equal(found.B, layer.B)


def test_loram_keeps_a_head_and_a_neuron_at_any_ratio():
    m = sft.loram(net(size=BIG), seeded(), rank=4, ratio=0.999)
    layer = m.layers[0]
    assert layer.mlp.up_proj.B.shape == (1, 4) and layer.self_attn.k_proj.B.shape == (32, 4)
    assert layer.self_attn.q_proj.B.shape == (64, 4) and m(tokens()).isfinite().all()


@pytest.mark.parametrize("ratio", [-0.1, 1.0, 1.5, math.nan])
def test_loram_refuses_a_ratio_outside_0_to_1(ratio):
    with pytest.raises(UserError, match=f"--ratio {ratio}: expected a share from 0 up to 1"):
        sft.loram(net(), seeded(), ratio=ratio)


def test_loram_refuses_experts_and_packed_layers():
    for m in (net("mixtral"), pack4(net())):
        with pytest.raises(UserError, match="this checkpoint has experts or packed ones"):
            sft.loram(m, seeded())
