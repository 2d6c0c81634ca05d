"""What the parts of the run on a GPU read and conclude, on outputs written down here."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from benchmarks.gpu import cases, graph, kernels, sanitizer
from benchmarks.gpu.aims import Results, aims
from benchmarks.gpu.launches import DeviceType, tally, waits_for_device
from benchmarks.kernels.case import EXACT, KSAM, Case, Contestant, stateless
from benchmarks.timing import Plan

CPU, META = torch.device("cpu"), torch.device("meta")
H100_L2 = 50 << 20


@pytest.mark.parametrize(
    ("name", "waits"),
    [
        ("cudaStreamSynchronize", True),
        ("cudaDeviceSynchronize", True),
        ("cudaMemcpy", True),
        ("cudaMemcpyAsync", False),
        ("cudaLaunchKernel", False),
        ("aten::copy_", False),
    ],
)
def test_calls_that_wait(name: str, waits: bool) -> None:
    assert waits_for_device(name) == waits


def event(name: str, device: DeviceType, start: int, annotation: bool = False) -> SimpleNamespace:
    span = SimpleNamespace(start=start, end=start + 10)
    return SimpleNamespace(
        name=name, device_type=device, time_range=span, is_user_annotation=annotation
    )


def test_a_profile_is_counted() -> None:
    cpu, cuda = DeviceType.CPU, DeviceType.CUDA
    work = "the work that is counted"
    events = [
        event("cudaDeviceSynchronize", cpu, 1),  # before and after the work
        event(work, cpu, 100, True),
        event(work, cuda, 100, True),
        event("Optimizer.step#SGD.step", cuda, 101, True),
        event("aten::copy_", cpu, 101),
        event("cudaLaunchKernel", cpu, 102),
        event("void ksam::gpu::select(float const*)", cuda, 103),
        event("void ksam::gpu::select(float const*)", cuda, 104),
        event("Memset (Device)", cuda, 105),
        event("cudaStreamSynchronize", cpu, 106),
        event("cudaDeviceSynchronize", cpu, 120),
    ]
    found = tally(events, on_cpu=False)
    assert found["launches"] == 2
    assert found["copies_by_name"] == {"Memset (Device)": 1}
    assert found["waits"] == {"cudaStreamSynchronize": 1}


def test_sanitizer_output_is_read() -> None:
    clean = "small case: done\n========= ERROR SUMMARY: 0 errors\n"
    assert sanitizer.summarize(0, clean, 1.0)["clean"]
    assert not sanitizer.summarize(0, "========= ERROR SUMMARY: 0 errors\n", 1.0)["clean"]
    assert not sanitizer.summarize(None, "", 1.0)["clean"]
    race = "small case: done\n========= RACECHECK SUMMARY: 1 hazard displayed\n"
    found = sanitizer.summarize(99, race, 1.0)
    assert not found["clean"]
    assert found["summary"] == "1 hazard displayed"
    assert found["output_tail"] == race


def test_sanitizer_is_found_in_cuda_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tool = tmp_path / "bin" / "compute-sanitizer"
    tool.parent.mkdir()
    tool.write_text("#!/bin/sh\necho small case: done; echo ERROR SUMMARY: 0 errors\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", "/nowhere:/bin")
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    assert sanitizer.find_tool() == str(tool)
    assert sanitizer.command(str(tool), "racecheck")[:3] == [str(tool), "--tool", "racecheck"]
    assert sanitizer._check(str(tool), "memcheck", 20)["clean"]


def test_different_bits_are_seen() -> None:
    assert not graph.same_bits(torch.tensor(0.0), torch.tensor(-0.0))
    assert graph.same_bits(torch.tensor(float("nan")), torch.tensor(float("nan")))
    counter = iter(range(100))

    class Step:
        def __init__(self) -> None:
            self.state = [torch.zeros(2)]

        def step(self) -> None:
            self.state[0] += next(counter)

    assert graph.compare(Step, CPU)["different"] == 1


def test_cases_outgrow_the_caches_and_have_the_shapes_that_the_aims_name() -> None:
    found = list(cases.kernel_cases(META, tiny=False))
    names = [f"{case.label} {case.shape} {case.dtype}" for case in found]
    assert len(set(names)) == len(names)
    assert "select_cross_entropy, k=341 1024x1000 float32" in names
    for classes, rows in ((1000, 65536), (4096, 16384), (32000, 2048), (128256, 512)):
        for dtype in ("float32", "bfloat16"):
            assert sum(f"cross_entropy {rows}x{classes} {dtype}" == name for name in names) == 1
    large = [case for case in found if case.room == "loss" and "k=" not in case.extra]
    large += [case for case in found if case.room == "compact" and "labels" not in case.extra]
    large += [case for case in found if "ResNet-50" in case.shape]
    for case in large:
        pool = kernels.pool_size(case, H100_L2)
        assert pool * case.floor_bytes > 2 * H100_L2, case.label


def a_case(rival: Contestant, stateful: bool = False) -> Case:
    ours = stateless(KSAM, lambda x: x + 1)
    return Case(
        "topk", "topk_indices", "1", "float32", 8, ("topk_indices",), lambda: (torch.zeros(1),),
        [ours, rival], stateful=stateful,
    )  # fmt: skip


PLAN = Plan(rounds=1, seconds=0, few_rounds=1, max_seconds=0)


def test_a_rival_that_disagrees_or_fails_is_left_out_with_the_reason() -> None:
    def fails(x: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("no kernel image")

    for function, why in ((lambda x: x, "disagree"), (fails, "no kernel image")):
        ours, other = kernels.measure(a_case(stateless("other", function)), CPU, PLAN, 1e9)
        assert ours["microseconds"]["median"] > 0
        assert other["microseconds"] is None
        assert why in other["note"]


def test_contestants_with_a_state_have_one_for_each_input() -> None:
    started = []

    def start(input: Any) -> Any:
        state = input[0].clone()
        started.append(state)
        return lambda _: state + 1

    rows = kernels.measure(a_case(Contestant("other", start, EXACT), stateful=True), CPU, PLAN, 1e9)
    assert len(started) == 2
    assert rows[1]["working_set_bytes"] == 16


def row(operation: str, shape: str, share: float, **more: Any) -> dict[str, Any]:
    times = {"q25": 1.0, "median": more.pop("us", 10.0), "q75": 1.0}
    plain = {"room": "loss", "extra": "", "dtype": "float32", "contestant": KSAM}
    return {
        **plain, "operation": operation, "shape": shape, "share_of_copy": share,
        "microseconds": times, "backend": "native", **more,
    }  # fmt: skip


def training(*over_sgd: float) -> dict[str, Any]:
    return {
        "workloads": {
            f"workload {i}": {"K-SAM, k=1/3": {"over SGD": {"median": median}}}
            for i, median in enumerate(over_sgd)
        }
    }


def verdicts(results: Results) -> list[bool | None]:
    return [aim.met for aim in aims(results)]


def test_aims_are_met_or_missed_or_not_measured() -> None:
    assert verdicts({}) == [None] * 12
    step = {"launches": 5, "copies": 1, "waits": {}}
    good: Results = {
        "kernels": {
            "rows": [
                row("cross_entropy", "65536x1000", 0.5),
                row("cross_entropy", "16384x4096", 0.96),
                row("cross_entropy", "16384x4096", 0.1, contestant="eager"),
                row("cross_entropy", "16384x4096", 0.1, extra="smoothing"),
                row("select_cross_entropy", "1024x1000", 0.1, us=11.9),
                row("compact_batch", "4096x3x32x32", 0.86, room="compact", extra="images"),
                row("compact_batch", "65536", 0.1, room="compact", extra="labels"),
                row("perturb_", "ResNet-50 (161)", 0.91),
                row("perturb_", "1000 small (1000)", 0.1),
                row("restore_sgd_", "ResNet-50 (161)", 0.92),
                row("restore_adam_", "ResNet-50 (161)", 0.93),
            ]
        },
        "training": training(1.09),
        "launches": {"step": {"together": step}},
        "sync": {"operations": {"first step": {"waits": True}, "later steps": {"waits": False}}},
        "host": {"step": {"together": {"median": 149.0}}},
        "graph": {"operations": {"captured": True, "different": 0}},
        "tests": {
            "by_backend": {"native": {"passed": 3}}, "failed": [], "failures": {}, "left_out": [],
            "statuses": {"a": 0}, "without_form_on_device": 4,
        },
        "sanitizer": {"memcheck": {"clean": True, "summary": "0 errors"}},
    }  # fmt: skip
    assert verdicts(good) == [True] * 12
    bad: Results = {
        "kernels": {
            "rows": [
                row("cross_entropy", "16384x4096", 0.96),
                row("cross_entropy", "512x128256", 0.94),
                row("select_cross_entropy", "1024x1000", 0.1, us=12.1),
                row("compact_batch", "4096x3x32x32", 0.84, room="compact", extra="images"),
                row("perturb_", "ResNet-50 (161)", 0.89),
                row("restore_sgd_", "ResNet-50 (161)", 0.92),
                row("restore_adam_", "ResNet-50 (161)", 0.89),
            ]
        },
        "training": training(1.09, 1.11),
        "launches": {"step": {"together": {**step, "launches": 6}}},
        "sync": {"operations": {"first step": {}, "later steps": {"waits": True}}},
        "host": {"step": {"together": {"median": 151.0}}},
        "graph": {"operations": {"captured": True, "different": 1}},
        "tests": {**good["tests"], "statuses": {"a": 0, "b": "ended"}, "left_out": ["b"]},
        "sanitizer": {"memcheck": {"clean": False, "summary": "1 error"}},
    }
    assert verdicts(bad) == [False] * 12
    assert "94.0 % at worst (512x128256 float32, native), 2 cases" in aims(bad)[0].figure
    waits = {**step, "waits": {"cudaStreamSynchronize": 1}}
    assert aims({**good, "launches": {"step": {"together": waits}}})[7].met is False
