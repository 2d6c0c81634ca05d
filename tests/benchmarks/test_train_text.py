"""Fine-tuning: a tiny random BERT on a tiny tsv."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.errors import UsageError
from benchmarks.train.glue import GlueSplit
from benchmarks.train.text import TextWorkload
from benchmarks.train.workload import INDEX, LABEL
from tests.helpers import read_rows

transformers = pytest.importorskip("transformers", reason="needs transformers (extra: text)")
CPU = torch.device("cpu")
WORDS = ["good", "fine", "bad", "poor", "film", "plot", "a", "the"]


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a BERT of 16 dimensions and a WordPiece vocabulary of a few words."""
    folder: Path = tmp_path_factory.mktemp("bert")
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]
    (folder / "vocab.txt").write_text("\n".join(vocabulary) + "\n", encoding="utf-8")
    transformers.BertTokenizer(str(folder / "vocab.txt")).save_pretrained(folder)
    shape = transformers.BertConfig(
        vocab_size=len(vocabulary),
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=128,
        # With the usual 0.02 and 0.1 so small a model takes long to start learning.
        initializer_range=0.3,
        hidden_dropout_prob=0.0,
    )
    torch.manual_seed(0)
    transformers.BertModel(shape).save_pretrained(folder)
    return folder


def split_of(count: int, pairs: bool = False) -> GlueSplit:
    """Sentences of 1 to 5 words whose first says the class."""
    labels = [i % 2 for i in range(count)]
    first = [
        " ".join([("bad", "good")[label], *["film"] * (i % 5)]) for i, label in enumerate(labels)
    ]
    return GlueSplit((first, ["the plot"] * count) if pairs else (first,), labels)


@pytest.mark.parametrize("pairs", [False, True])
def test_batches_are_padded_to_their_longest_sentence(bert: Path, pairs: bool) -> None:
    workload = TextWorkload(split_of(20, pairs), split_of(10, pairs), str(bert), CPU)
    rest = 5 if pairs else 2  # special tokens, and the second sentence
    batches = list(workload.train_batches(4, torch.Generator().manual_seed(0)))
    assert len(batches) == 5
    for batch in batches:
        assert all(len(tensor) == 4 for tensor in batch.values())
        lengths = batch["attention_mask"].sum(1)
        assert batch["input_ids"].shape[1] == lengths.max() <= 5 + rest
        if pairs:
            assert batch["token_type_ids"].any()
    tests = list(workload.test_batches())
    assert torch.cat([batch[LABEL] for batch in tests]).sum() == 5


def test_label_noise_is_exact_in_a_subset(bert: Path) -> None:
    """Of the samples that are trained on, not of those that they are taken from."""
    split = split_of(60)
    workloads = [
        TextWorkload(split, split_of(10), str(bert), CPU, train_samples=20, label_noise=noise)
        for noise in (0.25, 0.0)
    ]
    noisy, clean = workloads
    assert len(noisy.wrong) == 5
    assert len(clean.wrong) == 0
    batches = [next(w.train_batches(20, torch.Generator().manual_seed(0))) for w in workloads]
    wrong = batches[0][INDEX][batches[0][LABEL] != batches[1][LABEL]]
    assert wrong.sort().values.tolist() == noisy.wrong.tolist()
    assert torch.equal(batches[0]["input_ids"], batches[1]["input_ids"])


def test_padding_does_not_change_the_logits(bert: Path) -> None:
    workload = TextWorkload(split_of(20), split_of(10), str(bert), CPU)
    model = workload.build_model().eval()
    (batch,) = workload.test_batches()
    logits = workload.forward(model, batch)
    assert logits.shape == (10, 2)
    shortest = int(batch["attention_mask"].sum(1).min())
    alone = {name: t[:1] if name == LABEL else t[:1, :shortest] for name, t in batch.items()}
    torch.testing.assert_close(workload.forward(model, alone), logits[:1])


def test_models_start_in_train_mode_from_the_pretrained_weights(bert: Path) -> None:
    workload = TextWorkload(split_of(4), split_of(4), str(bert), CPU)
    torch.manual_seed(0)
    model = workload.build_model()
    assert model.training
    torch.manual_seed(0)
    again = workload.build_model()
    for one, two in zip(model.parameters(), again.parameters(), strict=True):
        assert torch.equal(one, two)


def test_long_sentences_are_cut(bert: Path) -> None:
    long = GlueSplit((["film " * 500, "good"],), [0, 1])
    workload = TextWorkload(long, long, str(bert), CPU)
    (batch,) = workload.test_batches()
    assert batch["input_ids"].shape == (2, 128)


@pytest.mark.parametrize("content", [None, "{}"], ids=["no config", "empty config"])
def test_a_folder_without_a_model_is_named(tmp_path: Path, content: str | None) -> None:
    if content is not None:
        (tmp_path / "config.json").write_text(content, encoding="utf-8")
    with pytest.raises(UsageError, match=f"--model {tmp_path}: "):
        TextWorkload(split_of(4), split_of(4), str(tmp_path), CPU)


@pytest.mark.parametrize("base", ["adamw", "sgd"])
def test_command_line(
    cli: Callable[..., Any],
    bert: Path,
    write_glue: Callable[..., Path],
    tmp_path: Path,
    base: str,
) -> None:
    split = split_of(80)
    rows = [f"{text} \t{label}" for text, label in zip(*split.sentences, split.labels, strict=True)]
    root = write_glue("SST-2", ["sentence\tlabel", *rows])
    result = cli(
        "--data", "sst2", "--data-root", root, "--model", bert, "--seeds", 1, "--epochs", 8,
        "--batch-size", 8, "--lr", 0.003, "--rho", 0.001, "--k", "1/2", "--base", base,
        "--timing-rounds", 1, "--out", tmp_path / "out",
    )  # fmt: skip
    assert result.status == 0, result.err
    written = read_rows(tmp_path / "out" / "results.csv")
    assert [(row["method"], row["epoch"], row["base"]) for row in written] == [
        (method, epoch, base) for method in ("sgd", "sam", "ksam") for epoch in "12345678"
    ]
    if base == "adamw":
        # One word decides, and a constant answer is right half of the time.
        assert all(float(row["test_accuracy"]) > 0.65 for row in written[7::8])
    assert {"adamw": "x AdamW", "sgd": "x SGD"}[base] in result.out
