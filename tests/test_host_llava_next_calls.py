"""LLaVA-NeXT and LLaVA-NeXT-Video: kinds of calls, pruning inside the LLM, reports, refusals."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import tiny
import tiny_llava_next as nx
import vistoken
from llava_next_oracles import (
    KEEP,
    LONG,
    NEW,
    SMALL,
    HideKeys,
    LastToken,
    TowerFirst,
    dropped,
    generate,
    mixed,
    runs,
)
from vistoken.errors import AttachError, DataError, ModelNotSupported
from vistoken.registry import method_class, recognise

pytest.importorskip("transformers")

BOTH = pytest.mark.parametrize("video", [False, True], ids=["images", "videos"])


@pytest.fixture(scope="module")
def models() -> tuple[Any, Any]:
    return nx.tiny_llava_next(), nx.tiny_llava_next_video()


def cls_topk(keep: int = KEEP, **options: Any) -> Any:
    return method_class("cls_topk")(keep=keep, **options)


# --- calls ---------------------------------------------------------------------------------------


@BOTH
@pytest.mark.parametrize(
    "mode",
    [{}, {"cache_implementation": "static"}, {"num_beams": 2}],
    ids=["dynamic", "static", "beams"],
)
def test_a_padded_batch_equals_its_rows(
    video: bool, mode: dict[str, Any], models: tuple[Any, Any]
) -> None:
    model = models[video]
    together, singles = mixed(video)
    with vistoken.attach(model, cls_topk()) as held:
        found = generate(model, together, **mode)
        kept = iter(held.report().kept)
        for row, single in enumerate(singles):
            assert torch.equal(found[row, -NEW:], generate(model, single, **mode)[0, -NEW:]), row
            for own in held.report().kept:
                assert torch.equal(own, next(kept))
    assert torch.equal(generate(model, singles[2], **mode)[0, -NEW:], found[2, -NEW:])


@BOTH
def test_embeddings_and_sampling(video: bool, models: tuple[Any, Any]) -> None:
    model = models[video]
    inputs, _ = mixed(video)
    with vistoken.attach(model, cls_topk()) as held:
        expected = generate(model, inputs)
        given = {name: value for name, value in inputs.items() if name != "input_ids"}
        given["inputs_embeds"] = model.get_input_embeddings()(inputs["input_ids"])
        assert torch.equal(generate(model, given), expected[:, -NEW:])
        assert held.report().tokens_out == [KEEP] * 3
        drawn = []
        for _ in range(2):
            torch.manual_seed(0)
            drawn.append(generate(model, inputs, do_sample=True))
        assert torch.equal(*drawn) and not torch.equal(drawn[0], expected)


@BOTH
def test_everything_kept_is_the_bare_model(video: bool, models: tuple[Any, Any]) -> None:
    model = models[video]
    inputs, _ = mixed(video)
    dense, ids = model(**inputs).logits, generate(model, inputs)
    for method in (cls_topk(1000), method_class("holov")(ratio=0.0)):
        with vistoken.attach(model, method):
            assert torch.equal(model(**inputs).logits, dense)
            assert torch.equal(generate(model, inputs), ids)
    with vistoken.attach(model, cls_topk()):
        assert model(**inputs).logits.shape[1] < dense.shape[1]
    assert torch.equal(model(**inputs).logits, dense)


def test_a_small_picture_stays_whole_beside_a_pruned_one(models: tuple[Any, Any]) -> None:
    model, keep = models[0], nx.tokens(SMALL) + 1
    ids = tiny.batch(nx.prompt(2, nx.TALL, 3, SMALL, 2))
    inputs = {**ids, **nx.pictures(nx.TALL, SMALL)}
    with vistoken.attach(model, cls_topk(keep)) as held:
        model(**inputs)
        report = held.report()
    assert report.tokens_in == [nx.tokens(nx.TALL), nx.tokens(SMALL)]
    assert report.tokens_out == [keep, keep - 1]
    assert report.kept[1].tolist() == list(range(keep - 1))


def test_arguments_in_order(models: tuple[Any, Any]) -> None:
    inputs = nx.one_image()
    names = ("input_ids", "pixel_values", "image_sizes", "attention_mask")
    clip = nx.one_video()
    with vistoken.attach(models[0], cls_topk()):
        expected = models[0](**inputs).logits
        assert torch.equal(models[0](*(inputs[name] for name in names)).logits, expected)
    with vistoken.attach(models[1], cls_topk()):
        expected = models[1](**clip).logits
        placed = (clip["input_ids"], None, clip["pixel_values_videos"], None)
        assert torch.equal(models[1](*placed, clip["attention_mask"]).logits, expected)


# --- pruning inside the LLM ----------------------------------------------------------------------


@torch.no_grad()
@BOTH
@pytest.mark.parametrize("single", [True, False], ids=["one", "padded batch"])
def test_kept_positions_equal_hidden_keys(
    video: bool, single: bool, models: tuple[Any, Any]
) -> None:
    model = models[video]
    inputs, singles = mixed(video)
    inputs = singles[0] if single else inputs
    lengths = [len(own) for own in runs(model, inputs)]
    with vistoken.attach(model, LastToken(keep=KEEP)) as held:
        found = model(**inputs, use_cache=True)
        report = held.report()
        sizes = [len(own) for own in report.kept]
        assert sizes == [KEEP] * len(lengths)
        assert report.layer_tokens == [sum(lengths)] * 2 + [sum(sizes)] * 2
        cached = [found.past_key_values.get_seq_length(layer) for layer in range(4)]
        assert cached[0] == cached[1] == inputs["input_ids"].shape[1] and cached[2] == cached[3]
        assert cached[2] < cached[1]
        logits = steps(model, inputs, found)
    hook = HideKeys(dropped(inputs, report.kept, lengths), inputs["attention_mask"])
    layers = model.model.language_model.layers[2:]
    handles = [layer.register_forward_pre_hook(hook, with_kwargs=True) for layer in layers]
    bare = model(**inputs, use_cache=True)
    expected = steps(model, inputs, bare)
    for handle in handles:
        handle.remove()
    dense = model(**inputs).logits[:, -1]
    assert not torch.allclose(dense, expected[0], atol=1e-3)  # hiding the keys does show
    for step, (own, other) in enumerate(zip(logits, expected, strict=True)):
        assert torch.allclose(own, other, atol=1e-5), step


def steps(model: Any, inputs: dict[str, Tensor], output: Any) -> list[Tensor]:
    """Logits of the prompt's last token and of eight more, which are the same in every call."""
    mask, found = inputs["attention_mask"], [output.logits[:, -1]]
    tokens = torch.randint(6, 64, (8, len(mask), 1), generator=torch.Generator().manual_seed(0))
    for token in tokens:
        mask = torch.cat([mask, torch.ones_like(token)], dim=1)
        output = model(input_ids=token, attention_mask=mask, past_key_values=output.past_key_values)
        found.append(output.logits[:, -1])
    return found


# --- the report ----------------------------------------------------------------------------------


def counted(model: Any, inputs: dict[str, Tensor]) -> int:
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(**inputs, logits_to_keep=1)
    return counter.get_total_flops()


@pytest.mark.parametrize("case", ["images", "tower", "llm", "videos", "conv"])
def test_flops_agree_with_a_counted_run(case: str) -> None:
    video = case in ("videos", "conv")
    pool = {"spatial_pool_mode": "conv"} if case == "conv" else {}
    model = nx.tiny_llava_next(video=video, kv_heads=1 if case == "llm" else 2, **pool)
    model.set_attn_implementation("eager")  # the counter knows no formula for fused attention here
    inputs, _ = mixed(video)
    dense = counted(model, inputs)
    methods = {"tower": TowerFirst(keep=30), "llm": LastToken(keep=KEEP)}
    method = methods.get(case, method_class("uniform")(keep=KEEP))  # free: it reads no signal
    with vistoken.attach(model, method) as held:
        pruned = counted(model, inputs)
        report = held.report()
    assert report.flops_dense == pytest.approx(dense, rel=0.02)
    assert report.flops == pytest.approx(pruned, rel=0.02)
    assert report.flops < report.flops_dense


@BOTH
def test_counts_and_bytes(video: bool, models: tuple[Any, Any]) -> None:
    model = models[video]
    inputs, _ = mixed(video)

    def size() -> int:
        cache = model(**inputs, use_cache=True).past_key_values
        return sum(
            part.numel() * part.element_size()
            for layer in cache.layers
            for part in (layer.keys, layer.values)
        )

    dense, lengths = size(), [len(own) for own in runs(model, inputs)]
    with vistoken.attach(model, cls_topk()) as held:
        pruned = size()
        report = held.report()
        assert (report.kv_bytes_dense, report.kv_bytes) == (dense, pruned)
    assert report.tokens_in == lengths and report.tokens_out == [KEEP] * 3
    assert report.layer_tokens == [3 * KEEP] * 4 and report.notes == []
    with vistoken.attach(model, LastToken(keep=KEEP)) as held:
        pruned = size()
        assert held.report().kv_bytes == pruned


def test_the_usual_picture(models: tuple[Any, Any]) -> None:
    for model in models:
        assert recognise(model).example().total == nx.tokens((2 * nx.TILE, 2 * nx.TILE))


# --- bad input -----------------------------------------------------------------------------------


def test_pictures_that_do_not_fit(models: tuple[Any, Any]) -> None:
    inputs, clip = nx.one_image(), nx.one_video()
    pixels = inputs["pixel_values"]
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"image_sizes": None}, "no image_sizes"),
        ({"image_sizes": torch.tensor([[0, 5]])}, "height, width"),
        ({"image_sizes": torch.tensor([nx.TALL, nx.WIDE])}, "names 2 image"),
        ({"image_sizes": torch.tensor([LONG])}, "image placeholder"),
        ({"pixel_values": pixels[:, :3]}, "5 tiles"),
        ({"pixel_values": pixels[..., :20]}, "56, 56"),
        ({"input_ids": inputs["input_ids"][:, :-10], "attention_mask": None}, "image placeholder"),
    ]
    with vistoken.attach(models[0], cls_topk()):
        for change, says in wrong:
            with pytest.raises(DataError, match=says):
                generate(models[0], {**inputs, **change})
    frames = clip["pixel_values_videos"]
    with vistoken.attach(models[1], cls_topk()):
        with pytest.raises(DataError, match=r"\[videos, frames, 3, 56, 56\]"):
            generate(models[1], {**clip, "pixel_values_videos": frames[0]})
        with pytest.raises(DataError, match="24 .*placeholder.* 8 visual tokens"):
            generate(models[1], {**clip, "pixel_values_videos": frames[:, :2]})
        with pytest.raises(AttachError, match="vision_feature_layer"):
            generate(models[1], clip, vision_feature_layer=-1)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"vision_feature_select_strategy": "full"}, "'default'"),
        ({"image_grid_pinpoints": [[56, 100]]}, "multiples"),
        ({"vision_feature_layer": 0}, "embeddings"),
    ],
)
def test_configs_that_are_refused(changes: dict[str, Any], says: str) -> None:
    with pytest.raises(ModelNotSupported, match=says):
        vistoken.attach(nx.tiny_llava_next(**changes), cls_topk())


@BOTH
def test_missing_parts_are_named(video: bool) -> None:
    model = nx.tiny_llava_next(video=video)
    part = "vision_resampler" if video else "multi_modal_projector"
    delattr(model.model, part)
    with pytest.raises(ModelNotSupported, match=part):
        vistoken.attach(model, cls_topk())
