"""The linear layer on the faster GEMM of a CPU, and what must still meet torch's own."""

import pytest
import torch
from cases import randn
from tolerance import assert_accurate, assert_bitwise
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from bertgpt.layers import Linear
from bertgpt.portable.products import linear

LARGE = (16, 512, 300)  # above what is worth oneDNN's call


def inputs(rows, width, outputs, dtype=torch.float32):
    return (
        randn(rows, width, dtype=dtype),
        randn(outputs, width, seed=1, dtype=dtype),
        randn(outputs, seed=2, dtype=dtype),
    )


@pytest.fixture
def onednn_calls(monkeypatch):
    """The row counts of products that oneDNN ran."""
    rows, run = [], torch.ops.mkldnn._linear_pointwise

    def count(x, *rest):
        rows.append(x.shape[:-1].numel())
        return run(x, *rest)

    monkeypatch.setattr(torch.ops.mkldnn, "_linear_pointwise", count)
    return rows


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("leading", [(16,), (2, 40), (4, 3, 2)])
def test_large_products_are_onednns_and_accurate(leading, biased, onednn_calls):
    _, w, b = inputs(*LARGE)
    x = randn(*leading, LARGE[1])
    b = b if biased else None
    doubles = [None if t is None else t.double() for t in (x, w, b)]
    assert_accurate(linear(x, w, b), F.linear(*doubles), F.linear(x, w, b))
    assert onednn_calls == [x.shape[:-1].numel()]


def test_what_onednn_would_misread_or_not_win_is_torchs(onednn_calls):
    x, w, b = inputs(*LARGE)
    trained = w.clone().requires_grad_()
    assert linear(x, trained, b).requires_grad
    others = [
        (x[:4], w, b),
        (x, w[:8], b[:8]),
        (x[:0], w, b),
        (x.mT.contiguous().mT, w, b),
        (x, w.mT.contiguous().mT, b),
        (x, w, torch.stack([b, b], 1)[:, 0]),
        inputs(*LARGE, dtype=torch.float64),
        inputs(*LARGE, dtype=torch.bfloat16),
    ]
    for call in others:
        assert_bitwise(linear(*call), F.linear(*call))
    with torch.backends.mkldnn.flags(enabled=False):
        assert_bitwise(linear(x, w, b), F.linear(x, w, b))
    assert onednn_calls == []


def test_a_layer_is_torchs_where_something_watches(onednn_calls):
    x, w, b = inputs(*LARGE)
    layer = Linear(LARGE[1], LARGE[2])
    with torch.no_grad():
        layer.weight.copy_(w)
        layer.bias.copy_(b)
        plain = layer(x)
        assert_bitwise(plain, linear(x, w, b))
        onednn_calls.clear()
        with FlopCounterMode(display=False) as counted:
            layer(x)
        assert counted.get_total_flops() == 2 * LARGE[0] * LARGE[1] * LARGE[2]
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert layer(x).dtype == torch.bfloat16
    assert onednn_calls == []
