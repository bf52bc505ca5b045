"""Pictures of kept tokens: the right pixels are lit, whatever the processor did to the picture."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vistoken.errors import DataError
from vistoken.picture import (
    Panel,
    Tile,
    check_picture_path,
    draw_kept,
    draw_sheet,
    open_picture,
    save_picture,
    seen_box,
)

Image = pytest.importorskip("PIL.Image")


def noise(width: int, height: int, seed: int = 0) -> Any:
    """A picture in which no pixel is gray."""
    values = np.random.RandomState(seed).randint(60, 200, (height, width, 3))
    values[..., 0] += 55
    return Image.fromarray(values.astype(np.uint8))


@settings(max_examples=25)
@given(st.integers(1, 6), st.integers(1, 6), st.integers(6, 15), st.randoms())
def test_kept_patches_are_lit_and_the_rest_is_dim(
    rows: int, columns: int, side: int, rng: random.Random
) -> None:
    picture = noise(columns * side, rows * side)
    kept = sorted(rng.sample(range(rows * columns), rng.randint(0, rows * columns)))
    before, after = np.asarray(picture), np.asarray(draw_kept(picture, kept, (rows, columns)))
    for row in range(rows):
        for column in range(columns):
            inner = (
                slice(row * side + 1, (row + 1) * side - 1),
                slice(column * side + 1, (column + 1) * side - 1),
            )
            if row * columns + column in kept:
                assert (after[inner] == before[inner]).all()
            else:
                assert (np.ptp(after[inner].astype(int), axis=-1) <= 12).all()  # colors are gone
                assert after[inner].mean() < 0.6 * before[inner].mean()


def test_the_picture_is_not_changed() -> None:
    picture = noise(48, 48)
    draw_kept(picture, [0], (4, 4))
    assert (np.asarray(picture) == np.asarray(noise(48, 48))).all()


def test_report_indices_are_taken() -> None:
    picture = noise(48, 48)
    tensor = draw_kept(picture, torch.tensor([1, 7]), (4, 4))
    assert (np.asarray(tensor) == np.asarray(draw_kept(picture, [1, 7], (4, 4)))).all()


@pytest.mark.parametrize("size", [(1, 1), (5, 300), (300, 5), (23, 23), (2000, 31)])
def test_small_pictures_are_enlarged_until_patches_show(size: tuple[int, int]) -> None:
    drawn = draw_kept(noise(*size), [0], (24, 24))
    assert min(drawn.size) >= 24 * 6 - 6
    lit = np.asarray(drawn)[2:5, 2:5].astype(int)
    dark = np.asarray(drawn)[-3:, -3:].astype(int)
    assert lit.mean() > 2 * dark.mean()


@pytest.mark.parametrize("kept", [[16], [-1], [1.0], [True], ["0"], torch.tensor([3, 16])])
def test_indices_outside_the_grid_are_refused(kept: Any) -> None:
    with pytest.raises(DataError, match="from 0 to 15"):
        draw_kept(noise(48, 48), kept, (4, 4))


def test_only_pictures_are_drawn() -> None:
    with pytest.raises(DataError, match="PIL image, got ndarray"):
        draw_kept(np.zeros((4, 4, 3), np.uint8), [0], (2, 2))  # type: ignore[arg-type]


# --- which part of the picture the model saw -----------------------------------------------------


def processors() -> list[Any]:
    """Image processors that resize, crop and pad in different ways, and keep pixel values."""
    transformers = pytest.importorskip("transformers")
    plain = {"do_normalize": False, "do_rescale": False}
    square, crop = {"height": 96, "width": 96}, {"height": 96, "width": 96}
    return [
        transformers.CLIPImageProcessor(size={"shortest_edge": 96}, crop_size=crop, **plain),
        transformers.CLIPImageProcessor(size=square, do_center_crop=False, **plain),
        transformers.CLIPImageProcessor(size={"shortest_edge": 128}, crop_size=crop, **plain),
        transformers.LlavaImageProcessor(
            size={"shortest_edge": 96}, crop_size=crop, do_pad=True, **plain
        ),
    ]


@pytest.mark.parametrize("which", range(4))
@pytest.mark.parametrize("size", [(96, 96), (200, 131), (131, 200), (640, 97), (40, 61)])
def test_the_box_is_what_the_processor_lets_through(which: int, size: tuple[int, int]) -> None:
    """A picture whose colors are its coordinates tells where each seen pixel came from."""
    processor, (width, height) = processors()[which], size
    x = (np.arange(width) + 0.5) / width * 250
    y = (np.arange(height) + 0.5) / height * 250
    values = np.zeros((height, width, 3), np.float64)
    values[..., 0], values[..., 1] = x[None, :], y[:, None]
    picture = Image.fromarray(values.round().astype(np.uint8))
    seen = processor(picture, return_tensors="pt")["pixel_values"][0].double().numpy()
    left, top, right, bottom = seen_box(size, processor)
    for row in range(8, 96, 16):
        for column in range(8, 96, 16):
            at_x = left + (column + 0.5) / 96 * (right - left)
            at_y = top + (row + 0.5) / 96 * (bottom - top)
            margin = 3 * max(width, height) / 96 + 2
            inside = margin < at_x < width - margin and margin < at_y < height - margin
            if inside:  # away from padding and from the resampling filter's ends
                assert abs(seen[0, row, column] - at_x / width * 250) < 250 / width * 1.5 + 1.5
                assert abs(seen[1, row, column] - at_y / height * 250) < 250 / height * 1.5 + 1.5


def test_without_a_processor_the_whole_picture_is_seen() -> None:
    assert seen_box((30, 20)) == (0, 0, 30, 20)


def test_what_was_cropped_away_stays_dim() -> None:
    picture = noise(120, 60)
    drawn = np.asarray(draw_kept(picture, range(4), (2, 2), box=(30, 0, 90, 60)))
    before = np.asarray(picture)
    assert (drawn[2:58, 32:88] == before[2:58, 32:88]).all()
    assert drawn[:, :29].mean() < 0.6 * before[:, :29].mean()
    assert drawn[:, 91:].mean() < 0.6 * before[:, 91:].mean()


# --- files ---------------------------------------------------------------------------------------


def test_pictures_of_every_mode_become_rgb(tmp_path: Path) -> None:
    for mode in ("1", "L", "LA", "P", "RGB", "RGBA", "I;16", "CMYK"):
        made = noise(20, 10).convert("L" if mode == "I;16" else "RGB").convert(mode)
        path = tmp_path / f"{mode.replace(';', '')}.{'tif' if mode == 'CMYK' else 'png'}"
        made.save(path)
        read = open_picture(path)
        assert (read.mode, read.size) == ("RGB", (20, 10))


def test_transparent_means_white(tmp_path: Path) -> None:
    Image.new("RGBA", (4, 4), (0, 0, 0, 0)).save(tmp_path / "a.png")
    assert open_picture(tmp_path / "a.png").getpixel((0, 0)) == (255, 255, 255)


def test_pictures_are_turned_as_the_camera_was(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by a quarter
    noise(40, 20).save(tmp_path / "a.jpg", exif=exif)
    assert open_picture(tmp_path / "a.jpg").size == (20, 40)


def test_sixteen_bits_are_scaled_and_not_clipped(tmp_path: Path) -> None:
    values = np.linspace(1000, 50000, 64).astype(np.uint16).reshape(8, 8)
    Image.fromarray(values).save(tmp_path / "a.png")
    read = np.asarray(open_picture(tmp_path / "a.png"))[..., 0].astype(int)
    assert read.min() <= 1 and read.max() >= 254 and (np.diff(read.ravel()) >= 0).all()


def test_bad_image_files_are_refused(tmp_path: Path) -> None:
    (tmp_path / "text.png").write_text("no picture")
    (tmp_path / "empty.png").write_bytes(b"")
    noise(64, 64).save(tmp_path / "whole.png")
    cut = (tmp_path / "whole.png").read_bytes()[:2000]
    (tmp_path / "cut.png").write_bytes(cut)
    for name in ("text.png", "empty.png", "cut.png"):
        with pytest.raises(DataError, match="is not an image"):
            open_picture(tmp_path / name)
    for path in (tmp_path, tmp_path / "absent.png"):
        with pytest.raises(DataError, match="no image file"):
            open_picture(path)


def test_paths_are_checked_before_anything_is_drawn(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no folder .*absent"):
        check_picture_path(tmp_path / "absent" / "a.png")
    for name in ("a.txt", "a", ".png"):
        with pytest.raises(DataError, match="does not end like an image"):
            save_picture(noise(4, 4), tmp_path / name)
    save_picture(noise(4, 4), tmp_path / "a.PNG")
    assert open_picture(tmp_path / "a.PNG").size == (4, 4)


# --- sheets --------------------------------------------------------------------------------------


def test_sheet_holds_every_picture_and_its_caption() -> None:
    red, blue = Image.new("RGB", (50, 50), (250, 0, 0)), Image.new("RGB", (80, 20), (0, 0, 250))
    panels = [
        Panel("first", [Tile(red, "red"), Tile(blue, "blue", "good")]),
        Panel("", [Tile(red, "")]),
    ]
    sheet = np.asarray(draw_sheet(panels, heading="two", tile=100)).astype(int)
    assert (sheet == (250, 0, 0)).all(-1).sum() == 2 * 100 * 100
    assert (sheet == (0, 0, 250)).all(-1).sum() == 100 * 25
    green = (sheet[..., 1] > sheet[..., 0] + 40) & (sheet[..., 1] > sheet[..., 2] + 40)
    assert green.any()  # the caption that is good


def test_long_words_never_leave_their_tile() -> None:
    tile = Image.new("RGB", (64, 64), (255, 255, 255))
    for words in ("w" * 400, "many words " * 60, "…" * 90, "漢字 " * 50):
        sheet = draw_sheet([Panel(words, [Tile(tile, words)])], heading=words, tile=64)
        pixels = np.asarray(sheet)
        assert sheet.width == 64 + 40
        assert (pixels[:, -18:] == 255).all() and (pixels[:, :18] == 255).all()


def test_rows_of_unequal_length_fit() -> None:
    tile = Tile(noise(30, 30), "x")
    sheet = draw_sheet([Panel("", [tile]), Panel("", [tile]), Panel("a", [tile, tile])], tile=30)
    assert sheet.width >= 2 * 30


@pytest.mark.parametrize("panels", [[], [Panel("empty", [])]])
def test_an_empty_sheet_is_refused(panels: list[Panel]) -> None:
    with pytest.raises(DataError, match="at least one panel"):
        draw_sheet(panels)
