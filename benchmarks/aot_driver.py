"""A Triton driver that compiles for any NVIDIA target and launches nothing.

With it active, a launcher of `bertgpt.kernels` runs whole on meta tensors: it picks its config for
the pretended GPU, allocates nothing, and Triton compiles exactly what it would launch there, with
the arguments' real specialisation. No GPU, no CUDA driver, no memory.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import triton
from occupancy import LIMITS
from triton.backends.compiler import GPUTarget
from triton.backends.driver import GPUDriver

_MULTIPROCESSORS = {80: 108, 90: 132, 100: 148, 120: 188}
CAPABILITIES = tuple(_MULTIPROCESSORS)
# Bytes of shared memory that one block may have.
SHARED_LIMIT = {capability: LIMITS[capability].block_shared for capability in CAPABILITIES}


@dataclass(frozen=True)
class Launch:
    """One kernel as it would have been launched.

    Attributes:
        kernel: its name.
        constants: its compile-time arguments by name.
        num_warps: warps a block.
        num_stages: depth of the software pipeline.
        shared_bytes: shared memory a block.
        tensor_columns: of tensor memory a block.
        cubin: the machine code.
    """

    kernel: str
    constants: dict[str, Any]
    num_warps: int
    num_stages: int
    shared_bytes: int
    tensor_columns: int
    cubin: bytes


class _Launcher:
    """Stands where Triton's generated launcher would: notes the call and returns.

    Triton keeps it with the compiled kernel, so a later call may come while another driver is
    active: that one takes the note.
    """

    def __init__(self, source: Any, metadata: Any) -> None:
        names = source.fn.arg_names
        self.constants = {names[index[0]]: value for index, value in source.constants.items()}
        self.metadata = metadata

    def __call__(
        self, grid_x: int, grid_y: int, grid_z: int, stream: int, function: bytes, *rest: Any
    ) -> None:
        triton.runtime.driver.active.launches.append(
            Launch(
                kernel=self.metadata.name,
                constants=self.constants,
                num_warps=self.metadata.num_warps,
                num_stages=self.metadata.num_stages,
                shared_bytes=self.metadata.shared,
                tensor_columns=getattr(self.metadata, "tmem_size", 0) or 0,
                cubin=function,
            )
        )


class _Utilities:
    def __init__(self, capability: int) -> None:
        self.capability = capability

    def load_binary(
        self, name: str, cubin: bytes, shared: int, device: int
    ) -> tuple[bytes, bytes, int, int, int]:
        """Module, function, registers, spills, threads: the cubin itself serves as function."""
        return cubin, cubin, 0, 0, 1024

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {
            "max_shared_mem": SHARED_LIMIT[self.capability],
            "multiprocessor_count": _MULTIPROCESSORS[self.capability],
            "max_num_regs": 65536,
            "warpSize": 32,
        }


class CompileOnlyDriver(GPUDriver):
    """Pretends to be one GPU of the given compute capability."""

    launcher_cls = _Launcher

    def __init__(self, capability: int) -> None:
        self.capability = capability
        self.launches: list[Launch] = []
        self.utils = _Utilities(capability)
        # Triton keeps compiled kernels by device: one device number for each capability.
        self.get_current_device = lambda: capability
        self.set_current_device = lambda device: None
        self.get_current_stream = lambda device: 0

    @staticmethod
    def is_active() -> bool:
        """Never chosen by Triton itself."""
        return False

    def map_python_to_cpp_type(self, ty: str) -> str:
        """Not for this driver."""
        raise RuntimeError("nothing is launched, so no C++ launcher is written")

    def get_current_target(self) -> GPUTarget:
        """What Triton compiles for and `kernels.device` reads."""
        return GPUTarget("cuda", self.capability, 32)

    def get_active_torch_device(self) -> torch.device:
        """Where tensors have no memory."""
        return torch.device("meta")

    def get_benchmarker(self) -> Callable[..., Any]:
        """Not for this driver."""
        raise RuntimeError("nothing is launched, so nothing can be timed")


def launches_of(call: Callable[[], object], capability: int) -> list[Launch]:
    """Every kernel that `call` launches on a GPU of this compute capability, compiled."""
    driver = CompileOnlyDriver(capability)
    triton.runtime.driver.set_active(driver)
    call()
    return driver.launches
