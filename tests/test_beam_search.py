"""Beam search: transformers' sequences and scores, shared pages, and what ends a search."""

import pytest
import torch
import transformers
from models import GPT2, Letters, genera_ids, needs_genera, padded, random_ids, twins

from bertgpt import demo_data, gpt, paged_forward
from bertgpt.beam_search import Beam, Search
from bertgpt.generation_job import BeamOptions, StopWhen


def assert_like_stock(model, stock, rows, new, stops, **options):
    """Tokens and scores of ragged rows, padded on the left for stock."""
    ids, mask = padded(rows, "left")
    stock.generation_config.eos_token_id = list(stops) or None
    theirs = stock.generate(
        ids,
        attention_mask=mask,
        max_new_tokens=new,
        do_sample=False,
        output_scores=True,
        return_dict_in_generate=True,
        **options,
    )
    ours = model.generate(
        ids, new, attention_mask=mask, eos_token_id=stops, return_log_probs=True, **options
    )
    added = ours.sequences[:, ids.shape[1] :]
    for text, tokens, log_probs in zip(
        theirs.sequences[:, ids.shape[1] :], added, ours.log_probs, strict=True
    ):
        count = len(log_probs)
        assert text[:count].equal(tokens[:count])
        assert not set(text[count:].tolist()) - {*stops, 0, -1}  # padding
    difference = theirs.sequences_scores - torch.tensor(ours.sequences_scores)
    assert (difference.abs() <= 1e-5 * theirs.sequences_scores.abs().clamp(min=1)).all()
    return ours


@needs_genera
@pytest.mark.parametrize(
    "options",
    [{"num_beams": 4}, {"num_beams": 3, "num_return_sequences": 2, "length_penalty": 0.5}],
    ids=str,
)
def test_real_checkpoint_gives_stocks_64_tokens(options):
    folder = demo_data.genus_model().folder
    model = gpt.GPT2LMHeadModel.from_pretrained(folder)
    stock = transformers.GPT2LMHeadModel.from_pretrained(folder, attn_implementation="eager").eval()
    ours = assert_like_stock(model, stock, genera_ids()[:4], 64, (), **options)
    assert all(len(log_probs) == 64 for log_probs in ours.log_probs)


@pytest.mark.parametrize("num_beams", [2, 5])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"early_stopping": True},
        {"length_penalty": 0.5, "early_stopping": "never"},
        {"length_penalty": -1.0},
        {"length_penalty": 0.0, "early_stopping": "never"},
        {"repetition_penalty": 1.6},
    ],
    ids=str,
)
def test_texts_that_end_at_different_steps_are_stocks(num_beams, options):
    model, stock = twins(gpt, "GPT2LMHeadModel", GPT2, pad_token_id=0)
    rows = [random_ids(n).tolist() for n in (3, 1, 7, 2, 5)]
    free = model.generate(rows, 14, eos_token_id=(), num_beams=num_beams)
    stops = sorted({free[0][6], free[1][5], free[2][12], free[3][9]})
    ours = assert_like_stock(
        model, stock, rows, 14, stops,
        num_beams=num_beams, num_return_sequences=num_beams, **options,
    )  # fmt: skip
    assert len({len(log_probs) for log_probs in ours.log_probs}) > 2, "choose other stops"


def test_a_prompt_alone_gives_what_it_gives_in_a_batch():
    model, _ = twins(gpt, "GPT2LMHeadModel", GPT2)
    rows = [random_ids(n).tolist() for n in (7, 1, 12, 3)]
    options = {"num_beams": 3, "num_return_sequences": 2}
    together = model.generate(rows, 12, **options)
    alone = [text for row in rows for text in model.generate([row], 12, **options)]
    assert together == alone
    assert model.generate([], 3, **options) == []


def test_log_probabilities_are_those_of_the_whole_text_read_at_once():
    model, _ = twins(gpt, "GPT2LMHeadModel", GPT2)
    prompts = [random_ids(n).tolist() for n in (5, 2)]
    options = {"num_beams": 3, "repetition_penalty": 2.0, "return_log_probs": True}
    answer = model.generate(prompts, 9, eos_token_id=(), **options)
    for prompt, text, found in zip(prompts, answer.sequences, answer.log_probs, strict=True):
        logits = model(torch.tensor([text])).logits[0, len(prompt) - 1 : -1]
        exact = logits.log_softmax(-1).gather(1, torch.tensor(text[len(prompt) :])[:, None])[:, 0]
        assert torch.tensor(found).sub(exact).abs().max() < 1e-5


def test_beams_share_pages_and_give_all_back(monkeypatch):
    caches, least = [], []

    class Watched(paged_forward.PagedKVCache):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            caches.append(self)

        def append(self, *args):
            slots = super().append(*args)
            least.append(self.num_free_pages)
            return slots

    monkeypatch.setattr(paged_forward, "PagedKVCache", Watched)
    model, _ = twins(gpt, "GPT2LMHeadModel", {**GPT2, "n_positions": 600})
    model.generate([random_ids(512).tolist()], 8, num_beams=8, eos_token_id=())
    (cache,) = caches
    assert cache.num_pages == 32 + 8
    assert min(least) == 0  # eight beams apart, each on one page of its own
    assert cache.num_free_pages == cache.num_pages


def test_stop_strings_end_beams():
    model, _ = twins(gpt, "GPT2LMHeadModel", GPT2)
    prompt, letters = random_ids(4).tolist(), Letters()
    free = model.generate([prompt], 9, num_beams=3, eos_token_id=())[0]
    string = letters.decode(free[7:9])
    ended = model.generate(
        [prompt], 9, num_beams=3, num_return_sequences=3, eos_token_id=(), early_stopping=True,
        stop_strings=string, tokenizer=letters,
    )  # fmt: skip
    assert free[:9] in ended
    for text in ended:
        shown = letters.decode(text[4:])
        assert string not in shown[:-1]
        assert shown.endswith(string) or len(text) == 13


@pytest.mark.parametrize(
    ("early_stopping", "length_penalty", "done"),
    [(True, 1.0, True), (False, 1.0, True), ("never", 1.0, False), ("never", -1.0, True)],
)
def test_what_ends_a_search_early(early_stopping, length_penalty, done):
    """One beam; −2 at a stop token, after which the best that runs has −3 at one token of ten."""
    options = BeamOptions(2, length_penalty, early_stopping)
    search = Search(options, StopWhen([9], (), None), 10, [Beam()])
    assert search.candidates == 4
    search.advance([(-2.0, 0, 9, []), (-2.5, 0, 9, []), (-3.0, 0, 4, []), (-3.5, 0, 5, [])])
    assert [beam.tokens for beam in search.running] == [[4], [5]]
    assert [beam.score for beam in search.finished] == [-2.0, -2.5]
    assert search.done is done


def test_only_the_best_beams_may_end_and_the_worst_of_them_gives_way():
    search = Search(BeamOptions(2), StopWhen([9], (), None), 10, [Beam()])
    search.advance([(-1.0, 0, 3, []), (-2.0, 0, 4, []), (-3.0, 0, 9, []), (-4.0, 0, 5, [])])
    assert search.finished == []  # the stop token is third of two
    assert [beam.tokens for beam in search.running] == [[3], [4]]
    search.advance([(-1.5, 0, 9, []), (-5.0, 1, 9, []), (-6.0, 0, 3, []), (-7.0, 1, 3, [])])
    assert [beam.score for beam in search.finished] == [-0.75, -2.5]
    assert search.done  # −6 over two tokens cannot beat −2.5
    assert [beam.parent for beam in search.running] == [0, 1]
