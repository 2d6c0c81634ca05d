"""The base optimizer under a sharpness-aware one, and the parameters of both."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise, zip_longest
from typing import Any

from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer

from ksam_kernels.dtensor import local


def build_base(
    params: Iterable[Any] | None, base: type[Optimizer] | Optimizer, base_kwargs: dict[str, Any]
) -> Optimizer:
    """The base optimizer, built here or given."""
    if isinstance(base, type) and issubclass(base, Optimizer):
        if params is None:
            raise ValueError("params must be given when base is a class, got None")
        _check_taken(base, base_kwargs)
        return base(params, **base_kwargs)
    if not isinstance(base, Optimizer):
        raise TypeError(f"base must be an optimizer or an optimizer class, got {base!r}")
    for name, value in base_kwargs.items():
        raise TypeError(
            f"{name} must not be given, as the method has no such argument and base is already "
            f"built, got {value!r}"
        )
    own = parameters(base.param_groups)
    given = own if params is None else parameters(params)
    ours, theirs = set(map(id, given)), set(map(id, own))
    if ours != theirs:
        raise ValueError(
            f"params must be None or the {len(theirs)} parameters of base, "
            f"got {len(ours)} parameters, {len(ours & theirs)} of which are in base"
        )
    return base


def _check_taken(base: type[Optimizer], base_kwargs: dict[str, Any]) -> None:
    """Check that the class has these arguments; Python's message would not mention the method."""
    taken = inspect.signature(base).parameters
    if any(p.kind is inspect.Parameter.VAR_KEYWORD for p in taken.values()):
        return
    for name, value in base_kwargs.items():
        if name not in taken:
            raise TypeError(
                f"{name} is not an argument of the method or of its base, {base.__name__}, "
                f"got {value!r}"
            )


def parameters(entries: Iterable[Any]) -> list[Tensor]:
    """The tensors of what an optimizer takes: tensors, (name, tensor) pairs, or groups of them."""
    found: list[Tensor] = []
    for entry in entries:
        if isinstance(entry, dict):
            params = entry["params"]
            found += [params] if isinstance(params, Tensor) else parameters(params)
        else:
            found.append(entry[1] if isinstance(entry, tuple) else entry)
    return found


def entries(group: Mapping[str, Any]) -> list[tuple[str | None, Any]]:
    """A group's parameters (numbers in a checkpoint's group), each with its name, if it has one."""
    params = group.get("params", ())
    params = [params] if isinstance(params, Tensor) else params
    named = zip_longest(params, group.get("param_names", ()))
    return [p if isinstance(p, tuple) else (name, p) for p, name in named]


def parameter_names(groups: Sequence[dict[str, Any]], model: nn.Module | None) -> dict[Tensor, str]:
    """Names of the parameters: those the groups were built with, else the model's."""
    names: dict[Tensor, str] = {}
    if model is not None:
        names.update((p, name) for name, p in model.named_parameters())
    for group in groups:
        names.update(zip(group["params"], group.get("param_names", ()), strict=False))
    return names


def check_base(base: Optimizer) -> None:
    """Check that the base steps without arguments, and leaves the name rho to the radius."""
    if not hasattr(base, "defaults"):
        raise TypeError(
            f"base must have defaults, which torch.optim.Optimizer.__init__ sets, got "
            f"{type(base).__name__} without them"
        )
    if "rho" in base.defaults:
        raise ValueError(
            f"base must not have a hyperparameter named rho, which is the radius in param_groups, "
            f"got {type(base).__name__} with rho={base.defaults['rho']!r}"
        )
    # That of the class: what a scheduler puts in place of the instance's shows self as an argument.
    _, *arguments = inspect.signature(type(base).step).parameters.values()
    may_be_missing = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    needed = [
        argument.name
        for argument in arguments
        if argument.default is inspect.Parameter.empty and argument.kind not in may_be_missing
    ]
    if needed:
        raise TypeError(
            f"base must step without arguments, got {type(base).__name__}, whose step() needs a "
            f"{' and a '.join(needed)}"
        )


def _extent(p: Tensor) -> int:
    """Elements from the first to the last in memory, including others' in between."""
    return 1 + sum((n - 1) * stride for n, stride in zip(p.shape, p.stride(), strict=True))


def check_no_overlap(params: Sequence[Tensor]) -> None:
    """Two parameters on the same memory would be perturbed twice and restored once."""
    parts = map(local, params)
    # Meta and fake tensors have the address 0.
    spans = sorted(
        (p.data_ptr(), p.data_ptr() + _extent(p) * p.itemsize, i)
        for i, p in enumerate(parts)
        if not is_lazy(p) and p.numel() > 0 and p.data_ptr() != 0
    )
    for (_, end, i), (start, _, j) in pairwise(spans):
        if start < end:
            advice = "pass it once" if params[i] is params[j] else "use one Parameter for both"
            raise ValueError(f"params {min(i, j)} and {max(i, j)} share memory; {advice}")
