"""Compile the Triton kernels over block lists for a GPU that is not there, and describe the code.

Run as a program: `compile_lists.py CAPABILITY CASE...`; prints one JSON object per kernel.
"""

from __future__ import annotations

import json
import sys

import torch

from compile_grid import AbsentGPU, describe, driver, triton_launch
from vistoken.kernels import list_triton, list_triton_backward
from vistoken.kernels.block_mask import BlockMask

# name: block, head size, dtype, whether blocks are in part or short
CASES: dict[str, tuple[int, int, torch.dtype, bool]] = {
    "lists, 128": (128, 128, torch.bfloat16, True),
    "full blocks, 128": (128, 128, torch.float16, False),
    "lists, 64": (128, 64, torch.bfloat16, True),
    "lists, 80": (64, 80, torch.bfloat16, True),
}


def launches(name: str) -> list[triton_launch.Launch]:
    """Every launch of a forward and a backward pass, none of which is started."""
    block, dim, dtype, part = CASES[name]
    tokens = 4 * block - 7 * part
    mask = BlockMask.from_map(
        torch.ones(4, 4, dtype=torch.bool), tokens, tokens, block,
        mask=(lambda b, h, q, kv: (q + kv) % 3 > 0) if part else None,
    )  # fmt: skip
    q = torch.empty(1, tokens, 24, dim, dtype=dtype)
    forward, out, lse = list_triton.forward_launch(q, q, q, mask, 0.1)
    query, _, delta = list_triton_backward.query_launch(out, lse, q, q, q, mask, 0.1, out, lse)
    key, _, _ = list_triton_backward.key_launch(out, q, q, q, mask, 0.1, lse, delta)
    return [forward, query, key]


def main(capability: int, *names: str) -> None:
    driver.set_active(AbsentGPU(capability))
    triton_launch.architecture = lambda device: capability  # type: ignore[assignment]
    for name in names:
        for launch in launches(name):
            print(json.dumps({"case": name, **describe(launch)}), flush=True)


if __name__ == "__main__":
    main(int(sys.argv[1]), *sys.argv[2:])
