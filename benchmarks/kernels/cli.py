"""Command line of ``python -m benchmarks kernels``."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from benchmarks.arguments import positive_int, some_of
from benchmarks.environment import select_device
from benchmarks.kernels.run import ROOMS, Settings, run_benchmark
from ksam_kernels import backends, requested_backend, use_backend


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `kernels` to `parser`."""
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument(
        "--rooms",
        type=some_of(ROOMS),
        default=ROOMS,
        metavar="LIST",
        help=f"comma-separated: {', '.join(ROOMS)}; default: all",
    )
    parser.add_argument(
        "--quick", action="store_true", help="few small cases, short: is everything in order?"
    )
    parser.add_argument(
        "--backend",
        choices=backends.choices(),
        default=requested_backend(),
        help="of ksam_kernels; default: KSAM_BACKEND, else auto",
    )
    parser.add_argument(
        "--threads", type=positive_int, metavar="N", help="CPU threads (default: PyTorch's)"
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("runs/kernels"),
        metavar="DIR",
        help="folder for results (default: runs/kernels)",
    )


def run(args: argparse.Namespace) -> None:
    """Run the benchmark that `args` describe."""
    device = select_device(args.device)
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    settings = Settings(rooms=args.rooms, quick=args.quick, backend=args.backend, out=args.out)
    with use_backend(args.backend):
        run_benchmark(settings, device)
