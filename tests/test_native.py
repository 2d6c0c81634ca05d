"""The compiled extension's own account of where it runs."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

import ksam_kernels as kk
from ksam_kernels import library, native
from ksam_kernels.topk import native as topk_native
from tests.device import DEVICE
from tests.helpers import all_same_bits


def test_cuda_is_not_asked_for_amds_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "extension", SimpleNamespace())
    monkeypatch.setattr(torch.version, "hip", "6.4")
    assert native._has_no_code(torch.device("cpu")) is None
    assert native._has_no_code(torch.device("cuda", 0)) == (
        "its GPU kernels are for CUDA, and this torch is for AMD GPUs"
    )


def test_the_extension_says_which_gpus_it_has_no_code_for(monkeypatch: pytest.MonkeyPatch) -> None:
    built = SimpleNamespace(
        has_code_for=lambda index: index == 0,
        why_no_code=lambda index: f"no image for {index}",
        cuda_architectures="80 120+PTX",
    )
    monkeypatch.setattr(native, "extension", built)
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (7, 5))
    assert native._has_no_code(torch.device("cuda", 0)) is None
    assert native._has_no_code(torch.device("cpu")) is None
    for device in (torch.device("cuda", 1), torch.device("cuda")):
        assert native._has_no_code(device) == (
            f"CUDA cannot load it on {device} ('no image for 1'): it was built for sm_80, "
            f"sm_120+PTX, and {device} is sm_75 (TORCH_CUDA_ARCH_LIST=7.5 builds for that)"
        )


Y, SOFT = torch.arange(7) % 5, torch.rand(7, 5)

#: Calls that the kernels take as they are.
CALLS: dict[str, Callable[[Tensor], Any]] = {
    "cross_entropy": lambda x: kk.cross_entropy(x, Y, label_smoothing=0.1),
    "select_cross_entropy": lambda x: kk.select_cross_entropy(x, Y, 3),
    "bce": lambda x: kk.binary_cross_entropy_with_logits(x, SOFT),
    "bce with pos_weight": lambda x: kk.binary_cross_entropy_with_logits(
        x, SOFT, pos_weight=torch.arange(5.0)
    ),
    "mse": lambda x: kk.mse(x, SOFT),
    "mse of [B]": lambda x: kk.mse(x.reshape(-1), SOFT.reshape(-1)),
    "topk": lambda x: kk.topk_indices(x.reshape(-1), 3),
    "compact": lambda x: kk.compact_batch({"x": x}, torch.tensor([5, 0]))["x"],
}
if DEVICE.type == "cpu":
    CALLS["topk of strided losses"] = lambda x: kk.topk_indices(x[:, 1], 3)

LOSSES = [name for name in CALLS if "topk" not in name and name != "compact"]


def tensors(result: Any) -> list[Tensor]:
    return list(result) if isinstance(result, tuple) else [result]


def refused(*_: Any) -> None:
    raise AssertionError("the long way")


@pytest.fixture
def no_long_way(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only what a kernel takes as it is gets a result."""
    if kk.backends.why_not("native", "mse", DEVICE) is not None:
        pytest.skip("there are no native kernels")
    monkeypatch.setattr(library, "call", refused)


@pytest.mark.usefixtures("no_long_way")
@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("name", CALLS)
def test_the_kernels_are_tried_before_anything_is_checked(
    name: str, mode: Callable[[], Any]
) -> None:
    x = torch.randn(7, 5)
    with kk.use_backend("native"):
        expected = tensors(CALLS[name](x))
        with mode():
            results = tensors(CALLS[name](x.clone()))
    assert all_same_bits(results, expected)
    assert all(result.is_inference() == (mode is torch.inference_mode) for result in results)


@pytest.mark.usefixtures("no_long_way")
@pytest.mark.parametrize("name", LOSSES)
def test_the_kernels_are_tried_first_in_the_backward_pass_too(name: str) -> None:
    x = torch.randn(7, 5, requires_grad=True)
    with kk.use_backend("native"):
        losses = tensors(CALLS[name](x))[0]
        (gradient,) = torch.autograd.grad(losses.mean(), x)
    assert gradient.isfinite().all()


@pytest.mark.usefixtures("backend")
def test_weights_of_inference_mode_are_perturbed_and_restored() -> None:
    with torch.inference_mode():
        params, grads, backup = ([torch.randn(5)] for _ in range(3))
        before = [params[0].clone()]
        norm = kk.perturb_(params, grads, backup, rho=0.1)
        assert norm > 0
        assert all_same_bits(backup, before)
        kk.restore_(params, backup)
        assert all_same_bits(params, before)


def test_more_losses_than_the_kernels_count_are_left_to_the_reference(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    losses, seen = torch.zeros(1, device=DEVICE).expand(2**32), []

    def noted(losses: Tensor, k: int) -> Tensor:
        seen.append(losses.shape)
        return torch.arange(k, device=losses.device)

    monkeypatch.setattr(topk_native.reference, "topk_indices", noted)
    with kk.use_backend("native"):
        assert kk.topk_indices(losses, 3).tolist() == [0, 1, 2]
    assert seen == [losses.shape]
