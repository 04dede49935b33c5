"""The versions of transformers whose insides are known here."""

from __future__ import annotations

import transformers
from packaging.version import Version

OLDEST, BEYOND = "5.23", "5.25"

# What models call the key-value cache, as an argument and in their outputs.
CACHE = "cache" if Version(transformers.__version__) >= Version("5.24") else "past_key_values"


def check_version() -> None:
    """Raises RuntimeError for a version that is not known."""
    if not Version(OLDEST) <= Version(transformers.__version__) < Version(BEYOND):
        raise RuntimeError(
            f"transformers {transformers.__version__} is not known here: what bertgpt goes by is "
            f"that of versions from {OLDEST} up to {BEYOND}"
        )
