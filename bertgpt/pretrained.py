"""What every model shares: a configuration, fresh weights, and loading and saving both."""

from __future__ import annotations

import copy
import math
import os
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import torch
from torch import nn

from bertgpt import checkpoint
from bertgpt.layers import ACTIVATIONS, AddNorm
from bertgpt.ops.attention import MAX_HEAD_DIM

Config = TypeVar("Config", bound="PretrainedConfig")
Model = TypeVar("Model", bound="PreTrainedModel")
PathLike = str | os.PathLike[str]


@dataclass(init=False, eq=False)
class PretrainedConfig:
    """Fields common to both families, under Hugging Face's names and with its defaults.

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
        if kind != cls.model_type:
            raise ValueError(f"this config's model_type is {kind!r}, not {cls.model_type!r}")
        return cls(**{**values, **overrides})

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


_MAY_BE_ZERO = ("num_hidden_layers", "n_layer", "type_vocab_size")
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
        elif kind == "float" and known.name.endswith(("_prob", "_pdrop", "_dropout")):
            probable = number and 0.0 <= value <= 1.0
            require(probable, known.name, value, "it must be a probability, from 0 to 1")
        elif kind == "float":
            magnitude = number and 0.0 <= value < math.inf
            require(magnitude, known.name, value, "it must be a finite number, not negative")


def check_shapes(config: Any, width: int, heads: int, activation_field: str) -> None:
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
        isinstance(activation, str) and activation in ACTIVATIONS,
        activation_field,
        activation,
        f"choose one of {', '.join(ACTIVATIONS)}",
    )
    require(not config.add_cross_attention, "add_cross_attention", True, "models attend to self")
    require(
        not config.output_attentions,
        "output_attentions",
        True,
        "fused attention never forms the weights; use transformers to look at them",
    )


def _check_tokens(config: Any) -> None:
    """Padding and stop tokens are ids; BERT's padding token has an embedding of its own."""
    padding, words = config.pad_token_id, config.vocab_size
    known = padding is None or (isinstance(padding, int) and not isinstance(padding, bool))
    require(known, "pad_token_id", padding, "it must be a token id")
    if config.model_type == "bert" and padding is not None:
        require(-words <= padding < words, "pad_token_id", padding, f"the vocabulary has {words}")
    stops = getattr(config, "eos_token_id", None)
    listed = stops if isinstance(stops, list) else [0 if stops is None else stops]
    ids = all(isinstance(stop, int) and not isinstance(stop, bool) for stop in listed)
    require(ids, "eos_token_id", stops, "it must be a token id or a list of them")


class PreTrainedModel(nn.Module):
    """Base of all models: weights made, tied, loaded and saved as transformers does.

    Attributes:
        config_class: its configuration's class.
        base_model_prefix: name of the headless model inside a headed one.
        tied_weights: Hugging Face names that share another name's tensor when
            `config.tie_word_embeddings`.
    """

    config_class: ClassVar[type[PretrainedConfig]] = PretrainedConfig
    base_model_prefix: ClassVar[str] = ""
    tied_weights: ClassVar[dict[str, str]] = {}

    def __init__(self, config: Any) -> None:
        if not isinstance(config, self.config_class):
            raise TypeError(
                f"{type(self).__name__} takes a {self.config_class.__name__}, "
                f"not {type(config).__name__}"
            )
        super().__init__()
        self.config = config

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """The weights' dtype."""
        return next(self.parameters()).dtype

    @property
    def base_model(self) -> Any:
        """The headless model inside, or this one."""
        return getattr(self, self.base_model_prefix, self)

    def get_input_embeddings(self) -> nn.Embedding:
        """The word embeddings."""
        return self.base_model.embeddings.word_embeddings

    def tie_weights(self) -> None:
        """Makes tied weights one tensor again (a head with such weights says how)."""

    def post_init(self) -> None:
        """Fills all weights in as Hugging Face does, and ties them."""
        made = f"{self.base_model_prefix}."  # the headless model inside has filled itself in
        self._initialise({n for n, _ in self.named_parameters() if not n.startswith(made)})
        self.tie_weights()

    def _standard_deviation(self, name: str) -> float:
        return self.config.initializer_range

    @torch.no_grad()
    def _initialise(self, names: set[str]) -> None:
        """Normal weights; zero biases and padding words; LayerNorms that change nothing."""
        for path, module in self.named_modules():
            for name, weight in module.named_parameters(recurse=False):
                full = f"{path}.{name}" if path else name
                if full not in names:
                    continue
                if name.endswith("bias"):
                    weight.zero_()
                elif isinstance(module, AddNorm):
                    weight.fill_(1.0)
                else:
                    weight.normal_(0.0, self._standard_deviation(full))
                if isinstance(module, nn.Embedding) and module.padding_idx is not None:
                    weight[module.padding_idx].zero_()

    @classmethod
    def from_pretrained(
        cls: type[Model],
        path_or_id: PathLike,
        *,
        allow_pickle: bool = False,
        dtype: torch.dtype | str | None = None,
        config: PretrainedConfig | None = None,
        **overrides: Any,
    ) -> Model:
        """Loads a Hugging Face folder or hub model, on the CPU and in eval mode.

        Weights that the checkpoint's kind of model does not have (a new task head, BERT's pooler)
        start fresh, with a warning that names them; so are weights of the model's body that the
        config has no place for (surplus layers) named, and left out.

        Args:
            path_or_id: a folder with config.json and model.safetensors (or shards and their index),
                or a hub id, for which huggingface_hub must be installed.
            allow_pickle: whether pytorch_model.bin may be opened where there is no safetensors.
            dtype: the weights' dtype or its name; by default ("auto") that of the checkpoint.
            config: used instead of the folder's.
            **overrides: config fields to change, such as `num_labels=3`.

        Raises:
            FileNotFoundError: no folder, config.json, weights or shard.
            ValueError: a file is broken, its tensors do not fit the config, some are missing, or
                the config asks for what bertgpt does not do.
            TypeError: an override is no field of the config, or `dtype` is no dtype of weights.
        """
        dtype = checkpoint.as_dtype(dtype)
        folder = checkpoint.resolve_folder(path_or_id, allow_pickle=allow_pickle)
        known = {known.name for known in fields(cls.config_class)} | {"num_labels"}
        odd = sorted(set(overrides) - known - set(cls.config_class.attribute_map))
        if odd:
            raise TypeError(f"{odd[0]!r} is no field of {cls.config_class.__name__}")
        if config is not None and (overrides or not isinstance(config, cls.config_class)):
            given = ", ".join(overrides) or type(config).__name__
            raise TypeError(f"config must be a {cls.config_class.__name__} and alone, not {given}")
        if config is None:
            config = cls.config_class.from_pretrained(folder, **overrides)
        stored = checkpoint.read_headers(folder, allow_pickle=allow_pickle)
        if config.tie_word_embeddings and checkpoint.tie_broken(stored, cls.tied_weights):
            config.tie_word_embeddings = False  # as transformers: what is stored apart stays apart
        tied = cls.tied_weights if config.tie_word_embeddings else {}
        if isinstance(config.num_hidden_layers, int):  # if not, the model says so
            checkpoint.check_depth(stored, config.num_hidden_layers)
        with torch.device("meta"):
            model = cls(config)
        found, missing, surplus = checkpoint.match_names(
            stored, model.state_dict(), f"{cls.base_model_prefix}.", tied
        )
        if surplus:
            warnings.warn(
                f"{folder} holds {', '.join(surplus)}, for which {checkpoint.CONFIG} makes no "
                "place: they are left out",
                stacklevel=2,
            )
        if dtype is None:
            dtype = next((entry.dtype for entry in found.values()), torch.float32)
        model = model.to(dtype).to_empty(device="cpu")
        model.tie_weights()
        unfilled = model.load_state_dict(checkpoint.read_tensors(found), strict=False)
        if missing:
            model._initialise(set(unfilled.missing_keys) - set(tied))
            warnings.warn(
                f"{folder} has no weights for {', '.join(missing)}: they start fresh, train them "
                "before use",
                stacklevel=2,
            )
        return model.eval()

    def save_pretrained(self, path: PathLike) -> None:
        """Writes config.json and model.safetensors, which stock transformers loads.

        Args:
            path: the folder, made if absent.
        """
        tied = self.tied_weights if self.config.tie_word_embeddings else {}
        state = {name: t for name, t in self.state_dict().items() if name not in tied}
        values = self.config.to_dict()
        values.pop("torch_dtype", None)
        values["dtype"] = str(self.dtype).removeprefix("torch.")
        values["architectures"] = [type(self).__name__]
        checkpoint.write_folder(Path(path), values, state)

    def _wants_layers(self, output_hidden_states: bool | None) -> bool:
        asked = output_hidden_states
        return self.config.output_hidden_states if asked is None else bool(asked)

    def _finish(self, output: Any, return_dict: bool | None) -> Any:
        wanted = self.config.return_dict if return_dict is None else return_dict
        return output if wanted else output.to_tuple()
