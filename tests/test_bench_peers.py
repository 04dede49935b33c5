"""Peers that need a GPU, on stand-ins of their libraries: each call binds and does the case's work.

A stand-in has the parameters of the real function, in their order, and computes by torch.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from itertools import pairwise
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from contests import contest
from torch import Tensor

from bertgpt import ops, reference
from bertgpt.benchmarks import (
    attention_peers,
    bench_add_layer_norm,
    bench_attention,
    bench_embeddings,
    bench_models,
    bench_paged_attention,
    bench_paged_write,
    bench_training,
)
from bertgpt.benchmarks.case import Case, importable


def _cases(module: Any, contains: str = "") -> list[Case]:
    return [c for c in module.CASES if c.device == "cpu" and contains in c.name]


def _measured(prepare: Any, case: Case) -> None:
    for found in contest(prepare, case=case):
        assert found.measured, found.reason


def _library(monkeypatch: pytest.MonkeyPatch, name: str, **content: Any) -> None:
    module = ModuleType(name)
    vars(module).update(content)
    monkeypatch.setitem(sys.modules, name, module)


class _Pages:
    """FlashInfer's tables of pages, in the layout HND."""

    def plan(
        self, indptr: Tensor, indices: Tensor, last_page_len: Tensor,
        num_qo_heads: int, num_kv_heads: int, head_dim: int, page_size: int,
        pos_encoding_mode: str = "NONE", *, q_data_type: Any = "float16", kv_data_type: Any = None,
    ) -> None:  # fmt: skip
        assert indptr.dtype == indices.dtype == last_page_len.dtype == torch.int32
        assert q_data_type == kv_data_type
        assert bool(((last_page_len >= 1) & (last_page_len <= page_size)).all())
        counts = indptr.diff()
        self.table = torch.zeros(len(counts), int(counts.max()), dtype=torch.int32)
        for row, (start, stop) in enumerate(pairwise(indptr.tolist())):
            self.table[row, : stop - start] = indices[start:stop]
        self.lengths = (counts - 1) * page_size + last_page_len

    def attend(
        self, q: Tensor, pages: tuple[Tensor, Tensor], owner: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Query i on the pages of row owner[i]; the log-sum-exp as [T, H]."""
        table, lengths = self.table[owner], self.lengths[owner]
        out, lse = ops.paged_attention(q, *pages, table, lengths, return_lse=True, backend="torch")
        return out, lse.t()


class _Decode(_Pages):
    def __init__(self, float_workspace_buffer: Tensor, kv_layout: str = "NHD") -> None:
        assert kv_layout == "HND"

    def run(self, q: Tensor, paged_kv_cache: tuple[Tensor, Tensor]) -> Tensor:
        return self.attend(q, paged_kv_cache, torch.arange(len(q)))[0]


class _Cascade:
    def __init__(self, num_levels: int, buffer: Tensor, kv_layout: str = "NHD") -> None:
        assert kv_layout == "HND"
        self.levels = [_Pages() for _ in range(num_levels)]

    def plan(
        self, qo_indptr_arr: list[Tensor], paged_kv_indptr_arr: list[Tensor],
        paged_kv_indices_arr: list[Tensor], paged_kv_last_page_len: list[Tensor],
        num_qo_heads: int, num_kv_heads: int, head_dim: int, page_size: int,
        *, q_data_type: Any = "float16", kv_data_type: Any = None,
    ) -> None:  # fmt: skip
        self.queries = qo_indptr_arr
        arrays = (paged_kv_indptr_arr, paged_kv_indices_arr, paged_kv_last_page_len)
        for level, *tables in zip(self.levels, *arrays, strict=True):
            level.plan(
                *tables, num_qo_heads, num_kv_heads, head_dim, page_size,
                q_data_type=q_data_type, kv_data_type=kv_data_type,
            )  # fmt: skip

    def run(self, q: Tensor, paged_kv_cache: tuple[Tensor, Tensor]) -> Tensor:
        outs, weights = [], []
        for level, bounds in zip(self.levels, self.queries, strict=True):
            owner = torch.arange(len(bounds) - 1).repeat_interleave(bounds.diff())
            out, lse = level.attend(q, paged_kv_cache, owner)
            outs.append(out)
            weights.append(lse)
        share = torch.stack(weights).softmax(0)[..., None]
        return (share * torch.stack(outs)).sum(0)


def _append(
    append_key: Tensor, append_value: Tensor, batch_indices: Tensor, positions: Tensor,
    paged_kv_cache: tuple[Tensor, Tensor], kv_indices: Tensor, kv_indptr: Tensor,
    kv_last_page_len: Tensor, kv_layout: str = "NHD",
) -> None:  # fmt: skip
    assert kv_layout == "HND"
    page_size = paged_kv_cache[0].shape[2]
    page = kv_indices[kv_indptr[batch_indices] + positions // page_size]
    slots = page.long() * page_size + positions % page_size
    ops.paged_write(append_key, append_value, *paged_kv_cache, slots, backend="torch")


@pytest.fixture
def flashinfer(monkeypatch):
    content = {"BatchDecodeWithPagedKVCacheWrapper": _Decode, "append_paged_kv_cache": _append}
    _library(monkeypatch, "flashinfer", MultiLevelCascadeAttentionWrapper=_Cascade, **content)


@pytest.mark.parametrize("case", _cases(bench_paged_attention), ids=lambda case: case.name)
def test_flashinfer_decodes(flashinfer, case):
    _measured(bench_paged_attention._flashinfer, case)


def test_flashinfer_shares_a_prefix(flashinfer):
    cascade = bench_paged_attention._flashinfer_cascade
    _measured(cascade, _cases(bench_paged_attention, "shared")[0])
    (plain,) = _cases(bench_paged_attention, "256")
    assert "no shared prefix" in contest(cascade, case=plain)[0].reason


@pytest.mark.parametrize("case", _cases(bench_paged_write), ids=lambda case: case.name)
def test_flashinfer_appends(flashinfer, case):
    _measured(bench_paged_write._flashinfer, case)


def test_flash_attention_3_decodes(monkeypatch):
    def flash_attn_with_kvcache(
        q: Tensor, k_cache: Tensor, v_cache: Tensor, *, cache_seqlens: Any, page_table: Tensor
    ) -> Tensor:
        pages = (cache.transpose(1, 2) for cache in (k_cache, v_cache))
        out = ops.paged_attention(q[:, 0], *pages, page_table, cache_seqlens, backend="torch")
        return out[:, None]

    _library(monkeypatch, "flash_attn_interface", flash_attn_with_kvcache=flash_attn_with_kvcache)
    _measured(bench_paged_attention._flash3, _cases(bench_paged_attention, "skewed")[0])


def _varlen_attn(
    query: Tensor, key: Tensor, value: Tensor, cu_seq_q: Tensor, cu_seq_k: Tensor,
    max_q: int, max_k: int, *, scale: float | None = None,
    window_size: tuple[int, int] = (-1, -1), seqused_k: Tensor | None = None,
) -> Tensor:  # fmt: skip
    outs = []
    for row, (a, b) in enumerate(pairwise(cu_seq_q.tolist())):
        assert b - a <= max_q
        stop = b if seqused_k is None else a + int(seqused_k[row])
        outs.append(
            reference.attention(
                query[None, a:b], key[None, a:stop], value[None, a:stop],
                causal=window_size == (-1, 0),
            )[0]
        )  # fmt: skip
    return torch.cat(outs)


@pytest.fixture
def varlen(monkeypatch):
    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", _varlen_attn)


@pytest.mark.parametrize("case", _cases(bench_attention), ids=lambda case: case.name)
def test_varlen_attn_attends(varlen, case):
    peer = next(p for p in attention_peers.PEERS if p.name == "varlen_attn")
    _measured(peer.prepare, case)


@pytest.mark.parametrize("case", _cases(bench_attention), ids=lambda case: case.name)
def test_flash_attention_3_attends(monkeypatch, case):
    def flash_attn_func(q: Tensor, k: Tensor, v: Tensor, *, causal: bool = False) -> Tensor:
        return reference.attention(q, k, v, causal=causal)

    def flash_attn_varlen_func(
        q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor,
        max_seqlen_q: int, max_seqlen_k: int, *, causal: bool = False,
    ) -> tuple[Tensor, None]:  # fmt: skip
        bounds = {"window_size": (-1, 0) if causal else (-1, -1)}
        return _varlen_attn(
            q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, **bounds
        ), None

    _library(
        monkeypatch, "flash_attn_interface",
        flash_attn_func=flash_attn_func, flash_attn_varlen_func=flash_attn_varlen_func,
    )  # fmt: skip
    peer = next(p for p in attention_peers.PEERS if p.name == "FlashAttention 3")
    if "key lengths" in case.name:
        assert "no key lengths" in contest(peer.prepare, case=case)[0].reason
    else:
        _measured(peer.prepare, case)


@pytest.mark.skipif(not importable("transformers"), reason="stock models come from transformers")
def test_unpadded_bert_is_stock_bert(varlen, monkeypatch):
    """Compiled layers apart: on a GPU the same module goes through torch.compile."""
    (case,) = _cases(bench_models, "bert-tiny")
    _measured(bench_models._unpadded, case)
    monkeypatch.setattr(torch, "compile", lambda module, **options: module)

    def on_gpu(case: Case, inputs: Any) -> Any:
        return bench_models._unpadded(replace(case, device="cuda"), inputs)

    _measured(on_gpu, case)


@pytest.fixture
def liger(monkeypatch):
    def liger_layer_norm(X: Tensor, W: Tensor, B: Tensor, eps: float) -> Tensor:
        return F.layer_norm(X, X.shape[-1:], W, B, eps)

    def liger_fused_linear_cross_entropy(
        input: Tensor, weight: Tensor, target: Tensor, bias: Tensor | None = None
    ) -> Tensor:
        return F.cross_entropy(F.linear(input, weight, bias), target)

    _library(monkeypatch, "liger_kernel")
    _library(monkeypatch, "liger_kernel.transformers")
    _library(
        monkeypatch, "liger_kernel.transformers.functional",
        liger_layer_norm=liger_layer_norm,
        liger_fused_linear_cross_entropy=liger_fused_linear_cross_entropy,
    )  # fmt: skip


@pytest.mark.parametrize("module", [bench_add_layer_norm, bench_embeddings])
def test_liger_norms(liger, module):
    for case in _cases(module):
        _measured(module._liger, case)


@pytest.mark.skipif(not importable("transformers"), reason="stock models come from transformers")
@pytest.mark.parametrize("case", _cases(bench_training), ids=lambda case: case.name)
def test_liger_trains(liger, monkeypatch, case):
    monkeypatch.setattr(torch, "compile", lambda module, **options: module)
    _measured(bench_training._liger, case)
