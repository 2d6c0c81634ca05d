"""Per-sample losses: one pass over the logits, float32 results."""

from __future__ import annotations

from torch import Tensor

from ksam_kernels import library
from ksam_kernels.checks import (
    FLOATING,
    INDEX,
    check_constant,
    check_device,
    check_dtype,
    check_int,
    check_range,
    check_shape,
    check_tensor,
    plain_number,
)
from ksam_kernels.dtensor import first_dtensor
from ksam_kernels.loss import differentiable, native
from ksam_kernels.loss.layout import classes_apart, group_of, in_memory_order, in_planes_of
from ksam_kernels.topk.functional import check_k, topk_indices

__all__ = [
    "binary_cross_entropy_with_logits",
    "cross_entropy",
    "mse",
    "select_cross_entropy",
]


def _check_whole(name: str, tensor: Tensor) -> None:
    if first_dtensor([tensor]) is not None:
        raise TypeError(f"{name} must not be a DTensor, got one; pass {name}.full_tensor()")


def _check_cross_entropy(
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
) -> None:
    check_dtype("logits", logits, FLOATING)
    _check_whole("logits", logits)
    if logits.dim() == 0 or logits.shape[-1] == 0:
        raise ValueError(f"logits must be [..., C] with C >= 1, got shape {tuple(logits.shape)}")
    check_tensor("target", target)
    check_device("target", target, "logits", logits)
    check_int("ignore_index", ignore_index)
    if not -(2**63) <= ignore_index < 2**63:
        raise ValueError(f"ignore_index must fit in 64 bits, got {ignore_index}")
    if target.is_floating_point():
        check_dtype("target", target, FLOATING)
        check_shape("target", target, logits.shape, "the shape of logits (it holds probabilities)")
        check_constant("target", target)
        if ignore_index >= 0:
            raise ValueError(
                f"ignore_index must be negative when target holds probabilities, which have no "
                f"class to ignore, got {ignore_index}"
            )
    else:
        check_dtype("target", target, INDEX)
        meaning = "one class per row of logits [..., C] (pass [B, C, ...] as logits.movedim(1, -1))"
        check_shape("target", target, logits.shape[:-1], meaning)
    if weight is not None:
        check_dtype("weight", weight, FLOATING)
        check_shape("weight", weight, logits.shape[-1:], "one weight per class")
        check_device("weight", weight, "logits", logits)
        check_constant("weight", weight)
    check_range("label_smoothing", label_smoothing, 0.0, 1.0)


def _as_kernels_take_them(logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Logits and target as kernels take them: copies of logits in a layout that no kernel reads,
    and of probabilities laid out differently from the logits. Made before autograd saves them:
    otherwise the backward pass would copy them once more."""
    if classes_apart(logits) and group_of(logits) == 0 and library.wants_grad(logits):
        logits = logits.contiguous()
    if target.is_floating_point():
        target = in_planes_of(logits, target)
    return logits, target


def cross_entropy(
    logits: Tensor,
    target: Tensor,
    *,
    weight: Tensor | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
) -> Tensor:
    r"""Cross-entropy of every sample, ``F.cross_entropy(..., reduction="none")`` in float32.

    The classes are always the **last** dimension: for torch's ``[B, C, ...]`` pass
    ``logits.movedim(1, -1)``, and probabilities as target likewise. That copies nothing where 16 or
    more rows lie side by side: they are read as they lie. The gradient has the logits' layout.

    With :math:`z_c = x_c - \max_j x_j` and :math:`\ell_c = \log \sum_j e^{z_j} - z_c`,

    .. math:: L = (1 - \epsilon)\, w_y \ell_y + \tfrac{\epsilon}{C} \sum_c w_c \ell_c
              \qquad\text{or}\qquad
              L = \sum_c w_c \left((1 - \epsilon)\, t_c + \tfrac{\epsilon}{C}\right) \ell_c

    for a class :math:`y` or probabilities :math:`t`, as ``torch.nn.CrossEntropyLoss`` defines them.
    Subtracting the maximum first keeps the digits that ``logsumexp(x) - x_y`` loses when the logits
    share a large offset. Floor of bytes moved: each logit once; per row 8 for an int64 class
    (probabilities: each once) and 4 for the loss. Where a gradient is wanted, 12 more for the row's
    statistics (float64: 24).

    Args:
        logits: ``[..., C]``, float32, bfloat16, float16 or float64; never written.
        target: class indices ``[...]`` (int64 or int32), or probabilities ``[..., C]`` (floating).
        weight: ``[C]``, floating and finite; the weight of each class.
        ignore_index: rows with this class give loss 0 and gradient 0, even with NaN among their
            logits. May be a valid class.
        label_smoothing: :math:`\epsilon` in [0, 1].

    Returns:
        Losses ``[...]``, float32 whatever the dtype of the logits. A row with +inf or NaN, or only
        -inf, gives NaN. Differentiable with respect to the logits: the first time by a kernel;
        further derivatives, and the transforms of ``torch.func``, by PyTorch's own operations.

    Raises:
        TypeError: a dtype not named above.
        ValueError: shapes or devices that do not fit, C = 0, smoothing outside [0, 1], a target or
            weight that requires grad.
        IndexError: on the CPU, a class outside [0, C) that is not ``ignore_index`` (a GPU raises a
            device-side assertion instead).
    """
    options = weight, ignore_index, label_smoothing
    quick = native.try_forward("cross_entropy", logits, target, *options)
    if quick is not None:
        return quick[0]
    _check_cross_entropy(logits, target, *options)
    options = weight, ignore_index, plain_number(label_smoothing)
    if library.is_transformed():
        return differentiable.cross_entropy(logits, target, *options)
    logits, target = _as_kernels_take_them(logits, target)
    losses: Tensor
    losses, _ = library.call("cross_entropy", logits, target, *options)
    return losses


def select_cross_entropy(
    logits: Tensor,
    target: Tensor,
    k: int,
    *,
    weight: Tensor | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """:func:`cross_entropy` of every sample and the indices of the k largest, in one operator.

    Args:
        logits: ``[B, C]``; the other arguments are those of :func:`cross_entropy`.
        k: number of samples to select, ``1 <= k <= B``.

    Returns:
        ``losses`` ``[B]``, bit for bit those of :func:`cross_entropy` and differentiable like them,
        and ``indices`` ``[k]``, those of ``topk_indices(losses, k)``.

    Raises:
        ValueError: logits that are not two-dimensional, k outside [1, B]; and all that
            :func:`cross_entropy` raises.
    """
    options = weight, ignore_index, label_smoothing
    quick = native.try_forward("select_cross_entropy", logits, target, k, *options)
    if quick is not None:
        losses, _, indices = quick
        return losses, indices
    _check_cross_entropy(logits, target, *options)
    options = weight, ignore_index, plain_number(label_smoothing)
    if logits.dim() != 2:
        raise ValueError(f"logits must be [B, C] to select rows, got shape {tuple(logits.shape)}")
    check_k(k, logits.shape[0])
    if library.is_transformed():
        losses = differentiable.cross_entropy(logits, target, *options)
        return losses, topk_indices(losses.detach(), k)
    logits, target = _as_kernels_take_them(logits, target)
    losses, _, indices = library.call("select_cross_entropy", logits, target, k, *options)
    return losses, indices


def _check_elementwise(name: str, input: Tensor, target: Tensor) -> None:
    check_dtype(name, input, FLOATING)
    _check_whole(name, input)
    if input.dim() == 0 or (input.shape[0] > 0 and input.numel() == 0):
        raise ValueError(
            f"{name} must be [B, ...] with at least one element per sample, "
            f"got shape {tuple(input.shape)}"
        )
    check_dtype("target", target, FLOATING)
    check_shape("target", target, input.shape, f"the shape of {name}")
    check_device("target", target, name, input)
    check_constant("target", target)


def binary_cross_entropy_with_logits(
    logits: Tensor, target: Tensor, *, pos_weight: Tensor | None = None
) -> Tensor:
    r"""Binary cross-entropy of every sample: the mean over its trailing dimensions, float32.

    .. math:: L_b = \tfrac{1}{n} \sum_j (1 - t_{bj})\, x_{bj}
                    + \left(1 + (p_j - 1)\, t_{bj}\right) \log(1 + e^{-x_{bj}})

    as ``F.binary_cross_entropy_with_logits(..., reduction="none").flatten(1).mean(1)``. Floor of
    bytes moved: logits and target once, 4 per sample. Samples of any memory format are read as they
    lie, and the gradient is written in that format; a target of another format is copied.

    Args:
        logits: ``[B, ...]``, float32, bfloat16, float16 or float64.
        target: same shape, floating.
        pos_weight: weight :math:`p` of the positive term, broadcast to the trailing dimensions.

    Returns:
        Losses ``[B]``, float32. Differentiable with respect to the logits, as
        :func:`cross_entropy`.

    Raises:
        TypeError: a dtype not named above.
        ValueError: shapes or devices that do not fit, samples without elements, a target or
            pos_weight that requires grad.
    """
    quick = native.try_elementwise("binary_cross_entropy_with_logits", logits, target, pos_weight)
    if quick is not None:
        return quick
    _check_elementwise("logits", logits, target)
    if pos_weight is not None:
        check_dtype("pos_weight", pos_weight, FLOATING)
        check_device("pos_weight", pos_weight, "logits", logits)
        check_constant("pos_weight", pos_weight)
        trailing = logits.shape[1:]
        try:
            fits = pos_weight.expand(trailing).shape == trailing
        except RuntimeError:
            fits = False
        if not fits:
            raise ValueError(
                f"pos_weight must broadcast to the shape of one sample, {tuple(trailing)}, "
                f"got shape {tuple(pos_weight.shape)}"
            )
    if library.is_transformed():
        return differentiable.binary_cross_entropy_with_logits(logits, target, pos_weight)
    if pos_weight is not None:
        of_all = pos_weight.expand(1, *logits.shape[1:])
        logits, target, of_all = in_memory_order(logits, target, of_all)
        pos_weight = of_all[0]
    else:
        logits, target = in_memory_order(logits, target)
    losses: Tensor = library.call("binary_cross_entropy_with_logits", logits, target, pos_weight)
    return losses


def mse(pred: Tensor, target: Tensor) -> Tensor:
    r"""Squared error of every sample: the mean over its trailing dimensions, float32.

    .. math:: L_b = \tfrac{1}{n} \sum_j (x_{bj} - t_{bj})^2

    as ``F.mse_loss(..., reduction="none").flatten(1).mean(1)``. Floor of bytes moved: both inputs
    once, 4 per sample. Samples of any memory format are read as they lie, and the gradient is
    written in that format; a target of another format is copied.

    Args:
        pred: ``[B, ...]``, float32, bfloat16, float16 or float64.
        target: same shape, floating.

    Returns:
        Losses ``[B]``, float32. Differentiable with respect to ``pred``, as
        :func:`cross_entropy`.

    Raises:
        TypeError: a dtype not named above.
        ValueError: shapes or devices that do not fit, samples without elements, a target that
            requires grad.
    """
    quick = native.try_elementwise("mse", pred, target)
    if quick is not None:
        return quick
    _check_elementwise("pred", pred, target)
    if library.is_transformed():
        return differentiable.mse(pred, target)
    losses: Tensor = library.call("mse", *in_memory_order(pred, target))
    return losses
