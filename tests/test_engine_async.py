"""The engine's asyncio face: tokens as they come, shared steps, and clients that go away."""

import asyncio

import pytest
from engines import DRAWN, alone, nothing_is_left, small_engine, some_prompts

from bertgpt import engine_loop


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
