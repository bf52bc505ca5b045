"""Attention to listed blocks of keys: the public function, its checks and its backends."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from types import ModuleType

import torch
from torch import Tensor

from vistoken.errors import MethodError
from vistoken.kernels.backends import automatic_backends, select_backend
from vistoken.kernels.block_mask import BlockMask
from vistoken.kernels.element_mask import ElementMask
from vistoken.kernels.grid_checks import check_shape, check_tensor, softmax_scale

LIST_BACKENDS = ("reference", "tiled", "flex", "triton")
# asked once, when this file is imported: torch.compile cannot follow the search
_TRITON_INSTALLED = importlib.util.find_spec("triton") is not None


def block_sparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    block_map: Tensor | BlockMask,
    *,
    mask: ElementMask | None = None,
    scale: float | None = None,
    return_lse: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Return attention [B, S, Hq, Dv] in which a block of queries sees the blocks of keys listed.

    q [B, S, Hq, D], k [B, N, Hkv, D], v [B, N, Hkv, Dv], fp16, bf16, fp32 or fp64, of any strides;
    query head h reads the kv head h // (Hq // Hkv). block_map: bool [nq, nk], [Hq, nq, nk] or
    [B or 1, Hq or 1, nq, nk], whose blocks are powers of two of at least 16 tokens, as many as make
    S and N tokens so many blocks (the last may be short); or a `BlockMask`, which also says which
    pairs are seen inside a block and how many keys of a block count, and is made once for many
    calls. mask(b, h, q, kv) -> bool says which pairs are seen inside the blocks that are on: int64
    tensors that broadcast; it is asked about these blocks only, at every call. scale multiplies the
    logits, D ** -0.5 by default.

    With return_lse, also the natural logarithm of the sum of exp(scale * q k) [B, S, Hq] in fp32
    (fp64 for fp64 inputs). A query that sees no key has output 0, logarithm -inf and no gradient.
    Gradients are exact, those through the logarithm too, and bit-identical from run to run on
    `triton`. Runs under `torch.compile` with fullgraph, a `mask` aside.

    backend: `reference` takes queries times keys of memory; `tiled`, plain torch for every device;
    `flex`; `triton`. By default CUDA tensors that triton can take go there, all others to `tiled`.
    Raises `MethodError` for inputs that do not fit together and `BackendUnavailable` where a
    backend asked for cannot run.
    """
    check_sequences(q, k, v)
    factor = softmax_scale(scale, q)
    lists = _lists(block_map, mask, q, k)
    check_mask(lists, q, k)
    name = select_backend(
        "block_sparse_attention",
        backend,
        lambda name: why_not(name, q, k, v, lists, factor),
        LIST_BACKENDS,
        automatic_backends(q.device),
    )
    device = q.device.type if torch.amp.is_autocast_available(q.device.type) else "cpu"
    with torch.autocast(device, enabled=False):
        out, lse = _runner(name)(q, k, v, lists, factor)
    return (out, lse) if return_lse else out


def why_not(
    name: str, q: Tensor, k: Tensor, v: Tensor, mask: BlockMask, scale: float
) -> str | None:
    """Return why attention along block lists cannot run on the backend `name`, or None."""
    if name == "triton" and not _TRITON_INSTALLED:
        return "triton is not installed"
    reason: str | None = _module(name).why_not(q, k, v, mask, scale)
    return reason


def _module(name: str) -> ModuleType:
    """The file of a backend. Plain imports, which `torch.compile` can follow."""
    if name == "reference":
        from vistoken.kernels import list_reference

        return list_reference
    if name == "tiled":
        from vistoken.kernels import list_tiled

        return list_tiled
    if name == "flex":
        from vistoken.kernels import list_flex

        return list_flex
    from vistoken.kernels import list_triton

    return list_triton


def _runner(name: str) -> Callable[..., tuple[Tensor, Tensor]]:
    """The forward of a backend that autograd can differentiate."""
    if name != "triton":
        return _module(name).forward
    from vistoken.kernels.list_operator import forward

    return forward


# --- what the caller gives -----------------------------------------------------------------------


def _lists(
    block_map: Tensor | BlockMask, mask: ElementMask | None, q: Tensor, k: Tensor
) -> BlockMask:
    """The block lists that the caller gave or described."""
    if isinstance(block_map, BlockMask):
        if mask is not None:
            raise MethodError(
                "mask goes with a bool block_map; a BlockMask holds its own, which "
                "BlockMask.from_map takes."
            )
        return block_map
    if not isinstance(block_map, Tensor):
        raise MethodError(
            f"block_map must be a bool tensor or a BlockMask, got {type(block_map).__name__}."
        )
    if mask is not None and torch.compiler.is_compiling():
        raise MethodError(
            "A mask cannot be asked inside compiled code: make BlockMask.from_map(block_map, ..., "
            "mask=mask) outside it and pass that as block_map."
        )
    return BlockMask.from_map(
        block_map, q.shape[1], k.shape[1], mask=mask, batch=q.shape[0], heads=q.shape[2],
        trim=block_map.device.type == "cpu" and not torch.compiler.is_compiling(),
    )  # fmt: skip


def check_sequences(q: Tensor, k: Tensor, v: Tensor) -> None:
    """Raise `MethodError` unless q [B, S, Hq, D], k [B, N, Hkv, D], v [B, N, Hkv, Dv] fit."""
    for name, x in (("q", q), ("k", k), ("v", v)):
        check_tensor(name, x, ("tokens",), q)
        if min(x.shape[2:]) < 1:
            raise MethodError(
                f"{name} must have at least one head and one channel, got {tuple(x.shape)}."
            )
    check_shape("k", k, (q.shape[0], *k.shape[1:3], q.shape[3]), "q")
    check_shape("v", v, (*k.shape[:3], v.shape[3]), "k")
    if q.shape[2] % k.shape[2]:
        raise MethodError(
            f"The heads of q must be a multiple of the heads of k and v, got {q.shape[2]} heads "
            f"of q and {k.shape[2]} of k."
        )


def check_mask(mask: BlockMask, q: Tensor, k: Tensor) -> None:
    """Raise `MethodError` unless a mask is of the tokens, batch, heads and device of q and k."""
    if (mask.q_tokens, mask.kv_tokens) != (q.shape[1], k.shape[1]):
        raise MethodError(
            f"The block mask is of {mask.q_tokens} queries and {mask.kv_tokens} keys, got "
            f"{q.shape[1]} and {k.shape[1]}."
        )
    batch, heads = mask.full_count.shape[:2]
    counted = 1 if mask.lengths is None else mask.lengths.shape[0]
    for what, given, allowed in (
        ("batch entries", batch, q.shape[0]),
        ("heads", heads, q.shape[2]),
        ("rows of lengths", counted, q.shape[0]),
    ):
        if given not in (1, allowed):
            raise MethodError(
                f"The block map or mask has {given} {what}, q has {allowed}: it must have as many, "
                "or one for all."
            )
    if mask.device != q.device:
        raise MethodError(
            f"The block map or mask is on {mask.device} and q on {q.device}: move it with .to()."
        )
