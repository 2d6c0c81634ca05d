"""Turns, pools, quartiles and ratios: the arithmetic behind every printed number."""

from __future__ import annotations

import gc
import itertools
from types import SimpleNamespace

import pytest
import torch

from benchmarks.environment import last_level_cache_bytes
from benchmarks.kernels.timing import copy_bandwidth, pool_size, time_in_turns
from benchmarks.timing import Plan, Quartiles, ratios, rotated

CPU = torch.device("cpu")


def rounds(count: int) -> Plan:
    return Plan(rounds=count, seconds=0, few_rounds=count, max_seconds=1e9)


def busy(log: list[tuple[str, int]], name: str):  # type: ignore[no-untyped-def]
    """A contestant that notes its inputs and takes longer than the shortest sample."""
    work = torch.ones(1 << 20)

    def run(input: int) -> None:
        log.append((name, input))
        work.exp()

    return run


@pytest.mark.parametrize(
    ("hip", "l2", "found"),
    [(None, 50, 50), ("6.4", 4, 256), ("6.4", 300, 300)],
    ids=["NVIDIA", "AMD", "a larger L2"],
)
def test_the_cache_behind_amds_l2_is_counted(
    hip: str | None, l2: int, found: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    properties = SimpleNamespace(L2_cache_size=l2 << 20)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setattr(torch.version, "hip", hip)
    assert last_level_cache_bytes(torch.device("cuda", 0)) == found << 20


def test_contestants_alternate_in_rotated_order_on_fresh_inputs() -> None:
    log: list[tuple[str, int]] = []
    runs = {name: busy(log, name) for name in "abc"}
    times = time_in_turns(runs, range(4), rounds(3), CPU)
    assert {name: len(values) for name, values in times.items()} == {"a": 3, "b": 3, "c": 3}
    assert all(seconds > 0 for values in times.values() for seconds in values)
    # Samples of a contestant may hold several calls; in which order they come is what counts.
    turns = [name for name, _ in itertools.groupby(name for name, _ in log)]
    assert "".join(turns) == "abc" + "abc" + "bca" + "cab"  # warm-up, then three rounds
    # One cycle through the pool for all.
    assert [input for _, input in log] == [i % 4 for i in range(len(log))]


def test_rotation_gives_every_place_to_every_contestant() -> None:
    assert [rotated("abc", turn) for turn in range(4)] == [
        ["a", "b", "c"], ["b", "c", "a"], ["c", "a", "b"], ["a", "b", "c"],
    ]  # fmt: skip


def test_plan_needs_its_rounds_and_its_seconds() -> None:
    plan = Plan(rounds=3, seconds=1.0, few_rounds=2, max_seconds=9.0, max_rounds=5)
    assert not plan.done(2, 8.0)
    assert plan.done(2, 9.0)
    assert not plan.done(1, 99.0)
    assert plan.done(3, 1.0)
    assert not plan.done(4, 0.5)
    assert plan.done(5, 0.5)


def test_pool_outgrows_the_cache() -> None:
    cache = last_level_cache_bytes(CPU)
    assert cache >= 1 << 20
    for size in (1, 1000, cache // 10, cache, 10 * cache):
        inputs = pool_size(size, CPU)
        assert 2 <= inputs <= 64
        assert inputs >= 8 or inputs * size >= 4 * cache
    assert pool_size(100, CPU) == 64


def test_quartiles() -> None:
    assert Quartiles.of([3.0]) == Quartiles(3.0, 3.0, 3.0)
    assert Quartiles.of([5.0, 1.0, 2.0, 4.0, 3.0]) == Quartiles(2.0, 3.0, 4.0)


def test_ratios_are_taken_within_rounds() -> None:
    assert ratios([2.0, 8.0], [1.0, 16.0]) == [2.0, 0.5]
    with pytest.raises(ValueError, match="argument 2 is longer"):
        ratios([1.0], [1.0, 2.0])


def test_garbage_collection_is_off_while_timing_and_on_again_after_an_error() -> None:
    seen = []

    def run(_: int) -> None:
        seen.append(gc.isenabled())
        raise KeyboardInterrupt

    assert gc.isenabled()
    with pytest.raises(KeyboardInterrupt):
        time_in_turns({"a": run}, [0], rounds(1), CPU)
    assert seen == [False]
    assert gc.isenabled()


def test_copy_bandwidth_is_that_of_memory() -> None:
    assert 1e8 < copy_bandwidth(CPU, megabytes=4, rounds=2) < 1e13
