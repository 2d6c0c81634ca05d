"""What the kernels are to reach on a GPU, and whether the figures of a run reach it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.kernels.case import KSAM

Results = dict[str, dict[str, Any]]  # of every part that has run
Row = dict[str, Any]


@dataclass(frozen=True)
class Aim:
    """An aim, the figure that was measured, and whether it is met; None: it was not measured."""

    name: str
    aim: str
    figure: str
    met: bool | None


def _ours(results: Results) -> list[Row]:
    rows = results.get("kernels", {}).get("rows", [])
    own = [row for row in rows if row["contestant"] == KSAM]
    return [row for row in own if row["microseconds"] or "failure" in row]


def _label(row: Row) -> str:
    return " ".join(filter(None, (row["extra"], row["shape"], row["dtype"])))


def _failed(name: str, aim: str, what: Iterable[str]) -> Aim:
    """Whatever the figures of the others are: no wrong result is fast enough."""
    return Aim(name, aim, f"failed: {', '.join(what)}", False)


def _share(name: str, least: float, rows: Sequence[Row], where: Callable[[Row], bool]) -> Aim:
    """Every row moves its bytes at this share of a copy's bandwidth; shows the worst."""
    aim = f">= {100 * least:.0f} % of the bandwidth of a copy"
    own = [row for row in rows if where(row)]
    failed = [_label(row) for row in own if "failure" in row]
    if failed:
        return _failed(name, aim, failed)
    if not own:
        return Aim(name, aim, "not measured", None)
    worst = min(own, key=lambda row: row["share_of_copy"])
    share = worst["share_of_copy"]
    figure = f"{100 * share:.1f} % at worst ({_label(worst)}, {worst['backend']}), {len(own)} cases"
    return Aim(name, aim, figure, share >= least)


def _most(name: str, unit: str, most: float, value: float | None, note: str = "") -> Aim:
    aim = f"<= {most:g} {unit}".strip()
    if value is None:
        return Aim(name, aim, note or "not measured", None)
    return Aim(name, aim, f"{value:.4g} {unit}".strip() + note, value <= most)


def _classes(row: Row) -> int:
    return int(row["shape"].split("x")[1])


def _selection(results: Results) -> Aim:
    rows = [row for row in _ours(results) if row["operation"] == "select_cross_entropy"]
    own = next((row for row in rows if row["dtype"] == "float32"), None)
    name = "loss + top-k, 1024 x 1000"
    if own is None:
        return _most(name, "us", 12, None)
    if "failure" in own:
        return _failed(name, "<= 12 us", [_label(own)])
    return _most(name, "us", 12, own["microseconds"]["median"], f" ({own['backend']})")


def _launches(results: Results) -> Aim:
    counted = results.get("launches", {}).get("step", {}).get("together")
    name = "launches of a step without the model"
    if not counted or not counted["launches"]:
        return _most(name, "", 5, None)
    copies = f", and {counted['copies']} copies or fills" if counted["copies"] else ""
    return _most(name, "", 5, counted["launches"], copies)


def _training(results: Results) -> Aim:
    name, method = "a training step of K-SAM, k = M/3", "K-SAM, k=1/3"
    found = results.get("training", {}).get("workloads", {})
    costs = {label: own[method]["over SGD"]["median"] for label, own in found.items()}
    if not costs:
        return _most(name, "of SGD's", 1.1, None)
    worst = max(costs, key=lambda label: costs[label])
    return _most(name, "of SGD's", 1.1, costs[worst], f" at worst ({worst}), {len(costs)} cases")


def _waits(results: Results) -> Aim:
    found = results.get("sync", {})
    name, aim = "steps that wait for the GPU", "none"
    steps = {key: value for key, value in found.items() if isinstance(value, dict)}
    if not steps or found.get("a wait is seen") is False:
        return Aim(name, aim, "not measured", None)
    waiting = [key for key, value in steps.items() if value["later steps"]["waits"]]
    profiled = results.get("launches", {}).get("step", {}).get("together", {}).get("waits")
    figure = ", ".join(waiting) if waiting else f"none of {len(steps)} kinds of steps"
    if profiled:
        figure += f"; in the profile {profiled}"
    return Aim(name, aim, figure, not waiting and not profiled)


def _graphs(results: Results) -> Aim:
    found = [v for v in results.get("graph", {}).values() if isinstance(v, dict)]
    name, aim = "steps replayed from a CUDA graph", "the bits of eager steps"
    if not found:
        return Aim(name, aim, "not measured", None)
    same = [v for v in found if v["captured"] and not v["different"]]
    return Aim(name, aim, f"{len(same)} of {len(found)} kinds of steps", len(same) == len(found))


def _tests(results: Results) -> Aim:
    found = results.get("tests", {})
    name, aim = "contract tests", "all pass"
    statuses = found.get("statuses", {})
    if not statuses:
        return Aim(name, aim, "not measured", None)
    counts = found["by_backend"]
    parts = [f"{backend} {c.get('passed', 0)}" for backend, c in counts.items()]
    figure = f"passed: {', '.join(parts) or 'none'}; failed: {len(found['failed'])}"
    if found["without_form_on_device"]:
        figure += f"; {found['without_form_on_device']} have no form on a GPU"
    if found["failures"]:
        figure += f"; {len(found['failures'])} of {len(statuses)} shares failed"
    if found["left_out"]:
        figure += f"; {len(found['left_out'])} of {len(statuses)} shares not finished"
    passed = bool(counts) and all(status == 0 for status in statuses.values())
    return Aim(name, aim, figure, passed)


def _sanitizer(results: Results) -> Aim:
    found = results.get("sanitizer", {})
    name, aim = "compute-sanitizer", "clean"
    checks = {key: value for key, value in found.items() if isinstance(value, dict)}
    if not checks:
        return Aim(name, aim, found.get("not_run", "not measured"), None)
    figure = ", ".join(f"{key}: {value['summary']}" for key, value in checks.items())
    return Aim(name, aim, figure, all(value["clean"] for value in checks.values()))


def aims(results: Results) -> list[Aim]:
    """All aims, in the order of a step and then of the checks."""
    ours = _ours(results)
    host = results.get("host", {}).get("step", {}).get("together")
    return [
        _share(
            *("loss forward, C >= 4096", 0.95, ours),
            lambda r: r["operation"] == "cross_entropy" and not r["extra"] and _classes(r) >= 4096,
        ),
        _selection(results),
        _share(
            *("compact, rows of 1 KB and more", 0.85, ours),
            lambda r: r["room"] == "compact" and "labels" not in r["extra"],
        ),
        _share(
            *("norm + perturb, ResNet-50", 0.90, ours),
            lambda r: r["operation"] == "perturb_" and r["shape"].startswith("ResNet-50"),
        ),
        _share(
            *("restore + update, ResNet-50", 0.90, ours),
            lambda r: r["operation"].startswith("restore_") and r["shape"].startswith("ResNet-50"),
        ),
        _training(results),
        _launches(results),
        _waits(results),
        _most("host time of a step's calls, 161 tensors", "us", 150, host and host["median"]),
        _graphs(results),
        _tests(results),
        _sanitizer(results),
    ]
