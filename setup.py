"""Maps the repository's folders onto the installed package, and builds its CUDA part.

`kernels/` is installed as `bertgpt.kernels`: a top-level package of that name would shadow
Hugging Face's `kernels`, which transformers imports. `benchmarks/` is installed as
`bertgpt.benchmarks`, for `bertgpt bench`.

BERTGPT_BUILD_CUDA=auto (default) builds `bertgpt._C` where nvcc is found and goes on without it
where that fails; 1 fails instead; 0 does not try. BERTGPT_CUDA_ARCHS: see csrc/build.py.
"""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

ROOT = Path(__file__).resolve().parent


def load_builder() -> ModuleType | None:
    """`csrc/build.py`, or None where the tree holds no csrc/."""
    path = ROOT / "csrc" / "build.py"
    if not path.exists():
        return None
    spec = importlib.util.spec_from_file_location("csrc_build", path)
    assert spec is not None
    assert spec.loader is not None
    builder = importlib.util.module_from_spec(spec)
    sys.modules["csrc_build"] = builder
    spec.loader.exec_module(builder)
    return builder


def cuda_extensions() -> list[Extension]:
    """`bertgpt._C` where it is wanted and can be built."""
    mode = os.environ.get("BERTGPT_BUILD_CUDA", "auto")
    if mode not in ("auto", "1", "0"):
        raise SystemExit(f"BERTGPT_BUILD_CUDA must be auto, 1 or 0, not {mode!r}")
    if mode == "0":
        return []
    builder = load_builder()
    reason = "there is no csrc/ here" if builder is None else builder.missing()
    if reason is None:
        return [Extension("bertgpt._C", [], optional=mode == "auto")]
    if mode == "1":
        raise SystemExit(f"BERTGPT_BUILD_CUDA=1, but bertgpt._C cannot be built: {reason}")
    return []


class BuildCuda(build_ext):
    """Hands the one extension to ninja; objects stay in build/cuda for the next time."""

    def build_extension(self, ext: Extension) -> None:
        """Builds bertgpt._C; CompileError, which "auto" only warns of, where that fails."""
        builder = load_builder()
        assert builder is not None
        try:
            builder.build_cuda(Path(self.get_ext_fullpath(ext.name)), ROOT / "build" / "cuda")
        except (builder.CannotBuild, subprocess.CalledProcessError) as error:
            raise CompileError(f"bertgpt._C: {error}") from error


setup(
    packages=[
        *find_packages(include=["bertgpt", "bertgpt.*"]),
        "bertgpt.benchmarks",
        "bertgpt.kernels",
    ],
    package_dir={
        "bertgpt": "bertgpt",
        "bertgpt.benchmarks": "benchmarks",
        "bertgpt.kernels": "kernels",
    },
    ext_modules=cuda_extensions(),
    cmdclass={"build_ext": BuildCuda},
)
