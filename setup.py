"""Builds the compiled kernels with ninja; everything static lives in pyproject.toml.

The extension needs nothing of torch to compile or link: it reads tensors through DLPack's C ABI and
finds torch's thread pool when it is loaded. So pip's build isolation needs no torch, and one build
serves every torch of the supported range.

Environment:
    KSAM_NATIVE=0      leaves the extension out: the pure-PyTorch reference backend only.
    KSAM_SANITIZE      "address,undefined": instruments the extension for the sanitizers' CI run.
    CXX, MAX_JOBS      the C++17 compiler, and how many of it run at once.
"""

from __future__ import annotations

import os
import platform
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
CSRC = ROOT / "csrc"

# Compiled once per instruction set into a namespace of that name: csrc/common/isa.h.
ISA_FLAGS = {"baseline": []}
if platform.machine() in ("x86_64", "AMD64"):
    ISA_FLAGS["avx2"] = ["-mavx2", "-mfma", "-mf16c", "-mbmi", "-mbmi2"]
    ISA_FLAGS["avx512"] = ["-march=x86-64-v4", "-mprefer-vector-width=512"]

CXX_FLAGS = [
    "-std=c++17",
    "-g0",
    "-fPIC",
    "-fvisibility=hidden",
    # The contracts say where results are rounded; kernels that want a fused multiply-add call it.
    "-ffp-contract=off",
    # Neither changes a result: errno is not read, floating-point traps are not used.
    "-fno-math-errno",
    "-fno-trapping-math",
    "-Wall",
    "-Wextra",
    # Vectors wider than the baseline's registers are passed between inlined functions only.
    "-Wno-psabi",
]


def compiler() -> list[str]:
    """The command of the C++ compiler; exits with one sentence where there is none."""
    named = os.environ.get("CXX")
    if named:
        return shlex.split(named)
    found = next(filter(shutil.which, ("c++", "g++", "clang++")), None)
    if found is None:
        sys.exit(
            "ksam: building the kernels needs a C++17 compiler (c++, g++, clang++ or $CXX) and "
            "none was found; install one, or set KSAM_NATIVE=0 to install the slower pure-PyTorch "
            "reference backend alone."
        )
    return [found]


def mode_flags() -> list[str]:
    """Optimized, or instrumented."""
    names = os.environ.get("KSAM_SANITIZE")
    if not names:
        return ["-O3"]
    return [
        "-O1",
        "-g1",
        f"-fsanitize={names}",
        "-fno-sanitize-recover=all",
        "-fno-omit-frame-pointer",
    ]


class NinjaBuildExt(build_ext):
    """Compiles with ninja, which rebuilds only what changed, headers included.

    Objects stay in ``build/native`` between builds: pip gives setuptools a fresh temporary folder
    each time.
    """

    def build_extension(self, ext: Extension) -> None:
        import ninja
        import pybind11

        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        target.parent.mkdir(parents=True, exist_ok=True)
        folder = ROOT / "build" / "native" / str(sysconfig.get_config_var("SOABI"))
        folder.mkdir(parents=True, exist_ok=True)
        # pip's build environments have a new path each time, which would make every command new.
        headers = folder / "pybind11"
        headers.unlink(missing_ok=True)
        headers.symlink_to(pybind11.get_include())
        library = folder / target.name
        (folder / "build.ninja").write_text(_ninja_file(compiler(), headers, library))
        command = [str(Path(ninja.BIN_DIR) / "ninja"), "-C", str(folder)]
        if os.environ.get("MAX_JOBS"):
            command += ["-j", os.environ["MAX_JOBS"]]
        if subprocess.run(command, check=False).returncode != 0:
            sys.exit(
                "ksam: compiling the kernels failed, see the compiler's message above; "
                "KSAM_NATIVE=0 installs the slower pure-PyTorch reference backend alone."
            )
        shutil.copy2(library, target)
        print(f"ksam: built {target.name}, CPU only ({', '.join(ISA_FLAGS)}); no CUDA kernels yet")


def _escape(path: object) -> str:
    """A path for ninja and, inside a command, for the shell."""
    return shlex.quote(str(path)).replace("$", "$$")


def _ninja_path(path: object) -> str:
    return str(path).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")


def _ninja_file(cxx: list[str], pybind11: Path, library: Path) -> str:
    """build.ninja: one object per source, three per ``*_cpu.cpp``, one library."""
    # System headers are left out of the dependencies that -MMD writes.
    system = (sysconfig.get_paths()["include"], pybind11)
    flags = [*CXX_FLAGS, *mode_flags(), f"-I{CSRC}", *(f"-isystem{path}" for path in system)]
    lines = [
        f"cxx = {' '.join(map(_escape, cxx))}",
        f"cxx_flags = {' '.join(map(_escape, flags))}",
        f"link_flags = {' '.join(['-shared', *mode_flags()])}",
        "rule compile",
        "  command = $cxx $cxx_flags $isa_flags -MMD -MF $out.d -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "  description = compile $out",
        "rule link",
        "  command = $cxx $link_flags $in -ldl -o $out",
        "  description = link $out",
    ]
    objects = []
    for source in sorted(CSRC.rglob("*.cpp")):
        name = "-".join(source.relative_to(CSRC).with_suffix("").parts)
        variants = ISA_FLAGS if source.name.endswith("_cpu.cpp") else {"": []}
        for isa, isa_flags in variants.items():
            target = f"{name}-{isa}.o" if isa else f"{name}.o"
            objects.append(target)
            lines.append(f"build {target}: compile {_ninja_path(source)}")
            if isa:
                lines.append(f"  isa_flags = -DKSAM_ISA={isa} {' '.join(isa_flags)}")
    lines.append(f"build {_ninja_path(library)}: link {' '.join(objects)}")
    return "\n".join([*lines, ""])


def extensions() -> list[Extension]:
    """The extension, or none if KSAM_NATIVE=0."""
    if os.environ.get("KSAM_NATIVE", "1") == "0":
        if "editable_wheel" in sys.argv:  # it would be imported from the source tree
            for built in (ROOT / "ksam_kernels").glob("_C.*.so"):
                built.unlink()
        return []
    sources, headers = (
        [str(path.relative_to(ROOT)) for path in sorted(CSRC.rglob(pattern))]
        for pattern in ("*.cpp", "*.h")
    )
    return [Extension("ksam_kernels._C", sources=sources, depends=headers)]


setup(ext_modules=extensions(), cmdclass={"build_ext": NinjaBuildExt})
