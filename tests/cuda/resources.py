"""What each CUDA kernel takes of a GPU: ``python -m tests.cuda.resources`` writes the table.

``resources.csv`` has a row per kernel and architecture: registers and bytes of shared memory, which
limit how many blocks run at once; bytes of stack and of registers spilled to memory; and the widest
load from and store to global memory. All of it comes from the compiler (nvcc for the PTX, ptxas for
what it makes of that), so no GPU is needed.
"""

from __future__ import annotations

import csv
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

from tests.helpers import ROOT, setup_py

ARCHITECTURES = ("80", "90")
CSRC = ROOT / "csrc"
TABLE = Path(__file__).with_suffix(".csv")


class Usage(NamedTuple):
    source: str
    kernel: str
    architecture: str
    registers: int
    shared_bytes: int
    stack_bytes: int
    spill_bytes: int
    load_bytes: int
    store_bytes: int

    @property
    def key(self) -> tuple[str, str, str]:
        return self.source, self.kernel, self.architecture


def missing() -> str | None:
    """Why the kernels cannot be compiled here; None if they can."""
    try:
        import setuptools  # noqa: F401
    except ModuleNotFoundError:
        return "no setuptools"
    if shutil.which("c++filt") is None:
        return "no c++filt"
    cuda = setup_py().look_for_cuda()
    return cuda if isinstance(cuda, str) else None


def _run(*command: object) -> str:
    """What the command prints.

    Raises:
        RuntimeError: it fails.
    """
    words = [*map(str, command)]
    result = subprocess.run(
        words, check=False, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    if result.returncode != 0:
        raise RuntimeError(f"{shlex.join(words)}\n{result.stdout}")
    return result.stdout


def short_name(demangled: str) -> str:
    """``void ksam::gpu::(anonymous namespace)::f<float>(int)``: ``f<float>``."""
    name = demangled.replace("(anonymous namespace)::", "").replace("ksam::", "")
    name = name.replace("gpu::", "").removeprefix("void ")
    depth = 0
    for i, letter in enumerate(name):
        depth += (letter == "<") - (letter == ">")
        if letter == "(" and depth == 0:
            return name[:i]
    return name


def widths(ptx: str) -> dict[str, dict[str, int]]:
    """Bytes of every entry's widest ``ld`` and ``st``, of those that may be to global memory."""
    found: dict[str, dict[str, int]] = {}
    for entry in re.split(r"^(?=.*\.(?:entry|func)\b)", ptx, flags=re.MULTILINE):
        name = re.match(r".*\.entry\s+(\w+)", entry)
        if name is None:
            continue
        widest = found.setdefault(name[1], {"ld": 0, "st": 0})
        for op, suffixes in re.findall(r"\b(ld|st)\.([\w.:]+)\s", entry):
            parts = suffixes.split(".")
            if {"param", "shared", "local", "const"} & {part.split("::")[0] for part in parts}:
                continue
            lanes = next((int(part[1:]) for part in parts if re.fullmatch(r"v\d", part)), 1)
            widest[op] = max(widest[op], lanes * int(parts[-1][1:]) // 8)
    return found


def registers(log: str) -> dict[str, dict[str, int]]:
    """Registers and bytes of every entry from what ``ptxas -v`` prints."""
    found = {}
    for entry in log.split("Compiling entry function '")[1:]:
        name = entry.partition("'")[0]
        # Functions that are not inlined have a paragraph of their own.
        own = entry.partition(f"Function properties for {name}")[2]
        numbers = {
            "registers": r"Used (\d+) registers",
            "shared_bytes": r"(\d+) bytes smem",
            "stack_bytes": r"(\d+) bytes stack frame",
            "spill_bytes": r"(\d+) bytes spill stores",
        }
        matches = {key: re.search(pattern, own) for key, pattern in numbers.items()}
        found[name] = {key: int(match[1]) if match else 0 for key, match in matches.items()}
    return found


def _compile(setup: Any, source: Path, architecture: str, folder: Path) -> Iterator[Usage]:
    """The rows of one source for one architecture, compiled as the build does."""
    ptx = folder / f"{'-'.join(source.relative_to(CSRC).parts)}-{architecture}.ptx"
    nvcc = (setup.find_nvcc(), f"-arch=sm_{architecture}")
    host = f"-ccbin={setup.host_compiler(setup.compiler())}"
    room_flags = setup.ROOM_NVCC_FLAGS.get(source.parent.name, [])
    flags = (*setup.NVCC_FLAGS, *room_flags, "-DKSAM_CUDA", f"-I{CSRC}", host)
    _run(*nvcc, *flags, "-ptx", source, "-o", ptx)
    log = _run(*nvcc, "-cubin", "-Xptxas=-v", ptx, "-o", ptx.with_suffix(".cubin"))
    used = registers(log)
    text = ptx.read_text()
    widest = widths(text)
    names = _run("c++filt", *used).splitlines() if used else []
    for (mangled, usage), name in zip(used.items(), names, strict=True):
        moved = {"load_bytes": widest[mangled]["ld"], "store_bytes": widest[mangled]["st"]}
        where = source.relative_to(ROOT).as_posix()
        yield Usage(where, short_name(name), f"sm_{architecture}", **usage, **moved)


def measure() -> list[Usage]:
    """Compile every kernel; its rows in the order of the table.

    Raises:
        RuntimeError: a source does not compile.
    """
    setup = setup_py()
    jobs = [(source, name) for source in CSRC.rglob("*.cu") for name in ARCHITECTURES]
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(os.cpu_count()) as pool:
        parts = pool.map(lambda job: list(_compile(setup, *job, Path(folder))), jobs)
        return sorted(row for rows in parts for row in rows)


def read_table() -> list[Usage]:
    """The rows of the table."""
    with TABLE.open(newline="") as file:
        rows = list(csv.reader(file))[1:]
    return [Usage(*row[:3], *map(int, row[3:])) for row in rows]  # type: ignore[arg-type]


def write_table(rows: list[Usage]) -> None:
    with TABLE.open("w", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows([Usage._fields, *rows])


def main() -> None:
    reason = missing()
    if reason is not None:
        sys.exit(f"the kernels cannot be compiled: {reason}")
    rows = measure()
    write_table(rows)
    print(f"{TABLE}: {len(rows)} rows")
    for row in rows:
        if row.spill_bytes or row.stack_bytes:
            print(f"  {row.kernel} on {row.architecture} has a stack or spills: {row}")


if __name__ == "__main__":
    main()
