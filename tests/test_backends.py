"""Contract of the dispatcher: which backend runs, and who chooses."""

from __future__ import annotations

import sysconfig
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import ksam_kernels
from ksam_kernels import BackendUnavailableError, backends, requested_backend, use_backend
from tests.helpers import OPERATORS, run_python

CPU = torch.device("cpu")


@pytest.fixture
def elsewhere(only_reference: None, monkeypatch: pytest.MonkeyPatch) -> str:
    """A backend that has the operators on lists of tensors, for GPUs only, as Triton does."""
    monkeypatch.setattr(backends, "_kernels", dict(backends._kernels))
    for name in (*backends.OPERATORS["perturb"], "compact"):
        backends.implements("elsewhere", name, devices=("cuda",))(
            backends._kernels["reference"][name]
        )
    return "elsewhere"


#: Takes the path of a library to load in place of the extension.
BROKEN_EXTENSION = """
import importlib.util, sys

class Finder:
    def find_spec(self, name, path, target=None):
        if name == "ksam_kernels._C":
            return importlib.util.spec_from_file_location(name, sys.argv[1])

sys.meta_path.insert(0, Finder())
import ksam_kernels
"""


def topk() -> list[int]:
    # The operator itself: the public function tries the extension's kernel first.
    return torch.ops.ksam.topk_indices(torch.tensor([1.0, 3.0, 2.0]), 2).tolist()


@pytest.mark.usefixtures("only_reference")
def test_use_backend_nests_and_gives_back_what_was_before() -> None:
    with use_backend("reference"):
        assert requested_backend() == "reference"
        with use_backend("native"):
            assert requested_backend() == "native"
            with use_backend("auto"):
                assert requested_backend() == "auto"
            assert requested_backend() == "native"
        assert requested_backend() == "reference"
    assert requested_backend() == "auto"


@pytest.mark.usefixtures("only_reference")
def test_blocks_of_threads_may_overlap() -> None:
    first, second = use_backend("reference"), use_backend("native")
    first.__enter__()
    second.__enter__()  # in another thread, say
    assert requested_backend() == "native"
    first.__exit__(None, None, None)
    assert requested_backend() == "native"
    second.__exit__(None, None, None)
    assert requested_backend() == "auto"


@pytest.mark.usefixtures("only_reference")
@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_use_backend_gives_back_what_was_before_an_exception(error: type[BaseException]) -> None:
    with pytest.raises(error), use_backend("triton"):
        raise error
    assert requested_backend() == "auto"


@pytest.mark.parametrize("name", ["cuda", "", "Native", None])
def test_use_backend_refuses_an_unknown_name(name: Any) -> None:
    before = requested_backend()
    with pytest.raises(ValueError, match=f"name must be one of auto, native.*got {name!r}"):  # noqa: SIM117
        with use_backend(name):
            pass
    assert requested_backend() == before


def test_use_backend_within_a_compiled_function_raises() -> None:
    """The operators of a compiled function choose when they run, after the block."""

    def losses(x: Tensor) -> Tensor:
        with use_backend("reference"):
            return ksam_kernels.cross_entropy(x, torch.zeros(3, dtype=torch.int64))

    with pytest.raises(Exception, match="use_backend"):
        torch.compile(losses, fullgraph=True, backend="aot_eager")(torch.randn(3, 2))


def test_the_choice_holds_in_other_threads() -> None:
    seen = []
    with use_backend("triton"):
        thread = threading.Thread(target=lambda: seen.append(requested_backend()))
        thread.start()
        thread.join()
    assert seen == ["triton"]


def test_auto_takes_the_best_backend_that_has_the_operator(half_native: list[str]) -> None:
    assert topk() == [0, 1]
    assert half_native == ["native"]
    assert backends.resolve("topk_indices", CPU)[0] == "native"
    assert backends.resolve("mse", CPU)[0] == "reference"
    with use_backend("reference"):
        assert topk() == [1, 2]


def test_a_named_backend_is_never_replaced(half_native: list[str]) -> None:
    with use_backend("native"):
        assert topk() == [0, 1]
        with pytest.raises(
            BackendUnavailableError,
            match="'native' was asked for by name but cannot run mse on cpu: it has no mse kernel",
        ):
            torch.ops.ksam.mse(torch.zeros(2), torch.zeros(2))


def test_another_backend_may_be_registered_and_runs_where_it_is_named(extra: str) -> None:
    assert topk() == [1, 2]
    assert backends.resolve("topk_indices", CPU)[0] == "reference"
    with use_backend(extra):
        assert topk() == [0, 1]
        with pytest.raises(BackendUnavailableError, match=r"'another' was asked .*: it has no mse"):
            ksam_kernels.mse(torch.zeros(2), torch.zeros(2))
    with pytest.raises(ValueError, match=r"reference, .*another, got 'cuda'"), use_backend("cuda"):
        pass


def call_on_lists(tensors: list[torch.Tensor], **scalars: torch.Tensor) -> list[torch.Tensor]:
    """Every operation on lists, through its public function; for two of them, the norms."""
    lists = [[t.clone() for t in tensors] for _ in range(5)]
    steps = [torch.zeros(()) for _ in tensors]
    norms = [
        ksam_kernels.grad_norm(tensors),
        ksam_kernels.perturb_(*lists[:3], rho=0.1),
    ]
    ksam_kernels.restore_(*lists[:2])
    ksam_kernels.restore_sgd_(*lists[:4], steps=steps, lr=0.1, momentum=0.9, **scalars)
    ksam_kernels.restore_adam_(*lists, steps, lr=0.1, **scalars)
    return norms


def test_empty_lists_are_on_no_device_and_run_on_any_backend(elsewhere: str) -> None:
    with use_backend(elsewhere):
        for scalars in ({}, {"grad_scale": torch.ones(())}, {"found_inf": torch.zeros(())}):
            for norm in call_on_lists([], **scalars):
                assert (norm.dtype, norm.shape, norm.device) == (torch.float32, (), CPU)
                assert norm == 0
        assert torch.ops.ksam.compact([], torch.tensor([0])) == []
        for call in (
            lambda: ksam_kernels.grad_norm([torch.ones(1)]),
            lambda: ksam_kernels.restore_([torch.ones(0)], [torch.ones(0)]),
            lambda: ksam_kernels.compact_batch([torch.ones(1)], torch.tensor([0])),
        ):
            with pytest.raises(BackendUnavailableError, match=r"has no \w+ kernel for cpu"):
                call()


def test_a_backend_without_the_operator_refuses_empty_lists(extra: str) -> None:
    with (
        use_backend(extra),
        pytest.raises(
            BackendUnavailableError,
            match=r"'another' was .* but cannot run restore_: it has no restore_ kernel$",
        ),
    ):
        ksam_kernels.restore_([], [])


@pytest.mark.usefixtures("only_reference")
@pytest.mark.parametrize("name", ["native", "triton"])
@pytest.mark.parametrize(("room", "operator"), OPERATORS)
def test_a_backend_that_is_not_installed_raises_and_says_why(
    room: str, operator: str, name: str
) -> None:
    with (
        use_backend(name),
        pytest.raises(
            BackendUnavailableError,
            match=f"'{name}' was asked for by name but cannot run {operator} on cpu: "
            "this installation has no",
        ),
    ):
        backends.call(operator, CPU)


@pytest.mark.parametrize(("room", "operator"), OPERATORS)
def test_the_reference_has_every_operator_and_torch_knows_it(room: str, operator: str) -> None:
    assert backends.why_not("reference", operator, CPU) is None
    assert hasattr(torch.ops.ksam, operator)


def test_a_device_that_kernels_cannot_run_on_after_all_takes_the_next_best(
    half_native: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a GPU of an architecture that the extension was not built for."""
    monkeypatch.setattr(backends, "_obstacles", {})
    backends.register_obstacle("native", lambda device: f"it was not built for {device}")
    losses = torch.tensor([1.0, 3.0, 2.0])
    assert backends.call("topk_indices", CPU, losses, 1).tolist() == [1]
    assert half_native == []
    assert backends.why_not("native", "topk_indices", CPU) == "it was not built for cpu"
    assert backends.why_not("native", "topk_indices", None) is None
    with (
        use_backend("native"),
        pytest.raises(
            backends.BackendUnavailableError,
            match="cannot run topk_indices on cpu: it was not built",
        ),
    ):
        backends.call("topk_indices", CPU, losses, 1)


def test_registering_an_operator_that_is_not_listed_raises() -> None:
    with pytest.raises(ValueError, match="operator 'sort' is not listed in OPERATORS"):
        backends.implements("reference", "sort")


def test_a_bad_ksam_backend_fails_on_import_with_the_value() -> None:
    result = run_python("-c", "import ksam_kernels", backend="fastest")
    assert result.returncode != 0
    assert "KSAM_BACKEND must be one of auto, native, triton, reference" in result.stderr
    assert "got 'fastest'" in result.stderr


def test_an_extension_that_cannot_be_loaded_is_no_missing_one(tmp_path: Path) -> None:
    """Built for another machine, say: slow kernels in silence would be worse than an error."""
    library = tmp_path / f"_C{sysconfig.get_config_var('EXT_SUFFIX')}"
    library.touch()
    result = run_python("-c", BROKEN_EXTENSION, str(library))
    assert result.returncode != 0
    *_, message = result.stderr.splitlines()
    assert message.startswith("ImportError: the compiled kernels of ksam do not load: ")
    assert f"{library}: file too short" in message
    assert "Build them again" in message


def test_ksam_backend_chooses_by_name_and_never_falls_back() -> None:
    call = "import torch, ksam_kernels as k; k.topk_indices(torch.zeros(3), 1)"
    result = run_python("-c", call, backend="triton")  # Triton's kernels run on GPUs only
    assert result.returncode != 0
    assert "BackendUnavailableError" in result.stderr
    assert "'triton' was asked for by name but cannot run topk_indices on cpu" in result.stderr
