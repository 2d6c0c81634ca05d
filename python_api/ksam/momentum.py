"""The base optimizer's momentum as ascent direction: no gradient of its own."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any, Literal

from torch import Tensor
from torch.optim import Optimizer

from ksam.distributed import is_zero
from ksam.parts import Part
from ksam.radius import Rho, check_radius, radius_at

#: Where optimizers keep their momentum in ``state``: SGD and RMSprop; Adam, AdamW, NAdam and RAdam.
_NAMES = ("momentum_buffer", "exp_avg")


def momentum_radius(
    rho: Rho | Literal["auto"], base: type[Optimizer] | Optimizer, name: str = "rho"
) -> Rho:
    """``rho``; for ``"auto"`` 0.05 with Adam and its kin, whose steps are shorter, else 0.3. Kin
    are the optimizers, of whatever library, that have ``betas``.

    Raises:
        TypeError, ValueError: a negative, non-finite or non-numeric rho, called ``name``.
    """
    if rho != "auto":
        return check_radius(rho, name)
    kind = base if isinstance(base, type) else type(base)
    return 0.05 if any(map(_takes_betas, kind.__mro__)) else 0.3


def _takes_betas(kind: type) -> bool:
    return issubclass(kind, Optimizer) and "betas" in inspect.signature(kind.__init__).parameters


class Momentum(Part):
    r"""MSAM's ascent :math:`\hat w = w - \rho\, v / \lVert v \rVert_2` (Becker et al. 2024).

    v is the momentum of the step before. It points back to where the weights came from, so -v
    points ahead: past the next step, where a sharp valley rises again. The kernel reads v where the
    base optimizer keeps it. A parameter has no v at its first step, and does not move then.

    Args:
        rho: radius of the perturbation, a number >= 0, a function of the step (from 0), or
            :class:`~ksam.radius.ByLearningRate`; None: that of the parameter groups.

    Raises:
        TypeError, ValueError: a negative, non-finite or non-numeric rho.
    """

    def __init__(self, rho: Rho | None = None) -> None:
        self.rho = None if rho is None else check_radius(rho)

    @staticmethod
    def check(base: Optimizer, group: Mapping[str, Any]) -> None:
        """Refuse a base that keeps no momentum: its weights would silently not be perturbed.

        Raises:
            ValueError: the group has neither a ``momentum`` that is not 0, nor ``betas``, or the
                base is a ZeroRedundancyOptimizer.
        """
        if is_zero(base):
            raise ValueError(
                "base must keep the momentum of all parameters on every rank, as weights are "
                "perturbed along it, got ZeroRedundancyOptimizer, which keeps a part on each"
            )
        if "betas" in group or group.get("momentum", 0) != 0:
            return
        found = f"momentum={group['momentum']!r}" if "momentum" in group else "neither"
        raise ValueError(
            f"base must have momentum or betas, as weights are perturbed along its momentum, got "
            f"{type(base).__name__} with {found}; use SGD with momentum=0.9, say, or AdamW"
        )

    def directions(self, base: Optimizer, params: list[Tensor]) -> list[Tensor | None]:
        """v of every parameter, to move against; None if it has none yet, or is frozen.

        Raises:
            ValueError: there is state, but without a momentum under a known name, or with one that
                is not a tensor of the parameter's size.
        """
        states = [base.state.get(p, {}) if p.requires_grad else {} for p in params]
        found = [_momentum(state) for state in states]
        for p, v in zip(params, found, strict=True):
            if v is not None and (not isinstance(v, Tensor) or v.numel() != p.numel()):
                what = tuple(v.shape) if isinstance(v, Tensor) else f"a {type(v).__name__}"
                raise ValueError(
                    f"base must keep a momentum of each parameter's shape to perturb it along, "
                    f"got {type(base).__name__} with {what} for a parameter of {tuple(p.shape)}"
                )
        if all(v is None for v in found) and any(states):
            names = {name for state in states for name in state}
            if names.isdisjoint(_NAMES):
                raise ValueError(
                    f"base must keep its momentum in its state as {' or '.join(_NAMES)}, got "
                    f"{type(base).__name__} with {', '.join(sorted(map(str, names)))}"
                )
        if set(map(type, found)) <= {Tensor, type(None)}:  # mostly
            return found
        return [v if v is None else _dequantized(v) for v in found]

    def radius(self, group: dict[str, Any], step: int) -> float:
        """The signed radius of a group at a step: negative, since the ascent follows -v."""
        return -(group["rho"] if self.rho is None else radius_at(self.rho, step, group))


def _dequantized(v: Tensor) -> Tensor:
    """The numbers that a quantized tensor stands for, such as an 8-bit momentum of torchao; any
    other tensor as it is."""
    if type(v).dequantize is Tensor.dequantize:
        return v
    return v.dequantize()


def _momentum(state: dict[str, Any]) -> Any:
    buffer = state.get(_NAMES[0])  # spelled out: a loop takes as long as the step's kernels
    return state.get(_NAMES[1]) if buffer is None else buffer
