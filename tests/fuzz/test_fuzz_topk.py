"""Any losses whatever: the indices of a stable sort."""

from __future__ import annotations

import torch
from hypothesis import example, given
from hypothesis import strategies as st

from ksam_kernels import topk_indices
from tests.fuzz.strategies import EDGES, LARGER, Spec, fuzz, specs

sizes = st.one_of(st.integers(1, 200), st.sampled_from(EDGES + LARGER[:-1]), st.integers(1, 5000))
losses = sizes.flatmap(lambda n: specs((n,), expandable=True))


@fuzz
@given(losses, st.sampled_from(["as drawn", "ascending", "descending"]), st.integers(0, 2**20))
@example(Spec((65,), kind="few"), "as drawn", 20)
@example(Spec((4097,), torch.float64, "narrow"), "descending", 4095)
@example(Spec((200,), torch.bfloat16, "nan payloads"), "ascending", 99)
def test_topk(backend: str, spec: Spec, order: str, k: int) -> None:
    x = spec.build()
    if order != "as drawn":
        x = x.sort(descending=order == "descending").values
    k = 1 + k % len(x)
    # On the CPU: other devices' sorts order NaN by their bits, those of negative sign last.
    expected = torch.sort(x.cpu(), stable=True, descending=True).indices[:k].sort().values
    assert torch.equal(topk_indices(x, k).cpu(), expected)
