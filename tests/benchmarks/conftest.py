"""Small data sets in the formats users have them in, written to a temporary folder."""

from __future__ import annotations

import io
import pickle
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from benchmarks.__main__ import main
from tests.benchmarks.clock import Clock
from tests.helpers import one_thread as one_thread
from tests.helpers import wait_for


@dataclass(frozen=True)
class CliResult:
    """What the command line did: its exit status and what it printed."""

    status: int
    out: str
    err: str


@pytest.fixture
def cli(capfd: pytest.CaptureFixture[str]) -> Callable[..., CliResult]:
    """Run ``python -m benchmarks train`` (or another) with these arguments, in this process."""

    def run(*arguments: object, command: str = "train") -> CliResult:
        capfd.readouterr()
        try:
            status = main([command, *map(str, arguments)])
        except SystemExit as error:  # argparse
            status = int(error.code or 0)
        captured = capfd.readouterr()
        return CliResult(status, captured.out, captured.err)

    return run


@dataclass(frozen=True)
class CifarFiles:
    """CIFAR-10 in miniature: uint8 [N, 32, 32, 3] and classes [N], and where it lies."""

    root: Path
    train_images: np.ndarray
    train_labels: np.ndarray
    test_images: np.ndarray
    test_labels: np.ndarray


def _random_cifar(root: Path, train: int, test: int) -> CifarFiles:
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (train + test, 32, 32, 3), dtype=np.uint8)
    labels = np.arange(train + test) % 10
    return CifarFiles(root, images[:train], labels[:train], images[train:], labels[train:])


@pytest.fixture
def cifar_pickles(tmp_path: Path) -> CifarFiles:
    """torchvision's layout, 20 images in each of the five training batches, 10 to test."""
    files = _random_cifar(tmp_path / "pickles", train=100, test=10)
    folder = files.root / "cifar-10-batches-py"
    folder.mkdir(parents=True)

    def write(name: str, images: np.ndarray, labels: np.ndarray) -> None:
        # Planes of red, green, blue, one row an image; keys are bytes as Python 2 left them.
        planes = images.transpose(0, 3, 1, 2).reshape(len(images), -1)
        content = {b"data": planes, b"labels": labels.tolist(), b"batch_label": name.encode()}
        (folder / name).write_bytes(pickle.dumps(content, protocol=2))

    for i in range(5):
        part = slice(20 * i, 20 * (i + 1))
        write(f"data_batch_{i + 1}", files.train_images[part], files.train_labels[part])
    write("test_batch", files.test_images, files.test_labels)
    return files


@pytest.fixture
def cifar_packed(tmp_path: Path) -> CifarFiles:
    """A packed .npz: lossless pictures of 2 x 3 tiles, two for training and one for testing."""
    image_module = pytest.importorskip("PIL.Image", reason="needs pillow")
    files = _random_cifar(tmp_path / "packed", train=12, test=6)
    files.root.mkdir()

    def encode(images: np.ndarray) -> np.ndarray:
        picture = images.reshape(2, 3, 32, 32, 3).transpose(0, 2, 1, 3, 4).reshape(64, 96, 3)
        buffer = io.BytesIO()
        image_module.fromarray(picture).save(buffer, "PNG")
        return np.frombuffer(buffer.getvalue(), dtype=np.uint8)

    np.savez(
        files.root / "cifar10_lossless.npz",
        train_00=encode(files.train_images[:6]),
        train_01=encode(files.train_images[6:]),
        test_00=encode(files.test_images),
        train_labels=files.train_labels.astype(np.uint8),
        test_labels=files.test_labels.astype(np.uint8),
        class_names=np.array([str(i) for i in range(10)]),
    )
    return files


@pytest.fixture
def write_glue(tmp_path: Path) -> Callable[..., Path]:
    """Write lines as both the train and the dev file of a task; return the root folder."""

    def write(folder: str, lines: Sequence[str], encoding: str = "utf-8") -> Path:
        root = tmp_path / "glue"
        (root / folder).mkdir(parents=True)
        for split in ("train", "dev"):
            text = "".join(f"{line}\n" for line in lines)
            (root / folder / f"{split}.tsv").write_text(text, encoding=encoding, newline="\n")
        return root

    return write


@pytest.fixture
def pid_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where a command writes its process's number; its time limit begins only after that."""
    file = tmp_path / "pid"
    wait = subprocess.Popen.wait

    def wait_from_then_on(self: subprocess.Popen[str], timeout: float | None = None) -> int:
        # The shell makes the file before it writes to it.
        wait_for(lambda: file.exists() and file.read_text().endswith("\n"))
        return wait(self, timeout)

    monkeypatch.setattr(subprocess.Popen, "wait", wait_from_then_on)
    return file


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """In place of the time."""
    clock = Clock()
    monkeypatch.setattr("time.perf_counter", lambda: clock.now)
    return clock
