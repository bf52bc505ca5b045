"""Accuracy of a model with fewer visual tokens: every pruning method at every budget, on scenes.

    python -m vistoken.eval.scoreboard --out eval/results/scoreboard.json

Questions of known answer about pictures that the shipped model was not trained on; an answer counts
if it is the right words and nothing else. The bare model and random selection are always beside the
methods. Intervals are 95 % bootstrap intervals over pictures, differences to the bare model are
paired by picture.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

import vistoken
from vistoken.errors import DataError, VistokenError
from vistoken.eval import results, stats
from vistoken.eval.answers import Exam, answer, generate_answers
from vistoken.eval.scoreboard_questions import (
    SceneResult,
    Settings,
    ask,
    by_picture,
    score,
    to_prompt,
    versus_measure,
)
from vistoken.eval.scoreboard_tables import NAME, SCORED, details, note, overview

LONGEST_ANSWER = 8
_CHECKED_PICTURES = 2
_BATCHES = {"cuda": 64}  # pictures read at once

Watch = Callable[[str, int], object]


class Scoreboard:
    """Answers the questions of one `Settings` with a model, bare and pruned, and scores them."""

    def __init__(self, model: Any, processor: Any, settings: Settings, watch: Watch) -> None:
        self.model, self.processor = model, processor
        self.settings, self.watch = settings, watch
        self.asked = ask(processor, settings)
        self.dense: Any = None
        self.totals: dict[tuple[str | None, int], list[list[float]]] = {}

    def rows(self) -> Iterator[dict[str, Any]]:
        """Measure the bare model, then every method at every budget below all tokens."""
        total = vistoken.inspect(self.model).facts.visual_tokens
        yield self.row(None, total)
        for keep in sorted(set(self.settings.keeps), reverse=True):
            if keep < total:
                rows = [self.row(method, keep) for method in self.settings.methods]
                yield from (row | self._versus(row) for row in rows)

    def row(self, method: str | None, keep: int) -> dict[str, Any]:
        """Measure one method at one budget; None is the bare model, which comes first."""
        seeds = self.settings.seeds if method == "random" else 1
        label = "all tokens" if method is None else f"{method}, {keep} tokens"
        answers, costs, seconds = [], {}, 0.0
        for seed in range(seeds):
            options = {"seed": seed} if method == "random" else {}
            # Keeping all tokens leaves the model bare, and its attachment still reports the cost.
            attached = vistoken.prune_visual_tokens(
                self.model, keep=keep, method=method or "uniform", **options
            )
            with attached:
                costs = self._costs(attached)
                if method is None:
                    attached.detach()
                began = time.perf_counter()
                answers.append(self._answer(label))
                seconds += (time.perf_counter() - began) / seeds
        result = score(self.asked, answers, self.settings)
        if method is None:
            self.dense = result
        self.totals[method, keep] = by_picture(result, seeds)
        return {
            "method": method,
            "keep": keep,
            "seeds": seeds,
            **self._metrics(result, seeds),
            **costs,
            "seconds": round(seconds, 2),
        }

    def _versus(self, row: dict[str, Any]) -> dict[str, Any]:
        """How far the method of `versus` lies above a row, and the interval of that."""
        versus, keep = self.settings.versus, row["keep"]
        best = self.totals.get((versus, keep))
        if versus is None or best is None or row["method"] == versus:
            return {}
        change = stats.paired_bootstrap(
            self.totals[row["method"], keep],
            best,
            versus_measure,
            resamples=self.settings.resamples,
        )["accuracy"]
        low, high = round(change.interval.low, 4), round(change.interval.high, 4)
        return {"versus": {"value": round(change.value, 4), "interval": [low, high]}}

    def _answer(self, label: str) -> list[list[str]]:
        return answer(
            self.model,
            self.processor,
            self.asked.exam,
            max_new_tokens=LONGEST_ANSWER,
            batch=_BATCHES.get(self.model.device.type, 4),
            progress=lambda done: self.watch(label, done),
        )

    def _costs(self, attached: Any) -> dict[str, float]:
        """FLOPs, KV bytes and mean tokens in a layer, for one picture and one question."""
        import torch

        ids = torch.tensor([self.asked.exam.prompts[0][0]], device=self.model.device)
        pixels = self.asked.exam.pixel_values[:1].to(self.model.device)
        with torch.no_grad():
            self.model(input_ids=ids, pixel_values=pixels, logits_to_keep=1)
        report = attached.report().to_dict()
        return {name: report[name] for name in ("flops", "kv_bytes", "mean_tokens")}

    def _metrics(self, result: Any, seeds: int) -> dict[str, Any]:
        """Accuracies with their intervals, and the difference to the bare model."""
        found: dict[str, Any] = {"accuracy": round(result.metrics["accuracy"], 4)}
        if result.intervals:
            interval = result.intervals["accuracy"]
            found["interval"] = [round(interval.low, 4), round(interval.high, 4)]
        found["tasks"] = {task: round(result.metrics[task], 4) for task in SCORED}
        if self.dense is not None and len(self.asked.pictures) > 1 and self.settings.resamples:
            change = stats.paired_bootstrap(
                by_picture(self.dense, 1),
                by_picture(result, seeds),
                SceneResult.measure,
                resamples=self.settings.resamples,
            )["accuracy"]
            low, high = round(change.interval.low, 4), round(change.interval.high, 4)
            found["difference"] = {"value": round(change.value, 4), "interval": [low, high]}
        return found

    def check(self) -> dict[str, Any]:
        """Compare some answers with those of plain `generate`, bare and pruned."""
        few = slice(0, _CHECKED_PICTURES)
        exam = Exam(self.asked.exam.pixel_values[few], self.asked.exam.prompts[few])
        prompts = [[to_prompt(self.processor, text) for text in row] for row in self.asked.prompts]
        compared, same = 0, True
        total = vistoken.inspect(self.model).facts.visual_tokens
        for keep in (total, min(self.settings.keeps, default=total)):
            method = self.settings.methods[0] if self.settings.methods else "uniform"
            with vistoken.prune_visual_tokens(self.model, keep=keep, method=method):
                fast = answer(self.model, self.processor, exam, max_new_tokens=LONGEST_ANSWER)
                plain = generate_answers(
                    self.model,
                    self.processor,
                    self.asked.pictures[few],
                    prompts[few],
                    max_new_tokens=LONGEST_ANSWER,
                )
            same = same and fast == plain
            compared += sum(len(row) for row in fast)
        return {"answers_compared_with_generate": compared, "answers_equal": same}


def run(
    model: Any, processor: Any, settings: Settings, watch: Watch = lambda label, done: None
) -> results.ResultFile:
    """Measure everything that `settings` asks for; `watch(label, n)` follows every n answers.

    Raises `VistokenError` if the fast way of answering does not give what `generate` gives.
    """
    board = Scoreboard(model, processor, settings, watch)
    checks = board.check()
    if not checks["answers_equal"]:
        raise VistokenError(
            "The answers from a shared prefix differ from those of generate: no accuracy is given."
        )
    machine = results.machine(model.device)
    return results.ResultFile(
        benchmark=NAME,
        machine=machine,
        settings={
            **asdict(settings),
            "dtype": str(model.dtype).removeprefix("torch."),
            "pictures": len(board.asked.pictures),
        },
        rows=list(board.rows()),
        checks=checks,
    )


def work(settings: Settings, tokens: int) -> int:
    """Return how many answers a run gives, so that progress has an end."""
    seeds = [settings.seeds if method == "random" else 1 for method in settings.methods]
    budgets = sum(keep < tokens for keep in set(settings.keeps))
    return settings.questions * (1 + budgets * sum(seeds))


@contextmanager
def show_progress(total: int, console: Console) -> Iterator[Watch]:
    """Follow a run: a bar where there is a terminal, else a line for everything that begins."""
    if not console.is_terminal:
        last = ""

        def tell(label: str, done: int) -> None:
            nonlocal last
            if label != last:
                console.print(label, style="dim")
                last = label

        yield tell
        return
    columns = (BarColumn(), TextColumn("{task.percentage:3.0f} %"), TimeElapsedColumn())
    with Progress(
        *columns, TextColumn("{task.description}"), console=console, transient=True
    ) as bar:
        task = bar.add_task("", total=total)
        yield lambda label, done: bar.update(task, description=label, advance=done)


def _console(*, stderr: bool = False) -> Console:
    console = Console(stderr=stderr)
    return console if console.is_terminal else Console(stderr=stderr, width=120)


def _numbers(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError as error:
        raise DataError(f"expected whole numbers with commas between, got {text!r}") from error


def _methods(text: str) -> tuple[str, ...]:
    if text != "all":
        return tuple(text.split(","))
    return tuple(row.name for row in vistoken.list_methods("pruning"))


def main(
    methods: Annotated[str, typer.Option(help="methods, or 'all'")] = ",".join(Settings.methods),
    versus: Annotated[str | None, typer.Option(help="method to compare the others with")] = None,
    keep: Annotated[str, typer.Option(help="visual tokens kept")] = "192,128,64,32",
    questions: Annotated[int, typer.Option(help="questions", min=1)] = Settings.questions,
    seeds: Annotated[int, typer.Option(help="seeds of random", min=1)] = Settings.seeds,
    scene_seeds: Annotated[int, typer.Option(help="seeds of scenes", min=1)] = 1,
    start: Annotated[int, typer.Option(help="first picture", min=0)] = Settings.start,
    negatives: Annotated[str, typer.Option(help="absent things asked for")] = Settings.negatives,
    device: Annotated[str, typer.Option(help="torch device")] = "cpu",
    out: Annotated[Path | None, typer.Option(help="result file to write")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="print JSON instead of tables")] = False,
) -> None:
    """Measure the accuracy of the shipped model under every method and budget."""
    try:
        settings = Settings(
            methods=_methods(methods),
            versus=versus,
            keeps=_numbers(keep),
            questions=questions,
            seeds=seeds,
            scene_seeds=scene_seeds,
            start=start,
            negatives=negatives,
        )
        model, processor = vistoken.load_shipped(settings.model, device=device)
        tokens = vistoken.inspect(model).facts.visual_tokens
        with show_progress(work(settings, tokens), _console(stderr=True)) as watch:
            result = run(model, processor, settings, watch)
        if out is not None:
            result.write(out)
    except VistokenError as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(2) from error
    if as_json:
        sys.stdout.write(result.to_json())
        return
    console = _console()
    console.print(details(result).to_rich(), overview(result))
    console.print(note(result), style="dim")


if __name__ == "__main__":
    typer.run(main)
