"""The machine a benchmark runs on, as it is written beside every measured number."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import torch

import ksam_kernels
from benchmarks.errors import UsageError


def select_device(name: str) -> torch.device:
    """Return the device for `--device auto|cpu|cuda`; auto takes CUDA where there is one."""
    available = torch.cuda.is_available()
    if name == "cuda" and not available:
        raise UsageError(f"--device cuda: PyTorch {torch.__version__} sees no CUDA device")
    return torch.device("cuda" if available and name != "cpu" else "cpu")


def device_name(device: torch.device) -> str:
    """Return the marketing name of the GPU or CPU, and the thread count for the CPU."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{_cpu_name()}, {torch.get_num_threads()} threads"


def synchronize(device: torch.device) -> None:
    """Wait for all work queued on `device`, so that a clock read next is honest."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


#: The largest cache on AMD's GPUs (MI300's), behind L2: HIP says nothing of it.
_INFINITY_CACHE_BYTES = 256 << 20


def last_level_cache_bytes(device: torch.device) -> int:
    """Size of the GPU's L2 or the CPU's L3 cache; 32 MB where the system does not say. For AMD's
    GPUs at least the largest cache that any of them has."""
    if device.type == "cuda":
        l2 = torch.cuda.get_device_properties(device).L2_cache_size
        return l2 if torch.version.hip is None else max(l2, _INFINITY_CACHE_BYTES)
    try:
        text = Path("/sys/devices/system/cpu/cpu0/cache/index3/size").read_text(encoding="ascii")
        return int(text.strip().removesuffix("K")) << 10
    except (OSError, ValueError):
        return 32 << 20


def load_average() -> float | None:
    """How many processes wanted to run in the last minute; None where the system does not say."""
    try:
        return os.getloadavg()[0]
    except (AttributeError, OSError):
        return None


def preemptions() -> int | None:
    """How often so far the system gave this process's CPU to another; None if it does not say."""
    try:
        import resource
    except ImportError:  # Windows
        return None
    return resource.getrusage(resource.RUSAGE_SELF).ru_nivcsw


def package_version(name: str) -> str | None:
    """The installed version of a package; None if there is none."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def commit() -> str | None:
    """What KSAM_COMMIT says, for copies outside a clone or in one at another commit; or the commit
    of the clone that this is, with "-dirty" where files differ; or None."""
    named = os.environ.get("KSAM_COMMIT")
    if named:
        return named
    command = ["git", "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    try:
        found = subprocess.run(
            command, cwd=Path(__file__).parent, capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return found.stdout.strip()


def describe_environment(device: torch.device) -> dict[str, Any]:
    """The machine and the software, as JSON files hold them."""
    return {
        "commit": commit(),
        "backend": ksam_kernels.requested_backend(),
        "device": device_name(device),
        "threads": torch.get_num_threads(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "last_level_cache_bytes": last_level_cache_bytes(device),
        "load_average": load_average(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
    }


def _cpu_name() -> str:
    # platform.processor() is empty or just the architecture on most Linux systems.
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        for line in cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
