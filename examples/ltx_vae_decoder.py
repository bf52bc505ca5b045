"""The LTX-2.5 video decoder of diffusers with vistoken's neighborhood attention.

    python examples/ltx_vae_decoder.py                      # any machine, some seconds
    python examples/ltx_vae_decoder.py --dtype bfloat16     # on a GPU

The decoder attends to a box of neighbors around every token of a video. In diffusers that takes
either NATTEN's CUDA kernels or FlexAttention, whose mask grows with the square of the tokens.
`neighborhood_attention(decoder)` swaps both for `vistoken.kernels.na3d` and puts everything back
as it was. The model here has random weights and few channels; its windows, its heads of 64 and its
scale are those of LTX-2.5. Shown are how far the decoded videos lie from each other, and the time.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import LTX2VideoDiffusionDecoderModel
from rich.console import Console
from rich.table import Table
from torch import Tensor

from vistoken.kernels import na3d

# Relative Frobenius distance of two decoded videos; rounding adds up over the blocks.
BUDGETS = {torch.float32: 1e-5, torch.float16: 5e-3, torch.bfloat16: 4e-2}


class NeighborhoodProcessor:
    """Attention processor of the decoder's blocks, on `vistoken.kernels.na3d`.

    backend: the backend of `na3d`; None leaves the choice to it. The block mask that diffusers
    makes for FlexAttention is not read, and diffusers does not make it for other processors.
    """

    def __init__(self, backend: str | None = None) -> None:
        self.backend = backend

    def __call__(self, attn: Any, hidden_states: Tensor, block_mask: Any = None) -> Tensor:
        """Return the block's output [B, T, H, W, C] of `hidden_states` of the same shape."""
        query, key, value = attn.project_qkv(hidden_states)  # [B, T, H, W, heads, 64]
        # the query comes scaled already
        out = na3d(query, key, value, attn.kernel_size, scale=1.0, backend=self.backend)
        return attn.to_out[0](out.flatten(-2))


@contextmanager
def neighborhood_attention(decoder: Any, backend: str | None = None) -> Iterator[Any]:
    """Run `decoder`, an `LTX2VideoDiffusionDecoderModel`, on `na3d` inside the block."""
    before = decoder.attn_processors
    decoder.set_attn_processor(NeighborhoodProcessor(backend))
    try:
        yield decoder
    finally:
        decoder.set_attn_processor(before)


def tiny_decoder() -> LTX2VideoDiffusionDecoderModel:
    """A random decoder with the windows of LTX-2.5, two blocks a stage and little upsampling."""
    torch.manual_seed(0)
    model = LTX2VideoDiffusionDecoderModel(
        latent_channels=8,
        decoder_stage_channels=(128, 64, 64, 64, 64),
        decoder_stage_depths=(1, 1, 1, 1, 2),
        decoder_upsample_strides=((1, 1, 1), (2, 1, 1), (1, 1, 1), (1, 2, 2)),
        decoder_upsample_channel_reductions=(2, 1, 1, 1),
        decoder_t_emb_dim=32,
        spatial_compression_ratio=8,
        temporal_compression_ratio=2,
    )
    return model.eval()


@dataclass(frozen=True)
class Run:
    """One way to decode: the video [B, 3, F, H, W], seconds, and bytes beyond what was held."""

    label: str
    video: Tensor
    seconds: float
    memory: int


def decode(label: str, decoder: Any, latents: Tensor) -> Run:
    """Decode [B, C, F, H, W] once to warm up and once for the record, from the same noise."""
    cuda = latents.is_cuda
    seconds, memory = 0.0, 0
    for _ in range(2):
        noise = torch.Generator(latents.device).manual_seed(1)
        if cuda:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            memory = -torch.cuda.memory_allocated()
        start = time.perf_counter()
        with torch.no_grad():
            video = decoder.decode(latents, generator=noise, return_dict=False)[0]
        if cuda:
            torch.cuda.synchronize()
            memory += torch.cuda.max_memory_allocated()
        seconds = time.perf_counter() - start
    return Run(label, video, seconds, memory)


def distance(run: Run, reference: Run) -> float:
    """Relative Frobenius distance of two videos."""
    return float((run.video - reference.video).norm() / reference.video.norm())


def compare(decoder: Any, latents: Tensor, backends: Sequence[str]) -> list[Run]:
    """Decode with diffusers' FlexAttention, with every backend of `na3d`, and as before again."""
    runs = [decode("diffusers, FlexAttention", decoder, latents)]
    for backend in backends:
        with neighborhood_attention(decoder, backend):
            runs.append(decode(f"vistoken, {backend}", decoder, latents))
    runs.append(decode("diffusers again", decoder, latents))
    return runs


def show(runs: Sequence[Run], budget: float) -> None:
    """Print a row for every run, next to the first."""
    size = "×".join(map(str, runs[0].video.shape[2:]))
    table = Table(title=f"Decoded {size} (frames, height, width); budget {budget:.0e}")
    for name in ("attention", "distance to the first", "seconds", "MiB"):
        table.add_column(name, justify="left" if name == "attention" else "right")
    for run in runs:
        far = "" if run is runs[0] else f"{distance(run, runs[0]):.1e}"
        memory = f"{run.memory / 2**20:.0f}" if run.memory else "-"
        table.add_row(run.label, far, f"{run.seconds:.2f}", memory)
    Console(width=100).print(table)


def main(words: list[str] | None = None) -> None:
    """Decode one random latent video in every way, print the table, and check it."""
    gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--latents", type=int, nargs=3, default=(6, 7, 8), metavar="N",
                        help="frames, height and width of the latent video")  # fmt: skip
    names = {str(dtype).removeprefix("torch."): dtype for dtype in BUDGETS}
    parser.add_argument("--dtype", choices=names, default="float32")
    parser.add_argument("--backends", nargs="+",
                        default=["reference", "tiled", *(["triton"] if gpu else [])])  # fmt: skip
    given = parser.parse_args(words)
    device, dtype = torch.device("cuda" if gpu else "cpu"), names[given.dtype]
    decoder = tiny_decoder().to(device)
    if dtype != torch.float32:
        decoder.to(dtype)
    latents = torch.randn(1, 8, *given.latents, generator=torch.Generator().manual_seed(2))
    runs = compare(decoder, latents.to(device, dtype), given.backends)
    show(runs, BUDGETS[dtype])
    far = [run.label for run in runs if not distance(run, runs[0]) <= BUDGETS[dtype]]
    if far or not torch.equal(runs[-1].video, runs[0].video):
        raise SystemExit(f"The videos differ: {', '.join(far) or runs[-1].label}.")


if __name__ == "__main__":
    main()
