"""The tables and goals of `bench_kernels`, made from its result file alone."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vistoken.eval.bench_prune_tables import Goal
from vistoken.eval.results import ResultFile, load, machine_line
from vistoken.eval.tables import Grid

NAME = "bench_kernels"
BACKWARD_GOAL = 2.7  # times the forward
MEMORY_GOAL = 0.05  # of Q
COLUMNS = {
    "dense": "Dense",
    "flex_raster": "Flex raster",
    "flex_tiled": "Flex tiled",
    "natten": "NATTEN",
}
Row = Mapping[str, Any]


def median(row: Row, name: str) -> float | None:
    """Return the milliseconds of a column of a row, None where it has no time."""
    timing = row.get(name, {}).get("ms")
    return timing["median"] if timing else None


def backward_ratio(row: Row) -> float | None:
    """Return how many times as long as the forward the backward takes."""
    forward, backward = median(row, "ours"), median(row, "backward")
    return backward / forward if forward and backward else None


def tera_flops(row: Row) -> float | None:
    """Return TFLOP/s of the forward, counting visible pairs only."""
    forward = median(row, "ours")
    return row["flops"] / forward / 1e9 if forward else None


def bound_share(row: Row) -> float | None:
    """Return the block-sparse bound, dense time times touched share, over the time of ours."""
    forward, dense = median(row, "ours"), median(row, "dense")
    return dense * row["touched_share"] / forward if forward and dense else None


def memory_share(row: Row) -> float | None:
    """Return what the forward needs beside inputs and output, as a share of Q."""
    memory = row.get("ours", {}).get("memory")
    return memory["extra"] / memory["q"] if memory else None


def failures(result: ResultFile) -> list[str]:
    """Return what failed of ours, forward or backward, with its reason."""
    return [
        f"{row['name']}, {name}: {row[name]['failed']}"
        for row in result.rows
        for name in ("ours", "backward")
        if "failed" in row.get(name, {})
    ]


def progress_line(row: Row) -> str:
    """Return one line about a case, for the log of a run."""
    parts = []
    for name in ("ours", "backward", *COLUMNS):
        if (ms := median(row, name)) is not None:
            parts.append(f"{name} {_ms(ms)}")
        elif "failed" in row.get(name, {}):
            parts.append(f"{name} FAILED: {row[name]['failed']}")
    return f"{row['name']:<18}" + "  ".join(parts)


def time_grid(result: ResultFile) -> Grid:
    """The main table: every case with its times, those of others, and how near its bound it is."""
    columns = (
        *("<Case", "Ours", "Goal", "Backward", *COLUMNS.values()),
        *("TFLOP/s", "Of bound", "Extra memory", "<Kernel"),
    )
    published = any(row.get("natten_ms") and not median(row, "natten") for row in result.rows)
    note = (
        f"{result.settings['dtype']}, milliseconds, medians on an idle device with a cold L2 "
        "cache; forward but for one column, with everything that a call does: sorting of tokens, "
        "padding, merges. In brackets: times as long as our forward. Before it is timed, every "
        "column must agree with dense attention in fp64 on sampled tiles. TFLOP/s count visible "
        "pairs. Of bound: the time of dense attention, times the share of tiles (128 queries by "
        "64 or 128 keys, aligned) that the window touches, over our time; our tiles lie where the "
        "window does, so small windows can exceed it. Extra memory: beside inputs and output, as "
        f"a share of Q. {PUBLISHED if published else ''}{machine_line(result.machine)}."
    )
    rows = [_cells(row) for row in result.rows]
    return Grid("Attention over windows", columns, rows, note)


PUBLISHED = (
    "In italics: what NATTEN 0.20 publishes for an H100, permutation included; not measured here. "
)


def _cells(row: Row) -> list[str]:
    ours = median(row, "ours")
    title = f"{row['title']}{_shape(row)}"
    if ours is None:
        failed = "failed" if "failed" in row.get("ours", {}) else ""
        return [title, failed, _goal(row), "", *(_rival(row, name) for name in COLUMNS), *[""] * 4]
    rate, bound, memory = tera_flops(row), bound_share(row), memory_share(row)
    kernel = row["ours"].get("kernel") or ""
    backward = "failed" if "failed" in row.get("backward", {}) else _rival(row, "backward")
    return [
        title,
        _ms(ours),
        _goal(row),
        backward,
        *(_rival(row, name) for name in COLUMNS),
        f"{rate:.0f}" if rate and rate >= 10 else f"{rate:.2g}",
        "" if bound is None else f"{bound:.0%}",
        "" if memory is None else f"{memory:.1%}",
        kernel,
    ]


def _shape(row: Row) -> str:
    batch = f"batch {row['batch']}, " if row["batch"] > 1 else ""
    return f"; {batch}{row['heads']} heads, D={row['dim']}"


def _rival(row: Row, name: str) -> str:
    """A time and, in brackets, how many times ours it is."""
    ms, ours = median(row, name), median(row, "ours")
    italic = ""
    if ms is None and name == "natten" and row.get("natten_ms"):
        ms, italic = row["natten_ms"], "*"
    if ms is None:
        return ""
    ratio = f" ({ms / ours:.2f}×)" if ours else ""
    return f"{italic}{_ms(ms)}{ratio}{italic}"


def _goal(row: Row) -> str:
    if row["goal"] is None:
        return ""
    ours = median(row, "ours")
    met = "" if ours is None else ", met" if ours <= row["goal"] else ", missed"
    return f"≤ {row['goal']:g}{met}"


def _ms(ms: float) -> str:
    return f"{ms:.2f}" if ms < 10 else f"{ms:.1f}"


def goals(result: ResultFile) -> list[Goal]:
    """Return every goal with what was reached: times, backward, memory; none of a quick run."""
    found: list[Goal] = []
    if result.settings["quick"]:
        return found
    for row in result.rows:
        ours = median(row, "ours")
        if row["goal"] is not None and ours is not None:
            asked = f"at most {row['goal']:g} ms"
            found.append(Goal(row["title"], f"{_ms(ours)} ms", asked, ours <= row["goal"]))
    ratios = [ratio for row in result.rows if (ratio := backward_ratio(row)) is not None]
    if ratios:
        asked, worst = f"at most {BACKWARD_GOAL}", max(ratios)
        met = worst <= BACKWARD_GOAL
        found.append(Goal("backward, times the forward", f"{worst:.2f}", asked, met))
    shares = [share for row in result.rows if (share := memory_share(row)) is not None]
    if shares:
        asked, worst = f"under {MEMORY_GOAL:.0%}", max(shares)
        found.append(Goal("extra memory, of Q", f"{worst:.1%}", asked, worst < MEMORY_GOAL))
    return found


def goals_grid(result: ResultFile) -> Grid:
    """The goals and what was reached, one line each."""
    rows = [
        [goal.what, goal.reached, goal.asked, "met" if goal.met else "missed"]
        for goal in goals(result)
    ]
    return Grid("Goals", ("<Goal", "Reached", "<Asked", "<"), rows)


def readme_table(folder: Path) -> str:
    """Markdown: the table of the result file in `folder`."""
    return time_grid(load(folder / f"{NAME}.json", NAME)).to_markdown()
