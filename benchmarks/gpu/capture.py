"""Work captured in CUDA graphs, so that its time is the GPU's alone; on the CPU, just the calls."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial

import torch

from benchmarks.environment import synchronize
from benchmarks.gpu.sync import waiting_is_an_error
from benchmarks.timing import no_garbage_collection

WARM_UP_CALLS = 3


def capture(work: Callable[[], object], device: torch.device) -> Callable[[], None]:
    """A function that replays `work`, after some calls of it on the capturing stream.

    It holds `work`, whose tensors the graph reads and writes but keeps no memory of: only what was
    allocated in the capture is the graph's.

    Raises:
        RuntimeError: `work` does what no graph can hold: it waits for the GPU, say.
    """
    if device.type != "cuda":
        return partial(_call, work)
    stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        for _ in range(WARM_UP_CALLS - 1):
            work()
        with waiting_is_an_error(device):  # a capture that fails leaves the generators unusable
            work()
    torch.cuda.current_stream(device).wait_stream(stream)
    synchronize(device)
    graph = torch.cuda.CUDAGraph()
    # What the garbage collector frees could break off the capture.
    with no_garbage_collection(), torch.cuda.graph(graph, stream=stream):
        work()
    synchronize(device)
    return partial(_replay, graph, work)


def _call(work: Callable[[], object]) -> None:
    work()


def _replay(graph: torch.cuda.CUDAGraph, _held: Callable[[], object]) -> None:
    graph.replay()


def seconds_of(replay: Callable[[], object], times: int, device: torch.device) -> float:
    """How long the device is busy with so many replays."""
    if device.type != "cuda":
        start = time.perf_counter()
        for _ in range(times):
            replay()
        return time.perf_counter() - start
    events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]  # type: ignore[no-untyped-call]
    begin, end = events
    begin.record()
    for _ in range(times):
        replay()
    end.record()
    end.synchronize()
    return float(begin.elapsed_time(end)) / 1e3
