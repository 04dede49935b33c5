"""What a call costs besides its kernel, on this machine's CPU: checks, choice, allocation, binding.

Each op is called as one decoding step of GPT-2's sizes calls it. The C++ kernels come from a host-
engine build. Where they would be launched, the longest binding is called for an empty batch, so
that the whole way there is timed and nothing is computed; values of index tensors are not looked
at, as on a GPU. What a GPU adds is the launch, and asking for the stream and the current device.
Each figure is the best of many short slices, taken in turns, so that a busy machine spoils all
alike.

    pytest tests/test_cuda_host_add_layer_norm.py   # builds it, where it can be built
    BERTGPT_HOST_ENGINE=build/host/_host-plain….so python benchmarks/bench_overhead.py
"""

from __future__ import annotations

import os
import sys
import timeit
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

sys.path.append(str(Path(__file__).resolve().parent.parent))

import torch
import typer
from rich.console import Console
from rich.progress import track
from rich.table import Table

from bertgpt import ops
from bertgpt.benchmarks.environment import one_line
from bertgpt.cuda import paged_attention as launcher
from bertgpt.cuda.extension import HOST_ENGINE, extension, unavailable
from bertgpt.ops._dispatch import OPS

CALLS = 50  # a slice: shorter than a turn of the scheduler
HEADS, HEAD_DIM, PAGE_SIZE, WIDTH = 12, 64, 16, 768
SEQUENCES, PAGES, VOCABULARY = 16, 64, 50257
BINDINGS = ("paged_decode", "paged_write", "add_layer_norm", "linear_gelu", "sample")
RESULT = Path(__file__).parent / "results" / "overhead-cpu.md"

Call = Callable[[], object]


def public_calls(backend: str) -> dict[str, Call]:
    """Every op that `backend` has, called on one new token of each of some sequences."""
    q, new_k, new_v = torch.zeros(SEQUENCES, 3, HEADS, HEAD_DIM).unbind(1)
    k, v = torch.zeros(2, PAGES, HEADS, PAGE_SIZE, HEAD_DIM)
    table = torch.zeros(SEQUENCES, 4, dtype=torch.int32)
    lengths, slots = torch.ones(SEQUENCES, dtype=torch.int32), torch.arange(SEQUENCES)
    rows, scale, bias = torch.zeros(SEQUENCES, WIDTH), torch.ones(WIDTH), torch.zeros(4 * WIDTH)
    up, logits = torch.zeros(4 * WIDTH, WIDTH), torch.zeros(SEQUENCES, VOCABULARY)
    fractions, integers = torch.ones(SEQUENCES), torch.ones(SEQUENCES, dtype=torch.int64)
    calls: dict[str, Call] = {
        "paged_attention": lambda: ops.paged_attention(q, k, v, table, lengths, backend=backend),
        "paged_write": lambda: ops.paged_write(new_k, new_v, k, v, slots, backend=backend),
        "add_layer_norm": lambda: ops.add_layer_norm(
            rows, rows, scale, scale, return_sum=True, backend=backend
        ),
        "linear_gelu": lambda: ops.linear_gelu(rows, up, bias, backend=backend),
        "sample": lambda: ops.sample(
            logits, temperature=fractions, top_k=integers, top_p=fractions, seed=integers,
            sequence_ids=integers, steps=integers, backend=backend,
        ),
    }  # fmt: skip
    return {name: call for name, call in calls.items() if backend in OPS[name].backends}


@contextmanager
def nothing_launched() -> Iterator[None]:
    """Every launch becomes the longest binding's of no sequence; values are not looked at."""
    kernels, values = extension(), recorded_values()
    decode = kernels.paged_decode
    kept: list[tuple[Any, str, Any]] = [
        (kernels, name, getattr(kernels, name)) for name in BINDINGS
    ]
    kept += [(op, "check_values", op.check_values) for op in OPS.values()]
    for owner, name, _ in kept:
        setattr(owner, name, lambda *args: decode(*values) if len(args) > 1 else None)
    try:
        yield
    finally:
        for owner, name, function in kept:
            setattr(owner, name, function)


def recorded_values() -> tuple[int | float | bool, ...]:
    """What the launcher of `paged_decode` hands its binding for an empty batch."""
    recorded: list[tuple[int | float | bool, ...]] = []
    kernels = extension()
    binding = kernels.paged_decode
    kernels.paged_decode = lambda *values: recorded.append(values)
    try:
        launcher.paged_decode(*empty_batch())
    finally:
        kernels.paged_decode = binding
    return recorded[0]


def empty_batch() -> tuple[torch.Tensor, ...]:
    """No query, the pages, and no row of a page table and lengths."""
    k, v = torch.zeros(2, PAGES, HEADS, PAGE_SIZE, HEAD_DIM)
    table, lengths = torch.zeros(0, 4, dtype=torch.int32), torch.zeros(0, dtype=torch.int32)
    return torch.empty(0, HEADS, HEAD_DIM), k, v, table, lengths


def launcher_calls() -> dict[str, Call]:
    """`paged_decode` as its launcher calls it: alone, and with the addresses made on the way."""
    values, binding = recorded_values(), extension().paged_decode
    q, k, v, table, lengths = empty_batch()

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


def as_markdown(found: dict[tuple[str, str], float]) -> str:
    """The table and where it was measured, as the committed file has them."""
    lines = [f"| {what} | {part} | {least:.1f} |" for (what, part), least in found.items()]
    return "\n".join(
        [
            "Microseconds a call that launches nothing, by `benchmarks/bench_overhead.py`; best of",
            f"many slices. {one_line('cpu')}",
            "",
            "| what | part | µs a call |",
            "|---|---|---|",
            *lines,
            "",
        ]
    )


def main(
    slices: Annotated[int, typer.Option(help="Slices of each call.")] = 1000,
    write: Annotated[bool, typer.Option("--write", help=f"Writes {RESULT.name}.")] = False,
) -> None:
    """Prints the table."""
    torch.set_num_threads(1)
    if os.environ.get(HOST_ENGINE) is None or unavailable() is not None:
        typer.echo(f"No C++ kernels: {HOST_ENGINE} names no host-engine build.", err=True)
        raise typer.Exit(1)
    calls = {("paged_decode", name): call for name, call in launcher_calls().items()}
    calls |= {(name, "op"): call for name, call in public_calls("cuda").items()}
    with torch.no_grad(), nothing_launched():
        found = best(calls, slices)
    table = Table("what", "part", "µs a call", title="Overhead of a call that launches nothing")
    for (what, part), microseconds in found.items():
        table.add_row(what, part, f"{microseconds:.1f}")
    Console().print(table)
    if write:
        RESULT.write_text(as_markdown(found))


if __name__ == "__main__":
    typer.run(main)
