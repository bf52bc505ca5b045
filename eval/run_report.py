"""The report of an evaluation: rows of a result file, Markdown tables, one line per item."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from vistoken.errors import DataError
from vistoken.eval import records, results
from vistoken.eval.tables import Grid
from vistoken.eval.tasks import Plan, compare, pope_per_image

NAME = "eval"
REPORT, MARKDOWN, ITEMS = "report.json", "report.md", "items.jsonl"


@dataclass(frozen=True)
class Metric:
    """A figure of the tables: where it stands in a row, its heading, what turns it into per cent.

    `better` is 1 where more is better, -1 where less is, 0 where neither is.
    """

    split: str
    name: str
    title: str
    scale: float = 100.0
    better: int = 1

    def value(self, row: Mapping[str, Any]) -> float:
        """Return the figure as it is shown."""
        return self.scale * row["results"][self.split]["metrics"][self.name]

    def range(self, row: Mapping[str, Any]) -> tuple[float, float] | None:
        """Return its interval as it is shown, None where there is none."""
        found = row["results"][self.split]["intervals"].get(self.name)
        return None if found is None else (self.scale * found["low"], self.scale * found["high"])


METRICS = (
    Metric("pope", "accuracy", "POPE accuracy"),
    Metric("pope", "f1", "POPE F1"),
    Metric("pope", "yes_ratio", "yes-ratio", better=0),
    Metric("chair", "chair_i", "CHAIR_i", better=-1),
    Metric("chair", "chair_s", "CHAIR_s", better=-1),
    Metric("chair", "recall", "recall"),
    Metric("chair", "length", "length", scale=1.0, better=0),
    Metric("vqa", "accuracy", "VQA accuracy", scale=1.0),
)


MAIN = ("accuracy", "chair_i", "recall")


def metrics_of(report: results.ResultFile) -> list[Metric]:
    """Return the metrics that the report has."""
    return [metric for metric in METRICS if metric.split in report.rows[0]["results"]]


def brief(report: results.ResultFile) -> Grid:
    """Return the table for a terminal: one line for each configuration, the main figures."""
    metrics = [metric for metric in metrics_of(report) if metric.name in MAIN]
    rows = [
        [
            row["series"],
            str(row["tokens"]),
            f"{1000 * row['seconds_per_picture']:.0f}",
            *(_cell(metric, row) for metric in metrics),
        ]
        for row in report.rows
    ]
    columns = ["<configuration", "tokens", "ms/picture", *(metric.title for metric in metrics)]
    return Grid(f"{report.settings['pictures']} pictures, {_model(report)}", columns, rows)


def make_row(
    plan: Plan,
    configurations: Sequence[Any],
    scored: Sequence[Mapping[str, Any]],
    place: int,
    times: Sequence[float],
    costs: Mapping[str, int],
) -> dict[str, Any]:
    """Return the row of configuration number `place`.

    `times` are seconds per picture, one for each unit. Comparisons are this configuration minus
    the bare model, and a method minus the random control with as many tokens.
    """
    mine = configurations[place]
    row: dict[str, Any] = {
        "configuration": mine.label,
        "series": mine.series,
        "role": mine.role,
        "recipe": mine.recipe,
        **costs,
        "seconds_per_picture": round(statistics.median(times), 4),
        "results": {name: found.to_dict(rows=False) for name, found in scored[place].items()},
    }
    for other, result in zip(configurations, scored, strict=True):
        against = {"bare": "against_bare", "control": "against_random"}.get(other.role)
        paired = other.role == "bare" or (mine.role == "method" and _budget(mine) == _budget(other))
        if other is not mine and against and paired:
            found = compare(result, scored[place], plan)
            row[against] = {name: difference.to_dict() for name, difference in found.items()}
    return row


def _budget(configuration: Any) -> list[tuple[Any, Any]]:
    return [(recipe.get("keep"), recipe.get("ratio")) for recipe in configuration.recipe]


def describe(plan: Plan, template: str | None) -> dict[str, Any]:
    """Return what a reader must know to compare the figures with others."""
    data, protocol = plan.data, plan.protocol
    first = {name: plan.asks[entries[0].ask].prompt for name, entries in plan.splits.items()}
    return {
        "data": data.source,
        "data_revision": data.revision,
        "data_digest": data.digest,
        "pictures": len(data.pictures),
        "tasks": list(plan.tasks),
        "items": {name: len(entries) for name, entries in plan.splits.items()},
        "prompts": len(plan.asks),
        "prompts_sha256": plan.prompts_digest,
        "first_prompts": first,
        "template": template or "the processor's chat template",
        "decoding": "greedy",
        "protocol": asdict(protocol),
        "pope_per_image": pope_per_image(data, protocol) if "pope" in plan.tasks else None,
        "pope_revision": dict(plan.pope_revision),
        "notes": list(plan.notes),
    }


def failures(report: results.ResultFile) -> list[str]:
    """Return the tasks of which not one answer could be parsed, by configuration."""
    return [
        f"{row['configuration']}, {name}"
        for row in report.rows
        for name, found in row["results"].items()
        if found["parsed"] == 0
    ]


def overview(report: results.ResultFile) -> Grid:
    """Return one line for each configuration: costs and main figures."""
    metrics = metrics_of(report)
    titles = [metric.title for metric in metrics]
    rows = [
        [
            row["configuration"],
            str(row["tokens"]),
            f"{row['flops'] / 1e9:.2f}",
            f"{row['kv_bytes'] / 2**20:.2f}",
            f"{1000 * row['seconds_per_picture']:.0f}",
            *(_cell(metric, row) for metric in metrics),
        ]
        for row in report.rows
    ]
    columns = ["<configuration", "tokens", "GFLOP", "KV MiB", "ms/picture", *titles]
    return Grid(f"{report.settings['pictures']} pictures, {_model(report)}", columns, rows)


def _cell(metric: Metric, row: Mapping[str, Any]) -> str:
    found = metric.range(row)
    half = "" if found is None else f" ±{(found[1] - found[0]) / 2:.1f}"
    return f"{metric.value(row):.1f}{half}"


def readme_table(folder: Path = results.FOLDER) -> str:
    """Return the Markdown table of the recorded evaluation in `folder`."""
    report = results.load(folder / f"{NAME}.json", NAME)
    table = overview(report)
    note = (
        f"Per cent ± half the 95 % interval over {report.settings['pictures']} pictures; CHAIR is "
        "lower for fewer hallucinations, and is to be read with recall and length. "
        f"{_model(report)}, measured on {results.machine_line(report.machine)}."
    )
    return Grid("", table.columns, table.rows, note).to_markdown()


def differences(report: results.ResultFile, against: str) -> Grid | None:
    """Return the paired differences of every configuration to the bare model or the control."""
    rows = []
    for row in report.rows:
        for metric in METRICS:
            found = row.get(against, {}).get(metric.split)
            if found is None or metric.better == 0:
                continue
            change = found["differences"][metric.name]
            low, high = (metric.scale * change["interval"][side] for side in ("low", "high"))
            clear = low > 0 or high < 0
            verdict = "better" if metric.better * change["value"] > 0 else "worse"
            rows.append(
                [
                    row["configuration"],
                    metric.title,
                    f"{metric.scale * change['value']:+.1f}",
                    f"[{low:+.1f}, {high:+.1f}]",
                    f"{change['p_value']:.3f}",
                    verdict if clear else "no clear difference",
                ]
            )
    if not rows:
        return None
    columns = ["<configuration", "<figure", "difference", "95 % interval", "p", "<reading"]
    return Grid("", columns, rows)


def splits(report: results.ResultFile) -> Grid | None:
    """Return POPE by the way its negatives were chosen, with McNemar's test to the bare model."""
    rows = []
    for row in report.rows:
        for name in (name for name in row["results"] if name.startswith("pope/")):
            found = row["results"][name]
            shown = [f"{100 * found['metrics'][key]:.1f}" for key in _POPE]
            test = (row.get("against_bare", {}).get(name) or {}).get("mcnemar")
            told = ["", "", ""]
            if test:
                told = [str(test["only_first"]), str(test["only_second"]), f"{test['p_value']:.3f}"]
            rows.append([row["configuration"], name.partition("/")[2], *shown, *told])
    columns = ["<configuration", "<negatives", *_POPE.values(), "lost", "won", "McNemar p"]
    return Grid("", columns, rows) if rows else None


_POPE = {
    "accuracy": "accuracy",
    "precision": "precision",
    "recall": "recall",
    "f1": "F1",
    "yes_ratio": "yes-ratio",
}


def types(report: results.ResultFile) -> Grid | None:
    """Return VQA accuracy by type of question."""
    if "vqa" not in report.rows[0]["results"]:
        return None
    names = sorted(report.rows[0]["results"]["vqa"]["by_type"])
    rows = [
        [row["configuration"], *(f"{row['results']['vqa']['by_type'][n]:.1f}" for n in names)]
        for row in report.rows
    ]
    return Grid("", ["<configuration", *names], rows) if len(names) > 1 else None


def outputs(report: results.ResultFile) -> Grid:
    """Return how many outputs of each split were empty or could not be parsed."""
    rows = [
        [row["configuration"], name, *(str(found[key]) for key in ("n", "empty", "unparsed"))]
        for row in report.rows
        for name, found in row["results"].items()
        if name == "pope" or "/" not in name
    ]
    return Grid("", ["<configuration", "<task", "outputs", "empty", "unparsed"], rows)


def _model(report: results.ResultFile) -> str:
    return f"{report.settings['model']} in {report.settings['dtype']}"


def summary(report: results.ResultFile) -> str:
    """Return what was asked, and where it was measured, as a few sentences."""
    asked, checks = report.settings, report.checks
    protocol = asked["protocol"]
    words = [
        f"Figures in per cent with half the width of the 95 % interval over pictures; {_SENSE}"
    ]
    words.append(f"Data: {asked['data_revision']}. Prompts: {asked['prompts']} a configuration")
    words[-1] += f" (SHA-256 {asked['prompts_sha256'][:12]}), greedy, at most "
    words[-1] += (
        f"{protocol['answer_tokens']} new tokens, {protocol['caption_tokens']} for captions."
    )
    if "pope" in asked["tasks"]:
        words.append(
            f"POPE: {asked['pope_per_image']} object(s) a picture, parser {protocol['parser']}, "
            "all splits pooled."
        )
    if "chair" in asked["tasks"]:
        words.append(f"CHAIR: prompt {protocol['caption_prompt']!r}, {protocol['lemmatizer']}.")
    if "vqa" in asked["tasks"]:
        words.append(f"VQA: normalization {protocol['vqa_mode']}.")
    words += [f"{note}." for note in asked["notes"]]
    words.append(
        f"{checks['answers_equal']} of {checks['answers_compared_with_generate']} answers compared "
        "with plain generate are equal."
    )
    words.append(f"Measured on {results.machine_line(report.machine)}.")
    return " ".join(words)


_SENSE = "CHAIR is lower for fewer hallucinations, and is to be read with recall and length."


def to_markdown(report: results.ResultFile, plots: Sequence[str] = ()) -> str:
    """Return the report as a Markdown document that shows `plots`, files beside it."""
    parts = [f"# Evaluation: {_model(report)}", overview(report).to_markdown(), summary(report)]
    sections = {
        "Against the bare model": differences(report, "against_bare"),
        "Against random selection of as many tokens": differences(report, "against_random"),
        "POPE by negatives": splits(report),
        "VQA by type of question": types(report),
        "Outputs": outputs(report),
    }
    for title, grid in sections.items():
        if grid is not None:
            parts += [f"## {title}", _NOTES.get(title, ""), grid.to_markdown()]
    parts += [f"![{Path(plot).stem.replace('_', ' ')}]({plot})" for plot in plots]
    first = [f"- {name}: `{text!r}`" for name, text in report.settings["first_prompts"].items()]
    parts += ["## First prompts", "\n".join(first)]
    recipes = [f"- {row['configuration']}: `{json.dumps(row['recipe'])}`" for row in report.rows]
    parts += ["## Recipes", "\n".join(recipes)]
    return "\n\n".join(part for part in parts if part) + "\n"


_PAIRED = "Paired bootstrap over pictures, percentage points, without correction for many tests."
_NOTES = {
    "Against the bare model": _PAIRED,
    "Against random selection of as many tokens": _PAIRED,
    "POPE by negatives": "`lost` and `won` count the questions on which only the bare model, or "
    "only this configuration, is right. McNemar's test takes questions for independent.",
}


def write_report(
    report: results.ResultFile, plan: Plan, answers: Sequence[Sequence[str]], folder: Path
) -> None:
    """Write report.json, report.md, items.jsonl and the plots into `folder`."""
    from vistoken.eval.run_plots import draw_plots

    try:
        report.write(folder / REPORT)
        records.write(folder / ITEMS, _items(report, plan, answers))
        plots = draw_plots(report, folder)
        text = to_markdown(report, [path.name for path in plots])
        (folder / MARKDOWN).write_text(text, encoding="utf-8")
    except OSError as error:
        raise DataError(f"{folder} cannot be written: {error}") from error


def _items(
    report: results.ResultFile, plan: Plan, answers: Sequence[Sequence[str]]
) -> list[dict[str, Any]]:
    """Return one object for each scored item, with the answers of all configurations."""
    labels = [row["configuration"] for row in report.rows]
    return [
        {
            "split": name,
            "id": entry.id,
            "picture": plan.data.pictures[plan.asks[entry.ask].picture].name,
            "prompt": plan.asks[entry.ask].prompt,
            "truth": entry.truth,
            "answers": {
                label: given[entry.ask] for label, given in zip(labels, answers, strict=True)
            },
        }
        for name, entries in plan.splits.items()
        for entry in entries
    ]
