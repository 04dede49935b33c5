"""Which tiles attention's gradient kernels take, by what a call gives and never by its lengths."""

from itertools import product

import pytest
import torch
from cases import randn

pytest.importorskip("triton")
from bertgpt.kernels.attention_call import attention_call
from bertgpt.kernels.attention_tiles import pick_config

pytestmark = pytest.mark.interpreter


@pytest.mark.parametrize("length", [2, 9, 200])
@pytest.mark.parametrize(
    ("options", "extras"),
    [
        ({}, 0),
        ({"window": (64, -1), "key_lengths": torch.tensor([1])}, 0),
        ({"mask": torch.bool}, 1),
        ({"mask": torch.float32, "per_key": True, "causal": True}, 1),
        ({"dropout_p": 0.1, "window": (-1, 64)}, 1),
        ({"kv_heads": 1}, 0),
        ({"kv_heads": 1, "window": (64, -1)}, 0),
        ({"kv_heads": 1, "dropout_p": 0.1}, 2),
        ({"mask": torch.float16}, 2),
        ({"mask": torch.bool, "dropout_p": 0.1}, 2),
        ({"mask": torch.bool, "window": (64, -1)}, 2),
        ({"dropout_p": 0.1, "window": (64, -1)}, 2),
        ({"mask": torch.float32, "dropout_p": 0.1, "window": (64, -1)}, 2),
    ],
    ids=str,
)
def test_what_takes_registers_counts_and_lengths_do_not(options, extras, length):
    """Else a sequence would get other tiles, and other bits, in another batch."""
    given = {
        "key_lengths": None, "causal": False, "window": (-1, -1), "seed": torch.tensor(5),
        "cu_seqlens_q": None, "cu_seqlens_k": None, "max_seqlen_q": None, "max_seqlen_k": None,
        "mask": None, "dropout_p": 0.0,
    } | options  # fmt: skip
    per_key = given.pop("per_key", False)
    if given["mask"] is not None:
        rows = 1 if per_key else length
        mask = torch.zeros(1, 1, rows, length, dtype=given["mask"])
        given["mask"] = mask.expand(1, 2, length, length)
    q, k = randn(1, length, 2, 16), randn(1, length, given.pop("kv_heads", 2), 16)
    assert attention_call(q, k, **given).extras == extras


def test_configs_are_powers_of_two_for_every_machine():
    for gradient, capability, dim, size, extras, aligned in product(
        ("dq", "dkdv"), (80, 86, 89, 90, 100, 103, 120, 121), range(1, 257), (2, 4),
        (0, 1, 2), (False, True),
    ):  # fmt: skip
        config = pick_config(gradient, capability, dim, size, extras, aligned)
        for extent in (config.BLOCK_M, config.BLOCK_N):
            assert extent >= 16
            assert extent & (extent - 1) == 0
