"""Per-sample losses by Triton kernels.

How the elements of a row are added up, and in which order, depends on the number of columns and on
dtypes alone (:func:`tile_of`, :func:`vector_of`), for rows in planes also on their number. So a row
has the same bits in a slice as in a copy, with or without a selection after it. A program has whole
rows, however few and long they are: 16 rows of 128,000 logits occupy 16 multiprocessors.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ksam_kernels.checks import opmath_dtype
from ksam_kernels.loss import triton_elementwise as elementwise
from ksam_kernels.loss import triton_kernels as kernels
from ksam_kernels.loss.layout import gradient_like, planes_of
from ksam_kernels.topk import triton as topk
from ksam_kernels.triton_support import assertions, double_bits, is_amd, on_device_of

#: Contraction is harmless here and saves an instruction; given explicitly because its default
#: depends on the version of Triton.
OPTIONS: dict[str, Any] = {"enable_fp_fusion": True}

#: Elements of a program of 128 threads: 16 each, or 8 if each takes more than one register.
TILE, SMALL_TILE = 2048, 1024


def tile_of(columns: int, tile: int) -> tuple[int, int, int]:
    """Rows of a program, elements of each at once, and warps: a row longer than a tile has a
    program of its own, with twice the threads."""
    block = min(triton.next_power_of_2(columns), 2 * tile)
    return max(tile // block, 1), block, 4 if block <= tile else 8


def tile_for(x: Tensor, is_plain: bool) -> int:
    """Elements of a program's tile. is_plain: squares, or cross-entropy without probabilities and
    smoothing."""
    return TILE if is_plain and x.dtype != torch.float64 else SMALL_TILE


def vector_of(columns: int, itemsize: int) -> int:
    """Elements of the widest loads, up to 16 bytes, that rows without gaps between them allow."""
    return math.gcd(columns, 16 // itemsize)


def index_of(columns: int) -> tl.dtype:
    """The dtype that counts columns: a loop ends at the first column past the end, up to a block
    after the last."""
    return tl.int32 if columns + 2 * TILE < 2**31 else tl.int64


def aligned(x: Tensor, vector: int) -> Tensor:
    """x [N, ...], or a copy if not all of the N begin at a vector's boundary."""
    if x.stride(0) % vector != 0 or x.data_ptr() % (vector * x.itemsize) != 0:
        return x.clone(memory_format=torch.contiguous_format)
    return x


def matrix_of(x: Tensor, columns: int) -> Tensor:
    """x as [N, columns] with unit stride in rows, of which :func:`vector_of` is true; a copy where
    the layout is another. What Triton knows of an address decides how it adds up."""
    x = x.reshape(-1, columns)
    if columns > 1 and x.stride(1) != 1:
        return x.clone(memory_format=torch.contiguous_format)
    return aligned(x, vector_of(columns, x.itemsize))


def _layout(
    name: str, x: Tensor, target: Tensor, vectors: tuple[int, int], rows: int
) -> dict[str, Any]:
    """Arguments that say where x, which kernels call `name`, and its target lie."""
    vector, target_vector = vectors
    return {
        name: x,
        f"{name}_stride": x.stride(0),
        "target": target,
        "target_stride": target.stride(0),
        "rows": rows,
        "VECTOR": vector,
        "TARGET_VECTOR": target_vector,
    }


def _rows(name: str, x: Tensor, target: Tensor, columns: int) -> dict[str, Any]:
    """:func:`_layout` of x [..., columns] and its target."""
    x = matrix_of(x, columns)
    vector, target_vector = vector_of(columns, x.itemsize), 1
    if target.is_floating_point():
        target_vector = vector_of(columns, target.itemsize)
        target = matrix_of(target, columns)
    else:
        target = target.reshape(-1)
    return _layout(name, x, target, (vector, target_vector), x.shape[0])


def _arguments(
    layout: dict[str, Any],
    dtype: torch.dtype,  # of the input
    weight: Tensor | None,  # [columns]
    columns: int,
) -> dict[str, Any]:
    """Arguments that all kernels take, by name."""
    weight_vector = 1
    if weight is not None:
        weight_vector = vector_of(columns, weight.itemsize)
        weight = matrix_of(weight, columns)
    return {
        **layout,
        "weight": weight,
        "columns": columns,
        "INDEX": index_of(columns),
        "A": tl.float64 if dtype == torch.float64 else tl.float32,
        "WEIGHT_VECTOR": weight_vector,
        **OPTIONS,
    }


def _whole_rows(arguments: dict[str, Any], tile: int) -> tuple[int]:
    """The grid of a sum over rows."""
    rows, block, warps = tile_of(arguments["columns"], tile)
    arguments.update(ROWS=rows, BLOCK=block, num_warps=warps)
    return (triton.cdiv(arguments["rows"], rows),)


def _parts_of_rows(arguments: dict[str, Any], tile: int, grad: Tensor) -> tuple[int]:
    """The grid of a gradient: nothing is added up over a row, whose parts have a program each."""
    columns, g = arguments["columns"], grad.reshape(-1)
    rows, block, warps = tile_of(min(columns, tile), tile)
    arguments.update(ROWS=rows, BLOCK=block, num_warps=warps, grad=g, grad_stride=g.stride(0))
    return (triton.cdiv(arguments["rows"], rows) * triton.cdiv(columns, block),)


# --- Cross-entropy ------------------------------------------------------------------------------


def _side_by_side(logits: Tensor, target: Tensor) -> dict[str, Any]:
    """:func:`_rows` of rows with their classes side by side, copied where they are not."""
    rows = _rows("logits", logits, target, logits.shape[-1])
    return {**rows, "group": 0, "PLANES": False}


def _planes(logits: Tensor, target: Tensor, *gradient: Tensor) -> dict[str, Any] | None:
    """:func:`_rows` of rows in planes, if those of probabilities and the gradient are too."""
    x, soft = planes_of(logits), target.is_floating_point()
    t = planes_of(target) if soft else target.reshape(-1)
    if x is None or t is None or (soft and t.shape != x.shape):
        return None
    if any(getattr(planes_of(out), "shape", None) != x.shape for out in gradient):
        return None
    group = x.shape[2]
    vector, target_vector = vector_of(group, x.itemsize), 1
    x = aligned(x, vector)
    if soft:
        target_vector = vector_of(group, t.itemsize)
        t = aligned(t, target_vector)
    layout = _layout("logits", x, t, (vector, target_vector), x.shape[0] * group)
    return {**layout, "group": group, "PLANES": True}


def tile_of_planes(group: int, columns: int, tile: int) -> tuple[int, int, int]:
    """:func:`tile_of` where rows lie side by side: at least a warp of rows, if there are enough."""
    block = min(triton.next_power_of_2(columns), tile // 32)
    return min(tile // block, triton.next_power_of_2(group)), block, 4


def _rows_of_planes(arguments: dict[str, Any], tile: int) -> tuple[int]:
    """The grid of a sum over rows, those of a program all of one group."""
    group, groups = arguments["group"], arguments["logits"].shape[0]
    rows, block, warps = tile_of_planes(group, arguments["columns"], tile)
    arguments.update(ROWS=rows, BLOCK=block, num_warps=warps)
    return (groups * triton.cdiv(group, rows),)


def _parts_of_planes(arguments: dict[str, Any], tile: int, grad: Tensor) -> tuple[int]:
    """The grid of a gradient of rows in planes."""
    (programs,), g = _rows_of_planes(arguments, tile), grad.reshape(-1)
    arguments.update(grad=g, grad_stride=g.stride(0))
    return (programs * triton.cdiv(arguments["columns"], arguments["BLOCK"]),)


def _cross_entropy_arguments(
    layout: dict[str, Any],
    weight: Tensor | None,  # [C]
    columns: int,
    ignore_index: int,
    label_smoothing: float,
) -> dict[str, Any]:
    logits = layout["logits"]
    kind = kernels.SMOOTHED if label_smoothing > 0 else kernels.CLASSES
    if layout["target"].is_floating_point():
        kind = kernels.PROBABILITIES
    return {
        **_arguments(layout, logits.dtype, weight, columns),
        "ignore_index": ignore_index,
        "confidence": double_bits(1 - label_smoothing),
        "uniform": double_bits(label_smoothing / columns),
        "KIND": kind.value,
        **assertions(amd=is_amd(logits.device)),
    }


def cross_entropy(
    logits: Tensor,  # [..., C]
    target: Tensor,  # [...] or [..., C]
    weight: Tensor | None,  # [C]
    ignore_index: int,
    label_smoothing: float,
) -> tuple[Tensor, Tensor]:
    """Losses [...] float32 and row statistics [..., 3] for the backward pass."""
    *shape, columns = logits.shape
    losses = logits.new_empty(shape, dtype=torch.float32)
    stats = logits.new_empty((*shape, 3), dtype=opmath_dtype(logits.dtype))
    if losses.numel() > 0:
        layout = _planes(logits, target) or _side_by_side(logits, target)
        options = weight, columns, ignore_index, label_smoothing
        arguments = _cross_entropy_arguments(layout, *options)
        tile = tile_for(logits, arguments["KIND"] == 0)
        grid = (_rows_of_planes if layout["PLANES"] else _whole_rows)(arguments, tile)
        loops = columns > arguments["BLOCK"]
        with on_device_of(logits):
            kernels.cross_entropy_kernel[grid](**arguments, losses=losses, stats=stats, LOOPS=loops)
    return losses, stats


def cross_entropy_backward(
    grad: Tensor,  # [...]
    logits: Tensor,  # [..., C]
    target: Tensor,  # [...] or [..., C]
    stats: Tensor,  # [..., 3]
    weight: Tensor | None,  # [C]
    ignore_index: int,
    label_smoothing: float,
) -> Tensor:
    """Gradient [..., C] of the logits, in their dtype."""
    out = gradient_like(logits)
    if out.numel() == 0:
        return out
    layout = _planes(logits, target, out) or _side_by_side(logits, target)
    options = weight, logits.shape[-1], ignore_index, label_smoothing
    arguments = _cross_entropy_arguments(layout, *options)
    tile, stats = tile_for(logits, arguments["KIND"] == 0), stats.contiguous()
    planes = layout["PLANES"]
    grid = (_parts_of_planes if planes else _parts_of_rows)(arguments, tile, grad)
    # Contiguous as the kernel sees it: the result itself, or to be copied to it.
    dx = out if planes or out.is_contiguous() else logits.new_empty(logits.shape)
    with on_device_of(logits):
        kernels.cross_entropy_backward_kernel[grid](**arguments, stats=stats, out=dx)
    return out if dx is out else out.copy_(dx)


def select_cross_entropy(
    logits: Tensor,  # [B, C]
    target: Tensor,  # [B] or [B, C]
    k: int,
    weight: Tensor | None,  # [C]
    ignore_index: int,
    label_smoothing: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Losses [B], row statistics [B, 3] and indices [k] of the k largest losses.

    Launches: that of the losses and those of the selection, one up to 32,768 rows. They are not
    merged even for few rows: the last program of the losses would have to know that it is the last,
    by an atomic counter that every launch leaves at zero.
    """
    losses, stats = cross_entropy(logits, target, weight, ignore_index, label_smoothing)
    return losses, stats, topk.topk_indices(losses, k)


# --- Means over the elements of a sample --------------------------------------------------------


def _sample_arguments(input: Tensor, target: Tensor, weight: Tensor | None) -> dict[str, Any]:
    per_sample = math.prod(input.shape[1:])
    if weight is not None:
        weight = weight.expand(input.shape[1:])
    layout = _rows("input", input, target, per_sample)
    return _arguments(layout, input.dtype, weight, per_sample)


def _means(input: Tensor, target: Tensor, weight: Tensor | None, binary: bool) -> Tensor:
    losses = input.new_empty((input.shape[0],), dtype=torch.float32)
    if losses.numel() > 0:
        arguments = _sample_arguments(input, target, weight)
        grid = _whole_rows(arguments, tile_for(input, not binary))
        with on_device_of(input):
            elementwise.mean_kernel[grid](**arguments, losses=losses, BINARY=binary)
    return losses


def _mean_gradients(
    grad: Tensor, input: Tensor, target: Tensor, weight: Tensor | None, binary: bool
) -> Tensor:
    out = input.new_empty(input.shape)
    if out.numel() > 0:
        arguments = _sample_arguments(input, target, weight)
        grid = _parts_of_rows(arguments, tile_for(input, not binary), grad)
        with on_device_of(input):
            elementwise.mean_backward_kernel[grid](**arguments, out=out, BINARY=binary)
    return out


def binary_cross_entropy_with_logits(
    logits: Tensor,  # [B, ...]
    target: Tensor,  # [B, ...]
    pos_weight: Tensor | None,  # broadcasts to the trailing dimensions
) -> Tensor:
    """Losses [B] float32."""
    return _means(logits, target, pos_weight, True)


def binary_cross_entropy_with_logits_backward(
    grad: Tensor,  # [B]
    logits: Tensor,  # [B, ...]
    target: Tensor,  # [B, ...]
    pos_weight: Tensor | None,
) -> Tensor:
    """Gradient [B, ...] of the logits, in their dtype."""
    return _mean_gradients(grad, logits, target, pos_weight, True)


def mse(
    pred: Tensor,  # [B, ...]
    target: Tensor,  # [B, ...]
) -> Tensor:
    """Losses [B] float32."""
    return _means(pred, target, None, False)


def mse_backward(
    grad: Tensor,  # [B]
    pred: Tensor,  # [B, ...]
    target: Tensor,  # [B, ...]
) -> Tensor:
    """Gradient [B, ...] of pred, in its dtype."""
    return _mean_gradients(grad, pred, target, None, False)
