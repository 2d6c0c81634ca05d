"""Norm, perturbation, restore and update by Triton kernels: one launch per combination of dtypes.

Lists that spread over several devices are left to the reference. Kernels are compiled by their
first launch, which a CUDA graph cannot capture: run a step before.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
import triton.language as tl
from torch import Tensor

from ksam_kernels.checks import opmath_dtype
from ksam_kernels.native import extension
from ksam_kernels.perturb import reference, triton_kernels, triton_updates
from ksam_kernels.perturb.scalars import DeviceScalars
from ksam_kernels.perturb.triton_table import CHUNK, Rows, Table
from ksam_kernels.triton_support import (
    EXACT,
    device_ints,
    double_bits,
    doubles_bits,
    most_warps,
    on_device_of,
)

_TYPES = {
    torch.float32: tl.float32,
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
    torch.float64: tl.float64,
}
_BITS = {2: tl.int16, 4: tl.int32, 8: tl.int64}

# 256 threads with 16 elements each: enough loads in flight, and few enough registers for all
# operands of Adam (tests/triton/test_perturb_compile.py).
_WARPS = 8
# One program adds up the chunks' sums: as many threads as it may have, and 2,048 sums (8 million
# elements) in each turn.
_FINISH_BLOCK = 2048
_STEPS_BLOCK = 128


def _have_one_device(args: tuple[Any, ...]) -> bool:
    lists = [arg for arg in args if isinstance(arg, list) and arg and isinstance(arg[0], Tensor)]
    if extension is not None and extension.on_one_device(lists):
        return True
    return len(reference.devices_of(lists)) == 1


def _on_one_device(launches: Any) -> Any:
    """Run on the device of the tensors; calls without any, or with tensors of several devices, are
    left to the reference."""

    @functools.wraps(launches)
    def call(*args: Any) -> Any:
        if not _have_one_device(args):
            return getattr(reference, launches.__name__)(*args)
        with on_device_of(args[0][0]):
            return launches(*args)

    return call


def _launch(kernel: Any, table: Table, *args: Any, **constants: Any) -> None:
    constants = {**constants, **EXACT, "CHUNK": CHUNK, "num_warps": _WARPS}
    kernel[(table.chunks,)](table.records, table.chunk_rows, *args, **constants)


def _types(dtypes: tuple[torch.dtype, ...], *names: str) -> dict[str, Any]:
    """Constants by the names of the operands; the first one's dtype decides the arithmetic's."""
    return {
        **{name: _TYPES[dtype] for name, dtype in zip(names, dtypes, strict=False) if name != "_"},
        "A": _TYPES[opmath_dtype(dtypes[0])],
        "BITS": _BITS[dtypes[0].itemsize],
    }


def _norms(grads: list[Tensor], params: list[Tensor], eta: float) -> tuple[Tensor, Tensor]:
    """The norm in float32 and in float64, scalars on the device of the gradients."""
    device = grads[0].device
    rows = Rows(grads, params) if params else Rows(grads)
    tables = rows.tables()
    count = sum(table.chunks for table in tables)
    partials = torch.empty(max(count, 1), dtype=torch.float64, device=device)
    wide = torch.empty((), dtype=torch.float64, device=device)
    norm = torch.empty((), dtype=torch.float32, device=device)
    first = 0
    for table in tables:
        g, *rest = table.dtypes
        p = rest[0] if rest else g
        _launch(
            *(triton_kernels.norm_kernel, table, partials, first, double_bits(eta)),
            G=_TYPES[g],
            P=_TYPES[p],
            ADAPTIVE=bool(params),
        )
        first += table.chunks
    triton_kernels.finish_norm_kernel[(1,)](
        *(partials, count, wide, norm), BLOCK=_FINISH_BLOCK, num_warps=most_warps(device), **EXACT
    )
    return norm, wide


@_on_one_device
def grad_norm(grads: list[Tensor], params: list[Tensor], adaptive: bool, eta: float) -> Tensor:
    """Launches: one for each combination of dtypes, and one that adds up."""
    return _norms(grads, params if adaptive else [], eta)[0]


@_on_one_device
def perturb_(
    params: list[Tensor],
    grads: list[Tensor],
    backup: list[Tensor],
    rho: list[float],  # one per parameter
    adaptive: bool,
    eta: float,
) -> Tensor:
    """Launches: the norm's, and one for each combination of dtypes. If one of these raises, what
    was launched before is undone from the backup."""
    norm, wide = _norms(grads, params if adaptive else [], eta)
    rows = Rows(params, grads, backup, written=(0, 2), values=doubles_bits(rho))
    tables = rows.tables()
    done: list[Table] = []
    try:
        for table in tables:
            constants = {**_types(table.dtypes, "P", "G"), "ADAPTIVE": adaptive}
            _launch(
                *(triton_kernels.perturb_kernel, table, norm, wide, double_bits(eta)), **constants
            )
            done.append(table)
        rows.finish()
    except BaseException:
        for table in done:
            moved = rows.tensors(table)
            reference.restore_([row[0] for row in moved], [row[2] for row in moved])
        if len(done) == len(tables):  # some of what was written may have been copied back
            rows.finish()
        raise
    return norm


@_on_one_device
def restore_(params: list[Tensor], backup: list[Tensor]) -> None:
    """Launches: one for each dtype."""
    with reference.restoring(params, backup):
        rows = Rows(params, backup, written=(0,))
        for table in rows.tables():
            _launch(triton_kernels.restore_kernel, table, BITS=_BITS[table.dtypes[0].itemsize])
        rows.finish()


def _count_steps(addresses: Tensor, found_inf: Tensor | None) -> None:
    blocks = -(-len(addresses) // _STEPS_BLOCK)
    triton_updates.count_steps_kernel[(blocks,)](
        addresses, len(addresses), found_inf, BLOCK=_STEPS_BLOCK, **EXACT
    )


@_on_one_device
def restore_sgd_(
    params: list[Tensor],
    backup: list[Tensor],
    grads: list[Tensor],
    momentum_buffers: list[Tensor],  # empty without momentum
    steps: list[Tensor],  # one float32 element each, or empty: the buffers are history
    lr: float,
    momentum: float,
    dampening: float,
    weight_decay: float,
    nesterov: bool,
    maximize: bool,
    device_lr: Tensor | None,  # one float32 element, in place of lr
    grad_scale: Tensor | None,
    found_inf: Tensor | None,
) -> None:
    """Launches: one for each combination of dtypes, and one that counts steps."""
    lists = [params, backup, grads, *([momentum_buffers] if momentum != 0 else [])]
    scalars = DeviceScalars(device_lr, grad_scale, found_inf).to(params[0].device)
    addresses = [step.data_ptr() for step in steps]
    # All memory is taken before the first weight is written.
    counters = device_ints(tuple(addresses), params[0].device) if steps else None
    rows = Rows(*lists, written=(0, 3), values=addresses or None)
    doubles = [double_bits(x) for x in (lr, momentum, 1 - dampening, weight_decay)]
    for table in rows.tables():
        constants = {"V": tl.float32, **_types(table.dtypes, "P", "_", "G", "V")}
        _launch(
            triton_updates.restore_sgd_kernel,
            table,
            *(*scalars, *doubles),
            **constants,
            MOMENTUM=momentum != 0,
            NESTEROV=nesterov,
            MAXIMIZE=maximize,
            DECAYS=weight_decay != 0,
            COUNTED=bool(steps),
        )
    rows.finish()
    if counters is not None:
        _count_steps(counters, scalars.found_inf)


def _log2(beta: float) -> float:
    return math.log2(beta) if beta > 0 else -1e30  # 2 to its multiples is 0


@_on_one_device
def restore_adam_(
    params: list[Tensor],
    backup: list[Tensor],
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    steps: list[Tensor],  # one float32 element each
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    maximize: bool,
    decoupled_weight_decay: bool,
    device_lr: Tensor | None,  # one float32 element, in place of lr
    grad_scale: Tensor | None,
    found_inf: Tensor | None,
) -> None:
    """Launches: one for each combination of dtypes, and one that counts steps."""
    scalars = DeviceScalars(device_lr, grad_scale, found_inf).to(params[0].device)
    addresses = [step.data_ptr() for step in steps]
    # All memory is taken before the first weight is written.
    counters = device_ints(tuple(addresses), params[0].device)
    lists = (params, backup, grads, exp_avgs, exp_avg_sqs)
    rows = Rows(*lists, written=(0, 3, 4), values=addresses)
    powers = (_log2(beta1), _log2(beta2))
    doubles = (lr, *powers, beta1, 1 - beta1, beta2, 1 - beta2, eps, weight_decay)
    for table in rows.tables():
        _launch(
            triton_updates.restore_adam_kernel,
            table,
            *(*scalars, *map(double_bits, doubles)),
            **_types(table.dtypes, "P", "_", "G", "M", "V"),
            NEAR=beta1 > 0.5,
            MAXIMIZE=maximize,
            DECAYS=weight_decay != 0,
            DECOUPLED=decoupled_weight_decay,
        )
    rows.finish()
    _count_steps(counters, scalars.found_inf)
