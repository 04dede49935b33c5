"""Draws each row's next token: softmax weights as integers, and the point of their sum to go to.

Maths: w[i] = ⌊2⁴⁰ exp((x[i] − max x) / T)⌋ in integers (docs/sampling.md); top-k keeps x ≥ the k-th
    largest; top-p the fewest of the largest whose w reach ⌊p Σ w⌋, at least 1; min-p w ≥ p · 2⁴⁰;
    the token is the first whose cumulative kept w exceeds ⌊U Σ w / 2⁶⁴⌋, U the 64 bits of Philox
    counter (step, sequence, sequence >> 32, 2). Integer sums are exact in any order.
Memory: no copy and no sort of a row. It is read once for the maximum and twice to draw; for top-k
    and for top-p each once for every two bits of a logit's key, and for top-p once more for ties.
    The first comes from memory, the others from the L2 where the rows at work fit it.
Grid: a program a row.
Dims: B rows of V logits in blocks of BLOCK; V up to 2²².
"""

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from bertgpt.kernels.device import compute_capability

WEIGHT_BITS = tl.constexpr(40)
LOG2E = tl.constexpr(1.4426950408889634)
LARGEST = tl.constexpr(3.4028234663852886e38)
# Bits of a float32 that are 0 whatever the element's value was; their number is even after them.
_UNUSED_BITS = {torch.float32: 0, torch.float16: 12, torch.bfloat16: 16}


@dataclass(frozen=True)
class Config:
    """Elements that a program holds at a time, its warps, and the registers a thread may have."""

    block: int
    num_warps: int
    max_registers: int = 128


def pick_config(capability: int) -> Config:
    """Four elements a thread: three 64-bit sums for each stay in registers on any architecture.

    Left to itself, the compiler of sm_90 and sm_100 holds them below what they need, and spills.

    Args:
        capability: compute capability (90 = sm_90).
    """
    return Config(block=1024, num_warps=8)


def unsupported(**call: Any) -> str | None:
    """Nothing that the common checks let through."""
    return None


@triton.jit
def _load(row_ptr, start, V, BLOCK: tl.constexpr):
    """Logits [BLOCK] from `start` on, in float32; −inf past the row's end, which is never drawn."""
    offs = start + tl.arange(0, BLOCK)
    return tl.load(row_ptr + offs, mask=offs < V, other=float("-inf")).to(tl.float32)


@triton.jit
def _keys(x, UNUSED: tl.constexpr):
    """Unsigned integers in the order of the logits; −0 is the 0 that it equals."""
    bits = tl.where(x == 0.0, 0.0, x).to(tl.uint32, bitcast=True)
    return tl.where(bits >> 31 != 0, bits ^ 0xFFFFFFFF, bits | 0x80000000) >> UNUSED


@triton.jit
def _weights(x, top, rate):
    """Integer weights, int64: every step is exact or rounded to nearest, and none may be fused."""
    y = (top - x) * rate  # how many bits less likely than the top
    drawn = y < WEIGHT_BITS + 1
    y = tl.where(drawn, y, 0.0)
    whole = tl.floor(y)
    f = ((y - whole) * 4294967296.0).to(tl.uint32)
    m = tl.full(f.shape, 0x00005ED3, tl.uint32)  # 2^-f in units of 2^-31: bertgpt/exact_softmax.py
    m = 0x0004E100 - tl.umulhi(m, f)
    m = 0x002B9458 - tl.umulhi(m, f)
    m = 0x013B20D4 - tl.umulhi(m, f)
    m = 0x071AC093 - tl.umulhi(m, f)
    m = 0x1EBFBDE5 - tl.umulhi(m, f)
    m = 0x58B90BFC - tl.umulhi(m, f)
    m = 0x80000000 - tl.umulhi(m, f)
    weight = (m.to(tl.int64) << (WEIGHT_BITS - 31)) >> whole.to(tl.int64)
    return tl.where(drawn, weight, 0)


@triton.jit
def _values(x, keys, lowest, top, rate, WEIGHED: tl.constexpr):
    """What each element adds to a sum: its weight from key `lowest` up, or 1."""
    if WEIGHED:
        return tl.where(keys >= lowest, _weights(x, top, rate), 0)
    return tl.full(x.shape, 1, tl.int64)


@triton.jit
def _threshold(
    row_ptr, V, wanted, lowest, top, rate,
    WEIGHED: tl.constexpr, UNUSED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The largest key whose elements, with those above, add up to `wanted`; and the sum above it.

    Two bits at a time from the top: the sums of the elements that agree with the bits found and go
    on with 3, 2 or 1.
    """
    found = tl.zeros([], tl.uint32)
    above = tl.zeros([], tl.int64)
    for digit in range((32 - UNUSED) // 2):
        shift = tl.full([], 30 - UNUSED - 2 * digit, tl.uint32)
        sum_1 = tl.zeros([BLOCK], tl.int64)
        sum_2 = tl.zeros([BLOCK], tl.int64)
        sum_3 = tl.zeros([BLOCK], tl.int64)
        for start in range(0, V, BLOCK):
            x = _load(row_ptr, start, V, BLOCK)
            keys = _keys(x, UNUSED)
            value = _values(x, keys, lowest, top, rate, WEIGHED)
            digits = keys >> shift
            sum_1 += tl.where(digits == found * 4 + 1, value, 0)
            sum_2 += tl.where(digits == found * 4 + 2, value, 0)
            sum_3 += tl.where(digits == found * 4 + 3, value, 0)
        with_3 = above + tl.sum(sum_3)
        with_2 = with_3 + tl.sum(sum_2)
        with_1 = with_2 + tl.sum(sum_1)
        bits = (with_1 >= wanted).to(tl.uint32) + (with_2 >= wanted).to(tl.uint32)
        bits += (with_3 >= wanted).to(tl.uint32)
        above = tl.where(bits == 2, with_3, tl.where(bits == 1, with_2, above))
        above = tl.where(bits == 0, with_1, above)
        found = found * 4 + bits
    return found, above


@triton.jit
def _kept(
    row_ptr, start, V, lowest, last, least, top, rate,
    TIES: tl.constexpr, UNUSED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Weights [BLOCK] of what is kept and 0 elsewhere; with TIES, of the elements of key `lowest`.

    Kept is what lies above key `lowest`, or has it and no index above `last`, and weighs `least`.
    """
    x = _load(row_ptr, start, V, BLOCK)
    keys = _keys(x, UNUSED)
    if TIES:
        kept = keys == lowest
    else:
        offs = start + tl.arange(0, BLOCK)
        kept = (keys > lowest) | ((keys == lowest) & (offs <= last))
    weight = tl.where(kept, _weights(x, top, rate), 0)
    return tl.where(weight >= least, weight, 0)


@triton.jit
def _walk(
    row_ptr, V, point, lowest, last, least, top, rate,
    TIES: tl.constexpr, UNUSED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Index of the first element at which the running sum of `_kept` exceeds `point`."""
    upto = tl.zeros([], tl.int64)
    before = tl.zeros([], tl.int64)
    first = 0
    for start in range(0, V, BLOCK):  # the block in which that happens
        value = _kept(
            row_ptr, start, V, lowest, last, least, top, rate, TIES, UNUSED, BLOCK
        )  # fmt: skip
        total = upto + tl.sum(value)
        here = (upto <= point) & (point < total)
        first = tl.where(here, start, first)
        before = tl.where(here, upto, before)
        upto = total
    value = _kept(row_ptr, first, V, lowest, last, least, top, rate, TIES, UNUSED, BLOCK)
    return first + tl.sum((tl.cumsum(value, 0) + before <= point).to(tl.int32))


@triton.jit
def _mass(
    row_ptr, V, lowest, last, least, top, rate, UNUSED: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """The sum of the weights that are kept."""
    mass = tl.zeros([BLOCK], tl.int64)
    for start in range(0, V, BLOCK):
        mass += _kept(row_ptr, start, V, lowest, last, least, top, rate, False, UNUSED, BLOCK)
    return tl.sum(mass)


@triton.jit
def _largest(row_ptr, V, BLOCK: tl.constexpr):
    """The largest logit, and whether the row holds no NaN and no +inf."""
    most = tl.full([BLOCK], float("-inf"), tl.float32)
    good = tl.full([BLOCK], 1, tl.int32)
    for start in range(0, V, BLOCK):
        x = _load(row_ptr, start, V, BLOCK)
        good &= (x <= LARGEST).to(tl.int32)
        most = tl.maximum(most, x)
    return tl.max(most), tl.min(good) == 1


# fmt: off
@triton.jit(do_not_specialize=["V"])
def _sample_kernel(
    x_ptr, token_ptr, temperature_ptr, top_k_ptr, top_p_ptr, min_p_ptr, seed_ptr, sequence_ptr,
    step_ptr, stride_x, stride_temperature, stride_top_k, stride_top_p, stride_min_p, stride_seed,
    stride_sequence, stride_step, V,
    UNUSED: tl.constexpr, BLOCK: tl.constexpr,
):
    # fmt: on
    # 1. The row's settings, its largest logit, and whether there is anything to draw.
    row = tl.program_id(0).to(tl.int64)
    row_ptr = x_ptr + row * stride_x
    temperature = tl.load(temperature_ptr + row * stride_temperature)
    top_k = tl.load(top_k_ptr + row * stride_top_k)
    top_p = tl.load(top_p_ptr + row * stride_top_p)
    min_p = tl.load(min_p_ptr + row * stride_min_p)
    top, good = _largest(row_ptr, V, BLOCK)
    in_range = (temperature >= 0.0) & (temperature <= LARGEST) & (top_k >= 0)
    in_range &= (top_p > 0.0) & (top_p <= 1.0) & (min_p >= 0.0) & (min_p <= 1.0)
    if (top < -LARGEST) | (good == 0) | (in_range == 0):
        tl.store(token_ptr + row, tl.full([], -1, tl.int64))
        return

    # 2. What is kept: keys above `lowest`, and of those equal to it the ones up to index `last`.
    greedy = temperature == 0.0
    log2e = tl.full([], LOG2E, tl.float32)
    rate = tl.minimum(tl.div_rn(log2e, tl.where(greedy, 1.0, temperature)), LARGEST)
    lowest = tl.where(greedy, _keys(top, UNUSED), tl.zeros([], tl.uint32))
    last = V
    if (greedy == 0) & (top_k > 0) & (top_k < V):
        lowest, _ = _threshold(row_ptr, V, top_k, lowest, top, rate, False, UNUSED, BLOCK)
    if (greedy == 0) & (top_p < 1.0):
        total = _mass(row_ptr, V, lowest, last, 0, top, rate, UNUSED, BLOCK)
        share = (top_p * 4294967296.0).to(tl.uint64) << 32
        enough = tl.maximum(tl.umulhi(total.to(tl.uint64), share).to(tl.int64), 1)
        lowest, above = _threshold(row_ptr, V, enough, lowest, top, rate, True, UNUSED, BLOCK)
        # Equal logits weigh the same: the last one kept is where enough is reached.
        missing = enough - above
        last = _walk(row_ptr, V, missing - 1, lowest, last, 0, top, rate, True, UNUSED, BLOCK)

    # 3. A point of the kept mass, and the token there; at temperature 0 the first largest logit.
    #    A power of two times min_p is exact, and the largest logit's weight is never below it.
    least = tl.ceil(min_p * 1099511627776.0).to(tl.int64)
    mass = _mass(row_ptr, V, lowest, last, least, top, rate, UNUSED, BLOCK)
    sequence = tl.load(sequence_ptr + row * stride_sequence)
    step = tl.load(step_ptr + row * stride_step)
    zero = tl.zeros([], tl.uint32)
    high, low, _, _ = tl.philox(
        tl.load(seed_ptr + row * stride_seed),
        zero + step.to(tl.uint32),
        zero + sequence.to(tl.uint32),
        zero + (sequence >> 32).to(tl.uint32),
        zero + 2,
    )
    random = (high.to(tl.uint64) << 32) | low.to(tl.uint64)
    point = tl.where(greedy, 0, tl.umulhi(mass.to(tl.uint64), random).to(tl.int64))
    token = _walk(row_ptr, V, point, lowest, last, least, top, rate, False, UNUSED, BLOCK)
    tl.store(token_ptr + row, token.to(tl.int64))


def sample(
    logits: Tensor,
    *,
    temperature: Tensor,
    top_k: Tensor,
    top_p: Tensor,
    min_p: Tensor,
    seed: Tensor,
    sequence_ids: Tensor,
    steps: Tensor,
) -> Tensor:
    """Draws each row's token; arguments as the op checked them.

    Args:
        logits: [B, V], float32, float16 or bfloat16, any strides.
        temperature: float32, like all settings [B] or 0-dim, there or on the CPU.
        top_k: int64.
        top_p: float32.
        min_p: float32.
        seed: int64.
        sequence_ids: int64.
        steps: int64, of which the low 32 bits count.

    Returns:
        int64 [B]; −1 where a row has no softmax or a setting is out of range.
    """
    rows, vocabulary = logits.shape
    logits = logits if logits.stride(1) == 1 else logits.contiguous()
    tokens = torch.empty(rows, dtype=torch.int64, device=logits.device)
    if rows == 0:
        return tokens
    settings = [
        setting.to(logits.device, non_blocking=True).expand(rows)
        for setting in (temperature, top_k, top_p, min_p, seed, sequence_ids, steps)
    ]
    config = pick_config(compute_capability())
    _sample_kernel[(rows,)](
        logits, tokens, *settings, logits.stride(0), *(s.stride(0) for s in settings), vocabulary,
        UNUSED=_UNUSED_BITS[logits.dtype], BLOCK=config.block, num_warps=config.num_warps,
        maxnreg=config.max_registers, enable_fp_fusion=False,
    )  # fmt: skip
    return tokens
