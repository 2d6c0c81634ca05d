"""The compiled extension, where this installation has one.

Every kernel of ``ksam_kernels._C`` takes its outputs from the caller and returns True, or declines:
it returns False and has written nothing where it does not take an argument (a device, a dtype, a
layout, a subclass of Tensor).
"""

from __future__ import annotations

from torch import Tensor  # torch first: the extension looks for its thread pool

try:
    from ksam_kernels import _C as extension  # noqa: N811
except ModuleNotFoundError:  # any other ImportError is a broken installation: let it be seen
    extension = None  # type: ignore[assignment]

__all__ = ["demand", "extension"]


def demand(accepted: bool, operator: str, *tensors: Tensor | None) -> None:
    """The operator's public function checked the arguments: a kernel that declines them is wrong.

    Raises:
        RuntimeError: the kernel returned False.
    """
    if not accepted:
        shown = ", ".join(
            f"{t.dtype} {tuple(t.shape)} strides {t.stride()} on {t.device}"
            for t in tensors
            if t is not None
        )
        raise RuntimeError(f"the native kernel of {operator} does not take {shown}")
