"""Readers of the data sets, on small files in the real formats and on the real files if given."""

from __future__ import annotations

import os
import pickle
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks.errors import UsageError
from benchmarks.train.cifar10 import load_cifar10
from benchmarks.train.glue import load_glue
from benchmarks.train.images import (
    ImageSplit,
    ImageWorkload,
    channel_statistics,
    load_digits,
    shift_and_flip,
)
from benchmarks.train.workload import LABEL, subset_rows

CPU = torch.device("cpu")


def test_digits_are_split_by_class() -> None:
    data = load_digits()
    assert data.train.images.shape == (1347, 8, 8, 1)
    assert data.test.images.shape == (450, 8, 8, 1)
    assert data.train.images.dtype == torch.uint8
    assert data.train.images.max() == 16
    counts = torch.bincount(data.test.labels)
    assert counts.min() >= 43
    assert counts.max() <= 46
    assert torch.equal(load_digits().test.images, data.test.images)


@pytest.mark.parametrize("inside", [False, True], ids=["parent folder", "folder itself"])
def test_cifar10_pickles(cifar_pickles: Any, inside: bool) -> None:
    root = cifar_pickles.root / "cifar-10-batches-py" if inside else cifar_pickles.root
    data = load_cifar10(root)
    assert np.array_equal(data.train.images, cifar_pickles.train_images)
    assert np.array_equal(data.train.labels, cifar_pickles.train_labels)
    assert np.array_equal(data.test.images, cifar_pickles.test_images)
    assert np.array_equal(data.test.labels, cifar_pickles.test_labels)


@pytest.mark.parametrize("file", [False, True], ids=["folder", "file"])
def test_cifar10_packed(cifar_packed: Any, file: bool) -> None:
    root = cifar_packed.root / "cifar10_lossless.npz" if file else cifar_packed.root
    data = load_cifar10(root)
    assert np.array_equal(data.train.images, cifar_packed.train_images)
    assert np.array_equal(data.train.labels, cifar_packed.train_labels)
    assert np.array_equal(data.test.images, cifar_packed.test_images)
    assert np.array_equal(data.test.labels, cifar_packed.test_labels)


def test_lossless_cifar10_is_preferred(cifar_packed: Any) -> None:
    (cifar_packed.root / "cifar10_a_jpeg.npz").write_bytes(b"never opened")
    assert len(load_cifar10(cifar_packed.root).train.labels) == 12


def test_missing_batch_is_named(cifar_pickles: Any) -> None:
    path = cifar_pickles.root / "cifar-10-batches-py" / "data_batch_3"
    path.unlink()
    with pytest.raises(UsageError, match=f"--data-root: {path} is missing"):
        load_cifar10(cifar_pickles.root)


@pytest.mark.parametrize(
    "content",
    [b"", b"not a pickle", pickle.dumps({b"data": np.zeros((2, 5))}), pickle.dumps(os.system)],
    ids=["empty", "text", "wrong shape", "code"],
)
def test_broken_batch_is_named(cifar_pickles: Any, content: bytes) -> None:
    path = cifar_pickles.root / "cifar-10-batches-py" / "data_batch_3"
    path.write_bytes(content)
    with pytest.raises(UsageError, match=f"{path} is not a batch of CIFAR-10"):
        load_cifar10(cifar_pickles.root)


def test_broken_packed_file_is_named(tmp_path: Path) -> None:
    path = tmp_path / "cifar10.npz"
    np.savez(path, something=np.zeros(3))
    with pytest.raises(UsageError, match=f"{path}: not a packed CIFAR-10"):
        load_cifar10(tmp_path)


def test_missing_pillow_is_named(cifar_packed: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "PIL.Image", None)
    with pytest.raises(UsageError, match=r"cifar10_lossless.npz .* needs the package pillow"):
        load_cifar10(cifar_packed.root)


def test_glue_quotes_are_plain_text(write_glue: Callable[..., Path]) -> None:
    lines = [
        "sentence\tlabel",
        '"half a quote \t1',
        'a "whole" one\t0',
        "it 's \u2028 one line \t1",
    ]
    train = load_glue(write_glue("SST-2", lines), "sst2", "train")
    assert train.sentences == (['"half a quote ', 'a "whole" one', "it 's \u2028 one line "],)
    assert train.labels == [1, 0, 1]


def test_glue_byte_order_mark_and_carriage_returns(write_glue: Callable[..., Path]) -> None:
    lines = ["Quality\t#1 ID\t#2 ID\t#1 String\t#2 String\r", "1\t12\t34\tfirst .\tsecond .\r"]
    dev = load_glue(write_glue("MRPC", lines, encoding="utf-8-sig"), "mrpc", "dev")
    assert dev.sentences == (["first ."], ["second ."])
    assert dev.labels == [1]


def test_glue_words_as_labels(write_glue: Callable[..., Path]) -> None:
    header = "index\tsentence1\tsentence2\tlabel"
    root = write_glue("RTE", [header, "0\ta\tb\tnot_entailment", "1\tc\td\tentailment"])
    assert load_glue(root, "rte", "train").labels == [1, 0]


@pytest.mark.parametrize("row", ["only one column", "text\t7"])
def test_malformed_glue_row_is_named(write_glue: Callable[..., Path], row: str) -> None:
    root = write_glue("SST-2", ["sentence\tlabel", "fine\t1", row])
    with pytest.raises(UsageError, match=r"train.tsv:3 is not a row of sst2"):
        load_glue(root, "sst2", "train")


def test_every_batch_has_shifts_of_its_own() -> None:
    """Those of the whole epoch: images all alike, moved by batches, and all at once."""
    data = load_digits()
    same = ImageSplit(data.train.images[:1].expand(64, -1, -1, -1), data.train.labels[:64])
    workload = ImageWorkload(replace(data, train=same, flip=True), "cnn", CPU)

    def images(batch_size: int) -> list[torch.Tensor]:
        generator = torch.Generator().manual_seed(0)
        return [batch["image"] for batch in workload.train_batches(batch_size, generator)]

    first, second = images(32)
    assert not torch.equal(first, second)
    (both,) = images(64)
    assert torch.equal(torch.cat([first, second]), both)


def test_shift_and_flip_against_one_image_at_a_time() -> None:
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(1, 256, (32, 5, 6, 3), generator=generator, dtype=torch.uint8)
    shifts = torch.randint(0, 5, (32, 2), generator=generator)
    flips = torch.rand(32, generator=generator) < 0.5
    result = shift_and_flip(images, shifts, flips, limit=2)
    for image, (down, right), flip, got in zip(images, shifts, flips, result, strict=True):
        padded = torch.zeros(9, 10, 3, dtype=torch.uint8)
        padded[2:7, 2:8] = image
        crop = padded[down : down + 5, right : right + 6]
        assert torch.equal(got, crop.flip(1) if flip else crop)


def test_channel_statistics() -> None:
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 200, (10, 4, 4, 2), generator=generator, dtype=torch.uint8)
    mean, std = channel_statistics(images)
    torch.testing.assert_close(mean, images.float().mean((0, 1, 2)))
    torch.testing.assert_close(std, images.float().std((0, 1, 2), correction=0))


def test_batches_are_normalized_with_the_training_set() -> None:
    workload = ImageWorkload(load_digits(), "cnn", CPU)
    batches = list(workload.test_batches())
    images = torch.cat([batch["image"] for batch in batches])
    assert images.shape == (450, 1, 8, 8)
    assert abs(images.mean()) < 0.05
    assert abs(images.std() - 1) < 0.05
    assert sum(len(batch[LABEL]) for batch in batches) == workload.test_size == 450


@pytest.mark.parametrize(("samples", "sizes"), [(100, [32, 32, 32]), (20, [20])])
def test_training_batches_are_full(samples: int, sizes: list[int]) -> None:
    workload = ImageWorkload(load_digits(), "cnn", CPU, train_samples=samples)
    batches = list(workload.train_batches(32, torch.Generator().manual_seed(0)))
    assert [len(batch["image"]) for batch in batches] == sizes
    assert workload.steps_per_epoch(32) == len(sizes)


def test_train_samples_are_a_prefix_of_one_permutation() -> None:
    assert torch.equal(subset_rows(100, 30), subset_rows(100, 100)[:30])
    assert torch.equal(subset_rows(100, None), torch.arange(100))
    with pytest.raises(
        UsageError, match=r"--train-samples 101: the training set has only 100 samples"
    ):
        subset_rows(100, 101)


def real_data(part: str) -> Path:
    root = os.environ.get("KSAM_TEST_DATA")
    if root is None:
        pytest.skip("KSAM_TEST_DATA is not set to a folder with cifar10/ and glue/")
    return Path(root) / part


def test_real_cifar10() -> None:
    data = load_cifar10(real_data("cifar10"))
    assert data.train.images.shape == (50_000, 32, 32, 3)
    assert data.test.images.shape == (10_000, 32, 32, 3)
    assert torch.bincount(data.train.labels).tolist() == [5_000] * 10
    assert torch.bincount(data.test.labels).tolist() == [1_000] * 10
    mean, std = channel_statistics(data.train.images)
    # The published statistics of the training set.
    torch.testing.assert_close(
        mean / 255, torch.tensor([0.4914, 0.4822, 0.4465]), atol=1e-4, rtol=0
    )
    torch.testing.assert_close(std / 255, torch.tensor([0.2470, 0.2435, 0.2616]), atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    ("name", "split", "counts"),
    [
        ("sst2", "train", [29_780, 37_569]),
        ("sst2", "dev", [428, 444]),
        ("rte", "train", [1_249, 1_241]),
        ("rte", "dev", [146, 131]),
        ("mrpc", "train", [1_194, 2_474]),
        ("mrpc", "dev", [129, 279]),
    ],
)
def test_real_glue(name: str, split: str, counts: list[int]) -> None:
    data = load_glue(real_data("glue"), name, split)
    assert [data.labels.count(0), data.labels.count(1)] == counts
    assert all(len(column) == sum(counts) for column in data.sentences)
