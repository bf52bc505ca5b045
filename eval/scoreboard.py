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
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

import vistoken
from vistoken.errors import DataError, VistokenError
from vistoken.eval import results, stats
from vistoken.eval.answers import Exam, answer, generate_answers, prepare
from vistoken.eval.scoreboard_tables import NAME, SCORED, details, note, overview

PROMPT = "USER: {image}\n{question} ASSISTANT:"
LONGEST_ANSWER = 8
_CHECKED_PICTURES = 2

Watch = Callable[[str, int], object]


@dataclass(frozen=True, slots=True, kw_only=True)
class SceneRow(stats.Row):
    """One answer to one question about a scene."""

    task: str
    truth: str
    answer: str
    correct: bool


@dataclass(frozen=True, kw_only=True)
class SceneResult(stats.Result):
    """Share of right answers, over all questions and by task."""

    protocol: ClassVar[str] = "scenes"
    totals: ClassVar[tuple[str, ...]] = tuple(
        f"{what}_{task}" for task in SCORED for what in ("right", "asked")
    )

    @staticmethod
    def tally(rows: Sequence[Any]) -> Sequence[float]:
        """Return right and asked of every task."""
        found: list[float] = []
        for task in SCORED:
            asked = [row.correct for row in rows if row.task == task]
            found += [float(sum(asked)), float(len(asked))]
        return found

    @staticmethod
    def measure(totals: Sequence[float]) -> dict[str, float]:
        """Return `accuracy` over all questions, and the accuracy of each task."""
        right, asked = totals[::2], totals[1::2]
        metrics = {"accuracy": stats.ratio(sum(right), sum(asked))}
        tasks = zip(SCORED, right, asked, strict=True)
        return metrics | {task: stats.ratio(part, whole) for task, part, whole in tasks}


@dataclass(frozen=True)
class Settings:
    """What a scoreboard measures; `seeds` is how many seeds the random control has."""

    model: str = "tiny-llava"
    methods: tuple[str, ...] = ("holov", "cls_topk", "uniform", "random")
    keeps: tuple[int, ...] = (192, 128, 64, 32)
    questions: int = 300
    seeds: int = 3
    split: str = "test"
    start: int = 0
    negatives: str = "random"
    resamples: int = 1000


@dataclass(frozen=True)
class Asked:
    """Questions about scenes: one list of questions for each picture, and the same as an exam."""

    pictures: list[Any]
    questions: list[list[Any]]
    exam: Exam

    @property
    def prompts(self) -> list[list[str]]:
        """The questions as texts alone."""
        return [[question.text for question in row] for row in self.questions]


def ask(processor: Any, settings: Settings) -> Asked:
    """Make the first `settings.questions` questions about scenes, and their pictures."""
    from vistoken.eval.scenes import draw, make_scene, questions

    if settings.questions < 1:
        raise DataError(f"questions must be at least 1, got {settings.questions}")
    pictures: list[Any] = []
    asked: list[list[Any]] = []
    missing = settings.questions
    while missing > 0:
        scene = make_scene(settings.start + len(pictures), settings.split)
        row = questions(scene, tasks=SCORED, negatives=settings.negatives)[:missing]
        pictures.append(draw(scene))
        asked.append(row)
        missing -= len(row)
    prompts = [[to_prompt(processor, q.text) for q in row] for row in asked]
    return Asked(pictures, asked, prepare(processor, pictures, prompts))


def to_prompt(processor: Any, question: str) -> str:
    """Return the prompt of a question, in the words the shipped model was trained with."""
    return PROMPT.format(image=processor.image_token, question=question)


def score(asked: Asked, answers: Sequence[Sequence[Sequence[str]]], settings: Settings) -> Any:
    """Score the answers of one or more runs (seeds) over the same questions: a `SceneResult`."""
    rows = [
        SceneRow(
            id=(run, question.question_id),
            group=question.image_id,
            task=question.task,
            truth=question.answer,
            answer=text,
            correct=text.lower().rstrip(".") == question.answer,
        )
        for run, given in enumerate(answers)
        for questions, texts in zip(asked.questions, given, strict=True)
        for question, text in zip(questions, texts, strict=True)
    ]
    empty = sum(not row.answer for row in rows)
    return stats.summarize(
        SceneResult, rows, empty=empty, unparsed=empty, resamples=settings.resamples
    )


def by_picture(result: Any, runs: int) -> list[list[float]]:
    """Return the totals of each picture, as the mean over `runs` runs."""
    groups: dict[Hashable, list[Any]] = {}
    for row in result.rows:
        groups.setdefault(row.group, []).append(row)
    return [[value / runs for value in SceneResult.tally(rows)] for rows in groups.values()]


class Scoreboard:
    """Answers the questions of one `Settings` with a model, bare and pruned, and scores them."""

    def __init__(self, model: Any, processor: Any, settings: Settings, watch: Watch) -> None:
        self.model, self.processor = model, processor
        self.settings, self.watch = settings, watch
        self.asked = ask(processor, settings)
        self.dense: Any = None

    def rows(self) -> Iterator[dict[str, Any]]:
        """Measure the bare model, then every method at every budget below all tokens."""
        total = vistoken.inspect(self.model).facts.visual_tokens
        yield self.row(None, total)
        for keep in sorted(set(self.settings.keeps), reverse=True):
            if keep < total:
                for method in self.settings.methods:
                    yield self.row(method, keep)

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
        return {
            "method": method,
            "keep": keep,
            "seeds": seeds,
            **self._metrics(result, seeds),
            **costs,
            "seconds": round(seconds, 2),
        }

    def _answer(self, label: str) -> list[list[str]]:
        return answer(
            self.model,
            self.processor,
            self.asked.exam,
            max_new_tokens=LONGEST_ANSWER,
            progress=lambda done: self.watch(label, done),
        )

    def _costs(self, attached: Any) -> dict[str, int]:
        """FLOPs and KV bytes of the prefill of one picture and one question."""
        import torch

        ids = torch.tensor([self.asked.exam.prompts[0][0]], device=self.model.device)
        pixels = self.asked.exam.pixel_values[:1].to(self.model.device)
        with torch.no_grad():
            self.model(input_ids=ids, pixel_values=pixels, logits_to_keep=1)
        report = attached.report().to_dict()
        return {name: report[name] for name in ("flops", "kv_bytes")}

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


def main(
    methods: Annotated[str, typer.Option(help="methods")] = ",".join(Settings.methods),
    keep: Annotated[str, typer.Option(help="visual tokens kept")] = "192,128,64,32",
    questions: Annotated[int, typer.Option(help="questions", min=1)] = Settings.questions,
    seeds: Annotated[int, typer.Option(help="seeds of random", min=1)] = Settings.seeds,
    start: Annotated[int, typer.Option(help="first picture", min=0)] = Settings.start,
    negatives: Annotated[str, typer.Option(help="absent things asked for")] = Settings.negatives,
    device: Annotated[str, typer.Option(help="torch device")] = "cpu",
    out: Annotated[Path | None, typer.Option(help="result file to write")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="print JSON instead of tables")] = False,
) -> None:
    """Measure the accuracy of the shipped model under every method and budget."""
    try:
        settings = Settings(
            methods=tuple(methods.split(",")),
            keeps=_numbers(keep),
            questions=questions,
            seeds=seeds,
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
