"""Processes that start without delay: forks of one that has imported what takes seconds.

As after a spawn, a process begins with none of the tests' modules imported, and what it is given
goes through pickle.
"""

from __future__ import annotations

import multiprocessing
from multiprocessing.context import ForkServerContext

#: None of these starts a thread, which a fork would lack, or reads the environment of a test.
#: What is not installed is left out.
_IMPORTED = ("torch", "torch._dynamo", "torch.distributed.fsdp", "sklearn.datasets")


def context() -> ForkServerContext:
    """To use in place of ``multiprocessing.get_context("spawn")``."""
    found = multiprocessing.get_context("forkserver")
    found.set_forkserver_preload(list(_IMPORTED))
    return found
