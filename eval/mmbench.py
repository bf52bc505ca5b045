"""MMBench, circular multiple choice (Liu et al., ECCV 2024, arXiv 2307.06281), without a judge.

The official evaluation asks a language model about answers in which no option is recognized. This
module is the static variant: such answers are wrong and counted as unparsed. Say so beside scores.
"""

from __future__ import annotations

import string
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

from vistoken.errors import DataError
from vistoken.eval import records, stats

ROTATION = 1_000_000
LETTERS = "ABCDE"
SUFFIX = "\nAnswer with the option's letter from the given choices directly."
# Marks around a letter, tried in this order: "B.", "B,", ..., "(B)", ..., ":B)."
_MARKS = (
    *(("", after) for after in (".", ",", ":", ")", ").")),
    *(("(", after) for after in (")", ").")),
    *((":", after) for after in ("", ",", ".", ")", ").")),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class MmbenchRow(stats.Row):
    """One question with the answers to all its rotations; correct only if all of them are."""

    category: str | None
    l2_category: str | None
    answers: tuple[str, ...]
    labels: tuple[str, ...]
    predicted: tuple[str | None, ...]
    correct: bool


@dataclass(frozen=True, kw_only=True)
class MmbenchResult(stats.Result):
    """Accuracy over questions as a fraction, and `accuracy_single` over all rotations apart.

    `empty` and `unparsed` count questions with at least one such answer. `circular` is False if
    no question has a rotation.
    """

    protocol: ClassVar[str] = "mmbench"
    totals: ClassVar[tuple[str, ...]] = ("correct", "questions", "correct_single", "answers")

    circular: bool
    by_category: dict[str, float]
    by_l2_category: dict[str, float]

    @property
    def accuracy(self) -> float:
        """Share of questions of which all rotations are answered right."""
        return self.metrics["accuracy"]

    @staticmethod
    def tally(rows: Sequence[MmbenchRow]) -> Sequence[float]:
        """Return the totals of one question."""
        right = [a == b for row in rows for a, b in zip(row.predicted, row.labels, strict=True)]
        return (sum(row.correct for row in rows), len(rows), sum(right), len(right))

    @staticmethod
    def measure(totals: Sequence[float]) -> dict[str, float]:
        """Return the accuracy over questions and over single answers."""
        return {
            "accuracy": stats.ratio(totals[0], totals[1]),
            "accuracy_single": stats.ratio(totals[2], totals[3]),
        }


def prompt(question: str, choices: Mapping[str, str], hint: str = "") -> str:
    """Return the prompt of lmms-eval for a question with its lettered choices and hint."""
    options = "\n".join(f"{letter}. {text}" for letter, text in sorted(choices.items()))
    head = f"{hint} {question}" if hint else question
    return f"{head} There are several options:\n{options}\n{SUFFIX}"


def infer(answer: str, choices: Mapping[str, str]) -> str | None:
    """Return the letter that an answer chooses, None if that is undecided.

    First a letter A to E that stands alone, or with one of the usual marks around it; two
    different ones are undecided. A bare "A" in an answer of more than three words may be an
    article and does not count. Then the option whose text, whatever its case, the answer contains,
    if it is the only one.
    """
    words = answer.split()
    bare = [letter for letter in LETTERS if letter in words]
    if len(bare) == 1 and not ("A" in words and len(words) > 3):
        return bare[0]
    for before, after in _MARKS:
        marked = [letter for letter in LETTERS if f"{before}{letter}{after}" in words]
        if len(marked) == 1:
            return marked[0]
    text = answer.lower()
    named = [letter for letter, option in choices.items() if option.lower() in text]
    return named[0] if len(named) == 1 else None


def score(
    answers: Sequence[str],
    labels: Sequence[str],
    choices: Sequence[Mapping[str, str]],
    indices: Sequence[int],
    *,
    categories: Sequence[str] | None = None,
    l2_categories: Sequence[str] | None = None,
    resamples: int = 1000,
    seed: int = 0,
) -> MmbenchResult:
    """Score answers to questions and their rotations.

    `choices` maps the letters of each row's options to their texts. `indices` are those of the
    data set: a rotation of question i has the index i + k * 10**6. If any question has rotations,
    each must have as many rows as options. Categories are taken from the unrotated rows. Raises
    DataError for columns of different length, duplicate indices, labels that are not an option,
    and missing rotations or questions.
    """
    records.check_columns(
        answers=answers,
        labels=labels,
        choices=choices,
        indices=indices,
        categories=categories,
        l2_categories=l2_categories,
    )
    records.check_texts("answers", answers)
    records.check_ids("indices", indices, len(indices))
    for i, (label, options) in enumerate(zip(labels, choices, strict=True)):
        _check_choices(i, label, options)
    members: dict[int, list[int]] = {}
    for i in sorted(range(len(indices)), key=lambda i: indices[i]):
        members.setdefault(indices[i] % ROTATION, []).append(i)
    circular = len(members) < len(indices)
    rows = []
    for base, places in members.items():
        _check_rotations(base, [indices[i] for i in places], len(choices[places[0]]), circular)
        found = tuple(infer(answers[i], choices[i]) for i in places)
        wanted = tuple(labels[i] for i in places)
        row = MmbenchRow(
            id=base,
            group=None,
            category=categories[places[0]] if categories else None,
            l2_category=l2_categories[places[0]] if l2_categories else None,
            answers=tuple(answers[i] for i in places),
            labels=wanted,
            predicted=found,
            correct=found == wanted,
        )
        rows.append(row)
    return stats.summarize(
        MmbenchResult,
        rows,
        empty=sum(not all(answer.strip() for answer in row.answers) for row in rows),
        unparsed=sum(None in row.predicted for row in rows),
        resamples=resamples,
        seed=seed,
        circular=circular,
        by_category=_means((row.category, row.correct) for row in rows),
        by_l2_category=_means((row.l2_category, row.correct) for row in rows),
    )


def _means(outcomes: Iterable[tuple[str | None, bool]]) -> dict[str, float]:
    found: dict[str, list[bool]] = {}
    for name, right in outcomes:
        if name is not None:
            found.setdefault(name, []).append(right)
    return {name: sum(rights) / len(rights) for name, rights in found.items()}


def _check_choices(position: int, label: str, choices: Mapping[str, str]) -> None:
    allowed = string.ascii_uppercase[: len(choices)]
    if len(choices) > len(LETTERS) or sorted(choices) != list(allowed):
        raise DataError(
            f"choices[{position}] must have the letters A, B, ... up to E, got {sorted(choices)}"
        )
    if label not in choices:
        raise DataError(f"labels[{position}] is {label!r}; allowed: {', '.join(allowed)}")
    blank = [letter for letter, text in choices.items() if not text.strip()]
    if blank:
        raise DataError(f"choices[{position}]: the text of option {blank[0]} is blank")


def _check_rotations(base: int, indices: Sequence[int], options: int, circular: bool) -> None:
    if base not in indices:
        raise DataError(f"index {indices[0]} is a rotation of question {base}, which is missing")
    if circular and len(indices) != options:
        raise DataError(
            f"question {base} has {options} options and needs as many rows for circular "
            f"evaluation, got the indices {', '.join(map(str, indices))}"
        )
