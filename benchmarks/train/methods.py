"""The compared methods: the base optimizer alone, and the sharpness-aware family over it."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import ksam
from benchmarks.train.config import TrainConfig, format_k
from benchmarks.train.workload import INDEX, LABEL, Batch, Workload
from ksam import KSAM, SharpnessAware, cross_entropy

_ROWS = 100  # of diagnostics in a training
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

    def ksam(self, **arguments: Any) -> SharpnessAware:
        """Build K-SAM with the k of the command line where it gets no other."""
        return self.build(KSAM, **{"k": self.config.k, **arguments})

    def auto(self, momentum_rho: float | None, **arguments: Any) -> SharpnessAware:
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
        return {"size": self.train_size, "index": INDEX}

    @property
    def late(self) -> ksam.From:
        """The last part of the training."""
        return ksam.From(self.steps - round(self.config.late * self.steps))


@dataclass(frozen=True)
class Spec:
    """A method as the command line names it.

    Attributes:
        label: for tables; may hold {k} and {late}.
        build: the optimizer.
        k: what the results say of it; None: "ksam" puts the command line's there.
        rho: the option with its radius; None: it has none.
    """

    label: str
    build: Callable[[Run], SharpnessAware]
    k: str = ""
    rho: str | None = "rho"


_K = "k of the command line"

SPECS: dict[str, Spec] = {
    "sam": Spec("SAM", lambda run: run.ksam(k=1.0), k="1.0"),
    "ksam": Spec("K-SAM, k={k}", lambda run: run.ksam(), k=_K),
    "ksam-auto": Spec("auto K-SAM, k={k}", lambda run: run.auto(run.config.msam_rho), k=_K),
    "ksam-auto-plain": Spec("auto K-SAM, k={k}, else SGD", lambda run: run.auto(None), k=_K),
    # Without what AutoKSAM does for the subset's gradient, and with one of the two.
    "ksam-auto-mean": Spec(
        "auto K-SAM, k={k}, else SGD, mean over k, subset's BN",
        lambda run: run.auto(None, scale="mean", statistics="subset"),
        k=_K,
    ),
    "ksam-auto-matched": Spec(
        "auto K-SAM, k={k}, else SGD, mean over k",
        lambda run: run.auto(None, scale="mean"),
        k=_K,
    ),
    "late-ksam": Spec("K-SAM, k={k}, last {late:.0%}", lambda run: run.ksam(when=run.late), k=_K),
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
        "stale K-SAM, k=1/2", lambda run: run.build(ksam.StaleKSAM, **run.table), k="0.5"
    ),
    "importance-ksam": Spec(
        "importance K-SAM, k={k}",
        lambda run: run.build(ksam.ImportanceKSAM, k=run.config.k),
        k=_K,
    ),
    "random-ksam": Spec("random K-SAM, k={k}", lambda run: run.ksam(random=1.0), k=_K),
    "mixed-ksam": Spec("half-random K-SAM, k={k}", lambda run: run.ksam(random=0.5), k=_K),
    "ksam-batch": Spec("K-SAM, k={k}, sum / M", lambda run: run.ksam(scale="batch"), k=_K),
    "ksam-share": Spec("K-SAM, k={k}, loss by share", lambda run: run.ksam(scale="share"), k=_K),
    "ksam-full": Spec("K-SAM, k={k}, full-batch BN", lambda run: run.ksam(statistics="full"), k=_K),
    "ksam-matched": Spec(
        "K-SAM, k={k}, matched BN", lambda run: run.ksam(statistics="matched"), k=_K
    ),
    "ksam-running": Spec(
        "K-SAM, k={k}, running BN", lambda run: run.ksam(statistics="running"), k=_K
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
        """Of a run; at equal cost as many as cost what the base optimizer's do, rounded."""
        epochs = self.config.epochs
        if self.config.equal_cost:
            # AUSAM's first epoch costs more than the others: how dear a step is depends on them.
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
        """Of the steps of a short training of so many epochs."""
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
        """As it would be with `_STEPS` batches an epoch, over one weight."""
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
    k = config.k if spec.k == _K else float(spec.k) if spec.k else None
    rho = None if spec.rho is None else getattr(config, spec.rho)
    return Method(name, spec.label.format(k=format_k(config.k), late=config.late), k, rho, config)


class Step:
    """Takes one optimization step on a batch; returns the mean loss, a scalar on the device.

    The loss is that over the batch before the step, where the method evaluates it.
    """

    spent = 0.0  # cost of the steps so far, in units of the base optimizer's

    def __call__(self, batch: Batch) -> Tensor:
        raise NotImplementedError

    def end_epoch(self) -> None:
        """Tell the optimizer what it wants to know once an epoch."""

    def watch(self, path: Path, steps: int) -> None:
        """Write diagnostics of a training of `steps` to `path`.csv and .png, if there are any.

        They take two more gradients a hundred times, which counts as training time.
        """


def make_step(
    method: Method, workload: Workload, model: nn.Module, config: TrainConfig, seed: int = 0
) -> tuple[torch.optim.Optimizer, Step]:
    """Return the method's optimizer for `model` and the function that takes a step with it."""
    groups = parameter_groups(model, config.weight_decay)
    base, options = _base_optimizer(config)
    if method.is_base:
        optimizer = base(groups, **options)
        return optimizer, _PlainStep(optimizer, workload, model, config.label_smoothing)
    steps = workload.steps_per_epoch(config.batch_size) * method.epochs
    options |= {"model": model, "seed": seed}
    run = Run(config, groups, base, options, workload.train_size, steps)
    sharp = SPECS[method.name].build(run)
    return sharp, _SharpStep(sharp, workload, model, config.label_smoothing)


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Split the parameters so that biases and normalization scales do not decay."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    return [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]


def _base_optimizer(config: TrainConfig) -> tuple[type[torch.optim.Optimizer], dict[str, Any]]:
    if config.base == "sgd":
        return torch.optim.SGD, {"lr": config.lr, "momentum": 0.9}
    return torch.optim.AdamW, {"lr": config.lr}


class _PlainStep(Step):
    """The loop anyone would write, and none of ksam's code: the yardstick for the others."""

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        workload: Workload,
        model: nn.Module,
        smoothing: float,
    ) -> None:
        self._optimizer, self._workload, self._model = optimizer, workload, model
        self._smoothing = smoothing

    def __call__(self, batch: Batch) -> Tensor:
        self._optimizer.zero_grad()
        logits = self._workload.forward(self._model, batch)
        loss = F.cross_entropy(logits, batch[LABEL], label_smoothing=self._smoothing)
        loss.backward()  # type: ignore[no-untyped-call]
        self._optimizer.step()
        self.spent += 1.0
        return loss.detach()


class _SharpStep(Step):
    def __init__(
        self, optimizer: SharpnessAware, workload: Workload, model: nn.Module, smoothing: float
    ) -> None:
        self._optimizer, self._workload, self._model = optimizer, workload, model
        self._smoothing = smoothing
        self._correct: Tensor | None = None
        self._samples = 0
        q = optimizer.q if isinstance(optimizer, ksam.OrderedSGD) else None
        self._schedule = q if isinstance(q, ksam.AccuracySchedule) else None
        self._diagnostics: ksam.Diagnostics | None = None
        self._page = Path()

    def watch(self, path: Path, steps: int) -> None:
        self._page = path.with_suffix(".png")
        rows = path.with_suffix(".csv")
        rows.unlink(missing_ok=True)
        self._diagnostics = ksam.Diagnostics(
            self._optimizer,
            writers=[ksam.CSVWriter(rows)],
            every=max(1, steps // _ROWS),
            dataset_size=self._workload.train_size,
            index=INDEX,
        )

    def _losses(self, batch: Batch) -> Any:
        logits = self._workload.forward(self._model, batch)
        losses = cross_entropy(logits, batch[LABEL], label_smoothing=self._smoothing)
        if self._schedule is None:
            return losses
        return losses, (logits.detach().argmax(1) == batch[LABEL]).sum()

    def __call__(self, batch: Batch) -> Tensor:
        samples = len(batch[LABEL])
        cost = self._optimizer.cost(samples)
        result = self._optimizer.step(self._losses, batch)
        self.spent += cost if result.sharp else 1.0
        if self._diagnostics is not None:
            self._diagnostics(result, self._losses, batch)
        if self._schedule is not None:
            self._samples += samples
            self._correct = result.aux if self._correct is None else self._correct + result.aux
        return result.loss

    def end_epoch(self) -> None:
        """The page is drawn anew; Ordered SGD's q follows the epoch's training accuracy."""
        if self._diagnostics is not None:
            self._diagnostics.plot(self._page, self._workload.wrong)
        if self._schedule is not None and self._correct is not None:
            self._schedule.accuracy = self._correct.item() / self._samples
            self._correct, self._samples = None, 0
