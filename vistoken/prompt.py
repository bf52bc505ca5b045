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

    @property
    def pads_right(self) -> bool:
        """Whether some row is padded on the right."""
        return any(end < self.length for end in self.ends)


def read_layout(
    placeholders: Tensor, images: int, tokens: int, mask: Tensor | None = None
) -> Layout:
    """Split the placeholder positions of a batch into `images` images of `tokens` each.

    placeholders [B, L] bool; mask [B, L], 0 where padded (None: nothing is); both on the CPU.
    Images take placeholders in reading order, as the model scatters features. Raises `DataError`
    when the counts do not match, or when an image's placeholders are torn apart.
    """
    found = placeholders.nonzero()
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
    on = (mask != 0).int()
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


def shorten(layout: Layout, kept: Tensor) -> Shortening:
    """Plan the short prompt in which image i keeps only its visual tokens `kept[i]`.

    kept [I, K] int64 ascending, on the device of the prompt. Padding at the ends of the rows is
    dropped too; rows that end up shorter than the longest one are padded again, on the right if
    the long prompt was, else on the left. Everything but the picks themselves is planned on the
    CPU, while the device still computes them, and sent over in one piece.
    """
    plan, places = _plan(layout, kept.shape[1])
    packed = torch.cat([plan.flatten(), places.flatten()])
    if kept.is_cuda:  # from pageable memory a larger copy would wait for the device
        packed = packed.pin_memory()
    packed = packed.to(kept.device, non_blocking=True)
    base, padding, earlier = packed[: plan.numel()].view(plan.shape).unbind()
    visual_rows, visual_columns, starts = packed[plan.numel() :].view(places.shape).unbind()
    index = base.index_put((visual_rows, visual_columns), starts + kept)
    return Shortening(layout, index, padding.bool(), visual_rows, visual_columns, kept, earlier)


def _plan(layout: Layout, keep: int) -> tuple[Tensor, Tensor]:
    """The short prompt without the picks, on the CPU.

    Returns [3, B, S]: the long column of each short one (0 in padding, and any of its image's
    where a visual token goes), whether it is padding, and the tokens removed in earlier images;
    and [3, I, K]: row and short column of each kept token, and its image's first long column.
    """
    image_rows = torch.tensor(layout.image_rows, dtype=torch.long)
    image_starts = torch.tensor(layout.image_starts, dtype=torch.long)
    dropped = layout.tokens - keep
    column = torch.arange(layout.length)
    starts, ends = torch.tensor(layout.starts)[:, None], torch.tensor(layout.ends)[:, None]
    stays = (column >= starts) & (column < ends)
    surplus = image_starts[:, None] + torch.arange(keep, layout.tokens)
    stays[image_rows[:, None], surplus] = False  # the first `keep` hold the room for the picks
    place = stays.cumsum(1) - 1
    lengths = place[:, -1:] + 1
    short = int(lengths.max())
    if not layout.pads_right:
        place += short - lengths
    steps = torch.zeros(layout.rows, layout.length + 1, dtype=torch.long)
    removal = torch.tensor(dropped)
    steps.index_put_((image_rows, image_starts + layout.tokens), removal, accumulate=True)

    rows, columns = stays.nonzero(as_tuple=True)
    at = place[rows, columns]
    plan = torch.zeros(3, layout.rows, short, dtype=torch.long)
    plan[1] = 1
    plan[0, rows, at] = columns
    plan[1, rows, at] = 0
    plan[2, rows, at] = steps.cumsum(1)[rows, columns]
    room = place[image_rows, image_starts][:, None] + torch.arange(keep)
    places = torch.stack(
        [image_rows[:, None].expand_as(room), room, image_starts[:, None].expand_as(room)]
    )
    return plan, places


def positions_from_mask(mask: Tensor) -> Tensor:
    """Number the columns of a [B, L] mask that are on, from 0; masked columns get 0."""
    mask = mask.long()
    return (mask.cumsum(1) - 1).masked_fill(mask == 0, 0)
