"""`patch` and `unpatch`: another class for the blocks of one live model, and back."""

from __future__ import annotations

from torch import nn

from bertgpt.integrations.blocks import Patched
from bertgpt.integrations.patched import MODELS, patched_class, stock_class
from bertgpt.integrations.report import PatchReport, Replaced, Skipped
from bertgpt.integrations.versions import check_version


def patch(model: nn.Module) -> PatchReport:
    """Runs the blocks of a live transformers model on this library's ops.

    The model stays the same object with the same modules, parameters and hooks: only the class of
    each block becomes a subclass of its own. No weight is copied. Padding is taken out before the
    first block and put back, as zeros, after the last. What a block has that must not be passed by
    (hooks, adapters, quantised layers, unknown activations) is called as it is, also where it comes
    after patching. Calling again changes nothing but reports anew.

    Args:
        model: a transformers model of a known family, or any module that holds one.

    Returns:
        What was replaced, and what was left and why.

    Raises:
        TypeError: `model` is no module.
        ValueError: it holds no block of a known family.
        RuntimeError: the installed transformers is not a version whose blocks are known.
    """
    _check(model)
    swaps: list[tuple[nn.Module, type[nn.Module]]] = []
    replaced, skipped = [], []
    for path, module in model.named_modules():
        known = type(module) if isinstance(module, Patched) else patched_class(type(module))
        if known is None:
            continue
        stock = stock_class(known)
        assert stock is not None
        reason = "its forward is replaced on the instance" if "forward" in vars(module) else None
        reason = reason or known.refusal(module)
        if reason is not None:
            skipped.append(Skipped(path, reason))
            continue
        swaps.append((module, known))
        replaced.append(Replaced(path, stock.__name__))
    if not swaps and not skipped:
        raise ValueError(
            f"{type(model).__name__} holds no block that is known: patch takes models of "
            f"{', '.join(MODELS)} as transformers builds them"
        )
    for module, patched in swaps:
        module.__class__ = patched
    for item in replaced:
        skipped += _left(item.path, model.get_submodule(item.path))
    return PatchReport(tuple(replaced), tuple(skipped))


def unpatch(model: nn.Module) -> PatchReport:
    """Gives every patched block of a model its stock class back.

    Args:
        model: what `patch` took, or any part of it; a model with no patched block is left alone.

    Returns:
        The modules that stock code runs again, as `skipped`.

    Raises:
        TypeError: `model` is no module.
        ValueError: a patched block has been given another class since (by sharding, for one).
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"unpatch takes a torch module, not {type(model).__name__}")
    swaps: list[tuple[nn.Module, type[nn.Module]]] = []
    restored = []
    for path, module in model.named_modules():
        if not isinstance(module, Patched):
            continue
        stock = stock_class(type(module))
        if stock is None:
            raise ValueError(
                f"{path or 'the model'} was patched and has become a {type(module).__qualname__} "
                "since: undo that first"
            )
        swaps.append((module, stock))
        restored.append(Skipped(path, "unpatched"))
    for module, stock in swaps:
        module.__class__ = stock
    return PatchReport((), tuple(restored))


def _check(model: nn.Module) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"patch takes a torch module, not {type(model).__name__}")
    check_version()


def _left(path: str, module: nn.Module) -> list[Skipped]:
    assert isinstance(module, Patched)
    found = [Skipped(f"{path}.{place}", reason) for place, reason in module.obstacles().items()]
    for place, what in module.adapted().items():
        if place not in module.obstacles():
            found.append(Skipped(f"{path}.{place}", f"{what}: called, not read through"))
    return found
