"""Diagnostics: what they report, what they leave alone, and where they write."""

from __future__ import annotations

import math
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

import ksam
from ksam import KSAM, CSVWriter, Diagnostics, EveryNth, Representative, TensorBoardWriter, plot
from tests.helpers import all_same_bits, read_rows
from tests.ksam.models import batch, loss_of, network, weights


def run(
    optimizer: Any, diagnostics: Diagnostics, model: nn.Module, steps: int
) -> list[ksam.StepResult]:
    results = []
    for step in range(steps):
        data = {**batch(step % 2), "index": torch.arange(24) + 24 * (step % 2)}
        results.append(optimizer.step(loss_of(model), data))
        diagnostics(results[-1], loss_of(model), data)
    return results


def test_rows_describe_the_steps_between_them(backend: str) -> None:
    model = network()
    optimizer = KSAM(model.parameters(), torch.optim.SGD, lr=0.1, k=12, when=EveryNth(4))
    written: list[dict[str, float]] = []
    diagnostics = Diagnostics(optimizer, writers=[written.append], every=6)
    results = run(optimizer, diagnostics, model, 14)
    assert diagnostics.rows == written
    assert [row["step"] for row in written] == [5, 11]
    assert [row["sharp"] for row in written] == [2 / 6, 1 / 6]  # steps 0, 4 and 8
    for row, part in zip(written, (results[:6], results[6:12]), strict=True):
        assert row["loss"] == float(part[-1].loss)
        sharp = sum(result.sharp for result in part)
        assert row["cost"] == pytest.approx((sharp * 4 / 3 + 6 - sharp) / 6)
        shares = [float(result.share) for result in part]
        assert row["share"] == pytest.approx(sum(shares) / 6)
        assert 0.5 < row["share"] < 1


def test_a_writer_that_fails_loses_one_row(backend: str) -> None:
    model = network()
    optimizer = KSAM(model.parameters(), torch.optim.SGD, lr=0.1, k=12)
    written: list[dict[str, float]] = []

    def write(row: dict[str, float]) -> None:
        if row["step"] == 1:
            raise OSError("no space left")
        written.append(row)

    diagnostics = Diagnostics(optimizer, writers=[write], every=2)
    with pytest.raises(OSError, match="no space left"):
        run(optimizer, diagnostics, model, 2)
    (result,) = run(optimizer, diagnostics, model, 1)
    (last,) = run(optimizer, diagnostics, model, 1)
    (row,) = written
    assert row["step"] == 3
    both = torch.stack([r.share for r in (result, last) if r.share is not None])
    assert row["share"] == pytest.approx(float(both.mean()))


def test_samples_that_cannot_be_counted_delay_the_row(backend: str) -> None:
    model = network()
    optimizer = KSAM(model.parameters(), torch.optim.SGD, lr=0.1, k=12)
    diagnostics = Diagnostics(optimizer, every=1, dataset_size=24)
    with pytest.raises(IndexError, match="holds 47"):
        run(optimizer, diagnostics, model, 2)
    run(optimizer, diagnostics, model, 1)
    assert [row["step"] for row in diagnostics.rows] == [0, 2]


def test_shares_of_every_step_leave_the_policy_alone(backend: str) -> None:
    decided = []
    for watched in (False, True):
        model = network()
        policy = Representative(threshold=0.354, every=3)
        optimizer = KSAM(model.parameters(), torch.optim.SGD, lr=0.5, k=8, when=policy)
        if watched:
            Diagnostics(optimizer)
        decided.append([optimizer.step(loss_of(model), batch(i)).sharp for i in range(40)])
    assert decided[0] == decided[1]
    assert 0 < sum(decided[0]) < 40


@pytest.mark.parametrize("sharp", [True, False])
def test_rows_have_the_alignment_of_a_selection(backend: str, sharp: bool) -> None:
    """Of a plain step too, which selects none itself."""
    model = network()
    optimizer = KSAM(model.parameters(), torch.optim.SGD, lr=0.1, k=8, when=lambda step: sharp)
    diagnostics = Diagnostics(optimizer, every=2)
    run(optimizer, diagnostics, model, 2)
    expected = ksam.alignment(optimizer, loss_of(model), batch(1), 8)
    assert diagnostics.rows[0]["alignment"] == pytest.approx(float(expected))


def test_no_selection_has_no_alignment(backend: str) -> None:
    model = network()
    optimizer = ksam.MSAM(model.parameters(), torch.optim.SGD, lr=0.1, momentum=0.9)
    diagnostics = Diagnostics(optimizer, every=1)
    run(optimizer, diagnostics, model, 1)
    assert math.isnan(diagnostics.rows[0]["alignment"])


@pytest.mark.parametrize("measured", ["alignment", "sharpness"])
def test_what_is_measured_takes_no_random_numbers_from_the_run(backend: str, measured: str) -> None:
    """Neither for dropout nor for the order of batches."""

    def run(measures: bool) -> list[Tensor]:
        torch.manual_seed(0)
        model = nn.Sequential(network(), nn.Dropout(), nn.Linear(5, 5))
        optimizer = KSAM(model.parameters(), torch.optim.SGD, lr=0.1, k=8)
        every = 1 if measures and measured == "alignment" else 100
        diagnostics = Diagnostics(optimizer, every=every)
        for step in range(3):
            diagnostics(optimizer.step(loss_of(model), batch(step)), loss_of(model), batch(step))
            if measures and measured == "sharpness":
                shuffled = DataLoader([batch(0), batch(1)], batch_size=None, shuffle=True)
                ksam.sharpness(model, loss_of(model), shuffled, rho=0.5)
        return [*weights(model), torch.rand(3)]

    assert all_same_bits(run(True), run(False))


def test_selections_are_counted_by_sample(backend: str, tmp_path: Path) -> None:
    model = network()
    optimizer = KSAM(model.parameters(), torch.optim.SGD, lr=0.1, k=8, when=EveryNth(3))
    diagnostics = Diagnostics(optimizer, dataset_size=50, measure_alignment=False, every=3)
    results = run(optimizer, diagnostics, model, 9)
    expected = torch.zeros(50, dtype=torch.int64)
    for step in (0, 3, 6):
        expected[results[step].indices + 24 * (step % 2)] += 1
    assert torch.equal(diagnostics.selected, expected)
    assert diagnostics.seen.tolist() == [5] * 24 + [4] * 24 + [0] * 2
    assert math.isnan(diagnostics.rows[0]["alignment"])
    diagnostics.save_counts(tmp_path / "counts.csv")
    rows = read_rows(tmp_path / "counts.csv")
    assert [int(row["selected"]) for row in rows] == expected.tolist()
    assert [int(row["index"]) for row in rows] == list(range(50))
    with pytest.raises(ValueError, match=r"dataset_size must be given .*None"):
        _ = Diagnostics(optimizer).selected


class Elsewhere(Tensor):
    """As on a GPU: no index of tensors on the CPU before it is moved there."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert func is not Tensor.__getitem__, "indices should be on the cpu"
        found = super().__torch_function__(func, types, args, kwargs or {})
        return found.as_subclass(Tensor) if func is Tensor.to else found


def test_indices_of_the_data_set_may_be_on_another_device_than_the_selection() -> None:
    """On the CPU, from where the function moves the batch to the model."""
    optimizer = KSAM(network().parameters(), torch.optim.SGD, lr=0.1, k=8)
    diagnostics = Diagnostics(optimizer, dataset_size=50, measure_alignment=False)
    indices = torch.arange(8).as_subclass(Elsewhere)
    result: Any = types.SimpleNamespace(indices=indices, sharp=True, share=None)
    diagnostics(result, lambda _: torch.ones(24), {"index": torch.arange(24)})
    assert diagnostics.selected.tolist() == [1] * 8 + [0] * 42


def test_diagnostics_are_of_this_family() -> None:
    base = torch.optim.SGD(network().parameters(), lr=0.1)
    with pytest.raises(TypeError, match="optimizer must be one of ksam's, got SGD"):
        Diagnostics(base)  # type: ignore[arg-type]


def test_csv_goes_on_with_its_file(tmp_path: Path) -> None:
    path = tmp_path / "run.csv"
    CSVWriter(path)({"step": 0, "loss": 1.5})
    CSVWriter(path)({"step": 1, "loss": math.nan})
    assert path.read_text(encoding="utf-8").split() == ["step,loss", "0,1.5", "1,nan"]
    with pytest.raises(ValueError, match=r"run\.csv, \['step', 'loss'\], got \['step'\]"):
        CSVWriter(path)({"step": 2})


def test_a_row_that_was_cut_off_ends_before_the_next(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_text("step,loss\n0,1.0", encoding="utf-8")
    CSVWriter(path)({"step": 1, "loss": 2.0})
    assert path.read_text(encoding="utf-8").split() == ["step,loss", "0,1.0", "1,2.0"]


def test_steps_without_a_share_leave_that_of_the_others(backend: str) -> None:
    """Where all samples are ignored no gradient has a bound."""
    model = network()
    optimizer = KSAM(model.parameters(), torch.optim.SGD, lr=0.1, k=8)
    diagnostics = Diagnostics(optimizer, every=2, measure_alignment=False)
    shares = []
    for seed in range(2):
        data = batch(seed)
        if seed == 0:
            data["y"].fill_(-100)
        result = optimizer.step(loss_of(model), data)
        diagnostics(result, loss_of(model), data)
        shares.append(float(result.share))
    assert math.isnan(shares[0])
    assert diagnostics.rows[0]["share"] == shares[1]


def test_csv_begins_an_empty_file(tmp_path: Path) -> None:
    path = tmp_path / "run.csv"
    path.touch()
    CSVWriter(path)({"step": 0})
    assert path.read_text(encoding="utf-8").split() == ["step", "0"]


def test_tensorboard_gets_scalars(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    scalars: list[tuple[str, float, int]] = []

    class SummaryWriter:
        def __init__(self, folder: str) -> None:
            assert folder == str(tmp_path)

        def add_scalar(self, name: str, value: float, step: int) -> None:
            scalars.append((name, value, step))

        def flush(self) -> None:
            pass

    module: Any = types.ModuleType("torch.utils.tensorboard")
    module.SummaryWriter = SummaryWriter
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)
    TensorBoardWriter(tmp_path)({"step": 7, "loss": 1.5, "share": 0.5})
    assert scalars == [("ksam/loss", 1.5, 7), ("ksam/share", 0.5, 7)]
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(ImportError, match="pip install tensorboard"):
        TensorBoardWriter(tmp_path)


@pytest.fixture
def figures(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The figures that pages are drawn in."""
    figure_module = pytest.importorskip("matplotlib.figure")
    made: list[Any] = []

    def figure(**options: Any) -> Any:
        made.append(figure_module.Figure(**options))
        return made[-1]

    monkeypatch.setattr(plot, "_figure", figure)
    return made


def test_samples_that_no_step_saw_are_not_drawn(figures: list[Any], tmp_path: Path) -> None:
    seen, selected = torch.tensor([2, 2, 0, 0]), torch.tensor([1, 2, 0, 0])
    plot.draw(tmp_path / "page.svg", [], (seen, selected), None)
    [label] = figures[0].axes[-1].get_legend().get_texts()
    assert label.get_text() == "all: 2, mean 0.75"


def test_a_page_shows_every_column_and_the_counts(figures: list[Any], tmp_path: Path) -> None:
    model = network()
    optimizer = KSAM(model.parameters(), torch.optim.SGD, lr=0.1, k=8, when=EveryNth(2))
    diagnostics = Diagnostics(optimizer, every=2, dataset_size=24)
    data = {**batch(), "index": torch.arange(24)}
    for _ in range(6):
        diagnostics(optimizer.step(loss_of(model), data), loss_of(model), data)
    diagnostics.plot(tmp_path / "page.png", highlight=torch.tensor([0, 5]))
    assert (tmp_path / "page.png").read_bytes().startswith(b"\x89PNG")
    *panels, counts = figures[0].axes
    for panel, name in zip(panels, plot.PANELS, strict=True):
        assert panel.lines[0].get_xdata().tolist() == [1, 3, 5]
        expected = [row[name] for row in diagnostics.rows]
        assert panel.lines[0].get_ydata().tolist() == pytest.approx(expected, nan_ok=True)
    rate = diagnostics.selected / diagnostics.seen
    labels = [text.get_text() for text in counts.get_legend().get_texts()]
    others = rate[[i for i in range(24) if i not in (0, 5)]].mean()
    assert labels == [
        f"others: 22, mean {others:.2f}",
        f"highlighted: 2, mean {rate[[0, 5]].mean():.2f}",
    ]


def test_samples_drawn_more_often_than_seen_are_on_the_page(
    figures: list[Any], tmp_path: Path
) -> None:
    """As ImportanceKSAM draws them, with replacement."""
    counts = torch.tensor([2, 2, 2]), torch.tensor([1, 2, 11])
    plot.draw(tmp_path / "page.png", [], counts, None)
    bars = [bar for axis in figures[0].axes for bar in axis.patches]
    assert sum(bar.get_height() for bar in bars) == pytest.approx(1)


def test_a_page_without_counts_says_so(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    optimizer = KSAM(network().parameters(), torch.optim.SGD, lr=0.1)
    Diagnostics(optimizer).plot(tmp_path / "page.svg")
    assert "<svg" in (tmp_path / "page.svg").read_text(encoding="utf-8")


def test_a_page_needs_matplotlib(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    optimizer = KSAM(network().parameters(), torch.optim.SGD, lr=0.1)
    with pytest.raises(ImportError, match="pip install matplotlib"):
        Diagnostics(optimizer).plot(tmp_path / "page.png")


def test_a_sample_index_of_another_length_is_refused() -> None:
    model = network()
    optimizer = KSAM(model.parameters(), torch.optim.SGD, lr=0.1)
    diagnostics = Diagnostics(optimizer, dataset_size=24, index=lambda b: torch.arange(3))
    with pytest.raises(ValueError, match="one entry per sample"):
        diagnostics(optimizer.step(loss_of(model), batch()), loss_of(model), batch())


def test_arguments_out_of_range_are_named() -> None:
    model = network()
    optimizer = KSAM(model.parameters(), torch.optim.SGD, lr=0.1)
    with pytest.raises(ValueError, match=r"every .*0"):
        Diagnostics(optimizer, every=0)
    with pytest.raises(ValueError, match=r"dataset_size .*-1"):
        Diagnostics(optimizer, dataset_size=-1)
    with pytest.raises(ValueError, match=r"rho .*-1\.0"):
        ksam.sharpness(model, loss_of(model), [batch()], rho=-1.0)
    with pytest.raises(ValueError, match=r"batches .*none"):
        ksam.sharpness(model, loss_of(model), [])
    with pytest.raises(ValueError, match=r"directions .*0"):
        ksam.sharpness(model, loss_of(model), [batch()], directions=0)
