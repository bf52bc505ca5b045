"""`vistoken kernels --why` and `vistoken kernels simulate`."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import asdict
from typing import Annotated, Any

import torch
import typer
from rich import box
from rich.table import Table
from rich.text import Text

from vistoken.commands.loading import choose_device
from vistoken.commands.output import (
    AsJson,
    Debug,
    console,
    fails_clearly,
    memory,
    print_json,
)
from vistoken.errors import MethodError
from vistoken.kernels import disc_window, explain_backends, grid_hopper, neighborhood
from vistoken.kernels.simulate import Simulation, simulate
from vistoken.kernels.tile_advice import (
    Choice,
    own_tiles,
    rank_strides,
    rank_tiles,
    rank_windows,
)
from vistoken.kernels.windows import Neighborhood, Window

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
KernelSize = Annotated[
    str | None, typer.Option(help="Keys of a window along each axis, as 18x24x24, or one for all.")
]
Stride = Annotated[str, typer.Option(help="Neighboring queries that share a window, likewise.")]
Dilation = Annotated[str, typer.Option(help="Distance between the keys of a window, likewise.")]
Causal = Annotated[str, typer.Option(help="yes or no, likewise: hide keys after the query.")]
Radius = Annotated[int | None, typer.Option(help="A disc instead of a window, on two axes.")]
Heads = Annotated[int, typer.Option(help="Query heads.", min=1)]
KvHeads = Annotated[int | None, typer.Option(help="Key and value heads.", min=1)]
Dim = Annotated[int, typer.Option(help="Size of a head.", min=1)]
Batch = Annotated[int, typer.Option(help="Rows of the batch.", min=1)]
Dtype = Annotated[str, typer.Option(help=f"{', '.join(DTYPES)}.")]

app = typer.Typer(
    name="kernels",
    help="Attention over windows: what runs here, and what it costs.",
    invoke_without_command=True,
)


@app.callback()
@fails_clearly
def kernels(
    context: typer.Context,
    why: Annotated[
        bool, typer.Option("--why", help="Say which backends can run here, and why not.")
    ] = False,
    grid: Annotated[str, typer.Option(help="Tokens along each axis.")] = "64x64",
    kernel_size: KernelSize = None,
    stride: Stride = "1",
    dilation: Dilation = "1",
    is_causal: Causal = "no",
    radius: Radius = None,
    heads: Heads = 16,
    kv_heads: KvHeads = None,
    dim: Dim = 64,
    batch: Batch = 1,
    dtype: Dtype = "bf16",
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:1.")] = "auto",
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Attention over windows: what runs here, and what it costs.

    With --why: which backends can run inputs of a shape here; a window of 13 unless you say more.
    """
    if context.invoked_subcommand is not None:
        return
    if not why:
        typer.echo(context.get_help())
        return
    lengths = _numbers("GRID", grid)
    if kernel_size is None and radius is None:
        kernel_size = "x".join(str(min(13, length)) for length in lengths)
    where = _where(lengths, kernel_size, stride, dilation, is_causal, radius)
    kinds = {"device": choose_device(device), "dtype": _dtype(dtype)}
    q = torch.empty(batch, *lengths, heads, dim, **kinds)  # type: ignore[call-overload]
    k = torch.empty(batch, *lengths, kv_heads or heads, dim, **kinds)  # type: ignore[call-overload]
    rows = [asdict(row) for row in explain_backends(q, k, k, where)]
    for row in rows:
        if row["backend"] == "triton" and row["runs"]:
            row["reason"] = _forward_kernel(q, k, where)
    if as_json:
        print_json(rows)
        return
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for heading in ("backend", "runs", "why"):
        table.add_column(heading)
    for row in rows:
        runs = "yes" if row["runs"] else "no"
        chosen = "yes, chosen" if row["chosen"] else runs
        table.add_row(Text(row["backend"], style="bold"), chosen, Text(row["reason"]))
    console().print(table)


def _forward_kernel(q: torch.Tensor, k: torch.Tensor, where: Neighborhood | Window) -> str:
    """Which of the two Triton forward kernels takes these inputs."""
    cut, window = ((), where) if isinstance(where, Window) else next(where.groups())
    q, k = (x[(slice(None), *cut)] for x in (q, k))
    while q.dim() < 6:
        q, k = q.unsqueeze(1), k.unsqueeze(1)
    reason = grid_hopper.why_not(q, k, k, window, q.shape[-1] ** -0.5)
    if reason is None:
        return "with the kernel for Hopper"
    return f"with the portable kernel; the one for Hopper does not fit: {reason}"


@app.command(name="simulate")
@fails_clearly
def simulate_command(
    grid: Annotated[str, typer.Argument(help="Tokens along each axis, as 30x48x80.")],
    kernel_size: KernelSize = None,
    stride: Stride = "1",
    dilation: Dilation = "1",
    is_causal: Causal = "no",
    radius: Radius = None,
    q_tile: Annotated[str | None, typer.Option(help="Queries of a tile, as 4x4x8.")] = None,
    kv_tile: Annotated[str | None, typer.Option(help="Keys of a tile, likewise.")] = None,
    heads: Heads = 1,
    kv_heads: KvHeads = None,
    dim: Dim = 128,
    batch: Batch = 1,
    dtype: Dtype = "bf16",
    top: Annotated[int, typer.Option(help="Choices to show of each kind.", min=1)] = 5,
    advice: Annotated[bool, typer.Option(help="Rank tiles, strides and windows.")] = True,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Count the tiles that windows touch: bounds on the speed-up, masks, padding, and advice."""
    lengths = _numbers("GRID", grid)
    where = _where(lengths, kernel_size, stride, dilation, is_causal, radius)
    found = [("ours", own_tiles(where, dim))]
    if (q_tile is None) != (kv_tile is None):
        raise MethodError("--q-tile and --kv-tile are given together.")
    if q_tile is not None and kv_tile is not None:
        tiles = [_whole_tile(where, _numbers("tile", tile)) for tile in (q_tile, kv_tile)]
        found.append(("given", simulate(where, *tiles)))
    else:
        found.append(("usual", simulate(where, *_usual_tiles(where))))
    if advice:
        found += [("aligned", one) for one in rank_tiles(where, top=top)]
    strides, windows = [], []
    if advice and isinstance(where, Neighborhood):
        strides, windows = rank_strides(where, top=top), rank_windows(where, top=top)
    size = {
        "batch": batch, "heads": heads, "kv_heads": kv_heads, "dim": dim,
        "itemsize": _dtype(dtype).itemsize,
    }  # fmt: skip
    if as_json:
        print_json(_as_dict(where, radius, found, strides, windows, size))
        return
    _show(where, lengths, radius, found, size)
    _show_choices("Strides for this window (each is another attention)", strides)
    _show_choices("Windows that need no mask (each is another attention)", windows)


# --- what was asked ------------------------------------------------------------------------------


def _numbers(name: str, text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in re.split(r"[x×,]", text))
    except ValueError as error:
        raise MethodError(f"{name} must be numbers such as 30x48x80, got {text!r}.") from error


def _per_axis(name: str, text: str) -> int | tuple[int, ...]:
    numbers = _numbers(name, text)
    return numbers[0] if len(numbers) == 1 else numbers


def _flags(text: str) -> bool | tuple[bool, ...]:
    words = {"yes": True, "no": False}
    parts = re.split(r"[x×,]", text)
    if any(part not in words for part in parts):
        raise MethodError(f"--is-causal must be yes or no for all axes or for each, got {text!r}.")
    flags = tuple(words[part] for part in parts)
    return flags[0] if len(flags) == 1 else flags


def _where(
    grid: tuple[int, ...],
    kernel_size: str | None,
    stride: str,
    dilation: str,
    is_causal: str,
    radius: int | None,
) -> Neighborhood | Window:
    """The windows that the options name; raises `MethodError`."""
    if (kernel_size is None) == (radius is None):
        raise MethodError("Give either --kernel-size or --radius.")
    if radius is not None:
        if (stride, dilation, is_causal) != ("1", "1", "no"):
            raise MethodError("A disc has no stride, no dilation and no causal axis.")
        return disc_window(grid, radius)
    return neighborhood(
        grid,
        _per_axis("--kernel-size", str(kernel_size)),
        _per_axis("--stride", stride),
        _per_axis("--dilation", dilation),
        _flags(is_causal),
    )


def _dtype(name: str) -> torch.dtype:
    if name not in DTYPES:
        raise MethodError(f"--dtype must be one of {', '.join(DTYPES)}, got {name!r}.")
    return DTYPES[name]


def _whole_tile(where: Neighborhood | Window, tile: Sequence[int]) -> tuple[int, ...]:
    """A tile for every axis of the windows: those of a disc have a leading one of length 1."""
    lead = len(where.grid) - len(tile) if isinstance(where, Window) else 0
    return (*(1,) * max(lead, 0), *tile)


def _usual_tiles(where: Neighborhood | Window) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Query and key tiles of 128 that NATTEN takes on Hopper when nothing else is said."""
    usual = {1: (128,), 2: (16, 8), 3: (4, 4, 8)}
    rank = 2 if isinstance(where, Window) else len(where.grid)
    tile = _whole_tile(where, usual[rank])
    return tile, tile


# --- what is shown -------------------------------------------------------------------------------


def _tile_name(tile: Sequence[int], rank: int) -> str:
    return "×".join(map(str, tile[-rank:]))


def _show(
    where: Neighborhood | Window,
    grid: tuple[int, ...],
    radius: int | None,
    found: Sequence[tuple[str, Simulation]],
    size: dict[str, Any],
) -> None:
    rank = len(grid)
    some = found[0][1]
    window = f"a disc of radius {radius}"
    if isinstance(where, Neighborhood):
        window = f"a window of {_tile_name(where.kernel_size, rank)}"
    console().print(
        Text(
            f"{_tile_name(grid, rank)} = {some.tokens} tokens, {window}: a query sees "
            f"{some.pairs / some.tokens:.1f} keys on average, 1 / {some.visible_bound:.2f} of all."
        )
    )
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, title="Tiles", title_justify="left")
    for heading in ("", "queries", "keys"):
        table.add_column(heading)
    for heading in ("exact", "interior", "unmasked", "work", "padding", "permutation", "masks"):
        table.add_column(heading, justify="right")
    for name, one in found:
        table.add_row(
            name,
            *(_tile_name(tile, rank) for tile in (one.q_tile, one.kv_tile)),
            *_cells(one),
            f"{one.padding:.1%}",
            memory(moved) if (moved := one.permute_bytes(**size)) else "none",
            "none" if one.block_sparse else "needed",
        )
    console().print(table)
    note = (
        "exact, interior: how many times as fast as dense attention at most, with the tiles "
        "that are touched, or with every query tile charged as the dearest. unmasked: share of "
        "them. work: pairs computed for a visible one. permutation: read and written to sort "
        "tokens into tiles. ours: placed where the windows are; usual: NATTEN's on Hopper."
    )
    console().print(Text(note, style="dim"))


def _cells(one: Simulation) -> list[str]:
    return [
        f"{one.exact_bound:.2f}",
        f"{one.interior_bound:.2f}",
        f"{one.full_share:.0%}",
        f"{one.overhead:.2f}",
    ]


def _show_choices(title: str, choices: Sequence[Choice]) -> None:
    if not choices:
        return
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, title=title, title_justify="left")
    for heading in ("window", "stride", "queries", "keys"):
        table.add_column(heading)
    for heading in ("exact", "interior", "unmasked", "work"):
        table.add_column(heading, justify="right")
    for one in choices:
        named = (one.kernel_size, one.stride, one.tiles.q_tile, one.tiles.kv_tile)
        rank = len(one.kernel_size)
        table.add_row(*(_tile_name(sides, rank) for sides in named), *_cells(one.tiles))
    console().print(table)


def _as_dict(
    where: Neighborhood | Window,
    radius: int | None,
    found: Sequence[tuple[str, Simulation]],
    strides: Sequence[Choice],
    windows: Sequence[Choice],
    size: dict[str, Any],
) -> dict[str, Any]:
    about = asdict(where) if isinstance(where, Neighborhood) else {"grid": where.grid[1:]}
    some = found[0][1]
    return {
        **about,
        "radius": radius,
        "tokens": some.tokens,
        "visible_pairs": some.pairs,
        "visible_bound": some.visible_bound,
        "tiles": [{"kind": name, **_facts(one, size)} for name, one in found],
        "strides": [_choice(one, size) for one in strides],
        "windows": [_choice(one, size) for one in windows],
    }


def _choice(choice: Choice, size: dict[str, Any]) -> dict[str, Any]:
    named = {"kernel_size": choice.kernel_size, "stride": choice.stride}
    return {**named, **_facts(choice.tiles, size)}


def _facts(one: Simulation, size: dict[str, Any]) -> dict[str, Any]:
    shown = ("exact_bound", "interior_bound", "share", "full_share", "overhead", "padding")
    moved = one.permute_bytes(**size)
    found = {**asdict(one), **{name: getattr(one, name) for name in shown}}
    return {**found, "touched_keys": one.touched * math.prod(one.kv_tile), "permute_bytes": moved}
