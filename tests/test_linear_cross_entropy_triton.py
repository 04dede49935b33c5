"""The Triton kernels of `linear_cross_entropy`, forward and backward, by Triton's interpreter."""

from itertools import product

import pytest
import torch
from cases import KERNEL_DTYPES, awkward_sizes, banded, banded_copy, examples, poisoned_allocations
from cases import rows_far_apart as far_apart
from hypothesis import given
from hypothesis import strategies as st
from loss_cases import IGNORE, assert_small_gradients_survive, inputs, results
from loss_cases import check as check_backend
from tolerance import assert_bitwise

from bertgpt import ops

triton = pytest.importorskip("triton")

from bertgpt.kernels import linear_cross_entropy as kernels  # noqa: E402
from bertgpt.kernels import linear_cross_entropy_backward as gradients  # noqa: E402

pytestmark = [
    pytest.mark.interpreter,
    # NumPy warns where the hardware gives inf or NaN without a word.
    pytest.mark.filterwarnings("ignore:.*encountered in.*:RuntimeWarning"),
]

CAPABILITIES = (80, 86, 89, 90, 100, 103, 120, 121)


def check(call, **options):
    with poisoned_allocations():
        return check_backend(call, "triton", **options)


@pytest.fixture
def small(monkeypatch):
    """Tiles of 32 × 64 in runs of 128 tokens, gradients in slabs of 128 rows and 128 tokens."""
    config = kernels.Config(32, 64, 16, num_warps=4, num_stages=2, split=128, group_m=3)
    for module in (kernels, gradients):
        monkeypatch.setattr(module, "pick_config", lambda *args, **kwargs: config)
    monkeypatch.setattr(gradients, "slab_of", lambda *args: gradients.Slab(128, 128))


@pytest.mark.parametrize("dtype", KERNEL_DTYPES, ids=str)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_whole_and_partial_tiles(dtype, bias, reduction):
    for T, V, E in ((128, 128, 64), (70, 1100, 65)):
        check(inputs(T, V, E, dtype, bias=bias), reduction=reduction)


@pytest.mark.parametrize("T", awkward_sizes(128))
@pytest.mark.usefixtures("small")
def test_awkward_rows(T):
    check(inputs(T, 150, 20, torch.float16))
    check(inputs(T, 150, 20, ignored=0.9), reduction="none")


@pytest.mark.parametrize("V", awkward_sizes(128))
@pytest.mark.usefixtures("small")
def test_awkward_vocabularies(V):
    check(inputs(40, V, 20, torch.bfloat16))
    check(inputs(40, V, 20, ruled_out=True), reduction="sum")


@pytest.mark.parametrize("E", awkward_sizes(64))
def test_awkward_widths(E):
    check(inputs(20, 40, E))
    if E != 1:  # a row of one half number may cancel to less than the roundings of its terms
        check(inputs(20, 40, E, torch.float16))


@examples(40)
@given(
    T=st.integers(0, 150),
    V=st.integers(0, 300),
    E=st.integers(0, 70),
    dtype=st.sampled_from(KERNEL_DTYPES),
    bias=st.booleans(),
    ruled_out=st.booleans(),
    ignored=st.sampled_from([0.0, 0.4, 1.0]),
    reduction=st.sampled_from(["mean", "sum", "none"]),
    seed=st.integers(0, 99),
)
def test_odd_shapes_and_strides(T, V, E, dtype, bias, ruled_out, ignored, reduction, seed):
    if dtype != torch.float32:  # see test_awkward_widths
        E = max(E, 8)
    call = inputs(
        T, V, E, dtype, seed=seed, ignored=ignored, strided=True, bias=bias, ruled_out=ruled_out
    )
    check(call, reduction=reduction)


@pytest.mark.parametrize("dtype", KERNEL_DTYPES, ids=str)
@pytest.mark.usefixtures("small")
def test_many_slabs_of_rows_and_tokens(dtype):
    """Three slabs of rows, the last of them ignored whole, by three of tokens."""
    hidden, weight, bias, labels = inputs(300, 300, 33, dtype, ignored=0.5)
    check((hidden, weight, bias, labels))
    check((hidden, weight.float(), bias.float(), labels))


def test_leading_dimensions_and_last_strides():
    hidden, weight, bias, labels = inputs(12, 20, 6)
    flat = check((hidden, weight, bias, labels), reduction="none")
    turned = hidden.t().contiguous().t(), weight.t().contiguous().t()
    odd_bias = torch.stack([bias, bias], 1)[:, 0]
    shaped = turned[0].view(3, 4, 6), turned[1], odd_bias, labels.view(3, 4).int()
    losses, grad_hidden, *others = check(shaped, reduction="none")
    assert_bitwise(losses, flat[0].view(3, 4))
    assert grad_hidden.shape == (3, 4, 6)
    assert [g.shape for g in others] == [(20, 6), (20,)]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("columns", [1024, None])
def test_float32_weights_beside_half_inputs(monkeypatch, dtype, columns):
    """Weights are rounded slab by slab, which is no different from rounding them whole."""
    hidden, weight, bias, labels = inputs(40, 2100, 20)
    if columns is not None:
        monkeypatch.setattr(kernels, "_CAST_BYTES", columns * 20 * 2)
    mixed = check((hidden.to(dtype), weight, bias, labels))
    assert [t.dtype for t in mixed] == [torch.float32, dtype, torch.float32, torch.float32]
    rounded = hidden.to(dtype), weight.to(dtype), bias, labels
    check((hidden.to(dtype), weight.to(dtype), bias, labels))  # the bias alone is float32
    whole = kernels.row_losses(*rounded, ignore_index=IGNORE)
    parts = kernels.row_losses(hidden.to(dtype), weight, bias, labels, ignore_index=IGNORE)
    assert_bitwise(parts[0], whole[0])


@pytest.mark.parametrize(("T", "V"), [(6, 5), (0, 5), (6, 0), (0, 0)])
def test_nothing_to_average_gives_zero(T, V):
    with poisoned_allocations():
        found = results(ops.linear_cross_entropy, inputs(T, V, 3, ignored=1.0), backend="triton")
    for tensor in found:
        assert not tensor.count_nonzero()  # NaN would count


def test_frozen_inputs_have_no_gradient():
    hidden, weight, bias, labels = inputs(20, 30, 8)
    everything = results(ops.linear_cross_entropy, (hidden, weight, bias, labels), backend="triton")
    tensors = {"hidden": hidden, "weight": weight, "bias": bias}
    for place, name in enumerate(tensors):
        leaves = {n: t.detach().clone().requires_grad_(n == name) for n, t in tensors.items()}
        ops.linear_cross_entropy(*leaves.values(), labels, backend="triton").backward()
        for other, leaf in leaves.items():
            assert (leaf.grad is not None) == (other == name)
        assert_bitwise(leaves[name].grad, everything[1 + place])


def test_what_ignored_rows_hold_changes_nothing():
    hidden, weight, bias, labels = inputs(150, 200, 20, torch.float16)
    poisoned = results(ops.linear_cross_entropy, (hidden, weight, bias, labels), backend="triton")
    clean = hidden.nan_to_num(3.0), weight, bias, labels
    expected = results(ops.linear_cross_entropy, clean, backend="triton")
    for a, b in zip(poisoned, expected, strict=True):
        assert_bitwise(a, b)


def test_nan_and_infinity_show_in_their_own_row():
    hidden, weight, bias, labels = inputs(40, 70, 8, ignored=0.0)
    hidden[5, 2], hidden[7, 1] = torch.nan, torch.inf
    losses = ops.linear_cross_entropy(
        hidden, weight, bias, labels, reduction="none", backend="triton"
    )
    assert (~losses.isfinite()).nonzero().flatten().tolist() == [5, 7]
    bias[labels[3]] = -torch.inf
    losses = ops.linear_cross_entropy(
        hidden, weight, bias, labels, reduction="none", backend="triton"
    )
    assert losses[labels == labels[3]].isposinf().all()


def test_a_label_out_of_range_reads_nothing_and_shows():
    """What a GPU does without `strict`: the check of values is the op's, and not run here."""
    hidden, weight, bias, labels = inputs(10, 30, 8, ignored=0.0)
    expected, _ = kernels.row_losses(hidden, weight, bias, labels, ignore_index=IGNORE)
    bad = labels.clone()
    bad[[2, 4, 6]] = torch.tensor([30, -1, 2**40])
    losses, lse = kernels.row_losses(hidden, weight, bias, bad, ignore_index=IGNORE)
    assert losses.isnan().nonzero().flatten().tolist() == [2, 4, 6]
    assert_bitwise(losses[[0, 1, 3, 5]], expected[[0, 1, 3, 5]])
    found = gradients.row_losses_backward(
        torch.ones(10), lse, ("weight",), hidden, weight, bias, bad, ignore_index=IGNORE
    )
    assert found["weight"].isfinite().all()
    with pytest.raises(IndexError, match="labels holds 30"):
        ops.linear_cross_entropy(hidden, weight, bias, bad, backend="triton")


def test_small_gradients_do_not_underflow():
    assert_small_gradients_survive("triton")


def test_repeats_and_batches_are_bitwise_equal():
    hidden, weight, bias, labels = inputs(70, 1100, 40, torch.bfloat16, ignored=0.0)
    call = hidden, weight, bias, labels
    first = results(ops.linear_cross_entropy, call, reduction="none", backend="triton")
    for a, b in zip(
        results(ops.linear_cross_entropy, call, reduction="none", backend="triton"),
        first,
        strict=True,
    ):
        assert_bitwise(a, b)
    alone = ops.linear_cross_entropy(
        hidden[40:41], weight, bias, labels[40:41], reduction="none", backend="triton"
    )
    assert_bitwise(alone[0], first[0][40])


def test_row_offsets_are_64_bit():
    hidden, weight, bias, labels = inputs(4, 3, 5, torch.float16, ignored=0.0)
    expected = check((hidden, weight, bias, labels))
    for call in (
        (far_apart(hidden), weight, bias, labels),
        (hidden, far_apart(weight), bias, labels),
    ):
        for a, b in zip(check(call), expected, strict=True):
            assert_bitwise(a, b)


@pytest.mark.parametrize("dtype", KERNEL_DTYPES, ids=str)
def test_nothing_outside_the_buffers_is_read_or_written(monkeypatch, dtype):
    """Every tensor, workspaces too, lies between bands of NaN that must stay and never show."""
    fences = []

    def fenced(*shape, dtype=torch.float32, device=None, fill=None):
        fence = banded(shape[0] if isinstance(shape[0], tuple | torch.Size) else shape, dtype)
        fences.append(fence)
        return fence.view if fill is None else fence.view.fill_(fill)

    for T, V, E in ((70, 41, 37), (1, 1, 1), (130, 70, 16)):
        call = inputs(T, V, E, dtype, ignored=0.2)
        expected = results(ops.linear_cross_entropy, call, reduction="sum", backend="triton")
        hidden, weight, bias, labels = (banded_copy(t).view for t in call)
        for module in (kernels, gradients):
            monkeypatch.setattr(module.torch, "empty", fenced)
            monkeypatch.setattr(module.torch, "zeros", lambda *s, **k: fenced(*s, **k, fill=0))
        losses, lse = kernels.row_losses(hidden, weight, bias, labels, ignore_index=IGNORE)
        found = gradients.row_losses_backward(
            torch.ones(T), lse, ("hidden", "weight", "bias"), hidden, weight, bias, labels,
            ignore_index=IGNORE,
        )  # fmt: skip
        monkeypatch.undo()
        assert len(fences) > 5
        for fence in fences:
            fence.check()
        assert_bitwise(losses.sum(), expected[0])
        for a, b in zip(found.values(), expected[1:], strict=True):
            assert_bitwise(a, b)


@pytest.mark.parametrize("dtype", KERNEL_DTYPES, ids=str)
@pytest.mark.parametrize("capability", CAPABILITIES)
def test_every_config_is_right(monkeypatch, capability, dtype):
    monkeypatch.setattr(kernels, "compute_capability", lambda: capability)
    for T, V, E in ((70, 150, 64), (70, 144, 65)):
        check(inputs(T, V, E, dtype))


@pytest.mark.parametrize("precision", ["highest", "high"])
def test_float32_products_follow_torchs_setting(monkeypatch, precision):
    asked = []
    original = kernels.pick_config

    def recording(capability, itemsize, ieee, *rest, **options):
        asked.append(ieee)
        return original(capability, itemsize, ieee, *rest, **options)

    for module in (kernels, gradients):
        monkeypatch.setattr(module, "pick_config", recording)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        check(inputs(40, 50, 16))
    finally:
        torch.set_float32_matmul_precision(before)
    assert set(asked) == {precision == "highest"}
    assert len(asked) == 4  # scores, scores again, and two products


def test_configs_and_slabs_are_bounded():
    for capability, itemsize, aligned, adds in product(
        CAPABILITIES, (2, 4), (True, False), (True, False)
    ):
        for ieee in {False, itemsize == 4}:
            config = kernels.pick_config(capability, itemsize, ieee, aligned, adds)
            per_stage = (config.block_m + config.block_n) * config.block_k * itemsize
            assert per_stage * config.num_stages <= 96 * 1024
            assert config.split % config.block_n == 0
            assert 128 % config.block_m == 128 % config.block_n == 0  # δ is kept in whole tiles
            assert config.block_n % config.block_k == 0  # and is 0 up to the end of one
            assert config.block_m >= 64  # what a warpgroup's instruction needs
    sizes = (1, 4096, 8192, 32768, 65536), (1, 30522, 50257), (64, 768, 1024, 1600)
    for rows, tokens, width in product(*sizes):
        for itemsize, half_weights in ((2, True), (2, False), (4, False)):
            slab = gradients.slab_of(rows, tokens, width, itemsize, half_weights)
            assert slab.rows % 128 == slab.columns % 128 == 0
            delta = slab.rows * slab.columns * itemsize
            held = delta + slab.rows * width * (itemsize + 4)
            if itemsize == 2 and not half_weights:  # float32 weights, rounded by slabs
                held += slab.columns * width * itemsize
            if not half_weights or rows <= 32768 or width < 768:
                assert held <= 64e6
            if half_weights:
                assert triton.cdiv(rows, slab.rows) <= 8
