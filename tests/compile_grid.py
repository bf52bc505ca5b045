"""Compile the Triton kernels of grid attention for a GPU that is not there, and describe the code.

Run as a program: `compile_grid.py CAPABILITY CASE...`; prints one JSON object per kernel. The
capability is 80, 90, ... of NVIDIA GPUs, or 0 for an AMD one.
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
        amd = GPUTarget("hip", "gfx942", 64)
        self.target = GPUTarget("cuda", capability, 32) if capability else amd

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
    "line, 64": (_window((700,), 90), 64, torch.bfloat16, 0),
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
    amd = "amdgcn" in compiled.asm
    found = _usage_amd(compiled.asm["amdgcn"]) if amd else _usage(compiled.asm["cubin"])
    text = compiled.asm["amdgcn" if amd else "ptx"]
    matrix = {
        "mma": "mma.sync", "wgmma": "wgmma.mma_async", "tcgen05": "tcgen05.mma", "mfma": "v_mfma"
    }  # fmt: skip
    return {
        "kernel": launch.kernel.__name__,
        "registers": found[0],
        "stack": found[1],
        "shared": compiled.metadata.shared,
        "copies": text.count("cp.async.c"),
        **{name: text.count(instruction) for name, instruction in matrix.items()},
    }


def _usage(binary: bytes) -> tuple[int, int]:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary)
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, "-res-usage", file.name]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    assert found, usage
    return int(found[1]), int(found[2])


def _usage_amd(text: str) -> tuple[int, int]:
    found = [re.search(rf"\.{name}: *(\d+)", text) for name in ("vgpr_count", "vgpr_spill_count")]
    assert found[0] and found[1], text[-2000:]
    return int(found[0][1]), 4 * int(found[1][1])


def main(capability: int, *names: str) -> None:
    driver.set_active(AbsentGPU(capability))
    triton_launch.architecture = lambda device: capability  # type: ignore[assignment]
    for name in names:
        for launch in launches(name):
            print(json.dumps({"case": name, **describe(launch)}), flush=True)


if __name__ == "__main__":
    main(int(sys.argv[1]), *sys.argv[2:])
