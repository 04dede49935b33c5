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
import machine_code
import triton
import triton.language as tl
from aot_cases import CASES, NO_MMA, WIDE_MMA, Case
from aot_driver import CAPABILITIES, launches_of


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
    assert "HGMMA" in row[7]
    assert 16 <= int(row[4]) <= 255


def test_spills_are_seen(plant):
    plant(lambda: _product(64, 64, torch.bfloat16, maxnreg=32), NO_MMA)
    (problem,) = aot.examine(0, 80).problems
    assert "spills" in problem


def test_a_missing_matrix_instruction_is_seen(plant):
    plant(lambda: _product(32, 32, torch.float32), WIDE_MMA)
    (problem,) = aot.examine(0, 80).problems
    assert "no HMMA, found no matrix instruction" in problem


def test_too_much_shared_memory_is_seen(plant, monkeypatch):
    monkeypatch.setattr(aot, "SHARED_LIMIT", {120: 1024})
    plant(lambda: _product(64, 64, torch.bfloat16), WIDE_MMA)
    assert any("shared memory" in problem for problem in aot.examine(0, 120).problems)


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


def test_the_table_is_compared_line_by_line(monkeypatch, tmp_path, capsys):
    rows = [("a: b", "90", "_k", "m64 4w 2s", "128", "0", "1024", "8 HGMMA", "900")]
    monkeypatch.setattr(aot, "TABLE", tmp_path / "aot.md")
    aot.TABLE.write_text(aot.render(rows))
    assert aot._compare(aot.render(rows)) == 0
    worse = [(*rows[0][:4], "168", *rows[0][5:])]
    assert aot._compare(aot.render(worse)) == 1
    printed = capsys.readouterr().out
    assert "| 168 " in printed
    assert "--update" in printed
    aot.TABLE.write_text(aot.render(rows).replace(triton.__version__, "0.0"))
    assert aot._compare(aot.render(worse)) == 0


def test_one_cubin_is_one_kernel():
    (launch,) = launches_of(lambda: _product(32, 32, torch.float16), 120)
    code = machine_code.read(launch.cubin)
    assert code.matrix.keys() == {"HMMA"}
    assert code.stack_bytes == code.local_accesses == 0
    assert launch.constants["N"] == 32


def test_a_kernel_launched_before_is_seen_again():
    first, second = (launches_of(lambda: _product(16, 16, torch.float16), 90) for _ in range(2))
    assert first == second
    assert len(second) == 1


def test_cases_have_names_of_their_own():
    names = [(case.op, case.name) for case in CASES]
    assert len(set(names)) == len(names)
    assert CAPABILITIES == (80, 90, 100, 120)
