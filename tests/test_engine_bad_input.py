"""Bad requests and engines: refused at once, by name, and the engine goes on."""

import pytest
import torch
from engines import DRAWN, alone, nothing_is_left, small_engine, small_model

from bertgpt import (
    Engine,
    gpt,
)
from bertgpt.sampling import SamplingOptions


class Bytes:
    def decode(self, ids):
        return ""


@pytest.mark.parametrize(
    ("error", "message", "call"),
    [
        (ValueError, "is empty", {"prompt": []}),
        (TypeError, "prompt must be a list or 1-D tensor of .* not 'words'", {"prompt": "words"}),
        (TypeError, "prompt must be a list or 1-D .* not 2-D", {"prompt": torch.ones(1, 2)}),
        (TypeError, "prompt must be a list or 1-D tensor of .* not None", {"prompt": None}),
        (TypeError, "max_new_tokens must be an integer, not None", {"max_new_tokens": None}),
        (TypeError, "integers|token ids", {"prompt": [1.5]}),
        (IndexError, "input_ids holds 61", {"prompt": [61]}),
        (ValueError, "leaves room for", {"prompt": [5] * 97}),
        (ValueError, "leaves room for 6 more", {"prompt": [5] * 90, "max_new_tokens": 7}),
        (ValueError, "8 pages of 8, and the whole cache has 5",
         {"prompt": [5] * 40, "max_new_tokens": 20}),
        (ValueError, "max_new_tokens must be at least 1", {"max_new_tokens": 0}),
        (TypeError, "max_new_tokens must be an integer", {"max_new_tokens": 2.5}),
        (IndexError, "eos_token_id holds 61", {"eos_token_id": 61}),
        (TypeError, "eos_token_id must be", {"eos_token_id": "2"}),
        (TypeError, "sampling must be SamplingOptions", {"sampling": {"top_p": 0.5}}),
        (ValueError, "goes with do_sample=True", {"num_return_sequences": 2}),
        (ValueError, "more than max_batch=6", {"num_return_sequences": 7, "sampling": DRAWN}),
        (TypeError, "need a tokenizer", {"stop_strings": "x"}),
        (ValueError, "must hold strings that are not empty",
         {"stop_strings": [""], "tokenizer": Bytes()}),
        (TypeError, "return_log_probs must be", {"return_log_probs": 1}),
        (TypeError, r"priority must be an int, not 1\.5", {"priority": 1.5}),
        (TypeError, "deadline must be a number", {"deadline": "soon"}),
        (ValueError, "deadline must be a finite number", {"deadline": 0}),
        (ValueError, "deadline must be a finite number", {"deadline": 10**400}),
        (ValueError, "deadline must be a finite number", {"deadline": float("nan")}),
    ],
)  # fmt: skip
def test_bad_input_is_refused_at_once_and_the_engine_goes_on(error, message, call):
    engine = small_engine(num_pages=5)
    good = engine.submit([5] * 4, 4)
    engine.step()
    with pytest.raises(error, match=message):
        engine.submit(**{"prompt": [5], "max_new_tokens": 2, **call})
    assert good.result() == alone(good)
    assert nothing_is_left(engine)


class Tongueless:
    def decode(self, ids):
        raise RuntimeError("this tokenizer cannot decode")


@pytest.mark.parametrize(
    "call",
    [
        {"priority": "x"},
        {"deadline": -1},
        {"num_return_sequences": 7},
        {"prompt": [5] * 40, "max_new_tokens": 20},
        {"stop_strings": "x", "tokenizer": Tongueless()},
    ],
    ids=lambda call: next(iter(call)),
)
def test_a_refused_request_draws_no_seed(call):
    engine, state = small_engine(num_pages=5), torch.get_rng_state()
    sampling = SamplingOptions(do_sample=True)
    with pytest.raises((TypeError, ValueError, RuntimeError)):
        engine.submit(**{"prompt": [5], "max_new_tokens": 2, "sampling": sampling, **call})
    with pytest.raises(ValueError, match="is empty"):
        engine.generate([[5], []], 4, sampling=sampling)
    assert torch.equal(torch.get_rng_state(), state)


def test_a_bad_prompt_in_a_list_begins_none_of_it():
    engine = small_engine()
    with pytest.raises(ValueError, match="is empty"):
        engine.generate([[5], []], 4)
    with pytest.raises(TypeError, match="a tensor's rows may be padded"):
        engine.generate(torch.ones(2, 3, dtype=torch.int64), 4)
    assert nothing_is_left(engine)


@pytest.mark.parametrize("top_p", [0.0, -0.1, 1.1, float("nan")])
def test_top_p_outside_its_range_is_refused(top_p):
    with pytest.raises(ValueError, match="top_p must lie in"):
        SamplingOptions(do_sample=True, top_p=top_p)


def test_a_wrong_engine_is_refused():
    model = small_model()
    with pytest.raises(TypeError, match="max_batch must be an int, not True"):
        small_engine(model, max_batch=True)
    with pytest.raises(ValueError, match="prefill_tokens must be at least 1, not 0"):
        small_engine(model, prefill_tokens=0)
    with pytest.raises(TypeError, match=r"such as bertgpt\.GPT2LMHeadModel, not GPT2Model"):
        Engine(model.transformer, num_pages=4)
    with pytest.raises(ValueError, match=r"call model\.eval\(\) first"):
        Engine(gpt.GPT2LMHeadModel(model.config).train(), num_pages=4)


@pytest.mark.parametrize("kind", [list, torch.tensor])
def test_a_prompt_is_checked_on_the_host(kind):
    """On a meta model any device-to-host copy raises: a stand-in for a wait on a GPU."""
    engine = small_engine(small_model().to("meta"))
    request = engine.submit(kind([5, 6, 7]), 4, stop_strings="x", tokenizer=Bytes())
    assert request.prompt == [5, 6, 7]
    with pytest.raises(IndexError, match="input_ids holds 61"):
        engine.submit(kind([5, 61]), 4)
