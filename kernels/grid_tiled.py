"""Attention over the windows of a grid in plain torch: exact, on every device, for every dtype.

Queries are taken in tiles. A row of tiles along the last axis copies the keys that it needs once,
last axis first, so that the keys of each tile are a slice of that copy. Memory is that of such
copies and of the logits of a few tiles, which backward computes again.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vistoken.kernels.grid_strips import Part, Row, Rows, Tile, global_row, parts, strip
from vistoken.kernels.grid_tiles import Costs, choose_tile, costs_of
from vistoken.kernels.tile_softmax import Scratch, attend, attend_backward, without_autocast
from vistoken.kernels.windows import Window

Result = tuple[Tensor, Tensor, Tensor | None, Tensor | None]
Gradients = tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None]


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
    """Return None: plain torch runs on every device and in every floating dtype."""
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
) -> Result:
    """Return (out, lse, global_out, global_lse) as `grid_reference.forward` does.

    Computed in fp32, or in fp64 for fp64 inputs, whose lse is fp64 too. Differentiable once; two
    backward passes give the same bits.
    """
    out, lse, global_out, global_lse = _Attention.apply(
        q, k, v, extra_k, extra_v, global_q, window, scale
    )
    return out, lse, global_out, global_lse


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Result:
        q, k, v, extra_k, extra_v, global_q, window, scale = inputs
        with without_autocast(q.device):
            result = compute(q, k, v, window, scale, extra_k, extra_v, global_q)
        ctx.window, ctx.scale = window, scale
        ctx.save_for_backward(q, k, v, extra_k, extra_v, global_q, *result)
        ctx.set_materialize_grads(False)
        return result

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        q, k, v, extra_k, extra_v, global_q, *result = ctx.saved_tensors
        inputs: tuple[Any, ...] = (q, k, v, ctx.window, ctx.scale, extra_k, extra_v, global_q)
        with without_autocast(q.device):
            return *backward(*grads, *inputs, *result), None, None


def compute(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    window: Window,
    scale: float,
    extra_k: Tensor | None = None,
    extra_v: Tensor | None = None,
    global_q: Tensor | None = None,
) -> Result:
    """Do what `forward` does, without a record for autograd."""
    call = _call(q, k, v, scale, extra_k, extra_v)
    out, lse = _forward_pass(call, q, call.grid_work(window))
    if global_q is None:
        return out, lse, None, None
    queries = _on_grid(global_q)
    global_out, global_lse = _forward_pass(call, queries, call.global_work(queries.shape[3]))
    return out, lse, global_out[:, 0, 0], global_lse[:, 0, 0]


def backward(
    d_out: Tensor | None,
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
) -> Gradients:
    """Return (dq, dk, dv, d_extra_k, d_extra_v, d_global_q), None where there is no input.

    out, lse, global_out and global_lse are what `compute` returned; a gradient that is None is 0.
    Sums are fp32, or fp64, over all tiles, in one order.
    """
    call = _call(q, k, v, scale, extra_k, extra_v)
    found = [
        None if x is None else torch.zeros(x.shape, dtype=call.dtype, device=x.device)
        for x in (k, v, extra_k, extra_v)
    ]
    sums = _Sums(*found)  # type: ignore[arg-type]
    given = _Given(q, out, lse, d_out, d_lse)
    dq = _backward_pass(call, given, sums, call.grid_work(window))
    d_global_q = None
    if global_q is not None and global_out is not None and global_lse is not None:
        given = _Given(
            *map(_on_grid, (global_q, global_out, global_lse, d_global_out, d_global_lse))
        )
        work = call.global_work(global_q.shape[1])
        d_global_q = _backward_pass(call, given, sums, work)[:, 0, 0]
    dk, dv, d_extra_k, d_extra_v = (None if x is None else x.to(q.dtype) for x in sums)
    return dq, dk, dv, d_extra_k, d_extra_v, d_global_q  # type: ignore[return-value]


# --- one call: over the queries of the grid, and over those that see everything ------------------

_Work = Iterator[tuple[Part, Iterable[Row]]]


class _Call(NamedTuple):
    """Keys and values of both passes, and how they are computed."""

    k: Tensor
    v: Tensor
    extra_k: Tensor | None
    extra_v: Tensor | None
    scale: float
    group: int
    dtype: torch.dtype
    scratch: Scratch
    costs: Costs

    @property
    def extra_keys(self) -> int:
        return 0 if self.extra_k is None else self.extra_k.shape[1]

    def grid_work(self, window: Window) -> _Work:
        """Yield the rows of tiles of the grid's queries, part by part."""
        batch, heads = self.k.shape[0], self.k.shape[4]
        tile = choose_tile(window, batch * heads, self.group, self.costs)
        rows = Rows(window, tile, self.group, self.extra_keys, self.dtype, self.k.device)
        for part in self._parts(rows.logits, rows.keys, self.costs.logits):
            yield part, rows.cut(self.costs.logits // part.pairs)

    def global_work(self, queries: int) -> _Work:
        """Yield the rows of tiles of queries that see everything, part by part."""
        keys = math.prod(self.k.shape[1:4])
        logits = self.group * (keys + self.extra_keys)  # of one query
        for part in self._parts(logits, keys, self.costs.most):
            together = max(self.costs.most // (part.pairs * logits), 1)
            yield part, [global_row(queries, self.k.shape[3], together)]

    def _parts(self, logits: int, keys: int, budget: int) -> Iterator[Part]:
        """The parts whose largest tile has few enough logits and whose keys are few enough."""
        numbers = keys * (self.k.shape[5] + self.v.shape[5])
        most = max(min(budget // logits, self.costs.strip // numbers), 1)
        return parts(self.k.shape[0], self.k.shape[4], self.group, most)

    def row_keys(self, part: Part, row: Row) -> tuple[Tensor, Tensor]:
        """Strips of the keys and the values of a row of tiles."""
        key, value = (strip(part.keys(x, row.keys), self.dtype) for x in (self.k, self.v))
        return key, value

    def row_queries(self, part: Part, row: Row, q: Tensor) -> Tensor:
        """Strip of the queries of a row of tiles, times the scale."""
        return strip(part.queries(q, row.queries), self.dtype) * self.scale

    def extras(self, part: Part) -> tuple[Tensor, Tensor] | None:
        """Extra keys and values [P, N, C], or None if there are none."""
        if self.extra_k is None or self.extra_v is None or not self.extra_keys:
            return None
        key, value = (part.extras(x).to(self.dtype) for x in (self.extra_k, self.extra_v))
        return key.flatten(0, 1), value.flatten(0, 1)


def _call(
    q: Tensor, k: Tensor, v: Tensor, scale: float, extra_k: Tensor | None, extra_v: Tensor | None
) -> _Call:
    dtype = torch.promote_types(q.dtype, torch.float32)
    group = q.shape[4] // k.shape[4]
    return _Call(k, v, extra_k, extra_v, scale, group, dtype, Scratch(q, dtype), costs_of(q.device))


def _on_grid(x: Any) -> Any:
    """[B, G, ...] as [B, 1, 1, G, ...]: queries that see everything, as the queries of a grid."""
    return None if x is None else x[:, None, None]


def _with_extras(tile: Tile, of_grid: Tensor, extras: Tensor | None) -> list[Tensor]:
    """The parts of a batch of tiles' keys, or values: those in a strip, and the extra ones."""
    here = tile.columns(of_grid)
    return [here] if extras is None else [here, _repeated(extras, tile.tiles)]


def _repeated(x: Tensor, tiles: int) -> Tensor:
    """[P, N, C] as [P * tiles, N, C]."""
    return x if tiles == 1 else x.repeat_interleave(tiles, 0)


def _forward_pass(call: _Call, q: Tensor, work: _Work) -> tuple[Tensor, Tensor]:
    out = q.new_empty((*q.shape[:-1], call.v.shape[-1]))
    lse = q.new_empty((*q.shape[:-1], 1), dtype=call.dtype)
    for part, rows in work:
        more_keys, more_values = call.extras(part) or (None, None)
        for row in rows:
            queries = call.row_queries(part, row, q)
            keys, values = call.row_keys(part, row)
            row_out = values.new_empty((*queries.shape[:-1], values.shape[-1]))
            row_lse = values.new_empty((*queries.shape[:-1], 1))
            for tile in row.tiles:
                tile_out, tile_lse = attend(
                    tile.rows(queries),
                    _with_extras(tile, keys, more_keys),
                    _with_extras(tile, values, more_values),
                    tile.mask,
                    call.scratch,
                )
                tile.put_rows(row_out, tile_out)
                tile.put_rows(row_lse, tile_lse)
            for whole, found in ((out, row_out), (lse, row_lse)):
                view = part.queries(whole, row.queries)
                view.copy_(found.view(view.shape))
    return out, lse[..., 0]


class _Given(NamedTuple):
    """The queries of a pass, what it returned, and the gradients of that."""

    q: Tensor
    out: Tensor
    lse: Tensor
    d_out: Tensor | None
    d_lse: Tensor | None


class _Sums(NamedTuple):
    """Gradients of keys and values so far, in the dtype that is computed in."""

    k: Tensor
    v: Tensor
    extra_k: Tensor | None
    extra_v: Tensor | None


def _backward_pass(call: _Call, given: _Given, sums: _Sums, work: _Work) -> Tensor:
    """Return dq, and add to the gradients of keys and values."""
    dq = torch.empty(given.q.shape, dtype=given.q.dtype, device=given.q.device)
    for part, rows in work:
        more_keys, more_values = call.extras(part) or (None, None)
        for row in rows:
            queries = call.row_queries(part, row, given.q)
            keys, values = call.row_keys(part, row)
            d_out, lse, delta = _row_gradients(call, part, row, given)
            d_queries = torch.empty_like(queries)
            d_keys, d_values = torch.zeros_like(keys), torch.zeros_like(values)
            for tile in row.tiles:
                tile_q, tile_d = tile.rows(queries), tile.rows(d_out)
                d_tile, weights, d_logits = attend_backward(
                    tile_q,
                    _with_extras(tile, keys, more_keys),
                    _with_extras(tile, values, more_values),
                    tile.mask,
                    tile.rows(lse),
                    tile_d,
                    tile.rows(delta),
                    call.scratch,
                )
                tile.put_rows(d_queries, d_tile)
                here = weights.shape[-1] - call.extra_keys
                tile.add_products(d_keys, d_logits[..., :here], tile_q)
                tile.add_products(d_values, weights[..., :here], tile_d)
                if sums.extra_k is not None and sums.extra_v is not None and call.extra_keys:
                    _add_extras(part, sums.extra_k, d_logits[..., here:], tile_q)
                    _add_extras(part, sums.extra_v, weights[..., here:], tile_d)
            view = part.queries(dq, row.queries)
            view.copy_(d_queries.mul_(call.scale).view(view.shape))
            for whole, found in ((sums.k, d_keys), (sums.v, d_values)):
                view = part.keys(whole, row.keys)
                view.add_(found.view(view.shape))
    return dq


def _row_gradients(
    call: _Call, part: Part, row: Row, given: _Given
) -> tuple[Tensor, Tensor, Tensor]:
    """Strips of a row's d_out, of its lse and of sum(d_out * out) less the gradient of the lse."""

    def of(x: Tensor) -> Tensor:
        return strip(part.queries(x, row.queries), call.dtype)

    out, lse = of(given.out), of(given.lse[..., None])
    d_out = torch.zeros_like(out) if given.d_out is None else of(given.d_out)
    delta = (d_out * out).sum(-1, keepdim=True)
    if given.d_lse is not None:
        delta = delta - of(given.d_lse[..., None])
    return d_out, lse, delta


def _add_extras(part: Part, whole: Tensor, weights: Tensor, rows: Tensor) -> None:
    """Add weights [P * tiles, M, N] transposed times rows [P * tiles, M, C] to the extra keys."""
    view = part.extras(whole)
    products = torch.bmm(weights.mT, rows)
    view.add_(products.view(*view.shape[:2], -1, *view.shape[2:]).sum(2))
