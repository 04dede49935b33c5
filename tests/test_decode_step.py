"""A decoding step as a CUDA graph runs it: traced once, on tensors that stay where they are."""

import threading
from contextlib import nullcontext
from unittest.mock import Mock

import pytest
import torch
from engines import alone, nothing_is_left, small_engine, some_prompts
from torch.fx.experimental.proxy_tensor import make_fx

from bertgpt.decode_step import CudaCapture, _buckets, wait_for_device


class Traced:
    """Stands for a graph's capture: what Python computed while tracing is never computed again.

    Like a captured graph, the trace holds the tensors that it read by their addresses, and launches
    the same operators on them each time; it gives its answer in the same tensor.
    """

    def __init__(self):
        self.captures, self.replays = 0, 0

    def __call__(self, step):
        self.captures += 1
        graph = make_fx(step)()
        output = step().clone()

        def replay():
            self.replays += 1
            return output.copy_(graph())

        return replay


def traced(engine):
    """Lets an engine on a CPU replay its steps from traces."""
    step = engine._loop.decode_step
    step.refusal, step._new_capture = None, Traced
    step.recapture()
    return step._capture


def test_replayed_steps_give_the_same_texts():
    engine = small_engine(num_pages=14)
    capture = traced(engine)
    requests = [engine.submit(p, 16, eos_token_id=()) for p in some_prompts(10)]
    texts = [request.result() for request in requests]
    assert texts == [alone(request) for request in requests]
    assert engine.metrics().preemptions > 0, "the cache is too large for this test"
    assert 1 < capture.captures <= len(_buckets(6)) == 4
    assert capture.replays == engine.metrics().decode_steps - capture.captures
    assert nothing_is_left(engine)
    assert engine.explain() == (
        "the forward pass of decoding steps, up to the scores, is replayed from one CUDA graph for "
        "each batch of 1, 2, 4, 6 texts; choosing the tokens follows outside the graph"
    )


def test_a_capture_that_fails_is_told_and_costs_no_request():
    engine = small_engine()

    def fail(step):
        raise RuntimeError("operation not permitted when stream is capturing")

    step = engine._loop.decode_step
    step.refusal, step._capture = None, fail
    request = engine.submit([5] * 4, 8, eos_token_id=())
    assert request.result() == alone(request)
    assert engine.explain() == (
        "decoding steps launch their kernels one by one: capturing a step of 1 texts failed: "
        "operation not permitted when stream is capturing"
    )


def test_nobody_waits_for_the_device_during_a_capture(monkeypatch):
    """Another engine's, in another thread: CUDA would refuse the wait and drop the capture."""
    order, began, go_on = [], threading.Event(), threading.Event()

    def step():
        began.set()
        go_on.wait(5)
        order.append("captured")

    monkeypatch.setattr(torch.cuda, "CUDAGraph", Mock)
    monkeypatch.setattr(torch.cuda, "graph", lambda graph, **options: nullcontext())
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: order.append(str(device)))
    capture = threading.Thread(target=CudaCapture(), args=[step])
    wait = threading.Thread(target=wait_for_device, args=[torch.device("cuda", 1)])
    capture.start()
    assert began.wait(5)
    wait.start()
    wait.join(0.1)
    go_on.set()
    capture.join()
    wait.join()
    wait_for_device(torch.device("cpu"))
    assert order == ["captured", "cuda:1"]


@pytest.mark.parametrize(
    ("most", "expected"),
    [(1, (1,)), (2, (1, 2)), (3, (1, 2, 3)), (6, (1, 2, 4, 6)), (64, (1, 2, 4, 8, 16, 32, 64))],
)
def test_buckets_are_powers_of_two_and_the_most(most, expected):
    assert _buckets(most) == expected


@pytest.mark.gpu
def test_a_gpu_replays_graphs():
    engine = small_engine(num_pages=14)
    engine.model.cuda()
    engine = small_engine(engine.model, num_pages=14)
    assert "replayed from one CUDA graph" in engine.explain()
    requests = [engine.submit(p, 16, eos_token_id=()) for p in some_prompts(10)]
    assert [request.result() for request in requests] == [alone(r) for r in requests]
    weights = {n: torch.randn_like(w) for n, w in engine.model.state_dict().items()}
    engine.model.load_state_dict(weights, assign=True)
    moved = engine.submit([5] * 9, 16, eos_token_id=())
    assert moved.result() == alone(moved)
    assert torch.cuda.is_available()
    assert "replayed from one CUDA graph" in engine.explain()
