"""How the 24 kinds look, and how a scene's background and things are painted with Pillow.

A shape is a list of (shade, polygon) in the square [-1, 1] x [-1, 1], y pointing down. Shades are
`main` (the named color), `light` and `dark`, so that a kind is known by more than its outline.
"""

from __future__ import annotations

import functools
import math
import random
from collections.abc import Iterable, Sequence

import numpy as np
from PIL import Image, ImageChops, ImageDraw

from vistoken.eval.scene_prior import RGB

Point = tuple[float, float]
Part = tuple[str, tuple[Point, ...]]
SIZE = 336


def _oval(
    cx: float, cy: float, rx: float, ry: float, start: float = 0, stop: float = 360, n: int = 20
) -> tuple[Point, ...]:
    """Points on an ellipse from `start` to `stop` degrees, clockwise from the right."""
    angles = [math.radians(start + (stop - start) * i / n) for i in range(n + 1)]
    return tuple((cx + rx * math.cos(a), cy + ry * math.sin(a)) for a in angles)


def _spikes(count: int, outer: float, inner: float) -> tuple[Point, ...]:
    """A star with `count` spikes, one of them pointing up."""
    points = []
    for i in range(2 * count):
        a, r = math.pi * i / count - math.pi / 2, (outer, inner)[i % 2]
        points.append((r * math.cos(a), r * math.sin(a)))
    return tuple(points)


def _box(x0: float, y0: float, x1: float, y1: float) -> tuple[Point, ...]:
    return ((x0, y0), (x1, y0), (x1, y1), (x0, y1))


def _annulus(cx: float, cy: float, outer: float, inner: float) -> tuple[Point, ...]:
    """A ring as one polygon: the outer circle, a seam, and the inner circle run backwards."""
    return _oval(cx, cy, outer, outer) + tuple(reversed(_oval(cx, cy, inner, inner)))


def _heart(scale: float) -> tuple[Point, ...]:
    points = []
    for i in range(24):
        t = 2 * math.pi * i / 24
        x = 16 * math.sin(t) ** 3
        y = 13 * math.cos(t) - 5 * math.cos(2 * t) - 2 * math.cos(3 * t) - math.cos(4 * t)
        points.append((scale * x / 17, -scale * (y + 2.5) / 15))
    return tuple(points)


_CROSS = (
    *((-0.32, -1.0), (0.32, -1.0), (0.32, -0.32), (1.0, -0.32), (1.0, 0.32), (0.32, 0.32)),
    *((0.32, 1.0), (-0.32, 1.0), (-0.32, 0.32), (-1.0, 0.32), (-1.0, -0.32), (-0.32, -0.32)),
)
_PETALS = [math.radians(a) for a in (-90, -18, 54, 126, 198)]

SHAPES: dict[str, tuple[Part, ...]] = {
    "star": (("main", _spikes(5, 1.0, 0.42)), ("light", _spikes(5, 0.5, 0.21))),
    "heart": (("main", _heart(1.0)), ("light", _oval(-0.42, -0.38, 0.2, 0.16))),
    "house": (
        ("main", _box(-0.72, -0.15, 0.72, 0.95)),
        ("dark", ((-1.0, -0.12), (0.0, -1.0), (1.0, -0.12))),
        ("light", _box(-0.48, 0.1, -0.08, 0.48)),
        ("dark", _box(0.14, 0.3, 0.52, 0.95)),
    ),
    "tree": (
        ("dark", _box(-0.16, 0.5, 0.16, 1.0)),
        ("main", ((-0.8, 0.6), (0.0, -0.4), (0.8, 0.6))),
        ("main", ((-0.6, 0.05), (0.0, -1.0), (0.6, 0.05))),
        ("light", ((-0.3, -0.1), (0.0, -0.7), (0.0, -0.1))),
    ),
    "car": (
        ("main", ((-1.0, 0.4), (-1.0, -0.05), (-0.55, -0.1), (-0.3, -0.55), (0.4, -0.55))
         + ((0.65, -0.1), (1.0, 0.0), (1.0, 0.4))),
        ("light", ((-0.4, -0.1), (-0.22, -0.42), (0.3, -0.42), (0.46, -0.1))),
        ("dark", _oval(-0.52, 0.42, 0.24, 0.24)),
        ("dark", _oval(0.52, 0.42, 0.24, 0.24)),
    ),
    "fish": (
        ("dark", ((0.4, 0.0), (1.0, -0.55), (0.85, 0.0), (1.0, 0.55))),
        ("main", _oval(-0.25, 0.0, 0.75, 0.48)),
        ("light", _oval(-0.62, -0.12, 0.13, 0.13)),
        ("dark", ((-0.2, -0.42), (0.2, -0.75), (0.25, -0.35))),
    ),
    "sun": (("main", _spikes(12, 1.0, 0.62)), ("light", _oval(0.0, 0.0, 0.46, 0.46))),
    "moon": (
        ("main", _oval(0.0, 0.0, 0.95, 0.95, 50, 310)
         + tuple(reversed(_oval(0.42, 0.0, 0.75, 0.75, 72, 288)))),
        ("light", _oval(-0.66, -0.2, 0.13, 0.2)),
    ),
    "cup": (
        ("dark", _annulus(0.62, 0.1, 0.38, 0.2)),
        ("main", ((-0.8, -0.7), (0.6, -0.7), (0.42, 0.85), (-0.6, 0.85))),
        ("light", _oval(-0.1, -0.7, 0.7, 0.2)),
    ),
    "key": (
        ("dark", _box(0.0, -0.12, 1.0, 0.14)),
        ("dark", _box(0.5, 0.1, 0.66, 0.5)),
        ("dark", _box(0.82, 0.1, 1.0, 0.42)),
        ("main", _annulus(-0.45, 0.0, 0.55, 0.24)),
    ),
    "flower": (
        ("dark", _box(-0.08, 0.1, 0.08, 1.0)),
        *(("main", _oval(0.5 * math.cos(a), 0.5 * math.sin(a) - 0.2, 0.34, 0.34, n=14))
          for a in _PETALS),
        ("light", _oval(0.0, -0.2, 0.27, 0.27, n=14)),
    ),
    "boat": (
        ("dark", ((-1.0, 0.35), (1.0, 0.35), (0.6, 0.9), (-0.6, 0.9))),
        ("main", ((0.04, -1.0), (0.04, 0.25), (0.8, 0.25))),
        ("light", ((-0.08, -0.75), (-0.08, 0.25), (-0.7, 0.25))),
    ),
    "arrow": (
        ("main", ((-1.0, -0.25), (0.1, -0.25), (0.1, -0.72), (1.0, 0.0), (0.1, 0.72))
         + ((0.1, 0.25), (-1.0, 0.25))),
        ("light", _box(-0.9, -0.08, 0.2, 0.08)),
    ),
    "ring": (
        ("main", _annulus(0.0, 0.22, 0.76, 0.5)),
        ("light", ((-0.36, -0.72), (0.0, -1.0), (0.36, -0.72), (0.0, -0.34))),
    ),
    "cross": (("main", _CROSS), ("light", _box(-0.18, -0.18, 0.18, 0.18))),
    "triangle": (
        ("main", ((0.0, -0.95), (1.0, 0.8), (-1.0, 0.8))),
        ("dark", ((-0.86, 0.55), (0.86, 0.55), (1.0, 0.8), (-1.0, 0.8))),
        ("light", ((0.0, -0.4), (0.34, 0.25), (-0.34, 0.25))),
    ),
    "square": (
        ("main", _box(-0.82, -0.82, 0.82, 0.82)),
        ("dark", _box(-0.82, 0.6, 0.82, 0.82)),
        ("light", _box(-0.55, -0.55, -0.05, -0.05)),
    ),
    "circle": (
        ("main", _oval(0.0, 0.0, 0.92, 0.92, n=28)),
        ("dark", _oval(0.0, 0.0, 0.92, 0.92, 20, 160)),
        ("light", _oval(-0.34, -0.36, 0.24, 0.24)),
    ),
    "diamond": (
        ("main", ((0.0, -1.0), (0.72, 0.0), (0.0, 1.0), (-0.72, 0.0))),
        ("light", ((0.0, -1.0), (0.0, 0.0), (-0.72, 0.0))),
        ("dark", ((0.0, 1.0), (0.72, 0.0), (0.0, 0.0))),
    ),
    "umbrella": (
        ("dark", _box(-0.07, -0.1, 0.07, 0.85)),
        ("dark", _box(-0.35, 0.7, 0.07, 0.88)),
        ("main", _oval(0.0, 0.05, 1.0, 0.95, 180, 360)
         + ((0.66, -0.14), (0.33, 0.05), (0.0, -0.14), (-0.33, 0.05), (-0.66, -0.14))),
        ("light", ((-0.33, 0.0), (0.0, -0.9), (0.33, 0.0), (0.0, -0.16))),
    ),
    "mushroom": (
        ("light", ((-0.26, 0.0), (0.26, 0.0), (0.36, 0.95), (-0.36, 0.95))),
        ("main", _oval(0.0, 0.1, 0.95, 0.95, 180, 360)),
        ("light", _oval(-0.4, -0.3, 0.17, 0.17, n=12)),
        ("light", _oval(0.25, -0.5, 0.15, 0.15, n=12)),
        ("light", _oval(0.55, -0.12, 0.12, 0.12, n=12)),
    ),
    "ladder": (
        *(("main", _box(-0.5, y, 0.5, y + 0.2)) for y in (-0.8, -0.35, 0.1, 0.55)),
        ("dark", _box(-0.62, -1.0, -0.4, 1.0)),
        ("dark", _box(0.4, -1.0, 0.62, 1.0)),
    ),
    "flag": (
        ("main", ((-0.6, -0.9), (0.1, -0.75), (0.95, -0.9), (0.95, 0.05), (0.1, 0.2))
         + ((-0.6, 0.05),)),
        ("light", ((-0.6, -0.55), (0.1, -0.4), (0.95, -0.55), (0.95, -0.3), (0.1, -0.15))
         + ((-0.6, -0.3),)),
        ("dark", _box(-0.75, -1.0, -0.58, 1.0)),
    ),
    "cloud": (
        ("main", _oval(-0.5, 0.2, 0.48, 0.42)),
        ("main", _oval(0.5, 0.22, 0.48, 0.4)),
        ("main", _oval(0.0, -0.12, 0.55, 0.55)),
        ("dark", _box(-0.55, 0.45, 0.55, 0.62)),
        ("light", _oval(-0.1, -0.3, 0.26, 0.2)),
    ),
}  # fmt: skip


def _shades(color: str) -> dict[str, tuple[int, int, int]]:
    """The named color, half way to white, and at half its brightness."""
    r, g, b = RGB[color]
    light = (r + (255 - r) // 2, g + (255 - g) // 2, b + (255 - b) // 2)
    return {"main": (r, g, b), "light": light, "dark": (r // 2, g // 2, b // 2)}


def place(
    points: Sequence[Point], center: Point, radius: float, angle: float, scale: float
) -> list[Point]:
    """Turn by `angle` degrees, blow up to `radius` pixels, move to `center`, then scale all."""
    c = radius * scale * math.cos(math.radians(angle))
    s = radius * scale * math.sin(math.radians(angle))
    x0, y0 = center[0] * scale, center[1] * scale
    return [(x0 + c * x - s * y, y0 + s * x + c * y) for x, y in points]


def stamp(
    target: Image.Image, kind: str, center: Point, radius: float, angle: float, value: int
) -> None:
    """Fill the outline of a thing with `value` in an "L" picture that is half the scene's size."""
    pen = ImageDraw.Draw(target)
    for _shade, points in SHAPES[kind]:
        pen.polygon(place(points, center, radius, angle, 0.5), fill=value)


def paint_thing(
    target: Image.Image,
    kind: str,
    color: str,
    center: Point,
    radius: float,
    angle: float,
    opacity: float,
) -> None:
    """Paint one thing, drawn at double size and reduced so that its edges are smooth."""
    reach = math.ceil(radius * 1.42) + 1
    left, top = round(center[0]) - reach, round(center[1]) - reach
    middle = (center[0] - left, center[1] - top)
    shades = _shades(color)
    sprite = Image.new("RGB", (4 * reach, 4 * reach), shades["main"])
    mask = Image.new("L", sprite.size)
    pen, mask_pen = ImageDraw.Draw(sprite), ImageDraw.Draw(mask)
    for shade, points in SHAPES[kind]:
        polygon = place(points, middle, radius, angle, 2.0)
        pen.polygon(polygon, fill=shades[shade])
        mask_pen.polygon(polygon, fill=round(255 * opacity))
    target.paste(sprite.reduce(2), (left, top), mask.reduce(2))


@functools.lru_cache(maxsize=4)
def _grain(strength: int) -> Image.Image:
    """A tile of noise around 128, made from a frozen stream so that it is the same everywhere."""
    uniform = np.random.RandomState(strength).random_sample((3, 512, 512, 3))
    noise = (uniform.sum(axis=0) - 1.5) * 2.0 * strength  # three uniforms: near enough to normal
    return Image.fromarray(np.clip(np.rint(noise + 128), 0, 255).astype(np.uint8))


def paint_background(rng: random.Random) -> Image.Image:
    """A smooth field of muted colors with a few lines across it."""
    level = rng.uniform(70, 185)
    cells = bytes(min(255, max(0, round(level + rng.uniform(-45, 45)))) for _ in range(5 * 5 * 3))
    field = Image.frombytes("RGB", (5, 5), cells).resize((SIZE, SIZE), Image.Resampling.BILINEAR)
    pen = ImageDraw.Draw(field)
    for _ in range(rng.randint(2, 9)):
        tone = round(level + rng.uniform(-70, 70))
        fill = tuple(min(255, max(0, tone + rng.randint(-25, 25))) for _ in range(3))
        ends = [rng.uniform(-20, SIZE + 20) for _ in range(4)]
        pen.line(ends, fill=fill, width=rng.randint(1, 3))
    return field


def add_grain(picture: Image.Image, rng: random.Random) -> Image.Image:
    """Add noise of one of three strengths, the same way to background and things."""
    tile = _grain(rng.choice((4, 9, 15)))
    x, y = rng.randrange(512 - SIZE), rng.randrange(512 - SIZE)
    return ImageChops.add(picture, tile.crop((x, y, x + SIZE, y + SIZE)), 1, -128)


def contact_sheet(pictures: Iterable[Image.Image], columns: int = 4) -> Image.Image:
    """Put pictures of the scenes' size side by side, `columns` in a row."""
    tiles = list(pictures)
    rows = -(-len(tiles) // columns)
    sheet = Image.new("RGB", (columns * SIZE, rows * SIZE))
    for i, tile in enumerate(tiles):
        sheet.paste(tile, ((i % columns) * SIZE, (i // columns) * SIZE))
    return sheet
