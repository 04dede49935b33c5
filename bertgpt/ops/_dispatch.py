"""From a checked call to a backend: registration, refusals, strictness and the default order.

An `Op` is one public operation. Its file gives the schema, the static checks, the value checks
and the backends; this file registers it with `torch.library` and picks the backend at run time,
inside the registered operator, so that `torch.compile` sees one opaque call. Where nothing watches
a call (`_watched.py`), the same code runs without the registered operator around it.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch.compiler import is_compiling

from bertgpt.cuda import extension
from bertgpt.ops._backends import (
    Backend,
    Call,
    device_of,
    first_tensor,
)
from bertgpt.ops._checks import autocasting
from bertgpt.ops._plans import Plans
from bertgpt.ops._watched import (
    refuse_functional_gradients,
    refuse_tangents,
    tangents,
    watched,
)

BACKENDS = ("cuda", "triton", "torch", "reference")
LIBRARY = torch.library.Library("bertgpt", "FRAGMENT")
OPS: dict[str, Op] = {}

_STRICT: ContextVar[bool] = ContextVar("bertgpt_strict", default=False)
_AS_IT_IS = nullcontext()


class BackendUnavailable(RuntimeError):
    """The backend that was asked for refuses this call; the message says why."""


@contextmanager
def strict() -> Iterator[None]:
    """Within this context nothing degrades quietly.

    Falling from a GPU kernel to PyTorch raises `BackendUnavailable` instead of warning, values of
    index tensors on a GPU are checked before each call (one synchronisation per check), and what a
    C++ kernel found wrong is raised after it (another).
    """
    token = _STRICT.set(True)
    try:
        yield
    finally:
        _STRICT.reset(token)


class Op:
    """A public op: registered schema, checks, and backends by name.

    Args:
        schema: `name(arguments) -> returns`; its last two arguments are `bool needs_grad` (unless
            `differentiable` is empty) and `str? backend`.
        check: The public signature; raises on bad types and shapes, returns the schema's arguments.
        check_values: Looks into index tensors; raises ValueError or IndexError.
        backends: By name; `torch` and `reference` always there.
        fake: Output shapes and dtypes from the schema's arguments.
        differentiable: Names of the arguments that receive gradients.
    """

    def __init__(
        self,
        schema: str,
        *,
        check: Callable[..., dict[str, Any]],
        backends: Mapping[str, Backend],
        fake: Callable[..., Any],
        check_values: Callable[[Call], None] = lambda call: None,
        differentiable: tuple[str, ...] = (),
    ) -> None:
        self.name = schema.partition("(")[0]
        self.check = check
        check.__qualname__ = self.name  # what Python calls it where arguments are missing
        self.check_values = check_values
        self.backends = backends
        self.differentiable = differentiable
        LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
        LIBRARY.impl(self.name, self._registered, "CompositeExplicitAutograd")
        self.overload = getattr(torch.ops.bertgpt, self.name).default
        arguments = self.overload._schema.arguments
        self.fields = tuple(argument.name for argument in arguments)
        self.tensors = tuple(a.name for a in arguments if "Tensor" in str(a.type))
        parameters = inspect.signature(check).parameters.values()
        self.named = [p.name for p in parameters if p.kind is p.KEYWORD_ONLY]
        self.plans = Plans([p.name for p in parameters], self.tensors)
        torch.library.register_fake(
            f"bertgpt::{self.name}", lambda *values: fake(self.bind(values)), lib=LIBRARY
        )
        OPS[self.name] = self

    def __call__(self, call: Call) -> Any:
        """Runs what `check` returned: as the registered operator where something watches."""
        tensors = [call[name] for name in self.tensors]
        refuse_tangents(self.name, self.tensors, tensors)
        if call.get("needs_grad"):
            refuse_functional_gradients(self.name)
        if call.get("needs_grad") or watched(tensors):
            return self.overload(*(call[field] for field in self.fields))
        return self._execute(call)

    def repeat(self, *values: Any) -> Any:
        """What `check` and a call make of `values`, in the order of `check`'s parameters.

        Neither is settled again where the C++ kernel took a call of the same make before.
        """
        make = None
        if not is_compiling() and extension.unavailable() is None:
            tensors = self.plans.tensors(values)
            if not watched(tensors) and _is_plain(tensors):
                make = self.plans.make_of(values)
                known = None if make is None else self.plans.find(make, values)
                if known is not None:
                    return self._execute(known, "cuda")
        placed = len(values) - len(self.named)
        call = self.check(*values[:placed], **dict(zip(self.named, values[placed:], strict=True)))
        outputs = self(call)
        if make is not None:
            self.plans.keep(make, values, call, lambda: self.resolve(call) == "cuda")
        return outputs

    def bind(self, values: tuple[Any, ...]) -> dict[str, Any]:
        """The operator's positional arguments by name."""
        return dict(zip(self.fields, values, strict=True))

    def _registered(self, *values: Any) -> Any:
        """The registered operator: it returns a tensor, if an empty one, for each output."""
        outputs = self._execute(self.bind(values))
        if not isinstance(outputs, tuple):
            return outputs
        return tuple(values[0].new_empty(0) if out is None else out for out in outputs)

    def _execute(self, call: Call, name: str | None = None) -> Any:
        strictly = _STRICT.get()
        if strictly or not first_tensor(call).is_cuda:
            self.check_values(call)
        name = name or self.resolve(call)
        outputs = self.run(name, call)
        if strictly and name == "cuda":
            extension.raise_pending()
        return outputs

    def run(self, name: str, call: Call) -> Any:
        """Backend `name`'s outputs for a call whose values have been checked."""
        if not torch._C._is_any_autocast_enabled():
            return self.backends[name](call)
        with _without_autocast(device_of(call).type):
            return self.backends[name](call)

    def gradients(
        self,
        call: Call,
        grads: Sequence[torch.Tensor],
        saved: Sequence[torch.Tensor],
        names: Sequence[str],
    ) -> Mapping[str, torch.Tensor] | None:
        """The gradients that the call's backend computes itself; None where it has none."""
        backward = self.backends[self.resolve(call)].backward
        if backward is None:
            return None
        arguments = {k: v for k, v in call.items() if k not in ("needs_grad", "backend")}
        with _without_autocast(device_of(call).type):
            return backward(grads, saved, names, **arguments)

    def refusal(self, name: str, call: Call) -> str | None:
        """Why backend `name` cannot run `call`, or None."""
        if name not in self.backends:
            kind = {"cuda": "CUDA C++", "triton": "Triton"}[name]
            return f"{self.name} has no {kind} kernel in this build"
        return self.backends[name].refusal(call)

    def resolve(self, call: Call) -> str:
        """The name of the backend that runs `call`; raises BackendUnavailable, or warns once."""
        asked = call["backend"]
        if asked is not None:
            reason = self.refusal(asked, call)
            if reason is not None:
                raise BackendUnavailable(f"{self.name}: backend {asked!r} refuses: {reason}")
            return asked
        passed: dict[str, str] = {}
        for name in default_order(device_of(call)):
            reason = self.refusal(name, call)
            if reason is None:
                if "triton" in passed and name in ("torch", "reference"):
                    self._fell(name, passed)
                return name
            passed[name] = reason
        raise AssertionError("the torch backend never refuses")

    def _fell(self, name: str, passed: Mapping[str, str]) -> None:
        reasons = "; ".join(f"{backend}: {reason}" for backend, reason in passed.items())
        message = f"{self.name} runs on backend {name!r} on a GPU, because {reasons}"
        if _STRICT.get():
            raise BackendUnavailable(f"{message} (strict mode)")
        _warn_once(message)


def _is_plain(tensors: Sequence[Any]) -> bool:
    """Whether neither autocast nor a derivative takes part in a call."""
    if torch._C._is_any_autocast_enabled() or tangents():
        return False
    if not torch.is_grad_enabled():
        return True
    return not any(isinstance(t, torch.Tensor) and t.requires_grad for t in tensors)


def _without_autocast(device_type: str) -> AbstractContextManager[Any]:
    """The check has settled the dtypes; no product inside the operator may take another one."""
    return torch.autocast(device_type, enabled=False) if autocasting(device_type) else _AS_IT_IS


@cache
def _warn_once(message: str) -> None:
    warnings.warn(message, RuntimeWarning, stacklevel=4)


def default_order(device: torch.device) -> tuple[str, ...]:
    """The backends tried on a device when none is named."""
    return BACKENDS if device.type == "cuda" else ("torch", "reference")


def needs_grad(*tensors: torch.Tensor | None) -> bool:
    """Whether autograd would record an op on these tensors."""
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def check_backend(backend: str | None) -> str | None:
    """Raises ValueError for a name that no backend has."""
    if backend is not None and backend not in BACKENDS:
        known = ", ".join(map(repr, BACKENDS))
        raise ValueError(f"unknown backend {backend!r}: choose one of {known}, or None")
    return backend


@dataclass(frozen=True)
class Explanation:
    """Which backend would run a call, and why each other one that refuses does.

    Attributes:
        op: The op's name.
        backend: The backend that would run, or None when the one asked for refuses.
        refusals: Reason by backend name.
        asked: The backend named in the call, or None.
    """

    op: str
    backend: str | None
    refusals: dict[str, str]
    asked: str | None = None

    def __str__(self) -> str:
        choice = f"{self.backend} would run"
        if self.backend is None:
            choice = f"nothing would run, since {self.asked} was asked for and refuses"
        lines = [f"{self.op}: {choice}"]
        lines += [f"  {name} refuses: {reason}" for name, reason in self.refusals.items()]
        return "\n".join(lines)


def explain(op: str | Callable[..., Any], *args: Any, **kwargs: Any) -> Explanation:
    """Says which backend a call would run on. No kernel runs; values of CPU tensors are checked.

    Args:
        op: The op or its name, such as `"attention"` or `bertgpt.ops.attention`.
        *args: The op's arguments.
        **kwargs: The op's keyword arguments; `backend` may be among them.

    Returns:
        An `Explanation`; its `str()` names the choice and each refusing backend with its reason.

    Raises:
        ValueError: There is no such op, or the arguments are what the op itself would refuse.
        TypeError, IndexError: Likewise.
    """
    name = op if isinstance(op, str) else getattr(op, "__name__", repr(op))
    if name not in OPS:
        raise ValueError(f"unknown op {name!r}: choose one of {', '.join(sorted(OPS))}")
    record = OPS[name]
    with torch.random.fork_rng(devices=[]):  # a check may draw a dropout seed
        call = record.check(*args, **kwargs)
    if device_of(call).type == "cpu":
        record.check_values(call)
    refusals = {b: r for b in BACKENDS if (r := record.refusal(b, call)) is not None}
    asked = call["backend"]
    order = default_order(device_of(call)) if asked is None else (asked,)
    chosen = next((b for b in order if b not in refusals), None)
    return Explanation(name, chosen, refusals, asked)
