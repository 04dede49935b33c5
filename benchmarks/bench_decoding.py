"""Greedy decoding of GPT-2: a prompt of 32 tokens, then one token after another.

The floor of a step is its bytes: every weight once, and the cached keys and values. A result is
right when each token's score, in float64 with the same tokens before it, is the best one up to the
rounding of scores in the contenders' precision: two honest contenders may part at a near tie.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from bertgpt.benchmarks import models
from bertgpt.benchmarks.case import Case, Inputs, Provider, Run, Unavailable, not_on_cpu
from bertgpt.benchmarks.models import Spec


def _draw(
    generator: torch.Generator,
    device: torch.device,
    *,
    spec: Spec,
    shape: tuple[int, int],
    new: int,
) -> Inputs:
    ids = torch.randint(5, spec.vocabulary, shape, generator=generator, device=device)
    return {"input_ids": ids, "spec": spec, "new": new}


@torch.no_grad()
def _expected(inputs: Inputs, dtype: torch.dtype) -> Tensor:
    """The level that `_select` measures from; the baseline is off by its rounding of the scores."""
    ids = inputs["input_ids"][:1]
    exact = models.definition(inputs["spec"], torch.float64)(ids).logits[0, -1]
    level = exact.abs().max().expand(1, inputs["new"])
    if dtype == torch.float64:
        return level
    rounded = models.definition(inputs["spec"], dtype)(ids).logits[0, -1]
    return (level - (rounded.double() - exact).abs().max()).to(dtype)


@torch.no_grad()
def _select(inputs: Inputs, result: Tensor) -> Tensor:
    """The level less each chosen token's distance from the best score, in the first sequence."""
    if result.shape[1] != inputs["input_ids"].shape[1] + inputs["new"]:
        return result.new_zeros(1, 1, dtype=inputs["spec"].dtype)
    scores = models.definition(inputs["spec"], torch.float64)(result[:1]).logits[0]
    first = inputs["input_ids"].shape[1]
    scores, chosen = scores[first - 1 : -1], result[0, first:]
    gap = scores.max(-1).values - scores.gather(-1, chosen[:, None])[:, 0]
    level = _expected(inputs, torch.float64)
    same_prompt = bool((result[:1, :first] == inputs["input_ids"][:1]).all())
    return (level - gap if same_prompt else -level).to(inputs["spec"].dtype)


def _case(name: str, batch: int, new: int, prompt: int = 32, **options: Any) -> Case:
    device = options.get("device", "cuda")
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    spec = Spec(name, "GPT2LMHeadModel", device, dtype)
    # The prompt's pass and one for each token but the first, which the prompt's pass gives.
    weights = models.weight_bytes(spec, with_vocabulary=True)
    cached = 2.0 * spec.layers * spec.width * dtype.itemsize
    keys = sum(range(prompt + 1, prompt + new))
    return Case(
        op="gpt2 decode",
        name=f"{name} B{batch} {prompt}+{new} tokens",
        device=device,
        dtype=dtype,
        inputs=partial(_draw, spec=spec, shape=(batch, prompt), new=new),
        expected=_expected,
        select=_select,
        flops=batch * models.matrix_flops(spec, prompt + new - 1, prompt * prompt / 2 + keys, new),
        bytes=weights * new + batch * cached * keys,
        tokens=batch * new,
        value=options.get("value", 1.0),
        sets=2,
    )


def _cases() -> Iterator[Case]:
    for name in ("gpt2-124M", "gpt2-355M"):
        for batch in (1, 8, 64):
            yield _case(name, batch, 96, value=8 if name == "gpt2-124M" else 4)
        yield _case(name, 64, 32, prompt=960, value=6 if name == "gpt2-124M" else 3)
    yield _case("gpt2-tiny", 2, 4, prompt=8, device="cpu")


def _ours(case: Case, inputs: Inputs) -> Run:
    model: Any = models.ours(inputs["spec"])
    return lambda: model.generate(inputs["input_ids"], inputs["new"], eos_token_id=[])


def _stock(cache: str | None, case: Case, inputs: Inputs) -> Run:
    """Transformers' generate; with a static cache it compiles the step itself on a GPU."""
    if not models.has_transformers():
        raise Unavailable("transformers cannot be imported")
    model: Any = models.stock(inputs["spec"], "sdpa")
    options: dict[str, Any] = {"max_new_tokens": inputs["new"], "min_new_tokens": inputs["new"]}
    options |= {"do_sample": False, "cache_implementation": cache, "eos_token_id": None}
    ids = inputs["input_ids"]
    mask = torch.ones_like(ids)
    return lambda: model.generate(ids, attention_mask=mask, **options)


CASES: tuple[Case, ...] = tuple(_cases())
PROVIDERS: tuple[Provider, ...] = (
    Provider("bertgpt", _ours, ours=True),
    Provider("stock generate", partial(_stock, None)),
    Provider(
        "stock generate, static cache, compiled",
        partial(_stock, "static"),
        not_on_cpu("compiling takes longer than a CPU's small cases"),
    ),
)


def test_decoding(contest: Any) -> None:
    contest()
