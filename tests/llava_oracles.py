"""LLaVA by hand: one prompt at a time, every layer written out in eager attention, no cache.

What the oracles of the methods' tests are made of. A choice is made once, from what the layer by
hand (or the bare model's own attention maps) shows, and repeated at every step of decoding.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor

import tiny
import vistoken
from test_language import greedy, masked
from vistoken.contract import Place
from vistoken.pruning import Pruner

STEPS = 8


def tiny_llava(*, peak: float = 200.0, **shape: Any) -> Any:
    """A tiny model whose tower looks at some tokens more than at others, the more the later."""
    model = tiny.tiny_llava(**shape)
    for number, layer in enumerate(model.model.vision_tower.encoder.layers):
        layer.self_attn.q_proj.weight.data.mul_(1 + peak * number)
    return model


# --- prompts ---------------------------------------------------------------------------------


@dataclass
class Row:
    """One prompt of a batch, without its padding.

    ids; pictures: the columns of each picture's tokens; first: the number of its first picture in
    the batch; pad: how many columns of padding stood before it.
    """

    ids: list[int]
    pictures: list[list[int]]
    first: int
    pad: int

    @property
    def text(self) -> list[int]:
        """Columns of the text behind the last picture."""
        return list(range(self.pictures[-1][-1] + 1, len(self.ids)))


def rows_of(inputs: dict[str, Tensor]) -> list[Row]:
    found, first = [], 0
    for ids, mask in zip(inputs["input_ids"], inputs["attention_mask"], strict=True):
        known = ids[mask.bool()].tolist()
        marks = [column for column, word in enumerate(known) if word == tiny.IMAGE]
        runs = [marks[i : i + tiny.TOKENS] for i in range(0, len(marks), tiny.TOKENS)]
        found.append(Row(known, runs, first, len(ids) - len(known)))
        first += len(runs)
    return found


def padded_batch() -> dict[str, Tensor]:
    """Two pictures in the first row, one in the second, which is padded on the left."""
    rows = (tiny.prompt(3, "image", 4, "image", 7, seed=1), tiny.prompt(2, "image", 11, seed=2))
    return {**tiny.batch(*rows), "pixel_values": tiny.pictures(3, seed=5)}


def mixed_batch() -> dict[str, Tensor]:
    """The same with a row of text alone, and one whose picture comes last."""
    rows = (
        tiny.prompt(3, "image", 4, "image", 7, seed=1),
        tiny.prompt(2, "image", 11, seed=2),
        tiny.prompt(20, seed=3),
        tiny.prompt(6, "image", seed=4),
    )
    return {**tiny.batch(*rows), "pixel_values": tiny.pictures(4, seed=5)}


def one_row() -> dict[str, Tensor]:
    ids = tiny.prompt(4, "image", 9, seed=3)
    return {**tiny.batch(ids), "pixel_values": tiny.pictures(1, seed=4)}


def singles(inputs: dict[str, Tensor]) -> list[dict[str, Tensor]]:
    """The rows of a batch as calls of their own."""
    found = []
    for row in rows_of(inputs):
        pixels = inputs["pixel_values"][row.first : row.first + len(row.pictures)]
        given = {"pixel_values": pixels} if row.pictures else {}
        found.append({**tiny.batch(row.ids), **given})
    return found


def features(model: Any, inputs: dict[str, Tensor]) -> list[Tensor]:
    """The bare model's projected features [36, C] of each picture."""
    return list(model.get_image_features(inputs["pixel_values"], return_dict=True).pooler_output)


def words(model: Any, row: Row, columns: Sequence[int]) -> Tensor:
    """Text embeddings [T, C]."""
    return model.get_input_embeddings()(torch.tensor([row.ids[column] for column in columns]))


def best(scores: Sequence[float] | Tensor, count: int) -> list[int]:
    """Indices of the largest scores, ascending; ties go to the lower index."""
    values = [float(score) for score in scores]
    return sorted(sorted(range(len(values)), key=lambda i: (-values[i], i))[:count])


# --- the LLM ---------------------------------------------------------------------------------


@dataclass
class Choice:
    """What a stage does to a prompt, by columns of the full one.

    drop: columns that leave. merge: column -> columns whose mean takes its place. hide: pairs of
    (query, key) that later layers must not see.
    """

    drop: set[int] = field(default_factory=set)
    merge: dict[int, list[int]] = field(default_factory=dict)
    hide: set[tuple[int, int]] = field(default_factory=set)


@dataclass
class Stream:
    """A prompt behind some layer: hidden [S, C], the columns it has left, that layer's maps."""

    hidden: Tensor
    columns: list[int]
    maps: Tensor  # [H, S, S]
    hidden_pairs: set[tuple[int, int]]

    def at(self, columns: Sequence[int]) -> list[int]:
        return [self.columns.index(column) for column in columns]

    def rows(self, queries: Sequence[int], keys: Sequence[int]) -> Tensor:
        """Attention [H, Q, K] between columns of the full prompt."""
        return self.maps[:, self.at(queries)][:, :, self.at(keys)]

    def follow(self, choice: Choice) -> None:
        means = {c: self.hidden[self.at(m)].mean(0) for c, m in choice.merge.items()}
        stay = [c for c in self.columns if c not in choice.drop]
        old = {c: self.hidden[i] for i, c in enumerate(self.columns)}
        self.hidden = torch.stack([means.get(c, old[c]) for c in stay])
        self.columns = stay
        self.hidden_pairs |= choice.hide


class Once:
    """A stage that decides at the prefill and does the same again at every step of decoding."""

    def __init__(self, decide: Callable[[Stream], Choice]) -> None:
        self.decide = decide
        self.choice: Choice | None = None

    def __call__(self, stream: Stream) -> None:
        if self.choice is None:
            self.choice = self.decide(stream)
        stream.follow(self.choice)


Stages = dict[int, Once]


def rotate(x: Tensor, positions: Tensor) -> Tensor:
    half = x.shape[-1] // 2
    angles = positions[:, None] * 10_000.0 ** (-torch.arange(half) / half)
    cos, sin = angles.cos(), angles.sin()
    low, high = x[..., :half], x[..., half:]
    return torch.cat([low * cos - high * sin, high * cos + low * sin], dim=-1)


def llm_layer(
    model: Any, number: int, x: Tensor, positions: Tensor, hidden: Tensor
) -> tuple[Tensor, Tensor]:
    """One decoder layer on x [S, C]; hidden [S, S] bool. Returns its output and maps [H, S, S]."""
    layer = model.model.language_model.layers[number]
    attention, width = layer.self_attn, layer.self_attn.head_dim
    normed = layer.input_layernorm(x)
    q, k, v = (
        getattr(attention, name)(normed).view(len(x), -1, width).transpose(0, 1)
        for name in ("q_proj", "k_proj", "v_proj")
    )
    groups = len(q) // len(k)
    k = rotate(k, positions).repeat_interleave(groups, 0)
    logits = rotate(q, positions) @ k.mT / width**0.5
    closed = torch.ones(len(x), len(x), dtype=torch.bool).triu(1) | hidden
    maps = logits.masked_fill(closed, -torch.inf).softmax(-1)
    mixed = (maps @ v.repeat_interleave(groups, 0)).transpose(0, 1).flatten(1)
    x = x + attention.o_proj(mixed)
    return x + layer.mlp(layer.post_attention_layernorm(x)), maps


def run_llm(
    model: Any, embeds: Tensor, columns: list[int], stages: Stages, *, renumber: bool
) -> tuple[Tensor, list[Tensor]]:
    """Logits [S, vocabulary] of a prompt whose tokens stood at `columns`, and all maps."""
    stream = Stream(embeds, list(columns), torch.empty(0), set())
    seen = []
    for number in range(len(model.model.language_model.layers)):
        count, columns = len(stream.columns), stream.columns
        positions = torch.arange(count) if renumber else torch.tensor(columns)
        hidden = torch.zeros(count, count, dtype=torch.bool)
        for query, key in stream.hidden_pairs:
            hidden[columns.index(query), columns.index(key)] = True
        stream.hidden, stream.maps = llm_layer(model, number, stream.hidden, positions, hidden)
        seen.append(stream.maps)
        if number in stages:
            stages[number](stream)
    return model.lm_head(model.model.language_model.norm(stream.hidden)), seen


def greedy_by_hand(
    model: Any,
    row: Row,
    visual: list[Tensor],
    *,
    left: list[list[int]] | None = None,
    stages: Stages | None = None,
    renumber: bool,
    steps: int = STEPS,
) -> list[Tensor]:
    """Logits of the last token at the prefill and at each step, for one row of a batch.

    visual: the embeddings of the row's pictures as they enter the LLM; left: which of their
    tokens these are (None: all).
    """
    embeds, columns = short_prompt(model, row, visual, left)
    found = []
    for step in range(steps + 1):
        logits, _ = run_llm(model, embeds, columns, stages or {}, renumber=renumber)
        found.append(logits[-1])
        new = model.get_input_embeddings()(logits[-1].argmax())
        embeds = torch.cat([embeds, new[None]])
        columns = [*columns, len(row.ids) + step]
    return found


def short_prompt(
    model: Any, row: Row, visual: list[Tensor], left: list[list[int]] | None = None
) -> tuple[Tensor, list[int]]:
    """Embeddings [S, C] that enter the LLM, and the columns of the full prompt they stood at."""
    if left is None:
        left = [list(range(len(run))) for run in row.pictures]
    tokens = {
        run[index]: tensor[i]
        for run, stay, tensor in zip(row.pictures, left, visual, strict=True)
        for i, index in enumerate(stay)
    }
    gone = {column for run in row.pictures for column in run} - set(tokens)
    columns = [column for column in range(len(row.ids)) if column not in gone]
    text = words(model, row, range(len(row.ids)))
    return torch.stack([tokens.get(c, text[c]) for c in columns]), columns


# --- hiding keys in the bare model -----------------------------------------------------------

Choose = Callable[[Tensor, list[int], Row, int], list[int]]


def masked_stages(
    oracle: Any, inputs: dict[str, Tensor], stages: dict[int, Choose]
) -> list[list[list[int]]]:
    """Hide in the bare eager model, behind each stage's layer, the keys that it drops.

    choose: attention maps [H, S, S] of a row, the columns of a picture's tokens that are left,
    the row and the picture's number -> which of these stay. Returns what each stage left of each
    picture. The hooks stay on `oracle`.
    """
    rows, found = rows_of(inputs), []
    left = [list(range(tiny.TOKENS)) for row in rows for _ in row.pictures]
    positions = (inputs["attention_mask"].cumsum(1) - 1).clamp(min=0)
    for layer, choose in sorted(stages.items()):
        out = oracle(**inputs, position_ids=positions, output_attentions=True)
        dropped: dict[int, list[int]] = {}
        for number, row in enumerate(rows):
            maps = out.attentions[layer][number][:, row.pad :, row.pad :]
            for i, run in enumerate(row.pictures):
                picture = row.first + i
                columns = [run[index] for index in left[picture]]
                stay = choose(maps, columns, row, picture)
                gone = [c + row.pad for j, c in enumerate(columns) if j not in stay]
                dropped.setdefault(number, []).extend(gone)
                left[picture] = [left[picture][j] for j in stay]
        found.append([list(stay) for stay in left])
        masked(oracle, layer, dropped)
    return found


# --- what the method did through the model ----------------------------------------------------


def watch(method: Pruner, monkeypatch: pytest.MonkeyPatch) -> dict[Any, list[list[int]]]:
    """Note what every stage leaves, by (place, layer): of each picture its tokens' indices."""
    seen: dict[Any, list[list[int]]] = {}
    select = type(method).select

    def note(self: Any, view: Any, keep: int) -> Any:
        chosen = select(self, view, keep)
        left = view.origin if chosen is None else view.origin.gather(1, chosen.indices)
        seen[view.stage.place, view.stage.layer] = left.tolist()
        return chosen

    monkeypatch.setattr(type(method), "select", note)
    return seen


def llm_stages(seen: dict[Any, list[list[int]]]) -> dict[int, list[list[int]]]:
    return {layer: left for (place, layer), left in seen.items() if place is Place.LLM_LAYER}


def pruned(
    model: Any, inputs: dict[str, Tensor], method: Pruner, steps: int = STEPS
) -> tuple[list[Tensor], list[list[int]]]:
    """Logits of the prefill's last column and of each step, and what was left of each picture."""
    with vistoken.attach(model, method) as held:
        logits = greedy(model, inputs, steps)
        if "pixel_values" not in inputs:
            return logits, []
        return logits, [kept.tolist() for kept in held.report().kept]


def assert_steps(found: list[Tensor], expected: list[Tensor]) -> None:
    for step, (a, b) in enumerate(zip(found, expected, strict=True)):
        assert torch.allclose(a, b, atol=1e-5), (step, float((a - b).abs().max()))


def assert_rows(found: list[Tensor], by_row: list[list[Tensor]]) -> None:
    """Logits [B, V] of each step against those of each row by hand."""
    for number, expected in enumerate(by_row):
        assert_steps([logits[number] for logits in found], expected)


def check_batch_is_its_rows(method: Pruner, **shape: Any) -> None:
    """A left-padded batch keeps and says what its rows do alone; sdpa and eager choose the same."""
    inputs, kept_by = mixed_batch(), []
    for attention in ("sdpa", "eager"):
        model = tiny_llava(attention=attention, **shape)
        together, kept = pruned(model, inputs, method, 3)
        alone = [pruned(model, one, method, 3) for one in singles(inputs)]
        assert [stay for _, own in alone for stay in own] == kept
        assert len(kept) == 4 and all(0 < len(stay) < tiny.TOKENS for stay in kept)
        assert_rows(together, [[logits[0] for logits in steps] for steps, _ in alone])
        kept_by.append(kept)
    assert kept_by[0] == kept_by[1]


def check_leaves_no_trace(method: Pruner, neutral: Pruner, **shape: Any) -> None:
    """A budget of everything changes no bit; other models run as ever, even inside a call."""
    model, inputs = tiny_llava(**shape), padded_batch()
    other = tiny_llava(seed=1, **shape)
    pixels, words = inputs["pixel_values"], torch.randn(2, 50, 32)

    def run_other() -> list[Tensor]:
        parts = other.model.vision_tower(pixels), other.model.language_model(inputs_embeds=words)
        return [other(**inputs).logits, *(part.last_hidden_state for part in parts)]

    dense, theirs = model(**inputs).logits, run_other()
    with vistoken.attach(model, neutral):
        assert torch.equal(model(**inputs).logits, dense)
    with vistoken.attach(model, method):
        first = _same_within(model, inputs, run_other, theirs)
        with vistoken.attach(other, method):  # their tower and their LLM by themselves stay dense
            theirs[0] = other(**inputs).logits
            assert torch.equal(_same_within(model, inputs, run_other, theirs), first)
        rng = torch.get_rng_state()
        assert torch.equal(model(**inputs).logits, first)
        assert torch.equal(torch.get_rng_state(), rng)
    assert torch.equal(model(**inputs).logits, dense)
    assert not torch.equal(first[:, -1], dense[:, -1])


def _same_within(
    model: Any, inputs: dict[str, Tensor], run_other: Callable[[], Any], theirs: list[Tensor]
) -> Tensor:
    """The model's logits, which stay the same with another's runs amid its tower and its LLM."""
    assert all(map(torch.equal, run_other(), theirs))
    logits = model(**inputs).logits
    assert all(map(torch.equal, run_other(), theirs))
    inside: list[list[Tensor]] = []
    layers = (model.model.vision_tower.encoder.layers[1], *model.model.language_model.layers[:3:2])
    for module in layers:
        hook = module.register_forward_hook(lambda *_: inside.append(run_other()), prepend=True)
        assert torch.equal(model(**inputs).logits, logits)
        hook.remove()
    assert len(inside) == len(layers)
    assert all(torch.equal(a, b) for found in inside for a, b in zip(found, theirs, strict=True))
    return logits
