"""The training benchmark: real formats in, true figures out, mistakes told in one sentence."""

from __future__ import annotations

import csv
import json
import pickle
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from benchmarks.__main__ import main
from benchmarks.errors import UsageError
from benchmarks.train.cifar10 import load_cifar10
from benchmarks.train.glue import load_glue


def _images(count: int) -> tuple[np.ndarray, list[int]]:
    generator = np.random.default_rng(0)
    images = generator.integers(0, 256, (count, 32, 32, 3), dtype=np.uint8)
    return images, generator.integers(0, 10, count).tolist()


def test_cifar10_is_read_from_torchvisions_layout(tmp_path: Path) -> None:
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    images, labels = _images(12)
    names = [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]
    for i, name in enumerate(names):
        part = slice(2 * i, 2 * i + 2)
        rows = images[part].transpose(0, 3, 1, 2).reshape(2, -1)
        with (folder / name).open("wb") as file:
            pickle.dump({b"data": rows, b"labels": labels[part]}, file)
    for root in (tmp_path, folder):
        data = load_cifar10(root)
        assert np.array_equal(data.train.images.numpy(), images[:10])
        assert data.train.labels.tolist() == labels[:10]
        assert np.array_equal(data.test.images.numpy(), images[10:])


def test_cifar10_is_read_from_packed_pictures(tmp_path: Path) -> None:
    images, labels = _images(8)
    entries = {}
    for split, part in (("train", slice(0, 4)), ("test", slice(4, 8))):
        picture = images[part].reshape(2, 2, 32, 32, 3).transpose(0, 2, 1, 3, 4)
        path = tmp_path / "picture.webp"
        Image.fromarray(picture.reshape(64, 64, 3)).save(path, lossless=True)
        entries[f"{split}_00"] = np.frombuffer(path.read_bytes(), np.uint8)
        entries[f"{split}_labels"] = np.array(labels[part], np.uint8)
    np.savez(tmp_path / "cifar10_lossless.npz", **entries)
    for root in (tmp_path, tmp_path / "cifar10_lossless.npz"):
        data = load_cifar10(root)
        assert np.array_equal(data.train.images.numpy(), images[:4])
        assert data.test.labels.tolist() == labels[4:]


def test_glue_keeps_quotes_and_drops_the_byte_order_mark(tmp_path: Path) -> None:
    (tmp_path / "RTE").mkdir()
    rows = 'index\tsentence1\tsentence2\tlabel\n0\tHe said "no\tNo" he said\tnot_entailment\n'
    (tmp_path / "RTE" / "dev.tsv").write_text(rows, encoding="utf-8-sig")
    split = load_glue(tmp_path, "rte", "dev")
    assert split.sentences == (['He said "no'], ['No" he said'])
    assert split.labels == [1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--data", "cifar10"], "--data-root"),
        (["--data", "cifar10", "--data-root", "/nowhere"], "/nowhere"),
        (["--data", "rte", "--data-root", "/nowhere", "--model", "/nothing"], "/no"),
        (["--k", "1.5"], "1.5"),
        (["--k", "0"], "0"),
    ],
)
def test_mistakes_are_told_in_one_sentence(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    try:
        status: object = main(["train", *arguments, "--out", str(tmp_path)])
    except SystemExit as stop:  # argparse
        status = stop.code
    assert status == 2
    assert message in capsys.readouterr().err.splitlines()[-1]


def test_missing_glue_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"MRPC.*train\.tsv"):
        load_glue(tmp_path, "mrpc", "train")


def test_digits_are_learned_and_the_figures_agree(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """End to end: every method trains on real digits to an accuracy far from chance (10 %)."""
    options = ["--epochs", "6", "--seeds", "1", "--timing-rounds", "2", "--batch-size", "64"]
    assert main(["train", *options, "--k", "1/2", "--out", str(tmp_path)]) == 0
    with (tmp_path / "results.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    runs = Counter((row["method"], row["seed"]) for row in rows)
    assert runs == {(m, s): 6 for m in ("sgd", "sam", "ksam") for s in ("0",)}
    last = [row for row in rows if row["epoch"] == "6"]
    for row in last:
        accuracy = float(row["test_accuracy"])
        assert 85 < (accuracy if accuracy > 1 else 100 * accuracy) <= 100
        assert float(row["train_seconds"]) > 0
    assert (tmp_path / "accuracy.png").read_bytes().startswith(b"\x89PNG")
    assert json.loads((tmp_path / "summary.json").read_text())
    table = capsys.readouterr().out
    for method in ("sgd", "sam", "ksam"):
        figures = [float(row["test_accuracy"]) for row in last if row["method"] == method]
        mean = np.mean(figures) * (1 if max(figures) > 1 else 100)
        assert f"{mean:.2f}" in table
