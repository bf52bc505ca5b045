"""POPE: parser vectors, hand-derived questions, scores, released file forms."""

from __future__ import annotations

import json
import random
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vistoken.errors import DataError, MethodError
from vistoken.eval import pope

# answer: official, vcd under label yes / no, pai, lmms-eval; taken by running each project's code.
VECTORS: dict[str, tuple[str, str, str, str, str | None]] = {
    "yes.": ("yes", "yes", "yes", "yes", None),
    "No.": ("no", "no", "no", "no", None),
    "NO": ("yes", "no", "no", "no", "no"),
    "No!": ("yes", "no", "no", "yes", None),
    "No\n": ("yes", "no", "no", "yes", "no"),
    "No, there is no dog.": ("no", "no", "no", "no", None),
    "There isn't a dog.": ("yes", "no", "yes", "no", None),
    "There is a dog. No cat though.": ("yes", "no", "no", "no", None),
    "Yes, but not a dog": ("no", "yes", "no", "no", None),
    "I do not know": ("no", "no", "no", "no", None),
    "Unknown": ("yes", "no", "no", "yes", None),
    "There is nothing": ("yes", "no", "no", "yes", None),
    "It is now visible": ("yes", "no", "no", "yes", None),
    "": ("yes", "no", "yes", "yes", None),
}
FIRST_WORD: dict[str, str | None] = {
    "yes.": "yes",
    "NO": "no",
    "No!": "no",
    "No\n": "no",
    "**No**, it is not": "no",
    "_yes_": "yes",
    "(Yes)": "yes",
    "No--there is none": "no",
    "There is a dog. No cat though.": "no",
    "Yes, but not a dog": "yes",
    "I would say no, not yes": "no",
    "There isn't a dog.": None,
    "I do not know": None,
    "Unknown": None,
    "There is nothing": None,
    "It is now visible": None,
    "eyes": None,
    "yes2": None,
    "a no-one": None,
    "a yes-no question": None,
    "": None,
}

TOY = [
    {"image": "1", "objects": ["dog", "cat", "car"]},
    {"image": "2", "objects": ["cat", "dog", "apple", "bus"]},
    {"image": "3", "objects": ["apple", "person", "cat"]},
    {"image": "4", "objects": ["bus"]},
]


@pytest.mark.parametrize("answer", VECTORS)
def test_parsers_reproduce_each_project(answer: str) -> None:
    official, vcd_yes, vcd_no, pai, lmms_eval = VECTORS[answer]
    assert pope.parse(answer, "official") == official
    assert pope.parse(answer, "vcd", label="yes") == vcd_yes
    assert pope.parse(answer, "vcd", label="no") == vcd_no
    assert pope.parse(answer, "pai") == pai
    assert pope.parse(answer, "lmms-eval") == lmms_eval


@pytest.mark.parametrize("answer", FIRST_WORD)
def test_first_word_takes_standalone_words_only(answer: str) -> None:
    assert pope.parse(answer) == FIRST_WORD[answer]


@given(before=st.text("xyno ,.'-", max_size=6), word=st.sampled_from(["yes", "no", "Yes", "NO"]))
def test_first_word_against_a_word_list(before: str, word: str) -> None:
    answer = f"{before} {word}"
    words = "".join(c if c.isalpha() or c in "'-" else " " for c in answer).split()
    plain = [w.strip("'-").lower() for w in words]
    assert pope.parse(answer) == next(w for w in plain if w in ("yes", "no"))


def test_unknown_parsers_and_vcd_without_label_are_refused() -> None:
    with pytest.raises(MethodError, match="parser is 'llava'; allowed: first-word, official"):
        pope.parse("yes", "llava")
    with pytest.raises(MethodError, match="'vcd' needs label"):
        pope.parse("yes", "vcd")


def asked(strategy: str, **options: Any) -> list[tuple[str, str, str]]:
    questions = pope.build(TOY, strategy, per_image=2, num_images=None, **options)
    assert [q.id for q in questions] == list(range(1, 13))
    assert [q.label for q in questions] == ["yes", "no"] * 6
    return [(q.image, q.object or "", q.label) for q in questions]


def negatives(strategy: str, **options: Any) -> list[str]:
    return [name for _, name, label in asked(strategy, **options) if label == "no"]


def test_popular_questions_are_the_hand_derived_ones() -> None:
    # Images per object: cat 3, dog 2, apple 2, car 1, bus 1, person 1; ties as first seen.
    assert asked("popular") == [
        ("1", "dog", "yes"),
        ("1", "apple", "no"),
        ("1", "cat", "yes"),
        ("1", "bus", "no"),
        ("2", "cat", "yes"),
        ("2", "car", "no"),
        ("2", "dog", "yes"),
        ("2", "person", "no"),
        ("3", "apple", "yes"),
        ("3", "dog", "no"),
        ("3", "person", "yes"),
        ("3", "car", "no"),
    ]


def test_adversarial_questions_are_the_hand_derived_ones() -> None:
    # dog: cat 2, car, apple, bus; cat: dog 2, apple 2, car, bus, person; apple: cat 2, dog, ...
    # In image 2 dog has only `person` left, in image 3 person has none: drawn from the others.
    assert negatives("adversarial")[:5] == ["apple", "bus", "car", "person", "dog"]
    drawn = {negatives("adversarial", seed=seed)[5] for seed in range(40)}
    assert drawn == {"car", "bus"}


def test_random_questions_are_uniform_over_absent_objects() -> None:
    first = Counter(negatives("random", seed=seed)[0] for seed in range(900))
    assert first.keys() == {"apple", "bus", "person"}
    assert all(240 < count < 360 for count in first.values())


def test_strategies_share_positives_and_seeds_repeat() -> None:
    rng = random.Random(0)
    names = [f"thing{i}" for i in range(20)]
    images = [{"image": str(i), "objects": rng.sample(names, 4)} for i in range(40)]
    built = {s: pope.build(images, s, num_images=10, seed=5) for s in pope.STRATEGIES}
    positives = {s: [q for q in qs if q.label == "yes"] for s, qs in built.items()}
    assert positives["random"] == positives["popular"] == positives["adversarial"]
    assert built["random"] == pope.build(images, "random", num_images=10, seed=5)
    assert built["random"] != pope.build(images, "random", num_images=10, seed=6)
    present = {image["image"]: set(image["objects"]) for image in images}
    for questions in built.values():
        pairs = [(q.image, q.object) for q in questions]
        assert len(set(pairs)) == len(pairs) == 60
        assert all((q.object in present[q.image]) == (q.label == "yes") for q in questions)


def test_articles() -> None:
    fixed = {q.object: q.text for q in pope.build(TOY, "popular", per_image=2)}
    assert fixed["apple"] == "Is there an apple in the image?"
    assert fixed["dog"] == "Is there a dog in the image?"
    slipped = {q.object: q.text for q in pope.build(TOY, per_image=2, fix_article=False)}
    assert slipped["apple"] == "Is there an apple in the imange?"
    assert slipped["dog"] == "Is there a dog in the image?"


@pytest.mark.parametrize(
    ("images", "options", "reason"),
    [
        (TOY, {"strategy": "rare"}, "allowed: random, popular, adversarial"),
        (TOY, {"per_image": 0}, "at least 1"),
        (TOY, {"template": "Is it there?"}, "must hold {}"),
        (TOY, {"per_image": 9}, "no image has at least 9 objects"),
        (TOY, {"per_image": 3}, "'2' or was asked for already"),
        ([*TOY, TOY[0]], {}, r"images\[4\]: the image '1' occurs twice"),
        ([{"image": "1", "objects": ["a", "a"]}], {}, "lists an object twice"),
        ([{"image": "1"}], {}, "needs the keys image and objects"),
    ],
)
def test_bad_builds_are_refused(images: Any, options: dict[str, Any], reason: str) -> None:
    with pytest.raises((DataError, MethodError), match=reason):
        pope.build(images, **{"per_image": 2, **options})


def test_all_yes_and_all_no() -> None:
    labels = ["yes", "no"] * 30
    yes = pope.score(["yes"] * 60, labels)
    assert yes.metrics == {
        "accuracy": 0.5,
        "precision": 0.5,
        "recall": 1,
        "f1": pytest.approx(2 / 3),
        "yes_ratio": 1,
    }
    no = pope.score(["no"] * 60, labels)
    assert no.metrics == {"accuracy": 0.5, "precision": 0, "recall": 0, "f1": 0, "yes_ratio": 0}


@given(
    rows=st.lists(
        st.tuples(st.sampled_from(["Yes.", "no", "maybe", ""]), st.sampled_from(["yes", "no"])),
        min_size=1,
    )
)
def test_scores_against_plain_counting(rows: list[tuple[str, str]]) -> None:
    answers, labels = [a for a, _ in rows], [b for _, b in rows]
    result = pope.score(answers, labels, resamples=0)
    found = [{"Yes.": "yes", "no": "no"}.get(a) for a in answers]
    right = sum(a == b for a, b in zip(found, labels, strict=True))
    both = sum(a == b == "yes" for a, b in zip(found, labels, strict=True))
    said, true = found.count("yes"), labels.count("yes")
    precision, recall = both / said if said else 0, both / true if true else 0
    assert result.accuracy == pytest.approx(right / len(rows))
    assert result.precision == pytest.approx(precision)
    assert result.recall == pytest.approx(recall)
    mean = (precision + recall) / 2
    assert result.f1 == pytest.approx(precision * recall / mean if mean else 0)
    assert result.yes_ratio == pytest.approx(said / len(rows))
    assert (result.unparsed, result.empty) == (found.count(None), answers.count(""))
    assert result.parsed + result.unparsed == result.n == len(rows)


def test_nothing_parsed_is_a_score_of_zero_that_says_so() -> None:
    result = pope.score(["maybe", ""], ["yes", "no"])
    assert (result.accuracy, result.parsed, result.unparsed, result.empty) == (0, 0, 2, 1)


def test_lmms_eval_metrics_keep_its_defects() -> None:
    result = pope.score(["Yes", "yes.", "no", "yes"], ["yes", "yes", "yes", "no"], "lmms-eval")
    assert result.recall == pytest.approx(1 / 3) and result.yes_ratio == 0.5
    theirs = pope.lmms_eval_metrics(result)
    assert theirs["recall"] == 0.5 and theirs["yes_ratio"] == 0.75
    assert theirs["precision"] == theirs["f1"] == 0.5


def test_combine_gives_mean_and_pooled() -> None:
    one = pope.score(["yes", "yes"], ["yes", "no"], images=["a", "b"])
    two = pope.score(["no", "no"], ["yes", "no"], images=["a", "b"])
    both = pope.combine({"random": one, "popular": two})
    assert both.mean["f1"] == pytest.approx(1 / 3)
    assert both.pooled.f1 == pytest.approx(2 / (2 + 1 + 1))
    assert both.pooled.n == 4
    with pytest.raises(DataError, match="share one parser"):
        pope.combine({"a": one, "b": pope.score(["no"], ["no"], "pai")})


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ((["yes"], ["maybe"]), r"labels\[0\] is 'maybe'; allowed: yes, no"),
        ((["yes", "no"], ["yes"]), "answers 2, labels 1"),
        (([], []), "no items"),
        (([None], ["yes"]), r"answers\[0\] must be text, got None"),
    ],
)
def test_bad_columns_are_refused(arguments: Any, reason: str) -> None:
    with pytest.raises(DataError, match=reason):
        pope.score(*arguments)
    with pytest.raises(DataError, match=r"ids\[1\] repeats 7"):
        pope.score(["yes", "no"], ["yes", "no"], ids=[7, 7])


def test_released_forms_are_read(tmp_path: Path) -> None:
    rows = [q.to_dict() for q in pope.build(TOY, per_image=2)]
    lines, array = tmp_path / "coco.json", tmp_path / "seem.json"
    lines.write_text("".join(json.dumps(row) + "\n" for row in rows))
    array.write_text(json.dumps(rows, indent=4))
    assert pope.load(lines) == pope.load(array)
    assert [q.to_dict() for q in pope.load(lines)] == rows
    chat = tmp_path / "chat.json"
    chat.write_text('{"text": ["a?", "b?"], "label": ["yes", "no"], "chat_id": 4, "image": "x"}\n')
    assert pope.load(chat) == [
        pope.Question("4/0", "x", "a?", "yes"),
        pope.Question("4/1", "x", "b?", "no"),
    ]


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ('{"question_id": 1, "image": "x", "text": "a?", "label": "no"}', "1 occurs twice"),
        ('{"question_id": 2, "image": "x", "text": "a?", "label": "nope"}', "is 'nope'"),
        ('{"question_id": 2, "text": "a?", "label": "no"}', "'image' is missing"),
        ('{"chat_id": 2, "image": "x", "text": ["a?"], "label": []}', "lists of one length"),
        ('{"chat_id": 2, "image": "x", "text": ["a?"], "label": ["?"]}', "is '[?]'; allowed"),
        ('{"question_id": 2, "image"', "not JSON"),
    ],
)
def test_bad_files_are_refused_with_line(tmp_path: Path, line: str, reason: str) -> None:
    path = tmp_path / "pope.jsonl"
    path.write_text('{"question_id": 1, "image": "x", "text": "a?", "label": "yes"}\n' + line)
    with pytest.raises(DataError, match=reason) as caught:
        pope.load(path)
    assert str(caught.value).startswith(f"{path}:2")


@pytest.mark.parametrize(
    ("rows", "misspelled", "name"),
    [
        (2910, 144, "early, shortened random split"),
        (3000, 0, "head"),
        (3000, 57, "copy in the VCD repository, adversarial split"),
        (3000, 3, "not a released file"),
        (60, 0, "not a released file"),
    ],
)
def test_revisions_are_told_apart(rows: int, misspelled: int, name: str) -> None:
    questions = [
        pope.Question(i, "x", "an eel in the imange?" if i < misspelled else "a?", "yes")
        for i in range(rows)
    ]
    assert pope.revision(questions) == pope.Revision(name, rows, rows, 0, misspelled)
    result = pope.score(["yes"] * rows, [q.label for q in questions], resamples=0)
    assert result.n == rows


def test_ten_thousand_answers_take_less_than_two_seconds() -> None:
    rng = random.Random(0)
    answers = [rng.choice(["Yes, there is.", "No", "There isn't one."]) for _ in range(10_000)]
    labels = [rng.choice(["yes", "no"]) for _ in answers]
    images = [i // 6 for i in range(10_000)]
    start = time.process_time()
    result = pope.score(answers, labels, images=images)
    assert time.process_time() - start < 2
    assert result.intervals["accuracy"].low < result.accuracy < result.intervals["accuracy"].high


def test_result_is_ready_for_json() -> None:
    plain = json.loads(json.dumps(pope.score(["yes", "no"], ["yes", "yes"]).to_dict()))
    assert plain["protocol"] == "pope" and plain["parser"] == "first-word"
    assert plain["metrics"]["recall"] == 0.5 and plain["counts"]["fn"] == 1
    assert [row["correct"] for row in plain["rows"]] == [True, False]
