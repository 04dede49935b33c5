"""The small calls of `bertgpt validate`, on every backend with kernels of ours: for a watcher.

    python -m bertgpt.benchmarks.smoke [--device cuda]

Each runs once; compute-sanitizer watches. Every op must have run on some backend.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from bertgpt import ops
from bertgpt.validate import refusal_of
from bertgpt.validation_cases import OPS, Sample, samples

# On a CPU the C++ kernels run where BERTGPT_HOST_ENGINE names a build, and torch stands for Triton.
BACKENDS = {"cuda": ("cuda", "triton"), "cpu": ("cuda", "torch")}
DTYPES = {"cuda": torch.bfloat16, "cpu": torch.float32}


@dataclass(frozen=True)
class Call:
    """One call on one backend.

    Attributes:
        sample: the op and its arguments, on the device.
        number: which of the op's samples it is.
        backend: one that does not refuse it.
    """

    sample: Sample
    number: int
    backend: str

    def __str__(self) -> str:
        return f"{self.sample.op} {self.number}, {self.backend}"

    def run(self) -> tuple[Tensor, ...]:
        """Its outputs, and the gradients that its sample asks for."""
        results = self.sample.results(getattr(ops, self.sample.op), backend=self.backend)
        return tuple(result.tensor for result in results)


def calls(device: str, found: Sequence[Sample] | None = None) -> Iterator[Call]:
    """What runs on the device: the given samples, or all.

    Raises:
        RuntimeError: No backend takes any call of some op; the message has the reasons.
    """
    if found is None:
        found = [sample for op in OPS for sample in samples(op, DTYPES[device])]
    for op in dict.fromkeys(sample.op for sample in found):
        mine = [sample.mapped(lambda t: t.to(device)) for sample in found if sample.op == op]
        refusals: dict[str, str] = {}
        ran = 0
        for number, sample in enumerate(mine):
            for backend in BACKENDS[device]:
                reason = refusal_of(sample, backend)
                if reason is None:
                    ran += 1
                    yield Call(sample, number, backend)
                else:
                    refusals.setdefault(backend, reason)
        if not ran:
            raise RuntimeError(f"no kernel takes {op}: {refusals}")


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs every call once."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--device", choices=sorted(BACKENDS), default="cuda")
    device = parser.parse_args(arguments).device
    made = 0
    with torch.no_grad():
        for call in calls(device):
            call.run()
            made += 1
    if device == "cuda":
        torch.cuda.synchronize()
    print(f"{made} calls of {len(OPS)} ops on the {device}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
