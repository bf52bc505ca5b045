"""Methods that act after the projector, attached to a model, against its parts run by hand."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import llava_oracles as hand
import tiny
import vistoken
from vistoken.pruning import Pruner
from vistoken.pruning._sensitivity import seeded_directions
from vistoken.pruning.divprune import DivPrune
from vistoken.pruning.spread import Spread
from vistoken.pruning.visionzip import VisionZip
from vistoken.pruning.zeroth_order import ZerothOrder

KEEP = 11


@pytest.fixture(autouse=True)
def no_graph() -> Iterator[None]:
    with torch.no_grad():
        yield


# --- the bare model's parts ----------------------------------------------------------------------


@dataclass
class Seen:
    """What a method may see of one picture, for its 36 tokens.

    attention [36]: the CLS row, head mean. keys [36, D], head mean. encoded: what the projector
    reads. features: what it gives.
    """

    attention: Tensor
    keys: Tensor
    encoded: Tensor
    features: Tensor
    projector: Any


def look(model: Any, inputs: dict[str, Tensor], chosen: int = -2) -> list[Seen]:
    """Run the bare tower in eager attention and note what belongs to the layer of the features."""
    bare = copy.deepcopy(model.model)
    bare.vision_tower.set_attn_implementation("eager")
    layer = chosen % 5 - 1
    out = bare.vision_tower(
        inputs["pixel_values"], output_attentions=True, output_hidden_states=True
    )
    module = bare.vision_tower.encoder.layers[layer]
    normed = module.layer_norm1(out.hidden_states[layer])
    keys = module.self_attn.k_proj(normed).unflatten(-1, (4, 8)).mean(2)
    rows = out.attentions[layer][:, :, 0, 1:].mean(1)
    encoded = out.hidden_states[layer + 1][:, 1:]
    projector = bare.multi_modal_projector
    parts = zip(rows, keys[:, 1:], encoded, projector(encoded), strict=True)
    return [Seen(*part, projector) for part in parts]


Picks = tuple[list[int], Tensor]  # which tokens stay, and their embeddings in the LLM


def check(method: Pruner, attention: str, make: Any, by_hand: Callable[[Seen], Picks]) -> None:
    """Kept tokens and logits of prefill and decoding equal a run by hand; so does the embeds route.

    Without merged tokens the route's logits are the same to the last bit.
    """
    model, inputs = hand.tiny_llava(attention=attention), make()
    found, kept = hand.pruned(model, inputs, method)
    picks = [by_hand(seen) for seen in look(model, inputs)]
    assert kept == [stay for stay, _ in picks]
    by_row, renumber = [], method.positions != "original"
    for row in hand.rows_of(inputs):
        own = slice(row.first, row.first + len(row.pictures))
        left, tokens = (list(part) for part in zip(*picks[own], strict=True))
        by_row.append(hand.greedy_by_hand(model, row, tokens, left=left, renumber=renumber))
    hand.assert_rows(found, by_row)

    with vistoken.attach(model, method):
        logits = [model(**one).logits for one in hand.singles(inputs)]
    for row, one, pruned in zip(hand.rows_of(inputs), hand.singles(inputs), logits, strict=True):
        own = slice(row.first, row.first + len(row.pictures))
        left, tokens = (list(part) for part in zip(*picks[own], strict=True))
        merged = isinstance(method, VisionZip)
        if not merged:
            features = hand.features(model, one)
            tokens = [each[stay] for each, stay in zip(features, left, strict=True)]
        embeds, columns = hand.short_prompt(model, row, tokens, left)
        mask = torch.ones(1, len(columns), dtype=torch.long)
        place = {} if renumber else {"position_ids": torch.tensor([columns])}
        route = model(inputs_embeds=embeds[None], attention_mask=mask, **place).logits
        assert torch.allclose(pruned, route, atol=1e-5)
        assert merged or torch.equal(pruned, route)


calls = pytest.mark.parametrize(
    ("make", "attention"), [(hand.one_row, "eager"), (hand.padded_batch, "sdpa")]
)
places = pytest.mark.parametrize("positions", ["auto", "original"])


def distances(features: Tensor) -> Tensor:
    """1 - cosine of every two tokens [N, N], in fp64."""
    unit = F.normalize(features.double(), dim=-1)
    return 1 - unit @ unit.T


def greedy(first: int, gain: Callable[[int, list[int]], float], count: int) -> list[int]:
    """Take `first`, then always the token of the largest gain; ties go to the lower index."""
    picks = [first]
    while len(picks) < count:
        rest = [i for i in range(tiny.TOKENS) if i not in picks]
        picks.append(max(rest, key=lambda i: (gain(i, picks), -i)))
    return sorted(picks)


# --- VisionZip -----------------------------------------------------------------------------------


def zipped(seen: Seen, mode: str, contextual: int) -> Picks:
    dominant = hand.best(seen.attention, KEEP - contextual)
    rest = [i for i in range(tiny.TOKENS) if i not in dominant]
    step = len(rest) // contextual
    anchors = rest[: step * contextual : step]
    joined: dict[int, list[int]] = {anchor: [] for anchor in anchors}
    for i in rest:
        if i not in anchors:
            alike = F.cosine_similarity(seen.keys[i].double()[None], seen.keys[anchors].double())
            joined[anchors[int(alike.argmax())]].append(i)
    assert sum(map(len, joined.values())) == tiny.TOKENS - KEEP
    tokens = {i: seen.features[i] for i in dominant}
    for anchor, members in joined.items():
        own = seen.encoded[anchor]
        if members and mode == "released":
            own = own + seen.encoded[members].mean(0)
        elif members:
            own = seen.encoded[[anchor, *members]].mean(0)
        tokens[anchor] = seen.projector(own)
    stay = sorted(tokens)
    return stay, torch.stack([tokens[i] for i in stay])


@calls
@places
@pytest.mark.parametrize(
    ("mode", "contextual", "count"),
    [("mean", 10 / 64, 2), ("mean", 0.999, 11), ("released", 5, 5)],
)
def test_visionzip(
    mode: str, contextual: float, count: int, positions: str, make: Any, attention: str
) -> None:
    method = VisionZip(keep=KEEP, mode=mode, contextual=contextual, positions=positions)
    check(method, attention, make, lambda seen: zipped(seen, mode, count))


# --- zeroth_order --------------------------------------------------------------------------------


def slopes(seen: Seen) -> Tensor:
    """The projector's Jacobian [36, C, E] at every token, by automatic differentiation."""
    return torch.func.vmap(torch.func.jacrev(seen.projector))(seen.encoded)


def responses(seen: Seen, mode: str, directions: int, step: float) -> list[float]:
    if mode == "exact":
        width = seen.encoded.shape[-1]
        return [math.sqrt(float(one.double().square().sum()) / width) for one in slopes(seen)]
    bank = seeded_directions(3, directions, seen.encoded.shape[-1], torch.device("cpu"))
    assert torch.allclose(bank.norm(dim=-1), torch.ones(directions), atol=1e-6)
    if mode == "jvp":
        return [float((one @ bank.T).double().norm(dim=0).mean()) for one in slopes(seen)]
    found = []
    for token in seen.encoded:
        change = seen.projector(token + step * bank) - seen.projector(token - step * bank)
        found.append(float((change / (2 * step)).double().norm(dim=-1).mean()))
    return found


def sensitive(seen: Seen, scores: list[float]) -> Picks:
    low, high = min(scores), max(scores)
    weight = [(score - low) / (high - low) for score in scores]
    far = distances(seen.features)

    def gain(i: int, picks: list[int]) -> float:
        return weight[i] * min(float(far[i, j]) for j in picks)

    stay = greedy(scores.index(high), gain, KEEP)
    return stay, seen.features[stay]


@calls
@pytest.mark.parametrize(
    ("mode", "directions", "step"), [("exact", 64, 0.01), ("jvp", 7, 0.01), ("reference", 9, 0.05)]
)
def test_zeroth_order(mode: str, directions: int, step: float, make: Any, attention: str) -> None:
    method = ZerothOrder(keep=KEEP, mode=mode, directions=directions, step=step, seed=3)

    def by_hand(seen: Seen) -> Picks:
        return sensitive(seen, responses(seen, mode, directions, step))

    check(method, attention, make, by_hand)


@pytest.mark.parametrize("mode", ["exact", "reference"])
def test_zeroth_order_of_a_half_precision_model_is_computed_in_fp32(mode: str) -> None:
    model, inputs = hand.tiny_llava().to(torch.bfloat16), hand.padded_batch()
    with vistoken.attach(model, ZerothOrder(keep=KEEP, mode=mode, seed=3)) as held:
        model(**inputs)
        kept = [stay.tolist() for stay in held.report().kept]
    expected = []
    # eager attention rounds elsewhere in half precision, so read what the model itself reads
    read: list[Tensor] = []
    hook = model.model.multi_modal_projector.register_forward_pre_hook(
        lambda _, args: read.append(args[0])
    )
    features = hand.features(model, inputs)
    hook.remove()
    full = copy.deepcopy(model.model.multi_modal_projector).float()
    for encoded, projected in zip(read[0].float(), features, strict=True):
        seen = Seen(encoded[:, 0], encoded, encoded, projected, full)
        expected.append(sensitive(seen, responses(seen, mode, 64, 0.01))[0])
    assert kept == expected


# --- DivPrune and Spread -------------------------------------------------------------------------


def diverse(seen: Seen) -> Picks:
    far = distances(seen.features).tolist()
    alone = [min(far[i][j] for j in range(tiny.TOKENS) if j != i) for i in range(tiny.TOKENS)]
    first = max(range(tiny.TOKENS), key=lambda i: (alone[i], -i))
    stay = greedy(first, lambda i, picks: min(far[i][j] for j in picks), KEEP)
    return stay, seen.features[stay]


@calls
@places
def test_divprune(positions: str, make: Any, attention: str) -> None:
    check(DivPrune(keep=KEEP, positions=positions), attention, make, diverse)


def spread_out(seen: Seen, sharpness: float, reach: float) -> Picks:
    far = distances(seen.features).tolist()
    side = tiny.GRID

    def apart(i: int, j: int) -> float:
        if reach == 0:
            return 1.0
        gap = math.hypot(i // side - j // side, i % side - j % side) / side
        return 1 - math.exp(-((gap / reach) ** 2))

    weight = [float(a) ** sharpness for a in seen.attention]

    def gain(i: int, picks: list[int]) -> float:
        return weight[i] * min(far[i][j] * apart(i, j) for j in picks)

    stay = greedy(weight.index(max(weight)), gain, KEEP)
    return stay, seen.features[stay]


@calls
@pytest.mark.parametrize(("sharpness", "reach"), [(1.5, 0.3), (1.0, 0.0), (4.0, 1.0)])
def test_spread(sharpness: float, reach: float, make: Any, attention: str) -> None:
    method = Spread(keep=KEEP, sharpness=sharpness, reach=reach)
    check(method, attention, make, lambda seen: spread_out(seen, sharpness, reach))


# --- what all of them share ----------------------------------------------------------------------

METHODS: list[tuple[Pruner, Callable[[Seen], Picks]]] = [
    (VisionZip(keep=KEEP), lambda seen: zipped(seen, "mean", 2)),
    (ZerothOrder(keep=KEEP), lambda seen: sensitive(seen, responses(seen, "exact", 1, 1))),
    (DivPrune(keep=KEEP), diverse),
    (Spread(keep=KEEP), lambda seen: spread_out(seen, 1.5, 0.3)),
]
names = [method.name for method, _ in METHODS]


@pytest.mark.parametrize(("method", "by_hand"), METHODS, ids=names)
@pytest.mark.parametrize("chosen", [-1, 2])
def test_the_layer_of_the_features_is_the_one_that_is_read(
    chosen: int, method: Pruner, by_hand: Callable[[Seen], Picks]
) -> None:
    model, inputs = hand.tiny_llava(feature_layer=chosen), hand.padded_batch()
    _, kept = hand.pruned(model, inputs, method, 0)
    assert kept == [by_hand(seen)[0] for seen in look(model, inputs, chosen)]


@pytest.mark.parametrize("method", [method for method, _ in METHODS], ids=names)
def test_a_batch_is_its_rows(method: Pruner) -> None:
    hand.check_batch_is_its_rows(method)


@pytest.mark.parametrize("method", [method for method, _ in METHODS], ids=names)
def test_no_trace_is_left(method: Pruner) -> None:
    hand.check_leaves_no_trace(method, type(method)(keep=tiny.TOKENS))


@pytest.mark.parametrize("method", [DivPrune(keep=KEEP), ZerothOrder(keep=KEEP)], ids=["div", "zo"])
def test_equal_tokens_are_not_kept_twice(method: Pruner) -> None:
    """A picture of few different patches in a tower without places: copies of a token come last."""
    model, inputs = hand.tiny_llava(), hand.one_row()
    model.model.vision_tower.embeddings.position_embedding.weight.zero_()
    patch = inputs["pixel_values"][:, :, :14]
    inputs["pixel_values"] = patch.repeat(1, 1, tiny.GRID, 1)
    _, (kept,) = hand.pruned(model, inputs, method, 0)
    assert len(set(kept)) == KEEP and {i % tiny.GRID for i in kept} == set(range(tiny.GRID))
