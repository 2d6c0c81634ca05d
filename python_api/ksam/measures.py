"""Measurements at the weights of a moment: how flat they are, and what a selection stands for."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import ksam_kernels
from ksam import batchnorm, distributed, interrupts, micro_batches, weight_caches
from ksam.base import parameters
from ksam.optimizer import SharpnessAware
from ksam.parts import Subset
from ksam.passes import PerSampleLoss, containers_copied, joined, per_sample
from ksam.radius import check_not_negative
from ksam_kernels.checks import check_count
from ksam_kernels.dtensor import first_dtensor


def alignment(
    optimizer: SharpnessAware, per_sample_loss: PerSampleLoss, batch: Any, k: int
) -> Tensor:
    r"""Cosine of the k highest-loss samples' gradient with the batch's, a float32 scalar.

    Both from one forward pass over the batch at the present weights, or, where it is more than the
    optimizer's ``micro_batch_size``, from one without gradients and one by micro-batches. ``.grad``
    and the states of PyTorch's random generators are left alone, and with the optimizer's ``model``
    BatchNorm's running statistics; without it the passes update them, as any forward does.

    Raises:
        TypeError, ValueError: k outside [1, M].
        NotImplementedError: parameters that are DTensors.
    """
    params = [p for p in parameters(optimizer.param_groups) if p.requires_grad]
    check_whole("alignment", params)
    whole = Subset(batch, ksam_kernels.batch_size(batch))
    parts = micro_batches.split(whole, optimizer.micro_batch_size)
    of_batch, of_top = ([torch.zeros_like(p) for p in params] for _ in range(2))
    with (
        torch.enable_grad(),
        distributed.apart(optimizer.model),
        batchnorm.Norms(optimizer.model).frozen(),
        _random_state_kept(params),
    ):
        with torch.set_grad_enabled(len(parts) == 1):
            losses = [_losses(per_sample_loss, part.batch) for part in parts]
        top = ksam_kernels.topk_indices(joined(losses).detach(), k)
        begin = 0
        for part in parts:
            of_part = losses[0] if len(parts) == 1 else _losses(per_sample_loss, part.batch)
            inside = top[(top >= begin) & (top < begin + part.samples)] - begin
            _add_gradient(of_batch, of_part, whole.samples, params, again=len(inside) > 0)
            _add_gradient(of_top, of_part.index_select(0, inside), k, params)
            begin += part.samples
            del of_part  # and its graph, before the next one's
    dots = [(a * b).sum() for a, b in zip(of_batch, of_top, strict=True)]
    norms = ksam_kernels.grad_norm(of_batch) * ksam_kernels.grad_norm(of_top)
    return torch.stack([d.float() for d in dots]).sum() / norms


def check_whole(name: str, params: Sequence[Tensor]) -> None:
    """Raise NotImplementedError for parameters of which this rank has a part."""
    if first_dtensor(params) is not None:
        raise NotImplementedError(f"{name} needs whole parameters, got DTensors, as FSDP2 makes")


def _random_state_kept(params: Iterable[Tensor]) -> AbstractContextManager[None]:
    """What dropout draws within is drawn again afterwards: a run is the same as without."""
    devices = {p.device for p in params} - {torch.device("cpu")}
    kind = next((device.type for device in devices), "cuda")  # of no device, on the CPU
    return torch.random.fork_rng(devices, device_type=kind)


def _losses(per_sample_loss: PerSampleLoss, batch: Any) -> Tensor:
    weight_caches.drop()  # of other weights, or without gradients
    output = per_sample_loss(containers_copied(batch))
    return per_sample(output, ksam_kernels.batch_size(batch))[0]


def _add_gradient(
    totals: list[Tensor], losses: Tensor, count: int, params: list[Tensor], again: bool = False
) -> None:
    """Add the gradient of the losses' sum, divided by ``count``, to the totals.

    Args:
        again: whether the graph is needed once more.
    """
    if len(losses) == 0:
        return
    mean = losses.mean() * (len(losses) / count)
    found = torch.autograd.grad(mean, params, retain_graph=again, allow_unused=True)
    for total, gradient in zip(totals, found, strict=True):
        if gradient is not None:
            total += gradient


class Sharpness(NamedTuple):
    """How the mean loss rises around a solution.

    Attributes:
        loss: at the weights.
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

    The model's mode is the caller's choice: ``model.eval()`` measures the network that is tested.
    Its running statistics and the states of PyTorch's random generators are left alone and its
    weights come back bit for bit, also where the function raises. The model's gradients are
    discarded.

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
    # Ctrl-C may come just before a block without gradients is left: this one then ends it.
    with torch.enable_grad(), batchnorm.Norms(model).frozen(), _random_state_kept(params):
        batches = list(batches)  # a loader draws their order
        if not batches:
            raise ValueError("batches must hold at least one batch, got none")
        model.zero_grad()
        loss = _mean_loss(per_sample_loss, batches, backward=True)
        gradient = [torch.zeros_like(p) if p.grad is None else p.grad for p in params]
        model.zero_grad()
        generator = torch.Generator().manual_seed(seed)
        rises = []
        for _ in range(directions):
            noise = [_normal(p, generator) for p in params]
            with _perturbed(params, noise, rho):
                rises.append(_mean_loss(per_sample_loss, batches) - loss)
        with _perturbed(params, gradient, rho):
            adversarial = _mean_loss(per_sample_loss, batches) - loss
    return Sharpness(loss, sum(rises) / directions, adversarial)


def _normal(like: Tensor, generator: torch.Generator) -> Tensor:
    """Drawn as float32 on the CPU: the same direction on every device."""
    noise = torch.randn(like.shape, generator=generator, dtype=torch.float32, device="cpu")
    return noise.to(like)


def _mean_loss(per_sample_loss: PerSampleLoss, batches: list[Any], backward: bool = False) -> float:
    """Mean over all samples; with ``backward`` its gradient in ``.grad``."""
    total = sum(ksam_kernels.batch_size(batch) for batch in batches)
    means = []
    for batch in batches:
        with torch.set_grad_enabled(backward):
            mean = _losses(per_sample_loss, batch).sum() / total
        if backward:
            mean.backward()  # type: ignore[no-untyped-call]
        means.append(mean.detach().double())
    return float(torch.stack(means).sum())


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
