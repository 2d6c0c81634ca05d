"""K-SAM, sharpness-aware minimization on the k highest-loss samples, and its family."""

from ksam.diagnostics import Diagnostics
from ksam.measures import Sharpness, alignment, sharpness
from ksam.methods import (
    ASAM,
    AUSAM,
    ESAM,
    KSAM,
    MSAM,
    SAM,
    AutoKSAM,
    ImportanceKSAM,
    OrderedSGD,
    RandomSubsetSAM,
    StaleKSAM,
)
from ksam.momentum import Momentum
from ksam.optimizer import SharpnessAware
from ksam.radius import ByLearningRate
from ksam.result import StepResult
from ksam.samplers import AccuracySchedule
from ksam.selection import cross_entropy
from ksam.when import EveryNth, From, Policy, Representative
from ksam.writers import CSVWriter, TensorBoardWriter
from ksam_kernels import binary_cross_entropy_with_logits, mse

__all__ = [
    "ASAM",
    "AUSAM",
    "ESAM",
    "KSAM",
    "MSAM",
    "SAM",
    "AccuracySchedule",
    "AutoKSAM",
    "ByLearningRate",
    "CSVWriter",
    "Diagnostics",
    "EveryNth",
    "From",
    "ImportanceKSAM",
    "Momentum",
    "OrderedSGD",
    "Policy",
    "RandomSubsetSAM",
    "Representative",
    "Sharpness",
    "SharpnessAware",
    "StaleKSAM",
    "StepResult",
    "TensorBoardWriter",
    "alignment",
    "binary_cross_entropy_with_logits",
    "cross_entropy",
    "mse",
    "sharpness",
]
