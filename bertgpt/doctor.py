"""What this machine can run, why not more, and what that costs."""

from __future__ import annotations

import importlib.util
import platform
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from bertgpt import ops
from bertgpt.cuda import extension
from bertgpt.ops import Explanation
from bertgpt.ops._dispatch import BACKENDS

_COMPILERS = ("cc", "gcc", "clang")


@dataclass(frozen=True)
class Finding:
    """One part of the machine.

    Attributes:
        part: Such as "Python" or "GPU".
        state: What is there, or that it is missing.
        cost: What its absence costs and how to mend it; empty where nothing is missing.
    """

    part: str
    state: str
    cost: str = ""


def inspect_machine() -> list[Finding]:
    """Looks at everything that decides which backends run; changes nothing."""
    return [
        Finding("Python", f"{platform.python_version()} on {platform.system()}"),
        _torch(),
        _triton(),
        _gpu(),
        _nvcc(),
        _extension(),
        _compiler(),
        _package("transformers", "`bertgpt demo` has nothing to compare with"),
        _package("tokenizers", "`bertgpt embed` and `generate --prompt` cannot read text"),
    ]


def explain_ops(device: str) -> list[Explanation]:
    """Asks every op which backend a plain half-precision call would take on `device`."""
    return [ops.explain(name, **sample(device)) for name, sample in _SAMPLES.items()]


def report(console: Console) -> None:
    """Prints the machine, then the backends of each op with every refusal."""
    table = Table("part", "found", "what that costs", title="This machine")
    for finding in inspect_machine():
        style = "yellow" if finding.cost else "green"
        table.add_row(finding.part, f"[{style}]{finding.state}[/]", finding.cost)
    console.print(table)

    device = "cuda" if torch.cuda.is_available() else "cpu"
    answers = explain_ops(device)
    table = Table("op", "runs on", "can be asked for", title=f"Ops in half precision on {device}")
    for answer in answers:
        others = [b for b in BACKENDS if b not in answer.refusals]
        table.add_row(answer.op, f"[green]{answer.backend}[/]", ", ".join(others))
    console.print(table)

    reasons: dict[tuple[str, str], list[str]] = {}
    for answer in answers:
        for backend, reason in answer.refusals.items():
            reasons.setdefault((backend, reason.replace(answer.op, "the op")), []).append(answer.op)
    table = Table("backend", "refuses because", "ops", title="Refusals")
    for (backend, reason), names in reasons.items():
        every = len(names) == len(answers)
        table.add_row(backend, reason, "all" if every else ", ".join(names))
    console.print(table)


def _torch() -> Finding:
    build = torch.version.cuda
    state = f"{torch.__version__}, " + (f"CUDA {build}" if build else "built without CUDA")
    if build is None and shutil.which("nvidia-smi"):
        cost = "there is an NVIDIA driver, but this torch cannot use it: install a CUDA build"
        return Finding("torch", state, cost)
    return Finding("torch", state)


def _triton() -> Finding:
    if importlib.util.find_spec("triton") is None:
        cost = "no Triton kernel runs and every op falls to torch: pip install triton (Linux)"
        return Finding("triton", "missing", cost)
    return Finding("triton", metadata.version("triton"))


def _gpu() -> Finding:
    if not torch.cuda.is_available():
        return Finding("GPU", "none that torch can use", "ops run on the torch backend, on the CPU")
    properties = torch.cuda.get_device_properties(0)
    state = (
        f"{properties.name}, compute capability {properties.major}.{properties.minor}, "
        f"{properties.total_memory / 2**30:.0f} GiB"
    )
    if properties.major < 8:
        return Finding("GPU", state, "Triton kernels need 8.0; ops run on the torch backend")
    return Finding("GPU", state)


def _nvcc() -> Finding:
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        return Finding("nvcc", "missing; only building the CUDA C++ kernels needs it")
    done = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=False)
    release = next((line for line in done.stdout.splitlines() if "release" in line), nvcc)
    return Finding("nvcc", release.partition("release ")[2] or release)


def _extension() -> Finding:
    if (reason := extension.unavailable()) is None:
        return Finding("CUDA C++ kernels", "built")
    cost = "paged decoding, paged writes and add-norm run on Triton"
    return Finding("CUDA C++ kernels", reason, cost if torch.cuda.is_available() else "")


def _compiler() -> Finding:
    found = next((path for name in _COMPILERS if (path := shutil.which(name))), None)
    if found is None:
        cost = "Triton cannot build its launchers and torch.compile its CPU code: install gcc"
        return Finding("C compiler", "missing", cost)
    return Finding("C compiler", found)


def _package(name: str, cost: str) -> Finding:
    if importlib.util.find_spec(name) is None:
        return Finding(name, "missing", f"{cost}: pip install {name}")
    return Finding(name, metadata.version(name))


def _attention(device: str) -> dict[str, Any]:
    q = torch.zeros(1, 128, 2, 64, dtype=torch.float16, device=device)
    return {"q": q, "k": q, "v": q}


def _linear_gelu(device: str) -> dict[str, Any]:
    x = torch.zeros(128, 64, dtype=torch.float16, device=device)
    return {"x": x, "w": x, "b": x.new_zeros(128)}


def _gelu_ffn(device: str) -> dict[str, Any]:
    x = torch.zeros(128, 64, dtype=torch.float16, device=device)
    biases = {"b_in": x.new_zeros(128), "b_out": x.new_zeros(64)}
    return {"x": x, "w_in": x, "w_out": x.t().contiguous(), **biases}


def _linear_cross_entropy(device: str) -> dict[str, Any]:
    hidden = torch.zeros(128, 64, dtype=torch.float16, device=device)
    labels = torch.zeros(128, dtype=torch.int64, device=device)
    return {"hidden": hidden, "weight": hidden, "bias": None, "labels": labels}


def _add_layer_norm(device: str) -> dict[str, Any]:
    x = torch.zeros(128, 64, dtype=torch.float16, device=device)
    return {"x": x, "residual": x, "weight": x.new_ones(64), "bias": x.new_zeros(64)}


def _paged_write(device: str) -> dict[str, Any]:
    k = torch.zeros(1, 2, 64, dtype=torch.float16, device=device)
    pages = k.new_zeros(1, 2, 16, 64)
    slots = torch.zeros(1, dtype=torch.int64, device=device)
    return {"k": k, "v": k, "k_pages": pages, "v_pages": pages.clone(), "slots": slots}


def _paged_attention(device: str) -> dict[str, Any]:
    q = torch.zeros(1, 2, 64, dtype=torch.float16, device=device)
    pages = q.new_zeros(1, 2, 16, 64)
    table = torch.zeros(1, 1, dtype=torch.int32, device=device)
    lengths = torch.ones(1, dtype=torch.int32, device=device)
    return {"q": q, "k_pages": pages, "v_pages": pages, "page_table": table, "lengths": lengths}


def _sample(device: str) -> dict[str, Any]:
    logits = torch.zeros(1, 128, dtype=torch.float16, device=device)
    return {"logits": logits, "seed": 0, "sequence_ids": 0, "steps": 0}


# The smallest ordinary call of each op; `explain` runs none of them.
_SAMPLES: dict[str, Callable[[str], dict[str, Any]]] = {
    "attention": _attention,
    "linear_gelu": _linear_gelu,
    "gelu_ffn": _gelu_ffn,
    "linear_cross_entropy": _linear_cross_entropy,
    "add_layer_norm": _add_layer_norm,
    "paged_write": _paged_write,
    "paged_attention": _paged_attention,
    "sample": _sample,
}
