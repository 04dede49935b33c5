"""The engine when something goes wrong at an awkward moment: nobody hangs, nothing is lost."""

import asyncio
import threading
from contextlib import contextmanager, nullcontext

import pytest
import torch
from engines import alone, nothing_is_left, small_engine, small_model

from bertgpt import PagedKVCache, engine_loop
from bertgpt.engine_turn import Turn
from bertgpt.sampling import SamplingOptions


def interrupt(*args):
    raise KeyboardInterrupt


def failing(call):
    """A function that fails the first time it is given anything to do."""
    left = [1]

    def once(pages):
        if pages and left:
            left.pop()
            raise RuntimeError("launch failed")
        return call(pages)

    return once


def steps_to_the_end(engine):
    for _ in range(60):
        if not engine.step():
            return
    pytest.fail("the engine hangs")


def test_a_tiny_penalty_fails_nobody():
    model = small_model()
    with torch.no_grad():
        model.lm_head.weight.mul_(50)
    engine = small_engine(model)
    good = engine.submit([5, 6, 7], 8, eos_token_id=())
    odd = SamplingOptions(do_sample=True, repetition_penalty=1e-37, seed=1)
    other = engine.submit([5, 6, 8], 8, sampling=odd, eos_token_id=())
    engine.run()
    assert good.result() == alone(good)
    assert other.result() == alone(other)


@pytest.mark.parametrize("face", ["iterator", "asyncio"])
def test_a_step_of_another_thread_loses_no_token(face):
    """It ends the request when all but its last token have been handed on."""
    engine, looks = small_engine(), []
    request = engine.submit([5] * 9, 6, eos_token_id=())

    class Events(list):
        """Whose length, once the fifth token has been handed on, is out of date."""

        def __len__(self):
            length = super().__len__()
            looks.append(length)
            if looks.count(5) == 2:
                thread = threading.Thread(target=engine.step)
                thread.start()
                thread.join()
            return length

    request.events = Events()
    if face == "iterator":
        given = [new.token for new in request]
    else:

        async def follow():
            return [new.token async for new in engine._follow(request)]

        engine._arrivals.clear()  # to be followed is to arrive
        given = asyncio.run(follow())
    assert given == alone(request)[0]


def test_texts_that_have_just_forked_survive_an_interrupt(monkeypatch):
    engine = small_engine()
    sampling = SamplingOptions(do_sample=True, seed=3)
    request = engine.submit([5] * 9, 6, sampling=sampling, num_return_sequences=3, eos_token_id=())
    with monkeypatch.context() as patch:
        patch.setattr(engine_loop, "choose", interrupt)
        with pytest.raises(KeyboardInterrupt):
            engine.step()
    steps_to_the_end(engine)
    assert request.result() == alone(request)
    assert nothing_is_left(engine)


def test_pages_that_could_not_be_zeroed_are_zeroed_later():
    engine = small_engine(zero_on_free=True, num_pages=4)
    allocator = engine.cache.allocator
    requests = [engine.submit([word] * 9, new, eos_token_id=()) for word, new in ((5, 3), (6, 8))]
    allocator._clear = failing(allocator._clear)
    steps_to_the_end(engine)
    assert [request.result() for request in requests] == [alone(r) for r in requests]
    assert nothing_is_left(engine)
    assert not any(pages.any() for layer in engine.cache.layers for pages in layer)


def test_an_admission_that_fails_ends_its_request_alone():
    engine = small_engine(num_pages=8, zero_on_free=True, prefix_reuse=True)
    engine.generate([[word] * 30 for word in (3, 4, 5, 6)], 4, eos_token_id=())
    allocator = engine.cache.allocator
    allocator._clear = failing(allocator._clear)
    bad, good = (engine.submit([word] * 30, 4, eos_token_id=()) for word in (50, 51))
    steps_to_the_end(engine)
    with pytest.raises(RuntimeError, match="launch failed"):
        bad.result()
    assert good.result() == alone(good)
    assert nothing_is_left(engine)


@pytest.mark.parametrize("grow", ["allocate", "append"])
def test_pages_are_not_lost_when_zeroing_fails(grow):
    cache = PagedKVCache(
        4, 8, num_layers=1, num_kv_heads=1, head_dim=4, prefix_reuse=True, zero_on_free=True
    )
    for word in range(4):
        sequence = cache.allocate(8)
        cache.append([sequence], [8])
        for pages in cache.layers[0]:
            pages.fill_(1)
        cache.remember(sequence, [word] * 8)
        cache.free(sequence)
    assert cache.stats().cached == 4
    cache.allocator._clear = failing(cache.allocator._clear)
    known, empty = [0] * 8 + [9], cache.allocate(0)
    with pytest.raises(RuntimeError, match="launch failed"):
        cache.allocate(16, known) if grow == "allocate" else cache.append([empty], [8])
    assert cache.num_free_pages == 4
    sequence = cache.allocate(32)
    taken = cache.page_table([sequence])[0]
    assert not any(pages[taken].any() for pages in cache.layers[0])


def test_a_failed_step_lets_nobody_find_its_pages(monkeypatch):
    """What a device has not finished is nothing to begin with."""
    engine = small_engine(prefix_reuse=True)

    def fail(*args):
        raise RuntimeError("the device failed some time ago")

    with monkeypatch.context() as patch:
        patch.setattr(engine_loop, "choose", fail)
        bad = engine.submit([5] * 20, 3, eos_token_id=())
        steps_to_the_end(engine)
    assert bad.error is not None
    for layer in engine.cache.layers:
        for pages in layer:
            pages.fill_(7)  # whatever a kernel that did not end may leave
    good = engine.submit([5] * 20, 3, eos_token_id=())
    assert good.result() == alone(good)
    assert engine.metrics().reused_tokens == 0


def test_no_event_loop_is_kept():
    engine = small_engine()

    async def serve():
        return [new.token async for new in engine.stream([5, 6], 3, eos_token_id=())]

    for _ in range(3):
        assert len(asyncio.run(serve())) == 3
    assert not engine._steps._running


def test_a_loop_that_is_left_ends_its_request():
    engine = small_engine()
    request = engine.submit([5] * 20, 20, eos_token_id=())
    for _ in request:
        break
    assert request.texts[0].finish_reason == "cancelled"
    assert nothing_is_left(engine)


def test_an_interrupted_generate_leaves_nothing(monkeypatch):
    engine = small_engine()
    with monkeypatch.context() as patch:
        patch.setattr(engine_loop, "choose", interrupt)
        with pytest.raises(KeyboardInterrupt):
            engine.generate([[5] * 20, [6]], 20)
    assert nothing_is_left(engine)


def test_who_leaves_during_an_interrupted_step_is_gone(monkeypatch):
    engine = small_engine()
    stays, leaves = (engine.submit([word] * 9, 9, eos_token_id=()) for word in (5, 6))

    def leave(*args):
        leaves.cancel()
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(engine_loop, "choose", leave)
        with pytest.raises(KeyboardInterrupt):
            engine.step()
    assert leaves.finished
    assert stays.result() == alone(stays)
    assert nothing_is_left(engine)


def test_only_requests_can_be_cancelled():
    with pytest.raises(TypeError, match="what submit returned, not None"):
        small_engine().cancel(None)


def test_requests_without_a_seed_draw_their_own():
    engine, sampling = small_engine(), SamplingOptions(do_sample=True)

    def texts():
        return [engine.submit([5], 9, sampling=sampling, eos_token_id=()).result() for _ in "ab"]

    torch.manual_seed(4)
    first = texts()
    torch.manual_seed(4)
    assert texts() == first
    assert first[0] != first[1]


def test_a_client_that_leaves_zeroes_pages_in_a_turn_of_its_own():
    """Which puts it behind what the device still has to do for the last step."""
    engine, turns, cleared = small_engine(zero_on_free=True), [], []
    turn, clear = engine._loop.turn, engine.cache.allocator._clear

    @contextmanager
    def counted():
        with turn():
            turns.append(1)
            yield
            turns.pop()

    def watched(pages):
        cleared.append((len(turns), list(pages)))
        clear(pages)

    engine._loop.turn, engine.cache.allocator._clear = counted, watched
    request = engine.submit([5] * 20, 20, eos_token_id=())
    engine.step()
    cleared.clear()
    thread = threading.Thread(target=request.cancel)
    thread.start()
    thread.join()
    assert [count for count, pages in cleared if pages] == [1]
    assert nothing_is_left(engine)


def test_turns_on_other_streams_wait_for_the_one_before(monkeypatch):
    class Stream:
        def __init__(self):
            self.waited_for = []

        def wait_stream(self, other):
            self.waited_for.append(other)

    maker, first, second = Stream(), Stream(), Stream()
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: maker)
    turn = Turn(torch.device("cuda", 0))
    for stream in (first, first, second, second, first):
        monkeypatch.setattr(torch.cuda, "current_stream", lambda device, now=stream: now)
        with turn():
            assert not torch.is_grad_enabled()
    assert (first.waited_for, second.waited_for) == ([maker, second], [first])
