"""The portable Triton kernels of grid attention, under the interpreter where there is no GPU."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from vistoken.errors import BackendUnavailable
from vistoken.kernels import (
    grid_reference,
    grid_triton,
    grid_triton_backward,
    triton_launch,
    triton_tune,
)
from vistoken.kernels.triton_launch import exceeds_int32, strides
from vistoken.kernels.windows import Window, disc_window, neighborhood

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def window_of(grid: tuple[int, ...], *arguments: Any) -> Window:
    return next(neighborhood(grid, *arguments).groups())[1]


# name: window, B, Hq, Hkv, D, Dv, extra keys, global queries, scale
CASES: dict[str, tuple[Window, int, int, int, int, int, int, int, float]] = {
    "one axis": (window_of((37,), 9), 2, 1, 1, 16, 16, 0, 0, 0.25),
    "full boxes": (window_of((70,), 50, 4), 1, 1, 1, 16, 16, 0, 0, 0.25),
    "two axes": (window_of((7, 9), (4, 5)), 1, 2, 2, 16, 16, 0, 0, 0.25),
    "three axes": (window_of((3, 5, 6), (2, 3, 4)), 1, 1, 1, 32, 32, 0, 0, 0.2),
    "stride": (window_of((3, 5, 6), (3, 5, 4), (2, 3, 4)), 1, 1, 1, 16, 16, 0, 0, 0.25),
    "causal": (
        window_of((4, 5, 6), (3, 4, 5), 2, 1, (True, False, True)),
        1,
        1,
        1,
        16,
        16,
        0,
        0,
        1,
    ),
    "blocks": (window_of((8, 8), 4, 4), 1, 1, 1, 16, 16, 0, 0, 0.25),
    "whole grid": (window_of((5, 7), (5, 7)), 1, 1, 1, 16, 16, 0, 0, 0.25),
    "only itself": (window_of((5, 5), 1), 1, 1, 1, 16, 16, 0, 0, 0.25),
    "disc": (disc_window((9, 8), 4), 1, 1, 1, 16, 16, 0, 0, 0.25),
    "disc on a line": (disc_window((1, 40), 9), 1, 1, 1, 16, 16, 0, 0, 0.25),
    "large disc": (disc_window((4, 24), 16), 1, 1, 1, 16, 16, 0, 0, 0.25),
    "disc of all": (disc_window((5, 4), 9), 1, 1, 1, 16, 16, 0, 0, 0.25),
    "shared heads": (window_of((4, 6), 3), 2, 4, 2, 16, 16, 3, 2, 0.25),
    "wide head": (window_of((5, 6), 3), 1, 1, 1, 80, 80, 0, 0, 0.1),
    "wider values": (window_of((5, 6), 3), 1, 2, 1, 16, 40, 2, 3, 0.25),
    "narrow values": (window_of((5, 6), 3), 1, 2, 1, 40, 7, 2, 3, 0.25),
    "text": (window_of((5, 7), (3, 4)), 1, 1, 1, 16, 16, 19, 18, 0.25),
    "disc and text": (disc_window((6, 6), 3), 1, 2, 1, 16, 16, 5, 5, 0.25),
    "negative scale": (window_of((6, 5), 3), 1, 1, 1, 16, 16, 3, 2, -0.3),
    "scale 0": (window_of((6, 5), 3), 1, 1, 1, 16, 16, 3, 2, 0.0),
}

Inputs = list[Tensor | None]


def inputs_of(name: str, dtype: torch.dtype = torch.float32) -> Inputs:
    """(q, k, v, extra_k, extra_v, global_q) of a case."""
    window, b, heads, kv_heads, dim, value_dim, extra, queries, _ = CASES[name]

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64).to(DEVICE, dtype)

    inputs: Inputs = [
        draw(b, *window.grid, heads, dim),
        draw(b, *window.grid, kv_heads, dim),
        draw(b, *window.grid, kv_heads, value_dim),
    ]
    tokens = [draw(b, extra, kv_heads, n) if extra else None for n in (dim, value_dim)]
    return [*inputs, *tokens, draw(b, queries, heads, dim) if queries else None]


def run(name: str, inputs: Inputs, module: Any = grid_triton) -> tuple[Tensor | None, ...]:
    q, k, v, *others = inputs
    return module.forward(q, k, v, CASES[name][0], float(CASES[name][-1]), *others)


def run_backward(name: str, inputs: Inputs, results: Any, grads: Any) -> tuple[Tensor | None, ...]:
    """Gradients of the inputs for those of (out, lse, global_out, global_lse)."""
    d_out, d_lse, d_global_out, d_global_lse = grads
    q, k, v, *others = inputs
    return grid_triton_backward.backward(
        d_out, d_lse, d_global_out, d_global_lse,
        q, k, v, CASES[name][0], float(CASES[name][-1]), *others, *results,
    )  # fmt: skip


def expected(name: str, inputs: Inputs, grads: Any) -> tuple[list[Tensor | None], list[Any]]:
    """Results and gradients of the definition, in fp64."""
    wide = [None if x is None else x.double().requires_grad_() for x in inputs]
    results = list(run(name, wide, grid_reference))
    pairs = [(x, g) for x, g in zip(results, grads, strict=True) if g is not None]
    found = iter(
        torch.autograd.grad(
            [x for x, _ in pairs if x is not None],
            [x for x in wide if x is not None],
            [g.to(x.dtype) for x, g in pairs if x is not None],
        )
    )
    return results, [None if x is None else next(found) for x in wide]


@torch.no_grad()
def error(found: Tensor, right: Tensor) -> float:
    """Relative error of the whole tensor; where everything is 0, the absolute one."""
    off = (found.double() - right.double()).norm()
    return float(off / right.double().norm().clamp(min=1e-12)) if right.any() else float(off)


def same(found: Tensor | None, right: Tensor | None) -> bool:
    """Whether two are the same bits; on a GPU, where the layout of a sum may differ, close."""
    if found is None or right is None:
        return found is right
    return torch.equal(found, right) if DEVICE == "cpu" else error(found, right) < 2e-6


def grads_of(name: str, inputs: Inputs) -> list[Tensor | None]:
    results = run(name, inputs)
    return [None if x is None else torch.randn_like(x) for x in results]


# --- equal to the definition ---------------------------------------------------------------------


@pytest.mark.parametrize("name", CASES)
def test_results_and_gradients_equal_the_definition(name: str) -> None:
    inputs = inputs_of(name)
    results = run(name, inputs)
    grads = [None if x is None else torch.randn_like(x) for x in results]
    right, right_grads = expected(name, inputs, grads)
    for found, x in zip(results, right, strict=True):
        assert (found is None) == (x is None)
        assert found is None or x is None or error(found, x) < 2e-6
    assert results[0] is not None and results[0].shape == right[0].shape  # type: ignore[union-attr]
    for found, x in zip(run_backward(name, inputs, results, grads), right_grads, strict=True):
        assert (found is None) == (x is None)
        assert found is None or error(found, x) < 1e-5


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["shared heads", "full boxes"])
def test_half_precision(name: str, dtype: torch.dtype) -> None:
    """As exact as the rounding of the weights and of the results to the dtype allows."""
    inputs = inputs_of(name, dtype)
    grads = grads_of(name, inputs)
    results = run(name, inputs)
    right, right_grads = expected(name, inputs, grads)
    bound = 8 * torch.finfo(dtype).eps / 4
    for found, x in zip(results, right, strict=True):
        if found is not None and x is not None:
            assert found.dtype == (torch.float32 if found.shape == right[1].shape else found.dtype)  # type: ignore[union-attr]
            assert error(found, x) < bound
    for found, x in zip(run_backward(name, inputs, results, grads), right_grads, strict=True):
        assert found is None or (found.dtype == dtype and error(found, x) < bound)


def test_gradients_without_those_of_the_lse() -> None:
    name = "text"
    inputs = inputs_of(name)
    grads = grads_of(name, inputs)
    results = run(name, inputs)
    for given in ([grads[0], None, grads[2], None], [grads[0], None, None, None]):
        _, right = expected(name, inputs, given)
        found = run_backward(name, inputs, results, given)
        for x, y in zip(found, right, strict=True):
            assert x is not None and error(x, y) < 1e-5


def test_large_logits() -> None:
    name = "two axes"
    inputs = inputs_of(name)
    inputs[0] = inputs[0] * 200  # type: ignore[operator]
    results = run(name, inputs)
    right = run(name, [None if x is None else x.double() for x in inputs], grid_reference)
    for found, x in zip(results[:2], right[:2], strict=True):
        assert found is not None and x is not None and error(found, x) < 2e-5


# --- memory --------------------------------------------------------------------------------------


def scattered(x: Tensor, kind: str) -> Tensor:
    """The same numbers in another arrangement of memory, NaN in between."""
    if kind == "sliced":
        wide = torch.full([n + 2 for n in x.shape], math.nan, dtype=x.dtype, device=x.device)
        view = wide[tuple(slice(1, 1 + n) for n in x.shape)]
    elif kind == "heads first":
        order = [0, x.dim() - 2, *range(1, x.dim() - 2), x.dim() - 1]
        view = torch.empty_like(x).permute(order).contiguous()
        view = view.permute([order.index(i) for i in range(x.dim())])
    elif kind == "transposed":
        view = x.mT.contiguous().mT
    else:
        steps = [slice(None), *[slice(None, None, 2)] * (x.dim() - 2), slice(None)]
        wide = torch.full(
            [x.shape[0], *(2 * n for n in x.shape[1:-1]), x.shape[-1]], math.nan, dtype=x.dtype
        )
        view = wide.to(x.device)[tuple(steps)]
    view.copy_(x)
    return view


@pytest.mark.parametrize("kind", ["sliced", "heads first", "transposed", "every second"])
def test_any_strides_give_the_same_bits(kind: str) -> None:
    name = "text"
    inputs = inputs_of(name)
    grads = grads_of(name, inputs)
    results = run(name, inputs)
    right = run_backward(name, inputs, results, grads)
    views: Inputs = [None if x is None else scattered(x, kind) for x in inputs]
    found = run(name, views)
    for x, y in zip(found, results, strict=True):
        assert x is not None and same(x, y)
    given = [None if x is None else scattered(x, kind) if x.dim() > 3 else x for x in grads]
    for x, y in zip(run_backward(name, views, found, given), right, strict=True):
        assert x is not None and same(x, y)


def test_expanded_inputs() -> None:
    name = "shared heads"
    inputs = inputs_of(name)
    k = inputs[1]
    assert k is not None
    inputs[1] = k[:1, :, :1, :, :1].expand_as(k)
    grads = [
        None if x is None else torch.ones((), device=DEVICE).expand_as(x) for x in run(name, inputs)
    ]
    results = run(name, inputs)
    right, right_grads = expected(name, [None if x is None else x.clone() for x in inputs], grads)
    for found, x in zip(results, right, strict=True):
        assert found is not None and x is not None and error(found, x) < 2e-6
    for found, x in zip(run_backward(name, inputs, results, grads), right_grads, strict=True):
        assert found is not None and error(found, x) < 1e-5


@pytest.mark.parametrize("name", ["two axes", "disc", "stride"])
def test_what_a_query_does_not_see_cannot_reach_it(name: str) -> None:
    """Keys of NaN and values of 1e4 outside the window of a query leave its output as it was."""
    inputs = inputs_of(name)
    window = CASES[name][0]
    right = run(name, inputs)[0]
    assert right is not None
    visible = window.visible()
    for query in (0, window.tokens // 2, window.tokens - 1):
        q, k, v = (x.clone() for x in inputs[:3] if x is not None)
        hidden = ~visible[query]
        k.flatten(1, 3)[:, hidden] = math.nan
        v.flatten(1, 3)[:, hidden] = 1e4
        found = run(name, [q, k, v, None, None, None])[0]
        assert found is not None
        assert torch.equal(found.flatten(1, 3)[:, query], right.flatten(1, 3)[:, query])


@pytest.mark.parametrize("name", ["shared heads", "full boxes"])
def test_two_runs_give_the_same_bits(name: str) -> None:
    inputs = inputs_of(name)
    grads = grads_of(name, inputs)
    results = run(name, inputs)
    for x, y in zip(results, run(name, inputs), strict=True):
        assert x is None or (y is not None and torch.equal(x, y))
    one, two = (run_backward(name, inputs, results, grads) for _ in range(2))
    for x, y in zip(one, two, strict=True):
        assert x is None or (y is not None and torch.equal(x, y))


def test_many_parts_of_the_grid(monkeypatch: pytest.MonkeyPatch) -> None:
    """Global queries and extra keys walk the grid in parts, which are added afterwards."""
    monkeypatch.setattr("vistoken.kernels.grid_triton_dense.PART", 16)
    name = "text"
    inputs = inputs_of(name)
    grads = grads_of(name, inputs)
    results = run(name, inputs)
    right, right_grads = expected(name, inputs, grads)
    for found, x in zip(results, right, strict=True):
        assert found is not None and x is not None and error(found, x) < 2e-6
    for found, x in zip(run_backward(name, inputs, results, grads), right_grads, strict=True):
        assert found is not None and error(found, x) < 1e-5


def test_boxes_that_span_more_than_32_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Their offsets take 64 bits; which is decided without a tensor of that size."""
    x = torch.empty(2, device="meta").as_strided((1, 4, 4, 4, 1, 2), (0, 2**29, 4, 2, 2, 1))
    assert strides(x) == (0, 2**29, 4, 2, 2)
    assert exceeds_int32((8, 1, 1), x) and not exceeds_int32((4, 1, 1), x)
    name = "three axes"
    inputs = inputs_of(name)
    grads = grads_of(name, inputs)
    results = run(name, inputs)
    right = run_backward(name, inputs, results, grads)
    for module in ("grid_triton", "grid_triton_queries", "grid_triton_keys"):
        monkeypatch.setattr(f"vistoken.kernels.{module}.exceeds_int32", lambda *_: True)
    for x, y in zip(run(name, inputs), results, strict=True):
        assert same(x, y)
    for x, y in zip(run_backward(name, inputs, results, grads), right, strict=True):
        assert same(x, y)


def test_an_empty_batch() -> None:
    window = CASES["two axes"][0]
    q = torch.empty(0, *window.grid, 2, 16, device=DEVICE)
    out, lse, _, _ = grid_triton.forward(q, q, q, window, 1.0)
    assert out.shape == q.shape and lse.shape == q.shape[:-1]


# --- what it cannot do ---------------------------------------------------------------------------


def test_reasons() -> None:
    q = torch.randn(1, 1, 4, 4, 1, 1, device=DEVICE)
    wide = q.expand(1, 1, 4, 4, 1, 300)
    window, disc = window_of((4, 4), 3), disc_window((1, 50000), 40000)
    assert "float64" in str(grid_triton.why_not(*[q.double()] * 3, window, 1.0))
    assert "300" in str(grid_triton.why_not(wide, wide, q, window, 1.0))
    assert "300" in str(grid_triton.why_not(q, q, wide, window, 1.0))
    assert "40000" in str(grid_triton.why_not(q, q, q, disc, 1.0))
    assert grid_triton.why_not(q, q, q, disc_window((4, 4), 40000), 1.0) is None
    assert grid_triton.why_not(q, q, q, window, -1.0) is None


def test_reason_on_a_device_without_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grid_triton, "INTERPRETED", False)
    q = torch.empty(1, 1, 4, 4, 1, 16, device="meta")
    assert "meta" in str(grid_triton.why_not(q, q, q, window_of((4, 4), 3), 1.0))


def test_every_configuration_is_complete() -> None:
    """Each kernel has one for every head size, dtype and architecture, of powers of two."""
    tables = [*triton_launch._HALF.values(), *triton_launch._FP32.values()]
    assert len(triton_launch._HALF) == 12 and len(triton_launch._FP32) == 3
    for configs in tables:
        assert len(configs) == 3
        for config in configs:
            assert all(n & (n - 1) == 0 for n in (*config.queries, *config.keys))


def test_measured_configurations_come_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    window = window_of((8, 8), 3)
    monkeypatch.setattr(triton_tune, "_time", lambda kernel, config, *_: float(config.stages == 2))
    monkeypatch.setattr(triton_launch, "architecture", lambda device: 90)
    found = triton_tune.tune(window, heads=1, head_dim=64, device=DEVICE)
    assert len(found) == 3
    for times in found.values():
        assert times[0][1] == 0 and times[-1][1] == 1 and times[0][0].stages != 2
    path = tmp_path / "tuned.json"
    triton_tune.store(found, path)
    monkeypatch.setattr(triton_launch, "TUNED", path)
    monkeypatch.setattr(triton_launch, "INTERPRETED", False)
    q = torch.empty(1, 1, 8, 8, 1, 64, dtype=torch.bfloat16, device=DEVICE)
    for kernel, times in zip(triton_tune.KERNELS, found.values(), strict=True):
        assert triton_launch.options(kernel, q, q, window) == times[0][0]
        assert triton_launch.options(kernel, q, q) == triton_launch._HALF[kernel, 90][0]


def test_tuning_asks_whether_the_kernels_can_run() -> None:
    with pytest.raises(BackendUnavailable, match="float64"):
        triton_tune.tune(window_of((4, 4), 3), heads=1, dtype=torch.float64, device=DEVICE)
