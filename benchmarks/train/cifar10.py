"""CIFAR-10 from disk: the original pickles, as torchvision keeps them, or a packed .npz."""

from __future__ import annotations

import io
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.errors import UsageError, import_optional
from benchmarks.train.images import ImageData, ImageSplit

_FOLDER = "cifar-10-batches-py"
_BATCHES = {"train": [f"data_batch_{i}" for i in range(1, 6)], "test": ["test_batch"]}
_SIDE = 32  # pixels
_SHIFT = 4  # pixels, the usual augmentation


def load_cifar10(root: Path) -> ImageData:
    """Load CIFAR-10 from `root`.

    Args:
        root: a folder that holds cifar-10-batches-py, that folder itself, a packed .npz, or a
            folder that holds cifar10*.npz (a lossless one is preferred).
    """
    if root.is_file():
        return _load_packed(root)
    for folder in (root / _FOLDER, root):
        if folder.is_dir() and (folder.name == _FOLDER or (folder / "test_batch").exists()):
            return _load_pickled(folder)
    packed = sorted(root.glob("cifar10*.npz"), key=lambda p: ("lossless" not in p.name, p.name))
    if packed:
        return _load_packed(packed[0])
    raise UsageError(
        f"--data-root {root}: contains neither {_FOLDER}/ (data_batch_1 ... test_batch) "
        "nor a packed cifar10*.npz"
    )


def _load_pickled(folder: Path) -> ImageData:
    splits = {}
    for split, names in _BATCHES.items():
        parts = [_read_pickle(folder / name) for name in names]
        images = np.concatenate([images for images, _ in parts])
        labels = np.concatenate([labels for _, labels in parts])
        splits[split] = _make_split(images, labels)
    return ImageData(splits["train"], splits["test"], shift=_SHIFT, flip=True)


class _ArrayUnpickler(pickle.Unpickler):
    """Unpickles NumPy arrays and plain containers, and runs nothing else a file may name."""

    _ALLOWED = frozenset({"_reconstruct", "_frombuffer", "ndarray", "dtype", "encode"})

    def find_class(self, module: str, name: str) -> Any:
        if name in self._ALLOWED and (module.split(".")[0] == "numpy" or module == "_codecs"):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"{module}.{name} is not allowed in a file of CIFAR-10")


def _read_pickle(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Return images uint8 [N, 32, 32, 3] and labels int64 [N]."""
    try:
        with path.open("rb") as file:
            # The files were written by Python 2, whose strings come back as bytes.
            content = _ArrayUnpickler(file, encoding="bytes").load()
        planes = np.asarray(content[b"data"], dtype=np.uint8).reshape(-1, 3, _SIDE, _SIDE)
        labels = np.asarray(content[b"labels"], dtype=np.int64)
    except FileNotFoundError:
        raise UsageError(f"--data-root: {path} is missing") from None
    except (pickle.UnpicklingError, EOFError, KeyError, TypeError, ValueError, IndexError) as error:
        raise UsageError(f"--data-root: {path} is not a batch of CIFAR-10: {error!r}") from error
    return planes.transpose(0, 2, 3, 1), labels


def _load_packed(path: Path) -> ImageData:
    """Load an .npz whose entries train_00, ... test_00, ... are encoded pictures of many tiles."""
    image_module = import_optional(
        "PIL.Image", package="pillow", needed_by=f"--data-root {path} (packed pictures)"
    )
    splits = {}
    try:
        with np.load(path, allow_pickle=False) as archive:
            for split in ("train", "test"):
                names = sorted(n for n in archive.files if n[: -len("00")] == f"{split}_")
                pictures = [image_module.open(io.BytesIO(archive[n].tobytes())) for n in names]
                images = np.concatenate([_cut_tiles(picture) for picture in pictures])
                splits[split] = _make_split(images, archive[f"{split}_labels"].astype(np.int64))
    except (KeyError, ValueError, OSError) as error:
        raise UsageError(f"--data-root {path}: not a packed CIFAR-10: {error}") from error
    return ImageData(splits["train"], splits["test"], shift=_SHIFT, flip=True)


def _cut_tiles(picture: Any) -> np.ndarray:
    """Cut a picture of rows x columns tiles into uint8 [rows * columns, 32, 32, 3]."""
    pixels = np.asarray(picture.convert("RGB"))
    rows, columns = pixels.shape[0] // _SIDE, pixels.shape[1] // _SIDE
    grid = pixels.reshape(rows, _SIDE, columns, _SIDE, 3)
    tiles: np.ndarray = grid.transpose(0, 2, 1, 3, 4).reshape(-1, _SIDE, _SIDE, 3)
    return tiles


def _make_split(images: np.ndarray, labels: np.ndarray) -> ImageSplit:
    if len(images) != len(labels):
        raise UsageError(f"--data-root: found {len(images)} images, but {len(labels)} labels")
    return ImageSplit(torch.from_numpy(np.ascontiguousarray(images)), torch.from_numpy(labels))
