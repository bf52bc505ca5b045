"""POPE, yes/no questions about objects (Li et al., EMNLP 2023, arXiv 2305.10355).

Published numbers differ by parser, file revision and prompt suffix. The parsers in use have names
here (`PARSERS`), `revision` tells the released files apart, `SUFFIXES` lists the suffixes.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from vistoken.errors import DataError, MethodError
from vistoken.eval import records, stats
from vistoken.eval.pope_questions import (
    LABELS,
    STRATEGIES,
    TEMPLATE,
    Question,
    Revision,
    build,
    load,
    revision,
)

__all__ = [
    "LABELS",
    "PARSERS",
    "STRATEGIES",
    "SUFFIXES",
    "TEMPLATE",
    "PopeResult",
    "PopeRow",
    "PopeSummary",
    "Question",
    "Revision",
    "build",
    "combine",
    "lmms_eval_metrics",
    "load",
    "parse",
    "revision",
    "score",
]

SUFFIXES = {
    "none": "",
    "llava": "\nAnswer the question using a single word or phrase.",
    "vcd": " Please answer this question with one word.",
    "sgrs": " Please just answer yes or no.",
}
_PAI_NEGATIONS = frozenset({"No", "not", "no", "NO"})
_FIRST_WORD = re.compile(r"(?<![^\W_])(?<![^\W_][-'’])(yes|no)(?![-'’]?[^\W_])", re.IGNORECASE)


@dataclass(frozen=True, slots=True, kw_only=True)
class PopeRow(stats.Row):
    """One answer; `predicted` is None if it could not be parsed, which counts as wrong."""

    answer: str
    label: str
    predicted: str | None
    correct: bool


@dataclass(frozen=True, kw_only=True)
class PopeResult(stats.Result):
    """Scores of POPE as fractions.

    `fn` counts every question with label yes that was not answered yes, unparsed ones included.
    A label-no question that was not parsed is neither `fp` nor `tn`; `accuracy` and `yes_ratio`
    are shares of all questions.
    """

    protocol: ClassVar[str] = "pope"
    totals: ClassVar[tuple[str, ...]] = ("tp", "fp", "tn", "fn", "questions")

    parser: str

    @property
    def accuracy(self) -> float:
        """Share of right answers."""
        return self.metrics["accuracy"]

    @property
    def precision(self) -> float:
        """Share of `yes` answers that are right."""
        return self.metrics["precision"]

    @property
    def recall(self) -> float:
        """Share of questions with label yes that were answered yes."""
        return self.metrics["recall"]

    @property
    def f1(self) -> float:
        """Harmonic mean of precision and recall."""
        return self.metrics["f1"]

    @property
    def yes_ratio(self) -> float:
        """Share of questions that were answered yes."""
        return self.metrics["yes_ratio"]

    @staticmethod
    def tally(rows: Sequence[PopeRow]) -> Sequence[float]:
        """Return the totals of one image."""
        cells = Counter((row.predicted, row.label) for row in rows)
        positives = sum(row.label == "yes" for row in rows)
        tp = cells["yes", "yes"]
        return (tp, cells["yes", "no"], cells["no", "no"], positives - tp, len(rows))

    @staticmethod
    def measure(totals: Sequence[float]) -> dict[str, float]:
        """Return accuracy, precision, recall, F1 and yes-ratio."""
        tp, fp, tn, fn, questions = totals
        return {
            "accuracy": stats.ratio(tp + tn, questions),
            "precision": stats.ratio(tp, tp + fp),
            "recall": stats.ratio(tp, tp + fn),
            "f1": stats.ratio(2 * tp, 2 * tp + fp + fn),
            "yes_ratio": stats.ratio(tp + fp, questions),
        }


@dataclass(frozen=True)
class PopeSummary:
    """Several splits: each one's result, the plain means over splits, and all answers pooled."""

    splits: Mapping[str, PopeResult]
    mean: Mapping[str, float]
    pooled: PopeResult


def parse(answer: str, parser: str = "first-word", *, label: str | None = None) -> str | None:
    """Read `yes` or `no` from an answer; None if the parser finds neither.

    - `first-word`: the first standalone yes or no, whatever its case.
    - `official` (POPE, LLaVA): no if `No`, `no` or `not` is a word before the first period; else
      yes, also for an empty answer.
    - `vcd`: yes or no is looked for as a substring, whichever the `label` says; a miss is returned
      as the other class. Needs `label`.
    - `pai`: no if a word is `No`, `no`, `NO` or `not` or ends in "n't"; else yes.
    - `lmms-eval`: the whole answer must be yes or no, whatever its case.

    Raises MethodError for another parser, or if `vcd` gets no label.
    """
    if parser not in _PARSERS:
        raise MethodError(f"parser is {parser!r}; allowed: {', '.join(PARSERS)}")
    return _PARSERS[parser](answer, label)


def score(
    answers: Sequence[str],
    labels: Sequence[str],
    parser: str = "first-word",
    *,
    ids: Sequence[records.Id] | None = None,
    images: Sequence[Any] | None = None,
    resamples: int = 1000,
    seed: int = 0,
) -> PopeResult:
    """Score answers against the labels `yes` and `no`.

    `images` names the image of each question: intervals are then bootstrapped over images.
    Unparsed answers count as wrong and are counted in `unparsed`. Raises DataError for columns of
    different length, unknown labels or duplicate ids, MethodError for an unknown parser.
    """
    count = records.check_columns(answers=answers, labels=labels, ids=ids, images=images)
    records.check_texts("answers", answers)
    wanted = records.check_choices("labels", labels, LABELS)
    names = records.check_ids("ids", ids, count)
    groups = [None] * count if images is None else images
    rows = []
    for name, group, answer, label in zip(names, groups, answers, wanted, strict=True):
        found = parse(answer, parser, label=label)
        right = found == label
        row = PopeRow(
            id=name, group=group, answer=answer, label=label, predicted=found, correct=right
        )
        rows.append(row)
    return _result(rows, parser, resamples, seed)


def combine(
    splits: Mapping[str, PopeResult], *, resamples: int = 1000, seed: int = 0
) -> PopeSummary:
    """Put several splits together both ways: mean over splits (LLaVA) and pooled (lmms-eval).

    Raises DataError if there is no split or if the splits were parsed differently.
    """
    parsers = {result.parser for result in splits.values()}
    if len(parsers) != 1:
        raise DataError(f"the splits must share one parser, got {sorted(parsers) or 'no split'}")
    scores = [result.metrics for result in splits.values()]
    mean = {name: sum(metrics[name] for metrics in scores) / len(scores) for name in scores[0]}
    rows = [
        replace(row, id=(split, row.id)) for split, result in splits.items() for row in result.rows
    ]
    return PopeSummary(dict(splits), mean, _result(rows, parsers.pop(), resamples, seed))


def lmms_eval_metrics(result: PopeResult) -> dict[str, float]:
    """Return the metrics as lmms-eval's task `pope` computes them, defects included.

    Its yes-ratio is the share of labels that are yes, and its recall leaves out questions whose
    answer is neither yes nor no. Score with `parser="lmms-eval"` first.
    """
    cells = Counter((row.predicted, row.label) for row in result.rows)
    precision = stats.ratio(cells["yes", "yes"], cells["yes", "yes"] + cells["yes", "no"])
    recall = stats.ratio(cells["yes", "yes"], cells["yes", "yes"] + cells["no", "yes"])
    return {
        "accuracy": result.accuracy,
        "precision": precision,
        "recall": recall,
        "f1": stats.ratio(2 * precision * recall, precision + recall),
        "yes_ratio": stats.ratio(sum(row.label == "yes" for row in result.rows), result.n),
    }


def _result(rows: Sequence[PopeRow], parser: str, resamples: int, seed: int) -> PopeResult:
    return stats.summarize(
        PopeResult,
        rows,
        empty=sum(not row.answer.strip() for row in rows),
        unparsed=sum(row.predicted is None for row in rows),
        resamples=resamples,
        seed=seed,
        parser=parser,
    )


def _first_word(answer: str, label: str | None) -> str | None:
    match = _FIRST_WORD.search(answer)
    return match[1].lower() if match else None


def _official(answer: str, label: str | None) -> str:
    words = answer.split(".", 1)[0].replace(",", "").split(" ")
    return "no" if not {"No", "no", "not"}.isdisjoint(words) else "yes"


def _vcd(answer: str, label: str | None) -> str:
    if label not in LABELS:
        raise MethodError(f"the parser 'vcd' needs label='yes' or label='no', got {label!r}")
    other = "no" if label == "yes" else "yes"
    return label if label in answer.lower() else other


def _pai(answer: str, label: str | None) -> str:
    words = answer.replace(".", "").replace(",", "").split(" ")
    negative = any(word in _PAI_NEGATIONS or word.endswith("n't") for word in words)
    return "no" if negative else "yes"


def _lmms_eval(answer: str, label: str | None) -> str | None:
    plain = answer.lower().strip()
    return plain if plain in LABELS else None


_PARSERS: dict[str, Callable[[str, str | None], str | None]] = {
    "first-word": _first_word,
    "official": _official,
    "vcd": _vcd,
    "pai": _pai,
    "lmms-eval": _lmms_eval,
}
PARSERS = tuple(_PARSERS)
