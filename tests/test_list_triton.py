"""Attention along block lists on Triton, in the interpreter where there is no GPU."""

from __future__ import annotations

from dataclasses import replace
from random import Random
from typing import Any

import pytest
import torch
from torch import Tensor

from mask_cases import draw_mask, list_results
from vistoken.kernels import list_reference
from vistoken.kernels.block_mask import BlockMask

pytest.importorskip("triton")
from vistoken.kernels import list_operator, list_triton, list_triton_backward, list_triton_launch  # noqa: E402
from vistoken.kernels.triton_launch import Config  # noqa: E402

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# relative Frobenius distance to fp64: of the results, and of the gradients
BUDGETS = {
    torch.float32: (2e-6, 4e-6),
    torch.float16: (1e-3, 1.5e-3),
    torch.bfloat16: (8e-3, 1.2e-2),
}


def draw_inputs(
    dice: Random, dtype: torch.dtype, mask: BlockMask, heads: tuple[int, int]
) -> dict[str, Any]:
    """Arguments of a backend's `forward` for a mask; (query, kv) heads."""
    dim, value_dim = dice.choice((16, 24, 32, 80)), dice.choice((16, 32, 40))
    batch = 2
    shapes = {
        "q": (mask.q_tokens, heads[0], dim),
        "k": (mask.kv_tokens, heads[1], dim),
        "v": (mask.kv_tokens, heads[1], value_dim),
    }
    inputs: dict[str, Any] = {
        name: torch.randn(batch, *shape, device=DEVICE, dtype=dtype)
        for name, shape in shapes.items()
    }
    scale = dice.choice((dim**-0.5, 0.3, -0.2, 0.0))
    return {**inputs, "mask": mask.to(DEVICE), "scale": scale}


def check(inputs: dict[str, Any]) -> None:
    """Out, lse and gradients against the definition in fp64."""
    dtype = inputs["q"].dtype
    exact = {name: inputs[name].double() for name in ("q", "k", "v")}
    found = list_results(list_operator.forward, inputs)
    expected = list_results(list_reference.forward, {**inputs, **exact})
    assert torch.equal(found.pop("blind"), expected.pop("blind"))
    for name, x in found.items():
        budget = 2e-6 if name == "lse" else BUDGETS[dtype][name.startswith("d_")]
        error = (x.double() - expected[name]).norm()
        assert error <= budget * expected[name].norm() + 1e-6, (name, float(error))


@pytest.mark.parametrize("dtype", BUDGETS)
@pytest.mark.parametrize("seed", range(4))
def test_equals_the_definition(seed: int, dtype: torch.dtype) -> None:
    dice = Random(f"{seed} {dtype}")
    heads = dice.choice(((1, 1), (2, 1), (3, 3), (4, 2)))
    check(draw_inputs(dice, dtype, draw_mask(dice, 2, heads[0], tokens=70), heads))


@pytest.mark.parametrize("tiles", [(16, 16), (32, 16), (16, 64), (64, 32)])
def test_tiles_smaller_than_blocks(tiles: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Every tile of every block, with masks of one, two and more words, and short last blocks."""

    def config(*arguments: Any) -> Config:
        return replace(
            list_triton_launch.list_config(*arguments), queries=tiles[:1], keys=tiles[1:]
        )

    for module in (list_triton, list_triton_backward):
        monkeypatch.setattr(module, "list_config", config)
    dice = Random(str(tiles))
    mask = BlockMask.from_map(
        torch.ones(1, 1, dtype=torch.bool), 50, 110, (64, 128),
        mask=lambda b, h, q, kv: (q * 3 + kv * 7) % 11 > 4, lengths=torch.tensor([[100], [70]]),
    )  # fmt: skip
    assert mask.table is not None and mask.table.shape[2] == 4
    check(draw_inputs(dice, torch.float32, mask, (1, 1)))


def test_two_backward_runs_give_the_same_bits() -> None:
    dice = Random(0)
    inputs = draw_inputs(dice, torch.float32, draw_mask(dice, 2, 4, tokens=70), (4, 2))
    first, second = (list_results(list_operator.forward, inputs) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_a_gradient_of_the_lse_of_blind_queries_has_no_effect() -> None:
    """Not even one that is no number, as a merge may give."""
    on = torch.tensor([[False], [True]])
    mask = BlockMask.from_map(on, 32, 16, 16).to(DEVICE)
    q, k, v = (torch.randn(1, n, 1, 16, device=DEVICE, requires_grad=True) for n in (32, 16, 16))
    out, lse = list_operator.forward(q, k, v, mask, 0.3)
    d_lse = torch.ones_like(lse)
    expected = torch.autograd.grad([out, lse], [q, k, v], [out.detach(), d_lse], retain_graph=True)
    d_lse[:, :16] = torch.nan
    found = torch.autograd.grad([out, lse], [q, k, v], [out.detach(), d_lse])
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert not found[0][:, :16].any()


def test_memory_around_the_tensors_is_not_read() -> None:
    """Every tensor lies in a larger one of NaN; head sizes and tokens fill no tile."""
    mask = BlockMask.from_map(
        torch.ones(2, 2, dtype=torch.bool), 23, 19, 16, mask=lambda b, h, q, kv: (q + kv) % 2 > 0
    ).to(DEVICE)

    def inside(tokens: int, width: int) -> Tensor:
        whole = torch.full((3, tokens + 40, 4, width + 24), torch.nan, device=DEVICE)
        whole[1:2, 20:-20, 1:3, 8:-16] = torch.randn(1, tokens, 2, width, device=DEVICE)
        return whole[1:2, 20:-20, 1:3, 8:-16]

    check({"q": inside(23, 20), "k": inside(19, 20), "v": inside(19, 24), "mask": mask,
           "scale": 0.3})  # fmt: skip


def test_offsets_beyond_2_to_the_31() -> None:
    """Batch entries, tokens and heads that lie far apart, in memory that is not all there."""
    if DEVICE == "cuda":
        pytest.skip("needs the room of the whole storage on a GPU")
    step = 2**30 + 64
    storage = torch.empty(0, dtype=torch.float16).new_empty(5 * step)

    def spread(strides: tuple[int, ...]) -> Tensor:
        view = storage.as_strided((2, 2, 2, 16), strides)
        return view.copy_(torch.randn(2, 2, 2, 16))

    mask = BlockMask.from_map(torch.ones(1, 1, dtype=torch.bool), 2, 2, 16)
    for strides in ((3 * step, 16, step, 1), (16, step, 3 * step, 1), (step, 3 * step, 16, 1)):
        q = spread(strides)
        near = q.clone()
        far = list_triton.forward(q, q, q, mask, 0.5)
        assert all(
            torch.equal(a, b)
            for a, b in zip(far, list_triton.forward(near, near, near, mask, 0.5), strict=True)
        )


def test_tiles_fit_the_shared_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of an A100, an H100 and a consumer GPU, for all head sizes and dtypes."""
    mask = BlockMask.from_map(torch.ones(1, 1, dtype=torch.bool), 128, 128, 128)
    for room in (65536, 101376, 166912, 232448):
        monkeypatch.setattr(list_triton_launch, "_shared_memory", lambda device, room=room: room)
        for dtype in BUDGETS:
            for dim in (32, 64, 80, 128, 256):
                x = torch.empty(1, 1, 1, dim, dtype=dtype)
                row = 2 * (1 << (dim - 1).bit_length()) * x.element_size()
                for kernel in ("forward", "query_gradient", "key_gradient"):
                    config = list_triton_launch.list_config(kernel, x, x, mask)
                    kept, walked = config.queries[0], config.keys[0]
                    if kernel == "key_gradient":
                        kept, walked = walked, kept
                    assert min(kept, walked) >= 16 and config.stages >= 1
                    assert (kept + config.stages * walked) * row <= room


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", BUDGETS)
@pytest.mark.parametrize("dim", [64, 80, 128, 256])
@pytest.mark.parametrize("block", [(128, 128), (128, 64), (64, 32), (256, 128)])
def test_large_blocks_on_a_gpu(block: tuple[int, int], dim: int, dtype: torch.dtype) -> None:
    """Tiles as they are on the device; keys behind the valid ones of their block are NaN."""
    tokens = 700
    nq, nk = -(-tokens // block[0]), -(-tokens // block[1])
    lengths = torch.randint(0, block[1] + 1, (2, nk))
    lengths[:, -1] = lengths[:, -1].clamp(max=tokens - (nk - 1) * block[1])
    mask = BlockMask.from_map(
        torch.rand(2, 4, nq, nk) < 0.6, tokens, tokens, block, lengths=lengths,
        mask=lambda b, h, q, kv: (q * 3 + kv * 7) % 11 > 4 * (kv > 300), batch=2, heads=4,
    ).to(DEVICE)  # fmt: skip
    q, k, v = (
        torch.randn(2, tokens, heads, dim, device=DEVICE, dtype=dtype) for heads in (4, 2, 2)
    )
    counts = (torch.arange(block[1]) < lengths[..., None]).flatten(1)[:, :tokens].to(DEVICE)
    for x in (k, v):
        x[~counts] = torch.nan
    check({"q": q, "k": k, "v": v, "mask": mask, "scale": dim**-0.5})
