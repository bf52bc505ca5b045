"""Attention along block lists on random cases, forward and backward, next to fp64.

VISTOKEN_FUZZ_CASES sets how many cases run on each backend that is fast, 60 by default.
"""

from __future__ import annotations

import importlib.util
import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from random import Random

import pytest
import torch
from torch import Tensor

from dense_oracle import BUDGETS, Limit, Solution, distance, solve_dense
from kernel_cases import LAYOUTS, lay_out
from vistoken.kernels import BlockMask, block_sparse_attention

CASES = int(os.environ.get("VISTOKEN_FUZZ_CASES", "60"))
SHARES = 2
DTYPES = (torch.float32, torch.float16, torch.float32, torch.bfloat16)
gpu = pytest.mark.gpu
triton = pytest.mark.skipif(
    not importlib.util.find_spec("triton") or torch.cuda.is_available(),
    reason="needs triton and its interpreter, which runs where there is no GPU",
)
Mask = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
MASKS: dict[str, Mask | None] = {
    "none": None,
    "causal": lambda b, h, q, kv: kv <= q,
    "every third": lambda b, h, q, kv: (q + 2 * kv) % 3 > 0,
    "by head": lambda b, h, q, kv: (q + kv + h) % 4 != 1,
    "by entry": lambda b, h, q, kv: kv * (b + 1) % 5 != q % 3,
    "nothing": lambda b, h, q, kv: kv < 0,
}


@dataclass(frozen=True)
class Lists:
    """One call. map_shape: batch entries and heads of the map, of which 1 stands for all."""

    seed: int
    tokens: tuple[int, int]
    block: tuple[int, int]
    batch: int
    heads: int
    kv_heads: int
    dim: int
    value_dim: int
    scale: float | None
    map_shape: tuple[int, int]
    density: float
    mask: str
    lengths: bool
    layouts: tuple[str, str, str]


def draw(seed: int, tiny: bool, dims: tuple[int, ...]) -> Lists:
    dice = Random(f"lists {seed} {tiny}")
    most = 70 if tiny else 500
    kv_heads, batch = dice.randint(1, 2), 1 if tiny else dice.randint(1, 3)
    heads = kv_heads * dice.randint(1, 2)
    return Lists(
        seed=seed,
        tokens=(dice.randint(1, most), dice.randint(1, most)),
        block=(dice.choice((16, 32, 64, 128)), dice.choice((16, 32, 64, 128))),
        batch=batch,
        heads=heads,
        kv_heads=kv_heads,
        dim=dice.choice(dims),
        value_dim=dice.choice(dims),
        scale=dice.choice((None, None, 1.0, 0.0, -0.2)),
        map_shape=(dice.choice((1, batch)), dice.choice((1, heads))),
        density=dice.choice((0.0, 0.2, 0.5, 0.5, 0.8, 1.0)),
        mask=dice.choice(("none", "none", *MASKS)),
        lengths=dice.random() < 0.3,
        layouts=(dice.choice(LAYOUTS), dice.choice(LAYOUTS), dice.choice(LAYOUTS)),
    )


@dataclass(frozen=True)
class Given:
    """q, k, v; the map [b, h, nq, nk]; lengths [b, nk] or None; what is seen [B, Hq, S, N]."""

    inputs: list[Tensor]
    on: Tensor
    lengths: Tensor | None
    seen: Tensor


def make(case: Lists, device: str, dtype: torch.dtype) -> Given:
    random = torch.Generator().manual_seed(case.seed)
    (rows, columns), (block_q, block_kv) = case.tokens, case.block
    shapes = [
        (case.batch, rows, case.heads, case.dim),
        (case.batch, columns, case.kv_heads, case.dim),
        (case.batch, columns, case.kv_heads, case.value_dim),
    ]
    values = [torch.randn(shape, generator=random).to(device, dtype) for shape in shapes]
    inputs = [lay_out(x, layout) for x, layout in zip(values, case.layouts, strict=True)]
    blocks = math.ceil(rows / block_q), math.ceil(columns / block_kv)
    on = torch.rand(*case.map_shape, *blocks, generator=random) < case.density
    seen = on.repeat_interleave(block_q, 2).repeat_interleave(block_kv, 3)[..., :rows, :columns]
    seen = seen.expand(case.batch, case.heads, -1, -1)
    lengths = None
    if case.lengths:
        lengths = torch.randint(0, block_kv + 1, (case.map_shape[0], blocks[1]), generator=random)
        place = torch.arange(columns)
        valid = place % block_kv < lengths[:, place // block_kv]
        seen = seen & valid[:, None, None]
    mask = MASKS[case.mask]
    if mask is not None:
        indices = [torch.arange(size) for size in seen.shape]
        seen = seen & mask(*torch.meshgrid(*indices, indexing="ij"))
    lengths = None if lengths is None else lengths.to(device)
    return Given(inputs, on.to(device), lengths, seen.to(device))


def call(case: Lists, given: Given, backend: str) -> tuple[Tensor, Tensor]:
    """With a map where that says it all, else with lists."""
    q, k, v = given.inputs
    mask = MASKS[case.mask]
    if case.seed % 2 or case.lengths:
        lists = BlockMask.from_map(
            given.on, *case.tokens, case.block, mask=mask, lengths=given.lengths,
            batch=case.batch, heads=case.heads,
        )  # fmt: skip
        # what the lists say is seen is what the call was asked for
        assert torch.equal(lists.visible().expand_as(given.seen), given.seen), case
        return block_sparse_attention(
            q, k, v, lists, scale=case.scale, return_lse=True, backend=backend
        )  # type: ignore[return-value]
    return block_sparse_attention(
        q, k, v, given.on, mask=mask, scale=case.scale, return_lse=True, backend=backend
    )  # type: ignore[return-value]


def check(case: Lists, backend: str, device: str, dtype: torch.dtype) -> None:
    """Results and gradients within the budget of the dtype; rows that see nothing exactly so."""
    given = make(case, device, dtype)
    leaves = [x.requires_grad_() for x in given.inputs]
    out, lse = call(case, given, backend)
    random = torch.Generator().manual_seed(case.seed + 1)
    d_out, d_lse = (torch.randn(x.shape, generator=random).to(x) for x in (out, lse))
    some = given.seen.any(-1).transpose(1, 2)
    d_lse = d_lse.masked_fill(~some, 0.0)
    found = torch.autograd.grad([out, lse], leaves, [d_out, d_lse])
    factor = case.dim**-0.5 if case.scale is None else case.scale

    def solve(low: bool) -> Solution:
        return solve_dense(*given.inputs, given.seen, factor, d_out, d_lse, low)

    exact = solve(False)
    dense = None if dtype in BUDGETS else solve(True)
    limit = Limit(dtype, max(int(some.sum()), 1), exact.largest_logit)
    limit.check_result(f"out of {case}", out, exact.out, dense and dense.out)
    limit.check_lse(f"lse of {case}", lse, exact.lse)
    assert not out[~some].any() and lse[~some].eq(-math.inf).all(), case
    for name, grad in zip("qkv", found, strict=True):
        rounded = None if dense is None else dense.grads[name]
        label = f"the gradient of {name} of {case}"
        limit.check_gradient(label, grad, exact.grads[name], rounded, exact.parts[name])


@pytest.mark.parametrize("share", range(SHARES))
def test_tiled(share: int) -> None:
    for seed in range(share, CASES, SHARES):
        check(draw(seed, False, (3, 8, 16, 32, 64)), "tiled", "cpu", DTYPES[seed // SHARES % 4])


def test_reference() -> None:
    for seed in range(1000, 1000 + CASES // 6):
        check(draw(seed, False, (3, 8, 16, 32, 64)), "reference", "cpu", DTYPES[seed % 4])


@triton
def test_triton_interpreted() -> None:
    for seed in range(2000, 2000 + max(4, CASES // 10)):
        check(draw(seed, True, (16, 24, 32)), "triton", "cpu", DTYPES[seed % 2])


@gpu
@pytest.mark.parametrize("share", range(SHARES))
def test_on_the_gpu(share: int) -> None:
    for seed in range(share, CASES, SHARES):
        case = draw(seed, False, (16, 40, 64, 96, 128, 256))
        check(case, "triton", "cuda", DTYPES[seed // SHARES % 4])


PLACES = pytest.mark.parametrize(
    ("backend", "device"),
    [
        pytest.param("tiled", "cpu", id="tiled"),
        pytest.param("triton", "cpu", id="triton", marks=triton),
        pytest.param("triton", "cuda", id="gpu", marks=gpu),
    ],
)


@PLACES
def test_poisoned_keys_change_nothing(backend: str, device: str) -> None:
    """K = NaN and V = 1e4 at every key that a query does not see, the query in a batch entry."""
    rows, columns = 37, 50
    q, k, v = (torch.randn(1, n, 1, 16, device=device) for n in (rows, columns, columns))
    on = torch.tensor([[True, False, True, True], [False, True, True, False], [True] * 4])
    lists = BlockMask.from_map(
        on.to(device), rows, columns, 16, mask=MASKS["every third"],
        lengths=torch.tensor([[16, 9, 16, 1]], device=device),
    )  # fmt: skip
    queries = [0, 15, 16, 31, 36]
    seen = lists.visible()[0, 0, queries][..., None, None]
    many = [x.repeat(len(queries), 1, 1, 1) for x in (q, k, v)]
    bad = [many[0], many[1].masked_fill(~seen, math.nan), many[2].masked_fill(~seen, 1e4)]
    results = [
        block_sparse_attention(*x, lists, return_lse=True, backend=backend) for x in (many, bad)
    ]
    for clean, poisoned in zip(*results, strict=True):
        for entry, place in enumerate(queries):
            assert torch.equal(clean[entry, place], poisoned[entry, place]), place


@PLACES
def test_every_block_on_is_dense_attention(backend: str, device: str) -> None:
    q, k, v = (torch.randn(2, 70, 2, 16, device=device) for _ in range(3))
    on = torch.ones(5, 3, dtype=torch.bool, device=device)
    found = block_sparse_attention(q, k, v, on, backend=backend)
    heads_first = [x.transpose(1, 2) for x in (q, k, v)]
    wanted = torch.nn.functional.scaled_dot_product_attention(*heads_first).transpose(1, 2)
    assert isinstance(found, Tensor) and distance(found, wanted) <= 2e-6
