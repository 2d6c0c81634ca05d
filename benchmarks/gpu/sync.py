"""Steps while PyTorch treats every wait for the GPU as an error.

PyTorch sees its own waits only; the extension's would show in the profile of the part `launches`,
and make the capture of the part `graph` fail.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from benchmarks.environment import synchronize
from benchmarks.gpu.part import Context, PartFile, reason
from benchmarks.gpu.step import subjects

_STEPS = 3


@contextmanager
def waiting_is_an_error(device: torch.device) -> Iterator[None]:
    """Inside, what waits for the GPU raises; on the CPU nothing does."""
    synchronize(device)
    if device.type != "cuda":
        yield
        return
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def _outcome(step: Callable[[], object], steps: int, device: torch.device) -> dict[str, Any]:
    try:
        with waiting_is_an_error(device):
            for _ in range(steps):
                step()
        synchronize(device)
    except RuntimeError as error:
        return {"waits": True, "error": reason(error)}
    return {"waits": False}


def run(context: Context, file: PartFile) -> None:
    """The first step, which may wait while it makes its state, and those after it."""
    device = context.device
    for name, make in subjects(device, tiny=context.dry_run).items():
        subject = make()
        first = _outcome(subject.step, 1, device)
        subject.step()  # again: the first may have been broken off
        later = _outcome(subject.step, _STEPS, device)
        file.results[name] = {"first step": first, "later steps": later}
        print(f"{name}: {file.results[name]}", flush=True)
        file.write(complete=False)
    if device.type == "cuda":
        one = torch.ones((), device=device)
        file.results["a wait is seen"] = _outcome(lambda: float(one), 1, device)["waits"]
