"""What both Qwen-VL hosts must do; the two test files run it on their family."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import tiny_qwen as tiny
import vistoken
from qwen_oracle import (
    generate_by_hand,
    greedy_by_hand,
    logits_by_hand,
    masked_keys,
    rows_by_hand,
)
from qwen_signal_tests import SignalTests, mixed
from vistoken.contract import ModelFacts, Place, Selection, Signal, Stage, View
from vistoken.errors import AttachError, DataError, MethodError
from vistoken.pruning._pruner import Pruner, top_indices
from vistoken.registry import recognise

KEEP, NEW = 9, 6
METHODS = {
    "uniform": vistoken.Uniform(keep=KEEP),
    "cls_topk": vistoken.ClsTopK(keep=KEEP),
    "holov": vistoken.HoloV(keep=KEEP, crops=4),
    "random": vistoken.Random(keep=KEEP),
}


@dataclass(frozen=True, kw_only=True)
class LastRow(Pruner):
    """Drops, after an LLM layer, the tokens that the prompt's last token attends to least."""

    name: ClassVar[str] = "last_row"
    places: ClassVar[frozenset[Place]] = frozenset({Place.LLM_LAYER})
    signals: ClassVar[frozenset[Signal]] = frozenset({Signal.LLM_ATTENTION})
    numbering: ClassVar[str] = "original"
    layer: int = 1

    def stages(self, facts: ModelFacts) -> tuple[Stage, ...]:
        return (Stage(Place.LLM_LAYER, self.layer, self.signals),)

    def select(self, view: View, keep: int) -> Selection:
        return Selection(top_indices(view.language.last_attention.mean(1), keep))


def generate(model: Any, inputs: dict[str, Any], **more: Any) -> torch.Tensor:
    return model.generate(**inputs, **{"max_new_tokens": NEW, "do_sample": False, **more})


class HostTests(SignalTests):
    """Collected through a subclass in a file whose name begins with test."""

    # --- pruning before the LLM -----------------------------------------------------------------

    @pytest.mark.parametrize("name", METHODS)
    def test_pruning_equals_the_prompt_shortened_by_hand(self, model: Any, name: str) -> None:
        for inputs in (tiny.many()[0], mixed(self.family)[0]):
            with vistoken.attach(model, METHODS[name]) as held, torch.no_grad():
                logits = model(**inputs).logits
                kept = held.report().kept
                found = generate(model, inputs)
            assert torch.equal(found[:, :-NEW], inputs["input_ids"])
            for number, row in enumerate(rows_by_hand(model, self.family, inputs, kept)):
                by_hand = logits_by_hand(model, row)
                assert torch.allclose(logits[number, -len(row) :], by_hand, atol=1e-5)
                assert found[number, -NEW:].tolist() == greedy_by_hand(model, row, NEW)

    def test_gapped_positions_without_a_mask_are_one_sequence(self, model: Any) -> None:
        inputs = tiny.one_image()
        bare = {k: v for k, v in inputs.items() if k != "attention_mask"}
        with vistoken.attach(model, METHODS["random"]) as held, torch.no_grad():
            logits = model(**bare, use_cache=False).logits[0]
            kept = held.report().kept
        (row,) = rows_by_hand(model, self.family, inputs, kept)
        assert torch.allclose(logits, logits_by_hand(model, row), atol=1e-5)

    def test_the_full_prompt_by_hand_is_the_bare_model(self, model: Any) -> None:
        """Guards the oracle itself."""
        inputs, _ = mixed(self.family)
        with torch.no_grad():
            logits = model(**inputs, second_per_grid_ts=[1.0]).logits
        for number, row in enumerate(rows_by_hand(model, self.family, inputs)):
            assert torch.allclose(
                logits[number, -len(row) :], logits_by_hand(model, row), atol=1e-5
            )

    def test_batch_equals_single_calls(self, model: Any) -> None:
        together, singles = tiny.many()
        with vistoken.attach(model, METHODS["cls_topk"]) as held:
            every, kept = generate(model, together), held.report().kept
            number = 0
            for row, single in enumerate(singles):
                assert torch.equal(generate(model, single)[0, -NEW:], every[row, -NEW:])
                for own in held.report().kept:
                    assert torch.equal(own, kept[number])
                    number += 1
        assert number == len(kept) == 3

    @pytest.mark.parametrize(
        "options",
        [
            {"num_beams": 2},
            {"num_beams": 3, "num_return_sequences": 2},
            {"do_sample": True},
            {"cache_implementation": "static"},
            {"repetition_penalty": 1.5},
        ],
        ids=lambda options: next(iter(options)),
    )
    def test_generation_modes(self, model: Any, options: dict[str, Any]) -> None:
        inputs, _ = mixed(self.family)
        inputs = {k: v[:1] if k in tiny.batch([1]) else v for k, v in inputs.items()}
        inputs["pixel_values"] = inputs["pixel_values"][: 5 * 6 * 4]
        inputs["image_grid_thw"] = inputs["image_grid_thw"][:1]
        settings = {"max_new_tokens": NEW, "do_sample": False, **options}
        with vistoken.attach(model, METHODS["cls_topk"]) as held:
            torch.manual_seed(3)
            found = model.generate(**inputs, **settings)
            kept = held.report().kept
        (row,) = rows_by_hand(model, self.family, inputs, kept)
        torch.manual_seed(3)
        expected = generate_by_hand(model, row, input_ids=inputs["input_ids"], **settings)
        assert torch.equal(found[:, -NEW:], expected[:, -NEW:])

    def test_beams_in_a_batch(self, model: Any) -> None:
        together, singles = tiny.many()
        options = {"num_beams": 3, "num_return_sequences": 2}
        with vistoken.attach(model, METHODS["cls_topk"]):
            every = generate(model, together, **options)[:, -NEW:]
            for row, single in enumerate(singles):
                alone = generate(model, single, **options)[:, -NEW:]
                assert torch.equal(alone, every[2 * row : 2 * row + 2])

    def test_a_decode_loop_without_positions(self, model: Any) -> None:
        """Nothing of an earlier bare call may enter, which left its rope deltas on the model."""
        inputs, _ = mixed(self.family)
        with torch.no_grad():
            model(**{**tiny.batch(tiny.prompt(1, (2, 9), 1)), **tiny.images((2, 9))})
        stale = model.model.rope_deltas
        with vistoken.attach(model, METHODS["random"]), torch.no_grad():
            expected = generate(model, inputs)[:, -NEW:]
            mask, found = inputs["attention_mask"], []
            output = model(**inputs, use_cache=True)
            for _ in range(NEW):
                found.append(output.logits[:, -1:].argmax(-1))
                mask = torch.cat([mask, torch.ones_like(found[-1])], dim=1)
                cache = output.past_key_values
                output = model(input_ids=found[-1], attention_mask=mask, past_key_values=cache)
        assert torch.equal(torch.cat(found, 1), expected)
        assert torch.equal(model.model.rope_deltas, stale)

    def test_positions_from_the_caller(self, model: Any) -> None:
        inputs, _ = mixed(self.family)
        mask, types = inputs["attention_mask"], inputs["mm_token_type_ids"]
        grids = {name: inputs[name] for name in ("image_grid_thw", "video_grid_thw")}
        axes, _ = model.model.get_rope_index(
            inputs["input_ids"], mm_token_type_ids=types, attention_mask=mask, **grids
        )
        text = (mask.cumsum(1) - 1).clamp(min=0)
        with vistoken.attach(model, METHODS["cls_topk"]), torch.no_grad():
            logits = model(**inputs).logits
            for given in (axes, torch.cat([text[None], axes])):
                assert torch.equal(model(**inputs, position_ids=given).logits, logits)
                moved = model(**inputs, position_ids=given * 2).logits
                assert not torch.allclose(moved, logits, atol=1e-3)

    def test_embeddings_from_the_caller(self, model: Any) -> None:
        inputs, _ = mixed(self.family)
        embeds = model.get_input_embeddings()(inputs["input_ids"]).detach()
        given = {k: v for k, v in inputs.items() if k not in ("input_ids", "mm_token_type_ids")}
        with vistoken.attach(model, METHODS["cls_topk"]), torch.no_grad():
            logits = model(**inputs).logits
            found = model(inputs_embeds=embeds, **given).logits
            for row in range(3):  # what stands in padding is nobody's business
                assert torch.equal(found[row, -7:], logits[row, -7:])
            expected = generate(model, inputs)[:, -NEW:]
            assert torch.equal(generate(model, {"inputs_embeds": embeds, **given}), expected)

    def test_text_alone(self, model: Any) -> None:
        text = tiny.batch(tiny.prompt(7, seed=3), tiny.prompt(4, seed=4))
        dense = generate(model, text)
        with vistoken.attach(model, METHODS["cls_topk"]) as held:
            assert torch.equal(generate(model, text), dense)
            assert held.report().kept == []

    def test_neutral_and_detached(self, model: Any) -> None:
        inputs, _ = mixed(self.family)
        with torch.no_grad():
            dense, tokens = model(**inputs).logits, generate(model, inputs)
            for budget in ({"ratio": 0.0}, {"keep": 500}):
                with vistoken.attach(model, vistoken.ClsTopK(**budget)) as held:
                    assert torch.equal(model(**inputs).logits, dense)
                    assert torch.equal(generate(model, inputs), tokens)
                assert held.report().tokens_out == held.report().tokens_in
            with vistoken.attach(model, METHODS["cls_topk"]):
                assert model(**inputs).logits.shape[1] < dense.shape[1]
            assert torch.equal(model(**inputs).logits, dense)

    # --- the report -----------------------------------------------------------------------------

    def counted(self, model: Any, inputs: dict[str, Any]) -> int:
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            model(**inputs, logits_to_keep=1)
        return counter.get_total_flops()

    def test_report(self) -> None:
        model = self.family.build(attention="eager")
        inputs, count = mixed(self.family)
        dense = self.counted(model, inputs)
        with vistoken.attach(model, METHODS["uniform"]) as held:
            pruned = self.counted(model, inputs)
            report = held.report()
            cache = model(**inputs, use_cache=True).past_key_values
        held_bytes = sum(
            t.numel() * t.element_size()
            for layer in cache.layers
            for t in (layer.keys, layer.values)
        )
        assert report.flops_dense == pytest.approx(dense, rel=0.02)
        assert report.flops == pytest.approx(pruned, rel=0.02)
        assert report.kv_bytes == held_bytes
        videos = [16] * 3 if self.family.split else [48]
        assert report.tokens_in == [30, 28, *videos]
        assert report.tokens_out == [KEEP] * count
        assert report.layer_tokens == [KEEP * count] * 4
        assert [len(kept) for kept in report.kept] == [KEEP] * count
        assert report.notes == []
        with vistoken.attach(model, METHODS["cls_topk"]) as held, torch.no_grad():
            model(**inputs)
            assert "no CLS token" in held.report().notes[0]

    # --- inside the LLM -------------------------------------------------------------------------

    @pytest.mark.parametrize("layer", [1, 2])
    def test_pruning_inside_the_llm_equals_masked_keys(self, model: Any, layer: int) -> None:
        angles, _ = model.model.language_model.rotary_emb(torch.zeros(1, 1), torch.zeros(3, 1, 1))
        if angles.dim() != 3:
            pytest.skip("this transformers joins the position axes later; the host refuses")
        for inputs in (tiny.one_image(), mixed(self.family)[0]):
            with vistoken.attach(model, LastRow(keep=KEEP, layer=layer)) as held:
                with torch.no_grad():
                    prefill = model(**inputs).logits[:, -1]
                kept = held.report().kept
                found = generate(
                    model,
                    inputs,
                    max_new_tokens=9,
                    output_logits=True,
                    return_dict_in_generate=True,
                )
            assert len(kept) == len(held.report().tokens_in)
            full = rows_by_hand(model, self.family, inputs)
            for number, row in enumerate(full):
                short = self.dropped(inputs, number, kept, len(row))
                more = found.sequences[number, inputs["input_ids"].shape[1] :].tolist()
                with masked_keys(model, layer, short):
                    first = logits_by_hand(model, row)[-1]
                    assert torch.allclose(prefill[number], first, atol=1e-5)
                    for step in range(9):
                        by_hand = logits_by_hand(model, row, more[:step])[-1]
                        assert torch.allclose(found.logits[step][number], by_hand, atol=1e-5)

    def dropped(
        self, inputs: dict[str, Any], number: int, kept: list[torch.Tensor], length: int
    ) -> torch.Tensor:
        """Which columns of a row without padding hold a visual token that was dropped."""
        sizes: dict[int, list[int]] = {tiny.IMAGE: [], tiny.VIDEO: []}
        for token, name in ((tiny.IMAGE, "image_grid_thw"), (tiny.VIDEO, "video_grid_thw")):
            for t, h, w in inputs.get(name, torch.zeros(0, 3)).int().tolist():
                apart = self.family.split and token == tiny.VIDEO
                one = h * w // tiny.MERGE**2
                sizes[token] += [one] * t if apart else [t * one]
        picture = {tiny.IMAGE: 0, tiny.VIDEO: len(sizes[tiny.IMAGE])}
        every = [*sizes[tiny.IMAGE], *sizes[tiny.VIDEO]]
        seen = 0
        for row in range(number + 1):
            mask = inputs["attention_mask"][row].bool()
            gone = torch.zeros(int(mask.sum()), dtype=torch.bool)
            for column, token in enumerate(inputs["input_ids"][row][mask].tolist()):
                if token in picture:
                    gone[column] = seen not in kept[picture[token]].tolist()
                    seen += 1
                    if seen == every[picture[token]]:
                        picture[token], seen = picture[token] + 1, 0
        assert len(gone) == length
        return gone

    # --- bad input ------------------------------------------------------------------------------

    def test_wrong_calls(self, model: Any) -> None:
        inputs = tiny.one_image()
        grid = inputs["image_grid_thw"]
        wrong = [
            ({"image_grid_thw": None}, "image_grid_thw"),
            ({"image_grid_thw": grid[0]}, r"\[pictures, 3\]"),
            ({"image_grid_thw": grid + torch.tensor([0, 1, 0])}, "multiples of 2"),
            ({"image_grid_thw": grid + torch.tensor([0, 2, 0])}, r"\[patches, values\]"),
            ({"pixel_values": inputs["pixel_values"][:, :-1]}, r"\[patches, values\]"),
            ({"input_ids": inputs["input_ids"][:, :-12], "attention_mask": None}, "placeholder"),
        ]
        side_by_side = [1, *[tiny.IMAGE] * (2 * tiny.TOKENS), 9]
        pair = {**tiny.batch(side_by_side), **tiny.images((6, 6), (6, 6))}
        with vistoken.attach(model, METHODS["cls_topk"]):
            for change, words in wrong:
                with pytest.raises(DataError, match=words):
                    model(**{**inputs, **change})
            with pytest.raises(DataError, match="text between"):
                model(**pair)
            with pytest.raises(AttachError, match="chunked prefill"):
                generate(model, inputs, prefill_chunk_size=4)

    def test_methods_that_do_not_fit(self, model: Any) -> None:
        before = dict(model.__dict__)
        with pytest.raises(AttachError, match="vision layer"):
            vistoken.prune_visual_tokens(model, keep=KEEP, method="flowcut")
        with pytest.raises(MethodError, match="three axes"):
            vistoken.attach(model, vistoken.ClsTopK(keep=KEEP, positions="renumber"))
        with pytest.raises(AttachError, match="LLM layer 3"):
            vistoken.attach(model, LastRow(keep=KEEP, layer=3))
        assert model.__dict__ == before

    def test_forward_takes_the_arguments_in_this_order(self, model: Any) -> None:
        host = recognise(model)
        names = list(inspect.signature(type(model).forward).parameters)[1:]
        assert tuple(names[: len(host.forward_names)]) == host.forward_names
        inputs = tiny.one_image()
        with vistoken.attach(model, METHODS["cls_topk"]), torch.no_grad():
            named = model(**inputs).logits
            ids, mask = inputs.pop("input_ids"), inputs.pop("attention_mask")
            assert torch.equal(model(ids, mask, **inputs).logits, named)
