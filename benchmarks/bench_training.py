"""Training steps of BERT and GPT-2: loss, gradients, AdamW; with the memory at its peak.

Ours gives the loss without the scores (`skip_logits`), and packs what comes padded within its time.

The learning rate is 0, so that the step does all of its work and the weights stay what the
definition was evaluated on. Compared is the gradient of the token embeddings. A step ends without
gradients, so that its peak of memory is theirs and the activations' above weights and AdamW's
state. FLOPs: three times the forward pass. Bytes: weights read twice and gradients written, and
AdamW's read and written state.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache, partial
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from bertgpt.benchmarks import models
from bertgpt.benchmarks.case import (
    Case,
    Inputs,
    Provider,
    Run,
    Unavailable,
    all_of,
    needs_cuda,
    needs_package,
    not_on_cpu,
)
from bertgpt.benchmarks.models import Spec
from bertgpt.benchmarks.real_lengths import real_lengths


def _draw(
    generator: torch.Generator, device: torch.device, *, spec: Spec, lengths: tuple[int, ...]
) -> Inputs:
    """Ids, padded on the right, and labels: GPT-2 learns every next token, BERT a random 15%."""
    shape = (len(lengths), max(lengths))
    ids = torch.randint(5, spec.vocabulary, shape, generator=generator, device=device)
    labels = ids.clone()
    if spec.head.startswith("Bert"):
        hidden = torch.rand(shape, generator=generator, device=device) < 0.15
        labels = labels.masked_fill(~hidden, -100)
    arguments = {"input_ids": ids, "labels": labels}
    if len(set(lengths)) > 1:
        columns = torch.arange(shape[1], device=device)
        mask = columns < torch.tensor(lengths, device=device)[:, None]
        arguments = {
            "input_ids": ids * mask,
            "attention_mask": mask.long(),
            "labels": labels.masked_fill(~mask, -100),
        }
    return {**arguments, "spec": spec}


def _arguments(inputs: Inputs) -> dict[str, Tensor]:
    """What goes to a model."""
    return {name: value for name, value in inputs.items() if name != "spec"}


def _rows(model: Any, ids: Tensor) -> Tensor:
    """The gradient of the embeddings of the first sequence's first tokens, as one row."""
    rows: Tensor = model.get_input_embeddings().weight.grad[ids[0, :64]]
    return rows.flatten()[None].clone()


def _expected(inputs: Inputs, dtype: torch.dtype) -> Tensor:
    model = models.definition(inputs["spec"], dtype)
    model.zero_grad(set_to_none=True)
    model(**_arguments(inputs)).loss.backward()
    gradient = _rows(model, inputs["input_ids"])
    model.zero_grad(set_to_none=True)
    return gradient


def _case(name: str, label: str, lengths: tuple[int, ...], **options: Any) -> Case:
    device, gpt = options.get("device", "cuda"), name.startswith("gpt2")
    head = "GPT2LMHeadModel" if gpt else "BertForMaskedLM"
    spec = Spec(name, head, device, torch.bfloat16 if device == "cuda" else torch.float32)
    tokens, pairs = sum(lengths), sum(n**2 for n in lengths) * (0.5 if gpt else 1.0)
    scored = tokens if gpt else 0.15 * tokens
    return Case(
        op="gpt2 training step" if gpt else "bert training step",
        name=f"{name} B{len(lengths)} {label}",
        device=device,
        dtype=spec.dtype,
        inputs=partial(_draw, spec=spec, lengths=lengths),
        expected=_expected,
        flops=3.0 * models.matrix_flops(spec, tokens, pairs, scored),
        bytes=9.0 * models.weight_bytes(spec, with_vocabulary=True),
        tokens=tokens,
        value=options.get("value", 1.0),
        factor=6.0,
        sets=2,
    )


def _cases() -> Iterator[Case]:
    yield _case("bert-base", "S512", (512,) * 16, value=8)
    yield _case("bert-large", "S512", (512,) * 8, value=4)
    yield _case("gpt2-124M", "S1024", (1024,) * 8, value=8)
    yield _case("gpt2-355M", "S1024", (1024,) * 4, value=4)
    yield _case("bert-mini", "tweets", real_lengths("tweets", 8), device="cpu")
    yield _case("bert-tiny", "S16", (16,) * 2, device="cpu")
    yield _case("gpt2-tiny", "S16", (16,) * 2, device="cpu")


@lru_cache(maxsize=4)  # one for each contender: the state belongs to the step's memory
def _optimizer(model: Any) -> torch.optim.Optimizer:
    fused = next(model.parameters()).device.type == "cuda"
    return torch.optim.AdamW(model.parameters(), lr=0.0, weight_decay=0.0, fused=fused)


def _step(model: Any, forward: Any, inputs: Inputs) -> Run:
    def run() -> Tensor:
        optimizer = _optimizer(model)
        forward(**_arguments(inputs)).loss.backward()
        optimizer.step()
        rows = _rows(model, inputs["input_ids"])
        optimizer.zero_grad(set_to_none=True)
        return rows

    return run


def _ours(case: Case, inputs: Inputs) -> Run:
    model = models.ours(inputs["spec"])
    return _step(model, partial(model, skip_logits=True), inputs)


def _stock(attention: str, compiled: bool, case: Case, inputs: Inputs) -> Run:
    if not models.has_transformers():
        raise Unavailable("transformers cannot be imported")
    model = models.stock(inputs["spec"], attention)
    forward = torch.compile(model, dynamic=False) if compiled else model
    return _step(model, forward, inputs)


def _liger(case: Case, inputs: Inputs) -> Run:
    """Stock and compiled up to the hidden states, then Liger's fused projection and loss."""
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

    if not models.has_transformers():
        raise Unavailable("transformers cannot be imported")
    model: Any = models.stock(inputs["spec"], "sdpa")
    gpt = inputs["spec"].head.startswith("GPT2")
    body = torch.compile(model.transformer if gpt else model.bert, dynamic=False)
    transform = nn.Identity() if gpt else model.cls.predictions.transform
    decoder = model.get_output_embeddings()

    def forward(input_ids: Tensor, labels: Tensor, **mask: Tensor) -> Any:
        hidden = transform(body(input_ids, **mask).last_hidden_state)
        if gpt:  # each position learns the next token
            hidden, labels = hidden[:, :-1], labels[:, 1:]
        rows, targets = hidden.flatten(0, 1), labels.flatten()
        loss = liger_fused_linear_cross_entropy(rows, decoder.weight, targets, decoder.bias)
        return SimpleNamespace(loss=loss)

    return _step(model, forward, inputs)


CASES: tuple[Case, ...] = tuple(_cases())
PROVIDERS: tuple[Provider, ...] = (
    Provider("bertgpt", _ours, ours=True),
    Provider("stock eager", partial(_stock, "eager", False)),
    Provider("stock SDPA", partial(_stock, "sdpa", False)),
    Provider(
        "stock SDPA compiled",
        partial(_stock, "sdpa", True),
        not_on_cpu("compiling takes longer than a CPU's small cases"),
    ),
    Provider(
        "stock SDPA compiled, Liger's loss",
        _liger,
        all_of(needs_cuda, needs_package("liger_kernel")),
    ),
)


def test_training(contest: Any) -> None:
    contest()
