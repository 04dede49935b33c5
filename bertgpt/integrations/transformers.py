"""transformers: patch a live model, or register this library's attention for any."""

from __future__ import annotations

from bertgpt.integrations.patch import patch, unpatch
from bertgpt.integrations.register import register
from bertgpt.integrations.report import PatchReport

__all__ = ["PatchReport", "patch", "register", "unpatch"]
