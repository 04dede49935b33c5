"""What a call costs besides its kernel, on this machine's CPU: checks, choice, allocation, binding.

No sequences and no rows, so nothing is launched and nothing computed. The C++ kernels come from a
host-engine build. Each figure is the best of many short slices, taken in turns, so that a busy
machine spoils all alike.

    pytest tests/test_cuda_host_add_layer_norm.py   # builds it, where it can be built
    BERTGPT_HOST_ENGINE=build/host/_host-plain….so python benchmarks/bench_overhead.py
"""

from __future__ import annotations

import os
import sys
import timeit
from collections.abc import Callable
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parent.parent))

import torch
import typer
from rich.console import Console
from rich.progress import track
from rich.table import Table

from bertgpt import ops
from bertgpt.cuda import paged_attention as launcher
from bertgpt.cuda.extension import HOST_ENGINE, extension, unavailable
from bertgpt.ops._dispatch import OPS

CALLS = 20  # a slice: shorter than a turn of the scheduler
HEADS, HEAD_DIM, PAGE_SIZE, WIDTH = 12, 64, 16, 768

Call = Callable[[], object]


def public_calls(backend: str) -> dict[str, Call]:
    """Every op that `backend` has, called on empty batches of GPT-2's sizes."""
    none, padded = torch.empty(0, HEADS, HEAD_DIM), torch.empty(1, 0, HEADS, HEAD_DIM)
    k, v = torch.zeros(2, 64, HEADS, PAGE_SIZE, HEAD_DIM)
    table, lengths = torch.zeros(0, 4, dtype=torch.int32), torch.zeros(0, dtype=torch.int32)
    slots = torch.zeros(0, dtype=torch.int64)
    rows, scale, bias = torch.empty(0, WIDTH), torch.ones(WIDTH), torch.zeros(4 * WIDTH)
    up, down = torch.zeros(4 * WIDTH, WIDTH), torch.zeros(WIDTH, 4 * WIDTH)
    calls: dict[str, Call] = {
        "paged_attention": lambda: ops.paged_attention(none, k, v, table, lengths, backend=backend),
        "paged_write": lambda: ops.paged_write(none, none, k, v, slots, backend=backend),
        "add_layer_norm": lambda: ops.add_layer_norm(rows, rows, scale, scale, backend=backend),
        "linear_gelu": lambda: ops.linear_gelu(rows, up, bias, backend=backend),
        "gelu_ffn": lambda: ops.gelu_ffn(rows, up, bias, down, scale, backend=backend),
        "attention": lambda: ops.attention(padded, padded, padded, backend=backend),
    }
    return {name: call for name, call in calls.items() if backend in OPS[name].backends}


def launcher_calls() -> dict[str, Call]:
    """`paged_decode` as its launcher calls it: alone, and with the addresses made on the way."""
    recorded: list[tuple[int | float | bool, ...]] = []
    kernels = extension()
    binding = kernels.paged_decode
    q = torch.empty(0, HEADS, HEAD_DIM)
    k, v = torch.zeros(2, 64, HEADS, PAGE_SIZE, HEAD_DIM)
    table, lengths = torch.zeros(0, 4, dtype=torch.int32), torch.zeros(0, dtype=torch.int32)
    kernels.paged_decode = lambda *values: recorded.append(values)
    try:
        launcher.paged_decode(q, k, v, table, lengths)
    finally:
        kernels.paged_decode = binding
    (values,) = recorded

    def with_addresses() -> None:
        binding(
            q.data_ptr(), k.data_ptr(), v.data_ptr(), table.data_ptr(), lengths.data_ptr(),
            q.data_ptr(), 0, 0, 0, 0, 0, values[11], *q.stride()[:2], *k.stride()[:3],
            *v.stride()[:3], *values[20:24], *table.stride(), lengths.stride(0), *values[27:],
        )  # fmt: skip

    return {
        f"binding, {len(values)} arguments": lambda: binding(*values),
        "binding with data_ptr()s and strides": with_addresses,
        "launcher": lambda: launcher.paged_decode(q, k, v, table, lengths),
    }


def best(calls: dict[tuple[str, str], Call], slices: int) -> dict[tuple[str, str], float]:
    """Least microseconds a call over `slices` slices of each, in turns."""
    least = dict.fromkeys(calls, float("inf"))
    for _ in track(range(slices), "Timing", transient=True):
        for name, call in calls.items():
            least[name] = min(least[name], timeit.timeit(call, number=CALLS) / CALLS * 1e6)
    return least


def main(slices: int = typer.Option(1000, help="Slices of each call.")) -> None:
    """Prints the table."""
    torch.set_num_threads(1)
    calls = {(name, "torch"): call for name, call in public_calls("torch").items()}
    console = Console()
    if os.environ.get(HOST_ENGINE) is None or unavailable() is not None:
        console.print(f"No C++ kernels: {HOST_ENGINE} names no host-engine build.")
    else:
        calls |= {(name, "cuda"): call for name, call in public_calls("cuda").items()}
        calls |= {("paged_decode", name): call for name, call in launcher_calls().items()}
    table = Table("what", "backend", "µs a call", title="Overhead of a call with nothing to launch")
    with torch.no_grad():
        for (name, backend), microseconds in best(calls, slices).items():
            table.add_row(name, backend, f"{microseconds:.1f}")
    console.print(table)


if __name__ == "__main__":
    typer.run(main)
