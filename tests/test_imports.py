"""Imports point down the staircase only, and `import bertgpt` takes nothing heavy with it."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

# From the ground up. A module may import from lower steps, and from its own step where that is
# marked; a bertgpt module in no step stands with the models.
STEPS: tuple[tuple[str, ...], ...] = (
    ("philox", "exact_softmax", "accuracy", "_C"),
    ("reference", "kernels", "cuda"),
    ("portable",),
    ("ops",),
    (
        "layers",
        "packing",
        "kv_cache",
        "decode_batch",
        "page_allocator",
        "page_pool",
        "prefix_index",
    ),
    (),  # models, checkpoints, generation
    ("validate", "doctor", "demo", "cli", "generate_command", "integrations", "recipes"),
)
MODELS = STEPS.index(())
# Families that may not import even their own step.
STANDALONE = {"reference", "kernels", "cuda", "portable", "philox", "exact_softmax", "accuracy"}
HEAVY: dict[str, set[str]] = {
    "triton": {"kernels"},
    "transformers": {"integrations"},
    "tokenizers": set(),
    "accelerate": set(),
    "matplotlib": set(),
}


def _sources() -> list[tuple[str, Path]]:
    """(dotted name below bertgpt, file) of everything that is installed."""
    found = [
        (".".join(path.relative_to(ROOT / "bertgpt").with_suffix("").parts), path)
        for path in (ROOT / "bertgpt").rglob("*.py")
    ]
    found += [(f"kernels.{path.stem}", path) for path in (ROOT / "kernels").rglob("*.py")]
    return sorted(found)


def _step(family: str) -> int:
    return next((i for i, names in enumerate(STEPS) if family in names), MODELS)


def _imported(tree: ast.AST) -> list[tuple[int, str]]:
    """(line, dotted name) of every import anywhere in the file."""
    names = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names += [(node.lineno, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: import by full name"
            names += [(node.lineno, f"{node.module}.{alias.name}") for alias in node.names]
        elif isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "import_module":
            literal = node.args[0]
            if isinstance(literal, ast.Constant):
                names.append((node.lineno, str(literal.value)))
    return names


def violations(module: str, source: str) -> list[str]:
    """What `source`, standing at bertgpt.<module>, imports against the rules."""
    family = module.split(".")[0]
    found = []
    for line, name in _imported(ast.parse(source)):
        parts = name.split(".")
        if parts[0] == "kernels":
            found.append(f"{module}:{line}: kernels is bertgpt.kernels here")
        if parts[0] != "bertgpt" or len(parts) < 2 or family in ("__init__", "__main__"):
            continue
        target = parts[1]
        if target == family or target == "__version__":
            continue
        above = _step(target) > _step(family)
        beside = _step(target) == _step(family) and family in STANDALONE
        if above or beside:
            found.append(f"{module}:{line}: {family} must not import bertgpt.{target}")
    return found


def heavy_violations(module: str, source: str) -> list[str]:
    """Imports at a module's top of packages that only some families may need."""
    family = module.split(".")[0]
    found = []
    for node in ast.parse(source).body:
        for line, name in _imported(node) if isinstance(node, ast.Import | ast.ImportFrom) else ():
            package = name.split(".")[0]
            if package in HEAVY and family not in HEAVY[package]:
                found.append(f"{module}:{line}: {package} at import time")
    return found


def test_imports_point_down_only():
    sources = _sources()
    assert len(sources) > 10
    found = [v for module, path in sources for v in violations(module, path.read_text())]
    assert not found, "\n".join(found)


def test_triton_and_transformers_are_imported_where_used():
    found = [v for module, path in _sources() for v in heavy_violations(module, path.read_text())]
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("reference.attention", "from bertgpt.ops import attention"),
        ("reference.attention", "from bertgpt.kernels.attention import attention_fwd"),
        ("reference.attention", "from bertgpt import portable"),
        ("kernels.attention", "from bertgpt.reference import attention"),
        ("kernels.attention", "def f():\n    import bertgpt.ops"),
        ("kernels.attention", "from kernels.device import compute_capability"),
        ("portable.attention", "import importlib\nimportlib.import_module('bertgpt.ops')"),
        ("ops.attention", "from bertgpt.layers import SelfAttention"),
        ("layers", "from bertgpt.bert import BertModel"),
        ("bert", "from bertgpt.validate import run"),
    ],
)
def test_the_walk_finds_planted_imports(module, source):
    assert violations(module, source)


def test_the_walk_finds_planted_heavy_imports():
    assert heavy_violations("ops.attention", "import triton.language as tl")
    assert heavy_violations("bert", "from transformers import AutoConfig")
    assert not heavy_violations("demo", "def f():\n    import transformers")


def _run_python(script: str) -> str:
    result = subprocess.run(
        [sys.executable, "-P", "-c", f"import sys; sys.path.append({str(ROOT)!r})\n{script}"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


def test_import_bertgpt_loads_nothing_heavy():
    loaded = _run_python("import bertgpt; print(*{name.split('.')[0] for name in sys.modules})")
    assert "bertgpt" in loaded.split()
    assert not {"torch", "triton", "transformers", "tokenizers", "typer"} & set(loaded.split())


def test_ops_and_models_work_where_triton_and_transformers_are_not_installed():
    answer = _run_python(
        "absent = ('triton', 'transformers', 'tokenizers', 'kernels')\n"
        "sys.modules.update(dict.fromkeys(absent))\n"
        "import torch, bertgpt.ops, bertgpt.packing, bertgpt.bert, bertgpt.gpt\n"
        "q = torch.ones(1, 2, 3, 4)\n"
        "print(bertgpt.ops.attention(q, q, q).sum().item())\n"
        "print(bertgpt.ops.explain('attention', q, q, q))"
    )
    assert answer.startswith("24.0\nattention: torch would run")
    assert "triton refuses: triton is not installed" in answer
