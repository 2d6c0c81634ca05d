"""Where there is no memory: the error is torch's, and weights come back all the same."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from ksam_kernels import grad_norm, restore_, use_backend
from ksam_kernels.perturb import native, reference
from tests.conftest import INSTALLED
from tests.device import DEVICE
from tests.helpers import all_same_bits
from tests.perturb.lists import mixed

#: Backends whose kernels ask torch for scratch memory on the device.
WITH_SCRATCH = [b for b in INSTALLED if b == "simt" or (b == "native" and DEVICE.type == "cuda")]


@pytest.mark.parametrize("name", WITH_SCRATCH)
def test_scratch_that_is_too_large_is_out_of_memory(name: str) -> None:
    """One number a chunk, of more chunks than any memory has room for."""
    grads = [torch.ones(()).expand(2**52)]
    with use_backend(name), pytest.raises(torch.OutOfMemoryError, match=r"allocate \d+ bytes of"):
        grad_norm(grads)


def no_memory(*_: Any) -> None:
    raise torch.OutOfMemoryError("CUDA out of memory")


@pytest.mark.skipif("native" not in INSTALLED, reason="the extension is not built")
@pytest.mark.parametrize(
    "restore", [restore_, torch.ops.ksam.restore_], ids=["function", "operator"]
)
def test_weights_come_back_where_the_kernel_cannot_be_loaded(
    monkeypatch: pytest.MonkeyPatch, restore: Callable[..., object]
) -> None:
    """After a step that failed for want of memory, whose activations may still be held."""
    backup = mixed()
    params = [torch.zeros_like(b).requires_grad_() for b in backup]
    versions = [p._version for p in params]
    monkeypatch.setattr(native.extension, "restore_", no_memory)
    with use_backend("native"), torch.set_grad_enabled(restore is restore_):
        restore(params, backup)
    assert all_same_bits([p.detach() for p in params], backup)
    assert all(p._version > v for p, v in zip(params, versions, strict=True))


def test_other_errors_of_a_kernel_are_not_hidden() -> None:
    w = torch.zeros(2)
    with pytest.raises(RuntimeError, match="a fault"), reference.restoring([w], [torch.ones(2)]):
        raise RuntimeError("a fault")
    assert torch.equal(w, torch.zeros(2))
