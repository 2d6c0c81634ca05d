"""Selection by tables: what they hold of a sample, and how long they keep it."""

from __future__ import annotations

import copy
import types
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from ksam.parts import Subset
from ksam.tables import SharpnessSample, StaleTopK
from tests.helpers import all_same_bits, default_dtype
from tests.ksam import plain
from tests.ksam.models import (
    SIZE,
    STEPS,
    batch,
    build,
    data_of,
    losses,
    network,
    scaler,
    weights,
)

TABLES = ("StaleKSAM", "AUSAM")


def rows_from(first: int, size: int) -> dict[str, Tensor]:
    return {**batch(first, size, torch.float64), "index": torch.arange(first, first + size)}


def test_stale_selection_takes_the_highest_known_losses(backend: str) -> None:
    model = network(dtype=torch.float64)
    optimizer = build("StaleKSAM", model, refresh=100)
    known = torch.full((SIZE,), float("inf"))
    for step in range(STEPS):
        data = data_of(step)
        now = losses(model)(data).detach().float()
        expected = plain.largest(now if step == 0 else known[data["index"]], 8)
        result = optimizer.step(losses(model), data)
        assert torch.equal(result.indices, expected)
        if step == 0:
            known[data["index"]] = now
        else:
            known[data["index"][expected]] = now[expected]


def test_ausam_draws_by_recorded_change(backend: str) -> None:
    """The first epoch, two steps, is SAM; then high scores are drawn more often."""
    model = network(dtype=torch.float64)
    optimizer = build("AUSAM", model, ramp=1, low=0.001, high=1.0, lr=0.0)
    sizes = [len(optimizer.step(losses(model), data_of(step)).indices) for step in range(2)]
    assert sizes == [24, 24]
    table: Any = optimizer.ascent
    score = table.column("total") / table.column("count")
    count = torch.zeros(SIZE)
    for step in range(400):
        data = data_of(step)
        count[data["index"][optimizer.step(losses(model), data).indices]] += 1
    for half in (slice(0, 24), slice(24, 48)):
        assert torch.corrcoef(torch.stack([score[half], count[half]]))[0, 1] > 0.7


@pytest.mark.parametrize("size", [1, 2])
def test_ausam_draws_with_its_probabilities(size: int) -> None:
    """Without replacement: the second sample as if the first were not in the batch."""
    table = SharpnessSample(size, SIZE, "index", low=0.02, high=1.0, ramp=1)
    table.column("total").copy_(torch.arange(SIZE) % 5)
    table.column("count").fill_(1)
    passes: Any = types.SimpleNamespace(
        batch=data_of(0), samples=24, step=2, random=lambda: torch.rand(24), select=lambda i: i
    )
    n = 5000
    counts = torch.zeros(24)
    for _ in range(n):
        counts[table.choose(passes)] += 1
    p = table.probabilities(passes)
    assert float(p.max() / p.min()) == pytest.approx(50)
    if size == 2:
        other_first = p / (1 - p)
        p = p + p * (other_first.sum() - other_first)
    assert ((counts - n * p).abs() < 4 * (n * p * (1 - p)).sqrt()).all()


def test_ausams_epochs_end_with_a_smaller_batch() -> None:
    """48 samples in batches of 20, 20 and 8: three steps are an epoch."""
    optimizer = build("AUSAM", network(dtype=torch.float64), alpha=0.5)
    sizes = []
    for first, size in [(0, 20), (20, 20), (40, 8)] * 2:
        loss = losses(optimizer.model)  # type: ignore[arg-type]
        sizes.append(len(optimizer.step(loss, rows_from(first, size)).indices))
    assert sizes == [20, 20, 8, 10, 10, 4]


@pytest.mark.parametrize("name", TABLES)
def test_indices_may_be_int32(backend: str, name: str) -> None:
    found = []
    for dtype in (torch.int64, torch.int32):
        model = network(dtype=torch.float64)
        optimizer = build(name, model)
        for step in range(4):
            data = data_of(step)
            optimizer.step(losses(model), {**data, "index": data["index"].to(dtype)})
        found.append(weights(model))
    assert all_same_bits(*found)


@pytest.mark.parametrize("name", TABLES)
def test_a_loaded_table_is_a_copy(backend: str, name: str) -> None:
    model = network(dtype=torch.float64)
    first, second = build(name, model), build(name, model)
    first.step(losses(model), data_of(0))
    table: Any = first.ascent
    before = {column: table.column(column).clone() for column in table.COLUMNS}
    second.load_state_dict(first.state_dict())
    second.step(losses(model), data_of(1))
    for column, expected in before.items():
        assert torch.equal(table.column(column), expected)
        assert not torch.equal(second.ascent.column(column), expected)  # type: ignore[union-attr]


@pytest.mark.parametrize("name", TABLES)
def test_there_is_no_share_where_no_pass_saw_the_batch(backend: str, name: str) -> None:
    optimizer = build(name, network(dtype=torch.float64))
    optimizer.report_share = True
    optimizer.steps_done = 5  # neither a refresh nor in the first epoch
    result = optimizer.step(losses(optimizer.model), data_of(0))  # type: ignore[arg-type]
    assert result.share is None


def test_without_a_share_the_scale_is_that_of_the_batch(backend: str) -> None:
    grads = []
    for scale in ("batch", "share"):
        model = network(dtype=torch.float64)
        optimizer = build("StaleKSAM", model, scale=scale)
        optimizer.steps_done = 1
        optimizer.step(losses(model), data_of(0))
        grads.append([p.grad for p in model.parameters()])
    assert all_same_bits(*grads)  # type: ignore[arg-type]


def test_ausams_probabilities_spread_over_the_epochs() -> None:
    optimizer = build("AUSAM", network(), ramp=4, low=0.1, high=0.5)
    table: Any = optimizer.ascent

    def probabilities(epoch: int) -> Tensor:
        passes = types.SimpleNamespace(batch=data_of(0), samples=24, step=2 * epoch)
        return table.probabilities(passes)

    unknown = probabilities(1)
    torch.testing.assert_close(unknown, torch.full_like(unknown, 1 / 24))
    table.column("total")[:24] = torch.arange(24.0)
    table.column("count")[:24] = 1
    for epoch, top in ((1, 0.2), (2, 0.3), (4, 0.5), (9, 0.5)):
        p = probabilities(epoch)
        assert float(p.max() / p.min()) == pytest.approx(top / 0.1)
        assert float(p.sum()) == pytest.approx(1)


def test_a_loss_that_falls_has_changed_too(backend: str) -> None:
    model = network(dtype=torch.float64)
    optimizer = build("AUSAM", model)
    factors = iter((1.0, 0.25))
    optimizer.step(lambda b: losses(model)(b) * next(factors), data_of(0))
    table: Any = optimizer.ascent
    assert (table.column("total")[:24] > 0).all()


@pytest.mark.parametrize("factor", [float("inf"), float("nan")])
def test_losses_that_are_not_finite_leave_no_trace(backend: str, factor: float) -> None:
    """As in a step that a GradScaler skips: they would be in every mean from then on."""
    optimizer = build("AUSAM", network(dtype=torch.float64), grad_scaler=scaler())
    table: Any = optimizer.ascent
    function = losses(optimizer.model)  # type: ignore[arg-type]
    optimizer.step(function, data_of(0))
    before = copy.deepcopy(table.state_dict())
    optimizer.grad_scaler.update()  # type: ignore[union-attr]
    factors = iter((1.0, factor))  # of both passes, an infinite change would be NaN
    optimizer.step(lambda b: function(b) * next(factors), data_of(0))
    assert torch.equal(table.column("total"), before["total"])
    assert torch.equal(table.column("count"), before["count"])


def test_the_length_of_an_epoch_survives_a_resume(backend: str) -> None:
    """Also where the first batch after it is a smaller one."""
    optimizer = build("AUSAM", network(dtype=torch.float64), alpha=0.5)
    for first in (0, 20):
        optimizer.step(losses(optimizer.model), rows_from(first, 20))  # type: ignore[arg-type]
    resumed = build("AUSAM", network(dtype=torch.float64), alpha=0.5)
    resumed.load_state_dict(optimizer.state_dict())
    assert resumed.num_selected(8, 3) == optimizer.num_selected(8, 3) == 4
    sizes = [
        len(resumed.step(losses(resumed.model), rows_from(40, 8)).indices)  # type: ignore[arg-type]
        for _ in range(2)
    ]
    assert sizes == [8, 4]


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", TABLES)
def test_figures_are_float32_whatever_torchs_default_is(
    backend: str, name: str, dtype: torch.dtype
) -> None:
    with default_dtype(dtype):
        model = network(dtype=torch.float64)
        optimizer = build(name, model)
        for step in range(4):
            optimizer.step(losses(model), data_of(step))
    table: Any = optimizer.ascent
    assert {table.column(column).dtype for column in table.COLUMNS} == {torch.float32}


@pytest.mark.parametrize("selected", ["cpu", "cuda"])
@pytest.mark.parametrize("seen", [24, 8])
def test_the_batch_may_be_on_another_device_than_the_losses(selected: str, seen: int) -> None:
    """On the CPU, from where the function moves it to the model."""
    with FakeTensorMode():
        passes = types.SimpleNamespace(
            batch={"index": torch.arange(24, device="cpu")},
            samples=24,
            step=101,
            subset=Subset(None, 8, torch.arange(8, device=selected)),
            losses=torch.ones(seen, device="cuda"),
            knows_the_batch=seen == 24,
            before=torch.ones(8, device="cuda"),
            after=torch.ones(8, device="cuda"),
            random=lambda: torch.ones(24, device="cuda"),
            select=lambda indices: indices,
        )
        for table in (StaleTopK(8, SIZE, "index"), SharpnessSample(8, SIZE, "index")):
            part: Any = table
            part.observe(passes)
            assert part.choose(passes).shape == (8,)
            assert {part.column(name).device.type for name in part.COLUMNS} == {"cpu"}


def test_a_table_that_was_loaded_on_the_cpu_moves_before_a_stale_selection() -> None:
    index = torch.arange(24, device="meta")
    passes: Any = types.SimpleNamespace(
        batch={"index": index}, samples=24, step=101, select=lambda indices: indices
    )
    assert StaleTopK(8, SIZE, "index").choose(passes).device == index.device


@pytest.mark.parametrize(("name", "other"), [TABLES, TABLES[::-1]])
def test_the_table_of_another_method_is_refused(name: str, other: str) -> None:
    model = network(dtype=torch.float64)
    optimizer = build(name, model)
    optimizer.step(losses(model), data_of(0))
    before = copy.deepcopy(optimizer.state_dict()["ksam"]["ascent"])
    with pytest.raises(ValueError, match=r"state_dict must hold .* for \w+, got .* another method"):
        optimizer.load_state_dict(build(other, network()).state_dict())
    after = optimizer.state_dict()["ksam"]["ascent"]
    columns = [name for name, value in before.items() if isinstance(value, Tensor)]
    assert columns
    assert all_same_bits([after[name] for name in columns], [before[name] for name in columns])


@pytest.mark.parametrize("name", TABLES)
def test_a_table_made_under_another_default_device_is_on_the_cpu(backend: str, name: str) -> None:
    model = network(dtype=torch.float64)
    with torch.device("meta"):
        optimizer = build(name, model)
    assert optimizer.step(losses(model), data_of(0)).loss.isfinite()
