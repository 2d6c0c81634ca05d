"""How the operators of ``torch.ops.ksam`` are declared and called.

The kernel of every operator is the same: ask :mod:`ksam_kernels.backends` for the implementation
on the tensors' device and call it. Declared mutations, version counters and fake tensors then work
alike for every backend, so ``torch.compile``, ``torch.export`` and ``opcheck`` see one operator.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._C import _are_functorch_transforms_active, _is_tracing, _len_torch_dispatch_stack
from torch._C._functorch import (
    CInterpreter,
    is_functorch_wrapped_tensor,
    is_legacy_batchedtensor,
    peek_interpreter_stack,
)
from torch.autograd import forward_ad
from torch.nn import Parameter

from ksam_kernels import backends

#: The derivatives of the operators that have one.
_functions: dict[str, type[torch.autograd.Function]] = {}


def _device(args: tuple[Any, ...]) -> torch.device | None:
    """The device of the first tensor, or for an operator on lists, of the first tensor in them;
    None if the lists are empty. Other tensors may lie elsewhere."""
    of_lists = bool(args) and isinstance(args[0], (list, tuple))
    for arg in args:
        first = arg
        if of_lists:
            first = arg[0] if isinstance(arg, (list, tuple)) and arg else None
        if isinstance(first, Tensor):
            return first.device
    return None


def operator(
    schema: str, setup: Callable[..., None] | None = None, grad: Callable[..., Any] | None = None
) -> Callable[[Callable[..., Any]], Any]:
    """Declare ``torch.ops.ksam.<function name>``; the decorated function is its fake kernel.

    Args:
        schema: arguments and returns as in ``(Tensor(a!) x, int n) -> Tensor``; what it marks with
            ``!`` is mutated.
        setup: ``setup(ctx, inputs, output)`` keeps what ``grad`` needs.
        grad: ``grad(ctx, *upstream)``, a gradient per input. Of several outputs only the first has
            a derivative.
    """
    mutated = re.findall(r"Tensor\(\w+!\)(?:\[\])? (\w+)", schema)

    def declare(fake: Callable[..., Any]) -> Any:
        name = fake.__name__

        def kernel(*args: Any) -> Any:
            return backends.call(name, _device(args), *args)

        op = torch.library.custom_op(f"ksam::{name}", kernel, mutates_args=mutated, schema=schema)
        op.register_fake(fake)
        if setup is not None and grad is not None:
            op.register_autograd(grad, setup_context=setup)
            _functions[name] = _function(name, setup, grad)
        return op

    return declare


def _function(
    name: str, setup: Callable[..., None], grad: Callable[..., Any]
) -> type[torch.autograd.Function]:
    """The derivative of an operator for :func:`attach`.

    No ``setup_context``: where that is defined, ``apply`` inspects a signature in every call.
    """

    def forward(ctx: Any, outputs: tuple[Tensor, ...], *inputs: Any) -> Tensor:
        setup(ctx, inputs, outputs)
        return outputs[0]

    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        return None, *grad(ctx, *upstream)

    methods = {"forward": staticmethod(forward), "backward": staticmethod(backward)}
    return type(f"ksam_{name}", (torch.autograd.Function,), methods)


def attach(name: str, outputs: tuple[Tensor, ...], *inputs: Any) -> Tensor:
    """The first of the outputs, which were computed without ``torch.ops.ksam.<name>``, with the
    gradient of that operator. The tuple hides them from autograd, which would take them for inputs.

    A third of ``Function.apply`` is asking whether a transform is active, which :func:`is_eager`
    has ruled out. So its base method is called directly, except on tensors that a finished
    transform left wrapped.
    """
    function: Any = _functions[name]
    wrapped = is_functorch_wrapped_tensor(inputs[0])
    apply = function.apply if wrapped else super(torch.autograd.Function, function).apply
    first: Tensor = apply(outputs, *inputs)
    return first


def is_eager() -> bool:
    """Whether nothing traces or intercepts operators now: no compiler, dispatch mode, transform,
    tracer or forward-mode derivative."""
    return not (
        torch.compiler.is_compiling()
        or _len_torch_dispatch_stack()
        or _are_functorch_transforms_active()
        or _is_tracing()
        or forward_ad._current_level >= 0
    )


def is_transformed() -> bool:
    """Whether a transform of ``torch.func`` or forward-mode differentiation is active. PyTorch
    would loop over custom operators, refuse them, or silently take their tangent for zero."""
    # Not _are_functorch_transforms_active(): torch.compile notes that in its graphs, and keeps no
    # program that has it for the next process.
    return isinstance(peek_interpreter_stack(), CInterpreter) or forward_ad._current_level >= 0


def _resolved(arg: Any) -> Any:
    """The argument without the negative bit, which the dispatcher resolves and no kernel sees."""
    return arg.resolve_neg() if isinstance(arg, Tensor) and arg.is_neg() else arg


def wants_grad(arg: Any) -> bool:
    if isinstance(arg, (list, tuple)):
        return any(map(wants_grad, arg))
    return isinstance(arg, Tensor) and arg.requires_grad


def is_subclass(arg: Any) -> bool:
    """Whether it is a tensor that may have more to it than its data."""
    if isinstance(arg, (list, tuple)):
        return any(map(is_subclass, arg))
    kind = type(arg)
    return kind is not Tensor and kind is not Parameter and isinstance(arg, Tensor)


def call(name: str, *args: Any) -> Any:
    """Run ``torch.ops.ksam.<name>``, which must not mutate its arguments.

    The dispatcher takes some 30 us to reach a Python kernel, and 100 us where a gradient is wanted.
    Where it has nothing to do (no tracing, no tensor subclass) the implementation is called without
    it, and its derivative attached.
    """
    if is_eager() and not any(map(is_subclass, args)):
        args = tuple(map(_resolved, args))
        if not (torch.is_grad_enabled() and any(map(wants_grad, args))):
            with backends.caching_allowed():
                return backends.call(name, _device(args), *args)
        if name in _functions:
            with torch.no_grad():
                outputs = backends.call(name, _device(args), *args)
            if isinstance(outputs, Tensor):
                return attach(name, (outputs,), *args)
            return attach(name, outputs, *args), *outputs[1:]
    return dispatch(name, *args)


def dispatch(name: str, *args: Any) -> Any:
    """Run ``torch.ops.ksam.<name>`` by PyTorch's dispatcher."""
    op = getattr(torch.ops.ksam, name)
    if not is_eager():
        return op(*args)
    with backends.caching_allowed():
        return op(*args)


def mark_written(*lists: Sequence[Tensor]) -> None:
    """Tell autograd of writes to the tensors, as the dispatcher does for declared mutations."""
    for tensors in lists:
        torch.autograd.graph.increment_version(tensors)


def call_in_place(name: str, written: Iterable[list[Tensor]], *args: Any) -> Any:
    """Run ``torch.ops.ksam.<name>`` on lists of plain tensors where :func:`is_eager`, without the
    dispatcher, which looks at each of them for some microseconds: autograd is told what is written,
    and not shown how."""
    mark_written(*written)
    with torch.no_grad(), backends.caching_allowed():
        return backends.call(name, _device(args), *map(_resolved, args))


def call_backward(name: str, grad: Tensor, *args: Any) -> Any:
    """:func:`call` in a backward pass. Under vmap, functorch's or that of ``is_grads_batched``, the
    operator itself is called, over which PyTorch loops."""
    if not is_eager() or is_legacy_batchedtensor(grad):
        return getattr(torch.ops.ksam, name)(grad, *args)
    return call(name, grad, *args)
