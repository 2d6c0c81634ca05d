"""The compiled extension's own account of where it runs."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from ksam_kernels import native


def test_the_extension_says_which_gpus_it_has_no_code_for(monkeypatch: pytest.MonkeyPatch) -> None:
    built = SimpleNamespace(
        has_code_for=lambda index: index == 0,
        why_no_code=lambda index: f"no image for {index}",
        cuda_architectures="80 120+PTX",
    )
    monkeypatch.setattr(native, "extension", built)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (7, 5))
    assert native._has_no_code(torch.device("cuda", 0)) is None
    assert native._has_no_code(torch.device("cpu")) is None
    for device in (torch.device("cuda", 1), torch.device("cuda")):
        assert native._has_no_code(device) == (
            f"CUDA says of it on {device}, 'no image for 1': it was built for sm_80, sm_120+PTX, "
            f"and {device} is sm_75 (TORCH_CUDA_ARCH_LIST=7.5 builds for that)"
        )
