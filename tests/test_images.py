"""Generation metrics against definitions written out by hand, and runs with the same seed."""

from __future__ import annotations

import builtins
import itertools
import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from vistoken.errors import BackendUnavailable, DataError
from vistoken.eval import images


def noise(height: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).random((height, width, 3))


def blurred(picture: np.ndarray, seed: int = 1) -> np.ndarray:
    return np.clip(picture + 0.1 * noise(*picture.shape[:2], seed) - 0.05, 0, 1)


# --- forms of pictures ---------------------------------------------------------------------------


def test_every_form_of_a_picture_is_the_same_picture() -> None:
    raw = np.random.default_rng(0).integers(0, 256, (2, 5, 7, 3), dtype=np.uint8)
    scaled = raw / 255
    forms = [
        raw,
        scaled,
        list(raw),
        [Image.fromarray(picture) for picture in raw],
        torch.from_numpy(raw).movedim(-1, -3),
        torch.from_numpy(scaled).movedim(-1, -3)[None],  # a batch of one video
        [[Image.fromarray(raw[0])], torch.from_numpy(raw[1]).movedim(-1, 0)],
    ]
    for form in forms:
        arrays = images.to_arrays(form)
        assert len(arrays) == 2
        assert np.array_equal(np.stack(arrays), scaled)
        assert [
            np.array_equal(np.asarray(p), r)
            for p, r in zip(images.to_pillow(form), raw, strict=True)
        ]


def test_half_precision_gray_and_transparent_pictures() -> None:
    gray = torch.linspace(0, 1, 20).reshape(1, 4, 5).bfloat16()
    (array,) = images.to_arrays(gray)
    assert array.shape == (4, 5, 3)
    assert np.array_equal(array[..., 2], gray[0].double().numpy())
    (array,) = images.to_arrays(Image.new("RGBA", (3, 2), (255, 0, 51, 7)))
    assert np.array_equal(array[0, 0], [1, 0, 0.2])


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        (np.zeros((4, 4)), "1 or 3 channels"),
        (np.zeros((4, 4, 2)), "1 or 3 channels"),
        (np.zeros((0, 4, 4, 3)), "1 or 3 channels"),
        (torch.zeros(4, 4), r"\[\.\.\., C, H, W\]"),
        (torch.zeros(4, 4, 3), "1 or 3 channels"),  # channels last
        (torch.full((3, 4, 4), -0.5), "(x + 1) / 2"),
        (np.full((4, 4, 3), 200.0), "x / 255"),
        (np.full((4, 4, 3), np.nan), "between 0 and 1"),
        (np.zeros((4, 4, 3), dtype=np.int64), "int64"),
        (torch.zeros(3, 4, 4, dtype=torch.bool), "bool"),
        ("picture.png", "got str"),
        ([None], "got NoneType"),
    ],
)
def test_what_is_no_picture_is_refused(bad: Any, words: str) -> None:
    with pytest.raises(DataError, match=words.replace("(x + 1)", r"\(x \+ 1\)")):
        images.to_arrays(bad)


# --- metrics -------------------------------------------------------------------------------------


def ssim_by_hand(one: np.ndarray, other: np.ndarray) -> float:
    """Wang et al. 2004, one window after the other."""
    line = np.exp(-(np.arange(-5, 6) ** 2) / (2 * 1.5**2))
    weights = np.outer(line, line) / np.outer(line, line).sum()
    c1, c2 = 0.01**2, 0.03**2
    values = []
    for channel in range(3):
        x, y = one[..., channel], other[..., channel]
        for i, j in itertools.product(*(range(side - 10) for side in x.shape)):
            a, b = x[i : i + 11, j : j + 11], y[i : i + 11, j : j + 11]
            ma, mb = (weights * a).sum(), (weights * b).sum()
            va, vb = (weights * (a - ma) ** 2).sum(), (weights * (b - mb) ** 2).sum()
            covariance = (weights * (a - ma) * (b - mb)).sum()
            top = (2 * ma * mb + c1) * (2 * covariance + c2)
            values.append(top / ((ma**2 + mb**2 + c1) * (va + vb + c2)))
    return float(np.mean(values))


@pytest.mark.parametrize("size", [(11, 11), (17, 24)])
def test_ssim_is_the_definition(size: tuple[int, int]) -> None:
    pytest.importorskip("skimage")
    one = noise(*size)
    other = blurred(one)
    assert images.ssim(other, one) == pytest.approx(ssim_by_hand(other, one), abs=1e-12)
    assert images.ssim(one, 1 - one) < 0 < images.ssim(other, one) < 1 == images.ssim(one, one)


def test_psnr_is_the_definition() -> None:
    pytest.importorskip("skimage")
    one, other = noise(9, 4), noise(9, 4, seed=1)
    expected = -10 * math.log10(
        sum((a - b) ** 2 for a, b in zip(one.flat, other.flat, strict=True)) / one.size
    )
    assert images.psnr(one, other) == pytest.approx(expected, abs=1e-9)
    black, one_step = np.zeros((4, 4, 3), dtype=np.uint8), np.ones((4, 4, 3), dtype=np.uint8)
    assert images.psnr(one_step, black) == pytest.approx(20 * math.log10(255))
    assert images.psnr(one, one) == math.inf


def test_compare_goes_through_a_video_frame_by_frame() -> None:
    pytest.importorskip("skimage")
    dense = np.stack([noise(12, 12, seed) for seed in range(4)]).reshape(2, 2, 12, 12, 3)
    sparse = dense.copy()
    sparse[1, 0] = blurred(sparse[1, 0])
    found = images.compare(sparse, dense)
    frames = list(zip(sparse.reshape(4, 12, 12, 3), dense.reshape(4, 12, 12, 3), strict=True))
    assert found.values["psnr"] == [images.psnr(*frame) for frame in frames]
    assert found.values["ssim"] == [images.ssim(*frame) for frame in frames]
    assert found.mean("psnr") == math.inf
    assert found.mean("ssim") == pytest.approx((3 + images.ssim(*frames[2])) / 4)
    assert [found.caption(i).startswith("identical") for i in range(4)] == [True, True, False, True]
    written = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert [value is None for value in written["psnr"]] == [True, True, False, True]


def test_pictures_that_do_not_match_are_refused() -> None:
    pytest.importorskip("skimage")
    one = noise(12, 16)
    with pytest.raises(DataError, match="16 x 12 pixels, its reference has 12 x 16"):
        images.psnr(one, noise(16, 12))
    with pytest.raises(DataError, match="1 pictures and 2 references"):
        images.compare(one, [one, one])
    with pytest.raises(DataError, match="0 pictures"):
        images.compare([], [])
    with pytest.raises(DataError, match="got 2: use `compare`"):
        images.ssim([one, one], [one, one])
    with pytest.raises(DataError, match="at least 11 x 11"):
        images.ssim(noise(10, 30), noise(10, 30))
    with pytest.raises(DataError, match="no metric 'fid'"):
        images.compare(one, one, ["fid"])


@pytest.mark.parametrize(
    ("package", "metric"),
    [("skimage", images.psnr), ("skimage", images.ssim), ("torchmetrics", images.lpips)],
)
def test_a_missing_package_is_named(
    monkeypatch: pytest.MonkeyPatch, package: str, metric: Any
) -> None:
    found = builtins.__import__

    def without(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.partition(".")[0] == package:
            raise ImportError(name)
        return found(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(BackendUnavailable, match=r"pip install 'vistoken\[eval\]'"):
        metric(noise(12, 12), noise(12, 12))


# --- LPIPS ---------------------------------------------------------------------------------------


def test_lpips_downloads_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pytest.importorskip("torchmetrics")
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    with pytest.raises(BackendUnavailable, match=r"checkpoints/alexnet-.*downloads nothing"):
        images.lpips(noise(64, 64), noise(64, 64))
    with pytest.raises(DataError, match="alex, vgg, squeeze"):
        images.lpips(noise(64, 64), noise(64, 64), backbone="resnet")
    assert not list(tmp_path.iterdir())


def lpips_by_hand(features: Any, heads: dict[str, torch.Tensor], one: Any, other: Any) -> float:
    """Zhang et al. 2018: weighted squared distances of features of unit length, over the layers."""
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    x = torch.stack([torch.from_numpy(p).float().movedim(-1, 0) for p in (one, other)])
    x = (x - mean[:, None, None]) / std[:, None, None]
    ends, total, layer = (1, 4, 7, 9, 10, 11, 12), 0.0, 0
    for index, block in enumerate(features):
        x = block(x)
        if index in ends:
            unit = x / x.square().sum(1, keepdim=True).sqrt()
            weights = heads[f"lin{layer}.model.1.weight"].flatten()
            total += float((weights[:, None, None] * (unit[0] - unit[1]) ** 2).sum(0).mean())
            layer += 1
    return total


def test_lpips_with_weights_in_the_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """With random weights under the file name that torchvision looks for."""
    torchmetrics = pytest.importorskip("torchmetrics")
    from torchvision import models

    network = models.squeezenet1_1(weights=None).eval()
    name = models.SqueezeNet1_1_Weights.DEFAULT.url.rpartition("/")[2]
    (tmp_path / "checkpoints").mkdir()
    torch.save(network.state_dict(), tmp_path / "checkpoints" / name)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    package = Path(torchmetrics.__file__).parent
    heads = torch.load(package / "functional/image/lpips_models/squeeze.pth", map_location="cpu")
    one, other = noise(64, 48), noise(64, 48, seed=1)
    with torch.no_grad():
        expected = lpips_by_hand(network.features, heads, one, other)
    assert images.lpips(one, other, backbone="squeeze") == pytest.approx(expected, rel=1e-4)
    assert images.lpips(one, one, backbone="squeeze") == 0 < expected


# --- latents and runs with the same seed ---------------------------------------------------------


@given(st.integers(1, 4), st.floats(-3, 3), st.sampled_from([torch.float32, torch.bfloat16]))
def test_latent_error_of_a_scaled_sample(batch: int, factor: float, dtype: torch.dtype) -> None:
    dense = torch.randn(batch, 2, 3, generator=torch.Generator().manual_seed(batch)).to(dtype)
    sparse = dense.double() * (1 + factor)
    assert images.latent_error(sparse, dense) == pytest.approx([abs(factor)] * batch, abs=1e-9)


def test_latent_error_by_hand() -> None:
    dense = torch.tensor([[3.0, 4.0], [0.0, 2.0]])
    assert images.latent_error(torch.tensor([[3.0, 1.0], [1.0, 2.0]]), dense) == [0.6, 0.5]
    for bad, words in [
        (torch.zeros(2, 3), "same shape"),
        (torch.full((2, 2), math.inf), "not finite"),
    ]:
        with pytest.raises(DataError, match=words):
            images.latent_error(bad, dense)
    with pytest.raises(DataError, match="all zeros"):
        images.latent_error(dense, torch.zeros(2, 2))


class Pipeline:
    """Denoises in three steps, with the callback of diffusers and a place to edit."""

    def __init__(self) -> None:
        self.strength = 0.5
        self.last_noise = torch.empty(0)

    def __call__(self, *, generator: torch.Generator, callback_on_step_end: Any) -> torch.Tensor:
        latents = torch.randn(2, 3, 12, 12, generator=generator)
        self.last_noise = torch.randn(3)  # some pipelines draw from the global generator
        for step in range(3):
            latents *= self.strength
            tensors = callback_on_step_end(self, step, 0, {"latents": latents})
            latents = tensors["latents"]
        return latents.sigmoid()


@contextmanager
def edited(pipeline: Pipeline, strength: float, seen: list[torch.Tensor]) -> Iterator[None]:
    pipeline.strength, before = strength, pipeline.strength
    seen.append(pipeline.last_noise)
    yield
    seen.append(pipeline.last_noise)
    pipeline.strength = before


def test_a_pair_starts_from_the_same_noise() -> None:
    pipeline, seen = Pipeline(), []
    state = torch.random.get_rng_state()

    def generate(generator: torch.Generator, trace: images.LatentTrace) -> torch.Tensor:
        return pipeline(generator=generator, callback_on_step_end=trace)

    pair = images.run_pair(generate, lambda: edited(pipeline, 0.4, seen), seed=7)
    assert pair.latent_errors() == pytest.approx([1 - 0.8**n for n in (1, 2, 3)])
    assert torch.equal(*seen) and pipeline.strength == 0.5
    assert torch.equal(torch.random.get_rng_state(), state)
    neutral = images.run_pair(generate, lambda: edited(pipeline, 0.5, []), seed=7)
    assert neutral.latent_errors() == [0, 0, 0]
    assert torch.equal(neutral.sparse, pair.dense)
    other = images.run_pair(generate, lambda: edited(pipeline, 0.5, []), seed=8)
    assert not torch.equal(other.dense, pair.dense)


def test_a_pair_that_was_not_traced_has_no_errors() -> None:
    generator_only = images.run_pair(lambda g, trace: torch.rand(1, generator=g), nothing, seed=0)
    with pytest.raises(DataError, match="callback_on_step_end"):
        generator_only.latent_errors()


@contextmanager
def nothing() -> Iterator[None]:
    yield


# --- side by side --------------------------------------------------------------------------------


def test_side_by_side_shows_every_picture_in_its_place() -> None:
    red, green, blue, yellow = ((255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 0))
    runs = {
        "dense": [Image.new("RGB", (32, 32), color) for color in (red, green)],
        "sparse": [Image.new("RGB", (32, 32), color) for color in (blue, yellow)],
    }
    sheet = images.draw_side_by_side(runs, ["first", "second"], tile=64)
    pixels = np.asarray(sheet)
    middles = {}
    for color in (red, green, blue, yellow):
        ys, xs = np.nonzero((pixels == color).all(-1))
        assert len(ys) == 64 * 64
        middles[color] = (ys.mean(), xs.mean())
    assert middles[red][0] == middles[blue][0] < middles[green][0] == middles[yellow][0]
    assert middles[red][1] == middles[green][1] < middles[blue][1] == middles[yellow][1]


def test_captions_give_the_metrics(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("skimage")
    panels: list[Any] = []
    monkeypatch.setattr(images, "draw_sheet", lambda given, **rest: panels.extend(given))
    dense = [noise(16, 16), noise(16, 16, seed=2)]
    sparse = [blurred(dense[0]), dense[1]]
    images.draw_side_by_side({"dense": dense, "radial": sparse}, ["a", "b"], reference="dense")
    assert [panel.title for panel in panels] == ["a", "b"]
    words = [[tile.caption for tile in panel.tiles] for panel in panels]
    value = images.psnr(sparse[0], dense[0])
    assert words[0][0] == "dense" and f"radial: PSNR {value:.1f} dB, SSIM 0." in words[0][1]
    assert words[1][1].startswith("radial: identical")


@pytest.mark.parametrize(
    ("runs", "settings", "words"),
    [
        ({}, {}, "at least one"),
        ({"a": [], "b": []}, {}, "at least one"),
        ({"a": noise(12, 12), "b": [noise(12, 12)] * 2}, {}, "same number"),
        ({"a": noise(12, 12)}, {"titles": ["x", "y"]}, "2 titles for 1"),
        ({"a": noise(12, 12)}, {"reference": "dense"}, "no run 'dense'; there is: a"),
    ],
)
def test_uneven_runs_are_refused(runs: Any, settings: Any, words: str) -> None:
    with pytest.raises(DataError, match=words):
        images.draw_side_by_side(runs, **settings)
