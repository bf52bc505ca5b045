"""How the Hopper kernels walk a grid: tiles in turns, the boxes of a tile, and what is seen.

A tile is 128 rows, a box is a tile of columns. Forwards and for the gradient of queries the rows
are queries; for those of keys and values they are keys, and the tables hold inverse windows. Rows
that see every column (global queries, extra keys) have tiles of their own, and columns that every
row sees come before the boxes.

Tables, int32: lo and hi of every row of the three axes, then the first column and the number of
boxes of every tile of them.
"""

# Triton gives annotations of a kernel a meaning of its own.
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from vistoken.kernels.hopper_tile import MASKED

# Off the grid of a disc, whose sides are at most 8192: every squared distance fits 31 bits, those
# on the grid stay below EVERYWHERE, and FAR is no nearer than that to any place.
FAR = gl.constexpr(24576)
EVERYWHERE = gl.constexpr(1 << 28)


@gluon.jit
def tile_of_turn(k, plan, GLOBALS: gl.constexpr):
    """The k-th tile of this program: tiles go round in turns.

    Global queries see every key, so their tiles are long and come first; the programs that have
    one more of them than the others sit out the first rounds of the rest.
    """
    program = gl.program_id(0)
    programs = gl.num_programs(0)
    index = k * programs + program
    if GLOBALS:
        n_global = plan[1]
        late = n_global % programs
        rounds = plan[7]
        mine = n_global // programs + gl.where(program < late, 1, 0)
        j = k - mine
        skipped = gl.where(program < late, 0, rounds)
        place = gl.where(
            j < skipped,
            j * (programs - late) + program - late,
            rounds * (programs - late) + (j - skipped) * programs + program,
        )
        index = gl.where(k < mine, index, n_global + place)
    return index


@gluon.jit
def decode_tile(index, plan, GLOBALS: gl.constexpr):
    """Decode a program's tile: batch and head, and its place among the tiles of a head."""
    n_tiles, n_global, per_head, global_tiles, tiles_t, tiles_h, tiles_w, rounds = plan
    is_global = False
    per = per_head
    if GLOBALS:
        is_global = index < n_global
        index = gl.where(is_global, index, index - n_global)
        per = gl.where(is_global, global_tiles, per_head)
    plane = index // per
    place = index - plane * per
    row = gl.where(is_global, 0, place // tiles_w)
    t = row // tiles_h
    return is_global, plane, place, t, row - t * tiles_h, place - row * tiles_w


@gluon.jit
def _keys(tables, tiles_before, tiles, total, length, is_global, place, SIZE: gl.constexpr):
    """The first key of a tile's boxes along an axis, and the key after the last box."""
    start = 0
    boxes = (length + SIZE - 1) // SIZE
    if not is_global:
        start = gl.load(tables + 2 * total + tiles_before + place)
        boxes = gl.load(tables + 2 * total + tiles + tiles_before + place)
    return start, boxes, start + boxes * SIZE


@gluon.jit
def _shared(tables, before, total, length, is_global, first, SIZE: gl.constexpr):
    """The keys [lo, hi) of an axis that each of the queries first .. first + SIZE sees."""
    lo = 0
    hi = length
    if not is_global:
        first = gl.minimum(first, length - 1)
        lo = gl.load(tables + before + gl.minimum(first + SIZE, length) - 1)
        hi = gl.load(tables + total + before + first)
    return lo, hi


@gluon.jit
def columns_of(tables, shape, plan, is_global, t, h, w, KBOX: gl.constexpr):
    """The boxes of keys of a tile: first keys, ends of the last two axes, number of boxes."""
    T, H, W, heads, group = shape
    n_tiles, n_global, per_head, global_tiles, tiles_t, tiles_h, tiles_w, rounds = plan
    total = T + H + W
    tiles = tiles_t + tiles_h + tiles_w
    lo_t, n_t, hi_t = _keys(tables, 0, tiles, total, T, is_global, t, KBOX[0])
    lo_h, n_h, hi_h = _keys(tables, tiles_t, tiles, total, H, is_global, h, KBOX[1])
    lo_w, n_w, hi_w = _keys(tables, tiles_t + tiles_h, tiles, total, W, is_global, w, KBOX[2])
    return lo_t, lo_h, hi_h, lo_w, hi_w, n_t * n_h * n_w


@gluon.jit
def next_box(t, h, w, lo_h, hi_h, lo_w, hi_w, KBOX: gl.constexpr):
    """The key box after the one at (t, h, w), the last axis fastest."""
    w += KBOX[2]
    over = w >= hi_w
    w = gl.where(over, lo_w, w)
    h = gl.where(over, h + KBOX[1], h)
    over = h >= hi_h
    h = gl.where(over, lo_h, h)
    t = gl.where(over, t + KBOX[0], t)
    return t, h, w


@gluon.jit
def hide_unseen(
    s, i, t, h, w, n_extra, N_EXTRA, windows, inner, ends, place, column,
    KBOX: gl.constexpr, HALF: gl.constexpr, DISC: gl.constexpr,
):  # fmt: skip
    """Mask the scores of box i where a row does not see a column; a box seen whole is left.

    Returns the scores and the place of the next box.
    """
    row_t, row_n_t, row_h, row_n_h, row_w, row_n_w = windows
    in_lo_t, in_hi_t, in_lo_h, in_hi_h, in_lo_w, in_hi_w = inner
    lo_h, hi_h, lo_w, hi_w = ends
    h0, w0, H, W, limit = place
    HT: gl.constexpr = HALF[0]
    HH: gl.constexpr = HALF[1]
    HW: gl.constexpr = HALF[2]
    KT: gl.constexpr = KBOX[0]
    KH: gl.constexpr = KBOX[1]
    KW: gl.constexpr = KBOX[2]
    BLOCK: gl.constexpr = KT * KH * KW
    if i < n_extra:
        if i * BLOCK + BLOCK > N_EXTRA:
            s = gl.where((column < N_EXTRA - i * BLOCK)[None, :], s, MASKED)
    else:
        inside = (t >= in_lo_t) & (t + KT <= in_hi_t) & (h >= in_lo_h)
        inside = inside & (h + KH <= in_hi_h) & (w >= in_lo_w) & (w + KW <= in_hi_w)
        if DISC:
            far_h = gl.maximum(h0 + HH - 1 - h, h + KH - 1 - h0)
            far_w = gl.maximum(w0 + HW - 1 - w, w + KW - 1 - w0)
            inside = inside & (far_h * far_h + far_w * far_w < limit)
        if not inside:
            key_t = t + column // (KH * KW)
            key_h = h + column // KW % KH
            key_w = w + column % KW
            if DISC:
                # what is not on the grid is far from everything
                key_h = gl.where((key_h >= 0) & (key_h < H), key_h, FAR)
                key_w = gl.where((key_w >= 0) & (key_w < W), key_w, FAR)
                gap_h = key_h[None, :] - row_h[:, None]
                gap_w = key_w[None, :] - row_w[:, None]
                seen = gap_w * gap_w < limit - gap_h * gap_h
            else:
                seen = (key_w[None, :] - row_w[:, None]).to(gl.uint32) < row_n_w[:, None]
                if KH > 1 or HH > 1:
                    one = (key_h[None, :] - row_h[:, None]).to(gl.uint32) < row_n_h[:, None]
                    seen = seen & one
                if KT > 1 or HT > 1:
                    one = (key_t[None, :] - row_t[:, None]).to(gl.uint32) < row_n_t[:, None]
                    seen = seen & one
            s = gl.where(seen, s, MASKED)
        t, h, w = next_box(t, h, w, lo_h, hi_h, lo_w, hi_w, KBOX)
    return s, t, h, w


@gluon.jit
def _row_windows(tables, start, length, total, is_global, row):
    """The first key and the number of keys that each query of an axis sees."""
    row = gl.minimum(row, length - 1)
    lo = gl.load(tables + start + row)
    hi = gl.load(tables + total + start + row)
    lo = gl.where(is_global, 0, lo)
    hi = gl.where(is_global, length, hi)
    return lo, (hi - lo).to(gl.uint32)


@gluon.jit
def corner_of(
    is_global, place, tile_t, tile_h, tile_w, GROUP: gl.constexpr,
    RBOX: gl.constexpr, HALF: gl.constexpr,
):  # fmt: skip
    """Where a warpgroup's half of a tile begins."""
    t0 = gl.where(
        is_global, place * 128 + GROUP * 64, tile_t * RBOX[0] + GROUP * (RBOX[0] - HALF[0])
    )
    h0 = tile_h * RBOX[1] + GROUP * (RBOX[1] - HALF[1])
    w0 = tile_w * RBOX[2] + GROUP * (RBOX[2] - HALF[2])
    return t0, h0, w0


@gluon.jit
def windows_of(
    tables, shape, is_global, t0, h0, w0, row, radius, HALF: gl.constexpr, DISC: gl.constexpr
):
    """What 64 rows at (t0, h0, w0) see: row by row, all of them alike, and where they are."""
    T, H, W, heads, group = shape
    HH: gl.constexpr = HALF[1]
    HW: gl.constexpr = HALF[2]
    total = T + H + W
    in_lo_t, in_hi_t = _shared(tables, 0, total, T, is_global, t0, HALF[0])
    in_lo_h, in_hi_h = _shared(tables, T, total, H, is_global, h0, HH)
    in_lo_w, in_hi_w = _shared(tables, T + H, total, W, is_global, w0, HW)
    row_t = t0 + row // (HH * HW)
    row_h = h0 + row // HW % HH
    row_w = w0 + row % HW
    lo_t, n_t = _row_windows(tables, 0, T, total, is_global, row_t)
    lo_h, n_h = _row_windows(tables, T, H, total, is_global, row_h)
    lo_w, n_w = _row_windows(tables, T + H, W, total, is_global, row_w)
    limit = radius * radius
    if DISC:
        # places instead of first columns; a row that sees everything sees as far as the grid goes
        limit = gl.where(is_global, EVERYWHERE, limit)
        lo_h = gl.where(is_global, 0, row_h)
        lo_w = gl.where(is_global, 0, row_w)
        h0 = gl.where(is_global, 0, h0)
        w0 = gl.where(is_global, 0, w0)
    windows = (lo_t, n_t, lo_h, n_h, lo_w, n_w)
    inner = (in_lo_t, in_hi_t, in_lo_h, in_hi_h, in_lo_w, in_hi_w)
    return windows, inner, (h0, w0, H, W, limit), row_t, row_h, row_w
