"""The engine: a text is what it is alone, pages come back, and one's error is nobody else's."""

import threading
from dataclasses import replace

import pytest
import torch
from engines import DRAWN, Scores, alone, nothing_is_left, small_engine, small_model, some_prompts
from models import genera_ids, needs_genera

from bertgpt import (
    GPTNeoConfig,
    GPTNeoForCausalLM,
    OpenAIGPTConfig,
    OpenAIGPTLMHeadModel,
    demo_data,
    engine_loop,
    gpt,
)
from bertgpt import engine as engine_module
from bertgpt.decode_step import DecodeStep
from bertgpt.engine import DeadlineExceeded
from bertgpt.sampling import SamplingOptions


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"sampling": DRAWN, "num_return_sequences": 3},
        {"sampling": SamplingOptions(repetition_penalty=1.3)},
        {"eos_token_id": [58, 9]},
    ],
    ids=["greedy", "three_drawn", "penalty", "stops"],
)
def test_a_batch_gives_what_generate_gives_alone(options):
    engine = small_engine(num_pages=14)
    prompts = some_prompts(10)
    requests = [engine.submit(prompt, 16, **options) for prompt in prompts]
    texts = [request.result() for request in requests]
    assert texts == [alone(request) for request in requests]
    assert engine.metrics().preemptions > 0, "the cache is too large for this test"
    assert nothing_is_left(engine)


@needs_genera
def test_a_real_checkpoints_scores_are_those_of_the_whole_text(monkeypatch):
    """Its scores are an order larger than those above, and so are the roundings of their sums."""
    scores = Scores(monkeypatch)
    model = gpt.GPT2LMHeadModel.from_pretrained(demo_data.genus_model().folder).eval()
    engine = small_engine(model, num_pages=15, prefill_tokens=8)
    requests = [engine.submit(ids, 24, eos_token_id=()) for ids in genera_ids()[:5]]
    assert [request.result() for request in requests] == [alone(r) for r in requests]
    assert scores.compared == 5 * 24
    assert scores.worst < 2e-6 * scores.largest
    assert engine.metrics().preemptions > 0


TINY = {"vocab_size": 61, "initializer_range": 0.3}


@pytest.mark.parametrize(
    "model",
    [
        lambda: OpenAIGPTLMHeadModel(
            OpenAIGPTConfig(**TINY, n_positions=64, n_embd=24, n_layer=2, n_head=3)
        ),
        lambda: GPTNeoForCausalLM(
            GPTNeoConfig(
                **TINY, max_position_embeddings=64, hidden_size=24, num_layers=2, num_heads=3,
                attention_types=[[["global", "local"], 1]], window_size=5,
            )
        ),
    ],
    ids=["gpt1", "gpt_neo"],
)  # fmt: skip
def test_other_decoders_are_served_too(monkeypatch, model):
    scores = Scores(monkeypatch)
    engine = small_engine(model().eval(), num_pages=12, prefill_tokens=8)
    requests = [engine.submit(p, 12, eos_token_id=()) for p in some_prompts(6, longest=30)]
    assert [request.result() for request in requests] == [alone(r) for r in requests]
    assert scores.compared == 6 * 12
    assert scores.worst < 1e-5
    assert nothing_is_left(engine)


def test_generate_is_the_models_own():
    engine, prompts = small_engine(), some_prompts(5)
    assert engine.generate(prompts, 8) == engine.model.generate(prompts, 8)
    assert engine.generate([], 8) == []


@pytest.mark.parametrize("prefill_tokens", [7, 64])
def test_scores_at_every_step_are_those_of_the_whole_text(monkeypatch, prefill_tokens):
    """Over forks, evictions, preemptions and chunk boundaries."""
    scores = Scores(monkeypatch)
    engine = small_engine(num_pages=14, prefill_tokens=prefill_tokens, prefix_reuse=True)
    shared = some_prompts(1, seed=5)[0] * 2
    for i, prompt in enumerate(some_prompts(12, longest=30, seed=6)):
        text = (shared[:20] if i % 2 else []) + prompt
        engine.submit(text, 12, sampling=replace(DRAWN, seed=i), num_return_sequences=1 + i % 3)
    engine.run()
    metrics = engine.metrics()
    assert scores.compared == metrics.new_tokens > 200
    assert scores.worst < 1e-5
    assert metrics.preemptions > 0
    assert metrics.reused_tokens > 0
    assert nothing_is_left(engine)


def test_requests_join_while_others_are_written():
    engine = small_engine()
    first = engine.submit([5, 6, 7], 20, eos_token_id=())
    for _ in range(4):
        assert engine.step()
    second = engine.submit([8] * 40, 4, eos_token_id=())
    seen = len(first.events)
    while not second.events:
        engine.step()
    assert len(first.events) - seen >= 3, "the prompt's three chunks held the other text up"
    assert [first.result(), second.result()] == [alone(first), alone(second)]


def test_iterating_gives_tokens_as_they_come():
    engine = small_engine()
    request = engine.submit([5, 6], 5, eos_token_id=(), return_log_probs=True)
    tokens = iter(request)
    new = next(tokens)
    assert len(request.events) == 1
    assert (new.text, new.finish_reason) == (0, None)
    events = [new, *tokens]
    assert [event.token for event in events] == alone(request)[0]
    assert events[-1].finish_reason == "length"
    logits = engine.model(torch.tensor([[5, 6]])).logits[0, -1]
    assert new.log_prob == pytest.approx(logits.log_softmax(-1)[new.token].item(), abs=1e-5)


def test_eight_samples_of_a_long_prompt_take_little_more_than_one():
    """Under 1.3 times the pages, and less than a page of each text is unused."""
    model, peaks = small_model(n_positions=540, n_layer=1), []
    prompt = some_prompts(1, seed=3)[0] * 40
    for n in (1, 8):
        engine = small_engine(model, num_pages=80, page_size=16, max_batch=8, prefill_tokens=256)
        engine.submit(prompt[:512], 16, sampling=DRAWN, num_return_sequences=n, eos_token_id=())
        used = []
        while engine.step():
            stats = engine.cache.stats()
            used.append(stats.used)
            if stats.fragmentation * stats.used >= n:  # set aside while the prompt is read
                assert engine.metrics().new_tokens == 0
        peaks.append(max(used))
    assert peaks[1] < 1.3 * peaks[0]


@pytest.mark.parametrize(("length", "new"), [(16, 1), (9, 8), (1, 16)])
def test_a_request_may_take_the_whole_cache(length, new):
    """The last token is never read, so it needs no room."""
    engine = small_engine(num_pages=2)
    requests = [engine.submit([word] * length, new, eos_token_id=()) for word in (5, 6)]
    for _ in range(2 * (new + 4)):
        engine.step()
    assert all(request.finished for request in requests)
    assert [request.result() for request in requests] == [alone(r) for r in requests]
    with pytest.raises(ValueError, match="3 pages of 8, and the whole cache has 2"):
        engine.submit([5] * length, new + 1)


def test_the_last_to_come_gives_way():
    engine = small_engine(num_pages=5)
    first, second = (engine.submit([word] * 10, 30, eos_token_id=()) for word in (5, 6))
    held = set()
    while engine.step():
        held.add(first.texts[0].sequence)
    assert len(held - {None}) == 1, "the first gave up its pages"
    assert engine.metrics().preemptions > 0
    assert second.result() == alone(second)


def test_the_higher_priority_takes_the_lowers_place():
    engine = small_engine(num_pages=8)
    low = engine.submit([5] * 20, 20, eos_token_id=())
    other = engine.submit([6] * 10, 20, eos_token_id=(), priority=1)
    for _ in range(6):
        engine.step()
    high = engine.submit([7] * 30, 20, eos_token_id=(), priority=2)
    order = []
    while engine.step():
        order += [r for r in (low, other, high) if r.finished and r not in order]
    order += [r for r in (low, other, high) if r not in order]
    assert order[0] is high
    assert order[-1] is low
    assert [r.result() for r in order] == [alone(r) for r in order]


def test_a_cancelled_request_gives_its_pages_back_at_once():
    engine = small_engine()
    gone, stays = (engine.submit([word] * 9, 20, eos_token_id=()) for word in (5, 6))
    waiting = engine.submit([7] * 9, 20)
    for _ in range(3):
        engine.step()
    before = engine.cache.num_free_pages
    gone.cancel()
    assert engine.cache.num_free_pages > before
    assert gone.finished
    waiting.cancel()
    count = len(gone.events)
    engine.run()
    gone.cancel()
    assert len(gone.events) == count == len(list(gone))
    assert (gone.error, gone.texts[0].finish_reason) == (None, "cancelled")
    assert stays.result() == alone(stays)
    assert engine.metrics().cancelled == 2
    assert nothing_is_left(engine)
    with pytest.raises(ValueError, match="another engine"):
        small_engine(engine.model).cancel(gone)


def test_a_deadline_ends_a_request(monkeypatch):
    now = 100.0
    monkeypatch.setattr(engine_module, "monotonic", lambda: now)
    engine = small_engine()
    late = engine.submit([5] * 9, 20, deadline=2.5, eos_token_id=())
    calm = engine.submit([6] * 9, 20, deadline=1000, eos_token_id=())
    for _ in range(4):
        engine.step()
    now = 102.5
    engine.step()
    assert late.finished
    assert late.texts[0].finish_reason == "deadline"
    assert late.tokens
    with pytest.raises(DeadlineExceeded, match=r"not finished after 2\.500 s"):
        late.result()
    assert calm.result() == alone(calm)
    assert nothing_is_left(engine)


@pytest.mark.parametrize("part", ["decode", "prefill"])
def test_a_failed_launch_ends_the_requests_of_its_step_alone(monkeypatch, part):
    engine = small_engine(max_batch=3)
    writing = [engine.submit([word] * 5, 12, eos_token_id=()) for word in (5, 6)]
    for _ in range(3):
        engine.step()
    arriving = engine.submit([7] * 40, 12, eos_token_id=())
    waiting = engine.submit([8] * 5, 12, eos_token_id=())
    where = (DecodeStep, "run") if part == "decode" else (engine_loop, "read_chunks")

    def fail(*args):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    with monkeypatch.context() as patch:
        patch.setattr(*where, fail)
        assert engine.step()
    failed, others = (writing, [arriving]) if part == "decode" else ([arriving], writing)
    for request in failed:
        assert request.finished
        with pytest.raises(RuntimeError, match="illegal memory access"):
            request.result()
    for request in (*others, waiting):
        assert request.result() == alone(request)
    assert engine.metrics().failed == len(failed)
    assert nothing_is_left(engine)


def test_scores_that_are_no_numbers_end_their_request_alone():
    model = small_model()
    with torch.no_grad():
        model.transformer.embeddings.position_embeddings.weight[12] = float("nan")
    engine = small_engine(model)
    for sampling in (SamplingOptions(), DRAWN):
        short, long = (engine.submit([5] * n, 6, sampling=sampling, eos_token_id=())
                       for n in (3, 9))  # fmt: skip
        assert short.result() == alone(short)
        with pytest.raises(ValueError, match="hold NaN"):
            long.result()
        assert len(long.tokens) == 4  # the last of them stands at position 12
    assert nothing_is_left(engine)


def test_a_tokenizer_that_fails_ends_its_request_alone():
    class Tokenizer:
        def decode(self, ids):
            if len(ids) > 4:
                raise KeyError("no such piece")
            return "".join(map(chr, ids))

    engine = small_engine()
    bad = engine.submit([5], 20, stop_strings="zzz", tokenizer=Tokenizer(), eos_token_id=())
    good = engine.submit([6], 20, eos_token_id=())
    assert good.result() == alone(good)
    with pytest.raises(KeyError, match="no such piece"):
        bad.result()
    assert nothing_is_left(engine)


def test_a_stop_string_ends_a_text():
    class Tokenizer:
        def decode(self, ids):
            return "".join(f"<{i}>" for i in ids)

    engine = small_engine()
    free = engine.submit([5, 6], 10, eos_token_id=()).result()[0]
    stop = f"{free[3]}>"
    request = engine.submit([5, 6], 10, stop_strings=stop, tokenizer=Tokenizer(), eos_token_id=())
    assert request.result()[0] == free[: free.index(free[3]) + 1]
    assert request.events[-1].finish_reason == "stop_string"


def test_an_interrupted_step_is_done_again(monkeypatch):
    engine = small_engine()
    requests = [engine.submit([word] * 20, 8, eos_token_id=()) for word in (5, 6)]
    for _ in range(4):
        engine.step()

    def interrupt(*args):
        raise KeyboardInterrupt

    for where in ((DecodeStep, "run"), (engine_loop, "read_chunks")):
        with monkeypatch.context() as patch:
            patch.setattr(*where, interrupt)
            with pytest.raises(KeyboardInterrupt):
                engine.step()
    assert [r.result() for r in requests] == [alone(r) for r in requests]
    assert nothing_is_left(engine)


def test_other_threads_may_submit_and_cancel():
    engine = small_engine()
    kept, gone = [], []

    def client(word):
        for i in range(6):
            kept.append(engine.submit([word] * (3 + i), 6, eos_token_id=()))
            gone.append(engine.submit([word] * (4 + i), 60, eos_token_id=()))
            gone[-1].cancel()

    threads = [threading.Thread(target=client, args=(word,)) for word in (5, 6, 7)]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads) or engine.step():
        engine.step()
    assert len(kept) == 18
    assert all(request.finished for request in (*kept, *gone))
    assert [request.result() for request in kept] == [alone(request) for request in kept]
    assert nothing_is_left(engine)


def test_metrics_count_what_was_done(monkeypatch):
    now = iter(range(1000))
    for module in (engine_module, engine_loop):
        monkeypatch.setattr(module, "monotonic", lambda: float(next(now)))
    engine = small_engine(prefix_reuse=True)
    engine.generate([[5] * 20, [6] * 3], 5, eos_token_id=())
    request = engine.submit([5] * 20, 1, eos_token_id=())
    request.result()
    # One tick each: submitting, a sweep, the choice of its token, the end of its only text.
    assert (request.time_to_first_token, request.finished_at - request.first_token_at) == (2, 1)
    assert request.time_per_token is None
    metrics = engine.metrics()
    assert (metrics.finished, metrics.failed, metrics.cancelled) == (3, 0, 0)
    assert (metrics.waiting, metrics.running) == (0, 0)
    assert metrics.new_tokens == 11
    assert (metrics.prompt_tokens, metrics.reused_tokens) == (20 + 3 + 4, 16)
    assert 0 < metrics.batch_fill <= 2 / 6
    assert metrics.decode_steps >= 4
    assert metrics.page_use == 0 < metrics.peak_page_use <= 1
    assert metrics.time_to_first_token > 0
    assert metrics.time_per_token > 0


def test_metrics_count_who_has_just_come():
    engine = small_engine()
    requests = [engine.submit([5] * 4, 2, eos_token_id=()) for _ in range(3)]
    assert engine.metrics().waiting == 3
    requests[1].cancel()
    assert engine.metrics().waiting == 2
    engine.step()
    metrics = engine.metrics()
    assert (metrics.waiting, metrics.running) == (0, 2)


def test_an_engine_says_why_it_uses_no_graph():
    assert small_engine().explain() == (
        "decoding steps launch their kernels one by one: the model is on the CPU, which has no "
        "CUDA graphs"
    )
