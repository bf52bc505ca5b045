"""The questions of a scoreboard: about scenes of known truth, scored by exact match."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from vistoken.errors import DataError
from vistoken.eval import stats
from vistoken.eval.answers import Exam, prepare
from vistoken.eval.scoreboard_tables import SCORED, VERSUS_TASKS

PROMPT = "USER: {image}\n{question} ASSISTANT:"


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
    """What a scoreboard measures; `seeds` is how many seeds the random control has.

    The questions are asked in equal parts about the scenes of `scene_seeds` seeds.
    `versus` names the method that every other one is compared with, paired by picture, in the
    accuracy of `VERSUS_TASKS`.
    """

    model: str = "tiny-llava"
    methods: tuple[str, ...] = ("spread", "holov", "cls_topk", "uniform", "random")
    versus: str | None = None
    keeps: tuple[int, ...] = (192, 128, 64, 32)
    questions: int = 300
    seeds: int = 3
    scene_seeds: int = 1
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
    for seed in range(settings.scene_seeds):
        missing = (settings.questions + seed) // settings.scene_seeds
        number = settings.start
        while missing > 0:
            scene = make_scene(number, settings.split, seed)
            row = questions(scene, tasks=SCORED, negatives=settings.negatives)[:missing]
            pictures.append(draw(scene))
            asked.append(row)
            missing -= len(row)
            number += 1
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


def versus_measure(totals: Sequence[float]) -> dict[str, float]:
    """Return the accuracy over the questions of `VERSUS_TASKS`."""
    picked = [SCORED.index(task) for task in VERSUS_TASKS]
    right = sum(totals[2 * place] for place in picked)
    return {"accuracy": stats.ratio(right, sum(totals[2 * place + 1] for place in picked))}


def by_picture(result: Any, runs: int) -> list[list[float]]:
    """Return the totals of each picture, as the mean over `runs` runs."""
    groups: dict[Hashable, list[Any]] = {}
    for row in result.rows:
        groups.setdefault(row.group, []).append(row)
    return [[value / runs for value in SceneResult.tally(rows)] for rows in groups.values()]
