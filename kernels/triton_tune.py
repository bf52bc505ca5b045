"""Measure which configuration of the Triton kernels of grid attention is fastest on this GPU."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import asdict
from itertools import product
from pathlib import Path

import torch
import triton
from torch import Tensor
from triton.runtime.errors import OutOfResources, PTXASError

from vistoken.errors import BackendUnavailable
from vistoken.kernels.grid_triton import forward_launch, why_not
from vistoken.kernels.grid_triton_keys import key_gradient_launch
from vistoken.kernels.grid_triton_queries import query_gradient_launch
from vistoken.kernels.triton_launch import Config, Launch, options, read_tuned, tuning_key
from vistoken.kernels.windows import Window

KERNELS = ("forward", "query_gradient", "key_gradient")
Measured = list[tuple[Config, float]]


def tune(
    window: Window,
    *,
    batch: int = 1,
    heads: int = 8,
    head_dim: int = 128,
    dtype: torch.dtype = torch.bfloat16,
    device: torch.device | str = "cuda",
) -> dict[str, Measured]:
    """Return, for each kernel, its configurations and their times in milliseconds, fastest first.

    The keys are what `vistoken.kernels.triton_launch.options` looks up. Takes a few minutes: every
    configuration is compiled and run on random tensors. Those that do not fit the GPU are left out.
    """
    shape = (batch, *window.grid, heads, head_dim)
    q, k, v, d_out = (torch.randn(shape, dtype=dtype, device=device) for _ in range(4))
    reason = why_not(q, k, v, window, 1.0)
    if reason is not None:
        raise BackendUnavailable(f"The triton backend cannot be tuned: {reason}.")
    found = {}
    for kernel in KERNELS:
        times = [
            (config, time)
            for config in candidates(kernel, head_dim, dtype, options(kernel, q, v))
            if (time := _time(kernel, config, q, k, v, d_out, window)) is not None
        ]
        found[tuning_key(kernel, q, v, window)] = sorted(times, key=lambda entry: entry[1])
    return found


def candidates(kernel: str, head_dim: int, dtype: torch.dtype, default: Config) -> Iterator[Config]:
    """Configurations worth a try, the default first."""
    yield default
    kept = (16, 32, 64) if dtype == torch.float32 else (64, 128)
    walked = (16, 32) if dtype == torch.float32 else (32, 64, 128)
    for rows, columns, warps, stages in product(kept, walked, (4, 8), (1, 2, 3, 4)):
        room = (rows + stages * columns) * 2 * head_dim * dtype.itemsize
        if room > 230_000 or rows * columns > 128 * 128 or rows // warps < 2:
            continue
        queries, keys = (columns, rows) if kernel == "key_gradient" else (rows, columns)
        config = Config((queries,), (keys,), rows // warps, stages)
        if config != default:
            yield config


def _launch(
    kernel: str,
    config: Config,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    d_out: Tensor,
    window: Window,
) -> Launch:
    """One launch of a kernel; the results of a forward pass are made up, which takes no time."""
    scale = q.shape[-1] ** -0.5
    if kernel == "forward":
        return forward_launch(q, k, v, window, scale, config=config)[0]
    lse = q.new_full(q.shape[:-1], math.log(window.tokens), dtype=torch.float32)
    if kernel == "query_gradient":
        return query_gradient_launch(
            d_out, None, q, k, v, window, scale, None, None, d_out, lse, config
        )[0]
    delta = torch.zeros_like(lse)
    return key_gradient_launch(
        d_out, None, q, k, v, window, scale, None, lse, delta, None, None, config
    )[0]


def _time(
    kernel: str,
    config: Config,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    d_out: Tensor,
    window: Window,
) -> float | None:
    """Median time in milliseconds, or None where the configuration does not fit the GPU."""
    launch = _launch(kernel, config, q, k, v, d_out, window)
    try:
        return float(triton.testing.do_bench(launch.run, warmup=10, rep=60, return_mode="median"))
    except (OutOfResources, PTXASError):
        return None


def store(found: dict[str, Measured], path: Path) -> None:
    """Add the fastest configurations to a file; kernels read `triton_launch.TUNED`."""
    stored = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    stored |= {key: asdict(times[0][0]) for key, times in found.items() if times}
    text = json.dumps(dict(sorted(stored.items())), indent=1)
    path.write_text(text + "\n", encoding="utf-8")
    read_tuned.cache_clear()
