"""Command line of ``python -m benchmarks gpu``; benchmarks/gpu.md says how to prepare a machine."""

from __future__ import annotations

import argparse
import re
import signal
import time
from pathlib import Path

import torch

from benchmarks.arguments import positive_float, results_folder, some_of
from benchmarks.environment import device_name, select_device
from benchmarks.gpu.part import PARTS, Context
from benchmarks.gpu.run import run_in_process, run_parts
from ksam_kernels import requested_backend

_RESULTS = Path(__file__).parent.parent / "results"
_DRY_RUN = Path("runs/gpu-dry-run")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `gpu` to `parser`."""
    parser.add_argument(
        "--only",
        type=some_of(PARTS),
        default=tuple(PARTS),
        metavar="LIST",
        help=f"comma-separated, run in the order given: {', '.join(PARTS)}; default: all",
    )
    parser.add_argument(
        "--out",
        type=Path,
        metavar="DIR",
        help="folder for results (default: benchmarks/results/<name of the GPU>; "
        f"of a dry run: {_DRY_RUN})",
    )
    parser.add_argument(
        "--again", action="store_true", help="measure afresh what the folder has results of"
    )
    parser.add_argument(
        "--minutes", type=positive_float, default=8.5, help="of the whole run (default: 8.5)"
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="all of it on the CPU, in seconds: does it run?"
    )
    # The run starts itself with this option for each of its parts.
    parser.add_argument("--here", action="store_true", help=argparse.SUPPRESS)


def run(args: argparse.Namespace) -> None:
    """Run the parts that `args` name."""
    device = torch.device("cpu") if args.dry_run else select_device("cuda")
    context = Context(
        device=device,
        out=args.out or (_DRY_RUN if args.dry_run else default_folder(device)),
        dry_run=args.dry_run,
        deadline=time.monotonic() + 60 * args.minutes,
        again=args.again or args.dry_run,
    )
    if args.here:
        (name,) = args.only
        # SIGINT is ignored, by inheritance, where the whole run is in a shell's background.
        signal.signal(signal.SIGINT, signal.default_int_handler)
        run_in_process(name, context)
        return
    with results_folder(context.out):
        all_is_well = run_parts(args.only, context)
    if not all_is_well:
        raise SystemExit(1)


def default_folder(device: torch.device) -> Path:
    """benchmarks/results/nvidia-h100-80gb-hbm3, say; a backend asked for by name adds -triton."""
    backend = requested_backend()
    name = device_name(device) if backend == "auto" else f"{device_name(device)} {backend}"
    return _RESULTS / re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
