"""Pyramid token pruning against loops: tile saliency, quotas, fusion, selection, and stages."""

from __future__ import annotations

import itertools
import math
import random
from typing import Any

import pytest
import torch
from torch import Tensor

from device_reads import Reads
from vistoken.contract import ModelFacts, Place, Signal, View
from vistoken.cost import TransformerShape
from vistoken.errors import MethodError
from vistoken.kernels import split_quota
from vistoken.language import LanguageRows
from vistoken.pictures import Part, Picture, plain
from vistoken.pruning import pyramid, top_indices
from vistoken.pruning.pyramid import (
    Pyramid,
    best_per_group,
    fuse,
    single_tile,
    text_guidance,
    tile_layout,
    tile_quotas,
    tile_saliency,
)

CPU = torch.device("cpu")
OVERVIEW = Part((4,), (4,))
TILED = Picture((OVERVIEW, Part((2, 4), (4, 3, 4))), separators=(16, 28))
PADDED = Picture((OVERVIEW, Part((0, 3, 3), (4, 4))))  # a band of tiles that is all padding
MANY = Picture((OVERVIEW, *[Part((4,), (4,))] * 3))
VIDEO = Picture(tuple([Part((3,), (4,))] * 5), kind="video")
PICTURES = {"plain": plain(6, 7), "tiled": TILED, "padded": PADDED, "many": MANY, "video": VIDEO}
OVERVIEWS = {TILED: 0, PADDED: 0, MANY: 3}  # the tile that shows the whole picture
every_picture = pytest.mark.parametrize("picture", PICTURES.values(), ids=PICTURES.keys())


def attention_of(picture: Picture, images: int = 2, seed: int = 0) -> Tensor:
    draw = torch.Generator().manual_seed(seed)
    return torch.randn(images, picture.tokens, generator=draw).mul(2).softmax(-1)


# --- saliency ------------------------------------------------------------------------------------


def slow_saliency(row: list[float], picture: Picture, saliency: str) -> list[float]:
    """Of one picture, with the overview's map cut into many small squares."""
    tile = picture.tile_of().tolist()
    tiles = sum(len(p.row_bands) * len(p.column_strips) for p in picture.parts)
    own = [sum(a for a, t in zip(row, tile, strict=True) if t == n) for n in range(tiles)]
    if picture not in OVERVIEWS:
        return own
    overview = OVERVIEWS[picture]
    filled = len(set(tile) - {overview})
    others = own[:overview] + own[overview + 1 :]
    if saliency == "overview" and len(picture.parts) == 2:
        (rows, columns), others = picture.parts[0].grid, [0.0] * (tiles - 1)
        part = picture.parts[1]
        height, width = part.grid
        fine = 44 * height, 44 * width  # squares that no border of a tile or token crosses
        for i, j in itertools.product(range(height), range(width)):
            band = next(b for b in range(9) if i < sum(part.row_bands[: b + 1]))
            strip = next(s for s in range(9) if j < sum(part.column_strips[: s + 1]))
            for y, x in itertools.product(range(rows), range(columns)):
                down = _shared(i, height, y, rows, fine[0])
                across = _shared(j, width, x, columns, fine[1])
                number = band * len(part.column_strips) + strip
                others[number] += row[y * columns + x] * down * across
    others.insert(overview, sum(others) / filled)
    return others


def _shared(i: int, many: int, y: int, rows: int, fine: int) -> float:
    """The share of cell y of `rows` that cell i of `many` covers, counted on a fine ruler."""
    fine *= rows
    one = range(i * fine // many, (i + 1) * fine // many)
    other = range(y * fine // rows, (y + 1) * fine // rows)
    return len(range(max(one[0], other[0]), min(one[-1], other[-1]) + 1)) / len(other)


@every_picture
@pytest.mark.parametrize("saliency", pyramid.SALIENCIES)
def test_saliency_equals_the_loops(picture: Picture, saliency: str) -> None:
    attention = attention_of(picture)
    found = tile_saliency(attention, tile_layout(picture, CPU), saliency)
    assert found.dtype == torch.float32
    for row in range(2):
        expected = slow_saliency(attention[row].tolist(), picture, saliency)
        assert found[row].tolist() == pytest.approx(expected, abs=1e-6)


def test_footprints_share_out_the_overview() -> None:
    for picture in (TILED, PADDED):
        footprint = tile_layout(picture, CPU).footprint
        covered = footprint.sum(0)
        assert torch.allclose(covered[:16], torch.ones(16, dtype=torch.float64))
        assert not covered[16:].any()
        attention = attention_of(picture)
        weights = tile_saliency(attention, tile_layout(picture, CPU))
        assert torch.allclose(weights[:, 1:].sum(-1), attention[:, :16].sum(-1))
    corner = torch.zeros(1, TILED.tokens)
    corner[0, 0] = 1.0  # the overview looks at the upper left only
    weights = tile_saliency(corner, tile_layout(TILED, CPU))
    assert weights[0, 1] > 0 and weights[0, 2:].abs().max() == 0


def test_the_two_saliencies_differ_and_guess_no_footprint() -> None:
    attention = attention_of(TILED)
    layout = tile_layout(TILED, CPU)
    overview, received = (tile_saliency(attention, layout, s) for s in pyramid.SALIENCIES)
    assert (overview - received).abs().max() > 0.01
    many = tile_layout(MANY, CPU)  # where the tiles lie is not known
    assert many.overview == 3 and many.footprint is None
    overview, received = (tile_saliency(attention_of(MANY), many, s) for s in pyramid.SALIENCIES)
    assert torch.equal(overview, received)
    assert all(tile_layout(p, CPU).overview is None for p in (VIDEO, plain(3, 4)))


def test_the_thumbnail_may_be_named() -> None:
    places = {name: tile_layout(MANY, CPU, name).overview for name in pyramid.THUMBNAILS}
    assert places == {"auto": 3, "first": 0, "last": 3, "none": None}
    turned = Picture(TILED.parts[::-1])  # the tiles first
    layout = tile_layout(turned, CPU, "last")
    assert layout.overview == 6 and tile_layout(turned, CPU).overview is None
    attention = attention_of(TILED)
    weights = tile_saliency(torch.cat((attention[:, 16:], attention[:, :16]), 1), layout)
    expected = tile_saliency(attention, tile_layout(TILED, CPU))
    assert torch.allclose(weights, expected.roll(-1, 1))
    with pytest.raises(MethodError, match="thumbnail must be one of"):
        tile_layout(MANY, CPU, "middle")


# --- quotas --------------------------------------------------------------------------------------


@every_picture
@pytest.mark.parametrize("saliency", pyramid.SALIENCIES)
def test_quotas_sum_to_the_budget_and_the_overview_keeps_one(
    picture: Picture, saliency: str
) -> None:
    layout = tile_layout(picture, CPU)
    sharp = attention_of(picture)
    sharp[1] = torch.eye(picture.tokens)[-1]  # all in the last token
    keeps = {1, 2, 7, len(layout.sizes), picture.tokens // 2, picture.tokens - 1}
    for keep, minimum in itertools.product(keeps, (0, 1, 3, 100)):
        quota = tile_quotas(sharp, layout, keep, saliency=saliency, minimum=minimum)
        assert quota.sum(-1).tolist() == [keep, keep]
        assert bool((quota <= layout.sizes).all()) and bool((quota >= 0).all())
        assert layout.overview is None or bool((quota[:, layout.overview] >= 1).all())
        least = layout.sizes.clamp(max=min(minimum, keep // len(layout.sizes)))
        assert bool((quota >= least).all())


def test_quotas_are_proportional() -> None:
    """Without an overview and with room: frames with 4, 2, 1, 1, 0 eighths of the attention."""
    attention = torch.tensor([4, 2, 1, 1, 0]).repeat_interleave(12)[None] / 96
    layout = tile_layout(VIDEO, CPU)
    assert tile_quotas(attention, layout, 16).tolist() == [[8, 4, 2, 2, 0]]
    assert tile_quotas(attention, layout, 15, minimum=3).tolist() == [[3, 3, 3, 3, 3]]
    assert tile_quotas(attention, layout, 21, minimum=1).tolist() == [[9, 5, 3, 3, 1]]
    assert tile_quotas(attention * 0, layout, 20).tolist() == [[4, 4, 4, 4, 4]]
    weights = tile_saliency(attention, layout)
    assert torch.equal(tile_quotas(attention, layout, 33), split_quota(weights, layout.sizes, 33))


def test_an_overview_weighs_an_average_tile() -> None:
    """Tiles with 1, 2, 3 of 6 parts of the attention: the overview gets 2 of 8, at least one."""
    attention = torch.tensor([1, 2, 3, 0]).repeat_interleave(16)[None] / 96
    layout = tile_layout(MANY, CPU)
    assert tile_quotas(attention, layout, 17).tolist() == [[2, 4, 6, 1 + 4]]
    assert tile_quotas(attention, layout, 1).tolist() == [[0, 0, 0, 1]]


# --- guidance, fusion, selection -----------------------------------------------------------------


class Rows(LanguageRows):
    """Made-up attention [I, H, T, N]; all pictures but the first have a padded text."""

    text_attention: Any = None

    def __init__(self, images: int, tokens: int, seed: int = 0) -> None:
        draw = torch.Generator().manual_seed(seed)
        attention = (2 * torch.randn(images, 3, 5, tokens + 9, generator=draw)).softmax(-1)
        self.text_mask = torch.ones(images, 5, dtype=torch.bool)
        self.text_mask[1:, :2] = False
        self.text_attention = attention[..., :tokens] * self.text_mask[:, None, :, None]


def slow_guidance(rows: Rows, picture: int) -> list[float]:
    attention = rows.text_attention[picture].double().mean(0)
    shown = [t for t in range(5) if rows.text_mask[picture, t]]
    return [max(attention[t, j].item() for t in shown) for j in range(attention.shape[1])]


def test_guidance_is_the_largest_head_mean() -> None:
    rows = Rows(2, 30)
    found = text_guidance(rows.text_attention, rows.text_mask)
    for picture in range(2):
        assert found[picture].tolist() == pytest.approx(slow_guidance(rows, picture), abs=1e-7)
    rubbish = rows.text_attention.clone()
    rubbish[1, :, :2], rubbish[0, :, :, 1], found[0, 1] = 9.0, math.nan, 0.0  # at the padding; NaN
    assert torch.equal(text_guidance(rubbish, rows.text_mask), found)


def slow_fusion(b: list[float], c: list[float], alpha: float, tile: list[int]) -> list[float]:
    def scaled(values: list[float]) -> list[float]:
        result = []
        for value, number in zip(values, tile, strict=True):
            own = [v for v, t in zip(values, tile, strict=True) if t == number]
            span = max(own) - min(own)
            result.append((value - min(own)) / span if span else 0.0)
        return result

    return [(1 - alpha) * x + alpha * y for x, y in zip(scaled(b), scaled(c), strict=True)]


@every_picture
@pytest.mark.parametrize("alpha", [0.0, 0.3, 0.5, 1.0])
def test_fusion_equals_the_loops(picture: Picture, alpha: float) -> None:
    b, c = attention_of(picture), attention_of(picture, seed=1)
    b[1] = 0.25  # equal everywhere
    cuts = {"tile": tile_layout(picture, CPU), "picture": single_tile(picture.tokens, CPU)}
    for over, layout in cuts.items():
        found = fuse(b, c, alpha, layout)
        tile = picture.tile_of().tolist() if over == "tile" else [0] * picture.tokens
        for row in range(2):
            expected = slow_fusion(b[row].tolist(), c[row].tolist(), alpha, tile)
            assert found[row].tolist() == pytest.approx(expected, abs=1e-5)


def test_best_per_group_equals_the_loops() -> None:
    choose, draw = random.Random(0), torch.Generator().manual_seed(0)
    for number in range(300):
        tokens, groups = choose.randint(1, 50), choose.randint(1, 6)
        group = torch.tensor([choose.randrange(groups) for _ in range(tokens)])  # in any order
        sizes = group.bincount(minlength=groups)
        scores = torch.randint(3 if number % 2 else 10**6, (2, tokens), generator=draw).float()
        keep = choose.randint(1, tokens)
        quota = split_quota(torch.rand(2, groups, generator=draw), sizes, keep)
        found = best_per_group(scores, group, sizes, quota, keep)
        assert found.dtype == torch.int64
        for row in range(2):
            expected = []
            for g in range(groups):
                own = [i for i in range(tokens) if group[i] == g]
                own.sort(key=lambda i: (-scores[row, i].item(), i))
                expected += own[: int(quota[row, g])]
            assert found[row].tolist() == sorted(expected)


# --- the method, called as a host calls it -------------------------------------------------------


def facts(layers: int = 28, first: int = 0) -> ModelFacts:
    shape = TransformerShape(2, 8, 2, 2, 4, 16, 2)
    return ModelFacts("none", (6, 7), 1, 2, 1, layers, shape, shape, 0, 0, first_text_stage=first)


def run(
    method: Pyramid, picture: Picture, keep: int, left: Tensor | None = None, images: int = 2
) -> list[Tensor]:
    """Tokens of the picture [I, n] that are left after every stage."""
    known, memory = facts(), {}
    origin = torch.arange(picture.tokens).expand(images, -1) if left is None else left
    kept = []
    for stage in method.stages(known):
        signals = {
            Signal.CLS_ATTENTION: attention_of(picture, images).gather(1, origin),
            Signal.LLM_ATTENTION: Rows(images, origin.shape[1]),
        }
        view = View(stage, known, picture, origin, memory, signals.__getitem__)
        chosen = method.select(view, keep)
        assert chosen is None or chosen.tokens is None
        origin = origin if chosen is None else origin.gather(1, chosen.indices)
        kept.append(origin)
    return kept


@every_picture
@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
def test_picks_are_the_best_of_every_tile(picture: Picture, alpha: float) -> None:
    tile = picture.tile_of().tolist()
    layout = tile_layout(picture, CPU)
    b, rows = attention_of(picture), Rows(2, picture.tokens)
    for over, keep in itertools.product(pyramid.RANGES, (1, 5, picture.tokens - 1)):
        method = Pyramid(keep=keep, alpha=alpha, scaled_over=over)
        kept = run(method, picture, keep)
        assert len(kept) == (1 if alpha == 0 else 2)
        assert alpha == 0 or kept[0].shape[1] == picture.tokens  # nothing goes before the LLM
        quota = tile_quotas(b, layout, keep)
        for row in range(2):
            where = tile if over == "tile" else [0] * len(tile)
            score = slow_fusion(b[row].tolist(), slow_guidance(rows, row), alpha, where)
            picks = kept[-1][row].tolist()
            assert picks == sorted(set(picks)) and len(picks) == keep
            for number in range(len(layout.sizes)):
                own = [i for i, t in enumerate(tile) if t == number]
                chosen = [score[i] for i in own if i in picks]
                dropped = [score[i] for i in own if i not in picks]
                assert len(chosen) == quota[row, number]
                assert min(chosen, default=9) >= max(dropped, default=-9) - 1e-6


def test_alpha_saliency_range_and_minimum_change_the_picks() -> None:
    base = run(Pyramid(keep=15), TILED, 15)[-1]
    others: list[dict[str, Any]] = [{"alpha": 0.0}, {"alpha": 1.0}, {"saliency": "received"}]
    others += [{"tile_minimum": 2}, {"scaled_over": "tile"}, {"thumbnail": "none"}]
    for given in others:
        assert not torch.equal(run(Pyramid(keep=15, **given), TILED, 15)[-1], base), given


def test_stages_need_the_llm_only_for_the_text() -> None:
    def places(**options: Any) -> list[tuple[Place, int | None, set[Signal]]]:
        layers, first = options.pop("layers", 28), options.pop("first", 0)
        method = Pyramid(keep=5, **options)
        stages = method.stages(facts(layers, first))
        assert frozenset().union(*(stage.signals for stage in stages)) == method.reads()
        return [(stage.place, stage.layer, set(stage.signals)) for stage in stages]

    before = (Place.PROJECTED, None, {Signal.CLS_ATTENTION})
    assert places(alpha=0) == [before] == places(alpha=0, layers=1)
    found = [{}, {"layer": 7}, {"layer": 0}, {"layers": 3}, {"layers": 2}, {"first": 5}]
    for given, layer in zip(found, (2, 7, 0, 1, 0, 5), strict=True):
        assert places(**given) == [before, (Place.LLM_LAYER, layer, {Signal.LLM_ATTENTION})]


@pytest.mark.parametrize(
    ("layer", "depth", "first"), [(27, 28, 0), (1, 28, 2), (None, 1, 0), (None, 4, 3)]
)
def test_layers_outside_the_model_are_refused(layer: int | None, depth: int, first: int) -> None:
    with pytest.raises(MethodError, match=r"pyramid: layer must be from .*alpha=0 needs none"):
        Pyramid(keep=5, layer=layer).stages(facts(depth, first))
    with pytest.raises(MethodError, match="pyramid: layer must be"):
        Pyramid(keep=5, layer=2.0)


def test_a_batch_equals_its_pictures_and_broken_ones_spoil_no_other() -> None:
    for picture in PICTURES.values():
        layout, over = tile_layout(picture, CPU), single_tile(picture.tokens, CPU)
        b, rows = attention_of(picture, 3), Rows(3, picture.tokens)
        keep = picture.tokens // 3

        def pick(part: slice, b: Tensor, rows: Rows, layout: Any, over: Any, keep: int) -> Tensor:
            guide = text_guidance(rows.text_attention[part], rows.text_mask[part])
            quota = tile_quotas(b[part], layout, keep)
            scores = fuse(b[part], guide, 0.5, over)
            return best_per_group(scores, layout.group, layout.sizes, quota, keep)

        args = b, rows, layout, over, keep
        together = pick(slice(None), *args)
        assert torch.equal(together, torch.cat([pick(slice(i, i + 1), *args) for i in range(3)]))
        rows.text_attention[0, :, :, 1] = math.nan
        spoiled = pick(slice(None), *args)
        assert torch.equal(spoiled[1:], together[1:])
        assert all(row == sorted(set(row)) and row[-1] < picture.tokens for row in spoiled.tolist())


def test_after_an_earlier_method() -> None:
    left = torch.stack([torch.randperm(42)[:30].sort().values for _ in range(2)])
    b, rows = attention_of(plain(6, 7)).gather(1, left), Rows(2, 30)
    guide = text_guidance(rows.text_attention, rows.text_mask)
    for alpha in (0.0, 0.5):
        (*_, kept) = run(Pyramid(keep=9, alpha=alpha), plain(6, 7), 9, left)
        picks = top_indices(fuse(b, guide, alpha, single_tile(30, CPU)), 9)
        assert torch.equal(kept, left.gather(1, picks))
        with pytest.raises(MethodError, match="needs all 82 tokens of a tiled picture.*left 30"):
            run(Pyramid(keep=9, alpha=alpha), TILED, 9, torch.arange(30).expand(2, -1))


@every_picture
def test_nothing_is_read_back_from_the_device(picture: Picture) -> None:
    method = Pyramid(keep=9, scaled_over="tile", tile_minimum=1)
    expected = run(method, picture, 9)  # fills the caches
    with Reads() as reads:
        found = run(method, picture, 9)
    assert reads.count == 0
    assert all(map(torch.equal, found, expected))


@pytest.mark.parametrize(
    "call",
    [
        lambda a, tiles: tile_quotas(a, tiles, 5, saliency="cls"),
        lambda a, tiles: tile_quotas(a[:, 1:], tiles, 5),
        lambda a, tiles: fuse(a, a[:, 1:], 0.5, tiles),
        lambda a, tiles: text_guidance(a[:, None, None], torch.ones(2, 2).bool()),
        lambda a, tiles: best_per_group(a, tiles.group[1:], tiles.sizes, tiles.sizes[None], 5),
    ],
)
def test_functions_refuse_what_does_not_fit(call: Any) -> None:
    with pytest.raises(MethodError, match="pyramid: "):
        call(attention_of(TILED), tile_layout(TILED, CPU))
