"""Lists of parameter shapes of models people train, without the models."""

from __future__ import annotations

import math
from collections.abc import Callable

Shape = tuple[int, ...]


def _norm(width: int) -> list[Shape]:
    """Scale and shift of a normalization layer."""
    return [(width,), (width,)]


def _linear(inputs: int, outputs: int) -> list[Shape]:
    return [(outputs, inputs), (outputs,)]


def _convolution(inputs: int, outputs: int, kernel: int) -> list[Shape]:
    """A convolution without bias and the BatchNorm after it."""
    return [(outputs, inputs, kernel, kernel), *_norm(outputs)]


def _resnet(depths: tuple[int, ...], expansion: int) -> list[Shape]:
    """He et al. 2016 on ImageNet; `expansion` 1 has basic blocks, 4 bottlenecks."""
    shapes = _convolution(3, 64, 7)
    inputs = 64
    for stage, depth in enumerate(depths):
        width = 64 << stage
        outputs = width * expansion
        for block in range(depth):
            if expansion == 1:
                shapes += _convolution(inputs, width, 3) + _convolution(width, width, 3)
            else:
                shapes += _convolution(inputs, width, 1) + _convolution(width, width, 3)
                shapes += _convolution(width, outputs, 1)
            if block == 0 and inputs != outputs:
                shapes += _convolution(inputs, outputs, 1)
            inputs = outputs
    return shapes + _linear(inputs, 1000)


def _vit_small() -> list[Shape]:
    """ViT-S/16 on ImageNet (Dosovitskiy et al. 2021; DeiT's small size)."""
    width, depth, patches = 384, 12, 196
    shapes: list[Shape] = [(1, 1, width), (1, patches + 1, width), (width, 3, 16, 16), (width,)]
    for _ in range(depth):
        shapes += [*_norm(width), *_linear(width, 3 * width), *_linear(width, width)]
        shapes += [*_norm(width), *_linear(width, 4 * width), *_linear(4 * width, width)]
    return [*shapes, *_norm(width), *_linear(width, 1000)]


def _small_tensors() -> list[Shape]:
    """Half a million parameters in pieces of 64 to 1024: all overhead, and no bandwidth."""
    return [(64 * (1 + i % 16),) for i in range(1000)]


MODELS: dict[str, Callable[[], list[Shape]]] = {
    "ResNet-18": lambda: _resnet((2, 2, 2, 2), expansion=1),
    "ResNet-50": lambda: _resnet((3, 4, 6, 3), expansion=4),
    "ViT-S/16": _vit_small,
    "1000 small": _small_tensors,
}


def count(shapes: list[Shape]) -> int:
    """Elements of all tensors together."""
    return sum(math.prod(shape) for shape in shapes)
