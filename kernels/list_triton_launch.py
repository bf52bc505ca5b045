"""How the Triton kernels over block lists are launched: constants, tiles, stages and warps."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any

import torch
from torch import Tensor

from vistoken.kernels import triton_launch
from vistoken.kernels.block_mask import BlockMask
from vistoken.kernels.triton_launch import Config, Launch, shared_options
from vistoken.kernels.triton_tile import INTERPRETED

_SPARE = 8192  # bytes of shared memory that are not for tiles of keys or queries


def list_launch(
    kernel: Any,
    programs: int,
    rows: int,
    arguments: tuple[Any, ...],
    q: Tensor,
    v: Tensor,
    mask: BlockMask,
    scale: float,
    config: Config,
) -> Launch:
    """Return the launch of a kernel over block lists, with the constants that all of them have.

    rows: of the tile that a program keeps.
    """
    constants = dict(
        BLOCK_Q=mask.block_q,
        BLOCK_KV=mask.block_kv,
        TILE_Q=config.queries[0],
        TILE_KV=config.keys[0],
        RAGGED=mask.lengths is not None or mask.kv_tokens % mask.block_kv != 0,
        PARTIAL=mask.table is not None,
        FLIP=scale < 0,
        **shared_options(q, v),
    )
    return Launch(kernel, programs, rows, arguments, constants, config)


def list_config(kernel: str, q: Tensor, v: Tensor, mask: BlockMask) -> Config:
    """Return the tiles and the launch of a kernel: parts of blocks that fit the shared memory.

    kernel: `forward`, `query_gradient` or `key_gradient`.
    """
    best = triton_launch.options(kernel, q, v)
    tile_q, tile_kv = max(best.queries), max(best.keys)
    over_keys = kernel != "key_gradient"
    wide = _padded(q) > 64 or _padded(v) > 64
    if INTERPRETED:  # what costs there is the number of programs and steps
        tile_q, tile_kv = 64, 64
    elif not over_keys:  # leaves registers for the bits of a partial block
        tile_q = min(tile_q, 32)
        if wide and triton_launch.architecture(q.device) == 100:
            tile_kv = min(tile_kv, 64)
    tile_q, tile_kv = min(tile_q, mask.block_q), min(tile_kv, mask.block_kv)
    kept, walked = (tile_q, tile_kv) if over_keys else (tile_kv, tile_q)
    row = (_padded(q) + _padded(v)) * q.element_size()
    room = (_shared_memory(q.device) - _SPARE) // row  # rows that fit; the walked ones in stages
    stages = best.stages
    while kept + stages * walked > room and (stages, kept, walked) != (1, 16, 16):
        if stages > 2 or (stages > 1 and kept == walked == 16):
            stages -= 1
        elif walked > 16 and walked * 2 >= kept:
            walked //= 2
        elif kept > 16:
            kept //= 2
        else:
            walked //= 2
    tile_q, tile_kv = (kept, walked) if over_keys else (walked, kept)
    warp_rows = min(best.warp_rows, 8) if wide and kept < 128 else best.warp_rows
    return replace(best, queries=(tile_q,), keys=(tile_kv,), stages=stages, warp_rows=warp_rows)


def _padded(x: Tensor) -> int:
    """Entries of a head, up to the next power of two that a matrix product can take."""
    return max(1 << (x.shape[-1] - 1).bit_length(), 16)


@cache
def _shared_memory(device: torch.device) -> int:
    """Bytes of shared memory that a program may have."""
    if device.type != "cuda":
        return 1 << 20
    properties = torch.cuda.get_device_properties(device)
    least = properties.shared_memory_per_block
    return max(least, getattr(properties, "shared_memory_per_block_optin", 0))
