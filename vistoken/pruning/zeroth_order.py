"""ZOO-Prune: tokens to which the projector is sensitive, and far from one another."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar

import torch
from torch import Tensor, nn

from vistoken.contract import Selection, Signal, View
from vistoken.errors import MethodError
from vistoken.kernels.greedy import cosine_matrix, pick_diverse
from vistoken.method import option
from vistoken.pictures import Picture
from vistoken.pruning._pruner import Pruner, apportion
from vistoken.pruning._sensitivity import exact, sampled, seeded_directions, unit_directions

MODES = ("exact", "jvp", "reference")
# a spread of the sensitivities below this part of the largest is rounding, not a difference
FLAT = 2.0**-20


@dataclass(frozen=True, kw_only=True)
class ZerothOrder(Pruner):
    """Sensitivity times diversity, after the projector.

    Kim et al., "Training-Free Token Pruning via Zeroth-Order Gradient Estimation in
    Vision-Language Models", CVPR 2026, arXiv 2509.24837. A token's sensitivity is the size of the
    projector's response to small changes of what it reads. The first pick is the most sensitive
    token; every next one has the largest sensitivity (min-max normalized) times 1 - cosine to its
    nearest pick.

    `reference` is the paper's estimator: a central difference with `step` along `directions`
    random unit vectors, the same for all tokens, in fp32. `jvp` takes the exact derivative along
    them. `exact` takes the root mean square over all directions in closed form, without any draw
    and at a hundredth of the cost; it differs from the mean of the norms by a fraction of a
    percent. It needs a projector of two linear layers, behind a norm or none. Where the projector
    merges patches, what is varied is all it reads for one merged token, before the norm.

    `per_view`: the overview and every tile of a tiled picture, and every frame of a video, are
    chosen from on their own, as in the paper, with budgets in proportion to their tokens (largest
    remainders). Where an earlier method has removed tokens, the picture counts as one view.

    Official defects that are not reproduced: the difference is taken in half precision with a step
    below the spacing of the numbers, which inflates and reorders the sensitivities; the draw has
    no seed; the cosines go through an N x N x C tensor; for tiled pictures newline tokens are
    looked up 576 places too early, so that wrong tokens are kept beyond the budget, and the
    projector is replaced by a rank-128 one computed before its weights are loaded; the picture is
    taken to begin at the 36th token of the prompt, and only the first of a batch is read.
    """

    name: ClassVar[str] = "zeroth_order"
    paper: ClassVar[str] = "ZOO-Prune, CVPR 2026, arXiv 2509.24837"
    tag: ClassVar[str] = "training-free"
    signals: ClassVar[frozenset[Signal]] = frozenset(
        {Signal.FEATURES, Signal.ENCODED, Signal.PROJECTOR}
    )

    mode: str = option("exact", "how the sensitivity is computed", choices=MODES)
    directions: int = option(64, "random directions of jvp and reference", minimum=1)
    step: float = option(0.01, "step of the central difference of reference", minimum=1e-6)
    seed: int = option(0, "seed of the directions", minimum=0, maximum=2**31 - 1)
    per_view: bool = option(True, "choose inside each tile of a tiled picture on its own")

    def select(self, view: View, keep: int) -> Selection:
        """Choose by sensitivity times diversity, inside each view."""
        encoded, projector = view.read(Signal.ENCODED), view.read(Signal.PROJECTOR)
        bank = None
        if self.mode != "exact":
            width, device = encoded.shape[-1], encoded.device
            bank = seeded_directions(self.seed, self.directions, width, device)
        found = _sensitivity(projector, encoded, self.mode, bank, self.step)
        if self.per_view and view.tokens == view.picture.tokens:
            shares = view_shares(view.picture, keep)
            if len(shares) > 1 or len(shares[0].tokens) > 1:
                return Selection(_select_views(view.features, found, shares))
        return Selection(select(view.features, found, keep))


def sensitivity(
    projector: nn.Module,
    features: Tensor,
    *,
    mode: str = "exact",
    directions: int = 64,
    step: float = 0.01,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Return how sensitive the projector is at each token: [B, N] fp32, without gradient.

    features [B, N, E] is what the projector reads (any floating dtype); the projector maps
    [..., E] to [..., C] and may have any floating dtype: the arithmetic is fp32, with autocast
    off. `exact`: sqrt(trace(J^T J) / E). `jvp` and `reference`: the mean over `directions` unit
    vectors u, drawn from `generator` (None: a private one, seed 0), of |J u| and of its central
    difference over `step`. Raises `MethodError` for arguments out of range and, in `exact`, for a
    projector of unknown structure.

    What `exact` computes from the weights (hidden x hidden, fp32, per group of a norm) is kept
    while the projector lives, outside of it, and made anew when the weights change;
    `vistoken.pruning._sensitivity.forget` drops it.
    """
    if mode not in MODES:
        raise MethodError(f"zeroth_order: mode must be one of {', '.join(MODES)}, got {mode!r}.")
    if features.dim() != 3 or not features.is_floating_point():
        raise MethodError(
            f"zeroth_order: features must be floating numbers [B, N, E], got {features.dtype} "
            f"{list(features.shape)}."
        )
    if directions < 1 or not (math.isfinite(step) and step > 0):
        raise MethodError(
            f"zeroth_order: directions must be at least 1 and step above 0, got {directions} "
            f"and {step}."
        )
    width, device = features.shape[-1], features.device
    if mode == "exact":
        bank = None
    elif generator is None:
        bank = seeded_directions(0, directions, width, device)
    else:
        bank = unit_directions(directions, width, generator).to(device)
    return _sensitivity(projector, features, mode, bank, step)


def _sensitivity(
    projector: nn.Module, features: Tensor, mode: str, bank: Tensor | None, step: float
) -> Tensor:
    rows = features.flatten(0, 1)
    if bank is None:
        found = exact(projector, rows)
    else:
        found = sampled(projector, rows, bank, step if mode == "reference" else None)
    return found.unflatten(0, features.shape[:2])


def select(projected: Tensor, sensitivity: Tensor, keep: int) -> Tensor:
    """Return the indices [B, keep] int64, ascending, of the tokens that ZOO-Prune keeps.

    projected [B, N, C] tokens (any floating dtype; cosines in fp32); sensitivity [B, N], min-max
    normalized here, all ones where it is constant. keep >= N returns all tokens. Ties go to the
    lower index. Needs N x N cosines per picture; never reads a value back to the CPU.
    """
    if projected.dim() != 3 or projected.shape[:2] != sensitivity.shape:
        raise MethodError(
            f"zeroth_order: projected {list(projected.shape)} and sensitivity "
            f"{list(sensitivity.shape)} must agree in images and tokens."
        )
    if keep < 1:
        raise MethodError(f"zeroth_order: keep must be at least 1, got {keep}.")
    batch, tokens = sensitivity.shape
    if keep >= tokens:
        return torch.arange(tokens, device=sensitivity.device).repeat(batch, 1)
    return _ordered(projected, sensitivity, keep).sort(dim=-1).values


def _ordered(projected: Tensor, sensitivity: Tensor, keep: int) -> Tensor:
    """The picks [B, keep] in their order."""
    # NaN cannot be refused without reading it back; as 0 it spoils no other token
    values = sensitivity.detach().float().nan_to_num(0.0, 0.0, 0.0)
    low, high = values.amin(-1, keepdim=True), values.amax(-1, keepdim=True)
    scaled = (values - low) / (high - low)
    weight = torch.where(high - low <= FLAT * high, 1.0, scaled)
    return pick_diverse(cosine_matrix(projected), weight, weight.argmax(-1), keep)


# --- tiled pictures ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Shares:
    """The views of one size, and the budget of each.

    tokens [V, n] int64: the tokens of each view. most: the largest budget among them. views and
    ranks [sum of the budgets] int64: which picks, by view and order, are within the budgets.
    """

    tokens: Tensor
    most: int
    views: Tensor
    ranks: Tensor

    def to(self, device: torch.device) -> Shares:
        """The same on a device."""
        return _on_device(self, device)


# Cached tensors must serve later calls that record gradients, hence not be inference tensors.
@lru_cache(maxsize=256)
@torch.inference_mode(False)
def view_shares(picture: Picture, keep: int) -> tuple[Shares, ...]:
    """The views of a picture by size, with budgets that sum to `keep`; on the CPU."""
    tile_of = picture.tile_of()
    members = tile_of.argsort(stable=True).split(tile_of.bincount().tolist())
    budget = apportion(keep, [len(tokens) for tokens in members])
    shares = []
    for size in sorted({len(tokens) for tokens in members}):
        same = [view for view, tokens in enumerate(members) if len(tokens) == size]
        own = [budget[view] for view in same]
        picks = [(view, rank) for view, count in enumerate(own) for rank in range(count)]
        views, ranks = torch.tensor(picks, dtype=torch.long, device="cpu").view(-1, 2).unbind(1)
        shares.append(Shares(torch.stack([members[v] for v in same]), max(own), views, ranks))
    return tuple(shares)


@lru_cache(maxsize=256)
@torch.inference_mode(False)
def _on_device(shares: Shares, device: torch.device) -> Shares:
    tokens, views, ranks = (
        part.to(device, non_blocking=True) for part in (shares.tokens, shares.views, shares.ranks)
    )
    return Shares(tokens, shares.most, views, ranks)


def _select_views(projected: Tensor, sensitivity: Tensor, shares: tuple[Shares, ...]) -> Tensor:
    """The picks [B, keep], ascending, of all views of a picture."""
    batch, found = len(projected), []
    for share in shares:
        if share.most == 0:
            continue
        own = share.to(projected.device)
        rows = projected[:, own.tokens].flatten(0, 1), sensitivity[:, own.tokens].flatten(0, 1)
        # the first picks are the same for every budget, so all views may pick the most
        order = _ordered(*rows, own.most).view(batch, -1, own.most)
        picks = own.tokens.expand(batch, -1, -1).gather(-1, order)
        found.append(picks[:, own.views, own.ranks])
    return torch.cat(found, dim=1).sort(dim=-1).values
