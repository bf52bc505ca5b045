"""The tables and goals of `bench_prune`, made from its result file alone."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vistoken.eval.results import ResultFile, load, machine_line
from vistoken.eval.tables import Grid

NAME = "bench_prune"
AGAIN = "dense, again"
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
        "tower included; added: everything that pruning does (of the dense model, embedding the "
        f"prompt); generate: {s['new_tokens']} tokens. {machine_line(result.machine)}."
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
    """What each method adds to a prefill, by batch and budget, in ms."""
    s = result.settings
    cases = [(batch, keep) for batch in s["batches"] for keep in s["keeps"]]
    rows = []
    for label in s["methods"]:
        found = {
            (row["batch"], row["visual_tokens"]): row
            for row in result.rows
            if row["label"] == label
        }
        cells = [_ms(found[c]["ms"]["added"]) if is_timed(found[c]) else "failed" for c in cases]
        rows.append([label, *cells])
    columns = ["<Added, ms", *(f"{keep} tokens, batch {batch}" for batch, keep in cases)]
    note = (
        "Signals, selection, gather and shortening of the prompt together, medians. "
        f"{s['title']}, {s['dtype']}. {machine_line(result.machine)}."
    )
    return Grid(f"{s['title']}: what pruning adds", columns, rows, note)


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
    """The benchmark's aims that this run can judge: those of LLaVA-1.5-7B on a GPU."""
    if result.settings["model"] != "llava-1.5-7b" or not any(r.get("memory") for r in result.rows):
        return []
    return list(_goals(result))


def _goals(result: ResultFile) -> Iterator[Goal]:
    pruned = [row for row in result.rows if row["method"] and is_timed(row)]
    dense = _dense(result, 8)
    large = [row for row in pruned if row["batch"] == 8]
    if dense is not None and is_timed(dense) and large:
        worst = max(row["ms"]["added"]["median"] for row in large)
        yield Goal("added at batch 8, worst method", f"{worst:.2f} ms", "at most 3 ms", worst <= 3)
        share = worst / dense["ms"]["first_token"]["median"]
        yield Goal("the same of the dense prefill", f"{share:.1%}", "at most 5 %", share <= 0.05)
    default = result.settings["methods"][0]
    best = [row for row in large if row["visual_tokens"] == 64 and row["label"] == default]
    if best and dense is not None and is_timed(dense):
        faster = speed_up(best[0], dense)
        what = f"to first token at batch 8, {dense['visual_tokens']} to 64 tokens, {default}"
        yield Goal(what, f"{faster:.2f}×", "at least 3.5×", faster >= 3.5)
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
    """The methods of the compact table: the first one, and the random control."""
    methods = result.settings["methods"]
    return [methods[0], *(name for name in methods[1:] if name == "random")]


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
    """Markdown: the default method beside the dense model and the random control."""
    result = load(folder / f"{NAME}.json", NAME)
    return time_grid(result, shown_first(result)).to_markdown()


def methods_table(folder: Path) -> str:
    """Markdown: what each method adds."""
    return method_grid(load(folder / f"{NAME}.json", NAME)).to_markdown()


def _rows(result: ResultFile, batch: int) -> list[Row]:
    return [row for row in result.rows if row["batch"] == batch and row["label"] != AGAIN]


def _dense(result: ResultFile, batch: int) -> Row | None:
    return next((row for row in _rows(result, batch) if row["method"] is None), None)


def _ms(timing: Mapping[str, float]) -> str:
    median = timing["median"]
    return f"{median:.2f}" if median < 10 else f"{median:.1f}"


def _spread(timing: Mapping[str, float]) -> str:
    digits = 2 if timing["median"] < 10 else 1
    return f"{_ms(timing)} ({timing['p20']:.{digits}f} to {timing['p80']:.{digits}f})"
