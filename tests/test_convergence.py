"""The same training run here and in stock transformers: 32 steps, packed beside padded.

BERT learns masked words and the next sentence, GPT-2 the next token, from the same weights and
batches with AdamW, warm-up and decay, weight decay and clipping. What is learnt is a language of
arithmetic: each word follows from the one before, so the loss falls.
"""

import contextlib
from dataclasses import dataclass
from functools import cache

import pytest
import torch
from models import largest_difference, padded, twins

from bertgpt import bert, gpt, pack

STEPS, WARM_UP, ROWS, WORDS = 32, 4, 12, 211
CYCLE = 40  # words that the language uses
SEGMENT, MASK, IGNORE = 2, 3, -100  # ids of the language's two signs; words start at 5
FIRST_WORD = 5
TOP = 5
BERT = {
    "vocab_size": WORDS,
    "hidden_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 256,
    "max_position_embeddings": 64,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}
GPT2 = {
    "vocab_size": WORDS,
    "n_positions": 64,
    "n_embd": 96,
    "n_layer": 3,
    "n_head": 4,
    "resid_pdrop": 0.0,
    "embd_pdrop": 0.0,
    "attn_pdrop": 0.0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
FAMILIES = {"bert": (bert, "BertForPreTraining", BERT), "gpt2": (gpt, "GPT2LMHeadModel", GPT2)}


def text(first, length, step):
    """Words of which each is `step` further than the last, around the cycle."""
    return [FIRST_WORD + (first + i * step) % CYCLE for i in range(length)]


def rows_of(family, generator):
    """Ragged rows of ids and labels; for BERT also token types, and whether the rest follows."""

    def draw(low, high):
        return int(torch.randint(low, high, (), generator=generator))

    for _ in range(ROWS):
        step, length, first = draw(1, 4), draw(6, 40), draw(0, WORDS)
        if family == "gpt2":
            ids = text(first, length, step)
            yield {"ids": ids, "labels": ids}
            continue
        half, unrelated = length // 2, draw(0, 2)
        rest = text(draw(0, WORDS) if unrelated else first + half * step, length - half, step)
        ids = [*text(first, half, step), SEGMENT, *rest]
        chosen = torch.rand(len(ids), generator=generator) < 0.15
        chosen[0], chosen[half] = True, False  # one at least, and never the sign between
        yield {
            "ids": [MASK if c else word for word, c in zip(ids, chosen, strict=True)],
            "labels": [word if c else IGNORE for word, c in zip(ids, chosen, strict=True)],
            "types": [0] * (half + 1) + [1] * len(rest),
            "unrelated": unrelated,
        }


def batch_of(family, seed):
    """One batch for ours, packed, and for stock, padded on the right."""
    rows = list(rows_of(family, torch.Generator().manual_seed(seed)))
    ids, mask = padded([row["ids"] for row in rows])
    labels, _ = padded([row["labels"] for row in rows], fill=IGNORE)
    theirs = {"input_ids": ids, "attention_mask": mask, "labels": labels}
    types = None
    if family == "bert":
        types = [row["types"] for row in rows]
        theirs["token_type_ids"] = padded(types)[0]
        theirs["next_sentence_label"] = torch.tensor([row["unrelated"] for row in rows])
    batch = pack([row["ids"] for row in rows], token_type_ids=types)
    ours = {"input_ids": batch, "labels": labels[mask.bool()], "skip_logits": True}
    ours |= {k: theirs[k] for k in ("next_sentence_label",) if k in theirs}
    return ours, theirs


@dataclass
class Trained:
    """A run's losses `[STEPS]`, its weights under stock's names, and what it then predicts."""

    losses: torch.Tensor
    weights: dict
    log_probabilities: torch.Tensor  # of every word at each token of a batch that was not seen


@cache
def trained(family, mine, dtype=None):
    """Ours (`mine`) or stock after STEPS steps from the same weights, float32 or under autocast."""
    module, name, config = FAMILIES[family]
    torch.manual_seed(0)
    model = twins(module, name, config)[0 if mine else 1]
    cast = contextlib.nullcontext() if dtype is None else torch.autocast("cpu", dtype)
    weights = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim <= 1]
    groups = [{"params": weights, "weight_decay": 0.01}, {"params": others, "weight_decay": 0.0}]
    # A key's bias has no gradient but rounding, which a smaller eps would turn into whole steps.
    optimizer = torch.optim.AdamW(groups, lr=2e-3, eps=1e-6)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda i: min((i + 1) / WARM_UP, (STEPS - i) / (STEPS - WARM_UP))
    )
    losses = []
    model.train()
    for seed in range(STEPS):
        inputs = batch_of(family, seed)[0 if mine else 1]
        with cast:
            loss = model(**inputs).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
    _, unseen = batch_of(family, STEPS)
    with torch.no_grad():
        out = model.eval()(**{k: v for k, v in unseen.items() if "label" not in k})
    logits = out.prediction_logits if family == "bert" else out.logits
    kept = logits[unseen["attention_mask"].bool()]
    return Trained(torch.stack(losses), model.state_dict(), kept.log_softmax(-1))


@pytest.mark.parametrize("family", FAMILIES)
def test_32_steps_end_where_stocks_do(family):
    ours, stock = trained(family, True), trained(family, False)
    assert stock.losses[-4:].mean() <= stock.losses[:4].mean() - 0.3  # something was learnt
    assert largest_difference(ours.losses, stock.losses) <= 1e-4
    for name, weight in stock.weights.items():
        assert largest_difference(ours.weights[name], weight) <= 1e-3, name
    top = stock.log_probabilities.topk(TOP)
    assert largest_difference(ours.log_probabilities.topk(TOP).values, top.values) <= 1e-3
    theirs = ours.log_probabilities.gather(1, top.indices)  # of the same words, tied or not
    assert largest_difference(theirs, top.values) <= 1e-3


def root_mean_square(difference):
    return difference.float().square().mean().sqrt().item()


@pytest.mark.parametrize("family", FAMILIES)
def test_bfloat16_strays_no_further_than_stocks(family):
    """Under autocast, as close to stock's float32 run as stock's own bfloat16 run, times two.

    Two is the factor of the rule of accuracy: roundings that differ add up at random.
    """
    exact = trained(family, False)
    ours, stock = (trained(family, mine, torch.bfloat16) for mine in (True, False))
    for what in (
        lambda run: run.losses,
        lambda run: run.log_probabilities,
        lambda run: torch.cat([weight.flatten() for weight in run.weights.values()]),
    ):
        stray, spread = (root_mean_square(what(run) - what(exact)) for run in (ours, stock))
        assert 0 < stray <= 2 * spread
