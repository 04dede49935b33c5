"""A run's state in one safetensors file: weights, AdamW's moments, and the step they stand after.

Written under another name and renamed, so that a run that is cut short leaves the last whole file.
Tensors are whole whatever the number of ranks, so that a run may go on on another number.
"""

from __future__ import annotations

import hashlib
import json
import pickle
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from bertgpt.checkpoint import SAFETENSORS

FILE = "training.safetensors"


def digest(examples: Sequence[Any]) -> str:
    """SHA-256 of what the examples hold; what many of them share is read once."""
    digest = hashlib.sha256()
    pickle.Pickler(SimpleNamespace(write=digest.update), protocol=5).dump(list(examples))
    return digest.hexdigest()


def way_out(folder: Path) -> str:
    """What to do about an output folder that does not fit."""
    if (folder / FILE).is_file():
        return "resume it, or name another"
    if (folder / SAFETENSORS).is_file():
        return "it is finished: name another"
    return "it has no checkpoint: delete it, or name another"


def whole(tensor: Tensor) -> Tensor:
    """The tensor, gathered from all ranks where it is sharded (every rank must call)."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def _slots(model: nn.Module, optimizer: torch.optim.Optimizer) -> Iterator[tuple[str, Tensor]]:
    """Name and place of every tensor of the state; AdamW's are made where they do not exist yet."""
    for name, weight in model.named_parameters():
        yield f"model.{name}", weight.detach()
        for key, tensor in optimizer.state.get(weight, {}).items():
            yield f"{key}.{name}", tensor


def save(
    folder: Path,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    facts: Mapping[str, Any],
    write: bool,
) -> Path:
    """Writes the state; every rank calls, the one that is told to `write` does.

    Args:
        folder: where the file goes.
        model: the model trained.
        optimizer: its AdamW.
        facts: what else to know, as JSON can hold it.
        write: whether this rank writes.

    Returns:
        The file.
    """
    tensors = {}
    for name, tensor in _slots(model, optimizer):
        full = whole(tensor)
        if write:
            tensors[name] = full.cpu().contiguous()
    file = folder / FILE
    if write:
        partial = file.with_name(f".{FILE}.partial")
        save_file(tensors, partial, metadata={"facts": json.dumps(facts)})
        partial.replace(file)
    return file


def read_facts(folder: Path) -> dict[str, Any]:
    """What was saved beside the tensors.

    Raises:
        FileNotFoundError: there is no checkpoint.
        ValueError: it is broken.
    """
    file = folder / FILE
    if not file.is_file():
        raise FileNotFoundError(f"{folder} has no {FILE} to resume from: {way_out(folder)}")
    try:
        with safe_open(file, "pt") as stored:
            facts: dict[str, Any] = json.loads(stored.metadata()["facts"])
            return facts
    except (SafetensorError, ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{file} is no checkpoint of a training run: {error}") from error


@torch.no_grad()
def load(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Reads the state back into a model and a fresh AdamW, after checking that all of it fits.

    Raises:
        ValueError: the checkpoint is of another shape; nothing has changed.
    """
    file = folder / FILE
    with safe_open(file, "pt") as stored:
        names = set(stored.keys())
        there = {n: stored.get_slice(n).get_shape() for n in names if n.startswith("model.")}
        here = {f"model.{name}": list(weight.shape) for name, weight in model.named_parameters()}
        for name in sorted(there.keys() | here.keys()):
            if there.get(name) != here.get(name):
                raise ValueError(
                    f"{file} is of another shape: {name.removeprefix('model.')} is "
                    f"{there.get(name, 'absent')} there and {here.get(name, 'absent')} here"
                )
        for name, weight in model.named_parameters():
            if f"exp_avg.{name}" in names:
                moments = {key: torch.zeros_like(weight) for key in ("exp_avg", "exp_avg_sq")}
                optimizer.state[weight] = {"step": torch.zeros(()), **moments}
        for name, slot in _slots(model, optimizer):
            _fill(slot, stored.get_tensor(name))


def _fill(slot: Tensor, full: Tensor) -> None:
    if isinstance(slot, DTensor):
        full = full.to(slot.device)
        full = distribute_tensor(full, slot.device_mesh, slot.placements)
    slot.copy_(full)
