"""Where the weights are kept while they are perturbed."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


class Backups:
    """Kept between steps: stable addresses, and no allocation in the loop."""

    def __init__(self) -> None:
        self._of: dict[Tensor, Tensor] = {}

    def of(self, params: list[Tensor], present: Callable[[], list[Tensor]]) -> list[Tensor]:
        """One for each of the parameters. Where there is a new one, those of parameters that are no
        longer ``present()`` are forgotten."""
        backups, grown = [], False
        for p in params:
            backup = self._of.get(p)
            if (
                backup is None
                or backup.shape != p.shape
                or backup.dtype != p.dtype
                or backup.device != p.device
            ):
                backup = self._of[p] = torch.empty_like(p, requires_grad=False)
                grown = True
            backups.append(backup)
        if grown:
            self._of = {p: self._of[p] for p in present() if p in self._of}
        return backups
