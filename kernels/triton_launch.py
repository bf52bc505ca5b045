"""Launches of the Triton kernels of local attention: their configurations and arguments."""

# Triton gives annotations of a kernel a meaning of its own.
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor

from vistoken.kernels.tiling import Box
from vistoken.kernels.triton_tile import INTERPRETED
from vistoken.kernels.windows import Window

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
LARGEST_HEAD = 256
AMD = 0
SMALL = 2048  # keys of a window below which boxes are mostly masked


@dataclass(frozen=True)
class Config:
    """How a kernel is compiled, and which numbers of tokens its tiles and boxes may have.

    warp_rows: rows of a tile per warp.
    """

    queries: tuple[int, ...]
    keys: tuple[int, ...]
    warp_rows: int
    stages: int


@dataclass(frozen=True)
class Launch:
    """One call of a kernel for tiles of `rows`: programs in one dimension, arguments, constants."""

    kernel: Any
    programs: int
    rows: int
    arguments: tuple[Any, ...]
    constants: dict[str, Any]
    config: Config

    def run(self) -> None:
        """Start the kernel, if it has anything to do."""
        if self.programs:
            self.kernel[(self.programs,)](*self.arguments, **self.keywords)

    @property
    def keywords(self) -> dict[str, Any]:
        return {
            **self.constants,
            "num_warps": max(self.rows // self.config.warp_rows, 4),
            "num_stages": self.config.stages,
        }


def rows_in_line(*tensors: Tensor | None) -> tuple[Any, ...]:
    """The tensors, copied where the entries of a token do not lie side by side."""
    return tuple(
        x if x is None or x.shape[-1] == 1 or x.stride(-1) == 1 else x.contiguous() for x in tensors
    )


def strides(x: Tensor) -> tuple[int, int, int, int, int]:
    """Strides (batch, axis 0, axis 1, axis 2, head) of [B, T, H, W, heads, D] or [B, N, heads, D].

    The tokens of a plain sequence lie along axis 2.
    """
    steps = x.stride()
    return (steps[0], *(0,) * (6 - len(steps)), *steps[1:-1])  # type: ignore[return-value]


def shared_options(q: Tensor, v: Tensor) -> dict[str, Any]:
    """The constants that every kernel has."""
    dim, value_dim = q.shape[-1], v.shape[-1]
    return dict(
        D=dim,
        BLOCK_D=max(16, triton.next_power_of_2(dim)),
        DV=value_dim,
        BLOCK_DV=max(16, triton.next_power_of_2(value_dim)),
        PRECISION="ieee",
        UPCAST=INTERPRETED and q.dtype == torch.bfloat16,
    )


def options(kernel: str, q: Tensor, v: Tensor, window: Window | None = None) -> Config:
    """Return the configuration of a kernel for the tensors' dtype, head size and device.

    kernel: `forward`, `query_gradient` or `key_gradient`. For a window, what was measured and is
    stored in `triton_tuned.json` comes before the defaults.
    """
    if INTERPRETED:
        return Config((16,), (16,), 4, 1)
    if window is not None:
        measured = read_tuned(TUNED).get(tuning_key(kernel, q, v, window))
        if measured is not None:
            return measured
    size = _size(q, v)
    if q.dtype == torch.float32:
        return _FP32[kernel][size]
    return _HALF[kernel, architecture(q.device)][size]


def _size(q: Tensor, v: Tensor) -> int:
    """0, 1, 2 for heads of up to 64, 128, 256."""
    wide = max(q.shape[-1], v.shape[-1])
    return 0 if wide <= 64 else 1 if wide <= 128 else 2


def tuning_key(kernel: str, q: Tensor, v: Tensor, window: Window) -> str:
    """What decides which configuration is fastest: GPU, kernel, dtype, head size, window."""
    gpu = torch.cuda.get_device_name(q.device) if q.is_cuda else q.device.type
    keys = math.prod(min(2 * a.radius - 1, a.length) if a.radius else a.kernel for a in window.axes)
    size = "small" if keys < SMALL else "large"
    kind = "disc" if window.radius else "boxes"
    dtype = "fp32" if q.dtype == torch.float32 else "half"
    return f"{gpu}, {kernel}, {dtype}, {(64, 128, 256)[_size(q, v)]}, {size} {kind}"


TUNED = Path(__file__).with_name("triton_tuned.json")


@cache
def read_tuned(path: Path) -> dict[str, Config]:
    """The measured configurations in a file, by `tuning_key`; none where there is no file."""
    if not path.exists():
        return {}
    stored = json.loads(path.read_text(encoding="utf-8"))
    return {
        key: Config(tuple(x["queries"]), tuple(x["keys"]), x["warp_rows"], x["stages"])
        for key, x in stored.items()
    }


@torch.compiler.assume_constant_result
def why_not_device(device: torch.device) -> str | None:
    """Return why Triton cannot compile for a GPU, or None."""
    major, minor = torch.cuda.get_device_capability(device)
    if torch.version.hip is None and major < 8:
        return f"the GPU has compute capability {major}.{minor}, Triton needs 8.0"
    return None


def architecture(device: torch.device) -> int:
    """Which matrix instructions a GPU has: 80 (mma), 90 (wgmma), 100 (tcgen05) or AMD's."""
    if torch.version.hip is not None:
        return AMD
    major = torch.cuda.get_device_capability(device)[0]
    return {9: 90, 10: 100}.get(major, 80)


# For heads of up to 64, 128 and 256: none of these keeps registers in memory on the way.
_HALF = {
    ("forward", AMD): (
        Config((64, 128), (64,), 16, 1), Config((128,), (32,), 16, 1), Config((64,), (32,), 8, 1),
    ),
    ("query_gradient", AMD): (
        Config((128,), (64,), 16, 1), Config((64,), (32,), 16, 1), Config((64,), (32,), 8, 1),
    ),
    ("key_gradient", AMD): (
        Config((32,), (128,), 16, 1), Config((32,), (64,), 8, 1), Config((32,), (32,), 4, 1),
    ),
    ("forward", 80): (
        Config((64, 128), (64,), 16, 3), Config((128,), (64,), 16, 2), Config((64,), (32,), 8, 2),
    ),
    ("forward", 90): (
        Config((64, 128), (64,), 16, 3), Config((128,), (64,), 16, 3), Config((64,), (32,), 8, 2),
    ),
    ("forward", 100): (
        Config((64, 128), (64,), 16, 3), Config((128,), (64,), 16, 3), Config((64,), (32,), 8, 2),
    ),
    ("query_gradient", 80): (
        Config((128,), (64,), 16, 2), Config((128,), (32,), 16, 2), Config((64,), (32,), 8, 1),
    ),
    ("query_gradient", 90): (
        Config((128,), (64,), 16, 2), Config((128,), (64,), 16, 2), Config((64,), (32,), 8, 2),
    ),
    ("query_gradient", 100): (
        Config((128,), (64,), 16, 2), Config((128,), (64,), 16, 2), Config((64,), (32,), 8, 2),
    ),
    ("key_gradient", 80): (
        Config((32,), (128,), 16, 2), Config((64,), (64,), 8, 2), Config((32,), (32,), 4, 1),
    ),
    ("key_gradient", 90): (
        Config((64,), (128,), 16, 2), Config((32,), (128,), 16, 2), Config((32,), (32,), 4, 1),
    ),
    ("key_gradient", 100): (
        Config((64,), (128,), 16, 2), Config((64,), (128,), 16, 2), Config((32,), (32,), 4, 1),
    ),
}  # fmt: skip
_FP32 = {
    "forward": (Config((64,), (16,), 8, 1), Config((32,), (16,), 4, 1), Config((32,), (16,), 4, 1)),
    "query_gradient": (
        Config((32,), (32,), 4, 1), Config((16,), (16,), 2, 1), Config((16,), (16,), 2, 1),
    ),
    "key_gradient": (
        Config((32,), (32,), 4, 1), Config((16,), (32,), 4, 1), Config((16,), (16,), 2, 1),
    ),
}  # fmt: skip


def exceeds_int32(box: Box, *tensors: Tensor) -> bool:
    """Whether two entries of a box lie 2**31 or more entries apart."""
    spans = (
        x.shape[-1] + sum((side - 1) * step for side, step in zip(box, axes, strict=True))
        for x in tensors
        for axes in [strides(x)[1:4]]
    )
    return max(spans) >= 2**31
