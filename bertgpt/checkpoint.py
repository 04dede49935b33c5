"""Hugging Face folders and names: config.json, safetensors, and key maps both ways.

Weights are checked by header (names, shapes, dtypes) before any is read, so that a bad file leaves
nothing half loaded. A pickle is opened only when asked for by name, and then only for tensors.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

CONFIG = "config.json"
SAFETENSORS = "model.safetensors"
PICKLE = "pytorch_model.bin"
_FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
# Buffers that older checkpoints carry and that are computed here.
_IGNORED = re.compile(
    r"(^|\.)(position_ids|embeddings\.token_type_ids|attn\.(attention\.)?(masked_)?bias)$"
)

KeyTable = Mapping[str, str | tuple[str, ...]]


def map_keys(module: nn.Module, table: KeyTable, transposed: Iterable[str] = ()) -> None:
    """Gives `module` Hugging Face names in `state_dict()` and `load_state_dict()`.

    Args:
        module: the module whose children are named in `table`.
        table: our child → their child, or their several children whose rows are fused in ours.
        transposed: our children whose 2-D weight they keep transposed (Conv1D).
    """
    flip = frozenset(transposed)

    def rename_in(module: nn.Module, state: dict[str, Tensor], prefix: str, *_: Any) -> None:
        for name in [key for key in state if _IGNORED.search(key)]:
            del state[name]
        for ours, theirs in table.items():
            parts = (theirs,) if isinstance(theirs, str) else theirs
            heads = [f"{prefix}{part}." for part in parts]
            for first in [key for key in state if key.startswith(heads[0])]:
                tail = first[len(heads[0]) :]
                keys = [head + tail for head in heads]
                if any(key not in state for key in keys):
                    continue
                pieces = [state.pop(key) for key in keys]
                if any(piece.shape != pieces[0].shape for piece in pieces):
                    shapes = {key: list(p.shape) for key, p in zip(keys, pieces, strict=True)}
                    raise ValueError(f"the shapes must agree to be fused, not {shapes}")
                whole = pieces[0] if len(pieces) == 1 else torch.cat(pieces)
                state[f"{prefix}{ours}.{tail}"] = whole.t() if ours in flip else whole

    def rename_out(module: nn.Module, state: dict[str, Tensor], prefix: str, *_: Any) -> None:
        mine = {key[len(prefix) :]: state.pop(key) for key in list(state) if key.startswith(prefix)}
        for key in list(mine):
            if key not in mine:  # went with its group
                continue
            ours = next((ours for ours in table if key.startswith(f"{ours}.")), None)
            if ours is None:
                state[prefix + key] = mine[key]
                continue
            theirs = table[ours]
            parts = (theirs,) if isinstance(theirs, str) else theirs
            group = {k: mine.pop(k) for k in list(mine) if k.startswith(f"{ours}.")}
            for i, part in enumerate(parts):
                for name, tensor in group.items():
                    piece = (tensor.t() if ours in flip else tensor).chunk(len(parts))[i]
                    state[f"{prefix}{part}{name[len(ours) :]}"] = piece

    module.register_load_state_dict_pre_hook(rename_in)
    module.register_state_dict_post_hook(rename_out)


def resolve_folder(path_or_id: str | os.PathLike[str], *, allow_pickle: bool = False) -> Path:
    """The local folder of a checkpoint: a path, or a model id fetched through huggingface_hub.

    Raises:
        FileNotFoundError: there is no such folder, and no such model can be fetched.
    """
    folder = Path(path_or_id)
    if folder.is_dir():
        return folder
    name = os.fspath(path_or_id)
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name) or name.startswith(".") or folder.exists():
        raise FileNotFoundError(f"{name} is not a folder: give a folder with {CONFIG} in it")
    try:
        import huggingface_hub
    except ImportError:
        raise FileNotFoundError(
            f"{name} is not a local folder; to fetch it by id, pip install huggingface_hub"
        ) from None
    stems = ("model", *(["pytorch_model"] if allow_pickle else []))
    weights = [f"{s}{t}" for s in stems for t in (".*", "-*-of-*.*")]
    try:
        return Path(huggingface_hub.snapshot_download(name, allow_patterns=[CONFIG, *weights]))
    except Exception as error:
        raise FileNotFoundError(
            f"{name} is neither a local folder nor a model that the hub can give right now "
            f"({type(error).__name__}: {error}); check the name, or pass a folder"
        ) from error


def read_json(file: Path, what: str, kind: type[dict[str, Any]] | type[list[Any]] = dict) -> Any:
    """A JSON object, or a list where `kind` says so.

    Raises:
        FileNotFoundError: the file is absent; `what` says what it is for.
        ValueError: it holds something else.
    """
    if not file.is_file():
        raise FileNotFoundError(f"{file.parent} has no {file.name}: {what}")
    try:
        value = json.loads(file.read_text("utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file} is not valid JSON ({error}): fetch or write it again") from error
    if not isinstance(value, kind):
        wanted = "object" if kind is dict else "list"
        raise ValueError(f"{file} must hold a JSON {wanted}, not a {type(value).__name__}")
    return value


@dataclass(frozen=True)
class Entry:
    """One stored tensor, as its file's header describes it."""

    file: Path
    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype | None
    """None for a dtype that no weight has."""
    tensor: Tensor | None = None
    """Set for pickles, which cannot be read in parts."""


def read_headers(folder: Path, *, allow_pickle: bool = False) -> dict[str, Entry]:
    """Every stored tensor of a checkpoint folder by name, data unread (pickles aside).

    Raises:
        FileNotFoundError: no weights, or a shard is missing.
        ValueError: only a pickle is there and `allow_pickle` is False, or a file cannot be read.
    """
    safe = _shards(folder, SAFETENSORS)
    if safe:
        return {entry.name: entry for file in safe for entry in _safetensors_header(file)}
    pickles = _shards(folder, PICKLE)
    if not pickles:
        raise FileNotFoundError(f"{folder} has no {SAFETENSORS}: save the model there first")
    if not allow_pickle:
        raise ValueError(
            f"{folder} holds only a pickle ({pickles[0].name}), which can run code when opened: "
            "convert it to safetensors, or pass allow_pickle=True if you trust its source"
        )
    return {entry.name: entry for file in pickles for entry in _pickle_entries(file)}


def _shards(folder: Path, single: str) -> list[Path]:
    if (folder / single).is_file():
        return [folder / single]
    index = folder / f"{single}.index.json"
    if not index.is_file():
        return []
    names = read_json(index, "").get("weight_map")
    if not isinstance(names, dict) or not all(isinstance(name, str) for name in names.values()):
        raise ValueError(f"{index} has no weight_map from tensor names to file names")
    files = sorted(set(names.values()))
    for name in files:
        if Path(name).name != name:
            raise ValueError(f"{index} names {name!r}, which is not a file of its own folder")
        if not (folder / name).is_file():
            raise FileNotFoundError(f"{folder} has no {name}, which {index.name} names: fetch it")
    return [folder / name for name in files]


def _safetensors_header(file: Path) -> list[Entry]:
    try:
        with safe_open(file, framework="pt") as handle:
            slices = {name: handle.get_slice(name) for name in handle.keys()}  # noqa: SIM118
            return [
                Entry(file, name, tuple(part.get_shape()), _DTYPES.get(part.get_dtype()))
                for name, part in slices.items()
            ]
    except SafetensorError as error:
        raise ValueError(
            f"{file} is no whole safetensors file ({error}): fetch or save it again"
        ) from error


def _pickle_entries(file: Path) -> list[Entry]:
    try:
        state = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:
        raise ValueError(f"{file} cannot be read as a pickle of tensors alone ({error})") from error
    if not isinstance(state, dict) or not all(isinstance(t, Tensor) for t in state.values()):
        raise ValueError(f"{file} must hold a dictionary of tensors and nothing else")
    return [
        Entry(file, name, tuple(t.shape), t.dtype if t.dtype in _FLOATS else None, t)
        for name, t in state.items()
    ]


def check_depth(stored: Mapping[str, Entry], layers: int) -> None:
    """Refuses a configuration with more layers than are stored, before any is made.

    Raises:
        ValueError: `layers` exceeds them.
    """
    found = [re.match(r"(?:.+\.)?(?:layer|albert_layers|h)\.\d{1,9}\.", name) for name in stored]
    depth = len({match[0] for match in found if match})
    if layers > depth:
        place = next(iter(stored.values())).file if stored else "the checkpoint"
        raise ValueError(f"{place} holds {depth} layers, but {CONFIG} asks for {layers}")


def read_tensors(entries: Mapping[str, Entry]) -> dict[str, Tensor]:
    """The tensors behind `entries`, under the keys of `entries`."""
    tensors = {key: entry.tensor for key, entry in entries.items() if entry.tensor is not None}
    by_file: dict[Path, list[str]] = {}
    for key, entry in entries.items():
        if entry.tensor is None:
            by_file.setdefault(entry.file, []).append(key)
    for file, keys in by_file.items():
        with safe_open(file, framework="pt") as handle:
            tensors.update({key: handle.get_tensor(entries[key].name) for key in keys})
    return tensors


def tie_broken(stored: Mapping[str, Entry], tied: Mapping[str, str]) -> bool:
    """Whether some name is stored beside the one whose tensor it shares, with other values."""
    for name, source in tied.items():
        if name in stored and source in stored:
            pair = read_tensors({name: stored[name], source: stored[source]})
            if not torch.equal(pair[name], pair[source]):
                return True
    return False


def match_names(
    stored: Mapping[str, Entry],
    expected: Mapping[str, Tensor],
    base_prefix: str,
    tied: Mapping[str, str],
) -> tuple[dict[str, Entry], list[str], list[str]]:
    """Fits stored tensors to a model's Hugging Face names.

    Old LayerNorm names, buffers of older versions, and the prefix that a headed checkpoint has and
    a bare model lacks (or the reverse) are seen through.

    Args:
        stored: the checkpoint's headers.
        expected: the model's `state_dict()`, for names and shapes.
        base_prefix: "bert." or "transformer.".
        tied: names that share the tensor of another name.

    Returns:
        The entries to load by the model's names, the model's names that are not stored, and the
        stored names of the model's body that the model has no place for.

    Raises:
        ValueError: a shape or dtype differs, or the model's body is incomplete.
    """
    headed = any(name.startswith(base_prefix) for name in expected)
    prefixed = any(name.startswith(base_prefix) for name in stored)
    found: dict[str, Entry] = {}
    surplus = []
    for name, entry in stored.items():
        key = re.sub(r"LayerNorm\.(gamma|beta)$", _modern_norm, name)
        if prefixed and not headed:
            key = key.removeprefix(base_prefix)
        elif headed and not prefixed and base_prefix + key in expected:
            key = base_prefix + key
        if key in expected:
            found[key] = entry
        elif _is_body(name, base_prefix, prefixed) and not _IGNORED.search(name):
            surplus.append(name)  # heads of another kind of model are not missed
    for name, source in tied.items():
        twin = found.pop(name, None)
        if source not in found and twin is not None:
            found[source] = twin
    for key, entry in found.items():
        if entry.shape != tuple(expected[key].shape):
            raise ValueError(
                f"{entry.file}: {entry.name} has shape {list(entry.shape)}, but {CONFIG} asks for "
                f"{list(expected[key].shape)}: the two files do not belong together, or num_labels "
                "or another override asks for what is not stored"
            )
        if entry.dtype is None:
            raise ValueError(
                f"{entry.file}: {entry.name} is not float64, float32, float16 or bfloat16; "
                "quantised weights are not read"
            )
    missing = [name for name in expected if name not in found and name not in tied]
    body = [name for name in missing if _is_body(name, base_prefix, headed)]
    if body:
        place = next(iter(stored.values())).file if stored else "the checkpoint"
        shown = ", ".join(body[:3]) + (f" and {len(body) - 3} more" if len(body) > 3 else "")
        raise ValueError(f"{place} lacks {shown}: it is incomplete, or of another architecture")
    return found, missing, surplus


def _is_body(name: str, base_prefix: str, prefixed: bool) -> bool:
    """Whether every model of the family has this tensor; some BERTs have no pooler."""
    return (name.startswith(base_prefix) or not prefixed) and "pooler." not in name


def as_dtype(dtype: torch.dtype | str | None) -> torch.dtype | None:
    """A weights' dtype by itself or by name; None, and "auto", for the checkpoint's own.

    Raises:
        TypeError: it is no dtype of weights.
    """
    named = {str(known).removeprefix("torch."): known for known in _FLOATS}
    found = named.get(dtype) if isinstance(dtype, str) else dtype
    if dtype is None or dtype == "auto":
        return None
    if found not in _FLOATS:
        raise TypeError(f"dtype={dtype!r}: choose one of {', '.join(named)}, or auto")
    return found


def _modern_norm(match: re.Match[str]) -> str:
    return "LayerNorm." + {"gamma": "weight", "beta": "bias"}[match[1]]


def write_folder(folder: Path, config: Mapping[str, Any], state: Mapping[str, Tensor]) -> None:
    """Writes config.json and model.safetensors, each whole or not at all.

    Raises:
        FileExistsError: `folder` is a file.
        TypeError: The configuration holds what JSON cannot; nothing has been written.
    """
    config_text(config)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}
    partial = folder / f".{SAFETENSORS}.partial"
    save_file(tensors, partial, metadata={"format": "pt"})
    partial.replace(folder / SAFETENSORS)
    write_config(folder, config)


def write_config(folder: Path, config: Mapping[str, Any]) -> None:
    """Writes config.json whole or not at all."""
    text = config_text(config)
    partial = folder / f".{CONFIG}.partial"
    partial.write_text(text, "utf-8")
    partial.replace(folder / CONFIG)


def config_text(config: Mapping[str, Any]) -> str:
    """A configuration as config.json holds it; TypeError names a value that JSON cannot hold."""
    for name, value in config.items():
        try:
            json.dumps(value)
        except TypeError as error:
            raise TypeError(f"the configuration's {name} cannot be saved: {error}") from None
    return json.dumps(config, indent=2, sort_keys=True) + "\n"
