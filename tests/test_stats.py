"""Intervals and paired tests against brute force and textbook formulas."""

from __future__ import annotations

import itertools
import json
import math
import random
import sys
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vistoken.errors import BackendUnavailable, DataError
from vistoken.eval import gqa, pope, stats


def mean(totals: Sequence[float]) -> dict[str, float]:
    return {"mean": stats.ratio(totals[0], totals[1])}


def noise(count: int, seed: int = 0) -> list[float]:
    rng = random.Random(seed)
    return [rng.gauss(0, 1) for _ in range(count)]


def test_interval_of_a_mean_is_near_the_normal_one() -> None:
    values = noise(400)
    interval = stats.bootstrap([(v, 1) for v in values], mean, resamples=4000)["mean"]
    center = sum(values) / len(values)
    spread = math.sqrt(sum((v - center) ** 2 for v in values)) / len(values)
    assert interval.low == pytest.approx(center - 1.96 * spread, abs=0.12 * spread)
    assert interval.high == pytest.approx(center + 1.96 * spread, abs=0.12 * spread)


def test_interval_covers_the_true_mean_at_its_level() -> None:
    hits = 0
    for seed in range(300):
        totals = [(v, 1) for v in noise(60, seed)]
        interval = stats.bootstrap(totals, mean, resamples=200, level=0.8)["mean"]
        hits += interval.low <= 0 <= interval.high
    # Binomial(300, 0.8): mean 240, standard deviation 7; small samples undercover a little.
    assert 205 <= hits <= 265


def test_groups_that_repeat_themselves_widen_the_interval() -> None:
    labels = ["yes", "no"] * 60
    rng = random.Random(1)
    blocks = [rng.choice([True, False]) for _ in range(30)]
    answers = [
        label if right else "no" if label == "yes" else "yes"
        for i, label in enumerate(labels)
        for right in [blocks[i // 4]]
    ]
    alone = pope.score(answers, labels, resamples=2000).intervals["accuracy"]
    images = [i // 4 for i in range(120)]
    grouped = pope.score(answers, labels, images=images, resamples=2000).intervals["accuracy"]
    # Four equal outcomes per image carry the information of one: twice the width.
    assert (grouped.high - grouped.low) / (alone.high - alone.low) == pytest.approx(2, rel=0.12)


def test_strata_keep_their_size() -> None:
    totals = [(0, 1)] * 5 + [(1, 1)] * 5
    fixed = stats.bootstrap(totals, mean, strata=["a"] * 5 + ["b"] * 5)["mean"]
    assert (fixed.low, fixed.high) == (0.5, 0.5)
    free = stats.bootstrap(totals, mean)["mean"]
    assert free.low < 0.5 < free.high


def test_same_seed_same_interval() -> None:
    totals = [(v, 1) for v in noise(50)]
    assert stats.bootstrap(totals, mean, seed=3) == stats.bootstrap(totals, mean, seed=3)
    assert stats.bootstrap(totals, mean, seed=3) != stats.bootstrap(totals, mean, seed=4)


def test_pairing_removes_what_both_runs_share() -> None:
    hard = noise(200, 1)
    first = [(v, 1) for v in hard]
    second = [(v + 0.1 + 0.01 * e, 1) for v, e in zip(hard, noise(200, 2), strict=True)]
    difference = stats.paired_bootstrap(first, second, mean)["mean"]
    assert difference.value == pytest.approx(0.1, abs=0.005)
    assert 0.09 < difference.interval.low < difference.interval.high < 0.11
    assert difference.p_value == pytest.approx(2 / 1001)
    unpaired = stats.bootstrap(first, mean)["mean"]
    assert unpaired.high - unpaired.low > 0.2


def test_equal_runs_have_p_value_one() -> None:
    totals = [(v, 1) for v in noise(30)]
    difference = stats.paired_bootstrap(totals, totals, mean)["mean"]
    assert difference == stats.Difference(0.0, stats.Interval(0.0, 0.0), 1.0)


@given(outcomes=st.lists(st.tuples(st.booleans(), st.booleans()), max_size=12))
def test_mcnemar_against_all_sign_flips(outcomes: list[tuple[bool, bool]]) -> None:
    test = stats.mcnemar([a for a, _ in outcomes], [b for _, b in outcomes])
    signs = [a - b for a, b in outcomes if a != b]
    observed = abs(sum(signs))
    flips = list(itertools.product((1, -1), repeat=len(signs)))
    expected = sum(abs(sum(flip)) >= observed for flip in flips) / len(flips)
    assert test.p_value == pytest.approx(expected)
    assert test.both + test.only_first + test.only_second + test.neither == len(outcomes)


def test_mcnemar_of_many_items_stays_exact() -> None:
    test = stats.mcnemar([True] * 5200 + [False] * 4800, [False] * 5200 + [True] * 4800)
    # Normal approximation with continuity correction: z = 399 / 100.
    assert test.p_value == pytest.approx(math.erfc(3.99 / math.sqrt(2)), rel=0.02)
    assert stats.mcnemar([True] * 3000, [False] * 3000).p_value == 0.0


def test_compare_two_runs_on_the_same_questions() -> None:
    labels = ["yes", "no"] * 50
    images = [i // 2 for i in range(100)]
    worse = ["yes"] * 100
    first = pope.score(worse, labels, images=images)
    second = pope.score(labels, labels, images=images)
    comparison = stats.compare(first, second)
    assert comparison.differences["accuracy"].value == 0.5
    assert comparison.mcnemar == stats.McNemar(50, 0, 50, 0, 2.0**-49)
    json.dumps(comparison.to_dict())


def test_compare_joins_by_id_and_refuses_other_items() -> None:
    first = gqa.score(["a", "b", "b"], ["a", "b", "c"], ids=[1, 2, 3])
    turned = stats.compare(first, gqa.score(["b", "b", "a"], ["c", "b", "a"], ids=[3, 2, 1]))
    assert turned.mcnemar == stats.McNemar(2, 0, 0, 1, 1.0)
    assert turned.differences["accuracy"].interval == stats.Interval(0, 0)
    with pytest.raises(DataError, match="same items"):
        stats.compare(first, gqa.score(["a", "b", "b"], ["a", "b", "c"], ids=[1, 2, 4]))
    with pytest.raises(DataError, match="one protocol"):
        stats.compare(first, pope.score(["yes"], ["yes"]))  # type: ignore[type-var]


def test_no_interval_from_one_group_or_without_resamples() -> None:
    one_image = pope.score(["yes", "no"], ["yes", "no"], images=["x", "x"])
    assert one_image.intervals == {} and one_image.accuracy == 1
    assert pope.score(["yes", "no"], ["yes", "no"], resamples=0).intervals == {}
    with pytest.raises(DataError, match="at least 2 groups"):
        stats.bootstrap([(1, 1)], mean)
    with pytest.raises(DataError, match="0 < level < 1"):
        stats.bootstrap([(1, 1)] * 3, mean, level=95)


def test_without_numpy_the_error_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "numpy", None)
    with pytest.raises(BackendUnavailable, match="pip install numpy.*resamples=0"):
        pope.score(["yes", "no"], ["yes", "no"])
    assert pope.score(["yes", "no"], ["yes", "no"], resamples=0).accuracy == 1
