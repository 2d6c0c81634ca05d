"""Arguments on command lines: numbers in a range, lists of names, folders."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from benchmarks.errors import UsageError


def number(
    convert: Callable[[str], float], valid: Callable[[float], bool], expected: str
) -> Callable[[str], float]:
    """Return an argparse type that converts a string and checks the value."""

    def parse(text: str) -> float:
        try:
            value = convert(text)
        except ValueError:
            value = None
        if value is None or not valid(value):
            raise argparse.ArgumentTypeError(f"{text!r} is not {expected}")
        return value

    return parse


positive_int = number(int, lambda n: n >= 1, "a count >= 1")
positive_float = number(float, lambda x: 0 < x < float("inf"), "a positive number")
non_negative_float = number(float, lambda x: 0 <= x < float("inf"), "a number >= 0")
share = number(float, lambda x: 0 <= x <= 1, "a number in [0, 1]")


def some_of(known: Collection[str]) -> Callable[[str], tuple[str, ...]]:
    """Return an argparse type for "a,b": names of `known`, in the order given, without repeats."""

    def parse(text: str) -> tuple[str, ...]:
        names = tuple(dict.fromkeys(name.strip() for name in text.split(",") if name.strip()))
        if not names or not set(names) <= set(known):
            raise argparse.ArgumentTypeError(
                f"{text!r}: expected a comma-separated list of {', '.join(known)}"
            )
        return names

    return parse


@contextmanager
def results_folder(path: Path, stale: Sequence[str] = ()) -> Iterator[None]:
    """Make the folder for results, and keep other runs out of it within the block.

    Args:
        stale: patterns of files that an earlier run may have left beside the rows that this one
            writes over; these files are deleted first.

    Raises:
        UsageError: it cannot be made or written to, or another run is writing there.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"{path}: cannot create the folder: {error}") from error
    if not os.access(path, os.W_OK | os.X_OK):
        raise UsageError(f"{path}: cannot write to the folder")
    with _locked(path):
        for left in [left for pattern in stale for left in path.glob(pattern)]:
            left.unlink()
        yield


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    try:
        import fcntl
    except ImportError:  # Windows locks no folders
        yield
        return
    folder = os.open(path, os.O_RDONLY)
    try:
        try:
            fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UsageError(f"--out {path}: another run is writing to this folder") from error
        yield
    finally:
        os.close(folder)
