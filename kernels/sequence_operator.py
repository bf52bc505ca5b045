"""Grid attention of a sequence with text at one end, as one operator that copies nothing.

The text's rows and the grid's are written side by side, where `grid_attention` returns them apart.
It has no gradient: training takes the general way.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from vistoken.kernels.windows import Window, flatten_window, restore_window


def forward(
    q: Tensor, k: Tensor, v: Tensor, window: Window, scale: float, start: int, stop: int
) -> tuple[Tensor, Tensor]:
    """Return (out [B, S, Hq, Dv], lse [B, S, Hq]) on the backend `triton`.

    q [B, S, Hq, D], k [B, S, Hkv, D], v [B, S, Hkv, Dv]: the tokens start..stop are the window's
    grid, the others, all before or all after it, are text that sees and is seen by every token.
    """
    return _attend(q, k, v, flatten_window(window), scale, start, stop)


@torch.library.custom_op(
    "vistoken::sequence_attention",
    mutates_args=(),
    schema="(Tensor q, Tensor k, Tensor v, int[] window, float scale, int start, int stop)"
    " -> (Tensor, Tensor)",
)
def _attend(
    q: Tensor, k: Tensor, v: Tensor, window: Sequence[int], scale: float, start: int, stop: int
) -> tuple[Tensor, Tensor]:
    from vistoken.kernels import grid_hopper, grid_triton

    where = restore_window(window)

    def grid(x: Tensor) -> Tensor:
        return x[:, start:stop].unflatten(1, where.grid)

    def text(x: Tensor) -> Tensor:
        return x[:, :start] if start else x[:, stop:]

    out, lse = _room(q, v)
    inputs = (grid(q), grid(k), grid(v), where, scale, text(k), text(v), text(q))
    parts = (grid(out), grid(lse), text(out), text(lse))
    with torch.cuda.device_of(q):
        if grid_hopper.why_not(*inputs) is None:
            grid_hopper.forward(*inputs, into=parts)
        else:
            for part, result in zip(parts, grid_triton.forward(*inputs), strict=True):
                if result is not None:
                    part.copy_(result)
    return out, lse


@_attend.register_fake
def _(q, k, v, window, scale, start, stop):  # type: ignore[no-untyped-def]
    return _room(q, v)


def _room(q: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    rows = q.shape[:-1]
    return q.new_empty((*rows, v.shape[-1])), q.new_empty(rows, dtype=torch.float32)
