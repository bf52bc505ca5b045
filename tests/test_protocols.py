"""GQA, ScienceQA, MME and MMBench: parser vectors, aggregation, refusals; imports of them all."""

from __future__ import annotations

import ast
import json
import random
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from vistoken.errors import DataError, MethodError
from vistoken.eval import gqa, mmbench, mme, scienceqa, stats

CHOICES = {"A": "dog", "B": "cat", "C": "bird", "D": "fish"}


# GQA


@pytest.mark.parametrize(
    ("prediction", "official", "lmms_eval"),
    [
        ("Yes.", True, True),
        ("yes", True, True),
        (" yes...", True, False),
        ("yes!", False, True),
        ("no", False, False),
    ],
)
def test_gqa_modes(prediction: str, official: bool, lmms_eval: bool) -> None:
    assert gqa.score([prediction], ["yes"]).accuracy == official
    assert gqa.score([prediction], ["yes"], "lmms-eval").accuracy == lmms_eval


def test_gqa_punctuation() -> None:
    assert gqa.score(["tshirt"], ["t-shirt"]).accuracy == 0
    assert gqa.score(["tshirt"], ["t-shirt"], "lmms-eval").accuracy == 1


def test_gqa_counts_and_types() -> None:
    result = gqa.score(["Red.", "", "."], ["red", "x", "y"], types=["color", "obj", "obj"])
    assert result.accuracy == pytest.approx(1 / 3)
    assert (result.empty, result.unparsed, result.parsed) == (1, 2, 1)
    assert result.by_type == {"color": 1, "obj": 0}
    with pytest.raises(MethodError, match="'llava'; allowed: official, lmms-eval"):
        gqa.score(["x"], ["x"], "llava")
    with pytest.raises(DataError, match="one entry per item, got 'yes'"):
        gqa.score("yes", "yes")


# ScienceQA


@pytest.mark.parametrize(
    ("answer", "llava", "lmms_eval"),
    [
        ("B", "B", "B"),
        ("b", None, "B"),
        ("B.", None, "B"),
        ("B. y", "B", "B"),
        (" B ", "B", "B"),
        ("B) y", None, None),
        ("The answer is B.", "B", None),
        ("The answer is B", None, None),
        ("x. The answer is C.", "C", None),
        ("The answer is B. The answer is B.", None, None),
        ("b. y", None, None),
        ("y", None, None),
        ("F", None, None),
        ("", None, None),
    ],
)
def test_scienceqa_parsers(answer: str, llava: str | None, lmms_eval: str | None) -> None:
    assert scienceqa.parse(answer) == llava
    assert scienceqa.parse(answer, "lmms-eval") == lmms_eval


def test_scienceqa_letters_beyond_the_choices_are_unparsed() -> None:
    result = scienceqa.score(["C", "B"], ["A", "B"], choices=[2, 3])
    assert (result.accuracy, result.unparsed, result.rows[0].predicted) == (0.5, 1, None)
    with pytest.raises(DataError, match=r"labels\[0\] is 'C'; allowed: A, B"):
        scienceqa.score(["A"], ["C"], choices=[2])
    with pytest.raises(MethodError, match="choices is 6"):
        scienceqa.parse("A", choices=6)
    with pytest.raises(MethodError, match="mode is 'gpt'"):
        scienceqa.parse("A", "gpt")


def test_scienceqa_reports_the_image_subset() -> None:
    result = scienceqa.score(["A", "A", "A"], ["A", "B", "A"], has_image=[True, True, False])
    assert result.metrics == {
        "accuracy": pytest.approx(2 / 3),
        "accuracy_image": 0.5,
        "accuracy_text": 1,
    }
    assert "accuracy_image" not in scienceqa.score(["A"], ["A"]).metrics


def test_scienceqa_prompt() -> None:
    assert scienceqa.prompt("Which?", ["x", "y"], "Look.") == (
        "Context: Look.\nWhich?\nA. x\nB. y\n"
        "Answer with the option's letter from the given choices directly."
    )


# MME


@pytest.mark.parametrize(
    ("answer", "found"),
    [
        ("Yes, it is", "yes"),
        ("nope", "no"),
        ("not sure", "no"),
        ("no way", "no"),
        ("know", "no"),
        (". yes", "yes"),
        ("y", "yes"),
        ("N.", "no"),
        ("x", "other"),
        ("I think yes", "other"),
        ("It is not", "other"),
        ("maybe", "other"),
        ("", "other"),
    ],
)
def test_mme_parser(answer: str, found: str) -> None:
    assert mme.parse(answer) == found


def test_mme_aggregation_vector() -> None:
    result = mme.score(
        ["yes", "no", "yes", "yes", "yes", "no"],
        ["yes", "no", "yes", "no", "no", "no"],
        ["existence"] * 4 + ["count"] * 2,
        ["a", "a", "b", "b", "a", "a"],
    )
    assert (result.total, result.perception, result.hallucination) == (175, 175, 175)
    assert result.cognition == 0 and result.metrics["existence"] == 125
    assert result.by_category["count"] == {"accuracy": 50, "accuracy_plus": 0, "score": 50}
    json.dumps(result.to_dict())


def test_mme_full_marks_are_2800() -> None:
    columns = [(name, image) for name in mme.SUBTASKS for image in "ab" for _ in range(2)]
    right = ["yes", "no"] * (len(columns) // 2)
    result = mme.score(right, right, [c for c, _ in columns], [i for _, i in columns])
    assert (result.perception, result.cognition, result.hallucination) == (2000, 800, 800)
    assert result.intervals["total"] == stats.Interval(2800, 2800)


def test_mme_missing_partners_and_unknown_names_are_refused() -> None:
    with pytest.raises(DataError, match="two questions about each image: count / 'b' has 1"):
        mme.score(["yes"] * 3, ["yes"] * 3, ["count"] * 3, ["a", "a", "b"])
    with pytest.raises(DataError, match="existence / 'a' has 3, and 1 more images"):
        mme.score(["yes"] * 4, ["yes"] * 4, ["existence"] * 3 + ["OCR"], ["a"] * 4)
    with pytest.raises(DataError, match=r"categories\[0\] is 'ocr'; allowed: existence"):
        mme.score(["yes"] * 2, ["yes"] * 2, ["ocr"] * 2, ["a"] * 2)
    with pytest.raises(DataError, match=r"labels\[1\] is 'other'"):
        mme.score(["yes"] * 2, ["yes", "other"], ["OCR"] * 2, ["a"] * 2)


def test_mme_counts_unparsed() -> None:
    result = mme.score(["perhaps", ""], ["yes", "no"], ["OCR"] * 2, ["a"] * 2)
    assert (result.unparsed, result.empty, result.parsed, result.total) == (2, 1, 0, 0)


# MMBench


@pytest.mark.parametrize(
    ("answer", "letter"),
    [
        ("B.", "B"),
        ("B) cat", "B"),
        ("Answer: B", "B"),
        ("(C)", "C"),
        ("The answer is D", "D"),
        ("a cat", "B"),
        ("A dog is here on grass", "A"),
        ("A bird is here on grass", "C"),
        ("A cat sits here", "B"),
        ("A cat here", "A"),
        ("A thing is here, see :C).", "C"),
        ("A and B", None),
        ("cat or dog", None),
        ("E", "E"),
        ("A", "A"),
        ("", None),
    ],
)
def test_mmbench_inference(answer: str, letter: str | None) -> None:
    assert mmbench.infer(answer, CHOICES) == letter


def circular(answers: list[str], labels: list[str], **options: Any) -> mmbench.MmbenchResult:
    """Two questions with two options and one rotation each."""
    choices = [{"A": "dog", "B": "cat"}, {"A": "cat", "B": "dog"}] * 2
    indices = [7, 1_000_007, 9, 1_000_009]
    return mmbench.score(answers, labels, choices, indices, **options)


def test_mmbench_counts_a_question_only_if_all_rotations_are_right() -> None:
    result = circular(
        ["A", "a dog", "A", "what?"],
        ["A", "B", "A", "B"],
        categories=["color", "", "shape", ""],
        l2_categories=["fine", "", "fine", ""],
    )
    assert (result.accuracy, result.metrics["accuracy_single"]) == (0.5, 0.75)
    assert result.by_category == {"color": 1, "shape": 0} and result.by_l2_category == {"fine": 0.5}
    assert (result.n, result.unparsed, result.empty, result.circular) == (2, 1, 0, True)
    assert result.rows[0].predicted == ("A", "B")


def test_mmbench_row_order_does_not_matter() -> None:
    one = mmbench.score(["A", "B"], ["A", "A"], [CHOICES] * 2, [1, 2], resamples=0)
    two = mmbench.score(["B", "A"], ["A", "A"], [CHOICES] * 2, [2, 1], resamples=0)
    assert one == two and not one.circular and one.accuracy == 0.5


@pytest.mark.parametrize(
    ("indices", "reason"),
    [
        ([1, 1_000_001], "question 1 has 4 options and needs as many rows"),
        ([1, 1_000_002], "index 1000002 is a rotation of question 2, which is missing"),
        ([1, 1], r"indices\[1\] repeats 1"),
    ],
)
def test_mmbench_incomplete_groups_are_refused(indices: list[int], reason: str) -> None:
    with pytest.raises(DataError, match=reason):
        mmbench.score(["A", "B"], ["A", "B"], [CHOICES] * 2, indices)


@pytest.mark.parametrize(
    ("label", "choices", "reason"),
    [
        ("E", CHOICES, "labels.0. is 'E'; allowed: A, B, C, D"),
        ("A", {"A": "x", "C": "y"}, "letters A, B, ... up to E"),
        ("A", {"A": "x", "B": " "}, "text of option B is blank"),
    ],
)
def test_mmbench_bad_rows_are_refused(label: str, choices: dict[str, str], reason: str) -> None:
    with pytest.raises(DataError, match=reason):
        mmbench.score(["A"], [label], [choices], [1])


def test_mmbench_prompt() -> None:
    assert mmbench.prompt("Which?", {"B": "y", "A": "x"}, "Look.") == (
        "Look. Which? There are several options:\nA. x\nB. y\n\n"
        "Answer with the option's letter from the given choices directly."
    )


# All of them


def test_ten_thousand_answers_take_less_than_two_seconds_each() -> None:
    rng = random.Random(0)
    count = 10_000
    letters = [rng.choice(["A", "B.", "a cat is here", "?"]) for _ in range(count)]
    yes_no = [rng.choice(["Yes", "no.", "perhaps"]) for _ in range(count)]
    runs = {
        "gqa": lambda: gqa.score(letters, ["a"] * count),
        "scienceqa": lambda: scienceqa.score(letters, ["A"] * count),
        "mmbench": lambda: mmbench.score(letters, ["A"] * count, [CHOICES] * count, range(count)),
        "mme": lambda: mme.score(
            yes_no,
            ["yes"] * count,
            [mme.SUBTASKS[i // 2 % 14] for i in range(count)],
            [i // 2 for i in range(count)],
        ),
    }
    for name, run in runs.items():
        start = time.process_time()
        result = run()
        assert time.process_time() - start < 2, name
        assert 0 < result.parsed <= result.n


@pytest.mark.parametrize(
    "module",
    [
        "chair",
        "chair_lexicon",
        "gqa",
        "mmbench",
        "mme",
        "pope",
        "pope_questions",
        "records",
        "scienceqa",
        "stats",
    ]
    + ["vqa"],
)
def test_modules_import_only_the_standard_library_at_the_top(module: str) -> None:
    path = Path(gqa.__file__).with_name(f"{module}.py")
    names: set[str] = set()
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module.split(".")[0])
    assert names <= set(sys.stdlib_module_names) | {"vistoken"}
