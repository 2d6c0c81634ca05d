"""Where the weights are kept while they are perturbed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ksam.identity import same


def _kind(tensor: Tensor) -> tuple[torch.Size, torch.dtype, torch.device]:
    return tensor.shape, tensor.dtype, tensor.device


class Backups:
    """Kept between steps: stable addresses, and no allocation in the loop."""

    def __init__(self) -> None:
        self._of: dict[Tensor, Tensor] = {}
        self._last: tuple[list[Tensor], list[Any], list[Tensor]] = [], [], []

    def of(self, params: list[Tensor], present: Callable[[], list[Tensor]]) -> list[Tensor]:
        """One for each of the parameters. Where there is a new one, those of parameters that are no
        longer ``present()`` are forgotten."""
        kinds = [_kind(p) for p in params]
        of_last, kinds_of_last, backups = self._last
        if not same(params, of_last) or kinds != kinds_of_last:
            backups, grown = [], False
            for p, kind in zip(params, kinds, strict=True):
                backup = self._of.get(p)
                if backup is None or _kind(backup) != kind:
                    backup = self._of[p] = torch.empty_like(p, requires_grad=False)
                    grown = True
                backups.append(backup)
            if grown:
                self._of = {p: self._of[p] for p in present() if p in self._of}
            self._last = params, kinds, backups
        return backups
