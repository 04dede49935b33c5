"""The dropout bits of docs/dropout.md, for a tile: Philox-4x32-10 by counter, four words each."""

import math

import triton
import triton.language as tl
from torch import Tensor, device


@triton.jit
def keep_rows(seed_ptr, rows, col_first, threshold, ROWS: tl.constexpr, COLS: tl.constexpr):
    """Which cells [ROWS, COLS] of a matrix dropout keeps; rows [ROWS] int64, col_first % 4 == 0."""
    groups = col_first // 4 + tl.arange(0, COLS // 4)
    zeros = tl.zeros([ROWS, COLS // 4], tl.uint32)
    word_0, word_1, word_2, word_3 = tl.philox(
        tl.load(seed_ptr),
        zeros + groups[None, :].to(tl.uint32),
        zeros + rows[:, None].to(tl.uint32),
        zeros + (rows >> 32)[:, None].to(tl.uint32),
        zeros,  # the stream of rows
    )
    words = tl.join(tl.join(word_0, word_2), tl.join(word_1, word_3))  # col % 4 = 2·third + last
    return tl.reshape(words, [ROWS, COLS]).to(tl.int64) >= threshold


def dropout_arguments(
    dropout_p: float, seed: Tensor | None, where: device
) -> tuple[Tensor | None, int, float]:
    """The seed in a kernel's reach (None where nothing is dropped), threshold, and kept scale."""
    if dropout_p == 0.0 or seed is None:
        return None, 0, 1.0
    scale = 1.0 / (1.0 - dropout_p) if dropout_p < 1.0 else 0.0
    return seed.to(where), math.floor(dropout_p * 2**32), scale
