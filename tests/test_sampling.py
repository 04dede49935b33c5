"""Choosing tokens: options, and the kept set of transformers' processors; texts in any batch."""

import pytest
import torch
import transformers
from cases import generator, randn
from models import GPT2, Letters, genera_ids, needs_genera, random_ids, twins

from bertgpt import demo_data, generation, gpt, pack, paged_forward
from bertgpt.generation import NewToken
from bertgpt.sampling import (
    SamplingOptions,
    SamplingRows,
    choose,
    log_probabilities,
    penalise,
    seen_tokens,
)

DRAWN = {"do_sample": True, "seed": 7}


def stock_scores(logits, text, options):
    """What transformers' processors, in its order, leave of a row's scores."""
    stock = transformers.GPT2LMHeadModel(transformers.GPT2Config(n_layer=1, n_embd=8, n_head=1))
    config = transformers.GenerationConfig(**options)
    config._eos_token_tensor = None
    processors = stock._get_logits_processor(config, input_ids_seq_length=len(text), device="cpu")
    return processors(torch.tensor([text]), logits[None].clone())[0]


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 0.6},
        {"top_k": 5},
        {"top_p": 0.8},
        {"min_p": 0.2},
        {"temperature": 1.4, "min_p": 0.05},
        {"temperature": 0.7, "top_k": 9, "top_p": 0.9, "min_p": 0.1, "repetition_penalty": 1.5},
        {"temperature": 1.7, "top_k": 30, "top_p": 0.7, "min_p": 0.3, "repetition_penalty": 0.8},
        {"top_p": 0.5, "min_p": 0.3},
    ],
    ids=str,
)
def test_what_is_kept_and_how_often_is_as_in_transformers(options):
    draws = 4000
    text = [3, 8, 8, 20]
    logits = randn(40, scale=2.0, seed=len(str(options)))
    theirs = stock_scores(logits, text, {"do_sample": True, "top_k": 0, **options}).double()
    rows = SamplingRows.of([SamplingOptions(**DRAWN, **options)] * draws, range(draws))
    seen = seen_tokens(pack([text]), 40).expand(draws, -1)
    tokens = choose(logits.expand(draws, -1), rows, 0, seen)
    expected = theirs.softmax(0) * draws
    counts = torch.bincount(tokens, minlength=40).double()
    kept = theirs.isfinite()
    assert not counts[~kept].any()
    assert counts[expected > 20].all()
    assert ((counts - expected).abs() <= 5 * (expected + 1).sqrt()).all()


def test_the_penalty_is_stocks_bit_for_bit():
    scores, texts = randn(6, 50, scale=3.0), [[1, 2, 3], [4], [5, 5], [0, 49], [7], [8]]
    processor = transformers.RepetitionPenaltyLogitsProcessor(1.7)
    theirs = torch.cat(
        [processor(torch.tensor([t]), s[None]) for t, s in zip(texts, scores, strict=True)]
    )
    seen = seen_tokens(pack(texts), 50)
    assert penalise(scores, seen, torch.full((6,), 1.7)).equal(theirs)


def test_rows_of_every_kind_in_one_batch():
    """Each row is chosen as it would be alone, and as it is when others have left."""
    options = [
        SamplingOptions(),
        SamplingOptions(repetition_penalty=5.0),
        SamplingOptions(do_sample=True, seed=-3, temperature=0.5),
        SamplingOptions(do_sample=True, seed=2**64 - 1, top_k=3, min_p=0.1),
        SamplingOptions(do_sample=True, temperature=0),
    ]
    logits, seen = randn(5, 61), torch.rand(5, 61, generator=generator(1)) < 0.3
    rows = SamplingRows.of(options, [4, 0, 2, 9, 1])
    steps = torch.tensor([0, 3, 8, 1, 5])
    tokens = choose(logits, rows, steps, seen)
    for i, one in enumerate(options):
        alone = SamplingRows.of([one], [[4, 0, 2, 9, 1][i]])
        assert choose(logits[i : i + 1], alone, int(steps[i]), seen[i : i + 1]) == tokens[i]
    kept = torch.tensor([3, 1])
    assert choose(logits[kept], rows.take(kept), steps[kept], seen[kept]).equal(tokens[kept])
    assert tokens[0] == logits[0].argmax()
    assert tokens[4] == logits[4].argmax()


def test_options_draw_by_seed_sequence_and_step():
    logits = torch.zeros(200, 50)
    one = SamplingOptions(**DRAWN)
    first = choose(logits, SamplingRows.of([one] * 200, range(200)), 0)
    for other in (
        choose(logits, SamplingRows.of([one] * 200, range(200)), 1),
        choose(logits, SamplingRows.of([one] * 200, range(1, 201)), 0),
        choose(logits, SamplingRows.of([one.with_seed(8)] * 200, range(200)), 0),
    ):
        assert (first == other).float().mean() < 0.1


@needs_genera
def test_real_text_is_the_same_alone_and_in_a_batch_of_16():
    folder = demo_data.genus_model().folder
    model = gpt.GPT2LMHeadModel.from_pretrained(folder)
    prompts = [row[: 2 + i % 5] for i, row in enumerate((genera_ids() * 2)[:16])]
    seeds = list(range(100, 116))
    options = {"do_sample": True, "temperature": 1.1, "top_k": 200, "top_p": 0.95, "min_p": 0.001}
    options |= {"repetition_penalty": 1.1}
    together = model.generate(prompts, 20, seed=seeds, **options)
    assert len({tuple(text[len(p) :]) for text, p in zip(together, prompts, strict=True)}) == 16
    for i in (0, 9, 15):
        assert model.generate([prompts[i]], 20, seed=seeds[i], **options) == [together[i]]
    shuffled = model.generate(prompts[::-1], 20, seed=seeds[::-1], **options)
    assert shuffled == together[::-1]


def test_samples_share_their_prompts_pages(monkeypatch):
    caches = []

    class Watched(paged_forward.PagedKVCache):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            caches.append(self)

    monkeypatch.setattr(paged_forward, "PagedKVCache", Watched)
    model, _ = twins(gpt, "GPT2LMHeadModel", {**GPT2, "n_positions": 600})
    prompts = [random_ids(512).tolist(), random_ids(37).tolist()]
    options = {"do_sample": True, "seed": 3, "eos_token_id": ()}
    eight = model.generate(prompts, 8, num_return_sequences=8, **options)
    one = model.generate(prompts[:1], 8, **options)
    several, alone = caches
    assert several.num_free_pages == several.num_pages
    shared = several.num_pages - (2 + 8 * 1)  # the second prompt's: 37 tokens, 45 with its text
    assert shared < 1.3 * alone.num_pages
    assert eight[0] == one[0]  # the first of n is the one
    texts = [tuple(text[512:]) for text in eight[:8]]
    assert len(set(texts)) == 8
    for i, text in enumerate(eight):
        assert text[: len(prompts[i // 8])] == prompts[i // 8]
    few = model.generate(prompts[1:], 8, num_return_sequences=3, **options)
    assert few == eight[8:11]


def test_samples_of_a_tensor_stop_apart():
    model, _ = twins(gpt, "GPT2LMHeadModel", GPT2, pad_token_id=0)
    ids = random_ids(2, 4)
    options = {"do_sample": True, "seed": 5, "num_return_sequences": 4}
    free = model.generate(ids, 9, eos_token_id=(), **options)
    assert free.shape == (8, 13)
    assert free[:, :4].equal(ids.repeat_interleave(4, dim=0))
    stop = int(free[2, 7])
    ended = model.generate(ids, 9, eos_token_id=stop, **options)
    assert ended[2, 7] == stop
    for row, whole in zip(ended, free, strict=True):
        hits = (whole[4:] == stop).nonzero()
        length = 4 + int(hits[0]) + 1 if len(hits) else 13
        assert row[:length].equal(whole[:length])
        assert not row[length:].any()


@pytest.mark.parametrize("options", [{}, {**DRAWN, "repetition_penalty": 3.0}], ids=str)
def test_log_probabilities_are_those_of_the_whole_text_read_at_once(options):
    model, _ = twins(gpt, "GPT2LMHeadModel", GPT2)
    prompts = [random_ids(n).tolist() for n in (5, 2)]
    answer = model.generate(prompts, 9, eos_token_id=(), return_log_probs=True, **options)
    assert answer.sequences_scores is None
    for prompt, text, found in zip(prompts, answer.sequences, answer.log_probs, strict=True):
        logits = model(torch.tensor([text])).logits[0, len(prompt) - 1 : -1]
        exact = logits.log_softmax(-1).gather(1, torch.tensor(text[len(prompt) :])[:, None])[:, 0]
        assert torch.tensor(found).sub(exact).abs().max() < 1e-5


def test_log_probabilities_of_some_tokens_of_each_row():
    logits = randn(3, 7)
    tokens = torch.tensor([[0, 6], [3, 3], [1, 2]])
    assert log_probabilities(logits, tokens).allclose(logits.log_softmax(-1).gather(1, tokens))
    assert log_probabilities(logits.half(), tokens[:, 0]).dtype == torch.float32


def test_streamed_tokens_are_those_of_generate():
    model, _ = twins(gpt, "GPT2LMHeadModel", GPT2)
    prompts = [random_ids(n).tolist() for n in (5, 1, 8)]
    sampling = SamplingOptions(do_sample=True, temperature=0.9, seed=11)
    free = model.generate(prompts, 10, do_sample=True, temperature=0.9, seed=11, eos_token_id=())
    stop = free[1][4]
    whole = model.generate(prompts, 10, do_sample=True, temperature=0.9, seed=11, eos_token_id=stop)
    texts, ends = [list(p) for p in prompts], {}
    for new in model.stream(prompts, 10, sampling=sampling, eos_token_id=stop):
        assert new.text not in ends
        texts[new.text].append(new.token)
        if new.finish_reason:
            ends[new.text] = new.finish_reason
    assert texts == whole
    assert ends[1] == "stop_token"
    assert set(ends) == {0, 1, 2}
    first = next(model.stream(prompts, 3, return_log_probs=True))
    assert isinstance(first, NewToken)
    assert first.log_prob < 0
    with pytest.raises(ValueError, match="prompt 0 is empty"):
        model.stream([[]], 3)  # before the first token is asked for


def test_a_stream_that_is_left_changes_nothing_else():
    model, _ = twins(gpt, "GPT2LMHeadModel", GPT2)
    stream = model.stream([[5, 6]], 12)
    next(stream)
    assert torch.is_grad_enabled()
    stream.close()
    assert list(model.stream([[5, 6]], 12)) == list(model.stream([[5, 6]], 12))


def test_stop_strings_end_a_text_with_the_token_that_completes_one():
    model, _ = twins(gpt, "GPT2LMHeadModel", GPT2)
    prompts = [random_ids(n).tolist() for n in (5, 2, 3)]
    free = model.generate(prompts, 12, eos_token_id=())
    letters = Letters()
    wanted = [letters.decode(free[0][8:10]), letters.decode(free[2][6:9])]
    options = {"eos_token_id": (), "stop_strings": wanted, "tokenizer": letters}
    ended = model.generate(prompts, 12, **options)
    for text, whole, prompt in zip(ended, free, prompts, strict=True):
        shown = letters.decode(whole[len(prompt) :])
        ends = [shown.find(string) + len(string) for string in wanted if string in shown]
        assert text == whole[: len(prompt) + min(ends, default=12)]
    assert len(ended[0]) < 17
    assert len(ended[2]) < 15
    reasons = {new.text: new.finish_reason for new in model.stream(prompts, 12, **options)}
    assert reasons[0] == reasons[2] == "stop_string"


def test_a_row_that_nothing_can_be_drawn_by_is_named():
    model, _ = twins(gpt, "GPT2LMHeadModel", GPT2)
    with torch.no_grad():
        model.transformer.final_norm.bias.fill_(float("nan"))
    with pytest.raises(ValueError, match="row 0 of logits holds NaN"):
        model.generate([[5]], 3, do_sample=True)


def test_a_token_that_the_device_could_not_draw_is_named(monkeypatch):
    """As on a GPU, where nobody looks at the scores before."""
    model, _ = twins(gpt, "GPT2LMHeadModel", GPT2)
    monkeypatch.setattr(generation, "choose", lambda *_: torch.tensor([4, -1]))
    with pytest.raises(ValueError, match="text 1 has scores that hold NaN"):
        model.generate([[5], [6]], 3, do_sample=True)


def test_a_seed_is_drawn_from_torchs_generator_where_none_is_given():
    model, _ = twins(gpt, "GPT2LMHeadModel", GPT2)
    torch.manual_seed(4)
    first = model.generate([[5], [5]], 12, do_sample=True, eos_token_id=())
    torch.manual_seed(4)
    assert model.generate([[5], [5]], 12, do_sample=True, eos_token_id=()) == first
    assert first[0] != first[1]


def test_a_repetition_penalty_keeps_scores_finite():
    scores = torch.tensor([[50.0, -50.0, 1.0, -torch.inf, torch.nan, torch.inf]])
    seen = torch.ones_like(scores, dtype=torch.bool)
    most = torch.finfo(torch.float32).max
    tiny = penalise(scores, seen, torch.tensor([2.0**-126]))[0]
    assert tiny[:2].tolist() == [most, -50.0 * 2.0**-126]
    huge = penalise(scores, seen, torch.tensor([most]))[0]
    assert huge[1] == -most
    for worse in (tiny, huge):
        assert worse[4].isnan()
        assert (worse[3], worse[5]) == (-torch.inf, torch.inf)


def test_a_stream_without_a_seed_draws_its_own():
    model, _ = twins(gpt, "GPT2LMHeadModel", GPT2)
    sampling = SamplingOptions(do_sample=True)

    def text():
        return [new.token for new in model.stream([[5]], 12, sampling=sampling, eos_token_id=())]

    torch.manual_seed(4)
    first, second = text(), text()
    torch.manual_seed(4)
    assert first != second
    assert text() == first


def test_greedy_texts_draw_no_seed():
    model, _ = twins(gpt, "GPT2LMHeadModel", GPT2)
    before = torch.get_rng_state()
    model.generate([[5]], 3)
    assert torch.get_rng_state().equal(before)
