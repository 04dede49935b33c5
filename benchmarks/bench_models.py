"""End to end: BERT's encoding and GPT-2's prefill.

All contenders share their weights and are given the same padded ids and mask (or the same packed
ids); whatever unpadding or mask building they need is in the timed call. FLOPs count real tokens
only. Bytes are the weights once a pass.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from itertools import accumulate, product
from typing import Any

import torch
from torch import Tensor

from bertgpt.benchmarks import models
from bertgpt.benchmarks.bench_attention import ragged_lengths
from bertgpt.benchmarks.case import (
    Case,
    Inputs,
    Provider,
    Run,
    Unavailable,
    all_of,
    compared,
    not_on_cpu,
)
from bertgpt.benchmarks.models import Spec
from bertgpt.benchmarks.real_lengths import QUANTILES, real_lengths
from bertgpt.benchmarks.unpadded import UnpaddedBert, by_sequence, positions_of, varlen

# The roundings of a dozen layers add up.
_RMS_LIMIT = 0.02
_FLAGSHIP = 9.0  # cases of this value are worth minutes of autotuning


def _draw(
    generator: torch.Generator, device: torch.device, *, spec: Spec, lengths: tuple[int, ...]
) -> Inputs:
    """Random ids, padded on the right and packed; the lengths are the case's own."""
    batch, longest = len(lengths), max(lengths)
    ids = torch.randint(5, spec.vocabulary, (batch, longest), generator=generator, device=device)
    mask = torch.arange(longest, device=device) < torch.tensor(lengths, device=device)[:, None]
    bounds = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device=device)
    return {
        "input_ids": ids * mask,
        "attention_mask": mask.long(),
        "values": ids[mask],
        "cu_seqlens": bounds,
        "lengths": lengths,
        "spec": spec,
    }


def _part(inputs: Inputs) -> tuple[list[int], Tensor, Tensor]:
    """Two sequences: their rows, ids and mask."""
    rows = compared(inputs, len(inputs["lengths"]), 2).tolist()
    return rows, inputs["input_ids"][rows], inputs["attention_mask"][rows]


@torch.no_grad()
def _expected_states(inputs: Inputs, dtype: torch.dtype) -> Tensor:
    _, ids, mask = _part(inputs)
    states = models.definition(inputs["spec"], dtype)(ids, attention_mask=mask).last_hidden_state
    return states[mask.bool()]


def _select_states(inputs: Inputs, result: Tensor) -> Tensor:
    rows, _, mask = _part(inputs)
    if result.dim() == 3:
        return result[rows][mask.bool()]
    bounds = inputs["cu_seqlens"].tolist()
    return torch.cat([result[bounds[row] : bounds[row + 1]] for row in rows])


@torch.no_grad()
def _expected_scores(inputs: Inputs, dtype: torch.dtype) -> Tensor:
    _, ids, mask = _part(inputs)
    return models.definition(inputs["spec"], dtype)(ids, attention_mask=mask).logits[:, -1]


def _encode_case(name: str, label: str, lengths: tuple[int, ...], **options: Any) -> Case:
    device = options.get("device", "cuda")
    spec = Spec(name, "BertModel", device, torch.bfloat16 if device == "cuda" else torch.float32)
    tokens = sum(lengths)
    return Case(
        op="bert encode",
        name=f"{name} B{len(lengths)} {label}",
        device=device,
        dtype=spec.dtype,
        inputs=partial(_draw, spec=spec, lengths=lengths),
        expected=_expected_states,
        select=_select_states,
        flops=models.matrix_flops(spec, tokens, float(sum(length**2 for length in lengths))),
        bytes=models.weight_bytes(spec, with_vocabulary=False),
        tokens=tokens,
        rms_limit=_RMS_LIMIT,
        value=options.get("value", 1.0),
        planned=frozenset({"attention_mask", "cu_seqlens"}),
        sets=2,
    )


def _prefill_case(name: str, batch: int, length: int, **options: Any) -> Case:
    device = options.get("device", "cuda")
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    spec = Spec(name, "GPT2LMHeadModel", device, dtype)
    tokens, pairs = batch * length, batch * length * (length + 1) / 2
    return Case(
        op="gpt2 prefill",
        name=f"{name} B{batch} S{length}",
        device=device,
        dtype=dtype,
        inputs=partial(_draw, spec=spec, lengths=(length,) * batch),
        expected=_expected_scores,
        select=lambda inputs, result: result[_part(inputs)[0]],
        flops=models.matrix_flops(spec, tokens, pairs, scored=batch),
        bytes=models.weight_bytes(spec, with_vocabulary=True),
        tokens=tokens,
        rms_limit=_RMS_LIMIT,
        value=options.get("value", 1.0),
        planned=frozenset({"attention_mask", "cu_seqlens"}),
        sets=2,
    )


def _cases() -> Iterator[Case]:
    for name, batch, longest in product(BERT_SIZES, (1, 16, 64, 256), (128, 384, 512)):
        if batch == 1:
            yield _encode_case(name, f"S{longest}", (longest,), value=8)
            continue
        lengths, base = ragged_lengths(batch, longest), name == "bert-base"
        value = (9 if longest == 512 else 8) if base and batch == 64 else 3
        yield _encode_case(name, f"S{longest} ragged", lengths, value=value)
    for name, kind, batch in product(BERT_SIZES, QUANTILES, (64, 256)):
        value = 8 if name == "bert-base" and batch == 64 else 3
        yield _encode_case(name, kind, real_lengths(kind, batch), value=value)
    for name, batch in product(("gpt2-124M", "gpt2-355M"), (1, 8, 64)):
        yield _prefill_case(name, batch, 1024, value=5)
    yield _encode_case("bert-tiny", "tweets", real_lengths("tweets", 8), device="cpu")
    yield _prefill_case("gpt2-tiny", 2, 24, device="cpu")


BERT_SIZES = ("bert-base", "bert-large")


def _result(output: Any) -> Tensor:
    """Hidden states of an encoder, the last token's scores of a language model."""
    if hasattr(output, "last_hidden_state"):
        states = output.last_hidden_state
        return states if isinstance(states, Tensor) else states.values
    return output.logits[:, -1]


def _call(model: Any, inputs: Inputs) -> Run:
    options = {} if inputs["spec"].head == "BertModel" else {"logits_to_keep": 1}

    @torch.no_grad()
    def run() -> Tensor:
        return _result(
            model(inputs["input_ids"], attention_mask=inputs["attention_mask"], **options)
        )

    return run


def _ours_padded(case: Case, inputs: Inputs) -> Run:
    return _call(models.ours(inputs["spec"]), inputs)


def _ours_packed(case: Case, inputs: Inputs) -> Run:
    from bertgpt.packing import PackedBatch

    if inputs["spec"].head != "BertModel":
        raise Unavailable("the prompts are equally long")
    model = models.ours(inputs["spec"])
    ranges = {"input_ids": (0, inputs["spec"].vocabulary - 1)}
    bounds, lengths = inputs["cu_seqlens"], inputs["lengths"]
    batch = PackedBatch(inputs["values"], bounds, lengths, ranges=ranges)

    @torch.no_grad()
    def run() -> Tensor:
        return _result(model(batch))

    return run


def _unpadded(case: Case, inputs: Inputs) -> Run:
    """Stock weights on the packed ids: varlen_attn and compiled layers on a GPU."""
    if inputs["spec"].head != "BertModel":
        raise Unavailable("the prompts are equally long")
    if not models.has_transformers():
        raise Unavailable("transformers cannot be imported")
    values, cu_seqlens = inputs["values"], inputs["cu_seqlens"]
    model: Any = UnpaddedBert(models.stock(inputs["spec"], "sdpa"))
    attend = by_sequence(cu_seqlens)
    if case.device == "cuda":
        model = torch.compile(model, dynamic=False)
        attend = varlen(cu_seqlens, max(inputs["lengths"]))

    @torch.no_grad()
    def run() -> Tensor:
        states = model(values, positions_of(cu_seqlens, len(values)), attend)
        assert isinstance(states, Tensor)
        return states

    return run


def _stock(
    attention: str,
    compile_mode: str | None = None,
    around: Callable[[], AbstractContextManager[Any]] = nullcontext,
) -> Callable[[Case, Inputs], Run]:
    """Transformers' model; `compile_mode` also compiles it, for the case's shape."""

    def prepare(case: Case, inputs: Inputs) -> Run:
        if not models.has_transformers():
            raise Unavailable("transformers cannot be imported")
        model: Any = models.stock(inputs["spec"], attention)
        if compile_mode is not None:
            model = torch.compile(model, mode=compile_mode, dynamic=False)
        call = _call(model, inputs)

        def run() -> Tensor:
            with around():
                return call()

        return run

    return prepare


def _cudnn() -> AbstractContextManager[Any]:
    from torch.nn.attention import SDPBackend, sdpa_kernel

    return sdpa_kernel([SDPBackend.CUDNN_ATTENTION, SDPBackend.MATH], set_priority=True)


def _flagship_only(case: Case) -> str | None:
    return None if case.value >= _FLAGSHIP else "its tuning takes minutes: left to one case"


_COMPILING = not_on_cpu("compiling takes longer than a CPU's small cases")
_GPU_ONLY = not_on_cpu("needs a CUDA device")
CASES: tuple[Case, ...] = tuple(_cases())
PROVIDERS: tuple[Provider, ...] = (
    Provider("bertgpt packed", _ours_packed, ours=True),
    Provider("bertgpt padded", _ours_padded, ours=True),
    Provider("stock eager", _stock("eager")),
    Provider("stock SDPA", _stock("sdpa")),
    Provider("stock SDPA cuDNN", _stock("sdpa", around=_cudnn), _GPU_ONLY),
    Provider("stock SDPA compiled", _stock("sdpa", "default"), _COMPILING),
    Provider(
        "stock SDPA compiled max-autotune",
        _stock("sdpa", "max-autotune-no-cudagraphs"),
        all_of(_COMPILING, _flagship_only),
    ),
    Provider("stock weights unpadded, varlen_attn compiled", _unpadded),
)


def test_models(contest: Any) -> None:
    contest()
