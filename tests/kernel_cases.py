"""Random cases of grid attention, and what they must give: dense, fp64, straight from its text.

Nothing here imports the package: what a query sees is derived a second time, by loops over axes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import product
from random import Random
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dense_oracle import solve_dense

LAYOUTS = ("plain", "beside_nan", "heads_first", "same_batch", "same_heads", "spread")


@dataclass(frozen=True)
class Case:
    """One call. radius: 0, or that of a disc, which takes the place of the window."""

    seed: int
    grid: tuple[int, ...]
    kernel_size: tuple[int, ...]
    stride: tuple[int, ...]
    dilation: tuple[int, ...]
    is_causal: tuple[bool, ...]
    radius: int
    batch: int
    heads: int
    kv_heads: int
    dim: int
    value_dim: int
    scale: float | None
    extra: int | None
    globals: int | None
    layouts: tuple[str, str, str]
    loss_on_lse: bool
    needs_grad: str  # of "q", "k", "v"; the additional keys follow k, the additional values v

    @property
    def factor(self) -> float:
        return self.dim**-0.5 if self.scale is None else self.scale


class Size(NamedTuple):
    """What a machine can take: tokens and the longest axis of each rank, head dims to draw."""

    tokens: int
    longest: tuple[int, int, int]
    dims: tuple[int, ...]
    batch: int = 2
    groups: int = 3
    extra: int = 40


TINY = Size(24, (24, 7, 5), (8, 16, 24, 32), 1, 2, 5)  # for the interpreter
SMALL = Size(400, (150, 24, 12), (1, 3, 8, 16, 20, 32, 64, 80))
LARGE = Size(1400, (1400, 64, 24), (16, 32, 40, 64, 64, 80, 96, 128, 128, 256), 2, 2, 200)


def draw(rank: int, seed: int, size: Size) -> Case:
    """Return case number `seed` of a rank."""
    dice = Random(f"{rank} {seed} {size}")
    grid = _draw_grid(dice, rank, size)
    kernel = tuple(_draw_kernel(dice, length) for length in grid)
    stride = tuple(dice.choice((1, 1, k, dice.randint(1, k), dice.randint(1, k))) for k in kernel)
    dilation = tuple(
        dice.choice((1, 1, 1, dice.randint(1, length // k), length // k))
        for length, k in zip(grid, kernel, strict=True)
    )
    dilation = tuple(min(d, 4) if len(dilation) * d > 8 else d for d in dilation)
    causal = dice.random() < 0.4
    kv_heads, dim = dice.randint(1, 2), dice.choice(size.dims)
    return Case(
        seed=seed,
        grid=grid,
        kernel_size=kernel,
        stride=stride,
        dilation=dilation,
        is_causal=tuple(causal and dice.random() < 0.6 for _ in grid),
        radius=dice.randint(1, 12) if rank == 2 and dice.random() < 0.15 else 0,
        batch=dice.randint(1, size.batch),
        heads=kv_heads * dice.randint(1, size.groups),
        kv_heads=kv_heads,
        dim=dim,
        value_dim=dice.choice((dim, dim, dice.choice(size.dims))),
        scale=dice.choice((None, None, None, 1.0, 0.0, -0.3, dice.uniform(-1, 1))),
        extra=dice.choice((None, None, None, 0, 1, dice.randint(2, size.extra))),
        globals=dice.choice((None, None, None, 1, dice.randint(2, size.extra))),
        layouts=tuple(dice.choice(LAYOUTS) for _ in range(3)),
        loss_on_lse=dice.random() < 0.5,
        needs_grad=dice.choice(("qkv", "qkv", "qkv", "q", "v", "kv")),
    )


def _draw_grid(dice: Random, rank: int, size: Size) -> tuple[int, ...]:
    longest = size.longest[rank - 1]
    while True:
        grid = tuple(
            dice.choice((2, longest, *dice.choices(range(1, longest), k=6))) for _ in range(rank)
        )
        if math.prod(grid) <= size.tokens:
            return grid


def _draw_kernel(dice: Random, length: int) -> int:
    near = (length, max(length - 1, 1), min(2, length), dice.randint(1, length))
    return dice.choice((*near, *(dice.randint(1, max(length // 2, 1)) for _ in range(4))))


# --- its tensors ---------------------------------------------------------------------------------


class Inputs(NamedTuple):
    """q [B, *grid, Hq, D], k and v with Hkv heads, extra_k [B, N, Hkv, D], global_q [B, G, Hq, D].

    extra_k and extra_v are keys that every query sees, global_q queries that see every key.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    extra_k: Tensor | None
    extra_v: Tensor | None
    global_q: Tensor | None

    def leaves(self, case: Case) -> dict[str, Tensor]:
        """Make those of the case's inputs that need gradients ask for them, and return them."""
        named = {name: x for name, x in self._asdict().items() if x is not None}
        owner = {"extra_k": "k", "extra_v": "v", "global_q": "q"}
        wanted = {n: x for n, x in named.items() if owner.get(n, n) in case.needs_grad}
        return {name: x.requires_grad_() for name, x in wanted.items()}

    def map(self, function: Any) -> Inputs:
        return Inputs(*(None if x is None else function(x) for x in self))


def make_inputs(case: Case, device: str = "cpu", dtype: torch.dtype = torch.float32) -> Inputs:
    """Return the case's inputs, in the memory layouts it names."""
    draw = torch.Generator().manual_seed(case.seed)

    def tensor(rows: tuple[int, ...], heads: int, dim: int, layout: str = "plain") -> Tensor:
        values = torch.randn(case.batch, *rows, heads, dim, generator=draw).to(device, dtype)
        return lay_out(values, layout)

    kv_heads, (first, second, third) = case.kv_heads, case.layouts
    extra = None if case.extra is None else (case.extra,)
    return Inputs(
        tensor(case.grid, case.heads, case.dim, first),
        tensor(case.grid, kv_heads, case.dim, second),
        tensor(case.grid, kv_heads, case.value_dim, third),
        None if extra is None else tensor(extra, kv_heads, case.dim, second),
        None if extra is None else tensor(extra, kv_heads, case.value_dim, third),
        None if case.globals is None else tensor((case.globals,), case.heads, case.dim, first),
    )


def lay_out(values: Tensor, layout: str) -> Tensor:
    """Return a tensor of the same shape whose memory is laid out as `layout` says.

    same_batch and same_heads repeat the first entry by a stride of 0. All memory that does not
    belong to the tensor is NaN.
    """
    if layout == "plain":
        return values.clone()
    if layout == "same_batch":
        return values[:1].clone().expand_as(values)
    if layout == "same_heads":
        return values[..., :1, :].clone().expand_as(values)
    if layout == "heads_first":
        return values.transpose(1, -2).contiguous().transpose(1, -2)
    if layout == "spread":  # no axis of it is dense in memory, the last one neither
        room = values.new_full([2 * size for size in values.shape], math.nan)
        inside = room[(slice(None, None, 2),) * values.dim()]
    else:
        room = values.new_full([size + 3 for size in values.shape], math.nan)
        inside = room[tuple(slice(1, 1 + size) for size in values.shape)]
    return inside.copy_(values)


def make_grads(case: Case, outputs: tuple[Tensor | None, ...]) -> list[Tensor | None]:
    """Return gradients of (out, lse, global_out, global_lse); None where the loss reads none."""
    draw = torch.Generator().manual_seed(case.seed + 1)
    grads: list[Tensor | None] = []
    for x, read in zip(outputs, (True, case.loss_on_lse) * 2, strict=True):
        given = None if x is None else torch.randn(x.shape, generator=draw).to(x.device, x.dtype)
        grads.append(given if read else None)
    return grads


# --- what they must give -------------------------------------------------------------------------


def seen_on_axis(length: int, k: int, s: int, d: int, causal: bool) -> list[list[int]]:
    """The keys that each query of an axis sees: the definition, word by word."""
    seen = []
    for x in range(length):
        g, i = x % d, x // d
        n = math.ceil((length - g) / d)
        if causal:
            leader = min((i // s) * s + s - 1, n - 1)
            lo, hi = max(leader - k + 1, 0), i + 1
        else:
            leader = min((i // s) * s + s // 2, n - 1)
            lo = min(max(leader - k // 2, 0), n - k)
            hi = lo + k
        seen.append([g + d * j for j in range(lo, hi)])
    return seen


def visible(case: Case) -> Tensor:
    """bool [tokens, tokens]: which query of the grid sees which key, row-major."""
    if case.radius:
        places = torch.tensor(list(product(*map(range, case.grid))))
        gaps = places[:, None] - places
        return gaps.square().sum(-1) < case.radius**2
    seen = torch.ones(1, 1, dtype=torch.bool)
    rows = zip(case.grid, case.kernel_size, case.stride, case.dilation, case.is_causal, strict=True)
    for length, k, s, d, causal in rows:
        axis = torch.zeros(length, length, dtype=torch.bool)
        for x, keys in enumerate(seen_on_axis(length, k, s, d, causal)):
            axis[x, keys] = True
        seen = (seen[:, None, :, None] & axis[None, :, None, :]).flatten(2).flatten(0, 1)
    return seen


class Dense(NamedTuple):
    """What a case gives: results as `grid_attention` returns them, gradients by input.

    parts: as in `Solution`.
    """

    outputs: tuple[Tensor, Tensor, Tensor | None, Tensor | None]
    grads: dict[str, Tensor]
    parts: dict[str, Tensor]
    largest_logit: float


def solve(
    case: Case, inputs: Inputs, grads: list[Tensor | None] | None = None, low: bool = False
) -> Dense:
    """The case as one dense attention: global queries are more rows, additional keys columns.

    grads: of the four outputs, None where there is none; low: as in `solve_dense`.
    """
    rank, tokens = len(case.grid), math.prod(case.grid)

    def whole(own: Tensor | None, more: Tensor | None) -> Tensor | None:
        """[B, *grid, ...] and [B, G, ...] as one sequence."""
        if own is None:
            return None
        flat = own.detach().flatten(1, rank)
        return flat if more is None else torch.cat([flat, more.detach()], 1)

    q, k, v = (
        whole(inputs.q, inputs.global_q),
        *(whole(x, more) for x, more in ((inputs.k, inputs.extra_k), (inputs.v, inputs.extra_v))),
    )
    assert q is not None and k is not None and v is not None
    seen = torch.ones(q.shape[1], k.shape[1], dtype=torch.bool)
    seen[:tokens, :tokens] = visible(case)
    d_out, d_lse = (None, None) if grads is None else (whole(*grads[::2]), whole(*grads[1::2]))
    found = solve_dense(q, k, v, seen.to(q.device), case.factor, d_out, d_lse, low)

    def split(x: Tensor) -> tuple[Tensor, Tensor]:
        return x[:, :tokens].unflatten(1, case.grid), x[:, tokens:]

    def by_input(x: dict[str, Tensor]) -> dict[str, Tensor]:
        pairs = {"q": "global_q", "k": "extra_k", "v": "extra_v"}
        return {
            name: part
            for first in x
            for name, part in zip((first, pairs[first]), split(x[first]), strict=True)
        }

    (out, global_out), (lse, global_lse) = split(found.out), split(found.lse)
    some = inputs.global_q is not None
    outputs = (out, lse, global_out if some else None, global_lse if some else None)
    return Dense(outputs, by_input(found.grads), by_input(found.parts), found.largest_logit)
