"""Any logits and targets: float64's losses within the oracle's bounds, NaN and infinities where the
reference has them, whose arithmetic has the same range."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import pytest
import torch
from hypothesis import assume, example, given
from hypothesis import strategies as st
from torch import Generator, Tensor
from torch.nn import functional as F

from ksam_kernels import (
    binary_cross_entropy_with_logits,
    cross_entropy,
    mse,
    select_cross_entropy,
    topk_indices,
    use_backend,
)
from ksam_kernels.checks import opmath_dtype
from tests.fuzz.strategies import EDGES, Spec, dtypes, fuzz, layouts, same_numbers, seeds, specs
from tests.helpers import FLOATS, arithmetic_unit, bits, same_bits, smallest, unit
from tests.loss.oracle import (
    Case,
    expected_gradient,
    expected_losses,
    gradient_tolerance,
    loss_tolerance,
    mean_per_sample,
    raises_bad_class,
)

KINDS = ("normal", "normal", "few", "narrow", "scaled", "offset", "large", "special", "nan")
HUGE = (*KINDS, "huge")


def logits_of(kind: str, n: int, dtype: torch.dtype, g: Generator) -> Tensor:
    """Logits at most so large that no weighted sum of their differences overflows, wherever the
    weights come in; of "huge" ones only the differences are sure to be numbers."""
    x = torch.randn(n, dtype=torch.float64, generator=g)
    most = torch.finfo(dtype).max / (3 if kind == "huge" or dtype == torch.float16 else 1e9)
    if kind == "scaled":  # exp reaches denormal numbers and 0
        x = x * 50
    elif kind == "offset":
        x = x + min(1e4, most)
    elif kind == "few":
        x = x.round()
    elif kind == "narrow":
        x = 1 + x * torch.finfo(dtype).eps
    elif kind != "normal":
        values = [0.0, -0.0, 1.0, -1.0, 88.0, -88.0, -104.0, most, -most]
        values += {"special": [math.inf, -math.inf], "nan": [math.nan] * 9}.get(kind, [])
        chosen = torch.tensor(values, dtype=torch.float64)
        often = (0.003, 0.05, 0.5)[int(torch.randint(0, 3, (), generator=g))]
        special = torch.rand(n, generator=g) < often
        x = torch.where(special, chosen[torch.randint(0, len(values), (n,), generator=g)], x)
    x = x.to(dtype)
    if kind == "nan":  # of every payload and sign
        payload = torch.randint(0, 256, (n * dtype.itemsize,), dtype=torch.uint8, generator=g)
        raw = bits(torch.tensor(math.inf, dtype=dtype)) | payload.view(bits(x).dtype)
        x = torch.where(x.isnan(), raw.view(dtype), x)
    return x


def built(spec: Spec) -> Tensor:
    return spec.build(lambda n, dtype, g: logits_of(spec.kind, n, dtype, g))


def fractions(spec: Spec) -> Tensor:
    """Numbers in [0, 1], a fifth of them 0 and a fifth 1."""

    def fill(n: int, dtype: torch.dtype, g: Generator) -> Tensor:
        return (torch.rand(n, generator=g, dtype=torch.float64) * 5 - 2).clamp(0, 1).to(dtype)

    return spec.build(fill)


def weights(spec: Spec) -> Tensor:
    """Numbers in [0, 1e3], some of them 0."""

    def fill(n: int, dtype: torch.dtype, g: Generator) -> Tensor:
        x = 10 ** (torch.rand(n, generator=g, dtype=torch.float64) * 6 - 3)
        return (x * (torch.rand(n, generator=g) < 0.9)).to(dtype)

    return spec.build(fill)


def classes(spec: Spec, count: int, ignored: int) -> Tensor:
    def fill(n: int, dtype: torch.dtype, g: Generator) -> Tensor:
        y = torch.randint(0, count, (n,), dtype=dtype, generator=g)
        return torch.where(torch.rand(n, generator=g) < 0.15, ignored, y).to(dtype)

    return spec.build(fill)


row_shapes = st.one_of(
    st.integers(0, 40).map(lambda n: (n,)), st.lists(st.integers(0, 4), max_size=3).map(tuple)
)
widths = st.one_of(st.integers(1, 40), st.sampled_from((*EDGES, 4097)), st.integers(1, 3000))


@st.composite
def inputs(
    draw: st.DrawFn,
    shape: tuple[int, ...],
    dtype: torch.dtype | None = None,
    kinds: Sequence[str] = HUGE,
) -> Spec:
    return draw(specs(shape, dtype, kinds, expandable=True))


@dataclass(frozen=True)
class Drawn:
    """Arguments of one call of ``cross_entropy``, to be built."""

    logits: Spec
    target: Spec  # classes or probabilities
    weight: Spec | None = None
    ignore_index: int = -100
    label_smoothing: float = 0.0

    def build(self) -> Case:
        logits = built(self.logits)
        soft = self.target.dtype.is_floating_point
        return Case(
            logits,
            fractions(self.target)
            if soft
            else classes(self.target, logits.shape[-1], self.ignore_index),
            None if self.weight is None else weights(self.weight),
            self.ignore_index,
            self.label_smoothing,
        )


@st.composite
def cases(draw: st.DrawFn, rows: tuple[int, ...] | None = None) -> Drawn:
    rows = draw(row_shapes) if rows is None else rows
    count = draw(widths)
    target_dtype = draw(st.sampled_from((torch.int64, torch.int64, torch.int32, *FLOATS)))
    soft = target_dtype.is_floating_point
    target_shape = (*rows, count) if soft else rows
    layout = draw(layouts(target_shape, expandable=True))
    target = Spec(target_shape, target_dtype, "", draw(seeds), **layout)  # type: ignore[arg-type]
    weight = draw(st.one_of(st.none(), specs((count,), kinds=["normal"], expandable=True)))
    ignored = -100 if soft else draw(st.sampled_from((-100, -1, 0, count - 1, count, 2**31 - 1)))
    smoothing = draw(st.sampled_from((0.0, 0.0, 0.1, 0.7, 1.0)))
    kinds = KINDS if soft or weight or smoothing else HUGE
    logits = draw(inputs((*rows, count), kinds=kinds))
    return Drawn(logits, target, weight, ignored, smoothing)


def rounded(case: Case) -> Case:
    """Target and weight as the arithmetic reads them."""
    dtype = opmath_dtype(case.logits.dtype)
    target = case.target.to(dtype) if case.target.is_floating_point() else case.target
    weight = None if case.weight is None else case.weight.to(dtype)
    return Case(case.logits, target, weight, case.ignore_index, case.label_smoothing)


def assert_like(actual: Tensor, reference: Tensor, truth: Tensor, tolerance: Tensor) -> None:
    """NaN and infinities where the reference has them, elsewhere within ``tolerance`` of truth."""
    assert actual.dtype == reference.dtype
    assert actual.shape == reference.shape
    actual, reference = actual.detach().double(), reference.detach().double()
    assert torch.equal(actual.isnan(), reference.isnan())
    assert torch.equal(actual[actual.isinf()], reference[reference.isinf()])
    finite = reference.isfinite() & truth.isfinite()
    error = (actual - truth.detach().double()).abs()[finite]
    assert (error <= tolerance.expand_as(truth)[finite]).all(), error.max()


def losses_and_gradient(
    backend: str, case: Case, upstream: Tensor, k: int | None = None
) -> tuple[Tensor, ...]:
    """Losses, gradient, and with k the selected indices."""
    x = case.logits.detach().requires_grad_()
    with use_backend(backend):
        if k is None:
            found = (cross_entropy(x, case.target, **case.options),)
        else:
            found = select_cross_entropy(x, case.target, k, **case.options)
        (gradient,) = torch.autograd.grad(found[0], x, upstream)
    return found[0].detach(), gradient, *found[1:]


def gradients_of(spec: Spec) -> Tensor:
    """Upstream gradients: normal numbers, some of them 0 or large."""

    def fill(n: int, dtype: torch.dtype, g: Generator) -> Tensor:
        scale = torch.tensor([0.0, 1e-6, 1.0, 1.0, 1e4])
        x: Tensor = torch.randn(n, generator=g) * scale[torch.randint(0, 5, (n,), generator=g)]
        return x.to(dtype)

    return spec.build(fill)


@st.composite
def upstreams(draw: st.DrawFn, shape: tuple[int, ...]) -> Spec:
    return draw(specs(shape, torch.float32, ["normal"], expandable=True))


@fuzz
@given(cases().flatmap(lambda drawn: st.tuples(st.just(drawn), upstreams(drawn.logits.shape[:-1]))))
@example((Drawn(Spec((0, 2), steps=(1, 2)), Spec((0,), torch.int64)), Spec((0,))))
@example((Drawn(Spec((3, 17), kind="nan"), Spec((3,), torch.int32)), Spec((3,))))
@example(
    (Drawn(Spec((2, 2065)), Spec((2, 2065)), Spec((2065,)), -100, 0.1), Spec((2,), steps=(0,)))
)
def test_cross_entropy(backend: str, drawn: tuple[Drawn, Spec]) -> None:
    case, upstream = drawn[0].build(), gradients_of(drawn[1])
    before = bits(case.logits)
    losses, gradient = losses_and_gradient(backend, case, upstream)
    expected, expected_dx = losses_and_gradient("reference", case, upstream)
    assert torch.equal(bits(case.logits), before)
    # Without a gradient to come, a call takes a shorter way to the kernel.
    assert same_numbers(cross_entropy(case.logits, case.target, **case.options), losses)
    exact = rounded(case)
    truth = expected_losses(exact)
    assert_like(losses, expected, truth, loss_tolerance(exact, truth))
    dx = expected_gradient(exact, upstream)
    assert_like(gradient, expected_dx, dx, gradient_tolerance(exact, upstream, dx))
    assert_ignored_rows_are_zero(case, losses, gradient)


def assert_ignored_rows_are_zero(case: Case, losses: Tensor, gradient: Tensor) -> None:
    if not case.target.is_floating_point():
        ignored = case.target == case.ignore_index
        assert (losses[ignored] == 0).all()
        assert (gradient[ignored] == 0).all()


@fuzz
@given(st.integers(1, 70).flatmap(lambda n: cases((n,))), st.integers(0, 2**20))
@example(Drawn(Spec((65, 10)), Spec((65,), torch.int64)), 19)
def test_select_cross_entropy(backend: str, drawn: Drawn, k: int) -> None:
    case = drawn.build()
    rows = len(case.logits)
    k, upstream = 1 + k % rows, torch.ones(rows)
    losses, gradient, indices = losses_and_gradient(backend, case, upstream, k)
    alone, gradient_alone = losses_and_gradient(backend, case, upstream)
    assert same_bits(losses, alone)
    assert same_bits(gradient, gradient_alone)
    shorter, same_indices = select_cross_entropy(case.logits, case.target, k, **case.options)
    assert same_bits(losses, shorter)
    assert torch.equal(indices, same_indices)
    with use_backend("reference"):
        assert torch.equal(indices, topk_indices(losses, k))


@pytest.mark.parametrize("classes", [5, 17, 2100])
def test_a_nan_of_any_bits_gives_nan(backend: str, classes: int) -> None:
    for raw in (0x7FC00000, 0x7FC00001, 0x7F800001, 0x7FC0017F, 0x7FFFFFFF, -1, -0x3FFFFF):
        x = torch.zeros(2, classes)
        x.view(torch.int32)[0, classes - 1] = raw
        losses, gradient = losses_and_gradient(
            backend, Case(x, torch.tensor([0, 1])), torch.ones(2)
        )
        assert losses.isnan().tolist() == [True, False]
        assert gradient.isnan().all(dim=1).tolist() == [True, False]


@fuzz
@given(cases(), st.integers(0, 2**20), st.sampled_from((-1, -200, 0, 5)))
def test_a_class_out_of_range(backend: str, drawn: Drawn, at: int, bad: int) -> None:
    case = drawn.build()
    if case.target.is_floating_point() or case.target.numel() == 0:
        return
    value = bad if bad < 0 else case.classes + bad
    assume(value != case.ignore_index)
    case.target = case.target.clone(memory_format=torch.contiguous_format)
    case.target.view(-1)[at % case.target.numel()] = value
    for name in ("reference", backend):
        message = f"target holds class {value}, out of range for {case.classes} classes"
        with use_backend(name), raises_bad_class(name, f"^{message}$"):
            cross_entropy(case.logits, case.target, **case.options)


@dataclass(frozen=True)
class Pairs:
    """Arguments of an elementwise loss, to be built."""

    input: Spec
    target: Spec
    upstream: Spec
    pos_weight: Spec | None = None


@st.composite
def pairs(draw: st.DrawFn, weighted: bool = False) -> Pairs:
    samples = draw(st.one_of(st.integers(0, 40), st.sampled_from((16, 17))))
    trailing = draw(
        st.one_of(
            widths.map(lambda n: (n,)),
            st.lists(st.integers(1, 6), max_size=4).map(tuple),
        )
    )
    shape = (samples, *trailing)
    weight = None
    if weighted and draw(st.booleans()):
        # Trailing dimensions, fewer of them, or 1 in their place.
        ones = [draw(st.sampled_from((n, n, 1))) for n in trailing]
        weight_shape = tuple(ones[draw(st.integers(0, len(ones))) :])
        weight = draw(specs(weight_shape, kinds=["normal"], expandable=True))
    target = draw(inputs(shape, draw(dtypes)))
    return Pairs(draw(inputs(shape)), target, draw(upstreams((samples,))), weight)


def share(x: Tensor, upstream: Tensor) -> Tensor:
    """g / n, shaped to broadcast."""
    n = max(math.prod(x.shape[1:]), 1)
    return (upstream.double() / n).reshape(-1, *[1] * (x.dim() - 1))


def elementwise(
    backend: str, loss: object, x: Tensor, t: Tensor, upstream: Tensor, options: dict[str, object]
) -> tuple[Tensor, Tensor]:
    x = x.detach().requires_grad_()
    with use_backend(backend):
        losses = loss(x, t, **options)  # type: ignore[operator]
        (gradient,) = torch.autograd.grad(losses, x, upstream)
    return losses.detach(), gradient


def mean_tolerance(dtype: torch.dtype, terms: Tensor, factor: float = 1.0) -> Tensor:
    """``terms``: a bound on all numbers that are added for an element. Up to 8 roundings each, the
    sum sqrt(n) more, one to float32; below the normal numbers roundings are absolute, and may be
    multiplied by ``factor``."""
    n = max(math.prod(terms.shape[1:]), 1)
    size = mean_per_sample(terms)
    u = arithmetic_unit(dtype)
    return (u * (8 + math.sqrt(n)) + unit(torch.float32)) * size + 8 * factor * smallest(
        torch.float32
    )


@fuzz
@given(pairs(weighted=True))
@example(Pairs(Spec((17, 15), kind="nan"), Spec((17, 15)), Spec((17,)), Spec((15,))))
@example(Pairs(Spec((3, 2065)), Spec((3, 2065)), Spec((3,)), Spec((1,))))
def test_binary_cross_entropy(backend: str, drawn: Pairs) -> None:
    x, t, upstream = built(drawn.input), fractions(drawn.target), gradients_of(drawn.upstream)
    p = None if drawn.pos_weight is None else weights(drawn.pos_weight)
    call = (binary_cross_entropy_with_logits, x, t, upstream, {"pos_weight": p})
    losses, gradient = elementwise(backend, *call)
    expected, expected_dx = elementwise("reference", *call)

    dtype = opmath_dtype(x.dtype)
    t = t.to(dtype).double()
    p = None if p is None else p.to(dtype).double()
    y = x.detach().double().requires_grad_()
    each = F.binary_cross_entropy_with_logits(y, t, pos_weight=p, reduction="none")
    truth = mean_per_sample(each)
    (dx,) = torch.autograd.grad(truth, y, upstream.double())
    most = 1 + (0.0 if p is None else (p - 1).abs()) * t  # no cancellation in 1 + (p - 1) t
    y = y.detach()
    terms = (1 - t) * y.abs() + most * F.softplus(-y)
    assert_like(losses, expected, truth, mean_tolerance(x.dtype, terms, 1e3))
    bound = 10 * arithmetic_unit(x.dtype) * share(x, upstream).abs() * ((1 - t) + most)
    bound = bound + unit(x.dtype) * dx.abs() + (2 + share(x, upstream).abs()) * smallest(x.dtype)
    assert_like(gradient, expected_dx, dx, bound)


@fuzz
@given(pairs())
@example(Pairs(Spec((17, 15), kind="nan"), Spec((17, 15)), Spec((17,))))
@example(Pairs(Spec((9, 511), kind="huge"), Spec((9, 511), kind="huge", seed=2), Spec((9,))))
@example(Pairs(Spec((3, 2065), torch.float16), Spec((3, 2065), kind="huge"), Spec((3,))))
def test_mse(backend: str, drawn: Pairs) -> None:
    x, t, upstream = built(drawn.input), built(drawn.target), gradients_of(drawn.upstream)
    losses, gradient = elementwise(backend, mse, x, t, upstream, {})
    expected, expected_dx = elementwise("reference", mse, x, t, upstream, {})

    t = t.to(opmath_dtype(x.dtype)).double()
    y = x.detach().double()
    each = (y - t).square()
    truth = mean_per_sample(each)
    assert_like(losses, expected, truth, mean_tolerance(x.dtype, each))
    g = share(x, upstream)
    dx = g * 2 * (y - t)
    bound = (6 * arithmetic_unit(x.dtype) + unit(x.dtype)) * dx.abs()
    bound = bound + (2 + (y - t).abs()) * smallest(x.dtype)
    assert_like(gradient, expected_dx, dx, bound)
