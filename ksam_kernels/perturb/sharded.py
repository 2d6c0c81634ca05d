"""Lists of DTensors, as FSDP2 and tensor parallelism make them: a rank works on what it holds.

The functions are named as the operators and take their arguments. All but the norm are elementwise,
and need no other rank. Tensors that are no DTensors are taken to be the same on every rank.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate

from ksam_kernels import library
from ksam_kernels.dtensor import local
from ksam_kernels.perturb.joint_norm import with_extra_norm

try:
    from torch.distributed import all_gather_single
except ImportError:  # before torch 2.13, which warns of this name
    from torch.distributed import all_gather_into_tensor as all_gather_single

__all__ = ["grad_norm", "perturb_", "restore_", "restore_adam_", "restore_sgd_"]

TensorList = list[Tensor]


class Spread(NamedTuple):
    """The ranks over which a tensor is cut: those along some dimensions of a mesh, if any."""

    mesh: DeviceMesh | None
    dims: tuple[int, ...]


def _spread(tensor: Tensor) -> Spread:
    if not isinstance(tensor, DTensor):
        return Spread(None, ())
    cut = [d for d, placement in enumerate(tensor.placements) if not placement.is_replicate()]
    return Spread(tensor.device_mesh, tuple(cut))


def _by_spread(tensors: TensorList) -> dict[Spread, list[int]]:
    """The positions of the tensors that are cut alike, in the same order on all ranks."""
    found: dict[Spread, list[int]] = {}
    for i, tensor in enumerate(tensors):
        found.setdefault(_spread(tensor), []).append(i)
    return found


def _as(name: str, i: int, tensor: Tensor, param: Tensor, written: bool) -> Tensor:
    """The tensor, cut as the parameter is. What is only read may be redistributed to that: a
    gradient that is still to be summed over ranks, say."""
    if isinstance(tensor, DTensor) and isinstance(param, DTensor):
        if tensor.device_mesh == param.device_mesh and tensor.placements == param.placements:
            return tensor
        if not written and tensor.device_mesh == param.device_mesh:
            return tensor.redistribute(placements=param.placements)
    elif not isinstance(tensor, DTensor) and not isinstance(param, DTensor):
        return tensor
    raise ValueError(
        f"{name}[{i}] must be placed like its parameter, {_placed(param)}, got {_placed(tensor)}"
    )


def _placed(tensor: Tensor) -> str:
    if not isinstance(tensor, DTensor):
        return "a tensor that is not a DTensor"
    return f"{tensor.placements} on {tensor.device_mesh}"


def _local(name: str, tensors: TensorList, params: TensorList, written: bool = True) -> TensorList:
    pairs = zip(tensors, params, strict=True)
    return [local(_as(name, i, tensor, p, written)) for i, (tensor, p) in enumerate(pairs)]


def _norm(tensors: TensorList) -> Tensor:
    found: Tensor = library.dispatch("grad_norm", tensors, [], False, 0.0)
    return found


def _over_ranks(own: Tensor, spread: Spread) -> tuple[Tensor, Tensor]:
    """The norm of the parts of all ranks over which tensors are cut, the same bits on all of them,
    and the norm of the other ranks' parts. ``own``: the norm of this rank's part."""
    elsewhere = [torch.zeros_like(own)]
    for dim in spread.dims:
        assert spread.mesh is not None
        found = own.new_empty(spread.mesh.size(dim))
        group = spread.mesh.get_group(dim)
        all_gather_single(found, own.reshape(1), group=group)
        own = _norm([found])
        found[spread.mesh.get_local_rank(dim)] = 0
        elsewhere.append(_norm([found]))
    return own, _norm(elsewhere)


class _Part(NamedTuple):
    """Tensors of the lists that are cut alike."""

    rows: list[int]
    grads: TensorList  # local ones
    total: Tensor  # the norm over all ranks
    elsewhere: Tensor  # and that of the other ranks' parts


def _parts(grads: TensorList, params: TensorList, adaptive: bool, eta: float) -> list[_Part]:
    found = []
    weights = _local("params", params, params)
    slopes = _local("grads", grads, params, written=False)
    for spread, rows in _by_spread(params).items():
        g = [slopes[i] for i in rows]
        w = [weights[i] for i in rows] if adaptive else []
        own = library.dispatch("grad_norm", g, w, adaptive, eta)
        found.append(_Part(rows, g, *_over_ranks(own, spread)))
    return found


def _summed(tensor: Tensor) -> Tensor:
    """The tensor, with its pending sums over ranks taken."""
    if not isinstance(tensor, DTensor) or not any(p.is_partial() for p in tensor.placements):
        return tensor
    placements = [Replicate() if p.is_partial() else p for p in tensor.placements]
    return tensor.redistribute(placements=placements)


def grad_norm(grads: TensorList, params: TensorList, adaptive: bool, eta: float) -> Tensor:
    """One norm over the parts of all ranks, the same bits on all of them."""
    grads = list(map(_summed, grads))
    parts = _parts(grads, params if adaptive else grads, adaptive, eta)
    return _norm([part.total for part in parts])


def perturb_(
    params: TensorList,
    grads: TensorList,
    backup: TensorList,
    rho: list[float],
    adaptive: bool,
    eta: float,
) -> Tensor:
    """Perturb by the norm over all ranks. Ranks that hold the same part move it by the same bits:
    what is cut alike is perturbed together, and all else enters by one norm, which has the same
    bits on all ranks that hold the part."""
    weights, kept = _local("params", params, params), _local("backup", backup, params)
    parts = _parts(grads, params, adaptive, eta)
    done: list[int] = []
    try:
        for part in parts:
            others = [other.total for other in parts if other is not part]
            missing = _norm([part.elsewhere, *others])
            lists = with_extra_norm(
                [weights[i] for i in part.rows],
                part.grads,
                [kept[i] for i in part.rows],
                [rho[i] for i in part.rows],
                missing,
                adaptive,
                eta,
            )
            library.dispatch("perturb_", *lists, adaptive, eta)
            done += part.rows
    except BaseException:
        library.dispatch("restore_", [weights[i] for i in done], [kept[i] for i in done])
        raise
    return _norm([part.total for part in parts])


def restore_(params: TensorList, backup: TensorList) -> None:
    library.dispatch("restore_", _local("params", params, params), _local("backup", backup, params))


def restore_sgd_(
    params: TensorList,
    backup: TensorList,
    grads: TensorList,
    momentum_buffers: TensorList,  # empty without momentum
    steps: TensorList,
    *options: Any,
) -> None:
    buffers = momentum_buffers and _local("momentum_buffers", momentum_buffers, params)
    _update("restore_sgd_", params, backup, grads, [buffers], steps, options)


def restore_adam_(
    params: TensorList,
    backup: TensorList,
    grads: TensorList,
    exp_avgs: TensorList,
    exp_avg_sqs: TensorList,
    steps: TensorList,
    *options: Any,
) -> None:
    states = [_local("exp_avgs", exp_avgs, params), _local("exp_avg_sqs", exp_avg_sqs, params)]
    _update("restore_adam_", params, backup, grads, states, steps, options)


def _update(
    name: str,
    params: TensorList,
    backup: TensorList,
    grads: TensorList,
    states: list[TensorList],  # local ones
    steps: TensorList,
    options: tuple[Any, ...],
) -> None:
    library.dispatch(
        name,
        _local("params", params, params),
        _local("backup", backup, params),
        _local("grads", grads, params, written=False),
        *states,
        [local(step) for step in steps],
        *(o.full_tensor() if isinstance(o, DTensor) else o for o in options),
    )
