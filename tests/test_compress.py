"""compress.py: masks, codes and ARMOR by hand, their limits and invariances, and whole runs."""
import copy
import dataclasses
import functools
import itertools
import math
import pickle
import shutil
import types
from collections import defaultdict
from pathlib import Path

import pytest
import torch
from conftest import DATA_DIR, close, merged, rand
from wiring import catch

import compress
from data import text
from data.run import UserError, claims_of, configure, hyper
from data.run import settings as settings_of
from data.tokenizer import bytes_tokenizer
from kernels import PackedLinear
from model import ModelConfig, init, load, rope_table, save

D = functools.partial(torch.tensor, dtype=torch.float64)
W = D([[3., 1, 4, 2], [4, 1, 3, -2]])
H4 = D([1., 4, 1, 9])


def moment(n, tokens=400, seed=0):
    """H = 2 mean x xᵀ of correlated inputs."""
    x = rand(tokens, n, seed=seed) @ (torch.eye(n).double() + .5 * rand(n, n, seed=seed + 1)
                                      / n ** .5)
    return 2 * x.T @ x / tokens


def weight(made):
    """What a method returned, as a float64 weight."""
    return (made.dequantize() if isinstance(made, PackedLinear) else made).double()


def error(W, new, H):
    """tr(D H Dᵀ): twice the mean squared error of the outputs."""
    d = W.double() - weight(new)
    return (d @ H.double() * d).sum().item()


# --- masks ----------------------------------------------------------------------------------------


def test_nowag_by_hand():
    Wb, r1, r2 = compress.normalise(W, eps=0.)
    assert close(r1, [5, 2 ** .5, 5, 8 ** .5]) and close(r2, [2 ** .5] * 2)
    assert close(Wb, [[.424264, .5, .565685, .5], [.565685, .5, .424264, -.5]])
    assert close(Wb ** 2 * H4, [[.18, 1, .32, 2.25], [.32, 1, .18, 2.25]])
    mask = compress.kept(Wb ** 2 * H4, "2:4")
    assert close(mask, [[0, 1, 0, 1]] * 2)
    assert abs(compress.proxy(W, W * mask, H4) - .133333) < 1e-4
    assert close(compress.kept(W.abs() * H4.sqrt(), "2:4", "row"), [[0, 0, 1, 1], [1, 0, 0, 1]])
    assert close(compress.kept(W.abs(), "2:4"), [[1, 0, 1, 0]] * 2)


def test_masks_keep_exactly_what_they_say():
    score = rand(6, 16).abs()
    assert (compress.kept(score, "2:4").view(6, 4, 4).sum(-1) == 2).all()
    assert (compress.kept(score, "4:8").view(6, 2, 8).sum(-1) == 4).all()
    assert compress.kept(score, "50%").sum() == 48 and (compress.kept(score, "25%", "row").sum(1)
                                                        == 4).all()
    assert compress.kept(torch.ones(3, 5), "50%").sum() == 8               # 15 - ⌊7.5⌋
    assert compress.kept(torch.ones(3, 8), "50%").sum() == 12              # ties: no more than that
    for pattern in ("2:3", "3:2", "half", "150%", "2:"):
        with pytest.raises(UserError, match="--pattern"):
            compress.kept(score, pattern)


def test_invariances_of_the_scores():
    w, h, c = rand(8, 16), rand(16, seed=1).abs() + .1, rand(16, seed=2).abs() + .1

    def nowag(w, h):
        return weight(compress.nowag_p(w, h, pattern="50%")) != 0

    def wanda(w, h):
        return weight(compress.wanda(w, h, pattern="50%")) != 0
    assert (nowag(w, h) == nowag(3 * w, h)).all() and (nowag(w, h) == nowag(w * c, h)).all()
    assert (wanda(w, h) == wanda(w / c, h * c ** 2)).all()              # the same function and mask
    assert not (nowag(w, h) == nowag(w / c, h * c ** 2)).all()
    same = torch.full((16,), 2.).double()
    assert (wanda(w, same) == (compress.kept(w.abs(), "50%", "row") > 0)).all()
    level = w / w.norm(dim=0)                                          # equal column norms: Wanda's
    a, b = (compress.kept(x, "2:4")
            for x in (compress.normalise(level)[0] ** 2 * h, level.abs() * h.sqrt()))
    assert close(a, b)


def test_where_norms_are_equal_and_activations_one_nowag_is_magnitude():
    w = rand(8, 16)
    for _ in range(200):                                                       # Sinkhorn
        w = w / w.norm(dim=0) * 8 ** .5
        w = w / w.norm(dim=1, keepdim=True) * 16 ** .5
    assert close(w.norm(dim=0), torch.full((16,), 8 ** .5), 1e-6)
    for pattern in ("2:4", "4:8", "50%"):
        a, b = compress.nowag_p(w, torch.ones(16),
                                pattern=pattern), compress.magnitude(w, pattern=pattern)
        assert close(weight(a), weight(b))


def test_sparsegpt_limits():
    w = rand(8, 16)
    new = weight(compress.sparsegpt(w, 3 * torch.eye(16).double(), pattern="50%", damp=0.))
    kept = w * compress.kept(w.abs(), "50%")
    assert close(new, kept.bfloat16())                                     # uncorrelated: magnitude
    H = moment(16)
    for pattern in ("50%", "4:8"):
        new = weight(compress.sparsegpt(w, H, pattern=pattern))
        assert (new == 0).sum() == 64 and error(w, new, H) < error(w, w * (new != 0), H)
    packed = compress.sparsegpt(w.float(), H.float(), pattern="2:4")
    assert isinstance(packed, PackedLinear)
    new = packed.dequantize().double()
    assert ((new.view(8, 4, 4) != 0).sum(-1) == 2).all()
    assert error(w, new, H) < error(w, w * compress.kept(w.abs(), "2:4"), H)


def test_sparsegpt_s_blocks_give_the_unblocked_result_for_a_fixed_mask():
    w, H = rand(4, 16), moment(16)
    a, b, c = (weight(compress.sparsegpt(w, H, pattern="4:8", block=x)) for x in (8, 16, 10))
    assert close(a, b) and close(a, c)                  # a block ends where a group of eight does


def test_the_inverse_factor_by_hand():
    U = compress.inverse_factor(D([[2., 1], [1, 2]]), damp=0.)
    assert close(U, [[.816497, -.408248], [0, .707107]])
    H = moment(6)
    U = compress.inverse_factor(H, damp=0.)
    assert close(U.T @ U, torch.linalg.inv(H), 1e-8)
    dead = H.clone()
    dead[2] = dead[:, 2] = 0
    assert compress.inverse_factor(dead).isfinite().all()


def test_a_mask_is_stored_in_its_smallest_format():
    w = rand(4, 8).float()
    assert compress.pruned(w * compress.kept(w.abs(), "2:4"), "2:4").kind == "nm24"
    assert compress.pruned(w * compress.kept(w.abs(), "50%"), "50%").kind == "bitmap"
    assert compress.pruned(w, "100%") is w


def test_damping_grows_until_there_is_a_factor():
    """A moment of rank one, damped by next to nothing: a hundred times more is enough."""
    H = torch.ones(16, 16) * 3
    U = compress.inverse_factor(H, damp=1e-9)
    assert U.isfinite().all() and (U.triu() == U).all()
    L = torch.linalg.inv((U.T @ U).double())
    assert close(L / L.mean(), torch.ones(16, 16), 1e-2)
    with pytest.raises(UserError, match="no Cholesky factor"):
        compress.inverse_factor(-H)


@pytest.mark.parametrize("pattern", ["2:4", "50%"])
def test_sparsegpt_by_its_definition(pattern):
    """A column at a time, all that is left moves by the OBS rule; 2:4 is chosen when a group of
    four begins, half when a block of 8 does."""
    w, H = rand(3, 16), moment(16)
    U = compress.inverse_factor(H, .01)
    new, now = torch.zeros_like(w), w.clone()
    for j in range(16):
        if j % (size := 4 if pattern == "2:4" else 8) == 0:
            score = now[:, j:j + size] ** 2 / U.diagonal()[j:j + size] ** 2
            flat = score if pattern == "2:4" else score.reshape(1, -1)
            best = flat.topk(flat.size(1) // 2, 1).indices
            mask = torch.zeros_like(flat).scatter(1, best, 1.).view_as(score)
        new[:, j] = now[:, j] * mask[:, j % size]
        now = now - ((now[:, j] - new[:, j]) / U[j, j])[:, None] * torch.where(
            torch.arange(16) >= j, U[j], 0.)
    made = weight(compress.sparsegpt(w, H, pattern=pattern, block=8))
    assert close(made, new.bfloat16(), 1e-6)


# --- ARMOR ----------------------------------------------------------------------------------------


def test_core_step_by_hand():
    A, B = D([[[1., 0], [.5, 1]]]), torch.eye(4).double()[None].clone()
    B[0, 0, 1] = .5
    h, Wb = D([1., 1, 4, 1]), D([[1., 2, .8, -1], [.5, 0, 1, 0]])
    S = D([[0., 2, 0, -1], [.5, 0, 1, 0]])
    error = compress.armor_error(A, S, B, Wb)
    assert close(compress.armor_loss(error, h), 5.3725)
    new, mask, after, fall = compress.core_step(A, S, (S != 0).double(), B, error, h,
                                                torch.tensor([[0]]))
    assert close(mask, [[0, 1, 1, 0], [1, 0, 1, 0]]) and close(new[0], [0, 1.5, .64, 0], 1e-5)
    assert close(new[1], S[1]) and close(compress.armor_loss(after, h), 3.762, 1e-5)
    assert close(after, compress.armor_error(A, new, B, Wb), 1e-9) and close(fall, 1.6105, 1e-5)


def test_blocks_of_a_diagonal_multiply_from_both_sides():
    A, B, X = rand(2, 4, 4), rand(3, 8, 8, seed=1), rand(8, 24, seed=2)
    assert close(compress.left(A, X), torch.block_diag(*A) @ X, 1e-12)
    assert close(compress.right(X, B), X @ torch.block_diag(*B), 1e-12)


def test_groups_of_different_tiles_add_up():
    P, Q, a, b = 2, 3, 4, 8
    A, B, h = rand(P, a, a), rand(Q, b, b, seed=1), rand(Q * b, seed=2).abs()
    Wb = rand(P * a, Q * b, seed=3)
    M = compress.kept(Wb, "2:4")
    S, group = Wb * M, torch.randint(a * b // 4, (P, Q), generator=torch.Generator().manual_seed(0))

    def loss(S):
        return compress.armor_loss(compress.armor_error(A, S, B, Wb), h)
    error = compress.armor_error(A, S, B, Wb)
    together, mask, after, fall = compress.core_step(A, S, M, B, error, h, group)
    gain = 0.0
    for p in range(P):
        for q in range(Q):
            one, tile = S.clone(), (slice(p * a, p * a + a), slice(q * b, q * b + b))
            one[tile] = together[tile]
            gain += loss(S) - loss(one)
            assert loss(one) <= loss(S) + 1e-9
            row, four = group[p, q] // 2, group[p, q] % 2
            changed = (together != S)[tile].view(a, 2, 4).any(-1).nonzero().tolist()
            assert changed == [[row, four]]
    assert abs(loss(S) - loss(together) - gain) < 1e-6 and close(fall, gain, 1e-6)
    assert close(after, compress.armor_error(A, together, B, Wb), 1e-9)
    assert (mask.view(-1, 4).sum(-1) == 2).all() and ((together != 0) == (mask == 1)).all()


def test_armor_never_rises_and_ends_below_nowag_p():
    w, h, trace = rand(16, 24).float(), rand(24, seed=1).abs().float() + .1, []
    g = torch.Generator().manual_seed(0)
    layer = compress.armor(w, h, g, trace, block=8, iterations=120)
    start = compress.proxy(w, compress.nowag_p(w, h).dequantize(), h)
    assert len(trace) == 121 and all(b <= a + 1e-7 for a, b in zip(trace, trace[1:]))
    assert trace[0] <= start + 1e-3 and trace[-1] < .8 * start
    assert abs(compress.proxy(w, layer.dequantize(), h)
               - trace[-1]) < 5e-3                                      # bfloat16 of what is stored
    x = torch.randn(5, 24, generator=g)
    assert close(layer(x), x @ layer.dequantize().T, 1e-4)
    with pytest.raises(UserError, match="--block"):
        compress.armor(w[:, :22], h[:22], g, [])
    promise = compress.Promise()
    compress.armor(w, h, g, promise.tell(), block=8, iterations=20)
    promise.note("layer 0", promise.trace[-1])
    assert promise.metrics()["rise"] <= 1e-7 and .5 < promise.metrics()["worst_layer"] < 1
    promise.tell().extend([.5, .6])
    with pytest.raises(AssertionError, match="layer 1: ARMOR's proxy loss rose"):
        promise.note("layer 1", .6)
    none = compress.armor(w, h, g, [], iterations=0)                           # where it starts
    assert close(none.dequantize(), compress.nowag_p(w, h).dequantize(), .05)
    zero = torch.zeros(8, 8)
    assert close(compress.armor(zero, h[:8], g, [], iterations=2).dequantize(), zero)


@pytest.fixture
def tiles():
    """A, B, S within a mask M, the weight Wb, and h of their inputs."""
    P, Q, a, b = 2, 3, 4, 8
    Wb, h = rand(P * a, Q * b, seed=3), rand(Q * b, seed=2).abs() + .1
    M = compress.kept(Wb, "2:4")
    x = dict(A=torch.eye(a).double() + .1 * rand(P, a, a), S=Wb * M,
             B=torch.eye(b).double() + .1 * rand(Q, b, b, seed=1))
    return x, M, Wb, h, (Wb ** 2 * h).sum()


def relative_loss(x, Wb, h, total):
    """Σ h_j (bd(A) S bd(B) - Wb)² over its value for zeros."""
    error = torch.block_diag(*x["A"]) @ x["S"] @ torch.block_diag(*x["B"]) - Wb
    return (h * error ** 2).sum() / total


def test_armor_s_wrappers_step_as_adam_does(tiles):
    x, M, Wb, h, total = tiles
    moments = [{k: torch.zeros_like(v) for k, v in x.items()} for _ in range(2)]
    theirs = {k: v.clone().requires_grad_() for k, v in x.items()}
    opt = torch.optim.Adam(theirs.values(), 1e-2)
    for t in (1, 2, 3):
        opt.zero_grad()
        relative_loss(theirs, Wb, h, total).backward()
        theirs["S"].grad.mul_(M)
        opt.step()
        error = compress.armor_error(**x, Wb=Wb)
        x = compress.wrapper_step(x, M, error, h, total, moments, t, 1e-2)
        assert all(close(x[k], theirs[k].detach(), 1e-9) for k in x)


def test_armor_draws_a_group_by_the_gradient_of_all_its_entries(tiles, monkeypatch):
    x, _, Wb, h, total = tiles
    S = x["S"].clone().requires_grad_()
    relative_loss(x | dict(S=S), Wb, h, total).backward()
    tiles = S.grad.abs().view(2, 4, 3, 8).transpose(1, 2).reshape(2, 3, 8, 4)
    want = tiles.sum(-1)                                                 # groups: rows x fours
    want = (want / want.sum(-1, keepdim=True)).cumsum(-1)
    error = compress.armor_error(**x, Wb=Wb)
    for u in (0.0, .1, .35, .5, .77, .999999, 1.0):                      # 1: by rounding, if at all
        monkeypatch.setattr(torch, "rand", lambda *shape, generator: torch.full(shape, u))
        group = compress.drawn_group(x, error, h, total, torch.Generator())
        assert torch.equal(group, (want <= torch.tensor(u)).sum(-1).clamp(max=7))


def test_armor_takes_back_an_adam_step_that_rises_and_halves_its_rate(monkeypatch):
    """Steps that spoil A: what stays is NoWag-P's, the best core of wrappers that do nothing."""
    w, h, rates, trace = rand(8, 16).float(), rand(16, seed=1).abs().float() + .1, [], []

    def worse(x, M, error, h, total, moments, t, lr):
        rates.append(lr)
        assert t == len(rates)
        return x | dict(A=-x["A"])
    monkeypatch.setattr(compress, "wrapper_step", worse)
    made = compress.armor(w, h, torch.Generator().manual_seed(0), trace, iterations=4, lr=1.)
    assert rates == [1., .5, .25, .125] and len(trace) == 5
    assert close(made.dequantize(), compress.nowag_p(w, h).dequantize(), .05)


def test_armor_as_stored_is_never_worse_than_nowag_p(monkeypatch):
    """A fit that gains less than rounding its wrappers to half precision loses is not stored."""
    w, h = rand(16, 24).float(), rand(24, seed=1).abs().float() + .1
    w *= 10 ** torch.linspace(-2, 2, 16)[:, None]                      # rows of very unequal norm
    plain = compress.proxy(w, compress.nowag_p(w, h).dequantize(), h)
    none = compress.armor(w, h, torch.Generator().manual_seed(0), [], iterations=0)
    assert close(none.A.float(), torch.eye(8).expand(2, 8, 8)) and close(
        none.B.float(), torch.eye(8).expand(3, 8, 8))
    assert abs(compress.proxy(w, none.dequantize(), h) - plain) < 1e-5
    trace = []
    fitted = compress.armor(w, h, torch.Generator().manual_seed(0), trace, iterations=60)
    assert trace[-1] < .9 * plain and abs(compress.proxy(w, fitted.dequantize(), h)
                                          - trace[-1]) < 5e-3
    step = compress.wrapper_step

    def hardly(x, *rest):
        """A step that gains next to nothing, with an A that bfloat16 knows to a quarter of a per
        cent."""
        trial = step(x, *rest)
        x = {k: v + 1e-4 * (trial[k] - v) for k, v in x.items()}
        big = x["A"].diagonal(dim1=1, dim2=2).max()
        return x | dict(A=x["A"] / big * 1.0038, S=x["S"] * big / 1.0038)
    monkeypatch.setattr(compress, "wrapper_step", hardly)
    monkeypatch.setattr(compress, "core_step", lambda A, S, B, M, error, h, group: (
        S, M, error, torch.tensor(-1.)))
    trace = []
    made = compress.armor(w, h, torch.Generator().manual_seed(0), trace, iterations=30)
    assert trace[-1] < trace[0]
    assert compress.proxy(w, made.dequantize(), h) <= compress.proxy(w, none.dequantize(), h)


def test_armor_forgets_adam_s_moments_of_what_comes_back(monkeypatch):
    w, h, step = rand(8, 16).float(), rand(16, seed=1).abs().float() + .1, compress.wrapper_step
    masks, back = [], 0

    def see(x, M, error, h, total, moments, t, lr):
        nonlocal back
        if masks:
            new = (M == 1) & (masks[-1] == 0)
            back += new.sum().item()
            assert not any(moment["S"][new].any() for moment in moments)
            assert t < 3 or moments[0]["S"][(M == 1) & ~new].any()
        masks.append(M.clone())
        return step(x, M, error, h, total, moments, t, lr)
    monkeypatch.setattr(compress, "wrapper_step", see)
    compress.armor(w, h, torch.Generator().manual_seed(0), [], iterations=60, lr=1e-2)
    assert back > 3


def test_low_rank_has_armor_s_bytes_and_mends_what_pruning_lost():
    w, h = rand(16, 24).float(), rand(24, seed=1).abs().float() + .1
    g = torch.Generator().manual_seed(0)
    armor = compress.armor(w, h, g, [], block=8, iterations=1)
    layer, none = compress.lowrank24(w, h, block=8), compress.nowag_p(w, h)
    assert layer.nbytes() == armor.nbytes() and layer.options["rank"] == 8
    H = torch.diag(h)
    assert error(w, layer, H) < error(w, none, H)
    core = compress.kept(compress.normalise(w)[0] ** 2 * h, "2:4") * w
    lost = torch.linalg.svdvals((w - core) * h.sqrt())[8:].square().sum().item()
    assert error(w, layer, H) == pytest.approx(lost, rel=.02)         # no rank of 8 loses less
    full = compress.lowrank24(w, h, block=10 ** 9)                       # a whole rank gives W back
    assert error(w, full, H) < 1e-3 * error(w, none, H)


def test_d_pruner_s_limits():
    w, H, g = rand(4, 16).float(), moment(16).float(), rand(4, 16, seed=5).float()
    g[:, 3] = 0
    taylor = (g * w + (g * w) ** 2 / 2).abs()
    new = weight(compress.dprune(w, H, (g, g ** 2), lam=0.))
    assert close(new != 0, compress.kept(taylor, "50%"))                # no penalty: Taylor's score
    assert (new[:, 3] == 0).all()                                       # no gradient, no importance
    much = weight(compress.dprune(w, H, (g, g ** 2), lam=1e12, lr=1.)) != 0
    assert not (much == (new != 0)).all()


def test_d_pruner_s_score_by_hand():
    """W [1, 2], diag H⁻¹ = 1/2: G = [2, 8];  g [3, -1], F [1, 4], λ lr² = 1/8:
    g' = g (1 + G F / 4) = [4.5, -9],  g'W = [4.5, -18],  I = |g'W + (g'W)²/2| = [14.625, 144]."""
    W, H, g, F = (D([x]) for x in ([1., 2], [2., 2], [3., -1], [1., 4]))
    seen = []
    kept, compress.kept = compress.kept, lambda score, pattern: seen.append(score) or kept(
        score, pattern)
    try:
        made = compress.dprune(W, torch.diag(H[0]) / 1.01, (g, F), pattern="50%", lam=.125, lr=1.)
    finally:
        compress.kept = kept
    assert close(seen[0], [[14.625, 144]], 1e-6) and weight(made).tolist() == [[0, 2]]
    w, H, g, F = rand(4, 16), moment(16), rand(4, 16, seed=5), rand(4, 16, seed=6) ** 2
    inverse = torch.linalg.inv(H + .01 * H.diagonal().mean() * torch.eye(16)).diagonal()
    x = (g + 2 * .7 * .25 * w ** 2 / inverse * g * F) * w
    want = compress.kept((x + x ** 2 / 2).abs(), "50%")
    assert close(weight(compress.dprune(w, H, (g, F), lam=.7, lr=.5)) != 0, want)


# --- codes ----------------------------------------------------------------------------------------


def test_gptq_s_limits():
    w = rand(8, 32).float()
    for bits in (2, 3, 4):
        a = compress.gptq(w, 2 * torch.eye(32), bits=bits, group=16).dequantize()
        assert close(a, compress.rtn(w, bits=bits, group=16).dequantize(), 1e-5)     # diagonal: RTN
    worse = 0
    for seed in range(5):
        H = moment(32, seed=3 * seed).float()
        a = compress.gptq(w, H, bits=3, group=32).dequantize()
        b = compress.rtn(w, bits=3, group=32).dequantize()
        worse += error(w, a, H) > error(w, b, H)
    assert worse == 0
    fine, coarse = (error(w, compress.gptq(w, H, bits=b, group=32).dequantize(), H) for b in (8, 3))
    assert fine < coarse / 100


def test_gptq_by_hand_and_its_loss():
    """one scale 1, zero 1 for [0.6, 0.6]: on the grid of whole numbers GPTQ gives [1, 0], RTN [1,
    1]"""
    H, w = D([[2., 1], [1, 2]]), D([[.6, .6, -1, 2]])
    whole = torch.block_diag(H, torch.eye(2).double() * 1e-9)
    layer = compress.gptq(w.float(), whole.float(), bits=2, group=4, damp=1e-9)
    assert close(layer.dequantize()[0, :2], [1, 0])
    assert close(compress.rtn(w.float(), bits=2, group=4).dequantize()[0, :2], [1, 1])
    assert error(D([[.6, .6]]), D([[1., 0]]), H) == pytest.approx(.56)
    assert error(D([[.6, .6]]), D([[1., 1]]), H) == pytest.approx(.96)


def test_act_order_starts_at_the_most_active_and_follows_a_permutation():
    w, H = rand(8, 32).float(), moment(32).float() * 100
    scale = torch.linspace(.2, 2, 32)
    H = H * scale * scale[:, None]
    gptq = functools.partial(compress.gptq, bits=3, group=16, act_order=True)
    layer = gptq(w, H, scales="block")
    assert layer.order.long().tolist() == H.diagonal().argsort(descending=True).tolist()
    p = torch.randperm(32, generator=torch.Generator().manual_seed(1))
    other = gptq(w[:, p], H[p][:, p], scales="block")
    assert close(other.dequantize(), layer.dequantize()[:, p], 1e-4)
    x = rand(5, 32, seed=3).float()
    assert close(layer(x), x @ layer.dequantize().T, 1e-4)
    assert "order" not in dict(gptq(w, H, scales="static").named_buffers())   # groups as given


def grid(w, bits):
    """The scale and zero [m] of weights w [m, g]: their range, 0 in it, in 2^bits steps."""
    low, high = w.amin(1).clamp(max=0), w.amax(1).clamp(min=0)
    scale = ((high - low) / (2 ** bits - 1)).half().double()
    return scale, (-low / scale).round()


def plain_gptq(w, H, bits, group, scales, act_order, damp=.01):
    """GPTQ as its paper tells it: a column at a time the rest moves by the OBS rule and H loses the
    column, every weight always up to date; `scales` as the released code finds them."""
    n, w, H = w.size(1), w.clone(), H + damp * H.diagonal().mean() * torch.eye(w.size(1)).double()
    order = H.diagonal().argsort(descending=True) if act_order else torch.arange(n)
    given, w, inverse = w.clone(), w[:, order], torch.linalg.inv(H[order][:, order])
    out, first = torch.zeros_like(w), w.clone()
    for j in range(n):
        if j % 128 == 0:
            first = w.clone()              # the released code works on a copy of 128 columns
        if scales == "static":
            start = order[j] // group * group
            scale, zero = grid(given[:, start:start + group], bits)
        elif j % group == 0:
            scale, zero = grid((w if scales == "current" else first)[:, j:j + group], bits)
        q = (((w[:, j] / scale).round() + zero).clamp(0, 2 ** bits - 1) - zero) * scale
        out[:, order[j]] = q
        w = w - ((w[:, j] - q) / inverse[j, j])[:, None] * inverse[j]
        inverse = inverse - inverse[:, [j]] * inverse[[j]] / inverse[j, j]
        inverse[j, j] = 1.                                       # gone: nothing moves it any more
    return out


@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("n, group", [(144, 16), (164, 48)])
def test_the_three_rules_for_scales_are_gptq_s(n, group, act_order):
    """Across the end of a block of 128; the groups of 48 do not end with it."""
    w, H = rand(3, n), moment(n, tokens=600)
    made = {rule: weight(compress.gptq(w, H, bits=3, group=group, scales=rule, act_order=act_order))
            for rule in ("current", "block", "static")}
    for rule, got in made.items():
        assert close(got, plain_gptq(w, H, 3, group, rule, act_order), 1e-6), rule
    assert not close(made["current"], made["block"]) and not close(made["block"], made["static"])


def test_columns_loss_is_the_output_error():
    w, H = rand(8, 24).float(), moment(24, tokens=2000).float()
    U = compress.inverse_factor(H, 1e-7)
    codes, lo, hi, losses = compress.columns(w, U, torch.full((24,), 3))
    layer = compress.baq(w, H, bits=3, allocate=False, damp=1e-7)
    assert losses.sum().item() == pytest.approx(error(w, layer, H) / 2, rel=1e-3)
    assert close(layer.dequantize(), compress.stored(w, compress.columns_state(
        codes, torch.full((24,), 3), lo, hi)).dequantize())
    width = compress.widths_of(losses, 3)
    assert torch.equal(compress.baq(w, H, bits=3, damp=1e-7).width.int(), width)
    width[0] = 0                                          # a column without bits: all of it is lost
    _, lo, hi, losses = compress.columns(w, U, width)
    assert losses[0].item() == pytest.approx((w[:, 0] / U[0, 0]).square().sum().item() / 2)
    assert close(lo, w.amin(1).half()) and close(hi, w.amax(1).half())


def test_baq_s_widths_by_hand():
    assert compress.widths_of(torch.tensor([4., 1, .25]), 3).tolist() == [4, 3, 2]
    losses = torch.tensor([4., 1, .25])
    after = losses * 4. ** -(torch.tensor([4., 3, 2]) - 3)
    assert close(after, [1., 1, 1])                                            # all lose alike
    assert compress.widths_of(torch.ones(7), 3).tolist() == [3] * 7
    many = rand(40).exp().float() ** 3
    for bits in (2, 3, 4):
        width = compress.widths_of(many, bits)
        assert width.sum() == 40 * bits and (width >= 0).all() and (width <= 8).all()
        assert (width == compress.widths_of(1000 * many, bits)).all()
        assert (width.float()[many.argsort()].diff() >= 0).all()              # more loss, more bits
    equal = compress.baq(rand(4, 16).float(), torch.eye(16), bits=3, allocate=False)
    assert equal.nbytes() == 4 * 16 * 3 // 8 + 16 + 4 * 4


def test_mixed_widths_between_two_and_four_bits():
    w, h, g = rand(8, 64).float(), torch.ones(64), torch.Generator().manual_seed(0)
    bits, errors = [], []
    for share in (0, .25, 1.):
        layer = compress.mixed(w, h, g, share=share, group=16)
        code = 2 * 4 + 2 * round(4 * share)                               # bits of one code a group
        assert layer.nbytes() == 8 * (16 * code // 8 + -(-code // 8) + 2 + 4) + 4
        bits.append(layer.nbytes())
        errors.append(error(w, layer, torch.eye(64)))
    assert bits == sorted(bits) and errors == sorted(errors, reverse=True)
    h[16:32] = 100
    assert compress.mixed(w, h, g, share=.25).width.tolist() == [2, 4, 2, 2]
    w[:, 48:] *= 3                                                       # 9 in squares, below 100
    assert compress.mixed(w, h, g, share=.25).width.tolist() == [2, 4, 2, 2]
    assert compress.mixed(w, h, g, share=.25, by="range").width.tolist() == [2, 2, 2, 4]
    drawn = [compress.mixed(w, h, g, share=.25, by="random").width.tolist() for _ in range(20)]
    assert len({tuple(x) for x in drawn}) == 4 and all(sum(x) == 10 for x in drawn)
    two = torch.zeros(2, 32)                   # ranges 2, 2 and 3.4, .2: squared 4 and 5.8 in mean
    two[:, 0], two[:, 16] = 2, torch.tensor([3.4, .2])
    assert compress.mixed(two, h[:32], g, share=.5, by="range").width.tolist() == [2, 4]
    with pytest.raises(UserError, match="--group 24"):
        compress.mixed(w, h, g, group=24)


def test_gptvq_weighs_and_hands_on_its_errors():
    w, g = rand(64, 24).float(), torch.Generator().manual_seed(0)
    H = (moment(24) + 2 * torch.ones(24, 24)).float()                     # all inputs rise together
    plain = compress.nowag_vq(w, H.diagonal(), g, bits=2, dim=2, norms=False, weights=False)
    assert error(w, compress.gptvq(w, H, g, bits=2, dim=2), H) < .7 * error(w, plain, H)
    for h in (torch.ones(24), torch.linspace(.1, 9, 24)):      # uncorrelated: weighted k-means
        same = compress.gptvq(w, h.diag(), torch.Generator().manual_seed(3), bits=2, dim=2,
                              damp=1e-12)
        km = compress.nowag_vq(w, h, torch.Generator().manual_seed(3), bits=2, dim=2, norms=False)
        assert close(same.dequantize(), km.dequantize(), 1e-5)
    odd = compress.gptvq(rand(8, 25).float(), moment(25).float(), g, bits=3)
    assert odd.dequantize().shape == (8, 25) and odd.nbytes() == 64 * 2 * 2 + 8 * 13 * 6 // 8


# --- smoothing, rotation, activations -------------------------------------------------------------


def block_of_a_model(seed=0, heads=2):
    c = ModelConfig(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
                    num_attention_heads=2, num_key_value_heads=heads, head_dim=16,
                    max_position_embeddings=64,
                    model_type="llama")
    model = init(c, seed).requires_grad_(False)
    for p in model.parameters():
        p.mul_(8) if p.dim() == 2 else None
    tokens = torch.randint(64, (8, 32), generator=torch.Generator().manual_seed(1))
    cos, sin = (x[:32] for x in rope_table(c, "cpu"))
    return model, tokens, lambda i: (cos, sin, None, i, None, None)


def settings(**more):
    return types.SimpleNamespace(method=functools.partial(compress.rtn,
                                                          **dict(bits=4, group=16) | more))


@pytest.mark.parametrize("heads", [1, 2])
@pytest.mark.parametrize("smooth", ["awq", "smoothquant"])
def test_smoothing_changes_no_output(smooth, heads):
    model, tokens, where = block_of_a_model(heads=heads)
    compress.spread_outliers(model, 20.)
    before, old = model(tokens), {k: v.clone() for k, v in model.state_dict().items()}
    options = dict(clip=False) if smooth == "awq" else {}
    compress.SMOOTH[smooth](model, [model.embed_tokens(tokens)], where, settings(bits=3), **options)
    assert close(model(tokens), before, 1e-3)
    assert any(not torch.equal(v, old[k]) for k, v in model.state_dict().items())


def test_awq_s_scale_by_hand_and_it_helps_where_outliers_are():
    mean = torch.tensor([9., 1.1])
    s = mean ** .5
    assert close(s / (s.max() * s.min()).sqrt(), [1.691, .591], 1e-3)

    def loss(smooth):
        model, tokens, where = block_of_a_model()
        compress.spread_outliers(model, 20.)
        whole = model(tokens)
        compress.SMOOTH[smooth](model, [model.embed_tokens(tokens)], where, settings())
        for block in model.layers:
            for layer in compress.linears(block).values():
                layer.weight.copy_(compress.rounded(settings(), layer.weight))
        return ((model(tokens) - whole) ** 2).mean()
    assert loss("awq") < .5 * loss("none") and loss("smoothquant") < .5 * loss("none")


def test_smoothquant_s_scale_by_hand(monkeypatch):
    """|x| up to [10, 1.2], |W| up to [.1, .9], α .5: s = [10, 1.1547], then both are [1, 1.039]; at
    α .25 of [2, 1] and [.5, .25]: s = [2^.25 / .5^.75, 1 / .25^.75] = [2, 2.828427]"""
    stats = {"a": dict(absmax=torch.tensor([10., 1.2]))}
    layer = torch.nn.Linear(2, 1, bias=False)
    layer.weight.data = torch.tensor([[.1, .9]])
    norm = torch.nn.RMSNorm(2)
    block = torch.nn.ModuleDict(dict(a=layer, norm=norm)).requires_grad_(False)
    monkeypatch.setattr(compress, "sharing", lambda block, config: [(["a"], norm, "a")])
    compress.smooth_block(block, None, stats, 10, 20)
    assert close(1 / norm.weight, [10, 1.1547], 1e-3) and close(layer.weight, [[1, 1.0392]], 1e-3)
    stats["a"]["absmax"], layer.weight.data = torch.tensor([2., 1]), torch.tensor([[.5, .25]])
    norm.weight.fill_(1)
    compress.smooth_block(block, None, stats, 5, 20)
    assert close(1 / norm.weight, [2, 2.828427]) and close(layer.weight, [[1, .7071068]])


def test_awq_takes_the_scale_whose_rounded_part_errs_least():
    """Every exponent tried apart, on a part of two layers; the layers come back as they were."""
    x, mean = rand(50, 32, seed=1).float() * torch.linspace(.1, 4, 32), torch.linspace(.1, 4, 32)
    layers = [torch.nn.Linear(32, 8, bias=False).requires_grad_(False) for _ in range(2)]
    for seed, layer in enumerate(layers):
        layer.weight.copy_(rand(8, 32, seed=seed))
    f, tried = settings(bits=3), []
    for k in range(20):
        s = (mean ** (k / 20)).clamp(min=1e-4)
        s = s / (s.max() * s.min()) ** .5
        d = sum(((x @ (compress.rtn(layer.weight * s, bits=3, group=16).dequantize() / s
                       - layer.weight).T) * sign for layer, sign in zip(layers, (1, -1))))
        tried.append((d.square().mean().item(), s))
    old = [layer.weight.clone() for layer in layers]
    got = compress.awq_scale(lambda x: layers[0](x) - layers[1](x), layers, [x], mean, 20, f)
    best = min(range(20), key=lambda k: tried[k][0])
    assert close(got, tried[best][1]) and 0 < best < 19
    assert all(torch.equal(a.weight, b) for a, b in zip(layers, old))


@pytest.mark.parametrize("heads", [1, 2])
def test_what_awq_searches_and_clips_by_is_what_its_layers_read(heads, monkeypatch):
    """The means of |x| before the fold, H of the inputs after it, on the blocks as they are."""
    model, tokens, where = block_of_a_model(heads=heads)
    compress.spread_outliers(model, 20.)
    inputs, found = [model.embed_tokens(x) for x in tokens.split(3)], defaultdict(list)

    def read():
        x, seen = inputs, {}
        for i, block in enumerate(model.layers):
            reads = {}
            hooks = [m.register_forward_pre_hook(lambda m, args, name=name: reads.setdefault(
                name, []).append(args[0])) for name, m in block.named_modules()
                if isinstance(m, torch.nn.Linear)]
            x = [block(part, *where(i)) for part in x]
            for hook in hooks:
                hook.remove()
            seen |= {block.get_submodule(name): torch.cat(v).flatten(0, 1)
                     for name, v in reads.items()}
        return seen

    def see(name, call):
        reads = read()
        names = {m: f"{i}.{name}" for i, block in enumerate(model.layers)
                 for name, m in block.named_modules()}
        if name == "awq_scale":
            x = reads[call.layers[0]]
            assert close(call.mean, x.abs().mean(0), 1e-4 * x.abs().max().item())
            assert all(reads[layer] is not x and torch.equal(reads[layer], x)
                       for layer in call.layers[1:])
            out = call.run(*call.inputs)
            assert out.shape[0] == 3                              # the first calibration batch
            found["searched"].append([names[layer] for layer in call.layers])
            found["parts"].append(names[call.run])
        else:
            layer, = (m for m in reads if torch.equal(m.weight, call.W))
            x = reads[layer]
            assert close(call.H, 2 * x.T @ x / len(x), 1e-3 * call.H.abs().max().item())
            found["clipped"].append(names[layer])
    catch(monkeypatch, compress, "awq_scale", "clip_groups", see=see)
    compress.awq(model, inputs, where, settings())
    mlp = [["mlp.gate_proj", "mlp.up_proj"], ["mlp.down_proj"]]
    parts = [[f"self_attn.{x}_proj" for x in "qkv"], *([["self_attn.o_proj"]] * (heads == 2)), *mlp]
    assert found["searched"] == [[f"{i}.{x}" for x in part] for i in (0, 1) for part in parts]
    names = ["self_attn", *(["self_attn.o_proj"] * (heads == 2)), "mlp", "mlp.down_proj"]
    assert found["parts"] == [f"{i}.{name}" for i in (0, 1) for name in names]
    assert found["clipped"] == [f"{i}.{x}" for i in (0, 1) for part in parts for x in part
                                if x[-6:] not in ("q_proj", "k_proj")]


def test_smoothquant_takes_the_exponent_whose_rounded_model_errs_least():
    """All 21 and none, each on a model of its own: summed squared errors of the blocks' outputs."""
    model, tokens, where = block_of_a_model()
    compress.spread_outliers(model, 20.)
    f, first = settings(bits=3), model.embed_tokens(tokens)[:3]
    absmax = [{name: x["absmax"] for name, x in compress.watch(
        block, [h], where(i), ("absmax",))[1].items()}
        for i, (block, h) in enumerate(zip(model.layers, [
            model.embed_tokens(tokens), model.layers[0](model.embed_tokens(tokens), *where(0))]))]

    def smoothed(k):
        new = copy.deepcopy(model)
        for block, most in zip(new.layers, absmax) if k is not None else ():
            a, m = block.self_attn, block.mlp
            for layers, name, maker in (
                    ((a.q_proj, a.k_proj, a.v_proj), "self_attn.q_proj", block.input_layernorm),
                    ((a.o_proj,), "self_attn.o_proj", a.v_proj),
                    ((m.gate_proj, m.up_proj), "mlp.gate_proj", block.post_attention_layernorm),
                    ((m.down_proj,), "mlp.down_proj", m.up_proj)):
                top = torch.stack([x.weight.abs().amax(0) for x in layers]).amax(0)
                s = most[name] ** (k / 20) / top ** (1 - k / 20)
                for x in layers:
                    x.weight.mul_(s)
                maker.weight.div_(s[:, None] if maker.weight.dim() == 2 else s)
        return new
    errors = {}
    for k in (None, *range(21)):
        new, x, y, errors[k] = smoothed(k), first, first, 0.0
        for i, (block, old) in enumerate(zip(new.layers, model.layers)):
            for layer in compress.linears(block).values():
                layer.weight.copy_(compress.rtn(layer.weight, bits=3, group=16).dequantize())
            x, y = block(x, *where(i)), old(y, *where(i))
            errors[k] += (x - y).square().mean().item()
    best = min(errors, key=errors.get)
    want, inputs = smoothed(best), [model.embed_tokens(x) for x in tokens.split(3)]
    compress.smoothquant(model, inputs, where, f)
    assert best not in (None, 0, 20)
    assert all(close(a, b, 1e-4) for a, b in zip(model.parameters(), want.parameters()))


def test_clipping_takes_the_range_that_errs_least():
    """By each group's own d H dᵀ: 1, .95 … .55 of its largest weight, tried apart."""
    w, H = rand(2, 32).float() ** 3, moment(32).float()
    f, new = settings(bits=2), w.clone()
    compress.clip_groups(new, H, f)
    for row, start in itertools.product(range(2), (0, 16)):
        part, own = w[row:row + 1, start:start + 16], H[start:start + 16, start:start + 16]
        edges = [part.abs().max() * (1 - i / 20) for i in range(10)]
        tried = [part.clamp(-e, e) for e in edges]
        errs = [error(part, compress.rtn(t, bits=2, group=16), own) for t in tried]
        assert close(new[row:row + 1, start:start + 16], tried[errs.index(min(errs))])
    assert not close(new, w)


def test_clipping_never_errs_more_than_the_whole_range():
    w, H = rand(8, 32).float(), moment(32).float()
    w[0, 3] = 9.
    f, new = settings(bits=2), w.clone()
    compress.clip_groups(new, H, f)
    blocks = torch.block_diag(H[:16, :16], H[16:, 16:])
    assert error(w, compress.rounded(f, new), blocks) < error(w, compress.rounded(f, w), blocks)


def test_smoothing_needs_a_method_that_rounds(shared_bases):
    with pytest.raises(UserError, match="goes before --method rtn or gptq"):
        tiny("wanda", "run", "--smooth=awq")


def test_activations_in_few_bits():
    w, x = rand(16, 64).float(), rand(200, 64, seed=1).float()
    x[:, [5, 20, 40, 60]] *= 40                                            # one in each block of 16
    exact, absmax = x @ w.T, x.abs().amax(0)

    def off(**options):
        layer = compress.w4a4(w, absmax, bits=8, group=64, **options)
        return ((layer(x) - exact) ** 2).mean().item(), layer
    token, _ = off()
    block, layer = off(block=16)
    assert layer.act == (4, 16, 0) and block < token
    wide, layer = off(block=16, wide=True)
    assert layer.act == (4, 16, 0b1111) and wide < block / 10                # every block holds one
    comet, layer = off(block=16, wide=True, order=True)
    assert layer.act == (4, 16, 1) and comet < block / 10                   # in ceil(4 / 16) blocks
    assert set(layer.order[:4].tolist()) == {5, 20, 40, 60}
    assert off(rotate=32)[0] < token and off(act=8)[0] < token / 50
    for wrong in (dict(wide=True), dict(order=True, rotate=32)):
        with pytest.raises(UserError, match="wide blocks need a --block"):
            compress.w4a4(w, absmax, **wrong)
    assert [compress.largest_power(*x) for x in ((512, 24), (48, 64), (7, 8))] == [16, 16, 1]
    layer = compress.w4a4(w, absmax, rotate=32, bits=8)
    assert close(layer.dequantize(), w, .1) and layer.options["rotate"] == 32


def test_kmeans_by_hand():
    X, weight = D([[1., 0], [3, 2]]), D([[1., 1], [3, 1]])
    C, code = compress.kmeans(X, weight, 1, torch.Generator().manual_seed(0))
    assert close(C, [[2.5, 1]]) and code.tolist() == [0, 0]
    assert close(((X[0] - C[0]) ** 2 * weight[0]).sum(), 3.25)
    points = rand(5, 2, seed=4)
    cost = ((X[:, None] - points) ** 2 * weight[:, None]).sum(-1)
    assert compress.nearest_code(X, weight, points).tolist() == cost.argmin(1).tolist()
    far = torch.cat([.01 * rand(50, 2), .01 * rand(50, 2, seed=1) + 9])
    for seed in range(8):                      # k-means++: the second centre is in the other cloud
        C = compress.seeds(far, torch.ones_like(far), 16, torch.Generator().manual_seed(seed))
        assert abs(C[0] - C[1]).min() > 8
    points = rand(7, 2).repeat(9, 1)
    C, code = compress.kmeans(points, torch.ones_like(points), 16, torch.Generator().manual_seed(0))
    assert close(C[code], points, 1e-6)                              # more codes than points: exact


@pytest.mark.parametrize("K", [64, 128, 256, 200])
def test_the_nearest_of_many_codes_is_the_first_of_the_least(K):
    """in pieces, and in blocks of codes, half of which are the same"""
    X, w, C = rand(90, 3), rand(90, 3, seed=1).abs() + .1, rand(K, 3, seed=2)
    C[K // 2:] = C[:K - K // 2]
    cost = ((X[:, None] - C) ** 2 * w[:, None]).sum(-1)
    parts = torch.cat([*compress.distances(X, w, C)])
    assert close(parts - parts[:, :1], cost - cost[:, :1], 1e-9)
    code = compress.nearest_code(X, w, C)[:, None]           # of equal ones any: products round
    assert close(cost.gather(1, code), cost.amin(1, keepdim=True), 1e-9)
    assert torch.equal(compress.smallest(cost.float()), cost.float().argmin(1))


def test_many_vectors_are_clustered_in_mini_batches(monkeypatch):
    """nearly as well as all at once, from a part of the distances; the last rounds take all"""
    X, w, sizes = rand(4000, 2), rand(4000, 2, seed=1).abs() + .1, []
    nearest = compress.nearest_code
    monkeypatch.setattr(compress, "nearest_code", lambda X, w, C: sizes.append(len(X)) or nearest(
        X, w, C))

    def lost(many, rounds=60, **how):
        monkeypatch.setattr(compress, "MANY", many)
        sizes.clear()
        C, code = compress.kmeans(X, w, 64, torch.Generator().manual_seed(0), rounds, **how)
        assert torch.equal(code, nearest(X, w, C))
        return ((X - C[code]) ** 2 * w).sum().item()
    whole, rounds = lost(4000 * 64), len(sizes)
    assert set(sizes) == {4000} and 20 < rounds <= 61
    some = lost(4000 * 64 - 1)
    assert sizes == [256] * 55 + [4000] * 6
    assert lost(0, 0) > 1.3 * whole and .97 * whole < some < 1.03 * whole
    assert lost(0, 60, whole=0) < 1.12 * whole and sizes == [256] * 60 + [4000]


def test_a_mini_batch_moves_centres_by_what_they_have_seen(monkeypatch):
    """One centre, at 4, of weights 1: batches 1, 2 (mean 1.5), then 5, 8 (mean 6.5): masses 2 and
    2 * .9 + 2, and so 1.5 and 1.5 + 2 / 3.8 * 5"""
    draws = iter([torch.tensor([0, 1, 0, 1]), torch.tensor([2, 3, 2, 3])])
    monkeypatch.setattr(torch, "randint", lambda *args, **how: next(draws))
    monkeypatch.setattr(compress, "seeds", lambda X, w, K, generator: D([[4.]]))
    monkeypatch.setattr(compress, "MANY", 0)
    X = D([[1.], [2], [5], [8]])
    C, _ = compress.kmeans(X, torch.ones_like(X), 1, None, rounds=2, whole=0)
    assert close(C, [[1.5 + 4 / 7.6 * 5]], 1e-6)


def test_an_empty_cluster_restarts_at_the_point_that_is_served_worst(monkeypatch):
    """Both centres at 0: one gets all of 0, 1, 10 of weights 1, 5, .005 and moves to .841; weighted
    squared distances are then .707, .127, .420, so the other starts at 0."""
    monkeypatch.setattr(compress, "seeds", lambda X, w, K, generator: torch.zeros(2, 1).double())
    C, code = compress.kmeans(D([[0.], [1], [10]]), D([[1.], [5], [.005]]), 2, None, rounds=1)
    assert close(C, [[5.05 / 6.005], [0]], 1e-6) and code.tolist() == [1, 0, 0]


def test_a_group_of_0_is_the_whole_row():
    w, H = rand(4, 24).float(), moment(24).float()
    for method in (compress.rtn, functools.partial(compress.gptq, H=H)):
        assert close(method(w, group=0).dequantize(), method(w, group=24).dequantize())
        assert method(w, group=0).scale.shape == (4, 1)


def test_what_is_noted_of_a_layer_s_inputs():
    """Σ over batches, per token; the rows that are asked for, and h."""
    model, tokens, where = block_of_a_model()
    block, inputs = model.layers[0], [model.embed_tokens(x) for x in tokens.split(3)]
    outputs, found = compress.watch(block, inputs, where(0), ("H", "absmax", "W"),
                                    absmean=functools.partial(compress.Mean, compress.absolute))
    x = torch.cat([block.input_layernorm(y).flatten(0, 1) for y in inputs])
    got = found["self_attn.k_proj"]
    assert close(got["h"], 2 * (x ** 2).mean(0), 1e-4)
    assert close(got["H"], 2 * x.T @ x / len(x), 1e-4)
    assert close(got["absmax"], x.abs().amax(0)) and close(got["absmean"], x.abs().mean(0), 1e-5)
    assert len(outputs) == 3 and close(outputs[1], block(inputs[1], *where(0)))
    assert set(compress.watch(block, inputs, where(0), ())[1]["mlp.up_proj"]) == {"h"}


def test_more_clusters_than_points():
    C, code = compress.kmeans(rand(5, 3), torch.ones(5, 3).double(), 64,
                              torch.Generator().manual_seed(0))
    assert C.isfinite().all() and code.max() < 64


def test_dead_inputs_cost_nothing_and_count_nothing():
    w, H = rand(8, 32).float(), moment(32).float()
    w[:, 3] *= 100
    H[3] = H[:, 3] = 0
    for layer in (compress.sparsegpt(w, H, pattern="50%"), compress.gptq(w, H, bits=3, group=16),
                  compress.baq(w, H, bits=3, allocate=False)):
        assert (layer.dequantize()[:, 3] == 0).all()
    H[0, 0] = math.nan
    with pytest.raises(UserError, match="not finite"):
        compress.gptq(w, H)


def test_an_input_that_never_fires_is_worth_nothing():
    """By hand: of h [0, 4, inf, 2] the dead one stays 0, what is not finite gets the mean, 3."""
    assert close(compress.mend(D([0., 4, math.inf, 2])), [0, 4, 3, 2])
    assert close(compress.mend(D([0., 0])), [0, 0]) and close(compress.mend(D([math.nan])), [1])
    w, x = rand(8, 24).float(), rand(500, 24, seed=1).float()
    x[:, ::3] = 0
    h, g = 2 * (x ** 2).mean(0), torch.Generator().manual_seed(0)
    dead, H = h == 0, 2 * x.T @ x / 500
    assert compress.proxy(w, w * ~dead, h) == 0 and compress.proxy(w, w, 0 * h) == 0
    assert compress.proxy(w, w * dead, h) == pytest.approx(1)
    for pattern in ("2:4", "50%"):
        new = weight(compress.nowag_p(w, h, pattern=pattern))
        assert (new[:, dead] == 0).all() and (new != 0).sum() == 96
    assert error(w, new, H) < 1.2 * error(w, compress.wanda(w, h, pattern="50%"), H)
    low = compress.lowrank24(w, h, block=8)
    assert (weight(low)[:, dead] == 0).all() and error(w, low, H) < error(
        w, compress.nowag_p(w, h), H)
    trace = []
    made = weight(compress.armor(w, h, g, trace, iterations=30))
    assert made.isfinite().all() and trace[-1] < trace[0]
    assert (compress.kept(w ** 2 * h, "2:4")[:, dead] == 0).all()
    h[8:16] = 0                                          # a group of 8 that never fires: 2 bits
    assert compress.mixed(100 * w * (h == 0) + w, h, g, share=.34, group=8).width.tolist() in (
        [4, 2, 2], [2, 2, 4])
    for h in (h, 0 * h):
        made = compress.nowag_vq(w, h, g, bits=3, dim=1).dequantize()
        assert made.isfinite().all() and compress.proxy(w, made, h) < .05


def test_a_group_of_zeros_spoils_no_other_scale():
    w = .02 * rand(4, 256).float()
    w[:, :16] = 0
    g = torch.Generator().manual_seed(0)
    layer = compress.mixed(w, torch.ones(256), g, share=0.)
    alone = compress.mixed(w[:, 16:], torch.ones(240), g, share=0.)
    eye = torch.eye(240)
    assert error(w[:, 16:], layer.dequantize()[:, 16:], eye) < 1.1 * error(w[:, 16:], alone, eye)
    assert close(layer.dequantize()[:, :16], w[:, :16])


def test_lloyd_s_objective_never_rises():
    X, weight = rand(300, 2), rand(300, 2, seed=1).abs() + .05
    last = math.inf
    for rounds in range(1, 12):
        C, code = compress.kmeans(X, weight, 8, torch.Generator().manual_seed(0), rounds=rounds)
        now = ((X - C[code]) ** 2 * weight).sum().item()
        assert now <= last + 1e-9
        last = now


def test_nowag_vq_stores_what_it_says():
    w, h = rand(16, 25).float(), rand(25, seed=1).abs().float()
    layer = compress.nowag_vq(w, h, torch.Generator().manual_seed(0),
                              bits=3)                                       # dim 2, 25 padded to 26
    assert (layer.kind, layer.bits, layer.dim) == ("vq", 6,
                                                   2) and layer.dequantize().shape == w.shape
    every, g = torch.tensor([9., .01] * 12 + [9.]), torch.Generator().manual_seed(0)
    heavy, light = (compress.nowag_vq(w, every, g, bits=2, dim=2, weights=x) for x in (True, False))
    assert error(w, heavy, every.diag()) < .5 * error(w, light, every.diag())
    big = w * torch.linspace(.1, 30, 25)
    normed, plain = (compress.proxy(big, weight(compress.nowag_vq(big, h, g, bits=2, dim=1, norms=x)
                                                ).float(), h) for x in (True, False))
    assert normed < .5 * plain
    fine = compress.nowag_vq(w, h, torch.Generator().manual_seed(0), bits=8, dim=1)
    assert error(w, fine.dequantize(), torch.eye(25)) < .05 * error(w, layer.dequantize(),
                                                                    torch.eye(25))


# --- whole runs -----------------------------------------------------------------------------------

def tiny(config, out, *extra):
    return compress.main(merged("--config", f"{config},tiny", "--out", out, *extra))


def test_calibration_windows_are_slices_of_shuffled_training_text():
    c = types.SimpleNamespace(seed=5, samples=6, context=40)
    tok, docs = bytes_tokenizer(), ["ab" * 50, "cd" * 400, "ef" * 300, "gh" * 30]
    Path("mine.txt").write_text("<|endoftext|>".join(docs))
    windows = compress.calibration(c, tok, "mine.txt")
    g = torch.Generator().manual_seed(5)
    train = text.documents("mine.txt", "train")
    order = torch.randperm(len(train), generator=g).tolist()
    ids = []
    for i in order:
        ids += [tok.bos, *tok.encode(train[i]), tok.eos] if len(ids) <= 960 else []
    at = torch.randint(len(ids) - 40, (6,), generator=g)
    assert windows.tolist() == [ids[i:i + 40] for i in at.tolist()] and len(set(at.tolist())) == 6


def test_speed_is_tokens_over_seconds_of_the_longest_try(monkeypatch):
    """8 tokens in .3 s are too quick, 16 in .6 s are not; greedily, after four tokens."""
    model, now, asked = block_of_a_model()[0], [0.0], []

    def generate(model, prompts, tokens, **kw):
        asked.append((prompts, tokens, kw))
        now[0] += .0375 * tokens
    monkeypatch.setattr(compress.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(compress, "generate", generate)
    assert compress.speed(model, torch.arange(9)) == pytest.approx(16 / .6)
    assert [x[1] for x in asked] == [4, 8, 16] and asked[0][0] == [[0, 1, 2, 3]]
    assert asked[0][2] == dict(temperature=0, stop=())


def test_the_rest_of_a_model_is_stored_as_it_was_found(workdir):
    model = block_of_a_model()[0]
    save(copy.deepcopy(model).bfloat16(), bytes_tokenizer(), "half")
    assert compress.as_found(model, "half").head.dtype == torch.bfloat16


def test_a_changed_or_cut_file_is_told(shared_bases):
    tiny("rtn", "run")
    path = Path("run/step-000002/model.safetensors")
    good = path.read_bytes()
    path.write_bytes(good[:-1] + bytes([good[-1] ^ 1]))                # one bit of the last tensor
    with pytest.raises(UserError, match="changed after it was packed"):
        load("run")
    path.write_bytes(good[:-100])
    with pytest.raises(UserError, match="not a readable safetensors file"):
        load("run")
    path.write_bytes(good)
    load("run")


def test_no_method_s_argument_hides_behind_an_option_of_every_run():
    fields = {x.name for x in dataclasses.fields(compress.Config)}
    assert not [(row, fields & set(hyper(fn))) for rows in compress.AXES.values()
                for row, fn in rows.items() if fields & set(hyper(fn))]


CLAIMS = claims_of("compress").CLAIMS


@pytest.mark.parametrize("claim", CLAIMS.values(), ids=CLAIMS)
def test_every_arm_of_a_claim_is_a_configuration(claim):
    made = {arm: configure(compress.Config, compress.PRESETS, compress.AXES,
                           argv=["--config", config])
            for arm, config in claim.arms.items()}
    pickle.dumps(list(made.values()))                            # arms go to processes of their own
    seen = [str(settings_of(c, f) | dict(config="")) for c, f in made.values()]
    assert len(set(seen)) == len(seen)                                # no two arms are the same run
    named = {key.partition("|")[0] for weights in claim.tests.values() for key in weights} - {""}
    assert named <= set(claim.arms)


def test_a_finished_run_is_not_made_again_and_packed_weights_not_packed_twice(shared_bases, capsys):
    out = tiny("rtn", "run")
    assert tiny("rtn", "run", "--resume") == out and "finished already" in capsys.readouterr().out
    with pytest.raises(UserError, match="compressed already"):
        tiny("rtn", "again", "--init=run")


def test_more_bits_and_no_pruning_cost_less(shared_bases):
    loss = {bits: tiny("rtn", f"b{bits}", f"--bits={bits}")["loss_increase"] for bits in (2, 8)}
    assert abs(loss[8]) < 1e-3 and loss[2] > 5e-3
    out = tiny("magnitude", "all", "--pattern=100%")
    assert abs(out["loss_increase"]) < 1e-6 and out["bits"] == 16              # stored as it was


def test_outliers_change_nothing_but_the_statistics(shared_bases):
    plain, spiky = (tiny("dense", f"o{x}", f"--outliers={x}")["loss"] for x in (0, 20))
    assert abs(plain - spiky) < 1e-4


def test_the_real_checkpoint_2_4(stories, workdir):
    """stories260k at 2:4, real text: SparseGPT and ARMOR lose less than NoWag-P, and that than
    magnitude."""
    shutil.copy(DATA_DIR / "tinystories-30k.txt", "stories.txt")
    args = ["--init", str(stories), "--data", "stories.txt", "--samples", "8", "--windows", "16"]
    more, loss = dict(armor=["--iterations=60", "--block=4"]), {}
    for name in ("magnitude", "nowag_p", "sparsegpt", "armor"):
        argv = merged(*args, "--config", name, "--out", name, *more.get(name, []))
        loss[name] = compress.main(argv)["loss_increase"]
    assert max(loss["sparsegpt"], loss["armor"]) < loss["nowag_p"] < loss["magnitude"]


@pytest.mark.parametrize("argv, words", [
    (["--pattern=3:7"], "take a share"), (["--pattern=x"], "n:m"),
    (["--samples=0"], "--samples 0: must be at least 1"),
    (["--context=4000"], "at most"), (["--config=rtn,tiny", "--bits=5"], "choose from 2, 3, 4, 8"),
    (["--config=puzzle,tiny", "--shares=100,x"], "numbers with commas"),
    (["--outliers=-3"], "--outliers -3: must be at least 0"),
    (["--config=nowag_vq,tiny", "--bits=2", "--dim=7"], "larger than the layer"),
    (["--config=mixed,tiny", "--share=7"], "--share 7: must be at least 0 and at most 1"),
    (["--config=awq,tiny", "--points=0"], "--points"),
    (["--config=kivi,tiny", "--cache_window=5"], "multiple of the group"),
    (["--config=evicting,tiny", "--stabilizers=2"], "give a --chunk"),
    (["--config=evicting,tiny", "--chunk=4", "--stabilizers=9"], "must hold them"),
    (["--config=slimmoe,tiny", "--at_once=true", "--stages=1"], "raise --stages"),
    (["--config=slimmoe,tiny", "--kd_loss=kl"], "no kd_loss 'kl'"),
    (["--config=slimmoe,tiny", "--kd_steps=0", "--kd_lr=1"], "for methods that distil"),
    (["--kd_lr=1"], "for methods that distil"), (["--k=4"], "for methods that distil"),
    (["--keep=3"], "save more than once"),
    (["--config=kivi,tiny", "--cache_bits=3"], "choose from 1, 2, 4, 8"),
    (["--config=gptq,tiny", "--damp=-1"], "--damp -1: must be above 0"),
    (["--method=armour"], "did you mean 'armor'"), (["--context=1"], "at least 2"),
    (["--config=slimmoe,tiny", "--smooth=awq"], "rtn or gptq"),
    (["--config=minitron,tiny", "--sequential=true"], "a layer at a time"),
    (["--domain=x"], "methods that read gradients"),
    (["--config=w4a4,tiny", "--smooth=awq"], "rtn or gptq"),
    (["--config=rtn,tiny", "--init=base:pretrain_moe"], "has experts"),
    (["--config=slimmoe,tiny", "--outliers=20"], "has experts"),
    (["--config=nowag_vq,tiny", "--bits=9", "--dim=2"], "1 to 16 bits")])
def test_clear_errors(argv, words, shared_bases):
    base = [] if any("config" in x for x in argv) else ["--config=nowag_p,tiny"]
    with pytest.raises(UserError, match=words):
        compress.main(merged(*base, *argv))
