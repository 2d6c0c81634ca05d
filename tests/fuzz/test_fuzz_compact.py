"""Any batch whatever: the reference's bits, and its strides."""

from __future__ import annotations

import re

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor

from ksam_kernels import compact_batch, use_backend
from ksam_kernels.compact.operators import empty_rows
from ksam_kernels.native import extension
from tests.fuzz.strategies import Spec, copy_of, fuzz, layouts, seeds
from tests.helpers import FLOATS, bits
from tests.simt import backend as simt

pytestmark = pytest.mark.filterwarnings("ignore:ComplexHalf support is experimental")

DTYPES = (
    *(torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64),
    *(torch.uint16, torch.uint32, torch.uint64, torch.float8_e4m3fn, torch.float8_e5m2),
    *(torch.float16, torch.bfloat16, torch.float32, torch.float64),
    *(torch.complex32, torch.complex64, torch.complex128, torch.float4_e2m1fn_x2),
)
widths = st.sampled_from((0, 1, 2, 3, 5, 7, 8, 9, 16, 17, 33, 64, 65, 200, 4097))
row_shapes = st.one_of(
    st.just(()), widths.map(lambda n: (n,)), st.lists(st.integers(0, 5), max_size=4).map(tuple)
)
channels_last = st.tuples(*[st.integers(1, 4)] * 3)


@st.composite
def leaves(draw: st.DrawFn, rows: int) -> Spec:
    dtype = draw(st.sampled_from(DTYPES))
    if draw(st.integers(0, 3)) == 0:
        shape = (rows, *draw(channels_last), *draw(st.sampled_from([(), (3,)])))
        order = (0, *range(2, len(shape)), 1)
        return Spec(shape, dtype, "any bits", draw(seeds), order)
    shape = (rows, *draw(row_shapes))
    layout = draw(layouts(shape, expandable=True))
    return Spec(shape, dtype, "any bits", draw(seeds), **layout)  # type: ignore[arg-type]


trees = st.one_of(st.integers(1, 9), st.sampled_from((0, 33, 100))).flatmap(
    lambda rows: st.recursive(
        leaves(rows),
        lambda child: st.one_of(
            st.lists(child, max_size=5),
            st.lists(child, max_size=3).map(tuple),
            st.dictionaries(st.text("abc", max_size=2), child, max_size=4),
        ),
        max_leaves=8,
    )
)


@st.composite
def indices(draw: st.DrawFn) -> Spec:
    """[k], int32 or int64; the numbers are made once the batch is known."""
    k = draw(st.one_of(st.integers(0, 12), st.sampled_from((33, 100, 1000))))
    layout = draw(layouts((k,), expandable=True))
    dtype = draw(st.sampled_from((torch.int64, torch.int32)))
    return Spec((k,), dtype, "", draw(seeds), **layout)  # type: ignore[arg-type]


def flat(tree: object) -> list[Tensor]:
    if isinstance(tree, (Tensor, Spec)):
        return [tree.build() if isinstance(tree, Spec) else tree]
    children = tree.values() if isinstance(tree, dict) else tree
    return [leaf for child in children for leaf in flat(child)]  # type: ignore[attr-defined]


def built(tree: object) -> object:
    if isinstance(tree, Spec):
        return tree.build()
    if isinstance(tree, dict):
        return {key: built(child) for key, child in tree.items()}
    return type(tree)(built(child) for child in tree)  # type: ignore[attr-defined, call-arg]


def lazily(tree: object, flags: int) -> object:
    """Complex tensors conjugated or negated, which torch notes beside the memory."""
    if isinstance(tree, Tensor):
        if not tree.is_complex() or tree.dtype == torch.complex32:  # few operators take the latter
            return tree
        tree = tree.conj() if flags & 1 else tree
        return torch._neg_view(tree) if flags & 2 else tree
    if isinstance(tree, dict):
        return {key: lazily(child, flags) for key, child in tree.items()}
    return type(tree)(lazily(child, flags) for child in tree)  # type: ignore[attr-defined, call-arg]


def is_usual(source: Tensor) -> bool:
    """Whether the kernel has to take it itself, rather than leave it to the reference."""
    dtypes = (torch.bool, *FLOATS, torch.int32, torch.int64)
    return source.dtype in dtypes and source.is_contiguous() and source.numel() > 0


def takes(backend: str, batch: object, indices: Tensor) -> bool:
    """Whether the backend's kernel takes the batch, all tensors at once."""
    kernels = simt.extension if backend == "simt" else extension
    return kernels.compact(batch, indices, empty_rows) is not None  # type: ignore[union-attr]


def in_range(spec: Spec, rows: int) -> Tensor:
    return spec.build(lambda n, dtype, g: torch.randint(0, rows, (n,), dtype=dtype, generator=g))


@fuzz
@given(trees, indices(), st.sampled_from((0, 0, 1, 2, 3)))
@example(Spec((4, 3, 2, 2), torch.uint8, order=(0, 2, 3, 1)), Spec((3,), torch.int32), 0)
@example(
    [Spec((9, 3), torch.bool), Spec((9, 5), steps=(2, 1), offset=1)], Spec((5,), torch.int64), 0
)
def test_compact(backend: str, tree: object, spec: Spec, flags: int) -> None:
    batch = lazily(built(tree), flags)
    sources = flat(batch)
    rows = sources[0].shape[0] if sources else 1
    if rows == 0 and spec.shape[0] > 0:
        spec = Spec((0,), spec.dtype)
    chosen = in_range(spec, max(rows, 1))
    before = [bits(source) for source in sources]
    if backend != "reference" and all(map(is_usual, sources)):
        assert takes(backend, batch, chosen), "the kernel declined the usual batch"
    gathered = flat(compact_batch(batch, chosen))
    with use_backend("reference"):
        expected = flat(compact_batch(batch, chosen))
    for ours, theirs in zip(gathered, expected, strict=True):
        assert ours.dtype == theirs.dtype
        assert ours.shape == theirs.shape
        assert ours.stride() == theirs.stride()
        assert torch.equal(bits(ours), bits(theirs))
    assert all(map(torch.equal, map(bits, sources), before))


@fuzz
@given(trees, indices(), st.integers(0, 1000), st.sampled_from((-1, -7, 0, 1, 2**31 - 200)))
def test_an_index_out_of_range(backend: str, tree: object, spec: Spec, at: int, bad: int) -> None:
    batch = built(tree)
    sources = flat(batch)
    if not sources or spec.shape[0] == 0:
        return
    rows = sources[0].shape[0]
    chosen = copy_of(in_range(spec, max(rows, 1)))
    chosen[at % len(chosen)] = bad if bad < 0 else rows + bad
    with use_backend("reference"), pytest.raises(IndexError) as expected:
        compact_batch(batch, chosen)
    message = f"^{re.escape(str(expected.value))}$"
    if backend not in ("simt", "triton-interpreter"):
        with pytest.raises(IndexError, match=message):
            compact_batch(batch, chosen)
    elif any(source.shape[1:].numel() > 0 for source in sources):  # else no kernel runs
        # Which of the two depends on whether the kernel takes the first leaf with bytes.
        assertion = "device-side assert|AssertionError.*in range"
        with pytest.raises(Exception, match=f"{message}|{assertion}"):
            compact_batch(batch, chosen)
