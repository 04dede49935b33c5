"""Occupancy against NVIDIA's own calculator, and the main loop in short disassemblies."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="its wheel has NVIDIA's calculator and disassembler")
sys.path.append(str(Path(__file__).resolve().parent.parent / "benchmarks"))

import main_loop
import triton
from main_loop import MainLoop
from occupancy import LIMITS, WARP, resident_blocks

# Reads: capability, warps and shared bytes a multiprocessor, bytes reserved and allowed a block;
# threads, registers, shared bytes of the kernel. Writes the blocks.
CALCULATOR = r"""
#include <cuda_occupancy.h>
#include <cstdio>
int main() {
  int capability, warps, shared, reserved, allowed, threads, registers, bytes;
  while (std::scanf("%d%d%d%d%d%d%d%d", &capability, &warps, &shared, &reserved, &allowed, &threads,
                    &registers, &bytes) == 8) {
    cudaOccDeviceProp device;
    device.computeMajor = capability / 10;
    device.computeMinor = capability % 10;
    device.maxThreadsPerBlock = 1024;
    device.maxThreadsPerMultiprocessor = 32 * warps;
    device.regsPerBlock = device.regsPerMultiprocessor = 65536;
    device.warpSize = 32;
    device.sharedMemPerBlock = 48 * 1024;
    device.sharedMemPerMultiprocessor = shared;
    device.numSms = 1;
    device.sharedMemPerBlockOptin = allowed;
    device.reservedSharedMemPerBlock = reserved;
    cudaOccFuncAttributes kernel;
    kernel.maxThreadsPerBlock = 1024;
    kernel.numRegs = registers;
    kernel.shmemLimitConfig = FUNC_SHMEM_LIMIT_OPTIN;
    kernel.maxDynamicSharedSizeBytes = bytes;
    kernel.numBlockBarriers = 1;
    cudaOccDeviceState state;
    state.carveoutConfig = SHAREDMEM_CARVEOUT_MAX_SHARED;
    cudaOccResult result;
    if (cudaOccMaxActiveBlocksPerMultiprocessor(&result, &device, &kernel, &state, threads, bytes))
      return 1;
    std::printf("%d\n", result.activeBlocksPerMultiprocessor);
  }
}
"""


def test_every_limit_is_that_of_nvidias_calculator(tmp_path):
    """cuda_occupancy.h, compiled here and asked the same some ten thousand questions."""
    if shutil.which("g++") is None:
        pytest.skip("g++ is not on PATH")
    source, program = tmp_path / "calculator.cpp", tmp_path / "calculator"
    source.write_text(CALCULATOR)
    headers = Path(triton.__file__).parent / "backends" / "nvidia" / "include"
    subprocess.run(["g++", f"-I{headers}", str(source), "-o", str(program)], check=True)
    asked = [
        (capability, warps, registers, shared)
        for capability in LIMITS
        for warps in (1, 2, 3, 4, 5, 8, 10, 12, 16, 24, 32)
        for registers in (16, 24, 32, 33, 37, 64, 65, 80, 96, 128, 129, 168, 200, 224, 255)
        for shared in (
            0,
            1,
            1024,
            4000,
            16384,
            33024,
            49152,
            65536,
            73760,
            98304,
            101376,
            116 << 10,
        )
        if shared <= LIMITS[capability].block_shared
    ]
    lines = [
        f"{c} {limits.warps} {limits.shared} {limits.reserved} {limits.block_shared} "
        f"{warps * WARP} {registers} {shared}"
        for c, warps, registers, shared in asked
        for limits in [LIMITS[c]]
    ]
    done = subprocess.run(
        [str(program)], input="\n".join(lines), capture_output=True, text=True, check=True
    )
    answers = list(map(int, done.stdout.split()))
    assert len(answers) == len(asked) > 5000
    for (capability, warps, registers, shared), answer in zip(asked, answers, strict=True):
        mine = resident_blocks(capability, warps=warps, registers=registers, shared=shared)
        assert mine == answer, (capability, warps, registers, shared)


def test_examples_in_nvidias_guides():
    """CUDA C++ best practices guide 11.2.1, and programming guide 8.2.3, multiprocessor level."""
    full = resident_blocks(80, warps=4, registers=32, shared=0)
    assert full * 4 == LIMITS[80].warps  # 32 registers a thread allow all
    assert resident_blocks(80, warps=4, registers=37, shared=0) == 12  # 75%
    assert resident_blocks(80, warps=10, registers=37, shared=0) == 4  # 63%
    assert resident_blocks(80, warps=16, registers=64, shared=0) == 2
    assert resident_blocks(80, warps=16, registers=65, shared=0) == 1


def test_tensor_memory_bounds_what_can_work_at_once():
    for columns, blocks in ((0, 3), (128, 3), (256, 2), (512, 1)):
        kernel = {"warps": 4, "registers": 160, "shared": 4096, "tensor_columns": columns}
        assert resident_blocks(100, **kernel) == blocks
    with pytest.raises(KeyError):
        resident_blocks(61, warps=4, registers=32, shared=0)


def loop_of(listing):
    return main_loop.find(*main_loop.parse(listing))


# A copy kernel, sm_90: straight through, but for the trap that fills the end.
NO_LOOP = """
        .global         _copy_kernel
.text._copy_kernel:
        /*0000*/                   LDC R1, c[0x0][0x28] ;
        /*0010*/                   S2R R0, SR_TID.X ;
        /*0020*/                   ISETP.GE.AND P0, PT, R0, UR6, PT ;
        /*0030*/               @P0 EXIT ;
        /*0040*/                   LDG.E R3, desc[UR4][R2.64] ;
        /*0050*/                   STG.E desc[UR4][R4.64], R3 ;
        /*0060*/                   EXIT ;
.L_x_0:
        /*0070*/                   BRA `(.L_x_0);
        /*0080*/                   NOP;
        /*0090*/                   NOP;
.L_x_1:
"""


def test_a_kernel_without_a_loop_has_none():
    code, labels = main_loop.parse(NO_LOOP)
    assert len(code) == 8
    assert labels == {".L_x_0": 7, ".L_x_1": 8}
    assert code[3] == main_loop.Instruction("P0", "EXIT", "", "")
    assert code[4].modifiers == ".E"
    assert main_loop.find(code, labels) is None
    assert loop_of("") is None


def test_a_wait_out_of_line_makes_no_loop_of_what_it_returns_to():
    """Its jump goes back in the text, and nothing leads from there to the wait."""
    waiting = NO_LOOP.replace(
        "        /*0050*/", "        /*0048*/    @!P1 BRA `(.L_x_2) ;\n.L_x_3:\n        /*0050*/"
    ) + (
        ".L_x_2:\n        /*00b0*/    SYNCS.PHASECHK.TRANS64.TRYWAIT P1, [UR4], R4 ;\n"
        "        /*00c0*/    @!P1 BRA `(.L_x_2) ;\n        /*00d0*/    BRA `(.L_x_3) ;\n"
    )  # fmt: skip
    code, labels = main_loop.parse(waiting)
    assert labels[".L_x_3"] == 6
    assert main_loop.find(code, labels) is None


# Attention, sm_90, shortened: a loop over whole tiles and one over masked ones; both wait for their
# copies in a loop that stands out of line and jumps back in, so its branch back spans the kernel.
TWO_LOOPS = """
        /*0000*/                   HGMMA.64x128x16.F32.BF16 R24, gdesc[UR8], RZ, !UPT ;
        /*0010*/              @!P0 BRA `(.L_x_0) ;
.L_x_3:
        /*0020*/                   SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [UR4], R4 ;
        /*0030*/              @!P0 BRA `(.L_x_1) ;
.L_x_8:
        /*0040*/                   HGMMA.64x128x16.F32.BF16 R24, gdesc[UR8], R24 ;
        /*0050*/                   HGMMA.64x64x16.F32.BF16 R88, R24, gdesc[UR12], R88, gsb0 ;
        /*0060*/                   MUFU.EX2 R5, R5 ;
        /*0070*/                   FFMA R6, R6, R7, -R8 ;
        /*0080*/                   HFMA2 R9, -RZ, RZ, 0, 0 ;
        /*0090*/                   UTMALDG.4D [UR16], [UR20] ;
        /*00a0*/               @P2 BRA `(.L_x_3) ;
.L_x_0:
        /*00b0*/                   ISETP.NE.AND P0, PT, R4, RZ, PT ;
.L_x_7:
        /*00c0*/                   SYNCS.PHASECHK.TRANS64.TRYWAIT P6, [UR4], R4 ;
        /*00d0*/              @!P6 BRA `(.L_x_5) ;
.L_x_10:
        /*00e0*/                   HGMMA.64x128x16.F32.BF16 R24, gdesc[UR8], R24 ;
        /*00f0*/                   HGMMA.64x64x16.F32.BF16 R88, R24, gdesc[UR12], R88, gsb0 ;
        /*0100*/                   FSEL R6, R6, -INF , !P5 ;
        /*0110*/                   FFMA R6, R6, R7, -R8 ;
        /*0120*/                   FMUL R6, R6, R7 ;
        /*0130*/              @!P0 BRA `(.L_x_7) ;
        /*0140*/                   EXIT ;
.L_x_1:
        /*0150*/                   SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [UR4], R4 ;
        /*0160*/              @!P0 BRA `(.L_x_1) ;
        /*0170*/                   BRA `(.L_x_8) ;
.L_x_5:
        /*0180*/                   SYNCS.PHASECHK.TRANS64.TRYWAIT P6, [UR4], R4 ;
        /*0190*/              @!P6 BRA `(.L_x_5) ;
        /*01a0*/                   BRA `(.L_x_10) ;
"""


def test_of_two_loops_with_the_same_products_the_first_counts():
    """9 instructions of its own and the 3 of its wait; a constant's HFMA2 is no arithmetic."""
    expected = MainLoop(instructions=12, matrix=2, special=1, fma=1, shared=0, copies=1)
    assert loop_of(TWO_LOOPS) == expected


def test_more_products_win_over_the_first_place():
    masked = TWO_LOOPS.replace("FMUL R6, R6, R7", "HGMMA.64x64x16.F32.BF16 R88, R24")
    assert loop_of(masked) == MainLoop(
        instructions=11, matrix=3, special=0, fma=1, shared=0, copies=0
    )


# Decoding, sm_80, shortened: the loop is left by a conditional call within the kernel. Around it
# stands a loop over splits, whose own instructions are not the inner loop's.
LEFT_BY_A_CALL = """
.L_x_9:
        /*0000*/                   MOV R2, RZ ;
.L_x_3:
        /*0010*/                   LDSM.16.MT88.4 R16, [R60] ;
        /*0020*/                   LDGSTS.E.BYPASS.128 [R80], [R82.64], P3 ;
        /*0030*/                   HMMA.16816.F32.BF16 R36, R32.reuse, R16, RZ ;
        /*0040*/              @!P0 CALL.REL.NOINC `(.L_x_2) ;
        /*0050*/                   BRA `(.L_x_3) ;
.L_x_2:
        /*0060*/                   CALL.REL.NOINC `($__internal_0_$__cuda_trap) ;
        /*0070*/                   STS.128 [R60], R36 ;
        /*0080*/                   BRA.U !UP0, `(.L_x_9) ;
        /*0090*/                   EXIT ;
"""


def test_the_innermost_loop_with_products_counts():
    assert loop_of(LEFT_BY_A_CALL) == MainLoop(
        instructions=5, matrix=1, special=0, fma=0, shared=1, copies=1
    )


# Products behind a call within the kernel; before them a branch whose condition is an operand.
BEHIND_A_CALL = """
        /*0000*/                   BRA.U !UP0, `(.L_x_2) ;
.L_x_0:
        /*0010*/              @!P0 CALL.REL.NOINC `(.L_x_1) ;
.L_x_2:
        /*0020*/                   EXIT ;
.L_x_1:
        /*0030*/                   HMMA.16816.F32.BF16 R36, R32.reuse, R16, RZ ;
        /*0040*/                   BRA `(.L_x_0) ;
"""


def test_conditional_calls_and_branches_go_both_ways():
    assert loop_of(BEHIND_A_CALL) == MainLoop(
        instructions=3, matrix=1, special=0, fma=0, shared=0, copies=0
    )


def test_without_products_arithmetic_chooses_then_memory():
    floats = LEFT_BY_A_CALL.replace("HMMA.16816.F32.BF16", "FADD2")
    assert loop_of(floats) == MainLoop(
        instructions=5, matrix=0, special=0, fma=1, shared=1, copies=1
    )
    memory = LEFT_BY_A_CALL.replace("HMMA.16816.F32.BF16", "IADD3")
    assert loop_of(memory) == MainLoop(
        instructions=5, matrix=0, special=0, fma=0, shared=1, copies=1
    )
    waiting = "\n".join(line for line in TWO_LOOPS.splitlines()[-8:])
    assert "SYNCS" in waiting
    assert loop_of(waiting) is None


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ("HMMA.16816.F32.BF16 R4, R8, R2, R4", "matrix"),
        ("UTCHMMA gdesc[UR6], gdesc[UR14], tmem[UR8], tmem[UR36], idesc[UR37], !UPT", "matrix"),
        ("MUFU.TANH R4, R4", "special"),
        ("FFMA2 R4, R4.F32x2.HI_LO, R6.F32x2.HI_LO, R8.F32x2.HI_LO", "fma"),
        ("HFMA2.BF16_V2 R4, R4, R5, R6", "fma"),
        ("HFMA2.MMA R4, -RZ, RZ, 0, 0", ""),
        ("LDSM.16.M88.4 R4, [R8]", "shared"),
        ("STS.64 [R8], R4", "shared"),
        ("LDGSTS.E.BYPASS.LTC128B.128 [R8], [R4.64]", "copies"),
        ("UTMALDG.2D [UR8], [UR4], desc[UR6]", "copies"),
        ("LDGDEPBAR", ""),
        ("LDG.E.128 R4, [R2.64]", "global"),
        ("LDS R4, [R8]", "shared"),
        ("FMNMX R4, R4, R5, !PT", ""),
        ("IMAD.MOV.U32 R4, RZ, RZ, R5", ""),
    ],
)
def test_what_an_instruction_counts_as(text, kind):
    for predicate in ("", "@!P0 ", "@UP1 "):
        ((instruction,), _) = main_loop.parse(f"        /*0000*/   {predicate}{text} ;")
        assert instruction.kind == kind
        assert instruction.predicate == predicate.strip("@ ")


def test_what_a_block_may_ask_for_is_documented():
    """CUDA C++ programming guide 13.0, technical specifications, in KiB."""
    documented = {75: 64, 80: 163, 90: 227, 100: 227, 120: 99}
    assert {c: limits.block_shared / 1024 for c, limits in LIMITS.items()} == documented


def test_one_block_can_have_all_the_shared_memory_it_may_ask_for():
    for capability, limits in LIMITS.items():
        kernel = {"warps": 4, "registers": 255}
        assert resident_blocks(capability, **kernel, shared=limits.block_shared) == 1
        assert resident_blocks(capability, **kernel, shared=limits.block_shared + 1) == 0
