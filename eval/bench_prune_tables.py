"""The tables and goals of `bench_prune`, made from its result file alone."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vistoken.eval.results import ResultFile, load, machine_line
from vistoken.eval.tables import Grid

NAME = "bench_prune"
NEXT_FILE = "bench_prune_next.json"
AGAIN = "dense, again"
# where a method acts, by the place that comes last in a call
WHERE = {
    "PROJECTED": "before the LLM",
    "VISION_BLOCK": "in the tower",
    "VISION_LAYER": "in the tower",
    "LLM_LAYER": "in the LLM",
}
GIB = 1 << 30
Row = Mapping[str, Any]


@dataclass(frozen=True)
class Goal:
    """One aim of the benchmark: what was reached, what is asked, and whether that is met."""

    what: str
    reached: str
    asked: str
    met: bool


def is_timed(row: Row) -> bool:
    """Whether the row passed its checks and so has times."""
    return "failed" not in row


def speed_up(row: Row, dense: Row, name: str = "first_token") -> float:
    """Return how many times as fast as the dense model a row is, by medians."""
    return dense["ms"][name]["median"] / row["ms"][name]["median"]


def acts(row: Row) -> str:
    """Say where the method of a row acts; of several places the latest but the projector."""
    found = [WHERE[place] for place in row.get("places", ())]
    for where in ("in the LLM", "in the tower", "before the LLM"):
        if where in found:
            return where
    return ""


def cost(row: Row, dense: Row) -> float:
    """Milliseconds that pruning adds before the LLM.

    Of a method inside the tower, also what the tower takes longer (or, below 0, shorter).
    """
    added = row["ms"]["added"]["median"]
    if acts(row) != "in the tower":
        return added
    return added + row["ms"]["tower"]["median"] - dense["ms"]["tower"]["median"]


def progress_line(row: Row) -> str:
    """Return one line about a row, for the log of a run."""
    start = f"batch {row['batch']:<3}{row['label']:<18}{row['visual_tokens']:>4} tokens  "
    if not is_timed(row):
        return f"{start}FAILED: {row['failed']}"
    ms = row["ms"]
    parts = [f"{name} {_ms(ms[name])}" for name in ("added", "tower", "llm", "first_token")]
    if row.get("sync") and (row["sync"]["places"] or row["sync"]["waited"]):
        named = ", ".join(row["sync"]["places"]) or "a place that CUDA does not name"
        parts.append(f"the host waits at {named}")
    return start + "  ".join(parts)


def time_grid(result: ResultFile, methods: Sequence[str] | None = None) -> Grid:
    """The main table: time to first token and its parts, decoding, memory, by batch and budget.

    `methods` are the labels to show beside the dense model; None shows all.
    """
    rows = []
    for batch in result.settings["batches"]:
        dense = _dense(result, batch)
        for row in _rows(result, batch):
            if methods is None or row["label"] in (*methods, "dense"):
                rows.append(_time_cells(row, dense))
    columns = (
        *("Batch", "Visual tokens", "<Method", "Tower", "Added", "LLM prefill", "First token"),
        *("Speed-up", "Decode / token", "Generate", "Peak memory"),
    )
    s = result.settings
    text = s["before"] + s["after"]
    note = (
        f"{s['title']} with random weights, {s['dtype']}, {text} text tokens. Times in ms, medians "
        f"of {s['repeats']} calls (20th to 80th percentile). First token: the whole call, vision "
        "tower included; added: everything that pruning does before the LLM (of the dense model, "
        f"embedding the prompt); generate: {s['new_tokens']} tokens. "
        f"{machine_line(result.machine)}."
    )
    return Grid(f"{s['title']}: prefill and decode", columns, rows, note)


def _time_cells(row: Row, dense: Row | None) -> list[str]:
    head = [str(row["batch"]), str(row["visual_tokens"]), row["label"]]
    if not is_timed(row):
        return [*head, "failed", *[""] * 7]
    ms = row["ms"]
    faster = f"{speed_up(row, dense):.2f}×" if dense is not None and is_timed(dense) else ""
    memory = row["memory"]
    return [
        *head,
        *(_ms(ms[name]) for name in ("tower", "added", "llm")),
        _spread(ms["first_token"]),
        faster,
        *(_ms(ms[name]) if name in ms else "" for name in ("decode", "generate")),
        f"{memory['peak'] / GIB:.2f} GiB" if memory else "",
    ]


def method_grid(result: ResultFile) -> Grid:
    """Every method at the smallest budget and the largest batch: its laps, and its mean length."""
    s = result.settings
    batch, keep = max(s["batches"]), min(s["keeps"])
    dense = _dense(result, batch)
    rows = [
        _method_cells(row, dense)
        for row in _rows(result, batch)
        if row["method"] is None or row["visual_tokens"] == keep
    ]
    columns = (
        *("<Method", "<Acts", "Added", "Tower", "LLM prefill", "First token", "Speed-up"),
        "Mean tokens a layer",
    )
    note = (
        f"{s['title']}, {s['dtype']}, batch {batch}, budget {keep} of {s['visual_tokens']} visual "
        f"tokens, medians of {s['repeats']} calls in ms. Added: finding the pictures, signals, "
        "selection, gather and shortening of the prompt; a method that acts in the tower or in the "
        "LLM also works in that lap. Budgets of methods that act in the LLM differ in meaning, "
        f"hence the visual tokens that a layer sees on average. {machine_line(result.machine)}."
    )
    return Grid(f"{s['title']}: every method", columns, rows, note)


def _method_cells(row: Row, dense: Row | None) -> list[str]:
    if not is_timed(row):
        return [row["label"], "failed", *[""] * 6]
    ms = row["ms"]
    faster = f"{speed_up(row, dense):.2f}×" if dense is not None and is_timed(dense) else ""
    mean = row["report"].get("mean_tokens") if "report" in row else row["visual_tokens"]
    return [
        *(row["label"], acts(row)),
        *(_ms(ms[name]) for name in ("added", "tower", "llm", "first_token")),
        *(faster, "" if mean is None else f"{mean:.1f}"),
    ]


def flops_rows(result_rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Reported against counted FLOPs, wherever they were counted; the dense model included.

    `off` is the report's relative error on what it claims to count, the model's own work;
    `off_total` also holds it to the work of the selection, which it leaves out.
    """
    found = []
    for row in result_rows:
        if not is_timed(row) or "flops_counted" not in row:
            continue
        pruned = [r for r in result_rows if r["batch"] == row["batch"] and "report" in r]
        if "report" in row:
            reported = row["report"]["flops"]
        elif pruned:
            reported = pruned[0]["report"]["flops_dense"]
        else:
            continue
        total, select = row["flops_counted"]["total"], row["flops_counted"]["select"]
        found.append(
            {
                "batch": row["batch"],
                "label": row["label"],
                "visual_tokens": row["visual_tokens"],
                "reported": reported,
                "counted": total,
                "select": select,
                "off": reported / (total - select) - 1,
                "off_total": reported / total - 1,
            }
        )
    return found


def flops_grid(result: ResultFile) -> Grid:
    """Reported against counted FLOPs as a table."""
    rows = [
        [
            *(str(row["batch"]), str(row["visual_tokens"]), row["label"]),
            *(f"{row[name] / 1e9:.5g}" for name in ("reported", "counted", "select")),
            *(f"{row[name]:+.2%}" for name in ("off", "off_total")),
        ]
        for row in flops_rows(result.rows)
    ]
    columns = (
        *("Batch", "Visual tokens", "<Method", "Reported", "Counted", "of it selection"),
        *("Off without selection", "Off"),
    )
    note = "GFLOP. Counted by torch.utils.flop_counter; the report leaves the selection out."
    return Grid("FLOPs of a prefill", columns, rows, note)


def goals(result: ResultFile) -> list[Goal]:
    """The benchmark's aims that this run can judge: those of the 7B models on a GPU."""
    if not any(row.get("memory") for row in result.rows):
        return []
    judges = {"llava-1.5-7b": _goals, "llava-next-7b": _next_goals}
    judge = judges.get(result.settings["model"])
    return [] if judge is None else [*judge(result), *_common_goals(result)]


def _goals(result: ResultFile) -> Iterator[Goal]:
    dense = _dense(result, 8)
    if dense is None or not is_timed(dense):
        return
    large = [row for row in _pruned(result) if row["batch"] == 8]
    before_llm = [row for row in large if acts(row) != "in the LLM"]
    if before_llm:
        slowest = max(before_llm, key=lambda row: cost(row, dense))
        worst = cost(slowest, dense)
        reached = f"{worst:.2f} ms ({slowest['label']}, {slowest['visual_tokens']} tokens)"
        yield Goal("added at batch 8, worst method", reached, "at most 3 ms", worst <= 3)
        share = worst / dense["ms"]["first_token"]["median"]
        yield Goal("the same of the dense prefill", f"{share:.1%}", "at most 5 %", share <= 0.05)
    yield from _faster(result, 64, "first_token", "to first token", 3.5)


def _next_goals(result: ResultFile) -> Iterator[Goal]:
    yield from _faster(result, 160, "llm", "LLM prefill", 9.0)


def _faster(result: ResultFile, keep: int, lap: str, what: str, least: float) -> Iterator[Goal]:
    """How many times as fast the first method is at batch 8."""
    dense, default = _dense(result, 8), result.settings["methods"][0]
    for row in _pruned(result):
        of_default = row["batch"] == 8 and row["visual_tokens"] == keep and row["label"] == default
        if of_default and dense is not None and is_timed(dense):
            faster = speed_up(row, dense, lap)
            named = f"{what} at batch 8, {dense['visual_tokens']} to {keep} tokens, {default}"
            yield Goal(named, f"{faster:.2f}×", f"at least {least:g}×", faster >= least)


def _common_goals(result: ResultFile) -> Iterator[Goal]:
    pruned = _pruned(result)
    over = [
        row["memory"]["peak"] - full["memory"]["peak"]
        for row in pruned
        if (full := _dense(result, row["batch"])) is not None and is_timed(full)
    ]
    if over:
        reached = f"{max(over) / GIB:+.2f} GiB of dense at worst"
        yield Goal("peak memory", reached, "never above dense", max(over) <= 0)
    flops = flops_rows(result.rows)
    if flops:
        off = max(abs(row["off_total"]) for row in flops)
        yield Goal("reported FLOPs against counted", f"{off:.2%}", "within 2 %", off <= 0.02)
    waits = [row for row in pruned if row["sync"]["places"] or row["sync"]["waited"]]
    yield Goal(
        "host waits from the tower to the LLM", f"{len(waits)} of {len(pruned)}", "none", not waits
    )


def goals_grid(result: ResultFile) -> Grid:
    """The goals as a table."""
    rows = [[g.what, g.reached, g.asked, "yes" if g.met else "NO"] for g in goals(result)]
    return Grid("Goals", ("<What", "<Reached", "<Asked", "<Met"), rows)


def shown_first(result: ResultFile) -> list[str]:
    """The methods of the compact table: the first one, the first mode of HoloV, and random."""
    methods = result.settings["methods"]
    holov = [name for name in methods if name.startswith("holov")][:1]
    return [methods[0], *(name for name in methods[1:] if name in (*holov, "random"))]


def failures(result: ResultFile) -> list[str]:
    """Return what is wrong with a run, in words; empty if every check passed.

    A goal that is missed is no failure: its times are right, only longer than hoped for.
    """
    checks = result.checks
    found = [f"fp32 {name}: {why}" for name, why in checks["fp32_exact"]["failed"].items()]
    found += [progress_line(row) for row in result.rows if not is_timed(row)]
    if not checks["undo_bit_equal"]:
        found.append("after detach the dense logits differ from those before the run")
    worst = max(checks["flops"], key=lambda row: abs(row["off"]), default={"off": 0.0})
    if abs(worst["off"]) > 0.02:
        found.append(f"reported FLOPs are off by {worst['off']:+.1%} from the counted ones")
    return found


def readme_table(folder: Path) -> str:
    """Markdown: the default method beside the dense model, HoloV and the random control."""
    result = load(folder / f"{NAME}.json", NAME)
    return time_grid(result, shown_first(result)).to_markdown()


def methods_table(folder: Path) -> str:
    """Markdown: every method at the smallest budget."""
    return method_grid(load(folder / f"{NAME}.json", NAME)).to_markdown()


def next_table(folder: Path) -> str:
    """Markdown: LLaVA-NeXT, every method that was measured."""
    result = load(folder / NEXT_FILE, NAME)
    dense = _dense(result, max(result.settings["batches"]))
    grid = time_grid(result)
    if dense is None or not is_timed(dense):
        return grid.to_markdown()
    # what counts here is the LLM, whose prompt is long
    faster = [
        f"{speed_up(row, dense, 'llm'):.2f}×" if is_timed(row) else ""
        for batch in result.settings["batches"]
        for row in _rows(result, batch)
    ]
    at = grid.columns.index("LLM prefill") + 1
    columns = [*grid.columns[:at], "LLM speed-up", *grid.columns[at:]]
    cells = zip(grid.rows, faster, strict=True)
    rows = [[*row[:at], value, *row[at:]] for row, value in cells]
    note = f"Newline tokens are dropped where tokens are pruned. {grid.note}"
    return Grid(grid.title, columns, rows, note).to_markdown()


def _rows(result: ResultFile, batch: int) -> list[Row]:
    return [row for row in result.rows if row["batch"] == batch and row["label"] != AGAIN]


def _pruned(result: ResultFile) -> list[Row]:
    return [row for row in result.rows if row["method"] and is_timed(row)]


def _dense(result: ResultFile, batch: int) -> Row | None:
    return next((row for row in _rows(result, batch) if row["method"] is None), None)


def _ms(timing: Mapping[str, float]) -> str:
    median = timing["median"]
    return f"{median:.2f}" if median < 10 else f"{median:.1f}"


def _spread(timing: Mapping[str, float]) -> str:
    digits = 2 if timing["median"] < 10 else 1
    return f"{_ms(timing)} ({timing['p20']:.{digits}f} to {timing['p80']:.{digits}f})"
