"""``python -m ksam_kernels``: which backend runs each operator on each device, and why."""

from __future__ import annotations

import argparse
import json
import sys
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

import ksam_kernels  # registers every backend that is installed
from ksam_kernels import backends
from ksam_kernels.native import extension


def _version() -> str | None:
    """The installed version; None where the packages are on the path, but not installed."""
    try:
        return version("ksam")
    except PackageNotFoundError:
        return None


def _devices() -> list[torch.device]:
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    return [torch.device("cpu"), *([accelerator] if accelerator is not None else [])]


def _entry(room: str, operator: str, device: torch.device) -> dict[str, Any]:
    """What runs (None: the call would raise), and why each better backend does not."""
    try:
        runs, _ = backends.resolve(operator, device)
    except backends.BackendUnavailableError:
        runs = None
    chosen = ksam_kernels.requested_backend()
    last = runs if chosen == "auto" else chosen
    passed_over = {}
    for name in backends.choices()[1:]:
        if name == last:
            if runs is None:
                passed_over[name] = backends.why_not(name, operator, device)
            break
        reason = backends.why_not(name, operator, device)
        passed_over[name] = reason or f"{chosen} was asked for by name"
    return {
        "room": room,
        "operator": operator,
        "device": device.type,
        "runs": runs,
        "passed_over": passed_over,
    }


def _built() -> dict[str, Any] | None:
    """What the compiled extension has kernels for; None without one."""
    if extension is None:
        return None
    return {
        "cpu_isa": extension.cpu_isa,
        "cuda_architectures": extension.cuda_architectures.split(),
        "compiler": extension.compiler,
    }


def report() -> dict[str, Any]:
    """Versions, what was built, the backend asked for, and an entry per operator and device."""
    return {
        "ksam": _version(),
        "torch": torch.__version__,
        "extension": _built(),
        "requested": ksam_kernels.requested_backend(),
        "operators": [
            _entry(room, operator, device)
            for device in _devices()
            for room, operators in backends.OPERATORS.items()
            for operator in operators
        ],
    }


def _extension_line(built: dict[str, Any] | None) -> str:
    if built is None:
        return "no compiled extension"
    names = ", ".join(f"sm_{name}" for name in built["cuda_architectures"])
    cuda = f"CUDA ({names})" if names else "no CUDA kernels"
    return f"compiled extension: CPU ({built['cpu_isa']}), {cuda}"


def _table(facts: dict[str, Any]) -> str:
    """A row per operator; reasons that many rows share are numbered and told once."""
    notes: list[str] = []
    rows = [("device", "room", "operator", "runs", "")]
    for entry in facts["operators"]:
        marks = []
        for name, reason in entry["passed_over"].items():
            note = f"not {name}: {reason}"
            if note not in notes:
                notes.append(note)
            marks.append(f"[{notes.index(note) + 1}]")
        runs = entry["runs"] or "raises"
        rows.append((entry["device"], entry["room"], entry["operator"], runs, " ".join(marks)))
    widths = [max(len(row[i]) for row in rows) for i in range(5)]
    lines = [
        f"ksam {facts['ksam']}, torch {facts['torch']}, backend asked for: {facts['requested']}",
        _extension_line(facts["extension"]),
    ]
    lines += ["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]
    lines += [f"[{i}] {note}" for i, note in enumerate(notes, start=1)]
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    """Print the report; return 1 if a backend asked for by name cannot run an operator, else 0."""
    parser = argparse.ArgumentParser(prog="python -m ksam_kernels", description=__doc__)
    parser.add_argument("--json", action="store_true", help="print the report as JSON")
    facts = report()
    print(json.dumps(facts, indent=2) if parser.parse_args(argv).json else _table(facts))
    return int(any(entry["runs"] is None for entry in facts["operators"]))


if __name__ == "__main__":
    sys.exit(main())
