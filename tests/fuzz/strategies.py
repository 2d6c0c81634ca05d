"""What the fuzz tests draw: small descriptions of tensors, which a failure prints.

A description is built into a tensor with a generator of its own seed, so that it can be pasted into
an ``@example``; on the CPU, whatever the device of the tests, so that the numbers are the same.
Without ``KSAM_FUZZ_EXAMPLES`` every run draws the same few examples;
``KSAM_FUZZ_EXAMPLES=2000 pytest tests/fuzz`` draws that many new ones for each test and backend.
A failure prints a ``@reproduce_failure`` line that brings its example back.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from torch import Generator, Tensor

from tests.device import DEVICE
from tests.helpers import FLOATS, bits

_EXAMPLES = int(os.environ.get("KSAM_FUZZ_EXAMPLES", "0"))

#: Decorator of every fuzz test.
fuzz = settings(
    max_examples=_EXAMPLES or 120,
    derandomize=not _EXAMPLES,
    database=None,
    deadline=None,
    print_blob=True,
    # Making a failure smaller takes minutes, which a GPU's tests do not have.
    phases=tuple(Phase) if DEVICE.type == "cpu" else (Phase.explicit, Phase.generate),
    # The `backend` fixture is in force for all examples of a test alike: nothing to set up again.
    suppress_health_check=[
        HealthCheck.function_scoped_fixture,
        HealthCheck.too_slow,
        HealthCheck.data_too_large,
    ],
)

#: Around what kernels cut work into: vectors, blocks, chunks.
EDGES = (1, 2, 7, 8, 15, 16, 17, 31, 33, 63, 64, 65, 127, 129, 511, 513, 2047, 2049, 2063, 2065)
LARGER = (4095, 4096, 4097, 5000, 8191, 33000)
FINITE = ("normal", "few", "zeros", "narrow", "wide", "tiny", "finite special")
ANY = (*FINITE, "special", "any bits", "nan payloads")

Fill = Callable[[int, torch.dtype, Generator], Tensor]


def _chosen(values: Sequence[float], n: int, dtype: torch.dtype, g: Generator) -> Tensor:
    return torch.tensor(values, dtype=dtype)[torch.randint(0, len(values), (n,), generator=g)]


def _random_bits(n: int, dtype: torch.dtype, g: Generator) -> Tensor:
    if dtype == torch.bool:
        return torch.randint(0, 2, (n,), generator=g).bool()
    return torch.randint(0, 256, (n * dtype.itemsize,), dtype=torch.uint8, generator=g).view(dtype)


def values(kind: str, n: int, dtype: torch.dtype, g: Generator) -> Tensor:
    """n numbers of a kind named in ``ANY``; other dtypes than the four floats: any bits."""
    if dtype not in FLOATS or kind == "any bits":
        return _random_bits(n, dtype, g)
    info = torch.finfo(dtype)
    least = info.smallest_normal * info.eps
    finite = [0.0, -0.0, 1.0, -1.0, 1 + info.eps, least, -least, info.tiny, info.max, -info.max]
    if kind == "nan payloads":
        x = _random_bits(n, dtype, g)
        exponent = bits(torch.tensor([math.inf], dtype=dtype))
        x.view(exponent.dtype)[::2] |= exponent
        return x
    if kind == "special":
        return _chosen([*finite, math.inf, -math.inf, math.nan], n, dtype, g)
    if kind == "finite special":
        return _chosen(finite, n, dtype, g)
    if kind == "few":
        return _chosen([0.0, 0.5, -1.5, 3.0], n, dtype, g)
    if kind == "zeros":
        return _chosen([0.0, -0.0], n, dtype, g)
    if kind == "narrow":
        return 1 + torch.randint(0, 9, (n,), generator=g).to(dtype) * info.eps
    if kind == "tiny":  # denormal numbers, and the smallest of the others
        return torch.randint(-3000, 3001, (n,), generator=g).double().mul(least).to(dtype)
    x = torch.randn(n, dtype=torch.float64, generator=g)
    if kind == "wide":  # all magnitudes
        low, high = math.log2(info.tiny), math.log2(info.max)
        exponents = low + (high - 4 - low) * torch.rand(n, dtype=torch.float64, generator=g)
        x = x * exponents.exp2()
    return x.to(dtype)


@dataclass(frozen=True)
class Spec:
    """A tensor in memory of its own, with numbers of its kind in the gaps too."""

    shape: tuple[int, ...]
    dtype: torch.dtype = torch.float32
    kind: str = "normal"
    seed: int = 0
    order: tuple[int, ...] = ()  # dimensions as they are nested in memory; (): as they are
    steps: tuple[int, ...] = ()  # of every dimension, 1 without gaps, 0 expanded; (): all 1
    offset: int = 0

    def build(self, fill: Fill | None = None) -> Tensor:
        strides = [0] * len(self.shape)
        room = 1
        for d in reversed(self.order or range(len(self.shape))):
            step = self.steps[d] if self.steps else 1
            strides[d] = room * step
            room *= max(self.shape[d] * step, 1)
        generator = Generator().manual_seed(self.seed)
        n = self.offset + room + 3
        with torch.device("cpu"):
            base = (
                fill(n, self.dtype, generator)
                if fill
                else values(self.kind, n, self.dtype, generator)
            )
        return base.to(DEVICE).as_strided(self.shape, strides, self.offset)


def copy_of(tensor: Tensor) -> Tensor:
    """The same tensor in a copy of its whole memory, gaps included."""
    storage = tensor.untyped_storage().clone()
    where = tensor.storage_offset(), tensor.shape, tensor.stride()
    return torch.empty(0, dtype=tensor.dtype).set_(storage, *where)  # type: ignore[call-overload]


def gaps(tensor: Tensor) -> Tensor:
    """The memory around the tensor's elements, which nothing may write, as bytes."""
    copy = copy_of(tensor).zero_()
    return torch.empty(0, dtype=torch.uint8).set_(copy.untyped_storage())  # type: ignore[call-overload]


def same_numbers(a: Tensor, b: Tensor) -> bool:
    """The same bits, but that a NaN equals any NaN."""
    if a.dtype != b.dtype or a.shape != b.shape or not torch.equal(a.isnan(), b.isnan()):
        return False
    return torch.equal(bits(a.masked_fill(a.isnan(), 0)), bits(b.masked_fill(b.isnan(), 0)))


seeds = st.integers(0, 2**31)
dtypes = st.sampled_from(FLOATS)
lengths = st.one_of(st.integers(0, 20), st.sampled_from(EDGES), st.sampled_from(LARGER))
small_shapes = st.lists(st.integers(0, 6), max_size=5).map(tuple)
shapes = st.one_of(
    lengths.map(lambda n: (n,)),
    small_shapes,
    st.tuples(st.integers(0, 4), st.one_of(st.integers(0, 70), st.sampled_from(EDGES))),
)


@st.composite
def layouts(
    draw: st.DrawFn, shape: tuple[int, ...], expandable: bool = False
) -> dict[str, tuple[int, ...] | int]:
    """The fields of a Spec that say how it lies in memory; half of them contiguous."""
    if draw(st.booleans()):
        return {}
    order = tuple(draw(st.permutations(range(len(shape)))))
    step = st.sampled_from((1, 1, 1, 2, 3, *([0] if expandable else [])))
    steps = tuple(draw(step) for _ in shape)
    return {"order": order, "steps": steps, "offset": draw(st.integers(0, 5))}


@st.composite
def specs(
    draw: st.DrawFn,
    shape: tuple[int, ...] | None = None,
    dtype: torch.dtype | None = None,
    kinds: Sequence[str] = ANY,
    expandable: bool = False,
) -> Spec:
    """A tensor of the given shape and dtype, or of any."""
    shape = draw(shapes) if shape is None else shape
    dtype = draw(dtypes) if dtype is None else dtype
    layout = draw(layouts(shape, expandable))
    return Spec(shape, dtype, draw(st.sampled_from(kinds)), draw(seeds), **layout)  # type: ignore[arg-type]
