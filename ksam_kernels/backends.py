"""Which implementation of an operator runs on a device, and why a better one does not.

Three backends, best first: ``native`` (the compiled extension), ``triton`` (GPU kernels compiled
on first use) and ``reference`` (plain PyTorch, the written contract, runs anywhere). Each call of
an operator asks :func:`resolve` once; the public functions first try the extension's kernels
(:func:`ksam_kernels.native.direct`), which decline what they do not take. ``auto`` takes the best
backend that can run the operator on the tensor's device; a backend that the user *named* either
runs or raises, it is never replaced.
Empty lists of tensors are on no device: every backend that has the operator runs them.
Further backends may be registered with :func:`implements`; those run only where they are named.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch

from ksam_kernels.warn import warn

Kernel = Callable[..., Any]
K = TypeVar("K", bound=Kernel)

#: Those that ``auto`` chooses from.
BACKENDS = ("native", "triton", "reference")

#: Operator names by room, in the order of a K-SAM step. Every backend implements a subset.
OPERATORS: dict[str, tuple[str, ...]] = {
    "loss": (
        "cross_entropy",
        "cross_entropy_backward",
        "select_cross_entropy",
        "binary_cross_entropy_with_logits",
        "binary_cross_entropy_with_logits_backward",
        "mse",
        "mse_backward",
    ),
    "topk": ("topk_indices",),
    "compact": ("compact",),
    "perturb": ("grad_norm", "perturb_", "restore_", "restore_sgd_", "restore_adam_"),
}

_NOT_INSTALLED = {
    "native": f"this installation has no compiled extension in {Path(__file__).parent}",
    "triton": "this installation has no Triton kernels",
}


def set_missing_reason(backend: str, reason: str) -> None:
    """Set what :func:`why_not` says of a backend that has no kernels in this installation."""
    _NOT_INSTALLED[backend] = reason


_kernels: dict[str, dict[str, Kernel]] = {name: {} for name in BACKENDS}
#: (backend, operator) -> the device types it runs on; absent: all.
_devices: dict[tuple[str, str], tuple[str, ...]] = {}
#: backend -> why it cannot run on a device of such a type, if it cannot.
_obstacles: dict[str, Callable[[torch.device], str | None]] = {}


class BackendUnavailableError(RuntimeError):
    """A backend that was asked for by name cannot run the operator on the device."""


def choices() -> tuple[str, ...]:
    """What :func:`use_backend` takes: ``auto`` and every backend that is registered."""
    return ("auto", *_kernels)


def _checked(choice: str, source: str) -> str:
    if choice not in choices():
        raise ValueError(f"{source} must be one of {', '.join(choices())}, got {choice!r}")
    return choice


# Process-wide like torch.backends' flags, not a context variable: autograd runs the backward pass
# of CUDA operators on threads of its own, which must see the same choice.
#: The choice of the environment, then of every block that some thread is in: the last one counts.
_choices = [[_checked(os.environ.get("KSAM_BACKEND", "auto"), "KSAM_BACKEND")]]
_changing = threading.Lock()


def requested_backend() -> str:
    """``auto``, or the backend named by ``KSAM_BACKEND`` or :func:`use_backend`."""
    return _choices[-1][0]


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Run every operator in the ``with`` block on one backend, in all threads of the process.

    A tensor whose layout its kernels do not read may be left to PyTorch's operators: they copy it
    into order, or if it is a leaf of a batch, gather its rows.

    Args:
        name: ``"auto"``, ``"native"``, ``"triton"``, ``"reference"`` or any that was registered.

    Raises:
        ValueError: for any other name. Where the named backend cannot run an operator, the call of
            that operator raises :class:`BackendUnavailableError`.
        RuntimeError: within a function that ``torch.compile`` compiles whole: its operators choose
            when they run, long after the block. Enter it around the call of the compiled function.
    """
    if torch.compiler.is_compiling():
        raise RuntimeError(
            f"use_backend({name!r}) must not be entered in a compiled function; enter it around "
            f"the call"
        )
    own = [_checked(name, "name")]
    try:
        with _changing:
            _choices.append(own)
        yield
    finally:
        with _changing:  # blocks of several threads may overlap, and end in any order
            _choices[:] = [entry for entry in _choices if entry is not own]


class _Thread(threading.local):
    may_cache = False


_thread = _Thread()


@contextmanager
def caching_allowed() -> Iterator[None]:
    """Let this thread's kernels cache memory between calls within the block.

    Only eager code enters it: a program compiled with ``mode="reduce-overhead"`` warms up in its
    graph's memory pool and must get all of it back.
    """
    before, _thread.may_cache = _thread.may_cache, True
    try:
        yield
    finally:
        _thread.may_cache = before


def may_cache() -> bool:
    """Whether this is in a block of :func:`caching_allowed`."""
    return _thread.may_cache


def implements(
    backend: str, operator: str, *, devices: tuple[str, ...] | None = None
) -> Callable[[K], K]:
    """Decorator: register a function as ``backend``'s implementation of ``operator``.

    Args:
        backend: one of BACKENDS, or a new name, which ``auto`` never picks.
        devices: the device types that it runs on; None: all.
    """
    if not any(operator in names for names in OPERATORS.values()):
        raise ValueError(f"operator {operator!r} is not listed in OPERATORS")

    def register(kernel: K) -> K:
        _kernels.setdefault(backend, {})[operator] = kernel
        if devices is not None:
            _devices[backend, operator] = devices
        return kernel

    return register


def register_obstacle(backend: str, obstacle: Callable[[torch.device], str | None]) -> None:
    """Register ``obstacle(device)``: why a backend's kernels cannot run there; None if they can."""
    _obstacles[backend] = obstacle


def why_not(backend: str, operator: str, device: torch.device | None) -> str | None:
    """Why ``backend`` cannot run ``operator`` on ``device`` (None: no tensors); None if it can."""
    if operator in _kernels[backend]:
        devices = _devices.get((backend, operator))
        if device is None:
            return None
        if devices is None or device.type in devices:
            return _obstacles[backend](device) if backend in _obstacles else None
    if not _kernels[backend]:
        return _NOT_INSTALLED[backend]
    return f"it has no {operator} kernel" + ("" if device is None else f" for {device.type}")


def resolve(operator: str, device: torch.device | None) -> tuple[str, Kernel]:
    """The backend that runs ``operator`` on ``device`` now (None: no tensors), and its
    implementation.

    Raises:
        BackendUnavailableError: the backend asked for by name cannot run it.
    """
    choice = requested_backend()
    for name in BACKENDS if choice == "auto" else (choice,):
        reason = why_not(name, operator, device)
        if reason is None:
            return name, _kernels[name][operator]
    place = "" if device is None else f" on {device.type}"
    raise BackendUnavailableError(
        f"backend {choice!r} was asked for by name but cannot run {operator}{place}: {reason}"
    )


def call(operator: str, device: torch.device | None, *args: Any) -> Any:
    """Run ``operator`` on the backend that :func:`resolve` picks for ``device``."""
    name, kernel = resolve(operator, device)
    if name == "reference" and device is not None and device.type == "cuda":
        _warn_of_reference(operator, device)
    return kernel(*args)


_warned: set[torch.device] = set()


def _warn_of_reference(operator: str, device: torch.device) -> None:
    """Warn once for each GPU on which ``auto`` finds no kernels: training would be slow, and
    nothing else would tell why."""
    if device in _warned or requested_backend() != "auto":
        return
    _warned.add(device)
    reasons = [f"{name}: {why_not(name, operator, device)}" for name in BACKENDS[:-1]]
    warn(
        f"ksam_kernels runs on {device} as plain PyTorch, which is slow, because no kernels can "
        f"run there. {'. '.join(reasons)}. To accept this without a warning, set "
        'KSAM_BACKEND=reference or enter use_backend("reference").'
    )
