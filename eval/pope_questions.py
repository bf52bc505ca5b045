"""The questions of POPE: building them from annotated images, reading the released files."""

from __future__ import annotations

import os
import random
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from vistoken.errors import DataError, MethodError
from vistoken.eval import records

TEMPLATE = "Is there a {} in the image?"
STRATEGIES = ("random", "popular", "adversarial")
LABELS = ("yes", "no")
_MISSPELLED = "imange"
_VOWELS = tuple("aeiou")


@dataclass(frozen=True, slots=True)
class Question:
    """One question; `label` is `yes` or `no`, `object` what is asked for (None if unknown)."""

    id: records.Id
    image: str
    text: str
    label: str
    object: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return the question with the keys of the released files."""
        return {
            "question_id": self.id,
            "image": self.image,
            "text": self.text,
            "label": self.label,
        }


@dataclass(frozen=True, slots=True)
class Revision:
    """Which released file a set of questions looks like; report it beside every score."""

    name: str
    rows: int
    yes: int
    no: int
    misspelled: int


def build(
    images: Iterable[Mapping[str, Any]],
    strategy: str = "random",
    *,
    per_image: int = 3,
    num_images: int | None = 500,
    seed: int = 0,
    template: str = TEMPLATE,
    fix_article: bool = True,
) -> list[Question]:
    """Build questions from images of the form `{"image": name, "objects": [name, ...]}`.

    Images with fewer than `per_image` objects are left out; of the others `num_images` are drawn
    (all if there are fewer or it is None), kept in the order given. Each is asked for its first
    `per_image` objects in turn, and after each for one object that it lacks and was not asked for:
    a uniformly drawn one (`random`), the one in most images (`popular`), or the one most often
    seen together with the object just asked for (`adversarial`, `random` if there is none). Ties
    go to the object seen first. Positive questions are the same for all strategies.

    `fix_article=False` repeats a slip of the official builder: before a vowel it turns every "a"
    of the template into "an", so the question ends in "imange". Raises MethodError for a bad
    option, DataError for bad or too few images.
    """
    if strategy not in STRATEGIES:
        raise MethodError(f"strategy is {strategy!r}; allowed: {', '.join(STRATEGIES)}")
    if per_image < 1 or "{}" not in template:
        raise MethodError("per_image must be at least 1 and template must hold {} for the object")
    rng = random.Random(seed)
    chosen = _choose_images(images, per_image, num_images, rng)
    frequency = Counter(name for _, objects in chosen for name in objects)
    popular = [name for name, _ in frequency.most_common()]
    together = _neighbors(chosen) if strategy == "adversarial" else {}
    questions: list[Question] = []
    for image, objects in chosen:
        barred = set(objects)
        for name in objects[:per_image]:
            ranked = {"random": [], "popular": popular, "adversarial": together.get(name, [])}
            absent = _negative(image, ranked[strategy], list(frequency), barred, rng)
            barred.add(absent)
            for asked, label in ((name, "yes"), (absent, "no")):
                text = _question_text(template, asked, fix_article)
                questions.append(Question(len(questions) + 1, image, text, label, asked))
    return questions


def load(path: str | os.PathLike[str]) -> list[Question]:
    """Read questions from a JSONL file or JSON array, one question or one image per record.

    Records of PAI's chat form hold lists of texts and labels; their ids become `chat_id/position`.
    Raises DataError with file and line for malformed records, unknown labels and duplicate ids.
    """
    found: dict[records.Id, str] = {}
    questions: list[Question] = []
    for record in records.read(path):
        for question in _questions_of(record):
            if question.id in found:
                raise DataError(
                    f"{record.place}: question {question.id!r} occurs twice, "
                    f"first at {found[question.id]}"
                )
            found[question.id] = record.place
            questions.append(question)
    return questions


def revision(questions: Sequence[Question]) -> Revision:
    """Tell which released revision the questions look like, from row count and misspelled rows."""
    rows = len(questions)
    labels = Counter(question.label for question in questions)
    misspelled = sum(_MISSPELLED in question.text for question in questions)
    if rows == 2910:
        name = "early, shortened random split"
    else:
        name = _REVISIONS.get((rows, misspelled), "not a released file")
    return Revision(name, rows, labels["yes"], labels["no"], misspelled)


_REVISIONS = {
    (3000, 0): "head",
    (3000, 44): "early, popular split",
    (3000, 58): "early, adversarial split",
    (3000, 57): "copy in the VCD repository, adversarial split",
}


def _choose_images(
    images: Iterable[Mapping[str, Any]], per_image: int, num_images: int | None, rng: random.Random
) -> list[tuple[str, list[str]]]:
    known: dict[str, list[str]] = {}
    for position, entry in enumerate(images):
        if not {"image", "objects"} <= entry.keys():
            raise DataError(f"images[{position}] needs the keys image and objects, got {entry!r}")
        name, objects = entry["image"], list(entry["objects"])
        if name in known:
            raise DataError(f"images[{position}]: the image {name!r} occurs twice")
        if len(set(objects)) != len(objects):
            raise DataError(f"images[{position}]: {name!r} lists an object twice: {objects}")
        known[name] = objects
    eligible = [(name, objects) for name, objects in known.items() if len(objects) >= per_image]
    if not eligible:
        raise DataError(f"no image has at least {per_image} objects; lower per_image")
    if num_images is None or len(eligible) <= num_images:
        return eligible
    return [eligible[i] for i in sorted(rng.sample(range(len(eligible)), num_images))]


def _neighbors(chosen: Sequence[tuple[str, list[str]]]) -> dict[str, list[str]]:
    """Return for each object the others seen with it, most frequent first."""
    counts: dict[str, Counter[str]] = {}
    for _, objects in chosen:
        for name in objects:
            counts.setdefault(name, Counter()).update(o for o in objects if o != name)
    return {name: [other for other, _ in seen.most_common()] for name, seen in counts.items()}


def _negative(
    image: str, ranked: Sequence[str], names: Sequence[str], barred: set[str], rng: random.Random
) -> str:
    for name in ranked:
        if name not in barred:
            return name
    candidates = [name for name in names if name not in barred]
    if not candidates:
        raise DataError(
            f"every object of the chosen images is in {image!r} or was asked for already: "
            "lower per_image or add images"
        )
    return rng.choice(candidates)


def _question_text(template: str, name: str, fix_article: bool) -> str:
    if name.startswith(_VOWELS):
        slipped = template.replace("a", "an")
        template = template.replace("a {}", "an {}") if fix_article else slipped
    return template.replace("{}", name)


def _questions_of(record: records.Record) -> list[Question]:
    image = record.text("image")
    texts, labels = record.field("text"), record.field("label")
    if not isinstance(texts, list):
        label = record.choice("label", LABELS)
        return [Question(record.identity("question_id"), image, record.text("text"), label)]
    chat = record.identity("chat_id")
    if not isinstance(labels, list) or len(labels) != len(texts):
        raise DataError(f"{record.place}: text and label must be lists of one length")
    parts = [
        records.Record({"text": text, "label": label}, f"{record.place} (question {i})")
        for i, (text, label) in enumerate(zip(texts, labels, strict=True))
    ]
    return [
        Question(f"{chat}/{i}", image, part.text("text"), part.choice("label", LABELS))
        for i, part in enumerate(parts)
    ]
