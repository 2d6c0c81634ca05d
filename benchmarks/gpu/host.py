"""Host time of the calls of a step: how long Python is busy before the GPU's work is on its way."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

import ksam_kernels as kk
from benchmarks.environment import synchronize
from benchmarks.gpu.part import Context, PartFile
from benchmarks.gpu.step import Operations, parameter_shapes
from benchmarks.kernels.sam import BASES, Foreach, Ksam, Start
from benchmarks.timing import Quartiles, no_garbage_collection

_REPETITIONS = 300


def microseconds(
    calls: dict[str, Callable[[], object]], repetitions: int, device: torch.device
) -> dict[str, Quartiles]:
    """Microseconds that each call keeps the host, the calls made in turn, and all of them together.

    The GPU is idle before each round, so that no call waits for room in its queue.
    """
    times: dict[str, list[float]] = {name: [] for name in [*calls, "together"]}
    with no_garbage_collection():
        for repetition in range(repetitions + repetitions // 10):
            if repetition == repetitions // 10:  # so far it was the warm-up
                times = {name: [] for name in times}
            synchronize(device)
            first = begin = time.perf_counter()
            for name, call in calls.items():
                call()
                end = time.perf_counter()
                times[name].append(1e6 * (end - begin))
                begin = end
            times["together"].append(1e6 * (begin - first))
    return {name: Quartiles.of(values) for name, values in times.items()}


@torch.no_grad()
def run(context: Context, file: PartFile) -> None:
    """The calls of a step over 161 tensors; beside them the norm alone and AdamW's update."""
    device, tiny = context.device, context.dry_run
    repetitions = 20 if tiny else _REPETITIONS
    operations = Operations(device, tiny=tiny)
    adam = Ksam(Start.random(parameter_shapes(tiny=tiny), BASES["AdamW"], device), BASES["AdamW"])
    foreach = Foreach(Start.random(parameter_shapes(tiny=tiny), BASES["SGD"], device), BASES["SGD"])
    groups: dict[str, dict[str, Callable[[], object]]] = {
        "step": dict(operations.calls),
        "apart": {
            "grad_norm": lambda: kk.grad_norm(operations.sam.grads),
            "restore_adam_": adam.update,
        },
        "foreach": {"perturb": foreach.perturb, "update": foreach.update},
    }
    file.results["tensors"] = len(operations.sam.params)
    for group, calls in groups.items():
        quartiles = microseconds(calls, repetitions, device)
        file.results[group] = {name: vars(q) for name, q in quartiles.items()}
        for name, q in quartiles.items():
            print(f"{group:8} {name:22} {q.median:8.1f} us  [{q.q25:.1f}-{q.q75:.1f}]", flush=True)
        file.write(complete=False)
