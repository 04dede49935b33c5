"""The comparator has teeth: every mistake planted in a definition, portable path or kernel fails.

A mutant is a module with one piece of its text replaced. It is killed when the accuracy rule, on
the calls of `bertgpt validate`, refuses at least one of its results, in float32 or in bfloat16.
"""

import importlib.util
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from bertgpt import ops, reference
from bertgpt.accuracy import measure
from bertgpt.ops import _backends
from bertgpt.validate import refusal_of
from bertgpt.validation_cases import samples

ROOT = Path(__file__).resolve().parent.parent

# (file, text, replacement, mistake): the text stands in the file exactly once.
PLAIN: tuple[tuple[str, str, str, str], ...] = (
    ("reference/attention", "& (key <= corner)", "& (key < corner)", "causal off by one"),
    ("reference/attention", "+ (S - L)  #", "+ 0  #", "top-left alignment"),
    ("reference/attention", "key >= corner - left", "key > corner - left", "left off by one"),
    ("reference/attention", "key <= corner + right", "key < corner + right", "right off by one"),
    ("reference/attention", "(key < key_lengths[", "(key <= key_lengths[", "length off by one"),
    ("reference/attention", "allowed & mask), None", "allowed), None", "boolean mask ignored"),
    ("reference/attention", "scores_BHLS + bias_BHLS", "scores_BHLS - bias_BHLS", "bias negated"),
    ("reference/attention", "** -0.5 if", "** -0.499 if", "scale"),
    (
        "reference/attention",
        "k_BSKD.repeat_interleave(groups, dim=2)",
        "k_BSKD.repeat(1, 1, groups, 1)",
        "KV head h % K",
    ),
    (
        "reference/attention",
        "/ total_BHL1.masked_fill(total_BHL1 == 0.0, 1.0)",
        "",
        "no softmax sum",
    ),
    ("reference/attention", "total_BHL1 == 0.0, 1.0", "total_BHL1 < 0.0, 1.0", "0 / 0"),
    ("reference/attention", "(top_BHL1 + total_BHL1.log())", "(total_BHL1.log())", "lse"),
    ("reference/attention", "@ v_BHSD\n", "@ v_BHSD * 1.0001\n", "a bias of 1e-4"),
    ("reference/linear_gelu", "torch.erf(z / math.sqrt(2.0))", "torch.erf(z / 1.4141)", "erf"),
    ("reference/linear_gelu", 'if approximate == "none"', "if False", "tanh for erf"),
    ("reference/linear_gelu", "0.044715", "0.0447", "tanh constant"),
    ("reference/linear_gelu", "w.to(x.dtype), b)", "w.to(x.dtype), None)", "bias dropped"),
    ("reference/gelu_ffn", "approximate=approximate", 'approximate="none"', "erf for tanh"),
    ("reference/gelu_ffn", "w_out.to(x.dtype), b_out)", "w_out.to(x.dtype))", "bias dropped"),
    ("reference/linear_cross_entropy", "(-1, labels_R1)", "(-1, labels_R1 - 1)", "label"),
    ("reference/linear_cross_entropy", "kept.sum().clamp(min=1)", "kept.numel()", "mean of all"),
    (
        "reference/linear_cross_entropy",
        "weight.to(hidden.dtype), bias)",
        "weight.to(hidden.dtype))",
        "bias dropped",
    ),
    (
        "reference/linear_cross_entropy",
        "kept = labels != ignore_index",
        "kept = labels != -100",
        "ignored",
    ),
    ("reference/pool", "/ (end - start)", "/ (end - start + 1)", "mean of one more"),
    ("reference/pool", "tokens[0]", "tokens[-1]", "last token"),
    ("reference/pool", "tokens.amax(dim=0)", "tokens.abs().amax(dim=0)", "greatest magnitude"),
    ("portable/pool", "F.normalize(vectors, dim=-1)", "F.normalize(vectors, p=1)", "another norm"),
    ("portable/pool", "(offsets.diff() == 0)", "(offsets.diff() < 0)", "empty sequences"),
    ("reference/add_layer_norm", "variance + eps", "variance + 3 * eps", "eps"),
    ("reference/add_layer_norm", "centred.square().mean(", "centred.var(", "unbiased variance"),
    ("reference/add_layer_norm", "= total + residual", "= total", "residual dropped"),
    ("reference/add_layer_norm", "y = y + bias", "y = y - bias", "bias negated"),
    ("reference/paged_attention", "position % page_size]", "position % page_size - 1]", "slot"),
    (
        "reference/paged_attention",
        "(k_pages, page_table[b]",
        "(k_pages, page_table[0]",
        "page table",
    ),
    ("reference/paged_attention", "causal=causal, window", "causal=False, window", "causal"),
    ("reference/paged_write", "= k[token]", "= k[token - 1]", "token"),
    ("reference/paged_write", "slot >= 0", "slot >= -1", "a skipped slot written"),
    ("reference/sample", ".sum()) + 1]", ".sum())]", "top-p drops the last it needs"),
    ("reference/sample", "order_V[top_k - 1]", "order_V[top_k]", "top-k off by one"),
    ("reference/sample", "x_V < x_V[order", "x_V <= x_V[order", "the k-th dropped"),
    ("reference/sample", "mass_V <= point", "mass_V < point - 2**38", "the token before"),
    ("reference/sample", "high << 32 | low", "low << 32 | high", "the words exchanged"),
    ("portable/attention", "corner + (0 if", "corner + (1 if", "causal off by one"),
    ("portable/attention", "corner - self.left", "corner - self.left - 1", "left off by one"),
    ("portable/attention", "=key_lengths).to(", "=None).to(", "key lengths ignored"),
    ("portable/attention", "else -1.0", "else 1.0", "sign of a negative scale dropped"),
    ("portable/attention", "-rule.scale or 1.0", "-rule.scale", "scale 0 left to the fused op"),
    ("portable/attention", "rule.scale <= 0.0", "rule.scale < 0.0", "scale 0 taken for positive"),
    (
        "portable/attention",
        "=key_lengths)\n        return out, _lse_p",
        "=None)\n        return out, _lse_p",
        "lse: key lengths ignored",
    ),
    ("portable/attention", ".mul(rule.scale)", "", "lse: scale"),
    ("portable/attention", "scores += mask[", "scores -= mask[", "lse: bias negated"),
    ("portable/attention", "scores.masked_fill_(~allowed, -torch.inf)", "scores", "lse: no mask"),
    ("portable/attention", "[rows, None] + (S - L)", "[rows, None] + (S - L - 1)", "diagonal"),
    ("portable/attention", ".masked_fill(~allowed, -torch.inf)", "", "additive mask alone"),
    ("portable/attention", "scale=rule.scale)", "scale=0.13)", "scale"),
    ("portable/linear_gelu", "F.gelu(h, approximate=approximate)", "F.gelu(h)", "erf for tanh"),
    (
        "portable/linear_gelu",
        "gelu(linear(x, w.to(x.dtype), None if b is None else b.to(x.dtype))",
        "gelu(linear(x, w.to(x.dtype))",
        "bias dropped",
    ),
    ("portable/gelu_ffn", "w_out.to(x.dtype), b_out)", "w_out.to(x.dtype))", "bias dropped"),
    (
        "portable/linear_cross_entropy",
        "(row,) = torch.where((column >= 0)",
        "(row,) = torch.where((column > 0)",
        "first token of a tile",
    ),
    ("portable/linear_cross_entropy", "-= 1.0", "-= 0.99", "one-hot"),
    (
        "portable/linear_cross_entropy",
        'outputs["hidden"][rows] +=',
        'outputs["hidden"][rows] =',
        "last tile's gradient alone",
    ),
    ("portable/linear_cross_entropy", "grad_b_C += delta_RC", "grad_b_C -= delta_RC", "bias"),
    ("portable/linear_cross_entropy", "delta_RC.mul_(grad_R1[rows])", "", "rows' gradients"),
    ("portable/add_layer_norm", "bias, eps)", "bias, 1e-12)", "eps"),
    ("portable/paged_attention", "key_S > last_B1", "key_S > last_B1 + 1", "length off by one"),
    (
        "portable/paged_attention",
        "key_S < last_B1 - left",
        "key_S < last_B1 - left - 1",
        "left off by one",
    ),
    ("portable/paged_attention", ".index_select(0, plan.owner_P)", "[plan.place_P % B]", "owner"),
    ("portable/paged_attention", "first = max(n - 1 - left, 0) // N", "first = n // N", "window"),
    ("portable/paged_write", "slot_T1 % N)", "(slot_T1 + 1) % N)", "offset"),
    ("portable/sample", "(x_sorted_BV < x_sorted", "(x_sorted_BV <= x_sorted", "the k-th dropped"),
    ("portable/sample", "mass_BV - weight_BV >=", "mass_BV >=", "top-p drops the last it needs"),
    ("portable/sample", "where(greedy_B, drawn_B)", "where(~greedy_B, drawn_B)", "greedy"),
    ("portable/sample", "seed_B, sequence_B, step_B))", "seed_B, step_B, sequence_B))", "words"),
)

KERNELS: tuple[tuple[str, str, str, str], ...] = (
    ("attention", "seen = (keys >= lo) & (keys < hi)", "seen = keys >= lo", "no tail mask"),
    ("attention", "acc / l_i[:, None]", "acc", "no division"),
    ("attention", "m_i * unit + tl.log(l_i)", "m_i + tl.log(l_i)", "lse in powers of two"),
    ("attention", "h_kv = h // heads_per_kv", "h_kv = h % heads_per_kv", "KV head"),
    ("gelu", "return z / (1.0 + tl.exp2((z + 0.044715", "return z / (1.0 + tl.exp2((z + 0.0447",
     "tanh constant"),
    ("gelu", "0.7071067811865476", "0.7072", "erf argument"),
    ("linear_cross_entropy", "l_i * tl.exp2((m_i - shift) * LOG2E) + tl.sum(p, 1)",
     "l_i + tl.sum(p, 1)", "no rescaling within a run"),
    ("linear_cross_entropy", "tl.where(cols[None, :] < V, z, float(\"-inf\"))", "z",
     "no tail mask"),
    ("linear_cross_entropy", "column < V), column, -1", "column < V - 1), column, -1",
     "last token"),
    ("linear_cross_entropy", "l_i * tl.exp2((m_i - shift) * LOG2E) + tl.exp2((part",
     "l_i + tl.exp2((part", "no rescaling between runs"),
    ("linear_cross_entropy_backward", "p - 1.0, p)", "p - 0.99, p)", "one-hot"),
    ("linear_cross_entropy_backward", "K = tl.minimum(K, count)", "K = tl.minimum(K, count - 1)",
     "last row dropped"),
    ("add_layer_norm", "squares / E + eps", "squares / E + 3 * eps", "eps"),
    ("add_layer_norm", "tl.where(i * CHUNK + lanes < E, pieces[i] - mean, 0.0)", "pieces[i] - mean",
     "padding counted in the variance"),
    ("pool", "tl.maximum(end - first, 1)", "tl.maximum(end - first, 2)", "length of one"),
    ("pool", "rows < end", "rows <= end", "a token of the next sequence"),
    ("pool", 'empty = -float("inf") if', "empty = 0.0 if", "no maximum below 0"),
    ("pool", "tl.where((cols < E) & (first < end), vector, 0.0)", "vector", "−inf of nothing"),
    ("pool", "vector * vector", "tl.abs(vector)", "another norm"),
    ("paged_attention", "<= tokens[:, None] + (diagonal", "< tokens[:, None] + (diagonal", "mask"),
    ("paged_attention", "(diagonal - window_left)", "(diagonal - window_left - 1)", "window"),
    ("paged_attention", "split_lo + SPLIT_KEYS)", "split_lo + SPLIT_KEYS - 1)", "split edge"),
    ("paged_attention", "m_i * LN2 + tl.log", "m_i + tl.log", "lse in powers of two"),
    ("paged_attention", "left >= max_keys - 1", "left >= max_keys - 2", "window let go too soon"),
    ("paged_attention", "right >= max_seqlen_q - 1", "right >= max_seqlen_q - 2",
     "window let go too soon on the right"),
    ("paged_attention", "else scale) * LOG2E.value", "else abs(scale)) * LOG2E.value", "sign"),
    ("paged_write", "slot % PAGE_SIZE", "(slot + 1) % PAGE_SIZE", "offset"),
    ("merge_splits", "tl.cdiv(tl.maximum(length, 0), SPLIT_KEYS)", "length // SPLIT_KEYS",
     "last split dropped"),
    ("merge_splits", "tl.exp2((lse_s - shift) * LOG2E)", "tl.exp2(lse_s - shift)", "base of exp"),
    ("merge_splits", "acc / total)", "acc)", "no division"),
    ("merge_splits", "largest + tl.log(total)", "largest", "lse of the largest split"),
    ("merge_splits", "tl.exp2((lse_s - shift) * LOG2E)", "tl.exp2((lse_s - shift) * 0.0)",
     "splits weighted alike"),
)  # fmt: skip


def _mutate(source: Path, text: str, replacement: str, folder: Path) -> ModuleType:
    original = source.read_text()
    count = original.count(text)
    assert count == 1, f"{source.name} holds {text!r} {count} times: rewrite this mutant"
    path = folder / source.name  # a file, because Triton reads its kernels' source
    path.write_text(original.replace(text, replacement))
    spec = importlib.util.spec_from_file_location(f"mutant_{source.stem}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


HELPERS = {"gelu": "linear_gelu", "merge_splits": "paged_attention"}  # called from another's file


def _op_of(kernel: str) -> str:
    """The op whose gradient or outputs a kernel file computes."""
    return HELPERS.get(kernel, kernel.removesuffix("_backward"))


def _survives(op: str, function: Callable[..., Any], **options: Any) -> bool:
    """Whether every result on every sample is accurate."""
    for dtype in (torch.bfloat16, torch.float32):
        for sample in samples(op, dtype):
            if refusal_of(sample, options.get("backend", "reference")) is not None:
                continue  # a gradient that this backend does not have
            wide = sample.mapped(lambda t: t.double() if t.is_floating_point() else t)
            oracle = wide.results(getattr(reference, op))
            baseline = sample.results(getattr(reference, op))
            actual = sample.results(function, **options)
            for got, want, low in zip(actual, oracle, baseline, strict=True):
                tensors = got.tensor, want.tensor.double(), low.tensor
                if not measure(*tensors, factor=got.factor).accurate:
                    return False
    return True


def _function(file: str, module: ModuleType, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """A module's version of its op: by itself, or where it gives only parts, through the op."""
    op = Path(file).name
    if hasattr(module, op):
        return getattr(module, op)
    monkeypatch.setattr(sys.modules[f"bertgpt.ops.{op}"], Path(file).parent.name, module)
    return partial(getattr(ops, op), backend="torch")


@pytest.mark.parametrize(
    ("file", "text", "replacement"),
    [mutant[:3] for mutant in PLAIN],
    ids=[f"{mutant[0]}: {mutant[3]}" for mutant in PLAIN],
)
def test_mutant_is_killed(file, text, replacement, tmp_path, monkeypatch):
    mutant = _mutate(ROOT / "bertgpt" / f"{file}.py", text, replacement, tmp_path)
    assert not _survives(Path(file).name, _function(file, mutant, monkeypatch))


@pytest.mark.parametrize("family", ["reference", "portable"])
@pytest.mark.parametrize("op", sorted({Path(mutant[0]).name for mutant in PLAIN}))
def test_the_original_survives(family, op, monkeypatch):
    module = importlib.import_module(f"bertgpt.{family}.{op}")
    assert _survives(op, _function(f"{family}/{op}", module, monkeypatch))


@pytest.mark.interpreter
@pytest.mark.parametrize("op", sorted({_op_of(mutant[0]) for mutant in KERNELS}))
def test_the_original_kernel_survives(op):
    assert _survives(op, getattr(ops, op), backend="triton")


@pytest.mark.interpreter
@pytest.mark.parametrize(
    ("kernel", "text", "replacement"),
    [mutant[:3] for mutant in KERNELS],
    ids=[f"{mutant[0]}: {mutant[3]}" for mutant in KERNELS],
)
def test_kernel_mutant_is_killed(kernel, text, replacement, tmp_path, monkeypatch):
    mutant = _mutate(ROOT / "kernels" / f"{kernel}.py", text, replacement, tmp_path)
    op = _op_of(kernel)
    load = _backends._kernels
    if kernel in HELPERS:
        monkeypatch.setattr(load(op), kernel, getattr(mutant, kernel))
    else:
        monkeypatch.setattr(_backends, "_kernels", lambda m: mutant if m == kernel else load(m))
    assert not _survives(op, getattr(ops, op), backend="triton")
