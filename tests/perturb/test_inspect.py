"""What the extension finds ordinary in one look at lists of tensors; the rest is Python's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import ksam_kernels as kk
from ksam_kernels import native, use_backend
from ksam_kernels.perturb.native import fits
from tests.helpers import sliced, transposed

pytestmark = pytest.mark.skipif(native.extension is None, reason="there is no extension")


class Subclass(Tensor):
    pass


def lists() -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    def one(dtype: torch.dtype = torch.float32) -> list[Tensor]:
        shapes = ((2, 3), (), (0,))
        return [torch.zeros(shape, dtype=dtype) for shape in shapes]

    return one(), one(torch.bfloat16), one()


def negative() -> Tensor:
    return torch._neg_view(torch.zeros(2, 3, dtype=torch.complex64).real)


#: What a tensor of the second list is replaced by; none of it is ordinary.
OTHERS: dict[str, Callable[[], Any]] = {
    "another shape": lambda: torch.zeros(3, 2),
    "another number of dimensions": lambda: torch.zeros(2, 3, 1),
    "integers": lambda: torch.zeros(2, 3, dtype=torch.int32),
    "complex numbers": lambda: torch.zeros(2, 3, dtype=torch.complex64),
    "no memory": lambda: torch.zeros(2, 3, device="meta"),
    "a sparse tensor": lambda: torch.zeros(2, 3).to_sparse(),
    "a negative view": negative,
    "a subclass": lambda: torch.zeros(2, 3).as_subclass(Subclass),
    "no tensor": lambda: [0.0] * 6,
}


def test_ordinary_lists_fit() -> None:
    params, grads, backup = lists()
    params[0] = torch.nn.Parameter(params[0])
    grads[0], backup[0] = sliced(grads[0]), transposed(backup[0])
    assert fits(params, grads, backup, written=(0, 2), alike=(2,))


@pytest.mark.parametrize("other", OTHERS.values(), ids=OTHERS)
def test_a_tensor_out_of_the_ordinary_does_not(other: Callable[[], Any]) -> None:
    params, grads, backup = lists()
    grads[0] = other()
    assert not fits(params, grads, backup, written=(0, 2))


def test_nothing_is_said_of_empty_lists_and_of_lists_of_other_lengths() -> None:
    params, grads, _ = lists()
    assert not fits([], [], written=())
    assert not fits(params, grads[:2], written=())
    assert not fits(params, [*grads, grads[0]], written=())


def test_written_tensors_do_not_overlap_themselves() -> None:
    for i in range(3):
        three = lists()
        three[i][0] = torch.zeros(1, 3, dtype=three[i][0].dtype).expand(2, 3)
        for written in ((), (0,), (1,), (2,), (0, 1), (0, 2), (1, 2), (0, 1, 2)):
            assert fits(*three, written=written) == (i not in written)


def test_dtypes_are_the_first_lists_where_they_must() -> None:
    params, grads, backup = lists()
    assert fits(params, grads, backup, written=(), alike=(0, 2))
    assert not fits(params, grads, backup, written=(), alike=(1,))


def test_counters_are_one_float32_each() -> None:
    (params, *_), ones = lists(), [torch.zeros(()), torch.zeros(1), torch.zeros(1, 1)]
    assert fits(params, written=(), counters=ones)
    assert not fits(params, written=(), counters=ones[:2])
    for wrong in (
        torch.zeros(2),
        torch.zeros((), dtype=torch.float64),
        torch.zeros((), device="meta"),
    ):
        assert not fits(params, written=(), counters=[*ones[:2], wrong])


def test_scalars_are_no_subclass() -> None:
    params, *_ = lists()
    assert fits(params, written=(), scalars=(None, torch.ones(())))
    assert not fits(params, written=(), scalars=(None, torch.ones(()).as_subclass(Subclass)))


def test_there_is_no_look_where_more_than_a_call_would_happen() -> None:
    params, *_ = lists()
    assert fits(params, written=())
    with torch.inference_mode():
        assert not fits(params, written=())
    with FlopCounterMode(display=False):
        assert not fits(params, written=())


def test_tensors_that_are_written_without_the_dispatcher_say_so() -> None:
    """Kernels other than PyTorch's write behind its back; here one that writes nothing."""
    params, grads, backup = lists()
    steps = [torch.zeros(()) for _ in params]
    moments = [torch.zeros_like(p) for p in params], [torch.zeros_like(p) for p in params]
    everything = [params, grads, backup, steps, *moments]

    def written(call: Callable[[], object], *expected: list[Tensor]) -> None:
        before = [[t._version for t in tensors] for tensors in everything]
        call()
        for tensors, versions in zip(everything, before, strict=True):
            moved = [t._version > v for t, v in zip(tensors, versions, strict=True)]
            assert moved == [any(tensors is e for e in expected)] * len(tensors)

    with pytest.MonkeyPatch.context() as patch, use_backend("reference"):
        kernels = dict.fromkeys(kk.backends._kernels["reference"], lambda *_: torch.zeros(()))
        patch.setitem(kk.backends._kernels, "reference", kernels)
        written(lambda: kk.grad_norm(grads))
        written(lambda: kk.perturb_(params, grads, backup, rho=0.1), params, backup)
        written(lambda: kk.restore_(params, backup), params)
        sgd = (params, backup, grads, moments[0])
        written(
            lambda: kk.restore_sgd_(*sgd, steps=steps, lr=0.1, momentum=0.9),
            *(params, moments[0], steps),
        )
        adam = (params, backup, grads, *moments, steps)
        written(lambda: kk.restore_adam_(*adam, lr=0.1), params, *moments, steps)


def test_a_norm_without_the_dispatcher_is_no_part_of_a_graph() -> None:
    params, grads, _ = lists()
    with use_backend("reference"):
        norm = kk.grad_norm(grads, [torch.nn.Parameter(p) for p in params], eta=0.1)
    assert not norm.requires_grad


def test_a_negative_view_of_a_scalar_is_resolved() -> None:
    """As the dispatcher does; a kernel does not see the bit."""
    params, grads, backup = lists()
    seen = []
    with pytest.MonkeyPatch.context() as patch, use_backend("reference"):
        kernels = {"restore_sgd_": lambda *args: seen.append(args[-2])}
        patch.setitem(kk.backends._kernels, "reference", kernels)
        scale = torch._neg_view(torch.ones(()))
        kk.restore_sgd_(params, backup, grads, [], lr=0.1, grad_scale=scale)
    assert not seen[0].is_neg()
    assert seen[0] == -1


def test_what_cannot_be_described() -> None:
    """Triton's tables would lead past the end of a list, or through the gaps of a tensor."""
    two, gaps = [torch.zeros(3), torch.zeros(4)], [sliced(torch.randn(4, 5))]
    integers = [torch.arange(5)]
    describe = native.extension.describe
    assert describe([two, two], [1, 2], 1024) is not None
    for lists_, values in (
        ([gaps, gaps], None),
        ([integers, integers], None),
        ([two, two[:1]], None),
        ([two[:1], two], None),
        ([two, two], [1]),
        ([two, two], [1, 2, 3]),
    ):
        assert describe(lists_, values, 1024) is None
