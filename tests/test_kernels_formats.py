"""Rotations, roundings and MXFP4: values by hand, PyTorch's own float8, and what a format keeps."""
import math

import pytest
import torch
from conftest import close, rand

from data.run import UserError
from kernels import (E2M1, EXPONENTS, PackedLinear, bitmap_state, columns_state, e2m1, floor_log2,
                     fp6, fp8, hadamard, int8, minifloat, mixed_state, mx4, mx4_dense, mxfp4,
                     mxfp4_state, nm24_state, pack_int, pack_ragged, packed, power_of_two, quantize,
                     quantize_activations, rotate, second_order, unpack_ragged)

# --- rotations and roundings ----------------------------------------------------------------------


def test_hadamard_matrices_are_orthonormal_and_symmetric():
    for n in (1, 2, 32, 128):
        H = hadamard(n, torch.float64)
        assert close(H @ H.T, torch.eye(n), 1e-12) and close(H, H.T, 0)
        assert close(H.abs(), n ** -0.5 * torch.ones(n, n).double(), 1e-12)
    with pytest.raises(UserError, match="power of two"):
        hadamard(24)


@pytest.mark.parametrize("d, n, block", [(96, 32, 32), (96, 128, 32), (64, 48, 32), (12, 32, 4),
                                         (7, 8, 1)])
def test_rotations_use_the_largest_block_that_fits_and_undo_themselves(d, n, block):
    x, W = rand(3, d), rand(5, d, seed=1)
    H = torch.block_diag(*[hadamard(block, torch.float64)] * (d // block))
    assert close(rotate(x, n), x @ H, 1e-12) and close(rotate(rotate(x, n), n), x, 1e-12)
    assert close(rotate(x, n) @ rotate(W, n).T, x @ W.T, 1e-12)


def test_exponents_are_read_exactly():
    x = torch.tensor([1.0, 0.9999999, 2.0, 1.9999999, 6.0, 2 ** -100, 3e38])
    for dtype in (torch.float32, torch.float64):
        assert floor_log2(x.to(dtype)).tolist() == [0, -1, 1, 0, 2, -100, 127]
        assert power_of_two(torch.tensor([-3, 0, 100]), dtype).tolist() == [.125, 1.0, 2.0 ** 100]
    assert floor_log2(torch.zeros(1)).item() == -127
    assert power_of_two(torch.tensor([-999])).item() > 0


def test_fp8_is_pytorch_s():
    x = torch.cat([448 * torch.linspace(-1, 1, 20001), torch.logspace(-12, 2.6, 4000)])
    assert torch.equal(minifloat(x, 3, -6, 448), x.to(torch.float8_e4m3fn).float())
    x = x * 448 / x.abs().max()                          # s = 1
    assert torch.equal(fp8(x), x.to(torch.float8_e4m3fn).float())


def test_fp6_has_its_63_values():
    grid = sorted({0.0} | {s * m * 2.0 ** -4 for s in (1, -1) for m in range(1, 4)}     # subnormals
                  | {s * (1 + m / 4) * 2.0 ** e for s in (1, -1) for e in range(-2, 5)
                     for m in range(4)})
    x = torch.linspace(-28, 28, 40001, dtype=torch.float64)
    y, grid = fp6(x), torch.tensor(grid, dtype=torch.float64)
    assert grid[-1] == 28 and len(grid) == 63 and sorted(set(y.tolist())) == grid.tolist()
    assert close((y - x).abs(), (x[:, None] - grid).abs().amin(1))                       # nearest


def test_int8_by_hand():
    assert close(int8(torch.tensor([127., -3.4, 2.6])), [127., -3, 3])
    assert close(int8(torch.tensor([-127., 3.4])), [-127., 3]) and close(int8(torch.zeros(1)), [0.])
    assert close(int8(torch.tensor([2.54, -.034, .052])), [2.54, -.04, .06])       # s = .02
    assert int8(torch.tensor([math.nan, 1.])).isnan().any()


@pytest.mark.parametrize("rounding", [int8, fp8, fp6])
def test_a_scale_a_tensor_makes_roundings_blind_to_size(rounding):
    x = rand(50)
    assert close(rounding(1024 * x), 1024 * rounding(x), 1e-9) and not close(rounding(x), x, 1e-3)


def test_activations_are_rounded_a_token_and_block():
    x = torch.tensor([[-.9, -.2, .35, .6], [7., 2, -3, 100]])
    assert close(quantize_activations(x, 2), [[-.9, 0, 0, .9], [0, 0, 0, 100]])
    assert close(quantize_activations(x, 4, 2),
                 [[-.9, -.9 * 2 / 7, .6 * 4 / 7, .6], [7, 2, 0, 100]])
    both = quantize_activations(x, torch.tensor([8, 4]), 2)                        # a width a block
    assert torch.equal(both[:, :2], quantize_activations(x[:, :2], 8))
    assert torch.equal(both[:, 2:], quantize_activations(x[:, 2:], 4))
    with pytest.raises(UserError, match="do not divide 4"):
        quantize_activations(x, 4, 3)


# --- MXFP4 ----------------------------------------------------------------------------------------


def test_e2m1_thresholds_and_ties():
    thresholds = [.25, .75, 1.25, 1.75, 2.5, 3.5, 5.]
    for i, t in enumerate(thresholds):
        for sign in (1, -1):
            got = e2m1(sign * torch.tensor([t - 1e-6, t, t + 1e-6]))
            assert got[0] == sign * E2M1[i] and got[2] == sign * E2M1[i + 1]
            assert got[1] == sign * E2M1[i + i % 2]                          # ties to the even code
    x = torch.linspace(-7, 7, 5001)
    assert torch.equal(e2m1(x), minifloat(x, 1, 0, 6.0)) and e2m1(torch.tensor([99.])) == 6


def test_mx4_codes_and_exponents_by_hand():
    x = torch.zeros(2, 32)
    x[0, :8] = 4 * torch.tensor([.5, -.5, 1, 1.5, 2, -3, 4, 6])
    x[1, 0] = -7.9                                       # above 6 of its scale: clips
    codes, exponent = mx4(x)
    assert codes.dtype == torch.uint8 and exponent.dtype == torch.int8
    assert exponent.tolist() == [[2], [0]] and codes[1, :2].tolist() == [15, 0]
    assert codes[0, :9].tolist() == [1, 9, 2, 3, 4, 13, 6, 7, 0]
    back = mx4_dense(codes, exponent)
    assert torch.equal(back[0], x[0]) and back[1, 0] == -6
    assert mx4(x, "covering")[1].tolist() == [[2], [1]] and not mx4_dense(*mx4(0 * x)).any()
    with pytest.raises(UserError, match="no multiple"):
        mx4(torch.zeros(4, 40))


@pytest.mark.parametrize("rule", EXPONENTS)
def test_rounding_to_mxfp4_is_packing_and_unpacking(rule):
    x = 3 * rand(5, 96)
    assert torch.equal(mx4_dense(*mx4(x, rule), torch.float64), mxfp4(x, rule))
    value = (mxfp4(x, rule).view(5, 3, 32)
             / power_of_two(mx4(x, rule)[1].int(), torch.float64)[..., None])
    assert set(value.abs().flatten().tolist()) <= set(E2M1)
    assert close(mxfp4(x[:, :40], "covering")[:, :32], mxfp4(x[:, :32], "covering"))  # zeros added
    assert mxfp4(torch.full((1, 32), math.nan)).isnan().all()


def test_the_error_of_quest_on_gaussians():
    """averaged over the scale: rounding the exponent .0134 as plain absmax, the released floor
    .022"""
    x = torch.randn(20000, 32, generator=torch.Generator().manual_seed(0))
    errors = []
    for rule in ("absmax", "quest", "quest_floor"):
        scaled = [2 ** (i / 8) * x for i in range(8)]
        each = [(mxfp4(y, rule) - y).pow(2).mean() / y.pow(2).mean() for y in scaled]
        errors.append(sum(each).item() / 8)
    assert close(errors, [.0134, .0134, .0223], 1.5e-4)


# --- packed formats without a kernel --------------------------------------------------------------


def bits_of(row):
    """A row of bytes as one whole number, its first bit the lowest."""
    return int.from_bytes(bytes(row.tolist()), "little")


def read_codes(row, widths):
    """Codes of such widths, one after the other in a row of bytes."""
    number, out = bits_of(row), []
    for width in widths:
        out.append(number % 2 ** width)
        number >>= width
    return out


def test_ragged_codes_follow_each_other():
    widths = torch.tensor([3, 0, 1, 8, 2, 5])
    codes = torch.tensor([[5, 0, 1, 200, 2, 17], [0, 0, 0, 129, 3, 30]])
    stream = pack_ragged(codes, widths)
    assert stream.shape == (2, 3) and stream.dtype == torch.uint8
    assert [read_codes(row, widths.tolist()) for row in stream] == codes.tolist()
    assert torch.equal(unpack_ragged(stream, widths), codes.int())


def test_columns_of_unlike_widths_by_hand():
    """(code - round(-lo/scale)) scale,  scale = (hi - lo)/(2ᵇ - 1);  no bits: 0"""
    codes, width = torch.tensor([[3, 0, 1, 9], [0, 0, 0, 15]]), torch.tensor([2, 0, 1, 4])
    options, state = columns_state(codes, width, torch.tensor([-3., 0]), torch.tensor([1., 3]))
    layer = packed((2, 4), None, options, state)
    assert options == dict(kind="columns", total=7) and layer.nbytes() == 2 + 4 + 8
    want = [[4 / 3, 0, 0, -8 / 15], [0, 0, 0, 3]]             # zeros 2.25 -> 2; 0.75 -> 1; 11.25
    assert close(layer.dequantize(), want, 1e-6)


def test_mixed_groups_are_read_as_their_buffers_say_and_near_the_weight():
    W, wide = rand(3, 20 * 4).float(), torch.arange(20) % 3 == 0
    W[1, :4] = 0
    W[2, 8:12] = W[2, 8:12].abs() + 0.3                           # a group on one side of 0
    options, state = mixed_state(W, wide, 4)
    layer = packed(W.shape, None, options, state)
    width = [4 if w else 2 for w in wide.tolist()]
    assert options == dict(kind="mixed", group=4, wide=7) and layer.width.tolist() == width
    back = layer.dequantize()
    for row in range(3):
        codes = read_codes(layer.codes[row], [w for w in width for _ in range(4)])
        zeros, scales = (read_codes(x[row], w) for x, w in ((layer.zero, width),
                                                            (layer.scale, [4] * 20)))
        for j, code in enumerate(codes):
            low, step = layer.second[row, j // 4 // 16].tolist()
            scale = low + scales[j // 4] * step
            assert back[row, j].item() == pytest.approx((code - zeros[j // 4]) * scale, abs=1e-6)
    step = torch.tensor([2 ** w - 1 for w in width]).repeat_interleave(4)
    span = W.unflatten(1, (-1, 4))
    span = (span.amax(-1).clamp(min=0) - span.amin(-1).clamp(max=0)).repeat_interleave(4, 1)
    off = (back - W).abs() / (span / step).clamp(min=0.05)
    assert off.median() < 0.5 and (off < 2).float().mean() > 0.9 and not back[1, :4].any()


def test_scales_of_scales_by_hand():
    """17 scales: 16 share a minimum 1 and a step 3/15; the last, alone, has itself"""
    scale = torch.tensor([[1 + 0.2 * i for i in range(16)] + [7.0]])
    codes, second = second_order(scale)
    assert codes.tolist() == [[*range(16), 0]]
    assert close(second[0].float(), [[1, 0.2], [7, 2 ** -24]], 1e-4)


def test_mxfp4_layers_and_bitmaps_and_corrections_stand_for_their_weights():
    W = rand(6, 40).float() * torch.logspace(-3, 3, 6)[:, None]
    assert torch.equal(packed(W.shape, None, *mxfp4_state(W)).dequantize(), mxfp4(W))
    W = torch.where(rand(6, 40, seed=1) > 0.3, W, 0.0).float().bfloat16().float()
    layer = packed(W.shape, None, *bitmap_state(W))
    assert torch.equal(layer.dequantize(), W)
    assert layer.nbytes() == 6 * 5 + 2 * (W != 0).sum()
    core = torch.tensor([[0., 5, 0, 7, 1, 0, 9, 0]]).repeat(3, 1)
    left, right = rand(3, 2).bfloat16(), rand(2, 8, seed=1).bfloat16()
    layer = packed(core.shape, None, dict(kind="nm24_lowrank", rank=2),
                   nm24_state(core) | dict(left=left, right=right))
    assert close(layer.dequantize(), core + left.float() @ right.float(), 1e-6)


def test_inputs_are_ordered_then_rotated_then_rounded():
    """the product of the options, each worked apart; act: 3 bits a block of 16, the second of 8"""
    W, x = rand(8, 32).float(), rand(5, 32, seed=1).float()
    order = torch.randperm(32, generator=torch.Generator().manual_seed(2))
    codes, scale, zero = quantize(W, 8, 32)
    state = {k: v for k, v in pack_int(codes, scale, zero, bits=8, group=32).state_dict().items()}
    spec = dict(kind="int", bits=8, group=32, symmetric=False, order=True, rotate=8)
    H = torch.block_diag(*[hadamard(8)] * 4)
    stored = (codes - zero) * scale.float()
    layer = packed(W.shape, None, spec, state | dict(order=order.to(torch.int16)))
    turned = x[:, order] @ H
    assert close(layer.stored(), stored, 1e-6) and close(layer(x), turned @ stored.T, 1e-5)
    assert close(x @ layer.dequantize().T, layer(x), 1e-5)
    layer = packed(W.shape, None, spec | dict(act=[3, 16, 0b10]),
                   state | dict(order=order.to(torch.int16)))
    parts = [torch.cat([(y / y.abs().max() * top).round() * y.abs().max() / top
                        for y, top in ((row[:16], 3), (row[16:], 127))]) for row in turned]
    assert close(layer.before(x), torch.stack(parts), 1e-5)
    x.requires_grad_()
    layer(x).backward(up := rand(5, 8, seed=3).float())
    assert close(x.grad, up @ layer.dequantize(), 1e-5)          # the rounding has no gradient
    assert isinstance(layer, PackedLinear) and layer.spec()["act"] == [3, 16, 2]


@pytest.mark.parametrize("options", [
    dict(rotate=12), dict(rotate=64), dict(act=[1, 0, 0]), dict(act=[4, 5, 0]), dict(act=[4, 0])])
def test_what_cannot_be_done_to_inputs_is_named(options):
    with pytest.raises(ValueError, match="of two that divides 32 inputs, and act .* three numbers"):
        PackedLinear(32, 8, kind="nm24", **options)
    PackedLinear(32, 8, kind="nm24", rotate=16, act=[2, 8, 3])
