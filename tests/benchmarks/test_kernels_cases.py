"""Byte floors counted by hand, and the proof that contestants do the same work."""

from __future__ import annotations

import dataclasses
import math
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch

import ksam_kernels as kk
from benchmarks.kernels import compact, loss, perturb, sam, topk
from benchmarks.kernels.case import EXACT, KSAM, Case, DisagreementError, compiled, stateless
from benchmarks.kernels.cross_entropy import CrossEntropy
from benchmarks.kernels.elementwise import Elementwise
from benchmarks.kernels.measure import Row, measure_case
from benchmarks.kernels.parameters import MODELS, count
from benchmarks.kernels.segmentation import Segmentation
from benchmarks.timing import Plan

CPU = torch.device("cpu")
ONE_ROUND = Plan(rounds=1, seconds=0, few_rounds=1, max_seconds=0)
BF16 = torch.bfloat16


def measure(case: Case, *, quick: bool = True) -> list[Row]:
    return measure_case(case, CPU, ONE_ROUND, bandwidth=1e10, quick=quick)


@pytest.mark.parametrize(
    ("loss_case", "floor"),
    [
        # 100 logits of 4 bytes; 10 classes of 8; 10 losses of 4.
        (CrossEntropy(10, 10), 400 + 80 + 40),
        (CrossEntropy(10, 10, BF16), 200 + 80 + 40),
        (CrossEntropy(10, 10, label_smoothing=0.1), 400 + 80 + 40),
        (CrossEntropy(10, 10, weighted=True), 400 + 80 + 40 + 40),
        (CrossEntropy(10, 10, soft=True), 400 + 400 + 40),
        (CrossEntropy(10, 10, k=3), 400 + 80 + 40 + 24),
        # Backward: logits, classes and upstream gradient read, gradient of the logits written.
        (CrossEntropy(10, 10, backward=True), 520 + 400 + 80 + 40 + 400),
        (CrossEntropy(10, 10, BF16, backward=True), 320 + 200 + 80 + 40 + 200),
        (Elementwise("mse", 10, 10), 800 + 40),
        (Elementwise("mse", 10, 10, BF16), 400 + 40),
        (Elementwise("binary_cross_entropy_with_logits", 10, 10, pos_weight=True), 800 + 40 + 40),
        # 36 pixels of 5 logits of 4 bytes; a class of 8 and a loss of 4 of each.
        (Segmentation(1, 5, 6), 720 + 288 + 144),
        (Segmentation(1, 5, 6, backward=True), 1152 + 720 + 288 + 144 + 720),
    ],
)
def test_floor_bytes_of_losses(
    loss_case: CrossEntropy | Elementwise | Segmentation, floor: int
) -> None:
    assert loss_case.floor_bytes == floor
    assert loss_case.case(CPU).floor_bytes == floor


def test_floor_bytes_of_topk_and_compact() -> None:
    assert topk.floor_bytes(100, 33) == 400 + 264
    # Rows of 12 bytes of float32, 8 of int64 and 5 of bool; 2 of 4 rows read and written.
    batch = {
        "image": torch.zeros(4, 3),
        "label": torch.zeros(4, dtype=torch.int64),
        "mask": torch.zeros(4, 5, dtype=torch.bool),
    }
    assert compact.floor_bytes(batch, 2) == 2 * 2 * (12 + 8 + 5) + 16


def test_floor_bytes_of_updates() -> None:
    floors = {
        ("grad_norm", "SGD"): 4,
        ("perturb_", "SGD"): 20,
        ("restore_sgd_", "SGD"): 20,
        ("restore_adam_", "AdamW"): 28,
        ("SAM step", "SGD"): 40,
        ("SAM step", "AdamW"): 48,
    }
    for (operation, base), per_element in floors.items():
        assert perturb.floor_bytes(operation, base, 7) == 7 * per_element
    assert perturb.floor_bytes("SAM step", "SGD", 7, adaptive=True) == 7 * 44


def test_shape_lists_are_those_of_the_models() -> None:
    sizes = {name: (len(shapes()), count(shapes())) for name, shapes in MODELS.items()}
    assert sizes == {
        "ResNet-18": (62, 11_689_512),
        "ResNet-50": (161, 25_557_032),
        "ViT-S/16": (152, 22_050_664),
        "1000 small": (1000, 541_952),
    }


SMALL_CASES = [
    *(case for room in (loss, topk, compact) for case in room.cases(CPU) if case.quick),
    *(case for case in perturb.host_cases(CPU) if case.quick),
    CrossEntropy(8, 10, label_smoothing=0.1, weighted=True).case(CPU),
    CrossEntropy(8, 10, soft=True).case(CPU),
    CrossEntropy(8, 100, BF16, backward=True).case(CPU),
    CrossEntropy(8, 100, BF16, k=3).case(CPU),
    Elementwise("mse", 8, 10, BF16).case(CPU),
]


@pytest.mark.parametrize("case", SMALL_CASES, ids=lambda case: f"{case.label} {case.shape}")
def test_contestants_agree(case: Case) -> None:
    rows = measure(case)
    assert [row.contestant for row in rows] == [c.name for c in case.contestants]
    assert rows[0].contestant == KSAM
    assert rows[0].ratio == 1
    for row in rows:
        assert row.note == "left out by --quick" or (row.microseconds and row.rounds == 1)


def toy_models(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(perturb, "MODELS", {"ResNet-50": lambda: [(3, 4), (5,), (1000,)]})


def test_every_sam_step_agrees(monkeypatch: pytest.MonkeyPatch) -> None:
    toy_models(monkeypatch)
    cases = list(perturb.cases(CPU))
    for case in cases:
        assert not [row.note for row in measure(case) if row.note]
    assert any(case.extra == "SGD, adaptive" for case in cases)


def _wrong(case: Case, function: Callable[..., Any]) -> Case:
    return dataclasses.replace(
        case, contestants=[case.contestants[0], stateless("wrong", function)]
    )


def test_a_wrong_contestant_raises() -> None:
    cross_entropy = CrossEntropy(8, 10, label_smoothing=0.1).case(CPU)
    select = CrossEntropy(8, 10, k=3).case(CPU)
    largest = next(topk.cases(CPU))
    batch = next(compact.cases(CPU))
    wrong = [
        _wrong(cross_entropy, lambda x, y, w: kk.cross_entropy(x, y)),
        _wrong(select, lambda x, y, w: kk.select_cross_entropy(x.flip(0), y.flip(0), 3)),
        _wrong(select, lambda x, y, w: (kk.cross_entropy(x, y), torch.arange(3))),
        _wrong(largest, lambda losses, k: torch.arange(k)),
        _wrong(largest, lambda losses, k: kk.topk_indices(losses, k + 1)),
        _wrong(batch, lambda batch, indices: kk.compact_batch(batch, indices.flip(0))),
    ]
    for case in wrong:
        with pytest.raises(DisagreementError, match=f"{case.operation}.*wrong and ksam disagree"):
            measure(case)


def test_topk_may_break_ties_its_own_way_and_nothing_else() -> None:
    case = next(case for case in topk.cases(CPU) if case.extra == "all equal")
    ksam, contestant, _ = case.contestants
    losses = torch.tensor([1.0, 1.0, 2.0, 1.0])
    expected = kk.topk_indices(losses, 2)
    case.check_agreement(contestant, torch.tensor([3, 2]), expected, (losses, 2))
    for indices in ([2, 2], [0, 1], [2]):
        with pytest.raises(DisagreementError):
            case.check_agreement(contestant, torch.tensor(indices), expected, (losses, 2))
    with pytest.raises(DisagreementError):
        case.check_agreement(ksam, torch.tensor([2, 3]), expected, (losses, 2))


class _NoRestore(sam.Foreach):
    def update(self) -> None:
        self.optimizer.step()


class _OtherRadius(sam.Foreach):
    def perturb(self) -> Any:
        norm = super().perturb()
        torch._foreach_lerp_(self.params, self.kept, 0.2)
        return norm


@pytest.mark.parametrize(
    ("operation", "wrong"), [("SAM step", _NoRestore), ("perturb_", _OtherRadius)]
)
def test_a_wrong_sam_step_raises(
    monkeypatch: pytest.MonkeyPatch, operation: str, wrong: type[sam.SamStep]
) -> None:
    toy_models(monkeypatch)
    monkeypatch.setitem(sam.CONTESTANTS, "foreach", wrong)
    case = next(case for case in perturb.cases(CPU) if case.operation == operation)
    chosen = [c for c in case.contestants if c.name in (KSAM, "foreach")]
    with pytest.raises(DisagreementError, match="foreach and ksam disagree"):
        measure(dataclasses.replace(case, contestants=chosen))


@pytest.mark.parametrize("shapes", MODELS.values(), ids=MODELS)
def test_the_tolerance_sees_the_perturbation_of_one_weight(shapes: Callable[[], Any]) -> None:
    perturbation = sam.RHO / math.sqrt(count(shapes()))
    weight = 2e-2
    assert perturbation > 40 * (perturb._TOLERANCE.rtol * weight + perturb._TOLERANCE.atol)


def test_what_cannot_run_has_a_row_that_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    toy_models(monkeypatch)
    monkeypatch.setitem(sys.modules, "pytorch_optimizer", None)
    step = next(case for case in perturb.cases(CPU) if case.operation == "SAM step")
    *others, missing = measure(step)
    assert "pip install pytorch-optimizer" in missing.note
    assert missing.microseconds is missing.ratio is missing.share_of_copy is None
    assert all(row.ratio for row in others)

    def uncompilable(x: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("no such compiler\nand a long story")

    case = next(case for case in topk.cases(CPU))
    broken = compiled("compile", uncompilable, EXACT)
    row = measure(
        dataclasses.replace(case, contestants=[case.contestants[0], broken]), quick=False
    )[1]
    assert row.note.startswith("torch.compile: ")
    assert row.ratio is None


def test_a_backend_that_cannot_run_leaves_rows_that_say_so() -> None:
    with kk.use_backend("triton"):
        rows = measure(next(topk.cases(CPU)))
    assert [row.contestant for row in rows] == ["ksam", "topk", "sort"]
    assert all("'triton' was asked for by name" in row.note and not row.rounds for row in rows)


def test_a_gradient_of_pixels_may_be_rounded_however_small_it_is() -> None:
    """Of two classes: the likelier one's probability comes ever nearer to 1."""
    high = torch.linspace(0, 16, 10000).view(1, 1, 100, 100)
    logits = torch.cat([high, torch.zeros_like(high)], 1).requires_grad_()
    target = torch.zeros(1, 100, 100, dtype=torch.int64)
    _, eager, *_ = Segmentation(1, 2, 100, backward=True).case(torch.device("cpu")).contestants
    exact = torch.stack([-torch.sigmoid(-high[0].double()), torch.sigmoid(-high[0].double())], 1)
    found = eager.start(None)((logits, target))
    eager.tolerance.assert_close(found.double(), exact)
    with pytest.raises(AssertionError):
        eager.tolerance.assert_close(found.double() + 3e-7, exact)
