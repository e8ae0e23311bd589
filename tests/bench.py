"""
bench.py - speed and memory as ratios: to plain PyTorch in the same run, and to the machine's floor.

    python tests/bench.py                      # every row, minutes; CUDA where there is a device
    python tests/bench.py linear sft           # only rows whose name contains one of the words

Both sides of a row run alternately and the medians are compared, as machines are noisy: read the
ratios, not the times.

floor    the least time that the row's FLOPs (at the matmul rate) or bytes (at the copy bandwidth)
         allow, both measured first, over ours
memory   what one call adds to the peak, ours and plain; on a CPU the resident set of a fresh
         process each, on CUDA the allocator's
"""
import math
import re
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Callable, NamedTuple

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

import torch
import torch.nn.functional as F
from torch.nn.utils import clip_grad_norm_

import compress
import kernels
import specdec
from data.tasks import chain_tokenizer
from data.run import bandwidth, needs, read_log
from data.tokenizer import bytes_tokenizer
from model import MoE, collate, generate, init, pick, preset, save, token_logprobs
from optim import Optimiser, adamw, muon, normuon, optimiser


class Row(NamedTuple):
    """One line of the table: the two sides as functions of nothing, and what it amounts to."""
    ours: Callable
    plain: Callable
    flops: float = 0.0
    bytes: float = 0.0
    tokens: int = 0                            # of the end-to-end rows
    exact: Callable = None                     # of a kernel: its definition in float32
    compiled: Callable = None                  # ... and what torch.compile makes of it
    graph: bool = False                        # whether a CUDA graph can hold it: no backward


def sync(device):
    """Wait until the device has done what it was given, so that the clock counts it."""
    if device == "cuda":
        torch.cuda.synchronize()


def seconds(fns, device, rounds=7, limit=20.0):
    """The median seconds of each function, run alternately; fewer rounds when one takes long."""
    times, start = [[] for _ in fns], time.perf_counter()
    for i in range(rounds + 1):
        for fn, out in zip(fns, times):
            sync(device)
            t = time.perf_counter()
            fn()
            sync(device)
            if i:                                          # the first round warms up
                out.append(time.perf_counter() - t)
        if i >= 2 and time.perf_counter() - start > limit:
            break
    return [statistics.median(t) for t in times]


def matmul_rate(device, dtype, n=0):
    """FLOP/s of a square product: the ceiling of the compute-bound rows."""
    n = n or (8192 if device == "cuda" else 2048)
    a, b, c = torch.randn(3, n, n, device=device).to(dtype).unbind(0)
    return 2 * n ** 3 / min(seconds([lambda: torch.mm(a, b, out=c)] * 3, device))


def compiled(fn, backend="inductor"):
    """fn as torch.compile makes it, when it is first called: that takes seconds."""
    def run(*inputs):
        if not done:
            done.append(torch.compile(fn, dynamic=False, backend=backend))
        return done[0](*inputs)
    done = []
    return run


# --- the kernels: forward and backward under a random upstream gradient, against their twins ------
# Each is a function of the device and of a row of SIZES. Both sides give what they computed.

BACKEND = "inductor"     # torch.compile's; a rehearsal takes one that generates no code


def tensor(*shape, device, scale=1.0, grad=True):
    """A random leaf in the device's training dtype."""
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    return (torch.randn(shape, device=device) * scale).to(dtype).requires_grad_(grad)


def widened(x):
    """A tensor's numbers in float32 if they are floats: a leaf, as x is."""
    return x.detach().float().requires_grad_(x.requires_grad) if x.is_floating_point() else x


def both_ways(ours, twin, inputs, shape, flops=0.0, bytes=0.0):
    """A Row of two functions of `inputs` with outputs of this shape, each forward and backward for
    those that want a gradient."""
    up = torch.randn(shape, device=inputs[0].device)
    up = up if len(shape) == 1 else up.to(inputs[0].dtype)     # of log-probs: float32

    def run(fn, inputs, up):
        leaves = [x for x in inputs if x.requires_grad]

        def both():
            y = fn(*inputs)
            return (y.detach(), *torch.autograd.grad(y, leaves, up))
        return both
    return Row(run(ours, inputs, up), run(twin, inputs, up), flops, bytes,
               exact=lambda: run(twin, [widened(x) for x in inputs], up.float())(),
               compiled=run(compiled(twin, BACKEND), inputs, up))


def forward(ours, plain, definition, inputs, flops=0.0, bytes=0.0):
    """A Row of what has no backward; `definition` is a function of `inputs`, `plain` of nothing."""
    quick = compiled(definition, BACKEND)
    return Row(ours, plain, flops, bytes, exact=lambda: definition(*map(widened, inputs)),
               compiled=lambda: quick(*inputs), graph=True)


def linear_logprob(device, N, D, V):
    """The head of a 50,304-word vocabulary, the size at which memory from logits hurts."""
    y = torch.randint(0, V, (N,), device=device)
    return both_ways(kernels.linear_logprob, kernels.linear_logprob_ref,
                     (tensor(N, D, device=device), tensor(V, D, device=device, scale=0.05), y),
                     (N,), 6 * N * D * V)


def linear_distill(device, N, D, V):
    """Forward KL to a teacher as wide as the student."""
    t, U = (tensor(n, D, device=device, scale=s, grad=False) for n, s in ((N, 1), (V, 0.05)))
    return both_ways(kernels.linear_distill, kernels.linear_distill_ref,
                     (tensor(N, D, device=device), tensor(V, D, device=device, scale=0.05), t, U),
                     (N,), 8 * N * D * V)


def rms_norm(device, N, D):
    """The stream's norm: forward and backward move 5 tensors of its size."""
    x, w = tensor(N, D, device=device), torch.ones(D, device=device, requires_grad=True)
    return both_ways(lambda x, w: kernels.rms_norm(x, w, 1e-6),
                     lambda x, w: kernels.rms_norm_ref(x, w, 1e-6), (x, w), x.shape,
                     bytes=5 * x.nbytes)


def rope(device, B, T, H, hd):
    """Queries of a batch, as the projection leaves them."""
    x = tensor(B, T, H, hd, device=device)
    frequency = 10000 ** -torch.linspace(0, 1, hd // 2, device=device)
    angle = torch.outer(torch.arange(T, device=device), frequency)                       # [T, hd/2]
    return both_ways(*(lambda x, cos, sin, f=f: f(x.transpose(1, 2), cos, sin)
                       for f in (kernels.rope, kernels.rope_ref)),
                     (x, angle.cos(), angle.sin()), (B, H, T, hd), bytes=4 * x.nbytes)


def swiglu(device, N, D):
    """The gate of an MLP: forward 3, backward 5 tensors of its size."""
    gate, up = (tensor(N, D, device=device) for _ in range(2))
    return both_ways(kernels.swiglu, lambda g, u: F.silu(g) * u, (gate, up), (N, D),
                     bytes=8 * gate.nbytes)


def decode_attention(device, B, K, G, S, hd):
    """One token a row against a cache of unequal lengths: the floor reads each valid slot once."""
    q, k, v = (tensor(*shape, device=device, grad=False)
               for shape in ((B, K * G, hd), *[(B, K, S, hd)] * 2))
    length = torch.linspace(S // 2, S, B, device=device).long()
    return forward(lambda: kernels.decode_attention(q, k, v, length),
                   lambda: kernels.decode_attention_ref(q, k, v, length),
                   kernels.decode_attention_ref, (q, k, v, length),
                   bytes=2.0 * K * hd * length.sum().item() * k.element_size())


def newton_schulz(device, L, m, n):
    """Five steps on a batch of equal matrices; the floor counts one triangle of each product."""
    X = tensor(L, m, n, device=device, grad=False)
    return forward(lambda: kernels.newton_schulz(X), lambda: kernels.newton_schulz_ref(X),
                   kernels.newton_schulz_ref, (X,), flops=5.0 * L * (3 * m * m * n + m ** 3))


def newton_schulz_stack(device, L, m, n):
    """All matrices of one shape at once, against one by one by the plain definition."""
    X = tensor(L, m, n, device=device, grad=False)
    return forward(lambda: kernels.newton_schulz(X),
                   lambda: torch.stack([kernels.newton_schulz_ref(x) for x in X]),
                   kernels.newton_schulz_ref, (X,), flops=5.0 * L * (3 * m * m * n + m ** 3))


def packed(device, n, rows, kind):
    """A packed layer on `rows` rows, as in decoding, against the training dtype's dense layer; its
    definition unpacks the weight."""
    W = tensor(n, n, device=device, grad=False)
    if kind == "int4":
        layer = kernels.pack_int(*kernels.quantize(W, 4, 128), bits=4, group=128)
    elif kind == "vq":
        ids = torch.randint(0, 256, (n, n // 4), device=device)
        layer = kernels.pack_vq(ids, *(tensor(*s, device=device, grad=False)
                                       for s in ((256, 4), (n,), (n,))))
    else:
        S = W.unflatten(1, (-1, 2, 2)) * torch.tensor([1.0, 0.0], device=device, dtype=W.dtype)
        A, B = (tensor(n // 64, 64, 64, device=device, grad=False) for _ in range(2))
        layer = (kernels.pack_nm24(S.reshape(n, n)) if kind == "nm24"
                 else kernels.pack_armor(A, S.reshape(n, n), B))
    x = tensor(rows, n, device=device, grad=False)
    return forward(lambda: layer(x), lambda: F.linear(x, W),
                   lambda x: F.linear(x, layer.dequantize().to(x.dtype)), (x,),
                   bytes=layer.nbytes() + 2 * x.nbytes)


KERNELS = dict(linear_logprob=linear_logprob, linear_distill=linear_distill, rms_norm=rms_norm,
               rope=rope,
               swiglu=swiglu, decode_attention=decode_attention, newton_schulz=newton_schulz,
               newton_schulz_stack=newton_schulz_stack,
               **{kind: partial(packed, kind=kind) for kind in ("int4", "nm24", "armor", "vq")})
# of each kernel: on CUDA, where a packed weight outgrows the L2 cache; on a CPU; in a rehearsal
SIZES = dict(
    linear_logprob=dict(cuda=(32768, 768, 50304), cpu=(8192, 256, 50304), tiny=(40, 32, 300)),
    linear_distill=dict(cuda=(16384, 1024, 50304), cpu=(2048, 256, 32768), tiny=(40, 32, 300)),
    rms_norm=dict(cuda=(16384, 4096), cpu=(8192, 512), tiny=(64, 48)),
    rope=dict(cuda=(8, 2048, 32, 128), cpu=(16, 256, 8, 64), tiny=(2, 9, 4, 16)),
    swiglu=dict(cuda=(16384, 11008), cpu=(8192, 1376), tiny=(64, 48)),
    decode_attention=dict(cuda=(64, 8, 4, 4096, 128), cpu=(64, 4, 2, 256, 64),
                          tiny=(3, 2, 2, 20, 16)),
    newton_schulz=dict(cuda=(12, 2048, 2048), cpu=(2, 1024, 1024), tiny=(2, 64, 80)),
    newton_schulz_stack=dict(cuda=(48, 512, 512), cpu=(28, 64, 64), tiny=(3, 32, 32)),
    **{kind: dict(cuda=(16384, 1), cpu=(1024, 1), tiny=(128, 1))
       for kind in ("int4", "nm24", "armor", "vq")})


def kernel_row(device, name, sizes=""):
    """The Row of a kernel at the device's sizes, or at others of SIZES."""
    return KERNELS[name](device, *SIZES[name][sizes or device])


# --- end to end -----------------------------------------------------------------------------------


def model_of(size, vocab, context, device):
    """A new model of this size with this vocabulary and context."""
    return init(replace(preset(size, bytes_tokenizer(), context), vocab_size=vocab), 0).to(device)


def flops_per_token(model, context, scored=1.0):
    """Both ways: 6 per weight of each matrix, 6·L·T·D for causal attention (half of 12·L·T·D);
    scored: the share of tokens that the head sees."""
    matrices = (sum(p.numel() for n, p in model.named_parameters() if p.dim() == 2
                    and n.startswith("layers."))
                + scored * model.head.numel())
    return 6 * (matrices + model.config.num_hidden_layers * context * model.config.hidden_size)


def plain_logprobs(model, tokens, mask):
    """What trainers write: whole rows through the model, logits where a token is scored, the
    token's less their log-sum-exp.   -> [B, T], 0 outside the mask"""
    where = mask[:, 1:] > 0                                                            # [B, T-1]
    logits = model.logits(model(tokens)[:, :-1][where])                                  # [N, V]
    logp = logits.gather(1, tokens[:, 1:][where][:, None]).squeeze(1) - logits.logsumexp(1)
    return F.pad(torch.zeros_like(mask[:, 1:]).masked_scatter(where, logp), (1, 0))


def step_row(device, rows, loss, extra=0.0, vocab=2048):
    """A Row of one optimizer step, loss(model, logprobs, tokens, mask), our log-probs and kernels
    against plain ones. rows: (prompt ids, completion ids); extra: FLOPs beyond forward and backward
    on each token."""
    sides = [model_of("4x128", vocab, 512, device) for _ in range(2)]
    opts = [optimiser(sides[0], lr=1e-3, weight_decay=0.1),
            torch.optim.AdamW(sides[1].parameters(), lr=1e-3, weight_decay=0.1, fused=True)]
    tokens, mask = collate(rows, 0, device)

    def step(model, opt, logprobs, mode):
        kernels.use(mode)
        loss(model, logprobs, tokens, mask).backward()
        clip_grad_norm_(model.parameters(), 1.0)
        opt.step()
        opt.zero_grad()
        kernels.use("auto")

    count = least_tokens(rows)
    return Row(lambda: step(sides[0], opts[0], token_logprobs, "auto"),
               lambda: step(sides[1], opts[1], plain_logprobs, "torch"),
               count * flops_per_token(sides[0], tokens.size(1)) + extra, tokens=count)


def least_tokens(rows):
    """What has to be computed of rows: every prompt once, and the completions."""
    prompts = {tuple(torch.as_tensor(p).tolist()) for p, _ in rows}
    return sum(map(len, prompts)) + sum(len(r) for _, r in rows)


def demonstrations(B, seed=0):
    """B random (prompt, completion) rows of unequal lengths, 30-80 and 6-16 tokens."""
    g = torch.Generator().manual_seed(seed)
    return [(torch.randint(0, 2000, (p,), generator=g), torch.randint(0, 2000, (r,), generator=g))
            for p, r in zip(torch.randint(30, 80, (B,), generator=g).tolist(),
                            torch.randint(6, 16, (B,), generator=g).tolist())]


def cross_entropy(model, logprobs, tokens, mask):
    """sft.py's loss."""
    return -(logprobs(model, tokens, mask) * mask).sum() / mask.sum()


def scoring(device):
    """token_logprobs of one layer, both ways: 8,192 tokens, width 256, 50,304 words."""
    model = model_of("1x256", 50304, 512, device)
    tokens = torch.randint(0, 50304, (32, 257), device=device)
    mask = torch.ones_like(tokens, dtype=torch.float)

    def run(logprobs, mode):
        kernels.use(mode)
        logprobs(model, tokens, mask).sum().backward()
        model.zero_grad()
        kernels.use("auto")

    return Row(lambda: run(token_logprobs, "auto"), lambda: run(plain_logprobs, "torch"),
               tokens.numel() * flops_per_token(model, 257), tokens=tokens.numel())


def sft_packed(device):
    """sft.py's step on windows in which every token is scored."""
    ids = torch.randint(0, 2000, (16, 256))
    return step_row(device, [(x[:1], x[1:]) for x in ids], cross_entropy)


def sft_completions(device):
    """sft.py's step on demonstrations: logits only where a completion is scored."""
    return step_row(device, demonstrations(16), cross_entropy)


def sft_large_vocabulary(device):
    """sft.py's step with a real checkpoint's vocabulary, where the logits are the memory."""
    ids = torch.randint(0, 2000, (16, 256))
    return step_row(device, [(x[:1], x[1:]) for x in ids], cross_entropy, vocab=50304)


def dpo(device):
    """A DPO step: 16 pairs, both sides in one batch, the reference's log-probs made on the way."""
    reference = model_of("4x128", 2048, 512, device)

    def loss(model, logprobs, tokens, mask):
        with torch.no_grad():
            ref = logprobs(reference, tokens, mask).sum(1)                               # [2P]
        margin = (logprobs(model, tokens, mask).sum(1) - ref).view(2, -1)                # [2, P]
        return -F.logsigmoid(0.1 * (margin[0] - margin[1])).mean()

    chosen, rejected = demonstrations(16), demonstrations(16, seed=1)
    rows = [*chosen, *((p, r) for (p, _), (_, r) in zip(chosen, rejected))]
    forward = least_tokens(rows) * flops_per_token(reference, 96) / 3
    return step_row(device, rows, loss, extra=forward)


def grpo(device, prompts=8, samples=8, new=32, length=0):
    """A GRPO step: sample groups, score, one clipped update. Both sides sample with the cache.
    length: of the prompts, instead of those of demonstrations."""
    rows = [p.tolist() for p, _ in demonstrations(prompts)]
    rows = torch.randint(0, 2000, (prompts, length)).tolist() if length else rows
    sides = [model_of("4x128", 2048, 512, device) for _ in range(2)]
    opts = [optimiser(sides[0], lr=1e-5),
            torch.optim.AdamW(sides[1].parameters(), lr=1e-5, fused=True)]

    def step(model, opt, logprobs, mode):
        kernels.use(mode)
        roll = generate(model, rows, new, samples=samples, stop=[])
        score = roll.tokens.float().mean(1).view(-1, samples)                   # any reward will do
        adv = ((score - score.mean(1, keepdim=True))
               / (score.std(1, keepdim=True) + 1e-4)).view(-1, 1)
        ratio = (logprobs(model, roll.tokens, roll.mask) - roll.logp).exp()              # [B, T]
        gain = torch.minimum(ratio * adv, ratio.clamp(0.8, 1.2) * adv)
        (-(gain * roll.mask).sum() / roll.mask.sum()).backward()
        clip_grad_norm_(model.parameters(), 1.0)
        opt.step()
        opt.zero_grad()
        kernels.use("auto")

    count = sum(len(p) + samples * new for p in rows)
    made = prompts * samples * new * flops_per_token(sides[0], 80) / 3
    return Row(lambda: step(sides[0], opts[0], token_logprobs, "auto"),
               lambda: step(sides[1], opts[1], plain_logprobs, "torch"),
               count * flops_per_token(sides[0], 100) + made, tokens=count)


@torch.no_grad()
def generate_uncached(model, prompts, new):
    """What generation costs without a cache: the whole prefix again for every token."""
    tokens = torch.tensor(prompts, device=model.head.device)
    for _ in range(new):
        logits = model.logits(model(tokens)[:, -1])
        u = torch.rand(len(tokens), device=tokens.device)
        tokens = torch.cat([tokens, pick(logits, u)[0][:, None]], 1)


def generation(device, samples=64, new=64, prompt=32):
    """Sampling with the cache, the prompt prefilled once, against recomputing the prefix for every
    token.

    Floor: every step reads the weights and, at float32, the keys and values so far.
    """
    model = model_of("4x128", 2048, 512, device)
    prompts = torch.randint(0, 2000, (1, prompt)).tolist()
    c = model.config
    cache = 8 * c.num_hidden_layers * c.num_key_value_heads * c.head_dim * samples * (prompt + new
                                                                                      / 2)
    size = sum(p.nbytes for p in model.parameters())
    return Row(lambda: generate(model, prompts, new, samples=samples, stop=[]),
               lambda: generate_uncached(model, prompts * samples, new),
               samples * new * flops_per_token(model, prompt + new // 2) / 3, new * (size + cache),
               samples * new)


def slots(device, rows=128, new=64, at_once=32, chunk=0):
    """Prompts and completions of unequal length in so many slots, against that many rows a batch,
    each batch until its last row has ended. Floor: every row-step's arithmetic.
    """
    model = model_of("4x128", 2048, 256, device)
    g = torch.Generator().manual_seed(0)
    prompts = [torch.randint(0, 2000, (n,), generator=g).tolist()
               for n in torch.randint(4, 64, (rows,), generator=g).tolist()]
    how = dict(stop=list(range(60)))                         # one token in 34 ends a completion

    def run(some, **more):
        return generate(model, some, new, generator=torch.Generator().manual_seed(0), **how, **more)
    made = int(run(prompts).mask.sum())
    return Row(lambda: run(prompts, slots=at_once, chunk=chunk),
               lambda: [run(prompts[i:i + at_once]) for i in range(0, rows, at_once)],
               (made + sum(map(len, prompts))) * flops_per_token(model, 64) / 3, tokens=made)


def experts(device, tokens=1):
    """One token through 128 experts of which it has eight, against asking every expert for its
    tokens. Floor: the eight experts' weights are read."""
    config = replace(preset("1x256", bytes_tokenizer(), model_type="qwen3_moe"), num_experts=128,
                     num_experts_per_tok=8)
    layer, x = MoE(config, 128).to(device), torch.randn(1, tokens, 256, device=device)

    @torch.no_grad()
    def one_by_one():
        flat, out = x[0], torch.zeros_like(x[0])
        weight, chosen = layer.route(layer.gate(flat).float())
        for e, expert in enumerate(layer.experts):
            token, slot = (chosen == e).nonzero(as_tuple=True)
            out = out.index_add(0, token, expert(flat[token]) * weight[token, slot, None])
        return out
    return Row(torch.no_grad()(lambda: layer(x)), one_by_one, bytes=8 * 3 * 4 * 256 * 128)


def speculation(device, new=64, prompt=32, gamma=4):
    """Greedy decoding of one row by drafts that are all kept, against plain decoding: what rounds
    cost.

    New models repeat their last token, so a 1x64 drafts what an 8x128 says. Floor: a round reads
    the target's weights once and the draft's gamma times.
    """
    target, draft = (model_of(size, 320, 256, device) for size in ("8x128", "1x64"))
    prompts = torch.randint(0, 256, (1, prompt)).tolist()
    size = [sum(p.nbytes for p in m.parameters()) for m in (target, draft)]
    rule = partial(specdec.fixed, gamma=gamma)

    def ours():
        drafter = specdec.Small(draft, 320, 320, (0, 0, 1.0))
        tally = specdec.speculate(target, drafter, prompts, new, rule, stop=())[1]
        assert tally.acceptance == 1
    return Row(ours, lambda: generate(target, prompts, new, temperature=0, stop=[]),
               bytes=new / (gamma + 1) * (size[0] + gamma * size[1]), tokens=new)


def update_row(device, rule, theirs, matrices=False):
    """A Row of one optimiser step on a model 4x128 (its block matrices alone, if `matrices`)
    against another optimiser, theirs(parameters) -> Optimizer. The floor: read W, g and state,
    write W and state; Newton- Schulz where there is one."""
    sides = []
    for _ in range(2):
        model = model_of("4x128", 2048, 512, device)
        sides.append([p for n, p in model.named_parameters()
                      if not matrices or "layers." in n and p.dim() == 2])
        for p in sides[-1]:
            p.grad = torch.randn_like(p)
    ours = Optimiser([dict(params=sides[0], rule=rule, lr=1e-3, weight_decay=0.1)])
    plain, size = theirs(sides[1]), sum(p.numel() for p in sides[0])
    shapes = [sorted(p.shape) for p in sides[0]] if rule is not adamw else []
    return Row(ours.step, plain.step, flops=5.0 * sum(3 * m * m * n + m ** 3 for m, n in shapes),
               bytes=(28 if rule is adamw else 20) * size)


def torch_adamw(params):
    """PyTorch's fused AdamW, of the same settings."""
    return torch.optim.AdamW(params, lr=1e-3, betas=(0.9, 0.95), weight_decay=0.1, fused=True)


def torch_muon(params):
    """PyTorch's Muon: one matrix after the other, in bfloat16."""
    return torch.optim.Muon(params, lr=1e-3, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")


def our_muon(params):
    """Our Muon, to see what NorMuon adds."""
    return Optimiser([dict(params=params, rule=muon, lr=1e-3, weight_decay=0.1)])


UPDATES = dict(update_adamw=partial(update_row, rule=adamw, theirs=torch_adamw),
               update_muon=partial(update_row, rule=muon, theirs=torch_muon, matrices=True),
               update_normuon=partial(update_row, rule=normuon, theirs=our_muon, matrices=True))
STEPS = dict(token_logprobs=scoring, sft_packed=sft_packed, sft_completions=sft_completions,
             sft_large_vocabulary=sft_large_vocabulary, dpo=dpo, grpo=grpo,
             grpo_64x8x64=partial(grpo, prompts=64, new=64),
             grpo_256=partial(grpo, new=64, length=256), generation=generation, slots=slots,
             slots_sarathi=partial(slots, chunk=64), experts=experts,
             speculation=speculation)
ROWS = {name: partial(kernel_row, name=name) for name in KERNELS} | UPDATES | STEPS

# --- compression: seconds per million weights, of a layer of 576 x 1,536 --------------------------


def known_of_a_layer(device, out=576, inputs=1536):
    """A layer of SmolLM2's size, and what compress.py would know of its inputs."""
    g = torch.Generator().manual_seed(0)
    x = torch.randn(4096, inputs, generator=g) * torch.rand(inputs, generator=g)
    known = dict(W=0.03 * torch.randn(out, inputs, generator=g), h=(x ** 2).mean(0),
                 H=compress.second_moment(x), absmax=x.abs().amax(0))
    return {k: v.to(device) for k, v in known.items()} | dict(generator=g, trace=[])


def print_compression(device, words):
    """Seconds per million weights of every method whose row is asked for, once."""
    known = known_of_a_layer(device)
    for name, (method, options) in COMPRESSED.items():
        if words and not any(w in name for w in words):
            continue
        method = compress.METHODS[method]
        sync(device)
        begin = time.perf_counter()
        method(**{k: known[k] for k in needs(method)}, **options)
        sync(device)
        took = (time.perf_counter() - begin) / known["W"].numel()
        print(f"{name:<24}{1e6 * took:>10.2f} s per million weights", flush=True)


COMPRESSED = {f"compress_{x}": (x, {}) for x in (
    "rtn", "wanda", "nowag_p", "sparsegpt", "gptq", "baq", "mixed", "w4a4", "nowag_vq", "gptvq",
    "armor")} | dict(compress_nowag_vq_6=("nowag_vq", dict(dim=6)))

# --- the table ------------------------------------------------------------------------------------


def uneven(device, rows=512, new=64):
    """What dropping finished rows saves: (row-steps computed, rows x steps of the longest)."""
    model, stop = model_of("2x64", 2048, 256,
                           device), list(range(60))              # one token in 34 ends a completion
    roll = generate(model, [[100, 101, 102]], new, samples=rows, stop=stop,
                    generator=torch.Generator().manual_seed(0))
    return roll.row_steps, rows * (int(roll.mask.sum(1).max()) - 1)


def shares(device, steps=3):
    """Of a step of grpo.py itself with 64 prompts x 8 samples x 64 tokens: the times of its log,
    medians.

    The model is new and 4x128, so that hardly a response ends before its 64 tokens.
    """
    tok = chain_tokenizer()
    with tempfile.TemporaryDirectory() as folder:
        save(init(preset("4x128", tok, 256), 0), tok, Path(folder) / "model")
        options = dict(init=f"{folder}/model", out=f"{folder}/run", prompts=64, samples=8,
                       max_new=64,
                       steps=steps, eval_prompts=8, eval_every=steps, save_every=steps,
                       device=device)
        command = [sys.executable, str(ROOT / "grpo.py"),
                   *(f"--{k}={v}" for k, v in options.items())]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        rows = [row for row in read_log(f"{folder}/run") if "t_gen" in row]
    took = [statistics.median(row[k] for row in rows) for k in ("t_gen", "t_score", "t_update")]
    return [t / sum(took) for t in took]


def added(fn, device):
    """Bytes that a call adds to the peak: the CUDA allocator's, or this process's resident set."""
    if device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        fn()
        return torch.cuda.max_memory_allocated() - before
    before = resident("VmRSS")
    fn()
    return max(0.0, 1e6 * (resident("VmHWM") - before))


def peak_memory(name, side, device):
    """MB that one call adds to the peak: on CUDA here, on a CPU in a new process."""
    if device == "cuda":
        return added(getattr(ROWS[name](device), side), device) / 1e6
    out = subprocess.run([sys.executable, __file__, "--peak", name, side], capture_output=True,
                         text=True)
    return float(out.stdout) if out.returncode == 0 else math.nan


def print_peak(name, side):
    """The child process of peak_memory."""
    print(added(getattr(ROWS[name]("cpu"), side), "cpu") / 1e6)


def resident(what):
    """VmRSS, the resident set now, or VmHWM, its peak, in MB; getrusage's is a parent's."""
    return int(re.search(rf"{what}:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) / 1e3


def main(device, words):
    """Print the table of one device."""
    rate = matmul_rate(device, torch.bfloat16 if device == "cuda" else torch.float32)
    band = bandwidth(device)
    threads = f"{torch.get_num_threads()} threads"
    what = torch.cuda.get_device_name() if device == "cuda" else threads
    print(f"{device}, {what}, torch {torch.__version__}: {rate / 1e9:.0f} GFLOP/s in a product, "
          f"{band / 1e9:.0f} GB/s in a copy")
    print(f"{'row':<24}{'ours':>10}{'plain':>10}{'ratio':>8}{'floor':>8}{'memory':>10}"
          f"{'plain':>10}")
    for name, build in ROWS.items():
        if words and not any(w in name for w in words):
            continue
        row = build(device)
        ours, plain = seconds([row.ours, row.plain], device)
        floor = max(row.flops / rate, row.bytes / band)
        first, second = ((f"{row.tokens / t:.0f} tok/s" for t in (ours, plain)) if row.tokens
                         else (f"{1e3 * t:.2f} ms" for t in (ours, plain)))
        del row
        mb = [peak_memory(name, side, device) for side in ("ours", "plain")]
        print(f"{name:<24}{first:>13}{second:>13}{plain / ours:>7.2f}x{floor / ours:>7.0%}"
              f"{mb[0]:>7.0f} MB{mb[1]:>7.0f} MB", flush=True)
    print_compression(device, words)
    if not words or any(w in "generation" for w in words):
        print("generate 512 x 64, unequal lengths: {:,} row-steps instead of {:,}".format(
            *uneven(device)))
    if not words or any(w in "grpo_64x8x64" for w in words):
        print("grpo.py, 64 x 8 x 64: generating {:.0%}, scoring {:.0%}, updating {:.0%}".format(
            *shares(device)))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--peak"]:
        print_peak(*sys.argv[2:])
    elif sys.argv[1:] and not any(w in name for w in sys.argv[1:] for name in [*ROWS, *COMPRESSED]):
        sys.exit(f"no row has {' or '.join(sys.argv[1:])} in its name: "
                 f"choose from {', '.join([*ROWS, *COMPRESSED])}")
    else:
        for device in ["cpu"] + ["cuda"] * torch.cuda.is_available():
            main(device, sys.argv[1:])
