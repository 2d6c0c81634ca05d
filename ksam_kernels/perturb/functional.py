"""Perturb, restore and update lists of tensors: one global norm, the scale never on the host.

With DTensors, as FSDP2 (``fully_shard``) and tensor parallelism make them, each rank works on what
it holds, and one norm is taken over all ranks: these must then make each call together, with lists
in the same order. The other lists of a call are placed as the parameters are; tensors that are not
DTensors are taken to be the same on every rank.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ksam_kernels import library
from ksam_kernels.checks import check_finite, check_number, check_range, is_number, plain_number
from ksam_kernels.dtensor import first_dtensor
from ksam_kernels.perturb import native
from ksam_kernels.perturb.checks import (
    check_as_many,
    check_like,
    check_list,
    check_scalar,
    check_steps,
    checked_radii,
    checked_rate,
    listed,
)
from ksam_kernels.perturb.scalars import DeviceScalars

__all__ = ["grad_norm", "perturb_", "restore_", "restore_adam_", "restore_sgd_"]

TensorList = Sequence[Tensor]


def _run(name: str, *args: Any, plainly_written: Sequence[list[Tensor]] | None = None) -> Any:
    """Run the operator ``name``; if the first list has DTensors, on what this rank holds of them.

    Args:
        plainly_written: the lists that are written, if native.fits() has found all lists plain.
    """
    if plainly_written is not None:
        return library.call_in_place(name, plainly_written, *args)
    if first_dtensor(args[0]) is not None:
        from ksam_kernels.perturb import sharded

        return getattr(sharded, name)(*args)
    return library.dispatch(name, *args)


def grad_norm(grads: TensorList, params: TensorList | None = None, eta: float = 0.0) -> Tensor:
    r"""One global L2 norm, :math:`\lVert g \rVert_2` or ASAM's :math:`\lVert T g \rVert_2`.

    With ``params``, :math:`T = |w| + \eta` elementwise (Kwon et al. 2021). Nothing inside overflows
    or underflows: the norm is right for values from 1e-38 to 1e34, and inf above the range of
    float32. The sum is taken in a fixed order: it has the same bits from run to run and, on the
    CPU, for any number of threads. Floor of bytes moved (float32, N elements): 4N, with params 8N.

    Args:
        grads: tensors of any shapes and floating dtypes; may be empty.
        params: tensors of the same shapes.
        eta: the floor of T, >= 0.

    Returns:
        A float32 scalar on the device of ``grads[0]``; for an empty list, 0 on the CPU.

    Raises:
        TypeError: a dtype or layout that is not supported.
        ValueError: lists that do not fit each other, a negative eta.
        NotImplementedError: under transforms of ``torch.func``: the norm is not differentiable.
    """
    check_range("eta", eta, 0.0)
    eta, adaptive = plain_number(eta), params is not None
    grads, params = list(grads), list(params or ())
    quick = native.try_grad_norm(grads, params, adaptive, eta)
    if quick is not None:
        return quick
    if library.is_transformed():
        raise NotImplementedError("grad_norm is not differentiable and does not support torch.func")
    has_gradient = torch.is_grad_enabled() and any(map(library.wants_grad, grads))
    plain = not has_gradient and native.fits(grads, *([params] if adaptive else []), written=())
    if not plain:
        check_list("grads", grads)
        if adaptive:
            check_like("params", params, grads, model="grads")
    arguments = (grads, params, adaptive, eta)
    norm: Tensor = _run("grad_norm", *arguments, plainly_written=[] if plain else None)
    return norm


def perturb_(
    params: TensorList,
    grads: TensorList,
    backup: TensorList,
    *,
    rho: float | Sequence[float],
    adaptive: bool = False,
    eta: float = 0.0,
) -> Tensor:
    r"""Back up the weights, then climb: :math:`w \leftarrow w + \rho\, g / \lVert g \rVert_2`.

    Adaptive: :math:`w \leftarrow w + \rho\, T^2 g / \lVert T g \rVert_2`, :math:`T = |w| + \eta`
    (SAM: Foret et al. 2020; ASAM: Kwon et al. 2021). A single norm is taken over all tensors, and
    stays on the device. Floor of bytes moved (float32, N elements): norm 4N (adaptive 8N) + 16N.

    Args:
        params: the weights w, written in place; float32, float64, bfloat16 or float16, dense. No
            two tensors of a call may overlap in memory.
        grads: g, of the shapes of the parameters; dtypes and strides may differ.
        backup: always receives w; of the dtypes and shapes of the parameters.
        rho: radius, one for all or one per tensor; a negative one goes down. Tensors with radius 0
            keep their bits.
        adaptive: weight the perturbation by T.
        eta: the floor of T, >= 0.

    Returns:
        The norm, a float32 scalar on the device of ``params[0]``; for empty lists, 0 on the CPU. If
        it is 0, inf or NaN, every weight keeps its bits; if it is below the smallest normal
        float32, the weights move by less than ``|rho|``.

    Raises:
        TypeError: a dtype or layout that is not supported.
        ValueError: lists that do not fit each other, a non-finite rho, a negative or non-finite
            eta.
            If anything raises, the weights are what they were, unless CUDA fails between two of the
            call's launches. (What a signal handler raises, KeyboardInterrupt for one, may come
            after the call's work: then the weights have moved.)
    """
    check_range("eta", eta, 0.0)
    eta = plain_number(eta)
    params, grads, backup = list(params), list(grads), list(backup)
    given: float | list[float] = rho if is_number(rho) else listed("rho", rho)
    quick = native.try_perturb_(params, grads, backup, given, adaptive, eta)
    if quick is not None:
        return quick
    plain = native.fits(params, grads, backup, written=(0, 2), alike=(2,))
    if not plain:
        check_list("params", params, written=True)
        check_like("grads", grads, params)
        check_like("backup", backup, params, same_dtype=True, written=True)
    radii = given if isinstance(given, list) else [given] * len(params)
    if len(radii) != len(params):
        raise ValueError(
            f"rho must be one radius, or one for each of {len(params)} params, got {len(radii)}"
        )
    radii = checked_radii(radii)
    norm: Tensor
    with torch.no_grad():
        written = [params, backup] if plain else None
        arguments = (params, grads, backup, radii, adaptive, eta)
        norm = _run("perturb_", *arguments, plainly_written=written)
    return norm


def restore_(params: TensorList, backup: TensorList) -> None:
    """Restore the weights from the backup, byte for byte: NaN payloads and -0 included.

    Floor of bytes moved (float32, N elements): 8N; 0 extra where the update is fused with it
    (:func:`restore_sgd_`, :func:`restore_adam_`).

    Args:
        params: written in place; float32, float64, bfloat16 or float16, dense, each a layout of its
            own. No two tensors of a call may overlap in memory.
        backup: of the dtypes and shapes of the parameters.

    Raises:
        TypeError: a dtype or layout that is not supported, or that differs.
        ValueError: lists that do not fit each other.
    """
    params, backup = list(params), list(backup)
    if native.try_restore_(params, backup):
        return
    plain = native.fits(params, backup, written=(0,), alike=(1,))
    if not plain:
        check_list("params", params, written=True)
        check_like("backup", backup, params, same_dtype=True)
    with torch.no_grad():
        _run("restore_", params, backup, plainly_written=[params] if plain else None)


def restore_sgd_(
    params: TensorList,
    backup: TensorList,
    grads: TensorList,
    momentum_buffers: TensorList,
    *,
    steps: TensorList | None = None,
    lr: float | Tensor,
    momentum: float = 0.0,
    dampening: float = 0.0,
    weight_decay: float = 0.0,
    nesterov: bool = False,
    maximize: bool = False,
    grad_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
) -> None:
    r"""Restore the weights and apply ``torch.optim.SGD``'s update to them in one pass.

    .. math::
        d = g + \lambda w,\quad v \leftarrow \mu v + (1 - \tau)\, d,\quad
        w \leftarrow w - \eta\,(d + \mu v \text{ with Nesterov, else } v)

    where w is read from the backup. Floor of bytes moved (float32, N elements, momentum): 20N.

    Args:
        params: written once, with the updated weights; what they hold is not read.
        backup: the weights before the perturbation. May be the parameters themselves, for those
            that were not perturbed.
        grads: g, of the shapes of the parameters; dtypes and strides may differ.
        momentum_buffers: v, one per parameter; an empty list without momentum.
        steps: one-element float32 tensors counting the updates done. Where 0, d is the first
            momentum (no dampening), as in torch. None: all buffers are taken to have a history.
        lr, momentum, dampening, weight_decay, nesterov, maximize: those of ``torch.optim.SGD``.
            ``lr`` may be negative, as torch's schedulers end a rounding below 0. As a tensor of one
            float32 element it is read when the kernels run, so in every replay of a CUDA graph.
        grad_scale: one float32 element; the gradients are divided by it first.
        found_inf: one float32 element; if not 0 the weights are restored and nothing else changes,
            neither buffers nor steps.

    Raises:
        TypeError: a dtype or layout that is not supported.
        ValueError: lists that do not fit each other, hyperparameters that torch refuses.
    """
    for name, value in (("momentum", momentum), ("weight_decay", weight_decay)):
        check_range(name, value, 0.0)
    rate, device_lr = checked_rate(lr)
    check_finite("dampening", dampening)
    if nesterov and (momentum == 0 or dampening != 0):
        raise ValueError(
            f"nesterov needs momentum > 0 and dampening = 0, got momentum={momentum} and "
            f"dampening={dampening}"
        )
    params, backup, grads = list(params), list(backup), list(grads)
    counters = None if steps is None else list(steps)
    if counters is not None:
        check_as_many("steps", counters, params)
    flags = (bool(nesterov), bool(maximize))
    numbers = map(plain_number, (momentum, dampening, weight_decay))
    scalars = DeviceScalars(device_lr, grad_scale, found_inf)
    moments = {"momentum_buffers": list(momentum_buffers) if momentum != 0 else None}
    options = (rate, *numbers, *flags)
    _update("restore_sgd_", params, backup, grads, moments, counters, options, scalars)


def restore_adam_(
    params: TensorList,
    backup: TensorList,
    grads: TensorList,
    exp_avgs: TensorList,
    exp_avg_sqs: TensorList,
    steps: TensorList,
    *,
    lr: float | Tensor,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    maximize: bool = False,
    decoupled_weight_decay: bool = False,
    grad_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
) -> None:
    r"""Restore the weights and apply ``torch.optim.Adam``'s or ``AdamW``'s update in one pass.

    .. math::
        m \leftarrow m + (1 - \beta_1)(g - m),\quad v \leftarrow \beta_2 v + (1 - \beta_2)\, g^2,
        \quad w \leftarrow w - \frac{\eta}{1 - \beta_1^t}
        \frac{m}{\sqrt{v} / \sqrt{1 - \beta_2^t} + \epsilon}

    where w is read from the backup and decayed first: :math:`w (1 - \eta \lambda)` if decoupled
    (AdamW), else g becomes :math:`g + \lambda w`. Floor of bytes moved (float32, N elements): 28N.

    Args:
        params, backup, grads, grad_scale, found_inf: as in :func:`restore_sgd_`.
        exp_avgs, exp_avg_sqs: m and v, one each per parameter.
        steps: one-element float32 tensors, one each per parameter, that count the updates done; t
            is one more.
        lr: as in :func:`restore_sgd_`.
        betas, eps, weight_decay, maximize: those of ``torch.optim.Adam``.
        decoupled_weight_decay: AdamW's weight decay.

    Raises:
        TypeError: a dtype or layout that is not supported.
        ValueError: lists that do not fit each other, hyperparameters that torch refuses.
    """
    for name, value in (("eps", eps), ("weight_decay", weight_decay)):
        check_range(name, value, 0.0)
    rate, device_lr = checked_rate(lr)
    if not isinstance(betas, (tuple, list)) or len(betas) != 2:
        raise ValueError(f"betas must be two numbers, got {betas!r}")
    for i, beta in enumerate(betas):
        check_number(f"betas[{i}]", beta)
        if not 0.0 <= beta < 1.0:
            raise ValueError(f"betas[{i}] must be in [0, 1), got {beta!r}")
    params, backup, grads = list(params), list(backup), list(grads)
    moments = {"exp_avgs": list(exp_avgs), "exp_avg_sqs": list(exp_avg_sqs)}
    flags = (bool(maximize), bool(decoupled_weight_decay))
    numbers = map(plain_number, (*betas, eps, weight_decay))
    scalars = DeviceScalars(device_lr, grad_scale, found_inf)
    options = (rate, *numbers, *flags)
    _update("restore_adam_", params, backup, grads, moments, list(steps), options, scalars)


def _update(
    name: str,
    params: list[Tensor],
    backup: list[Tensor],
    grads: list[Tensor],
    moments: Mapping[str, list[Tensor] | None],
    steps: list[Tensor] | None,
    options: tuple[Any, ...],
    scalars: DeviceScalars,
) -> None:
    """Check the lists of ``restore_sgd_`` or ``restore_adam_`` and run the operator ``name``.

    Args:
        moments: argument name -> the optimizer's list; None where it keeps none.
        steps: the step counts; None where the optimizer keeps none.
        options: the operator's numbers and flags, which have been checked.
        scalars: its last arguments, of which the learning rate has been checked.
    """
    counters = steps or []
    states = (*[tensors or [] for tensors in moments.values()], counters)
    if native.try_update_(name, params, backup, grads, states, *options, *scalars):
        return
    kept = {argument: tensors for argument, tensors in moments.items() if tensors is not None}
    lists = (params, backup, grads, *kept.values())
    plain = (steps is None or len(steps) == len(params)) and native.fits(
        *lists,
        written=(0, *range(3, len(lists))),
        alike=(1,),
        counters=counters,
        scalars=scalars,
    )
    if not plain:
        check_list("params", params, written=True)
        check_like("backup", backup, params, same_dtype=True)
        check_like("grads", grads, params)
        for argument, tensors in kept.items():
            check_like(argument, tensors, params, written=True)
        if steps is not None:
            check_steps(steps, params)
    check_scalar("grad_scale", scalars.grad_scale)
    check_scalar("found_inf", scalars.found_inf)
    arguments = (params, backup, grads, *states, *options, *scalars)
    with torch.no_grad():
        _run(name, *arguments, plainly_written=[params, *states] if plain else None)
