"""The assertions every numerical test uses: the accuracy rule, and bitwise equality."""

import torch

from bertgpt.accuracy import Accuracy, measure


def assert_accurate(
    actual: torch.Tensor,
    oracle_f64: torch.Tensor,
    low_precision_baseline: torch.Tensor,
    *,
    factor: float = 2.0,
    terms: torch.Tensor | None = None,
    what: str = "result",
) -> Accuracy:
    """Fails unless `actual` obeys the rule of `bertgpt.accuracy`; returns the figures.

    `oracle_f64` is the reference on float64 copies of the inputs; `low_precision_baseline` the
    reference on the very inputs. Use factor=3 for gradients; `terms` where the results cancel.
    """
    tensors = (actual.detach(), oracle_f64.detach(), low_precision_baseline.detach())
    accuracy = measure(*tensors, factor=factor, terms=terms)
    assert accuracy.accurate, f"{what}: " + "; ".join(accuracy.failures)
    return accuracy


def assert_bitwise(actual: torch.Tensor, expected: torch.Tensor, *, what: str = "result") -> None:
    """Fails unless shape, dtype and every bit agree (so NaN equals the same NaN, 0 is not −0)."""
    assert actual.shape == expected.shape, f"{what}: {actual.shape} against {expected.shape}"
    assert actual.dtype == expected.dtype, f"{what}: {actual.dtype} against {expected.dtype}"
    differs = _bits(actual) != _bits(expected)
    assert not differs.any(), f"{what}: {int(differs.sum())} of {differs.numel()} bytes differ"


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().contiguous().flatten().view(torch.uint8)
