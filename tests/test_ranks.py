"""Ranks that fail say where all of them were."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import torch.distributed
from torch.multiprocessing.spawn import ProcessExitedException, ProcessRaisedException

from tests import ranks

pytestmark = ranks.needs_ranks


def wait_for_each_other(rank: int) -> None:
    if rank == 0:
        torch.distributed.barrier()
    else:
        time.sleep(100)


def fail_alone(rank: int) -> None:
    torch.distributed.barrier()  # both are here
    if rank == 0:
        time.sleep(100)
    else:
        raise ArithmeticError("one has failed")


def test_ranks_do_not_wait_for_ever(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ProcessExitedException):
        ranks.run(wait_for_each_other, 2, tmp_path, patience=1)
    assert "in wait_for_each_other" in capsys.readouterr().err


def test_a_rank_that_fails_ends_the_others(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(ProcessRaisedException, match="one has failed"):
        ranks.run(fail_alone, 2, tmp_path)
    assert "in fail_alone" in capsys.readouterr().err
