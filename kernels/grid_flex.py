"""Attention over the windows of a grid by PyTorch's FlexAttention.

The masks come as block lists that are made from the bounds of the windows. On CUDA the kernel is
compiled at the first call for a shape. Elsewhere FlexAttention runs uncompiled, which takes the
whole matrix of logits.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from vistoken.kernels.windows import Window

Box = tuple[int, int, int]
_HALF_OR_SINGLE = (torch.float16, torch.bfloat16, torch.float32)
_LEAST_CHANNELS = 16  # of a compiled kernel
_MOST_LOGITS = 1 << 31  # of an uncompiled call


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
    """Return why FlexAttention cannot run with these inputs, or None."""
    queries = window.tokens + (0 if global_q is None else global_q.shape[1])
    keys = window.tokens + (0 if extra_k is None else extra_k.shape[1])
    return why_not_tensors(q, v, (k, extra_k, extra_v, global_q), queries, keys)


def why_not_tensors(
    q: Tensor, v: Tensor, others: tuple[Tensor | None, ...], queries: int, keys: int
) -> str | None:
    """Return why FlexAttention cannot run with so many queries and keys, or None.

    q [B, ..., Hq, D], v [B, ..., Hkv, Dv]; others: what else may need a gradient.
    """
    if q.device.type not in ("cuda", "cpu"):
        return f"FlexAttention runs on cuda and cpu here, not on {q.device.type}"
    if not q.shape[0]:
        return "FlexAttention needs at least one batch entry"
    if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in (q, v, *others)):
        return (
            "FlexAttention has no backward on a CPU, and compiled ones were seen to be wrong: call "
            "it under torch.no_grad(), or take tiled or triton for gradients"
        )
    if q.is_cuda:
        if q.dtype not in _HALF_OR_SINGLE:
            return f"FlexAttention compiles for fp16, bf16 and fp32, not for {q.dtype}"
        if min(q.shape[-1], v.shape[-1]) < _LEAST_CHANNELS:
            return (
                f"FlexAttention compiles for at least {_LEAST_CHANNELS} channels of a head, got "
                f"{q.shape[-1]} of q and k and {v.shape[-1]} of v"
            )
        return None
    logits = q.shape[0] * q.shape[-2] * queries * keys
    if logits > _MOST_LOGITS:
        return (
            "FlexAttention on a CPU takes the whole matrix of logits, here "
            f"{logits:.1e} of them, at most {_MOST_LOGITS:.1e} are allowed"
        )
    return None


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
    tile: Box | None = None,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """Return (out, lse, global_out, global_lse) as `grid_reference.forward` does.

    tile: None for blocks of 128 tokens in raster order, else the box of the grid that makes a
    block: tokens are copied to the order of such tiles, and back. On CUDA a tile has a multiple of
    128 tokens.
    """
    from vistoken.kernels.grid_flex_lists import make_order

    extras = 0 if extra_k is None else extra_k.shape[1]
    globals_ = 0 if global_q is None else global_q.shape[1]
    order = make_order(window, extras, globals_, tile, q.device)
    queries, keys, values = (_ordered(x, order.take) for x in (q, k, v))
    tokens = queries.shape[1]
    if extra_k is not None and extra_v is not None:
        keys, values = torch.cat([keys, extra_k], 1), torch.cat([values, extra_v], 1)
    if global_q is not None:
        queries = torch.cat([queries, global_q], 1)
    out, lse = attend(queries, keys, values, order.mask, scale)
    grid_out, grid_lse = (_restored(x[:, :tokens], order.place, window) for x in (out, lse))
    if global_q is None:
        return grid_out, grid_lse, None, None
    return grid_out, grid_lse, out[:, tokens:], lse[:, tokens:]


def _ordered(x: Tensor, take: Tensor | None) -> Tensor:
    """[B, T, H, W, ...] to [B, places, ...]."""
    tokens = x.flatten(1, 3)
    return tokens if take is None else tokens.index_select(1, take)


def _restored(x: Tensor, place: Tensor | None, window: Window) -> Tensor:
    """[B, places, ...] to [B, T, H, W, ...]."""
    tokens = x if place is None else x.index_select(1, place)
    return tokens.unflatten(1, window.grid)


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Any,
    scale: float,
    kernel_options: dict[str, int] | None = None,
) -> tuple[Tensor, Tensor]:
    """Return out [B, M, Hq, Dv] and lse [B, M, Hq] of FlexAttention under one of its block masks.

    q [B, M, Hq, D], k [B, N, Hkv, D], v [B, N, Hkv, Dv].
    """
    from torch.nn.attention.flex_attention import AuxRequest, flex_attention

    if not torch.is_grad_enabled():  # a CPU refuses tensors that could have gradients even then
        q, k, v = q.detach(), k.detach(), v.detach()
    heads_first = [x.transpose(1, 2) for x in (q, k, v)]
    call: Callable[..., Any] = flex_attention
    if q.is_cuda and not torch.compiler.is_compiling():
        call = _compiled()
    out, more = call(
        *heads_first,
        block_mask=mask,
        scale=scale,
        enable_gqa=q.shape[2] != k.shape[2],
        kernel_options=kernel_options,
        return_aux=AuxRequest(lse=True),
    )
    return out.transpose(1, 2), more.lse.transpose(1, 2)


@lru_cache(maxsize=1)
def _compiled() -> Callable[..., Any]:
    """FlexAttention compiled for every shape of its own; a failure raises, it never runs dense."""
    from torch._dynamo import config
    from torch.nn.attention.flex_attention import flex_attention

    run = torch.compile(flex_attention, fullgraph=True, dynamic=False)

    def call(*args: Any, **options: Any) -> Any:
        # each shape counts as a recompilation; at the limit fullgraph would raise
        with config.patch(recompile_limit=1 << 16, accumulated_recompile_limit=1 << 16):
            return run(*args, **options)

    return call
