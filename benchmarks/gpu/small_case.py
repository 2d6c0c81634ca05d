"""Every kernel once or more, on small tensors with awkward sizes: what compute-sanitizer watches.

``python -m benchmarks.gpu.small_case``
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

import ksam_kernels as kk

_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_SHAPES = ((1,), (0,), (17,), (3, 5), (4099,), (64, 70))


def _backward(losses: Tensor) -> None:
    losses.sum().backward()  # type: ignore[no-untyped-call]


def _losses(device: torch.device, dtype: torch.dtype) -> None:
    for rows, classes in ((3, 5), (33, 1000), (2, 5003)):
        logits = torch.randn(rows, classes, device=device).to(dtype)
        target = torch.randint(classes, (rows,), device=device)
        target[0] = -100
        soft = torch.rand(rows, classes, device=device).softmax(1)
        weight = torch.rand(classes, device=device)
        for smoothing in (0.0, 0.1):
            x = logits.clone().requires_grad_()
            _backward(kk.cross_entropy(x, target, weight=weight, label_smoothing=smoothing))
            _backward(kk.cross_entropy(x, soft, label_smoothing=smoothing))
        kk.cross_entropy(logits[:, : classes - 1], target.clamp(max=classes - 2))
        for k in (1, rows):
            kk.select_cross_entropy(logits, target, k)
        x = logits.clone().requires_grad_()
        _backward(kk.mse(x, soft))
        _backward(kk.binary_cross_entropy_with_logits(x, soft, pos_weight=weight))


def _pixels(device: torch.device, dtype: torch.dtype) -> None:
    """Rows that lie side by side, and samples whose elements are in another order."""
    for classes in (2, 5, 21, 300):
        logits = torch.randn(3, classes, 7, 9, device=device).to(dtype)
        target = torch.randint(classes, (3, 7, 9), device=device)
        soft = torch.rand(logits.shape, device=device).softmax(1).movedim(1, -1)
        for wanted in (target, soft):
            x = logits.clone().requires_grad_()
            _backward(kk.cross_entropy(x.movedim(1, -1), wanted))
        x = logits.contiguous(memory_format=torch.channels_last).requires_grad_()
        goal = torch.rand_like(x)
        _backward(kk.mse(x, goal))
        _backward(kk.binary_cross_entropy_with_logits(x, goal))


def _topk(device: torch.device, dtype: torch.dtype) -> None:
    for size in (1, 1000, 4097, 70001):
        losses = torch.randn(size, device=device).to(dtype)
        kk.topk_indices(losses, max(1, size // 3))
        kk.topk_indices(losses.round(), size)


def _compact(device: torch.device, dtype: torch.dtype) -> None:
    indices = torch.tensor([4, 0, 0, 3], device=device)
    images = torch.randn(5, 3, 7, 7, device=device).to(dtype)
    batch = [images, images.contiguous(memory_format=torch.channels_last), images[:, :2, :3]]
    batch += [torch.arange(5, device=device), torch.rand(5, 13, device=device) < 0.5]
    batch.append(torch.zeros(5, 0, device=device))
    kk.compact_batch(batch, indices)
    kk.compact_batch([torch.arange(5 * n, device=device).view(5, n) for n in range(1, 150)],
                     indices.int())  # fmt: skip


def _lists(device: torch.device, dtype: torch.dtype, shapes: Sequence[tuple[int, ...]]) -> None:
    def normal() -> list[Tensor]:
        return [torch.randn(shape, device=device).to(dtype) for shape in shapes]

    params, grads, backup, one, two = (normal() for _ in range(5))
    two = [t.square() for t in two]
    steps = [torch.zeros((), device=device) for _ in shapes]
    one_element = torch.ones((), device=device)
    amp: dict[str, Any] = {"grad_scale": one_element, "found_inf": one_element}
    kk.grad_norm(grads)
    for adaptive in (False, True):
        kk.perturb_(params, grads, backup, rho=0.05, adaptive=adaptive, eta=0.01)
        kk.restore_(params, backup)
    wide = [torch.stack([t, t], -1)[..., 0] for t in grads]  # with gaps
    none: dict[str, Any] = {}
    for options in (none, amp):
        kk.restore_sgd_(params, backup, wide, one, steps=steps, lr=0.1, momentum=0.9, **options)
        kk.restore_adam_(params, backup, grads, one, two, steps, lr=0.1, **options)


def run_all(device: torch.device) -> None:
    """Every operation in every dtype."""
    torch.manual_seed(0)
    for dtype in _DTYPES:
        _losses(device, dtype)
        _pixels(device, dtype)
        _topk(device, dtype)
        _compact(device, dtype)
        _lists(device, dtype, _SHAPES)
    _lists(device, torch.float32, _SHAPES * 60)  # more tensors than a kernel takes at a time
    if device.type == "cuda":
        torch.cuda.synchronize(device)


if __name__ == "__main__":
    run_all(torch.device("cuda"))
    print("small case: done")
