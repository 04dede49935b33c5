"""The training loop: AdamW on packed batches, on one device or many, by `accelerate`.

Examples, their order and their random inputs come from (seed, place in the stream), dropout from
(seed, step, rank). So a run that is resumed repeats them all, and one that is split otherwise over
ranks and accumulated parts repeats all but dropout. A step's gradient is that of the mean over all
of its labels.
"""

from __future__ import annotations

import json
import math
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from bertgpt.pretrained import PreTrainedModel
from bertgpt.recipes import state
from bertgpt.recipes.journal import Journal
from bertgpt.recipes.order import Order, mix
from bertgpt.recipes.settings import Settings
from bertgpt.recipes.task import Batch, Task

# Settings that a run must keep when it is resumed: others change its rounding at most.
_KEPT = ("learning_rate", "warmup", "weight_decay", "clip_norm", "batch_size", "precision", "seed")
_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interrupted(RuntimeError):
    """A signal stopped the run after it had saved its state; `signal` is its number."""

    def __init__(self, message: str, signal: int) -> None:
        super().__init__(message)
        self.signal = signal


@dataclass(frozen=True)
class Result:
    """A finished run.

    Attributes:
        model: the trained model, whole on every rank, in eval mode.
        log: each step's figures: `step` from 1, `loss` and its parts, `learning_rate`, `norm` of
            the gradient, `tokens`, `seconds`.
        before: mean losses of the held-out examples before training, empty where there are none
            or the run was resumed.
        after: likewise after training.
    """

    model: PreTrainedModel
    log: list[dict[str, Any]]
    before: dict[str, float]
    after: dict[str, float]


def train(
    task: Task,
    examples: Sequence[Any],
    settings: Settings,
    *,
    held_out: Sequence[Any] = (),
    beside: Callable[[], None] | None = None,
    measure: Callable[[PreTrainedModel], None] | None = None,
    resume: bool = False,
    console: Console | None = None,
) -> Result:
    """Trains a task's model and writes it, its log and its loss curve into `settings.output`.

    Args:
        task: the model and how batches are made of examples.
        examples: what `task.collate` takes, the same on every rank; pickle can write them.
        settings: the run.
        held_out: examples whose loss is measured before and after.
        beside: writes what goes with the model into the output folder, on one rank.
        measure: takes the trained model after it was written, on every rank. The checkpoint goes
            away after that only.
        resume: go on from the checkpoint in the output folder.
        console: where a progress bar goes.

    Raises:
        FileExistsError: the output folder holds something, and the run is not to resume.
        FileNotFoundError: there is no checkpoint to resume from.
        ValueError: no examples; weights that are not float32; settings that contradict themselves;
            a checkpoint of other settings, another model or other examples.
        FloatingPointError: the loss or its gradient is infinite or no number. The message names the
            step; the last checkpoint stays.
        Interrupted: SIGINT or SIGTERM came; the state, or the finished model, was saved first.
    """
    run = _Run(task, examples, settings, resume)
    before = {} if resume else run.evaluate(held_out)
    with _signals() as came:
        log = run.train(console, came)
        model = run.whole_model()
        if run.main:
            model.save_pretrained(settings.output)
            if beside is not None:
                beside()
        _, stop = run.agree([], came)
    if stop:
        name = signal.Signals(stop).name
        raise Interrupted(f"{name} after the last step: {settings.output} has the model", stop)
    after = run.evaluate(held_out)
    if measure is not None:
        measure(model)
    if run.main:
        (settings.output / state.FILE).unlink(missing_ok=True)
    run.accelerator.wait_for_everyone()
    return Result(model, log, before, after)


def decay_groups(model: torch.nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """AdamW's parameter groups: matrices decay; biases and LayerNorms, all vectors, do not."""
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    return [
        {"params": [w for w in weights if w.ndim > 1], "weight_decay": weight_decay},
        {"params": [w for w in weights if w.ndim < 2], "weight_decay": 0.0},
    ]


class _Run:
    """A run under way: the wrapped model, its optimizer, and where in the stream it stands."""

    def __init__(
        self, task: Task, examples: Sequence[Any], settings: Settings, resume: bool
    ) -> None:
        for name, weight in task.model.named_parameters():
            if weight.dtype != torch.float32:
                raise ValueError(f"weights must be float32 to be trained: {name} is {weight.dtype}")
        self.settings, self.task, self.examples = settings, task, examples
        self.total = settings.steps(len(examples))
        self.facts = {name: getattr(settings, name) for name in _KEPT}
        self.facts |= {"examples": len(examples), "steps": self.total}
        self.facts |= {f"config.{name}": v for name, v in task.model.config.to_dict().items()}
        self.facts["digest of the examples"] = state.digest(examples)
        self.facts = json.loads(json.dumps(self.facts))  # as a checkpoint gives them back
        self.done = self._open(settings.output, resume)
        self.accelerator = _accelerator(settings)
        self.parts = settings.accumulation * self.accelerator.num_processes
        if self.parts > settings.batch_size:
            raise ValueError(
                f"batch_size={settings.batch_size} is too small to share among "
                f"{self.accelerator.num_processes} ranks × {settings.accumulation} parts"
            )
        self.main = self.accelerator.is_main_process
        self.order = Order(len(examples), settings.batch_size, settings.seed)
        groups = decay_groups(task.model, settings.weight_decay)
        optimizer = torch.optim.AdamW(groups, lr=settings.learning_rate)
        self.model, self.optimizer = self.accelerator.prepare(task, optimizer)
        if resume:
            state.load(settings.output, task.model, self.optimizer.optimizer)
            if self.accelerator.scaler is not None:
                scale = state.read_facts(settings.output)["scale"]
                self.accelerator.scaler.load_state_dict(scale)
        self.accelerator.wait_for_everyone()  # all have seen the folder as it was
        if self.main:
            settings.output.mkdir(parents=True, exist_ok=True)
        self.accelerator.wait_for_everyone()

    def _open(self, folder: Path, resume: bool) -> int:
        """Steps that are done, by the checkpoint in the folder; checks that one is wanted."""
        if not resume:
            if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
                raise FileExistsError(f"{folder} holds something: {state.way_out(folder)}")
            return 0
        facts = state.read_facts(folder)
        for name, value in self.facts.items():
            if facts.get(name) != value:
                raise ValueError(
                    f"{folder / state.FILE} was made with {name}={facts.get(name)}, not {value}: "
                    "resume with the same, or start in another folder"
                )
        return int(facts["done"])

    def train(self, console: Console | None, came: list[int]) -> list[dict[str, Any]]:
        """All steps that are left, unless a signal came."""
        every = self.settings.checkpoint_every
        journal = Journal(self.settings.output, self.done, self.total, console, self.main)
        with journal, ThreadPoolExecutor(1) as ahead:
            self.model.train()
            coming = ahead.submit(self._batches, self.done)
            for step in range(self.done, self.total):
                start = time.perf_counter()
                batches = [batch.to(self.accelerator.device) for batch in coming.result()]
                coming = ahead.submit(self._batches, step + 1)  # made while this step runs
                totals, stop = self.agree(batches, came)
                if stop:
                    raise self._interrupted(step, stop)
                line = self._step(step, batches, totals)
                seconds = time.perf_counter() - start
                journal.write({"step": step + 1, **line, "seconds": seconds})
                if (step + 1) % every == 0 and step + 1 < self.total:
                    self._save(step + 1)
            journal.draw()
            return journal.lines

    def _batches(self, step: int) -> list[Batch]:
        """This rank's parts of a step, on the CPU."""
        rank, ranks = self.accelerator.process_index, self.accelerator.num_processes
        batches = []
        for part in range(rank, self.parts, ranks):
            items = self.order.step(step, part, self.parts)
            chosen, seeds = [self.examples[i] for i, _ in items], [seed for _, seed in items]
            batches.append(self.task.collate(chosen, seeds))
        return batches

    def agree(self, batches: list[Batch], came: list[int]) -> tuple[dict[str, int], int]:
        """Over all ranks: labels of each loss and tokens of the step, and a signal that came."""
        names = batches[0].counts if batches else ()
        mine = {name: sum(batch.counts[name] for batch in batches) for name in names}
        mine["tokens"] = sum(batch.tokens.values.shape[0] for batch in batches)
        numbers = [*mine.values(), *(came.count(number) for number in _SIGNALS)]
        sums = self.accelerator.reduce(
            torch.tensor(numbers, device=self.accelerator.device), "sum"
        ).tolist()
        stop = next((n for n, count in zip(_SIGNALS, sums[len(mine) :], strict=True) if count), 0)
        return dict(zip(mine, sums, strict=False)), stop

    def _step(self, step: int, batches: list[Batch], totals: dict[str, int]) -> dict[str, Any]:
        """One update; returns the step's figures."""
        torch.manual_seed(mix(self.settings.seed, step, self.accelerator.process_index))
        rate = self.settings.rate(step, self.total)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        sums: dict[str, Tensor] = {}
        for i, batch in enumerate(batches):
            last = i == len(batches) - 1
            with nullcontext() if last else self.accelerator.no_sync(self.model):
                losses = _weighted(self.model(batch), batch.counts, totals)
                # Ranks' gradients are averaged, but their parts of the loss add up.
                loss = sum(losses.values()) * self.accelerator.num_processes
                self.accelerator.backward(loss)
            for name, value in losses.items():
                sums[name] = sums.get(name, 0) + value.detach()
        parts = self._reduced(sums)
        norm = self.accelerator.clip_grad_norm_(self.model.parameters(), self.settings.clip_norm)
        line = {"loss": sum(parts.values()), **(parts if len(parts) > 1 else {})}
        line |= {
            "learning_rate": rate,
            "norm": float(state.whole(norm)),
            "tokens": totals["tokens"],
        }
        self._check(step, line)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return line

    def _check(self, step: int, line: dict[str, Any]) -> None:
        """Stops before an update that would ruin the weights."""
        # A scaler meets infinite gradients as it looks for its scale, and skips the update.
        checked = ("loss",) if self.accelerator.scaler is not None else ("loss", "norm")
        for name in checked:
            if not math.isfinite(line[name]):
                what = "loss" if name == "loss" else "gradient's norm"
                raise FloatingPointError(
                    f"the {what} is {line[name]} at step {step + 1}: lower the learning rate; the "
                    f"weights were not changed, and {self.settings.output} keeps the last "
                    "checkpoint, if one was made"
                )

    def _reduced(self, sums: dict[str, Tensor]) -> dict[str, float]:
        """Losses summed over the ranks, on the host."""
        stacked = torch.stack([value.double() for value in sums.values()])
        return dict(zip(sums, self.accelerator.reduce(stacked, "sum").tolist(), strict=True))

    def _save(self, done: int) -> Path:
        scaler = self.accelerator.scaler  # of fp16's gradients
        scale = None if scaler is None else scaler.state_dict()
        facts = {**self.facts, "done": done, "scale": scale}
        inner = self.optimizer.optimizer
        return state.save(self.settings.output, self.task.model, inner, facts, self.main)

    def _interrupted(self, step: int, number: int) -> Interrupted:
        name = signal.Signals(number).name
        file = self._save(step) if step else None
        kept = f"resume from {file}" if file else "nothing was learned yet"
        return Interrupted(f"{name} after step {step}: {kept}", number)

    @torch.no_grad()
    def evaluate(self, examples: Sequence[Any]) -> dict[str, float]:
        """Mean losses over all examples, in eval mode; their random inputs are always the same.

        0 where no example has a label of a loss.
        """
        size = self.settings.batch_size
        rank, ranks = self.accelerator.process_index, self.accelerator.num_processes
        sums: dict[str, Tensor] = {}
        counts: dict[str, int] = {}
        self.model.eval()
        for start in range(0, len(examples), size):
            places = range(start, min(start + size, len(examples)))
            mine = places[rank::ranks]
            used = mine or places[:1]  # sharded weights want every rank to run as often
            seeds = [mix(self.settings.seed, place, 2) for place in used]
            batch = self.task.collate([examples[i] for i in used], seeds)
            for name, loss in self.model(batch.to(self.accelerator.device)).items():
                count = batch.counts[name] if mine else 0
                sums[name] = sums.get(name, 0) + loss.double() * count
                counts[name] = counts.get(name, 0) + count
        if not sums:
            return {}
        totals = torch.tensor([counts[name] for name in sums], device=self.accelerator.device)
        totals = self.accelerator.reduce(totals, "sum").tolist()
        parts = self._reduced(sums)
        means = {name: parts[name] / max(n, 1) for name, n in zip(parts, totals, strict=True)}
        return {"loss": sum(means.values()), **(means if len(means) > 1 else {})}

    def whole_model(self) -> PreTrainedModel:
        """The trained model, gathered where it was sharded; every rank calls."""
        model = self.task.model
        weights = {name: state.whole(w.detach()) for name, w in model.named_parameters()}
        if all(weights[name] is w for name, w in model.named_parameters()):
            return model.eval()
        fresh = type(model)(model.config)
        for name, weight in fresh.named_parameters():
            weight.data = weights[name]
        return fresh.eval()


def _weighted(
    means: dict[str, Tensor], counts: dict[str, int], totals: dict[str, int]
) -> dict[str, Tensor]:
    """This part's share of the step's mean of each loss; none where it has no label of it."""
    return {
        name: mean * (counts[name] / totals[name]) if counts[name] else 0.0 * mean.nan_to_num()
        for name, mean in means.items()
    }


def _accelerator(settings: Settings) -> Any:
    try:
        from accelerate import Accelerator
        from accelerate.state import AcceleratorState
    except ModuleNotFoundError as missing:
        message = "training needs accelerate: pip install 'bertgpt[train]'"
        raise ModuleNotFoundError(message, name="accelerate") from missing
    known = AcceleratorState._shared_state  # accelerate settles the precision once a process
    if known and AcceleratorState().mixed_precision != settings.precision:
        AcceleratorState._reset_state()
    accelerator = Accelerator(cpu=settings.cpu, mixed_precision=settings.precision)
    _prepare_sharding(getattr(accelerator.state, "fsdp_plugin", None))
    return accelerator


def _prepare_sharding(plugin: Any) -> None:
    """Makes an FSDP plugin, if there is one, fit these models.

    Raises:
        ValueError: it asks for FSDP's first version.
    """
    if plugin is None:
        return
    if plugin.fsdp_version != 2:
        raise ValueError("weights are sharded by FSDP2 here: launch with --fsdp_version 2")
    # It would read the weights back by state_dict's names, which are not the parameters' here;
    # and every rank has them already.
    plugin.cpu_ram_efficient_loading = False


@contextmanager
def _signals() -> Iterator[list[int]]:
    """Collects SIGINT and SIGTERM; a second one acts as if this were not here."""
    came: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield came
        return

    def note(number: int, _: Any) -> None:
        came.append(number)
        signal.signal(number, before[number])

    before: dict[int, Any] = {number: signal.signal(number, note) for number in _SIGNALS}
    try:
        yield came
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
