"""What `make gpu-report` rests on, without a GPU: repeats, replays, the sanitizer, time limits."""

from __future__ import annotations

import argparse
import json
import os
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from bertgpt import ops
from bertgpt.benchmarks import gate, gpu_report, smoke
from bertgpt.benchmarks.results import Row
from bertgpt.validation_cases import OPS


@pytest.fixture
def report(tmp_path):
    """A report of a rehearsal; other options are set on it."""
    options = argparse.Namespace(
        rehearse=True, out=tmp_path / "out", only=None, budget=9.0, tune=False, stages=None
    )
    options.out.mkdir()
    return gpu_report.Report(options)


def test_every_op_is_in_the_smoke_set():
    functions = {name for name in ops.__all__ if callable(getattr(ops, name))}
    made = {call.sample.op for call in smoke.calls("cpu")}
    others = {"BackendUnavailable", "Explanation", "explain", "strict"}
    others |= {"own_flags", "raise_pending"}
    assert made == set(OPS) == functions - others


def test_kernels_on_the_host_engine_are_in_the_smoke_set(host_engine):
    made = {call.sample.op for call in smoke.calls("cpu") if call.backend == "cuda"}
    assert made == {"add_layer_norm", "linear_gelu", "paged_attention", "paged_write", "sample"}
    sample = next(call.sample for call in smoke.calls("cpu") if call.sample.op == "paged_write")
    before = [tensor.clone() for tensor in sample.args[2:4]]
    for call in smoke.calls("cpu", [sample]):
        assert gate.differing(call.run(), before)
    assert not gate.differing(sample.args[2:4], before)  # written to copies


def test_an_op_that_no_kernel_takes_is_named(monkeypatch):
    monkeypatch.setattr(smoke, "refusal_of", lambda sample, backend: f"{backend} is away")
    with pytest.raises(RuntimeError, match=r"no kernel takes attention: .*torch is away"):
        list(smoke.calls("cpu"))


def test_bits_are_compared_not_values():
    zero, nan = torch.tensor([0.0]), torch.tensor([float("nan")])
    assert not gate.differing([nan, zero], [nan.clone(), zero.clone()])
    assert gate.differing([zero], [-zero])
    assert gate.differing([zero, nan], [zero, zero])
    assert not gate.differing([torch.empty(0, 3)], [torch.empty(0, 3)])


def test_calls_repeat_on_the_host_engine(host_engine):
    assert gate.repeats("cpu", 2) == []


def test_a_call_that_is_not_repeatable_is_named(monkeypatch):
    """One bit of one output, in the third call after the first."""
    honest, count = smoke.Call.run, [0]

    def flipping(call):
        outputs = honest(call)
        if str(call) == "paged_write 0, torch":
            count[0] += 1
            if count[0] == 4:
                outputs[1].view(torch.int32)[5, 1, 15, 63] ^= 1
        return outputs

    monkeypatch.setattr(smoke.Call, "run", flipping)
    assert gate.repeats("cpu", 5) == ["paged_write 0, torch: 1 of 5 repeats differ from the first"]


def test_calls_made_again_follow_their_inputs(host_engine):
    assert gate.replays("cpu") == []


@pytest.mark.parametrize("stale", ["indices", "inputs"])
def test_a_replay_that_does_not_follow_is_named(monkeypatch, stale):
    """One that keeps its lengths, pages, slots or bounds, and one that keeps its first input."""
    honest = gate.capture

    def capture(call, device):
        kept = call.sample.mapped(torch.clone)
        tensors = [*kept.args, *kept.kwargs.values()]
        present = [*call.sample.args, *call.sample.kwargs.values()]
        if stale == "indices":
            pairs = [(now, then) for now, then in zip(present, tensors, strict=True)
                     if isinstance(now, torch.Tensor) and now.is_floating_point()]  # fmt: skip
        else:
            pairs = [(now, then) for now, then in zip(present[1:], tensors[1:], strict=True)
                     if isinstance(now, torch.Tensor)]  # fmt: skip
        outputs, again = honest(smoke.Call(kept, call.number, call.backend), device)

        def replay():
            for now, then in pairs:
                then.copy_(now)
            again()

        return outputs, replay

    monkeypatch.setattr(gate, "capture", capture)
    failures = gate.replays("cpu")
    names = {failure.partition(":")[0] for failure in failures}
    assert names == {"paged_attention 0, torch", "paged_write 0, torch", "attention 0, torch"}
    # Nothing is written where every slot is negative, so there the first input may be stale.
    assert len(failures) == (9 if stale == "indices" else 8)


def test_the_gate_ends_with_its_verdict(capsys, monkeypatch):
    assert gate.main(["replays", "--device", "cpu"]) == 0
    assert "for want of graphs" in capsys.readouterr().out
    monkeypatch.setattr(gate, "repeats", lambda device, count: [f"{count} on the {device}"])
    assert gate.main(["repeats", "--device", "cpu", "--repeats", "7"]) == 1
    assert capsys.readouterr().out == "7 on the cpu\n"


FINDINGS = {
    "memcheck": "========= ERROR SUMMARY: 0 errors",
    "racecheck": "========= RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)",
}


def _pretend_sanitizer(folder: Path, monkeypatch, report, last_line: str) -> None:
    """A compute-sanitizer that notes its arguments and says `last_line`; and a GPU's report."""
    tool = folder / "compute-sanitizer"
    tool.write_text(f'#!/bin/sh\necho "$@ $PYTORCH_NO_CUDA_MEMORY_CACHING"\necho "{last_line}"\n')
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")
    report.options.rehearse, report.device = False, "cuda"


@pytest.mark.parametrize("tool", FINDINGS)
def test_a_clean_sanitizer_passes(tool, tmp_path, monkeypatch, report):
    _pretend_sanitizer(tmp_path, monkeypatch, report, FINDINGS[tool])
    told = report.sanitize(tool)
    assert f"--tool {tool} --error-exitcode 9" in told
    assert "bertgpt.benchmarks.smoke --device cuda 1\n" in told


@pytest.mark.parametrize("tool", FINDINGS)
def test_a_sanitizers_findings_fail_the_stage(tool, tmp_path, monkeypatch, report):
    """Warnings of racecheck too, which leave the exit code at 0; and a tool that broke off."""
    _pretend_sanitizer(tmp_path, monkeypatch, report, FINDINGS[tool].replace(": 0", ": 2"))
    report.stage(tool, lambda: report.sanitize(tool))
    assert report.stages[-1].outcome == "failed"
    assert f"{tool} reports errors" in report.stages[-1].log
    _pretend_sanitizer(tmp_path, monkeypatch, report, "Killed")
    with pytest.raises(RuntimeError, match="gave no summary"):
        report.sanitize(tool)


def test_what_runs_too_long_is_ended_with_all_it_started(report, tmp_path):
    """A grandchild that holds the pipe open would otherwise be waited for, and done."""
    script = f"(sleep 20; touch {tmp_path}/done) & echo told; wait"
    with pytest.raises(RuntimeError, match=r"ended after 2 s; exit code -9\ntold"):
        report.command("sh", "-c", script, timeout=2)
    assert not (tmp_path / "done").exists()


def test_only_the_stages_asked_for_run(report, monkeypatch):
    report.options.stages = ["replays", "memcheck"]
    monkeypatch.setattr(report, "module", lambda *arguments, **options: "told")
    assert report.run() == []
    assert [s.name for s in report.stages] == ["memcheck", "replays", "plots", "size"]
    document = json.loads((report.folder / "report.json").read_text())
    assert [s["outcome"] for s in document["stages"]] == ["skipped", "passed", "skipped", "passed"]
    summary = (report.folder / "summary.txt").read_text()
    assert "memcheck: compute-sanitizer watches a GPU's kernels; a rehearsal has none" in summary
    report.options.stages = ["replay"]
    with pytest.raises(SystemExit, match="no stage replay: choose of build, tests"):
        report.run()


def test_samples_are_thinned_until_the_folder_fits_and_that_is_said(report, monkeypatch):
    samples = tuple(1 + i * 1e-6 for i in range(4000))
    report.rows = [
        Row("attention", "a", "cold", "mine", True, samples, "t", 1.0, 1.0, 1, 1.0, None, "", False)
    ]
    report.write()
    small = replace(report.rows[0], samples=samples[::4])
    monkeypatch.setattr(gpu_report, "SIZE_LIMIT", 16_000)
    report.size()
    assert report.rows == [small]
    document = json.loads((report.folder / "report.json").read_text())
    assert document["thinned"].startswith("one sample in 4, since the folder held ")
    monkeypatch.setattr(gpu_report, "SIZE_LIMIT", 100)
    with pytest.raises(RuntimeError, match="holds"):
        report.size()


def test_the_build_is_for_this_card():
    assert gpu_report.arch_of(9, 0) == "90a"
    assert gpu_report.arch_of(8, 6) == "86"
    assert gpu_report.arch_of(12, 0) == "120"


def test_files_with_a_gpus_tests_are_found():
    assert {"tests/test_gpu.py", "tests/test_cuda_gpu.py"} <= set(gpu_report.gpu_test_files())
    assert "tests/test_packing.py" not in gpu_report.gpu_test_files()


class PretendStream:
    """Empty at first and whenever three questions have been asked."""

    def __init__(self):
        self.asked = 0

    def query(self):
        self.asked += 1
        return self.asked % 3 == 1


def test_the_load_is_topped_up_when_it_has_run_dry(monkeypatch):
    """The lines that only a GPU runs, with one pretended."""
    entered, randn = [], torch.randn
    monkeypatch.setattr(gate.Load, "SIZE", 8)
    monkeypatch.setattr(torch, "randn", lambda *shape, device: randn(*shape))
    monkeypatch.setattr(torch.cuda, "Stream", PretendStream)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(
        torch.cuda, "stream", lambda stream: entered.append(stream) or nullcontext()
    )
    load = gate.Load("cuda")
    for _ in range(7):
        load.top_up()
    assert entered == [load.stream] * 3
    assert load.products == 3 * gate.Load.AT_ONCE


def test_a_call_is_captured_after_it_has_run_once(monkeypatch):
    events = []

    class PretendGraph:
        def replay(self):
            events.append("replay")

    @contextmanager
    def capturing(graph):
        assert isinstance(graph, PretendGraph)
        events.append("begin")
        yield
        events.append("end")

    monkeypatch.setattr(torch.cuda, "CUDAGraph", PretendGraph)
    monkeypatch.setattr(torch.cuda, "graph", capturing)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: events.append("wait"))
    monkeypatch.setattr(smoke.Call, "run", lambda call: events.append("run") or ("outputs",))
    call = smoke.Call(next(smoke.calls("cpu")).sample, 0, "torch")
    outputs, replay = gate.capture(call, "cuda")
    replay()
    assert outputs == ("outputs",)
    assert events == ["run", "wait", "begin", "run", "end", "replay"]
