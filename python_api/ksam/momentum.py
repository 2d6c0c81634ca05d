"""The base optimizer's momentum as ascent direction: no gradient of its own."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from ksam.parts import Part
from ksam.selection import check_rho

#: Where optimizers keep their momentum in ``state``: SGD and RMSprop; Adam, AdamW, NAdam and RAdam.
_NAMES = ("momentum_buffer", "exp_avg")


class Momentum(Part):
    r"""MSAM's direction :math:`-v`, v the momentum of the step before (Becker et al. 2024).

    v points where the weights just came from, -v where they are going: beyond the next step, where
    a sharp valley rises again. At a parameter's first step there is no v, and it does not move.

    Args:
        rho: radius >= 0 of the perturbation; None: that of the parameter groups.

    Raises:
        TypeError, ValueError: a negative, non-finite or non-numeric rho.
    """

    def __init__(self, rho: float | None = None) -> None:
        self.rho = None if rho is None else check_rho(rho)

    def check(self, base: Optimizer) -> None:
        """A base that keeps no momentum would never be perturbed, in silence.

        Raises:
            ValueError: ``momentum`` is 0 in a group of the base.
        """
        for group in base.param_groups:
            if group.get("momentum", 1) == 0:
                raise ValueError(
                    f"base must have momentum to perturb along, got momentum={group['momentum']!r}"
                )

    def directions(self, base: Optimizer, params: list[Tensor]) -> list[Tensor | None]:
        """-v of every parameter; None where there is none yet."""
        buffers = [_momentum(base.state.get(p, {})) for p in params]
        known = [b for b in buffers if b is not None]
        # perturb_ takes no negative radius; one more pass over v.
        negative = iter(torch._foreach_neg(known) if known else ())
        return [None if b is None else next(negative) for b in buffers]


def _momentum(state: dict[str, Any]) -> Tensor | None:
    found = (state.get(name) for name in _NAMES)
    return next((buffer for buffer in found if isinstance(buffer, Tensor)), None)
