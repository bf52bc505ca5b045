"""What both Qwen-VL hosts must let methods read; the two test files run it on their family."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch

import tiny_qwen as tiny
import vistoken
from qwen_oracle import Family, recorded_attention, shown
from vistoken.contract import ModelFacts, Place, Selection, Signal, Stage, View
from vistoken.pruning._pruner import Pruner
from vistoken.registry import recognise

TOWER = frozenset(
    {
        Signal.FEATURES,
        Signal.ENCODED,
        Signal.PROJECTOR,
        Signal.CLS_ATTENTION,
        Signal.VISION_QUERIES,
        Signal.VISION_KEYS,
        Signal.VISION_VALUES,
        Signal.SIZES,
        Signal.IMAGE_KEY,
    }
)
SEEN: list[tuple[View, dict[Signal, Any]]] = []


@dataclass(frozen=True, kw_only=True)
class Spy(Pruner):
    """Notes every signal, and keeps the first tokens."""

    name: ClassVar[str] = "spy"
    signals: ClassVar[frozenset[Signal]] = TOWER
    layer: int | None = None

    def stages(self, facts: ModelFacts) -> tuple[Stage, ...]:
        return (Stage(Place.PROJECTED, self.layer, TOWER),)

    def select(self, view: View, keep: int) -> Selection:
        SEEN.append((view, {signal: view.read(signal) for signal in TOWER}))
        return Selection(torch.arange(keep).expand(view.images, -1))


def mixed(family: Family) -> tuple[dict[str, Any], int]:
    """A padded batch: a video before an image, an image, no picture; and how many pictures."""
    sizes, clip = [(5, 6), (4, 7)], (3, 4, 4)
    rows = [
        tiny.prompt(3, clip, 2, sizes[0], 4, split=family.split, seed=4),
        tiny.prompt(2, sizes[1], 3, seed=5),
        tiny.prompt(6, seed=6),
    ]
    inputs = {**tiny.batch(*rows), **tiny.images(*sizes, seed=7), **tiny.videos(clip)}
    return inputs, 2 + (clip[0] if family.split else 1)


class SignalTests:
    """The signals of the tower, for images and videos in one call."""

    family: ClassVar[Family]

    @pytest.fixture()
    def model(self) -> Any:
        return self.family.build()

    def spied(self, model: Any, inputs: dict[str, Any], layer: int | None = None) -> list[Any]:
        """For each picture, in encoding order, its grid and its signals."""
        SEEN.clear()
        with vistoken.attach(model, Spy(keep=4, layer=layer)) as held, torch.no_grad():
            model(**inputs)
            count = len(held.report().kept)
        found: list[Any] = [None] * count
        keys = recognise(model).image_keys(dict(inputs)).tolist()
        for view, signals in SEEN:
            for row, key in enumerate(signals[Signal.IMAGE_KEY].tolist()):
                own = {s: v if s is Signal.PROJECTOR else v[row] for s, v in signals.items()}
                found[keys.index(key)] = (view.picture, own)
        return found

    def test_encoder_features_through_the_projector_are_the_features(self, model: Any) -> None:
        inputs, count = mixed(self.family)
        wanted = [
            *shown(model, self.family, inputs, "image"),
            *shown(model, self.family, inputs, "video"),
        ]
        found = self.spied(model, inputs)
        assert len(found) == len(wanted) == count
        for (picture, signals), one in zip(found, wanted, strict=True):
            assert [part.grid for part in picture.parts] == [one.grid[1:]] * one.grid[0]
            assert torch.equal(signals[Signal.FEATURES], one.features)
            projector = signals[Signal.PROJECTOR]
            projected = projector(signals[Signal.ENCODED][None])
            assert torch.allclose(projected[0], one.features, atol=1e-5)
            assert set(projector.parameters()) <= set(model.parameters())
            assert torch.equal(signals[Signal.SIZES], torch.ones(len(one.features)))

    @pytest.mark.parametrize("layer", [None, 0, 1, 2])
    def test_attention_signals_equal_a_slow_eager_run(self, model: Any, layer: int | None) -> None:
        inputs, _ = mixed(self.family)
        found = self.spied(model, inputs, layer)
        wanted: list[dict[str, torch.Tensor]] = []
        for kind in ("image", "video"):
            with recorded_attention(model) as recorded:
                pictures = shown(model, self.family, inputs, kind)
            chunks = recorded[3 if layer is None else layer]
            grids = [one.grid for one in pictures]
            wanted += self.by_picture(model, grids, chunks)
        names = {
            Signal.CLS_ATTENTION: "received",
            Signal.VISION_QUERIES: "query",
            Signal.VISION_KEYS: "key",
            Signal.VISION_VALUES: "value",
        }
        for (picture, signals), own in zip(found, wanted, strict=True):
            # a frame's patches share all of its attention; a token has their mean
            total = float(signals[Signal.CLS_ATTENTION].sum())
            assert total == pytest.approx(len(picture.parts) / tiny.MERGE**2, abs=1e-5)
            for signal, name in names.items():
                assert signals[signal].shape == own[name].shape
                assert torch.allclose(signals[signal], own[name], atol=1e-5), signal

    def by_picture(
        self, model: Any, grids: list[tuple[int, int, int]], chunks: list[Any]
    ) -> list[dict[str, torch.Tensor]]:
        """Signals of each picture, in raster order, from the segments that the tower ran."""
        sizes = [h * w * tiny.MERGE**2 for t, h, w in grids for _ in range(t)]
        received, heads, frame, filled = [], [], 0, 0
        for weights, *parts in chunks:
            received.append(weights.mean(0).sum(0) / sizes[frame])
            heads.append(parts)
            filled += weights.shape[-1]
            if filled == sizes[frame]:
                frame, filled = frame + 1, 0
        order = self.tower_order(model, grids)
        result: dict[str, torch.Tensor] = {}
        flat = {"received": torch.cat(received)}
        for number, name in enumerate(("query", "key", "value")):
            flat[name] = torch.cat([parts[number] for parts in heads], dim=1).transpose(0, 1)
        for name, values in flat.items():
            tokens = values.unflatten(0, (-1, tiny.MERGE**2)).mean(1)
            result[name] = torch.empty_like(tokens)
            result[name][order] = tokens
        found, first = [], 0
        for t, h, w in grids:
            own = {name: values[first : first + t * h * w] for name, values in result.items()}
            for name in ("query", "key", "value"):
                own[name] = own[name].transpose(0, 1)
            found.append(own)
            first += t * h * w
        return found

    def tower_order(self, model: Any, grids: list[tuple[int, int, int]]) -> torch.Tensor:
        """For each place in the tower's sequence of tokens the raster index there."""
        return torch.arange(sum(t * h * w for t, h, w in grids))
