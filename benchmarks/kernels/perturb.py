"""Cases of the perturb room, and of the host section: the same calls on tensors of one element."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from benchmarks.kernels import sam
from benchmarks.kernels.case import KSAM, Case, Contestant, Run, Tolerance, dtype_name
from benchmarks.kernels.parameters import MODELS, Shape, count
from benchmarks.kernels.sam import BASES, CONTESTANTS, SamStep, Start

LEGEND = sam.LEGEND

# PyTorch's norm of a tensor with millions of elements sums float32 squares in float32.
_NORM_TOLERANCE = Tolerance(rtol=1e-4, atol=0.0)
# A weight of 2e-2 moves by 1e-5 in the longest list, more than 40 times what this lets pass.
_TOLERANCE = Tolerance(rtol=1e-5, atol=1e-8)
# A foreach update rounds to bfloat16 after every operation, on numbers of up to 0.05 that may
# cancel: four times half a unit of their last place. Weights move by up to 5e-3.
_BFLOAT16_TOLERANCE = Tolerance(rtol=2**-6, atol=4e-4)

_HOST_COUNTS = (62, 161, 300)

# Bytes moved per element of four bytes. The norm reads the gradient (ASAM's the weight, too);
# perturb_ reads gradient and weight, and writes weight and backup; an update reads backup and
# gradient, writes the weight, and reads and writes the state.
_NORM, _PERTURB = 4, 16
_UPDATE = {"SGD": 20, "AdamW": 28}

_RESTORE = {"SGD": "restore_sgd_", "AdamW": "restore_adam_"}


def floor_bytes(
    operation: str, base: str, elements: int, *, adaptive: bool = False, itemsize: int = 4
) -> int:
    """Bytes that an operation on this many parameters must move."""
    norm = 2 * _NORM if adaptive else _NORM
    per_element = {
        "grad_norm": norm,
        "perturb_": norm + _PERTURB,
        _RESTORE[base]: _UPDATE[base],
        "SAM step": norm + _PERTURB + _UPDATE[base],
    }
    return per_element[operation] * elements * itemsize // 4


def _norm(step: SamStep) -> Run:
    return lambda _: step.norm()


def _perturb(step: SamStep) -> Run:
    def run(_: Any) -> Any:
        step.perturb()
        return step.params, step.kept

    return run


def _update(step: SamStep) -> Run:
    def run(_: Any) -> Any:
        step.update()
        return step.params, step.state

    return run


def _sam_step(step: SamStep) -> Run:
    def run(_: Any) -> Any:
        step.perturb()
        step.update()
        return step.params, step.state

    return run


# operation: (what is timed, its contestants beside ksam)
_OPERATIONS: dict[str, tuple[Callable[[SamStep], Run], tuple[str, ...]]] = {
    "grad_norm": (_norm, ("davda54", "foreach")),
    "perturb_": (_perturb, ("davda54", "foreach", "swap+fused")),
    "restore_sgd_": (_update, ("davda54", "foreach", "copy+fused", "swap+fused")),
    "restore_adam_": (_update, ("davda54", "foreach", "copy+fused", "swap+fused")),
    "SAM step": (
        _sam_step,
        ("davda54", "foreach", "copy+fused", "swap+fused", "pytorch-optimizer"),
    ),
}


def case(
    room: str,
    operation: str,
    base: str,
    list_name: str,
    shapes: Callable[[], list[Shape]],
    device: torch.device,
    *,
    adaptive: bool = False,
    dtype: torch.dtype = torch.float32,
    quick: bool = False,
) -> Case:
    """An operation on a list of random tensors of these shapes."""
    timed, names = _OPERATIONS[operation]
    # On the CPU torch's fused SGD leaves most weights of bfloat16 and float16 as they are, up to
    # torch 2.13 at least (pytorch/pytorch issue 191763).
    broken = device.type == "cpu" and dtype == torch.bfloat16 and base == "SGD"
    left_out = {"copy+fused", "swap+fused"} if broken else set()
    if adaptive:  # the swap has no weighting in its single pass
        left_out.add("swap+fused")
    names = tuple(name for name in names if name not in left_out)

    tolerance = _NORM_TOLERANCE if operation == "grad_norm" else _TOLERANCE
    if dtype == torch.bfloat16:
        tolerance = _BFLOAT16_TOLERANCE

    def contestant(name: str) -> Contestant:
        def start(input: Start) -> Run:
            return timed(CONTESTANTS[name](input, BASES[base], adaptive=adaptive))

        return Contestant(name, start, tolerance)

    whole_step = operation == "SAM step"
    kinds = [base] if whole_step else []
    return Case(
        room=room,
        operation=operation,
        extra=", ".join([*kinds, *(["adaptive"] if adaptive else [])]),
        shape=f"{list_name} ({len(shapes())})",
        dtype=dtype_name(dtype),
        floor_bytes=floor_bytes(
            operation, base, count(shapes()), adaptive=adaptive, itemsize=dtype.itemsize
        ),
        operators=("perturb_", _RESTORE[base]) if whole_step else (operation,),
        make_input=lambda: Start.random(shapes(), BASES[base], device, dtype),
        contestants=[contestant(name) for name in (KSAM, *names)],
        stateful=True,
        quick=quick,
    )


def _operations() -> Sequence[tuple[str, str]]:
    """Operation and base optimizer; where the base does not matter, SGD."""
    return (
        ("grad_norm", "SGD"),
        ("perturb_", "SGD"),
        ("restore_sgd_", "SGD"),
        ("restore_adam_", "AdamW"),
        ("SAM step", "SGD"),
        ("SAM step", "AdamW"),
    )


def cases(device: torch.device) -> Iterator[Case]:
    """All cases of the room."""
    for operation, base in _operations():
        for name, shapes in MODELS.items():
            quick = name == "1000 small"
            yield case("perturb", operation, base, name, shapes, device, quick=quick)
    resnet = ("ResNet-50", MODELS["ResNet-50"], device)
    for operation, base in _operations()[2:4]:
        yield case("perturb", operation, base, *resnet, dtype=torch.bfloat16)
    yield case("perturb", "SAM step", "SGD", *resnet, adaptive=True)


def host_cases(device: torch.device) -> Iterator[Case]:
    """Lists of one-element tensors: no bytes to speak of, so the time is the host's."""
    for operation, base in _operations()[1:4]:
        for tensors in _HOST_COUNTS:
            shapes = [(1,)] * tensors
            one_element = ("one element", lambda s=shapes: s, device)
            yield case("host", operation, base, *one_element, quick=tensors == 62)
