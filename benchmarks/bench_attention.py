"""Attention forward, and forward with backward, over the shapes of BERT and GPT-2.

FLOPs: 4 · D for each (query, key) pair that the mask allows, rounded up to no tile; backward adds
2.5 times that. Bytes: q, k, v and out once each (backward: also d_out and three gradients).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from itertools import accumulate, product
from typing import Any

import torch
from torch import Tensor

from bertgpt import ops, reference
from bertgpt.benchmarks.attention_peers import PEERS, run_of
from bertgpt.benchmarks.case import Case, Inputs, Provider, Run, Unavailable, compared

_LONG = 4096


def _draw(
    generator: torch.Generator,
    device: torch.device,
    *,
    shape: tuple[int, int, int, int],
    dtype: torch.dtype,
    causal: bool,
    lengths: tuple[int, ...] | None,
    packed: bool,
    backward: bool,
) -> Inputs:
    """Random q, k, v; ragged cases hold the same lengths in another order each time."""
    batch, longest, heads, dim = shape
    leading: tuple[int, ...] = (batch, longest)
    inputs: Inputs = {"causal": causal, "max_seqlen": longest}
    if lengths is not None:
        order = torch.randperm(batch, generator=generator, device=device).tolist()
        shuffled = [lengths[i] for i in order]
        if packed:
            leading = (sum(lengths),)
            bounds = [0, *accumulate(shuffled)]
            inputs["cu_seqlens"] = torch.tensor(bounds, dtype=torch.int32, device=device)
        else:
            inputs["key_lengths"] = torch.tensor(shuffled, dtype=torch.int32, device=device)
    for name in ("q", "k", "v", "d_out")[: 4 if backward else 3]:
        inputs[name] = torch.randn(
            *leading, heads, dim, generator=generator, device=device, dtype=dtype
        )
    return inputs


def _forward(inputs: Inputs, attend: Any, **options: Any) -> Any:
    """`attend` on a case's inputs, by the public op's keywords."""
    if "cu_seqlens" in inputs:
        options |= {"cu_seqlens_q": inputs["cu_seqlens"], "max_seqlen_q": inputs["max_seqlen"]}
        options |= {"max_seqlen_k": inputs["max_seqlen"]}
    elif "key_lengths" in inputs:
        options["key_lengths"] = inputs["key_lengths"]
    return attend(inputs["q"], inputs["k"], inputs["v"], causal=inputs["causal"], **options)


def _few(inputs: Inputs) -> int:
    """How many sequences and how many heads are compared: the scores are float64."""
    return 1 if inputs["max_seqlen"] > _LONG else 2


def _part(inputs: Inputs, tensor: Tensor) -> Tensor:
    """Of a tensor laid out like q, some sequences and heads."""
    tensor = tensor.detach()
    if "cu_seqlens" in inputs:
        tensor = torch.cat([tensor[start:stop] for start, stop in _spans(inputs)])
    else:
        tensor = tensor[compared(inputs, len(tensor), _few(inputs))]
    return tensor[..., compared(inputs, tensor.shape[-2], _few(inputs)), :]


def _spans(inputs: Inputs) -> list[tuple[int, int]]:
    """Where the compared sequences of a packed batch begin and end."""
    bounds = inputs["cu_seqlens"].tolist()
    chosen = compared(inputs, len(bounds) - 1, _few(inputs)).tolist()
    return [(bounds[i], bounds[i + 1]) for i in chosen]


def _expected(inputs: Inputs, dtype: torch.dtype) -> Tensor:
    """The definition on the compared part: the output, or the three gradients stacked."""
    part: Inputs = {name: inputs[name] for name in ("causal", "max_seqlen")}
    for name in ("q", "k", "v", "d_out"):
        if name in inputs:
            part[name] = _part(inputs, inputs[name]).to(dtype)
    if "cu_seqlens" in inputs:
        lengths = [stop - start for start, stop in _spans(inputs)]
        part["cu_seqlens"] = inputs["cu_seqlens"].new_tensor([0, *accumulate(lengths)])
    if "key_lengths" in inputs:
        lengths = inputs["key_lengths"]
        part["key_lengths"] = lengths[compared(inputs, len(lengths), _few(inputs))]
    result = run_of(partial(_forward, attend=reference.attention), part)()
    return _by_head(result) if isinstance(result, tuple) else result


def _select(inputs: Inputs, result: Any) -> Tensor:
    if isinstance(result, tuple):
        return _by_head([_part(inputs, gradient) for gradient in result])
    return _part(inputs, result)


def _by_head(gradients: Sequence[Tensor]) -> Tensor:
    """A head's gradient is one row of the accuracy rule: a single query's may be exactly 0."""
    return torch.stack([gradient.transpose(-2, -3).flatten(-2) for gradient in gradients])


def ragged_lengths(count: int, longest: int) -> tuple[int, ...]:
    """Lengths with mean 0.6 · longest, evenly spread over 0.2 … 1 of it, the longest among them."""
    if count == 1:
        return (longest,)
    spread = [round(longest * (0.2 + 0.8 * i / (count - 1))) for i in range(count)]
    return tuple(max(length, 1) for length in spread)


def _case(
    longest: int,
    *,
    tokens: int = 16384,
    heads: int = 12,
    dim: int = 64,
    causal: bool = False,
    ragged: str = "",
    backward: bool = False,
    device: str = "cuda",
    value: float = 1.0,
) -> Case:
    batch = max(tokens // longest, 1)
    lengths = ragged_lengths(batch, longest) if ragged else None
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    packed = ragged == "packed"
    pairs = sum(
        length * (length + 1) / 2 if causal else queries * length
        for queries, length in _rows(batch, longest, lengths, packed)
    )
    if causal and ragged and not packed:  # queries past the length still see all of its keys
        pairs += sum((longest - length) * length for length in lengths or ())
    queries = sum(lengths or ()) if packed else batch * longest
    traffic = (8 if backward else 4) * queries * heads * dim * dtype.itemsize
    words = [f"{'forward + backward' if backward else 'forward'} H{heads} D{dim} S{longest}"]
    words += [f"B{batch}", *(["causal"] if causal else []), *([ragged] if ragged else [])]
    return Case(
        op="attention",
        name=" ".join(words),
        device=device,
        dtype=dtype,
        inputs=partial(
            _draw,
            shape=(batch, longest, heads, dim),
            dtype=dtype,
            causal=causal,
            lengths=lengths,
            packed=packed,
            backward=backward,
        ),
        expected=_expected,
        select=_select,
        flops=4.0 * dim * heads * pairs * (3.5 if backward else 1.0),
        bytes=float(traffic),
        tokens=sum(lengths) if lengths else batch * longest,
        value=value,
        factor=6.0 if backward else 4.0,
    )


def _rows(
    batch: int, longest: int, lengths: Sequence[int] | None, packed: bool
) -> Iterator[tuple[int, int]]:
    """Queries and keys of each sequence."""
    for length in lengths or [longest] * batch:
        yield (length if packed else longest), length


def _cases() -> Iterator[Case]:
    for longest, causal in product((128, 256, 512, 1024, 2048, 4096, 8192, 16384), (False, True)):
        best_known = longest in (512, 4096)
        yield _case(longest, causal=causal, value=9 if best_known else 6)
        yield _case(longest, heads=16, causal=causal, value=4 if best_known else 2)
        yield _case(longest, causal=causal, backward=True, value=5 if best_known else 2)
    for longest, causal in product((128, 512, 2048, 8192), (False, True)):
        yield _case(longest, causal=causal, ragged="packed", value=8 if longest == 512 else 5)
    for longest, causal in product((128, 512, 2048), (False, True)):
        yield _case(longest, causal=causal, ragged="key lengths", value=4)
    for longest, causal in product((512, 4096), (False, True)):
        yield _case(longest, heads=8, dim=128, causal=causal, value=3)
        yield _case(longest, heads=8, dim=128, causal=causal, backward=True, value=2)
        yield _case(longest, causal=causal, ragged="packed", backward=True, value=2)
    for ragged, causal in (("", False), ("", True), ("packed", False), ("key lengths", False)):
        yield _case(64, tokens=256, heads=4, causal=causal, ragged=ragged, device="cpu")
    yield _case(64, tokens=128, heads=2, causal=True, backward=True, device="cpu")


def _ours(backend: str) -> Provider:
    def prepare(case: Case, inputs: Inputs) -> Run:
        options = {"backend": backend}
        reason = _forward(inputs, partial(ops.explain, ops.attention), **options).refusals
        if backend in reason:
            raise Unavailable(reason[backend])
        return run_of(partial(_forward, attend=ops.attention, **options), inputs)

    return Provider(f"bertgpt {backend}", prepare, ours=True)


CASES: tuple[Case, ...] = tuple(_cases())
PROVIDERS: tuple[Provider, ...] = (*(_ours(b) for b in ("cuda", "triton", "torch")), *PEERS)


def test_attention(contest: Any) -> None:
    contest()
