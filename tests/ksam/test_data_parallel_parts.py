"""DistributedDataParallel: models wrapped in parts, what is refused, and what is measured."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel

from ksam import KSAM, AutoKSAM
from ksam.measures import alignment, sharpness
from tests import ranks
from tests.device import DEVICE
from tests.helpers import all_same_bits
from tests.ksam.models import batch, loss_of, network, weights

RANKS = 2
OPTIONS: dict[str, Any] = {"lr": 0.1, "momentum": 0.9, "k": 8, "rho": 0.1}

pytestmark = ranks.needs_ranks


class TwoWrapped(nn.Module):
    """A network whose halves are wrapped each."""

    def __init__(self, net: nn.Sequential) -> None:
        super().__init__()
        self.halves = nn.ModuleList(map(DistributedDataParallel, (net[:2], net[2:])))

    def forward(self, x: Tensor) -> Tensor:
        for half in self.halves:
            x = half(x)
        return x


def check_what_is_refused(rank: int) -> None:
    static = DistributedDataParallel(network(), static_graph=True)
    with pytest.raises(ValueError, match="micro_batch_size must be None with static_graph=True"):
        KSAM(static.parameters(), torch.optim.SGD, model=static, micro_batch_size=8, lr=0.1)
    base = ZeroRedundancyOptimizer(
        network().parameters(), optimizer_class=torch.optim.SGD, lr=0.1, momentum=0.9
    )
    with pytest.raises(ValueError, match="got ZeroRedundancyOptimizer, which keeps a part on each"):
        AutoKSAM(None, base)
    mesh = init_device_mesh(DEVICE.type, (1, RANKS), mesh_dim_names=("dp", "tp"))
    parts = parallelize_module(network(), mesh["tp"], {"0": ColwiseParallel()})
    model = DistributedDataParallel(parts, device_mesh=mesh["dp"])
    with pytest.raises(TypeError, match=r"got parameter 0 of its group.* of shape \(8, 8\)"):
        KSAM(model.parameters(), torch.optim.SGD, model=model, lr=0.1)


def check_what_is_told(rank: int) -> None:
    net = network()
    wrapped = DistributedDataParallel(net)

    def told(method: type[Any], model: nn.Module | None) -> list[str]:
        optimizer = method(wrapped.parameters(), torch.optim.SGD, model=model, **OPTIONS)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            for step in range(11):
                optimizer.step(loss_of(wrapped), batch(step))
        return [str(warning.message) for warning in caught]

    assert told(AutoKSAM, wrapped) == told(KSAM, None) == []
    for model in (None, net):
        (message,) = told(AutoKSAM, model)
        assert "pass the DistributedDataParallel module as model=" in message


def check_measurements(rank: int) -> None:
    """They are those of a rank's own batches, also where that rank alone takes them."""
    nets = [network(batchnorm=True) for _ in range(3)]
    found = []
    for net, model in zip(
        nets, (nets[0], DistributedDataParallel(nets[1]), TwoWrapped(nets[2])), strict=True
    ):
        optimizer = KSAM(model.parameters(), torch.optim.SGD, model=model, **OPTIONS)
        before = [buffer.clone() for buffer in net.buffers()]
        if rank == 0:
            angle = alignment(optimizer, loss_of(model), batch(rank), 8)
            found.append((float(angle), sharpness(model, loss_of(model), [batch(rank)], rho=0.1)))
        assert all_same_bits([*net.buffers()], before)
    assert found == found[:1] * len(found)


def _train_two_wrapped(rank: int, wraps_halves: bool) -> list[Tensor]:
    """Two calls of micro-batches each, of which the first averages nothing."""
    net = network()
    model = TwoWrapped(net) if wraps_halves else DistributedDataParallel(net)
    wrapped = model.halves if isinstance(model, TwoWrapped) else [model]
    optimizer = KSAM(
        model.parameters(), torch.optim.SGD, model=model, micro_batch_size=5, **OPTIONS
    )
    for step in range(3):
        optimizer.zero_grad()
        for call in (2 * step, 2 * step + 1):
            with ExitStack() as stack:
                for each in wrapped if call == 2 * step else []:
                    stack.enter_context(each.no_sync())
                optimizer.backward(loss_of(model), batch(RANKS * call + rank), weight=0.5)
        optimizer.step()
    return weights(net)


def check_training(rank: int) -> None:
    """Modules that are wrapped each are trained as one that is wrapped as a whole."""
    whole, halves = (_train_two_wrapped(rank, wraps_halves) for wraps_halves in (False, True))
    for a, b in zip(whole, halves, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(
    "check", [check_what_is_refused, check_what_is_told, check_measurements, check_training]
)
def test_in_two_processes(check: Callable[[int], None], tmp_path: Path) -> None:
    ranks.run(check, RANKS, tmp_path)
