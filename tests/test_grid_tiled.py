"""Attention over grid windows in plain torch against its definition, in tiles of all sizes."""

from __future__ import annotations

from random import Random

import pytest
import torch

from vistoken.kernels import grid_reference, grid_tiled
from vistoken.kernels.grid_tiles import Costs, axis_runs, choose_tile, costs_of, visible_keys
from vistoken.kernels.windows import Axis, Window, disc_window, neighborhood
from window_cases import draw_inputs, draw_window, results_and_gradients, worst_error


def window_of(grid, kernel, stride=1, causal=False) -> Window:
    ((_, window),) = neighborhood(grid, kernel, stride, 1, causal).groups()
    return window


def draw_costs(dice: Random) -> Costs:
    """Small grids fit one tile: other budgets make many tiles, batches of them, and parts."""
    return Costs(
        logits=dice.choice((1, 300, 3000, 100_000)),
        most=dice.choice((50, 500, 100_000)),
        strip=dice.choice((100, 3000, 1 << 20)),
        call=dice.choice((0, 5, 100, 2000)),
    )


@pytest.mark.parametrize("seed", range(60))
def test_equals_the_definition(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Outputs, lse and all gradients, through the lse too, in fp64."""
    dice = Random(seed)
    costs = draw_costs(dice)
    monkeypatch.setattr(grid_tiled, "costs_of", lambda device: costs)
    inputs = draw_inputs(dice, draw_window(dice), torch.float64)
    found = results_and_gradients(grid_tiled.forward, inputs)
    expected = results_and_gradients(grid_reference.forward, inputs)
    assert worst_error(found, expected) < 1e-13


@pytest.mark.parametrize(
    ("dtype", "limit"), [(torch.float32, 3e-6), (torch.float16, 1e-3), (torch.bfloat16, 8e-3)]
)
@pytest.mark.parametrize("seed", range(8))
def test_lower_precision(seed: int, dtype: torch.dtype, limit: float) -> None:
    """Computed in fp32 whatever the dtype: only results are rounded to it."""
    dice = Random(1000 + seed)
    inputs = draw_inputs(dice, draw_window(dice), dtype, channels=(16, 40))
    found = results_and_gradients(grid_tiled.forward, inputs)
    expected = results_and_gradients(grid_reference.forward, inputs)
    assert found["lse"].dtype == torch.float32
    assert worst_error(found, expected) < limit


def test_gradcheck() -> None:
    window = window_of((2, 3), (2, 2), (1, 2), (False, True))
    q, k = (torch.randn(1, 1, 2, 3, heads, 2, dtype=torch.float64) for heads in (2, 1))
    v, more = torch.randn(1, 1, 2, 3, 1, 3, dtype=torch.float64), torch.randn(1, 2, 1, 5).double()
    inputs = [q, k, v, more[..., :2], more[..., 2:], torch.randn(1, 2, 2, 2, dtype=torch.float64)]

    def attention(q, k, v, extra_k, extra_v, global_q):
        return grid_tiled.forward(q, k, v, window, 0.7, extra_k, extra_v, global_q)

    assert torch.autograd.gradcheck(attention, [x.requires_grad_() for x in inputs])


def test_backward_repeats_bit_for_bit() -> None:
    dice = Random(3)
    inputs = draw_inputs(dice, disc_window((40, 40), 7), torch.float32, channels=(16,))
    first, second = (results_and_gradients(grid_tiled.forward, inputs) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_layouts_and_neighbors_in_memory() -> None:
    """Heads first, expanded over the batch and cut out of NaN, all at once."""
    window = window_of((9, 11), (4, 5), (2, 1))
    q = torch.randn(2, 1, 3, 9, 11, 8).permute(0, 1, 3, 4, 2, 5)
    k = torch.randn(1, 1, 9, 11, 3, 8).expand(2, -1, -1, -1, -1, -1)
    v = torch.full((2, 2, 11, 13, 4, 10), torch.nan)[:, 1:, 1:-1, 1:-1, :3, 1:-1].normal_()
    inputs = {"q": q, "k": k, "v": v, "window": window, "scale": 0.3, "extra_k": None}
    inputs |= {"extra_v": None, "global_q": None}
    found = results_and_gradients(grid_tiled.forward, inputs)
    expected = results_and_gradients(grid_reference.forward, inputs)
    assert worst_error(found, expected) < 3e-6


@pytest.mark.parametrize("poison", [torch.nan, torch.inf, -torch.inf])
def test_hidden_keys_have_no_say(poison: float) -> None:
    """Keys that a query does not see are no numbers, and their values are huge."""
    window = window_of((12, 10), (5, 4), (1, 3), (True, False))
    q, k, v = torch.randn(3, 1, 1, 12, 10, 2, 8)
    clean = grid_tiled.forward(q, k, v, window, 0.3)
    for query in (0, 37, 64, 119):
        hidden = ~window.visible()[query].view(1, 1, 12, 10, 1, 1)
        out, lse, _, _ = grid_tiled.forward(
            q, k.masked_fill(hidden, poison), v.masked_fill(hidden, 1e4), window, 0.3
        )
        at = (0, 0, query // 10, query % 10)
        assert torch.equal(out[at], clean[0][at]) and torch.equal(lse[at], clean[1][at])


def test_only_some_gradients() -> None:
    window = window_of((6, 6), 3)
    q, k, v = torch.randn(3, 1, 1, 6, 6, 2, 4)
    v.requires_grad_()
    out, lse, _, _ = grid_tiled.forward(q, k, v, window, 0.5)
    out.sum().backward()
    assert q.grad is None and torch.allclose(v.grad.sum(), torch.tensor(36 * 2 * 4.0))
    k.requires_grad_()
    _, lse, _, _ = grid_tiled.forward(q, k, v.detach(), window, 0.5)
    (only_lse,) = torch.autograd.grad(lse.sum(), k)
    _, lse, _, _ = grid_reference.forward(q, k, v.detach(), window, 0.5)
    (expected,) = torch.autograd.grad(lse.sum(), k)
    assert torch.allclose(only_lse, expected, atol=1e-6)


def test_autocast_changes_nothing() -> None:
    window = window_of((16,), 5)
    q, k, v = (x.requires_grad_() for x in torch.randn(3, 1, 1, 1, 16, 2, 8))
    plain = grid_tiled.forward(q, k, v, window, 0.3)[0]
    with torch.autocast("cpu", torch.bfloat16):
        out = grid_tiled.forward(q, k, v, window, 0.3)[0]
        (grad,) = torch.autograd.grad(out.sum(), k)
    (expected,) = torch.autograd.grad(plain.sum(), k)
    assert torch.equal(out, plain) and torch.equal(grad, expected)


def test_empty_batch() -> None:
    window = window_of((4, 4), 3)
    x = torch.randn(0, 1, 4, 4, 2, 8, requires_grad=True)
    out, lse, _, _ = grid_tiled.forward(x, x, x, window, 0.3)
    out.sum().backward()
    assert out.shape == (0, 1, 4, 4, 2, 8) and lse.shape == (0, 1, 4, 4, 2)
    assert x.grad.shape == x.shape


# --- memory and work -----------------------------------------------------------------------------


def largest_tensor(call) -> int:
    """Numbers in the largest tensor that an operation of `call` returns."""
    from torch.utils._python_dispatch import TorchDispatchMode

    largest = 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            result = func(*args, **(kwargs or {}))
            if isinstance(result, torch.Tensor):
                largest = max(largest, result.untyped_storage().nbytes() // result.element_size())
            return result

    with Watch():
        call()
    return largest


@pytest.mark.parametrize("window", [window_of((48, 48), 7), disc_window((48, 48), 5)])
def test_memory_grows_with_the_window_only(window: Window) -> None:
    """Nothing of 2304 x 2304, forward or backward: it all fits a few times the inputs."""
    q, k, v = (x.requires_grad_() for x in torch.randn(3, 1, 1, 48, 48, 1, 16))

    def call() -> None:
        out, lse, _, _ = grid_tiled.forward(q, k, v, window, 0.25)
        (out.sum() + lse.sum()).backward()

    assert largest_tensor(call) <= 4 * q.numel()


def test_tiles_waste_little() -> None:
    """At k = 13 on 64 x 64 fewer than 2.2 keys are computed for each that is seen."""
    window = window_of((64, 64), 13)
    tile = choose_tile(window, 8, 1, costs_of(torch.device("cpu")))
    pairs = 1
    for axis, side in zip(window.axes, tile, strict=True):
        runs = axis_runs(axis, side)
        pairs *= sum(run.tiles * run.kind.queries * run.kind.keys for run in runs)
    assert pairs < 2.2 * 64 * 64 * 13 * 13


@pytest.mark.parametrize("length", [1, 2, 7, 13, 30])
def test_tiles_of_an_axis(length: int) -> None:
    """Each query is in one tile, and its keys are what the window says."""
    dice = Random(length)
    for _ in range(60):
        kernel = dice.randint(1, length)
        axis = Axis(length, kernel, dice.randint(1, kernel), dice.random() < 0.5)
        if dice.random() < 0.3:
            axis = Axis(length, length, radius=dice.randint(1, length + 2))
        queries = []
        for run in axis_runs(axis, dice.randint(1, length)):
            kind = run.kind
            for i in range(run.tiles):
                first, key = run.query + i * kind.queries, run.key + i * run.step
                for j in range(kind.queries):
                    queries.append(first + j)
                    seen = key + kind.lo[j], key + kind.hi[j]
                    assert seen == (axis.lo(first + j), axis.hi(first + j))
                assert (key, key + kind.keys) == axis.span(first, first + kind.queries - 1)
        assert queries == list(range(length))


def test_a_tile_that_sees_everything_has_no_mask() -> None:
    blocks = window_of((8, 8), 4, 4)
    runs = [axis_runs(axis, 4)[0].kind for axis in blocks.axes]
    assert visible_keys((runs[2], runs[0], runs[1]), 0, 1) is None
    disc = disc_window((3, 3), 3)  # the corners are 8 apart, less than 9
    runs = [axis_runs(axis, 3)[0].kind for axis in disc.axes]
    assert visible_keys((runs[2], runs[0], runs[1]), disc.radius, 1) is None
    disc = disc_window((4, 3), 3)
    runs = [axis_runs(axis, 4)[0].kind for axis in disc.axes]
    assert visible_keys((runs[2], runs[0], runs[1]), disc.radius, 1) is not None


@pytest.mark.gpu
@pytest.mark.parametrize("seed", range(10))
def test_on_a_gpu(seed: int) -> None:
    dice = Random(seed)
    inputs = draw_inputs(dice, draw_window(dice), torch.float64)
    inputs = {n: x.cuda() if isinstance(x, torch.Tensor) else x for n, x in inputs.items()}
    found, expected = grid_tiled.forward(**inputs), grid_reference.forward(**inputs)
    for x, y in zip(found, expected, strict=True):
        assert x is y is None or torch.allclose(x, y, atol=1e-12)
