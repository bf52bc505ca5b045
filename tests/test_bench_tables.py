"""Goals and tables of the pruning benchmark, from rows written by hand."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from vistoken.eval import bench_graph, results
from vistoken.eval import bench_prune_tables as tables
from vistoken.eval.bench_variants import NEXT, Settings, Variant

Row = dict[str, Any]


def timed(label: str, batch: int, tokens: int, total: float, added: float, peak: int) -> Row:
    """A row as a run leaves it; the tower takes 10 ms."""
    times = {"added": added, "tower": 10.0, "llm": total - added - 10.0, "first_token": total}
    return {
        "label": label,
        "method": None if label.startswith("dense") else label.split()[0],
        "places": [] if label.startswith("dense") else ["PROJECTED"],
        "batch": batch,
        "visual_tokens": tokens,
        "ms": {k: {"median": v, "p20": v, "p80": v, "samples": 9} for k, v in times.items()},
        "memory": {"before": 0, "peak": peak, "added": peak},
        "sync": None if label.startswith("dense") else {"places": [], "waited": False},
    }


def large_result(**changes: Any) -> results.ResultFile:
    holov = Variant("holov", (("mode", "paper"),))
    settings = Settings(variants=(holov, Variant("random"))).to_dict()
    rows = [
        timed("dense", 8, 576, 160.0, 0.4, 3 << 30),
        {**timed("holov (paper)", 8, 64, 40.0, 2.5, 2 << 30), **changes},
        timed("random", 8, 64, 39.0, 1.5, 2 << 30),
        timed("dense, again", 8, 576, 161.0, 0.4, 3 << 30),
    ]
    checks = {"fp32_exact": {"failed": {}}, "undo_bit_equal": True, "flops": []}
    machine = results.machine("cpu")
    return results.ResultFile("bench_prune", machine, {**settings, "batches": [8]}, rows, checks)


def met(result: results.ResultFile) -> dict[str, bool]:
    return {goal.what.split(",")[0]: goal.met for goal in tables.goals(result)}


def test_goals_that_are_met() -> None:
    assert met(large_result()) == {
        "added at batch 8": True,
        "the same of the dense prefill": True,
        "to first token at batch 8": True,
        "peak memory": True,
        "host waits from the tower to the LLM": True,
    }
    assert "4.00×" in tables.time_grid(large_result()).rows[1]


@pytest.mark.parametrize(
    ("changes", "missed"),
    [
        (timed("holov (paper)", 8, 64, 40.0, 3.1, 1), {"added at batch 8"}),
        (
            timed("holov (paper)", 8, 64, 40.0, 8.1, 1),
            {"added at batch 8", "the same of the dense prefill"},
        ),
        (timed("holov (paper)", 8, 64, 46.0, 1.0, 1), {"to first token at batch 8"}),
        (timed("holov (paper)", 8, 64, 40.0, 1.0, 4 << 30), {"peak memory"}),
        (
            {"sync": {"places": [], "waited": True}},
            {"host waits from the tower to the LLM"},
        ),
    ],
)
def test_goals_that_are_missed(changes: Row, missed: set[str]) -> None:
    found = met(large_result(**changes))
    assert {what for what, reached in found.items() if not reached} == missed


def test_flops_off_by_more_than_two_percent_fail() -> None:
    row = {
        "report": {"flops": 97, "flops_dense": 100},
        "flops_counted": {"total": 100, "select": 0},
    }
    result = large_result(**row)
    result = replace(result, checks={**result.checks, "flops": tables.flops_rows(result.rows)})
    assert tables.failures(result) == ["reported FLOPs are off by -3.0% from the counted ones"]
    assert met(result)["reported FLOPs against counted"] is False


@pytest.mark.parametrize(("tower", "reached"), [(9.0, "2.00 ms"), (12.0, "5.00 ms")])
def test_what_a_method_costs_the_tower_counts_as_added(tower: float, reached: str) -> None:
    row = timed("flowcut", 8, 64, 45.0, 3.0, 1)
    row["ms"]["tower"]["median"] = tower
    result = large_result(**{**row, "places": ["VISION_LAYER"]})
    goal = next(goal for goal in tables.goals(result) if goal.what.startswith("added"))
    assert goal.reached == f"{reached} (flowcut, 64 tokens)" and goal.met == (tower < 10)
    assert ["flowcut", "in the tower"] in [cells[:2] for cells in tables.method_grid(result).rows]


@pytest.mark.parametrize("places", [["LLM_LAYER"], ["LLM_LAYER", "PROJECTED"]])
def test_what_is_added_by_work_in_the_llm_has_no_goal(places: list[str]) -> None:
    row = timed("fastv", 8, 64, 45.0, 30.0, 1)
    result = large_result(**{**row, "places": places, "report": {"mean_tokens": 96.0}})
    assert met(result)["added at batch 8"]
    (cells,) = [cells for cells in tables.method_grid(result).rows if cells[0] == "fastv"]
    assert cells[1:3] == ["in the LLM", "30.0"] and cells[-1] == "96.0"


def next_result(llm: float, peak: int = 1 << 30) -> results.ResultFile:
    rows = [
        timed("dense", 8, 2928, 810.0, 1.0, 2 << 30),
        timed("spread", 8, 160, llm + 13.0, 3.0, peak),
        timed("random", 8, 160, 70.0, 2.0, peak),
    ]
    machine = results.machine("cpu")
    checks = {"fp32_exact": {"failed": {}}, "undo_bit_equal": True, "flops": []}
    return results.ResultFile("bench_prune", machine, NEXT.to_dict(), rows, checks)


@pytest.mark.parametrize(
    ("llm", "peak", "missed"),
    [
        (80.0, 1 << 30, set()),
        (90.0, 1 << 30, {"LLM prefill at batch 8"}),
        (80.0, 3 << 30, {"peak memory"}),
    ],
)
def test_goals_of_tiled_pictures(llm: float, peak: int, missed: set[str]) -> None:
    found = met(next_result(llm, peak))
    assert {what for what, reached in found.items() if not reached} == missed
    assert "LLM prefill at batch 8" in found and "added at batch 8" not in found


def test_the_table_of_tiled_pictures_shows_the_speed_up_of_the_llm(tmp_path: Path) -> None:
    next_result(79.9).write(tmp_path / tables.NEXT_FILE)
    table = tables.next_table(tmp_path)
    assert "| LLM prefill | LLM speed-up |" in table and "| 79.9 | 10.00× |" in table


def test_the_table_of_the_graph(tmp_path: Path) -> None:
    def row(label: str, llm: float, total: float) -> Row:
        ms = {"llm": llm, "first_token": total}
        return {
            "label": label,
            "ms": {k: {"median": v, "p20": v, "p80": v, "samples": 9} for k, v in ms.items()},
        }

    settings = {"title": "T", "dtype": "bfloat16", "method": "spread", "repeats": 9}
    result = results.ResultFile(
        bench_graph.NAME,
        results.machine("cpu"),
        settings,
        [row("dense, eager", 24.0, 36.0), row("64 tokens, CUDA graph", 6.0, 18.0)],
        {"logits": 0.01, "control": 1.4, "budget": 0.1},
    )
    result.write(tmp_path / "bench_graph.json")
    table = bench_graph.readme_table(tmp_path)
    assert "| 6.00 (6.00 to 6.00) | 4.00× | 18.00 (18.00 to 18.00) | 2.00× |" in table
    assert "2.00 times as fast (its LLM part 4.00 times)" in bench_graph.summary(result)
