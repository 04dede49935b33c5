"""Where a result was measured: device, clocks, driver, versions, commit."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent
_PACKAGES = (
    "torch",
    "triton",
    "transformers",
    "numpy",
    "flashinfer-python",
    "flash-attn",
    "flash-attn-3",
    "liger-kernel",
    "cut-cross-entropy",
    "xformers",
    "nvidia-cudnn-frontend",
)
_GPU_FIELDS = (
    "name",
    "driver_version",
    "clocks.sm",
    "clocks.mem",
    "clocks.max.sm",
    "clocks.max.mem",
    "power.limit",
    "power.draw",
    "temperature.gpu",
    "pcie.link.gen.current",
)


def describe(device: str) -> dict[str, Any]:
    """Everything that a reader needs to judge a time, as plain JSON values."""
    return {
        "when": datetime.now(UTC).isoformat(timespec="seconds"),
        "kind": device,
        "device": _device_name(device),
        "gpu": gpu_state() if device == "cuda" else {},
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
        "python": sys.version.split()[0],
        "platform": platform.platform(),
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version() if device == "cuda" else None,
        "packages": {name: version for name in _PACKAGES if (version := _version(name))},
        **commit(),
    }


def one_line(device: str) -> str:
    """The device, versions, the commit, the time and how busy the machine is, as a sentence."""
    here = describe(device)
    changed = " with changes" if here["dirty"] else ""
    return (
        f"{here['device']}, Python {here['python']}, torch {here['packages']['torch']}, "
        f"commit {here['commit']}{changed}, {here['when']}, load {os.getloadavg()[0]:.0f} on "
        f"{here['cores']} cores."
    )


def commit() -> dict[str, Any]:
    """The checkout's commit, and whether tracked files differ from it; None outside git."""
    head = _output("git", "-C", str(ROOT), "rev-parse", "HEAD")
    changed = _output("git", "-C", str(ROOT), "status", "--porcelain", "--untracked-files=no")
    return {"commit": head or None, "dirty": None if head is None else bool(changed)}


def gpu_state() -> dict[str, str]:
    """Clocks, power and temperature now, as nvidia-smi gives them; empty without it."""
    query = f"--query-gpu={','.join(_GPU_FIELDS)}"
    line = _output("nvidia-smi", query, "--format=csv,noheader", "--id=0")
    values = [value.strip() for value in (line or "").split(",")]
    return dict(zip(_GPU_FIELDS, values, strict=True)) if len(values) == len(_GPU_FIELDS) else {}


def _device_name(device: str) -> str:
    if device == "cuda":
        return torch.cuda.get_device_name()
    for line in _lines(Path("/proc/cpuinfo")):
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _lines(path: Path) -> list[str]:
    return path.read_text().splitlines() if path.exists() else []


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _output(*command: str) -> str | None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None
