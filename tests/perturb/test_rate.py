"""A learning rate that is a tensor: the updates read it when they run."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from ksam_kernels import restore_adam_, restore_sgd_
from tests.helpers import FLOATS, all_same_bits
from tests.perturb.lists import clones, like, tensors
from tests.perturb.optim import SHAPES, counters, garbage

Lists = list[list[Tensor]]


def sgd(lists: Lists, lr: Any, **options: Any) -> None:
    params, backup, grads, moments, _, steps = lists
    restore_sgd_(params, backup, grads, moments, steps=steps, lr=lr, **options)


def adam(lists: Lists, lr: Any, **options: Any) -> None:
    restore_adam_(*lists, lr=lr, **options)


UPDATES: dict[str, tuple[Callable[..., None], dict[str, Any]]] = {
    "SGD": (sgd, {}),
    "SGD with all": (sgd, {"momentum": 0.9, "dampening": 0.3, "weight_decay": 0.1}),
    "Adam": (adam, {"weight_decay": 0.1}),
    "AdamW": (adam, {"weight_decay": 0.1, "decoupled_weight_decay": True}),
}


def lists() -> Lists:
    """(params, backup, grads, moments, squares, steps) of all dtypes."""
    backup = tensors(FLOATS, SHAPES)
    moments, squares = like(backup), [t.abs() for t in like(backup)]
    return [garbage(backup), backup, like(backup), moments, squares, counters(backup, 2.0)]


@pytest.mark.parametrize("rate", [0.1, 1e-3, 0.0, -0.25])
@pytest.mark.parametrize("name", UPDATES)
def test_an_element_is_the_number_that_it_holds(backend: str, name: str, rate: float) -> None:
    update, options = UPDATES[name]
    element = torch.tensor(rate)
    by_number = lists()
    by_element = [clones(each) for each in by_number]
    update(by_number, element.item(), **options)
    update(by_element, element, **options)
    assert all(map(all_same_bits, by_element, by_number))


@pytest.mark.parametrize("shape", [(), (1,), (1, 1)], ids=str)
@pytest.mark.parametrize("name", UPDATES)
def test_it_may_have_any_shape(backend: str, name: str, shape: tuple[int, ...]) -> None:
    update, options = UPDATES[name]
    first = lists()
    second = [clones(each) for each in first]
    update(first, torch.full((), 0.1), **options)
    update(second, torch.full(shape, 0.1), **options)
    assert all(map(all_same_bits, first, second))


@pytest.mark.parametrize("name", UPDATES)
def test_a_compiled_update_reads_it_anew(backend: str, name: str) -> None:
    """Without compiling again."""
    torch.compiler.reset()  # the tests share the function's code
    update, options = UPDATES[name]
    programs = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(
        lambda lists, lr: update(lists, lr, **options), fullgraph=True, backend=programs
    )
    eager = lists()
    ours = [clones(each) for each in eager]
    element = torch.zeros(())
    for rate in (0.3, 0.2, 0.1):
        element.fill_(rate)
        update(eager, element, **options)
        compiled(ours, element)
    assert all(map(all_same_bits, ours, eager))
    assert programs.frame_count == 1
