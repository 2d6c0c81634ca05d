"""Which aims the figures of a run on a GPU meet, on results written down here."""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

import pytest
import torch

from benchmarks.gpu import cases, sanitizer, step
from benchmarks.gpu.aims import Aim, Results, aims
from benchmarks.gpu.part import PARTS
from benchmarks.gpu.report import Report
from benchmarks.kernels.case import KSAM
from benchmarks.kernels.measure import row_of

META = torch.device("meta")


def row(operation: str, shape: str, share: float, **more: Any) -> dict[str, Any]:
    times = {"q25": 1.0, "median": more.pop("us", 10.0), "q75": 1.0}
    plain = {"room": "loss", "extra": "", "dtype": "float32", "contestant": KSAM}
    return {
        **plain, "operation": operation, "shape": shape, "share_of_copy": share,
        "microseconds": times, "backend": "native", **more,
    }  # fmt: skip


def training(*over_sgd: float, left_out: tuple[str, ...] = ()) -> dict[str, Any]:
    workloads = {
        f"workload {i}": {"K-SAM, k=1/3": {"over SGD": {"median": median}}}
        for i, median in enumerate(over_sgd)
    }
    return {"workloads": workloads, "failures": {}, "left_out": list(left_out)}


def steps(**operations: Any) -> dict[str, Any]:
    """Results of the part `graph`: all kinds are in order but for the operations'."""
    fine = {"captured": True, "different": 0, "finite": True}
    return {**dict.fromkeys(step.SUBJECTS, fine), "operations": {**fine, **operations}}


def waits(*, later: bool = False) -> dict[str, Any]:
    """Results of the part `sync`: a wait in a first step does not count."""
    fine = {"first step": {"waits": True}, "later steps": {"waits": False}}
    operations = {"first step": {"waits": False}, "later steps": {"waits": later}}
    return {**dict.fromkeys(step.SUBJECTS, fine), "operations": operations, "a wait is seen": True}


STEP = {"launches": 5, "copies": 1, "waits": {}}
CLEAN = {"clean": True, "summary": "0 errors"}
GOOD: Results = {
    "kernels": {
        "rows": [
            row("cross_entropy", "65536x1000", 0.5),
            row("cross_entropy", "16384x4096", 0.1, contestant="eager"),
            row("cross_entropy", "16384x4096", 0.1, extra="smoothing"),
            *(row("cross_entropy", f"8x{classes}", 0.96) for classes in (4096, 32000, 128256)),
            *(row("cross_entropy", f"8x{n}", 0.97, dtype="bf16") for n in (4096, 32000, 128256)),
            row("cross_entropy", "8x50257", 0.97, dtype="bf16"),
            row("select_cross_entropy", "1024x1000", 0.1, us=11.9),
            *(row("compact_batch", n, 0.86, room="compact", extra="images") for n in "abcd"),
            row("compact_batch", "65536", 0.1, room="compact", extra="labels"),
            row("perturb_", "ResNet-50 (161)", 0.91),
            row("perturb_", "1000 small (1000)", 0.1),
            row("restore_sgd_", "ResNet-50 (161)", 0.92),
            row("restore_adam_", "ResNet-50 (161)", 0.93),
        ]
    },
    "training": training(1.09),
    "launches": {"step": {"together": STEP}},
    "sync": waits(),
    "host": {"step": {"together": {"median": 149.0}}},
    "graph": steps(),
    "tests": {
        "by_backend": {"native": {"passed": 3}}, "failed": [], "failures": {}, "left_out": [],
        "statuses": {"a": 0}, "without_form_on_device": 4, "demanded": ["native"],
    },
    "sanitizer": {"left_out": [], "memcheck": CLEAN, "racecheck": CLEAN},
}  # fmt: skip


def verdicts(results: Results) -> list[bool | None]:
    return [aim.met for aim in aims(results)]


def of_part(name: str, found: dict[str, Any]) -> Aim:
    """The last aim of a part whose results these are."""
    changed = [a for a, b in zip(aims({name: found}), aims({}), strict=True) if a != b]
    return changed[-1]


def test_aims_are_met_or_missed_or_not_measured() -> None:
    assert verdicts({}) == [None] * 12
    assert verdicts(GOOD) == [True] * 12
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
        "launches": {"step": {"together": {**STEP, "launches": 6}}},
        "sync": waits(later=True),
        "host": {"step": {"together": {"median": 151.0}}},
        "graph": steps(different=1),
        "tests": {**GOOD["tests"], "statuses": {"a": 0, "b": "ended"}, "left_out": ["b"]},
        "sanitizer": {"memcheck": CLEAN, "racecheck": {"clean": False, "summary": "1 hazard"}},
    }
    assert verdicts(bad) == [False] * 12
    assert "94.0 % at worst (512x128256 float32, native), 2 of 7 cases" in aims(bad)[0].figure
    waiting = {**STEP, "waits": {"cudaStreamSynchronize": 1}}
    assert aims({**GOOD, "launches": {"step": {"together": waiting}}})[7].met is False


@pytest.mark.parametrize(
    ("part", "missing"),
    [
        *(("sync", name) for name in step.SUBJECTS),
        *(("graph", name) for name in step.SUBJECTS),
        *(("sanitizer", name) for name in sanitizer.TOOLS),
    ],
)
def test_a_part_without_one_of_its_subjects_meets_no_aim(part: str, missing: str) -> None:
    found = {name: value for name, value in GOOD[part].items() if name != missing}
    aim = of_part(part, found)
    assert aim.met is None
    assert aim.figure.endswith(f"; not measured: {missing}")


def test_a_training_step_is_within_its_aim_for_every_workload() -> None:
    aim = of_part("training", training(1.09, left_out=("ResNet-50",)))
    assert aim.met is None
    assert aim.figure.endswith("1 of 2 cases")
    assert of_part("training", training(1.2, left_out=("ResNet-50",))).met is False
    failed = {**training(1.09), "failures": {"ResNet-50": "out of memory"}}
    assert of_part("training", failed).met is False


def test_the_cases_of_an_aim_are_those_that_are_measured() -> None:
    rows = []
    for case in cases.kernel_cases(META, tiny=False):
        own = dataclasses.asdict(row_of(case, case.contestants[0], "native"))
        times = {"q25": 1.0, "median": 1.0, "q75": 1.0}
        rows.append({**own, "microseconds": times, "share_of_copy": 1.0})
    assert verdicts({"kernels": {"rows": rows}})[:5] == [True] * 5
    without = [verdicts({"kernels": {"rows": [r for r in rows if r is not row]}}) for row in rows]
    # Every aim lacks a case as often as it has cases, and is then not met.
    assert [sum(found[i] is None for found in without) for i in range(5)] == [7, 1, 4, 1, 2]


@pytest.mark.parametrize("wrong", [{"captured": False}, {"finite": False}, {"different": 1}])
def test_a_graph_replays_the_bits_of_finite_numbers(wrong: dict[str, Any]) -> None:
    aim = of_part("graph", steps(**wrong))
    assert aim.met is False
    assert aim.figure == "2 of 3 kinds of steps"


def test_a_part_that_broke_off_meets_no_aim() -> None:
    for name, found in GOOD.items():
        results = {**GOOD, name: {**found, "failure": "its process ended with status -6"}}
        spoilt = [aim for aim in aims(results) if not aim.met]
        assert len(spoilt) == (5 if name == "kernels" else 1)
        for aim in spoilt:
            assert aim.met is False
            assert aim.figure.endswith("; its process ended with status -6")


def test_what_failed_or_was_wrong_is_not_well_and_what_is_slow_is() -> None:
    assert Report(aims(GOOD), []).all_is_well(PARTS)
    assert not Report(aims(GOOD), ["host: out of memory"]).all_is_well(PARTS)
    slow = copy.deepcopy(GOOD)
    slow["host"]["step"]["together"]["median"] = 151.0
    assert Report(aims({**slow, "training": training(1.2)}), []).all_is_well(PARTS)
    for part, found in {
        "sync": waits(later=True),
        "graph": steps(different=1),
        "tests": {**GOOD["tests"], "statuses": {"a": 1}},
        "sanitizer": {"memcheck": {"clean": False, "summary": "1 error"}},
    }.items():
        assert not Report(aims({**GOOD, part: found}), []).all_is_well(()), part


def test_checks_that_were_asked_for_and_did_not_run_are_not_well() -> None:
    checks = ("sync", "graph", "tests", "sanitizer")
    assert Report(aims({}), []).all_is_well(set(PARTS) - set(checks))
    for part in checks:
        without = {name: found for name, found in GOOD.items() if name != part}
        assert not Report(aims(without), []).all_is_well(PARTS), part
        assert Report(aims(without), []).all_is_well(set(PARTS) - {part}), part
        assert not Report([], []).all_is_well([part]), part
    lacking = {**GOOD, "sanitizer": {"not_run": "no compute-sanitizer found"}}
    assert not Report(aims(lacking), []).all_is_well(PARTS)


def test_no_aim_is_met_by_a_kernel_that_failed_whatever_its_figures() -> None:
    failed = {"failure": "eager and ksam disagree"}
    untimed = {**failed, "microseconds": None, "share_of_copy": None}
    for more in (failed, untimed):
        rows = [
            row("cross_entropy", "16384x4096", 0.96),
            row("cross_entropy", "2048x32000", 0.97, **more),
            row("select_cross_entropy", "1024x1000", 0.1, us=11.9, **more),
            row("compact_batch", "4096x3x32x32", 0.86, room="compact", extra="images", **more),
            row("perturb_", "ResNet-50 (161)", 0.91, **more),
            row("restore_sgd_", "ResNet-50 (161)", 0.92, **more),
        ]
        found = aims({"kernels": {"rows": rows}})
        assert [aim.met for aim in found[:5]] == [False] * 5
        assert found[0].figure == "failed: 2048x32000 float32"
