"""The error table: complete, honest about refusals, and red when a backend is wrong."""

import dataclasses
import inspect

import pytest
import torch

from bertgpt import ops, validate
from bertgpt.ops._dispatch import OPS
from bertgpt.validation_cases import OPS as VALIDATED
from bertgpt.validation_cases import samples


def test_covers_every_op_backend_and_dtype():
    assert set(VALIDATED) == set(OPS)
    rows = validate.run("add_layer_norm", "cpu")
    shown = {(row.backend, row.dtype): row.verdict for row in rows}
    for backend in ("torch", "reference"):
        for dtype in ("fp32", "fp16", "bf16", "fp64"):
            assert shown[backend, dtype] == "pass"
    assert shown["cuda", "all"] == "refused"
    assert shown["triton", "all"] == "refused"
    triton = next(row for row in rows if row.backend == "triton")
    assert any("TRITON_INTERPRET" in reason for reason in triton.refusals)


@pytest.mark.parametrize("op", VALIDATED)
def test_every_op_passes_in_every_dtype(op):
    verdicts = {
        (row.backend, row.dtype): row.verdict
        for row in validate.run(op, "cpu")
        if row.backend in ("torch", "reference")
    }
    assert len(verdicts) == 2 * len(validate.DTYPES)
    assert set(verdicts.values()) == {"pass"}


@pytest.mark.parametrize("op", sorted(name for name, op in OPS.items() if op.differentiable))
def test_every_gradient_is_measured(op):
    names = list(inspect.signature(getattr(ops, op)).parameters)
    measured = {
        place if isinstance(place, str) else names[place]
        for sample in samples(op, torch.float32)
        for place in sample.wrt
    }
    assert measured == set(OPS[op].differentiable)


def test_a_wrong_gradient_fails(monkeypatch):
    monkeypatch.setattr(validate, "DTYPES", {torch.float32: "fp32"})

    def zeros(call, grads, saved, names):
        return {name: torch.zeros_like(call[name]) for name in names}

    monkeypatch.setattr(OPS["gelu_ffn"], "gradients", zeros)
    rows = validate.run("gelu_ffn", "cpu")
    assert [row.verdict for row in rows if row.backend == "torch"] == ["FAIL"]


def test_a_biased_backend_fails(monkeypatch):
    monkeypatch.setattr(validate, "DTYPES", {torch.float32: "fp32", torch.bfloat16: "bf16"})
    honest = OPS["linear_gelu"].backends["torch"]
    biased = dataclasses.replace(honest, run=lambda **call: honest.run(**call) * 1.006)
    monkeypatch.setitem(OPS["linear_gelu"].backends, "torch", biased)
    rows = validate.run("linear_gelu", "cpu")
    verdicts = {(row.backend, row.dtype): row.verdict for row in rows}
    assert verdicts["torch", "fp32"] == verdicts["torch", "bf16"] == "FAIL"
    assert verdicts["reference", "fp32"] == "pass"


def test_a_write_to_the_wrong_slot_fails(monkeypatch):
    monkeypatch.setattr(validate, "DTYPES", {torch.float16: "fp16"})
    honest = OPS["paged_write"].backends["torch"]
    shifted = dataclasses.replace(
        honest, run=lambda **call: honest.run(**{**call, "slots": call["slots"].roll(1)})
    )
    monkeypatch.setitem(OPS["paged_write"].backends, "torch", shifted)
    rows = validate.run("paged_write", "cpu")
    assert [row.verdict for row in rows if row.backend == "torch"] == ["FAIL"]


def test_the_table_names_verdicts_refusals_and_violations(capsys):
    rows = [
        validate.Row("attention", "torch", "bf16", cases=3, max_error=0.25, rms_ratio=0.1),
        validate.Row("attention", "triton", "fp16", cases=1, failures=["rms ratio 0.5"]),
        validate.Row("attention", "cuda", "all", refusals=["not built"]),
    ]
    validate.print_table(rows)
    printed = capsys.readouterr().out
    assert "2.50e-01" in printed
    assert "attention triton fp16 FAILED: rms ratio 0.5" in printed
    assert "attention cuda all refused: not built" in printed
    assert "1 pass, 1 FAIL, 1 refused" in printed


def test_unknown_op_and_absent_device():
    with pytest.raises(ValueError, match="choose one of attention"):
        validate.run("softmax")
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="no CUDA device"):
            validate.run("attention", "cuda")


@pytest.mark.interpreter
def test_triton_kernels_are_validated_in_the_interpreter():
    rows = validate.run("paged_write", "cpu")
    triton = {row.dtype: row for row in rows if row.backend == "triton"}
    assert [triton[dtype].verdict for dtype in ("fp32", "fp16", "bf16")] == ["pass"] * 3
    assert triton["fp64"].verdict == "refused"
    assert any("float64" in reason for reason in triton["fp64"].refusals)


def test_samples_are_the_same_at_every_call():
    first, second = samples("attention", torch.float32), samples("attention", torch.float32)
    assert len(first) == len(second) > 10
    assert all(torch.equal(a.args[0], b.args[0]) for a, b in zip(first, second, strict=True))
