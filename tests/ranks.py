"""Functions run by several processes at once, the ranks of a process group on the CPU."""

from __future__ import annotations

import datetime
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed
import torch.multiprocessing
from torch import Tensor

from tests import forks
from tests.device import DEVICE

needs_ranks = pytest.mark.skipif(
    not torch.distributed.is_available() or DEVICE.type != "cpu",
    reason="needs torch.distributed, and its gloo for tensors on the CPU",
)


def _start(
    rank: int, ranks: int, folder: Path, function: Callable[..., None], arguments: tuple[Any, ...]
) -> None:
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"  # a machine without a network may not know its own name
    torch.distributed.init_process_group(
        "gloo",
        init_method=f"file://{folder / 'store'}",
        rank=rank,
        world_size=ranks,
        timeout=datetime.timedelta(seconds=60),
    )
    function(rank, *arguments)
    torch.distributed.destroy_process_group()


def run(function: Callable[..., None], ranks: int, folder: Path, *arguments: Any) -> None:
    """``function(rank, *arguments)`` in as many processes; raises what one of them raises.

    Args:
        folder: an empty one.
    """
    forks.context()  # tells the server what to import
    torch.multiprocessing.start_processes(
        _start, (ranks, folder, function, arguments), nprocs=ranks, start_method="forkserver"
    )


def put_together(tensors: Iterable[Tensor]) -> list[Tensor]:
    """The whole of every DTensor; the other tensors."""
    return [t.full_tensor() if hasattr(t, "full_tensor") else t for t in tensors]
