"""Shortening a prompt against Python lists, over odd batches."""

from __future__ import annotations

import random
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from vistoken.errors import DataError
from vistoken.prompt import Layout, Shortening, positions_from_mask, read_layout, shorten

PAD, IMAGE = 0, 9


@dataclass(frozen=True)
class Prompts:
    """A batch as lists: ids and mask [B, L], each image's tokens and what it keeps of them.

    masked: whether the mask is given.
    """

    ids: list[list[int]]
    mask: list[list[int]]
    tokens: list[int]
    kept: list[list[int]]
    masked: bool = True

    @property
    def pads_right(self) -> bool:
        """Whether any row ends in padding; a row that is padding all over says nothing."""
        return self.masked and any(any(row) and not row[-1] for row in self.mask)

    def plan(self) -> Shortening:
        mask = torch.tensor(self.mask) if self.masked else None
        layout = read(torch.tensor(self.ids), self.tokens, mask)
        return cut(layout, self.kept)


def read(ids: Tensor, tokens: list[int], mask: Tensor | None = None) -> Layout:
    """The layout of prompts whose pictures are all of one kind."""
    return read_layout((ids == IMAGE).long(), [(1, count) for count in tokens], mask)


def cut(layout: Layout, kept: list[list[int]]) -> Shortening:
    """The plan in which each picture keeps the tokens listed for it."""
    flat = torch.tensor([token for own in kept for token in own], dtype=torch.long)
    return shorten(layout, flat, [len(own) for own in kept])


@dataclass(frozen=True)
class Expected:
    """The short prompt as lists; a slot of None is padding, otherwise the long column."""

    image_rows: list[int]
    columns: list[list[int]]
    slots: list[list[int | None]]
    landed: list[list[tuple[int, int]]]  # (row, short column) of the kept tokens of each image
    removed: list[list[int]]  # per long column: visual tokens dropped up to it


def oracle(prompts: Prompts, other_side: bool = False) -> Expected:
    """Walk over the columns of every row, one by one."""
    image_rows: list[int] = []
    columns: list[list[int]] = []
    kept_columns: list[list[int]] = []
    removed, slots = [], []
    open_image: list[int] = []
    dropped: set[tuple[int, int]] = set()
    for r, row in enumerate(prompts.ids):
        for c, token in enumerate(row):
            if token != IMAGE:
                continue
            open_image.append(c)
            if len(open_image) == prompts.tokens[len(columns)]:
                keep = prompts.kept[len(columns)]
                dropped |= {(r, c) for i, c in enumerate(open_image) if i not in keep}
                kept_columns.append([open_image[i] for i in keep])
                image_rows.append(r)
                columns.append(open_image)
                open_image = []
    for r, row in enumerate(prompts.ids):
        on = [c for c, bit in enumerate(prompts.mask[r]) if bit and prompts.masked]
        first, last = (on[0], on[-1]) if on else (0, len(row) - 1)
        gone, counts, left = 0, [], []
        for c in range(len(row)):
            gone += (r, c) in dropped
            counts.append(gone)
            if (r, c) not in dropped and first <= c <= last:
                left.append(c)
        removed.append(counts)
        slots.append(left)
    longest = max(map(len, slots))
    padded: list[list[int | None]] = []
    for left in slots:
        padding = [None] * (longest - len(left))
        right = prompts.pads_right != other_side
        padded.append([*left, *padding] if right else [*padding, *left])
    landed = [
        [(r, padded[r].index(c)) for c in kept]
        for r, kept in zip(image_rows, kept_columns, strict=True)
    ]
    return Expected(image_rows, columns, padded, landed, removed)


def make(draw: random.Random) -> Prompts:
    """A random batch: 1-5 rows of 0-3 images, padded on the left, on the right or on both sides."""
    same = draw.choice([0, 1, 2, 5, 9])
    rows, tokens = [], []
    for _ in range(draw.randint(1, 5)):
        row = [draw.randint(1, 8) for _ in range(draw.choice([0, 1, 3]))]
        for _ in range(draw.choice([0, 1, 1, 2, 3])):
            tokens.append(same or draw.randint(1, 9))
            row += [IMAGE] * tokens[-1]
            row += [draw.randint(1, 8) for _ in range(draw.choice([0, 0, 1, 4]))]
        rows.append(row or [1])
    if not tokens:
        tokens = [same or 3]
        rows[0] = [IMAGE] * tokens[0]
    length = max(map(len, rows)) + draw.choice([0, 0, 2])
    ids, mask = [], []
    for row in rows:
        before = draw.choice([0, length - len(row), draw.randint(0, length - len(row))])
        after = length - len(row) - before
        ids.append([PAD] * before + row + [PAD] * after)
        inside = [int(0 < i < len(row) - 1 and draw.random() < 0.1) for i in range(len(row))]
        mask.append([0] * before + [1 - hidden for hidden in inside] + [0] * after)
    most = draw.randint(1, 9) if draw.random() < 0.5 else 0
    kept = [sorted(draw.sample(range(n), min(most or draw.randint(1, n), n))) for n in tokens]
    return Prompts(ids, mask, tokens, kept, draw.random() < 0.7)


def _span(slots: list[int | None]) -> list[int]:
    """First column that is not padding, and one past the last."""
    filled = [i for i, c in enumerate(slots) if c is not None]
    return [filled[0], filled[-1] + 1]


def mistakes(prompts: Prompts, plan: Shortening, other_side: bool = False) -> list[str]:
    """The parts of a plan that differ from the oracle."""
    expected = oracle(prompts, other_side)
    slots = expected.slots
    rows = [r for image in expected.landed for r, _ in image]
    landed = [c for image in expected.landed for _, c in image]
    again = read(plan.take(torch.tensor(prompts.ids), PAD), list(plan.short.tokens))
    mask = [
        [0 if c is None else row[c] for c in own]
        for row, own in zip(prompts.mask, slots, strict=True)
    ]
    ids = [
        [PAD if c is None else row[c] for c in own]
        for row, own in zip(prompts.ids, slots, strict=True)
    ]
    long = [[100 * r + 3 * c for c in range(len(row))] for r, row in enumerate(prompts.ids)]
    closed = [
        [0 if c is None else long[r][c] - expected.removed[r][c] for c in own]
        for r, own in enumerate(slots)
    ]
    checks = {
        "rows": list(plan.layout.image_rows) == expected.image_rows,
        "starts": list(plan.layout.image_starts) == [image[0] for image in expected.columns],
        "short layout": (plan.short.image_rows, plan.short.image_starts, plan.short.length)
        == (again.image_rows, again.image_starts, again.length),
        "short rows": [[s, e] for s, e in zip(plan.short.starts, plan.short.ends, strict=True)]
        == [_span(own) for own in slots],
        "ranks": plan.own.tolist() == [i for own in prompts.kept for i in range(len(own))],
        "padded": plan.padded == any(None in own for own in slots),
        "length": plan.length == len(slots[0]),
        "index": plan.index.tolist() == [[c or 0 for c in own] for own in slots],
        "padding": plan.padding.tolist() == [[c is None for c in own] for own in slots],
        "visual rows": plan.visual_rows.tolist() == rows,
        "visual columns": plan.visual_columns.tolist() == landed,
        "removed": plan.removed.tolist() == [counts[-1] for counts in expected.removed],
        "positions": plan.renumber(torch.tensor(long)).tolist() == closed,
        "ids": plan.take(torch.tensor(prompts.ids), PAD).tolist() == ids,
        "mask": plan.take(torch.tensor(prompts.mask), 0).tolist() == mask,
    }
    return [name for name, right in checks.items() if not right]


@pytest.mark.parametrize("seed", [0, 1])
def test_shorten_equals_the_walk_over_lists(seed: int) -> None:
    draw = random.Random(seed)
    for _ in range(250):
        prompts = make(draw)
        assert not mistakes(prompts, prompts.plan()), prompts


def test_a_wrong_plan_would_be_seen() -> None:
    """Padding on the other side, other tokens kept, padding taken for text."""
    draw = random.Random(3)
    other_side = other_tokens = no_mask = 0
    for _ in range(150):
        prompts = make(draw)
        other_side += bool(mistakes(prompts, prompts.plan(), True))
        no_mask += bool(mistakes(prompts, replace(prompts, masked=False).plan()))
        pairs = zip(prompts.kept, prompts.tokens, strict=True)
        shifted = [sorted((i + 1) % n for i in kept) for kept, n in pairs]
        wrong = replace(prompts, kept=shifted)
        other_tokens += bool(mistakes(prompts, wrong.plan()))
    assert min(other_side, other_tokens, no_mask) > 25


def test_a_batch_written_out() -> None:
    """Two rows of one image with 3 tokens each, the second one left-padded; token 1 is dropped."""
    ids = torch.tensor([[5, 9, 9, 9, 6, 7], [0, 0, 9, 9, 9, 8]])
    kept = [[0, 2], [0, 2]]
    plan = cut(read(ids, [3, 3], ids != PAD), kept)
    assert plan.take(ids, PAD).tolist() == [[5, 9, 9, 6, 7], [0, 0, 9, 9, 8]]
    assert plan.padding.tolist() == [[False] * 5, [True, True, False, False, False]]
    assert plan.visual_columns.tolist() == [1, 2, 2, 3]
    assert plan.removed.tolist() == [1, 1]
    positions = positions_from_mask(ids != PAD)
    assert plan.renumber(positions).tolist() == [[0, 1, 2, 3, 4], [0, 0, 0, 1, 2]]
    turned = torch.tensor([[5, 9, 9, 9, 6, 7], [9, 9, 9, 8, 0, 0]])
    right = cut(read(turned, [3, 3], turned != PAD), kept)
    assert right.take(turned, PAD).tolist() == [[5, 9, 9, 6, 7], [9, 9, 8, 0, 0]]
    assert right.visual_columns.tolist() == [1, 2, 0, 1]


def test_rows_with_fewer_images_end_up_longest() -> None:
    """Equal long rows; the row with two images loses more, so it is the one that is padded."""
    ids = torch.tensor([[9, 9, 9, 9], [9, 9, 4, 5]])
    plan = cut(read(ids, [2, 2, 2]), [[1], [0], [1]])
    assert plan.take(ids, PAD).tolist() == [[0, 9, 9], [9, 4, 5]]


def test_take_keeps_the_dtype_and_fills() -> None:
    ids = torch.tensor([[9, 9, 9, 9], [9, 9, 4, 5]])
    plan = cut(read(ids, [2, 2, 2]), [[1], [0], [1]])
    for values in (ids, ids.int(), ids.float(), ids > 4):
        assert plan.take(values, 0).dtype == values.dtype
        assert plan.take(values, 1)[0, 0] == 1


def test_prompts_without_any_image_stay_as_they_are() -> None:
    ids = torch.tensor([[1, 2, 3], [0, 4, 5]])
    layout = read(ids, [])
    assert layout.images == 0
    plan = cut(layout, [])
    assert torch.equal(plan.take(ids, PAD), ids)
    assert plan.visual_rows.shape == plan.visual_columns.shape == (0,)


@pytest.mark.parametrize(
    "mask", [[0, 0, 0, 1], [0, 0, 0, 0], [0, 1, 0, 1], [0, 0, 1, 1], [1, 1, 0, 0]], ids=str
)
def test_an_image_that_the_mask_hides_is_shortened_too(mask: list[int]) -> None:
    """Masking an image out is a way to ask what it contributes; the bare model answers."""
    ids = torch.tensor([[9, 9, 9, 5], [4, 9, 9, 9]])
    layout = read(ids, [3, 3], torch.tensor([mask, [1, 1, 1, 1]]))
    for kept in ([0, 1], [1], [2]):
        plan = cut(layout, [kept, kept])
        taken = plan.index[plan.visual_rows, plan.visual_columns]
        assert taken.tolist() == [*kept, *(i + 1 for i in kept)]
        assert not plan.padding[plan.visual_rows, plan.visual_columns].any()
        assert (plan.take(ids, PAD) == IMAGE).sum(1).tolist() == [len(kept)] * 2


@pytest.mark.parametrize(
    ("ids", "images", "words"),
    [
        ([[1, 2, 3]], 1, r"holds 0 .*\[0\] per row.*1 image\(s\) of 4.*need 4"),
        ([[9, 9, 9, 9]], 0, "holds 4 .*need 0"),
        ([[9, 9, 9, 9]], 2, "holds 4 .*need 8"),
        ([[9, 9, 9]], 1, "holds 3 .*need 4"),
        ([[9, 9, 9, 9, 9]], 1, "holds 5 .*need 4"),
        ([[9, 1, 1, 1], [9, 9, 9, 9]], 2, r"holds 5 .*\[1, 4\]"),
        ([[9, 9, 1], [1, 9, 9]], 1, "two rows"),
        ([[9, 9, 9, 9, 9], [9, 9, 9, 1, 1]], 2, "two rows"),
        ([[9, 9, 5, 9, 9]], 1, "follow one another"),
        ([[9, 9, 9, 9, 9, 9, 6, 9, 9]], 2, "follow one another"),
    ],
)
def test_counts_that_do_not_match_are_refused(
    ids: list[list[int]], images: int, words: str
) -> None:
    with pytest.raises(DataError, match=words):
        read(torch.tensor(ids), [4] * images)


def test_kinds_take_their_own_placeholders() -> None:
    """A video between two images, and an image in the next row; encoding order: images first."""
    kinds = torch.tensor([[1, 1, 0, 2, 2, 2, 1], [0, 0, 0, 0, 1, 1, 1]])
    layout = read_layout(kinds, [(1, 2), (1, 1), (1, 3), (2, 3)])
    assert layout.image_rows == (0, 0, 1, 0)
    assert layout.image_starts == (0, 6, 4, 3)
    assert layout.text_columns() == [[2], [0, 1, 2, 3]]
    with pytest.raises(DataError, match="holds 3 .*need 2"):
        read_layout(kinds, [(1, 2), (1, 1), (1, 3), (2, 2)])
    with pytest.raises(DataError, match="holds 3 .*need 0"):
        read_layout(kinds, [(1, 2), (1, 1), (1, 3)])


def test_text_lies_behind_the_last_picture() -> None:
    ids = torch.tensor([[0, 5, 9, 9, 6, 7], [3, 9, 9, 4, 9, 9], [0, 0, 0, 0, 8, 8]])
    layout = read(ids, [2, 2, 2], ids != PAD)
    assert layout.text_columns() == [[4, 5], [0, 3], [4, 5]]


def positions(row: list[int]) -> list[int]:
    seen, result = 0, []
    for on in row:
        result.append(seen if on else 0)
        seen += bool(on)
    return result


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.bool, torch.float32])
def test_positions_count_the_columns_that_are_on(dtype: torch.dtype) -> None:
    draw = torch.Generator().manual_seed(0)
    masks: list[Tensor] = [
        torch.tensor([[0, 0, 1, 1], [1, 1, 0, 0], [0, 0, 0, 0], [1, 0, 1, 1]]),
        *(torch.randint(0, 2, (3, n), generator=draw) for n in (1, 2, 17)),
        torch.zeros(2, 0),
    ]
    for mask in masks:
        found = positions_from_mask(mask.to(dtype))
        assert found.dtype == torch.int64
        assert found.tolist() == [positions(row) for row in mask.tolist()]
