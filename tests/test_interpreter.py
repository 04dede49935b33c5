"""The repaired interpreter: bfloat16 must be right, or every interpreted kernel test lies."""

import pytest
import torch

triton = pytest.importorskip("triton")
import triton.language as tl  # noqa: E402

pytestmark = pytest.mark.interpreter


@triton.jit
def _dot_kernel(a_ptr, b_ptr, out_ptr, N: tl.constexpr):
    square = tl.arange(0, N)[:, None] * N + tl.arange(0, N)[None, :]  # [N, N]
    product = tl.dot(tl.load(a_ptr + square), tl.load(b_ptr + square))
    tl.store(out_ptr + square, product)


@triton.jit
def _arithmetic_kernel(x_ptr, y_ptr, out_ptr, N: tl.constexpr):
    offs = tl.arange(0, N)
    x = tl.load(x_ptr + offs)
    y = tl.load(y_ptr + offs)
    tl.store(out_ptr + offs, x + y)
    tl.store(out_ptr + N + offs, x * y - 1.5)
    tl.store(out_ptr + 2 * N + offs, tl.where(x > y, x, y))
    tl.store(out_ptr + 3 * N + offs, (x > 0).to(tl.bfloat16))
    tl.store(out_ptr + 4 * N + offs, tl.maximum(x, y))
    tl.store(out_ptr + 5 * N + offs, tl.abs(x) + offs)
    tl.store(out_ptr + 6 * N + offs, tl.full([N], 0.3, tl.bfloat16))
    tl.store(out_ptr + 7 * N + offs, -x)


@triton.jit
def _cast_kernel(x_ptr, out_ptr, N: tl.constexpr):
    offs = tl.arange(0, N)
    tl.store(out_ptr + offs, tl.load(x_ptr + offs).to(tl.bfloat16))


@triton.jit
def _reduce_kernel(x_ptr, out_ptr, N: tl.constexpr):
    x = tl.load(x_ptr + tl.arange(0, N))
    tl.store(out_ptr, tl.sum(x, 0))
    tl.store(out_ptr + 1, tl.max(x, 0))
    tl.store(out_ptr + 2, tl.max(tl.cumsum(x, 0), 0))


@triton.jit
def _maximum_kernel(x_ptr, out_ptr, N: tl.constexpr):
    offs = tl.arange(0, N)
    tl.store(out_ptr + offs, tl.maximum(tl.load(x_ptr + offs), -1.0))


def _halves(*shape: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator).bfloat16()


def test_dot_accumulates_bfloat16_products_in_float32():
    a, b = _halves(32, 32, seed=0), _halves(32, 32, seed=1)
    out = torch.empty(32, 32)
    _dot_kernel[(1,)](a, b, out, N=32)
    torch.testing.assert_close(out, (a.double() @ b.double()).float(), rtol=1e-5, atol=1e-5)


def test_arithmetic_rounds_each_result_to_nearest():
    x, y = _halves(64, seed=2), _halves(64, seed=3)
    out = torch.empty(8, 64, dtype=torch.bfloat16)
    _arithmetic_kernel[(1,)](x, y, out, N=64)
    expected = [
        x + y,
        x * y - 1.5,
        torch.where(x > y, x, y),
        (x > 0).bfloat16(),
        torch.maximum(x, y),
        x.abs() + torch.arange(64),
        torch.full((64,), 0.3, dtype=torch.bfloat16),
        -x,
    ]
    for row, (got, want) in enumerate(zip(out, expected, strict=True)):
        assert torch.equal(got, want), f"row {row}: {got} against {want}"


@pytest.mark.parametrize("scale", [1.0, 1e-39, 1e30])
def test_float32_to_bfloat16_is_torchs_rounding(scale):
    x = torch.randn(4096, generator=torch.Generator().manual_seed(4)) * scale
    ties = torch.tensor([1.00390625, 1.01171875, -1.00390625, 3.4e38, 0.0, -0.0])
    special = torch.tensor([float("inf"), float("-inf")])
    x[: ties.numel()] = ties
    x[-2:] = special
    out = torch.empty(4096, dtype=torch.bfloat16)
    _cast_kernel[(1,)](x, out, N=4096)
    assert torch.equal(out.view(torch.int16), x.bfloat16().view(torch.int16))


def test_float32_nan_becomes_bfloat16_nan():
    x = torch.full((16,), float("nan"))
    out = torch.zeros(16, dtype=torch.bfloat16)
    _cast_kernel[(1,)](x, out, N=16)
    assert out.isnan().all()


@pytest.mark.parametrize("source", [torch.float64, torch.int32, torch.float16])
def test_other_types_to_bfloat16(source):
    x = (torch.randn(64, generator=torch.Generator().manual_seed(5)) * 100).to(source)
    out = torch.empty(64, dtype=torch.bfloat16)
    _cast_kernel[(1,)](x, out, N=64)
    assert torch.equal(out, x.bfloat16())


def test_reductions_of_bfloat16():
    x = _halves(128, seed=6)
    out = torch.empty(3)
    _reduce_kernel[(1,)](x, out, N=128)
    assert out[0] == x.double().sum().bfloat16()
    assert out[1] == x.max()
    assert abs(out[2].item() - x.double().cumsum(0).max().item()) < 1e-2


def test_maximum_prefers_a_number_to_nan_as_compiled_code_does():
    x = torch.tensor([float("nan"), 1.0, -2.0, float("nan")])
    out = torch.empty(4)
    _maximum_kernel[(1,)](x, out, N=4)
    assert out.tolist() == [-1.0, 1.0, -1.0, -1.0]
