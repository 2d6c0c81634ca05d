"""The compared methods: the base optimizer alone, and the sharpness-aware family over it."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import nn

import ksam
from benchmarks.train.config import TrainConfig, format_k
from benchmarks.train.workload import INDEX
from ksam import KSAM, SharpnessAware

_STEPS = 20  # in an epoch, to count costs; StaleKSAM refreshes at every tenth
BASE_LABELS = {"sgd": "SGD", "adamw": "AdamW"}


@dataclass(frozen=True)
class Run:
    """What an optimizer is built from."""

    config: TrainConfig
    parameters: Any
    base: type[torch.optim.Optimizer]
    options: dict[str, Any]  # of the base optimizer, and the model
    train_size: int  # samples in the training set
    steps: int  # of the whole training

    def build(self, method: type[SharpnessAware], **arguments: Any) -> SharpnessAware:
        """Build a method with the radius of the command line where it gets no other."""
        arguments = {"rho": self.config.rho, **arguments, **self.options}
        return method(self.parameters, self.base, **arguments)

    def build_ksam(self, **arguments: Any) -> SharpnessAware:
        """Build K-SAM with the k of the command line where it gets no other."""
        return self.build(KSAM, **{"k": self.config.k, **arguments})

    def build_auto(self, momentum_rho: float | None, **arguments: Any) -> SharpnessAware:
        """Build K-SAM with its automatic policy."""
        return self.build(
            ksam.AutoKSAM,
            k=self.config.k,
            momentum_rho=momentum_rho,
            threshold=self.config.threshold,
            budget=self.config.budget,
            **arguments,
        )

    @property
    def table(self) -> dict[str, Any]:
        """Arguments of the methods that remember figures of every sample."""
        return {"dataset_size": self.train_size, "index": INDEX}

    @property
    def late(self) -> ksam.From:
        """The last part of the training."""
        return ksam.From(self.steps - round(self.config.late * self.steps))


@dataclass(frozen=True)
class Spec:
    """A method as the command line names it.

    Attributes:
        label: for tables; may hold {k}, {late} and {base}.
        build: the optimizer.
        k: the fixed share of the batch that it selects; None: none, or that of the command line.
        takes_k: whether it is that of the command line.
        rho: the option with its radius; None: it has none.
    """

    label: str
    build: Callable[[Run], SharpnessAware]
    k: float | None = None
    takes_k: bool = False
    rho: str | None = "rho"


SPECS: dict[str, Spec] = {
    "sam": Spec("SAM", lambda run: run.build_ksam(k=1.0), k=1.0),
    "ksam": Spec("K-SAM, k={k}", lambda run: run.build_ksam(), takes_k=True),
    "ksam-auto": Spec(
        "auto K-SAM, k={k}", lambda run: run.build_auto(run.config.msam_rho), takes_k=True
    ),
    "ksam-auto-plain": Spec(
        "auto K-SAM, k={k}, else {base}", lambda run: run.build_auto(None), takes_k=True
    ),
    # Without the two things that AutoKSAM does for the subset's gradient, and with one of them.
    "ksam-auto-mean": Spec(
        "auto K-SAM, k={k}, else {base}, mean over k, subset's BN",
        lambda run: run.build_auto(None, scale="mean", statistics="subset"),
        takes_k=True,
    ),
    "ksam-auto-matched": Spec(
        "auto K-SAM, k={k}, else {base}, mean over k",
        lambda run: run.build_auto(None, scale="mean"),
        takes_k=True,
    ),
    "late-ksam": Spec(
        "K-SAM, k={k}, last {late:.0%}", lambda run: run.build_ksam(when=run.late), takes_k=True
    ),
    "late-sam": Spec("SAM, last {late:.0%}", lambda run: run.build(ksam.SAM, when=run.late)),
    "nth-sam": Spec("SAM, every 5th step", lambda run: run.build(ksam.SAM, when=ksam.EveryNth(5))),
    "asam": Spec("ASAM", lambda run: run.build(ksam.ASAM, rho=run.config.asam_rho), rho="asam_rho"),
    "esam": Spec("ESAM", lambda run: run.build(ksam.ESAM)),
    "random-sam": Spec("random-subset SAM", lambda run: run.build(ksam.RandomSubsetSAM)),
    "ordered": Spec("Ordered SGD", lambda run: _ordered(run, None), rho=None),
    "ordered-half": Spec("Ordered SGD, q=1/2", lambda run: _ordered(run, 0.5), rho=None),
    "msam": Spec("MSAM", lambda run: run.build(ksam.MSAM, rho=run.config.msam_rho), rho="msam_rho"),
    "msam-lr": Spec(
        "MSAM, rho by lr",
        lambda run: run.build(ksam.MSAM, rho=ksam.ByLearningRate(run.config.msam_rho)),
        rho="msam_rho",
    ),
    "ausam": Spec("AUSAM", lambda run: run.build(ksam.AUSAM, **run.table)),
    "stale-ksam": Spec(
        "stale K-SAM, k=1/2", lambda run: run.build(ksam.StaleKSAM, **run.table), k=0.5
    ),
    "importance-ksam": Spec(
        "importance K-SAM, k={k}",
        lambda run: run.build(ksam.ImportanceKSAM, k=run.config.k),
        takes_k=True,
    ),
    "random-ksam": Spec(
        "random K-SAM, k={k}", lambda run: run.build_ksam(random=1.0), takes_k=True
    ),
    "mixed-ksam": Spec(
        "half-random K-SAM, k={k}", lambda run: run.build_ksam(random=0.5), takes_k=True
    ),
    "ksam-batch": Spec(
        "K-SAM, k={k}, sum / M", lambda run: run.build_ksam(scale="batch"), takes_k=True
    ),
    "ksam-share": Spec(
        "K-SAM, k={k}, loss by share", lambda run: run.build_ksam(scale="share"), takes_k=True
    ),
    "ksam-full": Spec(
        "K-SAM, k={k}, full-batch BN", lambda run: run.build_ksam(statistics="full"), takes_k=True
    ),
    "ksam-matched": Spec(
        "K-SAM, k={k}, matched BN", lambda run: run.build_ksam(statistics="matched"), takes_k=True
    ),
    "ksam-running": Spec(
        "K-SAM, k={k}, running BN", lambda run: run.build_ksam(statistics="running"), takes_k=True
    ),
}
METHODS = ("sgd", *SPECS)


def _ordered(run: Run, q: float | None) -> SharpnessAware:
    return ksam.OrderedSGD(run.parameters, run.base, q=q, **run.options)


@dataclass(frozen=True)
class Method:
    """A way to train.

    Attributes:
        k: samples K-SAM selects; None for a method that has no k.
        rho: radius of the perturbation; None for a method that has none.
    """

    name: str
    label: str
    k: float | int | None
    rho: float | None
    config: TrainConfig

    @property
    def is_base(self) -> bool:
        """Whether it is the base optimizer alone."""
        return self.name == "sgd"

    @cached_property
    def epochs(self) -> int:
        """Epochs of a run. With --equal-cost, as many as cost what the base optimizer's epochs
        cost, rounded."""
        epochs = self.config.epochs
        if self.config.equal_cost:
            # AUSAM's first epoch costs more than the others: the mean cost depends on their number.
            for _ in range(3):
                cost = statistics.fmean(self._costs(self.config.batch_size, epochs))
                epochs = max(1, round(self.config.epochs / cost))
        return epochs

    def theoretical_cost(self, batch_size: int) -> float:
        """Return the mean cost of a step in units of the base optimizer's, 3M.

        A sample's forward pass costs 1 and its backward pass 2. Both gradients on k of M samples
        cost 6k; choosing them costs a forward pass of all M, which SAM does not need. What a policy
        will do is not known: at most its budget is assumed.
        """
        return statistics.fmean(self._costs(batch_size, self.epochs))

    @property
    def is_uniform(self) -> bool:
        """Whether one step is like another, so that the first few tell what a step costs."""
        if self.is_base:
            return True
        if self._optimizer(self.config.batch_size, self.epochs).when is not None:
            return False
        return len(set(self._costs(self.config.batch_size, self.epochs))) == 1

    def _costs(self, batch_size: int, epochs: int) -> list[float]:
        """Costs of the steps of a short training of so many epochs, in units of the base
        optimizer's."""
        if self.is_base:
            return [1.0]
        optimizer = self._optimizer(batch_size, epochs)
        when = optimizer.when
        if isinstance(when, ksam.Policy):
            cost = optimizer.cost(batch_size)
            return [cost if self.config.budget is None else min(cost, self.config.budget)]
        return [
            1.0 if when is not None and not when(step) else optimizer.cost(batch_size, step)
            for step in range(_STEPS * epochs)
        ]

    def _optimizer(self, batch_size: int, epochs: int) -> SharpnessAware:
        """The optimizer of a training with `_STEPS` batches an epoch, over one weight."""
        parameter = nn.Parameter(torch.zeros(1))
        options = {"lr": 0.0, "momentum": 0.9}
        steps, size = _STEPS * epochs, _STEPS * batch_size
        run = Run(self.config, [("weight", parameter)], torch.optim.SGD, options, size, steps)
        return SPECS[self.name].build(run)


def make_method(name: str, config: TrainConfig) -> Method:
    """Return the method called `name` on the command line."""
    if name == "sgd":
        return Method(name, BASE_LABELS[config.base], None, None, config)
    spec = SPECS[name]
    k = config.k if spec.takes_k else spec.k
    rho = None if spec.rho is None else getattr(config, spec.rho)
    base = BASE_LABELS[config.base]
    label = spec.label.format(k=format_k(config.k), late=config.late, base=base)
    return Method(name, label, k, rho, config)
