"""VQA accuracy against several human answers (VQAv2, TextVQA, VizWiz; arXiv 1505.00468).

Three ways to normalize answers are in use and give different scores; each is a named mode.
Scores are percentages, as in the official evaluation.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from vistoken.errors import DataError, MethodError
from vistoken.eval import records, stats

MODES = ("official", "textvqa", "evalai", "lmms-eval")
SUFFIX = "\nAnswer the question using a single word or phrase."
MIN_ANSWERS = 4

_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
# The misspelled look-behind `(?!<=\d)` of the official code never fails at a period, so what is
# left of its rule is this; it hands re.UNICODE (32) to `sub` as the count of replacements.
_PERIOD = re.compile(r"\.(?!\d)")
_MOST_PERIODS = 32
_OFFICIAL_COMMA = re.compile(r"\d,\d")
_EVALAI_COMMA = re.compile(r"\d,+\d")
_DIGITS = {
    word: str(number)
    for number, word in enumerate(
        ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
    )
} | {"none": "0"}
_ARTICLES = frozenset({"a", "an", "the"})


@dataclass(frozen=True, slots=True, kw_only=True)
class VqaRow(stats.Row):
    """One prediction as given and normalized, and its score in percent."""

    prediction: str
    normalized: str
    score: float


@dataclass(frozen=True, kw_only=True)
class VqaResult(stats.Result):
    """Mean VQA accuracy in percent, overall and by type of question (where types were given).

    `unparsed` counts predictions of which nothing is left after normalization.
    """

    protocol: ClassVar[str] = "vqa"
    unit: ClassVar[str] = "percent"
    totals: ClassVar[tuple[str, ...]] = ("score", "questions")

    mode: str
    by_type: dict[str, float]

    @property
    def accuracy(self) -> float:
        """Mean score in percent."""
        return self.metrics["accuracy"]

    @staticmethod
    def tally(rows: Sequence[VqaRow]) -> Sequence[float]:
        """Return the totals of one image."""
        return (sum(row.score for row in rows), len(rows))

    @staticmethod
    def measure(totals: Sequence[float]) -> dict[str, float]:
        """Return the mean score."""
        return {"accuracy": stats.ratio(totals[0], totals[1])}

    @staticmethod
    def outcome(row: VqaRow) -> bool | None:
        """Return None: answers are graded by degrees."""
        return None


def normalise(text: str, mode: str = "official") -> str:
    """Normalize an answer: punctuation, number words, articles, contractions.

    - `official`: the VQAv2 evaluation.
    - `textvqa`, also called `evalai`: the processor of TextVQA and EvalAI, which lower-cases
      first, deletes every comma and question mark and splits off "'s".
    - `lmms-eval`: `official` but for the way commas between digits are recognized.

    Raises MethodError for another mode.
    """
    _check_mode(mode)
    if mode in ("textvqa", "evalai"):
        text = text.lower().replace(",", "").replace("?", "").replace("'s", " 's")
    return _digits_articles(_strip_punctuation(_one_line(text), mode))


def score(prediction: str, answers: Sequence[str], mode: str = "official") -> float:
    """Return the VQA accuracy of one prediction in percent, 0 to 100.

    For each human answer the prediction earns min(1, matches among the other answers / 3); the
    score is the mean. So of 10 answers 0, 1, 2, 3 and more than 3 matches give 0, 30, 60, 90, 100.
    The `official` mode leaves both sides as they are (but for outer blanks) if all answers are
    equal: "Yes" against ten times "yes" scores 0. The other modes always normalize.

    Raises DataError for fewer than 4 answers, with which no prediction could score 100 (give a
    single reference answer ten times), MethodError for an unknown mode.
    """
    _check_mode(mode)
    _check_answers("answers", answers)
    return round(_grade(prediction, answers, mode)[1], 2)


def evaluate(
    predictions: Sequence[str],
    answers: Sequence[Sequence[str]],
    mode: str = "official",
    *,
    ids: Sequence[records.Id] | None = None,
    images: Sequence[Any] | None = None,
    types: Sequence[str] | None = None,
    resamples: int = 1000,
    seed: int = 0,
) -> VqaResult:
    """Score predictions, each against its list of human answers; see `score`.

    `types` (question or answer types) adds a mean for each. Intervals are bootstrapped over
    `images` where given. Raises DataError for columns of different length or duplicate ids.
    """
    count = records.check_columns(
        predictions=predictions, answers=answers, ids=ids, images=images, types=types
    )
    _check_mode(mode)
    records.check_texts("predictions", predictions)
    names = records.check_ids("ids", ids, count)
    groups: Sequence[Any] = [None] * count if images is None else images
    rows = []
    for i, (prediction, given) in enumerate(zip(predictions, answers, strict=True)):
        _check_answers(f"answers[{i}]", given)
        normalized, points = _grade(prediction, given, mode)
        row = VqaRow(
            id=names[i],
            group=groups[i],
            prediction=prediction,
            normalized=normalized,
            score=points,
        )
        rows.append(row)
    by_type: dict[str, list[float]] = {}
    for kind, row in zip(types or (), rows, strict=types is not None):
        by_type.setdefault(kind, []).append(row.score)
    return stats.summarize(
        VqaResult,
        rows,
        empty=sum(not prediction.strip() for prediction in predictions),
        unparsed=sum(not row.normalized for row in rows),
        resamples=resamples,
        seed=seed,
        mode=mode,
        by_type={kind: sum(points) / len(points) for kind, points in by_type.items()},
    )


def _grade(prediction: str, answers: Sequence[str], mode: str) -> tuple[str, float]:
    """Return the prediction in the form in which it was compared, and its score."""
    given = [_one_line(answer) for answer in answers]
    if mode == "official" and len(set(given)) == 1:
        plain = _one_line(prediction)
    else:
        plain = normalise(prediction, mode)
        given = [_cached_normalise(answer, mode) for answer in answers]
    matches = sum(answer == plain for answer in given)
    thirds = sum(min(3, matches - (answer == plain)) for answer in given)
    return plain, 100 * thirds / (3 * len(given))


@functools.lru_cache(maxsize=65536)
def _cached_normalise(text: str, mode: str) -> str:
    return normalise(text, mode)


def _one_line(text: str) -> str:
    return text.replace("\n", " ").replace("\t", " ").strip()


def _strip_punctuation(text: str, mode: str) -> str:
    comma = _OFFICIAL_COMMA if mode == "official" else _EVALAI_COMMA
    delete_all = comma.search(text) is not None
    out = text
    for mark in _PUNCTUATION:
        if mark in out:
            beside_blank = f"{mark} " in text or f" {mark}" in text
            out = out.replace(mark, "" if delete_all or beside_blank else " ")
    return _PERIOD.sub("", out, count=_MOST_PERIODS)


def _digits_articles(text: str) -> str:
    words = [_DIGITS.get(word, word) for word in text.lower().split()]
    restored = _contractions()
    return " ".join(restored.get(word, word) for word in words if word not in _ARTICLES)


@functools.cache
def _contractions() -> dict[str, str]:
    path = Path(__file__).with_name("vqa_contractions.json")
    found: dict[str, str] = json.loads(path.read_text(encoding="utf-8"))["contractions"]
    return found


def _check_mode(mode: str) -> None:
    if mode not in MODES:
        raise MethodError(f"mode is {mode!r}; allowed: {', '.join(MODES)}")


def _check_answers(name: str, answers: Sequence[str]) -> None:
    if isinstance(answers, str) or len(answers) < MIN_ANSWERS:
        raise DataError(
            f"{name} must be a list of at least {MIN_ANSWERS} answers, got {answers!r}; a single "
            "reference answer is given ten times"
        )
    records.check_texts(name, answers)
