"""Many requests of every kind through a cache too small for them, with clients that go away."""

import ctypes
import gc
import random
from pathlib import Path
from resource import getpagesize

import pytest
from engines import alone, nothing_is_left, small_engine, small_model, some_prompts

from bertgpt.sampling import SamplingOptions

GROWTH = 4 * 2**20  # bytes


def resident():
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    return int(Path("/proc/self/statm").read_text().split()[1]) * getpagesize()


def options(rng):
    """What a request asks for: greedy or drawn, one text or some, a penalty, a priority."""
    drawn = rng.random() < 0.5
    sampling = SamplingOptions(
        do_sample=drawn,
        temperature=rng.choice([0.7, 1.0, 1.3]) if drawn else 1.0,
        top_k=rng.choice([0, 5, 20]) if drawn else 0,
        top_p=rng.choice([0.8, 1.0]) if drawn else 1.0,
        min_p=rng.choice([0.0, 0.05]) if drawn else 0.0,
        repetition_penalty=rng.choice([1.0, 1.0, 1.2]),
        seed=rng.getrandbits(32) if drawn else None,
    )
    return {
        "max_new_tokens": rng.randint(1, 40),
        "sampling": sampling,
        "num_return_sequences": rng.choice([1, 2, 4]) if drawn else 1,
        "priority": rng.randint(0, 2),
        "eos_token_id": rng.sample(range(3, 61), 2),
    }


def soak(engine, count, seed=0):
    """Requests that arrive while others are written, of which a fifth is cancelled; all of them."""
    rng = random.Random(seed)
    prompts = some_prompts(count, longest=50, seed=seed)
    head = prompts[0] * 4  # many prompts begin alike
    requests, live = [], []
    while len(requests) < count or live:
        for _ in range(rng.randint(0, 3)):
            if len(requests) < count:
                prompt = head[: rng.choice([0, 0, 17, 33])] + prompts[len(requests)]
                requests.append(engine.submit(prompt[:54], **options(rng)))
                live.append(requests[-1])
        if live and rng.random() < 0.05:
            rng.choice(live).cancel()
        before = engine.metrics().prompt_tokens
        engine.step()
        assert engine.metrics().prompt_tokens - before <= 16
        assert len(engine._loop.scheduler.running) <= 6
        live = [request for request in live if not request.finished]
    return requests


def check(engine, requests):
    """Completed texts are what they are alone; returns how many were cancelled."""
    assert nothing_is_left(engine)
    cancelled = 0
    for request in requests:
        assert request.error is None
        texts, reasons = request.result(), {text.finish_reason for text in request.texts}
        assert len(request.events) == sum(map(len, texts))
        whole = alone(request)
        for text, expected in zip(request.texts, whole, strict=True):
            if text.finish_reason == "cancelled":
                assert text.new_tokens == expected[: len(text.new_tokens)]
            else:
                assert text.new_tokens == expected
        cancelled += "cancelled" in reasons
    metrics = engine.metrics()
    assert (metrics.finished, metrics.cancelled) == (len(requests) - cancelled, cancelled)
    assert metrics.failed == 0
    assert metrics.preemptions > len(requests) // 20, "the cache is too large for this test"
    assert metrics.reused_tokens > 0
    return cancelled


def test_forty_requests():
    engine = small_engine(num_pages=16, prefix_reuse=True)
    assert check(engine, soak(engine, 40)) > 2


@pytest.mark.slow
def test_five_hundred_requests():
    model = small_model()
    soak(small_engine(model, num_pages=16, prefix_reuse=True), 100, seed=1)  # fills what is filled
    engine = small_engine(model, num_pages=16, prefix_reuse=True)
    before = resident()
    requests = soak(engine, 500, seed=2)
    spent = resident() - before
    assert len(requests) == 500
    assert spent < GROWTH
    assert check(engine, requests) > 25
