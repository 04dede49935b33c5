"""Set-up of every test run: paths, offline, one thread, seeds, and which tests this run is for."""

import importlib.util
import os
import sys
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # read when transformers is imported
os.environ.setdefault("OMP_NUM_THREADS", "1")

ROOT = Path(__file__).resolve().parent.parent
if importlib.util.find_spec("bertgpt") is None:
    # Appended, not prepended: the folder kernels/ must never come before Hugging Face's package.
    sys.path.append(str(ROOT))

import pytest  # noqa: E402
import torch  # noqa: E402
from hypothesis import HealthCheck, settings  # noqa: E402

INTERPRETING = os.environ.get("TRITON_INTERPRET") == "1"

COMMON = settings(
    deadline=None,
    database=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
# `examples(n)` of tests/cases.py, n of 100, follows these.
settings.register_profile("bertgpt", COMMON, derandomize=True, max_examples=100)
settings.register_profile("thorough", COMMON, derandomize=False, max_examples=10_000)
settings.load_profile(os.environ.get("BERTGPT_HYPOTHESIS", "bertgpt"))


def pytest_configure() -> None:
    torch.set_num_threads(1)
    if INTERPRETING:
        from bertgpt.kernels.interpreter import repair_bfloat16

        repair_bfloat16()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Keeps the items of this process: TRITON_INTERPRET is read once, when triton is imported."""
    kept, deselected = [], []
    for item in items:
        wanted = (item.get_closest_marker("interpreter") is not None) == INTERPRETING
        (kept if wanted else deselected).append(item)
        if item.get_closest_marker("gpu") is not None and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
    if deselected:
        config.hook.pytest_deselected(items=deselected)
        items[:] = kept


@pytest.fixture
def host_engine(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest):
    """The C++ kernels on the host engine: backend "cuda" takes CPU tensors; gives the module.

    A parameter names the architecture whose code is meant, as __CUDA_ARCH__ has it.
    """
    import host_engine

    module = host_engine.plain(getattr(request, "param", 900))
    host_engine.lend(module, monkeypatch)
    return module


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    """Runs the command in this process: (exit code, stdout, stderr)."""

    from bertgpt import cli

    def run(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["bertgpt", *map(str, arguments)])
        monkeypatch.setenv("COLUMNS", "200")
        code = 0
        try:
            cli.main()
        except SystemExit as end:
            code = int(end.code or 0)
        out, err = capsys.readouterr()
        return code, out, err

    return run


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


def pytest_sessionfinish(session: pytest.Session) -> None:
    """A run in which every test was skipped has shown nothing: it fails."""
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    if reporter is None or session.config.option.collectonly:
        return  # a worker of pytest-xdist: its controller decides
    ran = any(reporter.stats.get(outcome) for outcome in ("passed", "failed", "error"))
    if reporter.stats.get("skipped") and not ran:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED
