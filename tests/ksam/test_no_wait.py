"""No step of the family waits for the device. On a GPU a wait is an error; the CPU has none."""

from __future__ import annotations

import pytest
import torch
from torch.amp import GradScaler

from benchmarks.gpu.sync import waiting_is_an_error
from ksam import Diagnostics, Representative, cross_entropy
from tests.device import DEVICE
from tests.ksam.models import NAMES, build, data_of, network


@pytest.mark.parametrize(
    ("name", "watched", "scaled"),
    [
        *((name, False, False) for name in NAMES),
        *((name, True, False) for name in NAMES),
        ("KSAM", False, True),
        ("MSAM", False, True),
    ],
)
def test_steps_do_not_wait(backend: str, name: str, watched: bool, scaled: bool) -> None:
    model = network(batchnorm=True)
    policy = Representative(threshold=0.0, every=2, budget=None)
    scaler = GradScaler(DEVICE.type, enabled=scaled)
    optimizer = build(name, model, grad_scaler=scaler, when=policy if watched else None)
    diagnostics = Diagnostics(optimizer, every=1000, dataset_size=48)
    optimizer.report_share = watched
    batches = [{**data_of(i), "x": data_of(i)["x"].float()} for i in range(6)]

    def loss(b: dict[str, torch.Tensor]) -> torch.Tensor:
        return cross_entropy(model(b["x"]), b["y"])

    for data in batches:  # buffers, tables and kernels come into being
        diagnostics(optimizer.step(loss, data), loss, data)
        scaler.update()
    for data in batches:
        with waiting_is_an_error(DEVICE):
            result = optimizer.step(loss, data)
            diagnostics(result, loss, data)
            scaler.update()
        assert result.sharp
