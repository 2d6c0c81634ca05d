"""Settings of one training benchmark, with defaults that depend on the data set."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import torch

from benchmarks.errors import UsageError
from ksam.momentum import momentum_radius
from ksam.selection import check_k

DEFAULT_METHODS = ("sgd", "sam", "ksam")
BASES: dict[str, type[torch.optim.Optimizer]] = {
    "sgd": torch.optim.SGD,
    "adamw": torch.optim.AdamW,
}
IMAGE_MODELS = ("cnn", "resnet8", "resnet20", "resnet18", "vit")


@dataclass(frozen=True)
class DataDefaults:
    """What a data set is trained with where the command line does not say."""

    kind: str  # "image" or "text"
    epochs: int
    batch_size: int
    model: str | None  # None: the user names the folder of a pretrained model
    needs_root: bool = True


DATA = {
    "digits": DataDefaults("image", epochs=20, batch_size=128, model="cnn", needs_root=False),
    "cifar10": DataDefaults("image", epochs=30, batch_size=128, model="resnet8"),
    "sst2": DataDefaults("text", epochs=3, batch_size=32, model=None),
    "rte": DataDefaults("text", epochs=10, batch_size=16, model=None),
    "mrpc": DataDefaults("text", epochs=5, batch_size=16, model=None),
}

DEFAULT_BASE = {"image": "sgd", "text": "adamw"}

# (kind, base): (learning rate, weight decay)
DEFAULT_RATES = {
    ("image", "sgd"): (0.1, 5e-4),
    ("image", "adamw"): (2e-3, 5e-2),
    ("text", "sgd"): (1e-2, 1e-4),
    ("text", "adamw"): (5e-5, 1e-2),
}


@dataclass(frozen=True)
class TrainConfig:
    """Every setting of a benchmark, resolved: nothing is left to a default."""

    data: str
    data_root: Path | None
    methods: tuple[str, ...]
    seeds: int  # the runs use seeds 0 .. seeds - 1
    epochs: int
    equal_cost: bool  # methods dearer than the base train for fewer epochs
    batch_size: int  # at most train_samples
    lr: float  # peak of the schedule
    weight_decay: float
    k: float | int  # float: fraction of the batch; int: count
    rho: float
    asam_rho: float
    msam_rho: float
    late: float  # share of the training, at its end, in which late-sam and late-ksam are sharp
    threshold: float  # of K-SAM's policy
    budget: float | None  # of K-SAM's policy; None: no limit
    base: str
    model: str
    train_samples: int | None  # None: all of them
    label_smoothing: float
    label_noise: float  # share of the training labels that are wrong
    timing_rounds: int | None  # None: as many as fit in the time box
    diagnostics: bool  # of the runs with seed 0
    out: Path

    @property
    def kind(self) -> str:
        """What the data is: image or text."""
        return DATA[self.data].kind

    @property
    def model_label(self) -> str:
        """The model's name as tables show it: the end of the path where it is one."""
        if self.kind == "image":
            return self.model
        # Two parts: many a folder is called just "model".
        return "/".join(Path(self.model).resolve().parts[-2:])


def default_msam_rho(base: str) -> float:
    """The radius of MSAM over a base optimizer: that of ``MSAM(rho="auto")``."""
    rho = momentum_radius("auto", BASES[base])
    assert isinstance(rho, float)
    return rho


def resolve(args: argparse.Namespace) -> TrainConfig:
    """Fill in the defaults of the data set and check what can be checked without reading it."""
    defaults = DATA[args.data]
    base = args.base or DEFAULT_BASE[defaults.kind]
    lr, weight_decay = DEFAULT_RATES[defaults.kind, base]
    batch_size = args.batch_size or defaults.batch_size
    _check_root(args, defaults)
    return TrainConfig(
        data=args.data,
        data_root=args.data_root,
        methods=args.methods,
        seeds=args.seeds,
        epochs=args.epochs or defaults.epochs,
        equal_cost=args.equal_cost,
        batch_size=min(batch_size, args.train_samples or batch_size),
        lr=lr if args.lr is None else args.lr,
        weight_decay=weight_decay if args.weight_decay is None else args.weight_decay,
        k=args.k,
        rho=args.rho,
        asam_rho=args.asam_rho,
        msam_rho=default_msam_rho(base) if args.msam_rho is None else args.msam_rho,
        late=args.late,
        threshold=args.threshold,
        budget=args.budget or None,
        base=base,
        model=_resolve_model(args, defaults),
        train_samples=args.train_samples,
        label_smoothing=args.label_smoothing,
        label_noise=args.label_noise,
        timing_rounds=args.timing_rounds,
        diagnostics=args.diagnostics,
        out=args.out or Path("runs") / f"{args.command}-{args.data}",
    )


def _check_root(args: argparse.Namespace, defaults: DataDefaults) -> None:
    if not defaults.needs_root:
        if args.data_root is not None:
            raise UsageError(f"--data-root {args.data_root}: --data {args.data} needs no folder")
        return
    if args.data_root is None:
        raise UsageError(f"--data {args.data} needs --data-root, the path of the data set")
    if not args.data_root.exists():
        raise UsageError(f"--data-root {args.data_root}: no such file or folder")


def _resolve_model(args: argparse.Namespace, defaults: DataDefaults) -> str:
    model: str | None = args.model or defaults.model
    if defaults.kind == "image" and model not in IMAGE_MODELS:
        raise UsageError(
            f"--model {model}: must be one of {', '.join(IMAGE_MODELS)} with --data {args.data}"
        )
    if model is None:
        raise UsageError(f"--data {args.data} needs --model, a folder with a transformers model")
    return model


def parse_k(text: str) -> float | int:
    """Parse `--k`: "1/3" or "0.33" is a fraction of the batch, "43" a count of samples.

    "1" is a count of one sample; all of the batch is "1.0".
    """
    try:
        return check_k(int(text) if text.strip().isdecimal() else float(Fraction(text)))
    except (ValueError, ZeroDivisionError):
        raise argparse.ArgumentTypeError(
            f"{text!r} is neither a fraction in (0, 1] nor a count >= 1"
        ) from None


def format_k(k: float | int) -> str:
    """Format k for people: 1/3 rather than 0.3333333333333333."""
    if isinstance(k, int):
        return str(k)
    fraction = Fraction(k).limit_denominator(16)
    if fraction.denominator > 1 and float(fraction) == k:
        return str(fraction)
    return f"{k:.6g}" if k != 1 else "1.0"
