"""The head's kernels equal their twins, in value and gradient under a random upstream gradient, on
both fast paths; the compiler for an H100 takes every kernel; a model's loss and gradients are the
same on all paths."""
import math
import os
import re
import subprocess
import sys

import pytest
import torch
from conftest import ROOT
from torch.utils.checkpoint import checkpoint

import kernels
from data.tokenizer import bytes_tokenizer
from model import generate, init, preset, token_logprobs

PATHS = ["cpu", pytest.param("triton",
                             marks=pytest.mark.skipif(kernels.triton is None, reason="no Triton"))]
DTYPES = (torch.float32, torch.bfloat16)


@pytest.fixture(params=PATHS)
def path(request):
    """Both fast paths: the CPU's, and Triton's in the interpreter (on the GPU, if there is one)."""
    kernels.use("triton" if request.param == "triton" else "auto")
    yield request.param
    kernels.use("auto")


def where(path):
    return "cuda" if path == "triton" and torch.cuda.is_available() else "cpu"


def rand(*shape, seed=0, scale=1.0, dtype=torch.float32, device="cpu"):
    g = torch.Generator().manual_seed(seed)
    return (torch.randn(shape, generator=g) * scale).to(device, dtype).requires_grad_()


def agree(ours, twin, dtype=torch.float32):
    """Element by element in float32; in bfloat16 to 2 % of the twin's norm, where the twin ran in
    float32."""
    assert ours.isfinite().all() and ours.shape == twin.shape
    if dtype == torch.float32:
        scale = twin.abs().max().item() if twin.numel() else 1.0
        torch.testing.assert_close(ours, twin, rtol=1e-4, atol=2e-5 * max(scale, 0.05))
    else:
        assert (ours.float() - twin).norm() <= 0.02 * twin.norm() + 1e-3


def same(ours, twin, inputs, dtype=torch.float32):
    """Two functions of `inputs` agree, and so do their gradients under one random upstream
    gradient."""
    results, exact = [], [x.detach().float().requires_grad_(x.requires_grad) for x in inputs]
    for fn, xs in ((ours, inputs), (twin, exact)):
        out = fn(*xs)
        out = out if isinstance(out, tuple) else (out,)
        ups = [rand(*x.shape, seed=9 + i, device=x.device).detach().to(x.dtype)
               for i, x in enumerate(out)]
        results.append((*out, *torch.autograd.grad(out, [x for x in xs if x.requires_grad], ups)))
    for a, b in zip(*results):
        agree(a, b, dtype)
    grads = results[0][len(results[0]) - sum(x.requires_grad for x in inputs):]
    assert [g.dtype for g in grads] == [x.dtype for x in inputs if x.requires_grad]


SHAPES = dict(odd=(37, 24, 131), one_row=(1, 33, 70), wide=(140, 16, 65), one_word=(5, 8, 1))


def head(shape, dtype, path, scale=1.0):
    """h [N, D], W [V, D] and targets [N], the last word among them."""
    N, D, V = SHAPES[shape]
    targets = torch.randint(0, V, (N,), generator=torch.Generator().manual_seed(2)).to(where(path))
    targets[-1] = V - 1
    return (rand(N, D, dtype=dtype, device=where(path)),
            rand(V, D, seed=1, scale=scale, dtype=dtype, device=where(path)), targets)


# --- log-probabilities ----------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_linear_logprob(path, shape, dtype, temperature):
    h, W, y = head(shape, dtype, path, 0.3)
    same(lambda h, W: kernels.linear_logprob(h, W, y, temperature, entropy=True),
         lambda h, W: kernels.linear_logprob_ref(h, W, y, temperature, entropy=True), (h, W), dtype)
    same(lambda h, W: kernels.linear_logprob(h, W, y, temperature),
         lambda h, W: kernels.linear_logprob_ref(h, W, y, temperature), (h, W), dtype)


def extreme(N, D, V, dtype, device, seed=3):
    """h [N, D], W [V, D] whose logits are multiples of 64 up to 1e4: exact in bfloat16, so ties
    stay ties."""
    g = torch.Generator().manual_seed(seed)
    h = torch.randint(-1, 2, (N, D), generator=g).float()
    W = 64 * torch.randint(-6, 7, (V, D), generator=g).float()
    h[0], W[0], W[1] = 1, 64 * 160 / D, -64 * 160 / D                            # logits of ±10,240
    return (x.to(device, dtype).requires_grad_() for x in (h, W))


@pytest.mark.parametrize("dtype", DTYPES)
def test_logits_of_ten_thousand(path, dtype):
    """where exp would overflow, and the entropy lse - E z would cancel"""
    h, W = extreme(37, 16, 131, dtype, where(path))
    y = torch.randint(0, 131, (37,), generator=torch.Generator().manual_seed(4)).to(h.device)
    same(lambda h, W: kernels.linear_logprob(h, W, y, entropy=True),
         lambda h, W: kernels.linear_logprob_ref(h, W, y, entropy=True), (h, W), dtype)


def test_all_logits_far_below_0(path):
    """-8,000 each, and a tile's other places 0: the shift of a softmax is its own largest logit"""
    h, W = (torch.full((n, 16), x, device=where(path)) for n, x in ((3, 1.0), (5, -500.0)))
    logp, H = kernels.linear_logprob(h, W, torch.arange(3, device=h.device), entropy=True)
    torch.testing.assert_close(logp, torch.full_like(logp, -math.log(5)), rtol=0, atol=1e-3)
    torch.testing.assert_close(H, torch.full_like(H, math.log(5)), rtol=0, atol=1e-3)


def test_one_gradient_by_hand():
    """two words, z = (0, log 3): p = (1/4, 3/4);  d logp_0/dz = (3/4, -3/4);  dH/dz by the
    formula"""
    h = torch.ones(1, 1, requires_grad=True)
    W = torch.tensor([[0.0], [math.log(3)]], requires_grad=True)
    logp, H = kernels.linear_logprob(h, W, torch.tensor([0]), entropy=True)
    assert logp.item() == pytest.approx(-1.386294, abs=1e-6)
    assert H.item() == pytest.approx(0.562335, abs=1e-6)
    dz = torch.autograd.grad(logp, W, retain_graph=True)[0].flatten()
    assert dz.tolist() == pytest.approx([0.75, -0.75])
    dH = [-p * (math.log(p) + H.item()) for p in (0.25, 0.75)]
    assert torch.autograd.grad(H, W)[0].flatten().tolist() == pytest.approx(dH, abs=1e-6)


def test_gradcheck_logprob(monkeypatch):
    monkeypatch.setattr(kernels, "ROWS", 3)              # several chunks
    monkeypatch.setattr(kernels, "CHUNK", 1)
    h, W = (rand(*s, dtype=torch.float64, seed=i) for i, s in enumerate(((7, 4), (11, 4))))
    y = torch.arange(7)
    both = lambda h, W: kernels.linear_logprob(h, W, y, 0.8, entropy=True)
    assert torch.autograd.gradcheck(both, (h, W))
    assert torch.autograd.gradcheck(lambda h: kernels.linear_logprob(h, W.detach(), y, 0.8), (h,))


def test_logits_are_rounded_as_the_sampler_s_are(path):
    """to bfloat16, once; then the temperature and the softmax in float32. Triton's interpreter cuts
    where a GPU rounds to the nearest: there they are only held to be bfloat16's"""
    h, W, y = head("odd", torch.bfloat16, path)
    z = h.detach().float() @ W.detach().float().T
    assert not torch.equal(z.bfloat16().float(), z)
    if path == "triton":
        hit = kernels.softmax_statistics(h.detach(), W.detach(), y, 0.5)[2] * 0.5
        assert torch.equal(hit.bfloat16().float(), hit)
        return
    want = torch.log_softmax(z.bfloat16().float() / 0.5, -1)
    got, H = kernels.linear_logprob(h, W, y, 0.5, entropy=True)
    torch.testing.assert_close(got, want.gather(1, y[:, None])[:, 0], rtol=0, atol=2e-4)
    torch.testing.assert_close(H, -(want.exp() * want).sum(-1), rtol=0, atol=2e-4)


@pytest.fixture
def small_chunks(monkeypatch):
    """So few rows a chunk that 37 of them make several, on both paths."""
    monkeypatch.setattr(kernels, "ROWS", 1)
    monkeypatch.setattr(kernels, "CHUNK", 1)


def test_chunks_change_nothing(path, small_chunks):
    h, W, y = head("odd", torch.float32, path)
    t, U = (rand(n, 10, seed=i, device=h.device).detach() for n, i in ((37, 5), (131, 6)))
    assert len(kernels.slices(37, 131, path)) > 4
    same(lambda h, W: kernels.linear_logprob(h, W, y, 0.9, entropy=True),
         lambda h, W: kernels.linear_logprob_ref(h, W, y, 0.9, entropy=True), (h, W))
    for divergence in kernels.DIVERGENCES:
        same(lambda h, W: kernels.linear_distill(h, W, t, U, divergence),
             lambda h, W: kernels.linear_distill_ref(h, W, t, U, divergence), (h, W))


def test_a_chunk_holds_no_more_logits_than_it_says():
    held = [z.numel() for _, z, _ in kernels.chunks(torch.empty(5000, 4), 30000, "cpu")]
    assert max(held) <= max(kernels.CHUNK, kernels.ROWS * 30000) and sum(held) == 5000 * 30000


def test_the_gradient_of_a_bfloat16_head_is_summed_in_float32(path, small_chunks):
    """over 140 rows in as many chunks as may be: bfloat16 sums would be off by some per cent"""
    h, W, y = head("wide", torch.bfloat16, path)
    ours = torch.autograd.grad(kernels.linear_logprob(h, W, y).sum(), W)[0].float()
    h, W = (x.detach().float().requires_grad_() for x in (h, W))
    twin = torch.autograd.grad(kernels.linear_logprob_ref(h, W, y).sum(), W)[0]
    assert (ours - twin).norm() < 0.006 * twin.norm()


@pytest.mark.parametrize("fn", ["linear_logprob", "linear_distill"])
def test_autocast_with_master_weights(path, fn, small_chunks):
    """the products run in bfloat16, gradients and results come back in float32"""
    h, W, y = head("odd", torch.float32, path, 0.3)
    rest = (y,) if fn == "linear_logprob" else (h.detach().flip(0), W.detach().flip(0))
    results = []
    for cast in (True, False):
        with torch.autocast(h.device.type, torch.bfloat16, enabled=cast):
            out = getattr(kernels, fn if cast else fn + "_ref")(h, W, *rest)
        assert out.dtype == torch.float32
        up = rand(37, seed=3, device=h.device).detach()
        results.append((out.detach(), *torch.autograd.grad(out, (h, W), up)))
    assert all(g.dtype == torch.float32 for g in results[0])
    assert not torch.equal(results[0][0], results[1][0])
    for ours, twin in zip(*results):
        agree(ours, twin, torch.bfloat16)


def test_views_of_any_stride(path):
    """hidden states, heads, targets and a teacher that are columns or transposes of something
    larger"""
    def view(*shape, seed):
        return rand(shape[1], 2 * shape[0], seed=seed, device=where(path)).detach()[:, ::2].T

    h, W, t, U = (view(*s, seed=i)
                  for i, s in enumerate(((37, 24), (131, 24), (37, 10), (131, 10))))
    y, up = torch.arange(74, device=h.device).view(37, 2)[:, 1], view(37, 1, seed=7)[:, 0]
    assert not any(x.is_contiguous() for x in (h, W, t, U, y, up))
    pairs = ((lambda h, W: kernels.linear_logprob(h, W, y),
              lambda h, W: kernels.linear_logprob_ref(h, W, y)),
             (lambda h, W: kernels.linear_distill(h, W, t, U),
              lambda h, W: kernels.linear_distill_ref(h, W, t, U)))
    for ours, twin in pairs:
        a, b = ([out := fn(x := h.clone().requires_grad_(), w := W.clone().requires_grad_()),
                 *torch.autograd.grad(out, (x, w), up)] for fn in (ours, twin))
        agree(ours(h, W), twin(h, W))
        for p, q in zip(a, b):
            agree(p.detach(), q.detach())
    mixed = kernels.linear_distill(h.bfloat16(), W, t, U.bfloat16())
    agree(mixed, kernels.linear_distill_ref(h, W, t, U), torch.bfloat16)


def test_a_second_derivative_is_refused_not_wrong(path):
    h, W, y = head("odd", torch.float32, path)
    up = torch.ones(37, device=h.device, requires_grad=True)
    grad, = torch.autograd.grad(kernels.linear_logprob(h, W, y), h, up, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.square().sum().backward()


def test_no_rows(path):
    h, W, y = rand(0, 8, device=where(path)), rand(11, 8, device=where(path)), torch.zeros(0).long()
    same(lambda h, W: kernels.linear_logprob(h, W, y.to(h.device), entropy=True),
         lambda h, W: kernels.linear_logprob_ref(h, W, y.to(h.device), entropy=True), (h, W))
    t, U = rand(0, 4, device=where(path)).detach(), rand(11, 4, device=where(path)).detach()
    same(lambda h, W: kernels.linear_distill(h, W, t, U),
         lambda h, W: kernels.linear_distill_ref(h, W, t, U), (h, W))


# --- distillation ---------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("divergence, options",
                         [("forward_kl", {}), ("reverse_kl", {}), ("jsd", {}),
                          ("jsd", dict(beta=0.1))])
def test_linear_distill(path, shape, divergence, options, dtype):
    h, W, _ = head(shape, dtype, path, 0.3)
    t = rand(len(h), 10, seed=5, dtype=dtype, device=h.device).detach()
    U = rand(len(W), 10, seed=6, scale=0.4, dtype=dtype, device=h.device).detach()
    for temperature in (1.0, 2.0):
        how = dict(divergence=divergence, temperature=temperature, **options)
        same(lambda h, W, t, U: kernels.linear_distill(h, W, t, U, **how),
             lambda h, W, t, U: kernels.linear_distill_ref(h, W, t, U, **how), (h, W, t, U), dtype)


@pytest.mark.parametrize("fn", [kernels.linear_distill, kernels.linear_distill_ref])
def test_the_teacher_gets_no_gradient(fn):
    h, W, t, U = (rand(n, 4, seed=i) for i, n in enumerate((3, 5, 3, 5)))
    for divergence in kernels.DIVERGENCES:
        fn(h, W, t, U, divergence).sum().backward()
    assert h.grad.any() and W.grad.any() and t.grad is None and U.grad is None


@pytest.mark.parametrize("divergence", kernels.DIVERGENCES)
def test_distill_with_logits_of_ten_thousand(path, divergence):
    (h, W), (t, U) = (extreme(9, 16, 70, torch.float32, where(path), seed) for seed in (1, 2))
    same(lambda h, W: kernels.linear_distill(h, W, t, U, divergence),
         lambda h, W: kernels.linear_distill_ref(h, W, t, U, divergence), (h, W))


def divergence_of(p, q, name, **options):
    """The divergence of two distributions given as lists, through heads whose logits are their
    logs."""
    one, W, U = torch.ones(1, 1), torch.tensor(q).log()[:, None], torch.tensor(p).log()[:, None]
    return kernels.linear_distill(one, W, one, U, name, **options).item()


def test_divergences_by_hand(path):
    """p = (.7, .2, .1), q = (.5, .3, .2)"""
    if where(path) == "cuda":
        pytest.skip("CPU tensors")
    p, q = [0.7, 0.2, 0.1], [0.5, 0.3, 0.2]
    assert divergence_of(p, q, "forward_kl") == pytest.approx(0.08512, abs=1e-5)
    assert divergence_of(p, q, "reverse_kl") == pytest.approx(0.09203, abs=1e-5)
    assert divergence_of(p, q, "jsd") == pytest.approx(0.02190, abs=1e-5)
    assert divergence_of(p, q, "jsd", beta=0.1) / 0.1 == pytest.approx(0.07695, abs=1e-5)
    assert divergence_of(p, q, "jsd", beta=0.001) / 0.001 == pytest.approx(0.08504, abs=1e-4)
    for name in kernels.DIVERGENCES:
        assert divergence_of(p, p, name) == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("divergence", kernels.DIVERGENCES)
def test_gradcheck_distill(divergence, monkeypatch):
    monkeypatch.setattr(kernels, "ROWS", 3)
    monkeypatch.setattr(kernels, "CHUNK", 1)
    shapes = (7, 4), (11, 4), (7, 3), (11, 3)
    h, W, t, U = (rand(*s, dtype=torch.float64, seed=i) for i, s in enumerate(shapes))
    distance = lambda h, W: kernels.linear_distill(h, W, t, U, divergence, 1.5)
    assert torch.autograd.gradcheck(distance, (h, W))


@pytest.mark.parametrize("change, words", [
    (dict(divergence="js"), "choose one of forward_kl, reverse_kl, jsd"),
    (dict(beta=0.0), "beta between 0 and 1"),
    (dict(teacher_W=torch.ones(6, 2)), "head has 5 words, the teacher's 6")])
def test_bad_arguments_are_named(change, words, path):
    one, five = torch.ones(1, 2), torch.ones(5, 2)
    with pytest.raises(ValueError, match=words):
        kernels.linear_distill(**dict(h=one, W=five, teacher_h=one, teacher_W=five) | change)


def test_words_that_a_teacher_forbids():
    """log p = -inf:  0 · inf must not become NaN where the divergence is finite"""
    logq, logp = torch.tensor([[0.5, 0.3, 0.2]]).log(), torch.tensor([[0.7, 0.3, 0.0]]).log()
    assert kernels.forward_kl(logq, logp).item() == pytest.approx(0.7 * math.log(1.4), abs=1e-6)
    m_q = ((0.6, 0.5), (0.3, 0.3), (0.1, 0.2))
    want = 0.5 * 0.7 * math.log(0.7 / 0.6) + 0.5 * sum(q * math.log(q / m) for m, q in m_q)
    assert kernels.jsd(logq, logp).item() == pytest.approx(want, abs=1e-6)
    assert kernels.reverse_kl(logq, logp).item() == math.inf


# --- all of them together -------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["qwen2", "qwen3", "qwen3_moe"])
def test_a_model_is_the_same_on_every_path(path, family):
    """log-probs, entropies and every parameter's gradient, against --kernels torch"""
    results, g = [], torch.Generator().manual_seed(3)
    tokens = torch.randint(0, 256, (3, 17), generator=g).to(where(path))
    mask = (torch.rand(3, 17, generator=g) < 0.7).float().to(where(path))
    up = torch.randn(2, 3, 17, generator=g).to(where(path))
    chosen = kernels.route
    for route in (chosen, kernels.plain):
        kernels.route = route
        net = init(preset("2x64", bytes_tokenizer(), 32, family), seed=4).to(where(path))
        out = torch.stack(token_logprobs(net, tokens, mask, temperature=0.9, entropy=True))
        out.backward(up)
        results.append((out.detach(), *[p.grad for p in net.parameters()]))
    assert len(results[0]) > 20
    for a, b in zip(*results):
        agree(a, b)


def test_plain_kernels_switch_every_fast_path_off(monkeypatch):
    """--kernels torch: a model trained and sampled from touches none of them"""
    def never(*args, **kwargs):
        raise AssertionError("a fast path ran")

    for name in ("LinearLogprob", "LinearDistill", "RMSNorm", "RoPE", "SwiGLU"):
        monkeypatch.setattr(getattr(kernels, name), "apply", never)
    for name in ("decode_attention_cpu", "skinny"):
        monkeypatch.setattr(kernels, name, never)
    kernels.use("torch")
    net = init(preset("2x64", bytes_tokenizer(), 32), seed=4)
    token_logprobs(net, torch.ones(2, 9).long()).sum().backward()
    roll = generate(net, [[1, 2], [3]], 5, stop=[])
    kernels.newton_schulz(torch.ones(2, 3))
    kernels.linear_distill(*(torch.ones(3, 3) for _ in range(4)))
    assert roll.mask.sum() == 10
    kernels.use("auto")
    with pytest.raises(AssertionError, match="a fast path ran"):
        token_logprobs(net, torch.ones(2, 9).long())


def test_gradient_checkpointing(path):
    """the forward run again in the backward gives the same gradients"""
    net = init(preset("2x64", bytes_tokenizer(), 32), seed=4).to(where(path))
    tokens, grads = torch.arange(18, device=where(path)).view(2, 9), []
    for again in (False, True):
        hidden = checkpoint(net, tokens, use_reentrant=False) if again else net(tokens)
        grads.append(torch.autograd.grad(hidden.square().sum(), net.parameters()))
    for a, b in zip(*grads):
        torch.testing.assert_close(a, b)


def peak_of(side, N, D, V):
    """MB that a head's log-probs, forward and backward, add to the resident set of a process of
    their own."""
    child = f"""
import re, torch, kernels
def resident(what):
    return int(re.search(what + r":\\s+(\\d+)", open("/proc/self/status").read())[1]) / 1e3
h, W = torch.randn({N}, {D}, requires_grad=True), torch.randn({V}, {D}, requires_grad=True)
y, up = torch.zeros({N}).long(), torch.ones({N})
before = resident("VmRSS")
torch.autograd.grad(kernels.{side}(h, W, y), (h, W), up)
print(resident("VmHWM") - before)
"""
    run = subprocess.run([sys.executable, "-c", child], cwd=ROOT, capture_output=True, text=True)
    return float(run.stdout)


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="needs Linux's /proc")
def test_memory_is_a_fifth_of_the_plain_version_s():
    size = 2048, 64, 50304
    assert peak_of("linear_logprob", *size) <= peak_of("linear_logprob_ref", *size) / 5


@pytest.mark.skipif(kernels.triton is None, reason="no Triton")
def test_the_compiler_for_an_h100_takes_every_kernel():
    """what the interpreter cannot tell: spilled registers, too much shared memory, no tensor
    cores"""
    run = subprocess.run([sys.executable, ROOT / "tests/compile_kernels.py", "bfloat16"],
                         capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    kinds = {line.split()[0]: line.split()[-1] for line in run.stdout.splitlines()
             if "registers" in line}
    names = set(re.findall(r"@jit\ndef (\w+)", (ROOT / "kernels.py").read_text()))
    helpers = {"logits_tile", "distill_tile", "weight_tile", "load_code", "plane_dot", "store_tile"}
    assert set(kinds) == names - helpers
    assert {kinds[k] for k in ("logprob_kernel", "distill_grad_kernel", "xxt_kernel")} == {"wgmma"}
