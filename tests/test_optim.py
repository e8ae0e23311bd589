"""optim.py: the rules' worked numbers, limits, invariances; the walker's groups, state, errors."""
import io
import math
import re
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import nn

import optim
from data.run import UserError, hyper
from data.tokenizer import bytes_tokenizer
from kernels import newton_schulz
from model import init, preset
from optim import (CHECKS, DECAYS, ELEMENTWISE, RULES, Optimiser, Ranks, StoredLinear, adamw,
                   apollo, apollo_mini, classp, dion, eco, eco_sgd, fira, frugal, frugal_columns,
                   galore, gradnormlorp, lion, lionk, memory_report, muon, normuon, optimiser,
                   param_groups, qgalore, set_lr, shampoo, signsgd, soap, store_int8)

F64 = torch.float64
W0 = torch.tensor([[1, 2], [3, 4]], dtype=F64)                       # the specs' fixture
G1 = torch.tensor([[.1, -.2], [.3, .4]], dtype=F64)
G2 = torch.tensor([[-.1, .1], [.2, 0]], dtype=F64)
MATRIX_RULES = sorted(RULES.keys() - {"frugal"})
LOW_RANK = ("galore", "qgalore", "fira", "gradnormlorp", "apollo", "dion")


def net(family="qwen2"):
    """A new model of one layer of width 64."""
    return init(preset("1x64", bytes_tokenizer(), 32, family), 0)


def opt_of(rule, *params, lr=0.01, weight_decay=0.0, decay="decoupled", seed=0, **kw):
    """An Optimiser of one group."""
    group = dict(params=list(params), rule=partial(rule, **kw), lr=lr, weight_decay=weight_decay)
    return Optimiser([group], decay=decay, seed=seed)


def walk(rule, grads, W=W0, state=(), **kw):
    """W after one step a gradient, and the state."""
    p = nn.Parameter(W.clone())
    opt = opt_of(rule, p, **kw)
    opt.stacks[0].state |= dict(state)
    for g in grads:
        p.grad = g.clone()
        opt.step()
    return p.detach(), opt.stacks[0].state


def direction(rule, g, state=None, shape=None, **kw):
    """What a rule says of one matrix in its first step."""
    s = dict(t=1) | (state or {})
    given = dict(g=g[None], s=s, ranks=Ranks(shape or g.shape), lr=kw.pop("lr", 0.01),
                 W=kw.pop("W", g)[None], seeds=[7], block=kw.pop("block", 1), place=([0], 1, 0))
    return rule(**{k: given[k] for k in optim.needs(rule)}, **kw)[0]


def close(x, wanted, atol=1.1e-6):
    """Whether x equals what the spec writes to 6 digits."""
    return torch.allclose(x.double(), torch.tensor(wanted, dtype=F64), rtol=0, atol=atol)


# --- worked numbers -------------------------------------------------------------------------------

ADAM = dict(lr=0.1, weight_decay=0.01, b2=0.999)


@pytest.mark.parametrize("rule, grads, kw, wanted", [
    (adamw, [G1], ADAM, [[.899, 2.098], [2.897, 3.896]]),
    (adamw, [G1, G2], ADAM, [[.903364, 2.122536], [2.797068, 3.825098]]),
    (lion, [G1], dict(lr=.1, weight_decay=.1), [[.89, 2.08], [2.87, 3.86]]),
    (lion, [G1, G2], dict(lr=.1, weight_decay=.1), [[.9811, 1.9592], [2.7413, 3.7214]]),
    (muon, [G1], dict(lr=.02, scale="original"), [[.984228, 2.013752], [2.988267, 3.990286]]),
    (muon, [G1], dict(lr=.02, weight_decay=.1), [[.993539, 1.999890], [2.990681, 3.989253]]),
    (optim.adam_mini, [G1], dict(lr=.1, b2=.999), [[.936754, 2.126491], [2.915147, 3.886863]]),
    (galore, [G1], dict(rank=1), [[1.001314, 2.002126], [2.998686, 3.997874]]),
    (fira, [G1], dict(rank=1, alpha=1.), [[.991496, 2.017008], [2.993976, 3.991968]]),
    (fira, [G1], dict(rank=1), [[.991496, 2.017008], [2.993976, 3.991968]]),
    (frugal_columns, [G1], dict(lr=1e-3, density=.5), [[.999, 2.001], [2.999, 3.999]]),
    (classp, [G1], dict(lr=.1, threshold=.05, p=2.), [[1, 2], [2.900006, 3.900003]]),
    (classp, [G1, torch.tensor([[-.3, .1], [.3, 0]], dtype=F64)], dict(lr=.1, threshold=.05, p=2.),
     [[1.099994, 2], [2.829297, 3.900003]]),
], ids=lambda x: getattr(x, "__name__", None))
def test_the_specs_worked_steps(rule, grads, kw, wanted):
    assert close(walk(rule, grads, **kw)[0], wanted)


def test_soap_by_hand():
    """the spec's step ends in one decay of λ .01: the code it is from has none in its first call"""
    W = walk(soap, [G1, G2], lr=3e-3)[0]
    assert close(W * (1 - 3e-3 * .01), [[1.001867, 1.996145], [2.996115, 3.997983]])


def test_the_specs_worked_states():
    assert close(walk(lion, [G1, G2], lr=.1)[1]["m"][0], [[-1e-5, -9.8e-4], [4.97e-3, 3.96e-3]],
                 1e-9)
    assert close(walk(classp, [G1], threshold=.05, p=2.)[1]["h"][0], [[0, 0], [.09, .16]])
    W, s = walk(dion, [G1], rank=1, state=dict(m=torch.zeros(1, 2, 2, dtype=F64),
                                               Q=torch.ones(1, 2, 1, dtype=F64)))
    assert close(W, [[1.000784, 2.001177], [2.994509, 3.991763]])
    assert close(s["m"][0], [[.102, -.197], [.286, .379]])
    P = walk(galore, [G1], rank=1)[1]["P"][0]
    assert close(P * P[0, 0].sign(), [[.525731, .850651]])


@pytest.mark.parametrize("kappa, wanted", [
    ("l2", [[.182574, -.365148], [.547723, .730297]]),
    ("l1.5", [[.388724, -.549739], [.673289, .777448]]),
    ("l1", [[1, -1], [1, 1]]), ("nuclear", [[.788576, -.687614], [.586652, .485690]])])
def test_lion_k_s_norms(kappa, wanted):
    assert close(direction(lionk, G1, kappa=kappa, rms_match=False), wanted)
    matched = direction(lionk, G1, kappa=kappa)
    assert matched.square().mean().item() == pytest.approx(1.0)                      # as the sign's


def test_apollo_by_hand(monkeypatch):
    """P = (.6, -.8): R = (.22, -.14)"""
    monkeypatch.setattr(optim, "gauss", lambda *_: torch.tensor([[[.6, -.8]]], dtype=F64))
    assert close(walk(apollo, [G1], rank=1)[0], [[.995455, 2.009090], [2.978576, 3.971435]])
    assert close(walk(apollo_mini, [G1])[0], [[.938654, 2.122692], [2.815962, 3.754617]])


def test_normuon_by_hand(monkeypatch):
    """two neurons of unequal size become equal at once; then each is measured by its own past"""
    monkeypatch.setattr(optim, "orthogonalise", lambda U, ranks, steps: U)
    O1 = torch.tensor([[[.6, .8, 0, 0], [0, 0, .3, .4]]], dtype=F64)
    O2 = torch.tensor([[[.3, .4, 0, 0], [0, 0, .6, .8]]], dtype=F64)
    s = dict(t=1)
    step = partial(normuon, s=s, ranks=Ranks((2, 4)), b1=0.0)
    assert close(.01 * step(O1)[0], [[.0024, .0032, 0, 0], [0, 0, .0024, .0032]])
    assert close(s["v"].flatten(), [.0125, .003125])
    assert close(.01 * step(O2)[0], [[.001537, .002049, 0, 0], [0, 0, .003026, .004035]])
    assert close(s["v"].flatten(), [.015, .015469])
    kept = normuon(O1, dict(t=1), Ranks((2, 4)), b1=0.0, scale="original")
    assert kept.norm().item() == pytest.approx(1.118034, abs=1e-6)                         # |O|_F


def test_newton_schulz_by_hand():
    assert close(newton_schulz(.0975 * G1), [[.788576, -.687614], [.586652, .485690]])
    tall = torch.tensor([[.1, -.2], [.3, .4], [-.2, .1]], dtype=F64)
    assert close(newton_schulz(tall),
                 [[.309141, -.436301], [.544305, .681043], [-.503347, .275618]])
    for sigma, wanted in ((1, .6964), (.5, .7654), (.1, .7121), (.01, .6989), (.001, .4705)):
        both = torch.tensor([sigma, math.sqrt(1 - sigma ** 2)], dtype=F64)
        spread = torch.diag(both)                                                        # |.|_F = 1
        assert newton_schulz(spread)[0, 0].item() == pytest.approx(wanted, abs=1e-4)


def test_gradnormlorp_by_hand():
    """g_rho, and in the tangent part nothing along V; the exact form has rho as a factor"""
    rho = optim.norm(W0, -1)
    V = W0 / rho
    g_rho = (V * G1).sum(-1, keepdim=True)
    assert close(g_rho[:, 0], [-.134164, .5]) and close(G1 - V * g_rho, [[.16, -.08], [0, 0]])
    lr = 1e-6  # to first order: dW = drho V + rho dV
    d = direction(gradnormlorp, G1, W=W0, lr=lr, rank=2, eps=1e-30)
    assert close((d * V).sum(-1) / g_rho[:, 0].sign(), [1, 1], 1e-4)       # Adam's first step is ±1
    assert close(optim.norm(W0 - lr * d, -1)[:, 0] - rho[:, 0], [lr, -lr], 1e-11)


def test_eco_gives_the_rounding_error_to_the_momentum():
    """grid 1/4, nothing moves, and m holds the whole step: W - lr μ/(1-μ) m is where W should be"""
    e = -0.1 * 0.1 * G1                                                  # W - lr m rounds back to W
    s = dict(t=1, m=(0.1 * G1)[None].clone())
    optim.feed_sgd(e[None], s, 0.1, 1.0, 0.1, momentum=0.9)
    assert close(s["m"][0], [[.011111, -.022222], [.033333, .044444]])
    assert close(W0 - 0.1 * 0.9 / 0.1 * s["m"][0], [[.99, 2.02], [2.97, 3.96]])
    s = dict(t=1)
    d = eco(G1[None], s)
    optim.feed_adam(-0.01 * d, s, 0.01, 1.0, 0.01, b1=0.9, b2=0.999, eps=1e-8)
    assert close(s["m"][0], [[.011111, -.022222], [.033333, .044444]])


# --- limits: each rule equals one that is trusted already -----------------------------------------


def random_walk(shape, n, seed=0, dtype=F64):
    """n random gradients."""
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=g, dtype=dtype) for _ in range(n)]


@pytest.mark.parametrize("path", ["rule", "fused"])
def test_adamw_is_pytorch_s(path):
    p, q = (nn.Parameter(torch.arange(12, dtype=F64).view(3, 4)) for _ in range(2))
    ours = opt_of(adamw, p, lr=.03, weight_decay=.1, decay="decoupled")
    theirs = torch.optim.AdamW([q], lr=.03, betas=(.9, .95), eps=1e-8, weight_decay=.1)
    s = dict(t=0)
    for g in random_walk((3, 4), 20):
        q.grad = g.clone()
        theirs.step()
        if path == "fused":
            p.grad = g.clone()
            ours.step()
        else:
            s["t"] += 1
            p.data.mul_(1 - .03 * .1).sub_(.03 * adamw(g[None], s)[0])
    assert (p - q).abs().max() < 1e-12


def test_adamw_in_float32_is_pytorch_s_fused_kernel_bit_for_bit():
    m, n = net(), net()
    ours = optimiser(m, lr=1e-2, weight_decay=.1)
    matrices = [p for p in n.parameters() if p.dim() >= 2]
    vectors = [p for p in n.parameters() if p.dim() < 2]
    theirs = torch.optim.AdamW([dict(params=matrices, weight_decay=.1),
                                dict(params=vectors, weight_decay=0.0)],
                               lr=1e-2, betas=(.9, .95), fused=True)
    for seed in range(3):
        for (p, q), g in zip(zip(m.parameters(), n.parameters()), range(99)):
            p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(99 * seed + g))
            q.grad = p.grad.clone()
        ours.step(), theirs.step()
    assert all(torch.equal(p, q) for p, q in zip(m.parameters(), n.parameters()))


@pytest.mark.parametrize("shape", [(6, 4), (4, 6), (5, 5)])
@pytest.mark.parametrize("scale, theirs", [("original", "original"), ("rms", "match_rms_adamw")])
def test_muon_is_pytorch_s(shape, scale, theirs, monkeypatch):
    """exactly, once both orthogonalise in float64 (PyTorch's does it in bfloat16)"""
    monkeypatch.setattr(torch.optim._muon, "_zeropower_via_newtonschulz",
                        lambda g, *_: newton_schulz(g))
    p, q = (nn.Parameter(torch.ones(shape, dtype=F64)) for _ in range(2))
    other = torch.optim.Muon([q], lr=.02, weight_decay=.1, momentum=.95, nesterov=True,
                             adjust_lr_fn=theirs)
    ours = opt_of(muon, p, lr=.02, weight_decay=.1, scale=scale)
    for g in random_walk(shape, 5):
        p.grad, q.grad = g.clone(), g.clone()
        ours.step(), other.step()
    assert (p - q).abs().max() < 1e-12


def test_shampoo_without_memory_is_muon_s_exact_limit():
    """first step, no momentum: the polar factor"""
    wanted = [[.707107, -.707107], [.707107, .707107]]
    assert close(direction(shampoo, G1, b1=0.0, graft=False, eps=1e-12), wanted, 1e-5)
    assert direction(shampoo, G1).square().mean().sqrt().item() == pytest.approx(.2)


def test_soap_in_a_fixed_identity_basis_is_adam():
    a, b = dict(t=1), dict(t=1)
    grads = random_walk((4, 3), 9)
    soap(grads[0][None], a, every=99)
    a["Q_L"], a["Q_R"] = torch.eye(4, dtype=F64)[None], torch.eye(3, dtype=F64)[None]
    for t, g in enumerate(grads, 1):
        a["t"], b["t"] = t + 1, t
        d = optim.adam_hf(g[None], b, .95, .95, 1e-8) * optim.correction(t, .95, .95)
        assert torch.allclose(soap(g[None], a, every=99), d, atol=1e-12)


def test_soap_turns_with_the_problem():
    """G -> U G V turns every step; the first call leaves W; Q stays orthogonal"""
    U, V = (torch.linalg.qr(random_walk((n, n), 1, seed=n)[0])[0] for n in (4, 3))
    a, b = dict(t=0), dict(t=0)
    for i, g in enumerate(random_walk((4, 3), 30, seed=3)):
        a["t"] = b["t"] = i + 1
        x, y = soap(g[None], a, every=1), soap((U @ g @ V)[None], b, every=1)
        assert torch.allclose(U @ x @ V, y, atol=1e-6) and (i or not x.any())
    for Q in (a["Q_L"], a["Q_R"]):
        assert torch.allclose(Q.mT @ Q, torch.eye(Q.size(-1), dtype=F64), atol=1e-9)


def test_adam_mini_s_blocks():
    """rows of one number are AdamW; a whole head shares one second moment"""
    column = random_walk((5, 1), 1)[0]
    assert torch.allclose(direction(optim.adam_mini, column), direction(adamw, column))
    heads = direction(optim.adam_mini, G1, block=2, eps=0.0)
    assert torch.allclose(heads, G1 / G1.square().mean().sqrt())


def test_dion_at_full_rank_is_heavy_ball():
    """rank min(m, n): P Rᵀ = M, so that M <- μ M; orthonormal P, unit columns of Q"""
    s = dict(t=1)
    grads = random_walk((5, 3), 2)
    dion(grads[0][None], s, [1], rank=3)
    assert torch.allclose(s["m"][0], .95 * grads[0])
    assert torch.allclose(optim.norm(s["Q"], -2), torch.ones(1, 1, 3, dtype=F64))
    assert torch.linalg.matrix_rank(direction(dion, grads[1], rank=1)) == 1


def test_fira_at_full_rank_is_galore():
    a, b = dict(t=1), dict(t=1)
    for t, g in enumerate(random_walk((4, 3), 4), 1):
        a["t"] = b["t"] = t
        assert torch.allclose(fira(g[None], a, rank=3, alpha=1.0),
                              galore(g[None], b, [0], rank=3, scale=1.0),
                              atol=1e-6)


def test_fira_s_limiter_lets_the_rest_grow_by_one_percent():
    s = dict(t=1)
    sizes = []
    for i in range(6):
        S = optim.limit_growth(torch.full((1, 2, 2), 10.0 ** i, dtype=F64), s, 1.01)
        sizes.append(S.norm().item())
    assert all(b == pytest.approx(1.01 * a) for a, b in zip(sizes, sizes[1:]))


@pytest.mark.parametrize("shape", [(6, 4), (4, 6)])
def test_apollo_scales_channels_of_the_gradient(shape):
    """with P = I the channels' sizes are Adam's own; the direction of every channel stays the
    gradient's"""
    g = random_walk(shape, 1)[0]
    with pytest.MonkeyPatch.context() as m:
        m.setattr(optim, "gauss",
                  lambda seeds, refresh, size, like: 2.0 * torch.eye(4).to(like)[None])
        d = direction(apollo, g, rank=4, growth=0.0, eps=1e-12)
    dim = -1 if shape[0] >= shape[1] else -2
    assert torch.allclose(optim.norm(d, dim), optim.norm(direction(adamw, g, b2=.999), dim),
                          atol=1e-5)
    assert torch.allclose(torch.cosine_similarity(d, g, dim), torch.ones(6, dtype=F64))


def test_frugal_s_two_ends():
    """density 1 is Adam with a reset every T steps, 0 is sign-SGD without matrix state"""
    grads = random_walk((3, 4), 5)
    ends, b = [dict(t=0) for _ in range(4)], {}
    for i, g in enumerate(grads):
        for s in ends:
            s["t"] = i + 1
        b = dict(t=1) if i % 3 == 0 else b                                 # every=3: anew at step 4
        b["t"] = i % 3 + 1
        wanted = adamw(g[None], b, b2=.999)
        assert torch.allclose(frugal_columns(g[None], ends[0], [1], density=1.0, every=3), wanted)
        assert torch.allclose(frugal(g[None], ends[1], ([0], 1, 0), density=1.0, every=3), wanted)
        assert torch.equal(frugal_columns(g[None], ends[2], [1], density=0.0, kappa=.1),
                           .1 * g.sign()[None])
        assert torch.equal(frugal(g[None], ends[3], ([0], 1, 0), density=0.0), g.sign()[None])
    assert ends[2]["m"].numel() == ends[3]["m"].numel() == 0


def test_frugal_draws_a_quarter_of_the_matrices_anew():
    chosen = []
    for t in (1, 201, 401):
        s = dict(t=t)
        frugal(torch.ones(8, 2, 2), s, (list(range(8)), 8, 5))
        chosen.append(tuple(s["on"].tolist()))
    assert all(len(x) == 2 for x in chosen) and len(set(chosen)) > 1


def test_classp_is_adagrad_without_threshold():
    p, q = (nn.Parameter(W0.clone()) for _ in range(2))
    theirs = torch.optim.Adagrad([q], lr=.1, initial_accumulator_value=1e-5, eps=0.0)
    ours = opt_of(classp, p, lr=.1, threshold=0.0, p=2.0)
    for g in random_walk((2, 2), 6):
        p.grad, q.grad = g.clone(), g.clone()
        ours.step(), theirs.step()
    assert torch.allclose(p, q, atol=1e-12)
    assert torch.equal(direction(classp, G1, threshold=.05, suppress=False), G1 * (G1 ** 2 > .05))
    touched = [(direction(classp, G1, threshold=x) != 0).sum().item() for x in (0., .02, .05, .2)]
    assert touched == sorted(touched, reverse=True) == [4, 3, 2, 0]


def test_lion_minimises_in_a_box():
    """2310.05898 in one run: ½|x - a|² under |x| <= 1/λ ends at a, clipped"""
    p = nn.Parameter(torch.zeros(1, 4, dtype=F64))
    a = torch.tensor([[3, -.5, .2, -7]], dtype=F64)
    opt = opt_of(lion, p, lr=4e-3, weight_decay=1.0)
    for _ in range(2_500):
        p.grad = p.detach() - a
        opt.step()
    assert close(p.detach(), [[1.0, -.5, .2, -1.0]], 8e-3)


def test_muon_with_decay_bound_the_spectral_norm():
    """|O| <= 1.21 at scale 1: σ_max(W) cannot leave 1.21/λ"""
    p = nn.Parameter(torch.zeros(4, 4, dtype=F64))
    opt = opt_of(muon, p, lr=.05, weight_decay=1.0, scale="original")
    for _ in range(200):
        p.grad = -torch.diag(torch.tensor([4., 3, 2, 1], dtype=F64))
        opt.step()
    assert .65 < torch.linalg.matrix_norm(p, 2) < 1.21


@pytest.mark.parametrize("shape", [(4, 6), (6, 4)])
def test_normuon_s_invariances(shape):
    """RMS 0.2 whatever the gradient's scale; a tall matrix's rows become equal at once"""
    g = random_walk(shape, 1)[0] * torch.logspace(-2, 0, shape[0], dtype=F64)[:, None]
    d = direction(normuon, g)
    assert d.square().mean().sqrt().item() == pytest.approx(.2)
    assert torch.allclose(direction(normuon, 1000 * g), d, atol=1e-6)
    assert torch.allclose(optim.norm(d, -1),
                          torch.full((shape[0], 1), .2 * math.sqrt(shape[1]), dtype=F64))
    wide = direction(normuon, g, axis="short")
    assert shape == (6, 4) or torch.allclose(optim.norm(wide, -2), optim.norm(wide, -2).mean())
    v = torch.rand(1, shape[0], 1, dtype=F64) + .1  # a factor common to all rows cancels, so v
    one, two = (normuon(g[None], dict(t=1, v=c * v), Ranks(shape), b2=1.0, eps=0.0)
                for c in (1.0, .05))
    assert torch.allclose(one, two)                               # needs no bias correction


def test_a_dead_neuron_is_not_blown_up():
    g = random_walk((4, 6), 1)[0]
    g[2] = 0
    d = direction(normuon, g)
    assert d[2].abs().max() < 1e-9 and d.isfinite().all()


# --- every rule -----------------------------------------------------------------------------------


def kw_of(name):
    """Arguments that make a rule's cycles short."""
    return {k: v for k, v in dict(rank=2, every=3).items() if k in hyper(RULES[name])} \
        | (dict(threshold=0.0) if name == "classp" else {})


@pytest.mark.parametrize("name", RULES)
def test_zero_gradients_move_nothing_and_none_is_skipped(name):
    if name == "frugal":  # its blocks are drawn among all matrices
        with pytest.raises(UserError, match="frugal needs a gradient for every matrix"):
            p, q = nn.Parameter(torch.ones(2, 2)), nn.Parameter(torch.ones(2, 2))
            p.grad = torch.ones(2, 2)
            opt_of(frugal, p, q).step()
        return
    p, q = nn.Parameter(torch.randn(6, 4)), nn.Parameter(torch.randn(6, 4))
    old = p.detach().clone(), q.detach().clone()
    opt = opt_of(RULES[name], p, q, weight_decay=.5, **kw_of(name))
    for _ in range(4):
        p.grad = torch.zeros_like(p)
        opt.step()
    assert torch.allclose(p, old[0] * (1 - .01 * .5) ** 4, atol=1e-6) and torch.equal(q, old[1])


@pytest.mark.parametrize("name", RULES)
def test_a_quadratic_falls_tenfold(name, shape=(5, 8)):
    """½|AW - B|²"""
    A, = random_walk((shape[0], shape[0]), 1, 1, torch.float32)
    B, = random_walk(shape, 1, 2, torch.float32)
    A = A @ A.T / shape[0] + torch.eye(shape[0])
    p = nn.Parameter(torch.zeros(shape))
    lr = dict(eco_sgd=.1, dion=.1, galore=.3, qgalore=.2, gradnormlorp=.05, apollo=.05,
              apollo_mini=.02, fira=.05, classp=.3, muon=.2, normuon=.2, shampoo=.2).get(name, .03)
    if name == "gradnormlorp":
        p.data.normal_(generator=torch.Generator().manual_seed(0))
    kw = kw_of(name) | (dict(p=2.0) if name == "classp" else {})
    opt, losses = Optimiser([dict(params=[p], rule=partial(RULES[name], **kw), lr=lr)]), []
    for i in range(200):
        loss = .5 * (A @ p - B).square().sum()
        opt.zero_grad()
        loss.backward()
        set_lr(opt, lr * (1 - i / 200))
        opt.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 10


@pytest.mark.parametrize("name", RULES)
def test_state_round_trips_bit_for_bit(name):
    """saved after 5 and 7 of 10 steps as a checkpoint saves, loaded into a new optimiser: the same
    weights; low-rank rules refresh in between, and a late parameter keeps its own count"""
    def run(stops):
        ps = [nn.Parameter(x.clone()) for x in random_walk((6, 4), 3, 9, torch.float32)]
        opt = opt_of(RULES[name], *ps, **kw_of(name))
        for i, gs in enumerate(zip(*(random_walk((6, 4), 10, k, torch.float32) for k in range(3)))):
            if i in stops:
                file = io.BytesIO()
                torch.save(opt.state_dict(), file)
                file.seek(0)
                opt = opt_of(RULES[name], *ps, **kw_of(name))
                opt.load_state_dict(torch.load(file, weights_only=True))
            for k, (p, g) in enumerate(zip(ps, gs)):
                late = k == 2 and i < 2 and name != "frugal"                # which has no late ones
                p.grad = None if late else g
            opt.step()
        return ps
    assert all(torch.equal(a, b) for a, b in zip(run(()), run((5, 7))))


STATE = dict(
    adamw=lambda m, n, r: 2 * m * n,
    signsgd=lambda m, n, r: 0,
    lion=lambda m, n, r: m * n,
    lionk=lambda m, n, r: m * n,
    muon=lambda m, n, r: m * n,
    normuon=lambda m, n, r: m * n + m,
    shampoo=lambda m, n, r: m * n + 2 * m * m + 2 * n * n,
    soap=lambda m, n, r: 2 * (m * n + m * m + n * n),
    adam_mini=lambda m, n, r: m * n + m,
    dion=lambda m, n, r: m * n + n * r,
    galore=lambda m, n, r: r * min(m, n) + 2 * r * max(m, n),
    apollo=lambda m, n, r: 2 * r * max(m, n) + 1,
    apollo_mini=lambda m, n, r: 2 * max(m, n) + 1,
    frugal_columns=lambda m, n, r: 2 * m * (n // 4),
    fira=lambda m, n, r: r * min(m, n) + 2 * r * max(m, n) + 1,
    eco=lambda m, n, r: 2 * m * n,
    gradnormlorp=lambda m, n, r: r * min(m, n) + 2 * r * max(m, n) + 2 * m,
    eco_sgd=lambda m, n, r: m * n,
    classp=lambda m, n, r: m * n)


@pytest.mark.parametrize("shape", [(12, 8), (8, 12)])
@pytest.mark.parametrize("name", STATE)
def test_state_is_as_large_as_the_rule_says(name, shape):
    p = nn.Parameter(torch.randn(shape))
    ranked = "rank" in hyper(RULES[name]) and name != "apollo_mini"
    opt = opt_of(RULES[name], p, **(dict(rank=2) if ranked else {}))
    for g in random_walk(shape, 3, 0, torch.float32):
        p.grad = g
        opt.step()
    report = memory_report(opt)[name]
    assert sum(report["elements"].values()) == STATE[name](*shape, 2) and report["parameters"] == 96
    assert report["bytes"] == 4 * STATE[name](*shape, 2)


@pytest.mark.parametrize("name", LOW_RANK)
def test_low_rank_state_holds_no_view_of_something_larger(name):
    """what a checkpoint writes is the storage: a slice of all singular vectors would be b x b"""
    p = nn.Parameter(torch.randn(32, 24))
    opt = opt_of(RULES[name], p, rank=2)
    p.grad = torch.randn(32, 24)
    opt.step()
    for key, x in opt.stacks[0].state.items():
        assert not torch.is_tensor(x) or x.untyped_storage().nbytes() <= x.nbytes + 64, key


@pytest.mark.parametrize("name", sorted(RULES.keys() - {"frugal", "gradnormlorp"}))
def test_a_late_first_gradient_moves_a_matrix_as_an_early_one(name):
    """a gradient of 0 first (LoRA's A, an idle expert): the steps after it must not be throttled"""
    late, early = nn.Parameter(torch.randn(8, 6)), nn.Parameter(torch.randn(8, 6))
    opts = [opt_of(RULES[name], p, **kw_of(name)) for p in (late, early)]
    before, start = late.detach().clone(), early.detach().clone()
    late.grad = torch.zeros(8, 6)
    opts[0].step()
    for g in random_walk((8, 6), 9, 6, torch.float32):
        for p, opt in zip((late, early), opts):
            p.grad = g.clone()
            opt.step()
    assert (late - before).norm() > .3 * (early - start).norm()


def test_a_dead_half_does_not_stop_dion():
    """rows without gradient at first, then with one"""
    p = nn.Parameter(torch.zeros(8, 6))
    opt = opt_of(dion, p, rank=2)
    for _ in range(2):
        p.grad = torch.zeros(8, 6)
        opt.step()
    p.grad = torch.cat([torch.zeros(4, 6), torch.ones(4, 6)])
    opt.step()
    assert p[4:].abs().min() > 1e-4


@pytest.mark.parametrize("kind", ["random", "low rank", "steep"])
def test_shampoo_in_float32_is_shampoo(kind):
    """rounding makes eigenvalues of singular covariances negative: the root must not grow them"""
    g = random_walk((64, 24), 1)[0]
    if kind != "random":
        g = g[:, :4] @ g[:4] if kind == "low rank" else g * torch.logspace(-5, 0, 24)
    a, b = (direction(shampoo, g.to(t), b1=0.0).double().flatten() for t in (torch.float32, F64))
    assert torch.cosine_similarity(a, b, 0) > .95


def test_frugal_keeps_state_of_a_quarter_only():
    ps = [nn.Parameter(torch.randn(4, 4)) for _ in range(8)]
    opt = opt_of(frugal, *ps)
    for p in ps:
        p.grad = torch.ones_like(p)
    opt.step()
    assert opt.stacks[0].state["m"].shape == (2, 4, 4)


def test_q_galore_s_bytes():
    """256 x 64, rank 16: P in 4 bits, moments in 8, a scale a block of 256"""
    p = nn.Parameter(torch.randn(256, 64))
    opt = opt_of(qgalore, p, rank=16)
    p.grad = torch.randn(256, 64)
    opt.step()
    bookkeeping = 8 + 8 + 8 + 4 * 5                                         # T, next, svds, cosines
    P, moments = 16 * 64 // 2 + 4 * 8, 2 * (16 * 256 + 16 * 4)
    assert memory_report(opt)["qgalore"]["bytes"] == P + moments + bookkeeping


def test_q_galore_refreshes_lazily_where_the_subspace_is_calm():
    """a constant gradient doubles T once the queue is full, a random one never does"""
    calm, wild = nn.Parameter(torch.randn(64, 32)), nn.Parameter(torch.randn(64, 32))
    opt = opt_of(qgalore, calm, wild, rank=2, every=2)
    fixed = random_walk((64, 32), 1, 5, torch.float32)[0]
    for g in random_walk((64, 32), 40, 4, torch.float32):
        calm.grad, wild.grad = fixed.clone(), g
        opt.step()
    s = opt.stacks[0].state
    assert s["T"][0] > 2 and s["svds"][0] < s["svds"][1] == 20 and s["T"][1] == 2


@pytest.mark.parametrize("name", MATRIX_RULES)
def test_a_stack_steps_like_its_matrices_alone(name):
    """batching over equal shapes changes nothing"""
    both = [nn.Parameter(x.clone()) for x in random_walk((6, 4), 2, 5)]
    alone = [nn.Parameter(p.detach().clone()) for p in both]
    together = opt_of(RULES[name], *both, **kw_of(name))
    apart = [Optimiser([dict(params=[p], names=[f"0.{i}"],
                             rule=partial(RULES[name], **kw_of(name)), lr=.01)])
             for i, p in enumerate(alone)]
    for gs in zip(random_walk((6, 4), 7, 1), random_walk((6, 4), 7, 2)):
        for p, q, g in zip(both, alone, gs):
            p.grad, q.grad = g.clone(), g.clone()
        together.step()
        for opt in apart:
            opt.step()
    assert len(together.stacks) == 1
    assert all(torch.allclose(p, q, atol=1e-9) for p, q in zip(both, alone))


# --- the walker -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", DECAYS)
def test_decay_conventions(name):
    """λ .5, lr .1 of a peak of .2"""
    p = nn.Parameter(W0.clone())
    opt = opt_of(signsgd, p, lr=.2, weight_decay=.5, decay=name)
    set_lr(opt, .1)
    p.grad = G1.clone()
    opt.step()
    wanted = dict(decoupled=W0 * (1 - .05) - .1 * G1.sign(), last=(W0 - .1 * G1.sign()) * (1 - .05),
                  independent=W0 * (1 - .25) - .1 * G1.sign())
    assert torch.allclose(p, wanted[name])


def test_decay_last_differs_by_the_decay_of_the_step():
    steps = {d: walk(lion, [G1], lr=.1, weight_decay=.5, decay=d)[0] for d in ("last", "decoupled")}
    assert torch.allclose(steps["last"] - steps["decoupled"], .1 * .5 * .1 * G1.sign())


def test_groups_each_parameter_once_and_embeddings_never_to_the_matrix_rule():
    m = net()
    groups = param_groups(m, muon, 1e-3, 0.1, aux_lr=3e-3)
    names = [n for g in groups for n in g["names"]]
    assert sorted(names) == sorted(n for n, _ in m.named_parameters())
    hidden, outer, vectors = groups
    assert hidden["rule"] is muon and len(hidden["names"]) == 7
    assert all("layers." in n for n in hidden["names"])
    assert outer["names"] == ["embed_tokens.weight"]
    assert outer["lr"] == 3e-3 and outer["weight_decay"] == .1
    assert all(p.dim() == 1 for p in vectors["params"]) and vectors["weight_decay"] == 0
    assert [optim.name_of(g["rule"]) for g in groups] == ["muon", "adamw", "adamw"]
    assert param_groups(m, muon, decay_embed=False, weight_decay=.1)[1]["weight_decay"] == 0
    untied = init(preset("1x64", bytes_tokenizer(), 32, "llama").__class__(
        **{**vars(m.config), "tie_word_embeddings": False}), 0)
    assert "lm_head.weight" in param_groups(untied, muon)[1]["names"]


def test_adamw_alone_has_two_groups():
    decayed, plain = param_groups(net(), adamw, 1e-3, 0.1)
    assert decayed["weight_decay"] == 0.1 and plain["weight_decay"] == 0.0
    assert all(p.dim() == 2 for p in decayed["params"])
    assert all(p.dim() == 1 for p in plain["params"])
    assert len(plain["params"]) == 6


def test_heads_of_q_and_k_are_adam_mini_s_blocks():
    opt = optimiser(net(), partial(optim.adam_mini), lr=1e-3)
    blocks = next(g["block"] for g in opt.param_groups if optim.name_of(g["rule"]) == "adam_mini")
    assert {b for n, b in blocks.items() if "q_proj" in n or "k_proj" in n} == {32}
    assert {b for n, b in blocks.items() if "v_proj" in n or "mlp" in n or "o_proj" in n} == {1}


def test_set_lr_respects_a_group_s_own_scale():
    opt = optimiser(net(), muon, 1.0, aux_lr=.1)
    set_lr(opt, 0.5)
    assert [g["lr"] for g in opt.param_groups] == pytest.approx([0.5, 0.05, 0.05])


def test_bfloat16_parameters_do_not_lose_small_steps():
    """steps of a tenth of a rounding step: the mean over many weights moves as it should"""
    p = nn.Parameter(torch.ones(100, 100, dtype=torch.bfloat16))
    opt = opt_of(signsgd, p, lr=2 ** -11)
    for _ in range(16):
        p.grad = torch.ones_like(p)
        opt.step()
    assert p.float().mean().item() == pytest.approx(1 - 16 * 2 ** -11, rel=3e-4)
    assert walk(lion, [g.float() for g in (G1, G2)], W=W0.float())[1]["m"].dtype == torch.float32


def test_stored_weights_train_where_rounding_to_nearest_cannot_move():
    """steps far below the grid: stochastic rounding gets there, nearest never starts"""
    ends = {}
    for rounding in ("stochastic", "nearest"):
        layer = StoredLinear(nn.Linear(16, 16, bias=False), "int4", 32, rounding)
        start = layer.read()
        opt = Optimiser([dict(params=[layer.weight], rule=signsgd, lr=1e-3)],
                        stored={layer.weight: layer})
        for _ in range(30):
            layer.weight.grad = torch.ones(16, 16)
            opt.step()
        ends[rounding] = (layer.read() - start).mean().item()
    assert abs(ends["nearest"]) < 1e-6 and ends["stochastic"] == pytest.approx(-.03, abs=.006)


def test_eco_s_virtual_point_moves_by_the_gradient():
    """θ = W - lr μ/(1-μ) m moves by exactly -lr g, whatever the quantiser does (momentum form)"""
    layer = StoredLinear(nn.Linear(16, 16, bias=False), "int4", 32)
    opt = Optimiser([dict(params=[layer.weight], rule=partial(eco_sgd, momentum=.9), lr=.01)],
                    stored={layer.weight: layer})
    theta, moved = layer.read(), torch.zeros(16, 16)
    for g in random_walk((16, 16), 10, 3, torch.float32):
        layer.weight.grad = g
        opt.step()
        moved += .01 * g
    m = opt.stacks[0].state["m"][0]
    assert torch.allclose(layer.read() - .01 * .9 / .1 * m, theta - moved, atol=2e-5)


def test_bad_use_is_a_clear_error():
    vector, matrix = nn.Parameter(torch.ones(4)), nn.Parameter(torch.ones(4, 6))
    with pytest.raises(UserError,
                       match="normuon updates matrices, and 0.0 has shape .4.: put it in a group"):
        opt_of(normuon, vector)
    for name in ("muon", "galore", "soap", "shampoo", "dion", "adam_mini", "frugal_columns"):
        with pytest.raises(UserError, match="updates matrices, and got a tensor of shape"):
            direction(RULES[name], torch.ones(()), shape=(4, 4))
    with pytest.raises(UserError,
                       match="--rank 5 does not fit a 4x6 matrix: choose 1 to 4, or 0 for"):
        opt_of(galore, matrix, rank=5)
    with pytest.raises(UserError, match="--decay lost; did you mean 'last'"):
        opt_of(lion, matrix, decay="lost")
    for rule, key in ((muon, "scale"), (lionk, "kappa"), (normuon, "axis"), (galore, "basis")):
        with pytest.raises(UserError, match=f"--{key} nonsense"):
            direction(rule, G1, **{key: "nonsense"})
    with pytest.raises(UserError, match="the model has no trainable parameter"):
        param_groups(net().requires_grad_(False))
    with pytest.raises(UserError,
                       match="0.weight of shape .4, 4. is in no block and is no embedding"):
        param_groups(nn.Sequential(nn.Linear(4, 4)), muon)
    with pytest.raises(UserError, match="takes no closure"):
        opt_of(lion, matrix).step(lambda: 0)


def test_names_and_groups():
    """two groups alike in every key, no names: nothing is mixed up, and twins are refused"""
    ps = [nn.Parameter(torch.ones(2, 2)) for _ in range(4)]
    groups = [dict(params=ps[:2], rule=lion, lr=.1), dict(params=ps[2:], rule=lion, lr=.1)]
    opt = Optimiser([dict(g) for g in groups])
    for p in ps[1:]:
        p.grad = torch.ones(2, 2)
    opt.step()  # splits the first stack, found by identity
    ps[0].grad = torch.ones(2, 2)
    again = Optimiser([dict(g) for g in groups])
    again.load_state_dict(opt.state_dict())
    again.step()
    assert [round(p[0, 0].item(), 6) for p in ps] == [.9, .8, .8, .8]
    with pytest.raises(UserError, match="two parameters are called x"):
        Optimiser([dict(params=ps[:2], names=["x", "x"], rule=lion, lr=.1)])
    with pytest.raises(UserError,
                       match="eco pays rounding errors back through its momentum: give it"):
        opt_of(eco_sgd, ps[0], momentum=.1)


def test_state_of_another_optimiser_is_refused():
    p = nn.Parameter(torch.ones(4, 6))
    p.grad = torch.ones(4, 6)
    opt = opt_of(muon, p)
    opt.step()
    with pytest.raises(UserError,
                       match="another optimiser: 0.0 was updated by muon and is now lion"):
        opt_of(lion, p).load_state_dict(opt.state_dict())
    with pytest.raises(UserError, match="0.1 was updated by nothing and is now muon"):
        opt_of(muon, p, nn.Parameter(torch.ones(4, 6))).load_state_dict(opt.state_dict())
    with pytest.raises(UserError,
                       match="cannot resume: 0.0 had shape .4, 6. when this state was saved"):
        opt_of(muon, nn.Parameter(torch.ones(6, 4))).load_state_dict(opt.state_dict())
    with pytest.raises(UserError, match="the state of another kind of optimiser"):
        opt_of(muon, p).load_state_dict(torch.optim.SGD([p], lr=1.0).state_dict())


def test_every_rule_is_in_its_tables_and_cites_its_paper():
    """chapters' headings name the rules; a rule sees vectors only if it is elementwise; what has a
    cycle, a rank or a density is checked"""
    text = Path(optim.__file__).read_text()
    heads = ", ".join(re.findall(r"^# === ([\w, ]+):", text, re.M)).split(", ")
    assert RULES.keys() - set(heads) == {"adamw", "signsgd"}
    assert ELEMENTWISE.items() <= RULES.items()
    for name, rule in RULES.items():
        assert rule.__name__ == name
        assert re.search(r"\d{4}\.\d{5}|Jordan", rule.__doc__.split("\n")[0]), name
        assert not {"every", "rank", "density"} & hyper(rule).keys() or name in CHECKS
        assert set(optim.needs(rule)[2:]) <= optim.ARGUMENTS.keys()


def test_what_a_rule_cannot_do_is_refused_before_the_first_step():
    matrix = nn.Parameter(torch.ones(4, 6))
    for name in ("shampoo", "soap", "galore", "qgalore", "fira", "gradnormlorp", "apollo",
                 "apollo_mini", "frugal", "frugal_columns"):
        with pytest.raises(UserError, match="--every 0: it counts steps, from 1"):
            opt_of(RULES[name], matrix, every=0)
    for name in LOW_RANK + ("apollo_mini",):
        with pytest.raises(UserError, match="--rank 5 does not fit"):
            opt_of(RULES[name], matrix, rank=5)
    for name in ("frugal", "frugal_columns"):
        with pytest.raises(UserError, match="--density 1.5: it is a share from 0 to 1"):
            opt_of(RULES[name], matrix, density=1.5)


def test_eco_leaves_the_momentum_alone_where_the_rate_is_almost_0():
    e, s = torch.ones(1, 2, 2), dict(t=1, m=torch.ones(1, 2, 2), v=torch.ones(1, 2, 2))
    optim.feed_sgd(e, s, 1e-6, 1.0, 1e-3, momentum=.9)
    optim.feed_adam(e, s, 1e-6, 1.0, 1e-3, b1=.9, b2=.99, eps=0.0)
    assert torch.equal(s["m"], torch.ones(1, 2, 2))


def test_quantised_weights_of_a_model_are_all_its_block_matrices():
    m = store_int8(net())
    assert sum(isinstance(x, StoredLinear) for x in m.modules()) == 7
    opt = optimiser(m, qgalore, lr=1e-2)
    assert sum(bool(u.stored) for x in opt.stacks for u in x.units) == 7
