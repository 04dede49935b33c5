"""Cross-entropy of a linear layer's scores, a tile of [rows, vocabulary] at a time.

Ignored rows are gathered away first. Forward keeps a running log-sum-exp a row; backward computes
each tile of scores again and turns it in place into the loss's gradient by those scores.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

# A tile of scores: 8 MB in float32. Wide enough that the products run at a GEMM's rate, and with
# the few copies of it that live at a time far below 64 MB.
_ROWS = 1024
_COLUMNS = 2048


def row_losses(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, *, ignore_index: int
) -> tuple[Tensor, Tensor]:
    """Each row's loss and the log-sum-exp of its scores, both shaped like labels; 0 if ignored."""
    kept = labels != ignore_index
    hidden_RE, labels_R = hidden[kept], labels[kept]
    wide, dtype = _dtypes(hidden)
    lse_R = hidden.new_full(labels_R.shape, -torch.inf, dtype=wide)
    # Each row's score of its label; of a label outside the vocabulary NaN.
    scores_R = hidden.new_full(labels_R.shape, torch.nan, dtype=wide)
    for first, w_CE, b_C in _slabs(weight, bias, dtype):
        for rows in _spans(labels_R.shape[0]):
            logits_RC = F.linear(hidden_RE[rows].to(dtype), w_CE, b_C).to(wide)
            lse_R[rows] = torch.logaddexp(lse_R[rows], logits_RC.logsumexp(-1))
            row, column = _hits(labels_R[rows], first, w_CE.shape[0])
            scores_R[rows][row] = logits_RC[row, column]
    blank = lse_R.new_zeros(labels.shape)
    return blank.masked_scatter(kept, lse_R - scores_R), blank.masked_scatter(kept, lse_R)


def row_losses_backward(
    grad: Tensor,
    lse: Tensor,
    wanted: Collection[str],
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    *,
    ignore_index: int,
) -> dict[str, Tensor]:
    """Gradients of Σ grad · loss.

    Args:
        grad: Shaped like labels, in the losses' dtype.
        lse: What `row_losses` gave.
        wanted: Names of the inputs to differentiate by: hidden, weight, bias.
        hidden: As for `row_losses`, and so the rest.
        weight: Likewise.
        bias: Likewise.
        labels: Likewise.
        ignore_index: Likewise.

    Returns:
        By name, the gradients that are wanted.
    """
    wide, dtype = _dtypes(hidden)
    kept = labels != ignore_index
    hidden_RE, labels_R, lse_R1 = hidden[kept], labels[kept], lse[kept][:, None]
    grad_R1, scale = normalised(grad[kept])
    grad_R1 = grad_R1[:, None]
    outputs = {"hidden": torch.zeros_like(hidden_RE, dtype=wide)}
    for name, parameter in (("weight", weight), ("bias", bias)):
        if name in wanted and parameter is not None:
            outputs[name] = torch.empty_like(parameter, memory_format=torch.contiguous_format)
    for first, w_CE, b_C in _slabs(weight, bias, dtype):
        slab = slice(first, first + w_CE.shape[0])
        grad_w_CE = torch.zeros_like(w_CE, dtype=wide)
        grad_b_C = grad_w_CE.new_zeros(w_CE.shape[0])
        for rows in _spans(labels_R.shape[0]):
            # softmax − one-hot, times the row's gradient
            x_RE = hidden_RE[rows].to(dtype)
            delta_RC = F.linear(x_RE, w_CE, b_C).to(wide)
            delta_RC.sub_(lse_R1[rows]).exp_()
            delta_RC[_hits(labels_R[rows], first, w_CE.shape[0])] -= 1.0
            delta_RC.mul_(grad_R1[rows])
            grad_b_C += delta_RC.sum(0)
            delta_RC = delta_RC.to(dtype)
            if "hidden" in wanted:
                outputs["hidden"][rows] += delta_RC @ w_CE
            if "weight" in wanted:
                grad_w_CE += delta_RC.t() @ x_RE
        for name, part in (("weight", grad_w_CE), ("bias", grad_b_C)):
            if name in outputs:
                outputs[name][slab] = part.mul_(scale)
    rows_RE = outputs["hidden"].mul_(scale).to(hidden.dtype)
    outputs["hidden"] = hidden.new_zeros(hidden.shape)
    outputs["hidden"][kept] = rows_RE
    return {name: outputs[name] for name in wanted}


def normalised(grad: Tensor) -> tuple[Tensor, Tensor]:
    """The gradient divided by its largest finite magnitude, and that magnitude.

    A mean over thousands of rows would push probabilities below the smallest half-precision number.
    """
    size = grad.abs()
    scale = torch.where(size.isfinite(), size, 0.0).max() if len(size) else grad.new_ones(())
    return grad / torch.where(scale == 0, 1.0, scale), scale


def _dtypes(hidden: Tensor) -> tuple[torch.dtype, torch.dtype]:
    """Of sums, and of products: half scores cost accuracy, and on a CPU float32 ones no time."""
    wide = torch.promote_types(hidden.dtype, torch.float32)
    return wide, wide if hidden.device.type == "cpu" else hidden.dtype


def _slabs(
    weight: Tensor, bias: Tensor | None, dtype: torch.dtype
) -> Iterator[tuple[int, Tensor, Tensor | None]]:
    """Runs of the vocabulary: the first token, its rows of weight and its bias, in dtype."""
    for first in range(0, weight.shape[0], _COLUMNS):
        slab = slice(first, first + _COLUMNS)
        yield first, weight[slab].to(dtype), None if bias is None else bias[slab].to(dtype)


def _spans(count: int) -> Iterator[slice]:
    """Runs of rows."""
    return (slice(first, min(first + _ROWS, count)) for first in range(0, count, _ROWS))


def _hits(labels_R: Tensor, first: int, columns: int) -> tuple[Tensor, Tensor]:
    """Rows whose label lies among the `columns` tokens from `first` on, and its column there."""
    column = labels_R.long() - first
    (row,) = torch.where((column >= 0) & (column < columns))
    return row, column[row]
