"""The pages' Python runs, and what trains there moves the weights."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

import ksam
from tests import ranks
from tests.device import DEVICE
from tests.helpers import all_same_bits

ROOT = Path(__file__).parent.parent
PAGES = ["README.md", "docs/loops.md", "docs/methods.md"]
LIBRARIES = ("accelerate", "transformers", "pytorch_lightning")

Names = dict[str, Any]


def blocks(page: str) -> list[tuple[str, str]]:
    """The heading above every block of Python, and the block."""
    found, heading = [], ""
    for part in re.split(
        r"(^#+ [^\n]*$|^```python\n.*?^```$)", (ROOT / page).read_text(), flags=re.M | re.S
    ):
        if part.startswith("#"):
            heading = part.strip("# ")
        elif part.startswith("```python"):
            found.append((heading, part.removeprefix("```python\n").removesuffix("```")))
    return found


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        blocks = [nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.ReLU()) for _ in range(2)]
        self.blocks = nn.ModuleList(blocks)
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def names_of_the_pages() -> Names:
    """What the pages take as given."""
    torch.manual_seed(0)
    model = Net().to(DEVICE)
    samples = [
        {"x": torch.randn(8), "y": torch.tensor(i % 5), "index": i, "text": "a string"}
        for i in range(48)
    ]
    loader = DataLoader(samples, batch_size=12)  # type: ignore[arg-type]
    batch = next(iter(loader))

    def loss(b: dict[str, Tensor]) -> Tensor:
        return ksam.cross_entropy(model(b["x"]), b["y"])

    params = list(model.parameters())
    return {
        "model": model, "params": params, "loader": loader, "batch": batch, "loss": loss,
        "batches": [batch], "steps": 10, "suspects": torch.arange(3),
        "optimizer": ksam.KSAM(params, torch.optim.SGD, lr=0.1, model=model),
    }  # fmt: skip


def operations(names: Names) -> None:
    params = [torch.randn(3, 4, device=DEVICE) for _ in range(2)]
    lists = ("params", "grads", "backup", "new_grads", "buffers")
    names.update({name: [p.clone() for p in params] for name in lists})
    names["logits"] = torch.randn(12, 5, device=DEVICE)
    names["target"] = torch.arange(12, device=DEVICE) % 5
    names["k"] = 4


def cuda(names: Names) -> None:
    if DEVICE.type != "cuda":
        pytest.skip("a CUDA graph needs a GPU")
    names["loader"] = [{k: v for k, v in b.items() if k in "xy"} for b in names["loader"]]


def hugging_face(names: Names) -> None:
    from transformers import BertConfig, BertForSequenceClassification, TrainingArguments

    config = BertConfig(
        vocab_size=50, hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=32, max_position_embeddings=16, num_labels=3,
    )  # fmt: skip
    names["model"] = BertForSequenceClassification(config)
    tokens = torch.randint(50, (24, 8), device="cpu")  # from where the Trainer moves them
    names["data"] = [{"input_ids": row, "labels": i % 3} for i, row in enumerate(tokens)]
    names["arguments"] = TrainingArguments(
        "out", per_device_train_batch_size=6, gradient_accumulation_steps=2, num_train_epochs=1,
        report_to=[], use_cpu=DEVICE.type == "cpu", disable_tqdm=True,
    )  # fmt: skip


def lightning(names: Names) -> None:
    import pytorch_lightning

    names["trainer"] = pytorch_lightning.Trainer(
        max_epochs=1, accelerator="cpu" if DEVICE.type == "cpu" else "gpu", devices=1, logger=False,
        enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False,
    )  # fmt: skip


PREPARED: dict[str, Callable[[Names], None]] = {
    "Operations": operations,
    "In a CUDA graph": cuda,
    "Hugging Face Trainer": hugging_face,
    "PyTorch Lightning": lightning,
}


def by_hand(names: Names, batches: int) -> None:
    """What a trainer's loop has to do: AutoKSAM's steps, clipped, each over so many batches."""
    model = names["start"]
    optimizer = ksam.AutoKSAM(
        model.parameters(), torch.optim.SGD, lr=0.1, momentum=0.9, model=model
    )
    for i, batch in enumerate(names_of_the_pages()["loader"]):
        optimizer.backward(
            lambda b: ksam.cross_entropy(model(b["x"]), b["y"]),
            batch,
            weight=1 / batches,
        )
        if i % batches == batches - 1:
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
    # Lightning leaves its model on the CPU.
    trained = [p.to(DEVICE) for p in names["model"].parameters()]
    assert all_same_bits(trained, [*model.parameters()])


def two_steps_of_two_batches(names: Names) -> None:
    assert names["optimizer"].steps_done == 4
    assert names["trainer"].state.global_step == 2


def largest_eigenvalue(names: Names) -> None:
    model, batch = names["model"], names["batch"]
    shapes = {name: p.shape for name, p in model.named_parameters()}

    def loss(vector: Tensor) -> Tensor:
        parts = vector.split([shape.numel() for shape in shapes.values()])
        weights = {n: v.view(s) for (n, s), v in zip(shapes.items(), parts, strict=True)}
        logits = torch.func.functional_call(model, weights, (batch["x"],))
        return nn.functional.cross_entropy(logits, batch["y"])

    weights = nn.utils.parameters_to_vector(model.parameters()).detach()
    eigenvalues = torch.linalg.eigvalsh(torch.func.hessian(loss)(weights))
    largest = eigenvalues[eigenvalues.abs().argmax()].item()
    assert names["eigenvalue"].item() == pytest.approx(largest, rel=0.01)


#: What a page's loop must have come to.
EXPECTED: dict[str, Callable[[Names], None]] = {
    "Hugging Face Accelerate": lambda names: by_hand(names, 2),
    "Hugging Face Trainer": two_steps_of_two_batches,
    "PyTorch Lightning": lambda names: by_hand(names, 1),
    "Curvature": largest_eigenvalue,
}


def run(heading: str, code: str) -> Names:
    names = names_of_the_pages()
    PREPARED.get(heading, lambda _: None)(names)
    names["start"] = copy.deepcopy(names["model"])
    params = list(names["model"].parameters())
    before = [p.detach().clone() for p in params]
    exec(compile(code, heading, "exec"), names)
    moves = any(call in code for call in (".step(", "trainer."))
    changed = [
        not torch.equal(p.detach().to(b.device), b) for p, b in zip(params, before, strict=True)
    ]
    assert any(changed) == moves
    EXPECTED.get(heading, lambda _: None)(names)
    return names


#: Blocks that need a process group.
IN_PROCESSES = ("Sharded models",)


def run_in_process(rank: int, heading: str, code: str) -> None:
    names = run(heading, code)
    names["optimizer"].step(names["loss"], names["batch"])


@pytest.mark.parametrize(
    ("heading", "code"),
    [
        pytest.param(
            *block,
            id=f"{page}:{block[0]}:{n}",
            marks=ranks.needs_ranks if block[0] in IN_PROCESSES else (),
        )
        for page in PAGES
        for n, block in enumerate(blocks(page))
    ],
)
@pytest.mark.filterwarnings("ignore:.*GradScaler is enabled, but CUDA is not available")
def test_the_python_of_the_pages_runs(
    heading: str, code: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for library in LIBRARIES:
        if f"import {library}" in code or f"from {library}" in code:
            pytest.importorskip(library)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MPLBACKEND", "agg")
    if heading in IN_PROCESSES:
        ranks.run(run_in_process, 1, tmp_path, heading, code)
    else:
        run(heading, code)


def test_all_blocks_are_found() -> None:
    for page in PAGES:
        assert len(blocks(page)) == (ROOT / page).read_text().count("```python") > 0
    assert {heading for page in PAGES for heading, _ in blocks(page)} > {*PREPARED, *EXPECTED}
