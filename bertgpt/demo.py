"""Two real models through bertgpt and through stock transformers, in one process, side by side.

MiniLM answers searches over news sentences; a GPT-2 of microbial genera continues samples by paged
decoding. The demo succeeds when every number agrees with transformers; times are shown, not judged.
"""

from __future__ import annotations

import os
import statistics
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from bertgpt import __version__
from bertgpt.demo_data import (
    HABITATS,
    GenusModel,
    Sentence,
    genus_model,
    minilm_folder,
    news_sentences,
)
from bertgpt.embedding import SentenceEncoder
from bertgpt.gpt import GPT2LMHeadModel
from bertgpt.ops._dispatch import OPS
from bertgpt.packing import pack

TOLERANCE = 1e-4
NEW_TOKENS = 64
BATCH = 32
QUERIES = (
    "help for people whose hands shake",
    "homes cost more than a year ago",
    "a teenage tennis champion",
    "calls for people who cannot hear",
    "a company that makes drinks",
    "copying songs and films illegally",
)
_STAGES = 7

Step = Callable[[str], object]


@dataclass
class Comparison:
    """One model, ours against stock.

    Attributes:
        name: The model.
        difference: Largest absolute difference of hidden states or logits.
        same: What had to come out equal, and how often it did: (label, equal, of).
        seconds: Times of one pass over the ragged batch, interleaved: (ours, stock) each round.
        backends: Calls by (op, backend) in one pass of ours.
        answers: Rows of the table that shows what the model said.
    """

    name: str
    difference: float
    same: tuple[str, int, int]
    seconds: list[tuple[float, float]]
    backends: Counter[tuple[str, str]]
    answers: Sequence[tuple[str, ...]]

    @property
    def holds(self) -> bool:
        """Whether ours agrees with stock."""
        return self.difference <= TOLERANCE and self.same[1] == self.same[2]

    @property
    def medians(self) -> tuple[float, float]:
        """Median seconds of ours and of stock."""
        ours, stock = zip(*self.seconds, strict=True)
        return statistics.median(ours), statistics.median(stock)


class BackendRecorder(TorchDispatchMode):
    """Counts calls of bertgpt's ops in its context, by the backend that each resolves to."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[tuple[str, str]] = Counter()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Notes the call and lets it run."""
        if func.namespace == "bertgpt":
            op = OPS[func._schema.name.partition("::")[2]]
            self.calls[op.name, op.resolve(op.bind(args))] += 1
        return func(*args, **(kwargs or {}))


def main(console: Console, *, sentences: int = 256, rounds: int = 3) -> int:
    """Runs the demo.

    Args:
        console: Where the tables go.
        sentences: How many news sentences are searched, at least 32.
        rounds: How often each contender is timed.

    Returns:
        0 when every figure agrees with stock transformers, else 1.

    Raises:
        FileNotFoundError: A package that carries a model or text is not installed.
        ModuleNotFoundError: transformers or tokenizers is not installed.
    """
    transformers = _transformers()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    where = torch.cuda.get_device_name() if device == "cuda" else "CPU"
    console.print(
        f"bertgpt {__version__}, torch {torch.__version__}, transformers "
        f"{transformers.__version__}, {where}, {torch.get_num_threads()} threads, float32"
    )
    with Progress(console=console, transient=True) as progress:
        bar = progress.add_task("Opening the packages", total=_STAGES)

        def step(description: str) -> None:
            progress.update(bar, description=description, advance=1)

        corpus, genera = news_sentences(sentences), genus_model()
        search = compare_search(transformers, corpus, device, rounds, step)
        decoding = compare_decoding(transformers, genera, device, rounds, step)
    _print_answers(console, search, decoding, len(corpus))
    _print_figures(console, (search, decoding))
    return 0 if search.holds and decoding.holds else 1


def compare_search(
    transformers: Any, corpus: Sequence[Sentence], device: str, rounds: int, step: Step
) -> Comparison:
    """Embeds the corpus both ways, answers the queries, times two ragged batches."""
    step("Loading MiniLM")
    folder = minilm_folder()
    encoder = SentenceEncoder.from_pretrained(folder, device=device)
    stock = transformers.BertModel.from_pretrained(folder, attn_implementation="eager")
    stock = stock.to(device).eval()
    ids = encoder.tokenize([sentence.text for sentence in corpus])
    queries = encoder.tokenize(QUERIES)
    recorder = BackendRecorder()

    step("Embedding news sentences")
    difference, ours, theirs = 0.0, [], []
    for batch in (*_split(ids), queries):
        packed, (padded, mask) = pack(batch, device=device), _pad(batch, device)
        with torch.inference_mode(), recorder:
            ours_TE = encoder.model(packed).last_hidden_state
            stock_TE = stock(padded, attention_mask=mask).last_hidden_state[mask.bool()]
        difference = max(difference, (ours_TE - stock_TE).abs().max().item())
        ours.append(encoder.pool(ours_TE, packed))
        theirs.append(encoder.pool(stock_TE, packed))
    scores, stock_scores = ((v[-1] @ torch.cat(v[:-1]).T).cpu() for v in (ours, theirs))
    best = scores.argmax(1)

    step("Timing MiniLM on ragged batches of 32")
    stock.set_attn_implementation("sdpa")  # its default, and its fastest here
    timed = _split(ids)[:2]
    seconds = _interleave(
        lambda: [encoder.model(pack(batch, device=device)) for batch in timed],
        lambda: [stock(padded, attention_mask=m) for padded, m in (_pad(b, device) for b in timed)],
        rounds,
        device,
    )
    answers = [
        (query, corpus[i].text, corpus[i].section, f"{scores[row, i]:.2f}")
        for row, (query, i) in enumerate(zip(QUERIES, best.tolist(), strict=True))
    ]
    same = ("answers", int((best == stock_scores.argmax(1)).sum()), len(QUERIES))
    return Comparison("MiniLM (BERT)", difference, same, seconds, recorder.calls, answers)


def compare_decoding(
    transformers: Any, genera: GenusModel, device: str, rounds: int, step: Step
) -> Comparison:
    """Continues every habitat's genera both ways, compares logits, times the ragged batch."""
    step("Loading the genus model")
    ours = GPT2LMHeadModel.from_pretrained(genera.folder).to(device)
    stock = transformers.GPT2LMHeadModel.from_pretrained(genera.folder, attn_implementation="eager")
    stock = stock.to(device).eval()
    # Neither may stop early: every prompt grows by the same number of tokens.
    stock.generation_config.eos_token_id = None
    prompts = [genera.ids(names) for names in HABITATS.values()]

    def decode() -> list[list[int]]:
        return ours.generate(prompts, NEW_TOKENS, eos_token_id=[])

    def decode_stock() -> Tensor:
        padded, mask = _pad(prompts, device, left=True)
        return stock.generate(
            padded,
            attention_mask=mask,
            max_new_tokens=NEW_TOKENS,
            do_sample=False,
            pad_token_id=0,
        )

    step("Continuing genera on a paged cache")
    with BackendRecorder() as recorder:
        grown = decode()
    theirs = decode_stock()[:, -NEW_TOKENS:].tolist()
    equal = sum(
        a == b
        for mine, other in zip(grown, theirs, strict=True)
        for a, b in zip(mine[-NEW_TOKENS:], other, strict=True)
    )
    padded, mask = _pad(grown, device)
    with torch.inference_mode():
        logits_TV = ours(pack(grown, device=device)).logits
        difference = logits_TV - stock(padded, attention_mask=mask).logits[mask.bool()]

    step("Timing the ragged prompts")
    stock.set_attn_implementation("sdpa")
    seconds = _interleave(decode, decode_stock, rounds, device)
    answers = [
        (habitat, HABITATS[habitat].replace(" ", ", "), ", ".join(genera.names(added)[:8]))
        for habitat, added in zip(HABITATS, (g[-NEW_TOKENS:] for g in grown), strict=True)
    ]
    return Comparison(
        "Genus model (GPT-2)",
        difference.abs().max().item(),
        ("greedy tokens", equal, len(prompts) * NEW_TOKENS),
        seconds,
        recorder.calls,
        answers,
    )


def _transformers() -> Any:
    """The library, quiet and offline; imported here because nothing else needs it."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    try:
        import transformers
    except ModuleNotFoundError as missing:
        message = "the demo compares with transformers: pip install 'bertgpt[demo]'"
        raise ModuleNotFoundError(message, name="transformers") from missing
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    return transformers


def _split(ids: list[list[int]]) -> list[list[list[int]]]:
    return [ids[i : i + BATCH] for i in range(0, len(ids), BATCH)]


def _pad(ids: list[list[int]], device: str, *, left: bool = False) -> tuple[Tensor, Tensor]:
    """Padded ids and attention mask `[B, L]`, as stock models want them."""
    width = max(map(len, ids))
    padded, mask = torch.zeros(2, len(ids), width, dtype=torch.int64)
    for row, tokens in enumerate(ids):
        cells = slice(width - len(tokens), width) if left else slice(0, len(tokens))
        padded[row, cells] = torch.tensor(tokens)
        mask[row, cells] = 1
    return padded.to(device), mask.to(device)


@torch.inference_mode()
def _interleave(
    ours: Callable[[], object], stock: Callable[[], object], rounds: int, device: str
) -> list[tuple[float, float]]:
    """Seconds of (ours, stock) in turns, after one untimed pass of each."""

    def timed(run: Callable[[], object]) -> float:
        start = time.perf_counter()
        run()
        if device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - start

    timed(ours), timed(stock)
    return [(timed(ours), timed(stock)) for _ in range(rounds)]


def _print_answers(console: Console, search: Comparison, decoding: Comparison, corpus: int) -> None:
    table = Table("query", "closest sentence", "section", "cosine")
    table.title = f"Searching {corpus} news sentences by meaning"
    for row in search.answers:
        table.add_row(*row)
    console.print(table)
    table = Table("habitat", "genera given", "genera that follow, greedily")
    table.title = "Continuing samples of microbes"
    for row in decoding.answers:
        table.add_row(*row)
    console.print(table)


def _print_figures(console: Console, comparisons: Sequence[Comparison]) -> None:
    table = Table("model", "largest difference", "equal", "bertgpt", "stock", "time ratio")
    table.title = "Against stock transformers, in this run (times: ragged batch, median)"
    for c in comparisons:
        colour = "green" if c.holds else "bold red"
        label, equal, of = c.same
        ours, stock = c.medians
        table.add_row(
            c.name,
            f"[{colour}]{c.difference:.1e}[/] (at most {TOLERANCE:.0e})",
            f"[{colour}]{equal} of {of}[/] {label}",
            f"{ours * 1e3:.0f} ms",
            f"{stock * 1e3:.0f} ms",
            f"{stock / ours:.2f}×",
        )
    console.print(table)
    table = Table("model", "op", "backend", "calls", title="Which backend ran each op")
    for c in comparisons:
        for (op, backend), calls in sorted(c.backends.items()):
            table.add_row(c.name, op, backend, str(calls))
    console.print(table)
    held = all(c.holds for c in comparisons)
    console.print("[green]Every figure holds.[/]" if held else "[bold red]A figure fails.[/]")
