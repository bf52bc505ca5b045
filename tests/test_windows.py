"""The windows of a grid: whom a query sees, by whom a key is seen, and what is refused."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator
from itertools import product

import pytest
import torch

from vistoken.errors import MethodError
from vistoken.kernels import disc_window, neighborhood
from vistoken.kernels.windows import Axis, Window, flatten_window, restore_window
from window_sets import seen, visible


def options(longest: int, dilated: bool = True) -> Iterator[tuple[int, int, int, int, bool]]:
    """Every valid (length, kernel_size, stride, dilation, is_causal) of axes up to a length."""
    for length in range(1, longest + 1):
        for kernel in range(1, length + 1):
            for dilation in range(1, length // kernel + 1) if dilated else (1,):
                for stride, causal in product(range(1, kernel + 1), (False, True)):
                    yield length, kernel, stride, dilation, causal


def axes(longest: int) -> Iterator[Axis]:
    for length, kernel, stride, _, causal in options(longest, dilated=False):
        yield Axis(length, kernel, stride, causal)
    for length, radius in product(range(1, longest + 1), range(1, longest + 3)):
        yield Axis(length, length, radius=radius)


# --- whom a query sees ---------------------------------------------------------------------------


def test_every_short_axis_sees_what_the_search_finds() -> None:
    for length, kernel, stride, dilation, causal in options(12):
        found: list[set[int]] = [set() for _ in range(length)]
        for (cut,), window in neighborhood((length,), kernel, stride, dilation, causal).groups():
            line, axis = range(length)[cut], window.axes[2]
            assert window.grid == (1, 1, len(line))
            for i, x in enumerate(line):
                found[x] = {line[j] for j in range(axis.lo(i), axis.hi(i))}
        given = (length, kernel, stride, dilation, causal)
        assert found == seen(*given), given
        assert all(x in keys for x, keys in enumerate(found))
        assert causal or {len(keys) for keys in found} == {kernel}


@pytest.mark.parametrize(
    ("axis", "table"),
    [
        (Axis(9, 4), "0-4 0-4 0-4 1-5 2-6 3-7 4-8 5-9 5-9"),
        (Axis(9, 4, 2), "0-4 0-4 1-5 1-5 3-7 3-7 5-9 5-9 5-9"),
        (Axis(10, 4, 4), "0-4 0-4 0-4 0-4 4-8 4-8 4-8 4-8 6-10 6-10"),
        (Axis(9, 4, 2, True), "0-1 0-2 0-3 0-4 2-5 2-6 4-7 4-8 5-9"),
        (Axis(10, 4, 4, True), "0-1 0-2 0-3 0-4 4-5 4-6 4-7 4-8 6-9 6-10"),
        (Axis(5, 5, radius=2), "0-2 0-3 1-4 2-5 3-5"),
    ],
)
def test_windows_written_down(axis: Axis, table: str) -> None:
    lo, hi = axis.bounds().tolist()
    assert [f"{a}-{b}" for a, b in zip(lo, hi, strict=True)] == table.split()


def test_windows_of_grids_are_products() -> None:
    draw = random.Random(0)
    for _ in range(60):
        rank = draw.randint(1, 3)
        grid = tuple(draw.randint(1, (30, 8, 5)[rank - 1]) for _ in range(rank))
        kernel = tuple(draw.randint(1, length) for length in grid)
        stride = tuple(draw.randint(1, k) for k in kernel)
        dilation = tuple(draw.randint(1, n // k) for n, k in zip(grid, kernel, strict=True))
        causal = tuple(draw.random() < 0.3 for _ in grid)
        tokens = torch.arange(math.prod(grid)).reshape(grid)
        found = torch.zeros(tokens.numel(), tokens.numel(), dtype=torch.bool)
        for cut, window in neighborhood(grid, kernel, stride, dilation, causal).groups():
            part = tokens[cut].flatten()
            assert window.tokens == len(part)
            found[part[:, None], part] = window.visible()
        assert torch.equal(found, visible(grid, kernel, stride, dilation, causal))
        if not any(causal):
            assert (found.sum(-1) == math.prod(kernel)).all()


def test_groups_hold_every_token_once() -> None:
    for dilation in [(1, 1, 1), (2, 3, 1), (4, 5, 6), (3, 2, 4)]:
        tokens = torch.arange(4 * 5 * 6).reshape(4, 5, 6)
        groups = list(neighborhood((4, 5, 6), 1, dilation=dilation).groups())
        assert len(groups) == math.prod(dilation)
        together = torch.cat([tokens[cut].flatten() for cut, _ in groups])
        assert together.sort().values.tolist() == list(range(4 * 5 * 6))


def test_discs_hold_the_keys_closer_than_the_radius() -> None:
    for height, width, radius in product((1, 2, 5, 6), (1, 3, 7), range(1, 10)):
        window = disc_window((height, width), radius)
        places = list(product(range(height), range(width)))
        near = [[math.dist(a, b) < radius for b in places] for a in places]
        assert window.visible().tolist() == near
        assert window.full == all(map(all, near))


# --- tiles of queries and of keys ----------------------------------------------------------------


def test_spans_of_tiles_and_the_queries_that_see_them() -> None:
    for axis in axes(9):
        keys_of = [set(range(axis.lo(x), axis.hi(x))) for x in range(axis.length)]
        assert axis.full == all(len(keys) == axis.length for keys in keys_of)
        for first in range(axis.length):
            for last in range(first, axis.length):
                tile = keys_of[first : last + 1]
                assert set(range(*axis.span(first, last))) == set.union(*tile)
                assert set(range(*axis.shared(first, last))) == set.intersection(*tile)
                keys = set(range(first, last + 1))
                sees = {x for x in range(axis.length) if keys & keys_of[x]}
                lo, hi = axis.seen_by(first, last)
                assert lo <= hi and set(range(lo, hi)) == sees, (axis, first, last)


def test_full_windows() -> None:
    (_, window), *others = neighborhood((4, 5), (4, 5), stride=(2, 5)).groups()
    assert window.full and not others and window.visible().all()
    for changed in ({"kernel_size": (4, 4)}, {"is_causal": (True, False)}):
        ((_, window),) = neighborhood((4, 5), **{"kernel_size": (4, 5), **changed}).groups()
        assert not window.full
    for _, window in neighborhood((4, 9), (2, 3), dilation=(2, 3)).groups():
        assert window.full


def test_windows_survive_as_numbers() -> None:
    windows = [w for _, w in neighborhood((7, 9, 5), 2, (1, 2, 1), 2, (True, False, True)).groups()]
    for window in [*windows, disc_window((3, 4), 2)]:
        flat = flatten_window(window)
        assert all(type(number) is int for number in flat)
        restored = restore_window(flat)
        assert restored == window and hash(restored) == hash(window)
        assert isinstance(restored, Window) and type(restored.axes[0].causal) is bool


# --- what is refused -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (((), 1), "one to three axes"),
        (((2, 2, 2, 2), 1), "one to three axes"),
        (((4.0, 2), 1), r"whole numbers of tokens, got \(4.0, 2\)"),
        (((4, 0), 1), r"at least one token, got \(4, 0\)"),
        (((4,), 0), "kernel_size must be at least 1, got 0 on axis 0"),
        (((4, 9), (4, -1)), "got -1 on axis 1"),
        (((4, 9), 5), "4 tokens, got 5 \\* 1 on axis 0"),
        (((4, 9), (2, 3), 1, (2, 4)), r"9 tokens, got 3 \* 4 on axis 1"),
        (((4,), 2, 1, 0), r"got 2 \* 0"),
        (((4,), 2, 3), r"stride must lie in 1..kernel_size = 2, got 3 on axis 0"),
        (((4,), 2, 0), "got 0 on axis 0"),
        (((4, 9), (2, 2, 2)), r"kernel_size must be one int or 2 of them.*got \(2, 2, 2\)"),
        (((4, 9), 2.0), "kernel_size must be one int .* got 2.0"),
        (((4, 9), True), "kernel_size must be one int .* got True"),
        (((4, 9), "33"), "kernel_size must be one int .* got '33'"),
        (((4, 9), None), "kernel_size must be one int .* got None"),
        (((4, 9), 2, (1, None)), "stride must be one int"),
        (((4, 9), 2, 1, [1]), "dilation must be one int"),
        (((4, 9), 2, 1, 1, 1), "is_causal must be one bool .* got 1"),
        (((4, 9), 2, 1, 1, (True,)), "is_causal must be one bool"),
    ],
)
def test_neighborhoods_that_are_none(given: tuple, words: str) -> None:
    with pytest.raises(MethodError, match=words):
        neighborhood(*given)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (((4,), 1), "grid"),
        (((4, 0), 1), "grid"),
        (((4, 4), 0), "got 0"),
        (((4, 4), 1.5), "got 1.5"),
        (((4, 4), "2"), "got '2'"),
    ],
)
def test_discs_that_are_none(given: tuple, words: str) -> None:
    with pytest.raises(MethodError, match=words):
        disc_window(*given)
