"""Tables of a scoreboard's result file, for the terminal and for Markdown."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich import box
from rich.table import Table
from rich.text import Text

from vistoken.eval import results
from vistoken.eval.tables import Grid

NAME = "scoreboard"
SCORED = ("exists", "color", "count", "quadrant")
VERSUS_TASKS = ("exists", "color")
_TITLES = {"exists": "yes/no", "quadrant": "where"}
_COSTS = (("flops", 1e9, "prefill, GFLOP"), ("kv_bytes", 2**20, "KV cache, MiB"))


def percent(row: Mapping[str, Any]) -> str:
    """Return the accuracy of a row in per cent, with its interval."""
    accuracy = f"{100 * row['accuracy']:.1f}"
    return accuracy + (f" {_range(row['interval'])}" if "interval" in row else "")


def short_percent(row: Mapping[str, Any]) -> str:
    """Return the accuracy of a row in per cent, with half the width of its interval."""
    accuracy = f"{100 * row['accuracy']:.1f}"
    if "interval" not in row:
        return accuracy
    low, high = row["interval"]
    return f"{accuracy} ±{50 * (high - low):3.1f}"


def _range(interval: tuple[float, float], sign: str = "") -> str:
    low, high = (f"{100 * value:{sign}.1f}" for value in interval)
    return f"[{low}, {high}]"


def title_of(row: Mapping[str, Any]) -> str:
    """Return the name of a row's method, with the number of seeds where there are several."""
    if row["method"] is None:
        return "bare model"
    return row["method"] + (f" ({row['seeds']} seeds)" if row["seeds"] > 1 else "")


def budgets(result: results.ResultFile) -> list[int]:
    """Return the numbers of kept tokens, the bare model's first."""
    return list(dict.fromkeys(row["keep"] for row in result.rows))


def lines(result: results.ResultFile) -> list[tuple[str, dict[int, Mapping[str, Any]]]]:
    """Return for every method its title and its rows by budget, the bare model first."""
    found: dict[str, dict[int, Mapping[str, Any]]] = {}
    for row in result.rows:
        found.setdefault(title_of(row), {})[row["keep"]] = row
    return list(found.items())


def costs(result: results.ResultFile) -> list[list[str]]:
    """Return a line for each cost of a prefill, by budget: of methods that prune before the LLM.

    Where no row says how many tokens a layer sees, of the first method.
    """
    first = {row["keep"]: row for row in reversed(result.rows)}
    first |= {r["keep"]: r for r in reversed(result.rows) if r.get("mean_tokens") == r["keep"]}
    return [
        [label, *(f"{first[keep][name] / unit:.2f}" for keep in budgets(result))]
        for name, unit, label in _COSTS
    ]


def overview(result: results.ResultFile) -> Table:
    """Return the table for a terminal: a line for each method, a column for each budget."""
    keeps = budgets(result)
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("visual tokens", no_wrap=True)
    for keep in keeps:
        table.add_column(str(keep), justify="right", no_wrap=True)
    for line in costs(result):
        table.add_row(*line, style="dim")
    table.add_section()
    best = {k: max(row["accuracy"] for row in result.rows if row["keep"] == k) for k in keeps}
    for title, mine in lines(result):
        cells = [Text(short_percent(mine[keep]) if keep in mine else "") for keep in keeps]
        for keep, cell in zip(keeps, cells, strict=True):
            if keep in mine and mine[keep]["accuracy"] == best[keep]:
                cell.stylize("bold green")
        table.add_row(Text(title), *cells)
    return table


def details(result: results.ResultFile) -> Grid:
    """Return every row with its tasks and its difference to the bare model."""
    columns = ["<tokens", "<method", "accuracy", "to bare", *(_TITLES.get(t, t) for t in SCORED)]
    columns.append("tokens a layer")
    versus = result.settings.get("versus")
    if versus:
        columns.append(f"{versus} above it")
    rows = []
    for row in result.rows:
        change = row.get("difference") if row["method"] else None
        shown = ""
        if change:
            shown = f"{100 * change['value']:+.1f} {_range(change['interval'], '+')}"
        tasks = [f"{100 * row['tasks'][task]:.1f}" for task in SCORED]
        cells = [str(row["keep"]), title_of(row), percent(row), shown, *tasks]
        cells.append(f"{row['mean_tokens']:.1f}" if "mean_tokens" in row else "")
        if versus:
            above = row.get("versus")
            text = f"{100 * above['value']:+.1f} {_range(above['interval'], '+')}" if above else ""
            cells.append(text)
        rows.append(cells)
    return Grid("Accuracy by method, budget and task", columns, rows)


def note(result: results.ResultFile, interval: str = "[95 % interval over pictures]") -> str:
    """Return what the accuracies are of, and where they were measured."""
    asked = result.settings
    return (
        f"Accuracy in per cent {interval}: {asked['questions']} questions "
        f"(yes/no, color, count, where) about {asked['pictures']} {asked['split']} pictures, "
        f"greedy answers of {asked['model']} in {asked['dtype']}, exact match. "
        f"Measured on {results.machine_line(result.machine)}."
    )


def costs_note(result: results.ResultFile) -> str:
    """Return what the table does not show of methods that act inside the LLM, if there are any."""
    inside = {
        f"{row['method']} {row['mean_tokens']:.0f}"
        for row in result.rows
        if row["keep"] == min(budgets(result)) and row.get("mean_tokens", 0) > row["keep"] + 1
    }
    if not inside:
        return ""
    return (
        " Costs are those of methods that prune before the LLM; of methods that act inside it the "
        f"layers see more tokens on average, at a budget of {min(budgets(result))}: "
        f"{', '.join(sorted(inside))}."
    )


def readme_table(folder: Path = results.FOLDER) -> str:
    """Return the Markdown table of the scoreboard's result file in `folder`."""
    result = results.load(folder / f"{NAME}.json", NAME)
    columns = ["<visual tokens", *map(str, budgets(result))]
    rows = [
        [title, *(percent(mine[keep]) if keep in mine else "" for keep in budgets(result))]
        for title, mine in lines(result)
    ]
    return Grid(
        "", columns, [*rows, *costs(result)], note(result) + costs_note(result)
    ).to_markdown()
