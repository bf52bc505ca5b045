"""Compile the Hopper kernels for compute capability 9.0, where no GPU is; prints what came out.

Run as a program: Triton must not have been told to interpret. Arguments: kernel, head dimension,
1 for a disc with text tokens (or partial blocks), and 1 for the gradients of keys and values.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import compile as compile_kernel
from triton.experimental.gluon import language as gl
from triton.experimental.gluon._runtime import GluonASTSource

from vistoken.kernels import grid_hopper_backward_kernel, grid_hopper_kernel, list_hopper_kernel

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
LISTS = (
    "full_count", "full_index", "partial_count", "partial_index", "partial_bits", "table",
)  # fmt: skip


def descriptor(*block: int) -> str:
    """The type of a tensor descriptor that loads blocks of this shape."""
    layout = gl.NVMMASharedLayout.get_default_for(list(block), gl.bfloat16)
    return f"tensordesc<bf16{list(block)},{layout!r}>"


def forward(dim: int, full: bool, _: bool) -> tuple[Any, dict[str, str], dict[str, Any]]:
    box, half = (1, 8, 16), (1, 8, 8)
    types = {"tables": "*i32", "lse": "*fp32", "lse_global": "*fp32", "scale": "fp32"}
    types |= dict.fromkeys(("q_desc", "o_desc"), descriptor(1, *half, dim))
    types |= dict.fromkeys(("k_desc", "v_desc"), descriptor(1, *box, dim))
    fixed: dict[str, Any] = {
        "QBOX": box, "HALF": half, "KBOX": box, "D": dim,
        "STAGES": 256 // dim, "Q_STAGES": 2, "DISC": full,
    }  # fmt: skip
    if full:
        types |= dict.fromkeys(("gq_desc", "go_desc"), descriptor(1, 64, dim))
        types |= dict.fromkeys(("xk_desc", "xv_desc"), descriptor(1, 128, dim))
    else:
        fixed |= dict.fromkeys(("gq_desc", "go_desc", "xk_desc", "xv_desc"))
    return grid_hopper_kernel.hopper_grid_forward, types, fixed


def gradients(dim: int, full: bool, keys: bool) -> tuple[Any, dict[str, str], dict[str, Any]]:
    half = (1, 8, 8)
    pointers = ("lse", "delta", "extra_lse", "extra_delta")
    types = {"tables": "*i32", "scale": "fp32", **dict.fromkeys(pointers, "*fp32")}
    box = ("rows1", "rows2", "out1", "out2", "columns1", "columns2")
    types |= dict.fromkeys(box, descriptor(1, *half, dim))
    line = ("global1", "global2", "global_out1", "global_out2", "extra1", "extra2")
    fixed: dict[str, Any] = {
        "RBOX": (1, 8, 16), "HALF": half, "CBOX": half, "D": dim, "STAGES": 4, "KEYS": keys,
        "DISC": full,
    }  # fmt: skip
    if full:
        types |= dict.fromkeys(line, descriptor(1, 64, dim))
    else:
        fixed |= dict.fromkeys(line)
    if not keys:
        fixed |= dict.fromkeys(("out2", "global_out2"))
    return grid_hopper_backward_kernel.hopper_grid_gradients, types, fixed


def lists(dim: int, full: bool, _: bool) -> tuple[Any, dict[str, str], dict[str, Any]]:
    types = {"scale": "fp32", "lse": "*fp32", **dict.fromkeys(LISTS, "*i32")}
    types |= dict.fromkeys(("q_desc", "o_desc"), descriptor(1, 64, dim))
    types |= dict.fromkeys(("k_desc", "v_desc"), descriptor(1, 128, dim))
    fixed: dict[str, Any] = {
        "BLOCK_Q": 128, "BLOCK": 128, "D": dim, "STAGES": 256 // dim, "RAGGED": full,
        "PARTIAL": full,
    }  # fmt: skip
    if not full:
        fixed["table"] = None
    return list_hopper_kernel.hopper_list_forward, types, fixed


def main(name: str, dim: str, full: str, keys: str) -> None:
    """Compile one kernel and print, as JSON, what is in its machine code."""
    build = {"forward": forward, "gradients": gradients, "lists": lists}[name]
    kernel, types, fixed = build(int(dim), full == "1", keys == "1")
    signature = {arg: types.get(arg, "i32") for arg in kernel.arg_names}
    signature |= dict.fromkeys(fixed, "constexpr")
    places = {(kernel.arg_names.index(arg),): value for arg, value in fixed.items()}
    compiled = compile_kernel(
        GluonASTSource(kernel, signature, places),
        target=GPUTarget("cuda", 90, 32),
        options={"num_warps": 4, "maxnreg": 168},
    )
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "kernel.cubin")
        file.write_bytes(compiled.asm["cubin"])
        code = subprocess.run(
            [TOOLS / "nvdisasm", "-c", file], check=True, capture_output=True, text=True
        ).stdout
    pattern = r"\b(HGMMA|WARPGROUP\.DEPBAR|UTMALDG|UTMASTG|USETMAXREG|STL|LDL)"
    print(
        json.dumps(
            {
                "shared": compiled.metadata.shared,
                "warps": compiled.metadata.num_warps,
                "events": re.findall(pattern, code),
            }
        )
    )


if __name__ == "__main__":
    main(*sys.argv[1:])
