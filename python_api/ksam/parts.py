"""What the parts of a method share: state for checkpoints, and what a part may see of a step."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor

if TYPE_CHECKING:
    from ksam.passes import Passes


class Part:
    """A piece of a method. Most have no state; those that do override both methods.

    Samplers and policies learn from a step in ``observe``, which the engine calls once the weights
    are updated: a step that fails leaves no trace in them. Other parts are not told of completed
    steps.
    """

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs: tensors, numbers and strings."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take what :meth:`state_dict` gave."""


@dataclass
class Subset:
    """Samples to take a gradient on.

    Attributes:
        batch: their rows of every tensor of the batch.
        samples: how many they are, n.
        indices: where they stand in the whole batch, int64 ``[n]``; None: it is the whole batch.
        weights: factors of their losses before the mean, ``[n]``; None: 1.
        keep: the gradient is that of the ``keep`` highest losses among them; None: of all.
        top: where these ``keep`` stand among them; known from the first pass over them on.
    """

    batch: Any
    samples: int
    indices: Tensor | None = None
    weights: Tensor | None = None
    keep: int | None = None
    top: Tensor | None = None

    @property
    def is_selection(self) -> bool:
        """Whether the gradient is that of some samples, and not of the whole batch."""
        return self.indices is not None or self.keep not in (None, self.samples)


class Sampler(Part):
    """Which samples a gradient is taken on.

    Attributes:
        scored: whether it reads ``passes.scores``, which take another pass over the logits.
    """

    scored = False

    def sees_batch(self, step: int) -> bool:
        """Whether choosing the samples, or taking their gradient, evaluates the whole batch."""
        return True

    def num_evaluated(self, samples: int, step: int) -> int:
        """Of a batch of ``samples``, how many the gradient pass evaluates."""
        return samples

    def num_selected(self, samples: int, step: int) -> int:
        """Of a batch of ``samples``, how many are in the mean loss whose gradient is taken."""
        return self.num_evaluated(samples, step)

    def check(self, batch: Any, samples: int) -> None:
        """Raise if the batch lacks what the step needs; called before its first pass."""

    def choose(self, passes: Passes) -> Subset:
        """The samples of this step."""
        raise NotImplementedError

    def representatives(self, passes: Passes) -> Tensor:
        """Samples whose share of the batch's gradient bounds is reported.

        The selected samples; :meth:`candidates` if there are none, or if they carry weights,
        without which they do not represent the batch.
        """
        subset = passes.subset
        if subset.indices is not None and subset.weights is None:
            return subset.indices
        return self.candidates(passes)

    def candidates(self, passes: Passes) -> Tensor:
        """Stand-ins in a step that selects none: the highest losses, as many as a selecting step
        takes."""
        return passes.highest(self.num_selected(passes.samples, passes.step))

    def cost(self, samples: int, step: int) -> int:
        """Cost of choosing and of the gradient; a sample's forward pass is 1, its backward 2."""
        size = self.num_evaluated(samples, step)
        return 3 * size + (samples if size < samples and self.sees_batch(step) else 0)

    def observe(self, passes: Passes) -> None:
        """Remember what a completed step found out."""
