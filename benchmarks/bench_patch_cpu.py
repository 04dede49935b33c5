"""MiniLM on real news, patched in place against stock, on this machine's CPU.

The same model twice in one process, on the same weights, one of the two patched, turn by turn, so
that a busy machine slows both. Ragged batches of 32 are drawn at random, as a service meets them,
and padded as tokenizers do; short sentences come alone, with nothing to unpad.
sentence-transformers encodes the same texts, sorting them by length itself. Stock runs its default
attention (SDPA). Beside the times stands what `patch` costs a BERT-base.

    python benchmarks/bench_patch_cpu.py --require     # exit 1 below the figures promised
    python benchmarks/bench_patch_cpu.py --write       # and keep them, on an idle machine
"""

from __future__ import annotations

import copy
import json
import os
import statistics
import sys
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

sys.path += [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parent.parent)]
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
import typer
from bench_encode_cpu import BATCH, Batch, news_paragraphs, ragged
from rich.console import Console
from rich.progress import track
from rich.table import Table

import bertgpt
from bertgpt.benchmarks import environment
from bertgpt.demo_data import minilm_folder, news_sentences

FILE = Path(__file__).parent / "results" / "against_stock" / "patch_cpu.json"
MODEL_AT_LEAST, ENCODE_AT_LEAST = 1.8, 1.5
ALONE_AT_LEAST, SHORT = 1.0, range(8, 21)  # tokens of a short sentence
PATCH_SECONDS, PATCH_BYTES = 0.2, 1 << 20
AGREE = 1e-4

Run = Callable[[Any], torch.Tensor]


def padded(batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and mask `[B, L]`, padding on the right."""
    width = max(map(len, batch))
    ids = torch.tensor([row + [0] * (width - len(row)) for row in batch])
    mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in batch])
    return ids, mask


def on_the_same_weights(model: Any) -> Any:
    """A copy that shares the weights: where they lie in memory tells on so few tokens."""
    return copy.deepcopy(model, {id(weight): weight for weight in model.parameters()})


def model_runs(folder: Path) -> tuple[Run, Run]:
    """Stock and patched: hidden states of a batch of ids, zeros at padding."""
    from transformers import BertModel

    stock = BertModel.from_pretrained(folder).eval()
    patched = on_the_same_weights(stock)
    bertgpt.patch(patched)

    def run(model: Any) -> Run:
        def encode(batch: Batch) -> torch.Tensor:
            ids, mask = padded(batch)
            hidden: torch.Tensor = model(ids, attention_mask=mask).last_hidden_state
            return hidden * mask[..., None]

        return encode

    return run(stock), run(patched)


def encode_runs(folder: Path) -> tuple[Run, Run]:
    """Stock and patched: sentence-transformers' vectors of texts."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Pooling, Transformer

    def build() -> SentenceTransformer:
        transformer = Transformer(str(folder), max_seq_length=512)
        width = transformer.auto_model.config.hidden_size
        return SentenceTransformer(modules=[transformer, Pooling(width)], device="cpu")

    stock, patched = build(), build()
    bertgpt.patch(patched)

    def run(model: SentenceTransformer) -> Run:
        return lambda texts: model.encode(texts, batch_size=BATCH, convert_to_tensor=True)

    return run(stock), run(patched)


@torch.inference_mode()
def compare(
    name: str, inputs: list[Any], runs: tuple[Run, Run], least: float, rounds: int
) -> dict[str, Any]:
    """Interleaved times of all inputs, each the median of its rounds; largest difference."""
    worst = max((runs[0](x) - runs[1](x)).abs().max().item() for x in inputs)  # warms both up
    samples: list[list[list[float]]] = [[[], []] for _ in inputs]
    for _ in track(range(rounds), description=name, transient=True):
        for x, record in zip(inputs, samples, strict=True):
            for run, seconds in zip(runs, record, strict=True):
                start = time.perf_counter()
                run(x)
                seconds.append(time.perf_counter() - start)
    stock, patched = (sum(statistics.median(record[i]) for record in samples) for i in (0, 1))
    return {
        "name": name,
        "stock": stock / len(inputs),
        "patched": patched / len(inputs),
        "ratio": stock / patched,
        "least": least,
        "difference": worst,
        "samples": samples,
    }


def cost() -> dict[str, float]:
    """Seconds and bytes that `patch` takes of a BERT-base; the best of some, bytes of the last."""
    from transformers import BertConfig, BertModel

    with torch.device("meta"):
        model = BertModel(BertConfig())
    times = []
    for _ in range(5):
        start = time.perf_counter()
        bertgpt.patch(model)
        times.append(time.perf_counter() - start)
        bertgpt.unpatch(model)
    tracemalloc.start()
    before = tracemalloc.get_traced_memory()[0]
    bertgpt.patch(model)
    added = tracemalloc.get_traced_memory()[0] - before
    tracemalloc.stop()
    return {"first_seconds": times[0], "seconds": min(times), "bytes": added}


def faults(found: dict[str, Any]) -> list[str]:
    """What falls short of the figures promised."""
    short = [
        f"{row['name']}: {row['ratio']:.2f} times stock, not {row['least']}"
        for row in found["rows"]
        if row["ratio"] < row["least"]
    ]
    short += [
        f"{row['name']}: vectors differ by {row['difference']:.1e}"
        for row in found["rows"]
        if row["difference"] > AGREE
    ]
    if found["cost"]["first_seconds"] > PATCH_SECONDS:
        short.append(f"patch took {found['cost']['first_seconds']:.2f} s")
    if found["cost"]["bytes"] > PATCH_BYTES:
        short.append(f"patch kept {found['cost']['bytes']} bytes")
    return short


def main(
    batches: Annotated[int, typer.Option(help="Batches of each kind.")] = 6,
    rounds: Annotated[int, typer.Option(help="Times each batch is encoded.")] = 4,
    require: Annotated[bool, typer.Option("--require", help="Exit 1 below the figures.")] = False,
    write: Annotated[bool, typer.Option("--write", help="Write the results file.")] = False,
) -> None:
    """Time stock against patched and print a table."""
    from tokenizers import Tokenizer

    folder = minilm_folder()
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.no_padding()
    sentences = [sentence.text for sentence in news_sentences(BATCH * batches)]
    paragraphs = news_paragraphs(BATCH * batches)
    found: dict[str, Any] = {"environment": environment.describe("cpu"), "cost": cost()}
    model, encode = model_runs(folder), encode_runs(folder)
    rows = [tokenizer.encode(sentence).ids for sentence in sentences]
    alone = [[row] for row in rows if len(row) in SHORT][: 4 * batches]
    found["rows"] = [
        compare("one short sentence", alone, model, ALONE_AT_LEAST, 4 * rounds),
        compare("sentences", ragged(sentences, tokenizer), model, MODEL_AT_LEAST, rounds),
        compare("paragraphs", ragged(paragraphs, tokenizer), model, MODEL_AT_LEAST, rounds),
        compare("encode() of sentences", [sentences], encode, ENCODE_AT_LEAST, rounds),
        compare("encode() of paragraphs", [paragraphs], encode, ENCODE_AT_LEAST, rounds),
    ]
    found["load"] = os.getloadavg()[1]  # over five minutes
    table = Table(title=f"MiniLM, batches of {BATCH}, {torch.get_num_threads()} threads, float32")
    for column in ("texts", "stock ms", "patched ms", "ratio", "at least", "max difference"):
        table.add_column(column, justify="right")
    for row in found["rows"]:
        table.add_row(
            row["name"],
            f"{row['stock'] * 1e3:.1f}",
            f"{row['patched'] * 1e3:.1f}",
            f"{row['ratio']:.2f}×",
            f"{row['least']:.2f}×",
            f"{row['difference']:.1e}",
        )
    console = Console(width=100)
    console.print(table)
    console.print(
        f"patch, BERT-base: {found['cost']['first_seconds'] * 1e3:.1f} ms the first time, "
        f"{found['cost']['seconds'] * 1e3:.1f} ms again, {found['cost']['bytes'] / 1024:.0f} KiB"
    )
    if write:
        FILE.write_text(json.dumps(found, indent=1) + "\n", "utf-8")
    short = faults(found)
    for fault in short:
        console.print(fault, style="red")
    if require and short:
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
