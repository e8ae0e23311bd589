"""
numerics.py - number formats and rotations, simulated exactly in float32.

    mx4(W)                                       # MXFP4: codes of 4 bits, an exponent for every 32
    rotate(x, 32)                                # block Hadamard; rotate(rotate(x, 32), 32) is x

Map      1 rotations   2 formats   3 MXFP4
Every quantiser here rounds and returns floats (mx4 its codes, too), so that a kernel has an exact
reference.
"""
import math
from functools import lru_cache

import torch
import torch.nn.functional as F

from data.run import UserError


# --- 1 rotations ----------------------------------------------------------------------------------


def wide(x):
    """x in float32, or float64 if it is that."""
    return x if x.dtype == torch.float64 else x.float()


@lru_cache(32)
def hadamard(n, dtype=torch.float32, device="cpu"):
    """Sylvester's Hadamard matrix over √n [n, n]: orthonormal and symmetric. n a power of two."""
    if n < 1 or n & (n - 1):
        raise UserError(f"a Hadamard matrix of {n} rows: take a power of two")
    H = torch.ones(1, 1, dtype=torch.float64)
    while len(H) < n:
        H = torch.cat([torch.cat([H, H], 1), torch.cat([H, -H], 1)])
    return (H / math.sqrt(n)).to(device, dtype)


def rotate(x, n):
    """x [..., d] times a block-diagonal Hadamard matrix, its blocks the largest power of two up to
    n that divides d. Its own inverse; two operands rotated alike have the same product."""
    d = x.size(-1)
    block = min(d & -d, 1 << (n.bit_length() - 1))
    return (x.unflatten(-1, (-1, block)) @ hadamard(block, x.dtype, x.device)).flatten(-2)


# --- 2 formats: symmetric quantisers, x -> x rounded ----------------------------------------------


def floor_log2(x):
    """floor(log2 |x|) of float32 or float64, exactly, from their bits; at most -127 for 0 and
    subnormals."""
    if x.dtype == torch.float64:
        return ((x.view(torch.int64) >> 52 & 2047) - 1023).int()
    return (x.view(torch.int32) >> 23 & 255) - 127


def power_of_two(e, dtype=torch.float32):
    """2^e, exactly, e whole within float32's -126 to 127: what floor_log2 says of 0 becomes
    2^-126."""
    return (e.int().clamp(-126, 127) + 127 << 23).view(torch.float32).to(dtype)


def minifloat(x, mantissa, low, top):
    """x rounded to floats of `mantissa` bits, exponents from `low` (subnormals below), largest
    value `top`, to the nearest, ties to even."""
    step = power_of_two(floor_log2(x).clamp(min=low) - mantissa, x.dtype)
    return ((x / step).round() * step).clamp(-top, top)


def scaled(x, top):
    """(x/s, s), s = max|x| / top of the whole tensor; s = 1 for zeros."""
    s = x.abs().amax() / top
    s = torch.where(s > 0, s, torch.ones_like(s))
    return x / s, s


def int8(x):
    """INT8, one scale a tensor:  s = max|x|/127."""
    y, s = scaled(x, 127)
    return y.round() * s


def fp8(x):
    """FP8 E4M3, one scale a tensor:  s = max|x|/448."""
    y, s = scaled(x, 448)
    return minifloat(y, 3, -6, 448) * s


def fp6(x):
    """FP6 E3M2, one scale a tensor:  s = max|x|/28."""
    y, s = scaled(x, 28)
    return minifloat(y, 2, -2, 28) * s


def float32(x):
    """Not rounded."""
    return x


def quantize_activations(x, bits, block=0):
    """x [..., n] rounded to `bits` (2 or more) symmetrically, a scale a token and block of channels
    (0: all).

    s = max|x| / (2^(bits-1) - 1). bits: a number, or a tensor [blocks] of each block's own.
    """
    block = block or x.size(-1)
    if x.size(-1) % block:
        raise UserError(f"blocks of {block} channels do not divide {x.size(-1)}")
    y = wide(x).unflatten(-1, (-1, block))                                   # [..., n/block, block]
    if torch.is_tensor(bits):
        bits = bits.to(y)[:, None]                                                     # [blocks, 1]
    top = 2 ** (bits - 1) - 1
    s = y.abs().amax(-1, keepdim=True) / top
    s = torch.where(s > 0, s, torch.ones_like(s))
    return ((y / s).round() * s).flatten(-2).to(x.dtype)


# --- 3 MXFP4: E2M1 values, a power of two as the scale of every 32 neighbours ---------------------

GROUP = 32
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0,
        6.0)  # nearest: the thresholds .25 .75 1.25 1.75 2.5 3.5 5
QUEST = 2.92247856 / 6  # QuEST's clipping point of a Gaussian, over the largest


def e2m1(x, noise=None):
    """x rounded to E2M1's values up to 6, as minifloat does (and faster); with noise, uniform in
    [0, 1), up or down so that the mean is x."""
    size = x.abs()
    step = torch.where(size < 2, 0.5, torch.where(size < 4, 1.0, 2.0)).to(x.dtype)
    y = x / step
    return ((y.round() if noise is None else (y + noise).floor()) * step).clamp(-6, 6)


def absmax(x):
    """floor(log2 max|x|) - 2, the OCP standard's: what is above 6 of the scale, at most 8,
    clips."""
    return floor_log2(x.abs().amax(-1)) - 2


def covering(x):
    """The smallest exponent at which nothing clips."""
    top = x.abs().amax(-1)
    return absmax(x) + (top > 6 * power_of_two(absmax(x), x.dtype)).int()


def quest(x):
    """QuEST's (Quartet, 2505.14669):  log2(.48708 σ), rounded to the nearest; σ a group's root mean
    square.

    ours: both. A single large channel, the first of its 32, is a constant once rotated: without
    deviation."""
    return floor_log2(math.sqrt(2) * (QUEST * x.square().mean(-1).sqrt() + 1e-8))


def quest_floor(x):
    """... of the deviation and rounded down, as Quartet's released kernel does: twice the error at
    some σ."""
    return floor_log2(QUEST * x.std(-1, correction=0) + 1e-8)


EXPONENTS = dict(absmax=absmax, covering=covering, quest=quest, quest_floor=quest_floor)


def grouped(x):
    """x [..., n] -> [..., n/32, 32]; UserError if 32 does not divide n."""
    if x.size(-1) % GROUP:
        raise UserError(f"MXFP4 has groups of {GROUP}: {x.size(-1)} inputs are no multiple of it")
    return wide(x).unflatten(-1, (-1, GROUP))


def mx4(x, rule="absmax"):
    """MXFP4's codes uint8 [..., n] (bit 3 the sign, bits 0-2 the index in E2M1), exponents int8
    [..., n/32]

    rule: a row of EXPONENTS. 4.25 bits a value.
    """
    y = grouped(x)
    exponent = EXPONENTS[rule](y).clamp(-126, 127)                                     # [..., n/32]
    y = e2m1(y / power_of_two(exponent, y.dtype)[..., None])
    index = torch.bucketize(y.abs().contiguous(),
                            torch.tensor(E2M1, dtype=y.dtype, device=y.device))
    return (index + 8 * (y < 0)).to(torch.uint8).flatten(-2), exponent.to(torch.int8)


def mx4_dense(codes, exponent, dtype=torch.float32):
    """mx4's inverse: the values [..., n]."""
    value = torch.tensor(E2M1 + tuple(-v for v in E2M1), dtype=dtype,
                         device=codes.device)[codes.long()]
    return (value.unflatten(-1, (-1, GROUP)) * power_of_two(exponent, dtype)[..., None]).flatten(-2)


def mxfp4(x, rule="absmax"):
    """x rounded to MXFP4 along its last dimension, which is filled up with zeros to whole
    groups."""
    y = grouped(F.pad(x, (0, -x.size(-1) % GROUP)))
    s = power_of_two(EXPONENTS[rule](y), y.dtype)[..., None]
    return (e2m1(y / s) * s).flatten(-2)[..., :x.size(-1)]


FORMATS = dict(float32=float32, int8=int8, fp8=fp8, fp6=fp6, mxfp4=mxfp4)
