"""Models of whatever family a folder's config.json names."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Any

from bertgpt import checkpoint
from bertgpt.configuration import PathLike

_LANGUAGE_MODELS = {
    "gpt2": ("bertgpt.gpt", "GPT2LMHeadModel"),
    "openai-gpt": ("bertgpt.openai_gpt", "OpenAIGPTLMHeadModel"),
    "gpt_neo": ("bertgpt.gpt_neo", "GPTNeoForCausalLM"),
}
_ENCODERS = {
    "bert": ("bertgpt.bert", "Bert"),
    "roberta": ("bertgpt.roberta", "Roberta"),
    "xlm-roberta": ("bertgpt.roberta", "Roberta"),
    "camembert": ("bertgpt.roberta", "Roberta"),
    "albert": ("bertgpt.albert", "Albert"),
    "distilbert": ("bertgpt.distilbert", "DistilBert"),
    "ernie": ("bertgpt.ernie", "Ernie"),
}


def load_language_model(path_or_id: PathLike, **options: Any) -> Any:
    """Loads a folder or hub model with the class that its config.json calls for.

    Args:
        path_or_id: as in `PreTrainedModel.from_pretrained`.
        **options: that method's.

    Raises:
        FileNotFoundError: there is no config.json.
        ValueError: it is of no family that writes text; the rest is `from_pretrained`'s.
    """
    folder = checkpoint.resolve_folder(path_or_id)
    module, name = _named(folder, _LANGUAGE_MODELS, None, "text is written by")
    return getattr(import_module(module), name).from_pretrained(folder, **options)


def encoder_class(path_or_id: PathLike, head: str = "Model") -> Any:
    """The class for a folder or hub model of BERT or a family like it, as its config.json says.

    Args:
        path_or_id: as in `PreTrainedModel.from_pretrained`, which the class has.
        head: what follows the family's name: "Model", or such as "ForTokenClassification".

    Raises:
        FileNotFoundError: there is no config.json.
        ValueError: it is of no such family, or the family has no such head.
    """
    folder = checkpoint.resolve_folder(path_or_id)
    module, family = _named(folder, _ENCODERS, "bert", "encoders are")  # old BERTs do not say
    found = getattr(import_module(module), f"{family}{head}", None)
    if found is None:
        raise ValueError(f"{family} has no {head}; see {module}.__all__ for what it has")
    return found


def _named(
    folder: Path, known: dict[str, tuple[str, str]], usual: str | None, those: str
) -> tuple[str, str]:
    """What is known of a folder's family, the `usual` one where it names none."""
    file = folder / checkpoint.CONFIG
    values = checkpoint.read_json(file, "it is needed to know the kind of model")
    kind = values.get("model_type", usual)
    if not isinstance(kind, str) or kind not in known:
        raise ValueError(f"{file}: model_type is {kind!r}; {those} {', '.join(known)}")
    return known[kind]
