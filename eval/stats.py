"""Evaluation results with confidence intervals, and paired tests between two runs.

A result keeps its rows (one per question, caption, ...) in groups, normally the images. Groups are
what is drawn again in the bootstrap, because the answers about one image depend on each other.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, ClassVar, TypeVar

from vistoken.errors import BackendUnavailable, DataError

Measure = Callable[[Sequence[float]], dict[str, float]]
LEVEL = 0.95


@dataclass(frozen=True, slots=True)
class Interval:
    """A percentile interval; `level` is the share of resamples between `low` and `high`."""

    low: float
    high: float
    level: float = LEVEL


@dataclass(frozen=True, slots=True)
class Difference:
    """Second run minus first run of one metric, its interval and a two-sided bootstrap p-value."""

    value: float
    interval: Interval
    p_value: float


@dataclass(frozen=True, slots=True)
class McNemar:
    """Counts of paired right/wrong outcomes and the exact two-sided p-value of McNemar's test."""

    both: int
    only_first: int
    only_second: int
    neither: int
    p_value: float


@dataclass(frozen=True, slots=True)
class Comparison:
    """Second run against first run on the same items; `mcnemar` is None for graded scores."""

    differences: Mapping[str, Difference]
    mcnemar: McNemar | None

    def to_dict(self) -> dict[str, Any]:
        """Return the comparison as plain dictionaries and numbers, ready for JSON."""
        return asdict(self)


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One scored item; `group` is its image, or None where the item stands for itself."""

    id: Any
    group: Any


@dataclass(frozen=True, kw_only=True)
class Result:
    """Base of the results of all protocols: metrics, totals, intervals and rows of one run.

    `metrics` are in the protocol's `unit`; `counts` are the totals they are computed from.
    `empty` counts outputs that are blank, `unparsed` outputs with no usable answer (the empty ones
    among them, where the parser refuses those). `intervals` is empty if there are fewer than two
    groups or if no resamples were asked for.
    """

    protocol: ClassVar[str]
    unit: ClassVar[str] = "fraction"
    totals: ClassVar[tuple[str, ...]]

    n: int
    empty: int
    unparsed: int
    metrics: Mapping[str, float]
    counts: Mapping[str, float]
    intervals: Mapping[str, Interval]
    rows: tuple[Any, ...] = field(repr=False)

    @property
    def parsed(self) -> int:
        """Number of outputs from which an answer could be read."""
        return self.n - self.unparsed

    @staticmethod
    def tally(rows: Sequence[Any]) -> Sequence[float]:
        """Return the additive totals of the rows of one group, in the order of `totals`."""
        raise NotImplementedError

    @staticmethod
    def measure(totals: Sequence[float]) -> dict[str, float]:
        """Return the metrics that follow from summed totals; empty denominators give 0."""
        raise NotImplementedError

    @staticmethod
    def stratum(group: Any) -> Any:
        """Return the stratum of a group; groups are drawn again within their stratum only."""
        return None

    @staticmethod
    def outcome(row: Any) -> bool | None:
        """Return whether the row is right, or None where the protocol grades by degrees."""
        return bool(row.correct)

    def to_dict(self, *, rows: bool = True) -> dict[str, Any]:
        """Return the result as plain dictionaries, lists and numbers, ready for JSON."""
        plain: dict[str, Any] = {"protocol": self.protocol, "unit": self.unit}
        plain |= {key: value for key, value in vars(self).items() if key not in _OWN_FORM}
        plain["parsed"] = self.parsed
        plain["metrics"] = dict(self.metrics)
        plain["counts"] = dict(self.counts)
        plain["intervals"] = {name: asdict(interval) for name, interval in self.intervals.items()}
        if rows:
            plain["rows"] = [asdict(row) for row in self.rows]
        return plain


_OWN_FORM = ("metrics", "counts", "intervals", "rows")
ResultT = TypeVar("ResultT", bound=Result)


def summarize(
    kind: type[ResultT],
    rows: Sequence[Any],
    *,
    empty: int,
    unparsed: int,
    resamples: int = 1000,
    seed: int = 0,
    **extra: Any,
) -> ResultT:
    """Build a result of class `kind` from its rows, with 95 % bootstrap intervals over groups.

    `resamples=0` leaves the intervals out; `extra` are the further fields of `kind`.
    """
    grouped = _tallies(kind, rows)
    totals = [math.fsum(column) for column in zip(*grouped.values(), strict=True)]
    intervals = {}
    if resamples and len(grouped) > 1:
        intervals = bootstrap(
            list(grouped.values()),
            kind.measure,
            resamples=resamples,
            seed=seed,
            strata=[kind.stratum(group) for group in grouped],
        )
    return kind(
        n=len(rows),
        empty=empty,
        unparsed=unparsed,
        metrics=kind.measure(totals),
        counts={
            name: int(total) if total.is_integer() else total
            for name, total in zip(kind.totals, totals, strict=True)
        },
        intervals=intervals,
        rows=tuple(rows),
        **extra,
    )


def bootstrap(
    totals: Sequence[Sequence[float]],
    measure: Measure,
    *,
    resamples: int = 1000,
    seed: int = 0,
    level: float = LEVEL,
    strata: Sequence[Any] | None = None,
) -> dict[str, Interval]:
    """Return percentile intervals of all metrics by drawing groups again with replacement.

    `totals` holds one row of additive totals per group; `measure` turns their sum into metrics.
    With `strata` (one per group) the number of groups of each stratum stays as it is. The same
    seed gives the same intervals. Raises DataError for fewer than two groups or a bad `level`,
    BackendUnavailable without numpy.
    """
    drawn = [measure(sums) for sums in _draw(totals, resamples, seed, level, strata)]
    return {name: _interval([metrics[name] for metrics in drawn], level) for name in drawn[0]}


def paired_bootstrap(
    first: Sequence[Sequence[float]],
    second: Sequence[Sequence[float]],
    measure: Measure,
    *,
    resamples: int = 1000,
    seed: int = 0,
    level: float = LEVEL,
    strata: Sequence[Any] | None = None,
) -> dict[str, Difference]:
    """Return second minus first for all metrics; both runs are drawn at the same groups.

    Row i of `first` and of `second` are the totals of the same group. The p-value is twice the
    smaller share of resamples on either side of zero, with one resample added to both counts, so
    it is never 0. Raises like `bootstrap`, and DataError if the runs differ in shape.
    """
    if len(first) != len(second) or any(
        len(a) != len(b) for a, b in zip(first, second, strict=True)
    ):
        raise DataError("a paired bootstrap needs the same groups and totals in both runs")
    width = len(first[0]) if first else 0
    joined = [[*a, *b] for a, b in zip(first, second, strict=True)]
    drawn: dict[str, list[float]] = {}
    for sums in _draw(joined, resamples, seed, level, strata):
        for name, value in _minus(measure, sums[width:], sums[:width]).items():
            drawn.setdefault(name, []).append(value)
    whole = [math.fsum(column) for column in zip(*joined, strict=True)]
    estimate = _minus(measure, whole[width:], whole[:width])
    return {
        name: Difference(estimate[name], _interval(values, level), _two_sided(values))
        for name, values in drawn.items()
    }


def mcnemar(first: Sequence[bool], second: Sequence[bool]) -> McNemar:
    """Test whether two runs are right equally often on the same items (McNemar 1947, exact).

    Entry i of both says whether the run was right on item i. The p-value is that of a two-sided
    binomial test with p = 1/2 on the items on which the runs differ. Raises DataError if the
    lengths differ.
    """
    if len(first) != len(second):
        raise DataError(f"McNemar's test needs paired items, got {len(first)} and {len(second)}")
    table = {(a, b): 0 for a in (True, False) for b in (True, False)}
    for a, b in zip(first, second, strict=True):
        table[bool(a), bool(b)] += 1
    left, right = table[True, False], table[False, True]
    return McNemar(
        both=table[True, True],
        only_first=left,
        only_second=right,
        neither=table[False, False],
        p_value=_sign_test(min(left, right), left + right),
    )


def compare(first: ResultT, second: ResultT, *, resamples: int = 1000, seed: int = 0) -> Comparison:
    """Compare two runs of one protocol on the same items: paired bootstrap, and McNemar's test.

    Raises DataError unless both results are of one protocol and hold the same items and groups.
    """
    if type(first) is not type(second):
        raise DataError(
            f"both results must be of one protocol, got {first.protocol} and {second.protocol}"
        )
    rows = {row.id: row for row in second.rows}
    if {row.id: row.group for row in first.rows} != {id: row.group for id, row in rows.items()}:
        raise DataError("both results must hold the same items with the same images")
    kind = type(first)
    ordered = [rows[row.id] for row in first.rows]
    one, two = _tallies(kind, first.rows), _tallies(kind, ordered)
    differences = paired_bootstrap(
        list(one.values()),
        list(two.values()),
        kind.measure,
        resamples=resamples,
        seed=seed,
        strata=[kind.stratum(group) for group in one],
    )
    outcomes = [
        (kind.outcome(a), kind.outcome(b)) for a, b in zip(first.rows, ordered, strict=True)
    ]
    pairs = [(a, b) for a, b in outcomes if a is not None and b is not None]
    graded = len(pairs) < len(outcomes)
    test = None if graded else mcnemar([a for a, _ in pairs], [b for _, b in pairs])
    return Comparison(differences, test)


def ratio(part: float, whole: float) -> float:
    """Return part / whole, or 0.0 if `whole` is 0."""
    return part / whole if whole else 0.0


def _tallies(kind: type[Result], rows: Sequence[Any]) -> dict[Any, Sequence[float]]:
    groups: dict[Any, list[Any]] = {}
    for row in rows:
        group = ("item", row.id) if row.group is None else row.group
        groups.setdefault(group, []).append(row)
    return {group: kind.tally(members) for group, members in groups.items()}


def _draw(
    totals: Sequence[Sequence[float]],
    resamples: int,
    seed: int,
    level: float,
    strata: Sequence[Any] | None,
) -> Iterator[list[float]]:
    """Yield the summed totals of each resample."""
    if len(totals) < 2:
        raise DataError(f"a bootstrap needs at least 2 groups, got {len(totals)}")
    if resamples < 1 or not 0 < level < 1:
        raise DataError(
            f"a bootstrap needs resamples >= 1 and 0 < level < 1, got {resamples} and {level}"
        )
    try:
        import numpy as np
    except ImportError as error:
        raise BackendUnavailable(
            "confidence intervals need numpy: run `pip install numpy`, or ask for resamples=0"
        ) from error
    labels = list(strata) if strata is not None else [None] * len(totals)
    if len(labels) != len(totals):
        raise DataError(f"strata has {len(labels)} entries for {len(totals)} groups")
    members = [
        np.array([i for i, label in enumerate(labels) if label == wanted])
        for wanted in dict.fromkeys(labels)
    ]
    matrix = np.asarray(totals, dtype=np.float64)
    # RandomState, not Generator: its stream is frozen, so intervals outlive numpy's releases.
    random = np.random.RandomState(seed)
    for _ in range(resamples):
        drawn = [group[random.randint(0, len(group), len(group))] for group in members]
        times = np.bincount(np.concatenate(drawn), minlength=len(matrix))
        yield (times @ matrix).tolist()


def _interval(values: Sequence[float], level: float) -> Interval:
    ordered = sorted(values)
    tail = (1 - level) / 2
    return Interval(_quantile(ordered, tail), _quantile(ordered, 1 - tail), level)


def _quantile(ordered: Sequence[float], share: float) -> float:
    place = share * (len(ordered) - 1)
    below = math.floor(place)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (place - below) * (ordered[above] - ordered[below])


def _minus(measure: Measure, left: Sequence[float], right: Sequence[float]) -> dict[str, float]:
    subtract = measure(right)
    return {name: value - subtract[name] for name, value in measure(left).items()}


def _two_sided(values: Sequence[float]) -> float:
    at_most = sum(value <= 0 for value in values)
    at_least = sum(value >= 0 for value in values)
    return min(1.0, 2 * (min(at_most, at_least) + 1) / (len(values) + 1))


def _sign_test(smaller: int, count: int) -> float:
    # Whole numbers until the last division: exact also where floats would underflow.
    term, tail = 1, 0
    for k in range(smaller + 1):
        tail += term
        term = term * (count - k) // (k + 1)
    return min(1.0, 2 * tail / (1 << count))
