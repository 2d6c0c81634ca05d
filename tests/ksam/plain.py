"""The family in plain torch, one function each, with nothing of this library.

Each takes the gradient at the perturbed weights and leaves it in ``.grad``; the caller steps.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Batch = dict[str, Tensor]


def losses_of(model: nn.Module, data: Batch) -> Tensor:
    return F.cross_entropy(model(data["x"]), data["y"], reduction="none")


def rows(data: Batch, chosen: Tensor) -> Batch:
    return {name: tensor[chosen] for name, tensor in data.items()}


def gradient(model: nn.Module, data: Batch) -> list[Tensor]:
    params = list(model.parameters())
    return list(torch.autograd.grad(losses_of(model, data).mean(), params))


def largest(values: Tensor, k: int) -> Tensor:
    return torch.sort(values, descending=True, stable=True).indices[:k].sort().values


def norm_of(tensors: list[Tensor]) -> Tensor:
    return torch.sqrt(sum((t.double().square().sum() for t in tensors), torch.zeros(())))


def moved_by(
    model: nn.Module, shifts: list[Tensor], then: Callable[[], list[Tensor]]
) -> list[Tensor]:
    """What ``then`` finds at the weights plus ``shifts``; the weights come back."""
    old = [p.detach().clone() for p in model.parameters()]
    with torch.no_grad():
        for p, shift in zip(model.parameters(), shifts, strict=True):
            p += shift
    found = then()
    with torch.no_grad():
        for p, w in zip(model.parameters(), old, strict=True):
            p.copy_(w)
    return found


def euclidean(direction: list[Tensor], rho: float) -> list[Tensor]:
    norm = norm_of(direction)
    return [rho * g / norm if norm > 0 else torch.zeros_like(g) for g in direction]


def adaptive(
    model: nn.Module, direction: list[Tensor], rho: float, eta: float, scaled: list[bool]
) -> list[Tensor]:
    """ASAM's shifts along a direction that is not 0: T = |w| + eta where it is scaled, else 1."""
    ts = [
        p.detach().abs() + eta if is_scaled else torch.ones_like(p)
        for p, is_scaled in zip(model.parameters(), scaled, strict=True)
    ]
    norm = norm_of([t * g for t, g in zip(ts, direction, strict=True)])
    return [rho * t * t * g / norm for t, g in zip(ts, direction, strict=True)]


def of_all(
    model: nn.Module, direction: list[Tensor], rho: float, eta: float | None
) -> list[Tensor]:
    """Along a direction: adaptive in all weights, or with no eta not at all."""
    if eta is None or norm_of(direction) == 0:
        return euclidean(direction, rho)
    return adaptive(model, direction, rho, eta, [True] * len(direction))


def leave(model: nn.Module, grads: list[Tensor]) -> None:
    for p, g in zip(model.parameters(), grads, strict=True):
        p.grad = g.clone()


def sam(model: nn.Module, ascent: Batch, descent: Batch, rho: float) -> None:
    """SAM whose two gradients may see different samples."""
    shifts = euclidean(gradient(model, ascent), rho)
    leave(model, moved_by(model, shifts, lambda: gradient(model, descent)))


def asam(model: nn.Module, data: Batch, rho: float, eta: float, scaled: list[bool]) -> None:
    shifts = adaptive(model, gradient(model, data), rho, eta, scaled)
    leave(model, moved_by(model, shifts, lambda: gradient(model, data)))


def esam(
    model: nn.Module,
    data: Batch,
    rho: float,
    beta: float,
    gamma: int,
    drawn: list[bool],
    eta: float | None = None,
) -> None:
    before = losses_of(model, data).detach()
    grads = gradient(model, data)
    kept = [
        g if is_drawn else torch.zeros_like(g) for g, is_drawn in zip(grads, drawn, strict=True)
    ]

    def descend() -> list[Tensor]:
        with torch.no_grad():
            increase = losses_of(model, data) - before
        return gradient(model, rows(data, largest(increase, gamma)))

    leave(model, moved_by(model, of_all(model, kept, rho / beta, eta), descend))


def ordered(model: nn.Module, data: Batch, q: int) -> None:
    losses = losses_of(model, data)
    mean = losses.topk(q).values.mean()
    leave(model, list(torch.autograd.grad(mean, list(model.parameters()))))


def msam(
    model: nn.Module,
    base: torch.optim.Optimizer,
    data: Batch,
    rho: float,
    name: str,
    eta: float | None = None,
) -> None:
    params = list(model.parameters())
    buffers = [base.state[p].get(name) if p in base.state else None for p in params]
    zeros = [torch.zeros_like(p) for p in params]
    v = [z if b is None else b for b, z in zip(buffers, zeros, strict=True)]
    shifts = of_all(model, [-b for b in v], rho, eta)
    leave(model, moved_by(model, shifts, lambda: gradient(model, data)))
