"""What each of two processes does in `test_tensor_parallel.py`: a module that they can import."""

import copy
import re
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor

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
ALBERT = BERT | {"embedding_size": 16}
DISTIL = {"dim": 24, "n_layers": 2, "n_heads": 4, "hidden_dim": 40, "attention_dropout": 0.0}
MODELS = {
    "BertForMaskedLM": BERT,
    "RobertaForMaskedLM": BERT,
    "AlbertForMaskedLM": ALBERT,
    "DistilBertForMaskedLM": DISTIL,
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
            same_as_alone(name, mesh)
        trains_and_saves("BertForMaskedLM", mesh, Path(folder, "bert"))
        trains_and_saves("GPT2LMHeadModel", mesh, Path(folder, "gpt2"))
        generates_as_alone(mesh)
        refuses(mesh)
        Path(folder, f"rank{rank}").touch()
    finally:
        dist.destroy_process_group()


def make(name, **changes):
    """A model with the same weights every time."""
    torch.manual_seed(0)
    kind = getattr(bertgpt, name)
    model = kind(kind.config_class(**SIZES, **MODELS[name] | changes))
    for key, parameter in model.named_parameters():
        if key.endswith("bias"):  # which start as zeros
            torch.nn.init.normal_(parameter, std=0.3)
    return model


def batch_of(ragged):
    """Ids, their mask and labels, `[B, L]` each."""
    torch.manual_seed(1)
    ids = torch.randint(3, 61, (4, 12))
    lengths = torch.tensor([7, 1, 12, 4]) if ragged else torch.tensor([12] * 4)
    mask = (torch.arange(12) < lengths[:, None]).long()
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.where(mask.bool(), -100)}


def same_as_alone(name, mesh):
    """Outputs and gradients, with and without dropout, of packed and of equal sequences."""
    alone = make(name)
    split = bertgpt.tensor_parallel(copy.deepcopy(alone), mesh)
    for ragged in (True, False):
        inputs = batch_of(ragged)
        with torch.no_grad():
            close(split.eval()(**inputs).logits, alone.eval()(**inputs).logits)
        found, expected = step(split, inputs, mesh.get_rank()), step(alone, inputs, 0)
        close(found["logits"], expected["logits"])
        assert found.keys() == expected.keys()
        for key, gradient in found.items():
            close(gradient, expected[key])
        split.gradient_checkpointing_enable()  # the second time


def step(model, inputs, seed):
    """Logits of a step of training from a seed, and each parameter's gradient."""
    torch.manual_seed(seed)
    model.zero_grad()
    out = model.train()(**inputs)
    out.loss.backward()
    found = {"logits": out.logits.detach()}
    for name, parameter in model.named_parameters():
        gradient = parameter.grad
        if isinstance(gradient, DTensor):
            gradient = gradient.full_tensor()
        fused = re.sub(r"\.qkv\.[qkv]\.", ".qkv.", name)
        found[fused] = torch.cat([found[fused], gradient]) if fused in found else gradient
    return found


def close(found, expected):
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def trains_and_saves(name, mesh, folder):
    """A clipped step of SGD; the file holds the weights that one process comes to."""
    alone = make(name)
    split = bertgpt.tensor_parallel(copy.deepcopy(alone), mesh)
    attention = split.base_model.layers[0].attention
    assert attention.heads == 2
    assert attention.qkv.q.weight.shape == (12, 24), "not in parts"
    for model in (alone, split):
        step(model, batch_of(ragged=True), 0)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        torch.optim.SGD(model.parameters(), lr=0.5).step()
    close(split.get_output_embeddings().weight, split.get_input_embeddings().weight)
    split.save_pretrained(folder)
    kept = type(alone).from_pretrained(folder)
    for key, weight in alone.state_dict().items():
        close(kept.state_dict()[key], weight)


def generates_as_alone(mesh):
    """Greedily, by beams and by draws, each rank on the pages of its own heads."""
    for name in ("GPT2LMHeadModel", "GPTNeoForCausalLM", "OpenAIGPTLMHeadModel"):
        alone = make(name).eval()
        split = bertgpt.tensor_parallel(copy.deepcopy(alone), mesh)
        for options in ({}, {"num_beams": 3}, {"do_sample": True, "seed": 5}):
            found = split.generate(PROMPTS, 12, **options)
            assert found == alone.generate(PROMPTS, 12, **options)


def refuses(mesh):
    """By name, before anything has changed."""
    one = init_device_mesh("cpu", (1, RANKS), mesh_dim_names=("dp", "tp"))
    for name, change, message in (
        ("BertForMaskedLM", {"num_attention_heads": 3}, "num_attention_heads .* is 3, which 2"),
        ("BertForMaskedLM", {"intermediate_size": 41}, "intermediate_size .* is 41, which 2"),
        ("GPT2LMHeadModel", {"n_inner": 41}, "intermediate_size .* is 41, which 2"),
    ):
        model = make(name, **change)
        with pytest.raises(ValueError, match=message):
            bertgpt.tensor_parallel(model, mesh)
        assert not any(isinstance(parameter, DTensor) for parameter in model.parameters())
        assert model.mesh is None
        model(**batch_of(ragged=True)).loss.backward()
    model = make("GPT2LMHeadModel", attn_pdrop=0.1)
    with pytest.raises(TypeError, match="not a Linear"):
        bertgpt.tensor_parallel(torch.nn.Linear(2, 2), mesh)
    with pytest.raises(TypeError, match="mesh must be a DeviceMesh, not a int"):
        bertgpt.tensor_parallel(model, RANKS)
    with pytest.raises(ValueError, match=r"one dimension, not 2: .* mesh\['tp'\]"):
        bertgpt.tensor_parallel(model, one)
    with pytest.raises(ValueError, match="the model is on meta but the mesh on cpu"):
        bertgpt.tensor_parallel(copy.deepcopy(model).to("meta"), mesh)
    bertgpt.tensor_parallel(model, one["tp"])
    with pytest.raises(ValueError, match="split over ranks already"):
        bertgpt.tensor_parallel(model, mesh)
    with pytest.raises(ValueError, match=r"attention dropout of 0.1 .*attn_pdrop"):
        model.train()(**batch_of(ragged=True))
    with pytest.raises(ValueError, match="seed must be given"):
        model.eval().generate(PROMPTS, 3, do_sample=True)
    with pytest.raises(ValueError, match="split over ranks"):
        bertgpt.Engine(model, num_pages=8)
