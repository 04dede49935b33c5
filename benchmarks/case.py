"""What a benchmark is made of: a case, the providers that contend in it, and what came of each."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bertgpt.accuracy import RMS_LIMIT

Inputs = dict[str, Any]
Run = Callable[[], Any]


@dataclass(frozen=True)
class Case:
    """One workload: its inputs, its definition, and the work that cannot be avoided.

    Attributes:
        op: the op or model family.
        name: what is particular to it; unique within its op.
        device: "cuda" or "cpu": the kind of machine whose sizes these are.
        dtype: of the inputs.
        inputs: draws fresh random inputs on a device, with a generator of that device. Shapes, and
            every value that is not a tensor, must be the same in each draw.
        expected: the definition on inputs, in a given dtype, on the part that `select` picks.
            Both may find with `compared` which part that is.
        flops: operations that any method must do.
        bytes: bytes that any method must move, each once.
        select: from the inputs and a contender's result, the tensor that `expected` describes.
        tokens: real tokens a call (for rates), or None.
        value: cases of higher value run first when time is short.
        factor: of the accuracy rule. The tests hold kernels to 2 (gradients 3) on fixed inputs;
            here inputs are new in every run and peers round in their own ways, so it is 4 (6).
        rms_limit: of the accuracy rule; a whole model in a half type adds up a dozen layers'
            roundings, and so does its baseline.
        mutable: inputs that a contender may change.
        planned: inputs whose values a contender may read while it prepares (host-side lengths,
            page tables that a peer plans for). All others change after preparation.
        sets: how many sets of inputs rotate; None takes enough to exceed the cache. Models say 2:
            their weights exceed it already.
    """

    op: str
    name: str
    device: str
    dtype: torch.dtype
    inputs: Callable[[torch.Generator, torch.device], Inputs]
    expected: Callable[[Inputs, torch.dtype], Tensor]
    flops: float
    bytes: float
    select: Callable[[Inputs, Any], Tensor] = lambda inputs, result: result
    tokens: int | None = None
    value: float = 1.0
    factor: float = 4.0
    rms_limit: float = RMS_LIMIT
    mutable: frozenset[str] = frozenset()
    planned: frozenset[str] = frozenset()
    sets: int | None = None

    @property
    def label(self) -> str:
        """Op and name."""
        return f"{self.op}: {self.name}"


SEED = "seed of the compared part"


def compared(inputs: Inputs, count: int, most: int) -> Tensor:
    """Which of `count` things are compared with the definition: int64, ascending, at most `most`.

    The last, and others drawn by a seed that only `expected` and `select` find in the inputs: no
    contender knows them while it runs.
    """
    device = next(value.device for value in inputs.values() if isinstance(value, Tensor))
    if count <= most:
        return torch.arange(count, device=device)
    draw = torch.Generator().manual_seed(inputs.get(SEED, 0))
    others = torch.randperm(count - 1, generator=draw)[: most - 1]
    return torch.cat([others, torch.tensor([count - 1])]).sort().values.to(device)


def some_rows(inputs: Inputs, rows: Tensor, most: int = 256) -> Tensor:
    """The compared rows of a tensor."""
    return rows[compared(inputs, len(rows), most)]


def differentiated(call: Run, inputs: Inputs, leaves: Sequence[str]) -> Run:
    """The call, or call and backward to the named inputs where the inputs bring `d_out`."""
    if "d_out" not in inputs:
        return call
    tensors = [inputs[name].requires_grad_() for name in leaves]
    return lambda: torch.autograd.grad(call(), tensors, inputs["d_out"])


@dataclass(frozen=True)
class Provider:
    """One contender.

    Attributes:
        name: as it is printed.
        prepare: everything that is not timed (compiling, allocating, planning) for one set of
            inputs; returns the call that is timed. The call reads the inputs' current values.
        absent: why it cannot take a case here, in words, or None.
        ours: whether it is bertgpt's.
    """

    name: str
    prepare: Callable[[Case, Inputs], Run]
    absent: Callable[[Case], str | None] = lambda case: None
    ours: bool = False


@dataclass(frozen=True)
class Measurement:
    """What one provider did in one case with one state of the cache.

    Attributes:
        case: the case.
        provider: the provider.
        cache: "cold" (inputs rotate beyond the last-level cache) or "warm" (the same ones).
        samples: seconds a call, one for each round, in the order of the rounds.
        timer: how they were taken.
        floor: the least seconds that the measured machine allows.
        peak_bytes: memory allocated above the inputs during a call, or None where unknown.
        reason: why there are no samples (absent or refused); empty when measured.
        absent: whether the reason is that it cannot run here, rather than a fault.
    """

    case: Case
    provider: Provider
    cache: str
    samples: tuple[float, ...] = ()
    timer: str = ""
    floor: float = 0.0
    peak_bytes: int | None = None
    reason: str = ""
    absent: bool = False

    @property
    def measured(self) -> bool:
        """Whether there is a time to report."""
        return not self.reason


class Refused(Exception):
    """A result that must not be reported; the message says why."""


class Unavailable(Exception):
    """Raised by `prepare` where only the call itself tells that a provider cannot take a case."""


def needs_package(*names: str) -> Callable[[Case], str | None]:
    """An `absent` for providers that import packages."""

    def absent(case: Case) -> str | None:
        missing = [name for name in names if not importable(name)]
        return f"{', '.join(missing)} cannot be imported" if missing else None

    return absent


def importable(name: str) -> bool:
    """Whether a package is there, without importing more than its parents."""
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:
        return False


def needs_cuda(case: Case) -> str | None:
    """An `absent` for providers that run on a GPU alone."""
    return None if case.device == "cuda" else "needs a CUDA device"


def not_on_cpu(reason: str) -> Callable[[Case], str | None]:
    """An `absent` for providers that could run on a CPU and are left out of the suite there."""
    return lambda case: None if case.device == "cuda" else reason


def compiled(
    function: Callable[..., Any],
    arguments: Callable[[Inputs], Any],
    mode: str | None = None,
    leaves: Sequence[str] = (),
) -> Provider:
    """torch.compile of a plain function; `arguments(inputs)` gives its positional arguments.

    `leaves` names the inputs that receive gradients in cases with `d_out`.

    `max-autotune` is taken without its CUDA graphs: the harness replays short calls as graphs for
    everybody.
    """
    name = "torch.compile" if mode is None else "torch.compile max-autotune"

    def prepare(case: Case, inputs: Inputs) -> Run:
        fast = torch.compile(function, mode=mode, dynamic=False)
        given = arguments(inputs)
        return differentiated(lambda: fast(*given), inputs, leaves)

    return Provider(name, prepare, not_on_cpu("compiling takes longer than a CPU's small cases"))


def all_of(*conditions: Callable[[Case], str | None]) -> Callable[[Case], str | None]:
    """The first reason of several."""
    return lambda case: next((r for condition in conditions if (r := condition(case))), None)


def ours(
    op: Callable[..., Any],
    backend: str,
    arguments: Callable[[Inputs], Any],
    leaves: Sequence[str] = (),
) -> Provider:
    """Bertgpt's own op on one backend; `arguments(inputs)` gives its args and kwargs.

    `leaves` names the inputs that receive gradients in cases with `d_out`.
    """
    from bertgpt import ops

    def prepare(case: Case, inputs: Inputs) -> Run:
        args, kwargs = arguments(inputs)
        run = differentiated(lambda: op(*args, **kwargs, backend=backend), inputs, leaves)
        refusal = ops.explain(op, *args, **kwargs, backend=backend).refusals.get(backend)
        if refusal is not None:
            raise Unavailable(refusal)
        return run

    return Provider(f"bertgpt {backend}", prepare, ours=True)
