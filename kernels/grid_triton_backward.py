"""Gradients of grid attention in portable Triton, deterministic: no two programs add to one number.

One kernel walks the keys of each tile of queries, for the gradient of the queries; another walks
the queries that see each tile of keys, which lie in a box as well, for those of keys and values.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vistoken.kernels import grid_hopper, grid_hopper_backward
from vistoken.kernels.grid_triton_dense import dense_key_gradient, dense_query_gradient
from vistoken.kernels.grid_triton_keys import key_gradient_launch
from vistoken.kernels.grid_triton_queries import query_gradient_launch
from vistoken.kernels.triton_launch import rows_in_line
from vistoken.kernels.windows import Window


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
    """Return the gradients of (q, k, v, extra_k, extra_v, global_q), None for what is None.

    d_lse, d_global_out and d_global_lse may be None where nothing depends on the result.
    """
    q, k, v, extra_k, extra_v, global_q, d_out, out = rows_in_line(
        q, k, v, extra_k, extra_v, global_q, d_out, out
    )
    d_lse, d_global_lse, global_lse = (
        None if x is None else x.contiguous() for x in (d_lse, d_global_lse, global_lse)
    )
    lse = lse.contiguous()
    if grid_hopper.why_not(q, k, v, window, scale, extra_k, extra_v, global_q) is None:
        return grid_hopper_backward.backward(
            d_out, d_lse, d_global_out, d_global_lse, q, k, v, window, scale, extra_k, extra_v,
            global_q, out, lse, global_out, global_lse,
        )  # fmt: skip
    launch, d_q, delta = query_gradient_launch(
        d_out, d_lse, q, k, v, window, scale, extra_k, extra_v, out, lse
    )
    launch.run()
    d_global_q = global_delta = None
    if global_q is not None and global_out is not None and global_lse is not None:
        if d_global_out is None:
            d_global_out = torch.zeros_like(global_out)
        d_global_out, global_out = rows_in_line(d_global_out, global_out)
        d_global_q, global_delta = dense_query_gradient(
            d_global_out, d_global_lse, global_q, k, v, scale, extra_k, extra_v,
            global_out, global_lse,
        )  # fmt: skip
    of_global = (global_q, lse, delta, global_lse, global_delta)
    launch, d_k, d_v = key_gradient_launch(d_out, d_global_out, q, k, v, window, scale, *of_global)
    launch.run()
    d_extra_k = d_extra_v = None
    if extra_k is not None:
        d_extra_k, d_extra_v = dense_key_gradient(
            d_out, d_global_out, q, extra_k, extra_v, scale, *of_global
        )
    return d_q, d_k, d_v, d_extra_k, d_extra_v, d_global_q
