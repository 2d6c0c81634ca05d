"""Every backend gives the bits of the reference: its order of operations is the contract.

Sizes reach past what kernels cut work into: vectors, blocks, chunks, several threads, and lists so
large that write-only operands go past the caches; at addresses and in layouts of every kind.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from ksam_kernels import perturb_, restore_, restore_adam_, restore_sgd_, use_backend
from tests.device import DEVICE
from tests.helpers import (
    FLOATS,
    all_same_bits,
    any_bits,
    assert_within,
    same_bits,
    sliced,
    threads,
    unit,
)
from tests.perturb.lists import clones, empty_like, like, tensors
from tests.perturb.optim import garbage, name, one, zeros_like

EDGES = tuple((n,) for n in (0, 1, 15, 16, 17, 511, 512, 513, 4095, 4096, 4097, 12289))
# 2.9 million elements, 12 MB an operand in float32, most of it in one piece.
LARGE = ((1 << 21,), ((1 << 18) + 5,), (0,), (), (1024, 513), (3, 5, 7, 11))
SIZES = {"edges": EDGES, "large": LARGE}
DTYPES = pytest.mark.parametrize("dtype", FLOATS, ids=str)

Lists = list[list[Tensor]]


@pytest.fixture(params=[1, 2, 3], ids="{} threads".format)
def any_threads(request: pytest.FixtureRequest) -> Iterator[None]:
    with threads(request.param):
        yield


def unaligned(tensors: list[Tensor]) -> list[Tensor]:
    """The same values at addresses that no vector is aligned to."""
    moved = []
    for t in tensors:
        room = torch.empty(t.numel() + 1, dtype=t.dtype)
        room[1:] = t.reshape(-1)
        moved.append(room[1:].view(t.shape))
    return moved


def left_by(backend: str, operation: Callable[..., object], written: Lists) -> Lists:
    """What the operation leaves in copies of the lists that it writes."""
    copies = [clones(tensors) for tensors in written]
    with use_backend(backend):
        operation(*copies)
    return copies


def assert_same_bits_as_reference(backend: str, call: Any) -> None:
    for ours, expected in zip(left_by(backend, *call), left_by("reference", *call), strict=True):
        assert all_same_bits(ours, expected)


def eighths(tensors: list[Tensor]) -> list[Tensor]:
    """Values whose squares add up without a rounding, whatever the order."""
    return [(t * 8).round() / 8 for t in tensors]


def climbs(sizes: Sequence[tuple[int, ...]], dtype: torch.dtype, **options: Any) -> Any:
    params = tensors(dtype, sizes)
    grads = like(params)
    if dtype == torch.float64:  # reads the norm as a double, whose last bit the order decides
        params, grads = eighths(params), eighths(grads)
    return (
        lambda p, b: perturb_(p, grads, b, rho=0.05, **options),
        [params, empty_like(params)],
    )


def sgd(params: list[Tensor], grads: list[Tensor], **options: Any) -> Any:
    backup, buffers = clones(params), like(params)
    steps = [torch.full((), float(i % 2)) for i in range(len(params))]
    return (
        lambda p, v, s: restore_sgd_(p, backup, grads, v, steps=s, lr=0.1, **options),
        [garbage(params), buffers, steps],
    )


@DTYPES
@pytest.mark.parametrize("adaptive", [False, True], ids=["sam", "asam"])
def test_perturb(backend: str, dtype: torch.dtype, adaptive: bool) -> None:
    call = climbs(EDGES, dtype, adaptive=adaptive, eta=0.125)
    assert_same_bits_as_reference(backend, call)


@pytest.mark.usefixtures("any_threads")
def test_perturb_of_large_lists(backend: str) -> None:
    call = climbs(LARGE, torch.float32)
    assert_same_bits_as_reference(backend, call)


SGD = [
    {"momentum": momentum, "dampening": dampening, "nesterov": nesterov, "weight_decay": decay}
    for (momentum, dampening, nesterov), decay in itertools.product(
        ((0.0, 0.0, False), (0.9, 0.3, False), (0.9, 0.0, True)), (0.0, 0.1)
    )
]


@DTYPES
@pytest.mark.parametrize("options", SGD, ids=name)
@pytest.mark.parametrize("more", [{}, {"maximize": True, "grad_scale": one(3.0)}], ids=name)
def test_sgd(backend: str, dtype: torch.dtype, options: Any, more: Any) -> None:
    params = tensors(dtype, EDGES)
    call = sgd(params, like(params), **options, **more)
    assert_same_bits_as_reference(backend, call)


@pytest.mark.usefixtures("any_threads")
def test_sgd_of_large_lists(backend: str) -> None:
    params = tensors(torch.float32, LARGE)
    call = sgd(params, like(params), momentum=0.9, weight_decay=0.1)
    assert_same_bits_as_reference(backend, call)


def check_adam(backend: str, params: list[Tensor], betas: tuple[float, float], **more: Any) -> None:
    """The weights but for the square root, which PyTorch's CPU build may round either way: that is
    2 u of the step, which lr = 0.001 keeps below 1, and the rounding of the weight."""
    grads, backup, means = like(params), clones(params), like(params)
    squares = [t.abs() for t in like(params)]
    steps = [torch.full((), float(i % 5)) for i in range(len(params))]
    call = (
        lambda p, m, v, s: restore_adam_(
            p, backup, grads, m, v, s, lr=0.001, betas=betas, weight_decay=0.1, **more
        ),
        [garbage(params), means, squares, steps],
    )
    (weights, *state), (expected_weights, *expected) = (
        left_by(name, *call) for name in (backend, "reference")
    )
    for ours, theirs in zip(state, expected, strict=True):
        assert all_same_bits(ours, theirs)
    for w, e in zip(weights, expected_weights, strict=True):
        u = unit(w.dtype)
        assert_within(w, e, 2 * u * e.detach().abs().double() + 4 * u)


@DTYPES
@pytest.mark.parametrize("betas", [(0.9, 0.999), (0.3, 0.5), (0.0, 0.9)], ids=str)
@pytest.mark.parametrize("decoupled", [False, True], ids=["Adam", "AdamW"])
def test_adam(backend: str, dtype: torch.dtype, betas: Any, decoupled: bool) -> None:
    check_adam(backend, tensors(dtype, EDGES), betas, decoupled_weight_decay=decoupled)
    check_adam(backend, tensors(dtype, EDGES), betas, maximize=True, grad_scale=one(3.0))


@pytest.mark.usefixtures("any_threads")
def test_adam_of_large_lists(backend: str) -> None:
    check_adam(backend, tensors(torch.float32, LARGE), (0.9, 0.99), decoupled_weight_decay=True)


@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
def test_at_any_address(backend: str, sizes: Any) -> None:
    """Nothing but the tensors' own elements is written, wherever they start."""
    params = tensors(torch.float32, sizes)
    grads, backup = unaligned(like(params)), unaligned(empty_like(params))
    moved = unaligned(params)
    guards = [torch.as_strided(t, (1,), (1,), 0).clone() for t in moved + backup]
    expected, expected_backup = clones(params), empty_like(params)
    perturb_(moved, grads, backup, rho=0.1)
    with use_backend("reference"):
        perturb_(expected, grads, expected_backup, rho=0.1)
    assert all_same_bits(moved, expected)
    assert all_same_bits(backup, expected_backup)
    restore_(moved, backup)
    assert all_same_bits(moved, params)
    after = [torch.as_strided(t, (1,), (1,), 0) for t in moved + backup]
    assert all_same_bits(after, guards)


@pytest.mark.usefixtures("any_threads")
@DTYPES
def test_restore_moves_any_bits_of_large_lists(backend: str, dtype: torch.dtype) -> None:
    backup = [any_bits(shape, dtype) for shape in LARGE]
    params = [torch.zeros_like(t) for t in backup]
    restore_(params, backup)
    assert all_same_bits(params, backup)


MANY = [tuple(range(n % 4, 4)) if n % 7 == 0 else (n % 45,) for n in range(300)]
KINDS = pytest.mark.parametrize(
    "dtypes", [torch.float32, FLOATS[:3]], ids=["one dtype", "three dtypes in turn"]
)


@KINDS
@pytest.mark.parametrize("adaptive", [False, True], ids=["sam", "asam"])
def test_perturb_of_hundreds_of_tensors(backend: str, dtypes: Any, adaptive: bool) -> None:
    """More than one launch of a GPU takes, with a radius for each and empty ones in between."""
    params = tensors(dtypes, MANY)
    grads = like(params)
    radii = [0.01 * (i % 5 - 1) for i in range(len(params))]
    call = (
        lambda p, b: perturb_(p, grads, b, rho=radii, adaptive=adaptive, eta=0.125),
        [params, empty_like(params)],
    )
    assert_same_bits_as_reference(backend, call)
    restored = garbage(params)
    restore_(restored, params)
    assert all_same_bits(restored, params)


@KINDS
def test_updates_of_hundreds_of_tensors(backend: str, dtypes: Any) -> None:
    params = tensors(dtypes, MANY)
    for options in ({}, {"momentum": 0.9, "dampening": 0.3}):
        assert_same_bits_as_reference(backend, sgd(params, like(params), **options))
    check_adam(backend, params, (0.9, 0.999))


def test_hundreds_of_strided_tensors(backend: str) -> None:
    params = [sliced(t) for t in tensors(FLOATS[:3], [(n % 9, 3) for n in range(100)])]
    grads = like(params, torch.float32)
    call = (lambda p, b: perturb_(p, grads, b, rho=0.1), [params, empty_like(params)])
    assert_same_bits_as_reference(backend, call)
    assert_same_bits_as_reference(backend, sgd(params, grads, momentum=0.9))
    check_adam(backend, params, (0.9, 0.999))


def test_empty_tensors_alone_have_their_steps_counted(backend: str) -> None:
    empty = [torch.zeros(0), torch.zeros(3, 0)]
    steps = [torch.tensor(0.0), torch.tensor([4.0])]
    restore_sgd_(clones(empty), empty, empty, clones(empty), steps=steps, lr=0.1, momentum=0.9)
    assert [float(s) for s in steps] == [1, 5]
    restore_adam_(clones(empty), *([clones(empty) for _ in range(4)]), steps, lr=0.1)
    assert [float(s) for s in steps] == [2, 6]


def reversed_dims(t: Tensor) -> Tensor:
    """The same values with the first dimension innermost."""
    order = tuple(reversed(range(t.dim())))
    return t.permute(order).contiguous().permute(order)


def test_up_to_twelve_dimensions_of_two_layouts(backend: str) -> None:
    params = tensors(torch.float32, [(2,) * 11, (2,) * 5 + (1,) * 5 + (3,) * 4])
    grads = [reversed_dims(g) for g in like(params)]
    call = (lambda p, b: perturb_(p, grads, b, rho=0.1), [params, empty_like(params)])
    assert_same_bits_as_reference(backend, call)


@pytest.mark.parametrize("dims", [64, 65, 90])
def test_any_number_of_dimensions_of_one_element(backend: str, dims: int) -> None:
    """torch has no limit; a kernel that keeps an index of every dimension has one."""
    numbers = torch.arange(6.0).reshape(2, 3)
    many = numbers.t()[(..., *[None] * dims)]  # with gaps in no order of its dimensions
    flat = many.contiguous()
    w, b = [flat.clone()], [torch.zeros_like(flat)]
    norm = perturb_(w, [many], b, rho=0.1)
    expected = [flat.clone()]
    assert same_bits(norm, perturb_(expected, [flat], [torch.zeros_like(flat)], rho=0.1))
    assert all_same_bits(w, expected)
    restore_(w, [many])
    assert same_bits(w[0], flat)


def test_what_a_kernel_has_no_room_for_raises_and_writes_nothing(backend: str) -> None:
    """Thirteen dimensions that no two neighbours of which can be merged, on a GPU."""
    shape = (2,) * 13
    w, g, b = torch.ones(shape), reversed_dims(torch.randn(shape)), torch.zeros(shape)
    if backend == "simt" or (backend == "native" and DEVICE.type == "cuda"):
        with pytest.raises(RuntimeError, match="kernel of perturb_ does not take"):
            perturb_([w], [g], [b], rho=0.1)
        assert (w == 1).all()
        assert (b == 0).all()
    else:
        perturb_([w], [g], [b], rho=0.1)
        assert_within((w - 1).norm(), torch.tensor(0.1), 1e-5)


def test_gradients_of_one_element_stand_for_all(backend: str) -> None:
    """An expanded gradient, as the mean's backward pass makes them, has strides of 0."""
    params = tensors(torch.float32, [(4097,), (33, 65)])
    expanded = [torch.tensor(0.5).expand(p.shape) for p in params]
    written = [
        left_by(backend, *sgd(params, grads, momentum=0.0))[0]
        for grads in (expanded, [g.contiguous() for g in expanded])
    ]
    assert all_same_bits(*written)


def test_one_strided_list_among_flat_ones(backend: str) -> None:
    shapes = [(5, 819), (3, 4096)]
    params, grads = tensors(torch.float32, shapes), tensors(torch.float32, shapes)
    expected, backup = clones(params), zeros_like(params)
    perturb_(expected, grads, backup, rho=0.1)
    for which in range(3):
        lists = [clones(params), clones(grads), zeros_like(params)]
        lists[which] = [sliced(t) for t in lists[which]]
        perturb_(*lists, rho=0.1)
        assert all_same_bits(lists[0], expected)
        assert all_same_bits(lists[2], backup)


def test_autograd_sees_what_was_written(backend: str) -> None:
    w = torch.nn.Parameter(torch.ones(3))
    product = (w * w).sum()
    perturb_([w], [torch.ones(3)], [torch.empty(3)], rho=1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.backward()  # type: ignore[no-untyped-call]


class Marked(Tensor):
    """A subclass, which may mean anything by its data."""


def test_subclasses_of_tensor_go_through_the_dispatcher(backend: str) -> None:
    plain, grad, backup = torch.ones(3), torch.ones(3), torch.empty(3)
    marked = torch.ones(3).as_subclass(Marked)  # type: ignore[arg-type]
    perturb_([plain], [grad], [backup], rho=1.0)
    perturb_([marked], [grad], [backup], rho=1.0)
    assert same_bits(marked.as_subclass(Tensor), plain)  # type: ignore[arg-type]


SIXTEEN_BITS = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)


def updated(g: Tensor, dtype: torch.dtype) -> Tensor:
    """0 - g in a dtype."""
    zero = torch.zeros(g.shape, dtype=dtype)
    w = [zero.clone()]
    restore_sgd_(w, [zero], [g], [], lr=1.0)
    return w[0]


@pytest.mark.parametrize("n", [1, 100])
@SIXTEEN_BITS
def test_nan_of_any_bits_is_rounded_to_nan(backend: str, dtype: torch.dtype, n: int) -> None:
    for payload in (0x7FFFFFFF, 0x7F800001):
        g = torch.full((n,), payload, dtype=torch.int32).view(torch.float32)
        assert updated(g, dtype).isnan().all()


@pytest.mark.parametrize("n", [1, 100])
def test_what_float16_cannot_hold_is_rounded_to_infinity(backend: str, n: int) -> None:
    inf = float("inf")
    for w, expected in ((65519.0, 65504.0), (65520.0, inf), (7e4, inf), (2e5, inf), (1e30, inf)):
        assert (updated(torch.full((n,), -w), torch.float16) == expected).all()


def test_dampening_is_subtracted_from_1_before_it_is_rounded(backend: str) -> None:
    w, v, g = (torch.randn(100) for _ in range(3))
    buffers = [v.clone()]
    restore_sgd_([w], [w.clone()], [g], buffers, lr=0.1, momentum=0.9, dampening=0.9)
    assert same_bits(buffers[0], v * 0.9 + g * (1 - 0.9))
