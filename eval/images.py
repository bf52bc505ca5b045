"""How far a sparse generation is from the dense one: PSNR, SSIM, LPIPS, latents, side by side.

All of these compare with a reference: run both with the same seed (`run_pair` sees to it), and keep
in mind that a difference is not a fault; far apart from each other, both pictures may be good.

A picture is a Pillow image, an array [H, W, C] or a tensor [C, H, W], with one or three channels,
in uint8 or in floating point from 0 to 1. A batch, a video or a batch of videos is a list of
pictures or more leading dimensions; every picture and every frame counts once. Pillow, numpy and
torch serve all but the metrics: PSNR and SSIM need scikit-image, LPIPS torchmetrics.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from vistoken.errors import BackendUnavailable, DataError
from vistoken.picture import Panel, Tile, draw_sheet

Array = NDArray[np.float64]

METRICS = ("psnr", "ssim", "lpips")
_SHOWN = {"psnr": "PSNR {:.1f} dB", "ssim": "SSIM {:.3f}", "lpips": "LPIPS {:.3f}"}
_SSIM_WINDOW = 11
_INSTALL = "pip install 'vistoken[eval]'"
# LPIPS backbone -> torchvision's name of its ImageNet weights.
_BACKBONES = {
    "alex": "AlexNet_Weights",
    "vgg": "VGG16_Weights",
    "squeeze": "SqueezeNet1_1_Weights",
}


# --- pictures ------------------------------------------------------------------------------------


def to_arrays(pictures: Any) -> list[Array]:
    """Return each picture of a picture, a batch or a video as an array [H, W, 3] from 0 to 1.

    Raises `DataError` for other shapes, types and ranges, and for values that are not finite.
    """
    if isinstance(pictures, Image.Image):
        return [np.asarray(pictures.convert("RGB"), dtype=np.float64) / 255]
    if isinstance(pictures, Tensor):
        tensor = pictures.detach().cpu()
        tensor = tensor.double() if tensor.is_floating_point() else tensor
        if tensor.dim() < 3:
            raise DataError(f"A tensor of pictures is [..., C, H, W], got {list(tensor.shape)}.")
        return _split(tensor.movedim(-3, -1).numpy(), f"tensor {list(tensor.shape)}")
    if isinstance(pictures, np.ndarray):
        return _split(pictures, f"array {list(pictures.shape)}")
    if isinstance(pictures, (list, tuple)):
        return [array for item in pictures for array in to_arrays(item)]
    raise DataError(
        "A picture is a Pillow image, an array [H, W, C], a tensor [C, H, W] or a list of those, "
        f"got {type(pictures).__name__}."
    )


def _split(values: NDArray[Any], given: str) -> list[Array]:
    """The pictures of an array [..., H, W, C]."""
    if values.ndim < 3 or values.shape[-1] not in (1, 3) or 0 in values.shape:
        raise DataError(
            f"Pictures are arrays [..., H, W, C] or tensors [..., C, H, W] with 1 or 3 channels, "
            f"got a {given}."
        )
    if values.dtype == np.uint8:
        scaled = values.astype(np.float64) / 255
    elif np.issubdtype(values.dtype, np.floating):
        scaled = values.astype(np.float64)
        if not (np.isfinite(scaled).all() and scaled.min() >= 0 and scaled.max() <= 1):
            raise DataError(
                f"Floating-point pictures lie between 0 and 1, got values from {scaled.min():g} to "
                f"{scaled.max():g}; rescale from -1..1 by (x + 1) / 2, from 0..255 by x / 255."
            )
    else:
        raise DataError(f"Pictures are uint8 or floating point, got {values.dtype}.")
    shape = (*scaled.shape[:-1], 3)
    return list(np.broadcast_to(scaled, shape).reshape(-1, *shape[-3:]))


def to_pillow(pictures: Any) -> list[Image.Image]:
    """Return each picture as an 8-bit RGB Pillow image; raises as `to_arrays` does."""
    return [
        Image.fromarray((array * 255).round().astype(np.uint8)) for array in to_arrays(pictures)
    ]


# --- metrics -------------------------------------------------------------------------------------


def psnr(picture: Any, reference: Any) -> float:
    """Peak signal-to-noise ratio of one picture in dB, infinite for an identical one.

    Raises `BackendUnavailable` without scikit-image, `DataError` for pictures that do not match.
    """
    metrics = _skimage_metrics()
    ((one, other),) = _pairs(picture, reference, single=True)
    if np.array_equal(one, other):
        return math.inf
    return float(metrics.peak_signal_noise_ratio(other, one, data_range=1.0))


def ssim(picture: Any, reference: Any) -> float:
    """Structural similarity of one picture, at most 1, the mean over the three channels.

    With the settings of Wang et al. 2004: an 11 x 11 Gaussian window of standard deviation 1.5,
    K1 = 0.01, K2 = 0.03. Raises `BackendUnavailable` without scikit-image, `DataError` for pictures
    that do not match or are smaller than the window.
    """
    metrics = _skimage_metrics()
    ((one, other),) = _pairs(picture, reference, single=True)
    if min(one.shape[:2]) < _SSIM_WINDOW:
        raise DataError(
            f"SSIM needs pictures of at least {_SSIM_WINDOW} x {_SSIM_WINDOW} pixels, got "
            f"{one.shape[1]} x {one.shape[0]}."
        )
    value = metrics.structural_similarity(
        one,
        other,
        data_range=1.0,
        channel_axis=-1,
        gaussian_weights=True,
        sigma=1.5,
        use_sample_covariance=False,
    )
    return float(value)


def lpips(picture: Any, reference: Any, *, backbone: str = "alex") -> float:
    """Learned perceptual distance (Zhang et al. 2018, version 0.1) of one picture; 0 is identical.

    `backbone` is alex, vgg or squeeze. The packages that compute LPIPS ship its small linear
    layers, but not the ImageNet weights of the backbone, and nothing is downloaded here:
    torchvision must have them in its cache. Raises `BackendUnavailable` where they or torchmetrics
    are missing, `DataError` for pictures that do not match.
    """
    if backbone not in _BACKBONES:
        raise DataError(f"backbone is one of {', '.join(_BACKBONES)}, got {backbone!r}.")
    try:
        from torchmetrics.functional.image import learned_perceptual_image_patch_similarity
    except ImportError as error:
        raise BackendUnavailable(f"LPIPS needs torchmetrics: {_INSTALL}.") from error
    _check_backbone(backbone)
    ((one, other),) = _pairs(picture, reference, single=True)
    batch = [torch.from_numpy(a.copy()).movedim(-1, 0)[None].float() for a in (one, other)]
    with torch.no_grad():
        return float(
            learned_perceptual_image_patch_similarity(*batch, net_type=backbone, normalize=True)
        )


def _check_backbone(backbone: str) -> None:
    """Refuse a backbone that torchvision would have to download."""
    import torchvision

    url = getattr(torchvision.models, _BACKBONES[backbone]).DEFAULT.url
    path = Path(torch.hub.get_dir()) / "checkpoints" / url.rpartition("/")[2]
    if not path.is_file():
        raise BackendUnavailable(
            f"LPIPS with the backbone {backbone} needs the file {path}, and vistoken downloads "
            f"nothing: put it there from {url}, or leave lpips out."
        )


def _skimage_metrics() -> Any:
    try:
        from skimage import metrics
    except ImportError as error:
        raise BackendUnavailable(f"PSNR and SSIM need scikit-image: {_INSTALL}.") from error
    return metrics


def _pairs(pictures: Any, references: Any, *, single: bool = False) -> list[tuple[Array, Array]]:
    """Pictures with their references, of the same number and sizes."""
    ours, theirs = to_arrays(pictures), to_arrays(references)
    if len(ours) != len(theirs) or not ours:
        raise DataError(f"There are {len(ours)} pictures and {len(theirs)} references.")
    if single and len(ours) != 1:
        raise DataError(f"One picture is compared at a time, got {len(ours)}: use `compare`.")
    for i, (one, other) in enumerate(zip(ours, theirs, strict=True)):
        if one.shape != other.shape:
            raise DataError(
                f"Picture {i} has {one.shape[1]} x {one.shape[0]} pixels, its reference has "
                f"{other.shape[1]} x {other.shape[0]}."
            )
    return list(zip(ours, theirs, strict=True))


@dataclass(frozen=True)
class Comparison:
    """Metrics of pictures against their references: `values[metric]` has one number a picture."""

    values: Mapping[str, Sequence[float]]

    def mean(self, metric: str) -> float:
        """Return the mean over pictures, infinite for a PSNR with an identical picture."""
        values = self.values[metric]
        return sum(values) / len(values)

    def caption(self, index: int) -> str:
        """Return the metrics of one picture in words."""
        return ", ".join(
            "identical" if math.isinf(values[index]) else _SHOWN[name].format(values[index])
            for name, values in self.values.items()
        )

    def to_dict(self) -> dict[str, Any]:
        """Return lists ready for JSON; an infinite value is None."""
        return {
            name: [None if math.isinf(value) else value for value in values]
            for name, values in self.values.items()
        }


def compare(
    pictures: Any, references: Any, metrics: Sequence[str] = ("psnr", "ssim")
) -> Comparison:
    """Compare pictures with references of the same order, by the `metrics` psnr, ssim and lpips.

    Raises `BackendUnavailable` for a metric that cannot be computed here, `DataError` for unknown
    metrics and for pictures that do not match.
    """
    known: dict[str, Callable[[Any, Any], float]] = {"psnr": psnr, "ssim": ssim, "lpips": lpips}
    for name in metrics:
        if name not in known:
            raise DataError(f"There is no metric {name!r}; there is: {', '.join(METRICS)}.")
    pairs = _pairs(pictures, references)
    return Comparison({name: [known[name](*pair) for pair in pairs] for name in metrics})


# --- runs with the same seed ---------------------------------------------------------------------


def latent_error(sparse: Tensor, dense: Tensor) -> list[float]:
    """Return |sparse - dense| / |dense| for each sample of latents [B, ...], in float64.

    Raises `DataError` for different shapes, non-finite values, and a dense sample of zeros.
    """
    if sparse.shape != dense.shape or sparse.dim() < 2 or not sparse.shape[0]:
        raise DataError(
            "Latents are [B, ...] with the same shape on both sides, got "
            f"{list(sparse.shape)} and {list(dense.shape)}."
        )
    one, other = (x.detach().cpu().double().flatten(1) for x in (sparse, dense))
    if not (one.isfinite().all() and other.isfinite().all()):
        raise DataError("The latents hold values that are not finite.")
    size = other.norm(dim=1)
    if bool((size == 0).any()):
        raise DataError("A dense sample is all zeros, so no error is relative to it.")
    return ((one - other).norm(dim=1) / size).tolist()


@dataclass
class LatentTrace:
    """Keeps the latents after every step; pass it to diffusers as `callback_on_step_end`."""

    latents: list[Tensor] = field(default_factory=list)

    def __call__(self, pipeline: Any, step: int, timestep: Any, tensors: Any) -> Any:
        self.latents.append(tensors["latents"].detach().to("cpu", copy=True))
        return tensors


@dataclass(frozen=True)
class Pair:
    """What one seed gave, dense and sparse: pictures, and latents after each step if traced."""

    seed: int
    dense: Any
    sparse: Any
    dense_trace: LatentTrace
    sparse_trace: LatentTrace

    def latent_errors(self) -> list[float]:
        """Return the relative latent-space error after each step, the mean over the batch."""
        ours, theirs = self.sparse_trace.latents, self.dense_trace.latents
        if len(ours) != len(theirs) or not ours:
            raise DataError(
                f"The runs were traced over {len(theirs)} dense and {len(ours)} sparse steps; hand "
                "the trace to the pipeline as callback_on_step_end, and run the same steps."
            )
        errors = [latent_error(one, other) for one, other in zip(ours, theirs, strict=True)]
        return [sum(step) / len(step) for step in errors]


def run_pair(
    generate: Callable[[torch.Generator, LatentTrace], Any],
    edit: Callable[[], AbstractContextManager[Any]],
    seed: int,
    *,
    device: str | torch.device = "cpu",
) -> Pair:
    """Generate twice from the same seed: as it is, then inside `edit()`.

        pair = run_pair(
            lambda generator, trace: pipe(
                prompt, generator=generator, callback_on_step_end=trace, output_type="np"
            ).images,
            lambda: vistoken.attach(pipe.transformer, "recipe.json"),
            seed=0,
        )

    `generate` takes a fresh generator on `device` and a trace, and returns pictures. torch's global
    generators are seeded as well, for pipelines that draw from them, and restored afterwards.
    """
    device = torch.device(device)
    runs = []
    for sparse in (False, True):
        trace = LatentTrace()
        forked = [device] if device.type == "cuda" else []
        with torch.random.fork_rng(devices=forked), torch.no_grad():
            torch.manual_seed(seed)
            generator = torch.Generator(device).manual_seed(seed)
            if sparse:
                with edit():
                    runs.append((generate(generator, trace), trace))
            else:
                runs.append((generate(generator, trace), trace))
    (dense, dense_trace), (sparse_pictures, sparse_trace) = runs
    return Pair(seed, dense, sparse_pictures, dense_trace, sparse_trace)


# --- side by side --------------------------------------------------------------------------------


def draw_side_by_side(
    runs: Mapping[str, Any],
    titles: Sequence[str] | None = None,
    *,
    reference: str | None = None,
    metrics: Sequence[str] = ("psnr", "ssim"),
    heading: str = "",
    tile: int = 256,
) -> Image.Image:
    """Draw a row per picture, with what each run made of it side by side under the run's name.

    runs: name -> pictures, the same number in the same order. titles: one a picture, such as the
    prompts. With a `reference`, a run's name, captions of the others give the `metrics` against it.
    Raises as `compare` does.
    """
    made = {name: to_pillow(pictures) for name, pictures in runs.items()}
    counts = {name: len(pictures) for name, pictures in made.items()}
    rows = next(iter(counts.values()), 0)
    if not rows or set(counts.values()) != {rows}:
        raise DataError(f"Every run needs the same number of pictures, at least one: {counts}.")
    if titles is not None and len(titles) != rows:
        raise DataError(f"There are {len(titles)} titles for {rows} pictures.")
    if reference is not None and reference not in runs:
        raise DataError(f"There is no run {reference!r}; there is: {', '.join(runs)}.")
    measured = {
        name: compare(pictures, runs[reference], metrics)
        for name, pictures in runs.items()
        if reference is not None and name != reference
    }

    def caption(name: str, row: int) -> str:
        return f"{name}: {measured[name].caption(row)}" if name in measured else name

    panels = [
        Panel(
            titles[row] if titles else "",
            [Tile(pictures[row], caption(name, row)) for name, pictures in made.items()],
        )
        for row in range(rows)
    ]
    return draw_sheet(panels, heading=heading, columns=1, tile=tile)
