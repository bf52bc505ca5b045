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
    not padding. image_rows: the row of each image. columns [I, N] int64 on the CPU: the columns of
    its placeholders, ascending.
    """

    rows: int
    length: int
    starts: tuple[int, ...]
    ends: tuple[int, ...]
    image_rows: tuple[int, ...]
    columns: Tensor

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
    rows = found[:, :, 0]
    if not bool((rows == rows[:, :1]).all()):
        raise DataError(
            f"An image's {tokens} placeholder tokens spread over two rows of the batch: each row "
            "must hold a whole number of images."
        )
    count, length = placeholders.shape
    starts, ends = _unpadded(count, length, mask)
    columns = found[:, :, 1].contiguous()
    return Layout(count, length, starts, ends, tuple(rows[:, 0].tolist()), columns)


def _unpadded(
    rows: int, length: int, mask: Tensor | None
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """First column and one past the last column that the mask has on, in every row."""
    if mask is None:
        return (0,) * rows, (length,) * rows
    on = (mask != 0).cpu().int()
    empty = on.sum(1) == 0
    starts = on.argmax(1).masked_fill(empty, 0)
    ends = (length - on.flip(1).argmax(1)).masked_fill(empty, length)
    return tuple(starts.tolist()), tuple(ends.tolist())


@dataclass(frozen=True)
class Shortening:
    """How the long prompt maps to the short one.

    index [B, S] int64: the long column that each short column takes; padding columns, where
    `padding` [B, S] is True, take column 0 and are masked out. visual_rows, visual_columns
    [I, K]: where each kept visual token lands in the short prompt. removed [B, L] int64: how many
    visual tokens were dropped up to each long column.
    """

    layout: Layout
    index: Tensor
    padding: Tensor
    visual_rows: Tensor
    visual_columns: Tensor
    removed: Tensor

    @property
    def length(self) -> int:
        """Length S of the short prompt."""
        return self.index.shape[1]

    def take(self, values: Tensor, fill: int) -> Tensor:
        """Gather [B, L] values into the short prompt [B, S], `fill` in padding columns."""
        return values.gather(1, self.index).masked_fill(self.padding, fill)


def shorten(layout: Layout, kept: Tensor, *, pad_left: bool = True) -> Shortening:
    """Plan the short prompt in which image i keeps only its visual tokens `kept[i]`.

    kept [I, K] int64 ascending, on the device of the prompt. Padding at the ends of the rows is
    dropped too; rows that end up shorter than the longest one are padded again, on the left or,
    with `pad_left=False`, on the right.
    """
    device = kept.device
    images, tokens = layout.columns.shape
    rows, length = layout.rows, layout.length
    columns = layout.columns.to(device, non_blocking=True)
    image_rows = torch.tensor(layout.image_rows)[:, None].to(device, non_blocking=True)

    stays = torch.ones(rows, length, dtype=torch.bool, device=device)
    stays[image_rows.expand(images, tokens), columns] = False
    kept_columns = columns.gather(1, kept)
    kept_rows = image_rows.expand_as(kept_columns)
    stays[kept_rows, kept_columns] = True

    removed = (~stays).cumsum(1)

    dropped = tokens - kept.shape[1]
    spans = list(zip(layout.starts, layout.ends, layout.images_per_row, strict=True))
    lengths = [end - start - dropped * count for start, end, count in spans]
    short = max(lengths)
    borders = torch.tensor(
        [
            [start, end, short - own if pad_left else 0]
            for (start, end, _), own in zip(spans, lengths, strict=True)
        ]
    ).to(device, non_blocking=True)
    column = torch.arange(length, device=device)
    stays &= (column >= borders[:, :1]) & (column < borders[:, 1:2])
    shift = borders[:, 2:]

    target = stays.cumsum(1) - 1 + shift
    slots = torch.where(stays, target, short)
    index = torch.full((rows, short + 1), -1, dtype=torch.long, device=device)
    index = index.scatter(1, slots, column.expand(rows, length))[:, :short]
    padding = index < 0
    return Shortening(
        layout,
        index.clamp(min=0),
        padding,
        kept_rows,
        target[kept_rows, kept_columns],
        removed,
    )


def positions_from_mask(mask: Tensor) -> Tensor:
    """Number the columns of a [B, L] mask that are on, from 0; masked columns get 0."""
    mask = mask.long()
    return (mask.cumsum(1) - 1).masked_fill(mask == 0, 0)
