"""Peak memory of one loss and its gradients, in a process of its own; run by the tests.

python tests/loss_memory.py BACKEND ROWS TOKENS WIDTH prints the bytes beyond inputs and gradients.
Under TRITON_INTERPRET=1 and backend "triton" the kernels do nothing: what the launchers allocate
is what is measured, and all of it is written.
"""

import re
import sys
from pathlib import Path

import torch

from bertgpt import ops


class _Nothing:
    """A kernel that does nothing."""

    def __getitem__(self, grid):
        return lambda *args, **kwargs: None


def silence_kernels() -> None:
    """Every kernel of the loss does nothing, and torch.empty touches the memory it gives."""
    from bertgpt.kernels import linear_cross_entropy, linear_cross_entropy_backward

    for module in (linear_cross_entropy, linear_cross_entropy_backward):
        for name in [name for name in vars(module) if name.endswith("_kernel")]:
            setattr(module, name, _Nothing())
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True


def resident_bytes(what: str) -> int:
    """Resident memory of this process: VmRSS now, VmHWM at its peak."""
    status = Path("/proc/self/status").read_text()
    return int(re.findall(rf"{what}:\s+(\d+) kB", status)[0]) * 1024


def main(backend: str, rows: int, tokens: int, width: int) -> None:
    """Prints the peak."""
    torch.set_num_threads(1)
    if backend == "triton":
        silence_kernels()
    shapes = {"hidden": (rows, width), "weight": (tokens, width), "bias": (tokens,)}
    for size in ({name: (4, 4) if len(s) == 2 else (4,) for name, s in shapes.items()}, shapes):
        leaves = [torch.randn(shape).requires_grad_() for shape in size.values()]
        labels = torch.randint(0, leaves[1].shape[0], leaves[0].shape[:1])
        labels[::7] = -100
        Path("/proc/self/clear_refs").write_text("5")  # forgets the peak so far
        before = resident_bytes("VmRSS")
        loss = ops.linear_cross_entropy(*leaves, labels, backend=backend)
        gradients = torch.autograd.grad(loss, leaves)  # the small size first: libraries load
        peak = resident_bytes("VmHWM") - before
    print(peak - sum(gradient.nbytes for gradient in gradients))


if __name__ == "__main__":
    main(sys.argv[1], *map(int, sys.argv[2:]))
