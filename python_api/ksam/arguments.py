"""Checks of what an optimizer is built with; each names the argument and the value."""

from __future__ import annotations

import reprlib
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer

from ksam.base import entries
from ksam.distributed import data_parallel, has_fully_sharded
from ksam.geometry import Geometry
from ksam.momentum import Momentum
from ksam.parts import Sampler
from ksam.samplers import Importance, LossIncrease, Ordered
from ksam.tables import SharpnessSample
from ksam.when import Policy
from ksam_kernels.checks import check_count
from ksam_kernels.compact.tree import batched_tensors, check_dense, check_without_graph
from ksam_kernels.dtensor import first_dtensor

if TYPE_CHECKING:
    from ksam.composed import Composed

Scale = Literal["mean", "batch", "share"]
SCALES = get_args(Scale)
Statistics = Literal["subset", "matched", "full", "running"]
STATISTICS = get_args(Statistics)


def _check_choice(name: str, value: object, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(choices)}, got {value!r}")


def _check_type(name: str, value: object, kinds: tuple[type, ...], meaning: str) -> None:
    if value is not None and not isinstance(value, kinds):
        raise TypeError(f"{name} must be {meaning} or None, got {value!r}")


def _check_samplers(ascent: object, descent: object, scale: str) -> None:
    _check_type("ascent", ascent, (Sampler, Momentum), "a Sampler, a Momentum")
    _check_type("descent", descent, (Sampler,), "a Sampler")
    if descent is None and not isinstance(ascent, Sampler):
        raise ValueError(
            f"descent must be given unless ascent is a Sampler, whose samples it then takes, got "
            f"None with ascent={ascent!r}"
        )
    _check_comparisons(ascent, descent)
    descends = ascent if descent is None else descent
    if scale != "mean" and isinstance(descends, (Ordered, Importance)):
        raise ValueError(
            f'scale must be "mean" with {type(descends).__name__}, which already sets how its '
            f"losses are weighted, got {scale!r}"
        )


def _check_comparisons(ascent: object, descent: object) -> None:
    """Losses that are compared before and after the ascent must be of the same samples."""
    if isinstance(ascent, LossIncrease):
        raise ValueError(
            f"ascent must not be LossIncrease, which selects samples by how much the ascent raised "
            f"their losses, got {ascent!r}; pass it as descent"
        )
    # StaleTopK, for one, evaluates the whole batch at step 0 but not at 1.
    if isinstance(descent, LossIncrease) and not (
        isinstance(ascent, Sampler) and ascent.sees_batch(0) and ascent.sees_batch(1)
    ):
        raise ValueError(
            f"ascent must evaluate the whole batch in every step (All and TopK do) with "
            f"descent=LossIncrease, which compares the losses before and after the ascent, got "
            f"{ascent!r}"
        )
    if isinstance(descent, SharpnessSample):
        raise ValueError(
            f"descent must not be SharpnessSample, which records how much the ascent changes the "
            f"losses of its samples, got {descent!r}; pass it as ascent"
        )
    if isinstance(ascent, SharpnessSample) and descent is not None:
        raise ValueError(
            f"descent must be None with ascent=SharpnessSample, which compares the losses of the "
            f"same samples before and after the ascent, got {descent!r}"
        )


def _check_when(when: object, otherwise: object) -> None:
    if isinstance(when, type) or not (when is None or callable(when) or isinstance(when, Policy)):
        raise TypeError(f"when must be a function of the step or a policy, got {when!r}")
    _check_type("otherwise", otherwise, (Momentum,), "a Momentum")
    if otherwise is not None and when is None:
        raise ValueError(
            f"otherwise must be None without when, as every step is then sharpness-aware, got "
            f"{otherwise!r}"
        )


def _check_micro_batches(arguments: Composed) -> None:
    """Refuse what cannot work in micro-batches."""
    size, statistics = arguments.micro_batch_size, arguments.statistics
    if size is None:
        return
    check_count("micro_batch_size", size, 1)
    if any(wrapped.static_graph for wrapped in data_parallel(arguments.model)):
        raise ValueError(
            f"micro_batch_size must be None with static_graph=True of DistributedDataParallel, "
            f"which cannot skip averaging the gradients between micro-batches, got {size!r}"
        )
    if any(isinstance(part, Ordered) for part in (arguments.ascent, arguments.descent)):
        raise ValueError(
            f"micro_batch_size must be None with Ordered, which knows the highest losses only "
            f"after the last micro-batch, got {size!r}; TopK finds them in a pass of its own"
        )
    if statistics in ("matched", "full"):
        raise ValueError(
            f'statistics must be "subset" or "running" with micro_batch_size, as no pass then '
            f"sees the whole batch at once, got {statistics!r}"
        )


def _check_model(model: Any) -> None:
    _check_type("model", model, (nn.Module,), "a torch.nn.Module")
    if has_fully_sharded(model):
        raise TypeError(
            "model must not be a FullyShardedDataParallel (FSDP1) or contain one: its shards "
            "cannot be told from whole parameters; use torch.distributed.fsdp.fully_shard (FSDP2)"
        )


def check_arguments(arguments: Composed) -> None:
    """Check the arguments of :class:`ksam.optimizer.SharpnessAware`.

    All but rho and ``grad_scaler``, which are checked where they are stored.

    Raises:
        TypeError, ValueError: an argument out of its range; the message names it.
    """
    _check_choice("scale", arguments.scale, SCALES)
    _check_choice("statistics", arguments.statistics, STATISTICS)
    _check_samplers(arguments.ascent, arguments.descent, arguments.scale)
    _check_when(arguments.when, arguments.otherwise)
    if not isinstance(arguments.geometry, Geometry):
        raise TypeError(f"geometry must be a Geometry, got {arguments.geometry!r}")
    _check_model(arguments.model)
    _check_micro_batches(arguments)
    check_count("seed", arguments.seed, 0, below=2**31)


def _which(position: int, name: str | None, p: Tensor) -> str:
    """A parameter, for messages."""
    shape = "of no shape yet" if is_lazy(p) else f"of shape {tuple(p.shape)}"
    called = "" if name is None else f", {name!r},"
    return f"parameter {position} of its group{called} {shape}"


def check_group(
    base: Optimizer, group: Mapping[str, Any], momentum: bool, model: nn.Module | None
) -> None:
    """Check a parameter group, with the base optimizer's defaults filled in.

    Args:
        momentum: whether the method perturbs along the base optimizer's momentum.

    Raises:
        TypeError: complex parameters that are trained, sparse ones, or shards that are no DTensors.
        ValueError: ``maximize``, no momentum where one is needed, or DTensors without their model.
    """
    named = entries(group)
    if model is None and first_dtensor([p for _, p in named]) is not None:
        raise ValueError(
            "model must be given when parameters are DTensors (FSDP2), so that it gathers its "
            "weights again after they change, got None"
        )
    for position, (name, p) in enumerate(named):
        if isinstance(p, Tensor) and p.dtype.is_complex and p.requires_grad:
            raise TypeError(
                f"params must be real, got {p.dtype} for {_which(position, name, p)}; train its "
                f"torch.view_as_real, and apply torch.view_as_complex in the model"
            )
        if isinstance(p, Tensor) and p.layout is not torch.strided:
            raise TypeError(
                f"params must be dense, got layout {p.layout} for {_which(position, name, p)}"
            )
        if hasattr(p, "_st_info"):  # where DistributedDataParallel notes what the tensor was
            raise TypeError(
                f"params must not be tensor-parallel within DistributedDataParallel, where shards "
                f"cannot be told from whole parameters, got {_which(position, name, p)}; use "
                f"torch.distributed.fsdp.fully_shard (FSDP2)"
            )
    group = {**base.defaults, **group}
    if group.get("maximize"):
        raise ValueError(
            f"maximize must be False, got {group['maximize']!r}: sharpness is defined for a loss; "
            f"minimize the negative instead"
        )
    if momentum:
        Momentum.check(base, group)


def check_names(group: Mapping[str, Any], model: nn.Module | None) -> None:
    """Check that every trained parameter has a name, for a geometry that asks for names.

    Raises:
        ValueError: a parameter without a name.
    """
    nameless = [
        (position, p)
        for position, (name, p) in enumerate(entries(group))
        if name is None and isinstance(p, Tensor) and p.requires_grad
    ]
    of_model = set() if model is None or not nameless else set(model.parameters())
    for position, p in nameless:
        if p not in of_model:
            raise ValueError(
                f"params must have names, by which the geometry tells weights from biases, got "
                f"none for {_which(position, None, p)}; pass model.named_parameters() as params, "
                f"or pass model="
            )


def check_call(per_sample_loss: object, batch: object, advice: str = "") -> None:
    """Check what a step is given.

    Args:
        advice: added to the end of the message if no batch was given.

    Raises:
        TypeError: no function, or no batch.
    """
    if not callable(per_sample_loss):
        found = reprlib.repr(per_sample_loss)
        raise TypeError(f"per_sample_loss must be a function of the batch, got {found}")
    if batch is None:
        raise TypeError(f"batch must be given with per_sample_loss, got None{advice}")


def check_batch(batch: Any, samples: int, takes_parts: bool, params: Iterable[Tensor]) -> None:
    """Check that every pass of a step can be given the batch.

    Args:
        takes_parts: whether samples are gathered from it, or it is split into micro-batches.
        params: the optimizer's.

    Raises:
        ValueError: no samples, tensors with a graph, which the first pass would use up, or a
            parameter to take a part of.
        TypeError: sparse and other tensors from which nothing can be gathered.
    """
    if samples == 0:
        raise ValueError("batch must hold at least one sample, got 0")
    tensors = batched_tensors(batch)
    check_without_graph(batch, tensors)
    if not takes_parts:
        return
    check_dense(batch, tensors)
    differentiated = [tensor for tensor in tensors if tensor.requires_grad]
    held = set(map(id, params)) if differentiated else set()
    for tensor in differentiated:
        if id(tensor) in held:
            raise ValueError(
                f"batch must not hold parameters of the optimizer, got one of shape "
                f"{tuple(tensor.shape)}: its selected rows are a new tensor, so it would get no "
                f"gradient; use the parameter itself in the function"
            )
