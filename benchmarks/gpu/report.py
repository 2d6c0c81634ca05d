"""One page, a table of all times and a plot, from whatever parts have run."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.gpu.aims import CHECKS, Aim, Results, aims
from benchmarks.gpu.kernels import name_of
from benchmarks.gpu.part import PARTS, Context, PartFile, measured, write_json
from benchmarks.kernels.case import KSAM, label_of
from benchmarks.kernels.measure import Row
from benchmarks.results_file import ResultsFile
from benchmarks.timing import Quartiles

COLUMNS = (
    "room", "operation", "shape", "dtype", "extra", "contestant", "backend", "mode",
    "median_us", "q25_us", "q75_us", "rounds", "floor_bytes", "working_set_bytes",
    "share_of_copy", "share_of_equal_copy", "ratio", "note", "torch", "device", "timestamp",
)  # fmt: skip

_VERDICTS = {True: "met", False: "**missed**", None: "not measured"}


class Report(NamedTuple):
    """What the parts in a folder come to."""

    aims: list[Aim]
    failures: list[str]  # of parts, and of cases within them

    def all_is_well(self, asked: Collection[str]) -> bool:
        """Nothing failed, no check's aim was missed, and those of the parts asked for were met: a
        part that did not run shows nothing. Slowness is no failure."""
        met = {aim.part: aim.met for aim in self.aims if aim.part in CHECKS}
        return (
            not self.failures
            and False not in met.values()
            and all(met.get(part) for part in asked if part in CHECKS)
        )


def write_report(context: Context) -> Report:
    """Write report.md, summary.json, results.csv and ratios.png beside the parts' files."""
    parts = _read_parts(context)
    if not parts:
        return Report([], [])
    results: Results = {name: part["results"] for name, part in parts.items()}
    found = aims(results)
    rows = results.get("kernels", {}).get("rows", [])
    _write_csv(context, parts, rows)
    plotted = _plot(context, rows)
    states = _states(parts, context)
    summary = {"parts": states, "aims": [vars(aim) for aim in found], "results": results}
    write_json(_file(context, "summary.json"), summary)
    lines = [*_heading(parts, context), *_aims(found), *_training(results), *_times(rows)]
    failures = _failures(parts)
    lines += [*_launches(results), *_notes(results), *_listed("What failed:", failures)]
    lines += _listed("There was no time left for", _left_out(parts))
    lines += [f"![Ratios]({plotted.name})"] if plotted else []
    _file(context, "report.md").write_text("\n".join(lines) + "\n", "utf-8")
    return Report(found, failures)


def _file(context: Context, name: str) -> Path:
    return context.out / f"{context.prefix}{name}"


def _read_parts(context: Context) -> dict[str, dict[str, Any]]:
    """The files of the parts, in the order in which they were written."""
    found = filter(None, (PartFile(name, context).load() for name in PARTS))
    return {content["part"]: content for content in sorted(found, key=lambda c: c["written"])}


def _states(parts: dict[str, dict[str, Any]], context: Context) -> dict[str, Any]:
    names = ("complete", "written", *measured(context.device))
    return {part: {name: content[name] for name in names} for part, content in parts.items()}


def _heading(parts: dict[str, dict[str, Any]], context: Context) -> list[str]:
    newest = list(parts.values())[-1]
    facts = parts.get("build", {}).get("results", {})
    extension = facts.get("extension", {})
    versions = [
        f"torch {newest['torch']}",
        f"CUDA {facts.get('cuda_of_torch')}",
        f"driver {facts.get('gpu', {}).get('nvidia_smi', {}).get('driver_version')}",
        f"Triton {facts.get('triton')}",
        f"kernels built for {extension.get('cuda_architectures') or 'no GPU'}",
    ]
    states = [f"{n}{'' if p['complete'] else ' (not complete)'}" for n, p in parts.items()]
    dry = (
        ["", "**A dry run on the CPU: no figure here means anything.**"] if context.dry_run else []
    )
    return [
        f"# {newest['device']}",
        *dry,
        "",
        ", ".join(versions) + f". {newest['written']}.",
        "",
        f"Parts: {', '.join(states)}. The command: `python -m benchmarks gpu`.",
        "",
    ]


def _aims(found: list[Aim]) -> list[str]:
    rows = [f"| {a.name} | {a.aim} | {a.figure} | {_VERDICTS[a.met]} |" for a in found]
    return ["| what | aim | measured | |", "|---|---|---|---|", *rows, ""]


def _training(results: Results) -> list[str]:
    """Times of whole training steps, a column per method."""
    found = results.get("training", {}).get("workloads", {})
    if not found:
        return []
    methods = list(dict.fromkeys(name for own in found.values() for name in own))
    lines = [f"| a training step, ms | {' | '.join(methods)} |", "|---" * (1 + len(methods)) + "|"]
    for label, own in found.items():
        cells = [
            f"{own[name]['milliseconds']['median']:.2f} ({own[name]['over SGD']['median']:.2f})"
            if name in own
            else "-"
            for name in methods
        ]
        lines.append(f"| {label} | {' | '.join(cells)} |")
    note = "In brackets: over SGD's (without a graph), the median of rounds."
    return [*lines, "", note, ""]


def _times(rows: list[dict[str, Any]]) -> list[str]:
    """Ksam's times, and the others' as multiples of them."""
    cases: dict[tuple[str, ...], list[dict[str, Any]]] = {}
    for row in rows:
        key = tuple(row[name] for name in ("operation", "extra", "shape", "dtype"))
        cases.setdefault(key, []).append(row)
    if not cases:
        return []
    columns = ("operation", "shape", "backend", "us", "of a copy", "of one as large")
    lines = [f"| {' | '.join(columns)} | others, times as long |", f"|{'---|' * 7}"]
    for (operation, extra, shape, dtype), own in cases.items():
        ours = next(row for row in own if row["contestant"] == KSAM)
        label = label_of(operation, extra)
        others = ", ".join(_other(row) for row in own if row is not ours)
        lines.append(
            f"| {label} | {shape} {dtype} | {ours['backend']} | {_figures(ours)} | {others} |"
        )
    notes = [
        "Of a copy: the bytes that must be moved, by the bandwidth of a large copy. "
        "Of one as large: the time of a copy that moves as many.",
        "`~`: waits for the GPU, so timed with the gaps between its launches. `-`: did not run.",
    ]
    return [*lines, "", *notes, ""]


def _figures(row: dict[str, Any]) -> str:
    time = row["microseconds"]
    if time is None:
        return f"- | {row['note']} | -"
    quartiles = f"{time['median']:.1f} [{time['q25']:.1f}-{time['q75']:.1f}]"
    return f"{quartiles} | {row['share_of_copy']:.0%} | {row['share_of_equal_copy']:.0%}"


def _other(row: dict[str, Any]) -> str:
    if row["ratio"] is None:
        return f"{row['contestant']} -"
    return f"{row['contestant']} {row['ratio']:.2f}{'~' if row.get('mode') == 'eager' else ''}"


def _launches(results: Results) -> list[str]:
    operations = results.get("launches", {}).get("operations", {})
    if not operations:
        return []
    lines = ["| launches of | |", "|---|---|"]
    for label, counts in operations.items():
        cells = [f"{name} {c.get('launches', '-')}" for name, c in counts.items()]
        lines.append(f"| {label} | {', '.join(cells)} |")
    return [*lines, ""]


def _notes(results: Results) -> list[str]:
    """Why rivals have no figures. Ksam's own reasons are failures."""
    lines = [
        f"{name_of(row)}, {row['contestant']}: {row['note']}"
        for row in results.get("kernels", {}).get("rows", [])
        if row["note"] and row["contestant"] != KSAM
    ]
    for label, counts in results.get("launches", {}).get("operations", {}).items():
        errors = {name: c["error"] for name, c in counts.items() if "error" in c and name != KSAM}
        lines += [f"launches of {label}, {name}: {error}" for name, error in errors.items()]
    return _listed("Others that did not run:", lines)


def _failures(parts: dict[str, dict[str, Any]]) -> list[str]:
    lines = []
    for name, part in parts.items():
        found = part["results"]
        if "failure" in found:
            lines.append(f"{name}: {found['failure']}")
        lines += [f"{name}, {what}: {why}" for what, why in found.get("failures", {}).items()]
    return lines


def _left_out(parts: dict[str, dict[str, Any]]) -> list[str]:
    return [f"{n}: {what}" for n, p in parts.items() for what in p["results"].get("left_out", [])]


def _listed(title: str, lines: list[str]) -> list[str]:
    return [title, "", *(f"- {line}" for line in lines), ""] if lines else []


def _write_csv(
    context: Context, parts: dict[str, dict[str, Any]], rows: list[dict[str, Any]]
) -> None:
    if not rows:
        return
    kernels = parts["kernels"]
    constant = {"torch": kernels["torch"], "device": kernels["device"]}
    with ResultsFile(_file(context, "results.csv"), COLUMNS, constant) as file:
        for row in rows:
            times = row["microseconds"] or {}
            quartiles = {f"{name}_us": value for name, value in times.items()}
            flat = {**row, **quartiles}
            file.append({name: flat[name] for name in COLUMNS if name in flat})


def _plot(context: Context, rows: list[dict[str, Any]]) -> Path | None:
    """The plot; None without rows, or without matplotlib, which a bare machine may lack."""
    if not rows:
        return None
    try:
        from benchmarks.kernels.plot import plot_ratios, require_matplotlib

        require_matplotlib()
    except Exception:
        return None
    names = Row.__dataclass_fields__
    typed = []
    for row in rows:
        own = {name: row[name] for name in names if name in row}
        times = own["microseconds"]
        typed.append(Row(**{**own, "microseconds": times and Quartiles(**times)}))
    path = _file(context, "ratios.png")
    plot_ratios(path, typed, context.out.name)
    return path
