"""Cases of the loss room: per-sample losses, forward as in the selection pass and with gradient."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from benchmarks.kernels.case import Case
from benchmarks.kernels.cross_entropy import CrossEntropy
from benchmarks.kernels.elementwise import Elementwise
from benchmarks.kernels.segmentation import Segmentation

LEGEND = {
    "eager": "F.cross_entropy or its kin with reduction='none', then mean(1) where the loss is one",
    "eager float": "the same on logits.float(), as autocast does",
    "compile": "torch.compile of that, static shapes; losses in float32 as ksam's",
}

_SMALL = ((128, 10), (128, 100), (32, 1000))
_LARGE = (
    (262144, 10), (65536, 100), (8192, 1000), (1024, 8192), (512, 32000), (128, 128256),
)  # fmt: skip
_IMAGES, _TOKENS = (8192, 1000), (512, 32000)
_BCE = "binary_cross_entropy_with_logits"


def cases(device: torch.device) -> Iterator[Case]:
    """All cases of the room."""
    yield from _cross_entropies(device)
    yield Elementwise(_BCE, 128, 80).case(device, quick=True)
    yield Elementwise(_BCE, *_IMAGES).case(device)
    yield Elementwise(_BCE, *_IMAGES, torch.bfloat16).case(device)
    yield Elementwise(_BCE, 128, 80, pos_weight=True).case(device, quick=True)
    yield Elementwise(_BCE, *_IMAGES, pos_weight=True).case(device)
    yield Elementwise("mse", 128, 80).case(device, quick=True)
    yield Elementwise("mse", *_IMAGES).case(device)
    for operator in (_BCE, "mse"):  # one number a sample
        for rows in (128, 65536):
            yield Elementwise(operator, rows, 1).case(device, quick=rows == 128)


def _cross_entropies(device: torch.device) -> Iterator[Case]:
    bf16 = torch.bfloat16
    for shape in (*_SMALL, *_LARGE):
        yield CrossEntropy(*shape).case(device, quick=shape in _SMALL)
    for shape in ((32, 1000), *_LARGE):
        yield CrossEntropy(*shape, bf16).case(device, quick=shape in _SMALL)
    for shape in (_IMAGES, _TOKENS):
        yield CrossEntropy(*shape, label_smoothing=0.1).case(device)
        yield CrossEntropy(*shape, bf16, label_smoothing=0.1).case(device)
        yield CrossEntropy(*shape, weighted=True).case(device)
        yield CrossEntropy(*shape, soft=True).case(device)
    for shape in ((128, 10), (128, 1000), _IMAGES, _TOKENS):
        yield CrossEntropy(*shape, k=shape[0] // 3).case(device, quick=shape in _SMALL)
    for images, classes, size in ((4, 2, 256), (8, 21, 128)):
        for backward in (False, True):
            yield Segmentation(images, classes, size, backward).case(device)
    for shape in ((128, 1000), _IMAGES, _TOKENS):
        yield CrossEntropy(*shape, backward=True).case(device, quick=shape == (128, 1000))
    for shape in (_IMAGES, _TOKENS):
        yield CrossEntropy(*shape, bf16, backward=True).case(device)
