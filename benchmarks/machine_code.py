"""What a compiled kernel costs, read from its cubin with the tools inside the Triton wheel."""

import hashlib
import json
import os
import re
import subprocess
import tempfile
from collections import Counter
from dataclasses import asdict, dataclass
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


def read(cubin: bytes) -> MachineCode:
    """The figures of a cubin that holds one kernel, kept beside Triton's own cache."""
    name = hashlib.sha256(Path(__file__).read_bytes() + cubin).hexdigest()
    kept = Path(triton.knobs.cache.dir) / "machine_code" / f"{name}.json"
    if not kept.exists():
        code = _disassembled(cubin)
        kept.parent.mkdir(parents=True, exist_ok=True)
        part = kept.with_suffix(f".{os.getpid()}")
        part.write_text(json.dumps(asdict(code)))
        part.replace(kept)  # whole or not at all, whoever else writes it
    return MachineCode(**json.loads(kept.read_text()))


def _disassembled(cubin: bytes) -> MachineCode:
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
    matrix = Counter(mnemonic for line in code for mnemonic in _MATRIX.findall(line))
    return MachineCode(
        registers=registers,
        stack_bytes=stack,
        local_accesses=sum(bool(_LOCAL_MEMORY.search(line)) for line in code),
        matrix=dict(sorted(matrix.items())),
        instructions=len(code),
    )


def _run(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout
