"""Contract of ``binary_cross_entropy_with_logits`` and ``mse``, against torch in float64."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from ksam_kernels import binary_cross_entropy_with_logits as bce
from ksam_kernels import mse
from tests.device import DEVICE
from tests.helpers import (
    FLOATS,
    U32,
    all_same_bits,
    arithmetic_unit,
    assert_within,
    bits,
    same_bits,
    sliced,
    smallest,
    transposed,
    unit,
)
from tests.loss.oracle import mean_per_sample

SHAPES = ((1,), (6,), (6, 1), (6, 7), (6, 8), (6, 33), (2, 3, 5), (2, 3, 4, 5), (3, 4097), (0, 5))
INF, NAN = float("inf"), float("nan")


def tolerance(dtype: torch.dtype, size: Tensor, samples: Tensor) -> Tensor:
    """``size``: the mean of the absolute values of all terms. Each element has up to 8 roundings,
    the sum of n of them sqrt(n) more, the result one to float32. Below the normal numbers the
    roundings of exp, log1p, the product and the sum are absolute, half a denormal and more each."""
    n = max(samples.numel() // max(len(samples), 1), 1)
    u = arithmetic_unit(dtype)
    return u * (8 + math.sqrt(n)) * size + unit(torch.float32) * size + 4 * smallest(torch.float32)


def check_bce(x: Tensor, t: Tensor, pos_weight: Tensor | None = None) -> None:
    before = bits(x)
    p = None if pos_weight is None else pos_weight.double()
    y = x.detach().double().requires_grad_()
    truth = mean_per_sample(
        F.binary_cross_entropy_with_logits(y, t.double(), pos_weight=p, reduction="none")
    )
    z = x.detach().requires_grad_()
    losses = bce(z, t, pos_weight=pos_weight)
    assert losses.dtype == torch.float32
    # Not 1 + (p - 1) t, whose terms cancel where p is near 0 and t near 1, their roundings not.
    positive = 1 + (0.0 if p is None else (p - 1).abs()) * t.double()
    terms = (1 - t.double()).abs() * y.abs() + positive * F.softplus(-y)
    assert_within(losses, truth, tolerance(x.dtype, mean_per_sample(terms).detach(), x))
    upstream = torch.randn(len(x))
    (expected,) = torch.autograd.grad(truth, y, upstream.double())
    (gradient,) = torch.autograd.grad(losses, z, upstream)
    n = max(x.numel() // max(len(x), 1), 1)
    g = (upstream.double() / n).reshape(-1, *[1] * (x.dim() - 1)).abs()
    # (1 - t) - positive * sigmoid(-x): positive has 3 roundings, sigmoid 4 (its exp, to two units
    # in the last place, is half of 1 + exp or less), the product and the difference 1 each, g / n
    # times it 2. For float64 the oracle, (1 - t + p t) sigmoid(x) - p t, is no more exact.
    u = arithmetic_unit(x.dtype) * (2 if x.dtype == torch.float64 else 1)
    bound = 11 * u * g * ((1 - t.double()).abs() + positive)
    assert gradient.dtype == x.dtype
    assert_within(gradient, expected, bound + unit(x.dtype) * expected.abs() + smallest(x.dtype))
    assert torch.equal(bits(x), before)


def check_mse(x: Tensor, t: Tensor) -> None:
    before = bits(x)
    y = x.detach().double().requires_grad_()
    truth = mean_per_sample(F.mse_loss(y, t.double(), reduction="none"))
    z = x.detach().requires_grad_()
    losses = mse(z, t)
    assert losses.dtype == torch.float32
    # The difference has one rounding however close the two are, its square no cancellation; a
    # target of more digits than the arithmetic is rounded first.
    u = arithmetic_unit(x.dtype)
    lost = u * t.double().abs() if t.dtype == torch.float64 else torch.zeros(())
    rounding = mean_per_sample(3 * lost * (y - t.double()).abs()).detach() + 0 * truth.detach()
    assert_within(losses, truth, tolerance(x.dtype, truth.detach(), x) + rounding)
    upstream = torch.randn(len(x))
    (expected,) = torch.autograd.grad(truth, y, upstream.double())
    (gradient,) = torch.autograd.grad(losses, z, upstream)
    n = max(x.numel() // max(len(x), 1), 1)
    g = (upstream.double() / n).reshape(-1, *[1] * (x.dim() - 1)).abs()
    bound = (unit(x.dtype) + 6 * u) * expected.abs() + smallest(x.dtype) + 3 * g * lost
    assert gradient.dtype == x.dtype
    assert_within(gradient, expected, bound)
    assert torch.equal(bits(x), before)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_bce_and_its_gradient_equal_those_of_torch(
    backend: str, dtype: torch.dtype, shape: tuple[int, ...]
) -> None:
    x, t = (4 * torch.randn(shape)).to(dtype), torch.rand(shape).to(dtype)
    check_bce(x, t)
    check_bce(x, t.round())
    check_bce(x, t, torch.rand(shape[1:]) * 3)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_mse_and_its_gradient_equal_those_of_torch(
    backend: str, dtype: torch.dtype, shape: tuple[int, ...]
) -> None:
    check_mse(torch.randn(shape).to(dtype), torch.randn(shape).to(dtype))


# The native kernels go over samples of fewer than 16 elements in vectors of 16 and blocks of 2048,
# which a remainder below 16 joins.
BLOCK = 2048
SIZES = (1, 15, 16, 17, BLOCK - 1, BLOCK, BLOCK + 1, BLOCK + 15, BLOCK + 16, BLOCK + 17, 2 * BLOCK)


def narrow(elements: int, n: int) -> tuple[int, ...]:
    """A shape of at least so many elements, ``n`` a sample."""
    samples = -(-elements // n)
    return (samples,) if n == 1 else (samples, n)


@pytest.mark.parametrize("n", [1, 2, 7, 15])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_every_element_of_narrow_samples_counts_once(
    backend: str, dtype: torch.dtype, n: int
) -> None:
    for elements in SIZES:
        shape = narrow(elements, n)
        x, t = (4 * torch.randn(shape)).to(dtype), torch.rand(shape).to(dtype)
        check_bce(x, t)
        check_bce(x, t, torch.rand(shape[1:]) * 3)
        check_mse(x, t)


def results(loss: Callable[..., Tensor], x: Tensor, t: Tensor, upstream: Tensor) -> list[Tensor]:
    y = x.detach().requires_grad_()
    losses = loss(y, t)
    return [losses, *torch.autograd.grad(losses, y, upstream)]


@pytest.mark.usefixtures("native")
@pytest.mark.parametrize("target_dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("n", [1, 2, 7, 15])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_a_narrow_sample_has_the_same_bits_in_any_batch_and_layout(
    dtype: torch.dtype, n: int, target_dtype: torch.dtype
) -> None:
    shape = narrow(2 * BLOCK + 5, n)
    samples, p = shape[0], torch.rand(shape[1:]) * 3
    x, t = torch.randn(shape).to(dtype), torch.rand(shape).to(target_dtype)
    upstream = torch.randn(samples), torch.ones(()).expand(samples), torch.randn(samples, 2)[:, 1]
    for g in upstream:
        for loss in (mse, bce, partial(bce, pos_weight=p)):
            whole = results(loss, x, t, g)
            assert all_same_bits(results(loss, sliced(x), sliced(t), g.clone()), whole)
            for i, j in ((0, 1), (1, 3), (samples - 17, samples), (5, samples - 1)):
                part = results(loss, x[i:j], t[i:j], g[i:j])
                assert all_same_bits(part, [result[i:j] for result in whole])


@pytest.mark.parametrize("layout", [sliced, transposed], ids=["sliced", "transposed"])
def test_strided_inputs(backend: str, layout: Callable[[Tensor], Tensor]) -> None:
    x, t = torch.randn(4, 5, 6), torch.rand(4, 5, 6)
    check_bce(layout(x), t, torch.rand(6))
    check_bce(x, layout(t), torch.rand(12)[::2])
    check_mse(layout(x), t)
    check_mse(x, layout(t))
    check_mse(x[:, ::2], t[:, :1].expand(4, 3, 6))


def channels_last(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last)


def rows_last(x: Tensor) -> Tensor:
    """[B, C, H, W] whose memory is [B, W, C, H]."""
    return x.permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1)


@pytest.mark.parametrize("layout", [channels_last, rows_last])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_samples_in_another_memory_format(
    backend: str, dtype: torch.dtype, layout: Callable[[Tensor], Tensor]
) -> None:
    """They are not copied, and their gradient has their layout."""
    x, t = torch.randn(3, 2, 5, 4).to(dtype), torch.rand(3, 2, 5, 4).to(dtype)
    for target in (t, layout(t), rows_last(t)):
        check_mse(layout(x), target)
        for shape in ((), (4,), (5, 1), (2, 1, 1), (2, 5, 4)):
            check_bce(layout(x), target, torch.rand(shape) * 4)
        for loss in (mse, bce):
            z = layout(x).requires_grad_()
            (gradient,) = torch.autograd.grad(loss(z, target).sum(), z)
            assert gradient.stride() == z.stride()


@pytest.mark.parametrize("loss", [mse, bce])
def test_samples_in_another_memory_format_are_not_copied(
    backend: str, loss: Callable[..., Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    x, t = channels_last(torch.randn(3, 2, 5, 4)), channels_last(torch.rand(3, 2, 5, 4))
    contiguous = Tensor.contiguous

    def spy(x: Tensor) -> Tensor:
        assert x.is_contiguous()
        return contiguous(x)

    monkeypatch.setattr(Tensor, "contiguous", spy)
    loss(x.requires_grad_(), t).sum().backward()
    assert x.grad is not None
    assert x.grad.stride() == x.stride()


def test_a_compiled_loss_in_another_memory_format(backend: str) -> None:
    x, t = channels_last(torch.randn(3, 2, 5, 4)).requires_grad_(), torch.rand(3, 2, 5, 4)
    compiled = torch.compile(lambda x: mse(x, t).sum(), fullgraph=True, backend="aot_eager")
    (gradient,) = torch.autograd.grad(compiled(x), x)
    (expected,) = torch.autograd.grad(mse(x, t).sum(), x)
    assert same_bits(gradient, expected)
    assert gradient.stride() == x.stride()


@pytest.mark.parametrize("target_dtype", FLOATS, ids=str)
def test_targets_of_another_dtype(backend: str, target_dtype: torch.dtype) -> None:
    x, t = torch.randn(4, 9), torch.rand(4, 9).to(target_dtype)
    check_bce(x, t, torch.rand(9).to(target_dtype))
    check_mse(x, t)
    check_mse(x.bfloat16(), t)


@pytest.mark.parametrize("shape", [(), (1,), (5,), (1, 5), (3, 1), (3, 5)], ids=str)
def test_pos_weight_broadcasts_to_the_trailing_dimensions(
    backend: str, shape: tuple[int, ...]
) -> None:
    check_bce(torch.randn(4, 3, 5), torch.rand(4, 3, 5), torch.rand(shape) * 4)


@pytest.mark.parametrize("layout", [sliced, lambda w: torch._neg_view(-w)], ids=["gaps", "negated"])
def test_pos_weights_of_any_layout(backend: str, layout: Callable[[Tensor], Tensor]) -> None:
    check_bce(torch.randn(6, 5), torch.rand(6, 5), layout(torch.rand(5)))


def test_bce_of_large_logits_neither_overflows_nor_loses_digits(backend: str) -> None:
    values = [-1e38, -1e4, -100.0, -90.0, -50.0, -0.0, 0.0, 50.0, 90.0, 100.0, 1e4, 1e38]
    x = torch.tensor(values)
    for t in (0.0, 0.25, 1.0):
        check_bce(x, torch.full_like(x, t), torch.tensor(2.0))


@pytest.mark.parametrize("value", [INF, -INF, NAN])
@pytest.mark.parametrize("t", [0.0, 0.5, 1.0])
def test_infinities_and_nan_give_what_torch_gives(backend: str, t: float, value: float) -> None:
    x = torch.tensor([[value, 0.0], [1.0, 2.0]])
    y = torch.full_like(x, t)
    for ours, theirs in (
        (bce(x, y), F.binary_cross_entropy_with_logits(x, y, reduction="none").mean(1)),
        (mse(x, y), F.mse_loss(x, y, reduction="none").mean(1)),
    ):
        assert_within(ours, theirs, 1e-6)
        assert ours[1].isfinite()


def test_bfloat16_inputs_do_not_collapse_the_losses(backend: str) -> None:
    x, t = torch.randn(2048, 10).bfloat16(), torch.rand(2048, 10).bfloat16()
    for loss in (bce, mse):
        distinct = loss(x.float(), t.float()).unique().numel()
        assert distinct > 1900
        assert abs(loss(x, t).unique().numel() - distinct) <= 0.01 * distinct


@pytest.mark.parametrize("loss", [bce, mse], ids=["bce", "mse"])
def test_an_upstream_gradient_of_stride_0(backend: str, loss: Callable[..., Tensor]) -> None:
    x, t = torch.randn(4, 5), torch.rand(4, 5)
    y, z = x.clone().requires_grad_(), x.clone().requires_grad_()
    loss(y, t).mean().backward()
    loss(z, t).backward(torch.full((4,), 0.25))
    assert y.grad is not None
    assert z.grad is not None
    assert same_bits(y.grad, z.grad)


@pytest.mark.parametrize("shape", [(0,), (0, 0), (0, 5), (0, 5, 0)], ids=str)
@pytest.mark.parametrize("loss", [bce, mse])
def test_no_samples_give_no_losses(
    backend: str, loss: Callable[..., Tensor], shape: tuple[int, ...]
) -> None:
    x = torch.zeros(shape, requires_grad=True)
    losses = loss(x, torch.zeros(shape))
    assert losses.shape == (0,)
    (gradient,) = torch.autograd.grad(losses.sum(), x)
    assert gradient.shape == shape


X, T = torch.randn(3, 5), torch.rand(3, 5)
GRAD = torch.rand(3, 5, requires_grad=True)


@pytest.mark.parametrize(("loss", "name"), [(bce, "logits"), (mse, "pred")], ids=["bce", "mse"])
def test_what_they_cannot_serve_raises_with_the_argument_and_the_value(
    backend: str, loss: Callable[..., Tensor], name: str
) -> None:
    for x, t, error, message in (
        ([1.0], T, TypeError, f"{name} must be a tensor, got list"),
        (X.int(), T, TypeError, f"{name} must be float32.*got torch.int32"),
        (X.sum(), T.sum(), ValueError, rf"{name} must be \[B, ...\].*got shape \(\)"),
        (X[:, :0], T[:, :0], ValueError, rf"{name} must be .*got shape \(3, 0\)"),
        (X, [1.0], TypeError, "target must be a tensor, got list"),
        (X, T.long(), TypeError, "target must be float32.*got torch.int64"),
        (X, T[0], ValueError, r"target must have .*\(3, 5\), got shape \(5,\)"),
        (X[:, 0], T[:, :1], ValueError, r"target must have .*\(3,\), got shape \(3, 1\)"),
        (X, T.to("meta"), ValueError, f"target must be on .*{name}, {X.device}, got meta"),
        (X, GRAD, ValueError, r"target must not require grad, .* target\.detach\(\)"),
    ):
        with pytest.raises(error, match=message):
            loss(x, t)


@pytest.mark.parametrize(
    ("pos_weight", "error", "message"),
    [
        (torch.ones(4), ValueError, r"pos_weight must broadcast .*\(5,\), got shape \(4,\)"),
        (torch.ones(3, 5), ValueError, r"pos_weight must broadcast .*got shape \(3, 5\)"),
        (torch.ones(5, 1), ValueError, r"pos_weight must broadcast .*got shape \(5, 1\)"),
        (torch.ones(5).int(), TypeError, "pos_weight must be float32.*got torch.int32"),
        (torch.ones(5, device="meta"), ValueError, f"pos_weight must .*{DEVICE.type}.*got meta"),
        (torch.ones(5, requires_grad=True), ValueError, "pos_weight must not require grad"),
    ],
    ids=["short", "per sample", "column", "int", "elsewhere", "grad"],
)
def test_a_pos_weight_it_cannot_serve_raises(
    backend: str, pos_weight: Tensor, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        bce(X, T, pos_weight=pos_weight)


@pytest.mark.parametrize("loss", [bce, mse], ids=["bce", "mse"])
def test_memory_formats_of_open_sizes_compile_whole(
    backend: str, loss: Callable[..., Tensor]
) -> None:
    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True, dynamic=True)
    for size in (5, 6, 7):
        x = torch.randn(3, 4, size, size + 1).to(memory_format=torch.channels_last)
        t = torch.rand(3, 4, size, size + 1)
        assert same_bits(compiled(x, t), loss(x, t))


def test_long_samples_keep_their_digits(backend: str) -> None:
    """As a million voxels, all near one another: roundings of one running sum would add up to 300
    and 1,000 units. Native adds up to 128 terms in a lane, and 16 lanes; torch fewer in a row."""
    if backend in ("simt", "triton-interpreter"):
        pytest.skip("its threads are simulated: it would take minutes")
    x = torch.full((1, 1 << 22), 0.1)
    exact = x[:, 0].double().square()
    assert_within(mse(x, torch.zeros_like(x)), exact, 144 * U32 * exact)
    zeros = torch.zeros(1, 1 << 24)
    exact = torch.full((1,), math.log(2), dtype=torch.float64)
    assert_within(bce(zeros, zeros), exact, 144 * U32 * exact)


@pytest.mark.parametrize("name", ["mse", "binary_cross_entropy_with_logits"])
def test_the_gradient_of_samples_apart_is_as_its_fake_says(backend: str, name: str) -> None:
    x = torch.randn(5, 4, 6).transpose(0, 1)[..., ::2]
    rest = () if name == "mse" else (None,)
    dx = getattr(torch.ops.ksam, f"{name}_backward")(torch.ones(4), x, torch.rand_like(x), *rest)
    assert dx.is_contiguous()


@pytest.mark.parametrize("n", [1, 5, 16, 40])
def test_a_gradient_of_numbers_far_apart_does_not_overflow(backend: str, n: int) -> None:
    x = torch.full((2, n), 3e38, requires_grad=True)
    (gradient,) = torch.autograd.grad(mse(x, torch.zeros(2, n)), x, torch.full((2,), 1e-3))
    expected = torch.full((2, n), 6e38 * (1e-3 / n))
    torch.testing.assert_close(gradient, expected, rtol=1e-6, atol=0)
