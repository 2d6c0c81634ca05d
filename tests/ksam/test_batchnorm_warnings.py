"""BatchNorm that the optimizer does not handle is told of, and only that."""

from __future__ import annotations

import copy
import threading
import warnings

import pytest
import torch
from torch import Tensor, nn

from ksam import KSAM, MSAM, AutoKSAM
from tests.ksam.models import Batch, batch, loss_of, network


def test_batchnorm_without_its_model_is_left_alone_and_told_once(backend: str) -> None:
    model = network(batchnorm=True)
    optimizer = KSAM(model.parameters(), torch.optim.SGD, lr=0.1)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        optimizer.step(loss_of(model), batch())
        optimizer.step(loss_of(model), batch())
    assert ["pass model=" in str(warning.message) for warning in caught] == [True]
    assert caught[0].filename == __file__
    assert int(model[1].num_batches_tracked) == 6


@pytest.mark.parametrize("fullgraph", [False, True])
@pytest.mark.parametrize("training", [True, False])
@torch._dynamo.config.patch(issue_3_13_0_warning=False)  # of that Python, not of ours
def test_a_compiled_model_that_is_given_is_not_watched(training: bool, fullgraph: bool) -> None:
    """torch.compile would warn of the hook, and compile the model once more for it."""
    model = network(batchnorm=not training).train(training)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()  # which a reset leaves
    compiled = torch.compile(model, backend="eager", fullgraph=fullgraph)
    optimizer = KSAM(model.parameters(), torch.optim.SGD, lr=0.1, model=model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for step in range(3):
            optimizer.step(loss_of(compiled), batch(step))


def test_batchnorm_of_another_thread_is_no_reason_to_warn() -> None:
    model, other = network(), network(batchnorm=True)

    def function(b: Batch) -> Tensor:
        thread = threading.Thread(target=lambda: other(b["x"]))
        thread.start()
        thread.join()
        return loss_of(model)(b)

    optimizer = KSAM(model.parameters(), torch.optim.SGD, lr=0.1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer.step(function, batch())


def test_one_pass_a_step_is_no_reason_to_warn(backend: str) -> None:
    """MSAM's steps have one; AutoKSAM warns with its first step of K-SAM, wherever that is."""
    model = network(batchnorm=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        msam = MSAM(model.parameters(), torch.optim.SGD, lr=0.1, momentum=0.9)
        for _ in range(2):
            msam.step(loss_of(model), batch())
    assert int(model[1].num_batches_tracked) == 2
    auto = AutoKSAM(model.parameters(), torch.optim.SGD, lr=0.1, momentum=0.9, threshold=0, every=1)
    assert not auto.step(loss_of(model), batch()).sharp
    with pytest.warns(UserWarning, match="pass model="):
        assert auto.step(loss_of(model), batch()).sharp


def told_by(optimizer: KSAM, model: nn.Module, monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Which warnings of two steps ask for the model, where nothing has been compiled."""
    monkeypatch.setattr(
        torch._dynamo.utils, "counters", {"frames": {"total": 0}, "stats": {"unique_graphs": 0}}
    )
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for seed in range(2):
            optimizer.step(loss_of(model), batch(seed))
    return ["pass model=" in str(warning.message) for warning in caught]


@pytest.mark.parametrize("statistics", ["subset", "matched", "full", "running"])
@pytest.mark.parametrize("k", [8, 1.0])
def test_a_model_that_is_given_whole_is_no_reason_to_warn(
    backend: str, k: float, statistics: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = network(batchnorm=True)
    optimizer = KSAM(
        model.parameters(), torch.optim.SGD, lr=0.1, k=k, model=model, statistics=statistics
    )
    assert told_by(optimizer, model, monkeypatch) == []


def test_batchnorm_outside_of_the_model_that_is_given_is_told_once(
    backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = network(batchnorm=True)
    for given in (copy.deepcopy(model), model[0]):
        optimizer = KSAM(model.parameters(), torch.optim.SGD, lr=0.1, model=given)
        assert told_by(optimizer, model, monkeypatch) == [True]
