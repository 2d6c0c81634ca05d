"""Small models, batches and an independent K-SAM for the optimizer's tests."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ksam import cross_entropy
from tests.device import DEVICE

Batch = dict[str, Tensor]


def network(*, batchnorm: bool = False, dtype: torch.dtype = torch.float32) -> nn.Sequential:
    norm = [nn.BatchNorm1d(16)] if batchnorm else []
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(8, 16), *norm, nn.Tanh(), nn.Linear(16, 5)).to(dtype)


def batch(seed: int = 0, size: int = 24, dtype: torch.dtype = torch.float32) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    with torch.device("cpu"):
        x = torch.randn(size, 8, generator=generator).to(dtype)
        y = torch.randint(5, (size,), generator=generator)
    return {"x": x.to(DEVICE), "y": y.to(DEVICE)}


def loss_of(model: nn.Module) -> Callable[[Batch], Tensor]:
    return lambda b: cross_entropy(model(b["x"]), b["y"])


def noting_weights(model: nn.Module) -> tuple[Callable[[Batch], Tensor], list[list[Tensor]]]:
    """Its loss, and the weights in every call of that."""
    seen: list[list[Tensor]] = []

    def function(b: Batch) -> Tensor:
        seen.append(weights(model))
        return loss_of(model)(b)

    return function, seen


def weights(model: nn.Module) -> list[Tensor]:
    return [p.detach().clone() for p in model.parameters()]


def plain_ksam_step(
    model: nn.Module, base: torch.optim.Optimizer, data: Batch, k: int, rho: float
) -> None:
    """The algorithm in plain torch, with nothing of this library."""
    params = list(model.parameters())
    with torch.no_grad():
        losses = F.cross_entropy(model(data["x"]), data["y"], reduction="none")
    chosen = torch.sort(losses, descending=True, stable=True).indices[:k].sort().values
    x, y = data["x"][chosen], data["y"][chosen]
    grads = torch.autograd.grad(F.cross_entropy(model(x), y), params)
    norm = torch.sqrt(sum(g.double().square().sum() for g in grads))
    old = [p.detach().clone() for p in params]
    with torch.no_grad():
        for p, g in zip(params, grads, strict=True):
            p += rho * g / norm
    grads = torch.autograd.grad(F.cross_entropy(model(x), y), params)
    with torch.no_grad():
        for p, w, g in zip(params, old, grads, strict=True):
            p.copy_(w)
            p.grad = g
    base.step()
