"""What the build decides: compilers, CUDA or not, for which GPUs. Nothing is compiled here."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

from tests.helpers import ROOT, setup_py

Distribution = pytest.importorskip("setuptools").Distribution

KNOWN = ("75", "80", "86", "90", "100", "120")
NVCC = """#!/bin/sh
case "$1" in
  --version) echo "Cuda compilation tools, release {release}, V{release}.88" ;;
  --list-gpu-code) {known} ;;
  --dryrun) echo '#$ LIBRARIES=  "-L{home}/stubs" "-L{home}/some where"' >&2 ;;
  *) exit 1 ;;
esac
"""


@pytest.fixture
def build(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """setup.py on a machine where nothing is found or asked for."""
    module = setup_py()
    for name in ("CXX", "CUDA_HOME", "TORCH_CUDA_ARCH_LIST"):
        monkeypatch.delenv(name, raising=False)
    for name in ("NATIVE", "CUDA", "SANITIZE"):
        monkeypatch.delenv(f"KSAM_{name}", raising=False)
    monkeypatch.setattr(module, "find_nvcc", lambda: None)
    monkeypatch.setattr(module.shutil, "which", lambda name: None)
    return module


def toolkit(
    build: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    home: Path,
    release: str = "13.0",
    known: tuple[str, ...] = KNOWN,
) -> Path:
    """A CUDA toolkit whose nvcc answers questions and compiles nothing."""
    nvcc = home / "nvcc"
    listing = "; ".join(f"echo sm_{name}" for name in known)
    nvcc.write_text(NVCC.format(release=release, known=listing, home=home))
    nvcc.chmod(0o755)
    (home / "some where").mkdir()
    (home / "some where" / "libcudart_static.a").touch()
    monkeypatch.setattr(build, "find_nvcc", lambda: nvcc)
    monkeypatch.setenv("CXX", "c++")
    return nvcc


@pytest.mark.parametrize(
    ("text", "architectures"),
    [
        ("8.0", ["80"]),
        ("8.0;9.0+PTX", ["80", "90+PTX"]),
        (" 8.0 9.0a, 12.0+PTX; ", ["80", "90a", "120+PTX"]),
        ("10.0f", ["100f"]),
    ],
)
def test_architectures_are_read_as_torch_writes_them(
    build: ModuleType, text: str, architectures: list[str]
) -> None:
    assert build.parse_architectures(text) == architectures


@pytest.mark.parametrize("text", ["native", "8.0;Hopper", "sm_90", "90", "8.0+ptx"])
def test_other_names_of_architectures_are_refused_by_name(build: ModuleType, text: str) -> None:
    name = text.split(";")[-1]
    with pytest.raises(SystemExit, match=r"^ksam: TORCH_CUDA_ARCH_LIST must be") as error:
        build.parse_architectures(text)
    assert repr(name) in str(error.value)


def test_the_default_is_what_the_toolkit_knows_and_ptx_of_the_last(build: ModuleType) -> None:
    assert build.choose_architectures(None, list(KNOWN)) == ["80", "90", "100", "120+PTX"]
    assert build.choose_architectures("", ["75", "80", "86", "90"]) == ["80", "90+PTX"]


def test_an_architecture_that_the_toolkit_does_not_know_is_refused(build: ModuleType) -> None:
    assert build.choose_architectures("8.6;9.0a+PTX", list(KNOWN)) == ["86", "90a+PTX"]
    with pytest.raises(SystemExit, match=r"asks for sm_121, which this nvcc .* knows 75, 80"):
        build.choose_architectures("8.0;12.1+PTX", list(KNOWN))


def test_an_architecture_that_the_kernels_cannot_do_with_is_refused(build: ModuleType) -> None:
    assert build.choose_architectures("5.2 7.0 8.6+PTX", ["70", "86"]) == ["70", "86+PTX"]
    with pytest.raises(SystemExit, match=r"LIST=6\.1 is too old: the kernels need sm_70 or later"):
        build.choose_architectures("6.1", ["61", "70", "86"])


def test_without_nvcc_the_build_is_for_the_cpu(build: ModuleType) -> None:
    assert build.choose_cuda() == "no nvcc found"
    assert build.summary(build.choose_cuda()).endswith("only, no CUDA kernels: no nvcc found")


def test_with_nvcc_the_build_has_cuda_kernels(
    build: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    nvcc = toolkit(build, monkeypatch, tmp_path)
    cuda = build.choose_cuda()
    assert cuda == (nvcc, tmp_path / "some where", ["80", "90", "100", "120+PTX"])
    assert build.summary(cuda).endswith(
        "and CUDA kernels (sm_80, sm_90, sm_100, sm_120 and its PTX)"
    )
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "9.0")
    assert build.choose_cuda().architectures == ["90"]


def test_ksam_cuda_0_leaves_cuda_out(
    build: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    toolkit(build, monkeypatch, tmp_path)
    monkeypatch.setenv("KSAM_CUDA", "0")
    assert build.choose_cuda() == "KSAM_CUDA=0"


def test_the_sanitizers_leave_cuda_out(
    build: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    toolkit(build, monkeypatch, tmp_path)
    monkeypatch.setenv("KSAM_SANITIZE", "address")
    assert "KSAM_SANITIZE" in build.choose_cuda()
    monkeypatch.setenv("KSAM_CUDA", "1")
    assert isinstance(build.choose_cuda(), build.Cuda)


def test_ksam_cuda_1_without_nvcc_exits_with_one_sentence(
    build: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KSAM_CUDA", "1")
    with pytest.raises(SystemExit) as error:
        build.choose_cuda()
    message = str(error.value)
    assert message.startswith("ksam: KSAM_CUDA=1 requires CUDA kernels, but")
    assert "no nvcc found" in message
    assert message.count(". ") == 0
    monkeypatch.setenv("KSAM_NATIVE", "0")
    with pytest.raises(SystemExit, match=r"KSAM_CUDA=1 .* KSAM_NATIVE=0 leaves out"):
        build.extensions()


def test_switches_take_nothing_else(build: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, read in (("KSAM_CUDA", build.choose_cuda), ("KSAM_NATIVE", build.extensions)):
        monkeypatch.setenv(name, "yes")
        with pytest.raises(SystemExit, match=f"{name} must be 0 or 1, got 'yes'"):
            read()
        monkeypatch.setenv(name, "")
        read()


def test_a_folder_without_sources_exits_with_one_sentence(
    build: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(build, "CSRC", tmp_path)
    with pytest.raises(SystemExit, match=r"the sources of the kernels are not in .*KSAM_NATIVE=0"):
        build.extensions()


def test_without_pybind11_the_build_exits_with_one_sentence(
    build: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "pybind11", None)
    with pytest.raises(SystemExit, match=r"needs pybind11 \(pip install pybind11\)"):
        build.find_pybind11()


def test_ninja_is_that_of_its_package_or_a_program(
    build: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    packages = {"ninja": SimpleNamespace(BIN_DIR="/bin of")}

    def imported(name: str) -> SimpleNamespace:
        if name in packages:
            return packages[name]
        raise ModuleNotFoundError(name)

    monkeypatch.setattr(build, "import_module", imported)
    assert build.find_ninja() == "/bin of/ninja"
    packages.clear()
    with pytest.raises(SystemExit, match=r"needs ninja \(pip install ninja\)"):
        build.find_ninja()
    monkeypatch.setattr(build.shutil, "which", {"ninja-build": "/usr/bin/ninja-build"}.get)
    assert build.find_ninja() == "/usr/bin/ninja-build"


def test_a_toolkit_that_will_not_do_is_named_with_the_reason(
    build: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    nvcc = toolkit(build, monkeypatch, tmp_path, release="11.8")
    assert build.choose_cuda() == f"{nvcc} is older than CUDA 12.0"
    nvcc.write_text(NVCC.format(release="12.4", known=":", home=tmp_path / "elsewhere"))
    assert build.choose_cuda() == f"the toolkit of {nvcc} has no libcudart_static.a"
    for text, mode in (("#!/bin/sh\nexit 1\n", 0o755), ("no program", 0o755), ("#!/bin/sh", 0o644)):
        nvcc.write_text(text)
        nvcc.chmod(mode)
        assert build.choose_cuda() == f"{nvcc} does not run"


def test_cuda_home_is_the_only_place_where_it_is_set(
    build: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    find_nvcc = setup_py().find_nvcc
    monkeypatch.setattr(build.shutil, "which", lambda name: sys.executable)
    assert find_nvcc() == Path(sys.executable)
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    assert find_nvcc() is None
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "nvcc").touch()
    assert find_nvcc() == tmp_path / "bin" / "nvcc"


def test_no_compiler_exits_with_one_sentence(build: ModuleType) -> None:
    with pytest.raises(SystemExit, match=r"^ksam: .* needs a C\+\+17 compiler .* KSAM_NATIVE=0"):
        build.compiler()


def test_nvcc_gets_the_compiler_without_its_cache(build: ModuleType) -> None:
    assert build.host_compiler(["ccache", "g++-12"]) == "g++-12"
    with pytest.raises(SystemExit, match="CXX=ccache names no compiler"):
        build.host_compiler(["ccache"])


def ninja_file(build: ModuleType, cxx: list[str]) -> dict[str, list[str]]:
    """Variables and builds of build.ninja, split as a shell would."""
    text = build._ninja_file(cxx, build.choose_cuda(), Path("pybind"), Path("_C.so"))
    pairs = [line.split(" = " if " = " in line else ": ", 1) for line in text.splitlines()]
    return {pair[0].strip(): shlex.split(pair[-1]) for pair in pairs}


def test_every_architecture_is_compiled_and_told_to_the_module(
    build: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    toolkit(build, monkeypatch, tmp_path)
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "8.0;9.0a+PTX")
    lines = ninja_file(build, ["ccache", "g++-12"])
    assert [flag for flag in lines["nvcc_flags"] if "gencode" in flag] == [
        "-gencode=arch=compute_80,code=sm_80",
        "-gencode=arch=compute_90a,code=sm_90a",
        "-gencode=arch=compute_90a,code=compute_90a",
    ]
    assert "-ccbin=g++-12" in lines["nvcc_flags"]
    for name in ("cxx_flags", "nvcc_flags"):
        assert "-DKSAM_CUDA" in lines[name]
        assert '-DKSAM_CUDA_ARCHITECTURES="80 90a+PTX"' in lines[name]
    assert f"-L{tmp_path}/some where" in lines["libraries"]
    assert "common-gpu.cu.o" in lines["build _C.so"]


@pytest.mark.parametrize(("threads", "flag"), [(None, "--threads=0"), ("2", "--threads=2")])
def test_architectures_are_compiled_at_once(
    build: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    threads: str | None,
    flag: str,
) -> None:
    monkeypatch.delenv("NVCC_THREADS", raising=False)
    if threads is not None:
        monkeypatch.setenv("NVCC_THREADS", threads)
    toolkit(build, monkeypatch, tmp_path)
    text = build._ninja_file(["c++"], build.choose_cuda(), Path("pybind"), Path("_C.so"))
    command = text.split("rule compile_cuda\n  command = ")[1].splitlines()[0]
    told = command.removeprefix("$nvcc ").split(" $nvcc_flags")[0].replace("$$", "$")
    assert build.output_of("sh", "-c", f"echo {told}") == f"{flag}\n"


def test_products_and_sums_of_the_updates_are_rounded_apart(
    build: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    toolkit(build, monkeypatch, tmp_path)
    text = build._ninja_file(["c++"], build.choose_cuda(), Path("pybind"), Path("_C.so"))
    for source in (ROOT / "csrc").rglob("*.cu"):
        flags = text.split(f"compile_cuda {source}\n")[1].splitlines()[0]
        assert ("-fmad=false" in flags) == (source.parent.name == "perturb")


def test_a_build_without_cuda_knows_nothing_of_it(build: ModuleType) -> None:
    text = build._ninja_file(["c++"], build.choose_cuda(), Path("pybind"), Path("_C.so"))
    assert "CUDA" not in text
    assert ".cu" not in text


@pytest.mark.parametrize(
    ("jobs", "option", "threads"),
    [("3", ["-j", "3"], "1"), ("", [], None), (None, [], None)],
)
def test_max_jobs_is_how_many_compilers_run_at_once(
    build: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    jobs: str | None,
    option: list[str],
    threads: str | None,
) -> None:
    headers = SimpleNamespace(__version__="3", get_include=lambda: str(tmp_path))
    monkeypatch.setitem(sys.modules, "pybind11", headers)
    monkeypatch.setattr(build, "find_ninja", lambda: "ninja")
    commands: list[list[str]] = []

    def compile_nothing(command: list[str], *, check: bool, env: dict[str, str]) -> SimpleNamespace:
        commands.append(command)
        assert env.get("NVCC_THREADS") == threads
        assert env["CXX"] == "c++"
        (Path(command[2]) / target.name).touch()
        return SimpleNamespace(returncode=0)

    target = tmp_path / "lib" / "_C.so"
    monkeypatch.setenv("CXX", "c++")
    for name in ("MAX_JOBS", "NVCC_THREADS"):
        monkeypatch.delenv(name, raising=False)
    if jobs is not None:
        monkeypatch.setenv("MAX_JOBS", jobs)
    extension = build.extensions()[0]
    monkeypatch.setattr(build, "ROOT", tmp_path)
    monkeypatch.setattr(build, "subprocess", SimpleNamespace(run=compile_nothing))
    command = build.NinjaBuildExt(Distribution())
    monkeypatch.setattr(command, "get_ext_fullpath", lambda name: str(target))
    command.build_extension(extension)
    ((program, folder_option, _, *rest),) = commands
    assert (program, folder_option, rest) == ("ninja", "-C", option)
    assert target.is_file()


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """A copy of the sources in a folder called ksam."""
    clone = tmp_path / "ksam"
    clone.mkdir()
    for name in ("setup.py", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, clone)
    for name in ("csrc", "ksam_kernels", "python_api"):
        ignored = shutil.ignore_patterns("*.so", "__pycache__")
        shutil.copytree(ROOT / name, clone / name, ignore=ignored)
    return clone


def run_setup(clone: Path, *arguments: str) -> None:
    """setup.py without the extension."""
    environment = {**os.environ, "KSAM_NATIVE": "0", "KSAM_CUDA": "0"}
    command = [sys.executable, "setup.py", "-q", *arguments]
    subprocess.run(command, cwd=clone, env=environment, check=True, capture_output=True)


def test_a_build_has_the_modules_that_there_are(clone: Path) -> None:
    """Not those that an earlier build found."""
    module = clone / "ksam_kernels" / "gone.py"
    module.touch()
    run_setup(clone, "build")
    assert [*(clone / "build").rglob("gone.py")]
    module.unlink()
    run_setup(clone, "build")
    assert not [*(clone / "build").rglob("gone.py")]
    assert len([*(clone / "build").rglob("optimizer.py")]) == 1


def test_a_source_distribution_has_every_source_whatever_is_built(clone: Path) -> None:
    run_setup(clone, "sdist")
    (archive,) = (clone / "dist").glob("*.tar.gz")
    with tarfile.open(archive) as packed:
        names = {name.partition("/")[2] for name in packed.getnames()}
    assert {str(p.relative_to(clone)) for p in (clone / "csrc").rglob("*.*")} <= names


def test_an_editable_install_is_found_beside_a_clone_of_its_name(
    clone: Path, tmp_path: Path
) -> None:
    """There the path has a folder called ksam, without code. Installed without kernels, the tree
    keeps none of this Python's, and those of other Pythons stay."""
    own = clone / "ksam_kernels" / f"_C{sysconfig.get_config_var('EXT_SUFFIX')}"
    other = clone / "ksam_kernels" / "_C.cpython-27-other.so"
    own.touch()
    other.touch()
    run_setup(clone, "editable_wheel", "--dist-dir", str(tmp_path))
    assert not own.exists()
    assert other.exists()
    (wheel,) = tmp_path.glob("*.whl")
    site = tmp_path / "site-packages"
    zipfile.ZipFile(wheel).extractall(site)
    program = (
        "import importlib.util, site, sys;"
        f"site.addsitedir({str(site)!r}); sys.path.insert(0, {str(tmp_path)!r});"
        "print(*(importlib.util.find_spec(n).origin for n in ('ksam', 'ksam_kernels')), sep='\\n')"
    )
    # Without the packages of this environment, in which ksam may be installed.
    found = subprocess.run(
        [sys.executable, "-I", "-S", "-c", program], check=True, capture_output=True, text=True
    )
    assert found.stdout.split() == [
        str(clone / "python_api" / "ksam" / "__init__.py"),
        str(clone / "ksam_kernels" / "__init__.py"),
    ]
