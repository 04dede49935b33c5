"""What every model shares: fresh weights, and loading and saving them with a configuration."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

import torch
from torch import nn

from bertgpt import checkpoint
from bertgpt.configuration import PathLike, PretrainedConfig
from bertgpt.layers import AddNorm, Block

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

Model = TypeVar("Model", bound="PreTrainedModel")

# What transformers' from_pretrained takes besides, and how to ask for it here.
_OTHERWISE = {
    "torch_dtype": "it is called dtype",
    "device_map": "load the model, then move it with .to(device)",
    "attn_implementation": "attention is always bertgpt's; bertgpt.strict() keeps it on kernels",
    "ignore_mismatched_sizes": "save model.base_model and load that: the head starts fresh",
}


class PreTrainedModel(nn.Module):
    """Base of all models: weights made, tied, loaded and saved as transformers does.

    Attributes:
        config_class: its configuration's class.
        base_model_prefix: name of the headless model inside a headed one.
        supports_gradient_checkpointing: True, for a loop that asks.
        tied_weights: Hugging Face names that share another name's tensor when
            `config.tie_word_embeddings`.
        mesh: the ranks that `bertgpt.tensor_parallel` has split it over; None where it is whole.
    """

    config_class: ClassVar[type[PretrainedConfig]] = PretrainedConfig
    base_model_prefix: ClassVar[str] = ""
    supports_gradient_checkpointing: ClassVar[bool] = True
    tied_weights: ClassVar[dict[str, str]] = {}
    mesh: DeviceMesh | None = None

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

    def _apart(self, names: set[str]) -> set[str]:
        """Those of `names` whose parameter goes by no other name than these."""
        known = dict(self.named_parameters(remove_duplicate=False))
        others = {id(weight) for name, weight in known.items() if name not in names}
        return {name for name in names if id(known[name]) not in others}

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
            config: used instead of the folder's, and then without overrides.
            **overrides: config fields to change, such as `num_labels=3`.

        Raises:
            FileNotFoundError: no folder, config.json, weights or shard.
            ValueError: a file is broken, its tensors do not fit the config, some are missing, or
                the config asks for what bertgpt does not do.
            TypeError: an override is no field of the config or comes beside one, `config` is of
                another class, or `dtype` is no dtype of weights.
        """
        dtype = checkpoint.as_dtype(dtype)
        folder = checkpoint.resolve_folder(path_or_id, allow_pickle=allow_pickle)
        known = {known.name for known in fields(cls.config_class)} | {"num_labels"}
        odd = sorted(set(overrides) - known - set(cls.config_class.attribute_map))
        if odd:
            hint = _OTHERWISE.get(odd[0], "")
            raise TypeError(
                f"{odd[0]!r} is no field of {cls.config_class.__name__}"
                + (f": {hint}" if hint else "")
            )
        if config is not None and (overrides or not isinstance(config, cls.config_class)):
            given = ", ".join(overrides) or type(config).__name__
            raise TypeError(f"config must be a {cls.config_class.__name__} and alone, not {given}")
        if config is None:
            config = cls.config_class.from_pretrained(folder, **overrides)
        stored = checkpoint.read_headers(folder, allow_pickle=allow_pickle)
        if config.tie_word_embeddings and checkpoint.tie_broken(stored, cls.tied_weights):
            config.tie_word_embeddings = False  # as transformers: what is stored apart stays apart
        tied = cls.tied_weights if config.tie_word_embeddings else {}
        if isinstance(config.stored_layers, int):  # if not, the model says so
            checkpoint.check_depth(stored, config.stored_layers)
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
            model._initialise(model._apart(set(unfilled.missing_keys)))
            warnings.warn(
                f"{folder} has no weights for {', '.join(missing)}: they start fresh, train them "
                "before use",
                stacklevel=2,
            )
        return model.eval()

    def save_pretrained(self, path: PathLike) -> None:
        """Writes config.json and model.safetensors, which stock transformers loads.

        A model that is split over ranks must be saved by all of them; the first one writes.

        Args:
            path: the folder, made if absent.
        """
        tied = self.tied_weights if self.config.tie_word_embeddings else {}
        state: dict[str, Any] = {n: t for n, t in self.state_dict().items() if n not in tied}
        values = self.config.to_dict()
        values.pop("torch_dtype", None)
        values["dtype"] = str(self.dtype).removeprefix("torch.")
        values["architectures"] = [type(self).__name__]
        if self.mesh is None:
            checkpoint.write_folder(Path(path), values, state)
            return
        state = {name: tensor.full_tensor() for name, tensor in state.items()}
        try:
            if self.mesh.get_local_rank() == 0:
                checkpoint.write_folder(Path(path), values, state)
        finally:
            torch.distributed.barrier(self.mesh.get_group())

    def gradient_checkpointing_enable(
        self, gradient_checkpointing_kwargs: Mapping[str, Any] | None = None
    ) -> None:
        """In training, keeps each layer's inputs only; the backward pass computes the rest again.

        Losses and gradients stay the same to the bit, dropout included.

        Args:
            gradient_checkpointing_kwargs: arguments of `torch.utils.checkpoint.checkpoint`; by
                default `{"use_reentrant": False}`.
        """
        self._checkpoint({"use_reentrant": False, **(gradient_checkpointing_kwargs or {})})

    def gradient_checkpointing_disable(self) -> None:
        """Keeps every activation again."""
        self._checkpoint(None)

    @property
    def is_gradient_checkpointing(self) -> bool:
        """Whether any layer computes twice in training."""
        return any(block.checkpointing is not None for block in self._blocks())

    def _blocks(self) -> Iterator[Block]:
        return (module for module in self.modules() if isinstance(module, Block))

    def _checkpoint(self, arguments: dict[str, Any] | None) -> None:
        for block in self._blocks():
            block.checkpointing = arguments

    def _wants_layers(self, output_hidden_states: bool | None) -> bool:
        asked = output_hidden_states
        return self.config.output_hidden_states if asked is None else bool(asked)

    def _finish(self, output: Any, return_dict: bool | None) -> Any:
        wanted = self.config.return_dict if return_dict is None else return_dict
        return output if wanted else output.to_tuple()
