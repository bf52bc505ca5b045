"""Attention over the windows of a grid as one operator: autograd, `torch.compile`, fake tensors."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from vistoken.kernels.windows import Window, flatten_window, restore_window

_INPUTS = (
    "str backend, Tensor q, Tensor k, Tensor v, int[] window, float scale, "
    "Tensor? extra_k, Tensor? extra_v, Tensor? global_q"
)
_GRADS = "Tensor d_out, Tensor? d_lse, Tensor? d_global_out, Tensor? d_global_lse, "
_RESULTS = "Tensor out, Tensor lse, Tensor global_out, Tensor global_lse"


def forward(
    backend: str,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    window: Window,
    scale: float,
    extra_k: Tensor | None = None,
    extra_v: Tensor | None = None,
    global_q: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """Return (out, lse, global_out, global_lse) as `grid_reference.forward` does.

    backend: `triton` or `tiled`, the two that compute their gradients themselves.
    """
    results = _attend(backend, q, k, v, flatten_window(window), scale, extra_k, extra_v, global_q)
    out, lse, global_out, global_lse = results
    if global_q is None:
        return out, lse, None, None
    return out, lse, global_out, global_lse


def _forward_of(backend: str) -> Callable[..., Any]:
    if backend == "triton":
        from vistoken.kernels import grid_triton

        return grid_triton.forward
    from vistoken.kernels import grid_tiled

    return grid_tiled.compute


def _backward_of(backend: str) -> Callable[..., Any]:
    if backend == "triton":
        from vistoken.kernels import grid_triton_backward

        return grid_triton_backward.backward
    from vistoken.kernels import grid_tiled

    return grid_tiled.backward


# --- an operator has no None among its results: what is not there is a tensor without rows --------


@torch.library.custom_op(
    "vistoken::grid_attention",
    mutates_args=(),
    schema=f"({_INPUTS}) -> (Tensor, Tensor, Tensor, Tensor)",
)
def _attend(
    backend: str,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    window: Sequence[int],
    scale: float,
    extra_k: Tensor | None,
    extra_v: Tensor | None,
    global_q: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    some = [_or_none(x) for x in (extra_k, extra_v, global_q)]
    with torch.cuda.device_of(q):
        results = _forward_of(backend)(q, k, v, restore_window(window), scale, *some)
    out, lse, *of_global = results
    if of_global[0] is None:
        of_global = [*_room((q.shape[0], 0, q.shape[-2]), q, v)]
    return out.contiguous(), lse.contiguous(), *(x.contiguous() for x in of_global)


@_attend.register_fake
def _(backend, q, k, v, window, scale, extra_k, extra_v, global_q):  # type: ignore[no-untyped-def]
    return _empty_results(q, v, global_q)


def _empty_results(
    q: Tensor, v: Tensor, global_q: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Room for the results of `_attend`; the global ones have no rows without `global_q`."""
    count = 0 if global_q is None else global_q.shape[1]
    return *_room(q.shape[:-1], q, v), *_room((q.shape[0], count, q.shape[-2]), q, v)


def _room(rows: Sequence[int], q: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Room for the output and the log-sum-exp of so many rows."""
    wide = torch.promote_types(q.dtype, torch.float32)
    return q.new_empty((*rows, v.shape[-1])), q.new_empty(rows, dtype=wide)


def _or_none(x: Tensor | None) -> Tensor | None:
    """Tokens [B, N, ...], or None where there are none: no program is launched for nothing."""
    return None if x is None or not x.shape[1] else x


@torch.library.custom_op(
    "vistoken::grid_attention_backward",
    mutates_args=(),
    schema=f"({_GRADS}{_INPUTS}, {_RESULTS}) -> ({', '.join(['Tensor'] * 6)})",
)
def _attend_backward(
    d_out: Tensor,
    d_lse: Tensor | None,
    d_global_out: Tensor | None,
    d_global_lse: Tensor | None,
    backend: str,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    window: Sequence[int],
    scale: float,
    extra_k: Tensor | None,
    extra_v: Tensor | None,
    global_q: Tensor | None,
    out: Tensor,
    lse: Tensor,
    global_out: Tensor,
    global_lse: Tensor,
) -> tuple[Tensor, ...]:
    others = (k, v, extra_k, extra_v, global_q)
    some = [_or_none(x) for x in others[2:]]
    of_global: tuple[Tensor | None, ...] = (d_global_out, d_global_lse, global_out, global_lse)
    if some[2] is None:
        of_global = (None,) * 4
    with torch.cuda.device_of(q):
        grads = _backward_of(backend)(
            d_out, d_lse, *of_global[:2], q, k, v, restore_window(window), scale, *some,
            out, lse, *of_global[2:],
        )  # fmt: skip
    return tuple(
        _empty_grads(q, x)[1] if grad is None else grad.contiguous()
        for grad, x in zip(grads, (q, *others), strict=True)
    )


@_attend_backward.register_fake
def _(  # type: ignore[no-untyped-def]
    d_out, d_lse, d_global_out, d_global_lse, backend, q, k, v, window, scale,
    extra_k, extra_v, global_q, out, lse, global_out, global_lse,
):  # fmt: skip
    return _empty_grads(q, k, v, extra_k, extra_v, global_q)


def _empty_grads(q: Tensor, *others: Tensor | None) -> tuple[Tensor, ...]:
    """Room for the gradients of the inputs; of one that is None, a tensor of no entries."""
    return tuple(q.new_empty(0 if x is None else x.shape) for x in (q, *others))


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.backend, q, k, v, ctx.window, ctx.scale, extra_k, extra_v, global_q = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(q, k, v, extra_k, extra_v, global_q, *output)


def _differentiate(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
    q, k, v, extra_k, extra_v, global_q, *results = ctx.saved_tensors
    d_out, d_lse, d_global_out, d_global_lse = grads
    if d_out is None:
        d_out = torch.zeros_like(results[0])
    if global_q is None:
        d_global_out = d_global_lse = None
    elif d_global_out is None:
        d_global_out = torch.zeros_like(results[2])
    found = _attend_backward(
        d_out, d_lse, d_global_out, d_global_lse, ctx.backend, q, k, v, ctx.window, ctx.scale,
        extra_k, extra_v, global_q, *results,
    )  # fmt: skip
    there = zip(found, (q, k, v, extra_k, extra_v, global_q), strict=True)
    dq, dk, dv, *rest = (None if x is None else grad for grad, x in there)
    return None, dq, dk, dv, None, None, *rest


_attend.register_autograd(_differentiate, setup_context=_save)
