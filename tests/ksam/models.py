"""Small models and batches, methods to train them with, and an independent K-SAM."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.amp import GradScaler

import ksam
from ksam import SharpnessAware, cross_entropy
from tests.device import DEVICE

Batch = dict[str, Tensor]

SIZE = 48  # samples in the data set that the methods with tables know
STEPS = 6
SGD = {"lr": 0.1, "momentum": 0.9, "weight_decay": 1e-3}
THRESHOLD = 0.36  # of AutoKSAM: the shares of these batches are 0.34 to 0.38
SCALE = 2.0**10
#: Base optimizers whose step the kernels take, and others that take it themselves.
BASES = [
    pytest.param(torch.optim.SGD, {"lr": 0.1, "momentum": 0.9}, id="SGD"),
    pytest.param(torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "dampening": 0.5}, id="dampened"),
    pytest.param(torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "fused": True}, id="SGD fused"),
    pytest.param(torch.optim.AdamW, {"lr": 0.01}, id="AdamW"),
    pytest.param(torch.optim.RMSprop, {"lr": 0.01}, id="RMSprop"),
]


def network(*, batchnorm: bool = False, dtype: torch.dtype = torch.float32) -> nn.Sequential:
    """The same weights on every device, although each draws other random numbers: the shares of the
    batches depend on the weights."""
    torch.manual_seed(1)
    with torch.device("cpu"):
        norm = [nn.BatchNorm1d(16)] if batchnorm else []
        model = nn.Sequential(nn.Linear(8, 16), *norm, nn.Tanh(), nn.Linear(16, 5))
    return model.to(DEVICE, dtype)


def batch(seed: int = 0, size: int = 24, dtype: torch.dtype = torch.float32) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    with torch.device("cpu"):
        x = torch.randn(size, 8, generator=generator).to(dtype)
        y = torch.randint(5, (size,), generator=generator)
    return {"x": x.to(DEVICE), "y": y.to(DEVICE)}


def loss_of(model: nn.Module) -> Callable[[Batch], Tensor]:
    return lambda b: cross_entropy(model(b["x"]), b["y"])


def noting_weights(model: nn.Module) -> tuple[Callable[[Batch], Tensor], list[list[Tensor]]]:
    """The model's loss, and the weights in every call of that."""
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


def data_of(step: int) -> dict[str, Tensor]:
    """24 of 48 samples; the halves take turns."""
    data = batch(step % 2, dtype=torch.float64)
    return {**data, "index": torch.arange(24) + 24 * (step % 2)}


def losses(model: nn.Module) -> Callable[[dict[str, Tensor]], Tensor]:
    """As :func:`loss_of`, by torch's own cross-entropy: in float64 for float64 logits."""
    return lambda b: F.cross_entropy(model(b["x"]), b["y"], reduction="none")


def build(name: str, model: nn.Module, **more: Any) -> SharpnessAware:
    """A method with arguments that are not its defaults."""
    arguments: dict[str, dict[str, Any]] = {
        "SAM": {},
        "ASAM": {"rho": 0.5, "eta": 0.02},
        "ESAM": {"beta": 0.6, "gamma": 10, "seed": 1},
        "RandomSubsetSAM": {"share": 0.25},
        "OrderedSGD": {"q": 9},
        "MSAM": {"rho": 0.2},
        "StaleKSAM": {"k": 8, "dataset_size": SIZE, "index": "index", "refresh": 4},
        "AUSAM": {"alpha": 9, "dataset_size": SIZE, "index": "index", "ramp": 2},
        "ImportanceKSAM": {"k": 8},
        "KSAM": {"k": 8, "random": 0.5},
    }
    method = getattr(ksam, name)
    return method(
        model.named_parameters(),
        torch.optim.SGD,
        **{**SGD, **arguments[name], "model": model, **more},
    )


NAMES = [
    *("KSAM", "SAM", "ASAM", "ESAM", "RandomSubsetSAM", "OrderedSGD", "MSAM", "StaleKSAM"),
    *("AUSAM", "ImportanceKSAM"),
]


def scaler(scale: float = SCALE, enabled: bool = True) -> GradScaler:
    return GradScaler(DEVICE.type, init_scale=scale, enabled=enabled)


def gradients(optimizer: SharpnessAware) -> list[Tensor]:
    return [p.grad.clone() for group in optimizer.param_groups for p in group["params"]]


def tensors_of_state(optimizer: SharpnessAware) -> list[Tensor]:
    entries = [optimizer.state[p] for group in optimizer.param_groups for p in group["params"]]
    return [value.clone() for entry in entries for value in entry.values()]


def fails_in_call(model: nn.Module, call: int, error: BaseException) -> Callable[[Any], Tensor]:
    """The model's loss, which raises in the call of that number; the first is 1."""
    calls = iter(range(1, 10))

    def per_sample_loss(b: dict[str, Tensor]) -> Tensor:
        losses = loss_of(model)(b)
        if next(calls) == call:
            raise error
        return losses

    return per_sample_loss
