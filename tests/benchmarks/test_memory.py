"""``benchmarks memory``: bytes counted once, and as many as the samples of a pass."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.autograd.graph import saved_tensors_hooks

from benchmarks import memory
from benchmarks.memory import METHODS, Counter, bytes_kept
from tests.benchmarks.conftest import CliResult


def test_storages_are_counted_once_and_what_is_there_is_not() -> None:
    weight = torch.randn(3, 3, requires_grad=True)
    counter = Counter([weight])
    with saved_tensors_hooks(counter.pack, lambda held: held.tensor):
        x = weight.exp()  # saves its result
        y = x * x[:2].sum()  # and this one x again, and a number
    assert counter.now == counter.most == 4 * (9 + 1)
    y.sum().backward()
    assert (counter.now, counter.most) == (0, 4 * (9 + 1))


def test_a_step_keeps_what_its_gradient_passes_are_on() -> None:
    torch.manual_seed(0)
    batch = {"x": torch.randn(48, 8), "y": torch.arange(48) % 5}
    model = nn.Sequential(nn.Linear(8, 1000), nn.Tanh(), nn.Linear(1000, 5))
    kept = {name: bytes_kept(model, build, batch) for name, build in METHODS.items()}
    wide = 4 * 1000  # bytes of a sample's activations, the others being few
    samples = {"SGD": 48, "SAM": 48, "K-SAM, k=1/2": 24, "K-SAM, k=1/3": 16}
    for name, count in samples.items():
        assert kept[name] == pytest.approx(count * wide, rel=0.03)
        assert kept[name] > count * wide


def test_the_command(cli: Callable[..., CliResult], tmp_path: Path) -> None:
    result = cli("--samples", 6, "--side", 8, "--out", tmp_path / "out", command="memory")
    assert result.status == 0
    rows = json.loads((tmp_path / "out" / "memory.json").read_text(encoding="utf-8"))["rows"]
    assert [row["method"] for row in rows] == 2 * list(METHODS)
    assert [row["over_sgd"] for row in rows if row["method"] == "SGD"] == [1.0, 1.0]
    third = [row["over_sgd"] for row in rows if row["method"] == "K-SAM, k=1/3"]
    assert third == pytest.approx([1 / 3, 1 / 3], rel=0.05)
    assert all(f"{row['bytes_kept'] / 2**20:8.1f} MiB" in result.out for row in rows)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--samples", 4, "--side", 8), "--samples 4: at --side 8 BatchNorm needs two samples"),
        (("--samples", 1, "--side", 8), "--samples 1: at --side 8 BatchNorm needs two samples"),
        (("--samples", 0), "argument --samples: '0' is not a count >= 1"),
        (("--side", 12), "argument --side: '12' is not a multiple of 8"),
        (("--side", 0), "argument --side: '0' is not a multiple of 8"),
        (("--out", "{tmp}/file/x"), "{tmp}/file/x: cannot create the folder"),
    ],
)
def test_mistakes_are_named_before_anything_is_measured(
    cli: Callable[..., CliResult],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    arguments: tuple[object, ...],
    message: str,
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setattr("benchmarks.memory.measure", lambda *_: pytest.fail("it has measured"))
    out = ("--out", tmp_path / "out")
    result = cli(*out, *(str(a).format(tmp=tmp_path) for a in arguments), command="memory")
    assert result.status == 2
    assert message.format(tmp=tmp_path) in result.err.splitlines()[-1]


@pytest.mark.parametrize(("samples", "side"), [(5, 8), (1, 16)])
def test_the_smallest_sizes_can_be_trained_on(samples: int, side: int) -> None:
    memory._check_sizes(samples, side)
    assert [row.samples for row in memory.measure("resnet18", samples, side)] == [samples] * 5
