"""The cases of the run on a GPU: those of `benchmarks kernels`, of sizes that fill one."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator

import torch

from benchmarks.gpu.step import parameter_shapes
from benchmarks.kernels import compact, perturb, topk
from benchmarks.kernels.case import Case
from benchmarks.kernels.cross_entropy import CrossEntropy
from benchmarks.kernels.elementwise import Elementwise
from benchmarks.kernels.parameters import MODELS, Shape
from benchmarks.kernels.segmentation import Segmentation

_BF16 = torch.bfloat16

# 2^26 logits, 268 MB in float32: more than twice any cache. Rows x classes.
_LOGITS = {1000: 65536, 4096: 16384, 32000: 2048, 128256: 512}
# GPT-2's vocabulary: of every 8 rows only the first begins at a vector's boundary.
_UNALIGNED = (1335, 50257)
# torch.compile takes seconds for each of these, so few of the cases have it.
_COMPILED = (
    CrossEntropy(_LOGITS[4096], 4096),
    CrossEntropy(_LOGITS[128256], 128256),
    CrossEntropy(_LOGITS[32000], 32000, _BF16),
    CrossEntropy(_LOGITS[4096], 4096, backward=True),
)


def loss_cases() -> Iterator[CrossEntropy]:
    """Forward in both dtypes, the variants, forward + backward, and the selection of a step."""
    yield CrossEntropy(1024, 1000, k=341)
    for classes, rows in _LOGITS.items():
        yield CrossEntropy(rows, classes)
        yield CrossEntropy(rows, classes, _BF16)
    yield CrossEntropy(_UNALIGNED[0], _UNALIGNED[1], _BF16)
    yield CrossEntropy(1024, 1000, _BF16, k=341)
    for classes in (4096, 32000):
        yield CrossEntropy(_LOGITS[classes], classes, backward=True)
        yield CrossEntropy(_LOGITS[classes], classes, label_smoothing=0.1)
        yield CrossEntropy(_LOGITS[classes], classes, soft=True)
    yield CrossEntropy(_LOGITS[32000], 32000, _BF16, backward=True)


def _images(samples: int, side: int) -> Callable[[torch.device], compact.Batch]:
    return lambda device: {
        "image": torch.randn(samples, 3, side, side, device=device),
        "label": torch.randint(1000, (samples,), device=device),
    }


def _tokens(samples: int, length: int) -> Callable[[torch.device], compact.Batch]:
    names = ("input_ids", "attention_mask", "token_type_ids")
    return lambda device: {
        name: torch.randint(30000, (samples, length), device=device) for name in names
    }


def _labels(samples: int) -> Callable[[torch.device], compact.Batch]:
    return lambda device: {"label": torch.randint(1000, (samples,), device=device)}


def compact_cases(device: torch.device, *, tiny: bool) -> Iterator[Case]:
    """Rows of 12 KB (from few and from many images), 602 KB, 4 KB and 8 bytes."""

    def samples(count: int) -> int:
        return 8 if tiny else count

    for n in (samples(4096),) if tiny else (4096, 16384):
        yield compact.case("images", n, f"{n}x3x32x32", _images(n, 32), device)
    n, side = samples(384), 8 if tiny else 224
    yield compact.case("large images", n, f"{n}x3x{side}x{side}", _images(n, side), device)
    n, length = samples(8192), 512
    yield compact.case("tokens", n, f"3 of {n}x{length}", _tokens(n, length), device)
    n = samples(65536)
    yield compact.case("labels", n, f"{n}", _labels(n), device)


def _parameter_lists(*, tiny: bool) -> dict[str, Callable[[], list[Shape]]]:
    small = MODELS["1000 small"]
    return {
        "ResNet-50": lambda: parameter_shapes(tiny=tiny),
        "1000 small": lambda: small()[:5] if tiny else small(),
    }


_UPDATES = (
    ("grad_norm", "SGD"),
    ("perturb_", "SGD"),
    ("restore_sgd_", "SGD"),
    ("restore_adam_", "AdamW"),
)


def perturb_cases(device: torch.device, *, tiny: bool) -> Iterator[Case]:
    """Every operation on lists of tensors, large and small."""
    for name, shapes in _parameter_lists(tiny=tiny).items():
        for operation, base in _UPDATES:
            yield perturb.case("perturb", operation, base, name, shapes, device)


def _shrunk(case: CrossEntropy) -> CrossEntropy:
    k = None if case.k is None else 3
    return dataclasses.replace(case, rows=8, k=k)


def _as_case(loss: CrossEntropy, device: torch.device, *, tiny: bool) -> Case:
    case = (_shrunk(loss) if tiny else loss).case(device)
    return case if loss in _COMPILED and not tiny else _quickly(case)


def _quickly(case: Case) -> Case:
    """The case without contestants that take seconds to start."""
    contestants = [c for c in case.contestants if not c.starts_slowly]
    return dataclasses.replace(case, contestants=contestants)


def kernel_cases(device: torch.device, *, tiny: bool) -> Iterator[Case]:
    """All cases, those that the aims are about first."""
    losses = [_as_case(loss, device, tiny=tiny) for loss in loss_cases()]
    plain = [case for case in losses if not case.extra or "k=" in case.extra]
    yield from plain
    yield from perturb_cases(device, tiny=tiny)
    yield from compact_cases(device, tiny=tiny)
    for size in (40, 50) if tiny else (1024, 16384, 65536, 1 << 20):
        yield topk.case("normal", size, device)
    yield topk.case("all equal", 60 if tiny else 65536, device)
    yield from (case for case in losses if case not in plain)
    for operator in ("mse", "binary_cross_entropy_with_logits"):
        yield _quickly(Elementwise(operator, 8 if tiny else 65536, 512).case(device))
    for images, classes, size in ((1, 3, 4),) if tiny else ((64, 2, 768), (8, 21, 640)):
        for backward in (False, True):
            yield _quickly(Segmentation(images, classes, size, backward).case(device))


def launch_cases(device: torch.device, *, tiny: bool) -> Iterator[Case]:
    """One case per operation, of shapes that steps have."""
    for loss in (
        CrossEntropy(1024, 1000),
        CrossEntropy(1024, 1000, label_smoothing=0.1),
        CrossEntropy(1024, 1000, soft=True),
        CrossEntropy(1024, 1000, backward=True),
        CrossEntropy(1024, 1000, k=341),
    ):
        yield _as_case(loss, device, tiny=tiny)
    for size in (40,) if tiny else (1024, 65536):
        yield topk.case("normal", size, device)
    yield next(compact_cases(device, tiny=tiny))
    yield from list(perturb_cases(device, tiny=tiny))[: len(_UPDATES)]
