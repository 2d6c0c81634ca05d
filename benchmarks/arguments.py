"""Numbers on command lines: argparse types that check their range."""

from __future__ import annotations

import argparse
from collections.abc import Callable


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
