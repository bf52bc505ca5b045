"""Spread against a slow walk over its definition."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from vistoken.errors import MethodError
from vistoken.pictures import Part, Picture, plain
from vistoken.pruning import spread


def image(tokens: int, seed: int = 0, batch: int = 2) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(batch, tokens, 12, generator=generator)
    attention = torch.rand(batch, tokens, generator=generator) ** 3
    return features, attention


def slow(
    features: Tensor, attention: Tensor, keep: int, sharpness: float, reach: float, width: int
) -> list[int]:
    """One picture, token by token, in fp64."""
    rows = features.double()
    total = attention.double().mean()
    weight = [max(float(a / total), 1e-4) ** sharpness for a in attention.double()]
    side = max(len(weight) // width, width)

    def apart(i: int, j: int) -> float:
        cosine = float(torch.nn.functional.cosine_similarity(rows[i], rows[j], dim=0))
        if not reach:
            return 1 - cosine
        down, across = i // width - j // width, i % width - j % width
        near = math.exp(-((down / side) ** 2 + (across / side) ** 2) / reach**2)
        return (1 - cosine) * (1 - near)

    chosen = [max(range(len(weight)), key=lambda i: weight[i])]
    while len(chosen) < keep:
        rest = [i for i in range(len(weight)) if i not in chosen]
        chosen.append(max(rest, key=lambda i: weight[i] * min(apart(i, j) for j in chosen)))
    return sorted(chosen)


@pytest.mark.parametrize("reach", [0.0, 0.1, 0.3, 1.0])
@pytest.mark.parametrize("sharpness", [0.0, 1.0, 1.5, 3.0])
def test_equals_the_slow_walk(sharpness: float, reach: float) -> None:
    for seed, (rows, width) in enumerate([(5, 6), (1, 9), (7, 3)]):
        features, attention = image(rows * width, seed)
        for keep in (1, 4, rows * width - 1):
            found = spread.select(
                features, attention, keep, sharpness=sharpness, reach=reach, grid=(rows, width)
            )
            for row, one in enumerate(found.tolist()):
                expected = slow(features[row], attention[row], keep, sharpness, reach, width)
                assert one == expected, (seed, keep)


def test_what_each_part_does() -> None:
    """Equal attention leaves diversity; features all alike far apart leave places."""
    features, attention = image(36)
    even = torch.ones_like(attention)
    diverse = spread.select(features, even, 6, reach=0.0)
    assert torch.equal(spread.select(features, attention, 6, sharpness=0.0, reach=0.0), diverse)
    unlike = torch.eye(36).expand(2, 36, 36)
    placed = spread.select(unlike, even, 4, reach=0.3, grid=(6, 6))
    assert placed[0].tolist() == [0, 5, 30, 35]  # the corners
    copies = features.clone()
    copies[:, 1:3] = copies[:, :1]  # three equal tokens, of most attention
    loud = attention.clone()
    loud[:, :3] = 9
    kept = spread.select(copies, loud, 6, reach=0.0)
    assert all(len(set(row) & {0, 1, 2}) == 1 for row in kept.tolist())


def test_scale_batch_and_dtype_do_not_matter() -> None:
    features, attention = image(36, 3, batch=3)
    found = spread.select(features, attention, 9, grid=(6, 6))
    assert torch.equal(spread.select(features * 7, attention * 1e-3, 9, grid=(6, 6)), found)
    for row in range(3):
        alone = spread.select(features[row : row + 1], attention[row : row + 1], 9, grid=(6, 6))
        assert torch.equal(alone[0], found[row])
    broken = attention.clone()
    broken[:, 5] = torch.nan
    assert not (spread.select(features, broken, 9, grid=(6, 6)) == 5).any()
    dark = spread.select(features, torch.zeros_like(attention), 9, grid=(6, 6))
    assert all(len(set(row)) == 9 for row in dark.tolist())
    assert torch.equal(spread.select(features, attention, 99, grid=(6, 6))[0], torch.arange(36))


def test_nearness_stays_within_a_raster() -> None:
    picture = Picture((Part((2,), (2,)), Part((2, 1), (3,))))
    near = spread.nearness(picture, 0.5, torch.device("cpu"))
    assert near.shape == (13, 13)
    assert torch.equal(near, near.T) and bool((near.diagonal() == 1).all())
    assert float(near[:4, 4:].sum()) == 0
    assert float(near[4, 5]) == pytest.approx(math.exp(-((1 / 3) ** 2) / 0.25))
    assert torch.equal(near[:4, :4], spread.nearness(plain(2, 2), 0.5, torch.device("cpu")))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"keep": 0}, "keep must be at least 1"),
        ({"keep": 3, "reach": -1.0}, "not negative"),
        ({"keep": 3}, "needs a grid of 36"),
        ({"keep": 3, "grid": (5, 7)}, r"\(5, 7\)"),
    ],
)
def test_bad_input(options: dict, words: str) -> None:
    with pytest.raises(MethodError, match=words):
        spread.select(*image(36), **options)
    with pytest.raises(MethodError, match="must agree"):
        spread.select(image(36)[0], image(35)[1], 3, reach=0.0)
