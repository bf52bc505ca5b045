"""What attention over a grid refuses, each with one error that names argument, value and limit."""

from __future__ import annotations

import math
from numbers import Real

import torch
from torch import Tensor

from vistoken.errors import MethodError

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
AXES = {1: ("length",), 2: ("height", "width"), 3: ("frames", "height", "width")}


def check_inputs(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rank: int,
    extra_k: Tensor | None = None,
    extra_v: Tensor | None = None,
    global_q: Tensor | None = None,
    extra_names: tuple[str, str] = ("extra_k", "extra_v"),
) -> None:
    """Raise `MethodError` unless the tensors fit together as attention over `rank` axes takes them.

    q [B, *grid, Hq, D], k [B, *grid, Hkv, D], v [B, *grid, Hkv, Dv], extra_k [B, N, Hkv, D],
    extra_v [B, N, Hkv, Dv], global_q [B, G, Hq, D]: one floating dtype, one device, Hq a multiple
    of Hkv. extra_names: what the caller's caller calls `extra_k` and `extra_v`.
    """
    name_k, name_v = extra_names
    if (extra_k is None) != (extra_v is None):
        given, missing = (name_v, name_k) if extra_k is None else (name_k, name_v)
        raise MethodError(f"{name_k} and {name_v} go together, got {given} without {missing}.")
    check_tensor("q", q, AXES[rank], q)
    check_tensor("k", k, AXES[rank], q)
    check_tensor("v", v, AXES[rank], q)
    for name, x in (("q", q), ("k", k)):
        _check_least(name, x, -2, "head")
        _check_least(name, x, -1, "channel")
    _check_least("v", v, -1, "channel")
    grid = tuple(q.shape[1:-2])
    check_shape("k", k, (q.shape[0], *grid, k.shape[-2], q.shape[-1]), "q")
    check_shape("v", v, (*k.shape[:-1], v.shape[-1]), "k")
    if q.shape[-2] % k.shape[-2]:
        raise MethodError(
            f"The heads of q must be a multiple of the heads of k and v, got {q.shape[-2]} heads "
            f"of q and {k.shape[-2]} of k."
        )
    if extra_k is not None and extra_v is not None:
        check_tensor(name_k, extra_k, ("tokens",), q)
        check_tensor(name_v, extra_v, ("tokens",), q)
        check_shape(name_k, extra_k, (k.shape[0], extra_k.shape[1], *k.shape[-2:]), "k")
        check_shape(name_v, extra_v, (*extra_k.shape[:2], *v.shape[-2:]), f"v and {name_k}")
    if global_q is not None:
        check_tensor("global_q", global_q, ("tokens",), q)
        check_shape("global_q", global_q, (q.shape[0], global_q.shape[1], *q.shape[-2:]), "q")


def softmax_scale(scale: float | None, q: Tensor) -> float:
    """Return the factor of the logits: what the caller gave, or D ** -0.5 for None."""
    if scale is None:
        return float(q.shape[-1]) ** -0.5
    if isinstance(scale, bool) or not isinstance(scale, Real) or not math.isfinite(scale):
        raise MethodError(f"scale must be a finite number or None for D ** -0.5, got {scale!r}.")
    return float(scale)


def check_tensor(name: str, x: Tensor, axes: tuple[str, ...], like: Tensor) -> None:
    """Type, rank, dtype, layout and device; `like` is the q of the call."""
    if not isinstance(x, Tensor):
        raise MethodError(f"{name} must be a tensor, got {type(x).__name__}.")
    if x.layout != torch.strided:
        raise MethodError(f"{name} must be a dense tensor, got layout {x.layout}.")
    if x.dim() != len(axes) + 3:
        raise MethodError(
            f"{name} must have the axes [batch, {', '.join(axes)}, heads, channels], "
            f"got shape {tuple(x.shape)}."
        )
    if x.dtype not in DTYPES:
        allowed = ", ".join(str(dtype).removeprefix("torch.") for dtype in DTYPES)
        raise MethodError(f"{name} must have one of the dtypes {allowed}, got {x.dtype}.")
    if x.dtype != like.dtype:
        raise MethodError(f"{name} must have the dtype of q, {like.dtype}, got {x.dtype}.")
    if x.device != like.device:
        raise MethodError(f"{name} must be on the device of q, {like.device}, got {x.device}.")


def _check_least(name: str, x: Tensor, axis: int, what: str) -> None:
    if x.shape[axis] < 1:
        raise MethodError(f"{name} must have at least one {what}, got shape {tuple(x.shape)}.")


def check_shape(name: str, x: Tensor, shape: tuple[int, ...], like: str) -> None:
    if tuple(x.shape) != shape:
        raise MethodError(
            f"{name} must have the shape {shape} to go with {like}, got {tuple(x.shape)}."
        )
