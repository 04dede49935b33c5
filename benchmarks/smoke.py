"""One small call of every op on a GPU: what compute-sanitizer watches."""

from __future__ import annotations

import torch

from bertgpt import ops


def run(device: str = "cuda", backend: str = "triton") -> int:
    """Runs each op once on awkward sizes; returns the number of calls."""
    dtype = torch.bfloat16 if device == "cuda" else torch.float32

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, device=device, dtype=dtype)

    def integers(*values: int) -> torch.Tensor:
        return torch.tensor(values, device=device, dtype=torch.int32)

    q, k, v = normal(2, 70, 4, 64), normal(2, 70, 2, 64), normal(2, 70, 2, 64)
    ops.attention(q, k, v, causal=True, backend=backend)
    ops.attention(q, k, v, key_lengths=integers(70, 33), backend=backend)
    packed = [tensor.flatten(0, 1) for tensor in (q, k, v)]
    bounds = integers(0, 1, 66, 140)
    ops.attention(*packed, cu_seqlens_q=bounds, max_seqlen_q=74, max_seqlen_k=74, backend=backend)
    ops.linear_gelu(normal(70, 192), normal(200, 192), normal(200), backend=backend)
    ops.add_layer_norm(normal(5, 768), normal(5, 768), normal(768), normal(768), backend=backend)
    k_pages, v_pages = normal(6, 2, 16, 64), normal(6, 2, 16, 64)
    slots = torch.tensor([0, 17, 95], device=device)
    ops.paged_write(k[0, :3], v[0, :3], k_pages, v_pages, slots, backend=backend)
    table = torch.tensor([[5, 1, 2], [0, 3, 4]], device=device, dtype=torch.int32)
    ops.paged_attention(q[:, 0], k_pages, v_pages, table, integers(48, 1), backend=backend)
    if device == "cuda":
        torch.cuda.synchronize()
    return 7


if __name__ == "__main__":
    print(f"{run()} calls")
