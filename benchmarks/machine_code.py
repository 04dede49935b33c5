"""What a compiled kernel costs, read from its cubin with the tools inside the Triton wheel."""

import re
import subprocess
import tempfile
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import triton

# Any of these multiplies matrices: warp level, Hopper's warpgroup level, Blackwell's tensor memory.
_MATRIX = re.compile(r"\b(HMMA|HGMMA|IMMA|IGMMA|QGMMA|QMMA|OMMA|DMMA|UTC\w*MMA)\b")
_LOCAL_MEMORY = re.compile(r"\b(LDL|STL)\b")
_INSTRUCTION = re.compile(r"^\s+/\*[0-9a-f]{4,}\*/\s+(.+?);", re.MULTILINE)


@dataclass(frozen=True)
class MachineCode:
    """One kernel's machine code.

    Attributes:
        registers: a thread.
        stack_bytes: local memory a thread; any at all means spills or indexed arrays.
        local_accesses: LDL and STL instructions.
        matrix: count of matrix instructions by mnemonic.
        instructions: all, the padding at the end left out.
    """

    registers: int
    stack_bytes: int
    local_accesses: int
    matrix: dict[str, int]
    instructions: int


@cache
def read(cubin: bytes) -> MachineCode:
    """Disassembles a cubin that holds one kernel."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        usage = _run(triton.knobs.nvidia.cuobjdump.path, "-res-usage", str(path))
        listing = _run(triton.knobs.nvidia.nvdisasm.path, "-c", str(path))
    kernels = re.findall(r"REG:(\d+) STACK:(\d+)", usage)
    if len(kernels) != 1:
        raise ValueError(f"expected one kernel in the cubin, cuobjdump lists {len(kernels)}")
    registers, stack = map(int, kernels[0])
    code = [line for line in _INSTRUCTION.findall(listing) if not line.startswith("NOP")]
    matrix: dict[str, int] = {}
    for line in code:
        for mnemonic in _MATRIX.findall(line):
            matrix[mnemonic] = matrix.get(mnemonic, 0) + 1
    return MachineCode(
        registers=registers,
        stack_bytes=stack,
        local_accesses=sum(bool(_LOCAL_MEMORY.search(line)) for line in code),
        matrix=dict(sorted(matrix.items())),
        instructions=len(code),
    )


def _run(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout
