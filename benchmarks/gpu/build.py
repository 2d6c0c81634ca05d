"""What was built, for what, and what runs: the facts without which no figure means anything."""

from __future__ import annotations

import subprocess
from typing import Any

import torch

from benchmarks.environment import describe_environment, package_version
from benchmarks.gpu.part import Context, PartFile
from ksam_kernels import __main__ as ksam_kernels_main
from ksam_kernels.native import extension

_FROM_NVIDIA_SMI = ("driver_version", "clocks.max.sm", "clocks.max.mem", "power.limit")


def output_of(*command: str) -> str | None:
    """What a command prints, stripped; None if there is none or it fails."""
    try:
        result = subprocess.run(command, capture_output=True, text=True, check=False, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return result.stdout.strip() if result.returncode == 0 else None


def _gpu(device: torch.device) -> dict[str, Any]:
    if device.type != "cuda":
        return {}
    properties = torch.cuda.get_device_properties(device)
    smi = output_of(
        "nvidia-smi", f"--query-gpu={','.join(_FROM_NVIDIA_SMI)}", "--format=csv,noheader"
    )
    return {
        "name": properties.name,
        "compute_capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "memory_bytes": properties.total_memory,
        "l2_bytes": properties.L2_cache_size,
        "nvidia_smi": dict(zip(_FROM_NVIDIA_SMI, (smi or "").split(", "), strict=False)),
    }


def _extension() -> dict[str, Any]:
    if extension is None:
        return {"built": False}
    names = ("compiler", "cpu_isa", "cuda_architectures", "sanitized")
    return {"built": True, **{name: getattr(extension, name) for name in names}}


def run(context: Context, file: PartFile) -> None:
    """Collect the facts."""
    nvcc = output_of("nvcc", "--version") or output_of("/usr/local/cuda/bin/nvcc", "--version")
    file.results = {
        "environment": describe_environment(context.device),
        "gpu": _gpu(context.device),
        "cuda_of_torch": torch.version.cuda,
        "nvcc": nvcc and nvcc.splitlines()[-1],
        "triton": package_version("triton"),
        "extension": _extension(),
        "backends": ksam_kernels_main.report(),
    }
    entries = file.results["backends"]["operators"]
    here = [entry for entry in entries if entry["device"] == context.device.type]
    print(f"extension: {file.results['extension']}")
    for entry in here:
        print(f"  {entry['operator']:42} {entry['runs']}")
