"""Which lists of tensors the perturb room takes, and which it refuses by name."""

from __future__ import annotations

import sys

import pytest
import torch

from ksam_kernels import perturb_, restore_, restore_adam_, restore_sgd_
from ksam_kernels.dtensor import first_dtensor, local
from ksam_kernels.perturb import native
from ksam_kernels.perturb.checks import check_list
from tests.helpers import FLOATS, all_same_bits
from tests.perturb.lists import clones, empty_like, like, tensors


def test_weights_that_overlap_are_not_restored(backend: str) -> None:
    w, whole = torch.ones(1).expand(3), torch.ones(3)
    states = [whole.clone()], [whole.clone()]
    for call in (
        lambda: restore_([w], [whole]),
        lambda: restore_sgd_([w], [whole], [whole], [], lr=0.1),
        lambda: restore_adam_([w], [whole], [whole], *states, [torch.zeros(())], lr=0.1),
    ):
        with pytest.raises(
            ValueError,
            match=r"params\[0\] must not have elements that share memory, .* strides \(0,\)",
        ):
            call()


def test_a_stride_of_0_is_no_overlap_where_there_is_one_element_or_none() -> None:
    """As torch gives to dimensions of one element; ``native.fits`` has the same rule."""
    one, none = torch.ones(1, 3).as_strided((1, 3), (0, 1)), torch.ones(0).expand(2, 0)
    check_list("params", [one, torch.ones(()).expand(1), none], written=True)
    with pytest.raises(
        ValueError, match=r"params\[1\] must not have elements that share memory, .* shape \(2, 1\)"
    ):
        check_list("params", [one, one[:, :1].expand(2, 1)], written=True)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_gradients_of_another_dtype_where_no_kernel_looks_at_them(
    backend: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in an installation without the extension."""
    params = tensors(FLOATS)
    grads, backup, moved = like(params, dtype), empty_like(params), clones(params)
    expected = clones(params)
    norm = perturb_(expected, grads, clones(params), rho=2.0)
    monkeypatch.setattr(native, "fits", lambda *_, **__: False)
    monkeypatch.setattr(native, "direct", lambda _: None)
    monkeypatch.setattr(native, "direct_in_place", lambda _: None)
    assert torch.equal(perturb_(moved, grads, backup, rho=2.0), norm)
    assert all_same_bits(moved, expected)
    assert all_same_bits(backup, params)


def test_without_their_package_there_are_no_dtensors(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "torch.distributed.tensor", raising=False)
    x = torch.ones(2)
    assert first_dtensor([x]) is None
    assert local(x) is x
