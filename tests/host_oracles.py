"""What tests of hosts compare with: prompts shortened by hand, signals as a method sees them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import vistoken
from device_reads import Reads
from vistoken.adapters.vlm import PIPELINE
from vistoken.adapters.vlm_pipeline import Pipeline
from vistoken.adapters.vlm_tower import TowerCall, current_call
from vistoken.contract import Place, Selection, Signal, View
from vistoken.pruning import Pruner

NEW = 4
READ = (
    Signal.FEATURES,
    Signal.ENCODED,
    Signal.PROJECTOR,
    Signal.CLS_ATTENTION,
    Signal.VISION_QUERIES,
    Signal.VISION_KEYS,
    Signal.VISION_VALUES,
    Signal.IMAGE_KEY,
    Signal.SIZES,
)


@dataclass(frozen=True, kw_only=True)
class Spy(Pruner):
    """Keeps the first tokens, and remembers every signal it could read, for each group."""

    name: ClassVar[str] = "spy"
    paper: ClassVar[str] = "none"
    tag: ClassVar[str] = "experimental"
    places: ClassVar[frozenset[Place]] = frozenset({Place.PROJECTED})
    signals: ClassVar[frozenset[Signal]] = frozenset(READ)
    seen: ClassVar[list[dict[Any, Any]]] = []

    def select(self, view: View, keep: int) -> Selection:
        self.seen.append({"view": view, **{signal: view.read(signal) for signal in READ}})
        return Selection(torch.arange(keep).expand(view.images, -1))


def spied(model: Any, inputs: dict[str, Tensor], keep: int) -> list[dict[Any, Any]]:
    """The signals of a forward call, for each group of equal pictures."""
    Spy.seen.clear()
    with vistoken.attach(model, Spy(keep=keep)), torch.no_grad():
        model(**inputs)
    return list(Spy.seen)


def by_hand(
    model: Any,
    inputs: dict[str, Tensor],
    features: dict[int, Iterable[Tensor]],
    kept: dict[int, Iterable[Tensor]],
) -> list[dict[str, Tensor]]:
    """For each row, unpadded, embeddings, positions and columns of what stays; plain loops.

    features: for each placeholder id the features [n, C] of its pictures in reading order,
    separators included; kept: the indices of those that stay.
    """
    waiting = {token: iter(found) for token, found in features.items()}
    staying = {token: iter(found) for token, found in kept.items()}
    embed = model.get_input_embeddings()
    rows = []
    for ids, mask in zip(inputs["input_ids"], inputs["attention_mask"], strict=True):
        embeds, positions, columns = [], [], []
        own: Tensor = torch.empty(0)
        seen, stay = 0, set[int]()
        first = int((mask == 0).sum())
        for position, token in enumerate(ids[mask.bool()].tolist()):
            if token not in features:
                embeds.append(embed(torch.tensor(token)))
            else:
                if seen == len(own):
                    own, seen = next(waiting[token]), 0
                    stay = set(next(staying[token]).tolist())
                seen += 1
                if seen - 1 not in stay:
                    continue
                embeds.append(own[seen - 1])
            positions.append(position)
            columns.append(first + position)
        row = {"inputs_embeds": torch.stack(embeds)[None]}
        row["position_ids"] = torch.tensor(positions)[None]
        row["columns"] = torch.tensor(columns)
        rows.append(row)
    assert not any(list(rest) for rest in waiting.values())
    return rows


def generate_by_hand(model: Any, row: dict[str, Tensor], *, original: bool, **more: Any) -> Tensor:
    """What the bare model generates from a prompt shortened by hand."""
    embeds = row["inputs_embeds"]
    mask = torch.ones(embeds.shape[:2], dtype=torch.long)
    if original:
        more["position_ids"] = row["position_ids"]
    found = model.generate(inputs_embeds=embeds, attention_mask=mask, do_sample=False, **more)
    return found[0, -more["max_new_tokens"] :]


def check_routes(
    model: Any,
    make: Callable[[], dict[str, Tensor]],
    features: Callable[[Any, dict[str, Tensor]], dict[int, list[Tensor]]],
    kept_of: Callable[[dict[str, Tensor], list[Tensor]], dict[int, list[Tensor]]],
    method: Pruner,
    *,
    beams: int = 0,
) -> None:
    """Logits, and greedy tokens or beams, with `method` are those of the prompt cut by hand."""
    inputs, original = make(), method.positions == "original"
    more = {"max_new_tokens": NEW, **({"num_beams": beams} if beams else {})}
    single = len(inputs["input_ids"]) == 1
    with vistoken.attach(model, method) as held, torch.no_grad():
        logits = model(**inputs).logits if single else None
        tokens = model.generate(**inputs, do_sample=False, **more)
        kept = held.report().kept
    assert torch.equal(tokens[:, :-NEW], inputs["input_ids"])
    with torch.no_grad():
        rows = by_hand(model, inputs, features(model, inputs), kept_of(inputs, kept))
        for number, row in enumerate(rows):
            wanted = generate_by_hand(model, row, original=original, **more)
            assert torch.equal(tokens[number, -NEW:], wanted), number
        if logits is not None:
            (row,) = rows
            mask = torch.ones(row["inputs_embeds"].shape[:2], dtype=torch.long)
            place = {"position_ids": row["position_ids"]} if original else {}
            plain = model(inputs_embeds=row["inputs_embeds"], attention_mask=mask, **place).logits
            assert torch.allclose(logits, plain, atol=1e-5)


def check_masked_keys(
    model: Any,
    oracle: Any,
    inputs: dict[str, Tensor],
    by_mark: Callable[[dict[str, Tensor], list[Any]], dict[int, list[Any]]],
    method: Pruner,
) -> None:
    """Pruning behind LLM layer 1 is hiding the keys that were dropped from all later layers.

    oracle: the same model in eager attention; by_mark: what belongs to the pictures, in encoding
    order, by their placeholder's id. Prefill and 8 steps of decoding.
    """
    from test_language import LAYER, greedy, masked

    with vistoken.attach(model, method) as held, torch.no_grad():
        pruned = greedy(model, inputs, 8)
        report = held.report()
    known = list(zip(report.tokens_in, report.kept, strict=True))
    dropped: dict[int, list[int]] = {row: [] for row in range(len(inputs["input_ids"]))}
    for mark, pictures in by_mark(inputs, known).items():
        columns = (inputs["input_ids"] == mark).nonzero().tolist()
        for total, kept in pictures:
            run, columns = columns[:total], columns[total:]
            stay = set(kept.tolist())
            for number, (row, column) in enumerate(run):
                if number not in stay:
                    dropped[row].append(column)
        assert not columns
    assert sum(map(len, dropped.values())) == sum(report.tokens_in) - sum(map(len, report.kept))
    with torch.no_grad():
        bare = greedy(oracle, inputs, 0)
        hooks = masked(oracle, LAYER, dropped)
        expected = greedy(oracle, inputs, 8)
    for hook in hooks:
        hook.remove()
    for step, (a, b) in enumerate(zip(pruned, expected, strict=True)):
        assert torch.allclose(a, b, atol=1e-5), step
    assert not torch.allclose(bare[0], pruned[0], atol=1e-3)  # the mask matters


def check_calls(model: Any, inputs: dict[str, Tensor], method: Pruner) -> None:
    """Caches, sampling, `inputs_embeds` and a budget that keeps everything; exact undo."""
    more = {"max_new_tokens": NEW, "do_sample": False}
    given = {k: v for k, v in inputs.items() if k != "input_ids"}
    with torch.no_grad():
        dense = model(**inputs).logits
        with vistoken.attach(model, method):
            greedy = model.generate(**inputs, **more)
            static = model.generate(**inputs, **more, cache_implementation="static")
            assert torch.equal(static, greedy)
            embeds = model.get_input_embeddings()(inputs["input_ids"])
            from_embeds = model.generate(**given, inputs_embeds=embeds, **more)
            assert torch.equal(from_embeds, greedy[:, -NEW:])
            short = model(**inputs).logits
            last = model(**given, inputs_embeds=embeds).logits[:, -1]  # padding has other logits
            assert torch.allclose(last, short[:, -1], atol=1e-6)
            samples = []
            for _ in range(2):
                torch.manual_seed(3)
                samples.append(model.generate(**inputs, max_new_tokens=NEW, do_sample=True))
            assert torch.equal(*samples)
            text = {
                "input_ids": torch.tensor([[1, 8, 9]]),
                "attention_mask": torch.ones(1, 3).long(),
            }
            words = model(**text).logits
        assert short.shape[1] < dense.shape[1]
        assert torch.equal(words, model(**text).logits)
        for neutral in (vistoken.Uniform(keep=10_000), vistoken.Uniform(ratio=0.0)):
            with vistoken.attach(model, neutral) as held:
                assert torch.equal(model(**inputs).logits, dense)
                assert held.report().flops == held.report().flops_dense
        assert torch.equal(model(**inputs).logits, dense)


def check_numbers(model: Any, inputs: dict[str, Tensor], keep: int) -> Any:
    """FLOPs within 2 % of a counted run, KV bytes those of the cache; returns the report."""

    def counted() -> tuple[int, int]:
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            cache = model(**inputs, logits_to_keep=1, use_cache=True).past_key_values
        held = sum(
            part.numel() * part.element_size()
            for layer in cache.layers
            for part in (layer.keys, layer.values)
        )
        return counter.get_total_flops(), held

    dense, dense_bytes = counted()
    with vistoken.attach(model, vistoken.Uniform(keep=keep)) as held:
        pruned, pruned_bytes = counted()
        report = held.report()
    assert abs(report.flops_dense / dense - 1) < 0.02
    assert abs(report.flops / pruned - 1) < 0.02
    assert report.flops < report.flops_dense
    assert (report.kv_bytes_dense, report.kv_bytes) == (dense_bytes, pruned_bytes)
    return report


def check_never_waits(model: Any, inputs: dict[str, Tensor]) -> None:
    """Between reading the prompt and the LLM nothing waits for the device."""
    with vistoken.attach(model, Spy(keep=12)), torch.no_grad():
        model(**inputs)  # geometry is planned on the CPU once
        pipeline: Pipeline = model.__dict__[PIPELINE]
        vision = pipeline.vision_of(inputs)
        ids, mask = inputs["input_ids"], inputs["attention_mask"]
        long = pipeline.read(ids, None, mask, None, vision)
        host, entries = pipeline.host, pipeline.entries
        call = TowerCall(host, entries, long.pictures, vision, (None,))
        with Reads() as reads:
            with current_call(call):
                host.encode(call)
            for signal in (Signal.CLS_ATTENTION, Signal.ENCODED, Signal.VISION_KEYS):
                host.tower_signal(call, signal, host.facts.feature_layer)
            host.image_keys(vision)
        assert reads.count == 0
