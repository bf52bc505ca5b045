"""The Hopper kernels: compiled everywhere, run against the definition where such a GPU is."""

from __future__ import annotations

import importlib.util
import json
import os
import random
import subprocess
import sys
from itertools import product
from pathlib import Path
from types import FunctionType

import pytest
import torch
from torch import Tensor

from vistoken.kernels import grid_reference, list_reference
from vistoken.kernels.block_mask import BlockMask
from vistoken.kernels.windows import Window, disc_window, neighborhood

ROOT = Path(__file__).resolve().parents[1]
SHARED_MEMORY = 227 * 1024  # of a block on compute capability 9.0
# kernel, head dimension, everything on, keys; and how many reloads of spilled registers its loop
# may have: the pass for keys and values holds two sums and two products, and reloads two scalars.
COMPILED = {
    "window": (("forward", 128, 0, 0), 0),
    "disc": (("forward", 64, 1, 0), 0),
    "gradients of queries": (("gradients", 128, 0, 0), 0),
    "gradients of keys": (("gradients", 64, 0, 1), 4),
    "block lists": (("lists", 128, 1, 0), 0),
}


def hopper() -> bool:
    return torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)


on_hopper = pytest.mark.skipif(not hopper(), reason="needs a GPU of compute capability 9.0")


# --- machine code, without a GPU ----------------------------------------------------------------


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs triton")
@pytest.mark.parametrize(("case", "reloads"), COMPILED.values(), ids=COMPILED.keys())
def test_machine_code(case: tuple[str, int, int, int], reloads: int) -> None:
    """Bulk copies feed wgmma, registers move to the consumers, and loops do not spill."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), environment.get("PYTHONPATH", "")])
    printed = subprocess.run(
        [sys.executable, str(ROOT / "tests" / "hopper_compiler.py"), *map(str, case)],
        check=True, capture_output=True, text=True, env=environment,
    ).stdout  # fmt: skip
    found = json.loads(printed.splitlines()[-1])
    assert found["warps"] == 12  # two consumer warpgroups, one for the producer's warp
    assert found["shared"] <= SHARED_MEMORY
    events = found["events"]
    assert {"HGMMA", "UTMALDG", "UTMASTG", "USETMAXREG"} <= set(events)
    spilled = spills_between_products(events)
    assert len(spilled) <= reloads and "STL" not in spilled


def spills_between_products(events: list[str]) -> list[str]:
    """Loads and stores of spilled registers between the products of one step and its last wait.

    A step issues two products (scores, and the output of the step before, or the gradient of the
    weights) before it waits twice: that is where the loop is.
    """
    spilled = []
    for i in range(1, len(events)):
        if events[i] == "WARPGROUP.DEPBAR" and events[i - 1] == "HGMMA":
            step = []
            for event in events[i + 1 :]:
                if event in ("WARPGROUP.DEPBAR", "HGMMA"):
                    break
                step.append(event)
            else:
                continue
            if event == "WARPGROUP.DEPBAR":
                spilled += [x for x in step if x in ("STL", "LDL")]
    return spilled


def test_the_search_for_spills_can_fail() -> None:
    step = ["HGMMA", "HGMMA", "WARPGROUP.DEPBAR", "LDL", "WARPGROUP.DEPBAR", "HGMMA"]
    assert spills_between_products(step) == ["LDL"]
    assert spills_between_products(["LDL", *(x for x in step if x != "LDL"), "STL"]) == []


# --- who takes which tile, and what is refused: without a GPU -------------------------------------


class OneProgram:
    """What the kernels' scalar code asks of the language, for one program of a launch."""

    def __init__(self, program: int, programs: int) -> None:
        self.program_id = lambda axis: program
        self.num_programs = lambda axis: programs
        self.where = lambda condition, yes, no: yes if condition else no


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs triton")
@pytest.mark.parametrize("programs", [1, 4, 7, 13])
@pytest.mark.parametrize("global_tiles", [0, 1, 2])
@pytest.mark.parametrize("rounds", [0, 1, 3, 50])
def test_every_tile_is_taken_once(programs: int, global_tiles: int, rounds: int) -> None:
    """The kernels' own schedule, with fewer and with more tiles of global queries than programs."""
    from vistoken.kernels import hopper_boxes

    planes, along = 5, (2, 3, 4)
    n_global, per_head = planes * global_tiles, 2 * 3 * 4
    if not n_global % programs:
        rounds = 0  # as the host says where nobody has one more than the others
    plan = (n_global + planes * per_head, n_global, per_head, max(global_tiles, 1), *along, rounds)
    taken = []
    for program in range(programs):
        language = {"gl": OneProgram(program, programs)}
        turn = FunctionType(hopper_boxes.tile_of_turn.fn.__code__, language)
        decode = FunctionType(hopper_boxes.decode_tile.fn.__code__, language)
        k = 0
        while (index := turn(k, plan, n_global > 0)) < plan[0]:
            is_global, plane, place, *at = decode(index, plan, n_global > 0)
            taken.append((plane, "text", place) if is_global else (plane, *at))
            k += 1
    texts = {(plane, "text", i) for plane in range(planes) for i in range(global_tiles)}
    grid = set(product(range(planes), *map(range, along)))
    assert len(taken) == len(set(taken))
    assert set(taken) == texts | grid


def test_refusals_say_why() -> None:
    from vistoken.kernels import grid_hopper, list_hopper

    x = torch.randn(1, 1, 4, 4, 2, 64)
    assert "GPU" in str(grid_hopper.why_not(x, x, x, disc_window((4, 4), 2), 0.1))
    big = disc_window((1, 9000), 2)
    assert "8192" in str(grid_hopper.why_not(x, x, x, big, 0.1))
    q = torch.randn(1, 256, 2, 64)
    on = torch.ones(2, 2, dtype=torch.bool)
    mask = BlockMask.from_map(on, 256, 256, 128)
    assert "GPU" in str(list_hopper.why_not(q, q, q, mask, 0.1))
    counted = BlockMask.from_map(on, 256, 256, 128, lengths=torch.full((1, 2), 100))
    assert "do not count" in str(list_hopper.why_not(q, q, q, counted, 0.1))
    small = BlockMask.from_map(torch.ones(4, 4, dtype=torch.bool), 256, 256, 64)
    assert "64 x 64" in str(list_hopper.why_not(q, q, q, small, 0.1))


# --- numbers, on a GPU --------------------------------------------------------------------------


def error(found: Tensor, expected: Tensor) -> float:
    """Relative error in the Frobenius norm."""
    expected = expected.double()
    return ((found.double() - expected).norm() / expected.norm()).item()


def draw_window(chance: random.Random) -> Window:
    """A random window of one to three axes, or a disc."""
    rank = chance.choice((1, 2, 3, "disc"))
    if rank == "disc":
        return disc_window((chance.randint(3, 60), chance.randint(3, 60)), chance.randint(1, 70))
    largest = {1: 700, 2: 40, 3: 13}[rank]
    grid = [chance.randint(2, largest) for _ in range(rank)]
    kernel = [chance.randint(1, length) for length in grid]
    stride = [chance.randint(1, k) for k in kernel]
    causal = [chance.random() < 0.3 for _ in grid]
    return next(neighborhood(grid, kernel, stride, 1, causal).groups())[1]


def draw_inputs(seed: int) -> tuple[Window, float, list[Tensor | None]]:
    """A window, a scale, and q, k, v, extra keys and values, global queries."""
    chance = random.Random(seed)
    window = draw_window(chance)
    dtype = chance.choice((torch.bfloat16, torch.float16))
    batch, kv_heads, dim = chance.randint(1, 2), chance.randint(1, 2), chance.choice((64, 128))
    heads = kv_heads * chance.randint(1, 3)
    texts = chance.randint(1, 300) if chance.random() < 0.5 else 0
    queries = chance.randint(1, 300) if chance.random() < 0.4 else 0
    generator = torch.Generator("cuda").manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device="cuda").to(dtype)

    grid = [draw(batch, *window.grid, h, dim) for h in (heads, kv_heads, kv_heads)]
    extra = [draw(batch, texts, kv_heads, dim) if texts else None for _ in range(2)]
    apart = draw(batch, queries, heads, dim) if queries else None
    return window, dim**-0.5 * chance.choice((1, 2)), [*grid, *extra, apart]


def widened(inputs: list[Tensor | None]) -> list[Tensor | None]:
    return [None if x is None else x.double().requires_grad_() for x in inputs]


@on_hopper
@pytest.mark.gpu
@pytest.mark.parametrize("seed", range(40))
def test_outputs_and_gradients(seed: int) -> None:
    """Outputs, log-sum-exp and all gradients, of losses on both; and the same bits twice."""
    from vistoken.kernels import grid_hopper, grid_hopper_backward

    window, scale, inputs = draw_inputs(seed)
    q, k, v, *others = inputs
    assert grid_hopper.why_not(q, k, v, window, scale, *others) is None
    results = grid_hopper.forward(q, k, v, window, scale, *others)
    wide = widened(inputs)
    expected = grid_reference.forward(*wide[:3], window, scale, *wide[3:])
    unit = torch.finfo(q.dtype).eps
    for i, (found, right) in enumerate(zip(results, expected, strict=True)):
        assert (found is None) == (right is None)
        if found is not None:
            assert error(found, right) < (unit if i % 2 == 0 else 1e-5)
    slopes = [None if x is None else torch.randn_like(x) for x in results]
    order = (slopes[0], slopes[1], slopes[2], slopes[3])
    found = grid_hopper_backward.backward(*order, q, k, v, window, scale, *others, *results)
    again = grid_hopper_backward.backward(*order, q, k, v, window, scale, *others, *results)
    right = torch.autograd.grad(
        [x for x in expected if x is not None],
        [x for x in wide if x is not None],
        [x.double() for x in slopes if x is not None],
    )
    present = [x for x in found if x is not None]
    assert [x is None for x in found] == [x is None for x in inputs]
    for gradient, other, exact in zip(
        present, [x for x in again if x is not None], right, strict=True
    ):
        assert torch.equal(gradient, other)
        # the products of four rounded factors: rows, columns, weights or slopes, and d_out
        assert error(gradient, exact) < 2 * unit


@on_hopper
@pytest.mark.gpu
@pytest.mark.parametrize("seed", range(20))
def test_block_lists(seed: int) -> None:
    """Random maps with element masks, a short last block and rows that see nothing."""
    from vistoken.kernels import list_hopper

    chance = random.Random(seed)
    generator = torch.Generator().manual_seed(seed)
    block_q, block_kv = chance.choice((128, 256)), chance.choice((64, 128))
    batch, kv_heads, dim = chance.randint(1, 2), chance.randint(1, 2), chance.choice((64, 128))
    heads = kv_heads * chance.randint(1, 3)
    queries, keys = chance.randint(1, 900), chance.randint(1, 900)
    nq, nk = -(-queries // block_q), -(-keys // block_kv)
    on = torch.rand((batch, heads, nq, nk), generator=generator) < 0.5
    mask = BlockMask.from_map(
        on.cuda(), queries, keys, (block_q, block_kv), batch=batch, heads=heads,
        mask=(lambda b, h, i, j: (i * 7 + j * 13 + h) % 5 < 3) if seed % 2 else None,
    )  # fmt: skip
    shapes = ((queries, heads), (keys, kv_heads), (keys, kv_heads))
    q, k, v = (torch.randn(batch, *shape, dim, device="cuda").bfloat16() for shape in shapes)
    assert list_hopper.why_not(q, k, v, mask, dim**-0.5) is None
    out, lse = list_hopper.forward(q, k, v, mask, dim**-0.5)
    right, right_lse = list_reference.forward(q.double(), k.double(), v.double(), mask, dim**-0.5)
    blind = right_lse.isneginf()
    assert torch.equal(lse.isneginf(), blind)
    assert not out[blind].any()
    if not blind.all():
        assert error(out[~blind], right[~blind]) < torch.finfo(q.dtype).eps
        assert error(lse[~blind], right_lse[~blind]) < 1e-5


@on_hopper
@pytest.mark.gpu
def test_inputs_that_the_copy_engine_cannot_read_in_place() -> None:
    """Slices, expanded batches, heads that are not neighbors, odd offsets: all the same result."""
    from vistoken.kernels import grid_hopper

    window = disc_window((20, 24), 5)
    packed = torch.randn(2, 1, 20, 24, 3, 2, 64, device="cuda").bfloat16()
    q, k, v = packed.unbind(4)
    expected = grid_hopper.forward(*(x.contiguous() for x in (q, k, v)), window, 0.125)
    assert torch.equal(grid_hopper.forward(q, k, v, window, 0.125)[0], expected[0])
    apart = [x.transpose(4, 3).contiguous().transpose(4, 3) for x in (q, k, v)]
    assert torch.equal(grid_hopper.forward(*apart, window, 0.125)[0], expected[0])
    room = [torch.full((x.numel() + 3,), torch.nan, device="cuda").bfloat16() for x in (q, k, v)]
    odd = [r[3:].view(x.shape).copy_(x) for r, x in zip(room, (q, k, v), strict=True)]
    assert torch.equal(grid_hopper.forward(*odd, window, 0.125)[0], expected[0])
    once = [x[:1].expand(2, -1, -1, -1, -1, -1) for x in (q, k, v)]
    twice = grid_hopper.forward(*once, window, 0.125)[0]
    assert torch.equal(twice[0], expected[0][0]) and torch.equal(twice[1], expected[0][0])
