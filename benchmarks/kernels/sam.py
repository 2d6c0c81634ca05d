"""A SAM step on given gradients, written six ways: the contestants of the perturb room.

The backward pass, which would write new gradients between the two halves of a step, is not timed:
both halves use the same gradients. Every contestant reads them from `.grad`, as in a training loop.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.optim import SGD, AdamW, Optimizer

import ksam_kernels as kk
from benchmarks.errors import UsageError, import_optional
from benchmarks.kernels.case import KSAM, UnavailableError

RHO = 0.05


@dataclass(frozen=True)
class Base:
    """A base optimizer with the options that people train with."""

    kind: type[Optimizer]
    options: dict[str, Any]
    state: tuple[str, ...]  # tensors of the parameters' shapes, by torch's names


BASES = {
    "SGD": Base(SGD, {"lr": 0.1, "momentum": 0.9, "weight_decay": 5e-4}, ("momentum_buffer",)),
    "AdamW": Base(AdamW, {"lr": 1e-3, "weight_decay": 0.05}, ("exp_avg", "exp_avg_sq")),
}


@dataclass(frozen=True)
class Start:
    """Where every contestant starts: in mid-training, with a history in the base's state."""

    weights: list[Tensor]
    grads: list[Tensor]
    state: dict[str, list[Tensor]]
    steps: float = 10.0

    @classmethod
    def random(
        cls,
        shapes: list[tuple[int, ...]],
        base: Base,
        device: torch.device,
        dtype: torch.dtype = torch.float32,
    ) -> Start:
        """Weights as initializers make them; the state has no negative squares.

        It also has no squares of nearly 0 beside large means, which no training has: where these
        move a weight by more than its own size, contestants would differ by their rounding of the
        bias corrections: PyTorch's computes them in float32 where steps are counted on a GPU.
        """

        def normal(scale: float) -> list[Tensor]:
            return [scale * torch.randn(shape, device=device, dtype=dtype) for shape in shapes]

        state = {name: normal(1e-2) for name in base.state}
        for square in state.get("exp_avg_sq", []):
            square.square_().add_(1e-4)
        return cls(weights=normal(2e-2), grads=normal(1e-2), state=state)


class SamStep:
    """The two halves of a SAM step over copies of the start's tensors.

    `params` hold the weights, perturbed between the halves, `kept` those from before; both lists
    stay the same objects, and `state` is the base's, one list after the other.
    """

    implementation: ClassVar[dict[str, Any]]  # of the base optimizer: foreach or fused

    def __init__(self, start: Start, base: Base, *, adaptive: bool = False) -> None:
        self.adaptive = adaptive
        self.params = [weight.clone().requires_grad_() for weight in start.weights]
        for param, grad in zip(self.params, start.grads, strict=True):
            param.grad = grad
        self.kept = [weight.clone() for weight in start.weights]
        self.state = {name: [x.clone() for x in start.state[name]] for name in base.state}
        self.prepare(start, base)

    def prepare(self, start: Start, base: Base) -> None:
        """Make the base optimizer, and give it the state."""
        options = {**base.options, **self.implementation}
        if "exp_avg" in self.state and self.params[0].is_cuda:
            options["capturable"] = True  # steps counted on the device, no wait for it
        self.optimizer = base.kind(self.params, **options)
        self.load_state(self.optimizer, start)

    def load_state(self, optimizer: Optimizer, start: Start) -> None:
        """Let the optimizer update this object's state tensors."""
        for i, param in enumerate(self.params):
            optimizer.state[param] = {name: tensors[i] for name, tensors in self.state.items()}
            if "exp_avg" in self.state:
                device = param.device if param.is_cuda else None
                optimizer.state[param]["step"] = torch.tensor(start.steps, device=device)

    @property
    def grads(self) -> list[Tensor]:
        """The gradients, gathered anew as every step must."""
        return [grad for param in self.params if (grad := param.grad) is not None]

    def norm(self) -> Tensor:
        """The global norm of the gradients, ASAM's if adaptive."""
        raise NotImplementedError

    def perturb(self) -> Tensor | None:
        """Keep the weights and climb by rho along the gradient; return the norm if it is known."""
        raise NotImplementedError

    def update(self) -> None:
        """Put the weights back and update them with the base optimizer."""
        raise NotImplementedError


class Ksam(SamStep):
    """ksam_kernels' public functions, called as ksam's optimizer calls them."""

    def prepare(self, start: Start, base: Base) -> None:
        self.options = dict(base.options)
        device = start.weights[0].device
        self.steps = [torch.tensor(start.steps, device=device) for _ in start.weights]

    def norm(self) -> Tensor:
        return kk.grad_norm(self.grads, self.params if self.adaptive else None)

    def perturb(self) -> Tensor:
        return kk.perturb_(self.params, self.grads, self.kept, rho=RHO, adaptive=self.adaptive)

    def update(self) -> None:
        restored = (self.params, self.kept, self.grads)
        if "exp_avg" in self.state:
            moments = (self.state["exp_avg"], self.state["exp_avg_sq"], self.steps)
            kk.restore_adam_(*restored, *moments, decoupled_weight_decay=True, **self.options)
        else:
            kk.restore_sgd_(*restored, self.state["momentum_buffer"], **self.options)


class Loop(SamStep):
    """The loop over parameters that most SAM code descends from (as in davda54/sam)."""

    implementation: ClassVar = {"foreach": True}

    def norm(self) -> Tensor:
        norms = [
            ((p.abs() if self.adaptive else 1.0) * g).norm(p=2)
            for p, g in zip(self.params, self.grads, strict=True)
        ]
        norm: Tensor = torch.stack(norms).norm(p=2)
        return norm

    def perturb(self) -> Tensor:
        norm = self.norm()
        scale = RHO / (norm + 1e-12)
        for i, (p, g) in enumerate(zip(self.params, self.grads, strict=True)):
            self.kept[i] = p.data.clone()
            p.add_((p.square() if self.adaptive else 1.0) * g * scale)
        return norm

    def update(self) -> None:
        for p, kept in zip(self.params, self.kept, strict=True):
            p.data = kept
        self.optimizer.step()


class Foreach(SamStep):
    """Whole-list operations, buffers kept, weights stay where they are, no wait for the device."""

    implementation: ClassVar = {"foreach": True}

    def norm(self) -> Tensor:
        grads = self.grads
        if self.adaptive:
            grads = list(torch._foreach_mul(torch._foreach_abs(self.params), grads))
        return torch.nn.utils.get_total_norm(grads, foreach=True)

    def perturb(self) -> Tensor:
        norm = self.norm()
        torch._foreach_copy_(self.kept, self.params)
        if not (self.adaptive or norm.is_cuda):  # nothing to wait for: no list in between
            torch._foreach_add_(self.params, self.grads, alpha=RHO / (norm.item() + 1e-12))
            return norm
        climb = torch._foreach_mul(self.grads, RHO / (norm + 1e-12))
        if self.adaptive:
            torch._foreach_mul_(climb, self.params)
            torch._foreach_mul_(climb, self.params)
        torch._foreach_add_(self.params, climb)
        return norm

    def update(self) -> None:
        torch._foreach_copy_(self.params, self.kept)
        self.optimizer.step()


class CopyFused(Foreach):
    """The same over a fused base: the fewest passes that leave the weights where they are."""

    implementation: ClassVar = {"fused": True}


class Swap(SamStep):
    """Fewest bytes without a kernel of one's own: w + e goes to a second buffer, fused base.

    The parameters point at the buffer until the weights are due back. That moves their storage,
    which FSDP, DDP's flat views and CUDA graphs do not forgive, and reads the norm on the host.
    """

    implementation: ClassVar = {"fused": True}

    def norm(self) -> Tensor:
        return torch.nn.utils.get_total_norm(self.grads, foreach=True)

    def perturb(self) -> Tensor:
        norm = self.norm()
        scale = RHO / (norm.item() + 1e-12)
        for p, g, buffer in zip(self.params, self.grads, self.kept, strict=True):
            torch.add(p, g, alpha=scale, out=buffer)
        self._swap()
        return norm

    def update(self) -> None:
        self._swap()
        self.optimizer.step()

    def _swap(self) -> None:
        for i, p in enumerate(self.params):
            p.data, self.kept[i] = self.kept[i], p.data


class PytorchOptimizer(SamStep):
    """The SAM of the package pytorch-optimizer."""

    def prepare(self, start: Start, base: Base) -> None:
        try:
            package = import_optional(
                "pytorch_optimizer", package="pytorch-optimizer", needed_by="this contestant"
            )
        except UsageError as error:
            raise UnavailableError(str(error)) from error
        self.sam = package.SAM(
            self.params, base.kind, rho=RHO, adaptive=self.adaptive, foreach=True, **base.options
        )
        self.load_state(self.sam.base_optimizer, start)

    def perturb(self) -> None:
        self.sam.first_step()

    def update(self) -> None:
        self.sam.second_step()


CONTESTANTS: dict[str, type[SamStep]] = {
    KSAM: Ksam,
    "davda54": Loop,
    "foreach": Foreach,
    "copy+fused": CopyFused,
    "swap+fused": Swap,
    "pytorch-optimizer": PytorchOptimizer,
}

LEGEND = {
    "davda54": "a loop over parameters, pointer swap to restore, foreach=True base",
    "foreach": "torch._foreach_*, copied back to restore, foreach=True base; "
    "AdamW, this and the loop's, is capturable on a GPU: its bias corrections are launches",
    "copy+fused": "as foreach, fused=True base",
    "swap+fused": "torch.add into a second buffer, pointer swap to restore, fused=True base; "
    "moves the parameters' storage and reads the norm on the host",
    "pytorch-optimizer": "its SAM with foreach=True, first_step() and second_step()",
}
