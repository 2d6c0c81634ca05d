"""Processes that start at once: forks of one that has imported what takes seconds.

As after a spawn, a process begins with the modules of the tests as yet to be imported, and what it
is given goes through pickle.
"""

from __future__ import annotations

import multiprocessing
from multiprocessing.context import ForkServerContext

#: None starts a thread, which would not be there in a fork, or reads the environment of a test.
#: What is not installed is left out.
_IMPORTED = ("torch", "torch._dynamo", "torch.distributed.fsdp", "sklearn.datasets")


def context() -> ForkServerContext:
    """For ``multiprocessing.get_context("spawn")``."""
    found = multiprocessing.get_context("forkserver")
    found.set_forkserver_preload(list(_IMPORTED))
    return found
