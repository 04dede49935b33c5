"""Whether a model is still what it was: its mode, its weights, and where they lie. Reads no value.

Keys and values in a cache, and captured CUDA graphs, are those of the weights that they were made
with. Torch counts the writes to a tensor, so it costs some ten microseconds, and no wait for a
device, to see that there was one.
"""

from __future__ import annotations

import operator
import weakref
from collections.abc import Iterable
from itertools import chain
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook


class WeightWatch:
    """Compares a model with what it was at the last look.

    Seen are weights written in place (`load_state_dict`, `copy_`), written by one of torch's
    optimizers, moved (`to`, `.data = …`) or replaced, and modules replaced. Not seen are writes that
    torch does not count: through `.data` or `.detach().numpy()`, and to tensors that were made under
    `torch.inference_mode()`.

    Args:
        model: The model.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._optimized = False
        self._read_structure()
        watch = weakref.ref(self)

        def notice(optimizer: torch.optim.Optimizer, *_: object) -> None:
            if (own := watch()) is not None:
                own._notice(optimizer)

        # Fused optimizers' writes are not counted.
        handle = register_optimizer_step_post_hook(notice)
        weakref.finalize(self, handle.remove)

    @property
    def training(self) -> bool:
        """Whether the model, or a part of it, is in training mode."""
        return any(module.training for module in self._modules)

    def look(self) -> Literal["written", "moved"] | None:
        """What happened to the weights since the last look, and looks that way from now on.

        Returns:
            None if nothing has; "moved" if some lie elsewhere than they did, "written" if they are
            where they were and hold other values.
        """
        optimized, self._optimized = self._optimized, False
        parts = _values(self._tables)
        if len(parts) != len(self._parts) or not all(map(operator.is_, parts, self._parts)):
            self._read_structure()
            return "moved"
        places, counts = self._places, self._counts
        self._read_weights()
        if places != self._places:
            return "moved"
        return "written" if optimized or counts != self._counts else None

    def _read_structure(self) -> None:
        self._modules = list(self._model.modules())
        tables = [t for m in self._modules for t in (m._modules, m._parameters, m._buffers)]
        self._tables = [table for table in tables if table]
        self._parts = _values(self._tables)
        self._weights = [part for part in self._parts if isinstance(part, Tensor)]
        self._counted = [weight for weight in self._weights if not weight.is_inference()]
        self._read_weights()

    def _read_weights(self) -> None:
        self._places = [weight.data_ptr() for weight in self._weights]
        self._counts = [weight._version for weight in self._counted]

    def _notice(self, optimizer: torch.optim.Optimizer) -> None:
        """After a step of any optimizer."""
        own = set(map(id, self._weights))
        groups = optimizer.param_groups
        self._optimized |= any(id(weight) in own for group in groups for weight in group["params"])


def _values(tables: Iterable[dict[str, Any]]) -> list[Any]:
    return list(chain.from_iterable(map(dict.values, tables)))
