"""Contract tests that Triton's interpreter cannot pass or would take minutes for, and why.

The summary of a run says how many of them it left out.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

LARGE = "its programs take 1 to 4 ms each"
STEPS = "hundreds of steps, 0.2 s each"

#: Room -> pattern of test ids, looked for after the backend's name is cut out -> reason.
LEFT_OUT: dict[str, Mapping[str, str]] = {
    "loss": {"the_number_of_threads|bit_for_bit.*-1000-|narrow_sample": LARGE},
    "topk": {},
    "compact": {"any_number_of_threads": LARGE},
    "ksam": {"is_unbiased|recorded_change|budget_is_kept": STEPS},
    "perturb": {"large|hundreds.*one dtype|any_number_of_threads": LARGE},
}


def why(node_id: str) -> str | None:
    """Why the interpreter does not run a test, given as tests/room/file.py::name[parameters]."""
    for room, patterns in LEFT_OUT.items():
        if node_id.startswith(f"tests/{room}/"):
            for pattern, reason in patterns.items():
                if re.search(pattern, node_id):
                    return reason
    return None
