"""A launch that fails after others leaves the weights as they were. Nothing is launched here."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from ksam_kernels.perturb import triton as launches
from ksam_kernels.perturb import triton_table
from ksam_kernels.perturb.scalars import DeviceScalars
from ksam_kernels.perturb.triton_table import Table
from ksam_kernels.triton_support import most_warps


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_what_was_launched_is_undone(
    monkeypatch: pytest.MonkeyPatch, error: type[BaseException]
) -> None:
    w = [torch.ones(3), torch.ones(4, dtype=torch.float64), torch.ones(5, dtype=torch.float16)]
    g = [torch.ones_like(t) for t in w]
    backup = [torch.full_like(t, float("nan")) for t in w]

    def launch(kernel: Any, table: Table, *args: Any, **constants: Any) -> None:
        """The kernel's work on all rows of a table; the last table's launch fails."""
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


def test_weights_that_were_copied_back_are_undone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Operands with gaps are worked on in copies, whose way back may be interrupted."""
    w, backup = torch.ones(4, 2)[:, 0], torch.full((4, 2), float("nan"))[:, 0]
    copied: list[Tensor] = []

    def launch(kernel: Any, table: Table, *args: Any, **constants: Any) -> None:
        (p, _, b) = rows[0].tensors(table)[0]
        b.copy_(p)
        p.add_(1)

    class Remembered(triton_table.Rows):
        def __init__(self, *args: Any, **options: Any) -> None:
            super().__init__(*args, **options)
            rows.append(self)

    def copy_bits(to: Tensor, source: Tensor) -> None:
        original(to, source)
        if to is w and (w == 2).all():
            copied.append(to)
            raise KeyboardInterrupt

    rows: list[triton_table.Rows] = []
    original = triton_table._copy_bits
    monkeypatch.setattr(launches, "_launch", launch)
    monkeypatch.setattr(launches, "_norms", lambda *args: (torch.ones(()), torch.ones(())))
    monkeypatch.setattr(launches, "Rows", Remembered)
    monkeypatch.setattr(triton_table, "_copy_bits", copy_bits)
    with pytest.raises(KeyboardInterrupt):
        launches.perturb_([w], [torch.ones(4)], [backup], [0.1], False, 0.0)
    assert copied
    assert (w == 1).all()
    assert (backup == 1).all()


@pytest.mark.parametrize("message", ["Triton Error [CUDA]: out of memory", "something else"])
def test_weights_come_back_where_the_kernel_cannot_be_loaded(
    monkeypatch: pytest.MonkeyPatch, message: str
) -> None:
    """After a step that failed for want of memory, whose activations may still be held."""

    def launch(*args: Any, **constants: Any) -> None:
        raise RuntimeError(message)

    backup = [torch.ones(3), torch.ones(4, dtype=torch.float64)]
    params = [torch.zeros_like(b) for b in backup]
    monkeypatch.setattr(launches, "_launch", launch)
    if "memory" in message:
        launches.restore_(params, backup)
        assert all((p == 1).all() for p in params)
    else:
        with pytest.raises(RuntimeError, match=message):
            launches.restore_(params, backup)


@pytest.mark.parametrize("operator", ["restore_sgd_", "restore_adam_"])
@pytest.mark.parametrize(
    ("place", "taken_for"),
    [(launches, "device_ints"), (DeviceScalars, "to")],
    ids=["table", "scalar"],
)
def test_an_update_takes_all_its_memory_before_its_first_launch(
    monkeypatch: pytest.MonkeyPatch, operator: str, place: Any, taken_for: str
) -> None:
    """Nothing undoes momentum that has moved beside a count of steps that has not."""
    scalars = (None, torch.ones(()), None)
    lists = [[torch.ones(3)] for _ in range(5 if operator == "restore_adam_" else 4)]
    numbers = [0.1] * (5 if operator == "restore_adam_" else 4)

    def no_memory(*args: Any) -> None:
        raise torch.OutOfMemoryError("for a test")

    def launch(*args: Any, **constants: Any) -> None:
        raise AssertionError("launched")

    monkeypatch.setattr(place, taken_for, no_memory)
    monkeypatch.setattr(launches, "_launch", launch)
    with pytest.raises(torch.OutOfMemoryError, match="for a test"):
        getattr(launches, operator)(*lists, [torch.ones(())], *numbers, False, True, *scalars)


@pytest.mark.parametrize(("width", "warps"), [(32, 32), (64, 16)])
def test_a_program_has_no_more_than_1024_threads(
    monkeypatch: pytest.MonkeyPatch, width: int, warps: int
) -> None:
    device = torch.device("cuda", 60 + width // 32)  # one each, as the answer is kept

    class Properties:
        warp_size = width

    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: Properties)
    assert most_warps(device) == warps
