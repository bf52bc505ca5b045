"""Grid attention on random cases, forward and backward, next to dense attention in fp64.

VISTOKEN_FUZZ_CASES sets how many cases of each rank run (60); 1000 is the whole suite. Failures
print their case; `kernel_cases.draw(rank, seed, size)` makes it again.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import cycle, islice

import pytest
import torch

from dense_oracle import distance
from kernel_cases import (
    LARGE,
    SMALL,
    TINY,
    Inputs,
    Size,
    draw,
    make_grads,
    make_inputs,
    solve,
)
from kernel_checks import call, check_case, check_forward, gradients
from vistoken.errors import BackendUnavailable

CASES = int(os.environ.get("VISTOKEN_FUZZ_CASES", "60"))
SHARES, GPU_SHARES = 4, 16  # tests that the cases of one rank and backend are split into
CPU_DTYPES = (torch.float32, torch.float64, torch.float32, torch.bfloat16, torch.float16)
GPU_DTYPES = (torch.bfloat16, torch.float32, torch.float16, torch.bfloat16)

needs_triton = pytest.mark.skipif(not importlib.util.find_spec("triton"), reason="needs triton")
needs_natten = pytest.mark.skipif(not importlib.util.find_spec("natten"), reason="needs natten")
ranks = pytest.mark.parametrize("rank", (1, 2, 3))
shares = pytest.mark.parametrize("share", range(SHARES))


def numbered(
    share: int, count: int, dtypes: Sequence[torch.dtype], shares: int = SHARES
) -> Iterator[tuple[int, torch.dtype]]:
    """The seeds of a share of `count` cases, each with one of the dtypes in turn."""
    in_turn = islice(cycle(dtypes), share % len(dtypes), None)
    return zip(range(share, count, shares), in_turn, strict=False)


def small_dims(size: Size) -> Size:
    """Head dims that every backend with limits takes."""
    return size._replace(dims=(8, 16, 32, 64))


@ranks
@shares
def test_tiled(rank: int, share: int) -> None:
    for seed, dtype in numbered(share, CASES, CPU_DTYPES):
        check_case(draw(rank, seed, SMALL), "tiled", "cpu", dtype)


@ranks
def test_reference(rank: int) -> None:
    for seed in range(10_000, 10_000 + CASES // 8):
        check_case(draw(rank, seed, SMALL), "reference", "cpu", CPU_DTYPES[seed % 5])


@needs_triton
@ranks
@shares
def test_triton_interpreted(rank: int, share: int) -> None:
    if torch.cuda.is_available():
        pytest.skip("needs the interpreter, which runs where there is no GPU")
    count = max(SHARES, CASES // 15)
    # the interpreter cuts bits off where it should round to bfloat16
    for seed, dtype in numbered(share, count, (torch.float32, torch.float16)):
        check_case(draw(rank, seed, TINY), "triton", "cpu", dtype)


@ranks
@pytest.mark.parametrize("backend", ["flex", pytest.param("natten", marks=needs_natten)])
def test_backends_that_take_some_cases(rank: int, backend: str) -> None:
    """Forward only: neither has a backward on the CPU. What they refuse they must say."""
    ran = 0
    for seed in range(20_000, 20_000 + max(3, CASES // 20)):
        try:
            check_forward(draw(rank, seed, small_dims(SMALL)), backend, "cpu", torch.float32)
            ran += 1
        except BackendUnavailable as refusal:
            assert len(str(refusal)) > 40
    assert ran >= 2


@pytest.mark.gpu
@needs_triton
@ranks
@pytest.mark.parametrize("share", range(GPU_SHARES))
def test_on_the_gpu(rank: int, share: int) -> None:
    for seed, dtype in numbered(share, CASES, GPU_DTYPES, GPU_SHARES):
        check_case(draw(rank, seed, LARGE), "triton", "cuda", dtype)


@pytest.mark.gpu
@ranks
def test_tiled_on_the_gpu(rank: int) -> None:
    for seed in range(30_000, 30_000 + CASES // 8):
        check_case(draw(rank, seed, LARGE), "tiled", "cuda", GPU_DTYPES[seed % 4])


@ranks
def test_the_cases_have_every_feature(rank: int) -> None:
    cases = [draw(rank, seed, SMALL) for seed in range(CASES)]
    for feature in ("extra", "globals", "scale", "layouts", "needs_grad"):
        assert len({getattr(case, feature) for case in cases}) > 2 or (feature, rank) != (
            "radius",
            2,
        )
    assert (rank == 2) == any(case.radius for case in cases)
    assert any(case.extra == 0 for case in cases) and any(case.scale == 0 for case in cases)
    assert any(all(case.is_causal) and max(case.dilation) > 1 for case in cases)
    assert any(case.grid == case.kernel_size for case in cases)
    assert any(x % d for case in cases for x, d in zip(case.grid, case.dilation, strict=True))


@ranks
def test_the_gradients_by_hand_are_those_of_the_results_by_hand(rank: int) -> None:
    """Next to finite differences, along one random direction."""
    cases = [draw(rank, seed, SMALL) for seed in range(300)]
    for case in [case for case in cases if case.globals and case.extra][:3]:
        inputs = make_inputs(case, dtype=torch.float64).map(torch.clone)
        grads = make_grads(case, solve(case, inputs).outputs)
        step = inputs.map(lambda x: torch.randn_like(x) * 1e-5)
        losses = []
        for sign in (1, -1):
            pairs = zip(inputs, step, strict=True)
            moved = Inputs(*(None if x is None else x + sign * d for x, d in pairs))
            found = zip(solve(case, moved).outputs, grads, strict=True)
            losses.append(sum(float((x * g).sum()) for x, g in found if g is not None))
        slopes = solve(case, inputs, grads).grads
        wanted = sum(float((slopes[name] * d).sum()) for name, d in step._asdict().items())
        assert abs((losses[0] - losses[1]) / 2 - wanted) <= 1e-6 * abs(wanted) + 1e-11


@pytest.mark.parametrize("backend", ["tiled", pytest.param("triton", marks=pytest.mark.gpu)])
def test_gradients_of_keys_that_dilation_groups_share_are_rounded_once(backend: str) -> None:
    """Sums in half precision over the groups would grow with their number."""
    device = "cuda" if backend == "triton" else "cpu"
    case = replace(
        draw(1, 0, SMALL), grid=(512,), kernel_size=(4,), stride=(1,), dilation=(16,),
        is_causal=(False,), batch=1, heads=2, kv_heads=1, dim=32, value_dim=32, scale=None,
        extra=6, globals=None, layouts=("plain",) * 3, loss_on_lse=True, needs_grad="kv",
    )  # fmt: skip
    inputs = make_inputs(case, device, torch.float16)
    inputs.leaves(case)
    outputs = call(case, inputs, backend)
    grads = make_grads(case, outputs)
    found = gradients(case, inputs, outputs, grads)
    exact, dense = (solve(case, inputs, grads, low=low).grads for low in (False, True))
    for name in ("extra_k", "extra_v"):
        far = distance(found[name], exact[name])
        assert far <= 1.5 * distance(dense[name], exact[name]), name
