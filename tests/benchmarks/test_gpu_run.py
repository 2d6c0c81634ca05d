"""The run on a GPU over its parts: what is kept, what is repeated, what breaks off, and where."""

from __future__ import annotations

import json
import signal
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from benchmarks.__main__ import main
from benchmarks.gpu import kernels, part
from benchmarks.gpu import run as gpu_run
from benchmarks.gpu.cases import kernel_cases
from benchmarks.gpu.cli import default_folder
from benchmarks.gpu.part import Context, PartFile
from benchmarks.gpu.process import run_for
from benchmarks.gpu.report import write_report
from benchmarks.timing import Plan, Quartiles
from ksam_kernels import use_backend

CPU = torch.device("cpu")


@pytest.fixture
def context(tmp_path: Path) -> Context:
    return Context(CPU, tmp_path, dry_run=False)


def left(name: str, context: Context, results: dict[str, Any], *, complete: bool) -> Path:
    """The file that an earlier run wrote."""
    file = PartFile(name, context, results)
    file.write(complete=complete)
    return file.path


def on_disk(path: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return content


def test_what_is_there_is_not_repeated_and_the_rest_goes_on(
    context: Context, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    ran: list[str] = []
    monkeypatch.setattr(gpu_run, "_run_part", lambda name, _: ran.append(name))
    left("build", context, {}, complete=True)
    left("sync", context, {}, complete=False)
    gpu_run.run_parts(("build", "sync", "graph"), context)
    assert ran == ["sync", "graph"]
    assert "build: there already" in capsys.readouterr().out
    gpu_run.run_parts(("build",), replace(context, again=True))
    assert ran[2:] == ["build"]
    assert not gpu_run.run_parts(("graph",), replace(context, deadline=0))
    assert "graph: no time left" in capsys.readouterr().out
    assert ran[3:] == []


@pytest.mark.parametrize("again", [False, True])
def test_a_part_that_was_cut_off_begins_anew_only_where_asked_to(
    context: Context, monkeypatch: pytest.MonkeyPatch, again: bool
) -> None:
    context = replace(context, again=again)
    left("kernels", context, {"rows": [1]}, complete=False)
    assert PartFile("kernels", context).unfinished() == ({} if again else {"rows": [1]})
    commands: list[list[str]] = []
    child(monkeypatch, "pass", commands)
    gpu_run._run_part("kernels", context)
    assert ("--again" in commands[0]) == again


@pytest.mark.parametrize("other", ["device", "torch", "backend", "code"])
def test_what_was_measured_of_anything_else_is_not_there(context: Context, other: str) -> None:
    path = left("kernels", context, {"rows": [1]}, complete=False)
    assert PartFile("kernels", context).load() == on_disk(path)
    path.write_text(json.dumps({**on_disk(path), other: "another"}), encoding="utf-8")
    assert PartFile("kernels", context).load() is None
    assert PartFile("kernels", context).unfinished() == {}
    assert write_report(context).aims == []


@pytest.fixture
def clone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that stands for the repository, with next to nothing in it."""
    for name in ("setup.py", "README.md", "benchmarks/gpu/tests.py", "benchmarks/gpu/share.py"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    monkeypatch.setattr(part, "_ROOT", tmp_path)
    monkeypatch.setattr(part.ksam_kernels, "__path__", [str(tmp_path / "ksam_kernels")])
    return tmp_path


def hashes(file: Path, hash_of: Any) -> list[str]:
    """With one content of the file, with another, and with the first again."""
    file.parent.mkdir(parents=True, exist_ok=True)
    found = []
    for content in (b"one", b"two", b"one"):
        file.write_bytes(content)
        found.append(hash_of.__wrapped__())
    return found


@pytest.mark.parametrize("name", ["csrc/loss/a.cu", "setup.py", "ksam_kernels/loss/triton.py"])
def test_code_is_other_code_when_a_kernel_changes(clone: Path, name: str) -> None:
    codes = hashes(clone / name, part._code)
    assert codes[0] == codes[2] != codes[1]


def test_code_is_the_same_code_when_it_is_built_again(
    clone: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    codes = hashes(clone / "ksam_kernels" / "_C.so", part._code)
    assert codes[0] == codes[1]
    for architectures in ("80", "90"):
        built = SimpleNamespace(
            compiler="g++", cuda_architectures=architectures, sanitized=False, cpu_isa="avx2"
        )
        monkeypatch.setattr(part, "extension", built)
        codes.append(part._code.__wrapped__())
    monkeypatch.setattr(part, "extension", None)
    codes.append(part._code.__wrapped__())
    assert len(set(codes[3:])) == 3


@pytest.mark.parametrize("name", ["tests/a/test_x.py", "docs/loops.md", "benchmarks/gpu/share.py"])
def test_shares_of_other_tests_are_no_part_of_the_run(
    clone: Path, context: Context, name: str
) -> None:
    """They are numbered: with a test more or less each has others in it."""
    tests = hashes(clone / name, part._tests)
    assert tests[0] == tests[2] != tests[1]
    path = left("tests", context, {"shares": {}}, complete=False)
    assert PartFile("tests", context).load() is not None
    path.write_text(json.dumps({**on_disk(path), "tests": tests[1]}), encoding="utf-8")
    assert PartFile("tests", context).load() is None


def child(
    monkeypatch: pytest.MonkeyPatch, code: str, commands: list[list[str]] | None = None
) -> None:
    """Have `python -m benchmarks gpu --here ...` replaced by other Python code."""

    def run(seconds: float, command: list[str], **options: Any) -> int | None:
        if commands is not None:
            commands.append(command)
        return run_for(seconds, [command[0], "-c", code, *command[1:]], **options)

    monkeypatch.setattr(gpu_run, "run_for", run)


EARLIER, HALF = {"step": {"together": 1}}, {"step": 1}


@pytest.mark.parametrize("wrote", [False, True], ids=["nothing", "half"])
@pytest.mark.parametrize("earlier", [False, True], ids=["first", "again"])
def test_a_part_that_dies_leaves_what_it_wrote_or_what_was_there(
    context: Context, monkeypatch: pytest.MonkeyPatch, wrote: bool, earlier: bool
) -> None:
    path = left("host", context, HALF, complete=False)
    half = path.read_text(encoding="utf-8")
    path.unlink()
    if earlier:
        left("host", context, EARLIER, complete=True)
    write = f"open({str(path)!r}, 'w').write({half!r});" if wrote else ""
    child(monkeypatch, f"import os; {write} os.abort()")
    gpu_run._run_part("host", context)
    found = on_disk(path)
    assert not found["complete"]
    kept = HALF if wrote else EARLIER if earlier else {}
    assert found["results"] == {**kept, "failure": "its process ended with status -6"}


def test_a_part_that_hangs_was_ended(context: Context, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_run, "run_for", lambda *_, **__: None)
    gpu_run._run_in_child("host", context, 2.0)
    found = on_disk(PartFile("host", context).path)
    assert found["results"] == {"failure": "its process was ended after 22 s"}


def test_a_part_hears_the_interrupt_that_a_shells_background_ignores(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    handlers = []
    monkeypatch.setattr(
        "benchmarks.gpu.host.run", lambda *_: handlers.append(signal.getsignal(signal.SIGINT))
    )
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        options = ["--dry-run", "--here", "--only", "host", "--out", str(tmp_path)]
        assert main(["gpu", *options]) == 0
    finally:
        signal.signal(signal.SIGINT, before)
    assert handlers == [signal.default_int_handler]


def test_a_part_that_raises_says_why_and_keeps_what_was_there(
    context: Context, monkeypatch: pytest.MonkeyPatch
) -> None:
    def raises(context: Context, file: PartFile) -> None:
        file.results = {"begun": True}
        if context.deadline == 1:
            file.write(complete=False)
        raise RuntimeError("out of memory")

    monkeypatch.setattr("benchmarks.gpu.host.run", raises)
    path = left("host", context, EARLIER, complete=True)
    for deadline, kept in ((0, EARLIER), (1, {"begun": True})):
        with pytest.raises(RuntimeError):
            gpu_run.run_in_process("host", replace(context, deadline=deadline))
        failed = {**kept, "failure": "RuntimeError: out of memory"}
        assert on_disk(path)["results"] == failed
        assert not on_disk(path)["complete"]


def test_why_a_part_failed_is_not_replaced_by_its_status(
    context: Context, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = left("host", context, {"failure": "RuntimeError: out of memory"}, complete=False)
    failed = path.read_text(encoding="utf-8")
    path.unlink()
    child(monkeypatch, f"open({str(path)!r}, 'w').write({failed!r}); raise SystemExit(1)")
    gpu_run._run_part("host", context)
    assert on_disk(path)["results"]["failure"] == "RuntimeError: out of memory"
    # The next one dies before it says anything: that one's failure is another.
    monkeypatch.undo()
    child(monkeypatch, "raise SystemExit(3)")
    gpu_run._run_part("host", context)
    assert on_disk(path)["results"]["failure"] == "its process ended with status 3"


def test_a_part_with_failures_is_not_complete(
    context: Context, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("failures", "left_out"):
        for found in ({}, {"case": "why"}):
            run = lambda _, file, found=found: file.results.update({name: found})  # noqa: B023, E731
            monkeypatch.setattr("benchmarks.gpu.host.run", run)
            gpu_run.run_in_process("host", context)
            assert on_disk(PartFile("host", context).path)["complete"] == (not found)


def test_half_a_file_does_not_break_the_report(
    context: Context, monkeypatch: pytest.MonkeyPatch
) -> None:
    left("build", context, {}, complete=True)
    summary = context.out / "summary.json"
    for name in ("summary.json", "kernels.json"):
        (context.out / name).write_text('{"part": "ker', encoding="utf-8")
    write_report(context)
    assert set(on_disk(summary)["parts"]) == {"build"}

    def full(*_: object) -> None:
        raise OSError("no space left on device")

    before = summary.read_bytes()
    left("sync", context, {}, complete=True)
    monkeypatch.setattr(Path, "replace", full)
    with pytest.raises(OSError, match="no space"):
        write_report(context)
    assert summary.read_bytes() == before


def a_case(name: str) -> Any:
    return SimpleNamespace(label=name, shape="1", dtype="float32", contestants=["ksam"])


def rows_of(name: str, us: float | None, **more: Any) -> list[dict[str, Any]]:
    """As a case with one contestant leaves them."""
    times = None if us is None else {"q25": us, "median": us, "q75": us}
    named = {"room": "topk", "operation": name, "extra": "", "shape": "1", "dtype": "float32"}
    figures = {"microseconds": times, "share_of_copy": us, "note": "", "backend": "native"}
    return [{**named, **figures, "contestant": "ksam", "ratio": 1.0, **more}]


def test_a_case_is_compared_with_a_copy_that_moves_as_many_bytes() -> None:
    case = next(kernel_cases(torch.device("cpu"), tiny=True))
    plan = Plan(rounds=2, seconds=0, few_rounds=1, max_seconds=1)
    work = kernels._copies(case, 3, torch.device("cpu"))
    copied: Any = work()
    assert [2 * target.nbytes for target in copied] == [case.floor_bytes // 2 * 2] * 3
    ours, *others = kernels.measure(case, torch.device("cpu"), plan, 1e9)
    assert ours["share_of_equal_copy"] > 0
    assert all("share_of_equal_copy" not in row for row in others)
    assert f"{100 * ours['share_of_equal_copy']:.0f} % of one as large" in kernels._line([ours])


def test_cases_that_were_measured_are_kept_and_those_that_failed_tried_again(
    context: Context, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = [a_case(name) for name in "abcd"]
    monkeypatch.setattr(kernels, "kernel_cases", lambda *_, **__: iter(found))
    monkeypatch.setattr(kernels, "copy_bandwidth", lambda _: Quartiles.of([1e9]))
    monkeypatch.setattr(kernels, "measure", lambda case, *_: rows_of(case.label, 2.0))
    rows = [*rows_of("a", 1.0), *rows_of("b", None, failure="wrong"), *rows_of("d", 1.0)]
    left("kernels", context, {"rows": rows}, complete=False)
    file = PartFile("kernels", context)
    kernels.run(context, file)
    times = {row["operation"]: row["share_of_copy"] for row in file.results["rows"]}
    assert list(times.items()) == [("a", 1.0), ("b", 2.0), ("c", 2.0), ("d", 1.0)]
    assert file.results["failures"] == {}
    # Without time nothing is measured, and what was found is still there.
    left("kernels", context, {"rows": rows}, complete=False)
    kernels.run(replace(context, deadline=0), file)
    assert [row["operation"] for row in file.results["rows"]] == ["a", "b", "d"]
    assert file.results["left_out"] == ["c 1 float32"]
    assert file.results["failures"] == {"b 1 float32": "wrong"}


def test_a_dry_run_repeats_everything_in_a_folder_that_git_ignores(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    ran: list[str] = []
    for _ in range(2):
        assert main(["gpu", "--dry-run", "--only", "build"]) == 0
        monkeypatch.setattr(gpu_run, "run_in_process", lambda name, _: ran.append(name))
    assert ran == ["build"]
    (path,) = (path for path in tmp_path.rglob("*") if path.name == "dry-run-build.json")
    assert path.relative_to(tmp_path).parts[0] == "runs"
    ignored = Path(__file__).parent.parent.parent / ".gitignore"
    assert "runs/" in ignored.read_text(encoding="utf-8").splitlines()


@pytest.mark.parametrize("again", [False, True])
def test_the_command_says_what_is_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, again: bool
) -> None:
    seen: list[tuple[tuple[str, ...], Context]] = []

    def run_parts(names: tuple[str, ...], context: Context) -> bool:
        seen.append((names, context))
        return True

    monkeypatch.setattr("benchmarks.gpu.cli.select_device", lambda _: CPU)
    monkeypatch.setattr("benchmarks.gpu.cli.run_parts", run_parts)
    options = ["--again"] if again else []
    assert main(["gpu", "--only", "host,build,host", "--out", str(tmp_path), *options]) == 0
    ((names, context),) = seen
    assert names == ("host", "build")
    assert replace(context, deadline=0) == Context(CPU, tmp_path, False, 0, again)


def test_the_exit_status_tells_of_a_part_that_failed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(_: Context, file: PartFile) -> None:
        file.results["failures"] = {"a case": "wrong"}

    monkeypatch.setattr("benchmarks.gpu.host.run", run)
    with pytest.raises(SystemExit) as caught:
        main(["gpu", "--dry-run", "--only", "host", "--out", str(tmp_path)])
    assert caught.value.code == 1
    assert "FAILED  host, a case: wrong" in capsys.readouterr().out


@pytest.mark.parametrize("minutes", ["nan", "-3", "0", "inf", "soon"])
def test_minutes_are_a_positive_number(minutes: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["gpu", "--minutes", minutes])
    assert f"'{minutes}' is not a positive number" in capsys.readouterr().err


def test_parts_go_by_name(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["gpu", "--only", "attic"])
    assert "comma-separated list of build, sync" in capsys.readouterr().err


def test_the_folder_is_named_after_the_device_and_a_named_backend(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("benchmarks.gpu.cli.device_name", lambda _: "NVIDIA H100 80GB HBM3")
    with use_backend("auto"):
        assert default_folder(CPU).parts[-3:] == ("benchmarks", "results", "nvidia-h100-80gb-hbm3")
    with use_backend("reference"):
        assert default_folder(CPU).name == "nvidia-h100-80gb-hbm3-reference"
