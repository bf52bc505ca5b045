"""InternVL: geometry, signals and pruning against the bare model and prompts shortened by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import tiny
import tiny_internvl as own
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

TOWER = "model.vision_tower.encoder.layer"


@pytest.fixture(scope="module")
def model() -> Any:
    return own.tiny_internvl()


def one_video() -> dict[str, Tensor]:
    return {**tiny.batch(own.prompt(2, "video:3", 4)), "pixel_values": own.tiles(3, seed=8)}


def batch() -> dict[str, Tensor]:
    return own.many()[0]


MAKES = {"picture": own.one_picture, "video": one_video, "batch": batch}
RUNS = {"picture": [3], "video": [1, 1, 1], "batch": [3, 1, 2]}


def tile_features(model: Any, inputs: dict[str, Tensor]) -> Tensor:
    """Features [tiles, tokens, C] of the bare model."""
    return model.get_image_features(inputs["pixel_values"], return_dict=True).pooler_output


def features_of(name: str) -> Any:
    def read(model: Any, inputs: dict[str, Tensor]) -> dict[int, list[Tensor]]:
        found = tile_features(model, inputs).split(RUNS[name])
        return {own.IMAGE: [tiles.flatten(0, 1) for tiles in found]}

    return read


def kept_of(inputs: dict[str, Tensor], kept: list[Any]) -> dict[int, list[Any]]:
    return {own.IMAGE: kept}


METHODS = {
    "uniform": vistoken.Uniform(keep=10),
    "random": vistoken.Random(keep=7, positions="original"),
    "cls_topk": vistoken.ClsTopK(keep=12, positions="original"),
    "holov": vistoken.HoloV(keep=9, crops=4),
}


# --- geometry -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MAKES)
def test_runs_of_placeholders_are_pictures_of_tiles(model: Any, name: str) -> None:
    inputs = MAKES[name]()
    pipeline = Pipeline(recognise(model), ())
    vision = pipeline.vision_of(inputs)
    long = pipeline.read(inputs["input_ids"], None, inputs["attention_mask"], None, vision)
    assert [len(picture.parts) for picture in long.pictures] == RUNS[name]
    for picture, count, row, start in zip(
        long.pictures, RUNS[name], long.layout.image_rows, long.layout.image_starts, strict=True
    ):
        assert picture.total == picture.tokens == own.TOKENS * count
        assert picture.tile_of().tolist() == [i // own.TOKENS for i in range(picture.tokens)]
        ids = inputs["input_ids"][row]
        assert ids[start - 1] == own.START and ids[start + picture.total] == own.END
        assert bool((ids[start : start + picture.total] == own.IMAGE).all())


def test_two_runs_that_touch_across_rows_stay_apart(model: Any) -> None:
    rows = [[1, 9, 8, *[own.IMAGE] * own.TOKENS], [*[own.IMAGE] * own.TOKENS, 7, 6, 1]]
    inputs = {**tiny.batch(*rows), "pixel_values": own.tiles(2)}
    with vistoken.attach(model, vistoken.Uniform(keep=4)) as held:
        model(**inputs)
        assert held.report().tokens_in == [own.TOKENS] * 2


@pytest.mark.parametrize("ratio", [0.5, 0.25, 1.0])
def test_patches_of_a_token_are_those_that_pixel_shuffle_joins(ratio: float) -> None:
    model = own.tiny_internvl(downsample_ratio=ratio)
    host: Any = recognise(model)
    side = host.patches
    index = torch.arange(side * side, dtype=torch.float64).view(1, side, side, 1)
    joined = model.model.pixel_shuffle(index, scale_factor=ratio).flatten(1, 2)[0]
    assert joined.shape == (host.facts.visual_tokens, host.factor**2)
    values = torch.rand(2, side * side, 3, dtype=torch.float64)
    expected = values[:, joined.long()].mean(2)
    assert torch.allclose(host.mean_of_patches(values), expected, atol=1e-12)


# --- signals ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("vision", "layer"),
    [
        ({"use_qk_norm": True}, -1),
        ({"use_qk_norm": False, "attention_bias": True, "norm_type": "rms_norm"}, -2),
    ],
    ids=["qk_norm", "rms_norm"],
)
def test_signals_are_those_of_a_slow_eager_run(vision: dict[str, Any], layer: int) -> None:
    model = own.tiny_internvl(vision=vision, vision_feature_layer=layer)
    inputs = batch()
    groups = spied(model, inputs, 5)
    slow = own.tiny_internvl(vision=vision, vision_feature_layer=layer, attention="eager")
    depth = 4 + layer  # the vision layer whose output is projected
    heads: dict[str, Tensor] = {}
    attention = slow.get_submodule(f"{TOWER}.{depth}.attention")
    hooks = [
        getattr(attention, name).register_forward_hook(
            lambda module, args, output, name=name: heads.update({name: output})
        )
        for name in ("q_norm", "k_norm", "v_proj")
    ]
    with torch.no_grad():
        seen = slow.model.vision_tower(inputs["pixel_values"], output_attentions=True)
        features = tile_features(slow, inputs)
    for hook in hooks:
        hook.remove()
    row = seen.attentions[depth][:, :, 0, 1:].mean(1)  # [tiles, 64]
    side = 2 * own.GRID
    index = torch.arange(side * side, dtype=torch.float32).view(1, side, side, 1)
    patches = slow.model.pixel_shuffle(index).flatten(1, 2)[0].long()  # [tokens, 4]
    row = row[:, patches].mean(-1)
    head = {
        name: flat[:, 1:].unflatten(-1, (4, 8)).transpose(1, 2)[:, :, patches].mean(3)
        for name, flat in heads.items()
    }
    first = {3: 0, 1: 3, 2: 4}  # of the tiles of each picture, by how many it has
    assert sorted(len(group["view"].picture.parts) for group in groups) == [1, 2, 3]
    for group in groups:
        count = len(group["view"].picture.parts)
        tiles = slice(first[count], first[count] + count)
        wanted = tile_features(model, inputs)[tiles].flatten(0, 1)
        assert torch.equal(group[Signal.FEATURES][0], wanted)
        assert torch.allclose(wanted, features[tiles].flatten(0, 1), atol=1e-5)
        projected = group[Signal.PROJECTOR](group[Signal.ENCODED])
        assert group[Signal.ENCODED].shape[-1] == 4 * 32
        assert torch.allclose(projected, group[Signal.FEATURES], atol=1e-5)
        cls = group[Signal.CLS_ATTENTION]
        assert cls.dtype == torch.float32
        assert torch.allclose(cls[0], row[tiles].flatten(), atol=1e-6)
        for signal, name in (
            (Signal.VISION_QUERIES, "q_norm"),
            (Signal.VISION_KEYS, "k_norm"),
            (Signal.VISION_VALUES, "v_proj"),
        ):
            wanted = head[name][tiles].transpose(0, 1).flatten(1, 2)
            assert torch.allclose(group[signal][0], wanted, atol=1e-5), signal
        assert bool((group[Signal.SIZES] == 1).all())


def test_equal_pictures_have_equal_keys_in_any_batch(model: Any) -> None:
    together, singles = own.many()
    keys = {
        len(group["view"].picture.parts): group[Signal.IMAGE_KEY].tolist()
        for group in spied(model, together, 5)
    }
    for group in spied(model, singles[1], 5):
        assert group[Signal.IMAGE_KEY].tolist() == keys[2]
    pixels = together["pixel_values"][:3]
    swapped = {**own.one_picture(), "pixel_values": pixels[[1, 0, 2]]}
    (group,) = spied(model, swapped, 5)
    assert group[Signal.IMAGE_KEY].tolist() != keys[3]


def test_encoding_never_waits_for_the_device(model: Any) -> None:
    check_never_waits(model, batch())


# --- pruning ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "name", "beams"),
    [
        ("uniform", "picture", 0),
        ("random", "batch", 0),
        ("cls_topk", "picture", 0),
        ("cls_topk", "batch", 2),
        ("holov", "video", 0),
        ("holov", "batch", 0),
    ],
)
def test_pruning_equals_the_prompt_shortened_by_hand(
    model: Any, method: str, name: str, beams: int
) -> None:
    check_routes(model, MAKES[name], features_of(name), kept_of, METHODS[method], beams=beams)


def test_a_batch_equals_its_rows(model: Any) -> None:
    together, singles = own.many()
    with vistoken.attach(model, METHODS["cls_topk"]):
        batch = model.generate(**together, max_new_tokens=NEW, do_sample=False)
        for row, single in enumerate(singles):
            alone = model.generate(**single, max_new_tokens=NEW, do_sample=False)
            assert torch.equal(alone[0, -NEW:], batch[row, -NEW:]), row


@pytest.mark.parametrize("name", ["picture", "batch"])
def test_every_way_to_call(model: Any, name: str) -> None:
    check_calls(model, MAKES[name](), METHODS["cls_topk"])


@pytest.mark.parametrize("llm", ["Qwen3", "Llama"])
def test_other_language_models(llm: str) -> None:
    model, inputs = own.tiny_internvl(llm=llm), own.one_picture()
    oracle = own.tiny_internvl(llm=llm, attention="eager")
    check_masked_keys(model, oracle, inputs, kept_of, KeepLast(keep=9))


@pytest.mark.parametrize("name", ["video", "batch"])
def test_pruning_inside_the_llm_equals_masked_keys(model: Any, name: str) -> None:
    oracle = own.tiny_internvl(attention="eager")
    check_masked_keys(model, oracle, MAKES[name](), kept_of, KeepLast(keep=9))


def test_forward_positional_arguments_and_labels(model: Any) -> None:
    inputs = own.one_picture()
    with vistoken.attach(model, METHODS["uniform"]) as held, torch.no_grad():
        named = model(**inputs, labels=inputs["input_ids"])
        placed = model(inputs["input_ids"], inputs["pixel_values"], inputs["attention_mask"])
        assert held.report().tokens_out == [10]
    assert torch.equal(placed.logits, named.logits)
    assert bool(torch.isfinite(named.loss))


# --- report, refusals ---------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "ratio"), [("video", 0.5), ("batch", 0.5), ("batch", 0.25)])
def test_report_agrees_with_a_counted_run(name: str, ratio: float) -> None:
    model = own.tiny_internvl(attention="eager", downsample_ratio=ratio)
    inputs, runs, tokens = MAKES[name](), RUNS[name], own.TOKENS
    if ratio == 0.25:
        inputs = {**tiny.batch([1, 9, *[own.IMAGE] * 12, 8]), "pixel_values": own.tiles(3)}
        runs, tokens = [3], 4
    report = check_numbers(model, inputs, 3)
    assert report.tokens_in == [tokens * count for count in runs]
    assert report.tokens_out == [3] * len(runs)
    assert report.layer_tokens == [3 * len(runs)] * 4
    assert [len(kept) for kept in report.kept] == [3] * len(runs)
    assert report.notes == []


def test_methods_inside_the_tower_are_refused_by_name(model: Any) -> None:
    for name in ("flowcut", "tome"):
        with pytest.raises(AttachError, match=f"{name}.*vision"):
            vistoken.prune_visual_tokens(model, keep=9, method=name)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"vision_feature_select_strategy": "full"}, "'default'"),
        ({"vision_feature_layer": [-2, -1]}, "one vision layer"),
        ({"vision_feature_layer": 0}, "before any vision layer"),
        ({"downsample_ratio": 0.4}, "downsample_ratio"),
    ],
)
def test_configs_that_are_not_supported(changes: dict[str, Any], words: str) -> None:
    model = own.tiny_internvl()
    for name, value in changes.items():
        setattr(model.config, name, value)
    with pytest.raises(ModelNotSupported, match=words):
        vistoken.prune_visual_tokens(model, keep=9)


def test_models_of_other_parts_are_not_supported(model: Any) -> None:
    other = own.tiny_internvl()
    other.config.vision_config.image_size = [56, 28]
    with pytest.raises(ModelNotSupported, match="square tiles"):
        vistoken.prune_visual_tokens(other, keep=9)
    other = own.tiny_internvl()
    other.model.language_model.layers[0].mlp = torch.nn.Identity()  # as a mixture of experts
    with pytest.raises(ModelNotSupported, match=r"mlp\.gate_proj"):
        vistoken.prune_visual_tokens(other, keep=9)


def test_wrong_prompts_and_pictures(model: Any) -> None:
    inputs = own.one_picture()
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    first = int((ids[0] == own.IMAGE).nonzero()[0])
    torn = torch.cat([ids[:, :first], ids[:, first + 1 :]], dim=1)
    wrong = [
        (dict(inputs, pixel_values=own.tiles(2)), r"3 tile\(s\) in 1 picture\(s\).* 2 tile"),
        (dict(inputs, pixel_values=torch.zeros(3, 3, 20, 20)), r"3, 56, 56\], got \[3, 3, 20"),
        (dict(inputs, pixel_values=torch.zeros(1, 3, 3, 56, 56)), "own processor"),
        (dict(inputs, input_ids=torn, attention_mask=mask[:, 1:]), "run of 47 image placeholder"),
        ({**tiny.batch([1, 8, 9]), "pixel_values": own.tiles(1)}, r"0 tile\(s\)"),
    ]
    with vistoken.attach(model, METHODS["uniform"]):
        for given, words in wrong:
            with pytest.raises(DataError, match=words):
                model(**given)
        with pytest.raises(AttachError, match="vision_feature_layer"):
            model(**inputs, vision_feature_layer=-2)
        assert model(**inputs).logits.shape[1] == ids.shape[1] - 3 * own.TOKENS + 10


def test_nothing_stays_with_the_model() -> None:
    model, inputs = own.tiny_internvl(), own.one_picture()
    with torch.no_grad():
        dense = model(**inputs).logits
        before = {name: set(vars(module)) for name, module in model.named_modules()}
        with vistoken.attach(model, METHODS["cls_topk"]):
            pruned = model.generate(**inputs, max_new_tokens=3, do_sample=False)
        assert {name: set(vars(module)) for name, module in model.named_modules()} == before
        assert type(model).__name__ == "InternVLForConditionalGeneration"
        assert torch.equal(model(**inputs).logits, dense)
    assert pruned.shape[1] == inputs["input_ids"].shape[1] + 3
