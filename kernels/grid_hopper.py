"""Grid attention on Hopper with Gluon: the host side of `grid_hopper_kernel`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vistoken.kernels.hopper_launch import (
    QUERIES,
    REGISTERS,
    STAGES,
    grid_descriptor,
    list_descriptor,
    processors,
    why_not_here,
)
from vistoken.kernels.tiling import Box, Tiling, axis_tiles, bounds, choose_tiles
from vistoken.kernels.windows import Window

KEYS = 128  # of a box
Q_STAGES = 2  # tiles of queries in shared memory: the next is read while one is worked on
DISC_SIDE = 8192  # of a disc's grid, whose squared distances are 32-bit integers
DISC_REACH = math.ceil(DISC_SIDE * math.sqrt(2))  # a disc of this radius holds the whole grid


def why_not(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    window: Window,
    scale: float,
    extra_k: Tensor | None = None,
    extra_v: Tensor | None = None,
    global_q: Tensor | None = None,
) -> str | None:
    """Return why the kernel cannot run on these tensors, or None where it can."""
    if window.radius and max(window.grid) > DISC_SIDE:
        return f"a disc needs a grid of at most {DISC_SIDE} tokens a side"
    if global_q is not None and global_q.numel() == 0:
        return "there are no global queries"
    return why_not_here(q, v, scale)


def tiling(window: Window, head_dim: int) -> Tiling:
    """Return the query and key boxes that the kernel takes for a window."""
    return choose_tiles(window, head_dim, (QUERIES,), (KEYS,), mask_cost=1.3)


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    window: Window,
    scale: float,
    extra_k: Tensor | None = None,
    extra_v: Tensor | None = None,
    global_q: Tensor | None = None,
    *,
    boxes: Tiling | None = None,
    into: tuple[Tensor, Tensor, Tensor | None, Tensor | None] | None = None,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """Return (out, lse, global_out, global_lse) as `vistoken.kernels.grid_reference.forward`.

    boxes: the query and key boxes, for measurements; by default those of `tiling`. into: where
    the results go, views whose tokens lie one after the other in each batch entry.
    """
    from vistoken.kernels.grid_hopper_kernel import hopper_grid_forward

    batch, *grid, heads, dim = q.shape
    boxes = boxes or tiling(window, dim)
    out, lse, global_out, global_lse = into or (*_room(q), *_room(global_q))
    if extra_k is not None and extra_k.shape[1] == 0:
        extra_k = extra_v = None

    half = half_of(boxes.q)
    n_extra = 0 if extra_k is None else extra_k.shape[1]
    n_global = 0 if global_q is None else global_q.shape[1]
    plan = Schedule.of(q.shape, boxes.q, boxes.kv, boxes, n_global, n_extra, q.device)
    hopper_grid_forward[(plan.programs,)](
        grid_descriptor(q, half), grid_descriptor(k, boxes.kv), grid_descriptor(v, boxes.kv),
        grid_descriptor(out, half), list_descriptor(global_q, QUERIES // 2),
        list_descriptor(global_out, QUERIES // 2), list_descriptor(extra_k, boxes.keys),
        list_descriptor(extra_v, boxes.keys), tables(window, boxes.q, boxes.kv, False, q.device),
        lse, lse if global_lse is None else global_lse, *grid, heads, heads // k.shape[4],
        *plan.numbers, n_extra, n_global, lse.stride(0) // heads,
        n_global if global_lse is None else global_lse.stride(0) // heads,
        scale * math.log2(math.e),
        min(window.radius, DISC_REACH), QBOX=boxes.q, HALF=half, KBOX=boxes.kv, D=dim,
        STAGES=STAGES[dim], Q_STAGES=Q_STAGES, DISC=window.radius > 0, num_warps=4,
        maxnreg=REGISTERS,
    )  # fmt: skip
    return out, lse, global_out, global_lse


def _room(q: Tensor | None) -> tuple[Any, Any]:
    """Room for the output and the log-sum-exp of queries."""
    if q is None:
        return None, None
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    return out, torch.empty(q.shape[:-1], dtype=torch.float32, device=q.device)


class Schedule(NamedTuple):
    """How tiles of 128 rows are dealt to programs.

    numbers: tiles, those of rows that see everything, tiles of a head, its tiles of such rows,
    tiles along each axis, and how many other tiles take as long as one of such rows.
    """

    programs: int
    numbers: tuple[int, int, int, int, int, int, int, int]

    @classmethod
    def of(
        cls,
        shape: Sequence[int],
        rows: Box,
        columns: Box,
        boxes: Tiling,
        n_global: int,
        n_extra: int,
        device: torch.device,
    ) -> Schedule:
        """Return the schedule for tensors [B, T, H, W, heads, D] and the boxes of a pass."""
        batch, *grid, heads, _ = shape
        along = [-(-length // side) for length, side in zip(grid, rows, strict=True)]
        per_head, block = math.prod(along), math.prod(columns)
        global_tiles = -(-n_global // QUERIES)
        long = batch * heads * global_tiles
        tiles = long + batch * heads * per_head
        programs = min(tiles, processors(device.index))
        steps = boxes.boxes / per_head + n_extra / block
        rounds = round((math.prod(grid) + n_extra) / block / steps) if long % programs else 0
        numbers = tiles, long, per_head, max(global_tiles, 1), *along, rounds
        return cls(programs, numbers)  # type: ignore[arg-type]


def half_of(box: Box) -> Box:
    """Return the part of a tile that one warpgroup takes: half of its longest side."""
    cut = max(range(3), key=lambda axis: box[axis])
    t, h, w = (side // 2 if axis == cut else side for axis, side in enumerate(box))
    return t, h, w


@lru_cache(maxsize=256)
def tables(window: Window, rows: Box, columns: Box, inverse: bool, device: torch.device) -> Tensor:
    """Return the tables of `hopper_boxes` for a window, int32 on the device."""
    pairs = [bounds(axis, inverse) for axis in window.axes]
    tiles = [
        axis_tiles(axis, *sides, inverse)
        for axis, *sides in zip(window.axes, rows, columns, strict=True)
    ]
    entries = [x for lo, _ in pairs for x in lo] + [x for _, hi in pairs for x in hi]
    entries += [tile.start for axis in tiles for tile in axis]
    entries += [tile.boxes for axis in tiles for tile in axis]
    return torch.tensor(entries, dtype=torch.int32, device=device)
