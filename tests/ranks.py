"""One of several ranks of a training run: `torchrun tests/ranks.py FOLDER`, for test_ranks.py.

Trains tiny BERTs and GPT-2s under DDP and FSDP2, and leaves their logs, and one checkpoint that a
run was cut off after.
"""

import json
import os
import sys
from pathlib import Path

import pytest
import torch
from accelerate import DistributedType, FullyShardedDataParallelPlugin
from models import BERT, GPT2
from torch.distributed.fsdp import FSDPModule

from bertgpt import BertConfig, BertForPreTraining, GPT2Config, GPT2LMHeadModel
from bertgpt.layers import FeedForward, SelfAttention
from bertgpt.objectives import passages
from bertgpt.recipes import loop
from bertgpt.recipes.pretrain import BertPretraining, GptPretraining, PairBatches, next_word_batch
from bertgpt.recipes.settings import Settings

STEPS, CUT = 5, 3
DROPOUT_OFF = {
    "bert": {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0},
    "gpt": {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0},
}


def task(kind, task_class=None):
    """A task with the same weights every time, and its examples."""
    torch.manual_seed(0)
    if kind == "gpt":
        model = GPT2LMHeadModel(GPT2Config(**GPT2, **DROPOUT_OFF[kind]))
        blocks = [[(7 * i + 3 * j) % 50 + 3 for j in range(2 + i % 17)] for i in range(40)]
        return (task_class or GptPretraining)(model, next_word_batch), blocks
    model = BertForPreTraining(BertConfig(**BERT, **DROPOUT_OFF[kind]))
    documents = [
        [[(7 * d + 5 * s + j) % 50 + 5 for j in range(1 + (d + s) % 6)] for s in range(9)]
        for d in range(7)
    ]
    found, _ = passages(documents, 20)
    batches = PairBatches(20, 2, 3, 4, (0, 2, 3, 4), BERT["vocab_size"])
    examples = [(passage, found) for passage in found]
    return (task_class or BertPretraining)(model, batches), examples


def run(kind, folder, task_class=None, **options):
    made, examples = task(kind, task_class)
    settings = Settings(
        folder,
        batch_size=7,  # which two ranks cannot share evenly
        max_steps=STEPS,
        learning_rate=1e-2,
        checkpoint_every=1,
        cpu=True,
        accumulation=options.pop("accumulation", 1),
    )
    result = loop.train(made, examples, settings, held_out=examples[:5], **options)
    return made, {"log": result.log, "before": result.before, "after": result.after}


class Cut(Exception):
    pass


class CutOff(GptPretraining):
    """Fails after so many steps, on every rank at once."""

    left = CUT

    def forward(self, batch):
        self.left -= self.training
        if self.left < 0:
            raise Cut
        return super().forward(batch)


def sharded(settings, plain=loop._accelerator):
    """An accelerator under FSDP2; on a CPU accelerate itself goes no further than DDP."""
    accelerator = plain(settings)
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2, auto_wrap_policy="transformer_based_wrap"
    )
    loop._prepare_sharding(plugin)
    accelerator.state.fsdp_plugin = plugin
    accelerator.state.distributed_type = DistributedType.FSDP
    return accelerator


def main(folder):
    found = {}
    for name in ("ddp", "fsdp"):
        if name == "fsdp":
            loop._accelerator = sharded
        for kind in ("bert", "gpt"):
            made, figures = run(kind, folder / f"{name}-{kind}", accumulation=1 + (kind == "bert"))
            layers = [m for m in made.modules() if isinstance(m, SelfAttention | FeedForward)]
            assert all(isinstance(m, FSDPModule) == (name == "fsdp") for m in (made, *layers))
            found[f"{name}-{kind}"] = figures
    with pytest.raises(Cut):
        run("gpt", folder / "cut", CutOff)
    torch.distributed.barrier()
    if os.environ["RANK"] == "0":
        (folder / "figures.json").write_text(json.dumps(found))
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
