"""The compiled extension, where this installation has one.

The kernels of ``ksam_kernels._C`` that compute something new make the tensors and return them;
those that write in place return True. Where a kernel does not take an argument (a device, a dtype,
a layout, a subclass of Tensor) it declines: it has written nothing and returns None or False.
"""

from __future__ import annotations

from typing import Any

import torch  # before the extension, which looks for its thread pool
from torch import Tensor

from ksam_kernels import backends, library

try:
    import ksam_kernels._C as extension  # noqa: N811
except ModuleNotFoundError:
    extension = None  # type: ignore[assignment]
except ImportError as error:
    if error.path is None:  # not the loader's error: it says itself what to do
        raise
    raise ImportError(
        f"the compiled kernels of ksam do not load: {error}. Build them again in this environment "
        f"(pip install --no-cache-dir --force-reinstall --no-deps), or install without them "
        f"(KSAM_NATIVE=0)",
        name=error.name,
        path=error.path,
    ) from error

__all__ = ["DEVICES", "can_inspect", "direct", "direct_in_place", "extension", "run"]

#: The device types that the extension has kernels for.
DEVICES = ("cpu", "cuda") if extension is not None and extension.cuda_architectures else ("cpu",)


def _has_no_code(device: torch.device) -> str | None:
    """Why the kernels cannot run on a GPU: it is AMD's, this build has none for its architecture,
    or CUDA does not know its driver."""
    if device.type != "cuda":
        return None
    if torch.version.hip is not None:
        return "its GPU kernels are for CUDA, and this torch is for AMD GPUs"
    index = torch.cuda.current_device() if device.index is None else device.index
    if extension.has_code_for(index):
        return None
    major, minor = torch.cuda.get_device_capability(index)
    return (
        f"CUDA cannot load it on {device} ({extension.why_no_code(index)!r}): it was built for "
        f"sm_{', sm_'.join(extension.cuda_architectures.split())}, and {device} is "
        f"sm_{major}{minor} (TORCH_CUDA_ARCH_LIST={major}.{minor} builds for that)"
    )


backends.register_obstacle("native", _has_no_code)


def direct(name: str) -> Any:
    """The kernel for a public function to try before its own checks, which take longer than a
    small kernel; None where calling the kernel would not be all that happens."""
    if (
        extension is None
        or not library.is_eager()
        or backends.requested_backend() not in ("auto", "native")
    ):
        return None
    return getattr(extension, name)


def can_inspect() -> bool:
    """Whether what the extension finds in a call's tensors is all that matters to the call: any
    backend may then run on their memory, without PyTorch's dispatcher."""
    return (
        extension is not None
        and library.is_eager()  # first: the compiler cannot trace the next question
        and not torch.is_inference_mode_enabled()  # whose tensors have no version counters
    )


def direct_in_place(name: str) -> Any:
    """:func:`direct` for a kernel that writes its arguments and whose caller raises their version
    counters: tensors of inference mode have none."""
    kernel = direct(name)  # first: it is None for the compiler, which cannot trace the question
    return None if kernel is None or torch.is_inference_mode_enabled() else kernel


def _plain(arg: Any) -> Any:
    """The same memory as a plain tensor: what its subclass does, its own dispatch has done."""
    if isinstance(arg, Tensor):
        return arg.as_subclass(Tensor)
    return [_plain(item) for item in arg] if isinstance(arg, (list, tuple)) else arg


def _shown(arg: Any) -> str:
    if isinstance(arg, Tensor):
        return f"{arg.dtype} {tuple(arg.shape)} strides {arg.stride()} on {arg.device}"
    return f"[{', '.join(map(_shown, arg))}]" if isinstance(arg, (list, tuple)) else repr(arg)


def run(kernels: Any, name: str, *args: Any) -> Any:
    """Call a kernel of a compiled module with arguments that the public function has checked.

    Raises:
        RuntimeError: it declined them all the same.
    """
    kernel = getattr(kernels, name)
    for prepared in (lambda arg: arg, _plain):
        result = kernel(*map(prepared, args))
        if result is not None and result is not False:
            return result
    raise RuntimeError(f"the native kernel of {name} does not take {_shown(args)}")
