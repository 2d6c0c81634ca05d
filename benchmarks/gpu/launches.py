"""Kernels launched per operation and per step, as the profiler sees them, beside PyTorch's."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch._C._autograd import DeviceType
from torch.profiler import ProfilerActivity, profile, record_function

from benchmarks.environment import synchronize
from benchmarks.gpu.cases import launch_cases
from benchmarks.gpu.part import Context, PartFile, reason
from benchmarks.gpu.step import Operations
from benchmarks.kernels.case import KSAM, Case, UnavailableError

# Driver and runtime calls that wait, whoever makes them; hipMemcpyWithStream, too.
_WAITS = ("Synchronize", "cudaMemcpy", "cuMemcpy", "hipMemcpy")
_DO_NOT_WAIT = ("Async", "cudaStreamWaitEvent")
_COPIES = ("Memcpy", "Memset")
_WORK = "the work that is counted"


def waits_for_device(name: str) -> bool:
    """Whether a call of CUDA's or HIP's API by this name keeps the host waiting."""
    return any(w in name for w in _WAITS) and not any(d in name for d in _DO_NOT_WAIT)


def count(work: Callable[[], object], device: torch.device) -> dict[str, Any]:
    """Kernels, copies and waits of one call of `work`, which is called before to warm up."""
    work()
    cuda = device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]
    synchronize(device)
    with profile(activities=activities) as trace:
        with record_function(_WORK):
            work()
        synchronize(device)  # the trace has only what has ended
    return tally(list(trace.events() or []), on_cpu=not cuda)


def tally(events: Sequence[Any], *, on_cpu: bool) -> dict[str, Any]:
    """What a profile shows: kernels, copies, and waits inside of the work itself.

    `on_cpu`: of a dry run, where the operators that ran stand for kernels.
    """
    (span,) = (e.time_range for e in events if e.name == _WORK and e.device_type == DeviceType.CPU)
    kernels: Counter[str] = Counter()
    copies: Counter[str] = Counter()
    waits: Counter[str] = Counter()
    for event in events:
        # Annotations, such as those of optimizers, appear on the device as well.
        if event.name == _WORK or event.is_user_annotation:
            continue
        if on_cpu or event.device_type == DeviceType.CUDA:
            (copies if event.name.startswith(_COPIES) else kernels)[_short(event.name)] += 1
        elif waits_for_device(event.name) and span.start <= event.time_range.start <= span.end:
            waits[event.name] += 1
    return {
        "launches": kernels.total(),
        "copies": copies.total(),
        "waits": dict(waits),
        "kernels": dict(kernels.most_common(12)),
        "copies_by_name": dict(copies),
    }


def _short(name: str) -> str:
    return name if len(name) <= 120 else f"{name[:117]}..."


def _of_case(case: Case, device: torch.device) -> dict[str, Any]:
    """Counts of every contestant's call, or why it has none."""
    found: dict[str, Any] = {}
    with torch.set_grad_enabled(case.needs_grad):
        input = case.make_input()
        for contestant in case.contestants:
            try:
                run = contestant.start(input)
                found[contestant.name] = count(functools.partial(run, input), device)
            except (UnavailableError, RuntimeError) as error:
                found[contestant.name] = {"error": reason(error)}
    return found


def run(context: Context, file: PartFile) -> None:
    """A step without the model, then operation by operation."""
    device = context.device
    operations = Operations(device, tiny=context.dry_run)
    operations.step()
    step = {name: count(call, device) for name, call in operations.calls.items()}
    file.results["step"] = {**step, "together": count(operations.step, device)}
    for name, counted in file.results["step"].items():
        print(f"step: {name:22} {counted['launches']:4} launches, {counted['copies']} copies")
    file.write(complete=False)
    file.results |= {"operations": {}, "failures": {}}
    for case in launch_cases(device, tiny=context.dry_run):
        label = f"{case.label} {case.shape}"
        found = file.results["operations"][label] = _of_case(case, device)
        line = ", ".join(f"{name} {c.get('launches', '-')}" for name, c in found.items())
        print(f"{label}: {line}", flush=True)
        if "error" in found[KSAM]:  # a rival's is a note of the report
            file.results["failures"][label] = found[KSAM]["error"]
        file.write(complete=False)
    if device.type == "cuda" and not file.results["step"]["together"]["launches"]:
        raise RuntimeError("the profiler saw no kernels: is CUPTI installed?")
