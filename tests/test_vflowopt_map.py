"""VFlowOpt's importance map and its recycling against slow fp64 readings of the paper."""

from __future__ import annotations

import itertools
import math
import random
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from vistoken.errors import MethodError
from vistoken.pictures import Part, Picture, plain
from vistoken.pruning import vflowopt
from vistoken.pruning.vflowopt import cell_numbers

CPU = torch.device("cpu")
TILED = Picture((Part((4,), (4,)), Part((2, 4), (4, 3, 0))), separators=(16, 24))
PICTURES = (plain(1, 1), plain(3, 5), plain(13, 15), TILED)


# --- the importance map --------------------------------------------------------------------------


def slow_map(queries: Tensor, keys: Tensor, tile: list[int], prefix: int, t: float) -> list[float]:
    """One picture [H, P + N, D] in fp64 with the whole map A of every tile."""
    heads, _, width = queries.shape
    found = [0.0] * len(tile)
    for number in set(tile):
        own = [prefix + i for i, other in enumerate(tile) if other == number]
        read = [*range(prefix), *own]
        attention = torch.zeros(len(own), len(read), dtype=torch.float64)
        for head in range(heads):
            logits = queries[head, own].double() @ keys[head, read].double().T / math.sqrt(width)
            attention += logits.softmax(-1) / heads
        attention = attention[:, prefix:]
        received = attention.mean(0)
        mean = received.mean().item()
        chosen = [i for i, r in enumerate(received.tolist()) if r > t * mean]
        rows = attention[chosen or list(range(len(own)))]
        for i, value in zip(own, rows.mean(0).tolist(), strict=True):
            found[i - prefix] = value
    return found


def vision(
    picture: Picture, images: int = 2, prefix: int = 0, seed: int = 0
) -> tuple[Tensor, Tensor]:
    """Queries and keys of a layer of 3 heads with a few sinks."""
    draw = torch.Generator().manual_seed(seed)
    shape = (images, 3, prefix + picture.tokens, 4)
    queries, keys = (torch.randn(shape, generator=draw) for _ in range(2))
    queries[..., 0] = 2
    keys[:, :, torch.randint(shape[2], (2,), generator=draw), 0] = 5
    return queries, keys


@pytest.mark.parametrize("picture", PICTURES, ids=lambda p: str(p.tokens))
@pytest.mark.parametrize("prefix", [0, 2])
@pytest.mark.parametrize("threshold", [0.0, 0.9, 2.0, 1e6])
def test_map_equals_the_whole_attention(picture: Picture, prefix: int, threshold: float) -> None:
    queries, keys = vision(picture, prefix=prefix)
    found = vflowopt.importance(queries, keys, threshold, 0.5, tiles=picture, prefix=prefix)
    for row in range(2):
        tile = picture.tile_of().tolist()
        expected = slow_map(queries[row], keys[row], tile, prefix, threshold)
        assert found[row].tolist() == pytest.approx(expected, abs=2e-6)
    assert found.dtype == torch.float32


def test_tiles_threshold_and_prefix_all_matter() -> None:
    """Each of them changes the map; otherwise the comparison above would show nothing."""
    queries, keys = vision(TILED)
    expected = vflowopt.importance(queries, keys, 2.0, 0.5, tiles=TILED)
    others = [
        vflowopt.importance(queries, keys, 2.0, 0.5),
        vflowopt.importance(queries, keys, 0.0, 0.5, tiles=TILED),
        vflowopt.importance(queries, keys, 2.0, 0.4, tiles=TILED),
    ]
    assert all((other - expected).abs().max() > 1e-3 for other in others)
    sums = torch.zeros(2, 7).index_add(1, TILED.tile_of(), expected)
    assert torch.allclose(sums[:, [0, 1, 2, 4, 5]], torch.ones(2, 5), atol=1e-5)


def test_a_map_by_hand() -> None:
    """Tokens read 0, 0, 1, 2 alone: they receive 2, 1, 1, 0 of 4, with a mean of 1."""
    queries, keys = torch.eye(4)[None, None], torch.zeros(1, 1, 4, 4)
    for i, j in enumerate((0, 0, 1, 2)):
        keys[0, 0, j, i] = 300.0
    for threshold, expected in (
        (0.5, [2 / 3, 1 / 3, 0, 0]),  # 0, 1 and 2 are global: they read 0, 0 and 1
        (1.0, [1, 0, 0, 0]),  # more than the mean receives only 0
        (2.0, [0.5, 0.25, 0.25, 0]),  # more than twice the mean receives none: all are global
    ):
        found = vflowopt.importance(queries, keys, threshold, 1.0)
        assert found[0].tolist() == pytest.approx(expected)


def test_without_global_tokens_all_count() -> None:
    """Equal attention: no token receives more than the mean, and the map is the mean itself."""
    queries, keys = torch.zeros(1, 2, 15, 4), torch.randn(1, 2, 15, 4)
    found = vflowopt.importance(queries, keys, 1.5, 0.5)
    assert torch.allclose(found, torch.full((1, 15), 1 / 15), atol=1e-7)
    broken = vflowopt.importance(queries * math.nan, keys, 1.5, 0.5)
    assert torch.equal(broken, torch.zeros(1, 15))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_map_is_fp32_under_autocast_and_for_half_inputs(dtype: torch.dtype) -> None:
    queries, keys = (x.to(dtype) for x in vision(plain(13, 15)))
    expected = vflowopt.importance(queries.float(), keys.float(), 2.0, 0.3)
    with torch.autocast("cpu", dtype):
        assert torch.equal(vflowopt.importance(queries, keys, 2.0, 0.3), expected)


class _Sizes(TorchDispatchMode):
    """Notes the largest tensor that an operation returns."""

    largest = 0

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = op(*args, **(kwargs or {}))
        if isinstance(result, Tensor) and op is not torch.ops.aten.expand.default:
            self.largest = max(self.largest, result.numel())
        return result


def test_no_map_is_held_and_blocks_do_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    queries, keys = vision(plain(30, 30), images=3)
    with _Sizes() as sizes:
        expected = vflowopt.importance(queries, keys, 2.0, 0.5)
    assert 0 < sizes.largest <= 3 * 3 * 128 * 900
    monkeypatch.setattr(vflowopt, "_ELEMENTS", 3 * 128 * 900)  # a picture at a time
    with _Sizes() as sizes:
        single = vflowopt.importance(queries, keys, 2.0, 0.5)
    assert 0 < sizes.largest <= 3 * 128 * 900 < 900 * 900
    assert torch.allclose(single, expected, rtol=1e-5, atol=0)


# --- recycling -----------------------------------------------------------------------------------


def slow_recycling(
    tokens: Tensor, importance: list[float], keep: int, cell: list[int]
) -> list[dict[int, Tensor]]:
    """All results of the paper's rule for the M that equal the number of groups they make."""
    total = len(importance)
    ranked = sorted(range(total), key=lambda i: (-importance[i], i))
    results = []
    for many in range(total - (total - keep) + 1):
        staying, dropped = ranked[: keep - many], ranked[keep - many :]
        groups: dict[int, list[int]] = {}
        for i in dropped:  # from the most important
            groups.setdefault(cell[i], []).append(i)
        if len(groups) != many:
            continue
        result = {i: tokens[i].double() for i in staying}
        for group in groups.values():
            total_weight = sum(importance[i] for i in group)
            shares = [
                importance[i] / total_weight if total_weight else 1 / len(group) for i in group
            ]
            parts = (w * tokens[i].double() for w, i in zip(shares, group, strict=True))
            result[group[0]] = torch.stack(list(parts)).sum(0)
        results.append(result)
    return results


def recycling_cases(count: int) -> list[tuple[Tensor, Tensor, int, list[int], int]]:
    choose, draw = random.Random(3), torch.Generator().manual_seed(3)
    cases = []
    for number in range(count):
        total = choose.randint(1, 40)
        cells = choose.randint(1, total)
        cell = [choose.randrange(cells) for _ in range(total)]  # some cells may be empty
        importance = torch.rand(2, total, generator=draw)
        if number % 3 == 0:
            importance = torch.randint(0, 4, (2, total), generator=draw) / 4
        if number % 10 == 0:
            importance = torch.zeros(2, total)
        tokens = torch.randn(2, total, 3, generator=draw)
        cases.append((tokens, importance, choose.randint(cells, total), cell, cells))
    return cases


def test_recycling_is_the_papers_with_as_many_groups_as_tokens_over() -> None:
    several = 0
    for tokens, importance, keep, cell, cells in recycling_cases(300):
        picks, merged = vflowopt.recycle(tokens, importance, keep, torch.tensor(cell), cells)
        assert picks.shape == (2, keep) and merged.shape == (2, keep, 3)
        for row in range(2):
            results = slow_recycling(tokens[row], importance[row].double().tolist(), keep, cell)
            assert results  # there always is an M that leaves exactly `keep`
            several += len(results) > 1
            for result in results:  # and if there are more, they agree
                assert picks[row].tolist() == sorted(result)
                expected = torch.stack([result[i] for i in sorted(result)])
                assert torch.allclose(merged[row].double(), expected, atol=1e-6)
    assert several > 20


def test_recycling_by_hand() -> None:
    """Cells 0 0 0 1 1, importance 5 3 1 4 2, three stay: {0}, {1, 2} and {3, 4}."""
    tokens = torch.tensor([[[0.0], [4.0], [8.0], [3.0], [9.0]]])
    importance = torch.tensor([[5.0, 3.0, 1.0, 4.0, 2.0]])
    cell = torch.tensor([0, 0, 0, 1, 1])
    picks, merged = vflowopt.recycle(tokens, importance, 3, cell, 2)
    assert picks.tolist() == [[0, 1, 3]]
    assert merged.flatten().tolist() == pytest.approx([0.0, 5.0, 5.0])


def test_merge_weights_sum_to_one_and_untouched_tokens_are_bit_equal() -> None:
    for tokens, importance, keep, cell, cells in recycling_cases(60):
        ones = torch.ones_like(tokens)
        merged = vflowopt.recycle(ones, importance, keep, torch.tensor(cell), cells)[1]
        assert torch.allclose(merged, torch.ones(()), atol=1e-6)
        half = tokens.bfloat16()
        picks, merged = vflowopt.recycle(half, importance, keep, torch.tensor(cell), cells)
        assert merged.dtype == torch.bfloat16
        results = [
            slow_recycling(tokens[row], importance[row].tolist(), keep, cell)[0] for row in range(2)
        ]
        for row, i in itertools.product(range(2), range(keep)):
            token = int(picks[row, i])
            if torch.equal(results[row][token], tokens[row, token].double()):
                assert torch.equal(merged[row, i], half[row, token])


def test_keeping_all_is_the_identity_and_few_tokens_are_not_merged() -> None:
    for tokens, importance, _, cell, cells in recycling_cases(40):
        total = len(cell)
        picks, merged = vflowopt.recycle(tokens, importance, total, torch.tensor(cell), cells)
        assert torch.equal(picks, torch.arange(total).expand(2, total))
        assert torch.equal(merged, tokens)
        if cells > 1:
            picks, merged = vflowopt.recycle(
                tokens, importance, cells - 1, torch.tensor(cell), cells
            )
            order = importance.argsort(descending=True, stable=True)[:, : cells - 1]
            assert torch.equal(picks, order.sort().values)
            assert torch.equal(merged, tokens[torch.arange(2)[:, None], picks])


def test_columns_are_weighed_in_parts_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    tokens, importance = torch.randn(2, 30, 50), torch.rand(2, 30)
    cell = torch.arange(30) // 8
    expected = vflowopt.recycle(tokens, importance, 12, cell, 4)
    monkeypatch.setattr(vflowopt, "_ELEMENTS", 60 * 7)
    found = vflowopt.recycle(tokens, importance, 12, cell, 4)
    assert torch.equal(found[0], expected[0]) and torch.allclose(found[1], expected[1], atol=1e-6)


@pytest.mark.parametrize("side", [1.0, 1.5, 3.0, 11.76, 100.0])
def test_cells_are_squares_of_each_raster(side: float) -> None:
    seen: dict[tuple[int, int, int], int] = {}
    expected = []
    for number, part in enumerate(TILED.parts):
        for row, column in itertools.product(*map(range, part.grid)):
            key = (number, math.floor(row / side), math.floor(column / side))
            expected.append(seen.setdefault(key, len(seen)))
    found, cells = cell_numbers(TILED, side, CPU)
    assert cells == len(seen) == len(set(found.tolist()))
    pairs = set(zip(found.tolist(), expected, strict=True))
    assert len(pairs) == cells  # the same cells, numbered in some order
    assert cell_numbers(plain(27, 27), 11.76, CPU)[1] == 9


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda q: vflowopt.importance(q, q[:, :, 1:], 1.0, 1.0), "must agree"),
        (lambda q: vflowopt.importance(q, q, 1.0, 1.0, tiles=plain(2, 2)), "every token"),
        (lambda q: vflowopt.recycle(q[0], q[0, :, :, 0], 0, torch.zeros(15).long(), 1), "from 1"),
        (lambda q: vflowopt.recycle(q[0], q[0, :, 1:, 0], 3, torch.zeros(15).long(), 1), "agree"),
    ],
)
def test_functions_refuse_what_does_not_fit(call: Any, words: str) -> None:
    with pytest.raises(MethodError, match=words):
        call(torch.rand(1, 2, 15, 4))
