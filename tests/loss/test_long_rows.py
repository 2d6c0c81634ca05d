"""Rows of more elements than 32 bits count: for Triton's kernels, whose index may have 64."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import ksam_kernels
from tests.device import DEVICE
from tests.helpers import all_same_bits


def gradients(x: Tensor, target: Tensor) -> list[Tensor]:
    """Losses of every kind of row, and their gradients."""
    classes = torch.arange(len(x), device=x.device) % x.shape[1]
    smoothed = {"weight": target[0].float(), "label_smoothing": 0.1}
    losses: list[Callable[[Tensor], Tensor]] = [
        lambda x: ksam_kernels.cross_entropy(x, classes),
        lambda x: ksam_kernels.cross_entropy(x, classes, **smoothed),
        lambda x: ksam_kernels.cross_entropy(x, target),
        lambda x: ksam_kernels.binary_cross_entropy_with_logits(x, target, pos_weight=target[0]),
        lambda x: ksam_kernels.mse(x, target),
    ]
    found = []
    for loss in losses:
        leaf = x.clone().requires_grad_()
        values = loss(leaf)
        values.sum().backward()
        assert leaf.grad is not None
        found += [values.detach(), leaf.grad]
    return found


@pytest.mark.parametrize("columns", [1, 7, 2049, 5000])
def test_a_wider_index_changes_no_bit(
    backend: str, columns: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Other backends have no narrower one."""
    x, target = torch.randn(2, columns, device=DEVICE), torch.rand(2, columns, device=DEVICE)
    expected = gradients(x, target)
    if "triton" in backend:
        import triton.language as tl

        from ksam_kernels.loss import triton as launches

        assert launches.index_of(columns) == tl.int32
        monkeypatch.setattr(launches, "index_of", lambda columns: tl.int64)
    assert all_same_bits(gradients(x, target), expected)
