"""``torch.ops.ksam`` under PyTorch's own machinery: opcheck, torch.compile, fakes, versions."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_leaves, tree_map

import ksam_kernels
from ksam_kernels import backends
from ksam_kernels.native import extension
from tests.helpers import sliced, transposed

OPERATORS = [name for names in backends.OPERATORS.values() for name in names]
Samples = list[tuple[Any, ...]]

BF16 = torch.bfloat16
rand = torch.randn


def grad(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return rand(shape).to(dtype).requires_grad_()


def classes(*shape: int) -> Tensor:
    return torch.randint(0, 5, shape)


def cross_entropy() -> Samples:
    return [
        (grad(6, 5), classes(6), None, -100, 0.0),
        (grad(2, 3, 5, dtype=BF16), classes(2, 3).int(), torch.rand(5), -100, 0.1),
        (grad(6, 5), rand(6, 5).softmax(1), torch.rand(5), -100, 0.1),
        (sliced(rand(6, 5)), classes(6), None, 2, 0.0),
        (rand(5), classes(), None, -100, 0.0),
        (rand(0, 5), classes(0), None, -100, 0.0),
        (grad(6, 5, dtype=torch.float64), classes(6), None, -100, 0.0),
        (grad(2, 5, 4, 4).movedim(1, -1), classes(2, 4, 4), torch.rand(5), -100, 0.1),
        (rand(2, 5, 16).movedim(1, -1), rand(2, 16, 5).softmax(2), None, -100, 0.0),
        (rand(1, 5, 16).expand(3, 5, 16).movedim(1, -1), classes(3, 16), None, -100, 0.0),
        (rand(6, 5, 9)[..., ::2].movedim(1, -1), classes(6, 5), None, -100, 0.0),
        (rand(5, 16).t(), classes(16), None, 2, 0.0),
    ]


def cross_entropy_backward() -> Samples:
    samples = []
    for logits, target, weight, ignore_index, smoothing in cross_entropy():
        args = (logits.detach(), target, weight, ignore_index, smoothing)
        losses, stats = torch.ops.ksam.cross_entropy(*args)
        g = torch.ones(()).expand(losses.shape)
        samples.append((g, *args[:2], stats, *args[2:]))
    return samples


def select_cross_entropy() -> Samples:
    flat = [args for args in cross_entropy() if args[0].dim() == 2 and len(args[0]) > 0]
    return [(logits, target, 3, *rest) for logits, target, *rest in flat]


def binary_cross_entropy_with_logits() -> Samples:
    return [
        (grad(6, 5), torch.rand(6, 5), None),
        (grad(6, 2, 5, dtype=BF16), torch.rand(6, 2, 5), torch.rand(5)),
        (transposed(rand(6, 5)), torch.rand(6, 5), None),
        (grad(6), torch.rand(6), None),
        (rand(0, 5), rand(0, 5), None),
    ]


def mse() -> Samples:
    return [args[:2] for args in binary_cross_entropy_with_logits()]


def detached(upstream: Tensor, args: tuple[Any, ...]) -> tuple[Any, ...]:
    return (upstream, args[0].detach(), *args[1:])


def compact() -> Samples:
    indices = torch.tensor([3, 0, 0])
    images = rand(4, 3, 2, 2).contiguous(memory_format=torch.channels_last)
    return [
        ([rand(4, 3), torch.arange(4), images], indices),
        ([rand(4, 6)[:, ::2], rand(4, 3, dtype=torch.complex64)], indices.int()),
        ([rand(4, 3, dtype=torch.float64), torch.zeros(4, 0)], indices[:0]),
        ([], indices),
    ]


def perturb() -> Samples:
    samples: Samples = []
    for adaptive in (False, True):
        params = [rand(4, 3), rand(5).to(BF16), torch.zeros(0)]
        grads = [transposed(rand(4, 3)), rand(5), torch.zeros(0)]
        backup = [torch.zeros_like(p) for p in params]
        samples.append((params, grads, backup, [0.5, 0.0, 0.1], adaptive, 0.1))
    samples.append(([], [], [], [], False, 0.0))
    return samples


def restore_sgd() -> Samples:
    lists = [[rand(4, 3), rand(5).to(BF16)] for _ in range(4)]
    steps = [torch.zeros(()), torch.ones(1)]
    scalars = (torch.tensor([0.1]), torch.tensor([2.0]), torch.tensor([0.0]))
    return [
        (*lists, steps, 0.0, 0.9, 0.1, 0.01, False, True, *scalars),
        (*lists, [], 0.1, 0.9, 0.0, 0.0, True, False, None, None, None),
        (*lists[:3], [], [], 0.1, 0.0, 0.0, 0.0, False, False, None, None, None),
        ([], [], [], [], [], 0.1, 0.0, 0.0, 0.0, False, False, None, None, None),
    ]


def restore_adam() -> Samples:
    lists = [[rand(4, 3), rand(5).to(BF16)] for _ in range(4)]
    lists.append([rand(4, 3).square(), rand(5).square().to(BF16)])
    steps = [torch.zeros(()), torch.ones(1)]
    hyper = (0.1, 0.9, 0.99, 1e-8, 0.01, False)
    scalars = (torch.tensor([0.1]), torch.tensor([2.0]), torch.tensor([0.0]))
    return [
        (*lists, steps, *hyper, True, *scalars),
        (*lists, steps, *hyper, False, None, None, None),
        (*[[]] * 6, *hyper, False, None, None, None),
    ]


SAMPLES: dict[str, Callable[[], Samples]] = {
    "cross_entropy": cross_entropy,
    "cross_entropy_backward": cross_entropy_backward,
    "select_cross_entropy": select_cross_entropy,
    "binary_cross_entropy_with_logits": binary_cross_entropy_with_logits,
    "binary_cross_entropy_with_logits_backward": lambda: [
        detached(rand(len(args[0])), args) for args in binary_cross_entropy_with_logits()
    ],
    "mse": mse,
    "mse_backward": lambda: [detached(rand(len(args[0])), args) for args in mse()],
    "topk_indices": lambda: [(rand(9), 3), (rand(9)[::2].to(BF16), 5), (rand(1).double(), 1)],
    "compact": compact,
    "grad_norm": lambda: [
        (args[1], args[0] if adaptive else [], adaptive, 0.1)
        for args in perturb()
        for adaptive in (False, True)
    ],
    "perturb_": perturb,
    "restore_": lambda: [(args[0], args[1]) for args in restore_sgd()],
    "restore_sgd_": restore_sgd,
    "restore_adam_": restore_adam,
}


def test_no_operator_is_left_out() -> None:
    registered = {name for name in torch._C._dispatch_get_all_op_names() if "ksam::" in name}
    assert {name.removeprefix("ksam::") for name in registered} == set(OPERATORS)
    assert sorted(SAMPLES) == sorted(OPERATORS)


@pytest.mark.parametrize("name", OPERATORS)
def test_opcheck_accepts_every_operator(backend: str, name: str) -> None:
    for args in SAMPLES[name]():
        torch.library.opcheck(getattr(torch.ops.ksam, name).default, args)


def layouts(outputs: Any) -> list[Any]:
    tensors = [leaf for leaf in tree_leaves(outputs) if isinstance(leaf, Tensor)]
    return [(t.shape, t.dtype, t.stride(), t.device) for t in tensors]


@pytest.mark.parametrize("name", OPERATORS)
def test_fake_tensors_have_the_shapes_dtypes_and_strides_of_real_ones(
    backend: str, name: str
) -> None:
    operator = getattr(torch.ops.ksam, name)
    for args in SAMPLES[name]():
        with torch.no_grad():
            real = operator(*args)
        with FakeTensorMode() as mode:
            fake = operator(
                *tree_map(lambda a: mode.from_tensor(a) if isinstance(a, Tensor) else a, args)
            )
        assert layouts(fake) == layouts(real)


@pytest.mark.parametrize("name", OPERATORS)
def test_version_counters_are_bumped_by_what_the_schema_says_is_written(
    backend: str, name: str
) -> None:
    operator = getattr(torch.ops.ksam, name)
    arguments = operator.default._schema.arguments
    for args in SAMPLES[name]():
        args = tree_map(lambda a: a.detach().clone() if isinstance(a, Tensor) else a, args)
        operator(*args)
        for argument, value in zip(arguments, args, strict=True):
            written = argument.alias_info is not None and argument.alias_info.is_write
            for tensor in tree_leaves(value):
                if isinstance(tensor, Tensor):
                    assert (tensor._version > 0) == written, argument.name


MUTATED = {
    "perturb_": {"params", "backup"},
    "restore_": {"params"},
    "restore_sgd_": {"params", "momentum_buffers", "steps"},
    "restore_adam_": {"params", "exp_avgs", "exp_avg_sqs", "steps"},
}


@pytest.mark.parametrize("name", OPERATORS)
def test_the_schema_declares_what_is_written(name: str) -> None:
    arguments = getattr(torch.ops.ksam, name).default._schema.arguments
    written = {a.name for a in arguments if a.alias_info is not None and a.alias_info.is_write}
    assert written == MUTATED.get(name, set())


@pytest.mark.parametrize(
    ("name", "lists", "options"),
    [
        ("perturb_", ("params", "grads", "backup"), {"rho": 1.0}),
        ("restore_", ("params", "backup"), {}),
        (
            *("restore_sgd_", ("params", "backup", "grads", "momentum_buffers", "steps")),
            {"lr": 0.1, "momentum": 0.9},
        ),
        (
            *("restore_adam_", ("params", "backup", "grads", "exp_avgs", "exp_avg_sqs", "steps")),
            {"lr": 0.1},
        ),
    ],
    ids=MUTATED,
)
def test_functions_bump_version_counters_as_operators_do(
    backend: str, name: str, lists: tuple[str, ...], options: dict[str, float]
) -> None:
    """Also where they call a kernel without PyTorch's dispatcher."""
    tensors = {each: torch.zeros(() if each == "steps" else 3) for each in lists}
    getattr(ksam_kernels, name)(**{each: [t] for each, t in tensors.items()}, **options)
    assert {each for each, t in tensors.items() if t._version > 0} == MUTATED[name]


def test_a_compiled_step_equals_the_eager_one(backend: str) -> None:
    def step(w: Tensor, x: Tensor, y: Tensor, kept: Tensor) -> tuple[Any, ...]:
        losses = ksam_kernels.cross_entropy(x @ w, y, label_smoothing=0.1)
        indices = ksam_kernels.topk_indices(losses.detach(), 4)
        batch = ksam_kernels.compact_batch({"x": x, "y": y}, indices)
        g = batch["x"].t() @ batch["x"] @ w
        norm = ksam_kernels.perturb_([w], [g], [kept], rho=0.5)
        return losses, indices, batch["x"], batch["y"], norm, w.clone()

    x, y, w = rand(9, 7), classes(9), rand(7, 5)
    results = []
    for run in (step, torch.compile(step, fullgraph=True, backend="aot_eager")):
        weights, kept = w.clone(), torch.zeros_like(w)
        results.append([*run(weights, x, y, kept), weights, kept])
    for eager, compiled in zip(*results, strict=True):
        assert torch.equal(eager, compiled)
    assert torch.equal(results[1][-1], w)
    assert not torch.equal(results[1][-2], w)


@pytest.mark.parametrize("select", [False, True], ids=["cross_entropy", "select_cross_entropy"])
def test_a_compiled_loss_has_the_eager_gradient(backend: str, select: bool) -> None:
    def loss(x: Tensor, y: Tensor) -> Tensor:
        if not select:
            return ksam_kernels.cross_entropy(x, y).mean()
        losses, indices = ksam_kernels.select_cross_entropy(x, y, 3)
        return losses[indices].mean()

    y = classes(9)
    one, two = grad(9, 5), torch.zeros(0)
    two = one.detach().clone().requires_grad_()
    loss(one, y).backward()
    torch.compile(loss, fullgraph=True, backend="aot_eager")(two, y).backward()
    assert one.grad is not None
    assert two.grad is not None
    assert torch.equal(one.grad, two.grad)


def test_compiled_losses_of_pixels_share_a_program(backend: str) -> None:
    def loss(x: Tensor, y: Tensor) -> Tensor:
        return ksam_kernels.cross_entropy(x.movedim(1, -1), y).flatten(1).mean(1).max()

    programs = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(loss, fullgraph=True, backend=programs)
    for size in range(4, 9):
        x, y = grad(size, 5, size, 7), classes(size, size, 7)
        (found,) = torch.autograd.grad(compiled(x, y), x)
        (expected,) = torch.autograd.grad(loss(x, y), x)
        assert torch.equal(found, expected)
        assert found.stride() == x.stride()
    assert programs.frame_count <= 2


def test_a_compiled_restore_and_update_equals_the_eager_one(backend: str) -> None:
    def update(w: Tensor, kept: Tensor, g: Tensor, v: Tensor, t: Tensor) -> None:
        ksam_kernels.restore_sgd_([w], [kept], [g], [v], steps=[t], lr=0.1, momentum=0.9)
        ksam_kernels.restore_adam_([w], [w], [g], [v], [v.square()], [t], lr=0.1)

    tensors = [rand(7, 5) for _ in range(4)] + [torch.zeros(1)]
    results = []
    for run in (update, torch.compile(update, fullgraph=True, backend="aot_eager")):
        copies = [t.clone() for t in tensors]
        run(*copies)
        results.append(copies)
    for eager, compiled in zip(*results, strict=True):
        assert torch.equal(eager, compiled)


def test_a_learning_rate_that_changes_compiles(backend: str) -> None:
    def update(w: Tensor, kept: Tensor, g: Tensor, v: Tensor, t: Tensor, rate: float) -> None:
        ksam_kernels.perturb_([w], [g], [kept], rho=rate)
        ksam_kernels.restore_sgd_([w], [kept], [g], [v], steps=[t], lr=rate, momentum=0.9)
        ksam_kernels.restore_adam_([w], [w], [g], [v], [v.square()], [t], lr=rate)

    tensors = [rand(7, 5) for _ in range(4)] + [torch.zeros(1)]
    results = []
    for run in (update, torch.compile(update, fullgraph=True, backend="aot_eager")):
        copies = [t.clone() for t in tensors]
        for rate in (0.3, 0.2, 0.1):
            run(*copies, rate)
        results.append(copies)
    for eager, compiled in zip(*results, strict=True):
        assert torch.equal(eager, compiled)


def test_batches_of_any_size_share_a_compiled_program(backend: str) -> None:
    def select(x: Tensor, y: Tensor) -> Any:
        indices = ksam_kernels.topk_indices(ksam_kernels.cross_entropy(x, y), 2)
        return ksam_kernels.compact_batch({"x": x, "y": y}, indices)

    programs = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(select, fullgraph=True, backend=programs)
    for size in range(3, 9):
        x, y = rand(size, 5), classes(size)
        found, expected = compiled(x, y), select(x, y)
        assert torch.equal(found["x"], expected["x"])
        assert torch.equal(found["y"], expected["y"])
    assert programs.frame_count <= 2  # for the first size, then for all


@pytest.mark.parametrize("strict", [False, True])
def test_a_batch_of_open_size_is_exported(backend: str, strict: bool) -> None:
    class Rows(torch.nn.Module):
        def forward(self, x: Tensor, indices: Tensor) -> Any:
            return ksam_kernels.compact_batch({"x": x}, indices)["x"]

    x, indices = rand(6, 3), torch.tensor([1, 0])
    sizes = {"x": {0: torch.export.Dim("B")}, "indices": None}
    program = torch.export.export(Rows(), (x, indices), dynamic_shapes=sizes, strict=strict)
    x = rand(9, 3)
    assert torch.equal(program.module()(x, torch.tensor([8, 2])), x[[8, 2]])


@pytest.mark.filterwarnings("ignore:`torch.jit.trace` is (deprecated|not supported)")
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_a_traced_function_computes_anew(backend: str) -> None:
    def losses_and_indices(x: Tensor) -> tuple[Tensor, Tensor]:
        losses = ksam_kernels.cross_entropy(x, torch.tensor([0, 1, 2, 3]))
        return losses, ksam_kernels.topk_indices(losses, 2)

    traced = torch.jit.trace(losses_and_indices, (rand(4, 5),))
    x = rand(4, 5)
    for found, expected in zip(traced(x), losses_and_indices(x), strict=True):
        assert torch.equal(found, expected)


@pytest.mark.skipif(extension is None, reason="the extension is not built")
@pytest.mark.parametrize("name", backends.OPERATORS["perturb"])
def test_the_extension_takes_the_operators_arguments_in_their_order(name: str) -> None:
    """They are passed by position."""
    signature = getattr(extension, name).__doc__.partition(", /)")[0]
    found = [n for n in re.findall(r"(\w+): ", signature) if n != "norm"]  # what it writes, last
    operator = getattr(torch.ops.ksam, name).default
    assert found == [argument.name for argument in operator._schema.arguments]


@pytest.mark.filterwarnings("ignore:There is a performance drop")  # no batching rule: PyTorch loops
def test_functorch_transforms_without_gradients_see_the_operators(backend: str) -> None:
    losses = torch.randn(3, 8)

    def indices(x: Tensor) -> Tensor:
        return ksam_kernels.topk_indices(x, 3)

    expected = torch.stack([indices(x) for x in losses])
    assert torch.equal(torch.func.vmap(indices)(losses), expected)
    assert torch.equal(torch.func.functionalize(indices)(losses[0]), expected[0])
