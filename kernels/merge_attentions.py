"""Attention over two sets of keys from the attention over each."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from vistoken.errors import MethodError


def merge_attentions(outputs: Sequence[Tensor], lses: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Return (output, lse) of attention over all keys from that over disjoint sets of them.

    outputs: [..., Dv] each, of one shape and dtype, at least one; lses: [...] each, the natural
    logarithm of the sum of exp(logits) over the keys of that set, -inf where a query saw none. The
    output counts with the share exp(lse_i) of the sum, in fp32 (fp64 if one of them is), and has
    the dtype of the inputs; the lse has the dtype of the computation. What a query without keys has
    for output is not read; without keys in all sets the output is 0 and the lse -inf.

    Exact, and so are its gradients by outputs and lses. An attention must let gradients through its
    lse for the gradients of its inputs to be right: those of `vistoken.kernels` do.
    Raises `MethodError` for lists or shapes that do not fit together.
    """
    _check(outputs, lses)
    wide = torch.float32
    for x in (*outputs, *lses):
        wide = torch.promote_types(wide, x.dtype)
    sums = torch.stack([lse.to(wide) for lse in lses])
    # any shift is exact; of rows without keys it must be finite
    top = sums.detach().amax(0)
    top = torch.where(top == -torch.inf, 0.0, top)
    weights = (sums - top).exp()
    total = weights.sum(0)
    some = total > 0
    safe = torch.where(some, total, 1.0)
    output = torch.zeros_like(outputs[0], dtype=wide)
    for weight, part in zip(weights / safe, outputs, strict=True):
        weight = weight[..., None]
        output = output + weight * torch.where(weight > 0, part.to(wide), 0.0)
    return output.to(outputs[0].dtype), torch.where(some, safe.log() + top, -torch.inf)


def _check(outputs: Sequence[Tensor], lses: Sequence[Tensor]) -> None:
    for name, given in (("outputs", outputs), ("lses", lses)):
        sequence = isinstance(given, Sequence) and not isinstance(given, Tensor)
        if not sequence or not all(isinstance(x, Tensor) for x in given):
            raise MethodError(f"{name} must be a list of tensors, got {type(given).__name__}.")
    if not outputs or len(outputs) != len(lses):
        raise MethodError(
            f"outputs and lses must have the same number of entries, at least one, got "
            f"{len(outputs)} outputs and {len(lses)} lses."
        )
    first = outputs[0]
    for i, (output, lse) in enumerate(zip(outputs, lses, strict=True)):
        for name, x in ((f"outputs[{i}]", output), (f"lses[{i}]", lse)):
            if not x.is_floating_point():
                raise MethodError(f"{name} must have a floating dtype, got {x.dtype}.")
            if x.device != first.device:
                raise MethodError(f"{name} must be on {first.device}, got {x.device}.")
        if output.shape != first.shape or output.dtype != first.dtype or not output.dim():
            raise MethodError(
                f"outputs[{i}] must be like outputs[0], {tuple(first.shape)} {first.dtype}, got "
                f"{tuple(output.shape)} {output.dtype}."
            )
        if lse.shape != output.shape[:-1]:
            raise MethodError(
                f"lses[{i}] must have the shape {tuple(output.shape[:-1])} of its output without "
                f"the last axis, got {tuple(lse.shape)}."
            )
