"""What the kernels are to reach on a GPU, and whether the figures of a run reach it."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from benchmarks.gpu.sanitizer import TOOLS
from benchmarks.gpu.step import SUBJECTS
from benchmarks.kernels.case import KSAM

Results = dict[str, dict[str, Any]]  # of every part that has run
Row = dict[str, Any]

CHECKS = ("sync", "graph", "tests", "sanitizer")  # parts that tell right from wrong, not how fast


@dataclass(frozen=True)
class Aim:
    """An aim, the figure that was measured, and whether it is met; None: not all was measured."""

    name: str
    aim: str
    figure: str
    met: bool | None
    part: str = ""  # whose figure it is


def _met(good: bool, whole: bool) -> bool | None:
    """Whether an aim is met: good figures meet it only if they are all there."""
    return (True if whole else None) if good else False


def _missing(expected: Sequence[str], found: Collection[str]) -> str:
    missing = [name for name in expected if name not in found]
    return f"; not measured: {', '.join(missing)}" if missing else ""


def _ours(results: Results) -> list[Row]:
    rows = results.get("kernels", {}).get("rows", [])
    own = [row for row in rows if row["contestant"] == KSAM]
    return [row for row in own if row["microseconds"] or "failure" in row]


def _label(row: Row) -> str:
    return " ".join(filter(None, (row["extra"], row["shape"], row["dtype"])))


def _failed(name: str, aim: str, what: Iterable[str]) -> Aim:
    """An aim that is not met, whatever the other figures are: no wrong result is fast enough."""
    return Aim(name, aim, f"failed: {', '.join(what)}", False)


def _share(
    name: str, rows: Sequence[Row], where: Callable[[Row], bool], *, least: float, cases: int
) -> Aim:
    """The aim that every row moves bytes at this share of a copy's bandwidth; shows the worst."""
    aim = f">= {100 * least:.0f} % of the bandwidth of a copy"
    own = [row for row in rows if where(row)]
    failed = [_label(row) for row in own if "failure" in row]
    if failed:
        return _failed(name, aim, failed)
    if not own:
        return Aim(name, aim, "not measured", None)
    worst = min(own, key=lambda row: row["share_of_copy"])
    share = worst["share_of_copy"]
    figure = f"{100 * share:.1f} % at worst ({_label(worst)}, {worst['backend']})"
    figure += f", {len(own)} of {cases} cases"
    return Aim(name, aim, figure, _met(share >= least, len(own) == cases))


def _most(
    name: str, unit: str, most: float, value: float | None, note: str = "", *, whole: bool = True
) -> Aim:
    aim = f"<= {most:g} {unit}".strip()
    if value is None:
        return Aim(name, aim, "not measured", None)
    return Aim(name, aim, f"{value:.4g} {unit}".strip() + note, _met(value <= most, whole))


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
    found = results.get("training", {})
    workloads = found.get("workloads", {})
    costs = {label: own[method]["over SGD"]["median"] for label, own in workloads.items()}
    if found.get("failures"):
        return _failed(name, "<= 1.1 of SGD's", found["failures"])
    if not costs:
        return _most(name, "of SGD's", 1.1, None)
    worst = max(costs, key=lambda label: costs[label])
    left_out = found["left_out"]
    note = f" at worst ({worst}), {len(costs)} of {len(costs) + len(left_out)} cases"
    return _most(name, "of SGD's", 1.1, costs[worst], note, whole=not left_out)


def _waits(results: Results) -> Aim:
    found = results.get("sync", {})
    name, aim = "steps that wait for the GPU", "none"
    steps = {name: found[name] for name in SUBJECTS if name in found}
    if not steps or found.get("a wait is seen") is False:
        return Aim(name, aim, "not measured", None)
    waiting = [key for key, value in steps.items() if value["later steps"]["waits"]]
    profiled = results.get("launches", {}).get("step", {}).get("together", {}).get("waits")
    figure = ", ".join(waiting) if waiting else f"none of {len(steps)} kinds of steps"
    if profiled:
        figure += f"; in the profile {profiled}"
    figure += _missing(SUBJECTS, steps)
    return Aim(name, aim, figure, _met(not waiting and not profiled, len(steps) == len(SUBJECTS)))


def _graphs(results: Results) -> Aim:
    found = {k: v for k, v in results.get("graph", {}).items() if k in SUBJECTS}
    name, aim = "steps replayed from a CUDA graph", "the bits of eager steps"
    if not found:
        return Aim(name, aim, "not measured", None)
    # Steps that end in NaN may have the same bits, too.
    same = [v for v in found.values() if v["captured"] and v["finite"] and not v["different"]]
    figure = f"{len(same)} of {len(found)} kinds of steps" + _missing(SUBJECTS, found)
    return Aim(name, aim, figure, _met(len(same) == len(found), len(found) == len(SUBJECTS)))


def _tests(results: Results) -> Aim:
    found = results.get("tests", {})
    name, aim = "contract tests", "all pass"
    statuses = found.get("statuses", {})
    if not statuses:
        return Aim(name, aim, "not measured", None)
    counts = found["by_backend"]
    parts = [f"{backend} {c.get('passed', 0)}" for backend, c in counts.items()]
    figure = f"passed: {', '.join(parts) or 'none'}; failed: {len(found['failed'])}"
    skipped = sum(c.get("skipped", 0) for c in counts.values())
    if skipped:
        figure += f"; skipped: {skipped}"
    if found["without_form_on_device"]:
        figure += f"; {found['without_form_on_device']} have no form on a GPU"
    broken = [name for name in found["failures"] if name in statuses]
    if broken:
        figure += f"; {len(broken)} of {len(statuses)} shares failed"
    if found["left_out"]:
        figure += f"; {len(found['left_out'])} of {len(statuses)} shares not finished"
    idle = [name for name in found["demanded"] if not counts.get(name, {}).get("passed")]
    if idle:
        figure += f"; no test passed on {', '.join(idle)}"
    passed = bool(counts) and all(status == 0 for status in statuses.values())
    return Aim(name, aim, figure, passed and not idle)


def _sanitizer(results: Results) -> Aim:
    found = results.get("sanitizer", {})
    name, aim = "compute-sanitizer", "clean"
    checks = {tool: found[tool] for tool in TOOLS if tool in found}
    if not checks:
        return Aim(name, aim, found.get("not_run", "not measured"), None)
    figure = ", ".join(f"{tool}: {c['summary'] or 'no summary'}" for tool, c in checks.items())
    clean = all(c["clean"] for c in checks.values())
    figure += _missing(TOOLS, checks)
    return Aim(name, aim, figure, _met(clean, len(checks) == len(TOOLS)))


def _in_part(part: str, aim: Aim, results: Results) -> Aim:
    """The aim with its part; a part that broke off meets none, whatever it had found till then."""
    failure = results.get(part, {}).get("failure")
    if failure is not None:
        aim = replace(aim, figure=f"{aim.figure}; {failure}", met=False)
    return replace(aim, part=part)


def _of_kernels(results: Results) -> list[Aim]:
    ours = _ours(results)
    return [
        _share(
            "loss forward, C >= 4096",
            ours,
            lambda r: r["operation"] == "cross_entropy" and not r["extra"] and _classes(r) >= 4096,
            least=0.95,
            cases=7,
        ),
        _selection(results),
        _share(
            "compact, rows of 1 KB and more",
            ours,
            lambda r: r["room"] == "compact" and "labels" not in r["extra"],
            least=0.85,
            cases=4,
        ),
        _share(
            "norm + perturb, ResNet-50",
            ours,
            lambda r: r["operation"] == "perturb_" and r["shape"].startswith("ResNet-50"),
            least=0.90,
            cases=1,
        ),
        _share(
            "restore + update, ResNet-50",
            ours,
            lambda r: r["operation"].startswith("restore_") and r["shape"].startswith("ResNet-50"),
            least=0.90,
            cases=2,
        ),
    ]


def _host(results: Results) -> Aim:
    together = results.get("host", {}).get("step", {}).get("together")
    name = "host time of a step's calls, 161 tensors"
    return _most(name, "us", 150, together and together["median"])


def aims(results: Results) -> list[Aim]:
    """All aims, in the order of a step and then of the checks."""
    by_part = [
        *(("kernels", aim) for aim in _of_kernels(results)),
        ("training", _training(results)),
        ("launches", _launches(results)),
        ("sync", _waits(results)),
        ("host", _host(results)),
        ("graph", _graphs(results)),
        ("tests", _tests(results)),
        ("sanitizer", _sanitizer(results)),
    ]
    return [_in_part(part, aim, results) for part, aim in by_part]
