"""Attention over the windows of a grid by the natten package, where it is installed."""

from __future__ import annotations

import importlib.util
from typing import Any

import torch
from torch import Tensor

from vistoken.errors import BackendUnavailable
from vistoken.kernels.windows import Axis, Window


def why_not(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    window: Window,
    scale: float,
    extra_k: Tensor | None = None,
    extra_v: Tensor | None = None,
    global_q: Tensor | None = None,
) -> str | None:
    """Return why natten cannot run with these inputs, or None."""
    if importlib.util.find_spec("natten") is None:
        return "natten is not installed; its wheels are built for one torch and one CUDA each"
    reason = _why_not_window(window)
    if reason is not None:
        return reason
    if global_q is not None:
        return "natten has no queries that see every key"
    if scale == 0:
        return "natten takes a scale of 0 for its default"
    if not q.shape[0]:
        return "natten needs at least one batch entry"
    inputs = (q, k, v, extra_k, extra_v)
    wants_grad = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in inputs)
    if wants_grad and not q.is_cuda:
        return f"natten has no backward on {q.device.type}; call it under torch.no_grad()"
    return _why_no_kernel(q, k, v, window, extra_k)


def _why_not_window(window: Window) -> str | None:
    if window.radius:
        return "natten has windows, not discs"
    axes = _long_axes(window)
    if not axes:
        return "natten needs an axis of at least 2 tokens"
    if min(axis.kernel for axis in axes) < 2:
        return "natten needs a kernel_size of at least 2 on axes of at least 2 tokens"
    return None


def _why_no_kernel(
    q: Tensor, k: Tensor, v: Tensor, window: Window, extra_k: Tensor | None
) -> str | None:
    """Whether natten finds a kernel for the window, and one for what it calls full attention."""
    from natten.backends import get_compatible_backends, get_compatible_fmha_backends

    tensors = [_squeezed(x, window).detach() for x in (q, k, v)]
    for x, source in zip(tensors, (q, k, v), strict=True):
        x.requires_grad_(source.requires_grad and torch.is_grad_enabled())
    what = f"{q.dtype}, {q.shape[-1]} channels of q and k and {v.shape[-1]} of v on {q.device.type}"
    if not get_compatible_backends(*tensors, torch_compile=False):
        return f"natten has no kernel for {what}"
    axes = _long_axes(window)
    causal = len(axes) == 1 and axes[0].causal
    dense = all(axis.kernel == axis.length for axis in axes)
    if dense or extra_k is not None:
        flat = [x.flatten(1, -3) for x in tensors]
        options = {"is_causal": causal and dense, "is_varlen": False, "torch_compile": False}
        if not get_compatible_fmha_backends(*flat, **options):
            return f"natten has no kernel for full attention with {what}"
    return None


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    window: Window,
    scale: float,
    extra_k: Tensor | None = None,
    extra_v: Tensor | None = None,
    global_q: Tensor | None = None,
) -> tuple[Tensor, Tensor, None, None]:
    """Return (out, lse, None, None) as `grid_reference.forward` does, without global queries.

    natten drops gradients of the lse, so backward through the lse raises `BackendUnavailable`.
    """
    from natten.functional import neighborhood_attention_generic

    if not torch.is_grad_enabled():  # a CPU refuses tensors that could have gradients even then
        q, k, v = q.detach(), k.detach(), v.detach()
    if extra_k is not None and not extra_k.shape[1]:
        extra_k = extra_v = None
    axes = _long_axes(window)
    out, lse = neighborhood_attention_generic(
        *(_squeezed(x, window) for x in (q, k, v)),
        kernel_size=tuple(axis.kernel for axis in axes),
        stride=tuple(axis.stride for axis in axes),
        is_causal=tuple(axis.causal for axis in axes),
        scale=scale,
        additional_keys=extra_k,
        additional_values=extra_v,
        return_lse=True,
    )
    shape = q.shape[:-1]
    return out.reshape(*shape, v.shape[-1]), _NoGradient.apply(lse.reshape(shape)), None, None


def _long_axes(window: Window) -> list[Axis]:
    """The axes that natten is told of: an axis of one token changes nothing."""
    return [axis for axis in window.axes if axis.length > 1]


def _squeezed(x: Tensor, window: Window) -> Tensor:
    """[B, T, H, W, heads, C] without the axes of one token, as natten takes it."""
    lengths = [axis.length for axis in _long_axes(window)]
    return x.reshape(x.shape[0], *lengths, *x.shape[4:])


class _NoGradient(torch.autograd.Function):
    """Its input; a gradient that comes back is an error instead of being lost."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        raise BackendUnavailable(
            "natten has no gradient of the lse: use the backend tiled or triton, or no lse in the "
            "loss."
        )
