"""The classes that patching gives to live modules, each a subclass of a stock class.

They bear the stock class's name, so that what goes by names (sharding policies, `architectures` in
a saved config) finds them, and live here, so that a pickle finds them again.
"""

from __future__ import annotations

import inspect
from functools import cache
from importlib import import_module
from typing import Any

from torch import nn
from transformers import PreTrainedModel
from transformers.utils import output_capturing

from bertgpt.integrations import decoders, encoder_blocks, gpt_blocks
from bertgpt.integrations import encoder_families as families
from bertgpt.integrations.blocks import Patched

# Stock class, by name: its module, and what goes before it.
_KNOWN: dict[str, tuple[str, type[Patched]]] = {
    "TransformerBlock": ("distilbert", families.DistilBertLayer),
    "Transformer": ("distilbert", encoder_blocks.Encoder),
    "AlbertLayer": ("albert", families.AlbertLayer),
    "AlbertTransformer": ("albert", families.AlbertEncoder),
    "MPNetLayer": ("mpnet", families.MPNetLayer),
    "MPNetEncoder": ("mpnet", families.MPNetEncoder),
    "GPT2Block": ("gpt2", gpt_blocks.GPT2Block),
    "GPT2Model": ("gpt2", decoders.GPT2Model),
    "GPTNeoBlock": ("gpt_neo", gpt_blocks.GPTNeoBlock),
    "GPTNeoModel": ("gpt_neo", decoders.GPTNeoModel),
    "Block": ("openai", gpt_blocks.OpenAIGPTBlock),
    "OpenAIGPTModel": ("openai", decoders.OpenAIGPTModel),
}
for _module, _prefix in (
    ("bert", "Bert"),
    ("camembert", "Camembert"),
    ("electra", "Electra"),
    ("ernie", "Ernie"),
    ("roberta", "Roberta"),
    ("xlm_roberta", "XLMRoberta"),
):
    _KNOWN[f"{_prefix}Layer"] = (_module, encoder_blocks.BertLayer)
    _KNOWN[f"{_prefix}Encoder"] = (_module, encoder_blocks.Encoder)

MODELS = tuple(sorted({module for module, _ in _KNOWN.values()}))


def patched_class(stock: type[nn.Module]) -> type[Patched] | None:
    """The class that stands for `stock`; None for a class that is not known."""
    known = _KNOWN.get(stock.__name__)
    if known is None or stock.__module__ != _home(known[0]):
        return None
    return _made(stock.__name__)


def stock_class(patched: type[nn.Module]) -> type[nn.Module] | None:
    """The stock class that `patched` stands for; None for a class that was not made here."""
    if not issubclass(patched, Patched) or patched.__module__ != __name__:
        return None
    return getattr(import_module(_home(_KNOWN[patched.__name__][0])), patched.__name__)


def __getattr__(name: str) -> Any:
    if name not in _KNOWN:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return _made(name)


def _home(module: str) -> str:
    return f"transformers.models.{module}.modeling_{module}"


@cache
def _made(name: str) -> type[Patched]:
    module, before = _KNOWN[name]
    stock = getattr(import_module(_home(module)), name)
    made = type(name, (before, stock), {"__doc__": stock.__doc__})
    if issubclass(stock, PreTrainedModel):
        # Kept by the class's text, which is another here.
        registry = output_capturing._CAN_RECORD_REGISTRY
        dict.__setitem__(registry, str(made), stock._can_record_outputs)
        _show_signature(made, stock)
    return made


def _show_signature(made: type[Patched], stock: type[nn.Module]) -> None:
    """What picks arguments by the model's signature must find stock's."""
    forward = made.forward

    def _forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        return forward(self, *args, **kwargs)

    _forward.__signature__ = inspect.signature(stock.forward)  # type: ignore[attr-defined]
    made.forward = _forward
