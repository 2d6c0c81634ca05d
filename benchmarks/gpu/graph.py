"""Whole steps replayed from a CUDA graph, compared bit for bit with steps run eagerly."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks.environment import synchronize
from benchmarks.gpu.capture import WARM_UP_CALLS, capture
from benchmarks.gpu.part import Context, PartFile, reason
from benchmarks.gpu.step import subjects

_REPLAYS = 5


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors hold the same bytes."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    return torch.equal(
        *(t.detach().contiguous().reshape(-1).view(torch.uint8).cpu() for t in (a, b))
    )


def compare(make: Callable[[], Any], device: torch.device) -> dict[str, Any]:
    """Two subjects that `make` gives take the same number of steps, one of them in a graph; where
    the learning rate is a tensor, it falls from replay to replay."""
    torch.manual_seed(0)
    eager = make()
    torch.manual_seed(0)
    captured = make()
    try:
        replay = capture(captured.step, device)
    except RuntimeError as error:
        return {"captured": False, "error": reason(error)}
    before = WARM_UP_CALLS if device.type == "cuda" else 0
    for _ in range(before):
        eager.step()
    for subject, step in ((eager, eager.step), (captured, replay)):
        for _ in range(_REPLAYS):
            subject.schedule()
            step()
    synchronize(device)
    pairs = list(zip(eager.state, captured.state, strict=True))
    different = sum(not same_bits(a, b) for a, b in pairs)
    return {
        "captured": True,
        "replays": _REPLAYS,
        "tensors": len(pairs),
        "different": different,
        "finite": all(bool(b.isfinite().all()) for _, b in pairs if b.is_floating_point()),
    }


def run(context: Context, file: PartFile) -> None:
    """The operations alone, then KSAM with a model."""
    for name, make in subjects(context.device, tiny=context.dry_run).items():
        file.results[name] = compare(make, context.device)
        print(f"{name}: {file.results[name]}", flush=True)
        file.write(complete=False)
