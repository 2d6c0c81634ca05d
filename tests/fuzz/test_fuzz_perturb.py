"""Lists of any tensors whatever: the reference's bits, and nothing written beside them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from hypothesis import event, example, given
from hypothesis import strategies as st
from torch import Tensor

from ksam_kernels import grad_norm, perturb_, restore_, restore_adam_, restore_sgd_, use_backend
from tests.fuzz.strategies import (
    ANY,
    FINITE,
    Spec,
    copy_of,
    dtypes,
    fuzz,
    gaps,
    same_numbers,
    shapes,
    specs,
)
from tests.helpers import arithmetic_unit, assert_within, same_bits, smallest, threads, unit

F32 = torch.float32


@dataclass(frozen=True)
class Row:
    """All tensors of one parameter; what a call does not use is not built."""

    param: Spec
    grad: Spec
    backup: Spec
    states: tuple[Spec, Spec]
    step: float = 0.0
    rho: float = 0.05


@st.composite
def rows(draw: st.DrawFn) -> list[Row]:
    """Mostly of one kind of numbers and one dtype, as models are, but not always."""
    kinds = [draw(st.sampled_from(ANY))] if draw(st.booleans()) else FINITE
    usual = draw(dtypes)
    steps = st.sampled_from((0.0, 0.0, 1.0, 2.0, 7.0, 1000.0, 2.0**24))
    found = []
    for _ in range(draw(st.integers(0, 5))):
        shape = draw(shapes)
        dtype = draw(st.one_of(st.just(usual), dtypes))
        other = draw(st.one_of(st.just(dtype), dtypes))
        found.append(
            Row(
                draw(specs(shape, dtype, kinds)),
                draw(specs(shape, other, kinds, expandable=True)),
                draw(specs(shape, dtype, kinds)),
                (draw(specs(shape, draw(st.just(other)), kinds)), draw(specs(shape, None, kinds))),
                draw(steps),
                draw(st.sampled_from((0.0, 0.05, 1.0, 1e-30, 1e20))),
            )
        )
    return found


def plain(*shape: int, dtype: torch.dtype = F32, kind: str = "normal", grad: str = "") -> Row:
    """A row for an example."""
    one, two, three, four, five = (Spec(shape, dtype, kind, seed) for seed in range(5))
    return Row(one, replace(two, kind=grad or kind), three, (four, five))


def built(found: list[Spec]) -> list[Tensor]:
    return [spec.build() for spec in found]


@dataclass
class Lists:
    """What a call reads and writes, and copies of it."""

    written: dict[str, list[Tensor]]
    read: dict[str, list[Tensor]] = field(default_factory=dict)

    def run(self, backend: str, call: Callable[..., Any]) -> tuple[Any, Lists]:
        copies = {name: [copy_of(t) for t in found] for name, found in self.written.items()}
        read = {name: [copy_of(t) for t in found] for name, found in self.read.items()}
        with use_backend(backend):
            result = call(**copies, **read)
        for name, found in self.read.items():
            assert all(map(same_bits, found, read[name])), f"{name} was written"
        for name, found in self.written.items():
            for before, after in zip(found, copies[name], strict=True):
                assert torch.equal(gaps(before), gaps(after)), f"memory around {name} was written"
        return result, Lists(copies)


def check(ours: Lists, expected: Lists, *names: str, same: Any = same_numbers) -> None:
    for name in names or expected.written:
        for i, (a, e) in enumerate(zip(ours.written[name], expected.written[name], strict=True)):
            assert same(a, e), f"{name}[{i}]: {a} instead of {e}"


def neighbours(a: Tensor, b: Tensor) -> bool:
    """Equal, or next to each other: sums in float64 in another order round alike almost always."""
    steps = torch.nextafter(a, b)
    return bool((a == b) | (steps == b) | (a.isnan() & b.isnan()))


etas = st.sampled_from((0.0, 0.01, 1.0))


@fuzz
@given(rows(), st.booleans(), etas)
@example([plain(4097, kind="special")], False, 0.0)
def test_grad_norm(backend: str, found: list[Row], adaptive: bool, eta: float) -> None:
    grads = built([row.grad for row in found])
    params = built([row.param for row in found]) if adaptive else None
    norms = []
    for count in (1, 3):
        with threads(count):
            norms.append(grad_norm(grads, params, eta))
    with use_backend("reference"):
        expected = grad_norm(grads, params, eta)
    assert same_bits(*norms) or norms[0].isnan()
    assert neighbours(norms[0], expected)


@fuzz
@given(rows(), st.booleans(), etas, st.one_of(st.none(), st.sampled_from((0.0, 0.05, -0.3, 3.0))))
@example([plain(513, dtype=torch.bfloat16)], True, 0.01, None)
@example([plain(33, kind="nan payloads", grad="zeros")], False, 0.0, 0.05)
def test_perturb(
    backend: str, found: list[Row], adaptive: bool, eta: float, one_rho: float | None
) -> None:
    rho = [row.rho for row in found] if one_rho is None else one_rho
    lists = Lists(
        {
            "params": built([row.param for row in found]),
            "backup": built([row.backup for row in found]),
        },
        {"grads": built([row.grad for row in found])},
    )

    def call(**tensors: list[Tensor]) -> Tensor:
        return perturb_(**tensors, rho=rho, adaptive=adaptive, eta=eta)

    norm, ours = lists.run(backend, call)
    expected_norm, expected = lists.run("reference", call)
    assert neighbours(norm, expected_norm)
    radii = rho if isinstance(rho, list) else [rho] * len(found)
    moves = 0 < expected_norm < float("inf")
    check(ours, expected, "backup", same=same_bits)
    assert all(map(same_bits, ours.written["backup"], lists.written["params"]))
    for before, w, e, radius in zip(
        lists.written["params"], ours.written["params"], expected.written["params"], radii,
        strict=True,
    ):  # fmt: skip
        if not moves or radius == 0:
            assert same_bits(e, before)
            assert same_bits(w, before)
        elif w.dtype != torch.float64 and norm == expected_norm:
            assert same_numbers(w, e)
        else:  # the norm itself is read, rounded in another order
            event("norm of other bits")
            e = e.double()
            moved = (e - before.double()).nan_to_num(0, 0, 0).abs()
            relative = 1e-14 if w.dtype == torch.float64 else unit(F32) * 4
            assert_within(w, e, relative * moved + 2 * unit(w.dtype) * e.abs() + smallest(w.dtype))


@fuzz
@given(rows())
@example([plain(2065, kind="nan payloads")])
def test_restore(backend: str, found: list[Row]) -> None:
    lists = Lists(
        {"params": built([row.param for row in found])},
        {"backup": built([row.backup for row in found])},
    )
    _, ours = lists.run(backend, lambda params, backup: restore_(params, backup))
    assert all(map(same_bits, ours.written["params"], lists.read["backup"]))


@st.composite
def scaling(draw: st.DrawFn) -> dict[str, Any]:
    scale = draw(st.sampled_from((None, 3.0, 65536.0, float("nan"))))
    found_inf = draw(st.sampled_from((None, 0.0, 0.0, -0.0, 1.0, float("nan"))))
    return {
        "maximize": draw(st.booleans()),
        "grad_scale": None if scale is None else torch.full((1,), scale),
        "found_inf": None if found_inf is None else torch.full((), found_inf),
    }


@st.composite
def sgd_options(draw: st.DrawFn) -> dict[str, Any]:
    momentum = draw(st.sampled_from((0.0, 0.5, 0.9)))
    nesterov = momentum > 0 and draw(st.booleans())
    return {
        "lr": draw(st.sampled_from((0.0, 0.1, 1e-3, 10.0))),
        "momentum": momentum,
        "dampening": 0.0 if nesterov else draw(st.sampled_from((0.0, 0.3, 1.0))),
        "weight_decay": draw(st.sampled_from((0.0, 0.1))),
        "nesterov": nesterov,
        **draw(scaling()),
    }


def update_lists(found: list[Row], in_place: bool, states: tuple[str, ...], counted: bool) -> Lists:
    """``in_place``: the backup is the parameters themselves."""
    written = {"params": built([row.param for row in found])}
    for i, name in enumerate(states):
        written[name] = built([row.states[i] for row in found])
    if counted:
        written["steps"] = [torch.full((), row.step) for row in found]
    read = {"grads": built([row.grad for row in found])}
    if not in_place:
        read["backup"] = built([row.backup for row in found])
    return Lists(written, read)


@fuzz
@given(rows(), sgd_options(), st.booleans(), st.booleans())
@example([plain(513, dtype=torch.float16)], {"lr": 0.1, "momentum": 0.9}, False, True)
@example([plain(17)], {"lr": 0.1, "weight_decay": 0.1, "maximize": True}, True, False)
def test_restore_sgd(
    backend: str, found: list[Row], options: dict[str, Any], in_place: bool, counted: bool
) -> None:
    lists = update_lists(found, in_place, ("momentum_buffers",), counted)

    def call(**tensors: list[Tensor]) -> None:
        tensors.setdefault("backup", tensors["params"])
        restore_sgd_(**tensors, **options)

    _, ours = lists.run(backend, call)
    _, expected = lists.run("reference", call)
    check(ours, expected)
    check_untouched(lists, ours, options)


def check_untouched(lists: Lists, ours: Lists, options: dict[str, Any]) -> None:
    """After an overflow all is restored, bit for bit."""
    found_inf = options.get("found_inf")
    if found_inf is not None and found_inf != 0:
        check(ours, lists, *set(lists.written) - {"params"}, same=same_bits)
        backup = lists.read.get("backup", lists.written["params"])
        assert all(map(same_bits, ours.written["params"], backup))


@st.composite
def adam_options(draw: st.DrawFn) -> dict[str, Any]:
    beta = st.sampled_from((0.0, 0.3, 0.5, 0.51, 0.9, 0.999))
    return {
        "lr": draw(st.sampled_from((0.0, 0.1, 1e-3))),
        "betas": (draw(beta), draw(beta)),
        "eps": draw(st.sampled_from((0.0, 1e-8, 1.0))),
        "weight_decay": draw(st.sampled_from((0.0, 0.1))),
        "decoupled_weight_decay": draw(st.booleans()),
        **draw(scaling()),
    }


@fuzz
@given(rows(), adam_options(), st.booleans())
@example([plain(513, dtype=torch.bfloat16)], {"lr": 0.1, "betas": (0.3, 0.9)}, False)
def test_restore_adam(
    backend: str, found: list[Row], options: dict[str, Any], in_place: bool
) -> None:
    lists = update_lists(found, in_place, ("exp_avgs", "exp_avg_sqs"), True)
    for v in lists.written["exp_avg_sqs"]:
        v.abs_()

    def call(**tensors: list[Tensor]) -> None:
        tensors.setdefault("backup", tensors["params"])
        restore_adam_(**tensors, **options)

    _, ours = lists.run(backend, call)
    _, expected = lists.run("reference", call)
    check(ours, expected, "exp_avgs", "exp_avg_sqs", "steps")
    check_untouched(lists, ours, options)
    backup = lists.read.get("backup", lists.written["params"])
    for w, e, b in zip(ours.written["params"], expected.written["params"], backup, strict=True):
        # The square root, which PyTorch's CPU build may round either way, is 2 u of the step; three
        # more roundings follow it, and that of the weight, which may then fall to the other side.
        kept = 1 - options["lr"] * options.get("weight_decay", 0.0)
        if not options.get("decoupled_weight_decay"):
            kept = 1.0
        e = e.double()
        step = (e - kept * b.double()).nan_to_num(0, 0, 0).abs()
        u, stored = arithmetic_unit(w.dtype), 2 * unit(w.dtype) * (e.abs() + b.double().abs())
        assert_within(w, e, 6 * u * step + stored.nan_to_num(0, 0, 0) + smallest(w.dtype))
