"""What is measured: a case, its contestants, and the proof that they compute the same thing."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch._inductor import config as inductor_config
from torch.utils import _pytree as pytree

KSAM = "ksam"

# Takes one input of the pool; returns its results, any tree of tensors.
Run = Callable[[Any], Any]


class UnavailableError(Exception):
    """A contestant cannot run here; the message is the reason that its row of the report shows."""


class DisagreementError(Exception):
    """A contestant computes something else than ksam: its time would mean nothing."""


@dataclass(frozen=True)
class Tolerance:
    """How far a result may be from ksam's, as in `torch.testing.assert_close`."""

    rtol: float
    atol: float

    def assert_close(self, result: Any, expected: Any) -> None:
        """Compare two trees of tensors; their dtypes may differ."""
        leaves = pytree.tree_leaves(result), pytree.tree_leaves(expected)
        torch.testing.assert_close(*leaves, rtol=self.rtol, atol=self.atol, check_dtype=False)


EXACT = Tolerance(rtol=0.0, atol=0.0)
# Sums in another order; losses are up to some 15.
FLOAT32 = Tolerance(rtol=1e-5, atol=1e-5)
# Eager keeps bfloat16 from end to end: eight bits, 0.4 % of a loss.
BFLOAT16 = Tolerance(rtol=1e-2, atol=1e-2)


@dataclass(frozen=True)
class Contestant:
    """One way to do a case's work.

    `start` is not timed: it gets the first input of the pool and returns the function to time, with
    whatever that function keeps between calls. Contestants that write must write copies.
    """

    name: str
    start: Callable[[Any], Run]
    tolerance: Tolerance = EXACT
    starts_slowly: bool = False  # --quick leaves it out


def label_of(operation: str, extra: str) -> str:
    """Operation with what is special about a case."""
    return f"{operation}, {extra}" if extra else operation


def _assert_close(result: Any, expected: Any, contestant: Contestant, _: Any) -> None:
    contestant.tolerance.assert_close(result, expected)


@dataclass(frozen=True)
class Case:
    """One line of the report: an operation on one shape and dtype.

    `floor_bytes` are those that any implementation must move: every input read and every output
    written once (the docstrings of ksam_kernels state the formulas).
    """

    room: str
    operation: str
    shape: str
    dtype: str
    floor_bytes: int
    operators: tuple[str, ...]  # of torch.ops.ksam, behind what ksam's contestant calls
    make_input: Callable[[], Any]
    contestants: Sequence[Contestant]  # ksam's first
    extra: str = ""
    needs_grad: bool = False
    # The contestants keep their state from call to call, and one input serves all of the calls.
    stateful: bool = False
    quick: bool = False  # part of --quick
    assert_same: Callable[[Any, Any, Contestant, Any], None] = field(default=_assert_close)

    @property
    def label(self) -> str:
        """Operation with what is special about the case."""
        return label_of(self.operation, self.extra)

    def check_agreement(
        self, contestant: Contestant, result: Any, expected: Any, input: Any
    ) -> None:
        """Compare a contestant's result with ksam's on the same input and from the same state.

        Raises:
            DisagreementError: they differ by more than the contestant's tolerance.
        """
        try:
            self.assert_same(result, expected, contestant, input)
        except AssertionError as error:
            raise DisagreementError(
                f"{self.room}: {self.label} {self.shape} {self.dtype}: {contestant.name} and "
                f"{KSAM} disagree: {error}"
            ) from error


def stateless(name: str, function: Callable[..., Any], tolerance: Tolerance = EXACT) -> Contestant:
    """Return the contestant that calls `function(*input)`."""
    return Contestant(name, lambda _: lambda input: function(*input), tolerance)


def compiled(
    name: str,
    function: Callable[..., Any],
    tolerance: Tolerance,
    finish: Callable[[Callable[..., Any]], Callable[..., Any]] = lambda function: function,
) -> Contestant:
    """Return the contestant that calls `torch.compile(function)(*input)`.

    Args:
        finish: wraps the compiled function in what is not to be compiled.

    The shapes are static, which is the compiler's best case, and compiling is not timed.
    """

    def start(input: Any) -> Run:
        # Without this, the ninth shape of the same code would run uncompiled, and silently.
        torch._dynamo.reset()
        call = finish(torch.compile(function, dynamic=False, fullgraph=True))
        try:
            # No worker processes, which would still be starting while the clock runs.
            with inductor_config.patch(compile_threads=1):
                call(*input)
        except Exception as error:  # no compiler, or whatever else is wrong with it here
            reason = str(error).strip().partition("\n")[0] or type(error).__name__
            raise UnavailableError(f"torch.compile: {reason}") from error
        return lambda input: call(*input)

    return Contestant(name, start, tolerance, starts_slowly=True)


def size_in_bytes(tree: Any) -> int:
    """Bytes of all tensors of a tree."""
    leaves = pytree.tree_leaves(tree)
    return sum(leaf.numel() * leaf.element_size() for leaf in leaves if isinstance(leaf, Tensor))


def dtype_name(dtype: torch.dtype) -> str:
    """Return `float32` for `torch.float32`."""
    return str(dtype).removeprefix("torch.")
