"""The contract: every signal a host offers is what it says, and a new method is one file."""

from __future__ import annotations

import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
import torch

import tiny
import vistoken
import vistoken.pruning
from vistoken.adapters.llava import LlavaHost
from vistoken.contract import Place, Selection, Signal, Stage, View
from vistoken.errors import AttachError, MethodError
from vistoken.pruning import Pruner

pytest.importorskip("transformers")

FLOWCUT_LIKE = '''
"""A method dropped into the folder: prunes in two steps inside the vision tower."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from vistoken.contract import Place, Selection, Signal, Stage
from vistoken.pruning import Pruner, top_indices


@dataclass(frozen=True, kw_only=True)
class TwoSteps(Pruner):
    """Drops half of the surplus after layer 0 and the rest after layer 1, by an average score."""

    name: ClassVar[str] = "two_steps"
    paper: ClassVar[str] = "none"
    tag: ClassVar[str] = "experimental"
    places: ClassVar = frozenset({Place.VISION_LAYER})
    signals: ClassVar = frozenset({Signal.CLS_ATTENTION, Signal.VISION_VALUES})

    def stages(self, facts):
        return tuple(Stage(Place.VISION_LAYER, layer, self.signals) for layer in (0, 1))

    def select(self, view, keep):
        values = view.read(Signal.VISION_VALUES)[:, :, view.facts.prefix_tokens :]
        score = view.cls_attention * values.float().mean(1).abs().sum(-1)
        if "history" in view.memory:
            score = (score + view.memory["history"]) / 2
        target = (view.tokens + keep) // 2 if view.stage.layer == 0 else keep
        chosen = top_indices(score, target)
        view.memory["history"] = score.gather(1, chosen)
        return Selection(chosen)
'''


@pytest.fixture()
def two_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The method above as a file of the pruning package."""
    (tmp_path / "two_steps.py").write_text(textwrap.dedent(FLOWCUT_LIKE))
    monkeypatch.setattr(vistoken.pruning, "__path__", [*vistoken.pruning.__path__, str(tmp_path)])
    yield "two_steps"
    sys.modules.pop("vistoken.pruning.two_steps", None)


def test_one_file_adds_a_method(two_steps: str) -> None:
    row = next(row for row in vistoken.list_methods("pruning") if row.name == two_steps)
    assert "llava" in row.hosts and "qwen2_5_vl" not in row.hosts
    model = tiny.tiny_llava(vision_layers=5)
    inputs = tiny.one_image()
    dense = model(**inputs).logits
    with vistoken.prune_visual_tokens(model, keep=9, method=two_steps) as held:
        logits = model(**inputs).logits
        report = held.report()
    assert torch.equal(model(**inputs).logits, dense)
    assert logits.shape[1] == dense.shape[1] - tiny.TOKENS + 9
    assert report.flops < report.flops_dense
    assert len(report.kept[0]) == 9


def test_stages_inside_the_tower_equal_a_slow_run(two_steps: str) -> None:
    """Runs the tower layer by layer in eager mode and drops tokens by hand."""
    model = tiny.tiny_llava(vision_layers=5)
    inputs = {**tiny.batch(tiny.prompt(3, "image", "image", 2)), "pixel_values": tiny.pictures(2)}
    with vistoken.prune_visual_tokens(model, keep=9, method=two_steps) as held:
        logits = model(**inputs).logits
        kept = held.report().kept

    tower = model.model.vision_tower
    features = []
    for image in range(2):
        hidden = tower.pre_layrnorm(tower.embeddings(inputs["pixel_values"][image : image + 1]))
        origin, history = list(range(tiny.TOKENS)), None
        for number, layer in enumerate(tower.encoder.layers[:-1]):
            normed = layer.layer_norm1(hidden)[0]
            score = []
            heads, width = layer.self_attn.num_heads, layer.self_attn.head_dim
            query = layer.self_attn.q_proj(normed).view(-1, heads, width)
            key = layer.self_attn.k_proj(normed).view(-1, heads, width)
            value = layer.self_attn.v_proj(normed).view(-1, heads, width)
            rows = torch.stack(
                [(key[:, h] @ query[0, h] * width**-0.5).softmax(0) for h in range(heads)]
            ).mean(0)
            for token in range(1, len(normed)):
                weight = value[token].mean(0).abs().sum()
                score.append((rows[token] * weight).item())
            hidden = layer(hidden, None)
            if number > 1:
                continue
            if history is not None:
                score = [(a + b) / 2 for a, b in zip(score, history, strict=True)]
            target = (len(score) + 9) // 2 if number == 0 else 9
            order = sorted(range(len(score)), key=lambda i, s=score: -s[i])[:target]
            order.sort()
            history = [score[i] for i in order]
            origin = [origin[i] for i in order]
            hidden = torch.cat([hidden[:, :1], hidden[:, 1:][:, order]], dim=1)
        assert origin == kept[image].tolist()
        features.append(model.model.multi_modal_projector(hidden[0, 1:]))

    embed = model.get_input_embeddings()
    ids = inputs["input_ids"][0]
    short = torch.cat([embed(ids[:4]), features[0], features[1], embed(ids[-2:])])
    expected = model(inputs_embeds=short[None]).logits
    assert torch.allclose(logits, expected, atol=1e-5)


class _Look(Pruner):
    """Reads every signal and keeps what it saw in a list."""

    name = "look"
    paper = "none"
    tag = "experimental"
    signals = frozenset(
        {
            Signal.FEATURES,
            Signal.ENCODED,
            Signal.PROJECTOR,
            Signal.CLS_ATTENTION,
            Signal.VISION_QUERIES,
            Signal.VISION_KEYS,
            Signal.VISION_VALUES,
            Signal.IMAGE_KEY,
            Signal.SIZES,
            Signal.TEXT_EMBEDDINGS,
        }
    )
    seen: list[dict[Signal, Any]] = []

    def select(self, view: View, keep: int) -> Selection:
        type(self).seen.append({signal: view.read(signal) for signal in self.signals})
        with pytest.raises(KeyError, match="did not ask"):
            view.read(Signal.LLM_ATTENTION)
        return Selection(torch.arange(keep).expand(view.images, keep))


@pytest.mark.parametrize("feature_layer", [-2, -1, 2, [1, -2]])
def test_signals_are_what_they_say(feature_layer: int | list[int]) -> None:
    model = tiny.tiny_llava(feature_layer=feature_layer)
    pixels = tiny.pictures(2, seed=3)
    inputs = {**tiny.batch(tiny.prompt("image", 3, "image")), "pixel_values": pixels}
    _Look.seen.clear()
    inside = {Signal.HIDDEN, Signal.LLM_ATTENTION}  # these have tests of their own
    assert _Look.signals | inside == LlavaHost.signals, "test every signal the host offers"
    with vistoken.attach(model, _Look(keep=4)):
        model(**inputs)
    (seen,) = _Look.seen

    last = feature_layer if isinstance(feature_layer, int) else feature_layer[-1]
    layer = (last % 5) - 1
    model.model.vision_tower.set_attn_implementation("eager")
    tower = model.model.vision_tower(pixels, output_attentions=True, output_hidden_states=True)
    row = tower.attentions[layer][:, :, 0, 1:].mean(1)
    assert torch.allclose(seen[Signal.CLS_ATTENTION], row, atol=1e-5)
    assert seen[Signal.CLS_ATTENTION].dtype == torch.float32
    features = model.get_image_features(pixels, return_dict=True).pooler_output
    assert torch.allclose(seen[Signal.FEATURES], torch.stack(list(features)), atol=1e-5)
    projected = seen[Signal.PROJECTOR](seen[Signal.ENCODED])
    assert torch.allclose(projected, seen[Signal.FEATURES], atol=1e-6)
    attention = model.model.vision_tower.encoder.layers[layer].self_attn
    normed = model.model.vision_tower.encoder.layers[layer].layer_norm1(tower.hidden_states[layer])
    for signal, name in (
        (Signal.VISION_QUERIES, "q_proj"),
        (Signal.VISION_KEYS, "k_proj"),
        (Signal.VISION_VALUES, "v_proj"),
    ):
        flat = getattr(attention, name)(normed)
        expected = flat.view(2, -1, 4, 8).permute(0, 2, 1, 3)[:, :, 1:]  # no CLS token here
        assert torch.allclose(seen[signal], expected, atol=1e-5), name
    keys = seen[Signal.IMAGE_KEY]
    assert keys.dtype == torch.int64 and keys.shape == (2,) and keys[0] != keys[1]
    assert torch.cat(list(seen[Signal.SIZES])).tolist() == [1.0] * 2 * tiny.TOKENS
    text = seen[Signal.TEXT_EMBEDDINGS]  # nothing follows the second picture: all text of the row
    words = torch.tensor([1, *inputs["input_ids"][0, 37:40].tolist()])
    assert torch.equal(text.embeddings, model.get_input_embeddings()(words).expand(2, -1, -1))
    assert bool(text.mask.all())


def test_half_precision_models_read_the_row_in_fp32() -> None:
    model = tiny.tiny_llava().to(torch.bfloat16)
    inputs = tiny.one_image()
    _Look.seen.clear()
    with vistoken.attach(model, _Look(keep=4)):
        model(**inputs)
        half = _Look.seen[-1][Signal.CLS_ATTENTION]
    assert half.dtype == torch.float32
    with vistoken.attach(model.float(), _Look(keep=4)):
        model(**inputs)
    full = _Look.seen[-1][Signal.CLS_ATTENTION]
    assert torch.allclose(half, full, atol=0.02) and not torch.equal(half, full)


class _Needs(Pruner):
    name = "needs"
    paper = "none"
    tag = "experimental"
    stage: Stage = Stage(Place.PROJECTED)

    def stages(self, facts: Any) -> tuple[Stage, ...]:
        return (type(self).stage,)

    def select(self, view: View, keep: int) -> Selection:
        raise AssertionError("must not be reached")


@pytest.mark.parametrize(
    ("stage", "words"),
    [
        (Stage(Place.OUTPUT_LOGITS), "output logits"),
        (Stage(Place.LLM_LAYER, 3), "layers 0 to 2 can be"),
        (Stage(Place.LLM_LAYER, -1), "LLM layer -1"),
        (Stage(Place.VISION_LAYER, 3), "layers 0 to 1"),
        (Stage(Place.VISION_LAYER, -1), "vision layer -1"),
    ],
)
def test_what_a_host_lacks_is_named_before_any_edit(stage: Stage, words: str) -> None:
    model = tiny.tiny_llava()
    before = {name: dict(module.__dict__) for name, module in model.named_modules()}
    _Needs.stage = stage
    with pytest.raises(AttachError, match=words):
        vistoken.attach(model, _Needs(keep=4))
    after = {name: dict(module.__dict__) for name, module in model.named_modules()}
    assert before == after


def test_a_pruner_in_the_tower_composes_with_one_after_it(two_steps: str) -> None:
    model = tiny.tiny_llava(vision_layers=5)
    inputs = tiny.one_image()
    dense = model(**inputs).logits
    outer = vistoken.prune_visual_tokens(model, keep=16, method=two_steps)
    first = model(**inputs) and outer.report().kept[0]
    inner = vistoken.prune_visual_tokens(model, keep=5, method="cls_topk")
    both = model(**inputs) and inner.report().kept[0]
    assert len(first) == 16 and len(both) == 5
    assert set(both.tolist()) <= set(first.tolist())
    with pytest.raises(AttachError, match="newer attachment first: cls_topk"):
        outer.detach()
    inner.detach()
    assert torch.equal(model(**inputs) and outer.report().kept[0], first)
    outer.detach()
    assert torch.equal(model(**inputs).logits, dense)
    together = [vistoken.method_class(two_steps)(keep=16), vistoken.ClsTopK(keep=5)]
    with vistoken.attach(model, together) as held:
        model(**inputs)
        assert torch.equal(held.report().kept[0], both)


def test_checkpointing_with_a_stage_in_the_tower_is_refused(two_steps: str) -> None:
    model = tiny.tiny_llava(vision_layers=5).train()
    model.gradient_checkpointing_enable()
    inputs = tiny.one_image()
    with (
        vistoken.prune_visual_tokens(model, keep=9, method=two_steps),
        pytest.raises(AttachError, match="checkpointing"),
    ):
        model(**inputs, use_cache=False)


def test_an_outside_method_joins_by_entry_point(monkeypatch: pytest.MonkeyPatch) -> None:
    class Point:
        name = "look"

        def load(self) -> type:
            return _Look

    from vistoken import registry

    points = {"vistoken.methods": {"look": Point()}, "vistoken.hosts": {}}
    monkeypatch.setattr(registry, "_outside", points.get)
    assert "look" in [row.name for row in vistoken.list_methods("pruning")]
    assert vistoken.method_class("look") is _Look


def test_a_file_that_defines_no_method_is_named(tmp_path: Path, monkeypatch: Any) -> None:
    (tmp_path / "empty_one.py").write_text("")
    monkeypatch.setattr(vistoken.pruning, "__path__", [str(tmp_path)])
    with pytest.raises(MethodError, match="must define one Method named 'empty_one'"):
        vistoken.method_class("empty_one")
