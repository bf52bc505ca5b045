"""ScienceQA, multiple choice by letter (Lu et al., NeurIPS 2022, arXiv 2209.09513)."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from vistoken.errors import DataError, MethodError
from vistoken.eval import records, stats

MODES = ("llava", "lmms-eval")
LETTERS = "ABCDE"
SUFFIX = "\nAnswer with the option's letter from the given choices directly."
# The last period is a wildcard in LLaVA's parser: one more character must follow the letter.
_SENTENCE = re.compile(r"The answer is ([A-Z]).")


@dataclass(frozen=True, slots=True, kw_only=True)
class ScienceQaRow(stats.Row):
    """One answer; `predicted` is None if no valid letter was found, which counts as wrong."""

    answer: str
    label: str
    predicted: str | None
    correct: bool
    has_image: bool | None


@dataclass(frozen=True, kw_only=True)
class ScienceQaResult(stats.Result):
    """Accuracy as a fraction of all questions.

    If it is known which questions have an image, `metrics` also holds `accuracy_image` (the IMG
    subset that papers report) and `accuracy_text` (0 for a subset without questions).
    """

    protocol: ClassVar[str] = "scienceqa"
    totals: ClassVar[tuple[str, ...]] = (
        "correct",
        "questions",
        "correct_image",
        "questions_image",
        "correct_text",
        "questions_text",
    )

    mode: str

    @property
    def accuracy(self) -> float:
        """Share of right answers."""
        return self.metrics["accuracy"]

    @staticmethod
    def tally(rows: Sequence[ScienceQaRow]) -> Sequence[float]:
        """Return the totals of one image."""
        image = [row for row in rows if row.has_image is True]
        text = [row for row in rows if row.has_image is False]
        return tuple(number for part in (rows, image, text) for number in (_right(part), len(part)))

    @staticmethod
    def measure(totals: Sequence[float]) -> dict[str, float]:
        """Return the accuracy, and those of the two subsets if they are known."""
        pairs = zip(totals[::2], totals[1::2], strict=True)
        names = ("accuracy", "accuracy_image", "accuracy_text")
        known = bool(totals[3] or totals[5])
        return {
            name: stats.ratio(right, count)
            for name, (right, count) in zip(names, pairs, strict=True)
            if known or name == "accuracy"
        }


def prompt(question: str, choices: Sequence[str], hint: str = "") -> str:
    """Return the prompt of LLaVA and lmms-eval for a question with its choices and hint."""
    context = f"Context: {hint}\n" if hint else ""
    options = "\n".join(
        f"{letter}. {choice}" for letter, choice in zip(LETTERS, choices, strict=False)
    )
    return f"{context}{question}\n{options}{SUFFIX}"


def parse(answer: str, mode: str = "llava", *, choices: int = len(LETTERS)) -> str | None:
    """Read the letter of one of the first `choices` options; None if there is none.

    - `llava`: the answer is a capital letter, or begins with one and ". ", or holds "The answer is
      X" and one more character exactly once.
    - `lmms-eval`: the answer is a letter of either case, or begins with a capital one and ".".

    Raises MethodError for another mode or a number of choices other than 1 to 5.
    """
    if mode not in MODES:
        raise MethodError(f"mode is {mode!r}; allowed: {', '.join(MODES)}")
    if not 1 <= choices <= len(LETTERS):
        raise MethodError(f"choices is {choices}; allowed: 1 to {len(LETTERS)}")
    found = _llava(answer) if mode == "llava" else _lmms_eval(answer)
    return found if found and found in LETTERS[:choices] else None


def score(
    answers: Sequence[str],
    labels: Sequence[str],
    mode: str = "llava",
    *,
    choices: Sequence[int] | None = None,
    has_image: Sequence[bool] | None = None,
    ids: Sequence[records.Id] | None = None,
    images: Sequence[Any] | None = None,
    resamples: int = 1000,
    seed: int = 0,
) -> ScienceQaResult:
    """Score answers against the letters in `labels`.

    `choices` gives the number of options of each question, `has_image` whether it has an image.
    Intervals are bootstrapped over `images` where given. Raises DataError for columns of
    different length, labels that are not one of the options, or duplicate ids.
    """
    count = records.check_columns(
        answers=answers, labels=labels, choices=choices, has_image=has_image, ids=ids, images=images
    )
    records.check_texts("answers", answers)
    names = records.check_ids("ids", ids, count)
    offered = [len(LETTERS)] * count if choices is None else choices
    groups: Sequence[Any] = [None] * count if images is None else images
    pictured: Sequence[bool | None] = [None] * count if has_image is None else has_image
    rows = []
    for i, (answer, label) in enumerate(zip(answers, labels, strict=True)):
        found = parse(answer, mode, choices=offered[i])
        if label not in tuple(LETTERS[: offered[i]]):
            raise DataError(
                f"labels[{i}] is {label!r}; allowed: {', '.join(LETTERS[: offered[i]])}"
            )
        row = ScienceQaRow(
            id=names[i],
            group=groups[i],
            answer=answer,
            label=label,
            predicted=found,
            correct=found == label,
            has_image=pictured[i],
        )
        rows.append(row)
    return stats.summarize(
        ScienceQaResult,
        rows,
        empty=sum(not answer.strip() for answer in answers),
        unparsed=sum(row.predicted is None for row in rows),
        resamples=resamples,
        seed=seed,
        mode=mode,
    )


def _right(rows: Sequence[ScienceQaRow]) -> int:
    return sum(row.correct for row in rows)


def _llava(answer: str) -> str | None:
    text = answer.strip()
    if len(text) == 1:
        return text
    if text[1:3] == ". " and text[0] in LETTERS:
        return text[0]
    hits = _SENTENCE.findall(text)
    return hits[0] if len(hits) == 1 else None


def _lmms_eval(answer: str) -> str | None:
    text = answer.strip()
    if len(text) == 1:
        return text.upper()
    return text[0] if text[1:2] == "." else None
