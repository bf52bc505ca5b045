"""VQA accuracy: vectors of the official and derived processors, score table, batch results."""

from __future__ import annotations

import random
import time
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vistoken.errors import DataError, MethodError
from vistoken.eval import vqa

# text: EvalAI's processor, official pair where it differs; taken by running both.
NORMALISED: dict[str, tuple[str, str]] = {
    "The Cat.": ("cat", "cat"),
    "two": ("2", "2"),
    "1,000": ("1000", "1000"),
    "4,000,000": ("4000000", "4000000"),
    "10.5": ("10.5", "10.5"),
    "3.": ("3", "3"),
    "v1.2.3": ("v1.2.3", "v1.2.3"),
    "dont": ("don't", "don't"),
    "yes!": ("yes", "yes"),
    "red/white": ("red white", "red white"),
    "T-shirt": ("t shirt", "t shirt"),
    "left-hand": ("left hand", "left hand"),
    "7 - 11": ("7 11", "7 11"),
    "word - word": ("word word", "word word"),
    "New York, NY": ("new york ny", "new york ny"),
    "U.S.A.": ("usa", "usa"),
    "its 4:30 p.m.": ("its 4:30 pm", "its 4:30 pm"),
    "$5.00": ("$5.00", "$5.00"),
    "none": ("0", "0"),
    "the": ("", ""),
    "Twenty-one": ("twenty 1", "twenty 1"),
    "cat's": ("cat 's", "cat's"),
    "it's": ("it 's", "it's"),
    "red\nor\tblue ": ("red or blue", "red or blue"),
    # A comma between digits anywhere deletes every mark instead of putting a blank.
    "1,000-red": ("1000 red", "1000red"),
    # At most 32 periods go.
    "." * 33 + "a": (".a", ".a"),
}
# answers, prediction: official, lmms-eval, textvqa
SCORES: list[tuple[list[str], str, float, float, float]] = [
    (["yes"] * 10, "Yes", 0, 100, 100),
    (["yes"] * 10, "yes.", 0, 100, 100),
    (["yes"] * 10, " yes\n", 100, 100, 100),
    (["2"] * 10, "two", 0, 100, 100),
    (["yes"] * 9 + ["no"], "Yes.", 100, 100, 100),
    (["red"] * 1 + ["blue"] * 9, "red", 30, 30, 30),
    (["red"] * 2 + ["blue"] * 8, "red", 60, 60, 60),
    (["red"] * 3 + ["blue"] * 7, "red", 90, 90, 90),
    (["red"] * 4 + ["blue"] * 6, "red", 100, 100, 100),
    (["red"] * 5 + ["blue"] * 5, "the red", 100, 100, 100),
    (["2"] * 6 + ["two"] * 4, "two", 100, 100, 100),
    (["none"] * 4 + ["0"] * 6, "0", 100, 100, 100),
]


@pytest.mark.parametrize("text", NORMALISED)
def test_normalisation_vectors(text: str) -> None:
    evalai, official = NORMALISED[text]
    assert vqa.normalise(text, mode="textvqa") == vqa.normalise(text, mode="evalai") == evalai
    assert vqa.normalise(text, mode="official") == official


def test_modes_differ_in_the_comma_rule() -> None:
    assert vqa.normalise("1,,000/x", mode="lmms-eval") == "1000x"
    assert vqa.normalise("1,,000/x", mode="official") == "1 000 x"


@pytest.mark.parametrize(("answers", "prediction", "official", "lmms_eval", "textvqa"), SCORES)
def test_score_vectors(
    answers: list[str], prediction: str, official: float, lmms_eval: float, textvqa: float
) -> None:
    assert vqa.score(prediction, answers) == official
    assert vqa.score(prediction, answers, mode="lmms-eval") == lmms_eval
    assert vqa.score(prediction, answers, mode="textvqa") == textvqa


@pytest.mark.parametrize(
    ("matches", "points"), [(0, 0), (1, 30), (2, 60), (3, 90), (4, 100), (9, 100)]
)
def test_matches_of_ten(matches: int, points: float) -> None:
    assert vqa.score("x", ["x"] * matches + ["y"] * (9 - matches) + ["z"]) == points


POOL = st.sampled_from(["red", "Red", "the red", "blue", "2", "two"])


@given(answers=st.lists(POOL, min_size=4, max_size=12), prediction=POOL, order=st.randoms())
def test_score_is_the_mean_over_left_out_answers(
    answers: list[str], prediction: str, order: random.Random
) -> None:
    plain = {"Red": "red", "the red": "red", "two": "2"}
    points = []
    for left_out in range(len(answers)):
        others = [plain.get(a, a) for j, a in enumerate(answers) if j != left_out]
        points.append(min(1, others.count(plain.get(prediction, prediction)) / 3))
    expected = round(100 * sum(points) / len(points), 2)
    assert vqa.score(prediction, answers, mode="textvqa") == pytest.approx(expected, abs=0.006)
    shuffled = order.sample(answers, len(answers))
    assert vqa.score(prediction, shuffled) == vqa.score(prediction, answers)


def test_evaluate_averages_and_splits_by_type() -> None:
    result = vqa.evaluate(
        ["red", "the", "", "two"],
        [["red"] * 2 + ["blue"] * 8, ["x"] * 5 + ["y"] * 5, ["x"] * 10, ["2"] * 10],
        types=["color", "other", "other", "number"],
        images=["a", "a", "b", "b"],
    )
    assert result.accuracy == pytest.approx((60 + 0 + 0 + 0) / 4)
    assert result.by_type == {"color": 60, "other": 0, "number": 0}
    assert (result.n, result.empty, result.unparsed, result.parsed) == (4, 1, 2, 2)
    assert [row.normalized for row in result.rows] == ["red", "", "", "two"]
    plain = result.to_dict()
    assert plain["unit"] == "percent" and plain["mode"] == "official"
    assert plain["intervals"]["accuracy"]["high"] == 30


@pytest.mark.parametrize(
    ("call", "error", "reason"),
    [
        (lambda: vqa.score("x", ["x"]), DataError, "at least 4 .* given ten times"),
        (lambda: vqa.score("x", "xxxxxxxxxx"), DataError, "must be a list"),
        (lambda: vqa.score("x", ["x"] * 9 + [None]), DataError, r"answers\[9\] must be text"),
        (lambda: vqa.score("x", ["x"] * 10, mode="vizwiz"), MethodError, "allowed: official"),
        (lambda: vqa.evaluate(["x"], [["x"]]), DataError, r"answers\[0\] must be a list"),
        (lambda: vqa.evaluate(["x"], []), DataError, "predictions 1, answers 0"),
        (lambda: vqa.evaluate([1], [["x"] * 10]), DataError, r"predictions\[0\] must be text"),
    ],
)
def test_bad_input_is_refused(call: Any, error: type[Exception], reason: str) -> None:
    with pytest.raises(error, match=reason):
        call()


def test_ten_thousand_answers_take_less_than_two_seconds() -> None:
    rng = random.Random(0)
    pool = [f"{color} {thing}" for color in ("red", "a blue") for thing in ("cat", "T-shirt.")]
    predictions = [rng.choice(pool) + str(rng.randrange(50)) for _ in range(10_000)]
    answers = [[rng.choice(pool) + str(rng.randrange(50)) for _ in range(10)] for _ in predictions]
    start = time.process_time()
    result = vqa.evaluate(predictions, answers)
    assert time.process_time() - start < 2
    assert 0 < result.intervals["accuracy"].low < result.accuracy
