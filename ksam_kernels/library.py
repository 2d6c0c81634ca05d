"""How the operators of ``torch.ops.ksam`` are declared and called.

The kernel of every operator is the same: ask :mod:`ksam_kernels.backends` for the implementation
on the tensors' device and call it. Declared mutations, version counters and fake tensors then work
alike for every backend, so ``torch.compile``, ``torch.export`` and ``opcheck`` see one operator.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._C import _len_torch_dispatch_stack
from torch.nn import Parameter

from ksam_kernels import backends


def _device(args: tuple[Any, ...]) -> torch.device:
    """The device of the first tensor, looking into lists; the CPU where there is none."""
    for arg in args:
        first = arg[0] if isinstance(arg, (list, tuple)) and arg else arg
        if isinstance(first, Tensor):
            return first.device
    return torch.device("cpu")


def operator(schema: str) -> Callable[[Callable[..., Any]], Any]:
    """Declare ``torch.ops.ksam.<function name>``; the decorated function is its fake kernel.

    Args:
        schema: arguments and returns as in ``(Tensor(a!) x, int n) -> Tensor``; what it marks with
            ``!`` is mutated.
    """
    mutated = re.findall(r"Tensor\(\w+!\)(?:\[\])? (\w+)", schema)

    def declare(fake: Callable[..., Any]) -> Any:
        name = fake.__name__

        def kernel(*args: Any) -> Any:
            return backends.call(name, _device(args), *args)

        op = torch.library.custom_op(f"ksam::{name}", kernel, mutates_args=mutated, schema=schema)
        op.register_fake(fake)
        return op

    return declare


def is_eager() -> bool:
    """Nothing traces or intercepts operators now: no compiler, no dispatch mode."""
    return not torch.compiler.is_compiling() and not _len_torch_dispatch_stack()


def _is_opaque(arg: Any) -> bool:
    """A tensor that may have more to it than its data: a subclass, or one that wants a gradient."""
    kind = type(arg)
    if kind is Tensor or kind is Parameter:
        return arg.requires_grad and torch.is_grad_enabled()
    if isinstance(arg, (list, tuple)):
        return any(map(_is_opaque, arg))
    return isinstance(arg, Tensor)


def call(name: str, *args: Any) -> Any:
    """Run ``torch.ops.ksam.<name>``, which must not mutate its arguments.

    The dispatcher takes some 30 us to reach a Python kernel. Where it has nothing to do (no
    gradient, no tracing, no tensor subclass) the implementation is called without it.
    """
    if not is_eager() or any(map(_is_opaque, args)):
        return getattr(torch.ops.ksam, name)(*args)
    return backends.call(name, _device(args), *args)
