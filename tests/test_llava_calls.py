"""LLaVA-1.5, every way to call it, against a prompt shortened by hand."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

import tiny
import vistoken
from vistoken.errors import AttachError, DataError

transformers = pytest.importorskip("transformers")

KEEP = 9
NEW = 6


@pytest.fixture()
def model() -> Any:
    return tiny.tiny_llava()


def by_hand(
    model: Any, inputs: dict[str, torch.Tensor], kept: list[torch.Tensor]
) -> list[dict[str, torch.Tensor]]:
    """The oracle: for each row, unpadded, embeddings and original positions of what stays.

    Written with plain loops over one token at a time, on a bare model.
    """
    features = model.get_image_features(inputs["pixel_values"], return_dict=True).pooler_output
    embed = model.get_input_embeddings()
    rows, image = [], 0
    for ids, mask in zip(inputs["input_ids"], inputs["attention_mask"], strict=True):
        tokens, positions, labels, seen = [], [], [], 0
        for position, token in enumerate(ids[mask.bool()].tolist()):
            if token == tiny.IMAGE:
                if seen in kept[image].tolist():
                    tokens.append(features[image][seen])
                    positions.append(position)
                    labels.append(token)
                seen += 1
                if seen == tiny.TOKENS:
                    image, seen = image + 1, 0
            else:
                tokens.append(embed(torch.tensor(token)))
                positions.append(position)
                labels.append(token)
        rows.append(
            {
                "inputs_embeds": torch.stack(tokens)[None],
                "positions": torch.tensor(positions)[None],
                "labels": torch.tensor(labels)[None],
            }
        )
    return rows


def padded_batch() -> dict[str, torch.Tensor]:
    rows = (
        tiny.prompt(3, "image", 4, "image", 2, seed=1),
        tiny.prompt(2, "image", 6, seed=2),
        tiny.prompt(7, seed=3),
    )
    return {**tiny.batch(*rows), "pixel_values": tiny.pictures(3, seed=5)}


MODES: dict[str, dict[str, Any]] = {
    "greedy": {},
    "beams": {"num_beams": 3},
    "static cache": {"cache_implementation": "static"},
    "repetition penalty": {"repetition_penalty": 1.5},
    "min tokens": {"min_new_tokens": NEW},
}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("positions", ["renumber", "original"])
def test_generate_equals_the_prompt_shortened_by_hand(
    model: Any, mode: str, positions: str
) -> None:
    inputs = padded_batch()
    options = {"max_new_tokens": NEW, "do_sample": False, **MODES[mode]}
    with vistoken.attach(model, vistoken.ClsTopK(keep=KEEP, positions=positions)) as attachment:
        found = model.generate(**inputs, **options)
        kept = attachment.report().kept
    assert torch.equal(found[:, :-NEW], inputs["input_ids"])
    for row, oracle in enumerate(by_hand(model, inputs, kept)):
        length = oracle["inputs_embeds"].shape[1]
        extra = {"position_ids": oracle["positions"]} if positions == "original" else {}
        ids = inputs["input_ids"][row][inputs["attention_mask"][row].bool()]
        expected = model.generate(
            inputs_embeds=oracle["inputs_embeds"],
            attention_mask=torch.ones(1, length, dtype=torch.long),
            input_ids=ids[None],  # what a repetition penalty sees
            **extra,
            **options,
        )
        assert torch.equal(found[row, -NEW:], expected[0, -NEW:]), row


@pytest.mark.parametrize("positions", ["renumber", "original"])
def test_forward_logits_and_loss(model: Any, positions: str) -> None:
    inputs = tiny.one_image()
    with vistoken.attach(model, vistoken.HoloV(keep=KEEP, crops=4, positions=positions)) as held:
        output = model(**inputs, labels=inputs["input_ids"], use_cache=False)
        kept = held.report().kept
    oracle = by_hand(model, inputs, kept)[0]
    extra = {"position_ids": oracle["positions"]} if positions == "original" else {}
    expected = model(
        inputs_embeds=oracle["inputs_embeds"],
        attention_mask=torch.ones_like(oracle["positions"]),
        labels=oracle["labels"],
        use_cache=False,
        **extra,
    )
    assert torch.allclose(output.logits, expected.logits, atol=1e-5)
    assert torch.allclose(output.loss, expected.loss, atol=1e-5)


def test_right_padding_keeps_its_side(model: Any) -> None:
    rows = (tiny.prompt(3, "image", 4, seed=1), tiny.prompt(2, "image", "image", 6, seed=2))
    inputs = {**tiny.batch(*rows, left=False), "pixel_values": tiny.pictures(3)}
    labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
    with vistoken.attach(model, vistoken.ClsTopK(keep=KEEP)) as held:
        logits = model(**inputs, labels=labels, use_cache=False).logits
        kept = held.report().kept
    for row, oracle in enumerate(by_hand(model, inputs, kept)):
        expected = model(inputs_embeds=oracle["inputs_embeds"], use_cache=False).logits[0]
        assert torch.allclose(logits[row, : len(expected)], expected, atol=1e-5)


@pytest.mark.parametrize("positions", ["renumber", "original"])
@pytest.mark.parametrize("explicit", [False, True])
def test_a_decode_loop_written_for_the_long_prompt(
    model: Any, positions: str, explicit: bool
) -> None:
    inputs = padded_batch() if explicit else tiny.one_image()
    method = vistoken.ClsTopK(keep=KEEP, positions=positions)
    with vistoken.attach(model, method), torch.no_grad():
        expected = model.generate(**inputs, max_new_tokens=NEW, do_sample=False)
        mask = inputs["attention_mask"]
        place = (mask.cumsum(1) - 1).clamp(min=0)
        place_given = {"position_ids": place} if explicit else {}
        output = model(**inputs, **place_given, use_cache=True)
        found = []
        for _ in range(NEW):
            token = output.logits[:, -1:].argmax(-1)
            found.append(token)
            mask = torch.cat([mask, torch.ones_like(token)], dim=1)
            place = place[:, -1:] + 1
            place_given = {"position_ids": place} if explicit else {}
            output = model(
                input_ids=token,
                attention_mask=mask,
                past_key_values=output.past_key_values,
                **place_given,
            )
    assert torch.equal(torch.cat(found, 1), expected[:, -NEW:])


def test_a_cache_repeated_for_several_questions(model: Any) -> None:
    inputs = tiny.one_image()
    ids = inputs["input_ids"]
    with vistoken.attach(model, vistoken.ClsTopK(keep=KEEP)), torch.no_grad():
        first = model(**inputs, use_cache=True)
        token = torch.tensor([[7], [9]])
        mask = torch.ones(2, ids.shape[1] + 1, dtype=torch.long)
        first.past_key_values.batch_repeat_interleave(2)
        both = model(input_ids=token, attention_mask=mask, past_key_values=first.past_key_values)
        for row in range(2):
            longer = torch.cat([ids, token[row : row + 1]], dim=1)
            alone = model(
                input_ids=longer,
                attention_mask=torch.ones_like(longer),
                pixel_values=inputs["pixel_values"],
            )
            assert torch.allclose(both.logits[row, -1], alone.logits[0, -1], atol=1e-5)


def test_static_cache_has_the_size_of_the_short_prompt(model: Any) -> None:
    inputs = tiny.one_image()
    long = inputs["input_ids"].shape[1]
    with vistoken.attach(model, vistoken.ClsTopK(keep=KEEP)):
        result = model.generate(
            **inputs,
            max_new_tokens=NEW,
            cache_implementation="static",
            return_dict_in_generate=True,
        )
    cache = result.past_key_values
    assert cache.layers[0].max_cache_len == long - tiny.TOKENS + KEEP + NEW - 1


def test_limits_on_the_whole_sequence_count_the_callers_prompt(model: Any) -> None:
    inputs = tiny.one_image()
    long = inputs["input_ids"].shape[1]
    dense = model.generate(**inputs, max_length=long + 3, do_sample=False)
    with vistoken.attach(model, vistoken.ClsTopK(keep=KEEP)):
        pruned = model.generate(**inputs, max_length=long + 3, do_sample=False)
        config = copy.deepcopy(model.generation_config)
        config.max_length = long + 4
        given = model.generate(**inputs, generation_config=config, do_sample=False)
        shortest = model.generate(
            **inputs, max_length=long + 8, min_length=long + 8, do_sample=False
        )
    assert dense.shape == pruned.shape == (1, long + 3)
    assert given.shape == (1, long + 4)
    assert shortest.shape == (1, long + 8)


def test_streamer_sees_the_callers_prompt(model: Any) -> None:
    class Collect:
        def __init__(self) -> None:
            self.seen: list[torch.Tensor] = []

        def put(self, value: torch.Tensor) -> None:
            self.seen.append(value.flatten())

        def end(self) -> None:
            pass

    inputs = tiny.one_image()
    streamer = Collect()
    with vistoken.attach(model, vistoken.ClsTopK(keep=KEEP)):
        found = model.generate(**inputs, max_new_tokens=3, do_sample=False, streamer=streamer)
    assert torch.equal(torch.cat(streamer.seen), found[0])


def test_inputs_embeds_from_the_caller(model: Any) -> None:
    inputs = tiny.one_image()
    embeds = model.get_input_embeddings()(inputs["input_ids"])
    with vistoken.attach(model, vistoken.ClsTopK(keep=KEEP)) as held:
        expected = model.generate(**inputs, max_new_tokens=NEW, do_sample=False)
        found = model.generate(
            inputs_embeds=embeds,
            attention_mask=inputs["attention_mask"],
            pixel_values=inputs["pixel_values"],
            max_new_tokens=NEW,
            do_sample=False,
        )
        assert held.report().tokens_out == [KEEP]
        merged = model.generate(inputs_embeds=embeds, max_new_tokens=2, do_sample=False)
        assert held.report().tokens_in == []  # no pixels: nothing that could be pruned
    assert torch.equal(found, expected[:, -NEW:])
    assert merged.shape == (1, 2)


def test_no_image_at_all(model: Any) -> None:
    text = tiny.batch(tiny.prompt(7, seed=3), tiny.prompt(4, seed=4))
    dense = model.generate(**text, max_new_tokens=NEW, do_sample=False)
    with vistoken.attach(model, vistoken.ClsTopK(keep=KEEP)) as held:
        assert torch.equal(model.generate(**text, max_new_tokens=NEW, do_sample=False), dense)
        report = held.report()
        assert torch.equal(model(**text).logits, tiny.tiny_llava()(**text).logits)
    assert report.kept == [] and report.flops == report.flops_dense
    assert "images" in str(report)


def test_mask_is_inferred_from_padding_as_in_the_bare_model(model: Any) -> None:
    inputs = padded_batch()
    with vistoken.attach(model, vistoken.ClsTopK(keep=KEEP)):
        expected = model.generate(**inputs, max_new_tokens=NEW, do_sample=False)
        inputs.pop("attention_mask")
        assert torch.equal(model.generate(**inputs, max_new_tokens=NEW, do_sample=False), expected)


def test_user_cache_objects(model: Any) -> None:
    inputs = tiny.one_image()
    with vistoken.attach(model, vistoken.ClsTopK(keep=KEEP)):
        expected = model.generate(**inputs, max_new_tokens=NEW, do_sample=False)
        cache = transformers.DynamicCache()
        found = model.generate(**inputs, max_new_tokens=NEW, do_sample=False, past_key_values=cache)
        assert torch.equal(found, expected)
        with pytest.raises(AttachError, match="already holds tokens"):
            model.generate(**inputs, max_new_tokens=1, past_key_values=cache)
        with pytest.raises(AttachError, match="already holds tokens"):
            model.generate(input_ids=found, max_new_tokens=1, past_key_values=cache)
        with pytest.raises(AttachError, match="already holds tokens"):
            model(**inputs, past_key_values=cache)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"use_cache": False}, "use_cache=False"),
        ({"prompt_lookup_num_tokens": 2}, "prompt lookup"),
        ({"prefill_chunk_size": 4}, "chunked prefill"),
        ({"assistant_model": object()}, "assisted decoding"),
        ({"vision_feature_layer": -1}, "vision_feature_layer"),
    ],
)
def test_modes_that_cannot_work_say_so(model: Any, options: dict[str, Any], words: str) -> None:
    inputs = tiny.one_image()
    with (
        vistoken.attach(model, vistoken.ClsTopK(keep=KEEP)),
        pytest.raises(AttachError, match=words),
    ):
        model.generate(**inputs, max_new_tokens=2, **options)


def test_precomputed_features_are_refused(model: Any) -> None:
    inputs = tiny.one_image()
    encoded = model.get_image_features(inputs.pop("pixel_values"), return_dict=True)
    with vistoken.attach(model, vistoken.ClsTopK(keep=KEEP)):
        for call in (model, lambda **more: model.generate(max_new_tokens=2, **more)):
            with pytest.raises(AttachError, match="pixel_values instead"):
                call(**inputs, mm_encoder_outputs={"image": encoded})


def test_wrong_prompts_and_pictures(model: Any) -> None:
    inputs = tiny.one_image()
    text = {**tiny.batch(tiny.prompt(5)), "pixel_values": inputs["pixel_values"]}
    torn = dict(inputs, input_ids=inputs["input_ids"][:, :-10], attention_mask=None)
    with vistoken.attach(model, vistoken.ClsTopK(keep=KEEP)):
        with pytest.raises(DataError, match="0 image placeholder"):
            model.generate(**text, max_new_tokens=2)
        with pytest.raises(DataError, match="image placeholder"):
            model.generate(**torn, max_new_tokens=2)
        with pytest.raises(DataError, match=r"\[images, 3, 84, 84\]"):
            model.generate(**dict(inputs, pixel_values=torch.zeros(1, 3, 20, 20)))
        with pytest.raises(AttachError, match="2-D"):
            model(**dict(inputs, attention_mask=torch.ones(1, 1, 4, 4)))
        with pytest.raises(AttachError, match="logits_to_keep"):
            model(**inputs, logits_to_keep=torch.tensor([0, 1]))


def test_positional_arguments(model: Any) -> None:
    inputs = tiny.one_image()
    with vistoken.attach(model, vistoken.ClsTopK(keep=KEEP)):
        named = model(**inputs).logits
        placed = model(inputs["input_ids"], inputs["pixel_values"], inputs["attention_mask"])
        assert torch.equal(placed.logits, named)
        tokens = model.generate(inputs["input_ids"], pixel_values=inputs["pixel_values"])
        assert tokens.shape[1] > inputs["input_ids"].shape[1]


def test_masked_tokens_inside_a_prompt_are_numbered_as_the_bare_model_does(model: Any) -> None:
    inputs = tiny.one_image()
    inputs["attention_mask"][0, 2:4] = 0
    with vistoken.attach(model, vistoken.ClsTopK(keep=KEEP)) as held:
        found = model(**inputs).logits
        kept = held.report().kept[0]
    columns = torch.arange(inputs["input_ids"].shape[1])
    first = int((inputs["input_ids"][0] == tiny.IMAGE).nonzero()[0])
    stays = (columns < first) | (columns >= first + tiny.TOKENS)
    stays[first + kept] = True
    features = model.get_image_features(inputs["pixel_values"], return_dict=True).pooler_output[0]
    embeds = model.get_input_embeddings()(inputs["input_ids"])
    embeds[0, first : first + tiny.TOKENS] = features
    expected = model(
        inputs_embeds=embeds[:, stays], attention_mask=inputs["attention_mask"][:, stays]
    ).logits
    assert torch.allclose(found, expected, atol=1e-5)


def test_a_call_in_inference_mode_leaves_training_possible(model: Any) -> None:
    inputs = tiny.one_image()
    with vistoken.attach(model, vistoken.HoloV(keep=KEEP, crops=5)):
        with torch.inference_mode():
            model(**inputs)
        model(**inputs).logits.sum().backward()
