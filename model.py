"""
model.py - the transformer that every script trains: a block, log-probs, sampling, checkpoints.

    python model.py out/sft/base --prompt "def add(a, b):"    # go on; without --prompt: a chat
    python model.py FOLDER --eval text.txt                    # or rows, pairs; --export; --help

Letters  B rows, T tokens, D width, V vocabulary, H heads (K for keys and values), S cache slots,
         E experts

    model_type      what it adds to RMSNorm, RoPE, grouped queries, SwiGLU: a row of FAMILIES
    llama           nothing                                  2302.13971
    mistral         layers that see a window of tokens       2310.06825
    qwen2, qwen3    bias on q, k, v; RMSNorm on their heads  2407.10671, 2505.09388
    mixtral         top-k experts instead of the MLP         2401.04088
    qwen3_moe       both of the last two                     2505.09388
    phi3, phimoe    fused tensors; LayerNorm and experts     2404.14219, 2409.12136
    gemma3_text     norms around, GELU, two kinds of layers  2503.19786

Read the block, then token_logprobs and generate. The chapters are Hugging Face folders in and out,
the parts that other families put into the block's tables, adapters, ranks, the command line.
Watch    one shift by one, in token_logprobs: logp[b, t] is of token t. Padding is always right, so
         attention needs no mask.
"""
import copy
import json
import math
import re
import sys
import time
import warnings
from bisect import bisect_left
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, fields, replace
from functools import lru_cache, partial
from inspect import signature
from pathlib import Path
from types import SimpleNamespace
from typing import Literal, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn
from torch.nn.utils import clip_grad_norm_
from torch.nn.utils.rnn import pad_sequence
from torch.utils.checkpoint import checkpoint as recomputed
from tqdm import tqdm

import kernels
from data.run import (KINDS, Count, NonNegative, Positive, Range, UserError, bandwidth, cast,
                      checkpoint, cli, comments_of, device_of, expect, nearest, not_finite,
                      older_than, parse, rank, ranks, read_json, refuse_ranks, sha256, steps_of)
from data.tokenizer import Tokenizer
from kernels import PackedLinear, decode_attention, linear_logprob, rms_norm, rope, swiglu

# --- config ---------------------------------------------------------------------------------------

# what chapters put into the block and the sampling; the key is a value of the config or an option
ROPES = dict(default=lambda freq, c, long: (freq, 1.0))  # rope_type: frequencies, a factor of all
ACTS = dict(silu=swiglu)                 # hidden_act: its product of gate and up
NORMS, MLPS = {}, {}                     # Family's: modules of (width, eps), of (config, width)
GATES = {}                               # head_router: the module that weighs the heads' outputs
SOURCES = {}                             # field of a layer's number: norm that later keys come from
SHAPED = {}                              # field that no other tool knows: those that go with it
CUTS = {}                                # option of tempered: what it drops from the logits
LOOPS = {}                               # better than decode, the last best: whether it fits


@dataclass(frozen=True)
class ModelConfig:
    """The shape of a model, under Hugging Face's own names: config.json needs no dictionary."""
    model_type: str = "qwen3"
    vocab_size: int = 2048
    hidden_size: int = 192
    intermediate_size: int = 512             # of one expert, if there are experts
    num_hidden_layers: int = 4
    num_attention_heads: int = 6
    num_key_value_heads: int = 3
    head_dim: int = 32
    max_position_embeddings: int = 512
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    rope_scaling: tuple = ()                 # pairs: ("rope_type", "llama3"), ("factor", 8.0), …
    rope_local_base_freq: float = 0.0        # theta of layers with a window; 0: rope_theta
    partial_rotary_factor: float = 1.0       # so much of a head is turned
    hidden_act: str = "silu"                 # a row of ACTS
    attention_bias: bool = False             # on q, k, v, o
    mlp_bias: bool = False
    lm_head_bias: bool = False
    query_pre_attn_scalar: float = 0.0       # scores are over its root; 0: head_dim
    sliding_window: int = 0                  # tokens that a "sliding_attention" layer sees
    layer_types: tuple = ()                  # that or "full_attention", of each layer; (): all full
    tie_word_embeddings: bool = True
    num_experts: int = 0
    num_experts_per_tok: int = 2
    norm_topk_prob: bool = True              # chosen experts' weights sum to 1 (Mixtral: always)
    router_aux_loss_coef: float = 0.01
    router_jitter_noise: float = 0.0         # sparsemixer: how near an expert is a rival
    bos_token_id: int = -1                   # -1: none
    eos_token_id: tuple = ()                 # all ids that end a text
    pad_token_id: int = -1
    layer_widths: tuple = ()                 # each layer's MLP, 0: none; (): all alike
    swift_layer: int = 0                     # layers from here on share one state's keys; 0: none
    shared_heads: int = 0                    # with routed_heads: the first heads, always on
    routed_heads: int = 0                    # of the others, so many a token; 0: all, no router
    head_router: str = "learned"             # or norm: by the norm of the head's query

    @property
    def family(self):
        """What its model_type switches: a row of FAMILIES."""
        return FAMILIES[self.model_type]

    @property
    def moe(self):
        return self.family.mlp != "dense"


# --- transformer ----------------------------------------------------------------------------------


@lru_cache(8)
def rope_table(config, device, local=False, long=False):
    """cos and sin of all positions' angles, [positions, hd/2] in float32 (RoFormer, 2104.09864).
    local: of layers with a window that have a theta of their own; long: beyond switch(config)."""
    half = int(config.head_dim * config.partial_rotary_factor) // 2
    theta = config.rope_local_base_freq if local else config.rope_theta
    freq = theta ** (-torch.arange(half, dtype=torch.float32) / half)                    # [hd/2]
    options = {} if local else dict(config.rope_scaling)
    freq, factor = ROPES[options.pop("rope_type", "default")](freq, config, long, **options)
    angle = torch.outer(torch.arange(config.max_position_embeddings).float(), freq)      # [S, hd/2]
    return (factor * angle.cos()).to(device), (factor * angle.sin()).to(device)


class RMSNorm(nn.Module):
    """kernels.rms_norm and its weight."""

    def __init__(self, width, eps):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(width)), eps

    def forward(self, x):
        return rms_norm(x, self.weight, self.eps)


class Cache:
    """Keys and values of B rows, each of its own length; one tensor for all layers."""

    def __init__(self, config, rows, slots, device, dtype):
        shape = config.num_hidden_layers, rows, config.num_key_value_heads, slots, config.head_dim
        self.k, self.v = (torch.zeros(shape, device=device, dtype=dtype) for _ in range(2))
        self.length = torch.zeros(rows, dtype=torch.long, device=device)           # [B] tokens held
        self.used = 0                        # the longest, known without asking the device
        self.static = False                  # used stays, an upper bound: all steps look alike

    def at(self, T):
        """Where the next T tokens go: positions [B, T], rows [B K T] of a layer's [B K S, hd]."""
        (B, K, S), device = self.k.shape[1:4], self.length.device
        positions = self.length[:, None] + torch.arange(T, device=device)                # [B, T]
        first = torch.arange(0, B * K * S, S, device=device).view(B, K, 1)
        return positions, (first + positions[:, None]).flatten()

    def sees(self, T):
        """What the next T tokens see, as attend takes it."""
        if not self.used:
            return None
        return self.length + 1 if T == 1 else after(self.length, T, self.used + T)

    def put(self, layer, k, v, at):
        """Store k, v [B, K, T, hd] there; return all keys and values of the layer so far."""
        for cache, new in ((self.k, k), (self.v, v)):
            rows = cache[layer].view(-1, cache.size(-1))                             # [B K S, hd]
            rows.index_copy_(0, at, new.to(cache.dtype).flatten(0, 2))
        end = self.used + k.size(2)
        return self.k[layer, :, :, :end], self.v[layer, :, :, :end]                  # [B, K, S, hd]

    def spread(self, rows, slots):
        """Row i becomes a copy of old row rows[i], with that many more slots."""
        self.k, self.v = (F.pad(x[:, rows], (0, 0, 0, slots)) for x in (self.k, self.v))
        self.length = self.length[rows]

    def keep(self, rows):
        """Row i becomes old row rows[i], in place, the others go; rows[i] is i or >= len(rows)."""
        n = len(rows)
        moved = (rows != torch.arange(n, device=rows.device)).nonzero().squeeze(1)
        for x in (self.k, self.v):
            x[:, moved, :, :self.used] = x[:, rows[moved], :, :self.used]
        self.k, self.v, self.length = self.k[:, :n], self.v[:, :n], self.length[rows]


def attend(q, k, v, visible, window):
    """softmax(q kᵀ / sqrt(hd)) v of q [B, H, T, hd] over what they see of k, v [B, K, S, hd].
    visible: None, as in plain causal attention; [B], each row's first so many slots (T = 1); or a
    function that does it all. window: of them only the last so many (0: all)."""
    if callable(visible):
        return visible(q, k, v, window)
    if visible is not None:
        y = decode_attention(q[:, :, 0].to(k.dtype), k, v, visible, window)
        return y[:, :, None].to(q.dtype)
    T = q.size(2)
    near = within(T, window, q.device) if 0 < window < T else None
    return look(q, *(x[:, :, :T].to(q.dtype) for x in (k, v)), near)


class Attention(nn.Module):
    """Grouped-query attention (2305.13245), rotary; bias, q/k norm, a window where there are."""

    def __init__(self, c, layer):
        super().__init__()
        self.hd, self.window = c.head_dim, window_of(c, layer)
        self.turn = rope if c.partial_rotary_factor == 1 else partial_rope
        self.scale = math.sqrt(c.head_dim / (c.query_pre_attn_scalar or c.head_dim))
        bias = c.family.qkv_bias or c.attention_bias
        self.q_proj = nn.Linear(c.hidden_size, c.num_attention_heads * self.hd, bias=bias)
        self.k_proj = nn.Linear(c.hidden_size, c.num_key_value_heads * self.hd, bias=bias)
        self.v_proj = nn.Linear(c.hidden_size, c.num_key_value_heads * self.hd, bias=bias)
        self.o_proj = nn.Linear(c.num_attention_heads * self.hd, c.hidden_size,
                                bias=c.attention_bias)
        self.qk_norm, norm = c.family.qk_norm, NORMS[c.family.norm]
        if self.qk_norm:
            self.q_norm, self.k_norm = (norm(self.hd, c.rms_norm_eps) for _ in range(2))
        self.heads = GATES[c.head_router](c) if c.routed_heads else None

    def forward(self, x, cos, sin, cache, layer, at, visible, source=None):
        B, T, _ = x.shape
        source = x if source is None else source               # what keys and values are made of
        q = self.q_proj(x).view(B, T, -1, self.hd)
        k, v = (f(source).view(B, T, -1, self.hd) for f in (self.k_proj, self.v_proj))
        if self.qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))                        # [B, H or K, T, hd]
        q, k = self.turn(q, cos, sin), self.turn(k, cos, sin)
        q = q if self.scale == 1 else q * self.scale
        gate = None if self.heads is None else self.heads(x, q)                       # [B, H, T, 1]
        if cache is not None:
            k, v = cache.put(layer, k, v, at)
        y = attend(q, k, v, visible, self.window)                                    # [B, H, T, hd]
        if gate is not None:
            y = y * gate.to(y.dtype)
        return self.o_proj(y.transpose(1, 2).reshape(B, T, -1))


class MLP(nn.Module):
    """SwiGLU (2002.05202):  down( silu(gate x) * up x ), or another of ACTS."""

    def __init__(self, c, width):
        super().__init__()
        self.gate_proj = nn.Linear(c.hidden_size, width, bias=c.mlp_bias)
        self.up_proj = nn.Linear(c.hidden_size, width, bias=c.mlp_bias)
        self.down_proj = nn.Linear(width, c.hidden_size, bias=c.mlp_bias)
        self.act = ACTS[c.hidden_act]

    def forward(self, x):
        return self.down_proj(self.act(self.gate_proj(x), self.up_proj(x)))


NORMS["rms"], MLPS["dense"] = RMSNorm, MLP


class Block(nn.Module):
    """Pre-norm attention, then pre-norm MLP (width 0: none), each added to the residual stream."""

    def __init__(self, c, layer):
        super().__init__()
        width = c.layer_widths[layer] if c.layer_widths else c.intermediate_size
        norm = partial(NORMS[c.family.norm], c.hidden_size, c.rms_norm_eps)
        self.input_layernorm = norm()
        self.self_attn = Attention(c, layer)
        self.post_attention_layernorm = norm() if width else None
        self.mlp = MLPS[c.family.mlp](c, width) if width else None
        self.behind_attn = norm() if c.family.around else None
        self.behind_mlp = norm() if c.family.around and width else None

    def forward(self, x, *where):
        y = self.self_attn(self.input_layernorm(x), *where)
        x = x + (y if self.behind_attn is None else self.behind_attn(y))
        if self.mlp is None:
            return x
        y = self.mlp(self.post_attention_layernorm(x))
        return x + (y if self.behind_mlp is None else self.behind_mlp(y))


class Transformer(nn.Module):
    """tokens [B, T] -> hidden [B, T, D], final norm applied; logits only where they are needed."""

    def __init__(self, config):
        super().__init__()
        self.config, self.generation = config, {}      # what generation_config.json says besides
        self.recompute = False               # blocks' activations in the backward pass: see again
        self.products = "float32"            # bfloat16: what load() kept layers in, if in another
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config, i) for i in range(config.num_hidden_layers))
        self.norm = NORMS[config.family.norm](config.hidden_size, config.rms_norm_eps)
        if not config.tie_word_embeddings:
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, config.lm_head_bias)
        self.bias = config.lm_head_bias and not config.tie_word_embeddings
        self.local, self.switch = local_layers(config), switch(config)
        self.sources = add_sources(self)     # layer's number: the norm that makes its source

    @property
    def head(self):
        """The output matrix [V, D]: the embedding itself where the two are tied."""
        if self.bias:
            return with_bias(self.lm_head)                                            # [V, D + 8]
        return (self.embed_tokens if self.config.tie_word_embeddings else self.lm_head).weight

    def embed(self, tokens):
        """tokens [B, T] -> what enters the first block [B, T, D]."""
        x = self.embed_tokens(tokens)
        return x * rounded_root(x.size(-1), x.dtype) if self.config.family.scaled else x

    def forward(self, tokens, cache=None):
        """With a cache, row b's tokens follow its cache.length[b] earlier ones; the cache grows.
        Raises UserError beyond the context."""
        T, old = tokens.size(1), cache.used if cache else 0
        check_length(self, old, old + T)
        at = visible = None
        if cache is not None:
            (positions, at), visible = cache.at(T), cache.sees(T)                  # [B, T], [B K T]
        angles = {}                          # of layers with and without a theta of their own
        for local in set(self.local):
            table = rope_table(self.config, tokens.device, local, old + T > self.switch)
            angles[local] = [x[:T] if cache is None else x[positions][:, None] for x in table]
        x = self.embed(tokens)                                                           # [B, T, D]
        source = None                        # of keys and values; None: each layer's own input
        run = again if self.recompute and torch.is_grad_enabled() else Block.__call__
        with autocast(x.device, self.products):
            for i, block in enumerate(self.layers):
                if i in self.sources:
                    source = getattr(self, self.sources[i])(x)                           # [B, T, D]
                x = run(block, x, *angles[self.local[i]], cache, i, at, visible, source)
        if cache is not None:
            cache.length += T
            cache.used += 0 if cache.static else T
        return with_one(self.norm(x)) if self.bias else self.norm(x)

    def logits(self, hidden):
        """[…, D] -> float32 [..., V]."""
        return F.linear(hidden, self.head).float()


# --- scoring --------------------------------------------------------------------------------------


def collate(rows, pad, device="cpu"):
    """[(prompt ids, completion ids)] -> right-padded tokens, mask [B, T]: 1 on completions, but for
    what they only read, written ~id."""
    width = max(len(p) + len(c) for p, c in rows)
    tokens = torch.full((len(rows), width), ~max(pad, 0))                # [B, T], ~id: not scored
    for i, (p, c) in enumerate(rows):
        tokens[i, :len(p) + len(c)] = torch.as_tensor([*(~x for x in p), *c])
    mask = (tokens >= 0).float()                                                         # [B, T]
    return torch.where(tokens < 0, ~tokens, tokens).to(device), mask.to(device)


def token_logprobs(model, tokens, mask=None, *, temperature=1.0, entropy=False):
    """Aligned float32 log-probs [B, T]: out[b, t] = log p(tokens[b, t] | tokens[b, :t]), t > 0.

    The one place where the shift by one is made; 0 at t = 0, and off the mask. [B, T, V] is never
    held: the head runs in chunks of rows. entropy=True: (logp, entropy of the prediction of t).
    """
    target = tokens[:, 1:]                                                            # [B, T-1]
    where = torch.ones_like(target, dtype=torch.bool) if mask is None else mask[:, 1:] > 0
    hidden = states(model, tokens, F.pad(where, (0, 1)))                                 # [N, D]

    def aligned(x):
        """One number for each place where the mask is 1 -> [B, T]."""
        return F.pad(torch.zeros_like(where, dtype=x.dtype).masked_scatter(where, x), (1, 0))

    out = linear_logprob(hidden, model.head, target[where], temperature, entropy)              # [N]
    return tuple(map(aligned, out)) if entropy else aligned(out)


# --- generation -----------------------------------------------------------------------------------


class Rollout(NamedTuple):
    """Completions, `samples` rows per prompt in order."""
    tokens: torch.Tensor                     # [B, T] prompt and completion, right-padded
    mask: torch.Tensor                       # [B, T] 1 on completions, the stop token included
    logp: torch.Tensor                       # [B, T] the sampler's log-probs
    prompt_len: torch.Tensor                 # [B]
    finished: torch.Tensor                   # [B] by itself, not by running out of tokens
    row_steps: int = 0                       # one-token forwards after the prefill, over all rows

    def completions(self):
        """Each row's completion ids without the stop token, as lists."""
        end = self.mask.sum(1).long() - self.finished.long() + self.prompt_len           # [B]
        return [row[s:e].tolist() for row, s, e in zip(self.tokens, self.prompt_len, end)]


def tempered(logits, temperature=1.0, top_k=0, top_p=1.0):
    """logits [..., V] / temperature, -inf where CUTS truncate: softmax gives what is sampled."""
    logits, options = logits / temperature, dict(top_k=top_k, top_p=top_p)
    for name, cut in CUTS.items():
        logits = cut(logits, options[name])
    return logits


def pick(logits, u, temperature=1.0, top_k=0, top_p=1.0):
    """Sample by inverting the distribution function: logits [B, V], u [B] in [0, 1) -> tokens [B],
    log-probs [B] under the distribution sampled from; greedy (temperature 0): softmax(logits)."""
    if temperature == 0:
        token = logits.argmax(-1)                                                        # [B]
        return token, torch.log_softmax(logits, -1).gather(1, token[:, None]).squeeze(1)
    logits = tempered(logits, temperature, top_k, top_p)
    logits = logits - logits.amax(-1, keepdim=True)                                      # [B, V]
    cdf = logits.exp().double().cumsum_(-1)                                       # times a constant
    whole = cdf[:, -1:]                                                                  # [B, 1]
    token = torch.searchsorted(cdf, u[:, None].double() * whole, right=True)   # never one of mass 0
    token = token.clamp(max=logits.size(-1) - 1)           # NaN finds no place: see generate
    logp = logits.gather(1, token) - whole.log().to(logits.dtype)
    return token.squeeze(1), logp.squeeze(1)


def read(model, tokens, length, make=Cache):
    """Read prompts, tokens [U, T] of `length` [U]. -> the states after them [U, D], their cache."""
    cache = make(model.config, *tokens.shape, tokens.device, precision(model))
    hidden = in_parts(model, tokens, length, cache)
    cache.length = length
    return hidden, cache


def decode(queue, u, stop, choose):
    """Draw all rows' tokens by u [B, new] in [0, 1), all at once.
    -> tokens, log-probs [B, new], and one-token forwards computed, summed over rows."""
    _, hidden, caches = queue.start()                        # each model's [B, D] after the prompt
    out, logp, token = torch.zeros_like(u, dtype=torch.long), torch.zeros_like(u), None
    for i in range(u.size(1)):
        if i:
            hidden = [m(token[:, None], cache)[:, 0] for m, cache in zip(queue.steppers, caches)]
        token, logp[:, i] = choose([m.logits(h) for m, h in zip(queue.steppers, hidden)], u[:, i])
        out[:, i] = token
    return out, logp, len(u) * max(u.size(1) - 1, 0)


@torch.no_grad()
def generate(model, prompts, max_new_tokens, *, samples=1, temperature=1.0, top_k=0, top_p=1.0,
             stop=None, generator=None, contrast=None, cache=Cache, slots=0, chunk=0):
    """Sample `samples` completions per prompt (lists of ids of any lengths) -> Rollout, P·G rows.

    Each distinct prompt is read once. Row b's i-th draw is a number fixed beforehand: which other
    rows still run changes nothing. stop: ids that end a completion (default: the model's eos).
    contrast=(other, alpha) samples from softmax(l + alpha (l - l_other)), l the two models' logits,
    or of what alpha(l, l_other) says.
    cache: what makes the cache of keys and values, with Cache's methods. slots, chunk: Queue's.
    Raises UserError for an empty prompt, or one that does not leave max_new_tokens of context.
    """
    config, device = model.config, model.head.device
    check_request(config, prompts, samples, max_new_tokens, temperature, top_k)
    stop = torch.tensor(config.eos_token_id if stop is None else stop, device=device).long()
    pad, cut = max(config.pad_token_id, 0), (temperature, top_k, top_p)
    distinct, length, rows = prompts_apart(prompts, samples, pad, device)      # [U, T], [U], [B]
    u = torch.rand(len(rows), max_new_tokens, generator=generator).to(device)            # [B, new]
    models, mine = [model, contrast[0]] if contrast else [model], own_rows(len(rows)).to(device)
    queue = Queue(models, distinct, length, rows[mine], max_new_tokens, cache, slots, chunk)

    def choose(logits, u):
        """Each model's logits [n, V], u [n] -> tokens and their log-probs [n]."""
        bar.update()
        mixed = against(*logits, contrast[1]) if contrast else logits[0]
        return pick(mixed, u, *cut)

    loops = [decode, *(loop for loop, fits in LOOPS.items() if fits(queue, stop))]
    with gathered(*models), waiting("sampling", max_new_tokens) as bar:     # each rank its rows
        out, logp, row_steps = loops[-1](queue, u[mine], stop, choose)
    check_finite(logp)
    out, logp = (from_ranks(x, len(rows)) for x in (out, logp))
    row_steps = summed(dict(row_steps=row_steps))["row_steps"]
    return collect(distinct[rows], length[rows], out, logp, stop, pad, row_steps)


# === families: Hugging Face, what a model_type switches in the block ==============================


class Family(NamedTuple):
    """What a model_type switches in the block, whatever else its config.json says."""
    norm: str = "rms"                        # a row of NORMS
    mlp: str = "dense"                       # a row of MLPS
    qkv_bias: bool = False                   # on q, k, v alone; attention_bias: on o, too
    qk_norm: bool = False                    # a norm on every query and key head
    around: bool = False                     # norms behind attention and MLP, too
    scaled: bool = False                     # embeddings times sqrt(D)


FAMILIES = dict(llama=Family(), mistral=Family(), phi3=Family(), qwen2=Family(qkv_bias=True),
                qwen3=Family(qk_norm=True), mixtral=Family(mlp="experts"),
                qwen3_moe=Family(mlp="experts", qk_norm=True),
                phimoe=Family(norm="layer", mlp="sparsemixer"),
                gemma3_text=Family(norm="rms_plus_one", qk_norm=True, around=True, scaled=True))


# === recompute: 1604.06174, memory of one block's activations in the place of all blocks' =========


def again(block, *inputs):
    """The block's output, of which only its input is kept: the backward pass computes the rest
    again, bit for bit. A third more arithmetic in a training step."""
    return recomputed(block, *inputs, use_reentrant=False, preserve_rng_state=False)


# === limits: ours, what is too long, and where longrope changes ===================================


def switch(config):
    """The number of tokens above which longrope takes its other factors; infinity without it."""
    options = dict(config.rope_scaling)
    longrope = options.get("rope_type") == "longrope"
    return options["original_max_position_embeddings"] if longrope else math.inf


def check_length(model, old, length):
    """UserError for more tokens than the context, and for a cache from below longrope's switch."""
    if length > (context := model.config.max_position_embeddings):
        raise UserError(f"{length} tokens exceed the model's context of {context}: "
                        "shorten the text or start from a model with a longer context")
    if 0 < old <= model.switch < length:
        raise UserError(f"the cache was made of {old} tokens, and above {model.switch} this "
                        "model's longrope changes all positions: read the whole text anew")


def check_request(config, prompts, samples, new, temperature, top_k):
    """UserError for what generate cannot do."""
    longest, context = max(map(len, prompts), default=0), config.max_position_embeddings
    if longest == 0 or min(map(len, prompts)) == 0:
        raise UserError("generate needs at least one prompt, and every prompt at least one token")
    if samples < 1 or min(new, temperature, top_k) < 0:
        raise UserError(f"generate cannot make {samples} samples of {new} new tokens, temperature "
                        f"{temperature}, top_k {top_k}: ask for a sample, and nothing below 0")
    if longest + new > context:
        raise UserError(f"a prompt of {longest} tokens and {new} new ones exceed the context of "
                        f"{context}: shorten the prompt or lower the number of new tokens")
    if min(map(len, prompts)) <= switch(config) < longest + new:
        raise UserError(f"prompts of {min(map(len, prompts))} to {longest} tokens and {new} new "
                        f"ones lie on both sides of {switch(config)}, where this model's longrope "
                        "changes all positions: keep prompt and new tokens on one side")


def check_slots(models, length, make, slots, chunk):
    """UserError for slots and chunk that generate cannot use."""
    if min(slots, chunk) < 0 or chunk and not slots:
        raise UserError(f"slots {slots}, chunk {chunk}: expected 0 or more, and slots for a chunk, "
                        "which is read while other rows decode")
    if slots and make is not Cache:
        raise UserError("slots: in this cache no row can take another's place; leave slots at 0")
    if chunk and int(length.max()) > min(m.switch for m in models):
        raise UserError("chunk: a prompt beyond longrope's switch is read at once; leave it at 0")


def waiting(what, total):
    """A bar for what takes more than five seconds, on a terminal, of the first rank."""
    return tqdm(total=total, desc=what, delay=5, leave=False, disable=rank() > 0 or None)


def check_finite(logp):
    """UserError if a model predicts no numbers."""
    if not logp.isfinite().all():
        raise UserError("the model's predictions are not finite: its weights have diverged, or "
                        "overflow in this --dtype; go back to an older checkpoint and a lower --lr")


# === rows: ours, from prompts to rows, and from what was decoded to a rollout =====================


def prompts_apart(prompts, samples, pad, device):
    """The distinct prompts [U, T], right-padded, their lengths [U], and which of them each row
    continues [B]: `samples` rows a prompt, in order."""
    prompts = [tuple(p) for p in prompts]
    index = {p: i for i, p in enumerate(dict.fromkeys(prompts))}
    rows = torch.tensor([index[p] for p in prompts], device=device).repeat_interleave(samples)
    distinct, _ = collate([(p, ()) for p in index], pad, device)                         # [U, T]
    return distinct, torch.tensor([len(p) for p in index], device=device), rows


def collect(prompt, length, out, logp, stop, pad, row_steps):
    """What was decoded -> Rollout: each row is cut after its first stop, and follows its prompt.
    prompt [B, T] of `length` [B]; out, logp [B, new], where a row may run on after its stop."""
    hit = torch.isin(out, stop)                                                          # [B, new]
    after = hit.cumsum(1) > hit
    out, logp, mask = out.masked_fill(after, pad), logp.masked_fill(after, 0), (~after).float()
    width = int((length + mask.sum(1)).max())
    place = length[:, None] + torch.arange(out.size(1), device=out.device)               # [B, new]

    def join(left, right):
        wide = F.pad(left, (0, out.size(1)))                                          # [B, T + new]
        return wide.scatter(1, place, right)[:, :width].contiguous()

    zero = torch.zeros_like(prompt, dtype=logp.dtype)
    tokens, mask, logp = join(prompt, out), join(zero, mask), join(zero, logp)
    return Rollout(tokens, mask, logp, length, hit.any(1), row_steps)


# === truncation: 1805.04833, 1904.09751, sample from the top k or the top p only ==================


def top_k(logits, k):
    """The k likeliest (1805.04833), the others -inf.   logits [..., V]; 0: all"""
    if not k:
        return logits
    kth = logits.topk(min(k, logits.size(-1)), -1).values[..., -1:]                      # [..., 1]
    return logits.masked_fill(logits < kth, -math.inf)


def top_p(logits, p):
    """The likeliest of total mass p (nucleus, 1904.09751), the others -inf.   logits [..., V]"""
    if p >= 1:
        return logits
    value, index = logits.sort(-1, descending=True)                                      # [..., V]
    before = value.softmax(-1).cumsum(-1) - value.softmax(-1)                     # mass before each
    beyond = before >= max(p, 1e-9)
    return logits.masked_fill(torch.zeros_like(beyond).scatter(-1, index, beyond), -math.inf)


CUTS["top_k"], CUTS["top_p"] = top_k, top_p


# === against: 2210.15097, what is sampled where another model speaks, too =========================


def against(first, other, alpha):
    """l + α (l - l_other) of two models' logits, or what a function of both says.   [n, V]"""
    return alpha(first, other) if callable(alpha) else first + alpha * (first - other)


# === groups: 2305.13245, several heads' queries of one head's keys and values =====================


def knows_groups(q, mask):
    """Whether PyTorch's attention is to read a group's keys in place. On a GPU in two bytes and
    without a mask, or it would hold all scores at once. On a CPU where nothing learns: gradients
    would be summed in another order, and no run end where it did."""
    return mask is None and q.element_size() == 2 if q.is_cuda else not torch.is_grad_enabled()


def look(q, k, v, mask=None):
    """PyTorch's attention of q [B, H, T, hd] over k, v [B, K, S, hd] where the mask is true, or, if
    there is none, causal."""
    group = q.size(1) // k.size(1)
    if group > 1 and not knows_groups(q, mask):
        k, v = (x.repeat_interleave(group, 1) for x in (k, v))
    return F.scaled_dot_product_attention(q, k, v, mask, is_causal=mask is None,
                                          enable_gqa=k.size(1) < q.size(1))


# === reading: 2308.16369, prompts in parts, tokens that follow a cache's ==========================

PREFILL = 8192           # tokens that one forward reads at most


def precision(model):
    """The dtype of the model's keys and values: autocast's, or that of its weights."""
    kind = model.head.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else model.head.dtype


def after(length, T, slots):
    """attend's function for the T tokens that follow row b's first length[b] of so many slots."""
    end = length[:, None] + torch.arange(T, device=length.device)                        # [B, T]
    seen = torch.arange(slots, device=length.device) <= end[:, None, :, None]     # [B, 1, T, S]

    def attention(q, k, v, window):
        B, K, hd = len(q), k.size(1), q.size(3)
        visible = nearest_of(seen, window) if window else seen
        mask = visible.repeat(1, 1, q.size(1) // K, 1)   # a group is one head's queries: no copies
        y = F.scaled_dot_product_attention(q.reshape(B, K, -1, hd), k.to(q.dtype), v.to(q.dtype),
                                           attn_mask=mask)
        return y.reshape(q.shape)
    return attention


def admit(cache, slots, prompts, rows):
    """Rows of a cache of prompts take the place of rows `slots` of a cache at least as wide."""
    S = prompts.k.size(3)
    cache.k[:, slots, :, :S], cache.v[:, slots, :, :S] = prompts.k[:, rows], prompts.v[:, rows]
    cache.length[slots] = prompts.length[rows]


def state_at(hidden, place, before=None):
    """hidden [U, T, D] at place [U]; where that is outside of it, what was there before [U, D]."""
    at = place.clamp(0, hidden.size(1) - 1)
    state = hidden[torch.arange(len(at), device=at.device), at]
    return state if before is None else torch.where((at == place)[:, None], state, before)


def in_parts(model, tokens, length, cache):
    """The states after prompts [U, D], read into an empty cache: all at once, or longest first, as
    many as PREFILL tokens hold without the others' padding, and a longer one in parts."""
    if tokens.numel() <= PREFILL or type(cache) is not Cache:
        return state_at(model(tokens, cache), length - 1)
    order, states = length.argsort(descending=True, stable=True), []
    rest, widths = order, length[order].tolist()
    while widths:
        width, count = widths[0], max(PREFILL // widths[0], 1)
        some, rest, widths = rest[:count], rest[count:], widths[count:]
        part, state = Cache(model.config, len(some), width, tokens.device, cache.k.dtype), None
        whole = width <= PREFILL or width > model.switch         # longrope: beyond it all at once
        step = width if whole else max(PREFILL // 8, 1)          # or its mask would be large
        for i in range(0, width, step):
            hidden = model(tokens[some, i:min(i + step, width)], part)
            state = state_at(hidden, length[some] - 1 - i, state)
        admit(cache, some, part, slice(None))
        states.append(state)
    cache.used = tokens.size(1)
    return torch.cat(states)[order.argsort()]


def prefill(model, tokens, length, rows, new):
    """Read each distinct prompt once: tokens [U, T] of `length` [U]; row b continues rows[b].
    -> the hidden state after every row's prompt [B, D], and their cache with `new` free slots."""
    hidden, cache = read(model, tokens, length)
    cache.spread(rows, new)
    return hidden[rows], cache


# === queue: ours, rows that wait for a slot, prompts that are read when they are wanted ===========


class Queue:
    """The rows of a request in the order in which they get a slot, and the prompts read for them.

    slots: so many rows decode at once (0: all); the longest prompts are first, and a prompt's rows
    together: it is read once, and kept until the last of them has a slot. chunk: see sarathi.
    """

    def __init__(self, models, tokens, length, rows, new, make=Cache, slots=0, chunk=0):
        check_slots(models, length, make, slots, chunk)
        which, rows = rows.unique(return_inverse=True)         # of a part of the rows, its prompts
        self.slots, self.order = min(slots or len(rows), len(rows)), torch.arange(
            len(rows), device=rows.device)
        if self.slots < len(rows):
            longest = length[which].argsort(descending=True, stable=True)
            which, rows = which[longest], longest.argsort()[rows]
            self.order = rows.argsort(stable=True)
        self.models, self.make, self.new, self.chunk = models, make, new, chunk
        self.steppers = [stepping(m, self.slots, new, make) for m in models]
        self.tokens, self.length, self.prompt = tokens[which], length[which], rows
        self.widths, self.ends = self.length.tolist(), [0, *rows.bincount().cumsum(0).tolist()]
        self.taken = self.first = self.last = 0    # rows with a slot; prompts first:last are held
        self.hidden, self.caches = (), ()          # … by each model

    def waiting(self):
        """How many rows have no slot yet."""
        return len(self.order) - self.taken

    def ready(self):
        """To how many of them the prompts that are held belong."""
        return self.ends[self.last] - self.taken

    def upcoming(self, count):
        """The next prompts, tokens [U, T] and length [U]."""
        some = slice(self.last, self.last + count)
        return self.tokens[some, :max(self.widths[some])], self.length[some]

    def hold(self, hidden, caches):
        """Each model's states after the next prompts [U, D], and their caches."""
        self.hidden, self.caches = hidden, caches
        self.first, self.last = self.last, self.last + len(hidden[0])

    def take(self, n):
        """The next rows, n at most: their numbers, each model's states after their prompts [n, D],
        and the row of its cache in `caches` that each continues."""
        if not self.ready():
            prompts = self.upcoming(bisect_left(self.ends, self.taken + n) - self.last)
            self.hold(*zip(*(read(m, *prompts, self.make) for m in self.models)))
        rows = self.order[self.taken:self.taken + min(n, self.ready())]
        self.taken += len(rows)
        which = self.prompt[rows] - self.first
        return rows, [h[which] for h in self.hidden], which

    def start(self):
        """The first rows, each model's states and caches, which have room for them alone."""
        rows, hidden, which = self.take(self.slots)
        caches = [*map(copy.copy, self.caches)] if self.ready() else self.caches
        for cache in caches:
            cache.spread(which, self.new)
            if self.waiting():                     # rows will begin and end at any length
                cache.static, cache.used = True, cache.used + self.new - 1
        return rows, hidden, caches


# === batch: ours, the rows that decode, and what all rows have drawn ==============================


class Batch:
    """The n rows that decode: which of all (row [n]), their tokens so far (i), the last one
    (token), whether they have ended (done). out, logp [B, new + 1]: what all have drawn, and behind
    it what they draw beyond their end.

    A step works in place and asks the device for nothing: a CUDA graph can hold it.
    """

    def __init__(self, queue, u, stop, choose):
        self.queue, self.models, self.choose = queue, queue.steppers, choose
        self.u, self.stop, self.new = F.pad(u, (0, 1)), stop, u.size(1)
        self.out, self.logp = torch.zeros_like(self.u, dtype=torch.long), torch.zeros_like(self.u)
        self.row, hidden, self.caches = queue.start()
        self.token, self.i = torch.zeros_like(self.row), torch.zeros_like(self.row)
        self.done, self.left = torch.zeros_like(self.row, dtype=torch.bool), self.new - 1
        self.emit(hidden)

    def emit(self, hidden, at=slice(None)):
        """Pick the next token of the rows in slots `at` from the models' states, and note it."""
        place = self.row[at], self.i[at]
        logits = [m.logits(h) for m, h in zip(self.models, hidden)]                   # [n, V] each
        self.token[at], self.logp[place] = self.choose(logits, self.u[place])
        self.out[place] = self.token[at]
        self.i[at] = (self.i[at] + 1).clamp(max=self.new)
        ended = (self.token[at][:, None] == self.stop).any(1) | (self.i[at] == self.new)
        self.done[at] = self.done[at] | ended

    def step(self):
        """One more token for every row."""
        tokens = self.token[:, None]                                                     # [n, 1]
        self.note([m(tokens, cache)[:, 0] for m, cache in zip(self.models, self.caches)])

    def note(self, hidden):
        """The models' states after a step; rows that have ended stay where they are."""
        for cache in self.caches:
            if cache.static:
                cache.length.sub_(self.done.long())
        self.emit(hidden)

    def fill(self):
        """Waiting rows get the slots of those that have ended. In place: a recorded step goes on.
        -> how many rows decode"""
        queue = self.queue
        more = queue.ready if queue.chunk else queue.waiting
        while more() and len(free := self.done.nonzero().squeeze(1)):
            rows, hidden, which = queue.take(len(free))
            free, self.left = free[:len(rows)], self.new - 1
            for cache, prompts in zip(self.caches, queue.caches):
                admit(cache, free, prompts, which)
            self.row[free], self.i[free], self.done[free] = rows, 0, False
            self.emit(hidden, free)
        return int((~self.done).sum())

    def shrink(self, n):
        """Only the n rows that have not stopped stay: the last of them fill the gaps."""
        order = torch.arange(len(self.row), device=self.row.device)
        order[:n][self.done[:n]] = order[n:][~self.done[n:]]
        order = order[:n]
        for cache in self.caches:
            cache.keep(order)
        self.row, self.token, self.done = self.row[order], self.token[order], self.done[order]
        self.i = self.i[order]


# === leave: ours, rows that have stopped leave, or give their slots to those that wait ============


def leave(queue, u, stop, choose):
    """decode(), but a row that has stopped leaves at once."""
    batch, forwards = Batch(queue, u, stop, choose), 0
    while alive := batch.fill():
        if alive < len(batch.row):
            batch.shrink(alive)
        batch.step()
        forwards += len(batch.row)
    return batch.out[:, :-1], batch.logp[:, :-1], forwards


def can_stop(queue, stop):
    """Whether any id ends a completion, or rows wait for one to end."""
    return len(stop) > 0 or queue.slots < len(queue.order)


LOOPS[leave] = can_stop


# === laid_out: ours, weights as oneDNN multiplies them; several layers' of one input as one =======

LEAN = 32                # new tokens, from which on laying out takes less than it saves
LEAN_BYTES = 1 << 32     # of weights at most, which are there twice meanwhile


def laid_out(rows, dtype, *layers):
    """x [n, in] -> what linear layers (or weights) of one input say of it, side by side [n, out].

    The weights are copied into oneDNN's own layout for some number of rows, where it has one for
    the dtype: F.linear would do that for a part of them on every call.
    """
    W, *others = (getattr(m, "weight", m).detach().to(dtype) for m in layers)
    W = torch.cat([W, *others]) if others else W                                      # [out, in]
    bias = [m.bias for m in layers if getattr(m, "bias", None) is not None]
    bias = torch.cat(bias).to(dtype) if bias else None
    if not lays_out(dtype):
        return lambda x: F.linear(x.to(dtype), W, bias)
    ops, W = torch.ops.mkldnn, torch.ops.mkldnn._reorder_linear_weight(W, rows)
    return lambda x: ops._linear_pointwise(x.to(dtype), W, bias, "none", [], "")


def lays_out(dtype):
    """Whether oneDNN multiplies numbers of that dtype on this CPU."""
    if not torch.backends.mkldnn.is_available():
        return False
    return dtype == torch.float32 or (
        dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported())


def stepping(model, rows, new, make):
    """What decodes in a model's place, `new` tokens of so many rows."""
    return Lean(model, rows) if new >= LEAN and make is Cache and lean_fits(model) else model


def lean_fits(model):
    """Whether Lean knows a model: on a CPU, small enough, dense, every token sees all before it."""
    if type(model) is not Transformer or kernels.route(model.head) != "cpu":
        return False
    c, family, usual = model.config, model.config.family, {nn.Embedding, RMSNorm, nn.Linear}
    own = {type(m) for m in model.modules() if m._parameters}                 # adapters, packed, …
    dense = family == Family(qkv_bias=family.qkv_bias, qk_norm=family.qk_norm)
    odd = c.routed_heads or c.layer_widths or model.sources or c.partial_rotary_factor < 1
    windows = any(window_of(c, i) for i in range(c.num_hidden_layers))
    return dense and own <= usual and not (odd or windows or hasattr(model, "unshard")) and (
        sum(x.nbytes for x in model.parameters()) <= LEAN_BYTES)


# === lean: ours, a step of decoding on a CPU in few operations ====================================


class Lean:
    """A model whose steps of one token a row take few operations: q, k and v are one product, gate
    and up another; what all layers share, angles and what is seen, is made once a step."""

    def __init__(self, model, rows):
        self.model, dtype = model, precision(model)
        make = partial(laid_out, rows, dtype)
        self.layers, self.head, self.dtype = [], make(model.head), dtype
        for block in model.layers:
            a, m = block.self_attn, block.mlp
            self.layers.append((make(a.q_proj, a.k_proj, a.v_proj), make(a.o_proj),
                                make(m.gate_proj, m.up_proj), make(m.down_proj)))

    def logits(self, hidden):
        """[n, D] -> float32 [n, V]."""
        return self.head(hidden).float()

    def __call__(self, tokens, cache):
        """As of the model."""
        if tokens.size(1) > 1 or type(cache) is not Cache:
            return self.model(tokens, cache)
        check_length(self.model, cache.used, cache.used + 1)
        model, c, (positions, at) = self.model, self.model.config, cache.at(1)
        cos, sin = (x[positions] for x in rope_table(
            c, tokens.device, long=cache.used + 1 > model.switch))                # [n, 1, hd/2]
        angles = torch.cat([cos, cos], -1), torch.cat([-sin, sin], -1)              # [n, 1, hd]
        low, S = (int(n) for n in (cache.length + 1).aminmax())
        seen = None if low == S else kernels.slots_seen(S, cache.length + 1, 0)     # [n, 1, 1, S]
        x = model.embed(tokens[:, 0])                                                    # [n, D]
        for i, (block, (qkv, o, up, down)) in enumerate(zip(model.layers, self.layers)):
            heads = qkv(block.input_layernorm(x)).view(len(x), -1, c.head_dim)  # [n, H + 2 K, hd]
            q, k, v = turned_heads(block.self_attn, c, heads, *angles)
            k, v = cache.put(i, k[:, :, None], v[:, :, None], at)                   # [n, K, S, hd]
            x = x + o(kernels.over_slots(q, k[:, :, :S], v[:, :, :S], seen).flatten(1))
            y = block.post_attention_layernorm(x)
            x = x + down(block.mlp.act(*up(y).chunk(2, -1)))
        cache.length += 1
        cache.used += 0 if cache.static else 1
        hidden = model.norm(x)[:, None]                                               # [n, 1, D]
        return with_one(hidden) if model.bias else hidden


def turned_heads(attention, c, heads, cos, sin):
    """heads [n, H + 2 K, hd] -> q [n, H, hd] and k [n, K, hd], normed and turned, and v."""
    H, K = c.num_attention_heads, c.num_key_value_heads
    both, v = heads.split([H + K, K], 1)
    if attention.qk_norm:
        q, k = both.split([H, K], 1)
        both = torch.cat([attention.q_norm(q), attention.k_norm(k)], 1)
    both = (both * cos + both.roll(c.head_dim // 2, -1) * sin).to(heads.dtype)
    q, k = both.split([H, K], 1)
    return q if attention.scale == 1 else q * attention.scale, k, v


# === graphs: ours, decoding steps of fixed shape, recorded once and launched as one ===============

CHECK = 8                # steps of a graph between two looks at which rows have finished


def graphed(model):
    """Whether a graph can hold a step: our kernels run, no layer asks the host (experts do), and
    none gathers its weights from other ranks (FSDP's are DTensors)."""
    waits = any(isinstance(m, PackedLinear) and (m.act or m.kind not in kernels.PRODUCTS)
                for m in model.modules())
    ours = model.head.is_cuda and kernels.route(model.head) == "triton"
    return ours and not (model.config.moe or waits or hasattr(model, "unshard"))


def capture(step, device, graphs):
    """Run step() once; -> a function that runs it again, on CUDA as a graph: one launch, not
    hundreds.

    step works in place, on tensors that outlive the graph, and never asks the device for a number.
    Its plain run, on a side stream as torch.cuda.graph wants, compiles kernels and fills autocast's
    cache of weights: the graph holds neither. `graphs` keeps all of a rollout, which share one
    memory pool.
    """
    if device.type != "cuda":
        step()
        return step
    here, side, graph = torch.cuda.current_stream(), torch.cuda.Stream(), torch.cuda.CUDAGraph()
    side.wait_stream(here)
    with torch.cuda.stream(side):
        step()
    here.wait_stream(side)
    with torch.cuda.graph(graph, pool=graphs[0].pool() if graphs else None):
        step()                                         # records, computes nothing
    graphs.append(graph)
    return graph.replay


def replay(queue, u, stop, choose):
    """decode() in recorded steps: rows that have stopped, seen every CHECK steps, give their slots
    to those that wait, or leave when they are half."""
    batch, forwards = Batch(queue, u, stop, choose), 0
    for cache in batch.caches:
        cache.static, cache.used = True, max(queue.widths) + queue.new - 1
    graphs, again = [], None                           # None: record it, for a batch of a new size
    while alive := batch.fill():
        if alive <= len(batch.row) // 2:
            batch.shrink(alive)
            again = None
        for _ in range(min(CHECK, batch.left)):
            if again is None:
                again = capture(batch.step, u.device, graphs)
            else:
                again()
            batch.left -= 1
            forwards += len(batch.row)
    return batch.out[:, :-1], batch.logp[:, :-1], forwards


def can_replay(queue, stop):
    """Whether the steps can be graphs: one model, with the plain cache."""
    return len(queue.models) == 1 and queue.make is Cache and graphed(queue.models[0])


LOOPS[replay] = can_replay


# === beside: 2308.16369, one forward of two caches: a step of rows, a chunk of prompts ============


class Beside:
    """A cache of n rows, each with its next token, and one of U prompts, each with its next c, as
    the cache of a single row of n + U c tokens: so one forward does a step and reads a chunk."""

    def __init__(self, rows, prompts, c):
        self.parts, self.length, self.static = ((rows, 1), (prompts, c)), 0, True
        self.n, self.shape = len(rows.length), (len(prompts.length), c)
        self.used = max(rows.used + 1, prompts.used + c) - self.n - math.prod(self.shape)

    def at(self, T):
        """Positions [1, T], and where each cache puts its part."""
        positions, at = zip(*(cache.at(t) for cache, t in self.parts))
        return torch.cat([x.flatten() for x in positions])[None], at

    def split(self, x):
        """[1, K, T, hd] -> [n, K, 1, hd] and [U, K, c, hd]"""
        step, chunk = x[0].transpose(0, 1).tensor_split([self.n])
        return step[:, :, None], chunk.unflatten(0, self.shape).transpose(1, 2)

    def put(self, layer, k, v, at):
        """Each cache's part; -> keys, and values, of both."""
        both = zip(self.parts, self.split(k), self.split(v), at)
        return zip(*(cache.put(layer, *new) for (cache, _), *new in both))

    def sees(self, T):
        """attend's function: each part attends by itself."""
        seen = [cache.sees(t) for cache, t in self.parts]

        def attention(q, k, v, window):
            step, chunk = (attend(*x, window).transpose(1, 2).flatten(0, 1)
                           for x in zip(self.split(q), k, v, seen))                     # [·, H, hd]
            return torch.cat([step, chunk]).transpose(0, 1)[None]                    # [1, H, T, hd]
        return attention


# === sarathi: 2308.16369, waiting prompts are read in chunks beside the rows that decode ==========


class Chunks:
    """The next prompts of a queue, read by steps, `chunk` tokens each: several whole prompts, or a
    part of one."""

    def __init__(self, queue):
        count = max(queue.chunk // queue.widths[queue.last], 1)
        self.tokens, self.length = queue.upcoming(count)                              # [U, T], [U]
        self.at, self.step = 0, queue.chunk
        self.states = [None] * len(queue.models)
        self.caches = [Cache(m.config, *self.tokens.shape, self.tokens.device, precision(m))
                       for m in queue.models]

    def ride(self, batch):
        """A step of the batch, which reads the next chunk besides."""
        chunk = self.tokens[:, self.at:self.at + self.step]                              # [U, c]
        tokens, hidden = torch.cat([batch.token, chunk.flatten()])[None], []
        for i, (m, rows, prompts) in enumerate(zip(batch.models, batch.caches, self.caches)):
            out = m(tokens, Beside(rows, prompts, chunk.size(1)))[0]                     # [T, D]
            step, read = out.tensor_split([len(batch.token)])
            self.states[i] = state_at(read.unflatten(0, chunk.shape), self.length - 1 - self.at,
                                      self.states[i])
            rows.length += 1
            prompts.length, prompts.used = prompts.length + chunk.size(1), self.at + chunk.size(1)
            hidden.append(step)
        self.at += chunk.size(1)
        batch.note(hidden)


def sarathi(queue, u, stop, choose):
    """leave(), but no step waits for a prompt: the next ones are read by the steps themselves."""
    batch, coming, forwards = Batch(queue, u, stop, choose), None, 0
    while (alive := batch.fill()) or queue.waiting():
        if coming is None and queue.waiting() > queue.ready():
            coming = Chunks(queue)
        if coming and coming.at < coming.tokens.size(1):
            coming.ride(batch)
        else:
            if alive < len(batch.row) and not queue.waiting():
                batch.shrink(alive)
            batch.step()
        forwards += len(batch.row)
        if coming and coming.at == coming.tokens.size(1) and not queue.ready():
            for cache in coming.caches:
                cache.length = coming.length
            queue.hold(coming.states, coming.caches)
            coming = None
    return batch.out[:, :-1], batch.logp[:, :-1], forwards


def can_ride(queue, stop):
    """Whether prompts are to be read so, and any wait."""
    return queue.chunk > 0 and queue.slots < len(queue.order)


LOOPS[sarathi] = can_ride


# === states: 2506.05433, no padding is computed, and a prompt that rows share is computed once ====

LAYOUTS = dict(auto=0.1, true=-math.inf, false=math.inf)   # --share_prompts: the least share saved
worth = LAYOUTS["auto"]


def use(c):
    """Set how a run computes, the same numbers: its --kernels and --share_prompts."""
    global worth
    worth = LAYOUTS[c.share_prompts]
    kernels.use(c.kernels)


def states(model, tokens, where, first=None, **asked):
    """What the model says [n, …] after those of tokens [B, T] where `where` [B, T] is true, row by
    row: a Transformer's states, a ScalarModel's scores, or what it is asked for.

    Only what they depend on is computed, without padding, where that saves enough: see LAYOUTS. A
    row's first so many tokens [B], or those up to its first state that is wanted, are its prompt:
    one that several rows have is computed once, as in Prefix Grouper (2506.05433).
    """
    rigid = worth == math.inf or hasattr(model, "_orig_mod")            # compiled for [B, T]
    rigid = rigid or any(getattr(m, "of_all_tokens", False) for m in model.modules())
    flat = None if rigid else flattened(tokens, where, first)
    if flat is None:
        return model(tokens, **asked)[where]
    return model(flat.tokens[:, None], flat, **asked)[:, 0].index_select(0, flat.place[where])


def flattened(tokens, where, first=None):
    """The layout of fewest tokens that states() may take, or None."""
    at = torch.arange(1, tokens.size(1) + 1, device=tokens.device)                           # [T]
    end = (at * where).amax(1)                                           # [B] after the last wanted
    first = torch.minimum(where.long().argmax(1) + 1 if first is None else first, end)
    least = 1 - worth
    if (end - first).sum() > least * tokens.numel():                   # too much is nobody's prompt
        return None
    shared, whole = Flat(tokens, first, end), Flat(tokens, end, end)
    best = shared if len(shared.tokens) <= least * len(whole.tokens) else whole
    return best if 0 < len(best.tokens) <= least * tokens.numel() else None


# === flat: ours, what a batch of tokens without padding is to a model, and its attention =========


class Flat:
    """Tokens of B rows as a batch of N rows of one token: every distinct prompt once, then what
    follows them, row by row. In a Cache's place: it keeps nothing, its attention is the rows'.

    first, end [B]: how many of a row's tokens are its prompt, and how many count. -> tokens [N],
    and place [B, T], where among them each of the rows' is.
    """
    static, length = True, 0

    def __init__(self, tokens, first, end):
        at, first = torch.arange(tokens.size(1), device=tokens.device), first[:, None]       # [T]
        prompts = torch.where(at < first, tokens, -1)                                    # [B, T]
        prompts, self.which = prompts.unique(dim=0, return_inverse=True)             # [U, T], [B]
        ahead, behind = prompts >= 0, (at >= first) & (at < end[:, None])        # [U, T], [B, T]
        size, tail = ahead.sum(1), behind.sum(1)                                         # [U], [B]
        self.tokens = torch.cat([prompts[ahead], tokens[behind]])                            # [N]
        (u, i), (b, j) = (x.nonzero(as_tuple=True) for x in (ahead, behind))
        self.position, self.n = torch.cat([i, j])[:, None], len(i)           # [N, 1]; of prompts n
        begin, then = size.cumsum(0) - size, self.n + tail.cumsum(0) - tail              # [U], [B]
        self.place = torch.where(at < first, begin[self.which, None], then[:, None] - first) + at
        self.prompts = Slots(len(size), int(size.max()), u, i)
        self.tails = Slots(len(tail), int(tail.max()), b, j - first[b, 0])
        self.known, self.used = size[self.which], int(end.max()) - 1   # [B]; the last position
        self.masks = {}                                                # of each window

    def at(self, T):
        """Cache's: positions [N, 1]; keys are not stored."""
        return self.position, None

    def sees(self, T):
        """Cache's: attend's function."""
        return self.attention

    def put(self, layer, k, v, at):
        """Cache's: keys and values as they came."""
        return k, v

    def attention(self, q, k, v, window):
        """Attention of each token to its prompt's and its row's before it.   [N, H, 1, hd]"""
        (q, q1), (k, k1), (v, v1) = ((self.prompts.fill(x[:self.n, :, 0]),
                                      self.tails.fill(x[self.n:, :, 0])) for x in (q, k, v))
        y = self.prompts.take(attend(q, k, v, None, window))                         # [n, H, hd]
        if self.tails.width:
            if window not in self.masks:
                self.masks[window] = self.mask(window)
            k, v = (torch.cat([x[self.which], x1], 2).to(q.dtype) for x, x1 in ((k, k1), (v, v1)))
            y = torch.cat([y, self.tails.take(look(q1, k, v, self.masks[window]))])
        return y[:, :, None]

    def mask(self, window):
        """What the tails see of the slots of their prompts and of themselves.   [B, 1, R, P + R]"""
        P, R, device = self.prompts.width, self.tails.width, self.known.device
        at, slot = torch.arange(R, device=device), torch.arange(P, device=device)
        own = within(R, window or R, device).expand(len(self.known), R, R)
        seen = (slot < self.known[:, None])[:, None].expand(-1, R, P)                 # [B, R, P]
        if window:
            seen = seen & (slot > (self.known[:, None] + at)[..., None] - window)
        return torch.cat([seen, own], 2)[:, None]


class Slots(NamedTuple):
    """Where numbers of tokens stand in rows of one width: of the n-th token its row and slot."""
    rows: int
    width: int
    row: torch.Tensor
    slot: torch.Tensor

    def fill(self, x):
        """[n, H, hd] -> [rows, H, width, hd], 0 elsewhere."""
        wide = x.new_zeros(self.rows * self.width, *x.shape[1:])
        return wide.index_copy(0, self.row * self.width + self.slot, x).unflatten(
            0, (self.rows, self.width)).transpose(1, 2)

    def take(self, y):
        """[rows, H, width, hd] -> [n, H, hd]."""
        return y.transpose(1, 2).flatten(0, 1).index_select(0, self.row * self.width + self.slot)


# === new: GPT-2, a model that is not trained yet ==================================================


def preset(size, tokenizer, context=512, model_type="qwen3"):
    """ModelConfig of a new model: '4x192' is 4 layers of width 192, heads of 32 that pairwise share
    keys."""
    try:
        layers, width = map(int, size.split("x"))
        if not (0 < layers <= 1024 and 32 <= width <= 65536 and width % 32 == 0):
            raise ValueError
    except ValueError:
        raise UserError(f"--model {size}: expected LAYERSxWIDTH, the width a multiple of 32, "
                        "for example 4x192") from None
    heads, dialect = width // 32, DIALECTS[model_type]
    return ModelConfig(model_type=model_type, vocab_size=-(-tokenizer.vocab_size // 64) * 64,
                       hidden_size=width, intermediate_size=-(-width * 8 // 3 // 32) * 32,
                       num_hidden_layers=layers, num_attention_heads=heads,
                       num_key_value_heads=heads // 2 if heads % 2 == 0 else heads,
                       max_position_embeddings=context,
                       num_experts=8 if FAMILIES[model_type].mlp != "dense" else 0,
                       hidden_act=dialect.absent.get("hidden_act", "silu"),
                       router_jitter_noise=dialect.absent.get("router_jitter_noise", 0.0),
                       rope_local_base_freq=dialect.local,
                       bos_token_id=-1 if tokenizer.bos is None else tokenizer.bos,
                       eos_token_id=(tokenizer.eos,),
                       pad_token_id=-1 if tokenizer.pad is None else tokenizer.pad)


def init(config, seed=0):
    """A new Transformer: normal weights of std 0.02, the matrices that write to the residual stream
    1/sqrt(2L) of that (GPT-2), norms 1 (what is added to 1: 0), biases 0."""
    with torch.device("meta"):
        model = Transformer(config)
    model.to_empty(device="cpu")
    g, one = torch.Generator().manual_seed(seed), float(config.family.norm != "rms_plus_one")
    for name, p in model.named_parameters():
        if p.dim() == 1:
            nn.init.constant_(p, 0.0 if name.endswith("bias") else one)
        else:
            out = name.endswith(("o_proj.weight", "down_proj.weight"))
            nn.init.normal_(p, std=0.02 / math.sqrt(2 * config.num_hidden_layers) if out else 0.02,
                            generator=g)
    return model


# === windows: 2310.06825, layers that see the last tokens only ====================================


def within(T, window, device):
    """Which of T tokens each sees: itself and those before it, `window` in all.   [T, T]"""
    seen = torch.ones(T, T, dtype=torch.bool, device=device)
    return seen.tril().triu(1 - window)


def nearest_of(visible, window):
    """Of the first slots that are visible, the last `window`.   [..., S]"""
    slots = torch.arange(visible.size(-1), device=visible.device)
    return visible & (slots >= visible.sum(-1, keepdim=True) - window)


def local_layers(config):
    """Whether each layer turns by a theta of its own: those with a window, in Gemma."""
    own = config.rope_local_base_freq > 0
    return [own and window_of(config, i) > 0 for i in range(config.num_hidden_layers)]


def window_of(config, layer):
    """How many tokens a layer sees, its own included; 0: all."""
    slides = config.layer_types and config.layer_types[layer] == "sliding_attention"
    return config.sliding_window if slides else 0


def bites(d):
    """Whether there is a window that is narrower than the context."""
    return d.get("sliding_window", math.inf) < d["max_position_embeddings"]


def none(d):
    """No layer slides; a config.json that says so all the same is refused."""
    return [False] * d["num_hidden_layers"]


def every(d):
    """All layers, where there is a window."""
    return [bool(d.get("sliding_window"))] * d["num_hidden_layers"]


def switched(d):
    """All layers, where windows are switched on."""
    return [bool(d.get("use_sliding_window"))] * d["num_hidden_layers"]


def upper(d):
    """The layers from max_window_layers on, where windows are switched on."""
    on, first = d.get("use_sliding_window"), d.get("max_window_layers", 28)
    return [bool(on) and i >= first for i in range(d["num_hidden_layers"])]


def patterned(d):
    """All but every sixth layer."""
    step = d.get("sliding_window_pattern", 6)
    return [(i + 1) % step > 0 for i in range(d["num_hidden_layers"])]


# === linear, dynamic, llama3, yarn, longrope: 2306.15595, rotary positions for a longer context ===


def linear_rope(freq, c, long, *, factor):
    """Positions pushed together (2306.15595): every frequency divided by `factor`."""
    return freq / factor, 1.0


def dynamic_rope(freq, c, long, *, factor):
    """NTK-aware, by the length at hand: it changes nothing up to max_position_embeddings, and what
    is longer is refused here as everywhere."""
    return freq, 1.0


def llama3_rope(freq, c, long, *, factor, low_freq_factor, high_freq_factor,
                original_max_position_embeddings):
    """Llama 3.1's scaling (2407.21783): wavelengths above (old) context / low are divided by
    `factor`, those below context / high are left alone; between, a linear blend of both."""
    low, high = low_freq_factor, high_freq_factor
    turns = original_max_position_embeddings * freq / (2 * math.pi)         # in the old context
    smooth = ((turns - low) / (high - low)).clamp(0, 1)
    return smooth * freq + (1 - smooth) * freq / factor, 1.0


def yarn_rope(freq, c, long, *, factor, original_max_position_embeddings, attention_factor=0.0,
              beta_fast=32.0, beta_slow=1.0, mscale=0.0, mscale_all_dim=0.0, truncate=True):
    """YaRN (2309.00071): as Llama 3.1's, but the blend is linear in the number of the frequency,
    between those that turn beta_fast and beta_slow times in the old context; cosines and sines are
    times 0.1 ln(factor) + 1 (mscale: its weight, over that of mscale_all_dim)."""
    def number(turns):
        reach = original_max_position_embeddings / (turns * 2 * math.pi)
        return len(freq) * math.log(reach) / math.log(c.rope_theta)

    def grown(weight):
        return 0.1 * weight * math.log(factor) + 1.0 if factor > 1 else 1.0

    low, high = number(beta_fast), number(beta_slow)
    if truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, 2 * len(freq) - 1)
    high = high + 0.001 if high == low else high
    ramp = ((torch.arange(len(freq)) - low) / (high - low)).clamp(0, 1)                  # [hd/2]
    both = mscale and mscale_all_dim
    scale = grown(mscale) / grown(mscale_all_dim) if both else grown(1.0)
    return freq / factor * ramp + freq * (1 - ramp), attention_factor or scale


def longrope(freq, c, long, *, short_factor, long_factor, original_max_position_embeddings,
             factor=0.0, attention_factor=0.0, short_mscale=0.0, long_mscale=0.0):
    """LongRoPE (2402.13753): every frequency over a factor of its own, of another list for texts
    beyond the old context. As in transformers the whole text at hand has one list, by the longest
    row of a batch: see switch()."""
    own = torch.tensor(long_factor if long else short_factor)                            # [hd/2]
    old = original_max_position_embeddings
    factor = factor or c.max_position_embeddings / old
    scale = math.sqrt(1 + math.log(factor) / math.log(old)) if factor > 1 else 1.0
    return freq / own, (long_mscale if long else short_mscale) or attention_factor or scale


def partial_rope(x, cos, sin):
    """RoPE on the first numbers of a head, as many as there are angles for."""
    n = 2 * cos.size(-1)
    return torch.cat([rope(x[..., :n], cos, sin), x[..., n:]], -1)


ROPES |= dict(linear=linear_rope, dynamic=dynamic_rope, llama3=llama3_rope, yarn=yarn_rope,
              longrope=longrope)


# === acts: 1606.08415, what gates an MLP ==========================================================


def gelu(gate, up, approximate="none"):
    """GEGLU (2002.05202):  gelu(gate) * up."""
    return F.gelu(gate, approximate=approximate) * up


ACTS["gelu"], ACTS["gelu_pytorch_tanh"] = gelu, partial(gelu, approximate="tanh")
ACTS["swish"], ACTS["gelu_new"] = ACTS["silu"], ACTS["gelu_pytorch_tanh"]          # other names


# === config_keys: Hugging Face, what may stand in config.json, and of which type ==================


class Dialect(NamedTuple):
    """How a family's checkpoints say it; functions are of a parsed config.json."""
    name: str                                        # of its classes in transformers
    scorer: str = ""                                 # of its reward models, where it is another
    alias: str = ""                                  # what others call its language model
    width: str = "intermediate_size"                 # the key of an MLP's width
    reads: tuple = ()                                # keys of OPTIONS that it has
    slides: object = none                            # -> whether each layer has a window
    theta: float = 10000.0                           # rope_theta where it is absent
    local: float = 0.0                               # rope_local_base_freq where it is absent
    keys: dict = {}                                  # its keys whose fields have another name
    absent: dict = {}                                # what transformers takes for an absent field
    ropes: tuple = tuple(ROPES)                      # rope_types that it has
    read: object = lambda d: dict(num_experts=0)     # -> fields of ModelConfig
    write: object = lambda d: d                      # -> the config.json to save
    names: tuple = ()                                # (part of our name, part of the tensor's)


LLAMA, QWEN = dict(bos_token_id=1, eos_token_id=2), dict(num_key_value_heads=32)
DIALECTS = dict(
    llama=Dialect("Llama", reads=("attention_bias", "mlp_bias"), absent=LLAMA),
    mistral=Dialect("Mistral", slides=every,
                    absent=LLAMA | dict(num_key_value_heads=8, sliding_window=4096)),
    qwen2=Dialect("Qwen2", slides=upper, absent=QWEN | dict(sliding_window=4096)),
    qwen3=Dialect("Qwen3", slides=upper, reads=("attention_bias",),
                  absent=QWEN | dict(sliding_window=4096, head_dim=128)))
QUANT = "minimal-post-training"          # config.json's quant_method for our packed layers
PACKED_TYPE = "packed-"          # before its model_type: transformers would ignore the quant_method
SHAPED_TYPE = "shaped-"          # before that of a model with fields that no other tool knows
HEADS = "CausalLM", "SequenceClassification"         # a language model, a model of one score
SIZES = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads",
         "max_position_embeddings")
TYPES = dict.fromkeys((*SIZES, "num_key_value_heads", "head_dim"), "size") | dict(
    rms_norm_eps="positive", rope_theta="positive", tie_word_embeddings="flag",
    attention_bias="flag", mlp_bias="flag", lm_head_bias="flag", hidden_act="text",
    rope_scaling="object", rope_parameters="object", rope_local_base_freq="positive",
    partial_rotary_factor="positive", query_pre_attn_scalar="positive",
    router_jitter_noise="number", use_sliding_window="flag", sliding_window="size",
    sliding_window_pattern="size", max_window_layers="whole", layer_types="list",
    original_max_position_embeddings="size", quantization_config="object", architectures="list",
    num_labels="size", id2label="object")            # key: a row of data.run's KINDS
# fields of ModelConfig that only some families have, and what they are in the others
OPTIONS = dict(attention_bias=False, mlp_bias=False, lm_head_bias=False, router_jitter_noise=0.0,
               partial_rotary_factor=1.0, query_pre_attn_scalar=0.0, rope_local_base_freq=0.0)
# keys that change what other families' models say, and the values that change nothing
FOREIGN = dict.fromkeys((
    "attn_logit_softcapping", "final_logit_softcapping", "clip_qkv", "qk_layernorm", "use_qk_norm",
    "use_mrope", "alibi", "parallel_attn", "no_rope_layers", "use_bidirectional_attention",
    "mlp_only_layers", "shared_expert_intermediate_size", "n_shared_experts",
    "attention_chunk_size", "text_config"), (0, [], {})) | dict.fromkeys((
        "logit_scale", "logits_scaling", "attention_multiplier", "residual_multiplier",
        "embedding_multiplier", "decoder_sparse_step"), (1,))


# === config_fits: Hugging Face, sizes, names and kinds of layers that go together =================


def check_heads(d, kind):
    """What is wrong with the sizes of the attention's heads."""
    heads = d["num_attention_heads"]
    groups = d.get("num_key_value_heads") or heads
    width = d.get("head_dim") or d["hidden_size"] / heads
    turned = width * d["partial_rotary_factor"]
    if heads % groups:
        return f"{heads} attention heads do not share {groups} key heads evenly"
    if width % 1 or not 2 <= turned <= width or int(turned) % 2:
        return (f"a head of {width:g} numbers of which {int(turned)} turn: rotary positions need "
                "an even whole number")
    return ""


def check_architecture(d, kind):
    """What is wrong with the architecture's name and its number of labels."""
    dialect = DIALECTS[kind]
    model = f"{dialect.name}For{HEADS[0]}"
    scorer = f"{dialect.scorer or dialect.name}For{HEADS[1]}"
    found = d.get("architectures", [model])
    labels = d.get("num_labels") or len(d.get("id2label") or [0])
    if not found or found[0] not in (model, scorer, dialect.alias or model):
        return f"architectures is {found}: expected [{model!r}], or of a reward model [{scorer!r}]"
    if found[0] == scorer and labels != 1:
        return f"{labels} labels: a reward model has one score"
    return ""


def check_act(d, kind):
    """What is wrong with the activation."""
    act = d.get("hidden_act", "silu")
    return "" if act in ACTS else f"hidden_act = {act!r} is not supported{nearest(act, ACTS)}"


def check_layers(d, kind):
    """What is wrong with the kinds of the layers and their window."""
    types, slides = d.get("layer_types"), DIALECTS[kind].slides
    both = "full_attention", "sliding_attention"
    given = slides(d) if types is None else [x == both[1] for x in types]
    if types is not None and (len(given) != d["num_hidden_layers"] or not set(types) <= {*both}):
        return f"layer_types {types}: expected {' or '.join(both)} for each layer"
    if slides in (none, every, switched) and bites(d) and given != slides(d):
        return f"layer_types {types} is not what {kind} computes"
    if slides is none and bites(d) and any(upper(d)):
        return f"sliding_window = {d['sliding_window']} is not supported in {kind}"
    if slides is upper and any(given) and not d.get("use_sliding_window"):
        return "layer_types has sliding_attention, and use_sliding_window is not true"
    return "sliding_window is missing" if any(given) and not d.get("sliding_window") else ""


# === config_checks: Hugging Face, a config.json that would load wrongly is refused by name ========

# topic: (config.json, model_type) -> what is wrong in words, "" if nothing is
CHECKS = dict(architecture=check_architecture, heads=check_heads, act=check_act,
              layers=check_layers)


def check_config(d, kind, where):
    """UserError for sizes that do not fit, and for what is written rightly and that we do not
    compute."""
    for check in CHECKS.values():
        if words := check(d, kind):
            raise UserError(f"{where}: {words}")
    quant = d.get("quantization_config") or {}
    expect(quant, f"{where}, quantization_config", sha256="object", layers="object")
    refuse = {key: key in d and d[key] not in off for key, off in FOREIGN.items()}
    refuse |= {key: d.get(key, off) != off for key, off in OPTIONS.items()
               if key not in DIALECTS[kind].reads}
    refuse |= dict(quantization_config=quant and quant.get("quant_method") not in (QUANT, THEIRS))
    for key, wrong in refuse.items():
        if wrong:
            raise UserError(f"{where}: {key} = {str(d[key])[:60]} is not supported in {kind}; "
                            "use a checkpoint without it")


def ends(d, where, key="eos_token_id"):
    """The ids under a key of a config: one, none, or of eos a list; -1: none. UserError for
    anything else."""
    value = d.get(key)
    ids = [] if value is None else [value]
    if isinstance(value, list) and key == "eos_token_id":
        ids = value
    if not all(type(x) is int for x in ids):
        raise UserError(f"{where}: {key} is {value!r}: "
                        "expected a token's id, a list of ids, or null")
    return tuple(x for x in ids if x >= 0)


# === config_rope: Hugging Face, rotary options under two names, of which one may be stale =========

PHI_ROPES = "default", "longrope"
ROPE_TYPES = dict(                       # key of the rotary options: a row of data.run's KINDS
    short_factor="list", long_factor="list", truncate="flag",
    original_max_position_embeddings="size") | dict.fromkeys((
        "factor", "low_freq_factor", "high_freq_factor", "rope_theta", "partial_rotary_factor",
        "attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "short_mscale",
        "long_mscale"), "positive")
ELSEWHERE = "rope_theta", "partial_rotary_factor", "original_max_position_embeddings"


def rope_said(options, kind, where):
    """A rotary object of a config.json with one spelling of its type, and without nulls."""
    if not isinstance(options, dict):
        raise UserError(f"{where}: rope_parameters holds {str(options)[:40]!r}: expected an object")
    out = {k: v for k, v in options.items() if v is not None}
    names = [out.pop(k) for k in ("rope_type", "type") if k in out]
    if names[1:] and names[0] != names[1]:
        raise UserError(f"{where}: rope_type {names[0]!r} and type {names[1]!r} disagree: "
                        "remove the one that is not meant")
    older = DIALECTS[kind].ropes == PHI_ROPES and names[:1] in (["su"], ["yarn"])
    return out | dict(rope_type="longrope" if older else names[0] if names else "default")


def rope_agreed(found, where):
    """{place: what stands there} in a config.json as one object. UserError where two disagree: a
    stale one may be read by one version of transformers and not by the next."""
    out, places = {}, {}
    for place, options in found.items():
        for key, value in options.items():
            if key in out and out[key] != value:
                raise UserError(f"{where}: {places[key]} and {place} disagree on {key} "
                                f"({str(out[key])[:40]}, {str(value)[:40]}): "
                                "remove the one that is not meant")
            out[key], places[key] = value, place
    objects = [set(x) - {*ELSEWHERE} for x in found.values() if "rope_type" in x]
    if objects[1:] and objects[0] != objects[1]:
        raise UserError(f"{where}: rope_scaling and rope_parameters disagree on "
                        f"{', '.join(sorted(objects[0] ^ objects[1]))}: "
                        "remove the one that is not meant")
    return out


def check_rope(rope, half, kind, where):
    """UserError for rotary options that the family or ROPES has not, that lack a number, or whose
    lists are not of `half` a head's numbers."""
    where, rope_type = f"{where}, rope options", rope["rope_type"]
    if rope_type not in DIALECTS[kind].ropes:
        raise UserError(f"{where}: rope_type {rope_type!r} is not supported in {kind}; choose "
                        f"{', '.join(DIALECTS[kind].ropes)}")
    takes = {k: p.default is p.empty for k, p in signature(ROPES[rope_type]).parameters.items()
             if p.kind is p.KEYWORD_ONLY}
    expect(rope, where, [k for k, needed in takes.items() if needed], **ROPE_TYPES)
    if huge := [k for k, x in rope.items() if ROPE_TYPES.get(k) == "positive" and x > 1e9]:
        raise UserError(f"{where}: {huge[0]} is {rope[huge[0]]}: nothing scales so far")
    if spare := sorted(rope.keys() - {*takes, *ELSEWHERE, "rope_type", "finetuned"}):
        raise UserError(f"{where}: {spare[0]} is nothing that {rope_type} has; remove it")
    for key in ("short_factor", "long_factor"):
        numbers = rope.get(key, [1] * half)
        if len(numbers) != half or not all(KINDS["positive"][1](x) for x in numbers):
            raise UserError(f"{where}: {key} has {len(numbers)} entries: expected {half} numbers "
                            "above 0, one for each pair that turns")
    least = min(rope.get("rope_theta", 2), rope[ELSEWHERE[2]])
    if rope_type in ("yarn", "longrope") and least <= 1:
        raise UserError(f"{where}: {rope_type} divides by the logarithms of rope_theta and of "
                        f"{ELSEWHERE[2]}: both are above 1")
    if rope_type == "llama3" and rope["high_freq_factor"] <= rope["low_freq_factor"]:
        raise UserError(f"{where}: high_freq_factor is not above low_freq_factor")


# === fields: Hugging Face, rotary positions and windows, wherever a config.json says them =========


def rope_fields(d, kind, where):
    """The rotary fields of ModelConfig, from all the places where a config.json may have them."""
    dialect, new = DIALECTS[kind], d.get("rope_parameters") or {}
    nested = any(isinstance(x, dict) for x in new.values())
    if new and nested != (dialect.local > 0):
        wanted = "an object for each kind of layer" if dialect.local else "one object"
        raise UserError(f"{where}: rope_parameters is {str(new)[:60]!r}: expected {wanted}")
    objects = dict(rope_scaling=d.get("rope_scaling"),
                   rope_parameters=new.get("full_attention") if nested else new)
    found = {name: rope_said(x, kind, where) for name, x in objects.items() if x}
    rope = rope_agreed({"config.json": {k: d[k] for k in ELSEWHERE if k in d}} | found, where)
    rope.setdefault("rope_type", "default")
    rope.setdefault(ELSEWHERE[2], d["max_position_embeddings"])
    expect(rope, f"{where}, rope options", partial_rotary_factor="positive")
    width = d.get("head_dim") or d["hidden_size"] // d["num_attention_heads"]
    share = min(1, rope.get("partial_rotary_factor", 1))
    check_rope(rope, int(width * share) // 2, kind, where)
    out = dict(rope_theta=float(rope.pop("rope_theta", dialect.theta)),
               partial_rotary_factor=float(rope.pop("partial_rotary_factor", 1)))
    if ELSEWHERE[2] not in signature(ROPES[rope["rope_type"]]).parameters:
        del rope[ELSEWHERE[2]]
    pairs = [(k, tuple(x) if isinstance(x, list) else x) for k, x in sorted(rope.items())]
    out["rope_scaling"] = tuple(pairs) if rope["rope_type"] != "default" else ()
    return out | local_theta(d, new.get("sliding_attention") or {}, kind, where)


def local_theta(d, own, kind, where):
    """The field of layers that turn by a theta of their own, in the families that have them."""
    if not DIALECTS[kind].local:
        return {}
    old = {"rope_theta": d["rope_local_base_freq"]} if "rope_local_base_freq" in d else {}
    place = "rope_parameters.sliding_attention"
    side = rope_agreed({"rope_local_base_freq": old, place: rope_said(own, kind, where)}, where)
    if side["rope_type"] != "default":
        raise UserError(f"{where}: {place} has rope_type {side['rope_type']!r}: only layers "
                        "without a window are scaled here")
    expect(side, f"{where}, {place}", rope_theta="positive")
    return dict(rope_local_base_freq=float(side.get("rope_theta", DIALECTS[kind].local)))


def window_fields(d, kind):
    """The window and the kinds of layers; neither if no layer's window is narrower than the
    context."""
    types = d.get("layer_types")
    slides = DIALECTS[kind].slides(d) if types is None else [x[0] == "s" for x in types]
    if not any(slides) or not (bites(d) or DIALECTS[kind].local):
        return dict(sliding_window=0, layer_types=())
    return dict(sliding_window=d["sliding_window"], layer_types=tuple(
        "sliding_attention" if x else "full_attention" for x in slides))


def write_windows(d, config, slides):
    """The keys of windows that a family has; null is no window, where absent would be one."""
    window, types = d.pop("sliding_window"), list(d.pop("layer_types"))
    if slides is every or types and slides is not none:
        d["sliding_window"] = window or None
    if types and slides in (switched, upper):
        d["use_sliding_window"] = True
    if types and slides is upper:
        d |= dict(layer_types=types, max_window_layers=types.index("sliding_attention"))
    if slides is patterned:
        d["layer_types"] = types or ["full_attention"] * config.num_hidden_layers
        first = [*d["layer_types"], "full_attention"].index("full_attention")
        d["sliding_window_pattern"] = first + 1                    # read before layer_types were
    return d


# === config_json: Hugging Face, config.json to ModelConfig and back ===============================


def family(d, where):
    """A config.json's model_type without our prefixes; UserError for one that we do not know."""
    expect(d, where, ("model_type",), model_type="text")
    kind = d["model_type"].removeprefix(SHAPED_TYPE)
    if kind.startswith("lost-"):
        raise UserError(f"{where}: model_type {kind!r} is not supported; "
                        "LOST with a non-linearity: only sft.py --resume reads it")
    if kind not in DIALECTS:
        why = "; it reads more than text" if "text_config" in d else nearest(kind, DIALECTS)
        raise UserError(f"{where}: model_type {kind!r} is not supported{why}")
    return kind


def from_hf(d, where="config.json"):
    """A parsed config.json -> ModelConfig; UserError for what would load wrongly."""
    kind, raw = family(d, where), d
    dialect = DIALECTS[kind]
    d = {dialect.keys.get(k, k): v for k, v in d.items() if k not in dialect.keys.values()}
    d = {k: v for k, v in (dialect.absent | d).items() if v is not None}   # null: not there
    expect(d, where, (*SIZES, dialect.width), **TYPES | {dialect.width: "size"})
    d |= rope_fields(d, kind, where)
    check_config(d, kind, where)
    d |= window_fields(d, kind)
    known = {f.name for f in fields(ModelConfig)}
    out = {k: tuple(v) if isinstance(v, list) else v for k, v in d.items() if k in known}
    for end in ("bos_token_id", "eos_token_id", "pad_token_id"):
        ids = ends(d, where, end)
        ids = ids if end in raw else tuple(x for x in ids if x < d["vocab_size"])
        out[end] = ids if end == "eos_token_id" else next(iter(ids), -1)
    out.setdefault("num_key_value_heads", d["num_attention_heads"])
    out.setdefault("head_dim", d["hidden_size"] // d["num_attention_heads"])
    out["tie_word_embeddings"] = bool(d.get("tie_word_embeddings", False))
    if out.get("query_pre_attn_scalar") == out["head_dim"]:
        del out["query_pre_attn_scalar"]
    config = ModelConfig(**out | dict(model_type=kind) | dialect.read(d))
    shaped, layers = d["model_type"].startswith(SHAPED_TYPE), config.num_hidden_layers
    if bool(own_fields(config)) != shaped or len(config.layer_widths) not in (0, layers):
        raise UserError(f"{where}: model_type {d['model_type']!r} does not go with "
                        f"{own_fields(config)} and {layers} layers: make the checkpoint again")
    return config


def to_hf(config, scalar=False):
    """ModelConfig -> what config.json holds. The RoPE options stand under the keys that every
    transformers since 4.45 reads, and once."""
    dialect = DIALECTS[config.model_type]
    d = asdict(config) | dict(torch_dtype="float32", use_cache=True)
    for names in SHAPED.values():
        for name in set(names) - own_fields(config).keys():
            del d[name]
    for key in OPTIONS.keys() - {*dialect.reads}:
        del d[key]
    d["model_type"] = SHAPED_TYPE * bool(own_fields(config)) + d["model_type"]
    d["architectures"] = [f"{scalar and dialect.scorer or dialect.name}For{HEADS[scalar]}"]
    eos = config.eos_token_id
    d["eos_token_id"] = list(eos) if len(eos) > 1 else next(iter(eos), None)
    d |= {k: None for k in ("bos_token_id", "pad_token_id") if d[k] < 0}
    d["rope_scaling"] = {k: list(x) if isinstance(x, tuple) else x
                         for k, x in config.rope_scaling} or None
    if switch(config) < math.inf:                                  # transformers 4 reads it here
        d["original_max_position_embeddings"] = switch(config)
    d = dialect.write(write_windows(d, config, dialect.slides))
    spelled = {v: k for k, v in dialect.keys.items()}
    d = {spelled.get(k, k): v for k, v in d.items()}
    if scalar:                                                     # transformers' num_labels = 1
        d |= dict(id2label={"0": "LABEL_0"}, label2id={"LABEL_0": 0})
    return d


# === mixtral, qwen3_moe: 2401.04088, 2505.09388, top-k experts in the MLP's place =================


def top_shares(c, logits):
    """The likeliest experts and their probabilities, which sum to 1 if the config says so."""
    weight, chosen = logits.softmax(-1).topk(c.num_experts_per_tok, -1)                  # [N, k]
    return weight / weight.sum(-1, keepdim=True) if c.norm_topk_prob else weight, chosen


class MoE(nn.Module):
    """Top-k mixture of SwiGLU experts. `router_logits` [N, E] of the last forward feed the balance
    loss. route: (config, logits) -> shares and numbers of the chosen experts [N, k]."""
    of_all_tokens = True                     # see states(): a loss reads what each of [B, T] chose

    def __init__(self, c, width, route=top_shares):
        super().__init__()
        self.route = partial(route, c)
        self.gate = nn.Linear(c.hidden_size, c.num_experts, bias=False)
        self.experts = nn.ModuleList(MLP(c, width) for _ in range(c.num_experts))
        self.router_logits = None

    def forward(self, x):
        flat = x.view(-1, x.size(-1))                                                    # [N, D]
        self.router_logits = self.gate(flat)                                             # [N, E]
        weight, chosen = self.route(self.router_logits.float())                          # [N, k]
        order = chosen.flatten().argsort(stable=True)          # [N k], an expert's tokens together
        counts = chosen.flatten().bincount(minlength=len(self.experts)).tolist()
        every = torch.is_grad_enabled() or not len(flat)       # of no token: gradient 0, not none
        parts = flat[order // chosen.size(1)].split(counts)                           # [n, D] each
        out = torch.cat([f(part) for f, part in zip(self.experts, parts) if len(part) or every])
        out = torch.empty_like(out).index_copy(0, order, out).unflatten(0, chosen.shape)
        return (out * weight[..., None]).to(flat.dtype).sum(1).view_as(x)                # [N, k, D]


def load_balance_loss(model, mask=None):
    """Mixtral's auxiliary loss of the last forward (Switch, 2101.03961 eq. 4-6), over all layers.

    E * sum_e f_e P_e:  f_e the share of tokens that choose e;  P_e its mean probability. k for
    uniform routing, 0 for a dense model. mask [B, T]: tokens that count (leave padding out). A
    product of means, so it is that of the micro-batch at hand, as everywhere. Forgets the forward,
    whose graph it holds.
    """
    if not model.config.moe:
        return torch.zeros(())
    layers = [m for m in model.modules() if isinstance(m, MoE)]
    prob = torch.stack([m.router_logits for m in layers]).float().softmax(-1)            # [L, N, E]
    for m in layers:
        m.router_logits = None
    top = prob.topk(model.config.num_experts_per_tok, -1).indices                        # [L, N, k]
    chosen = F.one_hot(top, prob.size(-1)).sum(-2).float()                               # [L, N, E]
    keep = prob.new_ones(prob.size(1)) if mask is None else mask.reshape(-1).float()     # [N]
    share, mean = ((x * keep[:, None]).sum((0, 1)) / (keep.sum() * len(x))
                   for x in (chosen, prob))                                              # [E] each
    return prob.size(-1) * (share * mean).sum()


def check_experts(d, kind):
    """What is wrong with the number of experts."""
    top, mlp = d.get("num_experts_per_tok", 2), FAMILIES[kind].mlp
    experts = d.get("num_local_experts", d.get("num_experts", 0))
    if mlp == "sparsemixer" and top != 2:
        return f"num_experts_per_tok = {top}: {kind} has two of a token"
    return "" if mlp == "dense" or top <= experts else f"{top} of {experts} experts a token"


MLPS["experts"] = MoE
TYPES |= dict(num_experts="whole", num_local_experts="size", num_experts_per_tok="size",
              norm_topk_prob="flag", router_aux_loss_coef="number", mlp_only_layers="list",
              decoder_sparse_step="size")
CHECKS["experts"] = check_experts


# === expert_names: Hugging Face, how the families spell their experts =============================


def read_mixtral(d):
    """transformers 5 renames Qwen's key to Mixtral's."""
    return dict(num_experts=d.get("num_local_experts", d.get("num_experts")), norm_topk_prob=True)


def write_mixtral(d):
    """Mixtral's own key."""
    experts = d.pop("num_experts")
    return d | dict(num_local_experts=experts)


def read_qwen3_moe(d):
    """The width of an expert stands under a name of its own, and shares are not renormalised."""
    return dict(num_experts=d.get("num_local_experts", d.get("num_experts")),
                intermediate_size=d["moe_intermediate_size"],
                norm_topk_prob=d.get("norm_topk_prob", False))


def write_qwen3_moe(d):
    """Every layer has experts: none is a plain MLP."""
    return d | dict(moe_intermediate_size=d["intermediate_size"], decoder_sparse_step=1,
                    mlp_only_layers=[])


MIXTRAL = ((".mlp.gate.", ".block_sparse_moe.gate."),
           (".mlp.experts.", ".block_sparse_moe.experts."),
           (".gate_proj.", ".w1."), (".down_proj.", ".w2."), (".up_proj.", ".w3."))
EXPERTS = dict(num_experts_per_tok=2, router_aux_loss_coef=0.001)
DIALECTS["mixtral"] = Dialect(
    "Mixtral", slides=every, theta=1e6, read=read_mixtral, write=write_mixtral, names=MIXTRAL,
    absent=LLAMA | EXPERTS | dict(num_key_value_heads=8, rms_norm_eps=1e-5, num_local_experts=8))
DIALECTS["qwen3_moe"] = Dialect(
    "Qwen3Moe", width="moe_intermediate_size", reads=("attention_bias",), slides=switched,
    read=read_qwen3_moe, write=write_qwen3_moe,
    absent=EXPERTS | dict(num_key_value_heads=4, num_experts=128, num_experts_per_tok=8,
                          sliding_window=4096))


# === phi3, phimoe: 2404.14219, 2409.12136, stacked tensors; LayerNorm, and rivals among experts ===


def sparsemixer(c, logits):
    """Phi-3.5-MoE's two experts (SparseMixer, 2310.00811), as they are at inference: the likeliest,
    then the likeliest of the rest, each with its share among its rivals, those within 2
    router_jitter_noise of it, relative to the larger.   [N, E] -> [N, 2] each

    ours: training routes so, too, and not by chance with an estimated gradient: the sampler is the
    policy. A router then learns only where experts are rivals, and by load_balance_loss.
    """
    def share(open_to, best):
        top = open_to.gather(-1, best)                                                   # [N, 1]
        far = (top - logits) / logits.abs().clamp(min=top) > 2 * c.router_jitter_noise
        return open_to.masked_fill(far, -math.inf).softmax(-1).gather(-1, best)

    first = logits.argmax(-1, keepdim=True)
    rest = logits.scatter(-1, first, -math.inf)                                          # [N, E]
    second = rest.argmax(-1, keepdim=True)
    return (torch.cat([share(logits, first), share(rest, second)], -1),
            torch.cat([first, second], -1))


def with_bias(linear):
    """A head and its bias as one matrix, for states whose next number is 1.   [V, D + 8]"""
    bias = F.pad(linear.bias[:, None], (0, 7))              # 8: a GPU multiplies eights the fastest
    return torch.cat([linear.weight, bias], 1)


def with_one(hidden):
    """States that with_bias reads: a 1 and seven zeros more.   [..., D + 8]"""
    return F.pad(F.pad(hidden, (0, 1), value=1.0), (0, 7))


def write_phi3(d):
    """Phi-3's own place of the old context; transformers 4 wants no other key in rope_scaling."""
    scaling, old = d["rope_scaling"] or {}, d["max_position_embeddings"]
    if scaling:
        old = scaling.pop("original_max_position_embeddings")
        scaling["type"] = scaling.pop("rope_type")
    return d | dict(original_max_position_embeddings=old)


def write_phimoe(d):
    """Mixtral's key, and the older name of rope_type."""
    if d["rope_scaling"]:
        d["rope_scaling"]["type"] = d["rope_scaling"].pop("rope_type")
    return write_mixtral(d)


def check_phimoe(d, kind):
    """What is wrong with a Phi-3.5-MoE."""
    scaling = dict(d["rope_scaling"])
    if kind == "phimoe" and scaling and not {"short_mscale", "long_mscale"} <= scaling.keys():
        return "rope options lack short_mscale or long_mscale"
    tied = d.get("lm_head_bias") and d.get("tie_word_embeddings")
    return "lm_head_bias: a head that is the embedding has none here" if tied else ""


NORMS["layer"], MLPS["sparsemixer"] = nn.LayerNorm, partial(MoE, route=sparsemixer)
CHECKS["phimoe"] = check_phimoe
STACKED = tuple((f".{part}_proj.weight", f".{whole}_proj.weight") for part, whole in (
    ("q", "qkv"), ("k", "qkv"), ("v", "qkv"), ("gate", "gate_up"), ("up", "gate_up")))
DIALECTS["phi3"] = Dialect(
    "Phi3", reads=("partial_rotary_factor",), slides=every, ropes=PHI_ROPES, write=write_phi3,
    names=STACKED, absent=dict(rms_norm_eps=1e-5, original_max_position_embeddings=4096,
                               bos_token_id=1, eos_token_id=32000, pad_token_id=32000))
DIALECTS["phimoe"] = Dialect(
    "Phimoe", alias="PhiMoEForCausalLM", slides=every, theta=1e6, ropes=PHI_ROPES,
    reads=("attention_bias", "lm_head_bias", "router_jitter_noise"),
    read=read_mixtral, write=write_phimoe, names=MIXTRAL,
    absent=LLAMA | EXPERTS | dict(num_key_value_heads=8, rms_norm_eps=1e-5, num_local_experts=16,
                                  router_jitter_noise=0.01))


# === gemma3_text: 2503.19786, norms around, layers with a window and a theta of their own =========


class RMSNormPlusOne(nn.Module):
    """kernels.rms_norm with 1 + the weight, in float32: Gemma's, whose decay is towards 1."""

    def __init__(self, width, eps):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.zeros(width)), eps

    def forward(self, x):
        return rms_norm(x, 1 + self.weight.float(), self.eps)


@lru_cache(8)
def rounded_root(width, dtype):
    """The root of the width as a number of that dtype: what Gemma's embeddings are times."""
    return float(torch.tensor(width ** 0.5, dtype=dtype))


NORMS["rms_plus_one"] = RMSNormPlusOne
# ours: post_attention_layernorm stands before the MLP, as in all other families
DIALECTS["gemma3_text"] = Dialect(
    "Gemma3", scorer="Gemma3Text", slides=patterned, theta=1e6, local=1e4,
    reads=("attention_bias", "query_pre_attn_scalar", "rope_local_base_freq"),
    keys=dict(hidden_activation="hidden_act"),
    write=lambda d: d | dict(query_pre_attn_scalar=d["query_pre_attn_scalar"] or d["head_dim"]),
    names=((".post_attention_layernorm.", ".pre_feedforward_layernorm."),
           (".behind_attn.", ".post_attention_layernorm."),
           (".behind_mlp.", ".post_feedforward_layernorm.")),
    absent=dict(num_key_value_heads=4, head_dim=256, tie_word_embeddings=True, sliding_window=4096,
                query_pre_attn_scalar=256, hidden_act="gelu_pytorch_tanh", pad_token_id=0,
                eos_token_id=1, bos_token_id=2))


# === shaped: ours, models with fields that no other tool knows ====================================


def own_fields(config):
    """The fields that no other tool knows, where they say something: {name: value}."""
    names = [x for field, with_it in SHAPED.items() if getattr(config, field) for x in with_it]
    return {name: getattr(config, name) for name in names}


# === puzzle: 2411.19146, every layer's MLP has its own width, or there is none ====================


def check_widths(d, kind):
    """What is wrong with layer_widths."""
    widths = d.get("layer_widths") or []
    right = all(type(x) is int and x >= 0 for x in widths)
    return "" if right else f"layer_widths {widths}: whole numbers"


TYPES["layer_widths"], SHAPED["layer_widths"] = "list", ("layer_widths",)
CHECKS["widths"] = check_widths


# === swiftkv: 2410.03960, late layers take their keys and values from one state ===================


def check_swift(d, kind):
    """What is wrong with swift_layer: from it on, keys and values are made of the state that enters
    it, through a norm of its own."""
    beyond = d.get("swift_layer", 0) >= d["num_hidden_layers"]
    return "swift_layer is beyond the last layer" if beyond else ""


def add_sources(model):
    """Put the norms that later layers' keys come from into a Transformer.
    -> {layer's number: name}"""
    config, found = model.config, {}
    for field, name in SOURCES.items():
        if layer := getattr(config, field):
            found[layer] = name
            norm = NORMS[config.family.norm]
            model.add_module(name, norm(config.hidden_size, config.rms_norm_eps))
    return found


SOURCES["swift_layer"] = "norm_swiftkv"
TYPES["swift_layer"], SHAPED["swift_layer"] = "whole", ("swift_layer",)
CHECKS["swift"] = check_swift


# === moh: 2410.11842, mixture of heads: a router weighs what the heads say ========================


class HeadRouter(nn.Module):
    """Mixture of heads (MoH, 2410.11842): the weight of every head's output, 0 if it is not chosen.

    learned: [a1 S softmax(Ws x), a2 K p / Σ p over the top K],
             p = softmax(Wr x),  a = 2 softmax(Wh x).
    norm: 1 for the S shared heads and the top K by p = softmax(‖q‖ / std), gradient straight to p.
    Every head is computed, then weighted. `routing` (p, chosen) [B, T, R] of the last forward feeds
    a balance loss.
    """
    of_all_tokens = True                     # see states(): a loss reads what each of [B, T] chose

    def __init__(self, c):
        super().__init__()
        self.S, self.K, self.routing = c.shared_heads, c.routed_heads, None
        self.learned = c.head_router == "learned"
        if self.learned:
            D = c.hidden_size
            self.shared, self.groups = nn.Linear(D, self.S, bias=False), nn.Linear(D, 2, bias=False)
            self.routed = nn.Linear(D, c.num_attention_heads - self.S, bias=False)

    def forward(self, x, q):
        norm = q[:, self.S:].float().norm(dim=-1).transpose(1, 2)                        # [B, T, R]
        scale = norm.std(-1, keepdim=True).detach()            # ours: no gradient, infinite at 0
        p = self.routed(x).float() if self.learned else norm / scale.clamp(min=1e-6)
        p = p.softmax(-1)                                                                # [B, T, R]
        chosen = torch.zeros_like(p).scatter(-1, p.topk(self.K, -1).indices, 1.0)
        self.routing = p, chosen
        if self.learned:
            a, routed = 2 * self.groups(x).float().softmax(-1), p * chosen
            shared = a[..., :1] * self.S * self.shared(x).float().softmax(-1)            # [B, T, S]
            routed = a[..., 1:] * self.K * routed / routed.sum(-1, keepdim=True)
        else:
            shared = torch.ones_like(norm[..., :1]).expand(-1, -1, self.S)               # [B, T, S]
            routed = chosen + p - p.detach()
        return torch.cat([shared, routed], -1).transpose(1, 2)[..., None]             # [B, H, T, 1]


def check_routed(d, kind):
    """What is wrong with the routed heads."""
    router = d.get("head_router", "learned")
    if d.get("shared_heads", 0) + d.get("routed_heads", 0) > d["num_attention_heads"]:
        return "more routed heads than heads"
    return "" if router in GATES else f"head_router is {router!r}: expected {' or '.join(GATES)}"


GATES["learned"] = GATES["norm"] = HeadRouter
SHAPED["routed_heads"] = "shared_heads", "routed_heads", "head_router"
TYPES |= dict(shared_heads="whole", routed_heads="whole", head_router="text")
CHECKS["routed"] = check_routed


# === scalar: 2203.02155, a head to one number: reward models and critics ==========================


class ScalarModel(nn.Module):
    """A body and a linear head to one number (…ForSequenceClassification): reward model, or PPO's
    critic."""

    def __init__(self, config):
        super().__init__()
        self.config, self.generation = config, {}
        self.model = Transformer(replace(config, tie_word_embeddings=True))       # tied: no lm_head
        self.score = nn.Linear(config.hidden_size, 1, bias=False)

    @classmethod
    def from_lm(cls, lm, std=0.0, share=False):
        """Copy a language model's body; the head is normal with `std` (0: the critic predicts 0 at
        first). share: the body is on the model's own tensors, which adapters leave as they are.

        Raises UserError for packed layers, which cannot be trained but by adapters.
        """
        if not share and any(isinstance(m, PackedLinear) for m in lm.modules()):
            raise UserError("a checkpoint with packed layers cannot become a reward model or "
                            "critic: train adapters on it (--peft lora), or start from the one "
                            "that it was compressed from")
        c = lm.config
        with torch.device("meta"):           # a pad that also ends texts: save() finds another
            model = cls(replace(c, pad_token_id=-1) if c.pad_token_id in c.eos_token_id else c)
        config = model.model.config
        model.model = (sharing if share else copy.deepcopy)(lm)
        if not share and lm.products != "float32":             # a frozen one's: what trains is fine
            model.model.float().products = "float32"
        model.model.__dict__ |= dict(config=config, bias=False)
        model.model._modules.pop("lm_head", None)
        model.score = nn.Linear(lm.config.hidden_size, 1, bias=False, device=lm.head.device)
        nn.init.normal_(model.score.weight, std=std) if std else nn.init.zeros_(model.score.weight)
        return model if share else model.requires_grad_()

    def forward(self, tokens, cache=None, states=False):
        """[B, T] tokens -> [B, T] scores in float32, each read after its token; or the body's
        states [B, T, D]."""
        hidden = self.model(tokens, cache)                                               # [B, T, D]
        return hidden if states else self.read(hidden)

    def read(self, hidden):
        """The score that a state [..., D] stands for: a sum, never in bfloat16; or what a script's
        own module in the head's place says, [..., K]."""
        return (hidden.float() * self.score.weight[0].float()).sum(-1) if isinstance(
            self.score, nn.Linear) else self.score(hidden)


def body_of(model):
    """The transformer of a language model, or of a scalar one."""
    return model.model if isinstance(model, ScalarModel) else model


# === read: ours, what a scalar model says of sequences, and means of it ===========================


def token_values(critic, tokens, mask):
    """The critic's estimates [B, T(, K)], out[:, t] BEFORE token t, read after t - 1; 0 at t = 0,
    and off the mask."""
    where = F.pad(mask[:, 1:] > 0, (1, 0))                                               # [B, T]
    says = states(critic, tokens, where.roll(-1, 1))                                     # [n(, K)]
    return says.new_zeros(*where.shape, *says.shape[1:]).index_put((where,), says)


def sequence_score(reward_model, tokens, length, prompt=None):
    """A reward model's score of each sequence, read where transformers reads it: at its last token
    that is not the model's pad.   tokens [B, T], length, and of its prompt, [B] -> [B]"""
    place = torch.arange(tokens.size(1), device=tokens.device)                           # [T]
    read = (place < length[:, None]) & (tokens != reward_model.config.pad_token_id)      # [B, T]
    last = (place * read).argmax(1)                                                      # [B]
    return states(reward_model, tokens, place == last[:, None], prompt)


def last_hidden(model, tokens, length, prompt=None):
    """The body's state after each sequence, in float32; arguments as in sequence_score.  [B, D]"""
    last = torch.arange(tokens.size(1), device=tokens.device) == length[:, None] - 1     # [B, T]
    body = dict(states=True) if isinstance(model, ScalarModel) else {}
    return states(model, tokens, last, prompt, **body).float()


def masked_mean(x, mask):
    """Mean of x over mask (both [B, T]); 0 for an empty mask."""
    return (x * mask).sum() / mask.sum().clamp(min=1)


def masked_whiten(x, mask, shift=True):
    """(x - mean) / std over the mask, biased variance, eps 1e-8; shift=False only rescales."""
    mean = masked_mean(x, mask)
    white = (x - mean) * torch.rsqrt(masked_mean((x - mean) ** 2, mask) + 1e-8)          # [B, T]
    return (white if shift else white + mean) * mask


# === tensors: safetensors, a folder's weights by name, in one file or in several ==================


def hf_name(name, config):
    """Our parameter's name -> the checkpoint's: 'model.' before the body, the family's parts."""
    if not name.startswith(("model.", "lm_head.", "score.")):
        name = "model." + name
    for ours, theirs in DIALECTS[config.model_type].names:
        name = name.replace(ours, theirs)
    return name


def stored_as(model, state):
    """{the checkpoint's name: [ours]}: several where the family stacks their rows in one tensor."""
    out = {}
    for name in state:
        out.setdefault(hf_name(name, model.config), []).append(name)
    return out


def shard_index(path):
    """{tensor: file} of a folder's index, {} without; UserError for files outside the folder."""
    index = path / "model.safetensors.index.json"
    if not index.exists():
        return {}
    where = read_json(index, "copy the checkpoint again").get("weight_map")
    named = isinstance(where, dict) and all(isinstance(x, str) for x in where.values())
    if not where or not named:
        raise UserError(f"{index}: weight_map is no table of tensors and their files: "
                        "copy it again")
    for name in sorted(set(where.values())):
        if Path(name).name != name or not name.endswith(".safetensors"):
            raise UserError(f"{index} names {name!r}: "
                            "expected a .safetensors file of the same folder")
    if (path / "model.safetensors").exists() and "model.safetensors" not in where.values():
        raise UserError(f"{path} holds model.safetensors and an index of other files: "
                        "remove the older")
    return where


def open_weights(path):
    """A safetensors file, open; UserError if it is missing or broken."""
    if path.exists() and not path.is_file():
        raise UserError(f"{path} is no file: copy the checkpoint again")
    try:
        return safe_open(path, "pt")
    except FileNotFoundError:
        raise UserError(f"{path} is missing: the checkpoint is incomplete, copy it again") from None
    except (SafetensorError, OSError) as e:
        raise UserError(f"{path} is not a readable safetensors file ({e}): copy it again") from None


def tensors(path):
    """{name: open file} of a folder's safetensors, single or sharded. UserError if one is missing
    or broken, or if the index does not say what its files hold."""
    where, out = shard_index(path), {}
    for name in sorted(set(where.values())) or ["model.safetensors"]:
        file = open_weights(path / name)
        for key in file.keys():
            if where and where.get(key) != name:
                raise UserError(f"{path / name} holds the tensor {key}, which the index puts into "
                                f"{where.get(key, 'no file')}: they do not belong together, "
                                "copy them again")
            out[key] = file
    if lost := sorted(where.keys() - out.keys()):
        raise UserError(f"{path / where[lost[0]]} lacks the tensor {lost[0]}, "
                        "which the index puts there: copy it again")
    return out


# === packed: ours, layers whose weights are codes =================================================


def repack(model, layers, where):
    """Put empty packed layers in the place of those that config.json lists, {their name: spec}."""
    if not isinstance(layers, dict):
        raise UserError(f"{where}: quantization_config's layers is no table of names: "
                        "pack the model again")
    ours = {hf_name(name + ".", model.config)[:-1]: name for name, m in model.named_modules()
            if isinstance(m, nn.Linear) and "layers." in name}
    for key, spec in layers.items():
        try:
            old = model.get_submodule(ours[key])
            new = PackedLinear(old.in_features, old.out_features, old.bias is not None, **spec)
        except KeyError:
            raise UserError(f"{where}: packed layer {key} is no linear layer of this model's "
                            "blocks: its quantization_config belongs to another model") from None
        except (TypeError, ValueError) as e:
            raise UserError(f"{where}: packed layer {key} cannot be built ({e}): "
                            "pack the model again") from None
        model.set_submodule(ours[key], new)


def packed_layers(model):
    """{a packed layer's name in the checkpoint: its spec, its inputs}"""
    return {hf_name(name + ".", model.config)[:-1]: (m.spec(), m.in_features)
            for name, m in model.named_modules() if isinstance(m, PackedLinear)}


def unpacked(model):
    """A copy of the model with plain layers in the place of packed ones."""
    out = copy.deepcopy(model)
    dtype = next(model.parameters()).dtype
    for name, m in list(out.named_modules()):
        if isinstance(m, PackedLinear):
            out.set_submodule(name, plain_linear(m, m.dequantize().to(dtype)))
    return out


def packed_config(model, path, names):
    """What config.json says of a model's packed layers, stored in the files `names`; {}: none."""
    layers = {name: spec for name, (spec, _) in packed_layers(model).items()}
    marks = {name: sha256(path / name) for name in names} if layers else {}
    return dict(quant_method=QUANT, layers=layers, sha256=marks) if layers else {}


def check_packed(path, raw):
    """UserError if a file of packed weights is not the one that was written."""
    quant = raw.get("quantization_config") or {}
    for name, expected in (quant.get("sha256") or raw.get("packed_sha256") or {}).items():
        if sha256(path / name) != expected:
            raise UserError(f"{path / name} was changed after it was packed (its SHA-256): "
                            "copy it again")


# === compressed_tensors: vLLM, whole numbers in groups, as other engines store and open them ======

THEIRS = "compressed-tensors"            # … quant_method; its format of packed whole numbers:
PARTS = dict(codes="weight_packed", scale="weight_scale", zero="weight_zero_point")


def words(stream):
    """Bytes [..., n] as little-endian int32, zeros behind."""
    return F.pad(stream, (0, -stream.size(-1) % 4)).contiguous().view(torch.int32)


def to_theirs(base, part, x, spec, inputs):
    """A packed layer's buffer under their names. Codes are the same bits, in words; zeros are
    packed along the outputs, not the groups."""
    key = f"{base}.{PARTS[part]}"
    if part == "codes":
        return {key: words(x), f"{base}.weight_shape": torch.tensor([len(x), inputs])}
    if part == "zero":
        zero = kernels.unpack_bits(x, spec["bits"], -(-inputs // spec["group"]))    # [out, groups]
        x = words(kernels.pack_bits(zero.T.contiguous(), spec["bits"])).T.contiguous()
    return {key: x}


class Theirs:
    """The tensors of a compressed-tensors folder, {name: open file}, read by our names."""

    def __init__(self, stored, specs):
        self.stored, self.specs = stored, specs

    def theirs(self, key):
        return self.stored[key].get_tensor(key)

    def get_tensor(self, key):
        """In the layout of PackedLinear's buffers."""
        base, _, part = key.rpartition(".")
        if base not in self.specs or part not in PARTS:
            return self.theirs(key)
        bits, (out, inputs) = self.specs[base]["bits"], self.theirs(f"{base}.weight_shape").tolist()
        x = self.theirs(f"{base}.{PARTS[part]}")
        if part == "scale":
            return kernels.to_half(x, f"a scale of {base}")
        if part == "zero":
            x = x.T.contiguous().view(torch.uint8)                                # [groups, bytes]
            return kernels.pack_bits(kernels.unpack_bits(x, bits, out).T.contiguous(), bits)
        unit = kernels.INT_UNIT.get(bits, 8)
        return x.view(torch.uint8)[:, :-(-inputs // unit) * unit * bits // 8].contiguous()

    def get_slice(self, key):
        """What place() asks of a tensor before it is read."""
        base, _, part = key.rpartition(".")
        if base not in self.specs or part not in PARTS:
            return self.stored[key].get_slice(key)
        x = self.get_tensor(key)
        return SimpleNamespace(get_shape=lambda: [*x.shape], get_dtype=lambda: str(x.dtype))


def by_our_names(stored, specs):
    """tensors() of such a folder, {our name: Theirs}."""
    if not specs:
        return stored
    reader, ours = Theirs(stored, specs), {theirs: part for part, theirs in PARTS.items()}
    out = {}
    for key in stored:
        base, _, part = key.rpartition(".")
        if base not in specs:
            out[key] = stored[key]
        elif part != "weight_shape":
            out[f"{base}.{ours.get(part, part)}"] = reader
    return out


# === compressed_config: vLLM, config.json's words for those layers ================================


def specs_of(quant, stored, where):
    """{layer: PackedLinear's options} of a quantization_config: ours, or of compressed-tensors.
    UserError for what is more than whole numbers in groups."""
    if quant.get("quant_method") != THEIRS:
        return quant.get("layers", {})
    if quant.get("format") != "pack-quantized":
        raise UserError(f"{where}: quantization_config's format is {quant.get('format')!r}: of "
                        "compressed-tensors only pack-quantized can be read")
    out = {}
    for base in [key.removesuffix(".weight_packed") for key in stored
                 if key.endswith(".weight_packed")]:
        group = group_of(base, quant.get("config_groups", {}))
        weights = group.get("weights") or {}
        if f"{base}.weight_shape" not in stored or not weights:
            raise UserError(f"{where}: {base} is packed, and no config group or no weight_shape "
                            "says how: copy the checkpoint again")
        if group.get("input_activations") or weights.get("type", "int") != "int" or (
                f"{base}.weight_g_idx" in stored):
            raise UserError(f"{where}: {base} is of floats, rounds its inputs too, or has columns "
                            "out of order (g_idx): use a checkpoint of plain whole numbers")
        inputs = stored[f"{base}.weight_shape"].get_tensor(f"{base}.weight_shape").tolist()[1]
        size = weights.get("group_size") or -1
        out[base] = dict(kind="int", bits=weights.get("num_bits"), symmetric=weights.get(
            "symmetric", True), group=size if size > 0 else inputs)
    return out


def group_of(name, groups):
    """The config group whose targets mean a layer, by its class, name, or "re:" and a pattern."""
    for group in groups.values():
        for target in group.get("targets", []):
            pattern = target[3:] if target.startswith("re:") else re.escape(target) + "$"
            if target == "Linear" or re.match(pattern, name):
                return group
    return {}


def their_config(layers, every):
    """quantization_config of {layer: (spec, inputs)}; every: names of all linear layers there."""
    groups = {}
    for name, (spec, inputs) in layers.items():
        whole = spec["group"] >= inputs
        how = dict(num_bits=spec["bits"], type="int", symmetric=spec["symmetric"], dynamic=False,
                   strategy="channel" if whole else "group",
                   group_size=None if whole else spec["group"], observer="minmax")
        groups.setdefault(json.dumps(how), []).append(name)
    alike = len(groups) == 1 and {*layers} == {*every}
    return dict(
        quant_method=THEIRS, format="pack-quantized", quantization_status="compressed",
        ignore=["lm_head"], config_groups={f"group_{i}": dict(
            targets=["Linear"] if alike else names, weights=json.loads(how),
            input_activations=None, output_activations=None)
            for i, (how, names) in enumerate(groups.items())})


def only_ours(model):
    """Why compressed-tensors cannot say what the model's packed layers are, or nothing."""
    found = [(name, m) for name, m in model.named_modules() if isinstance(m, PackedLinear)]
    if not found:
        return "no layer of the model is packed"
    for name, m in found:
        if m.kind != "int" or m.order is not None or m.rotate or m.act:
            return f"{name} is more than whole numbers in groups ({m.kind}, {m.options})"
        if m.group < m.in_features and m.in_features % m.group:
            return (f"{name} has {m.in_features} inputs, which are no whole groups of {m.group}: "
                    "choose a --group that divides them")


# === place: Hugging Face, every tensor of the model is stored once, and nothing else is ===========

FLOATS = dict(F64=torch.float64, F32=torch.float32, BF16=torch.bfloat16, F16=torch.float16)


def check_spare(path, model, stored, packed):
    """UserError for a stored tensor that the model does not read. packed: its packed layers' names.

    A tied head is one that load() compares; old exports hold rotary frequencies, made anew here.
    """
    config = model.config
    tied = "lm_head.weight" if config.tie_word_embeddings and isinstance(model, Transformer) else ""
    spare = [k for k in stored if k != tied and not k.endswith(".rotary_emb.inv_freq")]
    for key in sorted(spare, key=lambda k: k.rpartition(".")[0] not in packed):
        if key.rpartition(".")[0] in packed:
            raise UserError(f"{path}: tensor {key} does not belong to a layer packed as "
                            "quantization_config says: the two do not match, pack the model again")
        raise UserError(f"{path}: nothing reads the tensor {key} ({len(spare)} such): "
                        f"config.json, {config.num_hidden_layers} layers of {config.model_type}, "
                        "is of another model")


def place(path, model, stored):
    """Where the model's tensors are stored: {our name: open file}, {stored name: open file} of the
    spare ones. UserError for a tensor that is missing, misshapen, unread, or holds no floats."""
    config, files, state = model.config, {}, model.state_dict()
    packed = {name for name, _ in model.named_buffers()}           # their dtype is their format
    for key, names in stored_as(model, state).items():
        if key not in stored:
            raise UserError(f"{path}: tensor {key} is missing (config.json asks for "
                            f"{config.num_hidden_layers} layers of {config.model_type}): "
                            "the checkpoint is incomplete or its config is wrong")
        found, wanted = stored.pop(key), list(state[names[0]].shape)
        files |= dict.fromkeys(names, found)
        shape, kind = found.get_slice(key).get_shape(), found.get_slice(key).get_dtype()
        if len(names) > 1:
            wanted[0] = sum(len(state[name]) for name in names)
        if wanted != shape:
            raise UserError(f"{path}: tensor {key} has shape {shape}, "
                            f"config.json asks for {wanted}")
        if not packed.issuperset(names) and kind not in FLOATS:
            raise UserError(f"{path}: tensor {key} is stored as {kind}: weights are floats, one of "
                            f"{', '.join(FLOATS)}; use a checkpoint that is not quantised")
    check_spare(path, model, stored, {hf_name(n, config).rpartition(".")[0] for n in packed})
    return files, stored


# === load: Hugging Face, a folder to a model and its tokenizer ====================================


def read_tokenizer(path, config, raw):
    """A checkpoint's tokenizer; UserError if it has more ids than the model has rows, or no end."""
    tokenizer, rows = Tokenizer.load(path), config.vocab_size
    if tokenizer.vocab_size > rows:
        raise UserError(f"{path}: the tokenizer has {tokenizer.vocab_size} ids but the model only "
                        f"{rows} rows: this tokenizer.json belongs to another model")
    for end in ("bos", "eos", "pad"):
        ids = ends(raw, path / "config.json", f"{end}_token_id")
        for i in (*ids, getattr(tokenizer, end) or 0, *config.eos_token_id):
            if i >= rows:
                raise UserError(f"{path}: {end}_token_id {i} is beyond the model's {rows} rows")
    if tokenizer.eos is None:
        raise UserError(f"{path}: the tokenizer has no end of text: "
                        "name an eos_token in its config")
    return tokenizer


def frame(path):
    """All of a checkpoint but its numbers: the model on the meta device, {our name: open file},
    {stored name: open file} of the spare tensors, the tokenizer, and config.json's object.

    Raises UserError for what from_hf, repack, place and read_tokenizer refuse.
    """
    where, extra = path / "config.json", path / "generation_config.json"
    raw = read_json(where, "copy the checkpoint again")
    raw["model_type"] = str(raw.get("model_type")).removeprefix(PACKED_TYPE)
    config = from_hf(raw, where)
    generation = read_json(extra) if extra.exists() else {}
    if eos := ends(generation, extra):
        config = replace(config, eos_token_id=eos)     # Llama-3's chat models name all of them here
    scalar = HEADS[1] in (raw.get("architectures") or [""])[0]
    quant, stored = raw.get("quantization_config") or {}, tensors(path)
    specs = specs_of(quant, stored, where)
    with torch.device("meta"):
        model = (ScalarModel if scalar else Transformer)(config)
        model.generation = generation
        repack(model, specs, where)
    theirs = specs if quant.get("quant_method") == THEIRS else {}
    files, spare = place(path, model, by_our_names(stored, theirs))
    return model, files, spare, read_tokenizer(path, config, raw), raw


def load(path, device="cpu", dtype=torch.float32, chat=False, matrices=None):
    """A Hugging Face folder, a PEFT adapter's, or a run folder (its newest step) -> (Transformer or
    ScalarModel, Tokenizer). chat: its turns end as its chat template ends them (ChatML, if it has
    none). matrices: linear layers of the blocks that are stored in this dtype keep it.

    Raises UserError for what frame() and attach() refuse, for NaN or infinity, a head that is not
    the embedding it should be tied to, and packed files that were changed. Of a run's checkpoint it
    names the next older one.
    """
    path = checkpoint(path)
    folder = base_of(path)                   # the same, but of an adapter
    try:
        model, files, spare, tokenizer, raw = frame(folder)
        state = read_weights(folder, model, files, device, dtype, matrices or dtype)
        check_packed(folder, raw)
        check_tied(folder, spare, state)
    except UserError as e:
        raise UserError(f"{e}{older_than(folder)}") from None
    model.load_state_dict(state, assign=True)
    if any(x.dtype == matrices != dtype for x in state.values()):
        body_of(model).products = str(matrices).removeprefix("torch.")
    if is_classifier(path) and not isinstance(model, ScalarModel):
        model = ScalarModel.from_lm(model, share=True)
    if folder != path:
        tokenizer = attach(model, path, raw) or tokenizer
    say_pad(model, path)
    if chat:
        tokenizer.use_chat()
        model.config = with_ends(model.config, tokenizer)
    return model.requires_grad_(), tokenizer


# === peek: Hugging Face, what is known of a folder before its weights are read ====================


def peek(path, scalar=False, option="--init"):
    """A checkpoint's ModelConfig, read without its weights: what is known before a run. UserError
    for what frame() refuses, and unless it is a language model (scalar: a reward model)."""
    try:
        path = checkpoint(path)
    except UserError as e:
        raise UserError(f"{option} {e}") from None
    model = frame(base_of(path))[0]
    found = ScalarModel if is_classifier(path) else type(model)
    if (found is ScalarModel) != scalar:
        kind = "a reward model (…ForSequenceClassification)" if scalar else "a language model"
        raise UserError(f"{option} {path}: need {kind}, found a {found.__name__}")
    return model.config


# === ends: ours, the ids that end a text, and a reward model's pad, which ends none ===============


def with_ends(config, tokenizer):
    """The ModelConfig whose generation stops where the tokenizer's texts end, too."""
    ends = dict.fromkeys((*config.eos_token_id, *tokenizer.stops))
    return replace(config, eos_token_id=tuple(ends))


def say_pad(model, path):
    """Say of others' reward models where they are scored, if it is not at the end of a text."""
    if isinstance(model, ScalarModel) and model.config.pad_token_id in model.config.eos_token_id:
        print(f"{path}: its pad_token_id also ends a text: it is scored before its end, as "
              "transformers scores it", file=sys.stderr)


def pad_apart(config, tokenizer):
    """What a reward model without a pad is saved with, (config, tokenizer): a special token that
    ends no text. transformers reads the score at the last id that is not pad, so an end of text is
    none; without another special it stays without, and transformers refuses batches."""
    if config.pad_token_id >= 0 or tokenizer is None:
        return config, tokenizer
    ends = {tokenizer.bos, *tokenizer.stops, *config.eos_token_id}
    text = {i: text for text, i in tokenizer.specials.items() if i in tokenizer.hidden - ends}
    if not text:
        return config, tokenizer
    pad = tokenizer.pad if tokenizer.pad in text else max(text)
    return replace(config, pad_token_id=pad), with_pad(tokenizer, pad, text[pad])


def with_pad(tokenizer, pad, text):
    """The tokenizer with another pad, in its files too."""
    out = copy.copy(tokenizer)
    out.pad, out.files = pad, dict(tokenizer.files)
    for name in {"tokenizer_config.json", "special_tokens_map.json"} & out.files.keys():
        out.files[name] = json.dumps(json.loads(out.files[name]) | dict(pad_token=text), indent=1)
    return out


# === weights: Hugging Face, the numbers of a checkpoint in and out ================================


def read_weights(path, model, files, device, dtype, matrices):
    """{our name: tensor}, in dtype, but for the blocks' layers that are stored in `matrices`.
    UserError for NaN or infinity, and for packed codes of another type."""
    state, packed = model.state_dict(), {name for name, _ in model.named_buffers()}
    for key, names in stored_as(model, state).items():
        value = files[names[0]].get_tensor(key)
        parts = value.split([len(state[n]) for n in names]) if len(names) > 1 else [value]
        for name, part in zip(names, parts):
            kind = state[name].dtype
            if name in packed and part.dtype != kind:
                raise UserError(f"{path}: packed tensor {key} is stored as {part.dtype}, "
                                f"its format is {kind}: pack the model again")
            # a copy: a mapped file's tensors lie anywhere, a CPU's matmul rounds by alignment
            like = matrices if part.dtype == matrices and name.endswith("_proj.weight") else dtype
            state[name] = part.to(device, kind if name in packed else like, copy=True)
            if not_finite(state[name]):
                raise UserError(f"{path}: tensor {key} holds NaN or infinity, or overflows "
                                f"{dtype}: copy it again")
    return state


def check_tied(path, spare, state):
    """UserError for a stored head that is not the embedding which config.json ties it to."""
    if file := spare.get("lm_head.weight"):
        embedding = state["embed_tokens.weight"]
        head = file.get_tensor("lm_head.weight").to(embedding)
        if not torch.equal(head, embedding):
            raise UserError(f"{path}: lm_head.weight is not the embedding, and config.json ties "
                            "the two: set tie_word_embeddings to false if the head is meant")


# === save: Hugging Face, a model and its tokenizer to a folder ====================================


def written(model, theirs):
    """What a folder holds of a model, (name, tensor); theirs: of the layers {name: (spec, inputs)}
    what compressed-tensors stores."""
    state = model.state_dict()
    for key, stacked in stored_as(model, state).items():
        p = torch.cat([state[n] for n in stacked]) if len(stacked) > 1 else state[stacked[0]]
        base, _, part = key.rpartition(".")
        if base in theirs and part in PARTS:
            yield from to_theirs(base, part, p.cpu(), *theirs[base]).items()
        else:
            yield key, p


def save_weights(model, path, shard_bytes, theirs=()):
    """Write the tensors as safetensors, split beyond shard_bytes, with an index. -> file names"""
    shards, size = [{}], 0
    for key, p in written(model, theirs):
        if shards[-1] and size + p.nbytes > shard_bytes:
            shards, size = [*shards, {}], 0
        shards[-1][key] = p.detach().cpu().contiguous()
        size += p.nbytes
    n, index = len(shards), path / "model.safetensors.index.json"
    names = [f"model-{i + 1:05d}-of-{n:05d}.safetensors" for i in range(n)]
    names = ["model.safetensors"] if n == 1 else names
    where, total = {}, 0
    for name, shard in zip(names, shards):
        save_file(shard, path / name, metadata={"format": "pt"})
        where |= dict.fromkeys(shard, name)
        total += sum(p.nbytes for p in shard.values())
    old = {path / "model.safetensors", index, *path.glob("model-?????-of-?????.safetensors")}
    for file in old - {path / name for name in names}:         # of an earlier save
        file.unlink(missing_ok=True)
    if n > 1:
        table = dict(metadata=dict(total_size=total), weight_map=where)
        index.write_text(json.dumps(table, indent=1))
    return names


def save(model, tokenizer, path, shard_bytes=5_000_000_000, form="ours"):
    """Write a Hugging Face folder: config.json, model.safetensors (split beyond shard_bytes) and
    tokenizer.json.

    Tied heads are stored once, tensors in their own dtype (float32 in training), so load() is
    bitwise equal. Packed layers stay packed; config.json's quantization_config says how each is,
    in form "compressed-tensors" as other engines say it (UserError if they cannot); "dense": they
    are unpacked. generation_config.json keeps what it said when the model was loaded, its ids
    renewed."""
    path, scalar = Path(path), isinstance(model, ScalarModel)
    if (path / ADAPTER[0]).exists():
        raise UserError(f"{path} holds an adapter, which transformers would add to this model: "
                        "choose another folder")
    if form == THEIRS and (why := only_ours(body_of(model))):
        raise UserError(f"{path}: cannot be in the format {THEIRS}: {why}")
    path.mkdir(parents=True, exist_ok=True)
    model = unpacked(model) if form == "dense" else model
    theirs = packed_layers(model) if form == THEIRS else {}
    config, names = model.config, save_weights(model, path, shard_bytes, theirs)
    if scalar:
        config, tokenizer = pad_apart(config, tokenizer)
    dtype = next(model.parameters()).dtype
    d = to_hf(config, scalar)
    d |= dict.fromkeys(("dtype", "torch_dtype"), str(dtype).removeprefix("torch."))
    if theirs:
        every = {hf_name(n + ".", config)[:-1] for n, m in model.named_modules()
                 if isinstance(m, (nn.Linear, PackedLinear)) and "layers." in n}
        d |= dict(quantization_config=their_config(theirs, every),
                  packed_sha256={name: sha256(path / name) for name in names})
    elif packed := packed_config(model, path, names):
        d |= dict(quantization_config=packed, model_type=PACKED_TYPE + d["model_type"])
    (path / "config.json").write_text(json.dumps(d, indent=2))
    ids = {k: d[k] for k in ("bos_token_id", "eos_token_id", "pad_token_id") if d[k] is not None}
    (path / "generation_config.json").write_text(json.dumps(model.generation | ids, indent=2))
    if tokenizer is not None:
        tokenizer.save(path)


# === adapters: ours, what is trained, and how it becomes a plain checkpoint again =================


def replace_linears(model, make):
    """Put make(name, layer) in the place of every linear layer inside the blocks. In place."""
    for path, parent in list(model.named_modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, (nn.Linear, PackedLinear)) and name.endswith("_proj"):
                setattr(parent, name, make(f"{path}.{name}", child))
    return model


def plain_linear(like, W):
    """An nn.Linear of weight W with the bias of `like`."""
    out = nn.Linear(like.in_features, like.out_features, like.bias is not None, device="meta")
    out.weight = nn.Parameter(W)
    out.bias = like.bias
    return out


def weight_of(linear):
    """A layer's float weight; a packed one is unpacked."""
    return linear.dequantize() if isinstance(linear, PackedLinear) else linear.weight


def leaf(linear, *shape):
    """A trainable zero tensor on the layer's device, in float32 or finer: a packed layer's, or a
    frozen one's that is kept in bfloat16, is updated in float32."""
    like = next(iter(linear.state_dict().values()))
    dtype = torch.float64 if like.dtype == torch.float64 else torch.float32
    return nn.Parameter(torch.zeros(shape, dtype=dtype, device=like.device))


def full(model, generator):
    """Train every parameter."""
    return model


def adapter_state(model):
    """{name: tensor} of what a resume needs on top of the checkpoint it starts from: the trainable
    adapters, or all of a model whose layers only exist rounded. Empty if a checkpoint holds all,
    and of no model: what shard() gives to all ranks but one."""
    if model is None:
        return {}
    special = [m for m in model.modules() if hasattr(m, "merged")]
    stands_in = {id(m.weight) for m in special if hasattr(m, "stored")}         # optim.StoredLinear
    if not stands_in:
        return {k: p.detach() for k, p in model.named_parameters() if p.requires_grad and special}
    return {k: x.detach() for k, x in [*model.named_buffers(), *model.named_parameters()]
            if id(x) not in stands_in}


def swapped(model, attribute, change):
    """Put change(layer) in the place of every layer that has the attribute. In place."""
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if hasattr(child, attribute):
                setattr(parent, name, change(child))
    return model


def merge(model, device=None):
    """A plain copy of the model: adapters folded into their layers, stored weights read. device:
    where the new layers go, one by one, if not beside the others."""
    read = [m.linear.weight for m in adapters_of(model) if isinstance(m.linear, nn.Linear)]
    plain = copy.deepcopy(model, {id(W): W for W in read})     # no copy of what is only read here
    for m in plain.modules():
        if isinstance(m, Transformer):
            m.products = "float32"
    return swapped(plain, "merged", lambda layer: layer.merged().to(device) if device else
                   layer.merged()).requires_grad_()


def plain_model(model, device=None):
    """The model with its adapters merged, in a copy; one without is itself."""
    return merge(model, device) if adapters_of(model) else model


PEFT = dict(full=full)                   # what is trained: (model, generator) -> model
ADAPTERS = []                            # those that leave the model as it was: see trained


# === trained: ours, the model that a run trains, its reference, and its checkpoints ===============


def adapters_of(model):
    """A model's layers that add to a frozen one, their `linear`."""
    return [m for m in model.modules() if hasattr(m, "merged") and hasattr(m, "linear")]


def sharing(model):
    """A copy of the model without a copy of any tensor: what one is taught, the other knows."""
    return copy.deepcopy(model, {id(x): x for x in (*model.parameters(), *model.buffers())})


def load_frozen(path, c):
    """load() what does not train: layers that are stored in the dtype of the products keep it, as
    autocast would round them to it on every call."""
    thrifty = c.dtype == "bfloat16" and ranks() == 1           # FSDP2 wants one dtype a block
    model, tok = load(path, c.device, chat=c.chat, matrices=torch.bfloat16 if thrifty else None)
    return model.requires_grad_(False), tok


def open_trained(c, peft, origin, last=None, adapter=()):
    """The model that a run trains, and its tokenizer: the checkpoint `origin` and what --peft adds.
    On a resume: last, its newest checkpoint, and the adapter_state() that was saved with it."""
    if c.peft in ADAPTERS:
        model, tok = load_frozen(origin, c)
    else:
        model, tok = load(last if last and not adapter else origin, c.device, chat=c.chat)
    return with_peft(model, c, peft, adapter), tok


def reference(policy, c, origin):
    """The model that the policy started from, frozen. Of adapters it is their base, on the same
    tensors: one copy of the weights is both. Of a policy that trains whole it is another copy."""
    if not adapters_of(policy):
        return load_frozen(origin, c)[0]
    return swapped(sharing(policy), "linear", lambda layer: layer.linear)


def with_peft(model, c, peft, adapter=(), apart=0):
    """What --peft makes of a model, with the saved adapter; a scalar model's head always trains.
    apart: of two models with one seed the second's draws are others."""
    body = body_of(model)
    peft(body, torch.Generator().manual_seed(c.seed + apart))
    model.load_state_dict(dict(adapter), strict=False)
    return recomputing(model, c.recompute)


def recomputing(model, recompute):
    """The model, all of whose transformers make activations again in the backward pass, or do not.
    In place."""
    for m in model.modules():
        if isinstance(m, Transformer):
            m.recompute = recompute
    return model


def snapshot(model):
    """A copy of what trains in a model, as it is now, on the same tensors of what does not."""
    fixed = [*model.buffers(), *(p for p in model.parameters() if not p.requires_grad)]
    return copy.deepcopy(model, {id(x): x for x in fixed}).requires_grad_(False)


# === trained_folder: ours, what a run that trains leaves behind ===================================


def save_trained(model, tokenizer, path, c, origin):
    """Write what a run trains as a Hugging Face folder: whole, its adapters merged, and if it is a
    LoRA of a checkpoint its adapter's folder in it. With --merge false the adapter's folder
    alone."""
    lora = c.peft == "lora" and origin and not model.config.moe  # peft has no adapters of experts
    lora = lora and not is_adapter(origin)                       # nor of adapters
    if not (c.merge or lora):
        raise UserError("--merge false: this model's adapters have no PEFT folder (experts, or an "
                        "adapter's on another); leave --merge at true")
    if c.merge:
        save(plain_model(model, "cpu"), tokenizer, path)   # no room for it on a full GPU
    if lora:
        save_adapter(model, path / "adapter" if c.merge else path, origin)
    if not c.merge:
        tokenizer.save(path)


def is_adapter(path):
    """Whether a checkpoint is an adapter's folder."""
    return base_of(checkpoint(path)) != checkpoint(path)


def adapter_readers(c):
    """{field: (whether this run reads it, what does)} of the fields that adapters read."""
    return dict(merge=(c.peft in ADAPTERS, "--peft lora"))


def check_adapters(c, origin):
    """UserError for --merge false where no PEFT folder can hold what is trained."""
    if c.merge or c.peft not in ADAPTERS:
        return
    if c.peft != "lora" or not origin:
        raise UserError(f"--merge false --peft {c.peft}: PEFT folders hold a LoRA of a checkpoint; "
                        "leave --merge at true")
    if not origin.startswith("base:") and (peek(origin).moe or is_adapter(origin)):
        raise UserError("--merge false: PEFT folders hold no adapters of experts or of adapters; "
                        "leave --merge at true")


# === lora: 2106.09685, 2305.14314, a low-rank update beside frozen layers =========================


class LoRA(nn.Module):
    """A frozen linear layer and a low-rank update (2106.09685 eq. 3):  y = W x + (alpha / R) B A x.

    A [R, D] is Kaiming-uniform and B [F, R] zero, so that training starts from the layer as it was.
    The layer may be packed (QLoRA, 2305.14314).
    """

    def __init__(self, linear, rank, alpha, generator=None):
        super().__init__()
        self.linear, self.scale = linear.requires_grad_(False), alpha / rank
        self.A = leaf(linear, rank, linear.in_features)
        self.B = leaf(linear, linear.out_features, rank)
        bound = 1 / math.sqrt(linear.in_features)   # kaiming_uniform_, a = sqrt(5): LoRA's choice
        with torch.no_grad():
            noise = torch.rand(self.A.shape, generator=generator)
            self.A.copy_((2 * noise - 1) * bound)

    def forward(self, x):
        return self.linear(x) + self.scale * F.linear(F.linear(x, self.A), self.B)

    def merged(self):
        """The plain linear layer that computes the same; a packed one is unpacked."""
        return plain_linear(self.linear, weight_of(self.linear) + self.scale * self.B @ self.A)


def lora(model, generator, *, rank: Count = 8, alpha=0.0):
    """LoRA (2106.09685) on every linear layer inside the blocks (QLoRA, 2305.14314 §4, found all
    layers to matter). alpha 0 means 2 * rank. In place; returns the model."""
    model.requires_grad_(False)
    alpha = alpha or 2 * rank
    return replace_linears(model, lambda name, layer: LoRA(layer, rank, alpha, generator))


PEFT["lora"] = lora
ADAPTERS += ["lora"]


# === adapter_config: Hugging Face's peft, what an adapter was made for, and how ===================

ADAPTER = "adapter_config.json", "adapter_model.safetensors"
READ = set("""peft_type task_type auto_mapping base_model_name_or_path revision inference_mode r
    target_modules exclude_modules lora_alpha lora_dropout bias use_rslora modules_to_save
    init_lora_weights layers_to_transform layers_pattern rank_pattern alpha_pattern peft_version
    megatron_core qalora_group_size ensure_weight_tying""".split())
MADE_AS = dict(peft_type=("LORA",), task_type=("CAUSAL_LM", "SEQ_CLS", None), bias=("none", None),
               init_lora_weights=(True, False, None, "gaussian", "orthogonal", "eva"))


def base_of(path):
    """The folder of a checkpoint's model: the path itself, or what an adapter was made for."""
    where = path / ADAPTER[0]
    if not where.exists():
        return path
    if any(path.glob("model*.safetensors")):
        raise UserError(f"{path} holds a whole model and an adapter: move one of them away")
    name = read_json(where).get("base_model_name_or_path")
    near = [Path(str(name)), path / str(name), path.parent / Path(str(name)).name]
    for folder in near if name else []:
        if (folder / "config.json").is_file() or steps_of(folder):
            return checkpoint(folder)
    raise UserError(f"{where}: base_model_name_or_path is {name!r}, and no checkpoint is there or "
                    f"beside the adapter: write the path of its base model there")


def is_classifier(path):
    """Whether a folder is an adapter with a head to one number, which its base need not have."""
    where = path / ADAPTER[0]
    return where.exists() and read_json(where).get("task_type") == "SEQ_CLS"


def check_adapter(d, where):
    """UserError for what an adapter_config.json asks for and we do not compute."""
    expect(d, where, ("r", "lora_alpha"), r="size", lora_alpha="positive", use_rslora="flag",
           rank_pattern="object", alpha_pattern="object")
    unread = [k for k in d.keys() - READ if d[k]]
    unread += [k for k, known in MADE_AS.items() if d.get(k) not in known]
    for key in sorted(unread):
        raise UserError(f"{where}: {key} = {d[key]!r} is not supported: merge the adapter with "
                        "peft's merge_and_unload(), and save that")


def of_layer(d, key, module):
    """r or lora_alpha of a layer: the first pattern that fits the end of its name, or all's."""
    patterns = d.get(dict(r="rank_pattern", lora_alpha="alpha_pattern")[key]) or {}
    fits = (x for x in patterns if re.fullmatch(rf"(.*\.)?({x})", module))
    return patterns.get(next(fits, ""), d[key])


# === peft: 2106.09685, Hugging Face's adapter folders in and out ==================================


def attach(model, path, raw):
    """Fold an adapter's folder into the model of its base, in place; -> its own tokenizer, None if
    it has none."""
    where, d = path / ADAPTER[0], read_json(path / ADAPTER[0])
    check_adapter(d, where)
    file, like = open_weights(path / ADAPTER[1]), next(model.parameters())
    left = {key.removeprefix("base_model.model."): file.get_tensor(key).to(like)
            for key in file.keys()}
    if bad := not_finite(left):
        raise UserError(f"{path / ADAPTER[1]}: {bad} holds NaN or infinity: copy it again")
    for name, layer in list(model.named_modules()):
        theirs = hf_name(name + ".", model.config)
        A, B = (left.pop(f"{theirs}lora_{x}.weight", None) for x in "AB")
        if A is None and B is None:
            continue
        rank, alpha = (of_layer(d, key, theirs[:-1]) for key in ("r", "lora_alpha"))
        if A is None or B is None or B.shape != (layer.out_features, rank) or (
                A.shape != (rank, layer.in_features)):
            raise UserError(f"{where}: r = {rank} does not fit the tensors of {theirs[:-1]}: the "
                            "adapter is of another model, or incomplete")
        update = LoRA(layer, rank, alpha * rank ** 0.5 if d.get("use_rslora") else alpha)
        update.A.data, update.B.data = A, B
        model.set_submodule(name, update.merged())
    for name, p in model.named_parameters():                   # modules_to_save: whole
        whole = left.pop(hf_name(name, model.config), p.data)
        if whole.shape != p.shape:
            raise UserError(f"{path / ADAPTER[1]}: {name} has shape {list(whole.shape)}, in its "
                            f"base {list(p.shape)}: merge the adapter with peft, and save that")
        p.data = whole
    tied = model.config.tie_word_embeddings and not d.get("ensure_weight_tying")
    if tied and {"embed_tokens", "lm_head"} & set(d.get("modules_to_save") or ()):
        raise UserError(f"{where}: modules_to_save unties the head from the embedding, which the "
                        "base ties: merge the adapter with peft, and save that")
    if left:
        raise UserError(f"{path / ADAPTER[1]}: nothing reads the tensor {min(left)} "
                        f"({len(left)} such): the adapter is of another model")
    return read_tokenizer(path, model.config, raw) if (path / "tokenizer.json").exists() else None


def save_adapter(model, path, base):
    """Write a model's live LoRA layers as a folder that peft opens on the checkpoint `base`."""
    layers = {name: m for name, m in model.named_modules() if isinstance(m, LoRA)}
    path.mkdir(exist_ok=True)
    scalar = isinstance(model, ScalarModel)
    tensors = {"base_model.model.score.weight": model.score.weight.detach().cpu()} if scalar else {}
    for name, layer in layers.items():
        key = "base_model.model." + hf_name(name + ".", model.config)
        tensors |= {f"{key}lora_{x}.weight": getattr(layer, x).detach().cpu() for x in "AB"}
    save_file(tensors, path / ADAPTER[1], metadata={"format": "pt"})
    rank, scale = len(layer.A), layer.scale
    d = dict(peft_type="LORA", task_type="CAUSAL_LM", r=rank, lora_alpha=rank * scale, bias="none",
             base_model_name_or_path=str(checkpoint(base).resolve()), inference_mode=True,
             target_modules=sorted({name.rpartition(".")[2] for name in layers}))
    if scalar:
        d |= dict(task_type="SEQ_CLS", modules_to_save=["score"])
    (path / ADAPTER[0]).write_text(json.dumps(d, indent=2))


# === bone: 2409.15371, one matrix shared by all groups of a layer's inputs ========================


class Bone(nn.Module):
    """Block affine adaptation, rows (Bone, 2409.15371):  y = W x + (sum over groups of R inputs) M,
    M [R, F] from 0. x is padded to whole groups; merged, Mᵀ is added to every R columns of W."""

    def __init__(self, linear, rank):
        super().__init__()
        self.linear, self.M = linear.requires_grad_(False), leaf(linear, rank, linear.out_features)

    def forward(self, x):
        R = len(self.M)
        padded = F.pad(x, (0, -x.size(-1) % R))
        folded = padded.unflatten(-1, (-1, R)).sum(-2)                                   # [..., R]
        return self.linear(x) + folded @ self.M

    def merged(self):
        """The plain linear layer that computes the same."""
        D = self.linear.in_features
        delta = self.M.T.repeat(1, -(-D // len(self.M)))[:, :D]                          # [F, D]
        return plain_linear(self.linear, weight_of(self.linear) + delta)


def bone(model, generator, *, rank: Count = 64):
    """Bone (2409.15371): one R x F matrix a layer, shared by all groups of R inputs."""
    model.requires_grad_(False)
    return replace_linears(model, lambda name, layer: Bone(layer, rank))


PEFT["bone"] = bone
ADAPTERS += ["bone"]


# === bat: 2409.15371, block affine changes guided by the weights ==================================


class Bat(nn.Module):
    """Block affine adaptation guided by the weights (Bat, 2409.15371):  block (i, j), R x R, of W
    gains W_ij M_i + M_i,  M [F/R, R, R] from 0. R must divide both sides."""

    def __init__(self, linear, rank):
        super().__init__()
        if linear.in_features % rank or linear.out_features % rank:
            raise UserError(f"--peft bat --rank {rank} must divide both sides of a "
                            f"{linear.out_features}x{linear.in_features} layer: try "
                            f"{math.gcd(linear.in_features, linear.out_features)}")
        self.linear = linear.requires_grad_(False)
        self.M = leaf(linear, linear.out_features // rank, rank, rank)

    def weight(self):
        """W + its change [F, D]."""
        W, R = weight_of(self.linear).to(self.M.dtype), self.M.size(1)
        blocks = W.unflatten(1, (-1, R)).unflatten(0, (-1, R)).transpose(1, 2)    # [F/R, D/R, R, R]
        blocks = blocks + blocks @ self.M[:, None] + self.M[:, None]
        return blocks.transpose(1, 2).reshape(W.shape)

    def forward(self, x):
        return F.linear(x, self.weight(), self.linear.bias)

    def merged(self):
        """The plain linear layer that computes the same."""
        return plain_linear(self.linear, self.weight())


def bat(model, generator, *, rank: Count = 32):
    """Bat (2409.15371): one R x R matrix every R outputs, guided by the weights; of any rank."""
    model.requires_grad_(False)
    return replace_linears(model, lambda name, layer: Bat(layer, rank))


PEFT["bat"] = bat
ADAPTERS += ["bat"]


# === hft: 2404.18466, half fine-tuning: each round freezes half of every layer ====================


def hft(model, generator):
    """Half fine-tuning (HFT, 2404.18466): each round freezes half of every layer, drawn by matrix
    kind.

    Of q, k, v, o two train; of gate, up, down two in half of the layers and one in the others (of
    all experts alike); one of the two norms. Biases and q/k norms go with their matrix; embeddings,
    head, final norm and routers always train. One run is one round.
    """
    def draw(n):
        return torch.randperm(n, generator=generator).tolist()

    L = model.config.num_hidden_layers
    more = set(draw(L)[:L // 2])
    for i, layer in enumerate(model.layers):
        parts = [(["q_proj", "k_proj", "v_proj", "o_proj"], 2),
                 (["gate_proj", "up_proj", "down_proj"], 2 if i in more else 1),
                 (["input_layernorm", "post_attention_layernorm"], 1)]
        frozen = {kinds[k] for kinds, train in parts for k in draw(len(kinds))[train:]}
        frozen |= {f"{x[0]}_norm" for x in frozen if x in ("q_proj", "k_proj")}
        for name, module in layer.named_modules():
            if name.split(".")[-1] in frozen:
                module.requires_grad_(False)
    return model


PEFT["hft"] = hft


# === ranks: 2304.11277, a model spread over torchrun's ranks; its precision =======================


def autocast(device, dtype):
    """The context that runs matmuls in `dtype` ('bfloat16', or 'float32' for none) on `device`."""
    if dtype != "bfloat16":
        return nullcontext()
    return torch.autocast(str(device).split(":")[0], torch.bfloat16)


def on_meta(x):
    """A parameter or buffer without its numbers."""
    empty = x.detach().to("meta")
    return nn.Parameter(empty, x.requires_grad) if isinstance(x, nn.Parameter) else empty


def shard(model, dtype="float32"):
    """Spread a model over torchrun's ranks with FSDP2, in place: each keeps 1/P of every
    parameter's rows and gathers a block's when it is needed (ZeRO-3). dtype bfloat16: gathered and
    computed in it, gradients reduced in float32. -> whole(), a collective call: the unsharded model
    on rank 0, else None. On one rank: the model itself, as it is.
    """
    if ranks() == 1:
        return lambda: model
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
    from torch.distributed.device_mesh import init_device_mesh  # here: they take a second to import
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
    # the final norm's output is a view, and nothing works on it in place
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
    body = body_of(model)
    mesh = init_device_mesh(body.head.device.type, (dist.get_world_size(),))
    tensors = [*model.parameters(), *model.buffers()]
    frame = copy.deepcopy(model, {id(x): on_meta(x) for x in tensors})    # without a copy of any
    policy = (MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
              if dtype == "bfloat16" else MixedPrecisionPolicy())
    for block in body.layers:
        fully_shard(block, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, mp_policy=policy)  # the embedding, a tied head and the last norm

    def whole():
        options = StateDictOptions(full_state_dict=True, cpu_offload=True)
        state = get_model_state_dict(model, options=options)
        if dist.get_rank():
            return None
        full = copy.deepcopy(frame)
        full.load_state_dict(state, assign=True)
        return full

    return whole


# === spread: ours, what a step computes, row by row, over torchrun's ranks ========================
# Every rank has the whole step's rows and makes the same draws. What is dear, a model's passes,
# each rank makes of its share of the rows, and what they come to is gathered on all.


@contextmanager
def gathered(*models):
    """Sharded models whole on every rank for a while: then ranks may make passes of different
    number and length without waiting for each other."""
    parts = [m for model in models for m in model.modules() if hasattr(m, "unshard")]
    blocks = [m for m in parts if isinstance(m, Block)]
    for m in parts:
        m.set_reshard_after_forward(False, recurse=False)
        m.unshard()
    yield
    for m in parts:
        m.set_reshard_after_forward(m in blocks, recurse=False)
        m.reshard()


def own_rows(n):
    """The numbers of this rank's share of n rows; all ranks have as many, the last row may stand
    there more than once."""
    size = -(-n // ranks())
    return torch.arange(rank() * size, (rank() + 1) * size).clamp(max=n - 1)


def from_ranks(x, n):
    """The first n of all ranks' rows, in order, of what each has of own_rows(n).   [size, …]"""
    if ranks() == 1:
        return x
    parts = [torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(ranks())]
    dist.all_gather(parts, x.contiguous())
    return torch.cat(parts)[:n]


@torch.no_grad()
def spread(says, c, *rows, models=()):
    """says() of these rows, c.micro at once, at the run's precision, over the ranks; models: those
    that it asks.   tensors [N, …] -> [N, …]"""
    mine = own_rows(len(rows[0]))
    parts = zip(*(x[mine.to(x.device)].split(c.micro) for x in rows))
    with autocast(c.device, c.dtype), gathered(*models):
        return from_ranks(torch.cat([says(*part) for part in parts]), len(rows[0]))


def logprobs(model, tokens, mask, c, temperature=0.0):
    """token_logprobs of many rows, at the run's temperature.   [N, T]"""
    def says(tokens, mask):
        return token_logprobs(model, tokens, mask, temperature=temperature or c.temperature)
    return spread(says, c, tokens, mask, models=[model])


def sequence_scores(reward_model, tokens, length, c, *prompt):
    """sequence_score of many rows.   [N]"""
    says = partial(sequence_score, reward_model)
    return spread(says, c, tokens, length, *prompt, models=[reward_model])


def critic_values(critic, tokens, mask, c):
    """token_values of many rows; 0 outside the mask.   [N, T(, K)]"""
    return spread(partial(token_values, critic), c, tokens, mask, models=[critic])


# === passes: ours, a step's rows and numbers, parted among torchrun's ranks and put together ======


def own_part(rows):
    """This rank's share of a list of rows."""
    size = -(-len(rows) // ranks())
    return rows[rank() * size:(rank() + 1) * size]


def all_parts(rows):
    """What every rank has of its own_part(), as one list."""
    if ranks() == 1:
        return rows
    boxes = [None] * ranks()
    dist.all_gather_object(boxes, rows)
    return [row for box in boxes for row in box]


def passes(rows, micro):
    """This rank's share of a step's rows [n], at most `micro` a pass: yields (rows, weight), on
    every rank as often, as their gradients meet after each. The weight is the number of ranks, over
    which FSDP2 averages; 0 for a pass that only keeps step with the others."""
    share = rows[rank()::ranks()]
    count = -(-(-(-len(rows) // ranks())) // micro)
    own = share.split(micro) if len(share) else ()
    for i, part in enumerate([*own, *[rows[:1]] * count][:count]):
        yield part, ranks() * (i * micro < len(share))


def clip_gradients(model, most):
    """Scale the gradients to a norm of at most `most` over all ranks; -> their norm before."""
    norm = clip_grad_norm_([p for p in model.parameters() if p.requires_grad], most)
    return norm.full_tensor() if hasattr(norm, "full_tensor") else norm


def summed(metrics, largest=()):
    """Each number's sum over the ranks, of `largest` the largest."""
    boxes = all_parts([dict(metrics)])
    keys = dict.fromkeys(key for box in boxes for key in box)
    out = {}
    for key in keys:
        values = [box.get(key, 0.0) for box in boxes]
        out[key] = max(values) if key in largest else sum(values)
    return out


# === memory: ours, bytes of tensors, and of what a training pass keeps for its backward ===========

def bytes_of(tensors):
    """Bytes on this rank; of tensors that share their memory once."""
    here = [x.to_local() if hasattr(x, "to_local") else x for x in tensors]      # FSDP's
    storages = [x.untyped_storage() for x in here]
    return sum({x.data_ptr(): x.nbytes() for x in storages}.values())


def kept(model, tokens):
    """Bytes that a pass of tokens [B, T] keeps for its backward, but for the model's own tensors:
    [before the first block, a block, between it and the next, …, after the last]"""
    own = (x.to_local() if hasattr(x, "to_local") else x
           for x in (*model.parameters(), *model.buffers()))
    seen, sizes = {x.untyped_storage().data_ptr() for x in own}, [0]

    def note(x):
        storage = x.untyped_storage()
        if storage.data_ptr() not in seen:
            seen.add(storage.data_ptr())
            sizes[-1] += storage.nbytes()
        return x

    def turn(*_):
        sizes.append(0)
    hooks = [hook for block in body_of(model).layers for hook in (
        block.register_forward_pre_hook(turn), block.register_forward_hook(turn))]
    says = model if isinstance(model, ScalarModel) else partial(token_logprobs, model)
    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(note, lambda x: x):
        out = says(tokens)                   # lives to the end: so no memory is seen twice
    for hook in hooks:
        hook.remove()
    del out
    return sizes


def growth(model, c):
    """What a pass keeps however long, and of a token: kept() of two short rows, a number a part.
    Draws nothing from the run's generators."""
    body, V = body_of(model), model.config.vocab_size
    recompute, body.recompute = body.recompute, False
    few, more = (min(T, model.config.max_position_embeddings // n) for T, n in ((16, 2), (48, 1)))
    with torch.random.fork_rng(devices=[]), autocast(c.device, c.dtype):
        small, large = (kept(model, torch.arange(T, device=body.head.device)[None] % V)
                        for T in (few, more))
    body.recompute = recompute
    for part in [m for m in model.modules() if hasattr(m, "reshard")]:           # FSDP's
        part.reshard()
    each = [(b - a) / (more - few) for a, b in zip(small, large)]
    return [a - few * x for a, x in zip(small, each)], each


def activations(model, measured, rows, width, recompute, dtype="float32"):
    """Bytes at the peak of a training pass of rows x width tokens: what is kept, by growth(), half
    a block again, for gradients on their way, and a chunk of the head's logits."""
    tokens, config = rows * width, model.config
    parts = [a * (ranks() == 1) + x * tokens for a, x in zip(*measured)]      # FSDP's are weights
    blocks = [x + 4 * width ** 2 * (0 < block.self_attn.window < width)        # a mask of its own
              for x, block in zip(parts[1::2], body_of(model).layers)]
    inputs = tokens * config.hidden_size * body_of(model).head.element_size()
    held = len(blocks) * inputs + max(blocks) if recompute else sum(blocks)
    packed = [m.in_features * m.out_features for m in model.modules() if hasattr(m, "dequantize")]
    return (sum(parts[::2]) + held + max(blocks) / 2 + head_scratch(model, tokens, dtype)
            + 8 * max(packed, default=0))


def head_scratch(model, tokens, dtype="float32"):
    """Bytes of what the head's log-probs of so many tokens work in: see kernels.chunks."""
    if isinstance(model, ScalarModel):
        return 0
    (V, D), path = model.head.shape, kernels.route(model.head)
    rows = tokens if path == "torch" else min(tokens, kernels.slices(tokens, V, path)[0].stop)
    size = 2 if dtype == "bfloat16" else model.head.element_size()
    again = dict(torch=3 * 4, cpu=4 * (size < 4), triton=0)[path]     # beside them, in float32
    return rows * V * (size + again) + V * D * size * (size < model.head.element_size())


# === beside: ours, what samples, checkpoints and several ranks hold beside a step =================


def gathered_bytes(model, blocks=None):
    """Bytes of what FSDP gathers on each of several ranks: of the model's embedding, and so many of
    its blocks at once (None: all, as gathered() does)."""
    def size(module):
        return 4 * sum(p.numel() for p in module.parameters())
    body = body_of(model)
    sizes = sorted(map(size, body.layers))[-blocks if blocks else None:]
    return (sum(sizes) + size(body.embed_tokens)) * (ranks() > 1)


def cache_bytes(config, rows, slots, size):
    """Keys and values of so many rows and slots, of `size` bytes a number."""
    numbers = config.num_hidden_layers * config.num_key_value_heads * config.head_dim
    return 2 * numbers * rows * slots * size


def sampling_bytes(model, work, dtype):
    """The cache, and in float32 and float64 the logits that a token is drawn from."""
    size = 2 if dtype == "bfloat16" else body_of(model).head.element_size()
    return (gathered_bytes(model) + cache_bytes(model.config, work.sampled, work.slots, size)
            + work.sampled * model.config.vocab_size * 20)


def merged_bytes(model, c):
    """What a merge() for a checkpoint holds, on the CPU: whole layers, and copies of the rest."""
    layers = [m.linear for m in adapters_of(model)]
    read = {id(layer.weight) for layer in layers if isinstance(layer, nn.Linear)}
    rest = bytes_of(x for x in (*model.parameters(), *model.buffers()) if id(x) not in read)
    whole = 4 * sum(layer.in_features * layer.out_features for layer in layers)
    return (whole + rest) * (c.merge and c.device == "cpu" and whole > 0)


# === forecast: ours, what a run will hold at its peak, by part ====================================


class Work(NamedTuple):
    """What a run does at once: its micro-batch, and the samples that it draws."""
    micro: int                   # --micro
    width: int                   # tokens of the longest row
    step: int                    # rows, or pairs, of an optimizer step on all ranks
    sides: int = 1               # sequences that one of them has
    group: int = 1               # that are never parted
    sampled: int = 0             # rows that are sampled at once
    slots: int = 0               # tokens of the longest of these, its prompt with them
    knob: str = ""               # the option that says how many are sampled
    recompute: bool = False

    def share(self):
        """A rank's rows, or pairs, of a step."""
        return -(-self.step // ranks())

    def rows(self):
        """Sequences of the largest forward pass."""
        most = min(self.micro, self.share()) // self.group * self.group
        return max(self.group, most) * self.sides

    def once(self):
        """Whether one pass has all of a step's rows."""
        return self.rows() >= self.share() * self.sides


def forecast(work, trained, frozen, measured, state, held, dtype, merged=0):
    """{part: bytes} of a run at its peak on this rank.

    trained, frozen: models, which may share tensors; measured: growth() of each that trains; state:
    bytes of the optimisers'; held: bytes that the process holds now, the models' with them; merged:
    of what is saved.
    """
    weights = bytes_of(x for m in (*trained, *frozen) for x in (*m.parameters(), *m.buffers()))
    passes = [activations(m, x, work.rows(), work.width, work.recompute, dtype)
              + gathered_bytes(m, 2) for m, x in zip(trained, measured)]
    gradients = bytes_of(p for m in trained for p in m.parameters() if p.requires_grad)
    if work.once() and len(trained) == 1:    # they come as the activations go, the head's first
        first = bytes_of(p for p in [body_of(trained[0]).head] if p.requires_grad)
        gradients = max(first, gradients - passes[0])
    return dict(process=max(0, held - weights), weights=weights, optimiser=state,
                gradients=gradients, activations=max(passes),
                cache=sampling_bytes(trained[0], work, dtype) if work.sampled else 0,
                merged=merged)


def peak_of(parts):
    """The most at once: gradients and activations live while a step is made, the cache while
    samples are, merged layers while a checkpoint is."""
    return (parts["process"] + parts["weights"] + parts["optimiser"]
            + max(parts["gradients"] + parts["activations"], parts["cache"], parts["merged"]))


# === remedies: ours, whether a run fits its device, and which settings make it fit ================


def with_lora(parts, trained, frozen, rank=8):
    """forecast()'s parts, were adapters of this rank all that trains: copies of one checkpoint are
    one then."""
    policy, *others = trained
    layers = [m for m in policy.modules() if isinstance(m, (nn.Linear, PackedLinear))]
    size = 4 * rank * sum(m.in_features + m.out_features for m in layers) * len(trained)
    shape = body_of(policy).config.hidden_size, len(body_of(policy).layers)
    copies = [m for m in (*others, *frozen)
              if shape == (m.config.hidden_size, len(body_of(m).layers))]
    spare = bytes_of(x for m in copies for x in m.parameters())
    return parts | dict(weights=parts["weights"] - spare + size, gradients=size, optimiser=2 * size)


def remedies(c, work, foretell, adapted, room):
    """[(option, peak bytes)] of what holds less, each setting alone; of --micro and of how many are
    sampled the largest that fits, and half where the run itself does.
    foretell(work) -> parts; adapted(parts) -> those of a LoRA"""
    parts, out = foretell(work), []
    peak = peak_of(parts)
    largest = partial(largest_fitting, foretell, work, room)
    if parts["cache"] > parts["gradients"] + parts["activations"]:
        n = largest("sampled", 1, work.sampled if peak > room else work.sampled // 2 + 1)
        size = peak_of(foretell(work._replace(sampled=n)))
        return [(f"{n / work.sampled:.0%} of {work.knob}", size)]
    if (now := min(work.micro, work.share())) > work.group:
        n = largest("micro", work.group, now if peak > room else now // 2 + 1)
        out += [(f"--micro {n}", peak_of(foretell(work._replace(micro=n))))]
    if not c.recompute:
        out += [("--recompute true", peak_of(foretell(work._replace(recompute=True))))]
    if c.peft == "full":
        out += [("--peft lora", peak_of(adapted(parts)))]
    return [(option, size) for option, size in out if size < 0.95 * peak] or out


def largest_fitting(foretell, work, room, field, least, now):
    """The largest of a field, a multiple of `least` below `now`, whose peak fits; else least."""
    low, high = 1, (now - 1) // least        # a larger one holds more
    while low < high:
        n = (low + high + 1) // 2
        fits = peak_of(foretell(work._replace(**{field: n * least}))) <= room
        low, high = (n, high) if fits else (low, n - 1)
    return low * least


def foresee(run, c, work, trained, frozen=(), state=0):
    """Say before step 0 what the run will hold at its peak, and if it does not fit, what would;
    what cli() answers where memory runs out all the same. state: bytes of the optimisers'."""
    run.expect_large(bytes_of(x for m in trained for x in m.state_dict().values()))
    measured = [growth(m, c) for m in trained]     # first: libraries make room for themselves
    held, room = run.memory()
    foretell = partial(forecast, trained=trained, frozen=frozen, measured=measured, state=state,
                       held=held, dtype=c.dtype, merged=merged_bytes(trained[0], c))
    parts = foretell(work)
    peak = peak_of(parts)
    found = remedies(c, work, foretell, partial(with_lora, trained=trained, frozen=frozen), room)
    words = ", ".join(f"{option} needs about {size / 1e9:.2f} GB" for option, size in found)
    there = f", of {room / 1e9:.1f} GB" * (room < math.inf)
    run.outlook(peak, f"--micro {c.micro}{there}", words)
    run.say(f"  memory: {in_words(parts)} = {peak / 1e9:.2f} GB at the peak{there}"
            + f"\n  WARNING: that may not fit: {words or 'take a smaller model'}" * (peak > room))


def in_words(parts):
    """forecast()'s parts as a sum, in GB; of those that are never there together the smaller in
    brackets."""
    size = {k: f"{k} {x / 1e9:.2f}" for k, x in parts.items()}
    apart = {f"{size['gradients']} + {size['activations']}":
             parts["gradients"] + parts["activations"]}
    apart |= {size[k]: parts[k] for k in ("cache", "merged") if parts[k]}
    first, *others = sorted(apart, key=apart.get, reverse=True)
    always = [size[k] for k in ("process", "weights", "optimiser")]
    return " + ".join([*always, first]) + "".join(f" (or {words})" for words in others)


# === many_rows: ours, rollouts joined, or part ====================================================


def rows_of(roll, where):
    """Some rows of a rollout, by their places or a bool each."""
    return Rollout(*(x[where] for x in roll[:-1]), roll.row_steps)


def joined(rolls, pad):
    """Rollouts as one, padded to the widest."""
    def stack(name, fill=0):
        rows = [row for roll in rolls for row in getattr(roll, name)]
        return pad_sequence(rows, batch_first=True, padding_value=fill)
    return Rollout(stack("tokens", pad), stack("mask"), stack("logp"),
                   torch.cat([x.prompt_len for x in rolls]),
                   torch.cat([x.finished for x in rolls]), sum(x.row_steps for x in rolls))


# === stream: ours, one completion, token by token, and its text as it comes =======================


def penalised(logits, seen, penalty):
    """CTRL's repetition penalty (1909.05858 §4.1) as transformers has it: logits [1, V] of ids that
    are `seen` [V] are divided by it where positive, multiplied where negative."""
    changed = torch.where(logits > 0, logits / penalty, logits * penalty)
    return torch.where(seen, changed, logits)


@torch.no_grad()
def stream(model, prompt, max_new_tokens, temperature=1.0, top_k=0, top_p=1.0, generator=None,
           repetition_penalty=1.0):
    """Yield one completion's ids as they are sampled, from one prompt (a list of ids)."""
    room = model.config.max_position_embeddings - len(prompt)
    if room < 1:
        raise UserError(f"the prompt's {len(prompt)} tokens fill the context of "
                        f"{model.config.max_position_embeddings}: shorten it")
    device = model.head.device
    cache = Cache(model.config, 1, len(prompt) + min(room, max_new_tokens), device,
                  precision(model))
    text = list(prompt)
    token = torch.tensor([text], device=device)                                          # [1, T]
    seen = torch.zeros(model.config.vocab_size, dtype=torch.bool, device=device)         # [V]
    for _ in range(min(room, max_new_tokens)):
        if cache.used == model.switch:       # longrope changes all positions: read all of it anew
            cache.used, cache.length, token = 0, 0 * cache.length, torch.tensor([text]).to(token)
        logits = model.logits(model(token, cache)[:, -1])                                # [1, V]
        if repetition_penalty != 1:
            seen[token[0]] = True
            logits = penalised(logits, seen, repetition_penalty)
        token = pick(logits, torch.rand(1, generator=generator).to(device),
                     temperature, top_k, top_p)[0][None]
        text.append(int(token))
        yield int(token)
        if int(token) in model.config.eos_token_id:
            return


def spoken(tokenizer, ids, after=()):
    """The text of ids as they come, in pieces: a character waits until all of its bytes are there,
    and what never becomes one is shown at the end. after: the ids before, which decide whether the
    first word's space is one."""
    held = list(after)[-1:]
    shown = tokenizer.decode(held)
    for token in ids:
        held.append(token)
        text = tokenizer.decode(held)
        if not text.endswith("\ufffd"):
            yield text[len(shown):]
            held, shown = held[-1:], tokenizer.decode(held[-1:])
    yield tokenizer.decode(held)[len(shown):]


# === sampling: Hugging Face, a folder's generation_config.json, and the command line's ============

SAMPLING = dict(temperature=NonNegative, top_k=NonNegative, top_p=Range("(0, 1]"),
                repetition_penalty=Positive)
IDLE = dict(min_p=0, typical_p=1, epsilon_cutoff=0, eta_cutoff=0, no_repeat_ngram_size=0, top_h=0,
            encoder_no_repeat_ngram_size=0, encoder_repetition_penalty=1, penalty_alpha=0,
            num_beams=1, guidance_scale=1, min_length=0, min_new_tokens=0, bad_words_ids=(),
            suppress_tokens=(), begin_suppress_tokens=(), forced_bos_token_id=None,
            forced_eos_token_id=None, sequence_bias=(), stop_strings=(),
            exponential_decay_length_penalty=())     # what would change a sample, and when it's off


def sampling(model, c, given):
    """How to sample, {option of stream(): value}: as the command line says, else the folder's
    generation_config.json, else the options' defaults. Says which, and what of it is not
    computed."""
    folder = {k: v for k, v in model.generation.items() if v is not None}
    if folder.get("do_sample") is True:
        folder.setdefault("temperature", 1.0)                  # transformers' own default
    values, own, new = {}, [], c.max_new
    for key, kind in SAMPLING.items():
        values[key] = getattr(c, key)
        if key in folder and key not in given:
            values[key] = cast(f"generation_config.json's {key}", folder[key], values[key], kind)
            own.append(key)
    if folder.get("do_sample") is False and "temperature" not in given:
        values["temperature"] = 0.0
        own.append("do_sample")
    if "max_new_tokens" in folder and "max_new" not in given:
        new = cast("generation_config.json's max_new_tokens", folder["max_new_tokens"], new, Count)
    lost = [f"{k} {folder[k]}" for k, off in IDLE.items()
            if folder.get(k, off) not in (off, [], {})]
    print(", ".join(f"{k} {v:g}" for k, v in values.items())
          + f" ({', '.join(own)}: the folder's)" * bool(own)
          + f"; the folder's {', '.join(lost)}: not computed here" * bool(lost), file=sys.stderr)
    return values | dict(max_new_tokens=new)


# === chat: ours, a conversation in the terminal ===================================================

COMMANDS = "/reset forgets all, Ctrl-C stops an answer, /exit or Ctrl-D ends"


def reply(model, tokenizer, ids, how, tokens, after=()):
    """Print a completion as it is made; its ids go to the list `tokens`."""
    def visible():
        for token in stream(model, ids, **how):
            tokens.append(token)
            if token not in model.config.eos_token_id:
                yield token

    for piece in spoken(tokenizer, visible(), after):
        print(piece, end="", flush=True)


def why_ended(model, tokens, ids):
    """What to say after an answer that did not end by itself."""
    if tokens and tokens[-1] in model.config.eos_token_id:
        return ""
    context = model.config.max_position_embeddings
    return (f"[the context of {context} tokens is full]" if len(ids) + len(tokens) >= context else
            f"[cut after {len(tokens)} tokens: --max_new]")


def remembered(tokenizer, messages, room):
    """The newest turns of a conversation that fit into `room` tokens, and the system message:
    messages, ids."""
    first = int(messages[0]["role"] == "system")
    while len(ids := tokenizer.render(messages)) > room and len(messages) > first + 2:
        messages = messages[:first] + messages[first + 2:]
    return messages, ids


# === conversation: ours, a chat with its history, or lines that are continued =====================


def typed():
    """The user's lines, until /exit or the end of the input; Ctrl-C at the prompt only reminds."""
    if hasattr(sys.stdin, "reconfigure"):    # a pipe's bytes need not be UTF-8
        sys.stdin.reconfigure(errors="replace")
    while True:
        try:
            text = input("> " if sys.stdin.isatty() else "")
        except KeyboardInterrupt:
            print(f"\n{COMMANDS}", file=sys.stderr)
            continue
        except EOFError:
            return
        if text.strip() == "/exit":
            return
        if text.strip():
            yield text


def converse(model, tokenizer, c, how):
    """A chat with its history, or, where there is no chat template, lines that are continued."""
    system = [dict(role="system", content=c.system)] if c.system else []
    messages, context = list(system), model.config.max_position_embeddings
    room = context - min(how["max_new_tokens"], context // 4)
    for text in typed():
        if text.strip() == "/reset":
            messages = list(system)
            print("[forgotten]", file=sys.stderr)
            continue
        messages.append(dict(role="user", content=text))
        tokens = []
        try:
            kept, ids = (remembered(tokenizer, messages, room) if c.chat else
                         (messages, tokenizer.prompt(text)))
            if gone := (len(messages) - len(kept)) // 2:
                print(f"[the context is full without the oldest {gone} turns]", file=sys.stderr)
            reply(model, tokenizer, ids, how, tokens, () if c.chat else ids)
            messages, end = kept, why_ended(model, tokens, ids)
        except KeyboardInterrupt:
            end = "[stopped]"
        except UserError as e:               # a message too long, or none that the template takes
            print(f"error: {e}", file=sys.stderr)
            messages.pop()
            continue
        print(flush=True)
        print(end, end="\n" * bool(end), file=sys.stderr)
        answer = [i for i in tokens if i not in model.config.eos_token_id]
        messages.append(dict(role="assistant", content=tokenizer.decode(answer)))


# === talk: ours, a completion, or a conversation ==================================================


def talk(model, tokenizer, c, given):
    """Continue --prompt, or chat; without a chat template continue the lines that are typed."""
    if not isinstance(model, Transformer):
        raise UserError(f"{c.path} is a reward model: it scores texts and writes none; "
                        "give a language model, or --eval PAIRS")
    once = "prompt" in given
    c = replace(c, chat=c.chat or not once and "chat" not in given and bool(tokenizer.template))
    if c.system and not c.chat:
        raise UserError("--system: only a chat has a system message; add --chat")
    if c.chat:
        tokenizer.use_chat()
        model.config = with_ends(model.config, tokenizer)
    how = sampling(model, c, given) | dict(generator=torch.Generator().manual_seed(c.seed))
    if once:
        return complete(model, tokenizer, c, how)
    plain = "no chat template, " * (not tokenizer.template) + "each line is continued as it stands"
    print(f"{c.path}: {'chat' if c.chat else plain}; {COMMANDS}", file=sys.stderr)
    converse(model, tokenizer, c, how)


def complete(model, tokenizer, c, how):
    """--prompt: print a sample as it is made, then tokens/s and the floor."""
    messages = [dict(role="system", content=c.system)] * bool(c.system)
    messages.append(dict(role="user", content=c.prompt))
    ids = tokenizer.render(messages) if c.chat else tokenizer.prompt(c.prompt)
    if not ids:
        raise UserError("this tokenizer has no beginning-of-text token: give a --prompt")
    print(c.prompt, end="\n" * c.chat, flush=True)
    tokens, begin = [], time.perf_counter()
    reply(model, tokenizer, ids, how, tokens, () if c.chat else ids)
    print(flush=True)
    print(why_ended(model, tokens, ids), file=sys.stderr)
    rate = len(tokens) / (time.perf_counter() - begin)
    size, speed = sum(x.nbytes for x in model.state_dict().values()), bandwidth(c.device)
    floor = speed / size
    print(f"{len(tokens)} tokens, {rate:.0f} tokens/s: {rate / floor:.1%} of the {floor:.0f} that "
          f"reading {size / 1e6:.1f} MB of weights per token at {speed / 1e9:.0f} GB/s would allow",
          file=sys.stderr)


# === evaluate: 1609.07843, the perplexity of a whole text, in stated windows ======================

from tqdm import trange  # what this chapter and the next two read, and no other

from data import prefs, tasks
from data.stats import accuracy
from data.text import framed, is_corpus, locate, read_jsonl, read_text


def windows(n, context, stride):
    """Windows of n tokens as (begin, first, end): first..end are scored, each token once, given
    those since begin. A file's first token has none before it; nor has, if the stride is the
    context, any window's first: those are not scored."""
    out, done = [], 1
    for begin in range(0, n, stride):
        end = min(begin + context, n)
        if (first := max(done, begin + 1)) < end:
            out.append((begin, first, end))
        if end == n:
            break
        done = end
    return out


def texts_of(path):
    """The documents of a text: between <|endoftext|>, or the rows of a .jsonl with {"text"}."""
    file = locate(path)
    if file.suffix == ".jsonl":
        texts = [row.get("text") for row in read_jsonl(file)]
        if bad := [i for i, text in enumerate(texts, 1) if not isinstance(text, str)]:
            raise UserError(f'{file}:{bad[0]}: no string under "text"')
        return texts
    return [text for text in read_text(file).split("<|endoftext|>") if text.strip()]


@torch.no_grad()
def window_nats(model, ids, rows, c):
    """The nats of each window's scored tokens, summed.   [float]"""
    nats = []
    for i in trange(0, len(rows), c.micro, desc=c.eval, disable=None, leave=False):
        batch = [(ids[a:first], ids[first:b]) for a, first, b in rows[i:i + c.micro]]
        logp = token_logprobs(model, *collate(batch, 0, model.head.device))              # [b, T]
        nats += (-logp.double().sum(1)).tolist()
    return nats


def perplexity(model, tokenizer, c, given):
    """exp of the mean nats of all scored tokens, as in transformers' documentation; of the whole
    windows alone it is GPTQ's (2210.17323), the usual number of WikiText-2."""
    first, *others = texts_of(c.eval)
    ids = tokenizer.prompt(first)
    for text in others:
        ids += [tokenizer.eos, *tokenizer.encode(text)]
    most = model.config.max_position_embeddings
    context = c.context or min(2048, most)
    stride = c.stride or context
    if not 2 <= context <= most or stride > context:
        raise UserError(f"--context {context} --stride {stride}: expected 2 to the model's {most} "
                        "tokens a window, and no stride beyond it")
    rows = windows(len(ids), context, stride)
    if not rows:
        raise UserError(f"{c.eval}: a single token cannot be predicted: give a longer text")
    nats = window_nats(model, ids, rows, c)
    scored = sum(end - first for _, first, end in rows)
    mean, size = sum(nats) / scored, sum(len(text.encode()) for text in (first, *others))
    written = len(ids) - len(tokenizer.prompt(""))             # BOS is no part of the text
    out = dict(perplexity=math.exp(mean), bits_per_byte=mean / math.log(2) * written / size,
               tokens=len(ids), scored=scored, windows=len(rows), context=context, stride=stride)
    whole = [x for x, (begin, _, end) in zip(nats, rows) if end - begin == context]
    if whole and stride == context:
        out |= dict(perplexity_of_whole_windows=math.exp(sum(whole) / len(whole) / (context - 1)))
    return out


# === evaluate_pairs: ours, how often a model tells the better response ============================


def interval(mean, n):
    """Wilson's 95 % interval of a share of n (1927).   -> [low, high]"""
    z = 1.96
    middle, spread = mean + z * z / (2 * n), math.sqrt(mean * (1 - mean) / n + (z / n / 2) ** 2)
    ends = ((middle + sign * z * spread) / (1 + z * z / n) for sign in (-1, 1))
    return [min(max(end, 0.0), 1.0) for end in ends]                     # of 0 or 1 it is rounded


def sides(model, tokenizer, rows, side, micro):
    """A reward model's scores of one side of pairs, or a language model's log-probs of it, summed
    and a token.   [N] each"""
    out = []
    for i in trange(0, len(rows), micro, desc=side, disable=None, leave=False):
        pairs = [(row["prompt"], row[side]) for row in rows[i:i + micro]]
        tokens, mask = collate(pairs, 0, next(model.parameters()).device)                # [b, T]
        length = mask.sum(1)                                                             # [b]
        if isinstance(model, ScalarModel):
            ends = torch.tensor([len(x) + len(y) for x, y in pairs], device=mask.device)
            out.append(sequence_score(model, tokens, ends)[None])
        else:
            total = token_logprobs(model, tokens, mask).sum(1)
            out.append(torch.stack([total, total / length]))
    return torch.cat(out, 1).cpu()


@torch.no_grad()
def pairs_accuracy(model, tokenizer, c, given):
    """How often the chosen response scores above the rejected one, ties a half: by a reward model's
    score, or a language model's log-prob (summed, and a token)."""
    words = {key: getattr(c, key) for key in ("system", "ask") if key in given}
    rows = [framed(row, **words) for split in ("train", "val")
            for row in prefs.load_pairs(c.eval, split)[0]]
    rows = prefs.encode_pairs(rows[:c.rows or None], tokenizer,
                              model.config.max_position_embeddings, c.eval, c.chat)
    win, lose = (sides(model, tokenizer, rows, side, c.micro) for side in ("chosen", "rejected"))
    right, *a_token = (round(accuracy(a, b), 7) for a, b in zip(win, lose))
    out = dict(accuracy=right, interval=interval(right, len(rows)), pairs=len(rows))
    return out | (dict(accuracy_a_token=a_token[0]) if a_token else {})


# === evaluate_rows: ours, the share of verifiable rows that are answered rightly ==================


@torch.no_grad()
def rows_accuracy(model, tokenizer, c, given):
    """The mean reward of a file's rows, or of a task's held-out ones: greedy, or of --samples."""
    words = {key: getattr(c, key) for key in ("system", "ask", "answer") if key in given}
    task = tasks.task(c.eval, **words)
    named = c.eval in tasks.TASKS                # of those, held-out rows; of a file all
    problems = [row for split in (("val",) if named else task.splits)
                for row in task.problems(split, c.rows or 256 * named, c.seed)]
    new = c.max_new if "max_new" in given else task.max_new
    heat = c.temperature if "temperature" in given else float(c.samples > 1)
    prompts = [(row, tokenizer.prompt(row, c.chat)) for row in problems[:c.rows or None]]
    fits = [x for x in prompts if len(x[1]) + new <= model.config.max_position_embeddings]
    if len(fits) < len(prompts):
        print(f"{c.eval}: left out {len(prompts) - len(fits)} of {len(prompts)} rows: with "
              f"--max_new {new} they do not fit the context", file=sys.stderr)
    if not fits:
        raise UserError(f"{c.eval}: no row is left to answer: lower --max_new")
    rewards, ended, generator = [], [], torch.Generator().manual_seed(c.seed)
    for i in trange(0, len(fits), c.micro, desc=c.eval, disable=None, leave=False):
        some = fits[i:i + c.micro]
        roll = generate(model, [ids for _, ids in some], new, samples=c.samples, temperature=heat,
                        top_k=c.top_k, top_p=c.top_p, generator=generator)
        texts = [tokenizer.decode(ids) for ids in roll.completions()]
        ended += roll.finished.tolist()
        for n, (text, finished) in enumerate(zip(texts, roll.finished.tolist())):
            rewards.append(task.reward(some[n // c.samples][0], text, finished))
        if i == 0:
            print(f"prompt     {tokenizer.decode(fits[0][1], False)!r}\nmodel      {texts[0]!r}\n"
                  f"reference  {task.demo(fits[0][0])!r}", file=sys.stderr)
    mean = sum(rewards) / len(rewards)
    return {task.metric: mean} | dict(
        interval=interval(mean, len(fits)), finished=sum(ended) / len(ended), rows=len(fits),
        samples=c.samples, temperature=heat, max_new=new)


def kind_of(name):
    """What --eval is given: a row of EVALUATIONS."""
    if is_corpus(name):
        return "text"
    pair = Path(name).suffix == ".jsonl" and {"chosen", "rejected"} <= read_jsonl(
        locate(name))[0].keys()
    return "pairs" if pair else "rows"


def evaluation(measure, model, tokenizer, c, given):
    """--eval: the numbers of a row of EVALUATIONS, as a line of words and one of JSON."""
    if isinstance(model, ScalarModel) and measure is not pairs_accuracy:
        raise UserError(f"--eval {c.eval}: {c.path} is a reward model, which is held to rows of "
                        "prompt, chosen and rejected")
    out = measure(model, tokenizer, c, given)
    print(f"{c.eval}: " + ", ".join(f"{k.replace('_', ' ')} {shown(v)}" for k, v in out.items()))
    print(json.dumps(dict(path=c.path, eval=c.eval) | out))


def shown(value):
    """A number, or an interval, as a person reads it."""
    if isinstance(value, list):
        return "{:.4f} to {:.4f}".format(*value)
    return f"{value:.7g}"


# by what a file holds: the function, and the options that it reads
EVALUATIONS = dict(
    text=(perplexity, ("context", "stride", "micro")),
    pairs=(pairs_accuracy, ("chat", "system", "ask", "rows", "micro")),
    rows=(rows_accuracy, ("chat", "system", "ask", "answer", "rows", "samples", "max_new",
                          "temperature", "top_k", "top_p", "seed", "micro")))


# === export: ours, a plain folder of an adapter and its base, or in fewer bits ====================


def export(model, tokenizer, c, given):
    """Write a plain folder; a smaller one in --dtype bfloat16."""
    folder = Path(c.export)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"--export {folder} exists: choose a new folder")
    save(model, tokenizer, folder, form=c.format)
    size = sum(x.stat().st_size for x in folder.iterdir())
    print(f"{folder}: {next(model.parameters()).dtype}, {size / 1e6:.1f} MB")


# === command_line: ours, talk to a checkpoint, evaluate it, export it =============================


@dataclass(frozen=True)
class Options:
    """What `python model.py FOLDER` takes, in the scripts' own words."""
    path: str = ""               # a Hugging Face folder, a PEFT adapter's, a run folder under out/
    prompt: str = ""             # a text to continue; without it, a chat
    chat: bool = False           # wrap the prompt, or what --eval asks, in the chat template
    system: str = ""             # the chat's system message, or that of what --eval asks
    ask: str = ""                # of --eval, words behind every question: how to answer
    answer: Literal["mark", "last", "boxed", "whole"] = "mark"  # of --eval: behind ####, …, all
    eval: str = ""               # a text, rows with answers, or pairs: measure the model on them
    export: str = ""             # write the model, an adapter folded in, to this new folder
    format: Literal["ours", "compressed-tensors", "dense"] = "ours"  # of --export's packed layers
    max_new: Count = 512         # at most so many new tokens
    temperature: float = 0.8     # 0 is greedy; what the folder says goes before this default,
    top_k: int = 0               # and before these: keep the k likeliest tokens, 0: all
    top_p: Range("(0, 1]") = 1.0  # keep the likeliest tokens of this total mass
    repetition_penalty: Positive = 1.0  # above 1: ids that have been there become less likely
    samples: Count = 1           # of --eval, answers a row
    rows: int = 0                # of --eval, the first so many (0: all)
    context: int = 0             # of --eval, tokens a window of a text (0: 2048, or the model's)
    stride: int = 0              # of --eval, tokens from window to window (0: the context)
    micro: Count = 8             # of --eval, rows a forward pass
    seed: int = 0                # of the sampling
    device: str = "auto"         # cpu or cuda
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"  # of the weights


RENAMED = dict(tokens="max_new", n="max_new", max_new_tokens="max_new", max_tokens="max_new",
               model="path", folder="path")


def help_of_options():
    """--help: the docstring, and every option with its default and comment."""
    about = comments_of(Options)
    return "\n".join([__doc__.strip(), "", "options (--key value or --key=value):"] + [
        f"  --{x.name:<19}{str(x.default):<9}{about[x.name]}" for x in fields(Options)])


def options(argv):
    """A command line -> (Options, the names of those that are given)."""
    kinds = {x.name: x for x in fields(Options)}
    path = [f"--path={argv.pop(0)}"] if argv and not argv[0].startswith("--") else []
    pairs = dict(parse(path + argv, {k: x.default for k, x in kinds.items()}))
    if "help" in pairs:
        print(help_of_options())
        raise SystemExit(0)
    for key in pairs.keys() - kinds.keys():
        hint = f": it is --{RENAMED[key]}" if key in RENAMED else nearest(key, kinds)
        raise UserError(f"unknown key --{key}{hint}")
    values = {k: cast(k, v, kinds[k].default, kinds[k].type) for k, v in pairs.items()}
    if not values.get("path"):
        raise UserError("which checkpoint? python model.py FOLDER --key value …; --help shows more")
    c = Options(**values)
    return replace(c, device=device_of(c.device)), values.keys() - {"path", "device", "dtype"}


def action(c, given):
    """The function that a command line asks for; UserError for an option that it does not read."""
    act, reads, what = talk, {"prompt", "chat", "system", "seed", "max_new", *SAMPLING}, "talking"
    if c.export:
        act, reads, what = export, {"export", "format"}, "--export"
    elif c.eval:
        measure, reads = EVALUATIONS[kind := kind_of(c.eval)]
        act, reads, what = partial(evaluation, measure), {"eval", *reads}, f"--eval of {kind}"
    for key in sorted(given - reads):
        raise UserError(f"--{key}: {what} does not read it; leave it out")
    return act


def main(argv=None):
    """python model.py FOLDER …: see the docstring above, or --help."""
    c, given = options(list(sys.argv[1:] if argv is None else argv))
    act = action(c, given)
    refuse_ranks("model.py")
    usual = "bfloat16" if c.device.startswith("cuda") else "float32"
    dtype = getattr(torch, usual if c.dtype == "auto" else c.dtype)
    act(*load(c.path, c.device, dtype, c.chat), c, given)


if __name__ == "__main__":
    cli(main)
