"""Models for the end-to-end cases: ours and stock ones of the same random weights, and the oracle.

Weights are random, of the true shapes. Stock models come from transformers where it is installed;
without it there are no stock contenders, and our own model in float64 stands for the definition.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import nn

from bertgpt.benchmarks.case import importable

BERT = {
    "bert-base": {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12},
    "bert-large": {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16},
    "bert-mini": {
        "hidden_size": 256,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "vocab_size": 4000,
    },
    "bert-tiny": {
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "vocab_size": 500,
    },
}
GPT2 = {
    "gpt2-124M": {"n_embd": 768, "n_layer": 12, "n_head": 12},
    "gpt2-355M": {"n_embd": 1024, "n_layer": 24, "n_head": 16},
    "gpt2-tiny": {"n_embd": 64, "n_layer": 2, "n_head": 2, "vocab_size": 500, "n_positions": 128},
}
_BERT_PLAIN = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
_GPT2_PLAIN = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}


@dataclass(frozen=True)
class Spec:
    """Which model: a name above, the head on it, where and in which precision."""

    name: str
    head: str
    device: str
    dtype: torch.dtype

    @property
    def config(self) -> dict[str, Any]:
        """Its configuration, without dropout: the contenders' random numbers would differ."""
        if self.name in GPT2:
            ends = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
            return {**GPT2[self.name], **_GPT2_PLAIN, **ends}
        shape: dict[str, Any] = dict(BERT[self.name])
        return {**shape, "intermediate_size": 4 * shape["hidden_size"], **_BERT_PLAIN}

    @property
    def layers(self) -> int:
        """Number of layers."""
        return int(self.config.get("n_layer") or self.config["num_hidden_layers"])

    @property
    def width(self) -> int:
        """Hidden size."""
        return int(self.config.get("n_embd") or self.config["hidden_size"])

    @property
    def vocabulary(self) -> int:
        """Number of tokens."""
        return int(self.config.get("vocab_size", 50257 if self.name in GPT2 else 30522))


def has_transformers() -> bool:
    """Whether stock models can be built."""
    return importable("transformers")


# One model of each kind at a time: the large ones fill a GPU's memory.
@lru_cache(maxsize=1)
def ours(spec: Spec) -> nn.Module:
    """Our model, with the stock model's weights where there is one."""
    import bertgpt

    family = "GPT2" if spec.name in GPT2 else "Bert"
    config = getattr(bertgpt, f"{family}Config")(**spec.config)
    torch.manual_seed(0)
    model: nn.Module = getattr(bertgpt, spec.head)(config)
    if has_transformers():
        model.load_state_dict(stock(spec, "eager").state_dict())
    return model.to(spec.device, spec.dtype).eval()


@lru_cache(maxsize=2)
def stock(spec: Spec, attention: str) -> nn.Module:
    """Transformers' model with an attention implementation: "eager" or "sdpa"."""
    import transformers

    family = "GPT2" if spec.name in GPT2 else "Bert"
    config = getattr(transformers, f"{family}Config")(**spec.config)
    config._attn_implementation = attention
    torch.manual_seed(0)
    model: nn.Module = getattr(transformers, spec.head)(config)
    return model.to(spec.device, spec.dtype).eval()


@lru_cache(maxsize=2)
def definition(spec: Spec, dtype: torch.dtype) -> nn.Module:
    """The model that results are compared with, in float64 or in the contenders' precision."""
    plain = stock(spec, "eager") if has_transformers() else ours(spec)
    return plain if dtype == spec.dtype else copy.deepcopy(plain).to(dtype)


def matrix_flops(spec: Spec, tokens: float, pairs: float, scored: float = 0.0) -> float:
    """Operations of a forward pass.

    24 · E² a token and layer, 4 · E a visible pair of tokens and layer, and 2 · E · V for each
    token whose scores are wanted.
    """
    width = spec.width
    inside = spec.layers * (24.0 * width * width * tokens + 4.0 * width * pairs)
    return inside + 2.0 * width * spec.vocabulary * scored


def weight_bytes(spec: Spec, with_vocabulary: bool) -> float:
    """Bytes of the weights that a pass reads: 12 · E² a layer, and the vocabulary's matrix."""
    count = 12 * spec.layers * spec.width**2
    if with_vocabulary:
        count += spec.vocabulary * spec.width
    return float(count * spec.dtype.itemsize)
