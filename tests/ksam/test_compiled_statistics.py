"""BatchNorm in models that are compiled: as without, in as few programs as there can be."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ksam import KSAM, cross_entropy
from ksam.arguments import STATISTICS
from tests.helpers import all_same_bits
from tests.ksam.models import batch, loss_of, network, weights


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear, self.norm = nn.Linear(8, 8), nn.BatchNorm1d(8)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.norm(self.linear(x)).tanh()


@pytest.mark.parametrize("statistics", STATISTICS)
def test_blocks_that_are_alike_share_their_programs(statistics: str) -> None:
    """More of them than programs that torch.compile makes of a function."""
    torch.manual_seed(0)
    model = nn.Sequential(*(Block() for _ in range(10)), nn.Linear(8, 5)).double()
    twin = copy.deepcopy(model)
    torch._dynamo.reset()
    for block in model[:10]:
        block.compile(backend="eager", fullgraph=True)
    optimizer, other = (
        KSAM(m.parameters(), torch.optim.SGD, lr=0.1, k=8, model=m, statistics=statistics)
        for m in (model, twin)
    )
    for step in range(3):
        optimizer.step(loss_of(model), batch(step, dtype=torch.float64))
        other.step(loss_of(twin), batch(step, dtype=torch.float64))
    assert all_same_bits([*weights(model), *model.buffers()], [*weights(twin), *twin.buffers()])


def test_matching_is_compiled_once() -> None:
    """A pass without gradients, the ascent and the descent: three programs, whatever the steps."""
    model = network(batchnorm=True)
    twin = copy.deepcopy(model)
    torch._dynamo.reset()
    programs: list[object] = []

    def compiler(program: torch.fx.GraphModule, _: object) -> Any:
        programs.append(program)
        return program.forward

    compiled = torch.compile(twin, backend=compiler)
    for m, forward in ((model, model), (twin, compiled)):
        optimizer = KSAM(
            m.parameters(), torch.optim.SGD, lr=0.1, k=8, model=m, statistics="matched"
        )
        for step in range(4):
            optimizer.step(lambda b, f=forward: cross_entropy(f(b["x"]), b["y"]), batch(step))
    assert len(programs) == 3
    assert all_same_bits(weights(model), weights(twin))
