"""What only repetition shows: equal bits under load, and CUDA graphs that follow their inputs.

    python -m bertgpt.benchmarks.gate repeats --device cuda --repeats 1000
    python -m bertgpt.benchmarks.gate replays --device cuda

`repeats` makes every small call of `bertgpt.benchmarks.smoke` again and again while another stream
keeps the card busy, and wants the same bits each time: a race, or memory that nothing wrote, shows
sooner or later. `replays` captures calls whose index tensors (lengths, pages, slots, bounds of
packed sequences) then change in place, and compares each replay with the call made anew.

On a CPU there is neither a second stream nor a graph: the calls are repeated alone, and made again
in place of a replay, so that everything else here runs.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from bertgpt.benchmarks.smoke import BACKENDS, DTYPES, Call, calls
from bertgpt.validation_cases import Sample

_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class Load:
    """A queue of matrix products on another stream that is never empty for long."""

    SIZE = 2048
    AT_ONCE = 8

    def __init__(self, device: str) -> None:
        self.stream = torch.cuda.Stream() if device == "cuda" else None
        self.products = 0
        if self.stream is not None:
            self.factor = torch.randn(self.SIZE, self.SIZE, device=device)
            torch.cuda.synchronize()

    def top_up(self) -> None:
        """Queues more where the queue has run dry."""
        if self.stream is not None and self.stream.query():
            with torch.cuda.stream(self.stream):
                for _ in range(self.AT_ONCE):
                    self.factor @ self.factor
            self.products += self.AT_ONCE


def differing(found: Sequence[Tensor], expected: Sequence[Tensor]) -> Tensor:
    """Whether any bit differs, as a tensor, so that asking does not wait for the device."""
    pairs = zip(found, expected, strict=True)
    return torch.stack([(_bits(a) != _bits(b)).any() for a, b in pairs]).any()


def _bits(tensor: Tensor) -> Tensor:
    return tensor.view(_BITS[tensor.element_size()])


def repeats(device: str, count: int) -> list[str]:
    """Makes every call `count` times beside a busy stream; names those that were not repeatable."""
    load = Load(device)
    failures = []
    for call in calls(device):
        first = call.run()
        wrong = torch.zeros((), dtype=torch.int32, device=device)
        for _ in range(count):
            load.top_up()
            wrong += differing(call.run(), first)
        if int(wrong):
            failures.append(f"{call}: {int(wrong)} of {count} repeats differ from the first")
    beside = f"beside {load.products} matrix products" if load.stream else "with nothing beside"
    print(f"{count} repeats of each call on the {device}, {beside}")
    return failures


@dataclass(frozen=True)
class Changing:
    """A call whose tensors change in place between replays.

    Attributes:
        sample: the call; shapes and strides stay.
        indices: those of its tensors that say what is to be looked at.
        values: what they become in turn.
    """

    sample: Sample
    indices: tuple[Tensor, ...]
    values: tuple[tuple[Tensor, ...], ...]


def changing_calls(device: str) -> Iterator[Changing]:
    """Paged decoding, writing to pages, and packed attention."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(DTYPES[device]).to(device)

    def integers(*values: int) -> Tensor:
        return torch.tensor(values, dtype=torch.int32, device=device)

    def permuted(pages: int) -> Tensor:
        return torch.randperm(pages, generator=generator).to(torch.int32).view(2, -1).to(device)

    pages = normal(40, 2, 16, 64), normal(40, 2, 16, 64)
    table, lengths = permuted(40), integers(7, 300)
    yield Changing(
        Sample("paged_attention", (normal(2, 4, 64), *pages, table, lengths), {}),
        (table, lengths),
        tuple((permuted(40), integers(*new)) for new in ((7, 301), (320, 1), (33, 0))),
    )

    pages = normal(6, 2, 16, 64), normal(6, 2, 16, 64)
    slots = integers(0, 17, 95, -1)
    yield Changing(
        Sample("paged_write", (normal(4, 2, 64), normal(4, 2, 64), *pages, slots), {}),
        (slots,),
        tuple((integers(*new),) for new in ((1, 2, 3, 4), (95, -1, 0, 16), (-1, -1, -1, -1))),
    )

    bounds = integers(0, 1, 66, 140)
    q, k, v = normal(140, 4, 64), normal(140, 2, 64), normal(140, 2, 64)
    options = {"cu_seqlens_q": bounds, "max_seqlen_q": 140, "causal": True}
    yield Changing(
        Sample("attention", (q, k, v), options),
        (bounds,),
        tuple((integers(0, *new, 140),) for new in ((70, 71), (0, 140), (139, 139))),
    )


def capture(call: Call, device: str) -> tuple[tuple[Tensor, ...], Callable[[], None]]:
    """The call's outputs and a function that computes them anew, in place, from its inputs."""
    if device == "cuda":
        call.run()  # compiles, and sets up what lasts
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            outputs = call.run()
        return outputs, graph.replay
    outputs = call.run()

    def again() -> None:
        for kept, new in zip(outputs, call.run(), strict=True):
            kept.copy_(new)

    return outputs, again


def replays(device: str) -> list[str]:
    """Replays each captured call after each change; names replays that differ from the call."""
    failures, compared = [], 0
    for changing in changing_calls(device):
        for call in calls(device, [changing.sample]):
            outputs, replay = capture(call, device)
            for turn, values in enumerate(changing.values):
                for tensor, value in zip(changing.indices, values, strict=True):
                    tensor.copy_(value)
                call.sample.args[0].normal_()
                replay()
                compared += 1
                if differing(outputs, call.run()).item():
                    failures.append(f"{call}: replay {turn} is not what the call gives")
    how = "replays of CUDA graphs" if device == "cuda" else "calls made again, for want of graphs,"
    print(f"{compared} {how} compared with new calls on the {device}")
    return failures


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one of the two; exit code 1 where something differed."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("check", choices=("repeats", "replays"))
    parser.add_argument("--device", choices=sorted(BACKENDS), default="cuda")
    parser.add_argument("--repeats", type=int, default=1000)
    options = parser.parse_args(arguments)
    with torch.no_grad():
        if options.check == "repeats":
            failures = repeats(options.device, options.repeats)
        else:
            failures = replays(options.device)
    print("\n".join(failures) or "every bit equal")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
