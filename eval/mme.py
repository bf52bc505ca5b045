"""MME, pairs of yes/no questions in 14 subtasks (Fu et al., 2023, arXiv 2306.13394)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from vistoken.errors import DataError
from vistoken.eval import records, stats

PERCEPTION = (
    "existence",
    "count",
    "position",
    "color",
    "posters",
    "celebrity",
    "scene",
    "landmark",
    "artwork",
    "OCR",
)
COGNITION = (
    "commonsense_reasoning",
    "numerical_calculation",
    "text_translation",
    "code_reasoning",
)
HALLUCINATION = ("existence", "count", "position", "color")
SUBTASKS = PERCEPTION + COGNITION
SUFFIXES = {
    "mme": " Please answer yes or no.",
    "lmms-eval": "\nAnswer the question using a single word or phrase.",
}
_KINDS = ("questions", "correct", "images", "both")


@dataclass(frozen=True, slots=True, kw_only=True)
class MmeRow(stats.Row):
    """One answer; `group` is the pair (category, image); `predicted` is yes, no or other."""

    answer: str
    label: str
    predicted: str
    correct: bool


@dataclass(frozen=True, kw_only=True)
class MmeResult(stats.Result):
    """Scores of MME in points.

    A subtask scores its accuracy over questions plus its accuracy over images (both answers
    right), each in percent, so at most 200. `metrics` holds the scores of the subtasks that were
    asked and the sums `perception` (at most 2000), `cognition` (800), `hallucination` (existence,
    count, position and color; 800) and `total`, to which other subtasks add 0. For the intervals
    images are drawn again within their subtask.
    """

    protocol: ClassVar[str] = "mme"
    unit: ClassVar[str] = "points"
    totals: ClassVar[tuple[str, ...]] = tuple(
        f"{subtask}_{kind}" for subtask in SUBTASKS for kind in _KINDS
    )

    @property
    def by_category(self) -> dict[str, dict[str, float]]:
        """Accuracy, accuracy_plus and score of each subtask that was asked."""
        return _by_category(tuple(self.counts.values()))

    @property
    def total(self) -> float:
        """Sum over all subtasks."""
        return self.metrics["total"]

    @property
    def perception(self) -> float:
        """Sum over the perception subtasks."""
        return self.metrics["perception"]

    @property
    def cognition(self) -> float:
        """Sum over the cognition subtasks."""
        return self.metrics["cognition"]

    @property
    def hallucination(self) -> float:
        """Sum over existence, count, position and color."""
        return self.metrics["hallucination"]

    @staticmethod
    def tally(rows: Sequence[MmeRow]) -> Sequence[float]:
        """Return the totals of one image, at the place of its subtask."""
        right = sum(row.correct for row in rows)
        totals = [0.0] * (len(SUBTASKS) * len(_KINDS))
        start = SUBTASKS.index(rows[0].group[0]) * len(_KINDS)
        totals[start : start + len(_KINDS)] = (len(rows), right, 1, right == len(rows))
        return totals

    @staticmethod
    def measure(totals: Sequence[float]) -> dict[str, float]:
        """Return the scores of the subtasks asked, and the sums."""
        scores = {name: part["score"] for name, part in _by_category(totals).items()}
        sums = {"perception": PERCEPTION, "cognition": COGNITION, "hallucination": HALLUCINATION}
        metrics = {
            name: sum(scores.get(subtask, 0.0) for subtask in subtasks)
            for name, subtasks in sums.items()
        }
        total = metrics["perception"] + metrics["cognition"]
        return {"total": total} | metrics | scores

    @staticmethod
    def stratum(group: Any) -> Any:
        """Return the subtask of an image."""
        return group[0]

    def to_dict(self, *, rows: bool = True) -> dict[str, Any]:
        """Return the result as plain dictionaries, lists and numbers, ready for JSON."""
        return super().to_dict(rows=rows) | {"by_category": self.by_category}


def parse(answer: str) -> str:
    """Read `yes`, `no` or `other` from an answer, as Otter and lmms-eval do.

    Lower-cased, stripped and without periods the answer must be yes, no, y or n, or hold "yes" or
    else "no" in its first four characters ("know" is a no).
    """
    text = answer.lower().strip().replace(".", "")
    if len(text) == 1:
        return {"y": "yes", "n": "no"}.get(text, "other")
    head = text[:4]
    if "yes" in head:
        return "yes"
    return "no" if "no" in head else "other"


def score(
    answers: Sequence[str],
    labels: Sequence[str],
    categories: Sequence[str],
    images: Sequence[Any],
    *,
    ids: Sequence[records.Id] | None = None,
    resamples: int = 1000,
    seed: int = 0,
) -> MmeResult:
    """Score answers to the two questions about each image of each subtask.

    Raises DataError for columns of different length, unknown labels or subtasks, duplicate ids,
    and images of which a subtask holds other than two questions.
    """
    count = records.check_columns(
        answers=answers, labels=labels, categories=categories, images=images, ids=ids
    )
    records.check_texts("answers", answers)
    wanted = records.check_choices("labels", labels, ("yes", "no"))
    names = records.check_ids("ids", ids, count)
    rows = []
    for i, (answer, label) in enumerate(zip(answers, wanted, strict=True)):
        if categories[i] not in SUBTASKS:
            raise DataError(f"categories[{i}] is {categories[i]!r}; allowed: {', '.join(SUBTASKS)}")
        found = parse(answer)
        row = MmeRow(
            id=names[i],
            group=(categories[i], images[i]),
            answer=answer,
            label=label,
            predicted=found,
            correct=found == label,
        )
        rows.append(row)
    _check_pairs(rows)
    return stats.summarize(
        MmeResult,
        rows,
        empty=sum(not answer.strip() for answer in answers),
        unparsed=sum(row.predicted == "other" for row in rows),
        resamples=resamples,
        seed=seed,
    )


def _by_category(totals: Sequence[float]) -> dict[str, dict[str, float]]:
    found = {}
    for place, subtask in enumerate(SUBTASKS):
        questions, correct, images, both = totals[place * len(_KINDS) : (place + 1) * len(_KINDS)]
        if questions:
            accuracy, plus = 100 * correct / questions, 100 * both / images
            found[subtask] = {
                "accuracy": accuracy,
                "accuracy_plus": plus,
                "score": accuracy + plus,
            }
    return found


def _check_pairs(rows: Sequence[MmeRow]) -> None:
    asked = Counter(row.group for row in rows)
    wrong = [(group, count) for group, count in asked.items() if count != 2]
    if wrong:
        (category, image), count = wrong[0]
        raise DataError(
            f"MME needs two questions about each image: {category} / {image!r} has {count}"
            + (f", and {len(wrong) - 1} more images have not two" if len(wrong) > 1 else "")
        )
