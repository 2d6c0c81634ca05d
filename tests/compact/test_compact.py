"""Contract of ``compact_batch``: which bytes arrive, and which indices it refuses."""

from __future__ import annotations

import weakref

import pytest
import torch
from torch import Tensor

from ksam_kernels import compact_batch
from ksam_kernels.native import extension
from tests.helpers import any_bits, bits, raises_out_of_range, same_bits, threads

DTYPES = (
    *(torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64),
    *(torch.uint16, torch.uint32, torch.uint64),
    *(torch.float16, torch.bfloat16, torch.float32, torch.float64),
    *(torch.complex32, torch.complex64, torch.complex128),
    *(torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e8m0fnu, torch.float8_e4m3fnuz),
    torch.float4_e2m1fn_x2,
)


def patterns(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    if dtype == torch.bool:
        return torch.randint(0, 2, shape).bool()
    return any_bits(shape, dtype)


def rows_of(source: Tensor, indices: list[int]) -> Tensor:
    """The rows' bytes, one at a time in plain Python."""
    raw = source.contiguous()
    raw = torch.view_as_real(raw) if raw.is_complex() else raw
    raw = raw.view(torch.uint8) if raw.dim() > 1 else raw.unsqueeze(1).view(torch.uint8)
    return torch.tensor([raw[i].flatten().tolist() for i in indices], dtype=torch.uint8)


def check_rows(source: Tensor, indices: list[int], index_dtype: torch.dtype = torch.int64) -> None:
    before = bits(source)
    rows = compact_batch(source, torch.tensor(indices, dtype=index_dtype))
    assert rows.dtype == source.dtype
    assert rows.shape == (len(indices), *source.shape[1:])
    if rows.numel() > 0:
        whole = list(range(len(indices)))
        assert torch.equal(rows_of(rows, whole), rows_of(source, indices))
    assert torch.equal(bits(source), before)


@pytest.mark.parametrize("shape", [(8,), (8, 1), (8, 3), (8, 2, 5)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_are_bytes_of_any_dtype(
    backend: str, dtype: torch.dtype, shape: tuple[int, ...]
) -> None:
    source = patterns(shape, dtype)
    for indices in ([0, 3, 4, 7], [5], [7, 0, 0, 2, 7], list(range(8)), []):
        check_rows(source, indices)
        check_rows(source, indices, torch.int32)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_nan_payloads_and_negative_zero_survive(backend: str, dtype: torch.dtype) -> None:
    source = any_bits((64, 3), dtype)
    assert source.isnan().any()
    assert bits(source)[source.isnan()].unique().numel() > 1
    assert bits(source)[0, 0] != 0  # -0.0
    assert same_bits(compact_batch(source, torch.arange(64)), source.clone())


WIDTHS = (*range(1, 18), 31, 32, 33, 47, 48, 63, 64, 65, 100, 4095, 4096, 4097)


@pytest.mark.parametrize("width", WIDTHS)
def test_rows_of_any_number_of_bytes(backend: str, width: int) -> None:
    check_rows(patterns((5, width), torch.uint8), [4, 1, 1, 0])


@pytest.mark.parametrize("offset", [1, 3, 8])
def test_rows_of_any_alignment(backend: str, offset: int) -> None:
    for width in WIDTHS:
        check_rows(patterns((offset + 5 * width,), torch.uint8)[offset:].view(5, width), [4, 0, 1])


def test_leaves_of_all_row_sizes_in_one_call(backend: str) -> None:
    batch = [patterns((9, width), torch.uint8) for width in WIDTHS]
    indices = [8, 0, 3, 3, 5]
    for source, rows in zip(batch, compact_batch(batch, torch.tensor(indices)), strict=True):
        assert torch.equal(rows, source[indices])


@pytest.mark.parametrize("vector", [1, 2, 4, 8, 16])
@pytest.mark.parametrize("width", [1023, 1024, 1025])
def test_rows_about_as_long_as_what_a_block_copies(backend: str, vector: int, width: int) -> None:
    source = patterns((4, width * vector), torch.uint8)
    indices = [3, 0, 1, 1, 2]
    assert torch.equal(compact_batch(source, torch.tensor(indices)), source[indices])


@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize(
    "widths",
    [(700_001,), (1, 2, 500_000, 3), (30_000,) * 40, (8,) * 3 + (20_000,) * 20 + (1, 17)],
    ids=["one huge leaf", "one huge leaf among tiny ones", "equal leaves", "many leaves"],
)
def test_every_row_arrives_for_any_number_of_threads(
    backend: str, count: int, widths: tuple[int, ...]
) -> None:
    batch = [patterns((6, width), torch.uint8) for width in widths]
    with threads(count):
        gathered = compact_batch(batch, torch.tensor([5, 0, 2, 2]))
    for source, rows in zip(batch, gathered, strict=True):
        assert torch.equal(rows, source[[5, 0, 2, 2]])


def test_order_and_repeats_of_the_indices_are_kept(backend: str) -> None:
    rows = compact_batch(torch.arange(10) * 10, torch.tensor([9, 2, 2, 0, 9]))
    assert rows.tolist() == [90, 20, 20, 0, 90]


def test_no_indices_give_no_rows(backend: str) -> None:
    batch = {"x": torch.randn(4, 3), "y": torch.arange(4)}
    rows = compact_batch(batch, torch.zeros(0, dtype=torch.int64))
    assert rows["x"].shape == (0, 3)
    assert rows["y"].shape == (0,)
    assert compact_batch(torch.randn(0, 3), torch.zeros(0, dtype=torch.int32)).shape == (0, 3)


def test_rows_without_elements(backend: str) -> None:
    batch = (torch.randn(4, 0), torch.randn(4, 2, 0), torch.arange(4))
    first, second, third = compact_batch(batch, torch.tensor([3, 1, 1]))
    assert first.shape == (3, 0)
    assert second.shape == (3, 2, 0)
    assert third.tolist() == [3, 1, 1]


def test_sources_need_not_be_contiguous(backend: str) -> None:
    x = torch.randn(6, 8, 5)
    for source in (x.transpose(1, 2), x.transpose(0, 1)[:6], x[::2], x[:, 1::2], x[..., 2:4]):
        check_rows(source, [2, 0, 2])
        rows = compact_batch(source, torch.tensor([2, 0, 2]))
        assert rows.is_contiguous()
    check_rows(torch.randn(1, 5).expand(6, 5), [5, 0])
    check_rows(torch.randn(6, 1).expand(6, 5), [5, 0])
    check_rows(torch.arange(20)[3::4], [3, 0])
    check_rows(torch.randn(6, 9)[:, :4], [5, 0, 5])  # the beginnings of sequences
    check_rows(torch.randn(6, 2, 9)[:, :1, 3:], [5, 0, 5])
    check_rows(torch.randn(6, 4, 3, 3)[:, 1:3], [5, 0])


def test_a_tensor_with_gaps_leaves_the_others_as_they_are(backend: str) -> None:
    batch = {"x": torch.randn(6, 4), "y": torch.randn(6, 4)[:, ::2], "z": torch.arange(6)}
    rows = compact_batch(batch, torch.tensor([5, 0, 5]))
    assert all(torch.equal(rows[key], batch[key][[5, 0, 5]]) for key in batch)


@pytest.mark.parametrize("between", [9, 1], ids=["gaps out of range", "gaps in range"])
@pytest.mark.parametrize("dtype", [torch.int64, torch.int32], ids=str)
def test_indices_need_not_be_contiguous(backend: str, dtype: torch.dtype, between: int) -> None:
    x = {"small": torch.arange(6), "large": torch.randn(6, 40)}
    indices = torch.tensor([5, between, 0, between, 3, between], dtype=dtype)[::2]
    rows = compact_batch(x, indices)
    assert rows["small"].tolist() == [5, 0, 3]
    assert torch.equal(rows["large"], x["large"][[5, 0, 3]])
    assert compact_batch(x["small"], indices[1].expand(4)).tolist() == [0, 0, 0, 0]


@pytest.mark.parametrize(
    ("shape", "memory_format"),
    [((6, 3, 4, 5), torch.channels_last), ((6, 3, 2, 4, 5), torch.channels_last_3d)],
    ids=["channels last", "channels last 3d"],
)
def test_the_memory_format_is_kept(
    backend: str, shape: tuple[int, ...], memory_format: torch.memory_format
) -> None:
    source = torch.randn(shape).contiguous(memory_format=memory_format)
    check_rows(source, [5, 0, 5])
    rows = compact_batch({"nhwc": source, "nchw": source.contiguous()}, torch.tensor([5, 0, 5]))
    assert rows["nhwc"].is_contiguous(memory_format=memory_format)
    assert not rows["nhwc"].is_contiguous()
    assert rows["nchw"].is_contiguous()
    assert torch.equal(rows["nhwc"], rows["nchw"])


def test_a_slice_of_channels_last_samples(backend: str) -> None:
    images = torch.randn(6, 3, 4, 5).contiguous(memory_format=torch.channels_last)
    check_rows(images[::2], [2, 0])
    check_rows(images[2:], [2, 0])
    check_rows(images[:, :2], [2, 0])
    assert compact_batch(images[2:], torch.tensor([2, 0])).stride() == (60, 1, 15, 3)


@pytest.mark.usefixtures("native")
def test_the_native_kernel_itself_takes_rows_that_are_blocks_of_memory(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("ksam_kernels.compact.reference.compact", None)
    images = torch.randn(6, 3, 4, 5)
    last = images.contiguous(memory_format=torch.channels_last)
    batch = [images, images[::2].repeat_interleave(2, 0), last, images[:, :2], images.bfloat16()]
    batch += [torch.ones(1, 3).expand(6, 3), torch.randn(6, 9)[:, 2:5], torch.ones(6).bool()]
    rows = compact_batch(batch, torch.tensor([5, 0]))
    assert all(
        same_bits(of_one, source[[5, 0]]) for of_one, source in zip(rows, batch, strict=True)
    )


@pytest.mark.parametrize("dtype", [torch.bits8, torch.bits16, torch.uint4], ids=str)
def test_dtypes_that_only_carry_bits(backend: str, dtype: torch.dtype) -> None:
    source = patterns((6, 3), torch.uint8 if dtype.itemsize == 1 else torch.int16)
    rows = compact_batch(source.view(dtype), torch.tensor([5, 0]))
    assert rows.dtype == dtype
    assert torch.equal(rows.view(source.dtype), source[[5, 0]])


def test_conjugate_and_negative_views_are_resolved(backend: str) -> None:
    z = torch.randn(5, 3, dtype=torch.complex64)
    assert z.conj().is_conj()
    assert z.conj().imag.is_neg()
    indices = torch.tensor([4, 0])
    assert torch.equal(compact_batch(z.conj(), indices), z[indices].conj().resolve_conj())
    assert torch.equal(compact_batch(z.conj().imag, indices), -z[indices].imag)


def test_many_leaves_of_many_dtypes_in_one_call(backend: str) -> None:
    batch = [patterns((9, i % 5 + 1), dtype) for i, dtype in enumerate(DTYPES * 3)]
    indices = [8, 1, 1, 3]
    for source, rows in zip(batch, compact_batch(batch, torch.tensor(indices)), strict=True):
        assert torch.equal(rows_of(rows, [0, 1, 2, 3]), rows_of(source, indices))


@pytest.mark.parametrize("bad", [-1, 4, 2**31 - 1], ids=["negative", "B", "huge"])
@pytest.mark.parametrize("index", [torch.int64, torch.int32], ids=str)
def test_an_index_out_of_range_raises(backend: str, index: torch.dtype, bad: int) -> None:
    batch = (torch.arange(4), torch.randn(4, 2))
    with raises_out_of_range(backend, f"indices holds {bad}, out of range for a batch of 4"):
        compact_batch(batch, torch.tensor([0, bad, 1], dtype=index))


def test_the_index_named_is_the_lowest_if_negative_else_the_highest(backend: str) -> None:
    x = torch.arange(4)
    with raises_out_of_range(backend, "indices holds -7,"):
        compact_batch(x, torch.tensor([0, 9, -1, -7]))
    with raises_out_of_range(backend, "indices holds 9,"):
        compact_batch((x, x), torch.tensor([0, 4, 9, 5], dtype=torch.int32))


def test_an_index_into_an_empty_batch_raises(backend: str) -> None:
    with raises_out_of_range(backend, "indices holds 0, out of range for a batch of 0"):
        compact_batch(torch.zeros(0, 3), torch.tensor([0]))


@pytest.mark.parametrize(
    "dtype",
    [torch.bool, torch.float32, torch.uint8, torch.int16, torch.uint32, torch.uint64],
    ids=str,
)
def test_indices_of_another_dtype_raise(backend: str, dtype: torch.dtype) -> None:
    with pytest.raises(TypeError, match=f"indices must be int64, int32, got {dtype}"):
        compact_batch(torch.arange(4), torch.ones(4, dtype=dtype))


@pytest.mark.parametrize("shape", [(), (2, 2), (1, 1)], ids=str)
def test_indices_of_another_rank_raise(backend: str, shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="indices must be one-dimensional, got shape"):
        compact_batch(torch.arange(4), torch.zeros(shape, dtype=torch.int64))


def test_indices_that_are_no_tensor_raise(backend: str) -> None:
    with pytest.raises(TypeError, match="indices must be a tensor, got list"):
        compact_batch(torch.arange(4), [0, 1])  # type: ignore[arg-type]


@pytest.mark.usefixtures("native")
def test_tensors_live_on_whatever_becomes_of_the_batch() -> None:
    """Another thread may change it while memory is made for the rows, or while they are copied."""
    batch: dict[str, Tensor] = {name: torch.randn(6, 9)[:, 2:5] for name in "xy"}
    expected = {name: tensor[[5, 0]] for name, tensor in batch.items()}
    watched, alive = weakref.ref(batch["x"]), []

    def empty_rows(tensor: Tensor, k: int) -> Tensor:
        batch.clear()
        alive.append(watched() is not None)
        return tensor.new_empty(k, *tensor.shape[1:])

    rows = extension.compact(batch, torch.tensor([5, 0]), empty_rows)
    assert alive == [True, True]
    assert list(rows) == list(expected)
    assert all(same_bits(rows[name], expected[name]) for name in expected)
