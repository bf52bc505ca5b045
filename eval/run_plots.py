"""Plots of an evaluation: accuracy against tokens and against time, CHAIR against recall."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vistoken.errors import BackendUnavailable
from vistoken.eval import results
from vistoken.eval.run_report import METRICS, Metric

# Okabe and Ito's colors, which color-blind readers can tell apart; gray and black are taken.
_COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
_MARKERS = ("o", "^", "D", "v", "P", "X")
_CONTROL, _BARE = "#7F7F7F", "#000000"
_ACCURACIES = tuple(m for m in METRICS if m.name == "accuracy")
_CHAIR = next(m for m in METRICS if m.name == "chair_i")
_RECALL = next(m for m in METRICS if m.name == "recall")

Row = Mapping[str, Any]
Style = tuple[str, str, str, list[Row]]  # name, color, marker, rows


def draw_plots(report: results.ResultFile, folder: Path) -> list[Path]:
    """Write the plots that the report has figures for as PNG files; returns their paths.

    Raises `BackendUnavailable` without matplotlib.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise BackendUnavailable("plots need matplotlib: pip install 'vistoken[eval]'") from error
    has = report.rows[0]["results"]
    accuracies = [metric for metric in _ACCURACIES if metric.split in has]
    written = []

    def figure(panels: int) -> tuple[Any, Sequence[Any]]:
        made = Figure(figsize=(5.2 * panels, 4.2), dpi=150, layout="constrained")
        FigureCanvasAgg(made)
        return made, made.subplots(1, panels, squeeze=False)[0]

    def save(made: Any, axes: Sequence[Any], title: str, name: str) -> None:
        handles, labels = axes[0].get_legend_handles_labels()
        made.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False)
        made.suptitle(title, fontsize=11)
        made.savefig(folder / name)
        written.append(folder / name)

    under = f"{report.settings['pictures']} pictures, bars: 95 % interval over pictures"
    if accuracies:
        for name, title, draw in (
            ("accuracy_tokens.png", "Accuracy against visual tokens", _against_tokens),
            ("accuracy_time.png", "Accuracy against time", _against_time),
        ):
            made, axes = figure(len(accuracies))
            for axis, metric in zip(axes, accuracies, strict=True):
                draw(axis, report, metric)
            save(made, axes, f"{title} ({under})", name)
    if "chair" in has:
        made, axes = figure(1)
        _chair_against_recall(axes[0], report)
        save(made, axes, f"Hallucination against recall\n({under})", "chair_recall.png")
    return written


def _series(report: results.ResultFile) -> list[Style]:
    """Return every line of a plot, the bare model first."""
    found: dict[str, list[Row]] = {}
    for row in report.rows:
        found.setdefault(row["series"], []).append(row)
    styled, taken = [], 0
    for name, rows in found.items():
        rows = sorted(rows, key=lambda row: row["tokens"])
        role = rows[0]["role"]
        if role == "bare":
            styled.append((name, _BARE, "*", rows))
        elif role == "control":
            styled.append((name, _CONTROL, "s", rows))
        else:
            place = taken % len(_COLORS)
            styled.append((name, _COLORS[place], _MARKERS[place], rows))
            taken += 1
    return sorted(styled, key=lambda line: line[2] != "*")


def _points(axis: Any, metric: Metric, x: Sequence[float], style: Style) -> None:
    """Draw the rows of one series with their intervals, joined by a line."""
    name, color, marker, rows = style
    values = [metric.value(row) for row in rows]
    axis.errorbar(
        x,
        values,
        yerr=_errors(metric, rows),
        color=color,
        marker=marker,
        markersize=11 if marker == "*" else 6,
        linewidth=1.4,
        elinewidth=1.0,
        capsize=3,
        label=name,
        zorder=3,
    )


def _errors(metric: Metric, rows: Sequence[Row]) -> list[list[float]]:
    """Return how far the intervals reach below and above the values."""
    below, above = [], []
    for row in rows:
        value = metric.value(row)
        low, high = metric.range(row) or (value, value)
        below.append(max(0.0, value - low))
        above.append(max(0.0, high - value))
    return [below, above]


def _level(axis: Any, report: results.ResultFile, metric: Metric) -> None:
    """Draw the level of the bare model through the whole plot."""
    for row in report.rows:
        if row["role"] == "bare":
            axis.axhline(metric.value(row), color=_BARE, linewidth=0.8, linestyle=":", zorder=1)


def _against_tokens(axis: Any, report: results.ResultFile, metric: Metric) -> None:
    lines = _series(report)
    for i, line in enumerate(lines):
        # Nudged apart by a few per cent, or the bars of one budget would hide each other.
        nudge = 1.0 if line[1] == _BARE else 1 + 0.025 * (i - len(lines) / 2)
        _points(axis, metric, [row["tokens"] * nudge for row in line[3]], line)
    _level(axis, report, metric)
    axis.set_xscale("log", base=2)
    ticks = sorted({row["tokens"] for row in report.rows})
    axis.set_xticks(ticks, [str(tick) for tick in ticks])
    axis.minorticks_off()
    if len(ticks) == 1:
        axis.set_xlim(ticks[0] / 2, ticks[0] * 2)
    _finish(axis, "visual tokens per picture", f"{metric.title} (%)")


def _against_time(axis: Any, report: results.ResultFile, metric: Metric) -> None:
    for line in _series(report):
        x = [1000 * row["seconds_per_picture"] for row in line[3]]
        _points(axis, metric, x, line)
        for place, row in zip(x, line[3], strict=True):
            _label(axis, place, metric.value(row), str(row["tokens"]), line[1])
    _level(axis, report, metric)
    longest = max(row["seconds_per_picture"] for row in report.rows)
    axis.set_xlim(0, 1000 * longest * 1.1)
    prompts = report.settings["prompts"] / report.settings["pictures"]
    _finish(axis, f"ms per picture with its {prompts:.1f} prompts", f"{metric.title} (%)")


def _chair_against_recall(axis: Any, report: results.ResultFile) -> None:
    for line in _series(report):
        name, color, marker, rows = line
        x = [_RECALL.value(row) for row in rows]
        _points(axis, _CHAIR, x, line)
        across = _errors(_RECALL, rows)
        heights = [_CHAIR.value(row) for row in rows]
        axis.errorbar(x, heights, xerr=across, fmt="none", ecolor=color, elinewidth=1.0, capsize=3)
        for place, row in zip(x, rows, strict=True):
            _label(axis, place, _CHAIR.value(row), str(row["tokens"]), color)
    axis.set_ylim(bottom=0)
    axis.annotate(
        "better",
        xy=(0.98, 0.03),
        xytext=(0.84, 0.13),
        xycoords="axes fraction",
        ha="center",
        color="#555555",
        arrowprops={"arrowstyle": "->", "color": "#555555"},
    )
    _finish(axis, "recall of objects (%)", "CHAIR_i: hallucinated mentions (%)")


def _label(axis: Any, x: float, y: float, text: str, color: str) -> None:
    # Bare model, methods and control on different sides, so that close ones do not meet.
    place = {_BARE: (-24, 6), _CONTROL: (6, -12)}.get(color, (7, 5))
    axis.annotate(text, (x, y), xytext=place, textcoords="offset points", color=color, fontsize=8)


def _finish(axis: Any, x: str, y: str) -> None:
    axis.set_xlabel(x)
    axis.set_ylabel(y)
    axis.grid(color="#DDDDDD", linewidth=0.6, zorder=0)
    axis.spines[["top", "right"]].set_visible(False)
