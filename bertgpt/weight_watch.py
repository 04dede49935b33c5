"""Whether a model is still what it was: its mode, its weights, and where they lie. Reads no value.

Keys and values in a cache, and captured CUDA graphs, are those of the weights that they were made
with. Torch counts the writes to a tensor, so seeing that there was one takes no wait for a device.
"""

from __future__ import annotations

import operator
import threading
import weakref
from collections.abc import Iterable
from itertools import chain
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook

Change = Literal["written", "moved"]


class WeightWatch:
    """Compares a model with what it was when its changes were last heeded.

    Seen are weights written in place (`load_state_dict`, `copy_`), written by one of torch's
    optimizers, moved (`to`, `.data = …`) or replaced, and modules replaced. Not seen are writes
    that torch does not count: through `.data` or `.detach().numpy()`, and to weights that were made
    under `torch.inference_mode()`; nor a new `.data` that was given the memory of the old one.

    Args:
        model: The model.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._change: Change | None = None
        self._told = False
        self._read_structure()
        with _lock:
            _watches.add(self)

    def _read_structure(self) -> None:
        self._modules = list(self._model.modules())
        tables = [t for m in self._modules for t in (m._modules, m._parameters, m._buffers)]
        self._tables = [table for table in tables if table]
        self._parts = _values(self._tables)
        self._weights = [part for part in self._parts if isinstance(part, Tensor)]
        self._counted = [weight for weight in self._weights if not weight.is_inference()]
        self._places, self._counts = self._places_and_counts()

    def _places_and_counts(self) -> tuple[list[int], list[int]]:
        places = [weight.data_ptr() for weight in self._weights]
        return places, [weight._version for weight in self._counted]

    @property
    def training(self) -> bool:
        """Whether the model, or a part of it, is in training mode."""
        return any(module.training for module in self._modules)

    def look(self) -> Change | None:
        """What has happened to the weights.

        Returns:
            None if nothing has; "moved" if some lie elsewhere than they did, "written" if they are
            where they were and hold other values. The same again until `heeded` is called, so that
            an interrupt loses nothing.
        """
        if self._told:
            self._change = self._change or "written"
            self._told = False
        parts = _values(self._tables)
        if len(parts) != len(self._parts) or not all(map(operator.is_, parts, self._parts)):
            self._change = "moved"
            self._read_structure()
            return self._change
        places, counts = self._places_and_counts()
        if places != self._places:
            self._change = "moved"
        elif counts != self._counts:
            self._change = self._change or "written"
        self._places, self._counts = places, counts
        return self._change

    def tell(self) -> None:
        """Says that weights were written in a way that is not seen. Any thread may, at any time."""
        self._told = True

    def heeded(self) -> None:
        """What the last look saw has been acted upon; what was told since, the next one sees."""
        self._change = None

    def notice(self, optimizer: torch.optim.Optimizer) -> None:
        """After a step of any optimizer."""
        own = set(map(id, self._weights))
        groups = optimizer.param_groups
        if any(id(weight) in own for group in groups for weight in group["params"]):
            self.tell()


def _values(tables: Iterable[dict[str, Any]]) -> list[Any]:
    return list(chain.from_iterable(map(dict.values, tables)))


_watches: weakref.WeakSet[WeightWatch] = weakref.WeakSet()
_lock = threading.Lock()  # of the set, which is not to grow while it is listed


def _notice(optimizer: torch.optim.Optimizer, *_: object) -> None:
    with _lock:
        watches = list(_watches)
    for watch in watches:
        watch.notice(optimizer)


# Fused optimizers' writes are not counted. One hook for all, which stays: torch goes through its
# hooks, in whichever thread trains, while watches come and, by the garbage collector, go.
register_optimizer_step_post_hook(_notice)
