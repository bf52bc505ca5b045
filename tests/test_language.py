"""Pruning inside the LLM: against masked keys, layer by layer, in every way a model is called."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

import tiny
import vistoken
from vistoken.contract import ModelFacts, Place, Selection, Signal, Stage, View
from vistoken.errors import AttachError, MethodError
from vistoken.pruning import Pruner, top_indices

pytest.importorskip("transformers")

LAYER = 1


@dataclass(frozen=True, kw_only=True)
class KeepLast(Pruner):
    """Keeps what the last token of the prompt attends to, in one or two cuts."""

    name: ClassVar[str] = "keep_last"
    paper: ClassVar[str] = "none"
    tag: ClassVar[str] = "experimental"
    places: ClassVar[frozenset[Place]] = frozenset({Place.LLM_LAYER})
    signals: ClassVar[frozenset[Signal]] = frozenset({Signal.LLM_ATTENTION, Signal.HIDDEN})
    numbering: ClassVar[str] = "original"

    twice: bool = False

    def stages(self, facts: ModelFacts) -> tuple[Stage, ...]:
        layers = (0, LAYER) if self.twice else (LAYER,)
        return tuple(Stage(Place.LLM_LAYER, layer, self.signals) for layer in layers)

    def select(self, view: View, keep: int) -> Selection:
        if view.stage.layer == 0:
            keep = (view.tokens + keep) // 2
        return Selection(top_indices(view.language.last_attention.mean(1), keep))


@dataclass(frozen=True, kw_only=True)
class Look(KeepLast):
    """As `KeepLast`, and remembers what it saw."""

    seen: ClassVar[list[View]] = []

    def select(self, view: View, keep: int) -> Selection:
        self.seen.append(view)
        return super().select(view, keep)


def masked(model: Any, layer: int, dropped: dict[int, list[int]]) -> list[Any]:
    """Hide columns of rows from every layer behind `layer`: the slow oracle of a cut."""

    def hide(module: Any, args: Any, kwargs: Any) -> Any:
        hidden, mask = args[0], kwargs["attention_mask"]
        assert mask is not None and mask.dim() == 4
        mask = mask.clone()
        for row, columns in dropped.items():
            mask[row, :, :, columns] = torch.finfo(mask.dtype).min
            for column in columns:  # a row needs something to see; nobody reads it
                if mask.shape[2] == mask.shape[3]:
                    mask[row, :, column, column] = 0
        return (hidden, *args[1:]), {**kwargs, "attention_mask": mask}

    layers = model.model.language_model.layers[layer + 1 :]
    return [one.register_forward_pre_hook(hide, with_kwargs=True) for one in layers]


def dropped_columns(inputs: dict[str, Tensor], kept: list[Tensor]) -> dict[int, list[int]]:
    found: dict[int, list[int]] = {}
    pictures = iter(kept)
    for row, ids in enumerate(inputs["input_ids"]):
        columns = (ids == tiny.IMAGE).nonzero()[:, 0].split(tiny.TOKENS)
        gone = []
        for run in columns:
            if len(run):
                stay = set(next(pictures).tolist())
                gone += [int(c) for i, c in enumerate(run) if i not in stay]
        found[row] = gone
    return found


def padded_batch() -> dict[str, Tensor]:
    rows = (tiny.prompt(3, "image", 4, "image", 2, seed=1), tiny.prompt(2, "image", 6, seed=2))
    return {**tiny.batch(*rows), "pixel_values": tiny.pictures(3, seed=5)}


def greedy(model: Any, inputs: dict[str, Tensor], steps: int) -> list[Tensor]:
    """Logits of the last column at the prefill and at each step, through the KV cache."""
    mask = inputs["attention_mask"]
    out = model(**inputs, use_cache=True, position_ids=(mask.cumsum(1) - 1).clamp(min=0))
    found, cache = [out.logits[:, -1]], out.past_key_values
    position = mask.sum(1, keepdim=True)
    for _ in range(steps):
        mask = torch.cat([mask, torch.ones_like(mask[:, :1])], dim=1)
        out = model(
            input_ids=found[-1].argmax(-1, keepdim=True),
            attention_mask=mask,
            position_ids=position,
            past_key_values=cache,
        )
        position = position + 1
        found.append(out.logits[:, -1])
    return found


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("make", [tiny.one_image, padded_batch], ids=["one", "padded"])
def test_kept_positions_equal_masked_keys(make: Callable[..., Any], attention: str) -> None:
    model, inputs = tiny.tiny_llava(layers=5, attention=attention), make()
    with vistoken.attach(model, KeepLast(keep=9)) as held:
        pruned = greedy(model, inputs, 8)
        kept = held.report().kept
    oracle = tiny.tiny_llava(layers=5, attention="eager")
    hooks = masked(oracle, LAYER, dropped_columns(inputs, kept))
    expected = greedy(oracle, inputs, 8)
    for step, (a, b) in enumerate(zip(pruned, expected, strict=True)):
        assert torch.allclose(a, b, atol=1e-5), step
    for hook in hooks:
        hook.remove()
    bare = greedy(oracle, inputs, 8)
    assert not torch.allclose(bare[0], pruned[0], atol=1e-3)  # the mask matters


def test_the_rows_are_those_of_the_model() -> None:
    """Text and last rows, text to text and the gravity factor, against full attention maps."""
    model, inputs = tiny.tiny_llava(kv_heads=2, attention="eager"), padded_batch()
    Look.seen.clear()
    with vistoken.attach(model, Look(keep=9)):
        model(**inputs)
    (view,) = Look.seen
    full = model(**inputs, output_attentions=True, output_hidden_states=True)
    maps, hidden = full.attentions[LAYER], full.hidden_states[LAYER + 1]
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    cos, sin = model.model.language_model.rotary_emb(hidden, torch.arange(ids.shape[1])[None])
    half = cos.shape[-1] // 2
    ones = cos[0] + torch.cat([-sin[0][:, :half], sin[0][:, half:]], dim=1)
    number = 0
    for row in range(len(ids)):
        runs = (ids[row] == tiny.IMAGE).nonzero()[:, 0].split(tiny.TOKENS)
        text = torch.arange(int(runs[-1][-1]) + 1, ids.shape[1])
        for run in runs:
            rows = view.language
            wanted = rows.text_mask[number]
            assert int(wanted.sum()) == len(text)
            assert bool(wanted[-len(text) :].all())
            seen = rows.text_attention[number][:, wanted]
            assert torch.allclose(seen, maps[row][:, text][:, :, run], atol=1e-6)
            assert float(rows.text_attention[number][:, ~wanted].abs().sum()) == 0
            between = rows.text_to_text[number][:, wanted][:, :, wanted]
            assert torch.allclose(between, maps[row][:, text][:, :, text], atol=1e-6)
            assert torch.allclose(rows.last_attention[number], maps[row][:, -1, run], atol=1e-6)
            assert torch.allclose(view.hidden[number], hidden[row, run], atol=1e-5)
            gravity = ones[text] @ ones[run].T * 8**-0.5
            assert torch.allclose(rows.gravity[number][wanted], gravity, atol=1e-5)
            logits = rows.last_query[number, :, None] @ rows.keys[number].transpose(1, 2)
            share = maps[row][:, -1, run]
            inside = (logits[:, 0] * 8**-0.5).softmax(-1)
            assert torch.allclose(inside, share / share.sum(-1, keepdim=True), atol=1e-5)
            assert rows.values.shape == rows.keys.shape
            number += 1
    assert mask.shape == ids.shape


def test_layer_lengths_are_those_of_the_report_and_the_cache() -> None:
    model, inputs = tiny.tiny_llava(layers=5), padded_batch()
    with vistoken.attach(model, KeepLast(keep=9, twice=True)) as held:
        lengths: list[int] = []
        hooks = [
            layer.self_attn.register_forward_pre_hook(
                lambda module, args, kwargs: lengths.append(kwargs["hidden_states"].shape[1]),
                with_kwargs=True,
            )
            for layer in model.model.language_model.layers
        ]
        cache = model(**inputs, use_cache=True).past_key_values
        for hook in hooks:
            hook.remove()
        report = held.report()
    assert [cache.get_seq_length(layer) for layer in range(5)] == lengths
    assert report.layer_tokens == [108, 66, 27, 27, 27]
    assert report.tokens_out == [36, 36, 36]
    assert [len(kept) for kept in report.kept] == [9, 9, 9]
    bytes_held = sum(t.numel() * 4 for layer in cache.layers for t in (layer.keys, layer.values))
    assert report.kv_bytes == bytes_held < report.kv_bytes_dense


@pytest.mark.parametrize("twice", [False, True])
def test_a_batch_equals_its_rows(twice: bool) -> None:
    """Rows of unequal length behind a cut are padded anew, at the prefill and at every step."""
    model, inputs = tiny.tiny_llava(layers=5), padded_batch()
    more = {"max_new_tokens": 9, "do_sample": False}
    rows = (tiny.prompt(3, "image", 4, "image", 2, seed=1), tiny.prompt(2, "image", 6, seed=2))
    rows = (*rows, tiny.prompt(30, seed=3))
    inputs = {**tiny.batch(*rows), "pixel_values": inputs["pixel_values"]}
    with vistoken.attach(model, KeepLast(keep=9, twice=twice)) as held:
        batch = model.generate(**inputs, **more)
        kept = held.report().kept
        first = 0
        for number, row in enumerate(rows):
            count = row.count(tiny.IMAGE) // tiny.TOKENS
            one = tiny.batch(row)
            if count:
                one["pixel_values"] = inputs["pixel_values"][first : first + count]
            alone = model.generate(**one, **more)
            assert torch.equal(alone[0, len(row) :], batch[number, inputs["input_ids"].shape[1] :])
            for a, b in zip(held.report().kept, kept[first : first + count], strict=True):
                assert torch.equal(a, b)
            first += count


def test_beams_sampling_and_copies() -> None:
    model, inputs = tiny.tiny_llava(), padded_batch()
    with vistoken.attach(model, KeepLast(keep=9)):
        beams = model.generate(**inputs, max_new_tokens=5, num_beams=3, num_return_sequences=2)
        for row, count in ((0, 2), (1, 1)):
            start = 0 if row == 0 else 2
            ids = inputs["input_ids"][row][inputs["attention_mask"][row].bool()]
            one = {
                **tiny.batch(ids.tolist()),
                "pixel_values": inputs["pixel_values"][start : start + count],
            }
            alone = model.generate(**one, max_new_tokens=5, num_beams=3, num_return_sequences=2)
            assert torch.equal(alone[:, -5:], beams[2 * row : 2 * row + 2, -5:])
        torch.manual_seed(0)
        first = model.generate(**inputs, max_new_tokens=5, do_sample=True)
        torch.manual_seed(0)
        assert torch.equal(model.generate(**inputs, max_new_tokens=5, do_sample=True), first)


def test_renumbering_closes_the_gaps_at_every_step() -> None:
    """Against a hand-written loop over layers in which each has positions of its own."""
    model, inputs = tiny.tiny_llava(layers=4), tiny.one_image()
    with vistoken.attach(model, KeepLast(keep=9, positions="renumber")) as held:
        pruned = greedy(model, inputs, 4)
        kept = held.report().kept[0]
    language, head = model.model.language_model, model.lm_head
    ids = inputs["input_ids"]
    long = model.get_input_embeddings()(ids)
    run = (ids[0] == tiny.IMAGE).nonzero()[:, 0]
    features = model.get_image_features(inputs["pixel_values"], return_dict=True).pooler_output
    long[0, run] = features[0]
    gone = set(run.tolist()) - set(run[kept].tolist())
    stay = torch.tensor([c for c in range(ids.shape[1]) if c not in gone])
    sequence, found = long, []
    for step in range(5):
        hidden = sequence
        for number, layer in enumerate(language.layers):
            if number == LAYER + 1:
                tail = torch.arange(ids.shape[1], ids.shape[1] + step)
                hidden = hidden[:, torch.cat([stay, tail])]
            positions = torch.arange(hidden.shape[1])[None]
            rotary = language.rotary_emb(hidden, positions)
            hidden = layer(hidden, position_embeddings=rotary, attention_mask=None)
        found.append(head(language.norm(hidden))[:, -1])
        new = model.get_input_embeddings()(found[-1].argmax(-1, keepdim=True))
        sequence = torch.cat([sequence, new], dim=1)
    for a, b in zip(pruned, found, strict=True):
        assert torch.allclose(a, b, atol=1e-5)


def test_pruning_before_and_inside_compose() -> None:
    model, inputs = tiny.tiny_llava(), padded_batch()
    both = [vistoken.Uniform(keep=18, positions="original"), KeepLast(keep=5)]
    with vistoken.attach(model, both) as held:
        out = model.generate(**inputs, max_new_tokens=4, do_sample=False)
        report = held.report()
    assert report.layer_tokens == [54, 54, 15, 15]
    assert report.tokens_out == [18, 18, 18]
    uniform = vistoken.pruning.uniform.select(36, 18).tolist()
    assert all(set(kept.tolist()) <= set(uniform) for kept in report.kept)
    assert out.shape == (2, inputs["input_ids"].shape[1] + 4)


@dataclass(frozen=True, kw_only=True)
class HideAll(KeepLast):
    """Hides every visual token from every text token, and keeps them all."""

    @property
    def always(self) -> bool:
        return True

    def select(self, view: View, keep: int) -> Selection:
        every = torch.arange(view.tokens).expand(view.images, -1)
        mask = view.language.text_mask
        return Selection(every, hidden=torch.ones(*mask.shape, view.tokens, dtype=torch.bool))


def test_hidden_pairs_have_no_weight() -> None:
    model, inputs = tiny.tiny_llava(attention="eager"), padded_batch()
    with vistoken.attach(model, HideAll(keep=36)):
        maps = model(**inputs, output_attentions=True).attentions
    ids = inputs["input_ids"]
    for row in range(2):
        visual = ids[row] == tiny.IMAGE
        text = torch.arange(int(visual.nonzero()[-1]) + 1, ids.shape[1])
        assert float(maps[LAYER][row][:, text][:, :, visual].sum()) > 0
        assert float(maps[LAYER + 1][row][:, text][:, :, visual].sum()) == 0
        before = int(visual.nonzero()[0])
        assert float(maps[LAYER + 1][row][:, text][:, :, before - 1].sum()) > 0
    sdpa = tiny.tiny_llava()
    with vistoken.attach(model, HideAll(keep=36)), vistoken.attach(sdpa, HideAll(keep=36)):
        assert torch.allclose(
            model(**inputs).logits[:, -1], sdpa(**inputs).logits[:, -1], atol=1e-4
        )


def test_what_cannot_work_inside_the_llm_is_refused() -> None:
    from transformers import StaticCache

    model, inputs = tiny.tiny_llava(), tiny.one_image()
    dense = model(**inputs).logits
    with vistoken.attach(model, KeepLast(keep=9)):
        cache = StaticCache(config=model.config.text_config, max_cache_len=64)
        with pytest.raises(AttachError, match="StaticCache gives every layer one length"):
            model(**inputs, past_key_values=cache)
        with pytest.raises(AttachError, match="cache_implementation='static'"):
            model.generate(**inputs, max_new_tokens=2, cache_implementation="static")
        with pytest.raises(AttachError, match="labels cannot be matched"):
            model(**inputs, labels=inputs["input_ids"])
    model.train()
    model.gradient_checkpointing_enable()
    with (
        vistoken.attach(model, KeepLast(keep=9)),
        pytest.raises(AttachError, match="inside the LLM does not work with gradient check"),
    ):
        model(**inputs, use_cache=False)
    model.gradient_checkpointing_disable()
    assert torch.equal(model.eval()(**inputs).logits, dense)


def test_an_exception_inside_leaves_the_next_call_clean() -> None:
    model, inputs = tiny.tiny_llava(), tiny.one_image()
    text = tiny.batch(tiny.prompt(6, seed=4))
    dense_text = model(**text).logits
    with vistoken.attach(model, KeepLast(keep=9)):
        good = model(**inputs).logits

        def stop(*given: Any) -> None:
            raise KeyboardInterrupt

        hook = model.model.language_model.layers[2].register_forward_hook(stop)
        with pytest.raises(KeyboardInterrupt):
            model(**inputs)
        hook.remove()
        assert torch.equal(model(**text).logits, dense_text)
        assert torch.equal(model(**inputs).logits, good)
    with pytest.raises(MethodError, match="exactly one of ratio and keep"):
        KeepLast()
