"""Mistakes planted in attention's kernels, forward and backward, are found by their gradients.

As in `test_mutants`, but the planted function replaces the original wherever a kernel uses it, and
gradients and dropout are measured too.
"""

import importlib
from typing import Any

import pytest
import torch
from test_mutants import ROOT, _mutate

from bertgpt import ops
from bertgpt.accuracy import measure
from bertgpt.validation_cases import Sample, samples

pytestmark = [pytest.mark.interpreter, pytest.mark.filterwarnings("ignore::RuntimeWarning")]

# Device functions that the kernels of attention, forward and backward, share or split.
ATTENTION: tuple[tuple[str, str, str, str], ...] = (
    ("primitives", "keys <= queries + (diagonal + window", "keys <= queries + (window", "diagonal"),
    ("primitives", "(diagonal - window_left)", "(diagonal - window_left - 1)", "left off by one"),
    ("primitives", "scores += allowed", "scores -= allowed", "bias negated"),
    ("dropout", "zeros + c1.to(", "zeros + 1 + c1.to(", "dropout's query"),
    ("dropout", "tl.join(word_0, word_2)", "tl.join(word_1, word_2)", "a dropout word twice"),
    ("primitives", "keep, grad_weights * keep_scale, 0.0", "keep, grad_weights, 0.0", "z of dS"),
    ("primitives", "p * (grad_weights - delta)", "p * grad_weights", "no delta"),
    ("primitives", "-diagonal, queries", "diagonal, queries", "query tiles"),
    ("primitives", "queries, window_right, window_left,", "queries, window_left, window_right,",
     "window not mirrored"),
    ("attention", "tl.log2(l_i)", "tl.log(l_i)", "a natural log in the statistics"),
    ("attention_dq", "(dq * scale)", "(dq)", "scale of dQ"),
    ("attention_dq", "seen = (keys >= lo) & (keys < hi)", "seen = keys >= lo", "no tail mask"),
    ("attention_dq", "h_kv = h // heads_per_kv", "h_kv = h % heads_per_kv", "KV head"),
    ("attention_backward", "used_rows, dk * scale", "used_rows, dk", "scale of dK"),
    ("attention_backward", "dv * keep_scale if", "dv if", "z of dV"),
    ("attention_backward", "(h_kv + 1) * heads_per_kv", "h_kv * heads_per_kv + 1", "one head"),
    ("attention_backward", "tl.where(key_first < used, len_q, 0)", "0", "no query"),
    ("attention_backward", "used) - 1", "used) - 2", "last key"),
    ("attention_dmask", "h_first + step // tiles_m % heads", "h_first", "heads of a mask"),
    ("attention_dmask", "step // (heads * tiles_m)", "step // (heads * tiles_m + 1)", "batches"),
    ("attention_dmask", "entry // (num_heads // heads)", "entry // num_heads", "batch of an entry"),
    ("attention_dmask", "entry % (num_heads // heads)", "0 * entry", "head of an entry"),
    ("attention_dmask", "h // heads_per_kv", "h % heads_per_kv", "KV head"),
    ("attention_dmask", "acc += score_gradients", "acc = score_gradients", "the last part alone"),
    ("attention_dmask", "seen = keys < used", "seen = keys < len_k", "key lengths"),
    ("attention_dmask", "exists = queries < len_q", "exists = queries < len_q - 1", "last query"),
    ("attention_dmask", "(tile_m_last, pid_m + 1)", "(tile_m_last, pid_m)", "no query"),
    ("attention_dmask", "b * num_heads + h\n", "b + h\n", "dropout's head"),
    ("attention_dmask", "tl.sum(acc, 0,", "tl.max(acc, 0,", "the largest for the sum"),
    ("attention_dmask", "key_first, key_last, diagonal,", "key_first + 32, key_last, diagonal,",
     "the first queries' tiles"),
)  # fmt: skip


def _gradients(sample: Sample, **options: Any) -> list[torch.Tensor]:
    """Output and gradients of q, k, v and an additive mask, each head's rows in one."""
    leaves = [x.detach().clone().requires_grad_() for x in sample.args]
    call = {**sample.kwargs, **options}
    mask = call.get("mask")
    if mask is not None and mask.dtype != torch.bool:
        call["mask"] = mask.detach().clone().requires_grad_()
        leaves.append(call["mask"])
    result = ops.attention(*leaves[:3], **call)
    out = result[0] if isinstance(result, tuple) else result
    grad_out = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out.dtype)
    found = [out.detach(), *torch.autograd.grad(out, leaves, grad_out)]
    heads = [x.transpose(-2, -3).flatten(-2) for x in found[:4]]
    return [*heads, *(x.flatten(-2) for x in found[4:])]


def _attention_survives(file: str = "") -> bool:
    """Whether outputs and gradients are accurate on every sample, with dropout and without.

    On samples of a mask's gradient alone, where the mistake is in its file.
    """
    for dtype, dropout_p in ((torch.float16, 0.3), (torch.float32, 0.0)):
        for sample in samples("attention", dtype):
            if file == "attention_dmask" and "mask" not in sample.wrt:
                continue
            options = {"dropout_p": dropout_p, "seed": 11}
            wide = sample.mapped(lambda t: t.double() if t.is_floating_point() else t)
            oracle = _gradients(wide, backend="reference", **options)
            baseline = _gradients(sample, backend="reference", **options)
            actual = _gradients(sample, backend="triton", **options)
            for got, want, low in zip(actual, oracle, baseline, strict=True):
                if not measure(got, want, low, factor=3).accurate:
                    return False
    return True


def test_the_original_gradients_survive():
    assert _attention_survives()


@pytest.mark.parametrize(
    ("file", "text", "replacement"),
    [mutant[:3] for mutant in ATTENTION],
    ids=[f"{mutant[0]}: {mutant[3]}" for mutant in ATTENTION],
)
def test_gradient_mutant_is_killed(file, text, replacement, tmp_path, monkeypatch):
    original = dict(vars(importlib.import_module(f"bertgpt.kernels.{file}")))
    mutant = _mutate(ROOT / "kernels" / f"{file}.py", text, replacement, tmp_path)
    for user in ("attention", "attention_dq", "attention_backward", "attention_dmask"):
        module = importlib.import_module(f"bertgpt.kernels.{user}")
        for name, value in list(vars(module).items()):
            if hasattr(value, "fn") and value is original.get(name):  # a jit function
                monkeypatch.setattr(module, name, vars(mutant)[name])
    assert not _attention_survives(file)
