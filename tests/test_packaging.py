"""Wheel, editable installs and bare checkout: in each the kernels import, and shadow nobody's."""

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SHIPPED = (
    "bertgpt",
    "benchmarks",
    "kernels",
    "pyproject.toml",
    "setup.py",
    "README.md",
    "LICENSE",
)

PROBE = """
import importlib.util, json, sys
import bertgpt
heavy = sorted({"torch", "triton", "transformers"} & set(sys.modules))
import bertgpt.kernels.device
print(json.dumps({
    "package": bertgpt.__file__,
    "kernels": bertgpt.kernels.device.__file__,
    "top_level_kernels": list(importlib.util.find_spec("kernels").submodule_search_locations),
    "heavy": heavy,
}))
"""


@dataclass(frozen=True)
class Environment:
    """A virtual environment of its own that borrows every dependency of this one."""

    python: Path

    def run(self, *arguments: str, cwd: Path, path: Path | None = None) -> str:
        """Runs Python outside this process and returns its output; PYTHONPATH is `path` alone."""
        env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
        if path is not None:
            env["PYTHONPATH"] = str(path)
        done = subprocess.run(
            [self.python, *arguments], cwd=cwd, env=env, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr[-4000:]
        return done.stdout

    def install(self, *arguments: str, cwd: Path) -> None:
        """Pip, without an index: every dependency is here already."""
        flags = ("--no-index", "--no-deps", "--no-build-isolation", "--ignore-installed", "-q")
        self.run("-m", "pip", "install", *flags, *arguments, cwd=cwd)

    def probe(self, cwd: Path, path: Path | None = None) -> dict:
        return json.loads(self.run("-c", PROBE, cwd=cwd, path=path).splitlines()[-1])


@pytest.fixture
def environment(tmp_path: Path) -> Environment:
    home = tmp_path / "venv"
    venv.create(home, with_pip=False, symlinks=True)
    site = next(home.glob("lib/python3*/site-packages"))
    # A plain path line: .pth files inside the borrowed folder, an editable bertgpt among them, stay
    # unread.
    (site / "borrowed.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return Environment(home / "bin" / "python")


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """The files a clone holds, in a place where builds may write."""
    copy = tmp_path / "clone"
    copy.mkdir()
    for name in SHIPPED:
        if (ROOT / name).is_dir():
            ignored = shutil.ignore_patterns("__pycache__", "*.egg-info")
            shutil.copytree(ROOT / name, copy / name, ignore=ignored)
        else:
            shutil.copy(ROOT / name, copy / name)
    return copy


def _is_ours_and_light(found: dict, package: Path, kernels: Path) -> None:
    assert Path(found["package"]).parent == package
    assert Path(found["kernels"]).parent.resolve() == kernels.resolve()
    assert found["heavy"] == []
    (top_level,) = found["top_level_kernels"]
    assert Path(top_level).parent == Path(sysconfig.get_path("purelib"))


def test_wheel(environment: Environment, checkout: Path, tmp_path: Path) -> None:
    flags = ("--no-index", "--no-deps", "--no-build-isolation", "-q", "-w", str(tmp_path))
    environment.run("-m", "pip", "wheel", *flags, str(checkout), cwd=tmp_path)
    (wheel,) = tmp_path.glob("*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    mapped = {
        f"bertgpt/{folder}/{f.name}"
        for folder in ("benchmarks", "kernels")
        for f in (ROOT / folder).glob("*.py")
    }
    modules = {str(f.relative_to(ROOT)) for f in (ROOT / "bertgpt").rglob("*.py")}
    assert mapped
    assert {name for name in names if name.endswith(".py")} == mapped | modules
    assert {name.split("/")[0] for name in names} == {"bertgpt", "bertgpt-0.1.0.dist-info"}
    assert any(name.endswith("licenses/LICENSE") for name in names)

    environment.install(str(wheel), cwd=tmp_path)
    site = next((tmp_path / "venv").glob("lib/python3*/site-packages"))
    _is_ours_and_light(environment.probe(tmp_path), site / "bertgpt", site / "bertgpt" / "kernels")
    assert (environment.python.parent / "bertgpt").exists()


def test_editable_lenient(environment: Environment, checkout: Path, tmp_path: Path) -> None:
    environment.install("-e", str(checkout), cwd=tmp_path)
    _is_ours_and_light(environment.probe(tmp_path), checkout / "bertgpt", checkout / "kernels")


def test_editable_strict(environment: Environment, checkout: Path, tmp_path: Path) -> None:
    strict = ("--config-settings", "editable_mode=strict")
    environment.install(*strict, "-e", str(checkout), cwd=tmp_path)
    found = environment.probe(tmp_path)
    package = Path(found["package"]).parent
    assert package.is_relative_to(checkout / "build")  # a tree of links, not the sources
    _is_ours_and_light(found, package, package / "kernels")
    assert (package / "kernels" / "device.py").samefile(checkout / "kernels" / "device.py")


@pytest.mark.parametrize("elsewhere", [True, False], ids=["path", "root"])
def test_checkout(
    environment: Environment, checkout: Path, tmp_path: Path, elsewhere: bool
) -> None:
    cwd, path = (tmp_path, checkout) if elsewhere else (checkout, None)
    found = environment.probe(cwd, path)
    _is_ours_and_light(found, checkout / "bertgpt", checkout / "kernels")


def test_transformers_imports_from_the_root(environment: Environment, checkout: Path) -> None:
    """`python -c` puts the root first on sys.path; Hugging Face's kernels must still be found."""
    code = "import kernels; from transformers import BertModel; print(kernels.__file__)"
    found = Path(environment.run("-c", code, cwd=checkout).splitlines()[-1])
    assert found.parent.parent == Path(sysconfig.get_path("purelib"))


def test_needs_neither_triton_nor_transformers(environment: Environment, checkout: Path) -> None:
    code = """
import sys
sys.modules.update(triton=None, transformers=None)
import torch, bertgpt.ops
x = torch.ones(1, 2, 1, 4)
assert bertgpt.ops.attention(x, x, x).shape == x.shape
assert "triton is not installed" in str(bertgpt.ops.explain("attention", x, x, x))
"""
    environment.run("-c", code, cwd=checkout)


def test_kernels_is_no_package_of_its_own() -> None:
    assert not (ROOT / "kernels" / "__init__.py").exists()
    assert not (ROOT / "bertgpt" / "kernels").exists()


def test_interpreter_is_a_supported_one() -> None:
    assert (3, 11) <= sys.version_info[:2] <= (3, 13)
