"""
bench.py - speed and memory as ratios: against plain PyTorch in the same run, and this machine's own floor.

    python tests/bench.py                      # about a minute; CUDA too where there is a device

Both sides of a row run alternately and the medians are compared, as machines are noisy: read the ratios, not
the times.   floor: FLOPs of the row over the matmul rate measured first (the model's own shapes run slower).
"""
import resource
import statistics
import sys
import time
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch
import torch.nn.functional as F
from torch.nn.utils import clip_grad_norm_

from data.tokenizer import bytes_tokenizer
from model import bandwidth, collate, generate, init, pick, preset, token_logprobs
from optim import adamw


def sync(device):
    """Wait until the device has done what it was given, so that the clock counts it."""
    if device == "cuda":
        torch.cuda.synchronize()


def seconds(fns, device, rounds=7):
    """The median seconds of each function, run alternately."""
    times = [[] for _ in fns]
    for i in range(rounds + 1):
        for fn, out in zip(fns, times):
            sync(device)
            t = time.perf_counter()
            fn()
            sync(device)
            if i:                                          # the first round warms up
                out.append(time.perf_counter() - t)
    return [statistics.median(t) for t in times]


def matmul_rate(device, n=1024):
    """FLOP/s of a square float32 product: the ceiling of every row below."""
    a, b = torch.randn(2, n, n, device=device).unbind(0)
    return 2 * n ** 3 / min(seconds([lambda: a @ b] * 3, device))


def model_of(size, vocab, context, device):
    """A new model of this size with this vocabulary and context."""
    return init(replace(preset(size, bytes_tokenizer(), context), vocab_size=vocab), 0).to(device)


def flops_per_token(model, context):
    """Forward and backward: 6 per weight of each matrix, 6·L·T·D for causal attention (12·L·T·D halved)."""
    matrices = (sum(p.numel() for n, p in model.named_parameters() if p.dim() == 2 and "embed" not in n)
                + model.head.numel())
    return 6 * (matrices + model.config.num_hidden_layers * context * model.config.hidden_size)


def sft_row(device, packed):
    """sft.py's step against the loop everybody writes: full logits, cross-entropy with ignored prompts."""
    vocab, B, T = 2048, 16, 256 if packed else 96
    ours, plain = (model_of("4x128", vocab, 512, device) for _ in range(2))
    opts = [adamw(m, 1e-3, 0.1) for m in (ours, plain)]
    g = torch.Generator().manual_seed(0)
    lengths = [(1, T - 1)] * B if packed else [(int(p), int(r)) for p, r in zip(
        torch.randint(30, 80, (B,), generator=g), torch.randint(6, 16, (B,), generator=g))]
    rows = [(torch.randint(0, 2000, (p,), generator=g), torch.randint(0, 2000, (r,), generator=g))
            for p, r in lengths]

    def step_ours():
        tokens, mask = collate(rows, 0, device)
        loss = -(token_logprobs(ours, tokens, mask) * mask).sum() / mask.sum()
        loss.backward()
        clip_grad_norm_(ours.parameters(), 1.0)
        opts[0].step()
        opts[0].zero_grad()

    def step_plain():
        tokens, mask = collate(rows, 0, device)
        labels = tokens.masked_fill(mask == 0, -100)
        logits = plain.logits(plain(tokens))[:, :-1]
        loss = F.cross_entropy(logits.reshape(-1, vocab), labels[:, 1:].reshape(-1), ignore_index=-100)
        loss.backward()
        clip_grad_norm_(plain.parameters(), 1.0)
        opts[1].step()
        opts[1].zero_grad()

    tokens = sum(p + r for p, r in lengths)
    return [step_ours, step_plain], tokens, tokens * flops_per_token(ours, T)


@torch.no_grad()
def generate_uncached(model, prompts, new):
    """What generation costs without a cache: the whole prefix again for every token."""
    tokens = torch.tensor(prompts, device=model.head.device)
    for _ in range(new):
        logits = model.logits(model(tokens)[:, -1])
        u = torch.rand(len(tokens), device=tokens.device)
        tokens = torch.cat([tokens, pick(logits, u)[0][:, None]], 1)
    return tokens


def generate_row(device, samples=64, new=64, prompt=32):
    """Sampling with the cache, the prompt prefilled once, against recomputing the prefix for every token."""
    model = model_of("4x128", 2048, 512, device)
    prompts = torch.randint(0, 2000, (1, prompt)).tolist()
    forward = flops_per_token(model, prompt + new // 2) / 3
    return [lambda: generate(model, prompts, new, samples=samples, stop=[]),
            lambda: generate_uncached(model, prompts * samples, new)], samples * new, samples * new * forward


def logprob_row(device, N=4096, D=256, V=16384):
    """token_logprobs' head, forward and backward, against log_softmax over all logits."""
    from kernels import linear_logprob, linear_logprob_ref
    h, W = (torch.randn(n, D, device=device, requires_grad=True) for n in (N, V))
    y, up = torch.randint(0, V, (N,), device=device), torch.randn(N, device=device)

    def run(fn):
        torch.autograd.grad(fn(h, W, y)[0], (h, W), up)
    return [lambda: run(linear_logprob), lambda: run(linear_logprob_ref)], N, 6 * N * D * V


def peak_memory(fn, device):
    """MB that fn adds to the peak: on CUDA the allocator's, on the CPU the process's resident set."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        fn()
        return (torch.cuda.max_memory_allocated() - before) / 1e6
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    fn()
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1e3


def main(device):
    """Print the table of one device."""
    fns, _, _ = logprob_row(device)
    mb = [peak_memory(fn, device) for fn in fns]       # first of all, and ours first: a peak only ever rises
    rate = matmul_rate(device)
    print(f"{device}: {rate / 1e9:.0f} GFLOP/s in a float32 product, {bandwidth(device) / 1e9:.0f} GB/s, "
          f"{torch.get_num_threads()} threads, torch {torch.__version__}")
    print(f"{'row':<34}{'tokens/s':>10}{'plain':>10}{'ratio':>8}{'floor':>8}")
    for name, row in {"sft step, packed 16 x 256": sft_row(device, True),
                      "sft step, completions of 16 rows": sft_row(device, False),
                      "generate 64 samples x 64 tokens": generate_row(device),
                      "linear_logprob 4096 x 256 x 16384": logprob_row(device)}.items():
        fns, tokens, flops = row
        ours, plain = seconds(fns, device)
        print(f"{name:<34}{tokens / ours:>10.0f}{tokens / plain:>10.0f}"
              f"{plain / ours:>7.2f}x{flops / rate / ours:>7.0%}")
    print(f"linear_logprob adds {mb[0]:.0f} MB to the peak, "
          f"the plain version {mb[1]:.0f} MB more on top of that")


if __name__ == "__main__":
    for device in ["cpu"] + ["cuda"] * torch.cuda.is_available():
        main(device)
