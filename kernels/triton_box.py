"""Parts of the Triton kernels of grid attention: the tokens of a box, and which pairs are visible.

The tables are those of `vistoken.kernels.grid_plan`. Strides come as tuples
(batch, axis 0, axis 1, axis 2, head), and all offsets are int64.
"""

# Triton gives annotations of a kernel a meaning of its own.
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import triton
import triton.language as tl

_OPEN = tl.constexpr(0)
_BOUNDED = tl.constexpr(1)
_DISC = tl.constexpr(2)


@triton.jit
def lanes(T: tl.constexpr, H: tl.constexpr, W: tl.constexpr):
    """Coordinates of the tokens of a box of T x H x W within it."""
    lane = tl.arange(0, T * H * W)
    return lane // (H * W), (lane // W) % H, lane % W


@triton.jit
def offsets(t, h, w, strides):
    """Offsets of the tokens at (t, h, w)."""
    return t.to(tl.int64) * strides[1] + h.to(tl.int64) * strides[2] + w.to(tl.int64) * strides[3]


@triton.jit
def lane_offsets(t, h, w, strides, WIDE: tl.constexpr):
    """Offsets of the tokens of a box from its first; in 32 bits, fewer registers, unless WIDE."""
    sum_64 = offsets(t, h, w, strides)
    if WIDE:
        return sum_64
    else:
        return sum_64.to(tl.int32)


@triton.jit
def head_of(pointer, batch, head, strides):
    """The first token of one head of one batch entry."""
    return pointer + batch.to(tl.int64) * strides[0] + head.to(tl.int64) * strides[4]


@triton.jit
def _rows_of_table(tile, tiles, pitch):
    """Where the table holds the tile's part of each axis.

    pitch: (grid 3, counts of axes 1 and 2, kinds of axes 1 and 2, shifts 2, tiles of axis 0).
    """
    w = tile % pitch[4]
    h = (tile // pitch[4]) % pitch[3]
    t = tile // (pitch[4] * pitch[3])
    return (
        tiles + 3 * t,
        tiles + 3 * (pitch[9] + h),
        tiles + 3 * (pitch[9] + pitch[3] + w),
    )


@triton.jit
def find_boxes(tile, tiles, groups, pitch):
    """The first column of a tile along each axis, and its part of the lists of boxes."""
    row_t, row_h, row_w = _rows_of_table(tile, tiles, pitch)
    start_t = tl.load(row_t)
    start_h = tl.load(row_h)
    start_w = tl.load(row_w)
    group = (tl.load(row_t + 1) * pitch[5] + tl.load(row_h + 1)) * pitch[6] + tl.load(row_w + 1)
    first = tl.load(groups + 3 * group)
    masked = tl.load(groups + 3 * group + 1)
    full = tl.load(groups + 3 * group + 2)
    return start_t, start_h, start_w, first, masked, full


@triton.jit
def find_rows(tile, tiles, pitch, ROWS: tl.constexpr):
    """Coordinates of the rows of a tile, and which of them lie in the grid.

    Asked twice, before and after the loops over boxes, they are computed twice and take no
    registers in between: volatile loads are never merged.
    """
    row_t, row_h, row_w = _rows_of_table(tile, tiles, pitch)
    t, h, w = lanes(ROWS[0], ROWS[1], ROWS[2])
    t += tl.load(row_t + 2, volatile=True)
    h += tl.load(row_h + 2, volatile=True)
    w += tl.load(row_w + 2, volatile=True)
    return t, h, w, (t < pitch[0]) & (h < pitch[1]) & (w < pitch[2])


@triton.jit
def number_of(batch, t, h, w, head, heads, pitch):
    """Number of a (token, head) of a grid in memory without gaps."""
    token = ((batch.to(tl.int64) * pitch[0] + t) * pitch[1] + h) * pitch[2] + w
    return token * heads + head


@triton.jit
def box_of(entry, start_t, start_h, start_w, pitch, SIDES: tl.constexpr):
    """The numbers of a listed box along the axes, and its first column."""
    box_t = entry >> pitch[7]
    box_h = (entry >> pitch[8]) & ((1 << (pitch[7] - pitch[8])) - 1)
    box_w = entry & ((1 << pitch[8]) - 1)
    return (
        box_t,
        box_h,
        box_w,
        start_t + box_t * SIDES[0],
        start_h + box_h * SIDES[1],
        start_w + box_w * SIDES[2],
    )


@triton.jit
def _sight(limits, x, inside, length, start, HIDDEN: tl.constexpr, WORDS: tl.constexpr):
    """What the rows at x see along an axis: (lo, count), a word of bits from `start`, or x."""
    if HIDDEN == _BOUNDED:
        lo = tl.load(limits + x, mask=inside, other=0)
        hi = tl.load(limits + length + x, mask=inside, other=0)
        hi = tl.maximum(hi, lo)
        if WORDS > 0:
            WORD: tl.constexpr = tl.int64 if WORDS == 64 else tl.int32
            one = tl.full(x.shape, 1, WORD)
            lo = tl.where(inside, lo - start, 0).to(WORD)
            hi = tl.where(inside, hi - start, 0).to(WORD)
            return (one << hi) - (one << lo), x
        else:
            return lo, (hi - lo).to(tl.uint32, bitcast=True)
    else:
        return x, x


@triton.jit
def row_sight(
    limits,
    t,
    h,
    w,
    inside,
    start_t,
    start_h,
    start_w,
    pitch,
    HIDDEN: tl.constexpr,
    WORDS: tl.constexpr,
):
    """What each row sees along the three axes, in the form that `visible` reads."""
    a_t, b_t = _sight(limits, t, inside, pitch[0], start_t, HIDDEN[0], WORDS)
    limits += 2 * pitch[0]
    a_h, b_h = _sight(limits, h, inside, pitch[1], start_h, HIDDEN[1], WORDS)
    limits += 2 * pitch[1]
    a_w, b_w = _sight(limits, w, inside, pitch[2], start_w, HIDDEN[2], WORDS)
    return a_t, b_t, a_h, b_h, a_w, b_w


@triton.jit
def within(t, h, w, pitch, HIDDEN: tl.constexpr):
    """Which columns of a box lie in the grid; boxes do not stick out along an open axis."""
    inside = t == t
    if HIDDEN[0] != _OPEN:
        inside = inside & (t >= 0) & (t < pitch[0])
    if HIDDEN[1] != _OPEN:
        inside = inside & (h >= 0) & (h < pitch[1])
    if HIDDEN[2] != _OPEN:
        inside = inside & (w >= 0) & (w < pitch[2])
    return inside


@triton.jit
def _bits(word, number, SIDE: tl.constexpr, SHIFT: tl.constexpr):
    """The bits of box `number` of a row's word, moved to its place."""
    MASK: tl.constexpr = -1 if SIDE >= 32 else (1 << SIDE) - 1  # of 32 bits
    return ((word >> (number * SIDE)).to(tl.int32) & MASK) << SHIFT


@triton.jit
def visible(
    sight,
    box_t,
    box_h,
    box_w,
    lane_t,
    lane_h,
    lane_w,
    t,
    h,
    w,
    inside,
    radius,
    SIDES: tl.constexpr,
    HIDDEN: tl.constexpr,
    WORDS: tl.constexpr,
):
    """Which pairs [rows, columns] of a box are visible.

    box_*: number of the box; lane_*, t, h, w: coordinates of its columns in the box and the grid;
    inside: whether they are in the grid.
    """
    if WORDS > 0:
        # one bit per coordinate of the box: the row's say what it sees, the column's where it is
        place = tl.zeros(lane_t.shape, tl.int32)
        word = tl.zeros(sight[1].shape, tl.int32)
        if HIDDEN[0] == _BOUNDED:
            place |= tl.full(lane_t.shape, 1, tl.int32) << lane_t
            word |= _bits(sight[0], box_t, SIDES[0], 0)
        if HIDDEN[1] == _BOUNDED:
            SHIFT_H: tl.constexpr = SIDES[0] if HIDDEN[0] == _BOUNDED else 0
            place |= tl.full(lane_t.shape, 1 << SHIFT_H, tl.int32) << lane_h
            word |= _bits(sight[2], box_h, SIDES[1], SHIFT_H)
        if HIDDEN[2] == _BOUNDED:
            SHIFT_T: tl.constexpr = SIDES[0] if HIDDEN[0] == _BOUNDED else 0
            SHIFT_W: tl.constexpr = SHIFT_T + (SIDES[1] if HIDDEN[1] == _BOUNDED else 0)
            place |= tl.full(lane_t.shape, 1 << SHIFT_W, tl.int32) << lane_w
            word |= _bits(sight[4], box_w, SIDES[2], SHIFT_W)
        return (place[None, :] & ~word[:, None]) == 0
    else:
        seen = tl.full([1, 1], 1, tl.int1)  # a window of bounds lies in the grid anyway
        if HIDDEN[0] == _DISC or HIDDEN[1] == _DISC or HIDDEN[2] == _DISC:
            distance = tl.zeros([1, 1], tl.int32)
            if HIDDEN[0] == _DISC:
                distance = distance + _square(sight[0], t)
            if HIDDEN[1] == _DISC:
                distance = distance + _square(sight[2], h)
            if HIDDEN[2] == _DISC:
                distance = distance + _square(sight[4], w)
            seen = distance < tl.where(inside, radius * radius, 0)[None, :]
        if HIDDEN[0] == _BOUNDED:
            seen = seen & _between(t, sight[0], sight[1])
        if HIDDEN[1] == _BOUNDED:
            seen = seen & _between(h, sight[2], sight[3])
        if HIDDEN[2] == _BOUNDED:
            seen = seen & _between(w, sight[4], sight[5])
        return seen


@triton.jit
def _between(x, lo, count):
    return (x[None, :] - lo[:, None]).to(tl.uint32, bitcast=True) < count[:, None]


@triton.jit
def _square(row, column):
    gap = row[:, None] - column[None, :]
    return gap * gap
