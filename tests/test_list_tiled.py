"""Attention along block lists in plain torch against its definition."""

from __future__ import annotations

from random import Random

import pytest
import torch

from mask_cases import draw_list_inputs, list_results
from vistoken.kernels import list_reference, list_tiled
from vistoken.kernels.block_mask import BlockMask
from window_cases import worst_error


@pytest.mark.parametrize("seed", range(60))
def test_equals_the_definition(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Outputs, lse and all gradients, through the lse too, in fp64 and batches of all sizes."""
    dice = Random(seed)
    monkeypatch.setattr(list_tiled, "_CPU_LOGITS", dice.choice((1, 2000, 20_000, 1 << 17)))
    monkeypatch.setattr(list_tiled, "_LEAST_ROWS", dice.choice((5, 64)))
    inputs = draw_list_inputs(dice, torch.float64)
    found = list_results(list_tiled.forward, inputs)
    assert worst_error(found, list_results(list_reference.forward, inputs)) < 1e-13


@pytest.mark.parametrize(
    ("dtype", "limit"), [(torch.float32, 3e-6), (torch.float16, 1e-3), (torch.bfloat16, 8e-3)]
)
@pytest.mark.parametrize("seed", range(6))
def test_lower_precision(seed: int, dtype: torch.dtype, limit: float) -> None:
    inputs = draw_list_inputs(Random(1000 + seed), dtype, channels=(16, 40))
    found = list_results(list_tiled.forward, inputs)
    assert worst_error(found, list_results(list_reference.forward, inputs)) < limit


def test_gradcheck() -> None:
    """With queries that see nothing, and heads that share a kv head."""
    mask = BlockMask.from_map(
        torch.ones(1, 2, dtype=torch.bool), 3, 18, 16, mask=lambda b, h, q, kv: kv % 5 < q
    )
    q, k, v = (torch.randn(1, n, h, 2).double() for n, h in ((3, 2), (18, 1), (18, 1)))

    def attention(q, k, v):
        out, lse = list_tiled.forward(q, k, v, mask, 0.7)
        return out, lse[:, 1:]

    assert torch.autograd.gradcheck(attention, [x.requires_grad_() for x in (q, k, v)])


def test_backward_repeats_bit_for_bit() -> None:
    inputs = draw_list_inputs(Random(5), torch.float32, channels=(16,))
    first, second = (list_results(list_tiled.forward, inputs) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_keys_that_do_not_count_may_be_anything() -> None:
    """Behind the valid keys of a block, and in blocks that are not listed."""
    block_map = torch.tensor([[True, False, True], [True, False, False]])
    lengths = torch.tensor([[16, 16, 5]], dtype=torch.int32)
    mask = BlockMask.from_map(block_map, 32, 40, 16, lengths=lengths)
    q, k, v = torch.randn(1, 32, 2, 8), *torch.randn(2, 1, 40, 2, 8)
    clean = list_tiled.forward(q, k, v, mask, 0.3)
    for x in (k, v):
        x[:, 16:32], x[:, 37:] = torch.nan, torch.nan
    inputs = {"q": q, "k": k, "v": v, "mask": mask, "scale": 0.3}
    found = list_results(list_tiled.forward, inputs)
    assert torch.equal(found["out"], clean[0]) and torch.equal(found["lse"], clean[1])
    assert not any(x.isnan().any() for x in found.values())
    assert not found["d_k"][:, 16:32].any() and not found["d_v"][:, 37:].any()


def test_nothing_listed() -> None:
    mask = BlockMask.from_map(torch.zeros(1, 1, dtype=torch.bool), 9, 12, 16)
    q, k, v = (x.requires_grad_() for x in (torch.randn(2, 9, 2, 8), *torch.randn(2, 2, 12, 1, 8)))
    out, lse = list_tiled.forward(q, k, v, mask, 0.3)
    out.sum().backward()
    assert not out.any() and bool((lse == -torch.inf).all()) and not k.grad.any()


def test_layouts() -> None:
    dice = Random(11)
    inputs = draw_list_inputs(dice, torch.float32, channels=(8,))
    expected = list_results(list_tiled.forward, inputs)
    spread = {
        name: torch.stack([x, torch.full_like(x, torch.nan)], -1).transpose(1, 2)[..., 0]
        for name, x in inputs.items()
        if name in ("q", "k", "v")
    }
    out, lse = list_tiled.forward(
        *(x.transpose(1, 2) for x in spread.values()), inputs["mask"], inputs["scale"]
    )
    assert torch.equal(out, expected["out"])
