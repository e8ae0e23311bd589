"""RMSNorm, rotary embedding, SwiGLU, Newton-Schulz: kernels against their twins, and hand-worked
values."""
import pytest
import torch
from torch.nn.functional import rms_norm as torch_rms_norm

import kernels
from kernels import newton_schulz, newton_schulz_ref, rms_norm, rms_norm_ref, rope, rope_ref
from kernels import swiglu, swiglu_ref, xxt, xxt_ref

PATHS = ["cpu", pytest.param("triton",
                             marks=pytest.mark.skipif(kernels.triton is None, reason="no Triton"))]
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 1.6e-2}
DTYPES = pytest.mark.parametrize("dtype", TOLERANCE, ids=str)


@pytest.fixture(params=PATHS)
def path(request):
    """Both fast paths, the CPU's and Triton's (interpreted where there is no GPU)."""
    kernels.use("triton" if request.param == "triton" else "auto")
    torch.set_default_device("cuda" if request.param == "triton" and torch.cuda.is_available()
                             else "cpu")
    yield request.param
    torch.set_default_device("cpu")
    kernels.use("auto")


@pytest.fixture
def exact(path):
    """Both paths, where Newton-Schulz computes in the dtype of its input: not on a GPU."""
    if torch.get_default_device().type == "cuda":
        pytest.skip("bfloat16 on a GPU")


def randn(*shape, seed=0, dtype=torch.float32):
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(seed), device="cpu")
    return x.to(torch.get_default_device(), dtype)


def close(a, b, tolerance):
    """Same shape, dtype and, relative to the larger of the entry and the tensor's mean size,
    value."""
    assert a.shape == b.shape and a.dtype == b.dtype
    a, b = a.double(), b.double()
    size = b.abs() + (b.abs().mean() if b.numel() else 0) + 1e-30
    assert torch.isfinite(a).all() and ((a - b).abs() <= tolerance * size).all(), ((a - b).abs()
                                                                                   / size).max()


def agree(f, ref, inputs, tolerance, upstream=lambda y: randn(*y.shape, seed=9, dtype=y.dtype)):
    """Value and gradients of f equal those of its twin, under a random upstream gradient."""
    outcomes = []
    for g in (f, ref):
        leaves = [x.detach().requires_grad_() for x in inputs]
        y = g(*leaves)
        outcomes.append([y.detach(), *torch.autograd.grad(y, leaves, upstream(y))])
    for mine, twin in zip(*outcomes):
        close(mine, twin, tolerance)


# --- RMSNorm --------------------------------------------------------------------------------------


@DTYPES
@pytest.mark.parametrize("shape", [(5, 7), (1, 33), (3, 11, 32), (2, 1025)])
def test_rms_norm_agrees(path, dtype, shape):
    x, w = randn(*shape, dtype=dtype), 1 + 0.3 * randn(shape[-1], seed=1, dtype=dtype)
    agree(lambda x, w: rms_norm(x, w,
                                1e-6), lambda x, w: rms_norm_ref(x, w, 1e-6), (x,
                                                                               w), TOLERANCE[dtype])


def test_rms_norm_sums_dweight_over_programs_that_loop(path, monkeypatch):
    monkeypatch.setattr(kernels, "PROGRAMS", 2)
    x, w = randn(700, 32), randn(32, seed=1)             # 6 blocks of 128 rows for 2 programs
    agree(lambda x, w: rms_norm(x, w, 1e-6), lambda x, w: rms_norm_ref(x, w, 1e-6), (x, w), 2e-5)


def test_rms_norm_of_float32_weight_and_bfloat16_input_is_bfloat16(path):
    x, w = randn(9, 20, dtype=torch.bfloat16), randn(20, seed=1)
    agree(lambda x, w: rms_norm(x, w, 1e-6), lambda x, w: rms_norm_ref(x, w, 1e-6), (x, w), 1.6e-2)
    assert rms_norm(x, w, 1e-6).dtype == torch.bfloat16


@DTYPES
def test_rms_norm_is_torchs(path, dtype):
    x, w = randn(6, 24, dtype=dtype), randn(24, seed=1, dtype=dtype)
    close(rms_norm(x, w, 1e-6), torch_rms_norm(x, (24,), w, 1e-6), TOLERANCE[dtype])


def test_rms_norm_by_hand(path):
    x = torch.tensor([[3.0, 4.0], [0.0, 0.0]])  # mean square 12.5: 3 / 3.535534, 4 / 3.535534
    want = torch.tensor([[0.8485281, 2.2627417], [0.0, 0.0]])
    torch.testing.assert_close(rms_norm(x, torch.tensor([1.0, 2.0]), 1e-12), want)


def test_rms_norm_ignores_scale_and_survives_it(path):
    x, w = randn(4, 40), randn(40, seed=1)
    close(rms_norm(x * 1e4, w, 1e-6), rms_norm(x, w, 1e-12), 1e-5)
    agree(lambda x, w: rms_norm(x, w, 1e-6), lambda x, w: rms_norm_ref(x, w, 1e-6), (x * 1e4,
                                                                                     w * 1e4), 1e-4)


def test_rms_norm_of_a_transposed_view_and_an_expanded_gradient(path):
    x, w = randn(2, 5, 3, 8).transpose(1, 2), randn(8, seed=1)
    agree(lambda x, w: rms_norm(x, w, 1e-6), lambda x, w: rms_norm_ref(x, w, 1e-6), (x, w), 2e-5,
          lambda y: torch.ones(()).expand_as(y))


def test_rms_norm_gradient_is_orthogonal_to_its_input_where_weights_are_one(path):
    x = randn(6, 48).requires_grad_()
    g, = torch.autograd.grad(rms_norm(x, torch.ones(48), 1e-12), x, randn(6, 48, seed=3))
    assert (g * x).sum(-1).abs().max() < 1e-4  # the output does not change with the input's length


# --- rotary embedding -----------------------------------------------------------------------------


def angles(*shape):
    """cos and sin of random angles."""
    a = 3 * randn(*shape, seed=2)
    return a.cos(), a.sin()


@DTYPES
@pytest.mark.parametrize("B, H, T, hd", [(2, 3, 5, 8), (1, 1, 1, 2), (3, 2, 7, 6), (2, 3, 45, 32)])
@pytest.mark.parametrize("own_positions", [False, True])
@pytest.mark.parametrize("layout", ["BTH", "BHT", "sliced"])
def test_rope_agrees(path, dtype, B, H, T, hd, own_positions, layout):
    x = {"BTH": lambda: randn(B, T, H, hd, dtype=dtype).transpose(1, 2),
         "BHT": lambda: randn(B, H, T, hd, dtype=dtype),
         "sliced": lambda: randn(B, T, 2 * H, hd, dtype=dtype)[:, :,
                                                               1:H + 1].transpose(1, 2)}[layout]()
    cos, sin = angles(B, 1, T, hd // 2) if own_positions else angles(T, hd // 2)
    agree(lambda x: rope(x, cos, sin), lambda x: rope_ref(x, cos, sin), [x], TOLERANCE[dtype])


def test_rope_by_hand(path):
    x = torch.tensor([1.0, 2.0, 3.0, 4.0]).view(1, 1, 1, 4)  # pairs (1, 3) by 90°, (2, 4) by 180°
    y = rope(x.requires_grad_(), torch.tensor([[0.0, -1.0]]), torch.tensor([[1.0, 0.0]])).detach()
    torch.testing.assert_close(y.flatten(), torch.tensor([-3.0, -2.0, 1.0, -4.0]))


def test_rope_keeps_norms_and_depends_on_distance_only(path):
    q, k = randn(1, 1, 1, 8).expand(1, 1, 12, 8), randn(1, 1, 1, 8, seed=1).expand(1, 1, 12, 8)
    a = torch.outer(torch.arange(12.0), torch.tensor([1.0, 0.3, 0.1, 0.03]))
    q, k = rope(q, a.cos(), a.sin()), rope(k, a.cos(), a.sin())
    score = (q @ k.mT)[0, 0]                                                             # [T, T]
    torch.testing.assert_close(q.norm(dim=-1), q[..., :1, :].norm(dim=-1).expand(1, 1, 12))
    torch.testing.assert_close(score.diagonal(-3), score[3, 0].expand(9))


def test_rope_gradient_that_is_strided_or_extreme(path):
    x, (cos, sin) = randn(2, 3, 4, 8), angles(4, 4)
    f, ref = (lambda x: rope(x, cos, sin)), (lambda x: rope_ref(x, cos, sin))
    agree(f, ref, [x * 1e4], 1e-5, lambda y: torch.ones(()).expand_as(y))
    agree(f, ref, [x], 1e-5, lambda y: randn(2, 3, 8, 4, seed=4).mT)


# --- SwiGLU ---------------------------------------------------------------------------------------


@DTYPES
@pytest.mark.parametrize("shape", [(1, 1), (3, 7), (2, 5, 131), (1, 1024)])
def test_swiglu_agrees(path, dtype, shape):
    inputs = [3 * randn(*shape, seed=s, dtype=dtype) for s in (0, 1)]
    agree(swiglu, swiglu_ref, inputs, TOLERANCE[dtype])


def test_swiglu_by_hand(path):
    gate, up = torch.tensor([0.0, 1.0, -2.0]).requires_grad_(), torch.tensor([5.0, 2.0,
                                                                              3.0]).requires_grad_()
    y = swiglu(gate, up)
    torch.testing.assert_close(y, torch.tensor([0.0, 1.4621172, -0.7152175]))
    dgate, dup = torch.autograd.grad(y, (gate, up),
                                     torch.ones(3))             # silu'(0) = 1/2, silu'(1) = 0.92767
    torch.testing.assert_close(dgate, torch.tensor([2.5, 1.8553409, -0.2723523]))
    torch.testing.assert_close(dup, torch.tensor([0.0, 0.7310586, -0.2384058]))


def test_swiglu_extremes_strides_and_expanded_gradients(path):
    gate, up = torch.tensor([[1e4, -1e4, 1e4, -1e4]]), torch.tensor([[1e4, 1e4, -1e4, 0.5]])
    agree(swiglu, swiglu_ref, [gate, up], 1e-6)
    inputs = [randn(5, 4).T, randn(4, 5, seed=1)]
    agree(swiglu, swiglu_ref, inputs, 1e-5, lambda y: torch.ones(()).expand_as(y))


def test_swiglu_keeps_two_tensors_only(path):
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.shape), lambda t: t):
        swiglu(randn(4, 8).requires_grad_(), randn(4, 8, seed=1).requires_grad_())
    assert len(kept) == 2


# --- all three ------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(0, 2, 3, 8), (2, 0, 3, 8), (2, 2, 0, 8)])
def test_empty_inputs(path, shape):
    x, w = torch.zeros(shape).requires_grad_(), torch.ones(8).requires_grad_()
    for y in (rms_norm(x, w, 1e-6), swiglu(x, x), rope(x, *angles(shape[2], 4))):
        assert y.shape == shape
        y.sum().backward()
    assert not w.grad.any()


def test_gradients_by_finite_differences():
    x, w = randn(3, 6).double().requires_grad_(), randn(6, seed=1).double().requires_grad_()
    up, (cos, sin) = randn(3, 6, seed=2).double().requires_grad_(), angles(3, 3)
    assert torch.autograd.gradcheck(lambda x, w: rms_norm(x, w, 1e-6), (x, w))
    assert torch.autograd.gradcheck(swiglu, (x, up))
    assert torch.autograd.gradcheck(lambda x: rope(x[None, None], cos, sin), (x,))


def test_autocast_leaves_the_gradients_statistics_in_float32(path):
    x, w, g = randn(64, 96).requires_grad_(), randn(96, seed=1).requires_grad_(), randn(64, 96,
                                                                                        seed=2)
    want = torch.autograd.grad(rms_norm_ref(x, w, 1e-6), (x, w), g)
    with torch.autocast(x.device.type, torch.bfloat16):
        got = torch.autograd.grad(rms_norm(x, w, 1e-6), (x, w), g)
    for a, b in zip(got, want):
        close(a, b, 2e-5)


def test_inference_gives_the_same(path):
    x, w, (cos, sin) = randn(2, 3, 5, 8), randn(8, seed=1), angles(5, 4)
    for f in (lambda: rms_norm(x, w, 1e-6), lambda: rope(x, cos, sin), lambda: swiglu(x, x)):
        with torch.no_grad():
            y = f()
        close(y, f(), 1e-6)


# --- Newton-Schulz --------------------------------------------------------------------------------


@DTYPES
@pytest.mark.parametrize("L, m, n", [(1, 1, 1), (2, 65, 130), (1, 130, 33), (3, 17, 64)])
def test_xxt_agrees_and_is_exactly_symmetric(path, dtype, L, m, n):
    X = randn(L, m, n, dtype=dtype)
    C = X @ X.mT
    C = (C + C.mT) / 2
    for mine, twin in ((xxt(X), xxt_ref(X.float())),
                       (xxt(X, 0.7, C, -1.3), xxt_ref(X.float(), 0.7, C.float(), -1.3))):
        close(mine, twin.to(dtype), TOLERANCE[dtype])
        assert path == "cpu" or torch.equal(mine, mine.mT)


@pytest.mark.parametrize("m, n", [(512, 2048), (1025, 1030)])
def test_xxt_in_blocks_on_a_cpu(m, n):
    X = randn(1, m, n)
    A = xxt(X)
    close(A, xxt_ref(X), 1e-4)
    close(xxt(X, 0.5, A, -2.0), xxt_ref(X, 0.5, A, -2.0), 1e-4)
    assert torch.equal(A[0, -1, :256], A[0, :256, -1])


def test_xxt_of_a_transposed_view(path):
    X = randn(2, 9, 5).mT
    close(xxt(X), xxt_ref(X), 1e-5)
    close(xxt(X.contiguous(), 1.0, xxt(X).mT, 1.0), 2 * xxt_ref(X), 1e-5)


def test_newton_schulz_by_hand(exact):
    square, tall = torch.tensor([[1.0, -2], [3, 4]]), torch.tensor([[0.1, -0.2], [0.3, 0.4],
                                                                    [-0.2, 0.1]])
    for X, want in ((square, [[0.788576, -0.687614], [0.586652, 0.485690]]),
                    (tall, [[0.309141, -0.436301], [0.544305, 0.681043], [-0.503347, 0.275618]])):
        torch.testing.assert_close(newton_schulz(X), torch.tensor(want), rtol=0, atol=3e-6)
        torch.testing.assert_close(newton_schulz(X.T), torch.tensor(want).T, rtol=0, atol=3e-6)
    rough = torch.tensor([[0.7734, -0.6641], [0.5625, 0.46875]]).bfloat16()
    torch.testing.assert_close(newton_schulz_ref(square.bfloat16()), rough, rtol=0, atol=0.05)


def test_newton_schulz_maps_each_singular_value_by_the_polynomial(exact):
    s = torch.tensor([1.0, 0.5, 0.1, 0.01, 0.001])  # of the matrix once it is divided by its norm
    want = torch.tensor([0.6964, 0.7654, 0.7121, 0.6989, 0.4705])
    for value, image in zip(s, want):
        X = torch.diag(torch.tensor([value, (1 - value ** 2).clamp(min=0).sqrt()]))
        torch.testing.assert_close(newton_schulz(X)[0, 0], image, rtol=0, atol=2e-4)


@pytest.mark.parametrize("m, n", [(40, 40), (65, 130), (96, 20)])
def test_singular_values_end_in_the_band(exact, m, n):
    X = randn(m, n)
    u, s, v = torch.linalg.svd(X / X.norm(), full_matrices=False)
    image = u.T @ newton_schulz(X) @ v.T
    s, kept = s[s >= 0.01], image.diagonal()[s >= 0.01]
    assert kept.min() > 0.6815 and kept.max() < 1.1347 and len(kept) > 15
    torch.testing.assert_close(image, image.diagonal().diag(), rtol=0,
                               atol=1e-4)                                         # the same vectors


@DTYPES
@pytest.mark.parametrize("m, n", [(65, 130), (12, 5)])
def test_newton_schulz_agrees_batch_equals_one_by_one_and_zero_rows_stay(exact, dtype, m, n):
    X = randn(3, m, n)
    X[:, 2] = 0
    O = newton_schulz(X.to(dtype))
    assert O.dtype == dtype and O.shape == X.shape and not O[:, 2].any()
    atol = 2e-5 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(O.float(), newton_schulz_ref(X), rtol=0, atol=atol)
    for one, many in zip(X.to(dtype), O):
        torch.testing.assert_close(newton_schulz(one), many, rtol=0, atol=1e-5)


def test_newton_schulz_in_bfloat16_throughout_as_on_a_gpu(path):
    X, (a, b, c) = randn(1, 65, 130), (3.4445, -4.7750, 2.0315)
    Y = (X / X.norm()).bfloat16()
    for _ in range(5):
        A = xxt(Y)
        Y = torch.baddbmm(Y, xxt(A, c, A, b), Y, beta=a)
    for O in (Y.float(), newton_schulz(X)):
        torch.testing.assert_close(O, newton_schulz_ref(X), rtol=0, atol=2e-2)


def test_newton_schulz_ignores_scale_and_leaves_zero_alone(exact):
    X = randn(6, 9)
    torch.testing.assert_close(newton_schulz(1e4 * X), newton_schulz(X))
    assert not newton_schulz(torch.zeros(2, 4, 5)).any()
    assert newton_schulz(torch.zeros(0, 4, 5)).shape == (0, 4, 5)


def test_newton_schulz_takes_other_steps_and_coefficients(exact):
    X = torch.diag(torch.tensor([0.6, 0.8]))
    torch.testing.assert_close(newton_schulz(X, 0), X)
    cubic = torch.diag(torch.tensor([0.792, 0.944]))     # 1.5 s - 0.5 s³
    torch.testing.assert_close(newton_schulz(X, 1, (1.5, -0.5, 0.0)), cubic)
    assert (newton_schulz(X, 30, (1.5, -0.5, 0.0)) - torch.eye(2)).abs().max() < 1e-5


def test_newton_schulz_multiplies_along_the_short_side(monkeypatch):
    shapes = []
    monkeypatch.setattr(kernels, "xxt", lambda X, *a: (shapes.append(X.shape), xxt(X, *a))[1])
    newton_schulz(randn(2, 9, 4), 1)
    newton_schulz(randn(4, 9), 1)
    assert shapes == [(2, 4, 9), (2, 4, 4), (1, 4, 9), (1, 4, 4)]
