"""A launch that fails after others leaves the weights as they were. Nothing is launched here."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from ksam_kernels.perturb import triton as launches
from ksam_kernels.perturb.triton_table import Table


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_what_was_launched_is_undone(
    monkeypatch: pytest.MonkeyPatch, error: type[BaseException]
) -> None:
    w = [torch.ones(3), torch.ones(4, dtype=torch.float64), torch.ones(5, dtype=torch.float16)]
    g = [torch.ones_like(t) for t in w]
    backup = [torch.full_like(t, float("nan")) for t in w]

    def launch(kernel: Any, table: Table, *args: Any, **constants: Any) -> None:
        """The kernel's work on all rows of a table, but for the last table."""
        if table.dtypes[0] == torch.float16:
            raise error
        for p, b in zip(w, backup, strict=True):
            if p.dtype == table.dtypes[0]:
                b.copy_(p)
                p.add_(1)

    def norms(*args: Any) -> tuple[Tensor, Tensor]:
        return torch.ones(()), torch.ones((), dtype=torch.float64)

    monkeypatch.setattr(launches, "_launch", launch)
    monkeypatch.setattr(launches, "_norms", norms)
    with pytest.raises(error):
        launches.perturb_(w, g, backup, [0.1] * 3, False, 0.0)
    assert all((t == 1).all() for t in w)
    assert backup[2].isnan().all()
