"""Scenes: an endless, deterministic data set of small pictures with exact truth.

Each scene is a 336 x 336 RGB picture of 2 to 8 colored things on a textured background, with
questions, captions, COCO-style annotations and the patches that things own. A scene is a function
of (seed, split, index) alone, the same on every machine and in every process; the splits draw from
different streams, so they never share a scene. Co-occurrence is deliberately not uniform: see
`vistoken.eval.scene_prior`.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from vistoken.errors import DataError
from vistoken.eval.scene_prior import COLORS, KINDS, draw_color, draw_count, draw_kinds
from vistoken.eval.scene_shapes import SIZE, add_grain, paint_background, paint_thing, stamp
from vistoken.eval.scene_text import (
    NEGATIVES,
    TASKS,
    Question,
    caption,
    left_of,
    mentioned,
    order,
    quadrant,
    questions,
    vocabulary,
)

__all__ = [
    "COLORS",
    "KINDS",
    "NEGATIVES",
    "SIZE",
    "SPLITS",
    "TASKS",
    "Question",
    "Scene",
    "Thing",
    "caption",
    "coco_annotations",
    "draw",
    "left_of",
    "make_scene",
    "make_scenes",
    "mentioned",
    "object_mask",
    "order",
    "owner_grid",
    "quadrant",
    "questions",
    "truth",
    "vocabulary",
]

SPLITS: tuple[str, ...] = ("train", "val", "test")
SMALL_RADIUS = 13.0
_LEAST_VISIBLE = 0.4


@dataclass(frozen=True)
class Thing:
    """One thing of a scene.

    `box` is (left, top, width, height) in pixels of the part that can be seen, `visible` the share
    of its area that nothing hides, `area` the visible area in pixels, `opacity` 1 for full contrast
    and less where it fades into the background. Angles are degrees, lengths pixels.
    """

    kind: str
    color: str
    center: tuple[float, float]
    radius: float
    angle: float
    opacity: float
    box: tuple[int, int, int, int]
    visible: float
    area: int

    @property
    def small(self) -> bool:
        """Whether the thing is tiny: captions rarely mention it."""
        return self.radius <= SMALL_RADIUS


@dataclass(frozen=True)
class Scene:
    """A scene: things from back to front; `hard` ones hold more, smaller and fainter things."""

    image_id: int
    split: str
    seed: int
    index: int
    hard: bool
    things: tuple[Thing, ...]


@dataclass(frozen=True)
class _Sketch:
    """A thing before it is known how much of it can be seen."""

    kind: str
    color: str
    center: tuple[float, float]
    radius: float
    angle: float
    opacity: float


def make_scene(index: int, split: str = "test", seed: int = 0) -> Scene:
    """Make scene number `index` of a split.

    Raises DataError for a split that does not exist and for an index outside [0, 10 million).
    """
    if split not in SPLITS:
        raise DataError(f"split must be one of {', '.join(SPLITS)}, got {split!r}")
    if not 0 <= index < 10_000_000:
        raise DataError(f"index must lie in [0, 10000000), got {index}")
    rng = random.Random(f"vistoken scene {seed} {split} {index}")
    count, hard = draw_count(rng)
    sketches: list[_Sketch] = []
    for kind in draw_kinds(rng, count):
        sketches = _add(rng, sketches, kind, hard)
    things = tuple(_measure(sketches))
    image_id = (seed * len(SPLITS) + SPLITS.index(split)) * 10_000_000 + index
    return Scene(image_id, split, seed, index, hard, things)


def make_scenes(count: int, split: str = "test", seed: int = 0, *, start: int = 0) -> list[Scene]:
    """Make scenes number `start` to `start + count - 1` of a split."""
    return [make_scene(i, split, seed) for i in range(start, start + count)]


def _add(rng: random.Random, sketches: list[_Sketch], kind: str, hard: bool) -> list[_Sketch]:
    """Put one more thing where it is free, or, for a few, where it partly hides another."""
    tiny = rng.random() < (0.28 if hard else 0.15)
    radius = (
        rng.uniform(7.5, SMALL_RADIUS) if tiny else 13 + 41 * rng.random() ** (2 if hard else 1.3)
    )
    faint = rng.random() < (0.22 if hard else 0.12)
    opacity = rng.uniform(0.28, 0.55) if faint else 1.0
    color, angle = draw_color(rng, kind), rng.uniform(-16, 16)
    if sketches and rng.random() < (0.2 if hard else 0.1):
        below = rng.choice(sketches)
        far = 0.75 * (below.radius + radius)
        turn = rng.choice(((1, 0), (-1, 0), (0, 1), (0, -1)))
        center = (below.center[0] + far * turn[0], below.center[1] + far * turn[1])
        center = (_inside(center[0], radius), _inside(center[1], radius))
        tried = [*sketches, _Sketch(kind, color, center, radius, angle, opacity)]
        if min(thing.visible for thing in _measure(tried)) >= _LEAST_VISIBLE:
            return tried
    for attempt in range(60):
        if attempt % 12 == 11:
            radius = max(7.5, 0.8 * radius)
        center = (rng.uniform(radius, SIZE - radius), rng.uniform(radius, SIZE - radius))
        if all(_apart(center, radius, other) for other in sketches):
            return [*sketches, _Sketch(kind, color, center, radius, angle, opacity)]
    return sketches  # a full picture does without this thing


def _inside(x: float, radius: float) -> float:
    return min(max(x, radius), SIZE - radius)


def _apart(center: tuple[float, float], radius: float, other: _Sketch) -> bool:
    dx, dy = center[0] - other.center[0], center[1] - other.center[1]
    return dx * dx + dy * dy > (0.92 * (radius + other.radius) + 3) ** 2


def _owners(things: Sequence[Thing | _Sketch]) -> NDArray[np.uint8]:
    """Which thing each 2 x 2 block of pixels shows: uint8 [168, 168], 0 none, i + 1 things[i]."""
    target = Image.new("L", (SIZE // 2, SIZE // 2))
    for i, t in enumerate(things):
        stamp(target, t.kind, t.center, t.radius, t.angle, i + 1)
    return np.asarray(target)


def _measure(sketches: Sequence[_Sketch]) -> list[Thing]:
    """Find out of each thing which part of it can be seen."""
    owners = _owners(sketches)
    things = []
    for i, s in enumerate(sketches):
        alone = Image.new("L", (SIZE // 2, SIZE // 2))
        stamp(alone, s.kind, s.center, s.radius, s.angle, 1)
        whole = alone.histogram()[1]
        # Only the neighborhood of the thing needs to be searched.
        reach = s.radius * 1.42 + 2
        x0 = max(0, int((s.center[0] - reach) / 2))
        y0 = max(0, int((s.center[1] - reach) / 2))
        part = owners[
            y0 : int((s.center[1] + reach) / 2) + 1, x0 : int((s.center[0] + reach) / 2) + 1
        ]
        mine = part == i + 1
        rows, columns = np.flatnonzero(mine.any(axis=1)), np.flatnonzero(mine.any(axis=0))
        seen = int(mine.sum())
        box = (0, 0, 0, 0)
        if seen:
            box = (
                2 * (x0 + int(columns[0])),
                2 * (y0 + int(rows[0])),
                2 * int(columns[-1] - columns[0] + 1),
                2 * int(rows[-1] - rows[0] + 1),
            )
        things.append(
            Thing(s.kind, s.color, s.center, s.radius, s.angle, s.opacity, box,
                  seen / max(whole, 1), 4 * seen)
        )  # fmt: skip
    return things


def draw(scene: Scene) -> Image.Image:
    """Paint a scene: an RGB picture of 336 x 336 pixels."""
    rng = random.Random(f"vistoken paint {scene.seed} {scene.split} {scene.index}")
    picture = paint_background(rng)
    for t in scene.things:
        paint_thing(picture, t.kind, t.color, t.center, t.radius, t.angle, t.opacity)
    return add_grain(picture, rng)


def truth(scene: Scene) -> set[str]:
    """The kinds that the picture shows: the ground truth of POPE and CHAIR."""
    return {t.kind for t in scene.things}


def owner_grid(scene: Scene, grid: int = 24) -> NDArray[np.int64]:
    """Which thing owns each patch: int64 [grid, grid], -1 background, else the index of the thing.

    A thing owns a patch if it covers a fifth of it and more of it than any other thing does; a
    thing that would own none gets the patch that it covers most of, unless that is another's only
    one. `grid` must divide 168.
    """
    if grid < 1 or (SIZE // 2) % grid:
        raise DataError(f"grid must divide {SIZE // 2}, got {grid}")
    side, n = SIZE // 2 // grid, len(scene.things)
    patch = np.arange(SIZE // 2) // side
    cell = (patch[:, None] * grid + patch[None, :]) * (n + 1)
    counts = np.bincount((cell + _owners(scene.things)).ravel(), minlength=grid * grid * (n + 1))
    cover = counts.reshape(grid * grid, n + 1)[:, 1:]
    best = cover.argmax(axis=1)
    owner = np.where(cover.max(axis=1) >= side * side / 5, best, -1)
    for i in sorted(set(range(n)) - set(owner.tolist())):
        spare = (owner < 0) | (np.bincount(owner + 1, minlength=n + 1)[owner + 1] > 1)
        room = cover[:, i] * spare
        if room.any():
            owner[room.argmax()] = i
    return owner.reshape(grid, grid)


def object_mask(scene: Scene, grid: int = 24) -> NDArray[np.bool_]:
    """Which patches are owned by a thing: bool [grid, grid]."""
    return owner_grid(scene, grid) >= 0


def coco_annotations(scenes: Iterable[Scene]) -> dict[str, Any]:
    """Scenes in COCO's instances and captions format, in one dictionary.

    Instance annotations have `bbox`, `area`, `category_id` and `iscrowd`, caption annotations
    `caption`; both kinds stand in `annotations`, with `image_id` and a unique `id`.
    """
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for scene in scenes:
        name = f"{scene.split}_{scene.image_id:09d}.png"
        images.append({"id": scene.image_id, "file_name": name, "width": SIZE, "height": SIZE})
        for t in scene.things:
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": scene.image_id,
                    "category_id": KINDS.index(t.kind) + 1,
                    "bbox": list(t.box),
                    "area": t.area,
                    "iscrowd": 0,
                }
            )
        annotations.append(
            {"id": len(annotations) + 1, "image_id": scene.image_id, "caption": caption(scene)}
        )
    categories = [{"id": i + 1, "name": k, "supercategory": "thing"} for i, k in enumerate(KINDS)]
    return {"images": images, "annotations": annotations, "categories": categories}
