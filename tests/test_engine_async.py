"""The engine's asyncio face: tokens as they come, shared steps, and clients that go away."""

import asyncio
import threading

import pytest
from engines import DRAWN, alone, nothing_is_left, small_engine, some_prompts

from bertgpt import engine as engine_module
from bertgpt import engine_loop
from bertgpt.engine import DeadlineExceeded


async def tokens_of(stream):
    return [new.token async for new in stream]


def test_streams_give_what_generate_gives_alone():
    engine, prompts = small_engine(num_pages=20), some_prompts(9)

    async def serve():
        streams = [engine.stream(p, 10, sampling=DRAWN, eos_token_id=()) for p in prompts]
        return await asyncio.gather(*map(tokens_of, streams))

    texts = asyncio.run(serve())
    expected = [engine.submit(p, 10, sampling=DRAWN, eos_token_id=()) for p in prompts]
    assert texts == [alone(request)[0] for request in expected]
    assert engine.metrics().batch_fill > 0.3, "the streams did not share their steps"
    engine.run()
    assert asyncio.run(serve()) == texts, "a second event loop"


def test_tokens_come_one_by_one():
    engine = small_engine()

    async def serve():
        left = []
        async for new in engine.stream([5, 6], 8, eos_token_id=()):
            left.append(8 - len(left) - engine.metrics().new_tokens)
            assert (new.finish_reason is None) == (len(left) < 8)
        return left

    assert asyncio.run(serve()) == [7 - 2 * i for i in range(8)]


def test_a_closed_stream_gives_its_pages_back():
    engine = small_engine()

    async def serve():
        stream = engine.stream([5] * 20, 40, eos_token_id=())
        other = asyncio.create_task(tokens_of(engine.stream([6] * 9, 12, eos_token_id=())))
        async for _ in stream:
            break
        await stream.aclose()
        return await other

    text = asyncio.run(serve())
    request = engine.submit([6] * 9, 12, eos_token_id=())
    assert text == alone(request)[0]
    request.cancel()
    assert engine.metrics().cancelled == 2
    assert nothing_is_left(engine)


def test_a_cancelled_task_gives_its_pages_back():
    engine = small_engine()

    async def serve():
        tasks = [
            asyncio.create_task(tokens_of(engine.stream([word] * 9, 80, eos_token_id=())))
            for word in (5, 6, 7)
        ]
        while engine.metrics().new_tokens < 6:
            await asyncio.sleep(0)
        for task in tasks:
            task.cancel()
        return await asyncio.gather(*tasks, return_exceptions=True)

    ends = asyncio.run(serve())
    assert [type(end) for end in ends] == [asyncio.CancelledError] * 3
    assert engine.metrics().cancelled == 3
    assert nothing_is_left(engine)


def test_a_stream_that_nobody_reads_begins_nothing():
    engine = small_engine()

    async def serve():
        await engine.stream([5], 4).aclose()

    asyncio.run(serve())
    assert nothing_is_left(engine)


def test_a_stream_raises_what_ended_its_request(monkeypatch):
    engine = small_engine()

    def fail(*args):
        raise RuntimeError("no launch")

    async def serve():
        await tokens_of(engine.stream([5] * 9, 4))

    with pytest.raises(ValueError, match="is empty"):
        engine.stream([], 4)
    monkeypatch.setattr(engine_loop, "read_chunks", fail)
    with pytest.raises(RuntimeError, match="no launch"):
        asyncio.run(serve())
    assert nothing_is_left(engine)


def test_a_deadline_is_told_of_while_a_step_runs(monkeypatch):
    """Another request's long prompt, say; the late one's pages are free when that step ends."""
    engine, read, release, steps = small_engine(), engine_loop.read_chunks, threading.Event(), []

    def slowly(*args):
        release.wait(timeout=30)
        steps.append(1)
        return read(*args)

    async def serve():
        monkeypatch.setattr(engine_loop, "read_chunks", slowly)
        long = asyncio.create_task(tokens_of(engine.stream([6] * 16, 3, eos_token_id=())))
        late = engine.stream([5] * 9, 20, deadline=0.05, eos_token_id=())
        with pytest.raises(DeadlineExceeded, match="not finished after"):
            await tokens_of(late)
        assert not steps, "it waited for the step"
        release.set()
        return await long

    text = asyncio.run(serve())
    assert text == alone(engine.submit([6] * 16, 3, eos_token_id=()))[0]
    engine.run()
    assert (engine.metrics().failed, engine.metrics().cancelled) == (1, 0)
    assert nothing_is_left(engine)


def test_who_comes_back_after_the_deadline_hears_of_it(monkeypatch):
    now = 100.0
    monkeypatch.setattr(engine_module, "monotonic", lambda: now)
    engine = small_engine()

    async def serve():
        nonlocal now
        stream = engine.stream([5] * 9, 20, deadline=2.5, eos_token_id=())
        await anext(stream)
        now = 103.0
        assert engine.metrics().running == 1, "nobody has stepped since"
        with pytest.raises(DeadlineExceeded, match=r"not finished after 3\.000 s"):
            await tokens_of(stream)

    asyncio.run(serve())
    assert nothing_is_left(engine)
