"""The build of csrc/: its options, what it says where it cannot, and the table of resources."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from host_engine import ROOT, builder

ARCHS = {"sm_75", "sm_80", "sm_90a", "sm_100"}
TABLE = ROOT / "csrc" / "resources.txt"


def rows():
    """(arch, registers, shared bytes, spilled bytes, blocks, kernel) of each line."""
    for line in TABLE.read_text().splitlines()[2:]:
        arch, registers, shared, spilled, _, blocks, _, kernel = line.split(maxsplit=7)
        yield arch, int(registers), int(shared), int(spilled), int(blocks), kernel


def test_every_instantiation_is_in_the_table_on_every_architecture_and_spills_nothing():
    kernels = {}
    for arch, registers, shared, spilled, blocks, kernel in rows():
        kernels.setdefault(kernel, set()).add(arch)
        assert spilled == 0, f"{kernel} on {arch}"
        assert registers <= 255
        assert blocks >= 1, f"{kernel} on {arch}"
        assert shared <= 48 << 10, f"{kernel} on {arch}: more needs an attribute at launch"
    assert set(map(frozenset, kernels.values())) == {frozenset(ARCHS)}
    counts = {}
    for kernel in kernels:
        family = kernel.partition("<")[0]
        counts[family] = counts.get(family, 0) + 1
    page = (ROOT / "docs" / "cuda.md").read_text()
    documented = dict(re.findall(r"^\| `(\w+::\w+)` \| (\d+) \|", page, flags=re.M))
    assert counts == {name: int(count) for name, count in documented.items()}


def test_the_decode_kernel_keeps_the_residency_that_its_launcher_counts_on():
    """As many blocks stay as docs/cuda.md adds up; sm_75 may hold fewer."""
    found = 0
    for arch, _, _, _, blocks, kernel in rows():
        heads = re.search(r"paged_decode_kernel<.*, (\d)>", kernel)
        if heads is not None and arch != "sm_75":
            assert blocks >= (2 if heads.group(1) == "8" else 4), f"{kernel} on {arch}"
            found += 1
    assert found


def test_a_line_of_the_table_says_how_many_blocks_fit():
    line = builder()._resource_line("k<float, 4>", "sm_90a", 128, 33424, 0, 128)
    assert line.split(maxsplit=7) == [
        "sm_90a", "128", "33424", "0", "128", "4", "16/64", "k<float, 4>"
    ]  # fmt: skip


def test_architectures_are_read_from_the_environment(monkeypatch):
    monkeypatch.delenv("BERTGPT_CUDA_ARCHS", raising=False)
    assert len(builder()._gencode()) == 4
    monkeypatch.setenv("BERTGPT_CUDA_ARCHS", "80;90a")
    assert builder()._gencode() == [
        "-gencode=arch=compute_80,code=sm_80",
        "-gencode=arch=compute_90a,code=[sm_90a,compute_90a]",
    ]
    monkeypatch.setenv("BERTGPT_CUDA_ARCHS", "hopper")
    with pytest.raises(builder().CannotBuild, match="'hopper'; it should be like"):
        builder()._gencode()


def test_what_is_missing_is_named(monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name, **kwargs: None)
    assert "nvcc is not on PATH" in builder().missing()
    assert "g++ is not on PATH" in builder().missing_for_host()


def run_setup(mode, path):
    environment = {**os.environ, "BERTGPT_BUILD_CUDA": mode, "PATH": path}
    return subprocess.run(
        [sys.executable, "setup.py", "--name"], cwd=ROOT, env=environment, capture_output=True,
        text=True,
    )  # fmt: skip


@pytest.mark.parametrize("mode", ["auto", "0"])
def test_the_install_goes_on_without_nvcc(mode, tmp_path):
    done = run_setup(mode, str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "bertgpt"


def test_only_1_fails_without_nvcc(tmp_path):
    done = run_setup("1", str(tmp_path))
    assert done.returncode != 0
    assert "bertgpt._C cannot be built: nvcc is not on PATH" in done.stderr
    assert "must be auto, 1 or 0" in run_setup("yes", str(tmp_path)).stderr


@pytest.mark.slow
def test_the_extension_imports_without_a_driver_and_its_calls_name_the_driver(
    tmp_path, monkeypatch
):
    if (reason := builder().missing()) is not None:
        pytest.skip(reason)
    monkeypatch.setenv("BERTGPT_CUDA_ARCHS", "90a")
    built = builder().build_cuda(tmp_path / "_C.so", tmp_path / "objects")
    script = (
        "import importlib.util as u, sys\n"
        f"s = u.spec_from_file_location('_C', {str(built)!r})\n"
        "m = u.module_from_spec(s); s.loader.exec_module(m)\n"
        "try:\n    m.add_layer_norm(*[0] * 8, 1, 0, 0, 0, 1.0, 0.0, 64, False, 0, 0)\n"
        "except RuntimeError as error:\n    print(error)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "no usable NVIDIA driver or device" in done.stdout
    needed = subprocess.run(["ldd", str(built)], capture_output=True, text=True).stdout
    assert "cudart" not in needed
    assert "torch" not in needed


@pytest.mark.slow
def test_the_primitives_become_the_instructions_they_stand_for(tmp_path):
    if (reason := builder().missing()) is not None:
        pytest.skip(reason)
    source = ROOT / "tests" / "engine_kernels.cu"
    command = ["nvcc", "-std=c++17", "-arch=sm_90a", f"-I{ROOT / 'csrc'}", "-ptx"]
    subprocess.run([*command, str(source), "-o", str(tmp_path / "ptx")], check=True)
    ptx = (tmp_path / "ptx").read_text()
    for instruction in (
        "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes",
        "mbarrier.init", "mbarrier.arrive.expect_tx.release", "mbarrier.arrive.release",
        "mbarrier.try_wait.parity.acquire", "fence.proxy.async.shared::cta", "bar.sync",
        "ld.acquire.gpu.global.s32", "st.release.gpu.global.s32", ".extern .shared",
    ):  # fmt: skip
        assert instruction in ptx, instruction


@pytest.mark.slow
def test_the_table_is_what_the_compiler_says(tmp_path):
    if (reason := builder().missing()) is not None:
        pytest.skip(reason)
    done = subprocess.run(
        [sys.executable, str(ROOT / "csrc" / "build.py"), "--check-resources"],
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert Path(ROOT / "bertgpt").glob("_C*.so")
