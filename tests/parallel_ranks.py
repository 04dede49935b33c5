"""What each of two processes does in `test_tensor_parallel.py`: a module that they can import."""

import copy
import json
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard

import bertgpt

RANKS = 2
SIZES = {"vocab_size": 61, "initializer_range": 0.3}
BERT = {
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 40,
    "attention_probs_dropout_prob": 0.0,
}
GPT2 = {"n_embd": 24, "n_layer": 2, "n_head": 4, "n_positions": 48, "attn_pdrop": 0.0}
NEO = {
    "hidden_size": 24,
    "num_layers": 2,
    "num_heads": 4,
    "attention_types": [[["global", "local"], 1]],
    "window_size": 4,
    "max_position_embeddings": 48,
}
OPENAI = {"n_embd": 24, "n_layer": 2, "n_head": 4, "n_positions": 48, "attn_pdrop": 0.0}
MODELS = {
    "BertForMaskedLM": BERT,
    "GPT2LMHeadModel": GPT2,
    "GPTNeoForCausalLM": NEO,
    "OpenAIGPTLMHeadModel": OPENAI,
}
PROMPTS = [[7, 9, 11], [5], [3, 4, 5, 6, 7, 8, 9]]


def work(rank, address, folder):
    """Everything in one start, which takes longer than any of it."""
    dist.init_process_group("gloo", init_method=address, rank=rank, world_size=RANKS)
    try:
        mesh = init_device_mesh("cpu", (RANKS,))
        for name in MODELS:
            print(name, rank)
            same_as_alone(name, mesh)
        Path(folder, f"rank{rank}").touch()
    finally:
        dist.destroy_process_group()


def make(name, **changes):
    """A model with the same weights every time."""
    torch.manual_seed(0)
    kind = getattr(bertgpt, name)
    return kind(kind.config_class(**SIZES, **MODELS[name] | changes))


def batch_of(name):
    torch.manual_seed(1)
    ids = torch.randint(3, 61, (4, 12))
    mask = (torch.arange(12) < torch.tensor([7, 1, 12, 4])[:, None]).long()
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.where(mask.bool(), -100)}


def step(model, inputs):
    """Logits and loss of a step of training from a given state, and the gradients, whole."""
    torch.manual_seed(2)
    out = model.train()(**inputs)
    out.loss.backward()
    found = {}
    for name, parameter in model.named_parameters():
        gradient = parameter.grad
        found[name] = gradient.full_tensor() if isinstance(gradient, DTensor) else gradient
    return out.logits.detach(), found


def same_as_alone(name, mesh):
    alone = make(name)
    split = bertgpt.tensor_parallel(copy.deepcopy(alone), mesh)
    inputs = batch_of(name)
    with torch.no_grad():
        close(split.eval()(**inputs).logits, alone.eval()(**inputs).logits)
    (logits, gradients), (expected, whole) = step(split, inputs), step(alone, inputs)
    close(logits, expected)
    assert gradients.keys() == whole.keys()
    for key, gradient in gradients.items():
        close(gradient, whole[key])


def close(found, expected):
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
