"""GQA, exact match of short answers (Hudson and Manning, CVPR 2019, arXiv 1902.09506)."""

from __future__ import annotations

import string
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from vistoken.errors import MethodError
from vistoken.eval import records, stats

MODES = ("official", "lmms-eval")
SUFFIX = "\nAnswer the question using a single word or phrase."
_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)


@dataclass(frozen=True, slots=True, kw_only=True)
class GqaRow(stats.Row):
    """One prediction and the answer it was compared with."""

    prediction: str
    answer: str
    correct: bool


@dataclass(frozen=True, kw_only=True)
class GqaResult(stats.Result):
    """Share of exact matches, overall and by type of question (where types were given)."""

    protocol: ClassVar[str] = "gqa"
    totals: ClassVar[tuple[str, ...]] = ("correct", "questions")

    mode: str
    by_type: dict[str, float]

    @property
    def accuracy(self) -> float:
        """Share of right answers."""
        return self.metrics["accuracy"]

    @staticmethod
    def tally(rows: Sequence[GqaRow]) -> Sequence[float]:
        """Return the totals of one image."""
        return (sum(row.correct for row in rows), len(rows))

    @staticmethod
    def measure(totals: Sequence[float]) -> dict[str, float]:
        """Return the accuracy."""
        return {"accuracy": stats.ratio(totals[0], totals[1])}


def normalise(text: str, mode: str = "official") -> str:
    """Normalize a prediction for comparison.

    `official` is LLaVA's step before the official script: outer blanks and trailing periods go,
    letters become small. `lmms-eval` makes letters small and deletes all ASCII punctuation, so
    that "t-shirt" equals "tshirt". Raises MethodError for another mode.
    """
    if mode == "official":
        return text.strip().rstrip(".").lower()
    if mode == "lmms-eval":
        return text.lower().translate(_NO_PUNCTUATION)
    raise MethodError(f"mode is {mode!r}; allowed: {', '.join(MODES)}")


def score(
    predictions: Sequence[str],
    answers: Sequence[str],
    mode: str = "official",
    *,
    ids: Sequence[records.Id] | None = None,
    images: Sequence[Any] | None = None,
    types: Sequence[str] | None = None,
    resamples: int = 1000,
    seed: int = 0,
) -> GqaResult:
    """Score predictions against one answer each, by exact match after `normalise`.

    The `official` mode takes the answers as they are, as the official script does; `lmms-eval`
    normalizes both sides. `types` adds an accuracy for each; intervals are bootstrapped over
    `images` where given. Raises DataError for columns of different length or duplicate ids.
    """
    count = records.check_columns(
        predictions=predictions, answers=answers, ids=ids, images=images, types=types
    )
    records.check_texts("predictions", predictions)
    records.check_texts("answers", answers)
    names = records.check_ids("ids", ids, count)
    groups: Sequence[Any] = [None] * count if images is None else images
    rows, found = [], []
    for i, (prediction, answer) in enumerate(zip(predictions, answers, strict=True)):
        found.append(normalise(prediction, mode))
        wanted = normalise(answer, mode) if mode == "lmms-eval" else answer
        row = GqaRow(
            id=names[i],
            group=groups[i],
            prediction=prediction,
            answer=answer,
            correct=found[i] == wanted,
        )
        rows.append(row)
    by_type: dict[str, list[bool]] = {}
    for kind, row in zip(types or (), rows, strict=types is not None):
        by_type.setdefault(kind, []).append(row.correct)
    return stats.summarize(
        GqaResult,
        rows,
        empty=sum(not prediction.strip() for prediction in predictions),
        unparsed=sum(not text for text in found),
        resamples=resamples,
        seed=seed,
        mode=mode,
        by_type={kind: sum(right) / len(right) for kind, right in by_type.items()},
    )
