"""Recycling of pruned tokens: density peaks and cluster means against loops over decimals."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from decimal import Decimal

import pytest
import torch
from torch import Tensor

from vistoken.errors import MethodError
from vistoken.pruning.sparsevlm import density_peaks, recycle


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def slow_peaks(points: Tensor, clusters: int) -> tuple[list[int], list[int]]:
    """Centres, best first, and each point's cluster; decimals, so that no exponential vanishes."""
    rows, width = points.double().tolist(), points.shape[1]
    square = [
        [sum((a - b) ** 2 for a, b in zip(p, q, strict=True)) / width for q in rows] for p in rows
    ]
    exponents = [-sum(sorted(row)[:clusters]) / clusters for row in square]
    rho = [Decimal(exponent).exp() for exponent in exponents]
    order = sorted(range(len(rows)), key=lambda i: (-rho[i], i))
    gamma = [Decimal(0)] * len(rows)
    for place, i in enumerate(order):
        closest = min((square[i][j] for j in order[:place]), default=max(map(max, square)))
        gamma[i] = rho[i] * Decimal(closest).sqrt()
    centres = sorted(range(len(rows)), key=lambda i: (-gamma[i], i))[:clusters]
    member = [min(range(clusters), key=lambda c: (row[centres[c]], c)) for row in square]
    for cluster, centre in enumerate(centres):
        member[centre] = cluster
    return centres, member


def slow_recycle(tokens: Tensor, scores: Sequence[float]) -> tuple[list[int], Tensor]:
    """The tokens whose places are taken, and the means that take them, best first."""
    best = sorted(range(len(tokens)), key=lambda i: (-scores[i], i))
    candidates = sorted(best[: int(0.3 * len(tokens)) + 1])
    centres, member = slow_peaks(tokens[candidates], int(len(candidates) / 10) + 1)
    means = []
    for cluster in range(len(centres)):
        rows = [tokens[i].double() for i, c in zip(candidates, member, strict=True) if c == cluster]
        means.append(sum(rows[1:], rows[0]) / len(rows))
    return [candidates[centre] for centre in centres], torch.stack(means)


@pytest.mark.parametrize("scale", [1e-3, 1.0, 300.0])
def test_peaks_follow_the_rule(scale: float) -> None:
    for seed, (count, clusters) in enumerate(
        [(1, 1), (2, 1), (9, 1), (11, 2), (40, 5), (63, 7), (9, 9)]
    ):
        groups = draw(3, 4, seed=seed + 90)[torch.arange(count) % 3]
        around = torch.stack([draw(count, 4, seed=seed), draw(count, 4, seed=seed) / 5 + groups])
        points = (around + 10) * scale
        centres, member = density_peaks(points, clusters)
        for b in range(2):
            expected = slow_peaks(points[b], clusters)
            assert (centres[b].tolist(), member[b].tolist()) == expected
            assert set(member[b].tolist()) == set(range(clusters))  # every cluster has a member
            assert member[b][centres[b]].tolist() == list(range(clusters))


def test_ties_in_density_go_to_the_earlier_point() -> None:
    """Whole numbers around 0: all distances are exact, so many densities are equal."""
    for seed, clusters in itertools.product(range(6), (1, 2, 3, 5)):
        generator = torch.Generator().manual_seed(seed)
        half = torch.randint(-2, 3, (8, 2), generator=generator).float()
        points = torch.cat([half, -half])[torch.randperm(16, generator=generator)]
        centres, member = density_peaks(points[None], clusters)
        assert (centres[0].tolist(), member[0].tolist()) == slow_peaks(points, clusters)
    centres, member = density_peaks(torch.ones(1, 6, 4), 2)
    assert centres.tolist() == [[0, 1]] and member.tolist() == [[0, 1, 0, 0, 0, 0]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_recycled_tokens_are_the_means_of_their_clusters(dtype: torch.dtype) -> None:
    for seed, pruned in enumerate((1, 2, 3, 4, 29, 30, 34, 101, 276)):
        tokens, scores = draw(pruned, 6, seed=seed).to(dtype), draw(pruned, seed=seed + 40)
        if seed % 2:
            scores = (2 * scores).round()  # ties
        expected = slow_recycle(tokens, scores.tolist())[1]
        merged = recycle(tokens, scores)
        assert merged.shape == expected.shape and merged.dtype == dtype
        torch.testing.assert_close(
            merged, expected.to(dtype), atol=1e-6, rtol=2e-2 if dtype != torch.float32 else 1e-5
        )


def test_far_off_and_large_tokens_keep_their_distances() -> None:
    """Residual streams have a common offset and single huge channels."""
    tokens = draw(200, 64)
    huge = torch.zeros(64).index_fill(0, torch.tensor([3]), 3000.0)
    plain_means = recycle(tokens, draw(200, seed=1))
    shifted = recycle(tokens + huge, draw(200, seed=1))
    torch.testing.assert_close(shifted - huge, plain_means, atol=1e-3, rtol=0)


def test_recycling_is_deterministic_and_draws_no_random_numbers() -> None:
    tokens, scores = draw(276, 16), draw(276, seed=1)
    before = torch.get_rng_state()
    assert torch.equal(recycle(tokens, scores), recycle(tokens, scores))
    assert torch.equal(torch.get_rng_state(), before)


def test_autocast_does_not_reach_the_distances() -> None:
    tokens, scores = draw(276, 16), draw(276, seed=1)
    with torch.autocast("cpu", torch.bfloat16):
        within = recycle(tokens, scores)
    assert torch.equal(within, recycle(tokens, scores))


def test_bad_shapes_are_refused() -> None:
    for tokens, scores in (((3, 4), (2,)), ((0, 4), (0,)), ((1, 3, 4), (1,))):
        with pytest.raises(MethodError, match="recycle"):
            recycle(torch.zeros(tokens), torch.zeros(scores))
