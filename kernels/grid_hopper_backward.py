"""The gradients of grid attention on Hopper: the host side of `grid_hopper_backward_kernel`."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from vistoken.kernels.grid_hopper import DISC_REACH, Schedule, half_of, tables
from vistoken.kernels.hopper_launch import (
    QUERIES,
    REGISTERS,
    grid_descriptor,
    list_descriptor,
)
from vistoken.kernels.tiling import Tiling, choose_tiles
from vistoken.kernels.windows import Window

Pair = tuple[Tensor, Tensor]
Maybe = tuple[Tensor | None, Tensor | None]
COLUMNS = 64  # of a box: two products of it and the gradients of 64 rows fill the registers
STAGES = 4


def query_tiling(window: Window, head_dim: int) -> Tiling:
    """Return the boxes of the pass for d_q: 128 queries stay, 64 keys pass by."""
    return choose_tiles(window, head_dim, (QUERIES,), (COLUMNS,), mask_cost=1.3)


def key_tiling(window: Window, head_dim: int) -> Tiling:
    """Return the boxes of the pass for d_k and d_v: 128 keys stay, 64 queries pass by."""
    return choose_tiles(window, head_dim, (COLUMNS,), (QUERIES,), inverse=True, mask_cost=1.3)


def backward(
    d_out: Tensor,
    d_lse: Tensor | None,
    d_global_out: Tensor | None,
    d_global_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    window: Window,
    scale: float,
    extra_k: Tensor | None,
    extra_v: Tensor | None,
    global_q: Tensor | None,
    out: Tensor,
    lse: Tensor,
    global_out: Tensor | None,
    global_lse: Tensor | None,
) -> tuple[Tensor | None, ...]:
    """Return the gradients of (q, k, v, extra_k, extra_v, global_q) as `grid_triton_backward`."""
    from vistoken.kernels.hopper_delta import row_delta

    d_out = d_out.contiguous()
    lse = lse.contiguous()
    delta = row_delta(d_out, out, d_lse)
    global_delta = None
    if global_q is not None and global_out is not None:
        d_global_out = (
            torch.zeros_like(global_out) if d_global_out is None else d_global_out.contiguous()
        )
        global_delta = row_delta(d_global_out, global_out, d_global_lse)
    extra = (extra_k, extra_v) if extra_k is not None and extra_k.shape[1] else (None, None)
    apart = (global_q, None if global_q is None else d_global_out)
    statistics = lse, delta, global_lse, global_delta
    d_q, _, d_global_q, _ = _run(
        (q, d_out), (k, v), apart, extra, statistics, window, scale, query_tiling, keys=False
    )
    d_k, d_v, d_extra_k, d_extra_v = _run(
        (k, v), (q, d_out), extra, apart, statistics, window, scale, key_tiling, keys=True
    )
    if extra_k is not None and extra_v is not None and extra[0] is None:
        d_extra_k, d_extra_v = torch.zeros_like(extra_k), torch.zeros_like(extra_v)
    return d_q, d_k, d_v, d_extra_k, d_extra_v, d_global_q


def _run(
    rows: Pair,
    columns: Pair,
    global_rows: Maybe,
    extras: Maybe,
    statistics: tuple[Tensor, Tensor, Tensor | None, Tensor | None],
    window: Window,
    scale: float,
    choose: Callable[[Window, int], Tiling],
    *,
    keys: bool,
) -> tuple[Tensor | None, ...]:
    """Return the gradients of a pass: of its rows, and of the rows that see everything.

    rows: (q, d_out) or, with `keys`, (k, v); columns: the other two. Those apart from the grid are
    `global_rows`, of which the gradients are wanted too, and `extras`, which every row sees.
    """
    from vistoken.kernels.grid_hopper_backward_kernel import hopper_grid_gradients

    first, second = rows
    batch, *grid, heads, dim = first.shape
    boxes = choose(window, dim)
    row_box, column_box = (boxes.kv, boxes.q) if keys else (boxes.q, boxes.kv)
    grads = [_empty(first), _empty(second) if keys else None]
    global_grads = [_empty(global_rows[0]), _empty(global_rows[1]) if keys else None]
    n_extra = 0 if extras[0] is None else extras[0].shape[1]
    n_global = 0 if global_rows[0] is None else global_rows[0].shape[1]
    group = (columns[0].shape[4] // heads) if keys else heads // columns[0].shape[4]
    plan = Schedule.of(first.shape, row_box, column_box, boxes, n_global, n_extra, first.device)
    lse, delta, global_lse, global_delta = statistics
    half = half_of(row_box)
    hopper_grid_gradients[(plan.programs,)](
        *(grid_descriptor(x, half) for x in (first, second)),
        *(None if x is None else grid_descriptor(x, half) for x in grads),
        *(grid_descriptor(x, column_box) for x in columns),
        *(list_descriptor(x, QUERIES // 2) for x in (*global_rows, *global_grads)),
        *(list_descriptor(x, COLUMNS) for x in extras),
        tables(window, row_box, column_box, keys, first.device), lse, delta,
        lse if global_lse is None else global_lse, delta if global_delta is None else global_delta,
        *grid, heads, group, *plan.numbers, n_extra, n_global, scale,
        min(window.radius, DISC_REACH), RBOX=row_box, HALF=half, CBOX=column_box, D=dim,
        STAGES=STAGES, KEYS=keys, DISC=window.radius > 0, num_warps=4, maxnreg=REGISTERS,
    )  # fmt: skip
    return *grads, *global_grads


def _empty(x: Tensor | None) -> Tensor | None:
    return None if x is None else torch.empty(x.shape, dtype=x.dtype, device=x.device)
