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

import main_loop
import triton


@dataclass(frozen=True)
class MachineCode:
    """One kernel's machine code.

    Attributes:
        registers: a thread.
        stack_bytes: local memory a thread; any at all means spills or indexed arrays.
        local_accesses: LDL and STL instructions.
        matrix: count of matrix instructions by mnemonic.
        instructions: all, the padding at the end left out.
        loop: the main loop, or None where the kernel has none.
    """

    registers: int
    stack_bytes: int
    local_accesses: int
    matrix: dict[str, int]
    instructions: int
    loop: main_loop.MainLoop | None


def read(cubin: bytes) -> MachineCode:
    """The figures of a cubin that holds one kernel, kept beside Triton's own cache."""
    readers = Path(__file__).read_bytes() + Path(main_loop.__file__).read_bytes()
    name = hashlib.sha256(readers + cubin).hexdigest()
    kept = Path(triton.knobs.cache.dir) / "machine_code" / f"{name}.json"
    if not kept.exists():
        code = _disassembled(cubin)
        kept.parent.mkdir(parents=True, exist_ok=True)
        part = kept.with_suffix(f".{os.getpid()}")
        part.write_text(json.dumps(asdict(code)))
        part.replace(kept)  # whole or not at all, whoever else writes it
    values = json.loads(kept.read_text())
    loop = values.pop("loop")
    return MachineCode(**values, loop=loop and main_loop.MainLoop(**loop))


def _disassembled(cubin: bytes) -> MachineCode:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        usage = _run(triton.knobs.nvidia.cuobjdump.path, "-res-usage", str(path))
        # Labels tell where branches go: without its own flow analysis (-ndf) nvdisasm is quicker.
        listing = _run(triton.knobs.nvidia.nvdisasm.path, "-c", "-ndf", str(path))
    kernels = re.findall(r"REG:(\d+) STACK:(\d+)", usage)
    if len(kernels) != 1:
        raise ValueError(f"expected one kernel in the cubin, cuobjdump lists {len(kernels)}")
    registers, stack = map(int, kernels[0])
    code, labels = main_loop.parse(listing)
    matrix = Counter(line.opcode for line in code if line.kind == "matrix")
    return MachineCode(
        registers=registers,
        stack_bytes=stack,
        local_accesses=sum(line.opcode in {"LDL", "STL"} for line in code),
        matrix=dict(sorted(matrix.items())),
        instructions=len(code),
        loop=main_loop.find(code, labels),
    )


def _run(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout
