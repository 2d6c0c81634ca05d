"""No kernel takes more of a GPU than the committed table says, none spills, none loads narrower."""

from __future__ import annotations

from functools import cache

import pytest

from tests.cuda import resources
from tests.cuda.resources import Usage

# ptxas gives out registers of a warp in steps of this many per thread; compilers differ by less.
STEP = 8


@cache
def measured() -> dict[tuple[str, str, str], Usage]:
    return {row.key: row for row in resources.measure()}


@pytest.fixture
def rows() -> dict[tuple[str, str, str], Usage]:
    """Every kernel as it compiles here and now."""
    reason = resources.missing()
    if reason is not None:
        pytest.skip(f"kernels are not compiled: {reason}")
    return measured()


def worse(now: Usage, table: Usage) -> list[str]:
    """What got worse since the table was written."""
    changes = []
    if now.registers >= table.registers + STEP:
        changes.append(f"{now.registers} registers, were {table.registers}")
    for name in ("shared_bytes", "stack_bytes", "spill_bytes"):
        if getattr(now, name) > getattr(table, name):
            changes.append(f"{getattr(now, name)} {name}, were {getattr(table, name)}")
    for name in ("load_bytes", "store_bytes"):
        if getattr(now, name) < getattr(table, name):
            changes.append(f"{getattr(now, name)} {name}, were {getattr(table, name)}")
    return changes


def test_the_table_has_every_kernel(rows: dict[tuple[str, str, str], Usage]) -> None:
    table = {row.key for row in resources.read_table()}
    assert table == set(rows), "python -m tests.cuda.resources writes the table"


def test_no_kernel_takes_more_than_the_table_says(rows: dict[tuple[str, str, str], Usage]) -> None:
    table = {row.key: row for row in resources.read_table()}
    found = {key: worse(row, table[key]) for key, row in rows.items() if key in table}
    assert not {" ".join(key): changes for key, changes in found.items() if changes}


def test_no_hot_kernel_in_the_table_spills() -> None:
    """Rows of mixed dtypes or layouts go element by element, and a division may cost a spill."""
    hot = [row for row in resources.read_table() if not row.kernel.startswith("strided_")]
    assert len(hot) > 200
    assert [row for row in hot if row.spill_bytes] == []


def test_what_got_worse_is_named() -> None:
    row = Usage("a.cu", "f", "sm_90", 40, 0, 0, 0, 16, 16)
    assert worse(row, row) == []
    assert worse(row._replace(registers=47, load_bytes=32), row) == []
    assert worse(row._replace(registers=48), row) == ["48 registers, were 40"]
    assert worse(row._replace(spill_bytes=4), row) == ["4 spill_bytes, were 0"]
    assert worse(row._replace(store_bytes=4), row) == ["4 store_bytes, were 16"]


def test_names_are_short() -> None:
    name = "void ksam::gpu::(anonymous namespace)::f<float, (ksam::Kind)1>(float const*, long)"
    assert resources.short_name(name) == "f<float, (Kind)1>"
    assert resources.short_name("g(int)") == "g"


def test_ptx_is_read() -> None:
    ptx = """
.visible .entry first(
.param .u64 a
)
{
ld.param.u64 %rd1, [a];
ld.shared.v4.u32 {%r1, %r2, %r3, %r4}, [%rd1];
ld.global.nc.L1::no_allocate.v4.f32 {%f1, %f2, %f3, %f4}, [%rd1];
ld.u8 %rs1, [%rd1];
st.global.v2.b32 [%rd1], {%r1, %r2};
}
.func other()
{
st.global.v4.b32 [%rd1], {%r1, %r2, %r3, %r4};
}
.entry second()
{
st.global.b128 [%rd1], %q1;
}
"""
    assert resources.widths(ptx) == {"first": {"ld": 16, "st": 8}, "second": {"ld": 0, "st": 16}}


def test_the_log_of_ptxas_is_read() -> None:
    log = """ptxas info    : 73 bytes gmem
ptxas info    : Compiling entry function 'f' for 'sm_80'
ptxas info    : Function properties for g
    400 bytes stack frame, 400 bytes spill stores, 400 bytes spill loads
ptxas info    : Function properties for f
    16 bytes stack frame, 8 bytes spill stores, 12 bytes spill loads
ptxas info    : Used 48 registers, used 1 barriers, 2048 bytes smem, 432 bytes cmem[0]
ptxas info    : Compiling entry function 'h' for 'sm_80'
ptxas info    : Function properties for h
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 6 registers, used 0 barriers
"""
    none = {"registers": 6, "shared_bytes": 0, "stack_bytes": 0, "spill_bytes": 0}
    f = {"registers": 48, "shared_bytes": 2048, "stack_bytes": 16, "spill_bytes": 8}
    assert resources.registers(log) == {"f": f, "h": none}
