"""What each of two processes does in `test_patch_distributed.py`: a module that they can import."""

import copy
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from patching import (
    NO_DROPOUT,
    assert_same_gradients,
    bert,
    gradients,
    inputs_for,
    rows_seen,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

import bertgpt

RANKS = 2


def work(rank, address, folder):
    """Both kinds in one start, which takes longer than either."""
    dist.init_process_group("gloo", init_method=address, rank=rank, world_size=RANKS)
    try:
        torch.manual_seed(0)
        model = bert("BertForMaskedLM", **NO_DROPOUT).train()
        shares = [inputs_for("MaskedLM", side) for side in ("left", "right")]
        each = [gradients(copy.deepcopy(model), share) for share in shares]
        expected = {name: (each[0][name] + each[1][name]) / 2 for name in each[0]}
        for shard in (DistributedDataParallel, sharded):
            wrapped = copy.deepcopy(model)
            bertgpt.patch(wrapped)
            ours = shared_gradients(shard(wrapped), shares[rank])
            assert_same_gradients(ours, expected)
        with pytest.raises(ValueError, match="has become a FSDP"):
            bertgpt.unpatch(wrapped)
        Path(folder, f"rank{rank}").touch()
    finally:
        dist.destroy_process_group()


def sharded(model):
    mesh = init_device_mesh("cpu", (RANKS,))
    for layer in model.bert.encoder.layer:
        fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def shared_gradients(model, inputs):
    with rows_seen() as seen:
        model(**inputs).loss.backward()
    assert len(seen) == 4
    assert all(len(shape) == 1 for shape in seen), "padding was computed"
    found = {}
    for name, parameter in model.named_parameters():
        if (gradient := parameter.grad) is not None:
            whole = gradient.full_tensor() if isinstance(gradient, DTensor) else gradient
            found[name.removeprefix("module.")] = whole
    return found
