"""`ops.attention` names what is wrong with its arguments, before anything runs."""

import pytest
import torch
from attention_calls import qkv
from cases import cu_seqlens

from bertgpt import ops

BAD = [
    (TypeError, "q must be a tensor", lambda q, k, v: ((None, k, v), {})),
    (TypeError, "float16, bfloat16", lambda q, k, v: ((q.int(), k, v), {})),
    (TypeError, "k is torch.float16", lambda q, k, v: ((q, k.half(), v), {})),
    (ValueError, r"\[B, L, H, D\]", lambda q, k, v: ((q[0], k, v), {})),
    (ValueError, "k must have 4", lambda q, k, v: ((q, k[0], v), {})),
    (ValueError, "shaped like k", lambda q, k, v: ((q, k, v[:, :3]), {})),
    (ValueError, "head_dim 8 but k has 7", lambda q, k, v: ((q, k[..., :7], v[..., :7]), {})),
    (ValueError, "head_dim must lie", lambda q, k, v: ([t[..., :0] for t in (q, k, v)], {})),
    (ValueError, "multiple of", lambda q, k, v: ((q[:, :, :3], k, v), {})),
    (ValueError, "2 sequences but k holds 1", lambda q, k, v: ((q, k[:1], v[:1]), {})),
    (ValueError, "is on meta", lambda q, k, v: ((q, k.to("meta"), v.to("meta")), {})),
    (TypeError, "mask must be bool", lambda q, k, v: ((q, k, v), {"mask": torch.ones(7).int()})),
    (TypeError, "mask must be a tensor", lambda q, k, v: ((q, k, v), {"mask": [True] * 7})),
    (ValueError, "does not broadcast", lambda q, k, v: ((q, k, v), {"mask": torch.ones(6)})),
    (ValueError, "does not broadcast", lambda q, k, v: ((q, k, v), {"mask": torch.ones([1] * 5)})),
    (TypeError, "int32 or int64", lambda q, k, v: ((q, k, v), {"key_lengths": torch.ones(2)})),
    (
        ValueError,
        "holds 8, outside 0 … 7",
        lambda q, k, v: ((q, k, v), {"key_lengths": torch.tensor([8, 1])}),
    ),
    (
        ValueError,
        "holds -1",
        lambda q, k, v: ((q, k, v), {"key_lengths": torch.tensor([3, -1])}),
    ),
    (
        ValueError,
        r"\[B\] = \(2,\)",
        lambda q, k, v: ((q, k, v), {"key_lengths": torch.tensor([3])}),
    ),
    (ValueError, "window bounds", lambda q, k, v: ((q, k, v), {"window": (-2, 0)})),
    (ValueError, "dropout_p", lambda q, k, v: ((q, k, v), {"dropout_p": 1.5})),
    (ValueError, "unknown backend", lambda q, k, v: ((q, k, v), {"backend": "tritron"})),
    (ValueError, "go with packed", lambda q, k, v: ((q, k, v), {"max_seqlen_q": 5})),
    (ValueError, "needs cu_seq", lambda q, k, v: ((q, k, v), {"cu_seqlens_k": cu_seqlens([7])})),
    (ops.BackendUnavailable, "on the CPU", lambda q, k, v: ((q, k, v), {"backend": "triton"})),
    (ops.BackendUnavailable, "no CUDA C", lambda q, k, v: ((q, k, v), {"backend": "cuda"})),
]  # fmt: skip


@pytest.mark.parametrize(("error", "words", "spoil"), BAD, ids=[b[1] for b in BAD])
def test_bad_input_is_named(error, words, spoil):
    args, kwargs = spoil(*qkv(B=2, L=5, S=7, H=4, K=2, D=8))
    with pytest.raises(error, match=words):
        ops.attention(*args, **kwargs)


BAD_PACKED = [
    (ValueError, "must start at 0", {"cu_seqlens_q": torch.tensor([1, 3, 9])}),
    (ValueError, "must not fall", {"cu_seqlens_q": torch.tensor([0, 10, 9])}),
    (ValueError, "must end at 9", {"cu_seqlens_q": torch.tensor([0, 3, 8])}),
    (ValueError, "it is empty", {"cu_seqlens_q": torch.tensor([], dtype=torch.int32)}),
    (TypeError, "int32 or int64", {"cu_seqlens_q": torch.tensor([0.0, 3, 9])}),
    (TypeError, "int32 or int64", {"cu_seqlens_q": torch.tensor([0, 3, 9], dtype=torch.int16)}),
    (ValueError, "they must agree", {"cu_seqlens_k": torch.tensor([0, 9])}),
    (ValueError, "max_seqlen_q is 5", {"max_seqlen_q": 5}),
    (ValueError, "must not be negative", {"max_seqlen_k": -5}),
    (ValueError, "padded tensors", {"mask": torch.ones(9, dtype=torch.bool)}),
    (ValueError, "padded tensors", {"key_lengths": torch.tensor([3, 6])}),
]


@pytest.mark.parametrize(("error", "words", "kwargs"), BAD_PACKED, ids=[b[1] for b in BAD_PACKED])
def test_bad_packed_input_is_named(error, words, kwargs):
    q, k, v = (x[0] for x in qkv(L=9, S=9))
    cu = cu_seqlens((3, 6))
    with pytest.raises(error, match=words):
        ops.attention(q, k, v, **{"cu_seqlens_q": cu, **kwargs})
