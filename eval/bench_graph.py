"""The table of `examples/cuda_graph_prefill.py`, made from its result file alone."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vistoken.errors import DataError
from vistoken.eval.results import ResultFile, load, machine_line
from vistoken.eval.tables import Grid

NAME = "bench_graph"


def speed_up(result: ResultFile, row: Mapping[str, Any], lap: str) -> float:
    """Return how many times as fast as the first row, the dense model, a row is, by medians."""
    return result.rows[0]["ms"][lap]["median"] / row["ms"][lap]["median"]


def grid(result: ResultFile) -> Grid:
    """The LLM's part and the whole time to the first token, one picture at a time."""
    rows = []
    for row in result.rows:
        cells = [row["label"]]
        for lap in ("llm", "first_token"):
            ms = row["ms"][lap]
            cells.append(f"{ms['median']:.2f} ({ms['p20']:.2f} to {ms['p80']:.2f})")
            cells.append(f"{speed_up(result, row, lap):.2f}×")
        rows.append(cells)
    columns = ("<Prefill", "LLM", "LLM speed-up", "First token", "Speed-up")
    s, checks = result.settings, result.checks
    note = (
        f"{s['title']} with random weights, {s['dtype']}, batch 1, {s['method']}. Times in ms, "
        f"medians of {s['repeats']} calls (20th to 80th percentile). First token: vision tower and "
        "selection, both eager, and the LLM. Logits differ from those of the eager pruned model by "
        f"{checks['logits']:.1%} (another picture's: {checks['control']:.0%}). "
        f"{machine_line(result.machine)}."
    )
    return Grid(f"{s['title']}: one picture", columns, rows, note)


def summary(result: ResultFile) -> str:
    """Return one line: the dense and the graphed time, and their ratio."""
    dense, graphed = result.rows[0], result.rows[-1]
    first, last = (row["ms"]["first_token"]["median"] for row in (dense, graphed))
    return (
        f"first token: {dense['label']} {first:.2f} ms, {graphed['label']} {last:.2f} ms, "
        f"{speed_up(result, graphed, 'first_token'):.2f} times as fast "
        f"(its LLM part {speed_up(result, graphed, 'llm'):.2f} times)"
    )


def readme_table(folder: Path) -> str:
    """Markdown: the table of the result file in `folder`."""
    path = folder / f"{NAME}.json"
    if not path.is_file():
        raise DataError(
            f"there is no result file {path}; write it with "
            f"`python examples/cuda_graph_prefill.py --out {path}`"
        )
    return grid(load(path, NAME)).to_markdown()
