"""Arguments: what they parse to and how mistakes in them are reported."""

from __future__ import annotations

import argparse
import importlib
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from benchmarks.__main__ import COMMANDS, build_parser
from benchmarks.errors import UsageError, import_optional
from benchmarks.train.config import TrainConfig, format_k, parse_k, resolve
from benchmarks.train.methods import make_method


def config(*arguments: str) -> TrainConfig:
    return resolve(build_parser(["train"]).parse_args(["train", *arguments]))


@pytest.mark.parametrize(
    ("text", "k"),
    [("1/3", 1 / 3), ("0.33", 0.33), ("1.0", 1.0), ("1e-1", 0.1), ("1", 1), ("43", 43)],
)
def test_k_is_a_fraction_or_a_count(text: str, k: float | int) -> None:
    parsed = parse_k(text)
    assert parsed == k
    assert type(parsed) is type(k)


@pytest.mark.parametrize(
    "text", ["0", "0.0", "-1", "-0.5", "1.5", "4/3", "1/0", "nan", "inf", "third", "", "²"]
)
def test_k_out_of_range_is_refused(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match="neither a fraction"):
        parse_k(text)


@pytest.mark.parametrize(("k", "text"), [(1 / 3, "1/3"), (0.33, "0.33"), (1.0, "1.0"), (43, "43")])
def test_k_is_shown_as_people_write_it(k: float | int, text: str) -> None:
    assert format_k(k) == text


def test_defaults_depend_on_the_data_set() -> None:
    digits = config()
    assert (digits.data, digits.model, digits.base, digits.seeds) == ("digits", "cnn", "sgd", 3)
    assert digits.methods == ("sgd", "sam", "ksam")
    assert digits.out == Path("runs/train-digits")
    assert config("--base", "adamw").lr < digits.lr


def test_rates_and_radii_are_those_of_the_command_line_or_by_the_base() -> None:
    assert [config("--base", base).weight_decay for base in ("sgd", "adamw")] == [5e-4, 5e-2]
    assert [config("--base", base).msam_rho for base in ("sgd", "adamw")] == [0.3, 0.05]
    given = config("--lr", "0.25", "--weight-decay", "0", "--msam-rho", "0")
    assert (given.lr, given.weight_decay, given.msam_rho) == (0.25, 0.0, 0.0)


def test_a_study_does_not_write_over_what_train_wrote() -> None:
    study = resolve(build_parser(["study"]).parse_args(["study"]))
    assert study.out == Path("runs/study-digits") != config().out


def test_text_defaults_to_adamw(tmp_path: Path) -> None:
    rte = config("--data", "rte", "--data-root", str(tmp_path), "--model", "some/folder/model")
    assert rte.base == "adamw"
    assert rte.model_label == "folder/model"


@pytest.mark.parametrize(
    ("k", "batch_size", "cost"),
    [
        ("1/3", 96, 1.0),
        ("1/3", 128, (128 + 6 * 43) / (3 * 128)),
        ("10", 30, (30 + 60) / 90),
        ("1.0", 64, 2.0),
        ("500", 64, 2.0),  # the whole batch: nothing to select, so two full gradients
    ],
)
def test_theoretical_cost_counts_passes(k: str, batch_size: int, cost: float) -> None:
    ksam = make_method("ksam", config("--k", k))
    assert ksam.theoretical_cost(batch_size) == pytest.approx(cost)
    assert make_method("sam", config()).theoretical_cost(batch_size) == 2.0
    assert make_method("sgd", config()).theoretical_cost(batch_size) == 1.0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--data", "cifar10"], "--data cifar10 needs --data-root"),
        (["--data", "cifar10", "--data-root", "{tmp}/none"], "{tmp}/none: no such file or folder"),
        (["--data", "cifar10", "--data-root", "{tmp}"], "{tmp}: contains neither cifar-10-batches"),
        (["--data", "digits", "--data-root", "{tmp}"], "{tmp}: --data digits needs no folder"),
        (["--data", "digits", "--model", "vgg"], "--model vgg: must be one of cnn, resnet8"),
        (["--data", "rte", "--data-root", "{tmp}"], "--data rte needs --model"),
        (
            ["--data", "rte", "--data-root", "{tmp}", "--model", "m"],
            "{tmp}/RTE/train.tsv is missing",
        ),
        (["--train-samples", "5000"], "--train-samples 5000: the training set has only 1347"),
        (["--out", "{tmp}/file"], "{tmp}/file: cannot create the folder"),
        (["--k", "2.5"], "argument --k: '2.5' is neither a fraction"),
        (
            ["--methods", "sgd,adam"],
            "'sgd,adam': expected a comma-separated list of sgd, sam, ksam",
        ),
        (["--seeds", "0"], "argument --seeds: '0' is not a count >= 1"),
        (["--lr", "nan"], "argument --lr: 'nan' is not a positive number"),
        (["--weight-decay", "-1"], "argument --weight-decay: '-1' is not a number >= 0"),
    ],
)
def test_mistakes_end_in_one_sentence(
    cli: Callable[..., Any], tmp_path: Path, arguments: list[str], message: str
) -> None:
    (tmp_path / "file").touch()
    result = cli(*(argument.format(tmp=tmp_path) for argument in arguments))
    assert result.status == 2
    assert message.format(tmp=tmp_path) in result.err.splitlines()[-1]
    assert "Traceback" not in result.err
    assert "epoch" not in result.out


def test_missing_package_is_named(monkeypatch: pytest.MonkeyPatch, cli: Callable[..., Any]) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    result = cli("--epochs", 1)
    assert result.status == 2
    assert "accuracy.png needs the package matplotlib (pip install matplotlib)" in result.err


def test_import_optional_returns_the_module() -> None:
    assert import_optional("json", package="json", needed_by="this test") is json
    with pytest.raises(UsageError, match="this test needs the package nowhere"):
        import_optional("nowhere_to_be_found", package="nowhere", needed_by="this test")


def test_commands_are_imported_only_when_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(COMMANDS, "broken", ("benchmarks.no_such_module", "cannot be imported"))
    assert build_parser(["train"]).parse_args(["train"]).command == "train"
    with pytest.raises(ModuleNotFoundError, match="no_such_module"):
        build_parser(["broken"])


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_provides_its_two_functions(command: str) -> None:
    module = importlib.import_module(COMMANDS[command][0])
    assert callable(module.add_arguments)
    assert callable(module.run)
