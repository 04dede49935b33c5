"""Greedy decoding of ragged prompts, paged here against padded in stock transformers, on a CPU.

Both continue the same 16 prompts by 64 tokens in one process, turn by turn, so that a busy
machine slows both. Two models: a real small GPT-2 of gut genera, and random weights of GPT-2's
own size. The prompts are random tokens, of lengths spread as requests come. Stock pads on the
left, as its documentation asks for, and keeps its default cache and attention.

    python benchmarks/bench_generate_cpu.py --require 2.0   # exit 1 below that ratio
"""

from __future__ import annotations

import os
import random
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

sys.path.append(str(Path(__file__).resolve().parent.parent))
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
import typer
from rich.console import Console
from rich.progress import track
from rich.table import Table

from bertgpt import GPT2Config, GPT2LMHeadModel
from bertgpt.benchmarks.environment import one_line
from bertgpt.demo_data import genus_model

PROMPTS, NEW_TOKENS = 16, 64
SHORTEST, LONGEST = 4, 192
RESULT = Path(__file__).parent / "results" / "generate-cpu.md"

Prompts = list[list[int]]
Generate = Callable[[Prompts], Prompts]


def ragged(vocabulary: int) -> Prompts:
    """Prompts of lengths spread evenly over the octaves, as requests come: most are short."""
    draw = random.Random(0)
    octaves = (LONGEST / SHORTEST) ** (1 / (PROMPTS - 1))
    lengths = [round(SHORTEST * octaves**i) for i in range(PROMPTS)]
    draw.shuffle(lengths)
    return [[draw.randrange(vocabulary) for _ in range(length)] for length in lengths]


def models() -> dict[str, Path | None]:
    """Folders by name; None for random weights of GPT-2's size."""
    return {"genus GPT-2, 8 × 256": genus_model().folder, "GPT-2 size, 12 × 768": None}


def ours_and_stock(folder: Path | None) -> tuple[GPT2LMHeadModel, Any]:
    """The same model, here and there."""
    from transformers import GPT2Config as StockConfig
    from transformers import GPT2LMHeadModel as StockModel

    if folder is not None:
        return GPT2LMHeadModel.from_pretrained(folder).eval(), StockModel.from_pretrained(folder)
    torch.manual_seed(0)
    ours = GPT2LMHeadModel(GPT2Config()).eval()
    stock = StockModel(StockConfig()).eval()
    stock.load_state_dict(ours.state_dict(), strict=False)
    return ours, stock


def paged(model: GPT2LMHeadModel) -> Generate:
    """Bertgpt's own decoding."""
    return lambda prompts: model.generate(prompts, max_new_tokens=NEW_TOKENS, eos_token_id=[])


def padded(model: Any) -> Generate:
    """Transformers' decoding of the prompts padded on the left."""
    model.eval().generation_config.eos_token_id = None

    def generate(prompts: Prompts) -> Prompts:
        width = max(map(len, prompts))
        ids = torch.tensor([[0] * (width - len(row)) + row for row in prompts])
        mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in prompts])
        out = model.generate(
            ids, attention_mask=mask, max_new_tokens=NEW_TOKENS, do_sample=False, pad_token_id=0
        )
        return [row[width - len(p) :] for row, p in zip(out.tolist(), prompts, strict=True)]

    return generate


def compare(ours: Generate, stock: Generate, prompts: Prompts, rounds: int) -> dict[str, Any]:
    """Seconds of both, interleaved, and how many rows' tokens agree."""
    agreeing = sum(a == b for a, b in zip(ours(prompts), stock(prompts), strict=True))
    times: list[list[float]] = [[], []]
    for _ in track(range(rounds), transient=True):
        for generate, samples in zip((ours, stock), times, strict=True):
            start = time.perf_counter()
            generate(prompts)
            samples.append(time.perf_counter() - start)
    here, there = times
    return {
        "ours": statistics.median(here),
        "stock": statistics.median(there),
        "ratio": statistics.median(b / a for a, b in zip(here, there, strict=True)),
        "agreeing": agreeing,
    }


def main(
    rounds: Annotated[int, typer.Option(help="Times each generates.")] = 5,
    require: Annotated[float, typer.Option(help="Exit 1 where a ratio is below this.")] = 0.0,
    write: Annotated[bool, typer.Option("--write", help=f"Writes {RESULT.name}.")] = False,
) -> None:
    """Time ours against stock and print a table."""
    title = f"{PROMPTS} ragged prompts, {NEW_TOKENS} new tokens, {torch.get_num_threads()} threads"
    columns = ("model", "mean prompt", "ours s", "stock s", "ratio", "rows alike")
    rows, missed, where = [], False, one_line("cpu")
    for name, folder in models().items():
        model, theirs = ours_and_stock(folder)
        prompts = ragged(model.config.vocab_size)
        with torch.inference_mode():
            found = compare(paged(model), padded(theirs), prompts, rounds)
        missed |= found["ratio"] < require
        mean = statistics.mean(map(len, prompts))
        rows.append(
            (name, f"{mean:.0f}", f"{found['ours']:.2f}", f"{found['stock']:.2f}",
             f"{found['ratio']:.2f}×", f"{found['agreeing']} of {PROMPTS}")
        )  # fmt: skip
    table = Table(*columns, title=f"{title}, float32")
    for row in rows:
        table.add_row(*row)
    Console().print(table)
    if write:
        lines = (f"| {' | '.join(row)} |" for row in (columns, ["---"] * len(columns), *rows))
        about = f"{title}, by `benchmarks/bench_generate_cpu.py`. {where}"
        RESULT.write_text("\n".join((about, "", *lines, "")))
    if missed:
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
