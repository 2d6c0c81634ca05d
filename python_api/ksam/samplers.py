"""Which samples a gradient is taken on."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import ksam_kernels
from ksam.parts import Part, Sampler, Subset
from ksam.passes import Passes
from ksam.selection import Amount, K, Schedule
from ksam_kernels.checks import check_range


class All(Sampler):
    """Every sample of the batch."""

    def choose(self, passes: Passes) -> Subset:
        return passes.everything()


class _OfAmount(Sampler):
    """Chooses an amount of the batch, whose state, if it has one, is the sampler's."""

    def __init__(self, amount: Amount) -> None:
        self.amount = amount

    def state_dict(self) -> dict[str, Any]:
        return self.amount.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.amount.load_state_dict(state)


class Some(_OfAmount):
    """Chooses an amount of the batch; if that is all of it, takes the batch without choosing."""

    def num_evaluated(self, samples: int, step: int) -> int:
        return self.amount.of(samples, step)

    def choose(self, passes: Passes) -> Subset:
        size = self.num_evaluated(passes.samples, passes.step)
        return passes.everything() if size == passes.samples else self._some(passes, size)

    def _some(self, passes: Passes, size: int) -> Subset:
        raise NotImplementedError


class TopK(Some):
    """The k highest losses of a forward pass over the batch (Ni et al. 2022).

    Args:
        k: fraction of the batch (float), count (int), or a function of the step.
        random: share of the k that is drawn from the rest of the batch at random instead, in
            [0, 1]: 0 is K-SAM, 1 a random subset.
    """

    def __init__(self, k: K | Schedule, random: float = 0.0) -> None:
        super().__init__(Amount(k))
        check_range("random", random, 0.0, 1.0)
        self.random = random

    def _some(self, passes: Passes, size: int) -> Subset:
        if self._drawn(size) == size:
            # No loss decides, but this is the pass that reports losses and updates BatchNorm.
            passes.forward()
        return passes.select(self._indices(passes, size, passes.forward_top))

    def _drawn(self, size: int) -> int:
        return round(self.random * size)

    def _indices(self, passes: Passes, size: int, highest: Callable[[int], Tensor]) -> Tensor:
        """``highest(count)`` finds the samples that are not drawn."""
        drawn = self._drawn(size)
        if drawn == size:
            return passes.draw(size)
        top = highest(size - drawn)
        if drawn == 0:
            return top
        others = ksam_kernels.topk_indices(passes.random().index_fill(0, top, -1.0), drawn)
        return torch.cat([top, others]).sort().values

    def candidates(self, passes: Passes) -> Tensor:
        """The samples that would have been selected."""
        size = self.num_evaluated(passes.samples, passes.step)
        return self._indices(passes, size, passes.highest)


class Random(Some):
    """A random subset, without replacement and without looking at the losses."""

    def __init__(self, share: K | Schedule) -> None:
        super().__init__(Amount(share, "share"))

    def sees_batch(self, step: int) -> bool:
        return False

    def _some(self, passes: Passes, size: int) -> Subset:
        return passes.select(passes.draw(size))


class Importance(Some):
    r"""k samples drawn with replacement, :math:`p_i \propto` gradient bound, weighted by 1 / (M p).

    :math:`\frac{1}{k} \sum_j \frac{1}{M p_{i_j}} \nabla L_{i_j}` is an unbiased estimate of the
    batch's gradient (Katharopoulos & Fleuret 2018), unlike the gradient of the highest losses, and
    so has the same scale. The bound is that of :meth:`ksam.selection.Recording.scores`.

    Args:
        k: as in :class:`TopK`.
        uniform: share of the uniform distribution mixed into p, in [1e-6, 1]: no weight exceeds
            1 / uniform.
    """

    scored = True

    def __init__(self, k: K | Schedule, uniform: float = 0.1) -> None:
        super().__init__(Amount(k))
        check_range("uniform", uniform, 1e-6, 1.0)
        self.uniform = uniform

    def _some(self, passes: Passes, size: int) -> Subset:
        passes.forward()
        scores = passes.scores
        share = scores / scores.sum().clamp_min(torch.finfo(scores.dtype).tiny)
        p = (1 - self.uniform) * share + self.uniform / passes.samples
        p = p / p.sum()
        # Not torch.multinomial, which waits for the device to check its input.
        points = passes.random()[:size]
        indices = torch.searchsorted(p.cumsum(0), points).clamp_max(passes.samples - 1)
        indices = indices.sort().values
        return passes.select(indices, 1 / (passes.samples * p[indices]))


class LossIncrease(Some):
    r"""The samples whose loss the perturbation raised most (ESAM's SDS, Du et al. 2022).

    For the descent only: a forward pass at :math:`\hat w`, without gradients, gives
    :math:`L_i(\hat w) - L_i(w)`; exactly :math:`\gamma M` samples are chosen, and ties go to the
    lowest index. (The authors' code keeps those *above* the last of these differences: one sample
    fewer, and none where all are equal.) The ascent must evaluate the whole batch in every step.
    """

    def __init__(self, gamma: K | Schedule) -> None:
        super().__init__(Amount(gamma, "gamma"))

    def _some(self, passes: Passes, size: int) -> Subset:
        before = passes.losses
        increase = passes.forward() - before
        return passes.select(ksam_kernels.topk_indices(increase, size))


class Ordered(_OfAmount):
    """The q highest losses of the descent's own forward pass over the batch.

    The mean of the q largest losses is differentiated (average top-k: Fan et al. 2017; Ordered SGD:
    Kawaguchi & Lu 2020): one forward, no selection pass, and a backward pass through the whole
    batch, since autograd skips no sample. It costs what SGD does.
    """

    def __init__(self, q: K | Schedule) -> None:
        super().__init__(Amount(q, "q"))

    def num_selected(self, samples: int, step: int) -> int:
        return self.amount.of(samples, step)

    def choose(self, passes: Passes) -> Subset:
        return passes.everything(keep=self.num_selected(passes.samples, passes.step))


class AccuracySchedule(Part):
    """Ordered SGD's fraction q by training accuracy: 1, then 1/2, 1/4, 1/8, 1/16.

    The last four apply from 80, 90, 95 and 99.5 % on: the rule of the authors' repository. Set
    :attr:`accuracy` once an epoch.
    """

    LEVELS = ((0.995, 1 / 16), (0.95, 1 / 8), (0.9, 1 / 4), (0.8, 1 / 2))

    def __init__(self) -> None:
        self._accuracy = 0.0

    @property
    def accuracy(self) -> float:
        """Training accuracy, a share in [0, 1]."""
        return self._accuracy

    @accuracy.setter
    def accuracy(self, value: float) -> None:
        check_range("accuracy", value, 0.0, 1.0)
        self._accuracy = float(value)

    def __call__(self, step: int) -> float:
        return next((q for level, q in self.LEVELS if self._accuracy >= level), 1.0)

    def state_dict(self) -> dict[str, Any]:
        return {"accuracy": self._accuracy}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.accuracy = state["accuracy"]
