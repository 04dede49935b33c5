"""What all work of an engine has in common, whichever thread it runs in."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import torch
from torch import Tensor

from bertgpt import ops


class Turn:
    """A context for an engine's work: modes, device, order there, and whose errors are whose.

    Clients call from threads with modes, current devices and streams of their own. Within, tensors
    are ordinary ones that any later turn can write to, even if the client is in inference mode; the
    engine's device is the current one; what the device still has to do for the turn before comes
    first, if that was asked for on another stream (for the first turn, what the thread that makes
    this has asked for); and kernels that skip a bad index tell this engine and no other. Turns must
    not overlap.

    Args:
        device: Where the engine's tensors are.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.current_stream(device) if device.type == "cuda" else None
        self._flags: dict[torch.device, Tensor] = {}

    @contextmanager
    def __call__(self) -> Iterator[None]:
        """One turn."""
        on_cuda = self._device.type == "cuda"
        device = torch.cuda.device(self._device) if on_cuda else nullcontext()
        # In this order: leaving inference mode would otherwise let gradients be kept.
        with torch.inference_mode(False), torch.no_grad(), device, ops.own_flags(self._flags):
            if on_cuda:
                self._follow(torch.cuda.current_stream(self._device))
            yield

    def _follow(self, stream: torch.cuda.Stream) -> None:
        if self._stream is not None and self._stream != stream:
            stream.wait_stream(self._stream)
        self._stream = stream
