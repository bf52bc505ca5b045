"""The Triton kernels of grid attention compile for absent GPUs, to the code that is intended."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton")
SCRIPT = Path(__file__).with_name("compile_grid.py")
PLAIN = {"forward_kernel", "query_gradient_kernel", "key_gradient_kernel"}
DENSE = {f"dense_{name}" for name in PLAIN}


def compiled(capability: int, *names: str) -> list[dict[str, Any]]:
    """What the kernels of some cases are compiled to; in a process without the interpreter."""
    environment = {name: x for name, x in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([str(SCRIPT.parents[1]), *filter(None, sys.path)])
    done = subprocess.run(
        [sys.executable, str(SCRIPT), str(capability), *names],
        env=environment, capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("capability", "names", "kernels", "instructions"),
    [
        (80, ["image, 128"], PLAIN, ["mma"]),
        (90, ["image and text, 128", "video, 64"], PLAIN | DENSE, ["wgmma"]),
        (100, ["image, 128"], PLAIN, ["tcgen05", "mma"]),
        (0, ["image, 128"], PLAIN, ["mfma"]),
    ],
    ids=["sm_80", "sm_90", "sm_100", "gfx942"],
)
def test_no_spills_and_matrix_instructions(
    capability: int, names: list[str], kernels: set[str], instructions: list[str]
) -> None:
    found = compiled(capability, *names)
    assert {(kernel["case"], kernel["kernel"]) for kernel in found} == {
        *((names[0], kernel) for kernel in kernels),
        *((name, kernel) for name in names[1:] for kernel in PLAIN),
    }
    for kernel in found:
        assert kernel["stack"] == 0, kernel  # all registers fit
        assert any(kernel[name] for name in instructions), kernel
        # the next box is on its way while one is computed
        assert kernel["copies"] > 0 or not capability, kernel
        # 99 KiB are what the smallest GPUs with the instructions of sm_80 have
        assert kernel["shared"] <= {80: 99, 90: 227, 100: 227, 0: 64}[capability] * 1024, kernel
