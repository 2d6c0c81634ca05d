"""Norm, perturbation, restore and update by the compiled extension.

The kernels read whole lists of tensors and check what they read, so the public functions try them
first (``try_*``): a look at every tensor in Python would take longer than the work itself. What a
kernel declines goes the long way, whose checks either name the fault or find the operator for it,
and which leaves lists on several devices to the reference.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ksam_kernels import library
from ksam_kernels.backends import implements
from ksam_kernels.native import DEVICES, can_inspect, direct, direct_in_place, extension, run
from ksam_kernels.perturb import reference
from ksam_kernels.perturb.scalars import DeviceScalars

TensorList = Sequence[Tensor]


def fits(
    *lists: list[Tensor],
    written: tuple[int, ...],
    alike: tuple[int, ...] = (),
    counters: Sequence[Tensor] = (),
    scalars: Sequence[Tensor | None] = (),
) -> bool:
    """Whether the extension finds in one look that the lists are what the public function's checks
    ask for, and that a dispatcher would have nothing to do for them.

    Args:
        lists: of equal lengths, their tensors of equal shapes.
        written: the positions of the lists that are written.
        alike: the positions of the lists that have the first one's dtypes.
        counters: no tensors, or one float32 element for each tensor of a list.
        scalars: None or tensors; the caller checks them, except that they are of no subclass.
    """
    if not can_inspect() or any(map(library.is_subclass, scalars)):
        return False
    return extension.fits(lists, written, alike, counters)


def _scalar_for(tensors: TensorList) -> Tensor:
    """Memory for a norm where the list's kernels run; anywhere if these will decline."""
    if not tensors:
        return torch.empty((), dtype=torch.float32, device="cpu")
    if getattr(tensors[0], "is_cuda", False):
        return torch.empty((), dtype=torch.float32, device=tensors[0].device)
    return torch.empty((), dtype=torch.float32)  # a device to parse would take longer


def try_grad_norm(
    grads: list[Tensor], params: list[Tensor], adaptive: bool, eta: float
) -> Tensor | None:
    """The norm, a float32 scalar, if the kernel takes the arguments as they are."""
    kernel = direct("grad_norm")
    if kernel is None or (torch.is_grad_enabled() and any(map(library.wants_grad, grads))):
        return None
    norm = _scalar_for(grads)
    return norm if kernel(grads, params, adaptive, eta, norm) else None


def try_perturb_(
    params: list[Tensor],
    grads: list[Tensor],
    backup: list[Tensor],
    rho: float | list[float],
    adaptive: bool,
    eta: float,
) -> Tensor | None:
    """The norm, a float32 scalar, if the kernel took the arguments and has perturbed."""
    kernel = direct_in_place("perturb_")
    if kernel is None:
        return None
    norm = _scalar_for(params)
    if not kernel(params, grads, backup, rho, adaptive, eta, norm):
        return None
    library.mark_written(params, backup)
    return norm


def try_restore_(params: list[Tensor], backup: list[Tensor]) -> bool:
    """Whether the kernel took the arguments and has restored the weights."""
    kernel = direct_in_place("restore_")
    with reference.restoring(params, backup):
        if kernel is None or not kernel(params, backup):
            return False
    library.mark_written(params)
    return True


def try_update_(
    name: str,
    params: list[Tensor],
    backup: list[Tensor],
    grads: list[Tensor],
    states: tuple[list[Tensor], ...],
    *options: Any,
) -> bool:
    """Whether the kernel of ``restore_sgd_`` or ``restore_adam_`` took the arguments and has run.
    It writes the lists in ``states``."""
    kernel = direct_in_place(name)
    if kernel is None or not kernel(params, backup, grads, *states, *options):
        return False
    library.mark_written(params, *states)
    return True


def _with_norm(kernels: Any, name: str, *args: Any) -> Tensor:
    """The norm that the kernel ``name`` returns, float32, on the device of the first list."""
    first = args[0]
    norm = torch.empty((), dtype=torch.float32, device=first[0].device if first else "cpu")
    run(kernels, name, *args, norm)
    return norm


def _restore(kernels: Any, name: str, *args: Any) -> None:
    """Run the kernel, and drop its True: the operator returns nothing."""
    with reference.restoring(*args):
        run(kernels, name, *args)


def _update(kernels: Any, name: str, params: list[Tensor], *args: Any) -> None:
    """Run an update whose last arguments are :class:`DeviceScalars`."""
    first = len(args) - len(DeviceScalars._fields)
    scalars = DeviceScalars(None, None, None)
    if params:  # else no kernel reads them
        scalars = DeviceScalars(*args[first:]).to(params[0].device)
    run(kernels, name, params, *args[:first], *scalars)


def _on_one_device(call: Any, kernels: Any, name: str, *args: Any) -> Any:
    """``call``, or the reference where the lists spread over several devices."""
    if len(reference.devices_of(args)) > 1:
        return getattr(reference, name)(*args)
    return call(kernels, name, *args)


_CALLS: dict[str, Any] = {
    "grad_norm": _with_norm,
    "perturb_": _with_norm,
    "restore_": _restore,
    "restore_sgd_": _update,
    "restore_adam_": _update,
}


def register(backend: str, kernels: Any, devices: tuple[str, ...]) -> None:
    """Make the kernels of a compiled module a backend's implementations on some devices."""
    for name, call in _CALLS.items():
        implements(backend, name, devices=devices)(partial(_on_one_device, call, kernels, name))


if extension is not None:
    register("native", extension, DEVICES)
