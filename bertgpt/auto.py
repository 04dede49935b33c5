"""A language model of whatever family a folder's config.json names."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from bertgpt import checkpoint
from bertgpt.configuration import PathLike

_LANGUAGE_MODELS = {
    "gpt2": ("bertgpt.gpt", "GPT2LMHeadModel"),
    "openai-gpt": ("bertgpt.openai_gpt", "OpenAIGPTLMHeadModel"),
    "gpt_neo": ("bertgpt.gpt_neo", "GPTNeoForCausalLM"),
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
    file = folder / checkpoint.CONFIG
    kind = checkpoint.read_json(file, "it is needed to know the kind of model").get("model_type")
    if not isinstance(kind, str) or kind not in _LANGUAGE_MODELS:
        families = ", ".join(_LANGUAGE_MODELS)
        raise ValueError(f"{file}: model_type is {kind!r}; text is written by {families}")
    module, name = _LANGUAGE_MODELS[kind]
    return getattr(import_module(module), name).from_pretrained(folder, **options)
