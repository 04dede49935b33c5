"""The accuracy rule, in one place for the tests and for `bertgpt validate`.

A result is accurate when, against the reference run in float64 (the oracle),

1. its NaN, +inf and −inf stand exactly where the oracle's do (rounded to the result's dtype);
2. in every row (vector along the last dimension), and so over the whole tensor,
   max error ≤ factor × baseline error + one rounding at the row's magnitude: a unit in the last
   place of the half types, 16 of float32, 256 of float64;
3. rms(error) / rms(oracle) ≤ 0.005, which catches a bias that a maximum hides.

Integers, such as sampled tokens, are judged as float64, where any other one is an error.

The baseline is the reference run in the result's own low precision. Its error in a row is taken
as no less than its typical error over the whole tensor, relative to each row's magnitude:
otherwise a short row that the baseline rounds exactly by luck would forbid any other rounding.
"""

from dataclasses import dataclass

import torch

RMS_LIMIT = 0.005
# Units in the last place that rounding may cost beyond the baseline's error. The half types are
# accumulated in float32 and rounded once. float32 is its own accumulator: two right computations
# differ by several units where sums run in another order or exponentials have another base (tf32,
# the next worse thing, is off by thousands); and float64 has no oracle above it.
_ROUNDING_UNITS = {torch.float32: 16.0, torch.float64: 256.0}


@dataclass(frozen=True)
class Accuracy:
    """What was measured. Errors are absolute; non-finite positions are left out of them.

    Attributes:
        max_error: largest |actual − oracle|.
        baseline_error: largest |baseline − oracle|.
        row_excess: largest error ÷ allowance over the rows; at most 1 when accurate.
        rms_ratio: rms(actual − oracle) / rms(oracle).
        worst: index of the element with the largest error ÷ allowance; None when there is none.
        failures: what was violated, in words; empty when accurate.
    """

    max_error: float
    baseline_error: float
    row_excess: float
    rms_ratio: float
    worst: tuple[int, ...] | None
    failures: tuple[str, ...]

    @property
    def accurate(self) -> bool:
        """Whether nothing was violated."""
        return not self.failures

    @property
    def error_ratio(self) -> float:
        """max_error ÷ baseline_error; 0 when both are 0."""
        if self.max_error == 0:
            return 0.0
        return self.max_error / self.baseline_error if self.baseline_error else float("inf")


def unit_in_last_place(magnitude: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The spacing of `dtype` just above each magnitude, as float64; never below a subnormal."""
    info = torch.finfo(dtype)
    normal = magnitude.double().clamp_min(info.smallest_normal)
    return info.eps * torch.exp2((torch.frexp(normal).exponent - 1).double())


def measure(
    actual: torch.Tensor,
    oracle: torch.Tensor,
    baseline: torch.Tensor,
    *,
    factor: float = 2.0,
    rms_limit: float = RMS_LIMIT,
    terms: torch.Tensor | None = None,
) -> Accuracy:
    """Measures `actual` against the rule above.

    Args:
        actual: the result to judge, any floating or integer dtype and any shape.
        oracle: the reference in float64, of the same shape.
        baseline: the reference in the result's precision; same shape and dtype as `actual`.
        factor: how many baseline errors are allowed: 2 for outputs, 3 for gradients.
        rms_limit: the largest allowed rms(error) / rms(oracle).
        terms: the values that the results are a small difference of, shaped like `actual`: a row's
            rounding is then taken at their magnitude too. z for z Φ(z), whose Φ near −4 is what
            (1 + erf) / 2 leaves of two halves. None: nothing cancels.

    Returns:
        The figures and, in `failures`, every violation.

    Raises:
        ValueError: `oracle` is not float64, or oracle and baseline differ in shape: the caller's
            own mistake rather than the result's.
    """
    if oracle.dtype != torch.float64 or oracle.shape != baseline.shape:
        raise ValueError(
            f"the oracle must be float64 and shaped like the baseline: {oracle.dtype} "
            f"{tuple(oracle.shape)} against {tuple(baseline.shape)}"
        )
    mismatches = _form_mismatches(actual, oracle, baseline)
    if mismatches:
        return Accuracy(float("inf"), 0.0, float("inf"), float("inf"), None, mismatches)
    if not actual.is_floating_point():
        actual, baseline = actual.double(), baseline.double()
    if actual.numel() == 0:
        return Accuracy(0.0, 0.0, 0.0, 0.0, None, ())

    pattern_failures = _pattern_mismatches(actual, oracle.to(actual.dtype))
    finite = torch.isfinite(oracle.to(actual.dtype)) & torch.isfinite(actual)
    true = torch.where(finite, oracle, 0.0)
    error = _as_rows(torch.where(finite, (actual.double() - oracle).abs(), 0.0))
    reference_error = (baseline.double() - oracle).abs()
    reference_error = _as_rows(torch.where(finite & reference_error.isfinite(), reference_error, 0))

    size = _as_rows(true if terms is None else torch.maximum(true.abs(), terms.double().abs()))
    allowance = factor * _row_baseline(reference_error, _as_rows(true))
    allowance += _rounding(size, actual.dtype)
    excess = error / allowance[:, None]
    flat = int(excess.argmax())
    worst = tuple(int(i) for i in torch.unravel_index(torch.tensor(flat), actual.shape))
    row_excess = float(excess.max())
    rms_ratio = _ratio(_rms(error), _rms(true))

    failures = list(pattern_failures)
    if row_excess > 1:
        row = flat // error.shape[1]
        failures.append(
            f"error {float(error[row].max()):.3e} at {worst} exceeds {float(allowance[row]):.3e} "
            f"({factor:g} × the baseline's error + one rounding): got {_at(actual, flat)}, "
            f"oracle {_at(oracle, flat)}, baseline {_at(baseline, flat)}; "
            f"{int((excess > 1).sum())} of {error.numel()} elements exceed"
        )
    subnormal = float(unit_in_last_place(torch.zeros(()), actual.dtype))
    if _rms(error) > rms_limit * _rms(true) + subnormal:
        failures.append(f"rms ratio {rms_ratio:.3e} exceeds {rms_limit:g}")
    return Accuracy(
        max_error=float(error.max()),
        baseline_error=float(reference_error.max()),
        row_excess=row_excess,
        rms_ratio=rms_ratio,
        worst=worst,
        failures=tuple(failures),
    )


def _form_mismatches(
    actual: torch.Tensor, oracle: torch.Tensor, baseline: torch.Tensor
) -> tuple[str, ...]:
    failures = []
    if actual.shape != oracle.shape:
        failures.append(f"shape {tuple(actual.shape)}, expected {tuple(oracle.shape)}")
    if actual.dtype != baseline.dtype:
        failures.append(f"dtype {actual.dtype}, expected {baseline.dtype}")
    return tuple(failures)


def _pattern_mismatches(actual: torch.Tensor, expected: torch.Tensor) -> list[str]:
    """Where NaN, +inf and −inf stand must agree exactly."""
    failures = []
    for name, is_form in (("NaN", torch.isnan), ("+inf", torch.isposinf), ("-inf", torch.isneginf)):
        wrong = is_form(actual) != is_form(expected)
        if bool(wrong.any()):
            flat = int(wrong.flatten().int().argmax())
            first = tuple(int(i) for i in torch.unravel_index(torch.tensor(flat), actual.shape))
            failures.append(
                f"{name} at {int(wrong.sum())} wrong places, first {first}: "
                f"got {_at(actual, flat)}, oracle {_at(expected, flat)}"
            )
    return failures


def _row_baseline(error: torch.Tensor, oracle: torch.Tensor) -> torch.Tensor:
    """Each row's baseline error, at least the typical one at the row's magnitude."""
    magnitude = oracle.abs().amax(dim=1)
    row_error = error.amax(dim=1)
    relative = torch.where(magnitude > 0, row_error / magnitude, 0.0)
    return torch.maximum(row_error, _rms(relative) * magnitude)


def _rounding(values: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return _ROUNDING_UNITS.get(dtype, 1.0) * unit_in_last_place(values.abs().amax(dim=1), dtype)


def _as_rows(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.reshape(-1, tensor.shape[-1] if tensor.dim() else 1)


def _rms(tensor: torch.Tensor) -> float:
    return float(tensor.square().mean().sqrt())


def _ratio(part: float, whole: float) -> float:
    if part == 0:
        return 0.0
    return part / whole if whole else float("inf")


def _at(tensor: torch.Tensor, flat: int) -> str:
    return f"{float(tensor.flatten()[flat]):.9g}"
