"""Contract of ``compact_batch``: trees of tensors, what passes through, and the batch size."""

from __future__ import annotations

import dataclasses
import enum
import functools
import sys
import time
from collections import Counter, OrderedDict, UserDict, namedtuple
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from ksam_kernels import batch_size, compact_batch
from tests.helpers import same_bits

Pair = namedtuple("Pair", ["x", "y"])


@dataclasses.dataclass
class Sample:
    x: Tensor
    label: Any
    name: str = "sample"
    size: int = dataclasses.field(init=False, default=0)


@dataclasses.dataclass(frozen=True)
class Frozen:
    x: Tensor


class WithNote:
    __slots__ = ("note",)


@dataclasses.dataclass
class Noted(WithNote):
    __slots__ = ("x",)
    x: Tensor


class Encoding(UserDict):  # type: ignore[type-arg]
    """As Hugging Face's BatchEncoding: a UserDict with attributes for keys."""

    def __getattr__(self, name: str) -> Any:
        return self.data[name]


class Attributes(dict):  # type: ignore[type-arg]
    """A dict whose constructor takes no dict, with an attribute of its own."""

    def __init__(self, **items: Any) -> None:
        super().__init__(items)
        self.note = "kept"


class Rows(list):  # type: ignore[type-arg]
    pass


class Columns(tuple):  # type: ignore[type-arg]
    """A tuple that its class makes of single arguments, with an attribute."""

    def __new__(cls, first: Any, *others: Any) -> Columns:
        made = super().__new__(cls, (first, *others))
        made.note = "kept"
        return made

    note: str


class Named(Pair):
    """A namedtuple that its class makes of one argument."""

    def __new__(cls, x: Any) -> Named:
        return super().__new__(cls, x, x)


def trees(x: Tensor, y: Tensor) -> dict[str, Any]:
    return {
        "tensor": x,
        "tuple": (x, y),
        "list": [x, y],
        "dict": {"x": x, "y": y},
        "ordered dict": OrderedDict(y=y, x=x),
        "nested": {"a": [x, (y, {"b": x})], "c": y},
        "namedtuple": Pair(x, y),
        "subclass of namedtuple": Named(x),
        "dataclass": Sample(x, y),
        "frozen dataclass": Frozen(x),
        "nested dataclass": [Sample(x, {"y": (y,)}), Frozen(y)],
        "UserDict": Encoding({"x": x, "y": y}),
        "subclass of dict": Attributes(x=x, y={"x": x}),
        "subclass of tuple": Columns(x, Columns(y)),
        "subclass of list": Rows([x, Rows([y])]),
        "nested UserDict": (Encoding({"x": [x, y]}), y),
        "empty": (),
    }


KINDS = tuple(trees(torch.zeros(1), torch.zeros(1)))


def same_tree(a: Any, b: Any) -> bool:
    if type(a) is not type(b):
        return False
    if isinstance(a, Tensor):
        return same_bits(a, b)
    if isinstance(a, (dict, UserDict)):
        return list(a) == list(b) and all(same_tree(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same_tree, a, b))
    if dataclasses.is_dataclass(a):
        return same_tree(vars(a), vars(b))
    return bool(a == b)


@pytest.mark.parametrize("kind", KINDS)
def test_any_tree_comes_back_with_its_tensors_compacted(backend: str, kind: str) -> None:
    x, y, indices = torch.randn(6, 3), torch.arange(6), torch.tensor([1, 4, 5])
    batch = trees(x, y)[kind]
    rows = compact_batch(batch, indices)
    assert same_tree(rows, trees(x[indices], y[indices])[kind])
    assert same_tree(batch, trees(x, y)[kind])


def test_a_hugging_face_batch_encoding_comes_back_as_one(backend: str) -> None:
    encoding = pytest.importorskip("transformers").BatchEncoding
    ids = torch.arange(12).reshape(4, 3)
    rows = compact_batch(
        encoding({"input_ids": ids, "labels": torch.arange(4)}), torch.tensor([3, 0])
    )
    assert type(rows) is encoding
    assert rows["labels"].tolist() == [3, 0]
    assert torch.equal(rows.input_ids, ids[[3, 0]])


def test_tensors_without_dimensions_and_other_leaves_pass_through(backend: str) -> None:
    scale, thing = torch.tensor(2.5), object()
    batch = {
        "x": torch.arange(3),
        "scale": scale,
        "names": ["a", "b", "c"],
        "shape": torch.Size([3, 4]),
        "text": "abc",
        "none": None,
        "number": 3,
        "thing": thing,
    }
    rows = compact_batch(batch, torch.tensor([2]))
    assert rows["x"].tolist() == [2]
    assert rows["scale"] is scale
    assert rows["names"] == ["a", "b", "c"]
    assert rows["shape"] == torch.Size([3, 4])
    assert rows["text"] == "abc"
    assert rows["none"] is None
    assert rows["number"] == 3
    assert rows["thing"] is thing
    assert compact_batch(["a", scale], torch.tensor([7]))[1] is scale


def test_a_batch_that_contains_itself_raises(backend: str) -> None:
    for endless in ([torch.arange(3)], {"x": torch.arange(3)}):
        endless.append(endless) if isinstance(endless, list) else endless.update(y=endless)
        with pytest.raises(RecursionError):
            compact_batch(endless, torch.tensor([0]))


def test_keys_keep_their_order_and_their_kind(backend: str) -> None:
    x = torch.arange(3)
    batch = {2: x, ("a", 1): [x], None: {}, "1": "text", 1.5: ()}
    rows = compact_batch(batch, torch.tensor([2]))
    assert list(rows) == [2, ("a", 1), None, "1", 1.5]
    assert rows[None] == {}
    assert rows[1.5] == ()


def test_a_tensor_that_occurs_twice_is_served_twice(backend: str) -> None:
    x = torch.arange(4)
    first, second = compact_batch((x, x), torch.tensor([3]))
    assert first.tolist() == second.tolist() == [3]


def test_tensors_on_several_devices_stay_where_they_are() -> None:
    tensors = [torch.arange(4), torch.ones(4, 3, device="meta"), torch.arange(4.0)]
    rows = compact_batch(tensors, torch.tensor([3, 1]))
    assert [row.device for row in rows] == [tensor.device for tensor in tensors]
    assert rows[0].tolist() == rows[2].tolist() == [3, 1]
    assert rows[1].shape == (2, 3)


@pytest.mark.parametrize("batch", [Attributes(x=torch.arange(3)), Columns(torch.arange(3))])
def test_attributes_of_a_container_stay(backend: str, batch: Any) -> None:
    assert compact_batch(batch, torch.tensor([2])).note == "kept"


def test_a_dict_that_changes_meanwhile_is_compacted_as_it_was(backend: str) -> None:
    """As another thread may do while memory is made for the first tensor."""
    batch = {"x": torch.arange(4000), "y": torch.arange(4000)}

    class MovesX(TorchFunctionMode):
        def __torch_function__(self, function: Any, *args: Any, **_: Any) -> Any:
            batch["x"] = batch.pop("x")
            return function(*args[1], **(args[2] if len(args) > 2 else {}))

    indices = torch.tensor([3999, 7])
    with MovesX():
        rows = compact_batch(batch, indices)
    assert sorted(rows) == ["x", "y"]
    assert all(row.tolist() == [3999, 7] for row in rows.values())


def test_a_dataclass_is_copied_as_it_is_whatever_its_constructor_makes(backend: str) -> None:
    @dataclasses.dataclass
    class Made:
        x: Tensor
        seen: dataclasses.InitVar[int]
        mask: Tensor = dataclasses.field(init=False)
        extras: dict[str, Tensor] = dataclasses.field(default_factory=dict, init=False)

        def __post_init__(self, seen: int) -> None:
            self.x = self.x / 255
            self.mask = torch.ones(len(self.x), dtype=torch.bool)

    x, indices = torch.arange(6) * 255.0, torch.tensor([4, 1])
    batch = Made(x, seen=3)
    batch.mask[1:4] = False
    batch.extras["y"] = torch.arange(6)
    rows = compact_batch(batch, indices)
    assert rows.x.tolist() == [4, 1]
    assert rows.mask.tolist() == [True, False]
    assert rows.extras["y"].tolist() == [4, 1]
    assert rows.extras is not batch.extras
    batch.extras["y"] = torch.arange(5)
    with pytest.raises(ValueError, match="batch must have the same size in dimension 0"):
        batch_size(batch)


@pytest.mark.parametrize("slots", [False, True])
@pytest.mark.parametrize("frozen", [False, True])
def test_a_dataclass_keeps_what_was_set_later(backend: str, frozen: bool, slots: bool) -> None:
    @dataclasses.dataclass(frozen=frozen, slots=slots)
    class Later:
        x: Tensor
        mask: Tensor | None = dataclasses.field(init=False, default=None)
        masked: bool = dataclasses.field(init=False, default=False)
        boxes: list[Tensor] = dataclasses.field(init=False)
        never: Tensor = dataclasses.field(init=False)

    x, mask, box, note = torch.arange(6), torch.rand(6) > 0.5, torch.rand(6, 4), torch.rand(6, 2)
    batch, indices = Later(x), torch.tensor([1, 4])
    later = {"mask": mask, "masked": True, "boxes": [box]}
    if not slots:
        later |= {"note": note, "scale": torch.tensor(2.0), "nothing": None}
    for name, value in later.items():
        object.__setattr__(batch, name, value)
    found = compact_batch(batch, indices)
    assert type(found) is Later
    assert found.x.tolist() == [1, 4]
    assert same_bits(found.mask, mask[indices])
    assert found.masked
    assert same_bits(found.boxes[0], box[indices])
    assert not hasattr(found, "never")
    if not slots:
        assert same_bits(found.note, note[indices])
        assert found.scale is batch.scale
    object.__setattr__(batch, "mask", torch.ones(5))
    with pytest.raises(ValueError, match="batch must have the same size in dimension 0"):
        batch_size(batch)


def test_a_dataclass_computes_its_cached_properties_anew(backend: str) -> None:
    @dataclasses.dataclass
    class Texts:
        ids: Tensor

        @functools.cached_property
        def total(self) -> Tensor:
            return self.ids.sum(0, keepdim=True)

    batch = Texts(torch.arange(12).reshape(6, 2))
    assert batch.total.tolist() == [[30, 36]]
    assert batch_size(batch) == 6
    assert compact_batch(batch, torch.tensor([0, 5])).total.tolist() == [[10, 12]]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("kind", ["sparse", "quantized", "nested"])
def test_tensors_without_plain_rows_raise(backend: str, kind: str) -> None:
    x = torch.ones(4, 3)
    bad = {
        "sparse": x.to_sparse,
        "quantized": lambda: torch.quantize_per_tensor(x, 0.1, 0, torch.qint8),
        "nested": lambda: torch.nested.nested_tensor([x, x, x, x]),
    }[kind]()
    batch = {"w": x, "x": [bad]}
    assert batch_size(batch) == 4
    with pytest.raises(TypeError, match=r"dense tensors, got .* at batch\['x'\]\[0\]"):
        compact_batch(batch, torch.tensor([0]))


def test_rows_are_copies_without_gradient(backend: str) -> None:
    x = torch.randn(4, 3, requires_grad=True)
    rows = compact_batch(x, torch.tensor([0, 1, 2, 3]))
    assert not rows.requires_grad
    rows.zero_()
    assert (x != 0).all()


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        ({"x": torch.zeros(4), "y": torch.zeros(5, 2)}, r"batch\['x'\]: 4, batch\['y'\]: 5"),
        ((torch.zeros(4), [torch.zeros(3)]), r"batch\[0\]: 4, batch\[1\]\[0\]: 3"),
        (Sample(torch.zeros(4), torch.zeros(1)), "4, .*1"),
        (Encoding(x=torch.zeros(4), y=torch.zeros(2)), "4, .*2"),
        (
            [torch.zeros(3 + (i == 40)) for i in range(64)],
            r"batch\[4\]: 3, batch\[40\]: 4, ... of 64 tensors; .* torch.arange\(B\)",
        ),
    ],
    ids=["dict", "tuple", "dataclass", "UserDict", "many"],
)
def test_tensors_that_disagree_on_the_batch_size_raise(
    backend: str, batch: Any, message: str
) -> None:
    with pytest.raises(
        ValueError, match=f"same size in dimension 0 of all tensors, got .*{message}"
    ):
        compact_batch(batch, torch.tensor([0]))
    with pytest.raises(ValueError, match="batch must have the same size in dimension 0"):
        batch_size(batch)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "empty"])
def test_batch_size_is_the_size_of_dimension_0(kind: str) -> None:
    assert batch_size(trees(torch.randn(6, 3), torch.arange(6))[kind]) == 6


@pytest.mark.parametrize("batch", [(), ["a", "b"], {"x": torch.tensor(1.0)}, None], ids=repr)
def test_batch_size_of_a_batch_without_batched_tensors_raises(batch: Any) -> None:
    with pytest.raises(ValueError, match="batch must hold a tensor with the samples"):
        batch_size(batch)


def test_a_long_batch_without_tensors_is_not_printed_whole() -> None:
    with pytest.raises(ValueError, match=r"got \{'x': \[0, 1, 2, .*\.\.\.\]\}$") as raised:
        batch_size({"x": list(range(100_000))})
    assert len(str(raised.value)) < 200


def test_a_dataclass_itself_passes_through(backend: str) -> None:
    batch = {"x": torch.arange(3), "kind": Sample}
    assert compact_batch(batch, torch.tensor([2]))["kind"] is Sample


class Split(tuple, enum.Enum):  # type: ignore[type-arg]
    TRAIN = (0, 1)


@pytest.mark.parametrize(
    "leaf", [time.gmtime(0), sys.version_info, Split.TRAIN], ids=lambda leaf: type(leaf).__name__
)
def test_tuples_without_tensors_pass_through(backend: str, leaf: Any) -> None:
    batch = {"x": torch.arange(3), "leaf": leaf}
    assert batch_size(batch) == 3
    assert compact_batch(batch, torch.tensor([2]))["leaf"] is leaf


def test_counts_are_not_added_up(backend: str) -> None:
    labels = Counter(cat=3)
    found = compact_batch({"x": torch.arange(3), "labels": labels}, torch.tensor([2]))["labels"]
    assert type(found) is Counter
    assert found == labels
    found["cat"] += 1
    assert labels["cat"] == 3


def test_slots_of_a_base_are_kept(backend: str) -> None:
    noted = Noted(torch.arange(3))
    noted.note = "kept"
    found = compact_batch(noted, torch.tensor([2]))
    assert found.note == "kept"
    assert torch.equal(found.x, torch.tensor([2]))
