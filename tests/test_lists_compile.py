"""The Triton kernels over block lists compile for absent GPUs, to the code that is intended."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
SCRIPT = Path(__file__).with_name("compile_lists.py")
KERNELS = {"forward_kernel", "query_kernel", "key_kernel"}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("capability", "names", "instructions"),
    [
        (80, ["lists, 128"], ["mma"]),
        (90, ["lists, 128", "full blocks, 128", "lists, 64", "lists, 80"], ["wgmma"]),
        (100, ["lists, 128"], ["tcgen05", "mma"]),
    ],
    ids=["sm_80", "sm_90", "sm_100"],
)
def test_no_spills_and_matrix_instructions(
    capability: int, names: list[str], instructions: list[str]
) -> None:
    environment = {name: x for name, x in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join(sys.path)
    done = subprocess.run(
        [sys.executable, str(SCRIPT), str(capability), *names],
        env=environment, capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert {(kernel["case"], kernel["kernel"]) for kernel in found} == {
        (name, kernel) for name in names for kernel in KERNELS
    }
    for kernel in found:
        assert kernel["stack"] == 0, kernel  # all registers fit
        assert any(kernel[name] for name in instructions), kernel
        assert kernel["copies"] > 0, kernel  # the next tile is on its way while one is computed
        assert kernel["shared"] <= {80: 163, 90: 227, 100: 227}[capability] * 1024, kernel
