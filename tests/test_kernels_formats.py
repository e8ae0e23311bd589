"""Rotations, roundings and MXFP4: values by hand, PyTorch's own float8, and what a format keeps."""
import math

import pytest
import torch
from conftest import close, rand

from data.run import UserError
from kernels import (E2M1, EXPONENTS, e2m1, floor_log2, fp6, fp8, hadamard, int8, minifloat, mx4,
                     mx4_dense, mxfp4, power_of_two, quantize_activations, rotate)

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
    assert close(int8(torch.zeros(3)), [0., 0, 0])
    assert int8(torch.tensor([math.nan, 1.])).isnan().any()


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
