"""Functions run by several processes at once, the ranks of a process group on the CPU."""

from __future__ import annotations

import datetime
import faulthandler
import os
import signal
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed
import torch.multiprocessing
from torch import Tensor
from torch.multiprocessing.spawn import ProcessException

from tests import forks
from tests.device import DEVICE

needs_ranks = pytest.mark.skipif(
    not torch.distributed.is_available() or DEVICE.type != "cpu",
    reason="needs torch.distributed, and its gloo for tensors on the CPU",
)


_STACKS = "stacks of rank "  # a file's name


def _start(
    rank: int,
    ranks: int,
    folder: Path,
    patience: float,
    function: Callable[..., None],
    arguments: tuple[Any, ...],
) -> None:
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"  # a machine without a network may not know its own name
    torch.distributed.init_process_group(
        "gloo",
        init_method=f"file://{folder / 'store'}",
        rank=rank,
        world_size=ranks,
        timeout=datetime.timedelta(seconds=60),  # of this group; a mesh makes others
    )
    with open(folder / f"{_STACKS}{rank}", "w") as stacks:
        faulthandler.register(signal.SIGTERM, stacks, chain=True)  # sent where another rank failed
        faulthandler.dump_traceback_later(patience, exit=True, file=stacks)
        try:
            function(rank, *arguments)
            torch.distributed.destroy_process_group()
        finally:
            faulthandler.cancel_dump_traceback_later()
            faulthandler.unregister(signal.SIGTERM)


def run(
    function: Callable[..., None],
    ranks: int,
    folder: Path,
    *arguments: Any,
    patience: float = 300,
) -> None:
    """``function(rank, *arguments)`` in as many processes; raises what one of them raises, and says
    what the others did then.

    Args:
        folder: an empty one.
        patience: seconds until ranks are taken to wait in vain; the default is many times what the
            slowest test takes.
    """
    forks.context()  # tells the server what to import
    try:
        torch.multiprocessing.start_processes(
            _start,
            (ranks, folder, patience, function, arguments),
            nprocs=ranks,
            start_method="forkserver",
        )
    except ProcessException:
        for path in sorted(folder.glob(f"{_STACKS}*")):
            print(path.name, path.read_text(), sep="\n", file=sys.stderr)
        raise


def put_together(tensors: Iterable[Tensor]) -> list[Tensor]:
    """Every DTensor as a whole tensor; the other tensors as they are."""
    return [t.full_tensor() if hasattr(t, "full_tensor") else t for t in tensors]
