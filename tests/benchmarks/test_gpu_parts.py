"""What the parts of the run on a GPU read and conclude, on outputs written down here."""

from __future__ import annotations

import dataclasses
import gc
import itertools
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from benchmarks.gpu import cases, graph, host, kernels, launches, sanitizer, small_case, training
from benchmarks.gpu.launches import DeviceType, tally, waits_for_device
from benchmarks.gpu.part import Context, PartFile
from benchmarks.gpu.report import write_report
from benchmarks.gpu.run import run_in_process
from benchmarks.kernels.case import EXACT, KSAM, Case, Contestant, stateless
from benchmarks.timing import Plan
from ksam_kernels.loss.layout import group_of
from tests.helpers import assert_ends

CPU, META = torch.device("cpu"), torch.device("meta")
H100_L2 = 50 << 20


@pytest.mark.parametrize(
    ("name", "waits"),
    [
        ("cudaStreamSynchronize", True),
        ("cudaDeviceSynchronize", True),
        ("cudaMemcpy", True),
        ("cudaMemcpyAsync", False),
        ("hipMemcpy", True),
        ("hipMemcpyWithStream", True),
        ("hipStreamSynchronize", True),
        ("hipMemcpyAsync", False),
        ("hipStreamWaitEvent", False),
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


def test_the_small_case_has_rows_that_lie_side_by_side(monkeypatch: pytest.MonkeyPatch) -> None:
    """They have kernels of their own, for losses and for gradients."""
    found = []
    cross_entropy = small_case.kk.cross_entropy

    def noting(logits: torch.Tensor, target: torch.Tensor, **options: Any) -> torch.Tensor:
        if group_of(logits) > 0:
            kind = "probabilities" if target.is_floating_point() else "classes"
            found.append((logits.dtype, logits.shape[-1], kind, logits.requires_grad))
        return cross_entropy(logits, target, **options)

    monkeypatch.setattr(small_case.kk, "cross_entropy", noting)
    small_case.run_all(CPU)
    kinds = ("classes", "probabilities")
    wanted = itertools.product(small_case._DTYPES, (2, 5, 21, 300), kinds, (True,))
    assert sorted(found, key=str) == sorted(wanted, key=str)


def tool_of(tmp_path: Path, script: str) -> str:
    tool = tmp_path / "compute-sanitizer"
    tool.write_text(f"#!/bin/sh\n{script}\n")
    tool.chmod(0o755)
    return str(tool)


def test_sanitizer_output_need_not_be_text(tmp_path: Path) -> None:
    tool = tool_of(tmp_path, r"printf 'small case: done \377\n'; echo ERROR SUMMARY: 0 errors")
    assert sanitizer._check(tool, "memcheck", 20)["clean"]


def test_a_sanitizer_that_hangs_is_ended_with_what_it_started(
    tmp_path: Path, pid_file: Path
) -> None:
    tool = tool_of(tmp_path, f"sleep 60 & echo started; echo $! > {pid_file}; wait")
    found = sanitizer._check(tool, "memcheck", 0.1)
    assert found["status"] is None
    assert found["output_tail"] == "started\n"
    assert_ends(pid_file)


def test_a_training_run_that_is_cut_off_says_what_it_has_not_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    context = Context(CPU, tmp_path, dry_run=True)
    file = PartFile("training", context)
    left_out = []

    def measure(*_: Any) -> dict[str, Any]:
        left_out.append((file.load() or {"results": {}})["results"].get("left_out"))
        return {}

    workloads = [SimpleNamespace(label=label) for label in "abc"]
    monkeypatch.setattr(training, "workloads", lambda **_: iter(workloads))
    monkeypatch.setattr(training, "measure", measure)
    training.run(context, file)
    assert left_out == [None, ["b", "c"], ["c"]]
    assert file.results["left_out"] == []
    training.run(dataclasses.replace(context, deadline=0), file)
    assert file.results["left_out"] == ["a", "b", "c"]


def no_graph(*_: Any) -> Any:
    raise torch.OutOfMemoryError("out of memory")


def rounds_without_graphs(contestants: dict[str, Any], *rest: Any) -> Any:
    if any(name.endswith("graph") for name in contestants):
        raise torch.OutOfMemoryError("out of memory")
    return kernels.rounds_of(contestants, *rest)


@pytest.mark.parametrize(
    ("name", "broken", "failed"),
    [
        ("capture", no_graph, ["SGD, graph", "K-SAM, k=1/3, graph"]),
        ("rounds_of", rounds_without_graphs, ["rounds with graphs"]),
    ],
)
def test_a_graph_that_fails_is_a_failure_and_loses_no_other_times(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, broken: Any, failed: list[str]
) -> None:
    monkeypatch.setattr(training, name, broken)
    context = Context(CPU, tmp_path, dry_run=True)
    run_in_process("training", context)
    left = PartFile("training", context).load()
    assert left is not None
    assert not left["complete"]
    ((label, times),) = left["results"]["workloads"].items()
    assert list(times) == list(training.METHODS)
    assert list(left["results"]["failures"]) == [f"{label}, {what}" for what in failed]
    (aim,) = (aim for aim in write_report(context).aims if aim.name.startswith("a training step"))
    assert aim.met is False


def test_batches_of_training_need_no_generator_of_the_gpu() -> None:
    (workload,) = training.workloads(tiny=True)
    before = torch.get_rng_state()
    x = workload.batch(CPU)["x"]
    assert torch.equal(torch.get_rng_state(), before)
    assert x.is_contiguous(memory_format=torch.channels_last)


def test_different_bits_are_seen() -> None:
    assert not graph.same_bits(torch.tensor(0.0), torch.tensor(-0.0))
    assert graph.same_bits(torch.tensor(float("nan")), torch.tensor(float("nan")))
    counter = iter(range(100))

    class Step:
        def __init__(self) -> None:
            self.state = [torch.zeros(2)]

        def schedule(self) -> None:
            pass

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


@pytest.mark.parametrize("enabled", [True, False])
def test_the_host_part_leaves_garbage_collection_as_it_was(enabled: bool) -> None:
    seen = []

    def call() -> None:
        seen.append(gc.isenabled())
        if len(seen) > 1:
            raise KeyboardInterrupt

    try:
        (gc.enable if enabled else gc.disable)()
        with pytest.raises(KeyboardInterrupt):
            host.microseconds({"call": call}, 10, torch.device("cpu"))
        assert seen == [False, False]
        assert gc.isenabled() is enabled
    finally:
        gc.enable()


PLAN = Plan(rounds=1, seconds=0, few_rounds=1, max_seconds=0)


def fails(*_: Any) -> Any:
    raise RuntimeError("no kernel image\nand a long story")


def test_a_rival_that_fails_is_left_out_with_the_reason() -> None:
    for rival in (stateless("other", fails), Contestant("other", fails)):
        ours, other = kernels.measure(a_case(rival), CPU, PLAN, 1e9)
        assert ours["microseconds"]["median"] > 0
        assert "failure" not in ours
        assert other["microseconds"] is None
        assert other["note"] == "no kernel image"


def test_a_rival_that_disagrees_is_a_failure_of_the_case() -> None:
    ours, other = kernels.measure(a_case(stateless("other", lambda x: x)), CPU, PLAN, 1e9)
    assert ours["microseconds"]["median"] > 0
    assert "topk_indices 1 float32: other and ksam disagree" in ours["failure"]
    assert other["microseconds"] is None


def only(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """Have the parts measure this case alone."""
    monkeypatch.setattr(kernels, "kernel_cases", lambda *_, **__: iter([case]))
    monkeypatch.setattr(launches, "launch_cases", lambda *_, **__: iter([case]))


def test_a_wrong_kernel_of_ksam_is_a_failure_that_the_report_lists(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = a_case(stateless("eager", lambda x: x))
    three = [*case.contestants, stateless("other", fails)]
    only(dataclasses.replace(case, contestants=three), monkeypatch)
    context = Context(CPU, tmp_path, dry_run=True)
    run_in_process("kernels", context)
    write_report(context)
    report = (tmp_path / "dry-run-report.md").read_text(encoding="utf-8")
    assert "- topk_indices 1 float32, other: no kernel image\n" in report
    name = "topk_indices 1 float32"
    assert f"- kernels, {name}: topk: {name}: eager and ksam disagree: " in report
    assert "kernels (not complete)" in report


def test_a_kernel_of_ksam_that_raises_is_a_failure_that_the_report_lists(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = a_case(stateless("eager", fails))
    case = dataclasses.replace(case, contestants=[stateless(KSAM, fails), *case.contestants[1:]])
    only(case, monkeypatch)
    context = Context(CPU, tmp_path, dry_run=True)
    for part in ("kernels", "launches"):
        run_in_process(part, context)
    write_report(context)
    report = (tmp_path / "dry-run-report.md").read_text(encoding="utf-8")
    assert "- kernels, topk_indices 1 float32: RuntimeError: no kernel image\n" in report
    assert "- launches, topk_indices 1: RuntimeError: no kernel image\n" in report
    assert "- launches of topk_indices 1, eager: RuntimeError: no kernel image\n" in report


def test_contestants_with_a_state_have_one_for_each_input() -> None:
    started = []

    def start(input: Any) -> Any:
        state = input[0].clone()
        started.append(state)
        return lambda _: state + 1

    rows = kernels.measure(a_case(Contestant("other", start, EXACT), stateful=True), CPU, PLAN, 1e9)
    assert len(started) == 2
    assert rows[1]["working_set_bytes"] == 16
