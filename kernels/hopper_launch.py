"""What the host side of the Hopper kernels shares: where they run, and tensor descriptors."""

from __future__ import annotations

from functools import cache, lru_cache
from typing import Any

import torch
from torch import Tensor

HEAD_DIMS = (64, 128)
QUERIES = 128  # of a tile: 64 for each of two consumer warpgroups
STAGES = {64: 4, 128: 2}  # key and value boxes in flight; what 227 KiB of shared memory hold
REGISTERS = 168  # a thread on average: the warpgroups share out three times as many
LEAST_SCALE = 1e-4  # below, hidden scores would not be far enough below the others


def why_not_here(q: Tensor, v: Tensor, scale: float) -> str | None:
    """Return why no Hopper kernel takes these tensors, or None where one can."""
    if not q.is_cuda or torch.version.hip is not None:
        return "the tensors are not on an NVIDIA GPU"
    capability = torch.cuda.get_device_capability(q.device)
    if capability != (9, 0):
        return f"it is written for compute capability 9.0, not {capability[0]}.{capability[1]}"
    if q.dtype not in (torch.bfloat16, torch.float16):
        return f"it takes bfloat16 and float16, not {q.dtype}"
    if q.shape[-1] not in HEAD_DIMS or v.shape[-1] != q.shape[-1]:
        return f"it takes head dimensions {HEAD_DIMS}, those of q, k and v alike"
    if scale < LEAST_SCALE:
        return f"the scale must be at least {LEAST_SCALE}"
    if q.numel() == 0 or v.numel() == 0:
        return "there are no tokens"
    return None


@lru_cache(maxsize=64)
def processors(device: int | None) -> int:
    """Return how many streaming multiprocessors a device has."""
    return torch.cuda.get_device_properties(device or 0).multi_processor_count


def grid_descriptor(x: Tensor, box: tuple[int, int, int]) -> Any:
    """Return a tensor descriptor over [B, T, H, W, heads * D] that loads one head's box."""
    return _descriptor(x, [1, *box, x.shape[-1]])


def list_descriptor(x: Tensor | None, tokens: int) -> Any:
    """Return a tensor descriptor over [B, N, heads * D] that loads one head's `tokens` tokens."""
    return None if x is None else _descriptor(x, [1, tokens, x.shape[-1]])


def _descriptor(x: Tensor, block: list[int]) -> Any:
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

    if not _addressable(x):
        x = x.clone(memory_format=torch.contiguous_format)
    width = x.shape[-2] * x.shape[-1]
    shape = [*x.shape[:-2], width]
    # an axis of one token may have any stride; the hardware wants a multiple of 16 bytes
    strides = [s if n > 1 else width for n, s in zip(x.shape[:-2], x.stride()[:-2], strict=True)]
    return TensorDescriptor(x, shape, [*strides, 1], block, _layout(tuple(block), x.dtype))


@cache
def _layout(block: tuple[int, ...], dtype: torch.dtype) -> Any:
    """The layout in shared memory that the copy engine writes and wgmma reads."""
    from triton.experimental.gluon import language as gl

    kind = gl.bfloat16 if dtype == torch.bfloat16 else gl.float16
    return gl.NVMMASharedLayout.get_default_for(list(block), kind)


def _addressable(x: Tensor) -> bool:
    """Whether the copy engine can read a tensor in place."""
    *outer, head, last = x.stride()
    if last != 1 or (x.shape[-2] > 1 and head != x.shape[-1]) or x.data_ptr() % 16:
        return False
    steps = [s for n, s in zip(x.shape[:-2], outer, strict=True) if n > 1]
    return all(s > 0 and s * x.element_size() % 16 == 0 for s in steps)
