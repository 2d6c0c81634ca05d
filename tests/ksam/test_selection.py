"""The selection is by the losses that the function gives, however it makes them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import ksam
import ksam_kernels
from ksam import KSAM
from tests.ksam.models import Batch, batch, loss_of, network
from tests.ksam.test_family import build, data_of, losses


@pytest.mark.parametrize("how", ["weighted", "in pieces", "mean of tokens"])
def test_losses_are_ranked_as_the_function_returns_them(backend: str, how: str) -> None:
    model = network()
    tokens = {"x": torch.randn(24, 7, 8), "y": torch.randint(5, (24, 7))}
    data = tokens if how == "mean of tokens" else {**batch(), "w": torch.rand(24)}

    def function(b: Batch) -> Tensor:
        if how == "weighted":
            return loss_of(model)(b) * b["w"]
        if how == "mean of tokens":
            return ksam.cross_entropy(model(b["x"]), b["y"]).mean(1)
        pieces = zip(model(b["x"]).split(6), b["y"].split(6), strict=True)
        return torch.cat([ksam.cross_entropy(x, y) for x, y in pieces])

    with torch.no_grad():
        expected = ksam_kernels.topk_indices(function(data), 8)
        unweighted = loss_of(model)(batch())
    assert how != "weighted" or not torch.equal(expected, ksam_kernels.topk_indices(unweighted, 8))
    result = KSAM(model.parameters(), torch.optim.SGD, lr=0.1, k=8).step(function, data)
    assert torch.equal(result.indices, expected)


def test_the_share_is_float32(backend: str) -> None:
    optimizer = build("KSAM", network(dtype=torch.float64))
    optimizer.report_share = True
    result = optimizer.step(losses(optimizer.model), data_of(0))  # type: ignore[arg-type]
    assert result.share.dtype == torch.float32
