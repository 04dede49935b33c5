"""Stock transformers' BERT behind the packed door, so that one recipe and one loop train either."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import torch
import transformers
from torch import Tensor, nn

from bertgpt.bert import BertConfig
from bertgpt.objectives import IGNORE
from bertgpt.outputs import LogitsOutput, QuestionAnsweringOutput
from bertgpt.packing import PackedBatch, pad
from bertgpt.recipes.recipe import Recipe


class StockModel(nn.Module):
    """A stock model that takes a `PackedBatch`: it is padded on the right, as tokenizers do.

    Attributes:
        kind: its class in transformers, set by a subclass; it runs its default attention.
    """

    kind: ClassVar[Any]

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.stock = self.kind(transformers.BertConfig(**config.to_dict()))
        self.config = config

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.stock.device

    def forward(self, tokens: PackedBatch, return_dict: bool = True, **labels: Tensor) -> Any:
        """Packed scores and the loss, as our models give them."""
        mask_BL = pad(torch.ones_like(tokens.values), tokens)
        types = tokens.token_type_ids
        for name, values in labels.items():
            if values.shape == tokens.values.shape and name == "labels":
                labels[name] = pad(values, tokens, fill=IGNORE)
        output = self.stock(
            pad(tokens.values, tokens),
            attention_mask=mask_BL,
            token_type_ids=None if types is None else pad(types, tokens),
            **labels,
        )
        real_BL = mask_BL.bool()
        if hasattr(output, "start_logits"):
            start_T, end_T = output.start_logits[real_BL], output.end_logits[real_BL]
            return QuestionAnsweringOutput(output.loss, start_T, end_T)
        logits = output.logits if output.logits.ndim == 2 else output.logits[real_BL]
        return LogitsOutput(loss=output.loss, logits=logits)

    def save_pretrained(self, path: Path) -> None:
        """As stock writes it."""
        self.stock.save_pretrained(path)


def make_stock(recipe: Recipe) -> None:
    """Puts a stock model with the same weights in the place of a recipe's own."""
    ours = recipe.model
    name = type(ours).__name__
    stock = type(f"Stock{name}", (StockModel,), {"kind": getattr(transformers, name)})(ours.config)
    stock.stock.load_state_dict(ours.state_dict())
    recipe.model = stock
