"""Compile the Triton kernels of grid attention for a GPU that is not there, and describe the code.

Run as a program: `compile_grid.py CAPABILITY CASE...`; prints one JSON object per kernel.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from typing import Any

os.environ.pop("TRITON_INTERPRET", None)  # read when a kernel is defined

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver

from vistoken.kernels import grid_triton, grid_triton_backward, triton_launch
from vistoken.kernels.windows import Window, disc_window, neighborhood


class AbsentGPU:
    """What Triton asks of a driver in order to compile."""

    def __init__(self, capability: int) -> None:
        self.target = GPUTarget("cuda", capability, 32)

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


def _window(*arguments: Any) -> Window:
    return next(neighborhood(*arguments).groups())[1]


# name: window, head size, dtype, text tokens
CASES: dict[str, tuple[Window, int, torch.dtype, int]] = {
    "image, 128": (_window((256, 256), 80), 128, torch.bfloat16, 0),
    "image and text, 128": (_window((256, 256), 80), 128, torch.bfloat16, 512),
    "video, 64": (_window((32, 96, 96), 11), 64, torch.bfloat16, 0),
    "disc, 64": (disc_window((256, 256), 16), 64, torch.float16, 0),
    "video, 80": (_window((21, 45, 80), (5, 13, 13)), 80, torch.bfloat16, 0),
    "video, 256": (_window((21, 45, 80), (5, 13, 13)), 256, torch.bfloat16, 0),
    "image, fp32": (_window((64, 64), 13), 64, torch.float32, 0),
}


def launches(name: str) -> list[triton_launch.Launch]:
    """Every launch of a forward and a backward pass, none of which is started."""
    window, dim, dtype, text = CASES[name]
    started: list[triton_launch.Launch] = []
    triton_launch.Launch.run = lambda launch: started.append(launch)  # type: ignore[method-assign]

    def empty(*shape: int, like: torch.dtype = dtype) -> torch.Tensor:
        return torch.empty(*shape, dtype=like, device="meta")

    q = empty(1, *window.grid, 24, dim)
    extra = empty(1, text, 24, dim) if text else None
    results = grid_triton.forward(q, q, q, window, 0.1, extra, extra, extra)
    grid_triton_backward.backward(
        q, None, extra, None, q, q, q, window, 0.1, extra, extra, extra, *results
    )
    return started


def describe(launch: triton_launch.Launch) -> dict[str, Any]:
    """Registers, bytes of registers kept in memory, and instructions of a compiled kernel."""
    compiled = launch.kernel.warmup(*launch.arguments, grid=(1,), **launch.keywords)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, "-res-usage", file.name]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    assert found, usage
    ptx = compiled.asm["ptx"]
    matrix = {"mma": "mma.sync", "wgmma": "wgmma.mma_async", "tcgen05": "tcgen05.mma"}
    return {
        "kernel": launch.kernel.__name__,
        "registers": int(found[1]),
        "stack": int(found[2]),
        "shared": compiled.metadata.shared,
        "copies": ptx.count("cp.async.c"),
        **{name: ptx.count(instruction) for name, instruction in matrix.items()},
    }


def main(capability: int, *names: str) -> None:
    driver.set_active(AbsentGPU(capability))
    triton_launch.architecture = lambda device: capability  # type: ignore[assignment]
    for name in names:
        for launch in launches(name):
            print(json.dumps({"case": name, **describe(launch)}), flush=True)


if __name__ == "__main__":
    main(int(sys.argv[1]), *sys.argv[2:])
