"""Pictures of what a pruning method kept: kept patches lit, the rest dimmed, with captions.

Everything takes and returns Pillow images; Pillow is imported when a picture is first drawn.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from vistoken.errors import BackendUnavailable, DataError

if TYPE_CHECKING:
    from PIL import Image

Box = tuple[float, float, float, float]

_INK, _PALE, _PAPER, _NIGHT = (28, 32, 38), (104, 112, 122), (255, 255, 255), (16, 18, 24)
_TONES = {"plain": _INK, "pale": _PALE, "good": (18, 120, 62), "bad": (190, 38, 34)}
_LEAST_PATCH = 6  # pixels: smaller patches cannot be told apart
_GAP = 10


def pillow() -> Any:
    """Return `PIL.Image`, or raise BackendUnavailable with the extra to install."""
    try:
        from PIL import Image
    except ImportError as error:
        raise BackendUnavailable(
            "Pictures need Pillow: install it with `pip install 'vistoken[viz]'`."
        ) from error
    return Image


def open_picture(path: str | Path) -> Image.Image:
    """Read an image file as RGB, turned the way its camera was held, on white where transparent.

    Raises `DataError` for a path that does not exist and for a file that is not an image.
    """
    image = pillow()
    from PIL import ImageOps

    if not Path(path).is_file():
        raise DataError(f"There is no image file {str(path)!r}.")
    try:
        with image.open(path) as opened:
            return _rgb(ImageOps.exif_transpose(opened))
    except (OSError, SyntaxError, ValueError, image.DecompressionBombError) as error:
        raise DataError(f"{str(path)!r} is not an image that Pillow can read: {error}.") from error


def save_picture(picture: Image.Image, path: str | Path) -> None:
    """Write a picture in the format of the file name; raises `DataError` if that cannot be."""
    check_picture_path(path)
    try:
        picture.save(path)
    except OSError as error:
        raise DataError(f"The picture cannot be written to {str(path)!r}: {error}.") from error


def check_picture_path(path: str | Path) -> None:
    """Raise `DataError` unless `path` lies in a folder that exists and names an image format."""
    image = pillow()
    path = Path(path)
    image.init()
    writable = sorted(
        end for end, name in image.registered_extensions().items() if name in image.SAVE
    )
    if path.suffix.lower() not in writable:
        raise DataError(
            f"{str(path)!r} does not end like an image file; use .png, .jpg or another of "
            f"{', '.join(writable)}."
        )
    if not path.parent.is_dir():
        raise DataError(f"There is no folder {str(path.parent)!r} to write {path.name} to.")


def seen_box(size: tuple[int, int], image_processor: Any = None) -> Box:
    """Return the part (left, top, right, bottom) of a picture of `size` that the model sees.

    `size` is (width, height) in pixels. `image_processor` is read for what transformers' image
    processors have: `do_pad` (to a square), `do_resize` with `size`, `do_center_crop` with
    `crop_size`. The box lies partly outside the picture where the processor pads. Without a
    processor it is the whole picture.
    """
    width, height = (float(side) for side in size)
    left = top = 0.0
    if getattr(image_processor, "do_pad", None):
        side = max(width, height)
        left, top = (width - side) / 2, (height - side) / 2
        width = height = side
    scaled_width, scaled_height = _resized(width, height, image_processor)
    across, down = width / scaled_width, height / scaled_height
    crop = getattr(image_processor, "crop_size", None)
    if getattr(image_processor, "do_center_crop", None) and crop:
        left += (scaled_width - crop["width"]) / 2 * across
        top += (scaled_height - crop["height"]) / 2 * down
        width, height = crop["width"] * across, crop["height"] * down
    return left, top, left + width, top + height


def _resized(width: float, height: float, image_processor: Any) -> tuple[float, float]:
    target = getattr(image_processor, "size", None)
    if not getattr(image_processor, "do_resize", None) or not target:
        return width, height
    if target.get("shortest_edge"):
        scale = target["shortest_edge"] / min(width, height)
        return width * scale, height * scale
    if target.get("width") and target.get("height"):
        return float(target["width"]), float(target["height"])
    return width, height


def draw_kept(
    picture: Image.Image,
    kept: Tensor | Iterable[int],
    grid: tuple[int, int],
    *,
    box: Box | None = None,
) -> Image.Image:
    """Draw a picture with its kept visual tokens lit and everything else dimmed.

    kept: raster indices into the grid of (rows, columns), such as `Attachment.report().kept[i]`.
    box: the part of the picture that the grid covers (see `seen_box`), by default all of it.
    Returns an RGB image of the picture's size, or enlarged where a patch would be too small to see.
    Raises `DataError` for indices outside the grid.
    """
    image = pillow()
    if not isinstance(picture, image.Image):
        raise DataError(f"Expected a PIL image, got {type(picture).__name__}.")
    rows, columns = grid
    indices = _checked(kept, rows * columns)
    box = box or (0.0, 0.0, float(picture.width), float(picture.height))
    patch = min((box[2] - box[0]) / columns, (box[3] - box[1]) / rows)
    times = max(1, -int(-_LEAST_PATCH // patch))
    lit = _rgb(picture)
    if times > 1:
        lit = lit.resize((lit.width * times, lit.height * times), image.Resampling.NEAREST)
        box = (box[0] * times, box[1] * times, box[2] * times, box[3] * times)
    mask = _mask(lit.size, indices, grid, box)
    gray = lit.convert("L").convert("RGB")
    drawn = image.composite(lit, image.blend(gray, image.new("RGB", lit.size, _NIGHT), 0.75), mask)
    # A faint edge tells a dark patch that was kept from a dimmed one.
    bright = image.blend(drawn, image.new("RGB", lit.size, _PAPER), 0.45)
    return image.composite(bright, drawn, _edge(mask))


def _edge(mask: Image.Image) -> Image.Image:
    """The pixels inside the lit regions of a mask that touch its dark part."""
    from PIL import ImageChops, ImageFilter

    return ImageChops.subtract(mask, mask.filter(ImageFilter.MinFilter(3)))


def _mask(
    size: tuple[int, int], indices: Sequence[int], grid: tuple[int, int], box: Box
) -> Image.Image:
    """An "L" image that is 255 where a kept patch lies."""
    from PIL import ImageDraw

    rows, columns = grid
    xs = [round(box[0] + (box[2] - box[0]) * c / columns) for c in range(columns + 1)]
    ys = [round(box[1] + (box[3] - box[1]) * r / rows) for r in range(rows + 1)]
    mask = pillow().new("L", size)
    pen = ImageDraw.Draw(mask)
    for index in indices:
        row, column = divmod(index, columns)
        pen.rectangle((xs[column], ys[row], xs[column + 1] - 1, ys[row + 1] - 1), fill=255)
    return mask


def _checked(kept: Tensor | Iterable[int], tokens: int) -> list[int]:
    values = kept.flatten().tolist() if isinstance(kept, Tensor) else list(kept)
    for value in values:
        if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < tokens:
            raise DataError(
                f"Kept tokens must be whole numbers from 0 to {tokens - 1} (the grid has {tokens} "
                f"tokens), got {value!r}."
            )
    return values


def _rgb(picture: Image.Image) -> Image.Image:
    if picture.mode == "RGB":
        return picture.copy()
    if picture.has_transparency_data:
        over = picture.convert("RGBA")
        white = pillow().new("RGBA", over.size, (255, 255, 255, 255))
        return pillow().alpha_composite(white, over).convert("RGB")
    if picture.mode.startswith(("I", "F")):  # more than 8 bits: convert() would clip, not scale
        band = picture.convert("F")
        extrema: Any = band.getextrema()
        scale = 255 / max(extrema[1] - extrema[0], 1e-9)
        picture = band.point(lambda value: value * scale - extrema[0] * scale).convert("L")
    return picture.convert("RGB")


@dataclass(frozen=True)
class Tile:
    """One picture with words under it; `tone` is plain, pale, good or bad."""

    picture: Image.Image
    caption: str
    tone: str = "plain"


@dataclass(frozen=True)
class Panel:
    """Tiles side by side under a common title."""

    title: str
    tiles: Sequence[Tile]


def draw_sheet(
    panels: Sequence[Panel], *, heading: str = "", columns: int = 2, tile: int = 256
) -> Image.Image:
    """Lay panels out on white, `columns` in a row; every picture is fitted into `tile` pixels.

    Titles take one line and captions at most two; what is longer ends with an ellipsis.
    """
    if not panels or not all(panel.tiles for panel in panels):
        raise DataError("A sheet needs at least one panel, and every panel a picture.")
    top = [_strip(heading, 24, len(panels[0].tiles) * tile * min(columns, len(panels)))]
    drawn = [_panel(panel, tile) for panel in panels]
    rows = [_beside(drawn[i : i + columns], 3 * _GAP) for i in range(0, len(drawn), columns)]
    return _framed(_above([*(top if heading else []), *rows], 2 * _GAP), 2 * _GAP)


def _panel(panel: Panel, tile: int) -> Image.Image:
    """The title, then the pictures, each with its caption below."""
    from PIL import ImageOps

    image = pillow()
    cells = []
    fitted = [
        ImageOps.contain(entry.picture, (tile, tile), image.Resampling.LANCZOS)
        for entry in panel.tiles
    ]
    height = max(picture.height for picture in fitted)
    for entry, picture in zip(panel.tiles, fitted, strict=True):
        place = image.new("RGB", (tile, height), _PAPER)
        place.paste(picture, (0, (height - picture.height) // 2))
        caption = _strip(entry.caption, 16, tile, lines=2, color=_TONES[entry.tone])
        cells.append(_above([place, caption], 4))
    row = _beside(cells, _GAP)
    return _above([_strip(panel.title, 18, row.width), row], 4) if panel.title else row


def _beside(pictures: Sequence[Image.Image], gap: int) -> Image.Image:
    width = sum(picture.width + gap for picture in pictures) - gap
    sheet = pillow().new("RGB", (width, max(picture.height for picture in pictures)), _PAPER)
    x = 0
    for picture in pictures:
        sheet.paste(picture, (x, 0))
        x += picture.width + gap
    return sheet


def _above(pictures: Sequence[Image.Image], gap: int) -> Image.Image:
    height = sum(picture.height + gap for picture in pictures) - gap
    sheet = pillow().new("RGB", (max(picture.width for picture in pictures), height), _PAPER)
    y = 0
    for picture in pictures:
        sheet.paste(picture, (0, y))
        y += picture.height + gap
    return sheet


def _framed(picture: Image.Image, gap: int) -> Image.Image:
    size = (picture.width + 2 * gap, picture.height + 2 * gap)
    sheet = pillow().new("RGB", size, _PAPER)
    sheet.paste(picture, (gap, gap))
    return sheet


def _strip(
    text: str, size: int, width: int, *, lines: int = 1, color: tuple[int, int, int] = _INK
) -> Image.Image:
    """A strip `width` pixels wide with text in at most `lines` lines."""
    from PIL import ImageDraw, ImageFont

    font = ImageFont.load_default(size)
    written = _wrap(text, lines, lambda line: font.getlength(line) <= width)
    step = round(1.3 * size)
    strip = pillow().new("RGB", (width, step * len(written)), _PAPER)
    pen = ImageDraw.Draw(strip)
    for i, line in enumerate(written):
        pen.text((0, step * i), line, font=font, fill=color)
    return strip


def _wrap(text: str, lines: int, fits: Callable[[str], bool]) -> list[str]:
    """Break text into at most `lines` lines that fit; the last ends with … if words are left."""
    written = [""]
    for word in text.split():
        longer = f"{written[-1]} {word}".strip()
        if fits(longer) or not written[-1]:
            written[-1] = longer
        else:
            written.append(word)
    shown = [_cut(line, fits) for line in written[:lines]]
    if len(written) > lines:
        shown[-1] = _cut(f"{shown[-1].rstrip('…')}…", fits)
    return shown


def _cut(line: str, fits: Callable[[str], bool]) -> str:
    """Shorten a line, with … at its end, until it fits."""
    if fits(line):
        return line
    line = line.rstrip("…")
    while len(line) > 1 and not fits(f"{line}…"):
        line = line[:-1].rstrip()
    return f"{line}…"
