"""Command line of the benchmarks: ``python -m benchmarks <command> [options]``."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence

from benchmarks.errors import UsageError

# name: (module, one line of help). The module provides `add_arguments(parser)` and `run(args)`.
COMMANDS = {
    "train": ("benchmarks.train.cli", "train with SGD, SAM and K-SAM: accuracy, time, step cost"),
    "study": ("benchmarks.train.study", "methods x seeds in parallel processes, resumable"),
    "kernels": ("benchmarks.kernels.cli", "time every operation against plain PyTorch"),
    "memory": ("benchmarks.memory", "what steps of SGD, SAM and K-SAM keep for backward passes"),
    "gpu": (
        "benchmarks.gpu.cli",
        "all that needs a GPU, checks and measurements, nine minutes a run",
    ),
}


def build_parser(argv: Sequence[str]) -> argparse.ArgumentParser:
    """Return the parser for `argv`; only the command that `argv` names is imported."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")
    for name, (module_name, summary) in COMMANDS.items():
        command = commands.add_parser(name, help=summary, description=summary)
        # One command's optional packages must not be needed to run another one.
        if name in argv[:1]:
            module = importlib.import_module(module_name)
            module.add_arguments(command)
            command.set_defaults(run=module.run)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; return the exit status (2 for a mistake in the arguments)."""
    argv = sys.argv[1:] if argv is None else argv
    args = build_parser(argv).parse_args(argv)
    try:
        args.run(args)
    except UsageError as error:
        print(f"python -m benchmarks {args.command}: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
