"""Which aims the figures of a run on a GPU meet, on results written down here."""

from __future__ import annotations

from typing import Any

from benchmarks.gpu.aims import Results, aims
from benchmarks.kernels.case import KSAM


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
