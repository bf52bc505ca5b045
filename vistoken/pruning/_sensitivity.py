"""How strongly a projector's output answers to a small change of its input, in fp32.

Everything here takes the projector as a module and the features [T, E] that it reads, one row per
visual token, and leaves no trace on the module: no attribute, no hook, no changed weight.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor, nn

from vistoken.errors import MethodError
from vistoken.kernels.greedy import product_fp32
from vistoken.pruning._projector import Layout, find_layout, fp32_twin

_ELEMENTS = 2**25  # of the largest intermediate tensor, in fp32 134 MB
_forward_mode = threading.Lock()  # torch's forward-mode differentiation knows one thread at a time


# --- exact ---------------------------------------------------------------------------------------


@torch.no_grad()
def exact(projector: nn.Module, features: Tensor) -> Tensor:
    """Root mean square sensitivity [T] fp32: sqrt(trace(J^T J) / E), J the Jacobian at each row.

    For linear_2(act(linear_1 x)), with g = act'(linear_1 x): g^T G g / E under the root, where
    G = (W2^T W2) * (W1 W1^T), elementwise, is computed once per projector. A norm in front has,
    per group of n inputs, the Jacobian diag(scale) (P - h h^T / n) / s with h the normalized
    input, s its standard deviation or root mean square, and P the identity (RMSNorm) or the
    removal of the mean (LayerNorm). Since P h = h, its square is (P - (2/n - h.h/n^2) h h^T) / s^2:
    one G per group, with P applied to W1 scaled, less a term of rank one.
    """
    layout = find_layout(projector)
    if layout is None:
        raise MethodError(
            f"zeroth_order: mode='exact' knows projectors made of a norm (or none), a linear "
            f"layer, an activation and a linear layer, got {type(projector).__name__} with "
            f"{[name for name, _ in projector.named_children()]}; use mode='jvp'."
        )
    width = _checked_width(layout, features)
    with torch.autocast(features.device.type, enabled=False):
        if layout.second is None:
            total = layout.first.weight.float().square().sum().expand(len(features))
        else:
            blocks = _curvature(layout)
            rows = max(1, _ELEMENTS // (layout.first.out_features * layout.groups))
            measure = _plain_energy if layout.norm is None else _normed_energy
            total = torch.cat([measure(layout, part, blocks) for part in features.split(rows)])
        return (total / width).clamp(min=0).sqrt()


def _checked_width(layout: Layout, features: Tensor) -> int:
    width = layout.first.in_features
    if features.shape[-1] != width:
        raise MethodError(
            f"zeroth_order: the projector reads {width} values per token, but the features "
            f"have {features.shape[-1]}."
        )
    return width


def _plain_energy(layout: Layout, features: Tensor, blocks: list[list[Tensor]]) -> Tensor:
    """trace(J^T J) [T] without a norm."""
    weight, bias = layout.first.weight.detach(), layout.first.bias
    before = product_fp32(features.detach()[None], weight.T[None])[0]
    return _quadratic(_slope(layout.act, before if bias is None else before + bias), blocks[0])


def _normed_energy(layout: Layout, features: Tensor, blocks: list[list[Tensor]]) -> Tensor:
    """trace(J^T J) [T] behind a norm of G groups."""
    assert layout.norm is not None and layout.second is not None  # by the caller
    norm, width = layout.norm, layout.norm.width
    first, second = layout.first.weight.float(), layout.second.weight.float()
    grouped = features.float().unflatten(-1, (layout.groups, width)).transpose(0, 1)  # [G, T, n]
    if norm.centered:
        grouped = grouped - grouped.mean(-1, keepdim=True)
    inverse = (grouped.square().mean(-1, keepdim=True) + norm.eps).rsqrt()
    unit = grouped * inverse
    scaled = unit if norm.scale is None else unit * norm.scale
    parts = torch.bmm(scaled, first.T.unflatten(0, (layout.groups, width)))  # [G, T, hidden]
    slope = _slope(layout.act, parts.sum(0) + _constant(layout, first))
    lost = 2 / width - unit.square().sum(-1) / width**2
    total = features.new_zeros(len(features), dtype=torch.float32)
    for group, own in enumerate(blocks):
        along = ((slope * parts[group]) @ second.T).square().sum(-1)
        whole = _quadratic(slope, own) - lost[group] * along
        total = total + inverse[group, :, 0].square() * whole
    return total


def _constant(layout: Layout, first: Tensor) -> Tensor:
    """What the norm's shift and the first bias add before the activation."""
    bias = layout.first.bias
    constant = first.new_zeros(len(first)) if bias is None else bias.float()
    if layout.norm is None or layout.norm.shift is None:
        return constant
    return constant + first @ layout.norm.shift.float().repeat(layout.groups)


def _slope(act: nn.Module | None, before: Tensor) -> Tensor:
    """The derivative of the elementwise activation."""
    assert act is not None  # for the type checker: a layout with a second layer has one
    pull_back = torch.func.vjp(fp32_twin(act), before)[1]
    return pull_back(torch.ones_like(before))[0]


# --- the matrices G, kept per projector ----------------------------------------------------------


@dataclass(frozen=True)
class _Kept:
    """The blocks of G, and how to see whether the weights are still those they were made of."""

    weights: tuple[weakref.ref[Tensor], ...]
    marks: tuple[tuple[int, int], ...]
    blocks: list[list[Tensor]]


_kept: weakref.WeakKeyDictionary[nn.Module, _Kept] = weakref.WeakKeyDictionary()
_lock = threading.Lock()


def forget(projector: nn.Module) -> None:
    """Drop what was computed from the projector's weights.

    Changed weights are noticed, except where they were written in place through `.data`.
    """
    layout = find_layout(projector)
    if layout is not None:
        with _lock:
            _kept.pop(layout.core, None)


def _curvature(layout: Layout) -> list[list[Tensor]]:
    """The blocks of G, for each group; computed when the weights are new or have changed."""
    assert layout.second is not None  # by the caller
    scale = None if layout.norm is None else layout.norm.scale
    weights = tuple(
        weight
        for weight in (layout.first.weight, layout.second.weight, scale)
        if weight is not None
    )
    if any(weight.is_inference() for weight in weights):  # their changes leave no mark
        return _blocks_of(layout)
    with _lock:
        kept = _kept.get(layout.core)
        marks = tuple((weight.data_ptr(), weight._version) for weight in weights)
        if kept is not None and kept.marks == marks:
            known = [ref() for ref in kept.weights]
            if all(a is b for a, b in zip(known, weights, strict=True)):
                return kept.blocks
        blocks = _blocks_of(layout)
        # what a CUDA graph captures is not computed before the graph runs
        if not (weights[0].is_cuda and torch.cuda.is_current_stream_capturing()):
            _kept[layout.core] = _Kept(tuple(map(weakref.ref, weights)), marks, blocks)
        return blocks


# Kept tensors must serve later calls outside inference mode.
@torch.inference_mode(False)
@torch.no_grad()
def _blocks_of(layout: Layout) -> list[list[Tensor]]:
    assert layout.act is not None and layout.second is not None  # by the caller
    _check_elementwise(layout.act)
    first, second = layout.first.weight.detach(), layout.second.weight.detach()
    inner = product_fp32(second.T[None], second[None])[0]
    blocks = []
    for part in first.chunk(layout.groups, dim=1):
        if layout.norm is not None:
            part = part.float()
            part = part if layout.norm.scale is None else part * layout.norm.scale.float()
            part = part - part.mean(1, keepdim=True) if layout.norm.centered else part
        outer = product_fp32(part[None], part.T[None])[0]
        blocks.append(_halved(outer.mul_(inner)))
    return blocks


def _check_elementwise(act: nn.Module) -> None:
    """Refuse what mixes its inputs: its derivative is no vector."""
    if not list(act.parameters()):
        jacobian = torch.func.jacrev(fp32_twin(act))(torch.tensor([-0.7, 0.3, 1.1], device="cpu"))
        if jacobian.shape == (3, 3) and not (jacobian - jacobian.diag().diag()).any():
            return
    raise MethodError(
        f"zeroth_order: mode='exact' needs an elementwise activation without weights, got "
        f"{type(act).__name__}; use mode='jvp'."
    )


def _halved(matrix: Tensor, times: int = 2) -> list[Tensor]:
    """The blocks of a symmetric matrix on and above its diagonal, halved again and again.

    Doubled corners [1, H/2, H/2], [2, H/4, H/4], …, then the diagonal blocks [4, H/4, H/4]: the
    quadratic form needs five eighths of the products.
    """
    blocks, diagonal = [], matrix[None]
    for _ in range(times if len(matrix) % 2**times == 0 else 0):
        half = diagonal.shape[-1] // 2
        blocks.append(2 * diagonal[:, :half, half:])
        corners = diagonal[:, :half, :half], diagonal[:, half:, half:]
        diagonal = torch.stack(corners, dim=1).flatten(0, 1)
    return [*blocks, diagonal]


def _quadratic(vectors: Tensor, blocks: list[Tensor]) -> Tensor:
    """v^T M v [T] for rows v of [T, H], with M as `_halved` left it."""
    *corners, diagonal = blocks
    pieces = vectors.unflatten(1, (len(diagonal), -1)).transpose(0, 1)
    total = torch.bmm(pieces, diagonal).mul_(pieces).sum((0, 2))
    for corner in corners:
        halves = vectors.unflatten(1, (len(corner), 2, -1))
        left, right = halves[:, :, 0].transpose(0, 1), halves[:, :, 1].transpose(0, 1)
        total = total + torch.bmm(left, corner).mul_(right).sum((0, 2))
    return total


# --- sampled -------------------------------------------------------------------------------------


def unit_directions(directions: int, width: int, generator: torch.Generator) -> Tensor:
    """Draw directions [directions, width] fp32 of length 1, uniform on the sphere."""
    shape, device = (directions, width), generator.device
    drawn = torch.randn(shape, generator=generator, device=device, dtype=torch.float32)
    return nn.functional.normalize(drawn, dim=-1)


@lru_cache(maxsize=16)
@torch.inference_mode(False)
def seeded_directions(seed: int, directions: int, width: int, device: torch.device) -> Tensor:
    """The same directions for a seed on every device; do not edit."""
    generator = torch.Generator("cpu").manual_seed(seed)
    return unit_directions(directions, width, generator).to(device)


@torch.no_grad()
def sampled(projector: nn.Module, features: Tensor, bank: Tensor, step: float | None) -> Tensor:
    """Mean norm [T] fp32 of the projector's derivative along the rows of `bank` [M, E].

    step: that of a central difference; None takes the exact derivative by forward-mode automatic
    differentiation.
    """
    layout = find_layout(projector)
    core = fp32_twin(projector if layout is None else layout.core)
    rows_of = None
    if layout is not None:
        _checked_width(layout, features)
        rows_of = None if layout.norm is None else layout.norm.width

    def project(x: Tensor) -> Tensor:
        if rows_of is None:
            return core(x)
        return core(x.reshape(-1, rows_of)).reshape(*x.shape[:-1], -1)  # mergers read patches

    widest = max((max(p.shape) for p in core.parameters() if p.dim()), default=bank.shape[-1])
    with torch.autocast(features.device.type, enabled=False):
        parts = features.detach().float().split(max(1, _ELEMENTS // widest))
        return torch.cat([_mean_norm(project, part, bank, step, widest) for part in parts])


def _mean_norm(
    project: Callable[[Tensor], Tensor],
    features: Tensor,
    bank: Tensor,
    step: float | None,
    widest: int,
) -> Tensor:
    total = features.new_zeros(len(features))
    for some in bank.split(max(1, _ELEMENTS // (widest * len(features)))):
        points = features.expand(len(some), *features.shape)
        moves = some[:, None].expand_as(points)
        if step is None:
            points, moves = points.contiguous(), moves.contiguous()
            with _forward_mode:
                change = torch.func.jvp(project, (points,), (moves,))[1]
        else:
            ahead, behind = project(points + step * moves), project(points - step * moves)
            change = (ahead - behind) / (2 * step)
        total = total + change.norm(dim=-1).sum(0)
    return total / len(bank)
