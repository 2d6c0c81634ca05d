"""Contract of the dispatcher: which backend runs, who chooses, and what the report says."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

import ksam_kernels
from ksam_kernels import BackendUnavailableError, backends, requested_backend, use_backend
from ksam_kernels.__main__ import main

CPU = torch.device("cpu")
LISTED = [(room, name) for room, names in backends.OPERATORS.items() for name in names]


@pytest.fixture
def only_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    """As an installation without compiled extension and Triton, with nothing asked for."""
    monkeypatch.setattr(backends, "_choices", [["auto"]])
    for name in ("native", "triton"):
        monkeypatch.setitem(backends._kernels, name, {})


@pytest.fixture
def half_native(only_reference: None, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A native backend of one operator, which notes its calls."""
    calls = []

    def topk_indices(losses: torch.Tensor, k: int) -> torch.Tensor:
        calls.append("native")
        return torch.arange(k)

    monkeypatch.setitem(backends._kernels, "native", {"topk_indices": topk_indices})
    return calls


@pytest.fixture
def extra(only_reference: None, monkeypatch: pytest.MonkeyPatch) -> str:
    """A backend that is none of BACKENDS, of one operator."""
    monkeypatch.setattr(backends, "_kernels", dict(backends._kernels))

    @backends.implements("another", "topk_indices")
    def topk_indices(losses: torch.Tensor, k: int) -> torch.Tensor:
        return torch.arange(k)

    return "another"


@pytest.fixture
def elsewhere(only_reference: None, monkeypatch: pytest.MonkeyPatch) -> str:
    """A backend that has the operators on lists of tensors, for GPUs only, as Triton does."""
    monkeypatch.setattr(backends, "_kernels", dict(backends._kernels))
    for name in (*backends.OPERATORS["perturb"], "compact"):
        backends.implements("elsewhere", name, devices=("cuda",))(
            backends._kernels["reference"][name]
        )
    return "elsewhere"


BROKEN_EXTENSION = """
import sys

class Finder:
    def find_spec(self, name, path, target=None):
        if name == "ksam_kernels._C":
            raise ImportError("undefined symbol")

sys.meta_path.insert(0, Finder())
import ksam_kernels
"""


def topk() -> list[int]:
    # The operator itself: the public function tries the extension's kernel first.
    return torch.ops.ksam.topk_indices(torch.tensor([1.0, 3.0, 2.0]), 2).tolist()


def python(*args: str, backend: str | None = None) -> subprocess.CompletedProcess[str]:
    environment = {key: value for key, value in os.environ.items() if key != "KSAM_BACKEND"}
    if backend is not None:
        environment["KSAM_BACKEND"] = backend
    return subprocess.run(
        [sys.executable, *args], env=environment, capture_output=True, text=True, check=False
    )


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
    """Every operation on lists, through its public function; the norms of two."""
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


def test_the_report_knows_another_backend_that_was_named(
    extra: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with use_backend(extra):
        code, facts = report(capsys)
    assert code == 1
    entries = {entry["operator"]: entry for entry in facts["operators"] if entry["device"] == "cpu"}
    assert entries["topk_indices"]["runs"] == "another"
    assert entries["topk_indices"]["passed_over"]["reference"] == "another was asked for by name"
    assert entries["mse"]["passed_over"]["another"] == "it has no mse kernel for cpu"


@pytest.mark.usefixtures("only_reference")
@pytest.mark.parametrize("name", ["native", "triton"])
@pytest.mark.parametrize(("room", "operator"), LISTED)
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


@pytest.mark.parametrize(("room", "operator"), LISTED)
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
    result = python("-c", "import ksam_kernels", backend="fastest")
    assert result.returncode != 0
    assert "KSAM_BACKEND must be one of auto, native, triton, reference" in result.stderr
    assert "got 'fastest'" in result.stderr


def test_an_extension_that_cannot_be_loaded_is_no_missing_one() -> None:
    """Built for another PyTorch, say: slow kernels in silence would be worse than an error."""
    result = python("-c", BROKEN_EXTENSION)
    assert result.returncode != 0
    assert "ImportError: undefined symbol" in result.stderr


def test_ksam_backend_chooses_by_name_and_never_falls_back() -> None:
    call = "import torch, ksam_kernels as k; k.topk_indices(torch.zeros(3), 1)"
    result = python("-c", call, backend="triton")  # Triton's kernels run on GPUs only
    assert result.returncode != 0
    assert "BackendUnavailableError" in result.stderr
    assert "'triton' was asked for by name but cannot run topk_indices on cpu" in result.stderr


def test_python_m_ksam_kernels_prints_a_row_per_operator() -> None:
    result = python("-m", "ksam_kernels", backend="reference")
    assert result.returncode == 0, result.stderr
    assert "backend asked for: reference" in result.stdout
    rows = [line.split() for line in result.stdout.splitlines()]
    for room, operator in LISTED:
        assert ["cpu", room, operator, "reference"] in [row[:4] for row in rows]


def report(capsys: pytest.CaptureFixture[str]) -> tuple[int, dict[str, Any]]:
    code = main(["--json"])
    return code, json.loads(capsys.readouterr().out)


@pytest.mark.usefixtures("only_reference")
def test_the_report_names_every_operator_and_why_better_backends_do_not_run(
    capsys: pytest.CaptureFixture[str],
) -> None:
    code, facts = report(capsys)
    assert code == 0
    assert facts["requested"] == "auto"
    assert facts["torch"] == torch.__version__
    on_cpu = [entry for entry in facts["operators"] if entry["device"] == "cpu"]
    assert [(entry["room"], entry["operator"]) for entry in on_cpu] == LISTED
    for entry in on_cpu:
        assert entry["runs"] == "reference"
        assert list(entry["passed_over"]) == ["native", "triton"]
        assert all("this installation has no" in why for why in entry["passed_over"].values())


def test_the_report_tells_a_missing_kernel_from_a_missing_backend(
    half_native: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    code, facts = report(capsys)
    assert code == 0
    entries = {entry["operator"]: entry for entry in facts["operators"] if entry["device"] == "cpu"}
    assert entries["topk_indices"]["runs"] == "native"
    assert entries["topk_indices"]["passed_over"] == {}
    assert entries["mse"]["runs"] == "reference"
    assert entries["mse"]["passed_over"]["native"] == "it has no mse kernel for cpu"


@pytest.mark.parametrize(
    ("built", "line"),
    [
        ("", "compiled extension: CPU (avx2), no CUDA kernels"),
        ("80 90+PTX", "compiled extension: CPU (avx2), CUDA (sm_80, sm_90+PTX)"),
        (None, "no compiled extension"),
    ],
    ids=["CPU", "CUDA", "none"],
)
def test_the_report_says_what_was_built(
    built: str | None,
    line: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    extension = SimpleNamespace(cpu_isa="avx2", cuda_architectures=built, compiler="13")
    monkeypatch.setattr("ksam_kernels.__main__.extension", None if built is None else extension)
    main([])
    assert capsys.readouterr().out.splitlines()[1] == line
    _, facts = report(capsys)
    if built is None:
        assert facts["extension"] is None
    else:
        assert facts["extension"]["cuda_architectures"] == built.split()


def test_the_report_says_that_the_reference_was_asked_for(
    half_native: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with use_backend("reference"):
        code, facts = report(capsys)
    assert code == 0
    entry = next(e for e in facts["operators"] if e["operator"] == "topk_indices")
    assert entry["passed_over"]["native"] == "reference was asked for by name"


def test_the_exit_code_is_1_when_the_named_backend_cannot_run_something(
    half_native: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with use_backend("native"):
        code, facts = report(capsys)
        assert code == 1
        assert facts["requested"] == "native"
        runs = {entry["operator"]: entry["runs"] for entry in facts["operators"]}
        assert runs["topk_indices"] == "native"
        assert runs["mse"] is None
        assert main([]) == 1
    text = capsys.readouterr().out
    assert "raises" in text
    assert "not native: it has no mse kernel for cpu" in text


def test_python_m_ksam_kernels_exits_with_1_for_a_backend_that_cannot_run() -> None:
    result = python("-m", "ksam_kernels", "--json", backend="triton")
    assert result.returncode == 1, result.stderr
    assert all(e["runs"] is None for e in json.loads(result.stdout)["operators"]
               if e["device"] == "cpu")  # fmt: skip
