"""Where the weights are kept while they are perturbed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import ksam_kernels
from ksam.identity import same


def _kinds(tensors: list[Tensor]) -> tuple[list[Any], ...]:
    """What a backup has in common with its parameter."""
    return [t.shape for t in tensors], [t.dtype for t in tensors], [t.device for t in tensors]


def put_back(backup: dict[Tensor, Tensor]) -> None:
    """Restore the weights from ``backup``: perturbed parameter -> what it held before."""
    ksam_kernels.restore_(list(backup), list(backup.values()))


class Backups:
    """Backups kept between steps: stable addresses, and no allocation in the loop."""

    def __init__(self) -> None:
        self._of: dict[Tensor, Tensor] = {}
        # Those of the last call, which most calls repeat.
        self._params: list[Tensor] = []
        self._kinds = _kinds([])
        self._backups: list[Tensor] = []

    def of(self, params: list[Tensor], present: Callable[[], list[Tensor]]) -> list[Tensor]:
        """A backup for each of the parameters. When one is new, those of parameters that are no
        longer ``present()`` are forgotten."""
        kinds = _kinds(params)
        if kinds == self._kinds and same(params, self._params):
            return self._backups
        backups, grown = [], False
        for p in params:
            backup = self._of.get(p)
            if backup is None or _kinds([backup]) != _kinds([p]):
                backup = self._of[p] = torch.empty_like(p, requires_grad=False)
                grown = True
            backups.append(backup)
        if grown:
            self._of = {p: self._of[p] for p in present() if p in self._of}
        self._params, self._kinds, self._backups = params, kinds, backups
        return backups
