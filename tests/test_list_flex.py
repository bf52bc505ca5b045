"""FlexAttention along block lists: its lists against ours, and its results."""

from __future__ import annotations

from random import Random

import pytest
import torch

from mask_cases import draw_list_inputs, draw_mask
from vistoken.kernels import list_flex, list_reference
from vistoken.kernels.list_flex import flex_mask
from window_cases import worst_error


def dense_blocks(count: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """Bool [b, h, nq, nk] of FlexAttention's lists."""
    listed = torch.arange(index.shape[-1]) < count[..., None]
    return torch.zeros(index.shape, dtype=torch.bool).scatter(-1, index.long(), listed)


@pytest.mark.parametrize("seed", range(30))
def test_lists_and_mask(seed: int) -> None:
    """The same pairs are seen; no block is read as full that has a key which does not count."""
    dice = Random(seed)
    mask = draw_mask(dice, 2, 3)
    made = flex_mask(mask)
    seen = mask.visible()
    b, h, queries, keys = seen.shape
    at = torch.meshgrid(*map(torch.arange, (b, h, queries, keys)), indexing="ij")
    assert torch.equal(made.mask_mod(*at), seen)
    partial = dense_blocks(made.kv_num_blocks, made.kv_indices)
    full = dense_blocks(made.full_kv_num_blocks, made.full_kv_indices)
    assert not (partial & full).any()
    for row in range(mask.q_blocks):
        for column in range(mask.kv_blocks):
            q0, k0 = row * mask.block_q, column * mask.block_kv
            block = seen[..., q0 : q0 + mask.block_q, k0 : k0 + mask.block_kv]
            listed = (partial | full)[..., row, column]
            assert bool((listed | ~block.flatten(2).any(-1)).all())
            assert bool((block.flatten(2).all(-1) | ~full[..., row, column]).all())
    assert flex_mask(mask) is made


@pytest.mark.parametrize("seed", range(5))
def test_equals_the_definition(seed: int) -> None:
    dice = Random(seed)
    inputs = draw_list_inputs(dice, torch.float32)
    assert list_flex.why_not(**inputs) is None
    found, expected = list_flex.forward(**inputs), list_reference.forward(**inputs)
    for x, y in zip(found, expected, strict=True):
        assert (x.shape, x.dtype) == (y.shape, y.dtype)
        blind = y == -torch.inf
        assert torch.equal(x == -torch.inf, blind)
        x, y = x.masked_fill(blind, 0), y.masked_fill(blind, 0)
        assert (x - y).norm() <= 3e-6 * y.norm() + 1e-9


def test_why_not() -> None:
    inputs = draw_list_inputs(Random(0), torch.float32)
    inputs["k"].requires_grad_()
    assert "no backward on a CPU" in str(list_flex.why_not(**inputs))
    with torch.no_grad():
        assert list_flex.why_not(**inputs) is None


@pytest.mark.gpu
@pytest.mark.parametrize("seed", range(8))
@torch.no_grad()
def test_compiled(seed: int) -> None:
    inputs = draw_list_inputs(Random(seed), torch.float32, channels=(16, 40))
    inputs = {n: x.cuda() if isinstance(x, torch.Tensor) else x for n, x in inputs.items()}
    inputs["mask"] = inputs["mask"].to("cuda")
    found, expected = (
        dict(zip(("out", "lse"), forward(**inputs), strict=True))
        for forward in (list_flex.forward, list_reference.forward)
    )
    assert worst_error(found, expected) < 5e-3
