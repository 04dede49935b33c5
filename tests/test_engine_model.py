"""The engine beside what else is done with its model: other modes, other weights, another place."""

import gc
import threading
import weakref
from dataclasses import replace

import pytest
import torch
from engines import (
    DRAWN,
    Scores,
    alone,
    nothing_is_left,
    small_engine,
    small_model,
    some_prompts,
)
from test_decode_step import traced
from torch.optim.optimizer import register_optimizer_step_post_hook

from bertgpt import DecodeBatch, PagedKVCache, engine_loop, weight_watch
from bertgpt.sampling import SamplingOptions


@pytest.fixture(params=[True, False], ids=["made_inside", "stepped_inside"])
def modes(request):
    """Inference mode for making and not for stepping, or the other way round."""
    return torch.inference_mode(request.param), torch.inference_mode(not request.param)


def test_an_engine_is_made_in_one_mode_and_stepped_in_another(modes):
    make, step = modes
    with make:
        engine = small_engine(small_model(), num_pages=14, zero_on_free=True)
    sampling = SamplingOptions(do_sample=True, repetition_penalty=1.2, seed=3)
    calls = {"sampling": sampling, "num_return_sequences": 2, "eos_token_id": ()}
    requests = [engine.submit([word] * 20, 16, **calls) for word in (5, 6, 7)]
    for _ in range(4):
        with step:
            engine.step()
        with make:
            engine.step()
    assert [request.result() for request in requests] == [alone(r) for r in requests]
    assert nothing_is_left(engine)


def test_a_cache_is_made_in_one_mode_and_written_in_another(modes):
    make, write = modes
    with make:
        cache = PagedKVCache(4, 8, num_layers=1, num_kv_heads=1, head_dim=2)
        batch = DecodeBatch(cache, 2, 16)
        first = cache.allocate(8)
        cache.append([first], [3])
    with write:
        batch.advance([first, cache.fork(first)])
        assert batch.lengths.tolist() == [4, 4]
        assert batch.slots.tolist() == [1 * 8 + 3, 3]
        cache.free(first)


def test_a_stream_is_begun_in_one_mode_and_read_in_another(modes):
    begin, read = modes
    model = small_model()
    expected = model.generate([[5, 6, 5]], 6, repetition_penalty=1.5, eos_token_id=())
    sampling = SamplingOptions(repetition_penalty=1.5)
    with begin:
        stream = model.stream([[5, 6, 5]], 6, sampling=sampling, eos_token_id=())
        given = [next(stream).token]
    with read:
        given += [new.token for new in stream]
    assert [[5, 6, 5, *given]] == expected


@pytest.mark.parametrize("part", ["model", "layer"])
def test_no_step_is_taken_in_training_mode(part):
    engine = small_engine()
    request = engine.submit([5] * 9, 6, eos_token_id=())
    engine.step()
    (engine.model if part == "model" else engine.model.transformer.layers[0]).train()
    gone = engine.submit([6] * 9, 6)
    with pytest.raises(RuntimeError, match=r"training mode.* call model\.eval\(\)"):
        engine.step()
    gone.cancel()
    assert gone.finished
    assert not request.finished
    engine.model.eval()
    assert request.result() == alone(request)
    assert nothing_is_left(engine)


def other_weights(model):
    return {name: torch.randn_like(weight) for name, weight in model.state_dict().items()}


def by_an_optimizer(model):
    for weight in model.parameters():
        weight.grad = torch.randn_like(weight)
    torch.optim.AdamW(model.parameters(), lr=0.3, fused=True).step()


def by_data(model):
    for weight in model.parameters():
        weight.data = torch.randn_like(weight)


def by_a_module(model):
    other = small_model()
    other.load_state_dict(other_weights(other))
    model.transformer.layers[0] = other.transformer.layers[0]


CHANGES = {
    "loaded": lambda model: model.load_state_dict(other_weights(model)),
    "assigned": lambda model: model.load_state_dict(other_weights(model), assign=True),
    "optimized": by_an_optimizer,
    "data": by_data,
    "module": by_a_module,
}


@pytest.fixture(params=CHANGES)
def change(request):
    return CHANGES[request.param]


def test_nothing_that_other_weights_read_is_reused(change):
    torch.manual_seed(1)
    engine = small_engine(prefix_reuse=True)
    engine.submit([5] * 30, 3, eos_token_id=()).result()
    change(engine.model)
    request = engine.submit([5] * 30, 12, eos_token_id=())
    assert request.result() == alone(request)
    assert engine.metrics().reused_tokens == 0
    again = engine.submit([5] * 30, 12, eos_token_id=())
    assert again.result() == alone(again)
    assert engine.metrics().reused_tokens == 24, "all was forgotten once more"


def test_a_text_goes_on_with_the_new_weights(change):
    """Captured graphs, too, read weights where they were."""
    torch.manual_seed(1)
    engine = small_engine()
    traced(engine)
    requests = [engine.submit([word] * 9, 16, eos_token_id=()) for word in (5, 6)]
    for _ in range(6):
        engine.step()
    change(engine.model)
    begun = [request.prompt + request.tokens for request in requests]
    engine.run()
    for request, text in zip(requests, begun, strict=True):
        left = 16 + 9 - len(text)
        assert engine.model.generate([text], left, eos_token_id=())[0] == (
            request.prompt + request.tokens
        )
    assert nothing_is_left(engine)


def test_texts_that_fit_a_step_go_on_while_weights_change_at_each():
    engine = small_engine(prefill_tokens=16)
    long = engine.submit([6] * 20, 4, priority=-1, eos_token_id=())
    short = [engine.submit([word] * 9, 7, eos_token_id=()) for word in (5, 7)]
    for _ in range(3 * 7):
        with torch.no_grad():
            engine.model.transformer.layers[1].norm_1.weight.add_(0.01)
        engine.step()
    assert [len(request.tokens) for request in short] == [7, 7]
    assert long.tokens == [], "it waits for two steps with the same weights"
    assert long.result() == alone(long)


def test_every_score_is_by_the_weights_of_its_step(monkeypatch):
    """Over forks, evictions, preemptions and known prefixes, while weights change now and then."""
    scores = Scores(monkeypatch)
    engine = small_engine(num_pages=14, prefix_reuse=True)
    for i, prompt in enumerate(some_prompts(8, longest=20)):
        sampling = replace(DRAWN, seed=i)
        engine.submit([7] * 16 + prompt, 10, sampling=sampling, num_return_sequences=1 + i % 3)
    steps = 0
    while engine.step():
        steps += 1
        if steps % 7 == 0:
            with torch.no_grad():
                engine.model.transformer.layers[1].norm_1.weight.add_(0.1)
    metrics = engine.metrics()
    assert scores.compared == metrics.new_tokens > 100
    assert scores.worst < 1e-5
    assert metrics.reused_tokens > 0
    assert nothing_is_left(engine)


def test_what_torch_does_not_count_can_be_told():
    torch.manual_seed(1)
    engine = small_engine(prefix_reuse=True)
    engine.submit([5] * 30, 3, eos_token_id=()).result()
    for weight in engine.model.parameters():
        weight.data.normal_()
    engine.forget()
    request = engine.submit([5] * 30, 12, eos_token_id=())
    assert request.result() == alone(request)


def test_a_training_run_elsewhere_forgets_nothing():
    engine = small_engine(prefix_reuse=True)
    for _ in range(2):
        by_an_optimizer(small_model())
        engine.submit([5] * 30, 3, eos_token_id=()).result()
    assert engine.metrics().reused_tokens == 24


def test_an_engine_that_is_gone_watches_no_optimizer():
    engine = small_engine()
    gone = weakref.ref(engine)
    watched = len(weight_watch._watches)
    del engine
    gc.collect()
    assert gone() is None
    assert len(weight_watch._watches) < watched


@pytest.mark.parametrize("what", ["made", "gone"])
def test_engines_come_and_go_while_an_optimizer_steps(what):
    """As when another thread makes one, or drops its last, which the collector then finds."""
    model = small_model()
    engines = [small_engine(model)]

    def meanwhile(*args):
        if what == "made":
            engines.append(small_engine(model))
        else:
            engines.clear()
            gc.collect()

    hook = register_optimizer_step_post_hook(meanwhile)
    last = register_optimizer_step_post_hook(lambda *args: None)
    try:
        by_an_optimizer(model)
    finally:
        hook.remove()
        last.remove()
    assert len(engines) == (2 if what == "made" else 0)


def test_engines_are_made_while_others_are_told(monkeypatch):
    """The set of them does not grow while it is listed."""
    model = small_model()
    engines = [small_engine(model)]
    thread = threading.Thread(target=lambda: engines.append(small_engine(model)))
    iterate = weakref.WeakSet.__iter__

    def slowly(watches):
        for watch in iterate(watches):
            if thread.ident is None:
                thread.start()
                thread.join(0.2)
            yield watch

    monkeypatch.setattr(weakref.WeakSet, "__iter__", slowly)
    by_an_optimizer(model)
    thread.join()
    assert len(engines) == 2


def test_a_change_is_waited_for_before_anything_is_read(monkeypatch):
    """On a GPU weights may still be on their way, on a stream that no step waits for."""
    engine, calls = small_engine(), []
    monkeypatch.setattr(engine_loop, "wait_for_device", lambda device: calls.append(device.type))
    monkeypatch.setattr(engine.cache, "forget", lambda: calls.append("forget"))
    engine.submit([5] * 9, 6, eos_token_id=())
    engine.step()
    engine.step()
    assert calls == []
    CHANGES["loaded"](engine.model)
    engine.run()
    assert calls == ["cpu", "forget"]


def test_what_is_told_while_a_step_forgets_is_seen_by_the_next(monkeypatch):
    engine, forgotten = small_engine(), []

    def forget():
        forgotten.append(1)
        if len(forgotten) == 1:  # as another thread may at this moment
            engine.forget()

    monkeypatch.setattr(engine.cache, "forget", forget)
    engine.forget()
    counts = []
    for _ in range(3):
        engine.step()
        counts.append(len(forgotten))
    assert counts == [1, 2, 2]


def test_a_model_of_another_dtype_is_named_and_the_requests_wait():
    engine = small_engine()
    request = engine.submit([5] * 9, 6, sampling=DRAWN, eos_token_id=())
    engine.step()
    engine.model.double()
    for _ in range(2):
        with pytest.raises(RuntimeError, match=r"torch\.float64 on cpu now, and .*float32 on cpu"):
            engine.step()
    engine.model.float()
    assert request.result() == alone(request)
