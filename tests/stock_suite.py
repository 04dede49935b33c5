"""Runs the common model tests that transformers publishes, on patched BERT and GPT-2 models.

    pip install parameterized
    pip download --no-deps --no-binary :all: --no-build-isolation transformers==5.23.0
    python tests/stock_suite.py transformers-5.23.0.tar.gz

The source distribution holds the common tests, but neither those of generation and export nor what
the distributed ones need: these stand empty here. `--stock` runs the same tests unpatched.
"""

import os
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
ABSENT = {
    "tests/exporters/test_export.py": "class ExportTesterMixin: ...\n",
    "tests/generation/test_utils.py": "class GenerationTesterMixin: ...\n",
    "tests/distributed_testing_utils.py": "def __getattr__(name):\n    return None\n",
}


def main(archive: str, *options: str) -> int:
    """Unpacks, fills what is absent, and runs pytest; its exit code."""
    with tempfile.TemporaryDirectory() as folder:
        with tarfile.open(archive) as packed:
            packed.extractall(folder, filter="data")
        (root,) = Path(folder).iterdir()
        for name, text in ABSENT.items():
            file = root / name
            file.parent.mkdir(exist_ok=True)
            file.write_text(text)
        for package in ("tests", "tests/exporters", "tests/generation"):
            (root / package / "__init__.py").touch()
        patched = "" if "--stock" in options else "1"
        env = {**os.environ, "BERTGPT_PATCHED": patched, "HF_HUB_OFFLINE": "1"}
        env["PYTHONPATH"] = str(root)
        command = [sys.executable, "-m", "pytest", "-q", "-n", "2", "-p", "no:cacheprovider"]
        command += ["-c", os.devnull, "--rootdir", str(root), str(HERE / "stock_models.py")]
        return subprocess.run(command, cwd=root, env=env, check=False).returncode


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
