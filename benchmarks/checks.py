"""What makes a time worth nothing: trivial inputs, a wrong or late result, a changed input."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bertgpt.accuracy import measure
from bertgpt.benchmarks.case import Case, Inputs, Refused

_ZEROS_ALLOWED = 0.5

Fingerprint = dict[str, tuple[int, int]]


def insist_on_random(case: Case, inputs: Inputs) -> None:
    """Refuses inputs that cost less than real ones: power and branches depend on the data."""
    for name, value in inputs.items():
        if not isinstance(value, Tensor) or not value.is_floating_point() or value.numel() < 2:
            continue
        if bool(value.amin() == value.amax()):
            raise Refused(f"{case.label}: input {name} is constant")
        zeros = 1 - int(value.count_nonzero()) / value.numel()
        if zeros > _ZEROS_ALLOWED:
            raise Refused(f"{case.label}: {zeros:.0%} of input {name} is zero")


def refresh(
    case: Case, inputs: Inputs, generator: torch.Generator, only: frozenset[str] | None = None
) -> None:
    """New random values in the same memory, so that nothing kept from before still fits.

    Written behind autograd's back: a tensor's version does not tell that its values are new, so
    nothing can be kept by version either. `only` names the inputs to renew, if not all.
    """
    device = next(value.device for value in inputs.values() if isinstance(value, Tensor))
    fresh = case.inputs(generator, device)
    for name, value in inputs.items():
        wanted = name not in case.planned if only is None else name in only
        if isinstance(value, Tensor) and wanted:
            value.data.copy_(fresh[name])


def snapshot(case: Case, inputs: Inputs) -> Inputs:
    """Copies of the inputs that nobody may change."""
    return {
        name: value.clone()
        for name, value in inputs.items()
        if isinstance(value, Tensor) and name not in case.mutable
    }


def insist_on_unchanged(inputs: Inputs, before: Inputs) -> None:
    """Refuses when an input's bits differ from the snapshot."""
    for name, kept in before.items():
        now = inputs[name].contiguous().view(torch.uint8) if kept.dim() else inputs[name]
        if not torch.equal(now, kept.contiguous().view(torch.uint8) if kept.dim() else kept):
            raise Refused(f"it changed its input {name}")


def fingerprint(case: Case, inputs: Inputs) -> Fingerprint:
    """A hash of each input that nobody may change; unlike a snapshot it needs no memory."""
    return {
        name: _hash(value)
        for name, value in inputs.items()
        if isinstance(value, Tensor) and name not in case.mutable
    }


def _hash(value: Tensor) -> tuple[int, int]:
    """Sums, modulo 2⁶⁴, of the words and of the bytes beyond the last whole word."""
    data = value.detach().contiguous().flatten().view(torch.uint8)
    whole = data.numel() // 8 * 8
    words, rest = data[:whole].view(torch.int64), data[whole:]
    return int(words.sum()), int(rest.sum())


def insist_on_fingerprint(case: Case, inputs: Inputs, before: Fingerprint, when: str) -> None:
    """Refuses when an input's hash differs from the one before."""
    for name, now in fingerprint(case, inputs).items():
        if now != before[name]:
            raise Refused(f"input {name} was changed {when}")


def settings() -> dict[str, Any]:
    """What a contender could change for everybody: threads, precision and modes of torch."""
    return {
        "threads": torch.get_num_threads(),
        "float32 matmul precision": torch.get_float32_matmul_precision(),
        "default dtype": torch.get_default_dtype(),
        "grad mode": torch.is_grad_enabled(),
        "deterministic algorithms": torch.are_deterministic_algorithms_enabled(),
    }


def insist_on_settings(before: dict[str, Any]) -> None:
    """Refuses when a setting differs from `before`, and sets it back."""
    changed = [name for name, value in settings().items() if value != before[name]]
    if not changed:
        return
    torch.set_num_threads(before["threads"])
    torch.set_float32_matmul_precision(before["float32 matmul precision"])
    torch.set_default_dtype(before["default dtype"])
    torch.set_grad_enabled(before["grad mode"])
    torch.use_deterministic_algorithms(before["deterministic algorithms"])
    raise Refused(f"it changed a setting of torch for everybody: {', '.join(changed)}")


@dataclass(frozen=True)
class Truth:
    """The definition on one set of inputs: in float64, and in the inputs' own precision."""

    oracle: Tensor
    baseline: Tensor

    @classmethod
    def of(cls, case: Case, inputs: Inputs) -> Truth:
        """Evaluates the case's definition."""
        return cls(case.expected(inputs, torch.float64), case.expected(inputs, case.dtype))


def insist_on_correct(case: Case, inputs: Inputs, truth: Truth, result: Any, when: str) -> None:
    """Refuses a result that breaks the accuracy rule, or of which any part is not a number."""
    actual = case.select(inputs, result).detach()
    accuracy = measure(
        actual, truth.oracle, truth.baseline, factor=case.factor, rms_limit=case.rms_limit
    )
    if not accuracy.accurate:
        raise Refused(f"wrong {when}: {'; '.join(accuracy.failures)}")
    for tensor in tensors_of(result):
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise Refused(f"wrong {when}: part of the result was not written")


@contextmanager
def poisoned_outputs(previous: Any, inputs: Inputs) -> Iterator[None]:
    """Within it new memory holds NaN, and so does the previous result.

    A contender that leaves part of its output unwritten then shows it. On a CPU `torch.empty` is
    told to fill; on a GPU the caching allocator is handed blocks of NaN of the result's size, which
    leaves the choice of kernels alone.
    """
    outputs = poison(previous, inputs)
    blocks = [torch.full_like(output, float("nan")) for output in outputs for _ in range(2)]
    del blocks
    if any(t.device.type == "cuda" for t in tensors_of(inputs)):
        yield
        return
    memory: Any = torch.utils.deterministic  # its setting is a property of the module
    was_enabled = torch.are_deterministic_algorithms_enabled()
    was_filling = memory.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    memory.fill_uninitialized_memory = True
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(was_enabled)
        memory.fill_uninitialized_memory = was_filling


def poison(result: Any, inputs: Inputs) -> list[Tensor]:
    """Fills a result's floating tensors, unless they are inputs, with NaN; returns them."""
    used = {value.untyped_storage().data_ptr() for value in tensors_of(inputs)}
    outputs = [t for t in tensors_of(result) if t.untyped_storage().data_ptr() not in used]
    outputs = [t for t in outputs if t.is_floating_point() and not t.requires_grad]
    for output in outputs:
        output.fill_(float("nan"))
    return outputs


def tensors_of(value: Any) -> Iterator[Tensor]:
    """Every tensor in nested tuples, lists and dicts."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from tensors_of(item)
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from tensors_of(item)
