"""Builds the C++ kernels for the host engine, and lends them to backend "cuda" on CPU tensors."""

import importlib.util
import os
import shutil
import subprocess
import sys
from contextvars import ContextVar
from functools import cache
from pathlib import Path
from types import ModuleType

import pytest

from bertgpt.cuda import extension

ROOT = Path(__file__).resolve().parent.parent
BUILD = ROOT / "build" / "host"
_LIBRARIES = {"address": "libasan.so", "thread": "libtsan.so"}


@cache
def builder() -> ModuleType:
    """`csrc/build.py`."""
    spec = importlib.util.spec_from_file_location("csrc_build", ROOT / "csrc" / "build.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["csrc_build"] = module  # dataclasses look themselves up there
    spec.loader.exec_module(module)
    return module


def skip_unless_buildable() -> None:
    reason = builder().missing_for_host()
    if reason is not None:
        pytest.skip(f"the host engine cannot be built: {reason}")


@cache
def load(path: Path) -> ModuleType:
    # pybind11 keeps one module for each full name, and the last part names its entry point.
    name = f"{path.name.partition('.')[0]}._host"
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def plain(arch: int = 900) -> ModuleType:
    """The kernels as they are on an architecture; from BERTGPT_HOST_ENGINE where that names one."""
    if path := os.environ.get(extension.HOST_ENGINE):
        return load(Path(path))
    skip_unless_buildable()
    return load(builder().build_host(BUILD, arch=arch))


def changed(name: str, file: str, old: str, new: str, units: tuple[str, ...], folder: Path):
    """A `Change` of `csrc/`: in `file`, `old` (which is there once) becomes `new`."""
    copy = folder / name
    shutil.copytree(ROOT / "csrc", copy, ignore=shutil.ignore_patterns("__pycache__"))
    text = (copy / file).read_text()
    assert text.count(old) == 1, f"{file} holds {old!r} {text.count(old)} times"
    (copy / file).write_text(text.replace(old, new))
    return builder().Change(name, copy, units)


def under_sanitizer(name: str, *command: object) -> subprocess.CompletedProcess[str]:
    """A script run by this Python with a sanitizer, "address" or "thread", loaded."""
    found = subprocess.run(
        ["g++", f"-print-file-name={_LIBRARIES[name]}"], capture_output=True, text=True
    ).stdout.strip()
    if not Path(found).is_absolute():
        pytest.skip(f"g++ has no {_LIBRARIES[name]}")
    environment = {
        **os.environ,
        "LD_PRELOAD": found,
        "ASAN_OPTIONS": "detect_leaks=0:detect_stack_use_after_return=0",
        "TSAN_OPTIONS": "halt_on_error=1",
        "PYTHONMALLOC": "malloc",
    }
    # ThreadSanitizer wants its usual addresses free.
    fixed = ["setarch", os.uname().machine, "-R", sys.executable, *map(str, command)]
    return subprocess.run(fixed, capture_output=True, text=True, env=environment)


def lend(module: ModuleType, patch: pytest.MonkeyPatch) -> None:
    """Backend "cuda" runs on this module."""
    patch.setattr(extension, "_load", lambda: module)
    flags: extension.Flags = {}
    patch.setattr(extension, "_FLAGS", ContextVar("flags", default=flags))
