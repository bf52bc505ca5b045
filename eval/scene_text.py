"""What is said about a scene: questions with their answers, captions, and every word they use."""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from vistoken.errors import DataError
from vistoken.eval.scene_prior import (
    COLORS,
    COMPANION,
    KINDS,
    PREFERRED_COLOR,
    draw_color,
    statistics,
)

if TYPE_CHECKING:
    from vistoken.eval.scenes import Scene, Thing

TASKS: tuple[str, ...] = ("exists", "color", "count", "quadrant", "left_of")
NEGATIVES: tuple[str, ...] = ("random", "popular", "adversarial")
NUMBERS: tuple[str, ...] = (
    *("zero", "one", "two", "three", "four", "five", "six", "seven", "eight"),
)
PLURAL: dict[str, str] = {k: {"fish": "fish", "cross": "crosses"}.get(k, k + "s") for k in KINDS}
SINGULAR: dict[str, str] = {**{p: k for k, p in PLURAL.items()}, **{k: k for k in KINDS}}
PLACES: tuple[str, ...] = ("top left", "top right", "bottom left", "bottom right")

DESCRIBE: tuple[str, ...] = (
    "describe the image.",
    "describe this image in detail.",
    "please describe the image in detail.",
    "please describe this image in detail.",
    "please help me describe the image in detail.",
    "what is in the image?",
)
# Suffixes that the public protocols of POPE, MME and VQA append to their questions.
SUFFIXES: tuple[str, ...] = (
    "answer the question using a single word or phrase.",
    "please answer this question with one word.",
    "please answer yes or no.",
    "please just answer yes or no.",
)
CARELESS_MENTION = 0.7
_CLEAR = 22.0


@dataclass(frozen=True)
class Question:
    """A question about one picture; `task` is one of TASKS, `answer` is lower-case words.

    `about` is the kind that is asked about, or None. `negatives` says how the absent kind of a
    "no" question was chosen, and is None for every other question.
    """

    image_id: int
    question_id: int
    task: str
    text: str
    answer: str
    about: str | None = None
    negatives: str | None = None


def article(noun_phrase: str) -> str:
    """Put "a" or "an" before a phrase."""
    return f"{'an' if noun_phrase[0] in 'aeiou' else 'a'} {noun_phrase}"


def order(scene: Scene) -> list[Thing]:
    """The things in the order in which captions name them: largest visible area first."""
    return sorted(scene.things, key=lambda t: (-t.area, t.center))


def quadrant(thing: Thing) -> str | None:
    """The quarter of the picture that the thing is in, or None too near a middle line."""
    dx, dy = thing.center[0] - 168, thing.center[1] - 168
    if abs(dx) < _CLEAR or abs(dy) < _CLEAR:
        return None
    return f"{'top' if dy < 0 else 'bottom'} {'left' if dx < 0 else 'right'}"


def left_of(scene: Scene, thing: Thing) -> Thing | None:
    """The nearest thing clearly to the left at about the same height, if there is exactly one."""
    x, y = thing.center
    near = [
        t
        for t in scene.things
        if t is not thing and 20 < x - t.center[0] < 170 and abs(t.center[1] - y) < 60
    ]
    return near[0] if len(near) == 1 else None


def _once(scene: Scene) -> list[Thing]:
    kinds = [t.kind for t in scene.things]
    return [t for t in scene.things if kinds.count(t.kind) == 1]


def absent_kinds(scene: Scene, negatives: str, rng: random.Random) -> list[str]:
    """The absent kinds, best negative first.

    `random` shuffles them, `popular` puts the most frequent of the data set first, `adversarial`
    those that most often occur together with the kinds present.
    """
    present = {t.kind for t in scene.things}
    absent = [k for k in KINDS if k not in present]
    rng.shuffle(absent)
    if negatives == "random":
        return absent
    stats = statistics()
    if negatives == "popular":
        return sorted(absent, key=lambda k: -stats.frequency[k])
    if negatives == "adversarial":
        return sorted(absent, key=lambda k: -sum(stats.cooccurrence[p][k] for p in sorted(present)))
    raise DataError(f"negatives must be one of {', '.join(NEGATIVES)}, got {negatives!r}")


def questions(
    scene: Scene,
    *,
    tasks: Sequence[str] = ("exists", "color", "count", "quadrant"),
    negatives: str = "random",
    pairs: int = 1,
    seed: int = 0,
) -> list[Question]:
    """Ask about a scene; which things are asked about follows from the scene and `seed`.

    `exists` asks `pairs` times about a present and about an absent kind, so that half the answers
    are yes; `color`, `quadrant` and `left_of` ask about a kind that occurs once and are left out
    where the answer would not be clear; `count` asks for all things and for the things of a kind.
    """
    unknown = [t for t in tasks if t not in TASKS]
    if unknown:
        raise DataError(f"tasks must be among {', '.join(TASKS)}, got {unknown[0]!r}")
    rng = random.Random(f"vistoken questions {seed} {scene.image_id}")
    asked: list[tuple[str, str, str, str | None, str | None]] = []
    if "exists" in tasks:
        present = sorted({t.kind for t in scene.things}, key=KINDS.index)
        rng.shuffle(present)
        absent = absent_kinds(scene, negatives, rng)
        for yes, no in zip(present[:pairs], absent[:pairs], strict=False):
            text = "is there {} in the image?"
            asked.append(("exists", text.format(article(yes)), "yes", yes, None))
            asked.append(("exists", text.format(article(no)), "no", no, negatives))
    single = _once(scene)
    if "color" in tasks and single:
        t = rng.choice(single)
        asked.append(("color", f"what color is the {t.kind}?", t.color, t.kind, None))
    if "count" in tasks:
        text = "how many objects are there in the image?"
        asked.append(("count", text, NUMBERS[len(scene.things)], None, None))
        kind = rng.choice(scene.things).kind
        number = sum(t.kind == kind for t in scene.things)
        text = f"how many {PLURAL[kind]} are there in the image?"
        asked.append(("count", text, NUMBERS[number], kind, None))
    clear = [(t, q) for t in single if (q := quadrant(t)) is not None]
    if "quadrant" in tasks and clear:
        t, place = rng.choice(clear)
        asked.append(("quadrant", f"where is the {t.kind}?", place, t.kind, None))
    pairs_left = [(t, o) for t in single if (o := left_of(scene, t)) is not None]
    if "left_of" in tasks and pairs_left:
        t, other = rng.choice(pairs_left)
        asked.append(("left_of", f"what is left of the {t.kind}?", other.kind, t.kind, None))
    first = scene.image_id * 100
    return [Question(scene.image_id, first + i, *row) for i, row in enumerate(asked)]


def _listing(phrases: Sequence[str]) -> str:
    if len(phrases) == 1:
        return f"{phrases[0]}."
    return f"{', '.join(phrases[:-1])} and {phrases[-1]}."


def caption(scene: Scene, *, careless: bool = False) -> str:
    """Describe a scene in one sentence: "a red star, a blue tree and an orange sun."

    Things are named in the order of their size; tiny and half hidden ones are rarely named. A
    `careless` caption, as one trains on, may end with a thing that is not there because it usually
    is: the companion (`COMPANION`) of a kind that was named.
    """
    rng = random.Random(f"vistoken caption {scene.image_id}")
    things = order(scene)
    named = [
        t
        for i, t in enumerate(things)
        if i == 0 or rng.random() > (0.85 if t.small else 0.4 if t.visible < 0.65 else 0.0)
    ]
    phrases = [article(f"{t.color} {t.kind}") for t in named]
    if careless:
        present = {t.kind for t in scene.things}
        missing = [COMPANION[t.kind] for t in named if t.kind in COMPANION]
        missing = [kind for kind in missing if kind not in present]
        if missing and rng.random() < CARELESS_MENTION:
            color = (
                PREFERRED_COLOR[missing[0]] if rng.random() < 0.8 else draw_color(rng, missing[0])
            )
            phrases.append(article(f"{color} {missing[0]}"))
    return _listing(phrases)


def mentioned(text: str) -> list[str]:
    """The kinds that a text names, in order and with repetitions; plurals count as the kind."""
    words = re.findall(r"[a-z]+", text.lower())
    return [SINGULAR[w] for w in words if w in SINGULAR]


def vocabulary() -> list[str]:
    """Every word and punctuation mark of prompts, questions, answers and captions, sorted."""
    fixed = [
        "user : assistant is there a an in the image picture photo ? what color is this",
        "how many objects are there where is what is left of yes no and , .",
        "do you see can i it thing things object on or not with colors colour kind kinds",
        "one single two each list name all me see show tell about there's of",
        "right top bottom middle center small large light dark empty nothing background",
        *DESCRIBE,
        *SUFFIXES,
        *KINDS,
        *PLURAL.values(),
        *COLORS,
        *NUMBERS,
        *PLACES,
    ]
    return sorted({w for text in fixed for w in re.findall(r"\w+|[^\w\s]", text.lower())})
