"""Float64 oracles of the losses' tests, and how far float32 arithmetic may be from them."""

from __future__ import annotations

import math
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from ksam_kernels import cross_entropy
from tests.helpers import arithmetic_unit, assert_within, smallest, unit
from tests.simt import backend as simt
from tests.triton import interpreter as triton


def mean_per_sample(elements: Tensor) -> Tensor:
    """The mean, sample by sample, of losses by element, ``[B, ...]``."""
    return elements.reshape(len(elements), math.prod(elements.shape[1:])).mean(1)


@dataclass
class Case:
    """Arguments of one call of ``cross_entropy``."""

    logits: Tensor
    target: Tensor
    weight: Tensor | None = None
    ignore_index: int = -100
    label_smoothing: float = 0.0

    @property
    def options(self) -> dict[str, object]:
        return {
            "weight": self.weight,
            "ignore_index": self.ignore_index,
            "label_smoothing": self.label_smoothing,
        }

    @property
    def classes(self) -> int:
        return self.logits.shape[-1]


KINDS = ("hard", "smoothed", "weighted", "weighted smoothed", "soft", "soft weighted smoothed")


def make_case(kind: str, logits: Tensor, index: torch.dtype = torch.int64) -> Case:
    rows, classes = logits.shape[:-1], logits.shape[-1]
    if "soft" in kind:
        target = torch.rand((*rows, classes)).softmax(-1)
    else:
        target = torch.randint(0, classes, rows).to(index)
    weight = torch.rand(classes) + 0.25 if "weighted" in kind else None
    return Case(logits, target, weight, label_smoothing=0.1 if "smoothed" in kind else 0.0)


def raises_bad_class(backend: str, message: str) -> pytest.RaisesExc[Exception]:
    """A class out of range: an IndexError with a message, or on a device, which nothing may wait
    for, an assertion that fails there."""
    if simt.extension is not None and backend == simt.NAME:
        asserted = "device-side assert.*target holds a class that is out of range"
        return pytest.raises(simt.extension.Fault, match=asserted)
    if backend == triton.NAME:
        asserted = "AssertionError.*target holds a class that is out of range"
        return pytest.raises(Exception, match=asserted)
    return pytest.raises(IndexError, match=message)


def expected_losses(case: Case, logits: Tensor | None = None) -> Tensor:
    """``F.cross_entropy`` in float64, per sample."""
    x = case.logits.detach().double() if logits is None else logits
    rows, classes = x.shape[:-1], case.classes
    target = case.target
    if target.is_floating_point():
        target = target.double().reshape(-1, classes)
    else:
        target = target.long().reshape(-1)
    return F.cross_entropy(
        x.reshape(-1, classes),
        target,
        weight=None if case.weight is None else case.weight.double(),
        ignore_index=case.ignore_index,
        label_smoothing=case.label_smoothing,
        reduction="none",
    ).reshape(rows)


def target_distribution(case: Case) -> Tensor:
    """q [..., C] in float64: the target's weight on every class; 0 in ignored rows."""
    classes, e = case.classes, case.label_smoothing
    if case.target.is_floating_point():
        hot, kept = case.target.double(), torch.ones(())
    else:
        kept = (case.target != case.ignore_index).double().unsqueeze(-1)
        safe = case.target.long().masked_fill(case.target == case.ignore_index, 0)
        hot = F.one_hot(safe, classes).double()
    w = 1.0 if case.weight is None else case.weight.double()
    return w * ((1 - e) * hot + e / classes) * kept


def loss_tolerance(case: Case, losses: Tensor) -> Tensor:
    """A bound for float32 arithmetic (float64 for float64 logits) and the float32 result.

    z = x - m is off by u |z|, exp(z) by u |z| exp(z) <= u / e and a few roundings, their sum by
    those plus the error of adding C positive terms, which grows like sqrt(C) in any order of the
    sum; so log s is off by (8 + sqrt C) u. Each -log p_c = log s - z_c adds 3 u of itself; the sum
    over c of q_c (-log p_c), all terms positive, sqrt(C) u more.
    """
    u, terms = arithmetic_unit(case.logits.dtype), math.sqrt(case.classes)
    mass = target_distribution(case).sum(-1)
    arithmetic = u * ((6 + terms) * losses.detach().abs() + (8 + terms) * mass)
    return arithmetic + unit(torch.float32) * losses.detach().abs() + smallest(torch.float32)


def expected_gradient(case: Case, upstream: Tensor) -> Tensor:
    """float64 autograd through ``F.cross_entropy``."""
    x = case.logits.detach().double().requires_grad_()
    losses = expected_losses(case, x)
    (gradient,) = torch.autograd.grad(losses, x, upstream.double())
    return gradient


def gradient_tolerance(case: Case, upstream: Tensor, gradient: Tensor) -> Tensor:
    """A bound for g (mass p_c - q_c), rounded to the logits' dtype.

    log p_c is off by (8 + sqrt C + 3 |log p_c|) u as above, which is p_c's relative error; mass and
    q have 4 roundings each, the mass sqrt(C) more from its sum. For float64 logits the oracle is no
    more exact than what it judges: autograd adds a row's C gradients one after the other. Where p_c
    is denormal its rounding is absolute, and multiplied by g and the mass.
    """
    u, terms = arithmetic_unit(case.logits.dtype), math.sqrt(case.classes)
    q = target_distribution(case)
    mass = q.sum(-1, keepdim=True)
    log_p = case.logits.detach().double().log_softmax(-1)
    p = log_p.exp()
    relative = 14 + 2 * terms + 3 * log_p.abs()
    if case.logits.dtype == torch.float64:
        relative = relative + case.classes
    g = upstream.detach().double().abs().unsqueeze(-1)
    arithmetic = u * g * (mass * (p * relative).nan_to_num(0) + 6 * q)
    dtype = case.logits.dtype
    return arithmetic + unit(dtype) * gradient.abs() + (1 + g * (1 + mass)) * smallest(dtype)


def check_losses_and_gradient(case: Case) -> tuple[Tensor, Tensor]:
    """Those of ``cross_entropy`` against their oracles, for a random upstream gradient."""
    x = case.logits.detach().requires_grad_()
    losses = cross_entropy(x, case.target, **case.options)
    expected = expected_losses(case)
    assert_within(losses, expected, loss_tolerance(case, expected))
    upstream = torch.randn(losses.shape)
    (gradient,) = torch.autograd.grad(losses, x, upstream)
    truth = expected_gradient(case, upstream)
    assert_within(gradient, truth, gradient_tolerance(case, upstream, truth))
    return losses.detach(), gradient
