"""Evidence that needs no tolerance: which keys are read, what is never read, and equal bits."""

from __future__ import annotations

import importlib.util
import math
from dataclasses import replace
from itertools import islice
from typing import NamedTuple

import pytest
import torch

from dense_oracle import distance
from kernel_cases import (
    LAYOUTS,
    SMALL,
    TINY,
    Case,
    Inputs,
    Size,
    draw,
    lay_out,
    make_inputs,
)
from kernel_checks import (
    call,
    check_case,
    check_coordinates,
    check_poison,
    check_reach,
    check_repeats,
)

gpu = pytest.mark.gpu
triton = pytest.mark.skipif(
    not importlib.util.find_spec("triton") or torch.cuda.is_available(),
    reason="needs triton and its interpreter, which runs where there is no GPU",
)


class Place(NamedTuple):
    """What runs a case: how many of them, and how large."""

    backend: str
    device: str
    dtype: torch.dtype
    size: Size
    number: int

    def cases(self, rank: int, share: int = 1) -> list[Case]:
        """Cases without a disc, or a share of them."""
        drawn = (draw(rank, seed, self.size) for seed in range(40_000, 41_000))
        plain = (case for case in drawn if not case.radius)
        return list(islice(plain, max(self.number // share, 2)))

    def run(self, case: Case) -> tuple[Case, str, str, torch.dtype]:
        """The arguments of a check."""
        return case, self.backend, self.device, self.dtype


GPU_SIZE = SMALL._replace(dims=(16, 64, 64, 128, 128))
TILED = Place("tiled", "cpu", torch.float32, SMALL._replace(tokens=160), 24)
REFERENCE = Place("reference", "cpu", torch.float32, SMALL._replace(tokens=60), 6)
INTERPRETED = Place("triton", "cpu", torch.float32, TINY, 2)
GPU, HALF = (Place("triton", "cuda", x, GPU_SIZE, 12) for x in (torch.float32, torch.float16))
PLACES = pytest.mark.parametrize(
    "place",
    [
        pytest.param(TILED, id="tiled"),
        pytest.param(REFERENCE, id="reference"),
        pytest.param(INTERPRETED, id="triton", marks=triton),
        pytest.param(GPU, id="gpu", marks=gpu),
        pytest.param(HALF, id="gpu, half", marks=gpu),
    ],
)
RANKS = pytest.mark.parametrize("rank", (1, 2, 3))


@PLACES
@RANKS
def test_the_values_seen_are_counted(rank: int, place: Place) -> None:
    for case in place.cases(rank):
        check_coordinates(*place.run(case))


@PLACES
@RANKS
def test_poisoned_keys_change_nothing(rank: int, place: Place) -> None:
    for case in place.cases(rank):
        tokens = math.prod(case.grid)
        check_poison(*place.run(case), sorted({0, tokens // 3, tokens // 2, tokens - 1}))


@PLACES
@RANKS
def test_gradients_reach_what_was_seen(rank: int, place: Place) -> None:
    tokens = 12 if place is INTERPRETED else 50
    few = place._replace(size=place.size._replace(tokens=tokens))
    for case in few.cases(rank, 3):
        check_reach(*place.run(case))


@PLACES
@RANKS
def test_two_runs_give_the_same_bits(rank: int, place: Place) -> None:
    for case in place.cases(rank, 4):
        check_repeats(*place.run(case))


@PLACES
def test_what_lies_beside_the_tensors_is_not_read(place: Place) -> None:
    """NaN around and between all entries, on sizes that no tile divides."""
    for rank in (1, 2, 3):
        for layout in ("beside_nan", "spread"):
            case = replace(place.cases(rank)[0], layouts=(layout,) * 3, extra=3, globals=None)
            check_case(*place.run(replace(case, needs_grad="qkv")))


@PLACES
def test_an_empty_batch_is_an_empty_result(place: Place) -> None:
    case = replace(place.cases(2)[0], extra=2, globals=3, layouts=("plain",) * 3)
    inputs = make_inputs(case, place.device, place.dtype).map(lambda x: x[:0])
    out, lse, global_out, global_lse = call(case, inputs, place.backend)
    assert global_out is not None and global_lse is not None
    assert out.shape == (0, *case.grid, case.heads, case.value_dim)
    assert lse.shape == out.shape[:-1] and global_lse.shape == global_out.shape[:-1]
    assert global_out.shape == (0, 3, case.heads, case.value_dim)


@pytest.mark.parametrize("layout", LAYOUTS[1:])
def test_layouts_are_what_their_names_say(layout: str) -> None:
    values = torch.randn(2, 5, 4, 3, 8)
    found = lay_out(values, layout)
    alike = {"same_batch": values[:1], "same_heads": values[..., :1, :]}.get(layout, values)
    assert torch.equal(found, alike.expand_as(values)) and not found.is_contiguous()


# --- tensors of more than 2^31 elements ----------------------------------------------------------

# Other strides may lead to another kernel: a rounding apart, and an offset that wrapped far more.
NEAR = {torch.bfloat16: 5e-3, torch.float32: 1e-6}


def forward_and_backward(case: Case, inputs: Inputs) -> list[torch.Tensor]:
    """out, lse and the gradients of q, k and v for a loss that weighs the channels."""
    leaves = [x.detach().requires_grad_() for x in inputs[:3]]
    out, lse, *_ = call(case, Inputs(*leaves, None, None, None), "triton")
    weights = torch.linspace(-1, 1, case.value_dim, device=out.device, dtype=out.dtype)
    grads = torch.autograd.grad(out, leaves, weights.expand_as(out))
    return [out.detach(), lse.detach(), *grads]


@gpu
@RANKS
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_offsets_beyond_2_to_the_31(rank: int, dtype: torch.dtype) -> None:
    """The last plane of each tensor begins more than 2^31 elements after the first."""
    grid = (40, 9, 7)[:rank]
    case = replace(
        draw(rank, 0, SMALL), grid=grid, kernel_size=(5, 4, 3)[:rank], stride=(2, 1, 3)[:rank],
        dilation=(3, 2, 1)[:rank], is_causal=(False,) * rank, radius=0, batch=1, dim=64,
        value_dim=64, layouts=("plain",) * 3, extra=None, globals=None, scale=None,
    )  # fmt: skip
    near = make_inputs(case, "cuda", dtype)
    room = torch.full((2**31 + 2**24,), math.nan, device="cuda", dtype=dtype)

    plain = forward_and_backward(case, near)

    def far(x: torch.Tensor) -> torch.Tensor:
        step = (2**31 // (grid[0] - 1) // 64 + 1) * 64
        inner = x[0, 0].contiguous()
        view = room.as_strided((1, grid[0], *inner.shape), (1, step, *inner.stride()))
        return view.copy_(x)

    for name in ("q", "k", "v"):
        moved = near._replace(**{name: far(getattr(near, name))})
        for found, wanted in zip(forward_and_backward(case, moved), plain, strict=True):
            assert distance(found, wanted.double()) <= NEAR[dtype], name


@gpu
def test_a_result_of_more_than_2_to_the_31_elements() -> None:
    """Its last entries are those of a small call; the inputs repeat by strides of 0."""
    case = replace(
        draw(2, 0, SMALL), grid=(64, 64), kernel_size=(3, 5), stride=(1, 1), dilation=(1, 1),
        is_causal=(False, False), radius=0, batch=1, heads=4, kv_heads=4, dim=64, value_dim=64,
        layouts=("plain",) * 3, extra=None, globals=None, scale=None,
    )  # fmt: skip
    one = make_inputs(case, "cuda", torch.bfloat16)
    wanted = forward_and_backward(case, one)
    batch = 2**31 // one.q.numel() + 2
    many = one.map(lambda x: x.expand(batch, *x.shape[1:]))
    found = forward_and_backward(replace(case, batch=batch), many)
    assert found[0].numel() > 2**31
    for x, exact in zip(found, wanted, strict=True):
        for entry in (0, batch // 2, batch - 1):
            assert distance(x[entry], exact[0].double()) <= NEAR[torch.bfloat16], entry
