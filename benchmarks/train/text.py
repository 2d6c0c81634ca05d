"""Text classification: a GLUE task with a pretrained transformer from a local folder."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.errors import UsageError, import_optional
from benchmarks.train.glue import GlueSplit
from benchmarks.train.workload import INDEX, LABEL, Batch, Workload, subset_rows, with_noise

_MAX_TOKENS = 128
_TEST_BATCH = 64
_CLASSES = 2


class TextWorkload(Workload):
    """Sentences or pairs of them, tokenized once and padded to the longest of each batch."""

    def __init__(
        self,
        train: GlueSplit,
        test: GlueSplit,
        model: str,
        device: torch.device,
        train_samples: int | None = None,
        label_noise: float = 0.0,
    ) -> None:
        self.device = device
        self._transformers = _import_transformers()
        self._folder = Path(model)
        if not (self._folder / "config.json").is_file():
            raise UsageError(
                f"--model {model}: not a folder with a transformers model "
                "(there is no config.json in it)"
            )
        tokenizer = self._load("AutoTokenizer")
        train = train.take(subset_rows(len(train.labels), train_samples).tolist())
        clean = torch.tensor(train.labels)
        noisy = with_noise(clean, label_noise, _CLASSES)
        self._train = _Tokens(GlueSplit(train.sentences, noisy.tolist()), tokenizer, device)
        self._test = _Tokens(test, tokenizer, device)
        self.train_size, self.test_size = len(train.labels), len(test.labels)
        self.wrong = (noisy != clean).nonzero().flatten()

    def build_model(self) -> nn.Module:
        model: nn.Module = self._load("AutoModelForSequenceClassification", num_labels=_CLASSES)
        # from_pretrained returns the model in eval mode.
        return model.to(self.device).train()

    def forward(self, model: nn.Module, batch: Batch) -> Tensor:
        inputs = {name: tensor for name, tensor in batch.items() if name not in (LABEL, INDEX)}
        logits: Tensor = model(**inputs).logits
        return logits

    def train_batches(self, batch_size: int, generator: torch.Generator) -> Iterator[Batch]:
        order = torch.randperm(self.train_size, generator=generator)
        for step in range(self.steps_per_epoch(batch_size)):
            rows = order[step * batch_size : (step + 1) * batch_size]
            yield {**self._train.batch(rows), INDEX: rows.to(self.device)}

    def test_batches(self) -> Iterator[Batch]:
        # Sentences of like length together: less padding to compute.
        order = self._test.lengths.argsort(stable=True)
        for start in range(0, self.test_size, _TEST_BATCH):
            yield self._test.batch(order[start : start + _TEST_BATCH])

    def _load(self, loader: str, **options: Any) -> Any:
        """Load a tokenizer or model from the folder with the Auto class named `loader`."""
        try:
            return getattr(self._transformers, loader).from_pretrained(
                str(self._folder), local_files_only=True, **options
            )
        except (OSError, ValueError) as error:
            reason = (str(error).strip() or repr(error)).splitlines()[0]
            raise UsageError(
                f"--model {self._folder}: {loader} cannot load it: {reason}"
            ) from error


class _Tokens:
    """A tokenized split: tensors [N, longest] on the device, padded on the right."""

    def __init__(self, split: GlueSplit, tokenizer: Any, device: torch.device) -> None:
        if tokenizer.pad_token is None:
            raise UsageError(f"--model {tokenizer.name_or_path}: its tokenizer has no pad_token")
        encoded = tokenizer(
            *split.sentences,
            padding=True,
            padding_side="right",  # `batch` cuts padding off that side
            truncation=True,
            max_length=_MAX_TOKENS,
            return_tensors="pt",
        )
        # Lengths stay on the CPU, where `batch` needs them as numbers.
        self.lengths: Tensor = encoded["attention_mask"].sum(1)
        self._inputs: Batch = {name: tensor.to(device) for name, tensor in encoded.items()}
        self._labels = torch.tensor(split.labels, device=device)

    def batch(self, rows: Tensor) -> Batch:
        """Return the given rows, [B, longest of them], with their labels [B]."""
        longest = int(self.lengths[rows].max())
        rows = rows.to(self._labels.device)
        inputs = {name: tensor[rows, :longest] for name, tensor in self._inputs.items()}
        return {**inputs, LABEL: self._labels[rows]}


def _import_transformers() -> Any:
    transformers = import_optional(
        "transformers", package="transformers", needed_by="text (--data sst2, rte, mrpc)"
    )
    # Each new model would say that its classifier is untrained, which is the point of training it.
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    return transformers
