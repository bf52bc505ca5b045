"""Shortens a prompt: removes placeholders of dropped visual tokens from ids, mask and positions.

The layout (which placeholder belongs to which picture) is read once from the token ids, before
anything is computed; from then on every length is known to the host and nothing waits for the
device. A layout describes the short prompt as well, so that it can be shortened again inside the
LLM.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from vistoken.errors import DataError


@dataclass(frozen=True)
class Layout:
    """Where the pictures lie in a batch of prompts.

    rows, length: the shape of the token ids. starts, ends: the columns between which each row is
    not padding. tokens: visual tokens of each picture. image_rows, image_starts: the row of each
    picture and the column of its first placeholder; the others follow it without a gap.
    """

    rows: int
    length: int
    starts: tuple[int, ...]
    ends: tuple[int, ...]
    tokens: tuple[int, ...]
    image_rows: tuple[int, ...]
    image_starts: tuple[int, ...]

    @property
    def images(self) -> int:
        """Number of pictures."""
        return len(self.image_rows)

    @property
    def pads_right(self) -> bool:
        """Whether some row is padded on the right."""
        return any(end < self.length for end in self.ends)

    def text_columns(self) -> list[list[int]]:
        """For each row the columns of the text behind its last picture.

        Where there is none, all columns of the row that are neither picture nor padding.
        """
        columns = []
        for row in range(self.rows):
            runs = [
                (start, start + count)
                for owner, start, count in zip(
                    self.image_rows, self.image_starts, self.tokens, strict=True
                )
                if owner == row
            ]
            last = max((end for _, end in runs), default=self.starts[row])
            found = list(range(last, self.ends[row]))
            if not found:
                taken = {column for start, end in runs for column in range(start, end)}
                every = range(self.starts[row], self.ends[row])
                found = [column for column in every if column not in taken]
            columns.append(found)
        return columns


def read_layout(
    kinds: Tensor, pictures: Sequence[tuple[int, int]], mask: Tensor | None = None
) -> Layout:
    """Give the placeholders of a batch to its pictures.

    kinds [B, L] int: 0 for text, else the number of the kind of picture a placeholder stands for;
    pictures: for each the number of its kind and its visual tokens; mask [B, L], 0 where padded
    (None: nothing is); all on the CPU. The pictures of one kind take its placeholders in reading
    order, as models scatter features. Raises `DataError` when the counts do not match, or when a
    picture's placeholders are torn apart.
    """
    count, length = kinds.shape
    rows: list[int] = [0] * len(pictures)
    columns: list[int] = [0] * len(pictures)
    most = max([int(kinds.max()) if kinds.numel() else 0, *(kind for kind, _ in pictures)])
    for kind in range(1, most + 1):
        numbers = [i for i, (own, _) in enumerate(pictures) if own == kind]
        found = (kinds == kind).nonzero()
        tokens = [pictures[i][1] for i in numbers]
        if not len(found) and not tokens:
            continue
        if len(found) != sum(tokens):
            raise DataError(_mismatch((kinds == kind).sum(1).tolist(), tokens))
        for number, (row, column) in zip(numbers, _first_of(found, tokens), strict=True):
            rows[number], columns[number] = row, column
    starts, ends = _unpadded(count, length, mask)
    for row, column, (_, size) in zip(rows, columns, pictures, strict=True):
        starts[row] = min(starts[row], column)  # a masked picture is no padding
        ends[row] = max(ends[row], column + size)
    sizes = tuple(size for _, size in pictures)
    return Layout(count, length, tuple(starts), tuple(ends), sizes, tuple(rows), tuple(columns))


def _mismatch(per_row: list[int], tokens: list[int]) -> str:
    each = f" of {tokens[0]} visual tokens" if len(set(tokens)) == 1 else ""
    return (
        f"The prompt holds {sum(per_row)} image placeholder tokens ({per_row} per row), but "
        f"{len(tokens)} image(s){each} need {sum(tokens)}. Write the image placeholder once per "
        "image in the prompt and let the processor expand it."
    )


def _first_of(found: Tensor, tokens: list[int]) -> list[list[int]]:
    """Row and column of the first placeholder of each picture.

    found [N, 2]: the placeholders, tokens[i] of them for picture i, which must follow one another.
    """
    owner, rank = _enumerate(torch.tensor(tokens, dtype=torch.long))
    first = found[(torch.tensor(tokens).cumsum(0) - torch.tensor(tokens))]
    torn = (found != first[owner] + torch.stack([torch.zeros_like(rank), rank], dim=1)).any(0)
    if bool(torn[0]):
        number = int(owner[(found[:, 0] != first[owner, 0]).nonzero()[0, 0]])
        raise DataError(
            f"An image's {tokens[number]} placeholder tokens spread over two rows of the batch: "
            "each row must hold a whole number of images."
        )
    if bool(torn[1]):
        number = int(owner[(found[:, 1] != first[owner, 1] + rank).nonzero()[0, 0]])
        raise DataError(
            f"An image's {tokens[number]} placeholder tokens do not follow one another; put "
            "nothing between the placeholders of one image."
        )
    return first.tolist()


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

    layout, short: of the long and of the short prompt. index [B, S] int64: the long column that
    each short column takes; padding columns, where `padding` [B, S] is True, take column 0 and
    are masked out; `padded` says whether there are any. visual_rows, visual_columns [T]: where
    each kept visual token lands in the short prompt, picture by picture. kept [T]: which of its
    picture's tokens it is. own [T]: how many tokens its picture keeps before it. earlier [B, S]:
    visual tokens removed before each short column, without those of the picture it belongs to.
    """

    layout: Layout
    short: Layout
    index: Tensor
    padding: Tensor
    padded: bool
    visual_rows: Tensor
    visual_columns: Tensor
    kept: Tensor
    own: Tensor
    earlier: Tensor

    @property
    def length(self) -> int:
        """Length S of the short prompt."""
        return self.short.length

    @property
    def removed(self) -> Tensor:
        """Visual tokens removed from each row, [B] int64 on the CPU."""
        gone = [0] * self.layout.rows
        for row, long, short in zip(
            self.layout.image_rows, self.layout.tokens, self.short.tokens, strict=True
        ):
            gone[row] += long - short
        return torch.tensor(gone)

    def take(self, values: Tensor, fill: int) -> Tensor:
        """Gather [..., B, L] values into the short prompt [..., B, S], `fill` in padding."""
        index = self.index.expand(*values.shape[:-1], -1)
        return values.gather(-1, index).masked_fill(self.padding, fill)

    def renumber(self, positions: Tensor) -> Tensor:
        """Close the gaps in positions [B, L] of the long prompt: the short ones [B, S]."""
        gaps = self.kept - self.own
        before = self.earlier.index_put((self.visual_rows, self.visual_columns), gaps, True)
        return self.take(positions, 0) - before.masked_fill(self.padding, 0)


def shorten(layout: Layout, kept: Tensor, counts: Sequence[int]) -> Shortening:
    """Plan the short prompt in which picture i keeps `counts[i]` of its visual tokens.

    kept [T] int64: the tokens that stay, picture by picture, ascending within each, on the device
    of the prompt. Padding at the ends of the rows is dropped too; rows that end up shorter than
    the longest one are padded again, on the right if the long prompt was, else on the left.
    Everything but the picks themselves is planned on the CPU, while the device still computes
    them, and sent over in one piece.
    """
    plan, places, short = _plan(layout, tuple(counts))
    padded = bool(plan[1].any())
    packed = torch.cat([plan.flatten(), places.flatten()])
    if kept.is_cuda:  # from pageable memory a larger copy would wait for the device
        packed = packed.pin_memory()
    packed = packed.to(kept.device, non_blocking=True)
    base, padding, earlier = packed[: plan.numel()].view(plan.shape).unbind()
    rows, columns, first, own = packed[plan.numel() :].view(places.shape).unbind()
    index = base.index_put((rows, columns), first + kept)
    return Shortening(
        layout, short, index, padding.bool(), padded, rows, columns, kept, own, earlier
    )


def _plan(layout: Layout, counts: tuple[int, ...]) -> tuple[Tensor, Tensor, Layout]:
    """The short prompt without the picks, on the CPU.

    Returns [3, B, S]: the long column of each short one (0 in padding, and any of its picture's
    where a visual token goes), whether it is padding, and the tokens removed in earlier pictures;
    [4, T]: row, short column, picture's first long column and rank of each kept token; and the
    layout of the short prompt.
    """
    with torch.device("cpu"):
        image_rows, image_starts = _longs(layout.image_rows), _longs(layout.image_starts)
        tokens, keep = _longs(layout.tokens), _longs(counts)
        column = torch.arange(layout.length)
        starts, ends = _longs(layout.starts)[:, None], _longs(layout.ends)[:, None]
        stays = (column >= starts) & (column < ends)
        owner, rank = _enumerate(tokens - keep)
        # the first `keep` of each picture hold the room for the picks
        stays[image_rows[owner], image_starts[owner] + keep[owner] + rank] = False
        place = stays.cumsum(1) - 1
        lengths = place[:, -1:] + 1
        length = int(lengths.max())
        shift = torch.zeros_like(lengths) if layout.pads_right else length - lengths
        place += shift
        gone = torch.zeros(layout.rows, layout.length + 1, dtype=torch.long)
        gone.index_put_((image_rows, image_starts + tokens), tokens - keep, accumulate=True)

        rows, columns = stays.nonzero(as_tuple=True)
        at = place[rows, columns]
        plan = torch.zeros(3, layout.rows, length, dtype=torch.long)
        plan[1] = 1
        plan[0, rows, at] = columns
        plan[1, rows, at] = 0
        plan[2, rows, at] = gone.cumsum(1)[rows, columns]
        first = place[image_rows, image_starts]
        owner, rank = _enumerate(keep)
        places = torch.stack([image_rows[owner], first[owner] + rank, image_starts[owner], rank])
    short = Layout(
        layout.rows,
        length,
        tuple(shift[:, 0].tolist()),
        tuple((shift + lengths)[:, 0].tolist()),
        counts,
        layout.image_rows,
        tuple(first.tolist()),
    )
    return plan, places, short


def _longs(values: Sequence[int]) -> Tensor:
    return torch.tensor(values, dtype=torch.long)


def _enumerate(counts: Tensor) -> tuple[Tensor, Tensor]:
    """For `counts[i]` items of each i: the i of every item, and its number among them."""
    owner = torch.arange(len(counts)).repeat_interleave(counts)
    return owner, torch.arange(len(owner)) - (counts.cumsum(0) - counts)[owner]


def positions_from_mask(mask: Tensor) -> Tensor:
    """Number the columns of a [B, L] mask that are on, from 0; masked columns get 0."""
    mask = mask.long()
    return (mask.cumsum(1) - 1).masked_fill(mask == 0, 0)
