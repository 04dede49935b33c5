"""The suite's own cases: every shape that a target names is there, and each tells less work."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from contests import contest, reason_of

from bertgpt import ops
from bertgpt.benchmarks import (
    bench_add_layer_norm,
    bench_attention,
    bench_embeddings,
    bench_gelu_ffn,
    bench_linear_gelu,
    bench_models,
    bench_paged_attention,
    bench_paged_write,
    suite,
)
from bertgpt.benchmarks.case import Case, Inputs
from bertgpt.benchmarks.real_lengths import QUANTILES, real_lengths

Prepare = Callable[[Case, Inputs], Callable[[], Any]]
SIZES, BATCHES = ("124M", "355M"), (1, 8, 64)
NAMES = {entry.case.label for entry in suite.entries("cuda")}

# What the targets name, by op; the test asks for each.
WANTED = [
    *(
        f"attention: forward H{heads} D64 S{length} B{16384 // length}{causal}"
        for heads in (12, 16)
        for length in (128, 256, 512, 1024, 2048, 4096, 8192, 16384)
        for causal in ("", " causal")
    ),
    *(
        f"attention: forward H12 D64 S512 B32{causal} {ragged}"
        for causal in ("", " causal")
        for ragged in ("packed", "key lengths")
    ),
    *(f"attention: forward + backward H12 D64 {shape}" for shape in ("S512 B32", "S4096 B4")),
    "attention: forward H8 D128 S4096 B4 causal",
    *(
        f"gelu_ffn: {kind} M{rows} {width}→{4 * width} {form}"
        for kind in ("forward", "forward + backward")
        for rows in (2048, 8192, 32768)
        for width in (768, 1024, 1600)
        for form in ("erf", "tanh")
    ),
    *(f"linear_gelu: M{m} 768→3072 {form}" for m in (8192, 32768) for form in ("erf", "bare")),
    *(f"embeddings: {rows}×{width}" for rows in (2048, 65536) for width in (768, 1024, 1600)),
    *(f"add_layer_norm: {rows}×{width}" for rows in (2048, 65536) for width in (768, 1024)),
    *(f"paged_attention: H{heads} B64 context 4096 page 16" for heads in (12, 16, 25)),
    *(f"paged_attention: H12 B64 context 4096 page {page}" for page in (64, 128)),
    *(f"paged_attention: H12 B{batch} context {keys} page 16"
      for batch, keys in ((1, 128), (1, 1024), (1, 32768), (256, 128), (64, 32768))),
    "paged_attention: H12 B256 skewed to 8192 page 16",
    "paged_attention: H12 B256 context 32896, 32768 shared page 16",
    "paged_attention: H12 B256 context 32896 page 16",
    *(
        f"bert encode: bert-{size} B{batch} S{length}{'' if batch == 1 else ' ragged'}"
        for size in ("base", "large")
        for batch in (1, 16, 64, 256)
        for length in (128, 384, 512)
    ),
    *(f"bert encode: bert-base B64 {kind}" for kind in QUANTILES),
    *(f"gpt2 prefill: gpt2-{size} B{batch} S1024" for size in SIZES for batch in BATCHES),
    *(f"gpt2 decode: gpt2-{size} B{batch} 32+96 tokens" for size in SIZES for batch in BATCHES),
    "gpt2 decode: gpt2-124M B64 960+32 tokens",
    "bert training step: bert-base B16 S512",
    "gpt2 training step: gpt2-124M B8 S1024",
]  # fmt: skip


@pytest.mark.parametrize("label", WANTED)
def test_a_case_of_each_target_is_there(label):
    assert label in NAMES


def test_every_op_and_model_has_a_case_on_a_cpu():
    found = {
        device: {entry.case.op for entry in suite.entries(device)} for device in ("cpu", "cuda")
    }
    assert found["cpu"] == found["cuda"]
    assert set(ops._dispatch.OPS) - found["cpu"] == set()


def test_real_lengths_are_the_quantiles():
    for kind, quantiles in QUANTILES.items():
        assert list(quantiles) == sorted(quantiles)
        assert sorted(real_lengths(kind, 64)) == list(quantiles)
        assert max(quantiles) <= 512


def _on_cpu(module: Any, contains: str) -> Case:
    return next(c for c in module.CASES if c.device == "cpu" and contains in c.name)


def _attention(**changed: Any) -> Prepare:
    """Torch's backend with an argument changed or left out."""

    def prepare(case: Case, inputs: Inputs) -> Callable[[], Any]:
        part = {k: v for k, v in {**inputs, **changed}.items() if v is not None}
        call = {"attend": ops.attention, "backend": "torch"}
        return lambda: bench_attention._forward(part, **call)

    return prepare


def _unsplit(case: Case, inputs: Inputs) -> Callable[[], Any]:
    """All packed tokens as one sequence."""
    whole = torch.tensor([0, len(inputs["q"])], dtype=torch.int32)
    return _attention(cu_seqlens=whole, max_seqlen=len(inputs["q"]))(case, inputs)


def _whole_pages(case: Case, inputs: Inputs) -> Callable[[], Any]:
    """Every key that a page table has room for."""
    keys = inputs["page_table"].shape[1] * inputs["k_pages"].shape[2]
    names = ("q", "k_pages", "v_pages", "page_table")
    lengths = torch.full_like(inputs["lengths"], keys)
    return lambda: ops.paged_attention(*(inputs[n] for n in names), lengths, backend="torch")


def _no_weight_gradient(case: Case, inputs: Inputs) -> Callable[[], Any]:
    leaves = [inputs[name].requires_grad_() for name in bench_gelu_ffn._TENSORS]

    def run() -> Any:
        out = bench_gelu_ffn._eager(*bench_gelu_ffn._arguments(inputs))
        (d_x,) = torch.autograd.grad(out, leaves[:1], inputs["d_out"])
        return (d_x, *(torch.zeros_like(leaf) for leaf in leaves[1:]))

    return run


def _other_gelu(case: Case, inputs: Inputs) -> Callable[[], Any]:
    return lambda: F.gelu(F.linear(inputs["x"], inputs["w"], inputs["b"]), approximate="tanh")


def _no_residual(case: Case, inputs: Inputs) -> Callable[[], Any]:
    return lambda: F.layer_norm(
        inputs["x"], inputs["x"].shape[-1:], inputs["weight"], inputs["bias"]
    )


def _no_positions(case: Case, inputs: Inputs) -> Callable[[], Any]:
    arguments = {name: inputs[name] for name in bench_embeddings._NAMES}
    zeros = torch.zeros_like(inputs["positions"])
    return lambda: bench_embeddings._eager(**{**arguments, "positions": zeros})


def _keys_alone(case: Case, inputs: Inputs) -> Callable[[], Any]:
    k, _, k_pages, v_pages, slots = bench_paged_write._arguments(inputs)

    def run() -> Any:
        bench_paged_write._put(k, k, k_pages, v_pages.clone(), slots)
        return k_pages, v_pages

    return run


def _no_mask(case: Case, inputs: Inputs) -> Callable[[], Any]:
    whole = {**inputs, "attention_mask": torch.ones_like(inputs["attention_mask"])}
    return bench_models._ours_padded(case, whole)


LESS = {
    "attention without causality": (bench_attention, "B4 causal", _attention(causal=False)),
    "attention without key lengths": (bench_attention, "key lengths", _attention(key_lengths=None)),
    "attention over one long sequence": (bench_attention, "packed", _unsplit),
    "attention over whole pages": (bench_paged_attention, "skewed", _whole_pages),
    "gradients of the inputs alone": (bench_gelu_ffn, "backward", _no_weight_gradient),
    "the tanh form for erf": (bench_linear_gelu, "erf", _other_gelu),
    "no residual": (bench_add_layer_norm, "1024×384", _no_residual),
    "no positions": (bench_embeddings, "", _no_positions),
    "keys without values": (bench_paged_write, "in a row", _keys_alone),
    "an encoder that sees the padding": (bench_models, "bert-tiny", _no_mask),
}  # fmt: skip


@pytest.mark.parametrize("less", LESS)
def test_a_peer_with_less_work_is_refused_by_the_case_itself(less):
    module, name, prepare = LESS[less]
    assert "wrong before timing" in reason_of(prepare, case=_on_cpu(module, name))


def test_the_whole_work_is_measured():
    case = _on_cpu(bench_attention, "packed")
    assert contest(_attention(), case=case)[0].measured
