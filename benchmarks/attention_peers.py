"""Attention by others, each in its best setting and doing the whole of the case's work.

Whatever a peer must derive from the lengths (masks, padding, block lists) it derives in the timed
call, since the lengths change from call to call; what depends on shapes alone it may prepare.
A case's inputs are q, k, v `[B, S, H, D]`, or `[T, H, D]` with `cu_seqlens`; perhaps `key_lengths`;
and the plain values `causal` and `max_seqlen`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache, partial
from inspect import signature
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bertgpt.benchmarks.case import (
    Case,
    Inputs,
    Provider,
    Run,
    Unavailable,
    all_of,
    differentiated,
    needs_cuda,
    needs_package,
)

Forward = Callable[[Inputs], Tensor]


def run_of(forward: Forward, inputs: Inputs) -> Run:
    """The forward call, or forward and backward where the inputs bring `d_out`."""
    return differentiated(lambda: forward(inputs), inputs, ("q", "k", "v"))


def _provider(name: str, forward: Forward, *conditions: Callable[[Case], str | None]) -> Provider:
    def prepare(case: Case, inputs: Inputs) -> Run:
        return run_of(forward, inputs)

    return Provider(name, prepare, all_of(*conditions))


def _heads_first(inputs: Inputs) -> list[Tensor]:
    return [inputs[name].transpose(1, 2) for name in ("q", "k", "v")]


def _token_cells(inputs: Inputs) -> Tensor:
    """Where each packed token stands in the padded batch, without a synchronisation: int64 [T]."""
    cu_seqlens, tokens = inputs["cu_seqlens"], inputs["q"].shape[0]
    rows = torch.arange(len(cu_seqlens) - 1, device=cu_seqlens.device)
    row = rows.repeat_interleave(cu_seqlens.diff(), output_size=tokens)
    column = torch.arange(tokens, device=row.device) - cu_seqlens[:-1][row]
    return row * inputs["max_seqlen"] + column


def _sdpa(inputs: Inputs) -> Tensor:
    if "cu_seqlens" in inputs:
        return _sdpa_padded(inputs)
    q, k, v = _heads_first(inputs)
    mask, causal = None, inputs["causal"]
    if "key_lengths" in inputs:
        mask = _key_mask(k.shape[2], inputs["key_lengths"])
        if causal:
            square = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device)
            mask, causal = mask & square.tril(), False
    return F.scaled_dot_product_attention(q, k, v, mask, is_causal=causal).transpose(1, 2)


def _sdpa_padded(inputs: Inputs) -> Tensor:
    """Packed tokens through padding and back."""
    cells, longest = _token_cells(inputs), inputs["max_seqlen"]
    batch = len(inputs["cu_seqlens"]) - 1
    padded = []
    for name in ("q", "k", "v"):
        packed = inputs[name]
        grid = packed.new_zeros(batch * longest, *packed.shape[1:])
        grid = grid.index_copy(0, cells, packed)
        padded.append(grid.view(batch, longest, *packed.shape[1:]).transpose(1, 2))
    causal = inputs["causal"]
    # Under causal attention a real query never sees the padding, which stands at the end.
    mask = None if causal else _key_mask(longest, inputs["cu_seqlens"].diff())
    q, k, v = padded
    out = F.scaled_dot_product_attention(q, k, v, mask, is_causal=causal)
    return out.transpose(1, 2).flatten(0, 1)[cells]


def _key_mask(keys: int, lengths: Tensor) -> Tensor:
    return (torch.arange(keys, device=lengths.device) < lengths[:, None])[:, None, None]


def _sdpa_forced(backend: str, inputs: Inputs) -> Tensor:
    from torch.nn.attention import SDPBackend, sdpa_kernel

    with sdpa_kernel(getattr(SDPBackend, backend)):
        return _sdpa(inputs)


def _varlen(inputs: Inputs) -> Tensor:
    """torch.nn.attention.varlen.varlen_attn; a dense batch is a packed one of equal lengths."""
    from torch.nn.attention.varlen import varlen_attn

    q, k, v = (inputs[name] for name in ("q", "k", "v"))
    options: dict[str, Any] = {"window_size": (-1, 0) if inputs["causal"] else (-1, -1)}
    if "cu_seqlens" in inputs:
        cu_seqlens = inputs["cu_seqlens"]
    else:
        cu_seqlens = torch.arange(q.shape[0] + 1, dtype=torch.int32, device=q.device) * q.shape[1]
        q, k, v = (tensor.flatten(0, 1) for tensor in (q, k, v))
    if "key_lengths" in inputs:
        if inputs["causal"]:
            raise Unavailable("it aligns causal attention with the end of each key length")
        options["seqused_k"] = inputs["key_lengths"]
    longest = inputs["max_seqlen"]
    out = varlen_attn(q, k, v, cu_seqlens, cu_seqlens, longest, longest, **options)
    assert isinstance(out, Tensor)
    return out.view_as(inputs["q"])


@cache
def _compiled_flex() -> tuple[Any, Any]:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    return torch.compile(flex_attention), torch.compile(create_block_mask)


@cache
def _causal_blocks(length: int, device: torch.device) -> Any:
    """Depends on the shape alone, so it is made once."""
    return _compiled_flex()[1](lambda b, h, q, k: q >= k, None, None, length, length, device=device)


def _flex(inputs: Inputs) -> Tensor:
    attend, block_mask = _compiled_flex()
    if "cu_seqlens" in inputs:
        return _flex_packed(inputs)
    q, k, v = _heads_first(inputs)
    length, causal, blocks = q.shape[2], inputs["causal"], None
    if "key_lengths" in inputs:
        lengths = inputs["key_lengths"]

        def visible(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
            return (j < lengths[b]) & (i >= j) if causal else j < lengths[b]

        blocks = block_mask(visible, q.shape[0], None, length, length, device=q.device)
    elif causal:
        blocks = _causal_blocks(length, q.device)
    return attend(q, k, v, block_mask=blocks).transpose(1, 2)


def _flex_packed(inputs: Inputs) -> Tensor:
    """One long sequence whose documents do not see each other."""
    attend, block_mask = _compiled_flex()
    causal, tokens = inputs["causal"], inputs["q"].shape[0]
    document = _token_cells(inputs) // inputs["max_seqlen"]

    def visible(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        same = document[i] == document[j]
        return same & (i >= j) if causal else same

    blocks = block_mask(visible, None, None, tokens, tokens, device=document.device)
    q, k, v = (inputs[name].transpose(0, 1)[None] for name in ("q", "k", "v"))
    return attend(q, k, v, block_mask=blocks)[0].transpose(0, 1)


def _flash(module: str, inputs: Inputs) -> Tensor:
    """FlashAttention 3 (`flash_attn_interface`) or 4 (`flash_attn.cute`)."""
    library = __import__(module, fromlist=["flash_attn_func"])
    q, k, v = (inputs[name] for name in ("q", "k", "v"))
    if "key_lengths" in inputs:
        raise Unavailable("its padded call has no key lengths")
    if "cu_seqlens" in inputs:
        attend = library.flash_attn_varlen_func
        options = dict.fromkeys(("cu_seqlens_q", "cu_seqlens_k"), inputs["cu_seqlens"])
        if "max_seqlen_q" in signature(attend).parameters:  # not in every version of 4
            options |= dict.fromkeys(("max_seqlen_q", "max_seqlen_k"), inputs["max_seqlen"])
        result = attend(q, k, v, **options, causal=inputs["causal"])
    else:
        result = library.flash_attn_func(q, k, v, causal=inputs["causal"])
    return result[0] if isinstance(result, tuple) else result


def _xformers(inputs: Inputs) -> Tensor:
    from xformers.ops import fmha, memory_efficient_attention

    q, k, v = (inputs[name] for name in ("q", "k", "v"))
    if "key_lengths" in inputs:
        raise Unavailable("its masks for key lengths want gapped keys")
    if "cu_seqlens" not in inputs:
        bias = fmha.attn_bias.LowerTriangularMask() if inputs["causal"] else None
        return memory_efficient_attention(q, k, v, attn_bias=bias)
    lengths: Sequence[int] = inputs["cu_seqlens"].diff().tolist()
    bias = fmha.attn_bias.BlockDiagonalMask.from_seqlens(lengths)
    bias = bias.make_causal() if inputs["causal"] else bias
    return memory_efficient_attention(q[None], k[None], v[None], attn_bias=bias)[0]


def _cudnn_frontend(case: Case, inputs: Inputs) -> Run:
    """A cuDNN graph of its own, built in advance: padded batches only."""
    import cudnn

    if "cu_seqlens" in inputs or "d_out" in inputs:
        raise Unavailable("the benchmark builds its graph for padded forward calls only")
    kind = cudnn.data_type.BFLOAT16 if case.dtype == torch.bfloat16 else cudnn.data_type.HALF
    single = cudnn.data_type.FLOAT
    graph = cudnn.pygraph(
        io_data_type=kind, intermediate_data_type=single, compute_data_type=single
    )
    tensors = _heads_first(inputs)
    q, k, v = (graph.tensor_like(tensor) for tensor in tensors)
    options: dict[str, Any] = {"use_causal_mask": inputs["causal"]}
    feeds = dict(zip((q, k, v), tensors, strict=True))
    if "key_lengths" in inputs:
        # Views, so that the call reads the lengths' current values.
        keys = inputs["key_lengths"].view(-1, 1, 1, 1)
        queries = torch.full_like(keys, tensors[0].shape[2])
        seq_q, seq_kv = graph.tensor_like(queries), graph.tensor_like(keys)
        options |= {"use_padding_mask": True, "seq_len_q": seq_q, "seq_len_kv": seq_kv}
        feeds |= {seq_q: queries, seq_kv: keys}
    out, _ = graph.sdpa(
        q=q, k=k, v=v, attn_scale=tensors[0].shape[-1] ** -0.5, generate_stats=False, **options
    )
    out.set_output(True).set_dim(tensors[0].shape).set_stride(tensors[0].stride())
    graph.build([cudnn.heur_mode.A, cudnn.heur_mode.FALLBACK])
    workspace = torch.empty(
        max(graph.get_workspace_size(), 1), dtype=torch.uint8, device=tensors[0].device
    )

    def run() -> Tensor:
        result = torch.empty_like(inputs["q"])
        cudnn_stream = torch.cuda.current_stream().cuda_stream
        cudnn.set_stream(handle=_cudnn_handle(), stream=cudnn_stream)
        graph.execute({**feeds, out: result.transpose(1, 2)}, workspace, handle=_cudnn_handle())
        return result

    return run


@cache
def _cudnn_handle() -> Any:
    import cudnn

    return cudnn.create_handle()


PEERS: tuple[Provider, ...] = (
    _provider("SDPA cuDNN", partial(_sdpa_forced, "CUDNN_ATTENTION"), needs_cuda),
    _provider("SDPA flash", partial(_sdpa_forced, "FLASH_ATTENTION")),
    _provider("SDPA default", _sdpa),
    _provider("varlen_attn", _varlen, needs_cuda),
    _provider("FlexAttention compiled", _flex, needs_cuda),
    _provider(
        "FlashAttention 3",
        partial(_flash, "flash_attn_interface"),
        needs_cuda,
        needs_package("flash_attn_interface"),
    ),
    _provider(
        "FlashAttention 4",
        partial(_flash, "flash_attn.cute"),
        needs_cuda,
        needs_package("flash_attn.cute"),
    ),
    _provider("xformers", _xformers, needs_cuda, needs_package("xformers")),
    Provider("cuDNN frontend", _cudnn_frontend, all_of(needs_cuda, needs_package("cudnn"))),
)
