"""The text-dominance indices: worked by hand, at their limits, over batches and padding."""

from __future__ import annotations

import itertools
import json
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from vistoken.dominance import Dominance, Masses, aei, attention_mass, depth_thirds, mdi
from vistoken.errors import DataError, MethodError


def attention(rows: int, queries: int, keys: int, seed: int = 0) -> Tensor:
    draw = torch.Generator().manual_seed(seed)
    return (2 * torch.randn(rows, 3, queries, keys, generator=draw)).softmax(-1)


def slow_mass(probabilities: Tensor, keys: list[int], queries: list[int]) -> float:
    """Of one row [H, Q, K]."""
    heads = probabilities.shape[0]
    picks = itertools.product(range(heads), queries, keys)
    return sum(probabilities[h, q, k].item() for h, q, k in picks) / (heads * len(queries))


def flags(size: int, chosen: list[int]) -> Tensor:
    return torch.zeros(1, size).index_fill(1, torch.tensor(chosen, dtype=torch.long), 1).bool()


def test_mass_equals_the_loop() -> None:
    probabilities = attention(1, 4, 9)
    for keys, queries in (([0, 1], [3]), ([2, 4, 8], [1, 2]), (list(range(9)), [0, 1, 2, 3])):
        found = attention_mass(probabilities, flags(9, keys), flags(4, queries))
        assert found.item() == pytest.approx(slow_mass(probabilities[0], keys, queries), abs=1e-6)
    assert attention_mass(probabilities, flags(9, [2])).item() == pytest.approx(
        slow_mass(probabilities[0], [2], [0, 1, 2, 3]), abs=1e-6
    )
    assert attention_mass(probabilities, flags(9, [2]), flags(4, [])).item() == 0


def test_indices_by_hand() -> None:
    """60 text tokens hold .75 of the attention, 600 others .15: 0.0125 against 0.00025 each."""
    assert mdi(0.75, 0.15, 60, 600).item() == pytest.approx(50)
    assert aei(0.75, 0.15, 60, 600).item() == pytest.approx((0.75 / 0.9) / (60 / 660))
    assert aei(0.15, 0.75, 600, 60).item() == pytest.approx((0.15 / 0.9) / (600 / 660))
    masses = torch.tensor([[0.2, 0.4], [0.6, 0.8]])
    found = mdi(masses, 1 - masses, torch.tensor([[5], [10]]), 20)
    assert found.dtype == torch.float64 and found.shape == (2, 2)
    assert found[1, 0].item() == pytest.approx((0.6 / 10) / (0.4 / 20))


@pytest.mark.parametrize(("text", "other", "rest"), [(1, 1, 0), (35, 576, 4), (60, 2880, 0)])
def test_uniform_attention_gives_one(text: int, other: int, rest: int) -> None:
    total = text + other + rest
    even = torch.full((2, 3, 4, total), 1 / total)
    is_text = flags(total, list(range(text))).expand(2, -1)
    is_other = flags(total, list(range(text, text + other))).expand(2, -1)
    masses = attention_mass(even, is_text), attention_mass(even, is_other)
    for index in (mdi, aei):
        assert index(*masses, text, other).tolist() == pytest.approx([1, 1], rel=1e-5)
    assert aei(*reversed(masses), other, text).tolist() == pytest.approx([1, 1], rel=1e-5)


def test_more_attention_to_text_raises_both() -> None:
    shares = torch.linspace(0.05, 0.95, 10)
    for index in (mdi, aei):
        found = index(shares, 1 - shares, 40, 600)
        assert bool((found.diff() > 0).all())
        assert bool((found[shares * 640 > 41] > 1).all())


def test_indices_do_not_depend_on_batch_or_padding() -> None:
    """Rows of several lengths, padded on the left with rubbish, in one batch and one by one."""
    lengths, longest, queries = (7, 12, 9), 12, 4
    rows, text, other, asked = [], [], [], []
    expected = []
    for number, length in enumerate(lengths):
        own = attention(1, 2 + number, length, seed=number)
        keys = [0, 1, length - 1], [2, 3, 4]
        masses = [slow_mass(own[0], chosen, list(range(2 + number))) for chosen in keys]
        expected.append((masses[0] / 3) / (masses[1] / 3))
        pad, short = longest - length, queries - 2 - number
        padded = torch.full((1, 3, queries, longest), math.nan)
        padded[:, :, short:, pad:] = own
        rows.append(padded)
        text.append(flags(longest, [pad + i for i in keys[0]]))
        other.append(flags(longest, [pad + i for i in keys[1]]))
        asked.append(flags(queries, list(range(short, queries))))
        single = [attention_mass(padded, keys_of[-1], asked[-1]) for keys_of in (text, other)]
        assert mdi(*single, 3, 3).item() == pytest.approx(expected[-1], rel=1e-5)
    together = [
        attention_mass(torch.cat(rows), torch.cat(m), torch.cat(asked)) for m in (text, other)
    ]
    assert mdi(*together, 3, 3).tolist() == pytest.approx(expected, rel=1e-5)


def test_the_unit_of_the_masses_does_not_matter() -> None:
    for index in (mdi, aei):
        assert index(0.3, 0.2, 7, 90).item() == pytest.approx(index(30, 20, 7, 90).item())


def test_limits() -> None:
    assert mdi(0.5, 0.0, 3, 4).item() == math.inf and mdi(0.0, 0.5, 3, 4).item() == 0
    assert aei(0.5, 0.0, 3, 4).item() == pytest.approx(7 / 3)
    assert math.isnan(mdi(0.0, 0.0, 3, 4)) and math.isnan(aei(0.0, 0.0, 3, 4))


@pytest.mark.parametrize("index", [mdi, aei])
@pytest.mark.parametrize(
    ("given", "words"),
    [
        ((-0.1, 0.5, 3, 4), "not be negative"),
        ((0.1, torch.tensor([0.5, -1.0]), 3, 4), "not be negative"),
        ((0.1, 0.5, 0, 4), "must be positive"),
        ((0.1, 0.5, 3, torch.tensor([4, 0])), "must be positive"),
        ((0.1, 0.5, math.nan, 4), "must be positive"),
    ],
)
def test_indices_refuse_what_cannot_be(index: Any, given: Any, words: str) -> None:
    with pytest.raises(MethodError, match=words):
        index(*given)


def test_masks_must_fit() -> None:
    probabilities = attention(2, 4, 9)
    for keys, queries in (
        (flags(9, [1]), None),
        (torch.ones(2, 9).bool(), torch.ones(2, 3).bool()),
    ):
        with pytest.raises(MethodError, match="attention_mass: "):
            attention_mass(probabilities, keys, queries)


def test_thirds_cover_the_layers_once() -> None:
    for layers in range(3, 81):
        thirds = depth_thirds(layers)
        assert list(thirds) == ["early", "middle", "late"]
        assert [i for third in thirds.values() for i in third] == list(range(layers))
        sizes = [len(third) for third in thirds.values()]
        assert sizes == sorted(sizes) and sizes[-1] - sizes[0] <= 1
    with pytest.raises(MethodError, match="at least 3"):
        depth_thirds(2)


# --- the result -----------------------------------------------------------------------------------


def test_thirds_are_of_mean_masses() -> None:
    text = torch.tensor([[0.5], [0.1], [0.2], [0.6]])
    one = torch.tensor([1])
    found = Dominance.of(Masses(text, 1 - text, 4 * one, 12 * one, one, one), "a", ())
    assert found.mdi == pytest.approx([3, 1 / 3, 0.75, 4.5])
    assert [(t.first, t.last) for t in found.thirds.values()] == [(0, 0), (1, 1), (2, 3)]
    assert found.thirds["late"].mdi == pytest.approx((0.4 / 4) / (0.6 / 12))
    assert found.thirds["late"].aei == pytest.approx(0.4 / (4 / 16))
    two = Dominance.of(Masses(text[:2], 1 - text[:2], 4 * one, 12 * one, one, one), "a", ())
    assert two.thirds == {} and two.layers == 2


def test_an_index_that_is_not_finite_is_none_in_json() -> None:
    one = torch.ones(1, dtype=torch.long)
    mass = torch.ones(3, 1)
    found = Dominance.of(Masses(mass, 0 * mass, one, one, one, one), "a", ())
    assert found.mdi == (float("inf"),) * 3
    plain = found.to_dict()
    assert plain["mdi"] == [None] * 3 and plain["thirds"]["early"]["mdi"] is None
    assert json.loads(json.dumps(plain, allow_nan=False))["aei"] == [2.0] * 3


def test_rows_that_cannot_be_compared_are_refused() -> None:
    none, one, mass = torch.tensor([0, 1, 1]), torch.ones(3, dtype=torch.long), torch.ones(3, 3)
    counts = (one, none, one, torch.tensor([1, 0, 1]))
    assert Dominance.of(Masses(mass, mass, *counts), "a", ()).rows == (2,)
    with pytest.raises(DataError, match="No row of the batch"):
        Dominance.of(Masses(mass, mass, one, one, one, 0 * one), "a", ())
