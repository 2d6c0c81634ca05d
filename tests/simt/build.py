"""Builds the runner's extension: ``python -m tests.simt.build [--sanitize NAMES]``.

Needs clang++ 17 or later (g++ puts no static variable of a template into a section) and the headers
of a CUDA toolkit; no nvcc, no GPU.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
HERE = Path(__file__).resolve().parent
CSRC = ROOT / "csrc"

FLAGS = [
    "-std=c++17",
    "-fPIC",
    "-fvisibility=hidden",
    "-fno-strict-aliasing",
    "-ffp-contract=off",
    "-DKSAM_SIMT",
    "-DKSAM_CUDA",
    "-Wall",
    "-Wextra",
    "-Wno-unused-parameter",
    "-Wno-unknown-pragmas",
]


def folder(sanitize: str) -> Path:
    """Where the extension of a build lies."""
    return ROOT / "build" / "simt" / (sanitize.replace(",", "-") or "plain")


def output(sanitize: str) -> Path:
    """The extension of a build, or the program for "memory"."""
    return folder(sanitize) / ("memory_sanitizer" if sanitize == "memory" else "_simt.so")


def compiler() -> str | None:
    """A clang++ that is new enough; $KSAM_SIMT_CXX names another."""
    named = os.environ.get("KSAM_SIMT_CXX")
    names = [named] if named else [f"clang++-{version}" for version in range(22, 16, -1)]
    return next((found for name in names if (found := shutil.which(name))), None)


def cuda_headers() -> Path | None:
    """The folder that holds cuda_fp16.h, beside nvcc or in $CUDA_HOME."""
    nvcc = shutil.which("nvcc")
    homes = [os.environ.get("CUDA_HOME"), nvcc and Path(nvcc).resolve().parents[1]]
    candidates = [Path(home) / "include" for home in (*homes, "/usr/local/cuda") if home]
    return next((path for path in candidates if (path / "cuda_fp16.h").is_file()), None)


def missing() -> str | None:
    """What the build lacks; None if it can be built."""
    if compiler() is None:
        return "no clang++-17 or later"
    if cuda_headers() is None:
        return "no headers of a CUDA toolkit"
    return None


def sources() -> list[Path]:
    """Kernels, their Python functions and the runner; no CPU kernels."""
    host = [
        path
        for path in CSRC.rglob("*.cpp")
        if not path.name.endswith("_cpu.cpp") and path != CSRC / "module.cpp"
    ]
    return sorted([*CSRC.rglob("*.cu"), *host, *HERE.glob("*.cpp")])


def program_sources() -> list[Path]:
    """The kernels, the runner, and the program that MemorySanitizer watches."""
    runner = [HERE / "runner.cpp", HERE / "barriers.cpp", HERE / "memory_sanitizer" / "main.cpp"]
    return sorted([*CSRC.rglob("*.cu"), *runner])


def _ninja_file(target: Path, sanitize: str) -> str:
    """Paths are relative, so that a copy of tree and build need not be compiled again."""
    import pybind11

    def seen(path: Path) -> str:
        return os.path.relpath(path, target.parent)

    mode = ["-O1", "-gline-tables-only"]
    if sanitize:
        mode += [f"-fsanitize={sanitize}", "-fno-sanitize=vptr", "-fno-omit-frame-pointer"]
        mode += [
            "-fno-sanitize-recover=undefined",
            f"-fsanitize-ignorelist={seen(HERE)}/ignore.txt",
        ]
        mode += [] if sanitize == "memory" else ["-shared-libsan"]
    shared = "" if sanitize == "memory" else "-shared"
    system = (cuda_headers(), sysconfig.get_paths()["include"], pybind11.get_include())
    flags = [
        *FLAGS,
        *mode,
        f"-I{seen(CSRC)}",
        f"-I{seen(HERE)}",
        *(f"-isystem{path}" for path in system),
    ]
    lines = [
        f"cxx = {compiler()}",
        f"flags = {' '.join(flags)}",
        "rule compile",
        "  command = $cxx $flags -MMD -MF $out.d -x c++ -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "rule link",
        f"  command = $cxx {shared} {' '.join(mode)} $in -ldl -o $out",
    ]
    objects = []
    for source in program_sources() if sanitize == "memory" else sources():
        objects.append("-".join(source.relative_to(ROOT).parts) + ".o")
        lines.append(f"build {objects[-1]}: compile {seen(source)}")
    lines.append(f"build {target.name}: link {' '.join(objects)}")
    return "\n".join([*lines, ""])


def build(sanitize: str = "") -> Path:
    """Compile what has changed; the path of the extension, or of the program for "memory".

    Raises:
        RuntimeError: something is missing, or does not compile.
    """
    import ninja

    reason = missing()
    if reason is not None:
        raise RuntimeError(f"the runner cannot be built: {reason}")
    target = output(sanitize)
    target.parent.mkdir(parents=True, exist_ok=True)
    (target.parent / "build.ninja").write_text(_ninja_file(target, sanitize))
    command = [str(Path(ninja.BIN_DIR) / "ninja"), "-C", str(target.parent)]
    if subprocess.run(command, check=False).returncode != 0:
        raise RuntimeError("the runner does not compile, see the compiler's message above")
    return target


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sanitize", default="", help="address,undefined, thread or memory")
    try:
        print(build(parser.parse_args().sanitize))
    except RuntimeError as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
