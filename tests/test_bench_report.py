"""Results: stored and read back, turned into tables and plots, gathered by one command."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from bertgpt.benchmarks import bench_attention, gpu_report, plots, report, results, suite
from bertgpt.benchmarks.case import Case, Provider
from bertgpt.benchmarks.floors import Floors
from bertgpt.benchmarks.harness import REHEARSAL
from bertgpt.benchmarks.results import Row
from bertgpt.ops import _dispatch as ops

ROOT = Path(__file__).resolve().parent.parent


def _row(provider: str, samples: tuple[float, ...], **changes: Any) -> Row:
    values: dict[str, Any] = {
        "op": "attention",
        "case": "S512",
        "cache": "cold",
        "provider": provider,
        "ours": provider.startswith("bertgpt"),
        "samples": samples,
        "timer": "CUDA events, 4 calls a sample",
        "flops": 4e12,
        "bytes": 1e9,
        "tokens": 1024,
        "floor": 5e-3,
        "peak_bytes": 2 << 20,
        "reason": "",
        "absent": False,
    }
    return Row(**{**values, **changes})


def _document(kind: str, rows: list[Row]) -> dict[str, Any]:
    """Invented numbers, to see where each one goes."""
    where = {
        "when": "2000-01-01T00:00:00+00:00",
        "kind": kind,
        "device": "An invented device",
        "gpu": {"driver_version": "1.2", "clocks.max.sm": "1000 MHz"} if kind == "cuda" else {},
        "threads": 1,
        "commit": "0123456789abcdef",
        "dirty": True,
        "packages": {"torch": "0.0"},
        "rehearsal": False,
    }
    return results.as_json(where, Floors(kind, {"bfloat16": 8e14}, 3e12, 2e12), rows)


ROWS = [
    _row("bertgpt triton", (0.010, 0.011, 0.010)),
    _row("SDPA cuDNN", (0.020, 0.022, 0.030)),
    _row("SDPA flash", (0.040, 0.044, 0.040)),
    _row("varlen_attn", (), reason="wrong before timing: rms ratio 1", absent=False),
    _row("xformers", (), reason="xformers cannot be imported", absent=True),
]


def test_a_result_is_read_back_as_it_was_written(tmp_path):
    results.write(tmp_path / "run.json", _document("cuda", ROWS))
    document, rows = results.read(tmp_path / "run.json")
    assert rows == ROWS
    assert document["floors"]["flops"] == {"bfloat16": 8e14}
    text = (tmp_path / "run.json").read_text()
    assert sum('"provider"' in line for line in text.splitlines()) == len(ROWS)


def test_another_format_is_refused(tmp_path):
    (tmp_path / "old.json").write_text(json.dumps({"format": 0, "measurements": []}))
    with pytest.raises(ValueError, match="format 0"):
        results.read(tmp_path / "old.json")


def test_a_gpu_table_says_time_rate_floor_and_ratio():
    text = report.tables([("run", _document("cuda", ROWS), ROWS)])
    mine = next(line for line in text.splitlines() if "**bertgpt triton**" in line)
    # 4e12 FLOP in 10 ms; the floor is 5 ms; twice as fast as the best peer in each round
    assert "10.000 ms" in mine
    assert "400 TFLOP/s" in mine
    assert "50%" in mine
    assert "2.00×" in mine
    assert "varlen_attn: wrong before timing: rms ratio 1" in text
    assert "xformers: xformers cannot be imported" in text
    assert "with uncommitted changes" in text
    assert report.NO_GPU not in text


def test_a_cpu_table_says_ratios_alone():
    text = report.tables([("run", _document("cpu", ROWS), ROWS)])
    assert "2.00×" in text
    assert "ms" not in re.sub(r"rms|items", "", text.partition("**attention**")[2].split("Ref")[0])
    assert report.NO_GPU in text


def test_memory_bound_cases_are_given_as_bandwidth():
    rows = [_row("bertgpt triton", (0.01, 0.01), flops=1e9)]
    text = report.tables([("run", _document("cuda", rows), rows)])
    assert "100 GB/s" in text


def test_the_best_peer_is_the_fastest_measured_one():
    peer = results.best_peer(ROWS)
    assert peer is not None
    assert peer.provider == "SDPA cuDNN"
    assert results.best_peer(ROWS[:1]) is None


def test_ours_is_the_backend_taken_by_default_and_not_the_fastest():
    fast = _row("bertgpt torch", (0.005, 0.005, 0.005))
    rows = [_row("bertgpt cuda", (), reason="not built", absent=True), *ROWS, fast]
    assert results.by_default(rows) == ROWS[0]
    document = _document("cuda", rows)
    assert "2.00× SDPA cuDNN | 2 |" in report.summary([("run", document, rows)])
    ((_, ratio, _),) = plots.numbers("ratio", document, rows)
    assert ratio == 2.0


def test_providers_stand_in_the_order_in_which_a_backend_is_taken():
    order = [f"bertgpt {backend}" for backend in ops.BACKENDS]
    for entry in suite.entries("cuda"):
        mine = [provider.name for provider in entry.providers if provider.name in order]
        assert mine == sorted(mine, key=order.index), entry.case.label


def test_a_rehearsal_is_named_as_one():
    document = _document("cpu", ROWS)
    document["environment"]["rehearsal"] = True
    assert "times mean nothing" in report.tables([("run", document, ROWS)])


def test_committed_results_are_no_rehearsals_and_come_from_a_clean_checkout():
    for name, document, _ in report.load(report.committed()):
        assert document["environment"]["rehearsal"] is False, name
        assert document["environment"]["commit"], name


def test_documents_are_what_the_committed_files_make():
    for path, text in report.documents(report.load(report.committed())).items():
        assert path.read_text() == text, f"{path}: bertgpt bench report"


def test_plots_are_what_the_committed_files_make(tmp_path):
    runs = report.load(report.committed())
    expected = set()
    for name, document, rows in runs:
        for kind in report.plot_kinds(document):
            path = report.IMAGES / f"{name}-{kind}.png"
            expected.add(path)
            shown = plots.numbers(kind, document, rows)
            assert plots.stored_fingerprint(path) == plots.fingerprint(shown), path
    assert set(report.IMAGES.glob("*.png")) == expected


def test_without_a_gpu_result_the_readme_says_so():
    kinds = [document["environment"]["kind"] for _, document, _ in report.load(report.committed())]
    assert (report.NO_GPU in (ROOT / "README.md").read_text()) == ("cuda" not in kinds)


def test_a_block_is_replaced_and_nothing_else():
    text = "a\n<!-- x -->\nold\n<!-- /x -->\nb\n"
    assert report.replace_block(text, "x", "new") == "a\n<!-- x -->\nnew\n<!-- /x -->\nb\n"
    with pytest.raises(ValueError, match="no block"):
        report.replace_block("a", "x", "new")


def test_the_same_numbers_draw_the_same_files(tmp_path):
    pytest.importorskip("matplotlib")
    document = _document("cuda", ROWS)
    first = plots.draw("run", document, ROWS, tmp_path / "a")
    second = plots.draw("run", document, ROWS, tmp_path / "b")
    assert [path.name for path in first] == ["run-roofline.png", "run-ratio.png", "run-memory.png"]
    for a, b in zip(first, second, strict=True):
        assert a.read_bytes() == b.read_bytes()
    changed = [_row("bertgpt triton", (0.020,) * 3), *ROWS[1:]]
    shown = plots.numbers("ratio", document, changed)
    assert plots.stored_fingerprint(first[1]) != plots.fingerprint(shown)


def test_publishing_into_a_folder(tmp_path):
    pytest.importorskip("matplotlib")
    results.write(tmp_path / "run.json", _document("cuda", ROWS))
    written = report.publish([tmp_path / "run.json"], tmp_path / "out")
    assert {path.name for path in written} == {
        "report.md", "run-roofline.png", "run-ratio.png", "run-memory.png"
    }  # fmt: skip
    with pytest.raises(ValueError, match="--out"):
        report.publish([tmp_path / "run.json"], None)


def test_regenerating_from_the_committed_files_changes_nothing(tmp_path, monkeypatch):
    """And `bertgpt bench report results/*.json` is the same command."""
    pytest.importorskip("matplotlib")
    pages = {tmp_path / "page.md": "results", tmp_path / "README.md": "gpu-results"}
    for path, block in pages.items():
        path.write_text(f"above\n<!-- {block} -->\nold\n<!-- /{block} -->\nbelow\n")
    monkeypatch.setattr(report, "DOCUMENTS", pages)
    monkeypatch.setattr(report, "IMAGES", tmp_path / "images")
    monkeypatch.setattr(results, "FOLDER", tmp_path / "results")
    file = tmp_path / "results" / "h100.json"
    results.write(file, _document("cuda", ROWS))
    first = {path: path.read_bytes() for path in report.publish([], None)}
    assert b"2.00" in first[tmp_path / "README.md"]
    assert b"![roofline](images/h100-roofline.png)" in first[tmp_path / "page.md"]
    assert {path: path.read_bytes() for path in report.publish([file], None)} == first
    results.write(file, _document("cuda", [_row("bertgpt triton", (0.005,) * 3), *ROWS[1:]]))
    changed = {path: path.read_bytes() for path in report.publish([], None)}
    assert all(changed[path] != first[path] for path in first if "memory" not in path.name)


def _case(name: str, value: float, draw: Any = None) -> Case:
    def inputs(generator: torch.Generator, device: torch.device) -> dict[str, Any]:
        return {"x": torch.randn(64, 64, generator=generator)}

    return Case(
        "copy", name, "cpu", torch.float32, draw or inputs,
        lambda values, dtype: values["x"].to(dtype), 1.0, 1.0, value=value,
    )  # fmt: skip


COPY = Provider("copy", lambda case, inputs: inputs["x"].clone)


class FastMachine(Floors):
    """Floors that need no measuring and that nothing passes."""

    def measure(self, dtypes: Any) -> None:
        self.flops = dict.fromkeys(("float32", "bfloat16"), 1e15)
        self.copy_bytes = self.read_bytes = 1e15


def test_the_suite_stops_at_its_budget_and_names_what_it_left():
    entries = [suite.Entry(_case(name, 1.0), [COPY]) for name in "ab"]
    outcome = suite.run(entries, FastMachine("cpu"), REHEARSAL, budget=0.0)
    assert outcome.rows == []
    assert outcome.skipped == ["copy: a", "copy: b"]
    outcome = suite.run(entries, FastMachine("cpu"), REHEARSAL, budget=1e6)
    assert [row.case for row in outcome.rows if row.samples] == ["a", "a", "b", "b"]
    assert outcome.skipped == []


def test_a_case_at_fault_is_named_and_the_next_still_runs():
    def zeros(generator: torch.Generator, device: torch.device) -> dict[str, Any]:
        return {"x": torch.zeros(64, 64)}

    entries = [suite.Entry(_case("bad", 2.0, zeros), [COPY]), suite.Entry(_case("a", 1.0), [COPY])]
    outcome = suite.run(entries, FastMachine("cpu"), REHEARSAL)
    assert "constant" in outcome.faults["copy: bad"]
    assert {row.case for row in outcome.rows} == {"a"}


def test_valuable_cases_come_first():
    chosen = suite.entries("cuda")
    values = [entry.case.value for entry in chosen]
    assert values == sorted(values, reverse=True)
    assert len({entry.case.op for entry in chosen[:6]}) >= 4
    labels = [entry.case.label for entry in chosen]
    assert len(set(labels)) == len(labels)


def test_every_case_counts_its_work():
    for device in ("cuda", "cpu"):
        for entry in suite.entries(device):
            assert entry.case.flops > 0, entry.case.label
            assert entry.case.bytes > 0, entry.case.label
            assert sum(provider.ours for provider in entry.providers) >= 1


def test_attention_counts_visible_pairs():
    """4 · D · H operations a pair: 16384 / 512 sequences of 512 · 513 / 2 pairs, 12 heads of 64."""
    case = next(c for c in bench_attention.CASES if c.name == "forward H12 D64 S512 B32 causal")
    assert case.flops == 4 * 64 * 12 * 32 * 512 * 513 / 2
    assert case.bytes == 4 * 16384 * 12 * 64 * 2
    packed = next(c for c in bench_attention.CASES if c.name == "forward H12 D64 S512 B32 packed")
    lengths = bench_attention.ragged_lengths(32, 512)
    assert abs(sum(lengths) / 32 / 512 - 0.6) < 0.01
    assert packed.flops == 4 * 64 * 12 * sum(length**2 for length in lengths)


def _options(tmp_path: Path) -> Any:
    return type(
        "Options",
        (),
        {
            "rehearse": True,
            "out": tmp_path,
            "only": None,
            "budget": 9.0,
            "tune": False,
            "stages": None,
        },
    )()


def test_a_failed_stage_is_recorded_and_the_next_runs(tmp_path):
    run = gpu_report.Report(_options(tmp_path))

    def fail() -> str:
        raise RuntimeError("no such compiler")

    def skip() -> str:
        raise gpu_report.Skipped("nothing to build")

    run.stage("one", fail)
    run.stage("two", skip)
    run.stage("three", lambda: "fine")
    document = json.loads((tmp_path / "report.json").read_text())
    assert [stage["outcome"] for stage in document["stages"]] == ["failed", "skipped", "passed"]
    assert "no such compiler" in document["stages"][0]["log"]
    assert "failed" in (tmp_path / "summary.txt").read_text()


def test_a_failing_command_is_a_failed_stage(tmp_path):
    run = gpu_report.Report(_options(tmp_path))
    run.stage("command", lambda: run.command(sys.executable, "-c", "exit(3)", timeout=60))
    assert run.stages[-1].outcome == "failed"
    assert "exit code 3" in run.stages[-1].log


def test_samples_are_thinned_before_the_limit_is_passed(tmp_path, monkeypatch):
    run = gpu_report.Report(_options(tmp_path))
    run.rows = [_row("bertgpt triton", tuple(i * 1e-3 + 1 for i in range(500)))]
    run.write()
    monkeypatch.setattr(gpu_report, "SIZE_LIMIT", (tmp_path / "report.json").stat().st_size - 100)
    run.size()
    assert len(results.read(tmp_path / "report.json")[1][0].samples) == 250


def test_the_gpu_report_rehearsed_from_end_to_end(tmp_path):
    """The command of `make gpu-report`, with one case of each of two ops."""
    command = [sys.executable, "-P", "-m", "bertgpt.benchmarks.gpu_report", "--rehearse"]
    done = subprocess.run(
        [*command, "--only", "layer_norm", "--out", str(tmp_path)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    document, rows = results.read(tmp_path / "report.json")
    stages = {stage["name"]: stage["outcome"] for stage in document["stages"]}
    assert stages["build"] == "skipped"
    assert stages["validate"] == "passed", done.stdout + done.stderr
    assert stages["suite"] == "passed", done.stdout + done.stderr
    assert stages["tests"] == "passed", done.stdout + done.stderr
    for check in ("smoke", "repeats", "replays"):
        assert stages[check] == "passed", done.stdout + done.stderr
    assert {stages[tool] for tool in gpu_report.TOOLS} == {"skipped"}
    assert {row.op for row in rows} == {"add_layer_norm"}
    assert document["environment"]["rehearsal"] is True
    assert (tmp_path / "summary.txt").stat().st_size > 0


def test_pytest_benchmark_keeps_its_record(tmp_path, monkeypatch):
    """Its JSON holds the harness's samples, grouped by case, and compares with an earlier run."""
    # It keeps nothing in a worker of pytest-xdist; the processes started here are none.
    monkeypatch.delenv("PYTEST_XDIST_WORKER", raising=False)
    command = [sys.executable, "-P", "-m", "pytest", "-q", "-p", "no:cacheprovider", "--rehearse"]
    command += ["benchmarks/bench_add_layer_norm.py", f"--benchmark-storage={tmp_path}"]
    for extra in (["--benchmark-save=one"], ["--benchmark-compare", "--benchmark-json=two.json"]):
        done = subprocess.run(
            [*command, *extra[:-1], extra[-1].replace("two", str(tmp_path / "two"))],
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stdout + done.stderr
    assert "Comparing against benchmarks from" in done.stdout + done.stderr
    record = json.loads((tmp_path / "two.json").read_text())["benchmarks"]
    assert {bench["group"] for bench in record} == {
        f"add_layer_norm: {case}, {cache}"
        for case in ("1024×384", "1024×384 and the sum", "forward + backward 1024×384")
        for cache in ("cold", "warm")
    }
    for bench in record:
        assert bench["stats"]["rounds"] == REHEARSAL.rounds[0]
        assert bench["extra_info"]["provider"] in bench["name"]
        assert 0 < bench["stats"]["min"] < 10
