"""Builds the runner's extension: ``python -m tests.simt.build [--sanitize NAMES] [--program]``.

Or a program that runs every kernel, without Python: under MemorySanitizer there is nothing else.

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


def output(sanitize: str, *, program: bool = False) -> Path:
    """The extension, or the program."""
    folder = ROOT / "build" / "simt" / (sanitize.replace(",", "-") or "plain")
    return folder / ("every_kernel" if program else "_simt.so")


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
    """The kernels, the runner, and what calls every kernel."""
    runner = [HERE / "runner.cpp", HERE / "barriers.cpp", HERE / "every_kernel" / "main.cpp"]
    return sorted([*CSRC.rglob("*.cu"), *runner])


def _ninja_file(target: Path, sanitize: str, *, program: bool) -> str:
    """Paths are relative, so that a copy of tree and build need not be compiled again."""
    import pybind11

    def seen(path: Path) -> str:
        return os.path.relpath(path, target.parent)

    # The program has few launches; with -O1 it would take several times as long to compile.
    mode = ["-O0" if program else "-O1", "-gline-tables-only"]
    if sanitize:
        mode += [f"-fsanitize={sanitize}", "-fno-sanitize=vptr", "-fno-omit-frame-pointer"]
        mode += [
            "-fno-sanitize-recover=undefined",
            f"-fsanitize-ignorelist={seen(HERE)}/ignore.txt",
        ]
        mode += [] if program else ["-shared-libsan"]
    shared = "" if program else "-shared"
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
    for source in program_sources() if program else sources():
        own = "program-" if program else ""
        objects.append(own + "-".join(source.relative_to(ROOT).parts) + ".o")
        lines.append(f"build {objects[-1]}: compile {seen(source)}")
    lines.append(f"build {target.name}: link {' '.join(objects)}")
    return "\n".join([*lines, ""])


def build(sanitize: str = "", *, program: bool = False) -> Path:
    """Compile what has changed; the path of the extension or of the program.

    Raises:
        ValueError: MemorySanitizer is asked to watch the extension.
        RuntimeError: something is missing, or does not compile.
    """
    import ninja

    reason = missing()
    if reason is not None:
        raise RuntimeError(f"the runner cannot be built: {reason}")
    if sanitize == "memory" and not program:
        raise ValueError("MemorySanitizer watches the program only: Python is not instrumented")
    target = output(sanitize, program=program)
    target.parent.mkdir(parents=True, exist_ok=True)
    file = target.with_name("program.ninja" if program else "build.ninja")
    file.write_text(_ninja_file(target, sanitize, program=program))
    command = [str(Path(ninja.BIN_DIR) / "ninja"), "-C", str(target.parent), "-f", file.name]
    if subprocess.run(command, check=False).returncode != 0:
        raise RuntimeError("the runner does not compile, see the compiler's message above")
    return target


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sanitize", default="", help="address,undefined, thread or memory")
    parser.add_argument("--program", action="store_true", help="instead of the extension")
    options = parser.parse_args()
    try:
        print(build(options.sanitize, program=options.program))
    except (RuntimeError, ValueError) as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
