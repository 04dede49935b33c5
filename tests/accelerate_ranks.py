"""What each of two processes does in `test_patch_accelerate.py`: a module that they can import."""

import copy
import os
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from accelerate import Accelerator, DistributedType, FullyShardedDataParallelPlugin
from accelerate.state import AcceleratorState, PartialState
from patching import NO_DROPOUT, bert, ragged, rows_seen
from safetensors.torch import load_file
from torch.distributed.fsdp import FSDPModule
from transformers import Trainer, TrainingArguments

import bertgpt

RANKS, STEPS, RATE = 2, 2, 0.1


def work(rank, address, folder):
    """Both ways in one start, which takes longer than either."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(RANKS)}
    os.environ |= {"LOCAL_WORLD_SIZE": str(RANKS), "MASTER_ADDR": "localhost", "MASTER_PORT": "0"}
    dist.init_process_group("gloo", init_method=address, rank=rank, world_size=RANKS)
    try:
        sharding_on_a_cpu()
        model, rows = example()
        expected = trained_alone(copy.deepcopy(model), rows)
        for loading in (False, True):
            assert_same(by_accelerate(copy.deepcopy(model), rows, loading), expected)
        stock = by_trainer(copy.deepcopy(model), rows, Path(folder, "stock"))
        bertgpt.patch(model)
        with no_padding():
            assert_same(by_trainer(model, rows, Path(folder, "patched")), stock)
        Path(folder, f"rank{rank}").touch()
    finally:
        dist.destroy_process_group()


def sharding_on_a_cpu(plain=AcceleratorState.__init__):
    """On a CPU accelerate itself goes no further than DDP, whatever plugin it is given."""

    def init(self, *args, fsdp_plugin=None, **kwargs):
        plain(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
        if fsdp_plugin is not None:
            self.fsdp_plugin, self.distributed_type = fsdp_plugin, DistributedType.FSDP
            PartialState._shared_state["distributed_type"] = DistributedType.FSDP

    AcceleratorState.__init__ = init


def example():
    """A classifier, and eight ragged rows with their labels."""
    torch.manual_seed(0)
    model = bert("BertForSequenceClassification", num_labels=3, **NO_DROPOUT).train()
    sides = [ragged(side) for side in ("right", "left")]
    columns = {name: torch.cat([side[name] for side in sides]) for name in sides[0]}
    columns["labels"] = torch.arange(8) % 3
    return model, [{name: column[i] for name, column in columns.items()} for i in range(8)]


def batch_of(rows):
    return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}


def trained_alone(model, rows):
    """Stock's weights after steps over all rows."""
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
    for _ in range(STEPS):
        model(**batch_of(rows)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.state_dict()


def by_accelerate(model, rows, loading):
    """The patched model's weights after the same, each rank with half of the rows."""
    AcceleratorState._reset_state(reset_partial_state=True)
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2,
        auto_wrap_policy="transformer_based_wrap",
        transformer_cls_names_to_wrap=["BertLayer"],
        state_dict_type="FULL_STATE_DICT",
        cpu_ram_efficient_loading=loading,
    )
    accelerator = Accelerator(cpu=True, fsdp_plugin=plugin)
    bertgpt.patch(model)
    model, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=RATE))
    assert all(isinstance(layer, FSDPModule) for layer in model.bert.encoder.layer)
    share = batch_of(rows[accelerator.process_index :: RANKS])
    for _ in range(STEPS):
        with no_padding():
            loss = model(**share).loss
            accelerator.backward(loss)
        assert accelerator.clip_grad_norm_(model.parameters(), 1e9).isfinite()
        optimizer.step()
        optimizer.zero_grad()
    with pytest.raises(ValueError, match="has become a FSDP"):
        bertgpt.unpatch(model)
    return accelerator.get_state_dict(model)


def by_trainer(model, rows, folder):
    """Weights after steps of transformers' Trainer, as it writes them."""
    AcceleratorState._reset_state(reset_partial_state=True)
    arguments = TrainingArguments(
        str(folder),
        use_cpu=True,
        fsdp=True,
        fsdp_config={
            "fsdp_version": 2,
            "state_dict_type": "FULL_STATE_DICT",
            "transformer_layer_cls_to_wrap": ["BertLayer"],
        },
        per_device_train_batch_size=len(rows) // RANKS,
        max_steps=STEPS,
        learning_rate=RATE,
        lr_scheduler_type="constant",
        optim="sgd",
        max_grad_norm=0.0,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
    )
    trainer = Trainer(model, arguments, train_dataset=rows)
    trainer.train()
    wrapped = trainer.model_wrapped
    assert all(isinstance(m, FSDPModule) for m in (wrapped, *wrapped.bert.encoder.layer))
    trainer.save_model(str(folder / "whole"))
    dist.barrier()
    return load_file(folder / "whole" / "model.safetensors")


@contextmanager
def no_padding():
    """Every layer runs patched, on packed tokens."""
    with rows_seen() as seen:
        yield
    assert seen, "no block is patched"
    assert all(len(shape) == 1 for shape in seen), "padding was computed"


def assert_same(found, expected):
    if not found:  # of the ranks, the first has whole weights
        assert dist.get_rank() > 0
        return
    assert found.keys() == expected.keys()
    for name, weight in found.items():
        torch.testing.assert_close(weight, expected[name], rtol=1e-4, atol=1e-5)
