"""Dilated windows as one call per group of the grid, on views, and grids as three axes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from vistoken.kernels.windows import Axis, Window

Cut = tuple[slice, ...]
Result = tuple[Tensor, Tensor, Tensor | None, Tensor | None]


def three_axes(x: Tensor) -> Tensor:
    """[B, *grid, heads, D] with leading axes of length 1."""
    while x.dim() < 6:
        x = x.unsqueeze(1)
    return x


def on_three_axes(
    run: Callable[..., Result],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    window: Window,
    scale: float,
    extra_k: Tensor | None,
    extra_v: Tensor | None,
    global_q: Tensor | None,
) -> Result:
    views = [three_axes(x) for x in (q, k, v)]
    out, lse, global_out, global_lse = run(*views, window, scale, extra_k, extra_v, global_q)
    for _ in range(6 - q.dim()):
        out, lse = out.squeeze(1), lse.squeeze(1)
    return out, lse, global_out, global_lse


def without_rows(q: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """out and lse for queries [..., Hq, D] of which there are none."""
    lse = q[..., 0].to(torch.promote_types(q.dtype, torch.float32))
    return q[..., :1].expand(*q.shape[:-1], v.shape[-1]), lse


def attend_dilated(
    run: Callable[..., Result],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    calls: Sequence[tuple[Cut, Window]],
    scale: float,
    extra_k: Tensor | None,
    extra_v: Tensor | None,
    global_q: Tensor | None,
) -> Result:
    """One call per dilation group on views of the inputs, and one for the global queries."""
    cuts = tuple(cut for cut, _ in calls)
    # the groups share these keys: their gradients add up in fp32, and are rounded once
    wide = torch.promote_types(q.dtype, torch.float32)
    extra_k, extra_v = (None if x is None else x.to(wide) for x in (extra_k, extra_v))

    def extras() -> tuple[Tensor | None, Tensor | None]:
        if extra_k is None or extra_v is None:
            return None, None
        return extra_k.to(q.dtype), extra_v.to(q.dtype)

    outs, lses = [], []
    parts = zip(*(_Split.apply(x, cuts) for x in (q, k, v)), strict=True)
    for (_, window), (q_part, k_part, v_part) in zip(calls, parts, strict=True):
        out, lse, _, _ = on_three_axes(run, q_part, k_part, v_part, window, scale, *extras(), None)
        outs.append(out)
        lses.append(lse)
    out = _Join.apply((*q.shape[:-1], v.shape[-1]), cuts, *outs)
    lse = _Join.apply(tuple(q.shape[:-1]), cuts, *lses)
    if global_q is None:
        return out, lse, None, None
    if not global_q.shape[1]:
        return out, lse, *without_rows(global_q, v)
    dense = [run(*call)[:2] for call in global_calls(global_q, k, v, scale, *extras())]
    global_out, global_lse = (
        torch.cat([x.flatten(1, 3) for x in column], 1) for column in zip(*dense, strict=True)
    )
    return out, lse, global_out, global_lse


def global_calls(
    global_q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    extra_k: Tensor | None,
    extra_v: Tensor | None,
) -> Iterator[tuple[Tensor, Tensor, Tensor, Window, float, Tensor, Tensor]]:
    """Arguments of the calls in which queries see all keys, without a copy of the grid's keys.

    The G queries are a grid whose window is the grid. Its keys are the first G of all keys, and
    the others are the keys that every query sees. More queries than keys take several calls.
    """
    keys, values = k.flatten(1, -3), v.flatten(1, -3)
    if extra_k is not None and extra_v is not None:
        keys, values = torch.cat([keys, extra_k], 1), torch.cat([values, extra_v], 1)
    for part in global_q.split(keys.shape[1], 1):
        count = part.shape[1]
        window = Window((Axis(1, 1), Axis(1, 1), Axis(count, count)))
        yield (
            three_axes(part),
            three_axes(keys[:, :count]),
            three_axes(values[:, :count]),
            window,
            scale,
            keys[:, count:],
            values[:, count:],
        )


class _Split(torch.autograd.Function):
    """`_split` whose gradient is one tensor; autograd would fill one of the size of x per part."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cuts: Sequence[Cut]) -> tuple[Tensor, ...]:
        ctx.shape, ctx.cuts = x.shape, cuts
        return _split(x, cuts)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return _join(ctx.shape, ctx.cuts, grads), None


class _Join(torch.autograd.Function):
    """`_join` whose gradient is views; autograd would copy that of the whole once per part."""

    @staticmethod
    def forward(ctx: Any, shape: Sequence[int], cuts: Sequence[Cut], *parts: Tensor) -> Tensor:
        ctx.cuts = cuts
        return _join(shape, cuts, parts)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return None, None, *_split(grad, ctx.cuts)


def _split(x: Tensor, cuts: Sequence[Cut]) -> tuple[Tensor, ...]:
    """Views of x [B, *grid, ...], one per cut of the grid."""
    return tuple(x[(slice(None), *cut)] for cut in cuts)


def _join(shape: Sequence[int], cuts: Sequence[Cut], parts: Sequence[Tensor]) -> Tensor:
    """The tensor [B, *grid, ...] of these parts, whose cuts hold every token once."""
    whole = parts[0].new_empty(shape)
    for cut, part in zip(cuts, parts, strict=True):
        whole[(slice(None), *cut)] = part
    return whole
