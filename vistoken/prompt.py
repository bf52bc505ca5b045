"""Shortens a prompt: removes placeholders of dropped visual tokens from ids, mask and positions.

The layout (which placeholder belongs to which image) is read once from the token ids, before
anything is computed; from then on every length is known to the host and nothing waits for the
device.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from vistoken.errors import DataError


@dataclass(frozen=True)
class Layout:
    """Where the images lie in a batch of prompts.

    rows, length: the shape of the token ids. starts, ends: the columns between which each row is
    not padding. tokens: visual tokens per image. image_rows, image_starts: the row of each image
    and the column of its first placeholder; the others follow it without a gap.
    """

    rows: int
    length: int
    starts: tuple[int, ...]
    ends: tuple[int, ...]
    tokens: int
    image_rows: tuple[int, ...]
    image_starts: tuple[int, ...]

    @property
    def images_per_row(self) -> list[int]:
        """Number of images in each row."""
        return [self.image_rows.count(row) for row in range(self.rows)]


def read_layout(
    placeholders: Tensor, images: int, tokens: int, mask: Tensor | None = None
) -> Layout:
    """Split the placeholder positions of a batch into `images` images of `tokens` each.

    placeholders [B, L] bool; mask [B, L], 0 where padded (None: nothing is). Images take
    placeholders in reading order, as the model scatters features. Raises `DataError` when the
    counts do not match or an image would span two rows.
    """
    found = placeholders.nonzero().cpu()
    if len(found) != images * tokens:
        per_row = placeholders.sum(1).tolist()
        raise DataError(
            f"The prompt holds {len(found)} image placeholder tokens ({per_row} per row), but "
            f"{images} image(s) of {tokens} visual tokens need {images * tokens}. Write the image "
            "placeholder once per image in the prompt and let the processor expand it."
        )
    found = found.reshape(images, tokens, 2)
    first, steps = found[:, :1], torch.arange(tokens)
    if not bool((found[:, :, 0] == first[:, :, 0]).all()):
        raise DataError(
            f"An image's {tokens} placeholder tokens spread over two rows of the batch: each row "
            "must hold a whole number of images."
        )
    if not bool((found[:, :, 1] == first[:, :, 1] + steps).all()):
        raise DataError(
            f"An image's {tokens} placeholder tokens do not follow one another; put nothing "
            "between the placeholders of one image."
        )
    count, length = placeholders.shape
    rows, columns = (tuple(first[:, 0, axis].tolist()) for axis in (0, 1))
    starts, ends = _unpadded(count, length, mask)
    for row, column in zip(rows, columns, strict=True):  # a masked image is no padding
        starts[row] = min(starts[row], column)
        ends[row] = max(ends[row], column + tokens)
    return Layout(count, length, tuple(starts), tuple(ends), tokens, rows, columns)


def _unpadded(rows: int, length: int, mask: Tensor | None) -> tuple[list[int], list[int]]:
    """First column and one past the last column that the mask has on, in every row."""
    if mask is None:
        return [0] * rows, [length] * rows
    on = (mask != 0).cpu().int()
    empty = on.sum(1) == 0
    starts = on.argmax(1).masked_fill(empty, 0)
    ends = (length - on.flip(1).argmax(1)).masked_fill(empty, length)
    return starts.tolist(), ends.tolist()


@dataclass(frozen=True)
class Shortening:
    """How the long prompt maps to the short one.

    index [B, S] int64: the long column that each short column takes; padding columns, where
    `padding` [B, S] is True, take column 0 and are masked out. visual_rows, visual_columns
    [I, K]: where each kept visual token lands in the short prompt. kept [I, K]: which of its
    image's tokens it is. earlier [B, S]: visual tokens removed before each short column, without
    those of the image it belongs to.
    """

    layout: Layout
    index: Tensor
    padding: Tensor
    visual_rows: Tensor
    visual_columns: Tensor
    kept: Tensor
    earlier: Tensor

    @property
    def length(self) -> int:
        """Length S of the short prompt."""
        return self.index.shape[1]

    @property
    def removed(self) -> Tensor:
        """Visual tokens removed from each row, [B] int64 on the CPU."""
        return torch.tensor(self.layout.images_per_row) * (self.layout.tokens - self.kept.shape[1])

    def take(self, values: Tensor, fill: int) -> Tensor:
        """Gather [B, L] values into the short prompt [B, S], `fill` in padding columns."""
        return values.gather(1, self.index).masked_fill(self.padding, fill)

    def renumber(self, positions: Tensor) -> Tensor:
        """Close the gaps in positions [B, L] of the long prompt: the short ones [B, S]."""
        own = self.kept - torch.arange(self.kept.shape[1], device=self.kept.device)
        before = self.earlier.index_put((self.visual_rows, self.visual_columns), own, True)
        return self.take(positions, 0) - before.masked_fill(self.padding, 0)


def shorten(layout: Layout, kept: Tensor, *, pad_left: bool = True) -> Shortening:
    """Plan the short prompt in which image i keeps only its visual tokens `kept[i]`.

    kept [I, K] int64 ascending, on the device of the prompt. Padding at the ends of the rows is
    dropped too; rows that end up shorter than the longest one are padded again, on the left or,
    with `pad_left=False`, on the right. Everything but the picks themselves is planned on the
    CPU, while the device still computes them, and sent over in one piece.
    """
    images, keep = kept.shape
    rows = [_plan_row(layout, row, keep) for row in range(layout.rows)]
    short = max(len(row.columns) for row in rows)
    plan = torch.zeros(3, layout.rows, short, dtype=torch.long)  # column, padding, earlier
    plan[1] = 1
    places = torch.zeros(3, images, keep, dtype=torch.long)  # row, short column, first long column
    places[0] = torch.tensor(layout.image_rows)[:, None]
    places[2] = torch.tensor(layout.image_starts)[:, None]
    for number, row in enumerate(rows):
        start = short - len(row.columns) if pad_left else 0
        filled = slice(start, start + len(row.columns))
        plan[0, number, filled] = row.columns
        plan[1, number, filled] = 0
        plan[2, number, filled] = row.earlier
        for image, first in row.images:
            places[1, image] = torch.arange(first + start, first + start + keep)
    packed = torch.cat([plan.flatten(), places.flatten()])
    if kept.is_cuda:  # from pageable memory a larger copy would wait for the device
        packed = packed.pin_memory()
    packed = packed.to(kept.device, non_blocking=True)
    base, padding, earlier = packed[: plan.numel()].view(plan.shape).unbind()
    visual_rows, visual_columns, starts = packed[plan.numel() :].view(places.shape).unbind()
    index = base.index_put((visual_rows, visual_columns), starts + kept)
    return Shortening(layout, index, padding.bool(), visual_rows, visual_columns, kept, earlier)


@dataclass(frozen=True)
class _Row:
    """One row of the short prompt without padding: its long columns, with room for its images.

    images: (image, first short column) pairs. earlier: tokens removed in earlier images.
    """

    columns: Tensor
    earlier: Tensor
    images: list[tuple[int, int]]


def _plan_row(layout: Layout, row: int, keep: int) -> _Row:
    columns, earlier, images = [], [], []
    cursor, length, removed = layout.starts[row], 0, 0
    own = [image for image, at in enumerate(layout.image_rows) if at == row]
    for image in own:
        start = layout.image_starts[image]
        columns += [torch.arange(cursor, start), torch.arange(start, start + keep)]
        earlier += [torch.full((start - cursor + keep,), removed)]
        length += start - cursor
        images.append((image, length))
        length += keep
        cursor, removed = start + layout.tokens, removed + layout.tokens - keep
    columns.append(torch.arange(cursor, layout.ends[row]))
    earlier.append(torch.full((layout.ends[row] - cursor,), removed))
    return _Row(torch.cat(columns), torch.cat(earlier), images)


def positions_from_mask(mask: Tensor) -> Tensor:
    """Number the columns of a [B, L] mask that are on, from 0; masked columns get 0."""
    mask = mask.long()
    return (mask.cumsum(1) - 1).masked_fill(mask == 0, 0)
