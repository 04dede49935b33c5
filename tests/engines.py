"""Small engines for the tests, what a text is alone, and what a model says without a cache."""

import random

import torch
from models import GPT2

from bertgpt import Engine, gpt
from bertgpt.engine_loop import EngineLoop
from bertgpt.sampling import SamplingOptions

DRAWN = SamplingOptions(do_sample=True, temperature=0.9, top_p=0.95, seed=11)


def small_model(**config):
    """A GPT-2 of two layers with random weights and 96 positions."""
    torch.manual_seed(0)
    return gpt.GPT2LMHeadModel(gpt.GPT2Config(**{**GPT2, "n_positions": 96, **config})).eval()


def small_engine(model=None, **options):
    """An engine of a few small pages and rows."""
    sizes = {"num_pages": 40, "page_size": 8, "max_batch": 6, "prefill_tokens": 16, **options}
    return Engine(model or small_model(), **sizes)


def some_prompts(count, longest=40, seed=0):
    """Ragged prompts of random words."""
    rng = random.Random(seed)
    return [[rng.randrange(3, 61) for _ in range(rng.randint(1, longest))] for _ in range(count)]


def alone(request):
    """The texts that `generate` gives for a request's prompt, without any other."""
    sampling = request.sampling
    texts = request.engine.model.generate(
        [request.prompt], request.max_new_tokens, eos_token_id=request.stop_tokens,
        do_sample=sampling.do_sample, temperature=sampling.temperature, top_k=sampling.top_k,
        top_p=sampling.top_p, min_p=sampling.min_p, seed=sampling.seed,
        repetition_penalty=sampling.repetition_penalty, num_return_sequences=len(request.texts),
    )  # fmt: skip
    return [text[len(request.prompt) :] for text in texts]


def nothing_is_left(engine):
    """Whether an engine holds no page, no text and no request."""
    scheduler = engine._loop.scheduler
    return (
        engine.cache.num_free_pages == engine.cache.num_pages
        and not (scheduler.running or scheduler.waiting)
        and not (engine._live or engine._arrivals or engine._departures or engine._loop._rows)
    )


class Scores:
    """Compares the scores of every step with those of the whole text, read without a cache."""

    def __init__(self, monkeypatch):
        self.worst, self.largest, self.compared = 0.0, 0.0, 0
        choose = EngineLoop._choose

        def compare(loop, texts, scores):
            for text, row in zip(texts, scores, strict=True):
                whole = loop._model(torch.tensor([text.tokens])).logits[0, -1]
                self.worst = max(self.worst, (row - whole).abs().max().item())
                self.largest = max(self.largest, whole.abs().max().item())
                self.compared += 1
            return choose(loop, texts, scores)

        monkeypatch.setattr(EngineLoop, "_choose", compare)
