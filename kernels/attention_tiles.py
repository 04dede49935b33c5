"""Tile shapes of attention's gradients: the largest that compile without a spill.

(BLOCK_M, BLOCK_N, num_warps, num_stages) by the largest BLOCK_D, then by `AttentionCall.extras`;
the last given serves the rest.
"""

from bertgpt.kernels.attention_call import Config

_Table = dict[int, tuple[tuple[int, int, int, int], ...]]
# fmt: off
_HOPPER: dict[str, _Table] = {
    "dq": {64: ((64, 64, 4, 2), (64, 32, 4, 2)), 128: ((64, 64, 8, 2), (64, 32, 8, 2)),
           256: ((32, 32, 8, 1),)},
    "dkdv": {32: ((64, 128, 8, 2), (32, 64, 4, 2), (16, 32, 4, 2)),
             64: ((64, 128, 8, 2), (32, 64, 4, 2), (32, 32, 8, 2)),
             128: ((64, 32, 8, 2), (64, 32, 8, 2), (32, 16, 8, 2)),
             256: ((32, 32, 8, 1), (32, 32, 8, 1), (32, 16, 8, 1))},
}
_BLACKWELL: dict[str, _Table] = {
    "dq": {**_HOPPER["dq"], 128: ((64, 64, 8, 2), (64, 32, 4, 2), (32, 64, 8, 2))},
    "dkdv": {**_HOPPER["dkdv"], 32: ((64, 64, 8, 2), (32, 64, 4, 2), (16, 32, 4, 2)),
             64: ((64, 64, 8, 2), (32, 64, 4, 2), (32, 32, 8, 2)),
             128: ((32, 64, 8, 2), (64, 32, 8, 2), (32, 16, 8, 2))},
}
_OTHERS: dict[str, _Table] = {
    "dq": {32: ((128, 32, 8, 2), (64, 32, 4, 2), (32, 32, 8, 2)),
           64: ((128, 32, 8, 2), (64, 32, 4, 2), (32, 32, 4, 2)),
           128: ((64, 32, 8, 2), (32, 64, 8, 2)), 256: ((32, 32, 8, 1),)},
    "dkdv": {32: ((32, 128, 8, 2), (64, 32, 4, 2), (16, 32, 4, 2)),
             64: ((32, 128, 8, 2), (64, 32, 4, 2), (32, 32, 8, 2)),
             128: ((64, 32, 8, 2), (64, 32, 8, 2), (32, 16, 8, 2)),
             256: ((32, 32, 8, 1), (32, 32, 8, 1), (32, 16, 8, 1))},
}
_UNALIGNED: _Table = {32: ((16, 16, 4, 1),), 256: ((16, 16, 8, 1),)}  # of extras 2: copied
_FLOAT32: dict[str, _Table] = {
    "dq": {64: ((32, 32, 4, 1), (32, 32, 4, 1), (32, 32, 8, 1)),
           128: ((16, 16, 4, 1), (16, 16, 4, 1), (16, 32, 8, 1)),
           256: ((16, 16, 4, 1), (16, 16, 4, 1), (16, 16, 8, 1))},
    "dkdv": {64: ((16, 32, 8, 1), (16, 32, 8, 1), (16, 32, 8, 2)), 256: ((16, 16, 8, 1),)},
}
# fmt: on


def pick_config(
    gradient: str, capability: int, head_dim: int, dtype_bytes: int, extras: int, aligned: bool
) -> Config:
    """Tile shape of one kernel ("dq" or "dkdv") for a compute capability (90 = sm_90) and a call.

    `extras` is `AttentionCall.extras`; `aligned` says that rows are multiples of 16 bytes.
    Lengths and batch play no part: a sequence's bits don't depend on the batch it is in.
    """
    if not aligned:
        table = _UNALIGNED  # loads of single elements, one pointer each
    elif dtype_bytes == 4:
        table = _FLOAT32[gradient]  # products without tensor cores
    else:
        table = {9: _HOPPER, 10: _BLACKWELL}.get(capability // 10, _OTHERS)[gradient]
    tiles = table[min(d for d in table if head_dim <= d)]
    return Config(*tiles[min(extras, len(tiles) - 1)])
