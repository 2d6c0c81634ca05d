"""Lists of DTensors: what four ranks do to their parts is what one does to whole tensors."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import ksam_kernels as kk
from ksam_kernels import use_backend
from tests import ranks
from tests.helpers import all_same_bits
from tests.ranks import put_together

pytestmark = ranks.needs_ranks

RANKS = 4
#: Shape, dtype, and how a mesh of 2 x 2 has it: "R" a copy on every rank, a digit the dimension
#: along which it is cut; None: no DTensor, but the same tensor on every rank.
TENSORS = [
    ((5, 3), torch.float32, "0R"),
    ((4097,), torch.float32, "R0"),
    ((6, 4), torch.float32, "01"),
    ((1,), torch.float32, "00"),  # three ranks have nothing of it
    ((8, 2), torch.float32, "RR"),
    ((7,), torch.bfloat16, "00"),
    ((9,), torch.float64, "R0"),
    ((3, 3), torch.float32, None),
    ((0, 2), torch.float32, "0R"),
]


def whole(scale: float = 1.0) -> list[Tensor]:
    """The same on every rank."""
    return [(torch.randn(shape) * scale).to(dtype) for shape, dtype, _ in TENSORS]


def cut(tensor: Tensor, mesh: Any, placements: list[Any]) -> Any:
    """The DTensor of what all ranks have: each takes its part, and tells the others nothing."""
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(tensor.clone(), mesh, placements, src_data_rank=None)


def placed(tensors: list[Tensor], mesh: Any) -> list[Tensor]:
    from torch.distributed.tensor import Replicate, Shard

    found = []
    for tensor, (_, _, how) in zip(tensors, TENSORS, strict=True):
        if how is None:
            found.append(tensor.clone())
            continue
        placements = [Replicate() if letter == "R" else Shard(int(letter)) for letter in how]
        found.append(cut(tensor, mesh, placements))
    return found


def same_on_all_ranks(tensor: Tensor) -> bool:
    copies = [torch.empty_like(tensor) for _ in range(RANKS)]
    torch.distributed.all_gather(copies, tensor)
    return all_same_bits(copies, [tensor] * RANKS)


def check_norms(mesh: Any, adaptive: bool) -> None:
    for scale in (1.0, 1e30, 1e-30, 0.0):
        w, g = whole(), whole(scale)
        weights = {"params": w, "eta": 0.1} if adaptive else {}
        expected = kk.grad_norm(g, **weights)
        if adaptive:
            weights["params"] = placed(w, mesh)
        with warnings.catch_warnings():  # pytest does not see what a rank warns of
            warnings.simplefilter("error")
            found = kk.grad_norm(placed(g, mesh), **weights)
        assert same_on_all_ranks(found)
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)


def check_perturbation(mesh: Any, adaptive: bool) -> None:
    w, g, backup = whole(), whole(), whole()
    rho = [0.1 * (i + 1) for i in range(len(w))]
    options: dict[str, Any] = {"rho": rho, "adaptive": adaptive, "eta": 0.1 if adaptive else 0.0}
    params, grads, kept = placed(w, mesh), placed(g, mesh), placed(backup, mesh)
    before = [p.clone() for p in w]
    expected = kk.perturb_(w, g, backup, **options)
    norm = kk.perturb_(params, grads, kept, **options)
    assert same_on_all_ranks(norm)
    torch.testing.assert_close(norm, expected, rtol=1e-6, atol=0)
    assert all_same_bits(put_together(kept), before)
    moved = put_together(params)
    for p, q, old in zip(moved, w, before, strict=True):
        assert same_on_all_ranks(p)  # copies stay copies
        # The norm that ranks tell each other is float32: of another last bit.
        torch.testing.assert_close(
            p, q, rtol=8e-3 if p.dtype == torch.bfloat16 else 1e-6, atol=1e-7
        )
        assert p.numel() == 0 or not torch.equal(p, old)
    kk.restore_(params, kept)
    assert all_same_bits(put_together(params), before)


def check_nothing_moves(mesh: Any) -> None:
    """Where one rank's part of one gradient is not finite, or all are zero."""
    for value in (float("nan"), float("inf"), 0.0):
        w, g = whole(), whole(0.0 if value == 0 else 1.0)
        g[1][-1] = value  # of the last rank
        params = placed(w, mesh)
        norm = kk.perturb_(params, placed(g, mesh), placed(w, mesh), rho=0.1)
        assert not norm.isfinite() or norm == 0
        assert all_same_bits(put_together(params), w)


def check_updates(mesh: Any) -> None:
    w, backup, g = whole(), whole(), whole()
    one, two = whole(), [t.abs() for t in whole()]
    updates: list[tuple[Callable[..., None], int, dict[str, Any]]] = [
        (kk.restore_sgd_, 0, {"lr": 0.1, "weight_decay": 0.01}),
        (kk.restore_sgd_, 1, {"lr": torch.tensor(0.1), "momentum": 0.9, "nesterov": True}),
        (kk.restore_adam_, 2, {"lr": 0.1, "weight_decay": 0.01, "decoupled_weight_decay": True}),
    ]
    for update, count, options in updates:
        for found_inf in (None, torch.zeros(()), torch.ones(())):
            lists = [[t.clone() for t in ts] for ts in (w, backup, g, one, two)]
            counters = [torch.full((), 3.0) for _ in w]
            steps = {"steps": counters} if update is kk.restore_adam_ else {}
            own = [placed(ts, mesh) for ts in lists]
            own_steps = {"steps": [c.clone() for c in counters]} if steps else {}
            states, own_states = lists[3 : 3 + count] or [[]], own[3 : 3 + count] or [[]]
            update(*lists[:3], *states, **steps, **options, found_inf=found_inf)
            update(*own[:3], *own_states, **own_steps, **options, found_inf=found_inf)
            for ours, theirs in zip(own, lists, strict=True):
                assert all_same_bits(put_together(ours), theirs)
            assert own_steps == steps


def check_placements(mesh: Any) -> None:
    from torch.distributed.tensor import DTensor, Partial, Replicate, Shard

    w, g = torch.randn(4, 4), torch.randn(4, 4)
    param = cut(w, mesh, [Shard(0), Replicate()])
    # Half of the sum on each rank along the first dimension.
    partial = DTensor.from_local(g / 2, mesh, [Partial(), Replicate()])
    torch.testing.assert_close(kk.grad_norm([partial]), kk.grad_norm([g]), rtol=1e-6, atol=0)
    expected = w.clone()
    kk.perturb_([expected], [g], [w.clone()], rho=0.1)
    kk.perturb_([param], [partial], [torch.empty_like(param)], rho=0.1)
    torch.testing.assert_close(param.full_tensor(), expected, rtol=1e-6, atol=1e-7)
    other = cut(w, mesh, [Shard(1), Replicate()])
    with pytest.raises(ValueError, match=r"backup\[0\] must be placed like its parameter"):
        kk.restore_([param], [other])
    with pytest.raises(ValueError, match=r"backup\[0\] must be placed .* got .* not a DTensor"):
        kk.restore_([param], [w])


def check_other_meshes(mesh: Any) -> None:
    """The same placements on a mesh that has the ranks in another order are other parts."""
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import Replicate, Shard

    twisted = DeviceMesh("cpu", torch.arange(RANKS).reshape(2, 2).T)
    w, how = torch.randn(4, 4), [Shard(0), Replicate()]
    param, other = (cut(w, m, how) for m in (mesh, twisted))
    with pytest.raises(ValueError, match=r"backup\[0\] must be placed like its parameter"):
        kk.restore_([param], [other])
    with pytest.raises(ValueError, match=r"grads\[0\] must be placed like its parameter"):
        kk.perturb_([param], [other], [param.clone()], rho=0.1)
    with pytest.raises(ValueError, match=r"backup\[1\] must be placed .* not a DTensor, got"):
        kk.restore_([param, w], [param.clone(), param.clone()])


def check_an_error(mesh: Any) -> None:
    """Between tensors that are cut in one way and those that are cut in another."""
    from ksam_kernels.perturb import sharded

    w, dispatch, calls = whole(), sharded.library.dispatch, []
    params = placed(w, mesh)

    def fails(name: str, *args: Any) -> Any:
        calls.append(name)
        if name == "perturb_" and calls.count(name) == 3:
            assert not all_same_bits(put_together(params), w)
            raise RuntimeError("half-way")
        return dispatch(name, *args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sharded.library, "dispatch", fails)
        with pytest.raises(RuntimeError, match="half-way"):
            kk.perturb_(params, placed(whole(), mesh), placed(w, mesh), rho=0.1)
    assert all_same_bits(put_together(params), w)


def check_all(rank: int) -> None:
    from torch.distributed.device_mesh import init_device_mesh

    mesh = init_device_mesh("cpu", (2, 2))
    for backend in ("reference", "auto"):
        torch.manual_seed(0)
        with use_backend(backend):
            for adaptive in (False, True):
                check_norms(mesh, adaptive)
                check_perturbation(mesh, adaptive)
            check_nothing_moves(mesh)
            check_updates(mesh)
            check_placements(mesh)
            check_other_meshes(mesh)
            check_an_error(mesh)


def test_ranks_with_parts_do_what_one_does_with_the_whole(tmp_path: Path) -> None:
    ranks.run(check_all, RANKS, tmp_path)
