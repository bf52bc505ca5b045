"""Attention over the windows of a grid: the choice of a backend, dilation, and text tokens."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from functools import partial
from types import ModuleType

import torch
from torch import Tensor

from vistoken.errors import MethodError
from vistoken.kernels.backends import BACKENDS, automatic_backends, select_backend
from vistoken.kernels.grid_checks import check_inputs, softmax_scale
from vistoken.kernels.grid_dilation import (
    Cut,
    Result,
    attend_dilated,
    global_calls,
    on_three_axes,
    three_axes,
    without_rows,
)
from vistoken.kernels.windows import Neighborhood, Window

# asked once, when this file is imported: torch.compile cannot follow the search
_TRITON_INSTALLED = importlib.util.find_spec("triton") is not None


def grid_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    where: Neighborhood | Window,
    *,
    scale: float | None = None,
    extra_k: Tensor | None = None,
    extra_v: Tensor | None = None,
    global_q: Tensor | None = None,
    backend: str | None = None,
) -> Result:
    """Return (out, lse, global_out, global_lse) of attention where a query sees a window of a grid.

    q [B, *grid, Hq, D], k [B, *grid, Hkv, D] and v [B, *grid, Hkv, Dv] on a grid of one to three
    axes, fp16, bf16, fp32 or fp64, of any strides; query head h reads the kv head h // (Hq // Hkv).
    where: the windows, from `neighborhood` or `disc_window`. extra_k [B, N, Hkv, D] and extra_v
    [B, N, Hkv, Dv] are keys that every query sees in the same softmax; global_q [B, G, Hq, D] are
    queries that see every key of the grid and every extra key: together the text of a diffusion
    transformer, or its prefix tokens. scale multiplies the logits, D ** -0.5 by default.

    out [B, *grid, Hq, Dv] and global_out [B, G, Hq, Dv] have the dtype of q; lse [B, *grid, Hq] and
    global_lse [B, G, Hq] hold the natural logarithm of the sum of exp(scale * q k) in fp32 (fp64
    for fp64 inputs). Without `global_q` the last two are None. Gradients are exact, those through
    the lse too, and bit-identical from run to run on `triton`. Runs under `torch.compile` with
    fullgraph; autocast leaves the dtypes as they are.

    backend: `reference`, the definition, takes queries times keys of memory; `tiled`, plain torch
    for every device; `flex`, `triton` and `natten`. By default CUDA tensors that triton can take go
    there, all others to `tiled`. Raises `MethodError` for inputs that do not fit together and
    `BackendUnavailable` where a backend asked for cannot run.
    """
    rank = _rank(q, where)
    check_inputs(q, k, v, rank, extra_k, extra_v, global_q)
    _check_grid(q, where)
    return attend_windows(
        "grid_attention", q, k, v, where, softmax_scale(scale, q), extra_k, extra_v, global_q,
        backend,
    )  # fmt: skip


def attend_windows(
    operation: str,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    where: Neighborhood | Window,
    scale: float,
    extra_k: Tensor | None,
    extra_v: Tensor | None,
    global_q: Tensor | None,
    backend: str | None,
) -> Result:
    """Do what `grid_attention` does on inputs that were checked; `operation` names it in errors."""
    calls = _calls(where)
    extras = (scale, extra_k, extra_v)
    name = select_backend(
        operation,
        backend,
        lambda name: _why_not(name, q, k, v, calls, *extras, global_q),
        BACKENDS,
        automatic_backends(q.device),
    )
    if not q.shape[0]:
        return _without_batch(q, k, v, extra_k, extra_v, global_q)
    run = _runner(name)
    with torch.autocast(_autocast_device(q), enabled=False):
        if len(calls) == 1:
            return on_three_axes(run, q, k, v, calls[0][1], *extras, global_q)
        return attend_dilated(run, q, k, v, calls, *extras, global_q)


def attend_sequence(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    where: Neighborhood | Window,
    scale: float | None,
    part: tuple[int, int],
    text: tuple[Tensor | None, Tensor | None, Tensor | None],
    backend: str | None,
) -> tuple[Tensor, Tensor] | None:
    """Return (out, lse) of sequences [B, S, heads, D], written where they belong at once.

    The tokens part[0]..part[1] are the grid, `text` is q, k and v of the others. None, if only
    `grid_attention` and a copy will do: on other backends than `triton`, and with dilation.
    """
    calls = _calls(where)
    grid_q, grid_k, grid_v = (x[:, slice(*part)].unflatten(1, where.grid) for x in (q, k, v))
    extras = (text[1], text[2], text[0])
    check_inputs(grid_q, grid_k, grid_v, len(where.grid), *extras)
    factor = softmax_scale(scale, q)
    name = select_backend(
        "pattern_attention",
        backend,
        lambda name: _why_not(name, grid_q, grid_k, grid_v, calls, factor, *extras),
        BACKENDS,
        automatic_backends(q.device),
    )
    if name != "triton" or len(calls) > 1 or not q.shape[0]:
        return None
    from vistoken.kernels import sequence_operator

    with torch.autocast(_autocast_device(q), enabled=False):
        return sequence_operator.forward(q, k, v, calls[0][1], factor, *part)


def why_not(
    name: str,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    where: Neighborhood | Window,
    *,
    scale: float | None = None,
    extra_k: Tensor | None = None,
    extra_v: Tensor | None = None,
    global_q: Tensor | None = None,
) -> str | None:
    """Return why `grid_attention` cannot run on the backend `name` with these inputs, or None."""
    check_inputs(q, k, v, _rank(q, where), extra_k, extra_v, global_q)
    _check_grid(q, where)
    factor = softmax_scale(scale, q)
    return _why_not(name, q, k, v, _calls(where), factor, extra_k, extra_v, global_q)


def _why_not(
    name: str,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    calls: Sequence[tuple[Cut, Window]],
    scale: float,
    extra_k: Tensor | None,
    extra_v: Tensor | None,
    global_q: Tensor | None,
) -> str | None:
    if name == "triton" and not _TRITON_INSTALLED:
        return "triton is not installed"
    module = _module(name)
    dilated = len(calls) > 1
    asked: list[Window] = []
    for cut, window in calls:
        if window in asked:
            continue
        asked.append(window)
        views = [three_axes(x[(slice(None), *cut)]) for x in (q, k, v)]
        reason = module.why_not(
            *views, window, scale, extra_k, extra_v, None if dilated else global_q
        )
        if reason is not None:
            return reason
    if dilated and global_q is not None:
        for call in global_calls(global_q, k, v, scale, extra_k, extra_v):
            reason = module.why_not(*call)
            if reason is not None:
                return reason
    return None


def _module(name: str) -> ModuleType:
    """The file of a backend. Plain imports, which `torch.compile` can follow."""
    if name == "reference":
        from vistoken.kernels import grid_reference

        return grid_reference
    if name == "tiled":
        from vistoken.kernels import grid_tiled

        return grid_tiled
    if name == "flex":
        from vistoken.kernels import grid_flex

        return grid_flex
    if name == "natten":
        from vistoken.kernels import grid_natten

        return grid_natten
    from vistoken.kernels import grid_triton

    return grid_triton


def _runner(name: str) -> Callable[..., Result]:
    """The forward of a backend, which autograd and torch.compile can follow."""
    if name == "triton" or (name == "tiled" and torch.compiler.is_compiling()):
        # here, because it takes a second to load what defines operators
        from vistoken.kernels import grid_operator

        return partial(grid_operator.forward, name)
    return _module(name).forward


def _autocast_device(q: Tensor) -> str:
    """The device type whose autocast is to be off: what is computed in is not its choice."""
    kind = q.device.type
    # older compilers cannot follow the question, which only matters on the device `meta`
    if torch.compiler.is_compiling() or torch.amp.is_autocast_available(kind):
        return kind
    return "cpu"


# --- the grid ------------------------------------------------------------------------------------


def _rank(q: Tensor, where: Neighborhood | Window) -> int:
    """How many axes the grid of q has."""
    if isinstance(where, Neighborhood):
        return len(where.grid)
    if not isinstance(where, Window):
        raise MethodError(f"where must be a Neighborhood or a Window, got {type(where).__name__}.")
    return min(max(q.dim() - 3, 1), 3) if isinstance(q, Tensor) else 3


def _check_grid(q: Tensor, where: Neighborhood | Window) -> None:
    grid = tuple(q.shape[1:-2])
    given = grid if isinstance(where, Neighborhood) else (1,) * (3 - len(grid)) + grid
    if given != where.grid:
        raise MethodError(f"where is for a grid of {where.grid} tokens, got q on a grid of {grid}.")


def _calls(where: Neighborhood | Window) -> list[tuple[Cut, Window]]:
    """The part of the grid and its window of every call without dilation; an empty cut is all."""
    if isinstance(where, Window):
        return [((), where)]
    calls = list(where.groups())
    return calls if len(calls) > 1 else [((), calls[0][1])]


def _without_batch(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    extra_k: Tensor | None,
    extra_v: Tensor | None,
    global_q: Tensor | None,
) -> Result:
    """Results of no entries, which depend on every input as far as autograd can see."""
    link = torch.stack([x.sum() for x in (q, k, v, extra_k, extra_v, global_q) if x is not None])
    out, lse = without_rows(q, v)
    results = (out + link.sum(), lse + link.sum())
    return (*results, None, None) if global_q is None else (*results, *without_rows(global_q, v))
