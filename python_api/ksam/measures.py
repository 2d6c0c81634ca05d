"""Measurements at the current weights: how flat they are, and what a selection stands for."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.amp import GradScaler

import ksam_kernels
from ksam import batchnorm, distributed, interrupts, micro_batches, weight_caches
from ksam.base import parameters
from ksam.gradients import clear, set_aside
from ksam.optimizer import SharpnessAware
from ksam.parts import Subset
from ksam.passes import PerSampleLoss, containers_copied, joined, per_sample
from ksam.radius import check_not_negative
from ksam_kernels.checks import check_count, opmath_dtype
from ksam_kernels.dtensor import first_dtensor


def alignment(
    optimizer: SharpnessAware, per_sample_loss: PerSampleLoss, batch: Any, k: int
) -> Tensor:
    r"""Cosine of the k highest-loss samples' gradient with the batch's, a float32 scalar.

    Each gradient is taken in its own forward and backward passes, at the current weights and with
    the same random draws, in micro-batches of the optimizer's ``micro_batch_size``. ``.grad`` and
    the states of PyTorch's random generators are left alone. So are BatchNorm's running statistics
    if the optimizer has its ``model``; without it the passes update them, as any forward does.

    Raises:
        TypeError, ValueError: k outside [1, M].
        NotImplementedError: parameters that are DTensors.
    """
    params = [p for p in parameters(optimizer.param_groups) if p.requires_grad]
    check_whole("alignment", params)
    others = () if optimizer.model is None else optimizer.model.parameters()
    whole = Subset(batch, ksam_kernels.batch_size(batch))
    parts = micro_batches.split(whole, optimizer.micro_batch_size)
    with (
        torch.enable_grad(),
        distributed.apart(optimizer.model),
        batchnorm.Norms(optimizer.model).frozen(),
        set_aside(list(dict.fromkeys([*params, *others]))),
    ):
        with _random_state_kept(params):
            found = []
            for part in parts:
                losses = _losses(per_sample_loss, part.batch)
                _backward(losses, whole.samples, optimizer.grad_scaler)
                found.append(losses.detach())
        of_batch = _taken_gradients(params)
        top = ksam_kernels.topk_indices(joined(found), k)
        begin = 0
        with _random_state_kept(params):
            for part in parts:
                inside = top[(top >= begin) & (top < begin + part.samples)] - begin
                with torch.set_grad_enabled(len(inside) > 0):
                    losses = _losses(per_sample_loss, part.batch)
                _backward(losses.index_select(0, inside), k, optimizer.grad_scaler)
                begin += part.samples
        of_top = _taken_gradients(params)
    return _cosine(of_batch, of_top)


def _backward(losses: Tensor, count: int, scaler: GradScaler | None) -> None:
    """Add the gradient of the losses' sum, divided by ``count`` and scaled, to ``.grad``."""
    if len(losses) > 0:
        mean = losses.mean() * (len(losses) / count)
        mean = mean if scaler is None else scaler.scale(mean)
        mean.backward()  # type: ignore[no-untyped-call]


def _taken_gradients(params: Sequence[Tensor]) -> list[Tensor]:
    """``.grad``, 0 where there is none; it is None afterwards."""
    found = [torch.zeros_like(p) if p.grad is None else p.grad for p in params]
    clear(params)
    return found


def _cosine(a: list[Tensor], b: list[Tensor]) -> Tensor:
    """Of two lists as one vector each, a float32 scalar. Normalized, so no product underflows."""
    norms = ksam_kernels.grad_norm(a), ksam_kernels.grad_norm(b)
    dots = []
    for pair in zip(a, b, strict=True):
        x, y = (t.to(opmath_dtype(t.dtype)) / n for t, n in zip(pair, norms, strict=True))
        dots.append((x * y).sum().float())
    return torch.stack(dots).sum()


def check_whole(name: str, params: Sequence[Tensor]) -> None:
    """Raise NotImplementedError for parameters of which this rank holds only a part."""
    if first_dtensor(params) is not None:
        raise NotImplementedError(
            f"{name} needs whole parameters, got DTensors (FSDP2), of which each rank has a shard"
        )


def _random_state_kept(params: Iterable[Tensor]) -> AbstractContextManager[None]:
    """Restore the generators on leaving: a run goes on as if dropout had drawn nothing within."""
    devices = {p.device for p in params} - {torch.device("cpu")}
    kind = next((device.type for device in devices), "cuda")  # no devices: all on the CPU
    return torch.random.fork_rng(devices, device_type=kind)


def _losses(per_sample_loss: PerSampleLoss, batch: Any) -> Tensor:
    weight_caches.drop()  # those of other weights, or made without gradients
    output = per_sample_loss(containers_copied(batch))
    return per_sample(output, ksam_kernels.batch_size(batch))[0]


class Sharpness(NamedTuple):
    """How the mean loss rises around a solution.

    Attributes:
        loss: the mean loss at the weights.
        random: mean rise at random perturbations of norm rho.
        adversarial: rise at :math:`\\rho\\, g / \\lVert g \\rVert_2`, g the gradient: to first
            order the worst perturbation of norm rho.
    """

    loss: float
    random: float
    adversarial: float


def sharpness(
    model: nn.Module,
    per_sample_loss: PerSampleLoss,
    batches: Iterable[Any],
    *,
    rho: float = 0.05,
    directions: int = 5,
    seed: int = 0,
) -> Sharpness:
    """Measure the sharpness of a solution on some batches.

    The model's mode is the caller's choice: ``model.eval()`` measures the network as it is tested.
    Dropout, where it is on, draws the same for every set of weights. The model's running statistics
    and the states of PyTorch's random generators are left alone, and its weights come back bit for
    bit, even if the function raises. Its gradients are discarded. With DistributedDataParallel the
    result is that of a rank's own batches, and one rank may measure it alone.

    Args:
        per_sample_loss: as for a step.
        batches: gone through ``directions + 2`` times, so they are kept in a list.
        rho: norm of the perturbations, over all parameters that require a gradient, >= 0.
        directions: random directions, >= 1.
        seed: of the random directions, an int >= 0.

    Raises:
        TypeError, ValueError: no batch, or an argument out of its range.
        NotImplementedError: parameters that are DTensors.
    """
    check_not_negative("rho", rho)
    check_count("directions", directions, 1)
    check_count("seed", seed, 0)
    params = [p for p in model.parameters() if p.requires_grad]
    check_whole("sharpness", params)
    # enable_grad also puts the mode back where Ctrl-C came just before a no_grad block's end.
    with (
        torch.enable_grad(),
        distributed.apart(model),
        batchnorm.Norms(model).frozen(),
        _random_state_kept(params),
    ):
        batches = list(batches)  # a loader draws their order
        if not batches:
            raise ValueError("batches must hold at least one batch, got none")
        model.zero_grad()
        loss = _mean_loss(per_sample_loss, batches, params, backward=True)
        gradient = _taken_gradients(params)
        generator = torch.Generator().manual_seed(seed)
        rises = []
        for _ in range(directions):
            noise = [_normal(p, generator) for p in params]
            with _perturbed(params, noise, rho):
                rises.append(_mean_loss(per_sample_loss, batches, params) - loss)
        with _perturbed(params, gradient, rho):
            adversarial = _mean_loss(per_sample_loss, batches, params) - loss
    return Sharpness(loss, sum(rises) / directions, adversarial)


def _normal(like: Tensor, generator: torch.Generator) -> Tensor:
    """Drawn as float32 on the CPU: the same direction on every device."""
    noise = torch.randn(like.shape, generator=generator, dtype=torch.float32, device="cpu")
    return noise.to(like)


def _mean_loss(
    per_sample_loss: PerSampleLoss,
    batches: list[Any],
    params: Sequence[Tensor],
    backward: bool = False,
) -> float:
    """Mean over all samples, with the same random draws each time; ``backward`` leaves the
    direction of its gradient in ``.grad``."""
    sizes = [ksam_kernels.batch_size(batch) for batch in batches]
    sums = []
    with _random_state_kept(params):
        for batch, size in zip(batches, sizes, strict=True):
            with torch.set_grad_enabled(backward):
                mean = _losses(per_sample_loss, batch).mean()
            if backward:
                # In units of one batch: float16 gradients of the mean of all would underflow.
                (mean * (size / sizes[0])).backward()  # type: ignore[no-untyped-call]
            sums.append(mean.detach().double() * size)
    return float(torch.stack(sums).sum()) / sum(sizes)


@contextmanager
def _perturbed(params: Sequence[Tensor], direction: Sequence[Tensor], rho: float) -> Iterator[None]:
    backup = [torch.empty_like(p) for p in params]
    moved = False

    def back() -> None:
        if moved:
            with interrupts.deferred():
                ksam_kernels.restore_(params, backup)
        weight_caches.drop()  # of the perturbed weights

    with interrupts.undone(back):
        with interrupts.deferred():
            ksam_kernels.perturb_(params, direction, backup, rho=rho)
            moved = True
        yield
