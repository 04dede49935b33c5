"""A model's configuration: its fields, its file, and the refusal of what no model here does."""

from __future__ import annotations

import copy
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, ClassVar, TypeVar

from bertgpt import checkpoint
from bertgpt.layers import ACTIVATIONS
from bertgpt.ops.attention import MAX_HEAD_DIM

Config = TypeVar("Config", bound="PretrainedConfig")
PathLike = str | os.PathLike[str]


@dataclass(init=False, eq=False)
class PretrainedConfig:
    """Fields common to all families, under Hugging Face's names and with its defaults.

    Keys that are not fields are kept as attributes and written back, so that a folder that passes
    through here loses nothing.
    """

    model_type: ClassVar[str] = ""
    attribute_map: ClassVar[dict[str, str]] = {}

    architectures: list[str] | None = None
    output_hidden_states: bool = False
    output_attentions: bool = False
    return_dict: bool = True
    problem_type: str | None = None
    id2label: dict[int, str] | None = None
    label2id: dict[str, int] | None = None
    tie_word_embeddings: bool = True
    initializer_range: float = 0.02

    def __init__(self, **values: Any) -> None:
        for known in fields(self):
            setattr(self, known.name, copy.copy(values.pop(known.name, known.default)))
        self._unknown: list[str] = []
        labels = values.pop("num_labels", None)
        for name, value in values.items():
            if name.startswith("__"):
                raise ValueError(f"{name!r} is no field of a configuration")
            if name not in ("model_type", *self.attribute_map):
                self._unknown.append(name)
            setattr(self, name, value)
        if self.id2label is not None:
            if not isinstance(self.id2label, Mapping):
                raise ValueError(f"id2label must map class numbers to names, not {self.id2label!r}")
            try:
                self.id2label = {int(i): name for i, name in self.id2label.items()}
            except ValueError:
                wanted = "must map class numbers to names"
                raise ValueError(f"id2label {wanted}, not {self.id2label!r}") from None
        if labels is not None and labels != self.num_labels:
            self.num_labels = labels

    def __setattr__(self, name: str, value: Any) -> None:
        if name != "model_type":
            super().__setattr__(self.attribute_map.get(name, name), value)

    def __getattr__(self, name: str) -> Any:
        if name in type(self).attribute_map:
            return getattr(self, type(self).attribute_map[name])
        raise AttributeError(f"{type(self).__name__} has no field {name!r}")

    @property
    def stored_layers(self) -> Any:
        """Number of layers that have weights of their own."""
        return self.num_hidden_layers

    @property
    def num_labels(self) -> int:
        """Number of classes, 2 unless labels are named."""
        return 2 if self.id2label is None else len(self.id2label)

    @num_labels.setter
    def num_labels(self, count: int) -> None:
        if not isinstance(count, int) or isinstance(count, bool) or count < 1:
            raise ValueError(f"num_labels must be a number of classes, not {count!r}")
        self.id2label = {i: f"LABEL_{i}" for i in range(count)}
        self.label2id = {name: i for i, name in self.id2label.items()}

    @classmethod
    def from_dict(cls: type[Config], values: Mapping[str, Any], **overrides: Any) -> Config:
        """A configuration from Hugging Face's keys; `overrides` win.

        Raises:
            ValueError: the keys say that they belong to another kind of model.
        """
        kind = values.get("model_type", cls.model_type)
        for named in (cls, *cls.__subclasses__()):  # a family may go by several names
            if named.model_type == kind:
                return named(**{**values, **overrides})
        raise ValueError(f"this config's model_type is {kind!r}, not {cls.model_type!r}")

    def to_dict(self) -> dict[str, Any]:
        """Every field and every unknown key, ready for config.json."""
        names = [known.name for known in fields(self)] + self._unknown
        values = {name: copy.deepcopy(getattr(self, name)) for name in names}
        if self.id2label is None:
            del values["id2label"], values["label2id"]
        return {**values, "model_type": self.model_type}

    @classmethod
    def from_pretrained(cls: type[Config], path_or_id: PathLike, **overrides: Any) -> Config:
        """Reads config.json of a folder or a hub model.

        Raises:
            FileNotFoundError: there is none.
            ValueError: it is broken or of another kind of model.
        """
        file = checkpoint.resolve_folder(path_or_id) / checkpoint.CONFIG
        values = checkpoint.read_json(file, "it is needed to know the model's shape")
        try:
            return cls.from_dict(values, **overrides)
        except ValueError as error:
            raise ValueError(f"{file}: {error}") from error

    def save_pretrained(self, path: PathLike) -> None:
        """Writes config.json into a folder, made if absent."""
        Path(path).mkdir(parents=True, exist_ok=True)
        checkpoint.write_config(Path(path), self.to_dict())


_GIVEN = object()  # stands for an argument too large to print


def require(condition: bool, field: str, value: Any, instead: str) -> None:
    """Refuses a configuration or argument by name.

    Raises:
        ValueError: `condition` is False.
    """
    if not condition:
        shown = f"{field}={value!r}" if value is not _GIVEN else field
        raise ValueError(f"{shown} is not something bertgpt does: {instead}")


def refuse(instead: str, **arguments: Any) -> None:
    """Raises ValueError for any argument that is given and not False."""
    for name, value in arguments.items():
        given = value is not None and value is not False
        require(not given, name, _GIVEN, instead)


_MAY_BE_ZERO = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "type_vocab_size")
_NOT_DONE = {
    "quantization_config": "load full-precision weights",
    "pruned_heads": "load a checkpoint with all its heads",
    "is_encoder_decoder": "these models are one stack",
    "chunk_size_feed_forward": "leave it 0, the feed-forward layer is fused",
}


def _check_numbers(config: Any) -> None:
    """Sizes, probabilities, and the other reals, which are all magnitudes, lie in their ranges."""
    for known in fields(config):
        value = getattr(config, known.name)
        kind, _, optional = str(known.type).partition(" | ")
        if known.name.endswith("_token_id") or (optional == "None" and value is None):
            continue
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if kind == "int":
            least = 0 if known.name in _MAY_BE_ZERO else 1
            whole = number and isinstance(value, int) and value >= least
            require(whole, known.name, value, f"it must be an integer of {least} or more")
        elif kind == "float" and known.name.endswith(("_prob", "_pdrop", "dropout")):
            probable = number and 0.0 <= value <= 1.0
            require(probable, known.name, value, "it must be a probability, from 0 to 1")
        elif kind == "float":
            magnitude = number and 0.0 <= value < math.inf
            require(magnitude, known.name, value, "it must be a finite number, not negative")


def check_shapes(
    config: Any,
    width: int,
    heads: int,
    activation_field: str,
    activations: Mapping[str, str] = ACTIVATIONS,
) -> None:
    """Refuses what no model here does.

    Raises:
        ValueError: a size is no positive integer, a probability or epsilon no such number, the
            width does not split into heads of at most 256, the activation has no op, or the config
            asks for something else that is not done here.
    """
    _check_numbers(config)
    for field in ("tie_word_embeddings", "output_hidden_states", "return_dict"):
        value = getattr(config, field)
        require(isinstance(value, bool), field, value, "it must be true or false")
    _check_tokens(config)
    for field, instead in _NOT_DONE.items():
        value = getattr(config, field, None)
        require(not value, field, value, instead)
    require(
        heads > 0 and width % heads == 0,
        "num_attention_heads",
        heads,
        f"it must divide hidden_size, {width}",
    )
    require(
        width // heads <= MAX_HEAD_DIM,
        "num_attention_heads",
        heads,
        f"heads of {width // heads} are too wide for the kernels, {MAX_HEAD_DIM} is the most",
    )
    activation = getattr(config, activation_field)
    require(
        isinstance(activation, str) and activation in activations,
        activation_field,
        activation,
        f"choose one of {', '.join(activations)}",
    )
    crosses = getattr(config, "add_cross_attention", False)
    require(not crosses, "add_cross_attention", True, "models attend to self")
    require(
        not config.output_attentions,
        "output_attentions",
        True,
        "fused attention never forms the weights; use transformers to look at them",
    )


def _check_tokens(config: Any) -> None:
    """Padding and stop tokens are ids."""
    padding = config.pad_token_id
    require(padding is None or _is_id(padding), "pad_token_id", padding, "it must be a token id")
    stops = getattr(config, "eos_token_id", None)
    known = stops is None or all(map(_is_id, stops if isinstance(stops, list) else [stops]))
    require(known, "eos_token_id", stops, "it must be a token id or a list of them")


def _is_id(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
