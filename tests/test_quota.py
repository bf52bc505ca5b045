"""split_quota: sums, sizes, a slow oracle, and the Triton program against the reference."""

from __future__ import annotations

import math

import pytest
import torch

from vistoken.errors import BackendUnavailable
from vistoken.kernels import split_quota
from vistoken.kernels.quota import SLACK


def slow(weight: list[float], sizes: list[int], keep: int, spread: bool) -> list[int]:
    """The rule in plain Python numbers, one group at a time."""
    tiny = torch.finfo(torch.float32).tiny
    total = sum(weight)
    share = [max(w / total, tiny) if total else 1 / len(weight) for w in weight]
    quota = [math.floor(s * keep * (1 + SLACK)) for s in share]
    heaviest = sorted(range(len(share)), key=lambda g: (-share[g], g))
    if spread:
        for group in heaviest[: keep - sum(quota)]:
            quota[group] += 1
    surplus = sum(max(q - s, 0) for q, s in zip(quota, sizes, strict=True))
    quota = [min(q, s) for q, s in zip(quota, sizes, strict=True)]
    for _ in sizes:
        pull = [s * (n - q) for s, n, q in zip(share, sizes, quota, strict=True)]
        whole = sum(pull) or tiny
        more = [
            min(math.floor(surplus * p / whole * (1 + SLACK)), n - q)
            for p, n, q in zip(pull, sizes, quota, strict=True)
        ]
        surplus -= sum(more)
        quota = [q + m for q, m in zip(quota, more, strict=True)]
    for group in heaviest:
        extra = min(keep - sum(quota), sizes[group] - quota[group])
        quota[group] += extra
    return quota


def cases(count: int, seed: int) -> list[tuple[torch.Tensor, torch.Tensor, int, bool]]:
    generator = torch.Generator().manual_seed(seed)

    def draw(low: int, high: int) -> int:
        return int(torch.randint(low, high + 1, (1,), generator=generator))

    found = []
    for number in range(count):
        groups = draw(1, 20)
        sizes = torch.randint(0, 12, (groups,), generator=generator)
        sizes[draw(0, groups - 1)] += 1
        weight = torch.randint(0, 1024, (draw(1, 3), groups), generator=generator) / 1024
        if number % 3 == 0:  # a few sinks hold nearly everything
            weight = weight**8
        if number % 7 == 0:
            weight = torch.zeros_like(weight)
        found.append((weight, sizes, draw(1, int(sizes.sum())), bool(number % 2)))
    return found


def test_quotas_equal_the_slow_rule() -> None:
    for weight, sizes, keep, spread in cases(400, seed=0):
        quota = split_quota(weight, sizes, keep, spread_leftover=spread)
        assert quota.sum(-1).tolist() == [keep] * len(weight)
        assert bool((quota <= sizes).all()) and bool((quota >= 0).all())
        for row, own in enumerate(weight.double().tolist()):
            assert quota[row].tolist() == slow(own, sizes.tolist(), keep, spread)


def test_the_oracle_can_tell_the_rules_apart() -> None:
    weight, sizes = torch.tensor([[0.5, 0.3, 0.2]]), torch.tensor([9, 9, 9])
    one = split_quota(weight, sizes, 9)
    each = split_quota(weight, sizes, 9, spread_leftover=True)
    assert one.tolist() == [[6, 2, 1]] and each.tolist() == [[5, 3, 1]]


@pytest.mark.parametrize("spread", [False, True])
def test_triton_equals_the_reference(spread: bool) -> None:
    pytest.importorskip("triton")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    alone = (torch.ones(2, 1), torch.tensor([7]), 5, spread)  # one group is compiled on its own
    for weight, sizes, keep, _ in [alone, *cases(12, seed=1)]:
        weight, sizes = weight.to(device), sizes.to(device)
        options = {"spread_leftover": spread}
        expected = split_quota(weight, sizes, keep, backend="reference", **options)
        found = split_quota(weight, sizes, keep, backend="triton", **options)
        assert torch.equal(found, expected)


def test_backends_asked_for_by_name_do_not_fall_back(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, sizes = torch.ones(1, 200), torch.full((200,), 2)
    with pytest.raises(BackendUnavailable, match="got 'cuda'"):
        split_quota(weight, sizes, 5, backend="cuda")
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    with pytest.raises(BackendUnavailable, match="not on a CUDA device"):
        split_quota(weight, sizes, 5, backend="triton")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(BackendUnavailable, match="200 groups"):
        split_quota(weight, sizes, 5, backend="triton")
    assert split_quota(weight, sizes, 5).sum() == 5
