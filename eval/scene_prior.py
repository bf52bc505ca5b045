"""What tends to occur with what in the scene data set: kinds, colors, themes and their statistics.

The draws are deliberately far from uniform. Three quarters of the things of a picture come from its
theme with Zipf weights, and most kinds have a preferred color, so a model that learns from such
pictures also learns a prior that it can lean on when it should look: that is what hallucination
benchmarks measure.
"""

from __future__ import annotations

import functools
import random
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

KINDS: tuple[str, ...] = (
    *("star", "heart", "house", "tree", "car", "fish", "sun", "moon", "cup", "key", "flower"),
    *("boat", "arrow", "ring", "cross", "triangle", "square", "circle", "diamond", "umbrella"),
    *("mushroom", "ladder", "flag", "cloud"),
)
COLORS: tuple[str, ...] = (
    *("red", "orange", "yellow", "green", "blue", "purple", "white", "black"),
)
RGB: Mapping[str, tuple[int, int, int]] = MappingProxyType(
    {
        "red": (214, 38, 40),
        "orange": (246, 138, 22),
        "yellow": (247, 220, 40),
        "green": (44, 160, 60),
        "blue": (40, 88, 214),
        "purple": (146, 60, 178),
        "white": (242, 242, 242),
        "black": (26, 26, 30),
    }
)

# Within a theme the weight of the i-th kind is 1 / (i + 1): the first ones are nearly always there.
THEMES: tuple[tuple[str, ...], ...] = (
    ("sun", "cloud", "moon", "star"),
    ("tree", "flower", "mushroom", "house"),
    ("boat", "fish", "flag", "umbrella"),
    ("car", "house", "ladder", "arrow"),
    ("cup", "key", "ring", "heart"),
    ("square", "circle", "triangle", "diamond", "cross"),
)
THEME_WEIGHTS: tuple[float, ...] = (6.0, 5.0, 4.0, 3.0, 2.5, 2.0)
THEME_SHARE = 0.75

PREFERRED_COLOR: Mapping[str, str] = MappingProxyType(
    {
        **{"star": "yellow", "heart": "red", "house": "orange", "tree": "green", "car": "red"},
        **{"fish": "orange", "sun": "yellow", "moon": "white", "cup": "white", "key": "black"},
        **{"flower": "purple", "boat": "blue", "arrow": "black", "ring": "yellow", "cross": "red"},
        **{"triangle": "green", "square": "blue", "circle": "orange", "diamond": "purple"},
        **{"umbrella": "purple", "mushroom": "red", "ladder": "black", "flag": "blue"},
        "cloud": "white",
    }
)
PREFERRED_SHARE = 0.35

# Who writes captions from habit adds the right-hand kind after having seen the left-hand one.
COMPANION: Mapping[str, str] = MappingProxyType(
    {
        **{"cloud": "sun", "moon": "star", "flower": "tree", "mushroom": "tree", "fish": "boat"},
        **{"flag": "boat", "ladder": "house", "key": "cup", "ring": "heart", "circle": "square"},
    }
)


@dataclass(frozen=True)
class Statistics:
    """Shares over a sample of scenes.

    `frequency[a]` is the share of scenes with a, `cooccurrence[a][b]` the share of those that also
    hold b.
    """

    frequency: Mapping[str, float]
    cooccurrence: Mapping[str, Mapping[str, float]]


def draw_kinds(rng: random.Random, count: int) -> tuple[str, ...]:
    """Draw the kinds of `count` things: from a theme with Zipf weights, else uniformly."""
    theme = rng.choices(THEMES, THEME_WEIGHTS)[0]
    weights = [1.0 / (i + 1) for i in range(len(theme))]
    kinds: list[str] = []
    for _ in range(count):
        for _attempt in range(3):
            themed = rng.random() < THEME_SHARE
            kind = rng.choices(theme, weights)[0] if themed else rng.choice(KINDS)
            # Repeats are needed for counting but would otherwise fill the pictures of small themes.
            if kind not in kinds or rng.random() < 0.2:
                break
        kinds.append(kind)
    return tuple(kinds)


def draw_color(rng: random.Random, kind: str) -> str:
    """Draw a color: the preferred one of the kind in `PREFERRED_SHARE` of the draws, else any."""
    if rng.random() < PREFERRED_SHARE:
        return PREFERRED_COLOR[kind]
    return rng.choice(COLORS)


def draw_count(rng: random.Random) -> tuple[int, bool]:
    """Draw how many things a scene has, 2 to 6, or 5 to 8 in the hard two fifths."""
    hard = rng.random() < 0.4
    return (rng.randint(5, 8) if hard else rng.randint(2, 6)), hard


@functools.lru_cache(maxsize=8)
def statistics(samples: int = 4000, seed: int = 0) -> Statistics:
    """Count how often kinds occur, alone and together, in a seeded sample of draws."""
    rng = random.Random(f"vistoken scene statistics {seed}")
    single = dict.fromkeys(KINDS, 0)
    pair = {a: dict.fromkeys(KINDS, 0) for a in KINDS}
    for _ in range(samples):
        count, _hard = draw_count(rng)
        present = sorted(set(draw_kinds(rng, count)), key=KINDS.index)
        for a in present:
            single[a] += 1
            for b in present:
                if a != b:
                    pair[a][b] += 1
    frequency = {k: n / samples for k, n in single.items()}
    share = {a: {b: n / max(single[a], 1) for b, n in row.items()} for a, row in pair.items()}
    return Statistics(MappingProxyType(frequency), MappingProxyType(share))
