"""BERT's families for their tests: classes and configurations of odd sizes, and inputs for each."""

import torch
from models import ragged_mask, random_ids, twins

import bertgpt

COMMON = {
    "vocab_size": 61,
    "hidden_size": 21,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "intermediate_size": 37,
    "max_position_embeddings": 20,
    "initializer_range": 0.3,  # large enough for heads, positions and masks to matter
}
CONFIGS = {
    "Roberta": {
        **COMMON,
        "pad_token_id": 2,
        "layer_norm_eps": 1e-5,
        "hidden_act": "gelu_new",  # which the head for words does not follow
    },
    "Albert": {
        **COMMON,
        "embedding_size": 10,
        "num_hidden_layers": 5,  # by turns: the first group thrice, the second twice
        "num_hidden_groups": 2,
        "inner_group_num": 2,
    },
    "DistilBert": {
        "vocab_size": 61,
        "max_position_embeddings": 20,
        "n_layers": 2,
        "n_heads": 3,
        "dim": 21,
        "hidden_dim": 37,
        "initializer_range": 0.3,
    },
    "Ernie": {**COMMON, "use_task_id": True, "task_type_vocab_size": 4},
}
BODIES = [f"{family}Model" for family in CONFIGS]
WORDS = [f"{family}ForMaskedLM" for family in CONFIGS]
TOKENS = [f"{family}ForTokenClassification" for family in CONFIGS]
SEQUENCES = [f"{family}ForSequenceClassification" for family in CONFIGS]
CHOICES = [f"{family}ForMultipleChoice" for family in CONFIGS]
SPANS = [f"{family}ForQuestionAnswering" for family in CONFIGS]
PAIRS = ["AlbertForPreTraining", "ErnieForPreTraining"]
NEXT = "ErnieForNextSentencePrediction"
NAMES = [*BODIES, *WORDS, *TOKENS, *SEQUENCES, *CHOICES, *SPANS, *PAIRS, NEXT]


def family_of(name):
    """The family that a class belongs to."""
    return next(family for family in CONFIGS if name.startswith(family))


def family_twins(name, **extra):
    """Our model and the stock one with the same random weights, and classes where it has any."""
    if name in TOKENS + SEQUENCES:
        extra = {"num_labels": 3, **extra}
    model, stock = twins(bertgpt, name, {**CONFIGS[family_of(name)], **extra})
    with torch.no_grad():
        for weight in stock.parameters():
            if weight.ndim == 1:  # biases and norms, which start as if they were not there
                weight.add_(0.3 * torch.randn_like(weight))
    model.load_state_dict(stock.state_dict())
    return model, stock


def beside(name, *shape):
    """Random type ids of the kinds that a class takes."""
    ids = {}
    if not name.startswith("DistilBert"):
        ids["token_type_ids"] = random_ids(*shape, low=0, high=2)
    if name.startswith("Ernie"):
        ids["task_type_ids"] = random_ids(*shape, low=0, high=4)
    return ids


def padded_inputs(name, side):
    """Four ragged rows as keyword arguments: ids (padding where no token is), mask and types."""
    mask = ragged_mask(side)
    padding = CONFIGS[family_of(name)].get("pad_token_id", 0)
    ids = random_ids(4, 12).masked_fill(mask == 0, padding)
    return {"input_ids": ids, "attention_mask": mask, **beside(name, 4, 12)}


def targets(name, mask):
    """Random labels of a class as keyword arguments, none at padding; 4 sequences, 2 examples."""
    if name in BODIES:
        return {}
    if name in SPANS:
        ends = torch.tensor([[2, 0, 7, 1], [3, 0, 99, 1]])  # 99 lies outside and is ignored
        return {"start_positions": ends[0], "end_positions": ends[1]}
    high = 3 if name in TOKENS else 61
    tokens = random_ids(4, 12, low=0, high=high).masked_fill(mask == 0, -100)
    if name in PAIRS:
        sentences = "sentence_order_label" if name.startswith("Albert") else "next_sentence_label"
        return {"labels": tokens, sentences: torch.tensor([0, 1, 1, 0])}
    if name in WORDS + TOKENS:
        return {"labels": tokens}
    return {"labels": torch.tensor([1, 0] if name in CHOICES else [0, 1, 1, 0])}


def as_choices(inputs):
    """Padded inputs of four rows as two examples of two choices.

    Stock wants task types without a dimension for the choices.
    """
    flat = {"task_type_ids"}
    return {k: v if k in flat else v.unflatten(0, (2, 2)) for k, v in inputs.items()}
