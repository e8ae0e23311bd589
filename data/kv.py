"""
kv.py - smaller caches of keys and values: packed codes (KIVI), and fewer tokens (Locret and its
baselines).

    generate(model, prompts, 64, cache=kivi(bits=2))             # both stand in for model.Cache
    heads = train_heads(model, windows, steps=300)               # one small head a layer, the model
    frozen generate(model, prompts, 64, cache=locret(model, heads, budget=64))
    loss, size = cached_nll(model, windows, 256, kivi())         # nats a token, stored bytes a
    token

Map      1 codes   2 KIVI   3 eviction   4 retaining heads   5 evaluate
Letters  B rows, T tokens, H heads (K for keys and values), G = H / K, S slots, L layers, g group, R
window

    kivi       2402.02750      keys in groups of a channel, values in groups of a token, the newest
    left alone
    integer    -               both in groups of a token, no window: the baseline
    locret     2410.01805      a trained head says which tokens stay; random, recency, attention:
    baselines
Watch    bytes a token beside every loss: with small heads, scales and lows outweigh the codes. On
running
         text recency is the baseline to beat: what was said last is what the next token needs.
"""
import math
import weakref
from typing import Literal

import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

from data.run import Count, UserError, nearest

# --- 1 codes --------------------------------------------------------------------------------------


def quantize(x, bits):
    """x [..., g] -> codes, uint8 [..., g bits / 8], first in the lowest bits; scale, low [...] in
    x's dtype.

    low = min, scale = (max - min) / (2^bits - 1), q = round((x - low) / scale): KIVI, 2402.02750.
    A constant group has scale 1 and codes 0, so it comes back exact.
    """
    most, wide = 2 ** bits - 1, torch.promote_types(x.dtype, torch.float32)
    low, high = x.aminmax(dim=-1)
    scale = ((high.to(wide) - low.to(wide)) / most).to(x.dtype)
    scale = torch.where(scale > 0, scale, 1)
    q = (x.to(wide) - low[..., None].to(wide)) / scale[..., None].to(wide)
    q = q.round().clamp(0, most).to(torch.uint8).unflatten(-1,
                                                           (-1, 8 // bits))    # [..., bytes, codes]
    place = torch.arange(0, 8, bits, device=x.device, dtype=torch.uint8)
    return (q << place).sum(-1, dtype=torch.uint8), scale, low


def dequantize(codes, scale, low, bits):
    """quantize's inverse, up to half a scale:  q scale + low.   -> [..., g] in scale's dtype"""
    place = torch.arange(0, 8, bits, device=codes.device, dtype=torch.uint8)
    q = (codes[..., None] >> place & 2 ** bits - 1).flatten(-2)                          # [..., g]
    wide = torch.promote_types(scale.dtype, torch.float32)
    return torch.addcmul(low[..., None].to(wide), q.to(wide),
                         scale[..., None].to(wide)).to(scale.dtype)


def by_channel(x, g):
    """x [B, T, K, hd] -> [B, T/g, K, hd, g]: g consecutive tokens of a channel are a group."""
    return x.unflatten(1, (-1, g)).movedim(2, -1)


def by_token(x, g):
    """x [B, T, K, hd] -> [B, T, K, hd/g, g]: g consecutive channels of a token are a group."""
    return x.unflatten(-1, (-1, g))


AXES = dict(channel=(by_channel, lambda x: x.movedim(-1, 2).flatten(1, 2)),       # and the way back
            token=(by_token, lambda x: x.flatten(-2)))

# --- 2 KIVI (2402.02750) --------------------------------------------------------------------------


class Part:
    """The keys or the values of one layer: codes of a row's older tokens, then its tail in full
    precision.

    A channel's group needs g tokens, so "channel" codes the whole tail when it is R long (g if R is
    0); "token" codes the oldest tokens of a tail longer than R. Each row does so by its own length.
    Sizes are those of the longest row, no slot more.
    """

    def __init__(self, axis, bits, group, window, shape, device, dtype):
        B, K, hd = shape
        self.axis, self.bits, self.window = axis, bits, window
        self.group = group if axis == "channel" else min(group, hd)
        if axis == "token" and (hd % self.group or self.group * bits % 8):
            raise UserError(f"a head of {hd} channels cannot be cut into groups of {self.group} whose "
                            f"{bits}-bit codes fill whole bytes: choose another group")
        self.unit = group if axis == "channel" else 1  # tokens that are coded together
        n = hd if axis == "channel" else hd // self.group            # groups of a unit and head
        self.codes = torch.zeros(B, 0, K, n, self.group * bits // 8, dtype=torch.uint8,
                                 device=device)
        self.scale, self.low = (torch.zeros(B, 0, K, n, dtype=dtype, device=device)
                                for _ in range(2))
        self.tail = torch.zeros(B, 0, K, hd, dtype=dtype, device=device)
        self.held = torch.zeros(B, dtype=torch.long, device=device)  # [B] units coded

    def due(self, length):
        """Units that are codes in a row of so many tokens.   [B] -> [B]"""
        if self.axis == "token":
            return (length - self.window).clamp(min=0)
        block = max(self.window, self.group)
        return length // block * block // self.group

    def settle(self, length):
        """Code what is due, now that rows are `length` [B] long; the tail keeps the rest."""
        due = self.due(length)
        more, old = due - self.held, self.codes.size(1)                                  # [B]
        rest = length - due * self.unit                                                  # [B]
        n, size, wide = torch.stack([more.max(), due.max(), rest.max()]).tolist()
        if n:
            split = AXES[self.axis][0](self.tail[:, :n * self.unit], self.group)   # [B, n, K, …, g]
            row, i = (torch.arange(n, device=more.device) < more[:, None]).nonzero(as_tuple=True)
            for name, new in zip(("codes", "scale", "low"), quantize(split, self.bits)):
                kept = getattr(self, name)
                kept = F.pad(kept, [0, 0] * (kept.dim() - 2) + [0, max(size - old, 0)])
                kept[row, self.held[row] + i] = new[row, i]
                setattr(self, name, kept)
        if n or wide < self.tail.size(1):  # or padding behind a short prompt
            at = (more * self.unit)[:, None] + torch.arange(wide, device=more.device)    # [B, W]
            at = at.clamp(max=max(self.tail.size(1) - 1, 0))
            self.tail = self.tail[torch.arange(len(at), device=at.device)[:, None], at]
        self.held = due

    def append(self, new, length):
        """Put new [B, T, K, hd] behind the tails of rows that were `length` [B] long."""
        at = (length - self.held * self.unit)[:, None] + torch.arange(new.size(1),
                                                                      device=new.device)
        self.tail = F.pad(self.tail, (0, 0, 0, 0, 0, new.size(1)))
        self.tail[torch.arange(len(at), device=at.device)[:, None], at] = new.to(self.tail.dtype)

    def whole(self, size):
        """The first `size` tokens of all rows, dequantised where they are codes.   [B, K, size,
        hd]"""
        slot = torch.arange(size, device=self.held.device)
        at = slot - (self.held * self.unit)[:, None]                            # [B, S] in the tail
        row = torch.arange(len(at), device=at.device)[:, None]
        tail = self.tail if self.tail.size(1) else F.pad(self.tail, (0, 0, 0, 0, 0, 1))
        out = tail[row, at.clamp(0, tail.size(1) - 1)]                               # [B, S, K, hd]
        if self.codes.size(1):
            old = AXES[self.axis][1](dequantize(self.codes, self.scale, self.low, self.bits))
            end = min(old.size(1), size)
            out[:, :end] = torch.where((at[:, :end] < 0)[..., None, None], old[:, :end],
                                       out[:, :end])
        return out.transpose(1, 2)

    def select(self, rows):
        """Row i becomes old row rows[i]."""
        for name in ("codes", "scale", "low", "tail", "held"):
            setattr(self, name, getattr(self, name)[rows])

    def nbytes(self):
        """Stored bytes: codes, scales, lows and the tail."""
        return sum(x.nbytes for x in (self.codes, self.scale, self.low, self.tail))


class Kivi:
    """model.Cache's methods over packed codes: what a layer's attention reads is made when it asks.

    A forward's own tokens, a prompt's too, are seen in full precision; they are coded when the next
    forward (or spread) begins, which knows the rows' true lengths. That is KIVI's order: attend,
    then code.
    """

    def __init__(self, make, layers, rows, device):
        self.parts = [(make(0), make(1)) for _ in range(layers)]                      # keys, values
        self.length = torch.zeros(rows, dtype=torch.long, device=device)           # [B] tokens held
        self.used, self.static = 0, False

    def at(self, T):
        """Where each row's next T tokens stand.   -> [B, T], and nothing more is needed by put."""
        return self.length[:, None] + torch.arange(T, device=self.length.device), None

    def put(self, layer, k, v, at):
        """Store k, v [B, K, T, hd]; return all keys and values of the layer so far, in full
        size."""
        out = []
        for part, new in zip(self.parts[layer], (k, v)):
            part.settle(self.length)
            part.append(new.transpose(1, 2), self.length)
            out.append(part.whole(self.used + new.size(2)))
        return out                                                              # [B, K, S, hd] each

    def settle(self):
        """Code all that is due."""
        for part in (part for pair in self.parts for part in pair):
            part.settle(self.length)

    def spread(self, rows, slots):
        """Row i becomes a copy of old row rows[i]; slots are made as they are needed."""
        self.settle()                                    # before the rows are copied
        self.keep(rows)

    def keep(self, rows):
        """Row i becomes old row rows[i], and the others go."""
        for part in (part for pair in self.parts for part in pair):
            part.select(rows)
        self.length = self.length[rows]

    def nbytes(self):
        """Stored bytes of all layers, after the last token was coded if it is due."""
        self.settle()
        return sum(part.nbytes() for pair in self.parts for part in pair)


def kivi(*, bits=2, group=32, window=32, keys="channel", values="token"):
    """KIVI, 2402.02750: `bits`-bit codes, a scale and a low per group, the newest tokens left
    alone. -> what makes the cache, for generate(cache=…).

    group: g tokens of a channel, or g channels of a token (all of a smaller head). window: R, a
    multiple of g; the authors' demonstration has 32, their main tables 128 (unverified). keys,
    values: the groups' axis.
    """
    if bits not in (1, 2, 4, 8):
        raise UserError(f"{bits} bits do not pack into bytes: choose 1, 2, 4 or 8")
    if group < 1 or window < 0 or window % group or group * bits % 8:
        raise UserError(f"window {window} and group {group}: the window must be a multiple of the group, and "
                        f"a group of {bits}-bit codes must fill whole bytes")
    for axis in (keys, values):
        if axis not in AXES:
            raise UserError(f"no axis {axis!r}{nearest(axis, AXES)}")

    def make(config, rows, slots, device, dtype):
        shape = rows, config.num_key_value_heads, config.head_dim
        return Kivi(lambda i: Part((keys, values)[i], bits, group, window, shape, device, dtype),
                    config.num_hidden_layers, rows, device)
    return make


def integer(*, bits=8, group=32):
    """Groups of a token for both, no window: the plain baseline for KIVI."""
    return kivi(bits=bits, group=group, window=0, keys="token", values="token")


def kivi_bytes(length, hd, itemsize, *, bits=2, group=32, window=32, keys="channel",
               values="token"):
    """Bytes of one row's keys and values in a layer's head at `length` tokens: what nbytes() adds
    up."""
    total = 0
    for axis in (keys, values):
        block, g = (max(window, group), group) if axis == "channel" else (1, min(group, hd))
        coded = length // block * block if axis == "channel" else max(length - window, 0)
        total += coded * hd * bits // 8 + coded * hd // g * 2 * itemsize + (length
                                                                            - coded) * hd * itemsize
    return total


# --- 3 eviction: fewer tokens, each head its own --------------------------------------------------


def watch(model, see):
    """Call see(layer, attention, seen, where) after every block's attention; -> handles to remove.

    seen: its projections q, k, v [B, T, …], before norms and RoPE; where: what attention was called
    with, (x, cos, sin, cache, layer, at, visible).
    """
    handles = []
    for block in model.layers:
        seen = {}
        for name in "qkv":
            def note(module, args, out, seen=seen, name=name):
                seen[name] = out
            handles.append(getattr(block.self_attn, f"{name}_proj").register_forward_hook(note))

        def tell(module, args, out, seen=seen):
            see(args[4], module, seen, args)
            seen.clear()
        handles.append(block.self_attn.register_forward_hook(tell))
    return handles


def rotated(attention, x, norm, cos, sin):
    """A projection [B, T, H hd] as attention uses it: by heads, normed where the model does, turned
    by RoPE. -> [B, H, T, hd]"""
    x = x.unflatten(-1, (-1, attention.hd))                                          # [B, T, H, hd]
    x = (getattr(attention, norm)(x) if attention.qk_norm else x).transpose(1, 2)
    a, b = x.to(torch.promote_types(x.dtype, torch.float32)).chunk(2, -1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)


def retained(score, length, budget, protect):
    """Which slots stay: the `budget` best of every row and head, in the order of their positions.

    score [L, B, K, S], length [B] -> slots [L, B, K, m], and how many of them are a row's own [B].
    The last `protect` slots of a row always stay.
    """
    slot, n = torch.arange(score.size(-1), device=score.device), length[:, None,
                                                                        None]       # [S], [B, 1, 1]
    score = score.masked_fill(slot >= n - protect, math.inf).masked_fill(slot >= n, -math.inf)
    count = length.clamp(max=budget)
    rank = score.argsort(dim=-1, descending=True, stable=True).argsort(-1)
    order = torch.where(rank < count[:, None, None], slot, len(slot) + slot)          # [L, B, K, S]
    return order.argsort(-1)[..., :int(count.max())], count


# A score says what a new token is worth to each key head: [B, K, T], the largest stays. It never
# changes, but for the sums of attention.


def by_head(cache, layer, attention, seen, where):
    """Locret, 2410.01805: the retaining head's prediction."""
    return cache.heads[layer](joined(seen)).mT


def by_recency(cache, layer, attention, seen, where):
    """The position: a sliding window without sinks."""
    T = seen["k"].size(1)
    at = cache.base + cache.gone                                                         # [B]
    return (at[:, None]
            + torch.arange(T, device=at.device)).float()[:, None].expand(-1, cache.k.size(2), -1)


def by_chance(cache, layer, attention, seen, where):
    """A random number, kept: what stays is a uniform sample."""
    B, T = seen["k"].shape[:2]
    return torch.rand(B, cache.k.size(2), T, generator=cache.generator).to(cache.k.device)


def by_attention(cache, layer, attention, seen, where):
    """After H2O (2306.14048): all attention received so far. The sum waits for the rows' lengths
    (absorb)."""
    cache.pending[layer] = rotated(attention, seen["q"], "q_norm", *where[1:3])
    return torch.zeros(len(cache.base), cache.k.size(2), seen["k"].size(1), device=cache.k.device)


SCORES = dict(locret=by_head, recency=by_recency, random=by_chance, attention=by_attention)


class Evicting:
    """model.Cache's methods over the slots that stay; each key head has its own, a row's heads
    equally many.

    length counts slots, positions run on: keys keep the RoPE phase of where they stood. Tokens are
    scored while the prompt is read, by hooks on the model, and evicted by evict() and spread();
    what is decoded afterwards stays.
    """

    def __init__(self, model, heads, score, budget, stabilizers, local, seed, config, rows, device,
                 dtype):
        self.heads, self.rule, self.budget = heads, score, budget
        self.stabilizers, self.local = stabilizers, local
        self.generator, self.limit = torch.Generator().manual_seed(seed), config.max_position_embeddings
        shape = config.num_hidden_layers, rows, config.num_key_value_heads, 0
        self.k, self.v = (torch.zeros(*shape, config.head_dim, device=device, dtype=dtype)
                          for _ in range(2))
        self.score = torch.zeros(shape, device=device)                                # [L, B, K, S]
        self.length, self.gone = (torch.zeros(rows, dtype=torch.long, device=device)
                                  for _ in range(2))
        self.used, self.most, self.static = 0, 0, False  # most: the largest of gone, known to the host
        self.base, self.pending, self.blind = self.length, {}, True
        me = weakref.ref(self)  # the hooks go with the cache, whatever happens

        def see(layer, attention, seen, where):
            if (cache := me()) is not None and where[3] is cache:
                new = SCORES[cache.rule](cache, layer, attention, seen, where).float()   # [B, K, T]
                cache.score[layer].view(-1).index_copy_(0, where[5], new.flatten())
                cache.blind = False
        self.release = weakref.finalize(self, lambda hooks: [h.remove()
                                                             for h in hooks], watch(model, see))

    def room(self, slots):
        """Make it `slots` slots in all, if it has fewer."""
        more = max(slots - self.k.size(3), 0)
        self.k, self.v = (F.pad(x, (0, 0, 0, more)) for x in (self.k, self.v))
        self.score = F.pad(self.score, (0, more))

    def at(self, T):
        """Positions [B, T] of each row's next T tokens, and rows [B K T] of a layer's [B K S,
        hd]."""
        if self.used + self.most + T > self.limit:
            raise UserError(f"{self.used + self.most + T} tokens exceed the model's context of {self.limit}: "
                            "evicted tokens keep their positions; shorten the text")
        self.absorb()
        if self.used + T > self.k.size(3):
            self.room(self.used + T)
        (B, K, S), device, self.base = self.k.shape[1:4], self.k.device, self.length.clone()
        slots = self.length[:, None] + torch.arange(T, device=device)                    # [B, T]
        first = torch.arange(0, B * K * S, S, device=device).view(B, K, 1)
        return slots + self.gone[:, None], (first + slots[:, None]).flatten()

    def put(self, layer, k, v, at):
        """Store k, v [B, K, T, hd] there; return all keys and values of the layer that are left."""
        for cache, new in ((self.k, k), (self.v, v)):
            cache[layer].view(-1, cache.size(-1)).index_copy_(0, at,
                                                              new.to(cache.dtype).flatten(0, 2))
        end = self.used + k.size(2)
        return self.k[layer, :, :, :end], self.v[layer, :, :, :end]                  # [B, K, S, hd]

    def absorb(self):
        """Add the attention that the last forward's queries paid to every slot; a row's padding
        pays none."""
        for layer, q in self.pending.items():
            B, H, T, hd = q.shape
            k = self.k[layer, :, :, :self.used].float()                              # [B, K, S, hd]
            slot, own = (torch.arange(n, device=q.device) for n in (k.size(2), T))
            own = self.base[:, None] + own                                      # [B, T] their slots
            logit = (q.reshape(B, k.size(1), -1, hd) @ k.mT / hd ** 0.5).unflatten(2, (-1, T))
            logit = logit.masked_fill(slot > own[:, None, None, :, None],
                                      -math.inf)                                   # [B, K, G, T, S]
            paid = logit.softmax(-1) * (own < self.length[:, None])[:, None, None, :, None]
            self.score[layer, :, :, :self.used] += paid.sum((2, 3))
        self.pending = {}

    def evict(self, budget, protect=0):
        """Keep each row's and head's `budget` best slots, its last `protect` among them."""
        self.absorb()
        if self.used > budget:
            if self.blind:
                raise UserError("no token of this cache was scored: it was made for another model")
            slots, count = retained(self.score[..., :self.used], self.length, budget, protect)
            wide = slots[..., None].expand(-1, -1, -1, -1, self.k.size(-1))
            self.k, self.v = self.k.gather(3, wide), self.v.gather(3, wide)
            self.score = self.score.gather(3, slots)
            self.gone = self.gone + self.length - count
            self.length, self.used, self.most = count, slots.size(-1), int(self.gone.max())

    def spread(self, rows, slots):
        """The prompts are read: evict, then row i becomes a copy of old row rows[i], with more
        slots."""
        self.evict(self.budget + self.local, self.local)
        self.release()
        self.keep(rows)
        self.score = self.score[..., :0].clone()         # nothing is evicted any more
        self.k, self.v = (F.pad(x[:, :, :, :self.used], (0, 0, 0, slots)) for x in (self.k, self.v))

    def keep(self, rows):
        """Row i becomes old row rows[i], and the others go."""
        self.k, self.v, self.score = self.k[:, rows], self.v[:, rows], self.score[:, rows]
        self.length, self.gone = self.length[rows], self.gone[rows]

    def nbytes(self):
        """Stored bytes: keys, values, and the scores as long as they are needed."""
        return self.k.nbytes + self.v.nbytes + self.score.nbytes


def locret(model, heads=None, *, score="locret", budget=64, stabilizers=24, local=8, seed=0):
    """Locret, 2410.01805: of a prompt but for its last `local` tokens, a key head keeps the
    `budget` best. -> what makes the cache, for generate(cache=…): there the prompt is one chunk,
    seen whole, then evicted.

    heads: of train_heads, for score "locret". stabilizers: the newest that stay between two chunks,
    see read. score: a row of SCORES; all keep budget + local tokens. seed: of score "random".
    Defaults are ours, for contexts of a few hundred; the paper's: 6,000, 2,500 and 100, in chunks
    of 3,072.
    """
    if score not in SCORES:
        raise UserError(f"no score {score!r}{nearest(score, SCORES)}")
    if not 0 <= stabilizers <= budget or budget < 1 or local < 0:
        raise UserError(f"budget {budget}, stabilizers {stabilizers}, local {local}: the budget must hold a "
                        "token and all stabilizers, and nothing is below 0")
    if score == "locret" and (heads is None or len(heads) != model.config.num_hidden_layers):
        raise UserError("score locret needs a retaining head for every layer: make them with train_heads")

    def make(config, rows, slots, device, dtype):
        return Evicting(model, heads, score, budget, stabilizers, local, seed, config, rows,
                        device, dtype)
    return make


def read(model, tokens, cache, chunk=0):
    """Read a prompt [B, P] in chunks (0: one); a cache that evicts does so after each.   -> hidden
    [B, n, D] of the last ones.

    Locret's inference: all but the last `local` tokens in chunks, after each the best `budget`
    stay, among them the newest `stabilizers` but for the final chunk; then the local ones. At most
    budget + chunk slots.
    """
    P = tokens.size(1)
    evicts = isinstance(cache, Evicting)
    body = max(P - cache.local, 0) if evicts else P
    parts = list(tokens[:, :body].split(chunk or max(body, 1), 1)) if body else []
    for i, part in enumerate(parts):
        hidden = model(part, cache)                                                  # [B, chunk, D]
        if evicts:
            cache.evict(cache.budget, 0 if i == len(parts) - 1 else cache.stabilizers)
    return hidden if body == P else model(tokens[:, body:], cache)


# --- 4 retaining heads ----------------------------------------------------------------------------


class RetainingHead(nn.Module):
    """One layer's:  W2 silu(W1 [q; k; v])  of the projections before norms and RoPE: a score a key
    head."""

    def __init__(self, config, width, generator):
        super().__init__()
        H, K = config.num_attention_heads, config.num_key_value_heads
        self.w1 = nn.Linear((H + 2 * K) * config.head_dim, width, bias=False)
        self.w2 = nn.Linear(width, K, bias=False)
        for w in (self.w1.weight, self.w2.weight):
            nn.init.normal_(w, std=w.size(1) ** -0.5, generator=generator)

    def forward(self, c):
        """c [B, T, (H + 2K) hd] -> [B, T, K]"""
        return self.w2(F.silu(self.w1(c)))


def joined(seen):
    """watch's q, k, v -> a retaining head's input c, in float32.   [B, T, (H + 2K) hd]"""
    return torch.cat([seen[name].float() for name in "qkv"], -1)


def retaining_labels(q, k, answer):
    """Locret's labels: the largest pre-softmax logit that any query of the answer, of any query
    head of the group, has for a token of the prompt:  y = max_j max_g  q_jg . k_p / sqrt(hd).

    q [B, H, T, hd], k [B, K, T, hd], the last `answer` tokens the answer's -> [B, K, T - answer].
    """
    q = q[:, :, -answer:].reshape(len(q), k.size(1), -1, q.size(-1))                # [B, K, Ga, hd]
    return (k[:, :, :-answer] @ q.mT).amax(-1) / q.size(-1) ** 0.5


def retaining_loss(score, label, *, smooth=0.0025):
    """Locret's loss:  SmoothL1(score, label) + smooth mean (score_t - score_t+1)².   Both [B, K,
    P]."""
    return F.smooth_l1_loss(score, label) + smooth * (score.diff(dim=-1) ** 2).mean()


def overlap(score, label, *, share=0.1):
    """How much of the labels' largest tenth the scores' largest tenth holds: the number to
    watch."""
    k = max(1, int(share * label.size(-1)))
    a, b = (torch.zeros_like(label).scatter(-1, x.topk(k).indices, 1.0) for x in (score, label))
    return (a * b).sum(-1).mean().item() / k


@torch.no_grad()
def retaining_data(model, tokens, answer):
    """What the heads of all layers learn from: [(c [B, P, …], label [B, K, P])] of tokens [B, P +
    answer]."""
    out = []

    def see(layer, attention, seen, where):
        q, k = (rotated(attention, seen[n], f"{n}_norm", *where[1:3]) for n in "qk")
        out.append((joined(seen)[:, :-answer], retaining_labels(q, k, answer)))
    hooks = watch(model, see)
    try:
        model(tokens)
    finally:
        for hook in hooks:
            hook.remove()
    return out


def train_heads(model, windows, *, steps=300, lr=5e-4, width=256, answer=32, batch=8, warmup=0.1,
                smooth=0.0025, seed=0):
    """Train Locret's heads (2410.01805) on windows [N, T] of text, whose last `answer` tokens ask
    about the
    rest; the model is frozen.   -> nn.ModuleList, a RetainingHead a layer

    AdamW (0.9, 0.95), gradients clipped by value at 0.5, as in the paper; there lr 5e-4, width
    1,024, 3,000 sequences of up to 10,240 one by one, 2,000 steps of warm-up. warmup (a share),
    batch and width are ours.
    """
    if not 0 < answer < windows.size(1) - 1:
        raise UserError(f"answer {answer}: windows of {windows.size(1)} tokens need a shorter one, above 0")
    device, g = model.head.device, torch.Generator().manual_seed(seed)
    heads = nn.ModuleList(RetainingHead(model.config, width, g) for _ in model.layers).to(device)
    opt = torch.optim.AdamW(heads.parameters(), lr=lr, betas=(0.9, 0.95))
    bar = tqdm(range(steps), desc="retaining heads", disable=None, leave=False)
    for step in bar:
        rows = torch.randint(len(windows), (batch,), generator=g)
        data = retaining_data(model, windows[rows].to(device), answer)
        for group in opt.param_groups:
            group["lr"] = lr * min(1.0, (step + 1) / max(1, warmup * steps))
        with torch.enable_grad():
            scores = [head(c).mT for head, (c, _) in zip(heads, data)]              # [B, K, P] each
            losses = [retaining_loss(s, y, smooth=smooth) for s, (_, y) in zip(scores, data)]
            opt.zero_grad()
            (sum(losses) / len(losses)).backward()
        nn.utils.clip_grad_value_(heads.parameters(), 0.5)
        opt.step()
        if not bar.disable and step % 10 == 0:
            found = sum(overlap(s, y) for s, (_, y) in zip(scores, data)) / len(data)
            bar.set_postfix(loss=f"{sum(x.item() for x in losses) / len(losses):.3f}",
                            overlap=f"{found:.2f}")
    return heads.requires_grad_(False)


def coded(*, cache_bits: Literal[1, 2, 4, 8] = 2, cache_group: Count = 16, cache_window=16,
          keys: Literal["channel", "token"] = "channel",
          values: Literal["channel", "token"] = "token"):
    """KIVI (2402.02750): codes of cache_bits, keys in groups of a channel, values of a token, and
    the newest cache_window tokens as they are. Groups and windows of 16 are ours, for contexts of a
    few hundred."""
    return kivi(bits=cache_bits, group=cache_group, window=cache_window, keys=keys, values=values)


def evicting(model, tokens, *, score: Literal[*SCORES] = "locret", budget: Count = 24,
             stabilizers=8,
             local=8, head_steps: Count = 300):
    """Locret (2410.01805): of a prompt the `budget` tokens stay that small heads, trained here on
    the calibration windows, rate highest; or by score recency, random, attention. All keep budget +
    local."""
    heads = train_heads(model, tokens, steps=head_steps) if score == "locret" else None
    return locret(model, heads, score=score, budget=budget, stabilizers=stabilizers, local=local)


# --- 5 evaluate -----------------------------------------------------------------------------------


@torch.no_grad()
def cached_logp(model, windows, prefix, make, *, chunk=0, batch=32):
    """Log-probs of every token behind a prefix, each decoded through the cache.

    windows [N, T]; the first `prefix` tokens are read (in chunks, see read), the others fed one by
    one as
    they stand in the text. make: as generate's cache.   -> [N, T - prefix] float32, stored bytes a
    token
    """
    N, T = windows.shape
    if not 0 < prefix < T:
        raise UserError(f"prefix {prefix}: choose 1 to {T - 1}, for windows of {T} tokens")
    out, size = [], 0
    for tokens in tqdm(windows.split(batch), desc="decoding", disable=None, leave=False):
        tokens = tokens.to(model.head.device)
        cache = make(model.config, len(tokens), prefix, model.head.device, model.head.dtype)
        hidden = read(model, tokens[:, :prefix], cache, chunk)[:, -1]                    # [B, D]
        cache.spread(torch.arange(len(tokens), device=tokens.device), T - 1 - prefix)
        for t in range(prefix, T):
            logp = model.logits(hidden).log_softmax(-1)                                  # [B, V]
            out.append(logp.gather(1, tokens[:, t:t + 1]))
            if t < T - 1:
                hidden = model(tokens[:, t:t + 1], cache)[:, -1]
        size += cache.nbytes() if hasattr(cache, "nbytes") else cache.k.nbytes + cache.v.nbytes
    rows = torch.cat([torch.cat(out[i:i + T - prefix], 1) for i in range(0, len(out), T - prefix)])
    return rows.cpu(), size / (N * (T - 1))


def cached_nll(model, windows, prefix, make, *, chunk=0, batch=32):
    """Mean nats a token behind the prefix, and stored bytes a token: see cached_logp."""
    logp, size = cached_logp(model, windows, prefix, make, chunk=chunk, batch=batch)
    return -logp.double().mean().item(), size
