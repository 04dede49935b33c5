"""Choosing a backend: the default order, refusals in words, strictness, and `explain`."""

import warnings
from dataclasses import replace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import bertgpt
from bertgpt import ops
from bertgpt.ops import _backends, _dispatch
from bertgpt.ops._dispatch import OPS


def _on_cuda(*shape, **options):
    with FakeTensorMode():
        return torch.empty(shape or (1, 4, 2, 8), device="cuda", **options)


@pytest.fixture
def on_a_gpu(monkeypatch):
    """A checked attention call whose tensors say they are on a GPU of capability 9.0."""
    monkeypatch.setattr(_backends.extension, "capability", lambda device: (9, 0))
    _dispatch._warn_once.cache_clear()
    q = _on_cuda()

    def call(q=q, **kwargs):
        return OPS["attention"].check(q, q, q, **kwargs)

    return call


def test_triton_comes_first_on_a_gpu(on_a_gpu):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert OPS["attention"].resolve(on_a_gpu()) == "triton"


def test_falling_past_triton_warns_once(on_a_gpu):
    call = on_a_gpu(_on_cuda(dtype=torch.float64))
    with pytest.warns(RuntimeWarning, match="runs on backend 'torch' on a GPU.*float64"):
        assert OPS["attention"].resolve(call) == "torch"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert OPS["attention"].resolve(call) == "torch"


def test_strict_raises_where_it_would_fall(on_a_gpu):
    wide = _on_cuda(dtype=torch.float64)
    call = on_a_gpu(wide)
    with bertgpt.strict(), pytest.raises(bertgpt.BackendUnavailable, match="strict mode"):
        OPS["attention"].resolve(call)
    with bertgpt.strict():
        assert OPS["attention"].resolve(on_a_gpu(wide, backend="torch")) == "torch"


def test_strict_ends_with_its_block():
    assert not _dispatch._STRICT.get()
    with pytest.raises(ZeroDivisionError), bertgpt.strict():
        _ = 1 / int(not _dispatch._STRICT.get())
    assert not _dispatch._STRICT.get()


def test_what_triton_refuses(on_a_gpu):
    attention, norm = OPS["attention"], OPS["add_layer_norm"]
    assert "float64" in attention.refusal("triton", on_a_gpu(_on_cuda(dtype=torch.float64)))
    x, weight = _on_cuda(4, 5000), _on_cuda(5000, requires_grad=True)
    wide = norm.check(x, None, weight, None, dropout_p=0.1, seed=0)
    assert "5000 columns and their gradients" in norm.refusal("triton", wide)
    trained = on_a_gpu(_on_cuda(requires_grad=True), dropout_p=0.1, seed=0)
    assert attention.refusal("triton", trained) is None


def test_old_gpus_are_refused(on_a_gpu, monkeypatch):
    monkeypatch.setattr(_backends.extension, "capability", lambda device: (7, 5))
    assert "7.5 is below 8.0" in OPS["attention"].refusal("triton", on_a_gpu())


def test_a_missing_triton_is_a_refusal(on_a_gpu, monkeypatch):
    monkeypatch.setattr(_backends.importlib.util, "find_spec", lambda name: None)
    _backends._no_triton.cache_clear()
    assert "not installed" in OPS["attention"].refusal("triton", on_a_gpu())
    _backends._no_triton.cache_clear()


def test_explain_names_the_choice_and_every_refusal():
    q = torch.randn(1, 4, 2, 8)
    told = ops.explain("attention", q, q, q, causal=True)
    assert told.backend == "torch"
    assert set(told.refusals) == {"cuda", "triton"}
    for word in ("torch would run", "cuda refuses", "triton refuses", "on the CPU"):
        assert word in str(told)
    assert ops.explain(ops.attention, q, q, q) == ops.explain("attention", q, q, q)


def test_explain_of_a_refused_request():
    q = torch.randn(1, 4, 2, 8)
    told = ops.explain("attention", q, q, q, backend="triton")
    assert told.backend is None
    assert "nothing would run, since triton was asked for" in str(told)


def test_explain_runs_nothing(monkeypatch):
    def run(**call):
        raise AssertionError("explain ran a backend")

    record = OPS["attention"]
    inert = {name: replace(backend, run=run) for name, backend in record.backends.items()}
    monkeypatch.setattr(record, "backends", inert)
    q = torch.randn(1, 4, 2, 8)
    assert ops.explain("attention", q, q, q).backend == "torch"
    with pytest.raises(AssertionError, match="ran a backend"):
        ops.attention(q, q, q)


def test_explain_refuses_what_the_op_would():
    q = torch.randn(1, 4, 2, 8)
    with pytest.raises(ValueError, match="unknown op 'atention'"):
        ops.explain("atention", q, q, q)
    with pytest.raises(ValueError, match="shaped like k"):
        ops.explain("attention", q, q, q[:, :2])
    with pytest.raises(ValueError, match="unknown backend"):
        ops.explain("attention", q, q, q, backend="opencl")


def test_an_explicit_refusal_raises_with_the_reason():
    q = torch.randn(1, 4, 2, 8)
    with pytest.raises(ops.BackendUnavailable, match="'triton' refuses: the tensors are on the"):
        ops.attention(q, q, q, backend="triton")
    assert issubclass(bertgpt.BackendUnavailable, RuntimeError)
    assert bertgpt.BackendUnavailable is ops.BackendUnavailable
