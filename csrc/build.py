"""Builds csrc/ with ninja: `bertgpt._C` by nvcc, or the same kernels for the host engine by g++.

`setup.py` calls `build_cuda`; the tests call `build_host`. Run as a script it builds and checks:

    python csrc/build.py                    builds bertgpt/_C*.so in place
    python csrc/build.py --resources        builds, then writes csrc/resources.txt
    python csrc/build.py --check-resources  builds, then fails where resources.txt is out of date

Environment: BERTGPT_CUDA_ARCHS, such as "80;90a" (default: 75;80;90a;100, and PTX of the last).
"""

from __future__ import annotations

import argparse
import fcntl
import importlib.util
import os
import re
import runpy
import shutil
import subprocess
import sys
import sysconfig
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

CSRC = Path(__file__).resolve().parent
ROOT = CSRC.parent
DEFAULT_ARCHS = ("75", "80", "90a", "100")
HOST_ARCHS = (900, 800)  # what GPU_ARCH may be on the host: with bulk copies, and without
_SAME_TEMPLATES = ("paged_decode_float32.cu", "paged_decode_bfloat16.cu")
RESOURCES = CSRC / "resources.txt"

_COMMON = ["-std=c++17", "-fno-strict-aliasing", "-fPIC", "-fvisibility=hidden"]
_SANITIZERS = {
    "plain": ["-O1"],
    "address": ["-O1", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"],
    "thread": ["-O1", "-g", "-fsanitize=thread"],
}


class CannotBuild(RuntimeError):
    """What is missing, and how to get it."""


def missing() -> str | None:
    """Why the CUDA part cannot be built here, or None."""
    if shutil.which("nvcc") is None:
        return "nvcc is not on PATH (install the CUDA toolkit, 12.8 or newer)"
    return missing_for_host(toolkit=False)


def missing_for_host(*, toolkit: bool = True) -> str | None:
    """Why the host engine's build cannot be made here, or None."""
    if shutil.which("g++") is None:
        return "g++ is not on PATH"
    if _ninja() is None:
        return "ninja is missing (pip install ninja)"
    if importlib.util.find_spec("pybind11") is None:
        return "pybind11 is missing (pip install pybind11)"
    if toolkit and _toolkit_headers() is None:
        return "no cuda_bf16.h (install the CUDA toolkit, or pip install nvidia-cuda-runtime)"
    return None


def build_cuda(output: Path, build: Path) -> Path:
    """Builds the extension for the architectures asked for.

    Args:
        output: The shared object to make.
        build: Folder of objects, kept for the next time.

    Returns:
        `output`.

    Raises:
        CannotBuild: nvcc, g++, ninja or pybind11 is missing, or an architecture's name is wrong.
        subprocess.CalledProcessError: A compiler failed; it has said why.
    """
    reason = missing()
    if reason is not None:
        raise CannotBuild(reason)
    nvcc = [
        "nvcc", "-std=c++17", "-O3", "--expt-relaxed-constexpr", "-Xptxas", "-v", *_gencode(),
        f"-I{CSRC}", "-Xcompiler", "-fPIC,-fvisibility=hidden,-fno-strict-aliasing",
        "-cudart", "static", "-compress-mode=size",
    ]  # fmt: skip
    compile_cuda = "{ " + _join(nvcc) + " -MD -MF $out.d -c $in -o $out; } > $out.log 2>&1"
    rules = {
        # The compiler's account of registers is kept; what it says is shown where it fails.
        "cuda": f"{compile_cuda} || {{ cat $out.log; rm -f $out; exit 1; }}",
        "cxx": _bindings_command(["-O2", "-DBERTGPT_MODULE=_C"]),
        "link": _join(["nvcc", "-shared", "-cudart", "static"]) + " $in -o $out",
    }
    sources = {"bindings.o": ("cxx", CSRC / "bindings.cpp")}
    sources |= {f"{Path(name).stem}.o": ("cuda", CSRC / name) for name in _kernel_files()}
    _ninja_run(build, "build.ninja", rules, sources, output)
    return output


@dataclass(frozen=True)
class Change:
    """Kernels compiled from an altered copy of csrc/, to show that tests find the alteration.

    Attributes:
        name: A word for the files that come of it.
        csrc: The altered copy.
        units: The .cu files that are affected.
    """

    name: str
    csrc: Path
    units: tuple[str, ...]


def build_host(
    build: Path, sanitizer: str = "plain", change: Change | None = None, arch: int = HOST_ARCHS[0]
) -> Path:
    """Builds the kernels for the host engine; for tests.

    Args:
        build: Folder of objects, kept for the next time and shared by all variants.
        sanitizer: "plain", "address" (with undefined behaviour) or "thread". For one element type
            of paged_decode alone: the others are the same templates, and take long to compile.
        change: What to build differently.
        arch: One of HOST_ARCHS, as __CUDA_ARCH__ has it: which code of paged_decode is compiled.

    Returns:
        The extension module `_host`, to be loaded by path.

    Raises:
        CannotBuild: g++, ninja, pybind11 or CUDA's headers are missing.
        subprocess.CalledProcessError: The compiler failed; it has said why.
    """
    reason = missing_for_host()
    if reason is not None:
        raise CannotBuild(reason)
    changed, units = (change.csrc, change.units) if change else (CSRC, ())
    rules = {"bindings": _bindings_command(["-O2", "-DBERTGPT_MODULE=_host", "-DGPU_HOST"])}
    for kind, flags in _SANITIZERS.items():
        rules |= {f"kernel_{kind}_{a}": _host_kernel(CSRC, flags, a) for a in HOST_ARCHS}
    rules["engine"] = _host_engine(sanitizer)
    rules["changed"] = _host_kernel(changed, _SANITIZERS[sanitizer], arch)
    rules["link"] = _host_link(sanitizer)
    sources = {"bindings.o": ("bindings", CSRC / "bindings.cpp")} | _engine_sources(sanitizer)
    for name in _kernel_files():
        stem = Path(name).stem
        kind = "plain" if name in _SAME_TEMPLATES else sanitizer
        code = arch if name.startswith("paged_decode_") else HOST_ARCHS[0]
        if name in units:
            sources[f"{stem}.{sanitizer}.{change.name}.o"] = ("changed", changed / name)
        else:
            sources[f"{stem}.{kind}.{code}.o"] = (f"kernel_{kind}_{code}", CSRC / name)
    variant = f"{sanitizer}-{arch}-{change.name}" if change else f"{sanitizer}-{arch}"
    output = build / f"_host-{variant}{sysconfig.get_config_var('EXT_SUFFIX')}"
    _ninja_run(build, f"{variant}.ninja", rules, sources, output)
    return output


def build_host_library(build: Path, source: Path, sanitizer: str = "plain") -> Path:
    """Builds one file of kernels, without Python, for the host engine; for the engine's own tests.

    Args:
        build: Folder of objects, kept for the next time.
        source: The file.
        sanitizer: As for `build_host`.

    Returns:
        A shared library.
    """
    rules = {
        "engine": _host_engine(sanitizer),
        "kernels": _host_kernel(CSRC, _SANITIZERS[sanitizer], HOST_ARCHS[0]),
        "link": _host_link(sanitizer),
    }
    name = f"{source.stem}-{sanitizer}"
    sources = {f"{name}.o": ("kernels", source)} | _engine_sources(sanitizer)
    output = build / f"{name}.so"
    _ninja_run(build, f"{name}.ninja", rules, sources, output)
    return output


def _host_kernel(csrc: Path, flags: list[str], arch: int) -> str:
    includes = f"-I{csrc} -isystem {_toolkit_headers()} -DGPU_HOST -DGPU_ARCH={arch}"
    warn = "-Wall -Wextra -Werror -Wno-unknown-pragmas"
    command = f"g++ {_join(_COMMON)} {includes} {warn} {_join(flags)}"
    return f"{command} -MD -MF $out.d -x c++ -c $in -o $out"


def _host_engine(sanitizer: str) -> str:
    # Races are looked for in kernels: the engine's own accesses would only hide them.
    flags = ["-O2", "-DGPU_HOST_TSAN"] if sanitizer == "thread" else _SANITIZERS[sanitizer]
    return _host_kernel(CSRC, flags, HOST_ARCHS[0])


def _engine_sources(sanitizer: str) -> dict[str, tuple[str, Path]]:
    files = sorted((CSRC / "host").glob("*.cpp"))
    return {f"{path.stem}.{sanitizer}.o": ("engine", path) for path in files}


def _host_link(sanitizer: str) -> str:
    return f"g++ -shared {_join(_SANITIZERS[sanitizer])} $in -o $out"


def resources(build: Path) -> str:
    """What every instantiation takes on every architecture, from the build's logs and objects.

    Returns:
        A line each: architecture, registers a thread, bytes of static shared memory a block, bytes
        spilled, threads a block, blocks and warps that a multiprocessor can hold, the kernel.

    Raises:
        CannotBuild: cuobjdump is missing.
    """
    entry = re.compile(r"Compiling entry function '(\w+)' for '(\w+)'")
    spills = re.compile(r"(\d+) bytes spill stores, (\d+) bytes spill loads")
    used = re.compile(r"Used (\d+) registers")
    shared = re.compile(r"(\d+) bytes smem")
    threads = _threads(build)
    rows = set()
    for log in sorted(build.glob("*.o.log")):
        name = arch = ""
        spilled = 0
        for line in log.read_text().splitlines():
            if found := entry.search(line):
                name, arch = found.groups()
            elif found := spills.search(line):
                spilled = sum(map(int, found.groups()))
            elif found := used.search(line):
                memory = shared.search(line)
                size = int(memory.group(1)) if memory else 0
                usage = (int(found.group(1)), size, spilled, threads[name])
                rows.add((_demangled(name), arch, *usage))
    done = subprocess.run(["nvcc", "--version"], capture_output=True, text=True, check=True)
    version = re.search(r"V([\d.]+)", done.stdout)
    compiler = f"By nvcc {version.group(1) if version else 'unknown'}; another may differ."
    header = "arch     registers  shared  spilled  threads  blocks  warps  kernel"
    return "\n".join([compiler, header, *(_resource_line(*row) for row in sorted(rows)), ""])


def _resource_line(
    kernel: str, arch: str, registers: int, shared: int, spilled: int, threads: int
) -> str:
    occupancy = _occupancy()
    capability, warps = int(re.sub(r"\D", "", arch)), threads // occupancy["WARP"]
    blocks = occupancy["resident_blocks"](
        capability, warps=warps, registers=registers, shared=shared
    )
    resident = f"{blocks * warps}/{occupancy['LIMITS'][capability].warps}"
    usage = f"{registers:9} {shared:7} {spilled:8} {threads:8} {blocks:7} {resident:>6}"
    return f"{arch:8} {usage}  {kernel}"


@cache
def _occupancy() -> dict[str, Any]:
    """The names of benchmarks/occupancy.py, which is read by path: nothing need be installed."""
    return runpy.run_path(str(ROOT / "benchmarks" / "occupancy.py"))


def _threads(build: Path) -> dict[str, int]:
    """Threads a block by entry function: the launch bounds, as the objects' PTX states them."""
    wheel = importlib.util.find_spec("triton")
    homes = wheel.submodule_search_locations if wheel else None
    bundled = str(Path(homes[0]) / "backends" / "nvidia" / "bin") if homes else ""
    cuobjdump = shutil.which("cuobjdump") or shutil.which("cuobjdump", path=bundled)
    if cuobjdump is None:
        raise CannotBuild("cuobjdump is neither in the CUDA toolkit nor in a Triton wheel")
    bounds = re.compile(r"\.entry (\w+)\([^{]*?\.maxntid (\d+)")
    threads: dict[str, int] = {}
    for name in _kernel_files():
        compiled = str(build / f"{Path(name).stem}.o")
        done = subprocess.run(
            [cuobjdump, "-ptx", compiled], capture_output=True, text=True, check=True
        )
        threads |= {found[1]: int(found[2]) for found in bounds.finditer(done.stdout)}
    return threads


def _demangled(name: str) -> str:
    done = subprocess.run(["c++filt", "-p", name], capture_output=True, text=True, check=True)
    return done.stdout.strip()


def _kernel_files() -> list[str]:
    return sorted(path.name for path in CSRC.glob("*.cu"))


def _gencode() -> list[str]:
    """The machine code of each architecture asked for, and PTX of the newest."""
    asked = os.environ.get("BERTGPT_CUDA_ARCHS") or ";".join(DEFAULT_ARCHS)
    archs = [arch.strip() for arch in asked.split(";") if arch.strip()]
    wrong = [arch for arch in archs if not re.fullmatch(r"\d{2,3}[af]?", arch)]
    if wrong or not archs:
        raise CannotBuild(f'BERTGPT_CUDA_ARCHS is {asked!r}; it should be like "80;90a"')
    flags = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in archs[:-1]]
    last = archs[-1]
    return [*flags, f"-gencode=arch=compute_{last},code=[sm_{last},compute_{last}]"]


def _bindings_command(flags: list[str]) -> str:
    import pybind11

    paths = [f"-I{CSRC}", f"-isystem {pybind11.get_include()}"]
    paths.append(f"-isystem {sysconfig.get_path('include')}")
    return f"g++ {_join(_COMMON)} {' '.join(paths)} {_join(flags)} -MD -MF $out.d -c $in -o $out"


def _toolkit_headers() -> Path | None:
    """The folder of cuda_bf16.h: the toolkit's, or that of the nvidia-cuda-runtime package."""
    candidates = []
    if nvcc := shutil.which("nvcc"):
        candidates.append(Path(nvcc).resolve().parent.parent / "include")
    if home := os.environ.get("CUDA_HOME"):
        candidates.append(Path(home) / "include")
    candidates += sorted(Path("/usr/local").glob("cuda*/include"))
    for site in map(Path, sys.path):
        candidates += sorted(site.glob("nvidia/cu*/include"))
    needed = ("cuda_bf16.h", "vector_types.h", "crt/host_defines.h")
    return next((c for c in candidates if all((c / n).exists() for n in needed)), None)


def _ninja() -> str | None:
    return shutil.which("ninja") or shutil.which("ninja", path=sysconfig.get_path("scripts"))


def _ninja_run(
    build: Path,
    name: str,
    rules: dict[str, str],
    sources: dict[str, tuple[str, Path]],
    output: Path,
) -> None:
    """Writes a ninja file and runs it; only what has changed is made again.

    `sources` gives each object its rule and source. Other processes may ask for the same: they
    wait.
    """
    build.mkdir(parents=True, exist_ok=True)
    lines = [
        f"rule {rule}\n  command = {command}"
        + ("" if rule == "link" else "\n  depfile = $out.d\n  deps = gcc")
        for rule, command in rules.items()
    ]
    lines += [f"build {obj}: {rule} {source}" for obj, (rule, source) in sources.items()]
    lines.append(f"build {output.resolve()}: link {' '.join(sources)}")
    with (build / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        (build / name).write_text("\n".join(lines) + "\n")
        ninja = [str(_ninja()), "--quiet", "-C", str(build), "-f", name]
        subprocess.run(ninja, check=True)


def _join(words: list[str]) -> str:
    """One shell command; ninja's own dollar signs do not occur in the words."""
    return " ".join(f"'{word}'" if re.search(r"[\[\]; ]", word) else word for word in words)


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description="Builds bertgpt._C in place.")
    parser.add_argument("--resources", action="store_true", help="write csrc/resources.txt")
    parser.add_argument("--check-resources", action="store_true", help="compare with it")
    options = parser.parse_args()
    build = ROOT / "build" / "cuda"
    try:
        built = build_cuda(ROOT / "bertgpt" / f"_C{sysconfig.get_config_var('EXT_SUFFIX')}", build)
    except CannotBuild as reason:
        print(f"bertgpt._C was not built: {reason}", file=sys.stderr)
        return 1
    print(f"{built.relative_to(ROOT)}: {built.stat().st_size / 1e6:.1f} MB")
    if not (options.resources or options.check_resources):
        return 0
    try:
        table = resources(build)
    except CannotBuild as reason:
        print(f"csrc/resources.txt was not looked at: {reason}", file=sys.stderr)
        return 1
    if options.resources:
        RESOURCES.write_text(table)
    elif table != RESOURCES.read_text():
        print("csrc/resources.txt is out of date: run csrc/build.py --resources", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
