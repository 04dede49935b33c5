"""GELU and its derivative, for the epilogue of a product.

Maths: gelu(z) = z Φ(z), gelu'(z) = Φ(z) + z Φ'(z), with
    "none": Φ(z) = (1 + erf(z / √2)) / 2,  Φ'(z) = e^(−z²/2) / √(2π)
    "tanh": Φ(z) ≈ (1 + tanh u) / 2 = 1 / (1 + 2^(−2u log₂e)),  u = √(2/π) (z + 0.044715 z³),
        Φ' = 2 Φ (1 − Φ) u',  u' = √(2/π) (1 + 3 · 0.044715 z²)
    The second form needs one exp2 and no difference of near-equal numbers; for large |z| its
    exponential goes to 0 or to inf, both of which give the right limit.
"""

import triton
import triton.language as tl

from bertgpt.kernels.primitives import LOG2E

_TWO_LOG2E_ROOT = tl.constexpr(2.302208198144325)  # 2 log₂e √(2/π)
_TWO_ROOT = tl.constexpr(1.5957691216057308)  # 2 √(2/π)
_ROOT_HALF = tl.constexpr(0.7071067811865476)
_DENSITY = tl.constexpr(0.3989422804014327)  # 1 / √(2π)


@triton.jit
def gelu(z, TANH: tl.constexpr):
    """GELU of float32 z."""
    if TANH:
        return z / (1.0 + tl.exp2((z + 0.044715 * z * z * z) * -_TWO_LOG2E_ROOT))
    return z * (0.5 + 0.5 * tl.erf(z * _ROOT_HALF))


@triton.jit
def gelu_and_slope(z, TANH: tl.constexpr):
    """GELU and its derivative of float32 z."""
    if TANH:
        # 1 − Φ is e Φ, which does not cancel. Far out e is 0 or inf, and z² may be inf.
        e = tl.exp2((z + 0.044715 * z * z * z) * -_TWO_LOG2E_ROOT)
        cdf = 1.0 / (1.0 + e)
        spread = tl.where(cdf == 0.0, 0.0, e * cdf * cdf)  # Φ (1 − Φ)
        bend = tl.where(spread == 0.0, 0.0, spread * z * _TWO_ROOT * (1.0 + 0.134145 * z * z))
        return z * cdf, cdf + bend
    cdf = 0.5 + 0.5 * tl.erf(z * _ROOT_HALF)
    density = tl.exp2(z * z * (-0.5 * LOG2E)) * _DENSITY
    return z * cdf, cdf + z * density
