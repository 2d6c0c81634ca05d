"""An index or a class out of range never passes: an IndexError, or the device's own assertion.

An assertion leaves a process without its GPU, so every case has a process of its own. Run where
``KSAM_TEST_DEVICE`` names a device.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import INSTALLED
from tests.device import DEVICE
from tests.simt import backend as simt

ROOT = Path(__file__).parents[1]

PREAMBLE = f"""
import torch
import ksam_kernels as kk
torch.set_default_device("{DEVICE}")
x, rows = torch.randn(3, 5), (torch.randn(4, 2), torch.arange(4))
_, stats = torch.ops.ksam.cross_entropy(x, torch.tensor([0, 1, 2]), None, -100, 0.0)
if x.is_cuda: torch.cuda.synchronize()
print("ready", flush=True)
"""

CALLS = {
    "a class below 0": "kk.cross_entropy(x, torch.tensor([0, 4, -1]))",
    "class C": "kk.cross_entropy(x, torch.tensor([0, 4, 5]))",
    "class C of a selection": "kk.select_cross_entropy(x, torch.tensor([0, 4, 5]).int(), 1)",
    "class C in the backward pass": "torch.ops.ksam.cross_entropy_backward("
    "torch.ones(3), x, torch.tensor([0, 4, 5]), stats, None, -100, 0.0)",
    "an index below 0": "kk.compact_batch(rows, torch.tensor([0, -1]))",
    "index B": "kk.compact_batch(rows, torch.tensor([0, 4]).int())",
}


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
@pytest.mark.parametrize("backend", INSTALLED)
def test_out_of_range(backend: str, call: str) -> None:
    registers = f"import {simt.__name__}" if backend == simt.NAME else ""
    code = f"{registers}{PREAMBLE}\nwith kk.use_backend({backend!r}):\n  {call}\n  x.sum().item()"
    result = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        timeout=100,
    )
    assert result.stdout == "ready\n", result.stderr
    assert result.returncode != 0
    knows_before = DEVICE.type == "cpu" and backend != simt.NAME
    assert ("IndexError" if knows_before else "device-side assert") in result.stderr
