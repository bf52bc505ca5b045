"""The bridge to natten, and natten's own windows against plain torch where it is installed."""

from __future__ import annotations

import importlib.util
from random import Random

import pytest
import torch

from vistoken.errors import BackendUnavailable
from vistoken.kernels import grid_natten, grid_tiled
from vistoken.kernels.windows import Window, disc_window, neighborhood
from window_cases import draw_inputs, draw_window

INSTALLED = importlib.util.find_spec("natten") is not None
needs_natten = pytest.mark.skipif(not INSTALLED, reason="natten is not installed")


def window_of(grid, kernel, stride=1, causal=False) -> Window:
    ((_, window),) = neighborhood(grid, kernel, stride, 1, causal).groups()
    return window


@pytest.mark.skipif(INSTALLED, reason="natten is installed")
def test_says_that_it_is_missing() -> None:
    x = torch.randn(1, 1, 4, 4, 2, 16)
    assert "not installed" in str(grid_natten.why_not(x, x, x, window_of((4, 4), 3), 1.0))


def test_why_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    x = torch.randn(1, 1, 4, 4, 2, 16)
    window = window_of((4, 4), 3)
    more = torch.randn(1, 2, 2, 16)
    reasons = {
        "discs": (x, x, x, disc_window((4, 4), 2), 1.0),
        "at least 2 on": (x, x, x, window_of((4, 4), (1, 3)), 1.0),
        "an axis of at least 2": (x[:, :, :1, :1],) * 3 + (window_of((1, 1), 1), 1.0),
        "see every key": (x, x, x, window, 1.0, None, None, more),
        "scale of 0": (x, x, x, window, 0.0),
        "batch": (x[:0], x[:0], x[:0], window, 1.0),
        "no backward on cpu": (x, x.clone().requires_grad_(), x, window, 1.0),
    }
    for text, arguments in reasons.items():
        assert text in str(grid_natten.why_not(*arguments)), text


def test_a_gradient_of_the_lse_is_no_silent_loss() -> None:
    lse = grid_natten._NoGradient.apply(torch.randn(3, requires_grad=True))
    with pytest.raises(BackendUnavailable, match="no gradient of the lse"):
        lse.sum().backward()


@needs_natten
@pytest.mark.parametrize("seed", range(40))
def test_windows_are_those_of_natten(seed: int) -> None:
    """Out and lse of natten and of plain torch, over strides, causal axes and additional keys."""
    dice = Random(seed)
    while True:
        inputs = draw_inputs(dice, draw_window(dice), torch.float32, channels=(16,))
        inputs["global_q"] = None
        if grid_natten.why_not(**inputs) is None:
            break
    found, expected = grid_natten.forward(**inputs), grid_tiled.forward(**inputs)
    for x, y in zip(found[:2], expected[:2], strict=True):
        assert (x.shape, x.dtype) == (y.shape, y.dtype)
        assert (x - y).abs().max() < 5e-6
