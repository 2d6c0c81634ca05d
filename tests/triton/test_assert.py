"""A launch states its kernel's checks by where it runs, not by how the library was imported."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch

from ksam_kernels.compact import triton as compact
from ksam_kernels.loss import triton as loss
from ksam_kernels.triton_support import assertions, is_amd


def test_only_gpus_of_a_rocm_torch_are_amds(monkeypatch: pytest.MonkeyPatch) -> None:
    for hip, found in ((None, False), ("6.4", True)):
        monkeypatch.setattr(torch.version, "hip", hip)
        assert is_amd(torch.device("cuda", 0)) is found
        assert is_amd(torch.device("cpu")) is False  # the interpreter, which has no assembler


def test_either_an_assertion_or_a_trap() -> None:
    assert assertions(amd=False) == {"TRAPS": False, "debug": True, "sanitize_overflow": False}
    assert assertions(amd=True) == {"TRAPS": True, "debug": False, "sanitize_overflow": False}


class Launches(dict[str, Any]):
    """In place of a kernel: the keywords of its last launch."""

    def __getitem__(self, grid: object) -> Any:
        return lambda *args, **keywords: self.update(keywords)


@pytest.mark.parametrize("amd", [False, True])
def test_launches_say_what_the_device_is(amd: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    rows, target = torch.zeros(2, 3), torch.zeros(2, dtype=torch.int64)
    for module, name, launch in (
        (loss.kernels, "cross_entropy_kernel", partial(loss.cross_entropy, rows, target)),
        (compact, "gather_kernel", partial(compact.compact, [rows], target)),
    ):
        launched = Launches()
        monkeypatch.setattr(module, name, launched)
        monkeypatch.setattr(module if module is compact else loss, "is_amd", lambda _: amd)
        launch(*((None, -100, 0.0) if module is not compact else ()))
        assert launched.items() >= assertions(amd=amd).items()
