"""optim.py: every rule's steps through the walker, against its paper's equations written apart:
one matrix at a time, singular values in place of products, moments in the space of the gradient."""
import math
from functools import partial

import pytest
import torch
from torch import nn

import optim
from optim import RULES, Optimiser

LR, DECAY = 0.03, 0.1


def polar(X, steps=5):
    """Newton-Schulz's result, by its polynomial of each singular value."""
    u, s, v = torch.linalg.svd(X, full_matrices=False)
    s = s / s.norm()
    for _ in range(steps):
        s = 3.4445 * s - 4.7750 * s ** 3 + 2.0315 * s ** 5
    return u * s @ v


def momentum(M, g, b):
    """b M + (1 - b) g."""
    return b * M + (1 - b) * g


def biased(m, v, t, b1, b2, eps):
    """The low-rank papers' Adam: eps beside a second moment that is not yet corrected."""
    return m / (v.sqrt() + eps) * math.sqrt(1 - b2 ** t) / (1 - b1 ** t)


def size(kind, m, n):
    """What an orthogonal m x n update is multiplied with."""
    return dict(rms=0.2 * math.sqrt(max(m, n)), original=math.sqrt(max(1, m / n)),
                spectral=math.sqrt(m / n))[kind]


# Each is a generator: it gets (t, g, W, lr), t from 1, and yields the direction.


def adamw(seed, shape, b1=0.9, b2=0.95, eps=1e-8):
    t, g, W, lr = yield
    m = v = torch.zeros(shape).double()
    while True:
        m, v = momentum(m, g, b1), momentum(v, g ** 2, b2)
        t, g, W, lr = yield m / (1 - b1 ** t) / ((v / (1 - b2 ** t)).sqrt() + eps)


def signsgd(seed, shape):
    t, g, W, lr = yield
    while True:
        t, g, W, lr = yield torch.where(g > 0, 1.0, torch.where(g < 0, -1.0, 0.0)).double()


def muon(seed, shape, nesterov=True, ns_steps=5, scale="rms"):
    t, g, W, lr = yield
    M = torch.zeros(shape).double()
    while True:
        M = momentum(M, g, 0.95)
        U = momentum(M, g, 0.95) if nesterov else M
        O = polar(U) if ns_steps else U / U.norm() * math.sqrt(min(shape))
        t, g, W, lr = yield size(scale, *shape) * O


def normuon(seed, shape, nesterov=True, scale="rms", axis="row"):
    t, g, W, lr = yield
    M = torch.zeros(shape).double()
    across = 1 if axis == "row" or shape[0] >= shape[1] else 0
    v = torch.zeros(shape[1 - across]).double()
    while True:
        M = momentum(M, g, 0.95)
        O = polar(momentum(M, g, 0.95) if nesterov else M)
        v = momentum(v, (O ** 2).mean(across), 0.95)
        N = O / (v.sqrt() + 1e-8).unsqueeze(across)
        full = 0.2 * math.sqrt(O.numel()) if scale == "rms" else O.norm() * size(scale, *shape)
        t, g, W, lr = yield N * full / N.norm()


def lion(seed, shape):
    t, g, W, lr = yield
    m = torch.zeros(shape).double()
    while True:
        c, m = momentum(m, g, 0.9), momentum(m, g, 0.99)
        t, g, W, lr = yield c.sign()


def lionk(seed, shape, kappa="l2", rms_match=True):
    t, g, W, lr = yield
    m = torch.zeros(shape).double()
    while True:
        c, m = momentum(m, g, 0.9), momentum(m, g, 0.99)
        c.requires_grad_()
        with torch.enable_grad():                   # the norm's own derivative
            p = dict(l1=1.0, l2=2.0).get(kappa, 1.5)
            d, = torch.autograd.grad(torch.linalg.vector_norm(c, p), c)
        d = polar(c.detach()) if kappa == "nuclear" else d
        t, g, W, lr = yield d / d.square().mean().sqrt() if rms_match else d


def shampoo(seed, shape, every=10, graft=True):
    t, g, W, lr = yield
    M, L, R = (torch.zeros(s).double() for s in (shape, (shape[0],) * 2, (shape[1],) * 2))
    while True:
        M, L, R = momentum(M, g, 0.9), momentum(L, g @ g.T, 0.95), momentum(R, g.T @ g, 0.95)
        if t % every == 1 or every == 1:
            roots = []
            for S in (L / (1 - 0.95 ** t), R / (1 - 0.95 ** t)):
                u, w, _ = torch.linalg.svd(S)
                roots.append(u / (w + 1e-6 * w.mean()) ** 0.25 @ u.T)
        d = roots[0] @ M @ roots[1]
        t, g, W, lr = yield 0.2 * d / d.square().mean().sqrt() if graft else d


def soap(seed, shape, every=10):
    """m is the gradient's own average: a rotation of the basis turns it along."""
    t, g, W, lr = yield
    L, R, m = 0.05 * g @ g.T, 0.05 * g.T @ g, torch.zeros(shape).double()
    QL, QR = (torch.linalg.eigh(S)[1].flip(1) for S in (L, R))
    v, seen, d = m, 0, m
    while True:
        t, g, W, lr = yield d
        seen, m = seen + 1, momentum(m, g, 0.95)
        v = momentum(v, (QL.T @ g @ QR) ** 2, 0.95)
        d = QL @ biased(QL.T @ m @ QR, v, seen, 0.95, 0.95, 1e-8) @ QR.T
        L, R = momentum(L, g @ g.T, 0.95), momentum(R, g.T @ g, 0.95)
        if seen % every == 0:
            rows, columns = ((Q.T @ S @ Q).diag().argsort(descending=True)
                             for Q, S in ((QL, L), (QR, R)))
            v = v[rows][:, columns]
            QL, QR = (torch.linalg.qr(S @ Q[:, at])[0]
                      for S, Q, at in ((L, QL, rows), (R, QR, columns)))


def adam_mini(seed, shape, block=1):
    t, g, W, lr = yield
    m, v = torch.zeros(shape).double(), torch.zeros(shape[0]).double()
    while True:
        m = momentum(m, g, 0.9)
        for i in range(0, shape[0], block):
            v[i:i + block] = momentum(v[i], (g[i:i + block] ** 2).mean(), 0.95)
        t, g, W, lr = yield m / (1 - 0.9 ** t) / ((v / (1 - 0.95 ** t)).sqrt() + 1e-8)[:, None]


def normal(seed, count, shape):
    """A matrix's draw: from its seed and how often it was drawn before."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + count)).double()


def dion(seed, shape, rank, scale="spectral"):
    t, g, W, lr = yield
    M, Q = torch.zeros(shape).double(), normal(seed, 0, (shape[1], rank))
    while True:
        M = M + g
        P = torch.linalg.svd(M @ Q, full_matrices=False)[0]      # a basis of the same columns
        P = P @ P.T @ torch.linalg.qr(M @ Q)[0]
        R = M.T @ P
        M = M - 0.05 * P @ R.T
        Q = R / R.norm(dim=0)
        t, g, W, lr = yield size(scale, *shape) * P @ Q.T


def of_tall(rule):
    """A rule for tall matrices, for wide ones as well: their mirror images."""
    def both(seed, shape, **kw):
        wide = shape[0] < shape[1]
        turned = rule(seed, shape[::-1] if wide else shape, **kw)
        next(turned)
        t, g, W, lr = yield
        while True:
            d = turned.send((t, g.T, W.T, lr) if wide else (t, g, W, lr))
            t, g, W, lr = yield d.T if wide else d
    return both


def top(g, rank):
    """The top right singular vectors, as columns."""
    return torch.linalg.svd(g, full_matrices=False)[2][:rank].T


@of_tall
def galore(seed, shape, rank, every, scale=0.25, basis="svd"):
    t, g, W, lr = yield
    m = v = torch.zeros(shape[0], rank).double()
    while True:
        if t % every == 1:
            P = (top(g, rank) if basis == "svd" else
                 torch.linalg.qr(normal(seed, t, (shape[1], rank)))[0])
        m, v = momentum(m, g @ P, 0.9), momentum(v, (g @ P) ** 2, 0.999)
        t, g, W, lr = yield scale * biased(m, v, t, 0.9, 0.999, 1e-6) @ P.T


def limited(S, before, growth):
    """S, no larger than `growth` times the size before it."""
    return S if not before or not growth else S * min(1.0, growth * before / S.norm().item())


@of_tall
def fira(seed, shape, rank, every, alpha=0.25, growth=1.01):
    t, g, W, lr = yield
    m = v = torch.zeros(shape[0], rank).double()
    before, P = 0.0, None
    while True:
        P = top(g, rank) if t % every == 1 else P
        R = g @ P
        m, v = momentum(m, R, 0.9), momentum(v, R ** 2, 0.999)
        N = m / (v.sqrt() + 1e-6)
        rest = (N.norm(dim=1) / R.norm(dim=1))[:, None] * (g - alpha * R @ P.T)
        rest = limited(rest, before, growth)
        before = rest.norm().item()
        t, g, W, lr = yield (alpha * N @ P.T + rest) * math.sqrt(1 - 0.999 ** t) / (1 - 0.9 ** t)


def gradnormlorp(seed, shape, rank, every, exact=False):
    """The rows' norms and directions are parameters of their own."""
    t, g, W, lr = yield
    inner, m, v = None, 0.0, 0.0
    while True:
        rho = W.norm(dim=1, keepdim=True)
        V = W / rho
        along = (V * g).sum(1, keepdim=True)
        across = (g - V * along) * (rho if exact else 1.0)
        if inner is None:
            inner = galore(seed, shape, rank=rank, every=every)
            next(inner)
        m, v = momentum(m, along, 0.9), momentum(v, along ** 2, 0.999)
        V = V - lr * inner.send((t, across, W, lr))
        rho = rho - lr * biased(m, v, t, 0.9, 0.999, 1e-6)
        t, g, W, lr = yield (W - rho * V / V.norm(dim=1, keepdim=True)) / lr


@of_tall
def apollo(seed, shape, rank=1, every=200, scale=1.0, growth=1.01, front=False, tensor=False):
    t, g, W, lr = yield
    m = v = torch.zeros(shape[0], rank).double()
    before = 0.0
    while True:
        R = g @ normal(seed, (t - 1) // every, (rank, shape[1])).T / math.sqrt(rank)
        m, v = momentum(m, R, 0.9), momentum(v, R ** 2, 0.999)
        N = m / (v.sqrt() + 1e-6)
        S = g * (N.norm() / R.norm() if tensor else (N.norm(dim=1) / R.norm(dim=1))[:, None])
        S = limited(S * (math.sqrt(scale) if front else 1.0), before, growth)
        before = S.norm().item()
        S = S * (1.0 if front else math.sqrt(scale))
        t, g, W, lr = yield S * math.sqrt(1 - 0.999 ** t) / (1 - 0.9 ** t)


def frugal_columns(seed, shape, density, every, kappa=1.0):
    t, g, W, lr = yield
    while True:
        if t % every == 1:
            draw = torch.Generator().manual_seed(seed + t // every)
            mine = torch.randperm(shape[1], generator=draw)[:int(density * shape[1])]
            inner = adamw(seed, (shape[0], len(mine)), b2=0.999)
            next(inner)
        d = kappa * g.sign()
        d[:, mine] = inner.send(((t - 1) % every + 1, g[:, mine], W, lr))
        t, g, W, lr = yield d


def eco_sgd(seed, shape):
    t, g, W, lr = yield
    m = torch.zeros(shape).double()
    while True:
        m = momentum(m, g, 0.9)
        t, g, W, lr = yield m


def classp(seed, shape, threshold=0.5, p=1.0, suppress=True):
    t, g, W, lr = yield
    h = torch.zeros(shape).double()
    while True:
        on = g.abs() > math.sqrt(threshold)
        h = torch.where(on, h + g.abs() ** p, h)
        t, g, W, lr = yield torch.where(on, g / (h + 1e-5) ** (1 / p) if suppress else g, 0.0)


eco = partial(adamw, b2=0.999)
apollo_mini = partial(apollo, scale=128.0, tensor=True)
SHORT = dict(rank=2, every=2)
CASES = [("adamw", {}), ("adamw", dict(b1=0.5, b2=0.7, eps=0.1)), ("signsgd", {}), ("muon", {}),
         ("muon", dict(nesterov=False, scale="original")), ("muon", dict(ns_steps=0)),
         ("muon", dict(scale="spectral")), ("normuon", {}),
         ("normuon", dict(nesterov=False, scale="original")),
         ("normuon", dict(scale="spectral", axis="short")), ("lion", {}),
         *(("lionk", dict(kappa=k)) for k in optim.KAPPAS), ("lionk", dict(rms_match=False)),
         ("lionk", dict(kappa="l1.5", rms_match=False)),
         ("shampoo", dict(every=2)), ("shampoo", dict(every=3, graft=False)),
         ("soap", dict(every=2)), ("soap", dict(every=1)), ("adam_mini", {}),
         ("dion", dict(rank=2)), ("dion", dict(rank=3, scale="rms")), ("galore", SHORT),
         ("galore", SHORT | dict(scale=1.5)),
         ("galore", SHORT | dict(basis="random")), ("fira", SHORT),
         ("fira", SHORT | dict(alpha=1.0, growth=0.0)), ("gradnormlorp", SHORT),
         ("gradnormlorp", SHORT | dict(exact=True)), ("apollo", SHORT | dict(scale=4.0)),
         ("apollo", SHORT | dict(scale=4.0, front=True)), ("apollo", SHORT | dict(growth=0.0)),
         ("apollo_mini", dict(every=2)), ("frugal_columns", dict(density=0.5, every=3)),
         ("frugal_columns", dict(density=0.5, every=3, kappa=0.1)), ("eco", {}), ("eco_sgd", {}),
         ("classp", {}), ("classp", dict(p=2.0, threshold=0.1)), ("classp", dict(suppress=False))]


@pytest.mark.parametrize("shape", [(7, 5), (5, 7)])
@pytest.mark.parametrize("name, kw", CASES, ids=lambda x: x if isinstance(x, str) else
                         "-".join(f"{k}={v}" for k, v in x.items()))
def test_a_rule_s_steps_are_its_paper_s(name, kw, shape):
    """five steps of two matrices of unlike gradients in one stack, with decay"""
    shape = (6, 6) if name == "soap" else shape           # null spaces have no basis of their own
    draw = torch.Generator().manual_seed(3)
    ps = [nn.Parameter(torch.randn(shape, generator=draw, dtype=torch.float64)) for _ in range(2)]
    opt = Optimiser([dict(params=ps, rule=partial(RULES[name], **kw), lr=LR, weight_decay=DECAY)],
                    seed=4)
    want, rules = [p.detach().clone() for p in ps], []
    for seed in opt.seeds(opt.stacks[0]):
        rules.append(globals()[name](seed, shape, **kw))
        next(rules[-1])
    for t in range(1, 6):
        lr = LR / t
        optim.set_lr(opt, lr)
        for k, p in enumerate(ps):
            g = torch.randn(shape, generator=draw, dtype=torch.float64)
            g = g * torch.linspace(0.3, 2, shape[0]).double()[:, None] * (0.5, 30.0)[k]
            p.grad = g
            d = rules[k].send((t, g, want[k], lr))
            want[k] = want[k] * (1 - lr * DECAY) - lr * d
        opt.step()
        for k, p in enumerate(ps):
            error = (p - want[k]).norm() / lr
            assert error < 1e-5 * (1 + (want[k]).norm()), (t, k, error)


def test_lion_s_sign_is_of_the_momentum_before_it_moves():
    """m 1 after a gradient of 100, then -8.5: .9 - .85 > 0, but .9 · .905 - .85 < 0"""
    for rule in (optim.lion, partial(optim.lionk, kappa="l1")):
        s = dict(t=1)
        signs = [rule(torch.full((1, 1, 1), g), s).item() for g in (100.0, -8.5, -9.5)]
        assert signs == [1, 1, -1] and s["m"].item() == pytest.approx(0.905 * 0.99 - 0.095)


def test_the_fused_kernel_s_state_is_the_rule_s():
    """so that a run whose weights are rounded, or whose rule is another of Adam's, can read it"""
    opt, _ = walk(optim.adamw, gradients(2, 2), count=2)
    for k, (g1, g2) in enumerate(zip(*gradients(2, 2))):
        m, v = momentum(0.1 * g1, g2, 0.9), momentum(0.05 * g1 ** 2, g2 ** 2, 0.95)
        assert torch.allclose(opt.stacks[0].state["m"][k], m)
        assert torch.allclose(opt.stacks[0].state["v"][k], v)


def test_every_rule_is_compared_with_its_paper():
    """those with draws of their own and rounded states have tests below"""
    assert RULES.keys() == {name for name, _ in CASES} | {"frugal", "qgalore"}


def walk(rule, grads, shape=(7, 5), count=1, lr=LR, **kw):
    """The Optimiser after a step for each list of gradients."""
    draw = torch.Generator().manual_seed(5)
    ps = [nn.Parameter(torch.randn(shape, generator=draw).double()) for _ in range(count)]
    opt = Optimiser([dict(params=ps, rule=partial(rule, **kw), lr=lr)])
    for gs in grads:
        for p, g in zip(ps, gs):
            p.grad = g.clone()
        opt.step()
    return opt, ps


def gradients(steps, count=1, shape=(7, 5)):
    """Random gradients of two sizes."""
    draw = torch.Generator().manual_seed(6)
    return [[torch.randn(shape, generator=draw).double() * (1 + 9 * k) for k in range(count)]
            for _ in range(steps)]


def test_frugal_steps_are_adam_s_on_what_is_drawn_among_all_stacks():
    """two shapes, six matrices, half of them drawn every three steps, from its seed and the step"""
    draw = torch.Generator().manual_seed(5)
    shapes = [(3, 4), (2, 2), (3, 4), (2, 2), (3, 4), (2, 2)]
    ps = [nn.Parameter(torch.randn(s, generator=draw).double()) for s in shapes]
    rule = partial(optim.frugal, density=0.5, every=3, kappa=0.3)
    opt = Optimiser([dict(params=ps, rule=rule, lr=LR)], seed=11)
    want, chosen = [p.detach().clone() for p in ps], []
    for t in range(1, 8):
        if t % 3 == 1:
            order = torch.randperm(6, generator=torch.Generator().manual_seed(11 + t))
            chosen.append(set(order[:3].tolist()))
            rules = {i: adamw(0, shapes[i], b2=0.999) for i in chosen[-1]}
            assert all(next(r) is None for r in rules.values())
        for i, p in enumerate(ps):
            p.grad = torch.randn(shapes[i], generator=draw).double() * (1 + i)
            d = (rules[i].send(((t - 1) % 3 + 1, p.grad, 0, 0)) if i in rules
                 else 0.3 * p.grad.sign())
            want[i] = want[i] - LR * d
        opt.step()
        assert all(torch.allclose(p, w, atol=1e-9) for p, w in zip(ps, want))
    assert len(set(map(frozenset, chosen))) > 1


@pytest.mark.parametrize("shape", [(24, 16), (16, 24)])
def test_q_galore_s_steps_are_galore_s_to_its_rounding(shape):
    """the basis, of the gradient at odd steps, to 4 bits; the steps in it to the moments' 8"""
    p, moments = nn.Parameter(torch.zeros(shape).double()), None
    opt = Optimiser([dict(params=[p], lr=1.0, rule=partial(optim.qgalore, rank=4, every=2,
                                                           threshold=2.0, scale=0.5))])
    for t, (g,) in enumerate(gradients(5, 1, shape), 1):
        p.grad, before = g, p.detach().clone()
        opt.step()
        G, d = (g, before - p) if shape[0] > shape[1] else (g.T, (before - p).T)
        if t % 2 == 1:
            P = optim.unpack_basis(opt.stacks[0].state, slice(None), 4, 16)[0].T.double()
            assert (P - top(G, 4)).norm() < 0.15 * P.norm()
        R = G @ P
        m, v = moments or (0 * R, 0 * R)
        moments = momentum(m, R, 0.9), momentum(v, R ** 2, 0.999)
        want = 0.5 * biased(*moments, t, 0.9, 0.999, 1e-6) @ P.T
        assert (d - want).norm() < 0.05 * want.norm()


def test_q_galore_s_refreshes_are_counted_and_only_calm_ones_come_later():
    """every 2, two remembered cosines: T doubles at the third refresh of a constant gradient"""
    opt, _ = walk(optim.qgalore, gradients(1) * 4, rank=2, every=2, lazy=2)
    s = opt.stacks[0].state
    assert [s[k].item() for k in ("T", "next", "svds")] == [2, 5, 2] and s["cos"][0, 0] == -1
    opt, _ = walk(optim.qgalore, gradients(1) * 5, rank=2, every=2, lazy=2)
    s = opt.stacks[0].state
    assert [s[k].item() for k in ("T", "next", "svds")] == [4, 9, 3] and s["cos"].min() > 0.97


def test_q_galore_s_cosine_does_not_mind_a_turned_sign(monkeypatch):
    """a singular vector's sign is arbitrary: one that turns at every refresh is calm"""
    sign, plain = [1.0], optim.top_rows
    monkeypatch.setattr(optim, "top_rows", lambda G, r: sign.append(-sign[-1]) or (
        sign[-1] * plain(G, r)))
    opt, _ = walk(optim.qgalore, gradients(1) * 5, rank=2, every=2, lazy=2)
    s = opt.stacks[0].state
    assert s["T"].item() == 4 and s["cos"].min() > 0.97 and len(sign) == 4


@pytest.mark.parametrize("kw, ratio", [({}, 1.127332), (dict(row_floor=1e-4), 0.141421)])
def test_normuon_s_nearly_dead_row(kw, ratio, monkeypatch):
    """a row a thousandth of the other's, by hand: v = .25 (.95 · .05 · .75² + .05) 1e-6 beside
    .25 · .05 · 1.95, so √(1.95 / 1.534375) of the other's step; with the floor at half of 1e-4 v,
    .001 / √.5e-4"""
    monkeypatch.setattr(optim, "orthogonalise", lambda U, ranks, steps: U)
    s, ranks = dict(t=1), optim.Ranks((2, 4))
    step = partial(optim.normuon, s=s, ranks=ranks, b1=0.0, eps=0.0, **kw)
    for size in (0.75, 1.0):
        d = step(torch.tensor([[[.6, .8, 0, 0], [0, 0, .6e-3 * size, .8e-3 * size]]]).double())[0]
    assert (d[1].norm() / d[0].norm()).item() == pytest.approx(ratio, abs=1e-6)
    assert s["v"].flatten().tolist() == pytest.approx([.024375, 1.917969e-8], rel=1e-6)
    assert d.square().mean().sqrt().item() == pytest.approx(0.2)


def test_normuon_s_floor_is_of_the_mean_over_all_ranks(monkeypatch):
    """v's sum comes from every rank: three times as much, with rows like these on two others"""
    class Three(optim.Ranks):
        def sum(self, x):
            return 3 * x

    monkeypatch.setattr(optim, "orthogonalise", lambda U, ranks, steps: U)
    O = torch.tensor([[[.6, .8, 0, 0], [0, 0, .6e-3, .8e-3]]]).double()
    three = optim.normuon(O, dict(t=1), Three((6, 4)), b1=0.0, eps=0.0, row_floor=1e-4)
    one = optim.normuon(O, dict(t=1), optim.Ranks((2, 4)), b1=0.0, eps=0.0, row_floor=1e-4)
    assert torch.allclose(three, one)
    short = optim.normuon(O[:, :, :3], dict(t=1), optim.Ranks((2, 3)), b1=0.0, row_floor=0.5,
                          axis="short")                          # v of columns, mean over three
    v = O[0, :, :3].square().mean(0)
    N = O[0, :, :3] / torch.maximum(v, v.mean() / 2).sqrt()
    assert torch.allclose(short[0], 0.2 * math.sqrt(6) * N / N.norm(), atol=1e-6)


# --- what the walker hands over -------------------------------------------------------------------


@pytest.mark.parametrize("name, factors", [("decoupled", (0.875, 1)), ("last", (1, 0.875)),
                                           ("independent", (0.9375, 1))])
def test_weights_that_are_rounded_decay_as_the_others(name, factors):
    """lr .5 of a peak of 2, λ .25; all numbers are bfloat16's"""
    p = nn.Parameter(torch.tensor([[1., 2], [3, 4]], dtype=torch.bfloat16))
    opt = Optimiser([dict(params=[p], rule=optim.signsgd, lr=2.0, weight_decay=0.25)], decay=name)
    optim.set_lr(opt, 0.5)
    p.grad = torch.tensor([[1., -1], [1, -1]], dtype=torch.bfloat16)
    opt.step()
    before, after = factors
    want = (torch.tensor([[1., 2], [3, 4]]) * before - 0.5 * p.grad.float().sign()) * after
    assert torch.equal(p.float(), want)


def test_every_step_and_matrix_is_rounded_by_draws_of_its_own():
    """steps of a quarter of bfloat16's: after eight, entries have moved from none to many times"""
    ps = [nn.Parameter(torch.ones(40, 40, dtype=torch.bfloat16)) for _ in range(2)]
    opt = Optimiser([dict(params=ps, rule=optim.signsgd, lr=2.0 ** -10)], seed=3)
    for _ in range(8):
        for p in ps:
            p.grad = torch.ones_like(p)
        opt.step()
    moved = [((1 - p.float()) * 2 ** 8).round().int().flatten().tolist() for p in ps]
    assert moved[0] != moved[1]
    assert all({0, 1, 2, 3, 4} <= set(x) and 1.8 < sum(x) / 1600 < 2.2 for x in moved)


def test_feedback_hears_what_rounding_took_the_rate_the_decay_and_the_peak(monkeypatch):
    calls = []
    monkeypatch.setitem(optim.FEEDBACK, "eco_sgd",
                        lambda e, s, *rest, **kw: calls.append((e.clone(), *rest, kw)))
    layers = [optim.StoredLinear(nn.Linear(8, 6, bias=False), "int4", 16) for _ in range(2)]
    opt = Optimiser([dict(params=[x.weight for x in layers],
                          rule=partial(optim.eco_sgd, momentum=0.8), lr=0.4, weight_decay=0.5)],
                    stored={x.weight: x for x in layers})
    optim.set_lr(opt, 0.1)
    before = [x.read() for x in layers]
    for k, x in enumerate(layers):
        x.weight.grad = torch.randn(6, 8, generator=torch.Generator().manual_seed(k))
    opt.step()
    (errors, lr, shrink, peak, kw), = calls
    assert (lr, shrink, peak, kw) == (0.1, pytest.approx(0.95), 0.4, dict(momentum=0.8))
    for e, W, x in zip(errors, before, layers):
        wanted = 0.95 * W - 0.1 * 0.2 * x.weight.grad
        assert torch.allclose(e, wanted - x.read(), atol=1e-6) and e.abs().max() > 1e-3


def test_feedback_by_hand():
    """e .2, lr .1, shrink .5: m 1 + .5 · (1 - 1/.8)/.1 · .2 = .75; Adam's times (1 - .8²)(2
    + 1) at b2 .9, t 2, eps 1"""
    e, one = torch.full((1, 1, 1), 0.2), torch.ones(1, 1, 1)
    s = dict(t=2, m=one.clone())
    optim.feed_sgd(e, s, 0.1, 0.5, 0.1, momentum=0.8)
    assert s["m"].item() == pytest.approx(0.75)
    s = dict(t=2, m=one.clone(), v=0.19 * 4 * one)
    optim.feed_adam(e, s, 0.1, 0.5, 0.1, b1=0.8, b2=0.9, eps=1.0)
    assert s["m"].item() == pytest.approx(1 - 0.25 * 0.36 * 3)


def draws(seed=0, names=("a", "b")):
    """What apollo makes of one gradient for two matrices."""
    ps = [nn.Parameter(torch.zeros(6, 4)) for _ in names]
    rule = partial(optim.apollo, rank=2)
    opt = Optimiser([dict(params=ps, names=list(names), rule=rule, lr=1.0)], seed=seed)
    for p in ps:
        p.grad = torch.randn(6, 4, generator=torch.Generator().manual_seed(1))
    opt.step()
    return [p.detach() for p in ps]


def test_draws_are_of_the_run_s_seed_and_the_matrix_s_name():
    a, b = draws()
    assert not torch.equal(a, b) and torch.equal(draws(names=("b", "a"))[0], b)
    assert not torch.equal(draws(seed=1)[0], a) and torch.equal(draws()[1], b)


def test_large_matrices_are_stacked_in_parts_that_step_alike(monkeypatch):
    grads, ends = gradients(3, 3), []
    for most in (1 << 26, 2 * 35 + 1, 1):
        monkeypatch.setattr(optim, "STACK", most)
        opt, ps = walk(optim.muon, grads, count=3)
        ends.append((len(opt.stacks), torch.stack([p.detach() for p in ps])))
    assert [n for n, _ in ends] == [1, 2, 3]
    assert all(torch.allclose(x, ends[0][1]) for _, x in ends)


class Heads(nn.Module):
    """Parameters by the names that scripts give them."""

    def __init__(self):
        super().__init__()
        self.config = type("Config", (), dict(head_dim=2))
        layer = nn.ModuleDict(dict(q_proj=nn.Linear(4, 4), up_proj=nn.Linear(4, 4)))
        self.layers = nn.ModuleList([layer])
        for name in ("embed_tokens", "lm_head", "score", "ratings", "pool"):
            setattr(self, name, nn.Linear(4, 4, bias=False))


OUTER = [f"{x}.weight" for x in ("embed_tokens", "lm_head", "score", "ratings", "pool")]
INNER = ["layers.0.q_proj.weight", "layers.0.up_proj.weight"]


def test_groups_have_their_own_rule_rate_decay_and_heads():
    model = Heads()
    model.pool.weight.requires_grad_(False)
    hidden, outer, vectors = optim.param_groups(model, partial(optim.adam_mini, b1=0.5), 0.2, 0.1,
                                                aux_lr=0.05, aux_decay=0.3)
    assert hidden["names"] == INNER and outer["names"] == OUTER[:-1]
    assert hidden["block"] == {INNER[0]: 2, INNER[1]: 1}
    assert [g["lr"] for g in (hidden, outer, vectors)] == pytest.approx([0.2, 0.05, 0.05])
    assert [g["scale"] for g in (hidden, outer, vectors)] == pytest.approx([1, 0.25, 0.25])
    assert [g["weight_decay"] for g in (hidden, outer, vectors)] == [0.1, 0.3, 0.0]
    assert hidden["rule"].keywords == dict(b1=0.5) and outer["rule"].func is optim.adamw
    assert optim.hyper(outer["rule"]) == optim.hyper(optim.adamw)
    rows = optim.param_groups(model, optim.muon, 0.2, 0.1, decay_embed=False)
    assert [(g["lr"], g["weight_decay"]) for g in rows] == [(0.2, 0.1), (0.2, 0.0), (0.2, 0.0)]


def test_adamw_is_one_group_unless_its_ends_are_told_apart():
    model, own = Heads(), partial(optim.adamw, b2=0.7)
    both, vectors = optim.param_groups(model, own, 0.2, 0.1)
    assert sorted(both["names"]) == sorted(INNER + OUTER)
    assert optim.hyper(vectors["rule"])["b2"] == 0.7 == optim.hyper(both["rule"])["b2"]
    for apart in (dict(aux_lr=0.1), dict(aux_decay=0.2), dict(decay_embed=False)):
        groups = optim.param_groups(model, own, 0.2, 0.1, **apart)
        assert [g["names"] for g in groups[:2]] == [INNER, OUTER]
        assert optim.hyper(groups[1]["rule"])["b2"] == 0.7


def test_optimiser_hands_on_all_that_it_is_given():
    model = Heads()
    opt = optim.optimiser(model, optim.muon, 0.2, 0.1, 7, aux_lr=0.1, aux_decay=0.3, decay="last")
    assert (opt.seed, opt.decay) == (7, "last")
    assert [g["weight_decay"] for g in opt.param_groups] == [0.1, 0.3, 0.0]
    assert [(g["lr"], g["peak"]) for g in opt.param_groups] == [(0.2, 0.2), (0.1, 0.1), (0.1, 0.1)]
    opt = optim.optimiser(model, optim.muon, 0.2, 0.1, decay_embed=False)
    assert opt.decay == "decoupled" and opt.param_groups[1]["weight_decay"] == 0
    for bad in (dict(lr=-1.0), dict(aux_lr=-1.0)):
        with pytest.raises(optim.UserError, match="a learning rate is not negative"):
            optim.optimiser(model, optim.muon, **bad)
    optim.optimiser(model, optim.muon, 0.0)                          # of a run that stands still


def test_a_part_of_a_stack_keeps_its_own_state():
    """of three matrices the middle one has no gradient at step 2: it rests, with its momentum"""
    grads = gradients(3, 3)
    opt, ps = walk(optim.muon, grads[:1], count=3)
    before = opt.stacks[0].state["m"].clone()
    for p, g, k in zip(ps, grads[1], range(3)):
        p.grad = None if k == 1 else g
    old = ps[1].detach().clone()
    opt.step()
    moving, resting = opt.stacks
    assert [u.name for u in moving.units] == ["0.0", "0.2"] and torch.equal(ps[1], old)
    assert [u.name for u in resting.units] == ["0.1"] and resting.state["t"] == 1
    assert torch.equal(resting.state["m"], before[1:2]) and moving.state["t"] == 2
    want = [before[k] * 0.95 + 0.05 * grads[1][k] for k in (0, 2)]
    assert torch.allclose(moving.state["m"], torch.stack(want))


def test_a_head_of_q_and_k_has_one_second_moment_other_matrices_one_a_row():
    """three of one shape in one group: the walker keeps the heads' apart"""
    ps = [nn.Parameter(torch.zeros(4, 3).double()) for _ in range(3)]
    opt = Optimiser([dict(params=ps, names=["q", "v", "k"], rule=optim.adam_mini, lr=1.0,
                          block=dict(q=2, v=1, k=2))])
    rules = [adam_mini(0, (4, 3), block) for block in (2, 1, 2)]
    want = [torch.zeros(4, 3).double() for _ in ps]
    for t, gs in enumerate(gradients(3, 3, (4, 3)), 1):
        for k, (p, g) in enumerate(zip(ps, gs)):
            p.grad = g
            if t == 1:
                next(rules[k])
            want[k] -= rules[k].send((t, g, 0, 0))
        opt.step()
    assert [[u.name for u in x.units] for x in opt.stacks] == [["q", "k"], ["v"]]
    assert all(torch.allclose(p, w) for p, w in zip(ps, want))


def test_no_rank_is_a_quarter_of_the_shorter_side():
    assert [optim.rank_of(r, s) for r, s in ((0, (12, 8)), (0, (9, 40)), (0, (2, 3)), (3, (4, 9)))
            ] == [2, 2, 1, 3]
    for rank, shape in ((5, (4, 9)), (5, (9, 4)), (-1, (4, 4))):
        with pytest.raises(optim.UserError, match="choose 1 to 4"):
            optim.rank_of(rank, shape)
