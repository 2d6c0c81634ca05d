"""The backend ``simt``: the CUDA kernels on CPU tensors, executed by the runner. For tests only.

It says whether the kernels compute what the contracts ask; nothing about a GPU's speed, and little
about its memory order. ``auto`` never picks it.
"""

from __future__ import annotations

import importlib.util
import os
from types import ModuleType

from ksam_kernels.compact import native as compact
from ksam_kernels.loss import native as loss
from ksam_kernels.perturb import native as perturb
from ksam_kernels.topk import native as topk
from tests.simt import build

NAME = "simt"
ROOMS = (loss, topk, compact, perturb)


def _load() -> ModuleType | None:
    path = build.output(os.environ.get("KSAM_SIMT_SANITIZE", ""))
    if not path.is_file():
        return None
    spec = importlib.util.spec_from_file_location("_simt", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


extension = _load()

#: Why the backend is not there; None if it is.
MISSING = (
    None if extension is not None else (build.missing() or "not built: python -m tests.simt.build")
)

if extension is not None:
    for room in ROOMS:
        room.register(NAME, extension, ("cpu",))
    extension.set_seed(int(os.environ.get("KSAM_SIMT_SEED", "1")))
