"""
formats.py - what the bytes of a packed weight mean: each format's buffers, and the weight they
stand for.

Map      1 bit streams   2 codes with scales   3 sparse   4 wrapped, coded, corrected   5 the table
Letters  W [out, in] of y = W x; b bits a code; g neighbouring inputs of a row share a scale
kind     what is stored                                            bytes of a weight [out, in]
int      b-bit codes, a float16 scale and a b-bit zero a group     out (in b/8 + 2 in/g + in/g b/8)
columns  each input column its own b, one float16 range a row      out Σb/8 + in + 4 out
mixed    groups of 2 or 4 bits; their scales are 4-bit codes too   out (Σb/8 + Σb/8g + in/2g +
in/4g) + in/g
mxfp4    E2M1 codes, a power of two for every 32 (padded)          out in 17/32
nm24     2:4 sparse: two bfloat16 of every four, 2-bit positions   1.125 out in
bitmap   any mask: a bit a weight, bfloat16 of those that stay     out in/8 + 2 kept
armor    bd(A) S bd(B), S being nm24 (ARMOR, 2510.05528)           1.125 out in + 2 (bA out + bB in)
nm24_lowrank  nm24 + B A of rank r                                 1.125 out in + 2 r (out + in)
vq       one of 2ᵇ d-vectors, norms r1, r2 (NoWag, 2504.14569)     out in/d b/8 + 2 (2ᵇ d + out +
in)

`in` is padded to whole pack units (8 codes of 3 bits, 8 columns of 2:4, d of vq), and the padding
counted. vq without norms saves 2 (out + in); an order of the inputs (kernels.PackedLinear) costs 2
in. A format is two functions: buffers(in, out, **options) -> {name: (shape, dtype)}, raising
ValueError for options that make no layer, and dense(layer) -> W float32. kernels.py multiplies
without making W where it has a kernel.
"""
import hashlib
import math

import torch
import torch.nn.functional as F

from data.numerics import mx4, mx4_dense
from data.run import UserError

# --- 1 bit streams --------------------------------------------------------------------------------


def pack_bits(codes, bits):
    """Codes [..., n] below 2^bits <= 2^16 -> little-endian bit stream, uint8 [..., ceil(n bits /
    8)]."""
    if codes.numel() and (codes.min() < 0 or codes.max() >= 1 << bits):
        raise ValueError(f"codes from {codes.min()} to {codes.max()} do not fit in {bits} bits")
    place = torch.arange(16, device=codes.device)
    flat = (codes.to(torch.int16)[..., None] >> place[:bits].to(torch.int16)
            & 1).to(torch.uint8).flatten(-2)
    flat = F.pad(flat, (0, -flat.size(-1) % 8)).unflatten(-1, (-1, 8))             # [..., bytes, 8]
    return (flat << place[:8].to(torch.uint8)).sum(-1, dtype=torch.uint8)


def unpack_bits(stream, bits, count):
    """The first `count` codes of a stream of pack_bits, int32 [..., count]."""
    if 8 % bits == 0:                                # a byte holds whole codes: stay in uint8
        place = torch.arange(0, 8, bits, device=stream.device, dtype=torch.uint8)
        return (stream[..., None] >> place & (1 << bits) - 1).flatten(-2)[..., :count].int()
    at = torch.arange(count, device=stream.device) * bits
    wide = F.pad(stream, (0, 2)).int()  # 16 bits after a shift of up to 7 lie in three bytes
    return sum(wide[..., at // 8 + i] << 8 * i for i in range(3)) >> at.int() % 8 & (1 << bits) - 1


def pack_ragged(codes, widths):
    """Codes [rows, n], column j of widths[j] bits -> a bit stream a row, uint8 [rows, ceil(Σ widths
    / 8)]."""
    column, place = ragged(widths)
    return pack_bits(codes[:, column] >> place & 1, 1)


def unpack_ragged(stream, widths):
    """The codes of pack_ragged, int32 [rows, n]; 0 for a column of no bits."""
    column, place = ragged(widths)
    bits = unpack_bits(stream, 1, len(column)) << place                           # [rows, Σ widths]
    return bits.new_zeros(len(stream), len(widths)).index_add_(1, column, bits)


def ragged(widths):
    """Of every bit of a row: its column, and its place in the column's code."""
    column = torch.arange(len(widths), device=widths.device).repeat_interleave(widths.long())
    first = widths.long().cumsum(0) - widths.long()
    return column, (torch.arange(len(column), device=widths.device) - first[column]).int()


def to_half(x, name):
    """x in float16, refusing what would become infinite."""
    if not x.half().isfinite().all():
        raise ValueError(f"{name} exceeds float16 (65504): scale the layer down before it is packed")
    return x.half()


# --- 2 codes with scales --------------------------------------------------------------------------


def quantize(W, bits, group, symmetric=False):
    """Round to nearest: W [out, in] -> codes [out, in], scale, zero [out, groups]; symmetric: zero
    is None.

    W ≈ (codes - zero) scale;  scale = (max(w, 0) - min(w, 0)) / (2^b - 1),  zero = round(-min(w, 0)
    / scale); symmetric: scale = max|w| / (2^(b-1) - 1), zero = 2^(b-1), lowest code unused. Scales
    are float16's."""
    size = W.size(1) if group < 0 else group
    w = F.pad(W.float(), (0, -W.size(1) % size)).unflatten(1, (-1, size))         # [out, groups, g]
    lo, hi, top = w.amin(-1, True).clamp(max=0), w.amax(-1, True).clamp(min=0), 2 ** bits - 1
    if symmetric:
        lo, hi, top = -torch.maximum(-lo, hi), torch.maximum(-lo, hi), 2 ** bits - 2
    scale = torch.where(hi == lo, 2.0, hi - lo) / top
    scale = to_half(scale, "a scale").float().clamp(min=2 ** -24)
    zero = (torch.full_like(scale, 2 ** (bits - 1)) if symmetric
            else (-lo / scale).round().clamp(0, 2 ** bits - 1))                   # [out, groups, 1]
    codes = ((w / scale).round() + zero).clamp(1 if symmetric else 0, 2 ** bits - 1).int()
    return (codes.flatten(1)[:, :W.size(1)], scale.squeeze(-1),
            None if symmetric else zero.squeeze(-1).int())


INT_UNIT = {2: 4, 3: 8, 4: 2, 8: 1}                  # codes that fill whole bytes


def check_bits(bits, group):
    """UserError for what the format does not hold."""
    if bits not in INT_UNIT or group == 0:
        raise UserError(f"--bits {bits} --group {group}: 2, 3, 4 or 8 bits, a group of inputs (-1: the row)")


def int_buffers(inputs, out, *, bits, group, symmetric):
    if bits not in INT_UNIT or group < 1 or group < inputs and group % INT_UNIT[bits]:
        raise ValueError(f"int needs bits of 2, 3, 4 or 8 and groups of whole pack units "
                         f"({INT_UNIT.get(bits, 8)} columns), not bits {bits!r}, group {group}")
    groups, unit = -(-inputs // group), INT_UNIT[bits]
    zero = {} if symmetric else dict(zero=((out, -(-groups * bits // 8)), torch.uint8))
    return dict(codes=((out, -(-inputs // unit) * unit * bits // 8), torch.uint8),
                scale=((out, groups), torch.float16)) | zero


def int_dense(m):
    codes = unpack_bits(m.codes, m.bits, m.in_features).float()                          # [out, in]
    zero = 2 ** (m.bits - 1) if m.symmetric else unpack_bits(m.zero, m.bits,
                                                             m.scale.size(1)).float()
    scale, zero = (x.repeat_interleave(m.group, 1)[:, :m.in_features] if torch.is_tensor(x) else x
                   for x in (m.scale.float(), zero))
    return (codes - zero) * scale


def columns_buffers(inputs, out, *, total):
    if not 0 <= total <= 8 * inputs:
        raise ValueError(f"columns of 0 to 8 bits cannot have {total} together")
    return dict(codes=((out, -(-total // 8)), torch.uint8), width=((inputs,), torch.uint8),
                lo=((out,), torch.float16), hi=((out,), torch.float16))


def column_scale(lo, hi, levels):
    """Scale and zero [out, in] of columns with so many levels: (q - zero) scale, zero =
    round(-lo/scale)."""
    scale = (hi - lo).clamp(min=2 ** -24)[:, None] / (levels - 1).clamp(min=1)
    return scale, (-lo[:, None] / scale).round()


def columns_dense(m):
    levels = 2.0 ** m.width.float()
    scale, zero = column_scale(m.lo.float(), m.hi.float(), levels)
    return (unpack_ragged(m.codes, m.width).float() - zero) * scale * (m.width > 0)


def columns_state(codes, width, lo, hi):
    """Codes [out, in] of width[j] bits in column j, a row's range lo, hi [out] -> (options,
    buffers)."""
    return dict(kind="columns", total=int(width.sum())), dict(
        codes=pack_ragged(codes, width), width=width.to(torch.uint8), lo=to_half(lo, "a weight"),
        hi=to_half(hi, "a weight"))


def mixed_buffers(inputs, out, *, group, wide):
    groups = inputs // group if group > 0 and inputs % group == 0 else 0
    if not 0 <= wide <= groups or groups == 0:
        raise ValueError(f"{inputs} inputs are no whole groups of {group}, or {wide} of them cannot be wide")
    total = 2 * groups + 2 * wide                                # bits of one code of every group
    return dict(codes=((out, -(-total * group // 8)), torch.uint8),
                zero=((out, -(-total // 8)), torch.uint8),
                width=((groups,), torch.uint8), scale=((out, -(-groups // 2)), torch.uint8),
                second=((out, -(-groups // 16), 2), torch.float16))


def mixed_dense(m):
    groups = len(m.width)
    step = m.second.float().repeat_interleave(16, 1)[:, :groups]                  # [out, groups, 2]
    scale = step[..., 0] + unpack_bits(m.scale, 4, groups).float() * step[..., 1]    # [out, groups]
    zero = unpack_ragged(m.zero, m.width).float()
    codes = unpack_ragged(m.codes, m.width.repeat_interleave(m.group)).float()
    scale, zero = (x.repeat_interleave(m.group, 1) for x in (scale, zero))
    return (codes - zero) * scale


def second_order(scale):
    """Scales [out, groups] as 4-bit codes, a float16 minimum and step for 16 groups. -> codes,
    [out, ., 2]"""
    part = F.pad(scale, (0, -scale.size(1) % 16), mode="replicate").unflatten(1, (-1, 16))
    lo = to_half(part.amin(-1), "a scale")
    step = to_half((part.amax(-1) - lo.float()) / 15, "a scale").float().clamp(min=2 ** -24)
    codes = ((part - lo.float()[..., None]) / step[..., None]).round().clamp(0, 15).int()
    return codes.flatten(1)[:, :scale.size(1)], torch.stack([lo, step.half()], -1)


def mixed_state(W, wide, group):
    """W [out, in], wide [groups] bool: those of 4 bits -> (options, buffers), rounded to
    nearest."""
    width = 2 + 2 * wide.to(torch.uint8)                                                 # [groups]
    w, top = W.unflatten(1, (-1, group)), (2.0 ** width.float() - 1)              # [out, groups, g]
    lo, hi = w.amin(-1).clamp(max=0), w.amax(-1).clamp(min=0)
    real = torch.where(hi == lo, math.inf, hi - lo) / top  # a group of zeros takes what others have
    real = torch.minimum(real, real.nan_to_num(posinf=0).amax(1, keepdim=True).clamp(min=1e-6))
    scale, second = second_order(real)
    step = second.float().repeat_interleave(16, 1)[:, :len(width)]
    real = (step[..., 0] + scale.float() * step[..., 1]).clamp(min=2 ** -24)         # [out, groups]
    zero = torch.minimum((-lo / real).round().clamp(min=0), top)
    codes = torch.minimum(((w / real[..., None]).round() + zero[..., None]).clamp(min=0),
                          top[:, None])
    return dict(kind="mixed", group=group, wide=int(wide.sum())), dict(
        codes=pack_ragged(codes.flatten(1).int(), width.repeat_interleave(group)),
        zero=pack_ragged(zero.int(), width), width=width, scale=pack_bits(scale, 4), second=second)


def mxfp4_buffers(inputs, out):
    groups = -(-inputs // 32)
    return dict(codes=((out, groups * 16), torch.uint8), exponent=((out, groups), torch.uint8))


def mxfp4_dense(m):
    codes = unpack_bits(m.codes, 4, m.codes.size(1) * 2)
    return mx4_dense(codes, m.exponent.int() - 127)[:, :m.in_features]


def mxfp4_state(W):
    """W [out, in] rounded to nearest in MXFP4 -> (options, buffers)."""
    codes, exponent = mx4(F.pad(W, (0, -W.size(1) % 32)))
    exponent = (exponent.int() + 127).to(torch.uint8)
    return dict(kind="mxfp4"), dict(codes=pack_bits(codes, 4), exponent=exponent)


# --- 3 sparse -------------------------------------------------------------------------------------



def nm24_buffers(inputs, out):
    groups = -(-inputs // 8) * 2
    return dict(values=((out, groups * 2), torch.bfloat16), index=((out, groups // 2), torch.uint8))


def nm24_dense(m):
    where = unpack_bits(m.index, 2, m.values.size(1)).view(m.out_features, -1, 2).long()
    W = torch.zeros(*where.shape[:2], 4, device=where.device)                     # [out, groups, 4]
    return W.scatter_(2, where, m.values.float().view(where.shape)).flatten(1)[:, :m.in_features]


def nm24_state(W):
    """Dense 2:4 weight [out, in] -> values, index: of every 4 columns the 2 non-zero ones, in
    order."""
    groups = F.pad(W, (0, -W.size(1) % 8)).unflatten(1, (-1, 4))                  # [out, groups, 4]
    bad = ((groups != 0).sum(-1) > 2).nonzero()
    if len(bad):
        row, column = bad[0, 0].item(), 4 * bad[0, 1].item()
        raise ValueError(f"row {row}, columns {column} to {column + 3} hold more than two non-zero weights: "
                         "prune the layer to 2:4 before it is packed")
    where = (groups == 0).byte().argsort(stable=True, dim=-1)[...,  # [out, groups, 2]
                                                              :2].sort(-1).values
    return dict(values=groups.gather(2, where).flatten(1).bfloat16(),
                index=pack_bits(where.flatten(1), 2))


def bitmap_buffers(inputs, out, *, kept):
    if not 0 <= kept <= inputs * out:
        raise ValueError(f"a weight of {out} x {inputs} cannot keep {kept}")
    return dict(mask=((out, -(-inputs // 8)), torch.uint8), values=((kept,), torch.bfloat16))


def bitmap_dense(m):
    mask = unpack_bits(m.mask, 1, m.in_features).bool()                                  # [out, in]
    return torch.zeros(mask.shape, device=mask.device).masked_scatter_(mask, m.values.float())


def bitmap_state(W):
    """W [out, in] with zeros -> (options, buffers)."""
    values = W[W != 0].bfloat16()
    return dict(kind="bitmap", kept=len(values)), dict(mask=pack_bits((W != 0).int(), 1),
                                                       values=values)


# --- 4 wrapped, coded, corrected ------------------------------------------------------------------



def armor_buffers(inputs, out, *, block_out, block_in):
    if min(block_out, block_in) < 1 or out % block_out or inputs % block_in:
        raise ValueError(f"blocks of {block_out} x {block_in} do not tile a weight of {out} x {inputs}")
    return dict(A=((out // block_out, block_out, block_out), torch.bfloat16),
                B=((inputs // block_in, block_in, block_in), torch.bfloat16),
                **nm24_buffers(inputs, out))


def armor_dense(m):
    S = nm24_dense(m).view(len(m.A), m.block_out, len(m.B), m.block_in)
    return torch.einsum("pij,pjqk,qkl->piql", m.A.float(), S, m.B.float()).reshape(m.out_features,
                                                                                   -1)


def vq_buffers(inputs, out, *, bits, dim, norms=True):
    if not 1 <= bits <= 16 or dim < 1:
        raise ValueError(f"vq needs 1 to 16 bits and a dim of at least 1, not bits {bits}, dim {dim}")
    return dict(codebook=((2 ** bits, dim), torch.bfloat16),  # the index stream runs on across rows
                index=((-(-out * -(-inputs // dim) * bits // 8),), torch.uint8),
                **(dict(r1=((inputs,), torch.float16), r2=((out,), torch.float16)) if norms
                   else {}))


def vq_dense(m):
    units = -(-m.in_features // m.dim)
    index = unpack_bits(m.index, m.bits, m.out_features * units).view(m.out_features, units)
    W = m.codebook.float()[index].flatten(1)[:, :m.in_features]                          # [out, in]
    return m.r2.float()[:, None] * W * m.r1.float() if hasattr(m, "r1") else W


def nm24_lowrank_buffers(inputs, out, *, rank):
    if rank < 1:
        raise ValueError(f"a correction of rank {rank}: at least 1")
    return nm24_buffers(inputs, out) | dict(left=((out, rank), torch.bfloat16),
                                            right=((rank, inputs), torch.bfloat16))


def nm24_lowrank_dense(m):
    return nm24_dense(m) + m.left.float() @ m.right.float()


# --- 5 the table ----------------------------------------------------------------------------------

FORMATS = dict(
    int=(int_buffers, int_dense), columns=(columns_buffers, columns_dense),
    mixed=(mixed_buffers, mixed_dense), mxfp4=(mxfp4_buffers, mxfp4_dense),
    nm24=(nm24_buffers, nm24_dense), bitmap=(bitmap_buffers, bitmap_dense),
    armor=(armor_buffers, armor_dense), nm24_lowrank=(nm24_lowrank_buffers, nm24_lowrank_dense),
    vq=(vq_buffers, vq_dense))
