"""Arguments on command lines: numbers in a range, lists of names, folders."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Collection
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


def make_folder(path: Path) -> None:
    """Make the folder for results, or say why not."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"{path}: cannot make the folder: {error}") from error
