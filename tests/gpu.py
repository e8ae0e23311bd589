"""
gpu.py - a GPU in one command: what works there, how fast, and how near to what it allows.

    python tests/gpu.py                       # 4 minutes of one H200 -> out/gpu.json and a table
    python tests/gpu.py --seconds 900         # time for every part, on a slower GPU too
    python tests/gpu.py rope "sft 1B"         # only parts whose name contains one of the words
    python tests/gpu.py --table out/gpu.json  # the section of data/results/speed.md
    python tests/gpu.py --cpu                 # a rehearsal: all of it, tiny, Triton interpreted

Parts run in order of importance and write the file after each: what does not fit into the time is
skipped and says so, what fails leaves its traceback there, and the rest goes on; a CUDA error that
ends the process's context begins the rest in a new process. Exit code 1 if a part failed.

floor    the least time that FLOPs (at the measured matmul rate) or bytes (at the measured copy
         bandwidth) allow, over the time taken
MFU      the model's FLOPs (no recomputation; 2/3 under LoRA, whose frozen weights need no gradient)
         over the measured matmul rate, or over the device's own
compiled a plain Llama with scaled_dot_product_attention, cross-entropy on full logits and PyTorch's
         fused AdamW, its blocks and its loss each by torch.compile
"""
import argparse
import faulthandler
import gc
import json
import os
import re
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import datetime
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Callable, NamedTuple

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
REHEARSAL = __name__ == "__main__" and "--cpu" in sys.argv
if REHEARSAL:                                  # before Triton is imported
    os.environ["TRITON_INTERPRET"] = "1"
    import conftest  # noqa: F401  repairs the interpreter's bfloat16 products
elif __name__ == "__main__":
    os.environ.pop("TRITON_INTERPRET", None)

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import clip_grad_norm_

import bench
import dpo
import grpo
import kernels
import model as llm
import sft
from data.run import commit, configure, peak_bytes
from data.tokenizer import bytes_tokenizer
from model import ModelConfig, Transformer, autocast, generate, rope_table
from optim import optimiser

# FLOP/s in bfloat16 that the makers state, without sparsity; the first name that fits counts
DEVICES = {"H200": 989e12, "H100 PCIe": 756e12, "H100": 989e12, "B200": 2250e12, "A100": 312e12,
           "L40S": 362e12, "L40": 181e12, "L4": 121e12, "A10": 125e12, "RTX 4090": 165e12}
LLAMA = dict(model_type="llama", max_position_embeddings=2048, rms_norm_eps=1e-5, head_dim=64)
SHAPES = {"135M": ModelConfig(**LLAMA, vocab_size=49152, hidden_size=576, intermediate_size=1536,
                              num_hidden_layers=30, num_attention_heads=9, num_key_value_heads=3,
                              rope_theta=1e5),                                   # SmolLM2's
          "1B": ModelConfig(**LLAMA, vocab_size=128256, hidden_size=2048, intermediate_size=8192,
                            num_hidden_layers=16, num_attention_heads=32, num_key_value_heads=8,
                            rope_theta=5e5)}                                     # Llama 3.2's
ROWS = {"135M": 32, "1B": 16}                  # of 512 tokens, in a forward pass
TINY = dict(vocab_size=320, hidden_size=64, intermediate_size=96, num_hidden_layers=2,
            num_attention_heads=2, num_key_value_heads=1, head_dim=32, max_position_embeddings=64)
TOKENIZER = bytes_tokenizer()                  # its pad alone is used


class Part(NamedTuple):
    """run(out, here) fills a dictionary; cost: seconds that it roughly takes on an H200."""
    cost: float
    run: Callable


# --- what only CUDA has ---------------------------------------------------------------------------


def clean(device):
    """What an earlier part held goes, and the peak of memory begins anew."""
    kernels.use("triton" if device == "cpu" else "auto")
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def alive(device):
    """Whether the device still answers: an illegal access ends a process's CUDA context."""
    try:
        bench.sync(device)
    except RuntimeError:
        return False
    return True


def machine(device):
    """What the numbers belong to."""
    cuda = device == "cuda"
    return dict(device=torch.cuda.get_device_name() if cuda else "cpu", torch=torch.__version__,
                triton=kernels.triton.__version__ if kernels.triton else None,
                cuda=torch.version.cuda, python=sys.version.split()[0], commit=commit(),
                date=datetime.now().isoformat(timespec="seconds"), rehearsal=not cuda)


@contextmanager
def graphs(on, device):
    """Generation in recorded steps or not; a CPU runs the recorded loop without a graph."""
    usual = llm.graphed
    if not on or device == "cpu":
        llm.graphed = lambda model: on
    try:
        yield
    finally:
        llm.graphed = usual


# --- a plain Llama --------------------------------------------------------------------------------


def turned(x, cos, sin):
    """Rotary positions.   x [B, H, T, hd], cos, sin [T, hd/2]"""
    a, b = x.chunk(2, -1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1).to(x.dtype)


class PlainBlock(nn.Module):
    """Attention and SwiGLU as everybody writes them, under Hugging Face's names."""

    def __init__(self, c):
        super().__init__()
        D, inner, self.hd = c.hidden_size, c.intermediate_size, c.head_dim
        self.input_layernorm, self.post_attention_layernorm = (
            nn.RMSNorm(D, c.rms_norm_eps) for _ in range(2))
        heads, pairs = c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim
        widths = dict(q_proj=(D, heads), k_proj=(D, pairs), v_proj=(D, pairs), o_proj=(heads, D))
        self.self_attn = nn.ModuleDict({k: nn.Linear(*w, bias=False) for k, w in widths.items()})
        widths = dict(gate_proj=(D, inner), up_proj=(D, inner), down_proj=(inner, D))
        self.mlp = nn.ModuleDict({k: nn.Linear(*w, bias=False) for k, w in widths.items()})

    def forward(self, x, cos, sin):
        attention, mlp, h = self.self_attn, self.mlp, self.input_layernorm(x)
        q, k, v = (attention[name](h).unflatten(-1, (-1, self.hd)).transpose(1, 2)
                   for name in ("q_proj", "k_proj", "v_proj"))                  # [B, H or K, T, hd]
        y = F.scaled_dot_product_attention(turned(q, cos, sin), turned(k, cos, sin), v,
                                           is_causal=True, enable_gqa=True)
        x = x + attention["o_proj"](y.transpose(1, 2).flatten(2))
        h = self.post_attention_layernorm(x)
        return x + mlp["down_proj"](F.silu(mlp["gate_proj"](h)) * mlp["up_proj"](h))


def head_nll(hidden, W, target):
    """Cross-entropy on full logits.   [B, T, D], [V, D], [B, T] -> [B, T]"""
    logits = F.linear(hidden, W).float()
    return F.cross_entropy(logits.flatten(0, 1), target.flatten(),
                           reduction="none").view_as(target)


class Plain(nn.Module):
    """A Llama with tied embeddings on the parameters of a Transformer, which stay shared."""

    def __init__(self, transformer, compile=False):
        super().__init__()
        self.config, names = transformer.config, dict(transformer.named_parameters())
        with torch.device("meta"):
            self.embed_tokens = nn.Embedding(self.config.vocab_size, self.config.hidden_size)
            self.layers = nn.ModuleList(PlainBlock(self.config)
                                        for _ in range(self.config.num_hidden_layers))
            self.norm = nn.RMSNorm(self.config.hidden_size, self.config.rms_norm_eps)
        self.load_state_dict(names, assign=True)
        self.head = bench.compiled(head_nll, bench.BACKEND) if compile else head_nll
        for block in self.layers if compile else ():
            block.compile(dynamic=False, backend=bench.BACKEND)

    def nll(self, tokens):
        """-log p of every token but the first.   [B, T] -> [B, T-1]"""
        W = self.embed_tokens.weight
        cos, sin = (x[:tokens.size(1)] for x in rope_table(self.config, W.device))
        x = self.embed_tokens(tokens)
        for block in self.layers:
            x = block(x, cos, sin)
        return self.head(self.norm(x)[:, :-1], W, tokens[:, 1:])


# --- the work of a step: it yields where gradients wait for an update ----------------------------


@dataclass(frozen=True)
class Job:
    """B rows of T tokens go through a forward pass at once; a step has two passes."""
    config: ModelConfig
    device: str
    B: int
    T: int
    group: int                                 # samples of a prompt, where there are prompts
    rounds: int                                # steps that are clocked, after one that warms up
    notes: dict                                # what a step says of itself

    def ids(self, rows, length):
        """Random token ids, as lists."""
        g = torch.Generator().manual_seed(0)
        return torch.randint(self.config.vocab_size, (rows, length), generator=g).tolist()

    def settings(self, script, **options):
        """(c, f) of a script, as its command line makes them."""
        options |= dict(device=self.device, dtype="bfloat16")
        argv = [f"--{k}={v}" for k, v in options.items()]
        return configure(script.Config, script.PRESETS, script.AXES, argv=argv)

    def tokens(self, rows):
        """Those ids of whole rows, on the device.   [rows, T]"""
        return torch.tensor(self.ids(rows, self.T), device=self.device)


def sft_work(job, model, ref):
    """sft.py's: every token is scored."""
    c, f = job.settings(sft, micro=job.B)
    rows = [(x[:1], x[1:]) for x in job.ids(2 * job.B, job.T)]
    count, picked = sft.count_scored(rows, range(len(rows))), range(len(rows))
    while True:
        for some, tokens, mask, _ in sft.micro_batches(rows, TOKENIZER, c, picked):
            with autocast(c.device, c.dtype):
                own = [{} for _ in some]
                facts = sft.provide(f.loss, model, {}, tokens, mask, own)
                part = (f.loss(**facts) * mask).sum() / count
            part.backward()
        yield "last"


def dpo_work(job, model, ref):
    """dpo.py's: the reference's log-probs are made on the way."""
    c, f = job.settings(dpo, micro=job.B // 2)
    half, sides = job.T // 2, job.ids(2 * job.B, job.T)
    rows = [dict(prompt=a[:half], sides=[a[half:], b[half:]])
            for a, b in zip(sides[:job.B], sides[job.B:])]
    known = dict(c=c, f=f, policy=model, tok=TOKENIZER)
    while True:
        for row, logps in zip(rows, dpo.response_logprobs(TOKENIZER, c, rows, ref)):
            row["ref_logps"] = logps
        dpo.backward(c, f, known, rows, Counter())
        yield "last"


def roll_out(job, model, c, prompts, generator):
    """A group of completions of every prompt, half a row each, and a reward of each."""
    start = clock(job.device)
    with autocast(c.device, c.dtype):
        roll = generate(model, prompts, job.T // 2, samples=job.group, stop=[],
                        generator=generator)
    job.notes["rollout_seconds"] = clock(job.device) - start
    return roll, roll.tokens.float().mean(1).view(-1, job.group)           # any reward will do


def grpo_work(job, model, ref):
    """grpo.py's: roll out, the reference's log-probs, two minibatches."""
    P = 2 * job.B // job.group
    c, f = job.settings(grpo, micro=job.B, prompts=P, samples=job.group, minibatches=2,
                        max_new=job.T // 2)
    prompts, generator = job.ids(P, job.T // 2), torch.Generator().manual_seed(0)
    while True:
        roll, reward = roll_out(job, model, c, prompts, generator)
        batch = dict(tokens=roll.tokens, mask=roll.mask, old_logp=roll.logp, shaped=reward,
                     ref_logp=llm.logprobs(ref, roll.tokens, roll.mask, c),
                     length=roll.mask.sum(1).view(P, job.group),
                     ends=(roll.prompt_len + roll.mask.sum(1).long())[:, None])
        batch["adv"] = grpo.call(f.advantage, batch)
        for groups in torch.arange(P, device=job.device).split(P // 2):
            metrics = grpo.backward(model, batch, groups, c, f, None)
            first = groups[0] == 0
            if first:
                job.notes["first_ratio_off"] = metrics["off"]
                assert metrics["off"] < 0.1, f"the sampler is {metrics['off']:.2g} off the policy"
            yield "more" if first else "last"


def plain_sft(job, twin, ref, sampler):
    """Cross-entropy of every token."""
    tokens = job.tokens(2 * job.B)
    while True:
        for part in tokens.split(job.B):
            with autocast(job.device, "bfloat16"):
                loss = twin.nll(part).sum() / tokens[:, 1:].numel()
            loss.backward()
        yield "last"


def plain_dpo(job, twin, ref, sampler):
    """-log σ of the margin, both sides of a pair in one forward pass."""
    tokens, half = job.tokens(2 * job.B).view(2, job.B, -1), job.T // 2
    tokens[1, :, :half] = tokens[0, :, :half]                              # a pair has one prompt
    m = (torch.arange(1, job.T, device=job.device) >= half).float()                      # [T-1]
    while True:
        for part in tokens.split(job.B // 2, 1):
            part = part.flatten(0, 1)                                                  # [B, T]
            with autocast(job.device, "bfloat16"):
                with torch.no_grad():
                    base = (ref.nll(part) * m).sum(1)                                    # [B]
                win, lose = (base - (twin.nll(part) * m).sum(1)).view(2, -1)
                loss = -F.logsigmoid(0.1 * (win - lose)).sum() / job.B
            loss.backward()
        yield "last"


def plain_grpo(job, twin, ref, sampler):
    """Cached sampling by the definitions, one launch after the other; then PPO's clip."""
    c, _ = job.settings(grpo)
    prompts, g = job.ids(2 * job.B // job.group, job.T // 2), torch.Generator().manual_seed(0)
    while True:
        kernels.use("torch")
        with graphs(False, job.device):
            roll, reward = roll_out(job, sampler, c, prompts, g)
        adv = ((reward - reward.mean(1, keepdim=True)) / (reward.std(1, keepdim=True) + 1e-6))
        rows = [x.split(job.B) for x in (roll.tokens, roll.mask[:, 1:], -roll.logp[:, 1:],
                                         adv.view(-1, 1))]
        for i, (tokens, mask, old, a) in enumerate(zip(*rows)):
            with autocast(job.device, "bfloat16"):
                with torch.no_grad():
                    ref.nll(tokens)                                   # measured by a run, not used
                ratio = (old - twin.nll(tokens)).exp()
                gain = torch.minimum(ratio * a, ratio.clamp(0.8, 1.2) * a)
                loss = -(gain * mask / mask.sum(1, keepdim=True)).sum() / job.B
            loss.backward()
            yield "more" if i == 0 else "last"


OURS = dict(sft=sft_work, dpo=dpo_work, grpo=grpo_work)
PLAIN = dict(sft=plain_sft, dpo=plain_dpo, grpo=plain_grpo)

# --- whole steps ----------------------------------------------------------------------------------


def clock(device):
    """Seconds now, the device's work done."""
    bench.sync(device)
    return time.perf_counter()


def fresh(config, device):
    """A new Transformer, its normal weights drawn on the device: init draws a billion on a CPU."""
    with torch.device("meta"):
        net = Transformer(config)
    net.to_empty(device=device)
    for p in net.parameters():
        nn.init.ones_(p) if p.dim() == 1 else nn.init.normal_(p, std=0.02)
    return net


def frozen_twin(net, shared):
    """The reference: a copy, or under adapters the same weights once more."""
    with torch.device("meta"):
        ref = Transformer(net.config)
    state = {k: x.detach() if shared else x.detach().clone() for k, x in net.state_dict().items()}
    ref.load_state_dict(state, assign=True)
    return ref.requires_grad_(False)


def step_flops(net, job, method, lora):
    """The model's FLOPs of a step: what a method trains, reads with a reference and samples."""
    tokens, share = 2 * job.B * job.T, 1.0 if method == "sft" else 0.5
    both = bench.flops_per_token(net, job.T, share)
    forward = dict(sft=0.0, dpo=both / 3, grpo=both / 3)[method]
    sampled = bench.flops_per_token(net, job.T) / 6 if method == "grpo" else 0.0    # half a row
    return tokens * (both * (2 / 3 if lora else 1) + forward + sampled)


def updates(work, params, opt):
    """One step: the work's gradients, each clipped and applied."""
    for kind in work:
        clip_grad_norm_(params, 1.0)
        opt.step()
        opt.zero_grad()
        if kind == "last":
            return


def job_of(shape, here):
    """What a model's step is made of."""
    if here.device == "cpu":
        return Job(replace(SHAPES[shape], **TINY), "cpu", B=2, T=8, group=2, rounds=1, notes={})
    return Job(SHAPES[shape], here.device, B=ROWS[shape], T=512, group=8, rounds=3, notes={})


VARIANTS = dict(ours={}, compiled=dict(plain=True, compile=True), recompute=dict(recompute=True),
                lora=dict(lora=True), no_graphs=dict(graphed=False),
                lora_recompute=dict(lora=True, recompute=True), plain=dict(plain=True))


def step_part(out, here, shape, method, plain=False, compile=False, recompute=False, lora=False,
              graphed=True):
    """One method's step on one model: tokens a second, MFU, peak memory."""
    job = job_of(shape, here)
    net = fresh(job.config, job.device)
    flops, ref = step_flops(net, job, method, lora), None
    if method != "sft":
        ref = frozen_twin(net, shared=lora)
    net = llm.lora(net, torch.Generator().manual_seed(0)) if lora else net
    net.recompute = recompute
    params = [p for p in net.parameters() if p.requires_grad]
    if plain:
        twins = [Plain(x, compile) if x is not None else None for x in (net, ref)]
        work = PLAIN[method](job, *twins, net)
        opt = torch.optim.AdamW(params, lr=1e-5, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    else:
        work, opt = OURS[method](job, net, ref), optimiser(net, lr=1e-5, weight_decay=0.1)
    with graphs(graphed, job.device):
        took, = bench.seconds([partial(updates, work, params, opt)], job.device, job.rounds, 6)
    work.close()
    rates, tokens = here.rates, 2 * job.B * job.T
    out |= dict(step_seconds=took, tokens=tokens, tokens_per_second=tokens / took, flops=flops,
                mfu=flops / took / rates["matmul_flops"], peak_bytes=peak_bytes(job.device),
                **job.notes)
    if rates["device_flops"]:
        out["mfu_of_device"] = flops / took / rates["device_flops"]


# --- rates, tests, kernels, generation ------------------------------------------------------------


def rates_part(out, here):
    """The ceilings that everything is held to."""
    cuda = here.device == "cuda"
    size = (1 << 29) if cuda else (1 << 22)                       # floats: beyond any cache
    x, y = torch.randn(size, device=here.device), torch.empty(size, device=here.device)
    name = torch.cuda.get_device_name() if cuda else ""
    n = 8192 if cuda else 256
    out |= dict(matmul_flops=bench.matmul_rate(here.device, torch.bfloat16, n),
                float32_flops=bench.matmul_rate(here.device, torch.float32, n),
                copy_bytes=2 * x.nbytes / bench.seconds([lambda: y.copy_(x)], here.device)[0],
                device_flops=next((v for k, v in DEVICES.items() if k in name), None))


GPU_MARK = "pytest" + ".mark.gpu"              # this file's own text has no such mark


def marked_files():
    """The test files that need a GPU; the few that say most come first."""
    first = ["test_kernels_attention.py", "test_model.py", "test_ppo.py", "test_kernels.py"]
    files = [p for p in (ROOT / "tests").glob("test_*.py")
             if p.name.startswith("test_kernels") or GPU_MARK in p.read_text()]
    return sorted(files, key=lambda p: (first.index(p.name) if p.name in first else len(first),
                                        GPU_MARK in p.read_text(), p.name))


def tests_part(out, here):
    """pytest -m gpu in a process of its own, as far as it comes in its share of the time."""
    limit = 0.2 * here.seconds
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "-v", "--tb=line", "-p",
               "no:cacheprovider", *map(str, marked_files())]
    with tempfile.TemporaryFile("w+") as log:
        try:
            code = subprocess.run(command, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT,
                                  timeout=limit).returncode
        except subprocess.TimeoutExpired:
            code = None
        log.seek(0)
        text = log.read()
    read_tests(out, text, code, limit)


def read_tests(out, text, code, limit):
    """What pytest -v printed -> the number of each outcome, what failed; AssertionError if any
    did."""
    found = re.findall(r"^(\S+::.+?) (PASSED|FAILED|ERROR|SKIPPED)\b", text, re.M)
    out |= dict(code=code, **Counter(outcome.lower() for _, outcome in found))
    out["failures"] = [name for name, outcome in found if outcome in ("FAILED", "ERROR")]
    out["reasons"] = re.findall(r"^(?:FAILED|ERROR) (.+)$", text, re.M)
    collected = re.search(r"(\d+) selected|collected (\d+) items$", text, re.M)
    if code is None:
        out["stopped"] = f"after {limit:.0f} s, {len(found)} of {collected and collected[1]} run"
    assert found and code in (0, 1, None), f"pytest said {text[-400:]!r}"
    assert not out["failures"], f"{len(out['failures'])} tests failed"


def off(ours, exact):
    """The largest distance from the definition, absolute, and relative by the tensors' norms."""
    pairs = [(a.float(), b.float()) for a, b in zip(ours, exact)]
    assert all(a.isfinite().all() for a, _ in pairs), "not finite"
    return (max((a - b).abs().max().item() for a, b in pairs),
            max(((a - b).norm() / b.norm()).item() for a, b in pairs))


LIMITS = dict(newton_schulz=0.05, newton_schulz_stack=0.05)     # five steps of bfloat16, amplified


def again(fn, calls):
    """What a graph holds of a call that would else wait for Python."""
    for _ in range(calls):
        fn()


def timed(fns, device, graph):
    """Seconds of each function, as a graph launches it where it can."""
    rounds, calls = (1, 2) if device == "cpu" else (7, 10)
    if not graph:
        return bench.seconds(fns, device, rounds, 3)
    for fn in fns:
        fn()                                   # whatever compiles does so before it is recorded
    loops = [llm.capture(partial(again, fn, calls), torch.device(device), []) for fn in fns]
    return [t / calls for t in bench.seconds(loops, device, rounds, 3)]


def kernel_part(out, here, name):
    """A kernel against its definition in float32, plain PyTorch, torch.compile and its floor."""
    row = bench.kernel_row(here.device, name, "tiny" if here.device == "cpu" else "")
    exact = listed(row.exact())
    out["max_error"], out["error"] = off(listed(row.ours()), exact)
    floor = max(row.flops / here.rates["matmul_flops"], row.bytes / here.rates["copy_bytes"])
    ours, plain = timed([row.ours, row.plain], here.device, row.graph)
    out |= dict(ours_seconds=ours, plain_seconds=plain, over_plain=plain / ours,
                floor_seconds=floor, floor=floor / ours)
    out["launched_seconds"], = timed([row.ours], here.device, False)
    for side in ("ours", "plain"):
        out[f"{side}_bytes"] = bench.added(getattr(row, side), here.device)
    out["compiled_error"] = off(listed(row.compiled()), exact)[1]
    quick, = timed([row.compiled], here.device, row.graph)
    out |= dict(compiled_seconds=quick, over_compiled=quick / ours)
    torch.compiler.reset()                     # what it compiled holds the tensors
    most = LIMITS.get(name, 0.02) if here.device == "cuda" else 1e-4
    assert out["error"] <= most, f"{out['error']:.2g} off its definition, at most {most}"


def listed(x):
    """One tensor or several, as a tuple."""
    return x if isinstance(x, tuple) else (x,)


def generation_part(out, here, rows):
    """Sampling of so many rows from one prompt by the small model, with and without CUDA graphs."""
    job, tiny = job_of("135M", here), here.device == "cpu"
    net, c = fresh(job.config, job.device), job.config
    prompt, new, rows = (8, 4, rows // 64 + 1) if tiny else (128, 64, rows)
    prompts = job.ids(1, prompt)
    cache = 4 * c.num_hidden_layers * c.num_key_value_heads * c.head_dim * (prompt + new / 2)
    size = 2 * sum(p.numel() for p in net.parameters()) + rows * cache        # bytes of a step

    def sample():
        with autocast(job.device, "bfloat16"):
            generate(net, prompts, new, samples=rows, stop=[])
    for name, on in (("graphs", True), ("no_graphs", False)):
        with graphs(on, job.device):
            took, = bench.seconds([sample], job.device, job.rounds)
        floor = new * size / here.rates["copy_bytes"] / took
        out[name] = dict(seconds=took, tokens_per_second=rows * new / took, floor=floor)
    out["graphs_over_none"] = out["no_graphs"]["seconds"] / out["graphs"]["seconds"]


# --- the run --------------------------------------------------------------------------------------


def all_parts():
    """{name: Part}, what matters most first."""
    step = {}
    for shape in SHAPES:
        for method in OURS:
            for variant, options in VARIANTS.items():
                if variant != "no_graphs" or method == "grpo":
                    run = partial(step_part, shape=shape, method=method, **options)
                    cost = 12 if variant == "compiled" else 5
                    step[f"{method} {shape} {variant}"] = Part(cost, run)
    main = [name for name in step if name.endswith((" ours", " compiled"))]
    small, large = ([x for x in main if f" {shape} " in x] for shape in SHAPES)
    rest = sorted((x for x in step if x not in main), key=lambda x: [*VARIANTS].index(x.split()[2]))
    return ({"rates": Part(4, rates_part), "tests": Part(48, tests_part)}
            | {f"kernel {name}": Part(5, partial(kernel_part, name=name)) for name in bench.KERNELS}
            | {name: step[name] for name in small}
            | {f"generation {n}": Part(6, partial(generation_part, rows=n))
               for n in (1, 16, 64, 256)}
            | {name: step[name] for name in [*large, *rest]})


def in_short(error):
    """An exception's type, its first line, which says what happened, and its last."""
    lines = [line.strip()[:300] for line in str(error).strip().splitlines()] or [""]
    return " … ".join([f"{type(error).__name__}: {lines[0]}", *lines[-1:] * (len(lines) > 1)])


def guarded(part, here):
    """A part's record: its numbers, and what went wrong if anything did."""
    out, start = {}, time.time()
    try:
        clean(here.device)
        part.run(out, here)
        out["status"] = "done"
    except Exception as error:                 # out of memory, a kernel that does not compile, …
        out |= dict(status="failed", why=in_short(error), traceback=traceback.format_exc()[-6000:])
        traceback.clear_frames(error.__traceback__)         # which hold the part's tensors
    out["took"] = time.time() - start
    return out


def written(report, path):
    """The report so far, whole even if the run is killed while it is written."""
    report["ratios"] = ratios(report["parts"])
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_suffix(".tmp")
    new.write_text(json.dumps(report, indent=1))
    new.replace(path)


def run(report, parts, here, path, is_alive):
    """Run what is not in the report yet, as far as the time goes. -> whether the device lives"""
    for name, part in parts.items():
        if name in report["parts"]:
            continue
        used = time.time() - report["began"]
        if used + part.cost > here.seconds:
            why = f"{used:.0f} of {here.seconds:.0f} s were used, and it takes some {part.cost} s"
            report["parts"][name] = dict(status="skipped", why=why)
            continue
        report["parts"][name] = dict(status="running")
        written(report, path)
        report["parts"][name] = found = guarded(part, here)
        here.rates |= {k: found[k] for k in here.rates if name == "rates" and k in found}
        written(report, path)
        print(f"{time.time() - report['began']:6.1f} s  {name:<28}{found['status']:<8}"
              f"{found.get('why', '')}", flush=True)
        if found["status"] == "failed" and not is_alive(here.device):
            return False
    written(report, path)
    return True


def ratios(parts):
    """{method and shape: {variant: how many times as fast ours is, and its memory over the
    variant's}}."""
    out = {}
    for name, found in parts.items():
        base = parts.get(" ".join([*name.split()[:2], "ours"]), {})
        if "peak_bytes" in found and "peak_bytes" in base and base is not found:
            what, variant = name.rsplit(" ", 1)
            out.setdefault(what, {})[variant] = dict(
                speed=base["tokens_per_second"] / found["tokens_per_second"],
                memory=base["peak_bytes"] / found["peak_bytes"])
    return out


# --- the table ------------------------------------------------------------------------------------


def short(x, form="{:.0%}"):
    """A number in its form, or a dash where there is none."""
    return "-" if x is None else form.format(x)


def kernels_table(parts):
    """Lines of markdown."""
    yield ("| kernel | time | against plain PyTorch | against torch.compile | share of the floor "
           "| off the definition | memory, ours / plain |")
    yield "|---|---|---|---|---|---|---|"
    for name, x in parts.items():
        if name.startswith("kernel ") and "ours_seconds" in x:
            memory = " / ".join(short(x.get(k) and x[k] / 1e6, "{:,.0f} MB")
                                for k in ("ours_bytes", "plain_bytes"))
            yield (f"| `{name[7:]}` | {1e3 * x['ours_seconds']:.3f} ms "
                   f"| {short(x['over_plain'], '{:.2f}×')} "
                   f"| {short(x.get('over_compiled'), '{:.2f}×')} | {short(x['floor'])} "
                   f"| {short(x.get('error'), '{:.1e}')} | {memory} |")


def steps_table(parts):
    """Lines of markdown."""
    yield ("| step | model | how | tokens/s | MFU | of the device's | peak memory | ours over it: "
           "speed | memory |")
    yield "|---|---|---|---|---|---|---|---|---|"
    over = ratios(parts)
    for name, x in parts.items():
        if "peak_bytes" in x:
            method, shape, variant = name.split()
            r = over.get(f"{method} {shape}", {}).get(variant, {})
            yield (f"| {method} | {shape} | {variant.replace('_', ' ')} "
                   f"| {x['tokens_per_second']:,.0f} | {x['mfu']:.0%} "
                   f"| {short(x.get('mfu_of_device'))} | {x['peak_bytes'] / 1e9:.1f} GB "
                   f"| {short(r.get('speed'), '{:.2f}×')} | {short(r.get('memory'), '{:.2f}×')} |")


def generation_table(parts):
    """Lines of markdown."""
    yield "| rows | tokens/s | share of the floor | tokens/s without graphs | share of the floor |"
    yield "|---|---|---|---|---|"
    for name, x in parts.items():
        if name.startswith("generation ") and "graphs" in x:
            cells = [f"{x[k]['tokens_per_second']:,.0f} | {x[k]['floor']:.0%}"
                     for k in ("graphs", "no_graphs") if k in x]
            yield f"| {name[11:]} | {' | '.join(cells)} |"


def table(report):
    """The section of data/results/speed.md."""
    parts, rates = report["parts"], report["parts"].get("rates", {})
    tests = parts.get("tests", {})
    lines = ["## On a GPU", "",
             f"{report['device']}, torch {report['torch']}, Triton {report['triton']}, CUDA "
             f"{report['cuda']}, commit {report['commit']}, {report['date'][:10]} "
             "(`python tests/gpu.py`)"
             + ": a rehearsal, whose numbers say nothing." * report["rehearsal"]
             + f" A product of bfloat16 matrices runs at {rates.get('matmul_flops', 0) / 1e12:.3g} "
             f"TFLOP/s, a copy at {rates.get('copy_bytes', 0) / 1e9:,.0f} GB/s.", ""]
    counts = [f"{tests[k]} {k}" for k in ("passed", "failed", "error", "skipped") if tests.get(k)]
    lines += [f"GPU tests: {', '.join(counts) or 'not run'}"
              + f", stopped {tests['stopped']}." if tests.get("stopped") else
              f"GPU tests: {', '.join(counts) or 'not run'}.", ""]
    for title, rows in (("Kernels, forward and backward where there is one", kernels_table),
                        ("Steps, bfloat16 autocast", steps_table),
                        ("Generation by the model of 135 M", generation_table)):
        lines += [f"### {title}", "", *rows(parts), ""]
    for status in ("failed", "skipped", "running"):
        lines += [f"- {name}: {status}, {x.get('why', 'the run ended here')}"
                  for name, x in parts.items() if x["status"] == status]
    return "\n".join(lines).rstrip() + "\n"


def arguments(argv):
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[1])
    parser.add_argument("words", nargs="*", help="only parts whose name contains one of them")
    parser.add_argument("--cpu", action="store_true", help="rehearse with tiny sizes")
    parser.add_argument("--seconds", type=float, default=240)
    parser.add_argument("--out", type=Path, default=ROOT / "out" / "gpu.json")
    parser.add_argument("--table", type=Path, help="print a report's tables and stop")
    parser.add_argument("--go_on", action="store_true", help="with what is not in --out yet")
    options = parser.parse_args(argv)
    if not (options.table or options.cpu or torch.cuda.is_available()):
        parser.error("this torch sees no CUDA device: --cpu rehearses without one")
    return options


def main(argv=None):
    """Run, or print a table. -> the exit code"""
    argv = sys.argv[1:] if argv is None else argv
    options = arguments(argv)
    if options.table:
        print(table(json.loads(options.table.read_text())), end="")
        return 0
    device, parts = "cpu" if options.cpu else "cuda", all_parts()
    if options.words:
        parts = {k: x for k, x in parts.items()
                 if k == "rates" or any(word in k for word in options.words)}
        if len(parts) == 1 and "rates" not in options.words:
            sys.exit(f"no part has {' or '.join(options.words)} in its name: choose from "
                     f"{', '.join(all_parts())}")
    report = machine(device) | dict(began=time.time(), seconds=options.seconds, parts={})
    if options.go_on:
        report = json.loads(options.out.read_text())
    bench.BACKEND = "inductor" if device == "cuda" else "aot_eager"
    found = report["parts"].get("rates", {})
    unknown = dict(matmul_flops=float("nan"), copy_bytes=float("nan"), device_flops=None)
    here = SimpleNamespace(device=device, seconds=options.seconds,
                           rates={k: found.get(k, x) for k, x in unknown.items()})
    left = report["began"] + options.seconds - time.time()
    faulthandler.dump_traceback_later(max(left, 0) + 60, exit=True,    # of a kernel without end
                                      file=sys.__stderr__)
    try:
        lives = run(report, parts, here, options.out, alive)
    finally:
        faulthandler.cancel_dump_traceback_later()
    if not lives:
        more = [] if options.go_on else ["--go_on"]
        os.execv(sys.executable, [sys.executable, __file__, *argv, *more])
    report["took"] = time.time() - report["began"]
    written(report, options.out)
    print(table(report))
    return int(any(x["status"] != "done" and x["status"] != "skipped"
                   for x in report["parts"].values()))


if __name__ == "__main__":
    sys.exit(main())
