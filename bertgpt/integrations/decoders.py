"""Decoders without a head: the models whose own forward runs the blocks, one after the other."""

from __future__ import annotations

import inspect
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, DynamicCache
from transformers.modeling_outputs import (
    BaseModelOutput,
    BaseModelOutputWithPast,
    BaseModelOutputWithPastAndCrossAttentions,
    ModelOutput,
)

from bertgpt.integrations.blocks import Mask, Patched
from bertgpt.integrations.inspection import (
    collecting,
    obstacle,
    obstacle_below,
    refuse_head_mask,
)
from bertgpt.integrations.padding import Packing, may_pack
from bertgpt.integrations.versions import CACHE

# What the packed pass knows; where anything else is asked for, stock's forward runs.
_KNOWN = {
    "input_ids",
    CACHE,
    "attention_mask",
    "token_type_ids",
    "position_ids",
    "inputs_embeds",
    "use_cache",
    "return_dict",
}


@cache
def _signature(forward: Any) -> inspect.Signature:
    """Looked up once: stock's forward lies under several decorators, and every token calls it."""
    return inspect.signature(forward)


class GPT2Model(Patched):
    """Takes padding out before the first block."""

    output_class: type[ModelOutput] = BaseModelOutputWithPastAndCrossAttentions

    def tables(self) -> tuple[nn.Module, nn.Module]:
        """The embeddings of words and of positions."""
        return self.wte, self.wpe

    def last_norm(self) -> nn.Module | None:
        """What follows the last block."""
        return self.ln_f

    def through(self, block: Any, x: Tensor, past: Cache | None, mask: Mask) -> Tensor:
        """One block, called as stock's forward calls it."""
        return block(x, past, mask)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the stock model computes, except that padding comes out as zeros.

        Where something looks at the blocks in between, where a block is stock, where the cache
        holds tokens already, and in graphs of fixed shapes, the tokens go through padded.
        """
        refuse_head_mask(kwargs)
        # A compiler must not look at what follows.
        if not torch.compiler.is_compiling():
            stock: Any = super().forward
            call = _signature(stock.__func__).bind(self, *args, **kwargs).arguments
            call |= call.pop("kwargs", {})
            del call["self"]
            given = {name: value for name, value in call.items() if value is not None}
            output = self._forward_packed(given)
            if output is not None:
                return output
        return super().forward(*args, **kwargs)

    def _forward_packed(self, given: dict[str, Any]) -> Any:
        """The output where the tokens can go packed; None where they cannot."""
        if any(value is not False for name, value in given.items() if name not in _KNOWN):
            return None
        if ("input_ids" in given) == ("inputs_embeds" in given):
            return None  # for stock code to refuse
        padded: Any = given.get("input_ids", given.get("inputs_embeds"))
        past: Any = given.get(CACHE)
        mask: Any = given.get("attention_mask")
        if not self._may_pack(padded, mask, past):
            return None
        use_cache = given.get("use_cache", getattr(self.config, "use_cache", False))
        if getattr(self, "gradient_checkpointing", False) and self.training:
            use_cache, past = False, None
        if use_cache and past is None and CACHE in self.output_class.__annotations__:
            past = DynamicCache(config=self.config)
        packing = Packing.of(padded, mask != 0, column_0=False)
        x = self._embed(padded, given.get("position_ids"), given.get("token_type_ids"))
        x = packing.enter(x)
        for block in self.h:
            x = self.through(block, x, past, packing)
        norm = self.last_norm()
        hidden = packing.leave(x if norm is None else norm(x))
        kept = {CACHE: past} if use_cache and past is not None else {}
        output = self.output_class(last_hidden_state=hidden, **kept)
        return output if given.get("return_dict", self.config.return_dict) else output.to_tuple()

    def _may_pack(self, padded: Tensor, mask: Any, past: Cache | None) -> bool:
        if not isinstance(mask, Tensor) or mask.shape != padded.shape[:2] or not may_pack(padded):
            return False
        if self.config.output_hidden_states or self.config.output_attentions or collecting():
            return False
        if past is not None and (not isinstance(past, Cache) or bool(past.get_seq_length())):
            return False
        if any(not isinstance(block, Patched) or block.obstacles() for block in self.h):
            return False
        norm = self.last_norm()
        if obstacle_below(self.h) or (norm is not None and obstacle(norm)):
            return False
        return not bool(mask.all())

    def _embed(self, padded: Tensor, positions: Tensor | None, types: Tensor | None) -> Tensor:
        """Embeddings `[B, L, E]`: padded, since they cost no products and may have hooks."""
        words, places = self.tables()
        if positions is None:
            positions = torch.arange(padded.shape[1], device=padded.device)[None]
        x = (words(padded) if padded.ndim == 2 else padded) + places(positions)
        if types is not None:
            x = x + words(types.view(-1, padded.shape[1]))
        return self.drop(x)


class GPTNeoModel(GPT2Model):
    """Its blocks return tuples, and name the cache otherwise."""

    output_class = BaseModelOutputWithPast

    def through(self, block: Any, x: Tensor, past: Cache | None, mask: Mask) -> Tensor:
        """One block, called as stock's forward calls it."""
        return block(x, layer_past=past, attention_mask=mask)[0]

    def _may_pack(self, padded: Tensor, mask: Any, past: Cache | None) -> bool:
        """Not with padding between tokens: a window counts it in stock code."""
        if not super()._may_pack(padded, mask, past):
            return False
        edges = nn.functional.pad((mask != 0).int(), (1, 1)).diff(dim=1)
        return not bool((edges.abs().sum(1) > 2).any())


class OpenAIGPTModel(GPT2Model):
    """Without a cache, and without a last norm."""

    output_class = BaseModelOutput

    def tables(self) -> tuple[nn.Module, nn.Module]:
        """The embeddings of words and of positions."""
        return self.tokens_embed, self.positions_embed

    def last_norm(self) -> nn.Module | None:
        """The last block ends with a norm of its own."""
        return None

    def through(self, block: Any, x: Tensor, past: Cache | None, mask: Mask) -> Tensor:
        """One block, called as stock's forward calls it."""
        return block(x, mask)[0]
