"""The radius of a perturbation: a number, or a function of the step or of the learning rate."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ksam_kernels.checks import check_finite, check_range


def check_not_negative(name: str, value: Any) -> float:
    """The value as a float.

    Raises:
        TypeError, ValueError: not a finite number >= 0; the message names it.
    """
    check_range(name, value, 0.0)
    return float(value)


@dataclass(frozen=True)
class ByLearningRate:
    r"""A radius :math:`\rho_t = \rho\, \eta_t / \eta_{max}` in proportion to the learning rate.

    GSAM's radius (Zhuang et al. 2022) with both lower ends at 0. :math:`\eta_{max}` is the highest
    learning rate that the group has had so far, or that a torch scheduler notes as ``initial_lr``
    or ``max_lr``; it is kept in ``param_groups`` as ``peak_lr``. With a constant learning rate the
    radius is constant.

    Args:
        rho: radius >= 0 at the highest learning rate.

    Raises:
        TypeError, ValueError: a negative, non-finite or non-numeric rho; a learning rate that is
            not a finite number.
    """

    rho: float

    def __post_init__(self) -> None:
        check_not_negative("rho", self.rho)

    def of(self, group: dict[str, Any]) -> float:
        """The radius of a parameter group; waits for a learning rate that is on a device."""
        noted = map(group.get, ("lr", "peak_lr", "initial_lr", "max_lr"))
        rates: list[Any] = [float(rate) if isinstance(rate, Tensor) else rate for rate in noted]
        lr = rates[0]
        check_finite("lr", lr)
        peak = group["peak_lr"] = max(rate for rate in rates if rate is not None)
        return self.rho * max(lr, 0.0) / peak if peak > 0 else 0.0  # schedulers end at -1e-18 too


Rho = float | Callable[[int], float | int] | ByLearningRate

#: For a perturbation along a gradient not scaled by weights: Foret et al. 2020, for CIFAR.
DEFAULT_RHO = 0.05


def check_radius(rho: object, name: str = "rho") -> Rho:
    """``rho``, checked if it is a number; what gives one at every step is returned unchanged."""
    if callable(rho) or isinstance(rho, ByLearningRate):
        return rho
    return check_not_negative(name, rho)


def radius_at(rho: Rho, step: int, group: dict[str, Any]) -> float:
    """The radius of a parameter group at a step."""
    if isinstance(rho, ByLearningRate):
        return rho.of(group)
    return check_not_negative("rho", rho(step) if callable(rho) else rho)
