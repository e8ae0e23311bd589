"""decode_attention: the Triton kernels and the CPU path against the definition."""
import math

import pytest
import torch
import torch.nn.functional as F

import kernels
from kernels import decode_attention, decode_attention_ref

TOL = {torch.float32: dict(atol=2e-6, rtol=2e-5), torch.bfloat16: dict(atol=2e-2, rtol=2e-2)}
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
HERE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(autouse=True)
def on_the_gpu():
    """Tensors lie where Triton runs: a process interprets its kernels or launches them."""
    torch.set_default_device(HERE)
    yield
    torch.set_default_device("cpu")


@pytest.fixture(params=["cpu", "triton", "torch"])
def path(request, monkeypatch):
    """Each path in turn, on whatever device the tensors are."""
    monkeypatch.setattr(kernels, "route", lambda x: request.param)
    return request.param


def cache(B, K, G, S, hd, dtype=torch.float32, device=HERE, seed=0):
    """q, and views k, v of a larger cache whose other slots and rows are huge; lengths from 1 to
    S."""
    g = torch.Generator().manual_seed(seed)
    q = torch.randn(B, K * G, hd, generator=g, device="cpu")
    big = torch.full((2, B + 2, K, S + 5, hd), 1e4, device="cpu")
    big[:, 1:-1, :, :S] = torch.randn(2, B, K, S, hd, generator=g, device="cpu")
    length = torch.randint(1, S + 1, (B,), generator=g, device="cpu")
    if B:
        length[0], length[-1] = 1, S
    k, v = big.to(device, dtype)[:, 1:-1, :, :S]
    return q.to(device, dtype), k, v, length.to(device)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", TOL)
@pytest.mark.parametrize("B, K, G, S, hd",
                         [(3, 2, 3, 70, 16), (2, 1, 1, 200, 8), (1, 2, 2, 1, 32),
                          (2, 1, 20, 19, 40)])
def test_decode_attention_is_the_definition(B, K, G, S, hd, dtype, device, path):
    if path == "triton" and device != HERE:
        pytest.skip("Triton launches on the GPU here")
    q, k, v, length = cache(B, K, G, S, hd, dtype, device)
    want = decode_attention_ref(q.double(), k.double(), v.double(), length)
    got = decode_attention(q, k, v, length)
    assert got.dtype == dtype and torch.allclose(got.double(), want, **TOL[dtype])


@pytest.mark.parametrize("window", [1, 7, 64, 500])
@pytest.mark.parametrize("programs", [1, 10 ** 6])
def test_a_window_is_the_last_slots_alone(window, programs, path, monkeypatch):
    """as if the older ones were not there; in one share of the slots and in many"""
    monkeypatch.setattr(kernels, "PROGRAMS", programs)
    q, k, v, length = cache(3, 1, 2, 90, 16)
    for length in (length, length.clamp(min=70)):
        got = decode_attention(q, k, v, length, window)
        for b, n in enumerate(length.tolist()):
            one = slice(b, b + 1), slice(None), slice(max(0, n - window), n)
            want = decode_attention_ref(q[b:b + 1], k[one], v[one], torch.tensor([min(n, window)]))
            assert torch.allclose(got[b], want[0], atol=2e-6)


@pytest.mark.parametrize("programs", [1, 4, 10 ** 6])
def test_any_number_of_splits_gives_the_same(programs, monkeypatch):
    """One program, a few, and more of them than slots: empty shares weigh nothing."""
    monkeypatch.setattr(kernels, "route", lambda x: "triton")
    monkeypatch.setattr(kernels, "PROGRAMS", programs)
    q, k, v, length = cache(2, 1, 2, 300, 16)
    assert torch.allclose(decode_attention(q, k, v, length), decode_attention_ref(q, k, v, length),
                          atol=2e-6)


def test_the_definition_is_softmax_attention():
    """Against PyTorch's own attention, a row at a time and over its valid slots only."""
    q, k, v, length = cache(4, 2, 3, 33, 16)
    for b, n in enumerate(length.tolist()):
        want = F.scaled_dot_product_attention(q[b][:, None], k[b, :, :n].repeat_interleave(3, 0),
                                              v[b, :, :n].repeat_interleave(3, 0))[:, 0]
        assert torch.allclose(decode_attention_ref(q, k, v, length)[b], want, atol=1e-6)


def test_decode_attention_by_hand(path):
    """Scores (2, 0) / sqrt(4) = (1, 0): weights e / (e + 1), 1 / (e + 1); a third slot beyond the
    length."""
    q, k = torch.tensor([[[2.0, 0, 0, 0]]]), torch.zeros(1, 1, 3, 4)
    k[0, 0, 0, 0], v = 1.0, torch.tensor([[[[1.0] * 4, [0.0] * 4, [7.0] * 4]]])
    got = decode_attention(q, k, v, torch.tensor([2]))
    assert torch.allclose(got, torch.full((1, 1, 4), math.e / (math.e + 1)), atol=1e-6)


def test_one_slot_is_its_value_and_no_row_is_nothing(path):
    q, k, v, length = cache(2, 2, 2, 9, 16)
    got = decode_attention(q, k, v, torch.ones_like(length))
    assert torch.allclose(got, v[:, :, 0].repeat_interleave(2, 1), atol=1e-6)
    assert decode_attention(q[:0], k[:0], v[:0], length[:0]).shape == (0, 4, 16)


@pytest.mark.parametrize("dtype", TOL)
def test_extreme_scores_pick_the_largest(dtype, path):
    """Queries of 1e4 make the softmax an argmax: finite, and equal to the definition."""
    q, k, v, length = cache(2, 2, 2, 21, 16, dtype)
    got, want = (f(q * 1e4, k, v, length) for f in (decode_attention, decode_attention_ref))
    assert got.isfinite().all() and torch.allclose(got.float(), want.float(), **TOL[dtype])


def test_equal_and_unequal_lengths_agree(path):
    """The CPU path drops its mask where every row is full: the same numbers as in a longer
    cache."""
    q, k, v, _ = cache(3, 2, 2, 40, 16)
    full = torch.full((3,), 25)
    a = decode_attention(q, k, v, full)
    assert torch.allclose(a[:2], decode_attention(q, k, v, torch.tensor([25, 25, 40]))[:2],
                          atol=1e-6)


def test_strides_that_differ_are_copied(path):
    q, k, v, length = cache(2, 2, 2, 12, 16)
    other = v.transpose(1, 2).contiguous().transpose(1, 2)
    assert torch.equal(decode_attention(q, k, other, length), decode_attention(q, k, v, length))


def test_autocast_does_not_round_float32(path):
    q, k, v, length = cache(2, 2, 2, 12, 16)
    with torch.autocast(HERE, torch.bfloat16):
        got = decode_attention(q, k, v, length)
    assert torch.allclose(got, decode_attention_ref(q, k, v, length), atol=2e-6)


def test_views_of_any_stride(path):
    """a cache whose last axis is not dense, k and v laid out differently, lengths that are a
    column"""
    q, k, v, length = cache(3, 2, 2, 40, 16)
    want = decode_attention_ref(q, k, v, length)
    lengths = torch.stack([length, length], 1)[:, 0]
    odd = k.mT.contiguous().mT
    assert odd.stride(3) != 1 and not lengths.is_contiguous()
    for keys, values in ((odd, v), (k.clone(), v), (odd, v.mT.contiguous().mT)):
        assert torch.allclose(decode_attention(q, keys, values, lengths), want, atol=2e-6)


def test_it_has_no_gradient(path):
    q, k, v, length = cache(2, 1, 2, 9, 16)
    assert not decode_attention(q.requires_grad_(), k, v, length).requires_grad


def test_float16_scores_do_not_overflow(path):
    q, k, v, length = cache(2, 1, 2, 9, 16)
    q, k, v = (1e4 * q).half(), (100 * k.clamp(-5, 5)).half(), v.clamp(-5, 5).half()
    got = decode_attention(q, k, v, length)
    assert torch.allclose(got.float(), decode_attention_ref(q, k, v, length).float(), atol=2e-2)
