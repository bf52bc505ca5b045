"""Neighborhood attention on lines, pictures and videos, with the meaning that NATTEN gives it."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from vistoken.kernels.grid_attention import attend_windows
from vistoken.kernels.grid_checks import check_inputs, softmax_scale
from vistoken.kernels.windows import neighborhood

Ints = int | Sequence[int]
Bools = bool | Sequence[bool]


def na1d(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    kernel_size: Ints,
    stride: Ints = 1,
    dilation: Ints = 1,
    is_causal: Bools = False,
    *,
    scale: float | None = None,
    additional_keys: Tensor | None = None,
    additional_values: Tensor | None = None,
    return_lse: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Return neighborhood attention on a line of tokens: q [B, length, heads, dim], heads last.

    All else is as in `na2d`, with one axis instead of two.
    """
    return _attend(
        "na1d", 1, q, k, v, (kernel_size, stride, dilation, is_causal), scale,
        additional_keys, additional_values, return_lse, backend,
    )  # fmt: skip


def na2d(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    kernel_size: Ints,
    stride: Ints = 1,
    dilation: Ints = 1,
    is_causal: Bools = False,
    *,
    scale: float | None = None,
    additional_keys: Tensor | None = None,
    additional_values: Tensor | None = None,
    return_lse: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Return neighborhood attention on a picture: a query sees a window of keys around it.

    q [B, height, width, Hq, D], k [B, height, width, Hkv, D], v [B, height, width, Hkv, Dv], heads
    last, of any strides; one dtype of fp16, bf16, fp32, fp64. Hq is a multiple of Hkv, and query
    head h reads the kv head h // (Hq // Hkv). D and Dv may differ.

    The first four options take one entry, or one per axis. On an axis of L tokens:

    - kernel_size, 1 <= kernel_size, kernel_size * dilation <= L: keys in a window. The window is
      centered on the query, with the greater half of an even one before it, and shifted inwards at
      the borders, never cut: every query sees kernel_size keys. kernel_size = L is full attention.
    - stride, 1 <= stride <= kernel_size: so many neighboring queries share the window of the one
      in their middle (of two, the later). stride = kernel_size, dividing L, is attention in blocks.
    - dilation: the axis falls into so many interleaved ones, and a query sees its own only.
    - is_causal: keys after the query are hidden, and the window ends at the query.

    additional_keys [B, N, Hkv, D] and additional_values [B, N, Hkv, Dv] are seen by every query in
    the same softmax. scale multiplies the logits, D ** -0.5 by default; 0 is 0.

    Returns [B, height, width, Hq, Dv] in the dtype of q; with `return_lse` also the natural
    logarithm of the sum of exp(scale * q k) over the keys seen, [B, height, width, Hq] in fp32
    (fp64 for fp64 inputs). Gradients are exact through both. Nothing of the size of queries times
    keys is made, but on the backend `reference`.

    backend: `reference`, `tiled`, `flex`, `triton` or `natten`; see `use_backend`. By default CUDA
    tensors that triton can take go there, all others to `tiled`, plain torch. Raises `MethodError`
    for arguments that are not allowed, `BackendUnavailable` where a backend asked for cannot run.

    The windows are those of "Neighborhood Attention Transformer" (CVPR 2023), "Dilated Neighborhood
    Attention Transformer" (2022) and "Generalized Neighborhood Attention" (2025). Other than in
    NATTEN a kernel_size of 1 is allowed, a scale of 0 is not taken for the default, and gradients
    of the returned logarithm are not dropped.
    """
    return _attend(
        "na2d", 2, q, k, v, (kernel_size, stride, dilation, is_causal), scale,
        additional_keys, additional_values, return_lse, backend,
    )  # fmt: skip


def na3d(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    kernel_size: Ints,
    stride: Ints = 1,
    dilation: Ints = 1,
    is_causal: Bools = False,
    *,
    scale: float | None = None,
    additional_keys: Tensor | None = None,
    additional_values: Tensor | None = None,
    return_lse: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Return neighborhood attention on a video: q [B, frames, height, width, heads, dim].

    All else is as in `na2d`, with three axes instead of two; `is_causal=(True, False, False)` hides
    later frames only.
    """
    return _attend(
        "na3d", 3, q, k, v, (kernel_size, stride, dilation, is_causal), scale,
        additional_keys, additional_values, return_lse, backend,
    )  # fmt: skip


def _attend(
    name: str,
    rank: int,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    options: tuple[Ints, Ints, Ints, Bools],
    scale: float | None,
    additional_keys: Tensor | None,
    additional_values: Tensor | None,
    return_lse: bool,
    backend: str | None,
) -> Tensor | tuple[Tensor, Tensor]:
    extras, names = (additional_keys, additional_values), ("additional_keys", "additional_values")
    check_inputs(q, k, v, rank, *extras, extra_names=names)
    where = neighborhood(tuple(q.shape[1:-2]), *options)
    factor = softmax_scale(scale, q)
    out, lse, _, _ = attend_windows(name, q, k, v, where, factor, *extras, None, backend)
    return (out, lse) if return_lse else out
