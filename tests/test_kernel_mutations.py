"""The checks of the other files notice wrong arithmetic: each of these mistakes is made once."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from array import array
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import kernel_checks
from kernel_cases import SMALL, Case, Inputs, draw
from kernel_checks import check_case, check_coordinates, check_poison, check_reach
from vistoken.kernels import tiling
from vistoken.kernels.windows import Axis

Check = Callable[[Case], None]
PLAIN = replace(
    draw(1, 0, SMALL), grid=(23,), kernel_size=(6,), stride=(4,), dilation=(1,),
    is_causal=(False,), radius=0, batch=1, heads=4, kv_heads=2, dim=16, value_dim=16, scale=None,
    extra=None, globals=None, layouts=("plain",) * 3, loss_on_lse=True, needs_grad="qkv", seed=1,
)  # fmt: skip
CAUSAL = replace(PLAIN, is_causal=(True,))
DISC = replace(
    PLAIN, grid=(7, 9), kernel_size=(1, 1), stride=(1, 1), dilation=(1, 1),
    is_causal=(False, False), radius=3,
)  # fmt: skip
needs_triton = pytest.mark.skipif(not importlib.util.find_spec("triton"), reason="needs triton")


@pytest.fixture(autouse=True)
def nothing_remembered() -> Iterator[None]:
    """Plans that were made before a mistake must not hide it, nor those made with it outlive it."""
    _forget()
    yield
    _forget()


def _forget() -> None:
    for name, module in list(sys.modules.items()):
        if name.startswith("vistoken.kernels"):
            for value in list(vars(module).values()):
                getattr(value, "cache_clear", lambda: None)()


def notices(check: Check, *cases: Case) -> bool:
    """Whether the check fails on one of the cases, for what it says and not by an accident."""
    for case in cases:
        try:
            check(case)
        except AssertionError:
            return True
    return False


def results(case: Case) -> None:
    check_case(case, "tiled", "cpu", torch.float32)


def probe(case: Case) -> None:
    check_coordinates(case, "tiled", "cpu", torch.float32)


def poison(case: Case) -> None:
    check_poison(case, "tiled", "cpu", torch.float32, list(range(min(case.grid))))


def reach(case: Case) -> None:
    check_reach(case, "tiled", "cpu", torch.float32)


def interpreted(case: Case) -> None:
    where = "cuda" if torch.cuda.is_available() else "cpu"
    check_case(replace(case, heads=1, kv_heads=1), "triton", where, torch.float32)


# --- the window of a query -----------------------------------------------------------------------


def clamp(x: int, low: int, high: int) -> int:
    return min(max(x, low), high)


def leader(axis: Axis, x: int) -> int:
    return min(x // axis.stride * axis.stride + axis.stride // 2, axis.length - 1)


def window_from(start: Callable[[Axis, int], int]) -> Callable[[Axis, int], int]:
    """A `lo` whose windows are shifted inwards from `start`; that of causal axes stays."""
    right = Axis.lo

    def lo(axis: Axis, x: int) -> int:
        if axis.causal or axis.radius:
            return right(axis, x)
        return clamp(start(axis, x), 0, axis.length - axis.kernel)

    return lo


def cut_lo(axis: Axis, x: int) -> int:
    return max(leader(axis, x) - axis.kernel // 2, 0)


def cut_hi(axis: Axis, x: int) -> int:
    return min(leader(axis, x) - axis.kernel // 2 + axis.kernel, axis.length)


def causal_lo(axis: Axis, x: int) -> int:
    return max(x - axis.kernel + 1, 0)


def unclamped_causal_lo(axis: Axis, x: int) -> int:
    return max(x // axis.stride * axis.stride + axis.stride - axis.kernel, 0)


def leader_hi(axis: Axis, x: int) -> int:
    return min(x // axis.stride * axis.stride + axis.stride, axis.length)


WINDOWS: dict[str, tuple[Case, dict[str, Callable[[Axis, int], int]]]] = {
    "shifted by one": (
        PLAIN, {"lo": window_from(lambda a, x: leader(a, x) - a.kernel // 2 + 1)},
    ),
    "shifted back by one": (
        PLAIN, {"lo": window_from(lambda a, x: leader(a, x) - a.kernel // 2 - 1)},
    ),
    "without the leader": (PLAIN, {"lo": window_from(lambda a, x: x - a.kernel // 2)}),
    "the left of two middles leads": (
        PLAIN,
        {"lo": window_from(
            lambda a, x: min(x // a.stride * a.stride + (a.stride - 1) // 2, a.length - 1)
            - a.kernel // 2
        )},
    ),
    "an even window leans right": (
        PLAIN, {"lo": window_from(lambda a, x: leader(a, x) - (a.kernel - 1) // 2)},
    ),
    "cut at the border": (PLAIN, {"lo": cut_lo, "hi": cut_hi}),
    "a causal window without the leader": (CAUSAL, {"lo": causal_lo}),
    "a causal window whose last leader lies outside": (
        replace(CAUSAL, grid=(21,)), {"lo": unclamped_causal_lo},
    ),
    "a causal window ends at the leader": (CAUSAL, {"hi": leader_hi}),
}  # fmt: skip


# Keys that are missing cannot be seen by poison.
NARROWER = ("cut at the border", "a causal window whose last leader lies outside")


@pytest.mark.parametrize("check", [results, probe, poison, reach])
@pytest.mark.parametrize("name", WINDOWS)
def test_a_wrong_window_is_noticed(
    name: str, check: Check, monkeypatch: pytest.MonkeyPatch
) -> None:
    case, mistakes = WINDOWS[name]
    assert not notices(check, case)
    _forget()
    for method, wrong in mistakes.items():
        monkeypatch.setattr(Axis, method, wrong)
    if check is not poison or name not in NARROWER:
        assert notices(check, case)


def test_a_wrong_disc_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not notices(results, DISC)
    _forget()
    right = Axis.hi
    monkeypatch.setattr(Axis, "hi", lambda axis, x: right(axis, x) - (axis.radius > 0 < x))
    assert notices(results, DISC)


def test_half_precision_hides_no_shift(monkeypatch: pytest.MonkeyPatch) -> None:
    """One key of many more than an absolute tolerance would notice."""
    case = replace(PLAIN, grid=(400,), kernel_size=(150,), stride=(1,), heads=2, kv_heads=2)

    def halves(case: Case) -> None:
        check_case(case, "tiled", "cpu", torch.bfloat16)

    assert not notices(halves, case)
    _forget()
    _, mistakes = WINDOWS["shifted by one"]
    monkeypatch.setattr(Axis, "lo", mistakes["lo"])
    assert notices(halves, case)


@needs_triton
@pytest.mark.parametrize("name", ["shifted by one", "without the leader", "cut at the border"])
def test_a_wrong_window_of_the_kernel_is_noticed(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    case, mistakes = WINDOWS[name]
    for method, wrong in mistakes.items():
        monkeypatch.setattr(Axis, method, wrong)
    assert notices(interpreted, case)


@needs_triton
@pytest.mark.parametrize("shift", [(0, -1), (1, 0), (0, 1), (-1, -1)], ids=str)
def test_a_wrong_inverse_window_is_noticed(
    shift: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The queries that see a key, one more or fewer at either end: only gradients can tell."""
    right = tiling.bounds

    def wrong(axis: Axis, inverse: bool = False) -> Any:
        lo, hi = right(axis, inverse)
        if not inverse:
            return lo, hi
        sides = zip((lo, hi), shift, strict=True)
        return tuple(array("q", (clamp(x + d, 0, axis.length) for x in y)) for y, d in sides)

    assert not notices(interpreted, PLAIN)
    _forget()
    for module in (tiling, importlib.import_module("vistoken.kernels.grid_plan")):
        monkeypatch.setattr(module, "bounds", wrong)
    assert notices(interpreted, PLAIN)


# --- everything else -----------------------------------------------------------------------------


def wrong_call(change: Callable[[Case, Inputs], tuple[Case, Inputs]]) -> Any:
    right = kernel_checks.call
    return lambda case, inputs, backend: right(*change(case, inputs), backend)


def wrong_result(change: Callable[[Case, list[Any]], list[Any]]) -> Any:
    right = kernel_checks.call
    return lambda case, inputs, backend: change(case, list(right(case, inputs, backend)))


def interleaved(case: Case, inputs: Inputs) -> tuple[Case, Inputs]:
    """Query head h reads the kv head h % Hkv."""
    order = torch.arange(case.heads) % case.kv_heads
    k, v = (x[..., order, :] for x in inputs[1:3])
    return replace(case, kv_heads=case.heads), inputs._replace(k=k, v=v)


def stray(case: Case, inputs: Inputs) -> tuple[Case, Inputs]:
    """Keys and values are taken for contiguous."""

    def read(x: Tensor) -> Tensor:
        return x.as_strided(x.shape, torch.empty(x.shape).stride())

    return case, inputs._replace(k=read(inputs.k), v=read(inputs.v))


SPREAD = replace(PLAIN, layouts=("plain", "heads_first", "spread"))
OTHERS: dict[str, tuple[Case, Callable[[], Any]]] = {
    "heads in another order": (PLAIN, lambda: wrong_call(interleaved)),
    "strides not read": (SPREAD, lambda: wrong_call(stray)),
    "a scale of 0 taken for none": (
        replace(PLAIN, scale=0.0),
        lambda: wrong_call(lambda case, x: (replace(case, scale=case.scale or None), x)),
    ),
    "the size of a negative scale": (
        replace(PLAIN, scale=-0.5),
        lambda: wrong_call(lambda case, x: (replace(case, scale=abs(case.factor)), x)),
    ),
    "no additional keys": (
        replace(PLAIN, extra=1),
        lambda: wrong_call(
            lambda case, x: (replace(case, extra=None), x._replace(extra_k=None, extra_v=None))
        ),
    ),
    "an lse in powers of two": (
        PLAIN,
        lambda: wrong_result(lambda case, x: [x[0], x[1] * 1.4427, *x[2:]]),
    ),
    "no gradient through the lse": (
        PLAIN,
        lambda: wrong_result(lambda case, x: [x[0], x[1].detach(), *x[2:]]),
    ),
    "gradients of values rounded": (
        PLAIN,
        lambda: wrong_call(lambda case, x: (case, x._replace(v=_rounded_grad(x.v)))),
    ),
}


def _rounded_grad(x: Tensor) -> Tensor:
    y = x * 1
    y.register_hook(lambda grad: grad.half().float())
    return y


@pytest.mark.parametrize("name", OTHERS)
def test_another_mistake_is_noticed(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case, mistake = OTHERS[name]
    assert not notices(results, case)
    monkeypatch.setattr(kernel_checks, "call", mistake())
    assert notices(results, case)
