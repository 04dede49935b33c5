"""Fine-tuning the real MiniLM on real data on this machine's CPU, ours and stock transformers.

Both start from the same weights, new head included, and take the same batches through the same
loop and optimizer; only the model differs, and with it the elements that dropout takes. What is
measured is the held-out fifth: no text of it, and of questions no article, is trained on.

    python benchmarks/train_finetune_cpu.py topics tags --seed 0 --seed 1 --threads 1

Each run replaces its line in benchmarks/results/against_stock/finetune_cpu.json. Seconds
depend on what else the machine does: CPU seconds and the load stand beside them.
"""

from __future__ import annotations

import json
import os
import resource
import statistics
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

sys.path.append(str(Path(__file__).resolve().parent.parent))
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
import typer
from rich.console import Console
from rich.table import Table

from bertgpt.benchmarks.environment import describe
from bertgpt.benchmarks.finetune_data import CONTESTS, examples_of
from bertgpt.benchmarks.finetune_stock import make_stock
from bertgpt.demo_data import minilm_folder
from bertgpt.recipes.finetune import RECIPES, fit, new_recipe
from bertgpt.recipes.settings import Settings

RESULTS = Path(__file__).parent / "results" / "against_stock" / "finetune_cpu.json"
CONTENDERS = ("ours", "stock")
BATCH = 16


def run(name: str, contender: str, seed: int, squad: Path | None) -> dict[str, Any]:
    """Trains one contender once, and gives its line of the results."""
    contest = CONTESTS[name]
    training, held = examples_of(name, squad)
    recipe = new_recipe(contest.task, minilm_folder(), training + held, contest.max_length, seed)
    if contender == "stock":
        make_stock(recipe)
    with tempfile.TemporaryDirectory() as folder:
        settings = Settings(
            Path(folder) / "model",
            learning_rate=contest.learning_rate,
            batch_size=BATCH,
            epochs=contest.epochs,
            seed=seed,
            checkpoint_every=10_000,
            cpu=True,
        )
        load, cpu, start = os.getloadavg()[0], _cpu_seconds(), time.perf_counter()
        report = fit(recipe, training, held, settings, console=Console(stderr=True))
        seconds, cpu = time.perf_counter() - start, _cpu_seconds() - cpu
        lines = (settings.output / "log.jsonl").read_text("utf-8").splitlines()
    losses = [json.loads(line)["loss"] for line in lines]
    return {
        "contest": name,
        "contender": contender,
        "seed": seed,
        **asdict(contest),
        **asdict(report),
        "batch_size": BATCH,
        "steps": len(losses),
        "loss": {"first": statistics.mean(losses[:5]), "last": statistics.mean(losses[-5:])},
        "seconds": round(seconds, 1),
        "cpu_seconds": round(cpu, 1),
        "load": [round(load, 1), round(os.getloadavg()[0], 1)],
        "environment": describe("cpu"),
    }


def keep(line: dict[str, Any], file: Path) -> list[dict[str, Any]]:
    """Puts a line in the results, in place of one of the same run; returns all of them."""
    lines = json.loads(file.read_text("utf-8")) if file.exists() else []

    def key(line: dict[str, Any]) -> tuple[int, int, int]:
        place = list(CONTESTS).index(line["contest"]), CONTENDERS.index(line["contender"])
        return *place, line["seed"]

    kept = sorted([*(old for old in lines if key(old) != key(line)), line], key=key)
    partial = file.with_name(f".{file.name}.partial")
    partial.write_text(json.dumps(kept, indent=1) + "\n", "utf-8")
    partial.replace(file)
    return kept


def table(lines: list[dict[str, Any]]) -> Table:
    """What the runs came to, one row for each contender of each contest."""
    found = Table(title="MiniLM fine-tuned on a CPU, figures on held-out examples")
    for column in (
        "data",
        "metric",
        "baseline",
        "before",
        "contender",
        "after",
        "seconds",
        "CPU s",
    ):
        found.add_column(column)
    for name, contest in CONTESTS.items():
        metric = RECIPES[contest.task].metric
        for contender in CONTENDERS:
            runs = [r for r in lines if (r["contest"], r["contender"]) == (name, contender)]
            if runs:
                first = runs[0]
                found.add_row(
                    name,
                    metric,
                    f"{first['baseline'][metric]:.3f}",
                    f"{first['before'][metric]:.3f}",
                    contender,
                    ", ".join(f"{r['after'][metric]:.3f}" for r in runs),
                    ", ".join(f"{r['seconds']:.0f}" for r in runs),
                    ", ".join(f"{r['cpu_seconds']:.0f}" for r in runs),
                )
    return found


def _cpu_seconds() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def main(
    contests: Annotated[list[str] | None, typer.Argument(help="By default all.")] = None,
    contender: Annotated[
        list[str] | None, typer.Option(help="ours, stock; by default both.")
    ] = None,
    seed: Annotated[list[int] | None, typer.Option(help="One or more; by default 0.")] = None,
    threads: Annotated[int | None, typer.Option(help="Of PyTorch; by default its own.")] = None,
    squad: Annotated[Path | None, typer.Option(help="squaddev_v1.1.json, for answers.")] = None,
    show: Annotated[bool, typer.Option("--show", help="Print the committed results only.")] = False,
    output: Annotated[Path, typer.Option(help="The results.")] = RESULTS,
) -> None:
    """Fine-tune, measure, and write the results."""
    if threads is not None:
        torch.set_num_threads(threads)
    lines = json.loads(output.read_text("utf-8")) if output.exists() else []
    for name in () if show else contests or list(CONTESTS):
        for chosen in seed or [0]:
            for who in contender or CONTENDERS:
                lines = keep(run(name, who, chosen, squad), output)
    Console(width=110).print(table(lines))


if __name__ == "__main__":
    typer.run(main)
