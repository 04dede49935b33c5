"""Greedy decoding on the paged cache: stock's tokens, any batch, and its limits."""

import pytest
import torch
import transformers
from models import GPT2, Letters, genera_ids, needs_genera, padded, random_ids, twins

from bertgpt import demo_data, generation, gpt, paged_forward
from bertgpt.kv_cache import PagedKVCache


@needs_genera
def test_real_checkpoint_gives_stocks_64_tokens():
    folder = demo_data.genus_model().folder
    model = gpt.GPT2LMHeadModel.from_pretrained(folder)
    stock = transformers.GPT2LMHeadModel.from_pretrained(folder, attn_implementation="eager").eval()
    rows = genera_ids()[:4]
    ids, mask = padded(rows, "left")
    # Without a stop token, so that all 64 are compared.
    stock.generation_config.eos_token_id = None
    theirs = stock.generate(ids, attention_mask=mask, max_new_tokens=64, do_sample=False)
    assert model.generate(ids, 64, attention_mask=mask, eos_token_id=()).equal(theirs)


def test_stops_and_padding_are_stocks():
    """Rows end at different steps: each stop keeps its token and is padded after it."""
    model, stock = twins(gpt, "GPT2LMHeadModel", GPT2, pad_token_id=0)
    ids, mask = padded([random_ids(n).tolist() for n in (3, 1, 5, 2)], "left")
    free = model.generate(ids, 12, attention_mask=mask, eos_token_id=())[:, ids.shape[1] :]
    stops = sorted({int(free[0, 2]), int(free[1, 5])})
    stock.generation_config.eos_token_id = stops
    theirs = stock.generate(ids, attention_mask=mask, max_new_tokens=12, do_sample=False)
    ours = model.generate(ids, 12, attention_mask=mask, eos_token_id=stops)
    assert ours.equal(theirs)
    lists = model.generate(
        [row[m.bool()] for row, m in zip(ids, mask, strict=True)], 12, eos_token_id=stops
    )
    for row, m, listed in zip(theirs, mask, lists, strict=True):
        real = row[-len(m) - 12 :][torch.cat([m, m.new_ones(12)]).bool()].tolist()
        assert listed == real[: len(listed)]
        assert len(listed) - int(m.sum()) == 12 or listed[-1] in stops
    assert (ours[:, -1] == 0).any(), "no row ended early: choose other stops"


@pytest.mark.parametrize("penalty", [1.3, 5.0])
def test_a_repetition_penalty_gives_stocks_tokens(penalty):
    model, stock = twins(gpt, "GPT2LMHeadModel", GPT2, pad_token_id=0)
    ids, mask = padded([random_ids(n).tolist() for n in (3, 1, 8, 2)], "left")
    stock.generation_config.eos_token_id = None
    run = {"attention_mask": mask, "do_sample": False, "repetition_penalty": penalty}
    theirs = stock.generate(ids, **run, max_new_tokens=14)
    assert model.generate(ids, 14, eos_token_id=(), **run).equal(theirs)
    assert not model.generate(ids, 14, attention_mask=mask, eos_token_id=()).equal(theirs)


def test_the_mask_is_read_off_the_padding_token_as_in_stock():
    model, _ = twins(gpt, "GPT2LMHeadModel", GPT2, pad_token_id=0)
    ids, mask = padded([random_ids(n).tolist() for n in (3, 1, 5)], "left")
    assert model.generate(ids, 4).equal(model.generate(ids, 4, attention_mask=mask))


def test_a_prompt_alone_gives_what_it_gives_in_a_batch():
    model, _ = twins(gpt, "GPT2LMHeadModel", GPT2)
    prompts = [random_ids(n).tolist() for n in (7, 1, 12, 3)]
    together = model.generate(prompts, 12)
    assert together == [model.generate([prompt], 12)[0] for prompt in prompts]


@pytest.mark.parametrize("page_size", [8, 64])
def test_page_size_changes_nothing(page_size, monkeypatch):
    model, _ = twins(gpt, "GPT2LMHeadModel", GPT2)
    prompts = [random_ids(n).tolist() for n in (7, 9)]
    expected = model.generate(prompts, 12)
    monkeypatch.setattr(generation, "PAGE_SIZE", page_size)
    assert model.generate(prompts, 12) == expected


def test_pages_come_back_as_sequences_finish(monkeypatch):
    free_pages = []

    class Watched(PagedKVCache):
        def free(self, sequence):
            super().free(sequence)
            free_pages.append((self.num_free_pages, self.num_pages))

    monkeypatch.setattr(paged_forward, "PagedKVCache", Watched)
    model, _ = twins(gpt, "GPT2LMHeadModel", GPT2)
    first = model.generate([[5, 6]], 1)[0][-1]
    free_pages.clear()
    model.generate([[5, 6], [7]], 6, eos_token_id=first)
    assert len(free_pages) == 2
    assert free_pages[0][0] < free_pages[0][1]  # while the other still decodes
    assert free_pages[1][0] == free_pages[1][1]


def test_prompts_of_tensors_and_none_at_all():
    model, _ = twins(gpt, "GPT2LMHeadModel", GPT2)
    rows = [[5, 6, 7], [8]]
    assert model.generate([torch.tensor(row) for row in rows], 3) == model.generate(rows, 3)
    assert model.generate([], 3) == []


def test_training_state_is_left_alone():
    model, _ = twins(gpt, "GPT2LMHeadModel", GPT2)
    model.generate([[5]], 2)
    assert all(parameter.grad is None for parameter in model.parameters())
    assert model(random_ids(1, 3), labels=random_ids(1, 3)).loss.requires_grad


def test_max_length_counts_the_prompt():
    model, stock = twins(gpt, "GPT2LMHeadModel", GPT2, pad_token_id=0)
    prompts = [random_ids(n).tolist() for n in (3, 7)]
    limited = model.generate(prompts, max_length=9, eos_token_id=())
    assert [len(text) for text in limited] == [9, 9]
    longer = model.generate(prompts, 6, eos_token_id=())
    assert limited == [text[:9] for text in longer]
    ids, mask = padded(prompts, "left")
    stock.generation_config.eos_token_id = None
    theirs = stock.generate(ids, attention_mask=mask, max_length=9, do_sample=False)
    assert model.generate(ids, max_length=9, attention_mask=mask, eos_token_id=()).equal(theirs)
    with pytest.raises(ValueError, match="prompt 1 has 7 tokens already: max_length=7"):
        model.generate(prompts, max_length=7)


@pytest.mark.parametrize(
    ("error", "message", "call"),
    [
        (ValueError, "prompt 1 is empty", {"prompts": [[3], []]}),
        (ValueError, "position table", {"prompts": [[3] * 30]}),
        (ValueError, "room for 4 more", {"prompts": [[3] * 20], "max_new_tokens": 5}),
        (ValueError, "max_new_tokens", {"prompts": [[3]], "max_new_tokens": 0}),
        (IndexError, "input_ids holds 61", {"prompts": [[61]]}),
        (TypeError, "list of lists", {"prompts": [3]}),
        (TypeError, "integers", {"prompts": [["a"]]}),
        (ValueError, r"\[B, L\]", {"prompts": torch.ones(3, dtype=torch.long)}),
        (ValueError, "attention_mask", {"prompts": [[3]], "attention_mask": torch.ones(1, 1)}),
        (IndexError, "64 bits", {"prompts": [[2**64]]}),
        (TypeError, "max_new_tokens must be an integer", {"prompts": [[3]], "max_new_tokens": 2.5}),
        (TypeError, "eos_token_id must be .* not '2'", {"prompts": [[3]], "eos_token_id": "2"}),
        (TypeError, "eos_token_id must be", {"prompts": [[3]], "eos_token_id": [2, 1.5]}),
        (TypeError, "eos_token_id must be", {"prompts": [[3]], "eos_token_id": 1.5}),
        (TypeError, "pad_token_id must be", {"prompts": [[3]], "pad_token_id": "0"}),
        (IndexError, "eos_token_id holds 61, outside", {"prompts": [[3]], "eos_token_id": [2, 61]}),
        (ValueError, "one of max_new_tokens", {"prompts": [[3]], "max_length": 5}),
        (ValueError, "one of max_new_tokens", {"prompts": [[3]], "max_new_tokens": None}),
        (ValueError, "top_p must lie", {"prompts": [[3]], "do_sample": True, "top_p": 0.0}),
        (ValueError, "min_p must lie", {"prompts": [[3]], "do_sample": True, "min_p": 1.5}),
        (ValueError, "temperature=0.5 goes with", {"prompts": [[3]], "temperature": 0.5}),
        (ValueError, "top_k=3 goes with do_sample", {"prompts": [[3]], "top_k": 3}),
        (ValueError, "seed=0 goes with do_sample", {"prompts": [[3]], "seed": 0}),
        (ValueError, "seed=7 goes with do", {"prompts": [[3]], "num_beams": 2, "seed": [7]}),
        (ValueError, "repetition_penalty must", {"prompts": [[3]], "repetition_penalty": 0.0}),
        (TypeError, "do_sample must be True", {"prompts": [[3]], "do_sample": 1}),
        (TypeError, "top_k must be an int", {"prompts": [[3]], "do_sample": True, "top_k": 2.0}),
        (
            TypeError,
            "temperature must be",
            {"prompts": [[3]], "do_sample": True, "temperature": "1"},
        ),
        (TypeError, "seed must be an int", {"prompts": [[3]], "seed": "a"}),
        (ValueError, "seed must lie in", {"prompts": [[3]], "seed": 2**64}),
        (ValueError, "2 seeds for 1", {"prompts": [[3]], "do_sample": True, "seed": [1, 2]}),
        (TypeError, "each seed must be", {"prompts": [[3]], "do_sample": True, "seed": [None]}),
        (ValueError, "exclude each other", {"prompts": [[3]], "do_sample": True, "num_beams": 2}),
        (
            ValueError,
            "more than num_beams=2",
            {"prompts": [[3]], "num_beams": 2, "num_return_sequences": 3},
        ),
        (ValueError, "goes with do_sample=True or", {"prompts": [[3]], "num_return_sequences": 2}),
        (ValueError, "num_return_sequences must", {"prompts": [[3]], "num_return_sequences": 0}),
        (ValueError, "length_penalty=2.0 goes with", {"prompts": [[3]], "length_penalty": 2.0}),
        (ValueError, "early_stopping=True goes", {"prompts": [[3]], "early_stopping": True}),
        (
            ValueError,
            'or "never", not .soon',
            {"prompts": [[3]], "num_beams": 2, "early_stopping": "soon"},
        ),
        (
            TypeError,
            "length_penalty must be",
            {"prompts": [[3]], "num_beams": 2, "length_penalty": "1"},
        ),
        (
            ValueError,
            "length_penalty must lie in",
            {"prompts": [[3]], "num_beams": 2, "length_penalty": float("inf")},
        ),
        (
            ValueError,
            "length_penalty must lie in",
            {"prompts": [[3]], "num_beams": 2, "length_penalty": -400.0},
        ),
        (ValueError, "pad_token_id must lie in", {"prompts": [[3]], "pad_token_id": -5}),
        (ValueError, "pad_token_id must lie in", {"prompts": [[3]], "pad_token_id": 10**30}),
        (TypeError, "need a tokenizer", {"prompts": [[3]], "stop_strings": "a"}),
        (
            ValueError,
            "strings that are not empty",
            {"prompts": [[3]], "stop_strings": ["a", ""], "tokenizer": Letters()},
        ),
        (
            TypeError,
            "stop_strings must be a string",
            {"prompts": [[3]], "stop_strings": 3, "tokenizer": Letters()},
        ),
        (TypeError, "return_log_probs must", {"prompts": [[3]], "return_log_probs": 1}),
    ],
)
def test_bad_input_is_named(error, message, call):
    model = gpt.GPT2LMHeadModel(gpt.GPT2Config(**GPT2)).eval()
    with pytest.raises(error, match=message):
        model.generate(**{"max_new_tokens": 2, **call})


def test_a_wrong_sampling_is_named():
    model = gpt.GPT2LMHeadModel(gpt.GPT2Config(**GPT2)).eval()
    for sampling in ({"do_sample": True}, "x", {}):
        with pytest.raises(TypeError, match="sampling must be SamplingOptions, not"):
            model.stream([[3]], 2, sampling=sampling)


def test_no_prompts_give_no_texts():
    model = gpt.GPT2LMHeadModel(gpt.GPT2Config(**GPT2)).eval()
    nothing = torch.zeros(0, 4, dtype=torch.int64)
    assert model.generate(nothing, 3).shape == (0, 4)
    assert model.generate(nothing, 3, num_beams=2).shape == (0, 4)


@pytest.mark.parametrize("options", [{}, {"num_beams": 2}], ids=["greedy", "beams"])
def test_scores_that_are_no_numbers_are_named(options):
    model, _ = twins(gpt, "GPT2LMHeadModel", GPT2)
    with torch.no_grad():
        model.transformer.final_norm.bias.fill_(float("nan"))
    with pytest.raises(ValueError, match="hold NaN"):
        model.generate([[5], [6]], 3, **options)
