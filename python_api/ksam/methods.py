"""The methods of the family: each is a choice of parts for the same engine.

Besides its own arguments, each takes those of :class:`ksam.optimizer.SharpnessAware` that it does
not set itself (``params``, ``base``, ``model``, ``when``, ``seed``, ...), and the base optimizer's.
M is the batch size. Costs are in units of the base optimizer's step, counting a forward pass over
a sample as 1 and a backward pass as 2.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Literal

from torch.optim import Optimizer

from ksam.geometry import Geometry, NamedAdaptive, StochasticWeights, named_weight
from ksam.momentum import Momentum, momentum_radius
from ksam.optimizer import SharpnessAware
from ksam.radius import DEFAULT_RHO, Rho
from ksam.samplers import AccuracySchedule, All, Importance, LossIncrease, Ordered, Random, TopK
from ksam.selection import Amount, K, Schedule
from ksam.tables import Index, SharpnessSample, StaleTopK
from ksam.when import Representative

Params = Iterable[Any] | None
Base = type[Optimizer] | Optimizer


def _with_parts(method: SharpnessAware, options: dict[str, Any], **parts: Any) -> dict[str, Any]:
    """The options, with the parts that the method is made of.

    Raises:
        TypeError: one of the parts is among the options.
    """
    for name in parts:
        if name in options:
            raise TypeError(
                f"{name} must not be given to {type(method).__name__}, which sets it itself, "
                f"got {options[name]!r}; to combine parts of your own, use SharpnessAware"
            )
    return {**options, **parts}


class _AmountOf:
    """How many samples a method's ascent or descent chooses, as it was given; may be set."""

    def __init__(self, part: Literal["ascent", "descent"]) -> None:
        self._part = part

    def __get__(self, optimizer: SharpnessAware | None, owner: type) -> Any:
        return self if optimizer is None else getattr(optimizer, self._part).amount.value

    def __set__(self, optimizer: SharpnessAware, value: K | Schedule) -> None:
        sampler = getattr(optimizer, self._part)
        sampler.amount = Amount(value, sampler.amount.name)


class KSAM(SharpnessAware):
    r"""Sharpness-aware minimization on the k highest-loss samples of each batch (Ni et al. 2022).

    A step selects the k samples S with the highest loss, climbs to
    :math:`\hat w = w + \rho\, g / \lVert g \rVert_2` along their gradient :math:`g`, takes the
    gradient of the same samples there, returns to w bit for bit and lets the base optimizer update
    it. In units of a forward pass over one sample, a step costs M + 6k and one of SGD 3M: the same
    at k = M/3. k = 1.0 is SAM (Foret et al. 2020), or with ``adaptive`` ASAM (Kwon et al. 2021).

    Args:
        rho: radius of the perturbation: a number >= 0, a function of the step (from 0), or
            :class:`~ksam.radius.ByLearningRate`. It is kept in ``param_groups``; a single norm is
            taken over all groups.
        k: samples selected: a fraction of the batch in (0, 1] (float), a count (int), or a function
            of the step that returns either.
        adaptive: weight the perturbation by :math:`T = |w| + \eta`.
        eta: the floor of T, >= 0.
        random: share of the k that is drawn from the other samples instead, in [0, 1].
        options: the arguments of :class:`~ksam.optimizer.SharpnessAware` except ``ascent`` and
            ``geometry``, which are set here, and those of the base optimizer.

    Raises:
        TypeError, ValueError: an argument out of its range; the message names it.
    """

    k = _AmountOf("ascent")

    def __init__(
        self,
        params: Params,
        base: Base,
        *,
        rho: Rho = DEFAULT_RHO,
        k: K | Schedule = 1 / 3,
        adaptive: bool = False,
        eta: float = 0.0,
        random: float = 0.0,
        **options: Any,
    ) -> None:
        parts = {"ascent": TopK(k, random), "geometry": Geometry(adaptive, eta)}
        super().__init__(params, base, rho=rho, **_with_parts(self, options, **parts))


class AutoKSAM(KSAM):
    r"""K-SAM where the selection represents the batch, MSAM elsewhere: to switch on and forget.

    A step costs at most 1.02 on average: ``budget`` plus 2 % for the rounding of k.

    :class:`~ksam.when.Representative` decides where. There the sum over the selection, divided by
    M, is nearly the batch's gradient (``scale="batch"``; the mean over the selection is up to M / k
    times as long), and BatchNorm's values are matched to the batch's (``statistics="matched"``,
    given ``model``; with ``micro_batch_size`` they are the subset's). All other steps are those of
    :class:`MSAM`, at the same cost.

    Args:
        momentum_rho: radius of MSAM's steps, like ``rho`` of :class:`MSAM`. None: those steps are
            plain, and ``base`` need not have momentum.
        threshold, every, budget: as in :class:`~ksam.when.Representative`.
        options: those of :class:`KSAM`, except ``when`` and ``otherwise``.
    """

    def __init__(
        self,
        params: Params,
        base: Base,
        *,
        momentum_rho: Rho | Literal["auto"] | None = "auto",
        threshold: float = 0.9,
        every: int = 10,
        budget: float | None = 1.0,
        **options: Any,
    ) -> None:
        otherwise = self._along_momentum(momentum_rho, base)
        statistics = "matched" if options.get("micro_batch_size") is None else "subset"
        parts = {"when": Representative(threshold, every, budget), "otherwise": otherwise}
        options = {"scale": "batch", "statistics": statistics, **options}
        super().__init__(params, base, **_with_parts(self, options, **parts))

    @property
    def momentum_rho(self) -> Rho | None:
        """The radius of MSAM's steps; None: these steps are plain. May be set."""
        return None if self.otherwise is None else self.otherwise.rho

    @momentum_rho.setter
    def momentum_rho(self, rho: Rho | Literal["auto"] | None) -> None:
        self.otherwise = self._along_momentum(rho, self.base)

    @staticmethod
    def _along_momentum(rho: Rho | Literal["auto"] | None, base: Base) -> Momentum | None:
        return None if rho is None else Momentum(momentum_radius(rho, base, "momentum_rho"))


class ImportanceKSAM(SharpnessAware):
    r"""K-SAM with k samples drawn by the norm of their logits' gradient, weighted to be unbiased.

    A step costs (M + 6k) / 3M.

    See :class:`~ksam.samplers.Importance` (Katharopoulos & Fleuret 2018) for the distribution.

    Args:
        k, rho: as in :class:`KSAM`.
        uniform: share of the uniform distribution that is mixed in, in [1e-6, 1].
    """

    k = _AmountOf("ascent")

    def __init__(
        self,
        params: Params,
        base: Base,
        *,
        rho: Rho = DEFAULT_RHO,
        k: K | Schedule = 1 / 3,
        uniform: float = 0.1,
        **options: Any,
    ) -> None:
        parts = {"ascent": Importance(k, uniform)}
        super().__init__(params, base, rho=rho, **_with_parts(self, options, **parts))


class SAM(SharpnessAware):
    r"""Sharpness-aware minimization (Foret et al. 2020): both gradients on the batch, a cost of 2.

    :math:`\epsilon = \rho\, g / \lVert g \rVert_2` over all parameters, with one norm. Weight decay
    is left to the base optimizer and is not part of g (in the authors' JAX code it is).

    Args:
        rho, adaptive, eta: as in :class:`KSAM`.
    """

    def __init__(
        self,
        params: Params,
        base: Base,
        *,
        rho: Rho = DEFAULT_RHO,
        adaptive: bool = False,
        eta: float = 0.0,
        **options: Any,
    ) -> None:
        parts = {"ascent": All(), "geometry": Geometry(adaptive, eta)}
        super().__init__(params, base, rho=rho, **_with_parts(self, options, **parts))


class ASAM(SharpnessAware):
    r"""Adaptive SAM (Kwon et al. 2021): :math:`\epsilon = \rho\, T^2 g / \lVert T g \rVert_2`.

    A step costs 2.

    Args:
        rho: radius; the authors use 0.5 for CIFAR-10 and 1.0 for CIFAR-100.
        eta: :math:`T = |w| + \eta`.
        scaled: which parameters have that T, by name; the others have T = 1. Default: those with
            "weight" in their name, as in the authors' code. None: all of them; with ``eta=0`` that
            is the form of the PyTorch implementation by davda54. Names come from
            ``params=model.named_parameters()`` or from ``model``.
    """

    def __init__(
        self,
        params: Params,
        base: Base,
        *,
        rho: Rho = 0.5,
        eta: float = 0.01,
        scaled: Callable[[str], bool] | None = named_weight,
        **options: Any,
    ) -> None:
        geometry = Geometry(True, eta) if scaled is None else NamedAdaptive(eta, scaled)
        parts = {"ascent": All(), "geometry": geometry}
        super().__init__(params, base, rho=rho, **_with_parts(self, options, **parts))


class ESAM(SharpnessAware):
    r"""Efficient SAM (Du et al. 2022): random tensors perturbed, descent where the loss rose most.

    Ascent on the whole batch, a forward pass at :math:`\hat w`, descent on :math:`\gamma M`
    samples: a step costs (4 + 3γ) / 3, so 1.83 at γ = 0.5. Perturbing fewer tensors saves nothing.

    Args:
        rho: as in :class:`KSAM`.
        beta: probability that a tensor is perturbed (:class:`~ksam.geometry.StochasticWeights`).
        gamma: how many samples to descend on (:class:`~ksam.samplers.LossIncrease`).
        adaptive, eta: as in :class:`KSAM`.
    """

    gamma = _AmountOf("descent")

    def __init__(
        self,
        params: Params,
        base: Base,
        *,
        rho: Rho = DEFAULT_RHO,
        beta: float = 0.5,
        gamma: K | Schedule = 0.5,
        adaptive: bool = False,
        eta: float = 0.0,
        **options: Any,
    ) -> None:
        parts = {
            "ascent": All(),
            "descent": LossIncrease(gamma),
            "geometry": StochasticWeights(beta, adaptive, eta),
        }
        super().__init__(params, base, rho=rho, **_with_parts(self, options, **parts))


class RandomSubsetSAM(SharpnessAware):
    """SAM whose ascent sees a random part of the batch (Bahri et al. 2021): a cost of 1 + share.

    Args:
        rho: as in :class:`KSAM`.
        share: size of that part, as ``k`` in :class:`KSAM`. The descent is on the whole batch; the
            step reports the losses of this only pass over it, those at the perturbed weights.
    """

    share = _AmountOf("ascent")

    def __init__(
        self,
        params: Params,
        base: Base,
        *,
        rho: Rho = DEFAULT_RHO,
        share: K | Schedule = 0.25,
        **options: Any,
    ) -> None:
        parts = {"ascent": Random(share), "descent": All()}
        super().__init__(params, base, rho=rho, **_with_parts(self, options, **parts))


class OrderedSGD(SharpnessAware):
    """Descent on the mean of the q highest losses, no perturbation (Kawaguchi & Lu 2020).

    A step costs 1: autograd skips no sample.

    Args:
        q: as ``k`` in :class:`KSAM`, or :class:`~ksam.samplers.AccuracySchedule` (the default),
            whose ``accuracy`` the training loop sets once an epoch. With a constant q the loss is
            the average top-k loss of Fan et al. (2017).
    """

    q = _AmountOf("descent")

    def __init__(
        self, params: Params, base: Base, *, q: K | Schedule | None = None, **options: Any
    ) -> None:
        descent = Ordered(AccuracySchedule() if q is None else q)
        parts = {"ascent": None, "descent": descent, "rho": 0.0}
        super().__init__(params, base, **_with_parts(self, options, **parts))


class MSAM(SharpnessAware):
    r"""Momentum-SAM (Becker et al. 2024): :math:`\hat w = w - \rho\, v / \lVert v \rVert_2`.

    v is the base optimizer's momentum before the step, so the descent gradient is the only one: a
    step costs 1. Between steps the weights are the unperturbed ones: evaluate them as they are.

    Args:
        rho: radius, as in :class:`KSAM`. "auto": 0.05 with Adam and its kin (which have betas),
            whose steps are shorter, else 0.3. The authors use 0.3 to 3 with SGD. At a large radius
            :class:`~ksam.radius.ByLearningRate` lost less on CIFAR-10 than a constant one.
        adaptive, eta: as in :class:`KSAM`.
    """

    def __init__(
        self,
        params: Params,
        base: Base,
        *,
        rho: Rho | Literal["auto"] = "auto",
        adaptive: bool = False,
        eta: float = 0.0,
        **options: Any,
    ) -> None:
        parts = {"ascent": Momentum(), "descent": All(), "geometry": Geometry(adaptive, eta)}
        rho = momentum_radius(rho, base)
        super().__init__(params, base, rho=rho, **_with_parts(self, options, **parts))


class StaleKSAM(SharpnessAware):
    """K-SAM that selects by the last known losses: no selection pass in most steps.

    A step costs 2k / M + 1 / (3 refresh). See :class:`~ksam.tables.StaleTopK`.

    Args:
        rho: as in :class:`KSAM`.
        k: as in :class:`KSAM`; M/2 costs what SGD does.
        dataset_size: samples in the data set.
        index: how to get a batch's sample indices in the data set: a key of it, or a function.
        refresh: a selection pass is made every ``refresh`` steps.
    """

    k = _AmountOf("ascent")

    def __init__(
        self,
        params: Params,
        base: Base,
        *,
        dataset_size: int,
        index: Index,
        rho: Rho = DEFAULT_RHO,
        k: K | Schedule = 0.5,
        refresh: int = 10,
        **options: Any,
    ) -> None:
        parts = {"ascent": StaleTopK(k, dataset_size, index, refresh)}
        super().__init__(params, base, rho=rho, **_with_parts(self, options, **parts))


class AUSAM(SharpnessAware):
    r"""SAM on samples drawn by their recorded loss increase (Deng et al. 2025).

    A step costs 2α. See :class:`~ksam.tables.SharpnessSample`. The first epoch is SAM.

    Args:
        rho: as in :class:`KSAM`.
        alpha: how much of the batch is drawn, as ``k`` in :class:`KSAM`; 1/2 costs what SGD does.
        dataset_size, index: as in :class:`StaleKSAM`.
        low, high, ramp: as in :class:`~ksam.tables.SharpnessSample`.
    """

    alpha = _AmountOf("ascent")

    def __init__(
        self,
        params: Params,
        base: Base,
        *,
        dataset_size: int,
        index: Index,
        alpha: K | Schedule = 0.5,
        rho: Rho = 0.1,
        low: float = 0.1,
        high: float = 0.5,
        ramp: int = 30,
        **options: Any,
    ) -> None:
        ascent = SharpnessSample(alpha, dataset_size, index, low=low, high=high, ramp=ramp)
        super().__init__(params, base, rho=rho, **_with_parts(self, options, ascent=ascent))
