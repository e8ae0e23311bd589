"""sft.py's layers of few bits and few weights: rounding, gradients, schedules, what they keep."""
import copy
import math
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import sft
from conftest import close, rand
from data.run import UserError
from kernels import EXPONENTS, ROUNDINGS, absmax, hadamard, mxfp4, power_of_two, rotate
from sft import (LostLinear, Masks, QATLinear, QuartetLinear, fake_quant, halo_product, journey,
                 lost_product, lost_sizes, lost_start, prune, prune_at, prune_schedule,
                 qat_fraction, qat_share, quartet_product, unbiased_mx4)


def gradients(fn, X, W, E):
    """Y, dX, dW of fn(X, W) under the upstream gradient E."""
    X, W = X.clone().requires_grad_(), W.clone().requires_grad_()
    Y = fn(X, W)
    Y.backward(E)
    return Y.detach(), X.grad, W.grad


def exact(X, W):
    """The product that all others approximate."""
    return X @ W.T


# --- MXFP4 ----------------------------------------------------------------------------------------


def test_stochastic_rounding_is_unbiased_and_never_clips():
    x, g = rand(2, 64), torch.Generator().manual_seed(0)
    mean = sum(unbiased_mx4(x.expand(1000, 2, 64), g).mean(0) for _ in range(20)) / 20
    assert close(mean, x, 8e-3) and (mean - x).abs().mean() < 1.5e-3                  # 20,000 draws
    assert (unbiased_mx4(x, g, nearest=True) - x).abs().mean() > 0.04               # nearest is not
    s = 4 / 3 * power_of_two(absmax(x.view(2, 2, 32)), torch.float64)
    assert (x.view(2, 2, 32).abs().amax(-1) / s).max() < 6


# --- HALO -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("level", [0, 1, 2])
@pytest.mark.parametrize("N, n, m", [(1, 8, 4), (50, 48, 20), (130, 64, 96)])
def test_halo_without_rounding_is_a_linear_layer(level, N, n, m):
    X, W, E = rand(N, n), rand(m, n, seed=1), rand(N, m, seed=2)
    for a, b in zip(gradients(lambda X, W: halo_product(X, W, level=level,
                                                        format="float32"), X, W, E),
                    gradients(exact, X, W, E)):
        assert close(a, b, 1e-10)


def test_a_layer_s_rows_and_bias_are_those_of_a_linear_layer():
    x, W, b = rand(2, 5, 8), rand(4, 8, seed=1), rand(4, seed=2)
    assert close(sft.flat_product(exact, x, W, b), nn.functional.linear(x, W, b))
    assert close(sft.flat_product(exact, x, W, None), x @ W.T)
    half = sft.flat_product(exact, x.bfloat16(), W.float(), b.float())
    assert half.dtype == torch.bfloat16
    layer, x = nn.Linear(32, 32), torch.randn(3, 32, generator=torch.Generator().manual_seed(0))
    layer.bias.data.fill_(3.0)
    for other in (sft.HaloLinear(layer, 0, "float32"), QuartetLinear(layer)):
        assert other.merged().bias is layer.bias and torch.equal(other.merged()(x), layer(x))
        assert (other(x) - layer(x)).abs().mean() < 0.1


def test_halo_rounds_what_its_table_says():
    X, W, E = rand(40, 64), rand(32, 64, seed=1), rand(40, 32, seed=2)
    q = ROUNDINGS["fp6"]
    made = {level: gradients(lambda X, W: halo_product(X, W, level=level, format="fp6"), X, W, E)
            for level in (0, 1, 2)}
    turned = q(X @ hadamard(64, torch.float64)) @ q(W @ hadamard(64, torch.float64)).T
    dX, dW = q(E) @ q(W), q(E).T @ q(X)
    H = hadamard(64, torch.float64)                      # 40 tokens: one block of 64, with zeros
    left = (H @ (q(H @ nn.functional.pad(E, (0, 0, 0, 24))) @ q(W)))[:40]
    for level, (Y, gX, gW) in made.items():
        assert close(Y, q(X) @ q(W).T if level == 0 else turned, 1e-10)
        assert close(gX, dX if level < 2 else left, 1e-10) and close(gW, dW, 1e-10)
    H = hadamard(32, torch.float64)                      # 32 tokens: a whole block, no zeros
    turned = gradients(lambda X, W: halo_product(X, W, format="fp6"), X[:32], W, E[:32])[1]
    assert close(turned, H @ (q(H @ E[:32]) @ q(W)), 1e-10)


def test_rotation_helps_where_a_channel_or_a_token_is_large():
    X, W, E = rand(128, 64), rand(32, 64, seed=1), rand(128, 32, seed=2)
    X[:, 3] *= 20
    E[5] *= 50

    def error(level):
        made = gradients(lambda X, W: halo_product(X, W, level=level), X, W, E)
        return [(a - b).norm().item() for a, b in zip(made, gradients(exact, X, W, E))]
    plain, forward, both = (error(level) for level in (0, 1, 2))
    assert forward[0] < 0.5 * plain[0] and both[0] == forward[0]
    assert forward[1] == plain[1] and both[1] < 0.8 * plain[1]


def test_mxfp4_products_are_grouped_along_what_is_summed():
    X, W, E = rand(64, 32), rand(96, 32, seed=1), rand(64, 96, seed=2)
    Y, dX, dW = gradients(lambda X, W: halo_product(X, W, level=0, format="mxfp4"), X, W, E)
    assert close(Y, mxfp4(X) @ mxfp4(W).T, 1e-10) and close(dX, mxfp4(E) @ mxfp4(W.T).T, 1e-10)
    assert close(dW, mxfp4(E.T) @ mxfp4(X.T).T, 1e-10)


# --- Quartet --------------------------------------------------------------------------------------


def test_quartet_without_rounding_is_a_linear_layer(monkeypatch):
    """the rotated basis, the random one and the padded tokens all cancel"""
    monkeypatch.setattr(sft, "e2m1", lambda x, noise=None: x)
    X, W, E = rand(50, 64), rand(96, 64, seed=1), rand(50, 96, seed=2)
    monkeypatch.setitem(EXPONENTS, "quest", lambda x: absmax(x) + 1)        # nothing clips
    found = gradients(lambda X, W: quartet_product(X, W, 7), X, W, E)
    for a, b in zip(found, gradients(exact, X, W, E)):
        assert close(a, b, 1e-10)


def test_quartet_s_gradients_are_unbiased_and_none_reaches_what_clipped():
    X, W, E = rand(32, 32), rand(32, 32, seed=1), rand(32, 32, seed=2)
    X[0], X[0, 0] = 0, 60  # rotated: a constant, which has no deviation
    X[1] = hadamard(32, torch.float64)[4] * 40           # rotated: one coordinate, which does
    (x, x_in), (w, w_in) = (sft.clipped_mx4(a, "quest") for a in (X, W))
    wanted = rotate((E @ w) * x_in, 32), rotate((E.T @ x) * w_in, 32)
    assert not sft.clipped_mx4(X, "quest_floor")[1][0].any()
    assert not x_in[1, 4] and x_in[0].all() and close(quartet_product(X, W), x @ w.T, 1e-10)
    total = [0, 0]
    for seed in range(400):
        for i, g in enumerate(gradients(lambda X, W: quartet_product(X, W, seed), X, W, E)[1:]):
            total[i] = total[i] + g / 400
            if i == 0:
                assert rotate(g, 32)[1, 4].abs() < 1e-12
    once = gradients(lambda X, W: quartet_product(X, W, 1), X, W, E)[1:]
    for mean, g, b in zip(total, once, wanted):
        assert (mean - b).norm() < 0.08 * (g - b).norm()                             # 1/√400 is .05
    same = [gradients(lambda X, W: quartet_product(X, W, 3), X, W, E)[1] for _ in "ab"]
    assert torch.equal(*same) and not torch.equal(same[0], once[0])


def test_quartet_s_layer_draws_by_step_and_forward():
    layer = QuartetLinear(nn.Linear(32, 32, bias=False), seed=5)
    x = torch.randn(4, 8, 32, generator=torch.Generator().manual_seed(0))

    def weight_gradient(step):
        layer.begin(step)
        out = []
        for _ in "ab":
            layer.weight.grad = None
            layer(x).pow(2).sum().backward()
            out.append(layer.weight.grad.clone())
        return out
    a, b, c = weight_gradient(1), weight_gradient(2), weight_gradient(1)
    assert torch.equal(a[0], c[0]) and torch.equal(a[1], c[1])                 # after a resume, too
    assert not torch.equal(a[0], a[1]) and not torch.equal(a[0], b[0])
    assert torch.equal(layer.merged().weight, layer.weight)
    with pytest.raises(UserError, match="no multiple"):
        QuartetLinear(nn.Linear(40, 32))


# --- QAT ------------------------------------------------------------------------------------------


def test_weights_are_rounded_by_output_and_the_gradient_passes():
    W = torch.tensor([[-.9, -.2, .3, .6], [2., 1, 0, -.4]], requires_grad=True)
    assert close(fake_quant(W, 2).detach(), [[-.9, 0, 0, .9], [2, 0, 0, 0]])
    assert close(fake_quant(W, 1).detach(), [[-.5, -.5, .5, .5], [.85, .85, .85, -.85]])
    assert close(fake_quant(W[:1], 3).detach(), [[-.9, -.3, .3, .6]])
    for bits in range(1, 9):
        W.grad = None
        (fake_quant(W, bits) * torch.arange(8.).view(2, 4)).sum().backward()
        assert close(W.grad, torch.arange(8.).view(2, 4), 0)
        levels = set(fake_quant(torch.linspace(-1, 1, 9999)[None], bits).flatten().tolist())
        assert len(levels) == max(2, 2 ** bits - 1)


def test_a_qat_layer_rounds_when_told_and_is_saved_rounded():
    linear, x = nn.Linear(8, 4), torch.randn(3, 8, generator=torch.Generator().manual_seed(0))
    layer = QATLinear(linear, 2)
    assert torch.equal(layer(x), linear(x)) and layer.weight is linear.weight
    layer.rounding = True
    merged = layer.merged()
    assert torch.equal(layer(x), merged(x))
    assert torch.equal(merged.weight, fake_quant(linear.weight, 2))
    assert not torch.equal(layer(x), linear(x)) and torch.equal(merged.bias, linear.bias)


def test_the_compute_optimal_share():
    for S, f in ((10, .054), (40, .161), (100, .232), (200, .281), (400, .325), (2000, .413)):
        assert abs(qat_fraction(1, S * .25, 2) - f) < 1e-3
    assert abs(qat_fraction(1e6, 1e8, 4) - .28) < 2e-3
    D = [qat_fraction(1e6, d, 4) for d in (1e5, 1e6, 1e7, 1e8, 1e9, 1e15)]
    assert D == sorted(D) and D[0] == .02 and D[1] == .02 and 0 < D[-1] < 1
    assert qat_fraction(2e6, 1e8, 4) < qat_fraction(1e6, 1e8, 4) < qat_fraction(1e6, 1e8, 2)
    model = nn.Sequential(QATLinear(nn.Linear(10, 10), 2), QATLinear(nn.Linear(10, 30), 2),
                          nn.Linear(30, 2))
    assert qat_share(model, 0.0, 1e4) == qat_fraction(400, 1e4, 2)
    assert qat_share(model, -1.0, 1e4) == 0
    assert qat_share(model, 0.3, 1e4) == 0.3 and qat_share(nn.Linear(2, 2), 0.0, 1e4) == 0


# --- LOST -----------------------------------------------------------------------------------------


def test_lost_reproduces_the_layer_when_rank_or_columns_cover_it():
    W, x, g = rand(12, 8), rand(3, 8, seed=1), torch.Generator().manual_seed(0)
    same = dict(gamma=.5, phi="identity")
    assert close(2 * lost_product(x, *lost_start(W, 8, 0, g), **same), x @ W.T,
                 1e-10)                                                           # rank 8: all of W
    A, B, columns, where = lost_start(W, 3, 8, g)
    assert close(2 * lost_product(x, 0 * A, B, columns, where, **same), x @ W.T,
                 1e-10)                                                                # all columns
    rest = W - B @ A
    assert close(torch.linalg.matrix_norm(rest, 2), torch.linalg.svdvals(W)[3], 1e-9)
    _, _, columns, where = lost_start(W, 3, 2, g)
    assert set(where.tolist()) == set(rest.norm(dim=0).topk(2).indices.tolist())
    assert torch.equal(columns, W[:, where])             # W's own values, not the residual's


def test_lost_by_hand_and_its_gradients():
    one = torch.ones(1, 1, dtype=torch.float64)
    x, where = torch.tensor([[1., 5.]]).double(), torch.tensor([1])
    got = lost_product(x, torch.tensor([[2., 0]]).double(), 3 * one, 4 * one, where)
    assert close(got, [[.7 * 3 * (2 / (1 + math.exp(-2))) + .3 * 4 * 5]])
    layer = LostLinear(nn.Linear(16, 12), 4, 2, torch.Generator().manual_seed(0))
    layer(torch.randn(3, 16)).sum().backward()
    assert {n for n, p in layer.named_parameters()
            if p.grad is not None} == {"A", "B", "columns", "bias"}
    assert sum(p.numel() for n, p in layer.named_parameters()
               if n != "bias") == 4 * (16 + 12) + 2 * 12


@pytest.mark.parametrize("start", ["svd", "random"])
def test_lost_without_phi_merges_and_with_it_does_not(start):
    x = torch.randn(3, 16, generator=torch.Generator().manual_seed(1))
    for phi in ("identity", "silu"):
        layer = LostLinear(nn.Linear(16, 12), 4, 2, torch.Generator().manual_seed(0), .9, phi,
                           start)
        merged = copy.deepcopy(layer).merged()
        assert isinstance(merged, nn.Linear) == (phi == "identity")
        assert close(merged(x), layer(x), 1e-5)


def test_the_random_start_has_the_layer_s_deviation():
    W = 0.02 * torch.randn(128, 64, generator=torch.Generator().manual_seed(0))
    A, B, _, _ = lost_start(W, 16, 4, torch.Generator().manual_seed(0), "random")
    assert abs((B @ A).std() / W.std() - 1) < 0.1


def test_lost_s_sizes_have_equal_parameters():
    assert lost_sizes(64, 64, .55, .05) == (16, 3)       # the paper's n/4, 5 % of the columns
    for n, m in ((64, 64), (64, 192), (192, 64), (64, 32)):
        for columns in (0.0, .05, .2):
            rank, k = lost_sizes(n, m, .55, columns)
            assert abs(rank * (n + m) + k * m - .55 * n * m) <= (n + m) / 2
            assert k == round(columns * n)


# --- pruning while training -----------------------------------------------------------------------


def test_the_schedule_of_sparsity():
    got = [prune_schedule(p, .8) for p in (0, .25, .375, .5, .75, 1)]
    assert close(got, [0, 0, .8 * (1 - .75 ** 3), .7, .8, .8], 1e-12)
    assert [prune_schedule(p, .8, 1, 1) for p in (0, .999, 1)] == [0, 0, .8]
    assert prune_schedule(0, .8, 0, 0) == .8 and prune_schedule(.6, 0.0) == 0
    for s, mean in ((.5, .6875), (.8, .5)):              # in steps: N_avg/N = 1 - .625 s
        assert close(1 - sum(prune_schedule((i + .5) / 4000, s) for i in range(4000)) / 4000, mean,
                     1e-6)
    density = [1 - prune_schedule((i + .5) / 4000, .8) for i in range(4000)]
    at = [sum(density[:i]) / sum(density) for i in (1000, 3000)]
    assert close(at, [.5, .9], 1e-3)                     # of the compute, were it placed in steps


@pytest.mark.parametrize("begin, end", [(.25, .75), (0, .5), (.5, 1), (0, 0), (1, 1), (.3, .3)])
def test_pruning_is_placed_in_compute(begin, end):
    steps = 1000
    s = [prune_at(k, steps, .8, begin, end) for k in range(steps + 1)]
    cost = [1 - x for x in s[:-1]]
    assert s == sorted(s) and s[-1] == .8
    for k in range(0, steps, 50):
        assert abs(s[k] - prune_schedule(sum(cost[:k]) / sum(cost), .8, begin,
                                         end)) < .03 or begin == end
    if begin == end == .3:
        first = next(k for k, x in enumerate(s) if x)
        assert abs(sum(cost[:first]) / sum(cost) - .3) < .01 and set(s) == {0, .8}
    assert {journey(k, 50, sparsity=0.0) for k in range(51)} == {0}
    assert all(len(set(s[k:k + 10])) == 1 for k in range(0, steps - 10, 10))     # 1 % of the steps
    assert s[990] <= s[1000] == .8


def test_masks_are_monotone_and_exact():
    weights = {"a": rand(7, 9), "b": rand(4, 4, seed=1)}
    first = prune(weights, {}, .35)
    assert all(w[first[k]].abs().min() > w[~first[k]].abs().max() for k, w in weights.items())
    masks = {}
    for target, s in ((.1, .1), (.35, .35), (.5, .5), (.3, .5), (.8, .8)):          # never one back
        old, masks = masks, prune(weights, masks, target)
        for name, mask in masks.items():
            assert (~mask).sum() == round(s * mask.numel())
            assert not (mask & ~old.get(name, mask)).any()
        weights = {k: w + rand(*w.shape, seed=9) for k, w in weights.items()}   # also where it is 0
    assert all(m.all() for m in prune(weights, {}, 0.0).values())


def test_masks_reach_moments_and_gradients():
    weights = {"a_proj.weight": nn.Parameter(rand(3, 4)),
               "b_proj.weight": nn.Parameter(rand(3, 4, seed=1))}
    model = SimpleNamespace(named_parameters=lambda: weights.items())
    stacks = [SimpleNamespace(units=[SimpleNamespace(name=name) for name in weights],
                              state=dict(m=torch.ones(2, 3, 4), t=3, low=torch.ones(2, 1, 4))),
              SimpleNamespace(units=[SimpleNamespace(name="norm")], state=dict(m=torch.ones(1, 4))),
              SimpleNamespace(units=[SimpleNamespace(name=x) for x in ("a_proj.weight", "embed")],
                              state=dict(m=torch.ones(2, 3, 4)))]
    schedule = partial(journey, sparsity=.25, begin=0.0, end=0.0)
    keeper = Masks(None, SimpleNamespace(prune=schedule), model, SimpleNamespace(stacks=stacks),
                   dict(steps=4))
    assert keeper.end(0) == dict(sparsity=.25)
    assert all(torch.equal(keeper.masks[k], v) for k, v in prune(weights, {}, .25).items())
    sum((w ** 2 + w).sum() for w in weights.values()).backward()
    keeper.backward()
    for i, name in enumerate(weights):
        gone = ~keeper.masks[name]
        assert not weights[name].grad[gone].any() and not weights[name][gone].any()
        assert torch.equal(stacks[0].state["m"][i], keeper.masks[name].float())
        assert weights[name].grad.any()
    assert stacks[0].state["low"].all() and stacks[1].state["m"].all()
    assert stacks[2].state["m"][1].all()                 # an embedding of the same shape
    assert keeper.report() == dict(sparsity=.25, mean_density=.75)
