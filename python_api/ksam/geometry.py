"""How far a direction moves which weights: the geometry of the perturbation."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar, cast

import torch
from torch import Tensor

import ksam_kernels
from ksam.parts import Part
from ksam.radius import check_not_negative
from ksam_kernels.checks import check_number
from ksam_kernels.perturb.joint_norm import with_extra_norm

T = TypeVar("T")


@dataclass
class Moving:
    """Parameters that have a direction; every list has one entry for each of them.

    Attributes:
        params: the weights w.
        directions: the ascent direction g.
        backup: receives w.
        radii: rho, that of the parameter's group.
        names: of the parameters; empty if they were not given.
    """

    params: list[Tensor]
    directions: list[Tensor]
    backup: list[Tensor]
    radii: list[float]
    names: list[str]

    @classmethod
    def along(
        cls, params: list[Tensor], directions: list[Tensor | None], radii: list[float]
    ) -> Moving:
        """The parameters that have a direction; without backup and names."""
        known = [g is not None for g in directions]
        everything = cls(params, cast("list[Tensor]", directions), [], radii, [])
        return everything if all(known) else everything.take(known)

    def take(self, chosen: list[bool]) -> Moving:
        """The entries whose flag in ``chosen`` is True."""

        def kept(values: list[T]) -> list[T]:
            entries = zip(values, chosen, strict=True) if values else ()
            return [value for value, is_chosen in entries if is_chosen]

        return Moving(
            kept(self.params),
            kept(self.directions),
            kept(self.backup),
            kept(self.radii),
            kept(self.names),
        )


class Geometry(Part):
    r"""Perturbs by :math:`\rho\, g / \lVert g \rVert_2`, or in ASAM's form with one T for all.

    Args:
        adaptive: :math:`\rho\, T^2 g / \lVert T g \rVert_2` with :math:`T = |w| + \eta` for every
            parameter. With eta = 0 it is the form of the PyTorch implementation by davda54.
        eta: the floor of T, >= 0.

    Raises:
        TypeError: an ``adaptive`` that is not a bool.
        TypeError, ValueError: a negative, non-finite or non-numeric eta; one without ``adaptive``.
    """

    needs_names = False

    def __init__(self, adaptive: bool = False, eta: float = 0.0) -> None:
        if not isinstance(adaptive, bool):
            raise TypeError(f"adaptive must be a bool, got {adaptive!r}")
        self.adaptive = adaptive
        self.eta = check_not_negative("eta", eta)
        if eta != 0 and not adaptive:
            raise ValueError(f"eta must be 0 unless adaptive=True, got {eta!r}")

    def perturb(self, moving: Moving, moved: dict[Tensor, Tensor], seed: str) -> Tensor:
        """Perturb, and enter moved parameters into ``moved`` with their backup, even on a failure.

        Args:
            seed: what random choices depend on.

        Returns:
            The norm of the ascent direction in this geometry, a float32 scalar.
        """
        return self._climb(moving, moved, self.adaptive)

    def _climb(
        self,
        moving: Moving,
        moved: dict[Tensor, Tensor],
        adaptive: bool,
        norm_of_others: Tensor | None = None,
    ) -> Tensor:
        """``ksam_kernels.perturb_``; the norm may include that of other tensors' ``T g``."""
        lists = (moving.params, moving.directions, moving.backup, moving.radii)
        if norm_of_others is not None:
            lists = with_extra_norm(*lists, norm_of_others, adaptive, self.eta)
        params, directions, backup, radii = lists
        norm = ksam_kernels.perturb_(
            params, directions, backup, rho=radii, adaptive=adaptive, eta=self.eta
        )
        moved.update(zip(moving.params, moving.backup, strict=True))
        return norm


def named_weight(name: str) -> bool:
    """The rule of the authors' ASAM: the name contains "weight" (BatchNorm's scale does too)."""
    return "weight" in name


class NamedAdaptive(Geometry):
    r"""ASAM as its authors run it (Kwon et al. 2021): T = |w| + eta for some, 1 for the others.

    .. math:: \epsilon = \rho\, T^2 g / \lVert T g \rVert_2

    with one norm over all. Biases, whose T is 1, are perturbed too. Each of the two kinds is given
    the other's norm in float32, even where the weights are float64.

    Args:
        eta: the floor of T, >= 0.
        scaled: which parameters have T = |w| + eta, by name; default: :func:`named_weight`.

    Raises:
        TypeError, ValueError: a bad eta, or a ``scaled`` that is not a function.
    """

    needs_names = True

    def __init__(self, eta: float = 0.01, scaled: Callable[[str], bool] = named_weight) -> None:
        super().__init__(True, eta)
        if not callable(scaled):
            raise TypeError(f"scaled must be a function of a parameter's name, got {scaled!r}")
        self.scaled = scaled

    def perturb(self, moving: Moving, moved: dict[Tensor, Tensor], seed: str) -> Tensor:
        if len(moving.names) < len(moving.params):
            raise ValueError(
                f"params must have names, by which the geometry tells weights from biases, got "
                f"{len(moving.names)} names for {len(moving.params)} parameters; pass "
                f"model.named_parameters() as params, or pass model="
            )
        is_scaled = [self.scaled(name) for name in moving.names]
        others = moving.take([not scaled for scaled in is_scaled])
        weights = moving.take(is_scaled)
        norm_of_others = ksam_kernels.grad_norm(others.directions)
        if not weights.params:
            return self._climb(others, moved, adaptive=False)
        if not others.params:
            return self._climb(weights, moved, adaptive=True)
        norm = self._climb(weights, moved, adaptive=True, norm_of_others=norm_of_others)
        # NaN where the norm is 0, inf or NaN; then nothing moves.
        cosine = norm_of_others / norm
        norm_of_weights = norm * (1 - cosine * cosine).clamp_min(0).sqrt()
        self._climb(others, moved, adaptive=False, norm_of_others=norm_of_weights)
        return norm


class StochasticWeights(Geometry):
    r"""ESAM's stochastic weight perturbation (Du et al. 2022), by whole tensors.

    Every tensor is perturbed with probability :math:`\beta`, by
    :math:`\frac{\rho}{\beta} g / \lVert g \rVert_2`, with the norm over the tensors drawn (the
    paper draws coordinates, its authors' code whole tensors). If none is drawn, none moves.

    Args:
        beta: in (0, 1].
        adaptive, eta: as in :class:`Geometry`.
    """

    def __init__(self, beta: float = 0.5, adaptive: bool = False, eta: float = 0.0) -> None:
        super().__init__(adaptive, eta)
        check_number("beta", beta)
        if not 0 < beta <= 1:
            raise ValueError(f"beta must be in (0, 1], got {beta!r}")
        self.beta = beta

    def perturb(self, moving: Moving, moved: dict[Tensor, Tensor], seed: str) -> Tensor:
        drawn = random.Random(seed)
        chosen = moving.take([drawn.random() < self.beta for _ in moving.params])
        if not chosen.params:
            return torch.zeros((), dtype=torch.float32, device=moving.params[0].device)
        chosen.radii = [radius / self.beta for radius in chosen.radii]
        return self._climb(chosen, moved, self.adaptive)
