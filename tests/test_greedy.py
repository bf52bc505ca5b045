"""pick_diverse and the cosines it reads: loops, ties, twins, and the Triton program."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from vistoken.errors import BackendUnavailable
from vistoken.kernels.greedy import cosine_matrix, pick_diverse, product_fp32

HALVES = [torch.float16, torch.bfloat16]


def slow(similarity: list[list[float]], weight: list[float], first: int, keep: int) -> list[int]:
    """The rule, one candidate and one pick at a time."""
    picks = [first]
    while len(picks) < keep:
        best, best_score = -1, -math.inf
        for i in range(len(weight)):
            score = weight[i] * min(max(0.0, 1 - similarity[j][i]) for j in picks)
            if i not in picks and score > best_score:
                best, best_score = i, score
        picks.append(best)
    return picks


def draws(count: int, seed: int) -> Iterator[tuple[Tensor, Tensor, Tensor, int]]:
    """Similarities and weights on a coarse lattice: fp32 is exact there, and ties abound."""
    draw = torch.Generator().manual_seed(seed)

    def number(low: int, high: int) -> int:
        return int(torch.randint(low, high + 1, (1,), generator=draw))

    for _ in range(count):
        batch, tokens, levels = number(1, 3), number(1, 24), 2 ** number(0, 6)
        similarity = torch.randint(-levels, levels + 2, (batch, tokens, tokens), generator=draw)
        weight = torch.randint(0, number(0, 16) + 1, (batch, tokens), generator=draw) / 16
        first = torch.randint(0, tokens, (batch,), generator=draw)
        yield similarity / levels, weight, first, number(1, tokens)


def features(batch: int, tokens: int, width: int, seed: int = 0) -> Tensor:
    return torch.randn(batch, tokens, width, generator=torch.Generator().manual_seed(seed))


# --- the rule ------------------------------------------------------------------------------------


def test_picks_equal_the_slow_rule() -> None:
    for similarity, weight, first, keep in draws(300, seed=0):
        picks = pick_diverse(similarity, weight, first, keep)
        assert picks.dtype == torch.int64 and picks.shape == (len(weight), keep)
        for b, row in enumerate(picks.tolist()):
            expected = slow(similarity[b].tolist(), weight[b].tolist(), int(first[b]), keep)
            assert row == expected


def test_weights_decide() -> None:
    similarity = torch.tensor([[[1.0, 0.5, 0.0], [0.5, 1.0, 0.0], [0.0, 0.0, 1.0]]])
    first = torch.tensor([0])
    assert pick_diverse(similarity, torch.tensor([[1.0, 1.0, 1.0]]), first, 2).tolist() == [[0, 2]]
    assert pick_diverse(similarity, torch.tensor([[1.0, 1.0, 0.4]]), first, 2).tolist() == [[0, 1]]
    tie = torch.tensor([[1.0, 1.0, 0.5]])
    assert pick_diverse(similarity, tie, first, 2).tolist() == [[0, 1]]


def test_a_shorter_choice_begins_a_longer_one() -> None:
    similarity, weight = cosine_matrix(features(2, 50, 7)), torch.rand(2, 50)
    whole = pick_diverse(similarity, weight, weight.argmax(-1), 50)
    assert (whole.sort(dim=-1).values == torch.arange(50)).all()
    for keep in (1, 2, 17, 49):
        assert torch.equal(pick_diverse(similarity, weight, whole[:, 0], keep), whole[:, :keep])


def test_rows_of_a_batch_do_not_touch() -> None:
    similarity, weight, first = (
        torch.rand(4, 30, 30),
        torch.rand(4, 30),
        torch.tensor([3, 0, 29, 7]),
    )
    together = pick_diverse(similarity, weight, first, 12)
    for b in range(4):
        alone = pick_diverse(similarity[b : b + 1], weight[b : b + 1], first[b : b + 1], 12)
        assert torch.equal(alone[0], together[b])


def spoiled(similarity: Tensor, weight: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    for bad in (math.nan, math.inf, -math.inf):
        yield similarity.index_fill(1, torch.tensor([0, 5]), bad), weight
        yield similarity.index_fill(2, torch.tensor([5]), bad), weight
        yield similarity, weight.index_fill(1, torch.tensor([1, 8]), bad)
        yield torch.full_like(similarity, bad), torch.full_like(weight, bad)


def test_what_is_no_number_is_never_picked_twice() -> None:
    for similarity, weight in spoiled(torch.rand(2, 20, 20), torch.rand(2, 20)):
        picks = pick_diverse(similarity, weight, torch.tensor([0, 3]), 20)
        assert (picks.sort(dim=-1).values == torch.arange(20)).all()


def test_inputs_stay_as_they_are_and_strides_do_not_matter() -> None:
    similarity, weight = cosine_matrix(features(2, 20, 5)), torch.rand(2, 20)
    before, first = (similarity.clone(), weight.clone()), weight.argmax(-1)
    expected = pick_diverse(similarity, weight, first, 8)
    assert torch.equal(similarity, before[0]) and torch.equal(weight, before[1])
    wide = torch.stack([similarity, -similarity], -1)[..., 0]
    strided = torch.stack([weight, -weight], -1)[..., 0]
    assert torch.equal(pick_diverse(wide, strided, first, 8), expected)


# --- the Triton program --------------------------------------------------------------------------


def same(similarity: Tensor, weight: Tensor, first: Tensor, keep: int) -> None:
    expected = pick_diverse(similarity, weight, first, keep, backend="reference")
    assert torch.equal(pick_diverse(similarity, weight, first, keep, backend="triton"), expected)


def test_triton_equals_the_reference() -> None:
    pytest.importorskip("triton")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    for similarity, weight, first, keep in draws(15, seed=1):
        same(similarity.to(device), weight.to(device), first.to(device), keep)
    for batch, tokens, keep in ((1, 1, 1), (2, 576, 5), (3, 130, 20), (1, 1025, 3)):
        rows = features(batch, tokens, 12, seed=tokens).to(device)
        rows[:, tokens // 2 :] = rows[:, : tokens - tokens // 2].clone()
        weight = torch.rand(batch, tokens, device=device)
        same(cosine_matrix(rows), weight, weight.argmax(-1), keep)
        same(cosine_matrix(rows), torch.ones_like(weight), weight.argmin(-1), keep)
    wide, strided = torch.rand(2, 9, 9, 2, device=device), torch.rand(2, 9, 2, device=device)
    same(wide[..., 1], strided[..., 1], torch.zeros(2, dtype=torch.long, device=device), 9)


def test_triton_equals_the_reference_where_there_is_no_number() -> None:
    pytest.importorskip("triton")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    for similarity, weight in spoiled(torch.rand(1, 20, 20), torch.rand(1, 20)):
        same(similarity.to(device), weight.to(device), torch.tensor([4], device=device), 20)


@pytest.mark.gpu
def test_cuda_takes_triton_and_agrees_with_the_cpu() -> None:
    rows = features(8, 2880, 64)
    on_cpu, on_gpu = cosine_matrix(rows), cosine_matrix(rows.cuda())
    assert (on_cpu - on_gpu.cpu()).abs().max() < 1e-5
    weight = torch.rand(8, 2880)
    picks = pick_diverse(on_cpu.cuda(), weight.cuda(), weight.argmax(-1).cuda(), 192)
    assert torch.equal(picks.cpu(), pick_diverse(on_cpu, weight, weight.argmax(-1), 192))
    for dtype in HALVES:
        half = rows.to(dtype)
        error = (
            product_fp32(half.cuda(), half.cuda().mT).cpu() - product_fp32(half, half.mT)
        ).abs()
        assert error.max() < 1e-4


def test_backends_asked_for_by_name_do_not_fall_back(monkeypatch: pytest.MonkeyPatch) -> None:
    one = torch.ones(1, 1)
    few = (one[None], one, torch.zeros(1, dtype=torch.long), 1)
    with pytest.raises(BackendUnavailable, match="got 'cuda'"):
        pick_diverse(*few, backend="cuda")
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    with pytest.raises(BackendUnavailable, match="not on a CUDA device"):
        pick_diverse(*few, backend="triton")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    many = one.expand(1, 20000)
    with pytest.raises(BackendUnavailable, match="20000 tokens"):
        pick_diverse(many[..., None].expand(1, 20000, 20000), many, few[2], 1, backend="triton")


# --- the cosines ---------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, *HALVES])
def test_cosines_equal_fp64(dtype: torch.dtype) -> None:
    for batch, tokens, width in ((1, 1, 1), (2, 7, 3), (3, 65, 130)):
        rows = features(batch, tokens, width).to(dtype)
        found = cosine_matrix(rows)
        exact = torch.nn.functional.normalize(rows.double(), dim=-1)
        assert found.dtype == torch.float32 and found.shape == (batch, tokens, tokens)
        assert (found - exact @ exact.mT).abs().max() < 2e-6


def test_half_precision_rows_are_not_rounded_on_the_way() -> None:
    """Rounding the unit vectors to bf16 would be off by 1e-3."""
    rows = features(1, 50, 64).bfloat16()
    exact = torch.nn.functional.normalize(rows.double(), dim=-1)
    rounded = exact.bfloat16().double()
    assert (rounded @ rounded.mT - exact @ exact.mT).abs().max() > 5e-4
    with torch.autocast("cpu", torch.bfloat16):
        found = cosine_matrix(rows.float())
    assert (found - exact @ exact.mT).abs().max() < 1e-6


@pytest.mark.parametrize("size", [1e-6, 1.0, 1e6])
def test_twins_are_at_distance_zero_and_zero_rows_at_one(size: float) -> None:
    rows = (features(1, 32, 40) * size).repeat(1, 2, 1)
    assert (cosine_matrix(rows)[0].diagonal(32) == 1).all()
    rows[:, [3, 9]] = 0
    found = cosine_matrix(rows)[0]
    assert (found[3] == 0).all() and (found[:, 9] == 0).all() and found.isfinite().all()


def test_no_gradient_is_recorded() -> None:
    rows = features(1, 9, 4).requires_grad_()
    cosine = cosine_matrix(rows)
    assert not cosine.requires_grad
    weight = torch.rand(1, 9, requires_grad=True)
    assert pick_diverse(cosine, weight, torch.tensor([0]), 3).shape == (1, 3)


class Sizes(TorchDispatchMode):
    """Notes the largest tensor that any operation makes, and readings of values by the CPU."""

    def __init__(self) -> None:
        super().__init__()
        self.largest = 0
        self.readings: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        if any(name in str(func) for name in ("local_scalar", "nonzero", "masked_select", "item")):
            self.readings.append(str(func))
        for value in made if isinstance(made, (list, tuple)) else [made]:
            if isinstance(value, Tensor) and value.untyped_storage().nbytes():
                self.largest = max(self.largest, value.untyped_storage().nbytes() // 4)
        return made


def test_nothing_larger_than_the_cosines_is_made_or_read_back() -> None:
    rows, weight = features(2, 64, 48), torch.rand(2, 64)
    with Sizes() as seen:
        pick_diverse(cosine_matrix(rows), weight, weight.argmax(-1), 20)
    assert 0 < seen.largest <= 2 * 64 * 64 and seen.readings == []
