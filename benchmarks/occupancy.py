"""Theoretical occupancy: how many blocks of a kernel one multiprocessor can hold.

Registers are handed to warps in units of 256, within a quarter of the register file each; shared
memory to blocks in units of 128 bytes, with 1 KiB that the driver keeps for itself from compute
capability 8.0 on. Shared memory is taken to have its largest share of the L1 cache. Stands alone,
so that csrc/build.py can use it without the package.
"""

from dataclasses import dataclass

WARP = 32
_REGISTERS = 65536
_PARTITIONS = 4  # each issues for its own warps, from its own registers
_REGISTER_UNIT = 256
_TENSOR_COLUMNS = 512  # of tensor memory, from compute capability 10.0 on


@dataclass(frozen=True)
class Limits:
    """What one multiprocessor has.

    Attributes:
        warps: that can be resident.
        blocks: that can be resident.
        shared: bytes of shared memory.
        reserved: bytes of it that the driver takes for each block.
        shared_unit: bytes in which it is handed out.
    """

    warps: int
    blocks: int
    shared: int
    reserved: int = 1024
    shared_unit: int = 128

    @property
    def block_shared(self) -> int:
        """Bytes of shared memory that one block can have."""
        return self.shared - self.reserved


# CUDA C++ programming guide 13.0, "Technical specifications per compute capability"; units, the
# reserved part and the partitions: cuda_occupancy.h of CUDA 13.0, NVIDIA's calculator. (For 12.0
# the Blackwell tuning guide says 32 blocks; the guide's table and the calculator say 24.)
LIMITS = {
    75: Limits(warps=32, blocks=16, shared=64 * 1024, reserved=0, shared_unit=256),
    80: Limits(warps=64, blocks=32, shared=164 * 1024),
    90: Limits(warps=64, blocks=32, shared=228 * 1024),
    100: Limits(warps=64, blocks=32, shared=228 * 1024),
    120: Limits(warps=48, blocks=24, shared=100 * 1024),
}


def resident_blocks(
    capability: int, *, warps: int, registers: int, shared: int, tensor_columns: int = 0
) -> int:
    """Blocks that one multiprocessor can hold at once; 0 where not even one fits.

    Args:
        capability: The compute capability, times ten.
        warps: Warps a block.
        registers: Registers a thread.
        shared: Bytes of shared memory a block asks for.
        tensor_columns: Columns of tensor memory a block allocates. Further blocks could be
            resident, but would wait for theirs before doing anything.

    Raises:
        KeyError: The limits of this compute capability are not known here.
    """
    limits = LIMITS[capability]
    bounds = [limits.blocks, limits.warps // warps]
    if registers:
        of_warp = _rounded_up(registers * WARP, _REGISTER_UNIT)
        bounds.append(_REGISTERS // _PARTITIONS // of_warp * _PARTITIONS // warps)
    if of_block := _rounded_up(shared + limits.reserved, limits.shared_unit):
        bounds.append(limits.shared // of_block)
    if tensor_columns:
        bounds.append(_TENSOR_COLUMNS // tensor_columns)
    return min(bounds)


def _rounded_up(value: int, unit: int) -> int:
    return -(-value // unit) * unit
