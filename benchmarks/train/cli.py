"""Command line of ``python -m benchmarks train``."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from benchmarks.arguments import (
    non_negative_float,
    number,
    positive_float,
    positive_int,
    share,
    some_of,
)
from benchmarks.environment import select_device
from benchmarks.train.config import (
    BASES,
    DATA,
    DEFAULT_METHODS,
    default_msam_rho,
    parse_k,
    resolve,
)
from benchmarks.train.methods import METHODS
from benchmarks.train.run import run_benchmark


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `train` to `parser`."""
    add_training_arguments(parser)
    _add_timing_arguments(parser)


def add_training_arguments(parser: argparse.ArgumentParser) -> None:
    """Add those that `study` has too."""
    _add_data_arguments(parser)
    _add_optimizer_arguments(parser)
    _add_method_arguments(parser)
    _add_run_arguments(parser)


def _add_data_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("data and model")
    group.add_argument("--data", choices=tuple(DATA), default="digits", help="default: digits")
    group.add_argument(
        "--data-root",
        type=Path,
        metavar="PATH",
        help="cifar10: a folder with cifar-10-batches-py, or a packed .npz; "
        "sst2, rte, mrpc: a folder with SST-2, RTE, MRPC",
    )
    group.add_argument(
        "--model",
        metavar="NAME",
        help="cnn, resnet8, resnet20, resnet18 or vit (default: cnn for digits, resnet8 for "
        "cifar10; a vit wants --base adamw); "
        "text: the folder of a transformers model",
    )
    group.add_argument(
        "--train-samples",
        type=positive_int,
        metavar="N",
        help="train on the first N samples of a fixed permutation (default: all)",
    )
    group.add_argument(
        "--label-noise",
        type=share,
        default=0.0,
        metavar="SHARE",
        help="give this share of the training samples a wrong label, always the same; default: 0",
    )


def _add_optimizer_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("optimizer (defaults depend on --data and --base)")
    group.add_argument(
        "--methods",
        type=some_of(METHODS),
        default=DEFAULT_METHODS,
        metavar="LIST",
        help=f"comma-separated, of {', '.join(METHODS)}; sgd is the base optimizer alone; "
        f"default: {','.join(DEFAULT_METHODS)}",
    )
    group.add_argument(
        "--base",
        choices=tuple(BASES),
        help="base optimizer (default: sgd for images, adamw for text)",
    )
    group.add_argument("--epochs", type=positive_int, metavar="N")
    group.add_argument(
        "--equal-cost",
        action="store_true",
        help="divide the epochs of every method by the cost of its step, by count, and round them: "
        "all then cost about what the base optimizer's --epochs do",
    )
    group.add_argument("--batch-size", type=positive_int, metavar="M")
    group.add_argument("--lr", type=positive_float, help="peak learning rate")
    group.add_argument("--weight-decay", type=non_negative_float)
    group.add_argument(
        "--k",
        type=parse_k,
        default=1 / 3,
        help="samples K-SAM keeps: a fraction (1/3, 0.33) or a count (43); default: 1/3",
    )
    group.add_argument(
        "--rho", type=non_negative_float, default=0.05, help="radius of SAM; default: 0.05"
    )
    group.add_argument(
        "--label-smoothing",
        type=number(float, lambda x: 0 <= x < 1, "a number in [0, 1)"),
        default=0.0,
        help="default: 0",
    )


def _add_method_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("single methods")
    msam = ", ".join(f"{default_msam_rho(base)} with {base}" for base in BASES)
    for name, default, text in (("asam", 0.5, "0.5"), ("msam", None, msam)):
        group.add_argument(
            f"--{name}-rho",
            type=non_negative_float,
            default=default,
            metavar="RHO",
            help=f"radius of {name.upper()}; default: {text}",
        )
    group.add_argument(
        "--late",
        type=share,
        default=0.2,
        metavar="SHARE",
        help="the last part of the training, in which late-sam and late-ksam are; default: 0.2",
    )
    group.add_argument(
        "--threshold",
        type=share,
        default=0.9,
        metavar="SHARE",
        help="ksam-auto: of the gradient bound, that the selection must carry; default: 0.9",
    )
    group.add_argument(
        "--budget",
        type=non_negative_float,
        default=1.0,
        metavar="COST",
        help="ksam-auto: mean cost of its steps in units of the base optimizer's, 0 for no limit; "
        "default: 1",
    )


def _add_run_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("run")
    group.add_argument(
        "--seeds", type=positive_int, default=3, metavar="N", help="use seeds 0 .. N-1; default: 3"
    )
    group.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    group.add_argument(
        "--threads",
        type=positive_int,
        metavar="N",
        help="CPU threads (default: PyTorch's; of a study's processes: 1)",
    )
    group.add_argument(
        "--diagnostics",
        action="store_true",
        help="of the sharpness-aware methods, seed 0, write what their steps do as CSV and a page "
        "of plots; takes some training time",
    )
    group.add_argument(
        "--out",
        type=Path,
        metavar="DIR",
        help="folder for results; train writes over those that are there (default: "
        "runs/<command>-<data>)",
    )


def _add_timing_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("step timing")
    group.add_argument(
        "--timing-rounds",
        type=number(int, lambda n: n >= 0, "a count >= 0"),
        metavar="N",
        help="rounds of the side-by-side step timing, 0 for none (default: at least 15 and about "
        "15 seconds' worth)",
    )


def run(args: argparse.Namespace) -> None:
    """Run the benchmark that `args` describe."""
    device = select_device(args.device)
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    run_benchmark(resolve(args), device)
