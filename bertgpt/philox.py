"""The random bits: Philox-4x32-10 in plain torch integer arithmetic.

Every backend, forward and backward, draws the same bits from the same counters, so a dropout mask
depends on (seed, position) alone and never on a tile size, and a sampled token on (seed, sequence,
step) and never on its batch. `docs/dropout.md` is the written definition.
Source: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3" (SC 2011).
"""

import math

import torch
from torch import Tensor
from torch.compiler import is_compiling

_MASK = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)  # golden ratio, sqrt(3) - 1
_ROUNDS = 10
_NARROW = 2  # rounds until words of a row's and a column's counters are a matrix each
_COUNTERS_AT_ONCE_CPU = 1 << 15  # for each thread: half a dozen int64 of them stay in cache
_COUNTERS_AT_ONCE_GPU = 1 << 20  # few launches, and still only some 50 MB of temporaries

# The counter's last word keeps the two kinds of mask and the draws of tokens apart.
_ROWS_STREAM, _ATTENTION_STREAM, _SAMPLE_STREAM = 0, 1, 2


def philox_words(
    seed: int | Tensor, c0: Tensor, c1: Tensor, c2: Tensor, c3: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Philox-4x32-10 of the counters (c0, c1, c2, c3) under the key (seed low, seed high).

    Args:
        seed: 64 bits: an int in -2^63 ... 2^64 - 1 or an int64 tensor, 0-dim or broadcasting too.
        c0: int64, values in 0 ... 2^32 - 1; c0 to c3 broadcast against each other.
        c1: see c0.
        c2: see c0.
        c3: see c0.

    Returns:
        Four int64 tensors of the broadcast shape, each holding 32 random bits.
    """
    shapes = [t.shape for t in (seed, c0, c1, c2, c3) if isinstance(t, Tensor)]
    return _words(seed, c0, c1, c2, c3, c0.new_empty((6, *torch.broadcast_shapes(*shapes))))


def _words(
    seed: int | Tensor, c0: Tensor, c1: Tensor, c2: Tensor, c3: Tensor, room: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The same in `room`, int64 [6, *broadcast shape]: fresh memory costs time of its own."""
    k0, k1 = seed & _MASK, (seed >> 32) & _MASK
    for turn in range(_ROUNDS):
        # int64 products wrap modulo 2^64, which keeps all 64 bits; c1 and c3 take a whole product,
        # of which only the low half counts.
        if turn < _NARROW:
            p0, p1 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
            c0, c2 = (p1 >> 32 ^ k0) & _MASK ^ c1 & _MASK, (p0 >> 32 ^ k1) & _MASK ^ c3 & _MASK
            if turn == _NARROW - 1:
                c0, c2 = room[0].copy_(c0), room[1].copy_(c2)
        else:
            p0, p1 = room[2:4] if turn % 2 else room[4:]  # the round before's are read yet
            torch.mul(c0, _MULTIPLIERS[0], out=p0)
            torch.mul(c2, _MULTIPLIERS[1], out=p1)
            torch.bitwise_right_shift(p1, 32, out=c0).bitwise_xor_(c1).bitwise_xor_(k0)
            torch.bitwise_right_shift(p0, 32, out=c2).bitwise_xor_(c3).bitwise_xor_(k1)
            c0.bitwise_and_(_MASK)
            c2.bitwise_and_(_MASK)
        c1, c3 = p1, p0
        k0, k1 = (k0 + _WEYL[0]) & _MASK, (k1 + _WEYL[1]) & _MASK
    return c0, c1.bitwise_and_(_MASK), c2, c3.bitwise_and_(_MASK)


def keep_rows(
    seed: int | Tensor,
    rows: int | Tensor,
    cols: int,
    p: float,
    *,
    device: torch.device | str | None = None,
) -> Tensor:
    """Which elements of a [rows, cols] matrix dropout keeps.

    Args:
        seed: 64 bits, as in `philox_words`.
        rows: how many rows, counted from 0, or an int64 tensor [R] of row indices.
        cols: how many columns, counted from 0.
        p: probability of dropping, in [0, 1].
        device: where the mask is made; by default where `rows` lies, else the CPU.

    Returns:
        bool [R, cols], True means keep.
    """
    rows_R = _indices(rows, device)
    return _keep(seed, p, rows_R & _MASK, (rows_R >> 32) & _MASK, _ROWS_STREAM, cols)


def keep_attention(
    seed: int | Tensor,
    p: float,
    batch_heads: int | Tensor,
    queries: int | Tensor,
    keys: int,
    *,
    device: torch.device | str | None = None,
) -> Tensor:
    """Which attention probabilities dropout keeps.

    Args:
        seed: 64 bits, as in `philox_words`.
        p: probability of dropping, in [0, 1].
        batch_heads: how many (batch, head) pairs, counted from 0, or an int64 tensor [BH] of
            b * H + h.
        queries: how many queries, counted from 0 inside their sequence, or an int64 tensor [L].
        keys: how many keys, counted from 0 inside their sequence.
        device: where the mask is made; by default where `batch_heads` or `queries` lies, else the
            CPU.

    Returns:
        bool [BH, L, keys], True means keep.
    """
    if device is None:
        device = next((t.device for t in (batch_heads, queries) if isinstance(t, Tensor)), None)
    bh, query = _indices(batch_heads, device), _indices(queries, device)
    c1, c2 = query.repeat(len(bh)), bh.repeat_interleave(len(query))
    return _keep(seed, p, c1, c2, _ATTENTION_STREAM, keys).view(len(bh), len(query), keys)


def sample_words(seeds: Tensor, sequences: Tensor, steps: Tensor) -> tuple[Tensor, Tensor]:
    """The 64 bits that draw a token.

    Args:
        seeds: int64 [B], 64 bits each.
        sequences: int64 [B], 64 bits each.
        steps: int64 [B], of which the low 32 bits count.

    Returns:
        Two int64 [B] tensors: the high and the low 32 bits.
    """
    stream = torch.full_like(steps, _SAMPLE_STREAM)
    c1, c2 = sequences & _MASK, (sequences >> 32) & _MASK
    high, low, _, _ = philox_words(seeds, steps & _MASK, c1, c2, stream)
    return high, low


def _indices(count_or_indices: int | Tensor, device: torch.device | str | None) -> Tensor:
    if isinstance(count_or_indices, Tensor):
        return count_or_indices.to(device=device, dtype=torch.int64)
    return torch.arange(count_or_indices, device=device)


def _keep(
    seed: int | Tensor, p: float, c1_R: Tensor, c2_R: Tensor, stream: int, cols: int
) -> Tensor:
    """Keep mask, bool [R, cols]: element (r, col) is word col % 4 of (col // 4, c1, c2, stream)."""
    threshold = math.floor(p * 2**32)  # exact: a float64 times a power of two
    rows, groups, device = len(c1_R), -(-cols // 4), c1_R.device
    c0_1G = torch.arange(groups, device=device)[None, :]
    c3_11 = torch.full((1, 1), stream, device=device)
    keep_RG4 = torch.empty(rows, groups, 4, dtype=torch.bool, device=device)
    step = min(rows, max(1, _counters_at_once(device) // max(1, groups)))
    room = torch.empty(6, step, groups, dtype=torch.int64, device=device)
    for start in range(0, rows, step or 1):
        part = slice(start, start + step)
        c1, c2 = c1_R[part, None], c2_R[part, None]
        words = _words(seed, c0_1G, c1, c2, c3_11, room[:, : len(c1)])
        for i, word in enumerate(words):
            keep_RG4[part, :, i] = word >= threshold
    return keep_RG4.flatten(1)[:, :cols].contiguous()


def _counters_at_once(device: torch.device) -> int:
    if device.type == "cpu" and not is_compiling():  # torch splits nothing smaller between threads
        return _COUNTERS_AT_ONCE_CPU * torch.get_num_threads()
    return _COUNTERS_AT_ONCE_GPU


def dropout_rows(x: Tensor, p: float, seed: int | Tensor | None) -> Tensor:
    """Inverted dropout of the rows of x [..., E]: element (row, col), leading dims flattened.

    Args:
        x: any floating dtype.
        p: probability of dropping, in [0, 1].
        seed: 64 bits, as in `philox_words`; looked at only when p > 0.

    Returns:
        Like x: x / (1 - p) where kept, 0 elsewhere (whatever x holds there); x itself when p = 0.
    """
    if p == 0.0 or seed is None:
        return x
    rows = math.prod(x.shape[:-1])
    keep = keep_rows(seed, rows, x.shape[-1], p, device=x.device).view(x.shape)
    return torch.where(keep, x * (1.0 / (1.0 - p) if p < 1.0 else 0.0), 0.0)
