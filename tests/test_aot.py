"""The ahead-of-time gate sees spills, matrix instructions, greed for shared memory and gaps."""

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("triton", reason="Triton compiles for Linux on x86-64 only")
sys.path.append(str(Path(__file__).resolve().parent.parent / "benchmarks"))

import aot
import aot_table
import machine_code
import triton
import triton.language as tl
from aot_case import NO_MMA, WIDE_MMA, Case
from aot_cases import CASES
from aot_driver import CAPABILITIES, launches_of


@triton.jit
def _sum_of_products_kernel(x_ptr, y_ptr, tiles, N: tl.constexpr):
    offs = tl.arange(0, N)[:, None] * N + tl.arange(0, N)[None, :]
    acc = tl.zeros((N, N), tl.float32)
    for tile in range(tiles):
        x = tl.load(x_ptr + tile * N * N + offs)  # [N, N]
        acc += tl.exp2(tl.dot(x, x))
    tl.store(y_ptr + offs, acc)


@triton.jit
def _product_kernel(x_ptr, y_ptr, N: tl.constexpr, M: tl.constexpr, PRECISION: tl.constexpr):
    rows = tl.arange(0, M)[:, None] * N
    x = tl.load(x_ptr + rows + tl.arange(0, N)[None, :])  # [M, N]
    tl.store(
        y_ptr + tl.arange(0, M)[:, None] * M + tl.arange(0, M)[None, :],
        tl.dot(x, tl.trans(x), input_precision=PRECISION),
    )


def _product(rows: int, columns: int, dtype: torch.dtype, **options: int) -> None:
    x = torch.empty(rows, columns, dtype=dtype, device="meta")
    y = torch.empty(rows, rows, dtype=torch.float32, device="meta")
    _product_kernel[(1,)](x, y, N=columns, M=rows, PRECISION="ieee", **options)


@pytest.fixture(autouse=True)
def _driver() -> Iterator[None]:
    """Puts Triton's own choice of driver back."""
    before = triton.runtime.driver._active
    yield
    triton.runtime.driver._active = before


@pytest.fixture
def plant(monkeypatch: pytest.MonkeyPatch):
    """Makes the gate examine one call in place of the committed ones."""

    def install(call, matrix) -> None:
        monkeypatch.setattr(aot, "CASES", (Case("linear_gelu", "planted", call, matrix),))

    return install


def test_a_sound_kernel_gives_a_row_and_no_problem(plant):
    plant(lambda: _product(64, 64, torch.bfloat16), WIDE_MMA)
    outcome = aot.examine(0, 90)
    assert not outcome.problems
    (row,) = outcome.rows
    assert row[:3] == ("linear_gelu: planted", "90", "_product_kernel")
    cells = dict(zip(aot_table.HEADER, row, strict=True))
    assert "HGMMA" in cells["matrix"]
    assert 16 <= int(cells["registers"]) <= 255
    assert cells["warps"] == f"{4 * int(cells['blocks'])}/64"
    assert cells["loop"] == "–"


def test_spills_are_seen(plant):
    plant(lambda: _product(64, 64, torch.bfloat16, maxnreg=32), NO_MMA)
    (problem,) = aot.examine(0, 80).problems
    assert "spills" in problem
    (launch,) = launches_of(aot.CASES[0].call, 80)
    assert machine_code.read(launch.cubin).local_accesses > 0


def test_a_missing_matrix_instruction_is_seen(plant):
    plant(lambda: _product(32, 32, torch.float32), WIDE_MMA)
    (problem,) = aot.examine(0, 80).problems
    assert "no HMMA, found no matrix instruction" in problem


def test_too_much_shared_memory_is_seen(plant, monkeypatch):
    monkeypatch.setattr(aot, "SHARED_LIMIT", {120: 1024})
    plant(lambda: _product(64, 64, torch.bfloat16), WIDE_MMA)
    assert any("shared memory" in problem for problem in aot.examine(0, 120).problems)


def test_a_block_that_no_multiprocessor_holds_is_seen(plant, monkeypatch):
    monkeypatch.setattr(aot_table, "resident_blocks", lambda *arguments, **options: 0)
    plant(lambda: _product(64, 64, torch.bfloat16), WIDE_MMA)
    (problem,) = aot.examine(0, 90).problems
    assert "does not fit a multiprocessor with 128 threads of" in problem


def test_a_call_that_reads_values_or_launches_nothing_is_seen(plant):
    plant(lambda: torch.empty(1, device="meta").item(), NO_MMA)
    (problem,) = aot.examine(0, 90).problems
    assert "planted sm_90" in problem
    plant(lambda: None, NO_MMA)
    assert aot.examine(0, 90).problems == ["linear_gelu: planted sm_90: launched nothing"]


def test_a_config_that_no_case_reaches_is_seen(monkeypatch):
    @dataclass(frozen=True)
    class Config:
        block: int

    module = SimpleNamespace(pick_config=lambda capability, size: Config(min(size, capability)))
    monkeypatch.setitem(sys.modules, "bertgpt.kernels.planted", module)
    monkeypatch.setattr(aot, "DOMAINS", {"planted": lambda c: iter([(c, 16), (c, 32)])})
    assert aot.unreached("planted", 90, {Config(16), Config(32)}) == []
    (gap,) = aot.unreached("planted", 90, {Config(16)})
    assert "no case reaches" in gap
    assert "32" in gap


def _row(case: str, **changes: str) -> tuple[str, ...]:
    cells = dict.fromkeys(aot_table.HEADER, "1") | {"case": case, "sm": "90", "kernel": "_k"}
    return tuple((cells | changes).values())


def test_the_table_is_compared_line_by_line(monkeypatch, tmp_path, capsys):
    rows = [_row("a: b", registers="128")]
    monkeypatch.setattr(aot, "TABLE", tmp_path / "aot.md")
    aot.TABLE.write_text(aot_table.render(rows))
    assert aot._compare(aot_table.render(rows)) == 0
    worse = aot_table.render([_row("a: b", registers="168")])
    assert aot._compare(worse) == 1
    printed = capsys.readouterr().out
    assert "\n-| a: b " in printed
    assert "\n+| a: b " in printed
    assert "a: b, sm_90, _k: registers 128 → 168\n" in printed
    assert "--update" in printed
    aot.TABLE.write_text(aot_table.render(rows).replace(triton.__version__, "0.0"))
    assert aot._compare(worse) == 0


def test_a_difference_names_rows_and_columns():
    """Whatever moved: a row of two with the same key, one that came, one that went, a column."""
    before = [_row("a", config="m64"), _row("a"), _row("b"), _row("c")]
    after = [_row("a", config="m128", loop="–"), _row("a"), _row("c"), _row("d", sm="80")]
    old, new = aot_table.render(before), aot_table.render(after)
    named = aot_table.difference(old, new).splitlines()[-3:]
    assert named == [
        "a, sm_90, _k: config m64 → m128, loop 1 → –", "b, sm_90, _k: gone", "d, sm_80, _k: new"
    ]  # fmt: skip
    renamed = aot_table.difference(old, old.replace("| copy |", "| move |")).splitlines()[-1]
    assert renamed == "c, sm_90, _k: copy 1 → –, move – → 1"


def test_the_committed_table_has_these_columns_and_every_case():
    header, *rows = aot_table.cells_of(aot.TABLE.read_text())
    assert tuple(header) == aot_table.HEADER
    assert {(row[0], row[1]) for row in rows} == {
        (f"{case.op}: {case.name}", str(capability))
        for case in CASES
        for capability in CAPABILITIES
    }


def test_one_cubin_is_one_kernel():
    (launch,) = launches_of(lambda: _product(32, 32, torch.float16), 120)
    code = machine_code.read(launch.cubin)
    assert code.matrix.keys() == {"HMMA"}
    assert code.stack_bytes == code.local_accesses == 0
    assert code.loop is None
    assert launch.constants["N"] == 32
    assert machine_code.read(launch.cubin) == code  # as it was kept


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_a_compiled_loop_is_found_and_counted(capability):
    """One turn: a product of 64×64 by four warps, its exponentials and its sums."""
    x = torch.empty(8, 64, 64, dtype=torch.bfloat16, device="meta")
    y = torch.empty(64, 64, dtype=torch.float32, device="meta")
    (launch,) = launches_of(
        lambda: _sum_of_products_kernel[(1,)](x, y, 8, N=64, num_stages=3), capability
    )
    loop = machine_code.read(launch.cubin).loop
    assert loop is not None
    # 64³ multiplications are 128 HMMA of 16×8×16, a quarter of them each warp's. HGMMA and UTCHMMA
    # take the whole tile, 16 along k at a time.
    assert loop.matrix == (4 if capability in (90, 100) else 32)
    assert loop.special == 64 * 64 // 128
    assert loop.fma >= 64 * 64 // 128 // 2
    assert loop.copies > 0
    assert launch.tensor_columns == (64 if capability == 100 else 0)


def test_a_kernel_launched_before_is_seen_again():
    first, second = (launches_of(lambda: _product(16, 16, torch.float16), 90) for _ in range(2))
    assert first == second
    assert len(second) == 1


def test_cases_have_names_of_their_own():
    names = [(case.op, case.name) for case in CASES]
    assert len(set(names)) == len(names)
    assert CAPABILITIES == (80, 90, 100, 120)
