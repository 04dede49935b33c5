"""The linear layer on the faster GEMM of a CPU, and what must still meet torch's own."""

from functools import partial

import pytest
import torch
from cases import randn
from tolerance import assert_accurate, assert_bitwise
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from bertgpt.layers import Linear
from bertgpt.ops._linear import linear

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


@pytest.mark.parametrize("frozen", [(), ("x",), ("w", "b"), ("x", "b")])
def test_gradients_are_onednns_and_accurate(frozen, onednn_calls):
    given = dict(zip("xwb", inputs(64, *LARGE[1:]), strict=True))
    grad = randn(64, LARGE[2], seed=3)

    def gradients(product, dtype):
        leaves = {
            name: t.to(dtype, copy=True).requires_grad_(name not in frozen)
            for name, t in given.items()
        }
        product(*leaves.values()).backward(grad.to(dtype))
        return {name: leaf.grad for name, leaf in leaves.items()}

    mine = gradients(linear, torch.float32)
    assert len(onednn_calls) == 1 + sum(name not in frozen for name in "xw")
    oracle, baseline = (gradients(F.linear, dtype) for dtype in (torch.float64, torch.float32))
    for name in "xwb":
        assert (mine[name] is None) == (name in frozen)
        if name not in frozen:
            assert_accurate(mine[name], oracle[name], baseline[name])


@pytest.mark.parametrize("frozen", ["x", "w"])
def test_what_no_gradient_reads_is_not_saved(frozen):
    x, w, b = inputs(*LARGE)
    given = {"x": x, "w": w, "b": b.requires_grad_()}
    given["w" if frozen == "x" else "x"].requires_grad_()
    y = linear(*given.values())
    with torch.no_grad():
        given["w" if frozen == "x" else "x"].add_(1)
    y.sum().backward()


@pytest.mark.parametrize("leading", [(), (2, 40)])
def test_any_leading_dimensions_have_gradients(leading):
    x, w, b = randn(*leading, 2048), *inputs(1, 2048, 1024)[1:]
    ours, theirs = ((t.clone().requires_grad_() for t in (x, w, b)) for _ in range(2))
    x, w, b = ours
    (linear(x, w, b) * 2).sum().backward()
    x_, w_, b_ = theirs
    (F.linear(x_, w_, b_) * 2).sum().backward()
    for mine, other in ((x, x_), (w, w_), (b, b_)):
        torch.testing.assert_close(mine.grad, other.grad, rtol=1e-4, atol=1e-3)


def test_gradients_in_batches_and_their_derivatives_are_torchs():
    x, w, b = (t.requires_grad_() for t in inputs(*LARGE))
    pulls = randn(3, LARGE[0], LARGE[2], seed=3)

    batches, slopes = [], []
    for product in (linear, F.linear):
        y = product(x, w, b)
        batches.append(torch.autograd.grad(y, (x, w, b), pulls, is_grads_batched=True))
        y = product(x, w, b)
        pull = partial(torch.autograd.grad, y, x)
        slopes.append(torch.func.jvp(lambda g, pull=pull: pull(g)[0], (pulls[0],), (pulls[1],))[1])
    for mine, other in zip(*batches, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(*slopes)


def test_checkpointing_beside_a_profiler():
    x, w, b = (t.requires_grad_() for t in inputs(*LARGE))
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]):
        y = checkpoint(lambda x: linear(x, w, b).sin(), x, use_reentrant=False)
    y.sum().backward()
    assert x.grad is not None


def test_flops_of_a_gradient_are_counted():
    x, w, b = (t.requires_grad_() for t in inputs(*LARGE))
    y = linear(x, w, b).sum()
    with FlopCounterMode(display=False) as counted:
        y.backward()
    assert counted.get_total_flops() == 4 * LARGE[0] * LARGE[1] * LARGE[2]


def test_a_second_derivative_is_torchs():
    x, w, b = (t.requires_grad_() for t in inputs(*LARGE))
    seconds = []
    for product in (linear, F.linear):
        (grad,) = torch.autograd.grad(product(x, w, b).pow(3).sum(), x, create_graph=True)
        seconds.append(torch.autograd.grad(grad.pow(2).sum(), w)[0])
    torch.testing.assert_close(*seconds, rtol=1e-4, atol=1e-4 * float(seconds[1].abs().max()))


def test_a_layer_keeps_forward_derivatives(onednn_calls):
    x = randn(*LARGE[:2])
    layer = Linear(LARGE[1], LARGE[2]).requires_grad_(False)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x, x)
        slope = torch.autograd.forward_ad.unpack_dual(layer(dual)).tangent
    torch.testing.assert_close(slope, F.linear(x, layer.weight))
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
