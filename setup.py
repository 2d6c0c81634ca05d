"""Builds the compiled kernels with ninja; everything static lives in pyproject.toml.

The extension needs nothing of torch to compile or link: it reads tensors through DLPack's C ABI and
finds torch's thread pool when it is loaded. So pip's build isolation needs no torch, and one build
serves every torch of the supported range.

CUDA kernels are built where nvcc 12 or later is found, which needs no GPU. CUDA's runtime is linked
in, so that the extension also loads where there is none.

docs/install.md has the environment variables. One more is for CI: KSAM_SANITIZE, such as
"address,undefined", instruments the extension for the sanitizers.
"""

from __future__ import annotations

import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py
from setuptools.command.editable_wheel import editable_wheel

ROOT = Path(__file__).resolve().parent
CSRC = ROOT / "csrc"

# Compiled once per instruction set into a namespace of that name: csrc/common/isa.h.
ISA_FLAGS = {"baseline": []}
if platform.machine() in ("x86_64", "AMD64"):
    # No more than csrc/common/isa.cpp looks for in the processor, and no -march=x86-64-v3 or -v4,
    # which GCC knows only from version 11 on.
    ISA_FLAGS["avx2"] = ["-mavx2", "-mfma", "-mf16c"]
    avx512 = [f"-mavx512{part}" for part in ("f", "bw", "dq", "vl", "cd")]
    ISA_FLAGS["avx512"] = [*ISA_FLAGS["avx2"], *avx512, "-mprefer-vector-width=512"]

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

NVCC_FLAGS = [
    "-std=c++17",
    "-O3",
    "-Xcompiler=-fPIC,-fvisibility=hidden",
    "-Wno-deprecated-gpu-targets",
]
# Like -ffp-contract=off: the update must round where torch.optim rounds.
ROOM_NVCC_FLAGS = {"perturb": ["-fmad=false"]}

DEFAULT_ARCHITECTURES = ("80", "90", "100", "120")
OLDEST_NVCC = (12, 0)
OLDEST_ARCHITECTURE = 70  # the first that takes structs as __grid_constant__


def switch(name: str) -> str | None:
    """A variable's "0" or "1", None where it is not set; exits where it is anything else."""
    value = os.environ.get(name) or None
    if value not in ("0", "1", None):
        sys.exit(f"ksam: {name} must be 0 or 1, got {value!r}.")
    return value


def compiler() -> list[str]:
    """The command of the C++ compiler; exits with one sentence where there is none."""
    named = os.environ.get("CXX")
    if named:
        return shlex.split(named)
    found = next(filter(shutil.which, ("c++", "g++", "clang++")), None)
    if found is None:
        sys.exit(
            "ksam: building the kernels needs a C++17 compiler (c++, g++, clang++ or $CXX), but "
            "none was found; install one, or set KSAM_NATIVE=0 to install without these kernels: "
            "GPUs then use Triton's, and the CPU plain PyTorch, which is slower."
        )
    return [found]


def host_compiler(cxx: list[str]) -> str:
    """The one program that nvcc takes for host code: CXX without ccache or the like before it."""
    found = next((word for word in cxx if not word.endswith("ccache")), None)
    if found is None:
        sys.exit(f"ksam: CXX={shlex.join(cxx)} names no compiler; set CXX='ccache g++', say.")
    return found


def mode_flags() -> list[str]:
    """The flags of an optimized build, or of an instrumented one."""
    names = os.environ.get("KSAM_SANITIZE")
    if not names:
        return ["-O3"]
    return [
        "-O0",  # compiles in half the time, and optimizes no undefined behaviour away
        "-g1",
        "-DKSAM_SANITIZED",
        f"-fsanitize={names}",
        "-fno-sanitize-recover=all",
        "-fno-omit-frame-pointer",
    ]


class Cuda(NamedTuple):
    """What CUDA kernels are built with."""

    nvcc: Path
    libraries: Path  # the folder of libcudart_static.a
    architectures: list[str]  # "80", "90a"; "90+PTX" is sm_90 and its PTX


def find_nvcc() -> Path | None:
    """nvcc in $CUDA_HOME, and nowhere else if that is set; on the PATH; in /usr/local/cuda."""
    home = os.environ.get("CUDA_HOME")
    on_path = None if home else shutil.which("nvcc")
    nvcc = Path(on_path) if on_path else Path(home or "/usr/local/cuda") / "bin" / "nvcc"
    return nvcc if nvcc.is_file() else None


def output_of(*command: str) -> str:
    """What a command prints, or nothing if it fails."""
    try:
        result = subprocess.run(
            command, check=False, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
    except OSError:  # there is no such program
        return ""
    return result.stdout if result.returncode == 0 else ""


def find_cudart(nvcc: Path) -> Path | None:
    """The folder of libcudart_static.a, from nvcc, which may be a script far from its toolkit."""
    host = f"-ccbin={host_compiler(compiler())}"
    plan = output_of(str(nvcc), "--dryrun", host, "-c", str(CSRC / "common" / "gpu.cu"))
    folders = [Path(path) for path in re.findall(r'"-L([^"]+)"', plan)]
    return next((path for path in folders if (path / "libcudart_static.a").is_file()), None)


def parse_architectures(text: str) -> list[str]:
    """TORCH_CUDA_ARCH_LIST, "8.0;9.0+PTX": ["80", "90+PTX"]. Exits where it is anything else."""
    names = re.split(r"[;,\s]+", text.strip(" ;,"))
    for name in names:
        if re.fullmatch(r"\d+\.\d[af]?(\+PTX)?", name) is None:
            sys.exit(
                f"ksam: TORCH_CUDA_ARCH_LIST must be numbers such as 8.0;9.0+PTX, got {name!r} "
                f"in {text!r}."
            )
    return [name.replace(".", "") for name in names]


def number_of(architecture: str) -> int:
    """An architecture's number: 90 for "90a+PTX"."""
    return int(architecture.removesuffix("+PTX").rstrip("af"))


def choose_architectures(asked: str | None, known: list[str]) -> list[str]:
    """Those asked for, except any that are too old (container images list them for other software);
    or the default. Exits where none is left, and where nvcc does not know one."""
    if asked:
        chosen = [
            name for name in parse_architectures(asked) if number_of(name) >= OLDEST_ARCHITECTURE
        ]
        if not chosen:
            sys.exit(
                f"ksam: TORCH_CUDA_ARCH_LIST={asked} is too old: the kernels need "
                f"sm_{OLDEST_ARCHITECTURE} or later."
            )
        for number in map(number_of, chosen):
            if str(number) not in known:
                sys.exit(
                    f"ksam: TORCH_CUDA_ARCH_LIST={asked} asks for sm_{number}, which this nvcc "
                    f"does not know; it knows {', '.join(known)}."
                )
        return chosen
    default = [name for name in DEFAULT_ARCHITECTURES if name in known]
    if not default:
        sys.exit(
            f"ksam: this nvcc supports none of the default architectures, "
            f"{', '.join(DEFAULT_ARCHITECTURES)}, only {', '.join(known) or 'nothing'}; set "
            "TORCH_CUDA_ARCH_LIST to those that it should compile for."
        )
    return [*default[:-1], f"{default[-1]}+PTX"]


def look_for_cuda() -> Cuda | str:
    """The toolkit, or why there is none to build with."""
    nvcc = find_nvcc()
    if nvcc is None:
        home = os.environ.get("CUDA_HOME")
        return f"no nvcc in CUDA_HOME={home}" if home else "no nvcc found"
    release = re.search(r"release (\d+)\.(\d+)", output_of(str(nvcc), "--version"))
    if release is None:
        return f"{nvcc} does not run"
    if tuple(map(int, release.groups())) < OLDEST_NVCC:
        return f"{nvcc} is older than CUDA {'.'.join(map(str, OLDEST_NVCC))}"
    libraries = find_cudart(nvcc)
    if libraries is None:
        return f"the toolkit of {nvcc} has no libcudart_static.a"
    known = re.findall(r"sm_(\w+)", output_of(str(nvcc), "--list-gpu-code"))
    return Cuda(
        nvcc, libraries, choose_architectures(os.environ.get("TORCH_CUDA_ARCH_LIST"), known)
    )


def choose_cuda() -> Cuda | str:
    """The toolkit to build with, or why there are no CUDA kernels in this build."""
    wanted = switch("KSAM_CUDA")
    if wanted == "0":
        return "KSAM_CUDA=0"
    if wanted is None and os.environ.get("KSAM_SANITIZE"):
        return "KSAM_SANITIZE is for the CPU kernels"
    cuda = look_for_cuda()
    if wanted == "1" and isinstance(cuda, str):
        sys.exit(
            f"ksam: KSAM_CUDA=1 requires CUDA kernels, but they cannot be built: {cuda}; install "
            "the CUDA toolkit 12 or later, set CUDA_HOME, or leave KSAM_CUDA unset."
        )
    return cuda


def summary(cuda: Cuda | str) -> str:
    """What was built and what was not, and why."""
    cpu = f"CPU kernels ({', '.join(ISA_FLAGS)})"
    if isinstance(cuda, str):
        return f"{cpu} only, no CUDA kernels: {cuda}"
    names = [name.replace("+PTX", " and its PTX") for name in cuda.architectures]
    return f"{cpu} and CUDA kernels ({', '.join(f'sm_{name}' for name in names)})"


def find_ninja() -> str:
    """ninja, from its wheel or on the path; exits with one sentence where there is none."""
    try:
        return str(Path(import_module("ninja").BIN_DIR) / "ninja")
    except ModuleNotFoundError:
        found = shutil.which("ninja") or shutil.which("ninja-build")
        return found or sys.exit("ksam: building the kernels needs ninja (pip install ninja).")


def find_pybind11() -> ModuleType:
    """pybind11; exits with one sentence where there is none."""
    try:
        return import_module("pybind11")
    except ModuleNotFoundError:
        sys.exit("ksam: building the kernels needs pybind11 (pip install pybind11).")


class NinjaBuildExt(build_ext):
    """Compiles with ninja, which rebuilds only what changed, headers included.

    Objects stay in ``build/native`` between builds: pip gives setuptools a fresh temporary folder
    each time.
    """

    def build_extension(self, ext: Extension) -> None:
        pybind11, cxx, cuda = find_pybind11(), compiler(), choose_cuda()
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        target.parent.mkdir(parents=True, exist_ok=True)
        # Objects made with different versions of pybind11 must not be linked.
        soabi = sysconfig.get_config_var("SOABI")
        folder = ROOT / "build" / "native" / f"{soabi}-pybind11-{pybind11.__version__}"
        folder.mkdir(parents=True, exist_ok=True)
        # pip's build environments have a new path each time, which would make every command new.
        headers = folder / "pybind11"
        headers.unlink(missing_ok=True)
        headers.symlink_to(pybind11.get_include())
        library = folder / target.name
        (folder / "build.ninja").write_text(_ninja_file(cxx, cuda, headers, library))
        command = [find_ninja(), "-C", str(folder)]
        environment = dict(os.environ)
        if os.environ.get("MAX_JOBS"):
            command += ["-j", os.environ["MAX_JOBS"]]
            environment.setdefault("NVCC_THREADS", "1")
        if subprocess.run(command, check=False, env=environment).returncode != 0:
            sys.exit(
                "ksam: compiling the kernels failed, see the compiler's message above; set "
                "KSAM_CUDA=0 to build without CUDA kernels, or KSAM_NATIVE=0 to install without "
                "any: GPUs then use Triton's, and the CPU plain PyTorch, which is slower."
            )
        shutil.copy2(library, target)
        print(f"ksam: built {target.name}: {summary(cuda)}")


def _escape(path: object) -> str:
    """A path for ninja and, inside a command, for the shell."""
    return shlex.quote(str(path)).replace("$", "$$")


def _ninja_path(path: object) -> str:
    return str(path).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")


def _nvcc_lines(cxx: list[str], cuda: Cuda, defines: list[str]) -> list[str]:
    """The rule that compiles a ``*.cu`` for all architectures."""
    flags = [*NVCC_FLAGS, *defines, f"-I{CSRC}", f"-ccbin={host_compiler(cxx)}"]
    for name in cuda.architectures:
        number, _, ptx = name.partition("+")
        codes = [f"sm_{number}", *([f"compute_{number}"] if ptx else [])]
        flags += [f"-gencode=arch=compute_{number},code={code}" for code in codes]
    return [
        f"nvcc = {_escape(cuda.nvcc)}",
        f"nvcc_flags = {' '.join(map(_escape, flags))}",
        "rule compile_cuda",
        # From the environment, not written out: another number is no reason to compile again.
        "  command = $nvcc --threads=$${NVCC_THREADS:-0} $nvcc_flags $room_flags "
        "-MD -MF $out.d -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "  description = compile $out",
    ]


def _ninja_file(cxx: list[str], cuda: Cuda | str, pybind11: Path, library: Path) -> str:
    """build.ninja: one object per source, three per ``*_cpu.cpp``, one library."""
    defines, libraries = [], ["-ldl"]
    if isinstance(cuda, Cuda):
        architectures = " ".join(cuda.architectures)
        defines = ["-DKSAM_CUDA", f'-DKSAM_CUDA_ARCHITECTURES="{architectures}"']
        # The symbols of CUDA's runtime stay inside: torch has a runtime of its own.
        cudart = ["-lcudart_static", "-Wl,--exclude-libs,libcudart_static.a"]
        libraries = [f"-L{cuda.libraries}", *cudart, "-lrt", "-lpthread", "-ldl"]
    # System headers are left out of the dependencies that -MMD writes.
    system = (sysconfig.get_paths()["include"], pybind11)
    flags = [*CXX_FLAGS, *mode_flags(), *defines, f"-I{CSRC}"]
    flags += [f"-isystem{path}" for path in system]
    flags.append(f"-ffile-prefix-map={ROOT}=.")  # the same library, wherever it is built
    lines = [
        f"cxx = {' '.join(map(_escape, cxx))}",
        f"cxx_flags = {' '.join(map(_escape, flags))}",
        f"link_flags = {' '.join(['-shared', *mode_flags()])}",
        f"libraries = {' '.join(map(_escape, libraries))}",
        "rule compile",
        "  command = $cxx $cxx_flags $isa_flags -MMD -MF $out.d -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "  description = compile $out",
        "rule link",
        "  command = $cxx $link_flags $in $libraries -o $out",
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
    if isinstance(cuda, Cuda):
        lines += _nvcc_lines(cxx, cuda, defines)
        for source in sorted(CSRC.rglob("*.cu")):
            objects.append("-".join(source.relative_to(CSRC).parts) + ".o")
            lines.append(f"build {objects[-1]}: compile_cuda {_ninja_path(source)}")
            lines.append(f"  room_flags = {' '.join(ROOM_NVCC_FLAGS.get(source.parent.name, []))}")
    lines.append(f"build {_ninja_path(library)}: link {' '.join(objects)}")
    return "\n".join([*lines, ""])


def extensions() -> list[Extension]:
    """The extension, or none if KSAM_NATIVE=0."""
    if switch("KSAM_NATIVE") == "0":
        if switch("KSAM_CUDA") == "1":
            sys.exit("ksam: KSAM_CUDA=1 requires kernels that KSAM_NATIVE=0 leaves out; unset one.")
        if "editable_wheel" in sys.argv:  # one in the source tree would be imported
            suffix = sysconfig.get_config_var("EXT_SUFFIX")  # other Pythons keep theirs
            (ROOT / "ksam_kernels" / f"_C{suffix}").unlink(missing_ok=True)
        return []
    if not (CSRC / "module.cpp").is_file():
        sys.exit(
            f"ksam: the sources of the kernels are not in {CSRC}; get them, or set KSAM_NATIVE=0 "
            "to install without these kernels."
        )
    return [Extension("ksam_kernels._C", sources=["csrc/module.cpp"])]  # and what ninja is given


class BuildPy(build_py):
    """Builds into empty folders: build/ stays for the objects, and would keep modules now gone."""

    def run(self) -> None:
        for package in () if self.editable_mode else ("ksam", "ksam_kernels"):
            shutil.rmtree(Path(self.build_lib, package), ignore_errors=True)
        super().run()


class EditableWheel(editable_wheel):
    """Puts the folder of ksam on the path. setuptools finds packages in several folders by an
    import hook, which comes after the path: beside a clone called ksam, Python would take the
    clone, a folder without code, for the package."""

    def _install_namespaces(self, installation_dir: str, pth_prefix: str) -> None:
        super()._install_namespaces(installation_dir, pth_prefix)
        paths = Path(installation_dir, f"__editable__.{pth_prefix}_path.pth")
        paths.write_text(f"{ROOT / 'python_api'}\n")


if __name__ == "__main__":
    commands = {"build_py": BuildPy, "build_ext": NinjaBuildExt, "editable_wheel": EditableWheel}
    setup(ext_modules=extensions(), cmdclass=commands)
