"""The example that puts neighborhood attention into the LTX-2.5 decoder of diffusers."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

diffusers = pytest.importorskip("diffusers", minversion="0.42")
sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))

import ltx_vae_decoder as example  # noqa: E402
from vistoken.errors import BackendUnavailable, MethodError  # noqa: E402

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BACKENDS = ["tiled", "reference", pytest.param("triton", marks=pytest.mark.gpu)]


@pytest.fixture(scope="module")
def decoder() -> Iterator[Any]:
    yield example.tiny_decoder().to(DEVICE)


def latents(frames: int = 6, height: int = 7, width: int = 7) -> torch.Tensor:
    draw = torch.Generator().manual_seed(3)
    return torch.randn(1, 8, frames, height, width, generator=draw).to(DEVICE)


def test_the_example_runs(capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    # FlexAttention traces itself; writing that down for the report takes longer than attention
    monkeypatch.setattr(logging.getLogger("torch.__trace"), "propagate", False)
    example.main(["--backends", "tiled", "--latents", "6", "7", "7"])
    said = capsys.readouterr().out
    assert "diffusers, FlexAttention" in said and "vistoken, tiled" in said


def test_the_windows_are_those_of_the_decoder(decoder: Any) -> None:
    config = decoder.config
    assert config.decoder_stage_kernels == ((3, 7, 7), (3, 7, 7), (3, 5, 5), (3, 5, 5))
    assert config.decoder_stage5_kernel == (11, 11, 11) and config.decoder_head_dim == 64
    assert len(decoder.attn_processors) == 6


@pytest.mark.parametrize("backend", BACKENDS)
def test_one_block_equals_that_of_diffusers(decoder: Any, backend: str) -> None:
    """Forward on an odd grid, every stage."""
    for attn in [module for module in decoder.modules() if hasattr(module, "project_qkv")]:
        grid = [k + extra for k, extra in zip(attn.kernel_size, (2, 0, 3), strict=True)]
        x = torch.randn(1, *grid, attn.heads * 64, device=DEVICE)
        with torch.no_grad():
            wanted = attn(x)
            found = example.NeighborhoodProcessor(backend)(attn, x)
        assert (found - wanted).norm() <= 2e-6 * wanted.norm()


def test_gradients_reach_the_weights(decoder: Any) -> None:
    """Which diffusers' own processor cannot give on the CPU."""
    attn = decoder.decoder.det_stages[1][0].attn
    x = torch.randn(1, 3, 7, 9, 64, device=DEVICE)
    grads = []
    for backend in ("reference", None):
        out = example.NeighborhoodProcessor(backend)(attn, x)
        loss = (out * torch.linspace(-1, 1, 64, device=DEVICE)).sum()
        grads.append(torch.autograd.grad(loss, [attn.to_q.weight, attn.to_v.weight]))
    for wanted, found in zip(*grads, strict=True):
        assert (found - wanted).norm() <= 1e-5 * wanted.norm()


def test_a_backend_that_cannot_run_says_so(decoder: Any) -> None:
    attn = decoder.decoder.det_stages[0][0].attn
    x = torch.randn(1, 3, 7, 7, 128, device=DEVICE)
    with pytest.raises(BackendUnavailable, match="cudnn"):
        example.NeighborhoodProcessor("cudnn")(attn, x)


def test_everything_is_put_back(decoder: Any) -> None:
    before = decoder.attn_processors
    with pytest.raises(MethodError, match="kernel_size"), example.neighborhood_attention(decoder):
        assert all(decoder.attn_processors[name] is not old for name, old in before.items())
        attn = decoder.decoder.det_stages[0][0].attn
        attn.processor(attn, torch.randn(1, 3, 6, 7, 128, device=DEVICE))
    after = decoder.attn_processors
    assert list(after) == list(before)
    assert all(after[name] is old for name, old in before.items())


def test_decoded_in_tiles(decoder: Any) -> None:
    """diffusers cuts large videos; the cuts reach attention as grids of other sizes."""
    videos = []
    decoder.enable_tiling(tile_sample_min_width=64, tile_sample_stride_width=48)
    try:
        for backend in ("reference", "tiled"):
            noise = torch.Generator(DEVICE).manual_seed(1)
            with example.neighborhood_attention(decoder, backend), torch.no_grad():
                videos.append(decoder.decode(latents(6, 7, 12), generator=noise).sample)
    finally:
        decoder.disable_tiling()
    assert (videos[0] - videos[1]).norm() <= example.BUDGETS[torch.float32] * videos[0].norm()
