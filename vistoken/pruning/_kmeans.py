"""k-means in batches that waits for nothing, repeats exactly and leaves no cluster empty."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from vistoken.errors import MethodError

INITS = ("strided", "farthest")
DISTANCES = ("euclidean", "cosine")
_LARGE = 1e38  # stands for a distance that overflowed, so that infinity can mean "not a member"
# Two members of a cluster are equally far from its center, up to rounding: such ties must not be
# decided by noise. Distances count as equal up to this share of them and of the mean norm.
_SLACK = 1e-3, 1e-6


@torch.no_grad()
def kmeans(
    points: Tensor,
    clusters: int,
    *,
    iterations: int = 10,
    init: str = "strided",
    distance: str = "euclidean",
) -> tuple[Tensor, Tensor]:
    """Return (members [B, k, M] bool, representatives [B, k] int64) of k = `clusters` clusters.

    points [B, M, C], any floating dtype, computed in fp32; 1 <= k <= M. Lloyd's algorithm with a
    fixed number of iterations and then a last assignment. `init`: `strided` starts from the points
    floor((j + 1/2) M / k); `farthest` from the point closest to the mean, then always the point
    farthest from all chosen. `cosine` scales the points to unit length first. Ties go to the lower
    index; no random numbers.

    Every point is a member of one cluster and no cluster is empty: one that loses its points
    keeps its center and, after the last assignment, the clusters still empty take the points that
    lie farthest from their centers. The representative of a cluster is the member closest to the
    center it was assigned by; of members that are equally close up to rounding, as the two of a
    pair always are, the first. Never reads a value back to the CPU; k steps for `farthest`.
    """
    batch, count, _ = points.shape
    if not 1 <= clusters <= count:
        raise MethodError(f"kmeans: clusters must be from 1 to {count} points, got {clusters}.")
    if init not in INITS or distance not in DISTANCES or iterations < 0:
        raise MethodError(
            f"kmeans: init must be one of {', '.join(INITS)}, distance one of "
            f"{', '.join(DISTANCES)} and iterations not negative, got {init!r}, {distance!r} and "
            f"{iterations}."
        )
    with torch.autocast(points.device.type, enabled=False):
        points = points.float()
        if distance == "cosine":
            points = F.normalize(points, dim=-1)
        points = points - points.mean(1, keepdim=True)  # small numbers, small rounding errors
        norms = points.square().sum(-1)
        start = _strided(points, clusters) if init == "strided" else _farthest(points, clusters)
        centers = points.gather(1, start[..., None].expand(-1, -1, points.shape[-1]))
        labels = torch.arange(clusters, device=points.device)[:, None]
        for _ in range(iterations):
            member = (_offsets(points, centers).argmin(-1)[:, None] == labels).float()
            filled = member.sum(-1, keepdim=True)
            means = member @ points / filled.clamp(min=1)
            centers = torch.where(filled > 0, means, centers)
        least, nearest = _offsets(points, centers).min(-1)
        far = (least + norms).nan_to_num(_LARGE, _LARGE).clamp(0, _LARGE)
        noise = _SLACK[1] * norms.mean(-1, keepdim=True).nan_to_num(0.0, 0.0)
    return _fill_empty(nearest[:, None] == labels, far, noise)


def _strided(points: Tensor, clusters: int) -> Tensor:
    batch, count, _ = points.shape
    numbers = torch.arange(clusters, device=points.device)
    return ((2 * numbers + 1) * count // (2 * clusters)).expand(batch, clusters)


def _farthest(points: Tensor, clusters: int) -> Tensor:
    """Farthest-point sampling: [B, k]; the points have mean zero."""
    chosen = [points.square().sum(-1).argmin(-1)]
    away = torch.full(points.shape[:2], torch.inf, device=points.device)
    for _ in range(clusters - 1):
        latest = points.gather(1, chosen[-1][:, None, None].expand(-1, 1, points.shape[-1]))
        away = away.minimum((points - latest).square().sum(-1))
        chosen.append(away.argmax(-1))
    return torch.stack(chosen, 1)


def _offsets(points: Tensor, centers: Tensor) -> Tensor:
    """Squared distances [B, M, k] to all centers, each less the point's own squared norm."""
    squared = torch.baddbmm(centers.square().sum(-1)[:, None], points, centers.mT, alpha=-2)
    return squared.nan_to_num(_LARGE, _LARGE)


def _fill_empty(member: Tensor, far: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
    """Give every empty cluster the farthest point that represents no other one."""
    numbers = torch.arange(far.shape[1], device=far.device)
    empty = ~member.any(-1, keepdim=True)
    least = torch.where(member, far[:, None], _LARGE).amin(-1, keepdim=True)
    close = member & (far[:, None] <= least * (1 + _SLACK[0]) + noise[..., None])
    closest = close.to(torch.uint8).argmax(-1)
    speaks = (closest[..., None] == numbers) & ~empty
    free = far.masked_fill(speaks.any(1), -1)
    order = free.sort(dim=-1, descending=True, stable=True).indices
    turn = empty[..., 0].cumsum(-1) - 1
    taken = order.gather(1, turn.clamp(min=0))
    moved = (taken[..., None] == numbers) & empty
    member = moved | (member & ~moved.any(1, keepdim=True))
    return member, torch.where(empty[..., 0], taken, closest)
