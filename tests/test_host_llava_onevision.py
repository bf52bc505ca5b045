"""LLaVA-OneVision: geometry, signals and pruning against the bare model and prompts cut by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import tiny
import tiny_llava_onevision as own
import vistoken
from host_oracles import (
    NEW,
    check_calls,
    check_masked_keys,
    check_never_waits,
    check_numbers,
    check_routes,
    spied,
)
from test_language import KeepLast
from vistoken.adapters.vlm_pipeline import Pipeline
from vistoken.contract import Signal
from vistoken.errors import AttachError, DataError, ModelNotSupported
from vistoken.registry import recognise

pytest.importorskip("transformers")

SIZES = [own.TALL, own.WIDE, own.HUGE, (76, 76), (150, 150), (40, 300), (300, 41), (228, 100)]


@pytest.fixture(scope="module")
def model() -> Any:
    return own.tiny_llava_onevision()


def batch() -> dict[str, Tensor]:
    return own.many()[0]


def mixed() -> dict[str, Tensor]:
    """A batch with a video and a picture in one row, a video in the next, and none."""
    return own.many_videos()[0]


MAKES = {
    "picture": own.one_image,
    "scaled": own.one_huge,
    "several": own.several,
    "video": own.one_video,
    "batch": batch,
    "mixed": mixed,
}


def features_of(model: Any, inputs: dict[str, Tensor]) -> dict[int, list[Tensor]]:
    """Features of the bare model, newlines included, by placeholder."""
    found: dict[int, list[Tensor]] = {}
    if "pixel_values" in inputs:
        given = {k: v for k, v in inputs.items() if k in ("image_sizes", "batch_num_images")}
        images = model.get_image_features(inputs["pixel_values"], **given, return_dict=True)
        found[own.IMAGE] = list(images.pooler_output)
    if "pixel_values_videos" in inputs:
        videos = model.get_video_features(inputs["pixel_values_videos"], return_dict=True)
        # earlier transformers add the newline only where features enter the prompt
        whole = inputs["pixel_values_videos"].shape[1] * own.FRAME
        newline = model.model.image_newline[None]
        found[own.VIDEO] = [torch.cat([video[:whole], newline]) for video in videos.pooler_output]
    return found


def kept_of(inputs: dict[str, Tensor], kept: list[Any]) -> dict[int, list[Any]]:
    images = len(inputs.get("pixel_values", ()))
    return {own.IMAGE: kept[:images], own.VIDEO: kept[images:]}


METHODS = {
    "uniform": vistoken.Uniform(keep=20),
    "random": vistoken.Random(keep=17, positions="original"),
    "cls_topk": vistoken.ClsTopK(keep=19, positions="original"),
    "holov": vistoken.HoloV(keep=18, crops=4),
    "drop": vistoken.ClsTopK(keep=11, newlines="drop"),
}


# --- geometry -----------------------------------------------------------------------------------


def placed(model: Any, inputs: dict[str, Tensor]) -> Any:
    pipeline = Pipeline(recognise(model), ())
    vision = pipeline.vision_of(inputs)
    return pipeline.read(inputs["input_ids"], None, inputs["attention_mask"], None, vision)


@pytest.mark.parametrize("most", [1, 3, 9])
def test_newlines_are_where_the_model_puts_them(most: int) -> None:
    """Rasters of every shape: the run of tokens, its newlines and its tiles."""
    model = own.tiny_llava_onevision(vision_aspect_ratio=f"anyres_max_{most}")
    for size in SIZES:
        given = own.pictures(size)
        with torch.no_grad():
            (features,) = features_of(model, given)[own.IMAGE]
        ids = tiny.batch([1, *[own.IMAGE] * len(features), 7])
        (picture,) = placed(model, {**ids, **given}).pictures
        newline = model.model.image_newline
        marks = (features == newline).all(-1).nonzero()[:, 0].tolist()
        assert list(picture.separators) == marks, size
        assert picture.total == len(features), size
        overview, raster = picture.parts
        assert overview.grid == (own.GRID, own.GRID)
        rows, columns = raster.grid
        assert rows == len(marks), size
        assert columns == marks[1] - marks[0] - 1 if rows > 1 else raster.tokens, size
        tiles, _, _ = own.geometry(size)
        assert len(raster.row_bands) * len(raster.column_strips) == tiles - 1


def test_scaled_tokens_count_to_the_tile_their_center_lies_in(model: Any) -> None:
    (picture,) = placed(model, own.one_huge()).pictures
    rows, columns = picture.parts[1].grid
    assert (rows, columns) == own.geometry(own.HUGE)[1:] != raster_of(own.HUGE)
    high, wide = raster_of(own.HUGE)
    top, left = (3 * own.GRID - high) / 2, (3 * own.GRID - wide) / 2  # padding of 3 x 3 tiles
    tiles = picture.tile_of()[own.GRID**2 :].view(rows, columns)
    for row in range(rows):
        for column in range(columns):
            down = top + (row + 0.5) * high / rows
            across = left + (column + 0.5) * wide / columns
            tile = int(down // own.GRID) * 3 + int(across // own.GRID)
            assert tiles[row, column] == 1 + tile


def raster_of(size: tuple[int, int]) -> tuple[int, int]:
    """Rows and columns of the raster before it is scaled, by transformers' own functions."""
    from transformers.models.llava_onevision import modeling_llava_onevision as source

    down, across = source.get_anyres_image_grid_shape(size, own.POINTS, own.TILE)
    raster = source.unpad_image(torch.empty(1, down * own.GRID, across * own.GRID), size)
    return raster.shape[1], raster.shape[2]


def test_several_pictures_of_a_prompt_are_a_tile_each(model: Any) -> None:
    long = placed(model, own.several())
    assert [picture.total for picture in long.pictures] == [26, 26]
    assert [picture.separators for picture in long.pictures] == [(25,), (25,)]
    assert all(len(picture.parts) == 1 for picture in long.pictures)


def test_a_video_is_its_frames_and_a_newline(model: Any) -> None:
    long = placed(model, mixed())
    assert [picture.kind for picture in long.pictures] == ["image", "video", "video"]
    for picture in long.pictures[1:]:
        assert [part.grid for part in picture.parts] == [(3, 3)] * 3
        assert picture.separators == (27,)


# --- signals ------------------------------------------------------------------------------------


def slow_attention(model: Any, tiles: Tensor, depth: int) -> dict[str, Tensor]:
    """Attention received, queries, keys, values and hidden states of a full eager run."""
    attention = model.model.vision_tower.encoder.layers[depth].self_attn
    found: dict[str, Tensor] = {}
    hooks = [
        getattr(attention, name).register_forward_hook(
            lambda module, args, output, name=name: found.update({name: output})
        )
        for name in ("q_proj", "k_proj", "v_proj")
    ]
    with torch.no_grad():
        seen = model.model.vision_tower(tiles, output_attentions=True, output_hidden_states=True)
    for hook in hooks:
        hook.remove()
    found["received"] = seen.attentions[depth].mean(dim=(1, 2))[..., None]
    found["encoded"] = seen.hidden_states[depth + 1]
    return found


def packed_like_features(model: Any, size: tuple[int, int], values: Tensor) -> Tensor:
    """[tiles, N, X] through the model's own packing of features, newlines taken out."""
    blank = torch.full((values.shape[-1],), float("nan"))
    ratio = model.config.vision_aspect_ratio
    (found,), _ = model.model.pack_image_features([values], [size], blank, ratio)
    return found[~found.isnan().all(-1)]


@pytest.mark.parametrize(("name", "layer"), [("picture", -2), ("scaled", -1), ("video", -2)])
def test_signals_are_those_of_a_slow_eager_run(name: str, layer: int) -> None:
    """Signals are packed, and scaled down, as the model packs features."""
    model = own.tiny_llava_onevision(vision_feature_layer=layer)
    slow = own.tiny_llava_onevision(vision_feature_layer=layer, attention="eager")
    inputs = MAKES[name]()
    (group,) = spied(model, inputs, 20)
    tiles = inputs["pixel_values_videos"] if name == "video" else inputs["pixel_values"]
    found = slow_attention(slow, tiles.flatten(0, 1), 4 + layer)

    def expected(values: Tensor) -> Tensor:
        if name == "video":
            return slow.model.apply_pooling(values).flatten(0, 1)
        return packed_like_features(slow, tuple(inputs["image_sizes"][0].tolist()), values)

    with torch.no_grad():
        (features,) = next(iter(features_of(model, inputs).values()))
    own_tokens = group["view"].picture.run_index()
    assert torch.equal(group[Signal.FEATURES][0], features[own_tokens])
    received = group[Signal.CLS_ATTENTION]
    assert received.dtype == torch.float32
    assert torch.allclose(received[0], expected(found["received"])[:, 0], atol=1e-6)
    assert torch.allclose(group[Signal.ENCODED][0], expected(found["encoded"]), atol=1e-5)
    for signal, key in (
        (Signal.VISION_QUERIES, "q_proj"),
        (Signal.VISION_KEYS, "k_proj"),
        (Signal.VISION_VALUES, "v_proj"),
    ):
        wanted = expected(found[key]).unflatten(-1, (4, 8)).transpose(0, 1)
        assert torch.allclose(group[signal][0], wanted, atol=1e-5), signal
    with torch.no_grad():
        projected = group[Signal.PROJECTOR](group[Signal.ENCODED])
    exact = torch.allclose(projected, group[Signal.FEATURES], atol=1e-5)
    assert exact is (name == "picture")  # projected behind the scaling, not before it


def test_signals_of_images_and_videos_do_not_mix(model: Any) -> None:
    together, singles = own.many_videos()
    both = spied(model, together, 12)
    assert [group["view"].picture.kind for group in both] == ["image", "video"]
    alone = spied(model, singles[1], 12)
    for signal in (Signal.ENCODED, Signal.CLS_ATTENTION, Signal.VISION_KEYS, Signal.FEATURES):
        assert torch.allclose(alone[0][signal][0], both[1][signal][1], atol=1e-5), signal
    assert alone[0][Signal.IMAGE_KEY][0] == both[1][Signal.IMAGE_KEY][1]
    image = own.pictures(own.WIDE, seed=5)
    ids = tiny.batch(own.prompt(2, own.WIDE, 3))
    (single,) = spied(model, {**ids, **image}, 12)
    assert torch.allclose(single[Signal.VISION_KEYS], both[0][Signal.VISION_KEYS], atol=1e-5)
    assert torch.equal(single[Signal.IMAGE_KEY], both[0][Signal.IMAGE_KEY])


def test_features_of_every_picture_are_bit_equal(model: Any) -> None:
    inputs = batch()
    with torch.no_grad():
        wanted = features_of(model, inputs)[own.IMAGE]
    for group in spied(model, inputs, 20):
        picture = group["view"].picture
        (number,) = (i for i, found in enumerate(wanted) if len(found) == picture.total)
        assert torch.equal(group[Signal.FEATURES][0], wanted[number][picture.run_index()])


@pytest.mark.parametrize("make", [batch, mixed])
def test_encoding_never_waits_for_the_device(model: Any, make: Any) -> None:
    check_never_waits(model, make())


# --- pruning ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "name", "beams"),
    [
        ("uniform", "picture", 0),
        ("random", "batch", 0),
        ("cls_topk", "scaled", 0),
        ("cls_topk", "mixed", 2),
        ("holov", "video", 0),
        ("holov", "several", 0),
        ("drop", "batch", 0),
    ],
)
def test_pruning_equals_the_prompt_shortened_by_hand(
    model: Any, method: str, name: str, beams: int
) -> None:
    check_routes(model, MAKES[name], features_of, kept_of, METHODS[method], beams=beams)


def test_newlines_stay_unless_they_are_dropped(model: Any) -> None:
    inputs = own.one_huge()
    (picture,) = placed(model, inputs).pictures
    for method, stay in ((METHODS["uniform"], True), (METHODS["drop"], False)):
        with vistoken.attach(model, method) as held:
            model(**inputs)
            kept = set(held.report().kept[0].tolist())
        assert set(picture.separators) <= kept if stay else not set(picture.separators) & kept
        assert len(kept) == method.keep


@pytest.mark.parametrize("make", [own.many, own.many_videos], ids=["images", "videos"])
def test_a_batch_equals_its_rows(model: Any, make: Any) -> None:
    together, singles = make()
    with vistoken.attach(model, METHODS["cls_topk"]):
        all_rows = model.generate(**together, max_new_tokens=NEW, do_sample=False)
        for row, single in enumerate(singles):
            alone = model.generate(**single, max_new_tokens=NEW, do_sample=False)
            assert torch.equal(alone[0, -NEW:], all_rows[row, -NEW:]), row


def test_every_way_to_call(model: Any) -> None:
    check_calls(model, mixed(), METHODS["cls_topk"])


@pytest.mark.parametrize("name", ["scaled", "mixed"])
def test_pruning_inside_the_llm_equals_masked_keys(model: Any, name: str) -> None:
    oracle = own.tiny_llava_onevision(attention="eager")
    check_masked_keys(model, oracle, MAKES[name](), kept_of, KeepLast(keep=16))


def test_positional_arguments(model: Any) -> None:
    inputs = own.one_image()
    with vistoken.attach(model, METHODS["uniform"]), torch.no_grad():
        named = model(**inputs).logits
        order = ("input_ids", "pixel_values", "image_sizes")
        placed = model(*(inputs[name] for name in order))
        assert torch.equal(placed.logits, named)


# --- report, refusals ---------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["scaled", "mixed"])
def test_report_agrees_with_a_counted_run(name: str) -> None:
    model = own.tiny_llava_onevision(attention="eager")
    report = check_numbers(model, MAKES[name](), 13)
    tokens = {"scaled": [106], "mixed": [80, 28, 28]}[name]
    assert report.tokens_in == tokens
    assert report.tokens_out == [13] * len(tokens)
    assert report.layer_tokens == [13 * len(tokens)] * 4


def test_the_missing_cls_token_is_reported(model: Any) -> None:
    for method, notes in ((METHODS["cls_topk"], 1), (METHODS["uniform"], 0)):
        with vistoken.attach(model, method) as held:
            model(**own.one_image())
            assert len(held.report().notes) == notes
            assert ("no CLS token" in str(held.report())) is bool(notes)


def test_methods_inside_the_tower_are_refused_by_name(model: Any) -> None:
    for name in ("flowcut", "tome"):
        with pytest.raises(AttachError, match=f"{name}.*vision"):
            vistoken.prune_visual_tokens(model, keep=20, method=name)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"vision_feature_select_strategy": "default"}, "'full'"),
        ({"vision_aspect_ratio": "square"}, "anyres_max_<tiles>"),
        ({"vision_feature_layer": 0}, "before any vision layer"),
        ({"image_grid_pinpoints": [[76, 100]]}, "multiples of the vision tower's image_size 76"),
    ],
)
def test_configs_that_are_not_supported(changes: dict[str, Any], words: str) -> None:
    model = own.tiny_llava_onevision()
    for name, value in changes.items():
        setattr(model.config, name, value)
    with pytest.raises(ModelNotSupported, match=words):
        vistoken.prune_visual_tokens(model, keep=20)


def test_wrong_prompts_and_pictures(model: Any) -> None:
    inputs, video = own.one_image(), own.one_video()
    no_sizes = {k: v for k, v in inputs.items() if k != "image_sizes"}
    wrong = [
        (no_sizes, "no image_sizes"),
        (dict(inputs, image_sizes=torch.tensor([[0, 5]])), "height, width"),
        (dict(inputs, pixel_values=torch.zeros(1, 2, 3, 76, 76)), "names 1 image"),
        (dict(inputs, pixel_values=torch.zeros(1, 3, 3, 20, 20)), r"3, 76, 76"),
        (dict(inputs, batch_num_images=torch.tensor([2])), r"batch_num_images=\[2\]"),
        (dict(inputs, image_sizes=torch.tensor([own.WIDE])), "placeholder"),
        (dict(video, pixel_values_videos=torch.zeros(4, 3, 76, 76)), r"\[videos, frames, 3"),
        (dict(video, pixel_values_videos=torch.zeros(1, 3, 3, 76, 76)), "placeholder"),
    ]
    with vistoken.attach(model, METHODS["uniform"]):
        for given, words in wrong:
            with pytest.raises(DataError, match=words):
                model(**given)
        for more in ({"vision_aspect_ratio": "anyres_max_9"}, {"vision_feature_layer": -2}):
            with pytest.raises(AttachError, match=next(iter(more))):
                model(**inputs, **more)
        assert model(**inputs).logits.shape[1] == inputs["input_ids"].shape[1] - 73 + 20
