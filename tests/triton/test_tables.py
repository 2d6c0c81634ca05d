"""What Triton kernels are handed: tables of addresses, kept while right; and where there are none.

CPU tensors stand for a GPU's: nothing here is launched.
"""

from __future__ import annotations

import subprocess
import sys
from array import array
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

import ksam_kernels
from ksam_kernels import backends, native, triton_support, use_backend
from ksam_kernels.perturb import triton as launches
from ksam_kernels.perturb import triton_table
from ksam_kernels.perturb.triton_table import CHUNK, HEAD, Rows, Table
from tests.helpers import sliced, transposed


def tables(*operands: list[Tensor], values: list[int] | None = None) -> list[Table]:
    return Rows(*operands, values=values).tables()


@pytest.fixture
def eager() -> Iterator[None]:
    """Calls are made as the public functions make them."""
    with backends.caching_allowed():
        yield


def test_records_say_where_everything_is() -> None:
    a, b = torch.zeros(2 * CHUNK + 1), torch.zeros(CHUNK, dtype=torch.float16)
    c, nothing = torch.zeros(8)[1:], torch.zeros(0)
    rows = Rows([a, b, nothing, c], [t.clone() for t in (a, b, nothing, c)], values=[5, 6, 7, 8])
    single, half = rows.tables()
    assert single.dtypes == (torch.float32,) * 2
    assert half.dtypes == (torch.float16,) * 2
    assert single.records.shape == (2, HEAD + 2)
    assert single.records[:, :HEAD].tolist() == [[2 * CHUNK + 1, 0, 1, 5], [7, 3, 0, 8]]
    assert single.records[:, HEAD].tolist() == [a.data_ptr(), c.data_ptr()]
    assert single.chunk_rows.tolist() == [0, 0, 0, 1]
    assert half.records[:, :HEAD].tolist() == [[CHUNK, 0, 1, 6]]
    assert half.chunk_rows.tolist() == [0]
    assert [row[0].data_ptr() for row in rows.tensors(half)] == [b.data_ptr()]


def test_one_combination_of_dtypes_is_one_table() -> None:
    params = [torch.zeros(3, dtype=d) for d in (torch.float32, torch.float16, torch.float32)]
    assert len(tables(params, [torch.zeros(3) for _ in params])) == 2


LISTS = {
    "one dtype": lambda: [[torch.zeros(5), torch.zeros(2, 3)] for _ in range(3)],
    "chunks": lambda: [[torch.zeros(n) for n in (CHUNK, 1, 0, 2 * CHUNK + 1)] for _ in range(2)],
    "dtypes in turns": lambda: [
        [torch.zeros(3, dtype=d) for d in triton_table._DTYPES * 2],
        [torch.zeros(3) for _ in range(8)],
    ],
    "addresses": lambda: [[torch.zeros(9)[i:8] for i in range(8)] for _ in range(5)],
    "layouts": lambda: [
        [
            torch.zeros(2, 3, 4, 5).to(memory_format=torch.channels_last),
            transposed(torch.zeros(3, 4)),
        ]
        for _ in range(2)
    ],
    "dimensions of one element": lambda: [[torch.zeros(4, 9)[:, :1].t()[:, :1]] for _ in range(2)],
    "nothing": lambda: [[], []],
}


@pytest.mark.skipif(native.extension is None, reason="there is no extension")
@pytest.mark.parametrize("make", LISTS.values(), ids=LISTS)
def test_the_extension_makes_the_same_records(
    make: Callable[[], list[list[Tensor]]],
) -> None:
    operands = make()
    for values in (None, [(-1) ** i * (2**62 + i) for i in range(len(operands[0]))]):
        assert triton_table._described(tuple(operands), values) is not None
        ours = Rows(*operands, values=values)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(triton_table, "extension", None)
            pythons = Rows(*operands, values=values)
        assert list(ours._records.items()) == list(pythons._records.items())
        for one, other in zip(ours.tables(), pythons.tables(), strict=True):
            assert torch.equal(one.records, other.records)
            assert torch.equal(one.chunk_rows, other.chunk_rows)


@pytest.mark.parametrize(
    "other",
    [
        lambda: sliced(torch.zeros(4, 6)),
        lambda: transposed(torch.zeros(4, 6)),
        lambda: torch.zeros(1, 1).expand(4, 6),
        lambda: torch._neg_view(torch.zeros(4, 6, dtype=torch.complex64).real),
        lambda: torch.zeros(4, 6).as_subclass(type("Other", (Tensor,), {})),
    ],
    ids=["gaps", "another order", "one element", "a negative view", "a subclass"],
)
def test_the_extension_leaves_what_must_be_copied(other: Callable[[], Tensor]) -> None:
    plain = torch.zeros(4, 6)
    assert triton_table._described(([plain, plain], [plain, other()]), None) is None
    assert len(tables([plain, plain], [plain, other()])) == 1


@pytest.mark.parametrize("looked", [True, False], ids=["extension", "Python"])
def test_one_device_or_several(looked: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not looked:
        monkeypatch.setattr(launches, "extension", None)
    here, there = torch.zeros(2), torch.zeros(2, device="meta")
    assert launches._have_one_device(([here, here], [here], [0.1, 0.1], True, None))
    assert not launches._have_one_device(([here], [here, there], 0.1))
    assert not launches._have_one_device(([here, here], [there], [], 0.1))
    assert not launches._have_one_device(([], [], 0.1))


@pytest.mark.usefixtures("eager")
def test_a_table_is_kept_by_addresses_and_sizes_not_by_tensors() -> None:
    w, g, other = torch.zeros(9), torch.zeros(9), torch.zeros(9)
    (first,) = tables([w], [g])
    assert tables([w.view(3, 3)], [g.detach().view(3, 3)])[0] is first
    assert tables([w[:8]], [g[:8]])[0] is not first
    assert tables([w], [other])[0].records[0, HEAD:].tolist() == [w.data_ptr(), other.data_ptr()]
    assert tables([w.view(torch.int32).view(torch.float32)], [g])[0] is first


@pytest.mark.usefixtures("eager")
def test_tables_of_the_same_sizes_share_what_says_whose_a_chunk_is() -> None:
    w, g = torch.zeros(2 * CHUNK + 1), torch.zeros(3)
    (first,), (second,) = tables([w, g], values=[1, 2]), tables([w.clone(), g], values=[3, 4])
    assert second.records is not first.records
    assert second.chunk_rows is first.chunk_rows
    assert first.chunk_rows.tolist() == [0, 0, 0, 1]
    assert tables([g, w])[0].chunk_rows.tolist() == [0, 1, 1, 1]


@pytest.mark.usefixtures("eager")
def test_no_more_tables_are_kept_than_a_few_steps_need() -> None:
    w = torch.zeros(1000)
    for n in range(1, 200):
        tables([w[:n]])
        triton_support.device_ints((n,), w.device)
    assert triton_table._kept_table.cache_info().currsize == 32
    assert triton_table._kept_chunk_rows.cache_info().currsize == 32
    assert triton_support._kept.cache_info().currsize == 64


@pytest.mark.usefixtures("eager")
def test_a_captured_table_is_the_graphs_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing that was kept may be part of a graph, nor anything of a graph be kept."""
    w = torch.zeros(CHUNK + 1)
    (outside,) = tables([w])
    kept = triton_support.device_ints((1, 2), w.device)
    monkeypatch.setattr(triton_support, "is_capturing", lambda device: True)
    (one,), (two,) = tables([w]), tables([w])
    assert one is not two
    assert all(table.records is not outside.records for table in (one, two))
    assert torch.equal(one.records, outside.records)
    assert torch.equal(one.chunk_rows, outside.chunk_rows)
    captured = triton_support.device_ints((1, 2), w.device)
    assert captured is not kept
    monkeypatch.undo()
    assert tables([w])[0] is outside
    assert triton_support.device_ints((1, 2), w.device) is kept


def test_a_compiled_program_keeps_no_table() -> None:
    """Its memory may be that of a graph which is captured next."""
    w = torch.zeros(CHUNK + 1)
    seen = []

    def look(*args: object) -> None:
        seen.append((tables([w])[0], triton_support.device_ints((1, 2), w.device)))

    with pytest.MonkeyPatch.context() as patch, use_backend("reference"):
        patch.setitem(backends._kernels["reference"], "restore_", look)
        ksam_kernels.restore_([w], [w.clone()])
        torch.ops.ksam.restore_([w], [w.clone()])
        torch.ops.ksam.restore_([w], [w.clone()])
        ksam_kernels.restore_([w], [w.clone()])
    for first, second, third, last in zip(*seen, strict=True):
        assert last is first
        assert len({id(first), id(second), id(third)}) == 3


def test_values_that_go_by_the_arguments_of_kernels_arrive_exactly() -> None:
    for values in ([0, 1, -1, 2**62 + 1, 2**53 + 1, -(2**63), 2**63 - 1], []):
        assert triton_support._by_value(array("q", values), torch.device("cpu")).tolist() == values
        assert triton_support.upload(array("q", values), torch.device("cpu")).tolist() == values


@pytest.mark.parametrize("value", [0.1, -0.0, 1e-300, float("inf"), 3.0])
def test_doubles_keep_all_their_bits(value: float) -> None:
    bits = torch.tensor(triton_support.double_bits(value), dtype=torch.int64)
    assert torch.equal(bits, torch.tensor(value, dtype=torch.float64).view(torch.int64))


@pytest.mark.parametrize("layout", ["sliced", "transposed gradient", "expanded gradient"])
def test_rows_of_several_layouts_are_worked_on_in_copies(layout: str) -> None:
    w, g = torch.randn(4, 6), torch.randn(4, 6)
    if layout == "sliced":
        w = sliced(w)
    else:
        g = transposed(g) if layout == "transposed gradient" else torch.ones(1, 1).expand(4, 6)
    rows = Rows([w], [g], written=(0,))
    ((used_w, used_g),) = rows.tensors(rows.tables()[0])
    assert used_w.is_contiguous()
    assert used_g.is_contiguous()
    assert torch.equal(used_w, w)
    assert torch.equal(used_g, g)
    used_w.fill_(7)
    rows.finish()
    assert (w == 7).all()


@pytest.mark.parametrize("order", ["channels last", "transposed"])
def test_rows_of_one_layout_without_gaps_are_worked_on_in_place(order: str) -> None:
    w = torch.randn(2, 3, 4, 5)
    format_ = torch.channels_last
    w = w.contiguous(memory_format=format_) if order == "channels last" else transposed(w)
    rows = Rows([w], [torch.zeros_like(w)])
    assert rows.tensors(rows.tables()[0])[0][0].data_ptr() == w.data_ptr()


@pytest.mark.parametrize(
    ("hip", "advice"),
    [(None, "pip install triton"), ("6.4", "install torch for ROCm with its dependencies")],
)
def test_without_triton_the_report_says_why(hip: str | None, advice: str) -> None:
    code = f"""
import importlib.util
find = importlib.util.find_spec
importlib.util.find_spec = lambda name, *args: None if name == "triton" else find(name, *args)
import torch
torch.version.hip = {hip!r}
from ksam_kernels import backends
print(backends.why_not("triton", "restore_", torch.device("cuda")))
"""
    result = subprocess.run(
        [sys.executable, "-c", code], check=True, capture_output=True, text=True
    )
    assert result.stdout.strip() == f"this installation has no Triton: {advice}"
